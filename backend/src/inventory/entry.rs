//! What is listed of a map and of a port, and whether that is what was asked for.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use config::{DeviceSpec, IommuChoice, MapBy, MapConfig, Order, PortConfig, SocketSpec, same_path};
use vfio_glue::map::MemoryMap;
use vfio_glue::pci::HostEvent;

use super::Outcome;
use super::error::InventoryError;
use crate::port::Port;
use crate::signals::Stop;

/// A map.
#[derive(Clone, Debug)]
pub(super) struct MapEntry {
    pub(super) config: MapConfig,
    pub(super) map: Arc<MemoryMap>,
}

/// What one device of a port can tell.
#[derive(Debug)]
pub struct DeviceEvents {
    /// The port that has, or had, the device.
    pub(crate) port: Arc<Port>,
    pub(crate) link: Option<OwnedFd>,
    pub(crate) host: [(HostEvent, Option<OwnedFd>); 2],
}

impl DeviceEvents {
    /// Those of the device a port has now.
    pub fn of(port: &Arc<Port>) -> Self {
        let host = [HostEvent::Release, HostEvent::Error].map(|which| (which, port.host_event(which)));
        Self {
            link: port.link_event(),
            host,
            port: Arc::clone(port),
        }
    }
}

/// A port, and what is needed to end it.
#[derive(Debug)]
pub(super) struct PortEntry {
    /// As it was asked for; which device it has now stands in `device`.
    pub(super) config: PortConfig,
    pub(super) port: Arc<Port>,
    /// The place in the list of its first pair's worker.
    pub(super) worker: usize,
    pub(super) device: Option<Attached>,
    pub(super) stop: Stop,
    pub(super) thread: Option<JoinHandle<()>>,
    /// No front-end can come any more, and nobody asked for that.
    pub(super) ended: bool,
}

/// A port's device.
#[derive(Clone, Debug)]
pub(super) struct Attached {
    pub(super) spec: DeviceSpec,
    pub(super) events: Arc<DeviceEvents>,
}

impl Attached {
    /// As the port has it now.
    pub(super) fn of(device: &DeviceSpec, port: &Arc<Port>) -> Self {
        Self {
            spec: device.clone(),
            events: Arc::new(DeviceEvents::of(port)),
        }
    }
}

impl MapEntry {
    /// Whether this is what is wanted, where nothing is wanted by `auto`.
    pub(super) fn compare(&self, wanted: &MapConfig) -> Result<Outcome, InventoryError> {
        let name = &self.config.name;
        let differs = |key, is: &str, wanted: &str| {
            Err(InventoryError::MapIs {
                map: name.clone(),
                key,
                is: is.to_owned(),
                wanted: wanted.to_owned(),
            })
        };
        let (is, iommu) = (self.map.kind().as_str(), wanted.iommu);
        if iommu != IommuChoice::Auto && iommu.as_str() != is {
            return differs("iommu", is, iommu.as_str());
        }
        let (is, map_by) = (self.config.map_by, wanted.map_by);
        if map_by != MapBy::Auto && map_by != is {
            return differs("map-by", is.as_str(), map_by.as_str());
        }
        Ok(Outcome::AlreadySo(format!("map {name} exists")))
    }
}

impl PortEntry {
    /// Whether this is what is wanted, where no device is wanted by not naming one.
    pub(super) fn compare(&self, wanted: &PortConfig) -> Result<Outcome, InventoryError> {
        let name = &self.config.name;
        let differs = |key, is: String, wanted: String| {
            Err(InventoryError::PortIs {
                port: name.clone(),
                key,
                is,
                wanted,
            })
        };
        let socket = |socket: &SocketSpec| match socket {
            SocketSpec::Inherited { fd } => format!("of descriptor {fd}"),
            other => other
                .path()
                .map_or_else(String::new, |path| path.display().to_string()),
        };
        let same = match (self.config.socket.path(), wanted.socket.path()) {
            (Some(is), Some(wanted)) => same_path(is, wanted),
            (is, wanted) => is == wanted,
        };
        if !same {
            return differs("socket-path", socket(&self.config.socket), socket(&wanted.socket));
        }
        let (is, asked) = (text_of(&self.config), text_of(wanted));
        for key in [
            "client",
            "socket-mode",
            "map",
            "mtu",
            "poll-us",
            "queue-pairs",
            "rss-key",
        ] {
            let value = |fields: &[(&'static str, String)]| {
                let found = fields.iter().find(|(name, _)| *name == key);
                found.map_or_else(|| "false".to_owned(), |(_, text)| text.clone())
            };
            if value(&is) != value(&asked) {
                return differs(key, value(&is), value(&asked));
            }
        }
        if let Some(device) = &wanted.device {
            match &self.device {
                Some(present) if present.spec.is_same_as(device) => {}
                Some(present) => return differs("device", present.spec.to_string(), device.to_string()),
                None => return differs("device", "none".to_owned(), device.to_string()),
            }
        }
        Ok(Outcome::AlreadySo(format!("port {name} exists")))
    }
}

/// A port's settings in text form.
fn text_of(port: &PortConfig) -> Vec<(&'static str, String)> {
    Order::PortAdd(port.clone()).fields()
}
