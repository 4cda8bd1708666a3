//! The card's receive queue.
//!
//! ```text
//! post ──▶ descriptors at `fill` ──RDT──▶ card ──done bit──▶ harvest from `oldest`
//! ```
//!
//! Read with: Intel 82576EB datasheet §7.1.

use std::os::fd::BorrowedFd;

use vfio_glue::address::Iova;
use vfio_glue::memory::DescriptorRing;

use super::card::{Card, Vector};
use super::desc::{self, RxReport};
use super::regs::{
    QUEUE_ENABLE, QUEUE_STRIP_CRC, QueueReg, RX_THRESHOLDS, SPLIT_ADVANCED_ONE_BUFFER, SPLIT_DROP,
};
use crate::nic::{NicError, Received, Ring, RxRing, Transfer, Verdict};

/// One receive queue of an igb card.
#[derive(Debug)]
pub(super) struct IgbRxRing {
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
    /// A frame came without its end: what follows up to the end belongs to it.
    in_torn_frame: bool,
    running: bool,
    /// The interrupt is unmasked.
    armed: bool,
}

impl IgbRxRing {
    pub(super) fn new(card: Card, queue: u32, ring: DescriptorRing, vector: Vector) -> Self {
        Self {
            card,
            queue,
            ring,
            vector,
            fill: 0,
            oldest: 0,
            told: 0,
            in_torn_frame: false,
            running: false,
            armed: false,
        }
    }

    fn slot(&self, position: u32) -> u32 {
        position & (self.ring.count() - 1)
    }
}

impl Ring for IgbRxRing {
    fn start(&mut self) -> Result<(), NicError> {
        self.disarm();
        let at = |reg: QueueReg| reg.rx(self.queue);
        let bound = self.card.bound();
        self.card.program_ring(&self.ring, at);
        let split = bound.buffer_kib | SPLIT_ADVANCED_ONE_BUFFER | SPLIT_DROP;
        self.card.write(at(QueueReg::SPLIT), split);
        if self.card.family().has_queue_offload() {
            self.card.write(at(QueueReg::OFFLOAD), QUEUE_STRIP_CRC);
        }
        self.card
            .write(at(QueueReg::CONTROL), QUEUE_ENABLE | RX_THRESHOLDS);
        self.card.wait_enabled(at(QueueReg::CONTROL), "rx", self.queue)?;
        (self.fill, self.oldest, self.told) = (0, 0, 0);
        self.in_torn_frame = false;
        self.running = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), NicError> {
        if !self.running {
            return Ok(());
        }
        let control = QueueReg::CONTROL.rx(self.queue);
        self.card
            .disable_queue(control, RX_THRESHOLDS, "rx", self.queue)?;
        self.running = false;
        Ok(())
    }

    fn clear(&mut self) {
        self.oldest = self.fill;
    }

    #[inline]
    fn room(&self) -> usize {
        (self.ring.count() - 1 - self.fill.wrapping_sub(self.oldest)) as usize
    }

    fn flush(&mut self) {
        if self.told != self.fill {
            self.told = self.fill;
            self.card
                .write(QueueReg::TAIL.rx(self.queue), self.slot(self.fill));
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

impl RxRing for IgbRxRing {
    fn buffer_bytes(&self) -> u32 {
        self.card.bound().stored
    }

    #[inline]
    fn post(&mut self, buffer: Iova) {
        self.ring.write(self.fill, desc::rx_read(buffer));
        self.fill = self.fill.wrapping_add(1);
    }

    #[inline]
    fn harvest(&mut self) -> Option<Received> {
        // Slots the card was not told of hold nothing of its.
        if self.oldest == self.told {
            return None;
        }
        let report = RxReport(self.ring.load_report(self.oldest));
        if !report.is_done() {
            return None;
        }
        self.oldest = self.oldest.wrapping_add(1);
        // The bound makes a frame over two buffers impossible; if one comes all the same, no part is passed on.
        let torn = std::mem::replace(&mut self.in_torn_frame, !report.is_whole());
        let sound = report.is_whole() && !torn && !report.is_damaged() && report.len() > 0;
        Some(Received {
            len: report.len(),
            verdict: if sound { Verdict::Good } else { Verdict::Bad },
        })
    }
}
