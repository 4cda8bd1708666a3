//! Whether lanes scale: what one lane moves, and what two pairs' lanes of one card move at once, each on a CPU of its own.
//!
//! Each thread plays guest and card for its lane between passes, and only passes are on the clock: they begin at one moment,
//! so that they overlap. Of each run the median
//! pass counts, and of the runs the median: a neighbour of the machine's does not show. What two lanes would share by
//! mistake, a lock or a cache line, does. Nothing is asserted, since the machine decides; it needs two CPUs.
//! `cargo bench --package queues --bench scaling` runs it.

mod bed;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bed::{BURST, Bed, Shape, Way};
use rustix::thread::{CpuSet, sched_setaffinity};

const RUNS: usize = 41;
const PASSES: usize = 4000;

/// Frames a second of all `beds` at once, each with a thread and a CPU.
fn together(beds: &mut [Bed]) -> f64 {
    let start = Start {
        lanes: beds.len(),
        come: AtomicUsize::new(0),
    };
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (cpu, bed) in beds.iter_mut().enumerate() {
            let start = &start;
            threads.push(scope.spawn(move || alone(cpu, bed, start)));
        }
        threads
            .into_iter()
            .map(|thread| f64::from(BURST) / thread.join().expect("no panic").as_secs_f64())
            .sum()
    })
}

/// Where the threads wait for each other before each pass.
struct Start {
    lanes: usize,
    come: AtomicUsize,
}

impl Start {
    /// Waits until every thread has come for the `pass`th time, from 1 on.
    fn wait(&self, pass: usize) {
        self.come.fetch_add(1, Ordering::AcqRel);
        let mut looks = 0_u32;
        while self.come.load(Ordering::Acquire) < self.lanes * pass {
            std::hint::spin_loop();
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(4096) {
                // The other may want this very CPU.
                std::thread::yield_now();
            }
        }
    }
}

/// The median pass of one lane, while the others run.
fn alone(cpu: usize, bed: &mut Bed, start: &Start) -> Duration {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("the machine has two CPUs");
    let mut taken = Vec::with_capacity(PASSES);
    let before = bed.frames();
    for pass in 1..=PASSES {
        start.wait(pass);
        let began = Instant::now();
        bed.pass();
        taken.push(began.elapsed());
        bed.turn();
    }
    // A pass that moved less would be a fast one.
    assert_eq!(bed.frames() - before, PASSES as u64 * u64::from(BURST));
    median(taken)
}

fn median<T: PartialOrd + Copy>(mut of: Vec<T>) -> T {
    of.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
    of[of.len() / 2]
}

fn main() {
    for (name, way) in [("tx", Way::Tx), ("rx", Way::Rx)] {
        let mut beds = Bed::steady_pairs(2, way, Shape::One);
        let runs: Vec<[f64; 2]> = (0..RUNS)
            .map(|_| [1, 2].map(|lanes| together(&mut beds[..lanes])))
            .collect();
        let [one, two] = [0, 1].map(|at| median(runs.iter().map(|run| run[at]).collect()) / 1e6);
        let times = median(runs.iter().map(|run| run[1] / run[0]).collect());
        println!(
            "{name}: one lane {one:.2} Mframes/s, two {two:.2}, {times:.2} times as many (median of {RUNS} runs)"
        );
    }
}
