//! What `stats` shows: ports with their lanes, maps with their extents, workers. The names are part of the product.

use std::collections::BTreeMap;
use std::sync::Arc;

use queues::lane::{Bounce, Counter, Drop, LaneStats};
use queues::nic::Link;
use serde::Serialize;
use vfio_glue::iommu::own_locked_bytes;
use vfio_glue::map::{ExtentSnapshot, MapSnapshot, MemoryMap};
use vfio_glue::memory::{Footprint, Table, TableHint};

use crate::port::{Direction, Port};
use crate::worker::Worker;

/// Everything, at one moment.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Every port.
    pub ports: Vec<PortReport>,
    /// Every map.
    pub maps: Vec<MapReport>,
    /// Every worker.
    pub workers: Vec<WorkerReport>,
    /// The process.
    pub process: ProcessReport,
}

/// A worker.
#[derive(Debug, Serialize)]
pub struct WorkerReport {
    /// What its thread is called.
    pub name: String,
    /// Passes over its lanes. They stand still while it sleeps.
    pub passes: u64,
    /// Those in which a lane moved something.
    pub busy_passes: u64,
    /// What these cost in all, in cycles of the time stamp counter.
    pub busy_cycles: u64,
    /// Times it went to sleep.
    pub sleeps: u64,
}

/// The process as the kernel sees it.
#[derive(Debug, Serialize)]
pub struct ProcessReport {
    /// Bytes the kernel counts as locked: what type1 pins.
    pub vm_lck_bytes: u64,
    /// Bytes the kernel counts as pinned: what iommufd pins.
    pub vm_pin_bytes: u64,
}

/// A port.
#[derive(Debug, Serialize)]
pub struct PortReport {
    /// Its name.
    pub name: String,
    /// Its device.
    pub device: String,
    /// Its map.
    pub map: String,
    /// `up` or `down`.
    pub link: &'static str,
    /// Mbit/s, 0 if unknown or down.
    pub link_mbps: u32,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Times its device was reset while it served.
    pub resets: u64,
    /// The guest's memory as the front-end announced it.
    pub memory: Vec<RegionReport>,
    /// Its lanes.
    pub lanes: Vec<LaneReport>,
}

/// A region of a guest's memory.
#[derive(Debug, Serialize)]
pub struct RegionReport {
    /// Where the guest sees it, hexadecimal.
    pub guest: String,
    /// Length in bytes.
    pub len: u64,
    /// Where it starts in its file, in bytes.
    pub file_offset: u64,
    /// Where devices find its first byte, hexadecimal.
    pub iova: String,
}

/// A lane.
#[derive(Debug, Serialize)]
pub struct LaneReport {
    /// `rx` (wire to guest) or `tx` (guest to wire).
    pub direction: &'static str,
    /// Which queue pair.
    pub pair: usize,
    /// Whether it runs.
    pub running: bool,
    /// Frames moved.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames whose bytes no CPU touched here.
    pub zero_copy_frames: u64,
    /// Frames copied here.
    pub bounced_frames: u64,
    /// Why they were.
    pub bounce_reasons: BTreeMap<&'static str, u64>,
    /// Bytes copied here.
    pub copied_bytes: u64,
    /// Frames lost here.
    pub dropped_frames: u64,
    /// Why they were.
    pub drop_reasons: BTreeMap<&'static str, u64>,
    /// Passes that moved something.
    pub bursts: u64,
    /// Passes that found nothing to move: no frame, or no buffer for one.
    pub idle_passes: u64,
    /// Kicks from the guest.
    pub kicks: u64,
    /// Notifications to the guest.
    pub notifications: u64,
    /// Interrupts from the card.
    pub interrupts: u64,
    /// Sleeps of its worker.
    pub sleeps: u64,
    /// Broken rings and failures of the card.
    pub errors: u64,
    /// Times the front-end's descriptor made the worker wait.
    pub stalls: u64,
    /// Times it was stopped and started because memory went that it used.
    pub pauses: u64,
    /// For how long in all, in microseconds.
    pub paused_us: u64,
    /// What it has to do with each stretch of the guest's memory. None where that was not asked for.
    pub extents: Vec<FootprintReport>,
}

/// A stretch of guest memory, as a lane uses it.
#[derive(Debug, Serialize)]
pub struct FootprintReport {
    /// Where devices find it, hexadecimal.
    pub iova: String,
    /// Buffers in it that the card has now.
    pub held: u64,
    /// How often the lane came to it from another one, since memory last changed.
    pub turns: u64,
}

/// A map.
#[derive(Debug, Serialize)]
pub struct MapReport {
    /// Its name.
    pub name: String,
    /// What programs its IOMMU.
    pub iommu: &'static str,
    /// Ranges it allocates from.
    pub usable: Vec<String>,
    /// Bytes mapped.
    pub mapped_bytes: u64,
    /// Bytes pinned.
    pub pinned_bytes: u64,
    /// Extents mapped anew because pages had been discarded behind them.
    pub discards: u64,
    /// Its devices.
    pub devices: Vec<String>,
    /// What is mapped.
    pub extents: Vec<ExtentReport>,
}

/// An extent.
#[derive(Debug, Serialize)]
pub struct ExtentReport {
    /// Where devices find it, hexadecimal.
    pub iova: String,
    /// Length in bytes.
    pub len: u64,
    /// The file.
    pub file: String,
    /// Where it starts there, in bytes.
    pub file_offset: u64,
    /// How many of its bytes the IOMMU can translate by pages of which size.
    pub page_sizes: BTreeMap<String, u64>,
    /// How the IOMMU got it.
    pub by: &'static str,
    /// Who asked for it.
    pub owners: Vec<String>,
}

/// How much a report says of lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Their counters, which are read beside them.
    Counters,
    /// Where their buffers are, too: they have to be asked, between two passes.
    Buffers,
}

impl Report {
    /// Looks at everything.
    pub fn of(ports: &[Arc<Port>], maps: &[Arc<MemoryMap>], workers: &[Arc<Worker>], detail: Detail) -> Self {
        Self {
            workers: workers.iter().map(|worker| WorkerReport::of(worker)).collect(),
            ports: ports.iter().map(|port| PortReport::of(port, detail)).collect(),
            maps: maps.iter().map(|map| MapReport::of(map.snapshot())).collect(),
            process: ProcessReport::now(),
        }
    }
}

impl WorkerReport {
    fn of(worker: &Worker) -> Self {
        Self {
            name: worker.name().to_owned(),
            passes: worker.passes(),
            busy_passes: worker.busy_passes(),
            busy_cycles: worker.busy_cycles(),
            sleeps: worker.sleeps(),
        }
    }
}

impl ProcessReport {
    fn now() -> Self {
        let (vm_lck_bytes, vm_pin_bytes) = own_locked_bytes();
        Self {
            vm_lck_bytes,
            vm_pin_bytes,
        }
    }
}

impl PortReport {
    fn of(port: &Port, detail: Detail) -> Self {
        let status = port.status();
        let lanes = status.running.iter().enumerate().filter_map(|(index, running)| {
            let footprint = match detail {
                // None where it does not run, or is being stopped just now.
                Detail::Buffers => port.with_lane(index, |lane| lane.footprint()).ok().flatten(),
                Detail::Counters => None,
            };
            port.stats(index)
                .map(|stats| LaneReport::of(index, *running, stats, footprint.unwrap_or_default()))
        });
        let (link, link_mbps) = match status.link {
            Link::Up { mbps } => ("up", mbps),
            Link::Down => ("down", 0),
        };
        Self {
            name: port.name().to_owned(),
            map: port.map().name().to_owned(),
            link,
            link_mbps,
            connected: status.connected,
            lanes: lanes.collect(),
            resets: status.resets,
            memory: regions_of(&port.memory()),
            device: status.device,
        }
    }
}

impl LaneReport {
    fn of(index: usize, running: bool, stats: &LaneStats, footprint: Vec<Footprint>) -> Self {
        let bounces = Bounce::ALL.iter().map(|why| why.as_str()).zip(&stats.bounced);
        let drops = Drop::ALL.iter().map(|why| why.as_str()).zip(&stats.dropped);
        let drop_reasons = counted(drops);
        Self {
            direction: Direction::of(index).as_str(),
            pair: index / 2,
            running,
            frames: stats.frames.get(),
            bytes: stats.bytes.get(),
            zero_copy_frames: stats.zero_copy_frames.get(),
            bounced_frames: stats.bounced_frames(),
            bounce_reasons: counted(bounces),
            copied_bytes: stats.copied_bytes.get(),
            dropped_frames: drop_reasons.values().sum(),
            drop_reasons,
            bursts: stats.bursts.get(),
            idle_passes: stats.idle_passes.get(),
            kicks: stats.kicks.get(),
            notifications: stats.notifications.get(),
            interrupts: stats.interrupts.get(),
            sleeps: stats.sleeps.get(),
            errors: stats.errors.get(),
            stalls: stats.stalls.get(),
            pauses: stats.pauses.get(),
            paused_us: stats.paused_us.get(),
            extents: footprint
                .into_iter()
                .map(|Footprint { iova, held, turns }| FootprintReport {
                    iova: iova.to_string(),
                    held,
                    turns,
                })
                .collect(),
        }
    }
}

fn regions_of(table: &Table) -> Vec<RegionReport> {
    let mut hint = TableHint::default();
    let regions = table.regions().iter();
    regions
        .map(|region| RegionReport {
            guest: region.guest.to_string(),
            len: region.len,
            file_offset: region.file_offset,
            iova: table
                .lookup(&mut hint, region.guest, 1)
                .map_or_else(String::new, |piece| piece.iova.to_string()),
        })
        .collect()
}

/// A page size as it is usually written: `4K`, `2M`, `1G`.
fn page_name(bytes: u64) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1 << 30) => format!("{}G", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        _ => format!("{}K", bytes >> 10),
    }
}

/// Only the reasons that occurred.
fn counted<'a>(reasons: impl Iterator<Item = (&'static str, &'a Counter)>) -> BTreeMap<&'static str, u64> {
    reasons
        .map(|(why, count)| (why, count.get()))
        .filter(|(_, count)| *count > 0)
        .collect()
}

impl MapReport {
    fn of(map: MapSnapshot) -> Self {
        Self {
            name: map.name,
            iommu: map.iommu.as_str(),
            usable: map
                .usable
                .iter()
                .map(|range| format!("{:#x}-{:#x}", range.start(), range.end()))
                .collect(),
            mapped_bytes: map.mapped_bytes,
            pinned_bytes: map.pinned_bytes,
            discards: map.discards,
            devices: map.devices.iter().map(ToString::to_string).collect(),
            extents: map.extents.into_iter().map(ExtentReport::of).collect(),
        }
    }
}

impl ExtentReport {
    fn of(extent: ExtentSnapshot) -> Self {
        Self {
            iova: extent.iova.to_string(),
            len: extent.len,
            file: extent.file,
            file_offset: extent.file_offset,
            page_sizes: BTreeMap::from([(page_name(extent.page_bytes), extent.len)]),
            by: extent.by.as_str(),
            owners: extent.owners,
        }
    }
}
