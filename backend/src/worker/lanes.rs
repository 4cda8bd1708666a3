//! The worker's own side: its lanes, its turns, its sleep. Only its thread comes here.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use queues::lane::{Lane, Progress};
use rustix::event::epoll::{self, EventData, EventFlags};
use vfio_glue::cycles;

use super::patience::Vigil;
use super::{Command, LaneId, Patience, Pulse, Removed};

pub(super) struct Seat {
    id: u64,
    pub(super) lane: Box<dyn Lane>,
    vigil: Vigil,
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
        // Made here, as it cannot change threads, and kept from one sleep to the next.
        let mut events = Vec::with_capacity(EVENTS);
        let mut last = cycles::now();
        loop {
            self.pulse.passes.add(1);
            if !self.obey(inbox) {
                return;
            }
            let moved = self.pass();
            // One look at the counter a pass, so that nothing between two of them is left out.
            let now = cycles::now();
            let taken = now.wrapping_sub(std::mem::replace(&mut last, now));
            if moved {
                self.pulse.busy_passes.add(1);
                self.pulse.busy_cycles.add(taken);
                continue;
            }
            if self.is_patient(Instant::now) {
                std::hint::spin_loop();
                continue;
            }
            self.sleep(&mut events);
            last = cycles::now();
        }
    }

    /// Runs what others asked for. Returns false when nobody can ask any more.
    fn obey(&mut self, inbox: &Receiver<Command>) -> bool {
        // The channel itself is looked into only when something was said: an empty look costs a full barrier.
        if !self.pulse.asked.load(Ordering::Acquire) {
            return true;
        }
        // Before the look, and pairs with the store after a command was sent: one that comes meanwhile says so again.
        self.pulse.asked.swap(false, Ordering::Acquire);
        loop {
            match inbox.try_recv() {
                Ok(command) => command(self),
                Err(std::sync::mpsc::TryRecvError::Empty) => return true,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// One pass: every lane once, whatever the others have. Returns whether anything moved.
    ///
    /// A lane's pass is bounded, so between two looks at one lane each other moves at most a burst.
    fn pass(&mut self) -> bool {
        let mut moved = false;
        for seat in &mut self.seats {
            let progress = seat.lane.poll();
            if progress == Progress::Moved {
                seat.vigil.renew();
                moved = true;
            }
            seat.retired = progress == Progress::Retired;
        }
        moved
    }

    /// Whether a lane has patience left. A retired one has no say.
    fn is_patient(&mut self, clock: impl Fn() -> Instant) -> bool {
        let mut read = None;
        let mut now = || *read.get_or_insert_with(&clock);
        // Each is asked, so that the time of each runs.
        let mut patient = false;
        for seat in self.seats.iter_mut().filter(|seat| !seat.retired) {
            patient |= seat.vigil.lasts(&mut now);
        }
        patient
    }

    /// Asks for wake-ups, looks once more, and waits for one. Lanes are armed only up to the first that has work: that
    /// one is polled next, and wake-ups would only disturb.
    fn sleep(&mut self, events: &mut Vec<epoll::Event>) {
        if let Some(seat) = self
            .seats
            .iter_mut()
            .find_map(|seat| seat.lane.arm().then_some(seat))
        {
            seat.vigil.renew();
            return;
        }
        for seat in &mut self.seats {
            seat.lane.count_sleep();
        }
        self.pulse.sleeps.add(1);
        self.wait(events);
    }

    fn wait(&mut self, events: &mut Vec<epoll::Event>) {
        events.clear();
        self.pulse.asleep.store(true, Ordering::Release);
        let waited = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), None);
        self.pulse.asleep.store(false, Ordering::Release);
        match waited {
            // A nudge or a debugger.
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "epoll_wait failed"),
        }
        // More than fit are told at the next sleep; every lane is polled before that anyway.
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
            vigil: Vigil::new(patience),
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
        Some((seat.lane, seat.vigil.patience))
    }

    pub(super) fn find(&mut self, id: LaneId) -> Option<&mut Seat> {
        self.seats.iter_mut().find(|seat| seat.id == id.0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::{TestLane, count};
    use super::*;

    fn lanes() -> Lanes {
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        Lanes::new(Arc::new(wake), Arc::default()).unwrap()
    }

    #[test]
    fn a_pass_looks_at_every_lane_once_whatever_the_others_have() {
        let mut lanes = lanes();
        let all: Vec<_> = [u64::MAX, 0, 1].map(TestLane::with_work).into();
        let seen: Vec<_> = all
            .into_iter()
            .map(|(lane, seen, _)| {
                lanes.add(lane, Patience::Forever);
                seen
            })
            .collect();
        for _ in 0..1000 {
            assert!(lanes.pass(), "the first always has a frame");
        }
        assert_eq!(
            seen.iter().map(|seen| count(&seen.polls)).collect::<Vec<_>>(),
            [1000; 3]
        );
    }

    #[test]
    fn a_lanes_patience_is_not_renewed_by_anothers_frames() {
        let mut lanes = lanes();
        let begun = Instant::now();
        let hour = Duration::from_secs(3600);
        let (patient, ..) = TestLane::with_work(1);
        let (hasty, hasty_seen, _) = TestLane::with_work(1);
        lanes.add(patient, Patience::For(hour));
        lanes.add(hasty, Patience::For(Duration::ZERO));
        assert!(lanes.pass());
        assert!(lanes.is_patient(|| begun), "for the hour of the first lane");
        assert!(!lanes.is_patient(|| begun + hour));
        hasty_seen.work.store(1, Ordering::Relaxed);
        assert!(lanes.pass());
        assert!(
            !lanes.is_patient(|| begun + hour),
            "the second lane has none to lend it"
        );
    }

    #[test]
    fn no_lane_is_armed_behind_one_that_has_work() {
        let mut lanes = lanes();
        let (first, first_seen, _) = TestLane::with_work(0);
        let (second, second_seen, _) = TestLane::with_work(0);
        lanes.add(first, Patience::For(Duration::from_secs(1)));
        lanes.add(second, Patience::For(Duration::ZERO));
        first_seen.work_at_arm.store(true, Ordering::Relaxed);
        // Would wait for ever, if it did.
        lanes.sleep(&mut Vec::with_capacity(EVENTS));
        assert_eq!((count(&first_seen.arms), count(&second_seen.arms)), (1, 0));
        assert_eq!(lanes.pulse.sleeps.get(), 0);
        assert!(
            lanes.is_patient(Instant::now),
            "what arming found counts as a frame"
        );
    }
}
