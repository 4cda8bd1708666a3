//! The guest's end of a lane, the same both ways: its virtqueue, its memory, and how it is woken.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::sync::Arc;

use vfio_glue::map::MemoryMap;
use vfio_glue::memory::{Table, TableHint};

use super::stats::LaneStats;
use super::{LaneSetup, MissingMemory};
use crate::virtq::{Chain, ChainError, Direction, Virtq, VirtqError};

/// The guest's end of a lane.
#[derive(Debug)]
pub(super) struct GuestEnd {
    pub(super) name: String,
    pub(super) virtq: Virtq,
    pub(super) table: Arc<Table>,
    /// Where the table had the last answer.
    pub(super) hint: TableHint,
    pub(super) header_len: u32,
    pub(super) kick: Option<File>,
    pub(super) call: Option<File>,
    pub(super) err: Option<File>,
    pub(super) stats: Arc<LaneStats>,
    pub(super) map: Arc<MemoryMap>,
    pub(super) missing_memory: MissingMemory,
    /// A chain waits for memory; only a command brings it.
    pub(super) waits_for_memory: bool,
    pub(super) retired: bool,
}

impl GuestEnd {
    pub(super) fn new(setup: LaneSetup) -> Self {
        Self {
            name: setup.name,
            virtq: setup.virtq,
            table: setup.table,
            hint: TableHint::default(),
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
    pub(super) fn publish(&mut self) {
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
                self.stats.stalls.add(1);
                self.call = None;
            }
            // A full counter (EAGAIN) is a wake-up that is still pending, so it is as good as sent. Any other failure
            // is the front-end's own descriptor failing it.
            Err(_) => {}
        }
    }

    /// Retires the lane, says so, and tells the front-end. A guest that breaks its ring over and over is logged ever
    /// more rarely.
    pub(super) fn retire(&mut self, why: &dyn std::error::Error) {
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

    /// Turns to the place of the next chain's last buffer, if that is elsewhere than the last one was, so that a chain
    /// which is usual but for that can be taken as such. One is there to take.
    #[cold]
    pub(super) fn turn_to_next(&mut self, chain: &Chain, direction: Direction) -> bool {
        let tables = chain.tables(&self.table);
        let short = self.virtq.short(0, tables.as_ref(), direction);
        short.is_some_and(|short| {
            let buffer = short.second.unwrap_or(short.first);
            self.table.turn(&mut self.hint, buffer.addr)
        })
    }

    /// Takes the next chain, or `None` if there is none or it has to wait for memory.
    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, VirtqError> {
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
    pub(super) fn put_back_or_break(&mut self, head: u16, source: ChainError) -> Result<(), VirtqError> {
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

    pub(super) fn set_table(&mut self, table: Arc<Table>) {
        self.table = table;
        self.hint = TableHint::default();
        self.waits_for_memory = false;
    }

    pub(super) fn set_missing_memory(&mut self, meaning: MissingMemory) {
        self.missing_memory = meaning;
        self.waits_for_memory = false;
    }

    pub(super) fn set_call(&mut self, call: Option<File>) {
        self.call = call;
        self.virtq.force_notification();
        self.publish();
    }
}
