//! How much memory the kernel counts as locked now, and how much it lets this process lock.
//!
//! ```text
//! /proc/PID/status, RLIMIT_MEMLOCK, what maps with no device will pin ──▶ LockedMemory ──▶ map/budget.rs
//! ```
//!
//! type1 counts what a process has pinned as its locked memory (VmLck). iommufd counts per user, over all processes;
//! what of it can be seen is the sum of VmPin over the processes of that user. Those that other users hide, and
//! what else the kernel counts per user (io_uring's buffers, AF_XDP's), cannot be seen: the kernel may refuse what
//! fits our count. A process with CAP_IPC_LOCK has no limit, and iommufd does not count it.
//!
//! Read with: Linux `drivers/iommu/iommufd/pages.c` (accounting), `drivers/vfio/vfio_iommu_type1.c`; TRAPS 28, 48.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, getpid, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// How a back end's pins are counted against the limit on locked memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accounting {
    /// Nothing is pinned.
    None,
    /// All pins of this process (type1). The same bytes mapped twice count twice.
    PerProcess,
    /// All pins of this process's user (iommufd).
    PerUser,
}

/// Bytes of locked memory at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockedMemory {
    /// Locked by this process, through all of its maps.
    pub pinned: u64,
    /// Mapped on maps of this process that have no device: locked when their first one comes.
    pub owed: u64,
    /// Locked by other processes of this user, where they count.
    pub elsewhere: u64,
    /// The limit.
    pub limit: u64,
}

impl LockedMemory {
    /// What the kernel counts now, or `None` where there is no limit.
    pub fn now(accounting: Accounting) -> Option<Self> {
        let unlimited = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
        let limit = getrlimit(Resource::Memlock).current.filter(|_| !unlimited)?;
        let owed = owed_by(accounting)?.load(Ordering::Relaxed);
        let (pinned, elsewhere) = counted(Path::new("/proc"), &getpid().to_string(), accounting);
        Some(Self {
            pinned,
            owed,
            elsewhere,
            limit,
        })
    }
}

/// What the kernel has counted as this process's locked memory, and as pinned by it, in bytes: VmLck and VmPin of
/// `/proc/self/status`. type1 adds to the first and iommufd to the second; 0 where the kernel does not tell.
pub fn own_locked_bytes() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    (kib_of(&status, "VmLck:"), kib_of(&status, "VmPin:"))
}

/// What this process and the others hold, as (ours, theirs). What cannot be read counts as nothing: the kernel has
/// the last word.
fn counted(proc: &Path, own: &str, accounting: Accounting) -> (u64, u64) {
    let status = |name: &str| fs::read_to_string(proc.join(name).join("status")).ok();
    let Some(ours) = status(own) else {
        return (0, 0);
    };
    match accounting {
        Accounting::None => (0, 0),
        Accounting::PerProcess => (kib_of(&ours, "VmLck:"), 0),
        Accounting::PerUser => {
            let user = word_of(&ours, "Uid:");
            let names = fs::read_dir(proc).into_iter().flatten().flatten();
            let theirs = names
                .filter_map(|entry| entry.file_name().into_string().ok())
                .filter(|name| name != own && name.bytes().all(|byte| byte.is_ascii_digit()))
                .filter_map(|name| status(&name))
                .filter(|status| word_of(status, "Uid:") == user && !locks_without_limit(status))
                .map(|status| kib_of(&status, "VmPin:"))
                .fold(0, u64::saturating_add);
            (kib_of(&ours, "VmPin:"), theirs)
        }
    }
}

/// The first word after `key` in `/proc/PID/status`: of `Uid:` the real one, which is who pins are counted for.
fn word_of<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()
}

/// A size in `/proc/PID/status`, in bytes.
fn kib_of(status: &str, key: &str) -> u64 {
    let kib = word_of(status, key).and_then(|word| word.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

fn locks_without_limit(status: &str) -> bool {
    let effective = word_of(status, "CapEff:").and_then(|word| u64::from_str_radix(word, 16).ok());
    effective.is_some_and(|bits| bits & CapabilitySet::IPC_LOCK.bits() != 0)
}

/// What all maps of this process with no device will pin, by the way it is counted.
fn owed_by(accounting: Accounting) -> Option<&'static AtomicU64> {
    static PER_PROCESS: AtomicU64 = AtomicU64::new(0);
    static PER_USER: AtomicU64 = AtomicU64::new(0);
    match accounting {
        Accounting::None => None,
        Accounting::PerProcess => Some(&PER_PROCESS),
        Accounting::PerUser => Some(&PER_USER),
    }
}

/// One back end's part of what will be pinned when first devices come. Nothing once it is dropped.
#[derive(Debug)]
pub(super) struct Owed {
    accounting: Accounting,
    bytes: u64,
}

impl Owed {
    pub(super) fn new(accounting: Accounting) -> Self {
        Self { accounting, bytes: 0 }
    }

    /// `bytes` are mapped and not pinned yet.
    pub(super) fn set(&mut self, bytes: u64) {
        if let Some(sum) = owed_by(self.accounting) {
            // Each `Owed` takes back what it has added and nothing else, so the sum is right whatever the order.
            sum.fetch_add(bytes.wrapping_sub(self.bytes), Ordering::Relaxed);
            self.bytes = bytes;
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like `/proc`: process, real user, VmLck and VmPin in KiB, effective capabilities.
    fn proc(processes: &[(&str, u32, u64, u64, &str)]) -> tempfile::TempDir {
        let proc = tempfile::tempdir().unwrap();
        for (name, user, locked, pinned, capabilities) in processes {
            fs::create_dir(proc.path().join(name)).unwrap();
            let status = format!(
                "Name:\tx\nUid:\t{user}\t0\t0\t0\nVmLck:\t{locked:8} kB\nVmPin:\t{pinned:8} kB\nCapEff:\t{capabilities}\n"
            );
            fs::write(proc.path().join(name).join("status"), status).unwrap();
        }
        fs::create_dir(proc.path().join("sys")).unwrap();
        proc
    }

    #[test]
    fn type1_counts_this_process_and_iommufd_its_user() {
        let proc = proc(&[
            ("10", 1000, 8, 64, "0000000000000000"),
            ("11", 1000, 4, 32, "0000000000000000"),
            ("12", 1001, 2, 16, "0000000000000000"),
            ("13", 1000, 1, 128, "000001ffffffffff"),
        ]);
        let counted = |accounting| counted(proc.path(), "10", accounting);
        assert_eq!(counted(Accounting::PerProcess), (8 << 10, 0));
        // 12 is another user's, and 13 may lock without a limit, so iommufd does not count it.
        assert_eq!(counted(Accounting::PerUser), (64 << 10, 32 << 10));
        assert_eq!(counted(Accounting::None), (0, 0));
    }

    #[test]
    fn a_process_that_is_hidden_or_has_no_memory_counts_as_nothing() {
        let proc = proc(&[("10", 1000, 0, 4, "0")]);
        fs::create_dir(proc.path().join("11")).unwrap();
        fs::create_dir(proc.path().join("12")).unwrap();
        fs::write(
            proc.path().join("12/status"),
            "Name:\tkthreadd\nUid:\t1000\t0\t0\t0\n",
        )
        .unwrap();
        assert_eq!(counted(proc.path(), "10", Accounting::PerUser), (4096, 0));
        assert_eq!(counted(proc.path(), "99", Accounting::PerUser), (0, 0));
    }

    #[test]
    fn memory_that_is_locked_here_is_counted_by_the_kernel_under_this_name() {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        for key in ["Uid:", "VmLck:", "VmPin:", "CapEff:"] {
            assert!(word_of(&status, key).is_some(), "{key} is not in {status}");
        }
    }

    #[test]
    fn what_is_owed_is_the_sum_over_maps_and_goes_with_them() {
        let sum = || owed_by(Accounting::PerProcess).unwrap().load(Ordering::Relaxed);
        let before = sum();
        let (mut a, mut b) = (
            Owed::new(Accounting::PerProcess),
            Owed::new(Accounting::PerProcess),
        );
        a.set(5 << 30);
        b.set(1 << 30);
        a.set(2 << 30);
        assert_eq!(sum(), before + (3 << 30));
        drop(b);
        assert_eq!(sum(), before + (2 << 30));
        a.set(0);
        assert_eq!(sum(), before);
        let mut none = Owed::new(Accounting::None);
        none.set(1 << 30);
        assert_eq!(sum(), before);
    }
}
