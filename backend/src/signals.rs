//! When to stop: SIGTERM or SIGINT, seen by every thread that waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Readable from the moment the process is to stop, for ever after.
#[derive(Clone, Debug)]
pub struct Stop(Arc<OwnedFd>);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The descriptor waited for is ready, or was closed by the other side.
    Ready,
    /// The process is to stop.
    Stop,
    /// The time is over.
    Timeout,
}

impl Stop {
    /// A stop that has not been asked for.
    ///
    /// # Errors
    ///
    /// The system's answer if it gives no descriptor.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?)))
    }

    /// Asks for it when SIGTERM or SIGINT comes.
    ///
    /// # Errors
    ///
    /// The system's answer if the signals cannot be caught.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let mut signals = Signals::new([SIGTERM, SIGINT])?;
        let stop = self.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    tracing::info!(signal, "stopping");
                    stop.ask();
                }
            })?;
        Ok(())
    }

    /// Asks everybody to stop.
    pub fn ask(&self) {
        // A full counter has been asked before.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Whether it was asked for.
    pub fn is_asked(&self) -> bool {
        self.wait(None, Some(Duration::ZERO)) == Woken::Stop
    }

    /// Waits until `fd` is readable or closed by its peer, the process is to stop, or `bound` has passed.
    pub fn wait(&self, fd: Option<BorrowedFd<'_>>, bound: Option<Duration>) -> Woken {
        let bound = bound.and_then(|bound| Timespec::try_from(bound).ok());
        loop {
            let mut fds = vec![PollFd::new(&self.0, PollFlags::IN)];
            if let Some(fd) = &fd {
                fds.push(PollFd::new(fd, PollFlags::IN | PollFlags::RDHUP));
            }
            match poll(&mut fds, bound.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "poll failed");
                    return Woken::Stop;
                }
                Ok(0) => return Woken::Timeout,
                Ok(_) if !fds[0].revents().is_empty() => return Woken::Stop,
                Ok(_) => return Woken::Ready,
            }
        }
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
