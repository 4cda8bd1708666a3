//! A lane that does what a test says, for the tests of workers.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use queues::lane::{Adoption, Lane, MissingMemory, Progress, Stopped};
use queues::nic::NicError;
use rustix::event::{EventfdFlags, eventfd};
use vfio_glue::map::Leaving;
use vfio_glue::memory::{Footprint, Table};

/// What a lane of these tests has been through.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Passes that are to move something.
    pub(super) work: AtomicU64,
    pub(super) polls: AtomicU64,
    pub(super) arms: AtomicU64,
    pub(super) kicks: AtomicU64,
    pub(super) sleeps: AtomicU64,
    pub(super) work_at_arm: AtomicBool,
}

/// One of its counts.
pub(super) fn count(of: &AtomicU64) -> u64 {
    of.load(Ordering::Relaxed)
}

/// A lane without a guest or a card.
pub(super) struct TestLane {
    seen: Arc<Seen>,
    kick: OwnedFd,
}

impl TestLane {
    /// One whose next `work` passes move something, what it goes through, and the guest's end of its kick.
    pub(super) fn with_work(work: u64) -> (Box<Self>, Arc<Seen>, OwnedFd) {
        let kick = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let other_end = kick.try_clone().unwrap();
        let seen = Arc::<Seen>::default();
        seen.work.store(work, Ordering::Relaxed);
        let lane = Self {
            seen: Arc::clone(&seen),
            kick,
        };
        (Box::new(lane), seen, other_end)
    }
}

impl Lane for TestLane {
    fn name(&self) -> &'static str {
        "test"
    }

    fn poll(&mut self) -> Progress {
        self.seen.polls.fetch_add(1, Ordering::Relaxed);
        match self.seen.work.load(Ordering::Relaxed) {
            0 => Progress::Idle,
            work => {
                self.seen.work.store(work - 1, Ordering::Relaxed);
                Progress::Moved
            }
        }
    }

    fn arm(&mut self) -> bool {
        self.seen.arms.fetch_add(1, Ordering::Relaxed);
        self.seen.work_at_arm.swap(false, Ordering::Relaxed)
    }

    fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.kick.as_fd())
    }

    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn take_kick(&mut self) {
        self.seen.kicks.fetch_add(1, Ordering::Relaxed);
    }

    fn take_interrupt(&mut self) {}

    fn count_sleep(&mut self) {
        self.seen.sleeps.fetch_add(1, Ordering::Relaxed);
    }

    fn set_call(&mut self, _call: Option<File>) {}

    fn set_err(&mut self, _err: Option<File>) {}

    fn adopt(&mut self, _table: Arc<Table>, _leaving: &Leaving) -> Adoption {
        Adoption::Adopted
    }

    fn footprint(&self) -> Vec<Footprint> {
        Vec::new()
    }

    fn set_missing_memory(&mut self, _meaning: MissingMemory) {}

    fn set_link(&mut self, _up: bool) -> Result<(), NicError> {
        Ok(())
    }

    fn stop(self: Box<Self>) -> Stopped {
        Stopped {
            first_unused: 7,
            card: Ok(()),
        }
    }
}
