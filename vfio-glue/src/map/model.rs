//! The map against a model of it: random steps with failures thrown in, and after each the map, its books and the
//! fake kernel must say what the model says.
//!
//! The model knows nothing of IOVAs. It counts owners of file ranges, and what each step does when the kernel
//! refuses the calls it is told to refuse.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use rustix::fs::{MemfdFlags, memfd_create};

use super::extent::CELL_BYTES;
use super::{Device, MapError, MemoryMap};
use crate::address::{FrontendAddress, GuestAddress};
use crate::iommu::DeviceAddress;
use crate::iommu::fake::FakeKernel;
use crate::memory::{DmaBuffer, Region, RegionSpec, Table, TableHint};
use crate::pci::testing::Nothing;

const PAGE: u64 = 4096;
const FILES: usize = 3;
const FILE_BYTES: u64 = 2 * CELL_BYTES + 8 * PAGE;
const DEVICES: usize = 3;
const OWN: &str = "vuv-rings";
const STUCK: &str = "unmap failed";

/// What an attached device reaches: more than enough room, all of it or only above what is mapped at first.
const ALL: (u64, u64) = (1 << 20, (1 << 41) - 1);
const HIGH: (u64, u64) = (1 << 40, (1 << 41) - 1);

#[derive(Clone, Debug)]
enum Step {
    Add {
        owner: usize,
        file: usize,
        by: Descriptor,
        pages: (u64, u64),
        inside: (u64, u64),
    },
    Remove(Index),
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

#[derive(Clone, Copy, Debug)]
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

fn step() -> impl Strategy<Value = Step> {
    let by = prop_oneof![
        Just(Descriptor::Same),
        Just(Descriptor::SentAgain),
        Just(Descriptor::OpenedAgain)
    ];
    let pages = (page_near_a_border(), page_near_a_border()).prop_map(|(a, b)| (a.min(b), a.max(b)));
    // Where in its first and last page a region starts and ends; half of them on the page.
    let inside = (0..512_u64, 1..=512_u64, any::<bool>()).prop_map(|(start, end, whole)| {
        if whole {
            (0, PAGE)
        } else {
            (start.min(end - 1) * 8, end * 8)
        }
    });
    let reaches = prop_oneof![3 => Just(ALL), 1 => Just(HIGH)];
    prop_oneof![
        6 => (0..3_usize, 0..FILES, by, pages, inside)
            .prop_map(|(owner, file, by, pages, inside)| Step::Add { owner, file, by, pages, inside }),
        5 => any::<Index>().prop_map(Step::Remove),
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

/// A range of a file: the file's name, offset and length.
type Cell = (String, u64, u64);

#[derive(Default)]
struct Model {
    /// Who has what is mapped, once for each time.
    owned: BTreeMap<Cell, Vec<String>>,
    /// What the kernel would not give up.
    stuck: Vec<Cell>,
    devices: Vec<DeviceAddress>,
}

/// The kernel's answers to come: `true` is a refusal.
type Answers<'a> = std::iter::Copied<std::slice::Iter<'a, bool>>;

impl Model {
    fn acquire(&mut self, cells: &[Cell], owner: &str, answers: &mut Answers<'_>) -> bool {
        for (index, cell) in cells.iter().enumerate() {
            let refused = !self.owned.contains_key(cell) && answers.next() == Some(true);
            if refused {
                self.release(&cells[..index], owner, answers);
                return false;
            }
            self.owned.entry(cell.clone()).or_default().push(owner.to_owned());
        }
        true
    }

    fn release(&mut self, cells: &[Cell], owner: &str, answers: &mut Answers<'_>) -> bool {
        let mut done = true;
        for cell in cells {
            let owners = self.owned.get_mut(cell).expect("the model released what it has");
            let index = owners.iter().position(|other| other == owner);
            owners.swap_remove(index.expect("the model released for an owner"));
            if owners.is_empty() {
                self.owned.remove(cell);
                if answers.next() == Some(true) {
                    self.stuck.push(cell.clone());
                    done = false;
                }
            }
        }
        done
    }

    /// As a snapshot would list it, but for the IOVAs.
    fn listed(&self) -> Vec<(Cell, Vec<String>)> {
        let owned = self.owned.iter().map(|(cell, owners)| {
            let mut owners = owners.clone();
            owners.sort();
            (cell.clone(), owners)
        });
        let stuck = self
            .stuck
            .iter()
            .map(|cell| (cell.clone(), vec![STUCK.to_owned()]));
        let mut listed: Vec<_> = owned.chain(stuck).collect();
        listed.sort();
        listed
    }
}

/// The map under test, what the test holds of it, and the model.
struct Bench {
    kernel: FakeKernel,
    map: Arc<MemoryMap>,
    files: Vec<Arc<File>>,
    regions: Vec<(Region, String, Vec<Cell>)>,
    buffers: Vec<(DmaBuffer, Cell)>,
    devices: Vec<Device>,
    reaches: (u64, u64),
    model: Model,
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
            regions: Vec::new(),
            buffers: Vec::new(),
            devices: Vec::new(),
            reaches: ALL,
            model: Model::default(),
        }
    }

    fn run(&mut self, step: &Step, failures: &[bool]) {
        self.kernel.fail_each(failures.iter().copied());
        let mut answers = failures.iter().copied();
        match step {
            Step::Add {
                owner,
                file,
                by,
                pages,
                inside,
            } => self.add(&format!("vm{owner}"), *file, *by, *pages, *inside, &mut answers),
            Step::Remove(index) if !self.regions.is_empty() => {
                let (region, owner, cells) = self.regions.swap_remove(index.index(self.regions.len()));
                let removed = self.map.remove_region(&owner, &region);
                let expected = self.model.release(&cells, &owner, &mut answers);
                assert_eq!(removed.is_ok(), expected, "{removed:?}");
            }
            Step::NewBuffer { pages } => {
                // Each is a file of its own, told apart by nothing but its place in the list.
                let buffer = DmaBuffer::new(&self.map, "rings", "card", pages * 4096);
                let refused = answers.next() == Some(true);
                assert_eq!(buffer.is_err(), refused, "{buffer:?}");
                if let Ok(buffer) = buffer {
                    let cell = (OWN.to_owned(), 0, *pages as u64 * PAGE);
                    self.buffers.push((buffer, cell));
                }
            }
            Step::DropBuffer(index) if !self.buffers.is_empty() => {
                let (buffer, cell) = self.buffers.swap_remove(index.index(self.buffers.len()));
                drop(buffer);
                if answers.next() == Some(true) {
                    self.model.stuck.push(cell);
                }
            }
            Step::Attach { device, reaches } => self.attach(*device, *reaches, &mut answers),
            Step::Detach(index) if !self.devices.is_empty() => {
                let device = self.devices.swap_remove(index.index(self.devices.len()));
                self.model.devices.retain(|other| other != device.address());
                let refused = answers.next() == Some(true);
                assert_eq!(device.detach().is_err(), refused);
            }
            _ => {}
        }
        self.kernel.fail_each([]);
    }

    fn add(
        &mut self,
        owner: &str,
        file: usize,
        by: Descriptor,
        (first, last): (u64, u64),
        (start, end): (u64, u64),
        answers: &mut Answers<'_>,
    ) {
        let held = &self.files[file];
        let sent = match by {
            Descriptor::Same => Arc::clone(held),
            Descriptor::SentAgain => Arc::new(held.try_clone().unwrap()),
            Descriptor::OpenedAgain => {
                let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(held));
                Arc::new(File::options().read(true).write(true).open(path).unwrap())
            }
        };
        let file_offset = first * PAGE + start;
        let spec = RegionSpec {
            guest: GuestAddress(file_offset),
            frontend: FrontendAddress(file_offset),
            len: last * PAGE + end - file_offset,
            file: sent,
            file_offset,
        };
        // What the grid makes of these pages, in other words than the code's.
        let borders: Vec<u64> = (1..=2).map(|n| n * CELL_BYTES / PAGE).collect();
        let mut cells: Vec<Cell> = Vec::new();
        let mut from = first;
        for border in borders.into_iter().chain([u64::MAX]) {
            let to = border.min(last + 1);
            if from < to {
                cells.push((format!("guest{file}"), from * PAGE, (to - from) * PAGE));
                from = to;
            }
        }
        let added = self.map.add_region(owner, spec);
        let expected = self.model.acquire(&cells, owner, answers);
        assert_eq!(added.is_ok(), expected, "{added:?}");
        if let Ok(region) = added {
            self.regions.push((region, owner.to_owned(), cells));
        }
    }

    fn attach(&mut self, index: usize, reaches: (u64, u64), answers: &mut Answers<'_>) {
        let address = device(index);
        let attached = if self.model.devices.contains(&address) {
            let twice = self.map.attach(&address);
            assert!(matches!(twice, Err(MapError::AlreadyAttached { .. })));
            return;
        } else {
            self.kernel.set_usable(vec![reaches.0..=reaches.1]);
            self.map.attach(&address)
        };
        let strands = self
            .kernel
            .mapped()
            .iter()
            .any(|(start, len)| *start < reaches.0 || start + len - 1 > reaches.1);
        let refused = answers.next() == Some(true) || answers.next() == Some(true);
        match attached {
            Ok(device) => {
                assert!(!strands && !refused);
                self.model.devices.push(address);
                self.devices.push(device);
                self.reaches = reaches;
            }
            Err(MapError::Strands { .. }) => assert!(strands && !refused),
            Err(_) => assert!(refused),
        }
        self.kernel.set_usable(vec![self.reaches.0..=self.reaches.1]);
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
        let mut listed: Vec<(Cell, Vec<String>)> = snapshot
            .extents
            .iter()
            .map(|extent| {
                let name = extent.file.trim_start_matches("/memfd:");
                let name = name.trim_end_matches(" (deleted)").to_owned();
                let mut owners = extent.owners.clone();
                owners.sort();
                ((name, extent.file_offset, extent.len), owners)
            })
            .collect();
        listed.sort();
        let mut expected = self.model.listed();
        let own = self.buffers.iter();
        expected.extend(own.map(|(_, cell)| (cell.clone(), vec!["card rings".to_owned()])));
        expected.sort();
        assert_eq!(listed, expected);
        assert_eq!(snapshot.devices.len(), self.model.devices.len());
        assert_eq!(self.kernel.attached(), self.model.devices);

        let bus = self.map.software_bus();
        for (region, ..) in &self.regions {
            self.check_bytes(region);
        }
        for extent in &snapshot.extents {
            let stuck = extent.owners == [STUCK];
            let expected = if stuck { 0 } else { extent.len };
            assert_eq!(bus.room(extent.iova) as u64, expected);
        }
    }

    /// The first and last bytes of a region, and those at its cells' borders, are those of the file for a device.
    fn check_bytes(&self, region: &Region) {
        let spec = region.spec().clone();
        let copy = Arc::new(Region {
            spec: spec.clone(),
            pieces: region.pieces.clone(),
        });
        let table = Table::new(vec![copy]).unwrap();
        let end = spec.file_offset + spec.len;
        let borders = [CELL_BYTES - 8, CELL_BYTES, 2 * CELL_BYTES - 8, 2 * CELL_BYTES];
        let places = borders.into_iter().chain([spec.file_offset, end - 8]);
        for offset in places.filter(|offset| (spec.file_offset..end).contains(offset)) {
            let guest = GuestAddress(spec.guest.0 + (offset - spec.file_offset));
            let piece = table.lookup(&mut TableHint::default(), guest, 8).unwrap();
            let (mut by_bus, mut by_file) = ([0; 8], [0; 8]);
            self.map.software_bus().read(piece.iova, &mut by_bus).unwrap();
            spec.file.read_exact_at(&mut by_file, offset).unwrap();
            assert_eq!(by_bus, by_file);
            assert_ne!(by_bus, [0; 8], "a page without a stamp");
            assert!(self.kernel.is_mapped(piece.iova.raw(), 8));
        }
    }

    /// Everybody goes. What is left is what the kernel would not give up, and nothing else.
    fn release_everything(mut self) {
        for (region, owner, cells) in std::mem::take(&mut self.regions) {
            self.map.remove_region(&owner, &region).unwrap();
            assert!(self.model.release(&cells, &owner, &mut [].iter().copied()));
        }
        self.buffers.clear();
        self.devices.clear();
        self.model.devices.clear();
        self.check();
        let stuck: u64 = self.model.stuck.iter().map(|(_, _, len)| len).sum();
        let books = self.map.books();
        let taken: u64 = books.records.values().map(|record| record.extent.len()).sum();
        assert_eq!((books.records.len(), taken), (self.model.stuck.len(), stuck));
        assert!(books.shared.is_empty());
        let lost: u64 = books.iovas.taken().map(|(first, last)| last - first + 1).sum();
        assert_eq!(lost, stuck, "IOVAs are lost");
    }
}

fn device(index: usize) -> DeviceAddress {
    DeviceAddress::VfioUser(format!("/run/card{index}.sock").into())
}

/// A sparse file in which every page that regions start or end in says which it is.
fn stamped_file(index: usize) -> Arc<File> {
    let file = File::from(memfd_create(format!("guest{index}"), MemfdFlags::CLOEXEC).unwrap());
    file.set_len(FILE_BYTES).unwrap();
    let border = CELL_BYTES / PAGE;
    let pages = (0..3)
        .chain(border - 2..border + 2)
        .chain(2 * border - 2..2 * border + 8);
    for page in pages {
        let stamp = (index as u64 + 1) << 32 | (page + 1);
        let bytes: Vec<u8> = std::iter::repeat_n(stamp.to_ne_bytes(), 512).flatten().collect();
        file.write_all_at(&bytes, page * PAGE).unwrap();
    }
    Arc::new(file)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_map_does_what_its_model_does(steps in vec((step(), failures()), 1..40)) {
        let mut bench = Bench::new();
        for (step, failures) in &steps {
            bench.run(step, failures);
            bench.check();
        }
        bench.release_everything();
    }
}
