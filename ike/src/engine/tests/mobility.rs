//! MOBIKE (RFC 4555): who moves, when, and what nobody can make move.

use super::*;
use crate::sa::channel::Received;
use crate::sa::fault::notify;
use crate::sa::parts::Parts;
use crate::wire::{NotifyType, Payload};

fn mobile(side: usize) -> Connection {
    Connection { mobike: true, ..connection(side) }
}

fn mobile_pair(seed: u64) -> Pair {
    Pair::with(seed, EngineConfig::default(), mobile(A), mobile(B))
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A second address of a side.
fn second(side: usize) -> IpAddr {
    if side == A { ip("10.0.1.1") } else { ip("10.0.1.2") }
}

/// Established with MOBIKE, both engines knowing their addresses from the beginning.
fn mobile_up(mut pair: Pair) -> Pair {
    pair.roam(A);
    pair.roam(B);
    let pair = established(pair);
    assert!(pair.sides[A].logged("peer supports MOBIKE") && pair.sides[B].logged("peer supports MOBIKE"));
    assert_aligned(&pair);
    pair
}

/// A loses its address and gets another.
fn move_a(pair: &mut Pair) {
    pair.gone = vec![address(A)];
    pair.more[A] = vec![second(A)];
    pair.roam(A);
}

/// Both sides' IKE SA and Child SAs are between the same addresses.
fn assert_aligned(pair: &Pair) {
    let (a, b) = (pair.sides[A].only().path, pair.sides[B].only().path);
    if pair.nat.is_none() {
        assert_eq!((a.local, a.remote), (b.remote, b.local));
    }
    for side in &pair.sides {
        let Path { local, remote, .. } = side.only().path;
        for installed in side.installed.values() {
            let to = installed.encapsulation;
            assert_eq!((to.local(), to.remote()), (local.ip(), remote.ip()), "{:#?}", side.events);
        }
    }
}

fn established_sa(pair: &mut Pair, side: usize) -> &mut Established {
    let slot = pair.sides[side].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    sa
}

/// A side, authenticated, sends an INFORMATIONAL request that arrives along `path`; gives the answer and where it went.
fn ask(pair: &mut Pair, from: usize, path: Path, payloads: &[Payload]) -> (Parts, Path) {
    let policy = pair.sides[from].engine.ctx.config.retransmission;
    let retry = retry::Retry::start(pair.now, &policy, false, &mut TestRng(1));
    let sa = established_sa(pair, from);
    let sealed = sa.channel.request(ExchangeType::INFORMATIONAL, payloads, None, retry, &mut TestRng(9)).unwrap();
    let (now, to) = (pair.now, 1 - from);
    let before = pair.sides[to].sent.len();
    pair.sides[to].engine.handle_message(now, path, &sealed[0]);
    pair.drain(to);
    let answer = pair.sides[to].sent[before].clone();
    let Ok(Incoming::Protected(protected)) = wire::parse(&answer.bytes) else { panic!("a protected answer") };
    let received = established_sa(pair, from).channel.receive(protected, &answer.bytes);
    let Received::Response(opened) = received else { panic!("a response") };
    (Parts::of(&opened).unwrap(), answer.path)
}

fn seen_from(pair: &Pair, to: usize, remote: &str) -> Path {
    Path { remote: remote.parse().unwrap(), ..pair.sides[to].only().path }
}

fn update() -> Payload {
    notify(NotifyType::UPDATE_SA_ADDRESSES, Vec::new())
}

// RFC 4555 §3.2, §3.3: both say it, and both use port 4500 without a NAT; ESP stays as it is.
#[test]
fn mobike_is_agreed_on_and_moves_to_the_encapsulation_port() {
    let pair = mobile_up(mobile_pair(400));
    for side in &pair.sides {
        let path = side.only().path;
        assert_eq!((path.transport, path.local.port(), path.remote.port()), (Transport::UdpEncap, 4500, 4500));
        assert!(side.installed.values().all(|pair| matches!(pair.encapsulation, Encapsulation::None { .. })));
    }
}

// RFC 4555 §3.2: who does not want it says nothing, and the other does not insist.
#[test]
fn one_side_without_mobike_is_without_mobike() {
    for (of_a, of_b) in [(mobile(A), connection(B)), (connection(A), mobile(B))] {
        let mut pair = Pair::with(401, EngineConfig::default(), of_a, of_b);
        pair.roam(A);
        let mut pair = established(pair);
        assert!(!pair.sides[A].logged("supports MOBIKE") && !pair.sides[B].logged("supports MOBIKE"));
        let b = pair.sides[B].only();
        let path = seen_from(&pair, B, "10.0.1.1:4500");
        let (answer, _) = ask(&mut pair, A, path, &[update(), notify(NotifyType::COOKIE2, vec![1; 16])]);
        assert!(answer.notifies.is_empty());
        assert_eq!(pair.sides[B].only().path, b.path);
    }
}

// RFC 4555 §3.5, §3.7: the IKE SA and its Child SAs move, with the same keys, after the address was shown to work.
#[test]
fn a_new_address_moves_everything() {
    let mut pair = mobile_up(mobile_pair(402));
    let before = (pair.sides[A].only(), pair.sides[B].installed.clone());
    move_a(&mut pair);
    pair.run(seconds(1));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
    let after = pair.sides[A].only();
    assert_eq!(after.path.local.ip(), second(A));
    assert_eq!(after.initiator_spi, before.0.initiator_spi);
    let keys = |installed: &BTreeMap<u32, Installed>| installed.values().next().unwrap().keys_in.clone();
    assert_eq!(keys(&before.1), keys(&pair.sides[B].installed));
    assert!(pair.sides[B].logged("checking return routability"));
}

// RFC 4555 §3.7: until the answer with the cookie came, nothing of the Child SAs goes to the new address.
#[test]
fn the_responder_checks_before_it_sends_there() {
    let mut pair = mobile_up(mobile_pair(403));
    let to = pair.sides[B].installed.values().next().unwrap().encapsulation;
    let path = seen_from(&pair, B, "10.0.1.1:4500");
    pair.cut = true;
    let (answer, went) = ask(&mut pair, A, path, &[update()]);
    assert!(answer.error().is_none());
    assert_eq!(went, path);
    assert_eq!(pair.sides[B].only().path, path, "the IKE SA has moved");
    pair.run(seconds(100));
    assert_eq!(pair.sides[B].installed.values().next().unwrap().encapsulation, to, "the Child SA has not");
    pair.run(seconds(100));
    assert!(pair.sides[B].down(CloseReason::Timeout));
}

// RFC 4555 §3.5: an address that was checked before is not checked again.
#[test]
fn a_known_address_is_followed_at_once() {
    let mut pair = mobile_up(mobile_pair(404));
    pair.more[A] = vec![second(A)];
    for gone in [address(A), second(A), address(A)] {
        pair.gone = vec![gone];
        pair.roam(A);
        pair.run(seconds(2));
        assert_aligned(&pair);
        pair.assert_same(1, 1);
    }
    let checks = |event: &&Event| matches!(event, Event::Log { message, .. } if message.contains("routability"));
    assert_eq!(pair.sides[B].events.iter().filter(checks).count(), 1);
}

// RFC 4555 §3.8: no INFORMATIONAL exchange without UPDATE_SA_ADDRESSES changes anything, wherever it comes from.
#[test]
fn only_an_update_moves_the_responder() {
    let mut pair = mobile_up(mobile_pair(405));
    let before = pair.sides[B].only().path;
    let path = seen_from(&pair, B, "10.0.1.1:4500");
    let (_, went) = ask(&mut pair, A, path, &[notify(NotifyType::COOKIE2, vec![1; 8])]);
    assert_eq!(went, path, "answered where it came from");
    assert_eq!(pair.sides[B].only().path, before);
}

// RFC 4555 §2.1, §3.5: only the initiator decides, also after the responder has rekeyed the IKE SA.
#[test]
fn only_the_initiator_may_update() {
    let mut pair = mobile_up(mobile_pair(406));
    let ike = pair.sides[B].only().id;
    let now = pair.now;
    pair.sides[B].engine.rekey(now, Target::Ike(ike), 5).unwrap();
    pair.run(seconds(2));
    assert!(!pair.sides[A].only().initiator, "B began this IKE SA");
    let before = pair.sides[A].only().path;
    let path = seen_from(&pair, A, "10.0.1.2:4500");
    let (answer, _) = ask(&mut pair, B, path, &[update()]);
    assert!(answer.has(NotifyType::UNACCEPTABLE_ADDRESSES));
    assert_eq!(pair.sides[A].only().path, before);
    move_a(&mut pair);
    pair.run(seconds(2));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
    assert_eq!(pair.sides[B].only().path.remote.ip(), second(A));
}

// Replayed and forged updates move nothing; a true one again gets the same octets.
#[test]
fn replayed_and_forged_updates_move_nothing() {
    let mut pair = mobile_up(mobile_pair(407));
    pair.more[A] = vec![second(A)];
    let from = pair.sides[A].sent.len();
    pair.gone = vec![address(A)];
    pair.roam(A);
    pair.run(seconds(2));
    let update = pair.sides[A].sent[from].clone();
    let message_id = |sent: &Transmit| init::header(&sent.bytes).message_id;
    let answers = |sent: &&Transmit| init::header(&sent.bytes).response && message_id(sent) == message_id(&update);
    let answer = pair.sides[B].sent.iter().rfind(answers).unwrap().clone();
    pair.gone = vec![second(A)];
    pair.roam(A);
    pair.run(seconds(2));
    assert_aligned(&pair);
    let before = pair.snapshot(B);
    let now = pair.now;
    let path = Path { local: update.path.remote, remote: update.path.local, transport: update.path.transport };
    pair.sides[B].engine.handle_message(now, path, &update.bytes);
    // It is inside the window.
    assert!(matches!(pair.sides[B].engine.poll_output(), Some(Output::Transmit(again)) if again.bytes == answer.bytes));
    for flip in [Some(30), Some(17), Some(20)] {
        let mut bytes = update.bytes.clone();
        if let Some(at) = flip {
            bytes[at] ^= 1;
        }
        pair.sides[B].engine.handle_message(now, path, &bytes);
        assert!(pair.sides[B].engine.poll_output().is_none());
    }
    assert_eq!(before, pair.snapshot(B));
}

// RFC 4555 §3.2, §5.1: an IKE SA whose peer has proved nothing has no addresses to update.
#[test]
fn nothing_moves_before_authentication() {
    let mut pair = mobile_pair(408);
    pair.job_delay = seconds(10);
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(100));
    assert_eq!(pair.sides[B].only().state, IkeState::Connecting);
    let before = pair.sides[B].only().path;
    pair.gone = vec![address(A)];
    pair.more[A] = vec![second(A)];
    pair.roam(A);
    pair.roam(B);
    pair.run(Duration::from_millis(100));
    assert_eq!(pair.sides[B].only().path, before);
}

// RFC 4555 §3.7: the recipient copies COOKIE2 of 8 to 64 octets.
#[test]
fn cookie2_is_answered() {
    let mut pair = mobile_up(mobile_pair(409));
    for side in [A, B] {
        let path = pair.sides[1 - side].only().path;
        for length in [8, 64] {
            let (answer, _) = ask(&mut pair, side, path, &[notify(NotifyType::COOKIE2, vec![7; length])]);
            assert_eq!(answer.notify(NotifyType::COOKIE2).unwrap().data, vec![7; length]);
        }
        for length in [0, 7, 65] {
            let (answer, _) = ask(&mut pair, side, path, &[notify(NotifyType::COOKIE2, vec![7; length])]);
            assert!(!answer.has(NotifyType::COOKIE2), "{length} octets are no cookie");
        }
    }
}

/// B answers A's outstanding request with these payloads.
fn answer_outstanding(pair: &mut Pair, payloads: &[Payload]) {
    let request = pair.sides[A].sent.last().unwrap().clone();
    let Ok(Incoming::Protected(protected)) = wire::parse(&request.bytes) else { panic!("a protected request") };
    let sa = established_sa(pair, B);
    let Received::Request(_) = sa.channel.receive(protected, &request.bytes) else { panic!("a request") };
    let answer = sa.channel.respond(payloads, None, &mut TestRng(7)).unwrap();
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, request.path, &answer[0]);
    pair.drain(A);
}

// RFC 4555 §3.7: another value, or none, closes the IKE SA.
#[test]
fn a_wrong_cookie2_closes_the_ike_sa() {
    for payloads in [vec![], vec![notify(NotifyType::COOKIE2, vec![0; 16])]] {
        let mut pair = mobile_up(mobile_pair(410));
        pair.cut = true;
        move_a(&mut pair);
        answer_outstanding(&mut pair, &payloads);
        assert!(pair.sides[A].logged("COOKIE2 mismatch") && pair.sides[A].down(CloseReason::Failed));
        assert!(pair.sides[A].installed.is_empty());
    }
}

// RFC 4555 §3.5: refused addresses are left; without others the IKE SA waits for some.
#[test]
fn unacceptable_addresses_are_left_for_others() {
    let mut pair = mobile_up(mobile_pair(411));
    let third = ip("10.0.2.1");
    pair.gone = vec![address(A)];
    pair.more[A] = vec![second(A), third];
    pair.cut = true;
    pair.roam(A);
    assert_eq!(pair.sides[A].only().path.local.ip(), second(A));
    answer_outstanding(&mut pair, &[notify(NotifyType::UNACCEPTABLE_ADDRESSES, Vec::new())]);
    assert_eq!(pair.sides[A].only().path.local.ip(), third);
    pair.cut = false;
    pair.run(seconds(3));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
}

// RFC 4555 §3.5: what is outstanding goes on along the new path, octet for octet, and with it the update.
#[test]
fn an_outstanding_request_goes_on_along_the_new_path() {
    let mut pair = mobile_up(mobile_pair(412));
    let child = pair.sides[A].only().children[0].id;
    pair.cut = true;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.run(seconds(1));
    let request = pair.sides[A].sent.last().unwrap().clone();
    pair.cut = false;
    let from = pair.sides[A].sent.len();
    move_a(&mut pair);
    let [again, update] = &pair.sides[A].sent[from..] else { panic!("two requests") };
    assert_eq!(again.bytes, request.bytes);
    assert_eq!((again.path.local.ip(), update.path), (second(A), again.path));
    pair.run(seconds(10));
    assert!(pair.sides[A].done(2));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
}

// RFC 4555 §3.5: a change during the update begins again; the answer to the first says nothing.
#[test]
fn a_change_during_an_update_begins_again() {
    let mut pair = mobile_up(mobile_pair(413));
    pair.delay = (Duration::ZERO, Duration::from_millis(200));
    move_a(&mut pair);
    pair.run(Duration::from_millis(300));
    let third = ip("10.0.2.1");
    pair.gone.push(second(A));
    pair.more[A].push(third);
    pair.roam(A);
    pair.run(seconds(5));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
    assert_eq!(pair.sides[B].only().path.remote.ip(), third);
}

// RFC 4555 §3.10, §3.5: of all pairs of addresses one works; it is found, soon, and used.
#[test]
fn path_testing_finds_the_pair_that_works() {
    for (seed, works) in
        [(second(A), second(B)), (second(A), address(B)), (address(A), second(B))].into_iter().enumerate()
    {
        let of = |side| Connection { dpd_delay: seconds(5), ..mobile(side) };
        let mut pair = Pair::with(414 + seed as u64, EngineConfig::default(), of(A), of(B));
        pair.more = [vec![second(A)], vec![second(B)]];
        let mut pair = mobile_up(pair);
        for local in [address(A), second(A)] {
            for remote in [address(B), second(B)] {
                if (local, remote) != works {
                    pair.broken.push((local, remote));
                }
            }
        }
        pair.run(seconds(30));
        pair.assert_same(1, 1);
        let path = pair.sides[A].only().path;
        assert_eq!((path.local.ip(), path.remote.ip()), works, "{:#?}", pair.sides[A].events);
        assert_aligned(&pair);
    }
}

// The local address vanishes and the peer's is dead at once: all pairs are tried, within seconds.
#[test]
fn a_vanished_address_and_a_dead_peer_address_at_once() {
    let mut pair = mobile_pair(417);
    pair.more = [vec![second(A)], vec![second(B)]];
    let mut pair = mobile_up(pair);
    pair.broken = vec![(second(A), address(B))];
    pair.gone = vec![address(A)];
    pair.roam(A);
    pair.run(seconds(4));
    pair.assert_same(1, 1);
    let path = pair.sides[A].only().path;
    assert_eq!((path.local.ip(), path.remote.ip()), (second(A), second(B)));
    assert_aligned(&pair);
}

// RFC 4555 §3.5, §3.6: the responder's address goes: it tells, from another, and the initiator chooses.
#[test]
fn a_responder_tells_its_new_address_and_the_initiator_follows() {
    let mut pair = mobile_up(mobile_pair(418));
    pair.gone = vec![address(B)];
    pair.more[B] = vec![second(B)];
    pair.roam(B);
    pair.run(seconds(3));
    pair.assert_same(1, 1);
    let path = pair.sides[A].only().path;
    assert_eq!(path.remote.ip(), second(B));
    assert_aligned(&pair);
}

// RFC 4555 §3.6, and everything at the same time: both lose their addresses while the IKE SA is being rekeyed.
#[test]
fn both_sides_move_and_rekey_at_once() {
    for seed in 0..40 {
        let mut pair = mobile_pair(seed);
        pair.more = [vec![second(A)], vec![second(B)]];
        let mut pair = mobile_up(pair);
        let side = usize::from(seed % 2 == 0);
        let ike = pair.sides[side].only().id;
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Ike(ike), 2).unwrap();
        let wait = Duration::from_millis(pair.rng.below(60));
        pair.run(wait);
        pair.gone = vec![address(A), address(B)];
        let wait = Duration::from_millis(pair.rng.below(60));
        pair.roam(seed as usize / 2 % 2);
        pair.run(wait);
        pair.roam(1 - seed as usize / 2 % 2);
        pair.run(seconds(400));
        pair.assert_same(1, 1);
        assert_aligned(&pair);
        assert_eq!(pair.sides[A].only().path.remote.ip(), second(B), "seed {seed}");
    }
}

// RFC 4555 §3.4, §3.6: the lists are whole each time, bounded, and nothing else than addresses gets into them.
#[test]
fn addresses_of_the_peer_are_bounded_and_sane() {
    let mut pair = mobile_up(mobile_pair(419));
    let path = pair.sides[A].only().path;
    let path = Path { local: path.local, remote: path.remote, ..path };
    let four = |octets: [u8; 4]| notify(NotifyType::ADDITIONAL_IP4_ADDRESS, octets.to_vec());
    let mut payloads: Vec<Payload> = (0..40).map(|n| four([10, 9, 9, n])).collect();
    payloads.insert(0, notify(NotifyType::ADDITIONAL_IP4_ADDRESS, vec![1; 3]));
    payloads.insert(0, notify(NotifyType::ADDITIONAL_IP6_ADDRESS, vec![1; 4]));
    payloads.insert(0, four([224, 0, 0, 1]));
    payloads.insert(0, four([0, 0, 0, 0]));
    payloads.insert(0, four([255; 4]));
    let (answer, _) = ask(&mut pair, B, path, &payloads);
    assert!(answer.error().is_none());
    let known = established_sa(&mut pair, A).peer_addresses().to_vec();
    assert_eq!(known.len(), 9);
    assert!(known.iter().skip(1).all(|address| address.to_string().starts_with("10.9.9.")));
    let (_, _) = ask(&mut pair, B, path, &[notify(NotifyType::NO_ADDITIONAL_ADDRESSES, Vec::new())]);
    assert_eq!(established_sa(&mut pair, A).peer_addresses(), [address(B)]);
}

// RFC 4555 §3.6.
#[test]
fn a_further_address_is_told_and_taken_back() {
    for side in [A, B] {
        let mut pair = mobile_up(mobile_pair(420));
        pair.more[side] = vec![second(side)];
        pair.roam(side);
        pair.run(seconds(1));
        assert_eq!(established_sa(&mut pair, 1 - side).peer_addresses(), [address(side), second(side)]);
        pair.more[side].clear();
        pair.roam(side);
        pair.run(seconds(1));
        assert_eq!(established_sa(&mut pair, 1 - side).peer_addresses(), [address(side)]);
        assert_eq!(pair.sides[A].only().path.local.ip(), address(A), "the path in use stays");
    }
}

// A host without any address is silent and keeps what it has; with one again it goes on, however long that took.
#[test]
fn a_host_without_network_waits() {
    let of = |side| Connection { dpd_delay: seconds(60), ..mobile(side) };
    let of_b = Connection { dpd_delay: Duration::ZERO, ..of(B) };
    let mut pair = mobile_up(Pair::with(421, EngineConfig::default(), of(A), of_b));
    let child = pair.sides[A].only().children[0].id;
    pair.gone = vec![address(A)];
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.roam(A);
    let sent = pair.sides[A].sent.len();
    pair.run(seconds(3600));
    assert_eq!(pair.sides[A].sent.len(), sent);
    assert_eq!(pair.sides[A].up().len(), 1);
    pair.more[A] = vec![second(A)];
    pair.roam(A);
    pair.run(seconds(10));
    assert!(pair.sides[A].done(2));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
    // The same address comes back.
    pair.gone.push(second(A));
    pair.roam(A);
    pair.run(seconds(600));
    pair.gone.pop();
    pair.roam(A);
    pair.run(seconds(10));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
}

// RFC 4555 §3.5, RFC 7296 §2.23: encapsulation comes and goes with the NAT.
#[test]
fn encapsulation_follows_the_nat() {
    let mut pair = mobile_up(mobile_pair(422));
    pair.nat = Some((ip("192.0.2.1"), 10_000));
    // The harness maps what comes back to A's first address.
    pair.gone = vec![address(A)];
    pair.more[A] = vec![second(A)];
    pair.roam(A);
    pair.gone.clear();
    pair.run(Duration::from_millis(1));
    pair.gone = vec![second(A)];
    pair.roam(A);
    pair.run(seconds(3));
    for side in &pair.sides {
        assert!(side.installed.values().all(|pair| matches!(pair.encapsulation, Encapsulation::Udp { .. })));
    }
    assert!(pair.sides[A].only().nat_local && pair.sides[B].only().nat_remote);
    assert_eq!(pair.sides[B].only().path.remote, "192.0.2.1:14500".parse().unwrap());
    pair.nat = None;
    pair.gone = vec![address(A)];
    pair.roam(A);
    pair.run(seconds(3));
    for side in &pair.sides {
        assert!(side.installed.values().all(|pair| matches!(pair.encapsulation, Encapsulation::None { .. })));
    }
    pair.assert_same(1, 1);
    assert_aligned(&pair);
}

// IPv4 to IPv6 and back.
#[test]
fn the_family_of_addresses_may_change() {
    let mut pair = mobile_pair(423);
    pair.more = [vec![ip("2001:db8::1")], vec![ip("2001:db8::2")]];
    let mut pair = mobile_up(pair);
    pair.gone = vec![address(A)];
    pair.roam(A);
    pair.run(seconds(3));
    assert_eq!(pair.sides[B].only().path.remote.ip(), ip("2001:db8::1"));
    assert_aligned(&pair);
    pair.gone = vec![ip("2001:db8::1")];
    pair.roam(A);
    pair.run(seconds(3));
    pair.assert_same(1, 1);
    assert_aligned(&pair);
    assert_eq!(pair.sides[B].only().path.remote.ip(), address(A));
}

fn mobile_behind_nat(seed: u64, dpd: u64) -> Pair {
    let of = |side| Connection { dpd_delay: seconds(if side == A { dpd } else { 0 }), ..mobile(side) };
    let mut pair = Pair::with(seed, EngineConfig::default(), of(A), of(B));
    pair.nat = Some((ip("192.0.2.1"), 10_000));
    mobile_up(pair)
}

// RFC 4555 §3.8: the responder does not follow a liveness check; the initiator sees by the answer that it has moved, and
// says so.
#[test]
fn a_new_mapping_is_noticed_by_liveness_checks() {
    let mut pair = mobile_behind_nat(424, 10);
    pair.run(seconds(25));
    pair.nat = Some((ip("192.0.2.1"), 20_000));
    pair.run(seconds(25));
    pair.assert_same(1, 1);
    let remote: SocketAddr = "192.0.2.1:24500".parse().unwrap();
    assert_eq!(pair.sides[B].only().path.remote, remote);
    let to = pair.sides[B].installed.values().next().unwrap().encapsulation;
    assert!(matches!(to, Encapsulation::Udp { remote: to, .. } if to == remote));
}

// RFC 4555 §3.8: ESP may be followed, and the new address is checked.
#[test]
fn esp_from_a_new_mapping_is_followed_and_checked() {
    let mut pair = mobile_behind_nat(425, 0);
    let spi = pair.sides[B].only().children[0].spi_in;
    pair.nat = Some((ip("192.0.2.77"), 10_000));
    let remote: SocketAddr = "192.0.2.77:14500".parse().unwrap();
    let now = pair.now;
    pair.sides[B].engine.handle_mapping_changed(now, spi, remote);
    pair.run(seconds(2));
    assert!(pair.sides[B].logged("checking return routability"));
    assert_eq!(pair.sides[B].only().path.remote, remote);
    pair.run(seconds(300));
    pair.assert_same(1, 1);
}

// An attacker sends a captured ESP packet from elsewhere, before the true one comes: the check finds the peer where it was.
#[test]
fn a_false_mapping_is_found_out() {
    let mut pair = mobile_behind_nat(426, 0);
    let before = pair.sides[B].only().path;
    let spi = pair.sides[B].only().children[0].spi_in;
    let now = pair.now;
    pair.sides[B].engine.handle_mapping_changed(now, spi, "203.0.113.9:4500".parse().unwrap());
    pair.run(seconds(30));
    assert_eq!(pair.sides[B].only().path, before);
    let to = pair.sides[B].installed.values().next().unwrap().encapsulation;
    assert_eq!(to.remote(), before.remote.ip());
    pair.assert_same(1, 1);
}

// Without MOBIKE the initiator comes again from its new address, the responder waits.
#[test]
fn without_mobike_the_initiator_comes_again() {
    let mut pair = Pair::new(427);
    pair.roam(A);
    pair.roam(B);
    let mut pair = established(pair);
    let old = pair.sides[A].only().initiator_spi;
    move_a(&mut pair);
    pair.run(seconds(10));
    pair.assert_same(1, 1);
    assert_ne!(pair.sides[A].only().initiator_spi, old);
    assert_eq!(pair.sides[B].only().path.remote.ip(), second(A));
    let before = pair.sides[B].only();
    pair.more[B] = vec![second(B)];
    pair.roam(B);
    pair.run(seconds(10));
    assert_eq!(pair.sides[B].only().path, before.path);
}

// RFC 4555 §1.3: transport mode belongs to its addresses: a responder does not move it, an initiator begins anew.
#[test]
fn transport_mode_does_not_move() {
    let of = |side| {
        let mut connection = mobile(side);
        let mut host = child("net", "10.1.0.0/24", "10.2.0.0/24");
        let dynamic = ConfiguredSelector::Dynamic { protocol: 0, start_port: 0, end_port: 65535 };
        (host.local_ts, host.remote_ts) = (vec![dynamic], vec![dynamic]);
        host.mode = Mode::Transport;
        connection.children = vec![Arc::new(host)];
        connection
    };
    let mut pair = mobile_up(Pair::with(428, EngineConfig::default(), of(A), of(B)));
    let before = pair.sides[B].only();
    let path = seen_from(&pair, B, "10.0.1.1:4500");
    let (answer, _) = ask(&mut pair, A, path, &[update()]);
    assert!(answer.has(NotifyType::UNACCEPTABLE_ADDRESSES));
    assert_eq!(pair.sides[B].only().path, before.path);
    move_a(&mut pair);
    pair.run(seconds(10));
    pair.assert_same(1, 1);
    assert_ne!(pair.sides[B].only().initiator_spi, before.initiator_spi);
    assert_eq!(pair.sides[B].only().children[0].remote_ts[0].to_string(), "10.0.1.1/32");
}

// RFC 4555 §3.9: without NAT traversal each update says between which addresses it goes, and is refused elsewhere.
#[test]
fn a_nat_is_refused_where_there_is_no_nat_traversal() {
    let mut pair = mobile_up(mobile_pair(429));
    let before = pair.sides[B].only().path;
    let path = seen_from(&pair, B, "10.0.1.1:4500");
    let data = [&[10, 0, 1, 7, 10, 0, 0, 2][..], &4500_u16.to_be_bytes(), &4500_u16.to_be_bytes()].concat();
    let prohibition = |data: Vec<u8>| notify(NotifyType::NO_NATS_ALLOWED, data);
    for data in [data, Vec::new(), vec![0; 36]] {
        for first in [update(), notify(NotifyType::NO_ADDITIONAL_ADDRESSES, Vec::new())] {
            let (answer, went) = ask(&mut pair, A, path, &[first, prohibition(data.clone())]);
            assert!(answer.has(NotifyType::UNEXPECTED_NAT_DETECTED));
            assert_eq!(went, path);
            assert_eq!(pair.sides[B].only().path, before);
        }
    }
    let data = [&[10, 0, 1, 1, 10, 0, 0, 2][..], &4500_u16.to_be_bytes(), &4500_u16.to_be_bytes()].concat();
    let (answer, _) = ask(&mut pair, A, path, &[update(), prohibition(data)]);
    assert!(answer.error().is_none());
    assert_eq!(pair.sides[B].only().path, path);
}

// RFC 4555 §3.9: the same in IKE_AUTH, from who knows MOBIKE; nothing comes up where there is a translator.
#[test]
fn no_nats_allowed_in_ike_auth_is_compared_with_the_header() {
    use super::intermediate::Script;
    let data = |from: [u8; 4], port: u16| {
        let ports = [port.to_be_bytes(), 500_u16.to_be_bytes()].concat();
        [&from[..], &[10, 0, 0, 2], &ports].concat()
    };
    for (mobike, data, comes_up) in [
        (true, data([10, 0, 0, 1], 500), true),
        (true, data([10, 0, 0, 7], 500), false),
        (true, data([10, 0, 0, 1], 501), false),
        (true, Vec::new(), false),
        (false, data([10, 0, 0, 7], 500), true),
    ] {
        let mut pair = mobile_pair(431);
        let mut script = Script::new(&pair.sides[A].engine.ctx.connections[0].proposals, false);
        script.init(&mut pair);
        let mut says = vec![notify(NotifyType::NO_NATS_ALLOWED, data)];
        says.extend(mobike.then(|| notify(NotifyType::MOBIKE_SUPPORTED, Vec::new())));
        let answer = script.authenticate_and_say(&mut pair, says);
        assert_eq!(answer.has(NotifyType::UNEXPECTED_NAT_DETECTED), !comes_up);
        assert_eq!(pair.sides[B].up().len(), usize::from(comes_up));
    }
}

// RFC 4555 §3.9: the initiator says it, and tries again where it was contradicted, but not for ever.
#[test]
fn an_initiator_without_nat_traversal_says_so_and_retries() {
    let mut pair = mobile_up(mobile_pair(430));
    for side in [A, B] {
        established_sa(&mut pair, side).core.nat.traversal = false;
    }
    pair.more[A] = vec![second(A)];
    pair.gone = vec![address(A)];
    pair.roam(A);
    pair.run(seconds(3));
    assert_aligned(&pair);
    assert_eq!(pair.sides[B].only().path.remote.ip(), second(A));
    // Now a translator that nobody knows of.
    let old = pair.sides[B].only().path;
    pair.nat = Some((ip("192.0.2.1"), 0));
    pair.gone = vec![second(A)];
    pair.roam(A);
    pair.run(seconds(60));
    assert!(pair.sides[B].logged("unexpected NAT detected"));
    assert!(pair.sides[A].logged("there is a NAT on the path"));
    assert_eq!(pair.sides[B].only().path, old);
}

// RFC 4555 §3.5, RFC 7296 §2.4: ICMP is a hint that makes us ask, once, and only where the address fits.
#[test]
fn an_icmp_error_makes_us_ask() {
    let mut pair = mobile_up(mobile_pair(431));
    pair.run(seconds(10));
    let remote = pair.sides[A].only().path.remote;
    let sent = pair.sides[A].sent.len();
    for (remote, expected) in [("10.0.0.9:4500".parse().unwrap(), 0), (remote, 1), (remote, 1)] {
        let now = pair.now;
        pair.sides[A].engine.handle_unreachable(now, remote);
        pair.run(seconds(1));
        assert_eq!(pair.sides[A].sent.len(), sent + expected);
    }
    pair.assert_same(1, 1);
}

// RFC 9329 §7.1: on a stream the originator opens another one and says in it that it has moved.
#[test]
fn a_stream_moves_with_its_originator() {
    let a = Connection { tcp: TcpPolicy::Yes, ..mobile(A) };
    let mut pair = mobile_up(Pair::with(432, EngineConfig::default(), a, mobile(B)));
    let before = pair.sides[B].only();
    move_a(&mut pair);
    pair.run(seconds(3));
    pair.assert_same(1, 1);
    let after = pair.sides[B].only();
    assert_eq!(after.initiator_spi, before.initiator_spi);
    assert_eq!(after.path.remote.ip(), second(A));
    for side in &pair.sides {
        let Transport::Stream(stream) = side.only().path.transport else { panic!("over a stream") };
        let moved =
            |pair: &Installed| matches!(pair.encapsulation, Encapsulation::Stream { stream: to, .. } if to == stream);
        assert!(side.installed.values().all(moved));
        assert_eq!(side.streams.len(), 1, "the old stream is closed");
    }
    assert!(!pair.sides[B].logged("routability"));
}

/// Whatever the network and the addresses do: in the end both sides are at the same place with the same SAs.
#[test]
fn any_schedule_of_moves_and_rekeys_ends_aligned() {
    for seed in 0..150 {
        let of = |side| Connection { dpd_delay: seconds(20), ..mobile(side) };
        let mut pair = Pair::with(seed, EngineConfig::default(), of(A), of(B));
        pair.more = [vec![second(A), ip("10.0.2.1")], vec![second(B)]];
        let mut pair = mobile_up(pair);
        pair.loss = pair.rng.below(20);
        pair.duplication = pair.rng.below(20);
        pair.delay.0 = Duration::from_millis(pair.rng.below(300));
        let mut b_moved = false;
        for token in 0..12 {
            match pair.rng.below(if seed % 2 == 0 { 3 } else { 4 }) {
                0 => {
                    let child =
                        pair.sides[A].engine.ike_sas(pair.now).first().and_then(|sa| Some(sa.children.first()?.id));
                    let now = pair.now;
                    if let Some(child) = child {
                        let _ = pair.sides[A].engine.rekey(now, Target::Child(child), 100 + token);
                    }
                }
                1 => {
                    let side = pair.rng.below(2) as usize;
                    let ike = pair.sides[side].engine.ike_sas(pair.now).first().map(|sa| sa.id);
                    let now = pair.now;
                    if let Some(ike) = ike {
                        let _ = pair.sides[side].engine.rekey(now, Target::Ike(ike), 100 + token);
                    }
                }
                2 => {
                    let all = [address(A), second(A), ip("10.0.2.1")];
                    let stays = all[pair.rng.below(3) as usize];
                    pair.gone.retain(|gone| !all.contains(gone));
                    pair.gone.extend(all.into_iter().filter(|address| *address != stays));
                    pair.roam(A);
                }
                _ => {
                    b_moved = true;
                    let gone = [address(B), second(B)][pair.rng.below(2) as usize];
                    pair.gone.retain(|one| ![address(B), second(B)].contains(one));
                    pair.gone.push(gone);
                    pair.roam(B);
                }
            }
            let wait = Duration::from_millis(pair.rng.below(4000));
            pair.run(wait);
        }
        pair.loss = 0;
        pair.run(seconds(600));
        let ikes = pair.sides[A].up().len();
        // Both may have gone where the other has never heard of; then nothing brings them together (RFC 4621 §5.2.2).
        assert!(ikes == 1 || b_moved, "seed {seed}");
        pair.assert_same(ikes, ikes);
        if ikes == 1 {
            assert_aligned(&pair);
        }
    }
}
