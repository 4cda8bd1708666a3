//! The device behind the reference back end: one queue pair, every frame copied.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

const RX: u16 = 0;
const TX: u16 = 1;
const QUEUES: u16 = 2;
const MAX_QUEUE_SIZE: usize = 1024;
/// Names the wire in the worker's epoll set: the first number the framework leaves to us.
pub const WIRE_EVENT: u16 = QUEUES + 1;

const HEADER_BYTES: usize = 12;
const NUM_BUFFERS_AT: usize = 10;
const MAX_CHAIN_BYTES: usize = HEADER_BYTES + (1 << 16);
const PROTOCOL_FEATURES: u64 = 1 << 30;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Memory>;

/// Why a ring was given up.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the available ring is broken")]
    Avail(#[source] virtio_queue::Error),
    #[error("the chain at head {head} does not end, or a descriptor of it cannot be read")]
    Endless { head: u16 },
    #[error("the chain at head {head} has a buffer in the wrong direction")]
    Direction { head: u16 },
    #[error("the chain at head {head} holds {len} bytes, which no frame does")]
    Length { head: u16, len: usize },
    #[error("memory of the guest's ring or buffer is missing")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// One chain, checked for direction and end.
struct Chain {
    head: u16,
    buffers: Vec<(GuestAddress, usize)>,
    len: usize,
}

#[derive(Default)]
struct State {
    memory: Option<Memory>,
    waiting: Option<Vec<u8>>,
    broken: [bool; QUEUES as usize],
}

/// The device: a wire on one side, two virtqueues on the other.
pub struct NetBackEnd {
    wire: UnixDatagram,
    features: AtomicU64,
    state: Mutex<State>,
}

impl NetBackEnd {
    /// Makes the device for one connection.
    pub fn new(wire: UnixDatagram) -> Self {
        Self {
            wire,
            features: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.features.load(Ordering::Relaxed) & (1 << bit) != 0
    }

    /// Runs one ring until it has nothing to do. The ring's lock is held all the while, so a stop waits for us.
    fn run(&self, index: u16, vring: &Vring) {
        let mut state = self.state.lock().expect("no holder of the lock panics");
        let mut vring = vring.get_mut();
        let slot = usize::from(index);
        if !vring.is_enabled() || !vring.get_queue().ready() || state.broken[slot] {
            return;
        }
        let Some(memory) = state.memory.as_ref().map(|memory| memory.memory()) else {
            return;
        };
        let queue = vring.get_queue_mut();
        if queue.next_avail() != queue.next_used() {
            // We hold no chain between two runs, so the front-end sent a wrong base, as virtio-user does.
            eprintln!(
                "ring {index}: base {} healed to {}",
                queue.next_avail(),
                queue.next_used()
            );
            queue.set_next_avail(queue.next_used());
        }
        let done = match index {
            TX => self.run_tx(&mut vring, &memory),
            _ => self.run_rx(&mut vring, &memory, &mut state.waiting),
        };
        if let Err(broken) = done {
            eprintln!("ring {index} is broken: {broken:?}");
            state.broken[slot] = true;
        }
    }

    fn run_tx(&self, vring: &mut VringState<Memory>, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        loop {
            let queue = vring.get_queue_mut();
            queue.disable_notification(memory).map_err(Broken::Avail)?;
            let first_used = queue.next_used();
            let mut wire_is_full = false;
            let taken: Result<(), Broken> = loop {
                let chain = match next_chain(queue, memory, Descriptor::is_write_only) {
                    Ok(Some(chain)) => chain,
                    Ok(None) => break Ok(()),
                    Err(broken) => break Err(broken),
                };
                match chain.read(memory) {
                    Ok(bytes) => match self.wire.send(&bytes[HEADER_BYTES..]) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                            wire_is_full = true;
                            break Ok(());
                        }
                        Err(error) => eprintln!("a frame was lost on the wire: {error}"),
                        Ok(_) => {}
                    },
                    Err(broken) => break Err(broken),
                }
                if let Err(error) = publish(queue, memory, &[(chain.head, 0)]) {
                    break Err(error);
                }
            };
            self.notify(vring, memory, first_used)?;
            taken?;
            // A full wire wakes us by its own event.
            let queue = vring.get_queue_mut();
            if wire_is_full || !queue.enable_notification(memory).map_err(Broken::Avail)? {
                return Ok(());
            }
        }
    }

    fn run_rx(
        &self,
        vring: &mut VringState<Memory>,
        memory: &GuestMemoryMmap,
        waiting: &mut Option<Vec<u8>>,
    ) -> Result<(), Broken> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let frame = match waiting.take() {
                Some(frame) => frame,
                None => match self.wire.recv(&mut buffer) {
                    Ok(len) => buffer[..len].to_vec(),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) => {
                        eprintln!("the wire failed: {error}");
                        return Ok(());
                    }
                },
            };
            let queue = vring.get_queue_mut();
            let first_used = queue.next_used();
            if self.receive(queue, memory, &frame)? {
                self.notify(vring, memory, first_used)?;
            } else {
                *waiting = Some(frame);
                // Out of buffers: ask for a kick, and look again in case one came meanwhile.
                if !queue.enable_notification(memory).map_err(Broken::Avail)? {
                    return Ok(());
                }
            }
        }
    }

    /// Copies one frame to the guest. False if it has too few buffers; then none is taken.
    fn receive(&self, queue: &mut Queue, memory: &GuestMemoryMmap, frame: &[u8]) -> Result<bool, Broken> {
        let needed = HEADER_BYTES + frame.len();
        let first_avail = queue.next_avail();
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < needed {
            match next_chain(queue, memory, |descriptor| !descriptor.is_write_only())? {
                Some(chain) => {
                    room += chain.len;
                    chains.push(chain);
                }
                None => {
                    queue.set_next_avail(first_avail);
                    return Ok(false);
                }
            }
            if room < needed && !self.has(VIRTIO_NET_F_MRG_RXBUF) {
                // The frame is lost, and the buffer goes back empty rather than out of turn.
                publish(queue, memory, &[(chains[0].head, 0)])?;
                return Ok(true);
            }
        }
        let mut bytes = vec![0; HEADER_BYTES];
        let count = u16::try_from(chains.len()).expect("not more chains than a ring holds");
        bytes[NUM_BUFFERS_AT..].copy_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(frame);
        let mut rest = bytes.as_slice();
        let mut used = Vec::with_capacity(chains.len());
        for chain in &chains {
            let (now, later) = rest.split_at(rest.len().min(chain.len));
            chain.write(memory, now)?;
            used.push((chain.head, u32::try_from(now.len()).expect("a buffer's length")));
            rest = later;
        }
        publish(queue, memory, &used)?;
        Ok(true)
    }

    /// Calls the guest if it wants to hear of what was used since `first_used`.
    fn notify(
        &self,
        vring: &VringState<Memory>,
        memory: &GuestMemoryMmap,
        first_used: u16,
    ) -> Result<(), Broken> {
        let queue = vring.get_queue();
        let now = queue.next_used();
        if now == first_used {
            return Ok(());
        }
        // The used index must be out before the guest's wish is read; pairs with the driver's own fence.
        fence(Ordering::SeqCst);
        let avail = GuestAddress(queue.avail_ring());
        let wanted = if self.has(VIRTIO_RING_F_EVENT_IDX) {
            let at = 4 + 2 * u64::from(queue.size());
            let used_event = u16::from_le(memory.load(avail.unchecked_add(at), Ordering::Relaxed)?);
            now.wrapping_sub(used_event).wrapping_sub(1) < now.wrapping_sub(first_used)
        } else {
            let flags: u16 = memory.load(avail, Ordering::Relaxed)?;
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted && let Err(error) = vring.signal_used_queue() {
            eprintln!("the guest cannot be called: {error}");
        }
        Ok(())
    }
}

impl Chain {
    fn read(&self, memory: &GuestMemoryMmap) -> Result<Vec<u8>, Broken> {
        if !(HEADER_BYTES + 1..=MAX_CHAIN_BYTES).contains(&self.len) {
            return Err(Broken::Length {
                head: self.head,
                len: self.len,
            });
        }
        let mut bytes = vec![0; self.len];
        let mut rest = bytes.as_mut_slice();
        for &(at, len) in &self.buffers {
            let (now, later) = rest.split_at_mut(len);
            memory.read_slice(now, at)?;
            rest = later;
        }
        Ok(bytes)
    }

    fn write(&self, memory: &GuestMemoryMmap, bytes: &[u8]) -> Result<(), Broken> {
        let mut rest = bytes;
        for &(at, len) in &self.buffers {
            let (now, later) = rest.split_at(rest.len().min(len));
            memory.write_slice(now, at)?;
            rest = later;
        }
        Ok(())
    }
}

/// Takes the next chain, refusing what the crate's iterator would silently cut short.
fn next_chain(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    wrong_direction: impl Fn(&Descriptor) -> bool,
) -> Result<Option<Chain>, Broken> {
    let next: Option<DescriptorChain<&GuestMemoryMmap>> = queue.iter(memory).map_err(Broken::Avail)?.next();
    let Some(descriptors) = next else { return Ok(None) };
    let head = descriptors.head_index();
    let mut chain = Chain {
        head,
        buffers: Vec::new(),
        len: 0,
    };
    let mut goes_on = true;
    for descriptor in descriptors {
        if wrong_direction(&descriptor) {
            return Err(Broken::Direction { head });
        }
        let len = usize::try_from(descriptor.len()).expect("32 bits fit");
        chain.buffers.push((descriptor.addr(), len));
        chain.len += len;
        goes_on = descriptor.has_next();
    }
    if goes_on {
        Err(Broken::Endless { head })
    } else {
        Ok(Some(chain))
    }
}

/// Stores used entries and then the index, once, so that a merged frame appears whole.
fn publish(queue: &mut Queue, memory: &GuestMemoryMmap, used: &[(u16, u32)]) -> Result<(), Broken> {
    let ring = GuestAddress(queue.used_ring());
    let mut next = queue.next_used();
    for &(head, len) in used {
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&len.to_le_bytes());
        memory.write_slice(&entry, ring.unchecked_add(4 + 8 * u64::from(next % queue.size())))?;
        next = next.wrapping_add(1);
    }
    // The entries go first: pairs with the driver's load of `used.idx`.
    memory.store(next.to_le(), ring.unchecked_add(2), Ordering::Release)?;
    queue.set_next_used(next);
    Ok(())
}

impl VhostUserBackend for NetBackEnd {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(QUEUES)
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_F_IN_ORDER,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        bits.iter().fold(PROTOCOL_FEATURES, |mask, bit| mask | 1 << bit)
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        // The crates map a file that is too short, and the first touch would kill us.
        for region in memory.memory().iter() {
            let file = region
                .file_offset()
                .ok_or_else(|| io::Error::other("a region has no file"))?;
            if file.file().metadata()?.len() < file.start() + region.len() {
                return Err(io::Error::other("a region is longer than its file"));
            }
        }
        self.state.lock().expect("no holder of the lock panics").memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let indexes: &[u16] = if event == WIRE_EVENT { &[TX, RX] } else { &[event] };
        for &index in indexes {
            if let Some(vring) = vrings.get(usize::from(index)) {
                self.run(index, vring);
            }
        }
        Ok(())
    }
}
