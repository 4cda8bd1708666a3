//! The kernel's VFIO and iommufd calls, each as a function that cannot be misused.
//!
//! ```text
//! iommu/iommufd.rs, iommu/type1.rs, pci/vfio.rs ──▶ here ──▶ ioctl(2)
//! ```
//!
//! Structures come from `vfio-bindings` and `iommufd-bindings`, numbers from the macros of `vmm-sys-util`. No
//! policy lives here: what the kernel answers goes up as it came.
//!
//! Read with: Linux `include/uapi/linux/vfio.h`, `include/uapi/linux/iommufd.h`.

#![expect(unsafe_code, reason = "ioctl takes a pointer the compiler cannot check")]

use std::ffi::CString;
use std::io;
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::raw::{c_int, c_long, c_ulong};
use std::ptr;

use iommufd_bindings as iommufd;
use vfio_bindings::bindings::vfio;
use vmm_sys_util::ioctl_io_nr;

use crate::address::Iova;

const VFIO: u32 = vfio::VFIO_TYPE as u32;
const IOMMUFD: u32 = iommufd::IOMMUFD_TYPE as u32;

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO, vfio::VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO, vfio::VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO, vfio::VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO, vfio::VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO, vfio::VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_UNSET_CONTAINER, VFIO, vfio::VFIO_BASE + 5);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO, vfio::VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO, vfio::VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO, vfio::VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO, vfio::VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO, vfio::VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO, vfio::VFIO_BASE + 11);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO, vfio::VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO, vfio::VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO, vfio::VFIO_BASE + 14);
ioctl_io_nr!(VFIO_DEVICE_BIND_IOMMUFD, VFIO, vfio::VFIO_BASE + 18);
ioctl_io_nr!(VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO, vfio::VFIO_BASE + 19);
ioctl_io_nr!(VFIO_DEVICE_DETACH_IOMMUFD_PT, VFIO, vfio::VFIO_BASE + 20);

ioctl_io_nr!(IOMMU_IOAS_ALLOC, IOMMUFD, iommufd::IOMMUFD_CMD_IOAS_ALLOC);
ioctl_io_nr!(
    IOMMU_IOAS_IOVA_RANGES,
    IOMMUFD,
    iommufd::IOMMUFD_CMD_IOAS_IOVA_RANGES
);
ioctl_io_nr!(IOMMU_IOAS_MAP, IOMMUFD, iommufd::IOMMUFD_CMD_IOAS_MAP);
ioctl_io_nr!(IOMMU_IOAS_MAP_FILE, IOMMUFD, iommufd::IOMMUFD_CMD_IOAS_MAP_FILE);
ioctl_io_nr!(IOMMU_DESTROY, IOMMUFD, iommufd::IOMMUFD_CMD_DESTROY);
ioctl_io_nr!(IOMMU_IOAS_COPY, IOMMUFD, iommufd::IOMMUFD_CMD_IOAS_COPY);
ioctl_io_nr!(IOMMU_IOAS_UNMAP, IOMMUFD, iommufd::IOMMUFD_CMD_IOAS_UNMAP);

/// The size of a kernel structure, for the field that tells the kernel.
const fn size_of_u32<T>() -> u32 {
    let size = size_of::<T>();
    assert!(size < 4096);
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let size = size as u32;
    size
}

/// Calls `request` with a number or nothing as its argument.
///
/// # Safety
///
/// The kernel must take the argument of `request` as a plain number.
unsafe fn call_with_number(fd: impl AsFd, request: c_ulong, number: c_ulong) -> io::Result<c_int> {
    // SAFETY: the descriptor is open for as long as it is borrowed, and the kernel reads no memory of ours, which
    // the caller promises.
    answer(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, number) })
}

/// Calls `request` with a structure the kernel reads and writes.
///
/// # Safety
///
/// The kernel must touch no more than a `T` at the argument of `request`, leave a valid `T` there, and every
/// address inside it must be good for what the call does with it.
unsafe fn call<T>(fd: impl AsFd, request: c_ulong, argument: &mut T) -> io::Result<c_int> {
    // SAFETY: the descriptor is open for as long as it is borrowed, the pointer is to a `T` of ours alone, and the
    // kernel stays inside it, which the caller promises.
    answer(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, ptr::from_mut(argument)) })
}

/// Calls `request` with a structure that ends in an array, laid out in `words`.
///
/// # Safety
///
/// As for [`call`]; the kernel takes the length from a field inside, which must not exceed that of `words`.
unsafe fn call_with_words<T>(fd: impl AsFd, request: c_ulong, words: &mut [T]) -> io::Result<c_int> {
    // SAFETY: as for `call`, for the whole slice.
    answer(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, words.as_mut_ptr()) })
}

fn answer(returned: c_int) -> io::Result<c_int> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(returned)
    }
}

/// A fresh descriptor out of an ioctl's answer.
fn owned(fd: c_int) -> OwnedFd {
    // SAFETY: called only with what GROUP_GET_DEVICE_FD just made, which nobody else has seen.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Whether two descriptors of this process are one open file, or an error where kcmp(2) is not to be had.
pub(crate) fn is_one_open_file(a: impl AsFd, b: impl AsFd) -> io::Result<bool> {
    // Linux `include/uapi/linux/kcmp.h`.
    const KCMP_FILE: c_long = 0;
    let process = c_long::from(rustix::process::getpid().as_raw_pid());
    let [a, b] = [a.as_fd(), b.as_fd()].map(|fd| c_long::from(fd.as_raw_fd()));
    // SAFETY: kcmp(2) takes numbers only, and both descriptors are open for as long as they are borrowed.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, process, process, KCMP_FILE, a, b) };
    if order < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(order == 0)
}

// iommufd ---------------------------------------------------------------------------------------------------

/// Makes an IOAS and returns its id.
pub(crate) fn ioas_alloc(iommufd: impl AsFd) -> io::Result<u32> {
    let mut alloc = iommufd::iommu_ioas_alloc {
        size: size_of_u32::<iommufd::iommu_ioas_alloc>(),
        ..Default::default()
    };
    // SAFETY: IOAS_ALLOC takes this structure, which holds no address.
    unsafe { call(iommufd, IOMMU_IOAS_ALLOC(), &mut alloc) }?;
    Ok(alloc.out_ioas_id)
}

/// Destroys an IOAS nobody is on.
pub(crate) fn ioas_destroy(iommufd: impl AsFd, ioas: u32) -> io::Result<()> {
    let mut destroy = iommufd::iommu_destroy {
        size: size_of_u32::<iommufd::iommu_destroy>(),
        id: ioas,
    };
    // SAFETY: DESTROY takes this structure, which holds no address.
    unsafe { call(iommufd, IOMMU_DESTROY(), &mut destroy) }?;
    Ok(())
}

/// The ranges of IOVA the IOAS takes now, sorted, and what their ends must be multiples of, in bytes.
pub(crate) fn ioas_iova_ranges(iommufd: impl AsFd, ioas: u32) -> io::Result<(Vec<RangeInclusive<u64>>, u64)> {
    let fd = iommufd.as_fd();
    let mut ranges: Vec<iommufd::iommu_iova_range> = Vec::new();
    // The kernel says how many there are when the array is too short. A device that attaches meanwhile may add
    // some, hence the second and third try.
    for _ in 0..3 {
        let mut query = iommufd::iommu_ioas_iova_ranges {
            size: size_of_u32::<iommufd::iommu_ioas_iova_ranges>(),
            ioas_id: ioas,
            num_iovas: u32::try_from(ranges.len()).map_err(io::Error::other)?,
            allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        // SAFETY: IOAS_IOVA_RANGES takes this structure and writes at most `num_iovas` ranges at
        // `allowed_iovas`, which is that many long and ours alone.
        let asked = unsafe { call(fd, IOMMU_IOAS_IOVA_RANGES(), &mut query) };
        let count = usize::try_from(query.num_iovas).map_err(io::Error::other)?;
        match asked {
            Ok(_) if count <= ranges.len() => {
                ranges.truncate(count);
                let ranges = ranges.iter().map(|range| range.start..=range.last).collect();
                return Ok((ranges, query.out_iova_alignment));
            }
            Err(error) if error.raw_os_error() != Some(libc::EMSGSIZE) => return Err(error),
            _ => ranges.resize(count, iommufd::iommu_iova_range::default()),
        }
    }
    Err(io::Error::other("the number of IOVA ranges keeps growing"))
}

const IOAS_MAP_FLAGS: u32 = iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
    | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
    | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;

/// Maps `len` bytes of `file` from `offset` on, readable and writable at `iova`. Linux 6.13 and newer.
pub(crate) fn ioas_map_file(
    iommufd: impl AsFd,
    ioas: u32,
    file: BorrowedFd<'_>,
    offset: u64,
    len: u64,
    iova: Iova,
) -> io::Result<()> {
    map_file(iommufd, ioas, file.as_raw_fd(), offset, len, iova)
}

/// Whether this kernel has IOAS_MAP_FILE at all.
pub(crate) fn has_ioas_map_file(iommufd: impl AsFd, ioas: u32) -> bool {
    const NO_FILE: c_int = -1;
    // A kernel that knows the call finds no file behind -1; one that does not never looks.
    let refused = map_file(iommufd, ioas, NO_FILE, 0, 4096, Iova::new(1 << 20));
    !refused.is_err_and(|error| matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP)))
}

fn map_file(iommufd: impl AsFd, ioas: u32, file: c_int, offset: u64, len: u64, iova: Iova) -> io::Result<()> {
    let mut map = iommufd::iommu_ioas_map_file {
        size: size_of_u32::<iommufd::iommu_ioas_map_file>(),
        flags: IOAS_MAP_FLAGS,
        ioas_id: ioas,
        fd: file,
        start: offset,
        length: len,
        iova: iova.raw(),
    };
    // SAFETY: IOAS_MAP_FILE takes this structure. It names memory by a file, not by an address, so what devices
    // write is never memory Rust knows.
    unsafe { call(iommufd, IOMMU_IOAS_MAP_FILE(), &mut map) }?;
    Ok(())
}

/// Maps the memory at `address` in this process, readable and writable at `iova`.
pub(crate) fn ioas_map(
    iommufd: impl AsFd,
    ioas: u32,
    host: &crate::memory::HostRange,
    iova: Iova,
) -> io::Result<()> {
    let mut map = iommufd::iommu_ioas_map {
        size: size_of_u32::<iommufd::iommu_ioas_map>(),
        flags: IOAS_MAP_FLAGS,
        ioas_id: ioas,
        user_va: host.address(),
        length: host.len() as u64,
        iova: iova.raw(),
        ..Default::default()
    };
    // SAFETY: IOAS_MAP takes this structure. Devices may write the range from now on; it is a live `HostRange`,
    // which the guest writes at any time anyway and to which no Rust reference exists.
    unsafe { call(iommufd, IOMMU_IOAS_MAP(), &mut map) }?;
    Ok(())
}

/// Maps `len` bytes that are mapped at `from` already, inside one mapping, at `to` as well. They stay pinned once.
pub(crate) fn ioas_copy(iommufd: impl AsFd, ioas: u32, from: Iova, to: Iova, len: u64) -> io::Result<()> {
    let mut copy = iommufd::iommu_ioas_copy {
        size: size_of_u32::<iommufd::iommu_ioas_copy>(),
        flags: IOAS_MAP_FLAGS,
        dst_ioas_id: ioas,
        src_ioas_id: ioas,
        length: len,
        dst_iova: to.raw(),
        src_iova: from.raw(),
    };
    // SAFETY: IOAS_COPY takes this structure. It names memory by where devices reach it already.
    unsafe { call(iommufd, IOMMU_IOAS_COPY(), &mut copy) }?;
    Ok(())
}

/// Unmaps whole mappings inside the range and returns how many bytes they held.
pub(crate) fn ioas_unmap(iommufd: impl AsFd, ioas: u32, iova: Iova, len: u64) -> io::Result<u64> {
    let mut unmap = iommufd::iommu_ioas_unmap {
        size: size_of_u32::<iommufd::iommu_ioas_unmap>(),
        ioas_id: ioas,
        iova: iova.raw(),
        length: len,
    };
    // SAFETY: IOAS_UNMAP takes this structure, which holds no address of ours.
    unsafe { call(iommufd, IOMMU_IOAS_UNMAP(), &mut unmap) }?;
    Ok(unmap.length)
}

/// Hands a device of the VFIO character node to an iommufd: the first call it takes.
pub(crate) fn bind_iommufd(device: impl AsFd, iommufd: impl AsFd) -> io::Result<()> {
    let mut bind = vfio::vfio_device_bind_iommufd {
        // As of the first kernels with this call: the field after it came later.
        argsz: u32::try_from(offset_of!(vfio::vfio_device_bind_iommufd, token_uuid_ptr))
            .map_err(io::Error::other)?,
        iommufd: iommufd.as_fd().as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: DEVICE_BIND_IOMMUFD takes this structure; its only address is null and not announced.
    unsafe { call(device, VFIO_DEVICE_BIND_IOMMUFD(), &mut bind) }?;
    Ok(())
}

/// Puts a bound device on an IOAS.
pub(crate) fn attach_ioas(device: impl AsFd, ioas: u32) -> io::Result<()> {
    let mut attach = vfio::vfio_device_attach_iommufd_pt {
        argsz: size_of_u32::<vfio::vfio_device_attach_iommufd_pt>(),
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: DEVICE_ATTACH_IOMMUFD_PT takes this structure, which holds no address.
    unsafe { call(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT(), &mut attach) }?;
    Ok(())
}

/// Takes a bound device off its IOAS: no DMA of it passes afterwards.
pub(crate) fn detach_ioas(device: impl AsFd) -> io::Result<()> {
    let mut detach = vfio::vfio_device_detach_iommufd_pt {
        argsz: size_of_u32::<vfio::vfio_device_detach_iommufd_pt>(),
        ..Default::default()
    };
    // SAFETY: DEVICE_DETACH_IOMMUFD_PT takes this structure, which holds no address.
    unsafe { call(device, VFIO_DEVICE_DETACH_IOMMUFD_PT(), &mut detach) }?;
    Ok(())
}

// type1: container and group --------------------------------------------------------------------------------

/// Whether the container speaks the only version of the interface there is, and has the type1v2 IOMMU.
pub(crate) fn container_has_type1v2(container: impl AsFd) -> io::Result<bool> {
    let fd = container.as_fd();
    // SAFETY: GET_API_VERSION takes no argument.
    let version = unsafe { call_with_number(fd, VFIO_GET_API_VERSION(), 0) }?;
    // SAFETY: CHECK_EXTENSION takes a number.
    let has = unsafe { call_with_number(fd, VFIO_CHECK_EXTENSION(), vfio::VFIO_TYPE1v2_IOMMU.into()) }?;
    Ok(u32::try_from(version) == Ok(vfio::VFIO_API_VERSION) && has > 0)
}

/// Makes a container with a group in it a type1v2 one.
pub(crate) fn set_iommu_type1v2(container: impl AsFd) -> io::Result<()> {
    // SAFETY: SET_IOMMU takes a number.
    unsafe { call_with_number(container, VFIO_SET_IOMMU(), vfio::VFIO_TYPE1v2_IOMMU.into()) }?;
    Ok(())
}

/// Whether every device of the group is VFIO's or has no driver.
pub(crate) fn group_is_viable(group: impl AsFd) -> io::Result<bool> {
    let mut status = vfio::vfio_group_status {
        argsz: size_of_u32::<vfio::vfio_group_status>(),
        ..Default::default()
    };
    // SAFETY: GROUP_GET_STATUS takes this structure, which holds no address.
    unsafe { call(group, VFIO_GROUP_GET_STATUS(), &mut status) }?;
    Ok(status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE != 0)
}

/// Puts a group into a container.
pub(crate) fn group_set_container(group: impl AsFd, container: impl AsFd) -> io::Result<()> {
    let mut fd = container.as_fd().as_raw_fd();
    // SAFETY: GROUP_SET_CONTAINER reads one `int`.
    unsafe { call(group, VFIO_GROUP_SET_CONTAINER(), &mut fd) }?;
    Ok(())
}

/// Takes a group out of its container. The last one takes the container's mappings with it.
pub(crate) fn group_unset_container(group: impl AsFd) -> io::Result<()> {
    // SAFETY: GROUP_UNSET_CONTAINER takes no argument.
    unsafe { call_with_number(group, VFIO_GROUP_UNSET_CONTAINER(), 0) }?;
    Ok(())
}

/// Opens the device called `name` of a group that is in a container.
pub(crate) fn group_device(group: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let request = VFIO_GROUP_GET_DEVICE_FD();
    // SAFETY: GROUP_GET_DEVICE_FD reads a string up to its null, which `name` ends in.
    let fd = answer(unsafe { libc::ioctl(group.as_fd().as_raw_fd(), request, name.as_ptr()) })?;
    Ok(owned(fd))
}

/// What a type1 container tells about itself: `struct vfio_iommu_type1_info` with the capabilities behind it.
pub(crate) fn type1_info(container: impl AsFd) -> io::Result<Vec<u8>> {
    const WORD: usize = size_of::<u64>();
    const LARGEST: usize = 1 << 20;
    let fd = container.as_fd();
    let mut bytes = size_of::<vfio::vfio_iommu_type1_info>();
    for _ in 0..3 {
        let mut words = vec![0_u64; bytes.div_ceil(WORD)];
        let argsz = u32::try_from(words.len() * WORD).map_err(io::Error::other)?;
        // `argsz` is the first field and `flags`, which stays 0, the second.
        let [a, b, c, d] = argsz.to_ne_bytes();
        words[0] = u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0]);
        // SAFETY: IOMMU_GET_INFO writes at most `argsz` bytes, the length of `words`.
        unsafe { call_with_words(fd, VFIO_IOMMU_GET_INFO(), &mut words) }?;
        let info: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let needs = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        let needs = usize::try_from(needs).map_err(io::Error::other)?;
        if needs <= info.len() {
            return Ok(info);
        }
        bytes = needs.min(LARGEST);
    }
    Err(io::Error::other("the IOMMU's description keeps growing"))
}

/// Maps the memory of `host`, readable and writable at `iova`, for every group of the container.
pub(crate) fn type1_map(container: impl AsFd, host: &crate::memory::HostRange, iova: Iova) -> io::Result<()> {
    let mut map = vfio::vfio_iommu_type1_dma_map {
        argsz: size_of_u32::<vfio::vfio_iommu_type1_dma_map>(),
        flags: vfio::VFIO_DMA_MAP_FLAG_READ | vfio::VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: host.address(),
        iova: iova.raw(),
        size: host.len() as u64,
    };
    // SAFETY: IOMMU_MAP_DMA takes this structure. Devices may write the range from now on; it is a live
    // `HostRange`, which the guest writes at any time anyway and to which no Rust reference exists.
    unsafe { call(container, VFIO_IOMMU_MAP_DMA(), &mut map) }?;
    Ok(())
}

/// Unmaps whole mappings inside the range and returns how many bytes they held.
pub(crate) fn type1_unmap(container: impl AsFd, iova: Iova, len: u64) -> io::Result<u64> {
    let mut unmap = vfio::vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<vfio::vfio_iommu_type1_dma_unmap>(),
        iova: iova.raw(),
        size: len,
        ..Default::default()
    };
    // SAFETY: IOMMU_UNMAP_DMA takes this structure; without flags nothing follows it.
    unsafe { call(container, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) }?;
    Ok(unmap.size)
}

// A device, however it was opened ---------------------------------------------------------------------------

/// What `VFIO_DEVICE_GET_INFO` tells.
pub(crate) fn device_info(device: impl AsFd) -> io::Result<vfio::vfio_device_info> {
    let mut info = vfio::vfio_device_info {
        argsz: size_of_u32::<vfio::vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: DEVICE_GET_INFO takes this structure and writes no more than `argsz` bytes.
    unsafe { call(device, VFIO_DEVICE_GET_INFO(), &mut info) }?;
    Ok(info)
}

/// Where a region lies in the device's file, how long it is and what it allows.
pub(crate) fn region_info(device: impl AsFd, index: u32) -> io::Result<vfio::vfio_region_info> {
    let mut info = vfio::vfio_region_info {
        argsz: size_of_u32::<vfio::vfio_region_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: DEVICE_GET_REGION_INFO takes this structure and writes no more than `argsz` bytes.
    unsafe { call(device, VFIO_DEVICE_GET_REGION_INFO(), &mut info) }?;
    Ok(info)
}

/// How many interrupts an index has.
pub(crate) fn irq_count(device: impl AsFd, index: u32) -> io::Result<u32> {
    let mut info = vfio::vfio_irq_info {
        argsz: size_of_u32::<vfio::vfio_irq_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: DEVICE_GET_IRQ_INFO takes this structure, which holds no address.
    unsafe { call(device, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) }?;
    Ok(info.count)
}

/// Connects the interrupts from `start` on to one eventfd each; `None` disconnects.
pub(crate) fn set_irqs(
    device: impl AsFd,
    index: u32,
    start: u32,
    events: &[Option<BorrowedFd<'_>>],
) -> io::Result<()> {
    const DISCONNECTED: c_int = -1;
    let flags = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
    let count = u32::try_from(events.len()).map_err(io::Error::other)?;
    let mut words = vec![0, flags, index, start, count];
    let fds = events
        .iter()
        .map(|event| event.map_or(DISCONNECTED, |fd| fd.as_raw_fd()).cast_unsigned());
    words.extend(fds);
    words[0] = u32::try_from(words.len() * size_of::<u32>()).map_err(io::Error::other)?;
    // SAFETY: DEVICE_SET_IRQS reads `struct vfio_irq_set`, five words, then `count` descriptors: `argsz` bytes,
    // the length of `words`. It holds no address.
    unsafe { call_with_words(device, VFIO_DEVICE_SET_IRQS(), &mut words) }?;
    Ok(())
}

/// Resets the function. Blocks until it is done.
pub(crate) fn reset(device: impl AsFd) -> io::Result<()> {
    // SAFETY: DEVICE_RESET takes no argument.
    unsafe { call_with_number(device, VFIO_DEVICE_RESET(), 0) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel_headers() {
        // _IO(';', 100 + 13) and _IO(';', 0x8f).
        assert_eq!(VFIO_IOMMU_MAP_DMA(), 0x3b71);
        assert_eq!(IOMMU_IOAS_MAP_FILE(), 0x3b8f);
        assert_eq!(IOMMU_IOAS_COPY(), 0x3b83);
        assert_eq!(IOMMU_DESTROY(), 0x3b80);
        assert_eq!(VFIO_DEVICE_BIND_IOMMUFD(), 0x3b76);
    }

    #[test]
    fn a_file_that_is_no_device_answers_with_the_kernels_error() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = ioas_alloc(&null).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        assert!(!has_ioas_map_file(&null, 1));
    }
}
