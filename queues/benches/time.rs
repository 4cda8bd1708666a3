//! Time of one pass of a lane, for information: the same passes that `instructions.rs` counts.
//!
//! Nothing is asserted, since the machine decides. `cargo bench --package queues --bench time` runs it.

#![expect(missing_docs, reason = "the harness makes items of its own")]

mod bed;

use std::time::{Duration, Instant};

use bed::{BURST, Bed, Shape, Way};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn passes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pass");
    group.throughput(Throughput::Elements(BURST.into()));
    for (name, way) in [("tx", Way::Tx), ("rx", Way::Rx)] {
        let mut bed = Bed::steady(way, Shape::One);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|times| {
                let mut taken = Duration::ZERO;
                for _ in 0..times {
                    let start = Instant::now();
                    bed.pass();
                    taken += start.elapsed();
                    // Guest and card do their part off the clock.
                    bed.turn();
                }
                taken
            });
        });
    }
    group.finish();
}

criterion_group!(benches, passes);
criterion_main!(benches);
