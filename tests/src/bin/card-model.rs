//! An 82576 as a process: a vfio-user server in front of the card model.
//!
//! It lives on when its client dies and takes the next one. Ends on SIGTERM, SIGINT or `quit` on the control
//! socket: with status 0 if no driver broke a rule, 3 if one did (the file named by `--violations` says how),
//! 1 if it could not start. What the control socket understands stands in `card::server::control`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tests::card::server::{Server, Settings};
use tests::card::{Options, Quirks};

#[derive(Parser)]
#[command(about = "An Intel 82576 network card, modelled strictly, served over vfio-user")]
struct Arguments {
    /// The vfio-user socket to serve
    #[arg(long)]
    socket: PathBuf,
    /// The datagram socket frames arrive at, one raw frame each
    #[arg(long)]
    wire_local: PathBuf,
    /// The datagram socket frames are sent to
    #[arg(long)]
    wire_peer: PathBuf,
    /// A socket for text commands
    #[arg(long)]
    control: Option<PathBuf>,
    /// A file for violations, one a line
    #[arg(long)]
    violations: Option<PathBuf>,
    /// The card's station address
    #[arg(long, default_value = "52:54:00:82:57:60", value_parser = parse_mac)]
    mac: [u8; 6],
    /// Err as QEMU's igb does
    #[arg(long)]
    qemu_quirks: bool,
    /// Fill receive buffers with garbage before they are used
    #[arg(long)]
    scribble: bool,
    /// Keep the card running when a client goes away
    #[arg(long)]
    keep_on_close: bool,
    /// Leave frames on the wire while no receive buffer is posted
    #[arg(long)]
    hold_frames: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let settings = Settings {
        socket: arguments.socket,
        wire_local: arguments.wire_local,
        wire_peer: arguments.wire_peer,
        control: arguments.control,
        violations: arguments.violations,
        mac: arguments.mac,
        options: Options {
            quirks: Quirks {
                qemu: arguments.qemu_quirks,
            },
            scribble: arguments.scribble,
            reset_quiet: Some(Duration::from_millis(1)),
        },
        keep_on_close: arguments.keep_on_close,
        hold_frames: arguments.hold_frames,
    };
    match run(settings) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(count) => {
            eprintln!("card-model: {count} violations");
            ExitCode::from(3)
        }
        Err(error) => {
            eprintln!("card-model: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Serves until told to end, and returns the number of violations.
fn run(settings: Settings) -> anyhow::Result<u64> {
    let (quit, ended) = mpsc::channel();
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let on_signal = quit.clone();
    thread::spawn(move || {
        for _ in signals.forever() {
            let _ = on_signal.send(());
        }
    });
    let server = Server::start(settings, quit)?;
    ended.recv()?;
    Ok(server.finish())
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("not a station address: {text}"))
}
