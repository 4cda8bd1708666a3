//! What no single setting can tell: whether all of them hold together.

use std::path::{Component, Path, PathBuf};

use crate::map::{IommuChoice, MapConfig};
use crate::nearest::nearest;
use crate::port::{PortConfig, SocketSpec};
use crate::{Config, DeviceSpec, defaults};

/// How two settings contradict each other. Both are named, by their path in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nothing to serve.
    #[error("no port is configured; a port is a table [port.NAME] with a device and a socket-path")]
    NoPorts,
    /// Two ports want the whole of one device.
    #[error("`port.{second}.device` is {device}, which `port.{first}.device` has already")]
    SameDevice {
        /// The port that comes first in the file.
        first: String,
        /// The other.
        second: String,
        /// What both name.
        device: DeviceSpec,
    },
    /// Two ports on one socket.
    #[error("`port.{second}.socket-path` is {}, which `port.{first}.socket-path` has already", path.display())]
    SameSocket {
        /// The port that comes first in the file.
        first: String,
        /// The other.
        second: String,
        /// As the second writes it.
        path: PathBuf,
    },
    /// Two ports on one inherited socket.
    #[error("`port.{second}.fd` is {fd}, which `port.{first}.fd` has already")]
    SameFd {
        /// The port that comes first in the file.
        first: String,
        /// The other.
        second: String,
        /// What both name.
        fd: i32,
    },
    /// A port on the control socket.
    #[error("`port.{port}.socket-path` is {}, which is the control socket's path", path.display())]
    ControlSocket {
        /// The port.
        port: String,
        /// As the port writes it.
        path: PathBuf,
    },
    /// A port whose map is nowhere described.
    #[error(
        "`port.{port}.map` is `{map}`, and there is no [map.{map}]{}",
        hint(nearest, known)
    )]
    UnknownMap {
        /// The port.
        port: String,
        /// What it names.
        map: String,
        /// The map that may have been meant.
        nearest: Option<String>,
        /// All maps there are.
        known: Vec<String>,
    },
    /// A PCI device whose DMA nothing would confine.
    #[error(
        "`map.{map}.iommu` is none, and `port.{port}` uses it with PCI device {device}, whose DMA needs an IOMMU: \
         set auto, iommufd or type1"
    )]
    MapWithoutIommu {
        /// The map.
        map: String,
        /// The port.
        port: String,
        /// Its device.
        device: DeviceSpec,
    },
}

impl Config {
    /// Adds what is there without being written down, then checks what concerns more than one setting.
    pub(crate) fn settled(mut self) -> Result<Self, ConfigError> {
        self.add_main_map();
        self.check_maps()?;
        self.check_ports()?;
        for map in &mut self.maps {
            settle_iommu(map, &self.ports);
        }
        Ok(self)
    }

    /// The shared map needs no table of its own. A file whose ports all name other maps has renamed it.
    fn add_main_map(&mut self) {
        let main = defaults::MAP_NAME;
        let used = self.ports.iter().any(|port| port.map == main);
        if used && !self.maps.iter().any(|map| map.name == main) {
            let map = MapConfig {
                name: main.to_owned(),
                iommu: defaults::IOMMU,
                map_by: defaults::MAP_BY,
            };
            self.maps.insert(0, map);
        }
    }

    fn check_maps(&self) -> Result<(), ConfigError> {
        for port in &self.ports {
            let Some(map) = self.maps.iter().find(|map| map.name == port.map) else {
                let known: Vec<_> = self.maps.iter().map(|map| map.name.clone()).collect();
                let words = known.iter().map(String::as_str).chain([defaults::MAP_NAME]);
                let nearest = nearest(&port.map, words).map(str::to_owned);
                return Err(ConfigError::UnknownMap {
                    port: port.name.clone(),
                    map: port.map.clone(),
                    nearest,
                    known,
                });
            };
            if map.iommu == IommuChoice::None && matches!(port.device, DeviceSpec::Pci(_)) {
                return Err(ConfigError::MapWithoutIommu {
                    map: map.name.clone(),
                    port: port.name.clone(),
                    device: port.device.clone(),
                });
            }
        }
        Ok(())
    }

    fn check_ports(&self) -> Result<(), ConfigError> {
        if self.ports.is_empty() {
            return Err(ConfigError::NoPorts);
        }
        for (index, port) in self.ports.iter().enumerate() {
            for earlier in self.ports.iter().take(index) {
                check_pair(earlier, port)?;
            }
            if let (Some(control), Some(path)) = (&self.control, socket_path(port))
                && same_path(control, path)
            {
                return Err(ConfigError::ControlSocket {
                    port: port.name.clone(),
                    path: path.to_owned(),
                });
            }
        }
        Ok(())
    }
}

fn check_pair(first: &PortConfig, second: &PortConfig) -> Result<(), ConfigError> {
    let names = || (first.name.clone(), second.name.clone());
    if same_device(&first.device, &second.device) {
        let (first, second_name) = names();
        return Err(ConfigError::SameDevice {
            first,
            second: second_name,
            device: second.device.clone(),
        });
    }
    if let (Some(one), Some(other)) = (socket_path(first), socket_path(second))
        && same_path(one, other)
    {
        let (first, second) = names();
        return Err(ConfigError::SameSocket {
            first,
            second,
            path: other.to_owned(),
        });
    }
    if let (SocketSpec::Inherited { fd: one }, SocketSpec::Inherited { fd }) = (&first.socket, &second.socket)
        && one == fd
    {
        let (first, second) = names();
        return Err(ConfigError::SameFd {
            first,
            second,
            fd: *fd,
        });
    }
    Ok(())
}

/// `auto` for a map that some port uses and no PCI device does means no IOMMU, so that a tap or a device in
/// another process works on a machine that has none.
fn settle_iommu(map: &mut MapConfig, ports: &[PortConfig]) {
    let mut users = ports.iter().filter(|port| port.map == map.name).peekable();
    let used = users.peek().is_some();
    if map.iommu == IommuChoice::Auto && used && !users.any(|port| matches!(port.device, DeviceSpec::Pci(_)))
    {
        map.iommu = IommuChoice::None;
    }
}

fn socket_path(port: &PortConfig) -> Option<&Path> {
    match &port.socket {
        SocketSpec::Listen { path, .. } | SocketSpec::Connect { path } => Some(path),
        SocketSpec::Inherited { .. } => None,
    }
}

fn same_device(one: &DeviceSpec, other: &DeviceSpec) -> bool {
    match (one, other) {
        (DeviceSpec::VfioUser(one), DeviceSpec::VfioUser(other)) => same_path(one, other),
        _ => one == other,
    }
}

/// Compares as written, but for `./` and doubled slashes. Links are for the kernel to follow.
fn same_path(one: &Path, other: &Path) -> bool {
    let parts = |path: &Path| -> PathBuf {
        path.components()
            .filter(|part| *part != Component::CurDir)
            .collect()
    };
    parts(one) == parts(other)
}

fn hint(nearest: &Option<String>, known: &[String]) -> String {
    match nearest {
        Some(map) => format!("; did you mean `{map}`?"),
        None if known.is_empty() => String::new(),
        None => format!("; there is {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str, device: &str, rest: &str) -> String {
        format!("[port.{name}]\ndevice = '{device}'\n{rest}\n")
    }

    fn error(text: &str) -> String {
        Config::from_toml(text).unwrap_err().to_string()
    }

    fn two_ports(first: &str, second: &str) -> String {
        error(&format!(
            "{}{}",
            port("a", "tap:a", first),
            port("b", "tap:b", second)
        ))
    }

    #[test]
    fn a_configuration_without_ports_serves_nothing() {
        let text = "no port is configured; a port is a table [port.NAME] with a device and a socket-path";
        assert_eq!(error(""), text);
        assert_eq!(error("[map.main]\n[port]"), text);
    }

    #[test]
    fn two_ports_on_one_device_are_both_named() {
        let cards = |one, other| error(&(port("a", one, "socket-path = 'a'") + &port("b", other, "fd = 3")));
        assert_eq!(
            cards("0000:01:00.0", "01:00.0"),
            "`port.b.device` is 0000:01:00.0, which `port.a.device` has already"
        );
        assert_eq!(
            cards("tap:t", "tap:t"),
            "`port.b.device` is tap:t, which `port.a.device` has already"
        );
        assert_eq!(
            cards("vfio-user:card", "vfio-user:./card"),
            "`port.b.device` is vfio-user:./card, which `port.a.device` has already"
        );
    }

    #[test]
    fn two_ports_on_one_socket_are_both_named() {
        assert_eq!(
            two_ports(
                "socket-path = '/run/s'",
                "socket-path = '/run//./s'\nclient = true"
            ),
            "`port.b.socket-path` is /run//./s, which `port.a.socket-path` has already"
        );
        assert_eq!(
            two_ports("fd = 4", "fd = 4"),
            "`port.b.fd` is 4, which `port.a.fd` has already"
        );
    }

    #[test]
    fn a_port_on_the_control_socket_is_refused() {
        assert_eq!(
            error(&format!(
                "control = 'c'\n{}",
                port("a", "tap:a", "socket-path = './c'")
            )),
            "`port.a.socket-path` is ./c, which is the control socket's path"
        );
    }

    #[test]
    fn a_port_that_names_no_map_of_the_file_is_told_which_there_are() {
        let map = |name: &str, maps: &str| {
            error(&format!(
                "{maps}{}",
                port("a", "tap:a", &format!("fd = 3\nmap = '{name}'"))
            ))
        };
        assert_eq!(
            map("mian", ""),
            "`port.a.map` is `mian`, and there is no [map.mian]; did you mean `main`?"
        );
        assert_eq!(
            map("tenantb", "[map.tenant-b]\n"),
            "`port.a.map` is `tenantb`, and there is no [map.tenantb]; did you mean `tenant-b`?"
        );
        assert_eq!(
            map("other", "[map.x1]\n[map.y1]\n"),
            "`port.a.map` is `other`, and there is no [map.other]; there is x1, y1"
        );
        assert_eq!(
            map("other", ""),
            "`port.a.map` is `other`, and there is no [map.other]"
        );
    }

    #[test]
    fn a_pci_device_needs_an_iommu() {
        let text = format!("[map.main]\niommu = 'none'\n{}", port("a", "01:00.0", "fd = 3"));
        assert_eq!(
            error(&text),
            "`map.main.iommu` is none, and `port.a` uses it with PCI device 0000:01:00.0, whose DMA needs an \
             IOMMU: set auto, iommufd or type1"
        );
    }

    #[test]
    fn main_is_there_unless_every_port_names_another_map() {
        let maps = |text: &str| -> Vec<String> {
            Config::from_toml(text)
                .unwrap()
                .maps
                .into_iter()
                .map(|map| map.name)
                .collect()
        };
        let on_b = port("b", "01:00.0", "fd = 4\nmap = 'b'");
        assert_eq!(maps(&format!("[map.b]\n{on_b}")), ["b"]);
        let on_main = port("a", "01:00.1", "fd = 5");
        assert_eq!(maps(&format!("[map.b]\n{on_b}{on_main}")), ["main", "b"]);
        assert_eq!(maps(&format!("[map.b]\n[map.main]\n{on_main}")), ["b", "main"]);
    }

    #[test]
    fn auto_is_no_iommu_for_a_map_that_no_pci_device_uses() {
        let iommu = |text: &str| Config::from_toml(text).unwrap().maps[0].iommu;
        let tap = port("a", "tap:a", "fd = 3");
        let card = port("b", "01:00.0", "fd = 4");
        assert_eq!(iommu(&tap), IommuChoice::None);
        assert_eq!(iommu(&port("a", "vfio-user:card", "fd = 3")), IommuChoice::None);
        assert_eq!(iommu(&format!("{tap}{card}")), IommuChoice::Auto);
        assert_eq!(
            iommu(&format!("[map.main]\niommu = 'type1'\n{tap}")),
            IommuChoice::Type1
        );
        assert_eq!(iommu(&format!("[map.spare]\n{tap}")), IommuChoice::None);
        let spare = Config::from_toml(&format!("[map.spare]\n{tap}")).unwrap();
        assert_eq!(spare.maps[1].iommu, IommuChoice::Auto);
    }
}
