//! A split virtqueue from the device's side: take chains, give them back in order, ask and answer for wake-ups.
//!
//! ```text
//! avail ring ──pop──▶ chain.rs ──▶ lane ──▶ NIC ──▶ lane ──give──▶ used ring ──▶ notify.rs
//! ```
//!
//! Chains are given back in the order they were taken, on every lane. So what is taken and not given back is
//! always the newest part of the available ring, and the first unused index is simply the used index: recovery
//! is exact (TRAPS 12, 13, 14).
//!
//! Read with: virtio 1.2 §2.7.

mod chain;
mod notify;

pub use chain::{Buffer, Chain, ChainError, Direction, Short};
use notify::Notification;
pub use notify::WakeUps;
use vfio_glue::memory::{Hit, Table, UsedElement, VirtqMemory};

/// How a guest broke its ring. The ring is retired; others go on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtqError {
    /// The available index ran further ahead than the ring has entries.
    #[error("the available index went from {from} to {to}, more than the {size} entries of the ring")]
    AvailIndex {
        /// Where we had read up to.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// An available entry names no descriptor.
    #[error("available entry {position} names descriptor {head} of a table of {size}")]
    Head {
        /// Free-running position of the entry.
        position: u16,
        /// What it says.
        head: u16,
        /// Entries in the table.
        size: u16,
    },
    /// A chain is malformed.
    #[error("the chain at head {head} is broken")]
    Chain {
        /// Its head.
        head: u16,
        /// How.
        source: ChainError,
    },
}

/// A split virtqueue and our place in it. All positions are free-running 16-bit counters.
#[derive(Debug)]
pub struct Virtq {
    memory: VirtqMemory,
    /// The next available entry to take.
    next_avail: u16,
    /// The driver's available index when we last looked.
    seen_avail: u16,
    /// How many chains we gave back, published or not.
    next_used: u16,
    notification: Notification,
}

impl Virtq {
    /// Takes up the queue at `base`, the first entry not yet used.
    ///
    /// A base that disagrees with the used index in memory is wrong: virtio-user always sends 0, and chains
    /// between the two were taken by a predecessor and never given back. The used index wins, and is returned in
    /// place of the base (TRAPS 13).
    pub fn start(memory: VirtqMemory, base: u16, wake_ups: WakeUps) -> (Self, Result<(), Healed>) {
        let used = memory.used_idx();
        let notification = Notification::new(wake_ups, used);
        let healed = if used == base {
            Ok(())
        } else {
            Err(Healed { base, used })
        };
        (
            Self {
                memory,
                next_avail: used,
                seen_avail: used,
                next_used: used,
                notification,
            },
            healed,
        )
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.memory.size()
    }

    /// The first entry we have not given back: the base to resume from.
    pub fn first_unused(&self) -> u16 {
        self.next_used
    }

    /// How many chains are taken and not given back.
    pub fn outstanding(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }

    /// Forgets what was taken and not given back: it will be taken again. The card must be done with it.
    pub fn rewind(&mut self) {
        self.next_avail = self.next_used;
    }

    /// Puts the newest taken chain back: it is the next to be taken.
    pub fn untake(&mut self) {
        debug_assert!(self.outstanding() > 0, "nothing was taken");
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// How many chains there are to take, without looking again: the driver's index is read once for all of them.
    ///
    /// # Errors
    ///
    /// [`VirtqError::AvailIndex`].
    #[inline]
    pub fn waiting(&mut self) -> Result<u16, VirtqError> {
        self.look()?;
        Ok(self.seen_avail.wrapping_sub(self.next_avail))
    }

    /// The chain that is `ahead` of the next one, if it is a [`Short`] one with buffers of this `direction`. There is one:
    /// [`waiting`](Self::waiting) counted it. It is not taken before [`take`](Self::take) counts it.
    ///
    /// `None` says that the chain is of another kind or broken, or has its indirect table elsewhere than in `tables`:
    /// [`pop`](Self::pop) tells. Nothing that was read here is believed then.
    #[inline(always)]
    pub fn short(&self, ahead: u16, tables: Option<&Hit<'_>>, direction: Direction) -> Option<Short> {
        let head = self.memory.avail_entry(self.next_avail.wrapping_add(ahead));
        Short::read(&self.memory, tables, head, direction)
    }

    /// Takes the next `count` chains, that [`short`](Self::short) returned.
    #[inline(always)]
    pub fn take(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_add(count);
        debug_assert!(self.outstanding() <= self.size(), "more than there are");
    }

    /// Takes the next chain and fills `chain` with it, or returns `None` if the driver has offered nothing more.
    ///
    /// # Errors
    ///
    /// [`VirtqError`] if the driver broke the format. Nothing is consumed then.
    #[inline]
    pub fn pop(&mut self, table: &Table, chain: &mut Chain) -> Result<Option<u16>, VirtqError> {
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(None);
        }
        let size = self.memory.size();
        let head = self.memory.avail_entry(self.next_avail);
        if head >= size {
            return Err(VirtqError::Head {
                position: self.next_avail,
                head,
                size,
            });
        }
        chain
            .read(&self.memory, table, head)
            .map_err(|source| VirtqError::Chain { head, source })?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Whether the driver has offered chains we have not taken. Reads its index if we know of none.
    ///
    /// # Errors
    ///
    /// [`VirtqError::AvailIndex`].
    #[inline]
    pub fn has_more(&mut self) -> Result<bool, VirtqError> {
        Ok(self.next_avail != self.seen_avail || self.look()?)
    }

    fn look(&mut self) -> Result<bool, VirtqError> {
        let to = self.memory.avail_idx();
        // Counted from the first entry not given back: an entry still in flight cannot be offered again.
        let size = self.memory.size();
        if to.wrapping_sub(self.next_used) > size || to.wrapping_sub(self.next_avail) > size {
            return Err(VirtqError::AvailIndex {
                from: self.next_avail,
                to,
                size,
            });
        }
        self.seen_avail = to;
        Ok(to != self.next_avail)
    }

    /// Gives the oldest taken chain back, `len` bytes of it written. Seen by the driver after [`publish`](Self::publish).
    #[inline]
    pub fn give(&mut self, head: u16, len: u32) {
        self.fill(0, head, len);
        self.gave(1);
    }

    /// Writes the used entry that is `ahead` of the next one, for [`gave`](Self::gave) to count it in later.
    #[inline(always)]
    pub fn fill(&mut self, ahead: u16, head: u16, len: u32) {
        debug_assert!(self.outstanding() > ahead, "more chains given back than taken");
        let position = self.next_used.wrapping_add(ahead);
        self.memory.write_used(position, UsedElement { head, len });
    }

    /// Counts in the used entries that were filled: so many chains are given back.
    #[inline(always)]
    pub fn gave(&mut self, count: u16) {
        self.next_used = self.next_used.wrapping_add(count);
    }

    /// Shows the driver all chains given back, in one store, and says whether it wants to be told.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.memory.store_used_idx(self.next_used);
        self.notification.wanted(&self.memory, self.next_used)
    }

    /// Makes the next [`publish`](Self::publish) tell the driver whatever it asked for: after its call descriptor
    /// changed, a wake-up may have gone to the old one (TRAPS 38).
    pub fn force_notification(&mut self) {
        self.notification.force();
    }

    /// Asks the driver to kick from now on. Returns whether something arrived meanwhile: then do not sleep.
    ///
    /// # Errors
    ///
    /// [`VirtqError::AvailIndex`].
    pub fn ask_for_kicks(&mut self) -> Result<bool, VirtqError> {
        self.notification.ask_for_kicks(&self.memory, self.next_avail);
        self.has_more()
    }

    /// Tells the driver that kicks are not needed: we look by ourselves.
    pub fn refuse_kicks(&mut self) {
        self.notification.refuse_kicks(&self.memory);
    }
}

/// The base a front-end sent was not the used index in memory; the latter was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Healed {
    /// What the front-end sent.
    pub base: u16,
    /// What memory says.
    pub used: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Guest;

    const BUFFER: u64 = crate::testing::BASE + crate::testing::BUFFERS;

    #[test]
    fn chains_come_out_in_order_and_go_back_in_one_store() {
        let mut guest = Guest::with_queue(4);
        let mut virtq = guest.virtq();
        let mut chain = Chain::with_room_for(4);
        guest.offer_chain(2, &[(BUFFER, 60)], 0);
        guest.offer_chain(0, &[(BUFFER + 100, 60)], 0);
        assert_eq!(virtq.pop(&guest.table, &mut chain), Ok(Some(2)));
        assert_eq!(virtq.pop(&guest.table, &mut chain), Ok(Some(0)));
        assert_eq!(virtq.pop(&guest.table, &mut chain), Ok(None));
        virtq.give(2, 0);
        virtq.give(0, 7);
        assert_eq!(guest.used(), vec![], "nothing is seen before it is published");
        virtq.publish();
        assert_eq!(guest.used(), vec![(2, 0), (0, 7)]);
    }

    #[test]
    fn trap_13_a_base_of_zero_is_healed_from_the_used_index() {
        let guest = Guest::with_queue(4);
        guest.set_used_idx(9);
        let (virtq, healed) = Virtq::start(guest.memory(), 0, WakeUps::ByFlag);
        assert_eq!(healed, Err(Healed { base: 0, used: 9 }));
        assert_eq!(virtq.first_unused(), 9);
    }

    #[test]
    fn trap_12_what_was_taken_and_not_given_back_is_taken_again_after_a_rewind() {
        let mut guest = Guest::with_queue(4);
        let mut virtq = guest.virtq();
        let mut chain = Chain::with_room_for(4);
        for head in [0, 1, 2] {
            guest.offer_chain(head, &[(BUFFER, 60)], 0);
            virtq.pop(&guest.table, &mut chain).unwrap();
        }
        virtq.give(0, 0);
        virtq.rewind();
        assert_eq!(virtq.first_unused(), 1);
        assert_eq!(virtq.pop(&guest.table, &mut chain), Ok(Some(1)));
        virtq.untake();
        assert_eq!(virtq.pop(&guest.table, &mut chain), Ok(Some(1)));
    }

    #[test]
    fn an_available_index_that_jumps_breaks_the_queue() {
        let mut guest = Guest::with_queue(4);
        let mut virtq = guest.virtq();
        guest.set_avail_idx(5);
        let mut chain = Chain::with_room_for(4);
        let broken = VirtqError::AvailIndex {
            from: 0,
            to: 5,
            size: 4,
        };
        assert_eq!(virtq.pop(&guest.table, &mut chain), Err(broken));
    }

    #[test]
    fn entries_in_flight_cannot_be_offered_again() {
        let mut guest = Guest::with_queue(2);
        let mut virtq = guest.virtq();
        let mut chain = Chain::with_room_for(2);
        for head in [0, 1] {
            guest.offer_chain(head, &[(BUFFER, 60)], 0);
            virtq.pop(&guest.table, &mut chain).unwrap();
        }
        guest.offer(0);
        assert!(matches!(
            virtq.pop(&guest.table, &mut chain),
            Err(VirtqError::AvailIndex { .. })
        ));
    }

    #[test]
    fn a_head_outside_the_table_breaks_the_queue() {
        let mut guest = Guest::with_queue(4);
        let mut virtq = guest.virtq();
        guest.offer(4);
        let broken = VirtqError::Head {
            position: 0,
            head: 4,
            size: 4,
        };
        assert_eq!(virtq.pop(&guest.table, &mut Chain::with_room_for(4)), Err(broken));
    }

    #[test]
    fn positions_wrap_at_sixteen_bits() {
        let mut guest = Guest::with_queue(4);
        guest.set_used_idx(u16::MAX);
        guest.set_avail_idx(u16::MAX);
        let mut virtq = guest.virtq();
        let mut chain = Chain::with_room_for(4);
        for head in [3, 1] {
            guest.offer_chain(head, &[(BUFFER, 60)], 0);
            assert_eq!(virtq.pop(&guest.table, &mut chain), Ok(Some(head)));
            virtq.give(head, 0);
        }
        virtq.publish();
        assert_eq!(guest.used_idx(), 1);
    }
}
