//! What no single setting can tell: whether all of them hold together.

use std::path::PathBuf;

use crate::map::{IommuChoice, MapConfig};
use crate::nearest::nearest;
use crate::port::{PortConfig, SocketSpec, same_path};
use crate::{Config, DeviceSpec, defaults};

/// How two settings contradict each other. Both are named, by their path in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nothing to serve, now or later.
    #[error(
        "no port is configured, and no control socket to add one by; a port is a table [port.NAME] with a device and a \
         socket-path"
    )]
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
    /// More queue pairs than a tap interface is opened with.
    #[error("`port.{port}.queue-pairs` is {pairs}, and its device {device} has one queue pair")]
    TapQueues {
        /// The port.
        port: String,
        /// What it asks for.
        pairs: u16,
        /// Its device.
        device: DeviceSpec,
    },
    /// A model that fills receive buffers with frames the port does not let in.
    #[error(
        "`port.{port}.device` is {device}, and at an mtu of {mtu} its frames have at most {most} bytes on the wire"
    )]
    ModelSize {
        /// The port.
        port: String,
        /// Its device.
        device: DeviceSpec,
        /// The port's MTU.
        mtu: u16,
        /// The longest frame on the wire, without a tag.
        most: u32,
    },
    /// A device of this process's own, which no IOMMU confines, on a map that has one.
    #[error(
        "`map.{map}.iommu` is {}, and `port.{port}` uses it with {device}, which is played by this process: set auto or \
         none", iommu.as_str()
    )]
    MapWithIommu {
        /// The map.
        map: String,
        /// What its file says.
        iommu: IommuChoice,
        /// The port.
        port: String,
        /// Its device.
        device: DeviceSpec,
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
        "`map.{map}.iommu` is {}, and `port.{port}` uses it with PCI device {device}, whose DMA needs an IOMMU: \
         set auto, iommufd or type1", iommu.as_str()
    )]
    MapWithoutIommu {
        /// The map.
        map: String,
        /// `none` or `vfio-user`.
        iommu: IommuChoice,
        /// The port.
        port: String,
        /// Its device.
        device: DeviceSpec,
    },
    /// A device in another process, on a map that nobody tells it of.
    #[error(
        "`map.{map}.iommu` is {}, and `port.{port}` uses it with {device}, which learns of memory by vfio-user: \
         set auto or vfio-user", iommu.as_str()
    )]
    MapWithoutMessages {
        /// The map.
        map: String,
        /// What its file says.
        iommu: IommuChoice,
        /// The port.
        port: String,
        /// Its device.
        device: DeviceSpec,
    },
    /// Devices that no one map can serve.
    #[error(
        "map `{map}` is used by `port.{pci}` with a PCI device and by `port.{served}` with one in another process: give \
         each kind a map of its own"
    )]
    MixedMap {
        /// The map.
        map: String,
        /// The port with the PCI device.
        pci: String,
        /// The port with the other.
        served: String,
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
            check_device(map, port)?;
        }
        for map in &self.maps {
            let user = |is_kind: fn(&DeviceSpec) -> bool| {
                let mut users = self.ports.iter().filter(|port| port.map == map.name);
                users.find(|port| port.device.as_ref().is_some_and(is_kind))
            };
            let pci = user(|device| matches!(device, DeviceSpec::Pci(_)));
            let served = user(|device| matches!(device, DeviceSpec::VfioUser(_)));
            if let (Some(pci), Some(served)) = (pci, served) {
                return Err(ConfigError::MixedMap {
                    map: map.name.clone(),
                    pci: pci.name.clone(),
                    served: served.name.clone(),
                });
            }
        }
        Ok(())
    }

    fn check_ports(&self) -> Result<(), ConfigError> {
        if self.ports.is_empty() && self.control.is_none() {
            return Err(ConfigError::NoPorts);
        }
        for (index, port) in self.ports.iter().enumerate() {
            for earlier in self.ports.iter().take(index) {
                check_pair(earlier, port)?;
            }
            if let Some(device @ DeviceSpec::Tap(_)) = &port.device
                && port.queue_pairs > 1
            {
                return Err(ConfigError::TapQueues {
                    port: port.name.clone(),
                    pairs: port.queue_pairs,
                    device: device.clone(),
                });
            }
            if let Some(device @ DeviceSpec::Model(model)) = &port.device {
                let most = u32::from(port.mtu) + 14 + 4;
                if model.rx_bytes.is_some_and(|bytes| u32::from(bytes) > most) {
                    return Err(ConfigError::ModelSize {
                        port: port.name.clone(),
                        device: device.clone(),
                        mtu: port.mtu,
                        most,
                    });
                }
            }
            if let (Some(control), Some(path)) = (&self.control, port.socket.path())
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

/// Whether the port's device can be on the map, if what the map is has been written down.
fn check_device(map: &MapConfig, port: &PortConfig) -> Result<(), ConfigError> {
    let names = |device: &DeviceSpec| (map.name.clone(), port.name.clone(), device.clone());
    match (&port.device, map.iommu) {
        (Some(device @ DeviceSpec::Pci(_)), iommu @ (IommuChoice::None | IommuChoice::VfioUser)) => {
            let (map, port, device) = names(device);
            Err(ConfigError::MapWithoutIommu {
                map,
                iommu,
                port,
                device,
            })
        }
        (
            Some(device @ DeviceSpec::VfioUser(_)),
            iommu @ (IommuChoice::None | IommuChoice::Iommufd | IommuChoice::Type1),
        ) => {
            let (map, port, device) = names(device);
            Err(ConfigError::MapWithoutMessages {
                map,
                iommu,
                port,
                device,
            })
        }
        (
            Some(device @ DeviceSpec::Model(_)),
            iommu @ (IommuChoice::Iommufd | IommuChoice::Type1 | IommuChoice::VfioUser),
        ) => {
            let (map, port, device) = names(device);
            Err(ConfigError::MapWithIommu {
                map,
                iommu,
                port,
                device,
            })
        }
        _ => Ok(()),
    }
}

fn check_pair(first: &PortConfig, second: &PortConfig) -> Result<(), ConfigError> {
    let names = || (first.name.clone(), second.name.clone());
    if let (Some(one), Some(other)) = (&first.device, &second.device)
        && one.is_same_as(other)
    {
        let (first, second) = names();
        return Err(ConfigError::SameDevice {
            first,
            second,
            device: other.clone(),
        });
    }
    if let (Some(one), Some(other)) = (first.socket.path(), second.socket.path())
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

/// Says what `auto` means, where the devices on the map say it.
fn settle_iommu(map: &mut MapConfig, ports: &[PortConfig]) {
    let users = ports.iter().filter(|port| port.map == map.name);
    if map.iommu == IommuChoice::Auto {
        map.iommu = iommu_for(users.map(|port| port.device.as_ref()));
    }
}

/// What a map on `auto` is when these are the devices of its ports: no IOMMU where all are software, so that one works on a
/// machine that has none. A port that waits for its device may get any.
pub(crate) fn iommu_for<'a>(devices: impl Iterator<Item = Option<&'a DeviceSpec>>) -> IommuChoice {
    let (mut software, mut others) = (0, 0);
    for device in devices {
        match device {
            Some(DeviceSpec::VfioUser(_)) => return IommuChoice::VfioUser,
            Some(DeviceSpec::Tap(_) | DeviceSpec::Model(_)) => software += 1,
            Some(DeviceSpec::Pci(_)) | None => others += 1,
        }
    }
    if software > 0 && others == 0 {
        IommuChoice::None
    } else {
        IommuChoice::Auto
    }
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
    fn a_model_wants_a_map_without_iommu_and_frames_the_port_lets_in() {
        let text = |rest: &str| port("a", "model:rx=1518", &format!("fd = 3\n{rest}"));
        assert_eq!(
            Config::from_toml(&text("")).unwrap().maps[0].iommu,
            IommuChoice::None
        );
        assert_eq!(
            error(&text("[map.main]\niommu = 'type1'")),
            "`map.main.iommu` is type1, and `port.a` uses it with model:rx=1518, which is played by this process: set \
             auto or none"
        );
        assert_eq!(
            error(&text("mtu = 1499")),
            "`port.a.device` is model:rx=1518, and at an mtu of 1499 its frames have at most 1517 bytes on the wire"
        );
    }

    #[test]
    fn a_tap_has_one_queue_pair() {
        assert_eq!(
            error(&port("a", "tap:a", "fd = 3\nqueue-pairs = 2")),
            "`port.a.queue-pairs` is 2, and its device tap:a has one queue pair"
        );
        let card = port("a", "01:00.0", "fd = 3\nqueue-pairs = 16");
        assert_eq!(Config::from_toml(&card).unwrap().ports[0].queue_pairs, 16);
    }

    #[test]
    fn a_configuration_without_ports_serves_nothing() {
        let text = "no port is configured, and no control socket to add one by; a port is a table [port.NAME] with a \
                    device and a socket-path";
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
    fn a_map_serves_devices_in_other_processes_or_the_machines_own() {
        let served = port("a", "vfio-user:card", "fd = 3");
        let text = format!("[map.main]\niommu = 'none'\n{served}");
        assert_eq!(
            error(&text),
            "`map.main.iommu` is none, and `port.a` uses it with vfio-user:card, which learns of memory by \
             vfio-user: set auto or vfio-user"
        );
        let card = port("b", "01:00.0", "fd = 4");
        let text = format!("[map.main]\niommu = 'vfio-user'\n{card}");
        assert!(
            error(&text).starts_with("`map.main.iommu` is vfio-user, and `port.b` uses it with PCI device")
        );
        assert_eq!(
            error(&format!("{served}{card}")),
            "map `main` is used by `port.b` with a PCI device and by `port.a` with one in another process: give each \
             kind a map of its own"
        );
    }

    #[test]
    fn a_control_socket_is_enough_to_start_with() {
        let config = Config::from_toml("control = 'c'").unwrap();
        assert_eq!((config.maps.len(), config.ports.len()), (0, 0));
    }

    #[test]
    fn two_ports_may_wait_for_their_devices() {
        let text = port("a", "none", "fd = 3") + &port("b", "none", "fd = 4");
        assert_eq!(Config::from_toml(&text).unwrap().ports.len(), 2);
    }

    #[test]
    fn auto_is_what_the_devices_of_a_map_need() {
        let iommu = |text: &str| Config::from_toml(text).unwrap().maps[0].iommu;
        let tap = port("a", "tap:a", "fd = 3");
        let card = port("b", "01:00.0", "fd = 4");
        assert_eq!(iommu(&tap), IommuChoice::None);
        let served = port("a", "vfio-user:card", "fd = 3");
        assert_eq!(iommu(&served), IommuChoice::VfioUser);
        let waiting = port("c", "none", "fd = 5");
        assert_eq!(iommu(&waiting), IommuChoice::Auto);
        assert_eq!(iommu(&format!("{waiting}{tap}")), IommuChoice::Auto);
        assert_eq!(iommu(&format!("{waiting}{served}")), IommuChoice::VfioUser);
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
