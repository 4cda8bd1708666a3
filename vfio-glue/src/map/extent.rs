//! An extent: one pinned, mapped range of a file, the unit of map and unmap.
//!
//! Neither iommufd nor type1 can split a mapping (TRAPS 26), so ranges are cut on a fixed grid of file offsets
//! and what may go away alone is mapped alone.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::address::Iova;
use crate::memory::HostRange;

/// The grid on which extents are cut, in bytes of file offset.
pub const CELL_BYTES: u64 = 1 << 30;

/// What makes two ranges the same memory (rule R4). The inode number is good for as long as the file is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ExtentKey {
    device: u64,
    inode: u64,
    offset: u64,
    len: u64,
}

impl ExtentKey {
    pub(super) fn of(file: &File, offset: u64, len: u64) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            offset,
            len,
        })
    }
}

/// One mapped range of a file. Lives in the map's books until its last owner lets go.
#[derive(Debug)]
pub struct Extent {
    pub(super) key: ExtentKey,
    pub(super) file: Arc<File>,
    pub(super) iova: Iova,
    pub(super) host: HostRange,
}

impl Extent {
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

    /// The same bytes in this process.
    pub(crate) fn host(&self) -> &HostRange {
        &self.host
    }
}

/// Cuts a range of file offsets at the grid, rounded out to whole pages of `page` bytes.
///
/// Returns file ranges in order. The caller has checked that the range does not wrap.
pub(super) fn cut(offset: u64, len: u64, page: u64) -> Vec<Range<u64>> {
    let first = offset - offset % page;
    let end = (offset + len).next_multiple_of(page);
    let mut cells = Vec::new();
    let mut at = first;
    while at < end {
        let border = (at / CELL_BYTES + 1) * CELL_BYTES;
        let next = border.min(end);
        cells.push(at..next);
        at = next;
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_the_grid_and_rounded_to_pages() {
        assert_eq!(cut(0, 100, 4096), vec![0..4096]);
        let across = cut(CELL_BYTES - 8192, 3 * 4096, 4096);
        assert_eq!(
            across,
            vec![CELL_BYTES - 8192..CELL_BYTES, CELL_BYTES..CELL_BYTES + 4096]
        );
        let huge = 2 << 20;
        assert_eq!(cut(0xc_0000, 0x10_0000, huge), vec![0..huge]);
    }
}
