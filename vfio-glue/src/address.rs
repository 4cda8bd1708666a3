//! Addresses as types: five kinds of plain integers that must never be mixed.
//!
//! ```text
//! FrontendAddress ──table──▶ GuestAddress ──table──▶ Iova (what the card sees)
//!                                              └────▶ HostSlice (what our CPU sees)
//! ```
//!
//! Swapping two of them is memory corruption by DMA, so there is no `From` between kinds and every sum is
//! checked. Register offsets have their own type beside the driver that uses them.
//!
//! Read with: virtio 1.2 §2.7; vhost-user, "Memory region description".

use std::fmt;

/// A guest-physical address: what the guest's driver writes into a descriptor. Untrusted.
///
/// DPDK's virtio-user announces its own 47-bit virtual addresses here, so nothing may be assumed about size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestAddress(pub u64);

/// An address in the front-end's own address space: how vhost-user names virtqueue memory. Untrusted, opaque.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddress(pub u64);

/// An address the card puts on the bus. Only a [`crate::map::MemoryMap`] makes one, from a live mapping.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(u64);

impl GuestAddress {
    /// The address `bytes` further on, or `None` past the end of the address space.
    #[inline]
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl FrontendAddress {
    /// The address `bytes` further on, or `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl Iova {
    /// Names a bus address. For the map, its back ends and the models that play a card: everyone else gets
    /// theirs from a table or a [`crate::memory::DmaBuffer`].
    #[inline]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The number a register or a descriptor takes.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on inside the same mapping.
    ///
    /// The caller has checked that the mapping goes that far; the sum wraps only if it has not.
    #[inline]
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

macro_rules! show_as_hex {
    ($($kind:ident),*) => {$(
        impl fmt::Debug for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($kind), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
show_as_hex!(GuestAddress, FrontendAddress, Iova);
