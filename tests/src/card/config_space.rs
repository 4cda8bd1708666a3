//! PCI configuration space, laid out as QEMU's igb has it.
//!
//! ```text
//! 0x00 header   0x40 PM   0x50 MSI   0x70 MSI-X   0xA0 PCIe   0x100 AER   0x150 ARI
//! BAR 0 registers, 128 KiB   BAR 2 I/O, 32 B   BAR 3 (64-bit) MSI-X table, 16 KiB
//! ```
//!
//! Of QEMU's BARs the flash (1) is left out, and of its capabilities SR-IOV: no driver of ours opens them.
//! Memory decoding and Bus Master start off, and a function-level reset puts them there again; the kernel's
//! VFIO restores them, so a driver that sets them after each reset suits both.
//!
//! Read with: PCI Local Bus 3.0 §6.1 and §6.8; PCI Express 3.0 §7.8.

/// Bytes of extended configuration space.
pub const CONFIG_LEN_BYTES: usize = 4096;
/// Bytes of BAR 0, the registers.
pub const BAR0_LEN_BYTES: u32 = 0x2_0000;
/// Bytes of BAR 3, the MSI-X table and pending bits.
pub const BAR3_LEN_BYTES: u32 = 0x4000;
/// Where in BAR 3 the pending bits are.
pub const PBA_OFFSET: u32 = 0x2000;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const BAR0: usize = 0x10;
const MSI_X: usize = 0x70;
const PCIE: usize = 0xA0;
/// Device Control in the PCIe capability; b15 of it starts a function-level reset.
const DEVICE_CONTROL_HIGH: usize = PCIE + 9;

/// What a write to configuration space asks of the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    FunctionReset,
}

pub(super) struct ConfigSpace {
    bytes: Box<[u8; CONFIG_LEN_BYTES]>,
    /// Which bits software may change.
    writable: Box<[u8; CONFIG_LEN_BYTES]>,
}

impl ConfigSpace {
    pub(super) fn new() -> Self {
        let mut space = Self {
            bytes: Box::new([0; CONFIG_LEN_BYTES]),
            writable: Box::new([0; CONFIG_LEN_BYTES]),
        };
        space.lay_out_header();
        space.lay_out_capabilities();
        space
    }

    fn lay_out_header(&mut self) {
        self.put(0x00, &[0x86, 0x80, 0xC9, 0x10]); // Intel, 82576 copper
        self.put(0x06, &[0x10, 0x00]); // status: capability list
        self.put(0x08, &[0x01, 0x00, 0x00, 0x02]); // revision 1, Ethernet controller
        self.put(0x2C, &[0x86, 0x80, 0x3C, 0xA0]); // subsystem
        self.put(0x34, &[0x40]); // first capability
        self.put(0x3D, &[0x01]); // INTA#
        self.allow(COMMAND, &[0x47, 0x05]); // I/O, memory, master, parity, SERR, INTx disable
        self.allow(0x0C, &[0xFF]); // cache line size
        self.allow(0x3C, &[0xFF]); // interrupt line
        self.allow_bar(BAR0, BAR0_LEN_BYTES);
        self.put(BAR0 + 8, &[0x01]); // BAR 2: I/O
        self.allow(BAR0 + 8, &[0xE0, 0xFF, 0xFF, 0xFF]);
        self.put(BAR0 + 12, &[0x04]); // BAR 3: 64-bit memory, its high half in BAR 4
        self.allow_bar(BAR0 + 12, BAR3_LEN_BYTES);
        self.allow(BAR0 + 16, &[0xFF; 4]);
    }

    fn lay_out_capabilities(&mut self) {
        self.put(0x40, &[0x01, 0x50, 0x23, 0xC8]); // PM version 3
        self.allow(0x44, &[0x03]); // power state
        self.put(0x50, &[0x05, 0x70, 0x80, 0x01]); // MSI: 64-bit, maskable
        self.allow(0x52, &[0x71]);
        self.allow(
            0x54,
            &[0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF],
        );
        self.allow(0x60, &[0x01]);
        self.put(MSI_X, &[0x11, 0xA0, 0x09, 0x00]); // 10 vectors
        self.put(MSI_X + 4, &[0x03, 0x00, 0x00, 0x00]); // table: BAR 3, offset 0
        self.put(MSI_X + 8, &(PBA_OFFSET | 3).to_le_bytes());
        self.allow(MSI_X + 3, &[0xC0]); // enable, function mask
        self.put(PCIE, &[0x10, 0x00, 0x02, 0x00]); // endpoint, version 2
        self.put(PCIE + 4, &[0x02, 0x80, 0x00, 0x10]); // 512-byte payload, function-level reset
        self.allow(PCIE + 8, &[0xFF, 0x7F]); // device control; the reset bit reads 0
        self.put(0x100, &[0x01, 0x00, 0x02, 0x15]); // AER version 2, next 0x150
        self.put(0x150, &[0x0E, 0x00, 0x01, 0x00]); // ARI version 1, last
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    fn allow_bar(&mut self, offset: usize, len_bytes: u32) {
        self.allow(offset, &(!(len_bytes - 1)).to_le_bytes());
    }

    /// Copies bytes out; what lies past the end reads as ones.
    pub(super) fn read(&self, offset: u16, buf: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(buf) {
            *byte = self.bytes.get(at).copied().unwrap_or(u8::MAX);
        }
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) -> Effect {
        let mut effect = Effect::None;
        for (at, value) in (usize::from(offset)..CONFIG_LEN_BYTES).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
            if at == DEVICE_CONTROL_HIGH && value & 0x80 != 0 {
                effect = Effect::FunctionReset;
            }
        }
        effect
    }

    pub(super) fn memory_decoded(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY != 0
    }

    pub(super) fn bus_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_BUS_MASTER != 0
    }

    pub(super) fn clear_bus_master(&mut self) {
        self.bytes[COMMAND] &= !COMMAND_BUS_MASTER;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_capability_list_leads_to_msi_x_and_pcie() {
        let space = ConfigSpace::new();
        let mut at = space.bytes[0x34];
        let mut found = Vec::new();
        while at != 0 {
            found.push((at, space.bytes[usize::from(at)]));
            at = space.bytes[usize::from(at) + 1];
        }
        assert_eq!(found, [(0x40, 0x01), (0x50, 0x05), (0x70, 0x11), (0xA0, 0x10)]);
        assert_eq!(dword(&space, 0x72) & 0x7FF, 9, "table size, minus one");
    }

    #[test]
    fn bars_answer_a_size_probe() {
        let mut space = ConfigSpace::new();
        space.write(0x10, &[0xFF; 4]);
        space.write(0x1C, &[0xFF; 8]);
        assert_eq!(!(dword(&space, 0x10) & !0xF) + 1, BAR0_LEN_BYTES);
        assert_eq!(!(dword(&space, 0x1C) & !0xF) + 1, BAR3_LEN_BYTES);
        assert_eq!(dword(&space, 0x1C) & 0xF, 4, "64-bit memory");
    }

    #[test]
    fn ids_do_not_change_and_the_reset_bit_reads_zero() {
        let mut space = ConfigSpace::new();
        space.write(0, &[0; 4]);
        assert_eq!(dword(&space, 0), 0x10C9_8086);
        assert_eq!(space.write(0xA8, &[0x10, 0xA8]), Effect::FunctionReset);
        assert_eq!(dword(&space, 0xA8) & 0xFFFF, 0x2810);
    }
}
