//! A Linux tap as a card: the embedded default where there is no card. A CPU copies every frame.
//!
//! ```text
//! lane::tx ──post──▶ read by IOVA ──write(2)──▶ tap       lane::rx ◀──write by IOVA──read(2)── tap
//! ```
//!
//! It does its "DMA" by IOVA through the map's software bus, as a card does through the IOMMU, so everything above
//! it is the same code. Nothing here is zero-copy, and the counters say so.
//!
//! Read with: Linux `Documentation/networking/tuntap.rst`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use tun_rs::{DeviceBuilder, Layer, SyncDevice};
use vfio_glue::address::Iova;
use vfio_glue::iommu::software::SoftwareBus;
use vfio_glue::map::MemoryMap;
use vfio_glue::pci::HostEvent;

use super::{Berth, Link, Nic, NicError, Received, Ring, RxRing, Segment, Transfer, TxRing, Verdict};
use crate::lane::{Lane, LaneSetup, RxLane, TxLane};

/// Buffers the receive side keeps, and frames the transmit side counts as done at once.
const RING: usize = 256;
const HEADER_AND_TAG: u32 = 14 + 4;

/// A tap interface with one queue pair.
pub struct Tap {
    name: String,
    rx: Berth<TapRxRing>,
    tx: Berth<TapTxRing>,
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tap({})", self.name)
    }
}

impl Tap {
    /// Opens or makes the interface `name`, up, for frames of `mtu` bytes of payload. It goes when this is dropped,
    /// unless it was made persistent elsewhere.
    ///
    /// # Errors
    ///
    /// [`NicError::Call`] if the kernel refuses: no `/dev/net/tun`, no right to it, or another process has it.
    pub fn open(name: &str, mtu: u16, map: &MemoryMap) -> Result<Self, NicError> {
        let failed = |call| {
            move |source| NicError::Call {
                device: format!("tap:{name}"),
                call,
                source,
            }
        };
        let builder = DeviceBuilder::new()
            .name(name)
            .layer(Layer::L2)
            .mtu(mtu)
            .enable(true);
        let device = builder
            .build_sync()
            .map_err(failed("opening the tap interface"))?;
        device.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
        let device = Arc::new(device);
        let bus = map.software_bus();
        let frame_bytes = u32::from(mtu) + HEADER_AND_TAG;
        let shared = || Shared {
            device: Arc::clone(&device),
            bus: Arc::clone(&bus),
            // One byte more than the largest frame: a longer one shows, rather than come out cut.
            frame: vec![0; frame_bytes as usize + 1].into_boxed_slice(),
        };
        tracing::info!(tap = name, "a tap copies every frame: this is no zero-copy path");
        Ok(Self {
            name: format!("tap:{name}"),
            rx: Berth::with(TapRxRing {
                shared: shared(),
                posted: VecDeque::with_capacity(RING),
            }),
            tx: Berth::with(TapTxRing {
                shared: shared(),
                done: 0,
            }),
        })
    }

    fn not_free(&self, pair: u16) -> NicError {
        NicError::NotFree {
            device: self.name.clone(),
            pair,
        }
    }
}

impl Nic for Tap {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn queue_pairs(&self) -> u16 {
        1
    }

    fn link(&mut self) -> Link {
        Link::Up { mbps: 0 }
    }

    fn link_event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn host_event(&self, _which: HostEvent) -> Option<BorrowedFd<'_>> {
        None
    }

    fn rx_lane(&mut self, pair: u16, setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
        let ring = self
            .rx
            .take()
            .filter(|_| pair == 0)
            .ok_or_else(|| self.not_free(pair))?;
        Ok(Box::new(RxLane::start(setup, ring, self.rx.clone())?))
    }

    fn tx_lane(&mut self, pair: u16, setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
        let ring = self
            .tx
            .take()
            .filter(|_| pair == 0)
            .ok_or_else(|| self.not_free(pair))?;
        Ok(Box::new(TxLane::start(setup, ring, self.tx.clone())?))
    }

    fn reset(&mut self) -> Result<(), NicError> {
        Ok(())
    }

    fn end_dma(&mut self) -> Result<(), NicError> {
        Ok(())
    }
}

struct Shared {
    device: Arc<SyncDevice>,
    bus: Arc<SoftwareBus>,
    /// One frame on its way, so that what is sent is what was read once.
    frame: Box<[u8]>,
}

/// The transmit side of a tap.
pub struct TapTxRing {
    shared: Shared,
    done: usize,
}

/// The receive side of a tap.
pub struct TapRxRing {
    shared: Shared,
    posted: VecDeque<Iova>,
}

impl std::fmt::Debug for TapTxRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TapTxRing")
    }
}

impl std::fmt::Debug for TapRxRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TapRxRing({} posted)", self.posted.len())
    }
}

macro_rules! ring_of_a_file {
    () => {
        fn start(&mut self) -> Result<(), NicError> {
            Ok(())
        }

        fn stop(&mut self) -> Result<(), NicError> {
            Ok(())
        }

        fn flush(&mut self) {}

        fn arm(&mut self) {}

        fn disarm(&mut self) {}

        fn transfer(&self) -> Transfer {
            Transfer::Copy
        }
    };
}

impl Ring for TapTxRing {
    ring_of_a_file!();

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // A frame is done when it is written.
        None
    }

    fn acknowledge(&mut self) -> u64 {
        0
    }

    fn clear(&mut self) {
        self.done = 0;
    }

    fn room(&self) -> usize {
        RING - self.done
    }
}

impl TxRing for TapTxRing {
    const MAX_SEGMENTS: usize = 64;

    fn descriptors_for(&self, _segments: usize, _len: u32) -> usize {
        1
    }

    fn post_whole(&mut self, segment: Segment) -> bool {
        self.post(&[segment]);
        true
    }

    fn post(&mut self, segments: &[Segment]) {
        self.done += 1;
        let mut len = 0;
        for segment in segments {
            let end = len + segment.len as usize;
            let Some(target) = self.shared.frame.get_mut(len..end) else {
                return;
            };
            if let Err(fault) = self.shared.bus.read(segment.iova, target) {
                tracing::error!(%fault, "a tap frame is lost");
                return;
            }
            len = end;
        }
        // A full tap drops, as a wire does; a tap that is down answers EIO, as a cable that is out.
        if let Some(frame) = self.shared.frame.get(..len) {
            let _ = self.shared.device.send(frame);
        }
    }

    fn reap(&mut self) -> bool {
        let done = self.done > 0;
        self.done -= usize::from(done);
        done
    }

    fn reap_whole(&mut self) -> bool {
        self.reap()
    }
}

impl Ring for TapRxRing {
    ring_of_a_file!();

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.device.as_fd())
    }

    fn acknowledge(&mut self) -> u64 {
        // Readable means frames, which harvesting takes; there is no event to clear.
        1
    }

    fn clear(&mut self) {
        self.posted.clear();
    }

    fn room(&self) -> usize {
        RING - self.posted.len()
    }
}

impl RxRing for TapRxRing {
    fn buffer_bytes(&self) -> u32 {
        u32::try_from(self.shared.frame.len() - 1).unwrap_or(u32::MAX)
    }

    fn post(&mut self, buffer: Iova) {
        self.posted.push_back(buffer);
    }

    fn harvest_usual(&mut self, _most_bytes: u32) -> Option<Received> {
        // A frame costs system calls here; a shorter way would save nothing.
        None
    }

    fn harvest(&mut self) -> Option<Received> {
        let buffer = *self.posted.front()?;
        // An interface that is down or gone reads as an error, and so as no frame. One that is too long for the port
        // is lost, as on a card; the next one is for the same buffer.
        let most = self.buffer_bytes() as usize;
        let len = loop {
            match self.shared.device.recv(&mut self.shared.frame) {
                Ok(len) if len > most => {}
                Ok(len) if len > 0 => break len,
                Ok(_) | Err(_) => return None,
            }
        };
        let frame = self.shared.frame.get(..len)?;
        self.posted.pop_front();
        let written = self.shared.bus.write(buffer, frame);
        if let Err(fault) = &written {
            tracing::error!(%fault, "a tap frame is lost");
        }
        let verdict = if written.is_ok() {
            Verdict::Good
        } else {
            Verdict::Bad
        };
        Some(Received {
            len: u32::try_from(len).unwrap_or(u32::MAX),
            verdict,
        })
    }
}
