//! The key by which a card spreads received frames over a port's queue pairs.

use std::fmt;
use std::str::FromStr;

use crate::value::{self, ValueError};

/// Bytes of a key, as every card of the igb family takes it.
const KEY_BYTES: usize = 40;

/// The most queue pairs any card has.
const QUEUE_PAIRS_MOST: u16 = 16;

/// A Toeplitz key of 40 bytes. Written as `ethtool` shows it: `6d:5a:...`, colons optional.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RssKey(pub [u8; KEY_BYTES]);

impl FromStr for RssKey {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let digits: Vec<u32> = text
            .chars()
            .filter(|letter| *letter != ':')
            .map_while(|letter| letter.to_digit(16))
            .collect();
        let whole = digits.len() == 2 * KEY_BYTES
            && text
                .chars()
                .all(|letter| letter == ':' || letter.is_ascii_hexdigit());
        let mut key = [0; KEY_BYTES];
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair
                .iter()
                .fold(0, |byte, digit| byte << 4 | u8::try_from(*digit).unwrap_or(0));
        }
        if whole {
            Ok(Self(key))
        } else {
            Err(ValueError::RssKey {
                text: text.to_owned(),
            })
        }
    }
}

impl fmt::Display for RssKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<String> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.write_str(&bytes.join(":"))
    }
}

/// Reads how many queue pairs a port has.
pub(crate) fn queue_pairs(text: &str) -> Result<u16, ValueError> {
    let most = u32::from(QUEUE_PAIRS_MOST);
    let pairs = value::number(text, 1, most)?;
    u16::try_from(pairs).map_err(|_| ValueError::Number {
        text: text.to_owned(),
        least: 1,
        most,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_with_and_without_colons_and_shows_as_ethtool_does() {
        let shown = (0..40)
            .map(|byte| format!("{:02x}", byte * 6))
            .collect::<Vec<_>>();
        let key: RssKey = shown.concat().to_uppercase().parse().unwrap();
        assert_eq!((key.0[0], key.0[1], key.0[39]), (0, 6, 234));
        assert_eq!(key.to_string(), shown.join(":"));
        assert_eq!(key.to_string().parse(), Ok(key));
    }

    #[test]
    fn a_key_of_another_size_or_alphabet_is_refused() {
        for text in [
            "".to_owned(),
            "6d".repeat(39),
            "6d".repeat(41),
            format!("{}g0", "6d".repeat(39)),
            format!("{} 6", "6d".repeat(39)),
            format!("{}\u{ff11}1", "6d".repeat(39)),
        ] {
            assert_eq!(
                text.parse::<RssKey>().unwrap_err().to_string(),
                format!("`{text}` is not an RSS key; wanted 40 bytes in hexadecimal, such as 6d:5a:56:...")
            );
        }
    }

    #[test]
    fn a_port_has_1_to_16_pairs() {
        assert_eq!((queue_pairs("1"), queue_pairs("16")), (Ok(1), Ok(16)));
        for text in ["0", "17", "-1", "two", "65537"] {
            assert_eq!(
                queue_pairs(text).unwrap_err().to_string(),
                format!("`{text}` is not a whole number from 1 to 16")
            );
        }
    }
}
