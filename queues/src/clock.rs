//! Time, as a thing that tests can own.

use std::time::{Duration, Instant};

/// A clock to wait by. The card driver bounds every wait with one.
pub trait Clock: Send + Sync {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;

    /// Lets `duration` pass.
    fn sleep(&self, duration: Duration);

    /// Asks `ready` every `step` until it says yes or `bound` has passed; says which.
    ///
    /// `ready` is asked once more after the bound, so a caller that was not scheduled for long does not give up
    /// on something that happened meanwhile.
    fn wait_until(&self, bound: Duration, step: Duration, ready: &mut dyn FnMut() -> bool) -> bool {
        let end = self.now() + bound;
        loop {
            let late = self.now() >= end;
            if ready() {
                return true;
            }
            if late {
                return false;
            }
            self.sleep(step);
        }
    }
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
