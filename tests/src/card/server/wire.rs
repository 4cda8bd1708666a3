//! The wire between processes: UNIX datagrams, one raw frame each, as QEMU's `-netdev dgram` speaks.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread;
use std::time::Duration;

use super::StartError;
use super::shared::Shared;
use crate::card::wire::Wire;

/// Frames that may wait for a slow peer before they are lost.
const QUEUE_LEN: usize = 4096;
/// How long one frame waits for a peer whose socket is full.
const PATIENCE: Duration = Duration::from_secs(1);
/// The largest datagram QEMU's back end sends, with room to tell a longer one.
const FRAME_MAX: usize = 70_000;

pub(super) fn bind(path: &Path) -> Result<UnixDatagram, StartError> {
    // A datagram socket cannot be asked whether somebody still reads it; the path is ours by agreement.
    let _ = std::fs::remove_file(path);
    UnixDatagram::bind(path).map_err(|source| StartError::Listen {
        path: path.to_owned(),
        source,
    })
}

/// The sending half. A thread of its own sends, so that two cards wired together cannot wait for each other.
pub(super) struct DatagramWire {
    frames: SyncSender<Vec<u8>>,
    lost: Arc<AtomicU64>,
}

impl DatagramWire {
    pub(super) fn start(socket: &UnixDatagram, peer: PathBuf) -> io::Result<Self> {
        let socket = socket.try_clone()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let (frames, to_send) = mpsc::sync_channel::<Vec<u8>>(QUEUE_LEN);
        let lost = Arc::new(AtomicU64::new(0));
        let lost_here = Arc::clone(&lost);
        thread::spawn(move || {
            for frame in to_send {
                if socket.send_to(&frame, &peer).is_err() {
                    lost_here.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Self { frames, lost })
    }

    /// Counts frames that left the card and found no peer.
    pub(super) fn lost_frames(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lost)
    }
}

impl Wire for DatagramWire {
    fn transmit(&mut self, frame: &[u8]) {
        if self.frames.try_send(frame.to_vec()).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Feeds the card what arrives, for ever.
pub(super) fn receive(socket: &UnixDatagram, shared: &Shared, hold: bool) {
    let mut frame = vec![0; FRAME_MAX];
    loop {
        match socket.recv(&mut frame) {
            Ok(len) => {
                if hold {
                    shared.wait_for_room();
                }
                shared.with(|card| card.receive_from_wire(&frame[..len]));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                eprintln!("card-model: the wire broke: {error}");
                return;
            }
        }
    }
}
