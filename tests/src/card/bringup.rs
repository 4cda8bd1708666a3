//! Device control: reset, NVM, semaphores, the way to the PHY, link state.
//!
//! Choices: a poll for EERD or MDIC fails once before it succeeds. CTRL.RST acts at once, resets queues,
//! filters and interrupts, and keeps RXPBS, TXPBS and the PHY (QEMU: resets the PHY, keeps EITR). STATUS.LU
//! needs both CTRL.SLU and the PHY's link; SLU alone does nothing. EECD shows AUTO_RD at once (QEMU: never).
//!
//! Read with: igb.md §2; the 82576 datasheet's chapters on initialization and NVM.

use std::time::Duration;

use super::regs::{self, Cause, Ctrl, Rctl, Status, Tctl};
use super::rx::RxQueue;
use super::tx::TxQueue;
use super::violations::Violation;
use super::{Card82576, QUEUES, phy};

const NVM_WORDS: usize = 64;
const EERD_START: u32 = 1 << 0;
const EERD_DONE: u32 = 1 << 1;
const MDIC_WRITE: u32 = 1 << 26;
const MDIC_READ: u32 = 1 << 27;
const MDIC_READY: u32 = 1 << 28;
const MDIC_INTERRUPT: u32 = 1 << 29;
const MDIC_ERROR: u32 = 1 << 30;
const SWSM_SMBI: u32 = 1 << 0;
const SWSM_SWESMBI: u32 = 1 << 1;
const MRQC_MODE: u32 = 7;
const MRQC_RSS: u32 = 2;
const VT_CTL: u32 = 0x581C;

pub(super) struct BringUp {
    pub(super) ctrl: Ctrl,
    /// When CTRL.RST was last written.
    pub(super) reset_at: Option<Duration>,
    pub(super) link_up: bool,
    phy_was_reset: bool,
    nvm: [u16; NVM_WORDS],
    eerd: Slow,
    mdic: Slow,
    swsm: u32,
    sw_fw_sync: u32,
}

/// A register that shows the end of an operation only when it was read often enough.
#[derive(Clone, Copy, Default)]
struct Slow {
    polls: u32,
    value: u32,
}

impl Slow {
    /// Reads the value, without the `done` bits while the operation still runs.
    fn read(&mut self, done: u32) -> u32 {
        match self.polls.checked_sub(1) {
            Some(left) => {
                self.polls = left;
                self.value & !done
            }
            None => self.value,
        }
    }
}

impl BringUp {
    pub(super) fn new(mac: [u8; 6]) -> Self {
        let mut nvm = [0_u16; NVM_WORDS];
        for (word, pair) in nvm.iter_mut().zip(mac.chunks_exact(2)) {
            *word = u16::from_le_bytes([pair[0], pair[1]]);
        }
        let sum = nvm.iter().fold(0_u16, |sum, word| sum.wrapping_add(*word));
        nvm[NVM_WORDS - 1] = 0xBABA_u16.wrapping_sub(sum);
        Self {
            ctrl: Ctrl::FD,
            reset_at: None,
            link_up: false,
            phy_was_reset: true,
            nvm,
            eerd: Slow::default(),
            mdic: Slow::default(),
            swsm: 0,
            sw_fw_sync: 0,
        }
    }
}

impl Card82576 {
    /// How many polls of a status bit fail before one succeeds.
    pub(super) fn polls(&self) -> u32 {
        u32::from(!self.options.quirks.qemu)
    }

    /// What CTRL.RST resets.
    pub(super) fn reset_mac(&mut self, keep_moderation: bool) {
        let kept = [regs::RXPBS, regs::TXPBS].map(|offset| (offset, self.word(offset)));
        self.words.fill(0);
        for (offset, value) in kept {
            self.set_word(offset, value);
        }
        self.set_word(regs::VET, 0x88A8_8100);
        self.set_word(regs::RXCSUM, 0x300);
        self.set_word(regs::RLPML, 1522);
        let [a, b, c, d, e, f] = self.mac;
        self.set_word(regs::RAL, u32::from_le_bytes([a, b, c, d]));
        self.set_word(regs::RAH, u32::from(u16::from_le_bytes([e, f])) | regs::RAH_VALID);
        self.rx = (0..QUEUES).map(RxQueue::after_reset).collect();
        self.tx = (0..QUEUES).map(TxQueue::after_reset).collect();
        self.fifo.clear();
        self.faults.end_wedges();
        self.irq.reset(keep_moderation);
        self.bringup = BringUp {
            reset_at: Some(self.now),
            ..BringUp::new(self.mac)
        };
        if self.options.quirks.qemu {
            self.phy.reset();
        }
        // Causes were reset too, so the link goes down without a word.
        self.bringup.link_up = self.link_should_be_up();
    }

    pub(super) fn read_special(&mut self, offset: u32) -> u32 {
        match offset {
            regs::CTRL | regs::CTRL_ALIAS => self.bringup.ctrl.bits(),
            regs::STATUS => self.status().bits(),
            regs::EECD => 0x1110 | if self.options.quirks.qemu { 0 } else { 1 << 9 },
            regs::EERD => self.bringup.eerd.read(EERD_DONE),
            regs::MDIC => self.bringup.mdic.read(MDIC_READY | MDIC_ERROR),
            regs::SWSM => {
                let value = self.bringup.swsm;
                self.bringup.swsm |= SWSM_SMBI;
                value
            }
            regs::SW_FW_SYNC => self.bringup.sw_fw_sync,
            _ => self.word(offset),
        }
    }

    fn status(&self) -> Status {
        let mut status = Status::FD | Status::SPEED_1000;
        status.set(Status::LU, self.bringup.link_up);
        status.set(Status::PHYRA, self.bringup.phy_was_reset);
        status.set(
            Status::GIO_MASTER_ENABLE,
            !self.bringup.ctrl.contains(Ctrl::GIO_MASTER_DISABLE),
        );
        status
    }

    /// EEMNGCTL b18: the configuration of port 0 is loaded. QEMU never shows it.
    pub(super) fn read_management_control(&self) -> u32 {
        if self.options.quirks.qemu { 0 } else { 1 << 18 }
    }

    pub(super) fn write_special(&mut self, offset: u32, value: u32) {
        match offset {
            regs::CTRL | regs::CTRL_ALIAS => self.write_ctrl(Ctrl::from_bits_retain(value)),
            regs::STATUS => {
                self.bringup.phy_was_reset &= Status::from_bits_retain(value).contains(Status::PHYRA);
            }
            regs::EECD => {} // the pins for bit-banging, which nobody needs
            regs::EERD => self.read_nvm(value),
            regs::MDIC => self.access_phy(value),
            regs::SWSM => self.bringup.swsm = value & (SWSM_SMBI | SWSM_SWESMBI),
            regs::SW_FW_SYNC => self.bringup.sw_fw_sync = value & 0xFFFF,
            regs::RCTL => self.write_rctl(Rctl::from_bits_retain(value)),
            regs::TCTL => {
                self.set_word(regs::TCTL, value);
                if !self.options.quirks.qemu && Tctl::from_bits_retain(value).contains(Tctl::EN) {
                    self.pump();
                }
            }
            regs::MRQC if !matches!(value & MRQC_MODE, 0 | MRQC_RSS) => {
                self.log.report(Violation::NotModelled {
                    what: "MRQC mode",
                    value,
                });
            }
            VT_CTL if value != 0 => self.log.report(Violation::NotModelled {
                what: "VT_CTL",
                value,
            }),
            _ => {
                self.set_word(offset, value);
                self.recheck_posted_buffers();
            }
        }
    }

    fn write_ctrl(&mut self, value: Ctrl) {
        if value.contains(Ctrl::RST) {
            self.reset_mac(self.options.quirks.qemu);
            return;
        }
        if value.contains(Ctrl::VME) {
            self.log.report(Violation::NotModelled {
                what: "CTRL.VME",
                value: value.bits(),
            });
        }
        if value.contains(Ctrl::PHY_RST) {
            self.phy.reset();
            self.bringup.phy_was_reset = true;
        }
        self.bringup.ctrl = value;
        self.refresh_link();
        self.pump();
    }

    fn read_nvm(&mut self, value: u32) {
        if value & EERD_START == 0 {
            return;
        }
        let word = self
            .bringup
            .nvm
            .get((value >> 2 & 0x3FFF) as usize)
            .copied()
            .unwrap_or(0xFFFF);
        let value = value & 0xFFFC | EERD_DONE | u32::from(word) << 16;
        self.bringup.eerd = Slow {
            polls: self.polls(),
            value,
        };
    }

    fn access_phy(&mut self, value: u32) {
        let register = value >> 16 & 0x1F;
        let address = value >> 21 & 0x1F;
        let mut result = value & !(MDIC_READY | MDIC_ERROR) | MDIC_READY;
        if address != phy::ADDRESS {
            result |= MDIC_ERROR;
        } else if value & MDIC_WRITE != 0 {
            self.phy.write(register, (value & 0xFFFF) as u16, self.now);
            self.refresh_link();
        } else if value & MDIC_READ != 0 {
            result = result & !0xFFFF | u32::from(self.phy.read(register));
        }
        self.bringup.mdic = Slow {
            polls: self.polls(),
            value: result,
        };
        if value & MDIC_INTERRUPT != 0 {
            self.irq.raise_other(Cause::MDAC, self.now);
        }
    }

    fn link_should_be_up(&self) -> bool {
        self.phy.is_up() && (self.options.quirks.qemu || self.bringup.ctrl.contains(Ctrl::SLU))
    }

    /// Brings STATUS.LU in line with the PHY, and tells the driver if it changed.
    pub(super) fn refresh_link(&mut self) {
        let up = self.link_should_be_up();
        if up != self.bringup.link_up {
            self.bringup.link_up = up;
            self.irq.raise_other(Cause::LSC, self.now);
        }
    }
}
