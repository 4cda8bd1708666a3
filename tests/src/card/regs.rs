//! Registers of the 82576 that the model knows: offsets in BAR 0 and their bits, and nothing else.
//!
//! Read with: the 82576 datasheet's register chapter; names are Intel's.

use bitflags::bitflags;

use super::violations::{Direction, RingName};

// Device control and status.
/// Device control.
pub const CTRL: u32 = 0x0000;
/// The same register, second address.
pub const CTRL_ALIAS: u32 = 0x0004;
/// Device status.
pub const STATUS: u32 = 0x0008;
/// NVM presence and auto-load.
pub const EECD: u32 = 0x0010;
/// NVM read by word.
pub const EERD: u32 = 0x0014;
/// Extended device control.
pub const CTRL_EXT: u32 = 0x0018;
/// Access to the PHY's registers.
pub const MDIC: u32 = 0x0020;
/// VLAN ethertypes.
pub const VET: u32 = 0x0038;
/// Manageability NVM control: b18 tells that port 0 loaded its configuration.
pub const EEMNGCTL: u32 = 0x1010;
/// Software semaphore.
pub const SWSM: u32 = 0x5B50;
/// Firmware semaphore, read-only.
pub const FWSM: u32 = 0x5B54;
/// Which resources software and firmware own.
pub const SW_FW_SYNC: u32 = 0x5B5C;
/// Receive packet buffer, KiB.
pub const RXPBS: u32 = 0x2404;
/// Transmit packet buffer, KiB.
pub const TXPBS: u32 = 0x3404;

// Interrupts.
/// Other causes, read.
pub const ICR: u32 = 0x00C0;
/// Other causes, set.
pub const ICS: u32 = 0x00C8;
/// Other causes, unmask.
pub const IMS: u32 = 0x00D0;
/// Other causes, mask.
pub const IMC: u32 = 0x00D8;
/// Other causes, auto-mask.
pub const IAM: u32 = 0x00E0;
/// General interrupt behaviour.
pub const GPIE: u32 = 0x1514;
/// Per vector, set.
pub const EICS: u32 = 0x1520;
/// Per vector, unmask.
pub const EIMS: u32 = 0x1524;
/// Per vector, mask.
pub const EIMC: u32 = 0x1528;
/// Per vector, auto-clear.
pub const EIAC: u32 = 0x152C;
/// Per vector, auto-mask.
pub const EIAM: u32 = 0x1530;
/// Per vector, pending.
pub const EICR: u32 = 0x1580;
/// Moderation of vector 0; vector n is 4n further.
pub const EITR: u32 = 0x1680;
/// Queue routing; column-major on the 82576.
pub const IVAR: u32 = 0x1700;
/// Routing of the TCP timer and the other causes.
pub const IVAR_MISC: u32 = 0x1740;
/// MSI-X pending bit clear.
pub const PBACL: u32 = 0x5B68;

// Receive.
/// Receive control.
pub const RCTL: u32 = 0x0100;
/// Queue drop enable, one bit per queue.
pub const QDE: u32 = 0x2408;
/// Receive checksum control.
pub const RXCSUM: u32 = 0x5000;
/// Longest packet with LPE.
pub const RLPML: u32 = 0x5004;
/// Receive filter control.
pub const RFCTL: u32 = 0x5008;
/// Multicast hash table, 128 dwords.
pub const MTA: u32 = 0x5200;
/// Station addresses 0 to 15, low halves; 8 bytes apart.
pub const RAL: u32 = 0x5400;
/// High half of station address 0.
pub const RAH: u32 = 0x5404;
/// Station addresses 16 to 23.
pub const RAL_HIGH: u32 = 0x54E0;
/// VLAN filter table, 128 dwords.
pub const VFTA: u32 = 0x5600;
/// Multiple receive queues command.
pub const MRQC: u32 = 0x5818;
/// RSS redirection table, 32 dwords.
pub const RETA: u32 = 0x5C00;
/// RSS key, 10 dwords.
pub const RSSRK: u32 = 0x5C80;
/// Pool offload, pool 0; pool n is 4n further.
pub const VMOLR: u32 = 0x5AD0;
/// Receive queue 0; queue n is 0x40 n further.
pub const RX_QUEUES: u32 = 0xC000;
/// Receive queues 0 to 3 at their older addresses, 0x100 apart.
pub const RX_QUEUES_ALIAS: u32 = 0x2800;

// Transmit.
/// Transmit control.
pub const TCTL: u32 = 0x0400;
/// Transmit queue 0; queue n is 0x40 n further.
pub const TX_QUEUES: u32 = 0xE000;
/// Transmit queues 0 to 3 at their older addresses, 0x100 apart.
pub const TX_QUEUES_ALIAS: u32 = 0x3800;

// Statistics, all cleared by reading.
/// Frames missed because the packet buffer was full.
pub const MPC: u32 = 0x4010;
/// Good frames received by size, six buckets from 64 bytes on.
pub const PRC64: u32 = 0x405C;
/// Good frames received.
pub const GPRC: u32 = 0x4074;
/// Broadcast frames received.
pub const BPRC: u32 = 0x4078;
/// Multicast frames received.
pub const MPRC: u32 = 0x407C;
/// Good frames transmitted.
pub const GPTC: u32 = 0x4080;
/// Good octets received, low and high.
pub const GORCL: u32 = 0x4088;
/// Good octets transmitted, low and high.
pub const GOTCL: u32 = 0x4090;
/// Frames that met no descriptor.
pub const RNBC: u32 = 0x40A0;
/// Oversize frames.
pub const ROC: u32 = 0x40AC;
/// Octets received, low and high.
pub const TORL: u32 = 0x40C0;
/// Octets transmitted, low and high.
pub const TOTL: u32 = 0x40C8;
/// Frames received.
pub const TPR: u32 = 0x40D0;
/// Frames transmitted.
pub const TPT: u32 = 0x40D4;
/// Frames transmitted by size, six buckets from 64 bytes on.
pub const PTC64: u32 = 0x40D8;
const STATISTICS: std::ops::RangeInclusive<u32> = 0x4000..=0x4124;

bitflags! {
    /// Bits of [`CTRL`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Ctrl: u32 {
        /// Full duplex.
        const FD = 1 << 0;
        /// Stop issuing DMA.
        const GIO_MASTER_DISABLE = 1 << 2;
        /// Set link up.
        const SLU = 1 << 6;
        /// Reset the port; clears itself.
        const RST = 1 << 26;
        /// Strip and insert VLAN tags.
        const VME = 1 << 30;
        /// Reset the PHY.
        const PHY_RST = 1 << 31;
        const _ = !0;
    }

    /// Bits of [`STATUS`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Status: u32 {
        /// Full duplex.
        const FD = 1 << 0;
        /// Link up.
        const LU = 1 << 1;
        /// 1000 Mb/s, in 7:6.
        const SPEED_1000 = 2 << 6;
        /// The PHY was reset; cleared by writing 0.
        const PHYRA = 1 << 10;
        /// The card may issue DMA.
        const GIO_MASTER_ENABLE = 1 << 19;
        const _ = !0;
    }

    /// Bits of [`RCTL`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Rctl: u32 {
        /// Receiver on.
        const EN = 1 << 1;
        /// Store bad packets; also switches the length check off.
        const SBP = 1 << 2;
        /// Unicast promiscuous.
        const UPE = 1 << 3;
        /// Multicast promiscuous.
        const MPE = 1 << 4;
        /// Long packets: RLPML is the limit.
        const LPE = 1 << 5;
        /// Loopback mode, 7:6.
        const LBM = 3 << 6;
        /// Accept broadcast.
        const BAM = 1 << 15;
        /// Filter by VLAN.
        const VFE = 1 << 18;
        /// Strip the check sequence.
        const SECRC = 1 << 26;
        const _ = !0;
    }

    /// Bits of [`TCTL`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Tctl: u32 {
        /// Transmitter on.
        const EN = 1 << 1;
        /// Pad short packets.
        const PSP = 1 << 3;
        const _ = !0;
    }

    /// Bits of [`RXCSUM`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Rxcsum: u32 {
        /// Check IPv4 headers.
        const IPOFL = 1 << 8;
        /// Check TCP and UDP.
        const TUOFL = 1 << 9;
        /// RSS hash instead of the fragment checksum.
        const PCSD = 1 << 13;
        const _ = !0;
    }

    /// Other causes, as in [`ICR`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cause: u32 {
        /// A transmit descriptor was written back.
        const TXDW = 1 << 0;
        /// The link changed.
        const LSC = 1 << 2;
        /// The receive packet buffer overflowed.
        const RXO = 1 << 6;
        /// A receive descriptor was written back.
        const RXDW = 1 << 7;
        /// An MDIC access ended.
        const MDAC = 1 << 9;
        /// Some cause is asserted and unmasked.
        const INTA = 1 << 31;
        const _ = !0;
    }

    /// Bits of [`GPIE`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Gpie: u32 {
        /// ICR always clears on read.
        const NSICR = 1 << 0;
        /// One vector per bit of EICR.
        const MSIX_MODE = 1 << 4;
        /// EIAM is in force.
        const EIAME = 1 << 30;
        const _ = !0;
    }
}

/// RXDCTL and TXDCTL b25.
pub const QUEUE_ENABLE: u32 = 1 << 25;
/// SRRCTL b31: drop a frame that finds no descriptor instead of holding up the packet buffer.
pub const SRRCTL_DROP_EN: u32 = 1 << 31;
/// CTRL_EXT b26: two VLAN tags are expected.
pub const CTRL_EXT_EXT_VLAN: u32 = 1 << 26;
/// RAH b31: the address is valid.
pub const RAH_VALID: u32 = 1 << 31;

/// A register of one queue, by its low offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueRegister {
    /// RDBAL or TDBAL.
    BaseLow,
    /// RDBAH or TDBAH.
    BaseHigh,
    /// RDLEN or TDLEN, in bytes.
    Len,
    /// SRRCTL.
    Split,
    /// RDH or TDH.
    Head,
    /// RXCTL or TXCTL: direct cache access.
    CacheHints,
    /// RDT or TDT: the doorbell.
    Tail,
    /// RXDCTL or TXDCTL.
    Control,
    /// RQDPC: frames dropped for want of descriptors.
    Drops,
    /// TDWBAL.
    WriteBackLow,
    /// TDWBAH.
    WriteBackHigh,
}

/// What an offset in BAR 0 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Queue(RingName, QueueRegister),
    /// Interrupt registers, at this offset.
    Interrupt,
    /// Registers with behaviour of their own in `bringup.rs`, `rx.rs` or `tx.rs`.
    Special,
    Statistic,
    /// Memory the card consults and the driver may write at will.
    Plain,
    ReadOnly,
    Unknown,
}

/// First and last byte of each span of registers that behave as memory.
const PLAIN: &[(u32, u32)] = &[
    (0x0028, 0x0033), // FCAL, FCAH, FCT
    (VET, VET + 3),
    (0x0170, 0x0173), // FCTTV
    (0x0404, 0x0407), // TCTL_EXT
    (0x0410, 0x0413), // TIPG
    (0x0C8C, 0x0C93), // VFRE, VFTE
    (0x0E00, 0x0E03), // LEDCTL
    (0x2160, 0x2163), // FCRTL
    (0x2168, 0x216B), // FCRTH
    (RXPBS, RXPBS + 3),
    (QDE, QDE + 3),
    (0x2460, 0x2463), // FCRTV
    (TXPBS, TXPBS + 3),
    (0x3500, 0x3503), // DTXSWC
    (0x3590, 0x3593), // DTXCTL
    (0x3700, 0x371F), // VMVIR
    (RXCSUM, RXCSUM + 3),
    (RFCTL, RFCTL + 3),
    (MTA, MTA + 0x1FF),
    (RAL, RAL + 0x7F),
    (0x5480, 0x54BF), // PSRTYPE
    (RAL_HIGH, RAL_HIGH + 0x3F),
    (VFTA, VFTA + 0x1FF),
    (0x5800, 0x5803), // WUC
    (0x5808, 0x580B), // WUFC
    (0x5820, 0x5823), // MANC
    (VMOLR, VMOLR + 0x1F),
    (0x5AF0, 0x5AF3), // RPLOLR
    (0x5B00, 0x5B03), // GCR
    (RETA, RETA + 0x7F),
    (RSSRK, RSSRK + 0x27),
    (0x5D00, 0x5D7F), // VLVF
    (0xA000, 0xA1FF), // UTA
];

const SPECIAL: &[u32] = &[
    CTRL, CTRL_ALIAS, STATUS, EECD, EERD, CTRL_EXT, MDIC, SWSM, SW_FW_SYNC, RCTL, RLPML, MRQC, TCTL,
    0x581C, // VT_CTL
];

impl Register {
    /// Says what lives at the aligned `offset`.
    pub(super) fn decode(offset: u32) -> Self {
        if let Some((ring, register)) = decode_queue(offset) {
            return Self::Queue(ring, register);
        }
        match offset {
            ICR | ICS | IMS | IMC | IAM | GPIE | EICS | EIMS | EIMC | EIAC | EIAM | EICR | IVAR_MISC
            | PBACL => Self::Interrupt,
            _ if (EITR..EITR + 4 * 25).contains(&offset) => Self::Interrupt,
            _ if (IVAR..IVAR + 4 * 8).contains(&offset) => Self::Interrupt,
            _ if STATISTICS.contains(&offset) => Self::Statistic,
            _ if SPECIAL.contains(&offset) => Self::Special,
            EEMNGCTL | FWSM => Self::ReadOnly,
            _ if PLAIN
                .iter()
                .any(|(first, last)| (first..=last).contains(&&offset)) =>
            {
                Self::Plain
            }
            _ => Self::Unknown,
        }
    }
}

fn decode_queue(offset: u32) -> Option<(RingName, QueueRegister)> {
    let (direction, base, stride, count) = match offset {
        0xC000..0xC400 => (Direction::Rx, RX_QUEUES, 0x40, 16),
        0xE000..0xE400 => (Direction::Tx, TX_QUEUES, 0x40, 16),
        0x2800..0x2C00 => (Direction::Rx, RX_QUEUES_ALIAS, 0x100, 4),
        0x3800..0x3C00 => (Direction::Tx, TX_QUEUES_ALIAS, 0x100, 4),
        _ => return None,
    };
    let queue = u8::try_from((offset - base) / stride)
        .ok()
        .filter(|queue| *queue < count)?;
    let register = match ((offset - base) % stride, direction) {
        (0x00, _) => QueueRegister::BaseLow,
        (0x04, _) => QueueRegister::BaseHigh,
        (0x08, _) => QueueRegister::Len,
        (0x0C, Direction::Rx) => QueueRegister::Split,
        (0x10, _) => QueueRegister::Head,
        (0x14, _) => QueueRegister::CacheHints,
        (0x18, _) => QueueRegister::Tail,
        (0x28, _) => QueueRegister::Control,
        (0x30, Direction::Rx) => QueueRegister::Drops,
        (0x38, Direction::Tx) => QueueRegister::WriteBackLow,
        (0x3C, Direction::Tx) => QueueRegister::WriteBackHigh,
        _ => return None,
    };
    Some((RingName { direction, queue }, register))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_addresses_of_a_queue_register_decode_to_the_same() {
        let tail = (
            RingName {
                direction: Direction::Rx,
                queue: 3,
            },
            QueueRegister::Tail,
        );
        assert_eq!(decode_queue(0xC0D8), Some(tail));
        assert_eq!(decode_queue(0x2B18), Some(tail));
        assert_eq!(
            Register::decode(0xC038),
            Register::Unknown,
            "DVMOLR is not on the 82576"
        );
    }

    #[test]
    fn tables_end_where_they_end() {
        assert_eq!(Register::decode(MTA + 0x1FC), Register::Plain);
        assert_eq!(Register::decode(IVAR + 0x1C), Register::Interrupt);
        assert_eq!(Register::decode(IVAR + 0x20), Register::Unknown);
    }
}
