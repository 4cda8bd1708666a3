//! Memory that was taken away behind our back: pages that are pinned and yet no longer the file's (TRAPS 21, 22).
//!
//! ```text
//! balloon, free page reporting, virtio-mem ──▶ hole punched in the file ──▶ the card keeps the old page,
//!                                                                           the guest is given a new one
//! ```
//!
//! Pinning fills every hole (TRAPS 23), so a hole in what is pinned was made afterwards. The one thing that is called a
//! hole and is filled by no pin is a page that fallocate(2) reserved and nobody wrote: by file it is pinned as it is,
//! and the kernel clears it at the guest's first touch, with whatever a card has put there. Such pages are
//! made before they are mapped: [`has_reserved`]. A hole is seen only for as long as nobody touches
//! those bytes again: a new page there looks like any other. On tmpfs and in a memfd the kernel
//! tells where holes are; on hugetlbfs it only counts pages, all of the file's. A discard of less than a page, or of
//! part of a transparent huge page that is pinned, zeroes bytes in place and is none: the card and the guest still
//! see the same page.
//!
//! Read with: lseek(2), `SEEK_HOLE`; fallocate(2), `FALLOC_FL_PUNCH_HOLE`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use rustix::fs::{Mode, OFlags, SeekFrom, fstat, open, seek};
use rustix::io::Errno;

use super::mapping::{FileError, MemoryFile};

/// How many runs of data one look goes through: whoever punches a hole into every other page does not hold us up for
/// longer. What was found up to there is enough to act on.
const MOST_RUNS: usize = 1 << 16;

/// What of some pinned bytes is not in their file any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    /// How many bytes: exact where `first` is known, otherwise at least so many.
    pub bytes: u64,
    /// The file offset of the first of them, where the kernel tells.
    pub first: Option<u64>,
}

impl Discarded {
    fn add(&mut self, hole: Range<u64>) {
        if hole.start < hole.end {
            self.bytes += hole.end - hole.start;
            self.first.get_or_insert(hole.start);
        }
    }
}

/// Looks which of `pinned` are holes in `file` now: byte ranges of it that do not overlap, in order, all of which
/// were pinned after the file got its length. Bytes past its end are holes too.
///
/// Costs two system calls for each run of data, whatever its size, and does not touch the memory.
///
/// # Errors
///
/// [`FileError`] if the file is no memory or the kernel does not tell.
pub fn discarded(file: &File, pinned: &[Range<u64>]) -> Result<Discarded, FileError> {
    let memory = MemoryFile::of(file)?;
    let seekable = if memory.tells_holes() {
        open_again(file).ok()
    } else {
        None
    };
    let Some(seekable) = seekable else {
        return by_count(file, pinned);
    };
    let mut found = Discarded::default();
    let mut left = MOST_RUNS;
    for range in pinned {
        let range = memory.without_tail(range);
        find_holes(&seekable, &range, &mut found, &mut left)
            .map_err(|error| failed("lseek", &range, error))?;
    }
    Ok(found)
}

/// Whether pages of `file` may be reserved without ever having been written, as fallocate(2) leaves them on tmpfs: it
/// has more pages than data. False where the kernel does not tell.
///
/// # Errors
///
/// As [`discarded`].
pub(crate) fn has_reserved(file: &File) -> Result<bool, FileError> {
    let memory = MemoryFile::of(file)?;
    let Some(seekable) = memory.tells_holes().then(|| open_again(file).ok()).flatten() else {
        return Ok(false);
    };
    let mut holes = Discarded::default();
    let stat = fstat(file).map_err(|error| failed("fstat", &(0..0), error))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    find_holes(&seekable, &(0..size), &mut holes, &mut { MOST_RUNS })
        .map_err(|error| failed("lseek", &(0..size), error))?;
    let data = size.next_multiple_of(4096) - holes.bytes;
    Ok(bytes_there(stat.st_blocks) > data)
}

/// A descriptor with a position of its own.
///
/// That of the descriptor we were sent is the front-end's too: moving it here would move it there, under a front-end
/// that reads or writes its memory as a file. Not every file can be opened again: its mode may forbid it, or `/proc`
/// be missing.
///
/// Without waiting: whoever sent it may have taken a lease on it, which holds up an open for 45 seconds.
fn open_again(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?.into())
}

fn find_holes(file: &File, range: &Range<u64>, found: &mut Discarded, left: &mut usize) -> Result<(), Errno> {
    let mut at = range.start;
    while at < range.end && *left > 0 {
        *left -= 1;
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(range.end),
            // No data up to the end of the file, or past that already.
            Err(Errno::NXIO) => range.end,
            Err(error) => return Err(error),
        };
        found.add(at..data);
        if data == range.end {
            break;
        }
        at = match seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => hole,
            // Cut short since the last line.
            Err(Errno::NXIO) => data,
            Err(error) => return Err(error),
        };
    }
    Ok(())
}

/// With the pages that are pinned all in the file, it has at least so many.
///
/// Pages of it that are not pinned hide as many that were discarded, hence "at least".
fn by_count(file: &File, pinned: &[Range<u64>]) -> Result<Discarded, FileError> {
    let whole = pinned.first().map_or(0, |range| range.start)..pinned.last().map_or(0, |range| range.end);
    let stat = fstat(file).map_err(|error| failed("fstat", &whole, error))?;
    let there = bytes_there(stat.st_blocks);
    let expected: u64 = pinned.iter().map(|range| range.end - range.start).sum();
    Ok(Discarded {
        bytes: expected.saturating_sub(there),
        first: None,
    })
}

/// What `st_blocks` counts in is the same on every file system (stat(2)).
fn bytes_there(st_blocks: i64) -> u64 {
    u64::try_from(st_blocks).unwrap_or(0).saturating_mul(512)
}

fn failed(call: &'static str, range: &Range<u64>, error: Errno) -> FileError {
    FileError::Call {
        call,
        offset: range.start,
        len: range.end - range.start,
        source: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

    use super::*;
    use crate::memory::HostRange;

    const PAGE: u64 = 4096;

    /// Sixteen pages, all of them there, as after a pin.
    fn filled(file: File) -> File {
        file.set_len(16 * PAGE).unwrap();
        file.write_all_at(&[0xa5; 16 * 4096], 0).unwrap();
        file
    }

    fn memfd(flags: MemfdFlags) -> File {
        File::from(memfd_create("guest", MemfdFlags::CLOEXEC | flags).unwrap())
    }

    fn punch(file: &File, pages: Range<u64>) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, pages.start * PAGE, (pages.end - pages.start) * PAGE).unwrap();
    }

    fn found(bytes: u64, first: u64) -> Discarded {
        Discarded {
            bytes,
            first: Some(first),
        }
    }

    #[test]
    fn a_file_that_ends_inside_a_page_has_lost_nothing() {
        let file = memfd(MemfdFlags::empty());
        file.set_len(6000).unwrap();
        file.write_all_at(&[1; 6000], 0).unwrap();
        let pinned = std::slice::from_ref(&(0..8192));
        assert_eq!(discarded(&file, pinned).unwrap(), Discarded::default());
        punch(&file, 0..1);
        assert_eq!(discarded(&file, pinned).unwrap().bytes, PAGE);
    }

    #[test]
    fn trap_23_pages_reserved_and_never_written_are_known_and_can_be_made() {
        let file = memfd(MemfdFlags::empty());
        file.set_len(16 * PAGE).unwrap();
        file.write_all_at(&[7; 4096], 5 * PAGE).unwrap();
        assert!(!has_reserved(&file).unwrap(), "sparse is not reserved");
        fallocate(&file, FallocateFlags::empty(), 2 * PAGE, 4 * PAGE).unwrap();
        assert!(has_reserved(&file).unwrap());
        let pinned = std::slice::from_ref(&(2 * PAGE..6 * PAGE));
        assert_eq!(discarded(&file, pinned).unwrap(), found(3 * PAGE, 2 * PAGE));

        HostRange::of_file(&file, 2 * PAGE, 4 * PAGE)
            .unwrap()
            .populate()
            .unwrap();
        assert!(!has_reserved(&file).unwrap());
        assert_eq!(discarded(&file, pinned).unwrap(), Discarded::default());
        let mut kept = [0; 4096];
        file.read_exact_at(&mut kept, 5 * PAGE).unwrap();
        assert_eq!(kept, [7; 4096]);
    }

    #[test]
    fn holes_are_found_in_what_is_pinned_and_nowhere_else() {
        let on_tmpfs = tempfile::tempfile_in("/dev/shm").unwrap();
        for file in [memfd(MemfdFlags::empty()), on_tmpfs] {
            let file = filled(file);
            let (low, high) = (2 * PAGE..6 * PAGE, 8 * PAGE..16 * PAGE);
            let pinned = [low, high];
            let look = || discarded(&file, &pinned).unwrap();
            assert_eq!(look(), Discarded::default());
            punch(&file, 0..2);
            punch(&file, 6..8);
            assert_eq!(look(), Discarded::default(), "beside what is pinned");
            punch(&file, 9..10);
            assert_eq!(look(), found(PAGE, 9 * PAGE));
            punch(&file, 5..9);
            assert_eq!(look(), found(3 * PAGE, 5 * PAGE));
            punch(&file, 14..16);
            assert_eq!(look(), found(5 * PAGE, 5 * PAGE));
            punch(&file, 0..16);
            assert_eq!(look(), found(12 * PAGE, 2 * PAGE));
        }
    }

    #[test]
    fn a_page_that_was_touched_again_is_not_seen() {
        let file = filled(memfd(MemfdFlags::empty()));
        let all = 0..16 * PAGE;
        punch(&file, 3..5);
        file.write_all_at(&[1], 3 * PAGE).unwrap();
        assert_eq!(
            discarded(&file, std::slice::from_ref(&all)).unwrap(),
            found(PAGE, 4 * PAGE)
        );
    }

    #[test]
    fn bytes_past_the_end_of_a_file_cut_short_are_holes() {
        let file = filled(memfd(MemfdFlags::empty()));
        file.set_len(4 * PAGE).unwrap();
        assert_eq!(
            discarded(&file, &[2 * PAGE..8 * PAGE, 12 * PAGE..13 * PAGE]).unwrap(),
            found(5 * PAGE, 4 * PAGE)
        );
    }

    #[test]
    fn the_position_the_front_end_shares_with_us_does_not_move() {
        let mut front_ends = filled(memfd(MemfdFlags::empty()));
        front_ends.seek(io::SeekFrom::Start(77)).unwrap();
        let sent = front_ends.try_clone().unwrap();
        punch(&sent, 1..2);
        let all = 0..16 * PAGE;
        assert_eq!(
            discarded(&sent, std::slice::from_ref(&all)).unwrap(),
            found(PAGE, PAGE)
        );
        assert_eq!(front_ends.stream_position().unwrap(), 77);
    }

    #[test]
    fn where_a_file_cannot_be_opened_again_its_pages_are_counted() {
        let file = filled(memfd(MemfdFlags::empty()));
        let pinned = [0..8 * PAGE, 8 * PAGE..16 * PAGE];
        assert_eq!(by_count(&file, &pinned).unwrap(), Discarded::default());
        punch(&file, 4..7);
        let counted = by_count(&file, &pinned).unwrap();
        assert_eq!((counted.bytes, counted.first), (3 * PAGE, None));
        // Pages that are not pinned hide as many.
        assert_eq!(by_count(&file, &pinned[1..]).unwrap(), Discarded::default());
        assert_eq!(by_count(&file, &[]).unwrap(), Discarded::default());
    }

    #[test]
    fn on_hugetlbfs_pages_are_counted_too() {
        // With no page in it, so that it needs none of the machine's.
        let file = memfd(MemfdFlags::HUGETLB);
        file.set_len(1 << 30).unwrap();
        let missing = discarded(&file, &[0..4 << 20, 8 << 20..10 << 20]).unwrap();
        assert_eq!((missing.bytes, missing.first), (6 << 20, None));
    }

    #[test]
    fn a_file_that_is_no_memory_is_refused() {
        let file = File::open("/proc/self/maps").unwrap();
        assert!(matches!(discarded(&file, &[]), Err(FileError::FileSystem { .. })));
    }
}
