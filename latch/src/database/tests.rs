#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::sync::atomic::{AtomicBool, AtomicU64};

use ipsec::transform::{Encr, Integ};
use pad::AuthMethod;
use proptest::prelude::*;

use super::*;

#[test]
fn no_latch_without_an_sa() {
    // RFC 5660 §2.3: without SAs there is nothing to derive the parameters from.
    let database = Database::new();
    assert_eq!(database.create(flow(1), &any(), ignore()).unwrap_err(), LatchError::NoSa(flow(1).to_string()));
    assert_eq!(database.list().len(), 0);
    assert_eq!(database.check(Direction::Outbound, &flow(1), None), Verdict::Pass);
}

#[test]
fn no_latch_for_the_wrong_peer() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let wanted = IdentityPattern::exact(Identity::Fqdn("mallory.example".into()));
    assert!(matches!(
        database.create(flow(1), &wanted, ignore()),
        Err(LatchError::WrongPeer { found, wanted, .. }) if found.contains("peer-0") && wanted.contains("mallory")
    ));
    assert_eq!(database.check(Direction::Inbound, &flow(1), Some(classes[1])), Verdict::Pass);
}

#[test]
fn no_latch_while_sas_of_two_peers_cover_the_flow() {
    // RFC 5660 §2.3: "MUST NOT be created if there exist conflicting SAs in the SAD".
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    install(&database, 2, classes[1]);
    assert!(matches!(database.create(flow(1), &any(), ignore()), Err(LatchError::Conflict(_))));
    assert!(database.peer_of(&flow(1)).is_none());
    database.removed(1);
    assert_eq!(database.create(flow(1), &any(), ignore()).unwrap().1.peer.id, identity(1));
}

#[test]
fn no_second_latch_for_a_flow_even_when_the_first_is_broken() {
    // RFC 5660 §2.3: "MUST prevent conflicts amongst latches".
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (latch, _) = database.create(flow(1), &any(), ignore()).unwrap();
    assert!(matches!(database.create(flow(1), &any(), ignore()), Err(LatchError::Exists(_))));
    install(&database, 2, classes[1]);
    database.removed(2);
    assert!(matches!(database.create(flow(1), &any(), ignore()), Err(LatchError::Exists(_))));
    database.release(latch);
    assert!(database.create(flow(1), &any(), ignore()).is_ok());
}

#[test]
fn no_latch_for_what_is_not_one_connection() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    for change in [
        |flow: &mut Flow| flow.local_port = 0,
        |flow: &mut Flow| flow.remote_port = 0,
        |flow: &mut Flow| flow.local = "0.0.0.0".parse().unwrap(),
        |flow: &mut Flow| flow.remote = "224.0.0.1".parse().unwrap(),
        |flow: &mut Flow| flow.remote = "2001:db8::1".parse().unwrap(),
    ] {
        let mut odd = flow(1);
        change(&mut odd);
        assert!(matches!(database.create(odd, &any(), ignore()), Err(LatchError::NotAConnection(_))), "{odd}");
    }
}

#[test]
fn no_latch_for_an_sa_of_no_known_class() {
    let database = Database::new();
    for class in [NO_CLASS, ClassId(7), ClassId(u32::MAX)] {
        install(&database, 1, class);
        assert!(matches!(database.create(flow(1), &any(), ignore()), Err(LatchError::NoSa(_))));
    }
}

#[test]
fn packets_pass_under_the_latched_class_only() {
    // RFC 5660 §2: "MUST NOT be sent unprotected nor protected by an SA that does not match"; same for accepting.
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    database.create(flow(1), &any(), ignore()).unwrap();
    for direction in [Direction::Inbound, Direction::Outbound] {
        assert_eq!(database.check(direction, &flow(1), Some(classes[0])), Verdict::Pass);
        assert_eq!(database.check(direction, &flow(1), Some(classes[1])), Verdict::Drop);
        assert_eq!(database.check(direction, &flow(1), Some(NO_CLASS)), Verdict::Drop);
        assert_eq!(database.check(direction, &flow(1), None), Verdict::Drop);
        assert_eq!(database.check(direction, &flow(2), Some(classes[1])), Verdict::Pass, "not latched");
        assert_eq!(database.check(direction, &flow(2), None), Verdict::Pass, "not latched");
    }
}

#[test]
fn a_conflicting_sa_breaks_the_latch_before_it_is_installed() {
    // RFC 5660 §2.3: "MUST break the connection latch and inform the holder prior to accepting".
    let (database, classes) = database();
    let database = Arc::new(database);
    install(&database, 1, classes[0]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let holder = {
        // The packet check must drop already when the holder hears of it.
        let (database, seen, class) = (Arc::downgrade(&database), Arc::clone(&seen), classes[0]);
        Box::new(move |alert: Alert| {
            let database = database.upgrade().unwrap();
            assert_eq!(database.check(Direction::Outbound, &flow(1), Some(class)), Verdict::Drop);
            seen.lock().unwrap().push(alert);
        })
    };
    let (latch, _) = database.create(flow(1), &any(), holder).unwrap();
    let alerts = database.before_install(classes[1], &everything(), &everything());
    assert_eq!(alerts.len(), 1);
    assert_eq!((alerts[0].latch, alerts[0].state), (latch, LatchState::Broken));
    assert!(alerts[0].reason.contains("peer-1") && alerts[0].reason.contains("peer identity"), "{}", alerts[0].reason);
    assert_eq!(*seen.lock().unwrap(), alerts);
    for class in [Some(classes[0]), Some(classes[1]), None] {
        assert_eq!(database.check(Direction::Inbound, &flow(1), class), Verdict::Drop);
    }
    database.installed(2, classes[1], everything(), everything());
    assert_eq!(seen.lock().unwrap().len(), 1, "told once");
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
}

#[test]
fn a_latch_created_between_the_question_and_the_sa_breaks_when_the_sa_is_in() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    assert!(database.before_install(classes[1], &everything(), &everything()).is_empty());
    let (holder, told) = counting();
    database.create(flow(1), &any(), holder).unwrap();
    database.installed(2, classes[1], everything(), everything());
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert_eq!(database.check(Direction::Inbound, &flow(1), Some(classes[1])), Verdict::Drop);
}

#[test]
fn congruent_sas_come_and_go_under_a_latch() {
    // RFC 5660 §2: IPsec channels survive the expiry of their SAs.
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (holder, told) = counting();
    database.create(flow(1), &any(), holder).unwrap();
    install(&database, 2, classes[0]);
    database.removed(1);
    database.removed(2);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Established);
    assert_eq!(database.check(Direction::Outbound, &flow(1), None), Verdict::Drop);
    install(&database, 3, classes[0]);
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[0])), Verdict::Pass);
    assert_eq!(told.load(Ordering::SeqCst), 0);
}

#[test]
fn an_sa_for_other_traffic_breaks_nothing() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (holder, told) = counting();
    database.create(flow(1), &any(), holder).unwrap();
    database.before_install(classes[1], &everything(), &[port(flow(2).remote_port)]);
    database.before_install(classes[1], &[TrafficSelector::host("192.0.2.99".parse().unwrap())], &everything());
    let udp = TrafficSelector { protocol: 17, ..everything()[0] };
    database.before_install(classes[1], &[udp], &everything());
    assert_eq!(told.load(Ordering::SeqCst), 0);
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[0])), Verdict::Pass);
}

#[test]
fn fragments_pass_only_under_the_class_of_all_latches_between_the_hosts() {
    let (database, classes) = database();
    let fragment = Flow { local_port: 0, remote_port: 0, ..flow(1) };
    let pass = |class| database.check(Direction::Inbound, &fragment, Some(class)) == Verdict::Pass;
    database.installed(1, classes[0], everything(), vec![port(flow(1).remote_port)]);
    database.installed(2, classes[1], everything(), vec![port(flow(2).remote_port)]);
    assert!(pass(classes[0]) && pass(classes[1]), "no latch yet");
    let (first, _) = database.create(flow(1), &any(), ignore()).unwrap();
    assert!(pass(classes[0]) && !pass(classes[1]));
    assert_eq!(database.check(Direction::Inbound, &fragment, None), Verdict::Drop);
    let (second, _) = database.create(flow(2), &any(), ignore()).unwrap();
    assert!(!pass(classes[0]) && !pass(classes[1]));
    database.release(first);
    assert!(!pass(classes[0]) && pass(classes[1]));
    database.before_install(classes[2], &everything(), &everything());
    assert!(!pass(classes[1]) && !pass(classes[2]), "the latch is broken");
    let other_protocol = Flow { protocol: 17, ..fragment };
    assert_eq!(database.check(Direction::Inbound, &other_protocol, Some(classes[2])), Verdict::Pass);
    database.release(second);
    assert!(pass(classes[2]));
    assert!(database.pairs.is_empty() && database.flows.is_empty());
}

// RFC 8200 §4.5: whoever reassembles takes the protocol from the first fragment alone.
#[test]
fn later_ipv6_fragments_count_for_every_protocol() {
    let (database, classes) = database();
    let address = |text: &str| -> IpAddr { text.parse().unwrap() };
    let flow = Flow { local: address("fd00::1"), remote: address("fd00::2"), ..flow(1) };
    let every = |prefix: &str| vec![TrafficSelector::network(address(prefix), 0).unwrap()];
    database.installed(1, classes[0], every("::"), every("::"));
    let (latch, _) = database.create(flow, &any(), ignore()).unwrap();
    let fragment = Flow { protocol: 44, local_port: 0, remote_port: 0, ..flow };
    let pass = |class| database.check(Direction::Inbound, &fragment, Some(class)) == Verdict::Pass;
    assert!(pass(classes[0]) && !pass(classes[1]));
    database.before_install(classes[1], &every("::"), &every("::"));
    assert!(!pass(classes[0]) && !pass(classes[1]), "the latch is broken");
    database.release(latch);
    assert!(pass(classes[1]));
    assert!(database.pairs.is_empty() && database.flows.is_empty());
}

#[test]
fn a_class_is_what_rfc_5660_pins_and_nothing_else() {
    // RFC 5660 §2: protection, mode, suites with key length and replay protection, local and peer identity; §1: "as
    // well as the cert".
    let database = Database::new();
    let original = certified();
    let number = database.intern(original.clone());
    assert_ne!(number, NO_CLASS);
    assert_eq!(*database.class(number).unwrap(), original);
    let same = [with_peer(&original, |peer| peer.entry = "renamed".into()), with_method(&original)];
    for class in same {
        assert_eq!(database.intern(class), number);
    }
    let different = [
        with_peer(&original, |peer| peer.id = identity(2)),
        with_peer(&original, |peer| peer.local_id = identity(2)),
        with_peer(&original, |peer| peer.proof = Proof::PreSharedKey),
        with_peer(&original, |peer| peer.proof = certificate(b"renewed", b"root", AuthMethod::RSA)),
        with_peer(&original, |peer| peer.proof = certificate(b"leaf", b"other root", AuthMethod::RSA)),
        Class { mode: Mode::Transport, ..original.clone() },
        Class { replay_protection: false, ..original.clone() },
        Class { suite: EspSuite { key_bits: 256, ..original.suite }, ..original.clone() },
        Class { suite: EspSuite { esn: false, ..original.suite }, ..original.clone() },
        Class { suite: EspSuite { encr: Encr::CHACHA20_POLY1305, ..original.suite }, ..original.clone() },
    ];
    let mut numbers: Vec<ClassId> = different.into_iter().map(|class| database.intern(class)).collect();
    numbers.push(number);
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 11);
    assert!(database.class(NO_CLASS).is_none() && database.class(ClassId(u32::MAX)).is_none());
}

#[test]
fn a_holder_may_release_from_inside_the_alert() {
    let (database, classes) = database();
    let database = Arc::new(database);
    install(&database, 1, classes[0]);
    let weak = Arc::downgrade(&database);
    let holder = Box::new(move |alert: Alert| weak.upgrade().unwrap().release(alert.latch));
    database.create(flow(1), &any(), holder).unwrap();
    assert_eq!(database.before_install(classes[1], &everything(), &everything()).len(), 1);
    assert!(database.list().is_empty());
}

#[test]
fn packets_checked_by_other_threads_never_pass_once_breaking_returned() {
    // RFC 5660 §2.3.1: "MUST drop inbound packets and stop sending packets immediately".
    let (database, classes) = database();
    let never_foreign = AtomicBool::new(true);
    let none_after_break = AtomicBool::new(true);
    let (round, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    // Odd rounds are broken ones: a check that begins and ends in one must drop.
                    let before = round.load(Ordering::SeqCst);
                    let good = database.check(Direction::Outbound, &flow(1), Some(classes[0]));
                    let foreign = database.check(Direction::Inbound, &flow(1), Some(classes[1]));
                    let after = round.load(Ordering::SeqCst);
                    if before == 0 || before != after {
                        continue;
                    }
                    if foreign == Verdict::Pass {
                        never_foreign.store(false, Ordering::SeqCst);
                    }
                    if before % 2 == 1 && good == Verdict::Pass {
                        none_after_break.store(false, Ordering::SeqCst);
                    }
                }
            });
        }
        // Flow 1 stays latched from round 1 on but for the moments between release and create, which no round covers.
        for turn in 0..2000_u64 {
            install(&database, 1, classes[0]);
            let (latch, _) = database.create(flow(1), &any(), ignore()).unwrap();
            round.store(turn * 4 + 2, Ordering::SeqCst);
            database.check(Direction::Outbound, &flow(1), Some(classes[0]));
            round.store(turn * 4 + 4, Ordering::SeqCst);
            assert_eq!(database.before_install(classes[1], &everything(), &everything()).len(), 1);
            round.store(turn * 4 + 5, Ordering::SeqCst);
            database.installed(2, classes[1], everything(), everything());
            database.check(Direction::Outbound, &flow(1), Some(classes[0]));
            round.store(0, Ordering::SeqCst);
            database.removed(2);
            database.release(latch);
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(never_foreign.into_inner() && none_after_break.into_inner());
}

#[derive(Clone, Debug)]
enum Step {
    Install { sa: u64, class: usize, scope: usize, ask_first: bool },
    Remove { sa: u64 },
    Create { flow: usize, wanted: usize },
    Release { nth: usize },
}

#[derive(Clone)]
struct ModelLatch {
    id: LatchId,
    flow: usize,
    class: usize,
    broken: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_database_agrees_with_a_simple_model(steps in prop::collection::vec(step(), 1..60)) {
        let (database, classes) = database();
        let told: Arc<Mutex<Vec<Alert>>> = Arc::default();
        let mut sas: BTreeMap<u64, (usize, usize)> = BTreeMap::new();
        let mut latches: Vec<ModelLatch> = Vec::new();
        for step in steps {
            let mut expected = Vec::new();
            match step {
                Step::Install { sa, class, scope, ask_first } => {
                    for latch in latches.iter_mut().filter(|l| !l.broken && l.class != class && in_scope(scope, l.flow)) {
                        latch.broken = true;
                        expected.push(latch.id);
                    }
                    sas.insert(sa, (class, scope));
                    if ask_first {
                        let alerts = database.before_install(classes[class], &everything(), &scope_ts(scope));
                        prop_assert_eq!(&*told.lock().unwrap(), &alerts, "told inside, not later");
                    }
                    database.installed(sa, classes[class], everything(), scope_ts(scope));
                }
                Step::Remove { sa } => {
                    sas.remove(&sa);
                    database.removed(sa);
                }
                Step::Create { flow: n, wanted } => {
                    let covering: std::collections::BTreeSet<usize> =
                        sas.values().filter(|(_, scope)| in_scope(*scope, n)).map(|(class, _)| *class).collect();
                    let pattern = if wanted == 3 { any() } else { IdentityPattern::exact(identity(wanted)) };
                    let told = Arc::clone(&told);
                    let result = database.create(flow(n), &pattern, Box::new(move |a| told.lock().unwrap().push(a)));
                    let exists = latches.iter().any(|l| l.flow == n);
                    match (exists, covering.len(), covering.first()) {
                        (true, _, _) => prop_assert!(matches!(result, Err(LatchError::Exists(_)))),
                        (_, 0, _) => prop_assert!(matches!(result, Err(LatchError::NoSa(_)))),
                        (_, 1, Some(&class)) if wanted == 3 || wanted == class => {
                            let (id, found) = result.unwrap();
                            prop_assert_eq!(&found.peer.id, &identity(class));
                            prop_assert!(latches.iter().all(|l| l.id < id), "numbers grow");
                            latches.push(ModelLatch { id, flow: n, class, broken: false });
                        }
                        (_, 1, _) => {
                            let wrong_peer = matches!(result, Err(LatchError::WrongPeer { .. }));
                            prop_assert!(wrong_peer);
                        }
                        _ => prop_assert!(matches!(result, Err(LatchError::Conflict(_)))),
                    }
                }
                Step::Release { nth } => {
                    if !latches.is_empty() {
                        let latch = latches.remove(nth % latches.len());
                        database.release(latch.id);
                    }
                }
            }
            let alerts: Vec<LatchId> = told.lock().unwrap().drain(..).map(|alert| alert.latch).collect();
            prop_assert_eq!(alerts, expected);
            for class in [None, Some(0), Some(1), Some(2)] {
                let number = class.map(|n: usize| classes[n]);
                for n in 0..FLOWS {
                    let admitted = latches.iter().filter(|l| l.flow == n).all(|l| !l.broken && Some(l.class) == class);
                    let verdict = if admitted { Verdict::Pass } else { Verdict::Drop };
                    prop_assert_eq!(database.check(Direction::Inbound, &flow(n), number), verdict);
                    prop_assert_eq!(database.check(Direction::Outbound, &flow(n), number), verdict);
                }
                let admitted = latches.iter().all(|l| !l.broken && Some(l.class) == class);
                let fragment = Flow { local_port: 0, remote_port: 0, ..flow(0) };
                let verdict = if admitted { Verdict::Pass } else { Verdict::Drop };
                prop_assert_eq!(database.check(Direction::Inbound, &fragment, number), verdict);
            }
            let listed: Vec<_> = database.list().into_iter().map(|(id, flow, state, _)| (id, flow, state)).collect();
            let modelled: Vec<_> = latches
                .iter()
                .map(|l| (l.id, flow(l.flow), if l.broken { LatchState::Broken } else { LatchState::Established }))
                .collect();
            prop_assert_eq!(listed, modelled);
        }
    }
}

/// Few addresses, so that ranges meet, at both ends of either family.
fn remote() -> impl Strategy<Value = IpAddr> {
    prop::sample::select(vec![
        "0.0.0.1",
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.7",
        "10.0.1.1",
        "223.255.255.254",
        "::1",
        "2001:db8::1",
        "2001:db8::2",
        "fe80::1",
    ])
    .prop_map(|text| text.parse().unwrap())
}

fn between(start: IpAddr, end: IpAddr) -> TrafficSelector {
    TrafficSelector { start, end, ..everything()[0] }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    // RFC 5660 §2.3: what covers a flow must be found whatever range of addresses it is in.
    #[test]
    fn sas_and_latches_are_found_by_any_range_of_addresses(
        sas in prop::collection::vec((0..6_u64, 0..2_usize, prop::collection::vec((remote(), remote()), 0..3)), 0..10),
        removed in prop::collection::vec(0..6_u64, 0..4),
        remotes in prop::collection::btree_set(remote(), 1..6),
        newcomer in prop::collection::vec((remote(), remote()), 1..3),
    ) {
        let (database, classes) = database();
        let selectors = |ranges: &[(IpAddr, IpAddr)]| -> Vec<TrafficSelector> {
            ranges.iter().map(|(start, end)| between(*start, *end)).collect()
        };
        let local = |remote: &IpAddr| match remote {
            IpAddr::V4(_) => "10.9.0.1".parse().unwrap(),
            IpAddr::V6(_) => "2001:db8:9::1".parse().unwrap(),
        };
        let flow_to = |remote: &IpAddr| Flow { local: local(remote), remote: *remote, ..flow(1) };
        let ours = vec![everything()[0], between("::".parse().unwrap(), "ffff::".parse().unwrap())];
        let mut there = BTreeMap::new();
        for (sa, class, ranges) in &sas {
            database.installed(*sa, classes[*class], ours.clone(), selectors(ranges));
            there.insert(*sa, (*class, selectors(ranges)));
        }
        for sa in &removed {
            database.removed(*sa);
            there.remove(sa);
        }
        let mut latched = Vec::new();
        for remote in &remotes {
            let flow = flow_to(remote);
            let covering: std::collections::BTreeSet<usize> =
                there.values().filter(|(_, ts)| covers(&ours, ts, &flow)).map(|(class, _)| *class).collect();
            let peer = database.peer_of(&flow).map(|class| class.peer.id.clone());
            let expected = covering.first().filter(|_| covering.len() == 1).map(|class| identity(*class));
            prop_assert_eq!(&peer, &expected);
            if expected.is_some() {
                latched.push((database.create(flow, &any(), ignore()).unwrap().0, flow));
            }
        }
        let ts = selectors(&newcomer);
        let alerts: Vec<LatchId> =
            database.before_install(classes[2], &ours, &ts).into_iter().map(|alert| alert.latch).collect();
        let simple: Vec<LatchId> =
            latched.iter().filter(|(_, flow)| covers(&ours, &ts, flow)).map(|(id, _)| *id).collect();
        prop_assert_eq!(alerts, simple);
        for sa in there.keys() {
            database.removed(*sa);
        }
        let control = database.control();
        prop_assert!(control.by_subnet.is_empty() && control.sizes.is_empty() && control.sas.is_empty());
    }
}

const FLOWS: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4_u64, 0..3_usize, 0..4_usize, prop::bool::ANY).prop_map(|(sa, class, scope, ask_first)| Step::Install {
            sa,
            class,
            scope,
            ask_first
        }),
        (0..4_u64).prop_map(|sa| Step::Remove { sa }),
        (0..FLOWS, 0..4_usize).prop_map(|(flow, wanted)| Step::Create { flow, wanted }),
        (0..8_usize).prop_map(|nth| Step::Release { nth }),
    ]
}

/// Scopes 0 to 2 are one flow each, 3 is everything.
fn in_scope(scope: usize, flow: usize) -> bool {
    scope == FLOWS || scope == flow
}

fn scope_ts(scope: usize) -> Vec<TrafficSelector> {
    if scope == FLOWS { everything() } else { vec![port(flow(scope).remote_port)] }
}

fn flow(n: usize) -> Flow {
    Flow {
        protocol: 6,
        local: "192.0.2.1".parse().unwrap(),
        local_port: 40_000,
        remote: "198.51.100.1".parse().unwrap(),
        remote_port: 5000 + u16::try_from(n).unwrap(),
    }
}

fn everything() -> Vec<TrafficSelector> {
    vec![TrafficSelector::network("0.0.0.0".parse().unwrap(), 0).unwrap()]
}

fn port(port: u16) -> TrafficSelector {
    TrafficSelector { protocol: 6, start_port: port, end_port: port, ..everything()[0] }
}

fn any() -> IdentityPattern {
    IdentityPattern::any()
}

fn identity(n: usize) -> Identity {
    Identity::Fqdn(format!("peer-{n}.example"))
}

fn class(n: usize) -> Class {
    Class {
        peer: Arc::new(PeerIdentity {
            id: identity(n),
            local_id: Identity::Fqdn("us.example".into()),
            proof: Proof::PreSharedKey,
            entry: "net".into(),
        }),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true },
        replay_protection: true,
    }
}

fn certified() -> Class {
    with_peer(&class(0), |peer| peer.proof = certificate(b"leaf", b"root", AuthMethod::RSA))
}

fn certificate(end_entity: &[u8], trust_anchor: &[u8], method: AuthMethod) -> Proof {
    Proof::Certificate { end_entity: end_entity.to_vec(), trust_anchor: trust_anchor.to_vec(), method }
}

fn with_method(class: &Class) -> Class {
    with_peer(class, |peer| peer.proof = certificate(b"leaf", b"root", AuthMethod::DIGITAL_SIGNATURE))
}

fn with_peer(class: &Class, change: impl FnOnce(&mut PeerIdentity)) -> Class {
    let mut peer = (*class.peer).clone();
    change(&mut peer);
    Class { peer: Arc::new(peer), ..class.clone() }
}

fn database() -> (Database, Vec<ClassId>) {
    let database = Database::new();
    let classes = (0..3).map(|n| database.intern(class(n))).collect();
    (database, classes)
}

fn install(database: &Database, sa: u64, class: ClassId) {
    database.before_install(class, &everything(), &everything());
    database.installed(sa, class, everything(), everything());
}

fn ignore() -> Box<dyn Fn(Alert) + Send + Sync> {
    Box::new(|_| {})
}

fn counting() -> (Box<dyn Fn(Alert) + Send + Sync>, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let held = Arc::clone(&count);
    let holder = Box::new(move |_: Alert| {
        held.fetch_add(1, Ordering::SeqCst);
    });
    (holder, count)
}
