//! Frames arrive whole, in every size, layout and place.

use super::{BackEnd, Guest, RX, RX_BUFFER_BYTES, Running, Setup, TX};
use crate::frontend::driver::SplitQueue;
use crate::frontend::net::{Form, HEADER_BYTES, Layout, Rx, Tx, arena_bytes};
use crate::frontend::vmm::feature;
use crate::frontend::wire::{MAX_FRAME_BYTES, MIN_FRAME_BYTES, frame};

const FORMS: [Form; 2] = [Form::Direct, Form::Indirect];
/// Sizes at which something may go wrong: ends, a page's fraction, odd ones.
const TELLING_SIZES: [usize; 8] = [60, 61, 64, 127, 128, 1000, 1513, 1514];

/// Every size from 60 to 1514, and every pair of layout and table form at the telling sizes.
pub fn tx_frames_of_every_size_and_layout_arrive<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    let rotating =
        (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).map(|len| (len, Layout::ALL[len % 5], FORMS[len / 5 % 2]));
    let every_pair = TELLING_SIZES.iter().flat_map(|&len| {
        Layout::ALL
            .into_iter()
            .flat_map(move |layout| FORMS.map(|form| (len, layout, form)))
    });
    let cases: Vec<(usize, Layout, Form)> = rotating.chain(every_pair).collect();
    for burst in cases.chunks(16) {
        let frames: Vec<Vec<u8>> = (0..)
            .zip(burst)
            .map(|(sequence, &(len, ..))| frame(sequence, len))
            .collect();
        for (bytes, &(_, layout, form)) in frames.iter().zip(burst) {
            guest.tx.offer(bytes, layout, form);
        }
        guest.tx.queue.submit();
        for (sent, case) in frames.iter().zip(burst) {
            assert!(
                running.wire.recv() == *sent,
                "a frame in {case:?} changed on its way"
            );
        }
        guest.tx.drain();
    }
    guest.check();
}

/// Every size, into buffers of every layout, direct and indirect.
pub fn rx_frames_of_every_size_arrive_in_buffers_of_every_layout<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    let mut len = MIN_FRAME_BYTES;
    while len <= MAX_FRAME_BYTES {
        let burst: Vec<usize> = (len..=MAX_FRAME_BYTES).take(16).collect();
        for &len in &burst {
            guest
                .rx
                .post(RX_BUFFER_BYTES, Layout::ALL[len % 5], FORMS[len / 5 % 2]);
        }
        guest.rx.queue.submit();
        for (sequence, &len) in (0..).zip(&burst) {
            guest.receive_and_check(&running.wire, sequence, len);
        }
        len += burst.len();
    }
    guest.check();
}

/// Without MRG_RXBUF every frame has a buffer of its own and `num_buffers` is 1.
pub fn rx_without_mergeable_buffers_uses_one_buffer_a_frame<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default().features(feature::INDIRECT_DESC));
    guest
        .rx
        .fill(128, RX_BUFFER_BYTES, Layout::OwnDescriptor, Form::Indirect);
    for sequence in 0..128 {
        let len = TELLING_SIZES[usize::try_from(sequence).expect("small") % TELLING_SIZES.len()];
        guest.receive_and_check(&running.wire, sequence, len);
        assert_eq!(guest.rx.posted(), 127 - usize::try_from(sequence).expect("small"));
    }
    guest.check();
}

/// Buffers of 600 bytes take a frame of 1514 three at a time.
pub fn a_frame_larger_than_a_buffer_is_merged<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    guest.rx.fill(30, 600, Layout::WithData, Form::Direct);
    for sequence in 0..10 {
        guest.receive_and_check(&running.wire, sequence, MAX_FRAME_BYTES);
    }
    assert_eq!(guest.rx.posted(), 0);
    guest.check();
}

/// A buffer that is too small comes back empty, in its turn, and the frames around it arrive.
pub fn a_frame_that_fits_no_buffer_is_dropped_in_turn<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default().features(feature::EVENT_IDX));
    guest
        .rx
        .fill(3, HEADER_BYTES + 600, Layout::WithData, Form::Direct);
    guest.receive_and_check(&running.wire, 0, 600);
    running.wire.send(&frame(1, 601));
    guest.receive_and_check(&running.wire, 2, 60);
    assert_eq!((guest.rx.dropped, guest.rx.posted()), (1, 0));
    guest.check();
}

/// A buffer contiguous for the guest lies in two files: half of it ends one region, half begins the next.
pub fn buffers_may_cross_touching_regions<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    // Four slots, the border 700 bytes into the third: inside the frame of every layout.
    let before_border = arena_bytes(2) + 700;
    for layout in Layout::ALL {
        let queue = |place| SplitQueue::new(&guest.memory, place);
        for index in [RX, TX] {
            guest.session.get_vring_base(index).expect("the ring stops");
        }
        let (rx_place, tx_place) = (guest.rx.queue.place(), guest.tx.queue.place());
        let (rx_queue, tx_queue) = (queue(rx_place), queue(tx_place));
        let arena = guest.regions.next - before_border;
        guest.tx = Tx::new(tx_queue, &guest.memory, arena, 4);
        guest.tx.queue.attach(&guest.session, TX);
        guest.session.restart_ring(TX, &tx_place, 0).expect("tx starts");
        for sequence in 0..4 {
            guest.send_and_check(&running.wire, sequence, MAX_FRAME_BYTES, layout, Form::Direct);
        }
        guest.tx.check();
        guest.session.get_vring_base(TX).expect("tx stops");

        guest.rx = Rx::new(rx_queue, &guest.memory, arena, 4);
        guest.rx.attach(&guest.session, RX);
        guest.session.restart_ring(RX, &rx_place, 0).expect("rx starts");
        guest.rx.fill(4, RX_BUFFER_BYTES, layout, Form::Direct);
        for sequence in 0..4 {
            guest.receive_and_check(&running.wire, sequence, MAX_FRAME_BYTES);
        }
        guest.rx.check();
        guest
            .session
            .restart_ring(TX, &tx_place, guest.tx.queue.used_idx())
            .expect("tx starts again");
    }
}

/// Rings from 8 to 1024 entries go round more than once.
pub fn rings_of_many_sizes_wrap<B: BackEnd>(_: &B, running: &mut Running) {
    for size in [8, 64, 512, 1024] {
        let mut guest = Guest::boot(running, Setup::default().ring_size(size));
        let rounds = u64::from(size) * 2 + 3;
        for sequence in 0..rounds {
            guest.send_and_check(&running.wire, sequence, 64, Layout::OwnDescriptor, Form::Direct);
            guest
                .rx
                .fill(1, RX_BUFFER_BYTES, Layout::OwnDescriptor, Form::Direct);
            guest.receive_and_check(&running.wire, sequence, 64);
        }
        guest.check();
    }
}

/// Ring indexes run freely and wrap where 16 bits end.
pub fn indexes_wrap_at_65536<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default().first_index(65_530));
    for round in 0..4 {
        guest.rx.fill(5, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        for sequence in round * 5..round * 5 + 5 {
            guest
                .tx
                .offer(&frame(sequence, 60), Layout::WithData, Form::Direct);
        }
        for sequence in round * 5..round * 5 + 5 {
            guest.receive_and_check(&running.wire, sequence, 60);
        }
        guest.tx.queue.submit();
        for sequence in round * 5..round * 5 + 5 {
            assert!(running.wire.recv() == frame(sequence, 60));
        }
        guest.tx.drain();
    }
    assert_eq!(guest.rx.queue.used_idx(), 14);
    guest.check();
}
