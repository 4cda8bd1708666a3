//! The worker's own side: its lanes, its turns, its sleep. Only its thread comes here.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use queues::lane::{Lane, Progress};
use rustix::event::epoll::{self, EventData, EventFlags};

use super::patience::longer;
use super::{Command, LaneId, Patience, Pulse, Removed};

pub(super) struct Seat {
    id: u64,
    pub(super) lane: Box<dyn Lane>,
    patience: Patience,
    /// At the last pass.
    retired: bool,
}

/// What a descriptor in epoll is, in the low bits of its data.
#[derive(Clone, Copy)]
enum Source {
    Command = 0,
    Kick = 1,
    Interrupt = 2,
}

/// Lanes in their seats, and what wakes them.
pub(super) struct Lanes {
    seats: Vec<Seat>,
    next_id: u64,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    pulse: Arc<Pulse>,
}

const EVENTS: usize = 32;

impl Lanes {
    pub(super) fn new(wake: Arc<OwnedFd>, pulse: Arc<Pulse>) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &wake,
            EventData::new_u64(Source::Command as u64),
            EventFlags::IN,
        )?;
        Ok(Self {
            seats: Vec::new(),
            next_id: 1,
            epoll,
            wake,
            pulse,
        })
    }

    pub(super) fn run(mut self, inbox: &Receiver<Command>) {
        let mut idle_since: Option<Instant> = None;
        loop {
            let passes = self.pulse.passes.load(Ordering::Relaxed).wrapping_add(1);
            self.pulse.passes.store(passes, Ordering::Release);
            if !self.obey(inbox) {
                return;
            }
            if self.poll_all() {
                idle_since = None;
                continue;
            }
            let patience = self.patience();
            match patience {
                Patience::Forever => {
                    std::hint::spin_loop();
                    continue;
                }
                Patience::For(time) if !time.is_zero() => {
                    if idle_since.get_or_insert_with(Instant::now).elapsed() < time {
                        std::hint::spin_loop();
                        continue;
                    }
                }
                Patience::For(_) => {}
            }
            idle_since = None;
            self.sleep();
        }
    }

    /// Runs what others asked for. Returns false when nobody can ask any more.
    fn obey(&mut self, inbox: &Receiver<Command>) -> bool {
        loop {
            match inbox.try_recv() {
                Ok(command) => command(self),
                Err(std::sync::mpsc::TryRecvError::Empty) => return true,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// One pass over all lanes. Returns whether anything moved.
    fn poll_all(&mut self) -> bool {
        let mut moved = false;
        for seat in &mut self.seats {
            let progress = seat.lane.poll();
            moved |= progress == Progress::Moved;
            seat.retired = progress == Progress::Retired;
        }
        moved
    }

    /// How long to go on looking: as the most patient lane wants it. A retired one has no say.
    fn patience(&self) -> Patience {
        let awake = self
            .seats
            .iter()
            .filter(|seat| !seat.retired)
            .map(|seat| seat.patience);
        awake.fold(Patience::For(Duration::ZERO), longer)
    }

    /// Asks for wake-ups, looks once more, and waits for one.
    fn sleep(&mut self) {
        let mut busy = false;
        for seat in &mut self.seats {
            busy |= seat.lane.arm();
        }
        if !busy {
            for seat in &mut self.seats {
                seat.lane.count_sleep();
            }
            self.wait();
        }
    }

    fn wait(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        self.pulse.asleep.store(true, Ordering::Release);
        let waited = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None);
        self.pulse.asleep.store(false, Ordering::Release);
        match waited {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return,
            Err(error) => {
                tracing::error!(%error, "epoll_wait failed");
                return;
            }
        }
        for event in events {
            let data = event.data.u64();
            let id = LaneId(data >> 2);
            match data & 3 {
                kind if kind == Source::Kick as u64 => {
                    if let Some(seat) = self.find(id) {
                        seat.lane.take_kick();
                    }
                }
                kind if kind == Source::Interrupt as u64 => {
                    if let Some(seat) = self.find(id) {
                        seat.lane.take_interrupt();
                    }
                }
                // Read so that it is quiet again; the commands themselves are in the inbox.
                _ => {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                }
            }
        }
    }

    pub(super) fn add(&mut self, lane: Box<dyn Lane>, patience: Patience) -> LaneId {
        let id = self.next_id;
        self.next_id += 1;
        self.watch(id, Source::Kick, lane.kick_fd());
        self.watch(id, Source::Interrupt, lane.interrupt_fd());
        let retired = false;
        self.seats.push(Seat {
            id,
            lane,
            patience,
            retired,
        });
        LaneId(id)
    }

    /// Edge-triggered: a descriptor that stays readable (a tap whose frames have no buffer yet) must not keep the
    /// thread awake; arming looks once more, so no edge is missed.
    fn watch(&self, id: u64, source: Source, fd: Option<BorrowedFd<'_>>) {
        let Some(fd) = fd else { return };
        let data = EventData::new_u64(id << 2 | source as u64);
        if let Err(error) = epoll::add(&self.epoll, fd, data, EventFlags::IN | EventFlags::ET) {
            tracing::error!(%error, "a descriptor cannot be waited for, its lane may stay asleep");
        }
    }

    pub(super) fn remove(&mut self, id: LaneId) -> Option<Removed> {
        let index = self.seats.iter().position(|seat| seat.id == id.0)?;
        let seat = self.seats.remove(index);
        for fd in [seat.lane.kick_fd(), seat.lane.interrupt_fd()]
            .into_iter()
            .flatten()
        {
            if let Err(error) = epoll::delete(&self.epoll, fd.as_fd()) {
                tracing::warn!(%error, "a descriptor was not waited for");
            }
        }
        Some((seat.lane, seat.patience))
    }

    pub(super) fn find(&mut self, id: LaneId) -> Option<&mut Seat> {
        self.seats.iter_mut().find(|seat| seat.id == id.0)
    }
}
