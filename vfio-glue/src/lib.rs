//! Memory, IOMMU and device, made safe to use: everything in this project that needs `unsafe` is here.
//!
//! ```text
//! memory   guest memory as our CPU sees it: mappings, tables, ring views, DMA memory of our own
//! map      the heart: one IOVA space, its extents and its devices
//! iommu    what programs it: iommufd, type1, vfio-user, software
//! cycles   the CPU's time stamp counter, to tell what work costs
//! pci      a function held through VFIO: registers, config space, interrupts, reset
//! ```
//!
//! `unsafe` lives in `memory/{mapping,guard,virtq_memory,dma_buffer}.rs`, `pci/mmio.rs`, `cycles.rs`, `nudge.rs` and `sys.rs`
//! only.
//!
//! The short way to a device, with a map of its own:
//!
//! ```no_run
//! let device = vfio_glue::open("0000:01:00.0".parse()?)?;
//! let registers = device.function().bar(0)?;
//! println!("STATUS {:#010x}", registers.read32(0x0008));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_code)]

pub mod address;
pub mod cycles;
pub mod iommu;
pub mod map;
pub mod memory;
pub mod nudge;
pub mod pci;
mod sys;

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use iommu::{DeviceAddress, IommuChoice, MapBy};
use map::{Device, MapError, MemoryMap};
use pci::PciAddress;

/// Lets this process open as many files as its hard limit allows, and returns the limit before and now.
///
/// Each port costs descriptors for its memory, its virtqueues and its card, and the soft limit of 1024 that most
/// sessions start with is kept for programs that use select(2), which we do not. `u64::MAX` stands for no limit.
///
/// # Errors
///
/// What setrlimit(2) answers; the limit is as before then.
pub fn raise_open_files_limit() -> io::Result<(u64, u64)> {
    let limit = getrlimit(Resource::Nofile);
    let now = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, now)?;
    let number = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
    Ok((number(limit.current), number(limit.maximum)))
}

/// Opens a PCI function bound to vfio-pci, on a map of its own with whatever IOMMU back end this user can open.
///
/// Needs no privilege beyond owning the VFIO node. More memory goes in by [`Device::map`].
///
/// # Errors
///
/// [`MapError::Iommu`] says what is missing and what to type.
pub fn open(address: PciAddress) -> Result<Device, MapError> {
    let chosen = iommu::choose(IommuChoice::Auto, MapBy::Auto, &[address])?;
    tracing::info!(%address, reason = chosen.reason, "IOMMU chosen");
    MemoryMap::new(&address.to_string(), chosen.iommu).attach(&DeviceAddress::Pci(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_on_open_files_is_raised_to_the_hard_one() {
        let hard = getrlimit(Resource::Nofile).maximum;
        let (_, now) = raise_open_files_limit().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, hard);
        assert_eq!(now, hard.unwrap_or(u64::MAX));
        assert_eq!(raise_open_files_limit().unwrap(), (now, now));
    }
}
