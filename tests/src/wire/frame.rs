//! What one checked frame holds.
//!
//! ```text
//!  0      6      12      14    18         26       28         32
//!  | dst  | src  | 88B5  | tag | sequence | length | checksum | pattern .. length
//! ```
//!
//! 0x88B5 is an ethertype for local experiments (IEEE 802), so no kernel answers it. Numbers are big-endian. A frame of a
//! flow has headers of IPv4 and UDP in front of that ethertype, so that a card with several queues can tell flows apart.

use std::fmt;
use std::str::FromStr;

/// The ethertype of a checked frame.
const ETHERTYPE: [u8; 2] = [0x88, 0xB5];
const TAG: usize = 14;
const SEQUENCE: usize = 18;
const LENGTH: usize = 26;
const CHECKSUM: usize = 28;
const PATTERN: usize = 32;
/// What a frame of a flow has more, after its addresses: the ethertype of IPv4, its header, and UDP's.
const FLOW_BYTES: usize = 2 + 20 + 8;
/// UDP's port for local experiments nobody serves: discard (RFC 863).
const DISCARD: u16 = 9;

/// The shortest frame on a wire without its FCS.
const SHORTEST: usize = 60;
/// The longest we make: the largest payload igb takes, with room to spare for a tag.
const LONGEST: usize = 9216;
/// The sequence number of a frame that only asks whether the path is there.
const PROBE: u64 = u64::MAX;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts
                .next()
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| format!("{text} is not an address like 52:54:00:00:00:01"))?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(format!("{text} has more than six parts")),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What a received frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Frame number so-and-so of this run, every byte as it was sent.
    Intact(u64),
    /// A frame of this run whose contents or length are not what was sent.
    Corrupt,
    /// A probe of this run.
    Probe,
    /// Not ours: another protocol or another run.
    Foreign,
}

/// The frames of one run: its tag, their size, their addresses.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// Tells runs on the same wire apart.
    pub tag: u32,
    /// Bytes of each frame, from destination address to the end of the payload, without FCS.
    pub len_bytes: usize,
    /// Where they go.
    pub dst: Mac,
    /// Where they come from.
    pub src: Mac,
    /// The UDP source port of a run whose frames are one flow.
    pub flow: Option<u16>,
}

impl Pattern {
    /// Turns a size as people name it into one without FCS: 64 counts the FCS, 1514 does not.
    ///
    /// # Errors
    ///
    /// A sentence, if no such frame can be made.
    pub fn len_bytes_of(size: usize) -> Result<usize, String> {
        match size {
            64 => Ok(SHORTEST),
            SHORTEST..=LONGEST => Ok(size),
            _ => Err(format!(
                "no frame of {size} bytes: 64 (60 without FCS) to {LONGEST}"
            )),
        }
    }

    /// The shortest frame of a flow.
    pub const SHORTEST_OF_FLOW: usize = SHORTEST + FLOW_BYTES;

    /// Writes frame `sequence` into `frame`, which takes its length.
    pub fn write(&self, sequence: u64, frame: &mut Vec<u8>) {
        let Some(port) = self.flow else {
            self.write_plain(sequence, self.len_bytes, frame);
            return;
        };
        let len_bytes = self.len_bytes.max(Self::SHORTEST_OF_FLOW);
        self.write_plain(sequence, len_bytes - FLOW_BYTES, frame);
        let headers = flow_headers(port, len_bytes);
        frame.splice(12..12, headers);
    }

    fn write_plain(&self, sequence: u64, len_bytes: usize, frame: &mut Vec<u8>) {
        frame.clear();
        frame.resize(len_bytes, 0);
        frame[..6].copy_from_slice(&self.dst.0);
        frame[6..12].copy_from_slice(&self.src.0);
        frame[12..TAG].copy_from_slice(&ETHERTYPE);
        frame[TAG..SEQUENCE].copy_from_slice(&self.tag.to_be_bytes());
        frame[SEQUENCE..LENGTH].copy_from_slice(&sequence.to_be_bytes());
        let length = u16::try_from(len_bytes).expect("len_bytes_of bounds it");
        frame[LENGTH..CHECKSUM].copy_from_slice(&length.to_be_bytes());
        // xorshift64: cheap, and no two frames share a stretch, so a piece of another frame shows.
        let mut state = (sequence ^ (u64::from(self.tag) << 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for chunk in frame[PATTERN..].chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let bytes = state.to_be_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        let sum = checksum(frame);
        frame[CHECKSUM..PATTERN].copy_from_slice(&sum.to_be_bytes());
    }

    /// Writes a frame that asks whether the path is there.
    pub fn write_probe(&self, frame: &mut Vec<u8>) {
        self.write(PROBE, frame);
    }

    /// Says what `frame` is. Its addresses are not looked at: a path may rewrite them.
    pub fn check(&self, frame: &[u8], scratch: &mut Vec<u8>) -> Seen {
        let Some(port) = self.flow else {
            return self.check_plain(frame, scratch);
        };
        let Some((addresses, rest)) = frame.split_at_checked(12) else {
            return Seen::Foreign;
        };
        let Some((headers, content)) = rest.split_at_checked(FLOW_BYTES) else {
            return Seen::Foreign;
        };
        let plain = [addresses, content].concat();
        let seen = self.check_plain(&plain, scratch);
        if seen != Seen::Foreign && *headers != flow_headers(port, frame.len()) {
            return Seen::Corrupt;
        }
        seen
    }

    fn check_plain(&self, frame: &[u8], scratch: &mut Vec<u8>) -> Seen {
        if frame.len() < PATTERN
            || frame[12..TAG] != ETHERTYPE
            || frame[TAG..SEQUENCE] != self.tag.to_be_bytes()
        {
            return Seen::Foreign;
        }
        let sequence = u64::from_be_bytes(frame[SEQUENCE..LENGTH].try_into().expect("8 bytes"));
        if frame[CHECKSUM..PATTERN] != checksum(frame).to_be_bytes() {
            return Seen::Corrupt;
        }
        let len_bytes = match self.flow {
            Some(_) => self.len_bytes.max(Self::SHORTEST_OF_FLOW) - FLOW_BYTES,
            None => self.len_bytes,
        };
        self.write_plain(sequence, len_bytes, scratch);
        match frame[TAG..] == scratch[TAG..] {
            false => Seen::Corrupt,
            true if sequence == PROBE => Seen::Probe,
            true => Seen::Intact(sequence),
        }
    }
}

/// From the ethertype on: IPv4 from 198.18.0.1 to 198.19.0.1 (RFC 2544's test networks), UDP from `port`, no sum.
fn flow_headers(port: u16, len_bytes: usize) -> [u8; FLOW_BYTES] {
    let total = u16::try_from(len_bytes - 14).expect("len_bytes_of bounds it");
    let mut headers = [0; FLOW_BYTES];
    headers[..4].copy_from_slice(&[0x08, 0x00, 0x45, 0]);
    headers[4..6].copy_from_slice(&total.to_be_bytes());
    headers[10..12].copy_from_slice(&[64, 17]);
    headers[14..22].copy_from_slice(&[198, 18, 0, 1, 198, 19, 0, 1]);
    headers[22..24].copy_from_slice(&port.to_be_bytes());
    headers[24..26].copy_from_slice(&DISCARD.to_be_bytes());
    headers[26..28].copy_from_slice(&(total - 20).to_be_bytes());
    let words = headers[2..22].chunks_exact(2);
    let sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let folded = (sum & 0xFFFF) + (sum >> 16);
    let sum = !u16::try_from((folded & 0xFFFF) + (folded >> 16)).expect("folded twice");
    headers[12..14].copy_from_slice(&sum.to_be_bytes());
    headers
}

/// FNV-1a over all after the addresses but the sum itself.
fn checksum(frame: &[u8]) -> u32 {
    let covered = frame[12..CHECKSUM].iter().chain(&frame[PATTERN..]);
    covered.fold(0x811C_9DC5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(len_bytes: usize) -> Pattern {
        let (dst, src) = (Mac([2; 6]), Mac([4; 6]));
        Pattern {
            tag: 7,
            len_bytes,
            dst,
            src,
            flow: None,
        }
    }

    #[test]
    fn a_frame_checks_itself_whatever_its_addresses() {
        let (mut frame, mut scratch) = (Vec::new(), Vec::new());
        pattern(60).write(5, &mut frame);
        frame[..12].fill(0xAA);
        assert_eq!(pattern(60).check(&frame, &mut scratch), Seen::Intact(5));
    }

    #[test]
    fn each_altered_byte_is_noticed() {
        let (mut frame, mut scratch) = (Vec::new(), Vec::new());
        for at in 12..1514 {
            pattern(1514).write(9, &mut frame);
            frame[at] ^= 1;
            assert_ne!(
                pattern(1514).check(&frame, &mut scratch),
                Seen::Intact(9),
                "byte {at}"
            );
        }
    }

    #[test]
    fn a_frame_cut_or_grown_on_the_way_is_corrupt() {
        let (mut frame, mut scratch) = (Vec::new(), Vec::new());
        pattern(1514).write(1, &mut frame);
        frame.push(0);
        assert_eq!(pattern(1514).check(&frame, &mut scratch), Seen::Corrupt);
        frame.truncate(1000);
        assert_eq!(pattern(1514).check(&frame, &mut scratch), Seen::Corrupt);
    }

    #[test]
    fn another_run_is_foreign() {
        let (mut frame, mut scratch) = (Vec::new(), Vec::new());
        pattern(60).write(1, &mut frame);
        let other = Pattern {
            tag: 8,
            ..pattern(60)
        };
        assert_eq!(other.check(&frame, &mut scratch), Seen::Foreign);
    }

    #[test]
    fn a_frame_of_a_flow_is_udp_and_checks_itself() {
        let (mut frame, mut scratch) = (Vec::new(), Vec::new());
        for len_bytes in [90, 91, 1514] {
            let of = |port| Pattern {
                flow: Some(port),
                ..pattern(len_bytes)
            };
            of(7).write(3, &mut frame);
            assert_eq!(frame.len(), len_bytes);
            assert_eq!(of(7).check(&frame, &mut scratch), Seen::Intact(3));
            assert_eq!(
                of(8).check(&frame, &mut scratch),
                Seen::Corrupt,
                "another flow of this run"
            );
            let parsed = etherparse::PacketHeaders::from_ethernet_slice(&frame).expect("headers");
            let Some(etherparse::NetHeaders::Ipv4(ip, _)) = parsed.net else {
                panic!("no IPv4")
            };
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            let udp = parsed
                .transport
                .and_then(etherparse::TransportHeader::udp)
                .expect("UDP");
            assert_eq!((udp.source_port, usize::from(udp.length)), (7, len_bytes - 34));
            for at in 12..frame.len() {
                frame[at] ^= 1;
                assert_ne!(of(7).check(&frame, &mut scratch), Seen::Intact(3), "byte {at}");
                frame[at] ^= 1;
            }
        }
    }

    #[test]
    fn addresses_are_read_as_they_are_printed() {
        assert_eq!(
            "52:54:00:00:00:01".parse::<Mac>().map(|mac| mac.to_string()),
            Ok("52:54:00:00:00:01".into())
        );
        assert!("52:54".parse::<Mac>().is_err());
        assert!("1:2:3:4:5:6:7".parse::<Mac>().is_err());
    }
}
