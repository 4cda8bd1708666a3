//! The process: sockets, sessions, workers, and what an operator asks of it.
//!
//! ```text
//! process     start and stop of everything        signals   when to stop
//! inventory   maps, workers and ports, and every way to change them
//! devices     what devices tell: links, and what the host wants
//! endpoint    where front-ends come from: listen, connect, an inherited descriptor
//! connection  one front-end's socket: whole messages in, one at a time
//! session     what the messages mean: features, memory, virtqueues
//! port        one device and its lanes, whoever is connected
//! worker      the threads that run lanes: poll, then sleep
//! control     the operator's socket               report    what `stats` shows      show  the same, for people
//! ```

#![forbid(unsafe_code)]

pub mod connection;
pub mod control;
pub mod devices;
pub mod endpoint;
pub mod inventory;
pub mod port;
pub mod process;
pub mod report;
pub mod session;
pub mod show;
pub mod signals;
pub mod worker;
