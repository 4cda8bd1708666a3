//! Guest memory grows, shrinks and lies.

use super::{
    BackEnd, Guest, RX, RX_BUFFER_BYTES, Running, Setup, TX, assert_port_works, assert_refused, receive_up_to,
};
use crate::frontend::driver::SplitQueue;
use crate::frontend::memory::{Backing, Flaw, GuestMemory, Plan, shared_file};
use crate::frontend::net::{Form, Layout, Rx, Tx, arena_bytes};
use crate::frontend::vmm::{Manner, RingPlace, feature};
use crate::frontend::wire::frame;

const MIB: u64 = 1 << 20;

/// virtio-user's way to grow: disable, full table, enable, with buffers posted all the while.
pub fn a_new_table_on_a_live_session_keeps_traffic<B: BackEnd>(_: &B, running: &mut Running) {
    let features = feature::MRG_RXBUF | feature::INDIRECT_DESC;
    let mut guest = Guest::boot(
        running,
        Setup::default().manner(Manner::VirtioUser).features(features),
    );
    guest
        .rx
        .fill(200, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    let mut sequence = 0;
    for grown in 0..4 {
        let gpa = guest.regions.high + (grown + 1) * 16 * MIB;
        guest
            .memory
            .add(&Plan::new(gpa, 2 * MIB).user(gpa))
            .expect("more memory");
        for index in [RX, TX] {
            guest.session.enable(index, false).expect("the ring is disabled");
        }
        // Frames keep coming while the table is replaced.
        for number in sequence..sequence + 8 {
            running.wire.try_send(&frame(number, 500));
        }
        guest.session.set_mem_table().expect("the table is taken");
        for index in [RX, TX] {
            guest.session.enable(index, true).expect("the ring is enabled");
        }
        receive_up_to(&mut guest.rx, &running.wire, sequence + 8);
        sequence += 9;
        guest.send_and_check(&running.wire, sequence, 1000, Layout::SplitAcross, Form::Direct);
    }
    guest.check();
}

/// A region is plugged in, carries rings and buffers, and is pulled out, while others carry frames.
pub fn regions_come_and_go_under_traffic<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    guest
        .rx
        .fill(200, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    let old_tx_place = guest.tx.queue.place();
    for round in 0..4_u64 {
        guest.receive_and_check(&running.wire, round * 100, 700);
        let gpa = guest.regions.high + (round + 1) * 16 * MIB;
        let region = guest
            .memory
            .add(&Plan::new(gpa, 2 * MIB).file_offset(round * MIB))
            .expect("more memory");
        guest.session.add_region(&region).expect("the region is taken");
        guest.receive_and_check(&running.wire, round * 100 + 1, 700);

        // tx moves into the new region, ring and buffers.
        guest.session.get_vring_base(TX).expect("tx stops");
        let place = RingPlace {
            desc: gpa,
            avail: gpa + 0x4000,
            used: gpa + 0x8000,
            ..old_tx_place
        };
        let queue = SplitQueue::new(&guest.memory, place);
        let mut moved = Tx::new(queue, &guest.memory, gpa + MIB, 32);
        moved.queue.attach(&guest.session, TX);
        let at_home = std::mem::replace(&mut guest.tx, moved);
        guest
            .session
            .restart_ring(TX, &place, 0)
            .expect("tx starts in the new region");
        for sequence in 0..20 {
            guest.send_and_check(
                &running.wire,
                sequence,
                1514,
                Layout::OwnDescriptor,
                Form::Indirect,
            );
        }
        guest.check();

        // And home again, so that nothing is left in the region when it goes.
        guest.session.get_vring_base(TX).expect("tx stops");
        guest.tx = at_home;
        let base = guest.tx.queue.used_idx();
        guest
            .session
            .restart_ring(TX, &old_tx_place, base)
            .expect("tx starts at home");
        let gone = guest.memory.remove(gpa);
        guest
            .session
            .remove_region(&gone)
            .expect("the region is given back");
        guest.receive_and_check(&running.wire, round * 100 + 2, 700);
        guest.send_and_check(&running.wire, round, 60, Layout::WithData, Form::Direct);
    }
    guest.check();
    // rx moves to buffers in another region that has been there all along.
    guest.session.get_vring_base(RX).expect("rx stops");
    let queue = SplitQueue::new(&guest.memory, guest.rx.queue.place());
    guest.rx = Rx::new(queue, &guest.memory, guest.regions.next + arena_bytes(64), 64);
    guest.rx.attach(&guest.session, RX);
    guest
        .session
        .restart_ring(RX, &guest.rx.queue.place(), 0)
        .expect("rx starts");
    guest
        .rx
        .fill(10, RX_BUFFER_BYTES, Layout::OwnDescriptor, Form::Direct);
    for sequence in 0..10 {
        guest.receive_and_check(&running.wire, sequence, 1514);
    }
    guest.check();
}

/// QEMU re-expresses a region that splits: it removes the old bounds, then adds the new ones on the same file. The
/// buffers posted inside stay posted (TRAP 17).
pub fn a_region_that_is_split_keeps_its_buffers<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default());
    let file = Backing::File(shared_file(4 * MIB).expect("a file"));
    let gpa = guest.regions.high + 16 * MIB;
    let whole = Plan::new(gpa, 4 * MIB).backing(file);
    let region = guest.memory.add(&whole).expect("more memory");
    guest.session.add_region(&region).expect("the region is taken");

    let place = guest.rx.queue.place();
    guest.session.get_vring_base(RX).expect("rx stops");
    // Buffers on both sides of the coming border.
    let queue = SplitQueue::new(&guest.memory, place);
    guest.rx = Rx::new(queue, &guest.memory, gpa + MIB - arena_bytes(32), 64);
    guest.rx.attach(&guest.session, RX);
    guest.session.restart_ring(RX, &place, 0).expect("rx starts");
    guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    for sequence in 0..16 {
        guest.receive_and_check(&running.wire, sequence, 1000);
    }

    let old = guest.memory.remove(gpa);
    guest.session.remove_region(&old).expect("the old bounds go");
    let parts = [
        Plan {
            len: MIB,
            ..whole.clone()
        },
        Plan::new(gpa + MIB, 3 * MIB).file_offset(MIB),
    ];
    for part in parts.map(|part| part.backing(whole.backing.clone())) {
        let region = guest.memory.add(&part).expect("a part");
        guest.session.add_region(&region).expect("the new bounds come");
    }
    for sequence in 16..64 {
        guest.receive_and_check(&running.wire, sequence, 1000);
    }
    assert_eq!(guest.rx.posted(), 0);
    guest.check();
}

/// A file too short, one that cannot be written, a descriptor that is no file: refused, and the port goes on.
pub fn memory_that_is_not_as_announced_is_refused<B: BackEnd>(_: &B, running: &mut Running) {
    for manner in [Manner::EnableLast, Manner::VirtioUser] {
        for flaw in [Flaw::ShorterThanAnnounced, Flaw::ReadOnly, Flaw::NotMemory] {
            let memory = GuestMemory::new(&[Plan::new(0, 2 * MIB)]).expect("memory");
            memory
                .add(&Plan::new(1 << 32, 2 * MIB).flaw(flaw))
                .expect("wrong memory");
            let session = running.negotiate(Setup::default().manner(manner), &memory);
            assert_refused(session.announce_memory(), &format!("{flaw:?} as {manner:?}"));
            drop(session);
            running.assert_alive();
        }
        assert_port_works(running);
    }
}
