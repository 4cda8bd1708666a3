//! The reference back end: plain copying virtio-net on the rust-vmm crates.
//!
//! ```text
//! tx virtqueue ──virtio-queue chain──copy──▶ datagram socket ──▶ far end of the wire
//! rx virtqueue ◀─────────copy────────────── datagram socket ◀──
//! ```
//!
//! It is the second opinion on the suite: a test that fails here as well is wrong about the protocol or the ring.
//! So it shares no code with the product, and takes what the crates offer: `vhost-user-backend` for the protocol,
//! `virtio-queue` for walking chains. Four edges of those crates shape it: a daemon serves one connection and has
//! to be made anew; a used entry is published one by one, so merged frames need [`net`]'s own store; the flag
//! against interrupts is not looked at; and no hook tells a worker to heal a ring that starts with a wrong base.

pub mod net;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use vhost::vhost_user::Listener;
use vhost_user_backend::{Error, VhostUserBackend, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use net::{NetBackEnd, WIRE_EVENT};

/// Binds the back end's end of the wire and points it at the far end.
///
/// # Errors
///
/// What bind and connect report.
pub fn open_wire(local: &Path, peer: &Path) -> Result<UnixDatagram> {
    let wire = UnixDatagram::bind(local).with_context(|| format!("cannot bind {}", local.display()))?;
    wire.connect(peer)
        .with_context(|| format!("cannot reach {}", peer.display()))?;
    wire.set_nonblocking(true)?;
    Ok(wire)
}

/// Serves one front-end after the other on `socket`, for ever.
///
/// # Errors
///
/// If the socket cannot be made or a daemon cannot be started.
pub fn serve(socket: &Path, wire: &UnixDatagram) -> Result<()> {
    let mut listener =
        Listener::new(socket, true).with_context(|| format!("cannot listen on {}", socket.display()))?;
    loop {
        serve_one(wire, |daemon| daemon.start(&mut listener))?;
    }
}

/// Connects to a front-end that listens on `socket`, again and again, until nobody listens there.
///
/// # Errors
///
/// When the front-end cannot be reached.
pub fn serve_as_client(socket: &Path, wire: &UnixDatagram) -> Result<()> {
    let path = socket.to_str().context("the socket's path is not text")?;
    loop {
        serve_one(wire, |daemon| daemon.start_client(path))?;
    }
}

type Daemon = VhostUserDaemon<Arc<NetBackEnd>>;

fn serve_one(wire: &UnixDatagram, start: impl FnOnce(&mut Daemon) -> Result<(), Error>) -> Result<()> {
    // The crate's error is neither Sync nor an Error.
    let in_words = |error: Error| anyhow!("{error}");
    let back_end = Arc::new(NetBackEnd::new(wire.try_clone()?));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("reference".to_owned(), Arc::clone(&back_end), memory).map_err(in_words)?;
    let workers = daemon.get_epoll_handlers();
    // Edge-triggered, because frames may wait on the wire while the guest has no buffer for them.
    let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
    for worker in &workers {
        worker.register_listener(wire.as_raw_fd(), events, u64::from(WIRE_EVENT))?;
    }
    let started = start(&mut daemon).map_err(in_words);
    if started.is_ok() {
        match daemon.wait() {
            Ok(()) => eprintln!("the front-end left"),
            Err(error) => eprintln!("the front-end's connection ended: {error}"),
        }
    }
    // The worker would outlive the connection and go on writing to the guest; dropping the daemon joins it.
    for worker in workers {
        worker.unregister_listener(wire.as_raw_fd(), events, u64::from(WIRE_EVENT))?;
        worker.send_exit_event();
    }
    drop(daemon);
    eprintln!("{} queues stopped", back_end.num_queues());
    started
}
