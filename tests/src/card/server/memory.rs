//! Memory by DMA_MAP: each range is a file, mapped here, and known to the card by IOVA alone.
//!
//! The file's name tells whose memory it is. A driver names its own memfds `vuv-rings`, `vuv-bounce` or
//! `vuv-` and something else; what it maps under other names is the guest's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::card::bus::{Bus, BusFault, DriverUse, RangeKind};

/// The ranges a vfio-user client mapped.
#[derive(Default)]
pub struct MappedMemory {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

struct Range {
    region: MmapRegion,
    len: u64,
    kind: RangeKind,
    writable: bool,
    /// Device, inode and offset: the bytes, whatever fd they came by.
    identity: (u64, u64, u64),
}

impl MappedMemory {
    /// Maps `len` bytes of `file` from `offset` on at `iova`. Mapping the very same bytes at the same place
    /// again changes nothing.
    ///
    /// # Errors
    ///
    /// If the range overlaps another or wraps, or the file is too short or cannot be mapped.
    pub fn map(&self, iova: u64, len: u64, file: File, offset: u64, writable: bool) -> io::Result<()> {
        let metadata = file.metadata()?;
        let identity = (metadata.dev(), metadata.ino(), offset);
        let end = iova
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or_else(|| invalid("the range wraps or is empty"))?;
        if offset
            .checked_add(len)
            .is_none_or(|file_end| file_end > metadata.len())
        {
            return Err(invalid("the file is shorter than the range"));
        }
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if ranges
            .get(&iova)
            .is_some_and(|range| range.len == len && range.identity == identity)
        {
            return Ok(());
        }
        if ranges
            .iter()
            .any(|(start, range)| *start < end && iova < start + range.len)
        {
            return Err(invalid("the range overlaps another"));
        }
        let kind = kind_of(&file);
        let size = usize::try_from(len).map_err(|_| invalid("the range is too long"))?;
        let region = MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(io::Error::other)?;
        ranges.insert(
            iova,
            Range {
                region,
                len,
                kind,
                writable,
                identity,
            },
        );
        Ok(())
    }

    /// Unmaps what was mapped as exactly this range: like iommufd, it splits nothing.
    ///
    /// # Errors
    ///
    /// If no range begins at `iova`, or it has another length.
    pub fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        match ranges.get(&iova) {
            Some(range) if range.len == len => {
                ranges.remove(&iova);
                Ok(())
            }
            Some(_) => Err(invalid("the range was mapped with another length")),
            None => Err(invalid("no range begins there")),
        }
    }

    /// Lists all ranges as address and length.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.read_ranges()
            .iter()
            .map(|(iova, range)| (*iova, range.len))
            .collect()
    }

    /// Unmaps everything.
    pub fn clear(&self) {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn read_ranges(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Range>> {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on each piece of a stretch that may cross from range to range: the mapping, the offset in
    /// it, and which of the stretch's bytes lie there.
    fn for_each_piece(
        &self,
        iova: u64,
        len: usize,
        to_write: bool,
        mut work: impl FnMut(&MmapRegion, usize, std::ops::Range<usize>),
    ) -> Result<(), BusFault> {
        let fault = || BusFault {
            iova,
            len: len as u64,
        };
        let ranges = self.read_ranges();
        let mut pieces = Vec::with_capacity(1);
        let mut done = 0;
        while done < len {
            let at = iova.checked_add(done as u64).ok_or_else(fault)?;
            let (start, range) = ranges.range(..=at).next_back().ok_or_else(fault)?;
            let from = at - start;
            if from >= range.len || to_write && !range.writable {
                return Err(fault());
            }
            let count = usize::try_from(range.len - from).map_or(len - done, |left| left.min(len - done));
            pieces.push((
                &range.region,
                usize::try_from(from).map_err(|_| fault())?,
                done..done + count,
            ));
            done += count;
        }
        for (region, from, bytes) in pieces {
            work(region, from, bytes);
        }
        Ok(())
    }
}

// Every access below lies inside its mapping, as `for_each_piece` found, so the volatile copies cannot fail;
// a file truncated under us would be a SIGBUS, not an error.
impl Bus for MappedMemory {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), BusFault> {
        let len = buf.len();
        self.for_each_piece(iova, len, false, |region, from, bytes| {
            let _ = region.as_volatile_slice().read_slice(&mut buf[bytes], from);
        })
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), BusFault> {
        self.for_each_piece(iova, data.len(), true, |region, from, bytes| {
            let slice = region.as_volatile_slice();
            match data[bytes.clone()] {
                // A descriptor's done bit: pairs with the driver's acquire load of the same dword.
                [a, b, c, d] if iova.is_multiple_of(4) => {
                    let _ = slice.store(u32::from_ne_bytes([a, b, c, d]), from, Ordering::Release);
                }
                _ => {
                    let _ = slice.write_slice(&data[bytes], from);
                }
            }
        })
    }

    fn kind(&self, iova: u64, len: u64) -> RangeKind {
        let ranges = self.read_ranges();
        match ranges.range(..=iova).next_back() {
            Some((start, range)) if iova - start < range.len && run_from(&ranges, iova) >= len => range.kind,
            _ => RangeKind::Unmapped,
        }
    }

    fn room(&self, iova: u64) -> u64 {
        run_from(&self.read_ranges(), iova)
    }
}

/// How many bytes from `iova` on are mapped and of one kind, over as many ranges as it takes.
fn run_from(ranges: &BTreeMap<u64, Range>, iova: u64) -> u64 {
    let Some((start, first)) = ranges.range(..=iova).next_back() else {
        return 0;
    };
    let mut end = start + first.len;
    if iova >= end {
        return 0;
    }
    for (next, range) in ranges.range(end..) {
        if *next != end || range.kind != first.kind {
            break;
        }
        end = next + range.len;
    }
    end - iova
}

/// Tells by its name whose memory a file is.
fn kind_of(file: &File) -> RangeKind {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
    let name = link.to_string_lossy();
    match name
        .strip_prefix("/memfd:vuv-")
        .map(|rest| rest.trim_end_matches(" (deleted)"))
    {
        Some("rings") => RangeKind::DriverMemory(DriverUse::Rings),
        Some("bounce") => RangeKind::DriverMemory(DriverUse::Bounce),
        Some(_) => RangeKind::DriverMemory(DriverUse::Other),
        None => RangeKind::GuestMemory,
    }
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    fn memfd(name: &str, len: u64) -> File {
        let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(len).expect("a length");
        file
    }

    #[test]
    fn names_tell_whose_memory_it_is() {
        assert_eq!(
            kind_of(&memfd("vuv-rings", 1)),
            RangeKind::DriverMemory(DriverUse::Rings)
        );
        assert_eq!(
            kind_of(&memfd("vuv-bounce", 1)),
            RangeKind::DriverMemory(DriverUse::Bounce)
        );
        assert_eq!(
            kind_of(&memfd("vuv-headers", 1)),
            RangeKind::DriverMemory(DriverUse::Other)
        );
        assert_eq!(kind_of(&memfd("guest-ram", 1)), RangeKind::GuestMemory);
    }

    #[test]
    fn neighbours_of_one_kind_make_one_stretch() {
        let memory = MappedMemory::default();
        memory
            .map(0x10000, 0x1000, memfd("ram", 0x1000), 0, true)
            .expect("mapped");
        memory
            .map(0x11000, 0x1000, memfd("ram", 0x1000), 0, true)
            .expect("mapped");
        memory
            .map(0x12000, 0x1000, memfd("vuv-bounce", 0x1000), 0, true)
            .expect("mapped");
        assert_eq!(memory.room(0x10FF0), 0x1010);
        memory.write(0x10FFE, &[1, 2, 3, 4]).expect("across the border");
        let mut read = [0; 4];
        memory.read(0x10FFE, &mut read).expect("across the border");
        assert_eq!(read, [1, 2, 3, 4]);
        assert_eq!(memory.kind(0x11FF0, 0x20), RangeKind::Unmapped, "two kinds");
    }

    #[test]
    fn a_map_is_refused_where_the_kernel_would_refuse_it() {
        let memory = MappedMemory::default();
        memory
            .map(0x10000, 0x2000, memfd("ram", 0x2000), 0, false)
            .expect("mapped");
        assert!(
            memory
                .map(0x11000, 0x1000, memfd("ram", 0x1000), 0, true)
                .is_err(),
            "overlap"
        );
        assert!(
            memory
                .map(0x20000, 0x2000, memfd("ram", 0x1000), 0, true)
                .is_err(),
            "too short"
        );
        assert!(memory.unmap(0x10000, 0x1000).is_err(), "no splitting");
        assert!(memory.write(0x10000, &[0]).is_err(), "mapped read-only");
        memory.unmap(0x10000, 0x2000).expect("as mapped");
        assert_eq!(memory.ranges(), []);
    }
}
