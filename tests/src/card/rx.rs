//! Receive: frames from the wire end up in buffers the driver posted.
//!
//! ```text
//! wire ─▶ filter ─▶ packet buffer (64 KiB) ─▶ posted descriptors ─▶ write-back, DD last ─▶ interrupt
//! ```
//!
//! Descriptors are fetched, and judged, when the tail is written; the card then works from its own copy, so
//! RDH runs ahead of what is done. A frame waits in the packet buffer until its queue has descriptors for all
//! of it, holding up everything behind it, or is dropped with DROP_EN. Once a queue is told to stop, new
//! frames for it are dropped, but what already waits may still be stored until RXDCTL b25 reads 0.
//!
//! Read with: igb.md §4 to §6.

use std::collections::VecDeque;
use std::time::Duration;

use super::Card82576;
use super::bus::{DriverUse, RangeKind};
use super::desc::{RxRead, RxWriteBack, rx_status};
use super::faults::Delay;
use super::filter::FCS_LEN;
use super::frame::Parsed;
use super::regs::{self, Cause, Ctrl, Rctl};
use super::ring::{Ring, State};
use super::violations::{Direction, Purpose, RingName, Violation};
use super::wire::frame_check_sequence;

const FRAME_MIN: usize = 60;
const GARBAGE: u8 = 0xA5;

pub(super) struct RxQueue {
    pub(super) ring: Ring,
    pub(super) srrctl: u32,
    /// Fetched descriptors, oldest first.
    pub(super) posted: VecDeque<Posted>,
    /// RQDPC.
    pub(super) drops: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Posted {
    pub(super) slot: u32,
    pub(super) buffer: u64,
}

/// A frame in the packet buffer.
pub(super) struct Waiting {
    queue: u8,
    /// As it will be stored: padded, with the check sequence if that is not stripped.
    bytes: Vec<u8>,
    /// What the last descriptor will say, but for DD, EOP and the length.
    write_back: RxWriteBack,
    arrived: Duration,
}

impl RxQueue {
    pub(super) fn after_reset(queue: u8) -> Self {
        let name = RingName {
            direction: Direction::Rx,
            queue,
        };
        Self {
            ring: Ring::after_reset(name),
            srrctl: 0,
            posted: VecDeque::new(),
            drops: 0,
        }
    }
}

impl Card82576 {
    /// Takes one frame off the wire, without its check sequence, and stores it if it can be stored now.
    pub fn receive_from_wire(&mut self, frame: &[u8]) {
        if self.faults.removed || self.faults.take_drop() {
            self.counters.dropped_on_request += 1;
            return;
        }
        if !self.bringup.link_up {
            self.counters.dropped_no_link += 1;
            return;
        }
        if !self.rctl().contains(Rctl::EN) {
            self.counters.dropped_receiver_off += 1;
            return;
        }
        let mut bytes = frame.to_vec();
        bytes.resize(frame.len().max(FRAME_MIN), 0);
        if self.is_oversize(&bytes) {
            self.counters.dropped_oversize += 1;
            if !self.options.quirks.qemu {
                self.count(regs::ROC, 1);
            }
            return;
        }
        if !self.is_for_us(&bytes) {
            self.counters.dropped_filtered += 1;
            return;
        }
        self.count_received(&bytes);
        self.admit(bytes);
        self.pump_rx();
    }

    /// Says whether a frame arriving now would be stored at once, or dropped for a reason that waiting does
    /// not mend. A caller with a queue of its own may hold frames back while this is false, as QEMU does.
    #[must_use]
    pub fn can_receive(&self) -> bool {
        let listening = !self.faults.removed && self.bringup.link_up && self.rctl().contains(Rctl::EN);
        let on = || self.rx.iter().filter(|queue| queue.ring.state == State::Enabled);
        let stored = self.fifo.is_empty() && on().any(|queue| !queue.posted.is_empty());
        !listening || stored || on().next().is_none()
    }

    fn admit(&mut self, mut bytes: Vec<u8>) {
        let parsed = Parsed::of(&bytes, self.vlan_type());
        let (queue, rss_type, hash) = self.steer(&bytes, &parsed);
        let accepts = match self.rx[usize::from(queue)].ring.state {
            State::Enabled => true,
            State::Disabling { .. } => self.faults.is_wedged(self.rx[usize::from(queue)].ring.name),
            State::Disabled | State::Enabling { .. } => false,
        };
        if !accepts {
            self.counters.dropped_queue_off += 1;
            return;
        }
        let status = parsed.checksum_status(&bytes, self.rxcsum());
        let write_back = RxWriteBack {
            rss_type,
            packet_type: parsed.packet_type,
            hash,
            status,
            ..RxWriteBack::default()
        };
        if !self.rctl().contains(Rctl::SECRC) {
            let fcs = if self.options.quirks.qemu {
                [0; FCS_LEN as usize]
            } else {
                frame_check_sequence(&bytes)
            };
            bytes.extend(fcs);
        }
        let waiting: usize = self.fifo.iter().map(|frame| frame.bytes.len()).sum();
        if waiting + bytes.len() > self.word(regs::RXPBS) as usize * 1024 {
            self.count(regs::MPC, 1);
            self.counters.dropped_buffer_full += 1;
            self.irq.raise_other(Cause::RXO, self.now);
            return;
        }
        let needed = bytes
            .len()
            .div_ceil(self.buffer_size(&self.rx[usize::from(queue)]) as usize);
        if self.rx[usize::from(queue)].posted.len() < needed {
            self.count(regs::RNBC, 1);
        }
        self.fifo.push_back(Waiting {
            queue,
            bytes,
            write_back,
            arrived: self.now,
        });
    }

    /// Stores what waits in the packet buffer, as far as descriptors and the test's orders allow.
    pub(super) fn pump_rx(&mut self) {
        // A card told to stop mastering holds still, which is no fault of the driver's.
        while !self.bringup.ctrl.contains(Ctrl::GIO_MASTER_DISABLE)
            && let Some(frame) = self.fifo.front()
        {
            let queue = &self.rx[usize::from(frame.queue)];
            let arrived = frame.arrived;
            let room = queue.posted.len() >= frame.bytes.len().div_ceil(self.buffer_size(queue) as usize);
            if !matches!(queue.ring.state, State::Enabled | State::Disabling { .. }) {
                self.counters.dropped_queue_off += 1;
                self.fifo.pop_front();
            } else if room {
                if !self.faults.may_complete(arrived, self.now) {
                    return;
                }
                if let Some(frame) = self.fifo.pop_front() {
                    self.store(frame);
                }
            } else if self.drops_without_descriptors(queue) {
                self.rx[usize::from(frame.queue)].drops += 1;
                self.counters.dropped_no_descriptor += 1;
                self.fifo.pop_front();
            } else {
                return;
            }
        }
    }

    fn drops_without_descriptors(&self, queue: &RxQueue) -> bool {
        queue.srrctl & regs::SRRCTL_DROP_EN != 0 || self.word(regs::QDE) & 1 << queue.ring.name.queue != 0
    }

    fn store(&mut self, frame: Waiting) {
        let index = usize::from(frame.queue);
        let buffer_size = self.buffer_size(&self.rx[index]) as usize;
        let name = self.rx[index].ring.name;
        let last = frame.bytes.len().div_ceil(buffer_size) - 1;
        for (number, part) in frame.bytes.chunks(buffer_size).enumerate() {
            let queue = &mut self.rx[index];
            let Some(posted) = queue.posted.pop_front() else {
                return;
            };
            let descriptor = queue.ring.slot_iova(posted.slot);
            queue.ring.head = queue.ring.next_slot(posted.slot);
            // A null address was reported when it was fetched.
            if posted.buffer != 0 {
                self.dma_write(name, Purpose::RxData, posted.buffer, part);
            }
            let base = if number == last {
                frame.write_back
            } else {
                RxWriteBack::default()
            };
            let end = if number == last { rx_status::EOP } else { 0 };
            let done = RxWriteBack {
                status: base.status | end | rx_status::DD,
                len: u16::try_from(part.len()).unwrap_or(u16::MAX),
                ..base
            };
            self.write_back_rx(name, descriptor, done);
        }
        self.counters.rx_frames += 1;
        self.counters.rx_bytes += frame.bytes.len() as u64;
        self.irq.raise_queue(name, self.now);
    }

    /// Writes all but the status first: whoever goes by the length instead of DD is found out.
    fn write_back_rx(&self, name: RingName, descriptor: u64, done: RxWriteBack) {
        let [types, hash, status, len] = done.to_dwords();
        let first = [types.to_le_bytes(), hash.to_le_bytes()].concat();
        let _ = self.dma_write(name, Purpose::WriteBack, descriptor, &first)
            && self.dma_write(name, Purpose::WriteBack, descriptor + 12, &len.to_le_bytes())
            && self.dma_write(name, Purpose::WriteBack, descriptor + 8, &status.to_le_bytes());
    }

    pub(super) fn write_rx_tail(&mut self, queue: u8, tail: u32) {
        let log = self.log.clone();
        let index = usize::from(queue);
        let outstanding = u32::try_from(self.rx[index].posted.len()).unwrap_or(u32::MAX);
        let mut slot = self.rx[index].ring.tail;
        let fresh = self.rx[index].ring.take_tail(tail, outstanding, &log);
        for _ in 0..fresh {
            if !self.fetch_rx(queue, slot) {
                break;
            }
            slot = self.rx[index].ring.next_slot(slot);
        }
        self.pump_rx();
    }

    fn fetch_rx(&mut self, queue: u8, slot: u32) -> bool {
        let RxQueue { ring, .. } = &self.rx[usize::from(queue)];
        let name = ring.name;
        let mut raw = [0; 16];
        if !self.dma_read(name, Purpose::Descriptor, ring.slot_iova(slot), &mut raw) {
            return false;
        }
        let read = RxRead::parse(raw);
        for (dword, bits) in (2..).zip(read.header).filter(|(_, bits)| *bits != 0) {
            self.log.report(Violation::ReservedBits {
                ring: name,
                slot,
                dword,
                bits,
            });
        }
        let posted = Posted {
            slot,
            buffer: read.buffer,
        };
        if self.check_buffer(queue, posted) && self.options.scribble {
            let bound = self.rx_buffer_bound(&self.rx[usize::from(queue)]);
            let garbage = vec![GARBAGE; usize::try_from(bound).unwrap_or(0)];
            self.dma_write(name, Purpose::RxData, posted.buffer, &garbage);
        }
        self.rx[usize::from(queue)].posted.push_back(posted);
        true
    }

    /// Judges a posted buffer by whose it is and by what the card may write there. Returns whether it passed.
    fn check_buffer(&self, queue: u8, Posted { slot, buffer: iova }: Posted) -> bool {
        if iova == 0 {
            let ring = self.rx[usize::from(queue)].ring.name;
            self.log.report(Violation::NullBuffer { ring, slot });
            return false;
        }
        let kind = self.bus.kind(iova, 1);
        if !matches!(
            kind,
            RangeKind::GuestMemory | RangeKind::DriverMemory(DriverUse::Bounce)
        ) {
            self.log.report(Violation::RxOutsideGuest {
                queue,
                slot,
                iova,
                kind,
            });
            return false;
        }
        let needed = self.rx_buffer_bound(&self.rx[usize::from(queue)]);
        let room = self.bus.room(iova);
        if room < needed {
            self.log.report(Violation::BufferTooSmall {
                queue,
                slot,
                iova,
                room,
                needed,
            });
        }
        room >= needed
    }

    /// Judges buffers again after a register changed what the card may write; once per queue.
    pub(super) fn recheck_posted_buffers(&self) {
        for queue in self.rx.iter().filter(|queue| queue.ring.is_live()) {
            let needed = self.rx_buffer_bound(queue);
            let short = queue
                .posted
                .iter()
                .find(|posted| self.bus.room(posted.buffer) < needed);
            if let Some(Posted { slot, buffer: iova }) = short.copied() {
                let room = self.bus.room(iova);
                let queue = queue.ring.name.queue;
                self.log.report(Violation::BufferTooSmall {
                    queue,
                    slot,
                    iova,
                    room,
                    needed,
                });
            }
        }
    }

    /// What the card may write to one buffer of `queue`: no more than BSIZE, no more than the largest frame.
    pub(super) fn rx_buffer_bound(&self, queue: &RxQueue) -> u64 {
        u64::from(self.buffer_size(queue).min(self.largest_stored()))
    }

    fn buffer_size(&self, queue: &RxQueue) -> u32 {
        match queue.srrctl & 0x7F {
            0 => [2048, 1024, 512, 256][(self.rctl().bits() >> 16 & 3) as usize],
            kib => kib * 1024,
        }
    }

    pub(super) fn write_rctl(&mut self, value: Rctl) {
        if value.contains(Rctl::SBP) {
            self.log.report(Violation::StoreBadPackets { rctl: value.bits() });
        }
        if value.intersects(Rctl::LBM) {
            self.log.report(Violation::NotModelled {
                what: "RCTL loopback",
                value: value.bits(),
            });
        }
        self.set_word(regs::RCTL, value.bits());
        if !value.contains(Rctl::EN) {
            self.fifo.clear();
        }
        self.recheck_posted_buffers();
        self.pump_rx();
    }

    pub(super) fn check_descriptor_type(&self, queue: u8) {
        let desctype = (self.rx[usize::from(queue)].srrctl >> 25 & 7) as u8;
        if desctype != 1 {
            self.log
                .report(Violation::WrongDescriptorType { queue, desctype });
        }
    }

    /// When the oldest delayed frame, either way, falls due.
    pub(super) fn next_completion(&self) -> Option<Duration> {
        let Delay::After(delay) = self.faults.delay else {
            return None;
        };
        let sent = self.tx.iter().filter_map(|queue| queue.oldest());
        let next = self
            .fifo
            .front()
            .map(|frame| frame.arrived)
            .into_iter()
            .chain(sent)
            .min()?;
        // What is overdue waits for something else than time.
        Some(next + delay).filter(|due| *due > self.now)
    }
}
