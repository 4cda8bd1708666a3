//! The device at the wire's end of a port, as the operator names it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::port::{self, same_path};
use crate::value::ValueError;

/// What a port's frames go to and come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceSpec {
    /// A PCI function bound to vfio-pci: `0000:01:00.0`, or `01:00.0` in domain 0.
    Pci(PciAddress),
    /// A tap interface of the kernel, for machines without a card: `tap:NAME`.
    Tap(String),
    /// A device in another process, reached over this vfio-user socket: `vfio-user:PATH`.
    VfioUser(PathBuf),
    /// The igb driver on a card of this process's own, for measuring: no frame leaves the machine.
    Model(ModelSpec),
}

/// What the card that is no card does: `model`, and after a colon, separated by a comma, `rx=SIZE` and `copy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ModelSpec {
    /// Bytes on the wire, frame check sequence included, of the frames it fills every receive buffer with. Without, it
    /// receives nothing.
    pub rx_bytes: Option<u16>,
    /// Whether a thread of its own moves the payload, as a card's DMA engine would. Otherwise only descriptors change.
    pub copies: bool,
}

impl FromStr for DeviceSpec {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if let Some(name) = text.strip_prefix("tap:") {
            return tap_name(name).map(Self::Tap);
        }
        if text == "model" {
            return Ok(Self::Model(ModelSpec::default()));
        }
        if let Some(words) = text.strip_prefix("model:") {
            return model(words).map(Self::Model);
        }
        if let Some(path) = text.strip_prefix("vfio-user:") {
            return port::socket_path(path.into()).map(Self::VfioUser);
        }
        text.parse().map(Self::Pci)
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Tap(name) => write!(f, "tap:{name}"),
            Self::VfioUser(path) => write!(f, "vfio-user:{}", path.display()),
            Self::Model(ModelSpec { rx_bytes, copies }) => {
                f.write_str("model")?;
                let rx = rx_bytes.map(|bytes| format!("rx={bytes}"));
                let words: Vec<String> = rx.into_iter().chain(copies.then(|| "copy".to_owned())).collect();
                if words.is_empty() {
                    return Ok(());
                }
                write!(f, ":{}", words.join(","))
            }
        }
    }
}

impl DeviceSpec {
    /// Whether both name one device, however each is written.
    pub fn is_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::VfioUser(one), Self::VfioUser(other)) => same_path(one, other),
            _ => self == other,
        }
    }
}

/// What a port has at the wire's end, or `none` for a port that waits for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceOrNone(pub(crate) Option<DeviceSpec>);

impl FromStr for DeviceOrNone {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "none" {
            return Ok(Self(None));
        }
        text.parse().map(|device| Self(Some(device)))
    }
}

/// Where a PCI function sits. Shown in full, as sysfs names it: `0000:01:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Also called segment. More than 16 bits exist: functions behind Intel's VMD start at 10000.
    pub domain: u32,
    /// Bus within the domain.
    pub bus: u8,
    /// Device on the bus, 0 to 0x1f.
    pub device: u8,
    /// Function of the device, 0 to 7.
    pub function: u8,
}

impl FromStr for PciAddress {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let wrong = || ValueError::Device {
            text: text.to_owned(),
        };
        let (slot, function) = text.rsplit_once('.').ok_or_else(wrong)?;
        let (head, device) = slot.rsplit_once(':').ok_or_else(wrong)?;
        let (domain, bus) = head.rsplit_once(':').unwrap_or(("0000", head));

        let address = Self {
            domain: hex(domain, 4, 8).ok_or_else(wrong)?,
            bus: hex_byte(bus, 2).ok_or_else(wrong)?,
            device: hex_byte(device, 2).ok_or_else(wrong)?,
            function: hex_byte(function, 1).ok_or_else(wrong)?,
        };
        for (part, value, most) in [
            ("device", address.device, 0x1f),
            ("function", address.function, 7),
        ] {
            if value > most {
                return Err(ValueError::PciRange {
                    text: text.to_owned(),
                    part,
                    value,
                    most,
                });
            }
        }
        Ok(address)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

/// Reads `least` to `most` hexadecimal digits and nothing else.
fn hex(text: &str, least: usize, most: usize) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    ((least..=most).contains(&text.len()) && plain).then(|| u32::from_str_radix(text, 16).ok())?
}

fn hex_byte(text: &str, len: usize) -> Option<u8> {
    hex(text, len, len)?.try_into().ok()
}

/// Reads what stands behind `model:`.
fn model(words: &str) -> Result<ModelSpec, ValueError> {
    let wrong = || ValueError::Model {
        words: words.to_owned(),
    };
    let mut model = ModelSpec::default();
    for word in words.split(',') {
        match word.strip_prefix("rx=") {
            Some(size) if model.rx_bytes.is_none() => {
                let digits = size.bytes().all(|byte| byte.is_ascii_digit());
                let size = digits.then(|| size.parse().ok()).flatten();
                // The shortest frame of Ethernet, and the longest any card takes.
                model.rx_bytes = Some(size.filter(|size| (64..=9234).contains(size)).ok_or_else(wrong)?);
            }
            None if word == "copy" && !model.copies => model.copies = true,
            _ => return Err(wrong()),
        }
    }
    Ok(model)
}

/// Reads the name of a tap interface under the kernel's rules (`dev_valid_name`). A `%` is refused too: in
/// `tap%d` the kernel would fill in a number, and the name would no longer say which interface.
fn tap_name(name: &str) -> Result<String, ValueError> {
    if !(1..=15).contains(&name.len()) {
        return Err(ValueError::TapLength {
            name: name.to_owned(),
        });
    }
    let refused = |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control();
    if name == "." || name == ".." || name.contains(refused) {
        return Err(ValueError::TapName {
            name: name.to_owned(),
        });
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(text: &str) -> String {
        text.parse::<DeviceSpec>().unwrap_err().to_string()
    }

    #[test]
    fn a_pci_address_may_leave_out_domain_0() {
        let address = PciAddress {
            domain: 0,
            bus: 1,
            device: 0x1f,
            function: 7,
        };
        assert_eq!("0000:01:1f.7".parse(), Ok(DeviceSpec::Pci(address)));
        assert_eq!("01:1F.7".parse(), Ok(DeviceSpec::Pci(address)));
        assert_eq!(address.to_string(), "0000:01:1f.7");
        assert_eq!("10000:e1:00.0".parse::<PciAddress>().unwrap().domain, 0x10000);
    }

    #[test]
    fn a_device_of_no_known_form_is_told_the_forms() {
        let forms = [
            "",
            "eth0",
            "1:00.0",
            "01:00",
            "01:00.00",
            "00:01:00.0",
            "0:0000:01:00.0",
            "01:0g.0",
            "+1:00.0",
            "é:00.0",
        ];
        for text in forms {
            assert_eq!(
                error(text),
                format!(
                    "`{text}` is not a device; accepted are a PCI address (0000:01:00.0 or 01:00.0), \
                     tap:NAME and vfio-user:PATH"
                )
            );
        }
    }

    #[test]
    fn pci_numbers_out_of_range_are_named() {
        assert_eq!(
            error("01:20.0"),
            "PCI device 20 in `01:20.0` is above 1f (hexadecimal)"
        );
        assert_eq!(
            error("0000:01:00.8"),
            "PCI function 8 in `0000:01:00.8` is above 7 (hexadecimal)"
        );
    }

    #[test]
    fn a_tap_name_is_one_the_kernel_takes() {
        assert_eq!("tap:vm0.100".parse(), Ok(DeviceSpec::Tap("vm0.100".to_owned())));
        assert_eq!(
            error("tap:"),
            "tap name `` is 0 bytes long; an interface name has 1 to 15"
        );
        assert_eq!(
            error("tap:a-name-of-16-byt"),
            "tap name `a-name-of-16-byt` is 16 bytes long; an interface name has 1 to 15"
        );
        for name in ["tap%d", "a/b", "a b", "a:1", "..", "a\tb"] {
            assert_eq!(
                error(&format!("tap:{name}")),
                format!(
                    "tap name `{}` cannot be an interface's: no `/`, `:`, `%`, blanks or control characters, \
                     nor `.` or `..`",
                    name.escape_debug()
                )
            );
        }
    }

    #[test]
    fn a_vfio_user_socket_obeys_the_rules_of_socket_paths() {
        assert_eq!(
            "vfio-user:/run/card".parse(),
            Ok(DeviceSpec::VfioUser("/run/card".into()))
        );
        assert_eq!(error("vfio-user:"), "the path is empty");
    }

    #[test]
    fn a_model_receives_frames_of_a_size_and_may_copy() {
        let model = |rx_bytes, copies| Ok(DeviceSpec::Model(ModelSpec { rx_bytes, copies }));
        assert_eq!("model".parse(), model(None, false));
        assert_eq!("model:rx=64".parse(), model(Some(64), false));
        assert_eq!("model:copy".parse(), model(None, true));
        assert_eq!("model:rx=1518,copy".parse(), model(Some(1518), true));
        assert_eq!(
            "model:copy,rx=1518".parse::<DeviceSpec>().unwrap().to_string(),
            "model:rx=1518,copy"
        );
        let words = [
            "",
            "rx",
            "rx=",
            "rx=63",
            "rx=9235",
            "rx=+64",
            "rx=64,rx=64",
            "copy,copy",
            "tx",
        ];
        for words in words {
            assert_eq!(
                error(&format!("model:{words}")),
                format!(
                    "`{words}` does not say what a model is to do; wanted rx=SIZE, 64 to 9234 bytes on the wire, \
                     and copy, separated by a comma"
                )
            );
        }
    }

    #[test]
    fn only_a_port_may_have_none() {
        assert_eq!("none".parse(), Ok(DeviceOrNone(None)));
        assert_eq!(
            "tap:none".parse(),
            Ok(DeviceOrNone(Some(DeviceSpec::Tap("none".to_owned()))))
        );
        assert!(error("none").starts_with("`none` is not a device"));
    }

    proptest! {
        #[test]
        fn a_shown_address_reads_back(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let device = DeviceSpec::Pci(PciAddress { domain, bus, device, function });
            prop_assert_eq!(device.to_string().parse(), Ok(device));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9a-f:.]{0,14}|(tap:|vfio-user:|model:)?\\PC{0,130}") {
            if let Ok(device) = text.parse::<DeviceSpec>() {
                prop_assert_eq!(device.to_string().parse(), Ok(device));
            }
        }
    }
}
