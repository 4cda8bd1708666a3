//! The igb driver on the register-level 82576, in one process: bring-up, frames, link, stop, and a card in trouble.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use queues::lane::{Drop, LaneStats, Progress};
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

fn stats() -> Arc<LaneStats> {
    Arc::default()
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
        let mut bench = Bench::new(options);
        bench.wait_for_link();
        let counters = stats();
        let ring = bench.ring(256, 0);
        let mut lane = bench.tx_lane(&ring, &counters);
        let mut tx = Tx::new(ring, &bench.memory, TX_ARENA, 64);
        let mut wanted = Vec::new();
        for len in [60, 61, 64, 100, 512, 1024, 1513, 1514, 1518] {
            for layout in Layout::ALL {
                for form in [Form::Direct, Form::Indirect] {
                    let sent = frame(len, wanted.len());
                    tx.offer(&sent, layout, form);
                    tx.queue.submit();
                    wanted.push(sent);
                    while lane.poll() == Progress::Moved {}
                    tx.reclaim();
                }
            }
        }
        assert_eq!(*bench.sent.lock().unwrap(), wanted);
        assert_eq!(counters.zero_copy_frames.get(), wanted.len() as u64);
        assert!(bench.maps_only_guest_and_rings());
        tx.check();
        lane.stop().card.unwrap();
        bench.card().violations().assert_clean();
    }
}

#[test]
fn received_frames_arrive_in_order_behind_their_headers() {
    for options in [SILICON, QEMU] {
        let mut bench = Bench::new(options);
        bench.wait_for_link();
        let counters = stats();
        let ring = bench.ring(128, 0);
        let mut lane = bench.rx_lane(&ring, &counters);
        let mut rx = Rx::new(ring, &bench.memory, RX_ARENA, 100);
        let mut number = 0;
        for round in 0..20 {
            let layout = [Layout::WithData, Layout::OwnDescriptor, Layout::SplitHeader][round % 3];
            rx.fill(5, 1536, layout, Form::Direct);
            rx.queue.submit();
            lane.poll();
            for len in [60, 64, 300, 1514, 1518] {
                number += 1;
                bench.card().receive_from_wire(&frame(len, number));
            }
            while lane.poll() == Progress::Moved {}
            for (earlier, len) in [60, 64, 300, 1514, 1518].into_iter().enumerate() {
                let got = rx.try_recv().expect("a frame");
                assert_eq!(got, frame(len, number - 4 + earlier));
            }
        }
        assert_eq!(counters.zero_copy_frames.get(), 100);
        assert!(bench.maps_only_guest_and_rings());
        rx.check();
        lane.stop().card.unwrap();
        bench.card().violations().assert_clean();
    }
}

#[test]
fn one_short_buffer_bounces_and_shows_in_counters_and_map() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let mut lane = bench.rx_lane(&ring, &counters);
    let mut rx = Rx::new(ring, &bench.memory, RX_ARENA, 32);
    rx.post(1529, Layout::WithData, Form::Direct);
    rx.post(1530, Layout::WithData, Form::Direct);
    rx.queue.submit();
    // The proof of zero-copy is one that can fail: bounce memory appears, mapped by a thread of its own, and then the
    // buffers are posted.
    assert!(bench.maps_only_guest_and_rings());
    while lane.poll() != Progress::Moved {
        std::thread::yield_now();
    }
    while lane.poll() == Progress::Moved {}
    assert!(!bench.maps_only_guest_and_rings());
    for n in 0..2 {
        bench.card().receive_from_wire(&frame(1514, n));
    }
    while lane.poll() == Progress::Moved {}
    assert_eq!(rx.try_recv().unwrap(), frame(1514, 0));
    assert_eq!(rx.try_recv().unwrap(), frame(1514, 1));
    assert_eq!(
        (counters.bounced_frames(), counters.copied_bytes.get()),
        (1, 1514)
    );
    assert_eq!(counters.zero_copy_frames.get(), 1);
    lane.stop().card.unwrap();
    bench.card().violations().assert_clean();
}

#[test]
fn an_oversize_frame_never_reaches_a_buffer() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let mut lane = bench.rx_lane(&ring, &counters);
    let mut rx = Rx::new(ring, &bench.memory, RX_ARENA, 16);
    rx.fill(4, 1530, Layout::WithData, Form::Direct);
    rx.queue.submit();
    lane.poll();
    for len in [1519, 2048, 9000] {
        bench.card().receive_from_wire(&frame(len, len));
    }
    bench.card().receive_from_wire(&frame(1518, 1));
    while lane.poll() == Progress::Moved {}
    assert_eq!(
        rx.try_recv().unwrap(),
        frame(1518, 1),
        "the largest tagged frame is the largest that fits"
    );
    assert_eq!(rx.try_recv(), None);
    rx.check();
    lane.stop().card.unwrap();
    bench.card().violations().assert_clean();
}

#[test]
fn trap_12_after_a_stop_the_card_writes_nowhere_and_the_rest_is_taken_again() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let mut lane = bench.rx_lane(&ring, &counters);
    let mut rx = Rx::new(ring, &bench.memory, RX_ARENA, 32);
    rx.fill(10, 1536, Layout::WithData, Form::Direct);
    rx.queue.submit();
    lane.poll();
    for n in 0..3 {
        bench.card().receive_from_wire(&frame(100, n));
    }
    let stopped = lane.stop();
    stopped.card.unwrap();
    assert_eq!(stopped.first_unused, 3);
    let before = bench.memory.snapshot();
    for n in 0..50 {
        bench.card().receive_from_wire(&frame(1514, n));
    }
    bench.card().advance(Duration::from_millis(100));
    assert_eq!(before.first_difference(&bench.memory.snapshot()), None);
    for n in 0..3 {
        assert_eq!(rx.try_recv().unwrap(), frame(100, n));
    }

    let mut lane = bench.rx_lane(&rx.queue, &counters);
    lane.poll();
    bench.card().receive_from_wire(&frame(200, 9));
    while lane.poll() == Progress::Moved {}
    let mut last = None;
    while let Some(got) = rx.try_recv() {
        last = Some(got);
    }
    assert_eq!(last, Some(frame(200, 9)));
    lane.stop().card.unwrap();
    bench.card().violations().assert_clean();
}

#[test]
fn a_queue_that_will_not_stop_says_so_in_bounded_time_and_a_reset_ends_its_dma() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let mut lane = bench.rx_lane(&ring, &counters);
    let mut rx = Rx::new(ring, &bench.memory, RX_ARENA, 32);
    rx.fill(10, 1536, Layout::WithData, Form::Direct);
    rx.queue.submit();
    lane.poll();
    bench.card().wedge(RingName {
        direction: Direction::Rx,
        queue: 0,
    });
    let stopped = lane.stop();
    let stuck = stopped.card.unwrap_err();
    assert!(matches!(stuck.source, NicError::WillNotStop { bound_ms: 10, .. }));
    bench.nic.reset().unwrap();
    let before = bench.memory.snapshot();
    bench.wait_for_link();
    for n in 0..20 {
        bench.card().receive_from_wire(&frame(1514, n));
    }
    assert_eq!(before.first_difference(&bench.memory.snapshot()), None);

    let mut lane = bench.rx_lane(&rx.queue, &counters);
    lane.poll();
    bench.card().receive_from_wire(&frame(300, 3));
    while lane.poll() == Progress::Moved {}
    let mut frames = Vec::new();
    while let Some(got) = rx.try_recv() {
        frames.push(got);
    }
    assert_eq!(frames.last(), Some(&frame(300, 3)));
    lane.stop().card.unwrap();
    bench.card().violations().assert_clean();
}

#[test]
fn a_card_that_hangs_keeps_frames_and_the_stop_is_bounded() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let mut lane = bench.tx_lane(&ring, &counters);
    let mut tx = Tx::new(ring, &bench.memory, TX_ARENA, 16);
    bench.card().hang_tx(true);
    for n in 0..5 {
        tx.offer(&frame(100, n), Layout::WithData, Form::Direct);
    }
    tx.queue.submit();
    while lane.poll() == Progress::Moved {}
    assert_eq!(tx.reclaim(), 0);
    let stopped = lane.stop();
    assert_eq!(stopped.first_unused, 0, "none was sent, so all are offered again");
    if stopped.card.is_err() {
        bench.nic.reset().unwrap();
    }
    bench.card().hang_tx(false);
    bench.wait_for_link();
    let mut lane = bench.tx_lane(&tx.queue, &counters);
    while lane.poll() == Progress::Moved {}
    while tx.reclaim() > 0 {}
    assert_eq!(bench.sent.lock().unwrap().len(), 5);
    lane.stop().card.unwrap();
    bench.card().violations().assert_clean();
}

#[test]
fn a_pulled_cable_loses_frames_by_count_and_a_plugged_one_carries_again() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let mut lane = bench.tx_lane(&ring, &counters);
    let mut tx = Tx::new(ring, &bench.memory, TX_ARENA, 16);
    bench.card().set_link(false);
    assert_eq!(bench.nic.link(), Link::Down);
    lane.set_link(false).unwrap();
    tx.offer(&frame(100, 0), Layout::WithData, Form::Direct);
    tx.queue.submit();
    while lane.poll() == Progress::Moved {}
    assert_eq!(tx.reclaim(), 1, "a guest is never left waiting for a cable");
    assert_eq!(counters.dropped[Drop::LinkDown as usize].get(), 1);
    bench.card().set_link(true);
    bench.wait_for_link();
    lane.set_link(true).unwrap();
    tx.offer(&frame(100, 1), Layout::WithData, Form::Direct);
    tx.queue.submit();
    while lane.poll() == Progress::Moved {}
    assert_eq!(*bench.sent.lock().unwrap(), vec![frame(100, 1)]);
    lane.stop().card.unwrap();
    bench.card().violations().assert_clean();
}

#[test]
fn trap_10_frames_with_the_card_when_the_cable_goes_come_back_by_a_reset() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let mut lane = bench.tx_lane(&ring, &counters);
    let mut tx = Tx::new(ring, &bench.memory, TX_ARENA, 16);
    bench.card().hang_tx(true);
    tx.offer(&frame(100, 0), Layout::WithData, Form::Direct);
    tx.queue.submit();
    lane.poll();
    bench.card().set_link(false);
    assert!(
        lane.set_link(false).is_err(),
        "silicon does not let go without a link"
    );
    assert_eq!(tx.reclaim(), 0, "so the frame is still the card's to read");
    let stopped = lane.stop();
    assert!(stopped.card.is_err());
    bench.nic.reset().unwrap();
    drop(stopped);
    let mut lane = bench.tx_lane(&tx.queue, &counters);
    while lane.poll() == Progress::Moved {}
    assert_eq!(tx.reclaim(), 1, "lost and counted, and the guest goes on");
    assert_eq!(counters.dropped[Drop::LinkDown as usize].get(), 1);
    assert_eq!(counters.frames.get(), 0);
    lane.stop().card.unwrap();
    bench.card().violations().assert_clean();
}

#[test]
fn interrupts_come_when_armed_and_not_while_polling() {
    for options in [SILICON, QEMU] {
        let mut bench = Bench::new(options);
        bench.wait_for_link();
        let counters = stats();
        let ring = bench.ring(64, 0);
        let mut lane = bench.rx_lane(&ring, &counters);
        let mut rx = Rx::new(ring, &bench.memory, RX_ARENA, 32);
        rx.fill(10, 1536, Layout::WithData, Form::Direct);
        rx.queue.submit();
        lane.poll();
        bench.card().receive_from_wire(&frame(100, 0));
        lane.take_interrupt();
        assert_eq!(counters.interrupts.get(), 0);
        assert!(lane.arm(), "what came while polling is seen when arming");
        while lane.poll() == Progress::Moved {}
        lane.take_interrupt();
        let before = counters.interrupts.get();
        assert!(!lane.arm());
        bench.card().receive_from_wire(&frame(100, 1));
        lane.take_interrupt();
        assert!(counters.interrupts.get() > before, "an armed lane is woken");
        while lane.poll() == Progress::Moved {}
        assert_eq!(rx.try_recv().unwrap(), frame(100, 0));
        assert_eq!(rx.try_recv().unwrap(), frame(100, 1));
        lane.stop().card.unwrap();
        bench.card().violations().assert_clean();
    }
}

#[test]
fn a_card_that_is_gone_is_told_apart_from_one_that_is_stuck() {
    let mut bench = Bench::new(SILICON);
    bench.wait_for_link();
    let counters = stats();
    let ring = bench.ring(64, 0);
    let lane = bench.tx_lane(&ring, &counters);
    bench.card().set_removed(true);
    assert!(
        lane.stop().card.is_ok(),
        "no DMA comes from a card that is not there"
    );
    assert!(matches!(bench.nic.reset(), Err(NicError::Gone { .. })));
    assert_eq!(bench.nic.link(), Link::Down);
    bench.card().violations().assert_clean();
}
