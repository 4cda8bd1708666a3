//! Every rule broken once, and nothing else reported.

use std::time::Duration;

use tests::card::regs::{self, Ctrl, Rctl};
use tests::card::{DriverUse, InUse, Options, Purpose, RangeKind, Violation};

use super::driver::{
    BOUNCE, GUEST, RCTL, RX_RING, RX0, Rig, SLOTS, TX_BUFFERS, TX_RING, TX0, WHOLE_FRAME, frame, low_half,
};

const RXDCTL: u32 = regs::RX_QUEUES + 0x28;
const RDT: u32 = regs::RX_QUEUES + 0x18;
const TXDCTL: u32 = regs::TX_QUEUES + 0x28;
const TDT: u32 = regs::TX_QUEUES + 0x18;

fn running() -> Rig {
    Rig::running(Options::default())
}

/// A card whose receive queue 0 is off and may be set up.
fn reset() -> Rig {
    let mut rig = Rig::cold(Options::default());
    rig.enable_pci();
    rig.reset_port();
    rig
}

#[test]
fn dma_to_an_unmapped_iova() {
    let mut rig = running();
    rig.write_tx_descriptor(0x9999_0000, WHOLE_FRAME | 60, 60 << 14);
    rig.ring_tx();
    rig.expect(&[Violation::DmaUnmapped {
        ring: TX0,
        purpose: Purpose::TxData,
        iova: 0x9999_0000,
        len: 60,
    }]);
    assert!(rig.sent().is_empty());
}

#[test]
fn a_receive_buffer_unmapped_behind_the_cards_back() {
    let mut rig = running();
    rig.post_rx(1);
    rig.memory.unmap(GUEST);
    rig.card.receive_from_wire(&frame(60, 1));
    rig.expect(&[Violation::DmaUnmapped {
        ring: RX0,
        purpose: Purpose::RxData,
        iova: GUEST,
        len: 60,
    }]);
}

#[test]
fn dma_while_bus_master_is_off() {
    let mut rig = running();
    rig.card.config_write(4, &[0x02, 0x00]);
    rig.post_rx(3);
    rig.expect(&[Violation::BusMasterOff {
        ring: RX0,
        purpose: Purpose::Descriptor,
        iova: RX_RING,
    }]);
}

#[test]
fn dma_while_the_master_is_disabled_in_ctrl() {
    let mut rig = running();
    rig.set_bits(regs::CTRL, Ctrl::GIO_MASTER_DISABLE.bits());
    rig.send(&frame(60, 1));
    rig.expect(&[Violation::MasterDisabled {
        ring: TX0,
        purpose: Purpose::Descriptor,
        iova: TX_RING,
    }]);
}

#[test]
fn a_reserved_bit_in_a_receive_descriptor() {
    let mut rig = running();
    rig.memory.put(RX_RING, &GUEST.to_le_bytes());
    rig.memory.put(RX_RING + 8, &1_u64.to_le_bytes());
    rig.card.write32(RDT, 1);
    rig.expect(&[Violation::ReservedBits {
        ring: RX0,
        slot: 0,
        dword: 2,
        bits: 1,
    }]);
}

#[test]
fn a_reserved_bit_in_a_transmit_descriptor() {
    let mut rig = running();
    rig.send_with(&frame(60, 1), WHOLE_FRAME | 1 << 26, 0);
    rig.expect(&[Violation::ReservedBits {
        ring: TX0,
        slot: 0,
        dword: 2,
        bits: 1 << 26,
    }]);
}

#[test]
fn a_legacy_transmit_descriptor() {
    let mut rig = running();
    rig.send_with(&frame(60, 1), 1 << 24, 0);
    rig.expect(&[Violation::WrongDescriptor {
        ring: TX0,
        slot: 0,
        dtyp: 0,
        dext: false,
    }]);
}

#[test]
fn a_receive_queue_with_legacy_descriptors() {
    let mut rig = reset();
    rig.set_up_rx_with_split(0x8000_0002);
    rig.expect(&[Violation::WrongDescriptorType {
        queue: 0,
        desctype: 0,
    }]);
}

#[test]
fn a_tail_moved_while_the_queue_is_off() {
    let mut rig = running();
    rig.card.write32(RXDCTL, 0);
    rig.post_rx(1);
    rig.expect(&[Violation::TailWhileDisabled { ring: RX0, tail: 1 }]);
}

#[test]
fn a_tail_moved_while_the_queue_is_being_disabled() {
    let mut rig = running();
    rig.post_rx(1);
    rig.card.write32(RXDCTL, 0);
    rig.post_rx(1);
    rig.expect(&[Violation::TailWhileDisabled { ring: RX0, tail: 2 }]);
}

#[test]
fn a_tail_moved_before_enable_was_seen() {
    let mut rig = running();
    rig.card.write32(TXDCTL, 0);
    rig.card.write32(TXDCTL, regs::QUEUE_ENABLE);
    rig.card.read32(TXDCTL);
    rig.send(&frame(60, 1));
    rig.expect(&[Violation::TailBeforeEnabled { ring: TX0, tail: 1 }]);
}

#[test]
fn a_tail_outside_the_ring() {
    let mut rig = running();
    rig.card.write32(TDT, SLOTS);
    rig.expect(&[Violation::TailBeyondRing {
        ring: TX0,
        tail: SLOTS,
        size: SLOTS,
    }]);
}

#[test]
fn more_descriptors_than_fit() {
    let mut rig = running();
    rig.post_rx(SLOTS - 1);
    rig.log.assert_clean();
    rig.post_rx(1);
    rig.expect(&[Violation::RingOverfilled {
        ring: RX0,
        posted: SLOTS,
        size: SLOTS,
    }]);
}

#[test]
fn ring_set_up_changed_under_a_live_queue() {
    let mut rig = running();
    rig.card.write32(regs::RX_QUEUES + 0x0C, 0x0200_0004);
    rig.expect(&[Violation::RingChangedWhileEnabled {
        ring: RX0,
        register: "SRRCTL",
    }]);
}

#[test]
fn a_ring_that_is_not_aligned() {
    let mut rig = running();
    rig.card.write32(TXDCTL, 0);
    rig.card.write32(regs::TX_QUEUES, low_half(TX_RING + 64));
    rig.card.write32(TXDCTL, regs::QUEUE_ENABLE);
    rig.expect(&[Violation::RingMisaligned {
        ring: TX0,
        base: TX_RING + 64,
    }]);
}

#[test]
fn a_ring_of_an_odd_length() {
    let mut rig = running();
    rig.card.write32(TXDCTL, 0);
    rig.card.write32(regs::TX_QUEUES + 8, 9 * 16);
    rig.card.write32(TXDCTL, regs::QUEUE_ENABLE);
    rig.expect(&[Violation::RingLength { ring: TX0, len: 144 }]);
}

#[test]
fn a_ring_where_the_guest_can_write() {
    let mut rig = running();
    rig.card.write32(TXDCTL, 0);
    rig.card.write32(regs::TX_QUEUES, low_half(GUEST));
    rig.card.write32(TXDCTL, regs::QUEUE_ENABLE);
    let kind = RangeKind::GuestMemory;
    rig.expect(&[Violation::RingOutsideDriverMemory {
        ring: TX0,
        iova: GUEST,
        len: 256,
        kind,
    }]);
}

#[test]
fn head_write_back_where_the_guest_can_write() {
    let mut rig = running();
    rig.card.write32(regs::TX_QUEUES + 0x38, low_half(GUEST) | 1);
    rig.send(&frame(60, 1));
    let kind = RangeKind::GuestMemory;
    rig.expect(&[Violation::RingOutsideDriverMemory {
        ring: TX0,
        iova: GUEST,
        len: 4,
        kind,
    }]);
}

#[test]
fn a_buffer_at_the_end_of_guest_memory() {
    let mut rig = running();
    let iova = GUEST + 0x10_0000 - 1517;
    rig.post_rx_at(iova);
    rig.expect(&[Violation::BufferTooSmall {
        queue: 0,
        slot: 0,
        iova,
        room: 1517,
        needed: 1518,
    }]);
    let mut rig = running();
    rig.post_rx_at(iova - 1);
    rig.log.assert_clean();
}

#[test]
fn a_limit_raised_over_buffers_already_posted() {
    let mut rig = running();
    let iova = GUEST + 0x10_0000 - 1518;
    rig.post_rx_at(iova);
    rig.card.write32(regs::RLPML, 2000);
    rig.expect(&[Violation::BufferTooSmall {
        queue: 0,
        slot: 0,
        iova,
        room: 1518,
        needed: 1996,
    }]);
    rig.card.write32(regs::RLPML, 9018);
    rig.expect(&[Violation::BufferTooSmall {
        queue: 0,
        slot: 0,
        iova,
        room: 1518,
        needed: 2048,
    }]);
}

#[test]
fn a_limit_that_forgets_the_crc_when_it_is_not_stripped() {
    let mut rig = running();
    rig.card.write32(regs::RCTL, RCTL & !Rctl::SECRC.bits());
    let iova = GUEST + 0x10_0000 - 1518;
    rig.post_rx_at(iova);
    rig.expect(&[Violation::BufferTooSmall {
        queue: 0,
        slot: 0,
        iova,
        room: 1518,
        needed: 1522,
    }]);
}

#[test]
fn a_receive_buffer_that_is_nobodys_to_receive_into() {
    let mut rig = running();
    rig.post_rx_at(BOUNCE);
    rig.log.assert_clean();
    rig.post_rx_at(TX_RING);
    let kind = RangeKind::DriverMemory(DriverUse::Rings);
    rig.expect(&[Violation::RxOutsideGuest {
        queue: 0,
        slot: 1,
        iova: TX_RING,
        kind,
    }]);
    rig.post_rx_at(0x7000_0000_0000);
    let kind = RangeKind::Unmapped;
    rig.expect(&[Violation::RxOutsideGuest {
        queue: 0,
        slot: 2,
        iova: 0x7000_0000_0000,
        kind,
    }]);
}

#[test]
fn a_null_buffer() {
    let mut rig = running();
    rig.post_rx_at(0);
    rig.expect(&[Violation::NullBuffer { ring: RX0, slot: 0 }]);
    rig.write_tx_descriptor(0, WHOLE_FRAME | 60, 60 << 14);
    rig.ring_tx();
    rig.expect(&[Violation::NullBuffer { ring: TX0, slot: 0 }]);
}

#[test]
fn storing_bad_packets() {
    let mut rig = running();
    let rctl = RCTL | Rctl::SBP.bits();
    rig.card.write32(regs::RCTL, rctl);
    rig.expect(&[Violation::StoreBadPackets { rctl }]);
}

#[test]
fn interrupt_routing_before_msi_x_mode() {
    let mut rig = running();
    rig.card.write32(regs::IVAR, 0x8080);
    rig.card.write32(regs::EIAC, 1);
    rig.expect(&[
        Violation::BeforeMsixMode {
            register: "IVAR",
            value: 0x8080,
        },
        Violation::BeforeMsixMode {
            register: "EIAC",
            value: 1,
        },
    ]);
    assert_eq!(rig.card.read32(regs::IVAR), 0, "it did not stick");
}

#[test]
fn a_vector_the_card_does_not_have() {
    let mut rig = running();
    rig.set_up_interrupts();
    rig.card.write32(regs::IVAR + 4, 0x8A);
    rig.expect(&[Violation::NoSuchVector {
        register: "IVAR",
        vector: 10,
    }]);
}

#[test]
fn a_packet_too_long() {
    let mut rig = running();
    let piece = WHOLE_FRAME & !(1 << 24);
    rig.write_tx_descriptor(TX_BUFFERS, piece | 9000, 9725 << 14);
    rig.write_tx_descriptor(TX_BUFFERS + 9000, WHOLE_FRAME | 725, 0);
    rig.ring_tx();
    rig.expect(&[Violation::PacketTooLong {
        queue: 0,
        slot: 0,
        len: 9725,
        most: 9724,
    }]);
}

#[test]
fn a_packet_too_short() {
    let mut rig = running();
    rig.send(&frame(16, 1));
    rig.expect(&[Violation::PacketTooShort {
        queue: 0,
        slot: 0,
        len: 16,
        least: 17,
    }]);
    rig.card.write32(regs::TCTL, 0x0103_F0F2);
    rig.send(&frame(59, 1));
    rig.expect(&[Violation::PacketTooShort {
        queue: 0,
        slot: 1,
        len: 59,
        least: 60,
    }]);
}

#[test]
fn a_payload_length_that_is_not_the_sum() {
    let mut rig = running();
    rig.write_tx_descriptor(TX_BUFFERS, WHOLE_FRAME | 60, 64 << 14);
    rig.ring_tx();
    rig.expect(&[Violation::PayloadLength {
        queue: 0,
        slot: 0,
        paylen: 64,
        sum: 60,
    }]);
}

#[test]
fn a_zero_length_segment() {
    let mut rig = running();
    rig.write_tx_descriptor(TX_BUFFERS, WHOLE_FRAME & !(1 << 24) | 60, 60 << 14);
    rig.write_tx_descriptor(TX_BUFFERS, WHOLE_FRAME, 0);
    rig.ring_tx();
    rig.expect(&[Violation::ZeroLengthSegment { queue: 0, slot: 1 }]);
}

#[test]
fn too_many_segments() {
    let mut rig = running();
    rig.card.write32(TXDCTL, 0);
    rig.card.write32(regs::TX_QUEUES + 8, 128 * 16);
    rig.card.write32(TXDCTL, regs::QUEUE_ENABLE);
    rig.poll(TXDCTL, regs::QUEUE_ENABLE, regs::QUEUE_ENABLE);
    for slot in 0..65_u64 {
        let end = if slot == 64 { 1 << 24 } else { 0 };
        let words = [
            low_half(TX_BUFFERS),
            0,
            WHOLE_FRAME & !(1 << 24) | end | 1,
            65 << 14,
        ];
        let raw: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        rig.memory.put(TX_RING + 16 * slot, &raw);
    }
    rig.card.write32(TDT, 65);
    rig.expect(&[Violation::TooManySegments {
        queue: 0,
        slot: 0,
        segments: 65,
    }]);
}

#[test]
fn a_frame_without_its_check_sequence() {
    let mut rig = running();
    rig.send_with(&frame(60, 1), WHOLE_FRAME & !(1 << 25), 0);
    rig.expect(&[Violation::MissingFcs { queue: 0, slot: 0 }]);
}

#[test]
fn an_offload_without_a_context() {
    let mut rig = running();
    rig.send_with(&frame(60, 1), WHOLE_FRAME, 1 << 9 | 1 << 4);
    rig.expect(&[Violation::ContextMissing {
        queue: 0,
        slot: 0,
        index: 1,
    }]);
}

#[test]
fn an_offload_out_of_range() {
    let mut rig = running();
    rig.write_tx_context(14, 19, 1, 0, 0);
    rig.send_with(&frame(60, 1), WHOLE_FRAME, 1 << 9);
    rig.expect(&[Violation::ContextRange {
        queue: 0,
        slot: 1,
        field: "IPLEN",
        value: 19,
    }]);
}

#[test]
fn a_register_that_is_none() {
    let mut rig = running();
    rig.card.write32(0x0_C038, 1 << 31);
    rig.card.write32(regs::GPRC, 0);
    rig.expect(&[
        Violation::UnknownRegister {
            offset: 0xC038,
            value: 1 << 31,
        },
        Violation::UnknownRegister {
            offset: regs::GPRC,
            value: 0,
        },
    ]);
}

#[test]
fn an_access_outside_the_bar() {
    let mut rig = running();
    assert_eq!(rig.card.read32(0x2_0000), u32::MAX);
    rig.card.write32(0x102, 0);
    rig.expect(&[
        Violation::OutsideBar { offset: 0x2_0000 },
        Violation::OutsideBar { offset: 0x102 },
    ]);
}

#[test]
fn an_access_before_memory_decoding_is_on() {
    let mut rig = Rig::cold(Options::default());
    assert_eq!(rig.card.read32(regs::STATUS), u32::MAX);
    rig.expect(&[Violation::MemoryDecodeOff { offset: regs::STATUS }]);
}

#[test]
fn an_access_too_soon_after_a_reset() {
    let quiet = Some(Duration::from_millis(1));
    let mut rig = Rig::running(Options {
        reset_quiet: quiet,
        ..Options::default()
    });
    rig.set_bits(regs::CTRL, Ctrl::RST.bits());
    rig.card.advance(Duration::from_micros(900));
    rig.card.read32(regs::EECD);
    rig.expect(&[Violation::TouchedDuringReset {
        offset: regs::EECD,
        since_us: 900,
    }]);
    rig.card.advance(Duration::from_micros(100));
    rig.card.read32(regs::EECD);
    rig.log.assert_clean();
}

#[test]
fn memory_unmapped_under_a_live_queue() {
    let mut rig = running();
    rig.post_rx(2);
    rig.card.note_unmapped(GUEST + 0x1000, 0x10_0000);
    rig.log.assert_clean();
    rig.card.note_unmapped(GUEST + 0x800 + 1517, 1);
    rig.expect(&[Violation::UnmappedInUse {
        ring: RX0,
        what: InUse::Buffer { slot: 1 },
        iova: GUEST + 0x800,
    }]);
    rig.card.note_unmapped(TX_RING, 0x1000);
    rig.expect(&[Violation::UnmappedInUse {
        ring: TX0,
        what: InUse::Ring,
        iova: TX_RING,
    }]);
    rig.card.hang_tx(true);
    rig.send(&frame(60, 1));
    rig.card.note_unmapped(TX_BUFFERS, 1);
    rig.expect(&[Violation::UnmappedInUse {
        ring: TX0,
        what: InUse::Buffer { slot: 0 },
        iova: TX_BUFFERS,
    }]);
}

#[test]
fn memory_unmapped_before_the_disabled_queue_was_polled() {
    let mut rig = running();
    rig.post_rx(1);
    rig.card.write32(RXDCTL, 0);
    rig.card.note_unmapped(GUEST, 0x1000);
    rig.expect(&[Violation::UnmappedInUse {
        ring: RX0,
        what: InUse::Buffer { slot: 0 },
        iova: GUEST,
    }]);
    rig.poll(RXDCTL, regs::QUEUE_ENABLE, 0);
    rig.card.note_unmapped(GUEST, 0x1000);
    rig.log.assert_clean();
}

#[test]
fn a_feature_the_model_lacks() {
    let mut rig = running();
    rig.card.write32(regs::MRQC, 3);
    rig.expect(&[Violation::NotModelled {
        what: "MRQC mode",
        value: 3,
    }]);
}
