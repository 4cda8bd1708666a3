//! The IOMMU through `/dev/iommu`: an address space that exists before any device does.
//!
//! ```text
//! map ──IOAS_MAP_FILE | IOAS_MAP──▶ IOAS ◀──bind, attach── VFIO character node
//! ```
//!
//! By file needs no mapping of ours and survives a change of process (TRAPS 49); by address is for kernels
//! before 6.13 and for files that are neither memfd nor hugetlbfs (TRAPS 24). With no device attached nothing is
//! pinned yet, so a pin can fail as late as at the first attach (TRAPS 48). Bytes mapped by file that move to another
//! mapping are copied from the old one, so that they stay pinned once; by address the kernel pins them twice until the
//! old one goes.
//!
//! Read with: Linux `Documentation/userspace-api/iommufd.rst`; `include/uapi/linux/iommufd.h`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::fstatfs;

use super::locked::Owed;
use super::reach::Reach;
use super::{
    Accounting, DeviceAddress, Iommu, IommuError, IommuKind, LockedMemory, MapBy, MapRequest, MappedBy, node,
};
use crate::address::Iova;
use crate::pci::sysfs::{Found, Sysfs};
use crate::pci::vfio::VfioFunction;
use crate::pci::{PciAddress, PciFunction};
use crate::sys;

const BIND: &str = "VFIO_DEVICE_BIND_IOMMUFD";
const ATTACH: &str = "VFIO_DEVICE_ATTACH_IOMMUFD_PT";
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// One IOAS and the devices on it.
pub(super) struct Iommufd {
    iommufd: File,
    ioas: u32,
    by: By,
    sysfs: Sysfs,
    devices: BTreeMap<PciAddress, Arc<File>>,
    /// What is mapped: first byte and length.
    mapped: BTreeMap<u64, u64>,
    owed: Owed,
    told: bool,
}

/// How memory is mapped, once the kernel has been asked what it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// By file only.
    File,
    /// By file where the file is fit for it.
    FileWherePossible,
    /// By address only.
    Address,
}

impl Iommufd {
    /// Opens `/dev/iommu` and makes an empty address space. Needs no device.
    ///
    /// # Errors
    ///
    /// [`IommuError::Open`], [`IommuError::MapByFile`] if `map_by` asks for what this kernel has not, or
    /// [`IommuError::Call`].
    pub(super) fn with(map_by: MapBy, sysfs: Sysfs) -> Result<Self, IommuError> {
        let path = sysfs.iommufd();
        let iommufd = node::open(&path, node::IOMMUFD_ABSENT)?;
        let ioas = sys::ioas_alloc(&iommufd).map_err(|source| IommuError::Call {
            call: "IOMMU_IOAS_ALLOC",
            object: path.display().to_string(),
            source,
        })?;
        let by = match (map_by, sys::has_ioas_map_file(&iommufd, ioas)) {
            (MapBy::File, true) => By::File,
            (MapBy::Auto, true) => By::FileWherePossible,
            (MapBy::File, false) => {
                let reason = "this kernel has no IOMMU_IOAS_MAP_FILE (Linux 6.13)".to_owned();
                return Err(IommuError::MapByFile { reason });
            }
            (MapBy::Auto, false) | (MapBy::Address, _) => By::Address,
        };
        Ok(Self {
            iommufd,
            ioas,
            by,
            sysfs,
            devices: BTreeMap::new(),
            mapped: BTreeMap::new(),
            owed: Owed::new(Accounting::PerUser),
            told: false,
        })
    }

    /// How memory will be mapped, and why, for the log.
    pub(super) fn mapping_reason(&self, map_by: MapBy) -> &'static str {
        match (self.by, map_by) {
            (By::File | By::FileWherePossible, _) => "memory mapped by file",
            (By::Address, MapBy::Address) => "memory mapped by address, as asked",
            (By::Address, _) => {
                "memory mapped by address: this kernel has no IOMMU_IOAS_MAP_FILE (Linux 6.13)"
            }
        }
    }

    fn map_file(&self, request: &MapRequest) -> Result<(), IommuError> {
        let file = request.file.as_fd();
        let (offset, len, iova) = (request.offset, request.len, request.iova);
        sys::ioas_map_file(&self.iommufd, self.ioas, file, offset, len, iova)
            .map_err(|source| request.refused("IOMMU_IOAS_MAP_FILE", source))
    }

    fn map_address(&self, request: &MapRequest) -> Result<(), IommuError> {
        sys::ioas_map(&self.iommufd, self.ioas, &request.host, request.iova)
            .map_err(|source| request.refused("IOMMU_IOAS_MAP", source))
    }

    fn open_device(&self, found: &Found) -> Result<Arc<File>, IommuError> {
        let Some(path) = &found.cdev else {
            return Err(IommuError::Open {
                path: self.sysfs.no_cdev(found.address),
                mend: node::CDEV_ABSENT.to_owned(),
                source: io::ErrorKind::NotFound.into(),
            });
        };
        let device = node::open(path, node::CDEV_ABSENT)?;
        sys::bind_iommufd(&device, &self.iommufd).map_err(|source| self.explain_bind(found, source))?;
        sys::attach_ioas(&device, self.ioas).map_err(|source| self.explain_attach(&device, found, source))?;
        // The kernel has let it in, so what is mapped is reached; what is still to be mapped has to fit as well.
        if let Err(error) = self
            .reach(self.ioas)
            .and_then(|reach| reach.admit(&DeviceAddress::Pci(found.address), self.mapped_ranges()))
        {
            if let Err(source) = sys::detach_ioas(&device) {
                tracing::warn!(device = %found.address, %source, "detach after a refused attach failed");
            }
            return Err(error);
        }
        Ok(Arc::new(device))
    }

    fn reach(&self, ioas: u32) -> Result<Reach, IommuError> {
        let (ranges, page) =
            sys::ioas_iova_ranges(&self.iommufd, ioas).map_err(|source| IommuError::Call {
                call: "IOMMU_IOAS_IOVA_RANGES",
                object: self.sysfs.iommufd().display().to_string(),
                source,
            })?;
        Ok(Reach { ranges, page })
    }

    /// What a device that was refused would reach: it is put on an address space of its own for a moment, with
    /// nothing in it. `None` if the kernel does not let it there either.
    fn learn_reach(&self, device: &File) -> Option<Reach> {
        let scratch = sys::ioas_alloc(&self.iommufd).ok()?;
        let reach = sys::attach_ioas(device, scratch).ok().and_then(|()| {
            let reach = self.reach(scratch).ok();
            sys::detach_ioas(device).ok().and(reach)
        });
        if let Err(error) = sys::ioas_destroy(&self.iommufd, scratch) {
            // It is empty and goes with our descriptor.
            tracing::warn!(%error, "an address space made to learn what a device reaches was left behind");
        }
        reach
    }

    fn mapped_ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.mapped.iter().map(|(start, len)| (*start, start + (len - 1)))
    }

    /// What will be pinned once a device comes.
    fn settle_owed(&mut self) {
        let unpinned = self.devices.is_empty();
        self.owed
            .set(if unpinned { self.mapped.values().sum() } else { 0 });
    }

    /// Maps what is mapped at `from` already, or says that it cannot be had that way.
    fn copy(&self, request: &MapRequest, from: Iova) -> bool {
        let copied = sys::ioas_copy(&self.iommufd, self.ioas, from, request.iova, request.len);
        if let Err(error) = &copied {
            let (iova, len) = (request.iova, request.len);
            tracing::info!(%error, %from, %iova, len, "IOMMU_IOAS_COPY failed, mapping afresh and pinning twice");
        }
        copied.is_ok()
    }

    /// EINVAL is what a device answers that is open already; EPERM and EBUSY come for a group with another owner,
    /// EPERM also where interrupts are not isolated.
    fn explain_bind(&self, found: &Found, source: io::Error) -> IommuError {
        match source.raw_os_error() {
            Some(libc::EINVAL) => self
                .sysfs
                .explain_refusal(found, io::ErrorKind::ResourceBusy.into()),
            Some(libc::EBUSY) => self.sysfs.explain_refusal(found, source),
            Some(libc::EPERM) => match self.sysfs.explain_refusal(found, source) {
                IommuError::Busy { address, source } => IommuError::UnsafeInterrupts {
                    call: BIND,
                    address,
                    parameter: "/sys/module/iommufd/parameters/allow_unsafe_interrupts".into(),
                    source,
                },
                group => group,
            },
            _ => call_error(BIND, found, source),
        }
    }

    /// The device is ours by now; what can still be wrong is what it reaches, the group, an interrupt window or a pin.
    fn explain_attach(&self, device: &File, found: &Found, source: io::Error) -> IommuError {
        let address = found.address;
        if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::EADDRINUSE))
            && let Some(reach) = self.learn_reach(device)
            && let Err(error) = reach.admit(&DeviceAddress::Pci(address), self.mapped_ranges())
        {
            return error;
        }
        match source.raw_os_error() {
            Some(libc::EINVAL | libc::EBUSY) => match self.sysfs.explain_refusal(found, source) {
                IommuError::Busy { source, .. } => call_error(ATTACH, found, source),
                group => group,
            },
            Some(libc::EPERM) => IommuError::UnsafeInterrupts {
                call: ATTACH,
                address,
                parameter: "/sys/module/iommufd/parameters/allow_unsafe_interrupts".into(),
                source,
            },
            Some(libc::EADDRINUSE) => IommuError::Reserved { address, source },
            Some(libc::ENOMEM) => IommuError::PinLimit {
                call: ATTACH,
                object: address.to_string(),
                source,
            },
            _ => call_error(ATTACH, found, source),
        }
    }
}

fn call_error(call: &'static str, found: &Found, source: io::Error) -> IommuError {
    let object = found.address.to_string();
    IommuError::Call { call, object, source }
}

/// Whether the file is one `memfd_pin_folios` takes: shared memory or hugetlbfs (TRAPS 24).
///
/// Asked here because without a device the kernel would find out only at the first attach.
fn fit_for_map_file(file: &File) -> bool {
    fstatfs(file).is_ok_and(|fs| {
        u64::try_from(fs.f_type).is_ok_and(|magic| matches!(magic, TMPFS_MAGIC | HUGETLBFS_MAGIC))
    })
}

impl Iommu for Iommufd {
    fn kind(&self) -> IommuKind {
        IommuKind::Iommufd
    }

    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError> {
        if self.devices.is_empty() {
            // The kernel would say 0 to 2^64-1, which no hardware takes.
            return Ok(None);
        }
        Ok(Some(self.reach(self.ioas)?.ranges))
    }

    /// By address a copy would name the memory by the address it was first mapped from, which need not be ours by the
    /// time a device comes: by file only.
    fn shares_pins(&self) -> bool {
        self.by != By::Address
    }

    fn locked_memory(&self) -> Option<LockedMemory> {
        LockedMemory::now(Accounting::PerUser)
    }

    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError> {
        let fit = self.by != By::Address && fit_for_map_file(&request.file);
        let by = match self.by {
            By::File if !fit => {
                return Err(IommuError::MapByFile {
                    reason: "the memory is neither a memfd nor on hugetlbfs".to_owned(),
                });
            }
            By::File | By::FileWherePossible if fit => MappedBy::File,
            _ => MappedBy::Address,
        };
        // What is mapped by file here was so the first time.
        let source = request.same_as.filter(|_| by == MappedBy::File);
        if source.is_none_or(|from| !self.copy(request, from)) {
            if by == MappedBy::File {
                self.map_file(request)?;
            } else {
                if self.by == By::FileWherePossible && !std::mem::replace(&mut self.told, true) {
                    tracing::info!("mapping by address: the memory is neither a memfd nor on hugetlbfs");
                }
                self.map_address(request)?;
            }
        }
        self.mapped.insert(request.iova.raw(), request.len);
        self.settle_owed();
        Ok(by)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let failed = |source| IommuError::Unmap {
            call: "IOMMU_IOAS_UNMAP",
            iova,
            len,
            source,
        };
        let unmapped = sys::ioas_unmap(&self.iommufd, self.ioas, iova, len).map_err(failed)?;
        if unmapped != len {
            return Err(failed(io::Error::other(format!(
                "only {unmapped:#x} bytes were unmapped"
            ))));
        }
        self.mapped.remove(&iova.raw());
        self.settle_owed();
        Ok(())
    }

    fn attach(&mut self, device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError> {
        let DeviceAddress::Pci(address) = *device else {
            return Err(IommuError::WrongKind {
                iommu: self.kind().as_str(),
                device: device.clone(),
            });
        };
        let found = self.sysfs.find(address)?;
        let file = self.open_device(&found)?;
        let function =
            VfioFunction::new(address.to_string(), Arc::clone(&file)).map_err(|(call, source)| {
                IommuError::Call {
                    call,
                    object: address.to_string(),
                    source,
                }
            })?;
        self.devices.insert(address, file);
        self.settle_owed();
        Ok(Arc::new(function))
    }

    fn detach(&mut self, device: &DeviceAddress) -> Result<(), IommuError> {
        let DeviceAddress::Pci(address) = device else {
            return Ok(());
        };
        let Some(file) = self.devices.remove(address) else {
            return Ok(());
        };
        self.settle_owed();
        sys::detach_ioas(&file).map_err(|source| IommuError::Call {
            call: "VFIO_DEVICE_DETACH_IOMMUFD_PT",
            object: address.to_string(),
            source,
        })
    }

    fn pins_now(&self) -> bool {
        !self.devices.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_memory_and_hugetlbfs_are_mapped_by_file() {
        let memfd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(fit_for_map_file(&File::from(memfd)));
        assert!(!fit_for_map_file(&File::open("/proc/self/maps").unwrap()));
    }
}
