//! A port whose device comes and goes, on the register-level 82576: real lanes and workers, no socket.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backend::port::{Lanes, Occupant, Port, PortError};
use backend::worker::{Patience, Worker};
use queues::lane::{Drop, LaneStats};
use queues::nic::absent::Absent;
use queues::nic::{Link, Nic};
use rustix::event::{PollFd, PollFlags, poll};
use tests::bench::{Bench, MAC, RX_ARENA, Slot, TX_ARENA};
use tests::card::{Card82576, Direction, Options, Quirks, RingName};
use tests::frontend::PATIENCE;
use tests::frontend::net::{Form, Layout, Rx, Tx};
use tests::frontend::vmm::RingPlace;
use vfio_glue::pci::HostEvent;

const SILICON: Options = Options {
    quirks: Quirks { qemu: false },
    scribble: true,
    reset_quiet: None,
};
const TX_QUEUE: RingName = RingName {
    direction: Direction::Tx,
    queue: 0,
};
const BUFFER_BYTES: usize = 1536;

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![seed; len];
    frame[..6].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// Waits for what a worker does; the patience only bounds how long a broken test takes to fail.
#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "it never came about: {what}");
        std::thread::yield_now();
    }
}

/// A guest on a port whose front-end wants both lanes to run.
struct Guest {
    bench: Mutex<Bench>,
    port: Arc<Port>,
    places: [RingPlace; 2],
    tx: Mutex<Tx>,
    /// A frame to send while the lanes are about to be stopped.
    last_moment: Mutex<Option<Vec<u8>>>,
}

impl Guest {
    /// Has the worker pass over the tx lane, if it has it.
    fn let_worker_send(&self) {
        self.port.with_lane(1, |lane| lane.poll()).unwrap();
    }

    fn send(&self, frame: &[u8]) {
        let mut tx = self.tx.lock().unwrap();
        tx.offer(frame, Layout::WithData, Form::Direct);
        tx.queue.submit();
    }

    fn start_lanes(&self) {
        let bench = self.bench.lock().unwrap();
        for (index, place) in self.places.iter().enumerate() {
            // The used index says where to go on.
            let stats = self.port.stats(index).unwrap();
            self.port
                .start_lane(index, bench.setup_at(*place, 0, stats))
                .unwrap();
        }
    }
}

impl Occupant for Guest {
    fn renew_discarded(&self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        Ok(0)
    }

    fn with_lanes_stopped(&self, work: &mut dyn FnMut() -> Lanes) {
        if let Some(frame) = self.last_moment.lock().unwrap().take() {
            self.send(&frame);
            self.let_worker_send();
        }
        for index in 0..self.port.queues() {
            self.port.stop_lane(index).unwrap();
        }
        if work() == Lanes::Run {
            self.start_lanes();
        }
    }
}

/// A port with a guest, and two cards to choose from on the map. A third, which is nobody's concern, is in the bench.
struct Machine {
    guest: Arc<Guest>,
    port: Arc<Port>,
    slots: [Slot; 2],
    rx: Rx,
}

impl Machine {
    fn new(nic: impl FnOnce(&[Slot; 2]) -> Box<dyn Nic>) -> Self {
        let bench = Bench::new(SILICON);
        let slots = [2, 3].map(|bus| bench.plug(bus, SILICON));
        let worker = Worker::start("worker", None).unwrap();
        let nic = nic(&slots);
        let map = Arc::clone(&bench.map);
        let port = Arc::new(Port::new("vm0", map, nic, vec![worker], Patience::Forever, 1500));
        let [rx, tx] = [0, 64].map(|place| bench.ring(128, place));
        let places = [rx.place(), tx.place()];
        let rx = Rx::new(rx, &bench.memory, RX_ARENA, 128);
        let tx = Tx::new(tx, &bench.memory, TX_ARENA, 128);
        let guest = Arc::new(Guest {
            bench: Mutex::new(bench),
            port: Arc::clone(&port),
            places,
            tx: Mutex::new(tx),
            last_moment: Mutex::default(),
        });
        let occupant: Arc<dyn Occupant> = guest.clone();
        port.occupy(Arc::downgrade(&occupant));
        guest.start_lanes();
        Self {
            guest,
            port,
            slots,
            rx,
        }
    }

    fn with_a_card() -> Self {
        let machine = Self::new(|slots| Box::new(slots[0].open()));
        machine.plug_in_cable(0);
        machine
    }

    fn card<R>(&self, slot: usize, work: impl FnOnce(&mut Card82576) -> R) -> R {
        work(&mut self.slots[slot].card.lock().unwrap())
    }

    /// Lets autonegotiation finish, and tells the port as the thread that watches links does.
    fn plug_in_cable(&self, slot: usize) {
        self.card(slot, |card| card.advance(Duration::from_millis(600)));
        self.port.look_at_link();
        assert!(self.port.status().link.is_up());
    }

    fn lane(&self, direction: Direction) -> &LaneStats {
        self.port.stats(usize::from(direction == Direction::Tx)).unwrap()
    }

    fn send(&self, frame: &[u8]) {
        self.guest.send(frame);
    }

    /// Sends a frame through the card in `slot` and sees it on its wire.
    fn assert_sends(&self, slot: usize, seed: u8) {
        let sent = Arc::clone(&self.slots[slot].sent);
        let frame = frame(300, seed);
        self.send(&frame);
        wait_until("the frame is on the wire", || {
            sent.lock().unwrap().last() == Some(&frame)
        });
        self.reclaim_all();
    }

    /// Receives a frame through the card in `slot`.
    fn assert_receives(&mut self, slot: usize, seed: u8) {
        let frame = frame(300, seed);
        wait_until("a buffer is posted", || {
            self.card(slot, |card| card.can_receive())
        });
        self.card(slot, |card| card.receive_from_wire(&frame));
        let rx = &mut self.rx;
        let mut got = None;
        wait_until("the frame is there", || {
            got = got.take().or_else(|| rx.try_recv());
            got.is_some()
        });
        assert_eq!(got, Some(frame));
    }

    /// Waits until everything sent has come back to the guest.
    fn reclaim_all(&self) {
        let mut tx = self.guest.tx.lock().unwrap();
        wait_until("what was sent comes back", || {
            tx.reclaim();
            tx.queue.outstanding() == 0
        });
    }

    /// What of the map is a card's own, by owner.
    fn rings(&self) -> Vec<String> {
        let extents = self.port.map().snapshot().extents;
        let owners = extents.into_iter().flat_map(|extent| extent.owners);
        owners.filter(|owner| owner.ends_with("rings")).collect()
    }

    /// Checks that nothing of the card in `slot` is left with us, and that it was let go by the book.
    fn assert_is_gone(&self, slot: usize) {
        let Slot { address, host, .. } = &self.slots[slot];
        let kernel = self.guest.bench.lock().unwrap().kernel.clone();
        assert!(!kernel.attached().contains(address));
        assert!(!self.rings().contains(&format!("{address} rings")));
        assert!(host.vectors.lock().unwrap().is_empty(), "vectors lead nowhere");
        assert!(host.release.lock().unwrap().is_none(), "nobody listens");
        self.card(slot, |card| {
            let mut command = [0; 2];
            card.config_read(4, &mut command);
            assert_eq!(command[0] & 4, 0, "Bus Master is off");
            card.violations().assert_clean();
        });
    }

    fn end(self) {
        for index in 0..self.port.queues() {
            self.port.stop_lane(index).unwrap();
        }
        self.rx.check();
        self.guest.tx.lock().unwrap().check();
        (0..self.slots.len()).for_each(|slot| self.card(slot, |card| card.violations().assert_clean()));
        self.guest
            .bench
            .lock()
            .unwrap()
            .card()
            .violations()
            .assert_clean();
    }
}

#[test]
fn a_device_leaves_and_another_comes_under_a_guest_that_stays() {
    let mut machine = Machine::with_a_card();
    machine.rx.fill(64, BUFFER_BYTES, Layout::WithData, Form::Direct);
    for seed in 0..10 {
        machine.assert_sends(0, seed);
        machine.assert_receives(0, seed);
    }

    machine.port.set_device(Box::new(Absent::default())).unwrap();
    machine.assert_is_gone(0);
    let status = machine.port.status();
    assert_eq!((status.device.as_str(), status.link), ("none", Link::Down));
    assert_eq!(status.running, [true, true]);
    assert_eq!(
        machine.rings(),
        ["0000:01:00.0 rings", "0000:01:00.0 rings"],
        "the bystander's alone"
    );
    // As with a cable out: what is sent comes back and is counted, what is there to receive into stays.
    for seed in 0..5 {
        machine.send(&frame(300, seed));
    }
    machine.reclaim_all();
    let lost = |machine: &Machine| machine.lane(Direction::Tx).dropped[Drop::LinkDown as usize].get();
    assert_eq!(lost(&machine), 5);
    assert_eq!(machine.rx.queue.used_idx(), 10);

    let coming = Box::new(machine.slots[1].open());
    machine.port.set_device(coming).unwrap();
    machine.plug_in_cable(1);
    assert_eq!(machine.port.status().device, "0000:03:00.0");
    for seed in 10..20 {
        machine.assert_sends(1, seed);
        machine.assert_receives(1, seed);
    }
    assert_eq!(lost(&machine), 5);

    // And the first one again, in the place of the second, at once.
    let coming = Box::new(machine.slots[0].open());
    machine.port.set_device(coming).unwrap();
    machine.assert_is_gone(1);
    machine.plug_in_cable(0);
    machine.assert_sends(0, 20);
    machine.assert_receives(0, 20);
    assert_eq!(machine.port.resets(), 0);
    machine.end();
}

#[test]
fn a_device_with_a_stuck_queue_is_reset_before_it_goes() {
    let machine = Machine::with_a_card();
    machine.assert_sends(0, 1);
    machine.card(0, |card| card.wedge(TX_QUEUE));
    machine.port.set_device(Box::new(Absent::default())).unwrap();
    machine.assert_is_gone(0);
    assert!(!machine.port.is_stuck());
    machine.send(&frame(300, 2));
    machine.reclaim_all();
    machine.end();
}

#[test]
fn a_device_that_neither_stops_nor_resets_stays_and_so_does_its_memory() {
    let machine = Machine::with_a_card();
    machine.assert_sends(0, 1);
    machine.card(0, |card| card.wedge(TX_QUEUE));
    let host = Arc::clone(&machine.slots[0].host);
    host.cannot_reset.store(true, Ordering::Relaxed);
    let before = machine.port.map().snapshot().extents.len();
    let error = machine.port.set_device(Box::new(Absent::default())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "port vm0 keeps 0000:02:00.0 and its memory stays mapped: its DMA could not be ended"
    );
    assert!(matches!(error, PortError::KeepsDevice { .. }));
    let status = machine.port.status();
    assert_eq!(status.device, "0000:02:00.0");
    assert_eq!(status.running, [false, false], "its lanes stay at rest");
    assert_eq!(machine.port.map().snapshot().extents.len(), before);
    assert!(machine.port.renew().is_err());
    assert_eq!(machine.port.resets(), 0);

    // The host finds a way after all.
    host.cannot_reset.store(false, Ordering::Relaxed);
    machine.port.renew().unwrap();
    assert_eq!(machine.port.resets(), 1);
    machine.plug_in_cable(0);
    machine.assert_sends(0, 3);
    machine.port.set_device(Box::new(Absent::default())).unwrap();
    machine.assert_is_gone(0);
    machine.end();
}

#[test]
fn a_card_that_has_vanished_can_be_taken_from_its_port() {
    let machine = Machine::with_a_card();
    machine.assert_sends(0, 1);
    machine.card(0, |card| card.set_removed(true));
    machine.slots[0].host.cannot_reset.store(true, Ordering::Relaxed);
    assert!(machine.port.renew().is_err(), "it does not come back");
    machine.port.set_device(Box::new(Absent::default())).unwrap();
    assert_eq!(machine.port.status().device, "none");
    assert_eq!(
        machine.rings(),
        ["0000:01:00.0 rings", "0000:01:00.0 rings"],
        "the bystander's alone"
    );
    machine.send(&frame(300, 2));
    machine.reclaim_all();
    machine.end();
}

#[test]
fn a_reset_under_a_guest_rebuilds_its_lanes_and_loses_no_buffer() {
    let mut machine = Machine::with_a_card();
    machine.rx.fill(64, BUFFER_BYTES, Layout::WithData, Form::Direct);
    machine.assert_receives(0, 1);
    machine.port.renew().unwrap();
    assert_eq!(machine.port.resets(), 1);
    machine.plug_in_cable(0);
    for seed in 2..65 {
        machine.assert_receives(0, seed);
    }
    assert_eq!(machine.rx.posted(), 0, "each of the 64 buffers came back once");
    machine.assert_sends(0, 65);
    machine.end();
}

#[test]
fn a_port_with_nobody_on_it_changes_its_device_too() {
    let machine = Machine::with_a_card();
    for index in 0..machine.port.queues() {
        machine.port.stop_lane(index).unwrap();
    }
    machine.port.vacate();
    machine.port.set_device(Box::new(Absent::default())).unwrap();
    machine.assert_is_gone(0);
    assert_eq!(machine.port.status().running, [false, false]);
    machine.end();
}

#[test]
fn the_host_asks_for_its_card_through_the_port() {
    let machine = Machine::with_a_card();
    assert!(machine.port.host_event(HostEvent::Error).is_none());
    let event = machine.port.host_event(HostEvent::Release).unwrap();
    machine.slots[0]
        .host
        .release
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .signal();
    assert_eq!(poll(&mut [PollFd::new(&event, PollFlags::IN)], None), Ok(1));
    machine.port.set_device(Box::new(Absent::default())).unwrap();
    assert!(machine.port.host_event(HostEvent::Release).is_none());
    machine.end();
}

#[test]
fn a_lane_that_does_not_follow_the_link_is_given_nothing_until_the_device_was_reset() {
    let machine = Machine::with_a_card();
    machine.assert_sends(0, 1);
    machine.card(0, |card| card.hang_tx(true));
    machine.send(&frame(300, 2));
    machine.guest.let_worker_send();
    machine.card(0, |card| card.set_link(false));
    *machine.guest.last_moment.lock().unwrap() = Some(frame(300, 3));
    machine.port.look_at_link();
    assert_eq!(machine.port.resets(), 1);
    machine.reclaim_all();
    assert_eq!(
        machine.lane(Direction::Tx).dropped[Drop::LinkDown as usize].get(),
        2
    );
    machine.card(0, |card| {
        card.hang_tx(false);
        card.set_link(true);
    });
    machine.plug_in_cable(0);
    machine.assert_sends(0, 3);
    machine.end();
}
