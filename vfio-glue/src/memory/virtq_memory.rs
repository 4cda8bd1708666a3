//! The three areas of a split virtqueue in guest memory, read and written at raw-pointer cost.
//!
//! Sizes and alignments are checked once, when the view is made; indexes are masked by the queue size, so no
//! access needs a bounds check and none can leave the areas whatever the guest writes.
//!
//! Read with: virtio 1.2 §2.7.5 (descriptor table), §2.7.6 (available ring), §2.7.8 (used ring), §2.7.13.4
//! (memory barriers), §2.7.10 (event index).

#![expect(
    unsafe_code,
    reason = "reads and writes ring memory that the guest changes at any time"
)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::{HostRange, HostSlice};

const DESCRIPTOR_BYTES: usize = 16;
const AVAIL_IDX: usize = 2;
const AVAIL_RING: usize = 4;
const USED_IDX: usize = 2;
const USED_RING: usize = 4;
const USED_ELEMENT_BYTES: usize = 8;
const MAX_SIZE: u16 = 32768;

/// A descriptor as it stood in memory at the moment of the read (virtio 1.2 §2.7.5). Untrusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Guest-physical address of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// NEXT 1, WRITE 2, INDIRECT 4.
    pub flags: u16,
    /// The next descriptor's index, if NEXT is set.
    pub next: u16,
}

impl RawDescriptor {
    #[inline]
    fn from_words(low: u64, high: u64) -> Self {
        let [l0, l1, l2, l3, f0, f1, n0, n1] = u64::from_le(high).to_le_bytes();
        Self {
            addr: u64::from_le(low),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}

/// An entry of the used ring (virtio 1.2 §2.7.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedElement {
    /// Head of the chain given back.
    pub head: u16,
    /// Bytes written into its device-writable part.
    pub len: u32,
}

/// Why virtqueue memory cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtqMemoryError {
    /// Not a power of two from 1 to 32768 (virtio 1.2 §2.7).
    #[error("a split virtqueue of {size} entries is impossible: a power of two up to 32768 is needed")]
    Size {
        /// The size asked for.
        size: u32,
    },
    /// An area is not aligned as the specification wants.
    #[error("the {area} is not aligned to {align} bytes")]
    Alignment {
        /// Which area.
        area: &'static str,
        /// What it must be aligned to.
        align: usize,
    },
    /// An area is shorter than the queue needs.
    #[error("the {area} needs {need} bytes, {have} are there")]
    Short {
        /// Which area.
        area: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes given.
        have: usize,
    },
}

/// One split virtqueue's memory. Keeps the guest memory it lies in mapped.
#[derive(Debug)]
pub struct VirtqMemory {
    size: u16,
    mask: u16,
    desc: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    _keep: [HostRange; 3],
}

// SAFETY: pointers into the ranges in `_keep`, which may be used from any thread and are kept alive here.
unsafe impl Send for VirtqMemory {}

impl VirtqMemory {
    /// Bytes of the descriptor table of a queue of `size`.
    pub fn desc_bytes(size: u16) -> usize {
        DESCRIPTOR_BYTES * usize::from(size)
    }

    /// Bytes of the available ring, the event field at its end included.
    pub fn avail_bytes(size: u16) -> usize {
        AVAIL_RING + 2 * usize::from(size) + 2
    }

    /// Bytes of the used ring, the event field at its end included.
    pub fn used_bytes(size: u16) -> usize {
        USED_RING + USED_ELEMENT_BYTES * usize::from(size) + 2
    }

    /// Checks a queue size: a power of two from 1 to 32768.
    ///
    /// # Errors
    ///
    /// [`VirtqMemoryError::Size`].
    pub fn check_size(size: u32) -> Result<u16, VirtqMemoryError> {
        u16::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= MAX_SIZE)
            .ok_or(VirtqMemoryError::Size { size })
    }

    /// Views the three areas of a queue of `size` entries.
    ///
    /// # Errors
    ///
    /// [`VirtqMemoryError`] if the size is impossible, or an area is misaligned or too short.
    pub fn new(
        size: u32,
        desc: HostRange,
        avail: HostRange,
        used: HostRange,
    ) -> Result<Self, VirtqMemoryError> {
        let size = Self::check_size(size)?;
        check("descriptor table", &desc, Self::desc_bytes(size), 16)?;
        check("available ring", &avail, Self::avail_bytes(size), 2)?;
        check("used ring", &used, Self::used_bytes(size), 4)?;
        Ok(Self {
            size,
            mask: size - 1,
            desc: desc.as_ptr(),
            avail: avail.as_ptr(),
            used: used.as_ptr(),
            _keep: [desc, avail, used],
        })
    }

    /// Number of entries.
    #[inline]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Reads descriptor `index`, masked by the size. Each of its two words is read once.
    #[inline]
    pub fn descriptor(&self, index: u16) -> RawDescriptor {
        self.read_descriptor(index & self.mask)
    }

    #[inline(always)]
    fn read_descriptor(&self, index: u16) -> RawDescriptor {
        debug_assert!(index < self.size, "the caller checks or masks");
        let offset = DESCRIPTOR_BYTES * usize::from(index);
        let word = self.desc.as_ptr().wrapping_add(offset).cast::<u64>();
        // SAFETY: both callers, right above, pass an index below `size`, so 16 bytes at `offset` lie inside the table,
        // whose length and 16-byte alignment `new` checked and which `_keep` keeps mapped. The guest may write it meanwhile:
        // volatile, once, and callers check the copy.
        let low = unsafe { word.read_volatile() };
        // SAFETY: as above, second word.
        let high = unsafe { word.wrapping_add(1).read_volatile() };
        RawDescriptor::from_words(low, high)
    }

    /// Reads descriptor `index`, or `None` if the table has no such one.
    #[inline(always)]
    pub fn checked_descriptor(&self, index: u16) -> Option<RawDescriptor> {
        (index < self.size).then(|| self.read_descriptor(index))
    }

    /// The driver's count of chains offered so far, modulo 2^16. Everything it wrote before is visible after.
    #[inline]
    pub fn avail_idx(&self) -> u16 {
        // Acquire: descriptors and ring entries are read after the index that announces them. The driver's
        // write barrier is the other half (virtio 1.2 §2.7.13.3.1).
        u16::from_le(self.avail_word(AVAIL_IDX).load(Ordering::Acquire))
    }

    /// Whether the driver asked not to be notified (VIRTQ_AVAIL_F_NO_INTERRUPT).
    #[inline]
    pub fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail_word(0).load(Ordering::Relaxed))
    }

    /// The head in the slot of the free-running `position` (masked). Untrusted.
    #[inline]
    pub fn avail_entry(&self, position: u16) -> u16 {
        let offset = AVAIL_RING + 2 * usize::from(position & self.mask);
        u16::from_le(self.avail_word(offset).load(Ordering::Relaxed))
    }

    /// The used index at which the driver wants a notification (event index).
    #[inline]
    pub fn used_event(&self) -> u16 {
        let offset = AVAIL_RING + 2 * usize::from(self.size);
        u16::from_le(self.avail_word(offset).load(Ordering::Relaxed))
    }

    /// Our count of chains given back, as it stands in memory.
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.used_word(USED_IDX).load(Ordering::Relaxed))
    }

    /// Writes a used element into the slot of the free-running `position` (masked).
    #[inline]
    pub fn write_used(&self, position: u16, element: UsedElement) {
        let offset = USED_RING + USED_ELEMENT_BYTES * usize::from(position & self.mask);
        let word = u64::from(element.head) | u64::from(element.len) << 32;
        let slot = self.used.as_ptr().wrapping_add(offset).cast::<u64>();
        // SAFETY: the masked position is below `size`, so 8 bytes at `offset` lie inside the used ring, whose
        // length and 4-byte alignment `new` checked; the write asks for no more than that. Only the driver
        // reads it, and not before `store_used_idx`.
        unsafe { slot.write_unaligned(word.to_le()) };
    }

    /// Publishes every element written before `index`, which is our free-running count.
    #[inline]
    pub fn store_used_idx(&self, index: u16) {
        // The driver reads an element as soon as it sees the new index, so the elements go first. Pairs with
        // the driver's read barrier after it loads `used.idx` (virtio 1.2 §2.7.14).
        self.used_word(USED_IDX).store(index.to_le(), Ordering::Release);
    }

    /// Sets VIRTQ_USED_F_NO_NOTIFY, or clears it.
    #[inline]
    pub fn store_used_flags(&self, flags: u16) {
        self.used_word(0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Asks the driver for a kick when its available index passes `index` (event index).
    #[inline]
    pub fn store_avail_event(&self, index: u16) {
        let offset = USED_RING + USED_ELEMENT_BYTES * usize::from(self.size);
        self.used_word(offset).store(index.to_le(), Ordering::Relaxed);
    }

    /// Orders our last store before our next load, as the driver does on its side.
    ///
    /// Needed between `store_used_idx` and reading whether the driver wants a notification, and between asking
    /// for kicks and looking once more: else each side can miss the other's write (virtio 1.2 §2.7.13.4).
    #[inline]
    pub fn full_barrier() {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn avail_word(&self, offset: usize) -> &AtomicU16 {
        let word = self.avail.as_ptr().wrapping_add(offset).cast();
        // SAFETY: every offset used here lies inside the available ring for the `size` that `new` checked, is
        // even, and the ring is 2-byte aligned and kept mapped by `_keep`. The guest writes it at any time, so
        // it is only ever touched as an atomic.
        unsafe { AtomicU16::from_ptr(word) }
    }

    #[inline]
    fn used_word(&self, offset: usize) -> &AtomicU16 {
        let word = self.used.as_ptr().wrapping_add(offset).cast();
        // SAFETY: as for `avail_word`, for the used ring, whose flags, index and event field are 16-bit words
        // at even offsets.
        unsafe { AtomicU16::from_ptr(word) }
    }
}

fn check(area: &'static str, range: &HostRange, need: usize, align: usize) -> Result<(), VirtqMemoryError> {
    if !range.address().is_multiple_of(align as u64) {
        return Err(VirtqMemoryError::Alignment { area, align });
    }
    if range.len() < need {
        return Err(VirtqMemoryError::Short {
            area,
            need,
            have: range.len(),
        });
    }
    Ok(())
}

/// Reads descriptor `index` of an indirect table, or `None` if the table is not that long.
///
/// The table may lie at any address the guest likes, so nothing is asked of its alignment.
#[inline]
pub fn read_indirect(table: HostSlice<'_>, index: u16) -> Option<RawDescriptor> {
    let entry = table.sub(DESCRIPTOR_BYTES * usize::from(index), DESCRIPTOR_BYTES)?;
    let word = entry.as_ptr().cast::<u64>().as_ptr();
    if word.is_aligned() {
        // SAFETY: `entry` is 16 live bytes and aligned. The guest may change them meanwhile: volatile, once, and
        // callers check the copy.
        let low = unsafe { word.read_volatile() };
        // SAFETY: as above, second word.
        let high = unsafe { word.wrapping_add(1).read_volatile() };
        return Some(RawDescriptor::from_words(low, high));
    }
    let mut bytes = [[0; 8]; 2];
    entry.copy_to(bytes.as_flattened_mut());
    Some(RawDescriptor::from_words(
        u64::from_ne_bytes(bytes[0]),
        u64::from_ne_bytes(bytes[1]),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(len: u64) -> HostRange {
        let file =
            std::fs::File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        HostRange::of_file(&file, 0, len).unwrap()
    }

    fn queue(memory: &HostRange, size: u16) -> VirtqMemory {
        let desc = memory.sub(0, VirtqMemory::desc_bytes(size)).unwrap();
        let avail = memory.sub(4096, VirtqMemory::avail_bytes(size)).unwrap();
        let used = memory.sub(8192, VirtqMemory::used_bytes(size)).unwrap();
        VirtqMemory::new(size.into(), desc, avail, used).unwrap()
    }

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let memory = memory(3 * 4096);
        let queue = queue(&memory, 4);
        let put = |offset: usize, bytes: &[u8]| {
            assert_eq!(
                memory.slice(offset, bytes.len()).unwrap().copy_from(bytes),
                bytes.len()
            )
        };
        put(
            16,
            &[
                0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 4, 3, 2, 1, 2, 0, 7, 0,
            ],
        );
        put(4096, &[1, 0, 9, 0, 3, 0, 2, 0, 1, 0, 0, 0, 5, 0]);
        let want = RawDescriptor {
            addr: 0x1122_3344_5566_7788,
            len: 0x0102_0304,
            flags: 2,
            next: 7,
        };
        assert_eq!(queue.descriptor(1), want);
        assert_eq!(queue.descriptor(5), want, "indexes are masked");
        assert_eq!(
            (queue.avail_flags(), queue.avail_idx(), queue.used_event()),
            (1, 9, 5)
        );
        assert_eq!((queue.avail_entry(0), queue.avail_entry(5)), (3, 2));
        queue.write_used(6, UsedElement { head: 3, len: 0x0506 });
        queue.store_used_idx(7);
        queue.store_avail_event(8);
        queue.store_used_flags(1);
        let mut used = [0; 4 + 32 + 2];
        memory.slice(8192, used.len()).unwrap().copy_to(&mut used);
        assert_eq!(&used[..4], &[1, 0, 7, 0]);
        assert_eq!(&used[20..28], &[3, 0, 0, 0, 6, 5, 0, 0]);
        assert_eq!(&used[36..], &[8, 0]);
    }

    #[test]
    fn impossible_queues_are_refused() {
        let memory = memory(2 * 4096);
        for size in [0, 3, 65536] {
            let areas = || memory.clone();
            let refused = VirtqMemory::new(size, areas(), areas(), areas()).unwrap_err();
            assert_eq!(refused, VirtqMemoryError::Size { size });
        }
        let at = |offset, len| memory.sub(offset, len).unwrap();
        let odd = VirtqMemory::new(4, at(8, 64), at(4096, 14), at(4128, 38)).unwrap_err();
        assert_eq!(
            odd,
            VirtqMemoryError::Alignment {
                area: "descriptor table",
                align: 16
            }
        );
        let short = VirtqMemory::new(4, at(0, 64), at(4096, 13), at(4128, 38)).unwrap_err();
        assert_eq!(
            short,
            VirtqMemoryError::Short {
                area: "available ring",
                need: 14,
                have: 13
            }
        );
    }

    #[test]
    fn an_indirect_table_is_read_at_any_alignment_and_never_past_its_end() {
        let memory = memory(4096);
        let bytes: Vec<u8> = (0..32).collect();
        memory.slice(3, 32).unwrap().copy_from(&bytes);
        let table = memory.slice(3, 32).unwrap();
        let second = read_indirect(table, 1).unwrap();
        assert_eq!(
            (second.addr, second.next),
            (u64::from_le_bytes([16, 17, 18, 19, 20, 21, 22, 23]), 0x1f1e)
        );
        assert_eq!(read_indirect(table, 2), None);
    }
}
