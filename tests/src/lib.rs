//! What the tests are made of: everything around the back end that is not the back end.
//!
//! `frontend` plays the VMM and the guest over a real socket, `reference` is a plain copying back end on the
//! rust-vmm crates, run through the same suite; each other module says in its head what it plays.

#![forbid(unsafe_code)]

pub mod bench;
pub mod card;
pub mod frontend;
pub mod reference;
pub mod wire;
