//! The IOMMU as the map sees it: something that can map a file range at an IOVA and let a device in.
//!
//! ```text
//! MemoryMap ──map/unmap──▶ dyn Iommu ──▶ iommufd | type1 | vfio-user | software
//!           ──attach─────▶           ──▶ dyn PciFunction
//! ```
//!
//! Which kernel objects stand behind it (IOAS, container, group, domain) is each back end's own business
//! (rule R6). A back end exists with no device; attaching implies whatever the kernel wants.
//!
//! Read with: Linux `Documentation/userspace-api/iommufd.rst`, `Documentation/driver-api/vfio.rst`.

mod choose;
pub mod fake;
mod iommufd;
mod locked;
mod node;
pub(crate) mod reach;
pub mod software;
mod type1;
mod vfio_user;

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

use crate::address::Iova;
use crate::memory::HostRange;
use crate::pci::{PciAddress, PciFunction};

pub use choose::{Chosen, IommuChoice, MapBy, choose};
pub use locked::{Accounting, LockedMemory, own_locked_bytes};
pub use vfio_user::VfioUserIommu;

/// Which back end programs the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuKind {
    /// `/dev/iommu` with VFIO character devices (Linux 6.6 and newer).
    Iommufd,
    /// `/dev/vfio/vfio` with VFIO groups.
    Type1,
    /// No IOMMU: translation in software, for devices that are software themselves.
    None,
    /// DMA_MAP messages to devices that live in another process.
    VfioUser,
}

impl IommuKind {
    /// The word used on the command line, in logs and in `stats`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Iommufd => "iommufd",
            Self::Type1 => "type1",
            Self::None => "none",
            Self::VfioUser => "vfio-user",
        }
    }
}

/// How an extent was given to the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappedBy {
    /// By file descriptor (IOMMU_IOAS_MAP_FILE, or the fd in a vfio-user DMA_MAP).
    File,
    /// By an address in this process.
    Address,
    /// Not in any kernel yet: kept here until a device comes (type1), or translated in software.
    Model,
}

impl MappedBy {
    /// The word used in logs and in `stats`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Address => "address",
            Self::Model => "model",
        }
    }
}

/// One mapping to make: `len` bytes of `file` from `offset` on, readable and writable at `iova`.
///
/// `iova`, `offset` and `len` are multiples of the page size. `host` shows the same bytes in this process and
/// is kept by the caller for as long as the mapping lives.
#[derive(Clone, Debug)]
pub struct MapRequest {
    /// Where the device will see the first byte.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u64,
    /// The memory: a memfd or a hugetlbfs file.
    pub file: Arc<File>,
    /// Byte offset of the range in `file`.
    pub offset: u64,
    /// The same range mapped into this process.
    pub host: HostRange,
    /// Where these very bytes are mapped already, all of them inside one mapping, if they are: a back end that
    /// [shares pins](Iommu::shares_pins) pins nothing for them then.
    pub same_as: Option<Iova>,
}

impl MapRequest {
    /// The error for a map call the kernel refused: a pin limit is told apart, it can be mended.
    fn refused(&self, call: &'static str, source: io::Error) -> IommuError {
        let (iova, len) = (self.iova, self.len);
        if source.raw_os_error() == Some(libc::ENOMEM) {
            let object = format!("{len:#x} bytes at iova {iova}");
            return IommuError::PinLimit { call, object, source };
        }
        IommuError::Map {
            call,
            iova,
            len,
            source,
        }
    }
}

/// A device to let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceAddress {
    /// A PCI function bound to `vfio-pci`.
    Pci(PciAddress),
    /// A device served by another process on this UNIX socket.
    VfioUser(PathBuf),
    /// A device that this process plays itself, by a name it has on its map.
    Software(String),
}

impl std::fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::VfioUser(path) => write!(f, "vfio-user:{}", path.display()),
            Self::Software(name) => write!(f, "software:{name}"),
        }
    }
}

/// Why the IOMMU or VFIO refused.
#[derive(Debug, thiserror::Error)]
pub enum IommuError {
    /// A node could not be opened.
    #[error("cannot open {}; {mend}", path.display())]
    Open {
        /// The node.
        path: PathBuf,
        /// What an operator can type to mend it.
        mend: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A map call failed.
    #[error("{call} of {len:#x} bytes at iova {iova} failed")]
    Map {
        /// The kernel's name of the call.
        call: &'static str,
        /// Where it was to go.
        iova: Iova,
        /// How long it was to be, in bytes.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// An unmap call failed; the range may still be mapped.
    #[error("{call} of {len:#x} bytes at iova {iova} failed, so the device may still reach them")]
    Unmap {
        /// The kernel's name of the call.
        call: &'static str,
        /// The start of the range.
        iova: Iova,
        /// Its length in bytes.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another call failed.
    #[error("{call} on {object} failed")]
    Call {
        /// The kernel's name of the call.
        call: &'static str,
        /// What it was called on: a device, a group, a node.
        object: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is no such PCI function.
    #[error("no PCI device {address} on this machine")]
    NoSuchDevice {
        /// What was asked for.
        address: PciAddress,
    },
    /// The function is not bound to vfio-pci.
    #[error(
        "PCI device {address} is bound to {bound_to}, not to vfio-pci; bind it with:\n  \
         echo vfio-pci > /sys/bus/pci/devices/{address}/driver_override\n  \
         echo {address} > /sys/bus/pci/devices/{address}/driver/unbind; echo {address} > /sys/bus/pci/drivers_probe"
    )]
    NotBound {
        /// The function.
        address: PciAddress,
        /// The driver it has now, or "no driver".
        bound_to: String,
    },
    /// Something else holds the device.
    #[error("PCI device {address} is in use, by another process or on another map")]
    Busy {
        /// The function.
        address: PciAddress,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A sibling in the IOMMU group is not under VFIO.
    #[error(
        "IOMMU group {group} of {address} is not viable: bind these siblings to vfio-pci too, or leave them without a driver: {siblings}"
    )]
    GroupNotViable {
        /// The group's number.
        group: u32,
        /// The function asked for.
        address: PciAddress,
        /// The siblings that have another driver, with its name.
        siblings: String,
    },
    /// The group's siblings are VFIO's, but belong to another map or another process.
    #[error(
        "IOMMU group {group} of {address} is held elsewhere: devices of one group share one map, so {siblings} must be on the same one, in this process"
    )]
    GroupElsewhere {
        /// The group's number.
        group: u32,
        /// The function asked for.
        address: PciAddress,
        /// The siblings bound to VFIO.
        siblings: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The IOMMU does not keep devices from faking interrupts.
    #[error(
        "{call} on {address} was not permitted: the IOMMU does not isolate interrupts; switch interrupt remapping on in firmware, or accept the risk with: echo 1 > {}", parameter.display()
    )]
    UnsafeInterrupts {
        /// The kernel's name of the call.
        call: &'static str,
        /// The function.
        address: PciAddress,
        /// The kernel's switch.
        parameter: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel could not pin or had no memory for its tables.
    #[error(
        "{call} on {object} failed: the limit on locked memory of this user is used up, perhaps by another process; raise it (ulimit -l, LimitMEMLOCK=)"
    )]
    PinLimit {
        /// The kernel's name of the call.
        call: &'static str,
        /// What it was called on.
        object: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The device would not reach something that is mapped.
    #[error("device {device} cannot reach what is mapped at {start:#x}-{end:#x}; it reaches {usable}")]
    Stranded {
        /// The device.
        device: DeviceAddress,
        /// First byte of the mapping.
        start: u64,
        /// Last byte of the mapping.
        end: u64,
        /// The ranges it reaches.
        usable: String,
    },
    /// The IOMMU cannot map in pieces as small as ours.
    #[error(
        "device {device} is behind an IOMMU whose smallest page is {smallest} bytes, and memory is mapped here in multiples of {placed_on}"
    )]
    PageSize {
        /// The device.
        device: DeviceAddress,
        /// The IOMMU's smallest page in bytes.
        smallest: u64,
        /// What extents are placed on, in bytes.
        placed_on: u64,
    },
    /// The map has more mappings than the kernel takes.
    #[error(
        "device {device} cannot come: the map has {need} mappings, and the kernel takes {limit}; let it take more, as root: echo {need} > {}", parameter.display()
    )]
    TooManyMappings {
        /// The device.
        device: DeviceAddress,
        /// How many the kernel takes.
        limit: usize,
        /// How many there are.
        need: usize,
        /// The kernel's limit.
        parameter: PathBuf,
    },
    /// Something mapped lies where a device or its IOMMU wants nothing, and the kernel does not tell where that is.
    #[error("{address} cannot come: something is mapped at an IOVA that this device or its IOMMU reserves")]
    Reserved {
        /// The function.
        address: PciAddress,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Memory was to be mapped by file, which this back end or kernel cannot do.
    #[error("mapping by file is not possible: {reason}; use --map-by auto or address")]
    MapByFile {
        /// Why not.
        reason: String,
    },
    /// Neither back end can be opened by this user.
    #[error("no IOMMU back end can be used: {iommufd}; {type1}")]
    NoneUsable {
        /// Why iommufd cannot.
        iommufd: String,
        /// Why type1 cannot.
        type1: String,
    },
    /// The device has no IOMMU group: the machine has no IOMMU, or it is switched off.
    #[error(
        "PCI device {address} has no IOMMU group: enable the IOMMU in firmware and on the kernel's command line (intel_iommu=on, or amd_iommu=on)"
    )]
    NoIommu {
        /// The function.
        address: PciAddress,
    },
    /// This back end cannot hold such a device.
    #[error("a map with iommu `{iommu}` cannot take {device}")]
    WrongKind {
        /// The map's back end.
        iommu: &'static str,
        /// The device asked for.
        device: DeviceAddress,
    },
    /// The device in the other process failed or left.
    #[error("vfio-user device {}: {reason}", path.display())]
    VfioUser {
        /// Its socket.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
}

/// An IOMMU back end: one IOVA space and the devices let into it.
///
/// Calls block for as long as the kernel takes (pinning gigabytes takes seconds). The map serialises them.
pub trait Iommu: Send {
    /// Which back end this is.
    fn kind(&self) -> IommuKind;

    /// Ranges of IOVA the kernel accepts now, sorted, both ends inclusive. They narrow as devices attach and widen
    /// as they detach.
    ///
    /// `None` while no device fixes them: the map then uses its own cautious default.
    ///
    /// # Errors
    ///
    /// [`IommuError::Call`] if the kernel does not tell.
    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError>;

    /// How many more mappings the kernel takes, or will take once a device is here, or `None` for no limit it tells
    /// of (TRAPS 27).
    fn mappings_left(&self) -> Option<usize> {
        None
    }

    /// Whether bytes that are mapped a second time, as [`MapRequest::same_as`] says, stay pinned once. Otherwise they
    /// count twice for as long as both mappings live (TRAPS 28).
    fn shares_pins(&self) -> bool {
        false
    }

    /// The locked memory that pins are counted as, or `None` where no limit holds. Reads `/proc`; the control plane
    /// asks before it maps.
    fn locked_memory(&self) -> Option<LockedMemory> {
        None
    }

    /// Maps one range for every attached device and for those to come.
    ///
    /// # Errors
    ///
    /// [`IommuError::Map`]; nothing is mapped then.
    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError>;

    /// Takes back exactly one range that [`map`](Self::map) made. Once it returns no device reaches it.
    ///
    /// # Errors
    ///
    /// [`IommuError::Unmap`]; the range must then be taken as still mapped for the devices there are. It is not tried
    /// again, and devices that come later are not given it.
    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError>;

    /// Lets a device in: from now on all ranges are mapped for it.
    ///
    /// # Errors
    ///
    /// [`IommuError::Stranded`] if it would not reach all that is mapped, or any other; the back end is then as
    /// before, and the next attach may succeed.
    fn attach(&mut self, device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError>;

    /// Shows a device out. No mapping reaches it afterwards.
    ///
    /// The caller has stopped the device's DMA.
    ///
    /// # Errors
    ///
    /// [`IommuError::Call`] if the kernel refused; the device is out of our books all the same.
    fn detach(&mut self, device: &DeviceAddress) -> Result<(), IommuError>;

    /// Whether the kernel holds pins for what is mapped at this moment.
    ///
    /// iommufd pins when the first device comes, type1 maps only while a group is there (TRAPS 48).
    fn pins_now(&self) -> bool;
}
