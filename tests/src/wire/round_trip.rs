//! One frame at a time there and back, and how long each took.

use std::fmt;
use std::time::{Duration, Instant};

use super::exchange::{Receiver, Run, comes_up};
use super::frame::Seen;
use super::packet_socket::{PacketSocket, WireError};

/// What became of frames of which each was sent when the one before had come back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundTrips {
    /// Of those that came back unaltered, in the order sent.
    times: Vec<Duration>,
    /// Frames that did not, or not in time.
    pub lost: u64,
}

impl RoundTrips {
    /// The time that `percent` of a hundred round trips took at most; none if none came back.
    pub fn percentile(&self, percent: usize) -> Option<Duration> {
        let mut sorted = self.times.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent.min(100)).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    /// How many came back.
    pub fn count(&self) -> usize {
        self.times.len()
    }
}

impl fmt::Display for RoundTrips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |percent| {
            self.percentile(percent)
                .map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
        };
        write!(
            f,
            "{} round trips, {} lost, median {:.1} us, p99 {:.1} us",
            self.count(),
            self.lost,
            us(50),
            us(99)
        )
    }
}

/// Sends a frame at `socket` when the one before has come back there, from whoever sends them back.
///
/// The first is sent when a probe has come back. One that does not come back within `run.idle` is lost, and the next one
/// is sent. The time is from before the send to after the receipt; in between this thread sleeps in `poll`.
///
/// # Errors
///
/// [`WireError`] if the interface fails. On a path that never comes up one frame is lost.
pub fn round_trips(socket: &PacketSocket, run: &Run) -> Result<RoundTrips, WireError> {
    let mut trips = RoundTrips::default();
    if !comes_up(socket, socket, run)? {
        trips.lost = 1;
        return Ok(trips);
    }
    let mut receiver = Receiver::new(socket, run.pattern);
    let mut frame = Vec::new();
    let begun = Instant::now();
    let mut sequence = 0;
    while !run.limit.is_reached(sequence, begun) {
        run.pattern.write(sequence, &mut frame);
        let sent = Instant::now();
        let mut back = None;
        if socket.send(&frame)? {
            while back.is_none() && socket.wait(run.idle.saturating_sub(sent.elapsed()))? {
                back = receiver.sees(Seen::Intact(sequence))?.then(|| sent.elapsed());
            }
        }
        match back {
            Some(time) => trips.times.push(time),
            None => trips.lost += 1,
        }
        sequence += 1;
    }
    Ok(trips)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_times() {
        let of = |us: &[u64]| RoundTrips {
            times: us.iter().copied().map(Duration::from_micros).collect(),
            lost: 0,
        };
        let us = |trips: &RoundTrips, percent| trips.percentile(percent).map(|time| time.as_micros());
        let hundred: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(us(&of(&hundred), 50), Some(50));
        assert_eq!(us(&of(&hundred), 99), Some(99));
        assert_eq!(us(&of(&hundred), 100), Some(100));
        assert_eq!(us(&of(&[7]), 50), Some(7));
        assert_eq!(us(&of(&[1, 2, 9]), 99), Some(9));
        assert_eq!(us(&of(&[]), 50), None);
        assert_eq!(
            of(&[10, 20, 30]).to_string(),
            "3 round trips, 0 lost, median 20.0 us, p99 30.0 us"
        );
    }
}
