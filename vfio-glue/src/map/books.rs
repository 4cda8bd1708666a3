//! The map's books: what is mapped where, for whom, and the order in which it is changed.
//!
//! Every change either happens as a whole or leaves the books, the IOMMU and the software bus as they were. A range
//! whose unmap failed is the one exception, and the books know it for ever.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::MapError;
use super::budget;
use super::extent::{Extent, ExtentKey, cells_in, cut};
use super::files::Files;
use super::iova::{IovaAllocator, cautious_ranges};
use crate::address::Iova;
use crate::iommu::reach::{PAGE, Reach, show_ranges};
use crate::iommu::software::SoftwareBus;
use crate::iommu::{DeviceAddress, Iommu, MapRequest, MappedBy};
use crate::memory::{FileError, HostRange, guard};

pub(super) struct Books {
    pub(super) iommu: Box<dyn Iommu>,
    pub(super) iovas: IovaAllocator,
    pub(super) files: Files,
    /// All that is mapped, by IOVA.
    pub(super) records: BTreeMap<Iova, Record>,
    /// What is handed out when the same bytes are asked for again.
    pub(super) shared: HashMap<ExtentKey, Iova>,
    pub(super) devices: Vec<DeviceAddress>,
}

pub(super) struct Record {
    pub(super) extent: Arc<Extent>,
    pub(super) by: MappedBy,
    /// One entry for each time it was asked for. None once an unmap failed: devices may reach the range for as long
    /// as the map lives, so it keeps its IOVA and its memory and nobody is given it again.
    pub(super) owners: Vec<String>,
}

/// Shown as the owner of a range that could not be unmapped.
pub(super) const UNMAP_FAILED: &str = "unmap failed";

pub(super) enum AcquireError {
    File(FileError),
    Map(MapError),
}

impl<E: Into<MapError>> From<E> for AcquireError {
    fn from(error: E) -> Self {
        Self::Map(error.into())
    }
}

impl Books {
    /// Maps some pages of a guest's file, cut at the grid, or changes nothing.
    ///
    /// A sparse file costs its owner nothing whatever its size, so what it can make us list is bounded first.
    pub(super) fn acquire_pages(
        &mut self,
        bus: &SoftwareBus,
        file: &Arc<File>,
        pages: Range<u64>,
        owner: &str,
    ) -> Result<Vec<Arc<Extent>>, AcquireError> {
        let (need, limit) = (cells_in(&pages), guard::SLOTS);
        if need > limit as u64 {
            return Err(AcquireError::File(FileError::TooManyMappings { need, limit }));
        }
        let cells: Vec<Range<u64>> = cut(pages).collect();
        self.acquire(bus, file, &cells, owner)
    }

    /// Maps what of `cells` is not mapped yet and counts `owner` for all of it, or changes nothing.
    pub(super) fn acquire(
        &mut self,
        bus: &SoftwareBus,
        file: &Arc<File>,
        cells: &[Range<u64>],
        owner: &str,
    ) -> Result<Vec<Arc<Extent>>, AcquireError> {
        let (id, file) = self.files.identify(file).map_err(AcquireError::File)?;
        let keys: Vec<(ExtentKey, Range<u64>)> = cells
            .iter()
            .map(|cell| {
                let key = ExtentKey {
                    file: id,
                    offset: cell.start,
                    len: cell.end - cell.start,
                };
                (key, cell.clone())
            })
            .collect();
        let new = keys.iter().filter(|(key, _)| self.mapped_for(key).is_none());
        let (count, need) = new.fold((0, 0), |(count, need), (_, cell)| {
            (count + 1, need + cell.end - cell.start)
        });
        if need > self.iovas.free_bytes() {
            return Err(self.no_iova(need).into());
        }
        self.check_budget(count, need)?;

        let mut held: Vec<Arc<Extent>> = Vec::with_capacity(keys.len());
        for (key, cell) in keys {
            let after = held.last().map(|last| last.iova.raw() + last.len());
            match self.acquire_one(bus, &file, key, &cell, owner, after) {
                Ok(extent) => held.push(extent),
                Err(error) => {
                    self.undo(bus, &held, owner);
                    return Err(error);
                }
            }
        }
        Ok(held)
    }

    /// Takes back an `acquire` of which nothing has been used.
    pub(super) fn undo(&mut self, bus: &SoftwareBus, held: &[Arc<Extent>], owner: &str) {
        for extent in held {
            if let Err(error) = self.release(bus, extent, owner) {
                tracing::error!(%error, "undoing a refused region left an extent mapped");
            }
        }
    }

    fn acquire_one(
        &mut self,
        bus: &SoftwareBus,
        file: &Arc<File>,
        key: ExtentKey,
        cell: &Range<u64>,
        owner: &str,
        after: Option<u64>,
    ) -> Result<Arc<Extent>, AcquireError> {
        if let Some(iova) = self.mapped_for(&key)
            && let Some(record) = self.records.get_mut(&iova)
        {
            record.owners.push(owner.to_owned());
            return Ok(Arc::clone(&record.extent));
        }
        let len = cell.end - cell.start;
        let host = HostRange::of_file(file, cell.start, len).map_err(AcquireError::File)?;
        let iova = self
            .iovas
            .take(len, cell.start, after)
            .ok_or_else(|| self.no_iova(len))?;
        let request = MapRequest {
            iova,
            len,
            file: Arc::clone(file),
            offset: cell.start,
            host: host.clone(),
            same_as: None,
        };
        let by = self
            .iommu
            .map(&request)
            .inspect_err(|_| self.iovas.give_back(iova))?;
        bus.insert(iova, host.clone());
        let extent = Arc::new(Extent {
            key,
            file: Arc::clone(file),
            iova,
            host,
        });
        tracing::info!(%iova, len, owner, by = by.as_str(), "mapped");
        let record = Record {
            extent: Arc::clone(&extent),
            by,
            owners: vec![owner.to_owned()],
        };
        self.records.insert(iova, record);
        self.shared.insert(key, iova);
        Ok(extent)
    }

    /// Where these bytes are mapped already, good for one more owner.
    ///
    /// Memory that was lost here is not: what we would read is not what the file holds now.
    fn mapped_for(&self, key: &ExtentKey) -> Option<Iova> {
        let iova = *self.shared.get(key)?;
        let record = self.records.get(&iova)?;
        (!record.extent.host.lost_memory()).then_some(iova)
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
        if self.shared.get(&extent.key) == Some(&iova) {
            self.shared.remove(&extent.key);
        }
        // Software devices lose the range first, then the hardware; the IOVA is free only once it is unmapped.
        bus.remove(iova);
        self.iommu.unmap(iova, extent.len())?;
        self.iovas.give_back(iova);
        self.records.remove(&iova);
        tracing::info!(iova = %extent.iova, len = extent.len(), owner, "unmapped");
        Ok(())
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
        let mapped = self.records.values().map(|record| record.extent.len()).sum();
        budget::check_attach(self.iommu.as_ref(), mapped)
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
