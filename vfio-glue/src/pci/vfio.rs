//! A PCI function through the kernel's VFIO: regions, interrupts and reset of one device file.
//!
//! ```text
//! iommu back end ──device file──▶ VfioFunction ──▶ mapped BARs, pread/pwrite, eventfds
//! ```
//!
//! How the file was opened (character node or group) makes no difference from here on.
//!
//! Read with: Linux `include/uapi/linux/vfio.h`, "Device"; `Documentation/driver-api/vfio.rst`.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vfio_bindings::bindings::vfio;

use super::mmio::MappedBar;
use super::{HostEvent, PciError, PciFunction, Registers, has_irq};
use crate::sys;

const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const BARS: usize = 6;

/// A part of the device's file.
#[derive(Clone, Copy, Debug)]
struct RegionPlace {
    offset: u64,
    len: u64,
    flags: u32,
}

impl RegionPlace {
    fn allows(self, flag: u32) -> bool {
        self.flags & flag == flag
    }
}

/// An open PCI function of the kernel's VFIO. Closing the last handle on its file resets it.
pub(crate) struct VfioFunction {
    name: String,
    config: RegionPlace,
    bars: [RegionPlace; BARS],
    vectors: u16,
    state: Mutex<State>,
    device: Arc<File>,
}

#[derive(Default)]
struct State {
    /// BARs that somebody holds: each is mapped once.
    windows: [Option<Weak<dyn Registers>>; BARS],
    /// Whether MSI-X is on, with all vectors.
    msix: bool,
}

impl VfioFunction {
    /// Reads what there is to know about a bound and attached device.
    ///
    /// # Errors
    ///
    /// The name of the call and the kernel's answer.
    pub(crate) fn new(name: String, device: Arc<File>) -> Result<Self, (&'static str, io::Error)> {
        let info = sys::device_info(&device).map_err(|source| ("VFIO_DEVICE_GET_INFO", source))?;
        if info.flags & vfio::VFIO_DEVICE_FLAGS_PCI == 0 {
            let source = io::Error::new(io::ErrorKind::Unsupported, "not a PCI device");
            return Err(("VFIO_DEVICE_GET_INFO", source));
        }
        let region = |index| {
            sys::region_info(&device, index)
                .map(|info| RegionPlace {
                    offset: info.offset,
                    len: info.size,
                    flags: info.flags,
                })
                .map_err(|source| ("VFIO_DEVICE_GET_REGION_INFO", source))
        };
        let config = region(vfio::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let mut bars = [config; BARS];
        for (index, bar) in (vfio::VFIO_PCI_BAR0_REGION_INDEX..).zip(&mut bars) {
            *bar = region(index)?;
        }
        let vectors = sys::irq_count(&device, vfio::VFIO_PCI_MSIX_IRQ_INDEX)
            .map_err(|source| ("VFIO_DEVICE_GET_IRQ_INFO", source))?;
        Ok(Self {
            name,
            config,
            bars,
            vectors: u16::try_from(vectors).unwrap_or(u16::MAX),
            state: Mutex::default(),
            device,
        })
    }

    fn config_error(&self, access: &'static str, offset: u16, len: usize) -> impl Fn(io::Error) -> PciError {
        move |source| PciError::Config {
            device: self.name.clone(),
            access,
            offset,
            len,
            source,
        }
    }

    /// Where an access to configuration space goes in the file, if it stays inside.
    fn config_place(&self, offset: u16, len: usize) -> io::Result<u64> {
        let end = u64::from(offset).checked_add(len as u64);
        if end.is_some_and(|end| end <= self.config.len) {
            Ok(self.config.offset + u64::from(offset))
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// A mapped BAR on which memory decoding goes off answers with SIGBUS, which would end every port.
    fn check_memory_stays_on(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        let command = usize::from(COMMAND).checked_sub(usize::from(offset));
        let turns_off = command
            .and_then(|at| bytes.get(at))
            .is_some_and(|low| low & COMMAND_MEMORY == 0);
        let held = |window: &Option<Weak<dyn Registers>>| {
            window.as_ref().is_some_and(|window| window.strong_count() > 0)
        };
        if turns_off && self.state().windows.iter().any(held) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "memory decoding cannot go off while a BAR is mapped",
            ));
        }
        Ok(())
    }

    fn open_bar(&self, index: u8, place: RegionPlace) -> Result<Arc<dyn Registers>, PciError> {
        let refused = |reason: String| PciError::Bar {
            device: self.name.clone(),
            index,
            reason,
        };
        let len =
            u32::try_from(place.len).map_err(|_| refused(format!("{:#x} bytes are too many", place.len)))?;
        if len == 0 {
            return Err(refused("the function has no such memory BAR".to_owned()));
        }
        if !place.allows(vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE) {
            return Err(refused("it cannot be both read and written".to_owned()));
        }
        if place.allows(vfio::VFIO_REGION_INFO_FLAG_MMAP) {
            match MappedBar::map(&self.device, place.offset, len) {
                Ok(mapped) => return Ok(Arc::new(mapped)),
                Err(error) => {
                    tracing::warn!(device = %self.name, bar = index, %error, "mmap of a BAR failed, using read and write");
                }
            }
        }
        Ok(Arc::new(FileBar {
            device: Arc::clone(&self.device),
            offset: place.offset,
            len,
        }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for VfioFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_config(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PciError> {
        let failed = self.config_error("read", offset, bytes.len());
        let at = self.config_place(offset, bytes.len()).map_err(&failed)?;
        self.device.read_exact_at(bytes, at).map_err(failed)
    }

    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<(), PciError> {
        let failed = self.config_error("write", offset, bytes.len());
        let at = self.config_place(offset, bytes.len()).map_err(&failed)?;
        self.check_memory_stays_on(offset, bytes).map_err(&failed)?;
        self.device.write_all_at(bytes, at).map_err(failed)
    }

    fn bar(&self, index: u8) -> Result<Arc<dyn Registers>, PciError> {
        let slot = usize::from(index);
        let place = *self.bars.get(slot).ok_or_else(|| PciError::Bar {
            device: self.name.clone(),
            index,
            reason: "BARs are numbered 0 to 5".to_owned(),
        })?;
        let mut state = self.state();
        if let Some(window) = state.windows[slot].as_ref().and_then(Weak::upgrade) {
            return Ok(window);
        }
        let window = self.open_bar(index, place)?;
        state.windows[slot] = Some(Arc::downgrade(&window));
        Ok(window)
    }

    fn vectors(&self) -> u16 {
        self.vectors
    }

    fn set_vector(&self, vector: u16, event: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        let failed = |source| PciError::Interrupt {
            device: self.name.clone(),
            vector,
            vectors: self.vectors,
            source,
        };
        if vector >= self.vectors {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let mut state = self.state();
        if !state.msix {
            if event.is_none() {
                return Ok(());
            }
            // The kernel fixes the number of vectors when MSI-X goes on, so all are enabled, unconnected.
            let all = vec![None; usize::from(self.vectors)];
            sys::set_irqs(&self.device, vfio::VFIO_PCI_MSIX_IRQ_INDEX, 0, &all).map_err(failed)?;
            state.msix = true;
        }
        sys::set_irqs(
            &self.device,
            vfio::VFIO_PCI_MSIX_IRQ_INDEX,
            vector.into(),
            &[event],
        )
        .map_err(failed)
    }

    fn set_host_event(&self, which: HostEvent, event: Option<BorrowedFd<'_>>) -> Result<bool, PciError> {
        let (index, failed) = (which.irq_index(), which.failed(&self.name));
        if !has_irq(sys::irq_count(&self.device, index)).map_err(&failed)? {
            return Ok(false);
        }
        sys::set_irqs(&self.device, index, 0, &[event]).map_err(failed)?;
        Ok(true)
    }

    fn reset(&self) -> Result<(), PciError> {
        sys::reset(&self.device).map_err(|source| PciError::Reset {
            device: self.name.clone(),
            source,
        })
    }
}

/// A BAR the kernel does not let us map: each access is a system call.
struct FileBar {
    device: Arc<File>,
    offset: u64,
    len: u32,
}

impl FileBar {
    fn place(&self, offset: u32) -> Option<u64> {
        let inside = offset.is_multiple_of(4) && offset.checked_add(4).is_some_and(|end| end <= self.len);
        inside.then(|| self.offset + u64::from(offset))
    }
}

impl Registers for FileBar {
    fn read32(&self, offset: u32) -> u32 {
        let mut bytes = [0xff; 4];
        let read = self
            .place(offset)
            .map(|at| self.device.read_exact_at(&mut bytes, at));
        match read {
            Some(Ok(())) => u32::from_le_bytes(bytes),
            _ => u32::MAX,
        }
    }

    fn write32(&self, offset: u32, value: u32) {
        // The system call orders it behind everything stored before. A write to a device that has gone vanishes.
        if let Some(at) = self.place(offset) {
            let _ = self.device.write_all_at(&value.to_le_bytes(), at);
        }
    }

    fn len(&self) -> u32 {
        self.len
    }
}
