//! The front-end suite on the real binary, which drives the card model over vfio-user.
//!
//! ```text
//! suite ──vhost-user──▶ vhost-user-vfio ──vfio-user──▶ card-model ──datagrams──▶ suite
//! ```
//!
//! Every behaviour ends with SIGTERM to both: the product must leave with 0, and the card must have seen no rule
//! broken.

mod product;

use product::Product;
use tests::frontend::net::{Form, Layout};
use tests::frontend::suite::{Guest, RX_BUFFER_BYTES, Running, Setup};
use tests::frontend::wire::frame;

tests::front_end_suite!(Product);

/// SIGTERM while frames flow both ways: DMA ends before memory goes, the exit status is 0, the card saw no error.
#[test]
fn sigterm_under_traffic_ends_cleanly() {
    tests::frontend::suite::run(
        &Product,
        "sigterm_under_traffic_ends_cleanly",
        |_: &Product, running| {
            let mut guest = Guest::boot(running, Setup::default());
            guest
                .rx
                .fill(200, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
            for sequence in 0..200 {
                if guest.tx.has_room() {
                    guest
                        .tx
                        .send(&frame(sequence, 1000), Layout::OwnDescriptor, Form::Direct);
                }
                running.wire.try_send(&frame(sequence, 1000));
                guest.tx.reclaim();
            }
            terminate_product(running);
            let at_exit = guest.memory.snapshot();
            for sequence in 200..400 {
                running.wire.try_send(&frame(sequence, 1000));
            }
            assert_eq!(at_exit.first_difference(&guest.memory.snapshot()), None);
            guest.check();
        },
    );
}

fn terminate_product(running: &mut Running) {
    let mut process = running.processes().remove(0);
    product::end(&mut process);
}
