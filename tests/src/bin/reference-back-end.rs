//! The reference back end as a process: vhost-user on one side, a datagram wire on the other.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// A plain copying virtio-net back end to run the front-end suite against.
#[derive(Debug, Parser)]
struct Arguments {
    /// The vhost-user socket.
    #[arg(long)]
    socket_path: PathBuf,
    /// Connect to the socket instead of listening on it.
    #[arg(long)]
    client: bool,
    /// The datagram socket to bind.
    #[arg(long)]
    wire_local: PathBuf,
    /// The datagram socket to send to.
    #[arg(long)]
    wire_peer: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let wire = tests::reference::open_wire(&arguments.wire_local, &arguments.wire_peer)?;
    if arguments.client {
        tests::reference::serve_as_client(&arguments.socket_path, &wire)
    } else {
        tests::reference::serve(&arguments.socket_path, &wire)
    }
}
