//! The operator's socket: one JSON object a line in, one a line out. Mode 0600.
//!
//! ```text
//! {"command":"stats"}                         ──▶  {"ok":{"ports":[…],"maps":[…]}}        or  {"error":"…"}
//! {"command":"map-create","name":"tenant-b"}  ──▶  {"ok":{"changed":true,"text":"…"}}
//! ```
//!
//! What can be asked, and with which keys, is `config`'s [`Order`]. Values are text; numbers, `true` and `false` may
//! stand without quotes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use config::Order;
use serde_json::{Map, Value, json};

use crate::endpoint::{EndpointError, OwnPath, listen};
use crate::inventory::{Inventory, InventoryError, Outcome};
use crate::report::{Detail, Report};
use crate::signals::{Stop, Woken};

const MODE: u32 = 0o600;
const MAX_REQUEST_BYTES: u64 = 64 * 1024;
const MAX_CLIENTS: usize = 16;
const CLIENT_BOUND: Duration = Duration::from_secs(5);

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

/// Does what one line asks for, and returns the line that answers it.
fn answer(inventory: &Arc<Inventory>, line: &str) -> Value {
    let order = match read(line) {
        Ok(order) => order,
        Err(error) => return json!({ "error": format!("not understood: {error}") }),
    };
    tracing::debug!(command = order.command(), "operator");
    match obey(inventory, &order) {
        Ok(value) => json!({ "ok": value }),
        Err(error) => {
            let error = config::chain(&error);
            if !matches!(order, Order::Stats { .. }) {
                tracing::warn!(command = order.command(), "refused: {error}");
            }
            json!({ "error": error })
        }
    }
}

fn read(line: &str) -> Result<Order, String> {
    let mut object: Map<String, Value> = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let command = match object.remove("command") {
        Some(Value::String(command)) => command,
        _ => return Err("there is no `command`".to_owned()),
    };
    let mut fields = Vec::new();
    for (key, value) in object {
        let text = match value {
            Value::String(text) => text,
            Value::Number(number) => number.to_string(),
            Value::Bool(flag) => flag.to_string(),
            _ => return Err(format!("`{key}` is neither text, a number, true nor false")),
        };
        fields.push((key, text));
    }
    Order::read(&command, &fields).map_err(|error| config::chain(&error))
}

fn obey(inventory: &Arc<Inventory>, order: &Order) -> Result<Value, InventoryError> {
    let outcome = match order {
        Order::Stats { buffers } => {
            let detail = if *buffers {
                Detail::Buffers
            } else {
                Detail::Counters
            };
            let (ports, maps, workers) = (inventory.ports(), inventory.maps(), inventory.workers());
            return Ok(json!(Report::of(&ports, &maps, &workers, detail)));
        }
        Order::MapShow { name } => {
            let maps = match name {
                Some(name) => vec![inventory.map(name)?],
                None => inventory.maps(),
            };
            return Ok(json!({ "maps": Report::of(&[], &maps, &[], Detail::Counters).maps }));
        }
        Order::MapCreate(map) => inventory.create_map(map, &[])?,
        Order::MapDestroy { name } => inventory.destroy_map(name)?,
        Order::MapCheck { name } => inventory.check_maps(name.as_deref())?,
        Order::DeviceAttach { device, port } => inventory.attach_device(device, port)?,
        Order::DeviceDetach { device } => inventory.detach_device(device)?,
        Order::PortAdd(port) => inventory.add_port(port)?,
        Order::PortRemove { name } => inventory.remove_port(name)?,
    };
    Ok(match outcome {
        Outcome::Changed(text) => json!({ "changed": true, "text": text }),
        Outcome::AlreadySo(text) => json!({ "changed": false, "text": text }),
    })
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
    pub fn serve(self, inventory: &Arc<Inventory>, stop: &Stop) {
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
                    if let Err(error) = converse(&stream, inventory, stop) {
                        tracing::debug!(%error, "a control client left early");
                    }
                    clients.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
    }
}

fn converse(stream: &UnixStream, inventory: &Arc<Inventory>, stop: &Stop) -> std::io::Result<()> {
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
        let mut answer = answer(inventory, &line).to_string();
        answer.push('\n');
        let mut out = stream;
        out.write_all(answer.as_bytes())?;
    }
}

/// Asks a running process and returns what it says. Blocks for as long as it takes to do what is asked.
///
/// # Errors
///
/// [`AskError`].
pub fn ask(path: &Path, order: &Order) -> Result<Value, AskError> {
    let exchange = |source| AskError::Exchange {
        path: path.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(|source| AskError::Connect {
        path: path.to_owned(),
        source,
    })?;
    let mut request = Map::new();
    request.insert("command".to_owned(), order.command().into());
    request.extend(
        order
            .fields()
            .into_iter()
            .map(|(key, text)| (key.to_owned(), text.into())),
    );
    writeln!(stream, "{}", Value::Object(request)).map_err(exchange)?;
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

    struct AskOnDrop<'a>(&'a Stop);

    impl Drop for AskOnDrop<'_> {
        fn drop(&mut self) {
            self.0.ask();
        }
    }

    fn empty() -> Arc<Inventory> {
        Inventory::new(Vec::new(), None, &Stop::new().unwrap()).unwrap()
    }

    #[test]
    fn what_is_not_understood_is_answered_and_the_next_line_served() {
        let inventory = empty();
        for line in [
            "",
            "stats",
            "{\"command\":\"fly\"}",
            "{\"command\":7}",
            "{}",
            "{\"command\":\"map-show\",\"name\":[]}",
            "{\"command\":\"port-add\",\"name\":\"a\",\"socket-path\":\"s\",\"mtu\":9000}",
        ] {
            let answer = answer(&inventory, line);
            assert!(
                answer["error"]
                    .as_str()
                    .is_some_and(|error| error.starts_with("not understood")),
                "{answer}"
            );
        }
        assert_eq!(
            answer(&inventory, "{\"command\":\"stats\"}")["ok"]["ports"],
            json!([])
        );
    }

    #[test]
    fn a_running_process_is_asked_over_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let control = Control::open(&path).unwrap();
        let stop = Stop::new().unwrap();
        let inventory = empty();
        std::thread::scope(|scope| {
            scope.spawn(|| control.serve(&inventory, &stop));
            // Whatever fails: the scope waits for the server.
            let _stop = AskOnDrop(&stop);
            let stats = ask(&path, &Order::Stats { buffers: true }).unwrap();
            assert_eq!((&stats["ports"], &stats["maps"]), (&json!([]), &json!([])));
            let none = Order::MapDestroy { name: "x".to_owned() };
            assert_eq!(
                ask(&path, &none).unwrap(),
                json!({ "changed": false, "text": "there is no map x" })
            );
            let unknown = Order::MapShow {
                name: Some("x".to_owned()),
            };
            assert_eq!(
                ask(&path, &unknown).unwrap_err().to_string(),
                "there is no map `x`; there is none"
            );
        });
        let error = ask(&path, &Order::Stats { buffers: false })
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            format!("cannot reach a running vhost-user-vfio at {}", path.display())
        );
    }
}
