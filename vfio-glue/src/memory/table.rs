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

use super::{HostRange, HostSlice, RegionSpec};
use crate::address::{FrontendAddress, GuestAddress, Iova};
use crate::map::{Extent, ExtentPart, Leaving, MapError};

/// Where a lookup found its answer last time, and how often each place was turned to. Each user of a table keeps one;
/// guests go back to the same region nearly always.
#[derive(Clone, Debug)]
pub struct TableHint {
    at: usize,
    /// By segment: how often a lookup came here from another one.
    turns: Vec<u64>,
}

impl Default for TableHint {
    fn default() -> Self {
        Self {
            // No segment's: the first lookup counts as a turn.
            at: usize::MAX,
            turns: Vec::new(),
        }
    }
}

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

/// Where in a table the last answer was. Answers from there need no second look at the table.
#[derive(Clone, Copy, Debug)]
pub struct Hit<'a> {
    first: u64,
    iova: Iova,
    host: HostSlice<'a>,
}

impl<'a> Hit<'a> {
    /// All of `len` bytes from `start` on, if they lie here in one piece; else [`Table::lookup`] tells where they are.
    #[inline(always)]
    pub fn whole(&self, start: GuestAddress, len: u32) -> Option<Piece<'a>> {
        // Wraps to more than any segment has where `start` is below it.
        let skip = usize::try_from(start.0.wrapping_sub(self.first)).ok()?;
        let host = self.host.sub(skip, len as usize)?;
        let iova = self.iova.offset(skip as u64);
        Some(Piece { iova, host })
    }

    /// The same place for many questions about `len` bytes. `None` if there are not so many.
    #[inline]
    pub fn of_len(&self, len: u32) -> Option<HitOfLen<'a>> {
        let last = self.host.len().checked_sub(len as usize)?;
        Some(HitOfLen {
            hit: *self,
            len,
            last,
        })
    }
}

/// A [`Hit`] to be asked about pieces of one length.
#[derive(Clone, Copy, Debug)]
pub struct HitOfLen<'a> {
    hit: Hit<'a>,
    len: u32,
    /// Where the last piece of that length starts.
    last: usize,
}

impl<'a> HitOfLen<'a> {
    /// Where the card finds `start`, if all bytes of the length from there on lie here.
    #[inline(always)]
    pub fn iova(&self, start: GuestAddress) -> Option<Iova> {
        let skip = usize::try_from(start.0.wrapping_sub(self.hit.first)).ok()?;
        (skip <= self.last).then(|| self.hit.iova.offset(skip as u64))
    }

    /// Where we find the bytes of the length from `start` on, if all of them lie here.
    #[inline(always)]
    pub fn host(&self, start: GuestAddress) -> Option<HostSlice<'a>> {
        let skip = usize::try_from(start.0.wrapping_sub(self.hit.first)).ok()?;
        if skip > self.last {
            return None;
        }
        self.hit.host.sub(skip, self.len as usize)
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

/// The sorted segments of one guest's memory. Immutable. The empty one, of a guest without memory, is the default.
#[derive(Debug, Default)]
pub struct Table {
    segments: Vec<Segment>,
    regions: Vec<RegionSpec>,
    /// What the guest has in its map, once each.
    extents: Vec<Arc<Extent>>,
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

/// One stretch of a table, and how much a user of the table has to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Where the card finds the first byte.
    pub iova: Iova,
    /// Buffers in it that the card has now.
    pub held: u64,
    /// How often the user came here from another stretch, since it has the table.
    pub turns: u64,
}

impl Table {
    /// How many pieces a view may have. Regions that show the same bytes again and again make as many as there are regions
    /// times extents, and workers look through them.
    pub(crate) const MOST_PIECES: usize = 8192;

    /// The view of `regions`, in any order, all bytes of which are in `extents`. `None` if it has more pieces than a view
    /// may have.
    pub(crate) fn new(regions: Vec<RegionSpec>, mut extents: Vec<Arc<Extent>>) -> Option<Self> {
        extents.sort_by_key(|extent| extent.file_range().start);
        let mut segments: Vec<Segment> = regions
            .iter()
            .flat_map(|region| segments_of(region, &extents))
            .take(Self::MOST_PIECES + 1)
            .collect();
        if segments.len() > Self::MOST_PIECES {
            return None;
        }
        segments.sort_by_key(|segment| segment.first);
        Some(Self {
            segments,
            regions,
            extents,
        })
    }

    /// The regions this view shows, as announced.
    pub fn regions(&self) -> &[RegionSpec] {
        &self.regions
    }

    /// What of the map the guest has.
    pub fn extents(&self) -> &[Arc<Extent>] {
        &self.extents
    }

    /// Whether a file of this memory was cut short so that bytes had to be replaced by zeroes: its guest cannot be
    /// served any longer. Memory that two guests share is lost to both.
    ///
    /// Found when a lost byte is first touched, by any user of the table.
    pub fn lost_memory(&self) -> bool {
        self.segments.iter().any(|segment| segment.host.lost_memory())
    }

    /// Whether pages of this memory were found to have been discarded behind a pin
    /// ([`find_discarded`](crate::map::MemoryMap::find_discarded)), so that devices see others than the guest.
    pub fn has_discarded(&self) -> bool {
        self.extents.iter().any(|extent| extent.is_discarded())
    }

    /// Finds the bytes the guest calls `start`, as many of `len` as are contiguous; ask again for the rest.
    ///
    /// `None` if `start` is in no region or `len` is 0. Bytes past the region's end are simply not in the
    /// piece, so a caller that needs all of them sees a short one and finds nothing when it asks on.
    #[inline]
    pub fn lookup(&self, hint: &mut TableHint, start: GuestAddress, len: u32) -> Option<Piece<'_>> {
        let mut segment = self.segments.get(hint.at).filter(|segment| segment.holds(start));
        if segment.is_none() {
            segment = self.find(hint, start);
        }
        segment?.piece(start, len)
    }

    /// Where the last answer was, for many questions at once: guests go back to the same place nearly always. `None`
    /// before the first [`lookup`](Self::lookup).
    #[inline]
    pub fn hit(&self, hint: &TableHint) -> Option<Hit<'_>> {
        let segment = self.segments.get(hint.at)?;
        Some(Hit {
            first: segment.first,
            iova: segment.iova,
            host: segment.host.whole(),
        })
    }

    /// Turns `hint` to where `start` is. Says whether that is elsewhere than the last answer.
    pub fn turn(&self, hint: &mut TableHint, start: GuestAddress) -> bool {
        let before = hint.at;
        self.lookup(hint, start, 1).is_some() && hint.at != before
    }

    /// As [`lookup`](Self::lookup), for bytes that have to lie in one piece, all `len` of them: else `None`.
    #[inline]
    pub fn lookup_whole(&self, hint: &mut TableHint, start: GuestAddress, len: u32) -> Option<Piece<'_>> {
        self.lookup(hint, start, len)
            .filter(|piece| piece.len() == len as usize)
    }

    /// As [`lookup`](Self::lookup), for one who does not come again soon: nothing is remembered, and nothing counted.
    pub fn lookup_once(&self, start: GuestAddress, len: u32) -> Option<Piece<'_>> {
        let after = self.segments.partition_point(|segment| segment.first <= start.0);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        segment.piece(start, len)
    }

    #[cold]
    fn find(&self, hint: &mut TableHint, start: GuestAddress) -> Option<&Segment> {
        let after = self.segments.partition_point(|segment| segment.first <= start.0);
        let index = after.checked_sub(1)?;
        let segment = self.segments.get(index).filter(|segment| segment.holds(start))?;
        if hint.turns.len() <= index {
            hint.turns.resize(self.segments.len(), 0);
        }
        hint.at = index;
        hint.turns[index] += 1;
        Some(segment)
    }

    /// Whether `len` bytes at `start` will be where they are, for the card too, once `next` is the table and what
    /// leaves has left.
    pub fn keeps(&self, next: &Self, leaving: &Leaving, start: GuestAddress, len: u32) -> bool {
        let (mut at, mut rest) = (start, len);
        while rest > 0 {
            let (Some(now), Some(then)) = (self.lookup_once(at, rest), next.lookup_once(at, rest)) else {
                return false;
            };
            if now.iova != then.iova || leaving.has(now.iova) {
                return false;
            }
            let same = u32::try_from(now.len().min(then.len())).unwrap_or(rest);
            rest -= same;
            let Some(next_at) = at.checked_add(same.into()) else {
                return rest == 0;
            };
            at = next_at;
        }
        true
    }

    /// What a user of the table has to do with each stretch of it: buffers in flight at `held`, and the turns of `hint`.
    /// Only stretches where there is something.
    pub fn footprint(&self, hint: &TableHint, held: impl Iterator<Item = Iova>) -> Vec<Footprint> {
        let mut counts = vec![0_u64; self.segments.len()];
        let mut by_iova: Vec<(u64, u64, usize)> = self
            .segments
            .iter()
            .enumerate()
            .map(|(index, segment)| (segment.iova.raw(), segment.len, index))
            .collect();
        by_iova.sort_unstable();
        for iova in held.map(Iova::raw) {
            let after = by_iova.partition_point(|(start, ..)| *start <= iova);
            let found = after.checked_sub(1).and_then(|before| by_iova.get(before));
            if let Some((start, len, index)) = found
                && iova - start < *len
            {
                counts[*index] += 1;
            }
        }
        let segments = self.segments.iter().zip(counts).enumerate();
        let seen = segments.map(|(index, (segment, held))| Footprint {
            iova: segment.iova,
            held,
            turns: hint.turns.get(index).copied().unwrap_or(0),
        });
        seen.filter(|seen| seen.held + seen.turns > 0).collect()
    }

    /// The guest-physical address of a front-end address, as far as the table knows one.
    pub fn to_guest(&self, address: FrontendAddress) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let skip = address
                .0
                .checked_sub(region.frontend.0)
                .filter(|skip| *skip < region.len)?;
            region.guest.checked_add(skip)
        })
    }

    /// `len` bytes of virtqueue memory that the guest calls `start`, as one range of this process.
    ///
    /// The range keeps its bytes mapped here after the table has gone. It may lie across extents, but in one
    /// region.
    pub fn host_range(&self, start: GuestAddress, len: usize) -> Option<HostRange> {
        let region = self.region_holding(start, len)?;
        let skip = start.0 - region.guest.0;
        let segment = self.segments.iter().find(|segment| segment.holds(start))?;
        let in_segment = usize::try_from(start.0 - segment.first).ok()?;
        segment.host.sub(in_segment, len).or_else(|| {
            // Across a grid cell's border: a small mapping of its own joins what the cells keep apart.
            let offset = region.file_offset.checked_add(skip)?;
            segment.host.and_of_file(&region.file, offset, len as u64).ok()
        })
    }

    fn region_holding(&self, start: GuestAddress, len: usize) -> Option<&RegionSpec> {
        self.regions.iter().find(|region| {
            start
                .0
                .checked_sub(region.guest.0)
                .is_some_and(|skip| skip < region.len && len as u64 <= region.len - skip)
        })
    }
}

impl Segment {
    /// As many of `len` bytes from `start` on as it has, if it has any.
    #[inline]
    fn piece(&self, start: GuestAddress, len: u32) -> Option<Piece<'_>> {
        let skip = start.0.checked_sub(self.first).filter(|skip| *skip < self.len)?;
        let len = u64::from(len).min(self.len - skip);
        if len == 0 {
            return None;
        }
        let host = self
            .host
            .slice(usize::try_from(skip).ok()?, usize::try_from(len).ok()?)?;
        Some(Piece {
            iova: self.iova.offset(skip),
            host,
        })
    }

    #[inline]
    fn holds(&self, address: GuestAddress) -> bool {
        address.0.wrapping_sub(self.first) < self.len
    }
}

/// The segments that show a region, one for each extent it lies in, in order: together they show every byte of it.
fn segments_of<'a>(region: &'a RegionSpec, extents: &'a [Arc<Extent>]) -> impl Iterator<Item = Segment> + 'a {
    let range = region.file_offset..region.file_offset + region.len;
    let of_file = move |extent: &&'a Arc<Extent>| Arc::ptr_eq(extent.file(), &region.file);
    extents.iter().filter(of_file).filter_map(move |extent| {
        let ExtentPart { iova, host } = extent.part(&range)?;
        // By its own place in the file, so that no byte is ever shown where another should be.
        let skip = extent.file_range().start.max(range.start) - range.start;
        Some(Segment {
            first: region.guest.0.wrapping_add(skip),
            len: host.len() as u64,
            iova,
            host,
        })
    })
}

/// Refuses regions that wrap, are empty, or overlap for the guest or for the front-end.
pub(crate) fn refuse_overlap(regions: &[RegionSpec]) -> Result<(), MapError> {
    for spec in regions {
        let ends = [spec.guest.0, spec.frontend.0, spec.file_offset].map(|start| start.checked_add(spec.len));
        if spec.len == 0 || ends.contains(&None) {
            return Err(MapError::Wraps {
                guest: spec.guest.0,
                frontend: spec.frontend.0,
                len: spec.len,
                offset: spec.file_offset,
            });
        }
    }
    let refuse = |space, start: fn(&RegionSpec) -> u64| {
        let mut ranges: Vec<(u64, u64)> = regions.iter().map(|spec| (start(spec), spec.len)).collect();
        ranges.sort_unstable();
        let overlap = ranges.windows(2).find(|pair| pair[1].0 - pair[0].0 < pair[0].1);
        overlap.map_or(Ok(()), |pair| {
            Err(OverlapError {
                space,
                first: pair[0].0,
                len: pair[0].1,
                second: pair[1].0,
            })
        })
    };
    refuse("guest-physical", |spec| spec.guest.0)?;
    refuse("front-end", |spec| spec.frontend.0)?;
    Ok(())
}
