//! Which receive queue a frame goes to: the card hashes its addresses and ports, and a table names the queue.
//!
//! ```text
//! frame ──Toeplitz, key──▶ hash ──low 7 bits──▶ table of 128 entries ──▶ queue
//! ```
//!
//! The table names only queues that have buffers of the guest's: a queue joins with the first of them, and leaves
//! before it stops. A pair that comes or goes moves no flow from one of the others to another. What the card cannot hash
//! goes to queue 0, which a guest always has on.
//!
//! Read with: Intel 82576EB datasheet §7.1.1.7 (RSS).

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::card::Card;
use super::regs::{Mrqc, Reg};

/// Entries of the table.
const ENTRIES: usize = 128;

/// The key of the card's hash: 40 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RssKey(pub [u8; 40]);

impl RssKey {
    /// A key that nobody outside knows, so that nobody can aim all frames at one queue.
    ///
    /// # Errors
    ///
    /// The kernel's answer if it has no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut key = [0; 40];
        rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(key))
    }
}

/// How one card's received frames are spread over its queues.
#[derive(Debug)]
pub(super) struct Spread {
    key: RssKey,
    /// More than one queue, so that there is something to spread over.
    by_hash: bool,
    /// Taken when a queue starts or stops, and for no frame.
    table: Mutex<Table>,
}

impl Spread {
    pub(super) fn new(key: RssKey, pairs: u16) -> Self {
        Self {
            key,
            by_hash: pairs > 1,
            table: Mutex::default(),
        }
    }

    /// Programs a card that was reset. None of its queues runs.
    pub(super) fn configure(&self, card: &Card) {
        *self.table() = Table::default();
        if !self.by_hash {
            card.write(Reg::MRQC, 0);
            return;
        }
        for (word, bytes) in (0..).zip(self.key.0.as_chunks().0) {
            card.write(Reg::rss_key(word), u32::from_le_bytes(*bytes));
        }
        for word in 0..32 {
            card.write(Reg::redirection(word), 0);
        }
        // UDP by its ports too, as tunnels and QUIC have all their flows between two addresses. The fragments of a large
        // datagram have no ports, so they may overtake each other.
        let hashed =
            Mrqc::TCP_IPV4 | Mrqc::IPV4 | Mrqc::TCP_IPV6 | Mrqc::IPV6 | Mrqc::UDP_IPV4 | Mrqc::UDP_IPV6;
        card.write(Reg::MRQC, (Mrqc::BY_HASH | hashed).bits());
    }

    /// From now on frames go to `queue` too, which runs and has buffers.
    pub(super) fn join(&self, card: &Card, queue: u32) {
        self.change(card, |table| table.join(entry_of(queue)));
    }

    /// From now on no frame goes to `queue` any more, if there is another queue to go to.
    pub(super) fn leave(&self, card: &Card, queue: u32) {
        self.change(card, |table| table.leave(entry_of(queue)));
    }

    fn change(&self, card: &Card, how: impl FnOnce(&mut Table)) {
        if !self.by_hash {
            return;
        }
        let mut table = self.table();
        let before = table.entries;
        how(&mut table);
        for (word, (old, new)) in (0..).zip(
            before
                .as_chunks::<4>()
                .0
                .iter()
                .zip(table.entries.as_chunks::<4>().0),
        ) {
            if old != new {
                card.write(Reg::redirection(word), u32::from_le_bytes(*new));
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entry_of(queue: u32) -> u8 {
    u8::try_from(queue).unwrap_or(0)
}

/// The card's table as we want it.
#[derive(Clone, Debug)]
struct Table {
    entries: [u8; ENTRIES],
    /// The queues that are named in it.
    members: Vec<u8>,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            entries: [0; ENTRIES],
            members: Vec::new(),
        }
    }
}

impl Table {
    /// Gives `queue` its share, taken from those that have most.
    fn join(&mut self, queue: u8) {
        if self.members.contains(&queue) {
            return;
        }
        self.members.push(queue);
        if self.members.len() == 1 {
            self.entries = [queue; ENTRIES];
            return;
        }
        for _ in 0..ENTRIES / self.members.len() {
            let others = self.members.iter().copied().filter(|member| *member != queue);
            let fullest = others.max_by_key(|member| self.share(*member));
            let entry = self.entries.iter_mut().find(|entry| Some(**entry) == fullest);
            if let Some(entry) = entry {
                *entry = queue;
            }
        }
    }

    /// Deals the share of `queue` out to those that have least. The last one keeps it, for want of another.
    fn leave(&mut self, queue: u8) {
        self.members.retain(|member| *member != queue);
        for at in 0..ENTRIES {
            let emptiest = self
                .members
                .iter()
                .copied()
                .min_by_key(|member| self.share(*member));
            if let (Some(entry), Some(emptiest)) = (self.entries.get_mut(at), emptiest)
                && *entry == queue
            {
                *entry = emptiest;
            }
        }
    }

    fn share(&self, queue: u8) -> usize {
        self.entries.iter().filter(|entry| **entry == queue).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shares_are_even_and_no_flow_moves_without_need(
            changes in proptest::collection::vec((any::<bool>(), 0u8..16), 1..60)
        ) {
            let mut table = Table::default();
            for (comes, queue) in changes {
                let before = table.clone();
                if comes {
                    table.join(queue);
                } else {
                    table.leave(queue);
                }
                let shares = table.members.iter().map(|member| table.share(*member));
                let (least, most) = (shares.clone().min(), shares.clone().max());
                if let (Some(least), Some(most)) = (least, most) {
                    prop_assert!(most - least <= 1, "{table:?}");
                    prop_assert_eq!(shares.sum::<usize>(), ENTRIES);
                    let first = before.members.is_empty();
                    for (old, new) in before.entries.iter().zip(table.entries) {
                        prop_assert!(*old == new || first || *old == queue || new == queue);
                    }
                } else {
                    prop_assert_eq!(before.entries, table.entries);
                }
            }
        }
    }

    #[test]
    fn two_keys_are_not_the_same() {
        assert_ne!(RssKey::random().unwrap(), RssKey::random().unwrap());
    }
}
