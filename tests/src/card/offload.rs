//! Transmit offloads: checksum insertion, VLAN insertion, segmentation.
//!
//! Sums are computed as the silicon does it, from MACLEN+IPLEN to the end *including whatever the checksum
//! field holds*. A driver or guest that leaves a wrong seed there gets a wrong sum on the wire. (QEMU's model
//! ignores the seed unless its network back end has vnet_hdr.)
//!
//! Read with: the 82576 datasheet's transmit chapters on offload; igb.md §7.

use super::desc::{L4, TxContext, TxData};
use super::frame::{ones_sum, read_u16};
use super::wire::crc32c;

/// An offload field with a number nothing can be done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadField {
    pub(super) field: &'static str,
    pub(super) value: u32,
}

/// Turns one packet as fetched from memory into the frames that go out, without padding or check sequence.
pub(super) fn apply(packet: Vec<u8>, first: &TxData, context: &TxContext) -> Result<Vec<Vec<u8>>, BadField> {
    let mut frames = if first.segment {
        segment(&packet, context)?
    } else {
        vec![insert_checksums(packet, first, context)?]
    };
    if first.insert_vlan {
        for frame in &mut frames {
            let tag = [0x81, 0x00, (context.vlan >> 8) as u8, (context.vlan & 0xFF) as u8];
            frame.splice(12..12, tag);
        }
    }
    Ok(frames)
}

fn insert_checksums(mut packet: Vec<u8>, first: &TxData, context: &TxContext) -> Result<Vec<u8>, BadField> {
    if !first.insert_ip_checksum && !first.insert_l4_checksum {
        return Ok(packet);
    }
    let (ip_at, l4_at) = header_offsets(context, packet.len())?;
    if first.insert_ip_checksum {
        insert_ip_checksum(&mut packet[ip_at..l4_at]);
    }
    if first.insert_l4_checksum {
        insert_l4_checksum(&mut packet[l4_at..], context.l4, 0)?;
    }
    Ok(packet)
}

fn header_offsets(context: &TxContext, packet_len: usize) -> Result<(usize, usize), BadField> {
    in_range("MACLEN", context.mac_len, 14..=127)?;
    in_range("IPLEN", context.ip_len, 20..=511)?;
    let ip_at = usize::from(context.mac_len);
    let l4_at = ip_at + usize::from(context.ip_len);
    if l4_at > packet_len {
        return Err(BadField {
            field: "MACLEN + IPLEN",
            value: u32::from(context.mac_len + context.ip_len),
        });
    }
    Ok((ip_at, l4_at))
}

fn in_range(field: &'static str, value: u16, range: std::ops::RangeInclusive<u16>) -> Result<(), BadField> {
    if range.contains(&value) {
        Ok(())
    } else {
        Err(BadField {
            field,
            value: u32::from(value),
        })
    }
}

fn insert_ip_checksum(header: &mut [u8]) {
    let sum = !ones_sum(header, 0);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Sums `segment`, which reaches to the end of the packet, and stores the sum. `extra` is the length that
/// segmentation adds to a seed made without it.
fn insert_l4_checksum(segment: &mut [u8], l4: L4, extra: u64) -> Result<(), BadField> {
    let (at, len) = match l4 {
        L4::Tcp => (16, 2),
        L4::Udp => (6, 2),
        L4::Sctp => (8, 4),
        L4::None => {
            return Err(BadField {
                field: "L4T",
                value: 3,
            });
        }
    };
    if at + len > segment.len() {
        return Err(BadField {
            field: "checksum offset",
            value: clamp(at),
        });
    }
    if l4 == L4::Sctp {
        segment[8..12].fill(0);
        let crc = crc32c(segment);
        segment[8..12].copy_from_slice(&crc.to_le_bytes());
        return Ok(());
    }
    let sum = match !ones_sum(segment, extra) {
        // A UDP sum of 0 would mean "none"; 0xFFFF is the same number.
        0 if l4 == L4::Udp => 0xFFFF,
        sum => sum,
    };
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

const FIN_AND_PSH: u8 = 0x09;

fn segment(packet: &[u8], context: &TxContext) -> Result<Vec<Vec<u8>>, BadField> {
    let (ip_at, l4_at) = header_offsets(context, packet.len())?;
    in_range("MSS", context.mss, 1..=9216)?;
    match context.l4 {
        L4::Tcp => in_range("L4LEN", context.l4_len, 20..=60)?,
        L4::Udp => in_range("L4LEN", context.l4_len, 8..=8)?,
        other => {
            return Err(BadField {
                field: "L4T",
                value: if other == L4::Sctp { 2 } else { 3 },
            });
        }
    }
    let header_len = l4_at + usize::from(context.l4_len);
    if header_len > 240 || header_len >= packet.len() {
        return Err(BadField {
            field: "header length",
            value: clamp(header_len),
        });
    }
    let (header, payload) = packet.split_at(header_len);
    let count = payload.len().div_ceil(usize::from(context.mss));
    let mut offset = 0_u32;
    let mut frames = Vec::with_capacity(count);
    for (number, part) in payload.chunks(usize::from(context.mss)).enumerate() {
        let mut frame = [header, part].concat();
        let ip_len = frame.len() - ip_at;
        let l4_len = frame.len() - l4_at;
        if context.ipv4 {
            put_u16(&mut frame, ip_at + 2, ip_len);
            let id = usize::from(read_u16(header, ip_at + 4).unwrap_or(0)) + number;
            put_u16(&mut frame, ip_at + 4, id & 0xFFFF);
            insert_ip_checksum(&mut frame[ip_at..l4_at]);
        } else {
            put_u16(&mut frame, ip_at + 4, ip_len - 40);
        }
        if context.l4 == L4::Tcp {
            let sequence = l4_at + 4..l4_at + 8;
            let first = u32::from_be_bytes(header[sequence.clone()].try_into().unwrap_or_default());
            frame[sequence].copy_from_slice(&first.wrapping_add(offset).to_be_bytes());
            if number + 1 < count {
                frame[l4_at + 13] &= !FIN_AND_PSH;
            }
        } else {
            put_u16(&mut frame, l4_at + 4, l4_len);
        }
        insert_l4_checksum(&mut frame[l4_at..], context.l4, l4_len as u64)?;
        offset = offset.wrapping_add(clamp(part.len()));
        frames.push(frame);
    }
    Ok(frames)
}

fn clamp(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn put_u16(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 2].copy_from_slice(&u16::try_from(value & 0xFFFF).unwrap_or(u16::MAX).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::card::desc::{TxRead, rx_status};
    use crate::card::frame::Parsed;
    use crate::card::regs::Rxcsum;

    fn tcp_frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(1000, 2000, 7, 8192)
            .psh()
            .write(&mut frame, payload)
            .expect("a short frame");
        frame
    }

    fn context(mss: u16) -> TxContext {
        TxContext {
            index: 0,
            mac_len: 14,
            ip_len: 20,
            l4_len: 20,
            mss,
            vlan: 0,
            ipv4: true,
            l4: L4::Tcp,
        }
    }

    fn command(extra: u32, status: u32) -> TxData {
        let mut raw = [0; 16];
        raw[8..12].copy_from_slice(&(60 | 3 << 20 | 1 << 29 | extra).to_le_bytes());
        raw[12..16].copy_from_slice(&status.to_le_bytes());
        let Ok(TxRead::Data(data)) = TxRead::parse(raw) else {
            panic!("a data descriptor")
        };
        data
    }

    const GOOD: u32 = rx_status::IPCS | rx_status::L4CS;

    fn verdict(frame: &[u8]) -> u32 {
        Parsed::of(frame, 0x8100).checksum_status(frame, Rxcsum::all())
    }

    #[test]
    fn the_seed_in_the_field_is_part_of_the_sum() {
        let good = tcp_frame(b"payload");
        let seed = ones_sum(&good[26..34], 6 + 20 + 7);
        let mut seeded = good.clone();
        seeded[50..52].copy_from_slice(&seed.to_be_bytes());
        let sums = command(0, 1 << 9);
        assert_eq!(apply(seeded.clone(), &sums, &context(0)), Ok(vec![good]));
        seeded[50] ^= 1;
        let wrong = apply(seeded, &sums, &context(0)).expect("still a frame");
        assert_eq!(verdict(&wrong[0]), GOOD | rx_status::L4E);
    }

    #[test]
    fn segments_are_complete_frames_of_their_own() {
        let payload: Vec<u8> = (0..250).collect();
        let mut packet = tcp_frame(&payload);
        packet[16..18].fill(0);
        packet[24..26].fill(0);
        let seed = ones_sum(&packet[26..34], 6);
        packet[50..52].copy_from_slice(&seed.to_be_bytes());
        let frames = apply(packet, &command(1 << 31, 0b11 << 8), &context(100)).expect("three segments");
        assert_eq!(frames.iter().map(Vec::len).collect::<Vec<_>>(), [154, 154, 104]);
        for (number, frame) in frames.iter().enumerate() {
            assert_eq!(verdict(frame), GOOD, "segment {number}");
            assert_eq!(frame[47] & 0x08 != 0, number == 2, "PSH on the last alone");
            assert_eq!(usize::from(frame[41]), 7 + number * 100, "sequence number");
        }
        assert_eq!(
            [&frames[0][54..], &frames[1][54..], &frames[2][54..]].concat(),
            payload
        );
    }

    #[test]
    fn impossible_fields_are_named() {
        let packet = tcp_frame(b"");
        let short = TxContext {
            mac_len: 13,
            ..context(0)
        };
        let sums = command(0, 1 << 9);
        assert_eq!(
            apply(packet.clone(), &sums, &short),
            Err(BadField {
                field: "MACLEN",
                value: 13
            })
        );
        let none = TxContext {
            l4: L4::None,
            ..context(0)
        };
        assert_eq!(
            apply(packet.clone(), &sums, &none),
            Err(BadField {
                field: "L4T",
                value: 3
            })
        );
        let no_mss = command(1 << 31, 0b11 << 8);
        assert_eq!(
            apply(packet, &no_mss, &context(0)),
            Err(BadField {
                field: "MSS",
                value: 0
            })
        );
    }
}
