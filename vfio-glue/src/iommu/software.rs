//! Translation without an IOMMU: how a device made of software does its DMA.
//!
//! [`SoftwareBus`] holds what a map has mapped, by IOVA, and copies bytes in and out. `tap` moves frames through
//! it, and so do the card models in the tests; an IOVA nobody mapped is a fault, as on a real bus.
//! [`SoftwareIommu`] is the back end `none` for maps with such devices only.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};

use super::{DeviceAddress, Iommu, IommuError, IommuKind, MapRequest, MappedBy};
use crate::address::Iova;
use crate::memory::HostRange;
use crate::pci::PciFunction;

/// A DMA access to an IOVA that is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA of {len} bytes at iova {iova} leaves what is mapped")]
pub struct BusFault {
    /// Where the access started.
    pub iova: Iova,
    /// How long it was, in bytes.
    pub len: usize,
}

/// What a map has mapped, as a software device reaches it. Shared: the map changes it, devices read it.
#[derive(Debug, Default)]
pub struct SoftwareBus {
    ranges: RwLock<BTreeMap<u64, HostRange>>,
}

impl SoftwareBus {
    /// Copies from memory at `iova` into `bytes`.
    ///
    /// # Errors
    ///
    /// [`BusFault`] if any byte is not mapped; `bytes` is unspecified then.
    pub fn read(&self, iova: Iova, bytes: &mut [u8]) -> Result<(), BusFault> {
        self.with(iova, bytes.len(), |part, at| {
            let end = at + part.len();
            part.copy_to(&mut bytes[at..end]);
        })
    }

    /// Copies `bytes` to memory at `iova`.
    ///
    /// # Errors
    ///
    /// [`BusFault`] if any byte is not mapped; bytes before the fault may have been written.
    pub fn write(&self, iova: Iova, bytes: &[u8]) -> Result<(), BusFault> {
        self.with(iova, bytes.len(), |part, at| {
            part.copy_from(&bytes[at..]);
        })
    }

    /// The `len` bytes at `iova`, if one mapping has them all. They stay there, mapped for devices or not, while this
    /// lives: for what a device was told to go on using, as its rings.
    pub fn window(&self, iova: Iova, len: usize) -> Option<HostRange> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (range, skip) = find(&ranges, iova.raw())?;
        range.sub(skip, len)
    }

    /// Bytes mapped from `iova` to the end of its range; 0 if it is not mapped.
    pub fn room(&self, iova: Iova) -> usize {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        find(&ranges, iova.raw()).map_or(0, |(range, skip)| range.len() - skip)
    }

    fn with(
        &self,
        iova: Iova,
        len: usize,
        mut each: impl FnMut(crate::memory::HostSlice<'_>, usize),
    ) -> Result<(), BusFault> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let fault = BusFault { iova, len };
        let mut done = 0;
        while done < len {
            let at = iova.raw().checked_add(done as u64).ok_or(fault)?;
            let (range, skip) = find(&ranges, at).ok_or(fault)?;
            let count = (len - done).min(range.len() - skip);
            each(range.slice(skip, count).ok_or(fault)?, done);
            done += count;
        }
        Ok(())
    }

    pub(crate) fn insert(&self, iova: Iova, host: HostRange) {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(iova.raw(), host);
    }

    pub(crate) fn remove(&self, iova: Iova) {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&iova.raw());
    }
}

fn find(ranges: &BTreeMap<u64, HostRange>, iova: u64) -> Option<(&HostRange, usize)> {
    let (start, range) = ranges.range(..=iova).next_back()?;
    let skip = usize::try_from(iova - start)
        .ok()
        .filter(|skip| *skip < range.len())?;
    Some((range, skip))
}

/// The back end `none`: the map's own books are the translation. Refuses devices that do their DMA in hardware.
#[derive(Debug, Default)]
pub struct SoftwareIommu;

impl Iommu for SoftwareIommu {
    fn kind(&self) -> IommuKind {
        IommuKind::None
    }

    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError> {
        Ok(None)
    }

    fn map(&mut self, _request: &MapRequest) -> Result<MappedBy, IommuError> {
        Ok(MappedBy::Model)
    }

    fn unmap(&mut self, _iova: Iova, _len: u64) -> Result<(), IommuError> {
        Ok(())
    }

    fn attach(&mut self, device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError> {
        Err(IommuError::WrongKind {
            iommu: self.kind().as_str(),
            device: device.clone(),
        })
    }

    fn detach(&mut self, _device: &DeviceAddress) -> Result<(), IommuError> {
        Ok(())
    }

    fn pins_now(&self) -> bool {
        false
    }
}
