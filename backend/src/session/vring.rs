//! What is known of each virtqueue, and the lane that follows from it.
//!
//! ```text
//! Absent → Configured → Started (kick) ⇄ Enabled → Stopped
//! ```
//!
//! A lane runs exactly while everything is known, the ring is started and it is enabled. A disabled or stopped ring
//! is not touched (TRAPS 11, 54): its lane is stopped, and what the card had not filled is taken again later.
//!
//! Read with: vhost-user, "Ring states"; TRAPS 11, 12, 13, 55.

use std::fs::File;
use std::sync::Arc;

use queues::lane::{LaneSetup, MissingMemory};
use queues::net_header;
use queues::virtq::{Virtq, WakeUps};
use vfio_glue::address::FrontendAddress;
use vfio_glue::memory::VirtqMemory;

use super::{Session, SessionError, State, feature};
use crate::port::Direction;

/// What a front-end has told of one virtqueue.
#[derive(Debug, Default)]
pub(super) struct Vring {
    pub(super) size: Option<u16>,
    pub(super) addresses: Option<Addresses>,
    pub(super) base: u16,
    pub(super) kick: Option<Kick>,
    pub(super) call: Option<File>,
    pub(super) err: Option<File>,
    pub(super) enabled: bool,
    pub(super) runs: bool,
}

/// Where its three areas are, in the front-end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) desc: FrontendAddress,
    pub(super) avail: FrontendAddress,
    pub(super) used: FrontendAddress,
}

/// Which lanes a stop stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// The one that was meant.
    One,
    /// All of the device's, which was reset.
    All,
}

impl Vring {
    /// Name, address and length in bytes of its descriptor table, available ring and used ring, once they are known.
    pub(super) fn areas(&self) -> Option<[(&'static str, FrontendAddress, usize); 3]> {
        let (at, size) = (self.addresses?, self.size?);
        Some([
            ("descriptor table", at.desc, VirtqMemory::desc_bytes(size)),
            ("available ring", at.avail, VirtqMemory::avail_bytes(size)),
            ("used ring", at.used, VirtqMemory::used_bytes(size)),
        ])
    }
}

/// How the front-end kicks. Having told so starts the ring.
#[derive(Debug)]
pub(super) enum Kick {
    By(File),
    /// It does not: we poll.
    Never,
}

impl Session {
    /// Brings the lane of virtqueue `index` to what is known of it.
    pub(super) fn settle(&self, state: &mut State, index: usize) -> Result<(), SessionError> {
        let enabled_from_start = state.features & feature::PROTOCOL_FEATURES == 0;
        let memory_is_known = !state.table.regions().is_empty();
        let Some(vring) = state.vrings.get(index) else {
            return Ok(());
        };
        let wanted = vring.kick.is_some()
            && vring.addresses.is_some()
            && vring.size.is_some()
            && (vring.enabled || enabled_from_start)
            && memory_is_known;
        match (vring.runs, wanted) {
            (false, true) => self.start(state, index),
            (true, false) => {
                let stopped = self.stop(state, index)?;
                self.settle_others(state, index, stopped)
            }
            _ => Ok(()),
        }
    }

    /// Brings the lane of virtqueue `index` to what is known of it, after a [`stop`](Self::stop), and those that the stop
    /// took along.
    pub(super) fn settle_after(
        &self,
        state: &mut State,
        index: usize,
        stopped: Reach,
    ) -> Result<(), SessionError> {
        let settled = self.settle(state, index);
        self.settle_others(state, index, stopped).and(settled)
    }

    /// Brings the lanes that a stop of virtqueue `index` took along to what is known of them.
    pub(super) fn settle_others(
        &self,
        state: &mut State,
        index: usize,
        stopped: Reach,
    ) -> Result<(), SessionError> {
        let mut result = Ok(());
        if stopped == Reach::All {
            for other in (0..state.vrings.len()).filter(|other| *other != index) {
                let settled = self.settle(state, other);
                result = result.and(settled);
            }
        }
        result
    }

    /// Brings every lane to what is known of it. Goes on after an error and returns the first.
    pub(super) fn settle_all(&self, state: &mut State) -> Result<(), SessionError> {
        let mut result = Ok(());
        for index in 0..state.vrings.len() {
            let settled = self.settle(state, index);
            result = result.and(settled);
        }
        result
    }

    fn start(&self, state: &mut State, index: usize) -> Result<(), SessionError> {
        if self.port.is_stuck() {
            self.port.reset()?;
        }
        let Some(setup) = self.lane_setup(state, index)? else {
            return Ok(());
        };
        self.port.start_lane(index, setup)?;
        if let Some(vring) = state.vrings.get_mut(index) {
            vring.runs = true;
        }
        Ok(())
    }

    fn lane_setup(&self, state: &State, index: usize) -> Result<Option<LaneSetup>, SessionError> {
        let no_vring = || SessionError::NoVring {
            index,
            queues: state.vrings.len(),
        };
        let vring = state.vrings.get(index).ok_or_else(no_vring)?;
        let stats = self.port.stats(index).ok_or_else(no_vring)?;
        let (Some(areas), Some(size)) = (vring.areas(), vring.size) else {
            return Ok(None);
        };
        let area = |(area, address, len): (&'static str, FrontendAddress, usize)| {
            let guest = state.table.to_guest(address);
            let range = guest.and_then(|guest| state.table.host_range(guest, len));
            range.ok_or(SessionError::VringMemory {
                index,
                area,
                address: address.0,
                len,
            })
        };
        let [desc, avail, used] = areas.map(area);
        let memory = VirtqMemory::new(size.into(), desc?, avail?, used?)
            .map_err(|source| SessionError::Virtq { index, source })?;
        let wake_ups = if state.features & feature::EVENT_IDX != 0 {
            WakeUps::ByEventIdx
        } else {
            WakeUps::ByFlag
        };
        let (virtq, healed) = Virtq::start(memory, vring.base, wake_ups);
        let name = format!(
            "{} {} {}",
            self.port.name(),
            Direction::of(index).as_str(),
            index / 2
        );
        if let Err(healed) = healed {
            let (base, used) = (healed.base, healed.used);
            tracing::info!(
                lane = name,
                base,
                used,
                "the base sent is not the used index, which is taken"
            );
        }
        let twelve = feature::VERSION_1 | feature::MRG_RXBUF;
        let header_len = if state.features & twelve != 0 {
            net_header::MODERN_LEN
        } else {
            net_header::LEGACY_LEN
        };
        let clone = |what: &'static str, file: Option<&File>| {
            file.map(File::try_clone)
                .transpose()
                .map_err(|source| SessionError::Descriptor { index, what, source })
        };
        let kick = match &vring.kick {
            Some(Kick::By(file)) => Some(file),
            Some(Kick::Never) | None => None,
        };
        Ok(Some(LaneSetup {
            virtq,
            table: Arc::clone(&state.table),
            header_len,
            max_frame: self.port.max_frame(),
            kick: clone("kick", kick)?,
            call: clone("call", vring.call.as_ref())?,
            err: clone("err", vring.err.as_ref())?,
            stats: Arc::clone(stats),
            map: Arc::clone(self.port.map()),
            // The port knows.
            link_up: false,
            missing_memory: if state.regions_in_motion {
                MissingMemory::IsAwaited
            } else {
                MissingMemory::IsBroken
            },
            name,
        }))
    }

    /// Stops the lane of virtqueue `index`, if it runs. When this returns without an error, neither we nor the card
    /// touch the guest's memory for it, and it is at rest.
    ///
    /// A queue that will not stop takes all lanes of the device along: they are at rest too, until they are
    /// [settled](Self::settle_after).
    pub(super) fn stop(&self, state: &mut State, index: usize) -> Result<Reach, SessionError> {
        self.halt(state, index)?;
        if !self.port.is_stuck() {
            return Ok(Reach::One);
        }
        self.stop_all(state)?;
        Ok(Reach::All)
    }

    /// Stops all lanes. After an error the card may still use the guest's memory.
    pub(super) fn stop_all(&self, state: &mut State) -> Result<(), SessionError> {
        self.halt_all(state)?;
        if self.port.is_stuck() {
            self.port.reset()?;
        }
        Ok(())
    }

    /// Stops all lanes and keeps their places. Goes on after an error and returns the first.
    pub(super) fn halt_all(&self, state: &mut State) -> Result<(), SessionError> {
        let mut result = Ok(());
        for index in 0..state.vrings.len() {
            let halted = self.halt(state, index);
            result = result.and(halted);
        }
        result
    }

    /// Stops one lane and keeps its place. Whether the card's queue stopped, the port knows.
    pub(super) fn halt(&self, state: &mut State, index: usize) -> Result<(), SessionError> {
        let Some(vring) = state.vrings.get_mut(index).filter(|vring| vring.runs) else {
            return Ok(());
        };
        vring.runs = false;
        if let Some(first_unused) = self.port.stop_lane(index)? {
            vring.base = first_unused;
        }
        Ok(())
    }
}
