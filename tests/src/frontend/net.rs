//! The guest's network driver on two split rings: frames with their 12-byte header, in every layout.
//!
//! ```text
//! Tx::offer ──header + frame, cut into buffers──▶ SplitQueue ──▶ back end ──▶ wire
//! Rx::post  ──empty buffers───────────────────▶ SplitQueue ──▶ back end ◀── wire
//! Rx::try_recv ◀──header checked, buffers merged── take_used
//! ```
//!
//! It panics, naming the rule, when the device breaks one: used length, `num_buffers`, a byte outside the buffers
//! it holds.
//!
//! Read with: virtio 1.2 §5.1.6 (network device operation).

use std::collections::VecDeque;

use super::PATIENCE;
use super::arena::{Arena, CANARY};
use super::driver::{Access, Segment, SplitQueue, Table};
use super::memory::GuestMemory;
use super::vmm::{Session, feature};

/// `virtio_net_hdr` with `num_buffers`, the form of virtio 1 (virtio 1.2 §5.1.6).
pub const HEADER_BYTES: usize = 12;
const NUM_BUFFERS_AT: usize = 10;

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
