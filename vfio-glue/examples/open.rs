//! Opens an Intel 82576 and prints its MAC address and link: the short way to a device.
//!
//! ```text
//! cargo run -p vfio-glue --example open -- 0000:01:00.0
//! ```
//!
//! The device is bound to vfio-pci, and this user owns its node. Read with: 82576 datasheet, RAL, RAH, STATUS.

use std::error::Error;
use std::process::ExitCode;

const STATUS: u32 = 0x0008;
const STATUS_LINK_UP: u32 = 1 << 1;
const RAL: u32 = 0x5400;
const RAH: u32 = 0x5404;

fn main() -> ExitCode {
    let Err(error) = print_mac_and_link() else {
        return ExitCode::SUCCESS;
    };
    eprintln!("{error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("because {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}

fn print_mac_and_link() -> Result<(), Box<dyn Error>> {
    let address = std::env::args()
        .nth(1)
        .ok_or("usage: open ADDRESS, like 0000:01:00.0")?;

    let device = vfio_glue::open(address.parse()?)?;
    let registers = device.function().bar(0)?;
    let status = registers.read32(STATUS);

    let [a, b, c, d] = registers.read32(RAL).to_le_bytes();
    let [e, f, ..] = registers.read32(RAH).to_le_bytes();
    let link = if status & STATUS_LINK_UP == 0 {
        "down"
    } else {
        "up"
    };
    println!("{address} mac {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} link {link}");
    Ok(())
}
