//! The guest's memory: the map plans a change and maps what is new; here the lanes follow, and what goes is let go.
//!
//! ```text
//! MemoryMap::change ──▶ lanes go over to the new table ──▶ those with something in what leaves: drained ──▶ unmap ──▶ reply
//! ```
//!
//! A lane that has no buffer with the card and no virtqueue in what leaves never stops (rule R3). One that has is stopped
//! and started, and if its queue of the card will not stop, the device is reset and all of its lanes are started again
//! (TRAPS 16). What stays is never unmapped (TRAPS 17, 18): see the plan in `vfio-glue`.

use std::sync::Arc;
use std::time::Instant;

use queues::lane::{Adoption, MissingMemory};
use vfio_glue::map::{Change, Leaving};
use vfio_glue::memory::{RegionSpec, Table};

use super::{Session, SessionError, State};

impl Session {
    /// Makes `wanted` the guest's memory. When this returns, no device and no lane uses what is not in it.
    ///
    /// If the map refuses, everything is as it was before. If a device can neither be stopped nor reset, the change
    /// holds, no lane runs, and what was to go stays mapped until a reset helps.
    pub(super) fn change_memory(
        &self,
        state: &mut State,
        wanted: Vec<RegionSpec>,
    ) -> Result<(), SessionError> {
        let (map, owner) = (self.port.map(), self.port.name());
        let change = map.change(owner, &state.table, wanted)?;
        let ran: Vec<usize> = (0..state.vrings.len())
            .filter(|index| state.vrings.get(*index).is_some_and(|vring| vring.runs))
            .collect();
        let begun = Instant::now();
        let drained = self.drain(state, &change);
        state.table = Arc::clone(change.table());
        self.port.set_memory(&state.table);
        if let Err(error) = drained {
            self.port.abandon(change.finish_later());
            return Err(error);
        }
        if let Err(error) = change.finish() {
            let error: &dyn std::error::Error = &error;
            tracing::error!(port = owner, error, "a range stays mapped");
        }
        let paused: Vec<usize> = ran
            .into_iter()
            .filter(|index| !self.runs(state, *index))
            .collect();
        let settled = self.settle_on_memory(state);
        self.count_pauses(state, &paused, begun);
        settled
    }

    /// Brings every lane to the memory there is now. A virtqueue in a region that has gone waits for it to come back.
    fn settle_on_memory(&self, state: &mut State) -> Result<(), SessionError> {
        let mut result = Ok(());
        for index in 0..state.vrings.len() {
            match self.settle(state, index) {
                Err(error @ SessionError::VringMemory { .. }) => {
                    tracing::info!(port = self.port.name(), "{error}: it waits");
                }
                settled => result = result.and(settled),
            }
        }
        result
    }

    /// Looks whether memory was taken from the guest behind our back, by a balloon for instance, and maps anew what the
    /// card would see otherwise than the guest (TRAPS 21). Returns how many bytes were found missing.
    ///
    /// # Errors
    ///
    /// As for any change of memory; what was found is mapped anew with the next one then.
    pub fn renew_discarded(&self) -> Result<u64, SessionError> {
        // The kernel may have much to look through, and the device's trouble must not wait for it.
        let table = Arc::clone(&self.state().table);
        let missing = self.port.map().find_discarded(&table);
        let mut state = self.state();
        if state.table.has_discarded() {
            if self.is_worth_a_line() {
                tracing::warn!(
                    port = self.port.name(),
                    missing,
                    "memory of the guest was discarded while it was pinned (a balloon, free page reporting or virtio-mem): \
                     it is mapped anew; what came in or went out meanwhile may have missed the guest"
                );
            }
            let wanted = state.table.regions().to_vec();
            self.change_memory(&mut state, wanted)?;
        }
        Ok(missing)
    }

    /// As [`renew_discarded`](Self::renew_discarded), a failure being told in the log.
    pub fn renew_discarded_or_tell(&self) -> u64 {
        self.renew_discarded().unwrap_or_else(|error| {
            if self.is_worth_a_line() {
                let error: &dyn std::error::Error = &error;
                tracing::error!(
                    port = self.port.name(),
                    error,
                    "discarded memory is not mapped anew"
                );
            }
            // It is there to be found the next time.
            1
        })
    }

    /// Brings every lane that runs to the new table, or stops it.
    fn drain(&self, state: &mut State, change: &Change) -> Result<(), SessionError> {
        let mut drained = Ok(());
        for index in 0..state.vrings.len() {
            if !self.runs(state, index) {
                continue;
            }
            let went_over = self.goes_over(state, index, change.table(), change.leaving());
            if !matches!(went_over, Ok(true)) {
                let halted = self.halt(state, index);
                drained = drained.and(went_over.map(drop)).and(halted);
            }
        }
        if self.port.is_stuck() {
            // Its DMA ends with a reset alone, and with it all lanes of the device.
            self.stop_all(state)?;
        }
        drained
    }

    /// Has the lane of virtqueue `index` go on with `next`, and says whether it could.
    fn goes_over(
        &self,
        state: &State,
        index: usize,
        next: &Arc<Table>,
        leaving: &Arc<Leaving>,
    ) -> Result<bool, SessionError> {
        if !virtqueue_stays(state, index, next, leaving) {
            return Ok(false);
        }
        let (next, leaving) = (Arc::clone(next), Arc::clone(leaving));
        let in_motion = state.regions_in_motion;
        let adoption = self.port.with_lane(index, move |lane| {
            if in_motion {
                // Before it looks at a chain that points to where nothing is any more.
                lane.set_missing_memory(MissingMemory::IsAwaited);
            }
            lane.adopt(next, &leaving)
        })?;
        // None: it is on no worker, because it did not follow its link. Its queue may have anything.
        Ok(adoption == Some(Adoption::Adopted))
    }

    fn runs(&self, state: &State, index: usize) -> bool {
        state.vrings.get(index).is_some_and(|vring| vring.runs)
    }

    fn count_pauses(&self, state: &State, paused: &[usize], begun: Instant) {
        if paused.is_empty() {
            return;
        }
        let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        for index in paused.iter().filter(|index| self.runs(state, **index)) {
            if let Some(stats) = self.port.stats(*index) {
                stats.pauses.add(1);
                stats.paused_us.add(took_us);
            }
        }
        let (port, lanes) = (self.port.name(), paused.len());
        tracing::info!(port, lanes, took_us, "lanes were drained of memory that went");
    }

    /// Lets go of all memory. All lanes have been stopped.
    pub(super) fn forget_memory(&self, state: &mut State) {
        let table = std::mem::take(&mut state.table);
        self.port.set_memory(&state.table);
        if let Err(error) = self.port.map().let_go(self.port.name(), table.extents()) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(port = self.port.name(), error, "a range stays mapped");
        }
    }
}

/// Whether all three areas of a virtqueue are in `next` where they are now.
fn virtqueue_stays(state: &State, index: usize, next: &Table, leaving: &Leaving) -> bool {
    let Some(areas) = state.vrings.get(index).and_then(|vring| vring.areas()) else {
        return false;
    };
    areas.into_iter().all(|(_, address, len)| {
        let start = state.table.to_guest(address);
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        start.is_some_and(|start| state.table.keeps(next, leaving, start, len))
    })
}
