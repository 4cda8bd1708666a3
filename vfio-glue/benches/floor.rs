//! The unchecked floor: what a lane's pass would cost if nobody had to be mistrusted.
//!
//! A program over raw pointers that does the work of a pass and nothing else: done bits, used entries, available
//! entries, descriptors, one translation by the last hit, the header of a received frame, a 16-byte NIC descriptor, one
//! tail write, one used index, one look at whether the guest wants to be told. It believes every word it reads, counts
//! nothing, keeps no room for odd frames, and remembers of a chain only what it needs to give it back.
//! The *bare ring* beside it takes chains and gives them back, and does nothing with them.
//!
//! `make bench-instructions` runs it, beside the lanes in queues.

#![expect(missing_docs, reason = "the harness makes items of its own")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    reason = "a pass is one piece of raw code, for machines of 64 bits"
)]
#![expect(
    unsafe_code,
    reason = "the measure of what checks cost is the same work without any; no product code is here"
)]

use std::hint::black_box;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use gungraun::{library_benchmark, library_benchmark_group, main};

const BURST: u16 = 32;
const FRAME: u64 = 64;
const HEADER: u64 = 12;
const SIZE: u16 = 256;
/// Chains the guest goes round with, two descriptors each.
const CHAINS: u16 = SIZE / 2;
const SLOTS: u32 = 512;

// Places in the guest's memory, in bytes.
const DESC: usize = 0;
const AVAIL: usize = 0x2000;
const USED: usize = 0x3000;
const TABLES: usize = 0x5000;
const BUFFERS: usize = 0x1_0000;
const BUFFER_BYTES: usize = 2048;
const MEMORY_BYTES: usize = 1 << 20;
const GUEST_BASE: u64 = 0x10_0000;
const IOVA_BASE: u64 = 0x4000_0000;

const NEXT: u64 = 1 << 32;
const WRITE: u64 = 2 << 32;
const INDIRECT: u64 = 4 << 32;

/// Type, extension, frame check sequence, end of packet, report: a data descriptor's command.
const COMMAND: u64 = 3 << 20 | 1 << 29 | 1 << 25 | 1 << 24 | 1 << 27;
const PAYLEN_SHIFT: u32 = 46;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    One,
    Two,
    IndirectOne,
    IndirectTwo,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Tx,
    Rx,
}

/// Where the last translation was.
struct Hit {
    first: u64,
    len: u64,
    to_iova: u64,
    to_host: u64,
}

struct Floor {
    memory: *mut u8,
    hit: Hit,
    next_avail: u16,
    next_used: u16,
    ring: *mut [u64; 2],
    /// By ring slot: the head, and where its header goes.
    posted: *mut (u64, *mut u8),
    fill: u32,
    oldest: u32,
    tail: *mut u32,
    offered: u16,
    way: Way,
}

impl Floor {
    fn new(way: Way, shape: Shape) -> Box<Self> {
        let memory = vec![0_u64; MEMORY_BYTES / 8].leak().as_mut_ptr().cast::<u8>();
        let mut floor = Box::new(Self {
            memory,
            hit: Hit {
                first: GUEST_BASE,
                len: MEMORY_BYTES as u64,
                to_iova: IOVA_BASE.wrapping_sub(GUEST_BASE),
                to_host: (memory.expose_provenance() as u64).wrapping_sub(GUEST_BASE),
            },
            next_avail: 0,
            next_used: 0,
            ring: vec![[0; 2]; SLOTS as usize].leak().as_mut_ptr(),
            posted: vec![(0, memory); SLOTS as usize].leak().as_mut_ptr(),
            fill: 0,
            oldest: 0,
            tail: vec![0].leak().as_mut_ptr(),
            offered: 0,
            way,
        });
        floor.build_chains(shape);
        floor.offer();
        floor
    }

    /// A floor whose next pass completes one burst and takes another.
    fn steady(way: Way, shape: Shape) -> Box<Self> {
        let mut floor = Self::new(way, shape);
        for _ in 0..6 {
            match way {
                Way::Tx => floor.tx_pass(),
                Way::Rx => floor.rx_pass(),
            }
            floor.finish();
            floor.offer();
        }
        floor
    }

    /// A ring with one burst to take.
    fn bare(way: Way, shape: Shape) -> Box<Self> {
        let mut floor = Self::new(way, shape);
        for _ in 0..6 {
            floor.bare_pass();
            floor.offer();
        }
        floor
    }

    #[inline(always)]
    fn tx_pass(&mut self) {
        // SAFETY: every pointer was made by `new` from memory that is never freed, all indexes are masked or come from
        // `build_chains`, which keeps them inside. No other thread runs.
        unsafe {
            while self.oldest != self.fill {
                let slot = (self.oldest & (SLOTS - 1)) as usize;
                if (*self.ring.add(slot))[1] & 1 << 32 == 0 {
                    break;
                }
                let (head, _) = *self.posted.add(slot);
                self.give(head, 0);
                self.oldest = self.oldest.wrapping_add(1);
            }
            let end = self.avail_idx();
            while self.next_avail != end {
                let (head, addr, len) = self.pop();
                let iova = addr.wrapping_add(self.translate(addr).to_iova);
                let slot = (self.fill & (SLOTS - 1)) as usize;
                (*self.ring.add(slot)) = [iova, len | COMMAND | len << PAYLEN_SHIFT];
                (*self.posted.add(slot)).0 = head;
                self.fill = self.fill.wrapping_add(1);
            }
            self.tail.write_volatile(self.fill & (SLOTS - 1));
        }
        black_box(self.publish());
    }

    #[inline(always)]
    fn rx_pass(&mut self) {
        // SAFETY: as for `tx_pass`.
        unsafe {
            while self.oldest != self.fill {
                let slot = (self.oldest & (SLOTS - 1)) as usize;
                let report = (*self.ring.add(slot))[1];
                if report & 1 == 0 {
                    break;
                }
                let (head, header) = *self.posted.add(slot);
                header.cast::<u64>().write_unaligned(0);
                header.add(8).cast::<u32>().write_unaligned(1 << 16);
                self.give(head, HEADER + (report >> 32 & 0xffff));
                self.oldest = self.oldest.wrapping_add(1);
            }
            let end = self.avail_idx();
            while self.next_avail != end {
                let (head, addr, _) = self.pop();
                let hit = self.translate(addr);
                let slot = (self.fill & (SLOTS - 1)) as usize;
                (*self.ring.add(slot)) = [addr.wrapping_add(hit.to_iova), 0];
                let header = addr.wrapping_sub(HEADER).wrapping_add(hit.to_host);
                let header = std::ptr::with_exposed_provenance_mut(header as usize);
                (*self.posted.add(slot)) = (head, header);
                self.fill = self.fill.wrapping_add(1);
            }
            self.tail.write_volatile(self.fill & (SLOTS - 1));
        }
        black_box(self.publish());
    }

    /// Chains are taken and given back at once.
    #[inline(always)]
    fn bare_pass(&mut self) {
        // SAFETY: as for `tx_pass`.
        unsafe {
            let end = self.avail_idx();
            while self.next_avail != end {
                let (head, addr, len) = self.pop();
                black_box(addr);
                self.give(head, if self.way == Way::Rx { len } else { 0 });
            }
        }
        black_box(self.publish());
    }

    /// The next chain: its head, and where its frame is and how long.
    #[inline(always)]
    unsafe fn pop(&mut self) -> (u64, u64, u64) {
        // SAFETY: as for `tx_pass`.
        unsafe {
            let slot = usize::from(self.next_avail & (SIZE - 1));
            let head = *self.memory.add(AVAIL + 4 + 2 * slot).cast::<u16>();
            self.next_avail = self.next_avail.wrapping_add(1);
            let mut descriptor = self.memory.add(DESC + 16 * usize::from(head)).cast::<u64>();
            let mut table = self.memory.add(DESC);
            let [mut addr, mut word] = descriptor.cast::<[u64; 2]>().read();
            if word & INDIRECT != 0 {
                let at = addr.wrapping_add(self.translate(addr).to_host);
                table = std::ptr::with_exposed_provenance_mut(at as usize);
                descriptor = table.cast();
                [addr, word] = descriptor.cast::<[u64; 2]>().read();
            }
            let head = u64::from(head);
            if word & NEXT == 0 {
                return (head, addr.wrapping_add(HEADER), (word & 0xffff_ffff) - HEADER);
            }
            let [addr, word] = table.add(16 * (word >> 48) as usize).cast::<[u64; 2]>().read();
            (head, addr, word & 0xffff_ffff)
        }
    }

    #[inline(always)]
    fn translate(&self, addr: u64) -> &Hit {
        if addr.wrapping_sub(self.hit.first) >= self.hit.len {
            elsewhere();
        }
        &self.hit
    }

    #[inline(always)]
    unsafe fn give(&mut self, head: u64, len: u64) {
        // SAFETY: as for `tx_pass`.
        unsafe {
            let slot = usize::from(self.next_used & (SIZE - 1));
            let entry = self.memory.add(USED + 4 + 8 * slot).cast::<u64>();
            entry.write_unaligned(head | len << 32);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline(always)]
    fn publish(&self) -> bool {
        self.word(USED + 2).store(self.next_used, Ordering::Release);
        fence(Ordering::SeqCst);
        self.word(AVAIL).load(Ordering::Relaxed) & 1 == 0
    }

    #[inline(always)]
    fn avail_idx(&self) -> u16 {
        self.word(AVAIL + 2).load(Ordering::Acquire)
    }

    #[inline(always)]
    fn word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: `at` is one of the constants above, even and inside the memory, which is never freed.
        unsafe { AtomicU16::from_ptr(self.memory.add(at).cast()) }
    }

    /// The guest offers a burst of chains. Not counted.
    fn offer(&mut self) {
        for _ in 0..BURST {
            let at = AVAIL + 4 + 2 * usize::from(self.offered % SIZE);
            self.word(at)
                .store(2 * (self.offered % CHAINS), Ordering::Relaxed);
            self.offered = self.offered.wrapping_add(1);
        }
        self.word(AVAIL + 2).store(self.offered, Ordering::Release);
    }

    /// The card is done with what it has. Not counted.
    fn finish(&mut self) {
        let report = match self.way {
            Way::Tx => 1 << 32,
            Way::Rx => FRAME << 32 | 0b11,
        };
        for position in self.oldest..self.fill {
            let slot = (position & (SLOTS - 1)) as usize;
            // SAFETY: the slot is masked, and the ring is never freed.
            unsafe { (*self.ring.add(slot))[1] = report };
        }
    }

    fn build_chains(&mut self, shape: Shape) {
        let (flags, bytes) = match self.way {
            Way::Tx => (0, HEADER + FRAME),
            Way::Rx => (WRITE, BUFFER_BYTES as u64),
        };
        for chain in 0..usize::from(CHAINS) {
            let at = GUEST_BASE + (BUFFERS + BUFFER_BYTES * chain) as u64;
            let direct = DESC + 32 * chain;
            let (place, next) = match shape {
                Shape::One | Shape::Two => (direct, 2 * chain as u64 + 1),
                Shape::IndirectOne | Shape::IndirectTwo => (TABLES + 32 * chain, 1),
            };
            let count = match shape {
                Shape::One | Shape::IndirectOne => {
                    self.descriptor(place, at, bytes | flags);
                    1
                }
                Shape::Two | Shape::IndirectTwo => {
                    self.descriptor(place, at, HEADER | flags | NEXT | next << 48);
                    self.descriptor(place + 16, at + HEADER, (bytes - HEADER) | flags);
                    2
                }
            };
            if place != direct {
                self.descriptor(direct, GUEST_BASE + place as u64, (16 * count) | INDIRECT);
            }
        }
    }

    fn descriptor(&mut self, place: usize, addr: u64, word: u64) {
        // SAFETY: `place` is a descriptor of the table or of `TABLES`, inside the memory.
        unsafe { self.memory.add(place).cast::<[u64; 2]>().write([addr, word]) };
    }
}

#[cold]
#[inline(never)]
fn elsewhere() -> ! {
    unreachable!("all addresses are in one place")
}

#[library_benchmark(setup = Floor::steady)]
#[bench::one(Way::Tx, Shape::One)]
#[bench::two(Way::Tx, Shape::Two)]
#[bench::indirect_one(Way::Tx, Shape::IndirectOne)]
#[bench::indirect_two(Way::Tx, Shape::IndirectTwo)]
fn tx(mut floor: Box<Floor>) -> Box<Floor> {
    black_box(&mut floor).tx_pass();
    floor
}

#[library_benchmark(setup = Floor::steady)]
#[bench::one(Way::Rx, Shape::One)]
#[bench::two(Way::Rx, Shape::Two)]
#[bench::indirect_one(Way::Rx, Shape::IndirectOne)]
#[bench::indirect_two(Way::Rx, Shape::IndirectTwo)]
fn rx(mut floor: Box<Floor>) -> Box<Floor> {
    black_box(&mut floor).rx_pass();
    floor
}

#[library_benchmark(setup = Floor::bare)]
#[bench::one(Way::Tx, Shape::One)]
#[bench::two(Way::Tx, Shape::Two)]
#[bench::indirect_one(Way::Tx, Shape::IndirectOne)]
#[bench::indirect_two(Way::Tx, Shape::IndirectTwo)]
fn bare_tx(mut floor: Box<Floor>) -> Box<Floor> {
    black_box(&mut floor).bare_pass();
    floor
}

#[library_benchmark(setup = Floor::bare)]
#[bench::one(Way::Rx, Shape::One)]
#[bench::two(Way::Rx, Shape::Two)]
#[bench::indirect_one(Way::Rx, Shape::IndirectOne)]
#[bench::indirect_two(Way::Rx, Shape::IndirectTwo)]
fn bare_rx(mut floor: Box<Floor>) -> Box<Floor> {
    black_box(&mut floor).bare_pass();
    floor
}

library_benchmark_group!(name = floor, benchmarks = [tx, rx, bare_tx, bare_rx]);

main!(library_benchmark_groups = floor);
