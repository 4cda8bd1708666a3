//! What a lane counts. One worker writes, anybody reads.
//!
//! The counters are part of the product: `stats` shows them under these names.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that one thread writes: cheaper than an atomic add, and as safe with that one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. For the lane's own worker only.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(count),
            Ordering::Relaxed,
        );
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! reasons {
    ($(#[$of:meta])* $kind:ident { $($(#[$doc:meta])* $name:ident = $text:literal,)* }) => {
        $(#[$of])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $kind { $($(#[$doc])* $name,)* }

        impl $kind {
            /// All of them, in the order they are shown.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name shown by `stats`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// Why a frame's bytes went through memory of ours.
    Bounce {
        /// The guest's receive buffer is shorter than the largest frame the port lets in.
        ShortBuffer = "short-buffer",
        /// The guest's receive buffer is not contiguous for the card.
        SplitBuffer = "split-buffer",
        /// A frame so short that the card would pad it with whatever comes after.
        ShortFrame = "short-frame",
        /// More pieces than the card takes for one frame.
        ManySegments = "many-segments",
        /// The device is software and copies every frame.
        CopyDevice = "copy-device",
    }
}

reasons! {
    /// Why a frame was lost here.
    Drop {
        /// The cable is out: a card would hold the frame until it is stale.
        LinkDown = "link-down",
        /// A frame shorter than an Ethernet header.
        Runt = "runt",
        /// A frame longer than the port's MTU allows.
        Oversize = "oversize",
        /// The guest's receive buffers were too small for it.
        NoRoom = "no-room",
        /// The card reported it damaged.
        Damaged = "damaged",
    }
}

/// One lane's counters.
#[derive(Debug, Default)]
pub struct LaneStats {
    /// Frames moved.
    pub frames: Counter,
    /// Their bytes, headers of virtio not counted.
    pub bytes: Counter,
    /// Frames whose bytes no CPU touched on this side.
    pub zero_copy_frames: Counter,
    /// Frames that went through memory of ours, by [`Bounce`].
    pub bounced: [Counter; Bounce::ALL.len()],
    /// Bytes copied by CPU for them.
    pub copied_bytes: Counter,
    /// Frames lost, by [`Drop`].
    pub dropped: [Counter; Drop::ALL.len()],
    /// Passes that moved something.
    pub bursts: Counter,
    /// Passes that found nothing to move: tx, no frame in the virtqueue; rx, none from the card or no buffer for one.
    pub idle_passes: Counter,
    /// Kicks received from the guest.
    pub kicks: Counter,
    /// Notifications sent to the guest.
    pub notifications: Counter,
    /// Interrupts received from the card.
    pub interrupts: Counter,
    /// Times the worker went to sleep with this lane armed.
    pub sleeps: Counter,
    /// Times the guest broke its ring or the card failed.
    pub errors: Counter,
    /// Times the front-end's descriptor made the worker wait.
    pub stalls: Counter,
    /// Times the lane was stopped and started because guest memory went that it used.
    pub pauses: Counter,
    /// For how long in all, in microseconds.
    pub paused_us: Counter,
}

impl LaneStats {
    #[inline]
    pub(super) fn moved(&self, bytes: u32) {
        self.frames.add(1);
        self.bytes.add(u64::from(bytes));
    }

    /// As [`moved`](Self::moved), for many.
    #[inline]
    pub(super) fn moved_many(&self, frames: u64, bytes: u64) {
        self.frames.add(frames);
        self.bytes.add(bytes);
    }

    #[inline]
    pub(super) fn bounce(&self, why: Bounce, bytes: u32) {
        self.bounced[why as usize].add(1);
        self.copied_bytes.add(u64::from(bytes));
    }

    /// As [`bounce`](Self::bounce), for many.
    #[inline]
    pub(super) fn bounce_many(&self, why: Bounce, frames: u64, bytes: u64) {
        self.bounced[why as usize].add(frames);
        self.copied_bytes.add(bytes);
    }

    pub(super) fn drop_frame(&self, why: Drop) {
        self.dropped[why as usize].add(1);
    }

    /// Frames that went through memory of ours, for whatever reason.
    pub fn bounced_frames(&self) -> u64 {
        self.bounced.iter().map(Counter::get).sum()
    }
}
