//! Start and stop of everything: maps, devices, ports, sockets, in that order and back.
//!
//! Sockets are bound before a device is touched, so that the cheap mistakes come first; front-ends are served once
//! all ports are ready. On SIGTERM every lane is stopped and every card quiet before memory is let go.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::Scope;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use config::{Config, DeviceSpec, IommuChoice, MapBy, MapConfig, Poll, PortConfig};
use queues::clock::SystemClock;
use queues::nic::Nic;
use queues::nic::igb::Igb;
use queues::nic::tap::Tap;
use rustix::event::{PollFd, PollFlags, poll};
use vfio_glue::iommu::software::SoftwareIommu;
use vfio_glue::iommu::{self, DeviceAddress, Iommu, VfioUserIommu, choose};
use vfio_glue::map::MemoryMap;
use vfio_glue::memory::guard;
use vfio_glue::pci::PciAddress;
use vfio_glue::{nudge, raise_open_files_limit};

use crate::control::{Control, Subjects};
use crate::endpoint::Endpoint;
use crate::port::Port;
use crate::signals::{Stop, Woken};
use crate::worker::{Patience, Worker};

/// How often to look whether a worker stands still.
const PULSE: Duration = Duration::from_secs(1);

/// Runs until `stop` is asked for or no front-end can come any more.
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
    let endpoints: Vec<Endpoint> = config
        .ports
        .iter()
        .map(|port| Endpoint::open(&port.socket))
        .collect::<Result<_, _>>()?;
    let workers = start_workers(config)?;
    let maps: Vec<Arc<MemoryMap>> = config
        .maps
        .iter()
        .map(|map| open_map(map, &config.ports))
        .collect::<Result<_>>()?;
    let mut ports = Vec::new();
    for (index, port) in config.ports.iter().enumerate() {
        let worker = workers.get(index % workers.len()).context("no worker")?;
        ports.push(Arc::new(open_port(port, &maps, worker)?));
    }

    let subjects = Arc::new(Subjects {
        ports: ports.clone(),
        maps,
    });
    let done = Stop::new().context("cannot make an event")?;
    std::thread::scope(|scope| {
        // Until the very end: a worker that stands still keeps its ports from stopping.
        let pulse = || check_pulses(&workers, &ports, &done);
        std::thread::Builder::new()
            .name("pulse".to_owned())
            .spawn_scoped(scope, pulse)
            .context("no thread")?;
        let served = std::thread::scope(|scope| {
            let served = serve_all(scope, endpoints, &ports, control, &subjects, stop);
            // All are back: the process stops, or nobody can come any more, or a thread could not be had.
            stop.ask();
            served
        });
        done.ask();
        served
    })
}

/// Starts the threads that serve, and waits for those of the ports.
fn serve_all<'scope>(
    scope: &'scope Scope<'scope, '_>,
    endpoints: Vec<Endpoint>,
    ports: &'scope [Arc<Port>],
    control: Option<Control>,
    subjects: &'scope Subjects,
    stop: &'scope Stop,
) -> Result<()> {
    let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
    if let Some(control) = control {
        named("control")
            .spawn_scoped(scope, move || control.serve(subjects, stop))
            .context("no thread")?;
    }
    named("links")
        .spawn_scoped(scope, move || watch_links(ports, stop))
        .context("no thread")?;
    let mut serving = Vec::new();
    for (endpoint, port) in endpoints.into_iter().zip(ports) {
        let thread = named(&format!("port {}", port.name()));
        serving.push(
            thread
                .spawn_scoped(scope, move || endpoint.serve(port, stop))
                .context("no thread")?,
        );
    }
    tracing::info!(ports = ports.len(), "ready");
    let panicked = serving
        .into_iter()
        .map(|thread| thread.join().is_err())
        .filter(|panicked| *panicked)
        .count();
    if panicked > 0 {
        bail!("a port's thread panicked")
    } else {
        Ok(())
    }
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

fn open_map(map: &MapConfig, ports: &[PortConfig]) -> Result<Arc<MemoryMap>> {
    let users = || ports.iter().filter(|port| port.map == map.name);
    let cards: Vec<PciAddress> = users()
        .filter_map(|port| match &port.device {
            DeviceSpec::Pci(address) => Some(pci_address(*address)),
            DeviceSpec::Tap(_) | DeviceSpec::VfioUser(_) => None,
        })
        .collect();
    let served = users().any(|port| matches!(port.device, DeviceSpec::VfioUser(_)));
    let (iommu, reason): (Box<dyn Iommu>, String) = if served {
        if !cards.is_empty() {
            bail!(
                "map {} has devices of the kernel's VFIO and of vfio-user: give each kind a map of its own",
                map.name
            );
        }
        (
            Box::new(VfioUserIommu::new()),
            "its devices are served by other processes".to_owned(),
        )
    } else if map.iommu == IommuChoice::None {
        (Box::new(SoftwareIommu), "its devices are software".to_owned())
    } else {
        let chosen = choose(iommu_choice(map.iommu), map_by(map.map_by), &cards)
            .with_context(|| format!("cannot make map {}", map.name))?;
        (chosen.iommu, chosen.reason)
    };
    tracing::info!(
        map = map.name,
        iommu = iommu.kind().as_str(),
        "map made: {reason}"
    );
    Ok(MemoryMap::new(&map.name, iommu))
}

fn open_port(port: &PortConfig, maps: &[Arc<MemoryMap>], worker: &Arc<Worker>) -> Result<Port> {
    let map = maps
        .iter()
        .find(|map| map.name() == port.map)
        .with_context(|| format!("no map {}", port.map))?;
    let context = || format!("cannot open port {}", port.name);
    let nic: Box<dyn Nic> = match &port.device {
        DeviceSpec::Tap(name) => Box::new(Tap::open(name, port.mtu, map).with_context(context)?),
        DeviceSpec::Pci(address) => {
            open_card(map, &DeviceAddress::Pci(pci_address(*address)), port.mtu).with_context(context)?
        }
        DeviceSpec::VfioUser(path) => {
            open_card(map, &DeviceAddress::VfioUser(path.clone()), port.mtu).with_context(context)?
        }
    };
    let patience = match port.poll {
        Poll::Micros(time) => Patience::For(Duration::from_micros(time.into())),
        Poll::Always => Patience::Forever,
    };
    Ok(Port::new(
        &port.name,
        Arc::clone(map),
        nic,
        Arc::clone(worker),
        patience,
        port.mtu,
    ))
}

fn open_card(map: &Arc<MemoryMap>, address: &DeviceAddress, mtu: u16) -> Result<Box<dyn Nic>> {
    let device = map.attach(address)?;
    Ok(Box::new(Igb::open(
        device,
        mtu,
        Arc::new(SystemClock::default()),
    )?))
}

fn pci_address(address: config::PciAddress) -> PciAddress {
    let config::PciAddress {
        domain,
        bus,
        device,
        function,
    } = address;
    PciAddress {
        domain,
        bus,
        device,
        function,
    }
}

fn iommu_choice(choice: IommuChoice) -> iommu::IommuChoice {
    match choice {
        IommuChoice::Iommufd => iommu::IommuChoice::Iommufd,
        IommuChoice::Type1 => iommu::IommuChoice::Type1,
        IommuChoice::Auto | IommuChoice::None => iommu::IommuChoice::Auto,
    }
}

fn map_by(map_by: MapBy) -> iommu::MapBy {
    match map_by {
        MapBy::Auto => iommu::MapBy::Auto,
        MapBy::File => iommu::MapBy::File,
        MapBy::Address => iommu::MapBy::Address,
    }
}

/// Frees workers that a front-end made wait.
fn check_pulses(workers: &[Arc<Worker>], ports: &[Arc<Port>], done: &Stop) {
    while done.wait(None, Some(PULSE)) != Woken::Stop {
        workers.iter().for_each(|worker| worker.check_pulse());
        ports.iter().for_each(|port| port.check_pulse());
    }
}

/// Tells ports when their link may have changed.
fn watch_links(ports: &[Arc<Port>], stop: &Stop) {
    let events: Vec<(&Arc<Port>, OwnedFd)> = ports
        .iter()
        .filter_map(|port| port.link_event().map(|fd| (port, fd)))
        .collect();
    // One that came up before anybody watched.
    events.iter().for_each(|(port, _)| port.look_at_link());
    loop {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(events.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "links are no longer watched");
                return;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready.first().copied().unwrap_or(true) {
            return;
        }
        for ((port, _), _) in events
            .iter()
            .zip(ready.iter().skip(1))
            .filter(|(_, ready)| **ready)
        {
            port.look_at_link();
        }
    }
}
