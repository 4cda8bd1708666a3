//! What a driver did that real hardware would answer with corruption, a hang, or luck.
//!
//! The card goes on after a violation as well as it can, so that one test can show all of them. They collect
//! in a [`ViolationLog`] that outlives the card; dropping the last handle on it without having looked fails
//! the test.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bus::RangeKind;

/// Which way a queue's frames go, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Wire to guest.
    Rx,
    /// Guest to wire.
    Tx,
}

/// One descriptor ring of the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingName {
    /// Which way its frames go.
    pub direction: Direction,
    /// The hardware queue, 0 to 15.
    pub queue: u8,
}

impl fmt::Display for RingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Rx => "rx",
            Direction::Tx => "tx",
        };
        write!(f, "{direction} {}", self.queue)
    }
}

/// What the card wanted from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To fetch a descriptor.
    Descriptor,
    /// To report a descriptor done.
    WriteBack,
    /// To store a received frame.
    RxData,
    /// To fetch a frame to send.
    TxData,
}

/// One thing a driver must not do, with the numbers needed to find where it did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// DMA to an address nobody mapped.
    #[error("{ring}: {purpose:?} DMA of {len} bytes at iova {iova:#x}, which is not mapped")]
    DmaUnmapped {
        /// On whose behalf.
        ring: RingName,
        /// For what.
        purpose: Purpose,
        /// Where.
        iova: u64,
        /// How much.
        len: u64,
    },
    /// DMA that the command register forbids.
    #[error("{ring}: {purpose:?} DMA at iova {iova:#x} while Bus Master is off")]
    BusMasterOff {
        /// On whose behalf.
        ring: RingName,
        /// For what.
        purpose: Purpose,
        /// Where.
        iova: u64,
    },
    /// DMA asked for while CTRL b2 (GIO master disable) is set.
    #[error("{ring}: {purpose:?} DMA at iova {iova:#x} while CTRL disables mastering")]
    MasterDisabled {
        /// On whose behalf.
        ring: RingName,
        /// For what.
        purpose: Purpose,
        /// Where.
        iova: u64,
    },
    /// A descriptor with bits set that must be zero.
    #[error("{ring} slot {slot}: reserved bits {bits:#010x} set in dword {dword}")]
    ReservedBits {
        /// In which ring.
        ring: RingName,
        /// At which slot.
        slot: u32,
        /// Dword 0 to 3 of the descriptor.
        dword: u8,
        /// The offending bits alone.
        bits: u32,
    },
    /// A transmit descriptor that is neither advanced data nor advanced context.
    #[error("{ring} slot {slot}: DTYP {dtyp} with DEXT {dext} is no advanced descriptor")]
    WrongDescriptor {
        /// In which ring.
        ring: RingName,
        /// At which slot.
        slot: u32,
        /// The type field.
        dtyp: u8,
        /// The extension bit.
        dext: bool,
    },
    /// A receive queue enabled with a descriptor type other than advanced one-buffer.
    #[error("rx {queue}: SRRCTL.DESCTYPE {desctype} is not the advanced one-buffer type 1")]
    WrongDescriptorType {
        /// The receive queue.
        queue: u8,
        /// SRRCTL 27:25.
        desctype: u8,
    },
    /// A tail moved on a queue that is off, or on its way off.
    #[error("{ring}: tail {tail} written while the queue is disabled")]
    TailWhileDisabled {
        /// On which ring.
        ring: RingName,
        /// The value written.
        tail: u32,
    },
    /// A tail moved after ENABLE was written but before b25 was seen to read 1.
    #[error("{ring}: tail {tail} written before ENABLE read back as 1")]
    TailBeforeEnabled {
        /// On which ring.
        ring: RingName,
        /// The value written.
        tail: u32,
    },
    /// A tail that points outside the ring.
    #[error("{ring}: tail {tail} in a ring of {size} descriptors")]
    TailBeyondRing {
        /// On which ring.
        ring: RingName,
        /// The value written.
        tail: u32,
        /// Descriptors in the ring.
        size: u32,
    },
    /// A tail that hands over slots the card has not finished with.
    #[error("{ring}: {posted} descriptors outstanding in a ring of {size}")]
    RingOverfilled {
        /// On which ring.
        ring: RingName,
        /// What would be outstanding.
        posted: u32,
        /// Descriptors in the ring.
        size: u32,
    },
    /// Ring set-up changed under a queue that is on.
    #[error("{ring}: {register} written while the queue is enabled")]
    RingChangedWhileEnabled {
        /// On which ring.
        ring: RingName,
        /// Which register.
        register: &'static str,
    },
    /// A ring base that is not 128-byte aligned.
    #[error("{ring}: base {base:#x} is not 128-byte aligned")]
    RingMisaligned {
        /// Which ring.
        ring: RingName,
        /// Its base.
        base: u64,
    },
    /// A ring length that is 0, too large, or not a multiple of 128.
    #[error("{ring}: a length of {len} bytes is not a multiple of 128 from 128 to 524288")]
    RingLength {
        /// Which ring.
        ring: RingName,
        /// Its length.
        len: u32,
    },
    /// A ring, or a head write-back word, where the guest could rewrite it.
    #[error("{ring}: ring or head write-back of {len} bytes at iova {iova:#x} lies in {kind:?}")]
    RingOutsideDriverMemory {
        /// Which ring.
        ring: RingName,
        /// Where it lies.
        iova: u64,
        /// How long it is.
        len: u64,
        /// Whose memory that is.
        kind: RangeKind,
    },
    /// A receive buffer the card could run past.
    #[error("rx {queue} slot {slot}: {room} bytes of room at iova {iova:#x}, the card may write {needed}")]
    BufferTooSmall {
        /// The receive queue.
        queue: u8,
        /// At which slot.
        slot: u32,
        /// The address posted.
        iova: u64,
        /// What is mapped from there on.
        room: u64,
        /// What the card may write: min(BSIZE, largest stored frame).
        needed: u64,
    },
    /// A receive buffer that is neither guest memory nor a bounce buffer.
    #[error("rx {queue} slot {slot}: buffer at iova {iova:#x} lies in {kind:?}")]
    RxOutsideGuest {
        /// The receive queue.
        queue: u8,
        /// At which slot.
        slot: u32,
        /// The address posted.
        iova: u64,
        /// Whose memory that is.
        kind: RangeKind,
    },
    /// A buffer address of 0.
    #[error("{ring} slot {slot}: null buffer address")]
    NullBuffer {
        /// In which ring.
        ring: RingName,
        /// At which slot.
        slot: u32,
    },
    /// RCTL.SBP set: the card then stores frames of any length.
    #[error("RCTL {rctl:#010x} sets SBP, which switches the length check off")]
    StoreBadPackets {
        /// The value written.
        rctl: u32,
    },
    /// A register written before GPIE.MSIX_MODE; the write did not stick.
    #[error("{register} written with {value:#010x} before GPIE.MSIX_MODE")]
    BeforeMsixMode {
        /// Which register.
        register: &'static str,
        /// The value written.
        value: u32,
    },
    /// A cause routed to a vector the card does not have.
    #[error("{register}: vector {vector} of 10")]
    NoSuchVector {
        /// Which register.
        register: &'static str,
        /// The vector asked for.
        vector: u8,
    },
    /// A frame longer than the card can send.
    #[error("tx {queue} slot {slot}: a packet of {len} bytes, at most {most} can be sent")]
    PacketTooLong {
        /// The transmit queue.
        queue: u8,
        /// Its first slot.
        slot: u32,
        /// Its length.
        len: u32,
        /// The limit.
        most: u32,
    },
    /// A frame shorter than the card may be given.
    #[error("tx {queue} slot {slot}: a packet of {len} bytes, at least {least} are needed")]
    PacketTooShort {
        /// The transmit queue.
        queue: u8,
        /// Its first slot.
        slot: u32,
        /// Its length.
        len: u32,
        /// The limit.
        least: u32,
    },
    /// PAYLEN and the buffers disagree.
    #[error("tx {queue} slot {slot}: PAYLEN {paylen}, but the buffers hold {sum}")]
    PayloadLength {
        /// The transmit queue.
        queue: u8,
        /// The packet's first slot.
        slot: u32,
        /// What the first descriptor says.
        paylen: u32,
        /// What the buffers hold (without headers for TSO).
        sum: u32,
    },
    /// A data descriptor with DTALEN 0.
    #[error("tx {queue} slot {slot}: zero-length data descriptor")]
    ZeroLengthSegment {
        /// The transmit queue.
        queue: u8,
        /// At which slot.
        slot: u32,
    },
    /// More data descriptors in a packet than QEMU's model takes (igb.md §10).
    #[error("tx {queue} slot {slot}: {segments} segments in one packet, at most 64 are taken")]
    TooManySegments {
        /// The transmit queue.
        queue: u8,
        /// The packet's first slot.
        slot: u32,
        /// How many.
        segments: u32,
    },
    /// A data descriptor without IFCS: the frame would leave without a check sequence.
    #[error("tx {queue} slot {slot}: IFCS is not set")]
    MissingFcs {
        /// The transmit queue.
        queue: u8,
        /// At which slot.
        slot: u32,
    },
    /// An offload asked for with a context slot nobody filled.
    #[error("tx {queue} slot {slot}: offload uses context {index}, which was never written")]
    ContextMissing {
        /// The transmit queue.
        queue: u8,
        /// The packet's first slot.
        slot: u32,
        /// Context slot.
        index: u8,
    },
    /// An offload with a number the card cannot work with.
    #[error("tx {queue} slot {slot}: offload field {field} is {value}")]
    ContextRange {
        /// The transmit queue.
        queue: u8,
        /// The packet's first slot.
        slot: u32,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// A write to a register the 82576 does not have, or that cannot be written.
    #[error("write of {value:#010x} to {offset:#07x}, which is no writable register")]
    UnknownRegister {
        /// Offset in BAR 0.
        offset: u32,
        /// The value written.
        value: u32,
    },
    /// A register access that is not aligned or not inside the BAR.
    #[error("register access at {offset:#x} is misaligned or outside the BAR")]
    OutsideBar {
        /// Offset in BAR 0.
        offset: u32,
    },
    /// A register access while the command register has memory decoding off.
    #[error("register access at {offset:#07x} while memory decoding is off")]
    MemoryDecodeOff {
        /// Offset in BAR 0.
        offset: u32,
    },
    /// A register touched too soon after CTRL.RST.
    #[error("register access at {offset:#07x} only {since_us} us after CTRL.RST")]
    TouchedDuringReset {
        /// Offset in BAR 0.
        offset: u32,
        /// Time since the reset.
        since_us: u64,
    },
    /// A range unmapped that an enabled queue still uses.
    #[error("{ring}: {what} at iova {iova:#x} was unmapped while the queue is enabled")]
    UnmappedInUse {
        /// Which ring.
        ring: RingName,
        /// What of it.
        what: InUse,
        /// Where that lies.
        iova: u64,
    },
    /// A feature of the real card that this model does not have.
    #[error("{what} is not modelled (value {value:#010x})")]
    NotModelled {
        /// Which feature.
        what: &'static str,
        /// The register or field value that asked for it.
        value: u32,
    },
}

/// What a queue still had in a range that went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InUse {
    /// The descriptor ring itself.
    Ring,
    /// A posted buffer.
    Buffer {
        /// The slot that holds it.
        slot: u32,
    },
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring => write!(f, "the ring"),
            Self::Buffer { slot } => write!(f, "the buffer of slot {slot}"),
        }
    }
}

/// A broken driver in a loop must not eat the test machine's memory.
const KEPT: usize = 1000;

/// The violations of one card. Clones are handles on the same list.
#[derive(Clone, Default)]
pub struct ViolationLog {
    inner: Arc<Inner>,
}

type Observer = Box<dyn FnMut(&Violation) + Send>;

#[derive(Default)]
struct Inner {
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    kept: Vec<Violation>,
    total: u64,
    looked_at: u64,
    observer: Option<Observer>,
}

impl ViolationLog {
    /// Takes the violations collected so far, oldest first (the first 1000 of them). They count as looked at.
    #[must_use = "violations taken and not looked at are lost"]
    pub fn take(&self) -> Vec<Violation> {
        let mut entries = self.entries();
        entries.looked_at = entries.total;
        std::mem::take(&mut entries.kept)
    }

    /// Fails the test if the driver broke a rule since the last look.
    ///
    /// # Panics
    ///
    /// If there are violations, listing them.
    #[track_caller]
    pub fn assert_clean(&self) {
        let found = self.take();
        assert!(
            found.is_empty(),
            "the driver broke the card's rules:\n{}",
            listing(&found)
        );
    }

    /// Returns how many violations there were in all, looked at or not.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.entries().total
    }

    /// Calls `observer` at each violation from now on, from the thread that provoked it.
    pub fn observe(&self, observer: impl FnMut(&Violation) + Send + 'static) {
        self.entries().observer = Some(Box::new(observer));
    }

    pub(super) fn report(&self, violation: Violation) {
        let mut entries = self.entries();
        entries.total += 1;
        if let Some(observer) = &mut entries.observer {
            observer(&violation);
        }
        if entries.kept.len() < KEPT {
            entries.kept.push(violation);
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let entries = self.entries.get_mut().unwrap_or_else(PoisonError::into_inner);
        if entries.total > entries.looked_at && !std::thread::panicking() {
            panic!("violations nobody looked at:\n{}", listing(&entries.kept));
        }
    }
}

fn listing(violations: &[Violation]) -> String {
    violations
        .iter()
        .map(|violation| format!("  {violation}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_dropped_unread_panics_and_a_read_one_does_not() {
        let unread = ViolationLog::default();
        unread.report(Violation::OutsideBar { offset: 3 });
        let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(unread)));
        assert!(dropped.is_err());

        let read = ViolationLog::default();
        read.report(Violation::OutsideBar { offset: 3 });
        assert_eq!(read.take(), [Violation::OutsideBar { offset: 3 }]);
        assert_eq!(read.total(), 1);
    }
}
