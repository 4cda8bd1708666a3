//! The front-end suite on the real binary, which drives the card model over vfio-user.
//!
//! ```text
//! suite ──vhost-user──▶ vhost-user-vfio ──vfio-user──▶ card-model ──datagrams──▶ suite
//! ```
//!
//! Every behaviour ends with SIGTERM to both: the product must leave with 0, and the card must have seen no rule
//! broken.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tests::frontend::net::{Form, Layout};
use tests::frontend::process::Process;
use tests::frontend::suite::{BackEnd, Guest, RX_BUFFER_BYTES, Running, Setup};
use tests::frontend::wire::{Wire, frame};

struct Product;

/// Builds the binary under test, once, so that no test runs a stale one, and returns its path.
fn product() -> &'static Path {
    static PRODUCT: OnceLock<PathBuf> = OnceLock::new();
    PRODUCT.get_or_init(|| {
        // This test lies in <target>/<profile>/deps, the binary one folder up.
        let test = std::env::current_exe().expect("a test has a path");
        let profile = test.ancestors().nth(2).expect("a folder of binaries");
        let mut build = Command::new(env!("CARGO"));
        build.args([
            "build",
            "--quiet",
            "--package",
            "backend",
            "--bin",
            "vhost-user-vfio",
        ]);
        build
            .arg("--target-dir")
            .arg(profile.parent().expect("a target folder"));
        if profile.ends_with("release") {
            build.arg("--release");
        }
        let built = build
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .expect("cargo runs");
        assert!(built.success(), "vhost-user-vfio cannot be built");
        profile.join("vhost-user-vfio")
    })
}

impl Product {
    fn spawn(folder: &Path, socket: &Path, wire: &Wire, client: bool) -> Vec<Process> {
        let card_socket = folder.join("card");
        let mut card = Command::new(env!("CARGO_BIN_EXE_card-model"));
        card.arg("--socket").arg(&card_socket);
        card.arg("--wire-local")
            .arg(wire.local())
            .arg("--wire-peer")
            .arg(wire.peer());
        card.arg("--violations").arg(folder.join("violations"));
        // Frames wait while no buffer is posted, so a test may send before the guest's buffers are with the card;
        // and buffers the card owns are filled with garbage, so that a leak of one shows.
        card.args(["--hold-frames", "--scribble"]);
        let mut card = Process::start("card-model", &mut card, folder).expect("the card model starts");
        card.wait_listening(&card_socket);

        let mut command = Command::new(product());
        command
            .arg("--device")
            .arg(format!("vfio-user:{}", card_socket.display()));
        command.arg("--socket-path").arg(socket);
        if client {
            command.arg("--client");
        }
        let mut process =
            Process::start("vhost-user-vfio", &mut command, folder).expect("the product starts");
        // A frame sent while the link negotiates is lost, as on any card.
        process.wait_printed("link is up");
        if !client {
            process.wait_listening(socket);
        }
        vec![process, card]
    }
}

impl BackEnd for Product {
    fn start(&self, folder: &Path, socket: &Path, wire: &Wire) -> Vec<Process> {
        Self::spawn(folder, socket, wire, false)
    }

    fn start_as_client(&self, folder: &Path, socket: &Path, wire: &Wire) -> Vec<Process> {
        Self::spawn(folder, socket, wire, true)
    }

    fn exemptions(&self) -> &[(&str, &str)] {
        &[(
            "a_frame_larger_than_a_buffer_is_merged",
            "at an MTU of 1500 the card is given one guest buffer a frame; what does not fit it is dropped in turn",
        )]
    }

    fn finish(&self, processes: Vec<Process>) {
        // The product first: it has to stop its DMA while the card is still there to be stopped.
        for mut process in processes {
            let status = process.terminate();
            assert!(
                status.success(),
                "it ended with {status} and printed:\n{}",
                process.output()
            );
        }
    }
}

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
    let mut product = running.processes().remove(0);
    let status = product.terminate();
    assert!(
        status.success(),
        "it ended with {status} and printed:\n{}",
        product.output()
    );
}
