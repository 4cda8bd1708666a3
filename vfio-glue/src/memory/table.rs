//! One guest's view of its memory: guest-physical address to IOVA and to bytes in this process.
//!
//! ```text
//! descriptor.addr ──lookup──▶ Piece { iova → NIC descriptor, host → header, bounce }
//! ```
//!
//! A table never changes; a memory change makes a new one and the lanes swap it between bursts. While a lane
//! holds a table, every byte it names stays mapped in this process; that it stays mapped for the card is the
//! map's promise (lanes let go first, ARCHITECTURE.md, "Memory map").
//!
//! Read with: virtio 1.2 §2.7.5; TRAPS 19, 20, 31, 41.

use std::sync::Arc;

use super::{HostRange, HostSlice, Region};
use crate::address::{FrontendAddress, GuestAddress, Iova};

/// Where a lookup found its answer last time. Each user of a table keeps one; guests go back to the same
/// region nearly always.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableHint(usize);

/// Bytes that are contiguous for the guest, for the card and for us.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Where the card finds them.
    pub iova: Iova,
    /// Where we find them; its length is the piece's.
    pub host: HostSlice<'a>,
}

impl Piece<'_> {
    /// Length in bytes: at most what was asked for, less where a region or an extent ends.
    #[inline]
    pub fn len(&self) -> usize {
        self.host.len()
    }

    /// Whether there are no bytes: never so.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }
}

#[derive(Debug)]
struct Segment {
    first: u64,
    /// Length in bytes, at most one grid cell.
    len: u64,
    iova: Iova,
    host: HostRange,
}

/// The sorted segments of one guest's memory. Immutable.
#[derive(Debug, Default)]
pub struct Table {
    segments: Vec<Segment>,
    regions: Vec<Arc<Region>>,
}

/// Two regions claim the same addresses.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("region at {second:#x} ({space}) starts inside the one at {first:#x}, which is {len:#x} bytes long")]
pub struct OverlapError {
    space: &'static str,
    first: u64,
    len: u64,
    second: u64,
}

impl Table {
    /// Builds the view of `regions`, in any order.
    ///
    /// # Errors
    ///
    /// [`OverlapError`] if two regions overlap for the guest or for the front-end.
    pub fn new(regions: Vec<Arc<Region>>) -> Result<Self, OverlapError> {
        refuse_overlap(
            "guest-physical",
            regions.iter().map(|r| (r.spec.guest.0, r.spec.len)).collect(),
        )?;
        refuse_overlap(
            "front-end",
            regions.iter().map(|r| (r.spec.frontend.0, r.spec.len)).collect(),
        )?;
        let mut segments: Vec<Segment> = regions.iter().flat_map(|region| segments_of(region)).collect();
        segments.sort_by_key(|segment| segment.first);
        Ok(Self { segments, regions })
    }

    /// The regions this view shows.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether a file of this memory was cut short so that bytes had to be replaced by zeroes: its guest cannot be
    /// served any longer. Memory that two guests share is lost to both.
    ///
    /// Found when a lost byte is first touched, by any user of the table.
    pub fn lost_memory(&self) -> bool {
        self.segments.iter().any(|segment| segment.host.lost_memory())
    }

    /// Finds the bytes the guest calls `start`, as many of `len` as are contiguous; ask again for the rest.
    ///
    /// `None` if `start` is in no region or `len` is 0. Bytes past the region's end are simply not in the
    /// piece, so a caller that needs all of them sees a short one and finds nothing when it asks on.
    #[inline]
    pub fn lookup(&self, hint: &mut TableHint, start: GuestAddress, len: u32) -> Option<Piece<'_>> {
        let mut segment = self.segments.get(hint.0).filter(|segment| segment.holds(start));
        if segment.is_none() {
            segment = self.find(hint, start);
        }
        let segment = segment?;
        let skip = start.0 - segment.first;
        let len = u64::from(len).min(segment.len - skip);
        if len == 0 {
            return None;
        }
        let host = segment
            .host
            .slice(usize::try_from(skip).ok()?, usize::try_from(len).ok()?)?;
        Some(Piece {
            iova: segment.iova.offset(skip),
            host,
        })
    }

    #[cold]
    fn find(&self, hint: &mut TableHint, start: GuestAddress) -> Option<&Segment> {
        let after = self.segments.partition_point(|segment| segment.first <= start.0);
        let index = after.checked_sub(1)?;
        let segment = self.segments.get(index).filter(|segment| segment.holds(start))?;
        hint.0 = index;
        Some(segment)
    }

    /// The guest-physical address of a front-end address, as far as the table knows one.
    pub fn to_guest(&self, address: FrontendAddress) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let skip = address
                .0
                .checked_sub(region.spec.frontend.0)
                .filter(|skip| *skip < region.spec.len)?;
            region.spec.guest.checked_add(skip)
        })
    }

    /// `len` bytes of virtqueue memory that the guest calls `start`, as one range of this process.
    ///
    /// The range keeps its bytes mapped here after the table has gone. It may lie across extents, but in one
    /// region.
    pub fn host_range(&self, start: GuestAddress, len: usize) -> Option<HostRange> {
        let region = self.region_holding(start, len)?;
        let skip = start.0 - region.spec.guest.0;
        let segment = self.segments.iter().find(|segment| segment.holds(start))?;
        let in_segment = usize::try_from(start.0 - segment.first).ok()?;
        segment.host.sub(in_segment, len).or_else(|| {
            // Across a grid cell's border: a small mapping of its own joins what the cells keep apart.
            let offset = region.spec.file_offset.checked_add(skip)?;
            segment
                .host
                .and_of_file(&region.spec.file, offset, len as u64)
                .ok()
        })
    }

    fn region_holding(&self, start: GuestAddress, len: usize) -> Option<&Region> {
        self.regions.iter().map(Arc::as_ref).find(|region| {
            start
                .0
                .checked_sub(region.spec.guest.0)
                .is_some_and(|skip| skip < region.spec.len && len as u64 <= region.spec.len - skip)
        })
    }
}

impl Segment {
    #[inline]
    fn holds(&self, address: GuestAddress) -> bool {
        address.0.wrapping_sub(self.first) < self.len
    }
}

/// One segment for each piece, in order: together they show every byte of the region.
fn segments_of(region: &Region) -> impl Iterator<Item = Segment> {
    let start = region.spec.guest.0;
    region.pieces.iter().scan(start, |next, piece| {
        let (first, len) = (*next, piece.host.len() as u64);
        *next = first.wrapping_add(len);
        Some(Segment {
            first,
            len,
            iova: piece.iova,
            host: piece.host.clone(),
        })
    })
}

fn refuse_overlap(space: &'static str, mut ranges: Vec<(u64, u64)>) -> Result<(), OverlapError> {
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let (first, len) = pair[0];
        let (second, _) = pair[1];
        if second - first < len {
            return Err(OverlapError {
                space,
                first,
                len,
                second,
            });
        }
    }
    Ok(())
}
