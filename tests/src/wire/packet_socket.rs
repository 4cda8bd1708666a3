//! An AF_PACKET socket on one interface: whole frames in and out, below every protocol of the kernel's.
//!
//! Read with: packet(7).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvfrom, send, setsockopt,
    socket, sockopt,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::frame::Mac;

/// `sll_pkttype` of a frame this machine sends (linux/if_packet.h).
const PACKET_OUTGOING: u8 = 4;

/// Room in the socket for frames that wait, counted by the kernel with its overhead of 2 KiB or so each.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The machine has no such interface.
    #[error("no interface {name} here")]
    NoInterface {
        /// As it was asked for.
        name: String,
    },
    /// The kernel refused a step on the way.
    #[error("cannot {attempt} on {name}")]
    Socket {
        /// Which step.
        attempt: &'static str,
        /// On which interface.
        name: String,
        /// What the kernel said.
        source: Errno,
    },
}

/// Whole frames in and out of one interface. Nothing blocks but [`wait`](Self::wait).
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    name: String,
    index: usize,
    mac: Mac,
}

impl PacketSocket {
    /// Opens one on interface `name`. Needs CAP_NET_RAW.
    ///
    /// # Errors
    ///
    /// [`WireError`] if there is no such interface or the kernel refuses.
    pub fn open(name: &str) -> Result<Self, WireError> {
        let refused = |attempt| {
            move |source| WireError::Socket {
                attempt,
                name: name.to_owned(),
                source,
            }
        };
        // The kernel lists each interface with its link address, whose protocol is 0. Bound to that, the socket
        // keeps the protocol it was made with.
        let address: LinkAddr = getifaddrs()
            .map_err(refused("list interfaces"))?
            .filter(|interface| interface.interface_name == name)
            .find_map(|interface| interface.address?.as_link_addr().copied())
            .ok_or_else(|| WireError::NoInterface {
                name: name.to_owned(),
            })?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)
            .map_err(refused("open a packet socket"))?;
        bind(fd.as_raw_fd(), &address).map_err(refused("bind a packet socket"))?;
        // Beyond net.core.rmem_max only for the privileged; less still works, with a smaller window.
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)
                .map_err(refused("size the receive buffer"))?;
        }
        let mac = Mac(address.addr().unwrap_or_default());
        Ok(Self {
            fd,
            name: name.to_owned(),
            index: address.ifindex(),
            mac,
        })
    }

    /// The interface's own address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Sends one frame; false if the interface has no room now.
    ///
    /// # Errors
    ///
    /// [`WireError`] if the interface is gone, down, or refuses frames of this length.
    pub fn send(&self, frame: &[u8]) -> Result<bool, WireError> {
        match send(self.fd.as_raw_fd(), frame, MsgFlags::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => Ok(false),
            Err(source) => Err(self.failed("send", source)),
        }
    }

    /// Takes the next frame that came in from outside, cut to `frame`'s length; `None` if none waits.
    ///
    /// # Errors
    ///
    /// [`WireError`] if the interface is gone.
    pub fn receive(&self, frame: &mut [u8]) -> Result<Option<usize>, WireError> {
        loop {
            match recvfrom::<LinkAddr>(self.fd.as_raw_fd(), frame) {
                // Our own frames pass by here as well, and before `bind` so did other interfaces'.
                Ok((len, Some(from)))
                    if from.ifindex() == self.index && from.pkttype() != PACKET_OUTGOING =>
                {
                    return Ok(Some(len));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(source) => return Err(self.failed("receive", source)),
            }
        }
    }

    /// Waits until a frame may be there; false if none came within `patience`.
    ///
    /// # Errors
    ///
    /// [`WireError`] if waiting fails.
    pub fn wait(&self, patience: Duration) -> Result<bool, WireError> {
        let timeout = Timespec::try_from(patience).expect("a patience of less than centuries");
        match poll(
            &mut [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::IN)],
            Some(&timeout),
        ) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(self.failed("wait", Errno::from_raw(error.raw_os_error()))),
        }
    }

    fn failed(&self, attempt: &'static str, source: Errno) -> WireError {
        WireError::Socket {
            attempt,
            name: self.name.clone(),
            source,
        }
    }
}
