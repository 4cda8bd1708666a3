//! A queue of the card that will not stop, met by messages of the front-end, on the register-level card.
#![forbid(unsafe_code)]

use std::fs::File;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backend::port::{Lanes, Occupant, Port};
use backend::session::Session;
use backend::worker::{Patience, Worker};
use tests::bench::{Bench, GUEST_BASE, MAC, RX_ARENA, Slot, TX_ARENA};
use tests::card::{Direction, Options, Quirks, RingName};
use tests::frontend::driver::SplitQueue;
use tests::frontend::memory::{GuestMemory, Plan};
use tests::frontend::net::{Form, Layout, Rx, Tx};
use tests::frontend::vmm::RingPlace;
use vhost::vhost_user::VhostUserBackendReqHandler;
use vhost::vhost_user::message::{
    VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
};

const SILICON: Options = Options {
    quirks: Quirks { qemu: false },
    scribble: true,
    reset_quiet: None,
};
const MIB: u64 = 1 << 20;

struct Rig {
    bench: Bench,
    slot: Slot,
    port: Arc<Port>,
    session: Arc<Session>,
    memory: GuestMemory,
    rx: Rx,
    tx: Tx,
}

fn rig() -> Rig {
    let bench = Bench::new(SILICON);
    bench.map.let_go("vm0", bench.table.extents()).unwrap();
    let slot = bench.plug(2, SILICON);
    let worker = Worker::start("worker", None).unwrap();
    let nic = Box::new(slot.open());
    let port = Arc::new(Port::new(
        "vm0",
        Arc::clone(&bench.map),
        nic,
        vec![worker],
        Patience::Forever,
        1500,
    ));
    let memory = GuestMemory::new(&[
        Plan::new(GUEST_BASE, 3 * MIB),
        Plan::new(GUEST_BASE + 3 * MIB, 5 * MIB),
    ])
    .unwrap();
    let ring = |place: u64| {
        let at = GUEST_BASE + 1024 * place;
        SplitQueue::new(
            &memory,
            RingPlace {
                size: 128,
                desc: at,
                avail: at + 0x2000,
                used: at + 0x3000,
            },
        )
    };
    let (rx, tx) = (ring(0), ring(64));
    let places = [rx.place(), tx.place()];
    let mut rx = Rx::new(rx, &memory, RX_ARENA, 128);
    let tx = Tx::new(tx, &memory, TX_ARENA, 64);
    rx.fill(64, 1536, Layout::WithData, Form::Direct);
    let session = Session::new(Arc::clone(&port));
    session.set_features(1 << 32).unwrap();
    let (regions, files): (Vec<_>, Vec<_>) = memory
        .regions()
        .iter()
        .map(|region| {
            let told = region.announcement();
            let file: File = region.fd().try_clone_to_owned().unwrap().into();
            (
                VhostUserMemoryRegion::new(told.gpa, told.len, told.user, told.file_offset),
                file,
            )
        })
        .unzip();
    session.set_mem_table(&regions, files, None).unwrap();
    for (index, place) in (0_u8..).zip(places) {
        let at = |gpa| memory.user_address(gpa);
        session.set_vring_num(index.into(), 128).unwrap();
        session
            .set_vring_addr(
                index.into(),
                VhostUserVringAddrFlags::empty(),
                at(place.desc),
                at(place.used),
                at(place.avail),
                0,
            )
            .unwrap();
        session.set_vring_kick(index, None).unwrap();
    }
    slot.card.lock().unwrap().advance(Duration::from_millis(600));
    port.look_at_link();
    assert!(port.status().link.is_up());
    assert_eq!(port.status().running, [true, true]);
    Rig {
        bench,
        slot,
        port,
        session,
        memory,
        rx,
        tx,
    }
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![7; len];
    frame[..6].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn trap_12_get_vring_base_is_true_though_the_queue_had_to_be_reset() {
    let rig = rig();
    rig.slot.card.lock().unwrap().wedge(RingName {
        direction: Direction::Rx,
        queue: 0,
    });
    let answer = rig.session.get_vring_base(0).unwrap();
    assert_eq!({ answer.num }, 0);
    assert_eq!(rig.port.resets(), 1);
    // The guest's driver has its ring back now; the other queue goes on.
    assert_eq!(rig.port.status().running, [false, true]);
}

#[test]
fn trap_16_what_a_message_changes_reaches_a_lane_that_had_to_be_reset() {
    let mut rig = rig();
    rig.slot.card.lock().unwrap().wedge(RingName {
        direction: Direction::Rx,
        queue: 0,
    });
    // The receive ring moves.
    let at = GUEST_BASE + 1024 * 128;
    let place = RingPlace {
        size: 128,
        desc: at,
        avail: at + 0x2000,
        used: at + 0x3000,
    };
    let mut rx = Rx::new(
        SplitQueue::new(&rig.memory, place),
        &rig.memory,
        RX_ARENA + MIB,
        128,
    );
    rx.fill(64, 1536, Layout::WithData, Form::Direct);
    let user = |gpa| rig.memory.user_address(gpa);
    rig.session
        .set_vring_addr(
            0,
            VhostUserVringAddrFlags::empty(),
            user(place.desc),
            user(place.used),
            user(place.avail),
            0,
        )
        .unwrap();
    assert_eq!(
        (rig.port.resets(), rig.port.status().running),
        (1, vec![true, true])
    );
    rig.slot.card.lock().unwrap().advance(Duration::from_millis(600));
    rig.port.look_at_link();
    until("the card has buffers", || {
        rig.slot.card.lock().unwrap().can_receive()
    });
    rig.slot.card.lock().unwrap().receive_from_wire(&frame(300));
    let mut got = None;
    until("the frame comes by the ring that was told", || {
        got = got.take().or_else(|| rx.try_recv());
        assert_eq!(
            rig.rx.try_recv(),
            None,
            "it came by the ring the front-end has replaced"
        );
        got.is_some()
    });
}

/// Holds up whoever wants the lanes stopped, as a session does that is busy with a message.
struct Busy {
    session: Arc<Session>,
    free: Mutex<Receiver<()>>,
}

impl Occupant for Busy {
    fn with_lanes_stopped(&self, work: &mut dyn FnMut() -> Lanes) {
        let _ = self.free.lock().unwrap().recv();
        self.session.with_lanes_stopped(work);
    }

    fn renew_discarded(&self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.session.renew_discarded()?)
    }
}

#[test]
fn trap_16_memory_of_a_lane_that_went_astray_is_not_unmapped() {
    let mut rig = rig();
    let (let_go, free) = channel();
    let busy: Arc<dyn Occupant> = Arc::new(Busy {
        session: Arc::clone(&rig.session),
        free: Mutex::new(free),
    });
    rig.port.occupy(Arc::downgrade(&busy));
    {
        let mut card = rig.slot.card.lock().unwrap();
        card.set_link(false);
        card.wedge(RingName {
            direction: Direction::Tx,
            queue: 0,
        });
    }
    // With the card, from memory that is about to go.
    rig.tx.send(&frame(300), Layout::WithData, Form::Direct);
    let port = Arc::clone(&rig.port);
    let gone = rig.memory.regions()[1].announcement();
    until("the card has the frame", || {
        let held = rig.port.with_lane(1, |lane| lane.footprint()).unwrap().unwrap();
        held.iter().any(|place| place.held > 0)
    });
    let links = std::thread::spawn(move || port.look_at_link());
    until("the tx lane is astray", || {
        rig.port.status().running == [true, false]
    });
    let before = rig.bench.map.snapshot().extents.len();
    let answer = rig.session.remove_mem_region(&VhostUserSingleMemoryRegion::new(
        gone.gpa,
        gone.len,
        gone.user,
        gone.file_offset,
    ));
    let after = rig.bench.map.snapshot().extents.len();
    let resets = rig.port.resets();
    let_go.send(()).unwrap();
    links.join().unwrap();
    assert!(
        after == before || resets > 0,
        "{answer:?}, unmapped while the card's queue holds a descriptor of it"
    );
}
