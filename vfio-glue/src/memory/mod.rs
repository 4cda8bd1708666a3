//! Guest memory as our CPU sees it, and memory of our own that a card may reach.
//!
//! ```text
//! mapping.rs       a range of a file in this process; bytes copied in and out
//! guard.rs         what keeps a truncated file from killing the process
//! table.rs         one guest's view: guest-physical ──▶ IOVA and host bytes
//! virtq_memory.rs  the three areas of a split virtqueue at raw-pointer cost
//! dma_buffer.rs    memory of our own: descriptor rings and bounce slots
//! discard.rs       pages taken from a pinned file behind our back
//! ```

mod discard;
mod dma_buffer;
pub mod guard;
mod mapping;
mod region;
mod table;
mod virtq_memory;

pub(crate) use discard::has_reserved;
pub use discard::{Discarded, discarded};
pub use dma_buffer::{CardRing, Descriptor, DescriptorRing, DmaBuffer};
pub(crate) use mapping::MemoryFile;
pub use mapping::{FileError, HostRange, HostSlice};
pub use region::RegionSpec;
pub(crate) use table::refuse_overlap;
pub use table::{Footprint, Hit, HitOfLen, OverlapError, Piece, Table, TableHint};
pub use virtq_memory::{RawDescriptor, UsedElement, VirtqMemory, VirtqMemoryError, read_indirect};
