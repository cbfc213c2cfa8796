//! Hints that a peer may have been restarted: nothing but a reason to ask it (RFC 7296 §2.4, §2.21.4).

use super::*;
use crate::sa::fault::notify;
use crate::wire::{Header, Message, Notify, NotifyType};

/// B, or anybody, says without protection that it does not know A's IKE SA or Child SA.
fn complain(pair: &mut Pair, kind: NotifyType) {
    let sa = pair.sides[A].only();
    let header = Header {
        initiator_spi: sa.initiator_spi,
        responder_spi: sa.responder_spi,
        major: 2,
        minor: 0,
        exchange: ExchangeType::INFORMATIONAL,
        from_initiator: false,
        response: true,
        message_id: 5,
    };
    let bytes = wire::encode(&Message { header, payloads: vec![notify(kind, Vec::new())] });
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, sa.path, &bytes);
    pair.drain(A);
}

fn from(side: usize, port: u16) -> SocketAddr {
    SocketAddr::new(address(side), port)
}

const KINDS: [NotifyType; 2] = [NotifyType::INVALID_IKE_SPI, NotifyType::INVALID_SPI];

#[test]
fn a_restarted_peer_is_noticed_by_its_complaints() {
    for kind in KINDS {
        let mut pair = up(1);
        pair.run(seconds(60));
        pair.cut = true;
        complain(&mut pair, kind);
        assert!(pair.sides[A].logged("sending DPD request"));
        assert_eq!(pair.sides[A].up().len(), 1, "a complaint changes nothing by itself");
        pair.run(seconds(200));
        assert!(pair.sides[A].down(CloseReason::Timeout));
    }
}

// §2.4: a peer that lives says so, and forged complaints bring no more than a request now and then.
#[test]
fn forged_complaints_cost_little() {
    let mut pair = up(2);
    let before = pair.sides[A].sent.len();
    for _ in 0..600 {
        complain(&mut pair, NotifyType::INVALID_IKE_SPI);
        let now = pair.now;
        pair.sides[A].engine.handle_unknown_spi(now, from(B, 0), 7777);
        pair.drain(A);
        pair.run(Duration::from_millis(100));
    }
    let asked = pair.sides[A].sent.len() - before;
    assert!((1..=12).contains(&asked), "{asked} requests in a minute");
    pair.assert_same(1, 1);
}

// RFC 4301 §5.2, RFC 7296 §3.10.1: with the Child SA's SPI and the start of the packet, at a limited rate, and only where it
// is wanted. It changes nothing.
#[test]
fn a_peer_is_told_of_packets_that_its_sa_is_not_for() {
    for told in [true, false] {
        let config = EngineConfig { invalid_selectors: told, ..EngineConfig::default() };
        let mut pair = established(Pair::with(6, config, connection(A), connection(B)));
        let spi_in = pair.sides[A].only().children[0].spi_in;
        let before = pair.sides[A].sent.len();
        for spi in [spi_in, spi_in, spi_in ^ 1] {
            let now = pair.now;
            pair.sides[A].engine.handle_invalid_selectors(now, spi, b"the start");
            pair.drain(A);
        }
        assert_eq!(pair.sides[A].sent.len() - before, usize::from(told));
        if told {
            let notify = Notify {
                protocol: Protocol::ESP,
                spi: spi_in.to_be_bytes().to_vec(),
                kind: NotifyType::INVALID_SELECTORS,
                data: b"the start".to_vec(),
            };
            assert_eq!(said(&mut pair, before), [crate::wire::Payload::Notify(notify)]);
            pair.run(seconds(1));
            assert!(pair.sides[B].logged("received INVALID_SELECTORS notify error"));
            pair.run(seconds(10));
            let now = pair.now;
            pair.sides[A].engine.handle_invalid_selectors(now, spi_in, b"");
            pair.drain(A);
            assert_eq!(pair.sides[A].sent.len() - before, 2);
        }
        pair.assert_same(1, 1);
    }
}

#[test]
fn an_unknown_spi_asks_the_peer_at_that_address_only() {
    let mut pair = up(3);
    pair.run(seconds(60));
    let before = pair.sides[A].sent.len();
    let now = pair.now;
    pair.sides[A].engine.handle_unknown_spi(now, "192.0.2.77:0".parse().unwrap(), 7777);
    pair.drain(A);
    assert_eq!(pair.sides[A].sent.len(), before);
    pair.sides[A].engine.handle_unknown_spi(now, from(B, 0), 7777);
    pair.drain(A);
    assert_eq!(pair.sides[A].sent.len(), before + 1);
}

// Many peers may be behind one NAT: a flood of forged hints does not have all of their IKE SAs looked at each time.
#[test]
fn hints_about_one_address_are_followed_up_once_in_a_second() {
    let mut pair = up(4);
    let now = pair.now;
    let places = &mut pair.sides[A].engine.places;
    assert_eq!(places.suspects(now, address(B)).len(), 1);
    assert_eq!(places.suspects(now + Duration::from_millis(999), address(B)), []);
    assert_eq!(places.suspects(now + seconds(1), address(B)).len(), 1);
}

/// What A sends now, opened by B.
fn said(pair: &mut Pair, from: usize) -> Vec<crate::wire::Payload> {
    let sent = pair.sides[A].sent[from].clone();
    let header = super::init::header(&sent.bytes);
    assert!(header.exchange == ExchangeType::INFORMATIONAL && !header.response);
    let slot = pair.sides[B].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("established") };
    sa.channel.open_apart(&sent.bytes).unwrap().1
}

// RFC 7296 §1.5: INVALID_SPI with the SPI, under the IKE SA's protection and not outside it, at a limited rate. Who is told
// takes note and changes nothing (§2.21.4).
#[test]
fn an_unknown_spi_is_told_inside_the_ike_sa() {
    let mut pair = up(5);
    let before = pair.sides[A].sent.len();
    for _ in 0..50 {
        let now = pair.now;
        // Encapsulated ESP of somebody else behind the same NAT, and the peer's.
        pair.sides[A].engine.handle_unknown_spi(now, from(B, 4567), 1);
        pair.run(seconds(1));
        let now = pair.now;
        pair.sides[A].engine.handle_unknown_spi(now, from(B, 500), 0xdead_beef);
        pair.drain(A);
        pair.run(Duration::from_millis(100));
    }
    let told = pair.sides[A].sent.len() - before;
    assert!((5..=17).contains(&told), "{told} in 55 seconds");
    let spi = notify(NotifyType::INVALID_SPI, 0xdead_beef_u32.to_be_bytes().to_vec());
    let complaints: Vec<usize> = (before..before + told).filter(|at| !said(&mut pair, *at).is_empty()).collect();
    assert!((5..=6).contains(&complaints.len()));
    for at in complaints {
        assert_eq!(said(&mut pair, at), std::slice::from_ref(&spi));
    }
    assert!(pair.sides[B].logged("received INVALID_SPI notify error"));
    pair.assert_same(1, 1);
    // Nobody who has no IKE SA with us is answered at all.
    let (now, sent) = (pair.now, pair.sides[A].sent.len());
    pair.sides[A].engine.handle_unknown_spi(now, "192.0.2.7:4500".parse().unwrap(), 5);
    pair.drain(A);
    assert_eq!(pair.sides[A].sent.len(), sent);
}
