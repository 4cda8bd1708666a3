//! What keeps a front-end that truncates its memory file from killing the process.
//!
//! A mapping checked to be long enough can lose its end afterwards: touching it then raises SIGBUS, which ends the
//! process and with it every other guest. The guard puts an empty page of ours in the hole instead. The guest reads
//! zeroes where it took its memory away, and only it is the worse for it.
//!
//! The handler touches atomics and calls mmap(2), nothing else; it may run in any thread at any moment.
//!
//! Read with: sigaction(2), mmap(2).

#![expect(unsafe_code, reason = "installs a signal handler and replaces pages in it")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How many mappings can be guarded at once. More are used unguarded.
pub(crate) const SLOTS: usize = 4096;

struct Slot {
    /// First address; 0 for a free slot, 1 while it is being filled.
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
}

const FREE: usize = 0;
const RESERVED: usize = 1;

static GUARDED: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(FREE),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
    }
}; SLOTS];
static REPLACED: AtomicU64 = AtomicU64::new(0);

/// Installs the guard for this process. Later calls change nothing.
///
/// # Errors
///
/// The system's answer if the handler cannot be installed.
pub fn install() -> io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    let action_ptr = action.as_mut_ptr();
    // SAFETY: the structure is zeroed, which is a valid `sigaction`, and is ours alone.
    let fields = unsafe { &mut *action_ptr };
    fields.sa_sigaction = handler as *const () as usize;
    fields.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the handler has the signature SA_SIGINFO asks for and calls only what a handler may; the old action is
    // not wanted.
    let result = unsafe { libc::sigaction(libc::SIGBUS, action_ptr, ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How many pages had to be replaced so far because their file was cut short.
pub fn replaced_pages() -> u64 {
    REPLACED.load(Ordering::Relaxed)
}

/// A guarded range. Ends with this value, before the range is unmapped.
#[derive(Debug)]
pub(super) struct Guarded(Option<usize>);

/// Guards `len` bytes at `start`, mapped in pages of `page` bytes.
pub(super) fn guard(start: usize, len: usize, page: usize) -> Guarded {
    for (index, slot) in GUARDED.iter().enumerate() {
        let taken = slot
            .start
            .compare_exchange(FREE, RESERVED, Ordering::Acquire, Ordering::Relaxed);
        if taken.is_ok() {
            slot.len.store(len, Ordering::Relaxed);
            slot.page.store(page, Ordering::Relaxed);
            // The handler reads `start` first and then the rest.
            slot.start.store(start, Ordering::Release);
            return Guarded(Some(index));
        }
    }
    tracing::warn!(
        slots = SLOTS,
        "too many mappings to guard them all against truncation"
    );
    Guarded(None)
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(slot) = self.0.and_then(|index| GUARDED.get(index)) {
            slot.start.store(FREE, Ordering::Release);
        }
    }
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo that lives until the handler returns.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS fills the address.
    let address = unsafe { info.si_addr() }.addr();
    if !replace_page(address) {
        // Not ours: the next fault ends the process as it would have without us.
        // SAFETY: restoring the default action needs nothing and is allowed in a handler.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// Puts an empty page where `address` is, if it is in a guarded range.
fn replace_page(address: usize) -> bool {
    for slot in &GUARDED {
        let start = slot.start.load(Ordering::Acquire);
        let (len, page) = (
            slot.len.load(Ordering::Relaxed),
            slot.page.load(Ordering::Relaxed),
        );
        if start <= RESERVED || address < start || address - start >= len {
            continue;
        }
        let at = start + (address - start) / page * page;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the page lies in a mapping of ours that is alive: its guard ends before it is unmapped, and whoever
        // faulted is still using it. Its bytes are gone, so nothing is lost by replacing it.
        let mapped = unsafe { libc::mmap(ptr::without_provenance_mut(at), page, protection, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        REPLACED.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::memory::HostRange;

    #[test]
    fn a_file_cut_short_under_us_reads_as_zeroes_and_kills_nobody() {
        install().unwrap();
        let file = File::from(rustix::fs::memfd_create("cut", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4 * 4096).unwrap();
        let range = HostRange::of_file(&file, 0, 4 * 4096).unwrap();
        range.whole().copy_from(&[7; 4 * 4096]);
        file.set_len(2 * 4096).unwrap();

        let before = replaced_pages();
        let mut seen = [1; 16];
        range.slice(3 * 4096 + 8, 16).unwrap().copy_to(&mut seen);
        assert_eq!(seen, [0; 16]);
        range.slice(2 * 4096, 4096).unwrap().copy_from(&[9; 4096]);
        assert_eq!(replaced_pages() - before, 2);
        range.slice(4096, 16).unwrap().copy_to(&mut seen);
        assert_eq!(seen, [7; 16], "what is still in the file is untouched");
    }
}
