//! Memory of our own that a card may reach: descriptor rings and bounce slots.
//!
//! It comes from a named memfd, so that every back end can map it by file, `map show` can tell it from guest
//! memory, and the card models in the tests can too.

#![expect(
    unsafe_code,
    reason = "reads and writes descriptors that the card changes at any time"
)]

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};

use super::{HostRange, HostSlice};
use crate::address::Iova;
use crate::iommu::software::SoftwareBus;
use crate::map::{Extent, MapError, MemoryMap};

/// Some bytes of ours at a bus address. Taken out of the map when dropped: stop the card's use of it first.
#[derive(Debug)]
pub struct DmaBuffer {
    map: Arc<MemoryMap>,
    extent: Arc<Extent>,
    owner: String,
}

impl DmaBuffer {
    /// Allocates `len` zeroed bytes, rounded up to whole pages, and maps them for every device of `map`.
    ///
    /// `purpose` is `rings` or `bounce`; the memfd is called `vuv-<purpose>`. `owner` is shown in `stats`.
    ///
    /// # Errors
    ///
    /// [`MapError`] if memory, pins or IOVA space do not suffice; nothing is left behind.
    pub fn new(map: &Arc<MemoryMap>, purpose: &str, owner: &str, len: usize) -> Result<Self, MapError> {
        let len = (len as u64).max(1).next_multiple_of(4096);
        let failed = |source: std::io::Error| MapError::OwnMemory { len, source };
        let file =
            memfd_create(format!("vuv-{purpose}"), MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let file = File::from(file);
        file.set_len(len).map_err(failed)?;
        let owner = format!("{owner} {purpose}");
        let extent = map.add_own(&Arc::new(file), len, &owner)?;
        Ok(Self {
            map: Arc::clone(map),
            extent,
            owner,
        })
    }

    /// Where the card finds the first byte.
    pub fn iova(&self) -> Iova {
        self.extent.iova()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.extent.host().len()
    }

    /// Whether there are no bytes: never so.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// `len` bytes from `offset` on, or `None` if the buffer is shorter.
    pub fn slice(&self, offset: usize, len: usize) -> Option<HostSlice<'_>> {
        self.extent.host().slice(offset, len)
    }

    fn host(&self) -> &HostRange {
        self.extent.host()
    }
}

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        if let Err(error) = self.map.release(&self.extent, &self.owner) {
            tracing::error!(owner = self.owner, %error, "a buffer of ours stays mapped");
        }
    }
}

/// A ring of 16-byte descriptors as a card made of software sees it: the other end of a [`DescriptorRing`].
#[derive(Debug)]
pub struct CardRing {
    base: NonNull<u64>,
    mask: u32,
    _memory: HostRange,
}

// SAFETY: `base` points into `_memory`, which keeps it mapped; every access is one atomic load or store of a word.
unsafe impl Send for CardRing {}

impl CardRing {
    /// The ring of `len_bytes` at `iova`, as a driver announces it. `None` if it is not mapped in one piece, not aligned,
    /// or its descriptors are not a power of two.
    pub fn at(bus: &SoftwareBus, iova: Iova, len_bytes: u32) -> Option<Self> {
        let count = len_bytes / 16;
        let memory = bus.window(iova, 16 * count as usize)?;
        let fits = count.is_power_of_two() && memory.address().is_multiple_of(8);
        fits.then(|| Self {
            base: memory.as_ptr().cast(),
            mask: count - 1,
            _memory: memory,
        })
    }

    /// The slot after `slot`, both below the ring's size.
    #[inline]
    pub fn after(&self, slot: u32) -> u32 {
        slot.wrapping_add(1) & self.mask
    }

    /// Reads what the driver wrote into `slot` (masked).
    #[inline]
    pub fn load(&self, slot: u32) -> Descriptor {
        [0, 1].map(|word| u64::from_le(self.word(slot, word).load(Ordering::Relaxed)))
    }

    /// Writes the second word of `slot` (masked), where the driver looks for a report; what was written before is visible
    /// to whoever sees it.
    #[inline]
    pub fn report(&self, slot: u32, word: u64) {
        // Pairs with `DescriptorRing::load_report`.
        self.word(slot, 1).store(word.to_le(), Ordering::Release);
    }

    #[inline]
    fn word(&self, slot: u32, word: usize) -> &AtomicU64 {
        let index = 2 * (slot & self.mask) as usize + word;
        // SAFETY: the masked slot is below the count and `word` is 0 or 1, so the 8 bytes lie inside `_memory`, which lives
        // as long as the reference; `at` checked the alignment. The driver's side touches them by volatile and atomic
        // access only.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().wrapping_add(index)) }
    }
}

/// A 16-byte descriptor as two little-endian words.
pub type Descriptor = [u64; 2];

/// A ring of 16-byte descriptors shared with the card.
///
/// Slots are masked by the ring's size, a power of two, so no access can leave the buffer.
#[derive(Debug)]
pub struct DescriptorRing {
    base: NonNull<u64>,
    mask: u32,
    buffer: DmaBuffer,
}

// SAFETY: `base` points into `buffer`, which is kept alive here; one thread at a time uses a ring (`&mut`, or
// reads of what the card wrote).
unsafe impl Send for DescriptorRing {}

impl DescriptorRing {
    /// Makes a zeroed ring of `count` descriptors, a power of two of at least 8, mapped for every device of `map`.
    ///
    /// # Errors
    ///
    /// [`MapError`] as [`DmaBuffer::new`].
    ///
    /// # Panics
    ///
    /// If `count` is no power of two from 8 to 32768: a driver's constant, never outside data.
    pub fn new(map: &Arc<MemoryMap>, owner: &str, count: u32) -> Result<Self, MapError> {
        assert!(
            count.is_power_of_two() && (8..=32768).contains(&count),
            "a ring of {count} descriptors"
        );
        let buffer = DmaBuffer::new(map, "rings", owner, 16 * count as usize)?;
        let base = buffer.host().as_ptr().cast();
        Ok(Self {
            base,
            mask: count - 1,
            buffer,
        })
    }

    /// Number of descriptors.
    #[inline]
    pub fn count(&self) -> u32 {
        self.mask + 1
    }

    /// Length in bytes, for the card's length register.
    pub fn len_bytes(&self) -> u32 {
        16 * self.count()
    }

    /// Where the card finds slot 0, aligned to a page.
    pub fn iova(&self) -> Iova {
        self.buffer.iova()
    }

    /// Writes a descriptor into `slot` (masked). The card sees it after the next doorbell.
    #[inline]
    pub fn write(&mut self, slot: u32, descriptor: Descriptor) {
        let at = self.word(slot, 0).as_ptr();
        // SAFETY: `word` keeps both words of the slot inside the buffer. The card owns the slot only after a
        // doorbell, and may still read it early: volatile, so both stores happen and none is torn in two.
        unsafe { at.write_volatile(descriptor[0].to_le()) };
        // SAFETY: as above, second word.
        unsafe { at.wrapping_add(1).write_volatile(descriptor[1].to_le()) };
    }

    /// Reads the second word of `slot` (masked), where the card reports; what it wrote before is visible after.
    #[inline]
    pub fn load_report(&self, slot: u32) -> u64 {
        // SAFETY: `word` keeps the word inside the buffer, 8-byte aligned; it is touched by volatile and atomic
        // access only.
        let word = unsafe { AtomicU64::from_ptr(self.word(slot, 1).as_ptr()) };
        // Acquire: the frame's bytes and the first word are read after the done bit. The card writes data before
        // status, and x86 keeps its writes in order (TRAPS 52).
        u64::from_le(word.load(Ordering::Acquire))
    }

    /// Reads the first word of `slot` (masked): addresses before, type and hash after write-back.
    #[inline]
    pub fn load_first(&self, slot: u32) -> u64 {
        // SAFETY: as `load_report`, first word.
        let word = unsafe { AtomicU64::from_ptr(self.word(slot, 0).as_ptr()) };
        u64::from_le(word.load(Ordering::Relaxed))
    }

    #[inline]
    fn word(&self, slot: u32, word: usize) -> NonNull<u64> {
        let index = 2 * (slot & self.mask) as usize + word;
        // SAFETY: the masked slot is below `count` and `word` is 0 or 1, so the index is below 2 * count, and the
        // buffer holds that many words.
        unsafe { self.base.add(index) }
    }
}
