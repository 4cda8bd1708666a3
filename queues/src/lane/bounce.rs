//! Private slots for frames the card cannot reach in place. Allocated and mapped on first need only, so that a map
//! with guest extents and descriptor rings and nothing else is itself the proof of zero-copy.

use std::sync::Arc;

use vfio_glue::address::Iova;
use vfio_glue::map::{MapError, MemoryMap};
use vfio_glue::memory::{DmaBuffer, HostSlice};

/// Bytes of one slot: a full frame with a tag, in one of the sizes every card can bound.
pub(super) const SLOT_BYTES: u32 = 2048;

/// The slots of one lane.
#[derive(Debug)]
pub(super) struct Slots {
    count: u16,
    owner: String,
    memory: Option<Memory>,
}

#[derive(Debug)]
struct Memory {
    buffer: DmaBuffer,
    free: Vec<u16>,
}

/// One slot, out of its pool until it is put back.
#[derive(Debug)]
pub(super) struct Slot {
    index: u16,
    pub(super) iova: Iova,
}

impl Slots {
    pub(super) fn new(owner: &str, count: u16) -> Self {
        Self {
            count,
            owner: owner.to_owned(),
            memory: None,
        }
    }

    /// Takes a free slot; `None` if all are out. The first call allocates and maps them all.
    pub(super) fn take(&mut self, map: &Arc<MemoryMap>) -> Result<Option<Slot>, MapError> {
        let memory = match &mut self.memory {
            Some(memory) => memory,
            empty @ None => {
                let len = usize::from(self.count) * SLOT_BYTES as usize;
                let buffer = DmaBuffer::new(map, "bounce", &self.owner, len)?;
                tracing::info!(
                    lane = self.owner,
                    bytes = len,
                    "bounce memory mapped: not every frame is zero-copy"
                );
                empty.insert(Memory {
                    buffer,
                    free: (0..self.count).rev().collect(),
                })
            }
        };
        let base = memory.buffer.iova();
        Ok(memory.free.pop().map(|index| Slot {
            index,
            iova: base.offset(u64::from(index) * u64::from(SLOT_BYTES)),
        }))
    }

    /// The slot's bytes.
    pub(super) fn bytes(&self, slot: &Slot) -> Option<HostSlice<'_>> {
        let at = usize::from(slot.index) * SLOT_BYTES as usize;
        self.memory.as_ref()?.buffer.slice(at, SLOT_BYTES as usize)
    }

    pub(super) fn put_back(&mut self, slot: &Slot) {
        if let Some(memory) = &mut self.memory {
            memory.free.push(slot.index);
        }
    }
}
