//! What the kernel tells about a PCI function before it is opened: driver, IOMMU group, siblings, nodes.
//!
//! ```text
//! /sys/bus/pci/devices/ADDRESS/{driver, iommu_group, vfio-dev/vfioN} ──▶ Found ──▶ iommu back ends
//! ```
//!
//! Read with: Linux `Documentation/ABI/testing/sysfs-bus-pci`, `Documentation/driver-api/vfio.rst`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::PciAddress;
use crate::iommu::IommuError;

/// Where sysfs and the device nodes are. Tests have their own.
#[derive(Clone, Debug)]
pub(crate) struct Sysfs {
    sys: PathBuf,
    dev: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::at("/sys".into(), "/dev".into())
    }
}

/// A function that is there, bound to a VFIO driver and in an IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The function.
    pub address: PciAddress,
    /// Its IOMMU group.
    pub group: u32,
    /// Its VFIO character node, where the kernel makes them (Linux 6.6, CONFIG_VFIO_DEVICE_CDEV).
    pub cdev: Option<PathBuf>,
}

/// Another device of an IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sibling {
    /// Its name, for a PCI function the address.
    pub name: String,
    /// Its driver, if it has one.
    pub driver: Option<String>,
}

impl Sibling {
    /// Whether its driver does DMA of its own, so that the group cannot be ours.
    ///
    /// Bridges and stubs leave DMA to VFIO: the kernel knows them by `driver_managed_dma`.
    fn is_foreign(&self) -> bool {
        self.driver
            .as_deref()
            .is_some_and(|driver| !is_vfio(driver) && !matches!(driver, "pci-stub" | "pcieport" | "shpchp"))
    }
}

/// vfio-pci itself, or a driver made from it for one card.
fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

impl Sysfs {
    /// Looks below other folders than `/sys` and `/dev`.
    pub(crate) fn at(sys: PathBuf, dev: PathBuf) -> Self {
        Self { sys, dev }
    }

    /// Looks a function up and checks that VFIO may open it.
    ///
    /// # Errors
    ///
    /// [`IommuError::NoSuchDevice`], [`IommuError::NotBound`], [`IommuError::NoIommu`], or
    /// [`IommuError::Call`] if sysfs cannot be read.
    pub(crate) fn find(&self, address: PciAddress) -> Result<Found, IommuError> {
        let folder = self.function(address);
        if !folder.exists() {
            return Err(IommuError::NoSuchDevice { address });
        }
        let driver = link_name(&folder.join("driver")).map_err(sysfs_error(&folder))?;
        if !driver.as_deref().is_some_and(is_vfio) {
            return Err(IommuError::NotBound {
                address,
                bound_to: driver.map_or_else(|| "no driver".to_owned(), |driver| format!("`{driver}`")),
            });
        }
        let group = link_name(&folder.join("iommu_group")).map_err(sysfs_error(&folder))?;
        let group = group
            .and_then(|number| number.parse().ok())
            .ok_or(IommuError::NoIommu { address })?;
        let cdev = self.cdev(&folder).map_err(sysfs_error(&folder))?;
        Ok(Found { address, group, cdev })
    }

    /// The other devices of the function's group.
    ///
    /// # Errors
    ///
    /// [`IommuError::Call`] if sysfs cannot be read.
    pub(crate) fn siblings(&self, found: &Found) -> Result<Vec<Sibling>, IommuError> {
        let folder = self.function(found.address).join("iommu_group/devices");
        let failed = sysfs_error(&folder);
        let own = found.address.to_string();
        let mut siblings = Vec::new();
        for entry in fs::read_dir(&folder).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != own {
                let driver = link_name(&entry.path().join("driver")).map_err(&failed)?;
                siblings.push(Sibling { name, driver });
            }
        }
        siblings.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(siblings)
    }

    /// Why the kernel may have refused a device of this group: siblings with other drivers, or siblings that
    /// somebody else may hold, or neither.
    pub(crate) fn explain_refusal(&self, found: &Found, source: io::Error) -> IommuError {
        let (group, address) = (found.group, found.address);
        let siblings = self.siblings(found).unwrap_or_default();
        let foreign: Vec<String> = siblings
            .iter()
            .filter(|sibling| sibling.is_foreign())
            .map(|sibling| {
                format!(
                    "{} ({})",
                    sibling.name,
                    sibling.driver.as_deref().unwrap_or_default()
                )
            })
            .collect();
        if !foreign.is_empty() {
            let siblings = foreign.join(", ");
            return IommuError::GroupNotViable {
                group,
                address,
                siblings,
            };
        }
        let ours: Vec<&str> = siblings
            .iter()
            .filter(|sibling| sibling.driver.as_deref().is_some_and(is_vfio))
            .map(|sibling| sibling.name.as_str())
            .collect();
        if ours.is_empty() {
            IommuError::Busy { address, source }
        } else {
            IommuError::GroupElsewhere {
                group,
                address,
                siblings: ours.join(", "),
                source,
            }
        }
    }

    /// The iommufd node.
    pub(crate) fn iommufd(&self) -> PathBuf {
        self.dev.join("iommu")
    }

    /// The node from which containers are made.
    pub(crate) fn container(&self) -> PathBuf {
        self.dev.join("vfio/vfio")
    }

    /// The node of an IOMMU group.
    pub(crate) fn group(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }

    /// How many mappings type1 takes for one map (TRAPS 27), or `None` while its module is not loaded.
    pub(crate) fn type1_mappings_limit(&self) -> Option<usize> {
        let text = fs::read_to_string(self.type1_mappings_limit_parameter()).ok()?;
        text.trim().parse().ok()
    }

    /// Where that limit is set.
    pub(crate) fn type1_mappings_limit_parameter(&self) -> PathBuf {
        self.sys
            .join("module/vfio_iommu_type1/parameters/dma_entry_limit")
    }

    /// Where a function's character node would be listed, for the error that says there is none.
    pub(crate) fn no_cdev(&self, address: PciAddress) -> PathBuf {
        self.function(address).join("vfio-dev")
    }

    fn function(&self, address: PciAddress) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }

    fn cdev(&self, folder: &Path) -> io::Result<Option<PathBuf>> {
        let entries = match fs::read_dir(folder.join("vfio-dev")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            // The folder is there with CONFIG_VFIO_DEVICE_CDEV off too; only `dev` says that there is a node.
            if entry.path().join("dev").exists() {
                return Ok(Some(self.dev.join("vfio/devices").join(entry.file_name())));
            }
        }
        Ok(None)
    }
}

fn sysfs_error(folder: &Path) -> impl Fn(io::Error) -> IommuError {
    move |source| IommuError::Call {
        call: "reading",
        object: folder.display().to_string(),
        source,
    }
}

/// The last part of what a link points to, or `None` if there is no such link.
fn link_name(link: &Path) -> io::Result<Option<String>> {
    match fs::read_link(link) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A made-up machine for tests.
#[cfg(test)]
pub(crate) mod fake {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Folders that look like `/sys` and `/dev`.
    pub(crate) struct Machine {
        root: tempfile::TempDir,
    }

    impl Machine {
        pub(crate) fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            for folder in [
                "sys/bus/pci/devices",
                "sys/drivers",
                "sys/groups",
                "dev/vfio/devices",
            ] {
                fs::create_dir_all(root.path().join(folder)).unwrap();
            }
            Self { root }
        }

        pub(crate) fn sysfs(&self) -> Sysfs {
            Sysfs::at(self.path("sys"), self.path("dev"))
        }

        pub(crate) fn path(&self, below: &str) -> PathBuf {
            self.root.path().join(below)
        }

        pub(crate) fn with_function(self, address: &str, driver: Option<&str>, group: Option<u32>) -> Self {
            let folder = self.path("sys/bus/pci/devices").join(address);
            fs::create_dir(&folder).unwrap();
            if let Some(driver) = driver {
                symlink(Path::new("/drivers").join(driver), folder.join("driver")).unwrap();
            }
            if let Some(group) = group {
                let devices = self.path("sys/groups").join(group.to_string()).join("devices");
                fs::create_dir_all(&devices).unwrap();
                symlink(&folder, devices.join(address)).unwrap();
                symlink(devices.parent().unwrap(), folder.join("iommu_group")).unwrap();
            }
            self
        }

        pub(crate) fn with_cdev(self, address: &str, name: &str) -> Self {
            let folder = self
                .path("sys/bus/pci/devices")
                .join(address)
                .join("vfio-dev")
                .join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("dev"), "511:0\n").unwrap();
            self
        }

        pub(crate) fn with_node(self, below_dev: &str) -> Self {
            fs::write(self.path("dev").join(below_dev), "").unwrap();
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Machine;
    use super::*;

    const CARD: &str = "0000:01:00.0";

    fn find(machine: &Machine) -> Result<Found, IommuError> {
        machine.sysfs().find(CARD.parse().unwrap())
    }

    #[test]
    fn a_function_bound_to_vfio_is_found_with_group_and_node() {
        let machine = Machine::new()
            .with_function(CARD, Some("vfio-pci"), Some(7))
            .with_cdev(CARD, "vfio3");
        let found = find(&machine).unwrap();
        assert_eq!(found.group, 7);
        assert_eq!(found.cdev, Some(machine.path("dev/vfio/devices/vfio3")));
        assert_eq!(machine.sysfs().group(7), machine.path("dev/vfio/7"));
    }

    #[test]
    fn a_kernel_without_character_nodes_has_none() {
        let machine = Machine::new().with_function(CARD, Some("vfio-pci"), Some(7));
        fs::create_dir_all(
            machine
                .path("sys/bus/pci/devices")
                .join(CARD)
                .join("vfio-dev/vfio0"),
        )
        .unwrap();
        assert_eq!(find(&machine).unwrap().cdev, None);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(matches!(
            find(&Machine::new()),
            Err(IommuError::NoSuchDevice { .. })
        ));
        let unbound = find(&Machine::new().with_function(CARD, None, Some(7))).unwrap_err();
        assert!(
            unbound
                .to_string()
                .contains("is bound to no driver, not to vfio-pci")
        );
        let bound = find(&Machine::new().with_function(CARD, Some("igb"), Some(7))).unwrap_err();
        assert!(bound.to_string().contains("is bound to `igb`"));
        let no_group = find(&Machine::new().with_function(CARD, Some("vfio-pci"), None));
        assert!(matches!(no_group, Err(IommuError::NoIommu { .. })));
    }

    #[test]
    fn a_refusal_names_siblings_with_other_drivers_first() {
        let machine = Machine::new()
            .with_function(CARD, Some("vfio-pci"), Some(7))
            .with_function("0000:01:00.1", Some("igb"), Some(7))
            .with_function("0000:01:00.2", Some("vfio-pci"), Some(7))
            .with_function("0000:00:01.0", Some("pcieport"), Some(7));
        let found = find(&machine).unwrap();
        let refused = || io::Error::from_raw_os_error(libc::EBUSY);
        match machine.sysfs().explain_refusal(&found, refused()) {
            IommuError::GroupNotViable { siblings, .. } => assert_eq!(siblings, "0000:01:00.1 (igb)"),
            other => panic!("{other:?}"),
        }
        fs::remove_file(machine.path("sys/bus/pci/devices/0000:01:00.1/driver")).unwrap();
        match machine.sysfs().explain_refusal(&found, refused()) {
            IommuError::GroupElsewhere { siblings, .. } => assert_eq!(siblings, "0000:01:00.2"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_function_alone_in_its_group_is_busy() {
        let machine = Machine::new().with_function(CARD, Some("vfio-pci"), Some(7));
        let found = find(&machine).unwrap();
        let refused = io::Error::from_raw_os_error(libc::EBUSY);
        assert!(matches!(
            machine.sysfs().explain_refusal(&found, refused),
            IommuError::Busy { .. }
        ));
    }
}
