//! Where front-ends come from: a socket we listen on, one we connect to, or a descriptor we inherited.
//!
//! ```text
//! Endpoint ──one front-end at a time──▶ connection::serve
//! ```
//!
//! A port has one front-end at a time. A second one is turned away, unless the first has gone and is only being
//! cleaned up after: then it waits for that.
//!
//! Read with: vhost-user, "Backend program conventions".

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use config::SocketSpec;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::connection::{self, End, has_hung_up};
use crate::port::Port;
use crate::session::Session;
use crate::signals::{Stop, Woken};

/// How long to wait before connecting again, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long a front-end that has closed its socket may take to be seen to have.
const HANG_UP_STEP: Duration = Duration::from_millis(10);
const HANG_UP_LOOKS: u32 = 20;
/// How long a connection may take to end when the process stops.
const STOP_BOUND: Duration = Duration::from_secs(1);

/// Why no front-end can come.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Another process listens there.
    #[error("socket path {} is in use by another process", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket is there.
    #[error("socket path {} exists and is no socket; it is left alone", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The folder is missing.
    #[error("socket path {}: its folder {} does not exist", path.display(), folder.display())]
    NoFolder {
        /// The path.
        path: PathBuf,
        /// The folder that is missing.
        folder: PathBuf,
    },
    /// Another failure.
    #[error("socket path {}: {call} failed", path.display())]
    Call {
        /// The path.
        path: PathBuf,
        /// Which call.
        call: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The inherited descriptor is no UNIX stream socket.
    #[error("descriptor {fd} cannot be used as a socket")]
    Inherited {
        /// Its number.
        fd: i32,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// A way for front-ends to come, ready.
#[derive(Debug)]
pub enum Endpoint {
    /// They connect to us.
    Listen {
        /// The socket.
        listener: UnixListener,
        /// Its path, if it is ours to remove.
        path: Option<OwnPath>,
    },
    /// We connect to them.
    Connect {
        /// Their socket.
        path: PathBuf,
    },
    /// One is connected already; there will be no other.
    Connected {
        /// The socket.
        stream: UnixStream,
    },
}

impl Endpoint {
    /// Makes an endpoint ready. Nobody is served yet.
    ///
    /// # Errors
    ///
    /// [`EndpointError`].
    pub fn open(spec: &SocketSpec) -> Result<Self, EndpointError> {
        match spec {
            SocketSpec::Listen { path, mode } => {
                let (listener, path) = listen(path, *mode)?;
                Ok(Self::Listen {
                    listener,
                    path: Some(path),
                })
            }
            SocketSpec::Connect { path } => Ok(Self::Connect { path: path.clone() }),
            SocketSpec::Inherited { fd } => inherit(*fd),
        }
    }

    /// Serves front-ends for `port`, one after the other, until the process stops or none can come any more.
    pub fn serve(self, port: &Arc<Port>, stop: &Stop) {
        match self {
            Self::Listen {
                listener,
                path: _path,
            } => serve_listener(&listener, port, stop),
            Self::Connect { path } => serve_by_connecting(&path, port, stop),
            Self::Connected { stream } => serve_one(stream, port, stop),
        }
    }
}

/// A socket's path, removed when this goes: at the end, and when the start fails half way.
#[derive(Debug)]
pub struct OwnPath(PathBuf);

impl Drop for OwnPath {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds a listening socket with the given mode. A socket that nobody listens on any more is replaced.
///
/// # Errors
///
/// [`EndpointError`].
pub fn listen(path: &Path, mode: u32) -> Result<(UnixListener, OwnPath), EndpointError> {
    let failed = |call| {
        move |source| EndpointError::Call {
            path: path.to_owned(),
            call,
            source,
        }
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(EndpointError::NoFolder {
            path: path.to_owned(),
            folder: folder.to_owned(),
        });
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("stat")(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(EndpointError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                tracing::info!(path = %path.display(), "replacing a socket that nobody listens on");
                std::fs::remove_file(path).map_err(failed("unlink"))?;
            }
            Ok(_) => {
                return Err(EndpointError::InUse {
                    path: path.to_owned(),
                });
            }
            Err(error) => return Err(failed("connect")(error)),
        },
    }
    // Private from the first moment: nobody connects between bind and chmod.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.map_err(failed("bind"))?;
    let own_path = OwnPath(path.to_owned());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed("chmod"))?;
    listener.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
    Ok((listener, own_path))
}

/// Takes over a descriptor that the starter left open, listening or connected.
fn inherit(fd: i32) -> Result<Endpoint, EndpointError> {
    let failed = |source: rustix::io::Errno| EndpointError::Inherited {
        fd,
        source: source.into(),
    };
    let myself: Pid = getpid();
    let pidfd = pidfd_open(myself, PidfdFlags::empty()).map_err(failed)?;
    let socket: OwnedFd = pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).map_err(failed)?;
    if rustix::net::sockopt::socket_domain(&socket).map_err(failed)? != rustix::net::AddressFamily::UNIX {
        return Err(failed(rustix::io::Errno::AFNOSUPPORT));
    }
    if rustix::net::sockopt::socket_acceptconn(&socket).map_err(failed)? {
        let listener = UnixListener::from(socket);
        listener
            .set_nonblocking(true)
            .map_err(|source| EndpointError::Inherited { fd, source })?;
        return Ok(Endpoint::Listen { listener, path: None });
    }
    Ok(Endpoint::Connected {
        stream: UnixStream::from(socket),
    })
}

/// A front-end being served by a thread of its own.
struct Current {
    /// The thread's: closed when that ends.
    connection: Weak<UnixStream>,
    thread: JoinHandle<()>,
}

impl Current {
    /// Whether it is still there. One that has just closed its socket is given a moment to be seen to.
    fn is_there(&self) -> bool {
        !self.thread.is_finished()
            && self
                .connection
                .upgrade()
                .is_some_and(|connection| !has_hung_up(&connection))
    }
}

fn serve_listener(listener: &UnixListener, port: &Arc<Port>, stop: &Stop) {
    let mut current: Option<Current> = None;
    while stop.wait(Some(listener.as_fd()), None) == Woken::Ready {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                tracing::error!(port = port.name(), %error, "accept failed");
                // Out of descriptors, most likely: no spinning while it lasts.
                stop.wait(None, Some(RETRY.0));
                continue;
            }
        };
        if current.as_ref().is_some_and(|current| stays(current, stop)) {
            tracing::warn!(
                port = port.name(),
                "a second front-end is turned away: the port has one"
            );
            continue;
        }
        if let Some(gone) = current.take() {
            finish(gone, port);
        }
        current = spawn(stream, port, stop);
    }
    if let Some(last) = current {
        finish(last, port);
    }
}

/// Whether the present front-end is there to stay, after a moment for one that is just leaving.
fn stays(current: &Current, stop: &Stop) -> bool {
    for _ in 0..HANG_UP_LOOKS {
        if !current.is_there() || stop.wait(None, Some(HANG_UP_STEP)) == Woken::Stop {
            return false;
        }
    }
    true
}

fn finish(current: Current, port: &Port) {
    if current.thread.join().is_err() {
        tracing::error!(port = port.name(), "the connection's thread panicked");
    }
}

fn spawn(stream: UnixStream, port: &Arc<Port>, stop: &Stop) -> Option<Current> {
    let failed =
        |error: std::io::Error| tracing::error!(port = port.name(), %error, "a front-end cannot be served");
    if let Err(error) = stream.set_nonblocking(false) {
        failed(error);
        return None;
    }
    let keep = Arc::new(stream.try_clone().map_err(failed).ok()?);
    let connection = Arc::downgrade(&keep);
    let (for_thread, stop) = (Arc::clone(port), stop.clone());
    let thread = std::thread::Builder::new()
        .name(format!("front-end {}", port.name()))
        .spawn(move || serve_kept(stream, &keep, &for_thread, &stop));
    thread
        .map_err(failed)
        .ok()
        .map(|thread| Current { connection, thread })
}

fn serve_one(stream: UnixStream, port: &Arc<Port>, stop: &Stop) {
    match stream.try_clone() {
        Ok(keep) => serve_kept(stream, &keep, port, stop),
        Err(error) => tracing::error!(port = port.name(), %error, "a front-end cannot be served"),
    }
}

/// Serves one front-end until it goes. `keep` is the same socket: the front-end sees the end only when everything of
/// its has been let go.
fn serve_kept(stream: UnixStream, keep: &UnixStream, port: &Arc<Port>, stop: &Stop) {
    let done = match Stop::new() {
        Ok(done) => done,
        Err(error) => {
            tracing::error!(port = port.name(), %error, "a front-end cannot be served");
            return;
        }
    };
    tracing::info!(port = port.name(), "front-end connected");
    let session = Session::new(Arc::clone(port));
    let end = std::thread::scope(|scope| {
        scope.spawn(|| last_resort(keep, stop, &done));
        let end = connection::serve(stream, &session, stop);
        done.ask();
        end
    });
    session.close();
    // Other duplicates may live on for a moment. An error means it is gone already.
    let _ = keep.shutdown(std::net::Shutdown::Both);
    match end {
        End::Closed => tracing::info!(port = port.name(), "front-end closed the connection"),
        End::Stopped => {}
        End::Broken(why) => tracing::warn!(port = port.name(), "connection ended: {why}"),
    }
}

/// Ends a connection that does not end by itself when the process stops: its front-end may not be reading, and then
/// our answer waits.
fn last_resort(connection: &UnixStream, stop: &Stop, done: &Stop) {
    if stop.wait(Some(done.as_fd()), None) == Woken::Stop && done.wait(None, Some(STOP_BOUND)) != Woken::Stop
    {
        // An error means it has ended just now.
        let _ = connection.shutdown(std::net::Shutdown::Both);
    }
}

fn serve_by_connecting(path: &Path, port: &Arc<Port>, stop: &Stop) {
    let mut pause = RETRY.0;
    let mut told = false;
    while !stop.is_asked() {
        match UnixStream::connect(path) {
            Ok(stream) => {
                (pause, told) = (RETRY.0, false);
                serve_one(stream, port, stop);
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(port = port.name(), path = %path.display(), %error, "no front-end yet, trying on");
                }
            }
        }
        stop.wait(None, Some(pause));
        pause = (pause * 2).min(RETRY.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_bound_with_the_mode_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm0.sock");
        let _listener = listen(&path, 0o660).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
        );
    }

    #[test]
    fn a_path_in_use_is_left_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm0.sock");
        let owner = UnixListener::bind(&path).unwrap();
        let error = listen(&path, 0o600).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("socket path {} is in use by another process", path.display())
        );
        assert!(owner.accept().is_ok(), "the owner still has it");
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm0.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (listener, own_path) = listen(&path, 0o600).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().is_ok());
        drop(own_path);
        assert!(!path.exists(), "and removed at the end");
    }

    #[test]
    fn a_missing_folder_and_a_file_in_the_way_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/vm0.sock");
        let error = listen(&missing, 0o600).unwrap_err().to_string();
        let parent = folder.path().join("no");
        assert_eq!(
            error,
            format!(
                "socket path {}: its folder {} does not exist",
                missing.display(),
                parent.display()
            )
        );

        let file = folder.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        assert!(matches!(
            listen(&file, 0o600),
            Err(EndpointError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
    }

    #[test]
    fn an_inherited_descriptor_is_told_apart_by_what_it_is() {
        use std::os::fd::AsRawFd;
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        assert!(matches!(
            inherit(listener.as_raw_fd()),
            Ok(Endpoint::Listen { path: None, .. })
        ));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(
            inherit(ours.as_raw_fd()),
            Ok(Endpoint::Connected { .. })
        ));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            inherit(file.as_raw_fd()),
            Err(EndpointError::Inherited { .. })
        ));
        assert!(matches!(
            inherit(9999),
            Err(EndpointError::Inherited { fd: 9999, .. })
        ));
    }
}
