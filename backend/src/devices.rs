//! What devices tell: that a link may have changed, and what the host wants. One thread waits for all of it.
//!
//! ```text
//! link event ──────▶ watch ──▶ Port::look_at_link
//! host's event ────▶ watch ──▶ obey ──▶ Inventory::obey_host: detach, or reset
//! ```
//!
//! Ports and devices come and go meanwhile, which the inventory tells by a descriptor of its own. What the host wants
//! takes a while, so it is done by a second thread: nobody's link waits for it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use rustix::event::{PollFd, PollFlags, poll};
use vfio_glue::pci::HostEvent;

use crate::inventory::{DeviceEvents, Inventory};
use crate::signals::Stop;

/// What the host wants of a device.
pub type HostWish = (Arc<DeviceEvents>, HostEvent);

/// One thing to wait for.
struct Watched<'a> {
    events: &'a Arc<DeviceEvents>,
    fd: &'a OwnedFd,
    /// `None` for the link.
    host: Option<HostEvent>,
}

/// Waits for events of all devices of `inventory` until the process stops. What the host wants goes to `wishes`.
pub fn watch(inventory: &Inventory, wishes: &Sender<HostWish>, stop: &Stop) {
    loop {
        let all = inventory.device_events();
        let watched: Vec<Watched<'_>> = all.iter().flat_map(watched).collect();
        let changed = inventory.changed();
        let mut fds = vec![
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&changed, PollFlags::IN),
        ];
        fds.extend(watched.iter().map(|one| PollFd::new(one.fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "devices are no longer watched");
                return;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let [stopping, has_changed, events @ ..] = ready.as_slice() else {
            return;
        };
        if *stopping {
            return;
        }
        if *has_changed {
            quieten(changed);
        }
        for (one, _) in watched.iter().zip(events).filter(|(_, ready)| **ready) {
            one.report(wishes);
        }
    }
}

fn watched(events: &Arc<DeviceEvents>) -> impl Iterator<Item = Watched<'_>> {
    let link = events.link.iter().map(|fd| (None, fd));
    let host = events.host.iter();
    let host = host.filter_map(|(which, fd)| fd.as_ref().map(|fd| (Some(*which), fd)));
    link.chain(host).map(|(host, fd)| Watched { events, fd, host })
}

impl Watched<'_> {
    fn report(&self, wishes: &Sender<HostWish>) {
        let Some(which) = self.host else {
            self.events.port.look_at_link();
            return;
        };
        quieten(self.fd);
        // Nobody obeys any more only when the process stops.
        let _ = wishes.send((Arc::clone(self.events), which));
    }
}

/// Does what the host wants, one after the other, until nobody watches any more.
pub fn obey(inventory: &Inventory, wishes: &Receiver<HostWish>) {
    for (events, which) in wishes {
        inventory.obey_host(&events, which);
    }
}

/// Reads an event's count, so that it is quiet until the next.
fn quieten(event: impl AsFd) {
    // Nothing to read is as quiet.
    let _ = rustix::io::read(event, &mut [0; 8]);
}
