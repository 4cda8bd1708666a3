//! The TOML file: process-wide keys at the top, then one table for each map and each port.
//!
//! ```text
//! text ──section.rs──▶ tables with paths and lines ──value readers──▶ Config ──check.rs──▶ checked
//! ```
//!
//! Read with: `example.toml` beside this crate's manifest.

use std::path::PathBuf;

use crate::device::DeviceOrNone;
use crate::map::{self, MapConfig};
use crate::port::{self, PortConfig, SocketSpec};
use crate::process::{self, Cpu, CpuList};
use crate::rss;
use crate::section::{Entry, FileError, Place, Section};
use crate::value::{self, ValueError};
use crate::{Config, defaults};

/// What may stand where. The keys are the long flags without their dashes.
static PLACES: [Place; 3] = [
    Place {
        keys: &["log", "control", "cpus", "map", "port"],
        wording: "at the top of the file, before the first [table]",
    },
    Place {
        keys: &["iommu", "map-by"],
        wording: "in [map.NAME]",
    },
    Place {
        keys: &[
            "device",
            "socket-path",
            "socket-mode",
            "client",
            "fd",
            "map",
            "poll-us",
            "mtu",
            "queue-pairs",
            "rss-key",
        ],
        wording: "in [port.NAME]",
    },
];
static TOP: &Place = &PLACES[0];
static MAP: &Place = &PLACES[1];
static PORT: &Place = &PLACES[2];

impl Config {
    /// Reads the text of a configuration file.
    ///
    /// # Errors
    ///
    /// [`FileError`] for the first thing that is wrong, by the file's order where one table is concerned.
    pub fn from_toml(text: &str) -> Result<Self, FileError> {
        Ok(read(text)?.settled()?)
    }
}

/// Reads the text, and leaves the checks across keys for when flags have had their say.
pub(crate) fn read(text: &str) -> Result<Config, FileError> {
    crate::section::read_document(text, |top| {
        top.expect_keys(TOP, &PLACES)?;
        Ok(Config {
            log: or(top.get("log"), defaults::LOG, |entry| {
                entry.string(|text| value::choice(text, &[]))
            })?,
            control: or(top.get("control"), None, |entry| entry.string(path).map(Some))?,
            workers: or(top.get("cpus"), Vec::new(), cpus)?,
            maps: named(top.get("map"), "a table for each map, [map.NAME]", map)?,
            ports: named(top.get("port"), "a table for each port, [port.NAME]", port)?,
        })
    })
}

/// Reads the tables `[kind.NAME]`, in the file's order.
fn named<T>(
    kind: Option<Entry<'_>>,
    wanted: &'static str,
    read: fn(String, &Section<'_>) -> Result<T, FileError>,
) -> Result<Vec<T>, FileError> {
    let Some(kind) = kind else { return Ok(Vec::new()) };
    let each = |entry: Entry<'_>| read(entry.take(value::name(entry.name))?, &entry.section(wanted)?);
    kind.section(wanted)?.entries().into_iter().map(each).collect()
}

fn map(name: String, section: &Section<'_>) -> Result<MapConfig, FileError> {
    section.expect_keys(MAP, &PLACES)?;
    Ok(MapConfig {
        name,
        iommu: or(section.get("iommu"), defaults::IOMMU, |entry| {
            entry.string(map::iommu)
        })?,
        map_by: or(section.get("map-by"), defaults::MAP_BY, |entry| {
            entry.string(map::map_by)
        })?,
    })
}

fn port(name: String, section: &Section<'_>) -> Result<PortConfig, FileError> {
    section.expect_keys(PORT, &PLACES)?;
    Ok(PortConfig {
        name,
        device: section.require("device")?.string(str::parse::<DeviceOrNone>)?.0,
        socket: socket(section)?,
        map: or(section.get("map"), defaults::MAP_NAME.to_owned(), |entry| {
            entry.string(value::name)
        })?,
        poll: or(section.get("poll-us"), defaults::POLL, |entry| {
            entry.integer_or_string("microseconds or \"always\"", str::parse)
        })?,
        mtu: or(section.get("mtu"), defaults::MTU, |entry| {
            entry.integer(port::mtu)
        })?,
        queue_pairs: or(section.get("queue-pairs"), defaults::QUEUE_PAIRS, |entry| {
            entry.integer(rss::queue_pairs)
        })?,
        rss_key: or(section.get("rss-key"), None, |entry| {
            entry.string(str::parse).map(Some)
        })?,
    })
}

fn socket(section: &Section<'_>) -> Result<SocketSpec, FileError> {
    let (path_entry, fd_entry) = (section.get("socket-path"), section.get("fd"));
    let (mode_entry, client_entry) = (section.get("socket-mode"), section.get("client"));
    let one_of = |found| FileError::Socket {
        port: section.key.clone(),
        line: section.line,
        found,
    };

    let path = match (path_entry, fd_entry) {
        (Some(_), Some(_)) => return Err(one_of("both")),
        (None, None) => return Err(one_of("neither")),
        (Some(entry), None) => entry.string(path)?,
        (None, Some(entry)) => {
            if let Some(entry) = mode_entry.or(client_entry) {
                return Err(entry.meaningless("fd", "the socket is made already"));
            }
            return Ok(SocketSpec::Inherited {
                fd: entry.integer(port::fd)?,
            });
        }
    };
    if or(client_entry, false, |entry| entry.boolean())? {
        return match mode_entry {
            Some(entry) => Err(entry.meaningless("client", "the VMM makes the socket and sets its mode")),
            None => Ok(SocketSpec::Connect { path }),
        };
    }
    let mode = or(mode_entry, defaults::SOCKET_MODE, |entry| {
        entry.octal(port::socket_mode)
    })?;
    Ok(SocketSpec::Listen { path, mode })
}

fn cpus(entry: Entry<'_>) -> Result<Vec<Cpu>, FileError> {
    let wanted = "an array of numbers or a string such as \"2-3\"";
    let Some(elements) = entry.elements() else {
        return Ok(entry
            .string(str::parse::<CpuList>)
            .map_err(|error| match error {
                FileError::Type { .. } => entry.wrong_type(wanted),
                other => other,
            })?
            .0);
    };
    let mut list = CpuList(Vec::new());
    for element in elements {
        let cpu = element.integer(process::cpu)?;
        element.take(list.push(cpu))?;
    }
    Ok(list.0)
}

fn path(text: &str) -> Result<PathBuf, ValueError> {
    port::socket_path(text.into())
}

/// Reads an optional key.
fn or<'a, T>(
    entry: Option<Entry<'a>>,
    default: T,
    read: impl FnOnce(Entry<'a>) -> Result<T, FileError>,
) -> Result<T, FileError> {
    entry.map_or(Ok(default), read)
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use proptest::prelude::*;

    use super::*;
    use crate::map::{IommuChoice, MapBy};
    use crate::port::Poll;
    use crate::{DeviceSpec, LogLevel, PciAddress};

    const EXAMPLE: &str = include_str!("../example.toml");
    const PORT: &str = "[port.vm0]\ndevice = '01:00.0'\nsocket-path = 'a'\n";

    /// The error's text and its causes', as `main` shows them.
    fn error(text: &str) -> String {
        let error = Config::from_toml(text).unwrap_err();
        match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    /// The error a port with `line` as its fourth line gets.
    fn port_error(line: &str) -> String {
        error(&format!("{PORT}{line}\n"))
    }

    #[test]
    fn the_example_shows_every_key_and_parses() {
        for key in PLACES.iter().flat_map(|place| place.keys) {
            let shown = EXAMPLE
                .lines()
                .any(|line| line.starts_with(&format!("{key} = ")) || line.starts_with(&format!("[{key}.")));
            assert!(shown, "{key} is not in example.toml");
        }
        let config = Config::from_toml(EXAMPLE).unwrap();
        assert_eq!(config.log, LogLevel::Info);
        assert_eq!(config.control, Some("/run/vuv.sock".into()));
        assert_eq!(config.workers, [Cpu(2), Cpu(3)]);
        let map = |name: &str, iommu| MapConfig {
            name: name.to_owned(),
            iommu,
            map_by: MapBy::Auto,
        };
        assert_eq!(
            config.maps,
            [
                map("main", IommuChoice::Auto),
                map("tenant-b", IommuChoice::Iommufd)
            ]
        );
        let card = |function| {
            Some(DeviceSpec::Pci(PciAddress {
                domain: 0,
                bus: 1,
                device: 0,
                function,
            }))
        };
        let port = |name: &str, device, socket, map: &str, poll| PortConfig {
            name: name.to_owned(),
            device,
            socket,
            map: map.to_owned(),
            poll,
            mtu: 1500,
            queue_pairs: if name == "vm0" { 4 } else { 1 },
            rss_key: None,
        };
        let listen = SocketSpec::Listen {
            path: "/run/vm0.sock".into(),
            mode: 0o660,
        };
        let connect = SocketSpec::Connect {
            path: "/run/vm1.sock".into(),
        };
        let inherited = SocketSpec::Inherited { fd: 3 };
        let key = "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa";
        assert_eq!(
            config.ports,
            [
                PortConfig {
                    rss_key: Some(key.parse().unwrap()),
                    ..port("vm0", card(0), listen, "main", Poll::Micros(50))
                },
                port("vm1", card(1), connect, "tenant-b", Poll::Always),
                port(
                    "lab",
                    Some(DeviceSpec::Tap("lab0".to_owned())),
                    inherited,
                    "main",
                    Poll::Micros(50)
                ),
            ]
        );
    }

    #[test]
    fn what_is_left_out_takes_its_default() {
        let config = Config::from_toml(PORT).unwrap();
        assert_eq!(
            (config.log, config.control, config.workers),
            (defaults::LOG, None, vec![])
        );
        let main = MapConfig {
            name: "main".to_owned(),
            iommu: IommuChoice::Auto,
            map_by: MapBy::Auto,
        };
        assert_eq!(config.maps, [main]);
        let port = &config.ports[0];
        assert_eq!(
            port.socket,
            SocketSpec::Listen {
                path: "a".into(),
                mode: 0o600
            }
        );
        assert_eq!(
            (port.map.as_str(), port.poll, port.mtu),
            ("main", Poll::Micros(50), 1500)
        );
        assert_eq!((port.queue_pairs, port.rss_key), (1, None));
    }

    #[test]
    fn ports_and_maps_keep_the_files_order() {
        let port =
            |name| format!("[port.{name}]\ndevice = 'tap:{name}'\nsocket-path = '{name}'\nmap = '{name}'\n");
        let text = format!("[map.z]\n[map.a]\n{}{}", port("z"), port("a"));
        let config = Config::from_toml(&text).unwrap();
        assert_eq!(
            config
                .maps
                .iter()
                .map(|map| map.name.as_str())
                .collect::<Vec<_>>(),
            ["z", "a"]
        );
        assert_eq!(
            config
                .ports
                .iter()
                .map(|port| port.name.as_str())
                .collect::<Vec<_>>(),
            ["z", "a"]
        );
    }

    #[test]
    fn an_unknown_key_is_answered_with_its_path_line_and_nearest_known_key() {
        assert_eq!(
            port_error("\n# a comment\npol-us = 50"),
            "unknown key `port.vm0.pol-us` at line 6, did you mean `poll-us`?"
        );
        assert_eq!(
            error("ports = 1"),
            "unknown key `ports` at line 1, did you mean `port`?"
        );
        assert_eq!(
            error("[map.main]\nmap_by = 'file'"),
            "unknown key `map.main.map_by` at line 2, did you mean `map-by`?"
        );
        assert_eq!(
            error("[map.main]\n\"bad key\" = 1"),
            "unknown key `map.main.\"bad key\"` at line 2; known here are iommu, map-by"
        );
    }

    #[test]
    fn the_first_unknown_key_in_the_file_is_named() {
        assert_eq!(
            port_error("zz = 1\naa = 2").split(';').next(),
            Some("unknown key `port.vm0.zz` at line 4")
        );
    }

    #[test]
    fn a_key_in_the_wrong_table_is_told_its_place() {
        assert_eq!(
            port_error("iommu = 'type1'"),
            "unknown key `port.vm0.iommu` at line 4, which belongs in [map.NAME]"
        );
        assert_eq!(
            port_error("control = 'c'"),
            "unknown key `port.vm0.control` at line 4, which belongs at the top of the file, \
             before the first [table]"
        );
        assert_eq!(
            error("mtu = 1500"),
            "unknown key `mtu` at line 1, which belongs in [port.NAME]"
        );
    }

    #[test]
    fn text_that_is_not_toml_is_placed() {
        assert!(error("log = 'info'\ncpus = [1,").starts_with("line 2, column 11 is not TOML: "));
        assert!(
            error("log = 'info'\nlog = 'warn'").starts_with("line 2, column 1 is not TOML: duplicate key")
        );
        assert!(error(&format!("{PORT}{PORT}")).starts_with("line 4, column "));
        assert!(!error("a = \n b").contains('\n'));
    }

    #[test]
    fn a_port_may_wait_for_its_device() {
        let config = Config::from_toml("[port.vm0]\ndevice = 'none'\nsocket-path = 'a'").unwrap();
        assert_eq!(config.ports[0].device, None);
    }

    #[test]
    fn a_missing_device_is_named_with_its_table() {
        assert_eq!(
            error("\n[port.vm0]\nsocket-path = 'a'"),
            "`port.vm0` at line 2 has no `device`"
        );
    }

    #[test]
    fn a_value_of_the_wrong_type_is_told_the_right_one() {
        assert_eq!(
            port_error("mtu = '1500'"),
            "`port.vm0.mtu` at line 4 is a TOML string; wanted an integer"
        );
        assert_eq!(
            port_error("poll-us = 1.5"),
            "`port.vm0.poll-us` at line 4 is a TOML float; wanted microseconds or \"always\""
        );
        assert_eq!(
            port_error("client = 1"),
            "`port.vm0.client` at line 4 is a TOML integer; wanted true or false"
        );
        assert_eq!(
            port_error("socket-mode = true"),
            "`port.vm0.socket-mode` at line 4 is a TOML boolean; wanted an octal integer (0o660) or a string \
             (\"0660\")"
        );
        assert_eq!(
            error("log = 3"),
            "`log` at line 1 is a TOML integer; wanted a string"
        );
        assert_eq!(
            error("cpus = 2"),
            "`cpus` at line 1 is a TOML integer; wanted an array of numbers or a string such as \"2-3\""
        );
        assert_eq!(
            error("cpus = [\n1,\n'2']"),
            "`cpus[1]` at line 3 is a TOML string; wanted an integer"
        );
        assert_eq!(
            error("[[port]]"),
            "`port` at line 1 is a TOML array; wanted a table for each port, [port.NAME]"
        );
        assert_eq!(
            error("map.main = 'iommufd'"),
            "`map.main` at line 1 is a TOML string; wanted a table for each map, [map.NAME]"
        );
    }

    #[test]
    fn a_value_that_cannot_be_taken_is_refused_with_its_key_and_line() {
        assert_eq!(
            port_error("mtu = 9000"),
            "`port.vm0.mtu` at line 4 is refused: mtu 9000 is above 1500: a receive buffer holds one standard \
             frame, jumbo frames are not served yet"
        );
        assert_eq!(
            port_error("poll-us = -1"),
            "`port.vm0.poll-us` at line 4 is refused: `-1` is not a polling time; wanted microseconds from 0 \
             (never poll, sleep at once) to 4294967295, or `always`"
        );
        assert_eq!(
            error("[port.vm0]\ndevice = 'eth0'"),
            "`port.vm0.device` at line 2 is refused: `eth0` is not a device; accepted are a PCI address \
             (0000:01:00.0 or 01:00.0), tap:NAME and vfio-user:PATH"
        );
        assert_eq!(
            error("log = 'inof'"),
            "`log` at line 1 is refused: `inof` is not one of error, warn, info, debug, trace; \
             did you mean `info`?"
        );
        assert_eq!(
            error("[port.'a/b']"),
            "`port.\"a/b\"` at line 1 is refused: name `a/b` is not usable: wanted 1 to 32 of the letters a-z \
             and A-Z, digits, `-` and `_`"
        );
        assert_eq!(
            error(&format!("control = '{}'", "x".repeat(120))),
            "`control` at line 1 is refused: the path is 120 bytes long, and a Unix socket address has room for \
             107 (108 with the closing NUL)"
        );
        assert_eq!(
            error("cpus = [1, 2, 1]"),
            "`cpus[2]` at line 1 is refused: CPU 1 is listed twice, and would run two workers that poll in turns"
        );
    }

    #[test]
    fn a_socket_mode_is_octal_however_it_is_written() {
        for mode in ["0o660", "'660'", "'0660'", "'0o660'"] {
            let config = Config::from_toml(&format!("{PORT}socket-mode = {mode}")).unwrap();
            assert_eq!(
                config.ports[0].socket,
                SocketSpec::Listen {
                    path: "a".into(),
                    mode: 0o660
                }
            );
        }
        assert_eq!(
            port_error("socket-mode = 660"),
            "`port.vm0.socket-mode` at line 4 is refused: 660 is a decimal number, and a socket mode is octal: \
             write 0o660 or \"0660\""
        );
        assert_eq!(
            port_error("socket-mode = 0o4755"),
            "`port.vm0.socket-mode` at line 4 is refused: socket mode 4755 has bits outside 0777"
        );
    }

    #[test]
    fn cpus_are_an_array_or_a_list_in_a_string() {
        let cpus = |value: &str| {
            Config::from_toml(&format!("cpus = {value}\n{PORT}"))
                .unwrap()
                .workers
        };
        assert_eq!(cpus("[2, 3]"), [Cpu(2), Cpu(3)]);
        assert_eq!(cpus("'2-3,0'"), [Cpu(2), Cpu(3), Cpu(0)]);
        assert_eq!(cpus("[]"), []);
    }

    #[test]
    fn a_port_has_exactly_one_socket() {
        let port = |rest: &str| error(&format!("[port.a]\ndevice = 'tap:t'\n{rest}"));
        assert_eq!(
            port("fd = 3\nsocket-path = 's'"),
            "`port.a` at line 1 has both of `socket-path` and `fd`; a port has exactly one of them"
        );
        assert_eq!(
            port("mtu = 100"),
            "`port.a` at line 1 has neither of `socket-path` and `fd`; a port has exactly one of them"
        );
        assert_eq!(
            port("fd = 3\nclient = true"),
            "`port.a.client` at line 4 has no meaning beside `fd`: the socket is made already"
        );
        assert_eq!(
            port("socket-path = 's'\nsocket-mode = 0o600\nclient = true"),
            "`port.a.socket-mode` at line 4 has no meaning beside `client`: the VMM makes the socket and sets its \
             mode"
        );
        assert_eq!(
            port("fd = 2"),
            "`port.a.fd` at line 3 is refused: `2` is not a file descriptor to inherit; wanted a number from 3 to \
             2147483647, as 0, 1 and 2 are standard streams"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
            let _ = Config::from_toml(&text);
        }

        #[test]
        fn any_lines_of_a_configuration_are_read_or_refused(
            lines in proptest::collection::vec(
                prop_oneof![
                    proptest::sample::select(EXAMPLE.lines().collect::<Vec<_>>()).prop_map(str::to_owned),
                    "(control|cpus|log|map|port|port\\.a|device|fd|mtu|poll-us|queue-pairs|rss-key|socket-mode) = \\PC{0,20}",
                    "(device|fd|mtu|poll-us|queue-pairs|rss-key|socket-mode|cpus) = (-?[0-9_]{1,60}|0[xob][0-9a-f]{1,40}|\\[[0-9, ]*\\])",
                ],
                0..30,
            )
        ) {
            let _ = Config::from_toml(&lines.join("\n"));
        }

        #[test]
        fn a_damaged_example_is_read_or_refused(at in 0..EXAMPLE.len(), cut in 0usize..40, put in "\\PC{0,3}") {
            let end = (at + cut).min(EXAMPLE.len());
            let text = format!("{}{put}{}", &EXAMPLE[..at], &EXAMPLE[end..]);
            if let Err(error) = Config::from_toml(&text) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
