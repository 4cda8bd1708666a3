//! Rings and what moves between them: virtqueues on the guest's side, NIC queues on the wire's, lanes in between.
//!
//! ```text
//! virtq       the guest's ring: chains out, used entries back, wake-ups
//! net_header  the 12 bytes in front of a frame
//! lane        one virtqueue joined to one NIC queue: tx.rs (guest → wire), rx.rs (wire → guest)
//! nic         what a lane needs of a card, and the cards: igb, tap, and model to measure with
//! clock       waiting, so that tests own time
//! ```
//!
//! `tx` and `rx` take the guest's side everywhere. A *virtq* is the guest's ring, a *ring* the NIC's.

#![forbid(unsafe_code)]

pub mod clock;
pub mod lane;
pub mod net_header;
pub mod nic;
#[cfg(test)]
mod testing;
pub mod virtq;
