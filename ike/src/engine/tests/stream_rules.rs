//! RFC 9329: what messages say of the stream that they come over, who may use one, and IKE_SA_INIT over streams.

use super::*;
use crate::config::PuzzlePolicy;
use crate::sa::fault::notify;
use crate::sa::parts::Parts;
use crate::wire::{NotifyType, Payload};

fn over_tcp(side: usize) -> Connection {
    let tcp = if side == A { TcpPolicy::Yes } else { TcpPolicy::No };
    Connection { tcp, ..connection(side) }
}

fn tcp_pair(seed: u64) -> Pair {
    Pair::with(seed, EngineConfig::default(), over_tcp(A), over_tcp(B))
}

/// What B makes of octets that come along this path.
fn judged(pair: &mut Pair, path: Path, bytes: &[u8]) -> Vec<(StreamId, Judgement)> {
    pair.sides[B].judgements.clear();
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path, bytes);
    pair.drain(B);
    std::mem::take(&mut pair.sides[B].judgements)
}

fn stream_of(path: Path) -> StreamId {
    let Transport::Stream(stream) = path.transport else { panic!("over a stream: {path:?}") };
    stream
}

/// Another stream of a stranger, or of the peer, to B.
fn elsewhere(pair: &Pair) -> Path {
    Path {
        remote: "10.6.6.6:666".parse().unwrap(),
        transport: Transport::Stream(StreamId(1 << 63 | 99)),
        ..pair.sides[B].only().path
    }
}

/// A's next request, sealed but not sent.
fn sealed(pair: &mut Pair, payloads: &[Payload]) -> Vec<u8> {
    let retry = retry::Retry::start(pair.now, &pair.sides[A].engine.ctx.config.retransmission, true, &mut TestRng(1));
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    sa.channel.request(ExchangeType::INFORMATIONAL, payloads, None, retry, &mut TestRng(9)).unwrap().remove(0)
}

/// Notifies of a type in a side's IKE_SA_INIT messages.
pub(super) fn said(side: &Side, kind: NotifyType) -> usize {
    let plain = side.sent.iter().filter_map(|sent| match wire::parse(&sent.bytes) {
        Ok(Incoming::Plain(message)) => Some(message.payloads),
        _ => None,
    });
    plain.flatten().filter(|payload| matches!(payload, Payload::Notify(notify) if notify.kind == kind)).count()
}

// RFC 9329 §6.1: what does not parse, has an unknown SPI, or fails its check; and what is good.
#[test]
fn messages_from_streams_are_judged() {
    let mut pair = established(tcp_pair(800));
    let path = pair.sides[B].only().path;
    let stream = stream_of(path);
    let request = sealed(&mut pair, &[]);

    assert_eq!(judged(&mut pair, path, &request[..20]), [(stream, Judgement::Unparsable)]);
    let mut wrong_length = request.clone();
    wrong_length[27] ^= 1;
    assert_eq!(judged(&mut pair, path, &wrong_length), [(stream, Judgement::Unparsable)]);
    let mut unknown = request.clone();
    unknown[3] ^= 1;
    unknown[11] ^= 1;
    assert_eq!(judged(&mut pair, path, &unknown), [(stream, Judgement::UnknownSpi)]);
    let mut forged = request.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(judged(&mut pair, path, &forged), [(stream, Judgement::Forged)]);
    // A number outside the window is not looked at, and no fault of the stream.
    let mut early = forged.clone();
    early[23] ^= 8;
    assert_eq!(judged(&mut pair, path, &early), []);
    assert_eq!(judged(&mut pair, path, &request), [(stream, Judgement::Authentic)]);
    // A repetition is an old message: it says nothing for the stream.
    assert_eq!(judged(&mut pair, path, &request), []);
    // Over UDP there is nothing to close.
    let udp = Path { transport: Transport::Udp, ..path };
    assert_eq!(judged(&mut pair, udp, &forged), []);
}

// RFC 9329 §6.1: the same while nobody is authenticated.
#[test]
fn a_forged_ike_auth_is_a_fault_of_its_stream() {
    let mut pair = tcp_pair(801);
    pair.initiate(A, 1);
    for _ in 0..1000 {
        pair.run(Duration::from_millis(1));
        if pair.sides[A].sent.len() == 2 {
            break;
        }
    }
    let mut forged = pair.sides[A].sent[1].bytes.clone();
    *forged.last_mut().unwrap() ^= 1;
    let path = pair.sides[B].only().path;
    assert_eq!(judged(&mut pair, path, &forged), [(stream_of(path), Judgement::Forged)]);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 1);
}

// RFC 9329 §6.1, §10: another stream is followed when it brings an authentic message that is new, not before.
#[test]
fn only_an_authentic_new_message_moves_the_ike_sa_to_another_stream() {
    let mut pair = established(tcp_pair(802));
    let old = pair.sides[B].only().path;
    let new = elsewhere(&pair);
    let answered = pair.sides[A].sent.last().unwrap().bytes.clone();
    let request = sealed(&mut pair, &[]);
    let mut forged = request.clone();
    *forged.last_mut().unwrap() ^= 1;
    for bytes in [&answered, &forged, &request[..30].to_vec()] {
        judged(&mut pair, new, bytes);
        assert_eq!(pair.sides[B].only().path, old);
    }
    assert_eq!(judged(&mut pair, new, &request), [(stream_of(new), Judgement::Authentic)]);
    assert_eq!(pair.sides[B].only().path, new);
    assert!(pair.sides[B].installed.values().all(|pair| pair.encapsulation.remote() == new.remote.ip()));
    // Both are heard until the old one closes, and the next new message decides again.
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    let answer = pair.sides[B].sent.last().unwrap().bytes.clone();
    let Ok(Incoming::Protected(protected)) = wire::parse(&answer) else { panic!("a protected answer") };
    sa.channel.receive(protected, &answer);
    let request = sealed(&mut pair, &[]);
    judged(&mut pair, old, &request);
    assert_eq!(pair.sides[B].only().path, old);
    // The extraneous one is closed some seconds later.
    pair.run(seconds(10));
    assert_eq!(pair.sides[B].only().path, old);
}

// RFC 9329 §6.1: ESP too shows where the TCP Responder shall answer; the originator itself follows nobody.
#[test]
fn authentic_esp_over_another_stream_moves_the_responder() {
    let mut pair = established(tcp_pair(803));
    let new = elsewhere(&pair);
    let now = pair.now;
    let of_a = pair.sides[A].only();
    let spi = of_a.children[0].spi_in;
    pair.sides[A].engine.handle_stream_changed(now, spi, Path { local: new.local, ..new });
    pair.drain(A);
    assert_eq!(pair.sides[A].only().path, of_a.path);

    let spi = pair.sides[B].only().children[0].spi_in;
    pair.sides[B].engine.handle_stream_changed(now, spi, new);
    pair.drain(B);
    assert_eq!(pair.sides[B].only().path, new);
    assert_eq!(pair.sides[B].judgements.last(), Some(&(stream_of(new), Judgement::Authentic)));
    assert!(pair.sides[B].installed.values().all(|pair| pair.encapsulation.remote() == new.remote.ip()));
}

// RFC 9329 §6.1: no two IKE SAs on a stream, but for one that is rekeyed and its successor.
#[test]
fn another_ike_sa_is_not_begun_on_a_stream_in_use() {
    let mut pair = established(tcp_pair(804));
    let path = pair.sides[B].only().path;
    let mut another = pair.sides[A].sent[0].bytes.clone();
    another[0] ^= 1;
    judged(&mut pair, path, &another);
    assert_eq!(pair.sides[B].engine.counts(), (1, 0));
    assert!(pair.sides[B].logged("its TCP connection has an IKE_SA"));
    // The same over a stream of its own is another matter.
    let own = elsewhere(&pair);
    judged(&mut pair, own, &another);
    assert_eq!(pair.sides[B].engine.counts(), (2, 1));
}

// RFC 9329 §6.1: the IKE SA goes, as RFC 7296 §2.21.3 says; the stream has done nothing.
#[test]
fn a_syntax_error_over_a_stream_ends_the_ike_sa() {
    let mut pair = established(tcp_pair(805));
    let stream = stream_of(pair.sides[B].only().path);
    let nonce = || Payload::Nonce(vec![7; 32]);
    let answer = refusals::ask(&mut pair, ExchangeType::CREATE_CHILD_SA, &[nonce(), nonce()]);
    assert!(answer.has(NotifyType::INVALID_SYNTAX));
    assert!(pair.sides[B].down(CloseReason::Failed));
    assert!(pair.sides[B].judgements.iter().all(|(_, judgement)| *judgement == Judgement::Authentic));
    // Left to its originator for a while, and closed then.
    assert!(pair.sides[B].streams.contains_key(&stream));
    pair.run(seconds(10));
    assert!(!pair.sides[B].streams.contains_key(&stream));
}

/// B wants another key exchange method than A's first.
fn with_another_method(seed: u64) -> Pair {
    let of = |side, proposals: &str| {
        let proposals = parse_proposals(proposals, Protocol::IKE).unwrap();
        Connection { proposals, ..over_tcp(side) }
    };
    let a = of(A, "aes128gcm16-prfsha256-x25519-ecp256");
    Pair::with(seed, EngineConfig::default(), a, of(B, "aes128gcm16-prfsha256-ecp256"))
}

// RFC 9329 §6.4: the error is acted on at once, and the same stream carries the corrected request.
#[test]
fn an_invalid_key_exchange_method_is_corrected_on_the_same_stream() {
    let mut pair = with_another_method(806);
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(500));
    assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
    assert_eq!(said(&pair.sides[B], NotifyType::INVALID_KE_PAYLOAD), 1);
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[B].streams.len(), 1);
    assert_eq!(pair.sides[A].only().path.transport, Transport::Stream(StreamId(1)));
}

// RFC 9329 §6.3, §6.4: a peer that closes after it has said what it wants is told over another stream.
#[test]
fn a_stream_that_is_closed_after_an_error_is_opened_again() {
    let mut pair = with_another_method(807);
    pair.key_delay = Duration::from_millis(50);
    pair.initiate(A, 1);
    for _ in 0..1000 {
        pair.run(Duration::from_millis(1));
        if said(&pair.sides[B], NotifyType::INVALID_KE_PAYLOAD) == 1 {
            break;
        }
    }
    let stream = *pair.sides[B].streams.keys().next().unwrap();
    pair.close_stream(B, stream);
    pair.run(seconds(2));
    assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[A].only().path.transport, Transport::Stream(StreamId(2)));
}

// RFC 9329 §6.4: no waiting for a better answer.
#[test]
fn a_refusal_over_a_stream_is_believed_at_once() {
    let mut pair = tcp_pair(808);
    let proposals = parse_proposals("aes256gcm16-prfsha384-x25519", Protocol::IKE).unwrap();
    pair.sides[B].engine.set_connections(vec![Arc::new(Connection { proposals, ..over_tcp(B) })]);
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(500));
    assert!(pair.sides[A].failed(1).is_some_and(|reason| reason.contains("NO_PROPOSAL_CHOSEN")));
    pair.assert_same(0, 0);
}

// RFC 9329 §6.3: a puzzle comes with a cookie, over TCP too; what it is good for is not bound to the port, so the answer
// may come over another stream. A cookie alone is not demanded: `no_cookie_is_demanded_over_a_stream`.
#[test]
fn a_puzzle_is_solved_over_the_same_stream_or_another() {
    for closed in [false, true] {
        let puzzles = PuzzlePolicy { threshold: 0, difficulty: 9, limit: 12 };
        let config = EngineConfig { puzzles, ..EngineConfig::default() };
        let mut pair = Pair::with(809, config, over_tcp(A), over_tcp(B));
        pair.sides[B].engine.ctx.config.puzzles.threshold = 1;
        // Somebody else is half-open.
        let mut other = Pair::new(1);
        other.initiate(A, 1);
        other.run(Duration::from_millis(5));
        let (now, bytes) = (pair.now, other.sides[A].sent[0].bytes.clone());
        let path = Path {
            local: "10.0.0.2:500".parse().unwrap(),
            remote: "10.9.9.9:500".parse().unwrap(),
            transport: Transport::Udp,
        };
        pair.sides[B].engine.handle_message(now, path, &bytes);
        pair.drain(B);
        assert_eq!(pair.sides[B].engine.counts().1, 1);

        pair.job_delay = Duration::from_millis(200);
        pair.initiate(A, 1);
        for _ in 0..1000 {
            pair.run(Duration::from_millis(1));
            if said(&pair.sides[B], NotifyType::PUZZLE) == 1 {
                break;
            }
        }
        assert_eq!(said(&pair.sides[B], NotifyType::COOKIE), 1);
        if closed {
            let stream = *pair.sides[B].streams.keys().next().unwrap();
            pair.close_stream(B, stream);
        }
        pair.run(seconds(5));
        assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
        assert_eq!(said(&pair.sides[B], NotifyType::PUZZLE), 1);
        let expected = if closed { 2 } else { 1 };
        assert_eq!(pair.sides[A].only().path.transport, Transport::Stream(StreamId(expected)));
    }
}

// RFC 9329 §7.5: not sent, but accepted.
#[test]
fn fragments_over_a_stream_are_accepted() {
    let mut pair = established(tcp_pair(810));
    let path = pair.sides[B].only().path;
    let retry = retry::Retry::start(pair.now, &pair.sides[A].engine.ctx.config.retransmission, true, &mut TestRng(1));
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    let long = [notify(NotifyType(40_000), vec![1; 400])];
    let fragments = sa.channel.request(ExchangeType::INFORMATIONAL, &long, Some(200), retry, &mut TestRng(9)).unwrap();
    assert!(fragments.len() > 2);
    let before = pair.sides[B].sent.len();
    for fragment in &fragments {
        let judgements = judged(&mut pair, path, fragment);
        assert!(!judgements.iter().any(|(_, judgement)| *judgement != Judgement::Authentic));
    }
    assert_eq!(pair.sides[B].sent.len(), before + 1, "one answer to the whole");
    let answer = pair.sides[B].sent[before].bytes.clone();
    let Ok(Incoming::Protected(protected)) = wire::parse(&answer) else { panic!("a protected answer") };
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    let crate::sa::channel::Received::Response(opened) = sa.channel.receive(protected, &answer) else { panic!() };
    assert!(Parts::of(&opened).unwrap().error().is_none());
}

// RFC 9329 §7.2: the transport is chosen anew at the next gateway.
#[test]
fn a_redirected_initiator_tries_udp_first() {
    let gateway = |name: &str, last, redirect_to| {
        let local_addrs = vec![AddressRange::host(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)))];
        let mut connection = Connection { name: name.to_owned(), local_addrs, redirect_to, ..connection(B) };
        connection.remote.name = name.to_owned();
        Arc::new(connection)
    };
    use crate::config::RedirectPhase::{Auth, Init};
    // While it is being set up, and afterwards.
    for (seed, phase) in [(811, Some(Init)), (814, Some(Auth)), (815, None)] {
        let a = Connection { tcp: TcpPolicy::Fallback, tcp_delay: seconds(2), ..connection(A) };
        let mut pair = Pair::with(seed, EngineConfig::default(), a, connection(B));
        pair.more[B].push(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3)));
        let to = Gateway::parse("10.0.0.3").unwrap();
        let redirect_to = phase.map(|phase| (to.clone(), phase));
        pair.sides[B].engine.set_connections(vec![gateway("gw2", 2, redirect_to), gateway("gw3", 3, None)]);
        pair.udp_blocked = true;
        pair.initiate(A, 1);
        let mut asked = false;
        for _ in 0..5000 {
            pair.run(Duration::from_millis(1));
            if phase.is_none() && !asked && pair.sides[A].done(1) {
                asked = true;
                let (now, id) = (pair.now, pair.sides[B].only().id);
                pair.sides[B].engine.redirect(now, id, to.clone(), 9).unwrap();
            }
            // What is encrypted cannot be counted: of that the responder logs the fact.
            if said(&pair.sides[B], NotifyType::REDIRECT) == 1 || pair.sides[B].logged("redirect") {
                break;
            }
        }
        let over_tcp =
            pair.sides[B].sent.last().is_some_and(|sent| matches!(sent.path.transport, Transport::Stream(_)));
        assert!(over_tcp, "redirected over TCP: {phase:?}");
        pair.udp_blocked = false;
        pair.run(seconds(5));
        assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
        assert_eq!(pair.sides[A].only().path.transport, Transport::Udp, "{phase:?}");
        assert_eq!(pair.sides[B].only().connection, "gw3");
    }
}

// RFC 9329 §7.4: a cluster's new member has no stream and cannot open one, so the originator asks now and then.
#[test]
fn the_originator_asks_a_cluster_whether_it_lives() {
    let mut pair = established(tcp_pair(812));
    for side in [A, B] {
        let before = pair.sides[side].sent.len();
        pair.run(seconds(65));
        let sent = pair.sides[side].sent.len() - before;
        // B answers what A asks. Both announce support for RFC 6311.
        assert!(sent >= 2, "{sent} messages of side {side}");
    }
    // Over UDP nothing is asked where nothing is configured.
    let mut pair = up(813);
    let before = pair.sides[A].sent.len();
    pair.run(seconds(100));
    assert_eq!(pair.sides[A].sent.len(), before);
}
