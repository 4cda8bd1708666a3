//! A card to measure with: the igb driver's other end, in this process, from which no frame leaves the machine.
//!
//! ```text
//! igb driver ──tail──▶ registers ──▶ Ring::run ──done bits──▶ igb driver      payload untouched, on the worker's time
//!                      registers ◀── thread ──▶ Ring::run                     payload copied, on the thread's
//! ```
//!
//! To the driver it is an 82576 whose link is up. Transmit descriptors are done at once; receive descriptors are filled
//! at once with frames of one size, if it was given one. By itself it touches descriptors only, inside the tail write,
//! so that its cost is counted as the driver's. With [`Payload::Copied`] a thread moves the bytes too, through the map's
//! software bus, as a DMA engine would.
//!
//! Registers hold what was written, but for the few below. It checks nothing: the model in `tests` does that.
//!
//! Read with: Intel 82576EB datasheet §7.1, §7.2 (descriptors), §8 (registers).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vfio_glue::address::Iova;
use vfio_glue::iommu::software::SoftwareBus;
use vfio_glue::memory::CardRing;
use vfio_glue::pci::{HostEvent, PciError, PciFunction, Registers};

/// Identity of an 82576, class and the rest left at 0.
const IDENTITY: [u8; 4] = [0x86, 0x80, 0xc9, 0x10];
const CONFIG_BYTES: usize = 256;
const BAR_BYTES: u32 = 0x2_0000;
/// As many as the 82576 has.
const VECTORS: u16 = 25;
const QUEUES: u32 = 16;

const CTRL: u32 = 0x0000; // bit 26 resets, bit 6 asks for a link
const CTRL_SELF_CLEARING: u32 = 1 << 26;
const STATUS: u32 = 0x0008;
const STATUS_LINK_AT_1000: u32 = 1 << 1 | 1 << 7;
const EECD: u32 = 0x0010;
const EECD_AUTO_READ_DONE: u32 = 1 << 9;
const MDIC: u32 = 0x0020;
const MDIC_READY: u32 = 1 << 28;
const EIMS: u32 = 0x1524; // writes of 1 unmask vectors
const EIMC: u32 = 0x1528; // writes of 1 mask them
const IVAR: u32 = 0x1700; // vectors of queues, the 82576's order
const RX_BLOCK: u32 = 0xC000;
const TX_BLOCK: u32 = 0xE000;
const BLOCK_BYTES: u32 = 0x40;
const BASE_LOW: u32 = 0x00;
const BASE_HIGH: u32 = 0x04;
const LEN_BYTES: u32 = 0x08;
const HEAD: u32 = 0x10;
const TAIL: u32 = 0x18;
const CONTROL: u32 = 0x28;
const QUEUE_ENABLE: u32 = 1 << 25;

const RX_DONE: u64 = 1 << 0;
const RX_END_OF_PACKET: u64 = 1 << 1;
/// RXE: what a frame is marked with whose buffer is not mapped.
const RX_DAMAGED: u64 = 1 << 31;
const TX_REPORT_STATUS: u64 = 1 << 27;
const TX_DONE: u64 = 1 << 32;

/// Descriptors the thread handles before it looks at the next queue.
const BATCH: usize = 64;

/// What happens to the bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Nothing: descriptors alone change.
    Untouched,
    /// A thread of the card's own copies them, out of and into the guest's memory.
    Copied,
}

/// What the card does.
#[derive(Clone, Copy, Debug)]
pub struct ModelSetup {
    /// Bytes on the wire, frame check sequence included, of what it receives; `None`: nothing.
    pub rx_bytes: Option<u16>,
    /// What happens to payload.
    pub payload: Payload,
}

/// A card that is no card. Attach it by [`MemoryMap::attach_software`](vfio_glue::map::MemoryMap::attach_software).
pub struct ModelCard {
    name: String,
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

struct Inner {
    setup: ModelSetup,
    bus: Arc<SoftwareBus>,
    config: Mutex<[u8; CONFIG_BYTES]>,
    registers: Vec<AtomicU32>,
    rx: Vec<Mutex<Option<Ring>>>,
    tx: Vec<Mutex<Option<Ring>>>,
    vectors: Mutex<Vec<Option<OwnedFd>>>,
    unmasked: AtomicU32,
    ending: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Rx,
    Tx,
}

/// A queue that is enabled.
struct Ring {
    slots: CardRing,
    head: u32,
    /// Where frames come from and go to when payload is copied.
    frame: Vec<u8>,
}

impl ModelCard {
    /// A card at rest, doing its DMA through `bus`.
    ///
    /// # Errors
    ///
    /// The system's answer if the copying thread cannot be had.
    pub fn new(name: &str, setup: ModelSetup, bus: Arc<SoftwareBus>) -> std::io::Result<Self> {
        let mut config = [0; CONFIG_BYTES];
        config[..IDENTITY.len()].copy_from_slice(&IDENTITY);
        let queues = || (0..QUEUES).map(|_| Mutex::new(None)).collect();
        let inner = Arc::new(Inner {
            setup,
            bus,
            config: Mutex::new(config),
            registers: (0..BAR_BYTES / 4).map(|_| AtomicU32::new(0)).collect(),
            rx: queues(),
            tx: queues(),
            vectors: Mutex::new((0..VECTORS).map(|_| None).collect()),
            unmasked: AtomicU32::new(0),
            ending: AtomicBool::new(false),
        });
        let thread = match setup.payload {
            Payload::Untouched => None,
            Payload::Copied => {
                let inner = Arc::clone(&inner);
                let thread = std::thread::Builder::new().name("model".to_owned());
                Some(thread.spawn(move || inner.copy_until_the_end())?)
            }
        };
        Ok(Self {
            name: name.to_owned(),
            inner,
            thread,
        })
    }
}

impl Drop for ModelCard {
    fn drop(&mut self) {
        self.inner.ending.store(true, Ordering::Relaxed);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(card = self.name, "the model's thread panicked");
        }
    }
}

impl PciFunction for ModelCard {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_config(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PciError> {
        let config = lock(&self.inner.config);
        for (byte, at) in bytes.iter_mut().zip(usize::from(offset)..) {
            *byte = config.get(at).copied().unwrap_or(0xff);
        }
        Ok(())
    }

    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<(), PciError> {
        let mut config = lock(&self.inner.config);
        for (byte, at) in bytes.iter().zip(usize::from(offset)..) {
            if let Some(place) = config.get_mut(at).filter(|_| at >= IDENTITY.len()) {
                *place = *byte;
            }
        }
        Ok(())
    }

    fn bar(&self, index: u8) -> Result<Arc<dyn Registers>, PciError> {
        if index == 0 {
            return Ok(Arc::clone(&self.inner) as Arc<dyn Registers>);
        }
        Err(PciError::Bar {
            device: self.name.clone(),
            index,
            reason: "there is none".to_owned(),
        })
    }

    fn vectors(&self) -> u16 {
        VECTORS
    }

    fn set_vector(&self, vector: u16, event: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        let failed = |source| PciError::Interrupt {
            device: self.name.clone(),
            vector,
            vectors: VECTORS,
            source,
        };
        let event = event.map(|event| event.try_clone_to_owned());
        let event = event.transpose().map_err(failed)?;
        match lock(&self.inner.vectors).get_mut(usize::from(vector)) {
            Some(place) => *place = event,
            None => return Err(failed(std::io::ErrorKind::InvalidInput.into())),
        }
        Ok(())
    }

    fn set_host_event(&self, _which: HostEvent, _event: Option<BorrowedFd<'_>>) -> Result<bool, PciError> {
        Ok(false)
    }

    fn reset(&self) -> Result<(), PciError> {
        self.inner.reset();
        Ok(())
    }
}

impl Registers for Inner {
    fn read32(&self, offset: u32) -> u32 {
        match offset {
            STATUS => STATUS_LINK_AT_1000,
            EECD => EECD_AUTO_READ_DONE,
            _ => self.load(offset),
        }
    }

    #[inline]
    fn write32(&self, offset: u32, value: u32) {
        match (queue_of(offset), offset) {
            (Some((side, queue, TAIL)), _) => {
                // Pairs with the thread's load: it sees the descriptors.
                self.store(offset, value, Ordering::Release);
                if self.setup.payload == Payload::Untouched
                    && let Some(ring) = self.ring(side, queue).as_mut()
                {
                    self.run(side, queue, ring, usize::MAX);
                }
            }
            (Some((side, queue, CONTROL)), _) => {
                self.store(offset, value, Ordering::Relaxed);
                self.switch(side, queue, value & QUEUE_ENABLE != 0);
            }
            (None, CTRL) => {
                if value & CTRL_SELF_CLEARING != 0 {
                    self.reset();
                }
                self.store(offset, value & !CTRL_SELF_CLEARING, Ordering::Relaxed);
            }
            (None, MDIC) => self.store(offset, value | MDIC_READY, Ordering::Relaxed),
            // The driver looks at its ring once more after it; the thread looks here once it has reported.
            (None, EIMS) => {
                self.unmasked.fetch_or(value, Ordering::SeqCst);
                fence(Ordering::SeqCst);
            }
            (None, EIMC) => {
                self.unmasked.fetch_and(!value, Ordering::SeqCst);
            }
            _ => self.store(offset, value, Ordering::Relaxed),
        }
    }

    fn len(&self) -> u32 {
        BAR_BYTES
    }
}

/// Which queue's register an offset is, and its place in the queue's block.
#[inline]
fn queue_of(offset: u32) -> Option<(Side, u32, u32)> {
    let (side, block) = match offset {
        TX_BLOCK.. => (Side::Tx, TX_BLOCK),
        RX_BLOCK.. => (Side::Rx, RX_BLOCK),
        _ => return None,
    };
    let queue = (offset - block) / BLOCK_BYTES;
    (queue < QUEUES).then(|| (side, queue, (offset - block) % BLOCK_BYTES))
}

impl Inner {
    fn load(&self, offset: u32) -> u32 {
        let register = self.registers.get(offset as usize / 4);
        register.map_or(u32::MAX, |register| register.load(Ordering::Acquire))
    }

    fn store(&self, offset: u32, value: u32, ordering: Ordering) {
        if let Some(register) = self.registers.get(offset as usize / 4) {
            register.store(value, ordering);
        }
    }

    fn ring(&self, side: Side, queue: u32) -> MutexGuard<'_, Option<Ring>> {
        let rings = match side {
            Side::Rx => &self.rx,
            Side::Tx => &self.tx,
        };
        lock(&rings[queue as usize])
    }

    /// Everything at rest; waits until a copy that is under way is over.
    fn reset(&self) {
        for queue in 0..QUEUES {
            self.switch(Side::Rx, queue, false);
            self.switch(Side::Tx, queue, false);
        }
        self.unmasked.store(0, Ordering::SeqCst);
        for register in &self.registers {
            register.store(0, Ordering::Relaxed);
        }
    }

    fn switch(&self, side: Side, queue: u32, on: bool) {
        let mut ring = self.ring(side, queue);
        *ring = None;
        if !on {
            return;
        }
        let register = |reg| self.load(register_of(side, queue, reg));
        let base = u64::from(register(BASE_HIGH)) << 32 | u64::from(register(BASE_LOW));
        let slots = CardRing::at(&self.bus, Iova::new(base), register(LEN_BYTES));
        *ring = slots.map(|slots| Ring {
            slots,
            head: register(HEAD),
            frame: vec![0; usize::from(u16::MAX)],
        });
    }

    /// Handles up to `most` descriptors of a queue, as far as its tail goes. Returns how many.
    #[inline]
    fn run(&self, side: Side, queue: u32, ring: &mut Ring, most: usize) -> usize {
        let stored = match (side, self.setup.rx_bytes) {
            (Side::Tx, _) => 0,
            // The frame check sequence is not stored.
            (Side::Rx, Some(bytes)) => bytes.saturating_sub(4),
            (Side::Rx, None) => return 0,
        };
        let tail = self.load(register_of(side, queue, TAIL));
        let mut done = 0;
        while ring.head != tail && done < most {
            match side {
                Side::Tx => self.send(ring),
                Side::Rx => self.receive(ring, stored),
            }
            ring.head = ring.slots.after(ring.head);
            done += 1;
        }
        if done > 0 {
            self.store(register_of(side, queue, HEAD), ring.head, Ordering::Relaxed);
        }
        done
    }

    #[inline]
    fn send(&self, ring: &mut Ring) {
        let [address, command] = ring.slots.load(ring.head);
        if self.setup.payload == Payload::Copied
            && let Some(bytes) = ring.frame.get_mut(..(command & 0xffff) as usize)
        {
            // Of memory that is not mapped a card sends nothing, and the descriptor is done all the same.
            let _ = self.bus.read(Iova::new(address), bytes);
        }
        if command & TX_REPORT_STATUS != 0 {
            ring.slots.report(ring.head, command | TX_DONE);
        }
    }

    #[inline]
    fn receive(&self, ring: &mut Ring, stored: u16) {
        let mut report = RX_DONE | RX_END_OF_PACKET | u64::from(stored) << 32;
        if self.setup.payload == Payload::Copied
            && let Some(bytes) = ring.frame.get(..usize::from(stored))
        {
            let [address, _] = ring.slots.load(ring.head);
            if self.bus.write(Iova::new(address), bytes).is_err() {
                report |= RX_DAMAGED;
            }
        }
        ring.slots.report(ring.head, report);
    }

    /// The DMA engine: every queue in turn, until the card goes.
    fn copy_until_the_end(&self) {
        while !self.ending.load(Ordering::Relaxed) {
            let mut moved = false;
            for queue in 0..QUEUES {
                for side in [Side::Rx, Side::Tx] {
                    let mut ring = self.ring(side, queue);
                    let done = ring.as_mut().map_or(0, |ring| self.run(side, queue, ring, BATCH));
                    drop(ring);
                    if done > 0 {
                        self.raise(side, queue);
                        moved = true;
                    }
                }
            }
            if !moved {
                std::thread::yield_now();
            }
        }
    }

    /// Raises a queue's vector, if it is unmasked.
    fn raise(&self, side: Side, queue: u32) {
        // Before the look at the mask: who unmasks looks at the reports after.
        fence(Ordering::SeqCst);
        let shift = 16 * (queue / 8) + if side == Side::Tx { 8 } else { 0 };
        let vector = self.load(IVAR + 4 * (queue % 8)) >> shift & 0x1f;
        if self.unmasked.load(Ordering::SeqCst) & 1 << vector == 0 {
            return;
        }
        if let Some(Some(event)) = lock(&self.vectors).get(vector as usize) {
            // A full counter is a wake-up that is pending.
            let _ = rustix::io::write(event.as_fd(), &1u64.to_ne_bytes());
        }
    }
}

fn register_of(side: Side, queue: u32, reg: u32) -> u32 {
    let block = match side {
        Side::Rx => RX_BLOCK,
        Side::Tx => TX_BLOCK,
    };
    block + BLOCK_BYTES * queue + reg
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::clock::SystemClock;
    use crate::lane::{LaneSetup, Progress};
    use crate::nic::igb::{Igb, IgbSetup, RssKey};
    use crate::nic::{Link, Nic};
    use crate::testing::{BASE, BUFFERS, Guest, WRITE};

    const BUFFER: u64 = BASE + BUFFERS;

    /// The driver, unmodified, on a model that is on the guest's map.
    fn driver(guest: &Guest, rx_bytes: Option<u16>, payload: Payload, queue_pairs: u16) -> Igb {
        let setup = ModelSetup { rx_bytes, payload };
        let card = ModelCard::new("model", setup, guest.map.software_bus()).unwrap();
        let device = guest.map.attach_software("model", Arc::new(card)).unwrap();
        let setup = IgbSetup {
            mtu: 1500,
            queue_pairs,
            rss_key: RssKey([7; 40]),
        };
        Igb::open(device, setup, Arc::new(SystemClock::default())).unwrap()
    }

    fn setup(guest: &Guest) -> LaneSetup {
        guest.lane_setup()
    }

    /// Waits for what the copying thread does.
    fn until(mut is_so: impl FnMut() -> bool) {
        let patience = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < patience, "it never happened");
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_driver_comes_up_with_a_link_and_again_after_a_reset() {
        let guest = Guest::with_queue(8);
        let mut igb = driver(&guest, None, Payload::Untouched, 16);
        assert_eq!((igb.link(), igb.queue_pairs()), (Link::Up { mbps: 1000 }, 16));
        igb.reset().unwrap();
        assert_eq!(igb.link(), Link::Up { mbps: 1000 });
    }

    #[test]
    fn frames_to_send_are_done_by_the_next_look() {
        let mut guest = Guest::with_queue(8);
        let mut igb = driver(&guest, None, Payload::Untouched, 2);
        let mut lane = igb.tx_lane(1, setup(&guest)).unwrap();
        for round in 0..200 {
            let head = round % 8;
            guest.offer_chain(head, &[(BUFFER, 12 + 60)], 0);
            assert_eq!(lane.poll(), Progress::Moved);
            // As a worker that never polls does: it looks once more before it sleeps.
            assert!(lane.arm(), "the frame is done at once");
            assert_eq!(guest.used_idx(), round + 1);
        }
        assert!(!lane.arm(), "nothing is left with the card");
        let stopped = lane.stop();
        assert_eq!(stopped.first_unused, 200);
        stopped.card.unwrap();
    }

    #[test]
    fn every_receive_buffer_comes_back_with_a_frame_of_the_size_and_its_bytes_as_they_were() {
        let mut guest = Guest::with_queue(8);
        let mut igb = driver(&guest, Some(64), Payload::Untouched, 1);
        let mut lane = igb.rx_lane(0, setup(&guest)).unwrap();
        guest.write(BUFFER + 12, &[0xa5; 60]);
        for head in 0..4 {
            guest.offer_chain(head, &[(BUFFER + 2048 * u64::from(head), 1530)], WRITE);
        }
        assert_eq!(lane.poll(), Progress::Moved);
        // As a worker that never polls does: it looks once more before it sleeps.
        assert!(lane.arm(), "frames are there at once");
        assert_eq!(guest.used(), vec![(0, 72), (1, 72), (2, 72), (3, 72)]);
        assert_eq!(guest.read(BUFFER + 12, 60), [0xa5; 60]);
        lane.stop().card.unwrap();
    }

    #[test]
    fn without_a_size_nothing_is_received() {
        let mut guest = Guest::with_queue(8);
        let mut igb = driver(&guest, None, Payload::Untouched, 1);
        let mut lane = igb.rx_lane(0, setup(&guest)).unwrap();
        guest.offer_chain(0, &[(BUFFER, 1530)], WRITE);
        assert_eq!(lane.poll(), Progress::Moved);
        assert_eq!(lane.poll(), Progress::Idle);
        assert!(!lane.arm());
        assert_eq!(guest.used(), vec![]);
        lane.stop().card.unwrap();
    }

    #[test]
    fn a_copying_model_writes_the_guests_memory_and_wakes_who_sleeps() {
        let mut guest = Guest::with_queue(8);
        let mut igb = driver(&guest, Some(1518), Payload::Copied, 1);
        let mut lane = igb.rx_lane(0, setup(&guest)).unwrap();
        guest.write(BUFFER, &[0xa5; 1530]);
        guest.offer_chain(0, &[(BUFFER, 1530)], WRITE);
        assert_eq!(lane.poll(), Progress::Moved);
        until(|| {
            lane.poll();
            guest.used_idx() == 1
        });
        assert_eq!(guest.used(), vec![(0, 12 + 1514)]);
        assert_eq!(guest.read(BUFFER + 12, 1514), [0; 1514]);
        assert_eq!(
            guest.read(BUFFER + 12 + 1514, 4),
            [0xa5; 4],
            "no byte behind the frame"
        );
        // Asleep: armed, with nothing there; then comes a buffer, which the worker posts, and goes back to sleep.
        until(|| !lane.arm());
        guest.offer_chain(1, &[(BUFFER, 1530)], WRITE);
        lane.poll();
        if !lane.arm() {
            let fd = lane.interrupt_fd().unwrap();
            let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            assert_eq!(rustix::event::poll(&mut fds, None).unwrap(), 1);
        }
        until(|| {
            lane.poll();
            guest.used_idx() == 2
        });
        lane.stop().card.unwrap();
    }

    #[test]
    fn a_copying_model_sends_what_is_told_and_gives_it_back() {
        let mut guest = Guest::with_queue(8);
        let mut igb = driver(&guest, None, Payload::Copied, 1);
        let mut lane = igb.tx_lane(0, setup(&guest)).unwrap();
        guest.offer_chain(0, &[(BUFFER, 12), (BUFFER + 100, 1514)], 0);
        until(|| {
            lane.poll();
            guest.used_idx() == 1
        });
        lane.stop().card.unwrap();
    }
}
