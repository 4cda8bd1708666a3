//! The product's igb driver on the card model in one process: no socket, no thread, time in the test's hands.
//!
//! ```text
//! Tx, Rx (guest) ──▶ lane ──▶ igb driver ──registers──▶ Card82576 ──Bus──▶ the map's IOVAs
//! ```
//!
//! The map stands on the fake IOMMU, which is stricter than the kernel; the card reaches memory by IOVA only, and
//! reports every liberty the driver takes.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use queues::clock::Clock;
use queues::lane::{Lane, LaneSetup, LaneStats, MissingMemory};
use queues::nic::igb::{Igb, IgbSetup, RssKey};
use queues::nic::{Nic, NicError};
use queues::virtq::{Virtq, WakeUps};
use vfio_glue::address::{FrontendAddress, GuestAddress, Iova};
use vfio_glue::iommu::DeviceAddress;
use vfio_glue::iommu::fake::FakeKernel;
use vfio_glue::iommu::software::SoftwareBus;
use vfio_glue::map::MemoryMap;
use vfio_glue::memory::{HostRange, RegionSpec, Table, VirtqMemory};
use vfio_glue::pci::{HostEvent, PciAddress, PciError, PciFunction, Registers};

use crate::card::{BAR0_LEN_BYTES, Bus, BusFault, Card82576, DriverUse, Options, RangeKind, Signal, VECTORS};
use crate::frontend::driver::SplitQueue;
use crate::frontend::memory::{GuestMemory, Plan};
use crate::frontend::vmm::RingPlace;

/// The card's own address.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// The key of the card's hash: that of Microsoft's verification suite, whose hashes are published.
pub const RSS_KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];
/// The guest's memory: rings first, arenas from [`RX_ARENA`] and [`TX_ARENA`] on.
pub const GUEST_BASE: u64 = 0x10_0000;
/// How much of it there is.
pub const GUEST_LEN: u64 = 8 << 20;
/// Where receive buffers are.
pub const RX_ARENA: u64 = GUEST_BASE + (1 << 20);
/// Where transmit buffers are.
pub const TX_ARENA: u64 = GUEST_BASE + (4 << 20);

/// Frames the card has put on the wire.
pub type Sent = Arc<Mutex<Vec<Vec<u8>>>>;

/// Everything, wired up.
pub struct Bench {
    /// The kernel's books.
    pub kernel: FakeKernel,
    /// The map.
    pub map: Arc<MemoryMap>,
    /// The card.
    pub card: Arc<Mutex<Card82576>>,
    /// What it sent.
    pub sent: Sent,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The guest's table.
    pub table: Arc<Table>,
    /// The driver.
    pub nic: Igb,
    now: Now,
}

/// How long the driver has waited so far, as a card's clock counts it.
type Now = Arc<Mutex<Duration>>;

impl Bench {
    /// Brings the driver up on a card with `options`, the link still negotiating.
    ///
    /// # Panics
    ///
    /// If the driver does not come up.
    pub fn new(options: Options) -> Self {
        Self::with_pairs(options, 1)
    }

    /// The same with `pairs` queue pairs, spread over by [`RSS_KEY`].
    ///
    /// # Panics
    ///
    /// If the driver does not come up.
    pub fn with_pairs(options: Options, pairs: u16) -> Self {
        let kernel = FakeKernel::default();
        let map = MemoryMap::new("main", kernel.iommu());
        let slot = Slot::plug(&kernel, &map, 1, options);
        let nic = slot.open_with(pairs);

        let memory = GuestMemory::new(&[Plan::new(GUEST_BASE, GUEST_LEN)]).expect("guest memory");
        let regions = memory.regions().into_iter().map(|region| {
            let announced = region.announcement();
            let file = region.fd().try_clone_to_owned().expect("a descriptor");
            RegionSpec {
                guest: GuestAddress(announced.gpa),
                frontend: FrontendAddress(announced.user),
                len: announced.len,
                file: Arc::new(file.into()),
                file_offset: announced.file_offset,
            }
        });
        let table = map.add("vm0", regions.collect()).expect("the memory is mapped");
        Self {
            kernel,
            map,
            now: slot.now,
            card: slot.card,
            sent: slot.sent,
            memory,
            table,
            nic,
        }
    }

    /// How long the driver has waited for the card so far.
    ///
    /// # Panics
    ///
    /// If a test panicked while it held the clock.
    pub fn waited(&self) -> Duration {
        *self.now.lock().expect("no panic")
    }

    /// Plugs another card into PCI bus `bus`, for the same map.
    pub fn plug(&self, bus: u8, options: Options) -> Slot {
        Slot::plug(&self.kernel, &self.map, bus, options)
    }

    /// The card, for the moment.
    ///
    /// # Panics
    ///
    /// If a test panicked while it held it.
    pub fn card(&self) -> MutexGuard<'_, Card82576> {
        self.card.lock().expect("no panic")
    }

    /// Lets autonegotiation finish.
    ///
    /// # Panics
    ///
    /// If the link does not come up.
    pub fn wait_for_link(&mut self) {
        self.card().advance(Duration::from_millis(600));
        assert!(self.nic.link().is_up(), "the link is up after autonegotiation");
    }

    /// An empty ring of `size` at `place` KiB into the guest's memory.
    pub fn ring(&self, size: u16, place: u64) -> SplitQueue {
        let at = GUEST_BASE + 1024 * place;
        let place = RingPlace {
            size,
            desc: at,
            avail: at + 0x2000,
            used: at + 0x3000,
        };
        SplitQueue::new(&self.memory, place)
    }

    /// The driver's receive lane over `ring`.
    ///
    /// # Panics
    ///
    /// If the card's queue does not start.
    pub fn rx_lane(&mut self, ring: &SplitQueue, stats: &Arc<LaneStats>) -> Box<dyn Lane> {
        self.rx_lane_of(0, ring, stats)
    }

    /// The receive lane of pair `pair` over `ring`.
    ///
    /// # Panics
    ///
    /// If the card's queue does not start.
    pub fn rx_lane_of(&mut self, pair: u16, ring: &SplitQueue, stats: &Arc<LaneStats>) -> Box<dyn Lane> {
        let setup = self.setup(ring, stats);
        self.nic.rx_lane(pair, setup).expect("the queue starts")
    }

    /// The driver's transmit lane over `ring`.
    ///
    /// # Panics
    ///
    /// If the card's queue does not start.
    pub fn tx_lane(&mut self, ring: &SplitQueue, stats: &Arc<LaneStats>) -> Box<dyn Lane> {
        self.tx_lane_of(0, ring, stats)
    }

    /// The transmit lane of pair `pair` over `ring`.
    ///
    /// # Panics
    ///
    /// If the card's queue does not start.
    pub fn tx_lane_of(&mut self, pair: u16, ring: &SplitQueue, stats: &Arc<LaneStats>) -> Box<dyn Lane> {
        let setup = self.setup(ring, stats);
        self.nic.tx_lane(pair, setup).expect("the queue starts")
    }

    /// What a lane over `ring` is made from.
    ///
    /// # Panics
    ///
    /// If the ring is not in guest memory.
    pub fn setup(&mut self, ring: &SplitQueue, stats: &Arc<LaneStats>) -> LaneSetup {
        LaneSetup {
            link_up: self.nic.link().is_up(),
            ..self.setup_at(ring.place(), ring.used_idx(), stats)
        }
    }

    /// The same for a ring at `place` of which `used` entries were used, without a link.
    ///
    /// # Panics
    ///
    /// If the ring is not in guest memory.
    pub fn setup_at(&self, place: RingPlace, used: u16, stats: &Arc<LaneStats>) -> LaneSetup {
        let area = |at: u64, len: usize| -> HostRange {
            self.table
                .host_range(GuestAddress(at), len)
                .expect("guest memory")
        };
        let memory = VirtqMemory::new(
            place.size.into(),
            area(place.desc, VirtqMemory::desc_bytes(place.size)),
            area(place.avail, VirtqMemory::avail_bytes(place.size)),
            area(place.used, VirtqMemory::used_bytes(place.size)),
        );
        let (virtq, _) = Virtq::start(memory.expect("a queue"), used, WakeUps::ByFlag);
        LaneSetup {
            name: "vm0".to_owned(),
            virtq,
            table: Arc::clone(&self.table),
            header_len: 12,
            max_frame: 1518,
            kick: None,
            call: None,
            err: None,
            stats: Arc::clone(stats),
            map: Arc::clone(&self.map),
            link_up: false,
            missing_memory: MissingMemory::IsBroken,
        }
    }

    /// Whether the map lists guest memory and descriptor rings and nothing else: the proof of zero-copy.
    pub fn maps_only_guest_and_rings(&self) -> bool {
        self.map
            .snapshot()
            .extents
            .iter()
            .all(|extent| !extent.file.contains("vuv-bounce"))
    }
}

/// A card in a slot of the machine, for the driver to open, let go and open again.
pub struct Slot {
    /// Where it is.
    pub address: DeviceAddress,
    /// The card.
    pub card: Arc<Mutex<Card82576>>,
    /// What it sent.
    pub sent: Sent,
    /// What the host has to say.
    pub host: Arc<Host>,
    map: Arc<MemoryMap>,
    now: Now,
}

impl Slot {
    fn plug(kernel: &FakeKernel, map: &Arc<MemoryMap>, bus: u8, options: Options) -> Self {
        let place = PciAddress {
            domain: 0,
            bus,
            device: 0,
            function: 0,
        };
        let address = DeviceAddress::Pci(place);
        let sent = Sent::default();
        let wire = Arc::clone(&sent);
        let bus = MapBus {
            map: Arc::clone(map),
            bus: map.software_bus(),
        };
        let wire = move |frame: &[u8]| wire.lock().expect("no panic").push(frame.to_vec());
        let card = Card82576::with_options(MAC, Box::new(bus), Box::new(wire), options);
        let card = Arc::new(Mutex::new(card));
        let host = Arc::<Host>::default();
        let function = CardFunction {
            name: address.to_string(),
            card: Arc::clone(&card),
            host: Arc::clone(&host),
        };
        kernel.plug(&address, Arc::new(function));
        Self {
            address,
            card,
            sent,
            host,
            map: Arc::clone(map),
            now: Now::default(),
        }
    }

    /// The card as a PCI function, to be plugged in some other way.
    pub fn function(&self) -> Arc<dyn PciFunction> {
        Arc::new(CardFunction {
            name: self.address.to_string(),
            card: Arc::clone(&self.card),
            host: Arc::clone(&self.host),
        })
    }

    /// Attaches the card and brings the driver up on it, the link still negotiating.
    ///
    /// # Panics
    ///
    /// If the driver does not come up.
    pub fn open(&self) -> Igb {
        self.open_with(1)
    }

    /// The same with `pairs` queue pairs.
    ///
    /// # Panics
    ///
    /// If the driver does not come up.
    pub fn open_with(&self, pairs: u16) -> Igb {
        self.try_open_with(pairs).expect("the card comes up")
    }

    /// The same, if the driver can.
    ///
    /// # Errors
    ///
    /// The driver's.
    ///
    /// # Panics
    ///
    /// If the card does not attach.
    pub fn try_open_with(&self, pairs: u16) -> Result<Igb, NicError> {
        let device = self.map.attach(&self.address).expect("the card attaches");
        let clock = Arc::new(CardClock {
            card: Arc::clone(&self.card),
            now: Arc::clone(&self.now),
        });
        let setup = IgbSetup {
            mtu: 1500,
            queue_pairs: pairs,
            rss_key: RssKey(RSS_KEY),
        };
        Igb::open(device, setup, clock)
    }
}

/// What a host has to say of one of its cards, and its power over it.
#[derive(Default)]
pub struct Host {
    /// Whom it tells that it wants the card back.
    pub release: Mutex<Option<Box<dyn Signal>>>,
    /// It can reset the card no more.
    pub cannot_reset: AtomicBool,
    /// Vectors that lead somewhere.
    pub vectors: Mutex<BTreeSet<u16>>,
}

/// The map's IOVA space as the card's bus.
struct MapBus {
    map: Arc<MemoryMap>,
    bus: Arc<SoftwareBus>,
}

impl Bus for MapBus {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), BusFault> {
        self.bus.read(Iova::new(iova), buf).map_err(|_| BusFault {
            iova,
            len: buf.len() as u64,
        })
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), BusFault> {
        if self.room(iova) < data.len() as u64 {
            return Err(BusFault {
                iova,
                len: data.len() as u64,
            });
        }
        self.bus.write(Iova::new(iova), data).map_err(|_| BusFault {
            iova,
            len: data.len() as u64,
        })
    }

    fn kind(&self, iova: u64, len: u64) -> RangeKind {
        let extents = self.map.snapshot().extents;
        let holder = extents.iter().find(|extent| {
            iova.checked_sub(extent.iova.raw())
                .is_some_and(|skip| skip < extent.len && len <= extent.len - skip)
        });
        match holder {
            None => RangeKind::Unmapped,
            Some(extent) if extent.file.contains("vuv-rings") => RangeKind::DriverMemory(DriverUse::Rings),
            Some(extent) if extent.file.contains("vuv-bounce") => RangeKind::DriverMemory(DriverUse::Bounce),
            Some(_) => RangeKind::GuestMemory,
        }
    }

    fn room(&self, iova: u64) -> u64 {
        self.bus.room(Iova::new(iova)) as u64
    }
}

/// The card as a PCI function.
struct CardFunction {
    name: String,
    card: Arc<Mutex<Card82576>>,
    host: Arc<Host>,
}

impl CardFunction {
    fn card(&self) -> MutexGuard<'_, Card82576> {
        self.card.lock().expect("no panic")
    }
}

impl PciFunction for CardFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_config(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PciError> {
        self.card().config_read(offset, bytes);
        Ok(())
    }

    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<(), PciError> {
        self.card().config_write(offset, bytes);
        Ok(())
    }

    fn bar(&self, index: u8) -> Result<Arc<dyn Registers>, PciError> {
        assert_eq!(index, 0, "only BAR 0 is wanted");
        Ok(Arc::new(CardRegisters(Arc::clone(&self.card))))
    }

    fn vectors(&self) -> u16 {
        VECTORS.into()
    }

    fn set_vector(&self, vector: u16, event: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        {
            let mut vectors = self.host.vectors.lock().expect("no panic");
            match event {
                Some(_) => vectors.insert(vector),
                None => vectors.remove(&vector),
            };
        }
        let vector = u8::try_from(vector).expect("a vector of the card");
        self.card().set_irq(vector, event.map(signal));
        Ok(())
    }

    fn set_host_event(&self, which: HostEvent, event: Option<BorrowedFd<'_>>) -> Result<bool, PciError> {
        // As of a function on a conventional bus, it never hears of errors.
        if which == HostEvent::Error {
            return Ok(false);
        }
        *self.host.release.lock().expect("no panic") = event.map(signal);
        Ok(true)
    }

    fn reset(&self) -> Result<(), PciError> {
        if self.host.cannot_reset.load(Ordering::Relaxed) {
            return Err(PciError::Reset {
                device: self.name.clone(),
                source: std::io::ErrorKind::Unsupported.into(),
            });
        }
        self.card().reset();
        Ok(())
    }
}

fn signal(event: BorrowedFd<'_>) -> Box<dyn Signal> {
    Box::new(Event(event.try_clone_to_owned().expect("a descriptor")))
}

/// An eventfd the driver waits on.
struct Event(OwnedFd);

impl Signal for Event {
    fn signal(&self) {
        // A full counter is an interrupt that is pending already.
        let _ = rustix::io::write(self.0.as_fd(), &1u64.to_ne_bytes());
    }
}

struct CardRegisters(Arc<Mutex<Card82576>>);

impl Registers for CardRegisters {
    fn read32(&self, offset: u32) -> u32 {
        self.0.lock().expect("no panic").read32(offset)
    }

    fn write32(&self, offset: u32, value: u32) {
        self.0.lock().expect("no panic").write32(offset, value);
    }

    fn len(&self) -> u32 {
        BAR0_LEN_BYTES
    }
}

/// Time passes for the card when the driver waits, and at no other moment.
struct CardClock {
    card: Arc<Mutex<Card82576>>,
    now: Now,
}

impl Clock for CardClock {
    fn now(&self) -> Duration {
        *self.now.lock().expect("no panic")
    }

    fn sleep(&self, duration: Duration) {
        *self.now.lock().expect("no panic") += duration;
        self.card.lock().expect("no panic").advance(duration);
    }
}
