//! Guest receive: the guest's buffers are posted to the card, and come back with a frame in them.
//!
//! ```text
//! virtq.pop ──check room──▶ iova(buffer) + header ──post──▶ card writes ──harvest──▶ header ──▶ virtq.give
//! ```
//!
//! A NIC descriptor carries no length: a buffer is posted in place only if its room is at least what the card
//! could ever write. A shorter one, or one that is not contiguous for the card, gets a private slot and keeps its
//! turn; a frame that does not fit it is dropped and its chain is given back empty, never skipped. The header is
//! written by the CPU when the frame is there; the card has not touched those bytes.
//!
//! Read with: virtio 1.2 §5.1.6.3, §5.1.6.4; TRAPS 1, 3, 4, 43.

use std::collections::VecDeque;

use vfio_glue::address::{GuestAddress, Iova};
use vfio_glue::map::Leaving;
use vfio_glue::memory::{Hit, HostSlice, Table};

use super::bounce::{SLOT_BYTES, Slot, Slots, Taking};
use super::guest::GuestEnd;
use super::in_flight::InFlight;
use super::stats::{Bounce, Drop};
use super::tx::is_memory;
use super::{LaneSetup, Progress, Way};
use crate::net_header::{self, LEGACY_LEN, MODERN_LEN};
use crate::nic::{Berth, NicError, RxRing, Transfer, Verdict};
use crate::virtq::{Buffer, Chain, ChainError, Direction, Short, VirtqError};

/// Frames passed on in one pass.
const BURST: u16 = 32;
/// How many buffers of one chain are looked at when memory changes. The frame of a driver lies in a handful.
const MOST_PIECES: usize = 32;

/// A receive lane over one of a card's receive queues.
#[derive(Debug)]
pub struct RxLane<R: RxRing> {
    guest: GuestEnd,
    ring: R,
    berth: Berth<R>,
    chain: Chain,
    /// Chains with the card, oldest first, in the order of its ring.
    posted: InFlight<Posted>,
    /// What `posted` calls odd, in the same order.
    odd: VecDeque<Odd>,
    slots: Slots,
    /// Lists of buffers for reuse, so that odd chains cost no allocation either.
    spare_lists: Vec<Vec<Buffer>>,
}

/// A chain with the card.
#[derive(Clone, Copy, Debug)]
struct Posted {
    head: u16,
    /// Where the card writes: in the guest's memory, or in a slot of ours.
    iova: Iova,
    /// Where the header goes, in one piece. [`Posted::ODD`], which is in no guest's memory, if it is not as simple as that:
    /// `RxLane::odd` has the rest.
    header: GuestAddress,
}

/// A chain with the card that is not the usual one.
#[derive(Debug)]
enum Odd {
    /// The frame lands in place, but the header is spread over these buffers.
    Header { buffers: Vec<Buffer> },
    /// The frame lands in a slot of ours and is copied into these buffers.
    Bounced {
        slot: Slot,
        buffers: Vec<Buffer>,
        why: Bounce,
    },
}

/// Where the card may put a frame.
enum Target {
    InPlace {
        iova: Iova,
        header: Option<GuestAddress>,
    },
    Slot {
        why: Bounce,
    },
}

impl<R: RxRing> RxLane<R> {
    /// Starts the card's queue and joins it to the guest's. The ring goes back to `berth` at the end.
    ///
    /// # Errors
    ///
    /// [`NicError`] if the queue did not start; the ring is back in its berth then.
    pub fn start(setup: LaneSetup, mut ring: R, berth: Berth<R>) -> Result<Self, NicError> {
        if let Err(error) = ring.start() {
            berth.put(ring);
            return Err(error);
        }
        let size = setup.virtq.size();
        let slots = u16::try_from(ring.room()).unwrap_or(u16::MAX).min(size);
        let mut lane = Self {
            slots: Slots::new(&setup.name, slots),
            guest: GuestEnd::new(setup),
            ring,
            berth,
            chain: Chain::with_room_for(size),
            posted: InFlight::with_room_for(size, Posted::odd(0, Iova::new(0))),
            odd: VecDeque::with_capacity(size.into()),
            spare_lists: Vec::new(),
        };
        // A wake-up of whoever had the queue before may be lost.
        lane.guest.publish();
        Ok(lane)
    }

    /// Posts the guest's buffers while the card has room, up to two bursts. Returns how many.
    fn refill(&mut self) -> Result<usize, VirtqError> {
        let room = u16::try_from(self.ring.room()).unwrap_or(u16::MAX);
        let most = room.min(2 * BURST);
        if most == 0 {
            return Ok(0);
        }
        let waiting = most.min(self.guest.virtq.waiting()?);
        let mut posted = 0;
        let mut turned = false;
        loop {
            let usual = match self.guest.header_len {
                MODERN_LEN => self.post_usual::<MODERN_LEN>(waiting - posted),
                LEGACY_LEN => self.post_usual::<LEGACY_LEN>(waiting - posted),
                _ => 0,
            };
            posted += usual;
            if posted == waiting {
                return Ok(posted.into());
            }
            // Once for each chain: the guest may be writing it all the while.
            turned = (usual > 0 || !turned) && self.guest.turn_to_next(&self.chain, Direction::Writable);
            if turned {
                continue;
            }
            if !self.post_odd()? {
                return Ok(posted.into());
            }
            posted += 1;
        }
    }

    /// Posts the usual chains up to the next one that is not, at most `most`; the ring has room for them. It is usual to
    /// have the header and room for a frame in one buffer or in one each, all of it where the last one was. Returns how
    /// many.
    #[inline(always)]
    fn post_usual<const HEADER: u32>(&mut self, most: u16) -> u16 {
        let need = self.ring.buffer_bytes();
        let Self {
            guest,
            ring,
            posted,
            chain,
            ..
        } = self;
        let GuestEnd {
            virtq, table, hint, ..
        } = guest;
        let tables = chain.tables(table);
        let Some(hit) = table.hit(hint) else { return 0 };
        let mut count = 0;
        // No call in here: what the loop goes by stays in registers.
        while count < most {
            let Some(short) = virtq.short(count, tables.as_ref(), Direction::Writable) else {
                break;
            };
            let Some(iova) = place_in::<HEADER>(&short, &hit, need) else {
                break;
            };
            ring.post(iova);
            let (head, header) = (short.head, short.first.addr);
            posted.put(count.into(), Posted { head, iova, header });
            count += 1;
        }
        virtq.take(count);
        posted.add(count.into());
        count
    }

    /// Posts the next chain, whatever it is. Says whether it did: one that has to wait stays in the virtqueue.
    #[cold]
    fn post_odd(&mut self) -> Result<bool, VirtqError> {
        let Some(head) = self.guest.pop(&mut self.chain)? else {
            return Ok(false);
        };
        let target = match self.aim() {
            Ok(target) => target,
            Err(error) => return self.guest.put_back_or_break(head, error).map(|()| false),
        };
        let Some(posted) = self.prepare(head, target) else {
            // No slot: the chain keeps its turn. One is coming, or `poll` finds that none ever will.
            self.guest.virtq.untake();
            return Ok(false);
        };
        self.ring.post(posted.iova);
        self.posted.push(posted);
        Ok(true)
    }

    /// Decides where the frame of the current chain may land. Every buffer that a frame may reach is checked to be guest
    /// memory, all of it; buffers behind those are never touched.
    fn aim(&mut self) -> Result<Target, ChainError> {
        if !self.chain.readable().is_empty() {
            return Err(ChainError::Direction);
        }
        let header_len = self.guest.header_len;
        let whole = header_len + self.ring.buffer_bytes();
        // Header and frame in one buffer, in one piece, whatever comes after.
        if let [first, ..] = self.chain.writable()
            && first.len >= whole
            && let Some(piece) = self
                .guest
                .table
                .lookup(&mut self.guest.hint, first.addr, first.len)
            && piece.len() == first.len as usize
        {
            let iova = piece.iova.offset(u64::from(header_len));
            return Ok(Target::InPlace {
                iova,
                header: Some(first.addr),
            });
        }
        self.aim_odd(header_len, whole - header_len)
    }

    /// As [`aim`](Self::aim), for chains of several buffers or pieces. The work is bounded by the bytes of the longest
    /// frame.
    fn aim_odd(&mut self, header_len: u32, need: u32) -> Result<Target, ChainError> {
        let table = &self.guest.table;
        let mut header_left = header_len;
        let mut header = None;
        let mut frame_left = need;
        let mut frame_at = None;
        for buffer in self.chain.writable() {
            let in_header = header_left.min(buffer.len);
            let in_frame = frame_left.min(buffer.len - in_header);
            if !is_memory(table, &mut self.guest.hint, buffer.addr, buffer.len) {
                let (start, len) = (buffer.addr.0, buffer.len);
                return Err(ChainError::Memory { start, len });
            }
            if in_header == header_len {
                let piece = table.lookup(&mut self.guest.hint, buffer.addr, header_len);
                header = piece
                    .filter(|piece| piece.len() == header_len as usize)
                    .map(|_| buffer.addr);
            }
            if frame_at.is_none() && in_frame > 0 {
                let start = GuestAddress(buffer.addr.0.wrapping_add(u64::from(in_header)));
                let piece = table.lookup(&mut self.guest.hint, start, in_frame);
                frame_at = Some(
                    piece
                        .filter(|piece| piece.len() == need as usize)
                        .map(|piece| piece.iova),
                );
            }
            header_left -= in_header;
            frame_left -= in_frame;
            if header_left + frame_left == 0 {
                break;
            }
        }
        if header_left > 0 {
            let len = u64::from(header_len - header_left);
            return Err(ChainError::NoHeader {
                len,
                header: header_len,
            });
        }
        Ok(match frame_at {
            Some(Some(iova)) => Target::InPlace { iova, header },
            _ if frame_left > 0 => Target::Slot {
                why: Bounce::ShortBuffer,
            },
            _ => Target::Slot {
                why: Bounce::SplitBuffer,
            },
        })
    }

    /// What is remembered of the chain at `head`; what of it is odd is noted already.
    fn prepare(&mut self, head: u16, target: Target) -> Option<Posted> {
        let (iova, odd) = match target {
            Target::InPlace {
                iova,
                header: Some(header),
            } => {
                return Some(Posted { head, iova, header });
            }
            Target::InPlace { iova, header: None } => {
                let buffers = self.list_of_chain();
                (iova, Odd::Header { buffers })
            }
            Target::Slot { why } => {
                let slot = match self.slots.take(&self.guest.map) {
                    Taking::Slot(slot) => slot,
                    Taking::NotYet | Taking::Never => return None,
                };
                let buffers = self.list_of_chain();
                (slot.iova, Odd::Bounced { slot, buffers, why })
            }
        };
        self.odd.push_back(odd);
        Some(Posted::odd(head, iova))
    }

    /// The current chain's buffers, as far as a frame and its header can reach.
    fn list_of_chain(&mut self) -> Vec<Buffer> {
        let mut list = self.spare_lists.pop().unwrap_or_default();
        list.clear();
        let mut rest = self.guest.header_len + self.ring.buffer_bytes();
        for buffer in self.chain.writable() {
            if rest == 0 {
                break;
            }
            let len = buffer.len.min(rest);
            list.push(Buffer {
                addr: buffer.addr,
                len,
            });
            rest -= len;
        }
        list
    }

    /// Passes on what the card has received, up to `most` frames. Returns how many chains were given back.
    fn deliver(&mut self, most: u16) -> usize {
        let room = self.ring.buffer_bytes();
        let mut given = 0;
        loop {
            given += match self.guest.header_len {
                MODERN_LEN => self.deliver_usual::<MODERN_LEN>(most - given, room),
                LEGACY_LEN => self.deliver_usual::<LEGACY_LEN>(most - given, room),
                _ => 0,
            };
            if given == most {
                return given.into();
            }
            let Some(received) = self.ring.harvest() else {
                return given.into();
            };
            let Some(posted) = self.posted.oldest() else {
                return given.into();
            };
            self.posted.forget(1);
            // What the card reports is not believed either: more than it was given room for is no frame.
            let good = received.verdict == Verdict::Good && received.len <= room;
            let used = self.finish_odd(posted, received.len, good);
            self.guest.virtq.give(posted.head, used);
            given += 1;
        }
    }

    /// Passes on the usual frames up to the next one that is not, at most `most`: sound ones in usual chains, the header
    /// where the last one was. Returns how many.
    #[inline(always)]
    fn deliver_usual<const HEADER: u32>(&mut self, most: u16, room: u32) -> u16 {
        let Self {
            guest, ring, posted, ..
        } = self;
        let GuestEnd {
            virtq, table, hint, ..
        } = guest;
        let Some(headers) = table.hit(hint).and_then(|hit| hit.of_len(HEADER)) else {
            return 0;
        };
        let most = posted.len().min(most.into());
        let (mut given, mut bytes) = (0_u16, 0);
        // No call in here: what the loop goes by stays in registers.
        while u32::from(given) < most {
            let Some(oldest) = posted.get(given.into()) else {
                break;
            };
            // An odd one's header is nowhere.
            let Some(header) = headers.host(oldest.header) else {
                break;
            };
            let Some(received) = ring.harvest_usual(room) else {
                break;
            };
            net_header::write_received(header);
            virtq.fill(given, oldest.head, HEADER + received.len);
            bytes += u64::from(received.len);
            given += 1;
        }
        if given > 0 {
            posted.forget(given.into());
            virtq.gave(given);
            self.ring.note_usual(given.into(), bytes);
            self.count_in_place(given.into(), bytes);
        }
        given
    }

    fn write_header(&mut self, header: GuestAddress, header_len: u32) -> bool {
        // In one piece when it was posted; a table that no longer has it in one piece took the buffer back first.
        let piece = self
            .guest
            .table
            .lookup_whole(&mut self.guest.hint, header, header_len);
        let Some(piece) = piece else { return false };
        net_header::write_received(piece.host);
        true
    }

    /// Ends the oldest chain, `posted`, a frame of `len` bytes in it, where it was not as simple as that. Returns the used
    /// length: 0 for a frame that is lost.
    #[cold]
    fn finish_odd(&mut self, posted: Posted, len: u32, good: bool) -> u32 {
        let header_len = self.guest.header_len;
        if !good {
            self.guest.stats.drop_frame(Drop::Damaged);
        }
        let odd = if posted.is_odd() {
            self.odd.pop_front()
        } else {
            None
        };
        match odd {
            None if !good => 0,
            None if self.write_header(posted.header, header_len) => {
                self.count_in_place(1, u64::from(len));
                header_len + len
            }
            None => {
                self.guest.stats.drop_frame(Drop::NoRoom);
                0
            }
            Some(Odd::Header { buffers }) => {
                if good {
                    self.scatter(&buffers, 0, net_header::received(header_len));
                    self.count_in_place(1, u64::from(len));
                }
                self.spare_lists.push(buffers);
                if good { header_len + len } else { 0 }
            }
            Some(Odd::Bounced { slot, buffers, why }) => {
                let used = if good {
                    self.copy_out(&slot, &buffers, len, why)
                } else {
                    0
                };
                self.slots.put_back(&slot);
                self.spare_lists.push(buffers);
                used
            }
        }
    }

    /// The odd chains with the card, and where it writes for each.
    fn odd_chains(&self) -> impl Iterator<Item = (Iova, &Odd)> {
        let odd = self.posted.iter().filter(|posted| posted.is_odd());
        odd.map(|posted| posted.iova).zip(&self.odd)
    }

    /// Counts frames that landed where the guest has them.
    fn count_in_place(&self, frames: u64, bytes: u64) {
        let stats = &self.guest.stats;
        stats.moved_many(frames, bytes);
        match self.ring.transfer() {
            Transfer::Dma => stats.zero_copy_frames.add(frames),
            Transfer::Copy => stats.bounce_many(Bounce::CopyDevice, frames, bytes),
        }
    }

    /// Copies a frame from its slot into the guest's buffers, header first. Returns the used length.
    fn copy_out(&mut self, slot: &Slot, buffers: &[Buffer], len: u32, why: Bounce) -> u32 {
        let header_len = self.guest.header_len;
        let room: u64 = buffers.iter().map(|buffer| u64::from(buffer.len)).sum();
        if room < u64::from(header_len) + u64::from(len) {
            self.guest.stats.drop_frame(Drop::NoRoom);
            return 0;
        }
        // Our own copy: what the card wrote is moved once, from a place the guest cannot reach.
        let mut frame = [0; SLOT_BYTES as usize];
        let Some(bytes) = self
            .slots
            .bytes(slot)
            .and_then(|bytes| bytes.sub(0, len as usize))
        else {
            return 0;
        };
        bytes.copy_to(&mut frame);
        self.scatter(buffers, 0, net_header::received(header_len));
        self.scatter(buffers, header_len, frame.get(..len as usize).unwrap_or_default());
        self.guest.stats.moved(len);
        self.guest.stats.bounce(why, len);
        header_len + len
    }

    /// Copies `bytes` into the buffers, starting `skip` bytes in.
    fn scatter(&self, buffers: &[Buffer], skip: u32, bytes: &[u8]) {
        let mut skip = skip;
        let mut left = bytes;
        for buffer in buffers {
            let skipped = skip.min(buffer.len);
            skip -= skipped;
            let mut at = buffer.addr.0.wrapping_add(u64::from(skipped));
            let mut rest = buffer.len - skipped;
            while rest > 0 && !left.is_empty() {
                let want = rest.min(u32::try_from(left.len()).unwrap_or(u32::MAX));
                let Some(piece) = self.guest.table.lookup_once(GuestAddress(at), want) else {
                    return;
                };
                let host: HostSlice<'_> = piece.host;
                let copied = host.copy_from(left);
                left = left.get(copied..).unwrap_or_default();
                let copied = u32::try_from(copied).unwrap_or(rest);
                at = at.wrapping_add(u64::from(copied));
                rest -= copied;
            }
        }
    }
}

/// Where the card may put `need` bytes of a frame in a usual chain, if all that the chain names is guest memory at `hit`.
#[inline(always)]
fn place_in<const HEADER: u32>(short: &Short, hit: &Hit<'_>, need: u32) -> Option<Iova> {
    let Short { first, second, .. } = short;
    let Some(frame) = second else {
        if first.len < HEADER + need {
            return None;
        }
        let piece = hit.whole(first.addr, first.len)?;
        return Some(piece.iova.offset(HEADER.into()));
    };
    if first.len != HEADER || frame.len < need {
        return None;
    }
    hit.whole(first.addr, HEADER)?;
    Some(hit.whole(frame.addr, frame.len)?.iova)
}

impl Posted {
    /// A region ends below 2^64, so its last byte is below this.
    const ODD: GuestAddress = GuestAddress(u64::MAX);

    /// One that `RxLane::odd` has the rest of.
    fn odd(head: u16, iova: Iova) -> Self {
        let header = Self::ODD;
        Self { head, iova, header }
    }

    fn is_odd(&self) -> bool {
        self.header == Self::ODD
    }
}

impl<R: RxRing> Way for RxLane<R> {
    type Ring = R;

    fn guest(&self) -> &GuestEnd {
        &self.guest
    }

    fn guest_mut(&mut self) -> &mut GuestEnd {
        &mut self.guest
    }

    fn ring(&self) -> &R {
        &self.ring
    }

    fn ring_mut(&mut self) -> &mut R {
        &mut self.ring
    }

    fn pass(&mut self) -> Result<Progress, VirtqError> {
        let given = self.deliver(BURST);
        let posted = self.refill();
        self.ring.flush();
        if given > 0 {
            self.guest.publish();
        }
        if given + posted? > 0 {
            return Ok(Progress::Moved);
        }
        match self.slots.failure() {
            Some(error) => {
                self.guest.retire(&error);
                Ok(Progress::Retired)
            }
            None => Ok(Progress::Idle),
        }
    }

    fn awaits_card(&self) -> bool {
        true
    }

    fn last_look(&mut self) -> Result<bool, VirtqError> {
        // Kicks matter only while the card has room for more buffers (TRAPS 44).
        let more = self.ring.room() > 0 && self.guest.virtq.ask_for_kicks()?;
        let given = self.deliver(BURST);
        if given > 0 {
            self.guest.publish();
        }
        // Memory that is awaited comes with a command.
        Ok(given > 0 || self.slots.is_awaited() || (more && !self.guest.waits_for_memory))
    }

    fn is_kept_by(&self, next: &Table, leaving: &Leaving) -> bool {
        let now = &self.guest.table;
        let keeps = |start, len| now.keeps(next, leaving, start, len);
        // More pieces than any driver makes are not gone through while others wait: that lane is stopped instead.
        let all_kept = |buffers: &[Buffer]| {
            buffers.len() <= MOST_PIECES && buffers.iter().all(|buffer| keeps(buffer.addr, buffer.len))
        };
        let usual_kept = self.posted.iter().all(|posted| {
            posted.is_odd() || !leaving.has(posted.iova) && keeps(posted.header, self.guest.header_len)
        });
        usual_kept
            && self.odd_chains().all(|(iova, odd)| match odd {
                Odd::Header { buffers } => !leaving.has(iova) && all_kept(buffers),
                Odd::Bounced { buffers, .. } => all_kept(buffers),
            })
    }

    fn held(&self) -> Vec<Iova> {
        let usual = self.posted.iter().filter(|posted| !posted.is_odd());
        let odd = self
            .odd_chains()
            .filter(|(_, odd)| matches!(odd, Odd::Header { .. }));
        usual
            .map(|posted| posted.iova)
            .chain(odd.map(|(iova, _)| iova))
            .collect()
    }

    fn follow_link(&mut self, _up: bool) -> Result<(), NicError> {
        // Buffers stay with the card: without a link nothing arrives.
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), NicError> {
        let stopped = self.ring.stop();
        self.deliver(u16::MAX);
        stopped?;
        self.ring.clear();
        Ok(())
    }

    fn part(self: Box<Self>) -> (GuestEnd, Slots) {
        self.berth.put(self.ring);
        (self.guest, self.slots)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use std::sync::Arc;

    use super::*;
    use crate::lane::{Adoption, Lane, MissingMemory};
    use crate::nic::Received;
    use crate::testing::{BASE, BUFFERS, FakeRing, Guest, SECOND, WRITE, Wire, receive};

    const BUFFER: u64 = BASE + BUFFERS;
    const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

    struct Bench {
        guest: Guest,
        lane: Box<RxLane<FakeRing>>,
        wire: Arc<Mutex<Wire>>,
        stats: Arc<crate::lane::LaneStats>,
    }

    impl Bench {
        fn of_size(size: u16) -> Self {
            let guest = Guest::with_queue(size);
            let (ring, wire) = FakeRing::new();
            let (again, _) = FakeRing::new();
            let berth = Berth::with(again);
            berth.take();
            let setup = guest.lane_setup();
            let stats = Arc::clone(&setup.stats);
            let lane = Box::new(RxLane::start(setup, ring, berth).unwrap());
            Self {
                guest,
                lane,
                wire,
                stats,
            }
        }

        fn offer(&mut self, head: u16, buffers: &[(u64, u32)]) {
            self.guest.offer_chain(head, buffers, WRITE);
        }

        fn posted(&self) -> Vec<Iova> {
            self.wire.lock().unwrap().posted.iter().copied().collect()
        }

        /// Polls until the card has `buffers` buffers: slots are mapped by another thread.
        fn poll_until_posted(&mut self, buffers: usize) {
            while self.posted().len() < buffers {
                assert_ne!(self.lane.poll(), Progress::Retired);
                std::thread::yield_now();
            }
        }

        fn receive(&self, frame: &[u8]) {
            receive(&self.guest, &self.wire, frame);
        }
    }

    fn frame(len: u32) -> Vec<u8> {
        (0..len).map(|byte| u8::try_from(byte % 251).unwrap()).collect()
    }

    #[test]
    fn trap_1_the_card_writes_behind_the_header_and_we_write_the_header() {
        let mut bench = Bench::of_size(8);
        bench.guest.write(BUFFER, &[0xff; 12]);
        bench.offer(2, &[(BUFFER, 1530)]);
        bench.lane.poll();
        assert_eq!(bench.posted(), vec![bench.guest.iova(BUFFER).offset(12)]);
        bench.receive(&frame(100));
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(2, 112)], "trap 43: the header counts");
        assert_eq!(bench.guest.read(BUFFER, 112), [&HEADER[..], &frame(100)].concat());
        assert_eq!(
            (bench.stats.zero_copy_frames.get(), bench.stats.copied_bytes.get()),
            (1, 0)
        );
        assert!(!bench.guest.has_bounce_memory());
    }

    #[test]
    fn header_and_frame_may_have_buffers_of_their_own() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, &[(BUFFER, 12), (BUFFER + 0x1000, 2000)]);
        bench.offer(
            4,
            &[
                (BUFFER + 0x4000, 7),
                (BUFFER + 0x5000, 5),
                (BUFFER + 0x6000, 1518),
            ],
        );
        bench.lane.poll();
        assert_eq!(
            bench.posted(),
            vec![
                bench.guest.iova(BUFFER + 0x1000),
                bench.guest.iova(BUFFER + 0x6000)
            ]
        );
        bench.receive(&frame(60));
        bench.receive(&frame(61));
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 72), (4, 73)]);
        assert_eq!(bench.guest.read(BUFFER, 12), HEADER);
        assert_eq!(bench.guest.read(BUFFER + 0x4000, 7), HEADER[..7]);
        assert_eq!(bench.guest.read(BUFFER + 0x5000, 5), HEADER[7..]);
        assert_eq!(bench.guest.read(BUFFER + 0x6000, 61), frame(61));
        assert!(!bench.guest.has_bounce_memory());
    }

    #[test]
    fn trap_4_a_short_buffer_gets_a_slot_and_keeps_its_turn() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, &[(BUFFER, 1529)]);
        bench.offer(1, &[(BUFFER + 0x1000, 1530)]);
        bench.poll_until_posted(2);
        let first = bench.posted()[0];
        assert_ne!(
            first,
            bench.guest.iova(BUFFER).offset(12),
            "one byte too short for the card"
        );
        assert!(bench.guest.has_bounce_memory());
        bench.receive(&frame(200));
        bench.receive(&frame(201));
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 212), (1, 213)]);
        assert_eq!(bench.guest.read(BUFFER, 212), [&HEADER[..], &frame(200)].concat());
        assert_eq!(bench.stats.bounced[Bounce::ShortBuffer as usize].get(), 1);
        assert_eq!(bench.stats.copied_bytes.get(), 200);
    }

    #[test]
    fn a_frame_too_long_for_its_buffer_is_lost_and_its_chain_comes_back_empty() {
        let mut bench = Bench::of_size(8);
        bench.guest.write(BUFFER, &[0xaa; 300]);
        bench.offer(0, &[(BUFFER, 112)]);
        bench.poll_until_posted(1);
        bench.receive(&frame(101));
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 0)]);
        assert_eq!(
            bench.guest.read(BUFFER, 300),
            vec![0xaa; 300],
            "and nothing was written"
        );
        assert_eq!(bench.stats.dropped[Drop::NoRoom as usize].get(), 1);
    }

    #[test]
    fn a_buffer_over_two_regions_gets_a_slot() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, &[(SECOND - 100, 1600)]);
        bench.poll_until_posted(1);
        bench.receive(&frame(500));
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 512)]);
        assert_eq!(bench.guest.read(SECOND - 88, 88), frame(500)[..88]);
        assert_eq!(bench.guest.read(SECOND, 412), frame(500)[88..]);
        assert_eq!(bench.stats.bounced[Bounce::SplitBuffer as usize].get(), 1);
    }

    #[test]
    fn buffers_in_turn_from_two_places_and_odd_ones_between_keep_their_turns() {
        let mut bench = Bench::of_size(16);
        let chains: [&[(u64, u32)]; 5] = [
            &[(BUFFER, 1530)],
            &[(SECOND + 0x1000, 1530)],
            &[(BUFFER + 0x1000, 12), (BUFFER + 0x2000, 1518)],
            // The header over two regions.
            &[(SECOND - 5, 1530)],
            &[(BUFFER + 0x3000, 1530)],
        ];
        for (head, chain) in (0..).zip(chains) {
            bench.offer(2 * head, chain);
        }
        bench.lane.poll();
        let expected = [
            BUFFER + 12,
            SECOND + 0x100c,
            BUFFER + 0x2000,
            SECOND + 7,
            BUFFER + 0x300c,
        ];
        assert_eq!(bench.posted(), expected.map(|at| bench.guest.iova(at)));
        for len in 60..65 {
            bench.receive(&frame(len));
        }
        bench.lane.poll();
        let expected = [(0, 72), (2, 73), (4, 74), (6, 75), (8, 76)];
        assert_eq!(bench.guest.used(), expected);
        for header in [BUFFER, SECOND + 0x1000, BUFFER + 0x1000, BUFFER + 0x3000] {
            assert_eq!(bench.guest.read(header, 12), HEADER, "{header:#x}");
        }
        assert_eq!(bench.stats.frames.get(), 5);
        assert_eq!(bench.stats.bytes.get(), 60 + 61 + 62 + 63 + 64);
    }

    #[test]
    fn what_the_card_reports_is_not_believed() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, &[(BUFFER, 2000)]);
        bench.offer(1, &[(BUFFER + 0x1000, 2000)]);
        bench.lane.poll();
        let mut wire = bench.wire.lock().unwrap();
        wire.filled.push_back(Received {
            len: 65535,
            verdict: Verdict::Good,
        });
        wire.filled.push_back(Received {
            len: 60,
            verdict: Verdict::Bad,
        });
        drop(wire);
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 0), (1, 0)]);
        assert_eq!(bench.stats.dropped[Drop::Damaged as usize].get(), 2);
    }

    #[test]
    fn a_broken_chain_retires_the_lane() {
        for (buffers, flags) in [
            (vec![(BUFFER, 11)], WRITE),
            (vec![(BUFFER, 2000)], 0),
            (vec![(16, 2000)], WRITE),
            (vec![(BUFFER, 1529), (16, 10)], WRITE),
            (vec![(SECOND + crate::testing::LEN - 100, 1530)], WRITE),
        ] {
            let mut bench = Bench::of_size(8);
            bench.guest.offer_chain(4, &buffers, flags);
            assert_eq!(bench.lane.poll(), Progress::Retired, "{buffers:x?}");
            assert!(bench.posted().is_empty());
        }
    }

    #[test]
    fn trap_12_a_stopped_lane_passes_on_what_came_and_rewinds_the_rest() {
        let mut bench = Bench::of_size(8);
        for head in 0..4 {
            bench.offer(head, &[(BUFFER + 0x1000 * u64::from(head), 1530)]);
        }
        bench.lane.poll();
        bench.receive(&frame(60));
        let wire = Arc::clone(&bench.wire);
        let stopped = bench.lane.stop();
        assert_eq!(stopped.first_unused, 1);
        assert_eq!(bench.guest.used(), vec![(0, 72)]);
        assert!(!wire.lock().unwrap().running);
        assert!(wire.lock().unwrap().posted.is_empty());
    }

    #[test]
    fn without_slots_a_buffer_that_needs_one_retires_the_lane() {
        let mut bench = Bench::of_size(8);
        bench.guest.fill_the_map();
        bench.offer(0, &[(BUFFER, 100)]);
        while bench.lane.poll() != Progress::Retired {
            std::thread::yield_now();
        }
        assert_eq!(bench.stats.errors.get(), 1);
    }

    #[test]
    fn a_header_over_two_regions_is_written_in_both() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, &[(SECOND - 5, 1530)]);
        bench.lane.poll();
        assert_eq!(
            bench.posted(),
            vec![bench.guest.iova(SECOND + 7)],
            "the frame itself is in one piece"
        );
        bench.receive(&frame(60));
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 72)]);
        assert_eq!(bench.guest.read(SECOND - 5, 5), HEADER[..5]);
        assert_eq!(bench.guest.read(SECOND, 7), HEADER[5..]);
        assert!(!bench.guest.has_bounce_memory());
    }

    #[test]
    fn trap_17_a_buffer_whose_memory_is_awaited_keeps_its_place() {
        let mut bench = Bench::of_size(8);
        bench.lane.set_missing_memory(MissingMemory::IsAwaited);
        bench.offer(0, &[(BUFFER, 1530)]);
        bench.offer(4, &[(16, 2000)]);
        assert_eq!(bench.lane.poll(), Progress::Moved);
        assert_eq!(bench.lane.poll(), Progress::Idle);
        assert_eq!(bench.posted().len(), 1);
        bench.lane.set_missing_memory(MissingMemory::IsBroken);
        assert_eq!(bench.lane.poll(), Progress::Retired);
    }

    #[test]
    fn trap_16_a_table_without_memory_that_the_card_writes_to_is_not_adopted() {
        type Buffers = &'static [(u64, u32)];
        let cases: [(&str, Buffers, Adoption); 6] = [
            ("all of it stays", &[(BUFFER, 1530)], Adoption::Adopted),
            ("all of it goes", &[(SECOND + 64, 1530)], Adoption::InUse),
            (
                "the frame goes, not the header",
                &[(BUFFER, 12), (SECOND + 64, 1518)],
                Adoption::InUse,
            ),
            (
                "the header goes, not the frame",
                &[(SECOND + 64, 12), (BUFFER, 1518)],
                Adoption::InUse,
            ),
            (
                "half of the header goes",
                &[(SECOND + 64, 5), (BUFFER, 1530)],
                Adoption::InUse,
            ),
            (
                "copied, a part of it goes",
                &[(SECOND - 100, 1600)],
                Adoption::InUse,
            ),
        ];
        for (what, buffers, expected) in cases {
            let mut bench = Bench::of_size(8);
            bench.offer(0, buffers);
            bench.poll_until_posted(1);
            let change = bench.guest.losing_the_second_region();
            let adopted = bench.lane.adopt(Arc::clone(change.table()), change.leaving());
            assert_eq!(adopted, expected, "{what}");
            bench.receive(&frame(60));
            bench.lane.poll();
            assert_eq!(bench.guest.used(), vec![(0, 72)], "{what}: it goes on either way");
            let adopted = bench.lane.adopt(Arc::clone(change.table()), change.leaving());
            assert_eq!(
                adopted,
                Adoption::Adopted,
                "{what}: the card has nothing any more"
            );
            change.finish().unwrap();
        }
    }

    #[test]
    fn a_table_in_which_the_same_bytes_moved_is_not_adopted_while_the_card_has_them() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, &[(SECOND + 64, 1530)]);
        bench.lane.poll();
        // Half of the region goes; the other half, with the buffer, is mapped anew.
        let mut wanted = bench.guest.table.regions().to_vec();
        for region in &mut wanted {
            if region.guest == GuestAddress(SECOND) {
                region.len /= 2;
            }
        }
        let change = bench.guest.map.change("vm0", &bench.guest.table, wanted).unwrap();
        let adopted = bench.lane.adopt(Arc::clone(change.table()), change.leaving());
        assert_eq!(adopted, Adoption::InUse);
        change.undo();
        bench.receive(&frame(60));
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 72)], "undone, it is where it was");
    }

    #[test]
    fn the_footprint_tells_where_the_cards_buffers_are_and_where_the_lane_has_been() {
        let mut bench = Bench::of_size(8);
        for (head, at) in [(0, BUFFER), (1, SECOND + 64), (2, SECOND + 4096)] {
            bench.offer(head, &[(at, 1530)]);
        }
        bench.lane.poll();
        let seen = bench.lane.footprint();
        let of = |at: u64| {
            *seen
                .iter()
                .find(|place| place.iova == bench.guest.iova(at))
                .unwrap()
        };
        assert_eq!((of(BASE).held, of(SECOND).held), (1, 2));
        assert_eq!(of(SECOND).turns, 1);
        assert!(of(BASE).turns >= 1);
    }

    #[test]
    fn slots_are_used_again() {
        let mut bench = Bench::of_size(4);
        for round in 0..20u16 {
            bench.offer(round % 4, &[(BUFFER, 500)]);
            bench.poll_until_posted(1);
            bench.receive(&frame(60));
            bench.lane.poll();
            assert_eq!(bench.guest.used_idx(), round + 1);
        }
    }
}
