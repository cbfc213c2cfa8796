//! Listener latches where the system does ESP (RFC 5660 §2.2, §5.1): nobody checks packets, and connections are those that
//! the system says there are.

use super::*;

struct System {
    database: Database,
    classes: Vec<ClassId>,
    barrier: Arc<FakeBarrier>,
    connections: Arc<Mutex<Vec<Flow>>>,
    told: Arc<Mutex<Vec<(Flow, LatchState)>>>,
}

impl System {
    fn new() -> Self {
        Self::with(Arc::new(FakeBarrier { alone: true, ..FakeBarrier::default() }), Arc::default())
    }

    fn with(barrier: Arc<FakeBarrier>, connections: Arc<Mutex<Vec<Flow>>>) -> Self {
        let (mut database, classes) = database();
        database.set_barrier(Arc::clone(&barrier) as _);
        let there = Arc::clone(&connections);
        database.connections = Connections(Box::new(move || Ok(there.lock().unwrap().clone())));
        Self { database, classes, barrier, connections, told: Arc::default() }
    }

    /// Another daemon, with what the one before left in the system.
    fn restarted(&self) -> Self {
        self.barrier.restart();
        Self::with(Arc::clone(&self.barrier), Arc::clone(&self.connections))
    }

    fn listen(&self) -> LatchId {
        let told = Arc::clone(&self.told);
        let holder = Box::new(move |alert: Alert| told.lock().unwrap().push((alert.flow, alert.state)));
        let request = Request { on_break: OnBreak::Wait, ..Request::peer(IdentityPattern::exact(identity(0))) };
        self.database.create_listener(listener(), request, holder).unwrap()
    }

    /// The passages that the barrier knows for the port.
    fn admitted(&self) -> Vec<Passage> {
        let ports = self.barrier.ports.lock().unwrap();
        ports.values().flatten().map(|claim| claim.passage).collect()
    }

    fn told(&self) -> Vec<(Flow, LatchState)> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }
}

// RFC 5660 §2.3 (23): where nothing else looks at packets, what passes by the barrier is broken, and the holder told.
#[test]
fn what_passes_by_the_barrier_is_broken_where_that_is_all_there_is() {
    for alone in [true, false] {
        let (database, classes) = database();
        let barrier = Arc::new(FakeBarrier { alone, ..FakeBarrier::default() });
        database.set_barrier(Arc::clone(&barrier) as _);
        install(&database, 1, classes[0]);
        let (holder, told) = counting();
        let (latch, _) = database.create(flow(1), &waiting(), holder).unwrap();
        barrier.passed_by.lock().unwrap().extend([flow(1), flow(2)]);
        database.verify_barrier();
        let expected = if alone { LatchState::Broken } else { LatchState::Established };
        assert_eq!(
            (database.inquire(latch).unwrap().state, told.load(Ordering::SeqCst)),
            (expected, usize::from(alone))
        );
    }
}

// RFC 5660 §2 (2): before establishment nothing is accepted.
#[test]
fn a_connection_that_was_there_before_the_listener_latch_is_closed_and_gets_none() {
    let system = System::new();
    install(&system.database, 1, system.classes[0]);
    system.connections.lock().unwrap().extend([flow(3), flow(1)]);
    let parent = system.listen();
    assert_eq!((system.barrier.passage(&flow(3)), system.barrier.passage(&flow(1))), (Some(Passage::None), None));
    system.database.find_connections();
    assert!(matches!(system.database.accept(parent, &flow(3), None, ignore()), Err(LatchError::NotAccepted(_))));
    assert!(system.database.list().is_empty());
}

// RFC 5660 §2.3: without anything that enforces it, there is no listener latch.
#[test]
fn no_listener_latch_where_the_system_refuses_its_port_or_says_nothing_of_its_connections() {
    let mut system = System::new();
    system.barrier.refuses.store(true, Ordering::SeqCst);
    let refused = system.database.create_listener(listener(), any(), ignore());
    assert!(matches!(refused, Err(LatchError::Unenforced { reason, .. }) if reason == "refused"));
    system.barrier.refuses.store(false, Ordering::SeqCst);
    system.database.connections = Connections(Box::new(|| Err(std::io::Error::other("gone"))));
    let refused = system.database.create_listener(listener(), any(), ignore());
    assert!(matches!(refused, Err(LatchError::Unenforced { reason, .. }) if reason.contains("gone")));
    assert!(system.barrier.ports.lock().unwrap().is_empty() && system.database.ports.is_empty());
}

#[test]
fn the_port_is_open_to_the_classes_that_the_listener_takes() {
    let system = System::new();
    install(&system.database, 1, system.classes[1]);
    let parent = system.listen();
    assert_eq!(system.admitted(), [Passage::None], "known, since it may conflict");
    // The newcomer is counted before it is installed.
    system.database.before_install(system.classes[0], &everything(), &everything()).unwrap();
    assert_eq!(system.admitted(), [Passage::None, Passage::Class(system.classes[0])]);
    system.database.removed(2);
    assert_eq!(system.admitted(), [Passage::None], "it was not installed after all");
    install(&system.database, 2, system.classes[0]);
    system.database.removed(1);
    assert_eq!(system.admitted(), [Passage::Class(system.classes[0])]);
    system.database.release(parent);
    assert!(system.barrier.ports.lock().unwrap().is_empty());
}

// RFC 5660 §2.3 (22, 24): what has come is latched, and the holder told, before an SA of another class is in.
#[test]
fn a_connection_that_nobody_has_accepted_breaks_before_a_conflicting_sa_is_in() {
    let system = System::new();
    let parent = system.listen();
    install(&system.database, 1, system.classes[0]);
    system.connections.lock().unwrap().push(flow(3));
    assert_eq!(system.told(), []);
    let broken = system.database.before_install(system.classes[1], &everything(), &everything()).unwrap();
    assert_eq!(broken.len(), 1);
    assert_eq!(system.told(), [(flow(3), LatchState::Established), (flow(3), LatchState::Broken)]);
    assert_eq!(system.barrier.passage(&flow(3)), Some(Passage::None));
    assert!(matches!(system.database.accept(parent, &flow(3), None, ignore()), Err(LatchError::Broken(_))));
    // This one was on its way.
    system.connections.lock().unwrap().push(flow(4));
    system.database.installed(2, system.classes[1], everything(), everything()).unwrap();
    assert_eq!(system.database.find(&flow(4)).unwrap().1, LatchState::Broken);
    // What comes now has come by nothing that anybody may come by.
    let late = Flow { remote_port: 99, ..flow(3) };
    system.connections.lock().unwrap().push(late);
    system.database.find_connections();
    assert_eq!((system.barrier.passage(&late), system.database.find(&late).is_none()), (Some(Passage::None), true));
}

// RFC 5660 §2.3 (21): what nobody has accepted is narrowed around like what is latched.
#[test]
fn what_nobody_has_accepted_is_left_out_of_what_a_stranger_asks_for() {
    let system = System::new();
    let _parent = system.listen();
    install(&system.database, 1, system.classes[0]);
    system.connections.lock().unwrap().push(flow(3));
    let reserved = |what: fn(&Class) -> Newcomer| system.database.reserved(&everything(), &everything(), what);
    assert_eq!(reserved(|_| Newcomer::Congruent), []);
    assert_eq!(system.told(), []);
    assert_eq!(reserved(|_| Newcomer::Stranger), [flow(3)]);
    assert_eq!(system.told(), [(flow(3), LatchState::Established)]);
}

#[test]
fn a_connection_is_latched_to_the_class_that_covered_it_before_that_has_gone() {
    let system = System::new();
    let parent = system.listen();
    install(&system.database, 1, system.classes[0]);
    install(&system.database, 2, system.classes[0]);
    system.connections.lock().unwrap().push(flow(3));
    system.database.removed(1);
    assert_eq!(system.told(), [], "another one like it is there");
    system.database.removed(2);
    assert_eq!(system.told(), [(flow(3), LatchState::Established)]);
    // Somebody else has the network now.
    install(&system.database, 3, system.classes[1]);
    assert_eq!(system.told(), [(flow(3), LatchState::Broken)]);
    system.database.removed(3);
    let (latch, class) = system.database.accept(parent, &flow(3), None, ignore()).unwrap();
    assert_eq!((class.peer.id.clone(), system.database.protector(latch)), (identity(0), Some(Protector::System)));
}

#[test]
fn a_dead_or_restarted_peer_and_a_change_of_policy_reach_what_nobody_has_accepted() {
    let dead = |system: &System| {
        system.database.removed(1);
        system.database.peer_is_dead(system.classes[0]);
    };
    let restarted = |system: &System| system.database.peer_restarted(system.classes[0]);
    let changed = |system: &System| system.database.policy_changed(|_, _| Some("changed".to_owned()));
    for event in [&dead as &dyn Fn(&System), &restarted, &changed] {
        let system = System::new();
        let parent = system.listen();
        install(&system.database, 1, system.classes[0]);
        system.connections.lock().unwrap().push(flow(3));
        event(&system);
        assert_eq!(system.told(), [(flow(3), LatchState::Established), (flow(3), LatchState::Broken)]);
        assert!(matches!(system.database.accept(parent, &flow(3), None, ignore()), Err(LatchError::Broken(_))));
    }
}

#[test]
fn a_connection_is_latched_when_it_is_accepted_or_looked_for_whichever_comes_first() {
    let system = System::new();
    let parent = system.listen();
    install(&system.database, 1, system.classes[0]);
    system.connections.lock().unwrap().extend([flow(3), flow(4), flow(1)]);
    let (first, _) = system.database.accept(parent, &flow(3), None, ignore()).unwrap();
    assert_eq!(system.told(), [(flow(3), LatchState::Established)]);
    system.database.find_connections();
    assert_eq!(system.told(), [(flow(4), LatchState::Established)], "flow 1 comes to no listener");
    let (second, _) = system.database.accept(parent, &flow(4), None, ignore()).unwrap();
    assert!(first < second && system.database.unaccepted().is_empty());
    assert_eq!(system.barrier.passage(&flow(4)), Some(Passage::Class(system.classes[0])));
    system.connections.lock().unwrap().push(Flow { remote_port: 99, ..flow(3) });
    // Who ends the listener does not end what has come.
    system.database.release(parent);
    assert_eq!(system.database.unaccepted().len(), 1);
}

#[test]
fn whose_connections_are_not_known_is_nobody_s() {
    let mut system = System::new();
    let parent = system.listen();
    install(&system.database, 1, system.classes[0]);
    assert_eq!(system.admitted(), [Passage::Class(system.classes[0])]);
    system.database.connections = Connections(Box::new(|| Err(std::io::Error::other("gone"))));
    install(&system.database, 2, system.classes[1]);
    system.database.removed(2);
    assert_eq!(system.admitted(), []);
    assert!(matches!(system.database.accept(parent, &flow(3), None, ignore()), Err(LatchError::NotAccepted(_))));
}

/// What happens, in the order in which the daemon does it.
#[derive(Clone, Debug)]
enum Event {
    /// An SA: asked for, in the system, known. Connections come before and after it is in the system.
    Install {
        sa: u64,
        class: usize,
        scope: usize,
        fails: bool,
        meanwhile: [Option<(usize, usize)>; 2],
    },
    /// The system has it no more, then the database.
    Remove {
        sa: u64,
        dead: bool,
    },
    /// A SYN under a class.
    Arrive {
        flow: usize,
        class: usize,
    },
    /// The system forgets a connection, and what is abandoned is looked through.
    Ended {
        flow: usize,
    },
    Listen,
    Unlisten,
    Accept {
        flow: usize,
    },
    Find,
    Create {
        flow: usize,
    },
    Reserve {
        flow: usize,
    },
    Release {
        nth: usize,
    },
    Break {
        nth: usize,
    },
    PeerRestart {
        class: usize,
    },
    Policy {
        class: usize,
    },
    /// The daemon dies, and another one finds what the system has.
    Restart,
}

/// The system's SAs and connections, and by which class each came to a listener.
struct Kernel {
    system: System,
    sas: BTreeMap<u64, (usize, usize)>,
    came_by: BTreeMap<usize, usize>,
    listener: Option<LatchId>,
    larval: Vec<LatchId>,
    classes_of: BTreeMap<LatchId, Identity>,
}

impl Kernel {
    fn new() -> Self {
        let (system, sas) = (System::new(), BTreeMap::new());
        Self { system, sas, came_by: BTreeMap::new(), listener: None, larval: Vec::new(), classes_of: BTreeMap::new() }
    }

    /// The system lets pass what an SA of this class carries of the flow, if one does.
    fn passes(&self, n: usize, class: usize) -> bool {
        let wanted = Passage::Class(self.system.classes[class]);
        let carries = |(of, scope): &(usize, usize)| *of == class && in_scope(*scope, n);
        let ports = self.system.barrier.ports.lock().unwrap();
        let allowed = match (self.system.barrier.passage(&flow(n)), ports.iter().find(|(port, _)| port.meets(&flow(n))))
        {
            (Some(passage), _) => passage == wanted,
            (None, None) => true,
            (None, Some((_, claims))) => {
                let mut about =
                    claims.iter().filter(|claim| covers(&claim.local_ts, &claim.remote_ts, &flow(n))).peekable();
                about.peek().is_some() && about.all(|claim| claim.passage == wanted)
            }
        };
        allowed && self.sas.values().any(carries)
    }

    fn arrive(&mut self, n: usize, class: usize) {
        let mut connections = self.system.connections.lock().unwrap();
        if connections.contains(&flow(n)) || !self.passes(n, class) {
            return;
        }
        connections.push(flow(n));
        if n >= FLOWS && self.listener.is_some() {
            self.came_by.insert(n, class);
        }
    }

    fn end(&mut self, n: usize) {
        self.system.connections.lock().unwrap().retain(|there| *there != flow(n));
        self.came_by.remove(&n);
        let connections = self.system.connections.lock().unwrap().clone();
        self.system.database.lift_abandoned(|flow| !connections.contains(flow));
        self.system.database.lift_abandoned_ports(|port| connections.iter().any(|flow| port.meets(flow)));
    }

    fn install(&mut self, sa: u64, class: usize, scope: usize, fails: bool, meanwhile: [Option<(usize, usize)>; 2]) {
        let (number, ts) = (self.system.classes[class], scope_ts(scope));
        self.system.database.before_install(number, &everything(), &ts).unwrap();
        // RFC 5660 §2.3: broken, and its holder told, prior to accepting.
        for (_, flow, state, latched) in self.system.database.list() {
            let betrayed = *latched != super::class(class) && covers(&everything(), &ts, &flow);
            assert!(!betrayed || state != LatchState::Established, "{flow}");
        }
        let [before, after] = meanwhile;
        before.into_iter().for_each(|(n, class)| self.arrive(n, class));
        if fails {
            return self.remove(sa, false);
        }
        self.sas.insert(sa, (class, scope));
        after.into_iter().for_each(|(n, class)| self.arrive(n, class));
        self.holds();
        self.system.database.installed(sa, number, everything(), ts).unwrap();
    }

    fn remove(&mut self, sa: u64, dead: bool) {
        let gone = self.sas.remove(&sa);
        self.holds();
        self.system.database.removed(sa);
        if let Some((class, _)) = gone.filter(|_| dead) {
            self.system.database.peer_is_dead(self.system.classes[class]);
        }
    }

    fn carry_out(&mut self, event: Event) {
        let database = &self.system.database;
        let nth = |nth: usize| {
            let latches = database.list();
            latches.get(nth % latches.len().max(1)).map(|(id, ..)| *id)
        };
        match event {
            Event::Install { sa, class, scope, fails, meanwhile } => {
                // A number is not used twice.
                self.remove(sa, false);
                self.install(sa, class, scope, fails, meanwhile);
            }
            Event::Remove { sa, dead } => self.remove(sa, dead),
            Event::Arrive { flow, class } => self.arrive(flow, class),
            Event::Ended { flow } => self.end(flow),
            Event::Listen if self.listener.is_none() => self.listener = Some(self.system.listen()),
            Event::Listen => {}
            Event::Unlisten => self.listener.take().into_iter().for_each(|listener| database.release(listener)),
            Event::Accept { flow: n } => {
                let there = self.system.connections.lock().unwrap().contains(&flow(n));
                if let Some(listener) = self.listener.filter(|_| there)
                    && let Ok((_, class)) = database.accept(listener, &flow(n), None, ignore())
                {
                    let came_by = self.came_by.get(&n).map(|class| identity(*class));
                    assert_eq!(Some(&class.peer.id), came_by.as_ref(), "accepted as somebody else's");
                }
            }
            Event::Find => database.find_connections(),
            // Of a connection that is to be made: that a released one has ended is the server's to see to.
            Event::Create { flow: n } | Event::Reserve { flow: n } if self.came_by.contains_key(&n) => {}
            Event::Create { flow: n } => drop(database.create(flow(n), &waiting(), ignore())),
            Event::Reserve { flow: n } => self.larval.extend(database.reserve(flow(n))),
            Event::Release { nth: n } => {
                if let Some(latch) = self.larval.pop().or_else(|| nth(n)) {
                    database.release(latch);
                }
            }
            Event::Break { nth: n } => {
                nth(n).into_iter().for_each(|latch| assert!(database.break_latch(latch, "test")));
            }
            Event::PeerRestart { class } => database.peer_restarted(self.system.classes[class]),
            Event::Policy { class } => database
                .policy_changed(|_, latched| (latched.peer.id == identity(class)).then(|| "forbidden".to_owned())),
            Event::Restart => {
                // Its SAs are removed by its successor.
                let came_by = std::mem::take(&mut self.came_by);
                *self = Self { system: self.system.restarted(), came_by, ..Self::new() };
            }
        }
        self.holds();
    }

    /// At any moment.
    fn holds(&mut self) {
        // RFC 5660 §2: what came by one class never passes under another, whether somebody has taken it or not.
        for (n, came_by) in &self.came_by {
            for class in (0..3).filter(|class| class != came_by) {
                assert!(!self.passes(*n, class), "flow {n} came by {came_by} and passes under {class}");
            }
        }
        for (id, flow, state, class) in self.system.database.list() {
            let number = self.system.database.number_of(&class).unwrap();
            let passage = if state == LatchState::Established { Passage::Class(number) } else { Passage::None };
            assert_eq!(self.system.barrier.passage(&flow), Some(passage));
            // RFC 5660 §2: "MUST remain unchanged".
            let id = self.classes_of.entry(id).or_insert_with(|| class.peer.id.clone());
            assert_eq!(*id, class.peer.id);
        }
    }
}

fn event() -> impl Strategy<Value = Event> {
    let (sa, class, scope, any_flow) = (|| 0..4_u64, || 0..3_usize, || 0..=ALL_FLOWS, || 0..ALL_FLOWS);
    let listened = || FLOWS..ALL_FLOWS;
    let arrival = move || prop::option::of((listened(), class()));
    prop_oneof![
        5 => (sa(), class(), scope(), prop::bool::weighted(0.2), arrival(), arrival()).prop_map(
            |(sa, class, scope, fails, before, after)| {
                Event::Install { sa, class, scope, fails, meanwhile: [before, after] }
            }
        ),
        3 => (sa(), prop::bool::weighted(0.2)).prop_map(|(sa, dead)| Event::Remove { sa, dead }),
        5 => (listened(), class()).prop_map(|(flow, class)| Event::Arrive { flow, class }),
        2 => any_flow().prop_map(|flow| Event::Ended { flow }),
        4 => Just(Event::Listen),
        1 => Just(Event::Unlisten),
        3 => listened().prop_map(|flow| Event::Accept { flow }),
        1 => Just(Event::Find),
        2 => any_flow().prop_map(|flow| Event::Create { flow }),
        1 => any_flow().prop_map(|flow| Event::Reserve { flow }),
        2 => (0..8_usize).prop_map(|nth| Event::Release { nth }),
        1 => (0..8_usize).prop_map(|nth| Event::Break { nth }),
        1 => class().prop_map(|class| Event::PeerRestart { class }),
        1 => (0..4_usize).prop_map(|class| Event::Policy { class }),
        1 => Just(Event::Restart),
    ]
}

proptest! {
    #![proptest_config(cases(512))]

    // RFC 5660 §2, §2.3: the same in any order of events, and with connections that come at any moment, also while an SA goes in.
    #[test]
    fn what_came_by_one_class_never_passes_under_another(events in prop::collection::vec(event(), 1..60)) {
        let mut kernel = Kernel::new();
        for event in events {
            kernel.carry_out(event);
        }
    }
}
