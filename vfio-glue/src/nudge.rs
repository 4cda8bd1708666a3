//! Gets a thread out of a system call that will not end.
//!
//! An eventfd of a front-end's can be made blocking behind our back, since its flags are shared, and filled: a write
//! to it then waits for ever. A signal with an empty handler ends the call with EINTR.
//!
//! Read with: signal(7), "Interruption of system calls by signal handlers"; tgkill(2).

#![expect(
    unsafe_code,
    reason = "installs a signal handler and sends a signal to a thread"
)]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

/// Ignored unless somebody installs a handler, so that a nudge too early does nothing.
const SIGNAL: libc::c_int = libc::SIGURG;

/// Names a thread of this process, to be nudged.
#[derive(Clone, Copy, Debug)]
pub struct ThreadId(libc::pid_t);

impl ThreadId {
    /// The calling thread.
    pub fn current() -> Self {
        // SAFETY: gettid needs nothing and cannot fail.
        Self(unsafe { libc::gettid() })
    }

    /// Interrupts the system call the thread is in, if it is in one. A thread that has ended is left alone.
    pub fn nudge(self) {
        // SAFETY: getpid needs nothing.
        let process = unsafe { libc::getpid() };
        // SAFETY: tgkill takes numbers; one that names no thread of this process any more is an error, not a signal to
        // somebody else.
        unsafe { libc::syscall(libc::SYS_tgkill, process, self.0, SIGNAL) };
    }
}

/// Installs the empty handler. Later calls change nothing.
///
/// # Errors
///
/// The system's answer if it cannot be installed.
pub fn install() -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: the structure is zeroed, which is a valid `sigaction`, and is ours alone.
    let fields = unsafe { action.assume_init_mut() };
    // No SA_RESTART: interrupting is the purpose.
    fields.sa_sigaction = handler as *const () as usize;
    // SAFETY: the handler does nothing; the old action is not wanted.
    let result = unsafe { libc::sigaction(SIGNAL, fields, ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
