//! The IOMMU of devices that live in other processes: each is sent the memory it may reach.
//!
//! ```text
//! map ──DMA_MAP with the file──▶ every attached device; all of it again to one that comes later
//! ```
//!
//! A device that has left holds up nobody: it is logged once and skipped. Its process drops what was mapped for
//! it when the connection ends.
//!
//! Read with: the vfio-user protocol specification, VFIO_USER_DMA_MAP and VFIO_USER_DMA_UNMAP.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{DeviceAddress, Iommu, IommuError, IommuKind, MapRequest, MappedBy};
use crate::address::Iova;
use crate::pci::PciFunction;
use crate::pci::vfio_user::{Client, VfioUserFunction};

/// What is mapped and who has been told.
#[derive(Default)]
pub struct VfioUserIommu {
    mapped: BTreeMap<u64, MapRequest>,
    devices: BTreeMap<PathBuf, Arc<Client>>,
}

impl VfioUserIommu {
    /// An address space with nothing in it and no device.
    pub fn new() -> Self {
        Self::default()
    }

    fn present(&self) -> impl Iterator<Item = &Arc<Client>> {
        self.devices.values().filter(|client| !client.is_gone())
    }
}

fn send(client: &Client, request: &MapRequest) -> io::Result<()> {
    client.dma_map(request.file.as_fd(), request.offset, request.len, request.iova)
}

fn refused(path: &Path, source: &io::Error) -> IommuError {
    IommuError::VfioUser {
        path: path.to_owned(),
        reason: source.to_string(),
    }
}

impl Iommu for VfioUserIommu {
    fn kind(&self) -> IommuKind {
        IommuKind::VfioUser
    }

    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError> {
        Ok(None)
    }

    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError> {
        let mut told: Vec<&Arc<Client>> = Vec::new();
        for client in self.present() {
            match send(client, request) {
                Ok(()) => told.push(client),
                Err(_) if client.is_gone() => {}
                Err(source) => {
                    for client in told {
                        if let Err(error) = client.dma_unmap(request.iova, request.len) {
                            // The IOVA is used again: a device that kept this range would reach the wrong memory.
                            tracing::error!(device = %client.path().display(), %error, "undoing DMA_MAP failed, the device is let go");
                            client.close();
                        }
                    }
                    return Err(request.refused("VFIO_USER_DMA_MAP", source));
                }
            }
        }
        let lasting = MapRequest { ..request.clone() };
        self.mapped.insert(request.iova.raw(), lasting);
        Ok(MappedBy::File)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let failed = |source| IommuError::Unmap {
            call: "VFIO_USER_DMA_UNMAP",
            iova,
            len,
            source,
        };
        if self
            .mapped
            .get(&iova.raw())
            .is_none_or(|request| request.len != len)
        {
            return Err(failed(io::Error::other("no mapping has these bounds")));
        }
        self.mapped.remove(&iova.raw());
        // One that refuses is no reason to leave it with the others.
        let mut outcome = Ok(());
        for client in self.present() {
            match client.dma_unmap(iova, len) {
                Err(source) if !client.is_gone() => outcome = outcome.and(Err(failed(source))),
                _ => {}
            }
        }
        outcome
    }

    fn attach(&mut self, device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError> {
        let DeviceAddress::VfioUser(path) = device else {
            return Err(IommuError::WrongKind {
                iommu: self.kind().as_str(),
                device: device.clone(),
            });
        };
        let client = Client::connect(path).map_err(|source| refused(path, &source))?;
        let function = VfioUserFunction::new(device.to_string(), Arc::clone(&client))
            .map_err(|source| refused(path, &source))?;
        for request in self.mapped.values() {
            // A refusal ends the connection, and with it what was mapped before.
            send(&client, request).map_err(|source| request.refused("VFIO_USER_DMA_MAP", source))?;
        }
        self.devices.insert(path.clone(), client);
        Ok(Arc::new(function))
    }

    fn detach(&mut self, device: &DeviceAddress) -> Result<(), IommuError> {
        if let DeviceAddress::VfioUser(path) = device
            && let Some(client) = self.devices.remove(path)
        {
            client.close();
        }
        Ok(())
    }

    fn pins_now(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;
    use std::thread::JoinHandle;

    use vfio_bindings::bindings::vfio;
    use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

    use super::*;
    use crate::memory::HostRange;
    use crate::pci::HostEvent;
    use crate::pci::config_space::{BusMaster, identity, set_bus_master};

    const BAR_BYTES: u64 = 64;
    const ODD: u64 = 0x6666_0000;

    /// A card of one BAR: register 4 fires vector 1; an access at 8 is refused. Its host can want it back, and tells of no
    /// errors.
    #[derive(Default)]
    struct Card {
        config: Vec<u8>,
        bar: Vec<u8>,
        mapped: Vec<(u64, u64, u64, File)>,
        vectors: BTreeMap<u32, File>,
        release: Option<File>,
        resets: u32,
        refuses_map: Option<u64>,
        refuses_unmap: Option<u64>,
    }

    /// What the card and the test both see.
    #[derive(Clone)]
    struct Shared(Arc<Mutex<Card>>);

    impl ServerBackend for Shared {
        fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
            let card = self.0.lock().unwrap();
            if region == 0 && offset == 8 {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            let bytes = if region == 0 { &card.bar } else { &card.config };
            let at = usize::try_from(offset).unwrap();
            data.copy_from_slice(&bytes[at..at + data.len()]);
            Ok(())
        }

        fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
            let mut card = self.0.lock().unwrap();
            if region == 0 && offset == 4 {
                let mut vector = card.vectors.get(&1).ok_or(io::ErrorKind::NotFound)?;
                return vector.write_all(&1_u64.to_ne_bytes());
            }
            let bytes = if region == 0 {
                &mut card.bar
            } else {
                &mut card.config
            };
            let at = usize::try_from(offset).unwrap();
            bytes[at..at + data.len()].copy_from_slice(data);
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
            assert_eq!(flags, DmaMapFlags::READ_WRITE);
            let mut card = self.0.lock().unwrap();
            if card.refuses_map == Some(address) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            card.mapped.push((address, size, offset, fd.unwrap()));
            Ok(())
        }

        fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
            let mut card = self.0.lock().unwrap();
            if card.refuses_unmap == Some(address) {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            let mapped = &mut card.mapped;
            let found = mapped
                .iter()
                .position(|(start, len, ..)| (*start, *len) == (address, size));
            mapped.remove(found.ok_or(io::ErrorKind::NotFound)?);
            Ok(())
        }

        fn reset(&mut self) -> io::Result<()> {
            self.0.lock().unwrap().resets += 1;
            Ok(())
        }

        fn set_irqs(
            &mut self,
            index: u32,
            flags: u32,
            start: u32,
            count: u32,
            fds: Vec<File>,
        ) -> io::Result<()> {
            assert_eq!(
                flags,
                vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER
            );
            assert_eq!(count, 1);
            let mut card = self.0.lock().unwrap();
            if index == vfio::VFIO_PCI_REQ_IRQ_INDEX {
                card.release = fds.into_iter().next();
                return Ok(());
            }
            assert_eq!(index, vfio::VFIO_PCI_MSIX_IRQ_INDEX);
            let vectors = &mut card.vectors;
            match fds.into_iter().next() {
                Some(fd) => vectors.insert(start, fd),
                None => vectors.remove(&start),
            };
            Ok(())
        }
    }

    /// A card in a thread of its own, for one connection.
    struct Served {
        card: Shared,
        device: DeviceAddress,
        thread: JoinHandle<()>,
        _folder: tempfile::TempDir,
    }

    fn serve() -> Served {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("card.sock");
        let regions = (0..9).map(|index| ServerRegion {
            region_info: vfio::vfio_region_info {
                argsz: 32,
                flags: vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE,
                index,
                size: if index == 0 { BAR_BYTES } else { 0 },
                ..Default::default()
            },
            sparse_areas: Vec::new(),
            mmap_fd: None,
        });
        let irqs = (0..5).map(|index| IrqInfo {
            index,
            flags: vfio::VFIO_IRQ_INFO_EVENTFD,
            count: match index {
                vfio::VFIO_PCI_MSIX_IRQ_INDEX => 3,
                vfio::VFIO_PCI_REQ_IRQ_INDEX => 1,
                _ => 0,
            },
        });
        let server = Server::new(&path, true, irqs.collect(), regions.collect()).unwrap();
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0x86, 0x80, 0xc9, 0x10]);
        let card = Shared(Arc::new(Mutex::new(Card {
            config,
            bar: vec![0x5a; 64],
            ..Card::default()
        })));
        let mut backend = card.clone();
        Served {
            card,
            device: DeviceAddress::VfioUser(path),
            thread: std::thread::spawn(move || server.run(&mut backend).unwrap()),
            _folder: folder,
        }
    }

    fn request(iova: u64, text: &[u8]) -> MapRequest {
        let memfd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(memfd);
        file.set_len(8192).unwrap();
        file.write_all_at(text, 4096).unwrap();
        MapRequest {
            iova: Iova::new(iova),
            len: 4096,
            host: HostRange::of_file(&file, 4096, 4096).unwrap(),
            same_as: None,
            file: Arc::new(file),
            offset: 4096,
        }
    }

    #[test]
    fn a_device_gets_all_memory_whenever_it_comes_and_loses_what_is_unmapped() {
        let served = serve();
        let mut iommu = VfioUserIommu::new();
        iommu.map(&request(0x10_0000, b"before")).unwrap();
        let _function = iommu.attach(&served.device).unwrap();
        iommu.map(&request(0x20_0000, b"after")).unwrap();
        for (index, text) in [(0, &b"before"[..]), (1, b"after")] {
            let card = served.card.0.lock().unwrap();
            let (_, _, offset, file) = &card.mapped[index];
            let mut seen = vec![0; text.len()];
            file.read_exact_at(&mut seen, *offset).unwrap();
            assert_eq!(seen, text);
        }
        assert!(iommu.unmap(Iova::new(0x10_0000), 8192).is_err(), "other bounds");
        iommu.unmap(Iova::new(0x10_0000), 4096).unwrap();
        assert_eq!(served.card.0.lock().unwrap().mapped.len(), 1);
        iommu.detach(&served.device).unwrap();
        served.thread.join().unwrap();
    }

    #[test]
    fn registers_configuration_reset_and_single_vectors_reach_the_device() {
        let served = serve();
        let mut iommu = VfioUserIommu::new();
        let function = iommu.attach(&served.device).unwrap();
        assert_eq!(identity(function.as_ref()).unwrap().device, 0x10c9);
        set_bus_master(function.as_ref(), BusMaster::On).unwrap();
        assert_eq!(served.card.0.lock().unwrap().config[4], 0b110);

        let bar = function.bar(0).unwrap();
        bar.write32(12, 0x1234_5678);
        assert_eq!(
            (bar.len(), bar.read32(12), bar.read32(16)),
            (64, 0x1234_5678, 0x5a5a_5a5a)
        );
        assert!(function.bar(1).is_err());

        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        function.set_vector(1, Some(event.as_fd())).unwrap();
        bar.write32(4, 0);
        let mut count = [0; 8];
        rustix::io::read(&event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
        function.set_vector(1, None).unwrap();
        assert!(served.card.0.lock().unwrap().vectors.is_empty());
        assert!(function.set_vector(3, None).is_err());
        function.reset().unwrap();
        assert_eq!(served.card.0.lock().unwrap().resets, 1);
        iommu.detach(&served.device).unwrap();
        served.thread.join().unwrap();
    }

    #[test]
    fn the_host_can_ask_for_the_device_and_an_interrupt_that_is_not_there_is_no_error() {
        let served = serve();
        let mut iommu = VfioUserIommu::new();
        let function = iommu.attach(&served.device).unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert!(
            !function
                .set_host_event(HostEvent::Error, Some(event.as_fd()))
                .unwrap()
        );
        assert!(
            function
                .set_host_event(HostEvent::Release, Some(event.as_fd()))
                .unwrap()
        );
        let mut host = served.card.0.lock().unwrap().release.take().unwrap();
        host.write_all(&1_u64.to_ne_bytes()).unwrap();
        let mut count = [0; 8];
        rustix::io::read(&event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
        served.card.0.lock().unwrap().release = Some(host);
        assert!(function.set_host_event(HostEvent::Release, None).unwrap());
        assert!(served.card.0.lock().unwrap().release.is_none());
        iommu.detach(&served.device).unwrap();
        served.thread.join().unwrap();
        let error = function.set_host_event(HostEvent::Release, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{}: the request interrupt could not be set", served.device)
        );
    }

    #[test]
    fn a_refusal_is_an_error_and_the_device_stays() {
        let served = serve();
        let mut iommu = VfioUserIommu::new();
        let function = iommu.attach(&served.device).unwrap();
        let bar = function.bar(0).unwrap();
        assert_eq!(bar.read32(8), u32::MAX);
        assert_eq!(bar.read32(12), 0x5a5a_5a5a);
        served.card.0.lock().unwrap().refuses_map = Some(ODD);
        assert!(iommu.map(&request(ODD, b"")).is_err());
        iommu.map(&request(0x10_0000, b"")).unwrap();
        iommu.detach(&served.device).unwrap();
        served.thread.join().unwrap();
    }

    /// Two cards in the order in which they are told.
    fn serve_two() -> [Served; 2] {
        let mut two = [serve(), serve()];
        two.sort_by_key(|served| served.device.to_string());
        two
    }

    #[test]
    fn a_range_one_device_will_not_give_up_leaves_the_others_and_is_not_given_to_the_next() {
        let [first, second] = serve_two();
        let next = serve();
        let mut iommu = VfioUserIommu::new();
        let functions = [&first, &second].map(|served| iommu.attach(&served.device).unwrap());
        first.card.0.lock().unwrap().refuses_unmap = Some(ODD);
        iommu.map(&request(ODD, b"")).unwrap();
        assert!(iommu.unmap(Iova::new(ODD), 4096).is_err());
        assert!(second.card.0.lock().unwrap().mapped.is_empty());
        let function = iommu.attach(&next.device).unwrap();
        assert!(next.card.0.lock().unwrap().mapped.is_empty());
        drop((functions, function));
        for served in [first, second, next] {
            iommu.detach(&served.device).unwrap();
            served.thread.join().unwrap();
        }
    }

    #[test]
    fn a_device_that_keeps_a_range_that_was_to_be_undone_is_let_go() {
        let [first, second] = serve_two();
        let mut iommu = VfioUserIommu::new();
        let functions = [&first, &second].map(|served| iommu.attach(&served.device).unwrap());
        first.card.0.lock().unwrap().refuses_unmap = Some(ODD);
        second.card.0.lock().unwrap().refuses_map = Some(ODD);
        assert!(iommu.map(&request(ODD, b"")).is_err());
        first.thread.join().unwrap();
        second.card.0.lock().unwrap().refuses_map = None;
        iommu.map(&request(ODD, b"")).unwrap();
        assert_eq!(second.card.0.lock().unwrap().mapped.len(), 1);
        drop(functions);
        iommu.detach(&second.device).unwrap();
        second.thread.join().unwrap();
    }

    #[test]
    fn a_device_that_has_gone_reads_as_ones_and_holds_up_nobody() {
        let served = serve();
        let mut iommu = VfioUserIommu::new();
        let function = iommu.attach(&served.device).unwrap();
        let bar = function.bar(0).unwrap();
        iommu.devices.values().for_each(|client| client.close());
        served.thread.join().unwrap();
        bar.write32(12, 0);
        assert_eq!(bar.read32(12), u32::MAX);
        assert!(function.reset().is_err());
        iommu.map(&request(0x10_0000, b"")).unwrap();
        iommu.unmap(Iova::new(0x10_0000), 4096).unwrap();
    }
}
