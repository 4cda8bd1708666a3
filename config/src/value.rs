//! Why one value cannot be taken, whether it came from a flag or from a key of the file.
//!
//! The texts do not name the flag or key: who asked does, around them.

use clap::ValueEnum;

use crate::nearest::nearest;
use crate::port::MTU_LEAST;

/// What is wrong with one value, with the numbers that would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not a number, or one out of range.
    #[error("`{}` is not a whole number from {least} to {most}", text.escape_debug())]
    Number {
        /// What was given.
        text: String,
        /// Smallest accepted.
        least: u32,
        /// Largest accepted.
        most: u32,
    },
    /// None of a fixed set of words.
    #[error("`{}` is not one of {}{}", text.escape_debug(), known.join(", "), suggestion(text, known))]
    Choice {
        /// What was given.
        text: String,
        /// The accepted words.
        known: Vec<String>,
    },
    /// No known form of device.
    #[error(
        "`{}` is not a device; accepted are a PCI address (0000:01:00.0 or 01:00.0), tap:NAME and vfio-user:PATH",
        text.escape_debug()
    )]
    Device {
        /// What was given.
        text: String,
    },
    /// A model told something it cannot do.
    #[error(
        "`{}` does not say what a model is to do; wanted rx=SIZE, 64 to 9234 bytes on the wire, and copy, separated by \
         a comma", words.escape_debug()
    )]
    Model {
        /// What stands behind `model:`.
        words: String,
    },
    /// A PCI address whose form is right and whose number cannot be.
    #[error("PCI {part} {value:x} in `{text}` is above {most:x} (hexadecimal)")]
    PciRange {
        /// The whole address.
        text: String,
        /// `device` or `function`.
        part: &'static str,
        /// The number given.
        value: u8,
        /// Largest accepted.
        most: u8,
    },
    /// A tap name no network interface can have.
    #[error("tap name `{}` is {} bytes long; an interface name has 1 to 15", name.escape_debug(), name.len())]
    TapLength {
        /// What was given.
        name: String,
    },
    /// A tap name with something the kernel refuses or would replace by a number.
    #[error(
        "tap name `{}` cannot be an interface's: no `/`, `:`, `%`, blanks or control characters, nor `.` or `..`",
        name.escape_debug()
    )]
    TapName {
        /// What was given.
        name: String,
    },
    /// A port or map name that would not be safe in logs and metrics.
    #[error(
        "name `{}` is not usable: wanted 1 to 32 of the letters a-z and A-Z, digits, `-` and `_`",
        name.escape_debug()
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// No path at all.
    #[error("the path is empty")]
    PathEmpty,
    /// A path with a NUL byte, where the kernel would cut it.
    #[error("the path has a NUL byte at position {at}")]
    PathNul {
        /// Bytes before it.
        at: usize,
    },
    /// A path that does not fit a Unix socket address.
    #[error(
        "the path is {len} bytes long, and a Unix socket address has room for {most} (108 with the closing NUL)"
    )]
    PathLong {
        /// Bytes given.
        len: usize,
        /// Bytes that fit.
        most: usize,
    },
    /// Permission bits that are not octal digits.
    #[error("`{}` is not a socket mode; wanted octal permission bits such as 0600 or 0660", text.escape_debug())]
    Mode {
        /// What was given.
        text: String,
    },
    /// Permission bits written as a decimal number.
    #[error("{number} is a decimal number, and a socket mode is octal: write 0o660 or \"0660\"")]
    ModeDecimal {
        /// What was given.
        number: String,
    },
    /// Bits a socket has no use for.
    #[error("socket mode {mode:04o} has bits outside 0777")]
    ModeBits {
        /// What was given.
        mode: u32,
    },
    /// An MTU below IPv4's least.
    #[error("mtu {mtu} is below {MTU_LEAST}, the least IPv4 allows")]
    MtuLow {
        /// What was given.
        mtu: u32,
    },
    /// An MTU that needs larger frames than the data path takes.
    #[error(
        "mtu {mtu} is above {most}: a receive buffer holds one standard frame, jumbo frames are not served yet"
    )]
    MtuHigh {
        /// What was given.
        mtu: u32,
        /// Largest accepted.
        most: u16,
    },
    /// Not 40 bytes in hexadecimal.
    #[error("`{}` is not an RSS key; wanted 40 bytes in hexadecimal, such as 6d:5a:56:...", text.escape_debug())]
    RssKey {
        /// What was given.
        text: String,
    },
    /// Neither microseconds nor `always`.
    #[error(
        "`{}` is not a polling time; wanted microseconds from 0 (never poll, sleep at once) to {}, or `always`",
        text.escape_debug(),
        u32::MAX
    )]
    Poll {
        /// What was given.
        text: String,
    },
    /// A file descriptor that cannot be a socket handed to us.
    #[error(
        "`{}` is not a file descriptor to inherit; wanted a number from 3 to {}, as 0, 1 and 2 are standard streams",
        text.escape_debug(),
        i32::MAX
    )]
    Fd {
        /// What was given.
        text: String,
    },
    /// Not a list of CPUs.
    #[error("`{}` is not a list of CPUs; wanted numbers and ranges such as 2,3 or 2-3", text.escape_debug())]
    Cpus {
        /// What was given.
        text: String,
    },
    /// A range whose end comes first.
    #[error("CPU range {first}-{last} runs backwards")]
    CpuRange {
        /// Number before the dash.
        first: u16,
        /// Number after it.
        last: u16,
    },
    /// Two workers for one CPU.
    #[error("CPU {cpu} is listed twice, and would run two workers that poll in turns")]
    CpuTwice {
        /// The CPU.
        cpu: u16,
    },
}

/// Reads a whole number, decimal digits only.
pub(crate) fn number(text: &str, least: u32, most: u32) -> Result<u32, ValueError> {
    digits(text)
        .and_then(|digits| digits.parse().ok())
        .filter(|value| (least..=most).contains(value))
        .ok_or_else(|| ValueError::Number {
            text: text.to_owned(),
            least,
            most,
        })
}

/// Returns `text` if it is decimal digits and nothing else; `str::parse` would let a `+` pass.
pub(crate) fn digits(text: &str) -> Option<&str> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then_some(text)
}

/// Reads one of an enum's words, or of the `more` words that only the file knows.
pub(crate) fn choice<T: ValueEnum>(text: &str, more: &[(&str, T)]) -> Result<T, ValueError> {
    let offered = T::value_variants().iter().filter_map(|variant| {
        Some((
            variant.to_possible_value()?.get_name().to_owned(),
            variant.clone(),
        ))
    });
    let more = more
        .iter()
        .map(|(name, variant)| ((*name).to_owned(), variant.clone()));
    let mut known = Vec::new();
    for (name, variant) in offered.chain(more) {
        if name == text {
            return Ok(variant);
        }
        known.push(name);
    }
    Err(ValueError::Choice {
        text: text.to_owned(),
        known,
    })
}

/// Reads the name of a port or a map.
pub(crate) fn name(text: &str) -> Result<String, ValueError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if !(1..=32).contains(&text.len()) || !text.bytes().all(plain) {
        return Err(ValueError::Name {
            name: text.to_owned(),
        });
    }
    Ok(text.to_owned())
}

fn suggestion(text: &str, known: &[String]) -> String {
    match nearest(text, known.iter().map(String::as_str)) {
        Some(word) => format!("; did you mean `{word}`?"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_digits_within_its_bounds() {
        assert_eq!(number("17", 1, 20), Ok(17));
        for text in ["", "0", "21", "+17", "-1", "1e1", "99999999999999999999"] {
            assert_eq!(
                number(text, 1, 20).unwrap_err().to_string(),
                format!("`{text}` is not a whole number from 1 to 20")
            );
        }
    }

    #[test]
    fn a_name_is_safe_in_logs_and_metrics() {
        assert_eq!(name("tenant-b_2").as_deref(), Ok("tenant-b_2"));
        assert_eq!(name(&"x".repeat(32)).unwrap().len(), 32);
        for bad in ["", "a.b", "a b", "é", &"x".repeat(33)] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            name("a\nb").unwrap_err().to_string(),
            "name `a\\nb` is not usable: wanted 1 to 32 of the letters a-z and A-Z, digits, `-` and `_`"
        );
    }
}
