//! For unit tests: a guest's memory with one queue in it, and card queues that do what a test says.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, memfd_create};
use vfio_glue::address::{FrontendAddress, GuestAddress, Iova};
use vfio_glue::iommu::software::SoftwareIommu;
use vfio_glue::map::{Change, MemoryMap};
use vfio_glue::memory::{Hit, RegionSpec, Table, TableHint, VirtqMemory};

use crate::lane::{LaneSetup, LaneStats, MissingMemory};
use crate::nic::{NicError, Received, Ring, RxRing, Segment, Transfer, TxRing, Verdict};
use crate::virtq::{Virtq, WakeUps};

/// Where the guest's memory starts.
pub(crate) const BASE: u64 = 0x10_0000;
/// How long it is: buffers from `BASE + BUFFERS` on.
pub(crate) const LEN: u64 = 1 << 20;
/// A second region, right after the first for the guest, elsewhere for the card.
pub(crate) const SECOND: u64 = BASE + LEN;
const DESC: u64 = BASE;
const AVAIL: u64 = BASE + 0x8000;
const USED: u64 = BASE + 0xa000;
pub(crate) const BUFFERS: u64 = 0x1_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A guest with one queue.
pub(crate) struct Guest {
    pub(crate) map: Arc<MemoryMap>,
    pub(crate) table: Arc<Table>,
    pub(crate) size: u16,
    offered: u16,
}

impl Guest {
    pub(crate) fn with_queue(size: u16) -> Self {
        let map = MemoryMap::new("main", Box::new(SoftwareIommu));
        let region = |guest: u64| -> RegionSpec {
            let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(LEN).unwrap();
            let (guest, frontend) = (GuestAddress(guest), FrontendAddress(guest));
            RegionSpec {
                guest,
                frontend,
                len: LEN,
                file: Arc::new(file),
                file_offset: 0,
            }
        };
        // The one for the guest's upper addresses gets the lower IOVAs: contiguous for the guest, not for a card.
        let table = map.add("vm0", vec![region(SECOND), region(BASE)]).unwrap();
        Self {
            map,
            table,
            size,
            offered: 0,
        }
    }

    /// The place of the table where `at` is.
    pub(crate) fn hit(&self, at: u64) -> Hit<'_> {
        let mut hint = TableHint::default();
        self.table.lookup(&mut hint, GuestAddress(at), 1).unwrap();
        self.table.hit(&hint).unwrap()
    }

    pub(crate) fn virtq(&self) -> Virtq {
        Virtq::start(self.memory(), self.used_idx(), WakeUps::ByFlag).0
    }

    pub(crate) fn memory(&self) -> VirtqMemory {
        let area = |at: u64, len: usize| self.table.host_range(GuestAddress(at), len).unwrap();
        VirtqMemory::new(
            self.size.into(),
            area(DESC, VirtqMemory::desc_bytes(self.size)),
            area(AVAIL, VirtqMemory::avail_bytes(self.size)),
            area(USED, VirtqMemory::used_bytes(self.size)),
        )
        .unwrap()
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let range = self.table.host_range(GuestAddress(at), bytes.len()).unwrap();
        assert_eq!(range.whole().copy_from(bytes), bytes.len());
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.table
            .host_range(GuestAddress(at), len)
            .unwrap()
            .whole()
            .copy_to(&mut bytes);
        bytes
    }

    pub(crate) fn descriptor_at(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    pub(crate) fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(DESC, index, addr, len, flags, next);
    }

    /// Writes a chain of the given buffers into descriptors from `head` on and offers it.
    pub(crate) fn offer_chain(&mut self, head: u16, buffers: &[(u64, u32)], flags: u16) {
        for (index, (addr, len)) in (head..).zip(buffers) {
            let last = usize::from(index - head) + 1 == buffers.len();
            self.descriptor(index, *addr, *len, flags | if last { 0 } else { NEXT }, index + 1);
        }
        self.offer(head);
    }

    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        self.write(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail_idx(self.offered.wrapping_add(1));
    }

    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.offered = index;
        self.write(AVAIL + 2, &index.to_le_bytes());
    }

    pub(crate) fn set_used_idx(&self, index: u16) {
        self.write(USED + 2, &index.to_le_bytes());
    }

    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le_bytes(self.read(USED + 2, 2).try_into().unwrap())
    }

    /// The used entries so far, as (head, length).
    pub(crate) fn used(&self) -> Vec<(u32, u32)> {
        let word = |at: u64| u32::from_le_bytes(self.read(at, 4).try_into().unwrap());
        let entry = |n: u16| USED + 4 + 8 * u64::from(n % self.size);
        (0..self.used_idx())
            .map(|n| (word(entry(n)), word(entry(n) + 4)))
            .collect()
    }

    pub(crate) fn iova(&self, at: u64) -> Iova {
        self.table
            .lookup(&mut TableHint::default(), GuestAddress(at), 1)
            .unwrap()
            .iova
    }

    /// Bytes as a card finds them.
    pub(crate) fn dma_read(&self, segment: Segment) -> Vec<u8> {
        let mut bytes = vec![0; segment.len as usize];
        self.map.software_bus().read(segment.iova, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn lane_setup(&self) -> LaneSetup {
        LaneSetup {
            name: "test".to_owned(),
            virtq: self.virtq(),
            table: Arc::clone(&self.table),
            header_len: 12,
            max_frame: 1518,
            kick: None,
            call: None,
            err: None,
            stats: Arc::new(LaneStats::default()),
            map: Arc::clone(&self.map),
            link_up: true,
            missing_memory: MissingMemory::IsBroken,
        }
    }

    /// A change that takes the upper addresses from the guest, begun.
    pub(crate) fn losing_the_second_region(&self) -> Change {
        let mut wanted = self.table.regions().to_vec();
        wanted.retain(|region| region.guest != GuestAddress(SECOND));
        self.map.change("vm0", &self.table, wanted).unwrap()
    }

    /// Takes all IOVA space, so that nothing more can be mapped.
    pub(crate) fn fill_the_map(&self) {
        for len in [1 << 40, 1 << 34, 1 << 30, 1 << 24, 1 << 20, 1 << 16, 4096] {
            loop {
                let file = File::from(memfd_create("filler", MemfdFlags::CLOEXEC).unwrap());
                file.set_len(len).unwrap();
                let (guest, frontend) = (GuestAddress(0), FrontendAddress(0));
                let spec = RegionSpec {
                    guest,
                    frontend,
                    len,
                    file: Arc::new(file),
                    file_offset: 0,
                };
                if self.map.add("filler", vec![spec]).is_err() {
                    break;
                }
            }
        }
    }

    /// Whether the map holds bounce memory.
    pub(crate) fn has_bounce_memory(&self) -> bool {
        self.map
            .snapshot()
            .extents
            .iter()
            .any(|extent| extent.file.contains("vuv-bounce"))
    }
}

/// What a test sees of a card's queue.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    pub(crate) running: bool,
    /// Frames given to the card and not finished, oldest first.
    pub(crate) sending: VecDeque<Vec<Segment>>,
    /// How many of them the test has finished.
    pub(crate) sent: usize,
    /// Buffers given to the card, oldest first.
    pub(crate) posted: VecDeque<Iova>,
    /// Frames the test has put into the oldest of them.
    pub(crate) filled: VecDeque<Received>,
    pub(crate) flushes: usize,
    pub(crate) stop_fails: bool,
}

/// A card's queue, both kinds, that does what the test says through its [`Wire`].
#[derive(Debug)]
pub(crate) struct FakeRing {
    pub(crate) wire: Arc<Mutex<Wire>>,
    pub(crate) size: usize,
    pub(crate) buffer_bytes: u32,
}

impl FakeRing {
    pub(crate) fn new() -> (Self, Arc<Mutex<Wire>>) {
        let wire = Arc::<Mutex<Wire>>::default();
        (
            Self {
                wire: Arc::clone(&wire),
                size: 64,
                buffer_bytes: 1518,
            },
            wire,
        )
    }
}

/// Puts a frame into the oldest posted buffer that has none.
pub(crate) fn receive(guest: &Guest, wire: &Mutex<Wire>, frame: &[u8]) {
    let mut wire = wire.lock().unwrap();
    let buffer = *wire.posted.get(wire.filled.len()).expect("a posted buffer");
    guest.map.software_bus().write(buffer, frame).unwrap();
    wire.filled.push_back(Received {
        len: u32::try_from(frame.len()).unwrap(),
        verdict: Verdict::Good,
    });
}

impl Ring for FakeRing {
    fn start(&mut self) -> Result<(), NicError> {
        self.wire.lock().unwrap().running = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), NicError> {
        let mut wire = self.wire.lock().unwrap();
        wire.running = false;
        if wire.stop_fails {
            let (device, queue) = ("fake".to_owned(), "0".to_owned());
            return Err(NicError::WillNotStop {
                device,
                queue,
                bound_ms: 10,
            });
        }
        Ok(())
    }

    fn clear(&mut self) {
        let mut wire = self.wire.lock().unwrap();
        assert!(!wire.running, "cleared while it runs");
        wire.sending.clear();
        wire.posted.clear();
        wire.filled.clear();
        wire.sent = 0;
    }

    fn room(&self) -> usize {
        let wire = self.wire.lock().unwrap();
        let descriptors: usize = wire.sending.iter().map(Vec::len).sum();
        self.size - descriptors - wire.posted.len()
    }

    fn flush(&mut self) {
        self.wire.lock().unwrap().flushes += 1;
    }

    fn arm(&mut self) {}

    fn disarm(&mut self) {}

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn acknowledge(&mut self) -> u64 {
        0
    }

    fn transfer(&self) -> Transfer {
        Transfer::Dma
    }
}

impl TxRing for FakeRing {
    const MAX_SEGMENTS: usize = 8;

    fn descriptors_for(&self, segments: usize, _len: u32) -> usize {
        segments
    }

    fn post_whole(&mut self, segment: Segment) -> bool {
        TxRing::post(self, &[segment]);
        true
    }

    fn post(&mut self, segments: &[Segment]) {
        assert!(self.room() >= segments.len(), "posted without room");
        let mut wire = self.wire.lock().unwrap();
        assert!(wire.running, "posted to a stopped queue");
        wire.sending.push_back(segments.to_vec());
    }

    fn reap(&mut self) -> bool {
        let mut wire = self.wire.lock().unwrap();
        if wire.sent == 0 {
            return false;
        }
        wire.sent -= 1;
        wire.sending.pop_front().is_some()
    }

    fn reap_whole(&mut self) -> bool {
        self.reap()
    }
}

impl RxRing for FakeRing {
    fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    fn post(&mut self, buffer: Iova) {
        assert!(self.room() > 0, "posted without room");
        let mut wire = self.wire.lock().unwrap();
        assert!(wire.running, "posted to a stopped queue");
        wire.posted.push_back(buffer);
    }

    fn harvest_usual(&mut self, most_bytes: u32) -> Option<Received> {
        let usual = matches!(
            self.wire.lock().unwrap().filled.front(),
            Some(next) if next.verdict == Verdict::Good && next.len <= most_bytes
        );
        if usual { self.harvest() } else { None }
    }

    fn harvest(&mut self) -> Option<Received> {
        let mut wire = self.wire.lock().unwrap();
        let received = wire.filled.pop_front()?;
        wire.posted.pop_front();
        Some(received)
    }
}
