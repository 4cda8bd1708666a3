//! Which bytes of guest memory the device may write, and proof that it wrote no other.

use std::collections::BTreeMap;

use super::memory::GuestMemory;

/// A stretch of guest memory that knows which of its bytes the device may write.
///
/// Everything else must stay as the driver left it: [`check`](Self::check) compares byte by byte with a copy.
#[derive(Debug)]
pub struct Arena {
    memory: GuestMemory,
    gpa: u64,
    expected: Vec<u8>,
    lent: BTreeMap<u64, usize>,
}

/// What unused memory is filled with.
pub const CANARY: u8 = 0xa5;

impl Arena {
    /// Fills `len` bytes at `gpa` with canaries.
    pub fn new(memory: &GuestMemory, gpa: u64, len: usize) -> Self {
        memory.write(gpa, &vec![CANARY; len]);
        Self {
            memory: memory.clone(),
            gpa,
            expected: vec![CANARY; len],
            lent: BTreeMap::new(),
        }
    }

    fn offset(&self, gpa: u64) -> usize {
        usize::try_from(gpa - self.gpa).expect("an offset fits")
    }

    /// Writes as the driver.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let at = self.offset(gpa);
        self.expected[at..at + bytes.len()].copy_from_slice(bytes);
        self.memory.write(gpa, bytes);
    }

    /// Lets the device write `len` bytes at `gpa`.
    pub fn lend(&mut self, gpa: u64, len: usize) {
        self.lent.insert(gpa, len);
    }

    /// Ends a loan: the bytes are the driver's again, as they are now.
    pub fn take_back(&mut self, gpa: u64) -> Vec<u8> {
        let len = self.lent.remove(&gpa).expect("the buffer was lent");
        let bytes = self.memory.read_vec(gpa, len);
        let at = self.offset(gpa);
        self.expected[at..at + len].copy_from_slice(&bytes);
        bytes
    }

    /// Checks that the device wrote only where it may.
    ///
    /// # Panics
    ///
    /// If it wrote elsewhere, with the first address.
    pub fn check(&self) {
        let now = self.memory.read_vec(self.gpa, self.expected.len());
        let end = self.gpa + u64::try_from(now.len()).expect("a length fits");
        let mut from = self.gpa;
        for (gpa, len) in self.lent.iter().map(|(&gpa, &len)| (gpa, len)).chain([(end, 0)]) {
            let (start, stop) = (self.offset(from), self.offset(gpa));
            let differs = (start..stop).find(|&at| now[at] != self.expected[at]);
            if let (false, Some(at)) = (now[start..stop] == self.expected[start..stop], differs) {
                panic!(
                    "the device wrote {:#04x} at {:#x}, outside every lent buffer",
                    now[at],
                    self.gpa + at as u64
                );
            }
            from = gpa + u64::try_from(len).expect("a length fits");
        }
    }
}
