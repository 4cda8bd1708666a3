//! Guest transmit: chains from the guest become descriptors in the NIC's ring.
//!
//! ```text
//! virtq.pop ──translate──▶ segments ──post──▶ ring ──doorbell──▶ card ──reap──▶ virtq.give
//! ```
//!
//! Payload bytes stay in guest memory and are never written. Only frames the card cannot take in place go through
//! a private slot, and say why. Backpressure is a full ring: chains stay in the virtqueue. A chain is given back
//! when the card is done with it (TRAPS 10), in the order it was taken, dropped frames included.
//!
//! Read with: virtio 1.2 §5.1.6.2; the card's chapter on transmit descriptors.

use std::collections::VecDeque;

use vfio_glue::address::{GuestAddress, Iova};
use vfio_glue::map::Leaving;
use vfio_glue::memory::{HitOfLen, HostSlice, Table, TableHint};

use super::bounce::{SLOT_BYTES, Slot, Slots, Taking};
use super::guest::GuestEnd;
use super::in_flight::InFlight;
use super::stats::{Bounce, Drop};
use super::{LaneSetup, Progress, Way};
use crate::net_header::{LEGACY_LEN, MODERN_LEN};
use crate::nic::{Berth, NicError, Segment, Transfer, TxRing};
use crate::virtq::{Buffer, Chain, ChainError, Direction, Short, VirtqError};

/// Frames taken in one pass.
const BURST: u16 = 32;
/// Below this a frame has no Ethernet header.
const RUNT: u32 = 14;
/// Below this a card may refuse a frame, or pad it with bytes of whatever follows (82576 datasheet, §7.2.1).
const PADDED: u32 = 17;
/// What a padded frame is padded to.
const PADDED_TO: u32 = 60;
const SLOTS: u16 = 64;

/// A transmit lane over one of a card's transmit queues.
#[derive(Debug)]
pub struct TxLane<R: TxRing> {
    guest: GuestEnd,
    ring: R,
    berth: Berth<R>,
    chain: Chain,
    segments: Vec<Segment>,
    taken: InFlight<Taken>,
    /// What `taken` calls odd, in the same order.
    odd: VecDeque<Odd>,
    /// Where the segments of odd frames are that the card has in the guest's memory, in the same order.
    held: VecDeque<Iova>,
    slots: Slots,
    max_frame: u32,
    link_up: bool,
}

/// A chain taken and not given back.
#[derive(Clone, Copy, Debug)]
struct Taken {
    head: u16,
    /// Of a usual frame, which is with the card in the guest's memory, in one descriptor: its length in bytes. 0 for an
    /// odd one: `TxLane::odd` has the rest.
    len: u32,
    /// Where a usual frame is.
    iova: Iova,
}

/// A chain that is not the usual one.
#[derive(Debug)]
enum Odd {
    /// With the card, in the guest's memory, in so many segments.
    InPlace { len: u32, segments: usize },
    /// With the card, in a slot of ours.
    InSlot { slot: Slot, len: u32, why: Bounce },
    /// Not with the card: it is given back, as lost, when its turn comes.
    Lost(Drop),
}

/// What a chain turned out to be.
enum Frame {
    /// `self.segments` holds it.
    InPlace { len: u32 },
    /// It must be copied.
    Copy { len: u32, why: Bounce },
    /// It is lost.
    Lost(Drop),
}

impl<R: TxRing> TxLane<R> {
    /// Starts the card's queue and joins it to the guest's. The ring goes back to `berth` at the end.
    ///
    /// # Errors
    ///
    /// [`NicError`] if the queue did not start; the ring is back in its berth then.
    pub fn start(setup: LaneSetup, mut ring: R, berth: Berth<R>) -> Result<Self, NicError> {
        if setup.link_up
            && let Err(error) = ring.start()
        {
            berth.put(ring);
            return Err(error);
        }
        let size = setup.virtq.size();
        let mut lane = Self {
            slots: Slots::new(&setup.name, SLOTS),
            max_frame: setup.max_frame,
            link_up: setup.link_up,
            guest: GuestEnd::new(setup),
            ring,
            berth,
            chain: Chain::with_room_for(size),
            segments: Vec::with_capacity(R::MAX_SEGMENTS),
            taken: InFlight::with_room_for(size, Taken::odd(0)),
            odd: VecDeque::with_capacity(size.into()),
            held: VecDeque::with_capacity(size.into()),
        };
        // A wake-up of whoever had the queue before may be lost.
        lane.guest.publish();
        Ok(lane)
    }

    /// Gives back what the card is done with. Returns how many chains.
    fn complete(&mut self) -> usize {
        let mut given = 0;
        loop {
            given += usize::from(self.complete_usual());
            let Some(oldest) = self.taken.oldest() else { break };
            if oldest.is_usual() || !self.complete_odd() {
                break;
            }
            self.taken.forget(1);
            self.guest.virtq.give(oldest.head, 0);
            given += 1;
        }
        given
    }

    /// Gives back the usual chains that the card is done with, up to the next odd one. Returns how many.
    #[inline(always)]
    fn complete_usual(&mut self) -> u16 {
        let Self {
            guest, ring, taken, ..
        } = self;
        let most = taken.len();
        let (mut given, mut bytes) = (0_u16, 0);
        // No call in here: what the loop goes by stays in registers.
        while u32::from(given) < most {
            let Some(oldest) = taken.get(given.into()) else {
                break;
            };
            if !oldest.is_usual() || !ring.reap_whole() {
                break;
            }
            guest.virtq.fill(given, oldest.head, 0);
            bytes += u64::from(oldest.len);
            given += 1;
        }
        if given > 0 {
            taken.forget(given.into());
            guest.virtq.gave(given);
            self.count_in_place(given.into(), bytes);
        }
        given
    }

    /// Ends the oldest odd chain, if it is lost or the card is done with it. Says whether it did.
    #[cold]
    fn complete_odd(&mut self) -> bool {
        let lost = matches!(self.odd.front(), Some(Odd::Lost(_)));
        if !lost && !self.ring.reap() {
            return false;
        }
        let Some(odd) = self.odd.pop_front() else {
            return false;
        };
        self.count_odd(&odd);
        true
    }

    /// Counts an odd frame that has come to its end, and takes its slot back.
    fn count_odd(&mut self, odd: &Odd) {
        match odd {
            Odd::InPlace { len, segments } => {
                self.held.drain(..(*segments).min(self.held.len()));
                self.count_in_place(1, u64::from(*len));
            }
            Odd::InSlot { slot, len, why } => {
                self.guest.stats.moved(*len);
                self.guest.stats.bounce(*why, *len);
                self.slots.put_back(slot);
            }
            Odd::Lost(why) => self.guest.stats.drop_frame(*why),
        }
    }

    /// Counts frames that were sent from where the guest has them.
    fn count_in_place(&self, frames: u64, bytes: u64) {
        let stats = &self.guest.stats;
        stats.moved_many(frames, bytes);
        match self.ring.transfer() {
            Transfer::Dma => stats.zero_copy_frames.add(frames),
            Transfer::Copy => stats.bounce_many(Bounce::CopyDevice, frames, bytes),
        }
    }

    /// Takes up to a burst of chains and posts them. Returns how many.
    fn take(&mut self) -> Result<usize, VirtqError> {
        let waiting = BURST.min(self.guest.virtq.waiting()?);
        let need = self.room_for_a_frame();
        let mut taken = 0;
        let mut turned = false;
        loop {
            let usual = match self.guest.header_len {
                MODERN_LEN => self.take_usual::<MODERN_LEN>(waiting - taken, need),
                LEGACY_LEN => self.take_usual::<LEGACY_LEN>(waiting - taken, need),
                _ => 0,
            };
            taken += usual;
            // Reserved before it is taken: a chain we pop always has somewhere to go.
            if taken == waiting || self.ring.room() < need {
                return Ok(taken.into());
            }
            // Once for each chain: the guest may be writing it all the while.
            turned = (usual > 0 || !turned) && self.guest.turn_to_next(&self.chain, Direction::Readable);
            if turned {
                continue;
            }
            if !self.take_odd()? {
                return Ok(taken.into());
            }
            taken += 1;
        }
    }

    /// Takes the usual chains up to the next one that is not, at most `most`, each while there are `need` descriptors. It
    /// is usual to have a header and a frame in one buffer or in one each, the frame such that the card can send it as it
    /// is, all of it where the last one was. Returns how many.
    #[inline(always)]
    fn take_usual<const HEADER: u32>(&mut self, most: u16, need: usize) -> u16 {
        let Self {
            guest,
            ring,
            taken,
            chain,
            max_frame,
            ..
        } = self;
        let GuestEnd {
            virtq, table, hint, ..
        } = guest;
        let tables = chain.tables(table);
        let Some(hit) = table.hit(hint).filter(|_| self.link_up) else {
            return 0;
        };
        let Some(span) = max_frame.checked_sub(PADDED) else {
            return 0;
        };
        // Each takes one descriptor, and leaves `need` to the next.
        let room = (ring.room() + 1).saturating_sub(need);
        let most = room.min(most.into());
        // A frame of the largest size fits behind all but the last bytes of a place. Those are for others to look at.
        let Some(frames) = hit.of_len(HEADER + *max_frame) else {
            return 0;
        };
        let mut count = 0_u16;
        // No call in here: what the loop goes by stays in registers.
        while usize::from(count) < most {
            let Some(short) = virtq.short(count, tables.as_ref(), Direction::Readable) else {
                break;
            };
            let Some(segment) = segment_of::<HEADER>(&short, &frames) else {
                break;
            };
            let Segment { iova, len } = segment;
            // One comparison for both bounds: below the lower one it wraps.
            if len.wrapping_sub(PADDED) > span || !ring.post_whole(segment) {
                break;
            }
            let head = short.head;
            taken.put(count.into(), Taken { head, len, iova });
            count += 1;
        }
        virtq.take(count);
        taken.add(count.into());
        count
    }

    /// Takes the next chain, whatever it is. Says whether it did: one that has to wait stays in the virtqueue.
    #[cold]
    fn take_odd(&mut self) -> Result<bool, VirtqError> {
        let Some(head) = self.guest.pop(&mut self.chain)? else {
            return Ok(false);
        };
        let frame = match self.translate() {
            Ok(frame) => frame,
            Err(error) => return self.guest.put_back_or_break(head, error).map(|()| false),
        };
        let odd = match frame {
            Frame::Lost(why) => Odd::Lost(why),
            Frame::InPlace { len } => {
                self.ring.post(&self.segments);
                self.held.extend(self.segments.iter().map(|segment| segment.iova));
                let segments = self.segments.len();
                Odd::InPlace { len, segments }
            }
            Frame::Copy { len, why } => match self.post_copy(len, why) {
                Some(odd) => odd,
                None => {
                    self.guest.virtq.untake();
                    return Ok(false);
                }
            },
        };
        self.odd.push_back(odd);
        self.taken.push(Taken::odd(head));
        Ok(true)
    }

    /// The descriptors that the largest frame in the most pieces needs.
    fn room_for_a_frame(&self) -> usize {
        self.ring.descriptors_for(R::MAX_SEGMENTS, self.max_frame)
    }

    /// Turns the chain into segments, all of them checked to be guest memory.
    ///
    /// The work is bounded by the bytes of the longest frame: the buffer that goes beyond is the last one looked at.
    fn translate(&mut self) -> Result<Frame, ChainError> {
        self.segments.clear();
        if !self.chain.writable().is_empty() {
            return Err(ChainError::Direction);
        }
        let mut skip = self.guest.header_len;
        let mut len: u32 = 0;
        let mut fits = true;
        for buffer in self.chain.readable() {
            let skipped = skip.min(buffer.len);
            skip -= skipped;
            // Header bytes are not sent, but they must be guest memory: else the chain is broken, not the frame.
            if skipped > 0 && !is_memory(&self.guest.table, &mut self.guest.hint, buffer.addr, skipped) {
                return Err(outside(buffer));
            }
            let mut rest = buffer.len - skipped;
            let mut at = buffer.addr.0.wrapping_add(u64::from(skipped));
            len = len.saturating_add(rest);
            if len > self.max_frame {
                if !is_memory(&self.guest.table, &mut self.guest.hint, buffer.addr, buffer.len) {
                    return Err(outside(buffer));
                }
                return Ok(Frame::Lost(Drop::Oversize));
            }
            while rest > 0 {
                let piece = self
                    .guest
                    .table
                    .lookup(&mut self.guest.hint, GuestAddress(at), rest);
                let piece = piece.ok_or(outside(buffer))?;
                let piece_len = u32::try_from(piece.len()).unwrap_or(rest);
                if self.segments.len() < R::MAX_SEGMENTS {
                    let iova = piece.iova;
                    self.segments.push(Segment { iova, len: piece_len });
                } else {
                    fits = false;
                }
                rest -= piece_len;
                at = at.wrapping_add(u64::from(piece_len));
            }
        }
        if skip > 0 {
            let header = self.guest.header_len;
            let len = u64::from(header - skip);
            return Err(ChainError::NoHeader { len, header });
        }
        Ok(match len {
            _ if !self.link_up => Frame::Lost(Drop::LinkDown),
            0..RUNT => Frame::Lost(Drop::Runt),
            RUNT..PADDED => {
                let why = Bounce::ShortFrame;
                Frame::Copy { len, why }
            }
            _ if !fits => {
                let why = Bounce::ManySegments;
                Frame::Copy { len, why }
            }
            _ => Frame::InPlace { len },
        })
    }

    /// Copies a frame into a slot of ours and posts that. `None` if it has to wait for a slot; a frame for which no
    /// slot can be had is lost.
    #[cold]
    fn post_copy(&mut self, len: u32, why: Bounce) -> Option<Odd> {
        if len > SLOT_BYTES {
            return Some(Odd::Lost(Drop::Oversize));
        }
        let slot = match self.slots.take(&self.guest.map) {
            Taking::Slot(slot) => slot,
            Taking::NotYet => return None,
            Taking::Never => return Some(Odd::Lost(Drop::NoRoom)),
        };
        let sent = len.max(PADDED_TO.min(self.max_frame));
        if let Some(bytes) = self.slots.bytes(&slot) {
            let copied = self.gather(&bytes);
            if let Some(padding) = bytes.sub(copied, (sent as usize).saturating_sub(copied)) {
                padding.copy_from(&[0; PADDED_TO as usize]);
            }
        }
        let iova = slot.iova;
        self.ring.post(&[Segment { iova, len: sent }]);
        Some(Odd::InSlot { slot, len, why })
    }

    /// Copies the frame of the current chain into `into` and returns how many bytes.
    fn gather(&self, into: &HostSlice<'_>) -> usize {
        let mut skip = self.guest.header_len;
        let mut copied = 0;
        for buffer in self.chain.readable() {
            let skipped = skip.min(buffer.len);
            skip -= skipped;
            let mut rest = buffer.len - skipped;
            let mut at = buffer.addr.0.wrapping_add(u64::from(skipped));
            while rest > 0 {
                let piece = self.guest.table.lookup_once(GuestAddress(at), rest);
                let target = into.sub(copied, into.len() - copied);
                let (Some(piece), Some(target)) = (piece, target) else {
                    return copied;
                };
                copied += target.copy_from_slice(piece.host);
                let piece_len = u32::try_from(piece.len()).unwrap_or(rest);
                rest -= piece_len;
                at = at.wrapping_add(u64::from(piece_len));
            }
        }
        copied
    }

    /// Where in the guest's memory the card has something to read.
    fn places(&self) -> impl Iterator<Item = Iova> {
        let usual = self.taken.iter().filter(|taken| taken.is_usual());
        usual.map(|taken| taken.iova).chain(self.held.iter().copied())
    }

    /// Gives everything that is still taken back as lost. The card holds none of it any more.
    fn discard(&mut self, why: Drop) {
        self.held.clear();
        while let Some(oldest) = self.taken.oldest() {
            self.taken.forget(1);
            let odd = if oldest.is_usual() {
                None
            } else {
                self.odd.pop_front()
            };
            let lost = match odd {
                Some(Odd::Lost(earlier)) => earlier,
                Some(Odd::InSlot { slot, .. }) => {
                    self.slots.put_back(&slot);
                    why
                }
                Some(Odd::InPlace { .. }) | None => why,
            };
            self.guest.stats.drop_frame(lost);
            self.guest.virtq.give(oldest.head, 0);
        }
    }
}

impl Taken {
    /// One that `TxLane::odd` has the rest of.
    fn odd(head: u16) -> Self {
        let (len, iova) = (0, Iova::new(0));
        Self { head, len, iova }
    }

    #[inline(always)]
    fn is_usual(self) -> bool {
        self.len != 0
    }
}

/// Where the frame of a usual chain is, if all that the chain names is guest memory in one place, `frames`, and the frame
/// is not longer than a frame can be: the caller looks at that. The length of one that does not hold its header wraps to
/// more.
#[inline(always)]
fn segment_of<const HEADER: u32>(short: &Short, frames: &HitOfLen<'_>) -> Option<Segment> {
    let Short { first, second, .. } = short;
    let Some(frame) = second else {
        let iova = frames.iova(first.addr)?.offset(HEADER.into());
        let len = first.len.wrapping_sub(HEADER);
        return Some(Segment { iova, len });
    };
    if first.len != HEADER {
        return None;
    }
    // Header bytes are not sent, but they must be guest memory.
    frames.iova(first.addr)?;
    let (iova, len) = (frames.iova(frame.addr)?, frame.len);
    Some(Segment { iova, len })
}

fn outside(buffer: &Buffer) -> ChainError {
    let (start, len) = (buffer.addr.0, buffer.len);
    ChainError::Memory { start, len }
}

/// Whether `len` bytes at `start` are all guest memory.
#[inline]
pub(super) fn is_memory(table: &Table, hint: &mut TableHint, start: GuestAddress, len: u32) -> bool {
    let mut at = start.0;
    let mut rest = len;
    while rest > 0 {
        let Some(piece) = table.lookup(hint, GuestAddress(at), rest) else {
            return false;
        };
        let piece_len = u32::try_from(piece.len()).unwrap_or(rest);
        rest -= piece_len;
        at = at.wrapping_add(u64::from(piece_len));
    }
    true
}

impl<R: TxRing> Way for TxLane<R> {
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
        let mut given = self.complete();
        let taken = self.take();
        self.ring.flush();
        // A lost frame, and one a copying device has sent already, need no second pass.
        if !self.odd.is_empty() || self.ring.transfer() == Transfer::Copy {
            given += self.complete();
        }
        if given > 0 {
            self.guest.publish();
        }
        Ok(if taken? + given > 0 {
            Progress::Moved
        } else {
            Progress::Idle
        })
    }

    fn awaits_card(&self) -> bool {
        // A frame that is done already was given back: unmasking for nothing is a write to the card each way.
        !self.taken.is_empty()
    }

    fn last_look(&mut self) -> Result<bool, VirtqError> {
        let more = self.guest.virtq.ask_for_kicks()?;
        let given = self.complete();
        if given > 0 {
            self.guest.publish();
        }
        // With a full ring only the card's interrupt helps, and memory that is awaited comes with a command: what
        // waits in the virtqueue for either must not keep us awake.
        let can_take = more && self.ring.room() >= self.room_for_a_frame() && !self.guest.waits_for_memory;
        Ok(given > 0 || self.slots.is_awaited() || can_take)
    }

    fn is_kept_by(&self, _next: &Table, leaving: &Leaving) -> bool {
        // What was copied is ours, and nothing is written when the card is done.
        leaving.is_empty() || !self.places().any(|iova| leaving.has(iova))
    }

    fn held(&self) -> Vec<Iova> {
        self.places().collect()
    }

    fn follow_link(&mut self, up: bool) -> Result<(), NicError> {
        if self.link_up == up {
            return Ok(());
        }
        if up {
            self.ring.start()?;
        } else {
            // A card without a link never finishes what it was given (TRAPS 10).
            self.quiesce()?;
            self.discard(Drop::LinkDown);
            self.guest.publish();
        }
        self.link_up = up;
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), NicError> {
        let stopped = self.ring.stop();
        self.complete();
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
    use crate::testing::{BASE, BUFFERS, FakeRing, Guest, INDIRECT, SECOND, WRITE, Wire};

    const BUFFER: u64 = BASE + BUFFERS;

    struct Bench {
        guest: Guest,
        lane: Box<TxLane<FakeRing>>,
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
            let lane = Box::new(TxLane::start(setup, ring, berth).unwrap());
            Self {
                guest,
                lane,
                wire,
                stats,
            }
        }

        /// Offers a frame of `len` bytes after a header, in one buffer.
        fn offer(&mut self, head: u16, len: u32) {
            self.guest
                .offer_chain(head, &[(BUFFER + 0x1000 * u64::from(head), 12 + len)], 0);
        }

        /// The card finishes its oldest frames.
        fn finish(&self, frames: usize) {
            self.wire.lock().unwrap().sent = frames;
        }

        fn sending(&self) -> Vec<Vec<Segment>> {
            self.wire.lock().unwrap().sending.iter().cloned().collect()
        }

        /// Polls until the card has `frames` frames: slots are mapped by another thread.
        fn poll_until_sending(&mut self, frames: usize) {
            while self.sending().len() < frames {
                assert_ne!(self.lane.poll(), Progress::Retired);
                std::thread::yield_now();
            }
        }

        /// The bytes of the `n`th frame with the card.
        fn bytes(&self, n: usize) -> Vec<u8> {
            self.sending()[n]
                .iter()
                .flat_map(|segment| self.guest.dma_read(*segment))
                .collect()
        }
    }

    #[test]
    fn a_frame_goes_out_in_place_and_comes_back_when_the_card_is_done() {
        let mut bench = Bench::of_size(8);
        bench.offer(3, 60);
        assert_eq!(bench.lane.poll(), Progress::Moved);
        let in_place = Segment {
            iova: bench.guest.iova(BUFFER + 0x3000).offset(12),
            len: 60,
        };
        assert_eq!(bench.sending(), vec![vec![in_place]]);
        assert_eq!(bench.guest.used(), vec![], "trap 10: not before the card is done");
        bench.finish(1);
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(3, 0)]);
        assert_eq!(
            (bench.stats.zero_copy_frames.get(), bench.stats.copied_bytes.get()),
            (1, 0)
        );
        assert!(!bench.guest.has_bounce_memory());
    }

    #[test]
    fn any_layout_of_the_header_is_understood() {
        let mut bench = Bench::of_size(8);
        bench.guest.write(BUFFER, &[7; 200]);
        bench.guest.offer_chain(0, &[(BUFFER, 12), (BUFFER + 100, 60)], 0);
        bench
            .guest
            .offer_chain(2, &[(BUFFER, 5), (BUFFER + 50, 8), (BUFFER + 100, 59)], 0);
        bench.lane.poll();
        assert_eq!(bench.sending()[0].len(), 1);
        assert_eq!(bench.bytes(0).len(), 60);
        assert_eq!(
            bench.bytes(1).len(),
            1 + 59,
            "12 header bytes over two descriptors, one frame byte in the second"
        );
        assert!(!bench.guest.has_bounce_memory());
    }

    #[test]
    fn trap_16_a_table_without_memory_that_the_card_reads_is_not_adopted() {
        type Buffers = &'static [(u64, u32)];
        let cases: [(&str, Buffers, Adoption); 5] = [
            ("all of it stays", &[(BUFFER, 72)], Adoption::Adopted),
            ("all of it goes", &[(SECOND, 72)], Adoption::InUse),
            (
                "its last segment goes",
                &[(BUFFER, 72), (SECOND, 100)],
                Adoption::InUse,
            ),
            (
                "the header goes, which has been read",
                &[(SECOND, 12), (BUFFER, 60)],
                Adoption::Adopted,
            ),
            (
                "all of it goes, and is in a slot of ours",
                &[(SECOND, 27)],
                Adoption::Adopted,
            ),
        ];
        for (what, buffers, expected) in cases {
            let mut bench = Bench::of_size(8);
            bench.guest.offer_chain(0, buffers, 0);
            bench.poll_until_sending(1);
            let change = bench.guest.losing_the_second_region();
            let adopted = bench.lane.adopt(Arc::clone(change.table()), change.leaving());
            assert_eq!(adopted, expected, "{what}");
            bench.finish(1);
            bench.lane.poll();
            assert_eq!(bench.guest.used(), vec![(0, 0)], "{what}");
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
    fn of_frames_with_the_card_the_one_that_is_done_holds_nothing_back() {
        let mut bench = Bench::of_size(8);
        bench.guest.offer_chain(0, &[(SECOND, 72), (SECOND + 200, 60)], 0);
        bench.guest.offer_chain(2, &[(BUFFER, 72)], 0);
        bench.lane.poll();
        let change = bench.guest.losing_the_second_region();
        let leaving = change.leaving();
        assert_eq!(
            bench.lane.adopt(Arc::clone(change.table()), leaving),
            Adoption::InUse
        );
        bench.finish(1);
        bench.lane.poll();
        assert_eq!(
            bench.lane.adopt(Arc::clone(change.table()), leaving),
            Adoption::Adopted
        );
    }

    #[test]
    fn trap_41_a_buffer_over_two_regions_becomes_two_segments() {
        let mut bench = Bench::of_size(8);
        bench.guest.write(SECOND - 12 - 40, &[0; 12]);
        let frame: Vec<u8> = (0..80).collect();
        bench.guest.write(SECOND - 40, &frame[..40]);
        bench.guest.write(SECOND, &frame[40..]);
        bench.guest.offer_chain(0, &[(SECOND - 52, 92)], 0);
        bench.lane.poll();
        assert_eq!(bench.sending()[0].len(), 2);
        assert_eq!(bench.bytes(0), frame);
    }

    #[test]
    fn trap_42_more_pieces_than_the_card_takes_are_joined_in_a_slot() {
        let mut bench = Bench::of_size(32);
        let table = BASE + 0xc000;
        let frame: Vec<u8> = (0..90).collect();
        bench.guest.write(BUFFER + 0x100, &frame);
        bench.guest.descriptor_at(table, 0, BUFFER, 12, 1, 1);
        for n in 0..9u16 {
            let next = if n == 8 { 0 } else { 1 };
            bench
                .guest
                .descriptor_at(table, n + 1, BUFFER + 0x100 + 10 * u64::from(n), 10, next, n + 2);
        }
        bench.guest.offer_chain(5, &[(table, 160)], INDIRECT);
        bench.poll_until_sending(1);
        assert_eq!(bench.sending()[0].len(), 1);
        assert_eq!(bench.bytes(0), frame);
        assert!(bench.guest.has_bounce_memory(), "a bounce shows in the map");
        bench.finish(1);
        bench.lane.poll();
        assert_eq!(bench.stats.bounced[Bounce::ManySegments as usize].get(), 1);
        assert_eq!(bench.stats.copied_bytes.get(), 90);
        assert_eq!(bench.guest.used(), vec![(5, 0)]);
    }

    #[test]
    fn a_very_short_frame_is_padded_with_zeroes_and_never_with_what_follows() {
        let mut bench = Bench::of_size(8);
        bench.guest.write(BUFFER, &[0xee; 200]);
        bench.offer(0, 16);
        bench.poll_until_sending(1);
        let mut padded = vec![0xee; 16];
        padded.resize(60, 0);
        assert_eq!(bench.bytes(0), padded);
    }

    #[test]
    fn lost_frames_keep_their_turn() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, 60);
        bench.offer(1, 13);
        bench.offer(2, 2000);
        bench.offer(3, 60);
        bench.lane.poll();
        assert_eq!(
            bench.guest.used(),
            vec![],
            "the first is with the card, so the lost ones wait"
        );
        bench.finish(1);
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 0), (1, 0), (2, 0)]);
        assert_eq!(bench.stats.dropped[Drop::Runt as usize].get(), 1);
        assert_eq!(bench.stats.dropped[Drop::Oversize as usize].get(), 1);
    }

    #[test]
    fn frames_in_turn_from_two_places_and_odd_ones_between_go_out_in_order_in_one_pass() {
        let mut bench = Bench::of_size(32);
        let end = SECOND + crate::testing::LEN;
        let chains: [&[(u64, u32)]; 7] = [
            &[(BUFFER, 72)],
            &[(SECOND + 64, 72)],
            &[(BUFFER + 0x1000, 12), (BUFFER + 0x2000, 61)],
            // Header and frame in two places.
            &[(BUFFER, 12), (SECOND + 64, 62)],
            // Too short for an Ethernet header.
            &[(BUFFER, 20)],
            &[(SECOND + 64, 75)],
            // The last bytes of the memory.
            &[(end - 76, 76)],
        ];
        for (head, chain) in (0..).zip(chains) {
            bench.guest.offer_chain(2 * head, chain, 0);
        }
        bench.lane.poll();
        let expected = [
            (BUFFER + 12, 60),
            (SECOND + 76, 60),
            (BUFFER + 0x2000, 61),
            (SECOND + 64, 62),
            (SECOND + 76, 63),
            (end - 64, 64),
        ];
        let expected = expected.map(|(at, len)| {
            let iova = bench.guest.iova(at);
            vec![Segment { iova, len }]
        });
        assert_eq!(bench.sending(), expected);
        assert_eq!(bench.guest.used(), vec![], "none is given back before its turn");
        bench.finish(4);
        bench.lane.poll();
        let used: Vec<u32> = bench.guest.used().iter().map(|(head, _)| *head).collect();
        assert_eq!(used, [0, 2, 4, 6, 8]);
        bench.finish(2);
        bench.lane.poll();
        assert_eq!(bench.guest.used().len(), 7);
        assert_eq!(bench.stats.frames.get(), 6);
        assert_eq!(bench.stats.bytes.get(), 60 + 60 + 61 + 62 + 63 + 64);
        assert_eq!(bench.stats.dropped[Drop::Runt as usize].get(), 1);
        assert!(!bench.guest.has_bounce_memory());
    }

    #[test]
    fn a_full_ring_leaves_chains_in_the_virtqueue() {
        let mut bench = Bench::of_size(128);
        for head in 0..100 {
            bench.guest.offer_chain(head, &[(BUFFER, 72)], 0);
        }
        for _ in 0..5 {
            bench.lane.poll();
        }
        assert_eq!(bench.sending().len(), 64 - FakeRing::MAX_SEGMENTS + 1);
        bench.finish(10);
        bench.lane.poll();
        assert_eq!(bench.guest.used().len(), 10);
        assert_eq!(bench.sending().len(), 64 - FakeRing::MAX_SEGMENTS + 1);
    }

    #[test]
    fn a_broken_chain_retires_the_lane_and_nothing_else() {
        for (buffers, flags) in [
            (vec![(BUFFER, 11)], 0),
            (vec![(BUFFER, 100)], WRITE),
            (vec![(16, 100)], 0),
            (vec![(BUFFER, 12), (SECOND + crate::testing::LEN - 10, 60)], 0),
            (vec![(u64::MAX - 5, 100)], 0),
        ] {
            let mut bench = Bench::of_size(8);
            bench.offer(0, 60);
            bench.guest.offer_chain(4, &buffers, flags);
            assert_eq!(bench.lane.poll(), Progress::Retired);
            assert_eq!(bench.lane.poll(), Progress::Retired);
            assert_eq!(bench.stats.errors.get(), 1);
            let stopped = bench.lane.stop();
            assert_eq!(stopped.first_unused, 0);
        }
    }

    #[test]
    fn trap_12_a_stopped_lane_answers_with_the_first_frame_not_sent() {
        let mut bench = Bench::of_size(8);
        for head in 0..4 {
            bench.offer(head, 60);
        }
        bench.lane.poll();
        bench.finish(3);
        let wire = Arc::clone(&bench.wire);
        let stopped = bench.lane.stop();
        assert_eq!(stopped.first_unused, 3);
        assert_eq!(bench.guest.used().len(), 3);
        assert!(!wire.lock().unwrap().running);
    }

    #[test]
    fn trap_10_without_a_link_frames_are_given_back_lost_and_counted() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, 60);
        bench.lane.poll();
        bench.lane.set_link(false).unwrap();
        assert_eq!(
            bench.guest.used(),
            vec![(0, 0)],
            "what was with the card comes back"
        );
        bench.offer(1, 60);
        bench.lane.poll();
        assert_eq!(bench.guest.used(), vec![(0, 0), (1, 0)]);
        assert_eq!(bench.stats.dropped[Drop::LinkDown as usize].get(), 2);
        bench.lane.set_link(true).unwrap();
        bench.offer(2, 60);
        bench.lane.poll();
        assert_eq!(bench.sending().len(), 1);
    }

    #[test]
    fn trap_17_a_chain_whose_memory_is_awaited_keeps_its_place() {
        let mut bench = Bench::of_size(8);
        bench.lane.set_missing_memory(MissingMemory::IsAwaited);
        bench.offer(0, 60);
        bench.guest.offer_chain(4, &[(16, 100)], 0);
        assert_eq!(bench.lane.poll(), Progress::Moved);
        assert_eq!(bench.lane.poll(), Progress::Idle);
        assert_eq!(bench.sending().len(), 1);
        bench.lane.set_missing_memory(MissingMemory::IsBroken);
        assert_eq!(bench.lane.poll(), Progress::Retired);
    }

    #[test]
    fn a_queue_that_will_not_stop_is_reported_every_time_and_keeps_its_frames() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, 60);
        bench.lane.poll();
        bench.wire.lock().unwrap().stop_fails = true;
        assert!(bench.lane.set_link(false).is_err());
        assert_eq!(bench.guest.used(), vec![], "the card may still read it");
        let stopped = bench.lane.stop();
        assert!(stopped.card.is_err());
        assert_eq!(stopped.first_unused, 0);
    }

    #[test]
    fn frames_are_counted_once_however_often_they_are_taken() {
        let mut bench = Bench::of_size(8);
        bench.offer(0, 60);
        bench.offer(1, 13);
        bench.lane.poll();
        assert_eq!(
            (
                bench.stats.frames.get(),
                bench.stats.dropped[Drop::Runt as usize].get()
            ),
            (0, 0)
        );
        let stats = Arc::clone(&bench.stats);
        assert_eq!(bench.lane.stop().first_unused, 0);
        assert_eq!(
            (stats.frames.get(), stats.dropped[Drop::Runt as usize].get()),
            (0, 0)
        );
    }

    #[test]
    fn without_slots_a_frame_that_needs_one_is_lost_and_the_lane_goes_on() {
        let mut bench = Bench::of_size(8);
        // All IOVA space is taken.
        bench.guest.fill_the_map();
        bench.offer(0, 16);
        while bench.guest.used().is_empty() {
            bench.lane.poll();
            std::thread::yield_now();
        }
        assert_eq!(bench.stats.dropped[Drop::NoRoom as usize].get(), 1);
        bench.offer(1, 60);
        bench.poll_until_sending(1);
    }
}
