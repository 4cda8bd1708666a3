//! What the card's two kinds of queue share: a descriptor ring, our place in it, its registers and its interrupt.
//!
//! ```text
//! put ──▶ slot at `fill` ──tail──▶ card ──done bit──▶ slot at `oldest` (rx.rs, tx.rs)
//! ```
//!
//! Read with: Intel 82576EB datasheet §7.1.4.4, §7.2.2.3 (head and tail), §4.5.9, §4.5.10 (start and stop).

use std::os::fd::BorrowedFd;

use vfio_glue::memory::{Descriptor, DescriptorRing};

use super::card::{Card, Vector};
use super::moderation::Pace;
use super::regs::{QUEUE_ENABLE, QueueReg, RX_THRESHOLDS, Reg, TX_THRESHOLDS};
use crate::nic::NicError;

/// Which of the card's queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Wire to memory.
    Rx,
    /// Memory to wire.
    Tx,
}

impl Side {
    fn as_str(self) -> &'static str {
        match self {
            Self::Rx => "rx",
            Self::Tx => "tx",
        }
    }

    fn thresholds(self) -> u32 {
        match self {
            Self::Rx => RX_THRESHOLDS,
            Self::Tx => TX_THRESHOLDS,
        }
    }
}

/// One queue of the card. Positions are free-running; the ring masks them.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) card: Card,
    side: Side,
    number: u32,
    pub(super) ring: DescriptorRing,
    vector: Vector,
    /// The next slot to fill.
    pub(super) fill: u32,
    /// The first slot the card has not reported.
    pub(super) oldest: u32,
    /// The tail the card was last told.
    pub(super) told: u32,
    running: bool,
    /// The interrupt is unmasked.
    armed: bool,
}

impl Queue {
    pub(super) fn new(card: Card, side: Side, number: u32, ring: DescriptorRing, vector: Vector) -> Self {
        let (fill, oldest, told) = (0, 0, 0);
        Self {
            card,
            side,
            number,
            ring,
            vector,
            fill,
            oldest,
            told,
            running: false,
            armed: false,
        }
    }

    /// A register of this queue.
    pub(super) fn reg(&self, reg: QueueReg) -> Reg {
        match self.side {
            Side::Rx => reg.rx(self.number),
            Side::Tx => reg.tx(self.number),
        }
    }

    pub(super) fn slot(&self, position: u32) -> u32 {
        position & (self.ring.count() - 1)
    }

    /// Starts the queue, empty, its interrupt masked. `more` are registers to write while it is off.
    pub(super) fn start(&mut self, more: &[(QueueReg, u32)]) -> Result<(), NicError> {
        self.disarm();
        self.card.program_ring(&self.ring, |reg| self.reg(reg));
        for (reg, value) in more {
            self.card.write(self.reg(*reg), *value);
        }
        let control = self.reg(QueueReg::CONTROL);
        self.card.write(control, QUEUE_ENABLE | self.side.thresholds());
        self.card.wait_enabled(control, self.side.as_str(), self.number)?;
        (self.fill, self.oldest, self.told) = (0, 0, 0);
        self.running = true;
        Ok(())
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// Stops the queue and waits until its DMA is over. It counts as running until that is certain.
    pub(super) fn stop(&mut self) -> Result<(), NicError> {
        // Others may share the vector, and it is not to be raised for one who is gone.
        self.disarm();
        if self.running {
            let (control, side) = (self.reg(QueueReg::CONTROL), self.side);
            self.card
                .disable_queue(control, side.thresholds(), side.as_str(), self.number)?;
            self.running = false;
        }
        Ok(())
    }

    #[inline]
    pub(super) fn room(&self) -> usize {
        // One slot stays empty, so that the tail never meets the head while the ring is full.
        (self.ring.count() - 1 - self.fill.wrapping_sub(self.oldest)) as usize
    }

    #[inline]
    pub(super) fn put(&mut self, descriptor: Descriptor) {
        self.ring.write(self.fill, descriptor);
        self.fill = self.fill.wrapping_add(1);
    }

    /// Tells the card how far the ring is filled, if it does not know.
    #[inline]
    pub(super) fn flush(&mut self) {
        if self.told != self.fill {
            self.told = self.fill;
            self.card.write(self.reg(QueueReg::TAIL), self.slot(self.fill));
        }
    }

    pub(super) fn arm(&mut self) {
        if !std::mem::replace(&mut self.armed, true) {
            self.card.arm(&self.vector);
        }
    }

    #[inline]
    pub(super) fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.card.disarm(&self.vector);
        }
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.vector.event()
    }

    /// The vector's interrupts come no closer than this from now on.
    pub(super) fn set_pace(&self, pace: Pace) {
        self.card.set_pace(self.vector.index.into(), pace);
    }

    pub(super) fn acknowledge(&self) -> u64 {
        self.vector.take()
    }
}

/// The parts of [`crate::nic::Ring`] that are the same for both kinds.
macro_rules! ring_of_a_queue {
    () => {
        fn room(&self) -> usize {
            self.queue.room()
        }

        fn arm(&mut self) {
            self.queue.arm();
        }

        fn disarm(&mut self) {
            self.queue.disarm();
        }

        fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
            Some(self.queue.wake_fd())
        }

        fn transfer(&self) -> Transfer {
            Transfer::Dma
        }
    };
}
pub(super) use ring_of_a_queue;
