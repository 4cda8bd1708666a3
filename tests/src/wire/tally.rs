//! Counts what became of the frames of a run.

use std::fmt;

use serde::Serialize;

use super::frame::Seen;

/// What arrived of a run, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Frames sent, or announced to the receiver.
    pub expected: u64,
    /// Different frames that arrived intact.
    pub intact: u64,
    /// Frames that arrived once more.
    pub duplicated: u64,
    /// Frames that arrived after one sent later.
    pub reordered: u64,
    /// Frames of the run whose bytes are not those sent.
    pub corrupt: u64,
    /// Bytes of the intact frames, without FCS.
    pub bytes: u64,
    #[serde(skip)]
    arrived: Vec<u64>,
    #[serde(skip)]
    next: u64,
}

impl Tally {
    /// Takes one received frame into account.
    pub fn count(&mut self, seen: Seen, len_bytes: usize) {
        let sequence = match seen {
            Seen::Intact(sequence) => sequence,
            Seen::Corrupt => {
                self.corrupt += 1;
                return;
            }
            Seen::Probe | Seen::Foreign => return,
        };
        if !self.mark(sequence) {
            self.duplicated += 1;
            return;
        }
        self.intact += 1;
        self.bytes += len_bytes as u64;
        match sequence < self.next {
            true => self.reordered += 1,
            false => self.next = sequence + 1,
        }
    }

    /// Frames that were to come and did not.
    pub fn missing(&self) -> u64 {
        self.expected.saturating_sub(self.intact)
    }

    /// One more than the latest frame that came: how many there were, as far as a receiver can know.
    pub fn highest(&self) -> u64 {
        self.next
    }

    /// Whether every frame came, once, in order and unaltered.
    pub fn is_perfect(&self) -> bool {
        let Self {
            expected,
            intact,
            duplicated,
            reordered,
            corrupt,
            ..
        } = *self;
        expected == intact && duplicated == 0 && reordered == 0 && corrupt == 0
    }

    /// Notes that `sequence` arrived; false if it had before.
    fn mark(&mut self, sequence: u64) -> bool {
        let word = usize::try_from(sequence / 64).expect("64-bit machine");
        if self.arrived.len() <= word {
            self.arrived.resize(word + 1, 0);
        }
        let bit = 1 << (sequence % 64);
        let fresh = self.arrived[word] & bit == 0;
        self.arrived[word] |= bit;
        fresh
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} frames intact, missing {}, duplicated {}, reordered {}, corrupt {}",
            self.intact,
            self.expected,
            self.missing(),
            self.duplicated,
            self.reordered,
            self.corrupt
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally_of(sequences: &[u64], expected: u64) -> Tally {
        let mut tally = Tally {
            expected,
            ..Tally::default()
        };
        for sequence in sequences {
            tally.count(Seen::Intact(*sequence), 60);
        }
        tally
    }

    #[test]
    fn all_in_order_is_perfect() {
        let tally = tally_of(&[0, 1, 2], 3);
        assert!(tally.is_perfect());
        assert_eq!(tally.bytes, 180);
    }

    #[test]
    fn a_hole_is_missing_and_not_reordered() {
        let tally = tally_of(&[0, 2, 3], 4);
        assert_eq!((tally.missing(), tally.reordered, tally.duplicated), (1, 0, 0));
        assert!(!tally.is_perfect());
    }

    #[test]
    fn a_late_frame_is_reordered_and_a_second_one_duplicated() {
        let tally = tally_of(&[1, 0, 1], 2);
        assert_eq!((tally.missing(), tally.reordered, tally.duplicated), (0, 1, 1));
    }

    #[test]
    fn probes_and_strangers_count_for_nothing() {
        let mut tally = Tally::default();
        tally.count(Seen::Probe, 60);
        tally.count(Seen::Foreign, 60);
        assert_eq!(tally, Tally::default());
        tally.count(Seen::Corrupt, 60);
        assert_eq!(tally.corrupt, 1);
    }
}
