//! Takes a map through its whole life on a real device and checks every step: the proof for a new kernel.
//!
//! ```text
//! cargo run -p vfio-glue --example map-check -- 0000:01:00.0 [auto|iommufd|type1] [auto|file|address]
//!
//! memory mapped before the device came ──card reads──▶ MAC loopback ──card writes──▶ memory mapped after
//! ```
//!
//! The device is an Intel 82576 (QEMU's will do) bound to vfio-pci, which nothing else uses. A map is made and
//! filled, the device comes, more is mapped, the device goes, comes again, and the map is emptied. Each time the
//! device is there its registers are read, interrupts are provoked, and a frame crosses from one region to the
//! other. Before that the back end itself is asked for what a map rests on: one pin for bytes that are mapped twice
//! for a moment, and attaches that are refused and leave everything as it was. Exit status 0 means that all of it was
//! seen.
//!
//! Read with: 82576 datasheet, chapters on interrupts, receive and transmit descriptors.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vfio_glue::address::{FrontendAddress, GuestAddress, Iova};
use vfio_glue::iommu::{DeviceAddress, Iommu, IommuChoice, IommuError, IommuKind, MapBy, MapRequest, choose};
use vfio_glue::map::{Device, MemoryMap};
use vfio_glue::memory::{DescriptorRing, HostRange, RegionSpec, Table, TableHint};
use vfio_glue::pci::config_space::{BusMaster, identity, set_bus_master};
use vfio_glue::pci::{PciAddress, PciFunction, Registers};

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

const GPIE: u32 = 0x1514;
const GPIE_MSIX: u32 = 1 << 4;
const EICS: u32 = 0x1520;
const EIMS: u32 = 0x1524;
const EIAC: u32 = 0x152c;

const RCTL: u32 = 0x0100;
/// Enable, any address, MAC loopback, CRC stripped.
const RCTL_LOOPBACK: u32 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 26;
const TCTL: u32 = 0x0400;
const TCTL_ENABLE: u32 = 0x0103_f0fa;
const RX_RING: u32 = 0xc000;
const TX_RING: u32 = 0xe000;
const RING_BASE_LOW: u32 = 0x00;
const RING_BASE_HIGH: u32 = 0x04;
const RING_LEN: u32 = 0x08;
const RX_SRRCTL: u32 = 0x0c;
/// Advanced descriptors with one buffer of 2 KiB.
const SRRCTL_ONE_BUFFER: u32 = 0x0200_0002;
const RING_TAIL: u32 = 0x18;
const RING_CONTROL: u32 = 0x28;
const RING_ENABLE: u32 = 1 << 25;
const DONE: u64 = 1;
/// Data descriptor: advanced, whole frame, CRC by the card, report when done.
const TX_WHOLE_FRAME: u64 = 1 << 29 | 1 << 27 | 1 << 25 | 1 << 24 | 3 << 20;

const REGION_BYTES: u64 = 8 << 20;
const FRAME_BYTES: u8 = 200;
/// A link takes half a second in QEMU, seconds on a card; everything else far less.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAILED: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let word = |index: usize| args.get(index).map_or("auto", String::as_str);
    let address: PciAddress = word(0).parse()?;
    let choice = match word(1) {
        "auto" => IommuChoice::Auto,
        "iommufd" => IommuChoice::Iommufd,
        "type1" => IommuChoice::Type1,
        other => return Err(format!("`{other}` is none of auto, iommufd, type1").into()),
    };
    let map_by = match word(2) {
        "auto" => MapBy::Auto,
        "file" => MapBy::File,
        "address" => MapBy::Address,
        other => return Err(format!("`{other}` is none of auto, file, address").into()),
    };
    let on = DeviceAddress::Pci(address);

    let chosen = choose(choice, map_by, &[address])?;
    println!("chosen: {}", chosen.reason);
    check_back_end(choose(choice, map_by, &[address])?.iommu, &on)?;
    let map = MemoryMap::new("main", chosen.iommu);
    let first = region(0)?;
    let table = map.add("check", vec![first.clone()])?;
    show(&map, "filled with no device");

    let device = map.attach(&on)?;
    let second = region(REGION_BYTES)?;
    let table = changed(&map, &table, vec![first, second.clone()])?;
    show(&map, "attached, filled further");
    check_device(&device, &table, 1)?;
    let other = MemoryMap::new("second", choose(choice, map_by, &[])?.iommu);
    match other.attach(&on) {
        Ok(_) => return Err("two maps have the device at once".into()),
        Err(error) => println!("a second map is refused: {}", chain(&error)),
    }

    device.detach()?;
    show(&map, "detached");
    let device = map.attach(&on)?;
    check_device(&device, &table, 2)?;
    show(&map, "attached again");

    let table = changed(&map, &table, vec![second])?;
    show(&map, "first region unmapped with the device attached");
    drop(device);
    map.let_go("check", table.extents())?;
    show(&map, "detached and emptied");
    ensure(map.snapshot().extents.is_empty(), "the map is not empty")?;
    println!("all well");
    Ok(())
}

/// Makes `wanted` the memory of the guest that has `now`. Nothing of it is in use.
fn changed(map: &Arc<MemoryMap>, now: &Table, wanted: Vec<RegionSpec>) -> Result<Arc<Table>> {
    let change = map.change("check", now, wanted)?;
    let next = Arc::clone(change.table());
    change.finish()?;
    Ok(next)
}

/// What a map relies on, asked of the back end alone. Memory stays mapped here for as long as it is mapped there.
fn check_back_end(mut iommu: Box<dyn Iommu>, on: &DeviceAddress) -> Result<()> {
    const AT: Iova = Iova::new(0x1000_0000);
    const AGAIN: Iova = Iova::new(0x2000_0000);
    /// Beyond what any IOMMU has had so far.
    const OUT_OF_REACH: Iova = Iova::new(1 << 60);
    let half = REGION_BYTES / 2;
    let memory = memory()?;
    let before = pinned_bytes(iommu.kind())?;
    let pinned = |iommu: &dyn Iommu| Ok::<u64, Box<dyn Error>>(pinned_bytes(iommu.kind())? - before);

    let whole = request(&memory, 0, REGION_BYTES, AT, None)?;
    iommu.map(&whole)?;
    ensure(pinned(iommu.as_ref())? == 0, "bytes are pinned with no device")?;
    iommu.attach(on)?;
    ensure(
        pinned(iommu.as_ref())? == REGION_BYTES,
        "what is mapped is not what is pinned",
    )?;
    let again = request(&memory, half, half, AGAIN, Some(AT.offset(half)))?;
    iommu.map(&again)?;
    let twice = pinned(iommu.as_ref())?;
    let expected = if iommu.shares_pins() {
        REGION_BYTES
    } else {
        REGION_BYTES + half
    };
    ensure(
        twice == expected,
        "bytes mapped twice are pinned otherwise than said",
    )?;
    iommu.unmap(AT, REGION_BYTES)?;
    ensure(pinned(iommu.as_ref())? == half, "the second mapping lost its pin")?;
    iommu.unmap(AGAIN, half)?;
    ensure(pinned(iommu.as_ref())? == 0, "pins are left")?;
    iommu.detach(on)?;
    println!(
        "half of {} KiB mapped a second time: {} KiB pinned for the moment",
        REGION_BYTES / 1024,
        twice / 1024
    );

    let first = request(&memory, 0, half, AT, None)?;
    iommu.map(&first)?;
    let outside = request(&memory, half, half, OUT_OF_REACH, None)?;
    iommu.map(&outside)?;
    match iommu.attach(on).map(drop) {
        Err(error @ IommuError::Stranded { .. }) => println!("stranding: {error}"),
        other => return Err(format!("not refused for what is out of reach: {other:?}").into()),
    }
    iommu.unmap(OUT_OF_REACH, half)?;

    // The second of two mappings cannot be pinned for as long as its bytes are not in the file.
    let second = request(&memory, half, half, AGAIN, None)?;
    iommu.map(&second)?;
    memory.set_len(half)?;
    match iommu.attach(on).map(drop) {
        Err(error) => println!("half way: {}", chain(&error)),
        Ok(()) => return Err("bytes that are not there were pinned".into()),
    }
    memory.set_len(REGION_BYTES)?;
    ensure(pinned(iommu.as_ref())? == 0, "pins of a refused attach are left")?;
    iommu.attach(on)?;
    ensure(
        pinned(iommu.as_ref())? == REGION_BYTES,
        "after a refused attach something is not mapped",
    )?;
    iommu.detach(on)?;
    iommu.unmap(AT, half)?;
    iommu.unmap(AGAIN, half)?;
    ensure(
        iommu.usable_ranges()?.is_none(),
        "ranges are narrow with no device",
    )
}

fn request(
    memory: &Arc<File>,
    offset: u64,
    len: u64,
    iova: Iova,
    same_as: Option<Iova>,
) -> Result<MapRequest> {
    Ok(MapRequest {
        iova,
        len,
        file: Arc::clone(memory),
        offset,
        host: HostRange::of_file(memory, offset, len)?,
        same_as,
    })
}

/// What the kernel counts as pinned by this process: iommufd and type1 count in different places.
fn pinned_bytes(kind: IommuKind) -> Result<u64> {
    let key = if kind == IommuKind::Iommufd {
        "VmPin:"
    } else {
        "VmLck:"
    };
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib
        .ok_or("the kernel does not tell what is pinned")?
        .parse::<u64>()?
        * 1024)
}

/// [`REGION_BYTES`] of memory that can be shared.
fn memory() -> Result<Arc<File>> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    file.set_len(REGION_BYTES)?;
    Ok(Arc::new(file))
}

/// Guest memory of [`REGION_BYTES`] at `guest`.
fn region(guest: u64) -> Result<RegionSpec> {
    Ok(RegionSpec {
        guest: GuestAddress(guest),
        frontend: FrontendAddress(guest),
        len: REGION_BYTES,
        file: memory()?,
        file_offset: 0,
    })
}

fn check_device(device: &Device, table: &Table, round: u8) -> Result<()> {
    let function = device.function();
    function.reset()?;
    set_bus_master(function.as_ref(), BusMaster::On)?;
    let id = identity(function.as_ref())?;
    let registers = function.bar(0)?;
    let (low, high) = (registers.read32(RAL), registers.read32(RAH));
    ensure(low != u32::MAX && high != u32::MAX, "registers read as all ones")?;
    let started = Instant::now();
    registers.write32(CTRL, registers.read32(CTRL) | CTRL_SLU);
    registers.write32(MDIC, MDIC_RESTART_LINK);
    wait_for("the link", || registers.read32(STATUS) & STATUS_LINK_UP != 0)?;
    println!(
        "  {:04x}:{:04x}, {} KiB of registers, {} vectors, mac (RAL, RAH) {low:08x} {high:08x}, link up after {:?}",
        id.vendor,
        id.device,
        registers.len() / 1024,
        function.vectors(),
        started.elapsed()
    );
    check_interrupts(function.as_ref(), registers.as_ref())?;
    check_dma(device.map(), registers.as_ref(), table, round)?;
    // Ends all DMA before the rings and the regions go.
    function.reset()?;
    Ok(())
}

fn check_interrupts(function: &dyn PciFunction, registers: &dyn Registers) -> Result<()> {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    let (first, second) = (eventfd(0, flags)?, eventfd(0, flags)?);
    let fired = |event: &OwnedFd| rustix::io::read(event, &mut [0_u8; 8]).is_ok();
    function.set_vector(1, Some(first.as_fd()))?;
    function.set_vector(2, Some(second.as_fd()))?;
    registers.write32(GPIE, GPIE_MSIX);
    registers.write32(EIAC, 0b110);
    registers.write32(EIMS, 0b110);
    let provoked = Instant::now();
    registers.write32(EICS, 0b010);
    wait_for("the interrupt of vector 1", || fired(&first))?;
    let took = provoked.elapsed();
    ensure(!fired(&second), "vector 2 fired for vector 1")?;

    function.set_vector(1, None)?;
    registers.write32(EICS, 0b010);
    registers.write32(EICS, 0b100);
    wait_for("the interrupt of vector 2", || fired(&second))?;
    ensure(!fired(&first), "a disconnected vector fired")?;

    function.set_vector(1, Some(first.as_fd()))?;
    registers.write32(EICS, 0b010);
    wait_for("the interrupt of vector 1 connected anew", || fired(&first))?;
    function.set_vector(1, None)?;
    function.set_vector(2, None)?;
    println!("  interrupts: connected, disconnected and connected anew; the first came after {took:?}");
    Ok(())
}

/// Has the card read a frame in the first region and write it into the second, through its loopback.
fn check_dma(map: &Arc<MemoryMap>, registers: &dyn Registers, table: &Table, round: u8) -> Result<()> {
    let piece = |at: u64, len| {
        let found = table.lookup(&mut TableHint::default(), GuestAddress(at), len);
        found.ok_or("memory is in no region")
    };
    let source = piece(0x1000 * u64::from(round) + 0x123, FRAME_BYTES.into())?;
    let target = piece(REGION_BYTES + 0x5000 * u64::from(round) + 12, 2048)?;
    let frame: Vec<u8> = (0..FRAME_BYTES)
        .map(|byte| byte.wrapping_mul(7) ^ round)
        .collect();
    source.host.copy_from(&frame);

    let mut tx = DescriptorRing::new(map, "check", 8)?;
    let mut rx = DescriptorRing::new(map, "check", 8)?;
    start_ring(registers, RX_RING, rx.iova(), rx.len_bytes())?;
    start_ring(registers, TX_RING, tx.iova(), tx.len_bytes())?;
    registers.write32(TCTL, TCTL_ENABLE);
    registers.write32(RCTL, RCTL_LOOPBACK);
    rx.write(0, [target.iova.raw(), 0]);
    registers.write32(RX_RING + RING_TAIL, 1);
    let len = u64::from(FRAME_BYTES);
    tx.write(0, [source.iova.raw(), len << 46 | TX_WHOLE_FRAME | len]);
    registers.write32(TX_RING + RING_TAIL, 1);
    wait_for("the sent descriptor's report", || {
        tx.load_report(0) >> 32 & DONE != 0
    })?;
    wait_for("the received descriptor's report", || {
        rx.load_report(0) & DONE != 0
    })?;

    let stored = rx.load_report(0) >> 32 & 0xffff;
    let mut seen = vec![0; FRAME_BYTES.into()];
    target.host.copy_to(&mut seen);
    ensure(stored == u64::from(FRAME_BYTES), "the frame has another length")?;
    ensure(seen == frame, "the frame has other bytes")?;
    println!(
        "  dma: {stored} bytes read at iova {} and written at {}, equal",
        source.iova, target.iova
    );
    registers.write32(RCTL, 0);
    registers.write32(TCTL, 0);
    for ring in [RX_RING, TX_RING] {
        registers.write32(ring + RING_CONTROL, 0);
        wait_for("a ring to stop", || {
            registers.read32(ring + RING_CONTROL) & RING_ENABLE == 0
        })?;
    }
    Ok(())
}

fn start_ring(registers: &dyn Registers, ring: u32, base: Iova, len: u32) -> Result<()> {
    let [low, high] = [base.raw() & 0xffff_ffff, base.raw() >> 32];
    registers.write32(ring + RING_BASE_LOW, u32::try_from(low)?);
    registers.write32(ring + RING_BASE_HIGH, u32::try_from(high)?);
    registers.write32(ring + RING_LEN, len);
    if ring == RX_RING {
        registers.write32(ring + RX_SRRCTL, SRRCTL_ONE_BUFFER);
    }
    registers.write32(ring + RING_CONTROL, RING_ENABLE);
    wait_for("a ring to start", || {
        registers.read32(ring + RING_CONTROL) & RING_ENABLE != 0
    })
}

fn wait_for(what: &str, mut happened: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        if Instant::now() > deadline {
            return Err(format!("{what} did not come within {PATIENCE:?}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn show(map: &MemoryMap, when: &str) {
    let seen = map.snapshot();
    println!(
        "{when}: {} devices, {} extents, {} KiB mapped, {} KiB pinned",
        seen.devices.len(),
        seen.extents.len(),
        seen.mapped_bytes / 1024,
        seen.pinned_bytes / 1024
    );
    let usable: Vec<String> = seen.usable.iter().map(|range| format!("{range:#x?}")).collect();
    println!("  usable {}", usable.join(" "));
    for extent in seen.extents {
        println!("  {} + {:#x} by {}", extent.iova, extent.len, extent.by.as_str());
    }
}

fn ensure(holds: bool, otherwise: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
