//! The IOMMU through `/dev/vfio/vfio`: a container whose mappings live only while a group is in it.
//!
//! ```text
//! map ──VFIO_IOMMU_MAP_DMA──▶ container ◀──group◀──device
//!         └─▶ remembered: put back when the first group comes again
//! ```
//!
//! The kernel takes mappings only once a group is in and drops them all when the last one leaves, so this back
//! end remembers them: the map outlives its devices all the same (rule R1). A device that would not reach all that is
//! remembered, or a map with more of it than the kernel takes, is refused before anything of it is put back; if
//! putting back fails half way, what was put back goes with the group and everything is remembered as before.
//!
//! Read with: Linux `Documentation/driver-api/vfio.rst`; `include/uapi/linux/vfio.h`, "Type1"; TRAPS 26, 27, 48.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use vfio_bindings::bindings::vfio;

use super::locked::Owed;
use super::reach::Reach;
use super::{
    Accounting, DeviceAddress, Iommu, IommuError, IommuKind, LockedMemory, MapRequest, MappedBy, node,
};
use crate::address::Iova;
use crate::pci::sysfs::{Found, Sysfs};
use crate::pci::vfio::VfioFunction;
use crate::pci::{PciAddress, PciFunction};
use crate::sys;

/// One container, its groups and what is mapped.
pub(super) struct Type1 {
    container: File,
    sysfs: Sysfs,
    groups: BTreeMap<u32, Group>,
    /// What the map has mapped, by IOVA, in the kernel or not. Keeps the memory mapped in this process.
    remembered: BTreeMap<u64, MapRequest>,
    owed: Owed,
}

/// A group in the container. With no device it is one the kernel has not let go yet.
struct Group {
    file: File,
    devices: Vec<PciAddress>,
}

/// What the kernel tells about a container with a group in it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Info {
    ranges: Option<Vec<RangeInclusive<u64>>>,
    /// The smallest page of the IOMMU, in bytes.
    page: Option<u64>,
    mappings_left: Option<usize>,
}

impl Info {
    /// What devices of this container reach. A kernel that does not tell checks each mapping by itself.
    fn reach(&self) -> Reach {
        Reach {
            ranges: self.ranges.clone().unwrap_or_else(|| vec![0..=u64::MAX]),
            page: self.page.unwrap_or(1),
        }
    }
}

impl Type1 {
    /// Opens a container. Needs no group and no device.
    ///
    /// # Errors
    ///
    /// [`IommuError::Open`], or [`IommuError::Call`] if this kernel's container is no type1v2 one.
    pub(super) fn with(sysfs: Sysfs) -> Result<Self, IommuError> {
        let path = sysfs.container();
        let container = node::open(&path, node::CONTAINER_ABSENT)?;
        let has = sys::container_has_type1v2(&container).and_then(|has| {
            let missing = || io::Error::new(io::ErrorKind::Unsupported, "type1v2 is missing");
            has.then_some(()).ok_or_else(missing)
        });
        has.map_err(|source| IommuError::Call {
            call: "VFIO_CHECK_EXTENSION",
            object: path.display().to_string(),
            source,
        })?;
        Ok(Self {
            container,
            sysfs,
            groups: BTreeMap::new(),
            remembered: BTreeMap::new(),
            owed: Owed::new(Accounting::PerProcess),
        })
    }

    /// Puts a group into the container and, if it is the first, the remembered mappings into the kernel.
    fn enter(&self, found: &Found) -> Result<File, IommuError> {
        let path = self.sysfs.group(found.group);
        let group = node::open(&path, node::GROUP_ABSENT).map_err(|error| match error {
            IommuError::Open { source, .. } if source.raw_os_error() == Some(libc::EBUSY) => {
                self.sysfs.explain_refusal(found, source)
            }
            other => other,
        })?;
        let object = || path.display().to_string();
        let failed = |call| {
            move |source: io::Error| match source.raw_os_error() {
                Some(libc::EPERM) => IommuError::UnsafeInterrupts {
                    call,
                    address: found.address,
                    parameter: "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts".into(),
                    source,
                },
                _ => IommuError::Call {
                    call,
                    object: object(),
                    source,
                },
            }
        };
        if !sys::group_is_viable(&group).map_err(failed("VFIO_GROUP_GET_STATUS"))? {
            return Err(self
                .sysfs
                .explain_refusal(found, io::ErrorKind::ResourceBusy.into()));
        }
        let device = DeviceAddress::Pci(found.address);
        if let Err(source) = sys::group_set_container(&group, &self.container) {
            // With others in, the kernel itself refuses one that would not reach what is mapped.
            if source.raw_os_error() == Some(libc::EINVAL)
                && let Some(info) = self.learn_info(&group)
            {
                self.admit(&info, &device)?;
            }
            return Err(failed("VFIO_GROUP_SET_CONTAINER")(source));
        }
        // From here on closing the group's file takes it out of the container again.
        if self.groups.is_empty() {
            sys::set_iommu_type1v2(&self.container).map_err(failed("VFIO_SET_IOMMU"))?;
            let info = self.info()?;
            self.admit(&info, &device)?;
            self.check_count(&info, &device)?;
            for request in self.remembered.values() {
                // What was mapped before a failure goes with the group.
                self.map_now(request)?;
            }
        } else {
            self.admit(&self.info()?, &device)?;
        }
        Ok(group)
    }

    fn admit(&self, info: &Info, device: &DeviceAddress) -> Result<(), IommuError> {
        let ranges = self.remembered.iter();
        info.reach().admit(
            device,
            ranges.map(|(start, request)| (*start, start + (request.len - 1))),
        )
    }

    /// Whether a container with nothing in it takes all that is remembered (TRAPS 27).
    fn check_count(&self, info: &Info, device: &DeviceAddress) -> Result<(), IommuError> {
        let need = self.remembered.len();
        info.mappings_left
            .filter(|limit| *limit < need)
            .map_or(Ok(()), |limit| {
                Err(IommuError::TooManyMappings {
                    device: device.clone(),
                    limit,
                    need,
                    parameter: self.sysfs.type1_mappings_limit_parameter(),
                })
            })
    }

    /// What a group that was refused would reach: it is put into a container of its own for a moment.
    fn learn_info(&self, group: &File) -> Option<Info> {
        let scratch = node::open(&self.sysfs.container(), node::CONTAINER_ABSENT).ok()?;
        sys::group_set_container(group, &scratch).ok()?;
        let told = sys::set_iommu_type1v2(&scratch).and_then(|()| sys::type1_info(&scratch));
        let left = sys::group_unset_container(group);
        left.and(told).ok().map(|bytes| parse_info(&bytes))
    }

    /// What will be pinned once a group comes.
    fn settle_owed(&mut self) {
        let unpinned = self.groups.is_empty();
        let remembered = || self.remembered.values().map(|request| request.len).sum();
        self.owed.set(if unpinned { remembered() } else { 0 });
    }

    fn open_device(&self, group: &File, found: &Found) -> Result<Arc<dyn PciFunction>, IommuError> {
        let name = found.address.to_string();
        let failed = |call| {
            let object = name.clone();
            move |source| IommuError::Call { call, object, source }
        };
        let device = sys::group_device(group, &name).map_err(failed("VFIO_GROUP_GET_DEVICE_FD"))?;
        let function = VfioFunction::new(name.clone(), Arc::new(File::from(device)))
            .map_err(|(call, source)| failed(call)(source))?;
        Ok(Arc::new(function))
    }

    /// Takes groups without devices out of the container.
    ///
    /// The kernel refuses while such a device is open or one of its BARs mapped somewhere. The group then stays
    /// in our books too, so that unmapping still reaches the kernel, and is tried again the next time.
    fn let_go(&mut self) -> Result<(), IommuError> {
        let mut outcome = Ok(());
        let sysfs = &self.sysfs;
        self.groups.retain(|number, group| {
            if !group.devices.is_empty() {
                return true;
            }
            let Err(source) = sys::group_unset_container(&group.file) else {
                return false;
            };
            // It is in no container: the kernel takes it out when its last device is unbound, perhaps just now.
            if source.raw_os_error() == Some(libc::EINVAL) {
                return false;
            }
            outcome = Err(IommuError::Call {
                call: "VFIO_GROUP_UNSET_CONTAINER",
                object: sysfs.group(*number).display().to_string(),
                source,
            });
            true
        });
        outcome
    }

    fn map_now(&self, request: &MapRequest) -> Result<(), IommuError> {
        sys::type1_map(&self.container, &request.host, request.iova)
            .map_err(|source| request.refused("VFIO_IOMMU_MAP_DMA", source))
    }

    fn info(&self) -> Result<Info, IommuError> {
        let bytes = sys::type1_info(&self.container).map_err(|source| IommuError::Call {
            call: "VFIO_IOMMU_GET_INFO",
            object: self.sysfs.container().display().to_string(),
            source,
        })?;
        Ok(parse_info(&bytes))
    }
}

impl Iommu for Type1 {
    fn kind(&self) -> IommuKind {
        IommuKind::Type1
    }

    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError> {
        if self.groups.is_empty() {
            return Ok(None);
        }
        Ok(self.info()?.ranges)
    }

    fn mappings_left(&self) -> Option<usize> {
        if self.groups.is_empty() {
            let limit = self.sysfs.type1_mappings_limit()?;
            return Some(limit.saturating_sub(self.remembered.len()));
        }
        self.info().ok()?.mappings_left
    }

    fn locked_memory(&self) -> Option<LockedMemory> {
        LockedMemory::now(Accounting::PerProcess)
    }

    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError> {
        let by = if self.groups.is_empty() {
            MappedBy::Model
        } else {
            self.map_now(request)?;
            MappedBy::Address
        };
        let lasting = MapRequest {
            same_as: None,
            ..request.clone()
        };
        self.remembered.insert(request.iova.raw(), lasting);
        self.settle_owed();
        Ok(by)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let failed = |source| IommuError::Unmap {
            call: "VFIO_IOMMU_UNMAP_DMA",
            iova,
            len,
            source,
        };
        let exact = self
            .remembered
            .get(&iova.raw())
            .is_some_and(|request| request.len == len);
        if !exact {
            return Err(failed(io::Error::other("no mapping has these bounds")));
        }
        // Forgotten even if the kernel refuses: what it still holds goes with the last group and must not come back
        // with the next one.
        self.remembered.remove(&iova.raw());
        self.settle_owed();
        if !self.groups.is_empty() {
            let unmapped = sys::type1_unmap(&self.container, iova, len).map_err(failed)?;
            if unmapped != len {
                return Err(failed(io::Error::other(format!(
                    "only {unmapped:#x} bytes were unmapped"
                ))));
            }
        }
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
        if let Some(group) = self.groups.get(&found.group) {
            let function = self.open_device(&group.file, &found)?;
            if let Some(group) = self.groups.get_mut(&found.group) {
                group.devices.push(address);
            }
            return Ok(function);
        }
        let file = self.enter(&found)?;
        let function = self.open_device(&file, &found)?;
        let devices = vec![address];
        self.groups.insert(found.group, Group { file, devices });
        self.settle_owed();
        Ok(function)
    }

    fn detach(&mut self, device: &DeviceAddress) -> Result<(), IommuError> {
        let DeviceAddress::Pci(address) = device else {
            return Ok(());
        };
        for group in self.groups.values_mut() {
            group.devices.retain(|other| other != address);
        }
        let outcome = self.let_go();
        self.settle_owed();
        outcome
    }

    fn pins_now(&self) -> bool {
        !self.groups.is_empty()
    }
}

/// Reads `struct vfio_iommu_type1_info` and the capabilities chained behind it.
///
/// Offsets are the kernel's, yet each is checked: what does not fit is left out, and a chain that does not go
/// forward ends.
fn parse_info(bytes: &[u8]) -> Info {
    const FLAGS: usize = 4;
    const PAGE_SIZES: usize = 8;
    const CAP_OFFSET: usize = 16;
    let mut info = Info::default();
    let has = |flag| u32_at(bytes, FLAGS).is_some_and(|flags| flags & flag != 0);
    if has(vfio::VFIO_IOMMU_INFO_PGSIZES) {
        let sizes = bytes.get(PAGE_SIZES..).and_then(|sizes| sizes.first_chunk());
        // One bit for each size.
        let sizes = sizes
            .map(|sizes| u64::from_ne_bytes(*sizes))
            .filter(|sizes| *sizes != 0);
        info.page = sizes.map(|sizes| 1 << sizes.trailing_zeros());
    }
    let has_caps = has(vfio::VFIO_IOMMU_INFO_CAPS);
    let mut at = if has_caps { u32_at(bytes, CAP_OFFSET) } else { None };
    let mut last = 0;
    while let Some(start) = at
        .and_then(|at| usize::try_from(at).ok())
        .filter(|start| *start > last)
    {
        last = start;
        let Some(cap) = bytes.get(start..) else { break };
        // struct vfio_info_cap_header: u16 id, u16 version, u32 next.
        let Some(id) = u32_at(cap, 0).map(|word| word.to_ne_bytes()) else {
            break;
        };
        match u32::from(u16::from_ne_bytes([id[0], id[1]])) {
            vfio::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => info.ranges = parse_ranges(cap),
            vfio::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                info.mappings_left = u32_at(cap, 8).and_then(|left| usize::try_from(left).ok());
            }
            _ => {}
        }
        at = u32_at(cap, 4);
    }
    info
}

/// `struct vfio_iommu_type1_info_cap_iova_range`: u32 count and padding, then pairs of first and last.
fn parse_ranges(cap: &[u8]) -> Option<Vec<RangeInclusive<u64>>> {
    const FIRST: usize = 16;
    const PAIR: usize = 16;
    let count = usize::try_from(u32_at(cap, 8)?).ok()?;
    let pairs = cap.get(FIRST..)?.get(..count.checked_mul(PAIR)?)?;
    let (pairs, _) = pairs.as_chunks::<PAIR>();
    let ranges = pairs.iter().map(|pair| {
        let (words, _) = pair.as_chunks::<8>();
        u64::from_ne_bytes(words[0])..=u64::from_ne_bytes(words[1])
    });
    Some(ranges.collect())
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let word = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HostRange;
    use crate::pci::sysfs::fake::Machine;

    /// A description as the kernel writes it: 24 bytes, then capabilities given as 32-bit words.
    fn description(flags: u32, first_cap: u32, caps: &[u32]) -> Vec<u8> {
        let head = [0, flags, 0xfffff000, 0xffff_ffff, first_cap, 0];
        head.iter()
            .chain(caps)
            .flat_map(|word| word.to_ne_bytes())
            .collect()
    }

    #[test]
    fn ranges_and_mappings_left_are_read_from_the_chain() {
        let caps = [
            3,
            36,
            65535, // DMA_AVAIL, next at 36
            1 | 1 << 16,
            0,
            2,
            0, // IOVA_RANGE version 1, two ranges
            0,
            0,
            0xfedf_ffff,
            0, //
            0xfef0_0000,
            0,
            0xffff_ffff,
            0xffff,
        ];
        let info = parse_info(&description(vfio::VFIO_IOMMU_INFO_CAPS, 24, &caps));
        assert_eq!(
            info.ranges,
            Some(vec![0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff])
        );
        assert_eq!(info.mappings_left, Some(65535));
    }

    #[test]
    fn the_smallest_page_is_read_where_the_kernel_tells_it() {
        let info = parse_info(&description(vfio::VFIO_IOMMU_INFO_PGSIZES, 0, &[]));
        assert_eq!(info.page, Some(4096));
        assert_eq!(info.reach().page, 4096);
        assert_eq!(info.reach().ranges, vec![0..=u64::MAX]);
        assert_eq!(parse_info(&description(0, 0, &[])).page, None);
    }

    /// A map with no group in it and `count` pages from 1 MiB on.
    fn with_pages(machine: &Machine, count: u64) -> Type1 {
        let mut type1 = Type1 {
            container: File::open("/dev/null").unwrap(),
            sysfs: machine.sysfs(),
            groups: BTreeMap::new(),
            remembered: BTreeMap::new(),
            owed: Owed::new(Accounting::None),
        };
        let memfd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(memfd));
        file.set_len(4096).unwrap();
        for page in 0..count {
            let request = MapRequest {
                iova: Iova::new((1 << 20) + page * 4096),
                len: 4096,
                file: Arc::clone(&file),
                offset: 0,
                host: HostRange::of_file(&file, 0, 4096).unwrap(),
                same_as: (page != 0).then_some(Iova::new(1 << 20)),
            };
            assert_eq!(type1.map(&request).unwrap(), MappedBy::Model);
        }
        type1
    }

    fn card() -> DeviceAddress {
        DeviceAddress::Pci("0000:01:00.0".parse().unwrap())
    }

    #[test]
    fn with_no_group_the_limit_on_mappings_counts_what_is_remembered() {
        let machine = Machine::new();
        let mut type1 = with_pages(&machine, 3);
        assert_eq!(type1.mappings_left(), None, "the module is not loaded");
        let parameter = machine.path("sys/module/vfio_iommu_type1/parameters/dma_entry_limit");
        std::fs::create_dir_all(parameter.parent().unwrap()).unwrap();
        std::fs::write(&parameter, "4\n").unwrap();
        assert_eq!(type1.mappings_left(), Some(1));
        type1.unmap(Iova::new(1 << 20), 4096).unwrap();
        assert_eq!(type1.mappings_left(), Some(2));
        std::fs::write(&parameter, "1\n").unwrap();
        assert_eq!(type1.mappings_left(), Some(0));
    }

    #[test]
    fn more_than_the_kernel_takes_is_refused_with_the_numbers_before_it_is_put_back() {
        let machine = Machine::new();
        let type1 = with_pages(&machine, 3);
        let info = |left| Info {
            mappings_left: left,
            ..Info::default()
        };
        type1.check_count(&info(Some(3)), &card()).unwrap();
        type1.check_count(&info(None), &card()).unwrap();
        let text = type1
            .check_count(&info(Some(2)), &card())
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with(
                "device 0000:01:00.0 cannot come: the map has 3 mappings, and the kernel takes 2; let it take more, as \
                 root: echo 3 > "
            ),
            "{text}"
        );
        assert_eq!(type1.remembered.len(), 3);
    }

    #[test]
    fn what_is_remembered_must_be_reached_by_the_device_that_comes() {
        let machine = Machine::new();
        let type1 = with_pages(&machine, 3);
        let info = |last| Info {
            ranges: Some(vec![0..=last]),
            ..Info::default()
        };
        type1.admit(&info(0x10_2fff), &card()).unwrap();
        assert!(matches!(
            type1.admit(&info(0x10_1fff), &card()),
            Err(IommuError::Stranded {
                start: 0x10_2000,
                end: 0x10_2fff,
                ..
            })
        ));
    }

    #[test]
    fn where_the_same_bytes_were_is_not_remembered() {
        let type1 = with_pages(&Machine::new(), 2);
        assert!(type1.remembered.values().all(|request| request.same_as.is_none()));
    }

    #[test]
    fn without_capabilities_nothing_is_known() {
        let caps = [3, 0, 65535];
        assert_eq!(parse_info(&description(0, 24, &caps)), Info::default());
        assert_eq!(parse_info(&[]), Info::default());
    }

    #[test]
    fn a_chain_that_loops_or_leaves_the_bytes_ends() {
        let caps_flag = vfio::VFIO_IOMMU_INFO_CAPS;
        let to_itself = parse_info(&description(caps_flag, 24, &[3, 24, 7]));
        assert_eq!(to_itself.mappings_left, Some(7));
        assert_eq!(parse_info(&description(caps_flag, 5000, &[])), Info::default());
        let too_many = [1, 0, u32::MAX, 0, 0, 0, 0, 0];
        assert_eq!(
            parse_info(&description(caps_flag, 24, &too_many)),
            Info::default()
        );
    }
}
