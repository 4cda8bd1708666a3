//! Starting the processes a test needs, and knowing when they are ready.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::PATIENCE;
use super::event::wait_readable;

/// How often a starting process is looked at: the kernel has no event for "someone listens here now".
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A child process that dies with this value. Its output is shown if the test fails.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, with its output in `folder`.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn start(name: &str, command: &mut Command, folder: &Path) -> io::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let output = File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()?;
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a child has a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self {
            name: name.to_owned(),
            child,
            pidfd,
            log,
        })
    }

    /// Waits until some process listens on the UNIX socket `path`, without connecting to it.
    ///
    /// # Panics
    ///
    /// If this process ends first, or nobody listens within the bound.
    pub fn wait_listening(&mut self, path: &Path) {
        self.wait_until(&format!("it listens on {}", path.display()), |_| {
            is_listening(path)
        });
    }

    /// Waits until the process has printed `words`.
    ///
    /// # Panics
    ///
    /// If it ends first, or does not within the bound.
    pub fn wait_printed(&mut self, words: &str) {
        self.wait_until(&format!("it printed \"{words}\""), |process| {
            process.output().contains(words)
        });
    }

    /// Waits until `is_so`; `what` says it in words.
    ///
    /// # Panics
    ///
    /// If the process ends first, or it is not so within the bound.
    pub fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            // The pidfd becomes readable when the process ends, so an early death is seen at once.
            if wait_readable(self.pidfd.as_fd(), LOOK_EVERY) {
                let status = self.child.wait();
                panic!(
                    "{} ended ({status:?}) before {what}:\n{}",
                    self.name,
                    self.output()
                );
            }
            assert!(
                Instant::now() < deadline,
                "{} ran, but not until {what}:\n{}",
                self.name,
                self.output()
            );
        }
    }

    /// Waits until the process has ended of itself.
    ///
    /// # Panics
    ///
    /// If it does not within the bound.
    pub fn wait_ended(&mut self) -> ExitStatus {
        assert!(
            wait_readable(self.pidfd.as_fd(), PATIENCE),
            "{} does not end; it printed:\n{}",
            self.name,
            self.output()
        );
        self.child.wait().expect("our child can be waited for")
    }

    /// What procfs knows of the process: a folder.
    pub fn procfs(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.child.id()))
    }

    /// Whether the process still runs.
    pub fn is_running(&self) -> bool {
        !wait_readable(self.pidfd.as_fd(), Duration::ZERO)
    }

    /// Asks the process to end and waits until it has.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn terminate(&mut self) -> ExitStatus {
        pidfd_send_signal(&self.pidfd, Signal::TERM).expect("our child can be signalled");
        assert!(
            wait_readable(self.pidfd.as_fd(), PATIENCE),
            "{} ignores SIGTERM",
            self.name
        );
        self.child.wait().expect("our child can be waited for")
    }

    /// Processor time used so far, in clock ticks.
    ///
    /// # Panics
    ///
    /// If the process has ended.
    pub fn cpu_ticks(&self) -> u64 {
        ticks_in(&std::fs::read_to_string(self.procfs().join("stat")).expect("a live process"))
    }

    /// Processor time used so far by each thread there is, in clock ticks, with the thread's name.
    ///
    /// # Panics
    ///
    /// If the process has ended.
    pub fn cpu_ticks_of_threads(&self) -> Vec<(String, u64)> {
        let threads = std::fs::read_dir(self.procfs().join("task")).expect("a live process");
        threads
            .filter_map(|thread| {
                // A thread may end while we look.
                let stat = std::fs::read_to_string(thread.ok()?.path().join("stat")).ok()?;
                let name = stat.split_once('(')?.1.rsplit_once(')')?.0;
                Some((name.to_owned(), ticks_in(&stat)))
            })
            .collect()
    }

    /// What the process has printed so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {} printed:\n{}---", self.name, self.output());
        }
    }
}

/// User and system time in the text of a `stat` file: fields 14 and 15, counted after the name, which may hold
/// spaces (proc(5)).
fn ticks_in(stat: &str) -> u64 {
    let after_name = stat.rsplit_once(')').expect("a name in brackets").1;
    after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().expect("a number"))
        .sum()
}

/// Reads /proc/net/unix, where a listening socket has the flag __SO_ACCEPTCON.
fn is_listening(path: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix").expect("procfs is mounted");
    let path = path.to_str().expect("a plain path");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(ACCEPTS_CONNECTIONS) && fields.next_back() == Some(path)
    })
}
