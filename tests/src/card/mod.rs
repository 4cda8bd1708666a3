//! A register-level model of Intel's 82576, stricter than the hardware.
//!
//! ```text
//!  driver ──read32/write32──▶ registers ──▶ rx, tx engines ──Bus (IOVA)──▶ memory
//!         ◀──── Signal ────── interrupts         │
//!                                              Wire
//! ```
//!
//! The model does what the 82576 does for a driver that follows the book, and *reports* what the book forbids
//! even where real cards let it pass: see [`Violation`]. It performs DMA only by IOVA through a [`Bus`], knows
//! time only through [`Card82576::advance`], and does all its work inside the call that caused it, so a test
//! decides the order of everything. [`faults`] makes it late, deaf, wedged or gone.
//!
//! Where sources differ or are silent, each file's header says which reading it takes. With
//! [`Quirks::qemu`] the card errs as QEMU's igb does where a driver can tell.
//!
//! Not modelled: SR-IOV and VMDq pools, header split, VLAN strip, flow control, time stamps, INTx and MSI.
//! Turning such a thing on is reported as well.
//!
//! Read with: the 82576 datasheet, or the I210's, whose chapters are nearly the same.

use std::collections::VecDeque;
use std::time::Duration;

pub mod regs;

mod bringup;
mod config_space;
mod interrupts;
mod phy;

mod queues;
mod ring;

mod desc;
mod filter;
mod frame;
mod offload;
mod rx;
mod tx;

mod bus;
mod counters;
pub mod faults;
mod memory;
pub mod server;
mod violations;
mod wire;

pub use bus::{Bus, BusFault, DriverUse, RangeKind};
pub use config_space::{BAR0_LEN_BYTES, BAR3_LEN_BYTES, CONFIG_LEN_BYTES, PBA_OFFSET};
pub use counters::Counters;
pub use interrupts::{Signal, VECTORS};
pub use memory::PlainMemory;
pub use violations::{Direction, InUse, Purpose, RingName, Violation, ViolationLog};
pub use wire::Wire;

use bringup::BringUp;
use config_space::{ConfigSpace, Effect};
use interrupts::Interrupts;
use phy::Phy;
use regs::{Ctrl, Register};
use rx::{RxQueue, Waiting};
use tx::TxQueue;

/// Receive and transmit queues each.
pub const QUEUES: u8 = 16;

/// Whose behaviour to take where two cards differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// Err as QEMU's igb does: EICR cleared by reading, EIAC that only gains bits, no EIAM, EITR four times
    /// too long with one message too many, queues that turn on and off at the first poll and keep head and
    /// tail, a PHY that CTRL.RST resets, transmits that complete without a link, no padding.
    pub qemu: bool,
}

/// How a card is built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whose errors to copy.
    pub quirks: Quirks,
    /// Fill every receive buffer with garbage, up to what the card may ever write there, as it is fetched.
    pub scribble: bool,
    /// Report registers touched sooner than this after CTRL.RST. `None` where the clock is not real.
    pub reset_quiet: Option<Duration>,
}

/// One port of an 82576.
pub struct Card82576 {
    mac: [u8; 6],
    options: Options,
    bus: Box<dyn Bus>,
    wire: Box<dyn Wire>,
    log: ViolationLog,
    now: Duration,
    /// Registers that are only memory, by offset / 4.
    words: Vec<u32>,
    config: ConfigSpace,
    bringup: BringUp,
    phy: Phy,
    irq: Interrupts,
    msix_table: [u32; VECTORS as usize * 4],
    rx: Vec<RxQueue>,
    /// The receive packet buffer: frames admitted and not yet stored in memory.
    fifo: VecDeque<Waiting>,
    tx: Vec<TxQueue>,
    faults: faults::Faults,
    counters: Counters,
}

impl Card82576 {
    /// Makes a card as it is after power-on: memory decoding and Bus Master off, cable in, no link yet.
    #[must_use]
    pub fn new(mac: [u8; 6], bus: Box<dyn Bus>, wire: Box<dyn Wire>) -> Self {
        Self::with_options(mac, bus, wire, Options::default())
    }

    /// Makes a card that differs from [`new`](Self::new)'s by `options`.
    #[must_use]
    pub fn with_options(mac: [u8; 6], bus: Box<dyn Bus>, wire: Box<dyn Wire>, options: Options) -> Self {
        let log = ViolationLog::default();
        let mut card = Self {
            mac,
            options,
            bus,
            wire,
            log: log.clone(),
            now: Duration::ZERO,
            words: vec![0; (BAR0_LEN_BYTES / 4) as usize],
            config: ConfigSpace::new(),
            bringup: BringUp::new(mac),
            phy: Phy::new(),
            irq: Interrupts::new(options.quirks.qemu, log),
            msix_table: [0; VECTORS as usize * 4],
            rx: Vec::new(),
            fifo: VecDeque::new(),
            tx: Vec::new(),
            faults: faults::Faults::default(),
            counters: Counters::default(),
        };
        card.reset();
        card
    }

    /// Returns a handle on the violations, which outlives the card.
    #[must_use]
    pub fn violations(&self) -> ViolationLog {
        self.log.clone()
    }

    /// Returns what the card counted so far, over all resets.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            interrupts: self.irq.sent,
            ..self.counters
        }
    }

    /// Reads a register of BAR 0.
    pub fn read32(&mut self, offset: u32) -> u32 {
        if !self.reachable(offset) {
            return u32::MAX;
        }
        match Register::decode(offset) {
            Register::Queue(ring, register) => self.read_queue(ring, register),
            Register::Interrupt => self.irq.read(offset),
            Register::Special => self.read_special(offset),
            Register::Statistic => self.read_statistic(offset),
            Register::ReadOnly if offset == regs::EEMNGCTL => self.read_management_control(),
            Register::Plain => self.word(offset),
            Register::ReadOnly | Register::Unknown => 0,
        }
    }

    /// Writes a register of BAR 0, and does at once whatever that sets going.
    pub fn write32(&mut self, offset: u32, value: u32) {
        if !self.reachable(offset) {
            return;
        }
        match Register::decode(offset) {
            Register::Queue(ring, register) => self.write_queue(ring, register, value),
            Register::Interrupt => self.irq.write(offset, value, self.now),
            Register::Special => self.write_special(offset, value),
            Register::Plain => self.set_word(offset, value),
            Register::Statistic | Register::ReadOnly | Register::Unknown => {
                self.log.report(Violation::UnknownRegister { offset, value });
            }
        }
    }

    /// Reads configuration space; what lies past its end reads as ones.
    pub fn config_read(&self, offset: u16, buf: &mut [u8]) {
        if self.faults.removed {
            buf.fill(u8::MAX);
        } else {
            self.config.read(offset, buf);
        }
    }

    /// Writes configuration space. The reset bit of the PCIe capability acts like [`reset`](Self::reset).
    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        if !self.faults.removed && self.config.write(offset, data) == Effect::FunctionReset {
            self.reset();
        }
    }

    /// Reads BAR 3, the MSI-X table and its pending bits.
    #[must_use]
    pub fn msix_read32(&self, offset: u32) -> u32 {
        match self.msix_table.get((offset / 4) as usize) {
            _ if self.faults.removed => u32::MAX,
            Some(word) => *word,
            None if offset == PBA_OFFSET => self.irq.pending_bits(),
            None => 0,
        }
    }

    /// Writes BAR 3. The table is only remembered: which vectors are signalled, and to where, is up to
    /// [`set_irq`](Self::set_irq), as the kernel programs the table of a VFIO device itself.
    pub fn msix_write32(&mut self, offset: u32, value: u32) {
        if !self.faults.removed
            && let Some(word) = self.msix_table.get_mut((offset / 4) as usize)
        {
            *word = value;
        }
    }

    /// Connects `vector` to an eventfd (or another [`Signal`]), or disconnects it. A message that waited for
    /// one is delivered.
    ///
    /// # Panics
    ///
    /// If the card has no such vector; it has [`VECTORS`].
    pub fn set_irq(&mut self, vector: u8, signal: Option<Box<dyn Signal>>) {
        assert!(vector < VECTORS, "vector {vector} of {VECTORS}");
        self.irq.set_signal(vector, signal);
    }

    /// Function-level reset: everything but the eventfds back to power-on. Unlike the kernel, which restores
    /// configuration space around it, this leaves memory decoding and Bus Master off.
    pub fn reset(&mut self) {
        self.config = ConfigSpace::new();
        self.phy.reset();
        self.set_word(regs::RXPBS, 0x40);
        self.set_word(regs::TXPBS, 0x28);
        self.msix_table = [0; VECTORS as usize * 4];
        for vector in 0..usize::from(VECTORS) {
            self.msix_table[vector * 4 + 3] = 1; // masked
        }
        self.reset_mac(false);
        self.bringup.reset_at = None;
    }

    /// Lets time pass: autonegotiation, interrupt moderation, delayed completions.
    pub fn advance(&mut self, time: Duration) {
        self.now += time;
        self.phy.advance(self.now);
        self.refresh_link();
        self.pump();
        self.irq.advance(self.now);
    }

    /// Returns how far ahead the next thing is that only the passing of time brings about.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        [
            self.phy.next_deadline(),
            self.irq.next_deadline(),
            self.next_completion(),
        ]
        .into_iter()
        .flatten()
        .min()
        .map(|deadline| deadline.saturating_sub(self.now))
    }

    /// Tells the card that `len` bytes at `iova` are no longer mapped. Call it before the memory goes; a
    /// queue that still has a ring or a buffer there is reported.
    pub fn note_unmapped(&mut self, iova: u64, len: u64) {
        let gone = iova..iova.saturating_add(len);
        let overlaps =
            |start: u64, len: u64| len > 0 && start < gone.end && gone.start < start.saturating_add(len);
        for queue in &self.rx {
            let bound = self.rx_buffer_bound(queue);
            let buffers = queue
                .posted
                .iter()
                .map(|posted| (posted.slot, posted.buffer, bound));
            if let Some((what, iova)) = queue.ring.in_use(&overlaps, buffers) {
                self.log.report(Violation::UnmappedInUse {
                    ring: queue.ring.name,
                    what,
                    iova,
                });
            }
        }
        for queue in &self.tx {
            if let Some((what, iova)) = queue.ring.in_use(&overlaps, queue.buffers()) {
                self.log.report(Violation::UnmappedInUse {
                    ring: queue.ring.name,
                    what,
                    iova,
                });
            }
        }
    }

    fn reachable(&self, offset: u32) -> bool {
        if self.faults.removed {
            return false;
        }
        if !offset.is_multiple_of(4) || offset >= BAR0_LEN_BYTES {
            self.log.report(Violation::OutsideBar { offset });
            return false;
        }
        if !self.config.memory_decoded() {
            self.log.report(Violation::MemoryDecodeOff { offset });
            return false;
        }
        if let (Some(quiet), Some(reset_at)) = (self.options.reset_quiet, self.bringup.reset_at)
            && self.now < reset_at + quiet
        {
            let since_us = u64::try_from((self.now - reset_at).as_micros()).unwrap_or(u64::MAX);
            self.log
                .report(Violation::TouchedDuringReset { offset, since_us });
        }
        true
    }

    fn word(&self, offset: u32) -> u32 {
        self.words[(offset / 4) as usize]
    }

    fn set_word(&mut self, offset: u32, value: u32) {
        self.words[(offset / 4) as usize] = value;
    }

    /// Does all the receiving and sending that can be done now.
    fn pump(&mut self) {
        self.pump_rx();
        for queue in 0..QUEUES {
            self.pump_tx(queue);
        }
    }

    /// Reads a descriptor or frame data, and reports it if that is not allowed. Returns whether it went well.
    fn dma_read(&self, ring: RingName, purpose: Purpose, iova: u64, buf: &mut [u8]) -> bool {
        self.may_master(ring, purpose, iova)
            && self
                .bus
                .read(iova, buf)
                .map_err(|fault| self.report_fault(ring, purpose, fault))
                .is_ok()
    }

    /// The same for a write.
    fn dma_write(&self, ring: RingName, purpose: Purpose, iova: u64, data: &[u8]) -> bool {
        self.may_master(ring, purpose, iova)
            && self
                .bus
                .write(iova, data)
                .map_err(|fault| self.report_fault(ring, purpose, fault))
                .is_ok()
    }

    fn may_master(&self, ring: RingName, purpose: Purpose, iova: u64) -> bool {
        if !self.config.bus_master() {
            self.log.report(Violation::BusMasterOff { ring, purpose, iova });
            return false;
        }
        if self.bringup.ctrl.contains(Ctrl::GIO_MASTER_DISABLE) {
            self.log.report(Violation::MasterDisabled { ring, purpose, iova });
            return false;
        }
        true
    }

    fn report_fault(&self, ring: RingName, purpose: Purpose, BusFault { iova, len }: BusFault) {
        self.log.report(Violation::DmaUnmapped {
            ring,
            purpose,
            iova,
            len,
        });
    }
}
