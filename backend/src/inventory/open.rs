//! What maps and ports are made of: an IOMMU for a map, a device for a port.

use std::sync::Arc;

use config::{DeviceSpec, IommuChoice, MapBy, MapConfig, ModelSpec, PortConfig};
use queues::clock::SystemClock;
use queues::nic::igb::{Igb, IgbSetup, RssKey};
use queues::nic::model::{ModelCard, ModelSetup, Payload};
use queues::nic::tap::Tap;
use queues::nic::{Nic, NicError};
use vfio_glue::iommu::software::SoftwareIommu;
use vfio_glue::iommu::{self, DeviceAddress, Iommu, IommuKind, VfioUserIommu, choose};
use vfio_glue::map::{Device, MemoryMap};
use vfio_glue::pci::PciAddress;

use super::error::{InventoryError, OpenError};

/// The IOMMU for a map on which `cards` are to be, and why it is this one.
pub(super) fn open_iommu(
    map: &MapConfig,
    cards: &[PciAddress],
) -> Result<(Box<dyn Iommu>, String), InventoryError> {
    let choice = match map.iommu {
        IommuChoice::None => {
            return Ok((Box::new(SoftwareIommu), "its devices are software".to_owned()));
        }
        IommuChoice::VfioUser => {
            let reason = "its devices are served by other processes".to_owned();
            return Ok((Box::new(VfioUserIommu::new()), reason));
        }
        IommuChoice::Auto => iommu::IommuChoice::Auto,
        IommuChoice::Iommufd => iommu::IommuChoice::Iommufd,
        IommuChoice::Type1 => iommu::IommuChoice::Type1,
    };
    let chosen = choose(choice, map_by(map.map_by), cards);
    let chosen = chosen.map_err(|source| InventoryError::MakeMap {
        map: map.name.clone(),
        source: Box::new(source),
    })?;
    Ok((chosen.iommu, chosen.reason))
}

/// A device for a port as it is configured, on the map of its guest's memory. Blocks until it is up.
pub(super) fn open_device(
    port: &PortConfig,
    device: &DeviceSpec,
    map: &Arc<MemoryMap>,
) -> Result<Box<dyn Nic>, InventoryError> {
    let wanted = match (device, map.kind()) {
        (DeviceSpec::Pci(_), IommuKind::None | IommuKind::VfioUser) => Some("iommufd or type1"),
        (DeviceSpec::VfioUser(_), IommuKind::None | IommuKind::Iommufd | IommuKind::Type1) => {
            Some("vfio-user")
        }
        (DeviceSpec::Model(_), IommuKind::Iommufd | IommuKind::Type1 | IommuKind::VfioUser) => Some("none"),
        _ => None,
    };
    if let Some(wanted) = wanted {
        return Err(InventoryError::WrongMap {
            map: map.name().to_owned(),
            iommu: map.kind(),
            device: device.clone(),
            wanted,
        });
    }
    let opened: Result<Box<dyn Nic>, OpenError> = match device {
        DeviceSpec::Tap(name) => Tap::open(name, port.mtu, map)
            .map(|tap| Box::new(tap) as Box<dyn Nic>)
            .map_err(OpenError::from),
        DeviceSpec::Pci(address) => map
            .attach(&DeviceAddress::Pci(pci_address(*address)))
            .map_err(OpenError::from)
            .and_then(|card| open_card(card, port)),
        DeviceSpec::VfioUser(path) => map
            .attach(&DeviceAddress::VfioUser(path.clone()))
            .map_err(OpenError::from)
            .and_then(|card| open_card(card, port)),
        DeviceSpec::Model(model) => open_model(map, device, *model).and_then(|card| open_card(card, port)),
    };
    let fits = opened.and_then(|nic| {
        let (pairs, wanted) = (nic.queue_pairs(), port.queue_pairs);
        if pairs == wanted {
            return Ok(nic);
        }
        let device = nic.name();
        Err(NicError::TooFewPairs {
            device,
            pairs,
            wanted,
        }
        .into())
    });
    fits.map_err(|source| InventoryError::Open {
        port: port.name.clone(),
        device: device.clone(),
        source: Box::new(source),
    })
}

fn open_model(map: &Arc<MemoryMap>, device: &DeviceSpec, model: ModelSpec) -> Result<Device, OpenError> {
    let name = device.to_string();
    let setup = ModelSetup {
        rx_bytes: model.rx_bytes,
        payload: if model.copies {
            Payload::Copied
        } else {
            Payload::Untouched
        },
    };
    let card = ModelCard::new(&name, setup, map.software_bus()).map_err(OpenError::ModelThread)?;
    tracing::warn!(device = name, "a bench device: no frame leaves this machine");
    Ok(map.attach_software(&name, Arc::new(card))?)
}

fn open_card(device: Device, port: &PortConfig) -> Result<Box<dyn Nic>, OpenError> {
    let setup = IgbSetup {
        mtu: port.mtu,
        queue_pairs: port.queue_pairs,
        rss_key: match port.rss_key {
            Some(config::RssKey(key)) => RssKey(key),
            None => RssKey::random().map_err(OpenError::RssKey)?,
        },
    };
    let clock = Arc::new(SystemClock::default());
    Ok(Box::new(Igb::open(device, setup, clock)?))
}

/// The address as the crate that opens it has it.
pub fn pci_address(address: config::PciAddress) -> PciAddress {
    let config::PciAddress {
        domain,
        bus,
        device,
        function,
    } = address;
    PciAddress {
        domain,
        bus,
        device,
        function,
    }
}

fn map_by(map_by: MapBy) -> iommu::MapBy {
    match map_by {
        MapBy::Auto => iommu::MapBy::Auto,
        MapBy::File => iommu::MapBy::File,
        MapBy::Address => iommu::MapBy::Address,
    }
}
