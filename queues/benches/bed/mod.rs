//! What the benches run on: the product's igb driver and lanes over a guest's memory and a card made of plain memory.
//!
//! ```text
//! Bed::offer ──▶ virtqueue ──▶ lane ──▶ igb ring ──▶ memory        Bed::finish sets the done bits there
//! ```
//!
//! The card does nothing by itself: its registers are words of memory, and [`Bed::finish`] marks as done what the driver
//! has posted. So between two calls of [`Bed::pass`] a bench sees the driver's own work and nothing else.

#![allow(dead_code, reason = "each bench uses its own part of the bed")]

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use queues::clock::Clock;
use queues::lane::{Lane, LaneSetup, LaneStats, MissingMemory, Progress};
use queues::net_header::MODERN_LEN;
use queues::nic::igb::{Igb, IgbSetup, RssKey};
use queues::nic::{Link, Nic};
use queues::virtq::{Virtq, WakeUps};
use rustix::fs::{MemfdFlags, memfd_create};
use vfio_glue::address::{FrontendAddress, GuestAddress, Iova};
use vfio_glue::iommu::software::{SoftwareBus, SoftwareIommu};
use vfio_glue::iommu::{DeviceAddress, Iommu, IommuError, IommuKind, MapRequest, MappedBy};
use vfio_glue::map::MemoryMap;
use vfio_glue::memory::{RegionSpec, VirtqMemory};
use vfio_glue::pci::{HostEvent, PciError, PciFunction, Registers};

/// Frames of one burst.
pub(crate) const BURST: u16 = 32;
/// Bytes of each frame, header and frame check sequence not included.
const FRAME: u32 = 64;
const SIZE: u16 = 256;
/// Chains the guest goes round with, two descriptors each.
const CHAINS: u16 = SIZE / 2;

const BASE: u64 = 0x10_0000;
const LEN: u64 = 1 << 20;
const AVAIL: u64 = BASE + 0x2000;
const USED: u64 = BASE + 0x3000;
const TABLES: u64 = BASE + 0x5000;
const BUFFERS: u64 = BASE + 0x1_0000;
const BUFFER_BYTES: u32 = 2048;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// How the guest builds its chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Header and frame in one buffer.
    One,
    /// Header, frame.
    Two,
    /// One buffer, by an indirect table.
    IndirectOne,
    /// Two buffers, by an indirect table.
    IndirectTwo,
}

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Guest to wire.
    Tx,
    /// Wire to guest.
    Rx,
}

/// A lane in its steady state.
pub(crate) struct Bed {
    lane: Box<dyn Lane>,
    way: Way,
    pair: u16,
    card: Arc<PlainCard>,
    bus: Arc<SoftwareBus>,
    guest: Arc<File>,
    offered: u16,
    /// The first ring slot that is not done.
    finished: u32,
    stats: Arc<LaneStats>,
    // After the lane: its ring goes back there.
    _nic: Arc<Mutex<Igb>>,
}

/// A card whose pairs beds are made on.
struct Ground {
    card: Arc<PlainCard>,
    map: Arc<MemoryMap>,
    nic: Arc<Mutex<Igb>>,
}

impl Ground {
    fn new(pairs: u16) -> Self {
        let card = Arc::new(PlainCard::default());
        let map = MemoryMap::new("main", Box::new(PlainIommu(Arc::clone(&card))));
        let address = DeviceAddress::VfioUser("plain".into());
        let device = map.attach(&address).expect("it attaches");
        let setup = IgbSetup {
            mtu: 1500,
            queue_pairs: pairs,
            rss_key: RssKey([0; 40]),
        };
        let mut nic = Igb::open(device, setup, Arc::new(NoTime::default())).expect("it comes up");
        assert_eq!(nic.link(), Link::Up { mbps: 1000 });
        let nic = Arc::new(Mutex::new(nic));
        Self { card, map, nic }
    }
}

impl Bed {
    /// A lane that has passed some bursts: the next pass completes one burst and takes another.
    pub(crate) fn steady(way: Way, shape: Shape) -> Box<Self> {
        Self::steady_on(&Ground::new(1), 0, way, shape)
    }

    /// The same for each of `pairs` queue pairs of one card.
    pub(crate) fn steady_pairs(pairs: u16, way: Way, shape: Shape) -> Vec<Self> {
        let ground = Ground::new(pairs);
        (0..pairs)
            .map(|pair| *Self::steady_on(&ground, pair, way, shape))
            .collect()
    }

    fn steady_on(ground: &Ground, pair: u16, way: Way, shape: Shape) -> Box<Self> {
        let mut bed = Self::new(ground, pair, way, shape);
        bed.offer();
        for _ in 0..6 {
            assert_eq!(bed.lane.poll(), Progress::Moved);
            bed.turn();
        }
        let passed = bed.stats.frames.get();
        bed.pass();
        assert_eq!(
            bed.stats.frames.get() - passed,
            u64::from(BURST),
            "one burst a pass"
        );
        assert_eq!(bed.stats.zero_copy_frames.get(), bed.stats.frames.get());
        bed.turn();
        bed
    }

    fn new(ground: &Ground, pair: u16, way: Way, shape: Shape) -> Box<Self> {
        let Ground { card, map, nic } = ground;
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(LEN).expect("a size");
        let guest = Arc::new(file);
        let region = RegionSpec {
            guest: GuestAddress(BASE),
            frontend: FrontendAddress(BASE),
            len: LEN,
            file: Arc::clone(&guest),
            file_offset: 0,
        };
        let owner = format!("vm{pair}");
        let table = map.add(&owner, vec![region]).expect("it is mapped");
        let area = |at, len| table.host_range(GuestAddress(at), len).expect("guest memory");
        let memory = VirtqMemory::new(
            SIZE.into(),
            area(BASE, VirtqMemory::desc_bytes(SIZE)),
            area(AVAIL, VirtqMemory::avail_bytes(SIZE)),
            area(USED, VirtqMemory::used_bytes(SIZE)),
        )
        .expect("a queue");
        let stats = Arc::<LaneStats>::default();
        let setup = LaneSetup {
            name: "bench".to_owned(),
            virtq: Virtq::start(memory, 0, WakeUps::ByFlag).0,
            table,
            header_len: MODERN_LEN,
            max_frame: 1518,
            kick: None,
            call: None,
            err: None,
            stats: Arc::clone(&stats),
            map: Arc::clone(map),
            link_up: true,
            missing_memory: MissingMemory::IsBroken,
        };
        let lane = {
            let mut nic = nic.lock().expect("no panic");
            match way {
                Way::Tx => nic.tx_lane(pair, setup),
                Way::Rx => nic.rx_lane(pair, setup),
            }
        };
        let bed = Self {
            lane: lane.expect("it starts"),
            way,
            pair,
            card: Arc::clone(card),
            bus: map.software_bus(),
            guest,
            offered: 0,
            finished: 0,
            stats,
            _nic: Arc::clone(nic),
        };
        bed.build_chains(shape);
        Box::new(bed)
    }

    /// What is measured: one pass of the lane.
    #[inline(always)]
    pub(crate) fn pass(&mut self) {
        self.lane.poll();
    }

    /// Frames the lane has moved.
    pub(crate) fn frames(&self) -> u64 {
        self.stats.frames.get()
    }

    /// What happens between two passes: the card is done with what it has, the guest offers a burst.
    pub(crate) fn turn(&mut self) {
        self.finish();
        self.offer();
    }

    /// The guest offers a burst of chains.
    fn offer(&mut self) {
        for _ in 0..BURST {
            let head = 2 * (self.offered % CHAINS);
            let slot = u64::from(self.offered % SIZE);
            self.write(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
            self.offered = self.offered.wrapping_add(1);
        }
        self.write(AVAIL + 2, &self.offered.to_le_bytes());
    }

    /// The card is done with all it was told of.
    fn finish(&mut self) {
        let block: u32 = match self.way {
            Way::Tx => 0xe000,
            Way::Rx => 0xc000,
        };
        let block = block + 0x40 * u32::from(self.pair);
        let word = |offset: u32| self.card.read32(block + offset);
        let base = u64::from(word(0x00)) | u64::from(word(0x04)) << 32;
        let slots = word(0x08) / 16;
        let tail = word(0x18);
        let report: u64 = match self.way {
            Way::Tx => 1 << 32,
            Way::Rx => u64::from(FRAME) << 32 | 0b11,
        };
        while self.finished != tail {
            let at = Iova::new(base + 16 * u64::from(self.finished) + 8);
            self.bus.write(at, &report.to_le_bytes()).expect("a ring");
            self.finished = (self.finished + 1) % slots;
        }
    }

    fn build_chains(&self, shape: Shape) {
        let (flags, bytes) = match self.way {
            Way::Tx => (0, MODERN_LEN + FRAME),
            Way::Rx => (WRITE, BUFFER_BYTES),
        };
        for chain in 0..CHAINS {
            let at = BUFFERS + u64::from(BUFFER_BYTES) * u64::from(chain);
            let table = TABLES + 32 * u64::from(chain);
            let direct = BASE + 16 * 2 * u64::from(chain);
            let place = match shape {
                Shape::One | Shape::Two => direct,
                Shape::IndirectOne | Shape::IndirectTwo => table,
            };
            let next = if place == direct { 2 * chain + 1 } else { 1 };
            let table_bytes = match shape {
                Shape::One | Shape::IndirectOne => {
                    self.descriptor(place, at, bytes, flags, 0);
                    16
                }
                Shape::Two | Shape::IndirectTwo => {
                    self.descriptor(place, at, MODERN_LEN, flags | NEXT, next);
                    let after = at + u64::from(MODERN_LEN);
                    self.descriptor(place + 16, after, bytes - MODERN_LEN, flags, 0);
                    32
                }
            };
            if place == table {
                self.descriptor(direct, table, table_bytes, INDIRECT, 0);
            }
        }
    }

    fn descriptor(&self, place: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let tail = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.write(place, &addr.to_le_bytes());
        self.write(place + 8, &tail.to_le_bytes());
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        self.guest.write_all_at(bytes, at - BASE).expect("guest memory");
    }
}

/// Registers that are plain memory, in which a card of silicon seems to have come up at once.
struct PlainCard {
    registers: Vec<AtomicU32>,
    config: Mutex<[u8; 256]>,
}

const BAR_BYTES: u32 = 0x2_0000;
const STATUS: u32 = 0x0008;
const EECD: u32 = 0x0010;
const MDIC: u32 = 0x0020;

impl Default for PlainCard {
    fn default() -> Self {
        let mut config = [0; 256];
        // An 82576.
        config[..4].copy_from_slice(&[0x86, 0x80, 0xc9, 0x10]);
        Self {
            registers: (0..BAR_BYTES / 4).map(|_| AtomicU32::new(0)).collect(),
            config: Mutex::new(config),
        }
    }
}

impl Registers for PlainCard {
    fn read32(&self, offset: u32) -> u32 {
        let word = self.registers.get(offset as usize / 4);
        let word = word.map_or(u32::MAX, |word| word.load(Ordering::Relaxed));
        match offset {
            STATUS => 1 << 1 | 1 << 7,
            EECD => 1 << 9,
            MDIC => word | 1 << 28,
            _ => word,
        }
    }

    fn write32(&self, offset: u32, value: u32) {
        if let Some(word) = self.registers.get(offset as usize / 4) {
            word.store(value, Ordering::Release);
        }
    }

    fn len(&self) -> u32 {
        BAR_BYTES
    }
}

struct PlainFunction(Arc<PlainCard>);

impl PciFunction for PlainFunction {
    fn name(&self) -> &str {
        "plain"
    }

    fn read_config(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PciError> {
        let config = self.0.config.lock().expect("no panic");
        bytes.copy_from_slice(&config[usize::from(offset)..][..bytes.len()]);
        Ok(())
    }

    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<(), PciError> {
        let mut config = self.0.config.lock().expect("no panic");
        config[usize::from(offset)..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn bar(&self, _index: u8) -> Result<Arc<dyn Registers>, PciError> {
        Ok(Arc::<PlainCard>::clone(&self.0))
    }

    fn vectors(&self) -> u16 {
        8
    }

    fn set_vector(&self, _vector: u16, _event: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        Ok(())
    }

    fn set_host_event(&self, _which: HostEvent, _event: Option<BorrowedFd<'_>>) -> Result<bool, PciError> {
        Ok(false)
    }

    fn reset(&self) -> Result<(), PciError> {
        Ok(())
    }
}

/// No IOMMU, and one device.
struct PlainIommu(Arc<PlainCard>);

impl Iommu for PlainIommu {
    fn kind(&self) -> IommuKind {
        SoftwareIommu.kind()
    }

    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError> {
        SoftwareIommu.usable_ranges()
    }

    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError> {
        SoftwareIommu.map(request)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        SoftwareIommu.unmap(iova, len)
    }

    fn attach(&mut self, _device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError> {
        Ok(Arc::new(PlainFunction(Arc::clone(&self.0))))
    }

    fn detach(&mut self, _device: &DeviceAddress) -> Result<(), IommuError> {
        Ok(())
    }

    fn pins_now(&self) -> bool {
        false
    }
}

/// A clock that goes only while somebody waits by it.
#[derive(Default)]
struct NoTime(Mutex<Duration>);

impl Clock for NoTime {
    fn now(&self) -> Duration {
        *self.0.lock().expect("no panic")
    }

    fn sleep(&self, duration: Duration) {
        *self.0.lock().expect("no panic") += duration;
    }
}
