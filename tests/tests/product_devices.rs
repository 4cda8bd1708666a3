//! Maps, ports and devices that come and go at run time, by the real binary's own commands.
//!
//! ```text
//! operator ──map, port, device──▶ control socket ──▶ port a: cards change under its guest, it goes and comes back
//!                                                    port b: same process, same worker, same map: every frame arrives
//! ```
//!
//! Each command is seen to succeed, to change nothing the second time, and to be refused with both facts where it
//! contradicts what there is. What a host does to a device is the subject of `host_events.rs`.

mod product;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use product::{Host, Statistics, binary, device, end, run_to_end, start, start_card};
use serde_json::Value;
use tempfile::TempDir;
use tests::frontend::PATIENCE;
use tests::frontend::net::{Form, Layout};
use tests::frontend::process::Process;
use tests::frontend::suite::{Guest, RX_BUFFER_BYTES, Running, Setup, assert_port_works};
use tests::frontend::wire::{Wire, frame};

/// Whoever types commands to the process behind a control socket.
struct Operator<'a> {
    control: &'a Path,
}

impl Operator<'_> {
    fn types(&self, words: &str) -> (Option<i32>, String) {
        let control = self.control.to_str().expect("a plain path");
        let args = words.split_whitespace().chain(["--control", control]);
        let (status, output) = run_to_end(args);
        (status.code(), output)
    }

    /// The command is done, and says `text`.
    fn does(&self, words: &str, text: &str) {
        assert_eq!(self.types(words), (Some(0), format!("{text}\n")), "{words}");
    }

    /// The command has nothing to do, and says why: `text`.
    fn repeats(&self, words: &str, text: &str) {
        let says = format!("nothing to change: {text}\n");
        assert_eq!(self.types(words), (Some(0), says), "{words}");
    }

    /// The command is refused, and says why: `text`, and perhaps more.
    fn is_refused(&self, words: &str, text: &str) {
        let (code, output) = self.types(words);
        assert_eq!(code, Some(1), "{words}: {output}");
        assert!(
            output.starts_with(&format!("error: {text}")) && output.lines().count() == 1,
            "{words}: wanted \"{text}\", got {output}"
        );
    }

    /// Waits until port `name` is as `is_so` wants it, and returns it.
    fn wait_port(&self, name: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let mut statistics = Statistics::connect(self.control);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let port = port(&statistics.ask(), name);
            if is_so(&port) {
                return port;
            }
            assert!(Instant::now() < deadline, "never {what}: {port}");
        }
    }

    fn wait_link(&self, name: &str) {
        // A frame sent while the link negotiates is lost, as on any card.
        self.wait_port(name, "the link is up", |port| port["link"] == "up");
    }
}

/// One port's statistics; null if there is no such port.
fn port(stats: &Value, name: &str) -> Value {
    let ports = stats["ports"].as_array().expect("a list of ports");
    let found = ports.iter().find(|port| port["name"] == name);
    found.cloned().unwrap_or_default()
}

/// The extents of guest memory that port `name` has on its map: where, how long, and of which file.
fn memory_of(stats: &Value, name: &str) -> Vec<(Value, Value, Value)> {
    let maps = stats["maps"].as_array().expect("a list of maps").iter();
    let extents = maps.flat_map(|map| map["extents"].as_array().expect("a list of extents"));
    extents
        .filter(|extent| {
            extent["owners"]
                .as_array()
                .is_some_and(|owners| owners.contains(&name.into()))
        })
        .map(|extent| {
            (
                extent["iova"].clone(),
                extent["len"].clone(),
                extent["file"].clone(),
            )
        })
        .collect()
}

/// Frames to send that were lost for want of a link or a device.
fn lost(port: &Value) -> u64 {
    let lanes = port["lanes"].as_array().expect("a list of lanes");
    let tx = lanes
        .iter()
        .find(|lane| lane["direction"] == "tx")
        .expect("a tx lane");
    tx["drop_reasons"]["link-down"].as_u64().unwrap_or(0)
}

/// A card that nobody uses yet.
fn spare_card() -> Running {
    let mut spare = Running::prepare();
    let card = start_card(spare.folder(), &spare.wire);
    spare.processes().push(card);
    spare
}

fn finish(host: Host, mut spares: Vec<Running>) {
    host.finish();
    for spare in &mut spares {
        spare.processes().iter_mut().for_each(end);
    }
}

/// Asks for `stats` over and over while `work` is done, and checks that every question was answered.
fn while_stats_answers<R>(control: &Path, work: impl FnOnce() -> R) -> R {
    struct EndOnDrop<'a>(&'a AtomicBool);
    impl Drop for EndOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut statistics = Statistics::connect(control);
            let mut answers = 0_u64;
            while !over.load(Ordering::Relaxed) {
                assert!(statistics.ask()["ports"].is_array());
                answers += 1;
            }
            answers
        });
        let end = EndOnDrop(&over);
        let result = work();
        drop(end);
        assert!(asking.join().expect("every question is answered") > 0);
        result
    })
}

/// Moves frames both ways between a guest and the card behind `wire`.
fn carry_on(guest: &mut Guest, wire: &Wire, from: u64) {
    for sequence in from..from + 20 {
        guest.send_and_check(wire, sequence, 700, Layout::WithData, Form::Direct);
        guest.rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        guest.receive_and_check(wire, sequence, 700);
    }
    guest.check();
}

/// The heart of it: the guest stays, its memory stays where it is, and cards come and go. (R2, R3)
#[test]
fn cards_change_under_a_guest_that_stays() {
    let mut host = Host::with_two_ports();
    let spare = spare_card();
    let control = host.control().to_owned();
    let operator = Operator { control: &control };
    let cards = [
        (device(host.port().folder()), None),
        (device(spare.folder()), Some(&spare.wire)),
    ];
    host.beside_traffic(|running| {
        while_stats_answers(&control, || {
            let mut guest = Guest::boot(running, Setup::default());
            carry_on(&mut guest, &running.wire, 0);
            let memory = memory_of(&product::stats(&control), "a");
            assert!(!memory.is_empty());
            let mut sequence = 100;
            for turn in 0..4_usize {
                let (before, _) = &cards[turn % 2];
                let (after, wire) = &cards[(turn + 1) % 2];
                operator.does(&format!("device detach {before}"), "port a has no device now");
                let stats = product::stats(&control);
                let a = port(&stats, "a");
                assert_eq!((&a["device"], &a["link"]), (&"none".into(), &"down".into()));
                assert_eq!(a["connected"], true, "the guest stays");
                assert_eq!(memory_of(&stats, "a"), memory);
                assert!(
                    !stats["maps"][0]["devices"].to_string().contains(before.as_str()),
                    "{before} is off the map"
                );

                let lost_before = lost(&a);
                for number in 0..5 {
                    guest
                        .tx
                        .send(&frame(9000 + number, 100), Layout::WithData, Form::Direct);
                }
                guest.tx.drain();
                operator.wait_port("a", "frames are lost by count", |port| {
                    lost(port) == lost_before + 5
                });

                operator.does(
                    &format!("device attach {after} --port a"),
                    &format!("port a has {after} now"),
                );
                operator.wait_link("a");
                assert_eq!(memory_of(&product::stats(&control), "a"), memory);
                carry_on(&mut guest, wire.unwrap_or(&running.wire), sequence);
                sequence += 100;
            }
        });
    });
    finish(host, vec![spare]);
}

/// Each beside the traffic of port `b`, which loses nothing.
#[test]
fn what_is_so_already_changes_nothing_and_what_contradicts_is_refused() {
    let mut host = Host::with_two_ports();
    let spare = spare_card();
    let folder = TempDir::with_prefix("devices-").expect("a temporary folder");
    let control = host.control().to_owned();
    let operator = Operator { control: &control };
    let (a, b) = (device(host.ports[0].folder()), device(host.ports[1].folder()));
    let spare_device = device(spare.folder());
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (socket_c, taken, other) = (at("third"), at("taken"), at("other"));
    let absent = format!("vfio-user:{}", at("absent"));
    let owner = UnixListener::bind(&taken).expect("a listener");
    host.beside_traffic(|running| {
        let socket_a = running.socket().display();
        let before = product::stats(&control);

        let make = "map create tenant --iommu vfio-user --map-by file";
        operator.does(make, "map tenant is made");
        operator.repeats(make, "map tenant exists");
        operator.repeats("map create tenant", "map tenant exists");
        operator.is_refused(
            "map create tenant --iommu none",
            "map tenant exists with iommu vfio-user, not none",
        );
        operator.is_refused(
            "map create tenant --map-by address",
            "map tenant exists with map-by file, not address",
        );
        operator.is_refused(
            "map create other --iommu type1 --map-by file",
            "cannot make map other: ",
        );
        operator.is_refused(
            "map show tenent",
            "there is no map `tenent`; did you mean `tenant`?",
        );
        operator.is_refused(
            "map show nowhere",
            "there is no map `nowhere`; there is main, tenant",
        );

        let add = format!("port add third --socket-path {socket_c} --map tenant --mtu 1400");
        operator.does(&add, "port third is added");
        operator.repeats(&add, "port third exists");
        for (more, text) in [
            (
                format!("--socket-path {other} --map tenant --mtu 1400"),
                format!("socket-path {socket_c}, not {other}"),
            ),
            (
                format!("--socket-path {socket_c} --map main --mtu 1400"),
                "map tenant, not main".to_owned(),
            ),
            (
                format!("--socket-path {socket_c} --map tenant"),
                "mtu 1400, not 1500".to_owned(),
            ),
            (
                format!("--socket-path {socket_c} --map tenant --mtu 1400 --poll-us always"),
                "poll-us 50, not always".to_owned(),
            ),
            (
                format!("--socket-path {socket_c} --map tenant --mtu 1400 --socket-mode 660"),
                "socket-mode 0600, not 0660".to_owned(),
            ),
            (
                format!("--socket-path {socket_c} --map tenant --mtu 1400 --client"),
                "client false, not true".to_owned(),
            ),
            (
                format!("--socket-path {socket_c} --map tenant --mtu 1400 --device {spare_device}"),
                format!("device none, not {spare_device}"),
            ),
        ] {
            operator.is_refused(
                &format!("port add third {more}"),
                &format!("port third exists with {text}"),
            );
        }
        operator.is_refused(
            &format!("port add d --socket-path {socket_a}"),
            &format!("socket path {socket_a} is port a's"),
        );
        operator.is_refused(
            &format!("port add d --socket-path {}", control.display()),
            &format!("socket path {} is the control socket's", control.display()),
        );
        operator.is_refused(
            &format!("port add d --socket-path {taken}"),
            &format!("socket path {taken} is in use by another process"),
        );
        operator.is_refused(
            &format!("port add d --socket-path {other} --map mian"),
            "there is no map `mian`; did you mean `main`?",
        );
        operator.is_refused(
            &format!("port add d --socket-path {other} --device {b}"),
            &format!("{b} is at port b on map main; detach it first"),
        );
        operator.is_refused(
            &format!("port add d --socket-path {other} --device {absent}"),
            &format!("cannot open {absent} for port d: "),
        );
        assert!(!Path::new(&other).exists(), "nothing half-made stays");
        operator.is_refused("map destroy main", "map main is used by ports a, b");
        operator.is_refused("map destroy tenant", "map tenant is used by port third");

        let attach = |device: &str, port: &str| format!("device attach {device} --port {port}");
        operator.repeats(&attach(&a, "a"), &format!("port a has {a}"));
        operator.is_refused(
            &attach(&spare_device, "a"),
            &format!("port a has {a}; detach it first"),
        );
        operator.is_refused(
            &attach(&spare_device, "nobody"),
            "there is no port `nobody`; there is a, b, third",
        );
        operator.is_refused(
            &attach(&spare_device, "thrid"),
            "there is no port `thrid`; did you mean `third`?",
        );
        operator.is_refused(
            &attach(&b, "third"),
            &format!("{b} is at port b on map main; detach it first"),
        );
        operator.is_refused(
            &attach("ff:1f.7", "third"),
            "map tenant has iommu vfio-user, and 0000:ff:1f.7 needs one with iommufd or type1",
        );
        operator.is_refused(
            &attach(&absent, "third"),
            &format!("cannot open {absent} for port third: "),
        );
        operator.does(
            &attach(&spare_device, "third"),
            &format!("port third has {spare_device} now"),
        );
        operator.repeats(&add, "port third exists");
        let detach = format!("device detach {spare_device}");
        operator.does(&detach, "port third has no device now");
        operator.repeats(&detach, &format!("no port has {spare_device}"));

        operator.does("port remove third", "port third is removed");
        operator.repeats("port remove third", "there is no port third");
        assert!(!Path::new(&socket_c).exists());
        operator.does("map destroy tenant", "map tenant is destroyed");
        operator.repeats("map destroy tenant", "there is no map tenant");

        let after = product::stats(&control);
        for kind in ["ports", "maps"] {
            let names = |stats: &Value| -> Vec<Value> {
                let all = stats[kind].as_array().expect("a list").iter();
                all.map(|one| one["name"].clone()).collect()
            };
            assert_eq!(names(&before), names(&after), "nothing half-made stays");
        }
    });
    owner.set_nonblocking(true).expect("a flag");
    assert!(owner.accept().is_ok(), "the owner still has its socket");
    for words in ["map create a.b", "device attach none --port a", "port add q"] {
        assert_eq!(operator.types(words).0, Some(2), "{words}");
    }
    let nobody = folder.path().join("nobody");
    Operator { control: &nobody }.is_refused("port remove a", "cannot reach a running vhost-user-vfio at ");
    host.assert_port_works();
    finish(host, vec![spare]);
}

#[test]
fn a_port_is_removed_under_its_guest_and_added_again_by_the_same_name() {
    let mut host = Host::with_two_ports();
    let control = host.control().to_owned();
    let operator = Operator { control: &control };
    let card = device(host.port().folder());
    host.beside_traffic(|running| {
        while_stats_answers(&control, || {
            let socket = running.socket().display();
            let add = format!("port add a --socket-path {socket} --device {card}");
            for _ in 0..3 {
                let mut guest = Guest::boot(running, Setup::default());
                carry_on(&mut guest, &running.wire, 0);
                operator.does("port remove a", "port a is removed");
                assert!(!running.socket().exists());
                let stats = product::stats(&control);
                assert!(port(&stats, "a").is_null());
                assert_eq!(memory_of(&stats, "a"), vec![], "its memory left the map");
                assert!(!stats["maps"][0]["devices"].to_string().contains(card.as_str()));
                let answer = guest
                    .session
                    .connection()
                    .request_u64(tests::frontend::connection::request::GET_FEATURES);
                assert!(answer.is_err(), "its front-end was disconnected");

                operator.does(&add, "port a is added");
                operator.wait_link("a");
            }
            assert_port_works(running);
        });
    });
    host.finish();
}

/// From nothing but a control socket to frames on a card, and back to nothing.
#[test]
fn a_process_starts_with_nothing_and_outlives_what_it_is_given() {
    let mut spare = spare_card();
    let folder = TempDir::with_prefix("devices-").expect("a temporary folder");
    let control = folder.path().join("control");
    let mut product = start(
        Command::new(binary()).arg("--control").arg(&control),
        folder.path(),
    );
    product.wait_listening(&control);
    let operator = Operator { control: &control };
    operator.does("map show", "there is no map");

    // Into a map of its own, filled before any card is there.
    let (socket, card) = (spare.socket().display(), device(spare.folder()));
    operator.does("map create own --iommu vfio-user", "map own is made");
    operator.does(
        &format!("port add p --socket-path {socket} --map own"),
        "port p is added",
    );
    let mut guest = Guest::boot(&spare, Setup::default());
    assert!(!memory_of(&product::stats(&control), "p").is_empty());
    operator.does(
        &format!("device attach {card} --port p"),
        &format!("port p has {card} now"),
    );
    operator.wait_link("p");
    carry_on(&mut guest, &spare.wire, 0);
    let (code, shown) = operator.types("map show own");
    assert_eq!(code, Some(0), "{shown}");
    for part in [
        "map own: vfio-user, ",
        &format!("device {card}"),
        "guest-memory",
        "# mapped",
        ". free",
        "- usable",
    ] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }
    let (code, json) = operator.types("map show own --json");
    let json: Value = serde_json::from_str(&json).expect("JSON and nothing else");
    assert_eq!((code, &json["maps"][0]["name"]), (Some(0), &"own".into()));
    operator.does("port remove p", "port p is removed");
    drop(guest);
    operator.does("map destroy own", "map own is destroyed");
    operator.does("map show", "there is no map");

    // And into main, which is made as it is needed, and not left behind by a port that cannot be had.
    let absent = format!("vfio-user:{}", folder.path().join("absent").display());
    let add = |device: &str| format!("port add p --socket-path {socket} --device {device}");
    operator.is_refused(&add(&absent), &format!("cannot open {absent} for port p"));
    operator.does("map show", "there is no map");
    operator.does(&add(&card), "port p is added");
    operator.wait_link("p");
    assert_port_works(&spare);
    operator.does("port remove p", "port p is removed");
    assert!(product.is_running(), "a command never ends the process");
    end(&mut product);
    assert!(!control.exists());
    spare.processes().iter_mut().for_each(end);
}

/// Asks for one thing after the other on one connection, as the rounds below are many.
struct Line(BufReader<UnixStream>);

impl Line {
    fn does(&mut self, request: &Value) {
        let stream = self.0.get_mut();
        writeln!(stream, "{request}").expect("a question goes out");
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("an answer comes");
        let answer: Value = serde_json::from_str(&answer).expect("the answer is JSON");
        assert_eq!(answer["ok"]["changed"], true, "{request}: {answer}");
    }
}

fn threads(process: &Process) -> usize {
    let threads = std::fs::read_dir(process.procfs().join("task")).expect("a live process");
    threads.count()
}

/// A leak of one descriptor, thread, mapping or extent a round would show.
#[test]
fn fifty_rounds_of_devices_and_of_ports_leave_nothing_behind() {
    let mut host = Host::with_one_port();
    let spare = spare_card();
    let control = host.control().to_owned();
    let line = || {
        Line(BufReader::new(
            UnixStream::connect(&control).expect("it is served"),
        ))
    };
    let (card, socket) = (
        device(spare.folder()),
        spare.folder().join("b").display().to_string(),
    );
    let add = serde_json::json!({ "command": "port-add", "name": "b", "socket-path": socket });
    let remove = serde_json::json!({ "command": "port-remove", "name": "b" });
    let attach = serde_json::json!({ "command": "device-attach", "device": card, "port": "b" });
    let detach = serde_json::json!({ "command": "device-detach", "device": card });
    let mut add_with_card = add.clone();
    add_with_card["device"] = card.clone().into();

    let seen = |host: &mut Host| {
        let files = host.open_files();
        let maps = host.stats()["maps"].clone();
        let extents = maps[0]["extents"].as_array().expect("a list").len();
        (files, extents)
    };
    let mut once = line();
    // What is made once and kept has been made before anything is counted.
    for request in [&add, &attach, &detach, &remove] {
        once.does(request);
    }
    drop(once);
    let before = seen(&mut host);
    let threads_before = threads(&host.product);
    let mut rounds = line();
    rounds.does(&add);
    for _ in 0..50 {
        rounds.does(&attach);
        rounds.does(&detach);
    }
    rounds.does(&remove);
    for _ in 0..50 {
        rounds.does(&add_with_card);
        rounds.does(&remove);
    }
    drop(rounds);
    assert_eq!(seen(&mut host), before);
    // The question before may still have its thread.
    host.product.wait_until("no thread is left behind", |product| {
        threads(product) <= threads_before
    });
    host.assert_port_works();
    finish(host, vec![spare]);
}
