//! The IOMMU of devices that live in other processes: each is sent the memory it may reach.
//!
//! ```text
//! map ──DMA_MAP with the file──▶ every attached device; all of it again to one that comes later
//! ```
//!
//! A device that has left holds up nobody: it is logged once and skipped. Its process drops what was mapped for
//! it when the connection ends.
//!
//! Read with: the vfio-user protocol specification, VFIO_USER_DMA_MAP and VFIO_USER_DMA_UNMAP.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{DeviceAddress, Iommu, IommuError, IommuKind, MapRequest, MappedBy};
use crate::address::Iova;
use crate::pci::PciFunction;
use crate::pci::vfio_user::{Client, VfioUserFunction};

/// What is mapped and who has been told.
#[derive(Default)]
pub struct VfioUserIommu {
    mapped: BTreeMap<u64, MapRequest>,
    devices: BTreeMap<PathBuf, Arc<Client>>,
}

impl VfioUserIommu {
    /// An address space with nothing in it and no device.
    pub fn new() -> Self {
        Self::default()
    }

    fn present(&self) -> impl Iterator<Item = &Arc<Client>> {
        self.devices.values().filter(|client| !client.is_gone())
    }
}

fn send(client: &Client, request: &MapRequest) -> io::Result<()> {
    client.dma_map(request.file.as_fd(), request.offset, request.len, request.iova)
}

fn refused(path: &Path, source: &io::Error) -> IommuError {
    IommuError::VfioUser {
        path: path.to_owned(),
        reason: source.to_string(),
    }
}

impl Iommu for VfioUserIommu {
    fn kind(&self) -> IommuKind {
        IommuKind::VfioUser
    }

    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError> {
        Ok(None)
    }

    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError> {
        let mut told: Vec<&Arc<Client>> = Vec::new();
        for client in self.present() {
            match send(client, request) {
                Ok(()) => told.push(client),
                Err(_) if client.is_gone() => {}
                Err(source) => {
                    for client in told {
                        if let Err(error) = client.dma_unmap(request.iova, request.len) {
                            tracing::error!(device = %client.path().display(), %error, "undoing DMA_MAP failed");
                        }
                    }
                    return Err(IommuError::Map {
                        call: "VFIO_USER_DMA_MAP",
                        iova: request.iova,
                        len: request.len,
                        source,
                    });
                }
            }
        }
        self.mapped.insert(request.iova.raw(), request.clone());
        Ok(MappedBy::File)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let failed = |source| IommuError::Unmap {
            call: "VFIO_USER_DMA_UNMAP",
            iova,
            len,
            source,
        };
        if self
            .mapped
            .get(&iova.raw())
            .is_none_or(|request| request.len != len)
        {
            return Err(failed(io::Error::other("no mapping has these bounds")));
        }
        for client in self.present() {
            match client.dma_unmap(iova, len) {
                Err(source) if !client.is_gone() => return Err(failed(source)),
                _ => {}
            }
        }
        self.mapped.remove(&iova.raw());
        Ok(())
    }

    fn attach(&mut self, device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError> {
        let DeviceAddress::VfioUser(path) = device else {
            return Err(IommuError::WrongKind {
                iommu: self.kind().as_str(),
                device: device.clone(),
            });
        };
        let client = Client::connect(path).map_err(|source| refused(path, &source))?;
        let function = VfioUserFunction::new(device.to_string(), Arc::clone(&client))
            .map_err(|source| refused(path, &source))?;
        for request in self.mapped.values() {
            // A refusal ends the connection, and with it what was mapped before.
            send(&client, request).map_err(|source| IommuError::Map {
                call: "VFIO_USER_DMA_MAP",
                iova: request.iova,
                len: request.len,
                source,
            })?;
        }
        self.devices.insert(path.clone(), client);
        Ok(Arc::new(function))
    }

    fn detach(&mut self, device: &DeviceAddress) -> Result<(), IommuError> {
        if let DeviceAddress::VfioUser(path) = device
            && let Some(client) = self.devices.remove(path)
        {
            client.close();
        }
        Ok(())
    }

    fn pins_now(&self) -> bool {
        false
    }
}
