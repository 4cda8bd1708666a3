//! `virtio_net_hdr`: the bytes in front of every frame in guest memory.
//!
//! Read with: virtio 1.2 §5.1.6; TRAPS 1, 43.

use vfio_glue::memory::HostSlice;

/// With VIRTIO_F_VERSION_1 or VIRTIO_NET_F_MRG_RXBUF.
pub const MODERN_LEN: u32 = 12;
/// A legacy driver without mergeable buffers.
pub const LEGACY_LEN: u32 = 10;

/// The header of a received frame that came whole in one buffer and whose checksum nobody vouches for.
///
/// flags, gso_type, hdr_len, gso_size, csum_start, csum_offset are 0 and num_buffers is 1. A legacy header is the
/// first 10 bytes of it.
const RECEIVED: [u8; MODERN_LEN as usize] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// The header bytes to put in front of a received frame: `header_len` of them, at most 12.
#[inline]
pub fn received(header_len: u32) -> &'static [u8] {
    RECEIVED.get(..header_len as usize).unwrap_or(&RECEIVED)
}

/// Writes the header of a received frame into `at`.
#[inline]
pub fn write_received(at: HostSlice<'_>) {
    if !at.put(RECEIVED) {
        write_legacy(at);
    }
}

/// Out of line, else the compiler makes one copy of any length of both.
#[cold]
#[inline(never)]
fn write_legacy(at: HostSlice<'_>) {
    at.copy_from(&RECEIVED);
}
