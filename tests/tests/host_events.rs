//! What the host says of a card while frames flow, on the real binary: that it wants the card back, that the bus reported
//! an error. The guest stays connected, and the other port has part in none of it.
//!
//! ```text
//! test ──"request", "aer"──▶ card-model ──eventfd──▶ vhost-user-vfio ──▶ the card goes, or is reset
//!      ◀────────────────────── frames of both ports ───────────────────▶
//! ```

mod product;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use product::{Host, stats, tell_card};
use serde_json::Value;
use tests::frontend::PATIENCE;
use tests::frontend::net::{Form, Layout};
use tests::frontend::suite::{Guest, RX_BUFFER_BYTES, Running, Setup};
use tests::frontend::wire::frame;

const BURST: u64 = 32;

/// Port `a` in `stats`.
fn port(control: &Path) -> Value {
    stats(control)["ports"][0].take()
}

/// Waits until port `a` is as `is_so` wants it, and returns it.
#[track_caller]
fn wait_port(control: &Path, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        let port = port(control);
        if is_so(&port) {
            return port;
        }
        assert!(
            started.elapsed() < PATIENCE,
            "it never came about that {what}: {port}"
        );
        std::thread::yield_now();
    }
}

fn has_no_device(port: &Value) -> bool {
    port["device"] == "none"
}

fn tx(port: &Value, count: &str) -> u64 {
    let lanes = port["lanes"].as_array().expect("a list");
    let lane = lanes.iter().find(|lane| lane["direction"] == "tx");
    lane.expect("a tx lane")[count].as_u64().expect("a count")
}

/// What the card of a port answers.
fn card_says(port: &Running, words: &str) -> String {
    let mut card = UnixStream::connect(port.folder().join("card-control")).expect("the card listens");
    writeln!(card, "{words}").expect("it goes out");
    let mut answer = String::new();
    BufReader::new(card).read_line(&mut answer).expect("an answer");
    answer.trim_end().to_owned()
}

/// Descriptor rings on the map: two for each card.
fn rings(control: &Path) -> usize {
    let mut stats = stats(control);
    let extents = stats["maps"][0]["extents"].take();
    let extents = extents.as_array().expect("a list");
    let is_ring = |extent: &&Value| extent["file"].as_str().expect("a name").contains("vuv-rings");
    extents.iter().filter(is_ring).count()
}

/// Puts a burst of frames on the guest's queue and does not wait for them.
fn send_burst(guest: &mut Guest, from: u64) {
    for sequence in from..from + BURST {
        guest
            .tx
            .offer(&frame(sequence, 300), Layout::WithData, Form::Direct);
    }
    guest.tx.queue.submit();
}

/// Without a card, what is sent comes back as lost and what is there to receive into stays.
fn assert_lives_without_a_card(guest: &mut Guest, control: &Path) {
    let lost = |port: &Value| {
        let reasons = port["lanes"][1]["drop_reasons"]["link-down"].as_u64();
        reasons.unwrap_or(0)
    };
    let (before, posted) = (lost(&port(control)), guest.rx.posted());
    send_burst(guest, 1000);
    guest.tx.drain();
    let port = wait_port(control, "the frames are lost by count", |port| {
        lost(port) == before + BURST
    });
    assert_eq!(port["connected"], true);
    assert_eq!(port["link"], "down");
    assert_eq!(guest.rx.posted(), posted);
    guest.check();
}

#[test]
fn a_card_that_the_host_wants_back_is_let_go_under_traffic_and_its_guest_stays() {
    let mut host = Host::with_two_ports();
    let control = host.control().to_owned();
    assert_eq!(rings(&control), 4);
    let first = host.beside_traffic(|a| {
        let mut guest = Guest::boot(a, Setup::default());
        guest.exchange(&a.wire);
        guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        let sent_before = tx(&port(&control), "frames");
        send_burst(&mut guest, 100);
        tell_card(a.folder(), "request");
        let gone = wait_port(&control, "the card is gone", has_no_device);
        assert_eq!(gone["resets"], 0, "an orderly end needs none");
        // Each of the burst was sent or is counted as lost, and each came back to the guest.
        guest.tx.drain();
        wait_port(&control, "each frame is accounted for", |port| {
            let lost = port["lanes"][1]["drop_reasons"]["link-down"].as_u64();
            tx(port, "frames") - sent_before + lost.unwrap_or(0) == BURST
        });
        assert_lives_without_a_card(&mut guest, &control);
        assert_eq!(card_says(a, "request"), "error: no client listens");
        guest
    });
    assert_eq!(rings(&control), 2, "those of the other port's card");
    // A guest that comes to a port without a card is served all the same.
    drop(first);
    let mut next = Guest::boot(host.port(), Setup::default());
    assert_lives_without_a_card(&mut next, &control);
    drop(next);
    host.finish();
}

#[test]
fn an_error_on_the_bus_resets_the_card_and_every_buffer_is_accounted_for() {
    let mut host = Host::with_two_ports();
    let control = host.control().to_owned();
    host.beside_traffic(|a| {
        let mut guest = Guest::boot(a, Setup::default());
        guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        guest.receive_and_check(&a.wire, 0, 300);
        for round in 1..=3_u64 {
            send_burst(&mut guest, 100 * round);
            tell_card(a.folder(), "aer");
            wait_port(&control, "the card is back", |port| {
                port["resets"] == round && port["link"] == "up"
            });
            guest.tx.drain();
            // What came before the reset, if anything did, is in order.
            while a.wire.try_recv().is_some() {}
            guest.send_and_check(&a.wire, 100 * round + 50, 1000, Layout::WithData, Form::Direct);
            guest.receive_and_check(&a.wire, round, 1514);
        }
        // The buffers that were with the card at each reset: none was lost, none came twice.
        for sequence in 4..64 {
            guest.receive_and_check(&a.wire, sequence, 300);
        }
        assert_eq!(guest.rx.posted(), 0);
        guest.check();
    });
    host.assert_port_works();
    host.finish();
}

#[test]
fn a_card_that_has_vanished_is_let_go_when_the_bus_says_so() {
    let mut host = Host::with_two_ports();
    let control = host.control().to_owned();
    let guest = host.beside_traffic(|a| {
        let mut guest = Guest::boot(a, Setup::default());
        guest.exchange(&a.wire);
        guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        tell_card(a.folder(), "removed on");
        tell_card(a.folder(), "aer");
        let gone = wait_port(&control, "the card is gone", has_no_device);
        assert_eq!(gone["resets"], 0, "it did not come back from any");
        assert_lives_without_a_card(&mut guest, &control);
        guest
    });
    assert_eq!(rings(&control), 2, "those of the other port's card");
    drop(guest);
    host.finish();
}
