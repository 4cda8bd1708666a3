//! What receive and transmit queues share: ring registers, and the slow road between off and on.
//!
//! ```text
//!           ENABLE=1              b25 read as 1
//! Disabled ─────────▶ Enabling ────────────────▶ Enabled
//!     ▲                                             │ ENABLE=0
//!     └──────── Disabling ◀─────────────────────────┘
//!     b25 read as 0
//! ```
//!
//! Reading the control register is what moves a queue along, and the first read after a change still shows the
//! old state (not with the QEMU quirk): a driver that does not poll is found out. A queue being disabled goes
//! on using what was posted to it until its b25 reads 0.
//!
//! Read with: igb.md §4, §7 and §9.

use super::bus::{Bus, DriverUse, RangeKind};
use super::regs::QUEUE_ENABLE;
use super::violations::{InUse, RingName, Violation, ViolationLog};

/// Bytes in a descriptor, of any kind.
pub(super) const DESCRIPTOR_LEN: u32 = 16;
const LEN_MAX: u32 = 0x8_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Disabled,
    /// Reads that will still show b25 as 0.
    Enabling {
        polls: u32,
    },
    Enabled,
    /// Reads that will still show b25 as 1.
    Disabling {
        polls: u32,
    },
}

pub(super) struct Ring {
    pub(super) name: RingName,
    pub(super) base: u64,
    pub(super) len_bytes: u32,
    /// The slot the card finishes next.
    pub(super) head: u32,
    /// One past the last slot handed to the card.
    pub(super) tail: u32,
    /// RXDCTL or TXDCTL without b25.
    pub(super) control: u32,
    pub(super) cache_hints: u32,
    pub(super) state: State,
    /// Whether a tail was taken since the queue was enabled.
    used: bool,
}

impl Ring {
    /// A ring as reset leaves it: queue 0 comes up enabled on the 82576.
    pub(super) fn after_reset(name: RingName) -> Self {
        Self {
            name,
            base: 0,
            len_bytes: 0,
            head: 0,
            tail: 0,
            control: 0,
            cache_hints: 0,
            state: if name.queue == 0 {
                State::Enabled
            } else {
                State::Disabled
            },
            used: false,
        }
    }

    pub(super) fn size(&self) -> u32 {
        self.len_bytes / DESCRIPTOR_LEN
    }

    pub(super) fn slot_iova(&self, slot: u32) -> u64 {
        self.base
            .wrapping_add(u64::from(slot) * u64::from(DESCRIPTOR_LEN))
    }

    pub(super) fn next_slot(&self, slot: u32) -> u32 {
        if slot + 1 >= self.size() { 0 } else { slot + 1 }
    }

    /// Whether the queue may still touch what was posted to it.
    pub(super) fn is_live(&self) -> bool {
        self.state != State::Disabled
    }

    /// Reports a change to ring set-up under a live queue.
    pub(super) fn check_changeable(&self, register: &'static str, log: &ViolationLog) {
        if self.is_live() {
            log.report(Violation::RingChangedWhileEnabled {
                ring: self.name,
                register,
            });
        }
    }

    /// Takes a written ENABLE bit. Returns whether the queue went from off to on.
    pub(super) fn write_control(
        &mut self,
        value: u32,
        polls: u32,
        bus: &dyn Bus,
        log: &ViolationLog,
    ) -> bool {
        self.control = value & !QUEUE_ENABLE;
        match (self.state, value & QUEUE_ENABLE != 0) {
            (State::Disabled, true) => {
                self.check_ring(bus, log);
                self.state = State::Enabling { polls };
                self.used = false;
                return true;
            }
            (State::Disabling { .. }, true) => {
                let register = "ENABLE";
                log.report(Violation::RingChangedWhileEnabled {
                    ring: self.name,
                    register,
                });
            }
            (State::Enabling { .. } | State::Enabled, false) if !self.used => self.state = State::Disabled,
            (State::Enabling { .. } | State::Enabled, false) => self.state = State::Disabling { polls },
            _ => {}
        }
        false
    }

    /// Reads RXDCTL or TXDCTL, which is also what lets the queue change state. A queue that is not
    /// `able_to_stop` keeps showing b25.
    pub(super) fn read_control(&mut self, able_to_stop: bool) -> u32 {
        self.state = match self.state {
            State::Enabling { polls: 0 } => State::Enabled,
            State::Enabling { polls } => State::Enabling { polls: polls - 1 },
            State::Disabling { .. } if !able_to_stop => self.state,
            State::Disabling { polls: 0 } => State::Disabled,
            State::Disabling { polls } => State::Disabling { polls: polls - 1 },
            settled => settled,
        };
        let on = matches!(self.state, State::Enabled | State::Disabling { .. });
        self.control | if on { QUEUE_ENABLE } else { 0 }
    }

    /// Judges a tail write. Returns how many slots it newly hands over; `outstanding` is how many the card
    /// already had.
    pub(super) fn take_tail(&mut self, tail: u32, outstanding: u32, log: &ViolationLog) -> u32 {
        let ring = self.name;
        match self.state {
            // Clearing the tail is part of setting a ring up (igb.md §9).
            State::Disabled if tail == 0 => {
                self.tail = 0;
                return 0;
            }
            State::Disabled | State::Disabling { .. } => {
                log.report(Violation::TailWhileDisabled { ring, tail });
                return 0;
            }
            State::Enabling { .. } => {
                log.report(Violation::TailBeforeEnabled { ring, tail });
                return 0;
            }
            State::Enabled => {}
        }
        let size = self.size();
        if tail >= size {
            log.report(Violation::TailBeyondRing { ring, tail, size });
            return 0;
        }
        let fresh = if tail >= self.tail {
            tail - self.tail
        } else {
            size - self.tail + tail
        };
        let posted = outstanding + fresh;
        if posted >= size {
            log.report(Violation::RingOverfilled { ring, posted, size });
            return 0;
        }
        self.used = true;
        self.tail = tail;
        fresh
    }

    /// Finds the ring itself, or the first of `buffers` (slot, address, length), in a range that goes away.
    pub(super) fn in_use(
        &self,
        overlaps: &impl Fn(u64, u64) -> bool,
        mut buffers: impl Iterator<Item = (u32, u64, u64)>,
    ) -> Option<(InUse, u64)> {
        if !self.is_live() {
            return None;
        }
        if overlaps(self.base, u64::from(self.len_bytes)) {
            return Some((InUse::Ring, self.base));
        }
        buffers
            .find(|(_, iova, len)| overlaps(*iova, *len))
            .map(|(slot, iova, _)| (InUse::Buffer { slot }, iova))
    }

    fn check_ring(&self, bus: &dyn Bus, log: &ViolationLog) {
        let ring = self.name;
        if !self.base.is_multiple_of(128) {
            log.report(Violation::RingMisaligned {
                ring,
                base: self.base,
            });
        }
        if self.len_bytes == 0 || !self.len_bytes.is_multiple_of(128) || self.len_bytes > LEN_MAX {
            log.report(Violation::RingLength {
                ring,
                len: self.len_bytes,
            });
        }
        check_driver_memory(ring, self.base, u64::from(self.len_bytes), bus, log);
    }
}

/// Reports ring memory that the guest could write.
pub(super) fn check_driver_memory(ring: RingName, iova: u64, len: u64, bus: &dyn Bus, log: &ViolationLog) {
    let kind = bus.kind(iova, len);
    if kind != RangeKind::DriverMemory(DriverUse::Rings) {
        log.report(Violation::RingOutsideDriverMemory {
            ring,
            iova,
            len,
            kind,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::card::memory::PlainMemory;
    use crate::card::violations::Direction;

    const NAME: RingName = RingName {
        direction: Direction::Tx,
        queue: 1,
    };

    fn ring_of_8() -> (Ring, PlainMemory, ViolationLog) {
        let memory = PlainMemory::new();
        memory.map(0x1000, 128, RangeKind::DriverMemory(DriverUse::Rings));
        let ring = Ring {
            base: 0x1000,
            len_bytes: 128,
            ..Ring::after_reset(NAME)
        };
        (ring, memory, ViolationLog::default())
    }

    #[test]
    fn a_queue_turns_on_only_as_it_is_polled_and_off_the_same_way() {
        let (mut ring, memory, log) = ring_of_8();
        assert!(ring.write_control(QUEUE_ENABLE | 8, 1, &memory, &log));
        assert_eq!(ring.read_control(true), 8);
        assert_eq!(ring.read_control(true), QUEUE_ENABLE | 8);
        assert_eq!(ring.take_tail(3, 0, &log), 3);
        ring.write_control(8, 1, &memory, &log);
        assert_eq!(
            ring.read_control(false),
            QUEUE_ENABLE | 8,
            "not while it is unable to"
        );
        assert_eq!(ring.read_control(true), QUEUE_ENABLE | 8);
        assert_eq!(ring.read_control(true), 8);
        assert!(!ring.is_live());
        log.assert_clean();
    }

    #[test]
    fn a_queue_that_was_never_used_stops_at_once() {
        let (mut ring, memory, log) = ring_of_8();
        ring.write_control(QUEUE_ENABLE, 1, &memory, &log);
        ring.write_control(0, 1, &memory, &log);
        assert!(!ring.is_live());
    }

    #[test]
    fn the_tail_wraps_and_leaves_one_slot_free() {
        let (mut ring, _, log) = ring_of_8();
        ring.state = State::Enabled;
        assert_eq!(ring.take_tail(6, 0, &log), 6);
        assert_eq!(ring.take_tail(1, 0, &log), 3);
        assert_eq!(ring.take_tail(0, 0, &log), 7);
        log.assert_clean();
        assert_eq!(ring.take_tail(1, 7, &log), 0);
        assert_eq!(
            log.take(),
            [Violation::RingOverfilled {
                ring: NAME,
                posted: 8,
                size: 8
            }]
        );
    }
}
