//! UDP listeners and their children (RFC 5660 §2.2, §5.3).

use std::time::Duration;

use super::*;

const TURN: Duration = Duration::from_secs(60);

fn from(n: u16) -> Flow {
    Flow { protocol: 17, local_port: 53, remote_port: 5000 + n, ..flow(0) }
}

fn port_53() -> Listener {
    Listener { protocol: 17, port: 53, ..listener() }
}

type Told = Arc<Mutex<Vec<(LatchId, LatchState)>>>;

/// A database with a listener for these, and what its holder was told.
fn listening(request: Request) -> (Database, Vec<ClassId>, LatchId, Told) {
    let (database, classes) = database();
    let told = Told::default();
    let heard = Arc::clone(&told);
    let holder = Box::new(move |alert: Alert| {
        assert!(alert.listener.is_some());
        heard.lock().unwrap().push((alert.latch, alert.state));
    });
    let parent = database.create_listener(port_53(), request, holder).unwrap();
    (database, classes, parent, told)
}

fn comes(database: &Database, flow: &Flow, class: impl Into<Option<ClassId>>) -> Verdict {
    database.check(Direction::Inbound, flow, class.into())
}

fn goes(database: &Database, flow: &Flow, class: ClassId) -> Verdict {
    database.check(Direction::Outbound, flow, Some(class))
}

// RFC 5660 §2.2, §2.3, §5.3: only whom it takes, under one class alone, and before the first datagram passes.
#[test]
fn a_datagram_gets_in_with_a_latch_or_not_at_all() {
    let (database, classes, parent, told) = listening(Request::peer(IdentityPattern::exact(identity(0))));
    assert!(matches!(database.create_listener(port_53(), any(), ignore()), Err(LatchError::Exists(_))));
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Drop, "no SA is known");
    install(&database, 1, classes[1]);
    assert_eq!(comes(&database, &from(1), classes[1]), Verdict::Drop, "not whom it takes");
    install(&database, 2, classes[0]);
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Drop, "an SA conflicts");
    database.removed(1);
    assert_eq!(comes(&database, &from(1), None), Verdict::Drop, "in clear");
    assert_eq!(comes(&database, &from(1), classes[1]), Verdict::Drop, "under an SA that is not there");
    assert_eq!(goes(&database, &from(1), classes[0]), Verdict::Drop, "nobody has come");
    assert_eq!(database.check_later(&from(1), Some(classes[0])), Verdict::Drop, "an ICMP error begins nothing");
    let fragment = Flow { local_port: 0, remote_port: 0, ..from(1) };
    assert_eq!(comes(&database, &fragment, classes[0]), Verdict::Drop, "it may be part of anybody's");
    assert!(told.lock().unwrap().is_empty() && database.list().is_empty());

    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Pass);
    let (child, class) = database.child(parent, &from(1)).unwrap();
    assert_eq!((class.peer.id.clone(), database.parent(child)), (identity(0), Some(parent)));
    assert_eq!(*told.lock().unwrap(), [(child, LatchState::Established)]);
    assert_eq!(goes(&database, &from(1), classes[0]), Verdict::Pass);
    for verdict in [comes(&database, &from(1), classes[1]), goes(&database, &from(1), classes[1])] {
        assert_eq!(verdict, Verdict::Drop);
    }
    assert_eq!(comes(&database, &fragment, classes[0]), Verdict::Pass);
    assert_eq!(comes(&database, &fragment, classes[1]), Verdict::Drop);
    // Another remote end has another latch.
    assert_eq!(comes(&database, &from(2), classes[0]), Verdict::Pass);
    assert_ne!(database.child(parent, &from(2)).unwrap().0, child);
    // It is the socket's, and nobody's to take.
    assert!(matches!(database.accept(parent, &from(1), None, ignore()), Err(LatchError::NotAccepted(_))));
    assert!(matches!(database.create(from(1), &any(), ignore()), Err(LatchError::Exists(_))));
    let listed = database.inquire(child).unwrap();
    assert_eq!((listed.listener, listed.automatic), (Some(parent), false));
}

// RFC 5660 §2.3: broken and told before the SA is accepted. After that nobody comes before the holder has said that it knows.
#[test]
fn the_next_latch_of_a_remote_end_waits_for_the_holder() {
    let (database, classes, parent, told) = listening(any());
    install(&database, 1, classes[0]);
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Pass);
    let (first, _) = database.child(parent, &from(1)).unwrap();
    database.before_install(classes[1], &everything(), &everything()).unwrap();
    assert_eq!(*told.lock().unwrap(), [(first, LatchState::Established), (first, LatchState::Broken)]);
    database.installed(2, classes[1], everything(), everything()).unwrap();
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Drop);
    assert!(matches!(database.child(parent, &from(1)), Err(LatchError::Broken(_))));
    database.removed(1);
    // Nothing conflicts any more, whoever it is now.
    for _ in 0..100 {
        assert_eq!(comes(&database, &from(1), classes[1]), Verdict::Drop, "the holder has not said that it knows");
        database.tend_datagrams(TURN);
    }
    assert!(matches!(database.create_child(parent, from(1), &any()), Err(LatchError::Exists(_))));
    assert!(database.end_child(first), "it has ended");
    database.release(first);
    assert_eq!(comes(&database, &from(1), classes[1]), Verdict::Pass);
    let (second, class) = database.child(parent, &from(1)).unwrap();
    assert!(second > first && class.peer.id == identity(1));
    // One that stands ends first.
    assert!(!database.end_child(second));
    assert_eq!(told.lock().unwrap().last(), Some(&(second, LatchState::Closed)));
    assert_eq!(comes(&database, &from(1), classes[1]), Verdict::Drop);
    assert!(database.end_child(second));
    database.release(second);
    assert_eq!(comes(&database, &from(1), classes[1]), Verdict::Pass);
}

#[test]
fn one_that_waits_is_the_same_when_the_conflict_is_over() {
    let (database, classes, parent, told) = listening(waiting());
    install(&database, 1, classes[0]);
    comes(&database, &from(1), classes[0]);
    let (child, _) = database.child(parent, &from(1)).unwrap();
    install(&database, 2, classes[1]);
    assert!(!database.has_ended(child));
    database.removed(2);
    assert_eq!(database.child(parent, &from(1)).unwrap().0, child);
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Pass);
    // A peer that is dead is not back soon: silence ends it.
    database.removed(1);
    database.peer_is_dead(classes[0]);
    (0..4).for_each(|_| database.tend_datagrams(TURN));
    assert!(!database.has_ended(child), "spoken to in the first of them");
    database.tend_datagrams(TURN);
    assert!(database.has_ended(child));
    let states: Vec<LatchState> = told.lock().unwrap().iter().map(|(_, state)| *state).collect();
    use LatchState::{Broken, Closed, Established};
    assert_eq!(states, [Established, Broken, Established, Broken, Closed]);
}

// RFC 4787 §4.3: the flow of who is silent for five minutes has ended.
#[test]
fn silence_ends_it_and_its_holder_is_told() {
    let (database, classes, parent, told) = listening(any());
    install(&database, 1, classes[0]);
    comes(&database, &from(1), classes[0]);
    comes(&database, &from(2), classes[0]);
    let (child, _) = database.child(parent, &from(1)).unwrap();
    for _ in 0..20 {
        database.tend_datagrams(TURN);
        // Either direction counts.
        goes(&database, &from(2), classes[0]);
    }
    assert!(database.has_ended(child) && database.child(parent, &from(2)).is_ok());
    assert_eq!(told.lock().unwrap().last(), Some(&(child, LatchState::Closed)));
    assert_eq!(told.lock().unwrap().len(), 3, "once");
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Drop, "until it is acknowledged");
}

#[test]
fn there_are_so_many_and_half_of_them_for_one_peer() {
    let (database, classes, parent, _) = listening(any());
    let of = |n: usize| TrafficSelector::host(format!("198.51.100.{n}").parse().unwrap());
    let flow =
        |peer: usize, n: usize| Flow { remote: of(peer).start, remote_port: 1 + u16::try_from(n).unwrap(), ..from(0) };
    for (n, class) in classes.iter().enumerate() {
        database.installed(u64::try_from(n).unwrap(), *class, everything(), vec![of(n)]).unwrap();
    }
    let admitted = |peer: usize| {
        (0..MAX_WAITING).filter(|n| comes(&database, &flow(peer, *n), classes[peer]) == Verdict::Pass).count()
    };
    assert_eq!((admitted(0), admitted(1), admitted(2)), (MAX_WAITING / 2, MAX_WAITING / 2, 0));
    assert!(matches!(database.create_child(parent, flow(2, 1), &any()), Err(LatchError::Full(_))));
    let (child, _) = database.child(parent, &flow(0, 0)).unwrap();
    database.end_child(child);
    assert_eq!(comes(&database, &flow(2, 0), classes[2]), Verdict::Drop, "it is not acknowledged");
    database.release(child);
    assert_eq!(comes(&database, &flow(2, 0), classes[2]), Verdict::Pass);
    assert_eq!(comes(&database, &flow(2, 1), classes[2]), Verdict::Drop);
    // All go with the listener.
    database.release(parent);
    assert!(database.list().is_empty() && database.pairs.is_empty() && database.flows.len() == 0);
    assert_eq!(database.latched.load(Ordering::SeqCst), 0);
    assert_eq!(comes(&database, &flow(2, 0), classes[0]), Verdict::Pass, "as without latches");
}

// RFC 5660 §5.3: an application that speaks first.
#[test]
fn a_flow_to_who_has_not_come_is_latched_as_wanted() {
    let nobody = Request::peer(IdentityPattern::exact(Identity::Fqdn("nobody.example".into())));
    let (database, classes, parent, told) = listening(nobody);
    let wanted = |n| Request::peer(IdentityPattern::exact(identity(n)));
    let create = |n: u16, wanted: &Request| database.create_child(parent, from(n), wanted);
    assert!(matches!(create(1, &wanted(0)), Err(LatchError::NoSa(_))));
    install(&database, 1, classes[0]);
    assert!(matches!(create(1, &wanted(1)), Err(LatchError::WrongPeer { .. })));
    let elsewhere = Flow { local_port: 54, ..from(1) };
    assert!(matches!(database.create_child(parent, elsewhere, &any()), Err(LatchError::NotAccepted(_))));
    assert!(matches!(database.create_child(LatchId(99), from(1), &any()), Err(LatchError::NotAccepted(_))));
    let odd = Flow { remote_port: 0, ..from(1) };
    assert!(matches!(database.create_child(parent, odd, &any()), Err(LatchError::NotAConnection(_))));
    let (child, _) = create(1, &wanted(0)).unwrap();
    assert_eq!(goes(&database, &from(1), classes[0]), Verdict::Pass);
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Pass);
    assert_eq!(comes(&database, &from(2), classes[0]), Verdict::Drop, "nobody else is let in");
    // The same once more; not for somebody else.
    assert_eq!(create(1, &any()).unwrap().0, child);
    assert!(matches!(create(1, &wanted(1)), Err(LatchError::WrongPeer { .. })));
    install(&database, 2, classes[1]);
    assert_eq!(*told.lock().unwrap(), [(child, LatchState::Broken)]);
    assert!(matches!(create(3, &any()), Err(LatchError::Conflict(_))));
}

// What was there before has not come by a child, and is nobody's.
#[test]
fn automatic_latches_give_way_to_a_listener() {
    let (database, classes) = database();
    database.latch_flows(OnBreak::Wait);
    install(&database, 1, classes[0]);
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Pass);
    let parent = database.create_listener(port_53(), any(), ignore()).unwrap();
    assert!(database.child(parent, &from(1)).is_err());
    assert_eq!(comes(&database, &from(1), classes[0]), Verdict::Pass);
    assert!(database.child(parent, &from(1)).is_ok());
}

// The system has no connections of UDP that could be looked for before an SA changes.
#[test]
fn where_the_system_does_esp_there_are_no_udp_listeners() {
    let (database, classes) = database();
    let barrier = Arc::new(FakeBarrier { alone: true, ..FakeBarrier::default() });
    database.set_barrier(Arc::clone(&barrier) as _);
    install(&database, 1, classes[0]);
    let refused = database.create_listener(port_53(), any(), ignore()).unwrap_err();
    assert!(matches!(&refused, LatchError::Unenforced { reason, .. } if reason.contains("by which SA")), "{refused}");
    assert!(barrier.ports.lock().unwrap().is_empty());
    // One of TCP for the same port is no matter.
    database.create_listener(Listener { protocol: 6, ..port_53() }, any(), ignore()).unwrap();
}
