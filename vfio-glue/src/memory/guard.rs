//! What keeps a front-end that truncates its memory file from killing the process.
//!
//! A mapping checked to be long enough can lose its end afterwards: touching it then raises SIGBUS, which ends the
//! process and with it every other guest. The guard puts empty memory of ours in the place of everything from the
//! missing page to the end of that mapping, and marks the mapping: its guest reads zeroes from then on, and whoever
//! serves it finds the mark and ends its session. Only that guest is the worse for it.
//!
//! All of the rest and not one page: with a hole for each page touched, a guest could use up the number of mappings
//! a process may have, and the next fault would end it all the same.
//!
//! The handler reads atomics and calls mmap(2), nothing else; it may run in any thread at any moment. Each slot has a
//! sequence number, so it acts only on a whole record that is in use: a record that changes under its eyes cannot be
//! that of the mapping whose use brought it here, which is alive until that use ends.
//!
//! Read with: sigaction(2), SA_SIGINFO and the codes of SIGBUS; mmap(2), MAP_FIXED.

#![expect(unsafe_code, reason = "installs a signal handler and replaces pages in it")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

/// How many mappings this process can have guarded, and so how many at all.
pub(crate) const SLOTS: usize = 4096;

/// One guarded mapping, or room for one.
struct Slot {
    /// The record's version in steps of [`STEP`], and in the low bits what it is good for.
    sequence: AtomicU64,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    /// Points into the [`Guarded`] that holds the slot.
    lost: AtomicPtr<AtomicBool>,
}

const FREE: u64 = 0;
const FILLING: u64 = 1;
const IN_USE: u64 = 2;
const STEP: u64 = 4;

static GUARDED: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];
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

/// How many pages had to be replaced so far because their file was cut short. Whose they were, its mappings tell.
pub fn replaced_pages() -> u64 {
    REPLACED.load(Ordering::Relaxed)
}

/// A guarded range. Ends with this value, before the range is unmapped.
#[derive(Debug)]
pub(super) struct Guarded {
    slot: usize,
    lost: Arc<AtomicBool>,
}

/// Guards `len` bytes at `start`, mapped in pages of `page` bytes. `lost` is set when bytes of it had to be replaced.
///
/// `None` if there is no slot left.
pub(super) fn guard(start: usize, len: usize, page: usize, lost: &Arc<AtomicBool>) -> Option<Guarded> {
    let record = Record {
        start,
        len,
        page,
        lost: Arc::as_ptr(lost).cast_mut(),
    };
    let slot = GUARDED.iter().position(|slot| slot.try_fill(&record))?;
    Some(Guarded {
        slot,
        lost: Arc::clone(lost),
    })
}

impl Guarded {
    /// Whether bytes of the range had to be replaced.
    pub(super) fn has_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// The mark, for another mapping of the same memory.
    pub(super) fn mark(&self) -> &Arc<AtomicBool> {
        &self.lost
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        GUARDED[self.slot].free();
    }
}

/// What a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    start: usize,
    len: usize,
    page: usize,
    lost: *mut AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Self {
            sequence: AtomicU64::new(FREE),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            lost: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Takes the slot for `record` if it is free.
    fn try_fill(&self, record: &Record) -> bool {
        let sequence = self.sequence.load(Ordering::Relaxed);
        let taken = sequence % STEP == FREE
            && self
                .sequence
                .compare_exchange(sequence, sequence + FILLING, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        if !taken {
            return false;
        }
        // A reader that sees one of the new fields sees that the sequence has moved: pairs with its fence.
        fence(Ordering::Release);
        self.start.store(record.start, Ordering::Relaxed);
        self.len.store(record.len, Ordering::Relaxed);
        self.page.store(record.page, Ordering::Relaxed);
        self.lost.store(record.lost, Ordering::Relaxed);
        // The fields come before the sequence that vouches for them.
        self.sequence.store(sequence + IN_USE, Ordering::Release);
        true
    }

    /// Gives the slot back. Its record is never acted on again.
    fn free(&self) {
        let version = self.sequence.load(Ordering::Relaxed) / STEP;
        self.sequence
            .store((version.wrapping_add(1)).wrapping_mul(STEP), Ordering::Release);
    }

    /// The whole record, if the slot is in use and was so all the while.
    fn read(&self) -> Option<Record> {
        let sequence = self.sequence.load(Ordering::Acquire);
        if sequence % STEP != IN_USE {
            return None;
        }
        let record = Record {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            page: self.page.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        };
        // The fields are read before the sequence is read again: pairs with the fence in `try_fill`.
        fence(Ordering::Acquire);
        (self.sequence.load(Ordering::Relaxed) == sequence).then_some(record)
    }
}

impl Record {
    fn holds(&self, address: usize) -> bool {
        address.wrapping_sub(self.start) < self.len
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo that lives until the handler returns.
    let info = unsafe { &*info };
    // A page that is not there, and nothing else: broken memory and signals that were sent are not ours to hide.
    let page_is_missing = info.si_code == libc::BUS_ADRERR;
    if page_is_missing {
        // SAFETY: SIGBUS with this code fills the address.
        let address = unsafe { info.si_addr() }.addr();
        if replace_rest(address) {
            return;
        }
    }
    // SAFETY: restoring the default action needs nothing and is allowed in a handler.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    if !page_is_missing {
        // It may not come again by itself.
        // SAFETY: allowed in a handler; the signal is not blocked in here (SA_NODEFER), so it ends the process now.
        unsafe { libc::raise(signal) };
    }
}

/// Puts empty memory from the page of `address` to the end of its mapping, if it is in a guarded one.
fn replace_rest(address: usize) -> bool {
    let found = GUARDED.iter().find_map(|slot| {
        let record = slot.read()?;
        record.holds(address).then_some(record)
    });
    let Some(record) = found else {
        return false;
    };
    let skip = address - record.start;
    let first = skip - skip % record.page;
    // Where the rest is refused (strict overcommit), the one page keeps the process alive.
    let replaced = [record.len - first, record.page]
        .into_iter()
        .find(|len| map_empty(record.start + first, *len));
    let Some(len) = replaced else {
        return false;
    };
    REPLACED.fetch_add((len / record.page) as u64, Ordering::Relaxed);
    // SAFETY: the mark lives as long as the guard, and so as the mapping that is in use by whoever faulted.
    let lost = unsafe { &*record.lost };
    lost.store(true, Ordering::Relaxed);
    true
}

/// Replaces `len` bytes at `at`, whole pages of one guarded mapping in use.
fn map_empty(at: usize, len: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the errno of this thread is a place of its own. What was interrupted may be about to read it.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { errno.read() };
    // SAFETY: the pages lie in a mapping of ours that is alive: its guard ends before it is unmapped, and whoever
    // faulted is still using it. Its file has lost bytes, so its guest is not served from it any more.
    let mapped = unsafe { libc::mmap(ptr::without_provenance_mut(at), len, protection, flags, -1, 0) };
    // SAFETY: as above.
    unsafe { errno.write(before) };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use rustix::process::{Resource, Rlimit, Signal, getpid, kill_process, setrlimit};

    use super::*;
    use crate::memory::{FileError, HostRange};

    const PAGE: u64 = 4096;

    fn memfd(pages: u64) -> File {
        let file = File::from(rustix::fs::memfd_create("cut", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        file
    }

    /// Runs `body` in a process of its own, which it may exhaust or end: starts this very test once more, which gets
    /// here again. Returns how that process ended, or nothing in that process.
    fn in_a_process_of_its_own(test: &str, body: impl FnOnce()) -> Option<ExitStatus> {
        const ALONE: &str = "VUV_TEST_ALONE";
        if std::env::var_os(ALONE).is_some() {
            let no_core = Rlimit {
                current: Some(0),
                maximum: Some(0),
            };
            setrlimit(Resource::Core, no_core).unwrap();
            body();
            return None;
        }
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("memory::guard::tests::{test}")])
            .env(ALONE, "1")
            .status();
        Some(status.unwrap())
    }

    #[test]
    fn a_file_cut_short_under_us_reads_as_zeroes_and_its_mapping_says_so() {
        install().unwrap();
        let file = memfd(4);
        let range = HostRange::of_file(&file, 0, 4 * PAGE).unwrap();
        let other = HostRange::of_file(&memfd(4), 0, 4 * PAGE).unwrap();
        range.whole().copy_from(&[7; 4 * 4096]);
        file.set_len(2 * PAGE).unwrap();
        assert!(!range.lost_memory(), "nothing was missed yet");

        let before = replaced_pages();
        let mut seen = [1; 16];
        range.slice(2 * 4096 + 8, 16).unwrap().copy_to(&mut seen);
        assert_eq!(seen, [0; 16]);
        range.slice(3 * 4096, 4096).unwrap().copy_from(&[9; 4096]);
        assert!(replaced_pages() - before >= 2);
        range.slice(4096, 16).unwrap().copy_to(&mut seen);
        assert_eq!(seen, [7; 16], "what is still in the file is untouched");
        assert!(range.lost_memory() && range.sub(0, 16).unwrap().lost_memory());
        assert!(!other.lost_memory(), "another's memory is not held against it");
    }

    #[test]
    fn a_large_file_cut_short_does_not_use_up_the_mappings_of_the_process() {
        let test = "a_large_file_cut_short_does_not_use_up_the_mappings_of_the_process";
        let ended = in_a_process_of_its_own(test, || {
            install().unwrap();
            let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
            let limit: u64 = limit.trim().parse().unwrap();
            // One page of each pair is left alone, so each replaced alone would cost two mappings.
            let pages = 2 * limit + 1000;
            let (up, down) = (memfd(pages), memfd(pages));
            let ranges = [&up, &down].map(|file| HostRange::of_file(file, 0, pages * PAGE).unwrap());
            for file in [&up, &down] {
                file.set_len(PAGE).unwrap();
            }
            let touch = |range: &HostRange, page: u64| {
                let at = usize::try_from(page * PAGE).unwrap();
                range.slice(at, 1).unwrap().copy_to(&mut [1]);
            };
            (1..pages).step_by(2).for_each(|page| touch(&ranges[0], page));
            // Backwards there is a fault for each, and each time the tail is one mapping again.
            (1..pages)
                .rev()
                .step_by(2)
                .for_each(|page| touch(&ranges[1], page));
            let mappings = std::fs::read_to_string("/proc/self/maps")
                .unwrap()
                .lines()
                .count();
            assert!(mappings < 1000, "{mappings} mappings");
        });
        assert!(ended.is_none_or(|status| status.success()));
    }

    #[test]
    fn with_no_slot_left_a_mapping_is_refused_and_not_used_unguarded() {
        let test = "with_no_slot_left_a_mapping_is_refused_and_not_used_unguarded";
        let ended = in_a_process_of_its_own(test, || {
            let file = memfd(1);
            let map = || HostRange::of_file(&file, 0, PAGE);
            let mut held: Vec<HostRange> = (0..SLOTS).map(|_| map().unwrap()).collect();
            let refused = map().unwrap_err();
            assert!(matches!(
                refused,
                FileError::TooManyMappings {
                    need: 1,
                    limit: SLOTS
                }
            ));
            held.pop();
            assert!(map().is_ok());
        });
        assert!(ended.is_none_or(|status| status.success()));
    }

    #[test]
    fn a_signal_that_somebody_sends_ends_the_process_as_ever() {
        let test = "a_signal_that_somebody_sends_ends_the_process_as_ever";
        let ended = in_a_process_of_its_own(test, || {
            install().unwrap();
            kill_process(getpid(), Signal::BUS).unwrap();
            std::thread::park();
        });
        assert!(ended.is_none_or(|status| status.signal() == Some(libc::SIGBUS)));
    }

    #[test]
    fn a_mapping_of_no_concern_that_is_cut_ends_the_process_as_ever() {
        let test = "a_mapping_of_no_concern_that_is_cut_ends_the_process_as_ever";
        let ended = in_a_process_of_its_own(test, || {
            install().unwrap();
            let file = memfd(1);
            let (protection, flags, fd) = (libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
            // SAFETY: a new mapping at a place the kernel picks.
            let at = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, fd, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            file.set_len(0).unwrap();
            // SAFETY: the page is mapped; that its file has lost it raises the signal this test is about.
            unsafe { at.cast::<u8>().read_volatile() };
        });
        assert!(ended.is_none_or(|status| status.signal() == Some(libc::SIGBUS)));
    }

    #[test]
    fn a_record_is_read_whole_or_not_at_all() {
        let slot = Slot::new();
        let record = |n: usize| Record {
            start: n,
            len: n,
            page: n,
            lost: ptr::null_mut(),
        };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = 0_u64;
                while !done.load(Ordering::Relaxed) || seen == 0 {
                    if let Some(read) = slot.read() {
                        assert_eq!((read.start, read.start), (read.len, read.page), "a torn record");
                        seen += 1;
                    }
                }
            });
            for n in 1..200_000 {
                assert!(slot.try_fill(&record(n)));
                assert!(!slot.try_fill(&record(n)), "a slot in use is not taken");
                slot.free();
                assert_eq!(slot.read(), None, "a freed record is not acted on");
            }
            assert!(slot.try_fill(&record(7)));
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
    }
}
