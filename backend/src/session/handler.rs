//! `vhost`'s trait, message by message. Each one changes what is known and settles what follows.
//!
//! Read with: vhost-user, "Front-end message types".

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{FdFlags, fcntl_setfd};
use vfio_glue::address::{FrontendAddress, GuestAddress};
use vfio_glue::memory::{RegionSpec, VirtqMemory};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandler};

use super::vring::{Addresses, Kick, Vring};
use super::{Session, SessionError, State, feature};

/// What QEMU uses at most. May never become less for a front-end that comes back.
const MEM_SLOTS: usize = 512;

impl Session {
    /// Runs one request and turns its refusal into what `vhost` sends, after telling the operator why.
    fn answer<R>(
        &self,
        request: &'static str,
        work: impl FnOnce(&mut State) -> Result<R, SessionError>,
    ) -> VhostResult<R> {
        let result = work(&mut self.state());
        result.map_err(|error| {
            let error = anyhow::Error::new(error);
            if self.is_worth_a_line() {
                tracing::warn!(port = self.port.name(), request, "refused: {error:#}");
            }
            VhostError::ReqHandlerError(io::Error::other(format!("{error:#}")))
        })
    }

    /// A port of one pair is as it is to a front-end that knows nothing of several.
    fn features_offered(&self) -> u64 {
        if self.port.queues() > 2 {
            feature::OFFERED | feature::MQ
        } else {
            feature::OFFERED
        }
    }

    fn not_offered<R>(&self, request: &'static str, what: &'static str) -> VhostResult<R> {
        self.answer(request, |_| Err(SessionError::NotOffered { what }))
    }

    /// Changes what is known of virtqueue `index`, then brings its lane to it. A lane that runs on what is changed is
    /// stopped first.
    fn change_vring(
        &self,
        request: &'static str,
        index: usize,
        change: impl FnOnce(&mut Vring) -> Result<(), SessionError>,
    ) -> VhostResult<()> {
        self.answer(request, |state| {
            let stopped = self.stop(state, index)?;
            let changed = vring(state, index).and_then(change);
            // A change that is refused leaves what was known, and the lane goes on with that.
            let settled = self.settle_after(state, index, stopped);
            changed.and(settled)
        })
    }
}

fn vring(state: &mut State, index: usize) -> Result<&mut Vring, SessionError> {
    let queues = state.vrings.len();
    state
        .vrings
        .get_mut(index)
        .ok_or(SessionError::NoVring { index, queues })
}

/// Makes a received eventfd ours: not inherited by programs, and not blocking a worker. Nothing but an eventfd: a
/// write to a pipe or to a file of a user's file system can take for ever.
fn adopt(index: usize, what: &'static str, fd: Option<File>) -> Result<Option<File>, SessionError> {
    let Some(fd) = fd else { return Ok(None) };
    let failed = |source: io::Error| SessionError::Descriptor { index, what, source };
    let found = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(failed)?;
    if found.as_os_str() != "anon_inode:[eventfd]" {
        let found = found.display().to_string();
        return Err(SessionError::NotAnEventfd { index, what, found });
    }
    let ready = fcntl_setfd(&fd, FdFlags::CLOEXEC)
        .and_then(|()| fcntl_getfl(&fd))
        .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK));
    ready.map_err(|source| failed(source.into()))?;
    Ok(Some(fd))
}

fn region(guest: u64, frontend: u64, len: u64, file_offset: u64, file: File) -> RegionSpec {
    // Only programs we never run would inherit it; a failure changes nothing for this process.
    let _ = fcntl_setfd(&file, FdFlags::CLOEXEC);
    let (guest, frontend) = (GuestAddress(guest), FrontendAddress(frontend));
    RegionSpec {
        guest,
        frontend,
        len,
        file: Arc::new(file),
        file_offset,
    }
}

fn protocol_offered() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

fn index_of(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

impl VhostUserBackendReqHandler for Session {
    fn set_owner(&self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&self) -> VhostResult<()> {
        self.answer("RESET_OWNER", |state| {
            self.stop_all(state)?;
            state
                .vrings
                .iter_mut()
                .for_each(|vring| *vring = Vring::default());
            self.forget_memory(state);
            Ok(())
        })
    }

    fn reset_device(&self) -> VhostResult<()> {
        self.not_offered("RESET_DEVICE", "RESET_DEVICE")
    }

    fn get_features(&self) -> VhostResult<u64> {
        Ok(self.features_offered())
    }

    fn set_features(&self, features: u64) -> VhostResult<()> {
        self.answer("SET_FEATURES", |state| {
            let extra = features & !self.features_offered();
            if extra != 0 {
                return Err(SessionError::Features {
                    asked: features,
                    extra,
                });
            }
            if features != state.features {
                self.stop_all(state)?;
                state.features = features;
            }
            self.settle_all(state)
        })
    }

    fn get_protocol_features(&self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(protocol_offered())
    }

    fn set_protocol_features(&self, features: u64) -> VhostResult<()> {
        self.answer("SET_PROTOCOL_FEATURES", |state| {
            let extra = features & !protocol_offered().bits();
            if extra != 0 {
                return Err(SessionError::Features {
                    asked: features,
                    extra,
                });
            }
            state.protocol_features = features;
            Ok(())
        })
    }

    fn get_queue_num(&self) -> VhostResult<u64> {
        // For a network device this counts pairs: what QEMU and DPDK compare it with.
        Ok(self.port.queues() as u64 / 2)
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<vhost::VhostUserMemoryRegionBase>>> {
        self.answer("SET_MEM_TABLE", |state| {
            if regions.len() != files.len() {
                return Err(SessionError::Files {
                    regions: regions.len(),
                    files: files.len(),
                });
            }
            let announced = regions.iter().zip(files).map(|(announced, file)| {
                let (guest, frontend) = (announced.guest_phys_addr, announced.user_addr);
                region(
                    guest,
                    frontend,
                    announced.memory_size,
                    announced.mmap_offset,
                    file,
                )
            });
            self.change_memory(state, announced.collect())?;
            Ok(None)
        })
    }

    fn get_max_mem_slots(&self) -> VhostResult<u64> {
        Ok(MEM_SLOTS as u64)
    }

    fn add_mem_region(
        &self,
        announced: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<vhost::VhostUserMemoryRegionBase>> {
        self.answer("ADD_MEM_REG", |state| {
            if state.table.regions().len() >= MEM_SLOTS {
                return Err(SessionError::Slots { slots: MEM_SLOTS });
            }
            let (guest, frontend) = (announced.guest_phys_addr, announced.user_addr);
            let mut wanted: Vec<RegionSpec> = state.table.regions().to_vec();
            wanted.push(region(
                guest,
                frontend,
                announced.memory_size,
                announced.mmap_offset,
                file,
            ));
            self.change_memory(state, wanted)?;
            Ok(None)
        })
    }

    fn remove_mem_region(&self, announced: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        self.answer("REM_MEM_REG", |state| {
            let (guest, frontend, len) = (
                announced.guest_phys_addr,
                announced.user_addr,
                announced.memory_size,
            );
            let is_meant =
                |spec: &RegionSpec| spec.guest.0 == guest && spec.frontend.0 == frontend && spec.len == len;
            let mut wanted: Vec<RegionSpec> = state.table.regions().to_vec();
            let before = wanted.len();
            wanted.retain(|spec| !is_meant(spec));
            if wanted.len() == before {
                return Err(SessionError::NoRegion { guest, frontend, len });
            }
            // Before any lane starts again: until the region is back, the guest's descriptors may point into it.
            state.regions_in_motion = true;
            self.change_memory(state, wanted)
        })
    }

    fn set_vring_num(&self, index: u32, num: u32) -> VhostResult<()> {
        let index = index_of(index);
        self.change_vring("SET_VRING_NUM", index, |vring| {
            let size = VirtqMemory::check_size(num).map_err(|source| SessionError::Size { index, source })?;
            vring.size = Some(size);
            Ok(())
        })
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        self.change_vring("SET_VRING_ADDR", index_of(index), |vring| {
            let (desc, avail) = (FrontendAddress(descriptor), FrontendAddress(available));
            vring.addresses = Some(Addresses {
                desc,
                avail,
                used: FrontendAddress(used),
            });
            Ok(())
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> VhostResult<()> {
        let index = index_of(index);
        self.change_vring("SET_VRING_BASE", index, |vring| {
            vring.base = u16::try_from(base).map_err(|_| SessionError::Base { index, base })?;
            Ok(())
        })
    }

    fn get_vring_base(&self, index: u32) -> VhostResult<VhostUserVringState> {
        self.answer("GET_VRING_BASE", |state| {
            let at = index_of(index);
            let stopped = self.stop(state, at)?;
            let vring = vring(state, at)?;
            vring.kick = None;
            vring.call = None;
            let base = u32::from(vring.base);
            // The answer is true whatever becomes of those that a reset took along.
            if let Err(error) = self.settle_others(state, at, stopped) {
                let error: &dyn std::error::Error = &error;
                tracing::error!(
                    port = self.port.name(),
                    error,
                    "a lane did not start again after a reset"
                );
            }
            Ok(VhostUserVringState::new(index, base))
        })
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = usize::from(index);
        self.change_vring("SET_VRING_KICK", index, |vring| {
            vring.kick = Some(adopt(index, "kick", fd)?.map_or(Kick::Never, Kick::By));
            Ok(())
        })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = usize::from(index);
        self.answer("SET_VRING_CALL", |state| {
            let fd = adopt(index, "call", fd)?;
            let for_lane = clone(index, "call", fd.as_ref())?;
            vring(state, index)?.call = fd;
            if self.port.is_to_be_apart() {
                let stopped = self.stop(state, index)?;
                return self.settle_after(state, index, stopped);
            }
            self.port.with_lane(index, move |lane| lane.set_call(for_lane))?;
            Ok(())
        })
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = usize::from(index);
        self.answer("SET_VRING_ERR", |state| {
            let fd = adopt(index, "err", fd)?;
            let for_lane = clone(index, "err", fd.as_ref())?;
            vring(state, index)?.err = fd;
            self.port.with_lane(index, move |lane| lane.set_err(for_lane))?;
            Ok(())
        })
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> VhostResult<()> {
        self.answer("SET_VRING_ENABLE", |state| {
            let index = index_of(index);
            vring(state, index)?.enabled = enable;
            self.settle(state, index)
        })
    }

    fn get_config(&self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        self.not_offered("GET_CONFIG", "CONFIG")
    }

    fn set_config(&self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        self.not_offered("SET_CONFIG", "CONFIG")
    }

    fn set_gpu_socket(&self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        self.not_offered("GPU_SET_SOCKET", "a GPU")
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        self.not_offered("GET_SHARED_OBJECT", "SHARED_OBJECT")
    }

    fn get_inflight_fd(&self, _inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        self.not_offered("GET_INFLIGHT_FD", "INFLIGHT_SHMFD")
    }

    fn set_inflight_fd(&self, _inflight: &VhostUserInflight, _file: File) -> VhostResult<()> {
        self.not_offered("SET_INFLIGHT_FD", "INFLIGHT_SHMFD")
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        self.not_offered("SET_DEVICE_STATE_FD", "DEVICE_STATE")
    }

    fn check_device_state(&self) -> VhostResult<()> {
        self.not_offered("CHECK_DEVICE_STATE", "DEVICE_STATE")
    }

    fn get_shmem_config(&self) -> VhostResult<VhostUserShMemConfig> {
        self.not_offered("GET_SHMEM_CONFIG", "SHMEM")
    }

    fn set_log_base(&self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        self.not_offered("SET_LOG_BASE", "LOG_SHMFD")
    }
}

fn clone(index: usize, what: &'static str, file: Option<&File>) -> Result<Option<File>, SessionError> {
    file.map(File::try_clone)
        .transpose()
        .map_err(|source| SessionError::Descriptor { index, what, source })
}
