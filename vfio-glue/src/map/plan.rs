//! What a change of a guest's memory means for the map: what is mapped anew, what stays, what goes, and why. Pure.
//!
//! ```text
//! what is mapped, what the guest wants ──plan──▶ keep, add, drop ──books.rs──▶ the kernel
//! ```
//!
//! Neither kernel interface can split a mapping (TRAPS 26), so extents are the unit, and what a guest wants is covered
//! with them: with those that lie in what it wants as a whole, its own first, then other guests' (rule R4), then with
//! new ones. New ones end at the grid's borders and where a region does, so that what may go alone goes alone. An extent
//! of which only a part stays is the one whose bytes change their place: the part is mapped anew, and the whole goes.
//!
//! How regions divide a file plays no part in what stays: a region that is split, joined or sent with other bounds is
//! the same bytes (TRAPS 17, 18).

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::extent::{CELL_BYTES, cut};
use super::files::FileId;
use crate::address::Iova;

/// An extent there is, as far as a plan wants to know.
#[derive(Clone, Debug)]
pub(super) struct Mapped {
    pub(super) iova: Iova,
    pub(super) file: FileId,
    /// Bytes of the file.
    pub(super) range: Range<u64>,
    /// The guest in question has it.
    pub(super) owned: bool,
    /// It shows what the file holds; one whose pages were taken from under it does not.
    pub(super) fit: bool,
}

/// Bytes that a guest wants: whole pages of a file.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) file: FileId,
    pub(super) range: Range<u64>,
}

/// A change of what a guest has. Nothing of it has happened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) keep: Vec<Keep>,
    pub(super) add: Vec<Add>,
    pub(super) drop: Vec<Removal>,
}

/// An extent that covers what is wanted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Keep {
    pub(super) iova: Iova,
    pub(super) why: WhyKept,
}

/// Why an extent is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhyKept {
    /// The guest has it and goes on having it.
    Stays,
    /// Another guest has it.
    Shared,
}

/// An extent to make.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Add {
    pub(super) file: FileId,
    pub(super) range: Range<u64>,
    pub(super) why: WhyAdded,
    /// Where the same bytes are mapped already, in one extent.
    pub(super) same_as: Option<Iova>,
}

/// Why an extent is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhyAdded {
    /// The guest did not have these bytes.
    New,
    /// They were in an extent of which another part goes.
    Survives,
    /// The extent they were in shows them no more.
    Replaces,
}

impl WhyAdded {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Survives => "survives",
            Self::Replaces => "replaces",
        }
    }
}

/// An extent that the guest lets go of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Removal {
    pub(super) iova: Iova,
    pub(super) why: WhyDropped,
}

/// Why an extent goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhyDropped {
    /// Nothing of it is wanted.
    Gone,
    /// A part of it is wanted, which is elsewhere from now on.
    Cut,
    /// It does not show what its file holds.
    Unfit,
}

impl WhyDropped {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Cut => "cut",
            Self::Unfit => "unfit",
        }
    }
}

/// How many extents a square of the grid may be in beyond those that regions divide it into, before it is put together
/// anew. A file that grows page by page would else be in as many extents as it has pages.
pub(super) const MOST_SPLINTERS: usize = 8;

/// What becomes of a square of the grid that is in many extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Splinters {
    /// It is mapped anew, in as few as regions allow: its bytes move.
    Join,
    /// It stays as it is.
    Stay,
}

/// How the kernel goes about bytes that are mapped twice for a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pins {
    /// They are pinned once, if the second mapping lies in the first.
    Shared,
    /// They are pinned twice.
    Each,
}

/// Says how a guest gets from what it has (`mapped`, the owned ones) to what it wants.
///
/// `mapped` names every extent of the files in `wanted`, and all that the guest has.
pub(super) fn plan(mapped: &[Mapped], wanted: &[Wanted], pins: Pins, splinters: Splinters) -> Plan {
    let mut by_place: Vec<&Mapped> = mapped.iter().collect();
    by_place.sort_by_key(|extent| (extent.file, extent.range.start));
    let mut borders: Vec<(FileId, u64)> = wanted
        .iter()
        .flat_map(|piece| [piece.range.start, piece.range.end].map(|at| (piece.file, at)))
        .collect();
    borders.sort_unstable();
    let wanted = union(wanted);
    let mut plan = Plan::default();
    for Wanted { file, range } in &wanted {
        for cell in cut(range.clone()) {
            // No extent crosses the grid, so those that touch the cell start in its square.
            let square = cell.start - cell.start % CELL_BYTES;
            let first =
                by_place.partition_point(|extent| (extent.file, extent.range.start) < (*file, square));
            let last =
                by_place.partition_point(|extent| (extent.file, extent.range.start) < (*file, cell.end));
            let ground = Ground {
                file: *file,
                there: by_place.get(first..last).unwrap_or_default(),
                borders: &borders,
                pins,
                splinters,
            };
            ground.cover(&mut plan, &cell);
        }
    }
    let kept: HashSet<Iova> = plan.keep.iter().map(|kept| kept.iova).collect();
    for extent in mapped
        .iter()
        .filter(|extent| extent.owned && !kept.contains(&extent.iova))
    {
        let after =
            wanted.partition_point(|piece| (piece.file, piece.range.start) < (extent.file, extent.range.end));
        let before = after.checked_sub(1).and_then(|index| wanted.get(index));
        let touched =
            before.is_some_and(|piece| piece.file == extent.file && overlap(&piece.range, &extent.range));
        let why = match (touched, extent.fit) {
            (false, _) => WhyDropped::Gone,
            (true, true) => WhyDropped::Cut,
            (true, false) => WhyDropped::Unfit,
        };
        let iova = extent.iova;
        plan.drop.push(Removal { iova, why });
    }
    plan
}

/// What there is where a cell's part of what is wanted has to be covered.
struct Ground<'a> {
    file: FileId,
    /// Extents of the file in this square of the grid, by where they start.
    there: &'a [&'a Mapped],
    /// Where regions start and end.
    borders: &'a [(FileId, u64)],
    pins: Pins,
    splinters: Splinters,
}

impl Ground<'_> {
    /// Covers all of `cell`: with extents that lie in it as a whole, then with new ones.
    fn cover(&self, plan: &mut Plan, cell: &Range<u64>) {
        let is_inside = |extent: &&&Mapped| {
            extent.fit && cell.start <= extent.range.start && extent.range.end <= cell.end
        };
        let mut candidates: Vec<&Mapped> = self.there.iter().filter(is_inside).copied().collect();
        // What the guest has stays where it is; of others' the longest serves best.
        let len = |extent: &Mapped| extent.range.end - extent.range.start;
        candidates.sort_by_key(|extent| (!extent.owned, Reverse(len(extent))));
        let mut chosen: BTreeMap<u64, &Mapped> = BTreeMap::new();
        for candidate in candidates {
            // Apart from each other, so the one that starts last before its end is the only one that could overlap it.
            let before = chosen.range(..candidate.range.end).next_back();
            if before.is_none_or(|(_, other)| other.range.end <= candidate.range.start) {
                chosen.insert(candidate.range.start, candidate);
            }
        }
        let before = |at: u64| self.borders.partition_point(|border| *border < (self.file, at));
        let divided = before(cell.end) - before(cell.start);
        if self.splinters == Splinters::Join && chosen.len() > divided + MOST_SPLINTERS {
            // A copy could not join them either.
            let whole = Ground {
                pins: Pins::Each,
                ..*self
            };
            whole.fill(plan, cell.clone());
            return;
        }
        let mut at = cell.start;
        for extent in chosen.values() {
            self.fill(plan, at..extent.range.start);
            let why = if extent.owned {
                WhyKept::Stays
            } else {
                WhyKept::Shared
            };
            let iova = extent.iova;
            plan.keep.push(Keep { iova, why });
            at = extent.range.end;
        }
        self.fill(plan, at..cell.end);
    }

    /// Makes extents for a gap that no extent covers as a whole.
    fn fill(&self, plan: &mut Plan, gap: Range<u64>) {
        let mut at = gap.start;
        while at < gap.end {
            let (same_as, end) = self.reach(at, self.border_after(at).min(gap.end));
            let range = at..end;
            let was = self
                .there
                .iter()
                .find(|extent| extent.owned && overlap(&extent.range, &range));
            let why = match was.map(|extent| extent.fit) {
                None => WhyAdded::New,
                Some(true) => WhyAdded::Survives,
                Some(false) => WhyAdded::Replaces,
            };
            plan.add.push(Add {
                file: self.file,
                range,
                why,
                same_as,
            });
            at = end;
        }
    }

    /// Where the next region starts or ends.
    fn border_after(&self, at: u64) -> u64 {
        let next = self.borders.partition_point(|border| *border <= (self.file, at));
        match self.borders.get(next) {
            Some((file, border)) if *file == self.file => *border,
            _ => u64::MAX,
        }
    }

    /// How far, and at most to `end`, the bytes from `at` on are either all in one extent already, and where, or in none.
    /// Where copies are pinned like any others it makes no difference, and they are taken as they are.
    fn reach(&self, at: u64, end: u64) -> (Option<Iova>, u64) {
        if self.pins == Pins::Each {
            return (None, end);
        }
        let fit = || self.there.iter().filter(|extent| extent.fit);
        let around = fit().filter(|extent| extent.range.contains(&at));
        if let Some(extent) = around.max_by_key(|extent| extent.range.end) {
            let same_as = extent.iova.offset(at - extent.range.start);
            return (Some(same_as), end.min(extent.range.end));
        }
        let starts = fit().map(|extent| extent.range.start);
        let next = starts.filter(|start| *start > at).min();
        (None, next.map_or(end, |next| next.min(end)))
    }
}

/// What is wanted, each byte once: sorted, ranges that overlap or touch joined.
fn union(wanted: &[Wanted]) -> Vec<Wanted> {
    let mut sorted = wanted.to_vec();
    sorted.sort_by_key(|piece| (piece.file, piece.range.start));
    let mut joined: Vec<Wanted> = Vec::with_capacity(sorted.len());
    for piece in sorted {
        match joined.last_mut() {
            Some(last) if last.file == piece.file && piece.range.start <= last.range.end => {
                last.range.end = last.range.end.max(piece.range.end);
            }
            _ => joined.push(piece),
        }
    }
    joined
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a guest that wants one range")]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// An extent of the guest's own over `range` in MiB, at an IOVA of 1 GiB more than its offset.
    fn own(range: Range<u64>) -> Mapped {
        let range = range.start * MIB..range.end * MIB;
        Mapped {
            iova: Iova::new((1 << 30) + range.start),
            file: FileId(0),
            range,
            owned: true,
            fit: true,
        }
    }

    fn others(range: Range<u64>) -> Mapped {
        let mut extent = own(range);
        extent.owned = false;
        extent.iova = extent.iova.offset(1 << 40);
        extent
    }

    fn want(ranges: &[Range<u64>]) -> Vec<Wanted> {
        let wanted = |range: &Range<u64>| Wanted {
            file: FileId(0),
            range: range.start * MIB..range.end * MIB,
        };
        ranges.iter().map(wanted).collect()
    }

    /// The plan in short: MiB ranges and words.
    fn planned(mapped: &[Mapped], wanted: &[Range<u64>], pins: Pins) -> [Vec<String>; 3] {
        let plan = plan(mapped, &want(wanted), pins, Splinters::Join);
        let name = |iova: Iova| {
            let extent = mapped.iter().find(|extent| extent.iova == iova).unwrap();
            format!("{}..{}", extent.range.start / MIB, extent.range.end / MIB)
        };
        let keep = plan
            .keep
            .iter()
            .map(|kept| format!("{} {:?}", name(kept.iova), kept.why));
        let add = plan.add.iter().map(|add| {
            let copy = if add.same_as.is_some() { " copied" } else { "" };
            let (start, end) = (add.range.start / MIB, add.range.end / MIB);
            format!("{start}..{end} {:?}{copy}", add.why)
        });
        let drop = plan
            .drop
            .iter()
            .map(|gone| format!("{} {:?}", name(gone.iova), gone.why));
        [keep.collect(), add.collect(), drop.collect()]
    }

    const NONE: [&str; 0] = [];

    #[test]
    fn what_is_wanted_twice_or_again_is_mapped_once() {
        let [keep, add, drop] = planned(&[], &[0..4, 2..4], Pins::Each);
        assert_eq!((keep, drop), (vec![], vec![]));
        assert_eq!(
            add,
            ["0..2 New", "2..4 New"],
            "a region ends there and may go alone"
        );
        let [keep, add, drop] = planned(&[own(0..2), own(2..4)], &[0..4, 2..4], Pins::Each);
        assert_eq!(keep, ["0..2 Stays", "2..4 Stays"]);
        assert_eq!((add, drop), (vec![], vec![]));
    }

    #[test]
    fn trap_26_a_region_that_grows_adds_what_it_grew_by() {
        let [keep, add, drop] = planned(&[own(0..128)], &[0..256], Pins::Each);
        assert_eq!(keep, ["0..128 Stays"]);
        assert_eq!(add, ["128..256 New"]);
        assert_eq!(drop, NONE);
    }

    #[test]
    fn trap_17_a_region_that_is_split_or_joined_stays_where_it_is() {
        let [keep, add, drop] = planned(&[own(0..4)], &[0..1, 1..4], Pins::Each);
        assert_eq!((keep, add, drop), (vec!["0..4 Stays".to_owned()], vec![], vec![]));
        let [keep, add, drop] = planned(&[own(0..1), own(1..4)], &[0..4], Pins::Each);
        assert_eq!(keep, ["0..1 Stays", "1..4 Stays"]);
        assert_eq!((add, drop), (vec![], vec![]));
    }

    #[test]
    fn a_cell_that_stays_in_part_is_mapped_anew_and_its_pages_stay_pinned() {
        let [keep, add, drop] = planned(&[own(0..4)], &[0..1, 3..4], Pins::Shared);
        assert_eq!(keep, NONE);
        assert_eq!(add, ["0..1 Survives copied", "3..4 Survives copied"]);
        assert_eq!(drop, ["0..4 Cut"]);
        let [_, add, _] = planned(&[own(0..4)], &[0..1], Pins::Each);
        assert_eq!(add, ["0..1 Survives"]);
        let copy = plan(&[own(0..4)], &want(&[2..3]), Pins::Shared, Splinters::Join)
            .add
            .remove(0);
        assert_eq!(copy.same_as, Some(Iova::new((1 << 30) + 2 * MIB)));
    }

    #[test]
    fn a_shrink_by_whole_cells_leaves_the_others_alone() {
        let (cell, two) = (CELL_BYTES / MIB, 2 * CELL_BYTES / MIB);
        let mapped = [own(0..cell), own(cell..two), own(two..two + 5)];
        let [keep, add, drop] = planned(&mapped, &[0..cell], Pins::Each);
        assert_eq!(keep, [format!("0..{cell} Stays")]);
        assert_eq!(add, NONE);
        let gone = [cell..two, two..two + 5].map(|range| format!("{}..{} Gone", range.start, range.end));
        assert_eq!(drop, gone);
    }

    #[test]
    fn r4_anothers_extent_is_shared_where_all_of_it_is_wanted() {
        let [keep, add, drop] = planned(&[others(0..4)], &[0..8], Pins::Each);
        assert_eq!(keep, ["0..4 Shared"]);
        assert_eq!(add, ["4..8 New"]);
        assert_eq!(drop, NONE, "what others have is not ours to drop");
        let [keep, add, _] = planned(&[others(0..4), own(0..2)], &[0..4], Pins::Each);
        assert_eq!(keep, ["0..2 Stays"], "what we have stays where it is");
        assert_eq!(add, ["2..4 New"]);
    }

    #[test]
    fn of_anothers_larger_extent_the_wanted_part_is_copied_where_that_pins_nothing() {
        let [keep, add, _] = planned(&[others(0..4)], &[2..6], Pins::Shared);
        assert_eq!(keep, NONE);
        assert_eq!(add, ["2..4 New copied", "4..6 New"]);
        let [_, add, _] = planned(&[others(0..4)], &[2..6], Pins::Each);
        assert_eq!(add, ["2..6 New"], "a cut would gain nothing");
    }

    #[test]
    fn trap_21_an_extent_that_lost_its_pages_is_replaced_and_never_copied() {
        let mut stale = own(0..4);
        stale.fit = false;
        let [keep, add, drop] = planned(&[stale.clone()], &[0..4], Pins::Shared);
        assert_eq!(keep, NONE);
        assert_eq!(add, ["0..4 Replaces"]);
        assert_eq!(drop, ["0..4 Unfit"]);
        // Another guest of the same memory has replaced its own already.
        let [keep, add, drop] = planned(&[stale, others(0..4)], &[0..4], Pins::Shared);
        assert_eq!(keep, ["0..4 Shared"]);
        assert_eq!((add, drop), (vec![], vec!["0..4 Unfit".to_owned()]));
    }

    #[test]
    fn what_grew_in_many_steps_is_put_together_when_it_is_in_too_many_extents() {
        let steps: Vec<Mapped> = (0..20).map(|n| own(n..n + 1)).collect();
        let few = &steps[..MOST_SPLINTERS];
        let grown = MOST_SPLINTERS as u64 + 1;
        let [keep, add, drop] = planned(few, &[0..grown], Pins::Shared);
        assert_eq!((keep.len(), add.len(), drop.len()), (MOST_SPLINTERS, 1, 0));
        let [keep, add, drop] = planned(&steps, &[0..21], Pins::Shared);
        assert_eq!((keep.len(), drop.len()), (0, 20));
        assert_eq!(add, ["0..21 Survives"]);
        // Twenty regions want twenty.
        let regions: Vec<Range<u64>> = (0..20).map(|n| n..n + 1).collect();
        let [keep, add, drop] = planned(&steps, &regions, Pins::Shared);
        assert_eq!((keep.len(), add.len(), drop.len()), (20, 0, 0));
    }

    #[test]
    fn a_guest_that_wants_nothing_drops_all_it_has_and_nothing_else() {
        let [keep, add, drop] = planned(&[own(0..4), others(8..9)], &[], Pins::Each);
        assert_eq!((keep, add), (vec![], vec![]));
        assert_eq!(drop, ["0..4 Gone"]);
    }
}
