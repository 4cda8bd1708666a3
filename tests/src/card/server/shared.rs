//! The card behind its mutex, kept on real time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::card::Card82576;

/// The card, as all threads of the process reach it.
pub(super) struct Shared {
    state: Mutex<State>,
    clock: Condvar,
    wire: Condvar,
}

struct State {
    card: Card82576,
    /// The real time the card's clock stands at.
    reached: Instant,
    /// When the clock thread will look by itself; `None` for not at all.
    alarm: Option<Instant>,
    wire_waits: bool,
}

impl State {
    fn catch_up(&mut self) {
        let now = Instant::now();
        self.card.advance(now - self.reached);
        self.reached = now;
    }
}

impl Shared {
    pub(super) fn new(card: Card82576) -> Self {
        let state = State {
            card,
            reached: Instant::now(),
            alarm: None,
            wire_waits: false,
        };
        Self {
            state: Mutex::new(state),
            clock: Condvar::new(),
            wire: Condvar::new(),
        }
    }

    /// Runs `work` on the card, brought to the present, and wakes whom that concerns.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Card82576) -> T) -> T {
        let mut state = self.lock();
        state.catch_up();
        let result = work(&mut state.card);
        let due = state.card.next_deadline().map(|wait| state.reached + wait);
        // Register writes are many and deadlines few: wake the clock thread only for an earlier one.
        if due.is_some_and(|due| state.alarm.is_none_or(|alarm| due < alarm)) {
            self.clock.notify_one();
        }
        if state.wire_waits && state.card.can_receive() {
            self.wire.notify_one();
        }
        result
    }

    /// Blocks until the card would take a frame.
    pub(super) fn wait_for_room(&self) {
        let mut state = self.lock();
        while !state.card.can_receive() {
            state.wire_waits = true;
            state = self.wire.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.wire_waits = false;
    }

    /// Lets time pass for the card, for ever.
    pub(super) fn keep_time(&self) {
        let mut state = self.lock();
        loop {
            state.catch_up();
            // Not less than a scheduler tick's worth, so that a deadline just missed does not spin.
            let wait = state
                .card
                .next_deadline()
                .map(|wait| wait.max(Duration::from_micros(20)));
            state.alarm = wait.map(|wait| state.reached + wait);
            state = match wait {
                Some(wait) => {
                    self.clock
                        .wait_timeout(state, wait)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self.clock.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// A panic while the card was locked left it as good as it was: it has no state that spans calls.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
