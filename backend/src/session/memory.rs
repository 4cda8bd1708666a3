//! The guest's memory: a change of its table is planned, then applied in an order that can be undone.
//!
//! ```text
//! plan: add, keep, drop ──▶ map what is new ──▶ publish the table ──▶ lanes let go of the dropped ──▶ unmap ──▶ reply
//! ```
//!
//! What stays is never unmapped (TRAPS 18). A region counts as the same if its addresses, its file and its offset
//! are the same; one that comes back with other bounds is added before the old one goes, so the bytes they share
//! stay in the map's books all the time (TRAPS 17).

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vfio_glue::memory::{Region, RegionSpec, Table};

use super::{Session, SessionError, State};

/// A change of the table. Nothing of it has happened yet.
#[derive(Debug, Default)]
struct Plan {
    add: Vec<RegionSpec>,
    keep: Vec<Arc<Region>>,
    dropped: Vec<Arc<Region>>,
}

/// Compares what is there with what is wanted.
fn plan(now: &[Arc<Region>], wanted: Vec<RegionSpec>) -> Plan {
    let mut left: Vec<Arc<Region>> = now.to_vec();
    let mut plan = Plan::default();
    for spec in wanted {
        match left.iter().position(|region| is_same(region.spec(), &spec)) {
            Some(index) => plan.keep.push(left.swap_remove(index)),
            None => plan.add.push(spec),
        }
    }
    plan.dropped = left;
    plan
}

/// Whether two announcements name the same addresses and the same bytes.
fn is_same(a: &RegionSpec, b: &RegionSpec) -> bool {
    let place = |spec: &RegionSpec| (spec.guest, spec.frontend, spec.len, spec.file_offset);
    let file = |spec: &RegionSpec| spec.file.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
    place(a) == place(b) && file(a).is_some() && file(a) == file(b)
}

impl Session {
    /// Makes `wanted` the guest's memory.
    ///
    /// If the map refuses, everything is as it was before.
    pub(super) fn change_memory(
        &self,
        state: &mut State,
        wanted: Vec<RegionSpec>,
    ) -> Result<(), SessionError> {
        let Plan { add, keep, dropped } = plan(&state.regions, wanted);
        let (map, owner) = (self.port.map(), self.port.name());
        tracing::debug!(
            port = owner,
            add = add.len(),
            keep = keep.len(),
            drop = dropped.len(),
            "memory table"
        );

        let mut added: Vec<Arc<Region>> = Vec::with_capacity(add.len());
        let mapped = add.into_iter().try_for_each(|spec| -> Result<(), SessionError> {
            added.push(Arc::new(map.add_region(owner, spec)?));
            Ok(())
        });
        let regions: Vec<Arc<Region>> = keep.iter().chain(&added).cloned().collect();
        let table = mapped.and_then(|()| Ok(Arc::new(Table::new(regions.clone())?)));
        let table = match table {
            Ok(table) => table,
            Err(error) => {
                self.unmap(&added);
                return Err(error);
            }
        };

        // Whatever the card holds may lie in what goes: it is taken back before anything is unmapped.
        let ready = if dropped.is_empty() {
            self.port.publish_table(&table).map_err(SessionError::from)
        } else {
            self.stop_all(state)
        };
        if let Err(error) = ready {
            self.unmap(&added);
            return Err(error);
        }
        state.table = table;
        state.regions = regions;
        self.unmap(&dropped);
        match self.settle_all(state) {
            // A virtqueue in a region that has gone waits for it to come back.
            Err(error @ SessionError::VringMemory { .. }) => {
                tracing::info!(port = owner, "{error}: it waits");
                Ok(())
            }
            settled => settled,
        }
    }

    /// Lets go of all memory. All lanes have been stopped.
    pub(super) fn forget_memory(&self, state: &mut State) {
        state.table = Arc::default();
        let regions = std::mem::take(&mut state.regions);
        self.unmap(&regions);
    }

    fn unmap(&self, regions: &[Arc<Region>]) {
        for region in regions {
            if let Err(error) = self.port.map().remove_region(self.port.name(), region) {
                let error: &dyn std::error::Error = &error;
                tracing::error!(port = self.port.name(), error, "a region stays mapped");
            }
        }
    }
}
