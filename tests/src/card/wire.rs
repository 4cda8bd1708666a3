//! The far side of the card's connector, and the frame check sequence that only exists there.

/// Takes the frames the card sends.
///
/// Frames carry no check sequence. The call must not block for long and must not call back into the card.
pub trait Wire: Send {
    /// Puts one frame on the wire.
    fn transmit(&mut self, frame: &[u8]);
}

impl<F: FnMut(&[u8]) + Send> Wire for F {
    fn transmit(&mut self, frame: &[u8]) {
        self(frame);
    }
}

/// Computes the check sequence of `frame` as IEEE 802.3 puts it on the wire.
pub(super) fn frame_check_sequence(frame: &[u8]) -> [u8; 4] {
    (!reflected_crc(frame, 0xEDB8_8320)).to_le_bytes()
}

/// Computes SCTP's checksum (RFC 9260, appendix A) over `message`.
pub(super) fn crc32c(message: &[u8]) -> u32 {
    !reflected_crc(message, 0x82F6_3B78)
}

fn reflected_crc(bytes: &[u8], polynomial: u32) -> u32 {
    bytes.iter().fold(u32::MAX, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ polynomial
            } else {
                crc >> 1
            };
        }
        crc
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_crcs_give_their_published_check_values() {
        assert_eq!(frame_check_sequence(b"123456789"), 0xCBF4_3926_u32.to_le_bytes());
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }
}
