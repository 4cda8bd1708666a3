//! Who wakes whom: no wake-up is lost, and none comes that was refused.

use std::time::{Duration, Instant};

use super::{BackEnd, Guest, RX, RX_BUFFER_BYTES, Running, Setup, TX};
use crate::frontend::PATIENCE;
use crate::frontend::event::Event;
use crate::frontend::net::{Form, Layout};
use crate::frontend::vmm::feature;
use crate::frontend::wire::frame;

const PING_PONGS: u64 = 10_000;

/// The guest kicks only when `avail_event` asks and wakes only by its interrupt.
pub fn ping_pong_by_event_idx_loses_no_wake_up<B: BackEnd>(_: &B, running: &mut Running) {
    ping_pong(running, feature::EVENT_IDX);
}

/// The same with the flags of the two rings.
pub fn ping_pong_by_flags_loses_no_wake_up<B: BackEnd>(_: &B, running: &mut Running) {
    ping_pong(running, 0);
}

/// Up to 8 frames out, the same frames back, each side asleep in between; and no rx buffer to spare, so the device
/// has to ask for those as well. Eight, because a datagram socket holds ten while nobody can take them.
///
/// A wake-up is lost if something is published between the device's last look and its wish for a kick. So within a
/// burst frames and buffers are published one by one, at moments that have nothing to do with the device's.
fn ping_pong(running: &Running, features: u64) {
    let mut guest = Guest::boot(running, Setup::default().features(features));
    let (mut sequence, mut tx_kicks, mut rx_kicks) = (0_u64, 0_u64, 0_u64);
    let mut random = Random(1);
    while sequence < PING_PONGS {
        let burst = sequence..sequence + 1 + u64::from(random.below(8));
        for number in burst.clone() {
            guest.tx.offer(&frame(number, 60), Layout::WithData, Form::Direct);
            random.spin();
            tx_kicks += u64::from(guest.tx.queue.submit());
        }
        for _ in burst.clone() {
            let bytes = running.wire.recv();
            running.wire.send(&bytes);
        }
        for _ in burst.clone() {
            guest.rx.post(RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
            random.spin();
            rx_kicks += u64::from(guest.rx.queue.submit());
        }
        for number in burst.clone() {
            assert!(
                guest.rx.recv() == frame(number, 60),
                "frame {number} came back changed or out of order"
            );
        }
        guest.tx.drain();
        sequence = burst.end;
    }
    guest.check();
    println!("{sequence} ping-pongs with {tx_kicks} tx and {rx_kicks} rx kicks");
}

/// Numbers that are the same in every run.
struct Random(u32);

impl Random {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 16) % bound
    }

    /// Passes up to 30 microseconds without giving up the processor.
    fn spin(&mut self) {
        let until = Instant::now() + Duration::from_nanos(u64::from(self.below(30_000)));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
}

/// With interrupts refused on both rings the call eventfds stay silent while frames flow.
pub fn a_guest_that_refuses_interrupts_gets_none<B: BackEnd>(_: &B, running: &mut Running) {
    for features in [feature::EVENT_IDX, 0] {
        let mut guest = Guest::boot(running, Setup::default().features(features));
        guest
            .rx
            .fill(128, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        // One frame each way first: a back end may call once for a fresh call eventfd.
        guest.send_and_check(&running.wire, 0, 60, Layout::WithData, Form::Direct);
        guest.receive_and_check(&running.wire, 0, 60);
        for queue in [&guest.rx.queue, &guest.tx.queue] {
            queue.refuse_interrupts();
            queue.events().call.take();
        }
        for sequence in 1..100 {
            let bytes = frame(sequence, 60);
            guest.tx.send(&bytes, Layout::WithData, Form::Direct);
            running.wire.send(&running.wire.recv());
            assert!(
                guest.tx.queue.poll_used(PATIENCE),
                "frame {sequence} is never given back"
            );
            guest.tx.reclaim();
            assert!(
                guest.rx.queue.poll_used(PATIENCE),
                "frame {sequence} never comes back"
            );
            assert!(guest.rx.try_recv() == Some(bytes));
        }
        let calls = (
            guest.rx.queue.events().call.take(),
            guest.tx.queue.events().call.take(),
        );
        assert_eq!(calls, (0, 0), "calls on rx and tx, features {features:#x}");
        guest.check();
    }
}

/// A call eventfd at its maximum, in blocking mode, would hold whoever writes to it for ever.
pub fn a_call_eventfd_that_is_full_stops_nobody<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default().features(0));
    guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    let full = Event::full();
    for index in [RX, TX] {
        guest
            .session
            .set_call(index, &full)
            .expect("the call eventfd is taken");
    }
    for sequence in 0..50 {
        let bytes = frame(sequence, 60);
        guest.tx.send(&bytes, Layout::WithData, Form::Direct);
        running.wire.send(&running.wire.recv());
        assert!(
            guest.rx.queue.poll_used(PATIENCE),
            "frame {sequence} never comes back"
        );
        assert!(guest.rx.try_recv() == Some(bytes));
        guest.tx.reclaim();
    }
    for index in [RX, TX] {
        guest.session.get_vring_base(index).expect("the ring stops");
    }
    guest.check();
}
