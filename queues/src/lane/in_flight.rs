//! What a lane remembers of the chains it has taken, in their order, until it gives them back.
//!
//! A virtqueue never has more chains out than entries (`virtq/mod.rs` checks that), so there is a place for each and
//! nothing ever moves or grows.

/// Up to a virtqueue's size of entries, oldest first. Positions are free-running counters.
#[derive(Debug)]
pub(super) struct InFlight<T> {
    entries: Vec<T>,
    mask: u16,
    oldest: u16,
    next: u16,
}

impl<T: Copy> InFlight<T> {
    /// With a place for each entry of a virtqueue of `size`, a power of two. `empty` fills the places meanwhile.
    pub(super) fn with_room_for(size: u16, empty: T) -> Self {
        debug_assert!(size.is_power_of_two(), "a virtqueue of {size}");
        Self {
            entries: vec![empty; size.into()],
            mask: size - 1,
            oldest: 0,
            next: 0,
        }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.oldest == self.next
    }

    /// Puts an entry behind the newest. There is room: its chain is one of the virtqueue's.
    #[inline(always)]
    pub(super) fn push(&mut self, entry: T) {
        debug_assert!(self.next.wrapping_sub(self.oldest) <= self.mask, "no room");
        if let Some(place) = self.entries.get_mut(usize::from(self.next & self.mask)) {
            *place = entry;
        }
        self.next = self.next.wrapping_add(1);
    }

    /// The oldest entry.
    #[inline(always)]
    pub(super) fn oldest(&self) -> Option<T> {
        if self.oldest == self.next {
            return None;
        }
        self.entries.get(usize::from(self.oldest & self.mask)).copied()
    }

    /// Forgets the oldest entry, of which the caller knows that it is there.
    #[inline(always)]
    pub(super) fn forget_oldest(&mut self) {
        debug_assert!(self.oldest != self.next, "nothing is in flight");
        self.oldest = self.oldest.wrapping_add(1);
    }

    /// All of them, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let count = self.next.wrapping_sub(self.oldest);
        (0..count).filter_map(move |index| {
            let position = self.oldest.wrapping_add(index) & self.mask;
            self.entries.get(usize::from(position))
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
            in_flight.push(2 * round);
            in_flight.push(2 * round + 1);
            let all: Vec<u32> = in_flight.iter().copied().collect();
            assert_eq!(all, [2 * round, 2 * round + 1]);
            for expected in all {
                assert_eq!(in_flight.oldest(), Some(expected));
                in_flight.forget_oldest();
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
