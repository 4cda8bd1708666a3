//! What the operator says about a port: one vhost-user socket joined to one device.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::device::DeviceSpec;
use crate::rss::RssKey;
use crate::value::{self, ValueError};

/// Bytes of a path in a Unix socket address: 108, less the closing NUL.
const SOCKET_PATH_MOST: usize = 107;

/// The smallest MTU, IPv4's (RFC 791).
pub(crate) const MTU_LEAST: u16 = 68;

/// The largest MTU for now: the frame then fits the room every receive buffer has.
const MTU_MOST: u16 = 1500;

/// One port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// By which logs, counters and the control socket name it.
    pub name: String,
    /// What is at the wire's end; `None` for a port that waits for a device.
    pub device: Option<DeviceSpec>,
    /// What is at the guest's end.
    pub socket: SocketSpec,
    /// Name of the [`MapConfig`](crate::MapConfig) that holds this guest's memory.
    pub map: String,
    /// How long workers poll this port's queues before they sleep.
    pub poll: Poll,
    /// Largest packet, without the Ethernet header: 68 to 1500.
    pub mtu: u16,
    /// Most queue pairs the guest may use: 1 to 16.
    pub queue_pairs: u16,
    /// How received frames are spread over them; `None` for a key drawn when the device is opened.
    pub rss_key: Option<RssKey>,
}

/// How a port and its front-end find each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketSpec {
    /// We listen, the VMM connects, again and again.
    Listen {
        /// Where the socket is made, at most 107 bytes.
        path: PathBuf,
        /// Its permission bits, within 0o777.
        mode: u32,
    },
    /// The VMM listens, we connect.
    Connect {
        /// Where its socket is, at most 107 bytes.
        path: PathBuf,
    },
    /// Whoever started us left a connected or listening socket open.
    Inherited {
        /// Its number, 3 or above.
        fd: i32,
    },
}

impl SocketSpec {
    /// Its path, where it has one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Listen { path, .. } | Self::Connect { path } => Some(path),
            Self::Inherited { .. } => None,
        }
    }
}

/// What a worker does with a port that has nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// Looks on for this many microseconds, then sleeps until an interrupt or a kick. 0 sleeps at once.
    Micros(u32),
    /// Never sleeps: lowest latency, a CPU always busy.
    Always,
}

impl FromStr for Poll {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "always" {
            return Ok(Self::Always);
        }
        value::number(text, 0, u32::MAX)
            .map(Self::Micros)
            .map_err(|_| ValueError::Poll {
                text: text.to_owned(),
            })
    }
}

impl fmt::Display for Poll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Micros(micros) => micros.fmt(f),
            Self::Always => f.write_str("always"),
        }
    }
}

/// Takes a path that can be a Unix socket's. Relative ones are left as they are.
pub(crate) fn socket_path(path: PathBuf) -> Result<PathBuf, ValueError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(ValueError::PathEmpty);
    }
    if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
        return Err(ValueError::PathNul { at });
    }
    if bytes.len() > SOCKET_PATH_MOST {
        return Err(ValueError::PathLong {
            len: bytes.len(),
            most: SOCKET_PATH_MOST,
        });
    }
    Ok(path)
}

/// Whether two paths are one. Compared as written, but for `./` and doubled slashes, and from the folder this process is
/// in. Links are for the kernel to follow.
pub fn same_path(one: &Path, other: &Path) -> bool {
    let parts = |path: &Path| -> PathBuf {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        path.components()
            .filter(|part| *part != Component::CurDir)
            .collect()
    };
    parts(one) == parts(other)
}

/// Reads permission bits: octal digits, with or without `0o` in front.
pub(crate) fn socket_mode(text: &str) -> Result<u32, ValueError> {
    let wrong = || ValueError::Mode {
        text: text.to_owned(),
    };
    let octal = value::digits(text.strip_prefix("0o").unwrap_or(text)).ok_or_else(wrong)?;
    let mode = u32::from_str_radix(octal, 8).map_err(|_| wrong())?;
    if mode > 0o777 {
        return Err(ValueError::ModeBits { mode });
    }
    Ok(mode)
}

/// Reads an MTU.
pub(crate) fn mtu(text: &str) -> Result<u16, ValueError> {
    let (least, most) = (u32::from(MTU_LEAST), u32::from(MTU_MOST));
    let mtu = value::number(text, 0, u32::MAX).map_err(|_| ValueError::Number {
        text: text.to_owned(),
        least,
        most,
    })?;
    if mtu < least {
        return Err(ValueError::MtuLow { mtu });
    }
    u16::try_from(mtu)
        .ok()
        .filter(|mtu| *mtu <= MTU_MOST)
        .ok_or(ValueError::MtuHigh { mtu, most: MTU_MOST })
}

/// Reads the number of a file descriptor to inherit. The standard streams are never it.
pub(crate) fn fd(text: &str) -> Result<i32, ValueError> {
    value::digits(text)
        .and_then(|digits| digits.parse().ok())
        .filter(|fd| *fd > 2)
        .ok_or_else(|| ValueError::Fd {
            text: text.to_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T: fmt::Debug>(result: Result<T, ValueError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn polling_is_microseconds_or_always() {
        assert_eq!("0".parse(), Ok(Poll::Micros(0)));
        assert_eq!("always".parse(), Ok(Poll::Always));
        assert_eq!(
            refused("-5".parse::<Poll>()),
            "`-5` is not a polling time; wanted microseconds from 0 (never poll, sleep at once) to 4294967295, \
             or `always`"
        );
    }

    #[test]
    fn a_socket_path_fits_the_kernels_address() {
        assert_eq!(socket_path("vm0.sock".into()), Ok("vm0.sock".into()));
        assert!(socket_path("x".repeat(107).into()).is_ok());
        assert_eq!(
            refused(socket_path("x".repeat(108).into())),
            "the path is 108 bytes long, and a Unix socket address has room for 107 (108 with the closing NUL)"
        );
        assert_eq!(refused(socket_path("".into())), "the path is empty");
        assert_eq!(
            refused(socket_path("a\0b".into())),
            "the path has a NUL byte at position 1"
        );
    }

    #[test]
    fn a_socket_mode_is_octal_and_within_0777() {
        for text in ["660", "0660", "0o660"] {
            assert_eq!(socket_mode(text), Ok(0o660));
        }
        for text in ["", "rw", "0x1b0", "+660", "688", "0o", "77777777777777"] {
            assert_eq!(
                refused(socket_mode(text)),
                format!("`{text}` is not a socket mode; wanted octal permission bits such as 0600 or 0660")
            );
        }
        assert_eq!(
            refused(socket_mode("1777")),
            "socket mode 1777 has bits outside 0777"
        );
    }

    #[test]
    fn an_mtu_out_of_bounds_says_why() {
        assert_eq!((mtu("68"), mtu("1500")), (Ok(68), Ok(1500)));
        assert_eq!(refused(mtu("67")), "mtu 67 is below 68, the least IPv4 allows");
        for text in ["1501", "9000", "70000"] {
            assert_eq!(
                refused(mtu(text)),
                format!(
                    "mtu {text} is above 1500: a receive buffer holds one standard frame, \
                     jumbo frames are not served yet"
                )
            );
        }
        assert_eq!(refused(mtu("-1")), "`-1` is not a whole number from 68 to 1500");
    }

    #[test]
    fn the_standard_streams_are_not_inherited_sockets() {
        assert_eq!(fd("3"), Ok(3));
        for text in ["2", "-1", "x", "2147483648"] {
            assert_eq!(
                refused(fd(text)),
                format!(
                    "`{text}` is not a file descriptor to inherit; wanted a number from 3 to 2147483647, \
                     as 0, 1 and 2 are standard streams"
                )
            );
        }
    }
}
