//! Says whether what `vhost-user-vfio stats` shows of the map bears out a claim, and exits with 1 if it does not.
//!
//! ```text
//! stats before ──┐
//!                ├──▶ what came, what went, whose lanes paused ──▶ one line
//! stats after ───┘
//! ```
//!
//! The rig's scripts take the statistics at the moments that matter; each claim here is one sentence about them.
//! Read with: the README's section on what is counted.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, Parser, Subcommand};
use serde::Deserialize;

/// Checks the statistics of `vhost-user-vfio` against a claim about the map.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    claim: Claim,
}

#[derive(Subcommand)]
enum Claim {
    /// Memory came, and nobody's lanes noticed: no pause, no reset, no drop, no error.
    Grown {
        #[command(flatten)]
        change: Change,
    },
    /// Every lane of the port has had buffers in the memory that came.
    Used {
        #[command(flatten)]
        change: Change,
    },
    /// Memory went; only lanes that had buffers or virtqueues in it paused, and no device was reset.
    Shrunk {
        #[command(flatten)]
        change: Change,
    },
    /// Guest memory that several ports announce is mapped once and pinned once.
    PinnedOnce {
        /// The statistics, with a device of each port attached.
        stats: PathBuf,
        /// The ports that share it.
        #[arg(long, value_delimiter = ',')]
        ports: Vec<String>,
        /// How much it is, in bytes.
        #[arg(long)]
        bytes: u64,
    },
    /// Ports whose guest addresses are equal have IOVAs and memory of their own.
    EqualGuests {
        /// The statistics.
        stats: PathBuf,
        /// The ports.
        #[arg(long, value_delimiter = ',')]
        ports: Vec<String>,
    },
    /// All guest memory of the ports lies in pages of this size.
    PageSize {
        /// The statistics.
        stats: PathBuf,
        /// The ports.
        #[arg(long, value_delimiter = ',')]
        ports: Vec<String>,
        /// As the statistics name it, such as 2M.
        #[arg(long)]
        size: String,
    },
    /// Pages that the guest's VMM had discarded were noticed and mapped anew.
    Discarded {
        /// The statistics before.
        before: PathBuf,
        /// The statistics after.
        after: PathBuf,
    },
}

#[derive(Args)]
struct Change {
    /// The statistics before.
    before: PathBuf,
    /// The statistics after.
    after: PathBuf,
    /// The port whose memory it is.
    #[arg(long)]
    port: String,
    /// How much came or went, in bytes.
    #[arg(long)]
    bytes: u64,
}

#[derive(Deserialize)]
struct Stats {
    process: Option<Process>,
    ports: Vec<Port>,
    maps: Vec<Map>,
}

#[derive(Clone, Copy, Deserialize)]
struct Process {
    vm_pin_bytes: u64,
    vm_lck_bytes: u64,
}

#[derive(Deserialize)]
struct Port {
    name: String,
    resets: u64,
    memory: Vec<Memory>,
    lanes: Vec<Lane>,
}

#[derive(Deserialize)]
struct Memory {
    guest: Number,
    len: u64,
}

#[derive(Deserialize)]
struct Lane {
    direction: String,
    pair: u64,
    running: bool,
    dropped_frames: u64,
    errors: u64,
    pauses: u64,
    extents: Vec<LaneExtent>,
}

/// What a lane has to do with an extent.
#[derive(Deserialize)]
struct LaneExtent {
    iova: Number,
    held: u64,
    turns: u64,
}

#[derive(Deserialize)]
struct Map {
    iommu: String,
    #[serde(default)]
    discards: u64,
    extents: Vec<Extent>,
}

#[derive(Deserialize)]
struct Extent {
    iova: Number,
    len: u64,
    file: String,
    owners: Vec<String>,
    #[serde(default)]
    page_sizes: BTreeMap<String, u64>,
}

/// An address as JSON has it: a number, or hexadecimal in a string.
#[derive(Deserialize)]
#[serde(try_from = "Form")]
struct Number(u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum Form {
    Plain(u64),
    Text(String),
}

impl TryFrom<Form> for Number {
    type Error = String;

    fn try_from(form: Form) -> Result<Self, String> {
        match form {
            Form::Plain(value) => Ok(Self(value)),
            Form::Text(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16)
                .map(Self)
                .map_err(|_| format!("{text} is no address")),
        }
    }
}

/// An extent's place: enough to tell it from every other of one process.
type Place = (u64, u64);

impl Stats {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not the back end's statistics", path.display()))
    }

    fn port(&self, name: &str) -> Result<&Port> {
        let port = self.ports.iter().find(|port| port.name == name);
        port.ok_or_else(|| anyhow!("there is no port {name}"))
    }

    /// Guest memory of a port: memory of our own comes from memfds called `vuv-…`.
    fn guest_extents<'a>(&'a self, port: &'a str) -> impl Iterator<Item = &'a Extent> {
        let extents = self.maps.iter().flat_map(|map| &map.extents);
        extents.filter(move |extent| {
            !extent.file.contains("vuv-") && extent.owners.iter().any(|owner| owner == port)
        })
    }

    fn places(&self, port: &str) -> BTreeSet<Place> {
        self.guest_extents(port)
            .map(|extent| (extent.iova.0, extent.len))
            .collect()
    }
}

impl Lane {
    fn name(&self) -> String {
        format!("{}{}", self.direction, self.pair)
    }

    /// Buffers the card has now, and how often the lane turned to these places.
    fn in_places(&self, places: &BTreeSet<Place>) -> (u64, u64) {
        let here = self.extents.iter().filter(|extent| {
            let mut offsets = places
                .iter()
                .map(|(start, len)| (extent.iova.0.checked_sub(*start), *len));
            offsets.any(|(offset, len)| offset.is_some_and(|offset| offset < len))
        });
        here.fold((0, 0), |(held, turns), extent| {
            (held + extent.held, turns + extent.turns)
        })
    }
}

/// A port's memory at two moments.
struct Moments {
    before: Stats,
    after: Stats,
    port: String,
    bytes: u64,
}

impl Change {
    fn read(&self) -> Result<Moments> {
        Ok(Moments {
            before: Stats::read(&self.before)?,
            after: Stats::read(&self.after)?,
            port: self.port.clone(),
            bytes: self.bytes,
        })
    }
}

impl Moments {
    fn came(&self) -> Result<BTreeSet<Place>> {
        self.only_in(&self.after, &self.before)
    }

    fn gone(&self) -> Result<BTreeSet<Place>> {
        self.only_in(&self.before, &self.after)
    }

    /// What is in `there` and not in `elsewhere`, if it is as much as was said.
    fn only_in(&self, there: &Stats, elsewhere: &Stats) -> Result<BTreeSet<Place>> {
        let (there, elsewhere) = (there.places(&self.port), elsewhere.places(&self.port));
        let places: BTreeSet<Place> = there.difference(&elsewhere).copied().collect();
        let bytes: u64 = places.iter().map(|(_, len)| len).sum();
        ensure!(
            bytes == self.bytes,
            "{bytes} bytes of {} came or went ({}), not {}",
            self.port,
            words(&places),
            self.bytes
        );
        Ok(places)
    }

    /// Every port before and after, each beside itself; none had its device reset.
    fn ports(&self) -> Result<Vec<(&Port, &Port)>> {
        let mut ports = Vec::new();
        for is in &self.after.ports {
            let was = self.before.port(&is.name)?;
            let resets = is.resets - was.resets;
            ensure!(resets == 0, "{}: {resets} device resets", is.name);
            ports.push((was, is));
        }
        Ok(ports)
    }
}

fn words(places: &BTreeSet<Place>) -> String {
    let each: Vec<_> = places
        .iter()
        .map(|(iova, len)| format!("{} KiB at {iova:#x}", len >> 10))
        .collect();
    each.join(", ")
}

/// The lanes of a port before and after, each beside itself.
fn lanes<'a>(before: &'a Port, after: &'a Port) -> Result<Vec<(&'a Lane, &'a Lane)>> {
    ensure!(
        before.lanes.len() == after.lanes.len(),
        "{} had {} lanes and has {}",
        before.name,
        before.lanes.len(),
        after.lanes.len()
    );
    Ok(before.lanes.iter().zip(&after.lanes).collect())
}

fn grown(moments: &Moments) -> Result<String> {
    let came = moments.came()?;
    let mut unmoved = Vec::new();
    for (was, is) in moments.ports()? {
        for (lane_was, lane) in lanes(was, is)? {
            let numbers = |lane: &Lane| (lane.pauses, lane.dropped_frames, lane.errors);
            let (old, new) = (numbers(lane_was), numbers(lane));
            ensure!(lane.running, "{} {} does not run", is.name, lane.name());
            ensure!(
                old == new,
                "{} {}: (pauses, drops, errors) were {old:?} and are {new:?}",
                is.name,
                lane.name()
            );
            unmoved.push(format!("{} {}", is.name, lane.name()));
        }
    }
    Ok(format!(
        "{} mapped; no pause, drop or error of {}; no device reset",
        words(&came),
        unmoved.join(", ")
    ))
}

fn used(moments: &Moments) -> Result<String> {
    let came = moments.came()?;
    let mut lines = Vec::new();
    for lane in &moments.after.port(&moments.port)?.lanes {
        let (held, turns) = lane.in_places(&came);
        ensure!(
            held > 0 || turns > 0,
            "{}: no buffer in {}",
            lane.name(),
            words(&came)
        );
        lines.push(format!(
            "{} turned to it {turns} times, holds {held}",
            lane.name()
        ));
    }
    Ok(format!("{}: {}", words(&came), lines.join("; ")))
}

fn shrunk(moments: &Moments) -> Result<String> {
    let gone = moments.gone()?;
    let mut lines = Vec::new();
    for (was, is) in moments.ports()? {
        for (lane_was, lane) in lanes(was, is)? {
            let name = format!("{} {}", is.name, lane.name());
            ensure!(lane.running, "{name} does not run");
            ensure!(lane.errors == lane_was.errors, "{name} has new errors");
            let (held, turns) = lane_was.in_places(&gone);
            let pauses = lane.pauses - lane_was.pauses;
            ensure!(
                pauses == 0 || held > 0,
                "{name} paused {pauses} times, though it had no buffer in what went"
            );
            lines.push(format!(
                "{name} held {held} there ({turns} turns), paused {pauses} times"
            ));
        }
    }
    Ok(format!(
        "{} gone; {}; no device reset",
        words(&gone),
        lines.join("; ")
    ))
}

/// What besides guest memory may be pinned: rings, and guest pages that QEMU rounds differently.
const SMALL_CHANGE_BYTES: u64 = 4 << 20;

fn pinned_once(stats: &Stats, ports: &[String], bytes: u64) -> Result<String> {
    let first = ports.first().context("no ports given")?;
    let places = stats.places(first);
    let mapped: u64 = places.iter().map(|(_, len)| len).sum();
    for port in ports {
        let own = stats.places(port);
        ensure!(
            own == places,
            "{port} has {}, and {first} has {}",
            words(&own),
            words(&places)
        );
    }
    let near = |seen: u64| seen.abs_diff(bytes) <= SMALL_CHANGE_BYTES;
    ensure!(near(mapped), "{mapped} bytes are mapped, of {bytes}");
    let map = stats.maps.first().context("there is no map")?;
    let Process {
        vm_pin_bytes,
        vm_lck_bytes,
    } = stats
        .process
        .context("the statistics say nothing of the process")?;
    let (what, pinned) = match map.iommu.as_str() {
        "iommufd" => ("VmPin", vm_pin_bytes),
        "type1" => ("VmLck", vm_lck_bytes),
        other => bail!("a map of kind {other} pins nothing"),
    };
    ensure!(near(pinned), "{what} is {pinned} bytes, the guest has {bytes}");
    Ok(format!(
        "{}: {what} {} KiB for a guest of {} KiB on {}",
        map.iommu,
        pinned >> 10,
        bytes >> 10,
        ports.join(" and ")
    ))
}

fn equal_guests(stats: &Stats, ports: &[String]) -> Result<String> {
    let mut guests = Vec::new();
    let mut places = BTreeSet::new();
    for name in ports {
        let memory = &stats.port(name)?.memory;
        guests.push(
            memory
                .iter()
                .map(|m| (m.guest.0, m.len))
                .collect::<BTreeSet<Place>>(),
        );
        for extent in stats.guest_extents(name) {
            ensure!(
                extent.owners.iter().all(|owner| owner == name),
                "an extent of {name} has the owners {}",
                extent.owners.join(", ")
            );
            places.insert((extent.iova.0, extent.len));
        }
    }
    let first = guests.first().context("no ports given")?;
    ensure!(!first.is_empty(), "{} has no memory", ports[0]);
    ensure!(
        guests.iter().all(|guest| guest == first),
        "their guest addresses differ"
    );
    let ordered: Vec<_> = places.iter().collect();
    for pair in ordered.windows(2) {
        ensure!(
            pair[0].0 + pair[0].1 <= pair[1].0,
            "extents at {:#x} and {:#x} overlap",
            pair[0].0,
            pair[1].0
        );
    }
    let guest: Vec<_> = first
        .iter()
        .map(|(start, len)| format!("{} KiB at {start:#x}", len >> 10))
        .collect();
    Ok(format!(
        "{} announce {} each; on the map: {}",
        ports.join(" and "),
        guest.join(", "),
        words(&places)
    ))
}

fn page_size(stats: &Stats, ports: &[String], size: &str) -> Result<String> {
    let (mut of_size, mut all) = (0, 0);
    for port in ports {
        for extent in stats.guest_extents(port) {
            all += extent.len;
            of_size += extent.page_sizes.get(size).copied().unwrap_or_default();
        }
    }
    ensure!(all > 0, "there is no guest memory");
    ensure!(
        of_size == all,
        "{of_size} of {all} bytes of guest memory are mapped in pages of {size}"
    );
    Ok(format!(
        "{} KiB of guest memory, all in pages of {size}",
        all >> 10
    ))
}

fn discarded(before: &Stats, after: &Stats) -> Result<String> {
    let count = |stats: &Stats| stats.maps.iter().map(|map| map.discards).sum::<u64>();
    let (was, is) = (count(before), count(after));
    ensure!(is > was, "no discard was noticed: {was} before, {is} after");
    Ok(format!("discards noticed: {was} before, {is} after"))
}

fn main() -> ExitCode {
    match run(&Cli::parse().claim) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(claim: &Claim) -> Result<String> {
    match claim {
        Claim::Grown { change } => grown(&change.read()?),
        Claim::Used { change } => used(&change.read()?),
        Claim::Shrunk { change } => shrunk(&change.read()?),
        Claim::PinnedOnce { stats, ports, bytes } => pinned_once(&Stats::read(stats)?, ports, *bytes),
        Claim::EqualGuests { stats, ports } => equal_guests(&Stats::read(stats)?, ports),
        Claim::PageSize { stats, ports, size } => page_size(&Stats::read(stats)?, ports, size),
        Claim::Discarded { before, after } => discarded(&Stats::read(before)?, &Stats::read(after)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A port `vm0` with an rx and a tx lane: `pauses` and buffers `held` in the extent at 0x2000_0000, which is there
    /// or not.
    fn stats(plugged: bool, pauses: [u64; 2], held: [u64; 2]) -> Stats {
        let mut extents = vec![serde_json::json!({
            "iova": "0x10000000", "len": MIB, "file": "/memfd:ram", "owners": ["vm0"]
        })];
        if plugged {
            extents.push(serde_json::json!({
                "iova": "0x20000000", "len": MIB, "file": "/memfd:ram", "owners": ["vm0"]
            }));
        }
        let lane = |which: usize, direction: &str| {
            serde_json::json!({
                "direction": direction, "pair": 0, "running": true, "dropped_frames": 0, "errors": 0,
                "pauses": pauses[which],
                "extents": [{ "iova": "0x20000000", "held": held[which], "turns": 0 }]
            })
        };
        let value = serde_json::json!({
            "ports": [{
                "name": "vm0", "resets": 0, "memory": [], "lanes": [lane(0, "rx"), lane(1, "tx")]
            }],
            "maps": [{ "iommu": "iommufd", "extents": extents }]
        });
        serde_json::from_value(value).expect("it has every field")
    }

    fn moments(before: Stats, after: Stats) -> Moments {
        Moments {
            before,
            after,
            port: "vm0".to_owned(),
            bytes: MIB,
        }
    }

    #[test]
    fn memory_that_comes_pauses_nobody() {
        let come = |pauses| {
            grown(&moments(
                stats(false, [3, 3], [0, 0]),
                stats(true, pauses, [0, 0]),
            ))
        };
        assert!(come([3, 3]).is_ok());
        assert!(come([3, 4]).is_err());
        let nothing = grown(&moments(stats(true, [0, 0], [0, 0]), stats(true, [0, 0], [0, 0])));
        assert!(nothing.is_err());
    }

    #[test]
    fn both_lanes_have_to_use_what_came() {
        let use_it = |held| used(&moments(stats(false, [0, 0], [0, 0]), stats(true, [0, 0], held)));
        assert!(use_it([1, 1]).is_ok());
        assert!(use_it([1, 0]).is_err());
    }

    #[test]
    fn only_a_lane_with_buffers_in_what_went_may_have_paused() {
        let go = |held, pauses| shrunk(&moments(stats(true, [0, 0], held), stats(false, pauses, [0, 0])));
        assert!(go([2, 0], [1, 0]).is_ok());
        assert!(go([0, 0], [0, 0]).is_ok());
        assert!(go([2, 0], [1, 1]).is_err());
    }

    #[test]
    fn memory_pinned_twice_is_seen() {
        let pinned = |vm_pin_bytes| {
            let mut stats = stats(false, [0, 0], [0, 0]);
            stats.process = Some(Process {
                vm_pin_bytes,
                vm_lck_bytes: 0,
            });
            stats.maps[0].extents[0].len = 64 * MIB;
            pinned_once(&stats, &["vm0".to_owned()], 64 * MIB)
        };
        assert!(pinned(64 * MIB + 32768).is_ok());
        assert!(pinned(128 * MIB).is_err());
    }
}
