//! One region of guest memory as a front-end announces it.
//!
//! A region says "these guest-physical addresses are these bytes of that file". The map covers them with extents
//! (see [`crate::map::Extent`]), and a [`Table`](super::Table) shows where each byte came to lie.
//!
//! Read with: vhost-user, "Memory region description".

use std::fs::File;
use std::sync::Arc;

use crate::address::{FrontendAddress, GuestAddress};

/// A region as announced. Untrusted: [`crate::map::MemoryMap::change`] checks it.
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
