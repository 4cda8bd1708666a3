//! A lane: one virtqueue joined to one NIC queue, one direction. Exactly one worker owns it.
//!
//! ```text
//! tx.rs   guest → wire        rx.rs   wire → guest
//! bounce.rs  the private slots for what the card cannot reach in place
//! stats.rs   what is counted
//! ```
//!
//! A lane exists while its ring is started and enabled. Stopping it stops the card's queue first, so that when
//! [`Lane::stop`] returns nothing of ours and nothing of the card's touches guest memory.

mod bounce;
#[cfg(test)]
mod hostile;
mod rx;
mod stats;
mod tx;

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vfio_glue::map::MemoryMap;
use vfio_glue::memory::Table;

use self::bounce::Slots;
pub use rx::RxLane;
pub use stats::{Bounce, Counter, Drop, LaneStats};
pub use tx::TxLane;

use crate::nic::NicError;
use crate::virtq::{Chain, ChainError, Virtq, VirtqError};

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

impl Stopped {
    fn new(first_unused: u16, card: Result<(), NicError>, slots: Slots) -> Self {
        let card = card.map_err(|source| Stuck { source, slots });
        Self { first_unused, card }
    }
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

    /// Takes note of a readable kick descriptor.
    fn take_kick(&mut self);

    /// Takes note of a readable interrupt descriptor.
    fn take_interrupt(&mut self);

    /// Counts a sleep of the worker.
    fn count_sleep(&mut self);

    /// Replaces the descriptor that wakes the guest, and wakes it once: an earlier wake-up may be lost (TRAPS 38).
    fn set_call(&mut self, call: Option<File>);

    /// Replaces the descriptor that reports a broken ring.
    fn set_err(&mut self, err: Option<File>);

    /// Goes on with another view of the same guest's memory, in which all bytes of the old one are where they were.
    /// For a table that lacks some, the lane is stopped and started.
    fn set_table(&mut self, table: Arc<Table>);

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

/// The parts both directions share: the guest's end of the lane.
#[derive(Debug)]
struct GuestEnd {
    name: String,
    virtq: Virtq,
    table: Arc<Table>,
    header_len: u32,
    kick: Option<File>,
    call: Option<File>,
    err: Option<File>,
    stats: Arc<LaneStats>,
    map: Arc<MemoryMap>,
    missing_memory: MissingMemory,
    /// A chain waits for memory; only a command brings it.
    waits_for_memory: bool,
    retired: bool,
}

impl GuestEnd {
    fn new(setup: LaneSetup) -> Self {
        Self {
            name: setup.name,
            virtq: setup.virtq,
            table: setup.table,
            header_len: setup.header_len,
            kick: setup.kick,
            call: setup.call,
            err: setup.err,
            stats: setup.stats,
            map: setup.map,
            missing_memory: setup.missing_memory,
            waits_for_memory: false,
            retired: false,
        }
    }

    /// Publishes what was given back and wakes the guest if it wants that.
    #[inline]
    fn publish(&mut self) {
        if self.virtq.publish() {
            self.notify();
        }
    }

    fn notify(&mut self) {
        let Some(call) = &mut self.call else { return };
        match call.write(&1u64.to_ne_bytes()) {
            Ok(_) => self.stats.notifications.add(1),
            // Somebody saw this thread stand still and nudged it.
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                tracing::error!(
                    lane = self.name,
                    "its call descriptor blocks: the guest is no longer woken"
                );
                self.call = None;
            }
            // A full counter (EAGAIN) is a wake-up that is still pending, so it is as good as sent. Any other failure
            // is the front-end's own descriptor failing it.
            Err(_) => {}
        }
    }

    /// Retires the lane, says so, and tells the front-end. A guest that breaks its ring over and over is logged ever
    /// more rarely.
    fn retire(&mut self, why: &dyn std::error::Error) {
        if std::mem::replace(&mut self.retired, true) {
            return;
        }
        self.stats.errors.add(1);
        let times = self.stats.errors.get();
        if times < 10 || times.is_power_of_two() {
            let cause = why
                .source()
                .map(|source| format!(": {source}"))
                .unwrap_or_default();
            tracing::error!(lane = self.name, times, "retired: {why}{cause}");
        }
        if let Some(err) = &mut self.err {
            // Nobody may be listening, and the log line stands.
            let _ = err.write(&1u64.to_ne_bytes());
        }
    }

    /// Takes the next chain, or `None` if there is none or it has to wait for memory.
    #[inline]
    fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, VirtqError> {
        match self.virtq.pop(&self.table, chain) {
            Err(VirtqError::Chain { source, .. }) if self.awaits(&source) => {
                self.waits_for_memory = true;
                Ok(None)
            }
            popped => popped,
        }
    }

    /// Puts the chain just taken back if it only has to wait for memory; else its error breaks the ring.
    #[cold]
    fn put_back_or_break(&mut self, head: u16, source: ChainError) -> Result<(), VirtqError> {
        if self.awaits(&source) {
            self.waits_for_memory = true;
            self.virtq.untake();
            return Ok(());
        }
        Err(VirtqError::Chain { head, source })
    }

    /// Whether `error` only says that memory is not there yet.
    fn awaits(&self, error: &ChainError) -> bool {
        let missing = matches!(
            error,
            ChainError::Memory { .. } | ChainError::IndirectMemory { .. }
        );
        missing && self.missing_memory == MissingMemory::IsAwaited
    }

    fn retire_broken(&mut self, why: &VirtqError) -> Progress {
        self.retire(why);
        Progress::Retired
    }

    fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_ref().map(AsFd::as_fd)
    }

    fn set_table(&mut self, table: Arc<Table>) {
        self.table = table;
        self.waits_for_memory = false;
    }

    fn set_missing_memory(&mut self, meaning: MissingMemory) {
        self.missing_memory = meaning;
        self.waits_for_memory = false;
    }

    fn set_call(&mut self, call: Option<File>) {
        self.call = call;
        self.virtq.force_notification();
        self.publish();
    }
}
