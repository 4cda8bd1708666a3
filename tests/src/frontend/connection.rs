//! One vhost-user connection, message by message.
//!
//! ```text
//! vmm.rs ──request()/command()──▶ header + body + fds ──UNIX stream──▶ back end
//! suite.rs ──send_bytes()───────▶ anything at all ─────────────────────▶
//! ```
//!
//! Numbers and layouts are written out from the specification rather than taken from the `vhost` crate, so the
//! back end's own crate cannot agree with itself on a mistake. Every wait has a bound.
//!
//! Read with: the vhost-user specification, "Message Specification".

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};

use super::PATIENCE;
use super::event::{wait_readable, wait_writable};

/// Front-end message numbers (vhost-user, "Front-end message types").
pub mod request {
    /// Get the virtio features.
    pub const GET_FEATURES: u32 = 1;
    /// Accept virtio features.
    pub const SET_FEATURES: u32 = 2;
    /// Claim the back end.
    pub const SET_OWNER: u32 = 3;
    /// Replace the memory table.
    pub const SET_MEM_TABLE: u32 = 5;
    /// Set a ring's size.
    pub const SET_VRING_NUM: u32 = 8;
    /// Set a ring's addresses.
    pub const SET_VRING_ADDR: u32 = 9;
    /// Set the next available index.
    pub const SET_VRING_BASE: u32 = 10;
    /// Stop a ring and get the next available index.
    pub const GET_VRING_BASE: u32 = 11;
    /// Hand over the kick eventfd and start the ring.
    pub const SET_VRING_KICK: u32 = 12;
    /// Hand over the call eventfd.
    pub const SET_VRING_CALL: u32 = 13;
    /// Hand over the error eventfd.
    pub const SET_VRING_ERR: u32 = 14;
    /// Get the protocol features.
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Accept protocol features.
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    /// Get the number of queues.
    pub const GET_QUEUE_NUM: u32 = 17;
    /// Enable or disable a ring.
    pub const SET_VRING_ENABLE: u32 = 18;
    /// Get the number of memory slots.
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    /// Add one memory region.
    pub const ADD_MEM_REG: u32 = 37;
    /// Remove one memory region.
    pub const REM_MEM_REG: u32 = 38;
    /// Set the device status.
    pub const SET_STATUS: u32 = 39;
    /// Get the device status.
    pub const GET_STATUS: u32 = 40;
}

const HEADER_BYTES: usize = 12;
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In the payload of KICK, CALL and ERR: no descriptor comes along.
pub const NO_FD: u64 = 1 << 8;
const MAX_FDS: usize = 32;

/// What went wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket failed, or nothing came within the bound.
    #[error("the connection failed")]
    Socket(#[from] io::Error),
    /// The back end closed the connection.
    #[error("the back end closed the connection")]
    Closed,
    /// The back end answered, but said no.
    #[error("the back end refused request {request} with {status:#x}")]
    Refused {
        /// The message number.
        request: u32,
        /// The nonzero status it sent.
        status: u64,
    },
    /// The answer does not fit the request.
    #[error("request {asked} was answered with request {answered}, flags {flags:#x}, {len} bytes")]
    WrongReply {
        /// The message number sent.
        asked: u32,
        /// The message number that came back.
        answered: u32,
        /// The flags that came back.
        flags: u32,
        /// The body's length.
        len: usize,
    },
}

type Result<T> = std::result::Result<T, ConnectionError>;

/// One connection to a back end.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Set once REPLY_ACK is negotiated: from then on every command waits for its answer.
    pub reply_ack: bool,
}

impl Connection {
    /// Connects to a back end that listens at `path`.
    ///
    /// # Errors
    ///
    /// What connect reports.
    pub fn connect(path: &Path) -> Result<Self> {
        Self::over(UnixStream::connect(path)?)
    }

    /// Waits for a back end in client mode to connect to `listener`.
    ///
    /// # Errors
    ///
    /// If none comes within [`PATIENCE`].
    pub fn accept(listener: &UnixListener) -> Result<Self> {
        if !wait_readable(listener.as_fd(), PATIENCE) {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        Self::over(listener.accept()?.0)
    }

    /// Takes a socket that is connected already.
    ///
    /// # Errors
    ///
    /// What setting its timeouts reports.
    pub fn over(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            reply_ack: false,
        })
    }

    /// Sends a request that always has an answer, and returns its body.
    ///
    /// # Errors
    ///
    /// If the connection ends or the answer does not fit.
    pub fn request(&self, request: u32, body: &[u8]) -> Result<Vec<u8>> {
        self.send(request, 0, body, &[])?;
        let (reply, body) = self.receive()?;
        if reply.request != request || reply.flags & FLAG_REPLY == 0 || reply.flags & 3 != VERSION {
            return Err(wrong(request, reply, &body));
        }
        Ok(body)
    }

    /// As [`request`](Self::request), for an answer of one number.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn request_u64(&self, request: u32) -> Result<u64> {
        let body = self.request(request, &[])?;
        let number = <[u8; 8]>::try_from(body.as_slice());
        number
            .map(u64::from_ne_bytes)
            .map_err(|_| wrong(request, Header { request, flags: 0 }, &body))
    }

    /// Sends a command; with REPLY_ACK it waits until the back end has done it.
    ///
    /// # Errors
    ///
    /// [`ConnectionError::Refused`] if the back end says no, else as [`request`](Self::request).
    pub fn command(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if !self.reply_ack {
            return self.send(request, 0, body, fds);
        }
        self.send(request, FLAG_NEED_REPLY, body, fds)?;
        let (reply, body) = self.receive()?;
        let status = <[u8; 8]>::try_from(body.as_slice()).map(u64::from_ne_bytes);
        match status {
            _ if reply.request != request => Err(wrong(request, reply, &body)),
            Ok(0) => Ok(()),
            Ok(status) => Err(ConnectionError::Refused { request, status }),
            Err(_) => Err(wrong(request, reply, &body)),
        }
    }

    /// Sends one well-formed message without waiting for anything.
    ///
    /// # Errors
    ///
    /// If the connection ended.
    pub fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let len = u32::try_from(body.len()).expect("a message is small");
        self.send_bytes(&message(request, VERSION | flags, len, body), fds)
    }

    /// Sends one message over and over, reading nothing, until the back end takes no more; returns how often it went
    /// out.
    ///
    /// # Errors
    ///
    /// If the connection ended.
    pub fn flood(&self, request: u32, body: &[u8]) -> Result<u64> {
        // A back end that still reads makes room long before this.
        const STUCK: Duration = Duration::from_millis(500);
        let len = u32::try_from(body.len()).expect("a message is small");
        let bytes = message(request, VERSION, len, body);
        let mut count = 0;
        while wait_writable(self.stream.as_fd(), STUCK) {
            match send(&self.stream, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) if sent == bytes.len() => count += 1,
                Ok(_) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                // poll(2) saw room that another message took up in the meantime, or not enough of it.
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(count)
    }

    /// Sends bytes as they are, with descriptors on the first of them.
    ///
    /// # Errors
    ///
    /// If the connection ended.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(
                ancillary.push(SendAncillaryMessage::ScmRights(fds)),
                "at most {MAX_FDS} descriptors"
            );
        }
        let sent = sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        );
        let sent = sent.map_err(io::Error::from)?;
        if sent != bytes.len() {
            return Err(io::Error::from(io::ErrorKind::WriteZero).into());
        }
        Ok(())
    }

    /// Takes the next message.
    fn receive(&self) -> Result<(Header, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
        );
        match got.map_err(io::Error::from) {
            Ok(received) if received.bytes == HEADER_BYTES => {}
            Ok(_) => return Err(ConnectionError::Closed),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ConnectionError::Closed);
            }
            Err(error) => return Err(error.into()),
        }
        // No answer we ask for brings descriptors; close what comes.
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                drop(fds.collect::<Vec<OwnedFd>>());
            }
        }
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut body = vec![0; usize::try_from(word(8).min(1 << 16)).expect("16 bits fit")];
        match (&self.stream).read_exact(&mut body) {
            Ok(()) => Ok((
                Header {
                    request: word(0),
                    flags: word(4),
                },
                body,
            )),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ConnectionError::Closed),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the back end to close the connection, reading over whatever it still says.
    ///
    /// # Errors
    ///
    /// If it does not within [`PATIENCE`].
    pub fn wait_closed(&self) -> Result<()> {
        loop {
            match self.receive() {
                Ok(_) => {}
                Err(ConnectionError::Closed) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends the connection, as the death of the front-end does.
    ///
    /// # Errors
    ///
    /// What shutdown reports.
    pub fn hang_up(&self) -> Result<()> {
        Ok(self.stream.shutdown(std::net::Shutdown::Both)?)
    }

    /// Whether the back end has said something that is not yet read.
    pub fn has_an_answer(&self) -> bool {
        wait_readable(self.stream.as_fd(), Duration::ZERO) && self.receive().is_ok()
    }

    /// Says that no more bytes will come, as a front-end that dies in the middle of a message does.
    ///
    /// # Errors
    ///
    /// What shutdown reports.
    pub fn stop_sending(&self) -> Result<()> {
        Ok(self.stream.shutdown(std::net::Shutdown::Write)?)
    }
}

#[derive(Clone, Copy, Debug)]
struct Header {
    request: u32,
    flags: u32,
}

fn wrong(asked: u32, reply: Header, body: &[u8]) -> ConnectionError {
    ConnectionError::WrongReply {
        asked,
        answered: reply.request,
        flags: reply.flags,
        len: body.len(),
    }
}

/// Lays out one message, with the announced length free to lie.
pub fn message(request: u32, flags: u32, announced_len: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    for word in [request, flags, announced_len] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}
