//! Every front-end's order of messages leads to a port that carries frames.

use super::{BackEnd, Guest, Running, Setup};
use crate::frontend::connection::Connection;
use crate::frontend::vmm::{Manner, feature, protocol};

/// QEMU enables the rings before features, memory and ring addresses are known.
pub fn as_qemu_carries_frames_both_ways<B: BackEnd>(_: &B, running: &mut Running) {
    let mut guest = Guest::boot(running, Setup::default().manner(Manner::Qemu));
    assert!(
        guest
            .session
            .has_protocol(protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS | protocol::MQ)
    );
    guest.exchange(&running.wire);
}

/// cloud-hypervisor enables them last and asks for an answer to everything.
pub fn as_cloud_hypervisor_carries_frames_both_ways<B: BackEnd>(_: &B, running: &mut Running) {
    Guest::boot(running, Setup::default().manner(Manner::EnableLast)).exchange(&running.wire);
}

/// virtio-user has guest-physical addresses of 47 bits, one memory table, and no EVENT_IDX.
pub fn as_virtio_user_carries_frames_both_ways<B: BackEnd>(_: &B, running: &mut Running) {
    let features = feature::MRG_RXBUF | feature::INDIRECT_DESC | feature::IN_ORDER;
    Guest::boot(
        running,
        Setup::default().manner(Manner::VirtioUser).features(features),
    )
    .exchange(&running.wire);
}

/// The front-end listens and the back end connects, also to a front-end that was away.
pub fn in_client_mode_connects_and_connects_again<B: BackEnd>(back_end: &B, running: &mut Running) {
    let listener = running.restart_as_client(back_end);
    for _ in 0..3 {
        let connection = Connection::accept(&listener).expect("the back end connects");
        let mut guest = Guest::boot_over(connection, Setup::default());
        guest.exchange(&running.wire);
    }
    // Keep the last connection open: a back end may end when nobody listens any more.
    let _last = Connection::accept(&listener).expect("the back end connects");
    running.assert_alive();
}

/// A guest that takes nothing but VERSION_1.
pub fn with_no_optional_feature_carries_frames_both_ways<B: BackEnd>(_: &B, running: &mut Running) {
    Guest::boot(running, Setup::default().features(0)).exchange(&running.wire);
}
