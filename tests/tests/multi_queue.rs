//! Several queue pairs of the register-level 82576: which one a frame goes to, pairs that come and go, and vectors that
//! pairs share.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use backend::port::Port;
use backend::worker::{LaneId, Patience, Worker};
use queues::lane::{Lane, LaneStats, Progress};
use queues::nic::{Nic, NicError};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use tests::bench::{Bench, GUEST_BASE, MAC, RX_ARENA, TX_ARENA};
use tests::card::{Options, Quirks, regs};
use tests::frontend::PATIENCE;
use tests::frontend::net::{Form, Layout, Rx, Tx, arena_bytes};

const SILICON: Options = Options {
    quirks: Quirks { qemu: false },
    scribble: true,
    reset_quiet: None,
};
const QEMU: Options = Options {
    quirks: Quirks { qemu: true },
    scribble: true,
    reset_quiet: None,
};
const SLOTS: u16 = 32;
const BUFFER_BYTES: usize = 1536;

/// A TCP segment of one flow.
fn tcp(source: ([u8; 4], u16), destination: ([u8; 4], u16), payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2([2; 6], MAC)
        .ipv4(source.0, destination.0, 64)
        .tcp(source.1, destination.1, 1, 1024)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// One frame of each of 64 flows.
fn flow(number: u8) -> Vec<u8> {
    tcp(
        ([10, 0, 0, number], 1000 + u16::from(number)),
        ([10, 0, 1, 1], 80),
        &[number; 64],
    )
}

/// A guest's receive queue on one pair, and the lane while it is on.
struct RxSide {
    rx: Rx,
    counters: Arc<LaneStats>,
    lane: Option<Box<dyn Lane>>,
}

/// A bench with as many receive queues as it has pairs.
struct Machine {
    bench: Bench,
    sides: Vec<RxSide>,
}

impl Machine {
    fn new(options: Options, pairs: u16) -> Self {
        let mut bench = Bench::with_pairs(options, pairs);
        bench.wait_for_link();
        let side = |pair: u16| RxSide {
            rx: queue_at(&bench, pair),
            counters: Arc::default(),
            lane: None,
        };
        let sides = (0..pairs).map(side).collect();
        Self { bench, sides }
    }

    /// The guest turns pair `pair` on, and has at least `buffers` buffers for it.
    fn turn_on(&mut self, pair: u16, buffers: usize) {
        let side = &mut self.sides[usize::from(pair)];
        side.lane = Some(self.bench.rx_lane_of(pair, &side.rx.queue, &side.counters));
        self.offer(pair, buffers);
    }

    fn offer(&mut self, pair: u16, buffers: usize) {
        let side = &mut self.sides[usize::from(pair)];
        let more = buffers.saturating_sub(side.rx.posted());
        side.rx.fill(more, BUFFER_BYTES, Layout::WithData, Form::Direct);
        side.rx.queue.submit();
        run(side.lane.as_mut().unwrap().as_mut());
    }

    fn turn_off(&mut self, pair: u16) {
        let lane = self.sides[usize::from(pair)].lane.take().unwrap();
        lane.stop().card.unwrap();
    }

    /// Puts a frame on the wire and returns the pair it arrived on, unchanged.
    fn arrival_of(&mut self, frame: &[u8]) -> Option<u16> {
        self.bench.card().receive_from_wire(frame);
        let mut found = None;
        for (pair, side) in (0..).zip(&mut self.sides) {
            let Some(lane) = side.lane.as_mut() else { continue };
            run(lane.as_mut());
            if let Some(received) = side.rx.try_recv() {
                assert_eq!((received.as_slice(), found), (frame, None));
                side.rx.post(BUFFER_BYTES, Layout::WithData, Form::Direct);
                side.rx.queue.submit();
                run(lane.as_mut());
                found = Some(pair);
            }
        }
        found
    }

    /// Where each of the 64 flows arrives.
    fn homes(&mut self) -> BTreeMap<u8, u16> {
        let home = |number| (number, self.arrival_of(&flow(number)).expect("no frame is lost"));
        (0..64).map(home).collect()
    }

    fn table_entry(&mut self, hash: u32) -> u16 {
        let entry = hash & 127;
        let word = self.bench.card().read32(regs::RETA + (entry & !3));
        word.to_le_bytes()[entry as usize % 4].into()
    }

    fn end(mut self) {
        for pair in 0..u16::try_from(self.sides.len()).unwrap() {
            if self.sides[usize::from(pair)].lane.is_some() {
                self.turn_off(pair);
            }
        }
        assert_eq!(self.bench.card().counters().dropped_queue_off, 0);
        self.bench.card().violations().assert_clean();
    }
}

/// An empty receive queue of the guest's.
fn queue_at(bench: &Bench, place: u16) -> Rx {
    let ring = bench.ring(64, 16 * u64::from(place));
    let arena = RX_ARENA + u64::from(place) * arena_bytes(SLOTS);
    Rx::new(ring, &bench.memory, arena, SLOTS)
}

fn run(lane: &mut dyn Lane) {
    while lane.poll() == Progress::Moved {}
}

/// The hashes are those of Microsoft's verification suite for the bench's key, so neither the driver nor the model says
/// what is right.
#[test]
fn a_frame_goes_to_the_queue_that_the_hash_of_its_flow_names() {
    let published = [
        (
            ([66, 9, 149, 187], 2794),
            ([161, 142, 100, 80], 1766),
            0x51cc_c178,
        ),
        (([199, 92, 111, 2], 14230), ([65, 69, 140, 83], 4739), 0xc626_b0ea),
        (
            ([24, 19, 198, 95], 12898),
            ([12, 22, 207, 184], 38024),
            0x5c2b_394a,
        ),
        (
            ([38, 27, 205, 30], 48228),
            ([209, 142, 163, 6], 2217),
            0xafc7_327f,
        ),
        (
            ([153, 39, 163, 191], 44251),
            ([202, 188, 127, 2], 1303),
            0x10e8_28a2,
        ),
    ];
    for options in [SILICON, QEMU] {
        for pairs in [2, 5, 16] {
            let mut machine = Machine::new(options, pairs);
            (0..pairs).for_each(|pair| machine.turn_on(pair, usize::from(SLOTS)));
            for (source, destination, hash) in published {
                let named = machine.table_entry(hash);
                let frame = tcp(source, destination, b"frame of a flow");
                for _ in 0..3 {
                    assert_eq!(machine.arrival_of(&frame), Some(named), "{hash:x} of {pairs}");
                }
            }
            machine.end();
        }
    }
}

#[test]
fn what_cannot_be_hashed_goes_to_the_first_pair() {
    let mut machine = Machine::new(SILICON, 4);
    (0..4).for_each(|pair| machine.turn_on(pair, usize::from(SLOTS)));
    let mut frame = vec![7; 60];
    frame[..6].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    assert_eq!(machine.arrival_of(&frame), Some(0));
    machine.end();
}

#[test]
fn a_pair_that_comes_or_goes_moves_no_flow_between_the_others_and_loses_none() {
    for options in [SILICON, QEMU] {
        let mut machine = Machine::new(options, 4);
        machine.turn_on(0, usize::from(SLOTS));
        assert!(
            machine.homes().values().all(|home| *home == 0),
            "the one there is has all"
        );
        (1..4).for_each(|pair| machine.turn_on(pair, usize::from(SLOTS)));
        let four = machine.homes();
        for pair in 0..4 {
            assert!(
                four.values().any(|home| *home == pair),
                "pair {pair} has its share"
            );
        }

        machine.turn_off(2);
        let three = machine.homes();
        for (number, home) in &four {
            assert!(three[number] == *home || *home == 2, "flow {number} moved");
            assert_ne!(three[number], 2);
        }

        // On again, as another queue without a buffer: nothing is sent there to be lost.
        machine.sides[2].rx = queue_at(&machine.bench, 18);
        machine.turn_on(2, 0);
        assert_eq!(machine.homes(), three);
        machine.offer(2, usize::from(SLOTS));
        let again = machine.homes();
        for (number, home) in &three {
            assert!(
                again[number] == *home || again[number] == 2,
                "flow {number} moved"
            );
        }
        assert!(again.values().any(|home| *home == 2));
        assert_eq!(machine.bench.card().counters().dropped_no_descriptor, 0);
        machine.end();
    }
}

#[test]
fn a_pair_whose_guest_takes_nothing_costs_the_others_nothing() {
    let mut machine = Machine::new(SILICON, 2);
    machine.turn_on(0, usize::from(SLOTS));
    // Two buffers, and never another.
    machine.turn_on(1, 2);
    let mut arrived = 0;
    for number in 0..64 {
        let frame = flow(number);
        machine.bench.card().receive_from_wire(&frame);
        let side = &mut machine.sides[0];
        run(side.lane.as_mut().unwrap().as_mut());
        if side.rx.try_recv().is_some() {
            arrived += 1;
            side.rx.post(BUFFER_BYTES, Layout::WithData, Form::Direct);
            side.rx.queue.submit();
            run(side.lane.as_mut().unwrap().as_mut());
        }
    }
    let counters = machine.bench.card().counters();
    assert!(arrived > 20 && counters.dropped_no_descriptor > 20);
    assert_eq!(
        arrived + counters.dropped_no_descriptor + 2,
        64,
        "all but those of the other pair"
    );
    machine.end();
}

#[test]
fn a_reset_brings_the_spread_back() {
    let mut machine = Machine::new(SILICON, 3);
    (0..3).for_each(|pair| machine.turn_on(pair, usize::from(SLOTS)));
    let before = machine.homes();
    (0..3).for_each(|pair| machine.turn_off(pair));
    machine.bench.nic.reset().unwrap();
    machine.bench.wait_for_link();
    (0..3).for_each(|pair| machine.turn_on(pair, usize::from(SLOTS)));
    assert_eq!(machine.homes(), before);
    machine.end();
}

#[test]
fn more_pairs_than_the_card_has_are_refused() {
    let bench = Bench::new(SILICON);
    let slot = bench.plug(2, SILICON);
    let error = slot.try_open_with(17).unwrap_err();
    assert!(
        matches!(
            error,
            NicError::TooFewPairs {
                pairs: 16,
                wanted: 17,
                ..
            }
        ),
        "{error}"
    );
}

/// An epoll as a worker has it, for one lane.
struct Ear(OwnedFd);

impl Ear {
    fn of(lane: &dyn Lane) -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let event = lane.interrupt_fd().unwrap();
        epoll::add(
            &epoll,
            event,
            EventData::new_u64(0),
            EventFlags::IN | EventFlags::ET,
        )
        .unwrap();
        Self(epoll)
    }

    /// Whether it was woken since the last call.
    fn was_woken(&self) -> bool {
        let mut events = Vec::with_capacity(4);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        epoll::wait(
            self.0.as_fd(),
            rustix::buffer::spare_capacity(&mut events),
            Some(&now),
        )
        .unwrap();
        !events.is_empty()
    }
}

/// Pairs 0 and 9 of 16 have vector 0.
#[test]
fn a_shared_vector_wakes_all_who_wait_and_no_one_masks_it_for_another() {
    for options in [SILICON, QEMU] {
        let mut machine = Machine::new(options, 16);
        (0..16).for_each(|pair| machine.turn_on(pair, usize::from(SLOTS)));
        let homes = machine.homes();
        let to = |pair: u16| {
            homes
                .iter()
                .find(|(_, home)| **home == pair)
                .map(|(number, _)| flow(*number))
        };
        let (to_0, to_9) = (to(0).unwrap(), to(9).unwrap());
        let mut lanes = [0, 9].map(|pair| machine.sides[pair].lane.take().unwrap());
        let ears = [0, 1].map(|at| Ear::of(lanes[at].as_ref()));
        let woken = || [ears[0].was_woken(), ears[1].was_woken()];
        woken();
        // A frame, and the end of the interval from the interrupt before.
        let receive = |machine: &Machine, frame: &[u8]| {
            let mut card = machine.bench.card();
            card.receive_from_wire(frame);
            card.advance(std::time::Duration::from_micros(20));
        };

        assert!(!lanes[0].arm() && !lanes[1].arm());
        receive(&machine, &to_0);
        assert_eq!(woken(), [true, true]);
        // The one who has the work takes it, and asks for no more wake-ups; the other still does.
        lanes.iter_mut().for_each(|lane| lane.take_interrupt());
        run(lanes[0].as_mut());
        assert!(!lanes[1].arm());
        receive(&machine, &to_9);
        assert_eq!(woken(), [true, true], "masked by the one who polls");
        run(lanes[1].as_mut());

        // Nobody waits: nobody is interrupted, and what came is not lost to who waits next.
        receive(&machine, &to_9);
        assert_eq!(woken(), [false, false]);
        assert_eq!(machine.bench.card().read32(regs::EIMS) & 1, 0);
        assert!(lanes[1].arm(), "it is there already");
        assert_eq!(woken(), [true, true]);

        // One who stops takes the other's wake-ups not along.
        let [first, second] = lanes;
        first.stop().card.unwrap();
        receive(&machine, &to_9);
        assert!(ears[1].was_woken());
        machine.sides[9].lane = Some(second);
        assert_eq!(machine.sides[9].counters.interrupts.get(), 1);
        machine.end();
    }
}

/// What a guest does with one pair on a worker.
struct Pair {
    rx: Rx,
    tx: Tx,
    lanes: [LaneId; 2],
    counters: [Arc<LaneStats>; 2],
}

/// Sixteen pairs on two workers that sleep whenever they can, so that each frame needs its wake-up: one that is lost stops
/// the test.
#[test]
fn sixteen_pairs_on_two_workers_lose_no_wake_up() {
    const PAIRS: u16 = 16;
    let mut bench = Bench::with_pairs(SILICON, PAIRS);
    bench.wait_for_link();
    let workers = [0, 1].map(|number| Worker::start(&format!("worker{number}"), None).unwrap());
    let worker = |pair: u16| &workers[usize::from(pair % 2)];
    let sleepy = Patience::For(std::time::Duration::ZERO);
    let mut pairs = Vec::new();
    for pair in 0..PAIRS {
        let [rx, tx] = [0, 1].map(|side| bench.ring(64, 16 * (2 * u64::from(pair) + side)));
        assert!(tx.place().used < GUEST_BASE + (1 << 20), "below the arenas");
        let skip = u64::from(pair) * arena_bytes(SLOTS);
        let counters = [Arc::default(), Arc::default()];
        let lanes = [
            bench.rx_lane_of(pair, &rx, &counters[0]),
            bench.tx_lane_of(pair, &tx, &counters[1]),
        ];
        let mut rx = Rx::new(rx, &bench.memory, RX_ARENA + skip, SLOTS);
        let tx = Tx::new(tx, &bench.memory, TX_ARENA + skip, SLOTS);
        rx.fill(usize::from(SLOTS), BUFFER_BYTES, Layout::WithData, Form::Direct);
        rx.queue.submit();
        let lanes = lanes.map(|lane| worker(pair).add(lane, sleepy).unwrap());
        pairs.push(Pair {
            rx,
            tx,
            lanes,
            counters,
        });
    }
    let poll = |pair: &Pair, number: u16, side: usize| {
        worker(number).with(pair.lanes[side], |lane| lane.poll()).unwrap();
    };
    // Every queue has its buffers before the first frame.
    for (number, pair) in (0..).zip(&pairs) {
        poll(pair, number, 0);
    }

    let mut came = [0_u32; PAIRS as usize];
    for round in 0..20 {
        for number in 0..64_u8 {
            let frame = flow(number);
            bench.card().receive_from_wire(&frame);
            let started = Instant::now();
            let mut arrived = None;
            while arrived.is_none() {
                assert!(
                    started.elapsed() < PATIENCE,
                    "round {round}: flow {number} never arrived"
                );
                // The card keeps its interrupts apart, by its own clock.
                bench.card().advance(std::time::Duration::from_micros(1));
                arrived = pairs
                    .iter_mut()
                    .position(|pair| pair.rx.try_recv().is_some_and(|received| received == frame));
            }
            let at = arrived.unwrap();
            came[at] += 1;
            let pair = &mut pairs[at];
            pair.rx.post(BUFFER_BYTES, Layout::WithData, Form::Direct);
            pair.rx.queue.submit();
        }
        // The benches' lanes have no kick; the command wakes the worker, and the card's interrupt brings the frame back.
        for (number, pair) in (0..).zip(&mut pairs) {
            poll(pair, number, 0);
            pair.tx.offer(
                &flow(u8::try_from(number).unwrap()),
                Layout::WithData,
                Form::Direct,
            );
            pair.tx.queue.submit();
            poll(pair, number, 1);
            let started = Instant::now();
            while pair.tx.queue.outstanding() > 0 {
                assert!(
                    started.elapsed() < PATIENCE,
                    "round {round}: pair {number} never had its frame back"
                );
                pair.tx.reclaim();
            }
        }
    }
    assert!(came.iter().all(|frames| *frames > 0), "{came:?}");
    for (number, pair) in (0..).zip(pairs) {
        for lane in pair.lanes {
            let lane = worker(number).remove(lane).unwrap().unwrap();
            lane.stop().card.unwrap();
        }
        assert_eq!(
            pair.counters[0].frames.get(),
            u64::from(came[usize::from(number)])
        );
        assert!(pair.counters[0].interrupts.get() > 0, "pair {number} was woken");
        assert_eq!(pair.counters[1].frames.get(), 20);
    }
    assert_eq!(bench.sent.lock().unwrap().len(), 20 * usize::from(PAIRS));
    bench.card().violations().assert_clean();
}

#[test]
fn pairs_go_round_over_the_workers_with_both_lanes_on_one() {
    let bench = Bench::new(SILICON);
    let slot = bench.plug(2, SILICON);
    let workers = ["first", "second", "third"].map(|name| Worker::start(name, None).unwrap());
    let (map, nic) = (Arc::clone(&bench.map), Box::new(slot.open_with(4)));
    let port = Port::new("vm0", map, nic, workers.to_vec(), Patience::Forever, 1500);
    assert_eq!(port.queues(), 8);
    let mut homes = Vec::new();
    for index in 0..port.queues() {
        let ring = bench.ring(64, 16 * u64::try_from(index).unwrap());
        let setup = bench.setup_at(ring.place(), 0, port.stats(index).unwrap());
        port.start_lane(index, setup).unwrap();
        let name = |_: &mut dyn Lane| std::thread::current().name().map(str::to_owned);
        homes.push(port.with_lane(index, name).unwrap().unwrap().unwrap());
    }
    assert_eq!(
        homes,
        [
            "first", "first", "second", "second", "third", "third", "first", "first"
        ]
    );
    // One that stops and starts again is where it was, and the others have not moved.
    port.stop_lane(2).unwrap();
    assert_eq!(
        port.status().running,
        [true, true, false, true, true, true, true, true]
    );
    for index in (0..port.queues()).filter(|index| *index != 2) {
        port.stop_lane(index).unwrap();
    }
    slot.card.lock().unwrap().violations().assert_clean();
}
