//! A port: one device with its lanes, joined to one vhost-user socket. It is there whoever is connected.
//!
//! ```text
//! session ──start/stop──▶ Port ──Nic::rx_lane, tx_lane──▶ lane ──▶ worker
//! link thread ──link changed──▶ Port ──▶ every lane
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use queues::lane::{Lane, LaneSetup, LaneStats, Stopped};
use queues::nic::{Link, Nic, NicError};
use vfio_glue::map::MemoryMap;
use vfio_glue::memory::Table;

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
    worker: Arc<Worker>,
    patience: Patience,
    max_frame: u32,
    stats: Vec<Arc<LaneStats>>,
    state: Mutex<State>,
}

struct State {
    nic: Box<dyn Nic>,
    device: String,
    link: Link,
    /// By virtqueue index.
    running: Vec<Option<LaneId>>,
    connected: bool,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Port({})", self.name)
    }
}

/// What a port looks like at one moment.
#[derive(Debug)]
pub struct PortStatus {
    /// The device's name.
    pub device: String,
    /// Its link.
    pub link: Link,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// By virtqueue index, whether its lane runs.
    pub running: Vec<bool>,
}

impl Port {
    /// Joins a device to a worker. Its frames are at most `mtu` bytes of payload and a tagged header.
    pub fn new(
        name: &str,
        map: Arc<MemoryMap>,
        mut nic: Box<dyn Nic>,
        worker: Arc<Worker>,
        patience: Patience,
        mtu: u16,
    ) -> Self {
        let queues = 2 * usize::from(nic.queue_pairs());
        let (device, link) = (nic.name(), nic.link());
        let running = vec![None; queues];
        Self {
            name: name.to_owned(),
            map,
            worker,
            patience,
            max_frame: u32::from(mtu) + 14 + 4,
            stats: (0..queues).map(|_| Arc::default()).collect(),
            state: Mutex::new(State {
                nic,
                device,
                link,
                running,
                connected: false,
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

    /// What it looks like now.
    pub fn status(&self) -> PortStatus {
        let state = self.state();
        PortStatus {
            device: state.device.clone(),
            link: state.link,
            connected: state.connected,
            running: state.running.iter().map(Option::is_some).collect(),
        }
    }

    /// Notes that a front-end came or went.
    pub fn set_connected(&self, connected: bool) {
        self.state().connected = connected;
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
        setup.link_up = state.link.is_up();
        let kicks = setup.kick.is_some();
        let pair = u16::try_from(index / 2).unwrap_or(u16::MAX);
        let lane = match Direction::of(index) {
            Direction::Rx => state.nic.rx_lane(pair, setup)?,
            Direction::Tx => state.nic.tx_lane(pair, setup)?,
        };
        // A front-end that will not kick is polled.
        let id = self
            .worker
            .add(lane, if kicks { self.patience } else { Patience::Forever })?;
        if let Some(slot) = state.running.get_mut(index) {
            *slot = Some(id);
        }
        Ok(())
    }

    /// Stops virtqueue `index`, if it runs. Once this returns, neither we nor the card touch the guest's memory for
    /// it. Returns the first entry that was not used.
    ///
    /// `card` in the answer is an error if the card's queue did not stop: call [`reset`](Self::reset) at once.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn stop_lane(&self, index: usize) -> Result<Option<Stopped>, WorkerGone> {
        let id = self.state().running.get_mut(index).and_then(Option::take);
        let Some(id) = id else { return Ok(None) };
        Ok(self.worker.remove(id)?.map(Lane::stop))
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
        let id = self.state().running.get(index).copied().flatten();
        id.map_or(Ok(None), |id| self.worker.with(id, work))
    }

    /// Shows every running lane the guest's new table, which has all bytes of the old one.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn publish_table(&self, table: &Arc<Table>) -> Result<(), WorkerGone> {
        for index in 0..self.queues() {
            let table = Arc::clone(table);
            self.with_lane(index, move |lane| lane.set_table(table))?;
        }
        Ok(())
    }

    /// Resets the device. All lanes of the port have been stopped.
    ///
    /// # Errors
    ///
    /// [`NicError`] if it does not come back.
    pub fn reset(&self) -> Result<(), NicError> {
        tracing::warn!(port = self.name, "the device is reset");
        let mut state = self.state();
        state.nic.reset()?;
        state.link = state.nic.link();
        Ok(())
    }

    /// A duplicate of what becomes readable when the link may have changed.
    pub fn link_event(&self) -> Option<std::os::fd::OwnedFd> {
        self.state()
            .nic
            .link_event()
            .and_then(|fd| fd.try_clone_to_owned().ok())
    }

    /// Looks at the link and tells the lanes if it changed.
    pub fn look_at_link(&self) {
        let (link, running) = {
            let mut state = self.state();
            let link = state.nic.link();
            if link == state.link {
                return;
            }
            state.link = link;
            (link, state.running.clone())
        };
        match link {
            Link::Up { mbps } => tracing::info!(port = self.name, mbps, "link is up"),
            Link::Down => tracing::warn!(
                port = self.name,
                "link is down: frames to send are dropped and counted"
            ),
        }
        let up = link.is_up();
        for id in running.into_iter().flatten() {
            match self.worker.with(id, move |lane| lane.set_link(up)) {
                Ok(Some(Err(error))) => {
                    tracing::error!(port = self.name, %error, "a lane did not follow the link")
                }
                Ok(_) => {}
                Err(error) => tracing::error!(port = self.name, %error, "a lane did not follow the link"),
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
