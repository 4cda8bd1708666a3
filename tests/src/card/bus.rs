//! The card's only way to memory: DMA by IOVA.
//!
//! Whoever embeds the card decides what an IOVA means: the product's software IOMMU in process, ranges mapped
//! by file descriptor in the card's own process. The card never sees a host pointer or a guest-physical
//! address, so a driver that hands it one of those is found out here.

use std::sync::Arc;

/// A DMA access that did not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no mapping for {len} bytes at iova {iova:#x}")]
pub struct BusFault {
    /// Where the access began.
    pub iova: u64,
    /// How many bytes it covered.
    pub len: u64,
}

/// Whose memory an IOVA range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// The guest's memory, shared with the driver by the VMM.
    GuestMemory,
    /// Memory the driver allocated for itself.
    DriverMemory(DriverUse),
    /// At least one byte is mapped nowhere, or the range spans two kinds.
    Unmapped,
}

/// What the driver allocated a range of its own memory for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverUse {
    /// Descriptor rings. Frames have no business here.
    Rings,
    /// Bounce buffers: the only memory of the driver's that may take received frames.
    Bounce,
    /// Anything else the card may read, such as private copies of packet headers.
    Other,
}

/// Memory as the card sees it.
///
/// All calls take `&self`: the card calls them while it handles a register write, in the order real DMA would
/// happen. A write of 4 aligned bytes must be one store that becomes visible after every earlier write, as
/// PCIe posted writes do: the card uses it to set a descriptor's done bit.
pub trait Bus: Send {
    /// Reads `buf.len()` bytes at `iova`.
    ///
    /// # Errors
    ///
    /// [`BusFault`] if any byte is unmapped; `buf` is then unspecified.
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), BusFault>;

    /// Writes `data` at `iova`.
    ///
    /// # Errors
    ///
    /// [`BusFault`] if any byte is unmapped; nothing is written then.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), BusFault>;

    /// Says whose memory the `len` bytes at `iova` are.
    fn kind(&self, iova: u64, len: u64) -> RangeKind;

    /// Returns how many bytes from `iova` on are mapped and of one kind; 0 if `iova` itself is unmapped.
    fn room(&self, iova: u64) -> u64;
}

impl<B: Bus + Sync + ?Sized> Bus for Arc<B> {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), BusFault> {
        (**self).read(iova, buf)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), BusFault> {
        (**self).write(iova, data)
    }

    fn kind(&self, iova: u64, len: u64) -> RangeKind {
        (**self).kind(iova, len)
    }

    fn room(&self, iova: u64) -> u64 {
        (**self).room(iova)
    }
}
