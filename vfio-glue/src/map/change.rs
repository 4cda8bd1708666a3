//! A change of a guest's memory under way: what is new is mapped, what goes is mapped still.
//!
//! ```text
//! MemoryMap::change ──plan, map──▶ Change ──publish table(), drain leaving()──▶ finish ──unmap──▶ done
//!                                        └───────────────── undo ──▶ as before
//! ```
//!
//! In between the lanes go over to the new table, and let go of what lies in ranges that leave (TRAPS 16).

use std::ops::Range;
use std::sync::Arc;

use super::{Extent, MapError, MemoryMap};
use crate::address::Iova;
use crate::memory::Table;

/// A change of one guest's memory, half done. Undone when dropped.
#[derive(Debug)]
#[must_use = "a change that is not finished is undone"]
pub struct Change {
    map: Arc<MemoryMap>,
    owner: String,
    next: Arc<Table>,
    gained: Vec<Arc<Extent>>,
    dropped: Vec<Arc<Extent>>,
    leaving: Arc<Leaving>,
}

/// Bus addresses that a guest is about to lose: no lane of its may have them in use.
#[derive(Debug, Default)]
pub struct Leaving {
    /// Sorted, apart.
    ranges: Vec<Range<u64>>,
}

impl Leaving {
    pub(super) fn of(extents: &[Arc<Extent>]) -> Self {
        let range = |extent: &Arc<Extent>| extent.iova.raw()..extent.iova.raw() + extent.len();
        let mut ranges: Vec<Range<u64>> = extents.iter().map(range).collect();
        ranges.sort_by_key(|range| range.start);
        Self { ranges }
    }

    /// Whether nothing leaves.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether a buffer that starts here, and lies in one extent, leaves.
    pub fn has(&self, iova: Iova) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= iova.raw());
        let before = after.checked_sub(1).and_then(|index| self.ranges.get(index));
        before.is_some_and(|range| range.contains(&iova.raw()))
    }
}

impl Change {
    pub(super) fn new(
        map: &Arc<MemoryMap>,
        owner: &str,
        next: Arc<Table>,
        gained: Vec<Arc<Extent>>,
        dropped: Vec<Arc<Extent>>,
    ) -> Self {
        Self {
            map: Arc::clone(map),
            owner: owner.to_owned(),
            next,
            gained,
            leaving: Arc::new(Leaving::of(&dropped)),
            dropped,
        }
    }

    /// The guest's view once the change is done. All of it is mapped already.
    pub fn table(&self) -> &Arc<Table> {
        &self.next
    }

    /// What must not be in use any more when the change is [`finish`](Self::finish)ed.
    pub fn leaving(&self) -> &Arc<Leaving> {
        &self.leaving
    }

    /// Takes from the devices what the guest lets go of and nobody else has. No device reaches it once this returns,
    /// so the caller has drained whatever used it. Blocks while the kernel unpins.
    ///
    /// # Errors
    ///
    /// [`MapError::Iommu`] if an unmap failed: that range then stays in the books with no owner and keeps its IOVA
    /// and its memory for as long as the map lives. The change is done all the same.
    pub fn finish(mut self) -> Result<(), MapError> {
        self.gained.clear();
        let dropped = std::mem::take(&mut self.dropped);
        self.map.let_go(&self.owner, &dropped)
    }

    /// Ends the change without taking anything away, because a device that will not stop may still use it. What is
    /// returned stays mapped until [`MemoryMap::let_go`].
    pub fn finish_later(mut self) -> Vec<Arc<Extent>> {
        self.gained.clear();
        std::mem::take(&mut self.dropped)
    }

    /// Takes back what was mapped for it. The caller has stopped whatever went over to the new table.
    pub fn undo(self) {
        drop(self);
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if !self.gained.is_empty() {
            self.map.take_back(&self.gained, &self.owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_is_told_to_the_byte() {
        let leaving = Leaving {
            ranges: vec![0x1000..0x2000, 0x5000..0x6000],
        };
        let has = |iova| leaving.has(Iova::new(iova));
        assert_eq!(
            [has(0x0fff), has(0x1000), has(0x1fff), has(0x2000)],
            [false, true, true, false]
        );
        assert_eq!([has(0x4fff), has(0x5fff), has(0x6000)], [false, true, false]);
        assert!(!Leaving::default().has(Iova::new(0x1000)));
    }
}
