//! Descriptor layouts, 16 bytes each (igb.md §5 and §7; I210 datasheet §7.1.4, §7.2.2).
//!
//! Parsing is where the card is pickiest: a bit that must be zero and is not, is reported with its place.

/// A receive descriptor as the driver posts it: buffer address, header address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RxRead {
    pub(super) buffer: u64,
    /// Only header split uses it; its bit 0 is where DD lands, so it must be 0.
    pub(super) header: [u32; 2],
}

/// A receive descriptor as the card writes it back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RxWriteBack {
    /// Dword 0, 3:0.
    pub(super) rss_type: u8,
    /// Dword 0, 16:4, with bit 0 of this field at bit 4.
    pub(super) packet_type: u16,
    /// Dword 1.
    pub(super) hash: u32,
    /// Dword 2: status 19:0, errors 31:20.
    pub(super) status: u32,
    /// Dword 3, 15:0.
    pub(super) len: u16,
}

/// Bits of a receive write-back's dword 2.
pub(super) mod rx_status {
    pub(crate) const DD: u32 = 1 << 0;
    pub(crate) const EOP: u32 = 1 << 1;
    pub(crate) const UDPCS: u32 = 1 << 4;
    pub(crate) const L4CS: u32 = 1 << 5;
    pub(crate) const IPCS: u32 = 1 << 6;
    pub(crate) const L4E: u32 = 1 << 29;
    pub(crate) const IPE: u32 = 1 << 30;
}

/// Bits of a receive write-back's packet type, as they stand in [`RxWriteBack::packet_type`].
pub(super) mod packet_type {
    pub(crate) const IPV4: u16 = 1 << 0;
    pub(crate) const IPV4_OPTIONS: u16 = 1 << 1;
    pub(crate) const IPV6: u16 = 1 << 2;
    pub(crate) const IPV6_EXTENSIONS: u16 = 1 << 3;
    pub(crate) const TCP: u16 = 1 << 4;
    pub(crate) const UDP: u16 = 1 << 5;
    pub(crate) const SCTP: u16 = 1 << 6;
}

/// A transmit data descriptor (DTYP 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TxData {
    pub(super) buffer: u64,
    pub(super) len: u32,
    pub(super) payload_len: u32,
    pub(super) context: u8,
    pub(super) end_of_packet: bool,
    pub(super) insert_fcs: bool,
    pub(super) report_status: bool,
    pub(super) insert_vlan: bool,
    pub(super) segment: bool,
    pub(super) insert_ip_checksum: bool,
    pub(super) insert_l4_checksum: bool,
}

/// A transmit context descriptor (DTYP 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TxContext {
    pub(super) index: u8,
    pub(super) mac_len: u16,
    pub(super) ip_len: u16,
    pub(super) l4_len: u16,
    pub(super) mss: u16,
    pub(super) vlan: u16,
    pub(super) ipv4: bool,
    pub(super) l4: L4,
}

/// L4T of a context descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum L4 {
    Udp,
    Tcp,
    Sctp,
    None,
}

/// Any transmit descriptor the card takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TxRead {
    Data(TxData),
    Context(TxContext),
}

/// Why a transmit descriptor makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    Type { dtyp: u8, dext: bool },
    Reserved { dword: u8, bits: u32 },
}

impl RxRead {
    pub(super) fn parse(raw: [u8; 16]) -> Self {
        let [low, high, header_low, header_high] = dwords(raw);
        Self {
            buffer: join(low, high),
            header: [header_low, header_high],
        }
    }
}

impl RxWriteBack {
    pub(super) fn to_dwords(self) -> [u32; 4] {
        let first = u32::from(self.rss_type) | u32::from(self.packet_type) << 4;
        [first, self.hash, self.status, u32::from(self.len)]
    }
}

const DEXT: u32 = 1 << 29;

impl TxRead {
    pub(super) fn parse(raw: [u8; 16]) -> Result<Self, Malformed> {
        let words = dwords(raw);
        let dtyp = (words[2] >> 20 & 0xF) as u8;
        match (dtyp, words[2] & DEXT != 0) {
            (3, true) => parse_data(words).map(Self::Data),
            (2, true) => parse_context(words).map(Self::Context),
            (dtyp, dext) => Err(Malformed::Type { dtyp, dext }),
        }
    }
}

/// Dword 2: 17:16 reserved, b18 MACsec, b19 timestamp, b26 and b28 reserved.
const DATA_COMMAND_ZERO: u32 = 0b1111 << 16 | 1 << 26 | 1 << 28;
/// Dword 3: 3:0 status, b7 CC, b10 IPsec, 13:11 reserved.
const DATA_STATUS_ZERO: u32 = 0xF | 1 << 7 | 0b1111 << 10;

fn parse_data([low, high, command, status]: [u32; 4]) -> Result<TxData, Malformed> {
    must_be_zero(2, command & DATA_COMMAND_ZERO)?;
    must_be_zero(3, status & DATA_STATUS_ZERO)?;
    Ok(TxData {
        buffer: join(low, high),
        len: command & 0xFFFF,
        payload_len: status >> 14,
        context: (status >> 4 & 7) as u8,
        end_of_packet: command & 1 << 24 != 0,
        insert_fcs: command & 1 << 25 != 0,
        report_status: command & 1 << 27 != 0,
        insert_vlan: command & 1 << 30 != 0,
        segment: command & 1 << 31 != 0,
        insert_ip_checksum: status & 1 << 8 != 0,
        insert_l4_checksum: status & 1 << 9 != 0,
    })
}

/// Dword 2: 8:0, b13 and b14 ESP, 19:15, 28:24, 31:30.
const CONTEXT_COMMAND_ZERO: u32 = 0x1FF | 0b111_1111 << 13 | 0b1_1111 << 24 | 0b11 << 30;
/// Dword 3: 3:0, b7. The index has 3 bits but the queue only two slots, so 6:5 must be zero too.
const CONTEXT_STATUS_ZERO: u32 = 0xF | 0b111 << 5;

fn parse_context([lengths, launch_time, command, status]: [u32; 4]) -> Result<TxContext, Malformed> {
    must_be_zero(1, launch_time)?;
    must_be_zero(2, command & CONTEXT_COMMAND_ZERO)?;
    must_be_zero(3, status & CONTEXT_STATUS_ZERO)?;
    Ok(TxContext {
        index: (status >> 4 & 7) as u8,
        mac_len: (lengths >> 9 & 0x7F) as u16,
        ip_len: (lengths & 0x1FF) as u16,
        l4_len: (status >> 8 & 0xFF) as u16,
        mss: (status >> 16) as u16,
        vlan: (lengths >> 16) as u16,
        ipv4: command & 1 << 10 != 0,
        l4: match command >> 11 & 3 {
            0 => L4::Udp,
            1 => L4::Tcp,
            2 => L4::Sctp,
            _ => L4::None,
        },
    })
}

fn must_be_zero(dword: u8, bits: u32) -> Result<(), Malformed> {
    if bits == 0 {
        Ok(())
    } else {
        Err(Malformed::Reserved { dword, bits })
    }
}

/// Splits a descriptor into its four little-endian dwords.
pub(super) fn dwords(raw: [u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| u32::from_le_bytes([raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]]))
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(words: [u32; 4]) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_plain_data_descriptor_parses() {
        let words = [
            0x1000,
            0x2,
            60 | 3 << 20 | 1 << 24 | 1 << 25 | 1 << 27 | DEXT,
            60 << 14,
        ];
        let Ok(TxRead::Data(data)) = TxRead::parse(raw(words)) else {
            panic!("no data descriptor")
        };
        assert_eq!((data.buffer, data.len, data.payload_len), (0x2_0000_1000, 60, 60));
        assert!(data.end_of_packet && data.insert_fcs && data.report_status && !data.segment);
    }

    #[test]
    fn reserved_bits_and_wrong_types_are_named() {
        let with_dd = raw([0x1000, 0, 60 | 3 << 20 | DEXT, 1]);
        assert_eq!(
            TxRead::parse(with_dd),
            Err(Malformed::Reserved { dword: 3, bits: 1 })
        );
        let legacy = raw([0x1000, 0, 60, 0]);
        assert_eq!(
            TxRead::parse(legacy),
            Err(Malformed::Type { dtyp: 0, dext: false })
        );
        let third_slot = raw([14 << 9 | 20, 0, 2 << 20 | DEXT, 2 << 4]);
        assert_eq!(
            TxRead::parse(third_slot),
            Err(Malformed::Reserved {
                dword: 3,
                bits: 2 << 4
            })
        );
    }
}
