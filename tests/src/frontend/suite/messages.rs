//! Messages no honest front-end sends: the connection ends, the port takes the next one.

use std::os::fd::AsFd;

use super::{BackEnd, Guest, Running, Setup, assert_port_works, assert_refused};
use crate::frontend::connection::{Connection, message, request};
use crate::frontend::event::Event;
use crate::frontend::memory::Announcement;
use crate::frontend::vmm::region_body;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// Sends `bad` in the middle of a working session and sees the connection end and the port go on.
fn ends_the_connection(running: &Running, what: &str, bad: impl FnOnce(&Connection)) {
    let mut guest = Guest::boot(running, Setup::default());
    guest.exchange(&running.wire);
    bad(guest.session.connection());
    let closed = guest.session.connection().wait_closed();
    assert!(
        closed.is_ok(),
        "after {what} the connection is still there: {closed:?}"
    );
    drop(guest);
    running.assert_alive();
}

/// Message numbers that do not exist, and one for another kind of device.
pub fn a_message_nobody_knows_ends_only_that_connection<B: BackEnd>(_: &B, running: &mut Running) {
    for (number, flags) in [
        (0, 0),
        (999, 0),
        (999, NEED_REPLY),
        (u32::MAX, NEED_REPLY),
        (26, 0),
    ] {
        ends_the_connection(running, &format!("request {number}"), |connection| {
            connection.send(number, flags, &[0; 8], &[]).expect("it goes out");
        });
    }
    assert_port_works(running);
}

/// Right numbers in the wrong form.
pub fn a_malformed_message_ends_only_that_connection<B: BackEnd>(_: &B, running: &mut Running) {
    let set_features =
        |version, announced, body: &[u8]| message(request::SET_FEATURES, version, announced, body);
    let cases: [(&str, Vec<u8>); 6] = [
        ("version 0", set_features(0, 8, &[0; 8])),
        ("version 3", set_features(3, 8, &[0; 8])),
        (
            "a body of 4 bytes where 8 are due",
            set_features(VERSION, 4, &[0; 4]),
        ),
        (
            "an announced body of 16 MiB",
            set_features(VERSION, 16 << 20, &[0; 8]),
        ),
        (
            "an announced body of 4 GiB",
            set_features(VERSION, u32::MAX, &[0; 8]),
        ),
        (
            "a memory table of half a region",
            message(request::SET_MEM_TABLE, VERSION, 24, &[1; 24]),
        ),
    ];
    for (what, bytes) in cases {
        ends_the_connection(running, what, |connection| {
            connection.send_bytes(&bytes, &[]).expect("it goes out")
        });
    }
    let event = Event::new();
    ends_the_connection(
        running,
        "a kick without the descriptor it announces",
        |connection| {
            connection
                .send(request::SET_VRING_KICK, 0, &0_u64.to_ne_bytes(), &[])
                .expect("it goes out");
        },
    );
    ends_the_connection(running, "a descriptor where none belongs", |connection| {
        connection
            .send(request::GET_FEATURES, 0, &[], &[event.as_fd()])
            .expect("it goes out");
    });
    let region = region_body(&Announcement {
        gpa: 0,
        len: 1 << 20,
        user: 0,
        file_offset: 0,
    });
    ends_the_connection(
        running,
        "a table of one region with two descriptors",
        |connection| {
            let body = [&1_u64.to_ne_bytes()[..], &region].concat();
            connection
                .send(request::SET_MEM_TABLE, 0, &body, &[event.as_fd(), event.as_fd()])
                .expect("it goes out");
        },
    );
    assert_port_works(running);
}

/// A front-end that dies in the middle of a header or of a body.
pub fn a_message_cut_short_ends_only_that_connection<B: BackEnd>(_: &B, running: &mut Running) {
    let whole = message(request::SET_FEATURES, VERSION, 8, &[0; 8]);
    for len in [1, 8, 11, 12, 13, 19] {
        ends_the_connection(
            running,
            &format!("{len} bytes of {}", whole.len()),
            |connection| {
                connection.send_bytes(&whole[..len], &[]).expect("it goes out");
                connection.stop_sending().expect("it can be closed");
            },
        );
    }
    assert_port_works(running);
}

/// A ring the port does not have, and a ring size that is none.
pub fn a_wrong_ring_number_is_refused<B: BackEnd>(_: &B, running: &mut Running) {
    for (index, size) in [(250, 256), (u32::MAX, 256), (0, 0), (0, 65_536), (0, u32::MAX)] {
        let guest = Guest::boot(running, Setup::default());
        let body = [index.to_ne_bytes(), size.to_ne_bytes()].concat();
        let answer = guest
            .session
            .connection()
            .command(request::SET_VRING_NUM, &body, &[]);
        assert_refused(answer, &format!("size {size} for ring {index}"));
        drop(guest);
        running.assert_alive();
    }
    assert_port_works(running);
}
