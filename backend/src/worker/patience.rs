//! How long a worker looks for frames in vain before it sleeps.

use std::time::Duration;

/// How long a lane keeps its worker polling after the last frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// This long, then sleep. Zero sleeps at once.
    For(Duration),
    /// Never sleep.
    Forever,
}

/// The longer of two.
pub(super) fn longer(a: Patience, b: Patience) -> Patience {
    match (a, b) {
        (Patience::For(a), Patience::For(b)) => Patience::For(a.max(b)),
        _ => Patience::Forever,
    }
}
