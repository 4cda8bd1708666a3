//! The four things done with checked frames: send them, receive them, send them back, and send through a path.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::frame::{Pattern, Seen};
use super::packet_socket::{PacketSocket, WireError};
use super::tally::Tally;

/// Longer than any frame we make, so that one grown on the way is seen whole.
const RECEIVE_BYTES: usize = 16 << 10;
/// How often a path that is not there yet is asked again.
const PROBE_EVERY: Duration = Duration::from_millis(100);
/// How long an interface without room is left alone.
const FULL_FOR: Duration = Duration::from_millis(1);

/// When to stop sending.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// After this many frames.
    Frames(u64),
    /// After this long.
    Time(Duration),
    /// When somebody has set this.
    Flag(&'static AtomicBool),
}

impl Limit {
    pub(super) fn is_reached(self, sent: u64, begun: Instant) -> bool {
        match self {
            Self::Frames(frames) => sent >= frames,
            Self::Time(time) => begun.elapsed() >= time,
            Self::Flag(stop) => stop.load(Ordering::Relaxed),
        }
    }
}

/// How a run goes.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// The frames.
    pub pattern: Pattern,
    /// How many.
    pub limit: Limit,
    /// Frames under way at once, where the receiver is here as well.
    pub window: u64,
    /// How long nothing may come before the rest counts as lost.
    pub idle: Duration,
    /// How long the path may take to come up.
    pub up_within: Duration,
}

/// Sends through `from` and receives at `to`, with at most `run.window` frames under way.
///
/// First waits until a probe comes through, so the ends may still be starting. After a stretch of `run.idle`
/// without a frame, what is under way counts as lost and the run ends.
///
/// # Errors
///
/// [`WireError`] if an interface fails. A path that never comes up is a tally of one expected frame, missing.
pub fn through(from: &PacketSocket, to: &PacketSocket, run: &Run) -> Result<Tally, WireError> {
    let mut tally = Tally::default();
    if !comes_up(from, to, run)? {
        tally.expected = 1;
        return Ok(tally);
    }
    let mut receiver = Receiver::new(to, run.pattern);
    let mut frame = Vec::new();
    let (mut sent, mut done) = (0, false);
    let begun = Instant::now();
    let mut last = begun;
    while !done || tally.missing() > 0 {
        while !done && tally.missing() < run.window {
            done = run.limit.is_reached(sent, begun);
            if done {
                break;
            }
            run.pattern.write(sent, &mut frame);
            if !from.send(&frame)? {
                break;
            }
            sent += 1;
            tally.expected = sent;
        }
        if receiver.drain(&mut tally)? {
            last = Instant::now();
        } else if tally.missing() == 0 {
            to.wait(FULL_FOR)?;
        } else if !to.wait(run.idle.saturating_sub(last.elapsed()))? {
            break;
        }
    }
    Ok(tally)
}

/// Sends `run`'s frames, no faster than one each `gap`.
///
/// # Errors
///
/// [`WireError`] if the interface fails.
pub fn send(socket: &PacketSocket, run: &Run, gap: Duration) -> Result<u64, WireError> {
    let mut frame = Vec::new();
    let begun = Instant::now();
    let mut sent = 0;
    while !run.limit.is_reached(sent, begun) {
        run.pattern.write(sent, &mut frame);
        if !socket.send(&frame)? {
            std::thread::park_timeout(FULL_FOR);
            continue;
        }
        sent += 1;
        // Against the start, not the last frame: a late wake-up is made good and the rate holds.
        let due = gap.saturating_mul(u32::try_from(sent).unwrap_or(u32::MAX));
        let early = due.saturating_sub(begun.elapsed());
        if early > FULL_FOR {
            std::thread::park_timeout(early);
        }
    }
    Ok(sent)
}

/// Receives until all frames are there or nothing came for `run.idle`.
///
/// # Errors
///
/// [`WireError`] if the interface fails.
pub fn receive(socket: &PacketSocket, run: &Run) -> Result<Tally, WireError> {
    let mut tally = Tally::default();
    if let Limit::Frames(frames) = run.limit {
        tally.expected = frames;
    }
    let mut receiver = Receiver::new(socket, run.pattern);
    let mut patience = run.up_within;
    let begun = Instant::now();
    let by_count = matches!(run.limit, Limit::Frames(_));
    while tally.missing() > 0 || (!by_count && !run.limit.is_reached(0, begun)) {
        if receiver.drain(&mut tally)? {
            patience = run.idle;
        } else if !socket.wait(patience)? {
            break;
        }
    }
    if !by_count {
        tally.expected = tally.highest();
    }
    Ok(tally)
}

/// Sends every frame of the run back where it came from, until nothing came for `run.idle`; counts them.
///
/// # Errors
///
/// [`WireError`] if the interface fails.
pub fn echo(socket: &PacketSocket, run: &Run) -> Result<Tally, WireError> {
    let mut tally = Tally::default();
    let (mut frame, mut scratch) = (vec![0; RECEIVE_BYTES], Vec::new());
    let mut patience = run.up_within;
    while !matches!(run.limit, Limit::Frames(frames) if tally.intact >= frames) {
        let Some(len) = socket.receive(&mut frame)? else {
            if !socket.wait(patience)? {
                break;
            }
            continue;
        };
        let seen = run.pattern.check(&frame[..len], &mut scratch);
        if seen == Seen::Foreign {
            continue;
        }
        patience = run.idle;
        tally.count(seen, len);
        let (there, back) = frame[..12].split_at_mut(6);
        there.swap_with_slice(back);
        while !socket.send(&frame[..len])? {
            std::thread::park_timeout(FULL_FOR);
        }
    }
    tally.expected = match run.limit {
        Limit::Frames(frames) => frames,
        Limit::Time(_) | Limit::Flag(_) => tally.highest(),
    };
    Ok(tally)
}

/// Whether a probe comes through within `run.up_within`.
pub(super) fn comes_up(from: &PacketSocket, to: &PacketSocket, run: &Run) -> Result<bool, WireError> {
    let mut receiver = Receiver::new(to, run.pattern);
    let mut probe = Vec::new();
    run.pattern.write_probe(&mut probe);
    let begun = Instant::now();
    while begun.elapsed() < run.up_within {
        from.send(&probe)?;
        let asked = Instant::now();
        while asked.elapsed() < PROBE_EVERY {
            if receiver.sees(Seen::Probe)? {
                return Ok(true);
            }
            to.wait(PROBE_EVERY.saturating_sub(asked.elapsed()))?;
        }
    }
    Ok(false)
}

/// The receiving end of a run.
pub(super) struct Receiver<'a> {
    socket: &'a PacketSocket,
    pattern: Pattern,
    frame: Vec<u8>,
    scratch: Vec<u8>,
}

impl<'a> Receiver<'a> {
    pub(super) fn new(socket: &'a PacketSocket, pattern: Pattern) -> Self {
        Self {
            socket,
            pattern,
            frame: vec![0; RECEIVE_BYTES],
            scratch: Vec::new(),
        }
    }

    /// Counts the frames that wait; false if none of them is of this run.
    fn drain(&mut self, tally: &mut Tally) -> Result<bool, WireError> {
        let mut any = false;
        while let Some(len) = self.socket.receive(&mut self.frame)? {
            let seen = self.pattern.check(&self.frame[..len], &mut self.scratch);
            any |= matches!(seen, Seen::Intact(_) | Seen::Corrupt);
            tally.count(seen, len);
        }
        Ok(any)
    }

    /// Whether this one is among the frames that wait, of which those before it are passed over.
    pub(super) fn sees(&mut self, wanted: Seen) -> Result<bool, WireError> {
        while let Some(len) = self.socket.receive(&mut self.frame)? {
            if self.pattern.check(&self.frame[..len], &mut self.scratch) == wanted {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
