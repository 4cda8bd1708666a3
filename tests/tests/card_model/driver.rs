//! A tiny igb driver over plain memory: one queue pair, polling.
//!
//! ```text
//! 0x0010_0000 rings   rx ring, tx ring at +0x8000, head write-back word at +0xF000
//! 0x0020_0000 bounce
//! 0x1000_0000 guest   rx buffer of slot i at 2048 i, tx buffer of slot i at 0x80000 + 2048 i
//! ```

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tests::card::regs::{self, Cause, Ctrl, Gpie, Rctl, Tctl};
use tests::card::{
    Card82576, Direction, DriverUse, Options, PlainMemory, RangeKind, RingName, Violation, ViolationLog,
};

/// What the tests build the card with.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
/// The rx ring.
pub(crate) const RX_RING: u64 = 0x10_0000;
/// The tx ring.
pub(crate) const TX_RING: u64 = 0x10_8000;
/// All ring memory.
pub(crate) const RINGS_LEN: usize = 0x1_0000;
/// Bounce memory.
pub(crate) const BOUNCE: u64 = 0x20_0000;
/// Guest memory.
pub(crate) const GUEST: u64 = 0x1000_0000;
/// Bytes of guest memory.
pub(crate) const GUEST_LEN: usize = 0x10_0000;
/// Where the guest's frames to send are.
pub(crate) const TX_BUFFERS: u64 = GUEST + 0x8_0000;
/// Descriptors a ring.
pub(crate) const SLOTS: u32 = 16;
/// Rx queue 0 as violations name it.
pub(crate) const RX0: RingName = RingName {
    direction: Direction::Rx,
    queue: 0,
};
/// Tx queue 0 as violations name it.
pub(crate) const TX0: RingName = RingName {
    direction: Direction::Tx,
    queue: 0,
};
/// The descriptor command of a whole frame in one buffer: type 3, DEXT, EOP, IFCS, RS.
pub(crate) const WHOLE_FRAME: u32 = 3 << 20 | 1 << 29 | 1 << 24 | 1 << 25 | 1 << 27;
/// DD.
pub(crate) const DONE: u32 = 1;

/// The receive control of a driver that accepts anything up to RLPML.
pub(crate) const RCTL: u32 = Rctl::EN.bits()
    | Rctl::UPE.bits()
    | Rctl::MPE.bits()
    | Rctl::LPE.bits()
    | Rctl::BAM.bits()
    | Rctl::SECRC.bits();

/// A card, its memory, and a driver's state.
pub(crate) struct Rig {
    /// The card.
    pub(crate) card: Card82576,
    /// What the card can reach.
    pub(crate) memory: PlainMemory,
    /// What the card sent.
    pub(crate) sent: Arc<Mutex<Vec<Vec<u8>>>>,
    /// What the driver did wrong.
    pub(crate) log: ViolationLog,
    rx_next: u32,
    rx_tail: u32,
    tx_tail: u32,
}

/// A frame as received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Its bytes.
    pub(crate) bytes: Vec<u8>,
    /// Dword 2 of its last descriptor.
    pub(crate) status: u32,
    /// Dword 0 of its last descriptor.
    pub(crate) types: u32,
    /// How many descriptors it took.
    pub(crate) descriptors: u32,
}

impl Rig {
    /// A card as after power-on.
    pub(crate) fn cold(options: Options) -> Self {
        let memory = PlainMemory::new();
        memory.map(RX_RING, RINGS_LEN, RangeKind::DriverMemory(DriverUse::Rings));
        memory.map(BOUNCE, 0x1_0000, RangeKind::DriverMemory(DriverUse::Bounce));
        memory.map(GUEST, GUEST_LEN, RangeKind::GuestMemory);
        let sent = Arc::new(Mutex::new(Vec::new()));
        let wire = Arc::clone(&sent);
        let wire = move |frame: &[u8]| wire.lock().expect("no panic on the wire").push(frame.to_vec());
        let card = Card82576::with_options(MAC, Box::new(memory.clone()), Box::new(wire), options);
        let log = card.violations();
        Self {
            card,
            memory,
            sent,
            log,
            rx_next: 0,
            rx_tail: 0,
            tx_tail: 0,
        }
    }

    /// A card with its link up and one queue pair on, nothing posted.
    pub(crate) fn running(options: Options) -> Self {
        let mut rig = Self::cold(options);
        rig.bring_up();
        rig.log.assert_clean();
        rig
    }

    /// All of igb.md §11 but the first buffers.
    pub(crate) fn bring_up(&mut self) {
        self.enable_pci();
        self.reset_port();
        self.start_link();
        self.set_up_rx();
        self.set_up_tx();
    }

    /// Memory decoding and Bus Master on.
    pub(crate) fn enable_pci(&mut self) {
        self.card.config_write(4, &[0x06, 0x00]);
    }

    /// The reset sequence of igb.md §2.
    pub(crate) fn reset_port(&mut self) {
        self.set_bits(regs::CTRL, Ctrl::GIO_MASTER_DISABLE.bits());
        self.card.write32(regs::IMC, u32::MAX);
        self.card.write32(regs::EIMC, u32::MAX);
        self.card.write32(regs::RCTL, 0);
        self.card.write32(regs::TCTL, Tctl::PSP.bits());
        self.set_bits(regs::CTRL, Ctrl::RST.bits());
        self.card.advance(Duration::from_millis(1));
        self.card.read32(regs::ICR);
        self.set_bits(regs::CTRL_EXT, 1 << 28);
        self.card.write32(regs::RX_QUEUES + 0x28, 0);
        self.card.write32(regs::TX_QUEUES + 0x28, 0);
    }

    /// SLU, autonegotiation through MDIC, and the time it takes.
    pub(crate) fn start_link(&mut self) {
        self.set_bits(regs::CTRL, Ctrl::SLU.bits());
        self.write_phy(0, 0x1200);
        self.card.advance(Duration::from_millis(500));
    }

    /// Writes a register of the PHY at address 1.
    pub(crate) fn write_phy(&mut self, register: u32, value: u16) {
        self.card
            .write32(regs::MDIC, 1 << 26 | 1 << 21 | register << 16 | u32::from(value));
        self.poll(regs::MDIC, 1 << 28, 1 << 28);
    }

    /// Receive queue 0 and the port's filters; frames up to 1518 bytes.
    pub(crate) fn set_up_rx(&mut self) {
        self.card.write32(regs::RXCSUM, 0x2300);
        self.card.write32(regs::RLPML, 1522);
        self.card.write32(regs::RX_QUEUES, low_half(RX_RING));
        self.card.write32(regs::RX_QUEUES + 4, 0);
        self.card.write32(regs::RX_QUEUES + 8, SLOTS * 16);
        self.card.write32(regs::RX_QUEUES + 0x10, 0);
        self.card.write32(regs::RX_QUEUES + 0x18, 0);
        self.card.write32(regs::RX_QUEUES + 0x0C, 0x8200_0002);
        self.card.write32(regs::RX_QUEUES + 0x28, 0x0201_0808);
        self.poll(regs::RX_QUEUES + 0x28, regs::QUEUE_ENABLE, regs::QUEUE_ENABLE);
        self.card.write32(regs::RCTL, RCTL);
        self.rx_next = 0;
        self.rx_tail = 0;
    }

    /// Transmit queue 0.
    pub(crate) fn set_up_tx(&mut self) {
        self.card.write32(regs::TX_QUEUES, low_half(TX_RING));
        self.card.write32(regs::TX_QUEUES + 4, 0);
        self.card.write32(regs::TX_QUEUES + 8, SLOTS * 16);
        self.card.write32(regs::TX_QUEUES + 0x10, 0);
        self.card.write32(regs::TX_QUEUES + 0x18, 0);
        self.card.write32(regs::TX_QUEUES + 0x28, 0x0200_0108);
        self.poll(regs::TX_QUEUES + 0x28, regs::QUEUE_ENABLE, regs::QUEUE_ENABLE);
        self.card.write32(regs::TCTL, 0x0103_F0FA);
        self.tx_tail = 0;
    }

    /// Queue interrupts on vector 0, others on vector 1, auto-cleared and unmasked.
    pub(crate) fn set_up_interrupts(&mut self) {
        self.card.write32(
            regs::GPIE,
            (Gpie::NSICR | Gpie::MSIX_MODE | Gpie::EIAME).bits() | 1 << 31,
        );
        self.card.write32(regs::IVAR, 0x8080);
        self.card.write32(regs::IVAR_MISC, 0x81 << 8);
        self.card.write32(regs::EIAC, 0b11);
        self.card.write32(regs::EIMS, 0b11);
        self.card.write32(regs::IMS, Cause::LSC.bits());
    }

    /// Reads until `bits & mask` shows, a few times at most.
    pub(crate) fn poll(&mut self, offset: u32, mask: u32, bits: u32) {
        let shown = (0..4).any(|_| self.card.read32(offset) & mask == bits);
        assert!(shown, "register {offset:#x} never showed {bits:#x}");
    }

    /// Sets bits of a register.
    pub(crate) fn set_bits(&mut self, offset: u32, bits: u32) {
        let value = self.card.read32(offset);
        self.card.write32(offset, value | bits);
    }

    /// Posts the guest's buffers of the next `count` slots.
    pub(crate) fn post_rx(&mut self, count: u32) {
        for _ in 0..count {
            self.write_rx_descriptor(self.rx_tail, GUEST + 2048 * u64::from(self.rx_tail));
            self.rx_tail = (self.rx_tail + 1) % SLOTS;
        }
        self.card.write32(regs::RX_QUEUES + 0x18, self.rx_tail);
    }

    /// Posts one buffer of the caller's choice.
    pub(crate) fn post_rx_at(&mut self, buffer: u64) {
        self.write_rx_descriptor(self.rx_tail, buffer);
        self.rx_tail = (self.rx_tail + 1) % SLOTS;
        self.card.write32(regs::RX_QUEUES + 0x18, self.rx_tail);
    }

    fn write_rx_descriptor(&self, slot: u32, buffer: u64) {
        self.memory
            .put(RX_RING + 16 * u64::from(slot), &buffer.to_le_bytes());
        self.memory.put(RX_RING + 16 * u64::from(slot) + 8, &[0; 8]);
    }

    /// Takes the next complete frame out of the guest's buffers.
    pub(crate) fn harvest(&mut self) -> Option<Received> {
        const EOP: u32 = 2;
        let mut bytes = Vec::new();
        let mut slot = self.rx_next;
        for descriptors in 1..=SLOTS {
            let [types, _, status, len] = self.descriptor(RX_RING, slot);
            if status & DONE == 0 {
                return None;
            }
            bytes.extend(
                self.memory
                    .get(GUEST + 2048 * u64::from(slot), (len & 0xFFFF) as usize),
            );
            slot = (slot + 1) % SLOTS;
            if status & EOP != 0 {
                self.rx_next = slot;
                return Some(Received {
                    bytes,
                    status,
                    types,
                    descriptors,
                });
            }
        }
        None
    }

    /// Puts `frame` into the guest's buffer of the next slot and sends it, with `command` and `status` as the
    /// descriptor's last dwords, length and PAYLEN aside. Returns the slot.
    pub(crate) fn send_with(&mut self, frame: &[u8], command: u32, status: u32) -> u32 {
        let slot = self.tx_tail;
        let buffer = TX_BUFFERS + 2048 * u64::from(slot);
        self.memory.put(buffer, frame);
        let len = u32::try_from(frame.len()).expect("a frame");
        self.write_tx_descriptor(buffer, command | len, status | len << 14);
        self.ring_tx();
        slot
    }

    /// Sends `frame` whole.
    pub(crate) fn send(&mut self, frame: &[u8]) -> u32 {
        self.send_with(frame, WHOLE_FRAME, 0)
    }

    /// Writes the next transmit descriptor without telling the card.
    pub(crate) fn write_tx_descriptor(&mut self, buffer: u64, command: u32, status: u32) {
        let at = TX_RING + 16 * u64::from(self.tx_tail);
        self.memory.put(at, &buffer.to_le_bytes());
        self.memory.put(at + 8, &command.to_le_bytes());
        self.memory.put(at + 12, &status.to_le_bytes());
        self.tx_tail = (self.tx_tail + 1) % SLOTS;
    }

    /// Writes a context descriptor: lengths, L4T (0 UDP, 1 TCP), MSS and L4LEN.
    pub(crate) fn write_tx_context(&mut self, mac_len: u64, ip_len: u64, l4: u32, mss: u32, l4_len: u32) {
        let command = 2 << 20 | 1 << 29 | 1 << 10 | l4 << 11;
        self.write_tx_descriptor(mac_len << 9 | ip_len, command, mss << 16 | l4_len << 8);
    }

    /// Tells the card of new transmit descriptors.
    pub(crate) fn ring_tx(&mut self) {
        self.card.write32(regs::TX_QUEUES + 0x18, self.tx_tail);
    }

    /// Whether transmit slot `slot` was reported done.
    pub(crate) fn tx_done(&self, slot: u32) -> bool {
        self.descriptor(TX_RING, slot)[3] & DONE != 0
    }

    /// The dwords of a descriptor.
    pub(crate) fn descriptor(&self, ring: u64, slot: u32) -> [u32; 4] {
        let raw = self.memory.get(ring + 16 * u64::from(slot), 16);
        let mut dwords = raw
            .chunks_exact(4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().expect("4 bytes")));
        std::array::from_fn(|_| dwords.next().expect("16 bytes"))
    }

    /// Takes what the card sent so far.
    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.sent.lock().expect("no panic on the wire"))
    }

    /// Checks that the driver broke exactly these rules, once each.
    #[track_caller]
    pub(crate) fn expect(&self, violations: &[Violation]) {
        assert_eq!(self.log.take(), violations);
    }
}

/// The low half of an address, for a register.
pub(crate) fn low_half(iova: u64) -> u32 {
    (iova & 0xFFFF_FFFF) as u32
}

/// A frame of `len` bytes to the card's address, whose payload tells its length and `seed`.
pub(crate) fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![seed; len];
    frame[..6].copy_from_slice(&MAC);
    frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 0x88, 0xB5]);
    for (byte, position) in frame[14..].iter_mut().zip((0..251).cycle()) {
        *byte = byte.wrapping_add(position);
    }
    frame
}

impl Rig {
    /// Like [`set_up_rx`](Self::set_up_rx) with another SRRCTL.
    pub(crate) fn set_up_rx_with_split(&mut self, srrctl: u32) {
        self.set_up_rx();
        self.card.write32(regs::RX_QUEUES + 0x28, 0);
        self.card.write32(regs::RX_QUEUES + 0x0C, srrctl);
        self.card.write32(regs::RX_QUEUES + 0x28, 0x0201_0808);
        self.poll(regs::RX_QUEUES + 0x28, regs::QUEUE_ENABLE, regs::QUEUE_ENABLE);
    }

    /// Receive queue 1, its ring at +0x1000, with one buffer posted.
    pub(crate) fn set_up_second_rx_queue(&mut self) {
        let queue = regs::RX_QUEUES + 0x40;
        let ring = RX_RING + 0x1000;
        self.card.write32(queue, low_half(ring));
        self.card.write32(queue + 8, SLOTS * 16);
        self.card.write32(queue + 0x0C, 0x8200_0002);
        self.card.write32(queue + 0x28, regs::QUEUE_ENABLE);
        self.poll(queue + 0x28, regs::QUEUE_ENABLE, regs::QUEUE_ENABLE);
        self.memory.put(ring, &(GUEST + 0x4_0000).to_le_bytes());
        self.card.write32(queue + 0x18, 1);
    }
}
