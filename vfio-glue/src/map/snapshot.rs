//! What a map shows of itself: its contents at one moment.

use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

use super::books::{Record, UNMAP_FAILED};
use crate::address::Iova;
use crate::iommu::{DeviceAddress, Iommu, IommuKind, MappedBy};

/// A map's contents at one moment.
#[derive(Clone, Debug)]
pub struct MapSnapshot {
    /// The map's name.
    pub name: String,
    /// What programs its IOMMU.
    pub iommu: IommuKind,
    /// Ranges of IOVA it allocates from.
    pub usable: Vec<RangeInclusive<u64>>,
    /// Bytes mapped: those that two extents show, twice.
    pub mapped_bytes: u64,
    /// Bytes the kernel holds pinned for it now.
    pub pinned_bytes: u64,
    /// Extents that were mapped anew because pages of theirs had been discarded behind the pin, so far.
    pub discards: u64,
    /// The devices that see it.
    pub devices: Vec<DeviceAddress>,
    /// What is mapped, in order of IOVA.
    pub extents: Vec<ExtentSnapshot>,
}

/// One extent at one moment.
#[derive(Clone, Debug)]
pub struct ExtentSnapshot {
    /// Where devices find it.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u64,
    /// The file, as the kernel names it.
    pub file: String,
    /// Where it starts in the file, in bytes.
    pub file_offset: u64,
    /// The pages it is made of that the IOMMU can translate as a whole, in bytes: those of the file where the IOVA is
    /// congruent to them, else 4096. What the kernel joins beyond that it does not tell.
    pub page_bytes: u64,
    /// How the IOMMU got it.
    pub by: MappedBy,
    /// Who asked for it, once for each time; `unmap failed` for a range that nobody has any more and that could not
    /// be taken from the devices.
    pub owners: Vec<String>,
}

impl Record {
    pub(super) fn snapshot(&self, iommu: &dyn Iommu) -> ExtentSnapshot {
        // type1 maps everything when a device comes and forgets it when the last one leaves.
        let by = match (iommu.kind(), iommu.pins_now()) {
            (IommuKind::Type1, true) => MappedBy::Address,
            (IommuKind::Type1, false) => MappedBy::Model,
            _ => self.by,
        };
        let fd = self.extent.file.as_raw_fd();
        let file = std::fs::read_link(format!("/proc/self/fd/{fd}"));
        ExtentSnapshot {
            iova: self.extent.iova,
            len: self.extent.len(),
            file: file.map_or_else(|_| "?".to_owned(), |path| path.display().to_string()),
            file_offset: self.extent.file_offset(),
            page_bytes: self.extent.page_bytes(),
            by,
            owners: if self.owners.is_empty() {
                vec![UNMAP_FAILED.to_owned()]
            } else {
                self.owners.clone()
            },
        }
    }
}
