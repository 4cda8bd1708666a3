//! The guest's side of one split ring: chains, indexes, notifications, and everything a hostile guest may write.
//!
//! ```text
//! offer ──descriptors, avail entry──▶ publish ──avail.idx──▶ kick ──if wanted──▶ back end
//! take_used ◀──used entries, in order── wait_used ◀──call, if wanted────────────
//! ```
//!
//! It panics, naming the rule, when the device breaks one: a head it does not hold, a chain out of turn, a wanted
//! interrupt that never comes. It knows nothing of frames; [`net`](super::net) does.
//!
//! Read with: virtio 1.2 §2.7 (split virtqueues).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::memory::GuestMemory;
use super::vmm::{QueueEvents, RingPlace, Session, feature};

/// Descriptor flags (virtio 1.2 §2.7.5).
pub mod desc_flag {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

const DESC_BYTES: u64 = 16;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Whether the device reads or writes a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads.
    Read,
    /// The device writes.
    Write,
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Guest-physical start.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
    /// Who writes it.
    pub access: Access,
}

/// How a chain is laid into descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// In the ring's own table.
    Direct,
    /// In a table of its own at this address.
    Indirect(u64),
}

#[derive(Debug)]
struct Offered {
    head: u16,
    descriptors: Vec<u16>,
}

/// A buffer chain the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head it was offered under.
    pub head: u16,
    /// Bytes the device says it wrote; none if IN_ORDER let it skip the entry.
    pub len: Option<u32>,
}

/// The driver's side of one split ring.
#[derive(Debug)]
pub struct SplitQueue {
    memory: GuestMemory,
    place: RingPlace,
    events: Arc<QueueEvents>,
    event_idx: bool,
    in_order: bool,
    free: VecDeque<u16>,
    offered: VecDeque<Offered>,
    /// Heads that IN_ORDER told us of by naming only the last one.
    skipped: VecDeque<Used>,
    next_avail: u16,
    published: u16,
    last_used: u16,
}

impl SplitQueue {
    /// Lays out an empty ring at `place`.
    pub fn new(memory: &GuestMemory, place: RingPlace) -> Self {
        Self::starting_at(memory, place, 0)
    }

    /// Lays out a ring at `place` that looks as if `first` chains had already gone through it.
    pub fn starting_at(memory: &GuestMemory, place: RingPlace, first: u16) -> Self {
        let size = usize::from(place.size);
        memory.write(place.desc, &vec![0; size * 16]);
        memory.write(place.avail, &vec![0; 6 + size * 2]);
        memory.write(place.used, &vec![0; 6 + size * 8]);
        memory.store_u16(place.avail + 2, first);
        memory.store_u16(place.used + 2, first);
        Self {
            memory: memory.clone(),
            place,
            events: Arc::default(),
            event_idx: false,
            in_order: false,
            free: (0..place.size).collect(),
            offered: VecDeque::new(),
            skipped: VecDeque::new(),
            next_avail: first,
            published: first,
            last_used: first,
        }
    }

    /// Takes the eventfds and features of ring `index` of `session`; again after a reconnect.
    pub fn attach(&mut self, session: &Session, index: u32) {
        self.events = session.events(index);
        self.event_idx = session.has(feature::EVENT_IDX);
        self.in_order = session.has(feature::IN_ORDER);
    }

    /// Where the ring lies.
    pub fn place(&self) -> RingPlace {
        self.place
    }

    /// The ring's eventfds.
    pub fn events(&self) -> &QueueEvents {
        &self.events
    }

    /// How many chains the device holds.
    pub fn outstanding(&self) -> usize {
        self.offered.len()
    }

    /// How many descriptors are free.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// The index of the next chain to be offered.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// The used index as the device last stored it.
    pub fn used_idx(&self) -> u16 {
        self.memory.load_u16(self.place.used + 2)
    }

    /// Puts a chain in the ring and returns its head; the device sees it after [`publish`](Self::publish).
    ///
    /// # Panics
    ///
    /// If the ring has too few free descriptors.
    pub fn offer(&mut self, segments: &[Segment], table: Table) -> u16 {
        let descriptors: Vec<u16> = match table {
            Table::Direct => segments
                .iter()
                .map(|_| self.free.pop_front().expect("a free descriptor"))
                .collect(),
            Table::Indirect(_) => vec![self.free.pop_front().expect("a free descriptor")],
        };
        match table {
            Table::Direct => self.write_table(self.place.desc, &descriptors, segments),
            Table::Indirect(at) => {
                let entries: Vec<u16> = (0..u16::try_from(segments.len()).expect("a short chain")).collect();
                self.write_table(at, &entries, segments);
                let len = u32::from(u16::try_from(segments.len()).expect("a short chain")) * 16;
                self.write_desc(descriptors[0], at, len, desc_flag::INDIRECT, 0);
            }
        }
        let head = descriptors[0];
        self.push_head(head);
        self.offered.push_back(Offered { head, descriptors });
        head
    }

    fn write_table(&self, at: u64, entries: &[u16], segments: &[Segment]) {
        for (position, (&entry, segment)) in entries.iter().zip(segments).enumerate() {
            let mut flags = if segment.access == Access::Write {
                desc_flag::WRITE
            } else {
                0
            };
            let next = entries.get(position + 1).copied();
            if next.is_some() {
                flags |= desc_flag::NEXT;
            }
            self.write_desc_at(at, entry, segment.gpa, segment.len, flags, next.unwrap_or(0));
        }
    }

    /// Writes one descriptor of the ring's table, whatever it says.
    pub fn write_desc(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        self.write_desc_at(self.place.desc, index, gpa, len, flags, next);
    }

    /// Writes one descriptor of the table at `table`, whatever it says.
    pub fn write_desc_at(&self, table: u64, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend_from_slice(&gpa.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.memory.write(table + u64::from(index) * DESC_BYTES, &bytes);
    }

    /// Puts `head` in the next slot of the available ring, whatever it is.
    pub fn push_head(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.place.size);
        self.memory
            .write(self.place.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Moves the available index on by `by` entries nobody wrote.
    pub fn jump(&mut self, by: u16) {
        self.next_avail = self.next_avail.wrapping_add(by);
    }

    /// Shows the device everything offered so far.
    pub fn publish(&mut self) {
        // The release store orders the entries before the index; pairs with the device's load of `avail.idx`.
        self.memory.store_u16(self.place.avail + 2, self.next_avail);
    }

    /// Kicks if the device asked for it, and says whether it did. Call it after [`publish`](Self::publish).
    pub fn kick(&mut self) -> bool {
        // The index must be visible before the device's wish is read, or both sides could go to sleep.
        fence(Ordering::SeqCst);
        let (old, new) = (self.published, self.next_avail);
        self.published = new;
        let wanted = if self.event_idx {
            let avail_event = self
                .memory
                .load_u16(self.place.used + 4 + 8 * u64::from(self.place.size));
            // vring_need_event, virtio 1.2 §2.7.10
            new.wrapping_sub(avail_event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.load_u16(self.place.used) & NO_NOTIFY == 0
        };
        if wanted {
            self.events.kick.signal();
        }
        wanted
    }

    /// Publishes and kicks.
    pub fn submit(&mut self) -> bool {
        self.publish();
        self.kick()
    }

    /// Asks for an interrupt at the next used entry.
    pub fn want_interrupts(&self) {
        if self.event_idx {
            self.memory.store_u16(self.used_event_gpa(), self.last_used);
        } else {
            self.memory.store_u16(self.place.avail, 0);
        }
        // The wish must be visible before the used index is looked at again.
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts.
    pub fn refuse_interrupts(&self) {
        if self.event_idx {
            // As far behind as an index can be: 2^16 - 1 entries from now.
            self.memory
                .store_u16(self.used_event_gpa(), self.last_used.wrapping_sub(1));
        } else {
            self.memory.store_u16(self.place.avail, NO_INTERRUPT);
        }
        fence(Ordering::SeqCst);
    }

    fn used_event_gpa(&self) -> u64 {
        self.place.avail + 4 + 2 * u64::from(self.place.size)
    }

    /// Takes the next chain the device gave back.
    ///
    /// # Panics
    ///
    /// If the device used a chain out of turn, twice, or one it was never offered.
    pub fn take_used(&mut self) -> Option<Used> {
        if let Some(used) = self.skipped.pop_front() {
            return Some(used);
        }
        let used_idx = self.used_idx();
        let waiting = used_idx.wrapping_sub(self.last_used);
        if waiting == 0 {
            return None;
        }
        assert!(
            usize::from(waiting) <= self.offered.len(),
            "used.idx moved from {} to {used_idx} with only {} chains offered",
            self.last_used,
            self.offered.len()
        );
        let slot = u64::from(self.last_used % self.place.size);
        let entry = self.memory.read_vec(self.place.used + 4 + 8 * slot, 8);
        let id = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
        let len = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let at = self
            .offered
            .iter()
            .position(|offered| u32::from(offered.head) == id);
        let at = at.unwrap_or_else(|| panic!("the device used head {id}, which it does not hold"));
        if at != 0 {
            assert!(
                self.in_order,
                "head {id} was used before {at} chains offered earlier"
            );
            assert!(at < usize::from(waiting), "a batch ends beyond used.idx");
        }
        for position in 0..=at {
            let offered = self.offered.pop_front().expect("found above");
            self.free.extend(&offered.descriptors);
            self.last_used = self.last_used.wrapping_add(1);
            self.skipped.push_back(Used {
                head: offered.head,
                len: (position == at).then_some(len),
            });
        }
        self.skipped.pop_front()
    }

    /// Waits as an interrupt-driven guest: asks for an interrupt, looks again, sleeps. False if `limit` passes.
    ///
    /// # Panics
    ///
    /// If chains came back without the interrupt asked for.
    pub fn wait_used(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            self.want_interrupts();
            if self.has_used() {
                return true;
            }
            if !self
                .events
                .call
                .wait(deadline.saturating_duration_since(Instant::now()))
            {
                assert!(
                    !self.has_used(),
                    "the used ring moved, but the wanted interrupt never came"
                );
                return false;
            }
            self.events.call.take();
        }
    }

    /// Waits as a polling guest, which no interrupt reaches. False if `limit` passes.
    pub fn poll_used(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.has_used() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    fn has_used(&self) -> bool {
        !self.skipped.is_empty() || self.used_idx() != self.last_used
    }
}
