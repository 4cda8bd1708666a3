//! Functions for tests of what is not about functions.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{HostEvent, PciError, PciFunction, Registers};

/// A function with nothing in it: attaching is all that matters here.
pub(crate) struct Nothing;

impl PciFunction for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }

    fn read_config(&self, _offset: u16, bytes: &mut [u8]) -> Result<(), PciError> {
        bytes.fill(0xff);
        Ok(())
    }

    fn write_config(&self, _offset: u16, _bytes: &[u8]) -> Result<(), PciError> {
        Ok(())
    }

    fn bar(&self, index: u8) -> Result<Arc<dyn Registers>, PciError> {
        Err(PciError::Bar {
            device: self.name().to_owned(),
            index,
            reason: "it has none".to_owned(),
        })
    }

    fn vectors(&self) -> u16 {
        0
    }

    fn set_vector(&self, _vector: u16, _event: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        Ok(())
    }

    fn set_host_event(&self, _which: HostEvent, _event: Option<BorrowedFd<'_>>) -> Result<bool, PciError> {
        Ok(false)
    }

    fn reset(&self) -> Result<(), PciError> {
        Ok(())
    }
}
