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
        let (mut database, classes) = database();
        let barrier = Arc::new(FakeBarrier { alone: true, ..FakeBarrier::default() });
        database.set_barrier(Arc::clone(&barrier) as _);
        let connections: Arc<Mutex<Vec<Flow>>> = Arc::default();
        let there = Arc::clone(&connections);
        database.connections = Connections(Box::new(move || Ok(there.lock().unwrap().clone())));
        Self { database, classes: classes.to_vec(), barrier, connections, told: Arc::default() }
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
