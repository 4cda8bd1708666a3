//! The far end of the wire: where a frame goes when the back end's device has sent it.
//!
//! ```text
//! driver.rs ──virtqueue──▶ back end ──card, tap or socket──▶ Wire::recv
//!           ◀─────────────          ◀─────────────────────── Wire::send
//! ```
//!
//! A wire is a pair of UNIX datagram sockets, one raw Ethernet frame without FCS per datagram. The back end
//! (or the card model in front of it) binds `local` and sends to `peer`; this end does the opposite. Frames
//! carry a sequence number and a checksum, so a lost, doubled, cut or mixed-up frame is seen at once.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SendFlags, SocketAddrUnix, sendto};

use super::PATIENCE;

/// The smallest Ethernet frame without FCS.
pub const MIN_FRAME_BYTES: usize = 60;
/// The largest frame of a 1500-byte MTU, without FCS.
pub const MAX_FRAME_BYTES: usize = 1514;
/// The EtherType for local experiments (IEEE 802).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const ETHERNET_BYTES: usize = 14;
const SEQUENCE_AT: usize = ETHERNET_BYTES;
const PAYLOAD_AT: usize = SEQUENCE_AT + 8;
const CHECKSUM_BYTES: usize = 4;

/// Makes test frame number `sequence`, `len_bytes` long, to the broadcast address so that no filter drops it.
///
/// # Panics
///
/// If `len_bytes` is below [`MIN_FRAME_BYTES`].
pub fn frame(sequence: u64, len_bytes: usize) -> Vec<u8> {
    assert!(
        len_bytes >= MIN_FRAME_BYTES,
        "a frame has at least {MIN_FRAME_BYTES} bytes"
    );
    let mut frame = vec![0; len_bytes];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[0x02, 0, 0, 0, 0, 0x01]);
    frame[12..ETHERNET_BYTES].copy_from_slice(&ETHERTYPE);
    frame[SEQUENCE_AT..PAYLOAD_AT].copy_from_slice(&sequence.to_le_bytes());
    let end = len_bytes - CHECKSUM_BYTES;
    let mut state = sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in &mut frame[PAYLOAD_AT..end] {
        // xorshift: cheap, and no two frames share a run of bytes.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state.to_le_bytes()[0];
    }
    let sum = checksum(&frame[..end]);
    frame[end..].copy_from_slice(&sum.to_le_bytes());
    frame
}

/// Returns the sequence number of a frame made by [`frame()`], or what is wrong with it.
///
/// # Errors
///
/// A sentence naming the damage.
pub fn sequence_of(frame: &[u8]) -> Result<u64, String> {
    if frame.len() < MIN_FRAME_BYTES {
        return Err(format!(
            "a frame of {} bytes is too short to be ours",
            frame.len()
        ));
    }
    if frame[12..ETHERNET_BYTES] != ETHERTYPE {
        return Err(format!(
            "EtherType {:02x?} is not ours",
            &frame[12..ETHERNET_BYTES]
        ));
    }
    let (body, sum) = frame.split_at(frame.len() - CHECKSUM_BYTES);
    if checksum(body).to_le_bytes() != sum {
        return Err(format!("a frame of {} bytes has a wrong checksum", frame.len()));
    }
    let mut sequence = [0; 8];
    sequence.copy_from_slice(&frame[SEQUENCE_AT..PAYLOAD_AT]);
    Ok(u64::from_le_bytes(sequence))
}

/// FNV-1a: order-sensitive, so swapped segments of one frame are seen.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, &byte| {
        (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// The far end of one wire.
///
/// A thread takes in every frame as it comes, so a back end never stalls on a reader that is busy elsewhere.
#[derive(Debug)]
pub struct Wire {
    socket: UnixDatagram,
    local: PathBuf,
    peer: PathBuf,
    frames: Receiver<Vec<u8>>,
    reader: Option<JoinHandle<()>>,
}

impl Wire {
    /// Binds the far end in `folder`; the back end is to bind [`local`](Self::local) and send to
    /// [`peer`](Self::peer).
    ///
    /// # Errors
    ///
    /// Whatever the socket calls report.
    pub fn bind(folder: &Path) -> std::io::Result<Self> {
        let (local, peer) = (folder.join("wire-local"), folder.join("wire-peer"));
        let socket = UnixDatagram::bind(&peer)?;
        // A full queue at the back end is waited for, but not for ever.
        socket.set_write_timeout(Some(PATIENCE))?;
        let incoming = socket.try_clone()?;
        let (to_test, frames) = channel();
        let reader = std::thread::Builder::new().name("wire".into()).spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            // Zero bytes is the shutdown in `drop`: no Ethernet frame is empty.
            while let Ok(len @ 1..) = incoming.recv(&mut buffer) {
                if to_test.send(buffer[..len].to_vec()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self {
            socket,
            local,
            peer,
            frames,
            reader: Some(reader),
        })
    }

    /// The path the back end binds.
    pub fn local(&self) -> &Path {
        &self.local
    }

    /// The path the back end sends to.
    pub fn peer(&self) -> &Path {
        &self.peer
    }

    /// Puts one frame on the wire towards the guest, waiting while the back end's queue is full.
    ///
    /// # Panics
    ///
    /// If the back end is gone or takes nothing within [`PATIENCE`].
    pub fn send(&self, frame: &[u8]) {
        let sent = self
            .socket
            .send_to(frame, &self.local)
            .expect("the back end takes a frame off the wire");
        assert_eq!(sent, frame.len(), "a datagram is sent whole");
    }

    /// Puts one frame on the wire if there is room, and says whether there was.
    ///
    /// # Panics
    ///
    /// If the back end is gone.
    pub fn try_send(&self, frame: &[u8]) -> bool {
        let to = SocketAddrUnix::new(&self.local).expect("a short path");
        match sendto(&self.socket, frame, SendFlags::DONTWAIT, &to) {
            Ok(_) => true,
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("the back end's end of the wire is gone: {error}"),
        }
    }

    /// Takes the next frame the guest sent.
    ///
    /// # Panics
    ///
    /// If none comes within [`PATIENCE`].
    pub fn recv(&self) -> Vec<u8> {
        self.recv_within(PATIENCE).expect("a frame arrives on the wire")
    }

    /// Takes the next frame the guest sent, if one comes within `limit`.
    ///
    /// # Panics
    ///
    /// If the reader thread died.
    pub fn recv_within(&self, limit: Duration) -> Option<Vec<u8>> {
        match self.frames.recv_timeout(limit) {
            Ok(frame) => Some(frame),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the wire's reader stopped"),
        }
    }

    /// Takes a frame that has already come.
    pub fn try_recv(&self) -> Option<Vec<u8>> {
        self.frames.try_recv().ok()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // The reader's clone is the same socket, so this wakes it.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_keeps_its_number_and_shows_damage() {
        for len in [MIN_FRAME_BYTES, 61, 1000, MAX_FRAME_BYTES] {
            let mut bytes = frame(7, len);
            assert_eq!(sequence_of(&bytes), Ok(7));
            bytes[len / 2] ^= 1;
            assert!(sequence_of(&bytes).is_err());
        }
    }
}
