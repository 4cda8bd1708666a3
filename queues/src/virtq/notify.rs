//! Who wakes whom: kicks from the driver, notifications to it, by flag or by event index.
//!
//! Read with: virtio 1.2 §2.7.7, §2.7.9, §2.7.10.

use vfio_glue::memory::VirtqMemory;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// How wake-ups are suppressed on a queue, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WakeUps {
    /// VIRTIO_F_EVENT_IDX: each side says at which index it wants to be woken.
    ByEventIdx,
    /// Without it: one flag each way.
    ByFlag,
}

/// The decisions of one queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Notification {
    wake_ups: WakeUps,
    /// The used index at the last decision.
    decided_at: u16,
    /// The next decision is yes: the driver may have missed one, before a start or a change of descriptors.
    forced: bool,
    /// Kicks were asked for last, or nothing was said yet.
    asking: bool,
}

impl Notification {
    /// `used` is the used index at the start.
    pub(super) fn new(wake_ups: WakeUps, used: u16) -> Self {
        Self {
            wake_ups,
            decided_at: used,
            forced: true,
            asking: true,
        }
    }

    pub(super) fn force(&mut self) {
        self.forced = true;
    }

    /// Whether the driver wants to hear of the used entries up to `used`, which are published.
    #[inline]
    pub(super) fn wanted(&mut self, memory: &VirtqMemory, used: u16) -> bool {
        let before = std::mem::replace(&mut self.decided_at, used);
        let forced = std::mem::take(&mut self.forced);
        if before == used && !forced {
            return false;
        }
        // Our index must be out before the driver's wish is read, else both sides wait (virtio 1.2 §2.7.13.4).
        VirtqMemory::full_barrier();
        match self.wake_ups {
            WakeUps::ByEventIdx => {
                let event = memory.used_event();
                forced || used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)
            }
            WakeUps::ByFlag => memory.avail_flags() & AVAIL_F_NO_INTERRUPT == 0,
        }
    }

    pub(super) fn ask_for_kicks(&mut self, memory: &VirtqMemory, next_avail: u16) {
        self.asking = true;
        match self.wake_ups {
            WakeUps::ByEventIdx => memory.store_avail_event(next_avail),
            WakeUps::ByFlag => memory.store_used_flags(0),
        }
        // The wish must be out before the caller looks once more.
        VirtqMemory::full_barrier();
    }

    #[inline]
    pub(super) fn refuse_kicks(&mut self, memory: &VirtqMemory) {
        if !std::mem::take(&mut self.asking) {
            return;
        }
        match self.wake_ups {
            // The event index stays where it is: the driver passes it once and is then silent for 2^16 entries.
            WakeUps::ByEventIdx => {}
            WakeUps::ByFlag => memory.store_used_flags(USED_F_NO_NOTIFY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Guest;

    const AVAIL_FLAGS: u64 = crate::testing::BASE + 0x8000;
    const USED_EVENT: u64 = AVAIL_FLAGS + 4 + 2 * 4;
    const USED_FLAGS: u64 = crate::testing::BASE + 0xa000;
    const AVAIL_EVENT: u64 = USED_FLAGS + 4 + 8 * 4;

    /// A queue whose first, forced decision has been taken.
    fn settled(guest: &Guest, wake_ups: WakeUps) -> (VirtqMemory, Notification) {
        let memory = guest.memory();
        let mut notification = Notification::new(wake_ups, 0);
        assert!(
            notification.wanted(&memory, 0),
            "whoever had the queue before may have lost a wake-up"
        );
        (memory, notification)
    }

    #[test]
    fn by_event_index_the_driver_is_woken_when_its_index_is_passed() {
        let guest = Guest::with_queue(4);
        let (memory, mut notification) = settled(&guest, WakeUps::ByEventIdx);
        guest.write(USED_EVENT, &1u16.to_le_bytes());
        assert!(!notification.wanted(&memory, 1));
        assert!(notification.wanted(&memory, 3), "from 1 to 3 passes 1");
        assert!(!notification.wanted(&memory, 4));
        notification.force();
        assert!(
            notification.wanted(&memory, 4),
            "a new call descriptor is used once (trap 38)"
        );
    }

    #[test]
    fn by_flag_the_driver_is_woken_unless_it_says_no() {
        let guest = Guest::with_queue(4);
        let (memory, mut notification) = settled(&guest, WakeUps::ByFlag);
        assert!(notification.wanted(&memory, 1));
        guest.write(AVAIL_FLAGS, &1u16.to_le_bytes());
        assert!(!notification.wanted(&memory, 2));
        assert!(!notification.wanted(&memory, 2), "nothing new");
    }

    #[test]
    fn kicks_are_asked_for_where_the_driver_looks() {
        let guest = Guest::with_queue(4);
        let (memory, mut notification) = settled(&guest, WakeUps::ByEventIdx);
        notification.ask_for_kicks(&memory, 0x1234);
        assert_eq!(guest.read(AVAIL_EVENT, 2), [0x34, 0x12]);
        let (memory, mut notification) = settled(&guest, WakeUps::ByFlag);
        notification.refuse_kicks(&memory);
        assert_eq!(guest.read(USED_FLAGS, 2), [1, 0]);
        notification.ask_for_kicks(&memory, 0);
        assert_eq!(guest.read(USED_FLAGS, 2), [0, 0]);
    }

    #[test]
    fn by_event_index_a_device_that_polls_is_kicked_once_and_not_again() {
        let guest = Guest::with_queue(4);
        let (memory, mut notification) = settled(&guest, WakeUps::ByEventIdx);
        let mut kicks = 0;
        for sleep in 0..3u16 {
            let first = sleep.wrapping_mul(20_000);
            notification.ask_for_kicks(&memory, first);
            for old in 0..20_000 {
                let (old, new) = (first.wrapping_add(old), first.wrapping_add(old + 1));
                let event = u16::from_le_bytes(guest.read(AVAIL_EVENT, 2).try_into().unwrap());
                // vring_need_event, virtio 1.2 §2.7.10
                kicks += u32::from(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
                notification.refuse_kicks(&memory);
            }
        }
        assert_eq!(kicks, 3, "one for each time it had asked");
    }
}
