//! What an operator asks of a running process: a command with its values in text form, as it travels over the control
//! socket.
//!
//! ```text
//! argv ──cli.rs──▶ Order ──fields──▶ control socket ──read──▶ Order ──▶ backend of the running process
//! ```
//!
//! The keys are the long flags without their dashes, and the values are read by the same functions as those of flags
//! and files: who types a command and who writes to the socket are refused in the same words.

use std::fmt;

use crate::defaults;
use crate::device::{DeviceOrNone, DeviceSpec};
use crate::map::{self, MapConfig};
use crate::nearest::nearest;
use crate::port::{self, PortConfig, SocketSpec};
use crate::rss;
use crate::value::{self, ValueError};

/// One command to a running process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Show counters and maps.
    Stats {
        /// Where each lane's buffers are, too. Asking that wakes the workers.
        buffers: bool,
    },
    /// Have a map like this.
    MapCreate(MapConfig),
    /// Have no map of this name.
    MapDestroy {
        /// The map.
        name: String,
    },
    /// Look for memory that was discarded behind the pins of a map, or of all, and map it anew.
    MapCheck {
        /// The map; `None` for all.
        name: Option<String>,
    },
    /// Show a map, or all.
    MapShow {
        /// The map; `None` for all.
        name: Option<String>,
    },
    /// Have this device at this port's wire end.
    DeviceAttach {
        /// What to attach.
        device: DeviceSpec,
        /// The port.
        port: String,
    },
    /// Have this device at no port.
    DeviceDetach {
        /// What to detach.
        device: DeviceSpec,
    },
    /// Have a port like this. Without a device: with whatever device it has, none at first.
    PortAdd(PortConfig),
    /// Have no port of this name.
    PortRemove {
        /// The port.
        name: String,
    },
}

/// Why a command cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// No such command.
    #[error("there is no command `{}`{}", command.escape_debug(), Hint { word: command, known: &COMMANDS.map(|shape| shape.command) })]
    Command {
        /// What was asked.
        command: String,
    },
    /// A key that the command must have.
    #[error("command `{command}` has no `{key}`")]
    Missing {
        /// The command.
        command: &'static str,
        /// What it lacks.
        key: &'static str,
    },
    /// A key that the command does not have.
    #[error("command `{command}` has no key `{}`{}", key.escape_debug(), Hint { word: key, known })]
    Unknown {
        /// The command.
        command: &'static str,
        /// What was given.
        key: String,
        /// The keys it has.
        known: &'static [&'static str],
    },
    /// A key that another key makes meaningless.
    #[error("`socket-mode` has no meaning beside `client`: the VMM makes the socket and sets its mode")]
    Meaningless,
    /// A value that cannot be taken.
    #[error("`{key}` is refused")]
    Value {
        /// The key.
        key: &'static str,
        /// Why not.
        source: ValueError,
    },
}

/// A command and the keys it has.
struct Shape {
    command: &'static str,
    keys: &'static [&'static str],
}

const COMMANDS: [Shape; 9] = [
    Shape {
        command: "stats",
        keys: &["buffers"],
    },
    Shape {
        command: "map-create",
        keys: &["name", "iommu", "map-by"],
    },
    Shape {
        command: "map-destroy",
        keys: &["name"],
    },
    Shape {
        command: "map-check",
        keys: &["name"],
    },
    Shape {
        command: "map-show",
        keys: &["name"],
    },
    Shape {
        command: "device-attach",
        keys: &["device", "port"],
    },
    Shape {
        command: "device-detach",
        keys: &["device"],
    },
    Shape {
        command: "port-add",
        keys: &[
            "name",
            "socket-path",
            "socket-mode",
            "client",
            "device",
            "map",
            "mtu",
            "poll-us",
            "queue-pairs",
            "rss-key",
        ],
    },
    Shape {
        command: "port-remove",
        keys: &["name"],
    },
];

/// The known word that was meant, or all of them.
struct Hint<'a> {
    word: &'a str,
    known: &'a [&'a str],
}

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match nearest(self.word, self.known.iter().copied()) {
            Some(word) => write!(f, "; did you mean `{word}`?"),
            None => write!(f, "; known are {}", self.known.join(", ")),
        }
    }
}

impl Order {
    /// The command's word on the control socket.
    pub fn command(&self) -> &'static str {
        match self {
            Self::Stats { .. } => "stats",
            Self::MapCreate(_) => "map-create",
            Self::MapDestroy { .. } => "map-destroy",
            Self::MapCheck { .. } => "map-check",
            Self::MapShow { .. } => "map-show",
            Self::DeviceAttach { .. } => "device-attach",
            Self::DeviceDetach { .. } => "device-detach",
            Self::PortAdd(_) => "port-add",
            Self::PortRemove { .. } => "port-remove",
        }
    }

    /// Its values in text form, by their keys. [`read`](Self::read) makes the same order of them.
    ///
    /// A path that is no Unicode is shown with replacements: the control socket speaks text.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Stats { buffers: true } => vec![("buffers", "true".to_owned())],
            Self::Stats { buffers: false } | Self::MapShow { name: None } | Self::MapCheck { name: None } => {
                Vec::new()
            }
            Self::MapCreate(map) => vec![
                ("name", map.name.clone()),
                ("iommu", map.iommu.as_str().to_owned()),
                ("map-by", map.map_by.as_str().to_owned()),
            ],
            Self::MapDestroy { name }
            | Self::MapShow { name: Some(name) }
            | Self::MapCheck { name: Some(name) }
            | Self::PortRemove { name } => {
                vec![("name", name.clone())]
            }
            Self::DeviceAttach { device, port } => {
                vec![("device", device.to_string()), ("port", port.clone())]
            }
            Self::DeviceDetach { device } => vec![("device", device.to_string())],
            Self::PortAdd(port) => port_fields(port),
        }
    }

    /// Makes an order of a command and its keys with their values in text form.
    ///
    /// # Errors
    ///
    /// [`OrderError`] for the first thing that is wrong.
    pub fn read(command: &str, fields: &[(String, String)]) -> Result<Self, OrderError> {
        let unknown = || OrderError::Command {
            command: command.to_owned(),
        };
        let shape = COMMANDS.iter().find(|shape| shape.command == command);
        let Shape { command, keys } = *shape.ok_or_else(unknown)?;
        if let Some((key, _)) = fields.iter().find(|(key, _)| !keys.contains(&key.as_str())) {
            return Err(OrderError::Unknown {
                command,
                key: key.clone(),
                known: keys,
            });
        }
        let fields = Fields { command, fields };
        match command {
            "map-create" => Ok(Self::MapCreate(MapConfig {
                name: fields.require("name", value::name)?,
                iommu: fields.get("iommu", map::iommu)?.unwrap_or(defaults::IOMMU),
                map_by: fields.get("map-by", map::map_by)?.unwrap_or(defaults::MAP_BY),
            })),
            "map-destroy" => Ok(Self::MapDestroy {
                name: fields.require("name", value::name)?,
            }),
            "map-check" => Ok(Self::MapCheck {
                name: fields.get("name", value::name)?,
            }),
            "map-show" => Ok(Self::MapShow {
                name: fields.get("name", value::name)?,
            }),
            "device-attach" => Ok(Self::DeviceAttach {
                device: fields.require("device", str::parse)?,
                port: fields.require("port", value::name)?,
            }),
            "device-detach" => Ok(Self::DeviceDetach {
                device: fields.require("device", str::parse)?,
            }),
            "port-add" => port(&fields).map(Self::PortAdd),
            "port-remove" => Ok(Self::PortRemove {
                name: fields.require("name", value::name)?,
            }),
            _ => Ok(Self::Stats {
                buffers: fields.get("buffers", boolean)?.unwrap_or(false),
            }),
        }
    }
}

fn port_fields(port: &PortConfig) -> Vec<(&'static str, String)> {
    let mut fields = vec![("name", port.name.clone())];
    let shown = |path: &std::path::Path| path.display().to_string();
    match &port.socket {
        SocketSpec::Listen { path, mode } => {
            fields.extend([
                ("socket-path", shown(path)),
                ("socket-mode", format!("{mode:04o}")),
            ]);
        }
        SocketSpec::Connect { path } => {
            fields.extend([("socket-path", shown(path)), ("client", "true".to_owned())]);
        }
        // A descriptor of whoever asks is none of the process that is asked.
        SocketSpec::Inherited { .. } => {}
    }
    if let Some(device) = &port.device {
        fields.push(("device", device.to_string()));
    }
    fields.extend([
        ("map", port.map.clone()),
        ("mtu", port.mtu.to_string()),
        ("poll-us", port.poll.to_string()),
        ("queue-pairs", port.queue_pairs.to_string()),
    ]);
    if let Some(key) = &port.rss_key {
        fields.push(("rss-key", key.to_string()));
    }
    fields
}

fn port(fields: &Fields<'_>) -> Result<PortConfig, OrderError> {
    let path = fields.require("socket-path", |text| port::socket_path(text.into()))?;
    let mode = fields.get("socket-mode", port::socket_mode)?;
    let socket = match (fields.get("client", boolean)?.unwrap_or(false), mode) {
        (true, Some(_)) => return Err(OrderError::Meaningless),
        (true, None) => SocketSpec::Connect { path },
        (false, mode) => SocketSpec::Listen {
            path,
            mode: mode.unwrap_or(defaults::SOCKET_MODE),
        },
    };
    let device = fields.get("device", str::parse::<DeviceOrNone>)?;
    Ok(PortConfig {
        name: fields.require("name", value::name)?,
        device: device.and_then(|DeviceOrNone(device)| device),
        socket,
        map: fields
            .get("map", value::name)?
            .unwrap_or_else(|| defaults::MAP_NAME.to_owned()),
        poll: fields.get("poll-us", str::parse)?.unwrap_or(defaults::POLL),
        mtu: fields.get("mtu", port::mtu)?.unwrap_or(defaults::MTU),
        queue_pairs: fields
            .get("queue-pairs", rss::queue_pairs)?
            .unwrap_or(defaults::QUEUE_PAIRS),
        rss_key: fields.get("rss-key", str::parse)?,
    })
}

fn boolean(text: &str) -> Result<bool, ValueError> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(ValueError::Choice {
            text: text.to_owned(),
            known: vec!["true".to_owned(), "false".to_owned()],
        }),
    }
}

struct Fields<'a> {
    command: &'static str,
    fields: &'a [(String, String)],
}

impl Fields<'_> {
    fn get<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<Option<T>, OrderError> {
        let found = self.fields.iter().find(|(name, _)| name == key);
        let value = found.map(|(_, text)| read(text)).transpose();
        value.map_err(|source| OrderError::Value { key, source })
    }

    fn require<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<T, OrderError> {
        self.get(key, read)?.ok_or(OrderError::Missing {
            command: self.command,
            key,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Config;
    use crate::map::{IommuChoice, MapBy};
    use crate::port::Poll;
    use crate::rss::RssKey;

    fn read(command: &str, fields: &[(&str, &str)]) -> Result<Order, OrderError> {
        let owned = fields
            .iter()
            .map(|(key, text)| ((*key).to_owned(), (*text).to_owned()));
        Order::read(command, &owned.collect::<Vec<_>>())
    }

    /// The error's text and its causes', as an operator reads them.
    fn error(command: &str, fields: &[(&str, &str)]) -> String {
        crate::chain(&read(command, fields).unwrap_err())
    }

    fn port() -> PortConfig {
        PortConfig {
            name: "vm1".to_owned(),
            device: Some("01:00.0".parse().unwrap()),
            socket: SocketSpec::Listen {
                path: "/run/vm1".into(),
                mode: 0o660,
            },
            map: "tenant-b".to_owned(),
            poll: Poll::Always,
            mtu: 1400,
            queue_pairs: 4,
            rss_key: Some(RssKey([0x5a; 40])),
        }
    }

    #[test]
    fn every_order_travels_as_text() {
        let name = "tenant-b".to_owned();
        let device: DeviceSpec = "vfio-user:/run/card".parse().unwrap();
        let orders = [
            Order::Stats { buffers: false },
            Order::Stats { buffers: true },
            Order::MapCreate(MapConfig {
                name: name.clone(),
                iommu: IommuChoice::VfioUser,
                map_by: MapBy::Address,
            }),
            Order::MapDestroy { name: name.clone() },
            Order::MapCheck { name: None },
            Order::MapCheck {
                name: Some(name.clone()),
            },
            Order::MapShow { name: None },
            Order::MapShow {
                name: Some(name.clone()),
            },
            Order::DeviceAttach {
                device: device.clone(),
                port: "vm1".to_owned(),
            },
            Order::DeviceDetach { device },
            Order::PortAdd(port()),
            Order::PortAdd(PortConfig {
                socket: SocketSpec::Connect {
                    path: "/run/vm1".into(),
                },
                device: None,
                poll: Poll::Micros(7),
                ..port()
            }),
            Order::PortRemove { name },
        ];
        for order in orders {
            let fields: Vec<_> = order
                .fields()
                .into_iter()
                .map(|(key, text)| (key.to_owned(), text))
                .collect();
            assert_eq!(Order::read(order.command(), &fields), Ok(order));
        }
    }

    #[test]
    fn what_is_left_out_takes_the_files_defaults() {
        let Ok(Order::PortAdd(port)) = read("port-add", &[("name", "a"), ("socket-path", "s")]) else {
            panic!("a name and a socket are enough");
        };
        let text = "[port.a]\ndevice = 'none'\nsocket-path = 's'";
        assert_eq!(port, Config::from_toml(text).unwrap().ports[0]);
        let Ok(Order::MapCreate(map)) = read("map-create", &[("name", "x")]) else {
            panic!("a name is enough");
        };
        assert_eq!(map, Config::from_toml("control = 'c'\n[map.x]").unwrap().maps[0]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_key() {
        assert_eq!(
            error("port-ad", &[]),
            "there is no command `port-ad`; did you mean `port-add`?"
        );
        assert_eq!(
            error("fly", &[]),
            "there is no command `fly`; known are stats, map-create, map-destroy, map-check, map-show, device-attach, \
             device-detach, port-add, port-remove"
        );
        assert_eq!(
            error("stats", &[("port", "a")]),
            "command `stats` has no key `port`; known are buffers"
        );
        assert_eq!(
            error("port-add", &[("name", "a"), ("mut", "1400")]),
            "command `port-add` has no key `mut`; did you mean `mtu`?"
        );
        assert_eq!(
            error("port-add", &[("name", "a")]),
            "command `port-add` has no `socket-path`"
        );
        let more = |key, text| error("port-add", &[("name", "a"), ("socket-path", "s"), (key, text)]);
        assert_eq!(
            more("mtu", "9000"),
            "`mtu` is refused: mtu 9000 is above 1500: a receive buffer holds one standard frame, jumbo frames are \
             not served yet"
        );
        assert_eq!(
            more("client", "yes"),
            "`client` is refused: `yes` is not one of true, false"
        );
        assert_eq!(
            error(
                "port-add",
                &[
                    ("name", "a"),
                    ("socket-path", "s"),
                    ("client", "true"),
                    ("socket-mode", "600")
                ]
            ),
            "`socket-mode` has no meaning beside `client`: the VMM makes the socket and sets its mode"
        );
        assert_eq!(
            error("device-attach", &[("device", "none"), ("port", "a")]),
            "`device` is refused: `none` is not a device; accepted are a PCI address (0000:01:00.0 or 01:00.0), \
             tap:NAME and vfio-user:PATH"
        );
        assert_eq!(
            error("map-create", &[("name", "x"), ("iommu", "iommu-fd")]),
            "`iommu` is refused: `iommu-fd` is not one of auto, iommufd, type1, none, vfio-user; did you mean \
             `iommufd`?"
        );
    }

    proptest! {
        #[test]
        fn any_fields_are_read_or_refused(
            command in proptest::sample::select(COMMANDS.map(|shape| shape.command).to_vec()),
            fields in proptest::collection::vec(
                (
                    "name|iommu|map-by|device|port|socket-path|socket-mode|client|map|mtu|poll-us|queue-pairs|rss-key|\\PC{0,5}",
                    "auto|true|none|main|[0-9]{0,5}|\\PC{0,20}",
                ),
                0..8,
            )
        ) {
            let _ = Order::read(command, &fields);
        }
    }
}
