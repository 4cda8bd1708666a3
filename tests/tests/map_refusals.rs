//! Every refusal of the map, in its words, beside a card on the same map that goes on carrying frames.
//!
//! ```text
//! another device, another guest ──attach, change──▶ MemoryMap ──▶ an error with the numbers
//! first device, first guest     ──frames──────────▶ the same map ──▶ all of them arrive
//! ```
//!
//! The map stands on the fake kernel, which can be made to refuse what a real one rarely does. Refusals by the real
//! binary over its sockets are in `product_memory.rs` and `product_hostile.rs`, by a real kernel in the rig.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use queues::lane::{Lane, LaneStats, Progress};
use rustix::fs::{MemfdFlags, memfd_create};
use tests::bench::{Bench, MAC, RX_ARENA, Slot, TX_ARENA};
use tests::card::{Options, Quirks};
use tests::frontend::net::{Form, Layout, Rx, Tx};
use vfio_glue::address::{FrontendAddress, GuestAddress};
use vfio_glue::iommu::{Accounting, DeviceAddress};
use vfio_glue::map::{MapError, MemoryMap};
use vfio_glue::memory::RegionSpec;

const MIB: u64 = 1 << 20;
const SILICON: Options = Options {
    quirks: Quirks { qemu: false },
    scribble: true,
    reset_quiet: None,
};

/// A card with a guest, both lanes running.
struct Bystander {
    bench: Bench,
    rx_lane: Box<dyn Lane>,
    tx_lane: Box<dyn Lane>,
    rx: Rx,
    tx: Tx,
    frames: usize,
}

impl Bystander {
    fn new() -> Self {
        let mut bench = Bench::new(SILICON);
        bench.wait_for_link();
        let (rx_ring, tx_ring) = (bench.ring(64, 0), bench.ring(64, 64));
        let stats = || Arc::<LaneStats>::default();
        let rx_lane = bench.rx_lane(&rx_ring, &stats());
        let tx_lane = bench.tx_lane(&tx_ring, &stats());
        let rx = Rx::new(rx_ring, &bench.memory, RX_ARENA, 64);
        let tx = Tx::new(tx_ring, &bench.memory, TX_ARENA, 64);
        Self {
            bench,
            rx_lane,
            tx_lane,
            rx,
            tx,
            frames: 0,
        }
    }

    fn map(&self) -> &Arc<MemoryMap> {
        &self.bench.map
    }

    /// What a refusal says, its cause included; and that it left the map as it was and the card at work.
    fn refused<T>(&mut self, act: impl FnOnce(&Arc<MemoryMap>) -> Result<T, MapError>) -> String {
        let seen = |map: &MemoryMap| {
            let seen = map.snapshot();
            let extents: Vec<_> = seen
                .extents
                .iter()
                .map(|extent| (extent.iova, extent.len))
                .collect();
            (extents, seen.devices, seen.usable)
        };
        self.exchange();
        let before = (seen(self.map()), self.bench.kernel.mapped());
        let map = Arc::clone(self.map());
        let Err(error) = act(&map) else {
            panic!("it was not refused");
        };
        self.exchange();
        assert_eq!((seen(self.map()), self.bench.kernel.mapped()), before, "{error}");
        let cause = error.source().map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    }

    /// A frame each way, whole.
    fn exchange(&mut self) {
        self.frames += 1;
        let mut frame: Vec<u8> = (0..500)
            .map(|byte| u8::try_from((byte * 7 + self.frames) % 251).expect("a byte"))
            .collect();
        frame[..6].copy_from_slice(&MAC);
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        self.tx.offer(&frame, Layout::WithData, Form::Direct);
        self.tx.queue.submit();
        self.rx.post(1530, Layout::WithData, Form::Direct);
        self.rx.queue.submit();
        let poll = |lanes: &mut Self| {
            while lanes.tx_lane.poll() == Progress::Moved || lanes.rx_lane.poll() == Progress::Moved {}
        };
        poll(self);
        let sent = self.bench.sent.lock().expect("no panic").last().cloned();
        assert!(sent.as_ref() == Some(&frame), "a frame did not go out whole");
        self.bench.card().receive_from_wire(&frame);
        poll(self);
        assert!(self.rx.try_recv() == Some(frame), "a frame did not come in whole");
        self.tx.reclaim();
    }

    fn end(self) {
        for lane in [self.rx_lane, self.tx_lane] {
            lane.stop().card.expect("the queue stops");
        }
        self.bench.card().advance(Duration::from_millis(1));
        self.bench.card().violations().assert_clean();
        assert_eq!(self.bench.kernel.violations(), Vec::<String>::new());
    }
}

fn memory(len: u64) -> Vec<RegionSpec> {
    let file = File::from(memfd_create("other", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(len).expect("its length");
    vec![RegionSpec {
        guest: GuestAddress(0),
        frontend: FrontendAddress(0),
        len,
        file: Arc::new(file),
        file_offset: 0,
    }]
}

fn pci(slot: &Slot) -> DeviceAddress {
    slot.address.clone()
}

#[test]
fn a_device_that_would_strand_what_is_mapped_is_told_both_ranges() {
    let mut bystander = Bystander::new();
    let slot = bystander.bench.plug(2, SILICON);
    bystander
        .bench
        .kernel
        .set_reach(&pci(&slot), vec![1 << 40..=(1 << 41) - 1]);
    let text = bystander.refused(|map| map.attach(&pci(&slot)));
    let first = bystander.map().snapshot().extents[0].clone();
    assert_eq!(
        text,
        format!(
            "device 0000:02:00.0 cannot reach what is mapped at {}-{:#x}; it reaches 0x10000000000-0x1ffffffffff",
            first.iova,
            first.iova.raw() + first.len - 1
        )
    );
    bystander.end();
}

#[test]
fn a_device_whose_sibling_is_on_another_map_is_told_which() {
    let mut bystander = Bystander::new();
    let kernel = bystander.bench.kernel.clone();
    let slots = [2, 3].map(|bus| bystander.bench.plug(bus, SILICON));
    for slot in &slots {
        let DeviceAddress::Pci(address) = slot.address else {
            panic!("a PCI device");
        };
        kernel.plug_in_group(address, slot.function(), 7);
    }
    let other = MemoryMap::new("tenant-b", kernel.beside().iommu());
    let _sibling = other.attach(&pci(&slots[0])).expect("the first of its group");
    let text = bystander.refused(|map| map.attach(&pci(&slots[1])));
    assert!(
        text.contains("devices of one group share one map, so 0000:02:00.0 must be"),
        "{text}"
    );
    bystander.end();
}

#[test]
fn a_device_that_is_on_the_map_already_is_refused_by_both_names() {
    let mut bystander = Bystander::new();
    let here = bystander.map().snapshot().devices[0].clone();
    let text = bystander.refused(|map| map.attach(&here));
    assert_eq!(text, "device 0000:01:00.0 is already on map main");
    bystander.end();
}

#[test]
fn memory_over_the_limit_on_locked_memory_is_refused_with_every_number() {
    for (accounting, elsewhere) in [(Accounting::PerProcess, 0), (Accounting::PerUser, MIB)] {
        let mut bystander = Bystander::new();
        let mapped: u64 = bystander.map().snapshot().mapped_bytes;
        let limit = mapped + elsewhere + MIB;
        bystander
            .bench
            .kernel
            .set_locked_memory(accounting, limit, elsewhere);
        let text = bystander.refused(|map| map.add("vm1", memory(2 * MIB)));
        for number in [2 * MIB, mapped, limit, limit + MIB] {
            assert!(text.contains(&number.to_string()), "{number} is not in: {text}");
        }
        bystander
            .map()
            .add("vm1", memory(MIB))
            .expect("what fits is taken");
        bystander.end();
    }
}

#[test]
fn one_mapping_too_many_is_refused_with_both_numbers() {
    let mut bystander = Bystander::new();
    let there = bystander.bench.kernel.mapped().len();
    bystander.bench.kernel.set_most_mappings(there + 2);
    let text = bystander.refused(|map| map.add("vm1", memory(3 << 30)));
    assert_eq!(text, "the IOMMU takes 2 more mappings, 3 are needed");
    bystander.end();
}

#[test]
fn memory_that_no_room_is_left_for_is_refused_with_the_ranges() {
    let mut bystander = Bystander::new();
    let text = bystander.refused(|map| map.add("vm1", memory(1 << 40)));
    assert!(
        text.starts_with("no room for 0x10000000000 bytes in the IOVA ranges 0x100000-"),
        "{text}"
    );
    bystander.end();
}

#[test]
fn regions_that_make_no_sense_are_refused_in_their_numbers() {
    let mut bystander = Bystander::new();
    let with = |change: &dyn Fn(&mut Vec<RegionSpec>)| {
        let mut regions = memory(2 * MIB);
        change(&mut regions);
        regions
    };
    let twice = |regions: &mut Vec<RegionSpec>| {
        let mut second = regions[0].clone();
        second.guest = GuestAddress(MIB);
        second.frontend = FrontendAddress(1 << 40);
        regions.push(second);
    };
    let cases = [
        (
            with(&twice),
            "region at 0x100000 (guest-physical) starts inside the one at 0x0, which is 0x200000 bytes long",
        ),
        (
            with(&|regions| regions[0].guest = GuestAddress(u64::MAX)),
            "guest region at 0xffffffffffffffff of 0x200000 bytes (front-end 0x0, file offset 0x0) is empty or wraps",
        ),
        (
            with(&|regions| regions[0].len += 1),
            "guest region at 0x0 (0x200001 bytes) is refused: the memory announced ends at 0x200001 of its file, which \
             is only 0x200000 bytes long",
        ),
    ];
    for (regions, wanted) in cases {
        assert_eq!(bystander.refused(|map| map.add("vm1", regions)), wanted);
    }
    bystander.end();
}

#[test]
fn memory_in_too_many_pieces_is_refused_with_the_limit() {
    let mut bystander = Bystander::new();
    let whole = memory(1100 * 4096).remove(0);
    let pages = (0..1100).map(|page| RegionSpec {
        guest: GuestAddress(page << 20),
        frontend: FrontendAddress(page << 20),
        len: 4096,
        file_offset: page * 4096,
        ..whole.clone()
    });
    let text = bystander.refused(|map| map.add("vm1", pages.collect()));
    assert_eq!(
        text,
        "the guest's memory would be in 1100 pieces, and one guest may have 1024"
    );
    bystander.end();
}

/// Each call to the kernel that a change or an attach makes, refused once: undone as a whole.
#[test]
fn a_refusal_of_the_kernel_half_way_is_undone_and_passed_on() {
    let mut bystander = Bystander::new();
    let kernel = bystander.bench.kernel.clone();
    for call in 0..3 {
        kernel.fail_after(call);
        let text = bystander.refused(|map| map.add("vm1", memory(3 << 30)));
        assert!(text.contains("fake map of 0x40000000 bytes at iova"), "{text}");
    }
    let slot = bystander.bench.plug(2, SILICON);
    for call in 0..2 {
        kernel.fail_after(call);
        let text = bystander.refused(|map| map.attach(&pci(&slot)));
        assert!(text.contains("fake "), "{text}");
    }
    bystander
        .map()
        .attach(&pci(&slot))
        .expect("and afterwards it can come");
    bystander.end();
}
