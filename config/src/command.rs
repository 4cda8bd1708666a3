//! Commands to a running process, as they are typed.
//!
//! ```text
//! argv ──cli.rs──▶ ControlCommand ──▶ Command::Ask: an order, whom to ask, how the answer is printed
//! ```

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Subcommand};

use crate::device::{DeviceOrNone, DeviceSpec};
use crate::map::{self, IommuChoice, MapBy, MapConfig};
use crate::order::Order;
use crate::port::{self, Poll, PortConfig, SocketSpec};
use crate::rss::{self, RssKey};
use crate::value::{self, ValueError};
use crate::{AnswerForm, Command, defaults};

/// Commands to a running process.
#[derive(Debug, Subcommand)]
pub enum ControlCommand {
    /// Print the counters of a running process as JSON.
    Stats {
        #[command(flatten)]
        reach: Reach,
        /// Say of each lane where its buffers are, too. It has to be asked for that, which wakes its worker.
        #[arg(long)]
        buffers: bool,
    },
    /// Make, remove and show the memory maps of a running process.
    #[command(subcommand)]
    Map(MapCommand),
    /// Give a port of a running process a device, or take it away. Its guest stays connected.
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Add ports to a running process, and remove them.
    #[command(subcommand)]
    Port(PortCommand),
}

/// Whom to ask.
#[derive(Debug, Args)]
pub struct Reach {
    /// The control socket of the running process.
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    control: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum MapCommand {
    /// Make a map. One that is like this already is left as it is.
    Create {
        /// Its name.
        #[arg(value_parser = value::name)]
        name: String,
        #[command(flatten)]
        reach: Reach,
        /// Interface to the IOMMU: auto, iommufd, type1, none (software devices only) or vfio-user (devices in other
        /// processes).
        #[arg(long, value_name = "KIND", default_value = defaults::IOMMU.as_str(), value_parser = map::iommu)]
        iommu: IommuChoice,
        /// How guest memory is named to it: auto, file or address.
        #[arg(long, value_name = "WAY", default_value = defaults::MAP_BY.as_str(), value_parser = map::map_by)]
        map_by: MapBy,
    },
    /// Remove a map that no port uses.
    Destroy {
        /// Its name.
        #[arg(value_parser = value::name)]
        name: String,
        #[command(flatten)]
        reach: Reach,
    },
    /// Look for memory that a balloon or its like took from a guest while it is pinned, and map it anew.
    Check {
        /// One map. Without it, all of them.
        #[arg(value_parser = value::name)]
        name: Option<String>,
        #[command(flatten)]
        reach: Reach,
    },
    /// Show maps: what is mapped where, for whom, and what is free.
    Show {
        /// One map. Without it, all of them.
        #[arg(value_parser = value::name)]
        name: Option<String>,
        #[command(flatten)]
        reach: Reach,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// Give a port its device.
    Attach {
        /// A PCI address bound to vfio-pci, tap:NAME, or vfio-user:PATH (for measuring also model:rx=SIZE).
        device: DeviceSpec,
        #[command(flatten)]
        reach: Reach,
        /// The port, which has no other device.
        #[arg(long, value_name = "NAME", value_parser = value::name)]
        port: String,
    },
    /// Take a device from its port. The guest's memory stays on the map, and what it sends is dropped and counted.
    Detach {
        /// The device.
        device: DeviceSpec,
        #[command(flatten)]
        reach: Reach,
    },
}

#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// Add a port. One that is like this already is left as it is.
    Add(PortAdd),
    /// Remove a port: its front-end is disconnected and its device let go.
    Remove {
        /// Its name.
        #[arg(value_parser = value::name)]
        name: String,
        #[command(flatten)]
        reach: Reach,
    },
}

#[derive(Debug, Args)]
pub struct PortAdd {
    /// Its name in logs, counters and commands.
    #[arg(value_parser = value::name)]
    name: String,
    #[command(flatten)]
    reach: Reach,
    /// Socket at the guest's end. The process makes it and listens, unless --client is given.
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    socket_path: PathBuf,
    #[arg(
        long, value_name = "OCTAL", value_parser = port::socket_mode, conflicts_with = "client",
        help = format!("Permission bits of the socket that is made [default: {:04o}]", defaults::SOCKET_MODE),
    )]
    socket_mode: Option<u32>,
    /// Connect to --socket-path, where the VMM listens (QEMU: server=on).
    #[arg(long)]
    client: bool,
    /// Device at the wire's end. Without it the port has none until one is attached.
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceOrNone>,
    /// The map that holds the guest's memory. The map main is made if there is none.
    #[arg(long, value_name = "NAME", default_value = defaults::MAP_NAME, value_parser = value::name)]
    map: String,
    /// Largest packet without the Ethernet header, 68 to 1500.
    #[arg(
        long, value_name = "BYTES", default_value_t = defaults::MTU, value_parser = port::mtu,
        allow_negative_numbers = true
    )]
    mtu: u16,
    /// Most queue pairs the guest may use, 1 to 16, as the card has them.
    #[arg(
        long, value_name = "N", default_value_t = defaults::QUEUE_PAIRS, value_parser = rss::queue_pairs,
        allow_negative_numbers = true
    )]
    queue_pairs: u16,
    /// Key by which frames are spread over the pairs, 40 bytes in hexadecimal. Without it one is drawn.
    #[arg(long, value_name = "KEY")]
    rss_key: Option<RssKey>,
    /// Poll this many microseconds before sleeping; 0 sleeps at once, `always` never sleeps.
    #[arg(
        long, value_name = "MICROSECONDS|always", default_value_t = defaults::POLL, allow_negative_numbers = true
    )]
    poll_us: Poll,
}

impl From<ControlCommand> for Command {
    fn from(command: ControlCommand) -> Self {
        let mut form = AnswerForm::Text;
        let (reach, order) = match command {
            ControlCommand::Stats { reach, buffers } => {
                form = AnswerForm::Json;
                (reach, Order::Stats { buffers })
            }
            ControlCommand::Map(MapCommand::Create {
                name,
                reach,
                iommu,
                map_by,
            }) => (reach, Order::MapCreate(MapConfig { name, iommu, map_by })),
            ControlCommand::Map(MapCommand::Destroy { name, reach }) => (reach, Order::MapDestroy { name }),
            ControlCommand::Map(MapCommand::Check { name, reach }) => (reach, Order::MapCheck { name }),
            ControlCommand::Map(MapCommand::Show { name, reach, json }) => {
                if json {
                    form = AnswerForm::Json;
                }
                (reach, Order::MapShow { name })
            }
            ControlCommand::Device(DeviceCommand::Attach { device, reach, port }) => {
                let device = from_anywhere(device);
                (reach, Order::DeviceAttach { device, port })
            }
            ControlCommand::Device(DeviceCommand::Detach { device, reach }) => {
                let device = from_anywhere(device);
                (reach, Order::DeviceDetach { device })
            }
            ControlCommand::Port(PortCommand::Add(port)) => port.order(),
            ControlCommand::Port(PortCommand::Remove { name, reach }) => (reach, Order::PortRemove { name }),
        };
        Self::Ask {
            control: reach.control,
            order,
            form,
        }
    }
}

impl PortAdd {
    fn order(self) -> (Reach, Order) {
        let path = absolute(self.socket_path);
        let socket = if self.client {
            SocketSpec::Connect { path }
        } else {
            SocketSpec::Listen {
                path,
                mode: self.socket_mode.unwrap_or(defaults::SOCKET_MODE),
            }
        };
        let order = Order::PortAdd(PortConfig {
            name: self.name,
            device: self
                .device
                .and_then(|DeviceOrNone(device)| device)
                .map(from_anywhere),
            socket,
            map: self.map,
            poll: self.poll_us,
            mtu: self.mtu,
            queue_pairs: self.queue_pairs,
            rss_key: self.rss_key,
        });
        (self.reach, order)
    }
}

/// The running process may be in another folder than whoever types.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn from_anywhere(device: DeviceSpec) -> DeviceSpec {
    match device {
        DeviceSpec::VfioUser(path) => DeviceSpec::VfioUser(absolute(path)),
        other => other,
    }
}

/// Reads a socket's path.
pub(crate) fn socket_path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| -> Result<_, ValueError> { port::socket_path(path) })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Config, ParseError, parse};

    /// Parses what is typed after the program's name. No argument of these tests has a blank inside.
    fn typed(line: &str) -> Result<Command, ParseError> {
        parse(["vhost-user-vfio"].into_iter().chain(line.split_whitespace()))
    }

    #[test]
    fn stats_asks_a_running_process() {
        for (flag, buffers) in [("", false), (" --buffers", true)] {
            let asked = asked(&format!("stats{flag} --control /run/c"));
            assert_eq!(asked, (Order::Stats { buffers }, AnswerForm::Json));
        }
        assert!(
            typed("stats")
                .unwrap_err()
                .to_string()
                .contains("--control <PATH>")
        );
        assert_eq!(typed("statz --control c").unwrap_err().exit_code(), 2);
        assert_eq!(
            typed("--device tap:t stats --control c").unwrap_err().exit_code(),
            2
        );
    }

    fn asked(line: &str) -> (Order, AnswerForm) {
        match typed(line) {
            Ok(Command::Ask { control, order, form }) => {
                assert_eq!(control, Path::new("/run/c"));
                (order, form)
            }
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn maps_devices_and_ports_are_asked_for_over_the_control_socket() {
        let order = |line: &str| asked(&format!("{line} --control /run/c")).0;
        let name = || "x".to_owned();
        assert_eq!(
            order("map create x --iommu vfio-user --map-by file"),
            Order::MapCreate(MapConfig {
                name: name(),
                iommu: IommuChoice::VfioUser,
                map_by: MapBy::File,
            })
        );
        assert_eq!(order("map destroy x"), Order::MapDestroy { name: name() });
        assert_eq!(order("map check"), Order::MapCheck { name: None });
        assert_eq!(order("map show"), Order::MapShow { name: None });
        assert_eq!(
            asked("map show x --json --control /run/c"),
            (Order::MapShow { name: Some(name()) }, AnswerForm::Json)
        );
        let device: DeviceSpec = "0000:01:00.0".parse().unwrap();
        assert_eq!(
            order("device attach 01:00.0 --port x"),
            Order::DeviceAttach {
                device: device.clone(),
                port: name()
            }
        );
        assert_eq!(order("device detach 01:00.0"), Order::DeviceDetach { device });
        assert_eq!(order("port remove x"), Order::PortRemove { name: name() });
        let port = |name: &str, device: &str, rest: &str| {
            let text = format!("[map.b]\n[port.{name}]\ndevice = '{device}'\n{rest}");
            Order::PortAdd(Config::from_toml(&text).unwrap().ports.remove(0))
        };
        assert_eq!(
            order("port add x --socket-path /run/x"),
            port("x", "none", "socket-path = '/run/x'")
        );
        assert_eq!(
            order(
                "port add x --socket-path /run/x --socket-mode 660 --device 01:00.0 --map b --mtu 1400 --poll-us \
                 always --queue-pairs 8"
            ),
            port(
                "x",
                "01:00.0",
                "socket-path = '/run/x'\nsocket-mode = 0o660\nmap = 'b'\nmtu = 1400\npoll-us = 'always'\nqueue-pairs = 8"
            )
        );
        assert_eq!(
            order("port add x --socket-path /run/x --client"),
            port("x", "none", "socket-path = '/run/x'\nclient = true")
        );
    }

    /// The running process may be in another folder.
    #[test]
    fn paths_in_commands_are_made_absolute() {
        let here = std::env::current_dir().unwrap();
        let (order, _) = asked("port add x --socket-path vm0 --device vfio-user:card --control /run/c");
        let Order::PortAdd(port) = order else {
            panic!("{order:?}")
        };
        assert_eq!(port.socket.path(), Some(here.join("vm0").as_path()));
        assert_eq!(port.device, Some(DeviceSpec::VfioUser(here.join("card"))));
    }

    #[test]
    fn a_commands_values_are_refused_in_the_files_words() {
        for (line, text) in [
            ("map create a.b --control c", "name `a.b` is not usable"),
            (
                "map create x --iommu tpye1 --control c",
                "`tpye1` is not one of auto, iommufd, type1, none, vfio-user; did you mean `type1`?",
            ),
            (
                "device attach none --port x --control c",
                "`none` is not a device",
            ),
            (
                "port add x --socket-path s --mtu 9000 --control c",
                "mtu 9000 is above 1500",
            ),
            ("port add x --control c", "--socket-path <PATH>"),
            (
                "port add x --socket-path s --client --socket-mode 600 --control c",
                "cannot be used with",
            ),
            ("map destroy x", "--control <PATH>"),
            ("map", "Usage"),
        ] {
            let error = typed(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            let shown = crate::chain(&error);
            assert!(shown.contains(text), "{line}: {shown}");
        }
    }
}
