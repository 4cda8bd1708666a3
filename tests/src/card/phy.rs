//! The copper PHY at MDIC address 1, and autonegotiation on the card's clock.
//!
//! The PHY finds no link by itself: BMCR must be written with autonegotiation enabled and restarted, and the
//! link comes 500 ms later if the cable is in. A cable put back later negotiates again by itself, once that
//! was done. CTRL.RST leaves the PHY alone (QEMU: resets it); a function-level reset does not.

use std::time::Duration;

/// How long autonegotiation takes, in QEMU and here.
pub(super) const AUTONEGOTIATION: Duration = Duration::from_millis(500);

/// The PHY's address on the 82576.
pub(super) const ADDRESS: u32 = 1;

const BMCR: usize = 0;
const BMSR: usize = 1;
const BMCR_RESTART: u16 = 1 << 9;
const BMCR_POWER_DOWN: u16 = 1 << 11;
const BMCR_AUTONEGOTIATE: u16 = 1 << 12;
const BMCR_RESET: u16 = 1 << 15;
const BMSR_LINK: u16 = 1 << 2;
const BMSR_NEGOTIATED: u16 = 1 << 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    Negotiating { until: Duration },
    Up,
}

pub(super) struct Phy {
    registers: [u16; 32],
    link: Link,
    /// Whether autonegotiation was started since the last reset.
    started: bool,
    cable: bool,
}

impl Phy {
    pub(super) fn new() -> Self {
        let mut phy = Self {
            registers: [0; 32],
            link: Link::Down,
            started: false,
            cable: true,
        };
        phy.reset();
        phy
    }

    /// Back to power-on; the cable stays as it is.
    pub(super) fn reset(&mut self) {
        self.registers = [0; 32];
        self.registers[BMCR] = 0x1140;
        self.registers[BMSR] = 0x7949;
        self.registers[2] = 0x02A8;
        self.registers[3] = 0x0391;
        self.registers[4] = 0x0DE1; // what we offer
        self.registers[5] = 0x4DE1; // what the far side offers
        self.registers[9] = 0x0E00;
        self.registers[10] = 0x3C00;
        self.link = Link::Down;
        self.started = false;
    }

    pub(super) fn is_up(&self) -> bool {
        self.link == Link::Up
    }

    pub(super) fn read(&self, register: u32) -> u16 {
        let value = self.registers[register as usize & 31];
        if register as usize == BMSR && self.is_up() {
            value | BMSR_LINK | BMSR_NEGOTIATED
        } else {
            value
        }
    }

    pub(super) fn write(&mut self, register: u32, value: u16, now: Duration) {
        match register as usize & 31 {
            BMCR if value & BMCR_RESET != 0 => self.reset(),
            BMCR => {
                self.registers[BMCR] = value & !BMCR_RESTART;
                if value & BMCR_POWER_DOWN != 0 {
                    self.link = Link::Down;
                    self.started = false;
                } else if value & BMCR_AUTONEGOTIATE != 0 && value & BMCR_RESTART != 0 {
                    self.started = true;
                    self.negotiate(now);
                }
            }
            1..=3 | 5 | 10 => {} // read-only
            other => self.registers[other] = value,
        }
    }

    pub(super) fn set_cable(&mut self, plugged: bool, now: Duration) {
        if plugged == self.cable {
            return;
        }
        self.cable = plugged;
        self.link = Link::Down;
        if self.started {
            self.negotiate(now);
        }
    }

    fn negotiate(&mut self, now: Duration) {
        self.link = if self.cable {
            Link::Negotiating {
                until: now + AUTONEGOTIATION,
            }
        } else {
            Link::Down
        };
    }

    pub(super) fn advance(&mut self, now: Duration) {
        if let Link::Negotiating { until } = self.link
            && now >= until
        {
            self.link = Link::Up;
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Duration> {
        match self.link {
            Link::Negotiating { until } => Some(until),
            Link::Down | Link::Up => None,
        }
    }
}
