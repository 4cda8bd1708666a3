//! What happened to frames: the card's own statistics registers, and plainer counters for tests.

use std::fmt;

use super::Card82576;
use super::filter::FCS_LEN;
use super::regs;

/// What became of the frames the card met, over its whole life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames stored in memory.
    pub rx_frames: u64,
    /// Their bytes, as stored.
    pub rx_bytes: u64,
    /// Frames put on the wire.
    pub tx_frames: u64,
    /// Their bytes, padding included and check sequence not.
    pub tx_bytes: u64,
    /// Interrupt messages sent.
    pub interrupts: u64,
    /// Received and dropped: the test asked for it, or the card was removed.
    pub dropped_on_request: u64,
    /// Received and dropped: the link was down.
    pub dropped_no_link: u64,
    /// Received and dropped: RCTL.EN was off.
    pub dropped_receiver_off: u64,
    /// Received and dropped: longer than RLPML or the Ethernet maximum.
    pub dropped_oversize: u64,
    /// Received and dropped: for another station or VLAN.
    pub dropped_filtered: u64,
    /// Received and dropped: the queue was off.
    pub dropped_queue_off: u64,
    /// Received and dropped: no descriptors, and DROP_EN.
    pub dropped_no_descriptor: u64,
    /// Received and dropped: the packet buffer was full.
    pub dropped_buffer_full: u64,
    /// Sent into a link that was down (QEMU quirk only).
    pub discarded_no_link: u64,
}

impl fmt::Display for Counters {
    /// One `name value` pair a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = [
            ("rx_frames", self.rx_frames),
            ("rx_bytes", self.rx_bytes),
            ("tx_frames", self.tx_frames),
            ("tx_bytes", self.tx_bytes),
            ("interrupts", self.interrupts),
            ("dropped_on_request", self.dropped_on_request),
            ("dropped_no_link", self.dropped_no_link),
            ("dropped_receiver_off", self.dropped_receiver_off),
            ("dropped_oversize", self.dropped_oversize),
            ("dropped_filtered", self.dropped_filtered),
            ("dropped_queue_off", self.dropped_queue_off),
            ("dropped_no_descriptor", self.dropped_no_descriptor),
            ("dropped_buffer_full", self.dropped_buffer_full),
            ("discarded_no_link", self.discarded_no_link),
        ];
        pairs
            .iter()
            .try_for_each(|(name, value)| writeln!(f, "{name} {value}"))
    }
}

impl Card82576 {
    /// Reads a statistics register, which clears it. Of a pair, reading the high half clears both.
    pub(super) fn read_statistic(&mut self, offset: u32) -> u32 {
        const PAIRS: [u32; 4] = [regs::GORCL, regs::GOTCL, regs::TORL, regs::TOTL];
        let value = self.word(offset);
        if PAIRS.contains(&offset) {
            return value;
        }
        self.set_word(offset, 0);
        if PAIRS.contains(&(offset - 4)) {
            self.set_word(offset - 4, 0);
        }
        value
    }

    pub(super) fn count(&mut self, offset: u32, by: u32) {
        self.set_word(offset, self.word(offset).saturating_add(by));
    }

    fn count_pair(&mut self, low: u32, by: u64) {
        let value = u64::from(self.word(low)) | u64::from(self.word(low + 4)) << 32;
        let value = value.wrapping_add(by);
        self.set_word(low, (value & 0xFFFF_FFFF) as u32);
        self.set_word(low + 4, (value >> 32) as u32);
    }

    pub(super) fn count_received(&mut self, frame: &[u8]) {
        let len = frame.len() as u64 + u64::from(FCS_LEN);
        for offset in [regs::GPRC, regs::TPR, regs::PRC64 + 4 * size_bucket(len)] {
            self.count(offset, 1);
        }
        match frame {
            [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, ..] => self.count(regs::BPRC, 1),
            [first, ..] if first & 1 == 1 => self.count(regs::MPRC, 1),
            _ => {}
        }
        self.count_pair(regs::GORCL, len);
        self.count_pair(regs::TORL, len);
    }

    pub(super) fn count_sent(&mut self, frame: &[u8]) {
        let len = frame.len() as u64 + u64::from(FCS_LEN);
        for offset in [regs::GPTC, regs::TPT, regs::PTC64 + 4 * size_bucket(len)] {
            self.count(offset, 1);
        }
        self.count_pair(regs::GOTCL, len);
        self.count_pair(regs::TOTL, len);
    }
}

/// 64; 65 to 127; 128 to 255; 256 to 511; 512 to 1023; 1024 and more.
fn size_bucket(len: u64) -> u32 {
    [64, 127, 255, 511, 1023]
        .iter()
        .map(|last| u32::from(len > *last))
        .sum()
}
