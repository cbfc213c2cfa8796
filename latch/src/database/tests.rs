#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod automatic;
mod datagrams;
mod optional;
mod ports;

use std::sync::atomic::{AtomicBool, AtomicU64};

use ipsec::guard::{Claim, Port};
use ipsec::transform::{Encr, Integ};
use pad::{AuthMethod, EapMethod};
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
    let wanted = Request::peer(IdentityPattern::exact(Identity::Fqdn("mallory.example".into())));
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

// RFC 5660 §2.3: "Child SA proposals that would conflict […] and whose traffic selectors can be narrowed".
#[test]
fn what_a_stranger_asks_for_is_to_be_narrowed_around_latched_flows() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (first, _) = database.create(flow(1), &any(), ignore()).unwrap();
    let waits = Request { on_break: OnBreak::Wait, ..any() };
    database.create(flow(2), &waits, ignore()).unwrap();
    let reserved = |local: &[TrafficSelector], newcomer| database.reserved(local, &everything(), |_| newcomer);
    assert_eq!(reserved(&everything(), Newcomer::Congruent), []);
    assert_eq!(reserved(&everything(), Newcomer::Stranger), [flow(1), flow(2)]);
    assert_eq!(reserved(&[TrafficSelector::host("192.0.2.99".parse().unwrap())], Newcomer::Stranger), []);
    // Who knows the class can tell.
    let of_class = |class: &Class| if class.peer.id == identity(0) { Newcomer::Congruent } else { Newcomer::Stranger };
    assert_eq!(database.reserved(&everything(), &everything(), of_class), []);
    // One that may stand again keeps its flow; one that will not does not.
    database.before_install(classes[1], &everything(), &everything()).unwrap();
    assert_eq!(reserved(&everything(), Newcomer::Stranger), [flow(2)]);
    database.release(first);
    database.peer_restarted(classes[0]);
    assert_eq!(reserved(&everything(), Newcomer::Stranger), []);
}

// RFC 5660 §2.1, §2.3: another SA of the same peer beside the latched flow's own, or in its place.
#[test]
fn an_sa_in_place_of_the_latched_one_is_not_narrowed_around_its_flow() {
    let (database, classes) = database();
    let (ours, theirs) = TrafficSelector::of_flow(&flow(1));
    database.installed(1, classes[0], vec![ours], vec![theirs]).unwrap();
    database.create(flow(1), &any(), ignore()).unwrap();
    let reserved = |local: &[TrafficSelector], remote: &[TrafficSelector]| {
        database.reserved(local, remote, |_| Newcomer::SamePeer)
    };
    assert_eq!(reserved(&everything(), &everything()), [flow(1)], "beside it");
    assert_eq!(reserved(&[ours], &[theirs]), [], "in its place");
    database.removed(1);
    assert_eq!(reserved(&everything(), &everything()), [], "the peer is back, otherwise");
}

// RFC 7619 §3.3: "MUST NOT be able to replace the Child SAs of an authenticated IKE peer"; RFC 5660 §6.5: nor break its latches.
#[test]
fn who_has_proved_nothing_takes_nothing_from_who_has() {
    let (database, classes) = database();
    let narrow = |n| TrafficSelector::of_flow(&flow(n));
    database.installed(1, classes[0], vec![narrow(1).0], vec![narrow(1).1]).unwrap();
    let (holder, told) = counting();
    database.create(flow(1), &any(), holder).unwrap();
    database.removed(1);
    // The latch alone…
    let refused = database.before_install(classes[NOBODY], &everything(), &everything()).unwrap_err();
    assert!(refused.to_string().contains("is latched to peer-0.example"), "{refused}");
    database.installed(2, classes[NOBODY], everything(), everything()).unwrap_err();
    assert!(database.is_uncovered(&flow(2)) && told.load(Ordering::SeqCst) == 0);
    // …an SA alone…
    database.installed(3, classes[1], vec![narrow(2).0], everything()).unwrap();
    let refused = database.before_install(classes[NOBODY], &[narrow(2).0], &[narrow(2).1]).unwrap_err();
    assert!(refused.to_string().contains("an SA of peer-1.example"), "{refused}");
    // …and what is nobody's.
    database.before_install(classes[NOBODY], &[narrow(3).0], &[narrow(3).1]).unwrap();
    database.installed(4, classes[NOBODY], vec![narrow(3).0], vec![narrow(3).1]).unwrap();
    let (holder, told) = counting();
    database.create(flow(3), &any(), holder).unwrap();
    // The other way round it is a conflict like any other, and nobody's SA has to go.
    assert!(database.outranked(classes[NOBODY], &everything(), &everything()).is_empty());
    assert!(database.outranked(classes[0], &[narrow(2).0], &[narrow(2).1]).is_empty(), "its own traffic");
    assert_eq!(database.outranked(classes[0], &[narrow(3).0], &everything()), BTreeSet::from([4]));
    install(&database, 5, classes[0]);
    assert_eq!(told.load(Ordering::SeqCst), 1);
}

// RFC 7619, RFC 5386 §2: without proof there is no telling whether it is the same peer.
#[test]
fn nobody_is_the_same_only_within_one_ike_sa() {
    let of = |lineage: u8| {
        with_peer(&class(0), |peer| {
            peer.id = Identity::Null;
            peer.proof = Proof::Unauthenticated { lineage: [lineage; 32] };
        })
    };
    let database = Database::new();
    let (one, same, other) = (database.intern(of(1)), database.intern(of(1)), database.intern(of(2)));
    assert!(one == same && one != other);
    let (ours, theirs) = TrafficSelector::of_flow(&flow(1));
    database.installed(1, one, vec![ours], vec![theirs]).unwrap();
    // Nobody asks for it by accident.
    assert!(matches!(database.create(flow(1), &any(), ignore()), Err(LatchError::WrongPeer { .. })));
    let nobody = Request::peer(IdentityPattern::parse("%null").unwrap());
    let (holder, told) = counting();
    database.create(flow(1), &nobody, holder).unwrap();
    // Neither its end nor its return says anything about others.
    database.peer_restarted(other);
    assert_eq!(told.load(Ordering::SeqCst), 0);
    database.installed(2, other, vec![ours], vec![theirs]).unwrap();
    assert_eq!(told.load(Ordering::SeqCst), 1, "a new IKE SA is another peer");
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
    let alerts = database.before_install(classes[1], &everything(), &everything()).unwrap();
    assert_eq!(alerts.len(), 1);
    assert_eq!((alerts[0].latch, alerts[0].state), (latch, LatchState::Broken));
    assert!(alerts[0].reason.contains("peer-1") && alerts[0].reason.contains("peer identity"), "{}", alerts[0].reason);
    assert_eq!(*seen.lock().unwrap(), alerts);
    for class in [Some(classes[0]), Some(classes[1]), None] {
        assert_eq!(database.check(Direction::Inbound, &flow(1), class), Verdict::Drop);
    }
    database.installed(2, classes[1], everything(), everything()).unwrap();
    assert_eq!(seen.lock().unwrap().len(), 1, "told once");
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
}

#[test]
fn a_latch_created_between_the_question_and_the_sa_breaks_when_the_sa_is_in() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    assert!(database.before_install(classes[1], &everything(), &everything()).unwrap().is_empty());
    let (holder, told) = counting();
    database.create(flow(1), &any(), holder).unwrap();
    database.installed(2, classes[1], everything(), everything()).unwrap();
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert_eq!(database.check(Direction::Inbound, &flow(1), Some(classes[1])), Verdict::Drop);
}

// RFC 5660 §2.3: "prior to accepting": also what is made while others are told.
#[test]
fn while_many_latches_break_others_use_the_database_and_get_no_further() {
    let (database, classes) = database();
    let database = Arc::new(database);
    install(&database, 1, classes[0]);
    let nth = |n: u16| Flow { remote_port: 6000 + n, ..flow(1) };
    let (weak, made) = (Arc::downgrade(&database), Arc::new(AtomicUsize::new(0)));
    for n in 0..9 {
        let (weak, made) = (weak.clone(), Arc::clone(&made));
        let holder = Box::new(move |alert: Alert| {
            let database = weak.upgrade().unwrap();
            assert_eq!(database.find(&alert.flow).unwrap().1, LatchState::Broken);
            // Its SA is the only one that the database knows.
            let again = Flow { local_port: 41_000 + n, ..alert.flow };
            if database.create(again, &any(), ignore()).is_ok() {
                made.fetch_add(1, Ordering::SeqCst);
            }
        });
        database.create(nth(n), &any(), holder).unwrap();
    }
    let told = database.before_install(classes[1], &everything(), &everything()).unwrap();
    assert_eq!((told.len(), made.load(Ordering::SeqCst)), (18, 9));
    assert!(database.list().iter().all(|(_, _, state, _)| *state == LatchState::Broken));
    let flows = told.iter().map(|alert| alert.flow).collect::<BTreeSet<_>>();
    assert_eq!(flows.len(), 18, "each is told once");
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
    database.before_install(classes[1], &everything(), &[port(flow(2).remote_port)]).unwrap();
    database
        .before_install(classes[1], &[TrafficSelector::host("192.0.2.99".parse().unwrap())], &everything())
        .unwrap();
    let udp = TrafficSelector { protocol: 17, ..everything()[0] };
    database.before_install(classes[1], &[udp], &everything()).unwrap();
    assert_eq!(told.load(Ordering::SeqCst), 0);
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[0])), Verdict::Pass);
}

#[test]
fn fragments_pass_only_under_the_class_of_all_latches_between_the_hosts() {
    let (database, classes) = database();
    let fragment = Flow { local_port: 0, remote_port: 0, ..flow(1) };
    let pass = |class| database.check(Direction::Inbound, &fragment, Some(class)) == Verdict::Pass;
    database.installed(1, classes[0], everything(), vec![port(flow(1).remote_port)]).unwrap();
    database.installed(2, classes[1], everything(), vec![port(flow(2).remote_port)]).unwrap();
    assert!(pass(classes[0]) && pass(classes[1]), "no latch yet");
    let (first, _) = database.create(flow(1), &any(), ignore()).unwrap();
    assert!(pass(classes[0]) && !pass(classes[1]));
    assert_eq!(database.check(Direction::Inbound, &fragment, None), Verdict::Drop);
    let (second, _) = database.create(flow(2), &any(), ignore()).unwrap();
    assert!(!pass(classes[0]) && !pass(classes[1]));
    database.release(first);
    assert!(!pass(classes[0]) && pass(classes[1]));
    database.before_install(classes[2], &everything(), &everything()).unwrap();
    assert!(!pass(classes[1]) && !pass(classes[2]), "the latch is broken");
    let other_protocol = Flow { protocol: 17, ..fragment };
    assert_eq!(database.check(Direction::Inbound, &other_protocol, Some(classes[2])), Verdict::Pass);
    database.release(second);
    assert!(pass(classes[2]));
    assert!(database.pairs.is_empty() && database.flows.len() == 0);
}

// RFC 8200 §4.5: whoever reassembles takes the protocol from the first fragment alone.
#[test]
fn later_ipv6_fragments_count_for_every_protocol() {
    let (database, classes) = database();
    let address = |text: &str| -> IpAddr { text.parse().unwrap() };
    let flow = Flow { local: address("fd00::1"), remote: address("fd00::2"), ..flow(1) };
    let every = |prefix: &str| vec![TrafficSelector::network(address(prefix), 0).unwrap()];
    database.installed(1, classes[0], every("::"), every("::")).unwrap();
    let (latch, _) = database.create(flow, &any(), ignore()).unwrap();
    let fragment = Flow { protocol: 44, local_port: 0, remote_port: 0, ..flow };
    let pass = |class| database.check(Direction::Inbound, &fragment, Some(class)) == Verdict::Pass;
    assert!(pass(classes[0]) && !pass(classes[1]));
    database.before_install(classes[1], &every("::"), &every("::")).unwrap();
    assert!(!pass(classes[0]) && !pass(classes[1]), "the latch is broken");
    database.release(latch);
    assert!(pass(classes[1]));
    assert!(database.pairs.is_empty() && database.flows.len() == 0);
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
        with_peer(&original, |peer| peer.proof = raw_key(b"leaf", AuthMethod::RSA)),
        with_peer(&original, |peer| peer.proof = raw_key(b"other", AuthMethod::RSA)),
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
    assert_eq!(numbers.len(), 13);
    // How a key signed is no part of what it is.
    let signed = |method| database.intern(with_peer(&original, |peer| peer.proof = raw_key(b"leaf", method)));
    assert_eq!(signed(AuthMethod::RSA), signed(AuthMethod::DIGITAL_SIGNATURE));
    assert!(database.class(NO_CLASS).is_none() && database.class(ClassId(u32::MAX)).is_none());
}

// RFC 7296 §2.16: who is latched is whom EAP proved, by its method; what was said in IKE beside it is nobody's.
#[test]
fn a_class_pins_the_eap_identity_and_not_what_was_said_in_ike() {
    let database = Database::new();
    let of = |number, ike_id| {
        with_peer(&certified(), |peer| {
            peer.id = identity(number);
            peer.proof = Proof::Eap { method: EapMethod::MsChapV2, ike_id: identity(ike_id) };
        })
    };
    let number = database.intern(of(1, 2));
    assert_eq!(database.intern(of(1, 3)), number);
    assert_ne!(database.intern(of(2, 2)), number);
    let shared = with_peer(&of(1, 2), |peer| peer.proof = Proof::PreSharedKey);
    assert_ne!(database.intern(shared), number);
    assert!(of(1, 2).is_authenticated() && of(1, 2).is_between_the_ends_of(&of(1, 3)));
    assert!(!of(1, 2).is_between_the_ends_of(&of(2, 2)));
}

#[test]
fn a_latch_that_waits_returns_when_the_conflict_is_over() {
    // RFC 5660 §2.2: BROKEN to ESTABLISHED "when all conflicts are cleared".
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (holder, told) = counting();
    database.create(flow(1), &waiting(), holder).unwrap();
    install(&database, 2, classes[1]);
    install(&database, 3, classes[2]);
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[0])), Verdict::Drop);
    database.removed(2);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken, "one conflict is left");
    database.removed(3);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Established);
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[0])), Verdict::Pass);
    assert_eq!(database.check(Direction::Inbound, &flow(1), Some(classes[1])), Verdict::Drop);
    assert_eq!(told.load(Ordering::SeqCst), 2);
}

#[test]
fn an_sa_that_was_not_installed_after_all_does_not_keep_a_latch_broken() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    database.create(flow(1), &waiting(), ignore()).unwrap();
    database.before_install(classes[1], &everything(), &everything()).unwrap();
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
    database.removed(2);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Established);
}

#[test]
fn a_dead_peer_breaks_its_latches_for_good() {
    // RFC 5660 §2.2: DPD breaks "irremediably"; §2: so it SHOULD.
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    install(&database, 2, classes[0]);
    database.create(flow(1), &waiting(), ignore()).unwrap();
    database.removed(1);
    database.peer_is_dead(classes[0]);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Established, "another SA of the peer lives");
    database.removed(2);
    database.peer_is_dead(classes[1]);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Established, "somebody else is dead");
    database.peer_is_dead(classes[0]);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
    install(&database, 3, classes[0]);
    database.removed(3);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
}

#[test]
fn a_change_of_policy_breaks_what_it_no_longer_protects() {
    // RFC 5660 §2.3: changes of the SPD that conflict.
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (holder, told) = counting();
    database.create(flow(1), &waiting(), holder).unwrap();
    database.create(flow(2), &waiting(), ignore()).unwrap();
    database.policy_changed(|changed, _| (*changed == flow(1)).then(|| "bypassed".to_owned()));
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
    assert_eq!(database.find(&flow(2)).unwrap().1, LatchState::Established);
    database.removed(1);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken, "the policy still forbids it");
    install(&database, 2, classes[1]);
    database.policy_changed(|_, _| None);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken, "an SA conflicts");
    database.removed(2);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Established);
    assert_eq!(told.load(Ordering::SeqCst), 2);
}

#[test]
fn only_the_protection_asked_for_is_latched() {
    // RFC 5660 §2: an API to set the parameters to be latched.
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let suite = Algorithms { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE };
    let other = Algorithms { key_bits: 256, ..suite };
    let refused = [
        (Request { mode: Some(Mode::Transport), ..any() }, "mode"),
        (Request { suites: vec![other], ..any() }, "suite"),
    ];
    for (request, what) in refused {
        let error = database.create(flow(1), &request, ignore()).unwrap_err();
        assert!(matches!(error, LatchError::WrongProtection { what: found, .. } if found == what), "{error}");
    }
    let us = Request { local: Some(IdentityPattern::exact(identity(7))), ..any() };
    assert!(matches!(database.create(flow(1), &us, ignore()), Err(LatchError::WrongPeer { .. })));
    let request = Request {
        mode: Some(Mode::Tunnel),
        suites: vec![other, suite],
        replay_protection: true,
        local: Some(IdentityPattern::exact(Identity::Fqdn("us.example".into()))),
        ..any()
    };
    assert!(database.create(flow(1), &request, ignore()).is_ok());
    let unprotected = database.intern(Class { replay_protection: false, ..class(0) });
    database.removed(1);
    install(&database, 2, unprotected);
    let error = database.create(flow(2), &request, ignore()).unwrap_err();
    assert!(matches!(error, LatchError::WrongProtection { what: "replay protection", .. }), "{error}");
}

#[test]
fn a_listener_latches_each_flow_before_its_first_packet_passes() {
    // RFC 5660 §2.2, §5.1: LISTENER latches.
    let (database, classes) = database();
    let (holder, told) = counting();
    let (inbound, outbound) = (Direction::Inbound, Direction::Outbound);
    let request = Request::peer(IdentityPattern::exact(identity(0)));
    let parent = database.create_listener(listener(), request.clone(), holder).unwrap();
    assert!(matches!(database.create_listener(listener(), request.clone(), ignore()), Err(LatchError::Exists(_))));
    install(&database, 1, classes[1]);
    assert_eq!(database.check(inbound, &flow(3), Some(classes[1])), Verdict::Drop, "not whom it takes");
    install(&database, 2, classes[0]);
    assert_eq!(database.check(inbound, &flow(3), Some(classes[0])), Verdict::Drop, "an SA conflicts");
    database.removed(1);
    assert_eq!(database.check(inbound, &flow(3), None), Verdict::Drop, "in clear");
    assert_eq!(database.check(outbound, &flow(3), Some(classes[0])), Verdict::Drop, "nobody has come");
    assert_eq!(database.check_later(&flow(3), Some(classes[0])), Verdict::Drop, "an ICMP error is no connection");
    assert!(database.list().is_empty());

    assert_eq!(database.check(inbound, &flow(3), Some(classes[0])), Verdict::Pass);
    assert_eq!(told.load(Ordering::SeqCst), 1, "ALERT to the listener's holder");
    assert_eq!(database.check(outbound, &flow(3), Some(classes[0])), Verdict::Pass);
    assert_eq!(database.check(inbound, &flow(3), Some(classes[1])), Verdict::Drop);
    assert_eq!(database.check(inbound, &flow(1), Some(classes[1])), Verdict::Pass, "another port");
    let (holder, taken) = counting();
    let (latch, class) = database.accept(parent, &flow(3), None, holder).unwrap();
    assert_eq!(class.peer.id, identity(0));
    let again = database.accept(parent, &flow(3), None, ignore());
    assert!(matches!(again, Err(LatchError::NotAccepted(_))), "it is taken");
    database.check(inbound, &flow(4), Some(classes[0]));
    install(&database, 3, classes[1]);
    assert_eq!((told.load(Ordering::SeqCst), taken.load(Ordering::SeqCst)), (3, 1));
    assert!(matches!(database.accept(parent, &flow(4), None, ignore()), Err(LatchError::Broken(_))));
    database.release(parent);
    assert_eq!(database.check(inbound, &flow(3), Some(classes[0])), Verdict::Drop, "its latches stay");
    database.release(latch);
    assert_eq!(database.check(inbound, &flow(3), Some(classes[1])), Verdict::Pass);
    assert_eq!(database.unaccepted().len(), 1);
}

// RFC 8200 §4.5, RFC 791 §3.2: a later fragment waits for the first one, which may come from somebody else and make a latch.
#[test]
fn no_later_fragment_gets_to_a_listener_before_there_is_a_latch() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let fragment = Flow { local_port: 0, remote_port: 0, ..flow(3) };
    let verdict = |fragment: &Flow, class| database.check(Direction::Inbound, fragment, Some(class));
    assert_eq!(verdict(&fragment, classes[1]), Verdict::Pass);
    let parent = database.create_listener(listener(), any(), ignore()).unwrap();
    assert_eq!(verdict(&fragment, classes[1]), Verdict::Drop);
    assert_eq!(verdict(&Flow { protocol: 17, ..fragment }, classes[1]), Verdict::Pass);
    assert_eq!(verdict(&Flow { local: "192.0.2.2".parse().unwrap(), ..fragment }, classes[1]), Verdict::Pass);
    assert_eq!(database.check(Direction::Outbound, &fragment, Some(classes[1])), Verdict::Pass);
    database.check(Direction::Inbound, &flow(3), Some(classes[0]));
    assert_eq!((verdict(&fragment, classes[0]), verdict(&fragment, classes[1])), (Verdict::Pass, Verdict::Drop));
    database.release(parent);
    let six = Listener { local: None, ipv4: false, ipv6: true, ..listener() };
    database.create_listener(six, any(), ignore()).unwrap();
    let (local, remote) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
    let later = Flow { protocol: IPV6_FRAGMENT, local, remote, ..fragment };
    assert_eq!(verdict(&later, classes[0]), Verdict::Drop, "it may be of any protocol");
}

// RFC 5660 §2: "or has rebooted": what the new SA is like does not matter, the peer's end of the connection is gone.
#[test]
fn a_peer_that_has_restarted_breaks_its_latches_for_good() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (latch, _) = database.create(flow(1), &waiting(), ignore()).unwrap();
    // Its new SA is there already.
    install(&database, 2, classes[0]);
    database.removed(1);
    database.peer_restarted(classes[1]);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Established, "another peer");
    database.peer_restarted(classes[0]);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
    install(&database, 3, classes[0]);
    database.removed(2);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
    database.release(latch);
    assert!(database.create(flow(1), &any(), ignore()).is_ok(), "a new connection");
}

#[test]
fn listeners_of_one_port_meet_where_their_addresses_do() {
    let database = Database::new();
    let at = |local: Option<&str>, ipv4, ipv6| {
        let listener = Listener { local: local.map(|text| text.parse().unwrap()), ipv4, ipv6, ..listener() };
        database.create_listener(listener, any(), ignore())
    };
    let v4 = at(None, true, false).unwrap();
    assert!(at(Some("192.0.2.9"), true, false).is_err() && at(None, true, true).is_err());
    let v6 = at(Some("2001:db8::1"), false, true).unwrap();
    assert!(at(None, false, true).is_err());
    database.release(v4);
    database.release(v6);
    assert!(at(None, true, true).is_ok() && at(Some("192.0.2.9"), true, false).is_err());
}

#[test]
fn a_listener_has_room_for_so_many_that_nobody_takes() {
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let parent = database.create_listener(listener(), any(), ignore()).unwrap();
    let from = |n: usize| Flow { remote_port: u16::try_from(n + 1).unwrap(), ..flow(3) };
    for n in 0..MAX_WAITING {
        assert_eq!(database.check(Direction::Inbound, &from(n), Some(classes[0])), Verdict::Pass);
    }
    assert_eq!(database.check(Direction::Inbound, &from(MAX_WAITING), Some(classes[0])), Verdict::Drop);
    database.accept(parent, &from(0), None, ignore()).unwrap();
    assert_eq!(database.check(Direction::Inbound, &from(MAX_WAITING), Some(classes[0])), Verdict::Pass);
}

#[test]
fn the_administrator_breaks_and_closes_latches() {
    // RFC 5660 §2.2, §6.2.
    let (database, classes) = database();
    install(&database, 1, classes[0]);
    let (holder, told) = counting();
    let (latch, _) = database.create(flow(1), &waiting(), holder).unwrap();
    assert!(database.break_latch(latch, "enough") && !database.break_latch(LatchId(99), "nobody"));
    install(&database, 2, classes[0]);
    database.removed(2);
    assert_eq!(database.find(&flow(1)).unwrap().1, LatchState::Broken);
    assert!(database.close(latch, "enough"));
    assert_eq!(database.inquire(latch).unwrap().state, LatchState::Closed, "until its holder has heard of it");
    assert!(!database.break_latch(LatchId(0), "nobody") && database.break_latch(latch, "again"));
    assert_eq!(database.inquire(latch).unwrap().state, LatchState::Closed);
    assert_eq!(database.check(Direction::Inbound, &flow(1), Some(classes[0])), Verdict::Drop);
    assert_eq!(told.load(Ordering::SeqCst), 2);
    database.release(latch);
    assert!(database.inquire(latch).is_none());
}

#[test]
fn a_latch_keeps_the_channel_binding_that_it_was_made_under() {
    // RFC 5056 §2.1; refused where the two ends might not agree.
    let (database, classes) = database();
    let reason = |latch| match database.channel_binding(latch) {
        Err(LatchError::NoBinding(reason)) => reason,
        other => panic!("{other:?}"),
    };
    install(&database, 1, classes[0]);
    let (unbound, _) = database.create(flow(0), &waiting(), ignore()).unwrap();
    assert!(reason(unbound).contains("has none"));
    for (sa, binding) in [(1, [1; 32]), (2, [1; 32])] {
        database.bound(sa, Bindings { unique: Some(binding), keys: Some([binding, [0; 32]]) });
        install(&database, sa, classes[0]);
    }
    let (latch, _) = database.create(flow(1), &waiting(), ignore()).unwrap();
    assert_eq!(database.channel_binding(latch), Ok([1; 32]));
    database.bound(3, Bindings { unique: Some([3; 32]), keys: None });
    install(&database, 3, classes[0]);
    let (ambiguous, _) = database.create(flow(2), &waiting(), ignore()).unwrap();
    assert!(reason(ambiguous).contains("several"));
    database.removed(1);
    database.removed(2);
    assert_eq!(database.channel_binding(latch), Ok([1; 32]), "the latch's, whatever SAs come after");
    install(&database, 4, classes[1]);
    assert!(reason(latch).contains("not established"));
    database.removed(4);
    assert_eq!(database.channel_binding(latch), Ok([1; 32]));
    database.release(latch);
    assert!(reason(latch).contains("no such latch"));
    database.removed(3);
    assert!(database.control().bindings.is_empty());
}

#[test]
fn the_observer_sees_every_change() {
    let (database, classes) = database();
    let seen: Arc<Mutex<Vec<LatchState>>> = Arc::default();
    let sink = Arc::clone(&seen);
    database.observe_with(Box::new(move |alert| sink.lock().unwrap().push(alert.state)));
    install(&database, 1, classes[0]);
    let (latch, _) = database.create(flow(1), &waiting(), ignore()).unwrap();
    install(&database, 2, classes[1]);
    database.removed(2);
    database.release(latch);
    let states = [LatchState::Established, LatchState::Broken, LatchState::Established, LatchState::Closed];
    assert_eq!(*seen.lock().unwrap(), states);
}

#[test]
fn a_holder_may_release_from_inside_the_alert() {
    let (database, classes) = database();
    let database = Arc::new(database);
    install(&database, 1, classes[0]);
    let weak = Arc::downgrade(&database);
    let holder = Box::new(move |alert: Alert| weak.upgrade().unwrap().release(alert.latch));
    database.create(flow(1), &any(), holder).unwrap();
    assert_eq!(database.before_install(classes[1], &everything(), &everything()).unwrap().len(), 1);
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
            assert_eq!(database.before_install(classes[1], &everything(), &everything()).unwrap().len(), 1);
            round.store(turn * 4 + 5, Ordering::SeqCst);
            database.installed(2, classes[1], everything(), everything()).unwrap();
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
    Install {
        sa: u64,
        class: usize,
        scope: usize,
        ask_first: bool,
    },
    /// The data plane refuses what was asked for.
    Fail {
        sa: u64,
        class: usize,
        scope: usize,
    },
    Remove {
        sa: u64,
    },
    /// An SA goes because the peer is dead.
    Dead {
        sa: u64,
    },
    /// INITIAL_CONTACT: the peer has restarted.
    PeerRestart {
        class: usize,
    },
    /// The policy forbids flows under a class; 3 forbids none.
    Policy {
        flow: usize,
        class: usize,
    },
    Create {
        flow: usize,
        wanted: usize,
        on_break: OnBreak,
    },
    Listen {
        wanted: usize,
        on_break: OnBreak,
    },
    /// The first packet of an unlatched flow, or any other.
    Packet {
        direction: Direction,
        flow: usize,
        class: usize,
    },
    /// A LARVAL latch, until it is established or given up.
    Reserve {
        flow: usize,
    },
    Establish {
        nth: usize,
        wanted: usize,
        on_break: OnBreak,
    },
    GiveUp {
        nth: usize,
    },
    Accept {
        flow: usize,
    },
    /// An SA that does without what is reserved for others.
    Narrow {
        class: usize,
        scope: usize,
    },
    Release {
        nth: usize,
    },
    Break {
        nth: usize,
    },
    Close {
        nth: usize,
    },
    /// The daemon restarts: nothing is left.
    Restart,
}

/// Written from RFC 5660 §2.2 and §2.3 and the module's documentation, with sets and scans only.
#[derive(Default)]
struct Model {
    sas: BTreeMap<u64, (usize, usize)>,
    latches: Vec<ModelLatch>,
    larval: Vec<(LatchId, usize)>,
    listener: Option<(LatchId, usize, OnBreak)>,
    /// Flows are latched of themselves.
    automatic: Option<OnBreak>,
    forbidden: Option<(usize, usize)>,
    expected: Vec<(LatchId, LatchState)>,
}

#[derive(Clone)]
struct ModelLatch {
    id: LatchId,
    flow: usize,
    class: usize,
    on_break: OnBreak,
    waiting: bool,
    /// Nobody's: nobody is told.
    automatic: bool,
    condition: Condition,
}

impl ModelLatch {
    fn state(&self) -> LatchState {
        match self.condition {
            Condition::Established => LatchState::Established,
            Condition::Closed => LatchState::Closed,
            _ => LatchState::Broken,
        }
    }

    fn worsen(&mut self, condition: Condition, expected: &mut Vec<(LatchId, LatchState)>) {
        let before = self.state();
        self.condition = self.condition.max(condition);
        if self.state() != before && !self.automatic {
            expected.push((self.id, self.state()));
        }
    }
}

impl Model {
    /// RFC 7619 §3.3: it is nobody's SA, and somebody's latch or SA is there.
    fn outranks(&self, class: usize, scope: usize) -> bool {
        let meet = |other: usize| scope == other || scope == ALL_FLOWS || other == ALL_FLOWS;
        class == NOBODY
            && (self.latches.iter().any(|latch| latch.class != NOBODY && in_scope(scope, latch.flow))
                || self.sas.values().any(|(class, other)| *class != NOBODY && meet(*other)))
    }

    /// RFC 7619 §3.3: SAs of nobody that are in the way of somebody's.
    fn outranked(&self, class: usize, scope: usize) -> BTreeSet<u64> {
        let meet = |other: usize| scope == other || scope == ALL_FLOWS || other == ALL_FLOWS;
        let nobodys = self.sas.iter().filter(|(_, (other, at))| class != NOBODY && *other == NOBODY && meet(*at));
        nobodys.map(|(sa, _)| *sa).collect()
    }

    /// In the order of their numbers, in which holders are told.
    fn add(&mut self, latch: ModelLatch) {
        self.latches.push(latch);
        self.latches.sort_by_key(|latch| latch.id);
    }

    fn latch(&self, flow: usize) -> Option<&ModelLatch> {
        self.latches.iter().find(|latch| latch.flow == flow)
    }

    fn is_larval(&self, flow: usize) -> bool {
        self.larval.iter().any(|(_, larval)| *larval == flow)
    }

    fn is_automatic(&self, latch: LatchId) -> bool {
        self.latches.iter().any(|other| other.id == latch && other.automatic)
    }

    /// Of a new latch: on whose break what happens. `None`: the packet makes none.
    fn made_by(&self, direction: Direction, flow: usize, class: usize) -> Option<(OnBreak, bool)> {
        let is_new = self.latch(flow).is_none() && !self.is_larval(flow);
        if !is_new || self.covering(flow) != BTreeSet::from([class]) {
            return None;
        }
        match self.listener.filter(|_| flow >= FLOWS) {
            Some((_, wanted, on_break)) => {
                let admitted = direction == Direction::Inbound && (wanted == 3 || wanted == class);
                admitted.then_some((on_break, false))
            }
            None => Some((self.automatic?, true)),
        }
    }

    fn reserved(&self, class: usize, scope: usize) -> BTreeSet<Flow> {
        let stands = |latch: &&ModelLatch| match latch.condition {
            Condition::Established => true,
            Condition::Conflict | Condition::Policy => latch.on_break != OnBreak::Reset,
            Condition::Dead | Condition::Closed => false,
        };
        let others = self.latches.iter().filter(|latch| latch.class != class && in_scope(scope, latch.flow));
        others.filter(stands).map(|latch| flow(latch.flow)).collect()
    }

    fn covering(&self, flow: usize) -> BTreeSet<usize> {
        self.sas.values().filter(|(_, scope)| in_scope(*scope, flow)).map(|(class, _)| *class).collect()
    }

    fn conflict(&mut self, class: usize, scope: usize) {
        for latch in self.latches.iter_mut().filter(|l| l.class != class && in_scope(scope, l.flow)) {
            latch.worsen(Condition::Conflict, &mut self.expected);
        }
    }

    /// BROKEN to ESTABLISHED "when all conflicts are cleared".
    fn restore(&mut self) {
        for n in 0..self.latches.len() {
            let latch = &self.latches[n];
            let clear = self.covering(latch.flow).iter().all(|class| *class == latch.class);
            if latch.condition == Condition::Conflict && latch.on_break != OnBreak::Reset && clear {
                self.latches[n].condition = Condition::Established;
                if !self.latches[n].automatic {
                    self.expected.push((self.latches[n].id, LatchState::Established));
                }
            }
        }
    }

    /// What a packet of a flow meets.
    fn verdict(&self, flow: usize, class: Option<usize>) -> Verdict {
        if self.is_larval(flow) {
            return Verdict::Drop;
        }
        let Some(latch) = self.latches.iter().find(|l| l.flow == flow) else {
            return if self.listener.is_some() && flow >= FLOWS { Verdict::Drop } else { Verdict::Pass };
        };
        match latch.state() {
            LatchState::Established if class == Some(latch.class) => Verdict::Pass,
            LatchState::Broken if latch.on_break == OnBreak::Unreachable => Verdict::Unreachable,
            _ => Verdict::Drop,
        }
    }
}

proptest! {
    #![proptest_config(cases(1024))]

    // RFC 5660 §2, §2.2, §2.3: in any order of SA, SPD, DPD, application and restart events, no packet passes under an
    // SA that is not congruent, and whoever holds a latch hears of a conflict before the SA is in.
    #[test]
    fn the_database_agrees_with_a_simple_model(
        steps in prop::collection::vec(step(), 1..60),
        automatic in prop::sample::select(vec![None, None, Some(OnBreak::Wait), Some(OnBreak::Unreachable)])
    ) {
        let barrier: Arc<FakeBarrier> = Arc::default();
        let started = || {
            let (database, classes) = database();
            database.set_barrier(Arc::clone(&barrier) as _);
            if let Some(on_break) = automatic {
                database.latch_flows(on_break);
            }
            (Arc::new(database), classes)
        };
        let (mut database, classes) = started();
        let told: Arc<Mutex<Vec<Alert>>> = Arc::default();
        // The SA that is going in.
        let coming: Arc<Mutex<Option<u64>>> = Arc::default();
        let holder = |database: &Arc<Database>| -> Box<dyn Fn(Alert) + Send + Sync> {
            let (told, barrier, coming) = (Arc::clone(&told), Arc::clone(&barrier), Arc::clone(&coming));
            let (database, classes) = (Arc::downgrade(database), classes.clone());
            Box::new(move |alert| {
                let open = matches!(barrier.passage(&alert.flow), Some(Passage::Class(_)));
                assert_eq!(open, alert.state == LatchState::Established, "told before the system does as it says");
                let database = database.upgrade().unwrap();
                let passes = |class: &ClassId| {
                    database.check(Direction::Outbound, &alert.flow, Some(*class)) == Verdict::Pass
                };
                assert_eq!(classes.iter().any(passes), open, "told before packets do as it says");
                let coming = *coming.lock().unwrap();
                assert!(!coming.is_some_and(|sa| database.sas_of(&alert.flow).contains(&sa)), "the SA was first");
                told.lock().unwrap().push(alert);
            })
        };
        let pattern = |wanted: usize| if wanted == 3 { IdentityPattern::any() } else { IdentityPattern::exact(identity(wanted)) };
        let mut model = Model { automatic, ..Model::default() };
        for step in steps {
            model.expected.clear();
            match step {
                Step::Install { sa, class, scope, ask_first } => {
                    if model.outranks(class, scope) {
                        let asked = database.before_install(classes[class], &everything(), &scope_ts(scope));
                        prop_assert!(asked.is_err());
                        prop_assert!(database.installed(sa, classes[class], everything(), scope_ts(scope)).is_err());
                        continue;
                    }
                    *coming.lock().unwrap() = (!model.sas.contains_key(&sa)).then_some(sa);
                    if ask_first {
                        // As the daemon does.
                        let outranked = database.outranked(classes[class], &everything(), &scope_ts(scope));
                        prop_assert_eq!(&outranked, &model.outranked(class, scope));
                        for sa in outranked {
                            model.sas.remove(&sa);
                            model.restore();
                            database.removed(sa);
                        }
                        let before = told.lock().unwrap().len();
                        let mut alerts = database.before_install(classes[class], &everything(), &scope_ts(scope)).unwrap();
                        alerts.retain(|alert| !model.is_automatic(alert.latch));
                        prop_assert_eq!(&told.lock().unwrap()[before..], &alerts, "told inside, not later");
                        model.conflict(class, scope);
                        let now: Vec<_> = told.lock().unwrap().iter().map(|alert| (alert.latch, alert.state)).collect();
                        prop_assert_eq!(now, model.expected.clone(), "before the SA is in");
                    } else {
                        model.conflict(class, scope);
                    }
                    model.sas.insert(sa, (class, scope));
                    database.installed(sa, classes[class], everything(), scope_ts(scope)).unwrap();
                    *coming.lock().unwrap() = None;
                }
                Step::Fail { sa, class, scope } => {
                    let asked = database.before_install(classes[class], &everything(), &scope_ts(scope));
                    prop_assert_eq!(asked.is_err(), model.outranks(class, scope));
                    if asked.is_ok() {
                        model.conflict(class, scope);
                    }
                    database.removed(sa);
                    model.sas.remove(&sa);
                    model.restore();
                }
                Step::Remove { sa } => {
                    model.sas.remove(&sa);
                    model.restore();
                    database.removed(sa);
                }
                Step::Dead { sa } => {
                    if let Some((class, _)) = model.sas.remove(&sa) {
                        model.restore();
                        if model.sas.values().all(|(other, _)| *other != class) {
                            for latch in model.latches.iter_mut().filter(|l| l.class == class) {
                                latch.worsen(Condition::Dead, &mut model.expected);
                            }
                        }
                        database.removed(sa);
                        database.peer_is_dead(classes[class]);
                    }
                }
                Step::PeerRestart { class } => {
                    for latch in model.latches.iter_mut().filter(|l| l.class == class) {
                        latch.worsen(Condition::Dead, &mut model.expected);
                    }
                    database.peer_restarted(classes[class]);
                }
                Step::Policy { flow: n, class } => {
                    model.forbidden = (class < 3).then_some((n, class));
                    for latch in &mut model.latches {
                        let forbidden = model.forbidden == Some((latch.flow, latch.class));
                        if forbidden {
                            latch.worsen(Condition::Policy, &mut model.expected);
                        } else if latch.condition == Condition::Policy && latch.on_break != OnBreak::Reset {
                            latch.condition = Condition::Conflict;
                        }
                    }
                    model.restore();
                    let forbidden = model.forbidden;
                    database.policy_changed(|changed, latched| {
                        let hit = forbidden.is_some_and(|(n, class)| flow(n) == *changed && identity(class) == latched.peer.id);
                        hit.then(|| "forbidden".to_owned())
                    });
                }
                Step::Create { flow: n, wanted, on_break } => {
                    let covering = model.covering(n);
                    let request = Request { on_break, ..Request::peer(pattern(wanted)) };
                    let result = database.create(flow(n), &request, holder(&database));
                    let exists = model.is_larval(n)
                        || model.latch(n).is_some_and(|l| !l.automatic || l.condition != Condition::Established);
                    match (exists, covering.len(), covering.first()) {
                        (true, _, _) => prop_assert!(matches!(result, Err(LatchError::Exists(_)))),
                        (_, 0, _) => prop_assert!(matches!(result, Err(LatchError::NoSa(_)))),
                        (_, 1, Some(&class)) if wanted == 3 || wanted == class => {
                            let (id, found) = result.unwrap();
                            prop_assert_eq!(&found.peer.id, &identity(class));
                            prop_assert!(model.latches.iter().all(|l| l.id < id), "numbers grow");
                            // An automatic one gives way.
                            prop_assert!(model.latch(n).is_none_or(|automatic| automatic.class == class));
                            model.latches.retain(|l| l.flow != n);
                            let condition = Condition::Established;
                            let (waiting, automatic) = (false, false);
                            model.add(ModelLatch { id, flow: n, class, on_break, waiting, automatic, condition });
                        }
                        (_, 1, _) => {
                            let wrong_peer = matches!(result, Err(LatchError::WrongPeer { .. }));
                            prop_assert!(wrong_peer);
                        }
                        _ => prop_assert!(matches!(result, Err(LatchError::Conflict(_)))),
                    }
                }
                Step::Listen { wanted, on_break } => {
                    let request = Request { on_break, ..Request::peer(pattern(wanted)) };
                    let result = database.create_listener(listener(), request, holder(&database));
                    match model.listener {
                        Some(_) => prop_assert!(matches!(result, Err(LatchError::Exists(_)))),
                        None => model.listener = Some((result.unwrap(), wanted, on_break)),
                    }
                }
                Step::Packet { direction, flow: n, class } => {
                    let verdict = database.check(direction, &flow(n), Some(classes[class]));
                    if let Some((on_break, automatic)) = model.made_by(direction, n, class) {
                        let id = database.find(&flow(n)).unwrap().0;
                        let (waiting, condition) = (!automatic, Condition::Established);
                        model.add(ModelLatch { id, flow: n, class, on_break, waiting, automatic, condition });
                        if !automatic {
                            model.expected.push((id, LatchState::Established));
                        }
                    }
                    prop_assert_eq!(verdict, model.verdict(n, Some(class)));
                }
                Step::Reserve { flow: n } => {
                    let result = database.reserve(flow(n));
                    let exists = model.is_larval(n)
                        || model.latch(n).is_some_and(|l| !l.automatic || l.condition != Condition::Established);
                    if exists {
                        prop_assert!(matches!(result, Err(LatchError::Exists(_))));
                    } else {
                        model.latches.retain(|l| l.flow != n);
                        model.larval.push((result.unwrap(), n));
                    }
                }
                Step::Establish { nth, wanted, on_break } if !model.larval.is_empty() => {
                    let nth = nth % model.larval.len();
                    let (id, n) = model.larval[nth];
                    let covering = model.covering(n);
                    let request = Request { on_break, ..Request::peer(pattern(wanted)) };
                    let result = database.establish(id, &request, holder(&database));
                    match covering.first() {
                        Some(&class) if covering.len() == 1 && (wanted == 3 || wanted == class) => {
                            prop_assert_eq!(&result.unwrap().0.peer.id, &identity(class));
                            model.larval.remove(nth);
                            let condition = Condition::Established;
                            let (waiting, automatic) = (false, false);
                            model.add(ModelLatch { id, flow: n, class, on_break, waiting, automatic, condition });
                        }
                        _ => prop_assert!(result.is_err()),
                    }
                }
                Step::GiveUp { nth } if !model.larval.is_empty() => {
                    let (id, _) = model.larval.remove(nth % model.larval.len());
                    database.release(id);
                }
                Step::Establish { wanted, .. } => {
                    let request = Request::peer(pattern(wanted));
                    prop_assert!(database.establish(LatchId(u64::MAX), &request, holder(&database)).is_err());
                }
                Step::GiveUp { .. } => database.release(LatchId(u64::MAX)),
                Step::Accept { flow: n } => {
                    let Some((parent, _, _)) = model.listener else { continue };
                    let result = database.accept(parent, &flow(n), None, holder(&database));
                    match model.latches.iter_mut().find(|l| l.flow == n && l.waiting) {
                        Some(latch) if latch.state() == LatchState::Established => {
                            prop_assert_eq!(result.unwrap().0, latch.id);
                            latch.waiting = false;
                        }
                        Some(_) => prop_assert!(matches!(result, Err(LatchError::Broken(_)))),
                        None => prop_assert!(matches!(result, Err(LatchError::NotAccepted(_)))),
                    }
                }
                Step::Release { nth } => {
                    if nth == 7 && let Some((id, _, _)) = model.listener.take() {
                        database.release(id);
                        for latch in model.latches.iter_mut().filter(|l| l.waiting) {
                            // Its maker is gone: nobody can take it, only the sweep releases it.
                            latch.waiting = false;
                        }
                    } else if !model.latches.is_empty() {
                        let latch = model.latches.remove(nth % model.latches.len());
                        database.release(latch.id);
                    }
                }
                Step::Break { nth } | Step::Close { nth } if !model.latches.is_empty() => {
                    let n = nth % model.latches.len();
                    let id = model.latches[n].id;
                    if matches!(step, Step::Break { .. }) {
                        model.latches[n].worsen(Condition::Dead, &mut model.expected);
                        prop_assert!(database.break_latch(id, "test"));
                    } else {
                        model.latches[n].worsen(Condition::Closed, &mut model.expected);
                        prop_assert!(database.close(id, "test"));
                    }
                }
                Step::Break { nth } | Step::Close { nth } => prop_assert!(!database.close(LatchId(nth as u64), "test")),
                // RFC 5660 §2.3: around what is reserved there is room for everybody, and no latch breaks.
                Step::Narrow { class, scope } => {
                    let of_class = |latched: &Class| {
                        if *latched == self::class(class) { Newcomer::Congruent } else { Newcomer::Stranger }
                    };
                    let (local, remote) = (everything(), scope_ts(scope));
                    let reserved: BTreeSet<Flow> = database.reserved(&local, &remote, of_class).into_iter().collect();
                    prop_assert_eq!(&reserved, &model.reserved(class, scope));
                    let reserved: Vec<Flow> = reserved.into_iter().collect();
                    if let Some((local, remote)) = ipsec::exclusion::around(&local, &remote, &reserved) {
                        let broken = database.before_install(classes[class], &local, &remote);
                        prop_assert!(broken.is_ok_and(|broken| broken.is_empty()) || model.outranks(class, scope));
                    }
                }
                Step::Restart => {
                    barrier.restart();
                    database = started().0;
                    model = Model { automatic, ..Model::default() };
                }
            }
            let alerts: Vec<_> = told.lock().unwrap().drain(..).map(|alert| (alert.latch, alert.state)).collect();
            prop_assert_eq!(alerts, model.expected.clone());
            for class in [None, Some(0), Some(1), Some(2), Some(NOBODY)] {
                let number = class.map(|n: usize| classes[n]);
                for n in 0..ALL_FLOWS {
                    let verdict = model.verdict(n, class);
                    // Packets of flows without a latch may make one: `Packet` looks at those.
                    let makes = |direction| class.is_some_and(|class| model.made_by(direction, n, class).is_some());
                    if !makes(Direction::Outbound) {
                        prop_assert_eq!(database.check(Direction::Outbound, &flow(n), number), verdict);
                        prop_assert_eq!(database.check_later(&flow(n), number), verdict);
                    }
                    if !makes(Direction::Inbound) {
                        prop_assert_eq!(database.check(Direction::Inbound, &flow(n), number), verdict);
                    }
                }
                let tcp = model.latches.iter().filter(|l| l.flow != UDP_FLOW);
                let mut admitted = tcp.into_iter().all(|l| l.state() == LatchState::Established && Some(l.class) == class);
                admitted &= model.larval.iter().all(|(_, flow)| *flow == UDP_FLOW);
                let fragment = Flow { protocol: 6, local_port: 0, remote_port: 0, ..flow(0) };
                let none = model.latches.iter().all(|l| l.flow == UDP_FLOW);
                let admitted = admitted && !(none && model.listener.is_some());
                let verdict = if admitted { Verdict::Pass } else { Verdict::Drop };
                prop_assert_eq!(database.check(Direction::Inbound, &fragment, number), verdict);
            }
            // RFC 5660 §2 (13, 14): the system lets pass what the latch does, and what was latched once not at all.
            for n in 0..ALL_FLOWS {
                let passage = barrier.passage(&flow(n));
                match model.latch(n) {
                    None if model.is_larval(n) => prop_assert_eq!(passage, Some(Passage::Larval)),
                    Some(latch) if latch.automatic => prop_assert!(matches!(passage, None | Some(Passage::None))),
                    Some(latch) if latch.condition == Condition::Established => {
                        prop_assert_eq!(passage, Some(Passage::Class(classes[latch.class])));
                    }
                    Some(_) => prop_assert_eq!(passage, Some(Passage::None)),
                    None => prop_assert!(matches!(passage, None | Some(Passage::None))),
                }
            }
            let listed: Vec<_> = database.list().into_iter().map(|(id, flow, state, _)| (id, flow, state)).collect();
            let asked_for = model.latches.iter().filter(|l| !l.automatic);
            let modelled: Vec<_> = asked_for.map(|l| (l.id, flow(l.flow), l.state())).collect();
            prop_assert_eq!(listed, modelled);
            let standing = database.automatic_flows().map(|flows| flows.latches);
            prop_assert_eq!(standing, automatic.map(|_| model.latches.iter().filter(|l| l.automatic).count()));
        }
        let larval = model.larval.iter().map(|(id, _)| *id);
        for id in model.latches.iter().map(|latch| latch.id).chain(larval) {
            database.release(id);
        }
        if let Some((id, _, _)) = model.listener {
            database.release(id);
        }
        prop_assert!(database.pairs.is_empty() && database.flows.len() == 0 && database.ports.is_empty());
        prop_assert_eq!(database.latched.load(Ordering::SeqCst), usize::from(automatic.is_some()));
        let control = database.control();
        prop_assert!(control.standing.is_empty() && control.fallen.is_empty() && control.recoverable.is_empty());
        drop(control);
        database.lift_abandoned(|_| true);
        prop_assert!(barrier.flows.lock().unwrap().is_empty());
    }
}

/// The system's barrier: what passes of each flow, and whether its latch is gone.
#[derive(Default)]
struct FakeBarrier {
    flows: Mutex<BTreeMap<Flow, (Passage, bool)>>,
    ports: Mutex<BTreeMap<Port, Vec<Claim>>>,
    /// Those of an earlier process.
    ports_left: Mutex<BTreeSet<Port>>,
    passed_by: Mutex<Vec<Flow>>,
    refuses: AtomicBool,
    alone: bool,
}

impl FakeBarrier {
    fn passage(&self, flow: &Flow) -> Option<Passage> {
        self.flows.lock().unwrap().get(flow).map(|(passage, _)| *passage)
    }

    fn restart(&self) {
        self.flows.lock().unwrap().values_mut().for_each(|state| *state = (Passage::None, true));
        let mut ports = self.ports.lock().unwrap();
        ports.values_mut().for_each(Vec::clear);
        self.ports_left.lock().unwrap().extend(ports.keys().copied());
    }
}

impl FlowBarrier for FakeBarrier {
    fn set(&self, flow: &Flow, passage: Passage) -> Result<(), String> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err("refused".to_owned());
        }
        self.flows.lock().unwrap().insert(*flow, (passage, false));
        Ok(())
    }

    fn abandon(&self, flow: &Flow) {
        if let Some(state) = self.flows.lock().unwrap().get_mut(flow) {
            *state = (Passage::None, true);
        }
    }

    fn abandoned(&self) -> Vec<Flow> {
        let flows = self.flows.lock().unwrap();
        flows.iter().filter(|(_, (_, abandoned))| *abandoned).map(|(flow, _)| *flow).collect()
    }

    fn lift(&self, flow: &Flow) {
        self.flows.lock().unwrap().remove(flow);
    }

    fn verify(&self) -> Vec<Flow> {
        self.passed_by.lock().unwrap().clone()
    }

    fn set_port(&self, port: &Port, claims: &[Claim]) -> Result<(), String> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err("refused".to_owned());
        }
        self.ports.lock().unwrap().insert(*port, claims.to_vec());
        self.ports_left.lock().unwrap().remove(port);
        Ok(())
    }

    fn lift_port(&self, port: &Port) {
        self.ports.lock().unwrap().remove(port);
        self.ports_left.lock().unwrap().remove(port);
    }

    fn abandoned_ports(&self) -> Vec<Port> {
        self.ports_left.lock().unwrap().iter().copied().collect()
    }

    fn holds_back_errors(&self) -> bool {
        false
    }

    fn stands_alone(&self) -> bool {
        self.alone
    }
}

// RFC 5660 §2.3 (27): without anything that enforces it, there is no latch.
#[test]
fn where_the_system_does_esp_there_is_no_latch_without_its_barrier() {
    for alone in [true, false] {
        let (database, classes) = database();
        let barrier = Arc::new(FakeBarrier { alone, ..FakeBarrier::default() });
        database.set_barrier(Arc::clone(&barrier) as _);
        install(&database, 1, classes[0]);
        barrier.refuses.store(true, Ordering::SeqCst);
        let refused = database.create(flow(1), &any(), ignore());
        if alone {
            assert!(matches!(&refused, Err(LatchError::Unenforced { reason, .. }) if reason == "refused"));
            assert!(database.list().is_empty());
        } else {
            assert_eq!(database.protector(refused.unwrap().0), Some(Protector::Engine), "it is told");
        }
        barrier.refuses.store(false, Ordering::SeqCst);
        let (latch, _) = database.create(flow(2), &any(), ignore()).unwrap();
        let protector = if alone { Protector::System } else { Protector::EngineAndSystem };
        assert_eq!(database.protector(latch), Some(protector));
        // The system fails at the worst moment: what it has demands the latched class, and the packet check drops all.
        barrier.refuses.store(true, Ordering::SeqCst);
        assert_eq!(
            database.before_install(classes[1], &everything(), &everything()).unwrap().len(),
            1 + usize::from(!alone)
        );
        assert_eq!(barrier.passage(&flow(2)), Some(Passage::Class(classes[0])));
        assert_eq!(database.check(Direction::Outbound, &flow(2), Some(classes[1])), Verdict::Drop);
    }
}

// RFC 5660 §2, §2.3: a LARVAL latch lets nothing pass, until it is ESTABLISHED or released.
#[test]
fn nothing_passes_while_a_latch_is_larval() {
    for alone in [false, true] {
        larval(alone);
    }
}

/// `alone` is where the system does ESP.
fn larval(alone: bool) {
    let (database, classes) = database();
    let barrier = Arc::new(FakeBarrier { alone, ..FakeBarrier::default() });
    database.set_barrier(Arc::clone(&barrier) as _);
    let latch = database.reserve(flow(1)).unwrap();
    assert!(matches!(database.reserve(flow(1)), Err(LatchError::Exists(_))));
    let shut = || {
        for class in [Some(classes[0]), Some(classes[1]), None] {
            for direction in [Direction::Inbound, Direction::Outbound] {
                assert_eq!(database.check(direction, &flow(1), class), Verdict::Drop);
            }
        }
        assert_eq!(barrier.passage(&flow(1)), Some(Passage::Larval));
        let fragment = Flow { local_port: 0, remote_port: 0, ..flow(1) };
        assert_eq!(database.check(Direction::Inbound, &fragment, Some(classes[0])), Verdict::Drop);
    };
    shut();
    assert!(matches!(database.establish(latch, &any(), ignore()), Err(LatchError::NoSa(_))));
    // SAs of anybody do not break it, and open nothing.
    install(&database, 1, classes[1]);
    assert!(matches!(database.create(flow(1), &any(), ignore()), Err(LatchError::Exists(_))));
    let wanted = Request::peer(IdentityPattern::exact(identity(0)));
    assert!(matches!(database.establish(latch, &wanted, ignore()), Err(LatchError::WrongPeer { .. })));
    install(&database, 2, classes[0]);
    assert!(matches!(database.establish(latch, &wanted, ignore()), Err(LatchError::Conflict(_))));
    shut();
    database.removed(1);
    database.keep(&flow(1), b"SYN");
    database.keep(&flow(2), b"another flow's");
    let (class, packet) = database.establish(latch, &wanted, ignore()).unwrap();
    assert_eq!((&class.peer.id, packet.as_deref()), (&identity(0), Some(&b"SYN"[..])));
    database.keep(&flow(1), b"what passes by itself");
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[0])), Verdict::Pass);
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[1])), Verdict::Drop);
    assert_eq!(barrier.passage(&flow(1)), Some(Passage::Class(classes[0])));
    assert_eq!(database.find(&flow(1)).map(|(found, state, _)| (found, state)), Some((latch, LatchState::Established)));
    // From here on it is a latch as any other, and made once.
    assert!(database.establish(latch, &wanted, ignore()).is_err());
    assert_eq!(database.before_install(classes[1], &everything(), &everything()).unwrap().len(), 1);
    database.release(latch);
    let gone = database.reserve(flow(2)).unwrap();
    database.keep(&flow(2), b"what nobody will send");
    database.release(gone);
    for flow in [flow(1), flow(2)] {
        assert_eq!(database.check(Direction::Outbound, &flow, Some(classes[1])), Verdict::Pass);
        assert_eq!(barrier.passage(&flow), Some(Passage::None), "until its connection has ended");
    }
    assert!(database.establish(gone, &any(), ignore()).is_err());
    assert_eq!(database.kept.take(&flow(2)), None);
    assert_eq!(database.latched.load(Ordering::SeqCst), 0);
    let nowhere = Flow { remote_port: 0, ..flow(1) };
    assert!(matches!(database.reserve(nowhere), Err(LatchError::NotAConnection(_))));
}

// RFC 5660 §2 (14): what was made for a latch goes with its connection, and not before.
#[test]
fn the_system_s_barrier_stays_until_the_connection_has_ended() {
    let (database, classes) = database();
    let barrier: Arc<FakeBarrier> = Arc::default();
    database.set_barrier(Arc::clone(&barrier) as _);
    install(&database, 1, classes[0]);
    let (latch, _) = database.create(flow(1), &any(), ignore()).unwrap();
    database.release(latch);
    assert_eq!(database.abandoned(), [flow(1)]);
    database.lift_abandoned(|_| false);
    assert_eq!(barrier.passage(&flow(1)), Some(Passage::None), "its last packets");
    let (latch, _) = database.create(flow(1), &any(), ignore()).unwrap();
    database.lift_abandoned(|_| true);
    assert_eq!(barrier.passage(&flow(1)), Some(Passage::Class(classes[0])), "a new latch has it");
    database.release(latch);
    database.lift_abandoned(|flow| flow.remote_port == 5001);
    assert_eq!(barrier.passage(&flow(1)), None);
}

/// So many random cases, or as `PROPTEST_CASES` says.
fn cases(usually: u32) -> ProptestConfig {
    let wanted = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok());
    ProptestConfig::with_cases(wanted.unwrap_or(usually))
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
    #![proptest_config(cases(1024))]

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
            database.installed(*sa, classes[*class], ours.clone(), selectors(ranges)).unwrap();
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
        let newcomer_sa = CoveringSa { class: classes[2], local_ts: ours.clone(), remote_ts: ts.clone() };
        let overlapping: BTreeSet<u64> = database.control().sas.overlapping(&newcomer_sa).map(|(sa, _)| sa).collect();
        let share = |one: &[TrafficSelector]| one.iter().any(|one| ts.iter().any(|ts| one.intersect(ts).is_some()));
        let simple: BTreeSet<u64> = there.iter().filter(|(_, (_, ts))| share(ts)).map(|(sa, _)| *sa).collect();
        prop_assert_eq!(overlapping, simple);
        let alerts: Vec<LatchId> =
            database.before_install(classes[2], &ours, &ts).unwrap().into_iter().map(|alert| alert.latch).collect();
        let simple: Vec<LatchId> =
            latched.iter().filter(|(_, flow)| covers(&ours, &ts, flow)).map(|(id, _)| *id).collect();
        prop_assert_eq!(alerts, simple);
        for sa in there.keys() {
            database.removed(*sa);
        }
        prop_assert!(database.control().sas.is_empty());
    }
}

/// Flows 0 to 2 are to many remote ports, 3 and 4 to our port 80 besides, where a listener may be.
/// Flows that listeners have nothing to do with; one of them is UDP.
const FLOWS: usize = 3;
const ALL_FLOWS: usize = 5;
const UDP_FLOW: usize = 0;

fn listener() -> Listener {
    Listener { protocol: 6, local: Some(flow(0).local), ipv4: true, ipv6: false, port: 80 }
}

fn step() -> impl Strategy<Value = Step> {
    let on_break = || prop::sample::select(vec![OnBreak::Reset, OnBreak::Wait, OnBreak::Unreachable]);
    let direction = || prop::sample::select(vec![Direction::Inbound, Direction::Outbound]);
    let (sa, class, scope, latch) = (|| 0..4_u64, || 0..4_usize, || 0..=ALL_FLOWS, || 0..8_usize);
    prop_oneof![
        4 => (sa(), class(), scope(), prop::bool::ANY).prop_map(|(sa, class, scope, ask_first)| Step::Install {
            sa,
            class,
            scope,
            ask_first
        }),
        1 => (sa(), class(), scope()).prop_map(|(sa, class, scope)| Step::Fail { sa, class, scope }),
        3 => sa().prop_map(|sa| Step::Remove { sa }),
        1 => sa().prop_map(|sa| Step::Dead { sa }),
        1 => (0..ALL_FLOWS, 0..4_usize).prop_map(|(flow, class)| Step::Policy { flow, class }),
        4 => (0..ALL_FLOWS, 0..4_usize, on_break())
            .prop_map(|(flow, wanted, on_break)| Step::Create { flow, wanted, on_break }),
        2 => (0..4_usize, on_break()).prop_map(|(wanted, on_break)| Step::Listen { wanted, on_break }),
        1 => class().prop_map(|class| Step::PeerRestart { class }),
        3 => (direction(), FLOWS..ALL_FLOWS, class())
            .prop_map(|(direction, flow, class)| Step::Packet { direction, flow, class }),
        2 => (direction(), 0..FLOWS, class())
            .prop_map(|(direction, flow, class)| Step::Packet { direction, flow, class }),
        2 => (0..ALL_FLOWS).prop_map(|flow| Step::Reserve { flow }),
        2 => (latch(), 0..4_usize, on_break())
            .prop_map(|(nth, wanted, on_break)| Step::Establish { nth, wanted, on_break }),
        1 => latch().prop_map(|nth| Step::GiveUp { nth }),
        2 => (FLOWS..ALL_FLOWS).prop_map(|flow| Step::Accept { flow }),
        2 => latch().prop_map(|nth| Step::Release { nth }),
        1 => latch().prop_map(|nth| Step::Break { nth }),
        1 => latch().prop_map(|nth| Step::Close { nth }),
        2 => (class(), scope()).prop_map(|(class, scope)| Step::Narrow { class, scope }),
        1 => Just(Step::Restart),
    ]
}

/// A scope is one flow, or everything.
fn in_scope(scope: usize, flow: usize) -> bool {
    scope == ALL_FLOWS || scope == flow
}

fn scope_ts(scope: usize) -> Vec<TrafficSelector> {
    if scope == ALL_FLOWS {
        return everything();
    }
    let Flow { protocol, remote_port, .. } = flow(scope);
    vec![TrafficSelector { protocol, ..port(remote_port) }]
}

fn flow(n: usize) -> Flow {
    Flow {
        protocol: if n == UDP_FLOW { 17 } else { 6 },
        local: "192.0.2.1".parse().unwrap(),
        local_port: if n < FLOWS { 40_000 } else { 80 },
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

fn any() -> Request {
    Request::peer(IdentityPattern::any())
}

fn waiting() -> Request {
    Request { on_break: OnBreak::Wait, ..any() }
}

/// The class of a peer that has proved nothing.
const NOBODY: usize = 3;

fn identity(n: usize) -> Identity {
    Identity::Fqdn(format!("peer-{n}.example"))
}

fn class(n: usize) -> Class {
    Class {
        peer: Arc::new(PeerIdentity {
            id: identity(n),
            local_id: Identity::Fqdn("us.example".into()),
            proof: if n == NOBODY { Proof::Unauthenticated { lineage: [3; 32] } } else { Proof::PreSharedKey },
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

fn raw_key(key: &[u8], method: AuthMethod) -> Proof {
    Proof::RawKey { key: key.to_vec(), method }
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
    let classes = (0..4).map(|n| database.intern(class(n))).collect();
    (database, classes)
}

fn install(database: &Database, sa: u64, class: ClassId) {
    database.before_install(class, &everything(), &everything()).unwrap();
    database.installed(sa, class, everything(), everything()).unwrap();
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
