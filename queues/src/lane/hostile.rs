//! Whatever a guest writes into its rings and buffers, a lane neither panics nor gives the card an address outside of
//! that guest's memory (or of its own slots), and what it gives back was offered.

use std::sync::Mutex;

use proptest::prelude::*;

use super::{Lane, LaneSetup, Progress, RxLane, TxLane};
use crate::nic::Berth;
use crate::testing::{BASE, BUFFERS, FakeRing, Guest, LEN, SECOND, Wire, receive};

/// An address a guest may write: mostly near its memory and its borders.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (BASE + BUFFERS)..(SECOND + LEN),
        1 => (SECOND - 64)..(SECOND + 64),
        1 => (SECOND + LEN - 64)..(SECOND + LEN + 64),
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..2000, 1 => Just(12), 1 => 1529u32..1532, 1 => any::<u32>()]
}

/// A descriptor: address, length, flags, next.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    (
        address(),
        len(),
        prop_oneof![4 => 0u16..4, 1 => any::<u16>()],
        prop_oneof![4 => 0u16..8, 1 => any::<u16>()],
    )
}

#[derive(Debug, Clone)]
struct Attack {
    table: Vec<(u64, u32, u16, u16)>,
    offers: Vec<u16>,
    jump: u16,
}

fn attack() -> impl Strategy<Value = Attack> {
    let table = prop::collection::vec(descriptor(), 8);
    let offers = prop::collection::vec(prop_oneof![6 => 0u16..8, 1 => any::<u16>()], 0..8);
    let jump = prop_oneof![8 => Just(0u16), 1 => any::<u16>()];
    (table, offers, jump).prop_map(|(table, offers, jump)| Attack { table, offers, jump })
}

fn apply(guest: &mut Guest, attack: &Attack) {
    for (index, (addr, len, flags, next)) in (0..).zip(&attack.table) {
        guest.descriptor(index, *addr, *len, *flags, *next);
    }
    for head in &attack.offers {
        guest.offer(*head);
    }
    if attack.jump != 0 {
        guest.set_avail_idx(attack.jump);
    }
}

/// Every address with the card is mapped for as long as the card may use it.
fn check_posted(guest: &Guest, wire: &Mutex<Wire>) {
    let wire = wire.lock().unwrap();
    for segment in wire.sending.iter().flatten() {
        assert!(
            guest.map.software_bus().room(segment.iova) >= segment.len as usize,
            "{segment:?} leaves the map"
        );
    }
    for buffer in &wire.posted {
        assert!(
            guest.map.software_bus().room(*buffer) >= 1518,
            "a buffer at {buffer} could be overrun"
        );
    }
}

fn finish_some(guest: &Guest, wire: &Mutex<Wire>) {
    let (to_send, to_fill) = {
        let wire = wire.lock().unwrap();
        (wire.sending.len(), wire.posted.len() - wire.filled.len())
    };
    wire.lock().unwrap().sent = to_send.div_ceil(2);
    for n in 0..to_fill.div_ceil(2) {
        receive(guest, wire, &vec![0x5a; 60 + 100 * (n % 14)]);
    }
}

fn run(attack: &Attack, make: impl FnOnce(LaneSetup, FakeRing, Berth<FakeRing>) -> Box<dyn Lane>) {
    let mut guest = Guest::with_queue(8);
    let (ring, wire) = FakeRing::new();
    let berth = Berth::with(FakeRing::new().0);
    let setup = guest.lane_setup();
    let mut lane = make(setup, ring, berth);
    apply(&mut guest, attack);
    let mut retired = false;
    for _ in 0..4 {
        let progress = lane.poll();
        assert!(
            !retired || progress == Progress::Retired,
            "a retired lane stays so"
        );
        retired = progress == Progress::Retired;
        check_posted(&guest, &wire);
        finish_some(&guest, &wire);
        lane.arm();
    }
    let offered = attack.offers.len();
    let stopped = lane.stop();
    assert!(retired || usize::from(stopped.first_unused) <= offered.max(attack.jump.into()));
    assert!(!wire.lock().unwrap().running);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_hostile_transmit_queue_is_contained(attack in attack()) {
        run(&attack, |setup, ring, berth| Box::new(TxLane::start(setup, ring, berth).unwrap()));
    }

    #[test]
    fn a_hostile_receive_queue_is_contained(attack in attack()) {
        run(&attack, |setup, ring, berth| Box::new(RxLane::start(setup, ring, berth).unwrap()));
    }
}
