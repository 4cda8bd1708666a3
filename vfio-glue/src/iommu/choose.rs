//! Which kernel back end a map gets: what this user can open decides, and the reason is told.
//!
//! Read with: ARCHITECTURE.md, "Memory map"; `--iommu` and `--map-by` in the README.

use std::fmt;
use std::io;

use super::iommufd::Iommufd;
use super::type1::Type1;
use super::{Iommu, IommuError, IommuKind, node};
use crate::pci::PciAddress;
use crate::pci::sysfs::{Found, Sysfs};

/// What the operator asked for with `--iommu`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IommuChoice {
    /// iommufd where this user can open its nodes, else type1.
    #[default]
    Auto,
    /// iommufd or an error.
    Iommufd,
    /// type1 or an error.
    Type1,
}

/// What the operator asked for with `--map-by`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapBy {
    /// By file where kernel and file allow it, else by address.
    #[default]
    Auto,
    /// By file or an error.
    File,
    /// By address.
    Address,
}

/// A back end, ready for a map, and why it is this one.
pub struct Chosen {
    /// The back end.
    pub iommu: Box<dyn Iommu>,
    /// One line for the log.
    pub reason: String,
}

impl fmt::Debug for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chosen({}: {})", self.iommu.kind().as_str(), self.reason)
    }
}

/// Picks and opens the back end for a map on which `devices` are to be. There may be none yet.
///
/// # Errors
///
/// [`IommuError::NoSuchDevice`], [`IommuError::NotBound`] or [`IommuError::NoIommu`] if a device is not ready,
/// [`IommuError::MapByFile`] if memory cannot be mapped as asked, [`IommuError::Open`] if the back end asked for
/// cannot be opened, [`IommuError::NoneUsable`] if neither can.
pub fn choose(choice: IommuChoice, map_by: MapBy, devices: &[PciAddress]) -> Result<Chosen, IommuError> {
    choose_at(&Sysfs::default(), choice, map_by, devices)
}

fn choose_at(
    sysfs: &Sysfs,
    choice: IommuChoice,
    map_by: MapBy,
    devices: &[PciAddress],
) -> Result<Chosen, IommuError> {
    let found: Vec<Found> = devices
        .iter()
        .map(|address| sysfs.find(*address))
        .collect::<Result<_, _>>()?;
    match choice {
        IommuChoice::Iommufd => iommufd(sysfs, map_by, &found, "as asked"),
        IommuChoice::Type1 => type1(sysfs, map_by, &found, "as asked"),
        IommuChoice::Auto => auto(sysfs, map_by, &found),
    }
}

fn auto(sysfs: &Sysfs, map_by: MapBy, found: &[Found]) -> Result<Chosen, IommuError> {
    let nodes = if found.is_empty() {
        "/dev/iommu"
    } else {
        "/dev/iommu and every device"
    };
    let why_not = match iommufd(sysfs, map_by, found, &format!("this user can open {nodes}")) {
        Err(error @ IommuError::Open { .. }) => error,
        other => return other,
    };
    if map_by == MapBy::File {
        // type1 could not do it either, so what stops iommufd is the thing to mend.
        return Err(why_not);
    }
    let why_not = with_cause(&why_not);
    match type1(sysfs, map_by, found, &format!("iommufd is out: {why_not}")) {
        Err(error @ IommuError::Open { .. }) => Err(IommuError::NoneUsable {
            iommufd: why_not,
            type1: with_cause(&error),
        }),
        other => other,
    }
}

fn iommufd(sysfs: &Sysfs, map_by: MapBy, found: &[Found], why: &str) -> Result<Chosen, IommuError> {
    let iommu = Iommufd::with(map_by, sysfs.clone())?;
    for found in found {
        // Opened and closed: only bind takes a device. A permission bit or a container's device filter shows here.
        let path = found.cdev.clone().unwrap_or_else(|| sysfs.no_cdev(found.address));
        node::open(&path, node::CDEV_ABSENT)?;
    }
    let reason = format!(
        "{}: {why}; {}",
        IommuKind::Iommufd.as_str(),
        iommu.mapping_reason(map_by)
    );
    let iommu = Box::new(iommu);
    Ok(Chosen { iommu, reason })
}

fn type1(sysfs: &Sysfs, map_by: MapBy, found: &[Found], why: &str) -> Result<Chosen, IommuError> {
    if map_by == MapBy::File {
        return Err(IommuError::MapByFile {
            reason: "type1 maps by address only".to_owned(),
        });
    }
    let iommu = Type1::with(sysfs.clone())?;
    for found in found {
        match node::open(&sysfs.group(found.group), node::GROUP_ABSENT) {
            // A group can be open once: held by somebody is a matter for attach, it can be opened by this user.
            Err(IommuError::Open { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {}
            other => drop(other?),
        }
    }
    let reason = format!("{}: {why}; memory mapped by address", IommuKind::Type1.as_str());
    let iommu = Box::new(iommu);
    Ok(Chosen { iommu, reason })
}

/// The error in one line, its cause included.
fn with_cause(error: &IommuError) -> String {
    match error {
        IommuError::Open { path, mend, source } => {
            format!("cannot open {} ({source}), {mend}", path.display())
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::sysfs::fake::Machine;

    const CARD: &str = "0000:01:00.0";

    fn choose_on(machine: &Machine, choice: IommuChoice, map_by: MapBy) -> Result<Chosen, IommuError> {
        choose_at(&machine.sysfs(), choice, map_by, &[CARD.parse().unwrap()])
    }

    fn machine() -> Machine {
        Machine::new().with_function(CARD, Some("vfio-pci"), Some(7))
    }

    #[test]
    fn with_no_node_at_all_the_error_names_both_and_what_mends_them() {
        let error = choose_on(&machine(), IommuChoice::Auto, MapBy::Auto).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, IommuError::NoneUsable { .. }), "{text}");
        for part in [
            "dev/iommu (",
            "modprobe iommufd",
            "dev/vfio/vfio (",
            "modprobe vfio_iommu_type1",
        ] {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
    }

    #[test]
    fn the_back_end_asked_for_is_not_replaced_by_the_other() {
        let error = choose_on(&machine(), IommuChoice::Iommufd, MapBy::Auto).unwrap_err();
        assert!(matches!(error, IommuError::Open { path, .. } if path.ends_with("dev/iommu")));
        let error = choose_on(&machine(), IommuChoice::Type1, MapBy::Auto).unwrap_err();
        assert!(matches!(error, IommuError::Open { path, .. } if path.ends_with("dev/vfio/vfio")));
    }

    #[test]
    fn by_file_on_type1_says_why_it_cannot_be() {
        let error = choose_on(&machine(), IommuChoice::Type1, MapBy::File).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("type1 maps by address only"), "{text}");
    }

    #[test]
    fn an_unbound_device_is_reported_before_any_node_is_tried() {
        let machine = Machine::new().with_function(CARD, Some("igb"), Some(7));
        let error = choose_on(&machine, IommuChoice::Auto, MapBy::Auto).unwrap_err();
        assert!(matches!(error, IommuError::NotBound { .. }));
    }

    #[test]
    fn a_node_that_is_no_iommu_is_an_error_with_the_call() {
        let machine = machine().with_node("iommu").with_node("vfio/vfio");
        let error = choose_on(&machine, IommuChoice::Iommufd, MapBy::Auto).unwrap_err();
        assert!(matches!(
            error,
            IommuError::Call {
                call: "IOMMU_IOAS_ALLOC",
                ..
            }
        ));
    }
}
