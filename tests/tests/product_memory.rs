//! Guest memory that comes, goes and changes its bounds under traffic, on the real binary: which lanes stop for it,
//! what stays where it is, and that nothing touches what has gone.
//!
//! ```text
//! test ──ADD_MEM_REG, REM_MEM_REG, SET_MEM_TABLE──▶ vhost-user-vfio ──DMA_MAP, DMA_UNMAP──▶ card-model
//!      ◀─────────────── frames ────────────────────────────────────────────────────────────▶
//! ```
//!
//! A lane's pauses are in `stats`. The card reports DMA to where nothing is mapped, so a range that is taken away too
//! early shows at the end of each test.

mod product;

use std::os::fd::AsFd;

use product::{Host, tell_card};
use serde_json::Value;
use tests::frontend::connection::request;
use tests::frontend::driver::SplitQueue;
use tests::frontend::memory::{Announcement, Backing, GuestMemory, Plan, Region, shared_file};
use tests::frontend::net::{Form, Layout, Rx, arena_bytes};
use tests::frontend::suite::{Guest, RX, RX_BUFFER_BYTES, Setup, TX, assert_refused, receive_up_to};
use tests::frontend::vmm::{feature, single_region_body};
use tests::frontend::wire::{Wire, frame};

const MIB: u64 = 1 << 20;

/// How often rx and tx of a port were stopped for memory so far.
fn pauses(host: &Host, port: usize) -> [u64; 2] {
    let stats = host.stats();
    [0, 1].map(|lane| {
        stats["ports"][port]["lanes"][lane]["pauses"]
            .as_u64()
            .expect("a count")
    })
}

/// What is mapped of guests' memory, as (owners, IOVA, length, offset in its file), in order of IOVA.
fn extents(host: &Host) -> Vec<(String, String, u64, u64)> {
    let stats = host.stats();
    let listed = stats["maps"][0]["extents"].as_array().expect("a list").clone();
    let of_guests = listed
        .into_iter()
        .filter(|extent| !extent["file"].as_str().expect("a name").contains("vuv-"));
    of_guests
        .map(|extent| {
            let owners: Vec<&str> = extent["owners"]
                .as_array()
                .expect("a list")
                .iter()
                .filter_map(Value::as_str)
                .collect();
            (
                owners.join("+"),
                extent["iova"].as_str().expect("an address").to_owned(),
                extent["len"].as_u64().expect("a number"),
                extent["file_offset"].as_u64().expect("a number"),
            )
        })
        .collect()
}

/// Where the regions of a port's guest are for its card, as (guest address, IOVA).
fn places(host: &Host, port: usize) -> Vec<(String, String)> {
    let stats = host.stats();
    let regions = stats["ports"][port]["memory"].as_array().expect("a list").clone();
    let text = |value: &Value| value.as_str().expect("an address").to_owned();
    regions
        .iter()
        .map(|region| (text(&region["guest"]), text(&region["iova"])))
        .collect()
}

/// A guest address beyond all regions that a guest boots with.
fn beyond(guest: &Guest) -> u64 {
    guest.regions.high + 64 * MIB
}

/// One more region of 4 MiB that shows all of a file of its own.
fn plug(guest: &Guest, gpa: u64) -> (Plan, Region) {
    let file = shared_file(4 * MIB).expect("a file");
    let plan = Plan::new(gpa, 4 * MIB).backing(Backing::File(file));
    let region = guest.memory.add(&plan).expect("more memory");
    guest.session.add_region(&region).expect("the region is taken");
    (plan, region)
}

/// Moves the receive queue's buffers to `gpa`, `count` of them posted.
fn move_rx_buffers(guest: &mut Guest, gpa: u64, count: usize) {
    let place = guest.rx.queue.place();
    guest.session.get_vring_base(RX).expect("rx stops");
    let queue = SplitQueue::new(&guest.memory, place);
    guest.rx = Rx::new(queue, &guest.memory, gpa, 64);
    guest.rx.attach(&guest.session, RX);
    guest.session.restart_ring(RX, &place, 0).expect("rx starts");
    guest
        .rx
        .fill(count, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
}

/// Replaces one of the guest's regions in its memory, not yet for the back end.
fn redraw(guest: &Guest, gpa: u64, parts: &[Plan]) {
    guest.memory.remove(gpa);
    for part in parts {
        guest.memory.add(part).expect("the same bytes in other regions");
    }
}

/// Announces a region again that was taken away with the receive queue's buffers in it, and starts that queue anew: a
/// guest whose buffers are nowhere for long has a broken ring.
fn give_back(guest: &mut Guest, plan: &Plan) {
    guest.memory.remove(plan.gpa);
    let region = guest.memory.add(plan).expect("the same bytes");
    guest.session.add_region(&region).expect("the region is taken");
    let base = guest.session.get_vring_base(RX).expect("rx stops");
    let place = guest.rx.queue.place();
    guest.session.restart_ring(RX, &place, base).expect("rx starts");
}

fn exchange(guest: &mut Guest, wire: &Wire, sequence: u64) {
    guest.send_and_check(wire, sequence, 1000, Layout::WithData, Form::Direct);
    guest.receive_and_check(wire, sequence, 700);
}

#[test]
fn r3_memory_that_comes_stops_no_lane() {
    let host = Host::with_one_port();
    let wire = &host.port().wire;
    let mut guest = Guest::boot(host.port(), Setup::default());
    guest
        .rx
        .fill(200, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    for round in 0..16 {
        exchange(&mut guest, wire, 2 * round);
        // On the wire while the map changes.
        wire.send(&frame(1000 + round, 300));
        plug(&guest, beyond(&guest) + round * 16 * MIB);
        assert_eq!(guest.rx.recv(), frame(1000 + round, 300));
    }
    assert_eq!(pauses(&host, 0), [0, 0]);
    assert_eq!(extents(&host).len(), 3 + 16);
    guest.check();
    drop(guest);
    host.finish();
}

/// (TRAPS 16): the reply comes when the range is out of the map, and only lanes with something in it stop for it.
#[test]
fn r3_memory_that_goes_stops_the_lanes_that_use_it_and_no_other() {
    let host = Host::with_one_port();
    let wire = &host.port().wire;
    let mut guest = Guest::boot(host.port(), Setup::default());
    let gpa = beyond(&guest);
    let (_, unused) = plug(&guest, gpa + 16 * MIB);
    let (plan, used) = plug(&guest, gpa);
    move_rx_buffers(&mut guest, gpa + MIB, 64);
    exchange(&mut guest, wire, 0);

    guest.session.remove_region(&unused).expect("it goes");
    assert_eq!(pauses(&host, 0), [0, 0], "nobody had anything in it");
    exchange(&mut guest, wire, 1);

    guest.session.remove_region(&used).expect("it goes");
    assert_eq!(
        pauses(&host, 0),
        [1, 0],
        "its buffers were with the card; tx had nothing there"
    );
    assert_eq!(
        extents(&host).len(),
        3,
        "it is out of the map when the reply is there"
    );
    let at_reply = guest.memory.snapshot();
    for sequence in 0..16 {
        wire.try_send(&frame(5000 + sequence, 900));
    }
    guest.send_and_check(wire, 2, 1000, Layout::WithData, Form::Direct);
    assert!(
        at_reply.bytes_at(gpa) == guest.memory.snapshot().bytes_at(gpa),
        "something wrote to memory that had gone"
    );
    give_back(&mut guest, &plan);
    receive_up_to(&mut guest.rx, wire, 6000);
    exchange(&mut guest, wire, 3);
    assert_eq!(pauses(&host, 0), [1, 0]);
    guest.check();
    drop(guest);
    host.finish();
}

#[test]
fn r3_memory_that_a_virtqueue_lies_in_stops_that_lane_alone() {
    let host = Host::with_one_port();
    let wire = &host.port().wire;
    let mut guest = Guest::boot(host.port(), Setup::default());
    guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    let gpa = beyond(&guest);
    let (_, region) = plug(&guest, gpa);
    // tx gets its ring there, and nothing is in flight.
    guest.session.get_vring_base(TX).expect("tx stops");
    let mut place = guest.tx.queue.place();
    (place.desc, place.avail, place.used) = (gpa, gpa + 0x4000, gpa + 0x8000);
    let queue = SplitQueue::new(&guest.memory, place);
    guest.tx.queue = queue;
    guest.tx.queue.attach(&guest.session, TX);
    guest.session.restart_ring(TX, &place, 0).expect("tx starts");
    exchange(&mut guest, wire, 0);

    guest.session.remove_region(&region).expect("it goes");
    let stats = host.stats();
    let runs = |lane: usize| stats["ports"][0]["lanes"][lane]["running"].as_bool();
    assert_eq!(
        (runs(0), runs(1)),
        (Some(true), Some(false)),
        "a ring without memory waits for it"
    );
    guest.receive_and_check(wire, 1, 700);
    guest.session.add_region(&region).expect("it comes back");
    exchange(&mut guest, wire, 2);
    assert_eq!(pauses(&host, 0)[0], 0);
    guest.check();
    drop(guest);
    host.finish();
}

/// virtio-user's single file grows: a table in place of another, and what was there stays where it was (TRAPS 18, 26).
#[test]
fn trap_26_a_file_that_grows_leaves_what_is_mapped_and_every_lane_alone() {
    let host = Host::with_one_port();
    let wire = &host.port().wire;
    let mut guest = Guest::boot(host.port(), Setup::default());
    let gpa = beyond(&guest);
    let file = shared_file(64 * MIB).expect("a file");
    let sized = |mib: u64| Plan::new(gpa, mib * MIB).backing(Backing::File(file.clone()));
    guest.memory.add(&sized(4)).expect("more memory");
    guest.session.set_mem_table().expect("the table is taken");
    move_rx_buffers(&mut guest, gpa + MIB, 64);
    exchange(&mut guest, wire, 0);
    let before = (places(&host, 0), extents(&host));
    for (round, mib) in [8, 16, 64].into_iter().enumerate() {
        redraw(&guest, gpa, &[sized(mib)]);
        guest.session.set_mem_table().expect("the table is taken");
        exchange(&mut guest, wire, 1 + round as u64);
        assert_eq!(places(&host, 0), before.0);
        assert_eq!(
            extents(&host).len(),
            before.1.len() + 1 + round,
            "what it grew by is added"
        );
    }
    assert!(before.1.iter().all(|extent| extents(&host).contains(extent)));
    assert_eq!(pauses(&host, 0), [0, 0]);
    guest.check();
    drop(guest);
    host.finish();
}

/// The same bytes in two regions, then in one again: no unmap, no drain (TRAPS 17, 18).
#[test]
fn trap_17_a_table_that_draws_other_borders_moves_nothing() {
    let host = Host::with_one_port();
    let wire = &host.port().wire;
    let mut guest = Guest::boot(host.port(), Setup::default());
    let gpa = beyond(&guest);
    let (whole, _) = plug(&guest, gpa);
    // On both sides of the border to come.
    move_rx_buffers(&mut guest, gpa + MIB - arena_bytes(32), 64);
    exchange(&mut guest, wire, 0);
    let before = extents(&host);
    let part = |from: u64, len: u64| {
        let backing = whole.backing.clone();
        Plan::new(gpa + from, len).file_offset(from).backing(backing)
    };
    for (round, parts) in [vec![part(0, MIB), part(MIB, 3 * MIB)], vec![part(0, 4 * MIB)]]
        .into_iter()
        .enumerate()
    {
        if round == 1 {
            guest.memory.remove(gpa + MIB);
        }
        redraw(&guest, gpa, &parts);
        guest.session.set_mem_table().expect("the table is taken");
        exchange(&mut guest, wire, 1 + round as u64);
        assert_eq!(extents(&host), before);
    }
    assert_eq!(pauses(&host, 0), [0, 0]);
    guest.check();
    drop(guest);
    host.finish();
}

/// The one case in which bytes that stay move: only a part of their mapping stays (DESIGN: a cell that stays in part).
#[test]
fn a_region_cut_inside_its_mapping_drains_the_lanes_in_it_and_no_other() {
    let host = Host::with_one_port();
    let wire = &host.port().wire;
    let mut guest = Guest::boot(host.port(), Setup::default());
    let gpa = beyond(&guest);
    let (whole, _) = plug(&guest, gpa);
    move_rx_buffers(&mut guest, gpa + MIB, 64);
    exchange(&mut guest, wire, 0);
    let len = 2 * MIB;
    redraw(&guest, gpa, &[Plan { len, ..whole }]);
    guest.session.set_mem_table().expect("the table is taken");
    assert_eq!(pauses(&host, 0), [1, 0]);
    let lens: Vec<u64> = extents(&host).iter().map(|extent| extent.2).collect();
    assert_eq!(lens.iter().filter(|extent| **extent == len).count(), 1);
    assert_eq!(
        lens.iter().sum::<u64>(),
        3 * 4 * MIB + len,
        "what was cut off is not mapped"
    );
    for sequence in 1..8 {
        exchange(&mut guest, wire, sequence);
    }
    guest.check();
    drop(guest);
    host.finish();
}

/// The card's queue does not stop: the device is reset, within bounds, and all of its lanes are built anew, before the
/// reply. The neighbour on the same map and worker loses nothing.
#[test]
fn a_queue_that_will_not_be_drained_costs_a_reset_and_no_frame_of_another_port() {
    let mut host = Host::with_two_ports();
    let mut guest = Guest::boot(host.port(), Setup::default());
    let gpa = beyond(&guest);
    let (plan, region) = plug(&guest, gpa);
    move_rx_buffers(&mut guest, gpa + MIB, 64);
    exchange(&mut guest, &host.port().wire, 0);
    host.beside_traffic(|port| {
        tell_card(port.folder(), "wedge rx 0");
        guest.session.remove_region(&region).expect("it goes");
    });
    assert_eq!(pauses(&host, 0), [1, 1], "a reset takes all lanes of its device");
    assert_eq!(host.stats()["ports"][0]["resets"], 1);
    let at_reply = guest.memory.snapshot();
    host.wait_stats("the link is up again", |stats| stats["ports"][0]["link"] == "up");
    for sequence in 0..16 {
        host.port().wire.try_send(&frame(5000 + sequence, 900));
    }
    guest.send_and_check(&host.port().wire, 1, 1000, Layout::WithData, Form::Direct);
    assert!(
        at_reply.bytes_at(gpa) == guest.memory.snapshot().bytes_at(gpa),
        "written after the reply"
    );
    give_back(&mut guest, &plan);
    receive_up_to(&mut guest.rx, &host.port().wire, 6000);
    guest.check();
    drop(guest);
    host.finish();
}

/// Two sockets of one VM: each byte is mapped once, and stays as long as one of them has it (rule R4, TRAPS 32).
#[test]
fn r4_the_memory_of_one_vm_on_two_ports_is_mapped_once() {
    let mut host = Host::with_two_ports();
    let plans = [Plan::new(0, 4 * MIB), Plan::new(1 << 32, 4 * MIB)];
    let memory = GuestMemory::new(&plans).expect("memory");
    let setup = Setup::default().features(feature::MRG_RXBUF);
    let sessions = [0, 1].map(|port| {
        let session = host.ports[port].negotiate(setup, &memory);
        session.announce_memory().expect("it is taken");
        session
    });
    let owners: Vec<String> = extents(&host).into_iter().map(|extent| extent.0).collect();
    assert_eq!(owners, ["a+b", "a+b"]);
    assert_eq!(places(&host, 0), places(&host, 1));
    let [first, second] = sessions;
    drop(first);
    host.wait_vacant();
    let owners: Vec<String> = extents(&host).into_iter().map(|extent| extent.0).collect();
    assert_eq!(owners, ["b", "b"]);
    drop(second);
    host.wait_stats("the map is empty of guests", |stats| {
        stats["ports"][1]["connected"] == false
    });
    assert_eq!(extents(&host), []);
    host.finish();
}

/// Containers announce the addresses of their own processes, which may be the same (TRAPS 31).
#[test]
fn trap_31_two_guests_with_equal_addresses_live_on_one_map() {
    let host = Host::with_two_ports();
    let mut guests = [0, 1].map(|port| Guest::boot(&host.ports[port], Setup::default()));
    let [a, b] = [0, 1].map(|port| places(&host, port));
    for (one, other) in a.iter().zip(&b) {
        assert_eq!(one.0, other.0, "equal for the guests");
        assert_ne!(one.1, other.1, "apart for the cards");
    }
    for (guest, port) in guests.iter_mut().zip(&host.ports) {
        guest.exchange(&port.wire);
    }
    drop(guests);
    host.finish();
}

#[test]
fn the_last_slot_is_taken_and_one_more_is_refused_with_the_number() {
    const SLOTS: u64 = 512;
    let mut host = Host::with_two_ports();
    let file = shared_file((SLOTS + 1) * 4096).expect("a file");
    let memory = GuestMemory::default();
    let session = host.port().negotiate(Setup::default(), &memory);
    let add = |slot: u64| {
        let region = Announcement {
            // Apart for the guest, next to each other in the file.
            gpa: slot * 2 * MIB,
            len: 4096,
            user: slot * 2 * MIB + (1 << 40),
            file_offset: slot * 4096,
        };
        session.connection().command(
            request::ADD_MEM_REG,
            &single_region_body(&region),
            &[file.as_fd()],
        )
    };
    for slot in 0..SLOTS {
        add(slot).expect("there is room");
    }
    host.beside_traffic(|_| assert_refused(add(SLOTS), "a slot too many"));
    host.product.wait_printed("all 512 memory slots are taken");
    assert_eq!(
        extents(&host).iter().filter(|extent| extent.0 == "a").count(),
        512
    );
    drop(session);
    host.wait_vacant();
    host.finish();
}
