//! The memory map: one IOVA space, what is mapped in it, and the devices that see it. The heart of the project.
//!
//! ```text
//! front-end's regions ──change──▶ extents (planned, cut, deduplicated, counted) ──▶ dyn Iommu
//! device ──attach──▶ sees all of it, whenever it comes
//! ```
//!
//! A map exists by itself: it is made, filled and inspected with no device, and outlives every device and every
//! guest (R1). No device is special (R2). Memory changes touch the map and never the devices (R3). The same
//! memory seen twice is mapped once, by file and offset (R4; `files.rs` says what proves two files one). What the
//! kernel keeps behind it does not show (R6).
//!
//! ```text
//! plan.rs    what a change of a guest's memory means     change.rs  one under way: to be finished or undone
//! books.rs   what is mapped where, for whom              extent.rs, iova.rs, budget.rs, files.rs  how that is decided
//! device.rs  a device's place on a map                   snapshot.rs  what a map shows of itself
//! ```
//!
//! All calls are control plane: they take one lock and may block while the kernel pins. Lanes never call here.

mod books;
mod budget;
mod change;
mod device;
mod discards;
mod error;
mod extent;
mod files;
mod iova;
#[cfg(test)]
mod model;
mod plan;
#[cfg(test)]
mod rules;
mod snapshot;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use change::{Change, Leaving};
pub use device::Device;
pub use error::MapError;
pub(crate) use extent::ExtentPart;
pub use extent::{CELL_BYTES, Extent};
pub use snapshot::{ExtentSnapshot, MapSnapshot};

use self::books::{AcquireError, Books, Changed, WantedPages};
use self::files::Files;
use self::iova::{IovaAllocator, cautious_ranges};
use self::plan::Wanted;
use crate::iommu::software::SoftwareBus;
use crate::iommu::{DeviceAddress, Iommu, IommuError, IommuKind};
use crate::memory::{MemoryFile, RegionSpec, Table, refuse_overlap};
use crate::pci::PciFunction;

/// One IOVA space. Shared by `Arc`; see the module's page for what it promises.
pub struct MemoryMap {
    name: String,
    kind: IommuKind,
    bus: Arc<SoftwareBus>,
    books: Mutex<Books>,
}

impl std::fmt::Debug for MemoryMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryMap({}, {})", self.name, self.kind.as_str())
    }
}

impl MemoryMap {
    /// Makes an empty map over an IOMMU back end. No device is needed.
    pub fn new(name: &str, iommu: Box<dyn Iommu>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            kind: iommu.kind(),
            bus: Arc::default(),
            books: Mutex::new(Books {
                iommu,
                iovas: IovaAllocator::new(cautious_ranges()),
                files: Files::default(),
                records: BTreeMap::new(),
                devices: Vec::new(),
                discards: 0,
            }),
        })
    }

    /// The map's name, `main` unless the operator has more than one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What programs the IOMMU for this map.
    pub fn kind(&self) -> IommuKind {
        self.kind
    }

    /// How a device made of software reaches what is mapped.
    pub fn software_bus(&self) -> Arc<SoftwareBus> {
        Arc::clone(&self.bus)
    }

    /// Maps a guest's first memory: [`change`](Self::change) from nothing, with nothing to drain.
    ///
    /// # Errors
    ///
    /// [`MapError`]; nothing is mapped then.
    pub fn add(self: &Arc<Self>, owner: &str, wanted: Vec<RegionSpec>) -> Result<Arc<Table>, MapError> {
        let change = self.change(owner, &Table::default(), wanted)?;
        let table = Arc::clone(change.table());
        change.finish()?;
        Ok(table)
    }

    /// Begins to make `wanted` the memory of a guest that has `now`: plans what is mapped anew, what stays and what
    /// goes (see `plan.rs`), and maps what is new for every device of this map, those to come included.
    ///
    /// `owner` is the guest, for `stats`. Bytes that are mapped already, by this guest or another, are shared and not
    /// pinned again. Nothing is taken away before [`Change::finish`]. Blocks while the kernel pins.
    ///
    /// # Errors
    ///
    /// [`MapError`]; everything is as it was then.
    pub fn change(
        self: &Arc<Self>,
        owner: &str,
        now: &Table,
        wanted: Vec<RegionSpec>,
    ) -> Result<Change, MapError> {
        refuse_overlap(&wanted)?;
        let mut books = self.books();
        let mut pages = Vec::with_capacity(wanted.len());
        let mut regions = Vec::with_capacity(wanted.len());
        for spec in wanted {
            let refused = |source| MapError::Region {
                guest: spec.guest.0,
                len: spec.len,
                source,
            };
            // How long the file is comes before anything is made in proportion to what was announced.
            let file = MemoryFile::of(&spec.file).map_err(refused)?;
            let range = file.pages_around(spec.file_offset, spec.len).map_err(refused)?;
            let (id, held) = books.identify(&spec.file).map_err(refused)?;
            pages.push(WantedPages {
                wanted: Wanted { file: id, range },
                file: Arc::clone(&held),
            });
            // A region keeps the map's descriptor of its file and not the one it came with: descriptors are few.
            regions.push(RegionSpec { file: held, ..spec });
        }
        let changed = books.change(&self.bus, owner, now.extents(), &pages);
        let Changed {
            extents,
            gained,
            dropped,
        } = changed.map_err(|error| error.of(&regions, &pages))?;
        let Some(next) = Table::new(regions, extents) else {
            books.undo(&self.bus, &gained, owner);
            return Err(MapError::TooManyPieces {
                need: Table::MOST_PIECES + 1,
                limit: Table::MOST_PIECES,
            });
        };
        Ok(Change::new(self, owner, Arc::new(next), gained, dropped))
    }

    /// Takes all of a guest's memory out of the map: as a [`change`](Self::change) to nothing. No device reaches what
    /// nobody else has once this returns, so the caller has drained whatever used it.
    ///
    /// # Errors
    ///
    /// As [`Change::finish`].
    pub fn let_go(&self, owner: &str, extents: &[Arc<Extent>]) -> Result<(), MapError> {
        let mut books = self.books();
        let mut first_error = Ok(());
        for extent in extents {
            let released = books.release(&self.bus, extent, owner);
            first_error = first_error.and(released);
        }
        first_error
    }

    /// Takes back what a change gained.
    fn take_back(&self, gained: &[Arc<Extent>], owner: &str) {
        self.books().undo(&self.bus, gained, owner);
    }

    /// Maps all of a file of our own.
    pub(crate) fn add_own(&self, file: &Arc<File>, len: u64, owner: &str) -> Result<Arc<Extent>, MapError> {
        self.books()
            .add_own(&self.bus, file, len, owner)
            .map_err(|error| match error {
                AcquireError::File { source, .. } => MapError::OwnMemory {
                    len,
                    source: io::Error::other(source),
                },
                AcquireError::Map(error) => error,
            })
    }

    /// Takes back one `add_own`.
    pub(crate) fn release(&self, extent: &Arc<Extent>, owner: &str) -> Result<(), MapError> {
        self.books().release(&self.bus, extent, owner)
    }

    /// Lets a device in. It sees everything that is mapped now and whatever comes later.
    ///
    /// # Errors
    ///
    /// [`MapError`]; the map and its other devices are as before.
    pub fn attach(self: &Arc<Self>, device: &DeviceAddress) -> Result<Device, MapError> {
        let mut books = self.books();
        if books.devices.contains(device) {
            return Err(MapError::AlreadyAttached {
                device: device.clone(),
                map: self.name.clone(),
            });
        }
        books.check_attach()?;
        let function = books.iommu.attach(device)?;
        if let Err(error) = books.narrow(device) {
            drop(function);
            if let Err(error) = books.iommu.detach(device) {
                tracing::warn!(%device, %error, "detach after a refused attach failed");
            }
            return Err(error);
        }
        books.devices.push(device.clone());
        Ok(Device::new(function, Arc::clone(self), device.clone()))
    }

    /// Lets in a device that this process plays itself, as `name`. It does its DMA through the
    /// [software bus](Self::software_bus), which no IOMMU confines, so a map with one refuses it.
    ///
    /// # Errors
    ///
    /// [`MapError::Iommu`] for a map with an IOMMU, [`MapError::AlreadyAttached`] for a name that is taken.
    pub fn attach_software(
        self: &Arc<Self>,
        name: &str,
        function: Arc<dyn PciFunction>,
    ) -> Result<Device, MapError> {
        let device = DeviceAddress::Software(name.to_owned());
        let mut books = self.books();
        if books.iommu.kind() != IommuKind::None {
            let iommu = books.iommu.kind().as_str();
            return Err(IommuError::WrongKind { iommu, device }.into());
        }
        if books.devices.contains(&device) {
            let map = self.name.clone();
            return Err(MapError::AlreadyAttached { device, map });
        }
        books.devices.push(device.clone());
        Ok(Device::new(function, Arc::clone(self), device))
    }

    fn detach(&self, device: &DeviceAddress) -> Result<(), MapError> {
        let mut books = self.books();
        books.devices.retain(|other| other != device);
        let detached = books.iommu.detach(device);
        books.widen();
        Ok(detached?)
    }

    /// Looks for memory of a guest that was taken out of its file while it is pinned, as a balloon, free page reporting
    /// and virtio-mem do, and returns how many bytes were found missing (TRAPS 21, 22). The table
    /// [says so](Table::has_discarded) then, and the next [`change`](Self::change) of this guest's memory, to the same if
    /// need be, maps anew what showed them.
    ///
    /// What was discarded and touched again since cannot be seen. Without pins there is nothing to find. Costs system
    /// calls, and does not touch the memory.
    pub fn find_discarded(&self, table: &Table) -> u64 {
        // The kernel is asked without the books: it may have much to look through.
        let pinned = self.books().pinned_with(table.extents());
        let mut missing = 0;
        for file in pinned {
            missing += file.look();
        }
        missing
    }

    /// What is in the map now, in order of IOVA.
    pub fn snapshot(&self) -> MapSnapshot {
        let books = self.books();
        let extents: Vec<ExtentSnapshot> = books
            .records
            .values()
            .map(|record| record.snapshot(books.iommu.as_ref()))
            .collect();
        let mapped_bytes = extents.iter().map(|extent| extent.len).sum();
        MapSnapshot {
            name: self.name.clone(),
            iommu: self.kind,
            usable: books.iovas.usable().to_vec(),
            mapped_bytes,
            pinned_bytes: if books.iommu.pins_now() {
                books.pinned_bytes()
            } else {
                0
            },
            discards: books.discards,
            devices: books.devices.clone(),
            extents,
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // A panic elsewhere must not take the map from every other port.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{FrontendAddress, GuestAddress};
    use crate::iommu::Accounting;
    use crate::iommu::fake::FakeKernel;
    use crate::memory::{DmaBuffer, FileError, TableHint, guard};
    use crate::pci::testing::Nothing;

    const MIB: u64 = 1 << 20;

    fn memfd(len: u64) -> Arc<File> {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        Arc::new(file)
    }

    fn region(file: &Arc<File>, guest: u64, len: u64, file_offset: u64) -> RegionSpec {
        let (guest, frontend) = (GuestAddress(guest), FrontendAddress(guest + (1 << 40)));
        RegionSpec {
            guest,
            frontend,
            len,
            file: Arc::clone(file),
            file_offset,
        }
    }

    fn fake() -> (FakeKernel, Arc<MemoryMap>) {
        let kernel = FakeKernel::default();
        let map = MemoryMap::new("main", kernel.iommu());
        (kernel, map)
    }

    #[test]
    fn r1_a_map_is_filled_and_inspected_with_no_device() {
        let (kernel, map) = fake();
        let file = memfd(4 * MIB);
        let region = map.add("vm0", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
        let seen = map.snapshot();
        assert_eq!(
            (seen.mapped_bytes, seen.pinned_bytes, seen.devices.len()),
            (4 * MIB, 0, 0)
        );
        assert_eq!(kernel.mapped(), vec![(seen.extents[0].iova.raw(), 4 * MIB)]);
        map.let_go("vm0", region.extents()).unwrap();
        assert_eq!(kernel.mapped(), vec![]);
    }

    #[test]
    fn r4_the_same_memory_of_two_ports_is_mapped_once_and_goes_with_the_last() {
        let (kernel, map) = fake();
        let file = memfd(4 * MIB);
        let again = Arc::new(file.try_clone().unwrap());
        let first = map.add("vm0", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
        let second = map
            .add("vm1", vec![region(&again, 0x8000_0000, 4 * MIB, 0)])
            .unwrap();
        assert_eq!(kernel.mapped().len(), 1);
        assert_eq!(map.snapshot().extents[0].owners, vec!["vm0", "vm1"]);
        map.let_go("vm0", first.extents()).unwrap();
        assert_eq!(kernel.mapped().len(), 1);
        map.let_go("vm1", second.extents()).unwrap();
        assert_eq!(kernel.mapped().len(), 0);
    }

    #[test]
    fn many_regions_of_one_file_hold_one_descriptor() {
        let (_, map) = fake();
        let file = memfd(64 * MIB);
        let mut regions: Vec<Arc<Table>> = Vec::new();
        for n in 0..64 {
            // Each comes with a descriptor of its own, as they do over a socket.
            let sent = Arc::new(file.try_clone().unwrap());
            regions.push(
                map.add("vm0", vec![region(&sent, n * MIB, MIB, n * MIB)])
                    .unwrap(),
            );
        }
        let held = &regions[0].regions()[0].file;
        assert!(
            regions
                .iter()
                .all(|table| Arc::ptr_eq(&table.regions()[0].file, held))
        );
        let extents = regions.iter().flat_map(|table| table.extents());
        assert!(extents.into_iter().all(|extent| Arc::ptr_eq(&extent.file, held)));
    }

    #[test]
    fn r4_huge_pages_of_two_ports_are_mapped_once_and_those_of_two_guests_are_not() {
        let (kernel, map) = fake();
        let huge = || {
            let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::HUGETLB;
            let file = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
            file.set_len(4 * MIB).unwrap();
            Arc::new(file)
        };
        let (file, others) = (huge(), huge());
        let again = Arc::new(file.try_clone().unwrap());
        let add = |owner, file: &Arc<File>| map.add(owner, vec![region(file, 0, 4 * MIB, 0)]).unwrap();
        let _regions = [add("vm0-a", &file), add("vm0-b", &again), add("vm1", &others)];
        assert_eq!(kernel.mapped().len(), 2);
        assert_eq!(map.snapshot().extents[0].owners, vec!["vm0-a", "vm0-b"]);
    }

    #[test]
    fn two_guests_with_equal_addresses_get_different_iovas() {
        let (_, map) = fake();
        let table = |owner: &str| map.add(owner, vec![region(&memfd(MIB), 0x1000, MIB, 0)]).unwrap();
        let (a, b) = (table("vm0"), table("vm1"));
        let iova = |table: &Table| {
            table
                .lookup(&mut TableHint::default(), GuestAddress(0x1000), 16)
                .unwrap()
                .iova
        };
        assert_ne!(iova(&a), iova(&b));
    }

    #[test]
    fn a_region_over_a_cells_border_is_two_extents_side_by_side() {
        let (kernel, map) = fake();
        // Sparse: only addresses are asked for.
        let file = memfd(CELL_BYTES + 2 * MIB);
        let spec = region(&file, 0x10_0000, 3 * MIB, CELL_BYTES - MIB);
        let table = map.add("vm0", vec![spec]).unwrap();
        assert_eq!(kernel.mapped().len(), 2);
        let mut hint = TableHint::default();
        let border = 0x10_0000 + MIB;
        let before = table.lookup(&mut hint, GuestAddress(border - 100), 300).unwrap();
        assert_eq!(before.len(), 100, "a piece ends with its extent");
        let after = table.lookup(&mut hint, GuestAddress(border), 200).unwrap();
        assert_eq!(after.len(), 200);
        let across = table.host_range(GuestAddress(border - 4), 8).unwrap();
        across.whole().copy_from(b"abcdefgh");
        let mut seen = [0; 4];
        after.host.copy_to(&mut seen);
        assert_eq!(&seen, b"efgh", "a virtqueue over the border is one range for us");
        assert!(
            table
                .lookup(&mut hint, GuestAddress(0x10_0000 + 3 * MIB), 1)
                .is_none()
        );
    }

    #[test]
    fn a_hit_answers_for_its_own_place_and_for_nothing_beside_it() {
        let (_, map) = fake();
        let file = memfd(2 * MIB);
        let at = |guest: u64| region(&file, guest, MIB, guest % (2 * MIB));
        let table = map.add("vm0", vec![at(2 * MIB), at(5 * MIB)]).unwrap();
        let mut hint = TableHint::default();
        assert!(table.hit(&hint).is_none(), "nothing was asked yet");
        assert!(table.turn(&mut hint, GuestAddress(2 * MIB)));
        assert!(!table.turn(&mut hint, GuestAddress(3 * MIB - 1)), "it is there");
        assert!(!table.turn(&mut hint, GuestAddress(3 * MIB)), "no memory");
        let hit = table.hit(&hint).unwrap();
        let of_16 = hit.of_len(16).unwrap();
        for (start, len, lies_here) in [
            (2 * MIB, 1, true),
            (2 * MIB, u32::try_from(MIB).unwrap(), true),
            (2 * MIB, u32::try_from(MIB + 1).unwrap(), false),
            (2 * MIB - 1, 16, false),
            (3 * MIB - 16, 16, true),
            (3 * MIB - 15, 16, false),
            (5 * MIB, 16, false),
            (u64::MAX, 16, false),
            (u64::MAX - 15, u32::MAX, false),
        ] {
            let piece = hit.whole(GuestAddress(start), len);
            assert_eq!(piece.is_some(), lies_here, "{start:#x}, {len}");
            let told = table.lookup_once(GuestAddress(start), len);
            if let (Some(piece), Some(told)) = (piece, told) {
                assert_eq!((piece.iova, piece.len()), (told.iova, len as usize));
            }
            if len == 16 {
                let iova = piece.map(|piece| piece.iova);
                assert_eq!(of_16.iova(GuestAddress(start)), iova, "{start:#x}");
                let host = of_16.host(GuestAddress(start)).map(|host| host.len());
                assert_eq!(host, lies_here.then_some(16), "{start:#x}");
            }
        }
        assert!(hit.of_len(u32::MAX).is_none());
        assert!(table.turn(&mut hint, GuestAddress(5 * MIB)));
        assert!(
            table
                .hit(&hint)
                .unwrap()
                .whole(GuestAddress(5 * MIB), 16)
                .is_some()
        );
    }

    #[test]
    fn a_table_shows_every_byte_of_its_regions_at_any_offset_in_page_and_cell() {
        let (_, map) = fake();
        let file = memfd(3 * CELL_BYTES);
        for (offset, len) in [
            (5, 3),
            (4095, 2),
            (CELL_BYTES - 1, CELL_BYTES + 2),
            (7, 3 * CELL_BYTES - 9),
        ] {
            let table = map.add("vm0", vec![region(&file, 0x1000, len, offset)]).unwrap();
            let (mut hint, mut at, mut pieces) = (TableHint::default(), 0, 0);
            while at < len {
                let piece = table
                    .lookup(&mut hint, GuestAddress(0x1000 + at), u32::MAX)
                    .unwrap();
                assert_eq!(piece.iova.raw() % 4096, (offset + at) % 4096);
                at += piece.len() as u64;
                pieces += 1;
            }
            assert_eq!(
                (at, pieces),
                (len, table.extents().len()),
                "no byte is left out, none is added"
            );
            map.let_go("vm0", table.extents()).unwrap();
        }
    }

    #[test]
    fn a_table_tells_that_memory_of_its_guest_was_lost_and_no_other_does() {
        guard::install().unwrap();
        let (_, map) = fake();
        let file = memfd(CELL_BYTES + 2 * MIB);
        let table = |owner, file: &Arc<File>| {
            let spec = region(file, 0, 3 * MIB, CELL_BYTES - MIB);
            map.add(owner, vec![spec]).unwrap()
        };
        let (cut, whole) = (table("vm0", &file), table("vm1", &memfd(CELL_BYTES + 2 * MIB)));
        // A virtqueue over a cell's border has a mapping of its own, whose loss counts as well.
        let virtq = cut.host_range(GuestAddress(MIB - 4096), 8192).unwrap();
        file.set_len(CELL_BYTES - MIB).unwrap();
        assert!(!cut.lost_memory());
        virtq.whole().copy_to(&mut [0; 8192]);
        assert!(cut.lost_memory());
        assert!(!whole.lost_memory());
    }

    #[test]
    fn a_refused_region_leaves_nothing_behind() {
        let (kernel, map) = fake();
        let kept = map.add("vm0", vec![region(&memfd(MIB), 0, MIB, 0)]).unwrap();
        let before = kernel.mapped();
        kernel.fail_after(1);
        let file = memfd(CELL_BYTES + 2 * MIB);
        let refused = map.add("vm0", vec![region(&file, 1 << 32, 3 * MIB, CELL_BYTES - MIB)]);
        assert!(matches!(refused, Err(MapError::Iommu(_))));
        assert_eq!(kernel.mapped(), before);
        assert_eq!(map.snapshot().extents.len(), 1);
        map.let_go("vm0", kept.extents()).unwrap();
    }

    #[test]
    fn a_range_that_cannot_be_unmapped_is_kept_and_never_handed_out_again() {
        let (kernel, map) = fake();
        let file = memfd(MIB);
        let spec = || region(&file, 0, MIB, 0);
        let first = map.add("vm0", vec![spec()]).unwrap();
        kernel.fail_after(0);
        assert!(map.let_go("vm0", first.extents()).is_err());
        let stuck = kernel.mapped()[0];

        let second = map.add("vm0", vec![spec()]).unwrap();
        assert_eq!(kernel.mapped().len(), 2, "the same bytes are mapped anew");
        map.let_go("vm0", first.extents()).unwrap();
        let seen = map.snapshot().extents;
        assert_eq!((seen[0].iova.raw(), seen[0].len), stuck);
        assert_eq!(seen[0].owners, vec!["unmap failed"]);
        assert_eq!(
            seen[1].owners,
            vec!["vm0"],
            "letting go twice takes nothing from others"
        );
        let bus = map.software_bus();
        assert_eq!(bus.room(seen[0].iova), 0, "no software device reaches it");
        assert_ne!(bus.room(seen[1].iova), 0);

        map.let_go("vm0", second.extents()).unwrap();
        assert_eq!(kernel.mapped(), vec![stuck]);
    }

    #[test]
    fn a_region_let_go_twice_takes_nothing_from_the_one_in_its_place() {
        let (kernel, map) = fake();
        let first = map.add("vm0", vec![region(&memfd(MIB), 0, MIB, 0)]).unwrap();
        map.let_go("vm0", first.extents()).unwrap();
        let second = map.add("vm0", vec![region(&memfd(MIB), 0, MIB, 0)]).unwrap();
        assert_eq!(first.extents()[0].iova, second.extents()[0].iova);
        map.let_go("vm0", first.extents()).unwrap();
        assert_eq!(kernel.mapped().len(), 1);
    }

    #[test]
    fn memory_that_was_lost_here_is_not_shared_with_the_next_owner() {
        guard::install().unwrap();
        let (kernel, map) = fake();
        let file = memfd(MIB);
        let spec = || region(&file, 0, MIB, 0);
        let first = map.add("vm0", vec![spec()]).unwrap();
        file.set_len(0).unwrap();
        let range = first.host_range(GuestAddress(0), 16).unwrap();
        range.whole().copy_to(&mut [0; 16]);
        file.set_len(MIB).unwrap();

        let second = map.add("vm1", vec![spec()]).unwrap();
        assert!(first.lost_memory() && !second.lost_memory());
        assert_eq!(kernel.mapped().len(), 2);
        map.let_go("vm0", first.extents()).unwrap();
        let third = map.add("vm2", vec![spec()]).unwrap();
        assert_eq!(map.snapshot().extents[0].owners, vec!["vm1", "vm2"]);
        map.let_go("vm1", second.extents()).unwrap();
        map.let_go("vm2", third.extents()).unwrap();
        assert_eq!(kernel.mapped(), vec![]);
    }

    #[test]
    fn regions_that_wrap_or_are_longer_than_their_file_are_refused_with_numbers() {
        let (kernel, map) = fake();
        let at_the_end = RegionSpec {
            guest: GuestAddress(u64::MAX - 10),
            ..region(&memfd(MIB), 0, MIB, 0)
        };
        let wraps = map.add("vm0", vec![at_the_end]).unwrap_err();
        assert!(matches!(wraps, MapError::Wraps { .. }));
        let short = map
            .add("vm0", vec![region(&memfd(MIB), 0, 2 * MIB, 0)])
            .unwrap_err();
        let shown = format!("{short}: {}", std::error::Error::source(&short).unwrap());
        assert_eq!(
            shown,
            "guest region at 0x0 (0x200000 bytes) is refused: the memory announced ends at 0x200000 of its file, \
             which is only 0x100000 bytes long"
        );
        assert_eq!(kernel.mapped(), vec![]);
    }

    #[test]
    fn a_region_far_longer_than_its_file_costs_nothing_to_refuse() {
        let (kernel, map) = fake();
        for (len, offset) in [
            (1 << 62, 0),
            (u64::MAX, 0),
            (4096, u64::MAX - 8191),
            (1 << 62, 4095),
        ] {
            let spec = RegionSpec {
                frontend: FrontendAddress(0),
                ..region(&memfd(4096), 0, len, offset)
            };
            let refused = map.add("vm0", vec![spec]).unwrap_err();
            let source = std::error::Error::source(&refused).and_then(|source| source.downcast_ref());
            assert!(
                matches!(source, Some(FileError::TooShort { size: 4096, .. })),
                "{len:#x}: {refused}"
            );
        }
        assert_eq!(kernel.mapped(), vec![]);
    }

    #[test]
    fn a_sparse_file_cannot_ask_for_more_than_the_map_can_hold() {
        let (kernel, map) = fake();
        let endless = map.add("vm0", vec![region(&memfd(1 << 62), 0, 1 << 62, 0)]);
        let endless = endless.unwrap_err();
        let source = std::error::Error::source(&endless).unwrap().to_string();
        assert_eq!(
            source,
            "4294967296 more mappings of up to 1 GiB are needed, and a process has room for 4096 in all"
        );
        let too_wide = map.add("vm0", vec![region(&memfd(1 << 40), 0, 1 << 40, 0)]);
        assert!(matches!(too_wide, Err(MapError::NoIova { len, .. }) if len == 1 << 40));
        assert_eq!(kernel.mapped(), vec![]);
    }

    #[test]
    fn memory_of_our_own_comes_and_goes_with_its_buffer() {
        let (kernel, map) = fake();
        let buffer = DmaBuffer::new(&map, "rings", "card", 5000).unwrap();
        assert_eq!(buffer.len(), 8192);
        assert!(kernel.is_mapped(buffer.iova().raw(), 8192));
        assert!(map.snapshot().extents[0].file.contains("vuv-rings"));
        drop(buffer);
        assert_eq!(kernel.mapped(), vec![]);
    }

    fn card(index: u8) -> DeviceAddress {
        DeviceAddress::Pci(format!("0000:01:00.{index}").parse().unwrap())
    }

    #[test]
    fn r2_an_attach_that_would_strand_a_mapping_names_both_ranges_and_changes_nothing() {
        let (kernel, map) = fake();
        for index in 0..2 {
            kernel.plug(&card(index), Arc::new(Nothing));
        }
        kernel.set_reach(&card(0), vec![0x10_0000..=0x1f_ffff]);
        let file = memfd(4 * MIB);
        let region = map.add("vm0", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
        let _first = map.attach(&card(1)).unwrap();
        let (before, usable) = (kernel.mapped(), map.snapshot().usable);
        let start = before[0].0;
        assert_eq!(
            map.attach(&card(0)).unwrap_err().to_string(),
            format!(
                "device 0000:01:00.0 cannot reach what is mapped at {start:#x}-{:#x}; it reaches 0x100000-0x1fffff",
                start + 4 * MIB - 1
            )
        );
        assert_eq!((kernel.mapped(), map.snapshot().usable), (before, usable));
        assert_eq!(kernel.attached(), vec![card(1)]);
        map.let_go("vm0", region.extents()).unwrap();
        map.attach(&card(0)).unwrap();
    }

    #[test]
    fn r2_usable_ranges_narrow_with_a_device_and_widen_when_it_goes() {
        let (kernel, map) = fake();
        for (index, last) in [(0, (1 << 40) - 1), (1, (1 << 30) - 1)] {
            kernel.plug(&card(index), Arc::new(Nothing));
            kernel.set_reach(&card(index), vec![1 << 20..=last]);
        }
        let cautious = map.snapshot().usable;
        let wide = map.attach(&card(0)).unwrap();
        let narrow = map.attach(&card(1)).unwrap();
        assert_eq!(map.snapshot().usable, vec![1 << 20..=(1 << 30) - 1]);
        narrow.detach().unwrap();
        assert_eq!(map.snapshot().usable, vec![1 << 20..=(1 << 40) - 1]);
        wide.detach().unwrap();
        assert_eq!(map.snapshot().usable, cautious);
    }

    #[test]
    fn what_is_mapped_outside_of_the_cautious_ranges_stays_when_the_last_device_goes() {
        let (kernel, map) = fake();
        kernel.plug(&card(0), Arc::new(Nothing));
        kernel.set_reach(&card(0), vec![1 << 40..=(1 << 41) - 1]);
        let device = map.attach(&card(0)).unwrap();
        let high = map.add("vm0", vec![region(&memfd(MIB), 0, MIB, 0)]).unwrap();
        device.detach().unwrap();
        assert_eq!(kernel.mapped(), vec![(1 << 40, MIB)]);
        let device = map.attach(&card(0)).unwrap();
        device.detach().unwrap();
        let low = map.add("vm1", vec![region(&memfd(MIB), 0, MIB, 0)]).unwrap();
        assert_eq!(kernel.mapped(), vec![(MIB, MIB), (1 << 40, MIB)]);
        assert!(matches!(
            map.attach(&card(0)),
            Err(MapError::Strands { start: MIB, .. })
        ));
        map.let_go("vm1", low.extents()).unwrap();
        map.let_go("vm0", high.extents()).unwrap();
        map.attach(&card(0)).unwrap();
    }

    #[test]
    fn a_region_over_the_limit_on_locked_memory_is_refused_before_anything_is_mapped() {
        for accounting in [Accounting::PerProcess, Accounting::PerUser] {
            let (kernel, map) = fake();
            kernel.plug(&card(0), Arc::new(Nothing));
            kernel.set_locked_memory(accounting, 8 * MIB, MIB);
            let other = MemoryMap::new("other", kernel.beside().iommu());
            let (file, third) = (memfd(4 * MIB), memfd(4 * MIB));
            let _first = map.add("vm0", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
            let _device = map.attach(&card(0)).unwrap();
            let _second = other
                .add("vm1", vec![region(&memfd(2 * MIB), 0, 2 * MIB, 0)])
                .unwrap();
            let before = kernel.mapped();
            let refused = map.add("vm2", vec![region(&third, 0, 2 * MIB, 0)]).unwrap_err();
            assert!(
                matches!(refused, MapError::OverBudget { need, pinned, owed, elsewhere, limit, sum }
                    if [need, pinned, owed, elsewhere, limit, sum]
                        == [2 * MIB, 4 * MIB, 2 * MIB, MIB, 8 * MIB, 9 * MIB]),
                "{refused}"
            );
            assert_eq!(kernel.mapped(), before);
            // Bytes that are pinned already need nothing, and what fits still goes.
            let _again = map.add("vm2", vec![region(&file, 0, 4 * MIB, 0)]).unwrap();
            let _fits = map.add("vm2", vec![region(&third, 0, MIB, 0)]).unwrap();
        }
    }

    #[test]
    fn an_attach_that_cannot_pin_what_is_mapped_says_how_many_bytes_are_missing() {
        let (kernel, map) = fake();
        kernel.plug(&card(0), Arc::new(Nothing));
        kernel.set_locked_memory(Accounting::PerUser, 4 * MIB, 0);
        let _region = map
            .add("vm0", vec![region(&memfd(4 * MIB), 0, 4 * MIB, 0)])
            .unwrap();
        // Somebody else comes in between.
        kernel.set_locked_memory(Accounting::PerUser, 4 * MIB, MIB);
        let text = map.attach(&card(0)).unwrap_err().to_string();
        assert!(
            text.contains("limit on locked memory is 4194304: 1048576 bytes are missing"),
            "{text}"
        );
        assert_eq!(kernel.attached(), vec![]);
        kernel.set_locked_memory(Accounting::PerUser, 4 * MIB, 0);
        map.attach(&card(0)).unwrap();
    }

    #[test]
    fn r2_a_second_map_is_refused_a_sibling_and_told_which() {
        let (kernel, map) = fake();
        let other = MemoryMap::new("other", kernel.beside().iommu());
        for index in 0..2 {
            let DeviceAddress::Pci(address) = card(index) else {
                unreachable!()
            };
            kernel.plug_in_group(address, Arc::new(Nothing), 7);
        }
        let _device = map.attach(&card(0)).unwrap();
        let refused = other.attach(&card(1)).unwrap_err();
        let text = std::error::Error::source(&refused).unwrap().to_string();
        assert!(
            text.contains("devices of one group share one map, so 0000:01:00.0 must be"),
            "{text}"
        );
        map.attach(&card(1)).unwrap();
    }

    #[test]
    fn overlapping_regions_make_no_table() {
        let (kernel, map) = fake();
        let file = memfd(2 * MIB);
        let first = region(&file, 0, MIB, 0);
        let second = region(&file, MIB - 4096, MIB, MIB);
        let error = map.add("vm0", vec![second, first]).unwrap_err().to_string();
        assert_eq!(kernel.mapped(), vec![]);
        assert_eq!(
            error,
            "region at 0xff000 (guest-physical) starts inside the one at 0x0, which is 0x100000 bytes long"
        );
    }
}
