//! The real binary on the card that is no card, as the bench drives it: what goes in is counted, what is asked for comes.

#![forbid(unsafe_code)]

mod product;

use std::process::Command;

use product::{binary, end, run_to_end, start, stats};
use serde_json::Value;
use tests::frontend::net::{Form, Layout};
use tests::frontend::process::Process;
use tests::frontend::suite::{Guest, RX_BUFFER_BYTES, Running, Setup};
use tests::frontend::wire::frame;

const FRAMES: u64 = 500;

/// The product on `device`, with no patience, so that every frame is found by a look before a sleep.
fn serve(running: &Running, device: &str) -> Process {
    let mut command = Command::new(binary());
    command.args(["--device", device, "--poll-us", "0", "--socket-path"]);
    command.arg(running.socket());
    command.arg("--control").arg(running.folder().join("control"));
    let mut process = start(&mut command, running.folder());
    process.wait_printed("no frame leaves this machine");
    process.wait_listening(running.socket());
    process.wait_listening(&running.folder().join("control"));
    process
}

fn lane(stats: &Value, direction: &str) -> Value {
    let lanes = stats["ports"][0]["lanes"].as_array().expect("lanes");
    let found = lanes.iter().find(|lane| lane["direction"] == direction);
    found.expect("a lane of each direction").clone()
}

/// Sends and receives [`FRAMES`] frames of 64 bytes on the wire each way, and checks what was counted.
fn assert_frames_move(device: &str) {
    let running = Running::prepare();
    let mut process = serve(&running, device);
    let mut guest = Guest::boot(&running, Setup::default());
    for sequence in 0..FRAMES {
        guest
            .tx
            .send(&frame(sequence, 60), Layout::WithData, Form::Direct);
        guest.rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        assert_eq!(guest.rx.recv().len(), 60);
        guest.tx.drain();
    }
    let counted = stats(&running.folder().join("control"));
    assert_eq!(counted["ports"][0]["device"], device);
    for direction in ["tx", "rx"] {
        let lane = lane(&counted, direction);
        assert_eq!(lane["frames"], FRAMES, "{direction}");
        assert_eq!(lane["bytes"], FRAMES * 60, "{direction}");
        assert_eq!(lane["bounced_frames"], 0, "{direction}");
        assert_eq!(lane["dropped_frames"], 0, "{direction}");
        assert_eq!(lane["errors"], 0, "{direction}");
    }
    guest.check();
    drop(guest);
    end(&mut process);
}

#[test]
fn a_model_takes_every_frame_and_fills_every_buffer() {
    assert_frames_move("model:rx=64");
}

#[test]
fn so_does_one_that_moves_the_payload() {
    assert_frames_move("model:rx=64,copy");
}

#[test]
fn a_model_is_refused_on_a_map_with_an_iommu() {
    let folder = tempfile::TempDir::with_prefix("model-").expect("a temporary folder");
    let config = folder.path().join("config.toml");
    std::fs::write(
        &config,
        "[map.main]\niommu = 'type1'\n[port.a]\ndevice = 'model'\nsocket-path = 's'\n",
    )
    .expect("a config file");
    let (status, output) = run_to_end([std::ffi::OsStr::new("--config"), config.as_os_str()]);
    assert_eq!(status.code(), Some(2), "{output}");
    assert!(output.contains("is played by this process"), "{output}");
}
