//! A PCI function held through VFIO: registers, configuration space, interrupts, reset.
//!
//! ```text
//! driver (queues::nic) ──▶ dyn PciFunction ──▶ vfio.rs (kernel) | vfio_user.rs (another process)
//! ```
//!
//! Every failure is an error value and nothing here panics, in `Drop` neither. A device that has gone away
//! answers as the bus does: reads give all ones, writes vanish.
//!
//! Read with: PCI Express Base Specification §7; Linux `include/uapi/linux/vfio.h`.

mod address;
pub mod config_space;
mod mmio;
pub(crate) mod sysfs;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod vfio;
pub(crate) mod vfio_user;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};

pub use address::{PciAddress, PciAddressError};

/// Why an access to the function failed.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// Configuration space could not be read or written.
    #[error("{device}: {access} of {len} bytes of configuration space at {offset:#x} failed")]
    Config {
        /// The function's name.
        device: String,
        /// `read` or `write`.
        access: &'static str,
        /// Byte offset.
        offset: u16,
        /// How many bytes.
        len: usize,
        /// The system's answer.
        source: io::Error,
    },
    /// A BAR is missing or cannot be mapped.
    #[error("{device}: BAR {index} cannot be used: {reason}")]
    Bar {
        /// The function's name.
        device: String,
        /// Which BAR.
        index: u8,
        /// Why.
        reason: String,
    },
    /// An interrupt vector could not be connected or disconnected.
    #[error("{device}: MSI-X vector {vector} of {vectors} could not be set")]
    Interrupt {
        /// The function's name.
        device: String,
        /// The vector asked for.
        vector: u16,
        /// How many the function has.
        vectors: u16,
        /// The system's answer.
        source: io::Error,
    },
    /// What the host tells could not be connected or disconnected.
    #[error("{device}: the {event} interrupt could not be set")]
    HostEvent {
        /// The function's name.
        device: String,
        /// `request` or `error`.
        event: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The function cannot be reset.
    #[error("{device}: reset failed")]
    Reset {
        /// The function's name.
        device: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// What the host tells of a function that it has lent us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// The host wants the function back, for instance because its driver is unbound: it waits until we let go.
    Release,
    /// The bus reported an error that the function did not recover from (AER): it needs a reset.
    Error,
}

impl HostEvent {
    /// The word in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Release => "request",
            Self::Error => "error",
        }
    }

    /// The interrupt that VFIO and vfio-user tell it by, which has one number, 0.
    fn irq_index(self) -> u32 {
        match self {
            Self::Release => VFIO_PCI_REQ_IRQ_INDEX,
            Self::Error => VFIO_PCI_ERR_IRQ_INDEX,
        }
    }

    fn failed(self, device: &str) -> impl Fn(io::Error) -> PciError {
        let (device, event) = (device.to_owned(), self.as_str());
        move |source| PciError::HostEvent {
            device: device.clone(),
            event,
            source,
        }
    }
}

/// Whether there is an interrupt, from what came of asking how many there are. VFIO answers EINVAL for an index that a
/// function does not have: the error interrupt exists for PCI Express only.
fn has_irq(count: io::Result<u32>) -> io::Result<bool> {
    match count {
        Ok(count) => Ok(count > 0),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A window of 32-bit little-endian registers: a BAR.
///
/// Offsets are in bytes and multiples of 4. An offset outside the window, or a device that has gone, reads as
/// `0xffff_ffff`, and such a write is dropped: what the bus itself does.
pub trait Registers: Send + Sync {
    /// Reads one register. Waits for the device: a round trip on the bus.
    fn read32(&self, offset: u32) -> u32;

    /// Writes one register. Posted: it may land later; a read from the same device flushes it.
    /// Everything stored to memory before this call is visible to the device when the write lands.
    fn write32(&self, offset: u32, value: u32);

    /// Size of the window in bytes.
    fn len(&self) -> u32;

    /// Whether the window has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One PCI function, open for as long as this lives.
pub trait PciFunction: Send + Sync {
    /// How logs and `stats` call it, for example `0000:01:00.0`.
    fn name(&self) -> &str;

    /// Fills `bytes` from configuration space.
    ///
    /// # Errors
    ///
    /// [`PciError::Config`]; `bytes` is unspecified then.
    fn read_config(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PciError>;

    /// Writes `bytes` to configuration space.
    ///
    /// # Errors
    ///
    /// [`PciError::Config`].
    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<(), PciError>;

    /// The registers behind BAR `index`. The window stays valid while any clone of the `Arc` lives.
    ///
    /// # Errors
    ///
    /// [`PciError::Bar`] if there is no such memory BAR.
    fn bar(&self, index: u8) -> Result<Arc<dyn Registers>, PciError>;

    /// How many MSI-X vectors the function has.
    fn vectors(&self) -> u16;

    /// Connects one MSI-X vector to `event`, or disconnects it, leaving the others alone.
    ///
    /// # Errors
    ///
    /// [`PciError::Interrupt`].
    fn set_vector(&self, vector: u16, event: Option<BorrowedFd<'_>>) -> Result<(), PciError>;

    /// Has the host tell `which` by `event` from now on, or no more. Returns whether it ever will: a function without
    /// such an interrupt is none the worse.
    ///
    /// # Errors
    ///
    /// [`PciError::HostEvent`].
    fn set_host_event(&self, which: HostEvent, event: Option<BorrowedFd<'_>>) -> Result<bool, PciError>;

    /// Resets the function (FLR). Blocks until it is done, some 100 ms. All registers are at their defaults
    /// afterwards, DMA has ended, and Bus Master is as the reset left it.
    ///
    /// # Errors
    ///
    /// [`PciError::Reset`] if the function offers no reset or it failed.
    fn reset(&self) -> Result<(), PciError>;
}
