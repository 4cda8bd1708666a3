//! Memory, IOMMU and device, made safe to use: everything in this project that needs `unsafe` is here.
//!
//! ```text
//! memory   guest memory as our CPU sees it: mappings, tables, ring views, DMA memory of our own
//! map      the heart: one IOVA space, its extents and its devices
//! iommu    what programs it: iommufd, type1, vfio-user, software
//! pci      a function held through VFIO: registers, config space, interrupts, reset
//! ```
//!
//! `unsafe` lives in `memory/mapping.rs`, `memory/virtq_memory.rs`, `pci/vfio.rs` and `sys.rs` only.

pub mod address;
pub mod iommu;
pub mod map;
pub mod memory;
pub mod pci;
