//! A front-end that takes away memory in which the card has buffers, which no driver in a guest's kernel does; says
//! what the back end did about it, and exits with 1 unless that is as promised.
//!
//! ```text
//! first region:  rings, tx buffers      stays
//! second region: rx buffers, posted     REM_MEM_REG ──▶ reply: the rx lane paused, the tx lane did not,
//!                                                       the extent is gone, and the card writes there no more
//! ```
//!
//! The frames are real ones: they come from and go to an interface on the card's wire.

#![forbid(unsafe_code)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde::Deserialize;
use tests::frontend::connection::Connection;
use tests::frontend::driver::SplitQueue;
use tests::frontend::memory::{GuestMemory, Plan};
use tests::frontend::net::{Form, Layout, Rx, Tx};
use tests::frontend::vmm::{Manner, RingPlace, Session, feature};
use tests::wire::{Mac, PacketSocket, Pattern, Seen};

/// Takes memory away from the back end while the card has buffers in it.
#[derive(Parser)]
struct Cli {
    /// The port's vhost-user socket.
    #[arg(long)]
    socket: PathBuf,
    /// The back end's control socket.
    #[arg(long)]
    control: PathBuf,
    /// The interface at the other end of the wire.
    #[arg(long)]
    peer: String,
}

const MIB: u64 = 1 << 20;
const STAYS: u64 = 0;
const GOES: u64 = 1 << 32;
const GOES_BYTES: u64 = 4 * MIB;
const RX: u32 = 0;
const TX: u32 = 1;
/// Buffers of a queue.
const SLOTS: u16 = 64;
/// A header and the largest frame.
const RX_BUFFER_BYTES: usize = 12 + 1518;
/// A card's link takes seconds to come up.
const PATIENCE: Duration = Duration::from_secs(60);
const TRY_EVERY: Duration = Duration::from_millis(100);

#[derive(Deserialize)]
struct Answer {
    ok: Stats,
}

#[derive(Deserialize)]
struct Stats {
    ports: Vec<Port>,
    maps: Vec<Map>,
}

#[derive(Deserialize)]
struct Port {
    resets: u64,
    lanes: Vec<Lane>,
}

#[derive(Deserialize)]
struct Lane {
    pauses: u64,
    paused_us: u64,
    extents: Vec<Footprint>,
}

#[derive(Deserialize)]
struct Footprint {
    held: u64,
}

#[derive(Deserialize)]
struct Map {
    mapped_bytes: u64,
}

/// What the back end says of itself, as far as it matters here.
fn stats(control: &Path) -> Result<(Port, u64)> {
    let mut stream =
        UnixStream::connect(control).with_context(|| format!("cannot connect to {}", control.display()))?;
    stream.write_all(b"{\"command\":\"stats\",\"buffers\":\"true\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let Stats { mut ports, maps } = serde_json::from_str::<Answer>(&line)
        .context("these are not the back end's statistics")?
        .ok;
    ensure!(!ports.is_empty(), "there is no port");
    Ok((
        ports.swap_remove(0),
        maps.iter().map(|map| map.mapped_bytes).sum(),
    ))
}

/// The guest, and the other end of its wire.
struct Guest {
    memory: GuestMemory,
    session: Session,
    rx: Rx,
    tx: Tx,
    peer: PacketSocket,
    pattern: Pattern,
}

impl Guest {
    fn boot(cli: &Cli) -> Result<Self> {
        let peer = PacketSocket::open(&cli.peer)?;
        let memory = GuestMemory::new(&[Plan::new(STAYS, 4 * MIB), Plan::new(GOES, GOES_BYTES)])?;
        let connection = Connection::connect(&cli.socket)?;
        let session = Session::negotiate(connection, Manner::Qemu, &memory, feature::MRG_RXBUF, 2)?;
        let queue = |index: u32| {
            let start = STAYS + u64::from(index) * 0x1_0000;
            let place = RingPlace {
                size: 256,
                desc: start,
                avail: start + 0x4000,
                used: start + 0x8000,
            };
            SplitQueue::new(&memory, place)
        };
        let mut rx = Rx::new(queue(RX), &memory, GOES + MIB, SLOTS);
        let mut tx = Tx::new(queue(TX), &memory, STAYS + MIB, SLOTS);
        rx.attach(&session, RX);
        tx.queue.attach(&session, TX);
        session.start(&[(RX, rx.queue.place(), 0), (TX, tx.queue.place(), 0)])?;
        rx.fill(SLOTS.into(), RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
        let pattern = Pattern {
            tag: std::process::id(),
            len_bytes: 1000,
            dst: Mac([0x52, 0x54, 0, 0, 0, 1]),
            src: peer.mac(),
            flow: None,
        };
        Ok(Self {
            memory,
            session,
            rx,
            tx,
            peer,
            pattern,
        })
    }

    fn frame(&self, sequence: u64) -> Vec<u8> {
        let mut frame = Vec::new();
        self.pattern.write(sequence, &mut frame);
        frame
    }

    /// Sends frame `sequence` from the guest, again as long as the wire is not up, until the peer has it.
    fn sends(&mut self, sequence: u64) -> Result<()> {
        let frame = self.frame(sequence);
        let (mut bytes, mut scratch) = (vec![0; 2048], Vec::new());
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            self.tx.reclaim();
            self.tx.send(&frame, Layout::WithData, Form::Direct);
            self.peer.wait(TRY_EVERY)?;
            while let Some(len) = self.peer.receive(&mut bytes)? {
                match self.pattern.check(&bytes[..len], &mut scratch) {
                    Seen::Intact(seen) if seen == sequence => return Ok(()),
                    Seen::Corrupt => bail!("a frame came altered from the guest"),
                    _ => {}
                }
            }
        }
        bail!("frame {sequence} never came from the guest")
    }

    /// Sends frame `sequence` to the guest, again as long as the wire is not up, until the guest has it. Frames of
    /// others and earlier ones are skipped, and every buffer is posted again.
    fn receives(&mut self, sequence: u64) -> Result<()> {
        let (frame, mut scratch) = (self.frame(sequence), Vec::new());
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            self.peer.send(&frame)?;
            self.rx.queue.wait_used(TRY_EVERY);
            while let Some(bytes) = self.rx.try_recv() {
                self.rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
                match self.pattern.check(&bytes, &mut scratch) {
                    Seen::Intact(seen) if seen == sequence => return Ok(()),
                    Seen::Corrupt => bail!("a frame came altered to the guest"),
                    _ => {}
                }
            }
        }
        bail!("frame {sequence} never came to the guest")
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<String> {
    let mut guest = Guest::boot(cli)?;
    guest.sends(0)?;
    guest.receives(1)?;
    let (before, mapped_before) = stats(&cli.control)?;
    let held = |port: &Port| -> Vec<u64> {
        let lanes = port.lanes.iter();
        lanes
            .map(|lane| lane.extents.iter().map(|extent| extent.held).sum())
            .collect()
    };
    ensure!(
        held(&before)[0] > 0,
        "the card has no rx buffer: {:?}",
        held(&before)
    );

    // Under way while the memory goes; fewer than there are buffers, for the card to keep some.
    let stray = guest.frame(2);
    for _ in 0..SLOTS / 4 {
        guest.peer.send(&stray)?;
    }
    let region = guest
        .memory
        .regions()
        .pop()
        .context("the memory has two regions")?;
    let asked = Instant::now();
    guest.session.remove_region(&region)?;
    let replied = asked.elapsed();
    let at_reply = guest.memory.read_vec(GOES, usize::try_from(GOES_BYTES)?);
    let (after, mapped_after) = stats(&cli.control)?;
    for _ in 0..SLOTS {
        guest.peer.send(&stray)?;
    }
    // The guest's way out of the card goes past what came in before it.
    guest.sends(3)?;
    ensure!(
        at_reply == guest.memory.read_vec(GOES, at_reply.len()),
        "the card wrote to the memory after the reply"
    );
    ensure!(
        mapped_before - mapped_after == GOES_BYTES,
        "{} bytes left the map, not {GOES_BYTES}",
        mapped_before - mapped_after
    );
    let pauses: Vec<u64> = before
        .lanes
        .iter()
        .zip(&after.lanes)
        .map(|(was, is)| is.pauses - was.pauses)
        .collect();
    ensure!(pauses == [1, 0], "rx and tx paused {pauses:?} times, not [1, 0]");
    ensure!(
        after.resets == before.resets,
        "{} device resets",
        after.resets - before.resets
    );

    // And back: the same bytes, and the queue from where it was.
    guest.session.add_region(&region)?;
    let base = guest.session.get_vring_base(RX)?;
    guest.session.restart_ring(RX, &guest.rx.queue.place(), base)?;
    guest.receives(4)?;
    guest.rx.check();
    guest.tx.check();
    Ok(format!(
        "{} rx buffers were with the card: reply after {} us, rx paused once for {} us, tx never; nothing was written \
         after it; no device reset; frames again when it came back",
        held(&before)[0],
        replied.as_micros(),
        after.lanes[0].paused_us - before.lanes[0].paused_us
    ))
}
