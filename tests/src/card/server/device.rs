//! What a vfio-user client sees: regions, interrupts, DMA maps, reset.
//!
//! The crate's client does not look at error flags in replies, and waits for ever for the data of a read that
//! failed. So reads never fail here: an impossible one gives ones, as PCI does. A DMA map that fails is said
//! on standard error, and shows when the card uses it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR3_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS, VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};

use super::host::{Event, Host};
use super::memory::MappedMemory;
use super::shared::Shared;
use crate::card::{BAR0_LEN_BYTES, BAR3_LEN_BYTES, CONFIG_LEN_BYTES, Signal, VECTORS};

pub(super) struct Device {
    shared: Arc<Shared>,
    memory: Arc<MappedMemory>,
    host: Host,
    keep_on_close: bool,
}

pub(super) fn regions() -> Vec<ServerRegion> {
    (0..VFIO_PCI_NUM_REGIONS)
        .map(|index| {
            let size = match index {
                VFIO_PCI_BAR0_REGION_INDEX => u64::from(BAR0_LEN_BYTES),
                VFIO_PCI_BAR3_REGION_INDEX => u64::from(BAR3_LEN_BYTES),
                VFIO_PCI_CONFIG_REGION_INDEX => CONFIG_LEN_BYTES as u64,
                _ => 0,
            };
            let flags = if size > 0 {
                VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE
            } else {
                0
            };
            let region_info = vfio_region_info {
                argsz: u32::try_from(size_of::<vfio_region_info>()).unwrap_or(0),
                flags,
                index,
                size,
                offset: u64::from(index) << 40,
                ..vfio_region_info::default()
            };
            ServerRegion {
                region_info,
                sparse_areas: Vec::new(),
                mmap_fd: None,
            }
        })
        .collect()
}

pub(super) fn irqs() -> Vec<IrqInfo> {
    (0..VFIO_PCI_NUM_IRQS)
        .map(|index| match index {
            VFIO_PCI_MSIX_IRQ_INDEX => {
                let flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE;
                IrqInfo {
                    index,
                    flags,
                    count: u32::from(VECTORS),
                }
            }
            VFIO_PCI_ERR_IRQ_INDEX | VFIO_PCI_REQ_IRQ_INDEX => IrqInfo {
                index,
                flags: VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE,
                count: 1,
            },
            _ => IrqInfo {
                index,
                flags: 0,
                count: 0,
            },
        })
        .collect()
}

impl Device {
    pub(super) fn new(
        shared: Arc<Shared>,
        memory: Arc<MappedMemory>,
        host: Host,
        keep_on_close: bool,
    ) -> Self {
        Self {
            shared,
            memory,
            host,
            keep_on_close,
        }
    }

    /// Serves one client after the other, for ever.
    pub(super) fn serve(mut self, server: &vfio_user::Server) {
        loop {
            // On a thread of its own, for the crate panics on a malformed version message.
            let outcome = std::thread::scope(|scope| scope.spawn(|| server.run(&mut self)).join());
            match outcome {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("card-model: connection ended: {error}"),
                Err(_) => eprintln!("card-model: connection ended: its thread panicked"),
            }
            self.host.forget();
            if !self.keep_on_close {
                self.close();
            }
        }
    }

    fn close(&self) {
        // Reset first: with Bus Master off nothing can touch the memory that goes away.
        self.shared.with(|card| {
            card.close();
            self.memory.clear();
        });
    }
}

impl ServerBackend for Device {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let Ok(offset) = u32::try_from(offset) else {
            data.fill(u8::MAX);
            return Ok(());
        };
        self.shared.with(|card| match region {
            VFIO_PCI_CONFIG_REGION_INDEX => match u16::try_from(offset) {
                Ok(offset) => card.config_read(offset, data),
                Err(_) => data.fill(u8::MAX),
            },
            VFIO_PCI_BAR0_REGION_INDEX => {
                for_each_dword(offset, data, |at| card.read32(at));
            }
            VFIO_PCI_BAR3_REGION_INDEX => {
                for_each_dword(offset, data, |at| card.msix_read32(at));
            }
            _ => data.fill(u8::MAX),
        });
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let Ok(offset) = u32::try_from(offset) else {
            return Ok(());
        };
        self.shared.with(|card| match region {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                if let Ok(offset) = u16::try_from(offset) {
                    card.config_write(offset, data);
                }
            }
            VFIO_PCI_BAR0_REGION_INDEX => match data.as_chunks() {
                (dwords, []) => {
                    for (at, dword) in (offset..).step_by(4).zip(dwords) {
                        card.write32(at, u32::from_le_bytes(*dword));
                    }
                }
                // Not a register access at all: a misaligned one is reported by the card.
                _ => card.write32(offset | 1, 0),
            },
            VFIO_PCI_BAR3_REGION_INDEX => {
                for (at, dword) in (offset..).step_by(4).zip(data.as_chunks().0) {
                    card.msix_write32(at, u32::from_le_bytes(*dword));
                }
            }
            _ => {}
        });
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let writable = flags.contains(DmaMapFlags::WRITE);
        // Under the card's lock, so that no DMA sees the map half changed.
        self.shared
            .with(|_| match fd {
                Some(file) => self.memory.map(address, size, file, offset, writable),
                None => Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "no file descriptor came with it",
                )),
            })
            .inspect_err(|error| {
                eprintln!("card-model: cannot map {size:#x} bytes at iova {address:#x}: {error}")
            })
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.shared
            .with(|card| {
                if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
                    for (iova, len) in self.memory.ranges() {
                        card.note_unmapped(iova, len);
                    }
                    self.memory.clear();
                    return Ok(());
                }
                card.note_unmapped(address, size);
                self.memory.unmap(address, size)
            })
            .inspect_err(|error| {
                eprintln!("card-model: cannot unmap {size:#x} bytes at iova {address:#x}: {error}")
            })
    }

    fn reset(&mut self) -> io::Result<()> {
        self.shared.with(crate::card::Card82576::reset);
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        const SET: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        const CLEAR: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        let vectors = start..start.checked_add(count).ok_or(io::ErrorKind::InvalidInput)?;
        let event = match index {
            VFIO_PCI_REQ_IRQ_INDEX => Some(Event::Request),
            VFIO_PCI_ERR_IRQ_INDEX => Some(Event::Error),
            _ => None,
        };
        if let Some(event) = event {
            if (flags, start, count) != (SET, 0, 1) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let signal = fds.into_iter().next();
            self.host
                .listen(event, signal.map(|file| Box::new(file) as Box<dyn Signal>));
            return Ok(());
        }
        if index != VFIO_PCI_MSIX_IRQ_INDEX || vectors.end > u32::from(VECTORS) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut fds = fds.into_iter();
        self.shared.with(|card| match flags {
            SET => {
                for vector in vectors {
                    let signal = fds.next().map(|file| Box::new(file) as Box<dyn Signal>);
                    card.set_irq(u8::try_from(vector).unwrap_or(0), signal);
                }
                Ok(())
            }
            CLEAR if count == 0 => {
                (0..VECTORS).for_each(|vector| card.set_irq(vector, None));
                Ok(())
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        })
    }
}

/// Reads `data` as whole registers; anything else comes out as ones, and is reported as misaligned.
fn for_each_dword(offset: u32, data: &mut [u8], mut read: impl FnMut(u32) -> u32) {
    match data.as_chunks_mut() {
        (dwords, []) => {
            for (at, dword) in (offset..).step_by(4).zip(dwords) {
                *dword = read(at).to_le_bytes();
            }
        }
        (_, _) => {
            read(offset | 1);
            data.fill(u8::MAX);
        }
    }
}
