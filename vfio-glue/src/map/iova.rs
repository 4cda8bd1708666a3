//! Which IOVA an extent gets.
//!
//! Extents are placed bottom-up in the usable ranges, congruent to their file offset modulo 1 GiB or 2 MiB when
//! they are that large, so that the IOMMU can use superpages. 0 is never handed out: to a card it means nothing.
//!
//! Read with: ARCHITECTURE.md, "Memory map"; TRAPS 29, 30.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::address::Iova;

/// The first megabyte is left out: a null pointer with an offset should fault.
const LOWEST: u64 = 1 << 20;
const HUGE_PAGES: [u64; 2] = [1 << 30, 2 << 20];
const PAGE: u64 = 4096;

/// Where we allocate while no device tells what the hardware takes: below 2^39, the smallest aperture in use,
/// and around the x86 interrupt window. The AMD HyperTransport hole lies above it.
pub(super) fn cautious_ranges() -> Vec<RangeInclusive<u64>> {
    vec![LOWEST..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1]
}

/// Hands out IOVA ranges and takes them back. Not before the unmap returned: the map sees to that.
#[derive(Debug)]
pub(super) struct IovaAllocator {
    usable: Vec<RangeInclusive<u64>>,
    /// What is taken: start to end, exclusive.
    taken: BTreeMap<u64, u64>,
}

impl IovaAllocator {
    pub(super) fn new(usable: Vec<RangeInclusive<u64>>) -> Self {
        Self {
            usable,
            taken: BTreeMap::new(),
        }
    }

    /// The ranges allocations come from.
    pub(super) fn usable(&self) -> &[RangeInclusive<u64>] {
        &self.usable
    }

    /// Uses other ranges from now on. What is taken stays taken, inside of them or not: who narrows them has asked
    /// [`taken`](Self::taken) first, and once the last device has gone nothing needs to be reached.
    pub(super) fn set_usable(&mut self, usable: Vec<RangeInclusive<u64>>) {
        self.usable = usable;
    }

    /// What is taken: first and last byte of each range, in order.
    pub(super) fn taken(&self) -> impl Iterator<Item = (u64, u64)> {
        self.taken.iter().map(|(start, end)| (*start, end - 1))
    }

    /// Takes `len` bytes for memory at file offset `offset`, right after `after` if that is free and fits.
    pub(super) fn take(&mut self, len: u64, offset: u64, after: Option<u64>) -> Option<Iova> {
        let align = HUGE_PAGES.into_iter().find(|huge| len >= *huge).unwrap_or(PAGE);
        let start = after
            .filter(|start| start % align == offset % align && self.is_free(*start, len))
            .or_else(|| self.first_free(len, offset, align))?;
        self.taken.insert(start, start + len);
        Some(Iova::new(start))
    }

    pub(super) fn give_back(&mut self, iova: Iova) {
        self.taken.remove(&iova.raw());
    }

    /// How many bytes are not taken, in pieces of any size.
    pub(super) fn free_bytes(&self) -> u64 {
        let usable = self.usable.iter().fold(0_u64, |sum, range| {
            sum.saturating_add((range.end() - range.start()).saturating_add(1))
        });
        let taken = self.usable.iter().fold(0_u64, |sum, range| {
            self.taken().fold(sum, |sum, (first, last)| {
                let (from, to) = (first.max(*range.start()), last.min(*range.end()));
                sum + to.checked_sub(from).map_or(0, |more| more + 1)
            })
        });
        usable.saturating_sub(taken)
    }

    fn is_free(&self, start: u64, len: u64) -> bool {
        let Some(last) = start.checked_add(len - 1) else {
            return false;
        };
        let inside = self
            .usable
            .iter()
            .any(|range| range.contains(&start) && range.contains(&last));
        let overlaps = self
            .taken
            .range(..=last)
            .next_back()
            .is_some_and(|(_, end)| *end > start);
        inside && !overlaps && start >= LOWEST
    }

    fn first_free(&self, len: u64, offset: u64, align: u64) -> Option<u64> {
        self.usable.iter().find_map(|range| {
            let mut at = congruent((*range.start()).max(LOWEST), offset, align)?;
            loop {
                let last = at.checked_add(len - 1).filter(|last| last <= range.end())?;
                match self.taken.range(..=last).next_back() {
                    Some((_, end)) if *end > at => at = congruent(*end, offset, align)?,
                    _ => return Some(at),
                }
            }
        })
    }
}

/// The first address from `from` on that is congruent to `offset` modulo `align`.
fn congruent(from: u64, offset: u64, align: u64) -> Option<u64> {
    let ahead = (offset % align).wrapping_sub(from % align) % align;
    from.checked_add(ahead)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator() -> IovaAllocator {
        IovaAllocator::new(cautious_ranges())
    }

    #[test]
    fn large_extents_are_congruent_to_their_file_offset() {
        let mut iovas = allocator();
        let small = iovas.take(4096, 0x5000, None).unwrap();
        assert_eq!(small.raw(), LOWEST);
        let huge = iovas.take(4 << 20, 0x20_0000 + 0x3000, None).unwrap();
        assert_eq!(huge.raw() % (2 << 20), 0x3000);
        let cell = iovas.take(1 << 30, 3 << 30, None).unwrap();
        assert_eq!(cell.raw() % (1 << 30), 0);
    }

    #[test]
    fn nothing_lands_in_the_interrupt_window_or_twice_in_one_place() {
        let mut iovas = allocator();
        let mut taken: Vec<u64> = (0..500)
            .map(|n| iovas.take(1 << 30, n << 30, None).unwrap().raw())
            .collect();
        taken.sort_unstable();
        for pair in taken.windows(2) {
            assert!(pair[1] - pair[0] >= 1 << 30);
        }
        assert!(
            taken
                .iter()
                .all(|start| start + (1 << 30) <= 0xfee0_0000 || *start >= 0xfef0_0000)
        );
        let more = (0..500)
            .take_while(|n| iovas.take(1 << 30, n << 30, None).is_some())
            .count();
        assert_eq!(
            500 + more,
            512 - 2,
            "all cells below 2^39 but the first and the interrupt window's"
        );
    }

    #[test]
    fn the_next_cell_follows_the_last_one_where_it_can() {
        let mut iovas = allocator();
        let first = iovas.take(1 << 30, 0, None).unwrap().raw();
        let next = iovas
            .take(1 << 20, 1 << 30, Some(first + (1 << 30)))
            .unwrap()
            .raw();
        assert_eq!(next, first + (1 << 30));
        let elsewhere = iovas.take(1 << 20, 1 << 30, Some(first)).unwrap().raw();
        assert_ne!(elsewhere, first);
        iovas.give_back(Iova::new(next));
        assert_eq!(iovas.take(1 << 20, 1 << 30, Some(next)).unwrap().raw(), next);
    }

    #[test]
    fn what_lies_outside_of_other_ranges_stays_taken_and_takes_nothing_from_them() {
        let mut iovas = IovaAllocator::new(vec![1 << 40..=(1 << 40) + 8191]);
        let start = iovas.take(4096, 0, None).unwrap();
        assert_eq!(
            iovas.taken().collect::<Vec<_>>(),
            vec![(1 << 40, (1 << 40) + 4095)]
        );
        assert_eq!(iovas.free_bytes(), 4096);
        iovas.set_usable(vec![1 << 20..=(1 << 20) + 8191]);
        assert_eq!(iovas.free_bytes(), 8192);
        assert_eq!(iovas.take(4096, 0, None).unwrap().raw(), 1 << 20);
        iovas.set_usable(vec![1 << 20..=(1 << 41) - 1]);
        assert_eq!(iovas.take(8192, 0, None).unwrap().raw(), (1 << 20) + 4096);
        let beside = iovas.take(4096, 0, Some(start.raw())).unwrap();
        assert_ne!(beside, start);
    }

    #[test]
    fn a_range_that_ends_the_address_space_does_not_wrap() {
        let mut iovas = IovaAllocator::new(vec![u64::MAX - 8191..=u64::MAX]);
        assert!(iovas.take(4096, 0, None).is_some());
        assert!(iovas.take(8192, 0, None).is_none());
    }
}
