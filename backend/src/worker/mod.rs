//! A worker: one thread that owns lanes, polls them while there is work, and sleeps when there is none.
//!
//! ```text
//! commands ──▶ poll every lane ──▶ nothing for poll_us? ──▶ arm kicks and interrupts, look once more ──▶ epoll
//! ```
//!
//! Whatever others want of a lane is a command, run between two passes and answered when it is done. So when a
//! front-end has its reply, it is true.
//!
//! Here is the worker as others see it; `lanes.rs` is its own side, `patience.rs` how long a lane is looked after in vain.

mod lanes;
mod patience;
#[cfg(test)]
mod testing;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use queues::lane::{Counter, Lane};
use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::CpuSet;
use vfio_glue::nudge::ThreadId;

use self::lanes::Lanes;
pub use self::patience::Patience;

/// Names a lane on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneId(u64);

/// The worker's thread has ended: its lanes are gone. Only a defect of ours does that.
#[derive(Debug, thiserror::Error)]
#[error("the worker thread {name} has ended")]
pub struct WorkerGone {
    name: String,
}

/// A lane taken from its worker, and the patience it was added with.
pub type Removed = (Box<dyn Lane>, Patience);

type Command = Box<dyn FnOnce(&mut Lanes) + Send>;

/// A worker as others see it.
#[derive(Debug)]
pub struct Worker {
    name: String,
    commands: Mutex<Sender<Command>>,
    wake: Arc<OwnedFd>,
    pulse: Arc<Pulse>,
    thread_id: ThreadId,
    /// The pulse at the last beat.
    beat: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What a worker and others see of each other without a command.
#[derive(Debug, Default)]
struct Pulse {
    /// Passes so far.
    passes: Counter,
    /// Those of them in which a lane moved something.
    busy_passes: Counter,
    /// What these cost, in cycles of the time stamp counter.
    busy_cycles: Counter,
    /// Sleeps so far.
    sleeps: Counter,
    /// It waits in epoll, where it may stay as long as it likes.
    asleep: AtomicBool,
    /// There may be commands in the channel.
    asked: AtomicBool,
}

impl Worker {
    /// Starts a thread, on CPU `cpu` alone if one is given.
    ///
    /// # Errors
    ///
    /// The system's answer if it gives no thread, no descriptors, or not that CPU.
    pub fn start(name: &str, cpu: Option<usize>) -> std::io::Result<Arc<Self>> {
        let name = name.to_owned();
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let (commands, inbox) = channel();
        let pulse = Arc::<Pulse>::default();
        let lanes = Lanes::new(Arc::clone(&wake), Arc::clone(&pulse))?;
        let (pinned, pin_result) = channel();
        let thread = std::thread::Builder::new().name(name.clone()).spawn(move || {
            let result = cpu.map_or(Ok(()), pin_to).map(|()| ThreadId::current());
            let run = result.is_ok();
            // The starter waits for it; if it has gone, so has the process.
            let _ = pinned.send(result);
            if run {
                lanes.run(&inbox);
            }
        })?;
        let thread_id = pin_result
            .recv()
            .unwrap_or_else(|_| Err(std::io::ErrorKind::BrokenPipe.into()))?;
        Ok(Arc::new(Self {
            name,
            commands: Mutex::new(commands),
            wake,
            pulse,
            thread_id,
            beat: AtomicU64::new(u64::MAX),
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Gives the worker a lane. It is polled from now on.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn add(&self, lane: Box<dyn Lane>, patience: Patience) -> Result<LaneId, WorkerGone> {
        self.run(move |lanes| lanes.add(lane, patience))
    }

    /// Takes a lane from the worker. Once this returns, the worker does not touch it.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn remove(&self, id: LaneId) -> Result<Option<Box<dyn Lane>>, WorkerGone> {
        Ok(self.take(id)?.map(|(lane, _)| lane))
    }

    /// As [`remove`](Self::remove), with the patience it was added with, for one that is to come back.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn take(&self, id: LaneId) -> Result<Option<Removed>, WorkerGone> {
        self.run(move |lanes| lanes.remove(id))
    }

    /// Does something with a lane between two passes, and waits for it.
    ///
    /// # Errors
    ///
    /// [`WorkerGone`].
    pub fn with<R: Send + 'static>(
        &self,
        id: LaneId,
        work: impl FnOnce(&mut dyn Lane) -> R + Send + 'static,
    ) -> Result<Option<R>, WorkerGone> {
        self.run(move |lanes| lanes.find(id).map(|seat| work(seat.lane.as_mut())))
    }

    /// Looks whether the worker has moved since the last call, and nudges it if it stands still while awake: a front-end
    /// has made it wait. To be called about once a second.
    pub fn check_pulse(&self) {
        let passes = self.passes();
        let before = self.beat.swap(passes, Ordering::Relaxed);
        if passes == before && !self.is_asleep() {
            tracing::warn!(worker = self.name, "stands still in a system call and is nudged");
            self.thread_id.nudge();
        }
    }

    /// What its thread is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Passes over its lanes so far. They stand still while it sleeps.
    pub fn passes(&self) -> u64 {
        self.pulse.passes.get()
    }

    /// Those of them in which a lane moved something.
    pub fn busy_passes(&self) -> u64 {
        self.pulse.busy_passes.get()
    }

    /// What [`busy_passes`](Self::busy_passes) cost in all, in cycles of the time stamp counter.
    pub fn busy_cycles(&self) -> u64 {
        self.pulse.busy_cycles.get()
    }

    /// Whether it waits for a wake-up.
    pub fn is_asleep(&self) -> bool {
        self.pulse.asleep.load(Ordering::Acquire)
    }

    /// How often it went to sleep.
    pub fn sleeps(&self) -> u64 {
        self.pulse.sleeps.get()
    }

    fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Lanes) -> R + Send + 'static,
    ) -> Result<R, WorkerGone> {
        let (answer, answered) = channel();
        let command: Command = Box::new(move |lanes| {
            // The asker waits; if it has given up, nobody needs the answer.
            let _ = answer.send(work(lanes));
        });
        let gone = || WorkerGone {
            name: self.name.clone(),
        };
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(command)
            .map_err(|_| gone())?;
        self.ring();
        answered.recv().map_err(|_| gone())
    }

    /// Says that there is a command, to one that looks and to one that sleeps.
    fn ring(&self) {
        // Pairs with the swap before the channel is looked into.
        self.pulse.asked.store(true, Ordering::Release);
        // A full counter is a wake-up that is pending, which is all that is wanted.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The last sender goes and the thread sees it.
        let (nobody, _) = channel();
        *self.commands.get_mut().unwrap_or_else(PoisonError::into_inner) = nobody;
        self.ring();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            tracing::error!(worker = self.name, "panicked");
        }
    }
}

fn pin_to(cpu: usize) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    if cpu >= CpuSet::MAX_CPU {
        return Err(std::io::Error::other(format!(
            "CPU {cpu} is beyond {}",
            CpuSet::MAX_CPU
        )));
    }
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::testing::TestLane;
    use super::*;

    /// Waits for something another thread does.
    fn until(condition: impl Fn() -> bool) {
        let patience = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < patience, "it never happened");
            std::thread::yield_now();
        }
    }

    #[test]
    fn an_idle_worker_sleeps_and_a_kick_wakes_it() {
        let worker = Worker::start("worker0", None).unwrap();
        let (lane, seen, kick) = TestLane::with_work(0);
        seen.work_at_arm.store(true, Ordering::Relaxed);
        let id = worker.add(lane, Patience::For(Duration::ZERO)).unwrap();
        until(|| seen.sleeps.load(Ordering::Relaxed) > 0);
        assert!(
            seen.arms.load(Ordering::Relaxed) >= 2,
            "work found while arming is done before the sleep"
        );
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        until(|| seen.kicks.load(Ordering::Relaxed) == 1);
        let stopped = worker.remove(id).unwrap().map(Lane::stop);
        assert_eq!(stopped.unwrap().first_unused, 7);
    }

    #[test]
    fn passes_stand_still_in_a_sleep() {
        let worker = Worker::start("worker0", None).unwrap();
        let (lane, _seen, kick) = TestLane::with_work(5);
        worker.add(lane, Patience::For(Duration::ZERO)).unwrap();
        until(|| worker.is_asleep());
        let (passes, sleeps) = (worker.passes(), worker.sleeps());
        assert!(passes > 5);
        assert_eq!(worker.busy_passes(), 5);
        assert!(worker.busy_cycles() > 0);
        (0..1000).for_each(|_| std::thread::yield_now());
        // One more, if the wake-up of the command had not been seen yet.
        assert!(worker.passes() <= passes + 1 && worker.sleeps() <= sleeps + 1);
        let sleeps = worker.sleeps();
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        until(|| worker.sleeps() > sleeps);
        assert!(worker.passes() > passes);
    }

    #[test]
    fn a_lane_that_always_has_a_frame_keeps_no_command_waiting() {
        let worker = Worker::start("worker0", None).unwrap();
        let (busy, ..) = TestLane::with_work(u64::MAX);
        let (quiet, quiet_seen, _kick) = TestLane::with_work(0);
        worker.add(busy, Patience::For(Duration::ZERO)).unwrap();
        let sleeps = worker.sleeps();
        let id = worker.add(quiet, Patience::For(Duration::ZERO)).unwrap();
        until(|| quiet_seen.polls.load(Ordering::Relaxed) > 100);
        assert!(worker.remove(id).unwrap().is_some());
        assert_eq!(worker.sleeps(), sleeps);
    }

    #[test]
    fn a_command_wakes_a_sleeping_worker_and_its_answer_is_the_lanes() {
        let worker = Worker::start("worker0", None).unwrap();
        let (lane, seen, _kick) = TestLane::with_work(0);
        let id = worker.add(lane, Patience::For(Duration::ZERO)).unwrap();
        until(|| seen.sleeps.load(Ordering::Relaxed) > 0);
        assert_eq!(worker.with(id, |lane| lane.name().len()).unwrap(), Some(4));
        assert!(worker.remove(id).unwrap().is_some());
        assert!(worker.remove(id).unwrap().is_none());
        assert_eq!(worker.with(id, |_| ()).unwrap(), None);
    }

    #[test]
    fn a_worker_that_polls_for_ever_never_arms() {
        let worker = Worker::start("worker0", None).unwrap();
        let (lane, seen, _kick) = TestLane::with_work(0);
        let id = worker.add(lane, Patience::Forever).unwrap();
        until(|| seen.polls.load(Ordering::Relaxed) > 1000);
        worker.remove(id).unwrap();
        assert_eq!(seen.arms.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_worker_that_stands_still_in_a_system_call_is_nudged_out_of_it() {
        vfio_glue::nudge::install().unwrap();
        let worker = Worker::start("worker0", None).unwrap();
        // Blocking and full: a write waits until somebody reads, and nobody does.
        let trap = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&trap, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (lane, _seen, _kick) = TestLane::with_work(0);
        let id = worker.add(lane, Patience::Forever).unwrap();
        std::thread::scope(|scope| {
            let stuck = scope.spawn(|| {
                worker
                    .with(id, move |_| rustix::io::write(&trap, &1u64.to_ne_bytes()))
                    .unwrap()
            });
            until(|| {
                worker.check_pulse();
                stuck.is_finished()
            });
            assert_eq!(stuck.join().unwrap(), Some(Err(rustix::io::Errno::INTR)));
        });
    }

    #[test]
    fn a_cpu_that_is_not_there_is_an_error() {
        assert!(Worker::start("worker0", Some(1023)).is_err());
        assert!(Worker::start("worker0", Some(100_000)).is_err());
    }
}
