//! One region of guest memory as a front-end announces it, and the extents that stand behind it.
//!
//! A region says "these guest-physical addresses are these bytes of that file". The map cuts it at the grid of
//! file offsets into extents (see [`crate::map::Extent`]); a piece is the part of an extent the region shows.
//!
//! Read with: vhost-user, "Memory region description".

use std::fs::File;
use std::sync::Arc;

use super::HostRange;
use crate::address::{FrontendAddress, GuestAddress, Iova};
use crate::map::Extent;

/// A region as announced. Untrusted: [`crate::map::MemoryMap::add_region`] checks it.
#[derive(Clone, Debug)]
pub struct RegionSpec {
    /// Where the guest sees the first byte.
    pub guest: GuestAddress,
    /// Where the front-end sees it: the key for virtqueue addresses.
    pub frontend: FrontendAddress,
    /// Length in bytes.
    pub len: u64,
    /// The memory, shared with the front-end.
    pub file: Arc<File>,
    /// Where the region starts in `file`, in bytes.
    pub file_offset: u64,
}

/// A region whose bytes are mapped. Made and taken back by the map.
#[derive(Debug)]
pub struct Region {
    pub(crate) spec: RegionSpec,
    pub(crate) pieces: Vec<RegionPiece>,
}

/// The part of one extent that a region shows.
#[derive(Clone, Debug)]
pub(crate) struct RegionPiece {
    pub(crate) extent: Arc<Extent>,
    /// Where the card finds the first byte.
    pub(crate) iova: Iova,
    /// Where we find them.
    pub(crate) host: HostRange,
}

impl Region {
    /// What the front-end announced.
    pub fn spec(&self) -> &RegionSpec {
        &self.spec
    }
}
