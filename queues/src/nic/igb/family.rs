//! The members of the family and where they differ.
//!
//! Only the 82576 has been driven, as QEMU emulates it. The others follow from the datasheets and the reference
//! drivers and have not met silicon.

/// A member of the igb family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// 82576.
    I82576,
    /// 82580.
    I82580,
    /// I350 and I354.
    I350,
    /// I210.
    I210,
    /// I211.
    I211,
}

impl Family {
    /// The member with this PCI device id (vendor 8086), physical functions only.
    pub(super) fn of(device: u16) -> Option<Self> {
        Some(match device {
            0x10c9 | 0x10e6 | 0x10e7 | 0x10e8 | 0x1526 | 0x150a | 0x1518 | 0x150d => Self::I82576,
            0x150e..=0x1511 | 0x1516 | 0x1527 => Self::I82580,
            0x1521..=0x1524 | 0x1546 | 0x1f40 | 0x1f41 | 0x1f45 => Self::I350,
            0x1533..=0x1538 | 0x157b | 0x157c | 0x15f6 => Self::I210,
            0x1539 => Self::I211,
            _ => return None,
        })
    }

    /// As a person calls it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::I82576 => "82576",
            Self::I82580 => "82580",
            Self::I350 => "I350",
            Self::I210 => "I210",
            Self::I211 => "I211",
        }
    }

    /// Queue pairs of the function.
    pub(super) fn queue_pairs(self) -> u16 {
        match self {
            Self::I82576 => 16,
            Self::I82580 | Self::I350 => 8,
            Self::I210 => 4,
            Self::I211 => 2,
        }
    }

    /// The IVAR word and the shift of its byte for a receive queue; transmit is one byte further.
    pub(super) fn vector_place(self, queue: u32) -> (u32, u32) {
        match self {
            // Column-major: word is queue modulo 8, bytes 0 and 1 for queues 0 to 7, 2 and 3 for 8 to 15.
            Self::I82576 => (queue % 8, 16 * (queue / 8)),
            // Row-major: word is queue over 2, bytes 0 and 1 for even queues, 2 and 3 for odd ones.
            _ => (queue / 2, 16 * (queue % 2)),
        }
    }

    /// Whether each receive queue has its own offload register.
    pub(super) fn has_queue_offload(self) -> bool {
        matches!(self, Self::I350 | Self::I210 | Self::I211)
    }

    /// Whether the PHY's power management can keep the link down.
    pub(super) fn has_phy_power_management(self) -> bool {
        !matches!(self, Self::I82576)
    }

    /// Milliseconds to leave the registers alone after a reset.
    pub(super) fn reset_quiet_ms(self) -> u64 {
        match self {
            Self::I82576 => 1,
            _ => 5,
        }
    }

    /// The PHY's address on the management bus: 1 on the 82576, fixed in MDICNFG and ignored on later ones.
    pub(super) fn phy_address(self) -> u32 {
        match self {
            Self::I82576 => 1,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_of_queues_stand_where_each_member_has_them() {
        assert_eq!(Family::I82576.vector_place(3), (3, 0));
        assert_eq!(Family::I82576.vector_place(11), (3, 16));
        assert_eq!(Family::I210.vector_place(3), (1, 16));
    }

    #[test]
    fn a_virtual_function_is_no_card_of_ours() {
        assert_eq!(Family::of(0x10ca), None);
        assert_eq!(Family::of(0x10c9), Some(Family::I82576));
    }
}
