//! The control socket: a test's hand on the card while a real process drives it.
//!
//! Text, one command a line. Each is answered by lines of its own, if any, and then `ok` or `error: ...`:
//!
//! ```text
//! link up|down           pull the cable, put it back
//! wedge rx|tx N          queue N will not be disabled; ends with unwedge or a reset
//! unwedge rx|tx N
//! hang-tx [on|off]       registers answer, nothing is sent
//! removed [on|off]       surprise removal, and a fresh card in its place
//! delay none|steps|MS    when frames complete
//! step N                 complete N frames under `delay steps`
//! drop N                 lose the next N frames from the wire
//! lose-interrupts N      lose the next N messages
//! request                the host wants the card back
//! aer                    the host tells of an error on the bus
//! stats                  counters, one `name value` a line
//! violations             all violations so far, one a line
//! quit                   end the process
//! ```

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use super::Listing;
use super::host::{Event, Host};
use super::shared::Shared;
use crate::card::faults::Delay;
use crate::card::{Direction, QUEUES, RingName};

#[derive(Clone)]
pub(super) struct Control {
    shared: Arc<Shared>,
    host: Host,
    violations: Listing,
    lost_frames: Arc<AtomicU64>,
    quit: mpsc::Sender<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Link(bool),
    Wedge(RingName),
    Unwedge(RingName),
    HangTx(bool),
    Removed(bool),
    Delay(Delay),
    Step(u64),
    Drop(u64),
    LoseInterrupts(u64),
    Tell(Event),
    Stats,
    Violations,
    Quit,
}

impl Control {
    pub(super) fn new(
        shared: Arc<Shared>,
        host: Host,
        violations: Listing,
        lost_frames: Arc<AtomicU64>,
        quit: mpsc::Sender<()>,
    ) -> Self {
        Self {
            shared,
            host,
            violations,
            lost_frames,
            quit,
        }
    }

    /// Serves any number of clients, for ever.
    pub(super) fn serve(self, listener: &UnixListener) {
        for stream in listener.incoming().flatten() {
            let control = self.clone();
            thread::spawn(move || control.converse(&stream));
        }
    }

    /// Answers commands until the client hangs up.
    fn converse(&self, stream: &UnixStream) {
        let mut writer = stream;
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let answer = match parse(&line).and_then(|command| self.obey(command)) {
                Ok(lines) => format!("{lines}ok\n"),
                Err(reason) => format!("error: {reason}\n"),
            };
            if writer.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    }

    /// Carries a command out and returns the lines it answers with, or why it cannot.
    fn obey(&self, command: Command) -> Result<String, String> {
        self.shared.with(|card| match command {
            Command::Link(plugged) => card.set_link(plugged),
            Command::Wedge(ring) => card.wedge(ring),
            Command::Unwedge(ring) => card.unwedge(ring),
            Command::HangTx(hang) => card.hang_tx(hang),
            Command::Removed(removed) => card.set_removed(removed),
            Command::Delay(delay) => card.set_delay(delay),
            Command::Step(frames) => card.step(frames),
            Command::Drop(frames) => card.drop_next(frames),
            Command::LoseInterrupts(messages) => card.lose_interrupts(messages),
            Command::Tell(_) | Command::Stats | Command::Violations | Command::Quit => {}
        });
        Ok(match command {
            Command::Tell(event) => {
                self.host.tell(event)?;
                String::new()
            }
            Command::Stats => {
                let counters = self.shared.with(|card| card.counters());
                format!(
                    "{counters}wire_lost {}\n",
                    self.lost_frames.load(Ordering::Relaxed)
                )
            }
            Command::Violations => {
                let violations = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
                violations
                    .iter()
                    .map(|violation| format!("{violation}\n"))
                    .collect()
            }
            Command::Quit => {
                let _ = self.quit.send(());
                String::new()
            }
            _ => String::new(),
        })
    }
}

fn parse(line: &str) -> Result<Command, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["link", "up"] => Ok(Command::Link(true)),
        ["link", "down"] => Ok(Command::Link(false)),
        ["wedge", direction, queue] => Ok(Command::Wedge(ring(direction, queue)?)),
        ["unwedge", direction, queue] => Ok(Command::Unwedge(ring(direction, queue)?)),
        ["hang-tx"] | ["hang-tx", "on"] => Ok(Command::HangTx(true)),
        ["hang-tx", "off"] => Ok(Command::HangTx(false)),
        ["removed"] | ["removed", "on"] => Ok(Command::Removed(true)),
        ["removed", "off"] => Ok(Command::Removed(false)),
        ["delay", "none"] => Ok(Command::Delay(Delay::None)),
        ["delay", "steps"] => Ok(Command::Delay(Delay::UntilStepped)),
        ["delay", time_ms] => Ok(Command::Delay(Delay::After(Duration::from_millis(number(
            time_ms,
        )?)))),
        ["step", frames] => Ok(Command::Step(number(frames)?)),
        ["drop", frames] => Ok(Command::Drop(number(frames)?)),
        ["lose-interrupts", messages] => Ok(Command::LoseInterrupts(number(messages)?)),
        ["request"] => Ok(Command::Tell(Event::Request)),
        ["aer"] => Ok(Command::Tell(Event::Error)),
        ["stats"] => Ok(Command::Stats),
        ["violations"] => Ok(Command::Violations),
        ["quit"] => Ok(Command::Quit),
        _ => Err(format!("no such command: {line}")),
    }
}

fn ring(direction: &str, queue: &str) -> Result<RingName, String> {
    let direction = match direction {
        "rx" => Direction::Rx,
        "tx" => Direction::Tx,
        other => return Err(format!("neither rx nor tx: {other}")),
    };
    let queue = queue
        .parse()
        .ok()
        .filter(|queue| *queue < QUEUES)
        .ok_or(format!("no such queue: {queue}"))?;
    Ok(RingName { direction, queue })
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("not a number: {word}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_parse_and_nonsense_is_named() {
        let wedge = Command::Wedge(RingName {
            direction: Direction::Rx,
            queue: 3,
        });
        assert_eq!(parse("wedge rx 3"), Ok(wedge));
        assert_eq!(
            parse("delay 25"),
            Ok(Command::Delay(Delay::After(Duration::from_millis(25))))
        );
        assert_eq!(parse("wedge rx 16"), Err("no such queue: 16".to_owned()));
        assert_eq!(
            parse("link sideways"),
            Err("no such command: link sideways".to_owned())
        );
    }
}
