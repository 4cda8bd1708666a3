//! From power-on to link, and back.

use std::time::Duration;

use tests::card::regs::{self, Cause, Ctrl, Status};
use tests::card::{Options, Quirks};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{MAC, Rig, frame};

fn link_up(rig: &mut Rig) -> bool {
    rig.card.read32(regs::STATUS) & Status::LU.bits() != 0
}

fn counted(rig: &mut Rig, vector: u8) -> EventFd {
    let eventfd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    rig.card.set_irq(
        vector,
        Some(Box::new(eventfd.try_clone().expect("a second handle"))),
    );
    eventfd
}

#[test]
fn slu_alone_never_brings_the_link_up_and_autonegotiation_takes_half_a_second() {
    let mut rig = Rig::cold(Options::default());
    rig.enable_pci();
    rig.reset_port();
    rig.set_bits(regs::CTRL, Ctrl::SLU.bits());
    rig.card.advance(Duration::from_secs(10));
    assert!(!link_up(&mut rig));
    rig.write_phy(0, 0x1000);
    rig.card.advance(Duration::from_secs(10));
    assert!(!link_up(&mut rig), "enabled, but not restarted");
    rig.write_phy(0, 0x1200);
    rig.card.advance(Duration::from_millis(499));
    assert!(!link_up(&mut rig));
    assert_eq!(rig.card.next_deadline(), Some(Duration::from_millis(1)));
    rig.card.advance(Duration::from_millis(1));
    assert!(link_up(&mut rig));
    rig.log.assert_clean();
}

#[test]
fn another_phy_address_answers_with_an_error() {
    let mut rig = Rig::cold(Options::default());
    rig.enable_pci();
    rig.card.write32(regs::MDIC, 1 << 27 | 2 << 21 | 2 << 16);
    rig.poll(regs::MDIC, 3 << 28, 1 << 28);
    assert_eq!(rig.card.read32(regs::MDIC) >> 30 & 1, 1);
    rig.card.write32(regs::MDIC, 1 << 27 | 1 << 21 | 2 << 16);
    rig.poll(regs::MDIC, 0xFFFF, 0x02A8);
    rig.log.assert_clean();
}

#[test]
fn the_address_is_in_the_filter_and_in_the_nvm_with_its_checksum() {
    let mut rig = Rig::cold(Options::default());
    rig.enable_pci();
    assert_eq!(rig.card.read32(regs::RAL).to_le_bytes(), MAC[..4]);
    assert_eq!(rig.card.read32(regs::RAH), 0x8000_5634);
    let words: Vec<u16> = (0..64)
        .map(|word| {
            rig.card.write32(regs::EERD, 1 | word << 2);
            rig.poll(regs::EERD, 2, 2);
            (rig.card.read32(regs::EERD) >> 16) as u16
        })
        .collect();
    assert_eq!(words[0].to_le_bytes(), MAC[..2]);
    assert_eq!(
        words.iter().fold(0_u16, |sum, word| sum.wrapping_add(*word)),
        0xBABA
    );
    rig.log.assert_clean();
}

#[test]
fn the_software_semaphore_is_taken_by_reading_it() {
    let mut rig = Rig::cold(Options::default());
    rig.enable_pci();
    assert_eq!(rig.card.read32(regs::SWSM) & 1, 0);
    assert_eq!(rig.card.read32(regs::SWSM) & 1, 1);
    rig.card.write32(regs::SWSM, 2);
    assert_eq!(rig.card.read32(regs::SWSM), 2);
    rig.log.assert_clean();
}

#[test]
fn queue_0_comes_out_of_reset_enabled_and_master_disable_shows_in_status() {
    let mut rig = Rig::cold(Options::default());
    rig.enable_pci();
    assert_eq!(rig.card.read32(regs::RX_QUEUES + 0x28), regs::QUEUE_ENABLE);
    assert_eq!(rig.card.read32(regs::TX_QUEUES + 0x28), regs::QUEUE_ENABLE);
    assert_eq!(rig.card.read32(regs::RX_QUEUES + 0x68), 0);
    rig.set_bits(regs::CTRL, Ctrl::GIO_MASTER_DISABLE.bits());
    assert_eq!(
        rig.card.read32(regs::STATUS) & Status::GIO_MASTER_ENABLE.bits(),
        0
    );
    rig.set_bits(regs::CTRL, Ctrl::RST.bits());
    assert_ne!(
        rig.card.read32(regs::STATUS) & Status::GIO_MASTER_ENABLE.bits(),
        0
    );
    rig.log.assert_clean();
}

#[test]
fn the_phy_keeps_its_link_over_a_port_reset_but_not_in_qemu_and_not_over_a_function_reset() {
    let mut silicon = Rig::running(Options::default());
    silicon.reset_port();
    assert!(!link_up(&mut silicon));
    silicon.set_bits(regs::CTRL, Ctrl::SLU.bits());
    assert!(link_up(&mut silicon));

    let mut qemu = Rig::running(Options {
        quirks: Quirks { qemu: true },
        ..Options::default()
    });
    qemu.reset_port();
    qemu.set_bits(regs::CTRL, Ctrl::SLU.bits());
    assert!(!link_up(&mut qemu));

    silicon.card.reset();
    silicon.enable_pci();
    silicon.set_bits(regs::CTRL, Ctrl::SLU.bits());
    silicon.card.advance(Duration::from_secs(1));
    assert!(!link_up(&mut silicon));
    silicon.log.assert_clean();
}

#[test]
fn pulling_the_cable_and_putting_it_back_each_tell_the_driver() {
    let mut rig = Rig::running(Options::default());
    rig.set_up_interrupts();
    let changes = counted(&mut rig, 1);
    rig.card.set_link(false);
    assert_eq!(changes.read().expect("one message"), 1);
    assert!(!link_up(&mut rig));
    assert_eq!(rig.card.read32(regs::ICR) & Cause::LSC.bits(), Cause::LSC.bits());
    rig.card.receive_from_wire(&frame(60, 1));
    assert_eq!(rig.card.counters().dropped_no_link, 1);
    rig.card.set_link(true);
    rig.card.advance(Duration::from_millis(500));
    assert_eq!(changes.read().expect("one message"), 1);
    assert!(link_up(&mut rig));
    rig.log.assert_clean();
}

#[test]
fn a_function_reset_through_config_space_leaves_nothing_running() {
    let mut rig = Rig::running(Options::default());
    rig.post_rx(4);
    rig.card.config_write(0xA8, &[0x10, 0xA8]);
    let mut command = [0; 2];
    rig.card.config_read(4, &mut command);
    assert_eq!(command, [0, 0]);
    rig.card.receive_from_wire(&frame(60, 1));
    rig.enable_pci();
    assert_eq!(rig.card.read32(regs::RX_QUEUES), 0);
    assert_eq!(rig.card.read32(regs::RCTL), 0);
    rig.bring_up();
    rig.post_rx(1);
    rig.card.receive_from_wire(&frame(60, 2));
    assert_eq!(rig.harvest().expect("a frame").bytes, frame(60, 2));
    rig.log.assert_clean();
}
