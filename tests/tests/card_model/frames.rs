//! Frames both ways, as a driver by the book moves them.

use std::time::Duration;

use tests::card::regs::{self, Rctl};
use tests::card::{Options, Quirks};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{GUEST, RCTL, RX_RING, Rig, SLOTS, TX_BUFFERS, TX_RING, WHOLE_FRAME, frame};

const QEMU: Options = Options {
    quirks: Quirks { qemu: true },
    scribble: false,
    reset_quiet: None,
};

fn udp_frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2([2; 6], super::driver::MAC)
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .udp(1000, 2000)
        .write(&mut frame, payload)
        .expect("a short frame");
    frame
}

#[test]
fn frames_arrive_in_order_over_several_turns_of_the_ring() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(SLOTS - 1);
    for number in 0..100_u8 {
        let len = 60 + usize::from(number) * 14;
        rig.card.receive_from_wire(&frame(len, number));
        let received = rig.harvest().expect("a frame");
        assert_eq!((received.bytes, received.descriptors), (frame(len, number), 1));
        rig.post_rx(1);
    }
    assert_eq!(rig.card.read32(regs::GPRC), 100);
    assert_eq!(rig.card.read32(regs::GPRC), 0, "cleared by reading");
    rig.log.assert_clean();
}

#[test]
fn the_frame_limit_is_rlpml_and_an_oversize_frame_is_dropped_whole() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(4);
    rig.card.receive_from_wire(&frame(1519, 1));
    assert!(rig.harvest().is_none());
    assert_eq!(rig.memory.get(GUEST, 2048), vec![0; 2048], "not a byte of it");
    rig.card.receive_from_wire(&frame(1518, 2));
    assert_eq!(rig.harvest().expect("a frame").bytes.len(), 1518);
    assert_eq!(rig.card.read32(regs::ROC), 1);
    rig.log.assert_clean();
}

#[test]
fn without_lpe_the_limit_is_1518_with_crc_and_4_more_for_a_tag() {
    let mut rig = Rig::running(Options::default());
    rig.card.write32(regs::RCTL, RCTL & !Rctl::LPE.bits());
    rig.post_rx(8);
    let tagged = |len| {
        let mut frame = frame(len, 3);
        frame[12..14].copy_from_slice(&[0x81, 0x00]);
        frame
    };
    for (frame, arrives) in [
        (frame(1514, 1), true),
        (frame(1515, 1), false),
        (tagged(1518), true),
        (tagged(1519), false),
    ] {
        rig.card.receive_from_wire(&frame);
        assert_eq!(
            rig.harvest().map(|received| received.bytes),
            arrives.then_some(frame)
        );
    }
    rig.log.assert_clean();
}

#[test]
fn without_crc_strip_four_bytes_follow_the_frame() {
    let mut rig = Rig::running(Options::default());
    rig.card.write32(regs::RCTL, RCTL & !Rctl::SECRC.bits());
    rig.post_rx(1);
    rig.card.receive_from_wire(&[0xFF; 20]);
    let received = rig.harvest().expect("a frame");
    assert_eq!(received.bytes.len(), 64, "padded to 60 first");
    assert_ne!(received.bytes[60..], [0; 4]);
    rig.log.assert_clean();

    let mut qemu = Rig::running(QEMU);
    qemu.card.write32(regs::RCTL, RCTL & !Rctl::SECRC.bits());
    qemu.post_rx(1);
    qemu.card.receive_from_wire(&frame(60, 1));
    assert_eq!(qemu.harvest().expect("a frame").bytes[60..], [0; 4]);
    qemu.log.assert_clean();
}

#[test]
fn a_frame_longer_than_the_buffers_spans_descriptors_with_eop_on_the_last() {
    let mut rig = Rig::cold(Options::default());
    rig.enable_pci();
    rig.reset_port();
    rig.start_link();
    rig.set_up_rx_with_split(0x8200_0001);
    rig.post_rx(4);
    rig.card.receive_from_wire(&frame(1514, 1));
    let received = rig.harvest().expect("a frame");
    assert_eq!((received.bytes, received.descriptors), (frame(1514, 1), 2));
    assert_eq!(rig.descriptor(RX_RING, 0)[3], 1024);
    assert_eq!(rig.descriptor(RX_RING, 0)[2], 1, "DD alone");
    assert_eq!(rig.descriptor(RX_RING, 1)[3], 490);
    rig.log.assert_clean();
}

#[test]
fn address_filters_let_in_what_they_should() {
    let mut rig = Rig::running(Options::default());
    rig.card
        .write32(regs::RCTL, RCTL & !(Rctl::UPE | Rctl::MPE).bits());
    rig.post_rx(8);
    let to = |address: [u8; 6]| {
        let mut frame = frame(60, 1);
        frame[..6].copy_from_slice(&address);
        frame
    };
    let multicast = [0x01, 0x00, 0x5E, 0x00, 0x00, 0xFB];
    rig.card.receive_from_wire(&to([2, 2, 2, 2, 2, 2]));
    rig.card.receive_from_wire(&to(multicast));
    assert_eq!(rig.card.counters().dropped_filtered, 2);
    // Bits 47:36 of the address with RCTL 13:12 = 0: 0xFB00 >> 4.
    rig.card.write32(regs::MTA + 4 * (0xFB0 >> 5), 1 << (0xFB0 & 31));
    for frame in [frame(60, 1), to([0xFF; 6]), to(multicast)] {
        rig.card.receive_from_wire(&frame);
        assert_eq!(rig.harvest().expect("a frame").bytes, frame);
    }
    rig.log.assert_clean();
}

#[test]
fn checksum_status_tells_good_from_bad() {
    const L4CS: u32 = 1 << 5;
    const L4E: u32 = 1 << 29;
    let mut rig = Rig::running(Options::default());
    rig.post_rx(3);
    let good = udp_frame(b"some payload that needs no padding");
    rig.card.receive_from_wire(&good);
    let received = rig.harvest().expect("a frame");
    assert_eq!(received.status & (L4CS | L4E), L4CS);
    assert_eq!(received.types, 1 << 4 | 1 << 9, "IPv4 and UDP, no RSS");
    let mut bad = good;
    bad[45] ^= 0x55;
    rig.card.receive_from_wire(&bad);
    assert_eq!(rig.harvest().expect("a frame").status & (L4CS | L4E), L4CS | L4E);
    rig.card.receive_from_wire(&frame(60, 1));
    assert_eq!(
        rig.harvest().expect("a frame").status,
        3,
        "not IP: DD and EOP alone"
    );
    rig.log.assert_clean();
}

#[test]
fn rss_spreads_flows_and_reports_the_hash() {
    let mut rig = Rig::running(Options::default());
    rig.set_up_second_rx_queue();
    rig.card.write32(regs::MRQC, 2 | 1 << 22);
    for entry in 0..32 {
        rig.card.write32(regs::RETA + 4 * entry, 0x0101_0101);
    }
    rig.card.write32(regs::RSSRK, 0xDA56_5A6D);
    rig.post_rx(1);
    rig.card.receive_from_wire(&udp_frame(b"hashed"));
    assert!(rig.harvest().is_none(), "it went to queue 1");
    let [types, hash, status, _] = rig.descriptor(RX_RING + 0x1000, 0);
    assert_eq!((types & 0xF, status & 1), (7, 1));
    assert_ne!(hash, 0);
    rig.card.receive_from_wire(&frame(60, 1));
    assert!(rig.harvest().is_some(), "what RSS does not cover goes to queue 0");
    rig.log.assert_clean();
}

#[test]
fn without_descriptors_a_frame_waits_or_drops_as_drop_en_says() {
    let mut rig = Rig::running(Options::default());
    assert!(!rig.card.can_receive());
    rig.card.receive_from_wire(&frame(60, 1));
    assert_eq!(rig.card.read32(regs::RX_QUEUES + 0x30), 1, "RQDPC");
    assert_eq!(rig.card.read32(regs::RNBC), 1);

    let mut patient = Rig::cold(Options::default());
    patient.enable_pci();
    patient.reset_port();
    patient.start_link();
    patient.set_up_rx_with_split(0x0200_0002);
    patient.card.receive_from_wire(&frame(60, 2));
    patient.post_rx(1);
    assert_eq!(patient.harvest().expect("it waited").bytes, frame(60, 2));
    for _ in 0..1100 {
        patient.card.receive_from_wire(&frame(60, 3));
    }
    let missed = patient.card.read32(regs::MPC);
    assert_eq!(missed, 1100 - 65536 / 60, "what 64 KiB cannot hold");
    rig.log.assert_clean();
    patient.log.assert_clean();
}

#[test]
fn a_sent_frame_leaves_whole_and_is_reported() {
    let mut rig = Rig::running(Options::default());
    for number in 0..40_u8 {
        let slot = rig.send(&frame(1514, number));
        assert!(rig.tx_done(slot));
        assert_eq!(rig.sent(), [frame(1514, number)]);
    }
    let [low, high, _, status] = rig.descriptor(TX_RING, 0);
    assert_eq!((low, high), (0xD0D0_D0D0, 0xD0D0_D0D0), "the address is gone");
    assert_eq!(status, 1514 << 14 | 1, "PAYLEN is not");
    assert_eq!(rig.card.read32(regs::GPTC), 40);
    rig.log.assert_clean();
}

#[test]
fn a_short_frame_is_padded_with_zeros() {
    let mut rig = Rig::running(Options::default());
    rig.send(&frame(20, 1));
    let mut padded = frame(20, 1);
    padded.resize(60, 0);
    assert_eq!(rig.sent(), [padded]);
    rig.log.assert_clean();
}

#[test]
fn a_frame_in_pieces_goes_out_when_its_end_is_posted() {
    let mut rig = Rig::running(Options::default());
    let whole = frame(1000, 7);
    rig.memory.put(TX_BUFFERS, &whole);
    let piece = WHOLE_FRAME & !(1 << 24 | 1 << 27);
    rig.write_tx_descriptor(TX_BUFFERS, piece | 14, 1000 << 14);
    rig.write_tx_descriptor(TX_BUFFERS + 14, piece | 500, 0);
    rig.ring_tx();
    assert!(rig.sent().is_empty());
    rig.write_tx_descriptor(TX_BUFFERS + 514, WHOLE_FRAME | 486, 0);
    rig.ring_tx();
    assert_eq!(rig.sent(), [whole]);
    assert!(
        !rig.tx_done(0) && !rig.tx_done(1) && rig.tx_done(2),
        "RS was on the last alone"
    );
    rig.log.assert_clean();
}

#[test]
fn a_checksum_is_inserted_from_the_seed_in_the_frame() {
    let good = udp_frame(b"payload to be summed");
    let mut seeded = good.clone();
    // The pseudo-header: addresses, protocol 17, UDP length 28.
    let seed: u16 = [0x0A00, 0x0001, 0x0A00, 0x0002, 17, 28].iter().sum();
    seeded[40..42].copy_from_slice(&seed.to_be_bytes());
    let mut rig = Rig::running(Options::default());
    rig.write_tx_context(14, 20, 0, 0, 0);
    rig.send_with(&seeded, WHOLE_FRAME, 1 << 9);
    let mut padded = good;
    padded.resize(padded.len().max(60), 0);
    assert_eq!(rig.sent(), [padded]);
    assert_eq!(
        rig.memory.get(TX_BUFFERS + 2048, 62),
        seeded,
        "the guest's copy is untouched"
    );
    rig.log.assert_clean();
}

#[test]
fn head_write_back_stores_the_index_instead_of_done_bits() {
    let mut rig = Rig::running(Options::default());
    rig.card.write32(regs::TX_QUEUES + 0x38, 0x10_F001);
    let slot = rig.send(&frame(60, 1));
    assert!(!rig.tx_done(slot));
    assert_eq!(rig.memory.get(0x10_F000, 4), 1_u32.to_le_bytes());
    rig.log.assert_clean();
}

#[test]
fn frames_and_sends_raise_their_vector() {
    let mut rig = Rig::running(Options::default());
    rig.set_up_interrupts();
    let eventfd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    rig.card
        .set_irq(0, Some(Box::new(eventfd.try_clone().expect("a second handle"))));
    rig.post_rx(2);
    rig.card.receive_from_wire(&frame(60, 1));
    rig.send(&frame(60, 1));
    assert_eq!(eventfd.read().expect("messages"), 2);
    rig.send_with(&frame(60, 1), WHOLE_FRAME & !(1 << 27), 0);
    assert!(eventfd.read().is_err(), "without RS no message");
    rig.card.write32(regs::EITR, 100 << 2);
    rig.card.receive_from_wire(&frame(60, 2));
    rig.send(&frame(60, 2));
    assert_eq!(eventfd.read().expect("the first"), 1);
    rig.card.advance(Duration::from_micros(100));
    assert_eq!(eventfd.read().expect("the second, late"), 1);
    rig.log.assert_clean();
}

#[test]
fn a_queue_that_was_disabled_starts_over_at_slot_0_and_forgets_its_buffers() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(5);
    rig.card.receive_from_wire(&frame(60, 1));
    rig.harvest().expect("a frame");
    rig.card.write32(regs::RX_QUEUES + 0x28, 0x0001_0808);
    rig.poll(regs::RX_QUEUES + 0x28, regs::QUEUE_ENABLE, 0);
    rig.card.note_unmapped(GUEST, 0x1000);
    rig.card.receive_from_wire(&frame(60, 2));
    assert_eq!(rig.card.counters().dropped_queue_off, 1);
    rig.set_up_rx();
    rig.post_rx(1);
    rig.card.receive_from_wire(&frame(60, 3));
    assert_eq!(rig.harvest().expect("a frame, in slot 0").bytes, frame(60, 3));
    rig.log.assert_clean();
}
