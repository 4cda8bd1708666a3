//! A port: one device with its lanes, joined to one vhost-user socket. It is there whoever is connected.
//!
//! ```text
//! session ──start/stop──▶ Port ──Nic::rx_lane, tx_lane──▶ lane ──▶ worker
//! link thread ──link changed──▶ Port ──▶ every lane
//! operator, host ──set_device, renew──▶ Port ──▶ occupant: lanes stop ──▶ device changes ──▶ lanes run again
//! ```
//!
//! A device comes and goes under a front-end that stays. In between, the port has [`queues::nic::absent::Absent`].

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use queues::lane::{Lane, LaneSetup, LaneStats, Stopped, Stuck};
use queues::nic::{Link, Nic, NicError};
use vfio_glue::map::{Extent, MemoryMap};
use vfio_glue::memory::Table;
use vfio_glue::pci::HostEvent;

use crate::worker::{LaneId, Patience, Worker, WorkerGone};

/// Which way a lane goes, from the guest's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Wire to guest: virtqueue 0 of each pair.
    Rx,
    /// Guest to wire: virtqueue 1 of each pair.
    Tx,
}

impl Direction {
    /// The direction of virtqueue `index` (virtio 1.2 §5.1.2).
    pub fn of(index: usize) -> Self {
        if index.is_multiple_of(2) {
            Self::Rx
        } else {
            Self::Tx
        }
    }

    /// The word in logs and `stats`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rx => "rx",
            Self::Tx => "tx",
        }
    }
}

/// Why a port could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The device did not stop and no reset has helped yet.
    #[error("the device of port {port} did not stop and could not be reset: it is not used until it can")]
    Stuck {
        /// The port.
        port: String,
    },
    /// The device cannot be taken from its port.
    #[error("port {port} keeps {device} and its memory stays mapped: its DMA could not be ended")]
    KeepsDevice {
        /// The port.
        port: String,
        /// The device it has.
        device: String,
        /// Why not.
        source: Box<NicError>,
    },
    /// A device that does not fit what the front-end was told.
    #[error("{device} has {pairs} queue pairs, port {port} has {wanted}")]
    QueuePairs {
        /// The port.
        port: String,
        /// The device to come.
        device: String,
        /// How many it has.
        pairs: u16,
        /// How many it would need.
        wanted: usize,
    },
    /// There is no worker to run a lane.
    #[error("port {port} has no worker")]
    NoWorker {
        /// The port.
        port: String,
    },
    /// The card failed.
    #[error("the device failed")]
    Nic(#[from] NicError),
    /// The worker's thread has ended.
    #[error("the lane's worker is gone")]
    Worker(#[from] WorkerGone),
}

/// What a port is, apart from who is connected.
pub struct Port {
    name: String,
    map: Arc<MemoryMap>,
    /// Pair 0 is on the first, pair 1 on the next, and round again. Both lanes of a pair are on one.
    workers: Vec<Arc<Worker>>,
    /// A worker for this port alone, once its front-end has made the shared one wait.
    apart: OnceLock<Arc<Worker>>,
    patience: Patience,
    max_frame: u32,
    stats: Vec<Arc<LaneStats>>,
    state: Mutex<State>,
    /// What `state` shows, so that nobody waits for a device just to look. Held for a moment, with nothing else taken.
    shown: Mutex<PortStatus>,
    /// The guest's memory as its session has it, for the same.
    memory: Mutex<Arc<Table>>,
}

struct State {
    nic: Box<dyn Nic>,
    device: String,
    link: Link,
    resets: u64,
    /// By virtqueue index.
    running: Vec<Option<Seat>>,
    /// Lanes that did not follow the link, by virtqueue index: no worker has them, so that nothing more is given to a
    /// queue in that state. They wait to be stopped.
    astray: Vec<(usize, Box<dyn Lane>)>,
    connected: bool,
    /// Who has the port, to be told when its device needs a reset.
    occupant: Weak<dyn Occupant>,
    /// Queues that did not stop: the card may still use memory until it is reset, so all of it stays mapped.
    stuck: Vec<Stuck>,
    /// Guest memory that was to go while the device was stuck.
    abandoned: Vec<Arc<Extent>>,
}

/// Where a lane runs.
#[derive(Clone)]
struct Seat {
    worker: Arc<Worker>,
    id: LaneId,
}

/// Whoever uses a port: it alone knows which lanes are to run.
pub trait Occupant: Send + Sync {
    /// Stops all lanes, does `work`, and has those run again that are to run, unless `work` says otherwise.
    ///
    /// Blocks for as long as that takes, and keeps the front-end waiting for so long.
    fn with_lanes_stopped(&self, work: &mut dyn FnMut() -> Lanes);

    /// Looks for memory of the guest that was discarded behind its pins, has it mapped anew, and returns how many bytes
    /// were missing.
    ///
    /// # Errors
    ///
    /// Why it could not be mapped anew.
    fn renew_discarded(&self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>>;
}

/// What becomes of a port's lanes when something was done to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// Those run that are to run.
    Run,
    /// The device is of no use: they stay at rest.
    Rest,
}

/// Nobody.
struct Vacant;

impl Occupant for Vacant {
    fn with_lanes_stopped(&self, work: &mut dyn FnMut() -> Lanes) {
        work();
    }

    fn renew_discarded(&self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        Ok(0)
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Port({})", self.name)
    }
}

/// What a port looks like at one moment.
#[derive(Clone, Debug)]
pub struct PortStatus {
    /// The device's name.
    pub device: String,
    /// Its link.
    pub link: Link,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// By virtqueue index, whether its lane runs.
    pub running: Vec<bool>,
    /// How often a device of this port was reset and came back.
    pub resets: u64,
}

impl Port {
    /// Joins a device to workers, of which there is at least one. Its queue pairs are dealt out to them in turn, and its
    /// frames are at most `mtu` bytes of payload and a tagged header.
    pub fn new(
        name: &str,
        map: Arc<MemoryMap>,
        mut nic: Box<dyn Nic>,
        workers: Vec<Arc<Worker>>,
        patience: Patience,
        mtu: u16,
    ) -> Self {
        let queues = 2 * usize::from(nic.queue_pairs());
        let (device, link) = (nic.name(), nic.link());
        let shown = PortStatus {
            device: device.clone(),
            link,
            connected: false,
            running: vec![false; queues],
            resets: 0,
        };
        Self {
            name: name.to_owned(),
            map,
            workers,
            apart: OnceLock::new(),
            patience,
            max_frame: u32::from(mtu) + 14 + 4,
            stats: (0..queues).map(|_| Arc::default()).collect(),
            memory: Mutex::default(),
            shown: Mutex::new(shown),
            state: Mutex::new(State {
                nic,
                device,
                link,
                resets: 0,
                running: vec![None; queues],
                astray: Vec::new(),
                connected: false,
                occupant: Weak::<Vacant>::new(),
                stuck: Vec::new(),
                abandoned: Vec::new(),
            }),
        }
    }

    /// The port's name, the owner of its guest's memory on the map.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The map its guest's memory goes to.
    pub fn map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// How many virtqueues it serves: two for each pair.
    pub fn queues(&self) -> usize {
        self.stats.len()
    }

    /// The largest frame, in bytes without frame check sequence.
    pub fn max_frame(&self) -> u32 {
        self.max_frame
    }

    /// The counters of virtqueue `index`. They count on over reconnects.
    pub fn stats(&self, index: usize) -> Option<&Arc<LaneStats>> {
        self.stats.get(index)
    }

    /// What it looks like now. Does not wait for the device, whatever is done to it.
    pub fn status(&self) -> PortStatus {
        self.shown().clone()
    }

    /// How often a device of this port was reset and came back.
    pub fn resets(&self) -> u64 {
        self.shown().resets
    }

    /// A front-end has come.
    pub fn occupy(&self, occupant: Weak<dyn Occupant>) {
        let mut state = self.state();
        state.connected = true;
        state.occupant = occupant;
        self.show(&state);
    }

    /// The front-end has gone.
    pub fn vacate(&self) {
        let mut state = self.state();
        state.connected = false;
        state.occupant = Weak::<Vacant>::new();
        self.show(&state);
    }

    /// Keeps memory mapped that a stuck device may still use. It goes with the next reset that helps.
    pub fn abandon(&self, extents: Vec<Arc<Extent>>) {
        self.state().abandoned.extend(extents);
    }

    /// Has memory of whoever is connected that was discarded behind its pins mapped anew, and returns how many bytes
    /// were missing.
    ///
    /// # Errors
    ///
    /// Why it could not be mapped anew.
    pub fn renew_discarded(&self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        // The occupant comes back here for its lanes, so it is asked with nothing held.
        let occupant = self.state().occupant.upgrade();
        occupant.map_or(Ok(0), |occupant| occupant.renew_discarded())
    }

    /// Takes note of the guest's memory, for `stats`.
    pub fn set_memory(&self, table: &Arc<Table>) {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(table);
    }

    /// The guest's memory as its session has it. Does not wait for the device.
    pub fn memory(&self) -> Arc<Table> {
        Arc::clone(&self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Joins virtqueue `index` to the card and sets the lane going.
    ///
    /// `setup` lacks only what the port knows.
    ///
    /// # Errors
    ///
    /// [`PortError`]; the queue is at rest then.
    pub fn start_lane(&self, index: usize, mut setup: LaneSetup) -> Result<(), PortError> {
        let mut state = self.state();
        if !state.stuck.is_empty() {
            return Err(PortError::Stuck {
                port: self.name.clone(),
            });
        }
        setup.link_up = state.link.is_up();
        let kicks = setup.kick.is_some();
        let pair = u16::try_from(index / 2).unwrap_or(u16::MAX);
        let lane = match Direction::of(index) {
            Direction::Rx => state.nic.rx_lane(pair, setup)?,
            Direction::Tx => state.nic.tx_lane(pair, setup)?,
        };
        // A front-end that will not kick is polled.
        let patience = if kicks { self.patience } else { Patience::Forever };
        let worker = Arc::clone(self.worker(pair)?);
        let id = worker.add(lane, patience)?;
        if let Some(slot) = state.running.get_mut(index) {
            *slot = Some(Seat { worker, id });
        }
        self.show(&state);
        Ok(())
    }

    /// Stops virtqueue `index`, if it runs, and returns the first entry that was not used.
    ///
    /// Unless the port [`is_stuck`](Self::is_stuck) afterwards, neither we nor the card touch the guest's memory for
    /// that queue any more. If it is, [`reset`](Self::reset) comes before anything else.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn stop_lane(&self, index: usize) -> Result<Option<u16>, WorkerGone> {
        let mut state = self.state();
        let seat = state.running.get_mut(index).and_then(Option::take);
        self.show(&state);
        let astray = state.astray.iter().position(|(lane, _)| *lane == index);
        let lane = match (seat, astray) {
            (Some(seat), _) => seat.worker.remove(seat.id)?,
            (None, Some(at)) => Some(state.astray.swap_remove(at).1),
            (None, None) => None,
        };
        let Some(lane) = lane else {
            return Ok(None);
        };
        let Stopped { first_unused, card } = lane.stop();
        if let Err(stuck) = card {
            let error: &dyn std::error::Error = &stuck.source;
            tracing::error!(port = self.name, error, "only a reset ends the card's DMA");
            state.stuck.push(stuck);
        }
        Ok(Some(first_unused))
    }

    /// Whether a queue of the card did not stop since the last reset.
    pub fn is_stuck(&self) -> bool {
        !self.state().stuck.is_empty()
    }

    /// Does something with the lane of virtqueue `index` between two passes, if it runs.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn with_lane<R: Send + 'static>(
        &self,
        index: usize,
        work: impl FnOnce(&mut dyn Lane) -> R + Send + 'static,
    ) -> Result<Option<R>, WorkerGone> {
        let seat = self.state().running.get(index).cloned().flatten();
        seat.map_or(Ok(None), |seat| seat.worker.with(seat.id, work))
    }

    /// Whether a lane is to move to a worker of this port alone: stop and start it.
    pub fn is_to_be_apart(&self) -> bool {
        let shared = |seat: &Seat| {
            self.workers
                .iter()
                .any(|worker| Arc::ptr_eq(&seat.worker, worker))
        };
        self.has_stalled() && self.state().running.iter().flatten().any(shared)
    }

    /// The worker it has to itself, if it has one. Takes no lock.
    pub fn own_worker(&self) -> Option<&Arc<Worker>> {
        self.apart.get()
    }

    fn has_stalled(&self) -> bool {
        self.stats.iter().any(|stats| stats.stalls.get() > 0)
    }

    /// The worker for a lane of pair `pair` that starts now. A front-end that has made a shared one wait gets one of its
    /// own, so that it waits for itself the next time.
    fn worker(&self, pair: u16) -> Result<&Arc<Worker>, PortError> {
        if self.has_stalled() && self.apart.get().is_none() {
            match Worker::start(&format!("worker {}", self.name), None) {
                Ok(worker) => {
                    tracing::warn!(
                        port = self.name,
                        "its front-end made a worker wait: it gets one of its own"
                    );
                    // Lanes start under the port's lock, so nobody else has set it.
                    let _ = self.apart.set(worker);
                }
                Err(error) => tracing::error!(port = self.name, %error, "no worker of its own"),
            }
        }
        let dealt = || self.workers.iter().cycle().nth(pair.into());
        self.apart
            .get()
            .or_else(dealt)
            .ok_or_else(|| PortError::NoWorker {
                port: self.name.clone(),
            })
    }

    /// Resets the device. All lanes of the port have been stopped. Memory that was kept for it goes.
    ///
    /// # Errors
    ///
    /// [`NicError`] if it does not come back; its DMA may go on, and everything stays mapped.
    pub fn reset(&self) -> Result<(), NicError> {
        self.reset_at_rest(&mut self.state())
    }

    /// Resets the device under whoever is connected: the lanes stop before and run again after.
    ///
    /// # Errors
    ///
    /// As [`reset`](Self::reset); the lanes are at rest then.
    pub fn renew(&self) -> Result<(), NicError> {
        self.at_rest(&mut |state| self.reset_at_rest(state))
    }

    /// Gives the port another device in place of the one it has, under whoever is connected: the lanes stop before and
    /// run again after. The one it had is off its map when this returns.
    ///
    /// Blocks for as long as the devices take, some 100 ms.
    ///
    /// # Errors
    ///
    /// [`PortError::QueuePairs`] if it does not fit, and [`PortError::KeepsDevice`] if the one the port has did not stop
    /// and cannot be reset either. The port is as before, and `nic` is let go.
    pub fn set_device(&self, nic: Box<dyn Nic>) -> Result<(), PortError> {
        if 2 * usize::from(nic.queue_pairs()) != self.queues() {
            return Err(PortError::QueuePairs {
                port: self.name.clone(),
                device: nic.name(),
                pairs: nic.queue_pairs(),
                wanted: self.queues() / 2,
            });
        }
        let mut coming = Some(nic);
        self.at_rest(&mut |state| coming.take().map_or(Ok(()), |nic| self.swap(state, nic)))
    }

    /// Does `work` while no lane runs. After an error of it the lanes stay at rest.
    fn at_rest<E>(&self, work: &mut dyn FnMut(&mut State) -> Result<(), E>) -> Result<(), E> {
        loop {
            let mut outcome = None;
            let mut once = || {
                let mut state = self.state();
                // The front-end that was asked may have gone meanwhile, and another come.
                if state.running.iter().any(Option::is_some) || !state.astray.is_empty() {
                    return Lanes::Run;
                }
                let worked = work(&mut state);
                let lanes = if worked.is_ok() { Lanes::Run } else { Lanes::Rest };
                outcome = Some(worked);
                lanes
            };
            let occupant = self.state().occupant.upgrade();
            // The occupant comes back here for its lanes, so it is asked with nothing held.
            match occupant {
                Some(occupant) => occupant.with_lanes_stopped(&mut once),
                None => {
                    once();
                }
            }
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }

    fn reset_at_rest(&self, state: &mut State) -> Result<(), NicError> {
        tracing::warn!(port = self.name, "the device is reset");
        state.nic.reset()?;
        state.resets += 1;
        state.link = state.nic.link();
        self.show(state);
        self.let_go(state);
        Ok(())
    }

    fn swap(&self, state: &mut State, mut nic: Box<dyn Nic>) -> Result<(), PortError> {
        // A queue that runs on would write where others may have their memory next.
        if !(state.stuck.is_empty() && state.abandoned.is_empty())
            && let Err(source) = state.nic.end_dma()
        {
            return Err(PortError::KeepsDevice {
                port: self.name.clone(),
                device: state.device.clone(),
                source: Box::new(source),
            });
        }
        let device = nic.name();
        state.link = nic.link();
        let before = std::mem::replace(&mut state.device, device.clone());
        drop(std::mem::replace(&mut state.nic, nic));
        self.show(state);
        self.let_go(state);
        // Who asked for it says why.
        tracing::debug!(port = self.name, before, device, "another device");
        Ok(())
    }

    /// Lets memory go that was kept for the device's DMA, which is over.
    fn let_go(&self, state: &mut State) {
        state.stuck.clear();
        let abandoned = std::mem::take(&mut state.abandoned);
        if let Err(error) = self.map.let_go(&self.name, &abandoned) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(port = self.name, error, "a range stays mapped");
        }
    }

    /// A duplicate of what becomes readable when the link may have changed.
    pub fn link_event(&self) -> Option<std::os::fd::OwnedFd> {
        self.state()
            .nic
            .link_event()
            .and_then(|fd| fd.try_clone_to_owned().ok())
    }

    /// A duplicate of what becomes readable when the host tells `which` of the device.
    pub fn host_event(&self, which: HostEvent) -> Option<std::os::fd::OwnedFd> {
        self.state()
            .nic
            .host_event(which)
            .and_then(|fd| fd.try_clone_to_owned().ok())
    }

    /// Looks at the link and tells the lanes if it changed.
    ///
    /// A card without a link keeps the frames it has, so its queue may not stop: then the whole device is reset, as
    /// its own kernel driver does.
    pub fn look_at_link(&self) {
        let mut state = self.state();
        let link = state.nic.link();
        if link == state.link {
            return;
        }
        state.link = link;
        match link {
            Link::Up { mbps } => tracing::info!(port = self.name, mbps, "link is up"),
            Link::Down => tracing::warn!(
                port = self.name,
                "link is down: frames to send are dropped and counted"
            ),
        }
        let mut needs_reset = false;
        for index in 0..self.queues() {
            match self.tell_link(&mut state, index, link.is_up()) {
                Ok(()) => {}
                Err(PortError::Nic(error)) => {
                    tracing::info!(port = self.name, %error, "a queue did not follow the link");
                    needs_reset = true;
                }
                Err(error) => tracing::error!(port = self.name, %error, "a lane did not follow the link"),
            }
        }
        // Not before: who has seen it down may count on what a lane does then.
        self.show(&state);
        drop(state);
        if needs_reset && let Err(error) = self.renew() {
            let error: &dyn std::error::Error = &error;
            tracing::error!(
                port = self.name,
                error,
                "the device did not come back from its reset"
            );
        }
    }

    /// Tells one lane, on this thread: its queue may take a while to stop, and the worker has other ports' lanes.
    fn tell_link(&self, state: &mut State, index: usize, up: bool) -> Result<(), PortError> {
        let Some(seat) = state.running.get(index).cloned().flatten() else {
            return Ok(());
        };
        let Some((mut lane, patience)) = seat.worker.take(seat.id)? else {
            return Ok(());
        };
        if let Err(error) = lane.set_link(up) {
            state.astray.push((index, lane));
            if let Some(slot) = state.running.get_mut(index) {
                *slot = None;
            }
            return Err(error.into());
        }
        let id = seat.worker.add(lane, patience)?;
        if let Some(slot) = state.running.get_mut(index) {
            *slot = Some(Seat { id, ..seat });
        }
        Ok(())
    }

    fn show(&self, state: &State) {
        *self.shown() = PortStatus {
            device: state.device.clone(),
            link: state.link,
            connected: state.connected,
            running: state.running.iter().map(Option::is_some).collect(),
            resets: state.resets,
        };
    }

    fn shown(&self) -> MutexGuard<'_, PortStatus> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use queues::nic::absent::Absent;
    use vfio_glue::iommu::software::SoftwareIommu;

    use super::*;

    /// A device with `pairs` queue pairs whose reset says that it has begun, and ends when it is let.
    struct Slow {
        pairs: u16,
        begun: Sender<()>,
        may_end: Receiver<()>,
    }

    impl Nic for Slow {
        fn name(&self) -> String {
            "slow".to_owned()
        }

        fn queue_pairs(&self) -> u16 {
            self.pairs
        }

        fn link(&mut self) -> Link {
            Link::Up { mbps: 10 }
        }

        fn link_event(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn host_event(&self, _which: HostEvent) -> Option<BorrowedFd<'_>> {
            None
        }

        fn rx_lane(&mut self, pair: u16, _setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
            let device = self.name();
            Err(NicError::NotFree { device, pair })
        }

        fn tx_lane(&mut self, pair: u16, setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
            self.rx_lane(pair, setup)
        }

        fn reset(&mut self) -> Result<(), NicError> {
            self.begun.send(()).unwrap();
            self.may_end.recv().unwrap();
            Ok(())
        }

        fn end_dma(&mut self) -> Result<(), NicError> {
            Ok(())
        }
    }

    fn slow(pairs: u16) -> (Box<Slow>, Receiver<()>, Sender<()>) {
        let ((begun, has_begun), (let_end, may_end)) = (channel(), channel());
        let nic = Slow {
            pairs,
            begun,
            may_end,
        };
        (Box::new(nic), has_begun, let_end)
    }

    fn port(nic: Box<dyn Nic>) -> Port {
        let map = MemoryMap::new("main", Box::new(SoftwareIommu));
        let worker = Worker::start("worker", None).unwrap();
        Port::new("vm0", map, nic, vec![worker], Patience::Forever, 1500)
    }

    #[test]
    fn the_status_answers_while_the_device_is_reset() {
        let (nic, has_begun, let_end) = slow(1);
        let port = port(nic);
        std::thread::scope(|scope| {
            let reset = scope.spawn(|| port.renew());
            has_begun.recv().unwrap();
            let status = port.status();
            assert_eq!(
                (status.device.as_str(), status.link, status.connected),
                ("slow", Link::Up { mbps: 10 }, false)
            );
            assert_eq!((port.resets(), port.memory().regions().len()), (0, 0));
            let_end.send(()).unwrap();
            reset.join().unwrap().unwrap();
        });
        assert_eq!(port.resets(), 1);
    }

    #[test]
    fn a_device_of_another_shape_is_refused_and_the_port_keeps_its_own() {
        let port = port(Box::new(Absent::default()));
        let error = port.set_device(slow(4).0).unwrap_err();
        assert_eq!(error.to_string(), "slow has 4 queue pairs, port vm0 has 1");
        assert_eq!(port.status().device, "none");
        port.set_device(slow(1).0).unwrap();
        assert_eq!(port.status().device, "slow");
        assert!(port.status().link.is_up());
    }
}
