//! Start and stop of everything: workers, maps, ports, in that order and back.
//!
//! ```text
//! Config ──the operations of inventory.rs──▶ ports are served ──SIGTERM──▶ lanes stop ──▶ memory ──▶ devices
//! ```
//!
//! On SIGTERM every lane is stopped and every card quiet before memory is let go.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result};
use config::{Config, DeviceSpec};
use vfio_glue::memory::guard;
use vfio_glue::pci::PciAddress;
use vfio_glue::{nudge, raise_open_files_limit};

use crate::control::Control;
use crate::devices;
use crate::inventory::{Inventory, pci_address};
use crate::signals::{Stop, Woken};
use crate::worker::Worker;

/// How often to look whether a worker stands still.
const PULSE: Duration = Duration::from_secs(1);

/// Runs until `stop` is asked for, or there were ports and no front-end can come to any of them any more.
///
/// # Errors
///
/// What kept it from starting. Nothing is left behind then.
pub fn run(config: &Config, stop: &Stop) -> Result<()> {
    nudge::install().context("cannot catch the signal that frees a worker")?;
    match raise_open_files_limit() {
        Ok((before, now)) => tracing::debug!(before, now, "open files"),
        Err(error) => tracing::warn!(%error, "the limit on open files stays as it is"),
    }
    guard::install().context("cannot guard against memory files that are cut short")?;
    let control = config.control.as_deref().map(Control::open).transpose()?;
    let workers = start_workers(config)?;
    let inventory =
        Inventory::new(workers, config.control.as_deref(), stop).context("cannot make an event")?;
    let done = Stop::new().context("cannot make an event")?;
    std::thread::scope(|scope| {
        // Until the very end: a worker that stands still keeps its ports from stopping.
        let pulse = || check_pulses(&inventory, &done);
        std::thread::Builder::new()
            .name("pulse".to_owned())
            .spawn_scoped(scope, pulse)
            .context("no thread")?;
        let served = serve(config, control, &inventory, stop);
        done.ask();
        served
    })
}

/// Makes what the configuration says, and keeps it until `stop`.
fn serve(config: &Config, control: Option<Control>, inventory: &Arc<Inventory>, stop: &Stop) -> Result<()> {
    for map in &config.maps {
        inventory.create_map(map, &cards_on(&map.name, config))?;
    }
    inventory.add_ports(&config.ports)?;
    let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
    let (wishes, host) = channel();
    std::thread::scope(|scope| {
        let started = || -> std::io::Result<()> {
            if let Some(control) = control {
                named("control").spawn_scoped(scope, move || control.serve(inventory, stop))?;
            }
            named("devices").spawn_scoped(scope, move || devices::watch(inventory, &wishes, stop))?;
            named("host").spawn_scoped(scope, move || devices::obey(inventory, &host))?;
            Ok(())
        };
        let started = started().context("no thread");
        if started.is_ok() {
            tracing::info!(ports = config.ports.len(), "ready");
            stop.wait(None, None);
        }
        // Those that did start end too.
        stop.ask();
        let closed = inventory.close();
        started.and(closed.map_err(Into::into))
    })
}

/// The PCI devices that are to be on a map.
fn cards_on(map: &str, config: &Config) -> Vec<PciAddress> {
    let users = config.ports.iter().filter(|port| port.map == map);
    let cards = users.filter_map(|port| match &port.device {
        Some(DeviceSpec::Pci(address)) => Some(pci_address(*address)),
        _ => None,
    });
    cards.collect()
}

fn start_workers(config: &Config) -> Result<Vec<Arc<Worker>>> {
    if config.workers.is_empty() {
        return Ok(vec![
            Worker::start("worker0", None).context("cannot start a worker")?,
        ]);
    }
    let start = |(index, cpu): (usize, &config::Cpu)| {
        Worker::start(&format!("worker{index}"), Some(cpu.0.into()))
            .with_context(|| format!("cannot start a worker on CPU {}", cpu.0))
    };
    config.workers.iter().enumerate().map(start).collect()
}

/// Frees workers that a front-end made wait.
fn check_pulses(inventory: &Inventory, done: &Stop) {
    while done.wait(None, Some(PULSE)) != Woken::Stop {
        inventory.check_pulses();
    }
}
