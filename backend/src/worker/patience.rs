//! How long a worker looks for frames in vain before it sleeps.
//!
//! Patience is each lane's own: it begins anew with every frame of that lane, and with no other's. A worker looks on
//! while one of its lanes has patience left. So a port that wants long polling pays for it with its own frames only,
//! except for one that polls for ever: nobody on its worker sleeps, and it should have a worker to itself.

use std::time::{Duration, Instant};

/// How long a lane keeps its worker polling after the last frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// This long, then sleep. Zero sleeps at once.
    For(Duration),
    /// Never sleep.
    Forever,
}

/// A lane's patience, and how long it has been tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vigil {
    pub(super) patience: Patience,
    /// Since when the lane has been seen idle with the clock in hand. `None` after a frame: a busy worker reads no clock.
    since: Option<Instant>,
}

impl Vigil {
    pub(super) fn new(patience: Patience) -> Self {
        Self {
            patience,
            since: None,
        }
    }

    /// The lane moved something.
    #[inline]
    pub(super) fn renew(&mut self) {
        self.since = None;
    }

    /// Whether there is patience left. The clock, which all lanes of a look share, is read only if it matters.
    pub(super) fn lasts(&mut self, now: &mut impl FnMut() -> Instant) -> bool {
        match self.patience {
            Patience::Forever => true,
            Patience::For(time) if time.is_zero() => false,
            Patience::For(time) => {
                let now = now();
                now.saturating_duration_since(*self.since.get_or_insert(now)) < time
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn patience_runs_from_the_lanes_own_last_frame() {
        let begun = Instant::now();
        let at = |ms: u32| move || begun + ms * MILLISECOND;
        let mut vigil = Vigil::new(Patience::For(10 * MILLISECOND));
        assert!(vigil.lasts(&mut at(0)));
        assert!(vigil.lasts(&mut at(9)));
        assert!(!vigil.lasts(&mut at(10)));
        assert!(!vigil.lasts(&mut at(11)), "it does not come back by itself");
        vigil.renew();
        assert!(vigil.lasts(&mut at(12)));
        assert!(!vigil.lasts(&mut at(22)));
    }

    #[test]
    fn a_lane_that_never_or_always_polls_needs_no_clock() {
        let mut no_clock = || -> Instant { unreachable!("the clock was read") };
        assert!(!Vigil::new(Patience::For(Duration::ZERO)).lasts(&mut no_clock));
        assert!(Vigil::new(Patience::Forever).lasts(&mut no_clock));
    }
}
