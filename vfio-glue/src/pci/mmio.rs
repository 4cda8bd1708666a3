//! A BAR mapped into this process: register reads and writes that go straight to the device.
//!
//! Read with: mmap(2); Linux `drivers/vfio/pci/vfio_pci_core.c` (`vfio_pci_core_mmap`).

#![expect(unsafe_code, reason = "maps a BAR and reads and writes registers in it")]

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{Ordering, fence};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::Registers;

/// A mapped BAR. Keeps the device's file in use until it drops: VFIO counts mappings as users.
pub(super) struct MappedBar {
    base: NonNull<u8>,
    len: u32,
}

// SAFETY: device registers, which change on their own. Each access is one volatile load or store of 32 bits,
// which the bus does not split, and no reference into the mapping ever exists.
unsafe impl Send for MappedBar {}
// SAFETY: as above.
unsafe impl Sync for MappedBar {}

impl MappedBar {
    /// Maps `len` bytes of the device's file from `offset` on.
    pub(super) fn map(device: &File, offset: u64, len: u32) -> io::Result<Self> {
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks the place (no address is given), so no memory of ours is replaced.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                device,
                offset,
            )
        }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let bar = Self { base, len };
        // SAFETY: the advice keeps children from having the registers too; the range is exactly our mapping.
        unsafe { madvise(bar.base.as_ptr().cast(), bytes, Advice::LinuxDontFork) }?;
        Ok(bar)
    }

    /// The register at `offset`, or `None` if it does not lie in the BAR.
    fn register(&self, offset: u32) -> Option<*mut u32> {
        let inside = offset.is_multiple_of(4) && offset.checked_add(4).is_some_and(|end| end <= self.len);
        // SAFETY: all 4 bytes lie inside the mapping by the line above.
        inside.then(|| unsafe { self.base.as_ptr().byte_add(offset as usize) }.cast())
    }
}

impl Registers for MappedBar {
    fn read32(&self, offset: u32) -> u32 {
        let Some(register) = self.register(offset) else {
            return u32::MAX;
        };
        // SAFETY: `register` is aligned and inside the mapping, which lives until `self` drops. Memory decoding
        // is on, without which the kernel would answer with SIGBUS: `VfioFunction` refuses to switch it off
        // while a BAR is mapped. The device changes the value on its own, hence volatile.
        u32::from_le(unsafe { register.read_volatile() })
    }

    fn write32(&self, offset: u32, value: u32) {
        let Some(register) = self.register(offset) else {
            return;
        };
        // The device reads descriptors as soon as it sees the doorbell, so they are stored first. On x86 stores
        // to memory are never overtaken by one to a register; the compiler has to keep the order too.
        fence(Ordering::Release);
        // SAFETY: as for `read32`. What the device does then is bounded by what the IOMMU maps.
        unsafe { register.write_volatile(value.to_le()) };
    }

    fn len(&self) -> u32 {
        self.len
    }
}

impl Drop for MappedBar {
    fn drop(&mut self) {
        // SAFETY: the range is exactly what `mmap` gave, and no access outlives `self`.
        let result = unsafe { munmap(self.base.as_ptr().cast(), self.len as usize) };
        if let Err(error) = result {
            tracing::error!(len = self.len, %error, "munmap of a BAR failed, the device stays in use");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar_over_a_file() -> (File, MappedBar) {
        let file = File::from(rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(8192).unwrap();
        let bar = MappedBar::map(&file, 4096, 4096).unwrap();
        (file, bar)
    }

    #[test]
    fn registers_are_little_endian_words_from_the_regions_offset_on() {
        use std::os::unix::fs::FileExt;

        let (file, bar) = bar_over_a_file();
        bar.write32(8, 0x1234_5678);
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 4096 + 8).unwrap();
        assert_eq!(bytes, [0x78, 0x56, 0x34, 0x12]);
        assert_eq!(bar.read32(8), 0x1234_5678);
    }

    #[test]
    fn outside_the_window_reads_give_ones_and_writes_vanish() {
        let (_file, bar) = bar_over_a_file();
        for offset in [4096, 4094, u32::MAX - 3, 2] {
            bar.write32(offset, 0);
            assert_eq!(bar.read32(offset), u32::MAX);
        }
    }
}
