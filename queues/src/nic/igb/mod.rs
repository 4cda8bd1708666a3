//! Intel's igb family, driven through VFIO.
//!
//! ```text
//! init.rs   reset and bring-up      link.rs  PHY and link
//! rx.rs     receive queue           tx.rs    transmit queue          queue.rs  what both share
//! card.rs   what queues share       rss.rs   which queue a frame goes to
//! moderation.rs  how often the card may interrupt
//! regs.rs, desc.rs  layouts, to proof-read against the book
//! ```
//!
//! Vectors: the last one for the link, and of the others two for each queue pair (receive, transmit) while there are
//! enough, else one for each pair, else one for several pairs. Interrupts are masked while no lane that uses the vector
//! sleeps, cleared by the card when sent (EIAC), and kept apart as `moderation.rs` says.
//!
//! Read with: Intel 82576EB datasheet.

mod card;
mod desc;
mod family;
mod init;
mod link;
mod moderation;
mod queue;
mod regs;
mod rss;
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
use self::moderation::Pace;
use self::regs::{CAUSE_LINK, Gpie, IVAR_VALID, Reg};
pub use self::rss::RssKey;
use self::rss::Spread;
use self::rx::IgbRxRing;
use self::tx::IgbTxRing;
use super::{Berth, Link, Nic, NicError};
use crate::clock::Clock;
use crate::lane::{Lane, LaneSetup, RxLane, TxLane};

const INTEL: u16 = 0x8086;
/// Descriptors of each ring. More than most guests' queues, so that tx is limited by neither.
const RING: u32 = 512;

/// What a card is opened for.
#[derive(Clone, Copy, Debug)]
pub struct IgbSetup {
    /// Largest payload of a frame, in bytes.
    pub mtu: u16,
    /// How many of its queue pairs are used: 1 to 16.
    pub queue_pairs: u16,
    /// How received frames are spread over them.
    pub rss_key: RssKey,
}

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
    vectors: PairVectors,
}

/// The vectors of one pair's queues, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PairVectors {
    rx: u16,
    tx: u16,
}

/// Which vectors `pairs` queue pairs of a function with `vectors` vectors use; the link has the first after them.
fn deal_vectors(pairs: u16, vectors: u16) -> Vec<PairVectors> {
    let for_queues = vectors.saturating_sub(1).max(1);
    let one_each = 2 * pairs <= for_queues;
    let of = |pair: u16| {
        if one_each {
            PairVectors {
                rx: 2 * pair,
                tx: 2 * pair + 1,
            }
        } else {
            // Both queues of a pair are the same worker's.
            let vector = pair % for_queues;
            PairVectors {
                rx: vector,
                tx: vector,
            }
        }
    };
    (0..pairs).map(of).collect()
}

impl std::fmt::Debug for Igb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Igb({:?})", self.card)
    }
}

impl Igb {
    /// Takes a device for its own: resets it, brings it up for what `setup` says, starts the link.
    ///
    /// Blocks for some 100 ms. No queue runs yet; the link comes later.
    ///
    /// # Errors
    ///
    /// [`NicError`] if it is no igb card, has too few queue pairs, does not answer, or rings cannot be mapped. Its DMA is
    /// off then.
    pub fn open(device: Device, setup: IgbSetup, clock: Arc<dyn Clock>) -> Result<Self, NicError> {
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
        if !(1..=family.queue_pairs()).contains(&setup.queue_pairs) {
            return Err(NicError::TooFewPairs {
                device: name,
                pairs: family.queue_pairs(),
                wanted: setup.queue_pairs,
            });
        }
        function.reset()?;
        let spread = Spread::new(setup.rss_key, setup.queue_pairs);
        let bound = FrameBound::for_mtu(setup.mtu);
        let card = Card::new(&name, family, function.bar(0)?, clock, bound, spread);
        let failed = |source| NicError::Call {
            device: name.clone(),
            call: "eventfd",
            source,
        };

        let dealt = deal_vectors(setup.queue_pairs, function.vectors());
        let used = dealt.iter().map(|of| of.tx + 1).max().unwrap_or(0);
        let mut vectors: Vec<Vector> = Vec::new();
        for index in 0..=used {
            let vector = Vector::new(index).map_err(failed)?;
            function.set_vector(index, Some(vector.event()))?;
            vectors.push(vector);
        }
        let vector = |index: u16| {
            let found = vectors.get(usize::from(index)).map(Vector::share);
            found.unwrap_or_else(|| Vector::new(index)).map_err(failed)
        };
        let mut pairs = Vec::new();
        for (number, of) in (0..).zip(dealt) {
            let ring = || DescriptorRing::new(device.map(), &name, RING);
            let (rx_card, tx_card) = (card.clone(), card.clone());
            pairs.push(Pair {
                rx: Berth::with(IgbRxRing::new(rx_card, number, ring()?, vector(of.rx)?)),
                tx: Berth::with(IgbTxRing::new(tx_card, number, ring()?, vector(of.tx)?)),
                vectors: of,
            });
        }
        let link_vector = vector(used)?;
        // Whoever is alone with a vector may read how often it was raised.
        drop(vectors);
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
        for (queue, pair) in (0..).zip(&self.pairs) {
            let (rx, tx) = (u32::from(pair.vectors.rx), u32::from(pair.vectors.tx));
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
        // A reset leaves what was there.
        for vector in 0..=u32::from(self.link_vector.index) {
            card.write(Reg::moderation(vector), 0);
        }
        // Of a vector that both use, receive decides.
        for pair in &self.pairs {
            card.set_pace(pair.vectors.tx.into(), Pace::Bulk);
        }
        for pair in &self.pairs {
            card.set_pace(pair.vectors.rx.into(), Pace::Prompt);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn dealt(pairs: u16, vectors: u16) -> Vec<(u16, u16)> {
        let dealt = deal_vectors(pairs, vectors);
        dealt.iter().map(|of| (of.rx, of.tx)).collect()
    }

    #[test]
    fn queues_share_vectors_when_there_are_not_enough() {
        assert_eq!(dealt(1, 10), [(0, 1)]);
        assert_eq!(dealt(4, 10), [(0, 1), (2, 3), (4, 5), (6, 7)]);
        assert_eq!(dealt(5, 10), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]);
        let sixteen = dealt(16, 10);
        assert_eq!((sixteen[8], sixteen[9], sixteen[15]), ((8, 8), (0, 0), (6, 6)));
        // The I210 has four pairs and five vectors.
        assert_eq!(dealt(4, 5), [(0, 0), (1, 1), (2, 2), (3, 3)]);
    }
}
