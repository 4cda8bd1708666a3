//! One front-end's socket: waits until a whole message is there, then has it handled. One thread each.
//!
//! ```text
//! socket ──peek header, wait for body──▶ vhost's request handler ──▶ session
//! ```
//!
//! `vhost` reads blocking, and a message that never ends would hold its thread for ever. So nothing is handed to it
//! before all of it has arrived, within a bound. A message it does not know, or one that is malformed, ends this
//! connection and nothing else.
//!
//! Read with: vhost-user, "Message Specification".

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError, VhostUserBackendReqHandler};

use crate::session::Session;
use crate::signals::{Stop, Woken};

const HEADER_BYTES: usize = 12;
/// `vhost` takes no longer body.
const MAX_BODY_BYTES: u32 = 4096;
/// A front-end writes a message in one go; one that is half there for this long is stuck.
const MESSAGE_BOUND: Duration = Duration::from_secs(5);
/// The rest of a message is on its way: how often to look.
const STEP: Duration = Duration::from_millis(1);
/// How long a region that was taken away may take to come back with other bounds. QEMU sends both in one go.
const REGION_BOUND: Duration = Duration::from_millis(200);
/// How often to look whether announced memory is still there.
const MEMORY_BEAT: Duration = Duration::from_secs(2);
/// How often to look whether memory was discarded behind the card's back: as a rule, and at least, however often some is
/// found. Looking costs system calls in proportion to the guest's memory.
const DISCARD_BEAT: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(640));
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const SET_VRING_ENABLE: u32 = 18;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// How a connection ended.
#[derive(Debug)]
pub enum End {
    /// The front-end closed it.
    Closed,
    /// The process stops.
    Stopped,
    /// The front-end broke the protocol, or asked for what could not be refused with an answer.
    Broken(String),
}

/// A message's header, as it waits in the socket.
struct Header {
    request: u32,
    flags: u32,
    body_bytes: u32,
}

/// Serves one front-end until it goes. Blocks all that time.
pub fn serve(stream: UnixStream, session: &Arc<Session>, stop: &Stop) -> End {
    let peek = match stream.try_clone() {
        Ok(peek) => peek,
        Err(error) => return End::Broken(format!("cannot duplicate the socket: {error}")),
    };
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(session));
    let (mut last_look, mut beat) = (Instant::now(), DISCARD_BEAT.0);
    loop {
        if last_look.elapsed() >= beat {
            // What is found again and again, a balloon at work for instance, is not run after.
            beat = match session.renew_discarded_or_tell() {
                0 => DISCARD_BEAT.0,
                _ => (2 * beat).min(DISCARD_BEAT.1),
            };
            last_look = Instant::now();
        }
        let in_motion = session.regions_in_motion();
        let patience = if in_motion { REGION_BOUND } else { MEMORY_BEAT };
        match stop.wait(Some(peek.as_fd()), Some(patience)) {
            Woken::Stop => return End::Stopped,
            Woken::Timeout | Woken::Ready if session.has_lost_memory() => {
                return End::Broken("its memory file was cut short while it was mapped".to_owned());
            }
            Woken::Timeout => {
                session.regions_at_rest();
                continue;
            }
            Woken::Ready => {}
        }
        let header = match whole_message(&peek, stop) {
            Ok(Some(header)) => header,
            Ok(None) => return End::Closed,
            Err(end) => return end,
        };
        tracing::debug!(
            port = session.port().name(),
            request = name_of(header.request),
            "message"
        );
        if !matches!(header.request, ADD_MEM_REG | REM_MEM_REG) {
            session.regions_at_rest();
        }
        if header.request == SET_VRING_ENABLE {
            match enable(&peek, session) {
                Ok(()) => continue,
                Err(why) => return End::Broken(format!("SET_VRING_ENABLE (18): {why}")),
            }
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(VhostError::ReqHandlerError(error))
                if session.acknowledges() && header.flags & NEED_REPLY != 0 && !is_get(header.request) =>
            {
                // The front-end has its answer, and the stream is in step.
                tracing::debug!(%error, "refused with an answer");
            }
            Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => return End::Closed,
            Err(error) => {
                return End::Broken(format!(
                    "{} ({}): {error}",
                    name_of(header.request),
                    header.request
                ));
            }
        }
    }
}

/// Serves SET_VRING_ENABLE, all of which has arrived.
///
/// QEMU sends it before SET_FEATURES, and wants an answer; `vhost` refuses it then, without one.
fn enable(mut socket: &UnixStream, session: &Session) -> Result<(), String> {
    let mut message = [0; HEADER_BYTES + 8];
    socket
        .read_exact(&mut message)
        .map_err(|error| format!("recv failed: {error}"))?;
    let word = |at: usize| word_at(&message, at);
    let (flags, len, index, num) = (word(4), word(8), word(12), word(16));
    if len != 8 || flags & 3 != VERSION || num > 1 {
        return Err(format!(
            "malformed: flags {flags:#x}, {len} bytes, queue {index}, value {num}"
        ));
    }
    let result = session.set_vring_enable(index, num == 1);
    if session.acknowledges() && flags & NEED_REPLY != 0 {
        let mut answer = Vec::with_capacity(HEADER_BYTES + 8);
        for word in [
            SET_VRING_ENABLE,
            VERSION | REPLY,
            8,
            u32::from(result.is_err()),
            0,
        ] {
            answer.extend_from_slice(&word.to_ne_bytes());
        }
        return socket
            .write_all(&answer)
            .map_err(|error| format!("send failed: {error}"));
    }
    result.map_err(|error| error.to_string())
}

/// Waits until the message that has begun is all there. `None` if the front-end has closed instead of beginning one.
fn whole_message(socket: &UnixStream, stop: &Stop) -> Result<Option<Header>, End> {
    let deadline = Instant::now() + MESSAGE_BOUND;
    loop {
        let mut bytes = [0; HEADER_BYTES];
        let there = match recv(socket, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Ok(None),
            Ok((_, there)) => there,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(End::Broken(format!("recv failed: {error}"))),
        };
        if there == HEADER_BYTES {
            let header = Header::from_bytes(bytes);
            if header.body_bytes > MAX_BODY_BYTES {
                let (request, len) = (header.request, header.body_bytes);
                let why = format!("message {request} announces {len} bytes, more than {MAX_BODY_BYTES}");
                return Err(End::Broken(why));
            }
            let want = HEADER_BYTES as u64 + u64::from(header.body_bytes);
            match rustix::io::ioctl_fionread(socket) {
                Ok(queued) if queued >= want => return Ok(Some(header)),
                Ok(_) => {}
                Err(error) => return Err(End::Broken(format!("FIONREAD failed: {error}"))),
            }
        }
        if has_hung_up(socket) {
            return Err(End::Broken(format!(
                "closed in the middle of a message, {there} bytes of its header read"
            )));
        }
        if Instant::now() > deadline {
            return Err(End::Broken(format!(
                "a message was not complete after {} s",
                MESSAGE_BOUND.as_secs()
            )));
        }
        // The socket is readable already, so only time tells of more.
        if stop.wait(None, Some(STEP)) == Woken::Stop {
            return Err(End::Stopped);
        }
    }
}

/// Whether the other side has closed the socket.
pub fn has_hung_up(socket: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

impl Header {
    fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| word_at(&bytes, at);
        Self {
            request: word(0),
            flags: word(4),
            body_bytes: word(8),
        }
    }
}

fn word_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

/// Requests whose answer is a value, so that a failure cannot be told.
fn is_get(request: u32) -> bool {
    matches!(request, 1 | 11 | 15 | 17 | 24 | 31 | 36 | 39)
}

/// A request as the specification calls it.
fn name_of(request: u32) -> &'static str {
    const NAMES: [&str; 46] = [
        "none",
        "GET_FEATURES",
        "SET_FEATURES",
        "SET_OWNER",
        "RESET_OWNER",
        "SET_MEM_TABLE",
        "SET_LOG_BASE",
        "SET_LOG_FD",
        "SET_VRING_NUM",
        "SET_VRING_ADDR",
        "SET_VRING_BASE",
        "GET_VRING_BASE",
        "SET_VRING_KICK",
        "SET_VRING_CALL",
        "SET_VRING_ERR",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM",
        "SET_VRING_ENABLE",
        "SEND_RARP",
        "NET_SET_MTU",
        "SET_BACKEND_REQ_FD",
        "IOTLB_MSG",
        "SET_VRING_ENDIAN",
        "GET_CONFIG",
        "SET_CONFIG",
        "CREATE_CRYPTO_SESSION",
        "CLOSE_CRYPTO_SESSION",
        "POSTCOPY_ADVISE",
        "POSTCOPY_LISTEN",
        "POSTCOPY_END",
        "GET_INFLIGHT_FD",
        "SET_INFLIGHT_FD",
        "GPU_SET_SOCKET",
        "RESET_DEVICE",
        "VRING_KICK",
        "GET_MAX_MEM_SLOTS",
        "ADD_MEM_REG",
        "REM_MEM_REG",
        "SET_STATUS",
        "GET_STATUS",
        "GET_SHARED_OBJECT",
        "SET_DEVICE_STATE_FD",
        "CHECK_DEVICE_STATE",
        "GET_SHMEM_CONFIG",
        "GET_VRING_BASE_SKIP_DRAIN",
    ];
    usize::try_from(request)
        .ok()
        .and_then(|index| NAMES.get(index))
        .copied()
        .unwrap_or("an unknown message")
}
