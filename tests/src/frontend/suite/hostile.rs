//! A guest that breaks the ring format breaks that ring, and nothing else.

use super::{BackEnd, Guest, RX_BUFFER_BYTES, Running, Setup, assert_port_works};
use crate::frontend::PATIENCE;
use crate::frontend::driver::{Access, Segment, SplitQueue, Table, desc_flag};
use crate::frontend::net::{Form, Layout};

/// Writes something into a ring that no driver may.
type Break = fn(&mut SplitQueue, Scene);

/// Ways to break a ring whose descriptor 0 and following are free to use. `flags` is WRITE for rx.
const BREAKS: [(&str, Break); 12] = [
    ("a loop", |queue, s| {
        queue.write_desc(0, s.buffer, 64, s.flags | desc_flag::NEXT, 1);
        queue.write_desc(1, s.buffer + 64, 64, s.flags | desc_flag::NEXT, 0);
        queue.push_head(0);
    }),
    ("a chain that points at itself", |queue, s| {
        queue.write_desc(0, s.buffer, 64, s.flags | desc_flag::NEXT, 0);
        queue.push_head(0);
    }),
    ("a buffer out of memory", |queue, s| {
        queue.write_desc(0, s.hole, RX_BUFFER_LEN, s.flags, 0);
        queue.push_head(0);
    }),
    ("a buffer that runs out of memory", |queue, s| {
        queue.write_desc(0, s.hole - 100, RX_BUFFER_LEN, s.flags, 0);
        queue.push_head(0);
    }),
    ("a buffer that runs over the end of all addresses", |queue, s| {
        queue.write_desc(0, u64::MAX - 100, RX_BUFFER_LEN, s.flags, 0);
        queue.push_head(0);
    }),
    ("a buffer of 4 GiB", |queue, s| {
        queue.write_desc(0, s.buffer, u32::MAX, s.flags, 0);
        queue.push_head(0);
    }),
    ("an indirect table in an indirect table", |queue, s| {
        queue.write_desc_at(s.table, 0, s.table + 64, 16, desc_flag::INDIRECT, 0);
        queue.write_desc_at(s.table + 64, 0, s.buffer, RX_BUFFER_LEN, s.flags, 0);
        queue.write_desc(0, s.table, 16, desc_flag::INDIRECT, 0);
        queue.push_head(0);
    }),
    (
        "an indirect table of no whole number of descriptors",
        |queue, s| {
            queue.write_desc_at(s.table, 0, s.buffer, RX_BUFFER_LEN, s.flags, 0);
            queue.write_desc(0, s.table, 24, desc_flag::INDIRECT, 0);
            queue.push_head(0);
        },
    ),
    ("an indirect table out of memory", |queue, s| {
        queue.write_desc(0, s.hole, 32, desc_flag::INDIRECT, 0);
        queue.push_head(0);
    }),
    ("a next descriptor that does not exist", |queue, s| {
        queue.write_desc(0, s.buffer, 64, s.flags | desc_flag::NEXT, queue.place().size);
        queue.push_head(0);
    }),
    ("a head that does not exist", |queue, _| {
        queue.push_head(queue.place().size);
    }),
    (
        "an available index further on than the ring is long",
        |queue, s| {
            queue.write_desc(0, s.buffer, RX_BUFFER_LEN, s.flags, 0);
            queue.jump(queue.place().size + 1);
        },
    ),
];

const RX_BUFFER_LEN: u32 = 1530;

/// Addresses a break may use.
#[derive(Clone, Copy, Debug)]
struct Scene {
    /// Good memory for buffers.
    buffer: u64,
    /// Good memory for an indirect table.
    table: u64,
    /// The end of a region with nothing after it.
    hole: u64,
    /// What a buffer of the right direction has.
    flags: u16,
}

impl Scene {
    fn of(guest: &Guest, flags: u16) -> Self {
        let free = guest.regions.low + (1 << 20);
        Self {
            buffer: free,
            table: free + (1 << 16),
            hole: guest.regions.high + (4 << 20),
            flags,
        }
    }
}

/// Publishes what a break wrote and kicks, whatever the device asked for.
fn spring(queue: &mut SplitQueue) {
    queue.publish();
    queue.events().kick.signal();
}

/// Whatever happens to tx, frames still reach the guest, and the next connection has both rings.
pub fn a_broken_tx_ring_leaves_rx_running<B: BackEnd>(_: &B, running: &mut Running) {
    for (what, break_it) in BREAKS {
        println!("tx: {what}");
        let mut guest = Guest::boot(running, Setup::default());
        guest.rx.fill(20, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        let used_before = guest.tx.queue.used_idx();
        let scene = Scene::of(&guest, 0);
        break_it(&mut guest.tx.queue, scene);
        spring(&mut guest.tx.queue);
        for sequence in 0..20 {
            guest.receive_and_check(&running.wire, sequence, 500);
        }
        assert_eq!(running.wire.try_recv(), None, "{what} sent a frame");
        assert_eq!(
            guest.tx.queue.used_idx(),
            used_before,
            "{what} was given back as if sent"
        );
        guest.rx.check();
        running.assert_alive();
    }
    assert_port_works(running);
}

/// Whatever happens to rx, frames still leave the guest, and the next connection has both rings.
pub fn a_broken_rx_ring_leaves_tx_running<B: BackEnd>(_: &B, running: &mut Running) {
    for (what, break_it) in BREAKS {
        println!("rx: {what}");
        let mut guest = Guest::boot(running, Setup::default());
        let scene = Scene::of(&guest, desc_flag::WRITE);
        break_it(&mut guest.rx.queue, scene);
        spring(&mut guest.rx.queue);
        // A copying back end looks at the buffer only when a frame wants it.
        running.wire.send(&super::frame(0, 1000));
        for sequence in 0..20 {
            guest.send_and_check(&running.wire, sequence, 500, Layout::WithData, Form::Direct);
        }
        guest.tx.check();
        running.assert_alive();
    }
    assert_port_works(running);
}

/// The VMM learns which ring broke.
pub fn a_broken_ring_is_reported_by_the_error_eventfd<B: BackEnd>(_: &B, running: &mut Running) {
    for (what, break_it) in BREAKS {
        let mut guest = Guest::boot(running, Setup::default());
        let scene = Scene::of(&guest, 0);
        break_it(&mut guest.tx.queue, scene);
        spring(&mut guest.tx.queue);
        assert!(
            guest.tx.queue.events().err.wait(PATIENCE),
            "{what} on tx was not reported"
        );
        assert_eq!(
            guest.rx.queue.events().err.take(),
            0,
            "{what} on tx was reported for rx"
        );

        let scene = Scene::of(&guest, desc_flag::WRITE);
        break_it(&mut guest.rx.queue, scene);
        spring(&mut guest.rx.queue);
        running.wire.send(&super::frame(0, 1000));
        assert!(
            guest.rx.queue.events().err.wait(PATIENCE),
            "{what} on rx was not reported"
        );
    }
    assert_port_works(running);
}

/// "The driver must not create a chain longer than the queue size" (virtio 1.2 §2.7.5.3.1), and the device counts.
pub fn a_chain_longer_than_the_ring_breaks_it<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default().ring_size(64));
    let scene = Scene::of(&guest, 0);
    let segment = |at: u64| Segment {
        gpa: scene.buffer + at * 8,
        len: 8,
        access: Access::Read,
    };
    let segments: Vec<Segment> = (0..65).map(segment).collect();
    guest.tx.queue.offer(&segments, Table::Indirect(scene.table));
    spring(&mut guest.tx.queue);
    assert!(
        guest.tx.queue.events().err.wait(PATIENCE),
        "a chain of 65 descriptors in a ring of 64"
    );
    assert_eq!(running.wire.try_recv(), None);
    drop(guest);
    assert_port_works(running);
}

/// Chains of zero bytes, of less than a header, of a header alone, and of the wrong direction: whether the device
/// gives them back or breaks the ring, it sends nothing and goes on.
pub fn a_chain_without_a_frame_does_not_stall_the_process<B: BackEnd>(_: &B, running: &mut Running) {
    for (len, flags) in [(0, 0), (1, 0), (11, 0), (12, 0), (100, desc_flag::WRITE)] {
        let mut guest = Guest::boot(running, Setup::default());
        guest.rx.fill(5, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        let scene = Scene::of(&guest, flags);
        guest.tx.queue.write_desc(0, scene.buffer, len, flags, 0);
        guest.tx.queue.push_head(0);
        spring(&mut guest.tx.queue);
        for sequence in 0..5 {
            guest.receive_and_check(&running.wire, sequence, 500);
        }
        assert_eq!(
            running.wire.try_recv(),
            None,
            "a chain of {len} bytes became a frame"
        );
        running.assert_alive();
    }
    assert_port_works(running);
}
