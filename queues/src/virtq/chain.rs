//! One descriptor chain, read once and checked: direct or indirect, readable before writable, no loop.
//!
//! What comes out is our own copy; the guest may rewrite its descriptors right after and changes nothing. Whether
//! the addresses lie in guest memory is checked where they are translated.
//!
//! Read with: virtio 1.2 §2.7.5 and §2.7.5.3; TRAPS 40.

use vfio_glue::address::GuestAddress;
use vfio_glue::memory::{Hit, RawDescriptor, Table, TableHint, VirtqMemory, read_indirect};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: u32 = 16;

/// What is wrong with a chain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// More descriptors than the queue has entries.
    #[error("it has more than {size} descriptors, so it loops")]
    TooLong {
        /// Entries in the queue.
        size: u16,
    },
    /// A link leaves the table.
    #[error("descriptor {next} is linked, but the table has {size}")]
    Next {
        /// The index linked to.
        next: u16,
        /// Entries in that table.
        size: u16,
    },
    /// A readable buffer after a writable one.
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    /// An indirect table inside an indirect table, or with NEXT set.
    #[error("an indirect table is itself indirect, or is not the last descriptor")]
    Indirect,
    /// An indirect table whose length is 0, no multiple of 16, or more than the queue's.
    #[error("an indirect table of {len} bytes")]
    IndirectLen {
        /// Its length in bytes.
        len: u32,
    },
    /// An indirect table that is not in guest memory, or not in one piece of it.
    #[error("the indirect table at {start:#x} ({len} bytes) is not in guest memory")]
    IndirectMemory {
        /// Its guest-physical address.
        start: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A buffer that is not in guest memory.
    #[error("the buffer at {start:#x} ({len} bytes) is not in guest memory")]
    Memory {
        /// Its guest-physical address.
        start: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A transmit chain with buffers for the device to write, or a receive chain with some to read.
    #[error("a buffer is for the wrong direction")]
    Direction,
    /// Too short for the header every frame carries.
    #[error("its {len} bytes do not hold the {header} bytes of the header")]
    NoHeader {
        /// Bytes in the chain.
        len: u64,
        /// Bytes of the header.
        header: u32,
    },
}

/// One buffer of a chain: our copy of what the guest wrote. The address is not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: GuestAddress,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// Who may do what with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads: guest transmit.
    Readable,
    /// The device writes: guest receive.
    Writable,
}

/// The usual chain, small enough for registers: one buffer or two of one direction, direct or by an indirect table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    /// Its head.
    pub head: u16,
    /// Its first buffer.
    pub first: Buffer,
    /// Its second one, if it has two.
    pub second: Option<Buffer>,
}

impl Short {
    /// Reads the chain at `head`, if it is one of these. Each descriptor is read once. Buffers may be empty.
    #[inline(always)]
    pub(super) fn read(
        memory: &VirtqMemory,
        tables: Option<&Hit<'_>>,
        head: u16,
        direction: Direction,
    ) -> Option<Self> {
        let flags = match direction {
            Direction::Readable => 0,
            Direction::Writable => WRITE,
        };
        let mut first = memory.checked_descriptor(head)?;
        let second = if first.flags == flags {
            None
        } else if first.flags == flags | NEXT {
            Some(memory.checked_descriptor(first.next)?)
        } else if first.flags == INDIRECT {
            let len = first.len;
            let entries = tables?.whole(GuestAddress(first.addr), len)?.host;
            first = read_indirect(entries, 0)?;
            if first.flags == flags && len == DESCRIPTOR_BYTES {
                None
            } else if first.flags == flags | NEXT && first.next == 1 && len == 2 * DESCRIPTOR_BYTES {
                Some(read_indirect(entries, 1)?)
            } else {
                return None;
            }
        } else {
            return None;
        };
        let buffer = |descriptor: RawDescriptor| Buffer {
            addr: GuestAddress(descriptor.addr),
            len: descriptor.len,
        };
        let second = match second {
            None => None,
            // Two buffers are too long for a queue of one entry.
            Some(second) if second.flags == flags && memory.size() > 1 => Some(buffer(second)),
            Some(_) => return None,
        };
        Some(Self {
            head,
            first: buffer(first),
            second,
        })
    }
}

/// The buffers of one chain in order. Reused from chain to chain, so reading one allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    /// Readable buffers, then writable ones; empty ones are left out.
    buffers: Vec<Buffer>,
    readable: usize,
    /// Where the last indirect table was.
    hint: TableHint,
}

impl Chain {
    /// A chain with room for the longest one a queue of `size` can hold.
    pub fn with_room_for(size: u16) -> Self {
        Self {
            buffers: Vec::with_capacity(size.into()),
            readable: 0,
            hint: TableHint::default(),
        }
    }

    /// Where the last indirect table was, to read the next ones there ([`Virtq::short`](super::Virtq::short)).
    #[inline]
    pub fn tables<'a>(&self, table: &'a Table) -> Option<Hit<'a>> {
        table.hit(&self.hint)
    }

    /// Buffers the device may only read.
    #[inline]
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    /// Buffers the device may only write.
    #[inline]
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }

    /// Reads the chain at `head`, which the caller has checked to be below the queue's size.
    #[inline]
    pub(super) fn read(&mut self, memory: &VirtqMemory, table: &Table, head: u16) -> Result<(), ChainError> {
        let size = memory.size();
        self.buffers.clear();
        self.readable = 0;
        let mut descriptor = memory.descriptor(head);
        let mut seen: u16 = 1;
        loop {
            if descriptor.flags & INDIRECT != 0 {
                return self.read_indirect(table, descriptor, size - seen + 1);
            }
            self.push(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if seen == size {
                return Err(ChainError::TooLong { size });
            }
            seen += 1;
            let next = descriptor.next;
            if next >= size {
                return Err(ChainError::Next { next, size });
            }
            descriptor = memory.descriptor(next);
        }
    }

    fn read_indirect(&mut self, table: &Table, at: RawDescriptor, most: u16) -> Result<(), ChainError> {
        if at.flags & NEXT != 0 {
            return Err(ChainError::Indirect);
        }
        let count = u16::try_from(at.len / DESCRIPTOR_BYTES)
            .ok()
            .filter(|count| *count > 0);
        let Some(count) = count.filter(|_| at.len.is_multiple_of(DESCRIPTOR_BYTES)) else {
            return Err(ChainError::IndirectLen { len: at.len });
        };
        let outside = ChainError::IndirectMemory {
            start: at.addr,
            len: at.len,
        };
        let start = GuestAddress(at.addr);
        let across_extents;
        let entries = match table.lookup(&mut self.hint, start, at.len) {
            Some(piece) if piece.len() == at.len as usize => piece.host,
            _ => match table.host_range(start, at.len as usize) {
                Some(range) => {
                    across_extents = range;
                    across_extents.whole()
                }
                None => return Err(outside),
            },
        };
        let mut index = 0;
        for _ in 0..most {
            let Some(descriptor) = read_indirect(entries, index) else {
                return Err(outside);
            };
            if descriptor.flags & INDIRECT != 0 {
                return Err(ChainError::Indirect);
            }
            self.push(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
            if index >= count {
                return Err(ChainError::Next {
                    next: index,
                    size: count,
                });
            }
        }
        Err(ChainError::TooLong { size: most })
    }

    #[inline]
    fn push(&mut self, descriptor: RawDescriptor) -> Result<(), ChainError> {
        if descriptor.flags & WRITE == 0 {
            if self.readable != self.buffers.len() {
                return Err(ChainError::Order);
            }
            self.readable += usize::from(descriptor.len != 0);
        }
        // A card has no use for an empty buffer, and some stop at one.
        if descriptor.len != 0 {
            self.buffers.push(Buffer {
                addr: GuestAddress(descriptor.addr),
                len: descriptor.len,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Address, GuestMemoryMmap};

    use super::*;
    use crate::testing::{BASE, BUFFERS, Guest, INDIRECT as IND, NEXT as N, WRITE as W};

    const BUFFER: u64 = BASE + BUFFERS;
    const TABLE: u64 = BASE + 0xc000;

    fn read(guest: &Guest, head: u16) -> Result<Chain, ChainError> {
        let mut chain = Chain::with_room_for(guest.size);
        chain.read(&guest.memory(), &guest.table, head).map(|()| chain)
    }

    fn lens(buffers: &[Buffer]) -> Vec<u32> {
        buffers.iter().map(|buffer| buffer.len).collect()
    }

    #[test]
    fn a_direct_chain_is_read_in_order_without_its_empty_buffers() {
        let guest = Guest::with_queue(4);
        guest.descriptor(3, BUFFER, 10, N, 0);
        guest.descriptor(0, BUFFER, 0, N, 2);
        guest.descriptor(2, BUFFER, 20, W, 9);
        let chain = read(&guest, 3).unwrap();
        assert_eq!(
            (lens(chain.readable()), lens(chain.writable())),
            (vec![10], vec![20])
        );
    }

    #[test]
    fn an_indirect_chain_may_follow_direct_buffers() {
        let guest = Guest::with_queue(4);
        guest.descriptor(0, BUFFER, 10, N, 1);
        guest.descriptor(1, TABLE, 32, IND, 0);
        guest.descriptor_at(TABLE, 0, BUFFER, 11, N, 1);
        guest.descriptor_at(TABLE, 1, BUFFER, 12, 0, 0);
        assert_eq!(lens(read(&guest, 0).unwrap().readable()), vec![10, 11, 12]);
    }

    #[test]
    fn trap_40_hostile_chains_are_refused_each_with_its_reason() {
        let guest = Guest::with_queue(4);
        guest.descriptor(0, BUFFER, 1, N, 1);
        guest.descriptor(1, BUFFER, 1, N, 0);
        assert_eq!(read(&guest, 0).unwrap_err(), ChainError::TooLong { size: 4 });
        guest.descriptor(1, BUFFER, 1, N, 4);
        assert_eq!(
            read(&guest, 0).unwrap_err(),
            ChainError::Next { next: 4, size: 4 }
        );
        guest.descriptor(0, BUFFER, 1, N | W, 1);
        guest.descriptor(1, BUFFER, 1, 0, 0);
        assert_eq!(read(&guest, 0).unwrap_err(), ChainError::Order);

        guest.descriptor(0, TABLE, 16, IND | N, 1);
        assert_eq!(read(&guest, 0).unwrap_err(), ChainError::Indirect);
        guest.descriptor_at(TABLE, 0, TABLE, 16, IND, 0);
        guest.descriptor(0, TABLE, 16, IND, 0);
        assert_eq!(read(&guest, 0).unwrap_err(), ChainError::Indirect);
        for len in [0, 8, 17] {
            guest.descriptor(0, TABLE, len, IND, 0);
            assert_eq!(read(&guest, 0).unwrap_err(), ChainError::IndirectLen { len });
        }
        guest.descriptor(0, 16, 32, IND, 0);
        assert_eq!(
            read(&guest, 0).unwrap_err(),
            ChainError::IndirectMemory { start: 16, len: 32 }
        );
        guest.descriptor(0, TABLE, 16, IND, 0);
        guest.descriptor_at(TABLE, 0, BUFFER, 1, N, 0);
        assert_eq!(read(&guest, 0).unwrap_err(), ChainError::TooLong { size: 4 });
        guest.descriptor_at(TABLE, 0, BUFFER, 1, N, 1);
        assert_eq!(
            read(&guest, 0).unwrap_err(),
            ChainError::Next { next: 1, size: 1 }
        );
    }

    #[test]
    fn an_indirect_table_over_two_regions_is_refused() {
        let guest = Guest::with_queue(4);
        let across = crate::testing::SECOND - 16;
        guest.descriptor(0, across, 32, IND, 0);
        assert_eq!(
            read(&guest, 0).unwrap_err(),
            ChainError::IndirectMemory {
                start: across,
                len: 32
            }
        );
    }

    #[test]
    fn a_chain_of_one_or_two_buffers_of_one_direction_is_short_and_no_other_is() {
        type Build = fn(&Guest);
        let cases: [(&str, Direction, Build, Option<&[u32]>); 8] = [
            (
                "one",
                Direction::Readable,
                |g| g.descriptor(0, BUFFER, 10, 0, 0),
                Some(&[10]),
            ),
            (
                "one to write",
                Direction::Writable,
                |g| g.descriptor(0, BUFFER, 10, W, 0),
                Some(&[10]),
            ),
            (
                "the other direction",
                Direction::Readable,
                |g| g.descriptor(0, BUFFER, 10, W, 0),
                None,
            ),
            (
                "two",
                Direction::Readable,
                |g| {
                    g.descriptor(0, BUFFER, 10, N, 3);
                    g.descriptor(3, BUFFER, 20, 0, 0);
                },
                Some(&[10, 20]),
            ),
            (
                "three",
                Direction::Readable,
                |g| {
                    g.descriptor(0, BUFFER, 10, N, 3);
                    g.descriptor(3, BUFFER, 20, N, 1);
                },
                None,
            ),
            (
                "a link outside",
                Direction::Readable,
                |g| g.descriptor(0, BUFFER, 10, N, 4),
                None,
            ),
            (
                "two by a table",
                Direction::Writable,
                |g| {
                    g.descriptor(0, TABLE, 32, IND, 0);
                    g.descriptor_at(TABLE, 0, BUFFER, 10, N | W, 1);
                    g.descriptor_at(TABLE, 1, BUFFER, 20, W, 0);
                },
                Some(&[10, 20]),
            ),
            (
                "a table that links to itself",
                Direction::Writable,
                |g| {
                    g.descriptor(0, TABLE, 32, IND, 0);
                    g.descriptor_at(TABLE, 0, BUFFER, 10, N | W, 0);
                },
                None,
            ),
        ];
        for (what, direction, build, expected) in cases {
            let guest = Guest::with_queue(4);
            build(&guest);
            let tables = guest.hit(TABLE);
            let short = Short::read(&guest.memory(), Some(&tables), 0, direction);
            let found = short.map(|short| {
                let buffers = [Some(short.first), short.second].into_iter().flatten();
                buffers.map(|buffer| buffer.len).collect::<Vec<u32>>()
            });
            assert_eq!(found.as_deref(), expected, "{what}");
        }
    }

    /// The oracle: `virtio-queue` reads the same descriptors.
    fn oracle(guest: &Guest, head: u16) -> (Vec<u32>, Vec<u32>) {
        let base = vm_memory::GuestAddress(0);
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(base, 0x40_0000)]).unwrap();
        let all = guest.read(BASE, usize::try_from(BUFFERS).unwrap());
        vm_memory::Bytes::write_slice(&memory, &all, vm_memory::GuestAddress(BASE)).unwrap();
        let mut queue = Queue::new(guest.size).unwrap();
        queue.set_size(guest.size);
        queue.set_desc_table_address(Some(low(BASE)), None);
        queue.set_avail_ring_address(Some(low(BASE + 0x8000)), None);
        queue.set_used_ring_address(Some(low(BASE + 0xa000)), None);
        queue.set_ready(true);
        let chain = queue.pop_descriptor_chain(&memory).unwrap();
        assert_eq!(chain.head_index(), head);
        let mut found = (Vec::new(), Vec::new());
        for descriptor in chain {
            let list = if descriptor.is_write_only() {
                &mut found.1
            } else {
                &mut found.0
            };
            if descriptor.len() > 0 {
                assert!(descriptor.addr().raw_value() >= BASE);
                list.push(descriptor.len());
            }
        }
        found
    }

    fn low(address: u64) -> u32 {
        u32::try_from(address).unwrap()
    }

    proptest! {
        #[test]
        fn whatever_we_accept_the_oracle_reads_alike(
            descriptors in prop::collection::vec((0u32..100, 0u16..8, 0u16..10), 8),
            indirect in prop::collection::vec((0u32..100, 0u16..4, 0u16..5), 4),
            head in 0u16..8,
        ) {
            let mut guest = Guest::with_queue(8);
            for (index, (len, flags, next)) in (0..).zip(&descriptors) {
                let (addr, len) = if flags & IND == 0 { (BUFFER, *len) } else { (TABLE, 16 * (len % 6)) };
                guest.descriptor(index, addr, len, *flags, *next);
            }
            for (index, (len, flags, next)) in (0..).zip(&indirect) {
                guest.descriptor_at(TABLE, index, BUFFER, *len, *flags, *next);
            }
            guest.offer(head);
            for direction in [Direction::Readable, Direction::Writable] {
                let tables = guest.hit(TABLE);
                let short = Short::read(&guest.memory(), Some(&tables), head, direction);
                if let Some(short) = short {
                    let buffers = [Some(short.first), short.second].into_iter().flatten();
                    let buffers: Vec<Buffer> = buffers.filter(|buffer| buffer.len > 0).collect();
                    let chain = read(&guest, head).expect("what is short is a chain");
                    let (same, other) = match direction {
                        Direction::Readable => (chain.readable(), chain.writable()),
                        Direction::Writable => (chain.writable(), chain.readable()),
                    };
                    prop_assert_eq!((short.head, buffers.as_slice(), 0), (head, same, other.len()));
                }
            }
            if let Ok(chain) = read(&guest, head) {
                prop_assert_eq!(oracle(&guest, head), (lens(chain.readable()), lens(chain.writable())));
            }
        }
    }
}
