//! What this process may pin, asked before anything is mapped, so that an error has the numbers in it.
//!
//! type1 counts locked memory per process, iommufd per user over all processes, both against RLIMIT_MEMLOCK; a
//! process with CAP_IPC_LOCK has no limit. Other processes of the same user are not visible here, so the kernel
//! may still refuse what fits our count.
//!
//! Read with: Linux `drivers/iommu/iommufd/pages.c` (accounting), `drivers/vfio/vfio_iommu_type1.c`; TRAPS 28.

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// The most bytes this process may pin now, or `None` for no limit.
pub(super) fn pin_limit() -> Option<u64> {
    let unlimited = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if unlimited {
        return None;
    }
    getrlimit(Resource::Memlock).current
}
