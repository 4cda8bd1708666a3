//! A lane: one virtqueue joined to one NIC queue, one direction. Exactly one worker owns it.
//!
//! ```text
//! tx.rs   guest → wire        rx.rs   wire → guest
//! guest.rs   the end both directions share   bounce.rs  the private slots for what the card cannot reach in place
//! in_flight.rs  what is remembered of the chains between the two   stats.rs  what is counted
//! ```
//!
//! A lane exists while its ring is started and enabled. Stopping it stops the card's queue first, so that when
//! [`Lane::stop`] returns nothing of ours and nothing of the card's touches guest memory.

mod bounce;
mod guest;
#[cfg(test)]
mod hostile;
mod in_flight;
mod rx;
mod stats;
mod tx;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vfio_glue::address::Iova;
use vfio_glue::map::{Leaving, MemoryMap};
use vfio_glue::memory::{Footprint, Table};

pub use rx::RxLane;
pub use stats::{Bounce, Counter, Drop, LaneStats};
pub use tx::TxLane;

use self::bounce::Slots;
use self::guest::GuestEnd;
use crate::nic::{NicError, Ring};
use crate::virtq::{Virtq, VirtqError};

/// What a lane is made from.
#[derive(Debug)]
pub struct LaneSetup {
    /// For logs, for example `vm0 rx 0`.
    pub name: String,
    /// The guest's queue.
    pub virtq: Virtq,
    /// The guest's memory.
    pub table: Arc<Table>,
    /// Bytes of the header in front of each frame: 12, or 10 for a legacy driver.
    pub header_len: u32,
    /// The largest frame the port passes, in bytes without frame check sequence.
    pub max_frame: u32,
    /// Where the guest wakes us, if it does.
    pub kick: Option<File>,
    /// Where we wake the guest, if it wants that.
    pub call: Option<File>,
    /// Where we tell the front-end that the ring broke.
    pub err: Option<File>,
    /// The lane's counters; they outlive it.
    pub stats: Arc<LaneStats>,
    /// The map that the device is on, for private slots when they are first needed.
    pub map: Arc<MemoryMap>,
    /// Whether frames can leave at the start.
    pub link_up: bool,
    /// What a buffer outside of the table means at the start.
    pub missing_memory: MissingMemory,
}

/// What it means that a guest's descriptor points outside of its table.
///
/// A VMM changes a region's bounds by taking it away and adding it again, while the guest goes on (TRAPS 17): between
/// the two, its descriptors are right and the table is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingMemory {
    /// The guest broke its ring.
    IsBroken,
    /// The table is about to change: the chain stays in the virtqueue and is looked at again.
    IsAwaited,
}

/// What came of showing a lane another table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// It goes on with that one.
    Adopted,
    /// The card has buffers of it that are elsewhere in that one, or not there.
    InUse,
}

/// What a pass over a lane did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing to do.
    Idle,
    /// Something moved.
    Moved,
    /// The lane is retired: its ring is broken or its card failed. It stays so until it is stopped.
    Retired,
}

/// How a lane ended.
#[derive(Debug)]
pub struct Stopped {
    /// The first entry of the virtqueue that was not used: the base to resume from.
    pub first_unused: u16,
    /// An error means the card's queue did not stop: reset the device before anything else happens to memory.
    pub card: Result<(), Stuck>,
}

/// A card's queue that did not stop, and the memory of ours that it may still use.
#[derive(Debug, thiserror::Error)]
#[error("the card's queue did not stop")]
pub struct Stuck {
    /// Why.
    pub source: NicError,
    /// Stays mapped for as long as this lives: until the device has been reset.
    slots: Slots,
}

/// A lane as a worker drives it.
pub trait Lane: Send {
    /// For logs.
    fn name(&self) -> &str;

    /// Moves up to a burst of frames and completes what the card is done with. Never blocks.
    ///
    /// A lane that moves something is polled again, so it asks for no wake-ups until it is armed anew.
    fn poll(&mut self) -> Progress;

    /// Asks guest and card to wake us. Returns whether there is work already: then do not sleep.
    fn arm(&mut self) -> bool;

    /// The guest's kick, if it has one.
    fn kick_fd(&self) -> Option<BorrowedFd<'_>>;

    /// The card's interrupt.
    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes note of a readable kick descriptor. It is not read: its edges tell enough, and a read could be made to wait.
    fn take_kick(&mut self);

    /// Takes note of a readable interrupt descriptor.
    fn take_interrupt(&mut self);

    /// Counts a sleep of the worker.
    fn count_sleep(&mut self);

    /// Replaces the descriptor that wakes the guest, and wakes it once: an earlier wake-up may be lost (TRAPS 38).
    fn set_call(&mut self, call: Option<File>);

    /// Replaces the descriptor that reports a broken ring.
    fn set_err(&mut self, err: Option<File>);

    /// Goes on with another view of the same guest's memory, if nothing that the card has of this lane, and nothing
    /// that is to be written when it is done, changes its place or leaves. Else the lane is as before, and has to be
    /// stopped and started. The virtqueue's own memory is for the caller to look after.
    fn adopt(&mut self, table: Arc<Table>, leaving: &Leaving) -> Adoption;

    /// What the lane has to do with each stretch of the guest's memory.
    fn footprint(&self) -> Vec<Footprint>;

    /// From now on, a buffer outside of the table means this.
    fn set_missing_memory(&mut self, meaning: MissingMemory);

    /// The cable was plugged in or out.
    ///
    /// Blocks for a bounded time.
    ///
    /// # Errors
    ///
    /// [`NicError`] if the card's queue did not stop or start, as is usual without a cable and with frames in it. The
    /// lane is as before, and the device must be reset.
    fn set_link(&mut self, up: bool) -> Result<(), NicError>;

    /// Stops the card's queue, gives the guest what was completed, and ends the lane.
    ///
    /// Blocks for a bounded time. Afterwards nothing of ours and nothing of the card's touches guest memory, unless
    /// [`Stopped::card`] is an error.
    fn stop(self: Box<Self>) -> Stopped;
}

/// What differs between the directions. Everything else a lane does is written once, right below.
trait Way: Send {
    type Ring: Ring;

    fn guest(&self) -> &GuestEnd;
    fn guest_mut(&mut self) -> &mut GuestEnd;
    fn ring(&self) -> &Self::Ring;
    fn ring_mut(&mut self) -> &mut Self::Ring;

    /// One pass over a lane that is not retired.
    fn pass(&mut self) -> Result<Progress, VirtqError>;

    /// Whether the card can have anything to tell.
    fn awaits_card(&self) -> bool;

    /// Asks the guest for kicks and looks once more, the card's interrupt being armed; whether there is work already.
    fn last_look(&mut self) -> Result<bool, VirtqError>;

    /// Whether all buffers that the card has, and all that is to be touched when it is done, stay where they are.
    fn is_kept_by(&self, next: &Table, leaving: &Leaving) -> bool;

    /// Where the guest's buffers are that the card has now.
    fn held(&self) -> Vec<Iova>;

    fn follow_link(&mut self, up: bool) -> Result<(), NicError>;

    /// Stops the card's queue and gives the guest what it completed. After an error the card may still use what it
    /// holds, so nothing of that is forgotten.
    fn quiesce(&mut self) -> Result<(), NicError>;

    /// Ends the lane: the ring goes to its berth, and what of ours the card may have been using is returned.
    fn part(self: Box<Self>) -> (GuestEnd, Slots);
}

impl<W: Way> Lane for W {
    fn name(&self) -> &str {
        &self.guest().name
    }

    fn poll(&mut self) -> Progress {
        if self.guest().retired {
            return Progress::Retired;
        }
        match self.pass() {
            Ok(Progress::Moved) => {
                self.guest_mut().stats.bursts.add(1);
                // It is polled again, so nobody need wake it.
                self.ring_mut().disarm();
                self.guest_mut().virtq.refuse_kicks();
                Progress::Moved
            }
            Ok(progress) => {
                self.guest().stats.idle_passes.add(1);
                progress
            }
            Err(error) => {
                self.guest_mut().retire(&error);
                Progress::Retired
            }
        }
    }

    fn arm(&mut self) -> bool {
        if self.guest().retired {
            return false;
        }
        if self.awaits_card() {
            self.ring_mut().arm();
        }
        self.last_look().unwrap_or_else(|error| {
            self.guest_mut().retire(&error);
            false
        })
    }

    fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.guest().kick.as_ref().map(AsFd::as_fd)
    }

    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ring().wake_fd()
    }

    fn take_kick(&mut self) {
        self.guest().stats.kicks.add(1);
    }

    fn take_interrupt(&mut self) {
        let count = self.ring_mut().acknowledge();
        self.guest().stats.interrupts.add(count);
    }

    fn count_sleep(&mut self) {
        self.guest().stats.sleeps.add(1);
    }

    fn set_call(&mut self, call: Option<File>) {
        self.guest_mut().set_call(call);
    }

    fn set_err(&mut self, err: Option<File>) {
        self.guest_mut().err = err;
    }

    fn adopt(&mut self, table: Arc<Table>, leaving: &Leaving) -> Adoption {
        if !self.is_kept_by(&table, leaving) {
            return Adoption::InUse;
        }
        self.guest_mut().set_table(table);
        Adoption::Adopted
    }

    fn footprint(&self) -> Vec<Footprint> {
        let guest = self.guest();
        guest.table.footprint(&guest.hint, self.held().into_iter())
    }

    fn set_missing_memory(&mut self, meaning: MissingMemory) {
        self.guest_mut().set_missing_memory(meaning);
    }

    fn set_link(&mut self, up: bool) -> Result<(), NicError> {
        if self.guest().retired {
            Ok(())
        } else {
            self.follow_link(up)
        }
    }

    fn stop(mut self: Box<Self>) -> Stopped {
        let card = self.quiesce();
        self.guest_mut().publish();
        let (guest, slots) = self.part();
        let card = card.map_err(|source| Stuck { source, slots });
        Stopped {
            first_unused: guest.virtq.first_unused(),
            card,
        }
    }
}
