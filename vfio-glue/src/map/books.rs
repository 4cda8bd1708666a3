//! The map's books: what is mapped where, for whom, and the order in which it is changed.
//!
//! Every change either happens as a whole or leaves the books, the IOMMU and the software bus as they were. A range
//! whose unmap failed is the one exception, and the books know it for ever.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;

use super::MapError;
use super::budget;
use super::discards::PinnedFile;
use super::extent::{CELL_BYTES, Extent, ExtentKey, cells_in};
use super::files::{FileId, Files};
use super::iova::{IovaAllocator, cautious_ranges};
use super::plan::{self, Add, Mapped, Pins, Plan, Splinters, Wanted, WhyAdded, WhyKept};
use crate::address::Iova;
use crate::iommu::reach::{PAGE, Reach, show_ranges};
use crate::iommu::software::SoftwareBus;
use crate::iommu::{DeviceAddress, Iommu, MapRequest, MappedBy};
use crate::memory::{FileError, HostRange, RegionSpec, guard, has_reserved};

pub(super) struct Books {
    pub(super) iommu: Box<dyn Iommu>,
    pub(super) iovas: IovaAllocator,
    pub(super) files: Files,
    /// All that is mapped, by IOVA.
    pub(super) records: BTreeMap<Iova, Record>,
    pub(super) devices: Vec<DeviceAddress>,
    /// Extents mapped anew because pages were discarded behind them.
    pub(super) discards: u64,
}

pub(super) struct Record {
    pub(super) extent: Arc<Extent>,
    pub(super) by: MappedBy,
    /// One entry for each time it was asked for. None once an unmap failed: devices may reach the range for as long
    /// as the map lives, so it keeps its IOVA and its memory and nobody is given it again.
    pub(super) owners: Vec<String>,
}

/// How many extents one guest may have beside one for each gigabyte of its memory: what a process can keep an eye on is
/// there for all of its guests.
const MOST_EXTENTS: usize = 1024;

/// Shown as the owner of a range that could not be unmapped.
pub(super) const UNMAP_FAILED: &str = "unmap failed";

/// Why bytes of a file could not be had.
pub(super) enum AcquireError {
    /// The file, at this offset, is at fault.
    File {
        file: Arc<File>,
        offset: u64,
        source: FileError,
    },
    Map(MapError),
}

impl AcquireError {
    /// As the error for a change to `regions`, whose pages are `pages`: names the region whose file is at fault.
    pub(super) fn of(self, regions: &[RegionSpec], pages: &[WantedPages]) -> MapError {
        match self {
            Self::Map(error) => error,
            Self::File { file, offset, source } => {
                let holds = |pages: &WantedPages| {
                    Arc::ptr_eq(&pages.file, &file) && pages.wanted.range.contains(&offset)
                };
                let region = pages.iter().position(holds).and_then(|index| regions.get(index));
                MapError::Region {
                    guest: region.map_or(0, |spec| spec.guest.0),
                    len: region.map_or(0, |spec| spec.len),
                    source,
                }
            }
        }
    }
}

impl<E: Into<MapError>> From<E> for AcquireError {
    fn from(error: E) -> Self {
        Self::Map(error.into())
    }
}

/// Bytes that a guest wants, and the descriptor the map holds for their file.
#[derive(Clone, Debug)]
pub(super) struct WantedPages {
    pub(super) wanted: Wanted,
    pub(super) file: Arc<File>,
}

/// What a guest has after the first half of a change, in which nothing is taken away.
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// All that it is to have.
    pub(super) extents: Vec<Arc<Extent>>,
    /// What of it it did not have before: to be released if the change is undone.
    pub(super) gained: Vec<Arc<Extent>>,
    /// What it had and is to let go of.
    pub(super) dropped: Vec<Arc<Extent>>,
}

impl Books {
    /// Does the half of a change that adds: maps for `owner`, who has `now`, what it wants and has not, or changes
    /// nothing.
    pub(super) fn change(
        &mut self,
        bus: &SoftwareBus,
        owner: &str,
        now: &[Arc<Extent>],
        wanted: &[WantedPages],
    ) -> Result<Changed, AcquireError> {
        // A sparse file costs its owner nothing whatever its size, so what it can make us list is bounded first.
        let mut need = 0_u64;
        for pages in wanted {
            need = need.saturating_add(cells_in(&pages.wanted.range));
            if need > guard::SLOTS as u64 {
                let limit = guard::SLOTS;
                return Err(AcquireError::File {
                    file: Arc::clone(&pages.file),
                    offset: pages.wanted.range.start,
                    source: FileError::TooManyMappings { need, limit },
                });
            }
        }
        let mut plan = self.plan(now, wanted, Splinters::Join);
        if self.check_room(&plan.add).is_err() {
            // Putting together what is in many extents takes room of its own, and can wait.
            plan = self.plan(now, wanted, Splinters::Stay);
            self.check_room(&plan.add)?;
        }
        let cells = wanted
            .iter()
            .map(|pages| (pages.wanted.range.end - pages.wanted.range.start) / CELL_BYTES)
            .sum::<u64>();
        let (pieces, limit) = (
            plan.keep.len() + plan.add.len(),
            MOST_EXTENTS + usize::try_from(cells).unwrap_or(0),
        );
        if pieces > limit {
            return Err(MapError::TooManyPieces { need: pieces, limit }.into());
        }
        tracing::debug!(
            owner,
            keep = plan.keep.len(),
            add = plan.add.len(),
            drop = plan.drop.len(),
            "memory planned"
        );
        for gone in &plan.drop {
            tracing::debug!(owner, iova = %gone.iova, why = gone.why.as_str(), "to be let go of");
        }
        let mut changed = Changed::default();
        match self.carry_out(bus, owner, &plan, wanted, &mut changed) {
            Ok(()) => {
                let gone: HashSet<Iova> = plan.drop.iter().map(|gone| gone.iova).collect();
                let dropped = now.iter().filter(|extent| gone.contains(&extent.iova));
                changed.dropped = dropped.cloned().collect();
                Ok(changed)
            }
            Err(error) => {
                self.undo(bus, &changed.gained, owner);
                Err(error)
            }
        }
    }

    fn plan(&self, now: &[Arc<Extent>], wanted: &[WantedPages], splinters: Splinters) -> Plan {
        let now: HashSet<Iova> = now.iter().map(|extent| extent.iova).collect();
        let files: HashSet<FileId> = wanted.iter().map(|pages| pages.wanted.file).collect();
        let of_interest = self.records.values().filter_map(|record| {
            let (iova, file) = (record.extent.iova, record.extent.key.file);
            let owned = now.contains(&iova);
            // One that could not be unmapped is nobody's, and nobody is given it again.
            let usable = owned || (!record.owners.is_empty() && files.contains(&file));
            usable.then(|| Mapped {
                iova,
                file,
                range: record.extent.file_range(),
                owned,
                fit: record.extent.is_fit(),
            })
        });
        let pins = if self.iommu.shares_pins() {
            Pins::Shared
        } else {
            Pins::Each
        };
        let wanted: Vec<Wanted> = wanted.iter().map(|pages| pages.wanted.clone()).collect();
        plan::plan(&of_interest.collect::<Vec<_>>(), &wanted, pins, splinters)
    }

    fn carry_out(
        &mut self,
        bus: &SoftwareBus,
        owner: &str,
        plan: &Plan,
        wanted: &[WantedPages],
        changed: &mut Changed,
    ) -> Result<(), AcquireError> {
        // Where the card finds what comes right behind an extent, if that is free.
        let mut behind: HashMap<(FileId, u64), u64> = HashMap::new();
        let end_of = |extent: &Extent| {
            let key = (extent.key.file, extent.file_range().end);
            (key, extent.iova.raw() + extent.len())
        };
        for kept in &plan.keep {
            let Some(record) = self.records.get_mut(&kept.iova) else {
                continue;
            };
            behind.extend([end_of(&record.extent)]);
            changed.extents.push(Arc::clone(&record.extent));
            if kept.why == WhyKept::Shared {
                record.owners.push(owner.to_owned());
                changed.gained.push(Arc::clone(&record.extent));
            }
        }
        // Once for each file: looking costs the more the more holes its owner has made.
        let mut reserved: HashMap<FileId, bool> = HashMap::new();
        for add in &plan.add {
            let file = wanted.iter().find(|pages| pages.wanted.file == add.file);
            let Some(file) = file.map(|pages| &pages.file) else {
                continue;
            };
            let refused = |source| AcquireError::File {
                file: Arc::clone(file),
                offset: add.range.start,
                source,
            };
            let reserved = match reserved.entry(add.file) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(unknown) => *unknown.insert(has_reserved(file).map_err(refused)?),
            };
            if reserved {
                let (offset, len) = (add.range.start, add.range.end - add.range.start);
                let host = HostRange::of_file(file, offset, len).map_err(refused)?;
                host.populate().map_err(refused)?;
            }
            // Next to the bytes before it where that can be: contiguous for the card as they are in the file.
            let after = behind.get(&(add.file, add.range.start)).copied();
            let extent = self.map_one(bus, file, add, owner, after)?;
            behind.extend([end_of(&extent)]);
            changed.extents.push(Arc::clone(&extent));
            changed.gained.push(extent);
            self.discards += u64::from(add.why == WhyAdded::Replaces);
        }
        Ok(())
    }

    /// The files of `extents`, each with what the kernel has pinned of it. None while it pins nothing.
    pub(super) fn pinned_with(&self, extents: &[Arc<Extent>]) -> Vec<PinnedFile> {
        if !self.iommu.pins_now() {
            return Vec::new();
        }
        let mut files: Vec<PinnedFile> = Vec::new();
        for extent in extents.iter().filter(|extent| extent.is_fit()) {
            match files.iter_mut().find(|file| file.is_of(extent)) {
                Some(file) => file.of_guest.push(Arc::clone(extent)),
                None => {
                    let all = self.records.values().map(|record| &record.extent);
                    let same = all.filter(|other| other.key.file == extent.key.file);
                    files.push(PinnedFile::new(extent, same.map(|other| other.file_range())));
                }
            }
        }
        files
    }

    /// Maps all of a file of our own.
    pub(super) fn add_own(
        &mut self,
        bus: &SoftwareBus,
        file: &Arc<File>,
        len: u64,
        owner: &str,
    ) -> Result<Arc<Extent>, AcquireError> {
        let (id, file) = self.identify(file).map_err(|source| AcquireError::File {
            file: Arc::clone(file),
            offset: 0,
            source,
        })?;
        let add = Add {
            file: id,
            range: 0..len,
            why: WhyAdded::New,
            same_as: None,
        };
        self.check_room(std::slice::from_ref(&add))?;
        self.map_one(bus, &file, &add, owner, None)
    }

    /// Says which file this is, and gives the descriptor to hold for it.
    pub(super) fn identify(&mut self, file: &Arc<File>) -> Result<(FileId, Arc<File>), FileError> {
        self.files.identify(file)
    }

    /// Takes back what a change gained, of which nothing is in use.
    pub(super) fn undo(&mut self, bus: &SoftwareBus, gained: &[Arc<Extent>], owner: &str) {
        for extent in gained {
            if let Err(error) = self.release(bus, extent, owner) {
                tracing::error!(%error, "undoing a refused change left an extent mapped");
            }
        }
    }

    fn map_one(
        &mut self,
        bus: &SoftwareBus,
        file: &Arc<File>,
        add: &Add,
        owner: &str,
        after: Option<u64>,
    ) -> Result<Arc<Extent>, AcquireError> {
        let (offset, len) = (add.range.start, add.range.end - add.range.start);
        let host = HostRange::of_file(file, offset, len).map_err(|source| AcquireError::File {
            file: Arc::clone(file),
            offset,
            source,
        })?;
        let iova = self
            .iovas
            .take(len, offset, after)
            .ok_or_else(|| self.no_iova(len))?;
        let request = MapRequest {
            iova,
            len,
            file: Arc::clone(file),
            offset,
            host: host.clone(),
            same_as: add.same_as,
        };
        let by = self
            .iommu
            .map(&request)
            .inspect_err(|_| self.iovas.give_back(iova))?;
        bus.insert(iova, host.clone());
        let key = ExtentKey {
            file: add.file,
            offset,
            len,
        };
        let extent = Arc::new(Extent::new(key, Arc::clone(file), iova, host));
        tracing::info!(%iova, len, owner, by = by.as_str(), why = add.why.as_str(), "mapped");
        let record = Record {
            extent: Arc::clone(&extent),
            by,
            owners: vec![owner.to_owned()],
        };
        self.records.insert(iova, record);
        Ok(extent)
    }

    /// Counts `owner` out once; unmaps when nobody is left.
    pub(super) fn release(
        &mut self,
        bus: &SoftwareBus,
        extent: &Arc<Extent>,
        owner: &str,
    ) -> Result<(), MapError> {
        let iova = extent.iova;
        let Some(record) = self.records.get_mut(&iova) else {
            return Ok(());
        };
        let index = record.owners.iter().position(|other| other == owner);
        // Whoever lets go a second time may find the place taken by another extent.
        let Some(index) = index.filter(|_| Arc::ptr_eq(&record.extent, extent)) else {
            return Ok(());
        };
        record.owners.swap_remove(index);
        if !record.owners.is_empty() {
            return Ok(());
        }
        // Software devices lose the range first, then the hardware; the IOVA is free only once it is unmapped.
        bus.remove(iova);
        self.iommu.unmap(iova, extent.len())?;
        self.iovas.give_back(iova);
        self.records.remove(&iova);
        tracing::info!(iova = %extent.iova, len = extent.len(), owner, "unmapped");
        Ok(())
    }

    /// Whether there is room for what a plan adds: bus addresses, mappings, and the limit on locked memory.
    fn check_room(&self, adds: &[Add]) -> Result<(), MapError> {
        let len = |add: &Add| add.range.end - add.range.start;
        let need: u64 = adds.iter().map(len).sum();
        if need > self.iovas.free_bytes() {
            return Err(self.no_iova(need));
        }
        // What is copied is pinned already.
        let pinned_anew = adds.iter().filter(|add| add.same_as.is_none()).map(len).sum();
        self.check_budget(adds.len(), pinned_anew)
    }

    fn no_iova(&self, len: u64) -> MapError {
        MapError::NoIova {
            len,
            usable: show_ranges(self.iovas.usable()),
        }
    }

    fn check_budget(&self, mappings: usize, need: u64) -> Result<(), MapError> {
        if let Some(left) = self.iommu.mappings_left().filter(|left| *left < mappings) {
            return Err(MapError::TooManyMappings { left, need: mappings });
        }
        budget::check(self.iommu.as_ref(), need)
    }

    /// Whether a device that comes now can have all that is mapped pinned for it.
    pub(super) fn check_attach(&self) -> Result<(), MapError> {
        budget::check_attach(self.iommu.as_ref(), self.pinned_bytes())
    }

    /// How many bytes the kernel has pinned for what is mapped, or will have once it pins.
    pub(super) fn pinned_bytes(&self) -> u64 {
        let extents = self.records.values().map(|record| &record.extent);
        let mapped = extents.map(|extent| (extent.key.file, extent.file_range()));
        budget::pinned_bytes(mapped, self.iommu.as_ref())
    }

    /// Adopts the ranges the kernel allows with a new device, if nothing mapped falls out of them.
    pub(super) fn narrow(&mut self, device: &DeviceAddress) -> Result<(), MapError> {
        let Some(ranges) = self.iommu.usable_ranges()? else {
            return Ok(());
        };
        let reach = Reach { ranges, page: PAGE };
        reach.admit(device, self.iovas.taken())?;
        self.iovas.set_usable(reach.ranges);
        Ok(())
    }

    /// Adopts the ranges the kernel allows with a device fewer: wider ones, and with none left the cautious ones.
    /// What is mapped outside of them stays.
    pub(super) fn widen(&mut self) {
        match self.iommu.usable_ranges() {
            Ok(usable) => self.iovas.set_usable(usable.unwrap_or_else(cautious_ranges)),
            // The ranges of before are among those of now.
            Err(error) => {
                tracing::warn!(%error, "the usable IOVA ranges stay as narrow as before the detach")
            }
        }
    }
}
