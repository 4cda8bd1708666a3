//! Checked Ethernet frames: what the rig sends over a path to see that it loses, repeats and alters nothing.
//!
//! ```text
//! Pattern ──frame──▶ PacketSocket ──▶ (the path under test) ──▶ PacketSocket ──▶ Pattern::check ──▶ Tally
//! ```
//!
//! Every byte of a frame after its addresses follows from the run's tag and the frame's sequence number, so
//! the receiver compares contents without having seen what was sent. `exchange` keeps a bounded number of
//! frames under way, so a path without flow control of its own is not overrun and a loss is the path's fault.

mod exchange;
mod frame;
mod packet_socket;
mod round_trip;
mod tally;

pub use exchange::{Limit, Run, echo, receive, send, through};
pub use frame::{Mac, Pattern, Seen};
pub use packet_socket::{PacketSocket, WireError};
pub use round_trip::{RoundTrips, round_trips};
pub use tally::Tally;
