//! No card: what a port has before its first device, and between two.
//!
//! ```text
//! lane::tx ──link is down──▶ dropped and counted      lane::rx ──no room──▶ buffers stay in the virtqueue
//! ```
//!
//! To the guest it is a cable that is out. Its queues run, so what it sends comes back; what it offers for receiving is
//! left where it is, for the card to come.

use std::os::fd::BorrowedFd;

use vfio_glue::address::Iova;
use vfio_glue::pci::HostEvent;

use super::{Berth, Link, Nic, NicError, Received, Ring, RxRing, Segment, Transfer, TxRing};
use crate::lane::{Lane, LaneSetup, RxLane, TxLane};

/// The place where a card can be, with as many queue pairs as its port.
#[derive(Debug)]
pub struct Absent {
    pairs: Vec<(Berth<NoRing>, Berth<NoRing>)>,
}

/// What [`Nic::name`] says of no card.
pub const NAME: &str = "none";

impl Default for Absent {
    fn default() -> Self {
        Self::with_pairs(1)
    }
}

impl Absent {
    /// No card, for a port of `pairs` queue pairs.
    pub fn with_pairs(pairs: u16) -> Self {
        let pair = |_| (Berth::with(NoRing), Berth::with(NoRing));
        Self {
            pairs: (0..pairs).map(pair).collect(),
        }
    }
}

fn not_free(pair: u16) -> NicError {
    NicError::NotFree {
        device: NAME.to_owned(),
        pair,
    }
}

impl Nic for Absent {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn queue_pairs(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(u16::MAX)
    }

    fn link(&mut self) -> Link {
        Link::Down
    }

    fn link_event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn host_event(&self, _which: HostEvent) -> Option<BorrowedFd<'_>> {
        None
    }

    fn rx_lane(&mut self, pair: u16, setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
        let (berth, _) = self.pairs.get(usize::from(pair)).ok_or_else(|| not_free(pair))?;
        let ring = berth.take().ok_or_else(|| not_free(pair))?;
        Ok(Box::new(RxLane::start(setup, ring, berth.clone())?))
    }

    fn tx_lane(&mut self, pair: u16, setup: LaneSetup) -> Result<Box<dyn Lane>, NicError> {
        let (_, berth) = self.pairs.get(usize::from(pair)).ok_or_else(|| not_free(pair))?;
        let ring = berth.take().ok_or_else(|| not_free(pair))?;
        Ok(Box::new(TxLane::start(setup, ring, berth.clone())?))
    }

    fn reset(&mut self) -> Result<(), NicError> {
        Ok(())
    }

    fn end_dma(&mut self) -> Result<(), NicError> {
        Ok(())
    }
}

/// A queue that nothing goes through.
#[derive(Debug)]
struct NoRing;

impl Ring for NoRing {
    fn start(&mut self) -> Result<(), NicError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), NicError> {
        Ok(())
    }

    fn clear(&mut self) {}

    fn room(&self) -> usize {
        0
    }

    fn flush(&mut self) {}

    fn arm(&mut self) {}

    fn disarm(&mut self) {}

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn acknowledge(&mut self) -> u64 {
        0
    }

    fn transfer(&self) -> Transfer {
        Transfer::Dma
    }
}

impl TxRing for NoRing {
    const MAX_SEGMENTS: usize = 1;

    fn descriptors_for(&self, _segments: usize, _len: u32) -> usize {
        // The lane takes frames though there is no room: without a link none comes here.
        0
    }

    fn post_whole(&mut self, _segment: Segment) -> bool {
        false
    }

    fn post(&mut self, _segments: &[Segment]) {}

    fn reap(&mut self) -> bool {
        false
    }

    fn reap_whole(&mut self) -> bool {
        false
    }
}

impl RxRing for NoRing {
    fn buffer_bytes(&self) -> u32 {
        0
    }

    fn post(&mut self, _buffer: Iova) {}

    fn harvest_usual(&mut self, _most_bytes: u32) -> Option<Received> {
        None
    }

    fn harvest(&mut self) -> Option<Received> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::lane::{Drop, Progress};
    use crate::testing::{BASE, BUFFERS, Guest, WRITE};

    const BUFFER: u64 = BASE + BUFFERS;

    fn setup(guest: &Guest, link: Link) -> LaneSetup {
        LaneSetup {
            link_up: link.is_up(),
            ..guest.lane_setup()
        }
    }

    #[test]
    fn frames_to_send_come_back_in_order_and_are_counted_as_with_a_cable_out() {
        let mut guest = Guest::with_queue(8);
        let mut absent = Absent::default();
        let setup = setup(&guest, absent.link());
        let stats = Arc::clone(&setup.stats);
        let mut lane = absent.tx_lane(0, setup).unwrap();
        // Ordinary, too short for a card, in more pieces than a card takes.
        guest.offer_chain(0, &[(BUFFER, 112)], 0);
        guest.offer_chain(1, &[(BUFFER, 22)], 0);
        guest.offer_chain(2, &[(BUFFER, 20), (BUFFER, 20), (BUFFER, 20), (BUFFER, 20)], 0);
        assert_eq!(lane.poll(), Progress::Moved);
        assert_eq!(guest.used(), vec![(0, 0), (1, 0), (2, 0)]);
        assert_eq!(stats.dropped[Drop::LinkDown as usize].get(), 3);
        assert_eq!(stats.frames.get(), 0);
        assert!(!guest.has_bounce_memory());
        assert!(!lane.arm(), "nothing keeps its worker awake");
        assert_eq!(lane.stop().first_unused, 3);
    }

    #[test]
    fn buffers_to_receive_into_stay_with_the_guest() {
        let mut guest = Guest::with_queue(8);
        let mut absent = Absent::default();
        let mut lane = absent.rx_lane(0, setup(&guest, Link::Down)).unwrap();
        guest.offer_chain(0, &[(BUFFER, 1530)], WRITE);
        assert_eq!(lane.poll(), Progress::Idle);
        assert!(!lane.arm(), "nothing keeps its worker awake");
        assert!(lane.interrupt_fd().is_none());
        assert_eq!(guest.used(), vec![]);
        let stopped = lane.stop();
        assert_eq!(stopped.first_unused, 0);
        stopped.card.unwrap();
    }

    #[test]
    fn a_lane_follows_another_on_the_same_pair_and_there_is_one_pair() {
        let guest = Guest::with_queue(8);
        let mut absent = Absent::default();
        let first = absent.rx_lane(0, setup(&guest, Link::Down)).unwrap();
        assert!(absent.rx_lane(0, setup(&guest, Link::Down)).is_err());
        first.stop().card.unwrap();
        absent.reset().unwrap();
        absent.rx_lane(0, setup(&guest, Link::Down)).unwrap();
        let error = absent.tx_lane(1, setup(&guest, Link::Down)).err().unwrap();
        assert_eq!(error.to_string(), "none: queue pair 1 is not free");
        absent.tx_lane(0, setup(&guest, Link::Down)).unwrap();
    }
}
