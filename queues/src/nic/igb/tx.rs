//! The card's transmit queue.
//!
//! ```text
//! post ──▶ descriptors at `fill` ──TDT──▶ card ──done bit on each frame's last──▶ reap from `oldest`
//! ```
//!
//! Read with: Intel 82576EB datasheet §7.2.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use vfio_glue::memory::DescriptorRing;

use super::card::{Card, Vector};
use super::desc::{self, Place};
use super::regs::{QUEUE_ENABLE, QueueReg, TX_THRESHOLDS};
use crate::nic::{NicError, Ring, Segment, Transfer, TxRing};

/// Frames a lane gets through before the queue counts as stuck when it is to be stopped.
const DRAIN_BOUND: Duration = Duration::from_millis(20);
/// The emulated card maps each descriptor's bytes in one go and loses a packet where it cannot.
const EMULATED_SPLIT: u64 = 4096;

/// One transmit queue of an igb card.
#[derive(Debug)]
pub(super) struct IgbTxRing {
    card: Card,
    queue: u32,
    ring: DescriptorRing,
    vector: Vector,
    /// Free-running: the next slot to fill.
    fill: u32,
    /// Free-running: the first slot the card has not reported.
    oldest: u32,
    /// The tail the card was last told.
    told: u32,
    /// Free-running: the last slot of each frame with the card, oldest first.
    ends: VecDeque<u32>,
    running: bool,
    /// The interrupt is unmasked.
    armed: bool,
}

impl IgbTxRing {
    pub(super) fn new(card: Card, queue: u32, ring: DescriptorRing, vector: Vector) -> Self {
        let ends = VecDeque::with_capacity(ring.count() as usize);
        Self {
            card,
            queue,
            ring,
            vector,
            fill: 0,
            oldest: 0,
            told: 0,
            ends,
            running: false,
            armed: false,
        }
    }

    fn slot(&self, position: u32) -> u32 {
        position & (self.ring.count() - 1)
    }

    fn put(&mut self, segment: Segment, packet_len: u32, place: Place) {
        self.ring
            .write(self.fill, desc::tx_data(segment, packet_len, place));
        self.fill = self.fill.wrapping_add(1);
    }
}

impl Ring for IgbTxRing {
    fn start(&mut self) -> Result<(), NicError> {
        self.disarm();
        let at = |reg: QueueReg| reg.tx(self.queue);
        self.card.program_ring(&self.ring, at);
        self.card
            .write(at(QueueReg::CONTROL), QUEUE_ENABLE | TX_THRESHOLDS);
        self.card.wait_enabled(at(QueueReg::CONTROL), "tx", self.queue)?;
        (self.fill, self.oldest, self.told) = (0, 0, 0);
        self.ends.clear();
        self.running = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), NicError> {
        if !self.running {
            return Ok(());
        }
        // What the card was told of is sent if it can be. With the link down or paused it cannot: then the queue
        // is stopped over it. Both the head and the last report, as the datasheet wants it.
        let (head, tail) = (QueueReg::HEAD.tx(self.queue), self.slot(self.told));
        let last = self.ends.back().copied();
        let (card, ring) = (&self.card, &self.ring);
        let drained = card.wait(DRAIN_BOUND, &mut || {
            card.read(head) == tail && last.is_none_or(|last| desc::tx_is_done(ring.load_report(last)))
        });
        if !drained {
            tracing::debug!(
                card = card.name(),
                queue = self.queue,
                "tx queue stopped with frames in it"
            );
        }
        let control = QueueReg::CONTROL.tx(self.queue);
        self.card
            .disable_queue(control, TX_THRESHOLDS, "tx", self.queue)?;
        self.running = false;
        Ok(())
    }

    fn clear(&mut self) {
        self.oldest = self.fill;
        self.ends.clear();
    }

    #[inline]
    fn room(&self) -> usize {
        // One slot stays empty, so that the tail never meets the head while the ring is full.
        (self.ring.count() - 1 - self.fill.wrapping_sub(self.oldest)) as usize
    }

    fn flush(&mut self) {
        if self.told != self.fill {
            self.told = self.fill;
            self.card
                .write(QueueReg::TAIL.tx(self.queue), self.slot(self.fill));
        }
    }

    fn arm(&mut self) {
        if !std::mem::replace(&mut self.armed, true) {
            self.card.unmask(&self.vector);
        }
    }

    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.card.mask(&self.vector);
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.vector.event())
    }

    fn acknowledge(&mut self) -> u64 {
        self.vector.take()
    }

    fn transfer(&self) -> Transfer {
        Transfer::Dma
    }
}

impl TxRing for IgbTxRing {
    const MAX_SEGMENTS: usize = 16;

    fn descriptors_for(&self, segments: usize, len: u32) -> usize {
        // Every segment may be cut at pages: one more piece each, and one for each page of the frame.
        let cuts = if self.card.is_emulated() {
            len as usize / 4096 + 1 + segments
        } else {
            0
        };
        segments + cuts
    }

    #[inline]
    fn post(&mut self, segments: &[Segment]) {
        let packet_len: u32 = segments.iter().map(|segment| segment.len).sum();
        let emulated = self.card.is_emulated();
        let mut first_len = packet_len;
        let count = segments.len();
        for (index, segment) in segments.iter().enumerate() {
            let mut rest = *segment;
            if emulated {
                // At most a page from each cut: see EMULATED_SPLIT.
                loop {
                    let to_border = EMULATED_SPLIT - rest.iova.raw() % EMULATED_SPLIT;
                    if u64::from(rest.len) <= to_border {
                        break;
                    }
                    let len = u32::try_from(to_border).unwrap_or(rest.len);
                    self.put(
                        Segment { iova: rest.iova, len },
                        std::mem::take(&mut first_len),
                        Place::Middle,
                    );
                    rest = Segment {
                        iova: rest.iova.offset(to_border),
                        len: rest.len - len,
                    };
                }
            }
            let place = if index + 1 == count {
                Place::Last
            } else {
                Place::Middle
            };
            self.put(rest, std::mem::take(&mut first_len), place);
        }
        self.ends.push_back(self.fill.wrapping_sub(1));
    }

    #[inline]
    fn reap(&mut self) -> usize {
        let mut frames = 0;
        while let Some(end) = self.ends.front().copied() {
            if !desc::tx_is_done(self.ring.load_report(end)) {
                break;
            }
            self.ends.pop_front();
            self.oldest = end.wrapping_add(1);
            frames += 1;
        }
        frames
    }
}
