//! The real binary with card models behind it, for every test that drives the product.
//!
//! ```text
//! test ──vhost-user──▶ vhost-user-vfio ──vfio-user──▶ card-model ──datagrams──▶ test
//!        one socket a port, one control socket         one a port
//! ```
//!
//! [`Product`] is one port for the front-end suite; [`Host`] has one port or two and a control socket.

#![allow(dead_code, reason = "each test binary drives its own part of the product")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::Value;
use tempfile::TempDir;
use tests::frontend::PATIENCE;
use tests::frontend::net::{Form, Layout};
use tests::frontend::process::Process;
use tests::frontend::suite::{
    BackEnd, Guest, RX_BUFFER_BYTES, Running, Setup, assert_port_works, receive_up_to,
};
use tests::frontend::wire::{MIN_FRAME_BYTES, Wire, frame};

/// Builds the binary under test, once, so that no test runs a stale one, and returns its path.
pub(crate) fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
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

/// Starts `command`, which runs the product, with its output in `folder`.
pub(crate) fn start(command: &mut Command, folder: &Path) -> Process {
    Process::start("vhost-user-vfio", command, folder).expect("the product starts")
}

/// Runs the product with `args` to its end, and returns how it ended and all that it printed.
pub(crate) fn run_to_end<S: AsRef<std::ffi::OsStr>>(
    args: impl IntoIterator<Item = S>,
) -> (ExitStatus, String) {
    let folder = TempDir::with_prefix("product-").expect("a temporary folder");
    let mut process = start(Command::new(binary()).args(args), folder.path());
    let status = process.wait_ended();
    (status, process.output())
}

/// Starts a card model whose vfio-user socket is `card` in `folder`.
pub(crate) fn start_card(folder: &Path, wire: &Wire) -> Process {
    let socket = folder.join("card");
    let mut command = Command::new(env!("CARGO_BIN_EXE_card-model"));
    command.arg("--socket").arg(&socket);
    command
        .arg("--wire-local")
        .arg(wire.local())
        .arg("--wire-peer")
        .arg(wire.peer());
    command.arg("--violations").arg(folder.join("violations"));
    command.arg("--control").arg(folder.join("card-control"));
    // Frames wait while no buffer is posted, so a test may send before the guest's buffers are with the card;
    // and buffers the card owns are filled with garbage, so that a leak of one shows.
    command.args(["--hold-frames", "--scribble"]);
    let mut card = Process::start("card-model", &mut command, folder).expect("the card model starts");
    card.wait_listening(&socket);
    card
}

/// Tells the card of [`start_card`] what to suffer, and waits until it does.
pub(crate) fn tell_card(folder: &Path, words: &str) {
    let mut card = UnixStream::connect(folder.join("card-control")).expect("the card listens");
    writeln!(card, "{words}").expect("it goes out");
    let mut answer = String::new();
    BufReader::new(card).read_line(&mut answer).expect("an answer");
    assert_eq!(answer.trim_end(), "ok", "{words}");
}

/// What `--device` takes for the card of [`start_card`].
pub(crate) fn device(folder: &Path) -> String {
    format!("vfio-user:{}", folder.join("card").display())
}

/// Ends a process and checks that it ends well: the product with its DMA stopped, the card with no rule broken.
pub(crate) fn end(process: &mut Process) {
    let status = process.terminate();
    assert!(
        status.success(),
        "it ended with {status} and printed:\n{}",
        process.output()
    );
}

/// One port and its card, as the front-end suite starts them.
pub(crate) struct Product;

impl Product {
    fn spawn(folder: &Path, socket: &Path, wire: &Wire, client: bool) -> Vec<Process> {
        let card = start_card(folder, wire);
        let mut command = Command::new(binary());
        command.arg("--device").arg(device(folder));
        command.arg("--socket-path").arg(socket);
        if client {
            command.arg("--client");
        }
        let mut process = start(&mut command, folder);
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
            end(&mut process);
        }
    }
}

/// A running product with a control socket and one card model a port.
pub(crate) struct Host {
    /// The process under test.
    pub(crate) product: Process,
    /// Its ports: the first is named `a`, the second `b`. Each has its own folder, wire and card.
    pub(crate) ports: Vec<Running>,
    control: PathBuf,
    // Last: the others have files in it.
    _folder: TempDir,
}

impl Host {
    /// Starts a process that serves port `a`.
    pub(crate) fn with_one_port() -> Self {
        Self::start(&["a"], "")
    }

    /// Starts a process that serves port `a`, with these lines more in the port's section of its file.
    pub(crate) fn with_settings(settings: &str) -> Self {
        Self::start(&["a"], settings)
    }

    /// Starts a process that serves ports `a` and `b`, by one worker and on one map.
    pub(crate) fn with_two_ports() -> Self {
        Self::start(&["a", "b"], "")
    }

    fn start(names: &[&str], settings: &str) -> Self {
        let folder = TempDir::with_prefix("product-").expect("a temporary folder");
        let control = folder.path().join("control");
        let mut file = format!("control = '{}'\n", control.display());
        let add = |name: &&str| {
            let port = add_port(name, &mut file);
            file.push_str(settings);
            port
        };
        let ports: Vec<Running> = names.iter().map(add).collect();
        let config = folder.path().join("config.toml");
        std::fs::write(&config, file).expect("a config file");
        let mut product = start(Command::new(binary()).arg("--config").arg(&config), folder.path());
        for (name, port) in names.iter().zip(&ports) {
            // A frame sent while the link negotiates is lost, as on any card.
            product.wait_printed(&format!("link is up port=\"{name}\""));
            product.wait_listening(port.socket());
        }
        product.wait_listening(&control);
        Self {
            product,
            ports,
            control,
            _folder: folder,
        }
    }

    /// Port `a`.
    pub(crate) fn port(&self) -> &Running {
        &self.ports[0]
    }

    /// The path of the control socket.
    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    /// What `stats` shows now, asked in the control socket's own words.
    pub(crate) fn stats(&self) -> Value {
        stats(&self.control)
    }

    /// Waits until the statistics are as `is_so` wants them, and returns them.
    pub(crate) fn wait_stats(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let control = &self.control;
        self.product.wait_until(what, |_| is_so(&stats(control)));
        self.stats()
    }

    /// Waits until nobody is connected to port `a`.
    pub(crate) fn wait_vacant(&mut self) {
        self.wait_stats("its port is vacant", |stats| {
            stats["ports"][0]["connected"] == false
        });
    }

    /// How many descriptors the process has open, once nobody is served who is on the way out.
    pub(crate) fn open_files(&mut self) -> usize {
        self.product
            .wait_until("only its own threads are left", |process| {
                let threads = process.cpu_ticks_of_threads();
                let named = |name: &str| threads.iter().filter(|thread| thread.0.starts_with(name)).count();
                // Each of whom `stats` was asked by is served by a thread of that name, too.
                named("control") == 1 && named("front-end") == 0
            });
        let files = std::fs::read_dir(self.product.procfs().join("fd")).expect("a live process");
        files.count()
    }

    /// Does `mischief` with port `a` while frames go to and fro on port `b`. Every one of them has to arrive, and
    /// some have to come through after the mischief.
    pub(crate) fn beside_traffic<R>(&mut self, mischief: impl FnOnce(&Running) -> R) -> R {
        let [a, b] = self.ports.as_mut_slice() else {
            panic!("two ports are needed");
        };
        beside_traffic(a, b, mischief)
    }

    /// Checks that the process lives and that port `a` takes a front-end and moves its frames.
    pub(crate) fn assert_port_works(&self) {
        assert!(self.product.is_running(), "the product died");
        assert_port_works(self.port());
    }

    /// As [`assert_port_works`](Self::assert_port_works), where frames of a front-end before may still be on the wire.
    pub(crate) fn assert_port_works_after_traffic(&self, highest_sequence: u64) {
        assert!(self.product.is_running(), "the product died");
        let mut guest = Guest::boot(self.port(), Setup::default());
        let wire = &self.port().wire;
        let marker = highest_sequence + 1;
        guest.rx.fill(64, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        receive_up_to(&mut guest.rx, wire, marker);
        let last = frame(marker, MIN_FRAME_BYTES);
        guest.tx.send(&last, Layout::WithData, Form::Direct);
        while wire.recv() != last {}
        drop(guest);
        assert_port_works(self.port());
    }

    /// Ends everything by SIGTERM: the product leaves with 0, and no card saw a rule broken.
    pub(crate) fn finish(mut self) {
        end(&mut self.product);
        for port in &mut self.ports {
            port.processes().iter_mut().for_each(end);
        }
    }
}

/// Starts the card of a port, and writes the port's section of the config file.
fn add_port(name: &str, file: &mut String) -> Running {
    let mut port = Running::prepare();
    let card = start_card(port.folder(), &port.wire);
    let (device, socket) = (device(port.folder()), port.socket().display());
    file.push_str(&format!(
        "\n[port.{name}]\ndevice = '{device}'\nsocket-path = '{socket}'\n"
    ));
    port.processes().push(card);
    port
}

/// What the process behind a control socket counts.
pub(crate) fn stats(control: &Path) -> Value {
    Statistics::connect(control).ask()
}

/// One connection to a control socket.
pub(crate) struct Statistics(BufReader<UnixStream>);

impl Statistics {
    pub(crate) fn connect(control: &Path) -> Self {
        let stream = UnixStream::connect(control).expect("the control socket is served");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout can be set");
        Self(BufReader::new(stream))
    }

    /// Asks for `stats` and returns what comes with `ok`.
    pub(crate) fn ask(&mut self) -> Value {
        let mut answer = String::new();
        self.0
            .get_mut()
            .write_all(b"{\"command\":\"stats\"}\n")
            .expect("a question goes out");
        self.0.read_line(&mut answer).expect("an answer comes");
        let mut answer: Value = serde_json::from_str(&answer).expect("the answer is JSON");
        answer["ok"].take()
    }
}

/// How many frames each way show that a port's traffic flows.
const SOME: u64 = 20;

fn beside_traffic<R>(port: &mut Running, bystander: &mut Running, mischief: impl FnOnce(&Running) -> R) -> R {
    /// Ends the traffic even where the mischief panics, or nobody would see the panic.
    struct EndOnDrop<'a>(&'a AtomicBool);
    impl Drop for EndOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let (moved, over) = (&AtomicU64::new(0), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        let traffic = scope.spawn(move || frames_to_and_fro(bystander, moved, over));
        let end = EndOnDrop(over);
        // One that has failed is joined below, and its panic goes on there.
        let wait_moved = |count: u64| {
            while moved.load(Ordering::Relaxed) < count && !traffic.is_finished() {
                std::thread::yield_now();
            }
        };
        wait_moved(SOME);
        let result = mischief(port);
        wait_moved(moved.load(Ordering::Relaxed) + SOME);
        drop(end);
        if let Err(panic) = traffic.join() {
            std::panic::resume_unwind(panic);
        }
        result
    })
}

/// Moves one frame each way at a time until told that it is over. Each must arrive before the next is sent.
fn frames_to_and_fro(port: &mut Running, moved: &AtomicU64, over: &AtomicBool) {
    let mut guest = Guest::boot(port, Setup::default());
    let mut sequence = 0;
    while !over.load(Ordering::Relaxed) {
        let len = [60, 1514, 300][usize::try_from(sequence % 3).expect("small")];
        guest.send_and_check(&port.wire, sequence, len, Layout::WithData, Form::Direct);
        guest.rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        guest.receive_and_check(&port.wire, sequence, len);
        sequence += 1;
        moved.store(sequence, Ordering::Relaxed);
    }
    guest.check();
}
