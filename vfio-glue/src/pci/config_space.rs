//! The few fields of configuration space a driver needs: identity, Bus Master, capabilities.
//!
//! Read with: PCI Local Bus Specification 3.0 §6.1 and §6.7.

use super::{PciError, PciFunction};

const VENDOR_ID: u16 = 0x00;
const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;

/// Who made the function and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor, 8086 for Intel.
    pub vendor: u16,
    /// Device, for example 10c9 for an 82576.
    pub device: u16,
}

/// Reads vendor and device.
///
/// # Errors
///
/// [`PciError::Config`].
pub fn identity(function: &dyn PciFunction) -> Result<Identity, PciError> {
    let mut bytes = [0; 4];
    function.read_config(VENDOR_ID, &mut bytes)?;
    let [v0, v1, d0, d1] = bytes;
    Ok(Identity {
        vendor: u16::from_le_bytes([v0, v1]),
        device: u16::from_le_bytes([d0, d1]),
    })
}

/// Whether a function may start DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusMaster {
    /// It may read and write memory, and send MSI-X messages.
    On,
    /// It may not.
    Off,
}

/// Switches DMA on or off at the function, and memory decoding on in both cases.
///
/// vfio-pci hands a function over with Bus Master off.
///
/// # Errors
///
/// [`PciError::Config`].
pub fn set_bus_master(function: &dyn PciFunction, to: BusMaster) -> Result<(), PciError> {
    let mut bytes = [0; 2];
    function.read_config(COMMAND, &mut bytes)?;
    let command = u16::from_le_bytes(bytes) | COMMAND_MEMORY;
    let command = match to {
        BusMaster::On => command | COMMAND_BUS_MASTER,
        BusMaster::Off => command & !COMMAND_BUS_MASTER,
    };
    function.write_config(COMMAND, &command.to_le_bytes())
}
