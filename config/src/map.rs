//! What the operator says about a memory map.

use clap::ValueEnum;

use crate::value::{self, ValueError};

/// One memory map: guest memory of every port that names it, pinned once and shared by their devices.
///
/// Two maps are two trust domains: no device of one reaches memory that is only in the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapConfig {
    /// By which ports name it.
    pub name: String,
    /// Which kernel interface programs the IOMMU.
    pub iommu: IommuChoice,
    /// How guest memory is named to that interface.
    pub map_by: MapBy,
}

/// The kernel interface behind a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IommuChoice {
    /// iommufd where this user can open it, else type1; the log says which and why.
    Auto,
    /// The newer interface, `/dev/iommu` and the VFIO character devices.
    Iommufd,
    /// The older interface, VFIO containers and groups.
    Type1,
    /// No IOMMU: addresses are only translated. What `auto` means for a map whose ports have no PCI device,
    /// and refused for a map where one has.
    #[value(skip)]
    None,
}

/// How guest memory is named to the IOMMU interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MapBy {
    /// By file where the kernel can (iommufd since Linux 6.13), else by address.
    Auto,
    /// By file descriptor and offset.
    File,
    /// By address in this process.
    Address,
}

/// Reads the file's `iommu`, which knows one word more than the flag.
pub(crate) fn iommu(text: &str) -> Result<IommuChoice, ValueError> {
    value::choice(text, &[("none", IommuChoice::None)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_file_knows_none() {
        assert_eq!(iommu("none"), Ok(IommuChoice::None));
        assert_eq!(iommu("type1"), Ok(IommuChoice::Type1));
        assert!(<IommuChoice as ValueEnum>::from_str("none", false).is_err());
    }

    #[test]
    fn a_wrong_word_is_answered_with_the_right_ones() {
        assert_eq!(
            iommu("iommu-fd").unwrap_err().to_string(),
            "`iommu-fd` is not one of auto, iommufd, type1, none; did you mean `iommufd`?"
        );
        assert_eq!(
            value::choice::<MapBy>("magic", &[]).unwrap_err().to_string(),
            "`magic` is not one of auto, file, address"
        );
    }
}
