//! The command line: one port from flags, or any number from a file.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgGroup, ArgMatches, Args, CommandFactory, FromArgMatches, Parser};

use crate::command::{ControlCommand, socket_path};
use crate::device::DeviceOrNone;
use crate::map::{IommuChoice, MapBy, MapConfig};
use crate::port::{self, Poll, PortConfig, SocketSpec};
use crate::process::{CpuList, LogLevel};
use crate::rss::{self, RssKey};
use crate::value::{self, ValueError};
use crate::{Command, Config, ParseError, defaults, file};

const EXAMPLES: &str = "\
Examples:
  One VM on one card, beside QEMU with -chardev socket,path=/run/vm0.sock:
    vhost-user-vfio --device 0000:01:00.0 --socket-path /run/vm0.sock --control /run/vuv.sock

  No card at hand: the same front-end against a tap interface:
    vhost-user-vfio --device tap:vm0 --socket-path /run/vm0.sock

  Several ports, workers pinned to CPUs 2 and 3:
    vhost-user-vfio --config /etc/vhost-user-vfio.toml --cpus 2,3

  The counters of a running process, as JSON:
    vhost-user-vfio stats --control /run/vuv.sock

  Another card and another VM for a running process, and the card taken away again:
    vhost-user-vfio port add vm1 --socket-path /run/vm1.sock --control /run/vuv.sock
    vhost-user-vfio device attach 0000:02:00.0 --port vm1 --control /run/vuv.sock
    vhost-user-vfio device detach 0000:02:00.0 --control /run/vuv.sock

SIGTERM stops the DMA, frees the memory and ends the process with status 0.";

/// Serves vhost-user network ports from a PCI card through VFIO, zero-copy.
///
/// Guest memory arrives over the vhost-user socket and goes into one shared IOMMU map; the card's DMA lands in
/// the guest's own virtqueue buffers. The guest sees plain virtio-net.
#[derive(Debug, Parser)]
#[command(name = "vhost-user-vfio", version, after_help = EXAMPLES, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group(
    ArgGroup::new("work")
        .args(["device", "socket_path", "fd", "config", "control", "print_capabilities"])
        .required(true)
        .multiple(true)
))]
#[command(group(ArgGroup::new("socket").args(["socket_path", "fd"])))]
struct Cli {
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    process: ProcessFlags,
    #[command(subcommand)]
    control: Option<ControlCommand>,
}

/// Everything a file says for itself, so that none of these stands beside `--config`.
#[derive(Debug, Args)]
struct PortFlags {
    /// Device at the wire's end: a PCI address bound to vfio-pci (0000:01:00.0 or 01:00.0), tap:NAME, or
    /// vfio-user:PATH, or none for a port that gets its device later. Wants --socket-path or --fd beside it. Without
    /// it, where there is no card: a tap interface with the port's name, which copies every frame. For measuring only:
    /// model, or model:rx=SIZE, with ,copy: a card played by this process, from which no frame leaves the machine.
    #[arg(long, value_name = "DEVICE", help_heading = "Port")]
    device: Option<DeviceOrNone>,

    /// Socket at the guest's end. We make it and listen, unless --client is given.
    #[arg(long, value_name = "PATH", help_heading = "Port", value_parser = socket_path())]
    socket_path: Option<PathBuf>,

    #[arg(
        long, value_name = "OCTAL", help_heading = "Port", value_parser = port::socket_mode,
        conflicts_with_all = ["client", "fd"],
        help = format!("Permission bits of the socket we make [default: {:04o}]", defaults::SOCKET_MODE),
    )]
    socket_mode: Option<u32>,

    /// Connect to --socket-path, where the VMM listens (QEMU: server=on).
    #[arg(long, help_heading = "Port", conflicts_with = "fd")]
    client: bool,

    /// Use the socket left open at this file descriptor by whoever starts the process.
    #[arg(long, value_name = "N", help_heading = "Port", value_parser = port::fd, allow_negative_numbers = true)]
    fd: Option<i32>,

    /// Name of the port in logs and counters.
    #[arg(long, help_heading = "Port", default_value = defaults::PORT_NAME, value_parser = value::name)]
    name: String,

    /// Poll this many microseconds before sleeping; 0 sleeps at once, `always` never sleeps.
    #[arg(
        long, value_name = "MICROSECONDS|always", help_heading = "Port", default_value_t = defaults::POLL,
        allow_negative_numbers = true
    )]
    poll_us: Poll,

    /// Largest packet without the Ethernet header, 68 to 1500.
    #[arg(
        long, value_name = "BYTES", help_heading = "Port", default_value_t = defaults::MTU,
        value_parser = port::mtu, allow_negative_numbers = true
    )]
    mtu: u16,

    /// Most queue pairs the guest may use, 1 to 16, as the card has them. Those the guest has on share what comes in.
    #[arg(
        long, value_name = "N", help_heading = "Port", default_value_t = defaults::QUEUE_PAIRS,
        value_parser = rss::queue_pairs, allow_negative_numbers = true
    )]
    queue_pairs: u16,

    /// Key by which frames are spread over the pairs, 40 bytes in hexadecimal. Without it one is drawn.
    #[arg(long, value_name = "KEY", help_heading = "Port")]
    rss_key: Option<RssKey>,

    /// Kernel interface to the IOMMU. auto takes iommufd where this user can open it, else type1; without a PCI
    /// device it takes none.
    #[arg(long, value_name = "KIND", help_heading = "Memory map", value_enum, default_value_t = defaults::IOMMU)]
    iommu: IommuChoice,

    /// How guest memory is named to it. auto goes by file where the kernel can, else by address.
    #[arg(long, value_name = "WAY", help_heading = "Memory map", value_enum, default_value_t = defaults::MAP_BY)]
    map_by: MapBy,
}

/// What is said once for the process. Beside `--config` these override the file.
#[derive(Debug, Args)]
struct ProcessFlags {
    /// Read ports, maps and the settings below from a TOML file. --control, --cpus and --log override it.
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    config: Option<PathBuf>,

    /// Listen here for control commands such as `stats` (mode 0600). Enough to start with: ports can be added by it.
    #[arg(long, value_name = "PATH", help_heading = "Process", value_parser = socket_path())]
    control: Option<PathBuf>,

    /// One worker for each of these CPUs, such as 2,3 or 2-3. Without it one worker runs anywhere.
    #[arg(
        long,
        value_name = "LIST",
        help_heading = "Process",
        allow_hyphen_values = true
    )]
    cpus: Option<CpuList>,

    #[arg(
        long, value_name = "LEVEL", help_heading = "Process", value_enum,
        help = format!("Least severe log lines to write [default: {}]", defaults::LOG),
    )]
    log: Option<LogLevel>,

    /// Print what this back-end can do, as JSON for management software, and exit. Other flags are ignored.
    #[arg(long, help_heading = "Process")]
    print_capabilities: bool,
}

/// Makes of the program's arguments, its own name first, what is to be done.
///
/// Reads the file that `--config` names and nothing else. Does not print: see [`ParseError::print`].
///
/// # Errors
///
/// [`ParseError`], among them the requests for help and version, which are errors only in that there is nothing
/// left to do.
pub fn parse<I>(args: I) -> Result<Command, ParseError>
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    let matches = Cli::command().try_get_matches_from(only_capabilities(args))?;
    let cli = Cli::from_arg_matches(&matches)?;
    if let Some(command) = cli.control {
        return Ok(command.into());
    }
    if cli.process.print_capabilities {
        return Ok(Command::PrintCapabilities);
    }

    if let Some(path) = &cli.process.config {
        refuse_port_flags(&matches)?;
        return from_file(path, &cli.process).map(Command::Run);
    }
    let config = if given_port_flag(&matches).is_some() {
        one_port(cli.port, cli.process)?
    } else {
        no_port(cli.process)
    };
    Ok(Command::Run(config.settled()?))
}

/// Drops all other arguments where `--print-capabilities` is among them: the convention of vhost-user back-end
/// programs wants them ignored, whatever they are.
fn only_capabilities<I>(args: I) -> Vec<OsString>
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    let mut args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let flag = OsString::from("--print-capabilities");
    if args
        .iter()
        .skip(1)
        .take_while(|arg| *arg != "--")
        .any(|arg| *arg == flag)
    {
        args.truncate(1);
        args.push(flag);
    }
    args
}

/// With a file, the ports come from it. A flag that would be silently lost is refused instead.
fn refuse_port_flags(matches: &ArgMatches) -> Result<(), clap::Error> {
    let Some(flag) = given_port_flag(matches) else {
        return Ok(());
    };
    let key = flag.get_long().unwrap_or_default();
    let table = if flag.get_help_heading() == Some("Port") {
        "port"
    } else {
        "map"
    };
    let place = match key {
        "name" => "is the NAME in its [port.NAME]".to_owned(),
        _ => format!("is set by the key `{key}` in [{table}.NAME]"),
    };
    let text = format!("--{key} cannot stand beside --config: for the ports of a file it {place}");
    Err(Cli::command().error(ErrorKind::ArgumentConflict, text))
}

/// The first flag given that describes a port or its map.
fn given_port_flag(matches: &ArgMatches) -> Option<clap::Arg> {
    let flags = PortFlags::augment_args(clap::Command::new("port"));
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let mut flags = flags.get_arguments();
    flags.find(|flag| given(flag.get_id().as_str())).cloned()
}

/// A process whose ports all come later.
fn no_port(process: ProcessFlags) -> Config {
    Config {
        log: process.log.unwrap_or(defaults::LOG),
        control: process.control,
        workers: process.cpus.map_or_else(Vec::new, |cpus| cpus.0),
        maps: Vec::new(),
        ports: Vec::new(),
    }
}

fn from_file(path: &Path, flags: &ProcessFlags) -> Result<Config, ParseError> {
    let text = fs::read_to_string(path).map_err(|source| ParseError::ReadFile {
        path: path.to_owned(),
        source,
    })?;
    let in_file = |source| ParseError::File {
        path: path.to_owned(),
        source,
    };
    let mut config = file::read(&text).map_err(in_file)?;

    if let Some(control) = &flags.control {
        config.control = Some(control.clone());
    }
    if let Some(CpuList(cpus)) = &flags.cpus {
        config.workers.clone_from(cpus);
    }
    config.log = flags.log.unwrap_or(config.log);
    config.settled().map_err(|source| in_file(source.into()))
}

fn one_port(port: PortFlags, process: ProcessFlags) -> Result<Config, clap::Error> {
    // Not left to clap's `requires`, which would ask for a socket beside --config too.
    let missing = |text| Cli::command().error(ErrorKind::MissingRequiredArgument, text);
    let device = match port.device {
        Some(DeviceOrNone(device)) => device,
        // Where there is no card, there is a tap.
        None => Some(
            format!("tap:{}", port.name)
                .parse()
                .map_err(|error: ValueError| {
                    let text =
                        format!("without --device the port is a tap interface of its name, but {error}");
                    Cli::command().error(ErrorKind::ValueValidation, text)
                })?,
        ),
    };
    let socket = match (port.socket_path, port.fd) {
        (Some(path), _) if port.client => SocketSpec::Connect { path },
        (Some(path), _) => SocketSpec::Listen {
            path,
            mode: port.socket_mode.unwrap_or(defaults::SOCKET_MODE),
        },
        (None, Some(fd)) => SocketSpec::Inherited { fd },
        (None, None) => {
            return Err(missing(
                "a port wants exactly one of --socket-path PATH and --fd N",
            ));
        }
    };
    let map = defaults::MAP_NAME.to_owned();
    Ok(Config {
        maps: vec![MapConfig {
            name: map.clone(),
            iommu: port.iommu,
            map_by: port.map_by,
        }],
        ports: vec![PortConfig {
            name: port.name,
            device,
            socket,
            map,
            poll: port.poll_us,
            mtu: port.mtu,
            queue_pairs: port.queue_pairs,
            rss_key: port.rss_key,
        }],
        ..no_port(process)
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::process::Cpu;

    /// Parses what is typed after the program's name. No argument of these tests has a blank inside.
    fn typed(line: &str) -> Result<Command, ParseError> {
        parse(["vhost-user-vfio"].into_iter().chain(line.split_whitespace()))
    }

    fn config(line: &str) -> Config {
        match typed(line) {
            Ok(Command::Run(config)) => config,
            other => panic!("{line}: {other:?}"),
        }
    }

    /// The part of an error's text before clap's usage, in one line, with the causes.
    fn error(line: &str) -> String {
        let error = typed(line).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        let text = crate::chain(&error);
        let message = text.split("\n\n").next().unwrap_or_default();
        message.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn the_definition_of_the_flags_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn one_port_from_flags() {
        let all = config(&format!(
            "--device 01:00.0 --socket-path /run/vm7.sock --socket-mode 0660 --iommu type1 --map-by address \
             --cpus 2-3 --poll-us always --mtu 1400 --control /run/vuv.sock --name vm7 --log debug --queue-pairs 4 \
             --rss-key {}",
            "6d".repeat(40)
        ));
        assert_eq!(all.log, LogLevel::Debug);
        assert_eq!(all.control, Some("/run/vuv.sock".into()));
        assert_eq!(all.workers, [Cpu(2), Cpu(3)]);
        let map = MapConfig {
            name: "main".to_owned(),
            iommu: IommuChoice::Type1,
            map_by: MapBy::Address,
        };
        assert_eq!(all.maps, [map]);
        let port = PortConfig {
            name: "vm7".to_owned(),
            device: Some("0000:01:00.0".parse().unwrap()),
            socket: SocketSpec::Listen {
                path: "/run/vm7.sock".into(),
                mode: 0o660,
            },
            map: "main".to_owned(),
            poll: Poll::Always,
            mtu: 1400,
            queue_pairs: 4,
            rss_key: Some(RssKey([0x6d; 40])),
        };
        assert_eq!(all.ports, [port]);
    }

    #[test]
    fn flags_and_file_have_the_same_defaults() {
        let text = "[port.vm0]\ndevice = '01:00.0'\nsocket-path = 's'";
        assert_eq!(
            config("--device 01:00.0 --socket-path s"),
            Config::from_toml(text).unwrap()
        );
        let text = "[port.vm0]\ndevice = 'tap:t'\nfd = 3";
        assert_eq!(config("--device tap:t --fd 3"), Config::from_toml(text).unwrap());
    }

    #[test]
    fn client_connects_where_the_vmm_listens() {
        let socket = config("--device tap:t --client --socket-path s")
            .ports
            .remove(0)
            .socket;
        assert_eq!(socket, SocketSpec::Connect { path: "s".into() });
    }

    #[test]
    fn a_port_wants_a_device_and_one_socket() {
        assert_eq!(
            error(""),
            "error: the following required arguments were not provided: \
             <--device <DEVICE>|--socket-path <PATH>|--fd <N>|--config <FILE>|--control <PATH>|--print-capabilities>"
        );
        for line in [
            "--device tap:t",
            "--device tap:t --client",
            "--control c --mtu 1400",
        ] {
            assert_eq!(
                error(line),
                "error: a port wants exactly one of --socket-path PATH and --fd N"
            );
        }
        assert_eq!(
            error("--device tap:t --socket-path s --fd 3"),
            "error: the argument '--socket-path <PATH>' cannot be used with '--fd <N>'"
        );
        for other in ["--client --socket-path s", "--fd 3"] {
            assert!(
                error(&format!("--device tap:t --socket-mode 600 {other}")).contains("cannot be used with")
            );
        }
    }

    #[test]
    fn where_there_is_no_card_there_is_a_tap() {
        assert_eq!(
            config("--socket-path s"),
            config("--device tap:vm0 --socket-path s")
        );
        assert_eq!(
            config("--fd 3 --name lab"),
            config("--device tap:lab --fd 3 --name lab")
        );
        let long = error("--socket-path s --name a-name-too-long-for-linux");
        assert!(
            long.starts_with("error: without --device the port is a tap interface of its name, but "),
            "{long}"
        );
    }

    #[test]
    fn a_flags_value_is_refused_in_the_files_words() {
        assert_eq!(
            error("--device eth0 --fd 3"),
            "error: invalid value 'eth0' for '--device <DEVICE>': `eth0` is not a device; accepted are a PCI \
             address (0000:01:00.0 or 01:00.0), tap:NAME and vfio-user:PATH"
        );
        for (flag, value, text) in [
            ("--mtu", "9000", "mtu 9000 is above 1500"),
            ("--mtu", "-1", "`-1` is not a whole number from 68 to 1500"),
            ("--queue-pairs", "-1", "`-1` is not a whole number from 1 to 16"),
            ("--rss-key", "6d5a", "`6d5a` is not an RSS key"),
            ("--poll-us", "-1", "`-1` is not a polling time"),
            ("--fd", "-1", "`-1` is not a file descriptor to inherit"),
            ("--socket-mode", "rw", "`rw` is not a socket mode"),
            ("--cpus", "3-2", "CPU range 3-2 runs backwards"),
            ("--cpus", "-1", "`-1` is not a list of CPUs"),
            ("--name", "a.b", "name `a.b` is not usable"),
            ("--iommu", "none", "[possible values: auto, iommufd, type1]"),
            ("--map-by", "name", "[possible values: auto, file, address]"),
            ("--log", "inof", "a similar value exists: 'info'"),
        ] {
            let error = crate::chain(&typed(&format!("--device tap:t {flag} {value}")).unwrap_err());
            assert!(
                error.contains(text) && error.contains(flag),
                "{flag} {value}: {error}"
            );
        }
        let long = "x".repeat(108);
        for line in [
            format!("--socket-path {long}"),
            format!("--control {long}"),
            format!("stats --control {long}"),
        ] {
            assert!(
                error(&line)
                    .contains("the path is 108 bytes long, and a Unix socket address has room for 107")
            );
        }
    }

    #[test]
    fn a_flag_nobody_knows_is_answered_with_the_nearest() {
        let error = typed("--device tap:t --socket-pth s").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("a similar argument exists: '--socket-path'"),
            "{error}"
        );
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn flags_contradict_each_other_as_keys_do() {
        assert_eq!(
            error("--device tap:t --socket-path c --control ./c"),
            "`port.vm0.socket-path` is c, which is the control socket's path"
        );
    }

    #[test]
    fn process_wide_flags_override_the_file() {
        let file = file("control = 'c'\ncpus = [1]\nlog = 'warn'\n[port.a]\ndevice = 'tap:t'\nfd = 3\n");
        let path = file.path().display();
        let plain = config(&format!("--config {path}"));
        assert_eq!(
            (plain.control, plain.workers, plain.log),
            (Some("c".into()), vec![Cpu(1)], LogLevel::Warn)
        );
        let over = config(&format!("--config {path} --control d --cpus 4,5 --log trace"));
        assert_eq!(
            (over.control, over.workers, over.log, over.ports),
            (
                Some("d".into()),
                vec![Cpu(4), Cpu(5)],
                LogLevel::Trace,
                plain.ports
            )
        );
    }

    #[test]
    fn the_files_keys_are_checked_against_the_flags_that_override_them() {
        let file = file("control = 's'\n[port.a]\ndevice = 'tap:t'\nsocket-path = 's'\n");
        let path = file.path().display();
        assert_eq!(
            error(&format!("--config {path}")),
            format!(
                "cannot use config file {path}: `port.a.socket-path` is s, which is the control socket's path"
            )
        );
        assert_eq!(
            config(&format!("--config {path} --control c")).control,
            Some("c".into())
        );
    }

    #[test]
    fn a_port_flag_beside_config_is_told_its_key() {
        for (flag, place) in [
            ("--device tap:t", "is set by the key `device` in [port.NAME]"),
            (
                "--socket-path s",
                "is set by the key `socket-path` in [port.NAME]",
            ),
            (
                "--socket-mode 600",
                "is set by the key `socket-mode` in [port.NAME]",
            ),
            ("--client", "is set by the key `client` in [port.NAME]"),
            ("--fd 3", "is set by the key `fd` in [port.NAME]"),
            ("--poll-us 50", "is set by the key `poll-us` in [port.NAME]"),
            ("--mtu 1500", "is set by the key `mtu` in [port.NAME]"),
            (
                "--queue-pairs 2",
                "is set by the key `queue-pairs` in [port.NAME]",
            ),
            ("--name a", "is the NAME in its [port.NAME]"),
            ("--iommu auto", "is set by the key `iommu` in [map.NAME]"),
            ("--map-by auto", "is set by the key `map-by` in [map.NAME]"),
        ] {
            let name = flag.split(' ').next().unwrap();
            assert_eq!(
                error(&format!("--config no-file.toml {flag}")),
                format!("error: {name} cannot stand beside --config: for the ports of a file it {place}")
            );
        }
    }

    #[test]
    fn an_unreadable_or_wrong_file_is_named() {
        assert_eq!(
            error("--config /nonexistent/x.toml"),
            "cannot read config file /nonexistent/x.toml: No such file or directory (os error 2)"
        );
        let file = file("[port.a]\npol-us = 1\n");
        let path = file.path().display();
        assert_eq!(
            error(&format!("--config {path}")),
            format!(
                "cannot use config file {path}: unknown key `port.a.pol-us` at line 2, did you mean `poll-us`?"
            )
        );
    }

    #[test]
    fn print_capabilities_ignores_whatever_stands_beside_it() {
        for line in [
            "--print-capabilities",
            "--print-capabilities --fd 3 --socket-path s --no-such-flag",
            "stats --print-capabilities",
            "--mtu x --print-capabilities",
        ] {
            assert_eq!(typed(line).unwrap(), Command::PrintCapabilities, "{line}");
        }
        assert!(typed("-- --print-capabilities").is_err());
    }

    #[test]
    fn a_control_socket_is_enough_to_start_with() {
        let config = config("--control /run/c --cpus 1 --log warn");
        assert_eq!((config.maps.len(), config.ports.len()), (0, 0));
        assert_eq!((config.workers, config.log), (vec![Cpu(1)], LogLevel::Warn));
    }

    #[test]
    fn a_port_may_wait_for_its_device() {
        assert_eq!(config("--device none --socket-path s").ports[0].device, None);
    }

    #[test]
    fn help_and_version_are_no_failures() {
        let help = typed("--help").unwrap_err();
        assert_eq!(help.exit_code(), 0);
        let text = help.to_string();
        for word in [
            "Port:",
            "Memory map:",
            "Process:",
            "Examples:",
            "stats",
            "[default: 0600]",
            "[default: 50]",
        ] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        let version = typed("--version").unwrap_err();
        assert_eq!(version.exit_code(), 0);
        assert_eq!(
            version.to_string(),
            format!("vhost-user-vfio {}\n", env!("CARGO_PKG_VERSION"))
        );
    }

    proptest! {
        #[test]
        fn any_arguments_are_read_or_refused(
            args in proptest::collection::vec(
                prop_oneof![
                    "--(device|socket-path|socket-mode|client|fd|iommu|map-by|cpus|poll-us|mtu|queue-pairs|rss-key|control|name|log)",
                    "(tap:|vfio-user:|0000:01:00\\.)?[0-9a-z,-]{0,9}",
                    "\\PC{0,20}",
                ],
                0..12,
            )
        ) {
            let _ = parse(std::iter::once("vhost-user-vfio".to_owned()).chain(args));
        }
    }
}
