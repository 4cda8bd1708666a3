//! An extent: one pinned, mapped range of a file, the unit of map and unmap.
//!
//! Neither iommufd nor type1 can split a mapping (TRAPS 26), so ranges are cut on a fixed grid of file offsets
//! and what may go away alone is mapped alone.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::files::FileId;
use crate::address::Iova;
use crate::memory::HostRange;

/// The grid on which extents are cut, in bytes of file offset.
pub const CELL_BYTES: u64 = 1 << 30;

const SMALL_PAGE: u64 = 4096;

/// What makes two ranges the same memory (rule R4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExtentKey {
    pub(super) file: FileId,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// One mapped range of a file. Lives in the map's books until its last owner lets go.
#[derive(Debug)]
pub struct Extent {
    pub(super) key: ExtentKey,
    pub(super) file: Arc<File>,
    pub(super) iova: Iova,
    pub(super) host: HostRange,
    /// Pages of it were taken out of the file while it was pinned (TRAPS 21).
    discarded: AtomicBool,
}

/// The part of an extent that a region shows.
#[derive(Clone, Debug)]
pub(crate) struct ExtentPart {
    /// Where the card finds the first byte.
    pub(crate) iova: Iova,
    /// Where we find them.
    pub(crate) host: HostRange,
}

impl Extent {
    pub(super) fn new(key: ExtentKey, file: Arc<File>, iova: Iova, host: HostRange) -> Self {
        Self {
            key,
            file,
            iova,
            host,
            discarded: AtomicBool::new(false),
        }
    }

    /// Where devices find the first byte.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.key.len
    }

    /// Whether there are no bytes: never so.
    pub fn is_empty(&self) -> bool {
        self.key.len == 0
    }

    /// Byte offset of the range in its file.
    pub fn file_offset(&self) -> u64 {
        self.key.offset
    }

    /// The bytes of its file that it shows.
    pub(crate) fn file_range(&self) -> Range<u64> {
        self.key.offset..self.key.offset + self.key.len
    }

    /// The file it shows.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The pages it is made of, in bytes, that lie at an IOVA congruent to them.
    pub(super) fn page_bytes(&self) -> u64 {
        let page = self.host.page_bytes();
        let congruent = self.iova.raw() % page == self.key.offset % page;
        if congruent { page } else { SMALL_PAGE }
    }

    /// The part of it that lies in `range` of its file, or `None` if there is none.
    pub(crate) fn part(&self, range: &Range<u64>) -> Option<ExtentPart> {
        let own = self.file_range();
        let (from, to) = (range.start.max(own.start), range.end.min(own.end));
        let skip = from - own.start;
        let len = usize::try_from(to.checked_sub(from)?)
            .ok()
            .filter(|len| *len > 0)?;
        Some(ExtentPart {
            iova: self.iova.offset(skip),
            host: self.host.sub(usize::try_from(skip).ok()?, len)?,
        })
    }

    /// Whether it shows what its file holds, and may be given to one more guest.
    pub(super) fn is_fit(&self) -> bool {
        !self.host.lost_memory() && !self.is_discarded()
    }

    /// Whether it shows pages that its file has no more.
    pub(crate) fn is_discarded(&self) -> bool {
        self.discarded.load(Ordering::Relaxed)
    }

    /// Marks it as showing pages that its file has no more.
    pub(super) fn set_discarded(&self) {
        self.discarded.store(true, Ordering::Relaxed);
    }

    /// The same bytes in this process.
    pub(crate) fn host(&self) -> &HostRange {
        &self.host
    }
}

/// Into how many cells [`cut`] cuts a range.
pub(super) fn cells_in(range: &Range<u64>) -> u64 {
    range.end.div_ceil(CELL_BYTES) - range.start / CELL_BYTES
}

/// Cuts a range of file offsets, in whole pages of the file, at the grid.
pub(super) fn cut(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let border = (at - at % CELL_BYTES).saturating_add(CELL_BYTES);
        let cell = at..border.min(range.end);
        at = cell.end;
        Some(cell)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_the_grid() {
        let cells = |range: Range<u64>| cut(range).collect::<Vec<_>>();
        assert_eq!(cells(0..4096), vec![0..4096]);
        let across = CELL_BYTES - 8192..CELL_BYTES + 4096;
        assert_eq!(
            cells(across.clone()),
            vec![CELL_BYTES - 8192..CELL_BYTES, CELL_BYTES..CELL_BYTES + 4096]
        );
        assert_eq!(cells_in(&across), 2);
        assert_eq!(cells_in(&(0..CELL_BYTES)), 1);
        let end = u64::MAX - 4095;
        assert_eq!(cells(end - 4096..end), vec![end - 4096..end]);
        assert_eq!(cells_in(&(0..1 << 62)), 1 << 32);
    }
}
