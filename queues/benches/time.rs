//! Time of one pass of a lane, for information: the same passes that `instructions.rs` counts.
//!
//! Nothing is asserted, since the machine decides. `cargo bench --package queues --bench time` runs it.

mod bed;

use std::time::{Duration, Instant};

use bed::{BURST, Bed, Shape, Way};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn passes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pass");
    group.measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(BURST.into()));
    let shapes = [Shape::One, Shape::Two, Shape::IndirectOne, Shape::IndirectTwo];
    for (way, shape) in [Way::Tx, Way::Rx]
        .into_iter()
        .flat_map(|way| shapes.map(|shape| (way, shape)))
    {
        let mut bed = Bed::steady(way, shape);
        group.bench_function(format!("{way:?} {shape:?}"), |bencher| {
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
