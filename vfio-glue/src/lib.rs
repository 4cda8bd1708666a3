//! Memory, IOMMU and device, made safe to use: everything in this project that needs `unsafe` is here.
//!
//! ```text
//! memory   guest memory as our CPU sees it: mappings, tables, ring views, DMA memory of our own
//! map      the heart: one IOVA space, its extents and its devices
//! iommu    what programs it: iommufd, type1, vfio-user, software
//! pci      a function held through VFIO: registers, config space, interrupts, reset
//! ```
//!
//! `unsafe` lives in `memory/{mapping,guard,virtq_memory,dma_buffer}.rs`, `pci/mmio.rs` and `sys.rs` only.
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
pub mod iommu;
pub mod map;
pub mod memory;
pub mod pci;
mod sys;

use iommu::{DeviceAddress, IommuChoice, MapBy};
use map::{Device, MapError, MemoryMap};
use pci::PciAddress;

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
