//! What a test can make the card suffer.

use std::time::Duration;

use super::Card82576;
use super::violations::{Direction, RingName};

/// When a frame that could be completed is completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delay {
    /// At once.
    #[default]
    None,
    /// This long after it arrived or was posted, by the card's clock.
    After(Duration),
    /// One for each [`Card82576::step`].
    UntilStepped,
}

/// Ailments in force.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) removed: bool,
    pub(super) tx_hangs: bool,
    pub(super) delay: Delay,
    steps: u64,
    drop_next: u64,
    /// One bit per queue, receive and transmit.
    wedged: [u32; 2],
}

impl Faults {
    /// Says whether a frame that was there `since` may be completed now, and uses up a step if it took one.
    pub(super) fn may_complete(&mut self, since: Duration, now: Duration) -> bool {
        match self.delay {
            Delay::None => true,
            Delay::After(delay) => now >= since + delay,
            Delay::UntilStepped => {
                let stepped = self.steps > 0;
                self.steps = self.steps.saturating_sub(1);
                stepped
            }
        }
    }

    pub(super) fn take_drop(&mut self) -> bool {
        let drop = self.drop_next > 0;
        self.drop_next = self.drop_next.saturating_sub(1);
        drop
    }

    pub(super) fn is_wedged(&self, RingName { direction, queue }: RingName) -> bool {
        self.wedged[side(direction)] & 1 << queue != 0
    }

    /// A reset is what helps against a wedged queue, and against a hanging transmitter.
    pub(super) fn end_wedges(&mut self) {
        self.wedged = [0; 2];
        self.tx_hangs = false;
        self.steps = 0;
    }
}

fn side(direction: Direction) -> usize {
    usize::from(direction == Direction::Tx)
}

impl Card82576 {
    /// Pulls the cable or puts it back. After that the link needs autonegotiation.
    pub fn set_link(&mut self, plugged: bool) {
        self.phy.set_cable(plugged, self.now);
        self.refresh_link();
    }

    /// Decides when frames that could be completed are.
    pub fn set_delay(&mut self, delay: Delay) {
        self.faults.delay = delay;
        self.faults.steps = 0;
        self.pump();
    }

    /// Completes up to `frames` frames, either way, that wait because of [`Delay::UntilStepped`].
    pub fn step(&mut self, frames: u64) {
        self.faults.steps += frames;
        self.pump();
        self.faults.steps = 0;
    }

    /// Loses the next `frames` frames from the wire.
    pub fn drop_next(&mut self, frames: u64) {
        self.faults.drop_next = frames;
    }

    /// Loses the next `messages` interrupt messages; the card believes they were sent.
    pub fn lose_interrupts(&mut self, messages: u64) {
        self.irq.lose = messages;
    }

    /// Makes a queue refuse to be disabled, and go on with what was posted to it. Any reset ends that.
    pub fn wedge(&mut self, ring: RingName) {
        self.faults.wedged[side(ring.direction)] |= 1 << ring.queue;
    }

    /// Makes a wedged queue well again.
    pub fn unwedge(&mut self, ring: RingName) {
        self.faults.wedged[side(ring.direction)] &= !(1 << ring.queue);
    }

    /// Stops sending and completing, with all registers answering. Any reset ends that.
    pub fn hang_tx(&mut self, hang: bool) {
        self.faults.tx_hangs = hang;
        self.pump();
    }

    /// Takes the card out of its slot, or puts it back as after power-on. Without it all reads give ones.
    pub fn set_removed(&mut self, removed: bool) {
        self.reset();
        self.faults.removed = removed;
    }

    /// Clears Bus Master and resets, as the kernel does when the last owner closes the device.
    pub fn close(&mut self) {
        self.config.clear_bus_master();
        for vector in 0..super::VECTORS {
            self.set_irq(vector, None);
        }
        self.reset();
    }
}
