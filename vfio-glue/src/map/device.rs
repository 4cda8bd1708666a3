//! A device's place on a map: taken by attaching, given up once.

use std::sync::Arc;

use super::{MapError, MemoryMap};
use crate::iommu::DeviceAddress;
use crate::pci::PciFunction;

/// A device on a map, let in by [`MemoryMap::attach`]. Shown out when dropped; stop its DMA first.
#[derive(Debug)]
pub struct Device {
    // Declared before the seat and so dropped before it: type1 cannot let a group go while a BAR is mapped.
    function: FunctionHandle,
    seat: Seat,
}

struct FunctionHandle(Arc<dyn PciFunction>);

impl std::fmt::Debug for FunctionHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.name())
    }
}

/// A device's place on a map, given up once.
#[derive(Debug)]
struct Seat {
    map: Arc<MemoryMap>,
    address: DeviceAddress,
    taken: bool,
}

impl Device {
    pub(super) fn new(function: Arc<dyn PciFunction>, map: Arc<MemoryMap>, address: DeviceAddress) -> Self {
        let seat = Seat {
            map,
            address,
            taken: true,
        };
        Self {
            function: FunctionHandle(function),
            seat,
        }
    }

    /// The map it is on.
    pub fn map(&self) -> &Arc<MemoryMap> {
        &self.seat.map
    }

    /// Where it is.
    pub fn address(&self) -> &DeviceAddress {
        &self.seat.address
    }

    /// Registers, configuration space, interrupts and reset. Clones must go before the device does.
    pub fn function(&self) -> &Arc<dyn PciFunction> {
        &self.function.0
    }

    /// Shows the device out and says whether that went well. Its DMA has been stopped.
    ///
    /// # Errors
    ///
    /// [`MapError::Iommu`]; the device is off the map's books all the same.
    pub fn detach(self) -> Result<(), MapError> {
        let Self { function, mut seat } = self;
        drop(function);
        seat.leave()
    }
}

impl Seat {
    fn leave(&mut self) -> Result<(), MapError> {
        if std::mem::take(&mut self.taken) {
            self.map.detach(&self.address)
        } else {
            Ok(())
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            tracing::error!(device = %self.address, %error, "detach failed");
        }
    }
}
