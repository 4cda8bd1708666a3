//! MSI-X mode interrupts: queue events and other causes become eventfd signals.
//!
//! ```text
//! queue event ─IVAR─┐
//!                   ├▶ EICR & EIMS, rising ─EITR─▶ message ─▶ eventfd
//! ICR & IMS, rising ┘                              (EIAC clears EICR, EIAM clears EIMS)
//! ```
//!
//! Where sources are silent or differ the stricter reading of the silicon is taken:
//! - A message goes out when a bit of EICR & EIMS rises, and not again until that bit has fallen. A driver
//!   that neither sets EIAC nor clears EICR gets exactly one.
//! - Reading EICR does not clear it. (QEMU: it does.)
//! - An "other" message needs a *new* unmasked bit in ICR; a driver that does not read ICR gets no second one.
//! - EITR's interval begins when a message is sent. An event inside it is sent when it ends, once. Writing
//!   EITR without CNT_IGNR ends the running interval. (QEMU: about 4.1 times longer, and always one more
//!   message at the end.)
//! - IVAR, EIAC and EIAM written before GPIE.MSIX_MODE do not stick, and are reported.
//! - Outside MSI-X mode nothing is signalled: INTx and MSI are not modelled.
//! - A message whose vector has no eventfd waits in the pending bits and is sent when it gets one, as a masked
//!   MSI-X vector does.
//!
//! Read with: the 82576 datasheet's interrupt chapter; igb.md §3.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::regs::{self, Cause, Gpie};
use super::violations::{Direction, RingName, Violation, ViolationLog};

/// MSI-X vectors of the 82576's physical function.
pub const VECTORS: u8 = 10;
const ALL_VECTORS: u32 = (1 << VECTORS) - 1;

/// Where a vector's messages go.
pub trait Signal: Send {
    /// Delivers one message. Errors have nobody to go to and are dropped.
    fn signal(&self);
}

impl Signal for EventFd {
    fn signal(&self) {
        let _ = self.write(1);
    }
}

/// For an eventfd that arrived over a socket.
impl Signal for File {
    fn signal(&self) {
        let _ = (&mut &*self).write(&1_u64.to_ne_bytes());
    }
}

impl Signal for OwnedFd {
    fn signal(&self) {
        let _ = rustix::io::write(self, &1_u64.to_ne_bytes());
    }
}

pub(super) struct Interrupts {
    qemu: bool,
    log: ViolationLog,
    gpie: Gpie,
    eims: u32,
    eiac: u32,
    eiam: u32,
    eicr: u32,
    eitr: [u32; 25],
    ivar: [u32; 8],
    ivar_misc: u32,
    icr: Cause,
    ims: Cause,
    iam: u32,
    /// Per vector, the end of the running EITR interval.
    quiet_until: [Duration; VECTORS as usize],
    /// Vectors with a message to send when their interval ends.
    waiting: u32,
    /// QEMU only: vectors that send one more message when their interval ends, event or not.
    echo: u32,
    /// MSI-X pending bits.
    pending: u32,
    signals: [Option<Box<dyn Signal>>; VECTORS as usize],
    /// Messages still to be swallowed, by order of a test.
    pub(super) lose: u64,
    /// Messages sent, lost ones included.
    pub(super) sent: u64,
}

impl Interrupts {
    pub(super) fn new(qemu: bool, log: ViolationLog) -> Self {
        Self {
            qemu,
            log,
            gpie: Gpie::empty(),
            eims: 0,
            eiac: 0,
            eiam: 0,
            eicr: 0,
            eitr: [0; 25],
            ivar: [0; 8],
            ivar_misc: 0,
            icr: Cause::empty(),
            ims: Cause::empty(),
            iam: 0,
            quiet_until: [Duration::ZERO; VECTORS as usize],
            waiting: 0,
            echo: 0,
            pending: 0,
            signals: Default::default(),
            lose: 0,
            sent: 0,
        }
    }

    /// Back to reset values. Eventfds belong to VFIO, not to the card, and stay.
    pub(super) fn reset(&mut self, keep_moderation: bool) {
        let mut fresh = Self::new(self.qemu, self.log.clone());
        fresh.signals = std::mem::take(&mut self.signals);
        fresh.lose = self.lose;
        fresh.sent = self.sent;
        if keep_moderation {
            fresh.eitr = self.eitr;
        }
        *self = fresh;
    }

    pub(super) fn set_signal(&mut self, vector: u8, signal: Option<Box<dyn Signal>>) {
        let bit = 1 << vector;
        if let Some(signal) = &signal
            && self.pending & bit != 0
        {
            signal.signal();
            self.pending &= !bit;
        }
        self.signals[usize::from(vector)] = signal;
    }

    pub(super) fn pending_bits(&self) -> u32 {
        self.pending
    }

    /// A descriptor of `ring` was written back.
    pub(super) fn raise_queue(&mut self, ring: RingName, now: Duration) {
        let cause = match ring.direction {
            Direction::Rx => Cause::RXDW,
            Direction::Tx => Cause::TXDW,
        };
        self.icr |= cause;
        // Column-major: register q mod 8; byte 0 rx q, 1 tx q, 2 rx q+8, 3 tx q+8.
        let byte = u32::from(ring.queue / 8) * 2 + u32::from(ring.direction == Direction::Tx);
        let entry = self.ivar[usize::from(ring.queue % 8)] >> (8 * byte);
        self.raise_entry(entry, now);
    }

    /// Something other than a queue happened.
    pub(super) fn raise_other(&mut self, cause: Cause, now: Duration) {
        let fresh = cause & !self.icr & self.ims;
        self.icr |= cause;
        self.raise_unmasked_other(fresh, now);
    }

    fn raise_unmasked_other(&mut self, fresh: Cause, now: Duration) {
        if !fresh.is_empty() {
            self.icr |= Cause::INTA;
            self.raise_entry(self.ivar_misc >> 8, now);
        }
    }

    fn raise_entry(&mut self, entry: u32, now: Duration) {
        const VALID: u32 = 0x80;
        if self.gpie.contains(Gpie::MSIX_MODE) && entry & VALID != 0 {
            self.set_vectors(1 << (entry & 0x1F), now);
        }
    }

    fn set_vectors(&mut self, bits: u32, now: Duration) {
        let fresh = bits & ALL_VECTORS & !self.eicr;
        self.eicr |= fresh;
        self.fire(fresh & self.eims, now);
    }

    fn fire(&mut self, vectors: u32, now: Duration) {
        for vector in (0..VECTORS).filter(|vector| vectors & 1 << vector != 0) {
            if now < self.quiet_until[usize::from(vector)] {
                self.waiting |= 1 << vector;
            } else {
                self.send(vector, now);
            }
        }
    }

    fn send(&mut self, vector: u8, now: Duration) {
        let bit = 1 << vector;
        self.waiting &= !bit;
        if self.eiac & bit != 0 {
            self.eicr &= !bit;
        }
        if self.gpie.contains(Gpie::EIAME) && self.eiam & bit != 0 && !self.qemu {
            self.eims &= !bit;
        }
        let interval = self.interval(vector);
        if !interval.is_zero() {
            self.quiet_until[usize::from(vector)] = now + interval;
            if self.qemu {
                self.echo |= bit;
            }
        }
        self.deliver(vector);
    }

    fn deliver(&mut self, vector: u8) {
        self.sent += 1;
        if self.lose > 0 {
            self.lose -= 1;
            return;
        }
        match &self.signals[usize::from(vector)] {
            Some(signal) => signal.signal(),
            None => self.pending |= 1 << vector,
        }
    }

    fn interval(&self, vector: u8) -> Duration {
        let value = self.eitr[usize::from(vector)];
        if self.qemu {
            Duration::from_nanos(u64::from(value & 0x7FFE) * 1024)
        } else {
            Duration::from_micros(u64::from(value >> 2 & 0x1FFF))
        }
    }

    /// Sends what the end of an EITR interval releases.
    pub(super) fn advance(&mut self, now: Duration) {
        for vector in 0..VECTORS {
            let bit = 1 << vector;
            if (self.waiting | self.echo) & bit == 0 || now < self.quiet_until[usize::from(vector)] {
                continue;
            }
            let due = self.waiting & bit != 0 && self.eicr & self.eims & bit != 0;
            let echo = self.echo & bit != 0;
            self.waiting &= !bit;
            self.echo &= !bit;
            if due {
                self.send(vector, now);
            } else if echo {
                self.deliver(vector);
            }
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Duration> {
        (0..VECTORS)
            .filter(|vector| (self.waiting | self.echo) & 1 << vector != 0)
            .map(|vector| self.quiet_until[usize::from(vector)])
            .min()
    }

    pub(super) fn read(&mut self, offset: u32) -> u32 {
        match offset {
            regs::ICR => self.read_icr(),
            regs::IMS => self.ims.bits(),
            regs::IAM => self.iam,
            regs::GPIE => self.gpie.bits(),
            regs::EIMS => self.eims,
            regs::EIAC => self.eiac,
            regs::EIAM if self.qemu => !self.eiam,
            regs::EIAM => self.eiam,
            regs::EICR => {
                let value = self.eicr;
                if self.qemu {
                    self.eicr = 0;
                }
                value
            }
            regs::IVAR_MISC => self.ivar_misc,
            regs::PBACL => self.pending,
            _ if offset >= regs::IVAR => self.ivar[index(offset, regs::IVAR)],
            _ if offset >= regs::EITR => self.eitr[index(offset, regs::EITR)],
            _ => 0, // ICS, IMC, EICS and EIMC are write-only.
        }
    }

    /// Reading clears when GPIE.NSICR says so, when nothing is unmasked, or when an interrupt is asserted.
    fn read_icr(&mut self) -> u32 {
        let value = self.icr;
        if self.gpie.contains(Gpie::NSICR) || self.ims.is_empty() || value.contains(Cause::INTA) {
            self.icr = Cause::empty();
        }
        value.bits()
    }

    pub(super) fn write(&mut self, offset: u32, value: u32, now: Duration) {
        match offset {
            regs::ICR => self.icr &= !Cause::from_bits_retain(value),
            regs::ICS => self.raise_other(Cause::from_bits_retain(value), now),
            regs::IMS => {
                let fresh = Cause::from_bits_retain(value) & !self.ims & self.icr;
                self.ims |= Cause::from_bits_retain(value);
                self.raise_unmasked_other(fresh, now);
            }
            regs::IMC => self.ims &= !Cause::from_bits_retain(value),
            regs::IAM => self.iam = value,
            regs::GPIE => self.gpie = Gpie::from_bits_retain(value),
            regs::EICS => self.set_vectors(value, now),
            regs::EIMS => {
                let fresh = value & !self.eims & self.eicr;
                self.eims |= value & ALL_VECTORS;
                self.fire(fresh, now);
            }
            regs::EIMC => self.eims &= !value,
            regs::EIAC if self.sticks("EIAC", value) => {
                self.eiac = if self.qemu { self.eiac | value } else { value };
            }
            regs::EIAM if self.sticks("EIAM", value) => self.eiam = value,
            regs::EICR => self.eicr &= !value,
            regs::IVAR_MISC if self.sticks("IVAR_MISC", value) => {
                self.check_vectors("IVAR_MISC", value);
                self.ivar_misc = value;
            }
            regs::EIAC | regs::EIAM | regs::IVAR_MISC => {}
            regs::PBACL => self.pending &= !value,
            _ if offset >= regs::IVAR => {
                if self.sticks("IVAR", value) {
                    self.check_vectors("IVAR", value);
                    self.ivar[index(offset, regs::IVAR)] = value;
                }
            }
            _ => self.write_eitr(index(offset, regs::EITR), value),
        }
    }

    fn write_eitr(&mut self, vector: usize, value: u32) {
        const CNT_IGNR: u32 = 1 << 31;
        self.eitr[vector] = value & !CNT_IGNR;
        if value & CNT_IGNR == 0
            && !self.qemu
            && let Some(quiet_until) = self.quiet_until.get_mut(vector)
        {
            *quiet_until = Duration::ZERO;
        }
    }

    /// Says whether a write that needs MSI-X mode takes effect, and reports it if not. Zeros are the reset
    /// value, so writing them early is harmless.
    fn sticks(&self, register: &'static str, value: u32) -> bool {
        let in_mode = self.gpie.contains(Gpie::MSIX_MODE);
        if !in_mode && value != 0 {
            self.log.report(Violation::BeforeMsixMode { register, value });
        }
        in_mode
    }

    fn check_vectors(&self, register: &'static str, value: u32) {
        for entry in value.to_le_bytes() {
            let vector = entry & 0x1F;
            if entry & 0x80 != 0 && vector >= VECTORS {
                self.log.report(Violation::NoSuchVector { register, vector });
            }
        }
    }
}

fn index(offset: u32, base: u32) -> usize {
    ((offset - base) / 4) as usize
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const RX0: RingName = RingName {
        direction: Direction::Rx,
        queue: 0,
    };
    const NOW: Duration = Duration::from_secs(1);

    struct Counter(Arc<AtomicU64>);

    impl Signal for Counter {
        fn signal(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Rx queue 0 to vector 0, other causes to vector 1, both unmasked and counted.
    fn wired(qemu: bool) -> (Interrupts, [Arc<AtomicU64>; 2]) {
        let mut interrupts = Interrupts::new(qemu, ViolationLog::default());
        let counts = [Arc::default(), Arc::default()];
        for (vector, count) in (0..).zip(&counts) {
            interrupts.set_signal(vector, Some(Box::new(Counter(Arc::clone(count)))));
        }
        interrupts.write(regs::GPIE, Gpie::MSIX_MODE.bits(), NOW);
        interrupts.write(regs::IVAR, 0x80, NOW);
        interrupts.write(regs::IVAR_MISC, 0x81 << 8, NOW);
        interrupts.write(regs::EIMS, 0b11, NOW);
        interrupts.write(regs::IMS, Cause::LSC.bits(), NOW);
        (interrupts, counts)
    }

    fn seen(count: &AtomicU64) -> u64 {
        count.load(Ordering::Relaxed)
    }

    #[test]
    fn without_auto_clear_a_second_event_is_silent_until_eicr_is_cleared() {
        let (mut interrupts, [rx, _]) = wired(false);
        interrupts.raise_queue(RX0, NOW);
        interrupts.raise_queue(RX0, NOW);
        assert_eq!(seen(&rx), 1);
        assert_eq!(interrupts.read(regs::EICR), 1);
        assert_eq!(interrupts.read(regs::EICR), 1, "reading does not clear");
        interrupts.write(regs::EICR, 1, NOW);
        interrupts.raise_queue(RX0, NOW);
        assert_eq!(seen(&rx), 2);
    }

    #[test]
    fn an_event_while_masked_fires_on_unmask() {
        let (mut interrupts, [rx, _]) = wired(false);
        interrupts.write(regs::EIAC, 1, NOW);
        interrupts.write(regs::EIMC, 1, NOW);
        interrupts.raise_queue(RX0, NOW);
        assert_eq!(seen(&rx), 0);
        interrupts.write(regs::EIMS, 1, NOW);
        assert_eq!(seen(&rx), 1);
        assert_eq!(interrupts.read(regs::EICR), 0, "auto-cleared as the message went");
    }

    #[test]
    fn auto_mask_needs_eiame_and_masks_after_one_message() {
        let (mut interrupts, [rx, _]) = wired(false);
        interrupts.write(regs::GPIE, (Gpie::MSIX_MODE | Gpie::EIAME).bits(), NOW);
        interrupts.write(regs::EIAC, 1, NOW);
        interrupts.write(regs::EIAM, 1, NOW);
        interrupts.raise_queue(RX0, NOW);
        interrupts.raise_queue(RX0, NOW);
        assert_eq!((seen(&rx), interrupts.read(regs::EIMS)), (1, 0b10));
        interrupts.write(regs::EIMS, 1, NOW);
        assert_eq!(seen(&rx), 2);
    }

    #[test]
    fn moderation_joins_the_events_of_one_interval() {
        let (mut interrupts, [rx, _]) = wired(false);
        interrupts.write(regs::EIAC, 1, NOW);
        interrupts.write(regs::EITR, 100 << 2, NOW);
        for _ in 0..5 {
            interrupts.raise_queue(RX0, NOW);
        }
        assert_eq!(seen(&rx), 1);
        assert_eq!(interrupts.next_deadline(), Some(NOW + Duration::from_micros(100)));
        interrupts.advance(NOW + Duration::from_micros(99));
        assert_eq!(seen(&rx), 1);
        interrupts.advance(NOW + Duration::from_micros(100));
        assert_eq!(seen(&rx), 2);
        interrupts.advance(NOW + Duration::from_secs(1));
        assert_eq!(seen(&rx), 2);
    }

    #[test]
    fn qemu_moderates_longer_and_always_sends_once_more() {
        let (mut interrupts, [rx, _]) = wired(true);
        interrupts.write(regs::EIAC, 1, NOW);
        interrupts.write(regs::EITR, 100 << 2, NOW);
        interrupts.raise_queue(RX0, NOW);
        interrupts.advance(NOW + Duration::from_micros(400));
        assert_eq!(seen(&rx), 1);
        interrupts.advance(NOW + Duration::from_micros(410));
        assert_eq!(seen(&rx), 2);
    }

    #[test]
    fn a_second_link_change_is_silent_until_icr_is_read() {
        let (mut interrupts, [_, other]) = wired(false);
        interrupts.write(regs::EIAC, 0b11, NOW);
        interrupts.raise_other(Cause::LSC, NOW);
        interrupts.raise_other(Cause::LSC, NOW);
        assert_eq!(seen(&other), 1);
        assert_eq!(interrupts.read(regs::ICR) & Cause::LSC.bits(), Cause::LSC.bits());
        interrupts.raise_other(Cause::LSC, NOW);
        assert_eq!(seen(&other), 2);
    }

    #[test]
    fn routing_is_column_major() {
        let (mut interrupts, [_, second]) = wired(false);
        interrupts.write(regs::IVAR + 4 * 3, 0x81 << 24, NOW);
        interrupts.raise_queue(
            RingName {
                direction: Direction::Rx,
                queue: 11,
            },
            NOW,
        );
        assert_eq!(seen(&second), 0);
        interrupts.raise_queue(
            RingName {
                direction: Direction::Tx,
                queue: 11,
            },
            NOW,
        );
        assert_eq!(seen(&second), 1);
    }

    #[test]
    fn a_message_without_an_eventfd_waits_for_one() {
        let (mut interrupts, _) = wired(false);
        interrupts.set_signal(0, None);
        interrupts.raise_queue(RX0, NOW);
        assert_eq!(interrupts.pending_bits(), 1);
        let count = Arc::<AtomicU64>::default();
        interrupts.set_signal(0, Some(Box::new(Counter(Arc::clone(&count)))));
        assert_eq!((seen(&count), interrupts.pending_bits()), (1, 0));
    }
}
