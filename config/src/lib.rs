//! What the operator asked for: command line and TOML file become one typed, checked [`Config`].
//!
//! ```text
//! argv ──cli.rs──┬──────────────── one port ──────────────┬──▶ check.rs ──▶ Config ──▶ backend
//!                ├─ --config FILE ─▶ section.rs ▶ file.rs ─┘
//!                └─ command.rs ─▶ order.rs ──control socket──▶ order.rs ──▶ backend of a running process
//! ```
//!
//! The crate stands alone: it knows no other crate of the workspace, opens nothing but the file it is told to
//! read, and hands `backend` plain data. A value that cannot work whatever the machine (a PCI function 9, a
//! socket path longer than the kernel's address, two ports on one card) is refused here, with the key's path
//! and line; what depends on the machine (no such device, no permission, a busy socket) is found by the crate
//! that opens it.
//!
//! Every value has one text form, and one function reads it for both sources. So `--mtu 9000` and `mtu = 9000`
//! are refused in the same words, and the keys of the file are the long flags without their dashes.
//!
//! Read with: `example.toml` beside this crate's manifest, which shows every key.

#![forbid(unsafe_code)]

mod check;
mod cli;
mod command;
mod device;
mod file;
mod map;
mod nearest;
mod order;
mod port;
mod process;
mod rss;
mod section;
mod value;

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;

pub use check::ConfigError;
pub use cli::parse;
pub use device::{DeviceSpec, ModelSpec, PciAddress};
pub use map::{IommuChoice, MapBy, MapConfig};
pub use nearest::nearest;
pub use order::{Order, OrderError};
pub use port::{Poll, PortConfig, SocketSpec, same_path};
pub use process::{Cpu, LogLevel};
pub use rss::RssKey;
pub use section::{FileError, KeyHint};
pub use value::ValueError;

/// What the process was started to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Serve the ports of this configuration until told to stop.
    Run(Config),
    /// Print the JSON by which management software knows a vhost-user back-end program, and exit with 0.
    PrintCapabilities,
    /// Ask the process that listens on `control`, and print what it answers.
    Ask {
        /// The control socket of the running process.
        control: PathBuf,
        /// What to ask.
        order: Order,
        /// How to print what was asked for.
        form: AnswerForm,
    },
}

/// How an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerForm {
    /// As it came: JSON.
    Json,
    /// For people.
    Text,
}

/// All that one process serves, and how.
///
/// As [`parse`] and [`Config::from_toml`] make it: there is a port, or a control socket to add one by; every [`PortConfig::map`] names
/// one of `maps`; no two ports share a device or a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The least severe log lines that are still written.
    pub log: LogLevel,
    /// Where the control socket listens; without one there is none.
    pub control: Option<PathBuf>,
    /// One worker for each CPU, pinned to it. Empty means one worker, free to move.
    pub workers: Vec<Cpu>,
    /// The memory maps, in the file's order. `main` comes first where it was not written down.
    pub maps: Vec<MapConfig>,
    /// The ports, in the file's order.
    pub ports: Vec<PortConfig>,
}

/// What holds where the operator says nothing.
pub mod defaults {
    use crate::{IommuChoice, LogLevel, MapBy, Poll};

    /// Name of the one port that flags describe.
    pub const PORT_NAME: &str = "vm0";
    /// The shared map that every port uses unless it names another.
    pub const MAP_NAME: &str = "main";
    /// Permission bits of a listening socket: only our own user connects.
    pub const SOCKET_MODE: u32 = 0o600;
    /// How long a worker polls before it sleeps.
    pub const POLL: Poll = Poll::Micros(50);
    /// Largest packet, without the Ethernet header.
    pub const MTU: u16 = 1500;
    /// Most queue pairs the guest may use.
    pub const QUEUE_PAIRS: u16 = 1;
    /// Log level.
    pub const LOG: LogLevel = LogLevel::Info;
    /// IOMMU interface of a map.
    pub const IOMMU: IommuChoice = IommuChoice::Auto;
    /// How guest memory is named to the IOMMU interface.
    pub const MAP_BY: MapBy = MapBy::Auto;
}

impl Config {
    /// The map `main` as it is made where nobody has said how, for a port with `device`.
    pub fn main_map_for(device: Option<&DeviceSpec>) -> MapConfig {
        let devices = std::iter::once(device);
        MapConfig {
            name: defaults::MAP_NAME.to_owned(),
            iommu: check::iommu_for(devices),
            map_by: defaults::MAP_BY,
        }
    }
}

/// Why there is no [`Command`] to carry out.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// The command line does not parse, or asked for help or the version.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The file named by `--config` cannot be read.
    #[error("cannot read config file {}", path.display())]
    ReadFile {
        /// As given on the command line.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file named by `--config` holds something that cannot be used.
    #[error("cannot use config file {}", path.display())]
    File {
        /// As given on the command line.
        path: PathBuf,
        /// Which key, where, and what is wrong with it.
        source: FileError,
    },
    /// The settings are right one by one and contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl ParseError {
    /// Returns the exit status to end with: 0 after help or version, 2 after anything wrong.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::CommandLine(error) if !error.use_stderr() => 0,
            _ => 2,
        }
    }

    /// Writes help and version to stdout, and an error with its causes, in one line, to stderr.
    ///
    /// A closed stream is no reason to fail harder: what cannot be written is dropped.
    pub fn print(&self) {
        // Nothing is left to tell and nobody to tell it to if the stream is gone.
        let _ = match self {
            Self::CommandLine(error) => error.print(),
            other => writeln!(io::stderr(), "error: {}", chain(other)),
        };
    }
}

/// Joins an error and its causes: `what was tried: why not: why that`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
