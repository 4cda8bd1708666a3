//! The link: asking the PHY to negotiate, and what came of it.
//!
//! Read with: Intel 82576EB datasheet §3.5.7 (PHY), §8.2.4 (MDIC); IEEE 802.3 clause 22.

use std::time::Duration;

use super::card::Card;
use super::regs::{Ctrl, PHPM_GO_LINK_DOWN, Reg, Status, mdic};
use crate::nic::Link;

const MDIC_BOUND: Duration = Duration::from_millis(10);
const SEMAPHORE_BOUND: Duration = Duration::from_millis(100);
const SMBI: u32 = 1 << 0;
const SWESMBI: u32 = 1 << 1;
const PHY0: u32 = 1 << 1;
const FIRMWARE: u32 = 16;

/// Starts autonegotiation. The link comes up seconds later on real cables, after half a second in QEMU.
pub(super) fn bring_up(card: &Card) {
    let ctrl = Ctrl::from_bits_retain(card.read(Reg::CTRL));
    let forced = Ctrl::FORCE_SPEED
        | Ctrl::FORCE_DUPLEX
        | Ctrl::VLAN_STRIP
        | Ctrl::RX_FLOW_CONTROL
        | Ctrl::TX_FLOW_CONTROL;
    card.write(Reg::CTRL, ((ctrl | Ctrl::SET_LINK_UP) - forced).bits());
    if card.family().has_phy_power_management() {
        card.write(Reg::PHPM, card.read(Reg::PHPM) & !PHPM_GO_LINK_DOWN);
    }
    let held = take_phy(card);
    if !held {
        tracing::warn!(
            card = card.name(),
            "firmware keeps the PHY, going on without the semaphore"
        );
    }
    // Without its restart the link of an emulated card never comes up after a reset.
    match phy_read(card, mdic::BMCR) {
        Some(control) => phy_write(
            card,
            mdic::BMCR,
            control & !mdic::BMCR_POWER_DOWN | mdic::BMCR_AUTONEG,
        ),
        None => tracing::warn!(
            card = card.name(),
            "the PHY does not answer, the link may stay down"
        ),
    }
    if held {
        give_phy(card);
    }
}

/// The link as the card has it now.
pub(super) fn read(card: &Card) -> Link {
    let raw = card.read(Reg::STATUS);
    let status = Status::from_bits_retain(raw);
    if raw == u32::MAX || !status.contains(Status::LINK_UP) {
        return Link::Down;
    }
    let mbps = if status.contains(Status::SPEED_1000) {
        1000
    } else if status.contains(Status::SPEED_100) {
        100
    } else {
        10
    };
    Link::Up { mbps }
}

fn phy_read(card: &Card, register: u32) -> Option<u32> {
    command(card, mdic::READ | mdic::at(card.family().phy_address(), register)).map(|answer| answer & 0xffff)
}

fn phy_write(card: &Card, register: u32, value: u32) {
    if command(
        card,
        mdic::WRITE | mdic::at(card.family().phy_address(), register) | value,
    )
    .is_none()
    {
        tracing::warn!(card = card.name(), register, "a PHY write failed");
    }
}

fn command(card: &Card, command: u32) -> Option<u32> {
    card.write(Reg::MDIC, command);
    let mut answer = 0;
    let came = card.wait(MDIC_BOUND, &mut || {
        answer = card.read(Reg::MDIC);
        answer & mdic::READY != 0
    });
    (came && answer & mdic::ERROR == 0 && answer != u32::MAX).then_some(answer)
}

/// Takes the PHY from the firmware (§4.6.12). Bounded; a card whose firmware never lets go is used all the same.
fn take_phy(card: &Card) -> bool {
    card.wait(SEMAPHORE_BOUND, &mut || {
        if !lock_sync(card) {
            return false;
        }
        let owners = card.read(Reg::SW_FW_SYNC);
        let free = owners & (PHY0 | PHY0 << FIRMWARE) == 0;
        if free {
            card.write(Reg::SW_FW_SYNC, owners | PHY0);
        }
        unlock_sync(card);
        free
    })
}

fn give_phy(card: &Card) {
    if card.wait(SEMAPHORE_BOUND, &mut || lock_sync(card)) {
        card.write(Reg::SW_FW_SYNC, card.read(Reg::SW_FW_SYNC) & !PHY0);
        unlock_sync(card);
    }
}

/// SMBI reads as 0 to the one who gets it; SWESMBI is held by the one who reads back the 1 it wrote (§8.4.2).
fn lock_sync(card: &Card) -> bool {
    if card.read(Reg::SWSM) & SMBI != 0 {
        return false;
    }
    card.set(Reg::SWSM, SWESMBI);
    let held = card.read(Reg::SWSM) & SWESMBI != 0;
    if !held {
        unlock_sync(card);
    }
    held
}

fn unlock_sync(card: &Card) {
    card.write(Reg::SWSM, card.read(Reg::SWSM) & !(SMBI | SWESMBI));
}
