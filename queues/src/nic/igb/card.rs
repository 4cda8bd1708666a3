//! What the queues of one card share: its registers, its bound on frames, its clock, its vectors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vfio_glue::memory::DescriptorRing;
use vfio_glue::pci::Registers;

use super::family::Family;
use super::moderation::Pace;
use super::regs::{EITR_COUNTER_IGNORED, EITR_INTERVAL_SHIFT, QUEUE_ENABLE, QueueReg, Reg};
use super::rss::Spread;
use crate::clock::Clock;
use crate::nic::NicError;

/// How long a queue may take to start or stop. The datasheets speak of microseconds; both reference drivers wait
/// 10 ms.
const QUEUE_BOUND: Duration = Duration::from_millis(10);
const STEP: Duration = Duration::from_micros(100);

/// What bounds the bytes written into one receive buffer (ARCHITECTURE.md, "Why a buffer cannot be overrun").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameBound {
    /// The longest frame stored, in bytes: what a posted buffer must have room for.
    pub(super) stored: u32,
    /// The longest frame let in, frame check sequence included: RLPML.
    pub(super) on_wire: u32,
    /// SRRCTL's buffer size, in KiB: not below `stored`.
    pub(super) buffer_kib: u32,
}

impl FrameBound {
    const ETHERNET_HEADER: u32 = 14;
    const TAG: u32 = 4;
    const FRAME_CHECK: u32 = 4;

    /// The bound for frames of `mtu` bytes of payload, one VLAN tag allowed.
    pub(super) fn for_mtu(mtu: u16) -> Self {
        let stored = u32::from(mtu) + Self::ETHERNET_HEADER + Self::TAG;
        Self {
            stored,
            on_wire: stored + Self::FRAME_CHECK,
            buffer_kib: stored.div_ceil(1024),
        }
    }
}

/// A card, shared by its queues.
#[derive(Clone)]
pub(super) struct Card {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    family: Family,
    registers: Arc<dyn Registers>,
    clock: Arc<dyn Clock>,
    bound: FrameBound,
    spread: Spread,
    emulated: AtomicBool,
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Card({}, {:?})", self.inner.name, self.inner.family)
    }
}

impl Card {
    pub(super) fn new(
        name: &str,
        family: Family,
        registers: Arc<dyn Registers>,
        clock: Arc<dyn Clock>,
        bound: FrameBound,
        spread: Spread,
    ) -> Self {
        let emulated = AtomicBool::new(false);
        Self {
            inner: Arc::new(Inner {
                name: name.to_owned(),
                family,
                registers,
                clock,
                bound,
                spread,
                emulated,
            }),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.inner.name
    }

    pub(super) fn family(&self) -> Family {
        self.inner.family
    }

    pub(super) fn bound(&self) -> FrameBound {
        self.inner.bound
    }

    /// How received frames are spread over the queues.
    pub(super) fn spread(&self) -> &Spread {
        &self.inner.spread
    }

    /// Whether this is QEMU's model, which wants transmit segments cut at pages.
    #[inline]
    pub(super) fn is_emulated(&self) -> bool {
        self.inner.emulated.load(Ordering::Relaxed)
    }

    pub(super) fn set_emulated(&self, emulated: bool) {
        self.inner.emulated.store(emulated, Ordering::Relaxed);
    }

    /// Reads a register: a round trip on the bus.
    pub(super) fn read(&self, reg: Reg) -> u32 {
        self.inner.registers.read32(reg.0)
    }

    /// Writes a register. Memory written before is visible to the card when it lands.
    pub(super) fn write(&self, reg: Reg, value: u32) {
        self.inner.registers.write32(reg.0, value);
    }

    pub(super) fn set(&self, reg: Reg, bits: u32) {
        self.write(reg, self.read(reg) | bits);
    }

    /// Waits for `ready`, bounded; says whether it came.
    pub(super) fn wait(&self, bound: Duration, ready: &mut dyn FnMut() -> bool) -> bool {
        self.inner.clock.wait_until(bound, STEP, ready)
    }

    pub(super) fn sleep(&self, duration: Duration) {
        self.inner.clock.sleep(duration);
    }

    /// The card answers with all ones when it is gone.
    pub(super) fn check_present(&self) -> Result<(), NicError> {
        if self.read(Reg::STATUS) == u32::MAX {
            return Err(NicError::Gone {
                device: self.name().to_owned(),
            });
        }
        Ok(())
    }

    /// Tells a stopped queue where its ring is, head and tail at 0. The tail is written while the queue is
    /// disabled only because the head is too: real cards reset both, QEMU's keeps them.
    pub(super) fn program_ring(&self, ring: &DescriptorRing, at: impl Fn(QueueReg) -> Reg) {
        let base = ring.iova().raw();
        self.write(at(QueueReg::CONTROL), 0);
        self.write(at(QueueReg::BASE_LOW), low_half(base));
        self.write(at(QueueReg::BASE_HIGH), low_half(base >> 32));
        self.write(at(QueueReg::LEN_BYTES), ring.len_bytes());
        self.write(at(QueueReg::HEAD), 0);
        self.write(at(QueueReg::TAIL), 0);
    }

    pub(super) fn wait_enabled(&self, control: Reg, direction: &str, queue: u32) -> Result<(), NicError> {
        if self.wait(QUEUE_BOUND, &mut || self.read(control) & QUEUE_ENABLE != 0) {
            return self.check_present();
        }
        // It must not come up after all, when nobody expects it.
        self.write(control, 0);
        let (device, queue) = (self.name().to_owned(), format!("{direction} {queue}"));
        Err(NicError::WillNotStart {
            device,
            queue,
            bound_ms: QUEUE_BOUND.as_millis(),
        })
    }

    /// Disables a queue and waits until its DMA is over.
    pub(super) fn disable_queue(
        &self,
        control: Reg,
        thresholds: u32,
        direction: &str,
        queue: u32,
    ) -> Result<(), NicError> {
        self.write(control, thresholds);
        // Of a card that is gone every bit reads as one. It does no DMA any more, which is all a stop promises.
        if let Err(gone) = self.check_present() {
            tracing::warn!(direction, queue, "{gone}");
            return Ok(());
        }
        if self.wait(QUEUE_BOUND, &mut || self.read(control) & QUEUE_ENABLE == 0) {
            return Ok(());
        }
        let (device, queue) = (self.name().to_owned(), format!("{direction} {queue}"));
        Err(NicError::WillNotStop {
            device,
            queue,
            bound_ms: QUEUE_BOUND.as_millis(),
        })
    }

    pub(super) fn unmask(&self, vector: &Vector) {
        self.write(Reg::EIMS, 1 << vector.index);
    }

    /// Has the vector raised for one more of those who share it.
    pub(super) fn arm(&self, vector: &Vector) {
        vector.armed.fetch_add(1, Ordering::SeqCst);
        self.unmask(vector);
    }

    /// Undoes one [`arm`](Self::arm). The vector stays unmasked while anybody else waits for it.
    pub(super) fn disarm(&self, vector: &Vector) {
        if vector.armed.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        self.write(Reg::EIMC, 1 << vector.index);
        // Who arms on another CPU counts first and unmasks then. If the count is not seen here, that write comes after
        // ours; if it is, ours may have come last, and is taken back. Unmasked once too often costs a wake-up.
        fence(Ordering::SeqCst);
        if vector.armed.load(Ordering::SeqCst) > 0 {
            self.unmask(vector);
        }
    }

    /// Says how far apart a vector's interrupts are. An interval that runs goes on as it was. QEMU's model is not told.
    pub(super) fn set_pace(&self, vector: u32, pace: Pace) {
        if !self.is_emulated() {
            let value = pace.interval_us() << EITR_INTERVAL_SHIFT | EITR_COUNTER_IGNORED;
            self.write(Reg::moderation(vector), value);
        }
    }
}

/// The low 32 bits.
fn low_half(word: u64) -> u32 {
    u32::try_from(word & 0xffff_ffff).unwrap_or(u32::MAX)
}

/// One MSI-X vector and what becomes readable when it is raised, for one of those who wait for it.
///
/// A card has fewer vectors than queues. Each queue that shares one has a descriptor of its own for the one event, as one
/// epoll takes a descriptor once; and nobody reads the event, as that would take the wake-up from the others. It stays
/// readable then, and only its edges tell.
#[derive(Debug)]
pub(super) struct Vector {
    pub(super) index: u16,
    event: OwnedFd,
    /// How many of those who share it wait to be woken.
    armed: Arc<AtomicU32>,
}

impl Vector {
    pub(super) fn new(index: u16) -> std::io::Result<Self> {
        Ok(Self {
            index,
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            armed: Arc::default(),
        })
    }

    /// The same vector, for one more.
    pub(super) fn share(&self) -> std::io::Result<Self> {
        Ok(Self {
            index: self.index,
            event: self.event.try_clone()?,
            armed: Arc::clone(&self.armed),
        })
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Clears the event and returns how often it was raised: 1, whatever the truth, of one that is shared.
    pub(super) fn take(&self) -> u64 {
        if Arc::strong_count(&self.armed) > 1 {
            return 1;
        }
        let mut count = [0; 8];
        // Nothing to read (EAGAIN) is a count of 0.
        rustix::io::read(&self.event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }
}
