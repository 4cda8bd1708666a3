//! Intel's igb family, driven through VFIO.
//!
//! ```text
//! init.rs   reset and bring-up      link.rs  PHY and link
//! rx.rs     receive queue           tx.rs    transmit queue          queue.rs  what both share
//! card.rs   what queues share       regs.rs, desc.rs  layouts, to proof-read against the book
//! ```
//!
//! Vectors: two for each queue pair (receive, transmit) and one for the link. Interrupts are masked while a lane
//! polls and cleared by the card when sent (EIAC); moderation stays 0, because QEMU's model sends a spurious
//! message after every interval.
//!
//! Read with: Intel 82576EB datasheet.

mod card;
mod desc;
mod family;
mod init;
mod link;
mod queue;
mod regs;
mod rx;
mod tx;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vfio_glue::map::Device;
use vfio_glue::memory::DescriptorRing;
use vfio_glue::pci::config_space::{BusMaster, identity, set_bus_master};
use vfio_glue::pci::{HostEvent, PciError};

use self::card::{Card, FrameBound, Vector};
use self::family::Family;
use self::regs::{CAUSE_LINK, Gpie, IVAR_VALID, Reg};
use self::rx::IgbRxRing;
use self::tx::IgbTxRing;
use super::{Berth, Link, Nic, NicError};
use crate::clock::Clock;
use crate::lane::{Lane, LaneSetup, RxLane, TxLane};

const INTEL: u16 = 0x8086;
/// Descriptors of each ring. More than most guests' queues, so that tx is limited by neither.
const RING: u32 = 512;
/// Queue pairs used so far.
const PAIRS: u16 = 1;

/// An igb card on a map, with its queues at rest until lanes take them.
pub struct Igb {
    card: Card,
    mac: Option<[u8; 6]>,
    pairs: Vec<Pair>,
    link_vector: Vector,
    /// The host wants the card back.
    release: Option<OwnedFd>,
    /// The bus reported an error of the card.
    error: Option<OwnedFd>,
    // Last: rings and registers go before the device leaves its map.
    device: Device,
}

struct Pair {
    rx: Berth<IgbRxRing>,
    tx: Berth<IgbTxRing>,
}

impl std::fmt::Debug for Igb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Igb({:?})", self.card)
    }
}

impl Igb {
    /// Takes a device for its own: resets it, brings it up for frames of `mtu` bytes of payload, starts the link.
    ///
    /// Blocks for some 100 ms. No queue runs yet; the link comes later.
    ///
    /// # Errors
    ///
    /// [`NicError`] if it is no igb card, does not answer, or rings cannot be mapped. Its DMA is off then.
    pub fn open(device: Device, mtu: u16, clock: Arc<dyn Clock>) -> Result<Self, NicError> {
        let function = Arc::clone(device.function());
        let id = identity(function.as_ref())?;
        let name = function.name().to_owned();
        let unknown = || NicError::Unknown {
            device: name.clone(),
            vendor: id.vendor,
            id: id.device,
        };
        let family = Some(id.device)
            .filter(|_| id.vendor == INTEL)
            .and_then(Family::of)
            .ok_or_else(unknown)?;
        function.reset()?;
        let card = Card::new(&name, family, function.bar(0)?, clock, FrameBound::for_mtu(mtu));
        let failed = |source| NicError::Call {
            device: name.clone(),
            call: "eventfd",
            source,
        };

        let mut pairs = Vec::new();
        for queue in 0..PAIRS.min(family.queue_pairs()) {
            let ring = || DescriptorRing::new(device.map(), &name, RING);
            let rx_vector = Vector::new(2 * queue).map_err(failed)?;
            let tx_vector = Vector::new(2 * queue + 1).map_err(failed)?;
            function.set_vector(rx_vector.index, Some(rx_vector.event()))?;
            function.set_vector(tx_vector.index, Some(tx_vector.event()))?;
            let (number, rx_card, tx_card) = (u32::from(queue), card.clone(), card.clone());
            pairs.push(Pair {
                rx: Berth::with(IgbRxRing::new(rx_card, number, ring()?, rx_vector)),
                tx: Berth::with(IgbTxRing::new(tx_card, number, ring()?, tx_vector)),
            });
        }
        let link_vector = Vector::new(2 * PAIRS).map_err(failed)?;
        function.set_vector(link_vector.index, Some(link_vector.event()))?;
        let [release, error] = [HostEvent::Release, HostEvent::Error].map(|which| {
            let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
            let event = event.map_err(|source| failed(source.into()))?;
            let tells = function.set_host_event(which, Some(event.as_fd()))?;
            Ok::<_, NicError>(tells.then_some(event))
        });
        let mut igb = Self {
            release: release?,
            error: error?,
            card,
            mac: None,
            pairs,
            link_vector,
            device,
        };
        igb.bring_up()?;
        let mac = igb.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
        tracing::info!(
            card = name,
            family = family.as_str(),
            mac,
            "card is up, link negotiates"
        );
        Ok(igb)
    }

    /// The card's own address, which a guest need not use.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.mac
    }

    fn bring_up(&mut self) -> Result<(), NicError> {
        set_bus_master(self.device.function().as_ref(), BusMaster::On)?;
        init::reset(&self.card)?;
        self.mac = init::mac(&self.card);
        init::configure(&self.card);
        self.route_interrupts();
        link::bring_up(&self.card);
        Ok(())
    }

    /// Which cause raises which vector. GPIE first: what is written before MSI-X mode is on does not stick.
    fn route_interrupts(&self) {
        let card = &self.card;
        let mode = Gpie::NON_SELECTIVE_ICR | Gpie::MSIX_MODE | Gpie::AUTO_MASK | Gpie::PBA_SUPPORT;
        card.write(Reg::GPIE, mode.bits());
        let mut all: u32 = 1 << self.link_vector.index;
        for queue in 0..u32::try_from(self.pairs.len()).unwrap_or(0) {
            let (rx, tx) = (2 * queue, 2 * queue + 1);
            all |= 1 << rx | 1 << tx;
            let (word, shift) = card.family().vector_place(queue);
            let bytes = (rx | IVAR_VALID) | (tx | IVAR_VALID) << 8;
            let others = card.read(Reg::queue_vector(word)) & !(0xffff << shift);
            card.write(Reg::queue_vector(word), others | bytes << shift);
        }
        card.write(
            Reg::IVAR_MISC,
            (u32::from(self.link_vector.index) | IVAR_VALID) << 8,
        );
        card.write(Reg::EIAC, all);
        for vector in 0..=u32::from(self.link_vector.index) {
            card.write(Reg::moderation(vector), 0);
        }
        card.write(Reg::IMS, CAUSE_LINK);
        card.unmask(&self.link_vector);
    }

    /// Takes Bus Master and every interrupt from it.
    fn disconnect(&self) -> Result<(), PciError> {
        let function = self.device.function();
        set_bus_master(function.as_ref(), BusMaster::Off)?;
        for vector in 0..=self.link_vector.index {
            function.set_vector(vector, None)?;
        }
        for which in [HostEvent::Release, HostEvent::Error] {
            function.set_host_event(which, None)?;
        }
        Ok(())
    }

    fn pair(&self, pair: u16) -> Result<&Pair, NicError> {
        self.pairs
            .get(usize::from(pair))
            .ok_or_else(|| self.not_free(pair))
    }

    fn not_free(&self, pair: u16) -> NicError {
        NicError::NotFree {
            device: self.name(),
            pair,
        }
    }
}

impl Nic for Igb {
    fn name(&self) -> String {
        self.card.name().to_owned()
    }

    fn queue_pairs(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(0)
    }

    fn link(&mut self) -> Link {
        self.link_vector.take();
        // Reading the cause clears it, so that the next change is told again.
        self.card.read(Reg::ICR);
        let link = link::read(&self.card);
        self.card.unmask(&self.link_vector);
        link
    }

    fn link_event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.link_vector.event())
    }

    fn host_event(&self, which: HostEvent) -> Option<BorrowedFd<'_>> {
        let event = match which {
            HostEvent::Release => &self.release,
            HostEvent::Error => &self.error,
        };
        event.as_ref().map(AsFd::as_fd)
    }

    fn rx_lane(&mut self, pair: u16, setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
        let berth = self.pair(pair)?.rx.clone();
        let ring = berth.take().ok_or_else(|| self.not_free(pair))?;
        Ok(Box::new(RxLane::start(setup, ring, berth)?))
    }

    fn tx_lane(&mut self, pair: u16, setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
        let berth = self.pair(pair)?.tx.clone();
        let ring = berth.take().ok_or_else(|| self.not_free(pair))?;
        Ok(Box::new(TxLane::start(setup, ring, berth)?))
    }

    fn reset(&mut self) -> Result<(), NicError> {
        self.end_dma()?;
        self.bring_up()
    }

    fn end_dma(&mut self) -> Result<(), NicError> {
        let function = self.device.function().as_ref();
        let quiet = || set_bus_master(function, BusMaster::Off);
        // Once more, for memory decoding: whoever drops us writes registers.
        let ended = quiet().and_then(|()| function.reset()).and_then(|()| quiet());
        let Err(error) = ended else {
            return Ok(());
        };
        // A card that is gone cannot be reset, and does no DMA.
        match self.card.check_present() {
            Ok(()) => Err(error.into()),
            Err(gone) => {
                tracing::warn!(%error, "{gone}");
                Ok(())
            }
        }
    }
}

impl Drop for Igb {
    fn drop(&mut self) {
        init::release(&self.card);
        if let Err(error) = self.disconnect() {
            // Closing it does the same to one that is there.
            tracing::warn!(card = self.card.name(), %error, "the card was not let go as it should");
        }
    }
}
