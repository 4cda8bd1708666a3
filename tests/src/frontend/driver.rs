//! The guest's part: a split-ring virtio-net driver that checks what the device does with its buffers.
//!
//! ```text
//! Tx::send ──chain──▶ SplitQueue::offer, publish, kick ──▶ back end
//! Rx::post ──chain──▶            take_used ◀──────────────
//! ```
//!
//! [`SplitQueue`] knows rings and notifications, [`Arena`] knows which bytes the device may write, and [`Tx`] and
//! [`Rx`] know the 12-byte header. They panic, naming the rule, when the device breaks one: used order, used
//! length, `num_buffers`, a head that was not offered, a byte outside the lent buffers.
//!
//! Read with: virtio 1.2 §2.7 (split virtqueues) and §5.1.6 (network device operation).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::PATIENCE;
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

/// `virtio_net_hdr` with `num_buffers`, the form of virtio 1 (virtio 1.2 §5.1.6).
pub const HEADER_BYTES: usize = 12;
const NUM_BUFFERS_AT: usize = 10;
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

/// A stretch of guest memory that knows which of its bytes the device may write.
///
/// Everything else must stay as the driver left it: [`check`](Self::check) compares byte by byte with a copy.
#[derive(Debug)]
pub struct Arena {
    memory: GuestMemory,
    gpa: u64,
    expected: Vec<u8>,
    lent: BTreeMap<u64, usize>,
}

/// What unused memory is filled with.
const CANARY: u8 = 0xa5;

impl Arena {
    /// Fills `len` bytes at `gpa` with canaries.
    pub fn new(memory: &GuestMemory, gpa: u64, len: usize) -> Self {
        memory.write(gpa, &vec![CANARY; len]);
        Self {
            memory: memory.clone(),
            gpa,
            expected: vec![CANARY; len],
            lent: BTreeMap::new(),
        }
    }

    fn offset(&self, gpa: u64) -> usize {
        usize::try_from(gpa - self.gpa).expect("an offset fits")
    }

    /// Writes as the driver.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let at = self.offset(gpa);
        self.expected[at..at + bytes.len()].copy_from_slice(bytes);
        self.memory.write(gpa, bytes);
    }

    /// Lets the device write `len` bytes at `gpa`.
    pub fn lend(&mut self, gpa: u64, len: usize) {
        self.lent.insert(gpa, len);
    }

    /// Ends a loan: the bytes are the driver's again, as they are now.
    pub fn take_back(&mut self, gpa: u64) -> Vec<u8> {
        let len = self.lent.remove(&gpa).expect("the buffer was lent");
        let bytes = self.memory.read_vec(gpa, len);
        let at = self.offset(gpa);
        self.expected[at..at + len].copy_from_slice(&bytes);
        bytes
    }

    /// Checks that the device wrote only where it may.
    ///
    /// # Panics
    ///
    /// If it wrote elsewhere, with the first address.
    pub fn check(&self) {
        let now = self.memory.read_vec(self.gpa, self.expected.len());
        let end = self.gpa + u64::try_from(now.len()).expect("a length fits");
        let mut from = self.gpa;
        for (gpa, len) in self.lent.iter().map(|(&gpa, &len)| (gpa, len)).chain([(end, 0)]) {
            let (start, stop) = (self.offset(from), self.offset(gpa));
            let differs = (start..stop).find(|&at| now[at] != self.expected[at]);
            if let (false, Some(at)) = (now[start..stop] == self.expected[start..stop], differs) {
                panic!(
                    "the device wrote {:#04x} at {:#x}, outside every lent buffer",
                    now[at],
                    self.gpa + at as u64
                );
            }
            from = gpa + u64::try_from(len).expect("a length fits");
        }
    }
}

/// How header and frame are cut into buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The header has a descriptor of its own.
    OwnDescriptor,
    /// Header and frame share one buffer.
    WithData,
    /// The header is cut in two, the frame follows in a third.
    SplitHeader,
    /// The header ends in the buffer where the frame begins.
    SplitAcross,
    /// Single bytes of header, then the frame in three pieces.
    Scattered,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 5] = [
        Self::OwnDescriptor,
        Self::WithData,
        Self::SplitHeader,
        Self::SplitAcross,
        Self::Scattered,
    ];

    /// The lengths of the buffers for `total` bytes, header included.
    fn cuts(self, total: usize) -> Vec<usize> {
        match self {
            Self::OwnDescriptor => vec![12, total - 12],
            Self::WithData => vec![total],
            Self::SplitHeader => vec![5, 7, total - 12],
            Self::SplitAcross => vec![7, 25, total - 32],
            Self::Scattered => {
                let third = (total - 12) / 3;
                vec![1, 1, 10, third, third, total - 12 - 2 * third]
            }
        }
    }
}

/// Whether a chain lies in the ring's table or in one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// In the ring's table.
    Direct,
    /// In a table of its own.
    Indirect,
}

/// Guest memory for one chain: buffers with canaries between them, then room for an indirect table.
const SLOT_BYTES: u64 = 4096;
const SLOT_TABLE_AT: u64 = 3584;
const SLOT_GAP: u64 = 37; // odd, so that buffers are unaligned

fn place_segments(slot: u64, cuts: &[usize], access: Access) -> Vec<Segment> {
    let mut gpa = slot + SLOT_GAP;
    let mut segments = Vec::with_capacity(cuts.len());
    for &cut in cuts {
        let len = u32::try_from(cut).expect("a buffer is small");
        segments.push(Segment { gpa, len, access });
        gpa += u64::from(len) + SLOT_GAP;
    }
    assert!(gpa <= slot + SLOT_TABLE_AT, "the chain fits its slot");
    segments
}

fn table_of(slot: u64, form: Form) -> Table {
    match form {
        Form::Direct => Table::Direct,
        Form::Indirect => Table::Indirect((slot + SLOT_TABLE_AT).next_multiple_of(16)),
    }
}

/// How much memory `slots` chains need.
pub fn arena_bytes(slots: u16) -> u64 {
    u64::from(slots) * SLOT_BYTES
}

fn arena_and_slots(memory: &GuestMemory, gpa: u64, slots: u16) -> (Arena, VecDeque<u64>) {
    let len = usize::try_from(arena_bytes(slots)).expect("an arena fits");
    (
        Arena::new(memory, gpa, len),
        (0..slots).map(|slot| gpa + arena_bytes(slot)).collect(),
    )
}

/// The guest's transmit queue.
#[derive(Debug)]
pub struct Tx {
    /// The ring below.
    pub queue: SplitQueue,
    arena: Arena,
    slots: VecDeque<u64>,
    in_flight: VecDeque<u64>,
}

impl Tx {
    /// Makes a queue whose `slots` buffers start at `gpa`.
    pub fn new(queue: SplitQueue, memory: &GuestMemory, gpa: u64, slots: u16) -> Self {
        let (arena, slots) = arena_and_slots(memory, gpa, slots);
        Self {
            queue,
            arena,
            slots,
            in_flight: VecDeque::new(),
        }
    }

    /// Whether another chain of any layout can be offered now.
    pub fn has_room(&self) -> bool {
        !self.slots.is_empty() && self.queue.free_descriptors() >= 6
    }

    /// Offers one frame; it leaves after [`SplitQueue::submit`].
    ///
    /// # Panics
    ///
    /// If there is no room.
    pub fn offer(&mut self, frame: &[u8], layout: Layout, form: Form) {
        let slot = self.slots.pop_front().expect("a free transmit slot");
        let bytes = [&[0; HEADER_BYTES], frame].concat();
        let segments = place_segments(slot, &layout.cuts(bytes.len()), Access::Read);
        let mut rest = bytes.as_slice();
        for segment in &segments {
            let (now, later) = rest.split_at(usize::try_from(segment.len).expect("a length fits"));
            self.arena.write(segment.gpa, now);
            rest = later;
        }
        let table = table_of(slot, form);
        if let Table::Indirect(at) = table {
            // The driver's own bytes from here on; `offer` writes the same memory.
            self.arena.lend(at, segments.len() * 16);
        }
        self.queue.offer(&segments, table);
        if let Table::Indirect(at) = table {
            self.arena.take_back(at);
        }
        self.in_flight.push_back(slot);
    }

    /// Offers one frame and shows it to the device.
    ///
    /// # Panics
    ///
    /// As [`offer`](Self::offer).
    pub fn send(&mut self, frame: &[u8], layout: Layout, form: Form) {
        self.offer(frame, layout, form);
        self.queue.submit();
    }

    /// Takes back what the device has sent and returns how many frames that was.
    ///
    /// # Panics
    ///
    /// If a used length is not 0: the device wrote nothing.
    pub fn reclaim(&mut self) -> usize {
        let mut count = 0;
        while let Some(used) = self.queue.take_used() {
            assert_eq!(used.len.unwrap_or(0), 0, "the used length of a transmitted chain");
            self.slots
                .push_back(self.in_flight.pop_front().expect("one slot a chain"));
            count += 1;
        }
        count
    }

    /// Waits, as an interrupt-driven guest, until the device has given back every chain.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn drain(&mut self) {
        while self.queue.outstanding() > 0 {
            assert!(
                self.queue.wait_used(PATIENCE),
                "{} frames were never sent",
                self.queue.outstanding()
            );
            self.reclaim();
        }
    }

    /// Checks that the device wrote to no transmit buffer and to nothing around them.
    pub fn check(&self) {
        self.arena.check();
    }
}

#[derive(Debug)]
struct Posted {
    slot: u64,
    segments: Vec<Segment>,
}

/// The guest's receive queue.
#[derive(Debug)]
pub struct Rx {
    /// The ring below.
    pub queue: SplitQueue,
    arena: Arena,
    slots: VecDeque<u64>,
    posted: VecDeque<Posted>,
    mergeable: bool,
    /// Buffers the device gave back empty, because a frame did not fit.
    pub dropped: u64,
}

impl Rx {
    /// Makes a queue whose `slots` buffers start at `gpa`.
    pub fn new(queue: SplitQueue, memory: &GuestMemory, gpa: u64, slots: u16) -> Self {
        let (arena, slots) = arena_and_slots(memory, gpa, slots);
        Self {
            queue,
            arena,
            slots,
            posted: VecDeque::new(),
            mergeable: false,
            dropped: 0,
        }
    }

    /// Takes eventfds and features of ring `index`.
    pub fn attach(&mut self, session: &Session, index: u32) {
        self.queue.attach(session, index);
        self.mergeable = session.has(feature::MRG_RXBUF);
    }

    /// Offers one buffer of `len` bytes, header included; the device sees it after [`SplitQueue::submit`].
    ///
    /// # Panics
    ///
    /// If there is no room.
    pub fn post(&mut self, len: usize, layout: Layout, form: Form) {
        let slot = self.slots.pop_front().expect("a free receive slot");
        let segments = place_segments(slot, &layout.cuts(len), Access::Write);
        for segment in &segments {
            let len = usize::try_from(segment.len).expect("a length fits");
            self.arena.write(segment.gpa, &vec![CANARY; len]);
            self.arena.lend(segment.gpa, len);
        }
        let table = table_of(slot, form);
        if let Table::Indirect(at) = table {
            self.arena.lend(at, segments.len() * 16);
        }
        self.queue.offer(&segments, table);
        if let Table::Indirect(at) = table {
            self.arena.take_back(at);
        }
        self.posted.push_back(Posted { slot, segments });
    }

    /// Offers `count` buffers and shows them to the device.
    ///
    /// # Panics
    ///
    /// As [`post`](Self::post).
    pub fn fill(&mut self, count: usize, len: usize, layout: Layout, form: Form) {
        for _ in 0..count {
            self.post(len, layout, form);
        }
        self.queue.submit();
    }

    /// How many buffers the device holds.
    pub fn posted(&self) -> usize {
        self.posted.len()
    }

    /// Takes one used buffer: how many bytes it holds by the device's word, and its bytes.
    fn take_buffer(&mut self) -> Option<(usize, Vec<u8>)> {
        let used = self.queue.take_used()?;
        let posted = self.posted.pop_front().expect("one slot a chain");
        let mut bytes = Vec::new();
        for segment in &posted.segments {
            bytes.extend(self.arena.take_back(segment.gpa));
        }
        self.slots.push_back(posted.slot);
        let len = used
            .len
            .map_or(bytes.len(), |len| usize::try_from(len).expect("a length fits"));
        assert!(
            len <= bytes.len(),
            "the device says it wrote {len} bytes into a buffer of {}",
            bytes.len()
        );
        Some((len, bytes))
    }

    /// Takes the next received frame, merging buffers if that was negotiated.
    ///
    /// # Panics
    ///
    /// If a length or `num_buffers` is wrong, or the rest of a merged frame is missing.
    pub fn try_recv(&mut self) -> Option<Vec<u8>> {
        let (len, bytes) = loop {
            match self.take_buffer()? {
                (0, _) => self.dropped += 1,
                buffer => break buffer,
            }
        };
        assert!(
            len >= HEADER_BYTES,
            "a used length of {len} does not cover the header"
        );
        let buffers = u16::from_le_bytes([bytes[NUM_BUFFERS_AT], bytes[NUM_BUFFERS_AT + 1]]);
        assert!(
            buffers == 1 || (self.mergeable && buffers > 1),
            "num_buffers is {buffers}"
        );
        assert_eq!(
            bytes[..NUM_BUFFERS_AT],
            [0; NUM_BUFFERS_AT],
            "no offload was negotiated"
        );
        let (mut filled, mut capacity) = (len, bytes.len());
        let mut frame = bytes[HEADER_BYTES..len].to_vec();
        for _ in 1..buffers {
            assert_eq!(filled, capacity, "every merged buffer but the last is full");
            let (len, bytes) = self
                .take_buffer()
                .expect("all buffers of a merged frame are used at once");
            frame.extend_from_slice(&bytes[..len]);
            (filled, capacity) = (len, bytes.len());
        }
        Some(frame)
    }

    /// Waits for the next frame as an interrupt-driven guest.
    ///
    /// # Panics
    ///
    /// If none comes, or as [`try_recv`](Self::try_recv).
    pub fn recv(&mut self) -> Vec<u8> {
        loop {
            if let Some(frame) = self.try_recv() {
                return frame;
            }
            assert!(self.queue.wait_used(PATIENCE), "no frame reached the guest");
        }
    }

    /// Checks that the device wrote only into buffers it holds.
    pub fn check(&self) {
        self.arena.check();
    }
}
