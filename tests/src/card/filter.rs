//! Which frames from the wire are stored, and by which queue.
//!
//! The length rules are those of igb.md §6, which the driver's proof of its buffers rests on: a frame is judged
//! whole, before any DMA. Outside VMDq VMOLR.RLPML is not consulted.

use super::Card82576;
use super::frame::{Parsed, read_u16};
use super::regs::{self, Rctl, Rxcsum};

/// Longest frame the card's buffers hold, check sequence included.
pub(super) const HARDWARE_MAX: u32 = 9728;
pub(super) const FCS_LEN: u32 = 4;

impl Card82576 {
    pub(super) fn rctl(&self) -> Rctl {
        Rctl::from_bits_retain(self.word(regs::RCTL))
    }

    /// Ethertype of VLAN tags, and of the outer one of two.
    fn vlan_types(&self) -> (u16, u16) {
        let vet = self.word(regs::VET);
        ((vet & 0xFFFF) as u16, (vet >> 16) as u16)
    }

    pub(super) fn vlan_type(&self) -> u16 {
        self.vlan_types().0
    }

    fn expects_two_tags(&self) -> bool {
        self.word(regs::CTRL_EXT) & regs::CTRL_EXT_EXT_VLAN != 0
    }

    /// Longest frame admitted by RLPML with LPE, check sequence included.
    fn long_packet_limit(&self) -> u32 {
        (self.word(regs::RLPML) & 0x3FFF).min(HARDWARE_MAX)
    }

    /// Says whether `frame`, without check sequence, is longer than the driver asked for.
    pub(super) fn is_oversize(&self, frame: &[u8]) -> bool {
        let len = frame.len() as u64 + u64::from(FCS_LEN);
        let limit = if self.rctl().contains(Rctl::SBP) {
            HARDWARE_MAX
        } else if self.rctl().contains(Rctl::LPE) {
            self.long_packet_limit()
        } else {
            1518 + 4 * self.tags(frame)
        };
        len > u64::from(limit)
    }

    fn tags(&self, frame: &[u8]) -> u32 {
        let (inner, outer) = self.vlan_types();
        let two = self.expects_two_tags()
            && read_u16(frame, 12) == Some(outer)
            && read_u16(frame, 16) == Some(inner);
        if two {
            2
        } else {
            u32::from(read_u16(frame, 12) == Some(inner))
        }
    }

    /// The most bytes of any one frame that can be stored in memory.
    pub(super) fn largest_stored(&self) -> u32 {
        let rctl = self.rctl();
        let longest = if rctl.contains(Rctl::SBP) {
            HARDWARE_MAX
        } else if rctl.contains(Rctl::LPE) {
            self.long_packet_limit()
        } else if self.expects_two_tags() {
            1526
        } else {
            1522
        };
        // A frame is at least 64 bytes on the wire, whatever RLPML says.
        if rctl.contains(Rctl::SECRC) {
            longest.max(64) - FCS_LEN
        } else {
            longest.max(64)
        }
    }

    /// Says whether the address and VLAN filters let `frame` in.
    pub(super) fn is_for_us(&self, frame: &[u8]) -> bool {
        let Some(destination) = frame.first_chunk::<6>() else {
            return false;
        };
        let rctl = self.rctl();
        let addressed = if *destination == [0xFF; 6] {
            rctl.contains(Rctl::BAM) || rctl.contains(Rctl::MPE)
        } else if destination[0] & 1 == 1 {
            rctl.contains(Rctl::MPE)
                || self.is_station_address(*destination)
                || self.in_multicast_table(*destination)
        } else {
            rctl.contains(Rctl::UPE) || self.is_station_address(*destination)
        };
        addressed && (!rctl.contains(Rctl::VFE) || self.in_vlan_table(frame))
    }

    fn is_station_address(&self, [a, b, c, d, e, f]: [u8; 6]) -> bool {
        let low = u32::from_le_bytes([a, b, c, d]);
        let high = u32::from(u16::from_le_bytes([e, f]));
        let entries = (0..16)
            .map(|i| regs::RAL + 8 * i)
            .chain((0..8).map(|i| regs::RAL_HIGH + 8 * i));
        entries.into_iter().any(|entry| {
            let entry_high = self.word(entry + 4);
            entry_high & regs::RAH_VALID != 0 && entry_high & 0xFFFF == high && self.word(entry) == low
        })
    }

    fn in_multicast_table(&self, destination: [u8; 6]) -> bool {
        let shift = [4, 3, 2, 0][(self.rctl().bits() >> 12 & 3) as usize];
        let hash = (u32::from(destination[5]) << 8 | u32::from(destination[4])) >> shift & 0xFFF;
        self.word(regs::MTA + 4 * (hash >> 5)) & 1 << (hash & 31) != 0
    }

    fn in_vlan_table(&self, frame: &[u8]) -> bool {
        if read_u16(frame, 12) != Some(self.vlan_type()) {
            return true;
        }
        let id = u32::from(read_u16(frame, 14).unwrap_or(0) & 0xFFF);
        self.word(regs::VFTA + 4 * (id >> 5)) & 1 << (id & 31) != 0
    }

    /// Picks the queue by RSS, with the RSS type and hash; queue 0 for what RSS does not cover.
    pub(super) fn steer(&self, frame: &[u8], parsed: &Parsed) -> (u8, u8, u32) {
        const MODE_RSS: u32 = 2;
        let mrqc = self.word(regs::MRQC);
        if mrqc & 7 != MODE_RSS || !self.rxcsum().contains(Rxcsum::PCSD) {
            return (0, 0, 0);
        }
        let mut key = [0; 40];
        for (offset, bytes) in (regs::RSSRK..).step_by(4).zip(key.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&self.word(offset).to_le_bytes());
        }
        match parsed.rss(frame, mrqc, &key) {
            Some((kind, hash)) => {
                let entry = hash & 127;
                let queue = self.word(regs::RETA + (entry & !3)).to_le_bytes()[entry as usize % 4];
                (queue & 0xF, kind, hash)
            }
            None => (0, 0, 0),
        }
    }

    pub(super) fn rxcsum(&self) -> Rxcsum {
        Rxcsum::from_bits_retain(self.word(regs::RXCSUM))
    }
}
