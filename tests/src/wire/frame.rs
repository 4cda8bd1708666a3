//! What one checked frame holds.
//!
//! ```text
//!  0      6      12      14    18         26       28         32
//!  | dst  | src  | 88B5  | tag | sequence | length | checksum | pattern .. length
//! ```
//!
//! 0x88B5 is an ethertype for local experiments (IEEE 802), so no kernel answers it. Numbers are big-endian.

use std::fmt;
use std::str::FromStr;

/// The ethertype of a checked frame.
const ETHERTYPE: [u8; 2] = [0x88, 0xB5];
const TAG: usize = 14;
const SEQUENCE: usize = 18;
const LENGTH: usize = 26;
const CHECKSUM: usize = 28;
const PATTERN: usize = 32;

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

    /// Writes frame `sequence` into `frame`, which takes its length.
    pub fn write(&self, sequence: u64, frame: &mut Vec<u8>) {
        frame.clear();
        frame.resize(self.len_bytes, 0);
        frame[..6].copy_from_slice(&self.dst.0);
        frame[6..12].copy_from_slice(&self.src.0);
        frame[12..TAG].copy_from_slice(&ETHERTYPE);
        frame[TAG..SEQUENCE].copy_from_slice(&self.tag.to_be_bytes());
        frame[SEQUENCE..LENGTH].copy_from_slice(&sequence.to_be_bytes());
        let length = u16::try_from(self.len_bytes).expect("len_bytes_of bounds it");
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
        self.write(sequence, scratch);
        match frame[TAG..] == scratch[TAG..] {
            false => Seen::Corrupt,
            true if sequence == PROBE => Seen::Probe,
            true => Seen::Intact(sequence),
        }
    }
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
    fn addresses_are_read_as_they_are_printed() {
        assert_eq!(
            "52:54:00:00:00:01".parse::<Mac>().map(|mac| mac.to_string()),
            Ok("52:54:00:00:00:01".into())
        );
        assert!("52:54".parse::<Mac>().is_err());
        assert!("1:2:3:4:5:6:7".parse::<Mac>().is_err());
    }
}
