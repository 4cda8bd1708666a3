//! Registers of the igb family, as BAR0 offsets. Nothing but layout here.
//!
//! Read with: Intel 82576EB datasheet §8; I210 datasheet §8 where it differs.

use bitflags::bitflags;

/// A register's byte offset in BAR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reg(pub(super) u32);

impl Reg {
    pub(super) const CTRL: Self = Self(0x0000); // device control §8.2.1
    pub(super) const STATUS: Self = Self(0x0008); // device status §8.2.2
    pub(super) const EECD: Self = Self(0x0010); // NVM control §8.4.1
    pub(super) const CTRL_EXT: Self = Self(0x0018); // extended control §8.2.3
    pub(super) const MDIC: Self = Self(0x0020); // PHY access §8.2.4
    pub(super) const ICR: Self = Self(0x00C0); // interrupt cause, read clears §8.8.9
    pub(super) const IMS: Self = Self(0x00D0); // other causes: unmask §8.8.11
    pub(super) const IMC: Self = Self(0x00D8); // other causes: mask §8.8.12
    pub(super) const RCTL: Self = Self(0x0100); // receive control §8.10.1
    pub(super) const TCTL: Self = Self(0x0400); // transmit control §8.12.1
    pub(super) const PHPM: Self = Self(0x0E14); // PHY power management (82580 and later)
    pub(super) const GPIE: Self = Self(0x1514); // general purpose interrupt enable §8.8.8
    pub(super) const EIMS: Self = Self(0x1524); // vectors: unmask §8.8.3
    pub(super) const EIMC: Self = Self(0x1528); // vectors: mask §8.8.4
    pub(super) const EIAC: Self = Self(0x152C); // vectors: clear when sent §8.8.5
    pub(super) const IVAR_MISC: Self = Self(0x1740); // vector of other causes §8.8.14
    pub(super) const RXCSUM: Self = Self(0x5000); // receive checksum control §8.10.20
    pub(super) const RLPML: Self = Self(0x5004); // longest packet let in §8.10.2
    pub(super) const RFCTL: Self = Self(0x5008); // receive filter control §8.10.21
    pub(super) const WUC: Self = Self(0x5800); // wake-up control §8.21.1
    pub(super) const MRQC: Self = Self(0x5818); // multiple queues §8.10.18
    pub(super) const SW_FW_SYNC: Self = Self(0x5B5C); // who has the PHY §8.4.3
    pub(super) const SWSM: Self = Self(0x5B50); // the lock on SW_FW_SYNC §8.4.2

    const RAL: u32 = 0x5400; // receive address, low §8.10.17
    const RAH: u32 = 0x5404; // receive address, high §8.10.18
    const MTA: u32 = 0x5200; // multicast table, 128 words §8.10.16
    const VFTA: u32 = 0x5600; // VLAN table, 128 words §8.10.19
    const UTA: u32 = 0xA000; // unicast table, 128 words §8.10.23
    const VMOLR: u32 = 0x5AD0; // per-pool offload, 8 words §8.14.17
    const IVAR: u32 = 0x1700; // vectors of queues, 8 words §8.8.13
    const RETA: u32 = 0x5C00; // which queue each hash goes to, 32 words §8.10.24
    const RSSRK: u32 = 0x5C80; // the key of the hash, 10 words §8.10.25
    const EITR: u32 = 0x1680; // moderation, one word a vector §8.8.15

    pub(super) const fn receive_address_low(index: u32) -> Self {
        assert!(index < 16);
        Self(Self::RAL + 8 * index)
    }

    pub(super) const fn receive_address_high(index: u32) -> Self {
        assert!(index < 16);
        Self(Self::RAH + 8 * index)
    }

    /// The words of the three filter tables, all to be zeroed.
    pub(super) fn filter_tables() -> impl Iterator<Item = Self> {
        [Self::MTA, Self::VFTA, Self::UTA]
            .into_iter()
            .flat_map(|table| (0..128).map(move |word| Self(table + 4 * word)))
    }

    pub(super) const fn pool_offload(pool: u32) -> Self {
        assert!(pool < 8);
        Self(Self::VMOLR + 4 * pool)
    }

    pub(super) const fn queue_vector(word: u32) -> Self {
        assert!(word < 8);
        Self(Self::IVAR + 4 * word)
    }

    /// Word `word` of the table of queues: entries `4 * word` to `4 * word + 3`, the first in the low byte.
    pub(super) const fn redirection(word: u32) -> Self {
        assert!(word < 32);
        Self(Self::RETA + 4 * word)
    }

    /// Word `word` of the key: its first byte in the low byte of word 0.
    pub(super) const fn rss_key(word: u32) -> Self {
        assert!(word < 10);
        Self(Self::RSSRK + 4 * word)
    }

    pub(super) const fn moderation(vector: u32) -> Self {
        assert!(vector < 25);
        Self(Self::EITR + 4 * vector)
    }
}

/// A register each queue has, as its offset from the queue's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueReg(u32);

impl QueueReg {
    pub(super) const BASE_LOW: Self = Self(0x00); // RDBAL §8.10.5, TDBAL §8.12.6: the ring's IOVA, low half
    pub(super) const BASE_HIGH: Self = Self(0x04); // RDBAH, TDBAH
    pub(super) const LEN_BYTES: Self = Self(0x08); // RDLEN, TDLEN: a multiple of 128
    pub(super) const SPLIT: Self = Self(0x0C); // SRRCTL §8.10.4, receive only
    pub(super) const HEAD: Self = Self(0x10); // RDH, TDH: the card's to move
    pub(super) const TAIL: Self = Self(0x18); // RDT, TDT: ours to move, the doorbell
    pub(super) const CONTROL: Self = Self(0x28); // RXDCTL §8.10.10, TXDCTL §8.12.12
    pub(super) const OFFLOAD: Self = Self(0x38); // DVMOLR, receive, i350 and later; TDWBAL for transmit

    /// The register of receive queue `queue`. The low alias of queues 0 to 3 is not used: QEMU decodes part of it wrong.
    pub(super) const fn rx(self, queue: u32) -> Reg {
        assert!(queue < 16);
        Reg(0xC000 + 0x40 * queue + self.0)
    }

    /// The register of transmit queue `queue`.
    pub(super) const fn tx(self, queue: u32) -> Reg {
        assert!(queue < 16);
        Reg(0xE000 + 0x40 * queue + self.0)
    }
}

bitflags! {
    /// CTRL §8.2.1.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Ctrl: u32 {
        const MASTER_DISABLE = 1 << 2;
        const SET_LINK_UP = 1 << 6;
        const FORCE_SPEED = 1 << 11;
        const FORCE_DUPLEX = 1 << 12;
        const RESET = 1 << 26;
        const RX_FLOW_CONTROL = 1 << 27;
        const TX_FLOW_CONTROL = 1 << 28;
        const VLAN_STRIP = 1 << 30;
        const _ = !0;
    }

    /// STATUS §8.2.2.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Status: u32 {
        const LINK_UP = 1 << 1;
        const SPEED_100 = 1 << 6;
        const SPEED_1000 = 1 << 7;
        const MASTER_ENABLED = 1 << 19;
        const _ = !0;
    }

    /// RCTL §8.10.1. Store Bad Packets (bit 2) is not here on purpose: it would lift the bound on what the card
    /// writes into a buffer.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Rctl: u32 {
        const ENABLE = 1 << 1;
        const UNICAST_PROMISCUOUS = 1 << 3;
        const MULTICAST_PROMISCUOUS = 1 << 4;
        const LONG_PACKETS = 1 << 5;
        const BROADCAST = 1 << 15;
        const STRIP_CRC = 1 << 26;
    }

    /// VMOLR §8.14.17, without its length field.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct PoolOffload: u32 {
        const LONG_PACKETS = 1 << 16;
        const ACCEPT_UNTAGGED = 1 << 24;
        const BROADCAST = 1 << 27;
        const STRIP_CRC = 1 << 31;
    }

    /// MRQC §8.10.18: the mode, and what is hashed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Mrqc: u32 {
        /// Mode 2: every queue is reached by hash.
        const BY_HASH = 2;
        const TCP_IPV4 = 1 << 16;
        const IPV4 = 1 << 17;
        const IPV6 = 1 << 20;
        const TCP_IPV6 = 1 << 21;
        const UDP_IPV4 = 1 << 22;
        const UDP_IPV6 = 1 << 23;
    }

    /// GPIE §8.8.8.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Gpie: u32 {
        const NON_SELECTIVE_ICR = 1 << 0;
        const MSIX_MODE = 1 << 4;
        const AUTO_MASK = 1 << 30;
        const PBA_SUPPORT = 1 << 31;
    }
}

/// EECD: configuration was loaded from the NVM after a reset §8.4.1. QEMU's model never shows it.
pub(super) const EECD_AUTO_READ_DONE: u32 = 1 << 9;
/// CTRL_EXT: a driver has the card §8.2.3.
pub(super) const CTRL_EXT_DRIVER_LOADED: u32 = 1 << 28;
/// RXDCTL and TXDCTL: the queue runs §8.10.10, §8.12.12.
pub(super) const QUEUE_ENABLE: u32 = 1 << 25;
/// RXDCTL thresholds: prefetch 8, host 8, write-back 1; an erratum of the 82576 with MSI-X forbids more.
pub(super) const RX_THRESHOLDS: u32 = 8 | 8 << 8 | 1 << 16;
/// TXDCTL thresholds: prefetch 8, host 1, write-back 0, so that each report comes as soon as its frame is fetched.
pub(super) const TX_THRESHOLDS: u32 = 8 | 1 << 8;
/// SRRCTL: advanced descriptors, one buffer §8.10.4.
pub(super) const SPLIT_ADVANCED_ONE_BUFFER: u32 = 1 << 25;
/// SRRCTL: a queue without descriptors drops, rather than block the others.
pub(super) const SPLIT_DROP: u32 = 1 << 31;
/// TCTL: enable, pad short packets, collision threshold 15, distance 63, retransmit late §8.12.1.
pub(super) const TCTL_RUN: u32 = 1 << 1 | TCTL_PAD | 15 << 4 | 63 << 12 | 1 << 24;
/// TCTL: pad short packets, not enabled.
pub(super) const TCTL_PAD: u32 = 1 << 3;
/// RXCSUM: IP, TCP/UDP and SCTP sums are checked; the descriptor has the RSS hash §8.10.20.
pub(super) const RXCSUM_ALL: u32 = 1 << 8 | 1 << 9 | 1 << 11 | 1 << 13;
/// RFCTL: IPv6 extension headers are not parsed: an erratum, and both reference drivers set it.
pub(super) const RFCTL_IPV6_EX_DISABLE: u32 = 1 << 16;
/// PHPM: no link-down by power management (82580 and later).
pub(super) const PHPM_GO_LINK_DOWN: u32 = 1 << 5;
/// IVAR: the byte holds a vector.
pub(super) const IVAR_VALID: u32 = 0x80;
/// EITR: the interval in microseconds, bits 14:2 §8.8.15.
pub(super) const EITR_INTERVAL_SHIFT: u32 = 2;
/// EITR: the counter that runs is not written (CNT_IGNR) §8.8.15.
pub(super) const EITR_COUNTER_IGNORED: u32 = 1 << 31;
/// IMS, ICR: link status change §8.8.9.
pub(super) const CAUSE_LINK: u32 = 1 << 2;
/// RAH: the address is valid.
pub(super) const ADDRESS_VALID: u32 = 1 << 31;
/// DVMOLR: strip the frame check sequence (i350 and later).
pub(super) const QUEUE_STRIP_CRC: u32 = 1 << 31;

/// MDIC §8.2.4.
pub(super) mod mdic {
    pub(in crate::nic::igb) const WRITE: u32 = 1 << 26;
    pub(in crate::nic::igb) const READ: u32 = 2 << 26;
    pub(in crate::nic::igb) const READY: u32 = 1 << 28;
    pub(in crate::nic::igb) const ERROR: u32 = 1 << 30;
    /// PHY register 0: control.
    pub(in crate::nic::igb) const BMCR: u32 = 0;
    /// BMCR: power down.
    pub(in crate::nic::igb) const BMCR_POWER_DOWN: u32 = 1 << 11;
    /// BMCR: enable autonegotiation and restart it.
    pub(in crate::nic::igb) const BMCR_AUTONEG: u32 = 0x1200;

    /// Names PHY register `register` of PHY `phy`.
    pub(in crate::nic::igb) const fn at(phy: u32, register: u32) -> u32 {
        register << 16 | phy << 21
    }
}
