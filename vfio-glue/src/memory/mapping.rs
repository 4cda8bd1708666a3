//! A range of a file mapped into this process, and copies in and out of it.
//!
//! The guest, the VMM and the card write these bytes whenever they like, so no Rust reference to them ever
//! exists: everything goes through raw pointers, and what was read must be checked from the copy.
//!
//! Read with: mmap(2); vhost-user, "Memory region description".

#![expect(
    unsafe_code,
    reason = "maps files and copies bytes that others write at the same time"
)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::guard::{Guarded, SLOTS, guard};
use rustix::fs::{FileType, fstat, fstatfs};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
const TMPFS_MAGIC: u32 = 0x0102_1994;
const SMALL_PAGE: u64 = 4096;

/// Why a file cannot serve as memory.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The descriptor is no file: a socket, a pipe, an eventfd.
    #[error("the descriptor is not a file that can be shared memory; give the VMM's memory share=on")]
    NotAFile,
    /// The file is no memory: a page fault on it waits for a disk, a network or a process of the VMM's.
    #[error(
        "the memory is on a file system (magic {magic:#x}) where a page can keep us waiting; \
         a memfd, a file on tmpfs (/dev/shm) or one on hugetlbfs is accepted"
    )]
    FileSystem {
        /// What statfs(2) calls it.
        magic: u64,
    },
    /// The file ends before the range does.
    #[error("the memory announced ends at {end:#x} of its file, which is only {size:#x} bytes long")]
    TooShort {
        /// Where the range would end, as a file offset.
        end: u64,
        /// How long the file is, in bytes.
        size: u64,
    },
    /// The range is empty, wraps, or does not lie on the file's pages.
    #[error("{len:#x} bytes at file offset {offset:#x} are not whole pages of {page:#x} bytes")]
    Bounds {
        /// Start of the range.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The file's page size in bytes.
        page: u64,
    },
    /// More mappings would be needed than one process can keep an eye on.
    #[error("{need} more mappings of up to 1 GiB are needed, and a process has room for {limit} in all")]
    TooManyMappings {
        /// Mappings needed.
        need: u64,
        /// How many there can be.
        limit: usize,
    },
    /// A system call on the file failed.
    #[error("{call} of {len:#x} bytes at file offset {offset:#x} failed")]
    Call {
        /// Which call.
        call: &'static str,
        /// Start of the range.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What is known of a file before it serves as memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryFile {
    /// The size in bytes of the pages it is made of: 4096, or the huge page size on hugetlbfs.
    page: u64,
    size: u64,
}

impl MemoryFile {
    /// Asks the kernel.
    ///
    /// # Errors
    ///
    /// [`FileError::NotAFile`] for anything but a regular file, [`FileError::FileSystem`] for one that is not in
    /// memory, [`FileError::Call`] if the kernel does not tell.
    pub(crate) fn of(file: &File) -> Result<Self, FileError> {
        let failed = |call| {
            move |source: rustix::io::Errno| FileError::Call {
                call,
                offset: 0,
                len: 0,
                source: source.into(),
            }
        };
        let stat = fstat(file).map_err(failed("fstat"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(FileError::NotAFile);
        }
        let fs = fstatfs(file).map_err(failed("fstatfs"))?;
        let page = match u32::try_from(fs.f_type) {
            Ok(HUGETLBFS_MAGIC) => u64::try_from(fs.f_bsize).unwrap_or(SMALL_PAGE),
            Ok(TMPFS_MAGIC) => SMALL_PAGE,
            _ => {
                let magic = fs.f_type.cast_unsigned();
                return Err(FileError::FileSystem { magic });
            }
        };
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Self { page, size })
    }

    /// The whole pages around `len` bytes at `offset`, all of which the file has.
    ///
    /// # Errors
    ///
    /// [`FileError::TooShort`], or [`FileError::Bounds`] if the range is empty or wraps.
    pub(crate) fn pages_around(&self, offset: u64, len: u64) -> Result<Range<u64>, FileError> {
        let Self { page, size } = *self;
        let out_of_bounds = || self.out_of_bounds(offset, len);
        let end = offset.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or_else(out_of_bounds)?;
        if end > size {
            return Err(FileError::TooShort { end, size });
        }
        let last = end.checked_next_multiple_of(page).ok_or_else(out_of_bounds)?;
        Ok(offset - offset % page..last)
    }

    /// Whether the kernel tells where the file has holes; on hugetlbfs it does not.
    pub(super) fn tells_holes(&self) -> bool {
        self.page == SMALL_PAGE
    }

    /// A range without what lies behind the end of the file in its last page: no byte of it is the file's.
    pub(super) fn without_tail(&self, range: &Range<u64>) -> Range<u64> {
        let last_page = self.size.next_multiple_of(self.page);
        let end = if range.end <= last_page {
            range.end.min(self.size)
        } else {
            range.end
        };
        range.start..end.max(range.start)
    }

    /// The error for a range that cannot be had of this file.
    pub(crate) fn out_of_bounds(&self, offset: u64, len: u64) -> FileError {
        let page = self.page;
        FileError::Bounds { offset, len, page }
    }
}

/// One mmap of a file. Unmapped when the last range of it goes.
struct HostMapping {
    base: NonNull<u8>,
    len: usize,
    /// Size in bytes of the file's pages.
    page: u64,
    /// Always there until the mapping is dropped.
    guarded: Option<Guarded>,
}

// SAFETY: the mapping is plain shared memory. Other processes and devices write it at any time anyway, and
// this type hands out no reference, so one more thread of ours changes nothing.
unsafe impl Send for HostMapping {}
// SAFETY: as above.
unsafe impl Sync for HostMapping {}

impl HostMapping {
    fn of_file(
        file: &File,
        offset: u64,
        len: u64,
        page: u64,
        lost: &Arc<AtomicBool>,
    ) -> Result<Arc<Self>, FileError> {
        let failed = |call| {
            move |source: rustix::io::Errno| FileError::Call {
                call,
                offset,
                len,
                source: source.into(),
            }
        };
        let (Ok(len_usize), Ok(page_usize)) = (usize::try_from(len), usize::try_from(page)) else {
            return Err(FileError::Bounds { offset, len, page });
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks the place (no address is given), so no memory of ours is replaced.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len_usize,
                protection,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                offset,
            )
        }
        .map_err(failed("mmap"))?;
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(failed("mmap")(rustix::io::Errno::NOMEM));
        };
        let mut mapping = Self {
            base,
            len: len_usize,
            page,
            guarded: None,
        };
        mapping.guarded = guard(base.as_ptr().addr(), len_usize, page_usize, lost);
        if mapping.guarded.is_none() {
            return Err(FileError::TooManyMappings {
                need: 1,
                limit: SLOTS,
            });
        }
        // Guest memory belongs in no core dump and in no child: a fork would make pinned pages copy on write
        // (TRAPS 51).
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: neither advice changes what the bytes are, and the range is exactly our mapping.
            unsafe { madvise(base.as_ptr().cast(), len_usize, advice) }.map_err(failed("madvise"))?;
        }
        Ok(Arc::new(mapping))
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        // Before the place can be given to a mapping of somebody else.
        self.guarded.take();
        // SAFETY: the range is exactly what `mmap` gave, and every range and slice of it has gone, since each
        // keeps this value alive (by `Arc` or by borrow).
        let result = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        if let Err(error) = result {
            tracing::error!(len = self.len, %error, "munmap failed, address space is lost");
        }
    }
}

/// Some bytes of a file, mapped and kept mapped for as long as this lives. Cheap to clone and to cut.
#[derive(Clone)]
pub struct HostRange {
    mapping: Arc<HostMapping>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a pointer into `mapping`, which may be shared (see above) and is kept alive here.
unsafe impl Send for HostRange {}
// SAFETY: as above.
unsafe impl Sync for HostRange {}

impl std::fmt::Debug for HostRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostRange({:p}, {:#x} bytes)", self.start, self.len)
    }
}

impl HostRange {
    /// Maps `len` bytes of `file` from byte `offset` on, shared, readable and writable.
    ///
    /// The range may start and end anywhere; whole pages around it are mapped, but only it is exposed.
    ///
    /// # Errors
    ///
    /// [`FileError`] if the descriptor is no file in memory, is shorter than the range, cannot be mapped writable, or there
    /// are too many mappings to guard one more.
    pub fn of_file(file: &File, offset: u64, len: u64) -> Result<Self, FileError> {
        Self::marking(file, offset, len, &Arc::default())
    }

    /// As [`of_file`](Self::of_file); if the new mapping loses bytes, [`lost_memory`](Self::lost_memory) is true for
    /// this range too.
    pub(super) fn and_of_file(&self, file: &File, offset: u64, len: u64) -> Result<Self, FileError> {
        let mark = self.mapping.guarded.as_ref().map(Guarded::mark);
        Self::marking(file, offset, len, mark.unwrap_or(&Arc::default()))
    }

    /// Has every page of the range made, as a first write to it would, and writes nothing. Blocks while the kernel
    /// clears them.
    ///
    /// # Errors
    ///
    /// [`FileError::Call`]: there is no memory left, or the file was cut short.
    pub(crate) fn populate(&self) -> Result<(), FileError> {
        let HostMapping { base, len, .. } = *self.mapping;
        // SAFETY: the range is exactly our mapping; no byte changes, and a page that cannot be had is an error here
        // and no signal.
        let result = unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxPopulateWrite) };
        match result {
            // Kernels before 5.14 do not know it. They pin by address, which does the same.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(error) => Err(FileError::Call {
                call: "madvise",
                offset: 0,
                len: len as u64,
                source: error.into(),
            }),
        }
    }

    fn marking(file: &File, offset: u64, len: u64, lost: &Arc<AtomicBool>) -> Result<Self, FileError> {
        let shape = MemoryFile::of(file)?;
        let pages = shape.pages_around(offset, len)?;
        let page = shape.page;
        let mapping = HostMapping::of_file(file, pages.start, pages.end - pages.start, page, lost)?;
        let (Ok(skip), Ok(len)) = (usize::try_from(offset - pages.start), usize::try_from(len)) else {
            return Err(shape.out_of_bounds(offset, len));
        };
        // SAFETY: `skip + len` bytes lie inside the mapping, whose pages hold the range.
        let start = unsafe { mapping.base.add(skip) };
        Ok(Self { mapping, start, len })
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes: never so, a range is made with at least one.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the file was cut short so that bytes of the mapping had to be replaced by zeroes.
    ///
    /// It stays so: what is mapped here is not the guest's memory any more, whatever the file is like later.
    pub fn lost_memory(&self) -> bool {
        self.mapping.guarded.as_ref().is_some_and(Guarded::has_lost)
    }

    /// The size in bytes of the pages the file is made of.
    pub fn page_bytes(&self) -> u64 {
        self.mapping.page
    }

    /// The first byte's address in this process, as a number, for the kernel.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// The first byte, for the other modules here that hold raw views.
    pub(super) fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// `len` bytes from `offset` on as a range of its own, or `None` if they are not all in this one.
    pub fn sub(&self, offset: usize, len: usize) -> Option<Self> {
        let slice = self.slice(offset, len)?;
        Some(Self {
            mapping: Arc::clone(&self.mapping),
            start: slice.start,
            len,
        })
    }

    /// `len` bytes from `offset` on, borrowed, or `None` if they are not all in this range.
    #[inline]
    pub fn slice(&self, offset: usize, len: usize) -> Option<HostSlice<'_>> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: `offset` is at most `self.len` by the line above, so the sum stays inside the mapping or one
        // past its end.
        let start = unsafe { self.start.add(offset) };
        Some(HostSlice {
            start,
            len,
            lives: PhantomData,
        })
    }

    /// All of it, borrowed.
    #[inline]
    pub fn whole(&self) -> HostSlice<'_> {
        HostSlice {
            start: self.start,
            len: self.len,
            lives: PhantomData,
        }
    }
}

/// Borrowed bytes that the guest or the card may change while we look: copy first, then believe the copy.
#[derive(Clone, Copy)]
pub struct HostSlice<'a> {
    start: NonNull<u8>,
    len: usize,
    lives: PhantomData<&'a HostRange>,
}

impl std::fmt::Debug for HostSlice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostSlice({:p}, {:#x} bytes)", self.start, self.len)
    }
}

impl<'a> HostSlice<'a> {
    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `offset` on, or `None` if they are not all here.
    #[inline(always)]
    pub fn sub(&self, offset: usize, len: usize) -> Option<HostSlice<'a>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset` is at most `self.len` by the line above, so the sum stays inside the mapping or one past its
        // end.
        let start = unsafe { self.start.add(offset) };
        Some(HostSlice {
            start,
            len,
            lives: PhantomData,
        })
    }

    /// Copies the first bytes into `into`, as many as both hold, and returns how many.
    #[inline]
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let count = self.len.min(into.len());
        // SAFETY: both sides hold `count` bytes. `into` is ours alone, so they do not overlap. The guest or the
        // card may write the source meanwhile: then the copy holds some mix of bytes, and the copy is what
        // callers check.
        unsafe { ptr::copy_nonoverlapping(self.start.as_ptr(), into.as_mut_ptr(), count) };
        count
    }

    /// Copies the first bytes of `from` here, as many as both hold, and returns how many.
    #[inline]
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let count = self.len.min(from.len());
        // SAFETY: both sides hold `count` bytes, and `from` is a Rust slice, which is never part of a mapping.
        // The guest may read or write the target meanwhile and then harms itself alone.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.start.as_ptr(), count) };
        count
    }

    /// Writes `bytes` at the start, in as few stores as they take, and says whether there was room.
    #[inline(always)]
    pub fn put<const N: usize>(&self, bytes: [u8; N]) -> bool {
        if N > self.len {
            return false;
        }
        // SAFETY: `N` bytes lie in the slice by the line above, and nothing is asked of their alignment. The guest may
        // read or write them meanwhile and then harms itself alone.
        unsafe { self.start.cast::<[u8; N]>().write_unaligned(bytes) };
        true
    }

    /// Copies the first bytes of another slice here, as many as both hold, and returns how many.
    #[inline]
    pub fn copy_from_slice(&self, from: HostSlice<'_>) -> usize {
        let count = self.len.min(from.len);
        // SAFETY: both sides hold `count` bytes of live mappings. A guest can make them overlap, so this is the
        // overlapping copy.
        unsafe { ptr::copy(from.start.as_ptr(), self.start.as_ptr(), count) };
        count
    }

    /// The first byte, for the other modules here that hold raw views.
    #[inline]
    pub(super) fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(len: u64) -> File {
        let file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn two_ranges_of_one_file_show_the_same_bytes() {
        let file = memfd(3 * 4096);
        let odd = HostRange::of_file(&file, 4096 + 10, 100).unwrap();
        let whole = HostRange::of_file(&file, 0, 3 * 4096).unwrap();
        odd.whole().copy_from(b"seen through the other");
        let mut seen = [0; 4];
        whole.slice(4096 + 10, 4).unwrap().copy_to(&mut seen);
        assert_eq!(&seen, b"seen");
    }

    #[test]
    fn a_file_shorter_than_announced_is_refused_with_both_numbers() {
        let error = HostRange::of_file(&memfd(4096), 0, 8192).unwrap_err();
        assert!(matches!(
            error,
            FileError::TooShort {
                end: 8192,
                size: 4096
            }
        ));
    }

    #[test]
    fn a_pipe_is_no_memory() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let error = HostRange::of_file(&File::from(reader), 0, 4096).unwrap_err();
        assert!(matches!(error, FileError::NotAFile));
    }

    #[test]
    fn a_file_that_is_not_in_memory_is_refused_and_the_error_says_what_is_accepted() {
        // On every Linux, and never in memory the VMM could give us: proc.
        let file = File::open("/proc/self/maps").unwrap();
        let error = HostRange::of_file(&file, 0, 4096).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the memory is on a file system (magic 0x9fa0) where a page can keep us waiting; \
             a memfd, a file on tmpfs (/dev/shm) or one on hugetlbfs is accepted"
        );
    }

    #[test]
    fn bytes_are_put_only_where_there_is_room_for_all() {
        let range = HostRange::of_file(&memfd(4096), 0, 4096).unwrap();
        assert!(range.slice(4093, 3).unwrap().put([1, 2, 3]));
        assert!(!range.slice(4094, 2).unwrap().put([4, 5, 6]));
        let mut seen = [0; 3];
        range.slice(4093, 3).unwrap().copy_to(&mut seen);
        assert_eq!(seen, [1, 2, 3]);
    }

    #[test]
    fn a_slice_never_leaves_its_range() {
        let range = HostRange::of_file(&memfd(4096), 0, 4096).unwrap();
        assert!(range.slice(4000, 96).is_some());
        assert!(range.slice(4000, 97).is_none());
        assert!(range.slice(usize::MAX, 2).is_none());
        assert!(range.whole().sub(10, usize::MAX).is_none());
    }
}
