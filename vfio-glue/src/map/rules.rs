//! The rules of the map, each as tests named after it. Those that want more of the kernel than a fake can give are shown
//! in the rig.
//!
//! | rule | promise |
//! | --- | --- |
//! | R1 | a map exists by itself, and outlives every device and every guest |
//! | R2 | devices come and go at any time, in any order |
//! | R3 | a memory change touches the map, never the devices |
//! | R4 | the same memory seen twice is mapped once |
//! | R5 | one shared map unless the operator names more; a second is a second trust domain |
//! | R6 | what the kernel keeps behind a map does not show |
//! | R7 | the short way stays short |

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::{CELL_BYTES, Extent, MapError, MemoryMap};
use crate::address::{FrontendAddress, GuestAddress};
use crate::iommu::DeviceAddress;
use crate::iommu::fake::FakeKernel;
use crate::memory::{RegionSpec, Table, TableHint};
use crate::pci::testing::Nothing;

const MIB: u64 = 1 << 20;

/// A memfd whose pages are all there, as after a pin.
fn filled(len: u64) -> Arc<File> {
    let file = sparse(len);
    fill(&file);
    file
}

/// Puts a page into every hole, as a pin does. One that is only allocated counts as a hole still.
fn fill(file: &File) {
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    file.write_all_at(&vec![0xa5; len], 0).unwrap();
}

fn sparse(len: u64) -> Arc<File> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    Arc::new(file)
}

fn region(file: &Arc<File>, guest: u64, len: u64, file_offset: u64) -> RegionSpec {
    RegionSpec {
        guest: GuestAddress(guest),
        frontend: FrontendAddress(guest + (1 << 46)),
        len,
        file: Arc::clone(file),
        file_offset,
    }
}

fn card(index: u8) -> DeviceAddress {
    DeviceAddress::Pci(format!("0000:01:00.{index}").parse().unwrap())
}

/// A map, and three cards that could come.
fn map() -> (FakeKernel, Arc<MemoryMap>) {
    let kernel = FakeKernel::default();
    for index in 0..3 {
        kernel.plug(&card(index), Arc::new(Nothing));
    }
    let map = MemoryMap::new("main", kernel.iommu());
    (kernel, map)
}

/// Changes a guest's memory, with nothing to drain.
fn changed(map: &Arc<MemoryMap>, owner: &str, now: &Table, wanted: Vec<RegionSpec>) -> Arc<Table> {
    let change = map.change(owner, now, wanted).unwrap();
    let next = Arc::clone(change.table());
    change.finish().unwrap();
    next
}

fn is_same(a: &[Arc<Extent>], b: &[Arc<Extent>]) -> bool {
    a.len() == b.len()
        && a.iter()
            .all(|extent| b.iter().any(|other| Arc::ptr_eq(extent, other)))
}

#[test]
fn r1_a_map_is_filled_changed_and_inspected_before_during_and_after_its_devices_and_guests() {
    let (kernel, map) = map();
    let file = filled(8 * MIB);
    let table = map.add("vm0", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
    assert_eq!(
        (map.snapshot().mapped_bytes, map.snapshot().pinned_bytes),
        (4 * MIB, 0)
    );
    let device = map.attach(&card(0)).unwrap();
    assert_eq!(map.snapshot().pinned_bytes, 4 * MIB);
    let table = changed(&map, "vm0", &table, vec![region(&file, 0, 8 * MIB, 0)]);
    device.detach().unwrap();
    assert_eq!(
        (map.snapshot().mapped_bytes, map.snapshot().pinned_bytes),
        (8 * MIB, 0)
    );
    map.let_go("vm0", table.extents()).unwrap();
    assert_eq!((map.snapshot().extents.len(), kernel.mapped()), (0, vec![]));
    map.attach(&card(1)).unwrap();
}

#[test]
fn r2_the_first_device_to_come_may_be_the_first_to_go() {
    let (kernel, map) = map();
    let _table = map.add("vm0", vec![region(&sparse(MIB), 0, MIB, 0)]).unwrap();
    let mapped = kernel.mapped();
    let [first, second] = [0, 1].map(|index| map.attach(&card(index)).unwrap());
    first.detach().unwrap();
    let third = map.attach(&card(2)).unwrap();
    assert_eq!(kernel.attached(), [card(1), card(2)]);
    second.detach().unwrap();
    let again = map.attach(&card(0)).unwrap();
    assert_eq!(map.snapshot().devices, [card(2), card(0)]);
    drop((third, again));
    assert_eq!(
        (kernel.attached(), kernel.mapped()),
        (vec![], mapped),
        "no device takes memory with it"
    );
}

#[test]
fn r3_no_change_of_memory_is_seen_by_a_device() {
    let (kernel, map) = map();
    let _devices = [0, 1].map(|index| map.attach(&card(index)).unwrap());
    let file = sparse(3 * CELL_BYTES);
    let mut table = map.add("vm0", vec![region(&file, 0, MIB, 0)]).unwrap();
    let tables = [
        vec![region(&file, 0, 2 * CELL_BYTES, 0)],
        vec![
            region(&file, 0, MIB, 0),
            region(&file, 1 << 40, CELL_BYTES, CELL_BYTES),
        ],
        vec![region(&file, 0, MIB / 2, 0)],
        vec![],
    ];
    for wanted in tables {
        table = changed(&map, "vm0", &table, wanted);
        assert_eq!(kernel.attached(), [card(0), card(1)]);
    }
    assert_eq!(kernel.attach_calls(), 2, "none was attached again");
}

#[test]
fn r3_what_goes_is_mapped_until_the_change_is_finished_and_comes_back_if_it_is_not() {
    let (kernel, map) = map();
    let file = sparse(8 * MIB);
    let table = map
        .add(
            "vm0",
            vec![
                region(&file, 0, 4 * MIB, 0),
                region(&file, 1 << 32, 4 * MIB, 4 * MIB),
            ],
        )
        .unwrap();
    let before = kernel.mapped();
    let wanted = || {
        vec![
            region(&file, 0, 4 * MIB, 0),
            region(&sparse(MIB), 1 << 33, MIB, 0),
        ]
    };
    let change = map.change("vm0", &table, wanted()).unwrap();
    assert_eq!(
        kernel.mapped().len(),
        before.len() + 1,
        "what is new is there, what goes is there still"
    );
    let at = |table: &Table, guest| {
        let piece = table.lookup(&mut TableHint::default(), GuestAddress(guest), 1);
        piece.map(|piece| piece.iova)
    };
    assert_eq!(at(&table, 0), at(change.table(), 0));
    assert!(change.leaving().has(at(&table, 1 << 32).unwrap()));
    assert!(!change.leaving().has(at(&table, 0).unwrap()));
    change.undo();
    assert_eq!(kernel.mapped(), before);
    drop(map.change("vm0", &table, wanted()).unwrap());
    assert_eq!(kernel.mapped(), before, "as does one that is forgotten");

    let later = map.change("vm0", &table, wanted()).unwrap().finish_later();
    assert_eq!(
        kernel.mapped().len(),
        before.len() + 1,
        "kept for a device that will not stop"
    );
    map.let_go("vm0", &later).unwrap();
    assert_eq!(kernel.mapped().len(), 2);
}

#[test]
fn r4_views_with_other_borders_share_what_lies_whole_in_both() {
    let (kernel, map) = map();
    let file = sparse(4 * CELL_BYTES);
    let a = map
        .add("vm0-a", vec![region(&file, 0, 3 * CELL_BYTES, 0)])
        .unwrap();
    let b = map
        .add("vm0-b", vec![region(&file, 0, 3 * CELL_BYTES, CELL_BYTES)])
        .unwrap();
    assert_eq!(kernel.mapped().len(), 4, "cells 1 and 2 are both views'");
    map.let_go("vm0-a", a.extents()).unwrap();
    assert_eq!(kernel.mapped().len(), 3);
    map.let_go("vm0-b", b.extents()).unwrap();
    assert_eq!(kernel.mapped(), vec![]);
}

#[test]
fn r5_two_maps_share_nothing_and_one_costs_the_other_nothing() {
    let (kernel, main) = map();
    let beside = kernel.beside();
    let other = MemoryMap::new("tenant-b", beside.iommu());
    let file = sparse(4 * MIB);
    let a = main.add("vm0", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
    let _device = main.attach(&card(0)).unwrap();
    let before = (kernel.mapped(), main.snapshot().usable);
    let b = other.add("vm1", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
    assert!(
        !is_same(a.extents(), b.extents()),
        "the same bytes are mapped for each"
    );
    assert_eq!(other.snapshot().devices, []);
    assert!(matches!(other.attach(&card(7)), Err(MapError::Iommu(_))));
    other.let_go("vm1", b.extents()).unwrap();
    assert_eq!((kernel.mapped(), main.snapshot().usable), before);
}

/// Reads the crate's own sources: a public item whose name or signature speaks of what the kernel keeps is a leak. What
/// an error tells an operator may name a group's node.
#[test]
fn r6_no_public_item_speaks_of_what_the_kernel_keeps() {
    fn sources(folder: &Path, into: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push(path);
            }
        }
    }
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files.len() > 20);
    // A made-up kernel for tests has what kernels have; PCI's domains are others; the last module is not public.
    let exempt = ["iommu/fake.rs", "pci/address.rs", "pci/sysfs.rs"];
    files.retain(|file| !exempt.iter().any(|name| file.ends_with(name)));
    let (mut items, mut leaks) = (0, Vec::new());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for line in text
            .lines()
            .map(str::trim_start)
            .filter(|line| line.starts_with("pub "))
        {
            items += 1;
            let words = line.to_lowercase();
            let mut words = words.split(|c: char| !c.is_ascii_alphanumeric());
            if words.any(|word| ["group", "container", "ioas", "hwpt", "domain"].contains(&word)) {
                leaks.push(format!("{}: {line}", file.display()));
            }
        }
    }
    assert!(items > 100);
    assert_eq!(leaks, Vec::<String>::new());
}

#[test]
fn r7_three_lines_open_a_device_or_say_what_is_missing() {
    let address = "0000:ff:1f.7".parse().unwrap();
    let error = crate::open(address).unwrap_err();
    let text = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
    assert!(text.contains("no PCI device 0000:ff:1f.7"), "{text}");
}

#[test]
fn a_file_that_grows_page_by_page_does_not_use_up_what_all_guests_share() {
    let (kernel, map) = map();
    let file = sparse(MIB);
    let mut table = Arc::<Table>::default();
    for pages in 1..=200 {
        table = changed(&map, "vm0", &table, vec![region(&file, 0, pages * 4096, 0)]);
        assert!(
            kernel.mapped().len() <= 16,
            "{} extents after {pages} pages",
            kernel.mapped().len()
        );
    }
}

#[test]
fn memory_in_too_many_pieces_is_refused_with_the_limit() {
    let (kernel, map) = map();
    let file = sparse(2000 * 4096);
    let pages = |from: u64, count: u64| -> Vec<RegionSpec> {
        (from..from + count)
            .map(|page| region(&file, page << 20, 4096, page * 4096))
            .collect()
    };
    let refused = map.add("vm0", pages(0, 1026)).map(drop).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the guest's memory would be in 1026 pieces, and one guest may have 1024"
    );
    assert_eq!(kernel.mapped(), vec![]);
    // Views of all of it, again and again, and eight extents in each gigabyte.
    let large = sparse(4 << 30);
    let eighth = 1_u64 << 27;
    let eighths = (0..32)
        .map(|at| region(&large, at * eighth, eighth, at * eighth))
        .collect();
    let table = map.add("vm0", eighths).unwrap();
    let before = kernel.mapped();
    let views = (0..257)
        .map(|view| region(&large, view << 40, 4 << 30, 0))
        .collect();
    let refused = map.change("vm0", &table, views).map(drop).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the guest's memory would be in 8193 pieces, and one guest may have 8192"
    );
    assert_eq!(kernel.mapped(), before);
}

fn punch(file: &File, at: u64, len: u64) {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file.as_fd(), hole, at, len).unwrap();
}

#[test]
fn trap_23_memory_the_vmm_only_reserved_is_not_taken_for_discarded() {
    let (_kernel, map) = map();
    let _device = map.attach(&card(0)).unwrap();
    let file = sparse(2 * MIB);
    fallocate(file.as_fd(), FallocateFlags::empty(), 0, 2 * MIB).unwrap();
    let table = map.add("vm0", vec![region(&file, 0, 2 * MIB, 0)]).unwrap();
    assert_eq!(map.find_discarded(&table), 0);
    punch(&file, MIB, 4096);
    assert_eq!(map.find_discarded(&table), 4096);
}

#[test]
fn trap_21_pages_discarded_behind_a_pin_are_found_and_mapped_anew() {
    let (kernel, map) = map();
    let file = filled(8 * MIB);
    let wanted = || {
        vec![
            region(&file, 0, 4 * MIB, 0),
            region(&file, 1 << 32, 4 * MIB, 4 * MIB),
        ]
    };
    let table = map.add("vm0", wanted()).unwrap();
    punch(&file, MIB, 4096);
    assert_eq!(
        map.find_discarded(&table),
        0,
        "nothing is pinned yet: the pin will fill it"
    );
    fill(&file);
    let _device = map.attach(&card(0)).unwrap();
    assert_eq!(map.find_discarded(&table), 0);

    punch(&file, MIB, 2 * 4096);
    assert_eq!(map.find_discarded(&table), 2 * 4096);
    let change = map.change("vm0", &table, wanted()).unwrap();
    let stays = |extent: &&Arc<Extent>| {
        change
            .table()
            .extents()
            .iter()
            .any(|other| Arc::ptr_eq(extent, other))
    };
    assert_eq!(
        table.extents().iter().filter(stays).count(),
        1,
        "the other half shows what its file holds"
    );
    assert_eq!(kernel.mapped().len(), 3);
    let next = Arc::clone(change.table());
    change.finish().unwrap();
    assert_eq!((kernel.mapped().len(), map.snapshot().discards), (2, 1));
    fill(&file);
    assert_eq!(map.find_discarded(&next), 0);
}

#[test]
fn trap_21_two_guests_of_one_memory_each_come_to_what_was_mapped_anew() {
    let (kernel, map) = map();
    let file = filled(4 * MIB);
    let wanted = || vec![region(&file, 0, 4 * MIB, 0)];
    let [a, b] = ["vm0-a", "vm0-b"].map(|owner| map.add(owner, wanted()).unwrap());
    let _device = map.attach(&card(0)).unwrap();
    punch(&file, 0, 4096);
    assert_eq!(map.find_discarded(&a), 4096);
    let a = changed(&map, "vm0-a", &a, wanted());
    fill(&file);
    assert_eq!(kernel.mapped().len(), 2, "the other guest has the old one");
    assert_eq!(map.find_discarded(&b), 0, "it is one extent, and known");
    assert!(b.has_discarded() && !a.has_discarded());
    let b = changed(&map, "vm0-b", &b, wanted());
    assert!(is_same(a.extents(), b.extents()));
    assert_eq!((kernel.mapped().len(), map.snapshot().discards), (1, 1));
}

#[test]
fn the_pages_of_huge_memory_are_told_by_its_extents() {
    let (_, map) = map();
    let huge = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap());
    huge.set_len(4 * MIB).unwrap();
    let wanted = vec![
        region(&Arc::new(huge), 0, 4 * MIB, 0),
        region(&sparse(4 * MIB), 1 << 32, 4 * MIB, 0),
    ];
    let _table = map.add("vm0", wanted).unwrap();
    let pages: Vec<u64> = map
        .snapshot()
        .extents
        .iter()
        .map(|extent| extent.page_bytes)
        .collect();
    assert_eq!(pages, [2 * MIB, 4096]);
}
