//! Plain memory behind a [`Bus`], for tests that need a card and no IOMMU.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bus::{Bus, BusFault, RangeKind};

/// A handful of IOVA ranges with bytes in them. Clones share the bytes.
#[derive(Clone, Debug, Default)]
pub struct PlainMemory {
    ranges: Arc<Mutex<BTreeMap<u64, Range>>>,
}

#[derive(Debug)]
struct Range {
    kind: RangeKind,
    bytes: Vec<u8>,
}

impl PlainMemory {
    /// Makes memory with nothing mapped.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `len_bytes` zeroed bytes at `iova`. Ranges stay apart even where they touch.
    ///
    /// # Panics
    ///
    /// If the range overlaps another.
    pub fn map(&self, iova: u64, len_bytes: usize, kind: RangeKind) {
        let mut ranges = self.lock();
        let end = iova + len_bytes as u64;
        let clash = ranges
            .iter()
            .any(|(start, range)| *start < end && iova < start + range.bytes.len() as u64);
        assert!(!clash, "iova {iova:#x} is mapped twice");
        ranges.insert(
            iova,
            Range {
                kind,
                bytes: vec![0; len_bytes],
            },
        );
    }

    /// Unmaps the range that was mapped at `iova`. The card is not told: see
    /// [`note_unmapped`](super::Card82576::note_unmapped).
    ///
    /// # Panics
    ///
    /// If no range begins at `iova`.
    pub fn unmap(&self, iova: u64) {
        assert!(
            self.lock().remove(&iova).is_some(),
            "no range begins at iova {iova:#x}"
        );
    }

    /// Copies `len_bytes` out, as the driver's or the guest's CPU would.
    ///
    /// # Panics
    ///
    /// If the bytes are not mapped.
    #[must_use]
    pub fn get(&self, iova: u64, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        self.read(iova, &mut bytes).expect("the test reads mapped memory");
        bytes
    }

    /// Stores `data`, as the driver's or the guest's CPU would.
    ///
    /// # Panics
    ///
    /// If the bytes are not mapped.
    pub fn put(&self, iova: u64, data: &[u8]) {
        self.write(iova, data).expect("the test writes mapped memory");
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Range>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on the bytes from `iova` to the end of its range.
    fn with_range<T>(&self, iova: u64, work: impl FnOnce(RangeKind, &mut [u8]) -> T) -> Option<T> {
        let mut ranges = self.lock();
        let (start, range) = ranges.range_mut(..=iova).next_back()?;
        let from = usize::try_from(iova - start).ok()?;
        let bytes = range.bytes.get_mut(from..).filter(|bytes| !bytes.is_empty())?;
        Some(work(range.kind, bytes))
    }
}

impl Bus for PlainMemory {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), BusFault> {
        self.with_range(iova, |_, bytes| {
            bytes.get(..buf.len()).map(|bytes| buf.copy_from_slice(bytes))
        })
        .flatten()
        .ok_or(BusFault {
            iova,
            len: buf.len() as u64,
        })
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), BusFault> {
        self.with_range(iova, |_, bytes| {
            bytes
                .get_mut(..data.len())
                .map(|bytes| bytes.copy_from_slice(data))
        })
        .flatten()
        .ok_or(BusFault {
            iova,
            len: data.len() as u64,
        })
    }

    fn kind(&self, iova: u64, len: u64) -> RangeKind {
        self.with_range(iova, |kind, bytes| {
            if bytes.len() as u64 >= len {
                kind
            } else {
                RangeKind::Unmapped
            }
        })
        .unwrap_or(RangeKind::Unmapped)
    }

    fn room(&self, iova: u64) -> u64 {
        self.with_range(iova, |_, bytes| bytes.len() as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_past_the_end_of_a_range_faults() {
        let memory = PlainMemory::new();
        memory.map(0x1000, 16, RangeKind::GuestMemory);
        assert_eq!(memory.room(0x1008), 8);
        assert_eq!(memory.room(0x1010), 0);
        assert_eq!(
            memory.read(0x1008, &mut [0; 9]),
            Err(BusFault { iova: 0x1008, len: 9 })
        );
        assert_eq!(memory.kind(0x1000, 16), RangeKind::GuestMemory);
        assert_eq!(memory.kind(0x1000, 17), RangeKind::Unmapped);
    }
}
