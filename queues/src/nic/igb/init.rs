//! Bring-up: from whatever state the card is in to queues that can be started.
//!
//! Read with: Intel 82576EB datasheet §4.5 (initialization), §4.2.1 (reset); Linux `igb_reset_hw_82575`.

use std::time::Duration;

use super::card::Card;
use super::regs::{
    ADDRESS_VALID, CTRL_EXT_DRIVER_LOADED, Ctrl, EECD_AUTO_READ_DONE, PoolOffload, QueueReg,
    RFCTL_IPV6_EX_DISABLE, RXCSUM_ALL, Rctl, Reg, Status, TCTL_PAD, TCTL_RUN,
};
use crate::nic::NicError;

const MASTER_BOUND: Duration = Duration::from_millis(80);
const NVM_BOUND: Duration = Duration::from_millis(10);
const FLUSH: Duration = Duration::from_millis(10);

/// Resets the card by its own register and leaves it quiet: no queue runs, no interrupt comes.
pub(super) fn reset(card: &Card) -> Result<(), NicError> {
    card.check_present()?;
    card.set(Reg::CTRL, Ctrl::MASTER_DISABLE.bits());
    let quiet = card.wait(MASTER_BOUND, &mut || {
        card.read(Reg::STATUS) & Status::MASTER_ENABLED.bits() == 0
    });
    if !quiet {
        tracing::debug!(
            card = card.name(),
            "requests still pending at reset, going on as the datasheet says"
        );
    }
    mask_all(card);
    card.write(Reg::RCTL, 0);
    card.write(Reg::TCTL, TCTL_PAD);
    card.read(Reg::STATUS);
    card.sleep(FLUSH);

    card.set(Reg::CTRL, Ctrl::RESET.bits());
    card.sleep(Duration::from_millis(card.family().reset_quiet_ms()));
    card.check_present()?;
    // No error if it does not come: some boards have no NVM, and QEMU's model never shows it.
    let loaded = card.wait(NVM_BOUND, &mut || card.read(Reg::EECD) & EECD_AUTO_READ_DONE != 0);
    if !loaded {
        tracing::info!(
            card = card.name(),
            "no NVM auto-read: taken for an emulated card, tx segments are cut at pages"
        );
    }
    card.set_emulated(!loaded);
    mask_all(card);
    card.read(Reg::ICR);
    card.set(Reg::CTRL_EXT, CTRL_EXT_DRIVER_LOADED);
    // Queue 0 comes out of reset enabled.
    card.write(QueueReg::CONTROL.rx(0), 0);
    card.write(QueueReg::CONTROL.tx(0), 0);
    Ok(())
}

fn mask_all(card: &Card) {
    card.write(Reg::IMC, u32::MAX);
    card.write(Reg::EIMC, u32::MAX);
}

/// Filters, bounds and units, so that a queue that is started receives and transmits.
pub(super) fn configure(card: &Card) {
    let bound = card.bound();
    for word in Reg::filter_tables() {
        card.write(word, 0);
    }
    card.write(Reg::WUC, 0);
    card.spread().configure(card);
    card.write(Reg::RXCSUM, RXCSUM_ALL);
    card.set(Reg::RFCTL, RFCTL_IPV6_EX_DISABLE);
    card.write(Reg::RLPML, bound.on_wire);
    let pool = PoolOffload::LONG_PACKETS
        | PoolOffload::ACCEPT_UNTAGGED
        | PoolOffload::BROADCAST
        | PoolOffload::STRIP_CRC;
    card.write(Reg::pool_offload(0), pool.bits() | bound.on_wire);
    card.write(Reg::TCTL, TCTL_RUN);
    // The guest chooses its address and the groups it listens to, and tells nobody here: everything comes in.
    let receive = Rctl::ENABLE
        | Rctl::LONG_PACKETS
        | Rctl::BROADCAST
        | Rctl::STRIP_CRC
        | Rctl::UNICAST_PROMISCUOUS
        | Rctl::MULTICAST_PROMISCUOUS;
    card.write(Reg::RCTL, receive.bits());
}

/// The card's own address, if it has one.
pub(super) fn mac(card: &Card) -> Option<[u8; 6]> {
    let high = card.read(Reg::receive_address_high(0));
    let [a, b, c, d] = card.read(Reg::receive_address_low(0)).to_le_bytes();
    let [e, f, _, _] = high.to_le_bytes();
    (high & ADDRESS_VALID != 0 && high != u32::MAX).then_some([a, b, c, d, e, f])
}

/// The end of our use: nothing runs, the firmware may have the card.
pub(super) fn release(card: &Card) {
    mask_all(card);
    card.write(Reg::RCTL, 0);
    card.write(Reg::TCTL, TCTL_PAD);
    let ext = card.read(Reg::CTRL_EXT);
    card.write(Reg::CTRL_EXT, ext & !CTRL_EXT_DRIVER_LOADED);
}
