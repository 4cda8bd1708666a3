//! Private slots for frames the card cannot reach in place. Allocated and mapped on first need only, so that a map
//! with guest extents and descriptor rings and nothing else is itself the proof of zero-copy.
//!
//! Mapping may wait for whoever changes the map, a guest being pinned for instance, so a thread of its own does it
//! while the worker goes on; the frame that needs a slot keeps its turn.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

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
    state: State,
}

#[derive(Debug)]
enum State {
    /// Nobody has needed one.
    Unused,
    /// A thread maps them.
    Awaited(Receiver<Result<DmaBuffer, MapError>>),
    /// There they are.
    Ready { buffer: DmaBuffer, free: Vec<u16> },
    /// They could not be mapped. `None` once that was asked for.
    Failed(Option<SlotError>),
}

/// Why a lane has no slots. It is not tried again while the lane lives.
#[derive(Debug, thiserror::Error)]
pub(super) enum SlotError {
    #[error("no bounce memory for frames the card cannot reach in place")]
    Map(#[from] MapError),
    #[error("no thread to map bounce memory")]
    Thread(#[source] std::io::Error),
}

/// One slot, out of its pool until it is put back.
#[derive(Debug)]
pub(super) struct Slot {
    index: u16,
    pub(super) iova: Iova,
}

/// What came of asking for a slot.
#[derive(Debug)]
pub(super) enum Taking {
    /// Here it is.
    Slot(Slot),
    /// All are out, or they are still being mapped: ask again.
    NotYet,
    /// There will be none.
    Never,
}

impl Slots {
    pub(super) fn new(owner: &str, count: u16) -> Self {
        let owner = owner.to_owned();
        Self {
            count,
            owner,
            state: State::Unused,
        }
    }

    /// Takes a free slot. The first call has them all mapped.
    pub(super) fn take(&mut self, map: &Arc<MemoryMap>) -> Taking {
        self.settle();
        match &mut self.state {
            State::Unused => {
                self.state = self.request(map);
                Taking::NotYet
            }
            State::Awaited(_) => Taking::NotYet,
            State::Ready { buffer, free } => match free.pop() {
                Some(index) => {
                    let iova = buffer.iova().offset(u64::from(index) * u64::from(SLOT_BYTES));
                    Taking::Slot(Slot { index, iova })
                }
                None => Taking::NotYet,
            },
            State::Failed(_) => Taking::Never,
        }
    }

    /// Whether they are being mapped right now: soon there is work.
    pub(super) fn is_awaited(&self) -> bool {
        matches!(self.state, State::Awaited(_))
    }

    /// Why there will never be one, the first time this is asked.
    pub(super) fn failure(&mut self) -> Option<SlotError> {
        match &mut self.state {
            State::Failed(error) => error.take(),
            _ => None,
        }
    }

    fn request(&self, map: &Arc<MemoryMap>) -> State {
        let (answer, answered) = channel();
        let (map, owner) = (Arc::clone(map), self.owner.clone());
        let len = usize::from(self.count) * SLOT_BYTES as usize;
        let work = move || {
            // A lane that has ended meanwhile takes the answer no more, and the memory goes again.
            let _ = answer.send(DmaBuffer::new(&map, "bounce", &owner, len));
        };
        match std::thread::Builder::new().name("bounce".to_owned()).spawn(work) {
            Ok(_) => State::Awaited(answered),
            Err(error) => self.failed(SlotError::Thread(error)),
        }
    }

    fn settle(&mut self) {
        let State::Awaited(answered) = &self.state else {
            return;
        };
        self.state = match answered.try_recv() {
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => {
                self.failed(SlotError::Thread(std::io::ErrorKind::BrokenPipe.into()))
            }
            Ok(Err(error)) => self.failed(SlotError::Map(error)),
            Ok(Ok(buffer)) => {
                let bytes = buffer.len();
                tracing::info!(
                    lane = self.owner,
                    bytes,
                    "bounce memory mapped: not every frame is zero-copy"
                );
                let free = (0..self.count).rev().collect();
                State::Ready { buffer, free }
            }
        };
    }

    fn failed(&self, error: SlotError) -> State {
        let cause: &dyn std::error::Error = &error;
        tracing::error!(
            lane = self.owner,
            error = cause,
            "frames that need a copy are lost from now on"
        );
        State::Failed(Some(error))
    }

    /// The slot's bytes.
    pub(super) fn bytes(&self, slot: &Slot) -> Option<HostSlice<'_>> {
        let State::Ready { buffer, .. } = &self.state else {
            return None;
        };
        let at = usize::from(slot.index) * SLOT_BYTES as usize;
        buffer.slice(at, SLOT_BYTES as usize)
    }

    pub(super) fn put_back(&mut self, slot: &Slot) {
        if let State::Ready { free, .. } = &mut self.state {
            free.push(slot.index);
        }
    }
}
