#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ipsec::guard::{ClassId, Direction, FlowGuard, Verdict};
use ipsec::plane::{EspSuite, Mode};
use ipsec::selector::{Flow, TrafficSelector};
use ipsec::transform::{Encr, Integ};
use pad::{Identity, IdentityPattern, PeerIdentity, Proof};
use proptest::prelude::*;

use super::*;
use crate::database::{Alert, Class, Database, LatchError, LatchId, Listener, Request};

/// A daemon's database, the system between it and a socket, and an application's roster, in a time of our own.
struct World {
    database: Database,
    classes: Vec<ClassId>,
    listener: LatchId,
    alerts: Arc<Mutex<Vec<Alert>>>,
    roster: Roster,
    now: Instant,
    /// Past the check, not yet in the queue: until when, and by whom.
    on_its_way: Vec<(Instant, SocketAddr, ClassId)>,
    queue: RefCell<VecDeque<(SocketAddr, ClassId)>>,
    /// Acknowledged, and soon to be released.
    released: Vec<(Instant, LatchId)>,
    questions: Vec<(Question, Option<UdpPeer>)>,
    /// Of whom datagrams were given out.
    heard: Vec<ClassId>,
}

const PLACES: u16 = 2;

impl World {
    fn new(buffer: usize) -> Self {
        let database = Database::new();
        let classes = (0..3).map(|n| database.intern(class(n))).collect();
        let listener = Listener { protocol: 17, local: Some(flow(0).local), ipv4: true, ipv6: false, port: 53 };
        let alerts = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&alerts);
        let holder = Box::new(move |alert| told.lock().unwrap_or_else(PoisonError::into_inner).push(alert));
        let listener = database.create_listener(listener, Request::peer(IdentityPattern::any()), holder).unwrap();
        Self {
            database,
            classes,
            listener,
            alerts,
            roster: Roster::new(Disposition::Reset, buffer),
            now: Instant::now(),
            on_its_way: Vec::new(),
            queue: RefCell::default(),
            released: Vec::new(),
            questions: Vec::new(),
            heard: Vec::new(),
        }
    }

    fn install(&self, sa: u64, class: usize) {
        self.database.before_install(self.classes[class], &everything(), &everything()).unwrap();
        self.database.installed(sa, self.classes[class], everything(), everything()).unwrap();
    }

    /// A packet is checked, and takes its time to the socket.
    fn arrive(&mut self, class: usize, place: u16, delay: Duration) {
        let class = self.classes[class];
        if self.database.check(Direction::Inbound, &flow(place), Some(class)) == Verdict::Pass {
            self.on_its_way.push((self.now + delay, remote(place), class));
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        let queue = self.queue.get_mut();
        self.on_its_way.sort_by_key(|(at, ..)| *at);
        self.on_its_way.retain(|(at, from, class)| {
            if *at <= now {
                queue.push_back((*from, *class));
            }
            *at > now
        });
        let database = &self.database;
        self.released.retain(|(at, latch)| {
            if *at <= now {
                database.release(*latch);
            }
            *at > now
        });
    }

    /// The application reads once; true if there was a datagram.
    fn read(&mut self) -> Step {
        for alert in std::mem::take(&mut *self.alerts.lock().unwrap()) {
            let change = Change { state: alert.state.into(), reason: alert.reason };
            self.roster.heard(alert.latch.0, &change, self.now, 0);
        }
        let (queue, mut buffer) = (&self.queue, [0; 4]);
        let step = self.roster.receive(self.now, &mut buffer, |buffer| {
            let (from, class) = queue.borrow_mut().pop_front().ok_or(io::ErrorKind::WouldBlock)?;
            buffer[0] = u8::try_from(class.0).unwrap();
            Ok((1, from))
        });
        let step = step.unwrap();
        if let Step::Datagram(_, peer) = &step {
            let came_by = ClassId(buffer[0].into());
            assert_eq!(peer.class(), Some(came_by.0), "a datagram was given out as somebody else's");
            self.heard.push(came_by);
        }
        while let Some(latch) = self.roster.acknowledged() {
            // As the server does.
            if self.database.end_child(LatchId(latch)) {
                self.released.push((self.now + SETTLING, LatchId(latch)));
            }
        }
        step
    }

    /// The daemon says who it is.
    fn ask(&self, question: Question) -> Option<UdpPeer> {
        let flow = Flow { remote: question.from.ip(), remote_port: question.from.port(), ..flow(0) };
        match self.database.child(self.listener, &flow) {
            Ok((latch, class)) => Some(self.peer(latch, &class, question.from)),
            Err(LatchError::NotAccepted(_) | LatchError::Broken(_)) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn peer(&self, latch: LatchId, class: &Class, remote: SocketAddr) -> UdpPeer {
        let number = self.database.number_of(class).map(|class| class.0);
        let created = Created {
            latch: latch.0,
            local: "192.0.2.1:53".parse().unwrap(),
            remote,
            peer: class.into(),
            protection: class.into(),
            guard: None,
            class: number,
        };
        UdpPeer::new(created, Disposition::Reset, watch::channel(None).1)
    }

    /// Reads until there is nothing to read.
    fn read_all(&mut self) -> usize {
        let mut read = 0;
        loop {
            match self.read() {
                Step::Datagram(..) => read += 1,
                Step::Ask(question) => self.roster.answered(question, self.ask(question)),
                Step::Again => {}
                Step::Wait(_) => return read,
            }
        }
    }
}

// RFC 5660 §5.3: another peer behind the same address while datagrams of the first one wait.
#[test]
fn datagrams_that_wait_are_not_taken_for_the_next_peer_s() {
    let mut world = World::new(0);
    world.install(1, 0);
    world.arrive(0, 1, Duration::ZERO);
    world.pass(Duration::ZERO);
    assert_eq!(world.read_all(), 1);
    let first = world.roster.peers().pop().unwrap();
    // Two more wait, one is on its way, and then the address is somebody else's.
    world.arrive(0, 1, Duration::ZERO);
    world.arrive(0, 1, Duration::ZERO);
    world.arrive(0, 1, SETTLING / 2);
    world.pass(Duration::ZERO);
    world.database.removed(1);
    world.install(2, 1);
    world.arrive(1, 1, Duration::ZERO);
    world.pass(Duration::ZERO);
    assert_eq!((world.read_all(), world.roster.peers().len()), (0, 0), "they are nobody's any more");
    assert!(world.roster.send(&first, |_| Ok(())).is_err());
    // The queue was empty, but something was on its way still.
    world.arrive(1, 1, Duration::ZERO);
    world.pass(SETTLING * 2);
    assert_eq!(world.read_all(), 0);
    world.arrive(1, 1, Duration::ZERO);
    world.pass(SETTLING * 2);
    assert_eq!(world.read_all(), 0, "it is just acknowledged");
    world.arrive(1, 1, Duration::ZERO);
    world.pass(SETTLING * 2);
    assert_eq!(world.read_all(), 1);
    let second = world.roster.peers().pop().unwrap();
    assert!(second.addr() == first.addr() && second != first && second.identity().id.text == "peer-1.example");
    assert!(world.roster.send(&first, |_| Ok(())).is_err() && world.roster.send(&second, |_| Ok(())).is_ok());
}

#[test]
fn a_socket_that_is_never_empty_still_comes_to_an_end_with_who_has_ended() {
    let mut world = World::new(LEAST * 10);
    world.install(1, 0);
    world.arrive(0, 1, Duration::ZERO);
    world.pass(Duration::ZERO);
    world.read_all();
    let first = world.roster.peers().pop().unwrap();
    world.database.end_child(LatchId(first.latch()));
    for n in 0..40 {
        (0..2).for_each(|_| world.arrive(0, 0, Duration::ZERO));
        world.pass(SETTLING / 4);
        let step = world.read();
        assert!(!matches!(step, Step::Wait(_)), "the queue is never empty");
        if let Step::Ask(question) = step {
            world.roster.answered(question, world.ask(question));
        }
        let acknowledged = !world.roster.ended.contains_key(&first.latch());
        assert!(acknowledged == (n > 16) || (15..19).contains(&n), "{n}");
    }
}

#[test]
fn an_answer_that_comes_too_late_is_none() {
    let mut world = World::new(0);
    world.install(1, 0);
    world.arrive(0, 1, Duration::ZERO);
    world.pass(Duration::ZERO);
    let Step::Ask(question) = world.read() else { panic!() };
    let late = world.ask(question);
    // Who waited for it gave up; somebody else asks, and so on.
    assert_eq!(world.read_all(), 1);
    let latch = world.roster.peers()[0].latch();
    world.database.end_child(LatchId(latch));
    world.read_all();
    world.pass(SETTLING);
    world.read_all();
    assert!(world.roster.peers.is_empty() && world.roster.places.is_empty() && world.roster.ended.is_empty());
    world.roster.answered(question, late.clone());
    assert!(world.roster.peers.is_empty());
    // The same for a latch that was asked for.
    let asked = late.unwrap();
    world.roster.begin();
    world.roster.heard(asked.latch(), &Change { state: State::Closed, reason: String::new() }, world.now, 0);
    world.pass(SETTLING);
    world.read_all();
    assert!(!world.roster.latched(asked.clone()));
    world.roster.given_up();
    assert!(world.roster.peers.is_empty() && world.roster.recent.is_empty());
}

#[derive(Clone, Debug)]
enum Event {
    Install(u64, usize),
    Remove(u64),
    Arrive(usize, u16, u32),
    Pass(u32),
    Read,
    /// The daemon's answers come when they come.
    Answer,
    Silence,
    Latch(u16),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        1 => (0..3_u64, 0..3_usize).prop_map(|(sa, class)| Event::Install(sa, class)),
        1 => (0..3_u64).prop_map(Event::Remove),
        6 => (0..3_usize, 0..PLACES, 0..4_u32).prop_map(|(class, place, delay)| Event::Arrive(class, place, delay)),
        4 => (1..8_u32).prop_map(Event::Pass),
        6 => Just(Event::Read),
        3 => Just(Event::Answer),
        1 => Just(Event::Silence),
        1 => (0..PLACES).prop_map(Event::Latch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    // RFC 5660 §5.3, §2: whatever comes and goes, and however late anything is, no datagram is given out as somebody else's: `read`
    // looks at each.
    #[test]
    fn a_datagram_is_given_out_with_the_latch_that_it_came_under(events in prop::collection::vec(event(), 1..120)) {
        let mut world = World::new(LEAST * 3);
        for event in events {
            match event {
                Event::Install(sa, class) => world.install(sa, class),
                Event::Remove(sa) => world.database.removed(sa),
                Event::Arrive(class, place, delay) => world.arrive(class, place, SETTLING * delay / 4),
                Event::Pass(time) => world.pass(SETTLING * time / 4),
                Event::Read => if let Step::Ask(question) = world.read() {
                    let answer = world.ask(question);
                    world.questions.push((question, answer));
                },
                Event::Answer => if !world.questions.is_empty() {
                    let (question, answer) = world.questions.remove(0);
                    world.roster.answered(question, answer);
                },
                Event::Silence => world.database.tend_datagrams(Duration::from_secs(200)),
                Event::Latch(place) => {
                    let made = world.database.create_child(world.listener, flow(place), &Request::peer(IdentityPattern::any()));
                    if let Ok((latch, class)) = made {
                        let peer = world.peer(latch, &class, remote(place));
                        world.roster.begin();
                        world.read();
                        world.roster.latched(peer);
                        world.roster.given_up();
                    }
                }
            }
        }
        // And nobody is kept out for ever.
        (0..3).for_each(|sa| world.database.removed(sa));
        for _ in 0..3 {
            let questions = std::mem::take(&mut world.questions);
            questions.into_iter().for_each(|(question, answer)| world.roster.answered(question, answer));
            world.read_all();
            world.pass(SETTLING);
        }
        world.install(0, 1);
        for _ in 0..3 {
            world.read_all();
            world.pass(SETTLING);
        }
        world.heard.clear();
        world.arrive(1, 0, Duration::ZERO);
        world.pass(Duration::ZERO);
        world.read_all();
        prop_assert_eq!(&world.heard, &[world.classes[1]]);
    }
}

fn flow(place: u16) -> Flow {
    Flow {
        protocol: 17,
        local: "192.0.2.1".parse().unwrap(),
        local_port: 53,
        remote: "198.51.100.1".parse().unwrap(),
        remote_port: 5000 + place,
    }
}

fn remote(place: u16) -> SocketAddr {
    SocketAddr::new(flow(place).remote, flow(place).remote_port)
}

fn everything() -> Vec<TrafficSelector> {
    vec![TrafficSelector::network("0.0.0.0".parse().unwrap(), 0).unwrap()]
}

fn class(n: usize) -> Class {
    Class {
        peer: Arc::new(PeerIdentity {
            id: Identity::Fqdn(format!("peer-{n}.example")),
            local_id: Identity::Fqdn("us.example".into()),
            proof: Proof::PreSharedKey,
            entry: "net".into(),
        }),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true },
        replay_protection: true,
    }
}
