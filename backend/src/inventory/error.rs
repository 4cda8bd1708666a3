//! Why the inventory was not changed as asked, with both facts where two contradict each other.

use std::path::PathBuf;

use config::{DeviceSpec, nearest};
use queues::nic::NicError;
use vfio_glue::iommu::{IommuError, IommuKind};
use vfio_glue::map::MapError;

use crate::endpoint::EndpointError;
use crate::port::PortError;

/// Why the inventory could not be changed as asked. It is as before.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// No such port.
    #[error("there is no port `{name}`{}", hint(name, known))]
    NoPort {
        /// What was asked for.
        name: String,
        /// The ports there are.
        known: Vec<String>,
    },
    /// No such map.
    #[error("there is no map `{name}`{}", hint(name, known))]
    NoMap {
        /// What was asked for.
        name: String,
        /// The maps there are.
        known: Vec<String>,
    },
    /// A map of that name is not like the one asked for.
    #[error("map {map} exists with {key} {is}, not {wanted}")]
    MapIs {
        /// The map.
        map: String,
        /// What differs.
        key: &'static str,
        /// As it is.
        is: String,
        /// As it was asked for.
        wanted: String,
    },
    /// Ports have their guests' memory on the map.
    #[error("map {map} is used by {}", listed("port", ports))]
    MapInUse {
        /// The map.
        map: String,
        /// Its ports.
        ports: Vec<String>,
    },
    /// A port of that name is not like the one asked for.
    #[error("port {port} exists with {key} {is}, not {wanted}")]
    PortIs {
        /// The port.
        port: String,
        /// What differs.
        key: &'static str,
        /// As it is.
        is: String,
        /// As it was asked for.
        wanted: String,
    },
    /// The port has another device.
    #[error("port {port} has {device}; detach it first")]
    PortHasDevice {
        /// The port.
        port: String,
        /// Its device.
        device: DeviceSpec,
    },
    /// Another port has the device.
    #[error("{device} is at port {port} on map {map}; detach it first")]
    DeviceInUse {
        /// The device.
        device: DeviceSpec,
        /// The port that has it.
        port: String,
        /// That port's map.
        map: String,
    },
    /// The map cannot confine the device's DMA, or cannot tell it of memory.
    #[error("map {map} has iommu {}, and {device} needs one with {wanted}", iommu.as_str())]
    WrongMap {
        /// The map.
        map: String,
        /// What it has.
        iommu: IommuKind,
        /// The device.
        device: DeviceSpec,
        /// What would do.
        wanted: &'static str,
    },
    /// Another port has the socket.
    #[error("socket path {} is port {port}'s", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
        /// The port that has it.
        port: String,
    },
    /// The control socket is there.
    #[error("socket path {} is the control socket's", path.display())]
    ControlSocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be had.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No IOMMU for the map.
    #[error("cannot make map {map}")]
    MakeMap {
        /// The map.
        map: String,
        /// Why not.
        source: Box<IommuError>,
    },
    /// The device cannot be had.
    #[error("cannot open {device} for port {port}")]
    Open {
        /// The port.
        port: String,
        /// The device.
        device: DeviceSpec,
        /// Why not.
        source: Box<OpenError>,
    },
    /// The port's device cannot be changed.
    #[error(transparent)]
    Port(#[from] PortError),
    /// Memory that was discarded behind a pin could not be mapped anew.
    #[error("discarded memory of port {port} is not mapped anew")]
    Discarded {
        /// The port.
        port: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system gives no more threads or descriptors.
    #[error("port {port} cannot be served")]
    Serve {
        /// The port.
        port: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// It is too late for changes.
    #[error("the process is stopping")]
    Stopping,
}

/// Why a device could not be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The map does not let it in.
    #[error(transparent)]
    Map(#[from] MapError),
    /// It does not work.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// No key for the spread over its queues could be drawn.
    #[error("the kernel gives no random bytes for an RSS key")]
    RssKey(#[source] std::io::Error),
    /// A model that copies has no thread to do it.
    #[error("the kernel gives no thread for the model")]
    ModelThread(#[source] std::io::Error),
}

/// The name that was meant, or all there are.
fn hint(name: &str, known: &[String]) -> String {
    match nearest(name, known.iter().map(String::as_str)) {
        Some(name) => format!("; did you mean `{name}`?"),
        None if known.is_empty() => "; there is none".to_owned(),
        None => format!("; there is {}", known.join(", ")),
    }
}

fn listed(what: &str, names: &[String]) -> String {
    let plural = if names.len() == 1 { "" } else { "s" };
    format!("{what}{plural} {}", names.join(", "))
}
