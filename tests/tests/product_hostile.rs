//! A hostile VMM against the real binary: what it does costs its own port only, and only until it is gone.
//!
//! ```text
//! port a: announces what is not there, sets traps, stops reading, dies ──▶ turned away, or ended
//! port b: same process, same worker, same map ──▶ every frame arrives
//! ```
//!
//! What a hostile guest writes into its rings is the subject of the front-end suite; here are the things that only a
//! VMM can do, and that the neighbour on another port is left in peace.

mod product;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use product::{Host, end};
use rustix::fs::{MemfdFlags, fstatfs, ftruncate, memfd_create};
use serde_json::Value;
use tests::frontend::PATIENCE;
use tests::frontend::connection::{Connection, ConnectionError, message, request};
use tests::frontend::driver::desc_flag;
use tests::frontend::event::Event;
use tests::frontend::memory::{Announcement, Backing, GuestMemory, Plan};
use tests::frontend::net::{Form, Layout};
use tests::frontend::suite::{Guest, RX, RX_BUFFER_BYTES, Running, Setup, TX, assert_refused};
use tests::frontend::vmm::{Session, region_body, single_region_body};
use tests::frontend::wire::frame;

/// A front-end that has negotiated and announced nothing.
fn negotiate(port: &Running) -> Session {
    port.negotiate(Setup::default(), &GuestMemory::default())
}

/// Checks that `connection` is still served.
fn assert_served(connection: &Connection, after: &str) {
    let answer = connection.request_u64(request::GET_FEATURES);
    assert!(answer.is_ok(), "after {after}: {answer:?}");
}

/// (vhost-user, "Memory region description"): nothing is reserved, mapped or looped over by the announced size
/// before it is compared with the file.
#[test]
fn a_region_far_larger_than_its_file_is_refused() {
    let mut host = Host::with_two_ports();
    let file = memfd_create("small", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&file, 4096).expect("its length");
    host.beside_traffic(|port| {
        for len in [1 << 62, !0xfff, u64::MAX] {
            for user in [0, 1 << 40] {
                let region = Announcement {
                    gpa: 0,
                    len,
                    user,
                    file_offset: 0,
                };
                let what = format!("a region of {len:#x} bytes at {user:#x}");
                let session = negotiate(port);
                let answer = session.connection().command(
                    request::ADD_MEM_REG,
                    &single_region_body(&region),
                    &[file.as_fd()],
                );
                assert_refused(answer, &what);
                drop(session);

                let session = negotiate(port);
                let table = [&1_u64.to_ne_bytes()[..], &region_body(&region)].concat();
                let answer = session
                    .connection()
                    .command(request::SET_MEM_TABLE, &table, &[file.as_fd()]);
                assert_refused(answer, &what);
            }
        }
    });
    host.assert_port_works();
    host.finish();
}

/// Anything that is no eventfd may block who writes to it, or is a file somebody else reads.
#[test]
fn a_ring_event_that_is_no_eventfd_is_refused_with_an_answer() {
    let host = Host::with_one_port();
    let (_reader, pipe) = rustix::pipe::pipe().expect("a pipe");
    let file = tempfile::tempfile().expect("a file");
    let (socket, _other) = UnixStream::pair().expect("a pair of sockets");
    let found: [(&str, BorrowedFd<'_>); 3] = [
        ("a pipe", pipe.as_fd()),
        ("a regular file", file.as_fd()),
        ("a socket", socket.as_fd()),
    ];
    for (what, fd) in found {
        let mut guest = Guest::boot(host.port(), Setup::default());
        for number in [
            request::SET_VRING_CALL,
            request::SET_VRING_ERR,
            request::SET_VRING_KICK,
        ] {
            for ring in [RX, TX] {
                assert_event_refused(&guest, number, ring, fd, what);
            }
        }
        // A VMM that mends its mistake is served.
        for (ring, place) in [(RX, guest.rx.queue.place()), (TX, guest.tx.queue.place())] {
            let base = guest.session.get_vring_base(ring).expect("the ring stops");
            guest
                .session
                .restart_ring(ring, &place, base)
                .expect("the ring starts");
        }
        guest.exchange(&host.port().wire);
        drop(guest);
        host.assert_port_works();
    }
    assert_eq!(
        file.metadata().expect("a file").len(),
        0,
        "the file was written to"
    );
    host.finish();
}

/// What is refused has changed nothing: the ring goes on with the descriptor it had.
#[test]
fn a_ring_whose_new_event_is_refused_keeps_the_old_one() {
    let host = Host::with_one_port();
    let file = tempfile::tempfile().expect("a file");
    for number in [
        request::SET_VRING_CALL,
        request::SET_VRING_ERR,
        request::SET_VRING_KICK,
    ] {
        let mut guest = Guest::boot(host.port(), Setup::default());
        guest.exchange(&host.port().wire);
        for ring in [RX, TX] {
            assert_event_refused(&guest, number, ring, file.as_fd(), "a regular file");
        }
        guest.exchange(&host.port().wire);
    }
    host.assert_port_works();
    host.finish();
}

/// Checks that message `number` with `fd` is answered, with a refusal, and that the session goes on.
fn assert_event_refused(guest: &Guest, number: u32, ring: u32, fd: BorrowedFd<'_>, what: &str) {
    let connection = guest.session.connection();
    let answer = connection.command(number, &u64::from(ring).to_ne_bytes(), &[fd]);
    assert!(
        matches!(answer, Err(ConnectionError::Refused { .. })),
        "request {number} for ring {ring} with {what}: {answer:?}"
    );
    assert_served(connection, what);
}

/// The flags of a descriptor are shared with who sent it, so O_NONBLOCK does not stay set just because it was.
#[test]
fn a_call_eventfd_made_blocking_afterwards_holds_the_worker_only_for_a_while() {
    let mut host = Host::with_two_ports();
    let held = host.beside_traffic(|port| {
        let mut guest = Guest::boot(port, Setup::default().features(0));
        guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        let trap = Event::new();
        for ring in [RX, TX] {
            guest
                .session
                .set_call(ring, &trap)
                .expect("the call eventfd is taken");
        }
        trap.fill_and_block();
        for sequence in 0..3 {
            port.wire.send(&frame(sequence, 60));
            assert!(
                guest.rx.queue.poll_used(PATIENCE),
                "frame {sequence} never reached the guest"
            );
            assert_eq!(guest.rx.try_recv(), Some(frame(sequence, 60)));
        }
        // Kept full: it is to hold the worker while the neighbour's frames are waited for, and at the end.
        (guest, trap)
    });
    println!("the worker was freed {} times", nudges_of(&host, "worker0"));
    drop(held);
    host.assert_port_works();

    // Once more, and now SIGTERM finds the worker held.
    let port = host.port();
    let mut guest = Guest::boot(port, Setup::default().features(0));
    guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    let trap = Event::new();
    guest
        .session
        .set_call(RX, &trap)
        .expect("the call eventfd is taken");
    trap.fill_and_block();
    port.wire.send(&frame(0, 60));
    assert!(guest.rx.queue.poll_used(PATIENCE), "the frame never came");
    // By now the port has a worker of its own, so this time nobody else waits.
    let shared_before = nudges_of(&host, "worker0");
    host.product.wait_printed("worker=\"worker a\"");
    assert_eq!(nudges_of(&host, "worker0"), shared_before);
    host.finish();
}

/// How often a worker was seen to stand still.
fn nudges_of(host: &Host, worker: &str) -> usize {
    let named = format!("worker=\"{worker}\"");
    let output = host.product.output();
    output
        .lines()
        .filter(|line| line.contains("is nudged") && line.contains(&named))
        .count()
}

/// Its answers pile up until one of them cannot be sent, which holds the thread that sends it.
#[test]
fn a_front_end_that_never_reads_holds_neither_its_neighbour_nor_the_end() {
    let mut host = Host::with_two_ports();
    let flood = |port: &Running| {
        let session = negotiate(port);
        let count = session.connection().flood(request::GET_FEATURES, &[]);
        let count = count.expect("they go out");
        assert!(count >= 200, "only {count} requests fill a socket");
        println!("{count} unread answers");
        session
    };
    drop(host.beside_traffic(flood));
    host.assert_port_works();

    let _unread = flood(host.port());
    end(&mut host.product);
}

/// Memory that is cut short under the rings, as a VMM may do by malice or by a bug in its ballooning.
#[test]
fn memory_cut_short_under_running_rings_costs_its_own_session_only() {
    let mut host = Host::with_two_ports();
    // `low` holds the tx ring and the rx descriptors, `next` the rx available ring and the tx buffers.
    for cut in [vec![0], vec![1], vec![0, 1]] {
        host.beside_traffic(|port| {
            let mut guest = Guest::boot(port, Setup::default());
            guest
                .rx
                .fill(100, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
            for sequence in 0..20 {
                guest.receive_and_check(&port.wire, sequence, 300);
                guest.send_and_check(&port.wire, sequence, 300, Layout::WithData, Form::Direct);
            }
            let regions = guest.memory.regions();
            for region in &cut {
                ftruncate(regions[*region].fd(), 0).expect("our own memfd can be cut");
            }
            // From here on nothing reads guest memory in this process: that would be our own end.
            guest.rx.queue.events().kick.signal();
            guest.tx.queue.events().kick.signal();
            for sequence in 100..200 {
                port.wire.try_send(&frame(sequence, 300));
            }
            let (rx, tx) = (guest.rx.queue.events(), guest.tx.queue.events());
            assert!(
                either_is_signalled(&rx.err, &tx.err),
                "regions {cut:?} were cut and no ring is reported broken"
            );
            assert_ends(&guest.session, &cut);
        });
        host.assert_port_works_after_traffic(1000);
    }
    host.finish();
}

/// The same for the region with the used ring of rx, which the device writes and the guest has no say in. No buffer is
/// with the card: unlike memory that is pinned, its model's would be gone under its DMA.
#[test]
fn a_used_ring_cut_short_costs_its_own_session_only() {
    let mut host = Host::with_two_ports();
    for cut in [vec![2], vec![0, 1, 2]] {
        host.beside_traffic(|port| {
            let mut guest = Guest::boot(port, Setup::default());
            for sequence in 0..20 {
                guest.send_and_check(&port.wire, sequence, 300, Layout::WithData, Form::Direct);
            }
            let regions = guest.memory.regions();
            for region in &cut {
                ftruncate(regions[*region].fd(), 0).expect("our own memfd can be cut");
            }
            // From here on nothing reads guest memory in this process: that would be our own end.
            guest.rx.queue.events().kick.signal();
            guest.tx.queue.events().kick.signal();
            assert_ends(&guest.session, &cut);
        });
        host.assert_port_works();
    }
    host.finish();
}

/// Checks that the product ends a session whose memory is no more what was announced.
fn assert_ends(session: &Session, cut: &[usize]) {
    let closed = session.connection().wait_closed();
    assert!(
        closed.is_ok(),
        "regions {cut:?} were cut and the session goes on: {closed:?}"
    );
}

/// Waits until one of two events is signalled; false if [`PATIENCE`] passes first.
fn either_is_signalled(a: &Event, b: &Event) -> bool {
    const STEP: Duration = Duration::from_millis(1);
    let deadline = Instant::now() + PATIENCE;
    while !a.wait(STEP) && !b.wait(STEP) {
        if Instant::now() > deadline {
            return false;
        }
    }
    true
}

/// A message that has begun and is not ended, on a connection that stays open, is given up after a while.
#[test]
fn a_message_that_never_ends_is_given_up() {
    let host = Host::with_one_port();
    let whole = message(request::SET_FEATURES, 1, 8, &[0; 8]);
    for len in [5, 12, 16] {
        let session = negotiate(host.port());
        session
            .connection()
            .send_bytes(&whole[..len], &[])
            .expect("it goes out");
        let closed = session.connection().wait_closed();
        assert!(closed.is_ok(), "{len} bytes of {}: {closed:?}", whole.len());
        host.assert_port_works();
    }
    host.finish();
}

/// One guest's broken ring is its own affair: its other ring runs, and so does everything on the other port.
#[test]
fn a_looping_tx_ring_leaves_the_other_port_alone() {
    let mut host = Host::with_two_ports();
    host.beside_traffic(|port| {
        let mut guest = Guest::boot(port, Setup::default());
        guest.rx.fill(20, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        let buffer = guest.regions.low + (1 << 20);
        guest.tx.queue.write_desc(0, buffer, 64, desc_flag::NEXT, 1);
        guest.tx.queue.write_desc(1, buffer + 64, 64, desc_flag::NEXT, 0);
        guest.tx.queue.push_head(0);
        guest.tx.queue.publish();
        guest.tx.queue.events().kick.signal();
        assert!(
            guest.tx.queue.events().err.wait(PATIENCE),
            "the loop was not reported"
        );
        for sequence in 0..20 {
            guest.receive_and_check(&port.wire, sequence, 500);
        }
        assert_eq!(port.wire.try_recv(), None, "the loop sent a frame");
        guest.rx.check();
    });
    let stats = host.stats();
    let errors = |port: usize| -> Vec<u64> {
        let lanes = stats["ports"][port]["lanes"].as_array().expect("lanes");
        lanes
            .iter()
            .map(|lane| lane["errors"].as_u64().expect("a count"))
            .collect()
    };
    assert_eq!(
        (errors(0), errors(1)),
        (vec![0, 1], vec![0, 0]),
        "rx and tx errors"
    );
    host.assert_port_works();
    host.finish();
}

/// A page fault on a disk, a network or a process of the VMM's would hold the worker.
#[test]
fn memory_on_an_ordinary_file_system_is_refused_and_the_rule_is_named() {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let mut host = Host::with_one_port();
    let folder = env!("CARGO_TARGET_TMPDIR");
    let file: File = tempfile::tempfile_in(folder).expect("a file in the target folder");
    let magic = fstatfs(&file).expect("statfs").f_type;
    assert_ne!(
        magic, TMPFS_MAGIC,
        "{folder} is on tmpfs: this test needs a target folder on a disk"
    );
    let plan = Plan::new(0, 1 << 20).backing(Backing::File(Arc::new(file)));
    let memory = GuestMemory::new(&[plan]).expect("guest memory");
    for by_table in [false, true] {
        let session = host.port().negotiate(Setup::default(), &memory);
        let answer = if by_table {
            session.set_mem_table()
        } else {
            session.announce_memory()
        };
        assert!(
            matches!(answer, Err(ConnectionError::Refused { .. })),
            "memory on a disk was answered with {answer:?}"
        );
        assert_served(session.connection(), "the refusal");
        drop(session);
        host.assert_port_works();
    }
    host.product
        .wait_printed("the memory is on a file system (magic ");
    host.product
        .wait_printed("a memfd, a file on tmpfs (/dev/shm) or one on hugetlbfs is accepted");
    host.finish();
}

/// Turned away is not left waiting: the second front-end sees the end, and tells its user.
#[test]
fn a_second_front_end_sees_the_end_and_the_first_sees_nothing() {
    let host = Host::with_one_port();
    let port = host.port();
    let turned_away = |what: &str| {
        let second = port.connect();
        // It may be closed before this goes out.
        let _ = second.send(request::GET_FEATURES, 0, &[], &[]);
        let closed = second.wait_closed();
        assert!(closed.is_ok(), "while the first {what}: {closed:?}");
    };

    let memory = GuestMemory::new(&[Plan::new(0, 1 << 20)]).expect("guest memory");
    let first = port.negotiate(Setup::default(), &memory);
    first.announce_memory().expect("the memory is taken");
    let announced = extents(&host.stats());
    turned_away("has announced its memory");
    assert_eq!(extents(&host.stats()), announced);
    assert_served(first.connection(), "the second front-end");
    drop(first);

    let mut guest = Guest::boot(port, Setup::default());
    guest.exchange(&port.wire);
    turned_away("moves frames");
    guest.exchange(&port.wire);
    drop(guest);
    host.assert_port_works();
    host.finish();
}

/// A front-end's death is the usual end of a session, and there is one for each start of a guest.
#[test]
fn front_ends_killed_in_the_middle_of_traffic_leave_nothing_behind() {
    const CYCLES: u64 = 50;
    let mut host = Host::with_one_port();
    let (files, mapped) = (host.open_files(), extents(&host.stats()));
    let mut sequence = 0;
    die_under_traffic(&host, &mut sequence, true);
    let after_one = wait_let_go(&mut host, &mapped);
    for cycle in 0..CYCLES {
        // Every other one dies before anything has come through.
        die_under_traffic(&host, &mut sequence, cycle % 2 == 0);
    }
    let after_all = wait_let_go(&mut host, &mapped);
    assert_eq!(
        after_all, after_one,
        "descriptors are left behind by each front-end"
    );
    assert_eq!(after_all, files, "descriptors of the last front-end are kept");
    host.assert_port_works_after_traffic(sequence);
    host.finish();
}

/// Starts a guest, has frames under way in both directions, and drops everything.
fn die_under_traffic(host: &Host, sequence: &mut u64, settled: bool) {
    let port = host.port();
    let mut guest = Guest::boot(port, Setup::default());
    guest
        .rx
        .fill(100, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    let mut next = || {
        *sequence += 1;
        frame(*sequence, 300)
    };
    if settled {
        let sent = next();
        guest.tx.send(&sent, Layout::WithData, Form::Direct);
        while port.wire.recv() != sent {}
    }
    for _ in 0..30 {
        let frame = next();
        guest.tx.send(&frame, Layout::WithData, Form::Direct);
        port.wire.try_send(&frame);
    }
    // One more answer that nobody will read.
    let asked = guest
        .session
        .connection()
        .send(request::GET_FEATURES, 0, &[], &[]);
    asked.expect("the session lives");
}

/// Waits until the last front-end is gone with all that was its, as far as `stats` shows it, and returns how many
/// descriptors are open then.
fn wait_let_go(host: &mut Host, mapped: &[String]) -> usize {
    host.wait_vacant();
    let stats = host.wait_stats("its guest's memory is unmapped", |stats| extents(stats) == mapped);
    assert_eq!(extents(&stats), mapped);
    host.open_files()
}

/// What is mapped, by IOVA, file and owners.
fn extents(stats: &Value) -> Vec<String> {
    let extents = stats["maps"][0]["extents"].as_array().expect("a list");
    extents
        .iter()
        .map(|extent| format!("{} {} {}", extent["iova"], extent["file"], extent["owners"]))
        .collect()
}
