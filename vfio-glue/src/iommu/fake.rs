//! A fake IOMMU for tests, stricter than the kernel: it refuses what overlaps, what is not whole pages, what lies
//! outside of its ranges and an unmap that is not exactly one map, and fails calls on request.
//!
//! It says what it is (`none` with no translation of its own) and no configuration can choose it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{DeviceAddress, Iommu, IommuError, IommuKind, MapRequest, MappedBy};
use crate::address::Iova;
use crate::pci::PciFunction;

const PAGE: u64 = 4096;

/// What stands behind a [`FakeKernel::iommu`], as a test looks at it. Cheap to clone.
#[derive(Clone, Default)]
pub struct FakeKernel(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    mapped: BTreeMap<u64, u64>,
    usable: Option<Vec<RangeInclusive<u64>>>,
    devices: HashMap<String, Arc<dyn PciFunction>>,
    attached: Vec<DeviceAddress>,
    /// Whether each of the next calls fails; those after them do not.
    outcomes: VecDeque<bool>,
}

impl std::fmt::Debug for FakeKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FakeKernel({} ranges mapped)", self.state().mapped.len())
    }
}

impl FakeKernel {
    /// The back end to make a map over.
    pub fn iommu(&self) -> Box<dyn Iommu> {
        Box::new(FakeIommu(self.clone()))
    }

    /// What is mapped: start and length, in order.
    pub fn mapped(&self) -> Vec<(u64, u64)> {
        self.state()
            .mapped
            .iter()
            .map(|(start, len)| (*start, *len))
            .collect()
    }

    /// Whether all of a range is mapped, by one mapping or several.
    pub fn is_mapped(&self, start: u64, len: u64) -> bool {
        let state = self.state();
        let mut at = start;
        while at < start + len {
            let Some((first, size)) = state.mapped.range(..=at).next_back() else {
                return false;
            };
            if first + size <= at {
                return false;
            }
            at = first + size;
        }
        true
    }

    /// Puts a function where an attach will find it.
    pub fn plug(&self, address: &DeviceAddress, function: Arc<dyn PciFunction>) {
        self.state().devices.insert(address.to_string(), function);
    }

    /// The ranges an attached device allows from now on.
    pub fn set_usable(&self, usable: Vec<RangeInclusive<u64>>) {
        self.state().usable = Some(usable);
    }

    /// Lets `calls` more calls succeed and fails the one after them, once.
    pub fn fail_after(&self, calls: usize) {
        self.fail_each(std::iter::repeat_n(false, calls).chain([true]));
    }

    /// Says of each of the next calls whether it fails. All that come after succeed, if nothing is wrong with them.
    ///
    /// A call is a map, an unmap, an attach, a question for the usable ranges or a detach.
    pub fn fail_each(&self, fails: impl IntoIterator<Item = bool>) {
        self.state().outcomes = fails.into_iter().collect();
    }

    /// The devices that are in, in the order in which they came.
    pub fn attached(&self) -> Vec<DeviceAddress> {
        self.state().attached.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn injected(&mut self) -> Option<io::Error> {
        let fails = self.outcomes.pop_front().unwrap_or(false);
        fails.then(|| io::Error::other("injected"))
    }

    fn check_map(&mut self, start: u64, len: u64) -> io::Result<()> {
        let refuse = |why: &str| Err(io::Error::other(why.to_owned()));
        if let Some(error) = self.injected() {
            return Err(error);
        }
        if len == 0 || !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || start == 0 {
            return refuse("not whole pages, or at 0");
        }
        let last = start + (len - 1);
        if self
            .mapped
            .range(..=last)
            .next_back()
            .is_some_and(|(first, size)| first + size > start)
        {
            return refuse("overlaps what is mapped");
        }
        let inside = |range: &RangeInclusive<u64>| range.contains(&start) && range.contains(&last);
        if self
            .usable
            .as_ref()
            .is_some_and(|usable| !usable.iter().any(inside))
        {
            return refuse("outside the usable ranges");
        }
        Ok(())
    }
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
        let mut state = self.0.state();
        match state.injected() {
            Some(source) => Err(call_failed("fake ranges", "map", source)),
            None => Ok(state.usable.clone()),
        }
    }

    fn map(&mut self, request: &MapRequest) -> Result<MappedBy, IommuError> {
        let (iova, len) = (request.iova, request.len);
        let mut state = self.0.state();
        state
            .check_map(iova.raw(), len)
            .map_err(|source| IommuError::Map {
                call: "fake map",
                iova,
                len,
                source,
            })?;
        state.mapped.insert(iova.raw(), len);
        Ok(MappedBy::Model)
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let mut state = self.0.state();
        let failed = |source| IommuError::Unmap {
            call: "fake unmap",
            iova,
            len,
            source,
        };
        if let Some(error) = state.injected() {
            return Err(failed(error));
        }
        if state.mapped.get(&iova.raw()) != Some(&len) {
            return Err(failed(io::Error::other("not exactly one mapping")));
        }
        state.mapped.remove(&iova.raw());
        Ok(())
    }

    fn attach(&mut self, device: &DeviceAddress) -> Result<Arc<dyn PciFunction>, IommuError> {
        let mut state = self.0.state();
        if let Some(source) = state.injected() {
            return Err(call_failed("fake attach", device, source));
        }
        if state.attached.contains(device) {
            let source = io::Error::other("it is in already");
            return Err(call_failed("fake attach", device, source));
        }
        let function = state.devices.get(&device.to_string()).cloned();
        let wrong = IommuError::WrongKind {
            iommu: "fake",
            device: device.clone(),
        };
        let function = function.ok_or(wrong)?;
        state.attached.push(device.clone());
        Ok(function)
    }

    fn detach(&mut self, device: &DeviceAddress) -> Result<(), IommuError> {
        let mut state = self.0.state();
        let before = state.attached.len();
        state.attached.retain(|other| other != device);
        let refused = if state.attached.len() == before {
            Some(io::Error::other("it is not in"))
        } else {
            state.injected()
        };
        refused.map_or(Ok(()), |source| Err(call_failed("fake detach", device, source)))
    }

    fn pins_now(&self) -> bool {
        !self.0.state().attached.is_empty()
    }
}
