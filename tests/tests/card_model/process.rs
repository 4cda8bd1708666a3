//! The card as a process, driven over vfio-user by the crate's own client.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tests::card::regs::{self, Ctrl, Gpie, Tctl};
use vfio_user::Client;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{RCTL, WHOLE_FRAME, frame, low_half};

const CONFIG: u32 = 7;
const MSIX: u32 = 2;
const ERROR: u32 = 3;
const REQUEST: u32 = 4;
/// EVENTFD and TRIGGER of VFIO_IRQ_SET.
const SET_EVENTFD: u32 = 4 | 32;
const RINGS: u64 = 0x10_0000;
const GUEST: u64 = 0x1000_0000;
const TX_RING: u64 = RINGS + 0x1000;

/// The process, and a test's ends of its sockets.
struct Model {
    process: Child,
    folder: TempDir,
    wire: UnixDatagram,
}

impl Model {
    fn start(extra: &[&str]) -> Self {
        let folder = TempDir::new().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let wire = UnixDatagram::bind(at("peer")).expect("the far end of the wire");
        wire.set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a timeout");
        let process = Command::new(env!("CARGO_BIN_EXE_card-model"))
            .arg("--socket")
            .arg(at("vfio"))
            .arg("--wire-local")
            .arg(at("wire"))
            .arg("--wire-peer")
            .arg(at("peer"))
            .arg("--control")
            .arg(at("control"))
            .arg("--violations")
            .arg(at("violations"))
            .args(extra)
            .spawn()
            .expect("the card model starts");
        Self {
            process,
            folder,
            wire,
        }
    }

    fn connect(&self) -> Driver {
        let client = retry(|| Client::new(&self.folder.path().join("vfio")).ok());
        let rings = memfd("vuv-rings", 0x1_0000);
        let guest = memfd("guest-ram", 0x10_0000);
        Driver {
            client,
            rings,
            guest,
            rx_tail: 0,
            tx_tail: 0,
        }
    }

    /// Sends a command to the control socket and returns the lines before `ok`.
    fn control(&self, command: &str) -> Vec<String> {
        let lines = self.answer(command);
        assert!(
            lines.iter().all(|line| !line.starts_with("error")),
            "{command}: {lines:?}"
        );
        lines
    }

    /// Sends a command and returns the lines before `ok`, or up to an error.
    fn answer(&self, command: &str) -> Vec<String> {
        let stream = retry(|| UnixStream::connect(self.folder.path().join("control")).ok());
        (&stream)
            .write_all(format!("{command}\n").as_bytes())
            .expect("a command sent");
        let mut lines = Vec::new();
        for line in BufReader::new(&stream).lines().map_while(Result::ok) {
            if line == "ok" {
                break;
            }
            let is_error = line.starts_with("error");
            lines.push(line);
            if is_error {
                break;
            }
        }
        lines
    }

    fn stat(&self, name: &str) -> u64 {
        let lines = self.control("stats");
        let value = lines
            .iter()
            .find_map(|line| line.strip_prefix(name))
            .expect("a known counter");
        value.trim().parse().expect("a number")
    }

    fn to_card(&self, frame: &[u8]) {
        self.wire
            .send_to(frame, self.folder.path().join("wire"))
            .expect("the card's wire is there");
    }

    fn next_sent(&self) -> Vec<u8> {
        let mut frame = vec![0; 2048];
        let len = self.wire.recv(&mut frame).expect("a frame from the card");
        frame.truncate(len);
        frame
    }

    /// Ends the process as a supervisor would, and returns its exit status and the violations file.
    fn end(mut self) -> (Option<i32>, String) {
        let pid = Pid::from_child(&self.process);
        kill_process(pid, Signal::TERM).expect("a signal sent");
        let status = self.process.wait().expect("it ends");
        let violations = std::fs::read_to_string(self.folder.path().join("violations")).expect("the file");
        (status.code(), violations)
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A driver over vfio-user.
struct Driver {
    client: Client,
    rings: File,
    guest: File,
    rx_tail: u32,
    tx_tail: u32,
}

impl Driver {
    fn read(&mut self, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        self.client
            .region_read(0, u64::from(offset), &mut bytes)
            .expect("a register read");
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.client
            .region_write(0, u64::from(offset), &value.to_le_bytes())
            .expect("a register written");
    }

    fn poll(&mut self, offset: u32, mask: u32, bits: u32) {
        retry(|| (self.read(offset) & mask == bits).then_some(()));
    }

    /// Maps memory and brings the card up, with queue interrupts on vector 0.
    fn bring_up(&mut self) -> EventFd {
        self.client
            .dma_map(0, RINGS, 0x1_0000, self.rings.as_raw_fd())
            .expect("rings mapped");
        self.client
            .dma_map(0, GUEST, 0x10_0000, self.guest.as_raw_fd())
            .expect("guest mapped");
        let eventfd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        self.client
            .set_irqs(MSIX, SET_EVENTFD, 0, 1, &[eventfd.as_raw_fd()])
            .expect("a vector");
        self.client
            .region_write(CONFIG, 4, &[0x06, 0x00])
            .expect("command");
        self.write(regs::CTRL, (Ctrl::FD | Ctrl::SLU).bits());
        self.write(regs::MDIC, 1 << 26 | 1 << 21 | 0x1200);
        for (queue, ring) in [(regs::RX_QUEUES, RINGS), (regs::TX_QUEUES, TX_RING)] {
            self.write(queue + 0x28, 0);
            self.write(queue, low_half(ring));
            self.write(queue + 8, 64 * 16);
            if queue == regs::RX_QUEUES {
                self.write(queue + 0x0C, 0x8200_0002);
            }
            self.write(queue + 0x28, regs::QUEUE_ENABLE);
            self.poll(queue + 0x28, regs::QUEUE_ENABLE, regs::QUEUE_ENABLE);
        }
        self.write(regs::GPIE, Gpie::MSIX_MODE.bits());
        self.write(regs::IVAR, 0x8080);
        self.write(regs::EIAC, 1);
        self.write(regs::EIMS, 1);
        self.write(regs::RLPML, 1522);
        self.write(regs::RCTL, RCTL);
        self.write(regs::TCTL, (Tctl::EN | Tctl::PSP).bits());
        self.poll(regs::STATUS, 2, 2);
        eventfd
    }

    fn post_rx(&mut self, count: u32) {
        for _ in 0..count {
            let slot = u64::from(self.rx_tail % 64);
            self.rings
                .write_all_at(&(GUEST + 2048 * slot).to_le_bytes(), 16 * slot)
                .expect("a descriptor");
            self.rings
                .write_all_at(&[0; 8], 16 * slot + 8)
                .expect("a descriptor");
            self.rx_tail += 1;
        }
        self.write(regs::RX_QUEUES + 0x18, self.rx_tail % 64);
    }

    fn received(&self, slot: u64) -> Option<Vec<u8>> {
        let mut status = [0; 8];
        self.rings
            .read_exact_at(&mut status, 16 * slot + 8)
            .expect("a descriptor");
        let [done, _, _, _, low, high, _, _] = status;
        let mut bytes = vec![0; usize::from(u16::from_le_bytes([low, high]))];
        self.guest
            .read_exact_at(&mut bytes, 2048 * slot)
            .expect("a buffer");
        (done & 1 == 1).then_some(bytes)
    }

    fn send(&mut self, frame: &[u8]) {
        let slot = u64::from(self.tx_tail % 64);
        let len = u32::try_from(frame.len()).expect("a frame");
        self.guest
            .write_all_at(frame, 0x8_0000 + 2048 * slot)
            .expect("a buffer");
        let at = 0x1000 + 16 * slot;
        self.rings
            .write_all_at(&(GUEST + 0x8_0000 + 2048 * slot).to_le_bytes(), at)
            .expect("a descriptor");
        self.rings
            .write_all_at(&(WHOLE_FRAME | len).to_le_bytes(), at + 8)
            .expect("a descriptor");
        self.rings
            .write_all_at(&(len << 14).to_le_bytes(), at + 12)
            .expect("a descriptor");
        self.tx_tail += 1;
        self.write(regs::TX_QUEUES + 0x18, self.tx_tail % 64);
    }
}

fn memfd(name: &str, len: u64) -> File {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(len).expect("a length");
    file
}

/// Tries until it works; the patience only bounds how long a broken test takes to fail.
#[track_caller]
fn retry<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "it never came about");
        std::thread::yield_now();
    }
}

/// Waits until `eventfd` was signalled.
fn wait(eventfd: &EventFd) -> u64 {
    retry(|| eventfd.read().ok())
}

#[test]
fn frames_cross_the_process_both_ways() {
    let model = Model::start(&[]);
    let mut driver = model.connect();
    let eventfd = driver.bring_up();
    driver.post_rx(63);
    model.to_card(&frame(100, 1));
    wait(&eventfd);
    assert_eq!(driver.received(0), Some(frame(100, 1)));
    let started = Instant::now();
    for number in (0..250).cycle().take(2000) {
        driver.send(&frame(1514, number));
        assert_eq!(model.next_sent(), frame(1514, number));
    }
    println!(
        "2000 frames one by one through vfio-user and the wire: {:?}",
        started.elapsed()
    );
    assert_eq!(model.stat("tx_frames"), 2000);
    assert_eq!(model.end(), (Some(0), String::new()));
}

#[test]
fn a_violation_is_in_the_file_on_the_socket_and_in_the_exit_status() {
    let model = Model::start(&[]);
    let mut driver = model.connect();
    driver.bring_up();
    driver.write(regs::RX_QUEUES + 0x18, 64);
    let expected = "rx 0: tail 64 in a ring of 64 descriptors";
    assert_eq!(model.control("violations"), [expected]);
    assert_eq!(model.end(), (Some(3), format!("{expected}\n")));
}

#[test]
fn unmapping_under_a_live_queue_is_seen_across_the_socket() {
    let model = Model::start(&[]);
    let mut driver = model.connect();
    driver.bring_up();
    driver.post_rx(1);
    driver.client.dma_unmap(GUEST, 0x10_0000).expect("a reply");
    let expected = "rx 0: the buffer of slot 0 at iova 0x10000000 was unmapped while the queue is enabled";
    assert_eq!(model.control("violations"), [expected]);
    assert_eq!(model.end().0, Some(3));
}

#[test]
fn the_card_outlives_its_driver_and_is_reset_for_the_next() {
    let model = Model::start(&[]);
    let mut first = model.connect();
    first.bring_up();
    first.post_rx(63);
    drop(first);
    let mut second = model.connect();
    let mut command = [0; 2];
    second
        .client
        .region_read(CONFIG, 4, &mut command)
        .expect("command");
    assert_eq!(command, [0, 0], "Bus Master is off again");
    let eventfd = second.bring_up();
    second.post_rx(1);
    model.to_card(&frame(60, 9));
    wait(&eventfd);
    assert_eq!(second.received(0), Some(frame(60, 9)));
    assert_eq!(model.end(), (Some(0), String::new()));
}

#[test]
fn a_card_told_to_keep_on_receives_while_nobody_drives_it() {
    let model = Model::start(&["--keep-on-close"]);
    let mut driver = model.connect();
    let eventfd = driver.bring_up();
    driver.post_rx(4);
    driver.client.shutdown().expect("the connection ends");
    model.to_card(&frame(60, 5));
    wait(&eventfd);
    assert_eq!(driver.received(0), Some(frame(60, 5)));
    let mut second = model.connect();
    assert_eq!(second.read(regs::RX_QUEUES + 0x18), 4, "as the first one left it");
    assert_eq!(model.end(), (Some(0), String::new()));
}

#[test]
fn held_frames_wait_on_the_wire_for_buffers() {
    let model = Model::start(&["--hold-frames"]);
    let mut driver = model.connect();
    driver.bring_up();
    model.to_card(&frame(60, 1));
    model.to_card(&frame(60, 2));
    driver.post_rx(1);
    let first = retry(|| driver.received(0));
    driver.post_rx(1);
    let second = retry(|| driver.received(1));
    assert_eq!((first, second), (frame(60, 1), frame(60, 2)));
    assert_eq!(model.end(), (Some(0), String::new()));
}

#[test]
fn the_host_tells_whoever_listens_and_nobody_after_the_client_has_gone() {
    let model = Model::start(&[]);
    assert_eq!(model.answer("request"), ["error: no client listens"]);
    let mut driver = model.connect();
    let [request, error] = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    for (index, event) in [(REQUEST, &request), (ERROR, &error)] {
        driver
            .client
            .set_irqs(index, SET_EVENTFD, 0, 1, &[event.as_raw_fd()])
            .expect("an event");
    }
    model.control("aer");
    assert_eq!(wait(&error), 1);
    assert!(request.read().is_err(), "the other one is quiet");
    model.control("request");
    assert_eq!(wait(&request), 1);
    drop(driver);
    retry(|| (model.answer("aer") == ["error: no client listens"]).then_some(()));
    assert_eq!(model.end(), (Some(0), String::new()));
}

#[test]
fn the_control_socket_wedges_queues_and_pulls_cables() {
    let model = Model::start(&[]);
    let mut driver = model.connect();
    driver.bring_up();
    model.control("link down");
    assert_eq!(driver.read(regs::STATUS) & 2, 0);
    model.control("link up");
    driver.poll(regs::STATUS, 2, 2);
    driver.post_rx(1);
    model.control("wedge rx 0");
    driver.write(regs::RX_QUEUES + 0x28, 0);
    for _ in 0..5 {
        assert_ne!(driver.read(regs::RX_QUEUES + 0x28) & regs::QUEUE_ENABLE, 0);
    }
    model.control("unwedge rx 0");
    driver.poll(regs::RX_QUEUES + 0x28, regs::QUEUE_ENABLE, 0);
    model.control("removed");
    assert_eq!(driver.read(regs::STATUS), u32::MAX);
    assert_eq!(model.end(), (Some(0), String::new()));
}
