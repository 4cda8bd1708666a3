//! The operator's socket: one JSON object a line in, one a line out. Mode 0600.
//!
//! ```text
//! {"command":"stats"}  ──▶  {"ok":{"ports":[…],"maps":[…]}}   or   {"error":"…"}
//! ```

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vfio_glue::map::MemoryMap;

use crate::endpoint::{EndpointError, OwnPath, listen};
use crate::port::Port;
use crate::report::Report;
use crate::signals::{Stop, Woken};

const MODE: u32 = 0o600;
const MAX_REQUEST_BYTES: u64 = 64 * 1024;
const MAX_CLIENTS: usize = 16;
const CLIENT_BOUND: Duration = Duration::from_secs(5);

/// What an operator may ask.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Counters and maps.
    Stats,
}

/// Why a question had no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens there.
    #[error("cannot reach a running vhost-user-vfio at {}", path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The exchange failed.
    #[error("the control socket {} broke off", path.display())]
    Exchange {
        /// The control socket.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The process refused.
    #[error("{0}")]
    Refused(String),
}

/// What is there to be asked about.
#[derive(Debug)]
pub struct Subjects {
    /// The ports.
    pub ports: Vec<Arc<Port>>,
    /// The maps.
    pub maps: Vec<Arc<MemoryMap>>,
}

impl Subjects {
    fn answer(&self, line: &str) -> Value {
        match serde_json::from_str(line) {
            Ok(Request::Stats) => json!({ "ok": Report::of(&self.ports, &self.maps) }),
            Err(error) => json!({ "error": format!("not understood: {error}") }),
        }
    }
}

/// The control socket, bound and not served yet.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    _path: OwnPath,
}

impl Control {
    /// Binds the socket.
    ///
    /// # Errors
    ///
    /// [`EndpointError`].
    pub fn open(path: &Path) -> Result<Self, EndpointError> {
        let (listener, _path) = listen(path, MODE)?;
        Ok(Self { listener, _path })
    }

    /// Answers until the process stops, each client in a thread of its own.
    pub fn serve(self, subjects: &Subjects, stop: &Stop) {
        let clients = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            while stop.wait(Some(self.listener.as_fd()), None) == Woken::Ready {
                let Ok((stream, _)) = self.listener.accept() else {
                    // Out of descriptors, most likely: no spinning while it lasts.
                    stop.wait(None, Some(Duration::from_millis(100)));
                    continue;
                };
                if clients.load(Ordering::Relaxed) >= MAX_CLIENTS {
                    continue;
                }
                clients.fetch_add(1, Ordering::Relaxed);
                let clients = &clients;
                scope.spawn(move || {
                    if let Err(error) = converse(&stream, subjects, stop) {
                        tracing::debug!(%error, "a control client left early");
                    }
                    clients.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
    }
}

fn converse(stream: &UnixStream, subjects: &Subjects, stop: &Stop) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(CLIENT_BOUND))?;
    stream.set_write_timeout(Some(CLIENT_BOUND))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        if stop.wait(Some(stream.as_fd()), Some(CLIENT_BOUND)) != Woken::Ready {
            return Ok(());
        }
        if reader.by_ref().take(MAX_REQUEST_BYTES).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut answer = subjects.answer(&line).to_string();
        answer.push('\n');
        let mut out = stream;
        out.write_all(answer.as_bytes())?;
    }
}

/// Asks a running process and returns what it says.
///
/// # Errors
///
/// [`AskError`].
pub fn ask(path: &Path, request: &Request) -> Result<Value, AskError> {
    let exchange = |source| AskError::Exchange {
        path: path.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(|source| AskError::Connect {
        path: path.to_owned(),
        source,
    })?;
    let line = serde_json::to_string(request).map_err(|error| exchange(error.into()))?;
    writeln!(stream, "{line}").map_err(exchange)?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).map_err(exchange)?;
    let mut answer: Value = serde_json::from_str(&answer).map_err(|error| exchange(error.into()))?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => Err(AskError::Refused(error.to_owned())),
        None => Ok(answer.get_mut("ok").map(Value::take).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_answered_and_the_next_line_served() {
        let subjects = Subjects {
            ports: Vec::new(),
            maps: Vec::new(),
        };
        for line in ["", "stats", "{\"command\":\"fly\"}", "{}"] {
            let answer = subjects.answer(line);
            assert!(
                answer["error"]
                    .as_str()
                    .is_some_and(|error| error.starts_with("not understood")),
                "{answer}"
            );
        }
        assert_eq!(
            subjects.answer("{\"command\":\"stats\"}")["ok"]["ports"],
            json!([])
        );
    }

    #[test]
    fn a_running_process_is_asked_over_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let control = Control::open(&path).unwrap();
        let stop = Stop::new().unwrap();
        let subjects = Subjects {
            ports: Vec::new(),
            maps: Vec::new(),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| control.serve(&subjects, &stop));
            let stats = ask(&path, &Request::Stats).unwrap();
            assert_eq!((&stats["ports"], &stats["maps"]), (&json!([]), &json!([])));
            stop.ask();
        });
        let error = ask(&path, &Request::Stats).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("cannot reach a running vhost-user-vfio at {}", path.display())
        );
    }
}
