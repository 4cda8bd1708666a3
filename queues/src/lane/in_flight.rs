//! What a lane remembers of the chains it has taken, in their order, until it gives them back.
//!
//! A virtqueue never has more chains out than entries (`virtq/mod.rs` checks that), so there is a place for each and
//! nothing ever moves or grows.

/// Up to a virtqueue's size of entries, oldest first. Positions are free-running counters.
#[derive(Debug)]
pub(super) struct InFlight<T> {
    entries: Vec<T>,
    mask: u32,
    oldest: u32,
    next: u32,
}

impl<T: Copy> InFlight<T> {
    /// With a place for each entry of a virtqueue of `size`, a power of two. `empty` fills the places meanwhile.
    pub(super) fn with_room_for(size: u16, empty: T) -> Self {
        debug_assert!(size.is_power_of_two(), "a virtqueue of {size}");
        Self {
            entries: vec![empty; size.into()],
            mask: u32::from(size) - 1,
            oldest: 0,
            next: 0,
        }
    }

    /// How many there are.
    #[inline(always)]
    pub(super) fn len(&self) -> u32 {
        self.next.wrapping_sub(self.oldest)
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes an entry into the place that is `ahead` of the next one, for [`add`](Self::add) to count it in later. There
    /// is room: its chain is one of the virtqueue's.
    #[inline(always)]
    pub(super) fn put(&mut self, ahead: u32, entry: T) {
        debug_assert!(self.len() + ahead <= self.mask, "no room");
        let place = (self.next.wrapping_add(ahead) & self.mask) as usize;
        if let Some(place) = self.entries.get_mut(place) {
            *place = entry;
        }
    }

    /// Counts in entries that were put.
    #[inline(always)]
    pub(super) fn add(&mut self, count: u32) {
        self.next = self.next.wrapping_add(count);
    }

    /// Puts one entry behind the newest.
    pub(super) fn push(&mut self, entry: T) {
        self.put(0, entry);
        self.add(1);
    }

    /// The entry that `behind` others are older than. The caller has looked at [`len`](Self::len).
    #[inline(always)]
    pub(super) fn get(&self, behind: u32) -> Option<T> {
        debug_assert!(behind < self.len(), "not in flight");
        let place = self.oldest.wrapping_add(behind) & self.mask;
        self.entries.get(place as usize).copied()
    }

    /// The oldest entry.
    pub(super) fn oldest(&self) -> Option<T> {
        if self.is_empty() { None } else { self.get(0) }
    }

    /// Forgets the oldest entries, of which the caller knows that they are there.
    #[inline(always)]
    pub(super) fn forget(&mut self, count: u32) {
        debug_assert!(count <= self.len(), "so many are not in flight");
        self.oldest = self.oldest.wrapping_add(count);
    }

    /// All of them, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        (0..self.len()).filter_map(move |index| {
            let position = self.oldest.wrapping_add(index) & self.mask;
            self.entries.get(position as usize)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_in_order_across_the_end_of_the_ring_and_of_the_counter() {
        let mut in_flight = InFlight::with_room_for(4, 0_u32);
        assert_eq!(in_flight.oldest(), None);
        for round in 0..40_000_u32 {
            in_flight.put(0, 2 * round);
            in_flight.put(1, 2 * round + 1);
            assert!(in_flight.is_empty(), "not counted in yet");
            in_flight.add(2);
            assert_eq!(in_flight.get(1), Some(2 * round + 1));
            let all: Vec<u32> = in_flight.iter().copied().collect();
            assert_eq!(all, [2 * round, 2 * round + 1]);
            for expected in all {
                assert_eq!(in_flight.oldest(), Some(expected));
                in_flight.forget(1);
            }
        }
        assert_eq!(in_flight.oldest(), None);
    }

    #[test]
    fn there_is_a_place_for_each_entry_of_the_largest_virtqueue() {
        let mut in_flight = InFlight::with_room_for(32768, 0_u16);
        for entry in 0..32768 {
            in_flight.push(entry);
        }
        assert_eq!(in_flight.iter().count(), 32768);
        assert_eq!(
            (in_flight.oldest(), in_flight.iter().last()),
            (Some(0), Some(&32767))
        );
    }
}
