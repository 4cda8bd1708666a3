//! Register access of the queues, receive and transmit alike.

use super::Card82576;
use super::regs::QueueRegister;
use super::ring::{Ring, State};
use super::violations::{Direction, RingName, Violation};

impl Card82576 {
    pub(super) fn read_queue(&mut self, name: RingName, register: QueueRegister) -> u32 {
        let queue = usize::from(name.queue);
        let quirky = self.options.quirks.qemu;
        let able_to_stop = self.able_to_stop(name);
        let ring = self.ring(name);
        match register {
            QueueRegister::BaseLow => (ring.base & 0xFFFF_FFFF) as u32,
            QueueRegister::BaseHigh => (ring.base >> 32) as u32,
            QueueRegister::Len => ring.len_bytes,
            // How far the card has *fetched*, which says nothing about what is done. QEMU fetches late.
            QueueRegister::Head if name.direction == Direction::Rx && !quirky => ring.tail,
            QueueRegister::Head => ring.head,
            QueueRegister::CacheHints => ring.cache_hints,
            QueueRegister::Tail => ring.tail,
            QueueRegister::Control => {
                let value = ring.read_control(able_to_stop);
                if ring.state == State::Disabled {
                    self.forget_posted(name);
                }
                value
            }
            QueueRegister::Split => self.rx[queue].srrctl,
            QueueRegister::Drops => std::mem::take(&mut self.rx[queue].drops),
            QueueRegister::WriteBackLow => (self.tx[queue].head_write_back & 0xFFFF_FFFF) as u32,
            QueueRegister::WriteBackHigh => (self.tx[queue].head_write_back >> 32) as u32,
        }
    }

    pub(super) fn write_queue(&mut self, name: RingName, register: QueueRegister, value: u32) {
        let queue = usize::from(name.queue);
        let log = self.log.clone();
        let ring = self.ring(name);
        match register {
            QueueRegister::BaseLow => {
                ring.check_changeable("the base", &log);
                ring.base = ring.base & !0xFFFF_FFFF | u64::from(value);
            }
            QueueRegister::BaseHigh => {
                ring.check_changeable("the base", &log);
                ring.base = ring.base & 0xFFFF_FFFF | u64::from(value) << 32;
            }
            QueueRegister::Len => {
                ring.check_changeable("the length", &log);
                ring.len_bytes = value;
            }
            QueueRegister::Head => {
                ring.check_changeable("the head", &log);
                ring.head = value;
            }
            QueueRegister::CacheHints => ring.cache_hints = value,
            QueueRegister::Split => {
                ring.check_changeable("SRRCTL", &log);
                self.rx[queue].srrctl = value;
            }
            QueueRegister::Drops => log.report(Violation::UnknownRegister {
                offset: 0xC030 + 0x40 * u32::from(name.queue),
                value,
            }),
            QueueRegister::WriteBackLow => {
                let address = &mut self.tx[queue].head_write_back;
                *address = *address & !0xFFFF_FFFF | u64::from(value);
            }
            QueueRegister::WriteBackHigh => {
                let address = &mut self.tx[queue].head_write_back;
                *address = *address & 0xFFFF_FFFF | u64::from(value) << 32;
            }
            QueueRegister::Control => self.write_queue_control(name, value),
            QueueRegister::Tail => match name.direction {
                Direction::Rx => self.write_rx_tail(name.queue, value),
                Direction::Tx => self.write_tx_tail(name.queue, value),
            },
        }
    }

    fn write_queue_control(&mut self, name: RingName, value: u32) {
        let polls = self.polls();
        let log = self.log.clone();
        let ring = match name.direction {
            Direction::Rx => &mut self.rx[usize::from(name.queue)].ring,
            Direction::Tx => &mut self.tx[usize::from(name.queue)].ring,
        };
        let turned_on = ring.write_control(value, polls, self.bus.as_ref(), &log);
        // The silicon starts over at slot 0, QEMU where it was.
        if turned_on && !self.options.quirks.qemu {
            ring.head = 0;
            ring.tail = 0;
        }
        if !ring.is_live() {
            self.forget_posted(name);
        }
        if turned_on && name.direction == Direction::Rx {
            self.check_descriptor_type(name.queue);
        }
    }

    /// What a disabled queue had fetched is gone: the driver must look at its own books.
    fn forget_posted(&mut self, name: RingName) {
        match name.direction {
            Direction::Rx => self.rx[usize::from(name.queue)].posted.clear(),
            Direction::Tx => self.tx[usize::from(name.queue)].forget(),
        }
    }

    /// A receive queue stops unless wedged; a transmit queue also has to send first what was posted.
    fn able_to_stop(&self, name: RingName) -> bool {
        match name.direction {
            Direction::Rx => !self.faults.is_wedged(name),
            Direction::Tx => {
                !self.faults.is_wedged(name) && self.tx[usize::from(name.queue)].posted.is_empty()
            }
        }
    }

    fn ring(&mut self, name: RingName) -> &mut Ring {
        match name.direction {
            Direction::Rx => &mut self.rx[usize::from(name.queue)].ring,
            Direction::Tx => &mut self.tx[usize::from(name.queue)].ring,
        }
    }
}
