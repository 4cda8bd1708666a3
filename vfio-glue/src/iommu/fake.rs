//! A fake IOMMU for tests, stricter than the kernel: it refuses what overlaps, what is not whole pages, what lies
//! outside of its ranges, an unmap that is not exactly one map, a second mapping of bytes that are not where they are
//! said to be, and fails calls on request. What it does not refuse and no device should see, an unmap of memory a
//! device is using, it remembers.
//!
//! ```text
//! FakeKernel::iommu ──▶ one address space      FakeKernel::beside ──▶ another on the same machine:
//!                                              the same devices, groups and limit on locked memory
//! ```
//!
//! It says what it is (`none` with no translation of its own) and no configuration can choose it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::fstat;

use super::reach::{PAGE, Reach};
use super::{Accounting, DeviceAddress, Iommu, IommuError, IommuKind, LockedMemory, MapRequest, MappedBy};
use crate::address::Iova;
use crate::pci::{PciAddress, PciFunction};

/// What stands behind a [`FakeKernel::iommu`], as a test looks at it. Cheap to clone.
#[derive(Clone)]
pub struct FakeKernel {
    machine: Arc<Mutex<Machine>>,
    space: usize,
}

/// What address spaces have in common.
#[derive(Default)]
struct Machine {
    spaces: Vec<Space>,
    devices: HashMap<String, Plugged>,
    locked: Option<Locked>,
}

/// The limit on locked memory.
#[derive(Clone, Copy)]
struct Locked {
    accounting: Accounting,
    limit: u64,
    elsewhere: u64,
}

/// A device somebody may attach.
struct Plugged {
    function: Arc<dyn PciFunction>,
    group: Option<u32>,
    reach: Option<Vec<RangeInclusive<u64>>>,
}

/// One address space and the devices on it.
#[derive(Default)]
struct Space {
    mapped: BTreeMap<u64, Mapping>,
    usable: Option<Vec<RangeInclusive<u64>>>,
    attached: Vec<DeviceAddress>,
    /// Attaches so far, those that have left again included.
    attaches: usize,
    most_mappings: Option<usize>,
    /// Whether each of the next calls fails; those after them do not.
    outcomes: VecDeque<bool>,
    /// What devices are using: start and length.
    held: Vec<(u64, u64)>,
    violations: Vec<String>,
}

#[derive(Clone, Copy)]
struct Mapping {
    len: u64,
    /// The file's device and inode, and where in it this starts.
    file: (u64, u64),
    offset: u64,
    /// Whose pins these are: mappings made from one another have the same.
    pins: u64,
}

impl Default for FakeKernel {
    fn default() -> Self {
        let machine = Machine {
            spaces: vec![Space::default()],
            ..Machine::default()
        };
        Self {
            machine: Arc::new(Mutex::new(machine)),
            space: 0,
        }
    }
}

impl std::fmt::Debug for FakeKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FakeKernel({} ranges mapped)", self.mapped().len())
    }
}

impl FakeKernel {
    /// The back end to make a map over.
    pub fn iommu(&self) -> Box<dyn Iommu> {
        Box::new(FakeIommu(self.clone()))
    }

    /// Another address space on the same machine, with nothing in it.
    #[must_use]
    pub fn beside(&self) -> Self {
        let mut machine = self.machine();
        machine.spaces.push(Space::default());
        Self {
            machine: Arc::clone(&self.machine),
            space: machine.spaces.len() - 1,
        }
    }

    /// What is mapped: start and length, in order.
    pub fn mapped(&self) -> Vec<(u64, u64)> {
        let machine = self.machine();
        let mapped = machine.spaces[self.space].mapped.iter();
        mapped.map(|(start, mapping)| (*start, mapping.len)).collect()
    }

    /// Whether all of a range is mapped, by one mapping or several.
    pub fn is_mapped(&self, start: u64, len: u64) -> bool {
        let machine = self.machine();
        let mapped = &machine.spaces[self.space].mapped;
        let mut at = start;
        while at < start + len {
            let Some((first, mapping)) = mapped.range(..=at).next_back() else {
                return false;
            };
            if first + mapping.len <= at {
                return false;
            }
            at = first + mapping.len;
        }
        true
    }

    /// Puts a function where an attach will find it, in an IOMMU group of its own.
    pub fn plug(&self, address: &DeviceAddress, function: Arc<dyn PciFunction>) {
        self.plug_where(address, function, None);
    }

    /// Puts a function where an attach will find it, in a group with others: whoever has one of them has the group.
    pub fn plug_in_group(&self, address: PciAddress, function: Arc<dyn PciFunction>, group: u32) {
        self.plug_where(&DeviceAddress::Pci(address), function, Some(group));
    }

    fn plug_where(&self, address: &DeviceAddress, function: Arc<dyn PciFunction>, group: Option<u32>) {
        let plugged = Plugged {
            function,
            group,
            reach: None,
        };
        self.machine().devices.insert(address.to_string(), plugged);
    }

    /// The ranges one device reaches: it is refused where something is mapped outside of them, and while it is
    /// attached they narrow what can be mapped.
    ///
    /// # Panics
    ///
    /// If the device was never plugged.
    pub fn set_reach(&self, address: &DeviceAddress, ranges: Vec<RangeInclusive<u64>>) {
        let mut machine = self.machine();
        let plugged = machine.devices.get_mut(&address.to_string());
        plugged.expect("the device has been plugged").reach = Some(ranges);
    }

    /// The ranges this address space allows from now on, for as long as any device is attached. Unlike what
    /// [`set_reach`](Self::set_reach) says, an attach does not look at them.
    pub fn set_usable(&self, usable: Vec<RangeInclusive<u64>>) {
        self.space(|space| space.usable = Some(usable));
    }

    /// How many mappings this address space takes.
    pub fn set_most_mappings(&self, most: usize) {
        self.space(|space| space.most_mappings = Some(most));
    }

    /// Limits locked memory on the whole machine, counted as `accounting` says; other processes hold `elsewhere`
    /// bytes of it. Pins are [shared](Iommu::shares_pins) unless they are counted per process, as type1 does.
    pub fn set_locked_memory(&self, accounting: Accounting, limit: u64, elsewhere: u64) {
        self.machine().locked = Some(Locked {
            accounting,
            limit,
            elsewhere,
        });
    }

    /// Bytes pinned for this address space: none while it has no device.
    pub fn pinned(&self) -> u64 {
        self.machine().pinned(self.space)
    }

    /// Lets `calls` more calls succeed and fails the one after them, once.
    pub fn fail_after(&self, calls: usize) {
        self.fail_each(std::iter::repeat_n(false, calls).chain([true]));
    }

    /// Says of each of the next calls whether it fails. All that come after succeed, if nothing is wrong with them.
    ///
    /// A call is a map, an unmap, an attach, a question for the usable ranges or a detach.
    pub fn fail_each(&self, fails: impl IntoIterator<Item = bool>) {
        let outcomes = fails.into_iter().collect();
        self.space(|space| space.outcomes = outcomes);
    }

    /// How often a device was let in.
    pub fn attach_calls(&self) -> usize {
        self.space(|space| space.attaches)
    }

    /// The devices that are in, in the order in which they came.
    pub fn attached(&self) -> Vec<DeviceAddress> {
        self.space(|space| space.attached.clone())
    }

    /// From now on a device is using `len` bytes at `iova`. They must be mapped, or that is a violation too.
    pub fn hold(&self, iova: Iova, len: u64) {
        let mapped = self.is_mapped(iova.raw(), len);
        self.space(|space| {
            space.held.push((iova.raw(), len));
            if !mapped {
                space
                    .violations
                    .push(format!("{len:#x} bytes at {iova} were used while not mapped"));
            }
        });
    }

    /// A device has done with what [`hold`](Self::hold) said, once.
    ///
    /// # Panics
    ///
    /// If nobody holds exactly that.
    pub fn release(&self, iova: Iova, len: u64) {
        self.space(|space| {
            let found = space.held.iter().position(|held| *held == (iova.raw(), len));
            space.held.swap_remove(found.expect("somebody holds this range"));
        });
    }

    /// What should never have happened and was not refused, one line each: most of all an unmap of what is held.
    pub fn violations(&self) -> Vec<String> {
        self.space(|space| space.violations.clone())
    }

    fn space<R>(&self, look: impl FnOnce(&mut Space) -> R) -> R {
        look(&mut self.machine().spaces[self.space])
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine {
    /// What can be mapped: `None` if no attached device says.
    fn usable(&self, space: usize) -> Option<Vec<RangeInclusive<u64>>> {
        let space = &self.spaces[space];
        let devices = space.attached.iter();
        let reaches = devices.filter_map(|device| self.devices.get(&device.to_string())?.reach.as_ref());
        let own = space.usable.as_ref().filter(|_| !space.attached.is_empty());
        own.into_iter().chain(reaches).fold(None, |usable, more| {
            Some(usable.map_or_else(|| more.clone(), |usable| overlap(&usable, more)))
        })
    }

    fn pinned(&self, space: usize) -> u64 {
        let space = &self.spaces[space];
        let shared = self
            .locked
            .is_none_or(|locked| locked.accounting != Accounting::PerProcess);
        if space.attached.is_empty() {
            return 0;
        }
        let mut ranges: Vec<(u64, Range<u64>)> = space
            .mapped
            .values()
            .map(|mapping| (mapping.pins, mapping.offset..mapping.offset + mapping.len))
            .collect();
        if shared {
            // Each byte of those that share their pins once.
            ranges.sort_by_key(|(pins, range)| (*pins, range.start));
            let mut seen = (u64::MAX, 0);
            for (pins, range) in &mut ranges {
                let from = if seen.0 == *pins { seen.1 } else { 0 };
                range.start = range.start.max(from).min(range.end);
                seen = (*pins, from.max(range.end));
            }
        }
        ranges.iter().map(|(_, range)| range.end - range.start).sum()
    }

    fn owed(&self, space: usize) -> u64 {
        let space = &self.spaces[space];
        if space.attached.is_empty() {
            space.mapped.values().map(|mapping| mapping.len).sum()
        } else {
            0
        }
    }

    /// Whether `more` bytes can be pinned.
    fn check_locked(&self, more: u64) -> io::Result<()> {
        let pinned: u64 = (0..self.spaces.len()).map(|space| self.pinned(space)).sum();
        match self.locked {
            Some(locked) if pinned + locked.elsewhere + more > locked.limit => {
                Err(io::Error::from_raw_os_error(libc::ENOMEM))
            }
            _ => Ok(()),
        }
    }

    fn check_map(&mut self, space: usize, request: &MapRequest) -> io::Result<Mapping> {
        let (start, len) = (request.iova.raw(), request.len);
        if let Some(error) = self.spaces[space].injected() {
            return Err(error);
        }
        if len == 0 || !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || start == 0 {
            return Err(io::Error::other("not whole pages, or at 0"));
        }
        let last = start + (len - 1);
        let before = self.spaces[space].mapped.range(..=last).next_back();
        if before.is_some_and(|(first, mapping)| first + mapping.len > start) {
            return Err(io::Error::other("overlaps what is mapped"));
        }
        let inside = |range: &RangeInclusive<u64>| range.contains(&start) && range.contains(&last);
        if self
            .usable(space)
            .is_some_and(|usable| !usable.iter().any(inside))
        {
            return Err(io::Error::other("outside the usable ranges"));
        }
        let mapped = &self.spaces[space].mapped;
        let most = self.spaces[space].most_mappings;
        if most.is_some_and(|most| mapped.len() >= most) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let file = identity(&request.file)?;
        let shares = self
            .locked
            .is_none_or(|locked| locked.accounting != Accounting::PerProcess);
        let source = request.same_as.map(|from| source_of(mapped, from, request, file));
        let source = source.transpose()?.filter(|_| shares);
        let attached = !self.spaces[space].attached.is_empty();
        if attached && source.is_none() {
            self.check_locked(len)?;
        }
        Ok(Mapping {
            len,
            file,
            offset: request.offset,
            // A number nobody has yet, or that of the mapping these bytes are in already.
            pins: source
                .unwrap_or_else(|| mapped.values().map(|mapping| mapping.pins + 1).max().unwrap_or(0)),
        })
    }

    /// Whether a device may come to an address space, as far as groups and what it reaches go.
    fn check_attach(&self, space: usize, device: &DeviceAddress) -> Result<(), IommuError> {
        let busy = || io::Error::from(io::ErrorKind::ResourceBusy);
        let holder = |name: &str| {
            let is_in = |space: &Space| space.attached.iter().any(|other| other.to_string() == name);
            self.spaces.iter().position(is_in)
        };
        if holder(&device.to_string()).is_some() {
            return Err(call_failed("fake attach", device, busy()));
        }
        let plugged = self.devices.get(&device.to_string());
        let plugged = plugged.ok_or_else(|| IommuError::WrongKind {
            iommu: "fake",
            device: device.clone(),
        })?;
        if let (Some(group), DeviceAddress::Pci(address)) = (plugged.group, device) {
            let mut siblings: Vec<&str> = self
                .devices
                .iter()
                .filter(|(name, other)| other.group == Some(group) && **name != address.to_string())
                .map(|(name, _)| name.as_str())
                .collect();
            siblings.sort_unstable();
            let elsewhere = |name: &&str| holder(name).is_some_and(|holder| holder != space);
            if siblings.iter().any(elsewhere) {
                return Err(IommuError::GroupElsewhere {
                    group,
                    address: *address,
                    siblings: siblings.join(", "),
                    source: busy(),
                });
            }
        }
        let reach = Reach {
            ranges: plugged.reach.clone().unwrap_or_else(|| vec![0..=u64::MAX]),
            page: PAGE,
        };
        let mapped = self.spaces[space].mapped.iter();
        reach.admit(
            device,
            mapped.map(|(start, mapping)| (*start, start + (mapping.len - 1))),
        )?;
        self.check_locked(self.owed(space))
            .map_err(|source| IommuError::PinLimit {
                call: "fake attach",
                object: device.to_string(),
                source,
            })
    }
}

impl Space {
    fn injected(&mut self) -> Option<io::Error> {
        let fails = self.outcomes.pop_front().unwrap_or(false);
        fails.then(|| io::Error::other("injected"))
    }
}

/// What two lists of ranges have in common.
fn overlap(a: &[RangeInclusive<u64>], b: &[RangeInclusive<u64>]) -> Vec<RangeInclusive<u64>> {
    let of = |a: &RangeInclusive<u64>, b: &RangeInclusive<u64>| {
        let range = *a.start().max(b.start())..=*a.end().min(b.end());
        Some(range).filter(|range| !range.is_empty())
    };
    a.iter()
        .flat_map(|a| b.iter().filter_map(move |b| of(a, b)))
        .collect()
}

/// Whose pins are shared by bytes that are said to be at `from` already, or an error if they are not.
fn source_of(
    mapped: &BTreeMap<u64, Mapping>,
    from: Iova,
    request: &MapRequest,
    file: (u64, u64),
) -> io::Result<u64> {
    let (start, source) = mapped
        .range(..=from.raw())
        .next_back()
        .ok_or_else(|| io::Error::other("nothing is mapped where the same bytes are said to be"))?;
    let skip = from.raw() - start;
    if skip + request.len > source.len {
        return Err(io::Error::other("the same bytes are not inside one mapping"));
    }
    if (source.file, source.offset + skip) != (file, request.offset) {
        return Err(io::Error::other(
            "other bytes are mapped where the same are said to be",
        ));
    }
    Ok(source.pins)
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let stat = fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn call_failed(call: &'static str, object: impl ToString, source: io::Error) -> IommuError {
    let object = object.to_string();
    IommuError::Call { call, object, source }
}

/// The back end itself.
#[derive(Debug)]
struct FakeIommu(FakeKernel);

impl Iommu for FakeIommu {
    fn kind(&self) -> IommuKind {
        IommuKind::None
    }

    fn usable_ranges(&self) -> Result<Option<Vec<RangeInclusive<u64>>>, IommuError> {
        let mut machine = self.0.machine();
        match machine.spaces[self.0.space].injected() {
            Some(source) => Err(call_failed("fake ranges", "map", source)),
            None => Ok(machine.usable(self.0.space)),
        }
    }

    fn mappings_left(&self) -> Option<usize> {
        self.0
            .space(|space| Some(space.most_mappings?.saturating_sub(space.mapped.len())))
    }

    fn shares_pins(&self) -> bool {
        let locked = self.0.machine().locked;
        locked.is_none_or(|locked| locked.accounting != Accounting::PerProcess)
    }

    fn locked_memory(&self) -> Option<LockedMemory> {
        let machine = self.0.machine();
        let locked = machine.locked?;
        let spaces = 0..machine.spaces.len();
        Some(LockedMemory {
            pinned: spaces.clone().map(|space| machine.pinned(space)).sum(),
            owed: spaces.map(|space| machine.owed(space)).sum(),
            elsewhere: locked.elsewhere,
            limit: locked.limit,
        })
    }

    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError> {
        let mut machine = self.0.machine();
        let mapping = machine
            .check_map(self.0.space, request)
            .map_err(|source| request.refused("fake map", source))?;
        machine.spaces[self.0.space]
            .mapped
            .insert(request.iova.raw(), mapping);
        Ok(MappedBy::Model)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let failed = |source| IommuError::Unmap {
            call: "fake unmap",
            iova,
            len,
            source,
        };
        self.0.space(|space| {
            if let Some(error) = space.injected() {
                return Err(failed(error));
            }
            if space.mapped.get(&iova.raw()).map(|mapping| mapping.len) != Some(len) {
                return Err(failed(io::Error::other("not exactly one mapping")));
            }
            space.mapped.remove(&iova.raw());
            let used = |held: &&(u64, u64)| held.0 < iova.raw() + len && iova.raw() < held.0 + held.1;
            if let Some((start, size)) = space.held.iter().find(used) {
                space.violations.push(format!(
                    "{len:#x} bytes at {iova} were unmapped while {size:#x} bytes at {start:#x} were in use"
                ));
            }
            Ok(())
        })
    }

    fn attach(&mut self, device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError> {
        let mut machine = self.0.machine();
        if let Some(source) = machine.spaces[self.0.space].injected() {
            return Err(call_failed("fake attach", device, source));
        }
        machine.check_attach(self.0.space, device)?;
        machine.spaces[self.0.space].attached.push(device.clone());
        machine.spaces[self.0.space].attaches += 1;
        Ok(Arc::clone(&machine.devices[&device.to_string()].function))
    }

    fn detach(&mut self, device: &DeviceAddress) -> Result<(), IommuError> {
        let refused = self.0.space(|space| {
            let before = space.attached.len();
            space.attached.retain(|other| other != device);
            if space.attached.len() == before {
                Some(io::Error::other("it is not in"))
            } else {
                space.injected()
            }
        });
        refused.map_or(Ok(()), |source| Err(call_failed("fake detach", device, source)))
    }

    fn pins_now(&self) -> bool {
        !self.0.attached().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HostRange;
    use crate::pci::testing::Nothing;

    const MIB: u64 = 1 << 20;

    fn memfd(len: u64) -> Arc<File> {
        let file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        Arc::new(file)
    }

    fn request(file: &Arc<File>, offset: u64, len: u64, iova: u64, same_as: Option<u64>) -> MapRequest {
        MapRequest {
            iova: Iova::new(iova),
            len,
            host: HostRange::of_file(file, offset, len).unwrap(),
            file: Arc::clone(file),
            offset,
            same_as: same_as.map(Iova::new),
        }
    }

    fn card(index: u8) -> (PciAddress, DeviceAddress) {
        let address: PciAddress = format!("0000:01:00.{index}").parse().unwrap();
        (address, DeviceAddress::Pci(address))
    }

    #[test]
    fn bytes_mapped_again_must_be_where_they_are_said_to_be() {
        let kernel = FakeKernel::default();
        let mut iommu = kernel.iommu();
        let (file, other) = (memfd(4 * MIB), memfd(4 * MIB));
        iommu.map(&request(&file, 0, 2 * MIB, MIB, None)).unwrap();
        let refused = [
            request(&file, 0, MIB, 8 * MIB, Some(4 * MIB)),
            request(&file, MIB, MIB, 8 * MIB, Some(MIB)),
            request(&file, MIB, 2 * MIB, 8 * MIB, Some(2 * MIB)),
            request(&other, 0, MIB, 8 * MIB, Some(MIB)),
        ];
        for request in refused {
            assert!(iommu.map(&request).is_err(), "{request:?}");
        }
        iommu
            .map(&request(&file, MIB, MIB, 8 * MIB, Some(2 * MIB)))
            .unwrap();
        assert_eq!(kernel.mapped(), vec![(MIB, 2 * MIB), (8 * MIB, MIB)]);
    }

    #[test]
    fn bytes_mapped_twice_are_pinned_once_per_user_and_twice_per_process() {
        for (accounting, pinned) in [(Accounting::PerUser, 4 * MIB), (Accounting::PerProcess, 5 * MIB)] {
            let kernel = FakeKernel::default();
            kernel.set_locked_memory(accounting, 5 * MIB, 0);
            kernel.plug(&card(0).1, Arc::new(Nothing));
            let mut iommu = kernel.iommu();
            let file = memfd(4 * MIB);
            iommu.map(&request(&file, 0, 4 * MIB, MIB, None)).unwrap();
            assert_eq!(kernel.pinned(), 0, "no device, no pin");
            iommu.attach(&card(0).1).unwrap();
            iommu
                .map(&request(&file, 3 * MIB, MIB, 8 * MIB, Some(4 * MIB)))
                .unwrap();
            assert_eq!(kernel.pinned(), pinned);
            assert_eq!(iommu.shares_pins(), accounting == Accounting::PerUser);
            iommu.unmap(Iova::new(MIB), 4 * MIB).unwrap();
            assert_eq!(kernel.pinned(), MIB);
            assert_eq!(iommu.locked_memory().unwrap().pinned, MIB);
        }
    }

    #[test]
    fn what_goes_over_the_limit_is_refused_when_it_is_pinned() {
        let kernel = FakeKernel::default();
        kernel.set_locked_memory(Accounting::PerUser, 4 * MIB, MIB);
        kernel.plug(&card(0).1, Arc::new(Nothing));
        let mut iommu = kernel.iommu();
        let file = memfd(8 * MIB);
        iommu.map(&request(&file, 0, 4 * MIB, MIB, None)).unwrap();
        let attached = iommu.attach(&card(0).1);
        assert!(matches!(attached, Err(IommuError::PinLimit { .. })));
        iommu.unmap(Iova::new(MIB), 4 * MIB).unwrap();
        iommu.map(&request(&file, 0, 2 * MIB, MIB, None)).unwrap();
        iommu.attach(&card(0).1).unwrap();
        // Another map of the same process counts too.
        let beside = kernel.beside();
        beside.plug(&card(1).1, Arc::new(Nothing));
        let mut second = beside.iommu();
        second.attach(&card(1).1).unwrap();
        let over = second.map(&request(&file, 0, 2 * MIB, MIB, None));
        assert!(matches!(over, Err(IommuError::PinLimit { .. })));
        second.map(&request(&file, 0, MIB, MIB, None)).unwrap();
    }

    #[test]
    fn a_group_has_one_address_space_at_a_time() {
        let (kernel, (zero, first), (one, second)) = (FakeKernel::default(), card(0), card(1));
        kernel.plug_in_group(zero, Arc::new(Nothing), 7);
        kernel.plug_in_group(one, Arc::new(Nothing), 7);
        let (mut main, mut other) = (kernel.iommu(), kernel.beside().iommu());
        main.attach(&first).unwrap();
        match other.attach(&second).map(drop).unwrap_err() {
            IommuError::GroupElsewhere { group, siblings, .. } => {
                assert_eq!((group, siblings.as_str()), (7, "0000:01:00.0"))
            }
            refused => panic!("{refused:?}"),
        }
        assert!(other.attach(&first).is_err(), "nor is a device on two");
        main.attach(&second).unwrap();
        main.detach(&first).unwrap();
        assert!(other.attach(&first).is_err());
        main.detach(&second).unwrap();
        other.attach(&first).unwrap();
    }

    #[test]
    fn ranges_narrow_with_each_device_and_widen_when_it_goes() {
        let (kernel, (_, first), (_, second)) = (FakeKernel::default(), card(0), card(1));
        for device in [&first, &second] {
            kernel.plug(device, Arc::new(Nothing));
        }
        kernel.set_reach(&first, vec![0..=0xffff_ffff]);
        kernel.set_reach(&second, vec![0x10_0000..=0xfff_ffff, 0x2000_0000..=u64::MAX]);
        let mut iommu = kernel.iommu();
        assert_eq!(iommu.usable_ranges().unwrap(), None);
        iommu.attach(&first).unwrap();
        iommu.attach(&second).unwrap();
        assert_eq!(
            iommu.usable_ranges().unwrap(),
            Some(vec![0x10_0000..=0xfff_ffff, 0x2000_0000..=0xffff_ffff])
        );
        let file = memfd(MIB);
        assert!(iommu.map(&request(&file, 0, MIB, 0x1000_0000, None)).is_err());
        iommu.detach(&second).unwrap();
        iommu.map(&request(&file, 0, MIB, 0x1000_0000, None)).unwrap();
        let stranding = iommu.attach(&second).map(drop).unwrap_err();
        assert!(matches!(
            stranding,
            IommuError::Stranded {
                start: 0x1000_0000,
                end: 0x100f_ffff,
                ..
            }
        ));
        assert_eq!(kernel.attached(), vec![first]);
    }

    #[test]
    fn an_unmap_of_what_a_device_uses_is_remembered() {
        let kernel = FakeKernel::default();
        let mut iommu = kernel.iommu();
        let file = memfd(2 * MIB);
        iommu.map(&request(&file, 0, MIB, MIB, None)).unwrap();
        iommu.map(&request(&file, MIB, MIB, 2 * MIB, None)).unwrap();
        kernel.hold(Iova::new(2 * MIB - 64), 128);
        kernel.release(Iova::new(2 * MIB - 64), 128);
        kernel.hold(Iova::new(2 * MIB), 1);
        iommu.unmap(Iova::new(MIB), MIB).unwrap();
        assert_eq!(kernel.violations(), Vec::<String>::new());
        iommu.unmap(Iova::new(2 * MIB), MIB).unwrap();
        assert_eq!(
            kernel.violations(),
            vec!["0x100000 bytes at 0x200000 were unmapped while 0x1 bytes at 0x200000 were in use"]
        );
        kernel.hold(Iova::new(MIB), 1);
        assert_eq!(kernel.violations().len(), 2);
    }

    #[test]
    fn a_kernel_takes_as_many_mappings_as_it_says() {
        let kernel = FakeKernel::default();
        kernel.set_most_mappings(1);
        let mut iommu = kernel.iommu();
        let file = memfd(MIB);
        assert_eq!(iommu.mappings_left(), Some(1));
        iommu.map(&request(&file, 0, MIB, MIB, None)).unwrap();
        assert_eq!(iommu.mappings_left(), Some(0));
        assert!(iommu.map(&request(&file, 0, MIB, 4 * MIB, None)).is_err());
    }
}
