//! Opening device nodes, with errors that say what to type.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::process::getuid;

use super::IommuError;

/// Opens a node for reading and writing. `absent` is what helps if it does not exist.
pub(super) fn open(path: &Path, absent: &str) -> Result<File, IommuError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| {
            let mend = match source.kind() {
                io::ErrorKind::NotFound => absent.to_owned(),
                io::ErrorKind::PermissionDenied => format!(
                    "give it to this user, as root: chown {} {}",
                    getuid().as_raw(),
                    path.display()
                ),
                _ => "another process may hold it".to_owned(),
            };
            let path = path.to_owned();
            IommuError::Open { path, mend, source }
        })
}

/// What to do when `/dev/iommu` is not there.
pub(super) const IOMMUFD_ABSENT: &str = "load it, as root: modprobe iommufd (a kernel built without CONFIG_IOMMUFD has only type1: --iommu type1)";

/// What to do when a device's character node is not there.
pub(super) const CDEV_ABSENT: &str =
    "this kernel makes no VFIO character nodes (CONFIG_VFIO_DEVICE_CDEV, Linux 6.6): --iommu type1";

/// What to do when `/dev/vfio/vfio` is not there.
pub(super) const CONTAINER_ABSENT: &str = "load it, as root: modprobe vfio_iommu_type1";

/// What to do when a group's node is not there.
pub(super) const GROUP_ABSENT: &str =
    "this kernel makes no VFIO group nodes (CONFIG_VFIO_GROUP): --iommu iommufd";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_node_comes_with_what_to_do() {
        let error = open(Path::new("/dev/no/such/node"), IOMMUFD_ABSENT).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("cannot open /dev/no/such/node; load it"),
            "{text}"
        );
    }
}
