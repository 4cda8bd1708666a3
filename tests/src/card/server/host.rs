//! The host around the card: it can want the card back, and tell of an error on the bus. The card has no part in either.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::card::Signal;

/// What a host tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// VFIO's request interrupt: the client is to let go.
    Request,
    /// VFIO's error interrupt: the bus reported an error (AER).
    Error,
}

/// Whom to tell. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Host(Arc<Mutex<Listeners>>);

#[derive(Default)]
struct Listeners {
    request: Option<Box<dyn Signal>>,
    error: Option<Box<dyn Signal>>,
}

impl Listeners {
    fn of(&mut self, event: Event) -> &mut Option<Box<dyn Signal>> {
        match event {
            Event::Request => &mut self.request,
            Event::Error => &mut self.error,
        }
    }
}

impl Host {
    /// Tells `event` through `signal` from now on, or no more.
    pub(super) fn listen(&self, event: Event, signal: Option<Box<dyn Signal>>) {
        *self.listeners().of(event) = signal;
    }

    /// The client has gone.
    pub(super) fn forget(&self) {
        *self.listeners() = Listeners::default();
    }

    /// Tells `event`.
    ///
    /// # Errors
    ///
    /// A word for the test that asked, if no client listens.
    pub(super) fn tell(&self, event: Event) -> Result<(), String> {
        match self.listeners().of(event) {
            Some(signal) => {
                signal.signal();
                Ok(())
            }
            None => Err("no client listens".to_owned()),
        }
    }

    fn listeners(&self) -> MutexGuard<'_, Listeners> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
