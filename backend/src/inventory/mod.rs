//! The maps, the workers and the ports of the process, and every way to change them.
//!
//! ```text
//! start-up, operator's socket, host ──create_map, add_port, attach_device, …──▶ Inventory ──▶ ports, maps
//! stats, link events, pulse ────────────────what is there now───────────────────────┘
//! ```
//!
//! Operations come one after the other, under a lock that one keeps for as long as it takes, devices included. What is
//! there is listed under another, held for a moment: who only looks never waits for a device. An operation that fails
//! leaves everything as it was. One whose result is there already changes nothing and says so.
//!
//! ```text
//! entry.rs  a map and a port as they are listed       open.rs  an IOMMU for a map, a device for a port
//! error.rs  why something was refused
//! ```

mod entry;
mod error;
mod open;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use config::{Config, DeviceSpec, MapConfig, Poll, PortConfig, defaults, nearest, same_path};
use queues::nic::Nic;
use queues::nic::absent::Absent;
use rustix::event::{EventfdFlags, eventfd};
use vfio_glue::map::MemoryMap;
use vfio_glue::pci::{HostEvent, PciAddress};

pub use self::entry::DeviceEvents;
use self::entry::{Attached, MapEntry, PortEntry};
pub use self::error::{InventoryError, OpenError};
pub use self::open::pci_address;
use self::open::{open_device, open_iommu};
use crate::endpoint::Endpoint;
use crate::port::{Port, PortError};
use crate::signals::Stop;
use crate::worker::{Patience, Worker};

/// What came of an operation, in a line for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Changed(String),
    /// It was so before.
    AlreadySo(String),
}

/// A port that was removed while its front-end's thread was in trouble.
#[derive(Debug, thiserror::Error)]
#[error("a port's thread panicked")]
pub struct PortPanicked;

/// What there is. Shared by `Arc` with the threads that serve ports.
#[derive(Debug)]
pub struct Inventory {
    /// The operator's socket, which no port may take.
    control: Option<PathBuf>,
    workers: Vec<Arc<Worker>>,
    /// The process's, asked for when nobody can come any more.
    stop: Stop,
    /// Readable when the devices have changed.
    changed: OwnedFd,
    operations: Mutex<Phase>,
    lists: Mutex<Lists>,
}

/// Whether operations are still taken.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Open,
    Closed,
}

#[derive(Debug, Default)]
struct Lists {
    maps: Vec<MapEntry>,
    ports: Vec<PortEntry>,
}

impl Inventory {
    /// An inventory without maps and ports, whose ports are dealt out to `workers`. `stop` is asked for when all ports
    /// have ended by themselves.
    ///
    /// # Errors
    ///
    /// The system's answer if it gives no descriptor.
    pub fn new(workers: Vec<Arc<Worker>>, control: Option<&Path>, stop: &Stop) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            control: control.map(Path::to_owned),
            workers,
            stop: stop.clone(),
            changed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            operations: Mutex::new(Phase::Open),
            lists: Mutex::default(),
        }))
    }

    /// Makes a map, on which `cards` are to be. There may be none yet.
    ///
    /// # Errors
    ///
    /// [`InventoryError::MapIs`] if there is one of that name that is not like it, and
    /// [`InventoryError::MakeMap`] if no IOMMU can be had.
    pub fn create_map(&self, wanted: &MapConfig, cards: &[PciAddress]) -> Result<Outcome, InventoryError> {
        let _operation = self.operation()?;
        if let Ok(entry) = self.map_entry(&wanted.name) {
            return entry.compare(wanted);
        }
        self.make_map(wanted, cards)?;
        Ok(Outcome::Changed(format!("map {} is made", wanted.name)))
    }

    /// Removes a map that no port uses.
    ///
    /// # Errors
    ///
    /// [`InventoryError::MapInUse`].
    pub fn destroy_map(&self, name: &str) -> Result<Outcome, InventoryError> {
        let _operation = self.operation()?;
        let Ok(entry) = self.map_entry(name) else {
            return Ok(Outcome::AlreadySo(format!("there is no map {name}")));
        };
        let ports: Vec<String> = self
            .lists()
            .ports
            .iter()
            .filter(|port| port.config.map == name)
            .map(|port| port.config.name.clone())
            .collect();
        if !ports.is_empty() {
            let map = name.to_owned();
            return Err(InventoryError::MapInUse { map, ports });
        }
        self.forget_map(name);
        // The kernel may take its time to take a map apart: not under the lists' lock.
        drop(entry);
        tracing::info!(map = name, "map destroyed");
        Ok(Outcome::Changed(format!("map {name} is destroyed")))
    }

    /// Looks for guest memory that was discarded behind the pins of a map, or of all, and has it mapped anew.
    ///
    /// Blocks while the kernel looks, and while lanes that use such memory are drained.
    ///
    /// # Errors
    ///
    /// [`InventoryError::NoMap`], or [`InventoryError::Discarded`] if what was found could not be mapped anew.
    pub fn check_maps(&self, name: Option<&str>) -> Result<Outcome, InventoryError> {
        let _operation = self.operation()?;
        let maps = match name {
            Some(name) => vec![self.map(name)?],
            None => self.maps(),
        };
        let ports = self.ports();
        let ports = ports
            .iter()
            .filter(|port| maps.iter().any(|map| Arc::ptr_eq(map, port.map())));
        let mut found = Vec::new();
        for port in ports {
            let missing = port
                .renew_discarded()
                .map_err(|source| InventoryError::Discarded {
                    port: port.name().to_owned(),
                    source,
                })?;
            if missing > 0 {
                found.push(format!("{missing} bytes of port {}", port.name()));
            }
        }
        if found.is_empty() {
            return Ok(Outcome::AlreadySo("no discarded memory was found".to_owned()));
        }
        Ok(Outcome::Changed(format!(
            "{} had been discarded and are mapped anew",
            found.join(", ")
        )))
    }

    /// Adds ports, all or none: sockets are bound before a device is touched, so that the cheap mistakes come first, and
    /// front-ends are served once all ports are ready. None of the names is taken.
    ///
    /// # Errors
    ///
    /// [`InventoryError`] of the first port that cannot be had.
    pub fn add_ports(self: &Arc<Self>, ports: &[PortConfig]) -> Result<(), InventoryError> {
        let _operation = self.operation()?;
        self.open_ports(ports)
    }

    /// Adds one port. Without a device it is content with whatever device a port of that name has. The map `main` is made
    /// if there is none.
    ///
    /// # Errors
    ///
    /// [`InventoryError`].
    pub fn add_port(self: &Arc<Self>, wanted: &PortConfig) -> Result<Outcome, InventoryError> {
        let _operation = self.operation()?;
        if let Some(outcome) = self.compare_port(wanted) {
            return outcome;
        }
        let makes_main = wanted.map == defaults::MAP_NAME && self.map_entry(&wanted.map).is_err();
        if makes_main {
            self.make_map(&Config::main_map_for(wanted.device.as_ref()), &[])?;
        }
        if let Err(error) = self.open_ports(std::slice::from_ref(wanted)) {
            if makes_main {
                self.forget_map(&wanted.map);
            }
            return Err(error);
        }
        tracing::info!(port = wanted.name, map = wanted.map, "port added");
        Ok(Outcome::Changed(format!("port {} is added", wanted.name)))
    }

    /// Removes a port: its device is let go, then its front-end disconnected, and its guest's memory leaves the map.
    ///
    /// Blocks for as long as that takes.
    ///
    /// # Errors
    ///
    /// [`PortError::KeepsDevice`] if the device's DMA cannot be ended: the port stays.
    pub fn remove_port(&self, name: &str) -> Result<Outcome, InventoryError> {
        let _operation = self.operation()?;
        let Ok(port) = self.port(name) else {
            let known = self.port_names();
            let hint = nearest(name, known.iter().map(String::as_str));
            let hint = hint.map_or_else(String::new, |port| format!("; did you mean {port}?"));
            return Ok(Outcome::AlreadySo(format!("there is no port {name}{hint}")));
        };
        // Before the front-end goes: if this fails, nothing has been lost.
        self.take_device(&port)?;
        self.dismiss(&[port]);
        tracing::info!(port = name, "port removed");
        Ok(Outcome::Changed(format!("port {name} is removed")))
    }

    /// Gives a port that has none its device, under whoever is connected. Guest memory is not touched.
    ///
    /// Blocks for as long as the device takes to be opened.
    ///
    /// # Errors
    ///
    /// [`InventoryError`].
    pub fn attach_device(&self, device: &DeviceSpec, port: &str) -> Result<Outcome, InventoryError> {
        let _operation = self.operation()?;
        let port = self.port(port)?;
        let holder = self.holder_of(device);
        if holder.as_ref().is_some_and(|holder| Arc::ptr_eq(holder, &port)) {
            return Ok(Outcome::AlreadySo(format!("port {} has {device}", port.name())));
        }
        let present = self.with_port(&port, |entry| {
            entry.device.as_ref().map(|device| device.spec.clone())
        });
        if let Some(present) = present.flatten() {
            return Err(InventoryError::PortHasDevice {
                port: port.name().to_owned(),
                device: present,
            });
        }
        check_free(device, holder.as_deref())?;
        let config = self.with_port(&port, |entry| entry.config.clone());
        let config = config.ok_or_else(|| InventoryError::NoPort {
            name: port.name().to_owned(),
            known: self.port_names(),
        })?;
        let nic = open_device(&config, device, port.map())?;
        port.set_device(nic)?;
        self.seat(&port, Some(device));
        tracing::info!(port = port.name(), %device, "device attached");
        Ok(Outcome::Changed(format!("port {} has {device} now", port.name())))
    }

    /// Takes a device from its port, under whoever is connected. Guest memory is not touched: it stays on the map, for
    /// other devices and the next one here.
    ///
    /// # Errors
    ///
    /// [`PortError::KeepsDevice`].
    pub fn detach_device(&self, device: &DeviceSpec) -> Result<Outcome, InventoryError> {
        let _operation = self.operation()?;
        let Some(port) = self.holder_of(device) else {
            return Ok(Outcome::AlreadySo(format!("no port has {device}")));
        };
        self.take_device(&port)?;
        tracing::info!(port = port.name(), %device, "device detached");
        Ok(Outcome::Changed(format!(
            "port {} has no device now",
            port.name()
        )))
    }

    /// Does what the host wants of a port's device: lets it go, or resets it under whoever is connected. One that does
    /// not come back from its reset is let go. Nothing, if the port has it no more.
    ///
    /// Blocks for as long as the device takes.
    pub fn obey_host(&self, events: &Arc<DeviceEvents>, which: HostEvent) {
        let Ok(_operation) = self.operation() else {
            return;
        };
        let port = &events.port;
        let is_it = |attached: &Attached| Arc::ptr_eq(&attached.events, events);
        let device = self.with_port(port, |entry| entry.device.clone().filter(is_it));
        let Some(Attached { spec: device, .. }) = device.flatten() else {
            return;
        };
        let port_name = port.name();
        match which {
            HostEvent::Release => {
                tracing::warn!(port = port_name, %device, "the host wants the device back: it is detached");
            }
            HostEvent::Error => {
                tracing::error!(port = port_name, %device, "the host reports an error of the device: it is reset");
                match port.renew() {
                    Ok(()) => return,
                    Err(error) => {
                        let error: &dyn std::error::Error = &error;
                        tracing::error!(port = port_name, %device, error, "the reset failed: the device is detached");
                    }
                }
            }
        }
        if let Err(error) = self.take_device(port) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(port = port_name, %device, error, "the device was not detached");
        }
    }

    /// The ports there are, in the order they came.
    pub fn ports(&self) -> Vec<Arc<Port>> {
        let lists = self.lists();
        lists.ports.iter().map(|entry| Arc::clone(&entry.port)).collect()
    }

    /// The maps there are, in the order they came.
    pub fn maps(&self) -> Vec<Arc<MemoryMap>> {
        let lists = self.lists();
        lists.maps.iter().map(|entry| Arc::clone(&entry.map)).collect()
    }

    /// One map.
    ///
    /// # Errors
    ///
    /// [`InventoryError::NoMap`].
    pub fn map(&self, name: &str) -> Result<Arc<MemoryMap>, InventoryError> {
        Ok(self.map_entry(name)?.map)
    }

    /// What the devices there are can tell.
    pub fn device_events(&self) -> Vec<Arc<DeviceEvents>> {
        let lists = self.lists();
        let attached = lists.ports.iter().filter_map(|entry| entry.device.as_ref());
        attached.map(|device| Arc::clone(&device.events)).collect()
    }

    /// What becomes readable when [`device_events`](Self::device_events) has changed. Whoever waits for it reads it.
    pub fn changed(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }

    /// All workers: the shared ones, then those that ports have to themselves.
    pub fn workers(&self) -> Vec<Arc<Worker>> {
        let ports = self.ports();
        let own = ports.iter().filter_map(|port| port.own_worker());
        self.workers.iter().chain(own).map(Arc::clone).collect()
    }

    /// Frees workers that a front-end made wait. To be called about once a second.
    pub fn check_pulses(&self) {
        self.workers().iter().for_each(|worker| worker.check_pulse());
    }

    /// Removes everything, for good: every queue of every card is stopped, then memory is unmapped, then devices and
    /// sockets go.
    ///
    /// # Errors
    ///
    /// [`PortPanicked`] if a port's thread did not end as it should.
    pub fn close(&self) -> Result<(), PortPanicked> {
        let mut phase = self.phase();
        *phase = Phase::Closed;
        let sound = self.dismiss(&self.ports());
        *self.lists() = Lists::default();
        if sound { Ok(()) } else { Err(PortPanicked) }
    }

    /// Takes the place of the one operation at a time.
    fn operation(&self) -> Result<MutexGuard<'_, Phase>, InventoryError> {
        let phase = self.phase();
        match *phase {
            Phase::Open => Ok(phase),
            Phase::Closed => Err(InventoryError::Stopping),
        }
    }

    fn make_map(&self, config: &MapConfig, cards: &[PciAddress]) -> Result<(), InventoryError> {
        let (iommu, reason) = open_iommu(config, cards)?;
        let kind = iommu.kind().as_str();
        tracing::info!(map = config.name, iommu = kind, "map made: {reason}");
        self.lists().maps.push(MapEntry {
            config: config.clone(),
            map: MemoryMap::new(&config.name, iommu),
        });
        Ok(())
    }

    fn forget_map(&self, name: &str) {
        self.lists().maps.retain(|entry| entry.config.name != name);
    }

    fn open_ports(self: &Arc<Self>, ports: &[PortConfig]) -> Result<(), InventoryError> {
        let mut endpoints = Vec::new();
        for port in ports {
            self.check_socket(port)?;
            self.map(&port.map)?;
            if let Some(device) = &port.device {
                check_free(device, self.holder_of(device).as_deref())?;
            }
            endpoints.push(Endpoint::open(&port.socket)?);
        }
        let mut entries = Vec::new();
        for port in ports {
            entries.push(self.open_port(port, &entries)?);
        }
        let ports: Vec<Arc<Port>> = entries.iter().map(|entry| Arc::clone(&entry.port)).collect();
        // Listed before it is served: one that ends at once is found.
        self.lists().ports.extend(entries);
        self.tell_changed();
        for (port, endpoint) in ports.iter().zip(endpoints) {
            if let Err(source) = self.serve(port, endpoint) {
                self.dismiss(&ports);
                return Err(InventoryError::Serve {
                    port: port.name().to_owned(),
                    source,
                });
            }
        }
        // One that came up before anybody watched.
        ports.iter().for_each(|port| port.look_at_link());
        Ok(())
    }

    /// Makes a port that nobody serves yet, on the workers from the one on that has fewest pairs, those of `beside` counted.
    fn open_port(&self, config: &PortConfig, beside: &[PortEntry]) -> Result<PortEntry, InventoryError> {
        let map = self.map(&config.map)?;
        let failed = |source| InventoryError::Serve {
            port: config.name.clone(),
            source,
        };
        let first = {
            let lists = self.lists();
            let mut pairs = vec![0; self.workers.len()];
            for entry in lists.ports.iter().chain(beside) {
                for pair in 0..usize::from(entry.config.queue_pairs) {
                    if let Some(pairs) = pairs.get_mut((entry.worker + pair) % self.workers.len().max(1)) {
                        *pairs += 1;
                    }
                }
            }
            (0..pairs.len()).min_by_key(|index| pairs.get(*index).copied())
        }
        .ok_or_else(|| failed(std::io::Error::other("there is no worker")))?;
        let workers = self.workers.iter().cycle().skip(first).take(self.workers.len());
        let workers = workers.map(Arc::clone).collect();
        let stop = Stop::new().map_err(failed)?;
        let nic: Box<dyn Nic> = match &config.device {
            Some(device) => open_device(config, device, &map)?,
            None => Box::new(Absent::with_pairs(config.queue_pairs)),
        };
        let patience = match config.poll {
            Poll::Micros(time) => Patience::For(Duration::from_micros(time.into())),
            Poll::Always => Patience::Forever,
        };
        let port = Port::new(&config.name, map, nic, workers, patience, config.mtu);
        let port = Arc::new(port);
        Ok(PortEntry {
            device: config.device.as_ref().map(|device| Attached::of(device, &port)),
            config: config.clone(),
            port,
            worker: first,
            stop,
            thread: None,
            ended: false,
        })
    }

    /// Starts the thread that serves a port's front-ends.
    fn serve(self: &Arc<Self>, port: &Arc<Port>, endpoint: Endpoint) -> std::io::Result<()> {
        let Some(stop) = self.with_port(port, |entry| entry.stop.clone()) else {
            return Ok(());
        };
        let presence = Presence {
            inventory: Arc::clone(self),
            port: Arc::clone(port),
            stop,
        };
        let thread = std::thread::Builder::new()
            .name(format!("port {}", port.name()))
            .spawn(move || endpoint.serve(&presence.port, &presence.stop))?;
        self.with_port(port, |entry| entry.thread = Some(thread));
        Ok(())
    }

    /// Disconnects these ports' front-ends, waits until they are gone, and takes the ports from the list. Returns whether
    /// their threads ended as they should.
    fn dismiss(&self, ports: &[Arc<Port>]) -> bool {
        for port in ports {
            self.with_port(port, |entry| entry.stop.ask());
        }
        let mut sound = true;
        for port in ports {
            // Still listed meanwhile: whose worker stands still is freed by the pulse.
            let thread = self.with_port(port, |entry| entry.thread.take()).flatten();
            sound &= thread.is_none_or(|thread| thread.join().is_ok());
        }
        let is_one = |entry: &PortEntry| ports.iter().any(|port| Arc::ptr_eq(port, &entry.port));
        let gone: Vec<PortEntry> = self.lists().ports.extract_if(.., |entry| is_one(entry)).collect();
        self.tell_changed();
        // Devices take their time: not under the lists' lock.
        drop(gone);
        sound
    }

    /// Takes a port's device, if it has one.
    fn take_device(&self, port: &Arc<Port>) -> Result<(), PortError> {
        let has_one = self.with_port(port, |entry| entry.device.is_some());
        if has_one == Some(true) {
            let pairs = u16::try_from(port.queues() / 2).unwrap_or(u16::MAX);
            port.set_device(Box::new(Absent::with_pairs(pairs)))?;
            self.seat(port, None);
        }
        Ok(())
    }

    /// Notes which device a port has now, and has its events watched.
    fn seat(&self, port: &Arc<Port>, device: Option<&DeviceSpec>) {
        let device = device.map(|device| Attached::of(device, port));
        self.with_port(port, |entry| entry.device = device);
        self.tell_changed();
        // One that came up before anybody watched.
        port.look_at_link();
    }

    /// A port's thread has ended. If nobody asked for that, no front-end can come any more, and when that is so for all
    /// ports there are, the process has nothing left to do.
    fn port_ended(&self, port: &Arc<Port>) {
        let is_listed = self.with_port(port, |entry| entry.ended = true).is_some();
        if is_listed && self.lists().ports.iter().all(|entry| entry.ended) {
            self.stop.ask();
        }
    }

    fn compare_port(&self, wanted: &PortConfig) -> Option<Result<Outcome, InventoryError>> {
        let lists = self.lists();
        let entry = lists
            .ports
            .iter()
            .find(|entry| entry.config.name == wanted.name)?;
        Some(entry.compare(wanted))
    }

    fn check_socket(&self, port: &PortConfig) -> Result<(), InventoryError> {
        let Some(path) = port.socket.path() else {
            return Ok(());
        };
        let is_it = |other: &Path| same_path(path, other);
        if self.control.as_deref().is_some_and(is_it) {
            return Err(InventoryError::ControlSocket {
                path: path.to_owned(),
            });
        }
        let lists = self.lists();
        let mut others = lists.ports.iter();
        match others.find(|entry| entry.config.socket.path().is_some_and(is_it)) {
            Some(other) => Err(InventoryError::SocketInUse {
                path: path.to_owned(),
                port: other.config.name.clone(),
            }),
            None => Ok(()),
        }
    }

    fn map_entry(&self, name: &str) -> Result<MapEntry, InventoryError> {
        let lists = self.lists();
        let found = lists.maps.iter().find(|entry| entry.config.name == name);
        found.cloned().ok_or_else(|| InventoryError::NoMap {
            name: name.to_owned(),
            known: lists.maps.iter().map(|entry| entry.config.name.clone()).collect(),
        })
    }

    fn port(&self, name: &str) -> Result<Arc<Port>, InventoryError> {
        let ports = self.ports();
        let found = ports.iter().find(|port| port.name() == name);
        found.cloned().ok_or_else(|| InventoryError::NoPort {
            name: name.to_owned(),
            known: self.port_names(),
        })
    }

    fn port_names(&self) -> Vec<String> {
        self.ports().iter().map(|port| port.name().to_owned()).collect()
    }

    /// The port that has a device.
    fn holder_of(&self, device: &DeviceSpec) -> Option<Arc<Port>> {
        let lists = self.lists();
        let has_it = |entry: &&PortEntry| entry.device.as_ref().is_some_and(|it| it.spec.is_same_as(device));
        lists
            .ports
            .iter()
            .find(has_it)
            .map(|entry| Arc::clone(&entry.port))
    }

    fn with_port<R>(&self, port: &Arc<Port>, work: impl FnOnce(&mut PortEntry) -> R) -> Option<R> {
        let mut lists = self.lists();
        let mut entries = lists.ports.iter_mut();
        entries.find(|entry| Arc::ptr_eq(&entry.port, port)).map(work)
    }

    fn tell_changed(&self) {
        // A full counter is a wake-up that is pending, which is all that is wanted.
        let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.operations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A port's thread, for as long as it runs.
struct Presence {
    inventory: Arc<Inventory>,
    port: Arc<Port>,
    stop: Stop,
}

impl Drop for Presence {
    fn drop(&mut self) {
        if !self.stop.is_asked() {
            self.inventory.port_ended(&self.port);
        }
    }
}

fn check_free(device: &DeviceSpec, holder: Option<&Port>) -> Result<(), InventoryError> {
    holder.map_or(Ok(()), |holder| {
        Err(InventoryError::DeviceInUse {
            device: device.clone(),
            port: holder.name().to_owned(),
            map: holder.map().name().to_owned(),
        })
    })
}
