//! Descriptors of the igb family, as the two little-endian words a ring slot holds. Nothing but layout here.
//!
//! Read with: Intel 82576EB datasheet §7.1.5 (receive), §7.2.2 (transmit).

use vfio_glue::address::Iova;
use vfio_glue::memory::Descriptor;

use crate::nic::Segment;

/// Receive, read format: where the frame goes. The header address must be 0: its bit 0 is where "done" lands.
pub(super) fn rx_read(buffer: Iova) -> Descriptor {
    [buffer.raw(), 0]
}

/// Receive, write-back format: the second word.
#[derive(Clone, Copy, Debug)]
pub(super) struct RxReport(pub(super) u64);

impl RxReport {
    const DONE: u64 = 1 << 0;
    const END_OF_PACKET: u64 = 1 << 1;
    /// CE, SE, SEQ, CXE, RXE: only with bad packets let in, which they never are.
    const DAMAGED: u64 = 1 << 24 | 1 << 25 | 1 << 26 | 1 << 28 | 1 << 31;

    /// Done, whole and not damaged.
    pub(super) const SOUND: u64 = Self::DONE | Self::END_OF_PACKET;
    /// No report's state.
    pub(super) const NEVER: u64 = u64::MAX;

    pub(super) fn is_done(self) -> bool {
        self.0 & Self::DONE != 0
    }

    pub(super) fn is_whole(self) -> bool {
        self.0 & Self::END_OF_PACKET != 0
    }

    pub(super) fn is_damaged(self) -> bool {
        self.0 & Self::DAMAGED != 0
    }

    /// Whether the frame's state is `state`: [`SOUND`](Self::SOUND), or [`NEVER`](Self::NEVER), which none is.
    #[inline(always)]
    pub(super) fn is(self, state: u64) -> bool {
        self.0 & (Self::DONE | Self::END_OF_PACKET | Self::DAMAGED) == state
    }

    /// Bytes in this buffer.
    pub(super) fn len(self) -> u32 {
        u32::from(u16::try_from(self.0 >> 32 & 0xffff).unwrap_or(u16::MAX))
    }
}

const TYPE_DATA: u64 = 3 << 20;
const EXTENSION: u64 = 1 << 29;
const INSERT_FCS: u64 = 1 << 25;
const END_OF_PACKET: u64 = 1 << 24;
const REPORT_STATUS: u64 = 1 << 27;
const PAYLEN_SHIFT: u32 = 32 + 14;

/// Whether a data descriptor ends its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// More of the packet follows.
    Middle,
    /// The last one: the card reports here when it is done.
    Last,
}

/// Transmit, advanced data descriptor. `packet_len` is given in a packet's first descriptor, 0 in later ones.
pub(super) fn tx_data(segment: Segment, packet_len: u32, place: Place) -> Descriptor {
    let last = match place {
        Place::Middle => 0,
        Place::Last => END_OF_PACKET | REPORT_STATUS,
    };
    let command = u64::from(segment.len) | TYPE_DATA | EXTENSION | INSERT_FCS | last;
    [
        segment.iova.raw(),
        command | u64::from(packet_len) << PAYLEN_SHIFT,
    ]
}

/// Whether a transmit descriptor's second word says that the card is done with it.
pub(super) fn tx_is_done(report: u64) -> bool {
    report & 1 << 32 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_descriptor_is_laid_out_as_in_the_book() {
        let segment = Segment {
            iova: Iova::new(0x1_2345_6789),
            len: 0x5ea,
        };
        let [address, rest] = tx_data(segment, 0x5ea, Place::Last);
        assert_eq!(address, 0x1_2345_6789);
        assert_eq!(
            rest & 0xffff_ffff,
            0x2b30_05ea,
            "EOP, IFCS, RS, DEXT, type 3, length"
        );
        assert_eq!(rest >> 32, 0x5ea << 14, "PAYLEN at 31:14, status 0");
        let [_, middle] = tx_data(segment, 0, Place::Middle);
        assert_eq!(middle, 0x2230_05ea);
    }

    #[test]
    fn a_report_is_read_field_by_field() {
        let report = RxReport(0x0000_05dc_0000_0003);
        assert!(report.is_done() && report.is_whole() && !report.is_damaged());
        assert_eq!(report.len(), 1500);
        assert!(RxReport(1 << 31).is_damaged());
        assert!(report.is(RxReport::SOUND) && !report.is(RxReport::NEVER));
        for odd in [1, 2, 3 | 1 << 24, 3 | 1 << 31] {
            assert!(!RxReport(odd).is(RxReport::SOUND), "{odd:#x}");
        }
        assert!(!tx_is_done(1) && tx_is_done(1 << 32));
    }
}
