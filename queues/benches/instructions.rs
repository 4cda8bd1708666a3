//! Instructions of one pass of a lane: a burst of 32 frames of 64 bytes completed, and another one taken.
//!
//! The lanes and the igb rings are the product's own. The guest and the card do their part between passes, where
//! nothing is counted. `make bench-instructions` runs it, beside the floor in vfio-glue.

#![expect(missing_docs, reason = "the harness makes items of its own")]

mod bed;

use std::hint::black_box;

use bed::{Bed, Shape, Way};
use gungraun::{library_benchmark, library_benchmark_group, main};

#[library_benchmark(setup = Bed::steady)]
#[bench::one(Way::Tx, Shape::One)]
#[bench::two(Way::Tx, Shape::Two)]
#[bench::indirect_one(Way::Tx, Shape::IndirectOne)]
#[bench::indirect_two(Way::Tx, Shape::IndirectTwo)]
fn tx(mut bed: Box<Bed>) -> Box<Bed> {
    black_box(&mut bed).pass();
    bed
}

#[library_benchmark(setup = Bed::steady)]
#[bench::one(Way::Rx, Shape::One)]
#[bench::two(Way::Rx, Shape::Two)]
#[bench::indirect_one(Way::Rx, Shape::IndirectOne)]
#[bench::indirect_two(Way::Rx, Shape::IndirectTwo)]
fn rx(mut bed: Box<Bed>) -> Box<Bed> {
    black_box(&mut bed).pass();
    bed
}

library_benchmark_group!(name = lane, benchmarks = [tx, rx]);

main!(library_benchmark_groups = lane);
