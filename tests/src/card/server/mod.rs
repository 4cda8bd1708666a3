//! The card as a process of its own: a vfio-user server that outlives its clients.
//!
//! ```text
//! client ──vfio-user socket──▶ device.rs ──┐            ┌── clock thread (real time)
//!        ──DMA_MAP, fds──────▶ memory.rs   ├─▶ the card ├── wire.rs (UNIX datagrams, one frame each)
//!        ◀─eventfds──────────────────────┘            └── control.rs (text commands)
//!        ◀─eventfds── host.rs (request, error) ◀───────────────┘
//! ```
//!
//! One mutex around the card serialises them all. The crate's server blocks in one connection at a time; when
//! a client goes away, killed or not, the card does what VFIO does when the last owner closes the device
//! (Bus Master off, reset, mappings gone), unless told to live on for a live upgrade, and waits for the next.

mod control;
mod device;
mod host;
mod memory;
mod shared;
mod wire;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use super::{Card82576, Options, Violation};
use control::Control;
use device::Device;
use host::Host;
pub use memory::MappedMemory;
use shared::Shared;
use wire::DatagramWire;

/// Where the process listens, and what card it shows.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The vfio-user socket.
    pub socket: PathBuf,
    /// The datagram socket frames arrive at.
    pub wire_local: PathBuf,
    /// The datagram socket frames are sent to; it may come and go.
    pub wire_peer: PathBuf,
    /// The control socket, if one is wanted.
    pub control: Option<PathBuf>,
    /// A file that gets one violation a line, as they happen.
    pub violations: Option<PathBuf>,
    /// The card's station address.
    pub mac: [u8; 6],
    /// What kind of card.
    pub options: Options,
    /// Neither reset nor forget mappings and interrupts when a client goes away.
    pub keep_on_close: bool,
    /// Leave frames in the wire's socket while no receive descriptor is posted, as QEMU does, instead of
    /// dropping them when the packet buffer is full.
    pub hold_frames: bool,
}

/// Why the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A socket could not be bound.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The violations file could not be made.
    #[error("cannot create {}", path.display())]
    Create {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The vfio-user server refused to start.
    #[error("cannot serve vfio-user on {}", path.display())]
    Serve {
        /// Where.
        path: PathBuf,
        /// Why.
        source: vfio_user::Error,
    },
}

/// A running card process.
pub struct Server {
    shared: Arc<Shared>,
    broken_rules: Arc<AtomicU64>,
    paths: Vec<PathBuf>,
}

impl Server {
    /// Binds all sockets and starts the threads that serve them. `quit` gets a message when a client of the
    /// control socket asks the process to end.
    ///
    /// # Errors
    ///
    /// [`StartError`] if a socket or the violations file cannot be made.
    pub fn start(settings: Settings, quit: mpsc::Sender<()>) -> Result<Self, StartError> {
        let memory = Arc::new(MappedMemory::default());
        let wire_socket = wire::bind(&settings.wire_local)?;
        let wire = DatagramWire::start(&wire_socket, settings.wire_peer.clone()).map_err(|source| {
            StartError::Listen {
                path: settings.wire_local.clone(),
                source,
            }
        })?;
        let lost_frames = wire.lost_frames();
        let card = Card82576::with_options(
            settings.mac,
            Box::new(Arc::clone(&memory)),
            Box::new(wire),
            settings.options,
        );
        let broken_rules = Arc::new(AtomicU64::new(0));
        let listing = observe(&card, settings.violations.as_deref(), &broken_rules)?;
        let shared = Arc::new(Shared::new(card));

        remove_stale(&settings.socket);
        let server = vfio_user::Server::new(&settings.socket, true, device::irqs(), device::regions())
            .map_err(|source| StartError::Serve {
                path: settings.socket.clone(),
                source,
            })?;
        let host = Host::default();
        let device = Device::new(Arc::clone(&shared), memory, host.clone(), settings.keep_on_close);
        thread::spawn(move || device.serve(&server));

        let mut paths = vec![settings.socket.clone(), settings.wire_local.clone()];
        if let Some(path) = &settings.control {
            remove_stale(path);
            let listener = UnixListener::bind(path).map_err(|source| StartError::Listen {
                path: path.clone(),
                source,
            })?;
            let control = Control::new(Arc::clone(&shared), host, listing, lost_frames, quit);
            thread::spawn(move || control.serve(&listener));
            paths.push(path.clone());
        }
        let clock = Arc::clone(&shared);
        thread::spawn(move || clock.keep_time());
        let receiver = Arc::clone(&shared);
        let hold = settings.hold_frames;
        thread::spawn(move || wire::receive(&wire_socket, &receiver, hold));
        Ok(Self {
            shared,
            broken_rules,
            paths,
        })
    }

    /// Removes the sockets and returns how many violations there were.
    #[must_use]
    pub fn finish(self) -> u64 {
        // Their place is the file and the exit status, not the log's panic.
        let _ = self.shared.with(|card| card.violations().take());
        for path in &self.paths {
            let _ = std::fs::remove_file(path);
        }
        self.broken_rules.load(Ordering::SeqCst)
    }
}

/// All violations so far, as text, for the control socket.
type Listing = Arc<std::sync::Mutex<Vec<String>>>;

/// Sends violations where a test finds them even after the process was killed.
fn observe(card: &Card82576, path: Option<&Path>, count: &Arc<AtomicU64>) -> Result<Listing, StartError> {
    let mut file = path
        .map(|path| {
            File::create(path).map_err(|source| StartError::Create {
                path: path.to_owned(),
                source,
            })
        })
        .transpose()?;
    let listing = Listing::default();
    let (kept, count) = (Arc::clone(&listing), Arc::clone(count));
    card.violations().observe(move |violation: &Violation| {
        count.fetch_add(1, Ordering::SeqCst);
        eprintln!("card-model: violation: {violation}");
        if let Some(file) = &mut file {
            let _ = writeln!(file, "{violation}");
        }
        let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if kept.len() < 1000 {
            kept.push(violation.to_string());
        }
    });
    Ok(listing)
}

/// Removes a socket that a killed process left behind. One that answers stays, and binding will say so.
fn remove_stale(path: &Path) {
    if path.exists() && UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}
