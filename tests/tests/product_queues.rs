//! Several queue pairs by the real binary: a VMM that turns pairs on and off while flows arrive, as `ethtool -L` in a guest
//! has it do.
//!
//! ```text
//! test ══vhost-user══ vhost-user-vfio ══vfio-user══ card-model ──datagrams── test
//!        four pairs                                 hashes each frame's flow
//! ```

#![forbid(unsafe_code)]

mod product;

use std::collections::BTreeMap;
use std::time::Instant;

use product::Host;
use serde_json::Value;
use tests::frontend::PATIENCE;
use tests::frontend::connection::request;
use tests::frontend::driver::SplitQueue;
use tests::frontend::memory::{GuestMemory, Plan};
use tests::frontend::net::{Form, Layout, Rx, Tx, arena_bytes};
use tests::frontend::suite::{RX_BUFFER_BYTES, Running};
use tests::frontend::vmm::{Manner, RingPlace, Session, feature};

const PAIRS: u32 = 4;
const SLOTS: u16 = 32;
const RING: u16 = 64;
const FLOWS: u8 = 32;
const SETTINGS: &str = "queue-pairs = 4\nrss-key = \
     '6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa'\n";

/// The one frame of a flow; `round` tells it from that flow's others.
fn flow(number: u8, round: u8) -> Vec<u8> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4([198, 18, 0, number], [198, 19, 0, 1], 64)
        .udp(1000 + u16::from(number), 9)
        .write(&mut frame, &[round; 60])
        .unwrap();
    frame
}

/// A guest with four queue pairs.
struct Guest {
    session: Session,
    pairs: Vec<(Rx, Tx)>,
    round: u8,
}

impl Guest {
    fn boot(running: &Running) -> Self {
        let memory = GuestMemory::new(&[Plan::new(0, 8 << 20)]).unwrap();
        let wanted = feature::MRG_RXBUF | feature::MQ | feature::EVENT_IDX;
        let session =
            Session::negotiate(running.connect(), Manner::EnableLast, &memory, wanted, 2 * PAIRS).unwrap();
        assert!(session.has(feature::MQ), "the guest is told of several pairs");
        assert_eq!(
            session.connection().request_u64(request::GET_QUEUE_NUM).unwrap(),
            u64::from(PAIRS)
        );
        let queue = |index: u64| {
            let at = 0x1_0000 + 0x4000 * index;
            let place = RingPlace {
                size: RING,
                desc: at,
                avail: at + 0x2000,
                used: at + 0x3000,
            };
            let arena = (1 << 20) + index * arena_bytes(SLOTS);
            (SplitQueue::new(&memory, place), arena)
        };
        let mut rings = Vec::new();
        let mut pairs = Vec::new();
        for pair in 0..PAIRS {
            let (rx, rx_arena) = queue(u64::from(2 * pair));
            let (tx, tx_arena) = queue(u64::from(2 * pair + 1));
            let mut rx = Rx::new(rx, &memory, rx_arena, SLOTS);
            let mut tx = Tx::new(tx, &memory, tx_arena, SLOTS);
            rx.attach(&session, 2 * pair);
            tx.queue.attach(&session, 2 * pair + 1);
            rx.fill(SLOTS.into(), RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
            rx.queue.publish();
            rings.push((2 * pair, rx.queue.place(), 0));
            rings.push((2 * pair + 1, tx.queue.place(), 0));
            pairs.push((rx, tx));
        }
        session.start(&rings).unwrap();
        Self {
            session,
            pairs,
            round: 0,
        }
    }

    fn enable(&self, pair: u32, enabled: bool) {
        self.session.enable(2 * pair, enabled).unwrap();
        self.session.enable(2 * pair + 1, enabled).unwrap();
    }

    /// Sends one frame of each flow from the wire and returns on which pair each arrives, once and unchanged.
    fn homes(&mut self, running: &Running) -> BTreeMap<u8, usize> {
        self.round += 1;
        let mut homes = BTreeMap::new();
        for number in 0..FLOWS {
            let frame = flow(number, self.round);
            running.wire.send(&frame);
            let deadline = Instant::now() + PATIENCE;
            let home = loop {
                let mut rxs = self.pairs.iter_mut().map(|(rx, _)| rx);
                // A frame of the round before, from a pair that was turned off in between, would be found out here.
                if let Some(home) = rxs.position(|rx| rx.try_recv().is_some_and(|received| received == frame))
                {
                    break home;
                }
                assert!(Instant::now() < deadline, "flow {number} never arrived");
            };
            let (rx, _) = &mut self.pairs[home];
            rx.fill(1, RX_BUFFER_BYTES, Layout::WithData, Form::Direct);
            rx.queue.submit();
            homes.insert(number, home);
        }
        homes
    }

    /// Sends one frame on each of `pairs`, which arrives on the wire.
    fn send(&mut self, running: &Running, pairs: std::ops::Range<usize>) {
        for (number, (_, tx)) in (0..).zip(&mut self.pairs[pairs]) {
            let frame = flow(number, 200);
            tx.send(&frame, Layout::WithData, Form::Direct);
            assert_eq!(running.wire.recv(), frame);
            tx.drain();
        }
    }
}

/// Frames of the lanes of one direction, by pair.
fn frames(stats: &Value, direction: &str) -> Vec<u64> {
    let lanes = stats["ports"][0]["lanes"].as_array().unwrap().iter();
    lanes
        .filter(|lane| lane["direction"] == direction)
        .map(|lane| lane["frames"].as_u64().unwrap())
        .collect()
}

#[test]
fn flows_are_spread_over_the_pairs_a_guest_has_on() {
    let host = Host::with_settings(SETTINGS);
    let mut guest = Guest::boot(host.port());
    // The first frames wait in the card until buffers are there, and then go where the table of that moment says: so the
    // spread is looked at once all lanes have had a pass.
    guest.homes(host.port());
    let four = guest.homes(host.port());
    guest.send(host.port(), 0..4);
    let stats = host.stats();
    for pair in 0..4 {
        assert!(
            four.values().any(|home| *home == pair),
            "pair {pair} has its share"
        );
        assert!(frames(&stats, "rx")[pair] > 0);
    }
    assert_eq!(frames(&stats, "tx"), [1; 4]);
    assert_eq!(frames(&stats, "rx").iter().sum::<u64>(), 2 * u64::from(FLOWS));

    // ethtool -L eth0 combined 2
    guest.enable(2, false);
    guest.enable(3, false);
    let two = guest.homes(host.port());
    for (number, home) in &four {
        assert!(two[number] < 2, "flow {number} went to a pair that is off");
        assert!(two[number] == *home || *home >= 2, "flow {number} moved");
    }
    guest.send(host.port(), 0..2);
    let running = |stats: &Value| -> Vec<bool> {
        let lanes = stats["ports"][0]["lanes"].as_array().unwrap().iter();
        lanes.map(|lane| lane["running"] == true).collect()
    };
    assert_eq!(
        running(&host.stats()),
        [true, true, true, true, false, false, false, false]
    );

    // And back.
    guest.enable(2, true);
    guest.enable(3, true);
    guest.homes(host.port());
    let again = guest.homes(host.port());
    for (number, home) in &two {
        assert!(
            again[number] == *home || again[number] >= 2,
            "flow {number} moved"
        );
    }
    assert!((0..4).all(|pair| again.values().any(|home| *home == pair)));
    guest.send(host.port(), 0..4);
    drop(guest);
    host.finish();
}

/// A front-end that knows nothing of several pairs uses the first, and gets everything.
#[test]
fn a_guest_with_one_pair_gets_every_flow() {
    let host = Host::with_settings(SETTINGS);
    let mut guest =
        tests::frontend::suite::Guest::boot(host.port(), tests::frontend::suite::Setup::default());
    guest.rx.fill(
        usize::from(FLOWS),
        RX_BUFFER_BYTES,
        Layout::WithData,
        Form::Direct,
    );
    guest.rx.queue.submit();
    for number in 0..FLOWS {
        let frame = flow(number, 1);
        host.port().wire.send(&frame);
        assert_eq!(guest.rx.recv(), frame);
    }
    drop(guest);
    host.finish();
}
