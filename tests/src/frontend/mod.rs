//! A front-end that plays the VMM: real socket, memfd memory, split-ring guest driver.
//!
//! ```text
//! memory.rs ──▶ vmm.rs ──connection.rs──▶ back end under test ──▶ wire.rs
//!     ▲                                     ▲
//!     └─ net.rs ── driver.rs ─kick and call─┘        suite: one behaviour each, for any back end
//! ```
//!
//! Every wait is on a condition with the bound [`PATIENCE`]; nothing sleeps.

use std::time::Duration;

pub mod arena;
pub mod connection;
pub mod driver;
pub mod event;
pub mod memory;
pub mod net;
pub mod process;
pub mod suite;
pub mod vmm;
pub mod wire;

/// How long a test waits for what must happen. Generous: a loaded two-core machine must not fail a test.
pub const PATIENCE: Duration = Duration::from_secs(30);
