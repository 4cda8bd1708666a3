//! What an operator sees of the real binary: answers to mistakes, statistics, sockets that come and go, idleness.
//!
//! ```text
//! operator ──arguments, config file──▶ vhost-user-vfio ──exit status, one line why──▶ operator
//!          ──stats──▶ control socket ──JSON──▶
//! ```

mod product;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use product::{Host, Product, Statistics, binary, device, end, run_to_end, start, start_card, tell_card};
use serde_json::Value;
use tempfile::TempDir;
use tests::frontend::connection::Connection;
use tests::frontend::net::{Form, HEADER_BYTES, Layout};
use tests::frontend::process::Process;
use tests::frontend::suite::{BackEnd, Guest, RX_BUFFER_BYTES, Running, Setup, assert_port_works};
use tests::frontend::wire::frame;

fn folder() -> TempDir {
    TempDir::with_prefix("operator-").expect("a temporary folder")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// What lies in a folder, without the product's log.
fn left_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_none_or(|extension| extension != "log"));
    paths.sort();
    paths
}

/// Runs the product with arguments it must refuse, and checks status and that all of `words` are in its answer, one
/// line at its end that starts with `error: `.
fn assert_refused(args: &[&str], code: i32, words: &[&str]) {
    let (status, output) = run_to_end(args);
    assert_eq!(status.code(), Some(code), "{args:?} printed:\n{output}");
    assert!(
        output.lines().any(|line| line.starts_with("error: ")),
        "{args:?} printed:\n{output}"
    );
    for word in words {
        assert!(
            output.contains(word),
            "{word:?} is not in what {args:?} printed:\n{output}"
        );
    }
}

/// (vhost-user, "Backend program conventions"; QEMU's docs/interop/vhost-user.json)
#[test]
fn print_capabilities_is_the_json_of_a_net_back_end() {
    for args in [
        vec!["--print-capabilities"],
        vec!["--print-capabilities", "--fd", "99", "--no-such-option"],
    ] {
        let (status, output) = run_to_end(&args);
        assert!(status.success(), "{args:?} ended with {status}:\n{output}");
        let capabilities: Value = serde_json::from_str(&output).expect("JSON and nothing else");
        assert_eq!(capabilities["type"], "net");
        assert!(capabilities["features"].is_array(), "{capabilities}");
    }
}

#[test]
fn an_unknown_option_is_answered_with_the_nearest() {
    let args = ["--device", "tap:t", "--socket-pth", "s"];
    assert_refused(&args, 2, &["'--socket-pth'", "'--socket-path'"]);
}

#[test]
fn an_unknown_key_is_answered_with_its_path_and_the_nearest() {
    let folder = folder();
    let config = folder.path().join("config.toml");
    let cases = [
        (
            "[port.vm0]\nsockt-path = 's'\n",
            ["`port.vm0.sockt-path` at line 2", "`socket-path`"],
        ),
        (
            "[map.main]\niomu = 'auto'\n",
            ["`map.main.iomu` at line 2", "`iommu`"],
        ),
        ("contrl = 'c'\n", ["`contrl` at line 1", "`control`"]),
    ];
    for (file, words) in cases {
        std::fs::write(&config, file).expect("a config file");
        assert_refused(&["--config", text(&config)], 2, &words);
        assert_refused(&["--config", text(&config)], 2, &[text(&config)]);
    }
}

#[test]
fn a_device_that_is_not_there_is_named_and_no_socket_is_left() {
    let folder = folder();
    let (socket, control) = (folder.path().join("vm0"), folder.path().join("control"));
    let absent = format!("vfio-user:{}", folder.path().join("absent").display());
    for (device, words) in [
        (absent.as_str(), text(&folder.path().join("absent"))),
        ("0000:ff:1f.7", "0000:ff:1f.7"),
    ] {
        let args = [
            "--device",
            device,
            "--socket-path",
            text(&socket),
            "--control",
            text(&control),
        ];
        assert_refused(&args, 1, &[words]);
        assert_eq!(left_in(folder.path()), Vec::<PathBuf>::new());
    }
}

/// Each of two sockets may be the one that is taken; whatever was made before it goes again.
#[test]
fn a_socket_path_that_is_taken_is_left_to_its_owner() {
    let folder = folder();
    let (owned, free) = (folder.path().join("owned"), folder.path().join("free"));
    let owner = UnixListener::bind(&owned).expect("a listener");
    let config = folder.path().join("config.toml");
    let absent = format!("vfio-user:{}", folder.path().join("absent").display());
    let says = format!("socket path {} is in use by another process", owned.display());
    let one_port = |socket: &Path, control: &Path| {
        let args = [
            "--device",
            &absent,
            "--socket-path",
            text(socket),
            "--control",
            text(control),
        ];
        assert_refused(&args, 1, &[&says]);
    };
    one_port(&owned, &free);
    one_port(&free, &owned);
    let file = format!(
        "[port.a]\ndevice = '{absent}1'\nsocket-path = '{}'\n[port.b]\ndevice = '{absent}2'\nsocket-path = '{}'\n",
        free.display(),
        owned.display()
    );
    std::fs::write(&config, file).expect("a config file");
    assert_refused(&["--config", text(&config)], 1, &[&says]);

    assert_eq!(left_in(folder.path()), [config, owned.clone()]);
    owner.set_nonblocking(true).expect("a flag");
    let _client = UnixStream::connect(&owned).expect("the owner still listens");
    let reached = std::iter::from_fn(|| owner.accept().ok()).count();
    assert!(reached >= 1, "the owner still has its socket");
}

#[test]
fn a_socket_path_that_cannot_be_made_is_explained() {
    let folder = folder();
    let file = folder.path().join("file");
    std::fs::write(&file, "kept").expect("a file");
    let missing = folder.path().join("missing");
    let in_missing = missing.join("vm0");
    let absent = format!("vfio-user:{}", folder.path().join("absent").display());
    let free = folder.path().join("free");
    for (socket, control) in [(&in_missing, &free), (&free, &in_missing)] {
        let (socket, control) = (text(socket), text(control));
        let args = ["--device", &absent, "--socket-path", socket, "--control", control];
        assert_refused(&args, 1, &[text(&in_missing), text(&missing), "does not exist"]);
    }
    for (socket, control) in [(&file, &free), (&free, &file)] {
        let (socket, control) = (text(socket), text(control));
        let args = ["--device", &absent, "--socket-path", socket, "--control", control];
        assert_refused(&args, 1, &[text(&file), "is no socket"]);
    }
    assert_eq!(std::fs::read(&file).expect("the file is there"), b"kept");
    assert_eq!(left_in(folder.path()), [file]);
}

#[test]
fn stats_of_nobody_says_so() {
    let folder = folder();
    let (missing, dead) = (folder.path().join("missing"), folder.path().join("dead"));
    drop(UnixListener::bind(&dead).expect("a listener"));
    for control in [&missing, &dead] {
        assert_refused(
            &["stats", "--control", text(control)],
            1,
            &["cannot reach a running vhost-user-vfio", text(control)],
        );
    }
}

/// One lane's entry in the first port's statistics.
fn lane<'a>(stats: &'a Value, direction: &str) -> &'a Value {
    let lanes = stats["ports"][0]["lanes"].as_array().expect("a list of lanes");
    let found = lanes.iter().find(|lane| lane["direction"] == direction);
    found.unwrap_or_else(|| panic!("no {direction} lane in {stats}"))
}

fn count(lane: &Value, key: &str) -> u64 {
    lane[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} is no number in {lane}"))
}

fn sleeps(stats: &Value) -> u64 {
    count(lane(stats, "rx"), "sleeps").min(count(lane(stats, "tx"), "sleeps"))
}

/// Waits until the worker has gone to sleep again after what it did since `before`.
fn wait_asleep(host: &mut Host, before: u64) -> u64 {
    sleeps(&host.wait_stats("the worker sleeps", |stats| sleeps(stats) > before))
}

/// Moves one frame of each of `lens` bytes each way, each while the worker sleeps.
fn wake_by_frames(host: &mut Host, guest: &mut Guest, lens: &[usize]) {
    let mut slept = wait_asleep(host, 0);
    for (sequence, &len) in (0..).zip(lens) {
        guest.send_and_check(&host.port().wire, sequence, len, Layout::WithData, Form::Direct);
        slept = wait_asleep(host, slept);
        guest.receive_and_check(&host.port().wire, sequence, len);
        slept = wait_asleep(host, slept);
    }
}

#[test]
fn stats_counts_what_moved_and_lists_what_is_mapped() {
    const LENS: [usize; 10] = [60, 61, 64, 128, 500, 999, 1000, 1400, 1513, 1514];
    let mut host = Host::with_one_port();
    let mut guest = Guest::boot(host.port(), Setup::default());
    guest
        .rx
        .fill(LENS.len(), RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    wake_by_frames(&mut host, &mut guest, &LENS);

    let (status, output) = run_to_end(["stats", "--control", text(host.control())]);
    assert!(status.success(), "{output}");
    let stats: Value = serde_json::from_str(&output).expect("JSON and nothing else");
    let port = &stats["ports"][0];
    assert_eq!(port["name"], "a");
    assert_eq!(port["connected"], true);
    let frames = LENS.len();
    let bytes: usize = LENS.iter().sum();
    for direction in ["rx", "tx"] {
        let lane = lane(&stats, direction);
        assert_eq!(lane["frames"], frames, "{direction}");
        assert_eq!(lane["bytes"], bytes, "{direction}");
        assert_eq!(lane["zero_copy_frames"], frames, "{direction}");
        assert_eq!(lane["bounced_frames"], 0, "{direction}");
        assert_eq!(lane["bounce_reasons"], serde_json::json!({}), "{direction}");
        assert_eq!(lane["errors"], 0, "{direction}");
        assert!(count(lane, "notifications") > 0, "{lane}");
        assert!(count(lane, "sleeps") > 0, "{lane}");
        // A field each, whatever it says: the guest kicks rx only when it runs low.
        count(lane, "kicks");
        count(lane, "interrupts");
    }
    assert!(count(lane(&stats, "tx"), "kicks") > 0, "{stats}");
    assert!(count(lane(&stats, "rx"), "interrupts") > 0, "{stats}");
    check_map(&stats["maps"][0], &device(host.port().folder()));

    drop(guest);
    host.wait_vacant();
    host.finish();
}

/// A cable that is pulled shows in the log and in `stats`; the guest's frames are lost by count and it never waits, even
/// those the card had and, as silicon does, keeps: they come back by a reset.
#[test]
fn without_a_cable_frames_are_lost_by_count_and_with_one_they_flow_again() {
    let mut host = Host::with_one_port();
    let folder = host.port().folder().to_owned();
    let mut guest = Guest::boot(host.port(), Setup::default());
    guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    for stuck in [false, true] {
        let lost_before = dropped(&host.stats());
        if stuck {
            tell_card(&folder, "hang-tx on");
            guest.tx.send(&frame(0, 100), Layout::WithData, Form::Direct);
        }
        tell_card(&folder, "link down");
        host.wait_stats("the link is down", |stats| stats["ports"][0]["link"] == "down");
        guest.tx.send(&frame(1, 100), Layout::WithData, Form::Direct);
        let lost = 1 + u64::from(stuck);
        host.wait_stats("frames are lost by count", |stats| {
            dropped(stats) == lost_before + lost
        });
        guest.tx.drain();

        tell_card(&folder, "hang-tx off");
        tell_card(&folder, "link up");
        host.wait_stats("the link is up", |stats| stats["ports"][0]["link"] == "up");
        let wire = &host.port().wire;
        for sequence in 10..20 {
            guest.send_and_check(wire, sequence, 300, Layout::WithData, Form::Direct);
            guest.receive_and_check(wire, sequence, 300);
        }
    }
    assert!(host.product.output().contains("link is down"));
    drop(guest);
    host.wait_vacant();
    host.finish();
}

/// Frames to send that were lost for want of a link.
fn dropped(stats: &Value) -> u64 {
    lane(stats, "tx")["drop_reasons"]["link-down"]
        .as_u64()
        .unwrap_or(0)
}

/// Guest memory, the card's descriptor rings, and nothing else: the proof of zero-copy.
fn check_map(map: &Value, device: &str) {
    assert_eq!(map["name"], "main");
    assert_eq!(map["iommu"], "vfio-user");
    assert_eq!(map["devices"], serde_json::json!([device]));
    let extents = map["extents"].as_array().expect("a list of extents");
    let (mut guest_bytes, mut all_bytes, mut ranges) = (0, 0, Vec::new());
    for extent in extents {
        let (file, len) = (extent["file"].as_str().expect("a name"), count(extent, "len"));
        let owners: Vec<&str> = extent["owners"]
            .as_array()
            .expect("a list of owners")
            .iter()
            .map(|owner| owner.as_str().expect("a name"))
            .collect();
        if file.contains("guest-memory") {
            assert_eq!(owners, ["a"], "{extent}");
            guest_bytes += len;
        } else {
            assert!(
                file.contains("vuv-rings"),
                "neither guest memory nor descriptor rings: {extent}"
            );
            assert!(owners.iter().all(|owner| owner.contains(device)), "{extent}");
        }
        all_bytes += len;
        let iova = extent["iova"]
            .as_str()
            .and_then(|iova| iova.strip_prefix("0x"))
            .map(|digits| u64::from_str_radix(digits, 16).expect("hexadecimal"));
        let iova = iova.expect("an address");
        assert!(iova > 0 && iova % 4096 == 0, "{extent}");
        ranges.push((iova, len));
    }
    assert_eq!(guest_bytes, 3 * (4 << 20), "the guest's three regions: {map}");
    ranges.sort_unstable();
    assert!(
        ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0),
        "extents overlap: {map}"
    );
    assert_eq!(count(map, "mapped_bytes"), all_bytes, "{map}");
    // The process that serves the card pins, or does not; this one pins nothing for it.
    assert_eq!(count(map, "pinned_bytes"), 0, "{map}");
}

/// The one thing that makes bounce memory appear, and it is seen twice: in the map and in the counters.
#[test]
fn one_short_receive_buffer_shows_as_bounce_memory_and_one_bounced_frame() {
    let mut host = Host::with_one_port();
    let mut guest = Guest::boot(host.port(), Setup::default());
    let bounces = |stats: &Value| -> usize {
        let extents = stats["maps"][0]["extents"].as_array().expect("a list").iter();
        extents
            .filter(|extent| extent["file"].as_str().expect("a name").contains("vuv-bounce"))
            .count()
    };
    guest.rx.fill(2, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    guest.receive_and_check(&host.port().wire, 0, 500);
    let before = host.wait_stats("a frame came", |stats| lane(stats, "rx")["frames"] == 1);
    assert_eq!(bounces(&before), 0, "{before}");
    assert_eq!(lane(&before, "rx")["bounced_frames"], 0);

    guest
        .rx
        .fill(1, HEADER_BYTES + 600, Layout::WithData, Form::Direct);
    guest.rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    for sequence in 1..4 {
        guest.receive_and_check(&host.port().wire, sequence, 500);
    }
    let after = host.wait_stats("all came", |stats| lane(stats, "rx")["frames"] == 4);
    assert!(bounces(&after) > 0, "{after}");
    let rx = lane(&after, "rx");
    assert_eq!(rx["bounced_frames"], 1, "{rx}");
    assert_eq!(rx["zero_copy_frames"], 3, "{rx}");
    assert_eq!(
        rx["bounce_reasons"],
        serde_json::json!({ "short-buffer": 1 }),
        "{rx}"
    );
    assert_eq!(rx["copied_bytes"], 500, "{rx}");
    guest.check();
    drop(guest);
    host.finish();
}

/// Starts the product on descriptor 7, which is `socket`, with its card.
fn start_on_descriptor(running: &mut Running, socket: impl Into<OwnedFd>) {
    const NUMBER: i32 = 7;
    let card = start_card(running.folder(), &running.wire);
    let mut command = Command::new(binary());
    command.arg("--device").arg(device(running.folder()));
    command.args(["--fd", &NUMBER.to_string()]);
    let mapping = FdMapping {
        parent_fd: socket.into(),
        child_fd: NUMBER,
    };
    command.fd_mappings(vec![mapping]).expect("one mapping");
    let mut product = start(&mut command, running.folder());
    // Ours is closed with the command, so that an end on the other side is seen there.
    drop(command);
    product.wait_printed("link is up");
    running.processes().extend([product, card]);
}

#[test]
fn an_inherited_connected_socket_serves_its_one_front_end_and_ends_with_it() {
    let mut running = Running::prepare();
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    start_on_descriptor(&mut running, theirs);
    let connection = Connection::over(ours).expect("a connection");
    let mut guest = Guest::boot_over(connection, Setup::default());
    guest.exchange(&running.wire);
    drop(guest);
    let mut processes = std::mem::take(running.processes());
    let status = processes[0].wait_ended();
    assert!(status.success(), "{status}:\n{}", processes[0].output());
    end(&mut processes[1]);
}

#[test]
fn an_inherited_listening_socket_serves_one_front_end_after_the_other_and_stays() {
    let mut running = Running::prepare();
    let listener = UnixListener::bind(running.socket()).expect("a listener");
    start_on_descriptor(&mut running, listener);
    assert_port_works(&running);
    assert_port_works(&running);
    let mut processes = std::mem::take(running.processes());
    processes.iter_mut().for_each(end);
    assert!(
        running.socket().exists(),
        "a path that somebody else made is not ours to remove"
    );
}

#[test]
fn a_descriptor_that_is_no_socket_is_refused() {
    let folder = folder();
    let mut command = Command::new(binary());
    command.args(["--device", "vfio-user:/nonexistent", "--fd", "7"]);
    let mapping = FdMapping {
        parent_fd: File::open("/dev/null").expect("a file").into(),
        child_fd: 7,
    };
    command.fd_mappings(vec![mapping]).expect("one mapping");
    let mut product = start(&mut command, folder.path());
    assert_eq!(product.wait_ended().code(), Some(1));
    let output = product.output();
    assert!(
        output.contains("descriptor 7 cannot be used as a socket"),
        "{output}"
    );
}

#[test]
fn as_a_client_it_waits_for_a_front_end_that_comes_later() {
    let mut running = Running::prepare();
    let processes = Product.start_as_client(running.folder(), running.socket(), &running.wire);
    running.processes().extend(processes);
    running.processes()[0].wait_printed("no front-end yet");
    let listener = UnixListener::bind(running.socket()).expect("a listener");
    let connection = Connection::accept(&listener).expect("it connects");
    Guest::boot_over(connection, Setup::default()).exchange(&running.wire);
    let processes = std::mem::take(running.processes());
    Product.finish(processes);
    assert!(running.socket().exists(), "the front-end's socket is not ours");
}

/// Sockets have the modes an operator relies on while they are there, and go with the process.
#[test]
fn sockets_are_private_and_gone_after_sigterm() {
    let mut host = Host::with_one_port();
    let paths = [host.port().socket().to_owned(), host.control().to_owned()];
    for path in &paths {
        let metadata = std::fs::symlink_metadata(path).expect("a socket");
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
    host.assert_port_works();
    end(&mut host.product);
    for path in &paths {
        assert!(!path.exists(), "{} is left behind", path.display());
    }
}

/// Processor time of everything but the threads that answer `stats`, which is asked all the time.
fn ticks_without_control(process: &Process) -> u64 {
    let threads = process.cpu_ticks_of_threads();
    threads
        .iter()
        .filter(|(name, _)| name != "control")
        .map(|(_, ticks)| ticks)
        .sum()
}

/// A guest that does nothing costs nothing: the rings stay armed and the worker asleep.
#[test]
fn an_idle_process_sleeps() {
    let mut host = Host::with_one_port();
    let mut guest = Guest::boot(host.port(), Setup::default());
    guest.rx.fill(20, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
    wake_by_frames(&mut host, &mut guest, &[60, 1514, 60, 1514]);

    let mut statistics = Statistics::connect(host.control());
    let passes = |stats: &Value| count(&stats["workers"][0], "passes");
    let first = statistics.ask();
    let (slept, passed, ticks) = (
        sleeps(&first),
        passes(&first),
        ticks_without_control(&host.product),
    );
    // Enough questions to take many ticks themselves, in which a worker that polls takes as many.
    let asked_from = host.product.cpu_ticks();
    while host.product.cpu_ticks() < asked_from + 50 {
        statistics.ask();
    }
    let last = statistics.ask();
    let (woken, looked) = (sleeps(&last) - slept, passes(&last) - passed);
    let spent = ticks_without_control(&host.product) - ticks;
    assert!(spent <= 3, "an idle process spent {spent} ticks");
    assert!(woken <= 3, "an idle worker went to sleep {woken} times");
    assert!(looked <= 3, "an idle worker looked {looked} times at its lanes");

    // And it is not dead.
    wake_by_frames(&mut host, &mut guest, &[60]);
    drop(guest);
    host.finish();
}
