//! Latches of flows that nobody asked for.

use std::time::Duration;

use super::*;

const TURN: Duration = Duration::from_secs(60);

fn automatic() -> (Database, Vec<ClassId>) {
    let (database, classes) = database();
    database.latch_flows(OnBreak::Wait);
    (database, classes)
}

fn nth(n: u16) -> Flow {
    Flow { protocol: 6, local_port: 1000 + n, ..flow(0) }
}

fn silence(database: &Database, turns: u32) {
    for _ in 0..turns {
        database.tend_automatic(TURN);
    }
}

fn counts(database: &Database) -> AutomaticFlows {
    database.automatic_flows().unwrap()
}

fn standing(database: &Database) -> usize {
    database.list_after(LatchId(0), 1000).iter().filter(|listed| listed.automatic).count()
}

fn passes(database: &Database, flow: &Flow, class: ClassId) -> bool {
    database.check(Direction::Outbound, flow, Some(class)) == Verdict::Pass
}

#[test]
fn a_flow_stays_with_the_class_of_its_first_sa() {
    let (database, classes) = automatic();
    install(&database, 1, classes[0]);
    assert!(passes(&database, &nth(1), classes[0]));
    assert_eq!(standing(&database), 1);
    assert!(database.list().is_empty(), "no application's");
    assert_eq!(database.check(Direction::Inbound, &nth(1), Some(classes[1])), Verdict::Drop);
    assert_eq!(counts(&database), AutomaticFlows { latches: 1, dropped: 1, ..AutomaticFlows::default() });
    // RFC 5660 §2.3: no packet passes after the break, and what comes later is not another flow.
    let broken = database.before_install(classes[1], &everything(), &everything()).unwrap();
    assert_eq!(broken.len(), 1);
    database.installed(2, classes[1], everything(), everything()).unwrap();
    database.removed(1);
    assert!(!passes(&database, &nth(1), classes[0]) && !passes(&database, &nth(1), classes[1]));
    assert!(passes(&database, &nth(2), classes[1]), "a flow that begins now is the newcomer's");
    // What waits goes on.
    database.removed(2);
    install(&database, 3, classes[0]);
    assert!(passes(&database, &nth(1), classes[0]) && !passes(&database, &nth(2), classes[0]));
}

#[test]
fn without_the_setting_there_are_none() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    assert!(passes(&database, &nth(1), classes[0]));
    assert_eq!((standing(&database), database.automatic_flows()), (0, None));
}

#[test]
fn what_has_no_connection_or_no_one_class_is_not_latched() {
    let (database, classes) = automatic();
    install(&database, 1, classes[0]);
    let icmp = Flow { protocol: 1, ..nth(1) };
    let fragment = Flow { local_port: 0, remote_port: 0, ..nth(1) };
    assert!(passes(&database, &icmp, classes[0]) && passes(&database, &fragment, classes[0]));
    install(&database, 2, classes[1]);
    assert!(passes(&database, &nth(1), classes[0]));
    assert_eq!(database.check(Direction::Outbound, &nth(2), None), Verdict::Pass);
    assert_eq!(standing(&database), 0);
    let expected = AutomaticFlows { in_conflict: 1, ..AutomaticFlows::default() };
    assert_eq!(counts(&database), expected, "one could have been latched but for the conflict");
}

// RFC 5382 §5, RFC 4787 §4.3: silence is the end of a flow, sooner after FIN or RST.
#[test]
fn a_flow_ends_when_it_has_been_silent_for_long_enough() {
    let (database, classes) = automatic();
    install(&database, 1, classes[0]);
    let udp = Flow { protocol: 17, ..nth(3) };
    let all = [nth(1), nth(2), udp];
    let talk = |flows: &[Flow]| assert!(flows.iter().all(|flow| passes(&database, flow, classes[0])));
    talk(&all);
    database.ends(&nth(2));
    let turns = |n| silence(&database, n);
    // The packets that made them were in the first turn.
    turns(4);
    talk(&all);
    turns(4);
    assert_eq!(standing(&database), 3, "they spoke");
    turns(1);
    assert_eq!(standing(&database), 2, "FIN, and four minutes of silence");
    turns(1);
    assert!(database.find(&udp).is_none() && database.find(&nth(1)).is_some());
    turns(200);
    assert_eq!(standing(&database), 0);
    assert!(database.pairs.is_empty() && database.flows.len() == 0);
}

#[test]
fn a_broken_one_stays_for_as_long_as_somebody_tries() {
    let (database, classes) = automatic();
    install(&database, 1, classes[0]);
    assert!(passes(&database, &nth(1), classes[0]));
    install(&database, 2, classes[1]);
    database.removed(1);
    for _ in 0..20 {
        assert!(!passes(&database, &nth(1), classes[1]));
        database.tend_automatic(TURN);
    }
    assert_eq!(database.find(&nth(1)).unwrap().1, LatchState::Broken);
    silence(&database, 4);
    assert!(passes(&database, &nth(1), classes[1]), "another connection with the same ports");
}

#[test]
fn there_are_so_many_and_half_of_them_for_one_peer() {
    let (database, classes) = automatic();
    let (ours, theirs) = (TrafficSelector::host(flow(0).local), TrafficSelector::host(flow(0).remote));
    let other = Flow { remote: "198.51.100.77".parse().unwrap(), ..nth(0) };
    database.installed(1, classes[0], vec![ours], vec![theirs]).unwrap();
    database.installed(2, classes[1], vec![ours], vec![TrafficSelector::host(other.remote)]).unwrap();
    (0..100).for_each(|n| assert!(passes(&database, &nth(n), classes[0])));
    assert_eq!(standing(&database), 20);
    (0..100).for_each(|n| assert!(passes(&database, &Flow { local_port: 1000 + n, ..other }, classes[1])));
    assert_eq!(standing(&database), 40);
    assert_eq!(counts(&database), AutomaticFlows { latches: 40, without_room: 160, ..AutomaticFlows::default() });
    // Places become free.
    silence(&database, 200);
    assert!(passes(&database, &nth(50), classes[0]));
    assert_eq!(standing(&database), 1);
}

// What cannot be latched does not wait for those who can, nor make them wait; and is latched as soon as it can be.
#[test]
fn packets_that_pass_without_a_latch_ask_for_one_when_something_has_changed() {
    let (database, classes) = automatic();
    // With somebody else at the database all the time.
    let passes_without = |flow: &Flow, class| {
        let control = database.control();
        let (sender, verdict) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| sender.send(database.check(Direction::Outbound, flow, Some(class))));
            let verdict = verdict.recv_timeout(Duration::from_secs(10));
            drop(control);
            verdict == Ok(Verdict::Pass)
        })
    };
    install(&database, 1, classes[0]);
    install(&database, 2, classes[1]);
    assert!(passes(&database, &nth(1), classes[0]) && passes_without(&nth(1), classes[0]));
    database.removed(2);
    assert!(passes(&database, &nth(1), classes[0]));
    assert_eq!(standing(&database), 1);
    (2..=21).for_each(|n| assert!(passes(&database, &nth(n), classes[0])));
    assert_eq!(standing(&database), 20);
    assert!((22..90).all(|n| passes_without(&nth(n), classes[0])));
    silence(&database, 200);
    (22..24).for_each(|n| assert!(passes(&database, &nth(n), classes[0])));
    let expected = AutomaticFlows { latches: 2, without_room: 69, in_conflict: 2, dropped: 0 };
    assert_eq!(counts(&database), expected);
}

// An application's wish goes first; what is broken stays broken.
#[test]
fn an_application_gets_its_own() {
    let (database, classes) = automatic();
    install(&database, 1, classes[0]);
    assert!(passes(&database, &nth(1), classes[0]) && passes(&database, &nth(2), classes[0]));
    // What it cannot have does not set the flow free.
    let stranger = Request::peer(IdentityPattern::exact(identity(1)));
    assert!(matches!(database.create(nth(1), &stranger, ignore()), Err(LatchError::WrongPeer { .. })));
    database.removed(1);
    assert!(matches!(database.create(nth(1), &any(), ignore()), Err(LatchError::NoSa(_))));
    assert_eq!(standing(&database), 2);
    assert_eq!(database.check(Direction::Inbound, &nth(1), Some(classes[1])), Verdict::Drop);
    install(&database, 1, classes[0]);
    let (id, _) = database.create(nth(1), &any(), ignore()).unwrap();
    assert_eq!((standing(&database), database.list().len()), (1, 1));
    silence(&database, 200);
    assert_eq!(database.list().len(), 1, "it is nobody's to end");
    database.release(id);
    assert!(passes(&database, &nth(2), classes[0]));
    install(&database, 2, classes[1]);
    database.removed(1);
    assert!(matches!(database.create(nth(2), &any(), ignore()), Err(LatchError::Exists(_))));
}

proptest! {
    // RFC 5660 §2: "MUST NOT" for both directions, whatever comes and goes; a flow is forgotten only after silence.
    #[test]
    fn a_flow_that_has_not_ended_never_passes_under_another_class(
        steps in prop::collection::vec((0_u8..4, 0_usize..3, 0_u64..3, 0_u16..4), 1..80)
    ) {
        let (database, classes) = automatic();
        let mut first: HashMap<u16, usize> = HashMap::new();
        let mut silent: HashMap<u16, u32> = HashMap::new();
        for (what, class, sa, n) in steps {
            match what {
                0 => install(&database, sa, classes[class]),
                1 => database.removed(sa),
                2 => {
                    silent.insert(n, 0);
                    let direction = if sa == 0 { Direction::Outbound } else { Direction::Inbound };
                    let passed = database.check(direction, &nth(n), Some(classes[class])) == Verdict::Pass;
                    if database.find(&nth(n)).is_none() {
                        // Nobody's: several classes cover it, or none.
                        first.remove(&n);
                    } else if passed {
                        prop_assert_eq!(*first.entry(n).or_insert(class), class);
                    }
                }
                _ => {
                    database.tend_automatic(TURN);
                    silent.values_mut().for_each(|turns| *turns += 1);
                }
            }
            for n in 0..4 {
                let known = first.contains_key(&n);
                prop_assert!(!known || database.find(&nth(n)).is_some() || silent[&n] >= 4, "forgotten too soon");
                if database.find(&nth(n)).is_none() {
                    first.remove(&n);
                }
            }
        }
    }
}
