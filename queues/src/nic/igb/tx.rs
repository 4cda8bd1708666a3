//! The card's transmit queue: frames out, done bits back.
//!
//! Read with: Intel 82576EB datasheet §7.2.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use vfio_glue::memory::DescriptorRing;

use super::card::{Card, Vector};
use super::desc::{self, Place};
use super::queue::{Queue, Side, ring_of_a_queue};
use super::regs::QueueReg;
use crate::nic::{NicError, Ring, Segment, Transfer, TxRing};

/// How long a queue that is to be stopped may take to send what it has.
const DRAIN_BOUND: Duration = Duration::from_millis(20);
/// The emulated card maps each descriptor's bytes in one go and loses a packet where it cannot.
const EMULATED_SPLIT: u64 = 4096;

/// One transmit queue of an igb card.
#[derive(Debug)]
pub(super) struct IgbTxRing {
    queue: Queue,
    /// The position of the last slot of each frame with the card that may have several, oldest first.
    ends: VecDeque<u32>,
    /// The card is QEMU's model, see [`EMULATED_SPLIT`]. Only a reset can change that, and no queue lives through one.
    cut: bool,
}

impl IgbTxRing {
    pub(super) fn new(card: Card, number: u32, ring: DescriptorRing, vector: Vector) -> Self {
        let ends = VecDeque::with_capacity(ring.count() as usize);
        Self {
            queue: Queue::new(card, Side::Tx, number, ring, vector),
            ends,
            cut: false,
        }
    }

    /// Waits until the card has sent what it was told of, if it can: with the link down or paused it cannot. Both the
    /// head and the last report count, as the datasheet wants it.
    fn drain(&self) {
        let Queue { card, ring, .. } = &self.queue;
        let (head, tail) = (self.queue.reg(QueueReg::HEAD), self.queue.slot(self.queue.told));
        let last = (self.queue.oldest != self.queue.fill).then(|| self.queue.fill.wrapping_sub(1));
        let drained = card.wait(DRAIN_BOUND, &mut || {
            card.read(head) == tail && last.is_none_or(|last| desc::tx_is_done(ring.load_report(last)))
        });
        if !drained {
            tracing::debug!(card = card.name(), "a tx queue is stopped with frames in it");
        }
    }
}

impl Ring for IgbTxRing {
    ring_of_a_queue!();

    fn flush(&mut self) {
        self.queue.flush();
    }

    fn start(&mut self) -> Result<(), NicError> {
        self.queue.start(&[])?;
        self.ends.clear();
        self.cut = self.queue.card.is_emulated();
        Ok(())
    }

    fn stop(&mut self) -> Result<(), NicError> {
        if self.queue.is_running() {
            self.drain();
        }
        self.queue.stop()
    }

    fn clear(&mut self) {
        self.queue.oldest = self.queue.fill;
        self.ends.clear();
    }

    fn acknowledge(&mut self) -> u64 {
        self.queue.acknowledge()
    }
}

impl TxRing for IgbTxRing {
    const MAX_SEGMENTS: usize = 16;

    fn descriptors_for(&self, segments: usize, len: u32) -> usize {
        // Every segment may be cut at pages: one more piece each, and one for each page of the frame.
        let cuts = if self.cut {
            len as usize / 4096 + 1 + segments
        } else {
            0
        };
        segments + cuts
    }

    fn post(&mut self, segments: &[Segment]) {
        let packet_len: u32 = segments.iter().map(|segment| segment.len).sum();
        let mut first_len = packet_len;
        let count = segments.len();
        for (index, segment) in segments.iter().enumerate() {
            let mut rest = *segment;
            // At most a page from each cut: see EMULATED_SPLIT.
            while self.cut && crosses_page(rest) {
                let to_border = EMULATED_SPLIT - rest.iova.raw() % EMULATED_SPLIT;
                let len = u32::try_from(to_border).unwrap_or(rest.len);
                let cut = Segment { iova: rest.iova, len };
                self.queue
                    .put(desc::tx_data(cut, std::mem::take(&mut first_len), Place::Middle));
                rest = Segment {
                    iova: rest.iova.offset(to_border),
                    len: rest.len - len,
                };
            }
            let place = if index + 1 == count {
                Place::Last
            } else {
                Place::Middle
            };
            self.queue
                .put(desc::tx_data(rest, std::mem::take(&mut first_len), place));
        }
        self.ends.push_back(self.queue.fill.wrapping_sub(1));
    }

    #[inline(always)]
    fn post_whole(&mut self, segment: Segment) -> bool {
        if self.cut && crosses_page(segment) {
            return false;
        }
        self.queue.put(desc::tx_data(segment, segment.len, Place::Last));
        true
    }

    fn reap(&mut self) -> bool {
        let Some(end) = self.ends.front().copied() else {
            return false;
        };
        if !desc::tx_is_done(self.queue.ring.load_report(end)) {
            return false;
        }
        self.ends.pop_front();
        self.queue.oldest = end.wrapping_add(1);
        true
    }

    #[inline(always)]
    fn reap_whole(&mut self) -> bool {
        let oldest = self.queue.oldest;
        // A slot that the card was not told of says "not done": so it was written.
        if !desc::tx_is_done(self.queue.ring.load_report(oldest)) {
            return false;
        }
        self.queue.oldest = oldest.wrapping_add(1);
        true
    }
}

/// Whether a segment has bytes on both sides of a border of [`EMULATED_SPLIT`].
#[inline]
fn crosses_page(segment: Segment) -> bool {
    segment.iova.raw() % EMULATED_SPLIT + u64::from(segment.len) > EMULATED_SPLIT
}
