//! Whether what a change will pin fits the limit on locked memory, asked before anything is mapped.
//!
//! ```text
//! Books::change, Books::add_own, MemoryMap::attach ──▶ here ◀── LockedMemory (what the kernel counts now) ── dyn Iommu
//! ```
//!
//! A map with no device pins nothing yet. Its bytes are promised all the same, so that a map cannot be filled with
//! more than its first device can pin; and they are asked for once more when that device comes, as other processes
//! may have locked memory in between. Reading and pinning are two steps: the kernel has the last word.
//!
//! Read with: `iommu/locked.rs`; TRAPS 28, 48.

use std::ops::Range;

use super::MapError;
use super::files::FileId;
use crate::iommu::{Iommu, LockedMemory};

/// Whether `need` more bytes can be pinned, now or when a first device comes.
pub(super) fn check(iommu: &dyn Iommu, need: u64) -> Result<(), MapError> {
    if need == 0 {
        return Ok(());
    }
    iommu.locked_memory().map_or(Ok(()), |locked| fits(need, &locked))
}

/// Whether the `mapped` bytes of a map can be pinned, which a first device makes the kernel do.
pub(super) fn check_attach(iommu: &dyn Iommu, mapped: u64) -> Result<(), MapError> {
    if iommu.pins_now() {
        return Ok(());
    }
    // What other maps have promised is no reason to keep this one from what was promised to it.
    iommu
        .locked_memory()
        .map_or(Ok(()), |locked| fits(mapped, &LockedMemory { owed: 0, ..locked }))
}

/// How many bytes the kernel has pinned for `mapped`, byte ranges of files, while it pins.
pub(super) fn pinned_bytes(mapped: impl Iterator<Item = (FileId, Range<u64>)>, iommu: &dyn Iommu) -> u64 {
    let mut ranges: Vec<(FileId, u64, u64)> = mapped
        .map(|(file, range)| (file, range.start, range.end))
        .collect();
    if !iommu.shares_pins() {
        return ranges.iter().map(|(_, start, end)| end - start).sum();
    }
    // Each byte once, however many extents show it.
    ranges.sort_unstable();
    let mut sum = 0;
    let mut reached = None;
    for (file, start, end) in ranges {
        let from = match reached {
            Some((of, to)) if of == file => start.max(to),
            _ => start,
        };
        sum += end.saturating_sub(from);
        reached = Some((file, end.max(from)));
    }
    sum
}

fn fits(need: u64, locked: &LockedMemory) -> Result<(), MapError> {
    let LockedMemory {
        pinned,
        owed,
        elsewhere,
        limit,
    } = *locked;
    let sum = [pinned, owed, elsewhere]
        .into_iter()
        .fold(need, u64::saturating_add);
    if need == 0 || sum <= limit {
        return Ok(());
    }
    Err(MapError::OverBudget {
        need,
        pinned,
        owed,
        elsewhere,
        limit,
        sum,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKED: LockedMemory = LockedMemory {
        pinned: 100,
        owed: 20,
        elsewhere: 3,
        limit: 130,
    };

    #[test]
    fn all_that_is_locked_or_promised_counts_and_the_error_has_every_number() {
        fits(7, &LOCKED).unwrap();
        assert_eq!(
            fits(8, &LOCKED).unwrap_err().to_string(),
            "8 more bytes would have to be pinned, 100 are already, 20 will be when devices come to maps that have \
             none, this user's other processes have pinned 3, and the limit on locked memory is 130: 1 bytes are \
             missing, so raise it (ulimit -l, LimitMEMLOCK=) to at least 131 bytes"
        );
    }

    #[test]
    fn nothing_always_fits_and_sums_do_not_wrap() {
        fits(0, &LockedMemory { limit: 0, ..LOCKED }).unwrap();
        let refused = fits(u64::MAX, &LOCKED).unwrap_err();
        assert!(matches!(refused, MapError::OverBudget { sum: u64::MAX, .. }));
    }
}
