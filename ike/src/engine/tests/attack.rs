//! An attacker on the path: what it forges, replays or mutates changes nothing.

use super::*;
use crate::config::PuzzlePolicy;
use crate::sa::fault::{Fault, notify};
use crate::sa::parts::Parts;
use crate::wire::{Header, NotifyType};

#[test]
fn mutated_and_replayed_messages_change_nothing() {
    let mut pair = up(110);
    let child = pair.sides[A].only().children[0].id;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.run(seconds(20));
    let mut traffic: Vec<(usize, Transmit)> = Vec::new();
    for side in [A, B] {
        traffic.extend(pair.sides[side].sent.clone().into_iter().map(|sent| (1 - side, sent)));
    }
    let mut rng = TestRng(1);
    for round in 0..20_000 {
        let (to, sent) = &traffic[rng.below(traffic.len() as u64) as usize];
        let mut bytes = sent.bytes.clone();
        for _ in 0..rng.below(4) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= rng.next() as u8;
        }
        if rng.percent(10) {
            bytes.truncate(rng.below(bytes.len() as u64) as usize);
        }
        // Requests for a new IKE SA are another matter: they may make a half-open one. And a later version
        // is answered (§2.5).
        let plain = bytes.get(18).is_none_or(|exchange| *exchange == 34);
        if plain || bytes[17] >= 0x30 {
            continue;
        }
        let before = pair.snapshot(*to);
        let path = Path { local: sent.path.remote, remote: "10.6.6.6:666".parse().unwrap(), transport: Transport::Udp };
        let now = pair.now;
        pair.sides[*to].engine.handle_message(now, path, &bytes);
        while let Some(output) = pair.sides[*to].engine.poll_output() {
            // A true replay of the last request gets the last answer, nothing else.
            let Output::Transmit(again) = output else { panic!("round {round}: {output:?}") };
            assert!(pair.sides[*to].sent.iter().any(|sent| sent.bytes == again.bytes));
        }
        assert_eq!(before, pair.snapshot(*to), "round {round}");
    }
}

#[test]
fn random_octets_never_crash() {
    let mut pair = up(111);
    let mut rng = TestRng(2);
    let path = Path {
        local: "10.0.0.2:500".parse().unwrap(),
        remote: "10.0.0.1:500".parse().unwrap(),
        transport: Transport::Udp,
    };
    let before = pair.snapshot(B);
    for _ in 0..20_000 {
        let mut bytes = vec![0; rng.below(200) as usize];
        rng.fill(&mut bytes);
        if let Some(version) = bytes.get_mut(17) {
            *version = 0x20;
        }
        let now = pair.now;
        pair.sides[B].engine.handle_message(now, path, &bytes);
    }
    assert_eq!(before, pair.snapshot(B));
}

// RFC 7296 §2.21: unprotected words about an IKE SA with keys change nothing.
#[test]
fn cleartext_notifies_change_nothing() {
    let mut pair = up(112);
    let sa = pair.sides[A].only();
    for exchange in [ExchangeType::IKE_SA_INIT, ExchangeType::IKE_AUTH, ExchangeType::INFORMATIONAL] {
        for response in [false, true] {
            for kind in [NotifyType::AUTHENTICATION_FAILED, NotifyType::INVALID_IKE_SPI, NotifyType::NO_PROPOSAL_CHOSEN]
            {
                for message_id in 0..4 {
                    let header = Header {
                        initiator_spi: sa.initiator_spi,
                        responder_spi: sa.responder_spi,
                        major: 2,
                        minor: 0,
                        exchange,
                        from_initiator: false,
                        response,
                        message_id,
                    };
                    let bytes = wire::encode(&Message { header, payloads: vec![notify(kind, Vec::new())] });
                    let before = pair.snapshot(A);
                    let path = sa.path;
                    let now = pair.now;
                    pair.sides[A].engine.handle_message(now, path, &bytes);
                    assert!(pair.sides[A].engine.poll_output().is_none());
                    assert_eq!(before, pair.snapshot(A));
                }
            }
        }
    }
}

/// An attacker that mutates messages under way: SAs come up, or they do not; never half.
#[test]
fn mutation_under_way_never_gives_half_an_sa() {
    for seed in 0..200 {
        let mut pair = Pair::new(seed);
        pair.initiate(A, 1);
        for _ in 0..400 {
            pair.run(Duration::from_millis(500));
            let keys: Vec<_> = pair.deliveries.keys().copied().collect();
            for key in keys {
                if pair.rng.percent(30)
                    && let Some(Delivery::Message { bytes, .. }) = pair.deliveries.get_mut(&key)
                {
                    let at = pair.rng.below(bytes.len() as u64) as usize;
                    bytes[at] ^= 1 << pair.rng.below(8);
                }
            }
        }
        if pair.sides[A].done(1) {
            pair.assert_same(1, 1);
        } else {
            assert!(pair.sides[A].installed.is_empty());
        }
    }
}

// RFC 7296 §2.15: each end must be sure of the other; whoever sends us our own messages must not make us our peer.
#[test]
fn our_own_messages_sent_back_to_us_give_no_sa() {
    let mut anybody = connection(A);
    anybody.remote.remote_id = IdentityPattern::any();
    let mut pair = Pair::with(113, EngineConfig::default(), anybody.clone(), anybody);
    pair.initiate(A, 1);
    // The network returns each datagram to its sender, as if the peer had sent it.
    let mut seen = 0;
    for _ in 0..300 {
        pair.run(Duration::from_millis(1));
        pair.deliveries.retain(|_, delivery| !matches!(delivery, Delivery::Message { .. }));
        let sent = pair.sides[A].sent.clone();
        for Transmit { path, bytes, .. } in sent.iter().skip(seen) {
            let now = pair.now;
            pair.sides[A].engine.handle_message(now, *path, bytes);
            pair.drain(A);
        }
        seen = sent.len();
        pair.deliveries.retain(|_, delivery| !matches!(delivery, Delivery::Message { .. }));
    }
    assert!(pair.sides[A].up().is_empty() && pair.sides[A].installed.is_empty());
    assert_eq!(pair.sides[A].engine.counts().1, 0);
}

// RFC 7296 §1.2, §2.21.2: a message with two identities, proofs, offers, keys or nonces could mean one thing to the
// check and another to what follows it.
#[test]
fn a_payload_that_comes_twice_is_refused() {
    use crate::wire::{Identification, Payload};
    let id = |name: &str| Identification { kind: 2, data: name.into() };
    let selectors = || vec![wire::WireSelector::Unknown { kind: 9, data: Vec::new() }];
    let twice = [
        [Payload::IdInitiator(id("a")), Payload::IdInitiator(id("chief"))],
        [Payload::IdResponder(id("b")), Payload::IdResponder(id("b"))],
        [Payload::Auth { method: 2, data: vec![1] }, Payload::Auth { method: 14, data: vec![2] }],
        [Payload::Sa(Vec::new()), Payload::Sa(Vec::new())],
        [Payload::Ke { group: Ke::X25519, data: vec![1] }, Payload::Ke { group: Ke::ECP_256, data: vec![2] }],
        [Payload::Nonce(vec![1; 32]), Payload::Nonce(vec![2; 32])],
        [Payload::TsInitiator(selectors()), Payload::TsInitiator(selectors())],
        [Payload::TsResponder(selectors()), Payload::TsResponder(selectors())],
    ];
    for payloads in twice {
        let [first, second] = payloads;
        assert!(Parts::collect(vec![first.clone()]).is_ok());
        let between = notify(NotifyType::INITIAL_CONTACT, Vec::new());
        let refused = Parts::collect(vec![first, between, second]);
        assert!(matches!(refused, Err(Fault::InvalidSyntax(_))));
    }
}

// RFC 7296 §2.6: from however many addresses they come, half-open IKE SAs take bounded memory.
#[test]
fn half_open_sas_are_bounded() {
    let config = EngineConfig { cookie_threshold: usize::MAX, block_threshold: 0, ..EngineConfig::default() };
    let puzzles = PuzzlePolicy { threshold: 0, ..PuzzlePolicy::default() };
    let config = EngineConfig { cookie_threshold_ip: usize::MAX, puzzles, ..config };
    let mut pair = Pair::with(114, config, connection(A), connection(B));
    pair.initiate(A, 1);
    let request = pair.sides[A].sent[0].clone();
    let now = pair.now;
    for n in 0..5000_u32 {
        let remote = SocketAddr::new(Ipv4Addr::from_bits(0x0b00_0000 + n).into(), 500);
        let path = Path { local: request.path.remote, remote, transport: Transport::Udp };
        pair.sides[B].engine.handle_message(now, path, &request.bytes);
        pair.drain(B);
    }
    assert_eq!(pair.sides[B].engine.counts().1, 4096);
    // They go, and others come in again.
    pair.cut = true;
    pair.run(seconds(40));
    assert_eq!(pair.sides[B].engine.counts(), (0, 0));
}
