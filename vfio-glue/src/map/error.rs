//! Why a map could not be changed, with the numbers an operator needs.

use std::io;

use crate::iommu::{DeviceAddress, IommuError};
use crate::memory::{FileError, OverlapError};

/// Why the map could not be changed. It is as before then, unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The region's file cannot serve.
    #[error("guest region at {guest:#x} ({len:#x} bytes) is refused")]
    Region {
        /// Guest-physical start.
        guest: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        source: FileError,
    },
    /// The region's addresses wrap.
    #[error(
        "guest region at {guest:#x} of {len:#x} bytes (front-end {frontend:#x}, file offset {offset:#x}) is empty or wraps"
    )]
    Wraps {
        /// Guest-physical start.
        guest: u64,
        /// Front-end start.
        frontend: u64,
        /// Length in bytes.
        len: u64,
        /// File offset.
        offset: u64,
    },
    /// The guest's memory would be in more pieces than one guest may have.
    #[error("the guest's memory would be in {need} pieces, and one guest may have {limit}")]
    TooManyPieces {
        /// Pieces it would be in.
        need: usize,
        /// The limit.
        limit: usize,
    },
    /// Regions overlap.
    #[error(transparent)]
    Overlap(#[from] OverlapError),
    /// Pinning would go over the limit on locked memory.
    #[error(
        "{need} more bytes would have to be pinned, {pinned} are already, {owed} will be when devices come to maps \
         that have none, this user's other processes have pinned {elsewhere}, and the limit on locked memory is \
         {limit}: {} bytes are missing, so raise it (ulimit -l, LimitMEMLOCK=) to at least {sum} bytes", sum - limit
    )]
    OverBudget {
        /// Bytes the change needs.
        need: u64,
        /// Bytes this process has pinned.
        pinned: u64,
        /// Bytes on its maps with no device, pinned when one comes.
        owed: u64,
        /// Bytes other processes have pinned, where the kernel counts per user.
        elsewhere: u64,
        /// RLIMIT_MEMLOCK in bytes.
        limit: u64,
        /// What the limit would have to be, in bytes.
        sum: u64,
    },
    /// No free IOVA range is large enough.
    #[error("no room for {len:#x} bytes in the IOVA ranges {usable}")]
    NoIova {
        /// Bytes wanted.
        len: u64,
        /// The usable ranges.
        usable: String,
    },
    /// The kernel takes no more mappings.
    #[error("the IOMMU takes {left} more mappings, {need} are needed")]
    TooManyMappings {
        /// How many it takes.
        left: usize,
        /// How many were to come.
        need: usize,
    },
    /// The device's usable ranges leave out something that is mapped.
    #[error("device {device} cannot reach what is mapped at {start:#x}-{end:#x}; it reaches {usable}")]
    Strands {
        /// The device.
        device: DeviceAddress,
        /// First mapped byte outside.
        start: u64,
        /// Last mapped byte of that range.
        end: u64,
        /// The ranges it reaches.
        usable: String,
    },
    /// The device is on this map already.
    #[error("device {device} is already on map {map}")]
    AlreadyAttached {
        /// The device.
        device: DeviceAddress,
        /// The map's name.
        map: String,
    },
    /// Memory of our own could not be allocated.
    #[error("cannot allocate {len} bytes of memory for rings or bounce slots")]
    OwnMemory {
        /// Bytes wanted.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The IOMMU or VFIO refused.
    #[error("the IOMMU refused")]
    Iommu(#[source] IommuError),
}

impl From<IommuError> for MapError {
    fn from(error: IommuError) -> Self {
        match error {
            IommuError::Stranded {
                device,
                start,
                end,
                usable,
            } => Self::Strands {
                device,
                start,
                end,
                usable,
            },
            other => Self::Iommu(other),
        }
    }
}
