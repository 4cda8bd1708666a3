//! The map against a model of it: random sequences of changes of guests' memory, of devices that come and go, and of
//! failures of every call to the kernel. After each step the map, its books and the fake kernel must say what the model
//! says; nothing may have been taken away that is in use; and what stays may not have moved.
//!
//! The model knows nothing of IOVAs, extents or grids. It knows which bytes of which file each guest is to have, in
//! pages, and what the map promises of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use rustix::fs::{MemfdFlags, memfd_create};

use super::extent::CELL_BYTES;
use super::plan::MOST_SPLINTERS;
use super::{Change, Device, Extent, MapError, MemoryMap};
use crate::address::{FrontendAddress, GuestAddress};
use crate::iommu::DeviceAddress;
use crate::iommu::fake::FakeKernel;
use crate::memory::{DmaBuffer, RegionSpec, Table, TableHint};
use crate::pci::testing::Nothing;

const PAGE: u64 = 4096;
const GUESTS: usize = 3;
const FILES: usize = 2;
const FILE_BYTES: u64 = 2 * CELL_BYTES + 8 * PAGE;
const DEVICES: usize = 3;

/// What an attached device reaches: more than enough room, all of it or only above what is mapped at first.
const ALL: (u64, u64) = (1 << 20, (1 << 41) - 1);
const HIGH: (u64, u64) = (1 << 40, (1 << 41) - 1);

#[derive(Clone, Debug)]
enum Step {
    /// A guest's new memory, all of it.
    Table {
        guest: usize,
        regions: Vec<Piece>,
    },
    /// One more region, as ADD_MEM_REG.
    Add {
        guest: usize,
        region: Piece,
    },
    /// One region less, as REM_MEM_REG.
    Remove {
        guest: usize,
        which: Index,
    },
    /// A region in two, or the next one joined to it, with the same bytes.
    Split {
        guest: usize,
        which: Index,
        at: u64,
    },
    /// The guest goes.
    Leave {
        guest: usize,
    },
    /// A change is begun and taken back, as when the lanes cannot follow.
    ChangeItsMind {
        guest: usize,
        regions: Vec<Piece>,
    },
    /// Memory of our own, as for a ring.
    NewBuffer {
        pages: usize,
    },
    DropBuffer(Index),
    Attach {
        device: usize,
        reaches: (u64, u64),
    },
    Detach(Index),
}

/// Some bytes of a file that a region shows. Where the guest sees them follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    file: usize,
    by: Descriptor,
    start: u64,
    end: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Descriptor {
    Same,
    SentAgain,
    OpenedAgain,
}

/// Pages of a file that regions start and end in: at both ends and on both sides of each cell's border.
fn page_near_a_border() -> impl Strategy<Value = u64> {
    let border = CELL_BYTES / PAGE;
    prop_oneof![0..3_u64, border - 2..border + 2, 2 * border - 2..2 * border + 8]
}

fn piece() -> impl Strategy<Value = Piece> {
    let by = prop_oneof![
        4 => Just(Descriptor::Same),
        1 => Just(Descriptor::SentAgain),
        1 => Just(Descriptor::OpenedAgain)
    ];
    let pages = (page_near_a_border(), page_near_a_border()).prop_map(|(a, b)| (a.min(b), a.max(b)));
    // Where in its first and last page it starts and ends; mostly on the page.
    let inside = (0..512_u64, 1..=512_u64, 0..4_u8).prop_map(|(start, end, odd)| match odd {
        0 => (start.min(end - 1) * 8, end * 8),
        _ => (0, PAGE),
    });
    (0..FILES, by, pages, inside).prop_map(|(file, by, (first, last), (from, to))| Piece {
        file,
        by,
        start: first * PAGE + from,
        end: last * PAGE + to,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let guest = || 0..GUESTS;
    let reaches = prop_oneof![3 => Just(ALL), 1 => Just(HIGH)];
    prop_oneof![
        4 => (guest(), vec(piece(), 0..4)).prop_map(|(guest, regions)| Step::Table { guest, regions }),
        4 => (guest(), piece()).prop_map(|(guest, region)| Step::Add { guest, region }),
        4 => (guest(), any::<Index>()).prop_map(|(guest, which)| Step::Remove { guest, which }),
        3 => (guest(), any::<Index>(), page_near_a_border(), 0..512_u64)
            .prop_map(|(guest, which, page, word)| Step::Split { guest, which, at: page * PAGE + 8 * word }),
        1 => guest().prop_map(|guest| Step::Leave { guest }),
        1 => (guest(), vec(piece(), 0..3)).prop_map(|(guest, regions)| Step::ChangeItsMind { guest, regions }),
        1 => (1..5_usize).prop_map(|pages| Step::NewBuffer { pages }),
        1 => any::<Index>().prop_map(Step::DropBuffer),
        2 => (0..DEVICES, reaches).prop_map(|(device, reaches)| Step::Attach { device, reaches }),
        2 => any::<Index>().prop_map(Step::Detach),
    ]
}

/// Which of the kernel's answers to a step are refusals: mostly none.
fn failures() -> impl Strategy<Value = Vec<bool>> {
    prop_oneof![3 => Just(Vec::new()), 1 => vec(any::<bool>(), 1..6)]
}

/// A guest: what it was given, and what the model says it has.
#[derive(Default)]
struct Guest {
    table: Arc<Table>,
    regions: Vec<Piece>,
}

impl Guest {
    /// The pages that its regions touch.
    fn pages(&self) -> BTreeMap<usize, Vec<Range<u64>>> {
        pages_of(&self.regions)
    }
}

/// The pages that regions touch, by file, sorted, those that overlap or touch joined.
fn pages_of(regions: &[Piece]) -> BTreeMap<usize, Vec<Range<u64>>> {
    let mut by_file: BTreeMap<usize, Vec<Range<u64>>> = BTreeMap::new();
    let mut sorted = regions.to_vec();
    sorted.sort_by_key(|piece| piece.start);
    for piece in sorted {
        let range = piece.start - piece.start % PAGE..piece.end.next_multiple_of(PAGE);
        let ranges = by_file.entry(piece.file).or_default();
        match ranges.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => ranges.push(range),
        }
    }
    by_file
}

/// The map under test, what the test holds of it, and the model.
struct Bench {
    kernel: FakeKernel,
    map: Arc<MemoryMap>,
    files: Vec<Arc<File>>,
    guests: Vec<Guest>,
    buffers: Vec<DmaBuffer>,
    devices: Vec<Device>,
    reaches: (u64, u64),
    /// Extents that the kernel would not give up: start and length.
    stuck: BTreeSet<(u64, u64)>,
}

impl Bench {
    fn new() -> Self {
        let kernel = FakeKernel::default();
        for index in 0..DEVICES {
            kernel.plug(&device(index), Arc::new(Nothing));
        }
        Self {
            map: MemoryMap::new("main", kernel.iommu()),
            kernel,
            files: (0..FILES).map(stamped_file).collect(),
            guests: (0..GUESTS).map(|_| Guest::default()).collect(),
            buffers: Vec::new(),
            devices: Vec::new(),
            reaches: ALL,
            stuck: BTreeSet::new(),
        }
    }

    fn run(&mut self, step: &Step, failures: &[bool]) {
        self.kernel.fail_each(failures.iter().copied());
        match step {
            Step::Table { guest, regions } => self.change(*guest, regions, Outcome::Finished),
            Step::ChangeItsMind { guest, regions } => self.change(*guest, regions, Outcome::Undone),
            Step::Leave { guest } => self.change(*guest, &[], Outcome::Finished),
            Step::Add { guest, region } => {
                let mut regions = self.guests[*guest].regions.clone();
                regions.push(*region);
                self.change(*guest, &regions, Outcome::Finished);
            }
            Step::Remove { guest, which } => {
                let mut regions = self.guests[*guest].regions.clone();
                if !regions.is_empty() {
                    regions.remove(which.index(regions.len()));
                }
                self.change(*guest, &regions, Outcome::Finished);
            }
            Step::Split { guest, which, at } => self.split(*guest, which, *at),
            Step::NewBuffer { pages } => {
                if let Ok(buffer) = DmaBuffer::new(&self.map, "rings", "card", pages * 4096) {
                    self.buffers.push(buffer);
                }
            }
            Step::DropBuffer(index) if !self.buffers.is_empty() => {
                let buffer = self.buffers.swap_remove(index.index(self.buffers.len()));
                let place = (buffer.iova().raw(), buffer.len() as u64);
                drop(buffer);
                self.find_stuck(&[place]);
            }
            Step::Attach { device, reaches } => self.attach(*device, *reaches),
            Step::Detach(index) if !self.devices.is_empty() => {
                let device = self.devices.swap_remove(index.index(self.devices.len()));
                // Out of the books whatever the kernel says.
                let _ = device.detach();
            }
            _ => {}
        }
        self.kernel.fail_each([]);
    }

    /// A region joined to the one behind it, or where there is none, in two at byte `at` of its file.
    fn split(&mut self, guest: usize, which: &Index, at: u64) {
        let mut regions = self.guests[guest].regions.clone();
        if regions.is_empty() {
            return;
        }
        let index = which.index(regions.len());
        let whole = regions[index];
        let neighbour = regions
            .iter()
            .position(|piece| piece.file == whole.file && piece.start == whole.end);
        if let Some(next) = neighbour {
            regions[index].end = regions[next].end;
            regions.remove(next);
        } else if (whole.start + 1..whole.end).contains(&at) {
            regions[index].end = at;
            regions.push(Piece { start: at, ..whole });
        }
        let before = self.guests[guest].table.extents().to_vec();
        let pages = self.guests[guest].pages();
        self.change(guest, &regions, Outcome::Finished);
        if pages_of(&regions) == pages {
            let after = self.guests[guest].table.extents();
            let stays = |extent: &Arc<Extent>| after.iter().any(|other| Arc::ptr_eq(extent, other));
            assert!(
                before.len() == after.len() && before.iter().all(stays),
                "the same bytes in other regions moved"
            );
        }
    }

    fn change(&mut self, guest: usize, regions: &[Piece], outcome: Outcome) {
        let specs = regions.iter().map(|piece| self.spec(piece)).collect();
        let owner = format!("vm{guest}");
        let before = Arc::clone(&self.guests[guest].table);
        let mapped = self.kernel.mapped();
        let change = self.map.change(&owner, &before, specs);
        // Whatever comes of it, nothing that was there has gone: lanes are using it.
        let now: BTreeSet<(u64, u64)> = self.kernel.mapped().into_iter().collect();
        assert!(
            mapped.iter().all(|place| now.contains(place)),
            "it went before it was drained"
        );
        let change = match change {
            Ok(change) => change,
            Err(error) => {
                let refused = matches!(error, MapError::Iommu(_));
                let overlapping = matches!(error, MapError::Overlap(_));
                let no_room = matches!(error, MapError::NoIova { .. });
                assert!(refused || overlapping || no_room, "{error:?}");
                // What was mapped for it and could not be unmapped again.
                let left: Vec<(u64, u64)> = now
                    .iter()
                    .filter(|place| !mapped.contains(place))
                    .copied()
                    .collect();
                self.find_stuck(&left);
                return;
            }
        };
        self.check_change(&before, &change, regions);
        let places = |extents: &[Arc<Extent>]| -> Vec<(u64, u64)> {
            extents
                .iter()
                .map(|extent| (extent.iova().raw(), extent.len()))
                .collect()
        };
        match outcome {
            Outcome::Undone => {
                let gained = places(change.table().extents());
                change.undo();
                self.find_stuck(&gained);
            }
            Outcome::Finished => {
                let next = Arc::clone(change.table());
                // Lanes have let go of what leaves, and may use the rest from now on.
                for extent in before.extents() {
                    self.kernel.release(extent.iova(), extent.len());
                }
                for extent in next.extents() {
                    self.kernel.hold(extent.iova(), extent.len());
                }
                let _ = change.finish();
                self.guests[guest].table = next;
                self.guests[guest].regions = regions.to_vec();
                self.find_stuck(&places(before.extents()));
            }
        }
    }

    /// What the map promises of a change before it is finished.
    fn check_change(&self, before: &Table, change: &Change, regions: &[Piece]) {
        let next = change.table();
        for extent in before.extents() {
            let stays = next.extents().iter().any(|other| Arc::ptr_eq(other, extent));
            let place = extent.iova();
            assert_eq!(
                change.leaving().has(place),
                !stays,
                "what leaves is what is not in the next table"
            );
            let range = extent.file_range();
            let file = self
                .files
                .iter()
                .position(|file| Arc::ptr_eq(file, extent.file()) || same_inode(file, extent.file()));
            let wanted = pages_of(regions);
            let all_wanted = wanted
                .get(&file.expect("a file of the test"))
                .is_some_and(|pages| {
                    pages
                        .iter()
                        .any(|pages| pages.start <= range.start && range.end <= pages.end)
                });
            let square = |extent: &Extent| extent.file_range().start / CELL_BYTES;
            let in_square = |other: &&Arc<Extent>| square(other) == square(extent);
            let may_be_joined = before.extents().iter().filter(in_square).count() > MOST_SPLINTERS;
            assert!(
                !all_wanted || stays || may_be_joined,
                "bytes that stay were moved: {range:#x?}"
            );
        }
    }

    fn attach(&mut self, index: usize, reaches: (u64, u64)) {
        let address = device(index);
        if self.devices.iter().any(|device| *device.address() == address) {
            let twice = self.map.attach(&address);
            assert!(matches!(twice, Err(MapError::AlreadyAttached { .. })));
            return;
        }
        self.kernel.set_usable(vec![reaches.0..=reaches.1]);
        let strands = self
            .kernel
            .mapped()
            .iter()
            .any(|(start, len)| *start < reaches.0 || start + len - 1 > reaches.1);
        match self.map.attach(&address) {
            Ok(device) => {
                assert!(!strands);
                self.devices.push(device);
                self.reaches = reaches;
            }
            Err(MapError::Strands { .. }) => assert!(strands),
            Err(error) => assert!(matches!(error, MapError::Iommu(_)), "{error:?}"),
        }
        self.kernel.set_usable(vec![self.reaches.0..=self.reaches.1]);
    }

    /// Notes which of these places are still mapped with nobody having them.
    fn find_stuck(&mut self, places: &[(u64, u64)]) {
        let owned = self.owned();
        let mapped = self.kernel.mapped();
        for place in places.iter().filter(|place| mapped.contains(place)) {
            if !owned.contains(place) {
                self.stuck.insert(*place);
            }
        }
    }

    /// Everything somebody has: guests' extents and our own buffers.
    fn owned(&self) -> BTreeSet<(u64, u64)> {
        let guests = self.guests.iter().flat_map(|guest| guest.table.extents());
        let guests = guests.map(|extent| (extent.iova().raw(), extent.len()));
        let own = self
            .buffers
            .iter()
            .map(|buffer| (buffer.iova().raw(), buffer.len() as u64));
        guests.chain(own).collect()
    }

    /// Everything the map promises between two steps.
    fn check(&self) {
        let snapshot = self.map.snapshot();
        let mapped = self.kernel.mapped();
        let in_books: Vec<(u64, u64)> = snapshot
            .extents
            .iter()
            .map(|extent| (extent.iova.raw(), extent.len))
            .collect();
        assert_eq!(in_books, mapped, "the books and the kernel differ");
        for pair in mapped.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?} overlap");
        }
        // No extent that nobody has, but those the kernel would not give up; and none of those is anybody's.
        let expected: BTreeSet<(u64, u64)> = self.owned().union(&self.stuck).copied().collect();
        assert_eq!(
            mapped.into_iter().collect::<BTreeSet<_>>(),
            expected,
            "an extent leaks, or is missing"
        );
        assert!(self.owned().is_disjoint(&self.stuck));
        assert_eq!(
            self.kernel.attached(),
            snapshot.devices,
            "the books' devices are the kernel's"
        );

        assert_eq!(self.kernel.violations(), Vec::<String>::new());
        let bus = self.map.software_bus();
        for (index, guest) in self.guests.iter().enumerate() {
            self.check_guest(index, guest);
        }
        for extent in &snapshot.extents {
            let stuck = self.stuck.contains(&(extent.iova.raw(), extent.len));
            let expected = if stuck { 0 } else { extent.len };
            assert_eq!(bus.room(extent.iova) as u64, expected);
        }
    }

    /// A guest has exactly the pages that its regions touch, each once, and every translation is right.
    fn check_guest(&self, index: usize, guest: &Guest) {
        for (number, file) in self.files.iter().enumerate() {
            let mut has: Vec<Range<u64>> = Vec::new();
            let of_file = |extent: &&Arc<Extent>| same_inode(file, extent.file());
            let mut extents: Vec<&Arc<Extent>> = guest.table.extents().iter().filter(of_file).collect();
            extents.sort_by_key(|extent| extent.file_range().start);
            for extent in extents {
                let range = extent.file_range();
                assert_eq!(
                    range.start / CELL_BYTES,
                    (range.end - 1) / CELL_BYTES,
                    "it crosses the grid"
                );
                match has.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    Some(last) => {
                        assert!(
                            last.end < range.start,
                            "vm{index} has bytes of file {number} twice"
                        );
                        has.push(range);
                    }
                    None => has.push(range),
                }
            }
            let wanted = guest.pages().remove(&number).unwrap_or_default();
            assert_eq!(has, wanted, "vm{index} of file {number}");
        }
        for spec in guest.table.regions() {
            self.check_bytes(&guest.table, spec);
        }
    }

    /// The first and last bytes of a region, and those at its cells' borders, are those of the file for a device.
    fn check_bytes(&self, table: &Table, spec: &RegionSpec) {
        let end = spec.file_offset + spec.len;
        let borders = [CELL_BYTES - 8, CELL_BYTES, 2 * CELL_BYTES - 8, 2 * CELL_BYTES];
        let places = borders.into_iter().chain([spec.file_offset, end - 8]);
        for offset in places.filter(|offset| (spec.file_offset..end - 7).contains(offset)) {
            let guest = GuestAddress(spec.guest.0 + (offset - spec.file_offset));
            let piece = table.lookup(&mut TableHint::default(), guest, 8).unwrap();
            let (mut by_bus, mut by_file) = ([0; 8], [0; 8]);
            self.map.software_bus().read(piece.iova, &mut by_bus).unwrap();
            spec.file.read_exact_at(&mut by_file, offset).unwrap();
            assert_eq!(by_bus, by_file);
            let stamped = stamped_pages().any(|page| page == offset / PAGE);
            assert_eq!(by_bus != [0; 8], stamped, "the stamp of page {}", offset / PAGE);
            assert!(self.kernel.is_mapped(piece.iova.raw(), piece.len() as u64));
        }
    }

    fn spec(&self, piece: &Piece) -> RegionSpec {
        let held = &self.files[piece.file];
        let file = match piece.by {
            Descriptor::Same => Arc::clone(held),
            Descriptor::SentAgain => Arc::new(held.try_clone().unwrap()),
            Descriptor::OpenedAgain => {
                let path = format!("/proc/self/fd/{}", held.as_raw_fd());
                Arc::new(File::options().read(true).write(true).open(path).unwrap())
            }
        };
        let guest = (piece.file as u64 + 1) << 40 | piece.start;
        RegionSpec {
            guest: GuestAddress(guest),
            frontend: FrontendAddress(guest + (1 << 46)),
            len: piece.end - piece.start,
            file,
            file_offset: piece.start,
        }
    }

    /// Everybody goes. What is left is what the kernel would not give up, and nothing else.
    fn release_everything(mut self) {
        for guest in 0..GUESTS {
            self.change(guest, &[], Outcome::Finished);
        }
        self.buffers.clear();
        self.devices.clear();
        self.check();
        let stuck: u64 = self.stuck.iter().map(|(_, len)| len).sum();
        let books = self.map.books();
        assert_eq!(books.records.len(), self.stuck.len());
        let lost: u64 = books.iovas.taken().map(|(first, last)| last - first + 1).sum();
        assert_eq!(lost, stuck, "IOVAs are lost");
    }
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    Finished,
    Undone,
}

fn device(index: usize) -> DeviceAddress {
    DeviceAddress::VfioUser(format!("/run/card{index}.sock").into())
}

fn same_inode(a: &File, b: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let number = |file: &File| file.metadata().unwrap().ino();
    number(a) == number(b)
}

/// The pages that regions start and end in, but for those that a split ends right behind.
fn stamped_pages() -> impl Iterator<Item = u64> {
    let border = CELL_BYTES / PAGE;
    (0..3)
        .chain(border - 2..border + 2)
        .chain(2 * border - 2..2 * border + 8)
}

/// A sparse file in which these pages say which they are.
fn stamped_file(index: usize) -> Arc<File> {
    let file = File::from(memfd_create(format!("guest{index}"), MemfdFlags::CLOEXEC).unwrap());
    file.set_len(FILE_BYTES).unwrap();
    for page in stamped_pages() {
        let stamp = (index as u64 + 1) << 32 | (page + 1);
        let bytes: Vec<u8> = std::iter::repeat_n(stamp.to_ne_bytes(), 512).flatten().collect();
        file.write_all_at(&bytes, page * PAGE).unwrap();
    }
    Arc::new(file)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_map_does_what_its_model_does(steps in vec((step(), failures()), 1..24)) {
        let mut bench = Bench::new();
        for (step, failures) in &steps {
            bench.run(step, failures);
            bench.check();
        }
        bench.release_everything();
    }
}
