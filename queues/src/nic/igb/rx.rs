//! The card's receive queue: buffers out, frames back.
//!
//! Read with: Intel 82576EB datasheet §7.1.

use std::os::fd::BorrowedFd;

use vfio_glue::address::Iova;
use vfio_glue::memory::DescriptorRing;

use super::card::{Card, Vector};
use super::desc::{self, RxReport};
use super::moderation::{Moderation, Pace};
use super::queue::{Queue, Side, ring_of_a_queue};
use super::regs::{QUEUE_STRIP_CRC, QueueReg, SPLIT_ADVANCED_ONE_BUFFER, SPLIT_DROP};
use crate::nic::{NicError, Received, Ring, RxRing, Transfer, Verdict};

/// One receive queue of an igb card.
#[derive(Debug)]
pub(super) struct IgbRxRing {
    queue: Queue,
    moderation: Moderation,
    /// The card spreads frames over this queue too.
    in_spread: bool,
    /// What a usual frame's report says. [`RxReport::NEVER`] after a frame that came without its end: what follows up to
    /// the end belongs to it.
    awaited: u64,
}

impl IgbRxRing {
    pub(super) fn new(card: Card, number: u32, ring: DescriptorRing, vector: Vector) -> Self {
        let queue = Queue::new(card, Side::Rx, number, ring, vector);
        Self {
            queue,
            moderation: Moderation::new(),
            in_spread: false,
            awaited: RxReport::SOUND,
        }
    }
}

impl Ring for IgbRxRing {
    ring_of_a_queue!();

    fn flush(&mut self) {
        self.queue.flush();
        // Not before it has buffers: what comes for it would be lost.
        if !self.in_spread && self.queue.is_running() && self.queue.told != self.queue.oldest {
            self.in_spread = true;
            self.queue
                .card
                .spread()
                .join(&self.queue.card, self.queue.number());
        }
    }

    fn start(&mut self) -> Result<(), NicError> {
        let split = self.queue.card.bound().buffer_kib | SPLIT_ADVANCED_ONE_BUFFER | SPLIT_DROP;
        let registers = [(QueueReg::SPLIT, split), (QueueReg::OFFLOAD, QUEUE_STRIP_CRC)];
        let has = if self.queue.card.family().has_queue_offload() {
            2
        } else {
            1
        };
        self.queue.start(registers.get(..has).unwrap_or_default())?;
        self.awaited = RxReport::SOUND;
        self.moderation = Moderation::new();
        self.queue.set_pace(Pace::Prompt);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), NicError> {
        // First, so that what comes meanwhile goes to those who stay.
        if std::mem::take(&mut self.in_spread) {
            self.queue
                .card
                .spread()
                .leave(&self.queue.card, self.queue.number());
        }
        self.queue.stop()
    }

    fn clear(&mut self) {
        self.queue.oldest = self.queue.fill;
    }

    fn acknowledge(&mut self) -> u64 {
        let count = self.queue.acknowledge();
        if let Some(pace) = self.moderation.interrupts(count) {
            self.queue.set_pace(pace);
        }
        count
    }
}

impl RxRing for IgbRxRing {
    fn buffer_bytes(&self) -> u32 {
        self.queue.card.bound().stored
    }

    #[inline]
    fn post(&mut self, buffer: Iova) {
        self.queue.put(desc::rx_read(buffer));
    }

    #[inline(always)]
    fn harvest_usual(&mut self, most_bytes: u32) -> Option<Received> {
        let queue = &mut self.queue;
        // A slot that the card was not told of says "not done": so it was written.
        let report = RxReport(queue.ring.load_report(queue.oldest));
        let len = report.len();
        // One comparison for both bounds: below the lower one it wraps.
        if !report.is(self.awaited) || len.wrapping_sub(1) >= most_bytes {
            return None;
        }
        queue.oldest = queue.oldest.wrapping_add(1);
        let verdict = Verdict::Good;
        Some(Received { len, verdict })
    }

    #[inline]
    fn note_usual(&mut self, frames: u64, bytes: u64) {
        self.moderation.frames(frames, bytes);
    }

    fn harvest(&mut self) -> Option<Received> {
        let queue = &mut self.queue;
        // Slots the card was not told of hold nothing of its.
        if queue.oldest == queue.told {
            return None;
        }
        let report = RxReport(queue.ring.load_report(queue.oldest));
        if !report.is_done() {
            return None;
        }
        queue.oldest = queue.oldest.wrapping_add(1);
        self.moderation.frames(1, report.len().into());
        // The bound makes a frame over two buffers impossible; if one comes all the same, no part is passed on.
        let torn = self.awaited == RxReport::NEVER;
        self.awaited = if report.is_whole() {
            RxReport::SOUND
        } else {
            RxReport::NEVER
        };
        let sound = report.is_whole() && !torn && !report.is_damaged() && report.len() > 0;
        let verdict = if sound { Verdict::Good } else { Verdict::Bad };
        Some(Received {
            len: report.len(),
            verdict,
        })
    }
}
