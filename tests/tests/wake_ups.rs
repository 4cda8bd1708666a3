//! Who wakes whom, and who waits for whom, with the igb driver on the register-level 82576: moderation, kicks and
//! notifications that are not sent, bursts, and a full ring. By count, on the card's own clock.

#![forbid(unsafe_code)]

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use queues::lane::{Lane, LaneSetup, LaneStats, Progress};
use queues::nic::Nic;
use rustix::event::{EventfdFlags, eventfd};
use tests::bench::{Bench, MAC, RX_ARENA, TX_ARENA};
use tests::card::faults::Delay;
use tests::card::{Options, Quirks, regs};
use tests::frontend::net::{Form, Layout, Rx, Tx};

const BURST: u64 = 32;
const SILICON: Options = options(false);
const QEMU: Options = options(true);

const fn options(qemu: bool) -> Options {
    Options {
        quirks: Quirks { qemu },
        scribble: true,
        reset_quiet: None,
    }
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0x5a; len];
    frame[..6].copy_from_slice(&MAC);
    frame
}

/// A bench whose link is up, and a receive and a transmit lane on it that can notify.
struct Port {
    bench: Bench,
    rx_lane: Box<dyn Lane>,
    rx: Rx,
    rx_counters: Arc<LaneStats>,
    tx_lane: Box<dyn Lane>,
    tx: Tx,
    tx_counters: Arc<LaneStats>,
}

impl Port {
    fn new(options: Options, size: u16) -> Self {
        let mut bench = Bench::new(options);
        bench.wait_for_link();
        let call = || {
            Some(File::from(
                eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"),
            ))
        };
        let (rx_ring, tx_ring) = (bench.ring(size, 0), bench.ring(size, 128));
        let (rx_counters, tx_counters) = (Arc::<LaneStats>::default(), Arc::<LaneStats>::default());
        let setup = LaneSetup {
            call: call(),
            ..bench.setup(&rx_ring, &rx_counters)
        };
        let rx_lane = bench.nic.rx_lane(0, setup).expect("the queue starts");
        let setup = LaneSetup {
            call: call(),
            ..bench.setup(&tx_ring, &tx_counters)
        };
        let tx_lane = bench.nic.tx_lane(0, setup).expect("the queue starts");
        let rx = Rx::new(rx_ring, &bench.memory, RX_ARENA, size);
        let tx = Tx::new(tx_ring, &bench.memory, TX_ARENA, size);
        Self {
            bench,
            rx_lane,
            rx,
            rx_counters,
            tx_lane,
            tx,
            tx_counters,
        }
    }

    /// The guest offers `count` receive buffers, and the card has them.
    fn fill(&mut self, count: usize) {
        self.rx.fill(count, 1536, Layout::WithData, Form::Direct);
        self.rx.queue.submit();
        run(self.rx_lane.as_mut());
    }

    fn offer(&mut self, frames: usize) {
        for _ in 0..frames {
            self.tx.offer(&frame(60), Layout::WithData, Form::Direct);
        }
    }

    /// `frames` frames of `len` bytes reach a lane that sleeps, which is woken, takes them and sleeps again. Returns how
    /// many interrupts that took.
    fn wake_with(&mut self, frames: usize, len: usize) -> u64 {
        let before = self.rx_counters.interrupts.get();
        assert!(!self.rx_lane.arm());
        for _ in 0..frames {
            self.bench.card().receive_from_wire(&frame(len));
        }
        // Whatever interval there is, it is over, and so is that of a message at its end.
        self.bench.card().advance(Duration::from_micros(50));
        self.bench.card().advance(Duration::from_millis(1));
        self.rx_lane.take_interrupt();
        run(self.rx_lane.as_mut());
        for _ in 0..frames {
            assert_eq!(self.rx.try_recv().map(|frame| frame.len()), Some(len));
        }
        self.fill(frames);
        self.rx_counters.interrupts.get() - before
    }

    fn on_the_wire(&self) -> u64 {
        self.bench.sent.lock().expect("no panic").len() as u64
    }

    fn interval(&self, vector: u32) -> u32 {
        self.bench.card().read32(regs::EITR + 4 * vector)
    }

    fn end(self) {
        self.rx_lane.stop().card.expect("the queue stops");
        self.tx_lane.stop().card.expect("the queue stops");
        self.bench.card().violations().assert_clean();
    }
}

/// Passes until there is nothing to do.
fn run(lane: &mut dyn Lane) {
    while lane.poll() == Progress::Moved {}
}

#[test]
fn interrupts_are_kept_apart_by_what_comes_with_them() {
    let mut port = Port::new(SILICON, 256);
    port.fill(100);
    // Bits 14:2, in microseconds.
    assert_eq!(port.interval(0), 20 << 2);
    assert_eq!(
        port.interval(1),
        50 << 2,
        "a transmit vector gives buffers back in bulk"
    );
    for _ in 0..100 {
        assert_eq!(port.wake_with(1, 1514), 1);
    }
    assert_eq!(port.interval(0), 20 << 2, "frames that come alone");
    while port.interval(0) == 20 << 2 {
        port.wake_with(8, 60);
        assert!(
            port.rx_counters.interrupts.get() < 200,
            "a stream is never noticed"
        );
    }
    assert_eq!(port.interval(0), 50 << 2);
    while port.interval(0) == 50 << 2 {
        port.wake_with(1, 60);
        assert!(
            port.rx_counters.interrupts.get() < 300,
            "its end is never noticed"
        );
    }
    assert_eq!(port.interval(0), 20 << 2);
    port.end();
}

#[test]
fn an_interval_that_runs_goes_on_when_the_pace_changes_and_a_lone_frame_never_waits() {
    let mut port = Port::new(SILICON, 256);
    port.fill(200);
    let woken = |port: &mut Port| {
        let before = port.rx_counters.interrupts.get();
        port.rx_lane.take_interrupt();
        port.rx_counters.interrupts.get() - before
    };
    // Sixteen interrupts with a stream between them, and no time after the last. Of a burst the first frame is told at
    // once, and the rest when the interval is over.
    for _ in 0..7 {
        assert_eq!(port.wake_with(16, 60), 2);
    }
    assert_eq!(port.wake_with(1, 60), 1);
    assert!(!port.rx_lane.arm());
    port.bench.card().receive_from_wire(&frame(60));
    assert_eq!(port.interval(0), 20 << 2);
    assert_eq!(
        woken(&mut port),
        1,
        "the one before is long past, so it is told at once"
    );
    assert_eq!(port.interval(0), 50 << 2);
    run(port.rx_lane.as_mut());
    assert!(!port.rx_lane.arm());
    port.bench.card().receive_from_wire(&frame(60));
    assert_eq!(woken(&mut port), 0);
    port.bench.card().advance(Duration::from_micros(19));
    assert_eq!(woken(&mut port), 0, "20 us have not passed since the last");
    port.bench.card().advance(Duration::from_micros(1));
    assert_eq!(woken(&mut port), 1);
    run(port.rx_lane.as_mut());
    assert_eq!(port.rx_counters.frames.get(), 7 * 16 + 1 + 2);
    port.end();
}

#[test]
fn an_emulated_card_is_told_nothing_of_intervals() {
    let mut port = Port::new(QEMU, 256);
    port.fill(100);
    for _ in 0..40 {
        assert_eq!(port.wake_with(8, 60), 8, "one message a frame, and none too many");
    }
    assert_eq!([0, 1, 2].map(|vector| port.interval(vector)), [0; 3]);
    port.end();
}

#[test]
fn a_guest_is_asked_for_kicks_and_the_card_for_interrupts_only_before_a_sleep() {
    for options in [SILICON, QEMU] {
        let mut port = Port::new(options, 64);
        let mut kicks = 0;
        let unmasked = |port: &Port| port.bench.card().read32(regs::EIMS) & 0b11;
        for sleep in 0..10 {
            for _ in 0..100 {
                port.offer(1);
                kicks += u64::from(port.tx.queue.submit());
                run(port.tx_lane.as_mut());
                assert_eq!(port.tx.reclaim(), 1);
                assert_eq!(unmasked(&port), 0, "while it polls");
            }
            assert_eq!(
                kicks,
                sleep + 1,
                "of each hundred frames the one that found us asleep"
            );
            assert!(!port.tx_lane.arm());
            assert_eq!(
                unmasked(&port),
                0,
                "all was sent, so the card has nothing to tell"
            );
            assert!(!port.rx_lane.arm());
            assert_eq!(unmasked(&port), 0b01, "a frame may come at any time");
            port.fill(1);
        }
        port.end();
    }
}

#[test]
fn a_guest_that_polls_is_not_notified() {
    let mut port = Port::new(SILICON, 64);
    let send = |port: &mut Port, frames: usize| {
        let before = port.tx_counters.notifications.get();
        for _ in 0..frames {
            port.offer(1);
            port.tx.queue.submit();
            run(port.tx_lane.as_mut());
            assert_eq!(port.tx.reclaim(), 1);
        }
        port.tx_counters.notifications.get() - before
    };
    port.tx.queue.refuse_interrupts();
    assert_eq!(send(&mut port, 1000), 0);
    port.tx.queue.want_interrupts();
    assert_eq!(send(&mut port, 10), 10);
    port.end();
}

#[test]
fn between_two_looks_at_a_quiet_lane_a_flooding_one_moves_a_burst() {
    let mut port = Port::new(SILICON, 256);
    // The second port, on a card of its own, whose lanes the same worker has.
    let slot = port.bench.plug(2, SILICON);
    let mut nic = slot.open();
    slot.card
        .lock()
        .expect("no panic")
        .advance(Duration::from_millis(600));
    assert!(nic.link().is_up());
    let (ring, counters) = (port.bench.ring(16, 256), Arc::<LaneStats>::default());
    let setup = LaneSetup {
        link_up: true,
        ..port.bench.setup_at(ring.place(), 0, &counters)
    };
    let mut quiet_lane = nic.tx_lane(0, setup).expect("the queue starts");
    let mut quiet = Tx::new(ring, &port.bench.memory, TX_ARENA + (2 << 20), 16);

    port.fill(256);
    for sent in 1..=100 {
        // As much each way as the flooding port can have waiting.
        port.tx.reclaim();
        while port.tx.has_room() {
            port.offer(1);
        }
        port.tx.queue.submit();
        while port.rx.try_recv().is_some() {}
        port.rx
            .fill(256 - port.rx.posted(), 1536, Layout::WithData, Form::Direct);
        port.rx.queue.submit();
        for _ in 0..64 {
            port.bench.card().receive_from_wire(&frame(60));
        }
        quiet.send(&frame(60), Layout::WithData, Form::Direct);
        let before = (port.on_the_wire(), port.rx_counters.frames.get());
        port.tx_lane.poll();
        port.rx_lane.poll();
        quiet_lane.poll();
        let on_the_wire = slot.sent.lock().expect("no panic").len() as u64;
        assert_eq!(on_the_wire, sent, "it waits for no second pass");
        let flood = (
            port.on_the_wire() - before.0,
            port.rx_counters.frames.get() - before.1,
        );
        assert_eq!(flood, (BURST, BURST), "of the flood, a burst each way");
        quiet_lane.poll();
        assert_eq!(counters.frames.get(), sent, "and it comes back in the next");
        quiet.reclaim();
        // What the flood left is no part of the next round.
        run(port.rx_lane.as_mut());
        run(port.tx_lane.as_mut());
    }
    quiet_lane.stop().card.expect("the queue stops");
    port.end();
}

#[test]
fn trap_10_with_a_full_ring_each_frame_that_is_done_comes_back_and_makes_room_for_the_next() {
    for options in [SILICON, QEMU] {
        // More than the card's ring holds.
        const FRAMES: usize = 512;
        let mut port = Port::new(options, 512);
        port.bench.card().set_delay(Delay::UntilStepped);
        port.offer(FRAMES);
        port.tx.queue.submit();
        run(port.tx_lane.as_mut());
        for done in 0..FRAMES as u64 {
            assert_eq!(port.tx.reclaim(), 0, "not before the card is done");
            assert!(
                !port.tx_lane.arm(),
                "a ring that is full is no reason to stay awake ({done} done)"
            );
            port.bench.card().step(1);
            port.bench.card().advance(Duration::from_micros(50));
            port.tx_lane.take_interrupt();
            assert_eq!(port.tx_counters.interrupts.get(), done + 1);
            run(port.tx_lane.as_mut());
            assert_eq!(port.tx.reclaim(), 1, "after {done}");
        }
        assert_eq!(port.tx_counters.frames.get(), FRAMES as u64);
        port.end();
    }
}
