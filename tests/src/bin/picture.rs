//! Draws a run of the back end from what `vhost-user-vfio stats` says, and exits with 1 unless the run holds
//! what it claims: frames both ways, none of them copied.
//!
//! That nothing was copied is read twice: from the lanes' counters, and from the map. Memory to copy through is
//! mapped on first need only, so a map of guest memory and descriptor rings alone shows there never was a need.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Deserialize;

/// Draws a run from the output of `vhost-user-vfio stats`.
#[derive(Parser)]
struct Cli {
    /// The statistics as JSON; `-` reads them from standard input.
    stats: PathBuf,
    /// Who is on the guest's side, for the drawing.
    #[arg(long, default_value = "a guest")]
    guest: String,
    /// Who is at the other end of the wire, for the drawing.
    #[arg(long, default_value = "the wire")]
    peer: String,
    /// One line instead of the drawing.
    #[arg(long)]
    line: bool,
    /// Require this IOMMU back end.
    #[arg(long)]
    iommu: Option<String>,
    /// Require that guest memory was mapped so: file or address.
    #[arg(long)]
    map_by: Option<String>,
    /// Require at least this many frames in each direction.
    #[arg(long, default_value_t = 1)]
    at_least: u64,
    /// The device copies by its nature (tap): do not require zero-copy.
    #[arg(long)]
    copies: bool,
}

#[derive(Deserialize)]
struct Stats {
    ports: Vec<Port>,
    maps: Vec<Map>,
}

#[derive(Deserialize)]
struct Port {
    name: String,
    lanes: Vec<Lane>,
}

#[derive(Clone, Default, Deserialize)]
struct Lane {
    direction: String,
    frames: u64,
    bytes: u64,
    zero_copy_frames: u64,
    bounced_frames: u64,
    copied_bytes: u64,
    kicks: u64,
    notifications: u64,
    interrupts: u64,
    sleeps: u64,
}

#[derive(Deserialize)]
struct Map {
    name: String,
    iommu: String,
    extents: Vec<Extent>,
    mapped_bytes: u64,
    pinned_bytes: u64,
    devices: Vec<String>,
}

#[derive(Deserialize)]
struct Extent {
    iova: Number,
    len: u64,
    file: String,
    #[serde(default)]
    by: Option<String>,
    #[serde(default)]
    owners: Vec<String>,
}

/// An address as JSON has it: a number, or hexadecimal in a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(u64),
    Text(String),
}

impl Number {
    fn value(&self) -> Result<u64> {
        match self {
            Self::Plain(value) => Ok(*value),
            Self::Text(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16)
                .with_context(|| format!("{text} is no address")),
        }
    }
}

/// What a mapped range holds, told by the name of its file: our own memory comes from memfds called `vuv-…`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    GuestMemory,
    DescriptorRings,
    BounceMemory,
}

impl Holds {
    fn of(extent: &Extent) -> Self {
        match &extent.file {
            file if file.contains("vuv-rings") => Self::DescriptorRings,
            file if file.contains("vuv-") => Self::BounceMemory,
            _ => Self::GuestMemory,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::GuestMemory => "guest memory",
            Self::DescriptorRings => "descriptor rings",
            Self::BounceMemory => "bounce memory",
        }
    }
}

impl Stats {
    /// All lanes of one direction as if they were one.
    fn sum(&self, direction: &str) -> Lane {
        let mut sum = Lane {
            direction: direction.to_owned(),
            ..Lane::default()
        };
        let lanes = self.ports.iter().flat_map(|port| &port.lanes);
        for lane in lanes.filter(|lane| lane.direction == direction) {
            sum.frames += lane.frames;
            sum.bytes += lane.bytes;
            sum.zero_copy_frames += lane.zero_copy_frames;
            sum.bounced_frames += lane.bounced_frames;
            sum.kicks += lane.kicks;
            sum.notifications += lane.notifications;
            sum.interrupts += lane.interrupts;
            sum.sleeps += lane.sleeps;
            sum.copied_bytes += lane.copied_bytes;
        }
        sum
    }

    fn holds(&self, what: Holds) -> bool {
        self.extents().any(|extent| Holds::of(extent) == what)
    }

    fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.maps.iter().flat_map(|map| &map.extents)
    }

    /// What the run was to show and did not, each a sentence.
    fn faults(&self, cli: &Cli) -> Vec<String> {
        let mut faults = Vec::new();
        let mut require = |holds: bool, sentence: String| {
            if !holds {
                faults.push(sentence);
            }
        };
        for lane in [self.sum("tx"), self.sum("rx")] {
            let Lane {
                direction,
                frames,
                zero_copy_frames,
                bounced_frames,
                ..
            } = &lane;
            let at_least = cli.at_least;
            require(
                *frames >= at_least,
                format!("{direction}: {frames} frames, not {at_least} or more"),
            );
            if !cli.copies {
                require(
                    *bounced_frames == 0,
                    format!("{direction}: {bounced_frames} frames were copied"),
                );
                require(
                    zero_copy_frames == frames,
                    format!("{direction}: {zero_copy_frames} of {frames} frames zero-copy"),
                );
                require(
                    lane.copied_bytes == 0,
                    format!("{direction}: {} bytes were copied", lane.copied_bytes),
                );
            }
        }
        if !cli.copies {
            require(self.holds(Holds::GuestMemory), "no guest memory is mapped".into());
            require(
                self.holds(Holds::DescriptorRings),
                "no descriptor rings are mapped".into(),
            );
            require(
                !self.holds(Holds::BounceMemory),
                "memory to copy through is mapped".into(),
            );
        }
        if let Some(iommu) = &cli.iommu {
            let seen: Vec<_> = self.maps.iter().map(|map| map.iommu.as_str()).collect();
            require(seen == [iommu], format!("the map is {seen:?}, not {iommu}"));
        }
        if let Some(way) = &cli.map_by {
            let mut guest = self
                .extents()
                .filter(|extent| Holds::of(extent) == Holds::GuestMemory);
            require(
                guest.all(|extent| extent.by.as_ref() == Some(way)),
                format!("guest memory is not mapped by {way}"),
            );
        }
        faults
    }

    fn line(&self) -> Result<String> {
        let (tx, rx) = (self.sum("tx"), self.sum("rx"));
        let maps: Vec<_> = self
            .maps
            .iter()
            .map(|map| format!("{} {}", map.name, map.iommu))
            .collect();
        let mut ranges = Vec::new();
        for extent in self.extents() {
            let (by, words) = (extent.by.as_deref().unwrap_or("?"), Holds::of(extent).words());
            ranges.push(format!(
                "{words} {} at {:#x} by {by}",
                size(extent.len),
                extent.iova.value()?
            ));
        }
        Ok(format!(
            "map {}: {}; tx {} frames, {} zero-copy; rx {} frames, {} zero-copy; {} interrupts, {} sleeps",
            maps.join(", "),
            ranges.join(", "),
            tx.frames,
            share(&tx),
            rx.frames,
            share(&rx),
            tx.interrupts + rx.interrupts,
            tx.sleeps + rx.sleeps
        ))
    }

    fn drawing(&self, cli: &Cli) -> Result<String> {
        let mut out = String::new();
        let ports: Vec<_> = self.ports.iter().map(|port| port.name.as_str()).collect();
        let devices: Vec<_> = self
            .maps
            .iter()
            .flat_map(|map| &map.devices)
            .map(String::as_str)
            .collect();
        let device = if devices.is_empty() {
            "tap".to_owned()
        } else {
            devices.join(", ")
        };
        writeln!(out, "  {}", cli.guest)?;
        writeln!(out, "    │  virtqueues in shared memory")?;
        writeln!(out, "  vhost-user-vfio, port {}", ports.join(", "))?;
        match self.maps.iter().find(|map| !map.devices.is_empty()) {
            Some(map) => {
                writeln!(out, "    │  descriptors: IOVAs of the guest's own buffers")?;
                writeln!(
                    out,
                    "  {device}  ◀── DMA through the IOMMU ({}) ──▶  guest memory",
                    map.iommu
                )?;
                writeln!(out, "    │  wire")?;
            }
            None => writeln!(out, "    │  {device}: every frame is copied, there is no card")?,
        }
        writeln!(out, "  {}\n", cli.peer)?;
        for map in &self.maps {
            let Map {
                name,
                iommu,
                mapped_bytes,
                pinned_bytes,
                ..
            } = map;
            let (mapped, pinned) = (size(*mapped_bytes), size(*pinned_bytes));
            writeln!(out, "  map `{name}` ({iommu}): {mapped} mapped, {pinned} pinned")?;
            for extent in &map.extents {
                let start = extent.iova.value()?;
                let last = start + extent.len.saturating_sub(1);
                let by = extent
                    .by
                    .as_ref()
                    .map(|by| format!(" by {by}"))
                    .unwrap_or_default();
                let (len, words) = (size(extent.len), Holds::of(extent).words());
                let owners = extent.owners.join(", ");
                writeln!(
                    out,
                    "    {start:#013x}-{last:#013x} {len:>9}  {words}{by}  [{owners}]"
                )?;
            }
        }
        let (tx, rx) = (self.sum("tx"), self.sum("rx"));
        let mut row = |name: &str, cell: fn(&Lane) -> String| {
            writeln!(out, "  {name:<22}{:>20}{:>20}", cell(&tx), cell(&rx))
        };
        row("", |lane| {
            if lane.direction == "tx" {
                "guest to wire"
            } else {
                "wire to guest"
            }
            .to_owned()
        })?;
        row("frames", |lane| lane.frames.to_string())?;
        row("bytes", |lane| lane.bytes.to_string())?;
        row("zero-copied", share)?;
        row("bytes copied by the CPU", |lane| lane.copied_bytes.to_string())?;
        row("kicks from the guest", |lane| lane.kicks.to_string())?;
        row("calls to the guest", |lane| lane.notifications.to_string())?;
        row("interrupts", |lane| lane.interrupts.to_string())?;
        row("sleeps", |lane| lane.sleeps.to_string())?;
        if !cli.copies && !self.holds(Holds::BounceMemory) {
            writeln!(
                out,
                "\n  The map agrees: guest memory and descriptor rings, and nothing to copy through."
            )?;
        }
        Ok(out)
    }
}

/// The share of a lane's frames that the card read or wrote in place.
fn share(lane: &Lane) -> String {
    match lane.frames {
        0 => "-".to_owned(),
        // Rounded down: 100 % is said of all frames or not at all.
        frames => format!(
            "{} %",
            u128::from(lane.zero_copy_frames) * 100 / u128::from(frames)
        ),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0x4000_0000.. if bytes.is_multiple_of(0x4000_0000) => format!("{} GiB", bytes >> 30),
        0x10_0000.. => format!("{} MiB", bytes >> 20),
        _ => format!("{} KiB", bytes >> 10),
    }
}

fn main() -> ExitCode {
    run(&Cli::parse()).unwrap_or_else(|error| {
        eprintln!("picture: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let mut text = String::new();
    if cli.stats.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text)?;
    } else {
        text = std::fs::read_to_string(&cli.stats)
            .with_context(|| format!("cannot read {}", cli.stats.display()))?;
    }
    let stats: Stats = serde_json::from_str(&text).context("these are not the back end's statistics")?;
    let faults = stats.faults(cli);
    match (cli.line, faults.is_empty()) {
        (false, _) => print!("{}", stats.drawing(cli)?),
        (true, true) => println!("{}", stats.line()?),
        (true, false) => println!("{}: {}", faults.join("; "), stats.line()?),
    }
    if !cli.line {
        for fault in &faults {
            println!("  NOT SHOWN: {fault}");
        }
    }
    Ok(if faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
