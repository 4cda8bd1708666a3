//! How far apart a receive queue's interrupts are, while its lane sleeps for them.
//!
//! ```text
//! frames and bytes between interrupts ──Moderation──▶ Pace ──▶ EITR of the vector
//! ```
//!
//! The interval runs from one message to the next: an event after its end is told at once, so a lone frame never waits,
//! whatever the pace. What it bounds is how often a worker that sleeps at once (`poll_us` 0) is woken. A worker that
//! polls first has the interrupt masked meanwhile, and the interval is over before it sleeps again.
//!
//! Transmit vectors keep one pace: an interrupt there only gives buffers back, and nobody waits for the single one.
//!
//! Queues that share a vector have the pace of the receive queue that changed it last; what of its interrupts is for
//! others counts as one that brought nothing, which errs on the prompt side.
//!
//! QEMU's model is never told any of this: it sends one message too many after every interval, and counts each four
//! times too long.
//!
//! Read with: Intel 82576EB datasheet §7.3.3 (moderation), §8.8.15 (EITR); Linux `igb_update_itr`.

/// How far apart interrupts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// Single frames, each awaited by somebody.
    Prompt,
    /// A stream: some frames at a time.
    Bulk,
}

impl Pace {
    /// The least time from one interrupt to the next, in microseconds.
    ///
    /// 20 keeps a storm to 50 000 a second and is less than any round trip over a wire and two sleeping ends. 50 is four
    /// frames of full size at 1 Gbit/s, and 75 of the shortest: less than the smallest usual ring.
    pub(super) fn interval_us(self) -> u32 {
        match self {
            Self::Prompt => 20,
            Self::Bulk => 50,
        }
    }
}

/// Interrupts after which the pace is looked at.
const WINDOW: u64 = 16;
/// From here on, for each interrupt, it is a stream.
const STREAM_FRAMES: u64 = 4;
const STREAM_BYTES: u64 = 2048;
/// Up to here, for each interrupt, and with fewer bytes than a stream's, it is one no more.
const SINGLE_FRAMES: u64 = 2;

/// Finds one queue's pace from what it receives.
#[derive(Debug)]
pub(super) struct Moderation {
    pace: Pace,
    interrupts: u64,
    frames: u64,
    bytes: u64,
}

impl Moderation {
    pub(super) fn new() -> Self {
        let (interrupts, frames, bytes) = (0, 0, 0);
        Self {
            pace: Pace::Prompt,
            interrupts,
            frames,
            bytes,
        }
    }

    /// Frames of so many bytes together were taken from the ring.
    #[inline]
    pub(super) fn frames(&mut self, count: u64, bytes: u64) {
        self.frames += count;
        self.bytes += bytes;
    }

    /// `count` interrupts came. Returns the pace if it is another one from now on.
    pub(super) fn interrupts(&mut self, count: u64) -> Option<Pace> {
        self.interrupts = self.interrupts.saturating_add(count);
        if self.interrupts < WINDOW {
            return None;
        }
        let is_stream = self.bytes >= STREAM_BYTES.saturating_mul(self.interrupts);
        let pace = match self.pace {
            _ if is_stream => Pace::Bulk,
            Pace::Prompt if self.frames >= STREAM_FRAMES.saturating_mul(self.interrupts) => Pace::Bulk,
            Pace::Bulk if self.frames <= SINGLE_FRAMES.saturating_mul(self.interrupts) => Pace::Prompt,
            same => same,
        };
        let before = self.pace;
        *self = Self { pace, ..Self::new() };
        (pace != before).then_some(pace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `frames` frames of `len` bytes before each of a window of interrupts.
    fn window(moderation: &mut Moderation, frames: u64, len: u32) -> Option<Pace> {
        let mut changes = (0..WINDOW).filter_map(|_| {
            moderation.frames(frames, frames * u64::from(len));
            moderation.interrupts(1)
        });
        let change = changes.next();
        assert_eq!(changes.next(), None, "one look a window");
        change
    }

    #[test]
    fn single_frames_are_told_promptly_whatever_their_size() {
        let mut moderation = Moderation::new();
        for len in [60, 1514] {
            assert_eq!(window(&mut moderation, 1, len), None);
        }
        assert_eq!(window(&mut moderation, 2, 60), None);
        assert_eq!(moderation.pace, Pace::Prompt);
    }

    #[test]
    fn a_stream_is_told_in_bulk_until_it_ends() {
        for (frames, len) in [(2, 1514), (4, 60)] {
            let mut moderation = Moderation::new();
            assert_eq!(window(&mut moderation, frames, len), Some(Pace::Bulk));
            // At the longer interval more of it comes at a time.
            assert_eq!(window(&mut moderation, 2 * frames, len), None);
            assert_eq!(window(&mut moderation, 1, len), Some(Pace::Prompt));
        }
    }

    #[test]
    fn a_rate_between_the_two_keeps_the_pace_it_has() {
        let mut moderation = Moderation::new();
        assert_eq!(window(&mut moderation, 3, 60), None);
        assert_eq!(window(&mut moderation, 4, 60), Some(Pace::Bulk));
        assert_eq!(window(&mut moderation, 3, 60), None);
    }

    #[test]
    fn no_count_a_card_could_report_overflows() {
        let mut moderation = Moderation::new();
        moderation.frames(1, u32::MAX.into());
        assert_eq!(moderation.interrupts(u64::MAX), None);
        assert_eq!(moderation.interrupts(u64::MAX), None);
    }
}
