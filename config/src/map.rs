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
    /// No IOMMU: addresses are only translated. What `auto` means for a map whose ports have taps and nothing else,
    /// and refused for a map where one has a PCI device.
    #[value(skip)]
    None,
    /// Messages to devices in other processes. What `auto` means for a map where a port has such a device.
    #[value(skip)]
    VfioUser,
}

impl IommuChoice {
    /// Returns the word by which files, flags and commands know it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Iommufd => "iommufd",
            Self::Type1 => "type1",
            Self::None => "none",
            Self::VfioUser => "vfio-user",
        }
    }
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

impl MapBy {
    /// Returns the word by which files, flags and commands know it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::File => "file",
            Self::Address => "address",
        }
    }
}

/// Reads `iommu` of a file or of `map create`, which know two words more than the flag.
pub(crate) fn iommu(text: &str) -> Result<IommuChoice, ValueError> {
    let more = [IommuChoice::None, IommuChoice::VfioUser];
    value::choice(text, &more.map(|choice| (choice.as_str(), choice)))
}

/// Reads `map-by`.
pub(crate) fn map_by(text: &str) -> Result<MapBy, ValueError> {
    value::choice(text, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_knows_two_words_less() {
        assert_eq!(iommu("none"), Ok(IommuChoice::None));
        assert_eq!(iommu("vfio-user"), Ok(IommuChoice::VfioUser));
        assert_eq!(iommu("type1"), Ok(IommuChoice::Type1));
        for word in ["none", "vfio-user"] {
            assert!(<IommuChoice as ValueEnum>::from_str(word, false).is_err());
        }
    }

    #[test]
    fn a_shown_word_reads_back() {
        for choice in IommuChoice::value_variants() {
            assert_eq!(iommu(choice.as_str()), Ok(*choice));
        }
        for by in MapBy::value_variants() {
            assert_eq!(map_by(by.as_str()), Ok(*by));
        }
    }

    #[test]
    fn a_wrong_word_is_answered_with_the_right_ones() {
        assert_eq!(
            iommu("iommu-fd").unwrap_err().to_string(),
            "`iommu-fd` is not one of auto, iommufd, type1, none, vfio-user; did you mean `iommufd`?"
        );
        assert_eq!(
            map_by("magic").unwrap_err().to_string(),
            "`magic` is not one of auto, file, address"
        );
    }
}
