//! Opens an Intel 82576, prints its MAC address and link, and sends one frame: the short way to a device.
//!
//! ```text
//! cargo run -p vfio-glue --example open -- 0000:01:00.0
//! ```
//!
//! The device (QEMU's igb will do) is bound to vfio-pci and used by nobody else, and this user owns its nodes; no
//! other privilege is needed. The frame goes to everybody, with the EtherType for local experiments (88b5) and a
//! line of text. Read with: 82576 datasheet, chapters on link, receive addresses and transmit descriptors.

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use vfio_glue::map::Device;
use vfio_glue::memory::{DescriptorRing, DmaBuffer};
use vfio_glue::pci::Registers;
use vfio_glue::pci::config_space::{BusMaster, set_bus_master};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const CTRL: u32 = 0x0000;
const CTRL_SLU: u32 = 1 << 6;
const STATUS: u32 = 0x0008;
const STATUS_LINK_UP: u32 = 1 << 1;
const MDIC: u32 = 0x0020;
/// PHY 1, register 0 := autonegotiation on, restarted.
const MDIC_RESTART_LINK: u32 = 0x0420_1200;
const RAL: u32 = 0x5400;
const RAH: u32 = 0x5404;

const TCTL: u32 = 0x0400;
const TCTL_ENABLE: u32 = 0x0103_f0fa;
const TDBAL: u32 = 0xe000;
const TDBAH: u32 = 0xe004;
const TDLEN: u32 = 0xe008;
const TDT: u32 = 0xe018;
const TXDCTL: u32 = 0xe028;
const TXDCTL_ENABLE: u32 = 1 << 25;
/// Data descriptor: advanced, whole frame, FCS by the card, report when done.
const TX_WHOLE_FRAME: u64 = 1 << 29 | 1 << 27 | 1 << 25 | 1 << 24 | 3 << 20;
const DONE: u64 = 1;

const BROADCAST: [u8; 6] = [0xff; 6];
const LOCAL_EXPERIMENT: [u8; 2] = [0x88, 0xb5];
const TEXT: &[u8] = b"one frame, by an unprivileged user, through a map of its own";
/// A link takes half a second in QEMU, seconds on a card.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let Err(error) = run() else {
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

fn run() -> Result<()> {
    let address = std::env::args()
        .nth(1)
        .ok_or("usage: open ADDRESS, like 0000:01:00.0")?;

    let device = vfio_glue::open(address.parse()?)?;
    let registers = device.function().bar(0)?;
    let mac = read_mac(registers.as_ref());

    let [a, b, c, d, e, f] = mac;
    registers.write32(CTRL, registers.read32(CTRL) | CTRL_SLU);
    registers.write32(MDIC, MDIC_RESTART_LINK);
    let link = wait_for(|| registers.read32(STATUS) & STATUS_LINK_UP != 0);
    println!(
        "{address} mac {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} link {}",
        if link { "up" } else { "down" }
    );
    if !link {
        return Err("there is no link to send a frame over".into());
    }
    let sent = send(&device, registers.as_ref(), &frame(mac));
    // Ends all DMA, whatever came of the frame, before its memory goes.
    device.function().reset()?;
    println!("sent {} bytes", sent?);
    Ok(())
}

fn read_mac(registers: &dyn Registers) -> [u8; 6] {
    let [a, b, c, d] = registers.read32(RAL).to_le_bytes();
    let [e, f, ..] = registers.read32(RAH).to_le_bytes();
    [a, b, c, d, e, f]
}

fn frame(mac: [u8; 6]) -> Vec<u8> {
    [&BROADCAST, &mac, &LOCAL_EXPERIMENT[..], TEXT].concat()
}

/// Has the card read one frame from memory of ours, and waits until it reports that it did.
fn send(device: &Device, registers: &dyn Registers, frame: &[u8]) -> Result<usize> {
    let buffer = DmaBuffer::new(device.map(), "frame", "open", frame.len())?;
    let place = buffer
        .slice(0, frame.len())
        .ok_or("the frame does not fit its buffer")?;
    place.copy_from(frame);
    let mut ring = DescriptorRing::new(device.map(), "open", 8)?;
    let len = frame.len() as u64;
    ring.write(0, [buffer.iova().raw(), len << 46 | TX_WHOLE_FRAME | len]);

    set_bus_master(device.function().as_ref(), BusMaster::On)?;
    let base = ring.iova().raw();
    registers.write32(TDBAL, u32::try_from(base & 0xffff_ffff)?);
    registers.write32(TDBAH, u32::try_from(base >> 32)?);
    registers.write32(TDLEN, ring.len_bytes());
    registers.write32(TCTL, TCTL_ENABLE);
    registers.write32(TXDCTL, TXDCTL_ENABLE);
    if !wait_for(|| registers.read32(TXDCTL) & TXDCTL_ENABLE != 0) {
        return Err("the card does not start its ring".into());
    }
    registers.write32(TDT, 1);
    let done = wait_for(|| ring.load_report(0) >> 32 & DONE != 0);
    // Memory goes with this function: the card is to be done with it.
    set_bus_master(device.function().as_ref(), BusMaster::Off)?;
    if done {
        Ok(frame.len())
    } else {
        Err("the card does not report the frame".into())
    }
}

/// Whether something happens before our patience ends.
fn wait_for(mut happened: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}
