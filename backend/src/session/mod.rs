//! What one front-end's messages mean: features, memory, virtqueues.
//!
//! ```text
//! memory.rs   the guest's table: the map changes, the lanes follow, what goes is let go
//! vring.rs    what is known of each virtqueue, and when its lane runs
//! handler.rs  `vhost`'s trait, message by message
//! ```
//!
//! A message changes what is known; then each lane is brought to what that implies, and only then the front-end has
//! its reply. So the order in which a front-end sends things does not matter (TRAPS 55), and a reply is true.
//!
//! Read with: vhost-user, "Ring states".

mod handler;
mod memory;
mod vring;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use queues::lane::MissingMemory;
use queues::nic::NicError;
use vfio_glue::map::MapError;
use vfio_glue::memory::{Table, VirtqMemoryError};

use self::vring::Vring;
use crate::port::{Lanes, Occupant, Port, PortError};
use crate::worker::WorkerGone;

/// Virtio feature bits we offer, and one of vhost-user (virtio 1.2 §5.1.3, §6; vhost-user, "Feature negotiation").
mod feature {
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    /// Several queue pairs; how many are on is between guest and VMM, which tells us by SET_VRING_ENABLE.
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(super) const VERSION_1: u64 = 1 << 32;
    pub(super) const IN_ORDER: u64 = 1 << 35;
    pub(super) const OFFERED: u64 =
        MRG_RXBUF | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1 | IN_ORDER;
}

/// Why a front-end's request was refused.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Feature bits that were not offered.
    #[error("features {asked:#x} have bits {extra:#x} that were not offered")]
    Features {
        /// What was asked for.
        asked: u64,
        /// What of it was not offered.
        extra: u64,
    },
    /// No such virtqueue.
    #[error("there is no virtqueue {index}: the port has {queues}")]
    NoVring {
        /// The index in the message.
        index: usize,
        /// How many there are.
        queues: usize,
    },
    /// A virtqueue address that is in no region.
    #[error(
        "virtqueue {index}: its {area} at {address:#x} ({len} bytes) is in no region of the memory table"
    )]
    VringMemory {
        /// Which virtqueue.
        index: usize,
        /// Which of its areas.
        area: &'static str,
        /// The address in the message.
        address: u64,
        /// How many bytes it needs.
        len: usize,
    },
    /// The virtqueue's memory is impossible.
    #[error("virtqueue {index} cannot be used")]
    Virtq {
        /// Which virtqueue.
        index: usize,
        /// Why.
        source: VirtqMemoryError,
    },
    /// A queue size that is impossible.
    #[error("virtqueue {index} cannot have that size")]
    Size {
        /// Which virtqueue.
        index: usize,
        /// Why.
        source: VirtqMemoryError,
    },
    /// A base that no 16-bit index can be.
    #[error("virtqueue {index}: base {base} is no index")]
    Base {
        /// Which virtqueue.
        index: usize,
        /// What was sent.
        base: u32,
    },
    /// The map refused memory.
    #[error("the memory was refused")]
    Map(#[from] MapError),
    /// Every slot is taken.
    #[error("all {slots} memory slots are taken")]
    Slots {
        /// How many there are.
        slots: usize,
    },
    /// REM_MEM_REG of something that was not added.
    #[error("no region at guest {guest:#x}, front-end {frontend:#x} of {len:#x} bytes was added")]
    NoRegion {
        /// Guest-physical start in the message.
        guest: u64,
        /// Front-end start.
        frontend: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A region without its file, or more files than regions.
    #[error("{regions} regions came with {files} descriptors; is the memory shared (share=on)?")]
    Files {
        /// Regions announced.
        regions: usize,
        /// Descriptors that came.
        files: usize,
    },
    /// A descriptor that is no eventfd.
    #[error("virtqueue {index}: its {what} descriptor is {found}, not an eventfd")]
    NotAnEventfd {
        /// Which virtqueue.
        index: usize,
        /// `kick`, `call` or `err`.
        what: &'static str,
        /// What it is.
        found: String,
    },
    /// A message for a feature that was not offered.
    #[error("{what} was not offered")]
    NotOffered {
        /// What it belongs to.
        what: &'static str,
    },
    /// The front-end's descriptor cannot be used.
    #[error("virtqueue {index}: its {what} descriptor cannot be used")]
    Descriptor {
        /// Which virtqueue.
        index: usize,
        /// `kick`, `call` or `err`.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The port failed.
    #[error("the port failed")]
    Port(#[from] PortError),
    /// The worker failed.
    #[error("the port failed")]
    Worker(#[from] WorkerGone),
    /// The device did not come back from a reset.
    #[error("the device failed")]
    Nic(#[from] NicError),
}

/// One front-end's dealings with a port, from connection to close.
#[derive(Debug)]
pub struct Session {
    port: Arc<Port>,
    refusals: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    features: u64,
    protocol_features: u64,
    table: Arc<Table>,
    vrings: Vec<Vring>,
    /// A region was taken away last: it may be on its way back with other bounds.
    regions_in_motion: bool,
}

impl Session {
    /// A session on `port`, which no other session uses.
    pub fn new(port: Arc<Port>) -> Arc<Self> {
        let vrings = (0..port.queues()).map(|_| Vring::default()).collect();
        let session = Arc::new(Self {
            port,
            refusals: AtomicU64::new(0),
            state: Mutex::new(State {
                features: 0,
                protocol_features: 0,
                table: Arc::default(),
                vrings,
                regions_in_motion: false,
            }),
        });
        let occupant: Arc<dyn Occupant> = session.clone();
        session.port.occupy(Arc::downgrade(&occupant));
        session
    }

    /// The port it is on.
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// Whether refusals are answered: REPLY_ACK is negotiated.
    pub fn acknowledges(&self) -> bool {
        let reply_ack = vhost::vhost_user::message::VhostUserProtocolFeatures::REPLY_ACK.bits();
        self.state().protocol_features & reply_ack != 0
    }

    /// Whether a region was taken away last and may be on its way back with other bounds (TRAPS 17).
    pub fn regions_in_motion(&self) -> bool {
        self.state().regions_in_motion
    }

    /// Takes the memory as it is now for what the guest has: a buffer outside of it breaks its ring from now on.
    pub fn regions_at_rest(&self) {
        let mut state = self.state();
        if !std::mem::take(&mut state.regions_in_motion) {
            return;
        }
        for index in 0..state.vrings.len() {
            let strict = self
                .port
                .with_lane(index, |lane| lane.set_missing_memory(MissingMemory::IsBroken));
            if let Err(error) = strict {
                tracing::error!(port = self.port.name(), %error, "a lane was not told of its memory");
            }
        }
    }

    /// Whether the front-end has taken away memory that it had announced, by cutting its file short. What is left is of
    /// no use to anybody: the session should end.
    pub fn has_lost_memory(&self) -> bool {
        self.state().table.lost_memory()
    }

    /// Ends the session: all lanes stop, then the guest's memory leaves the map. Nothing touches it afterwards.
    ///
    /// If the device cannot be stopped, its memory stays mapped until it can.
    pub fn close(&self) {
        let mut state = self.state();
        if state.table.lost_memory() {
            tracing::warn!(
                port = self.port.name(),
                "its guest's memory file was cut short while it was mapped"
            );
        }
        match self.stop_all(&mut state) {
            Ok(()) => self.forget_memory(&mut state),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(port = self.port.name(), error, "its guest's memory stays mapped");
                let table = std::mem::take(&mut state.table);
                self.port.set_memory(&state.table);
                self.port.abandon(table.extents().to_vec());
            }
        }
        self.port.vacate();
    }

    /// Whether to log another refusal: the front-end decides how many there are, and the log is everybody's.
    fn is_worth_a_line(&self) -> bool {
        let before = self.refusals.fetch_add(1, Ordering::Relaxed);
        before < 20 || before.is_power_of_two()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Occupant for Session {
    fn renew_discarded(&self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Session::renew_discarded(self)?)
    }

    fn with_lanes_stopped(&self, work: &mut dyn FnMut() -> Lanes) {
        let mut state = self.state();
        let stopped = self.halt_all(&mut state);
        let started = match work() {
            Lanes::Run => self.settle_all(&mut state),
            Lanes::Rest => Ok(()),
        };
        if let Err(error) = stopped.and(started) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(
                port = self.port.name(),
                error,
                "not every lane runs again with the device"
            );
        }
    }
}
