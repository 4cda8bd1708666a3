//! Measures how long the back end takes to map a guest's memory, to map it for a second socket, and to take it away.
//!
//! ```text
//! memfd ──ADD_MEM_REG──▶ first port's socket  ──▶ reply      first
//!   └─────ADD_MEM_REG──▶ second port's socket ──▶ reply      second: the same memory, on the same map
//!         REM_MEM_REG ──▶ second, then first  ──▶ reply      away
//! ```
//!
//! The times are a front-end's: from the message's first byte to the reply's last, both sides of the socket included.
//! Medians of several rounds. What is not asked for is not measured: no frame flows.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use tests::frontend::connection::Connection;
use tests::frontend::memory::{Backing, GuestMemory, Plan};
use tests::frontend::vmm::{Manner, Session};

/// Times what the back end does with a memory table.
#[derive(Parser)]
struct Cli {
    /// The first port's socket.
    #[arg(long)]
    first: PathBuf,
    /// The socket of a second port on the same map.
    #[arg(long)]
    second: PathBuf,
    /// Sizes of guest memory, in GiB.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    gib: Vec<u64>,
    /// What the memory is made of.
    #[arg(long, value_enum, default_value = "sparse")]
    pages: Pages,
    /// How often each is measured.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// What each line begins with.
    #[arg(long, default_value = "")]
    label: String,
    /// Print the table's head and measure nothing.
    #[arg(long)]
    head: bool,
}

/// What guest memory is made of.
#[derive(Clone, Copy, ValueEnum)]
enum Pages {
    /// 4 KiB pages none of which exists: mapping for a device makes and clears them.
    Sparse,
    /// 4 KiB pages that were written.
    Present,
    /// 2 MiB pages that exist.
    Huge,
}

impl Pages {
    fn words(self) -> &'static str {
        match self {
            Self::Sparse => "4 KiB, sparse",
            Self::Present => "4 KiB, present",
            Self::Huge => "2 MiB, present",
        }
    }

    fn file(self, len: u64) -> Result<File> {
        let flags = match self {
            Self::Sparse | Self::Present => MemfdFlags::CLOEXEC,
            Self::Huge => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        };
        let file = File::from(memfd_create("guest-memory", flags).context("cannot make a memfd")?);
        ftruncate(&file, len)?;
        let none_left = || format!("there are not {len} bytes of memory to be had");
        match self {
            Self::Sparse => {}
            // Written: pages that are only reserved do not exist yet, and have to be made first.
            Self::Present => {
                let zeroes = vec![0; 1 << 20];
                for at in (0..len).step_by(zeroes.len()) {
                    file.write_all_at(&zeroes, at).with_context(none_left)?;
                }
            }
            Self::Huge => {
                fallocate(file.as_fd(), FallocateFlags::empty(), 0, len).with_context(none_left)?;
            }
        }
        Ok(file)
    }
}

/// The times of one round.
struct Round {
    first: Duration,
    second: Duration,
    second_away: Duration,
    first_away: Duration,
}

/// A reply to gibibytes of memory takes its time where the IOMMU is emulated.
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    run(&Cli::parse()).map_or_else(
        |error| {
            eprintln!("map-time: {error:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn run(cli: &Cli) -> Result<()> {
    if cli.head {
        println!(
            "{:<10} {:<16} {:>7} {:>12} {:>12} {:>13} {:>12}",
            "map", "memory", "GiB", "first", "second", "second away", "first away"
        );
        return Ok(());
    }
    for gib in &cli.gib {
        let len = gib << 30;
        let rounds = (0..cli.rounds)
            .map(|_| round(cli, len))
            .collect::<Result<Vec<_>>>()
            .with_context(|| format!("{gib} GiB, {}", cli.pages.words()))?;
        let of = |part: fn(&Round) -> Duration| shown(median(rounds.iter().map(part).collect()));
        println!(
            "{:<10} {:<16} {gib:>7} {:>12} {:>12} {:>13} {:>12}",
            cli.label,
            cli.pages.words(),
            of(|round| round.first),
            of(|round| round.second),
            of(|round| round.second_away),
            of(|round| round.first_away)
        );
    }
    Ok(())
}

fn round(cli: &Cli, len: u64) -> Result<Round> {
    let file = Arc::new(cli.pages.file(len)?);
    let memory = GuestMemory::new(&[Plan::new(0, len).backing(Backing::File(file))])?;
    let regions = memory.regions();
    let region = regions.first().context("the memory has one region")?;
    let (first, second) = (session(&cli.first, &memory)?, session(&cli.second, &memory)?);
    Ok(Round {
        first: timed(|| Ok(first.add_region(region)?))?,
        second: timed(|| Ok(second.add_region(region)?))?,
        second_away: timed(|| Ok(second.remove_region(region)?))?,
        first_away: timed(|| Ok(first.remove_region(region)?))?,
    })
}

fn session(socket: &Path, memory: &GuestMemory) -> Result<Session> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    let same = stream.try_clone()?;
    let connection = Connection::over(stream)?;
    same.set_read_timeout(Some(PATIENCE))?;
    Ok(Session::negotiate(connection, Manner::Qemu, memory, 0, 2)?)
}

fn timed(message: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begun = Instant::now();
    message()?;
    Ok(begun.elapsed())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn shown(time: Duration) -> String {
    match time.as_micros() {
        micros @ 0..10_000 => format!("{micros} us"),
        _ => format!("{} ms", time.as_millis()),
    }
}
