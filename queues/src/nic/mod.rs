//! What a lane needs of a network card, and the cards.
//!
//! ```text
//! lane::tx ──post──▶ TxRing ──doorbell──▶ card ──done bits──▶ reap
//! lane::rx ──post──▶ RxRing ──doorbell──▶ card ──done bits──▶ harvest
//! ```
//!
//! A card makes one pair of rings per queue pair. A ring belongs to one lane at a time; stopped, it goes back to
//! its berth and the next lane takes it.

pub mod absent;
pub mod igb;
pub mod model;
pub mod tap;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use vfio_glue::address::Iova;
use vfio_glue::map::MapError;
use vfio_glue::pci::{HostEvent, PciError};

/// Why the card failed.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// Not a card this driver knows.
    #[error("{device} is {vendor:04x}:{id:04x}, which is no card of the igb family")]
    Unknown {
        /// The function's name.
        device: String,
        /// PCI vendor.
        vendor: u16,
        /// PCI device.
        id: u16,
    },
    /// A queue did not stop within its bound: only a reset ends its DMA.
    #[error("{device}: {queue} did not stop within {bound_ms} ms")]
    WillNotStop {
        /// The function's name.
        device: String,
        /// Which queue, for example `rx 0`.
        queue: String,
        /// The bound in milliseconds.
        bound_ms: u128,
    },
    /// A queue did not start.
    #[error("{device}: {queue} did not start within {bound_ms} ms")]
    WillNotStart {
        /// The function's name.
        device: String,
        /// Which queue.
        queue: String,
        /// The bound in milliseconds.
        bound_ms: u128,
    },
    /// The card does not answer: it was removed, or lost its power.
    #[error("{device} is gone: its registers read as all ones")]
    Gone {
        /// The function's name.
        device: String,
    },
    /// The card has fewer queue pairs than are wanted.
    #[error("{device} has {pairs} queue pairs, {wanted} are wanted")]
    TooFewPairs {
        /// The function's name.
        device: String,
        /// How many it has.
        pairs: u16,
        /// How many are wanted.
        wanted: u16,
    },
    /// The queue pair does not exist or another lane has it.
    #[error("{device}: queue pair {pair} is not free")]
    NotFree {
        /// The device's name.
        device: String,
        /// The pair asked for.
        pair: u16,
    },
    /// PCI access failed.
    #[error("the PCI function failed")]
    Pci(#[from] PciError),
    /// Rings or bounce memory could not be mapped.
    #[error("no memory for rings")]
    Map(#[from] MapError),
    /// A system call failed, for a device that is a file.
    #[error("{device}: {call} failed")]
    Call {
        /// The device's name.
        device: String,
        /// Which call.
        call: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// Bytes of one frame that are contiguous for the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where the card finds them.
    pub iova: Iova,
    /// How many, not 0.
    pub len: u32,
}

/// A frame the card has received into the oldest posted buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes in the buffer, frame check sequence not included.
    pub len: u32,
    /// Whether the frame is whole and sound.
    pub verdict: Verdict,
}

/// What the card says of a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Whole, in this one buffer.
    Good,
    /// Damaged, or only part of a frame: not to be passed on.
    Bad,
}

/// Whether a cable is plugged in and carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Frames move.
    Up {
        /// Speed in Mbit/s, 0 if the device has none.
        mbps: u32,
    },
    /// They do not.
    Down,
}

impl Link {
    /// Whether frames move.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Up { .. })
    }
}

/// How bytes get between the guest's memory and the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// The card's own DMA: no CPU touches them.
    Dma,
    /// A CPU copies them.
    Copy,
}

/// What both kinds of ring can do.
pub trait Ring: Send + 'static {
    /// Starts the queue, empty.
    ///
    /// # Errors
    ///
    /// [`NicError`]; the queue is stopped then.
    fn start(&mut self) -> Result<(), NicError>;

    /// Stops the queue: once this returns, none of its DMA happens any more.
    ///
    /// Blocks for a bounded time. What the card completed before can still be harvested or reaped; the rest is
    /// forgotten by [`clear`](Self::clear).
    ///
    /// # Errors
    ///
    /// [`NicError::WillNotStop`]: the caller must reset the device before it lets memory go.
    fn stop(&mut self) -> Result<(), NicError>;

    /// Forgets everything posted. The queue is stopped.
    fn clear(&mut self);

    /// How many more descriptors fit.
    fn room(&self) -> usize;

    /// Shows the card what was posted since the last call: one doorbell, or none.
    fn flush(&mut self);

    /// Lets the card raise this queue's interrupt. What completed before is not announced again: look once more.
    fn arm(&mut self);

    /// Keeps the interrupt quiet: the lane polls.
    fn disarm(&mut self);

    /// What becomes readable when the interrupt is raised; `None` for a ring that needs no interrupt. It may stay readable,
    /// so wait for its edges.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes note of a wake-up and returns how many interrupts it stands for: at least 1 where rings share one.
    fn acknowledge(&mut self) -> u64;

    /// How bytes move.
    fn transfer(&self) -> Transfer;
}

/// A card's transmit queue: guest to wire.
pub trait TxRing: Ring {
    /// The most segments one frame may have.
    const MAX_SEGMENTS: usize;

    /// The most descriptors a frame of `segments` segments and `len` bytes can need.
    fn descriptors_for(&self, segments: usize, len: u32) -> usize;

    /// Hands one frame to the card. It owns the bytes until [`reap`](Self::reap) says that it is done.
    ///
    /// The caller has checked `room` and passes 1 to `MAX_SEGMENTS` segments of 17 bytes or more in all.
    fn post(&mut self, segments: &[Segment]);

    /// As [`post`](Self::post), for the usual frame: of one segment, which fits into one descriptor. Says whether it was;
    /// if not, nothing has happened. [`reap_whole`](Self::reap_whole) is its other half.
    fn post_whole(&mut self, segment: Segment) -> bool;

    /// Whether the card is done with the oldest frame, of which the caller knows that it is there and was handed over by
    /// [`post`](Self::post). It is forgotten then.
    fn reap(&mut self) -> bool;

    /// Whether the card is done with the oldest frame, of which the caller knows that it is there and was handed over by
    /// [`post_whole`](Self::post_whole). It is forgotten then.
    fn reap_whole(&mut self) -> bool;
}

/// A card's receive queue: wire to guest.
pub trait RxRing: Ring {
    /// The bytes a posted buffer must have room for: the card may write that many and never more.
    fn buffer_bytes(&self) -> u32;

    /// Hands one buffer of [`buffer_bytes`](Self::buffer_bytes) to the card. The caller has checked `room`.
    fn post(&mut self, buffer: Iova);

    /// As [`harvest`](Self::harvest), for the usual frame only: sound, and of at most `most_bytes`. `None` tells nothing.
    /// The caller knows that a buffer is posted.
    fn harvest_usual(&mut self, most_bytes: u32) -> Option<Received>;

    /// Takes note of how many frames, and bytes of theirs, were taken by [`harvest_usual`](Self::harvest_usual) since the last
    /// call: once for each run of them, as a card's driver keeps its interrupts apart by that.
    fn note_usual(&mut self, frames: u64, bytes: u64) {
        let _ = (frames, bytes);
    }

    /// Takes the oldest posted buffer back, if the card has filled it.
    fn harvest(&mut self) -> Option<Received>;
}

/// Where a ring waits while no lane has it.
#[derive(Debug)]
pub struct Berth<R>(Arc<Mutex<Option<R>>>);

impl<R> Clone for Berth<R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<R> Berth<R> {
    /// A berth with a ring in it.
    pub fn with(ring: R) -> Self {
        Self(Arc::new(Mutex::new(Some(ring))))
    }

    /// Takes the ring, if it is there.
    pub fn take(&self) -> Option<R> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Puts the ring back.
    pub fn put(&self, ring: R) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring);
    }
}

/// A network device as a port sees it: control plane only.
pub trait Nic: Send {
    /// How logs and `stats` call it.
    fn name(&self) -> String;

    /// How many queue pairs it offers.
    fn queue_pairs(&self) -> u16;

    /// The link as it is now.
    fn link(&mut self) -> Link;

    /// What becomes readable when the link may have changed, if the device tells.
    fn link_event(&self) -> Option<BorrowedFd<'_>>;

    /// What becomes readable when the host tells `which`, if it ever does. Whoever waits for it reads the count.
    fn host_event(&self, which: HostEvent) -> Option<BorrowedFd<'_>>;

    /// Takes the receive ring of pair `pair` and makes it a lane over a guest's queue.
    ///
    /// # Errors
    ///
    /// [`NicError::NotFree`], or why the queue did not start.
    fn rx_lane(
        &mut self,
        pair: u16,
        setup: crate::lane::LaneSetup,
    ) -> Result<Box<dyn crate::lane::Lane>, NicError>;

    /// Takes the transmit ring of pair `pair` and makes it a lane over a guest's queue.
    ///
    /// # Errors
    ///
    /// As [`rx_lane`](Self::rx_lane).
    fn tx_lane(
        &mut self,
        pair: u16,
        setup: crate::lane::LaneSetup,
    ) -> Result<Box<dyn crate::lane::Lane>, NicError>;

    /// Resets the device and brings it up again. All its lanes have been stopped; none of its DMA survives.
    ///
    /// # Errors
    ///
    /// [`NicError`] if it does not come back.
    fn reset(&mut self) -> Result<(), NicError>;

    /// Makes certain that none of the device's DMA happens any more, though a queue of it did not stop. Only a
    /// [`reset`](Self::reset) makes it usable again.
    ///
    /// # Errors
    ///
    /// [`NicError`] if that is not certain: what the device may reach has to stay.
    fn end_dma(&mut self) -> Result<(), NicError>;
}
