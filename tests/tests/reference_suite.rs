//! The front-end suite on the reference back end, which shares no code with the product.

use std::path::Path;
use std::process::Command;

use tests::frontend::process::Process;
use tests::frontend::suite::BackEnd;
use tests::frontend::wire::Wire;

struct Reference;

impl Reference {
    fn spawn(folder: &Path, socket: &Path, wire: &Wire, client: bool) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_reference-back-end"));
        command
            .arg("--socket-path")
            .arg(socket)
            .arg("--wire-local")
            .arg(wire.local());
        command.arg("--wire-peer").arg(wire.peer());
        if client {
            command.arg("--client");
        }
        Process::start("reference-back-end", &mut command, folder).expect("the reference back end starts")
    }
}

impl BackEnd for Reference {
    fn start(&self, folder: &Path, socket: &Path, wire: &Wire) -> Vec<Process> {
        let mut process = Self::spawn(folder, socket, wire, false);
        process.wait_listening(socket);
        vec![process]
    }

    fn start_as_client(&self, folder: &Path, socket: &Path, wire: &Wire) -> Vec<Process> {
        vec![Self::spawn(folder, socket, wire, true)]
    }

    fn exemptions(&self) -> &[(&str, &str)] {
        &[
            (
                "a_call_eventfd_that_is_full_stops_nobody",
                "vmm-sys-util 0.15 writes to the call eventfd in its own mode, and so blocks",
            ),
            (
                "as_qemu_carries_frames_both_ways",
                "vhost 0.18 ends the connection at SET_VRING_ENABLE before SET_FEATURES, QEMU's order",
            ),
            (
                "a_broken_ring_is_reported_by_the_error_eventfd",
                "vhost-user-backend 0.24 keeps the error eventfd to itself",
            ),
            (
                "a_chain_longer_than_the_ring_breaks_it",
                "virtio-queue 0.18 limits an indirect chain by its table, not by the ring",
            ),
        ]
    }
}

tests::front_end_suite!(Reference);
