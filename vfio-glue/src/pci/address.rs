//! Where a PCI function sits: domain, bus, device, function.

use std::fmt;
use std::str::FromStr;

/// A PCI function's place, written `0000:01:00.0`; the domain may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// PCI domain (segment).
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// Text that is no PCI address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no PCI address: write it like 0000:01:00.0 or 01:00.0, in hexadecimal")]
pub struct PciAddressError {
    /// What was given.
    pub text: String,
}

impl FromStr for PciAddress {
    type Err = PciAddressError;

    fn from_str(text: &str) -> Result<Self, PciAddressError> {
        parse(text).ok_or_else(|| PciAddressError {
            text: text.to_owned(),
        })
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (place, function) = text.rsplit_once('.')?;
    let mut parts = place.rsplit(':');
    let device = u8::from_str_radix(parts.next()?, 16).ok()?;
    let bus = u8::from_str_radix(parts.next()?, 16).ok()?;
    let domain = parts
        .next()
        .map_or(Some(0), |domain| u32::from_str_radix(domain, 16).ok())?;
    let function = u8::from_str_radix(function, 16).ok()?;
    (parts.next().is_none() && device < 32 && function < 8).then_some(PciAddress {
        domain,
        bus,
        device,
        function,
    })
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_and_short_forms_name_the_same_function() {
        let long: PciAddress = "0000:01:00.0".parse().unwrap();
        assert_eq!("01:00.0".parse(), Ok(long));
        assert_eq!(long.to_string(), "0000:01:00.0");
    }

    #[test]
    fn anything_else_is_refused_with_the_text() {
        for text in ["", "eth0", "01:00", "01:20.0", "01:00.8", "1:2:3:4.0", "+1:00.0x"] {
            assert_eq!(
                text.parse::<PciAddress>(),
                Err(PciAddressError {
                    text: text.to_owned()
                })
            );
        }
    }
}
