//! The VMM's part: which messages go out, in which order.
//!
//! ```text
//! Session::negotiate ──▶ features, queues, slots
//! Session::start ──▶ memory ──▶ rings ──▶ enable        (one order for QEMU, one for DPDK's virtio-user)
//! Session::get_vring_base, enable, set_mem_table, add_region, remove_region ── while it runs
//! ```
//!
//! QEMU's order is that of `vhost_user_backend_init`, `vhost_dev_init`, `vhost_net_start` and `vhost_dev_start`;
//! virtio-user's is that of `virtio_user_dev_init` and `virtio_user_start_device`.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::connection::{Connection, ConnectionError, NO_FD, request};
use super::event::Event;
use super::memory::{Announcement, GuestMemory, Region};

/// Virtio and vhost-user feature bits, as masks.
pub mod feature {
    /// Mergeable receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// Several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notification by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The vhost-user protocol has features of its own.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
    /// Buffers come back in the order they were offered.
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Protocol feature bits, as masks.
pub mod protocol {
    /// More than one queue pair.
    pub const MQ: u64 = 1 << 0;
    /// Commands are answered.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// Memory regions come and go one by one.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// The device status is passed on.
    pub const STATUS: u64 = 1 << 16;
}

/// Device status bits (virtio, "Device Status Field").
mod status {
    pub(super) const ACKNOWLEDGE: u64 = 1;
    pub(super) const DRIVER: u64 = 2;
    pub(super) const DRIVER_OK: u64 = 4;
    pub(super) const FEATURES_OK: u64 = 8;
}

/// Whose order of messages is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// QEMU 10 and newer.
    Qemu,
    /// As QEMU, but rings are enabled last and every command is answered: cloud-hypervisor's habits.
    EnableLast,
    /// DPDK's virtio-user.
    VirtioUser,
}

/// Where a split ring lies and how large it is.
#[derive(Clone, Copy, Debug)]
pub struct RingPlace {
    /// Entries.
    pub size: u16,
    /// Descriptor table, guest-physical.
    pub desc: u64,
    /// Available ring, guest-physical.
    pub avail: u64,
    /// Used ring, guest-physical.
    pub used: u64,
}

/// The eventfds of one ring.
#[derive(Debug, Default)]
pub struct QueueEvents {
    /// Driver to device.
    pub kick: Event,
    /// Device to driver.
    pub call: Event,
    /// Device to VMM: this ring is broken.
    pub err: Event,
}

type Result<T> = std::result::Result<T, ConnectionError>;

/// One front-end's session with a back end.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    manner: Manner,
    memory: GuestMemory,
    features: u64,
    protocol: u64,
    queues: BTreeMap<u32, Arc<QueueEvents>>,
}

impl Session {
    /// Does everything before the rings: features, queue count, owner, and the eventfds of `queues` rings.
    ///
    /// `wanted` are the virtio features the guest would take; VERSION_1 is added.
    ///
    /// # Errors
    ///
    /// If the back end refuses something or the connection ends.
    pub fn negotiate(
        connection: Connection,
        manner: Manner,
        memory: &GuestMemory,
        wanted: u64,
        queues: u32,
    ) -> Result<Self> {
        let queues = (0..queues).map(|index| (index, Arc::default())).collect();
        let memory = memory.clone();
        let mut session = Self {
            connection,
            manner,
            memory,
            features: 0,
            protocol: 0,
            queues,
        };
        match manner {
            Manner::Qemu | Manner::EnableLast => session.negotiate_as_qemu(wanted)?,
            Manner::VirtioUser => session.negotiate_as_virtio_user(wanted)?,
        }
        Ok(session)
    }

    fn negotiate_as_qemu(&mut self, wanted: u64) -> Result<()> {
        self.accept_features(
            wanted,
            protocol::MQ | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS,
        )?;
        if self.has_protocol(protocol::MQ) {
            self.connection.request_u64(request::GET_QUEUE_NUM)?;
        }
        if self.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            self.connection.request_u64(request::GET_MAX_MEM_SLOTS)?;
        }
        self.plain(request::SET_OWNER, &[])?;
        self.connection.request_u64(request::GET_FEATURES)?;
        for index in self.indexes() {
            self.set_vring_fd(request::SET_VRING_CALL, index)?;
            self.set_vring_fd(request::SET_VRING_ERR, index)?;
        }
        Ok(())
    }

    fn negotiate_as_virtio_user(&mut self, wanted: u64) -> Result<()> {
        self.plain(request::SET_OWNER, &[])?;
        self.accept_features(wanted, protocol::MQ | protocol::REPLY_ACK | protocol::STATUS)?;
        if self.has_protocol(protocol::MQ) {
            self.connection.request_u64(request::GET_QUEUE_NUM)?;
        }
        self.set_status(0)?;
        self.set_status(status::ACKNOWLEDGE)?;
        self.set_status(status::ACKNOWLEDGE | status::DRIVER)?;
        // virtio-user names the call eventfds first, "because vhost depends on this msg to allocate".
        for index in self.indexes() {
            self.set_vring_fd(request::SET_VRING_CALL, index)?;
        }
        self.command(request::SET_FEATURES, &self.features.to_ne_bytes(), &[])?;
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK)
    }

    /// Reads what is offered and takes what both sides know; SET_FEATURES itself comes later.
    fn accept_features(&mut self, wanted: u64, known_protocol: u64) -> Result<()> {
        let offered = self.connection.request_u64(request::GET_FEATURES)?;
        self.features = offered & (wanted | feature::VERSION_1 | feature::PROTOCOL_FEATURES);
        if offered & feature::PROTOCOL_FEATURES != 0 {
            self.protocol = self.connection.request_u64(request::GET_PROTOCOL_FEATURES)? & known_protocol;
            self.plain(request::SET_PROTOCOL_FEATURES, &self.protocol.to_ne_bytes())?;
            self.connection.reply_ack = self.has_protocol(protocol::REPLY_ACK);
        }
        Ok(())
    }

    /// Announces memory, sets up the rings and enables them.
    ///
    /// `rings` holds index, place and the base to send. virtio-user sends base 0 whatever is asked.
    ///
    /// # Errors
    ///
    /// As [`negotiate`](Self::negotiate).
    pub fn start(&self, rings: &[(u32, RingPlace, u16)]) -> Result<()> {
        if self.manner == Manner::Qemu {
            // vhost_net_start restores the enable state before the device starts.
            self.enable_all(rings)?;
        }
        if self.manner != Manner::VirtioUser {
            self.command(request::SET_FEATURES, &self.features.to_ne_bytes(), &[])?;
        }
        self.announce_memory()?;
        for &(index, place, base) in rings {
            let base = if self.manner == Manner::VirtioUser {
                0
            } else {
                base
            };
            self.set_up_ring(index, &place, base)?;
        }
        if self.manner != Manner::Qemu {
            self.enable_all(rings)?;
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK)
    }

    /// Tells the whole memory in the manner's way: slot by slot, or as one table.
    ///
    /// # Errors
    ///
    /// [`ConnectionError::Refused`] if the back end finds it wrong.
    pub fn announce_memory(&self) -> Result<()> {
        if !self.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            return self.set_mem_table();
        }
        for region in self.memory.regions() {
            self.add_region(&region)?;
        }
        Ok(())
    }

    fn set_up_ring(&self, index: u32, place: &RingPlace, base: u16) -> Result<()> {
        self.state(request::SET_VRING_NUM, index, u32::from(place.size))?;
        self.state(request::SET_VRING_BASE, index, u32::from(base))?;
        let mut body = Vec::with_capacity(40);
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend_from_slice(&0_u32.to_ne_bytes()); // no dirty log of the used ring
        for gpa in [place.desc, place.used, place.avail] {
            body.extend_from_slice(&self.memory.user_address(gpa).to_ne_bytes());
        }
        body.extend_from_slice(&0_u64.to_ne_bytes());
        self.command(request::SET_VRING_ADDR, &body, &[])?;
        self.set_vring_fd(request::SET_VRING_KICK, index)?;
        if self.manner != Manner::VirtioUser {
            // QEMU unmasks the guest's notifier here, which names the call eventfd again.
            self.set_vring_fd(request::SET_VRING_CALL, index)?;
        }
        Ok(())
    }

    /// Enables or disables one ring.
    ///
    /// # Errors
    ///
    /// As [`negotiate`](Self::negotiate).
    pub fn enable(&self, index: u32, enabled: bool) -> Result<()> {
        self.state(request::SET_VRING_ENABLE, index, u32::from(enabled))
    }

    fn enable_all(&self, rings: &[(u32, RingPlace, u16)]) -> Result<()> {
        rings.iter().try_for_each(|&(index, ..)| self.enable(index, true))
    }

    /// Stops one ring and returns the first available index the device did not use.
    ///
    /// # Errors
    ///
    /// If the connection ends or the answer names another ring.
    pub fn get_vring_base(&self, index: u32) -> Result<u16> {
        let reply = self
            .connection
            .request(request::GET_VRING_BASE, &state_body(index, 0))?;
        let base = (reply.len() == 8 && reply[..4] == index.to_ne_bytes())
            .then(|| u32::from_ne_bytes([reply[4], reply[5], reply[6], reply[7]]))
            .and_then(|base| u16::try_from(base).ok());
        base.ok_or(ConnectionError::WrongReply {
            asked: request::GET_VRING_BASE,
            answered: request::GET_VRING_BASE,
            flags: 0,
            len: reply.len(),
        })
    }

    /// Starts a ring again after [`get_vring_base`](Self::get_vring_base).
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn restart_ring(&self, index: u32, place: &RingPlace, base: u16) -> Result<()> {
        self.set_up_ring(index, place, base)?;
        if self.manner == Manner::VirtioUser {
            self.set_vring_fd(request::SET_VRING_CALL, index)?;
        }
        Ok(())
    }

    /// Hands over another call eventfd for one ring.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn set_call(&self, index: u32, event: &Event) -> Result<()> {
        self.command(
            request::SET_VRING_CALL,
            &u64::from(index).to_ne_bytes(),
            &[event.as_fd()],
        )
    }

    /// Announces all of memory at once.
    ///
    /// # Errors
    ///
    /// [`ConnectionError::Refused`] if the back end finds it wrong.
    pub fn set_mem_table(&self) -> Result<()> {
        let regions = self.memory.regions();
        let mut body = Vec::new();
        body.extend_from_slice(&u32::try_from(regions.len()).expect("few regions").to_ne_bytes());
        body.extend_from_slice(&0_u32.to_ne_bytes());
        for region in &regions {
            body.extend_from_slice(&region_body(&region.announcement()));
        }
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(Region::fd).collect();
        self.command(request::SET_MEM_TABLE, &body, &fds)
    }

    /// Announces one more region.
    ///
    /// # Errors
    ///
    /// [`ConnectionError::Refused`] if the back end finds it wrong.
    pub fn add_region(&self, region: &Region) -> Result<()> {
        let body = single_region_body(&region.announcement());
        self.command(request::ADD_MEM_REG, &body, &[region.fd()])
    }

    /// Withdraws one region. When this returns nothing of the back end touches it any more.
    ///
    /// # Errors
    ///
    /// [`ConnectionError::Refused`] if the back end does not know it.
    pub fn remove_region(&self, region: &Region) -> Result<()> {
        let body = single_region_body(&region.announcement());
        self.command(request::REM_MEM_REG, &body, &[])
    }

    /// The virtio features both sides have.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether all of `mask` was negotiated.
    pub fn has(&self, mask: u64) -> bool {
        self.features & mask == mask
    }

    /// Whether all of the protocol features `mask` were negotiated.
    pub fn has_protocol(&self, mask: u64) -> bool {
        self.protocol & mask == mask
    }

    /// The eventfds of ring `index`.
    ///
    /// # Panics
    ///
    /// If there is no such ring.
    pub fn events(&self, index: u32) -> Arc<QueueEvents> {
        Arc::clone(&self.queues[&index])
    }

    /// The connection, for what no honest front-end sends.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    fn indexes(&self) -> Vec<u32> {
        self.queues.keys().copied().collect()
    }

    /// Sends a command that QEMU and virtio-user never ask an answer for.
    fn plain(&self, request: u32, body: &[u8]) -> Result<()> {
        self.connection.send(request, 0, body, &[])
    }

    /// Sends a command, asking for an answer where the played front-end asks for one.
    fn command(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let memory = [request::SET_MEM_TABLE, request::ADD_MEM_REG, request::REM_MEM_REG];
        let asks = match self.manner {
            Manner::Qemu => memory.contains(&request) || request == request::SET_VRING_ENABLE,
            Manner::EnableLast => true,
            Manner::VirtioUser => {
                memory.contains(&request)
                    || [request::SET_VRING_ENABLE, request::SET_STATUS].contains(&request)
            }
        };
        if asks {
            self.connection.command(request, body, fds)
        } else {
            self.connection.send(request, 0, body, fds)
        }
    }

    fn state(&self, request: u32, index: u32, number: u32) -> Result<()> {
        self.command(request, &state_body(index, number), &[])
    }

    fn set_vring_fd(&self, request: u32, index: u32) -> Result<()> {
        let events = self.events(index);
        let event = match request {
            request::SET_VRING_KICK => &events.kick,
            request::SET_VRING_CALL => &events.call,
            _ => &events.err,
        };
        assert!(
            u64::from(index) < NO_FD,
            "the index shares its word with the no-descriptor bit"
        );
        self.command(request, &u64::from(index).to_ne_bytes(), &[event.as_fd()])
    }

    fn set_status(&self, bits: u64) -> Result<()> {
        if self.has_protocol(protocol::STATUS) {
            self.command(request::SET_STATUS, &bits.to_ne_bytes(), &[])?;
        }
        Ok(())
    }
}

fn state_body(index: u32, number: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&index.to_ne_bytes());
    body[4..].copy_from_slice(&number.to_ne_bytes());
    body
}

/// One entry of SET_MEM_TABLE.
pub fn region_body(region: &Announcement) -> Vec<u8> {
    [region.gpa, region.len, region.user, region.file_offset]
        .iter()
        .flat_map(|n| n.to_ne_bytes())
        .collect()
}

/// The body of ADD_MEM_REG and REM_MEM_REG: eight bytes of padding, then the region.
pub fn single_region_body(region: &Announcement) -> Vec<u8> {
    [vec![0; 8], region_body(region)].concat()
}
