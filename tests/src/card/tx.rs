//! Transmit: descriptors the driver posted become frames on the wire.
//!
//! ```text
//! TDT ─▶ fetch and judge ─▶ packet complete (EOP)? ─▶ DMA ─▶ offloads ─▶ wire ─▶ write-back (RS) ─▶ interrupt
//! ```
//!
//! All inside the tail write, unless a test delays it. Without a link nothing is sent and nothing completes
//! (QEMU: discarded and completed). A queue being disabled first sends what was posted. Write-back leaves
//! garbage where the address was, since the silicon's bits there are reserved, and PAYLEN where it was.
//!
//! Read with: igb.md §7.

use std::collections::VecDeque;
use std::time::Duration;

use super::Card82576;
use super::desc::{Malformed, TxContext, TxData, TxRead};
use super::filter::{FCS_LEN, HARDWARE_MAX};
use super::offload;
use super::regs::{self, Tctl};
use super::ring::{Ring, check_driver_memory};
use super::violations::{Direction, Purpose, RingName, Violation};

const FRAME_MIN: u32 = 60;
/// Shortest frame that padding is good for.
const PADDED_MIN: u32 = 17;
/// What QEMU drops.
const HEADER_LEN: usize = 14;
const SEGMENTS_MAX: usize = 64;
const GARBAGE: u32 = 0xD0D0_D0D0;
const DD: u32 = 1;

pub(super) struct TxQueue {
    pub(super) ring: Ring,
    /// Fetched descriptors, oldest first.
    pub(super) posted: VecDeque<Posted>,
    contexts: [Option<TxContext>; 2],
    /// TDWBAL and TDWBAH: bit 0 turns head write-back on.
    pub(super) head_write_back: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Posted {
    slot: u32,
    /// `None` for a descriptor that made no sense and was reported; it is passed over.
    read: Option<TxRead>,
    at: Duration,
}

impl TxQueue {
    pub(super) fn after_reset(queue: u8) -> Self {
        let name = RingName {
            direction: Direction::Tx,
            queue,
        };
        Self {
            ring: Ring::after_reset(name),
            posted: VecDeque::new(),
            contexts: [None; 2],
            head_write_back: 0,
        }
    }

    pub(super) fn forget(&mut self) {
        self.posted.clear();
        self.contexts = [None; 2];
    }

    /// Slot, address and length of each buffer the card may still read.
    pub(super) fn buffers(&self) -> impl Iterator<Item = (u32, u64, u64)> {
        self.posted.iter().filter_map(|posted| match posted.read {
            Some(TxRead::Data(data)) => Some((posted.slot, data.buffer, u64::from(data.len))),
            _ => None,
        })
    }

    pub(super) fn oldest(&self) -> Option<Duration> {
        self.posted.front().map(|posted| posted.at)
    }

    /// Index of the descriptor that ends the packet at the front.
    fn end_of_packet(&self) -> Option<usize> {
        self.posted
            .iter()
            .position(|posted| matches!(posted.read, Some(TxRead::Data(data)) if data.end_of_packet))
    }
}

/// A data descriptor and where it came from.
#[derive(Clone, Copy)]
struct Part {
    slot: u32,
    data: TxData,
}

impl Card82576 {
    pub(super) fn write_tx_tail(&mut self, queue: u8, tail: u32) {
        let log = self.log.clone();
        let index = usize::from(queue);
        let outstanding = u32::try_from(self.tx[index].posted.len()).unwrap_or(u32::MAX);
        let mut slot = self.tx[index].ring.tail;
        let fresh = self.tx[index].ring.take_tail(tail, outstanding, &log);
        for _ in 0..fresh {
            if !self.fetch_tx(queue, slot) {
                break;
            }
            slot = self.tx[index].ring.next_slot(slot);
        }
        self.pump_tx(queue);
    }

    fn fetch_tx(&mut self, queue: u8, slot: u32) -> bool {
        let ring = &self.tx[usize::from(queue)].ring;
        let name = ring.name;
        let mut raw = [0; 16];
        if !self.dma_read(name, Purpose::Descriptor, ring.slot_iova(slot), &mut raw) {
            return false;
        }
        let read = match TxRead::parse(raw) {
            Ok(read) => Some(read),
            Err(Malformed::Type { dtyp, dext }) => {
                self.log.report(Violation::WrongDescriptor {
                    ring: name,
                    slot,
                    dtyp,
                    dext,
                });
                None
            }
            Err(Malformed::Reserved { dword, bits }) => {
                self.log.report(Violation::ReservedBits {
                    ring: name,
                    slot,
                    dword,
                    bits,
                });
                None
            }
        };
        self.tx[usize::from(queue)].posted.push_back(Posted {
            slot,
            read,
            at: self.now,
        });
        true
    }

    /// Sends what was posted to `queue`, as far as the link and the test's orders allow.
    pub(super) fn pump_tx(&mut self, queue: u8) {
        let index = usize::from(queue);
        while self.may_transmit()
            && let Some(front) = self.tx[index].posted.front().copied()
        {
            if !matches!(front.read, Some(TxRead::Data(_))) {
                if let Some(TxRead::Context(context)) = front.read {
                    self.tx[index].contexts[usize::from(context.index)] = Some(context);
                }
                self.pass_over(index, front.slot);
                continue;
            }
            let Some(last) = self.tx[index].end_of_packet() else {
                return;
            };
            if !self.faults.may_complete(self.tx[index].posted[last].at, self.now) {
                return;
            }
            let parts: Vec<Part> = self.tx[index]
                .posted
                .drain(..=last)
                .filter_map(|posted| match posted.read {
                    Some(TxRead::Data(data)) => Some(Part {
                        slot: posted.slot,
                        data,
                    }),
                    _ => None,
                })
                .collect();
            if let Some(frames) = self.build(index, &parts) {
                for frame in frames {
                    self.put_on_wire(frame);
                }
            }
            self.complete(index, &parts);
        }
    }

    fn may_transmit(&self) -> bool {
        let enabled = Tctl::from_bits_retain(self.word(regs::TCTL)).contains(Tctl::EN);
        enabled
            && !self.faults.tx_hangs
            && !self.faults.removed
            && (self.bringup.link_up || self.options.quirks.qemu)
    }

    fn pass_over(&mut self, index: usize, slot: u32) {
        let queue = &mut self.tx[index];
        queue.posted.pop_front();
        queue.ring.head = queue.ring.next_slot(slot);
    }

    /// Checks a packet, fetches it and applies offloads. `None` if it is not fit to be sent.
    fn build(&self, index: usize, parts: &[Part]) -> Option<Vec<Vec<u8>>> {
        let Part { slot, data: first } = *parts.first()?;
        let name = self.tx[index].ring.name;
        let queue = name.queue;
        let context = self.tx[index]
            .contexts
            .get(usize::from(first.context))
            .copied()
            .flatten();
        let offload =
            first.segment || first.insert_ip_checksum || first.insert_l4_checksum || first.insert_vlan;
        if offload && context.is_none() {
            self.log.report(Violation::ContextMissing {
                queue,
                slot,
                index: first.context,
            });
            return None;
        }
        if !self.parts_are_sound(queue, parts) {
            return None;
        }
        let sum: u32 = parts.iter().map(|part| part.data.len).sum();
        let headers = match context {
            Some(context) if first.segment => u32::from(context.mac_len + context.ip_len + context.l4_len),
            _ => 0,
        };
        if first.payload_len != sum.saturating_sub(headers) {
            let sum = sum.saturating_sub(headers);
            self.log.report(Violation::PayloadLength {
                queue,
                slot,
                paylen: first.payload_len,
                sum,
            });
        }
        if !first.segment && sum + FCS_LEN > HARDWARE_MAX {
            let most = HARDWARE_MAX - FCS_LEN;
            self.log.report(Violation::PacketTooLong {
                queue,
                slot,
                len: sum,
                most,
            });
            return None;
        }
        let packet = self.gather(name, parts)?;
        let Some(context) = context.filter(|_| offload) else {
            self.check_least(queue, slot, sum);
            return (packet.len() >= HEADER_LEN).then(|| vec![packet]);
        };
        match offload::apply(packet, &first, &context) {
            Ok(frames) => {
                self.check_least(queue, slot, sum);
                Some(frames)
            }
            Err(offload::BadField { field, value }) => {
                self.log.report(Violation::ContextRange {
                    queue,
                    slot,
                    field,
                    value,
                });
                None
            }
        }
    }

    fn parts_are_sound(&self, queue: u8, parts: &[Part]) -> bool {
        let mut sound = true;
        for Part { slot, data } in parts.iter().copied() {
            if data.len == 0 {
                self.log.report(Violation::ZeroLengthSegment { queue, slot });
                sound = false;
            }
            if data.buffer == 0 {
                let ring = RingName {
                    direction: Direction::Tx,
                    queue,
                };
                self.log.report(Violation::NullBuffer { ring, slot });
                sound = false;
            }
            if !data.insert_fcs {
                self.log.report(Violation::MissingFcs { queue, slot });
                sound = false;
            }
        }
        if parts.len() > SEGMENTS_MAX {
            let segments = u32::try_from(parts.len()).unwrap_or(u32::MAX);
            self.log.report(Violation::TooManySegments {
                queue,
                slot: parts[0].slot,
                segments,
            });
            sound = false;
        }
        sound
    }

    fn check_least(&self, queue: u8, slot: u32, len: u32) {
        let pads = Tctl::from_bits_retain(self.word(regs::TCTL)).contains(Tctl::PSP);
        let least = if pads { PADDED_MIN } else { FRAME_MIN };
        if len < least {
            self.log.report(Violation::PacketTooShort {
                queue,
                slot,
                len,
                least,
            });
        }
    }

    fn gather(&self, name: RingName, parts: &[Part]) -> Option<Vec<u8>> {
        let mut packet = Vec::new();
        for Part { data, .. } in parts {
            let at = packet.len();
            packet.resize(at + data.len as usize, 0);
            if !self.dma_read(name, Purpose::TxData, data.buffer, &mut packet[at..]) {
                return None;
            }
        }
        Some(packet)
    }

    fn put_on_wire(&mut self, mut frame: Vec<u8>) {
        if !self.bringup.link_up {
            self.counters.discarded_no_link += 1;
            return;
        }
        if !self.options.quirks.qemu {
            frame.resize(frame.len().max(FRAME_MIN as usize), 0);
        }
        self.count_sent(&frame);
        self.counters.tx_frames += 1;
        self.counters.tx_bytes += frame.len() as u64;
        self.wire.transmit(&frame);
    }

    /// Reports the packet done: DD in each descriptor with RS, or the head index in memory.
    fn complete(&mut self, index: usize, parts: &[Part]) {
        let Some(last) = parts.last() else { return };
        let ring = &mut self.tx[index].ring;
        ring.head = ring.next_slot(last.slot);
        let (name, head) = (ring.name, ring.head);
        let head_write_back = self.tx[index].head_write_back;
        let mut reported = false;
        for Part { slot, data } in parts.iter().filter(|part| part.data.report_status) {
            reported = true;
            if head_write_back & 1 != 0 {
                let iova = head_write_back & !3;
                check_driver_memory(name, iova, 4, self.bus.as_ref(), &self.log);
                self.dma_write(name, Purpose::WriteBack, iova, &head.to_le_bytes());
            } else {
                let descriptor = self.tx[index].ring.slot_iova(*slot);
                let reserved = [GARBAGE.to_le_bytes(), GARBAGE.to_le_bytes(), [0; 4]].concat();
                let status = data.payload_len << 14 | DD;
                let _ = self.dma_write(name, Purpose::WriteBack, descriptor, &reserved)
                    && self.dma_write(name, Purpose::WriteBack, descriptor + 12, &status.to_le_bytes());
            }
        }
        if reported {
            self.irq.raise_queue(name, self.now);
        }
    }
}
