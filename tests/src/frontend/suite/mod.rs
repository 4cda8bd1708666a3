//! What every vhost-user net back end must do, one behaviour a function.
//!
//! ```text
//! BackEnd::start ──▶ Running { socket, wire } ──▶ Guest::boot ──▶ frames, messages, misbehaviour ──▶ asserts
//! ```
//!
//! [`front_end_suite!`](crate::front_end_suite) makes one `#[test]` of each behaviour for a back end. A back end
//! that cannot do something says so by name and reason, and the test prints that.

pub mod handshake;
pub mod hostile;
pub mod lifecycle;
pub mod memory_changes;
pub mod messages;
pub mod notification;
pub mod traffic;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tempfile::TempDir;

use super::PATIENCE;
use super::connection::{Connection, ConnectionError};
use super::driver::SplitQueue;
use super::memory::{GuestMemory, Plan};
use super::net::{Form, HEADER_BYTES, Layout, Rx, Tx, arena_bytes};
use super::process::Process;
use super::vmm::{Manner, RingPlace, Session, feature};
use super::wire::{MIN_FRAME_BYTES, Wire, frame, sequence_of};

/// How a back end is started, and what is not asked of it.
pub trait BackEnd {
    /// Starts it, listening on `socket`, with its wire going to `wire`; its processes live in `folder`.
    fn start(&self, folder: &Path, socket: &Path, wire: &Wire) -> Vec<Process>;

    /// Starts it so that it connects to the front-end that listens on `socket`.
    fn start_as_client(&self, folder: &Path, socket: &Path, wire: &Wire) -> Vec<Process>;

    /// Looks at the processes once more when the behaviour was shown, before they are killed.
    fn finish(&self, _processes: Vec<Process>) {}

    /// Behaviours that are not asked of it, each with the reason.
    fn exemptions(&self) -> &[(&str, &str)] {
        &[]
    }
}

/// Calls `$then!` with the name of every behaviour.
#[macro_export]
macro_rules! with_every_behaviour {
    ($then:ident $($more:tt)*) => {
        $crate::$then! { $($more)*
            handshake::as_qemu_carries_frames_both_ways,
            handshake::as_cloud_hypervisor_carries_frames_both_ways,
            handshake::as_virtio_user_carries_frames_both_ways,
            handshake::in_client_mode_connects_and_connects_again,
            handshake::with_no_optional_feature_carries_frames_both_ways,
            traffic::tx_frames_of_every_size_and_layout_arrive,
            traffic::rx_frames_of_every_size_arrive_in_buffers_of_every_layout,
            traffic::rx_without_mergeable_buffers_uses_one_buffer_a_frame,
            traffic::a_frame_larger_than_a_buffer_is_merged,
            traffic::a_frame_that_fits_no_buffer_is_dropped_in_turn,
            traffic::buffers_may_cross_touching_regions,
            traffic::rings_of_many_sizes_wrap,
            traffic::indexes_wrap_at_65536,
            notification::ping_pong_by_event_idx_loses_no_wake_up,
            notification::ping_pong_by_flags_loses_no_wake_up,
            notification::a_guest_that_refuses_interrupts_gets_none,
            notification::a_call_eventfd_that_is_full_stops_nobody,
            lifecycle::get_vring_base_is_the_first_unused_index_and_memory_is_left_alone,
            lifecycle::a_disabled_rx_ring_is_left_alone_and_keeps_its_buffers,
            lifecycle::a_disabled_tx_ring_keeps_its_frames,
            lifecycle::a_base_of_zero_is_healed_from_the_used_index,
            lifecycle::a_front_end_that_comes_back_goes_on_at_the_used_index,
            lifecycle::a_second_front_end_does_not_disturb_the_first,
            memory_changes::a_new_table_on_a_live_session_keeps_traffic,
            memory_changes::regions_come_and_go_under_traffic,
            memory_changes::a_region_that_is_split_keeps_its_buffers,
            memory_changes::memory_that_is_not_as_announced_is_refused,
            messages::a_message_nobody_knows_ends_only_that_connection,
            messages::a_malformed_message_ends_only_that_connection,
            messages::a_message_cut_short_ends_only_that_connection,
            messages::a_wrong_ring_number_is_refused,
            hostile::a_broken_tx_ring_leaves_rx_running,
            hostile::a_broken_rx_ring_leaves_tx_running,
            hostile::a_broken_ring_is_reported_by_the_error_eventfd,
            hostile::a_chain_longer_than_the_ring_breaks_it,
            hostile::a_chain_without_a_frame_does_not_stall_the_process,
        }
    };
}

/// Makes a `#[test]` of every behaviour, for the back end the expression gives.
#[macro_export]
macro_rules! front_end_suite {
    ($back_end:expr) => { $crate::with_every_behaviour! { front_end_suite @tests $back_end; } };
    (@tests $back_end:expr; $($group:ident::$name:ident,)*) => {
        $(#[test]
        fn $name() {
            $crate::frontend::suite::run(&$back_end, stringify!($name), $crate::frontend::suite::$group::$name);
        })*

        #[test]
        fn every_exemption_names_a_behaviour() {
            let known = [$(stringify!($name)),*];
            for (name, _) in $crate::frontend::suite::BackEnd::exemptions(&$back_end) {
                assert!(known.contains(name), "{name} is no behaviour");
            }
        }
    };
}

/// Runs one behaviour on a freshly started back end, or says why it is not asked for.
pub fn run<B: BackEnd>(back_end: &B, name: &str, behaviour: fn(&B, &mut Running)) {
    if let Some((_, reason)) = back_end.exemptions().iter().find(|(exempt, _)| *exempt == name) {
        println!("{name} is not asked of this back end: {reason}");
        return;
    }
    let mut running = Running::prepare();
    running.processes = back_end.start(running.folder.path(), &running.socket, &running.wire);
    behaviour(back_end, &mut running);
    running.assert_alive();
    back_end.finish(std::mem::take(&mut running.processes));
}

/// A back end that has been started.
#[derive(Debug)]
pub struct Running {
    processes: Vec<Process>,
    /// The far end of its wire.
    pub wire: Wire,
    socket: PathBuf,
    folder: TempDir,
}

impl Running {
    /// Makes the folder, the socket's path and the wire; nothing is started yet.
    ///
    /// # Panics
    ///
    /// If there is no room for a folder.
    pub fn prepare() -> Self {
        let folder = TempDir::with_prefix("back-end-").expect("a temporary folder");
        let wire = Wire::bind(folder.path()).expect("a wire");
        let socket = folder.path().join("vhost-user");
        Self {
            processes: Vec::new(),
            wire,
            socket,
            folder,
        }
    }

    /// Starts `back_end` as one that connects to the listener returned, in place of the one that listens.
    ///
    /// # Panics
    ///
    /// If there can be no listener.
    pub fn restart_as_client<B: BackEnd>(&mut self, back_end: &B) -> UnixListener {
        self.processes.clear();
        *self = Self::prepare();
        let listener = UnixListener::bind(&self.socket).expect("a listener");
        self.processes = back_end.start_as_client(self.folder.path(), &self.socket, &self.wire);
        listener
    }

    /// Connects as a front-end.
    ///
    /// # Panics
    ///
    /// If nobody listens.
    pub fn connect(&self) -> Connection {
        Connection::connect(&self.socket).expect("the back end listens")
    }

    /// Connects and negotiates, again if the port is still busy with a front-end that has just left.
    ///
    /// # Panics
    ///
    /// If the port does not take us.
    pub fn negotiate(&self, setup: Setup, memory: &GuestMemory) -> Session {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Session::negotiate(self.connect(), setup.manner, memory, setup.features, 2) {
                Ok(session) => return session,
                Err(error) if !is_hang_up(&error) => panic!("negotiation: {error:?}"),
                Err(error) => assert!(Instant::now() < deadline, "the port takes nobody: {error:?}"),
            }
        }
    }

    /// The path of the vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The folder its processes live in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The processes of the back end.
    pub fn processes(&mut self) -> &mut Vec<Process> {
        &mut self.processes
    }

    /// Checks that no process of the back end died.
    ///
    /// # Panics
    ///
    /// If one did.
    pub fn assert_alive(&self) {
        assert!(
            self.processes.iter().all(Process::is_running),
            "a process of the back end died"
        );
    }
}

/// What kind of guest is booted.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Whose order of messages.
    pub manner: Manner,
    /// Virtio features the guest would take.
    pub features: u64,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Where the ring indexes start.
    pub first_index: u16,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            manner: Manner::EnableLast,
            features: feature::MRG_RXBUF | feature::INDIRECT_DESC | feature::EVENT_IDX,
            ring_size: 256,
            first_index: 0,
        }
    }
}

impl Setup {
    /// Sets whose order of messages is played.
    pub fn manner(self, manner: Manner) -> Self {
        Self { manner, ..self }
    }

    /// Sets the features the guest would take.
    pub fn features(self, features: u64) -> Self {
        Self { features, ..self }
    }

    /// Sets the entries of each ring.
    pub fn ring_size(self, ring_size: u16) -> Self {
        Self { ring_size, ..self }
    }

    /// Sets where the ring indexes start.
    pub fn first_index(self, first_index: u16) -> Self {
        Self { first_index, ..self }
    }
}

/// The rx ring's index in a queue pair.
pub const RX: u32 = 0;
/// The tx ring's index in a queue pair.
pub const TX: u32 = 1;

/// The smallest receive buffer for a 1500-byte MTU: header and a frame with a VLAN tag, as Linux posts them.
pub const RX_BUFFER_BYTES: usize = HEADER_BYTES + 1518;

const MIB: u64 = 1 << 20;
const REGION_BYTES: u64 = 4 * MIB;

/// Guest memory in three regions: `low` and `next` touch, `next` starts inside its file, `high` lies past a hole.
#[derive(Clone, Copy, Debug)]
pub struct Regions {
    /// Start of the first region.
    pub low: u64,
    /// Start of the second, where the first ends.
    pub next: u64,
    /// Start of the third.
    pub high: u64,
}

impl Regions {
    fn of(manner: Manner) -> Self {
        let base = match manner {
            Manner::Qemu | Manner::EnableLast => 0,
            // virtio-user's guest-physical addresses are its own 47-bit virtual ones.
            Manner::VirtioUser => 0x7f12_3400_0000,
        };
        Self {
            low: base,
            next: base + REGION_BYTES,
            high: base + (1 << 32),
        }
    }

    fn plans(self, manner: Manner) -> Vec<Plan> {
        let plans = [
            Plan::new(self.low, REGION_BYTES),
            Plan::new(self.next, REGION_BYTES).file_offset(2 * MIB),
            Plan::new(self.high, REGION_BYTES),
        ];
        let same_address = manner == Manner::VirtioUser;
        plans
            .into_iter()
            .map(|plan| {
                if same_address {
                    Plan {
                        user: plan.gpa,
                        ..plan
                    }
                } else {
                    plan
                }
            })
            .collect()
    }

    /// The rx ring, with its three parts in three regions.
    fn rx_place(self, size: u16) -> RingPlace {
        RingPlace {
            size,
            desc: self.low + 0x1_0000,
            avail: self.next + 0x1_0000,
            used: self.high + 0x1_0000,
        }
    }

    /// The tx ring, in one region.
    fn tx_place(self, size: u16) -> RingPlace {
        RingPlace {
            size,
            desc: self.low + 0x2_0000,
            avail: self.low + 0x3_0000,
            used: self.low + 0x4_0000,
        }
    }

    fn rx_buffers(self) -> u64 {
        self.high + 2 * MIB
    }

    fn tx_buffers(self) -> u64 {
        self.next + 2 * MIB
    }
}

/// A VMM with a running guest.
#[derive(Debug)]
pub struct Guest {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The connection to the back end.
    pub session: Session,
    /// The receive queue.
    pub rx: Rx,
    /// The transmit queue.
    pub tx: Tx,
    /// Where memory lies.
    pub regions: Regions,
}

impl Guest {
    /// Boots a guest on a new connection to `running`.
    ///
    /// # Panics
    ///
    /// If the back end refuses anything.
    pub fn boot(running: &Running, setup: Setup) -> Self {
        Self::boot_by(setup, |memory| running.negotiate(setup, memory))
    }

    /// Boots a guest on `connection`.
    ///
    /// # Panics
    ///
    /// As [`boot`](Self::boot).
    pub fn boot_over(connection: Connection, setup: Setup) -> Self {
        Self::boot_by(setup, |memory| {
            Session::negotiate(connection, setup.manner, memory, setup.features, 2).expect("negotiation")
        })
    }

    fn boot_by(setup: Setup, negotiate: impl FnOnce(&GuestMemory) -> Session) -> Self {
        let regions = Regions::of(setup.manner);
        let memory = GuestMemory::new(&regions.plans(setup.manner)).expect("guest memory");
        let session = negotiate(&memory);
        let (size, first) = (setup.ring_size, setup.first_index);
        let ring = |place| SplitQueue::starting_at(&memory, place, first);
        let slots = size.min(256);
        assert!(arena_bytes(slots) <= MIB);
        let mut rx = Rx::new(ring(regions.rx_place(size)), &memory, regions.rx_buffers(), slots);
        let mut tx = Tx::new(ring(regions.tx_place(size)), &memory, regions.tx_buffers(), slots);
        rx.attach(&session, RX);
        tx.queue.attach(&session, TX);
        let rings = [(RX, rx.queue.place(), first), (TX, tx.queue.place(), first)];
        session.start(&rings).expect("the rings start");
        Self {
            memory,
            session,
            rx,
            tx,
            regions,
        }
    }

    /// Comes back after a disconnect, with the rings as they are, as QEMU does.
    ///
    /// # Panics
    ///
    /// As [`boot`](Self::boot).
    pub fn come_back(&mut self, running: &Running, setup: Setup) {
        self.session = running.negotiate(setup, &self.memory);
        self.rx.attach(&self.session, RX);
        self.tx.queue.attach(&self.session, TX);
        // Read only now: the answers above mean that the session before is over.
        let rings = [(RX, &self.rx.queue), (TX, &self.tx.queue)];
        let rings = rings.map(|(index, queue)| (index, queue.place(), queue.used_idx()));
        self.session.start(&rings).expect("the rings start again");
        // QEMU injects a kick into every ring it starts.
        self.rx.queue.events().kick.signal();
        self.tx.queue.events().kick.signal();
    }

    /// Sends one frame and sees it arrive.
    ///
    /// # Panics
    ///
    /// If it arrives late, changed or not at all.
    pub fn send_and_check(&mut self, wire: &Wire, sequence: u64, len: usize, layout: Layout, form: Form) {
        let sent = frame(sequence, len);
        self.tx.send(&sent, layout, form);
        assert!(
            wire.recv() == sent,
            "frame {sequence} of {len} bytes in {layout:?}, {form:?} changed on its way"
        );
        self.tx.drain();
    }

    /// Has one frame sent to the guest and sees it arrive. A buffer must be posted.
    ///
    /// # Panics
    ///
    /// As [`send_and_check`](Self::send_and_check).
    pub fn receive_and_check(&mut self, wire: &Wire, sequence: u64, len: usize) {
        let sent = frame(sequence, len);
        wire.send(&sent);
        assert!(
            self.rx.recv() == sent,
            "frame {sequence} of {len} bytes changed on its way"
        );
    }

    /// Sends and receives a few frames of plain layout.
    ///
    /// # Panics
    ///
    /// As [`send_and_check`](Self::send_and_check).
    pub fn exchange(&mut self, wire: &Wire) {
        for sequence in 0..4 {
            let len = [60, 64, 1000, 1514][usize::try_from(sequence).expect("small")];
            self.send_and_check(wire, sequence, len, Layout::OwnDescriptor, Form::Direct);
            self.rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
            self.receive_and_check(wire, sequence, len);
        }
        self.check();
    }

    /// Checks that the device wrote nowhere it may not.
    ///
    /// # Panics
    ///
    /// If it did.
    pub fn check(&self) {
        self.rx.check();
        self.tx.check();
    }
}

/// Boots a guest on a new connection and exchanges frames: the port is fine.
///
/// # Panics
///
/// If it is not.
pub fn assert_port_works(running: &Running) {
    Guest::boot(running, Setup::default()).exchange(&running.wire);
    running.assert_alive();
}

/// Whether the back end closed the connection on us.
fn is_hang_up(error: &ConnectionError) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    match error {
        ConnectionError::Closed => true,
        ConnectionError::Socket(error) => [BrokenPipe, ConnectionReset].contains(&error.kind()),
        _ => false,
    }
}

/// Checks that `result` is a refusal: an error reply, or the end of the connection.
///
/// # Panics
///
/// If it is not.
pub fn assert_refused(result: Result<(), ConnectionError>, what: &str) {
    match result {
        Err(ConnectionError::Refused { .. }) => {}
        Err(error) if is_hang_up(&error) => {}
        other => panic!("{what} was answered with {other:?}"),
    }
}

/// Puts frame number `last` on a wire that may be full and receives up to it, checking that frames are whole and in
/// order; returns how many came.
///
/// Every buffer is posted again, for more frames may be on their way than the guest has buffers.
///
/// # Panics
///
/// If a frame is damaged, out of order or missing.
pub fn receive_up_to(rx: &mut Rx, wire: &Wire, last: u64) -> usize {
    let (mut count, mut highest, mut sent) = (0, None, false);
    loop {
        // A full wire holds frames, so waiting for one of them cannot fail.
        sent = sent || wire.try_send(&frame(last, MIN_FRAME_BYTES));
        let sequence = sequence_of(&rx.recv()).expect("a whole frame");
        assert!(
            highest.is_none_or(|highest| sequence > highest),
            "frame {sequence} came after {highest:?}"
        );
        rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        highest = Some(sequence);
        count += 1;
        if sequence >= last {
            return count;
        }
    }
}
