//! What the card sees in a received frame: protocol types, checksum verdicts, the RSS hash.
//!
//! One VLAN tag in the frame is looked through, as the silicon does with CTRL.VME off.
//!
//! Read with: RFC 1071 for the sums; the 82576 datasheet's receive chapters on packet types and RSS.

use super::desc::{packet_type, rx_status};
use super::regs::Rxcsum;

/// Protocol headers found in a frame, as offsets into it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    /// Packet type bits for the write-back.
    pub(super) packet_type: u16,
    network: Option<Network>,
    transport: Option<Transport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    at: usize,
    header_len: usize,
    version: Version,
    /// First byte past the IP packet; Ethernet padding follows.
    end: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V4,
    V6,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Transport {
    at: usize,
    protocol: u8,
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

impl Parsed {
    /// Looks into `frame`, which carries no check sequence. `vlan_type` is VET 15:0.
    pub(super) fn of(frame: &[u8], vlan_type: u16) -> Self {
        let tag_len = if read_u16(frame, 12) == Some(vlan_type) {
            4
        } else {
            0
        };
        let parsed = match read_u16(frame, 12 + tag_len) {
            Some(0x0800) => parse_ipv4(frame, 14 + tag_len),
            Some(0x86DD) => parse_ipv6(frame, 14 + tag_len),
            _ => None,
        };
        parsed.unwrap_or_default()
    }

    /// Gives the checksum bits of the write-back's status dword.
    pub(super) fn checksum_status(&self, frame: &[u8], rxcsum: Rxcsum) -> u32 {
        let mut status = 0;
        let Some(network) = self.network else {
            return status;
        };
        if rxcsum.contains(Rxcsum::IPOFL) && network.version == Version::V4 {
            let header = &frame[network.at..network.at + network.header_len];
            status |= rx_status::IPCS;
            if ones_sum(header, 0) != 0xFFFF {
                status |= rx_status::IPE;
            }
        }
        if rxcsum.contains(Rxcsum::TUOFL)
            && let Some(transport) = self.transport
        {
            status |= transport_status(frame, network, transport);
        }
        status
    }

    /// Returns the RSS type and hash, if MRQC's field bits cover this packet.
    pub(super) fn rss(&self, frame: &[u8], mrqc: u32, key: &[u8; 40]) -> Option<(u8, u32)> {
        let network = self.network?;
        let addresses = match network.version {
            Version::V4 => frame.get(network.at + 12..network.at + 20)?,
            Version::V6 => frame.get(network.at + 8..network.at + 40)?,
        };
        // MRQC field bit and RSS type, first for the protocol with ports, then for addresses alone.
        let protocol = self.transport.map(|transport| transport.protocol);
        let with_ports = match (network.version, protocol) {
            (Version::V4, Some(TCP)) => Some((16, 1)),
            (Version::V4, Some(UDP)) => Some((22, 7)),
            (Version::V6, Some(TCP)) => Some((21, 3)),
            (Version::V6, Some(UDP)) => Some((23, 8)),
            _ => None,
        };
        let alone = match network.version {
            Version::V4 => (17, 2),
            Version::V6 => (20, 5),
        };
        let enabled = |bit: u32| mrqc & 1 << bit != 0;
        if let (Some((bit, kind)), Some(transport)) = (with_ports, self.transport)
            && enabled(bit)
        {
            let ports = frame.get(transport.at..transport.at + 4)?;
            return Some((kind, toeplitz(key, &[addresses, ports].concat())));
        }
        enabled(alone.0).then(|| (alone.1, toeplitz(key, addresses)))
    }
}

fn parse_ipv4(frame: &[u8], at: usize) -> Option<Parsed> {
    let first = *frame.get(at)?;
    let header_len = usize::from(first & 0xF) * 4;
    let end = at + usize::from(read_u16(frame, at + 2)?);
    if first >> 4 != 4 || header_len < 20 || at + header_len > end || end > frame.len() {
        return None;
    }
    let fragment = read_u16(frame, at + 6)? & 0x3FFF != 0;
    let mut parsed = Parsed {
        packet_type: if header_len > 20 {
            packet_type::IPV4_OPTIONS
        } else {
            packet_type::IPV4
        },
        network: Some(Network {
            at,
            header_len,
            version: Version::V4,
            end,
        }),
        transport: None,
    };
    if !fragment {
        parsed.add_transport(*frame.get(at + 9)?, at + header_len);
    }
    Some(parsed)
}

fn parse_ipv6(frame: &[u8], at: usize) -> Option<Parsed> {
    let end = at + 40 + usize::from(read_u16(frame, at + 4)?);
    if *frame.get(at)? >> 4 != 6 || end > frame.len() {
        return None;
    }
    let mut next = *frame.get(at + 6)?;
    let mut from = at + 40;
    let mut packet_type = packet_type::IPV6;
    // Hop-by-hop, routing and destination options; anything else ends the walk, a fragment too.
    while matches!(next, 0 | 43 | 60) {
        packet_type = packet_type::IPV6_EXTENSIONS;
        next = *frame.get(from)?;
        from += 8 + usize::from(*frame.get(from + 1)?) * 8;
    }
    let network = Network {
        at,
        header_len: from - at,
        version: Version::V6,
        end,
    };
    let mut parsed = Parsed {
        packet_type,
        network: Some(network),
        transport: None,
    };
    if from <= end {
        parsed.add_transport(next, from);
    }
    Some(parsed)
}

impl Parsed {
    fn add_transport(&mut self, protocol: u8, at: usize) {
        self.packet_type |= match protocol {
            TCP => packet_type::TCP,
            UDP => packet_type::UDP,
            SCTP => packet_type::SCTP,
            _ => return,
        };
        self.transport = Some(Transport { at, protocol });
    }
}

fn transport_status(frame: &[u8], network: Network, transport: Transport) -> u32 {
    let Some(segment) = frame.get(transport.at..network.end) else {
        return 0;
    };
    let checked = match transport.protocol {
        TCP if segment.len() >= 20 => rx_status::L4CS,
        // Zero means that the sender computed none.
        UDP if segment.len() >= 8 && segment[6..8] != [0, 0] => rx_status::L4CS | rx_status::UDPCS,
        _ => return 0,
    };
    let addresses = match network.version {
        Version::V4 => &frame[network.at + 12..network.at + 20],
        Version::V6 => &frame[network.at + 8..network.at + 40],
    };
    let pseudo = ones_sum(addresses, 0) as u64 + u64::from(transport.protocol) + segment.len() as u64;
    if ones_sum(segment, pseudo) == 0xFFFF {
        checked
    } else {
        checked | rx_status::L4E
    }
}

/// Adds up `bytes` as big-endian 16-bit words in ones' complement, beginning with `seed`.
pub(super) fn ones_sum(bytes: &[u8], seed: u64) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low)));
    let mut sum = words.fold(seed, |sum, word| sum + word);
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    (sum & 0xFFFF) as u16
}

/// Hashes `input` with Microsoft's Toeplitz function.
fn toeplitz(key: &[u8; 40], input: &[u8]) -> u32 {
    let key_bit = |at: usize| key[at / 8 % 40] >> (7 - at % 8) & 1;
    let mut window = u32::from_be_bytes([key[0], key[1], key[2], key[3]]);
    let mut hash = 0;
    for (at, byte) in input.iter().enumerate() {
        for bit in 0..8 {
            if byte & 0x80 >> bit != 0 {
                hash ^= window;
            }
            window = window << 1 | u32::from(key_bit(32 + at * 8 + bit));
        }
    }
    hash
}

pub(super) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + 2)
        .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key and vectors of Microsoft's RSS verification suite.
    const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
        0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
        0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    #[test]
    fn toeplitz_matches_the_published_vectors() {
        let addresses = [66, 9, 149, 187, 161, 142, 100, 80];
        let ports = [
            (2794_u16 >> 8) as u8,
            (2794_u16 & 0xFF) as u8,
            (1766_u16 >> 8) as u8,
            (1766_u16 & 0xFF) as u8,
        ];
        assert_eq!(toeplitz(&KEY, &addresses), 0x323e_8fc2);
        assert_eq!(
            toeplitz(&KEY, &[addresses.as_slice(), &ports].concat()),
            0x51cc_c178
        );
    }

    fn udp_frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(1000, 2000)
            .write(&mut frame, payload)
            .expect("a short frame");
        frame
    }

    #[test]
    fn good_sums_set_the_check_bits_and_bad_ones_the_errors() {
        let mut frame = udp_frame(b"hello");
        let parsed = Parsed::of(&frame, 0x8100);
        assert_eq!(parsed.packet_type, packet_type::IPV4 | packet_type::UDP);
        let good = rx_status::IPCS | rx_status::L4CS | rx_status::UDPCS;
        assert_eq!(parsed.checksum_status(&frame, Rxcsum::all()), good);
        *frame.last_mut().expect("not empty") ^= 1;
        assert_eq!(
            parsed.checksum_status(&frame, Rxcsum::all()),
            good | rx_status::L4E
        );
        frame[24] ^= 1;
        assert_eq!(
            parsed.checksum_status(&frame, Rxcsum::IPOFL),
            rx_status::IPCS | rx_status::IPE
        );
    }

    #[test]
    fn tcp_over_ipv6_behind_a_vlan_tag_is_checked() {
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .single_vlan(5.try_into().expect("a small id"))
            .ipv6([1; 16], [2; 16], 64)
            .tcp(1, 2, 3, 4)
            .write(&mut frame, b"data")
            .expect("a short frame");
        let parsed = Parsed::of(&frame, 0x8100);
        assert_eq!(parsed.packet_type, packet_type::IPV6 | packet_type::TCP);
        assert_eq!(parsed.checksum_status(&frame, Rxcsum::all()), rx_status::L4CS);
    }

    #[test]
    fn hostile_frames_are_just_not_recognised() {
        for len in 0..60 {
            for byte in [0x00, 0x45, 0x46, 0x60, 0x86, 0xFF] {
                let mut frame = vec![byte; len];
                if len >= 14 {
                    frame[12..14].copy_from_slice(&[0x08, 0x00]);
                }
                let parsed = Parsed::of(&frame, 0x8100);
                parsed.checksum_status(&frame, Rxcsum::all());
                parsed.rss(&frame, u32::MAX, &KEY);
            }
        }
    }
}
