//! Eventfds and bounded waits: how kicks, calls and errors travel, and how a test waits for one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// An eventfd, non-blocking as QEMU and DPDK make them.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// Makes one that is not signalled.
    ///
    /// # Panics
    ///
    /// If the process is out of descriptors.
    pub fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd can be made"))
    }

    /// Makes one that holds all it can and blocks who adds to it: a trap for the device.
    ///
    /// # Panics
    ///
    /// If the process is out of descriptors.
    pub fn full() -> Self {
        let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd can be made");
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).expect("an eventfd takes its maximum");
        Self(event)
    }

    /// Fills it and has it block who adds to it, for everybody who holds it: a trap set after it was handed over.
    ///
    /// # Panics
    ///
    /// If its flags cannot be changed.
    pub fn fill_and_block(&self) {
        let set = |wanted: fn(OFlags) -> OFlags| {
            let flags = fcntl_getfl(&self.0).expect("an open descriptor has flags");
            fcntl_setfl(&self.0, wanted(flags)).expect("flags of our own descriptor");
        };
        set(|flags| flags | OFlags::NONBLOCK);
        // The other side may add at any moment: empty it until the maximum fits.
        while rustix::io::write(&self.0, &(u64::MAX - 1).to_ne_bytes()).is_err() {
            self.take();
        }
        set(|flags| flags - OFlags::NONBLOCK);
    }

    /// Signals once.
    ///
    /// # Panics
    ///
    /// If it was signalled 2^64 times unread.
    pub fn signal(&self) {
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).expect("an eventfd takes a signal");
    }

    /// Takes the signals that came and returns how many they were.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    /// Waits until it is signalled, leaving the signal in place; false if `limit` passes first.
    pub fn wait(&self, limit: Duration) -> bool {
        wait_readable(self.0.as_fd(), limit)
    }
}

impl Default for Event {
    fn default() -> Self {
        Self::new()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until `fd` can be read or has hung up; false if `limit` passes first.
///
/// # Panics
///
/// If poll itself fails.
pub fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    wait_for(fd, PollFlags::IN, limit)
}

/// Waits until `fd` takes more; false if `limit` passes first.
///
/// # Panics
///
/// If poll itself fails.
pub fn wait_writable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    wait_for(fd, PollFlags::OUT, limit)
}

fn wait_for(fd: BorrowedFd<'_>, what: PollFlags, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).expect("a bound in seconds");
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    loop {
        match poll(&mut fds, Some(&limit)) {
            Ok(ready) => return ready != 0,
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}
