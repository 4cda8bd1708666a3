//! A PCI function served by another process: the vfio-user protocol, client side.
//!
//! ```text
//! VfioUserFunction ──REGION_READ/WRITE, SET_IRQS, RESET──▶ UNIX socket ──▶ the process that plays the card
//! VfioUserIommu    ──DMA_MAP/UNMAP with the memory's fd──▶
//! ```
//!
//! Every reply is checked, every wait is bounded, and a peer that leaves, stalls or breaks the protocol is gone
//! for good: reads give all ones and writes vanish, as with a card pulled out. The `vfio_user` crate's client
//! does neither (an error reply makes it wait for ever), so its server is used in tests and its client nowhere.
//!
//! Read with: the vfio-user protocol specification 0.9.1.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vfio_bindings::bindings::vfio;

use super::{HostEvent, PciError, PciFunction, Registers, has_irq};
use crate::address::Iova;

const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const DEVICE_GET_INFO: u16 = 4;
const DEVICE_GET_REGION_INFO: u16 = 5;
const DEVICE_GET_IRQ_INFO: u16 = 7;
const DEVICE_SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const DEVICE_RESET: u16 = 13;

const HEADER_BYTES: usize = 16;
const FLAG_REPLY: u32 = 1;
const FLAG_TYPE_MASK: u32 = 0xf;
const FLAG_ERROR: u32 = 1 << 5;
const DMA_READ_WRITE: u32 = 3;
/// Longer than any reply we ask for; more is a broken peer.
const LARGEST_REPLY: usize = 1 << 16;
/// A card model answers in microseconds and resets in milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
const CAPABILITIES: &[u8] = b"{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":65536}}\0";

/// The connection to one device. Shared by the function and the IOMMU back end.
pub(crate) struct Client {
    path: PathBuf,
    link: Mutex<Link>,
    gone: AtomicBool,
}

struct Link {
    stream: UnixStream,
    next_id: u16,
}

/// A region of the device as the peer describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RegionShape {
    flags: u32,
    len: u64,
}

impl Client {
    /// Connects and agrees on the protocol's version.
    ///
    /// # Errors
    ///
    /// What went wrong on the socket, or what the peer broke.
    pub(crate) fn connect(path: &Path) -> io::Result<Arc<Self>> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let client = Self {
            path: path.to_owned(),
            link: Mutex::new(Link { stream, next_id: 0 }),
            gone: AtomicBool::new(false),
        };
        let mut hello = Payload::default().u16(0).u16(1);
        hello.0.extend_from_slice(CAPABILITIES);
        let reply = client.ask(VERSION, &hello, None)?;
        match reply.u16_at(0)? {
            0 => Ok(Arc::new(client)),
            major => Err(broken(format!("it speaks version {major} of vfio-user, not 0"))),
        }
    }

    /// The socket.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the peer has left or broke the protocol. Never becomes false again.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Ends the connection: the peer drops what was mapped for it.
    pub(crate) fn close(&self) {
        self.gone.store(true, Ordering::Relaxed);
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        // It fails only when the peer has gone already.
        let _ = link.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Gives the device `len` bytes of `file` from `offset` on, readable and writable at `iova`.
    pub(crate) fn dma_map(&self, file: BorrowedFd<'_>, offset: u64, len: u64, iova: Iova) -> io::Result<()> {
        let map = Payload::with_argsz(DMA_READ_WRITE)
            .u64(offset)
            .u64(iova.raw())
            .u64(len);
        self.ask(DMA_MAP, &map.sized(), Some(file)).map(drop)
    }

    /// Takes one mapping back.
    pub(crate) fn dma_unmap(&self, iova: Iova, len: u64) -> io::Result<()> {
        let unmap = Payload::with_argsz(0).u64(iova.raw()).u64(len);
        let reply = self.ask(DMA_UNMAP, &unmap.sized(), None)?;
        match reply.u64_at(16)? {
            unmapped if unmapped == len => Ok(()),
            unmapped => Err(broken(format!("only {unmapped:#x} bytes were unmapped"))),
        }
    }

    fn device_flags(&self) -> io::Result<u32> {
        let query = Payload::with_argsz(0).u32(0).u32(0);
        self.ask(DEVICE_GET_INFO, &query.sized(), None)?.u32_at(4)
    }

    fn region_shape(&self, index: u32) -> io::Result<RegionShape> {
        let query = Payload::with_argsz(0).u32(index).u32(0).u64(0).u64(0);
        let reply = self.ask(DEVICE_GET_REGION_INFO, &query.sized(), None)?;
        Ok(RegionShape {
            flags: reply.u32_at(4)?,
            len: reply.u64_at(16)?,
        })
    }

    fn irq_count(&self, index: u32) -> io::Result<u32> {
        let query = Payload::with_argsz(0).u32(index).u32(0);
        self.ask(DEVICE_GET_IRQ_INFO, &query.sized(), None)?.u32_at(12)
    }

    /// Connects one interrupt; without an eventfd it is disconnected ("If no file descriptors are provided,
    /// this de-assigns the specified interrupts").
    fn set_irq(&self, index: u32, number: u32, event: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let flags = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        let set = Payload::with_argsz(flags).u32(index).u32(number).u32(1);
        self.ask(DEVICE_SET_IRQS, &set.sized(), event).map(drop)
    }

    fn region_read(&self, region: u32, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let count = u32::try_from(into.len()).map_err(io::Error::other)?;
        let read = Payload::default().u64(offset).u32(region).u32(count);
        let reply = self.ask(REGION_READ, &read, None)?;
        let data = reply.0.get(16..).filter(|data| data.len() == into.len());
        into.copy_from_slice(data.ok_or_else(|| broken("a read came back with another length".to_owned()))?);
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let count = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut write = Payload::default().u64(offset).u32(region).u32(count);
        write.0.extend_from_slice(bytes);
        self.ask(REGION_WRITE, &write, None).map(drop)
    }

    fn reset(&self) -> io::Result<()> {
        self.ask(DEVICE_RESET, &Payload::default(), None).map(drop)
    }

    /// Sends one message and waits for its reply's payload.
    fn ask(&self, command: u16, payload: &Payload, fd: Option<BorrowedFd<'_>>) -> io::Result<Payload> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_gone() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let answer = link.exchange(command, payload, fd);
        let Err(Broken(error)) = answer else {
            return answer.unwrap_or_else(|Broken(error)| Err(error));
        };
        // What is on the socket now belongs to no message we know of.
        if !self.gone.swap(true, Ordering::Relaxed) {
            tracing::error!(device = %self.path.display(), %error, "the device has gone");
        }
        let _ = link.stream.shutdown(std::net::Shutdown::Both);
        Err(error)
    }
}

/// The connection cannot be used any more.
struct Broken(io::Error);

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self(error)
    }
}

impl Link {
    /// The outer error ends the connection, the inner one is the peer's answer.
    fn exchange(
        &mut self,
        command: u16,
        payload: &Payload,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<io::Result<Payload>, Broken> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let size = u32::try_from(HEADER_BYTES + payload.0.len()).map_err(io::Error::other)?;
        let header = Payload::default().u16(id).u16(command).u32(size).u32(0).u32(0);
        self.send(&header.0, &payload.0, fd)?;

        let mut header = Payload(vec![0; HEADER_BYTES]);
        self.stream.read_exact(&mut header.0)?;
        let size = usize::try_from(header.u32_at(4)?).map_err(io::Error::other)?;
        let flags = header.u32_at(8)?;
        if header.u16_at(0)? != id || header.u16_at(2)? != command || flags & FLAG_TYPE_MASK != FLAG_REPLY {
            return Err(broken("the reply belongs to no message of ours".to_owned()).into());
        }
        if !(HEADER_BYTES..=LARGEST_REPLY).contains(&size) {
            return Err(broken(format!("a reply of {size} bytes is impossible")).into());
        }
        let mut reply = Payload(vec![0; size - HEADER_BYTES]);
        self.stream.read_exact(&mut reply.0)?;
        if flags & FLAG_ERROR == 0 {
            return Ok(Ok(reply));
        }
        let refusal = match i32::try_from(header.u32_at(12)?) {
            Ok(errno) if errno != 0 => io::Error::from_raw_os_error(errno),
            _ => io::Error::other("the device refused without a reason"),
        };
        Ok(Err(refusal))
    }

    /// Sends header and payload, the descriptor with the first byte.
    fn send(&mut self, header: &[u8], payload: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let parts = [IoSlice::new(header), IoSlice::new(payload)];
        let sent = sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
        let rest: Vec<u8> = header.iter().chain(payload).skip(sent).copied().collect();
        self.stream.write_all(&rest)
    }
}

fn broken(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// A message's body: little-endian words, as all machines this runs on have them.
#[derive(Default)]
struct Payload(Vec<u8>);

impl Payload {
    /// Begins one of the many bodies that open with `argsz` and `flags`.
    fn with_argsz(flags: u32) -> Self {
        Self::default().u32(0).u32(flags)
    }

    /// Fills `argsz` in.
    fn sized(mut self) -> Self {
        if let (Ok(len), Some(argsz)) = (u32::try_from(self.0.len()), self.0.first_chunk_mut()) {
            *argsz = len.to_le_bytes();
        }
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u16_at(&self, offset: usize) -> io::Result<u16> {
        self.bytes_at(offset).map(u16::from_le_bytes)
    }

    fn u32_at(&self, offset: usize) -> io::Result<u32> {
        self.bytes_at(offset).map(u32::from_le_bytes)
    }

    fn u64_at(&self, offset: usize) -> io::Result<u64> {
        self.bytes_at(offset).map(u64::from_le_bytes)
    }

    fn bytes_at<const N: usize>(&self, offset: usize) -> io::Result<[u8; N]> {
        let bytes = self.0.get(offset..).and_then(|rest| rest.first_chunk());
        bytes
            .copied()
            .ok_or_else(|| broken("a reply is too short".to_owned()))
    }
}

/// A PCI function behind a [`Client`].
pub(crate) struct VfioUserFunction {
    name: String,
    client: Arc<Client>,
    vectors: u16,
}

impl VfioUserFunction {
    /// Asks the peer what it is.
    ///
    /// # Errors
    ///
    /// What the peer answered or broke.
    pub(crate) fn new(name: String, client: Arc<Client>) -> io::Result<Self> {
        if client.device_flags()? & vfio::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(broken("it is not a PCI device".to_owned()));
        }
        let vectors = client.irq_count(vfio::VFIO_PCI_MSIX_IRQ_INDEX)?;
        Ok(Self {
            name,
            client,
            vectors: u16::try_from(vectors).unwrap_or(u16::MAX),
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
}

impl PciFunction for VfioUserFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_config(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PciError> {
        let failed = self.config_error("read", offset, bytes.len());
        self.client
            .region_read(vfio::VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), bytes)
            .map_err(failed)
    }

    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<(), PciError> {
        self.client
            .region_write(vfio::VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), bytes)
            .map_err(self.config_error("write", offset, bytes.len()))
    }

    fn bar(&self, index: u8) -> Result<Arc<dyn Registers>, PciError> {
        let refused = |reason| PciError::Bar {
            device: self.name.clone(),
            index,
            reason,
        };
        let region = u32::from(index);
        if region > vfio::VFIO_PCI_BAR5_REGION_INDEX {
            return Err(refused("BARs are numbered 0 to 5".to_owned()));
        }
        let shape = self
            .client
            .region_shape(region)
            .map_err(|error| refused(error.to_string()))?;
        let both = vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE;
        let len =
            u32::try_from(shape.len).map_err(|_| refused(format!("{:#x} bytes are too many", shape.len)))?;
        if len == 0 || shape.flags & both != both {
            return Err(refused("the function has no such memory BAR".to_owned()));
        }
        let client = Arc::clone(&self.client);
        Ok(Arc::new(RemoteBar { client, region, len }))
    }

    fn vectors(&self) -> u16 {
        self.vectors
    }

    fn set_vector(&self, vector: u16, event: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        let set = if vector < self.vectors {
            self.client
                .set_irq(vfio::VFIO_PCI_MSIX_IRQ_INDEX, vector.into(), event)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        };
        set.map_err(|source| PciError::Interrupt {
            device: self.name.clone(),
            vector,
            vectors: self.vectors,
            source,
        })
    }

    fn set_host_event(&self, which: HostEvent, event: Option<BorrowedFd<'_>>) -> Result<bool, PciError> {
        let (index, failed) = (which.irq_index(), which.failed(&self.name));
        if !has_irq(self.client.irq_count(index)).map_err(&failed)? {
            return Ok(false);
        }
        self.client.set_irq(index, 0, event).map_err(failed)?;
        Ok(true)
    }

    fn reset(&self) -> Result<(), PciError> {
        self.client.reset().map_err(|source| PciError::Reset {
            device: self.name.clone(),
            source,
        })
    }
}

/// A BAR in another process: each access is a message and its reply.
struct RemoteBar {
    client: Arc<Client>,
    region: u32,
    len: u32,
}

impl RemoteBar {
    fn place(&self, offset: u32) -> Option<u64> {
        let inside = offset.is_multiple_of(4) && offset.checked_add(4).is_some_and(|end| end <= self.len);
        inside.then(|| offset.into())
    }
}

impl Registers for RemoteBar {
    fn read32(&self, offset: u32) -> u32 {
        let mut bytes = [0xff; 4];
        let read = self
            .place(offset)
            .map(|at| self.client.region_read(self.region, at, &mut bytes));
        match read {
            Some(Ok(())) => u32::from_le_bytes(bytes),
            _ => u32::MAX,
        }
    }

    fn write32(&self, offset: u32, value: u32) {
        // The message passes through the kernel, behind everything stored before. What a peer refuses vanishes,
        // as on a bus; that the peer has gone was logged when it was noticed.
        if let Some(at) = self.place(offset) {
            let _ = self.client.region_write(self.region, at, &value.to_le_bytes());
        }
    }

    fn len(&self) -> u32 {
        self.len
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.path.display())
    }
}
