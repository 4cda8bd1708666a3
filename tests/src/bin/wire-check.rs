//! Sends checked frames over a path and says what became of them; exits with 1 unless all came through intact.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{ArgGroup, Args, Parser, Subcommand};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use tests::wire::{Limit, Mac, PacketSocket, Pattern, Run, Tally, echo, receive, round_trips, send, through};

/// Ethernet frames with a sequence number and known contents, over AF_PACKET.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Send frames and leave the checking to a receiver elsewhere.
    Send {
        /// The interface to send from.
        #[arg(long)]
        iface: String,
        /// At most this many frames a second; 0 is as fast as the interface takes them.
        #[arg(long, default_value_t = 0)]
        rate: u32,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Receive frames and check them.
    Receive {
        /// The interface to receive at.
        #[arg(long)]
        iface: String,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Check frames and send each back where it came from.
    Echo {
        /// The interface to use.
        #[arg(long)]
        iface: String,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Send one frame after the other to somebody who sends them back, and say how long each took.
    PingPong {
        /// The interface to use.
        #[arg(long)]
        iface: String,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Send at one interface and receive at another, with a bounded number under way.
    Through {
        /// The interface to send from.
        #[arg(long)]
        from: String,
        /// The interface to receive at.
        #[arg(long)]
        to: String,
        #[command(flatten)]
        run: RunArgs,
    },
}

#[derive(Args)]
#[command(group(ArgGroup::new("limit").required(true).args(["count", "seconds", "until_term"])))]
struct RunArgs {
    /// How many frames.
    #[arg(long)]
    count: Option<u64>,
    /// For how long.
    #[arg(long)]
    seconds: Option<u64>,
    /// Until SIGTERM; what is under way then is still waited for and checked.
    #[arg(long)]
    until_term: bool,
    /// Bytes of a frame: 64 (60 and the FCS a wire adds), or 60 to 9216 without FCS.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// The destination's address; default: everybody.
    #[arg(long, default_value = "ff:ff:ff:ff:ff:ff")]
    dst: Mac,
    /// Tells runs on one wire apart: the same at both ends.
    #[arg(long)]
    tag: Option<u32>,
    /// Make the run one flow of UDP, from this port; a frame has 90 bytes then, or more.
    #[arg(long)]
    flow: Option<u16>,
    /// Frames under way at once (through).
    #[arg(long, default_value_t = 64)]
    window: u64,
    /// How long nothing may come before the rest counts as lost.
    #[arg(long, default_value_t = 5000)]
    idle_ms: u64,
    /// How long the path may take to come up.
    #[arg(long, default_value_t = 120_000)]
    up_within_ms: u64,
    /// Print JSON instead of a line.
    #[arg(long)]
    json: bool,
}

impl RunArgs {
    fn run(&self, src: Mac, tag: u32) -> Result<Run> {
        let len_bytes = Pattern::len_bytes_of(self.size).map_err(anyhow::Error::msg)?;
        anyhow::ensure!(
            self.flow.is_none() || len_bytes >= Pattern::SHORTEST_OF_FLOW,
            "a frame of a flow has at least {} bytes",
            Pattern::SHORTEST_OF_FLOW
        );
        let limit = match (self.count, self.seconds) {
            (Some(frames), _) => Limit::Frames(frames),
            (None, Some(seconds)) => Limit::Time(Duration::from_secs(seconds)),
            (None, None) => Limit::Flag(told_to_end()?),
        };
        Ok(Run {
            pattern: Pattern {
                tag: self.tag.unwrap_or(tag),
                len_bytes,
                dst: self.dst,
                src,
                flow: self.flow,
            },
            limit,
            window: self.window,
            idle: Duration::from_millis(self.idle_ms),
            up_within: Duration::from_millis(self.up_within_ms),
        })
    }

    /// Prints the outcome and turns it into an exit status.
    fn report(&self, what: &str, tally: &Tally, took: Duration) -> Result<ExitCode> {
        if self.json {
            let mut value = serde_json::to_value(tally)?;
            value["path"] = what.into();
            value["missing"] = tally.missing().into();
            value["took_ms"] = u64::try_from(took.as_millis())?.into();
            println!("{value}");
        } else {
            println!(
                "{what}, {} bytes: {tally} ({:.1} s)",
                self.size,
                took.as_secs_f64()
            );
        }
        // Nothing expected and nothing come proves nothing.
        let proven = tally.is_perfect() && tally.intact > 0;
        Ok(if proven {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// A flag that SIGTERM sets.
fn told_to_end() -> Result<&'static AtomicBool> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let mut signals = Signals::new([SIGTERM]).context("cannot take SIGTERM")?;
    thread::spawn(move || {
        for _ in signals.forever() {
            TOLD.store(true, Ordering::Relaxed);
        }
    });
    Ok(&TOLD)
}

fn main() -> ExitCode {
    run(Cli::parse().mode).unwrap_or_else(|error| {
        eprintln!("wire-check: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(mode: Mode) -> Result<ExitCode> {
    let begun = Instant::now();
    match mode {
        Mode::Send {
            iface,
            rate,
            run: args,
        } => {
            let socket = PacketSocket::open(&iface)?;
            let gap = if rate == 0 {
                Duration::ZERO
            } else {
                Duration::from_secs(1) / rate
            };
            let sent = send(&socket, &args.run(socket.mac(), 0)?, gap)?;
            println!(
                "{iface}: {sent} frames of {} bytes sent ({:.1} s)",
                args.size,
                begun.elapsed().as_secs_f64()
            );
            Ok(ExitCode::SUCCESS)
        }
        Mode::Receive { iface, run: args } => {
            let socket = PacketSocket::open(&iface)?;
            let tally = receive(&socket, &args.run(socket.mac(), 0)?)?;
            args.report(&format!("at {iface}"), &tally, begun.elapsed())
        }
        Mode::Echo { iface, run: args } => {
            let socket = PacketSocket::open(&iface)?;
            let tally = echo(&socket, &args.run(socket.mac(), 0)?)?;
            args.report(&format!("{iface} and back"), &tally, begun.elapsed())
        }
        Mode::PingPong { iface, run: args } => {
            let socket = PacketSocket::open(&iface)?;
            let trips = round_trips(&socket, &args.run(socket.mac(), std::process::id())?)?;
            if args.json {
                let us = |percent| trips.percentile(percent).map(|time| time.as_secs_f64() * 1e6);
                println!(
                    "{}",
                    serde_json::json!({
                        "count": trips.count(), "lost": trips.lost, "median_us": us(50), "p99_us": us(99)
                    })
                );
            } else {
                println!("{iface} and back, {} bytes: {trips}", args.size);
            }
            let proven = trips.lost == 0 && trips.count() > 0;
            Ok(if proven {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Mode::Through { from, to, run: args } => {
            let (source, sink) = (PacketSocket::open(&from)?, PacketSocket::open(&to)?);
            // Two runs at once over the same wire must not count each other's frames.
            let run = args.run(source.mac(), std::process::id())?;
            let tally = through(&source, &sink, &run).context("the run broke off")?;
            args.report(&format!("{from} to {to}"), &tally, begun.elapsed())
        }
    }
}
