//! Stopping, disabling, restarting and coming back: what is answered is true, and no buffer is lost.

use super::{BackEnd, Guest, RX, RX_BUFFER_BYTES, Running, Setup, TX, assert_port_works, receive_up_to};
use crate::frontend::net::{Form, Layout};
use crate::frontend::vmm::{Manner, feature};
use crate::frontend::wire::{Wire, frame};

/// Offers the wire more frames than any queue on the way holds, without waiting for one to be taken.
fn flood(wire: &Wire, from: u64) {
    for sequence in from..from + 2000 {
        wire.try_send(&frame(sequence, 200));
        std::thread::yield_now();
    }
}

/// After GET_VRING_BASE nothing is written, whatever arrives; the ring goes on where it stopped.
pub fn get_vring_base_is_the_first_unused_index_and_memory_is_left_alone<B: BackEnd>(
    _: &B,
    running: &mut Running,
) {
    let mut guest = Guest::boot(running, Setup::default());
    guest
        .rx
        .fill(100, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    for sequence in 0..10 {
        guest.receive_and_check(&running.wire, sequence, 1000);
        guest.send_and_check(&running.wire, sequence, 1000, Layout::WithData, Form::Direct);
    }
    // Frames are under way when the stop arrives.
    for sequence in 10..20 {
        running.wire.try_send(&frame(sequence, 200));
    }
    let rx_base = guest.session.get_vring_base(RX).expect("rx stops");
    let tx_base = guest.session.get_vring_base(TX).expect("tx stops");
    let at_stop = guest.memory.snapshot();
    assert_eq!(rx_base, guest.rx.queue.used_idx(), "rx base and used index");
    assert_eq!(tx_base, guest.tx.queue.used_idx(), "tx base and used index");
    assert!((10..=20).contains(&rx_base));

    flood(&running.wire, 100);
    guest
        .session
        .connection()
        .request_u64(1)
        .expect("the session lives");
    let changed = at_stop.first_difference(&guest.memory.snapshot());
    assert_eq!(
        changed, None,
        "guest memory changed after the rings stopped (address)"
    );

    guest
        .session
        .restart_ring(RX, &guest.rx.queue.place(), rx_base)
        .expect("rx starts again");
    guest
        .session
        .restart_ring(TX, &guest.tx.queue.place(), tx_base)
        .expect("tx starts again");
    // Whatever of the flood was kept arrives first; each in the buffer whose turn it is.
    receive_up_to(&mut guest.rx, &running.wire, 5000);
    guest.send_and_check(&running.wire, 0, 1514, Layout::WithData, Form::Direct);
    guest.check();
}

/// Between disable and enable nothing is written; afterwards the same buffers are filled.
pub fn a_disabled_rx_ring_is_left_alone_and_keeps_its_buffers<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    guest
        .rx
        .fill(100, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    guest.receive_and_check(&running.wire, 0, 60);
    guest.session.enable(RX, false).expect("rx is disabled");
    let at_disable = guest.memory.snapshot();
    flood(&running.wire, 1);
    guest
        .session
        .connection()
        .request_u64(1)
        .expect("the session lives");
    let changed = at_disable.first_difference(&guest.memory.snapshot());
    assert_eq!(
        changed, None,
        "guest memory changed while rx was disabled (address)"
    );
    guest.session.enable(RX, true).expect("rx is enabled");
    receive_up_to(&mut guest.rx, &running.wire, 5000);
    guest.check();
}

/// Frames offered to a disabled tx ring are left where they are and go out when it is enabled.
pub fn a_disabled_tx_ring_keeps_its_frames<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    guest.send_and_check(&running.wire, 0, 60, Layout::WithData, Form::Direct);
    guest.session.enable(TX, false).expect("tx is disabled");
    for sequence in 1..9 {
        guest
            .tx
            .offer(&frame(sequence, 60), Layout::WithData, Form::Direct);
    }
    guest.tx.queue.publish();
    guest.tx.queue.events().kick.signal();
    guest
        .session
        .connection()
        .request_u64(1)
        .expect("the session lives");
    assert_eq!(running.wire.try_recv(), None, "a frame left a disabled ring");
    assert_eq!(guest.tx.queue.used_idx(), 1);
    guest.session.enable(TX, true).expect("tx is enabled");
    for sequence in 1..9 {
        assert!(
            running.wire.recv() == frame(sequence, 60),
            "frame {sequence} came changed or out of order"
        );
    }
    guest.tx.drain();
    guest.check();
}

/// virtio-user always sends base 0; the used index in memory is what counts (TRAP 13).
pub fn a_base_of_zero_is_healed_from_the_used_index<B: BackEnd>(_: &B, running: &mut Running) {
    for manner in [Manner::EnableLast, Manner::VirtioUser] {
        let features = feature::MRG_RXBUF | feature::INDIRECT_DESC;
        let mut guest = Guest::boot(running, Setup::default().manner(manner).features(features));
        guest.rx.fill(40, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        for sequence in 0..20 {
            guest.receive_and_check(&running.wire, sequence, 60);
            guest.send_and_check(&running.wire, sequence, 60, Layout::WithData, Form::Direct);
        }
        for (index, place) in [(RX, guest.rx.queue.place()), (TX, guest.tx.queue.place())] {
            guest.session.get_vring_base(index).expect("the ring stops");
            guest
                .session
                .restart_ring(index, &place, 0)
                .expect("the ring starts");
        }
        for sequence in 20..40 {
            guest.receive_and_check(&running.wire, sequence, 60);
            guest.send_and_check(&running.wire, sequence, 60, Layout::WithData, Form::Direct);
        }
        guest.check();
    }
}

/// A connection that breaks with buffers posted and frames queued resumes without losing or doubling one.
pub fn a_front_end_that_comes_back_goes_on_at_the_used_index<B: BackEnd>(_: &B, running: &mut Running) {
    for manner in [Manner::EnableLast, Manner::VirtioUser] {
        let features = feature::MRG_RXBUF | feature::INDIRECT_DESC;
        let setup = Setup::default().manner(manner).features(features);
        let mut guest = Guest::boot(running, setup);
        guest
            .rx
            .fill(100, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        for round in 0..5_u64 {
            for sequence in round * 10..round * 10 + 10 {
                guest.receive_and_check(&running.wire, sequence, 300);
                guest.send_and_check(&running.wire, sequence, 300, Layout::WithData, Form::Direct);
            }
            guest
                .session
                .connection()
                .hang_up()
                .expect("the connection can be closed");
            guest
                .tx
                .offer(&frame(1000 + round, 300), Layout::WithData, Form::Direct);
            guest.tx.queue.publish();
            guest.come_back(running, setup);
            assert!(
                running.wire.recv() == frame(1000 + round, 300),
                "the frame offered meanwhile goes out"
            );
            guest.tx.drain();
        }
        assert_eq!(guest.rx.posted(), 50);
        guest.check();
    }
}

/// While one front-end is served a second one is turned away, or waits unanswered; the first notices nothing.
pub fn a_second_front_end_does_not_disturb_the_first<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    guest.exchange(&running.wire);
    let second = running.connect();
    // It may be closed at any moment, so whether this goes out does not matter.
    let _ = second.send(1, 0, &[], &[]);
    guest.exchange(&running.wire);
    guest
        .session
        .connection()
        .request_u64(1)
        .expect("the first session lives");
    assert!(
        !second.has_an_answer(),
        "the second front-end was served beside the first"
    );
    drop(second);
    guest.exchange(&running.wire);
    drop(guest);
    assert_port_works(running);
}
