//! Who wakes whom: no wake-up is lost, and none comes that was refused.

use super::{BackEnd, Guest, RX_BUFFER_BYTES, Running, Setup};
use crate::frontend::PATIENCE;
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

/// One to four frames out, the same frames back, each side asleep in between.
fn ping_pong(running: &Running, features: u64) {
    let mut guest = Guest::boot(running, Setup::default().features(features));
    guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    let (mut sequence, mut kicks) = (0_u64, 0_u64);
    while sequence < PING_PONGS {
        // Bursts of changing size shift the moment of arming against the moment of publishing.
        let burst = 1 + sequence * 7 / 3 % 4;
        for number in sequence..sequence + burst {
            guest.tx.offer(&frame(number, 60), Layout::WithData, Form::Direct);
            kicks += u64::from(guest.tx.queue.submit());
        }
        for _ in 0..burst {
            let bytes = running.wire.recv();
            running.wire.send(&bytes);
        }
        for number in sequence..sequence + burst {
            assert!(
                guest.rx.recv() == frame(number, 60),
                "frame {number} came back changed or out of order"
            );
            guest.rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        }
        guest.tx.reclaim();
        sequence += burst;
    }
    guest.tx.drain();
    guest.check();
    println!("{sequence} ping-pongs with {kicks} tx kicks");
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
