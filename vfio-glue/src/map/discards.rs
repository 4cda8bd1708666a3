//! Which extents show pages that their file has no more: found by asking the kernel for holes in what is pinned.
//!
//! ```text
//! Books::pinned_with ──▶ PinnedFile::look ──memory/discard.rs──▶ extents marked ──plan.rs──▶ mapped anew
//! ```
//!
//! Read with: `memory/discard.rs`; TRAPS 21, 22.

use std::ops::Range;
use std::sync::Arc;

use super::Extent;
use crate::memory::{Discarded, discarded};

/// One file of a guest, and what of it is pinned, for whomever.
pub(super) struct PinnedFile {
    /// The guest's extents of it.
    pub(super) of_guest: Vec<Arc<Extent>>,
    /// Sorted, apart.
    pinned: Vec<Range<u64>>,
}

impl PinnedFile {
    pub(super) fn new(first: &Arc<Extent>, pinned: impl Iterator<Item = Range<u64>>) -> Self {
        let mut sorted: Vec<Range<u64>> = pinned.collect();
        sorted.sort_by_key(|range| range.start);
        let mut apart: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match apart.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => apart.push(range),
            }
        }
        Self {
            of_guest: vec![Arc::clone(first)],
            pinned: apart,
        }
    }

    pub(super) fn is_of(&self, extent: &Extent) -> bool {
        self.of_guest
            .first()
            .is_some_and(|first| Arc::ptr_eq(first.file(), extent.file()))
    }

    /// Marks the guest's extents that show pages the file has no more, and returns how many bytes those are.
    pub(super) fn look(&self) -> u64 {
        let Some(file) = self.of_guest.first().map(|extent| extent.file()) else {
            return 0;
        };
        let look = |pinned: &[Range<u64>]| {
            discarded(file, pinned).unwrap_or_else(|error| {
                tracing::debug!(%error, "a file does not tell what was discarded of it");
                Discarded::default()
            })
        };
        let all = look(&self.pinned);
        if all.bytes == 0 {
            return 0;
        }
        let mut missing = 0;
        for extent in &self.of_guest {
            // Where the kernel only counts pages, it could be any.
            let here = match all.first {
                Some(_) => look(&[extent.file_range()]),
                None => all,
            };
            if here.bytes > 0 {
                extent.set_discarded();
                missing += here.bytes;
            }
        }
        if all.first.is_some() { missing } else { all.bytes }
    }
}
