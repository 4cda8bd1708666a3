//! What the card suffers at a test's hand.

use std::time::Duration;

use tests::card::Options;
use tests::card::faults::Delay;
use tests::card::regs;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{GUEST, RX0, Rig, frame};

#[test]
fn completions_wait_for_time_or_for_steps() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(4);
    rig.card.set_delay(Delay::After(Duration::from_millis(3)));
    rig.card.receive_from_wire(&frame(60, 1));
    let slot = rig.send(&frame(60, 2));
    assert_eq!(rig.card.next_deadline(), Some(Duration::from_millis(3)));
    rig.card.advance(Duration::from_millis(2));
    assert!(rig.harvest().is_none() && !rig.tx_done(slot));
    rig.card.advance(Duration::from_millis(1));
    assert!(rig.harvest().is_some() && rig.tx_done(slot));

    rig.card.set_delay(Delay::UntilStepped);
    rig.card.step(5);
    rig.card.receive_from_wire(&frame(60, 3));
    rig.card.receive_from_wire(&frame(60, 4));
    rig.card.advance(Duration::from_secs(9));
    assert!(rig.harvest().is_none());
    rig.card.step(1);
    assert!(rig.harvest().is_some() && rig.harvest().is_none());
    rig.card.step(1);
    assert!(rig.harvest().is_some());
    rig.log.assert_clean();
}

#[test]
fn a_queue_being_disabled_may_still_store_what_waited() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(4);
    rig.card.set_delay(Delay::UntilStepped);
    rig.card.receive_from_wire(&frame(60, 1));
    rig.card.write32(regs::RX_QUEUES + 0x28, 0);
    rig.card.step(1);
    assert!(rig.harvest().is_some(), "b25 was not seen to read 0 yet");
    rig.card.receive_from_wire(&frame(60, 2));
    assert_eq!(rig.card.counters().dropped_queue_off, 1);
    rig.log.assert_clean();
}

#[test]
fn a_transmit_queue_with_frames_in_it_does_not_stop_until_they_are_out() {
    let mut rig = Rig::running(Options::default());
    rig.card.set_delay(Delay::UntilStepped);
    rig.send(&frame(60, 1));
    rig.card.write32(regs::TX_QUEUES + 0x28, 0);
    for _ in 0..10 {
        assert_ne!(rig.card.read32(regs::TX_QUEUES + 0x28) & regs::QUEUE_ENABLE, 0);
    }
    rig.card.step(1);
    rig.poll(regs::TX_QUEUES + 0x28, regs::QUEUE_ENABLE, 0);
    assert_eq!(rig.sent().len(), 1);
    rig.log.assert_clean();
}

#[test]
fn a_wedged_queue_goes_on_until_a_reset() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(4);
    rig.card.wedge(RX0);
    rig.card.write32(regs::RX_QUEUES + 0x28, 0);
    for _ in 0..10 {
        assert_ne!(rig.card.read32(regs::RX_QUEUES + 0x28) & regs::QUEUE_ENABLE, 0);
    }
    rig.card.receive_from_wire(&frame(60, 1));
    assert!(rig.harvest().is_some(), "it still writes to memory");
    rig.reset_port();
    rig.card.note_unmapped(GUEST, 0x1_0000);
    assert_eq!(rig.card.read32(regs::RX_QUEUES + 0x28) & regs::QUEUE_ENABLE, 0);
    rig.log.assert_clean();
}

#[test]
fn a_hanging_transmitter_completes_nothing_and_without_a_link_nothing_leaves_either() {
    let mut rig = Rig::running(Options::default());
    rig.card.hang_tx(true);
    let slot = rig.send(&frame(60, 1));
    assert!(!rig.tx_done(slot));
    assert_eq!(rig.card.read32(regs::TX_QUEUES + 0x10), 0, "TDH stands");
    rig.card.hang_tx(false);
    assert!(rig.tx_done(slot));

    rig.card.set_link(false);
    let slot = rig.send(&frame(60, 2));
    assert!(!rig.tx_done(slot));
    rig.card.set_link(true);
    rig.card.advance(Duration::from_millis(500));
    assert!(rig.tx_done(slot));
    assert_eq!(rig.sent().len(), 2);
    rig.log.assert_clean();
}

#[test]
fn a_removed_card_reads_ones_and_touches_nothing() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(4);
    rig.card.set_removed(true);
    assert_eq!(rig.card.read32(regs::STATUS), u32::MAX);
    let mut id = [0; 4];
    rig.card.config_read(0, &mut id);
    assert_eq!(id, [0xFF; 4]);
    rig.card.receive_from_wire(&frame(60, 1));
    assert!(rig.harvest().is_none());
    rig.card.set_removed(false);
    rig.bring_up();
    rig.send(&frame(60, 1));
    assert_eq!(rig.sent().len(), 1);
    rig.log.assert_clean();
}

#[test]
fn frames_and_interrupts_can_get_lost() {
    let mut rig = Rig::running(Options::default());
    rig.set_up_interrupts();
    let eventfd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    rig.card
        .set_irq(0, Some(Box::new(eventfd.try_clone().expect("a second handle"))));
    rig.post_rx(4);
    rig.card.drop_next(1);
    rig.card.receive_from_wire(&frame(60, 1));
    assert!(rig.harvest().is_none());
    rig.card.lose_interrupts(1);
    rig.card.receive_from_wire(&frame(60, 2));
    assert!(rig.harvest().is_some() && eventfd.read().is_err());
    rig.card.receive_from_wire(&frame(60, 3));
    assert!(rig.harvest().is_some() && eventfd.read().is_ok());
    rig.log.assert_clean();
}

#[test]
fn scribbling_stays_within_what_the_card_may_ever_write() {
    let mut rig = Rig::running(Options {
        scribble: true,
        ..Options::default()
    });
    rig.post_rx(1);
    let buffer = rig.memory.get(GUEST, 2048);
    assert!(
        buffer[..1518].iter().all(|byte| *byte == 0xA5),
        "at once, before any frame"
    );
    assert!(
        buffer[1518..].iter().all(|byte| *byte == 0),
        "RLPML 1522 less the CRC"
    );
    rig.card.receive_from_wire(&frame(60, 1));
    assert_eq!(rig.harvest().expect("a frame").bytes, frame(60, 1));
    rig.log.assert_clean();
}

#[test]
fn violations_survive_the_card_and_fail_a_test_that_does_not_look() {
    let mut rig = Rig::running(Options::default());
    rig.card.write32(3, 0);
    let Rig { card, log, .. } = rig;
    drop(card);
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(log)));
    let message = dropped.expect_err("nobody looked");
    let message = message.downcast_ref::<String>().expect("a formatted message");
    assert!(message.contains("0x3"), "{message}");
}

#[test]
fn silicon_starts_over_at_slot_0_when_a_queue_is_enabled_again() {
    let mut rig = Rig::running(Options::default());
    rig.send(&frame(60, 1));
    rig.card.write32(regs::TX_QUEUES + 0x28, 0);
    rig.poll(regs::TX_QUEUES + 0x28, regs::QUEUE_ENABLE, 0);
    rig.card.write32(regs::TX_QUEUES + 0x28, regs::QUEUE_ENABLE);
    assert_eq!(rig.card.read32(regs::TX_QUEUES + 0x10), 0);
    assert_eq!(rig.card.read32(regs::TX_QUEUES + 0x18), 0);
    rig.log.assert_clean();
}

#[test]
fn qemu_keeps_head_and_tail_and_completes_without_a_link() {
    let quirks = tests::card::Quirks { qemu: true };
    let mut rig = Rig::running(Options {
        quirks,
        ..Options::default()
    });
    rig.card.set_link(false);
    let slot = rig.send(&frame(60, 1));
    assert!(rig.tx_done(slot));
    assert!(rig.sent().is_empty());
    rig.card.write32(regs::TX_QUEUES + 0x28, 0);
    rig.poll(regs::TX_QUEUES + 0x28, regs::QUEUE_ENABLE, 0);
    rig.card.write32(regs::TX_QUEUES + 0x28, regs::QUEUE_ENABLE);
    assert_eq!(rig.card.read32(regs::TX_QUEUES + 0x10), 1);
    rig.log.assert_clean();
}
