//! The igb driver on the register-level 82576, in one process: bring-up, frames, link, stop, and a card in trouble.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use queues::lane::{Adoption, Drop, Lane, LaneStats, Progress};
use queues::nic::{Link, Nic, NicError};
use tests::bench::{Bench, MAC, RX_ARENA, TX_ARENA};
use tests::card::{Direction, Options, Quirks, RingName};
use tests::frontend::net::{Form, Layout, Rx, Tx};

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

fn frame(len: usize, seed: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len)
        .map(|byte| u8::try_from((byte * 7 + seed) % 251).expect("a byte"))
        .collect();
    frame[..6].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// A bench whose link is up, with one receive lane and the guest's queue behind it.
struct RxSide {
    bench: Bench,
    counters: Arc<LaneStats>,
    lane: Box<dyn Lane>,
    rx: Rx,
}

impl RxSide {
    fn new(options: Options, ring_size: u16) -> Self {
        let mut bench = Bench::new(options);
        bench.wait_for_link();
        let counters = Arc::<LaneStats>::default();
        let ring = bench.ring(ring_size, 0);
        let lane = bench.rx_lane(&ring, &counters);
        let rx = Rx::new(ring, &bench.memory, RX_ARENA, ring_size);
        Self {
            bench,
            counters,
            lane,
            rx,
        }
    }

    /// The guest offers `buffers` buffers of `len` bytes, header included.
    fn offer(&mut self, buffers: usize, len: usize, layout: Layout) {
        self.rx.fill(buffers, len, layout, Form::Direct);
        self.rx.queue.submit();
        self.lane.poll();
    }

    /// The last of the frames that arrived.
    fn last_frame(&mut self) -> Option<Vec<u8>> {
        std::iter::from_fn(|| self.rx.try_recv()).last()
    }

    /// A new lane over a queue whose lane was stopped.
    fn again(mut bench: Bench, counters: Arc<LaneStats>, rx: Rx) -> Self {
        let mut lane = bench.rx_lane(&rx.queue, &counters);
        lane.poll();
        Self {
            bench,
            counters,
            lane,
            rx,
        }
    }

    fn end(self) {
        self.lane.stop().card.unwrap();
        self.bench.card().violations().assert_clean();
    }
}

/// The same for transmit.
struct TxSide {
    bench: Bench,
    counters: Arc<LaneStats>,
    lane: Box<dyn Lane>,
    tx: Tx,
}

impl TxSide {
    fn new(options: Options) -> Self {
        let mut bench = Bench::new(options);
        bench.wait_for_link();
        let counters = Arc::<LaneStats>::default();
        let ring = bench.ring(256, 0);
        let lane = bench.tx_lane(&ring, &counters);
        let tx = Tx::new(ring, &bench.memory, TX_ARENA, 64);
        Self {
            bench,
            counters,
            lane,
            tx,
        }
    }

    /// The guest offers one frame, and the lane does what it can.
    fn send(&mut self, frame: &[u8], layout: Layout, form: Form) {
        self.tx.offer(frame, layout, form);
        self.tx.queue.submit();
        run(self.lane.as_mut());
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        self.bench.sent.lock().unwrap().clone()
    }

    /// A new lane over a queue whose lane was stopped.
    fn again(mut bench: Bench, counters: Arc<LaneStats>, tx: Tx) -> Self {
        let mut lane = bench.tx_lane(&tx.queue, &counters);
        run(lane.as_mut());
        Self {
            bench,
            counters,
            lane,
            tx,
        }
    }

    fn end(self) {
        self.lane.stop().card.unwrap();
        self.bench.card().violations().assert_clean();
    }
}

/// Passes until there is nothing to do.
fn run(lane: &mut dyn Lane) {
    while lane.poll() == Progress::Moved {}
}

#[test]
fn the_card_comes_up_by_the_book() {
    for options in [SILICON, QEMU] {
        let mut bench = Bench::new(options);
        assert_eq!(bench.nic.mac(), Some(MAC));
        assert_eq!(
            bench.nic.link(),
            Link::Down,
            "autonegotiation takes half a second"
        );
        bench.wait_for_link();
        assert_eq!(bench.nic.link(), Link::Up { mbps: 1000 });
        bench.card().violations().assert_clean();
    }
}

#[test]
fn frames_of_every_size_and_layout_go_out_unchanged_and_uncopied() {
    for options in [SILICON, QEMU] {
        let mut side = TxSide::new(options);
        let mut wanted = Vec::new();
        for len in [60, 61, 64, 100, 512, 1024, 1513, 1514, 1518] {
            for layout in Layout::ALL {
                for form in [Form::Direct, Form::Indirect] {
                    let next = frame(len, wanted.len());
                    side.send(&next, layout, form);
                    wanted.push(next);
                    side.tx.reclaim();
                }
            }
        }
        assert_eq!(side.sent(), wanted);
        assert_eq!(side.counters.zero_copy_frames.get(), wanted.len() as u64);
        assert!(side.bench.maps_only_guest_and_rings());
        side.tx.check();
        side.end();
    }
}

#[test]
fn received_frames_arrive_in_order_behind_their_headers() {
    const SIZES: [usize; 5] = [60, 64, 300, 1514, 1518];
    for options in [SILICON, QEMU] {
        let mut side = RxSide::new(options, 128);
        for round in 0..20 {
            let layout = [Layout::WithData, Layout::OwnDescriptor, Layout::SplitHeader][round % 3];
            side.offer(SIZES.len(), 1536, layout);
            for len in SIZES {
                side.bench.card().receive_from_wire(&frame(len, round + len));
            }
            run(side.lane.as_mut());
            for len in SIZES {
                assert_eq!(side.rx.try_recv(), Some(frame(len, round + len)));
            }
        }
        assert_eq!(side.counters.zero_copy_frames.get(), 100);
        assert!(side.bench.maps_only_guest_and_rings());
        side.rx.check();
        side.end();
    }
}

#[test]
fn one_short_buffer_bounces_and_shows_in_counters_and_map() {
    let mut side = RxSide::new(SILICON, 64);
    side.rx.post(1529, Layout::WithData, Form::Direct);
    side.rx.post(1530, Layout::WithData, Form::Direct);
    side.rx.queue.submit();
    // The proof of zero-copy is one that can fail: bounce memory appears, mapped by a thread of its own, and then the
    // buffers are posted.
    assert!(side.bench.maps_only_guest_and_rings());
    while side.lane.poll() != Progress::Moved {
        std::thread::yield_now();
    }
    run(side.lane.as_mut());
    assert!(!side.bench.maps_only_guest_and_rings());
    for n in 0..2 {
        side.bench.card().receive_from_wire(&frame(1514, n));
    }
    run(side.lane.as_mut());
    assert_eq!(side.rx.try_recv(), Some(frame(1514, 0)));
    assert_eq!(side.rx.try_recv(), Some(frame(1514, 1)));
    assert_eq!(
        (side.counters.bounced_frames(), side.counters.copied_bytes.get()),
        (1, 1514)
    );
    assert_eq!(side.counters.zero_copy_frames.get(), 1);
    side.end();
}

#[test]
fn an_oversize_frame_never_reaches_a_buffer() {
    let mut side = RxSide::new(SILICON, 64);
    side.offer(4, 1530, Layout::WithData);
    for len in [1519, 2048, 9000] {
        side.bench.card().receive_from_wire(&frame(len, len));
    }
    side.bench.card().receive_from_wire(&frame(1518, 1));
    run(side.lane.as_mut());
    assert_eq!(
        side.rx.try_recv(),
        Some(frame(1518, 1)),
        "the largest tagged frame is the largest that fits"
    );
    assert_eq!(side.rx.try_recv(), None);
    side.rx.check();
    side.end();
}

#[test]
fn trap_12_after_a_stop_the_card_writes_nowhere_and_the_rest_is_taken_again() {
    let RxSide {
        bench,
        counters,
        lane,
        rx,
    } = {
        let mut side = RxSide::new(SILICON, 64);
        side.offer(10, 1536, Layout::WithData);
        for n in 0..3 {
            side.bench.card().receive_from_wire(&frame(100, n));
        }
        side
    };
    let stopped = lane.stop();
    stopped.card.unwrap();
    assert_eq!(stopped.first_unused, 3);
    let before = bench.memory.snapshot();
    for n in 0..50 {
        bench.card().receive_from_wire(&frame(1514, n));
    }
    bench.card().advance(Duration::from_millis(100));
    assert_eq!(before.first_difference(&bench.memory.snapshot()), None);

    let mut side = RxSide::again(bench, counters, rx);
    for n in 0..3 {
        assert_eq!(side.rx.try_recv(), Some(frame(100, n)));
    }
    side.bench.card().receive_from_wire(&frame(200, 9));
    run(side.lane.as_mut());
    assert_eq!(side.last_frame(), Some(frame(200, 9)));
    side.end();
}

#[test]
fn a_queue_that_will_not_stop_says_so_in_bounded_time_and_a_reset_ends_its_dma() {
    let mut side = RxSide::new(SILICON, 64);
    side.offer(10, 1536, Layout::WithData);
    side.bench.card().wedge(RingName {
        direction: Direction::Rx,
        queue: 0,
    });
    let RxSide {
        mut bench,
        counters,
        lane,
        rx,
    } = side;
    let stuck = lane.stop().card.unwrap_err();
    assert!(matches!(stuck.source, NicError::WillNotStop { bound_ms: 10, .. }));
    bench.nic.reset().unwrap();
    let before = bench.memory.snapshot();
    bench.wait_for_link();
    for n in 0..20 {
        bench.card().receive_from_wire(&frame(1514, n));
    }
    assert_eq!(before.first_difference(&bench.memory.snapshot()), None);

    let mut side = RxSide::again(bench, counters, rx);
    side.bench.card().receive_from_wire(&frame(300, 3));
    run(side.lane.as_mut());
    assert_eq!(side.last_frame(), Some(frame(300, 3)));
    side.end();
}

/// The steps of a change that takes memory away, on the clock: map, ask the lane, drain it, reset if that fails, unmap.
/// Nothing is unmapped before the card's DMA is over, and each wait has its bound (TRAPS 16).
#[test]
fn r3_a_drain_is_bounded_on_the_clock_and_nothing_is_unmapped_before_it_is_over() {
    for (wedged, drain_ms, reset_ms) in [(false, 10, 0), (true, 10, 250)] {
        let mut side = RxSide::new(SILICON, 64);
        side.offer(10, 1536, Layout::WithData);
        if wedged {
            side.bench.card().wedge(RingName {
                direction: Direction::Rx,
                queue: 0,
            });
        }
        let RxSide {
            mut bench, mut lane, ..
        } = side;
        let mapped = bench.kernel.mapped();
        let change = bench.map.change("vm0", &bench.table, Vec::new()).unwrap();
        assert_eq!(
            lane.adopt(change.table().clone(), change.leaving()),
            Adoption::InUse
        );

        let begun = bench.waited();
        let stopped = lane.stop();
        assert!(bench.waited() - begun <= Duration::from_millis(drain_ms));
        assert_eq!(stopped.card.is_err(), wedged);
        assert_eq!(bench.kernel.mapped(), mapped, "not before it is drained");
        if wedged {
            let begun = bench.waited();
            bench.nic.reset().unwrap();
            let took = bench.waited() - begun;
            assert!(took <= Duration::from_millis(reset_ms), "{took:?}");
        }
        assert_eq!(bench.kernel.mapped(), mapped, "not before the reset is over");
        change.finish().unwrap();
        drop(stopped);
        assert!(
            bench
                .map
                .snapshot()
                .extents
                .iter()
                .all(|extent| extent.file.contains("vuv-rings"))
        );
        bench.wait_for_link();
        for n in 0..20 {
            bench.card().receive_from_wire(&frame(1514, n));
        }
        bench.card().violations().assert_clean();
    }
}

/// Transmit as well: it is given time to send what it has, and no longer.
#[test]
fn r3_a_transmit_lane_that_hangs_is_drained_within_its_bound() {
    let mut side = TxSide::new(SILICON);
    side.bench.card().hang_tx(true);
    side.send(&frame(100, 0), Layout::WithData, Form::Direct);
    let TxSide {
        mut bench, mut lane, ..
    } = side;
    let change = bench.map.change("vm0", &bench.table, Vec::new()).unwrap();
    assert_eq!(
        lane.adopt(change.table().clone(), change.leaving()),
        Adoption::InUse
    );
    let begun = bench.waited();
    let stopped = lane.stop();
    let took = bench.waited() - begun;
    assert!(took <= Duration::from_millis(20 + 10), "{took:?}");
    if stopped.card.is_err() {
        bench.nic.reset().unwrap();
    }
    change.finish().unwrap();
    drop(stopped);
    bench.card().hang_tx(false);
    bench.card().advance(Duration::from_millis(100));
    bench.card().violations().assert_clean();
}

#[test]
fn a_card_that_hangs_keeps_frames_and_the_stop_is_bounded() {
    let mut side = TxSide::new(SILICON);
    side.bench.card().hang_tx(true);
    for n in 0..5 {
        side.send(&frame(100, n), Layout::WithData, Form::Direct);
    }
    assert_eq!(side.tx.reclaim(), 0);
    let TxSide {
        mut bench,
        counters,
        lane,
        tx,
    } = side;
    let stopped = lane.stop();
    assert_eq!(stopped.first_unused, 0, "none was sent, so all are offered again");
    if stopped.card.is_err() {
        bench.nic.reset().unwrap();
    }
    bench.card().hang_tx(false);
    bench.wait_for_link();
    let side = TxSide::again(bench, counters, tx);
    assert_eq!(side.sent().len(), 5);
    side.end();
}

#[test]
fn a_pulled_cable_loses_frames_by_count_and_a_plugged_one_carries_again() {
    let mut side = TxSide::new(SILICON);
    side.bench.card().set_link(false);
    assert_eq!(side.bench.nic.link(), Link::Down);
    side.lane.set_link(false).unwrap();
    side.send(&frame(100, 0), Layout::WithData, Form::Direct);
    assert_eq!(side.tx.reclaim(), 1, "a guest is never left waiting for a cable");
    assert_eq!(side.counters.dropped[Drop::LinkDown as usize].get(), 1);
    side.bench.card().set_link(true);
    side.bench.wait_for_link();
    side.lane.set_link(true).unwrap();
    side.send(&frame(100, 1), Layout::WithData, Form::Direct);
    assert_eq!(side.sent(), vec![frame(100, 1)]);
    side.end();
}

#[test]
fn trap_10_frames_with_the_card_when_the_cable_goes_come_back_by_a_reset() {
    let mut side = TxSide::new(SILICON);
    side.bench.card().hang_tx(true);
    side.send(&frame(100, 0), Layout::WithData, Form::Direct);
    side.bench.card().set_link(false);
    assert!(
        side.lane.set_link(false).is_err(),
        "silicon does not let go without a link"
    );
    assert_eq!(side.tx.reclaim(), 0, "so the frame is still the card's to read");
    let TxSide {
        mut bench,
        counters,
        lane,
        tx,
    } = side;
    let stopped = lane.stop();
    assert!(stopped.card.is_err());
    bench.nic.reset().unwrap();
    drop(stopped);
    let mut side = TxSide::again(bench, counters, tx);
    assert_eq!(side.tx.reclaim(), 1, "lost and counted, and the guest goes on");
    assert_eq!(side.counters.dropped[Drop::LinkDown as usize].get(), 1);
    assert_eq!(side.counters.frames.get(), 0);
    side.end();
}

#[test]
fn interrupts_come_when_armed_and_not_while_polling() {
    for options in [SILICON, QEMU] {
        let mut side = RxSide::new(options, 64);
        side.offer(10, 1536, Layout::WithData);
        side.bench.card().receive_from_wire(&frame(100, 0));
        side.lane.take_interrupt();
        assert_eq!(side.counters.interrupts.get(), 0);
        assert!(side.lane.arm(), "what came while polling is seen when arming");
        run(side.lane.as_mut());
        side.lane.take_interrupt();
        let before = side.counters.interrupts.get();
        assert!(!side.lane.arm());
        side.bench.card().receive_from_wire(&frame(100, 1));
        // The interval from the one before.
        side.bench.card().advance(Duration::from_micros(20));
        side.lane.take_interrupt();
        assert!(side.counters.interrupts.get() > before, "an armed lane is woken");
        run(side.lane.as_mut());
        assert_eq!(side.rx.try_recv(), Some(frame(100, 0)));
        assert_eq!(side.rx.try_recv(), Some(frame(100, 1)));
        side.end();
    }
}

#[test]
fn a_card_that_is_gone_is_told_apart_from_one_that_is_stuck() {
    let TxSide { mut bench, lane, .. } = TxSide::new(SILICON);
    bench.card().set_removed(true);
    assert!(
        lane.stop().card.is_ok(),
        "no DMA comes from a card that is not there"
    );
    assert!(matches!(bench.nic.reset(), Err(NicError::Gone { .. })));
    assert_eq!(bench.nic.link(), Link::Down);
    bench.card().violations().assert_clean();
}
