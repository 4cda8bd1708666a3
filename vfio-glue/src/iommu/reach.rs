//! What a device reaches, held against what is mapped: one that would not reach all of it is refused with the numbers.
//!
//! ```text
//! iommufd.rs, type1.rs, fake.rs: before anything changes ──▶ Reach::admit ◀── map/books.rs: once a device is in
//! ```
//!
//! Read with: Linux `include/uapi/linux/iommufd.h` (IOAS_IOVA_RANGES), `include/uapi/linux/vfio.h` (IOVA_RANGE);
//! TRAPS 29, 30, 48.

use std::ops::RangeInclusive;

use super::{DeviceAddress, IommuError};

/// What the map places its extents on, in bytes. The IOMMU's smallest page must not be larger.
pub(crate) const PAGE: u64 = 4096;

/// What a device and its IOMMU take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Ranges of IOVA, sorted, both ends inclusive.
    pub(crate) ranges: Vec<RangeInclusive<u64>>,
    /// The IOMMU's smallest page in bytes.
    pub(crate) page: u64,
}

impl Reach {
    /// Whether `device` can come to a map that has `mapped` in it: first and last byte of each mapping.
    ///
    /// # Errors
    ///
    /// [`IommuError::PageSize`] or [`IommuError::Stranded`].
    pub(crate) fn admit(
        &self,
        device: &DeviceAddress,
        mut mapped: impl Iterator<Item = (u64, u64)>,
    ) -> Result<(), IommuError> {
        let device = || device.clone();
        if self.page > PAGE {
            return Err(IommuError::PageSize {
                device: device(),
                smallest: self.page,
                placed_on: PAGE,
            });
        }
        let outside = mapped.find(|(first, last)| {
            let holds = |range: &RangeInclusive<u64>| range.contains(first) && range.contains(last);
            !self.ranges.iter().any(holds)
        });
        outside.map_or(Ok(()), |(start, end)| {
            Err(IommuError::Stranded {
                device: device(),
                start,
                end,
                usable: show_ranges(&self.ranges),
            })
        })
    }
}

/// Ranges of IOVA for a person to read.
pub(crate) fn show_ranges(ranges: &[RangeInclusive<u64>]) -> String {
    let shown: Vec<String> = ranges
        .iter()
        .map(|range| format!("{:#x}-{:#x}", range.start(), range.end()))
        .collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> DeviceAddress {
        DeviceAddress::Pci("0000:01:00.0".parse().unwrap())
    }

    fn reach(page: u64) -> Reach {
        Reach {
            ranges: vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1],
            page,
        }
    }

    #[test]
    fn what_is_mapped_inside_of_one_range_is_reached() {
        let mapped = [(0x10_0000, 0x10_0fff), (0xfef0_0000, (1 << 39) - 1)];
        reach(PAGE).admit(&card(), mapped.into_iter()).unwrap();
        reach(1).admit(&card(), [].into_iter()).unwrap();
    }

    #[test]
    fn a_mapping_outside_or_across_two_ranges_is_named_with_the_ranges() {
        let across = [(0x10_0000, 0x10_0fff), (0xfedf_f000, 0xfef0_0fff)];
        let text = reach(PAGE)
            .admit(&card(), across.into_iter())
            .unwrap_err()
            .to_string();
        assert_eq!(
            text,
            "device 0000:01:00.0 cannot reach what is mapped at 0xfedff000-0xfef00fff; it reaches \
             0x0-0xfedfffff, 0xfef00000-0x7fffffffff"
        );
        let beyond = [(1 << 39, (1 << 39) + 4095)];
        assert!(matches!(
            reach(PAGE).admit(&card(), beyond.into_iter()),
            Err(IommuError::Stranded { start, .. }) if start == 1 << 39
        ));
    }

    #[test]
    fn an_iommu_with_larger_pages_than_ours_is_refused_with_both_numbers() {
        let text = reach(65536)
            .admit(&card(), [].into_iter())
            .unwrap_err()
            .to_string();
        assert_eq!(
            text,
            "device 0000:01:00.0 is behind an IOMMU whose smallest page is 65536 bytes, and memory is mapped here in \
             multiples of 4096"
        );
    }
}
