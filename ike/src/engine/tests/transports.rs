//! Between UDP and TCP (RFC 9329 §5.1, §7.1): the way there, and the way back, of IKE SAs that are up, and what is
//! remembered of a network.

use super::*;
use crate::sa::fault::notify;
use crate::wire::{NotifyType, Payload};

fn of(side: usize) -> Connection {
    Connection { mobike: true, tcp: TcpPolicy::Fallback, tcp_delay: Duration::from_millis(1500), ..connection(side) }
}

fn watched(side: usize) -> Connection {
    Connection { dpd_delay: seconds(2), ..of(side) }
}

/// Both know their addresses.
fn pair_of(seed: u64, of: fn(usize) -> Connection) -> Pair {
    let mut pair = Pair::with(seed, EngineConfig::default(), of(A), of(B));
    pair.roam(A);
    pair.roam(B);
    pair
}

fn up_over_tcp(seed: u64, of: fn(usize) -> Connection) -> Pair {
    let mut pair = pair_of(seed, of);
    pair.udp_blocked = true;
    let pair = established(pair);
    assert!(over_tcp(&pair));
    pair
}

/// Both sides' IKE SAs and Child SAs are over one stream, the only one.
fn over_tcp(pair: &Pair) -> bool {
    pair.sides.iter().all(|side| {
        let Transport::Stream(stream) = side.only().path.transport else { return false };
        let there =
            |pair: &Installed| matches!(pair.encapsulation, Encapsulation::Stream { stream: to, .. } if to == stream);
        side.installed.values().all(there) && side.streams.len() == 1 && side.streams.contains_key(&stream)
    })
}

/// Over UDP, and no stream is left.
fn over_udp(pair: &Pair) -> bool {
    pair.sides.iter().all(|side| {
        let stream = |pair: &Installed| matches!(pair.encapsulation, Encapsulation::Stream { .. });
        side.only().path.transport == Transport::UdpEncap
            && !side.installed.values().any(stream)
            && side.streams.is_empty()
    })
}

fn spis(pair: &Pair) -> (u64, Vec<u32>) {
    (pair.sides[A].only().initiator_spi, pair.sides[A].installed.keys().copied().collect())
}

fn second(side: usize) -> IpAddr {
    IpAddr::V4(if side == A { Ipv4Addr::new(10, 0, 1, 1) } else { Ipv4Addr::new(10, 0, 1, 2) })
}

fn move_a(pair: &mut Pair) {
    pair.gone = vec![address(A)];
    pair.more[A] = vec![second(A)];
    pair.roam(A);
}

fn initiated_again(pair: &mut Pair, token: u64) {
    let (now, ike) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.terminate(now, Target::Ike(ike), false, 900 + token).unwrap();
    pair.run(seconds(10));
    pair.assert_same(0, 0);
    pair.initiate(A, token);
}

// RFC 9329 §7.1, §9: back as soon as UDP works, with the same SAs, and the stream is closed when all is over.
#[test]
fn an_ike_sa_goes_back_to_udp() {
    let mut pair = up_over_tcp(850, of);
    let before = spis(&pair);
    pair.run(seconds(30));
    assert!(over_tcp(&pair), "not before it is time");
    pair.udp_blocked = false;
    pair.run(seconds(35));
    assert!(over_udp(&pair), "{:#?}", pair.sides[A].events);
    assert_eq!(spis(&pair), before);
    pair.assert_same(1, 1);
    assert!(!pair.sides[B].only().nat_remote, "the hashes are of UDP's ports");
    // And nothing more is tried.
    let sent = pair.sides[A].sent.len();
    pair.run(seconds(400));
    assert_eq!(pair.sides[A].sent.len(), sent);
}

// RFC 9329 §7.1: the same request goes over the stream where UDP stays silent, and nothing moves.
#[test]
fn a_probe_in_vain_changes_nothing() {
    let mut pair = up_over_tcp(851, of);
    let before = spis(&pair);
    let sent = pair.sides[A].sent.len();
    pair.run(seconds(65));
    // Before it a cluster would be asked whether it lives.
    let all = &pair.sides[A].sent[sent..];
    let first = all.iter().position(|sent| sent.path.transport == Transport::UdpEncap).unwrap();
    let probe: Vec<Transmit> = all[first..].to_vec();
    let transports: Vec<Transport> = probe.iter().map(|sent| sent.path.transport).collect();
    let stream = pair.sides[A].only().path.transport;
    assert_eq!(transports, [Transport::UdpEncap, Transport::UdpEncap, stream]);
    assert!(probe.iter().all(|sent| sent.bytes == probe[0].bytes), "one message");
    assert!(over_tcp(&pair));
    assert_eq!(spis(&pair), before);
    // Less and less often.
    let sent = pair.sides[A].sent.len();
    pair.run(seconds(3600));
    let probes = pair.sides[A].sent[sent..].iter().filter(|sent| sent.path.transport == Transport::UdpEncap);
    let probes = probes.count();
    assert!((6..=14).contains(&probes), "{probes}");
    pair.assert_same(1, 1);
}

// While a probe is out the stream breaks: the request goes along the next one.
#[test]
fn a_probe_survives_a_broken_stream() {
    let mut pair = up_over_tcp(852, of);
    pair.run(seconds(60));
    assert!(pair.sides[A].only().tasks_active.contains(&"IKE_MOBIKE"));
    pair.break_streams();
    pair.run(seconds(5));
    assert!(over_tcp(&pair));
    pair.assert_same(1, 1);
    assert!(pair.sides[A].only().tasks_active.is_empty());
}

// UDP answers a probe, and is silent again when the peer is asked to follow: back over the stream that is still there.
#[test]
fn a_way_back_that_fails_half_way_ends_on_the_stream() {
    let mut pair = up_over_tcp(853, of);
    pair.udp_blocked = false;
    for _ in 0..70_000 {
        pair.run(Duration::from_millis(1));
        if pair.sides[A].only().path.transport == Transport::UdpEncap {
            break;
        }
    }
    pair.udp_blocked = true;
    pair.deliveries.retain(
        |_, delivery| !matches!(delivery, Delivery::Message { path, .. } if path.transport == Transport::UdpEncap),
    );
    pair.run(seconds(10));
    assert!(over_tcp(&pair), "{:#?}", pair.sides[A].events);
    pair.assert_same(1, 1);
    pair.udp_blocked = false;
    pair.run(seconds(2000));
    assert!(over_udp(&pair));
}

// RFC 9329 §7.1: over UDP first, then the same message over TCP, then anew with the right hashes.
#[test]
fn an_update_falls_back_to_tcp_in_one_exchange() {
    let mut pair = established(pair_of(854, of));
    let before = spis(&pair);
    let sent = pair.sides[A].sent.len();
    pair.udp_blocked = true;
    move_a(&mut pair);
    pair.run(seconds(4));
    assert!(over_tcp(&pair), "{:#?}", pair.sides[A].events);
    assert_eq!(spis(&pair), before);
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[B].only().path.remote.ip(), second(A));
    let update: Vec<Transmit> = pair.sides[A].sent[sent..].to_vec();
    let first_over_tcp = update.iter().position(|sent| matches!(sent.path.transport, Transport::Stream(_))).unwrap();
    assert!(first_over_tcp >= 2, "repeated over UDP before");
    assert!(update[..=first_over_tcp].iter().all(|sent| sent.bytes == update[0].bytes), "one message");
    assert_eq!(update.len(), first_over_tcp + 2, "and one with the hashes of TCP's ports");
    assert!(!pair.sides[B].only().nat_remote && !pair.sides[A].only().nat_local);
    // What is known shortens the next move there.
    pair.gone = vec![second(A)];
    pair.more[A] = vec![address(A)];
    pair.roam(A);
    pair.run(seconds(4));
    assert!(over_tcp(&pair));
}

// RFC 9329 §7.1: whatever was used on the network before.
#[test]
fn a_move_from_tcp_tries_udp_first() {
    let mut pair = up_over_tcp(855, of);
    let before = spis(&pair);
    pair.udp_blocked = false;
    move_a(&mut pair);
    pair.run(seconds(2));
    assert!(over_udp(&pair), "{:#?}", pair.sides[A].events);
    assert_eq!(spis(&pair), before);
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[B].only().path.remote.ip(), second(A));

    let mut pair = up_over_tcp(856, of);
    move_a(&mut pair);
    pair.run(seconds(4));
    assert!(over_tcp(&pair), "{:#?}", pair.sides[A].events);
    pair.assert_same(1, 1);
}

// A filter that begins to drop UDP, and later lets it through again.
#[test]
fn udp_that_stops_working_is_replaced_by_tcp() {
    let mut pair = established(pair_of(857, watched));
    let before = spis(&pair);
    pair.udp_blocked = true;
    pair.run(seconds(20));
    assert!(over_tcp(&pair), "{:#?}", pair.sides[A].events);
    assert_eq!(spis(&pair), before);
    pair.udp_blocked = false;
    pair.run(seconds(70));
    assert!(over_udp(&pair));
    assert_eq!(spis(&pair), before);
    pair.assert_same(1, 1);
}

// TCP is blocked where UDP is not: a stream that cannot be opened again is left for UDP.
#[test]
fn a_stream_that_cannot_be_reopened_is_left_for_udp() {
    let mut pair = up_over_tcp(858, of);
    let before = spis(&pair);
    pair.tcp_blocked = true;
    pair.udp_blocked = false;
    pair.break_streams();
    pair.run(seconds(5));
    assert!(over_udp(&pair), "{:#?}", pair.sides[A].events);
    assert_eq!(spis(&pair), before);
    pair.assert_same(1, 1);
}

// Nothing at all works for a while, then TCP alone.
#[test]
fn a_dead_network_that_comes_back_with_tcp_only_is_used() {
    let mut pair = up_over_tcp(859, of);
    let before = spis(&pair);
    pair.tcp_blocked = true;
    pair.break_streams();
    pair.run(seconds(10));
    pair.tcp_blocked = false;
    pair.run(seconds(20));
    assert!(over_tcp(&pair), "{:#?}", pair.sides[A].events);
    assert_eq!(spis(&pair), before);
    pair.assert_same(1, 1);
}

// RFC 9329 §5.1: prior knowledge. An hour later UDP comes first again.
#[test]
fn what_worked_is_remembered_for_a_while() {
    let mut pair = up_over_tcp(860, of);
    pair.sides[A].sent.clear();
    initiated_again(&mut pair, 2);
    pair.run(Duration::from_millis(500));
    assert!(pair.sides[A].done(2) && over_tcp(&pair));
    // TCP has gone since: UDP as if nothing were known.
    pair.udp_blocked = false;
    initiated_again(&mut pair, 3);
    pair.run(Duration::from_millis(100));
    let (now, ike) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.terminate(now, Target::Ike(ike), false, 999).unwrap();
    pair.run(seconds(10));
    pair.tcp_blocked = true;
    pair.initiate(A, 4);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(4) && pair.sides[A].streams.is_empty());
    pair.assert_same(1, 1);
    pair.tcp_blocked = false;
    initiated_again(&mut pair, 5);
    pair.run(seconds(1));
    assert!(pair.sides[A].done(5) && pair.sides[A].streams.is_empty(), "UDP works, and that is remembered");

    let mut pair = up_over_tcp(861, |side| Connection { tcp_probe_udp: Duration::ZERO, ..of(side) });
    pair.run(seconds(3601));
    pair.udp_blocked = false;
    initiated_again(&mut pair, 2);
    pair.run(seconds(1));
    assert!(pair.sides[A].done(2) && pair.sides[A].streams.is_empty());
}

// IKE_SA_INIT gets through on port 500, and nothing on 4500.
#[test]
fn a_blocked_port_for_encapsulation_leads_to_tcp() {
    let mut pair = pair_of(862, of);
    pair.initiate(A, 1);
    for _ in 0..1000 {
        pair.run(Duration::from_millis(1));
        if pair.sides[A].sent.iter().any(|sent| sent.path.transport == Transport::UdpEncap) {
            break;
        }
    }
    pair.udp_blocked = true;
    pair.deliveries.retain(
        |_, delivery| !matches!(delivery, Delivery::Message { path, .. } if path.transport == Transport::UdpEncap),
    );
    pair.run(seconds(5));
    assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
    assert!(matches!(pair.sides[A].only().path.transport, Transport::Stream(_)));
    pair.run(seconds(60));
    pair.assert_same(1, 1);
    // Where TCP does not work either, it comes to an end.
    let mut pair = pair_of(863, of);
    pair.tcp_blocked = true;
    pair.initiate(A, 1);
    for _ in 0..600_000 {
        let now = pair.now;
        pair.deliveries.retain(
            |_, delivery| !matches!(delivery, Delivery::Message { path, .. } if path.transport == Transport::UdpEncap),
        );
        pair.run(Duration::from_millis(5));
        if pair.sides[A].failed(1).is_some() {
            break;
        }
        assert!(pair.now > now);
    }
    assert!(pair.sides[A].failed(1).is_some());
}

/// Milliseconds from the first packet at which requests went out over UDP, or a stream was opened, until the tunnel was up.
fn times_of_set_up(mut pair: Pair, blocked: Transport) -> (Vec<u128>, u128) {
    let (start, mut times) = (pair.now, Vec::new());
    pair.initiate(A, 1);
    let (mut sent, mut streams) = (0, 0);
    while !pair.sides[A].done(1) {
        let now = pair.now.saturating_duration_since(start).as_millis();
        assert!(now < 10_000, "{:#?}", pair.sides[A].events);
        let along = |sent: &Transmit| sent.path.transport == blocked;
        let count = pair.sides[A].sent.iter().filter(|sent| along(sent)).count();
        if count > sent || pair.sides[A].streams.len() > streams {
            times.push(now);
        }
        (sent, streams) = (count, pair.sides[A].streams.len());
        pair.deliveries
            .retain(|_, delivery| !matches!(delivery, Delivery::Message { path, .. } if path.transport == blocked));
        pair.run(Duration::from_millis(1));
    }
    (times, pair.now.saturating_duration_since(start).as_millis())
}

// RFC 9329 §5.1: at least one repetition over UDP, and TCP after `tcp_delay`, whichever port is blocked. With the default
// of 1.5 s the tunnel is up within 2.5 s of the first packet, whatever the round trips take up to 100 ms each.
#[test]
fn a_blocked_port_costs_no_more_than_the_delay_before_tcp() {
    for (delay, slowest) in [(1500, 2500), (400, 1400)] {
        let of = |side| Connection { tcp_delay: Duration::from_millis(delay), ..of(side) };
        for blocked in [Transport::Udp, Transport::UdpEncap] {
            let mut pair = Pair::with(870, EngineConfig::default(), of(A), of(B));
            pair.delay = (Duration::ZERO, Duration::from_millis(50));
            let (times, up) = times_of_set_up(pair, blocked);
            let [first, again, stream] = times[..] else { panic!("{blocked:?} {times:?}") };
            assert!((delay / 2..delay / 2 + 3).contains(&((again - first) as u64)), "{blocked:?} {times:?}");
            assert!((delay..delay + 3).contains(&((stream - first) as u64)), "{blocked:?} {times:?}");
            assert!(up < slowest, "{blocked:?} {up}");
        }
    }
}

/// Without MOBIKE nothing moves an IKE SA.
fn immobile(side: usize) -> Connection {
    Connection { mobike: false, tcp_reauth_udp: true, ..of(side) }
}

/// For so long; at each moment each side has a Child SA that works.
fn run_without_a_gap(pair: &mut Pair, time: Duration) {
    let end = pair.now + time;
    while pair.now < end {
        pair.run(Duration::from_millis(20));
        for side in &pair.sides {
            assert!(side.sending().is_some(), "a gap: {:#?}", side.events);
        }
    }
}

fn attempts_to_return(pair: &Pair) -> usize {
    let tried = |event: &&Event| matches!(event, Event::Log { message, .. } if message.contains("with another IKE_SA"));
    pair.sides[A].events.iter().filter(tried).count()
}

// RFC 9329 §5: all goes over TCP until the IKE SA is deleted; §2, §9: which another one over UDP sees to.
#[test]
fn without_mobike_another_ike_sa_leads_back_to_udp() {
    for unique in [Unique::No, Unique::Never, Unique::Replace] {
        let with = |side| Connection { unique: if side == B { unique } else { Unique::No }, ..immobile(side) };
        let mut pair = Pair::with(871, EngineConfig::default(), with(A), with(B));
        pair.udp_blocked = true;
        let mut pair = established(pair);
        assert!(over_tcp(&pair));
        let before = pair.sides[A].only().initiator_spi;
        pair.udp_blocked = false;
        if unique == Unique::Replace {
            // The peer deletes the old one as soon as it answers.
            pair.run(seconds(70));
        } else {
            run_without_a_gap(&mut pair, seconds(70));
        }
        assert_eq!(pair.sides[A].only().path.transport, Transport::Udp, "{unique:?} {:#?}", pair.sides[A].events);
        assert!(pair.sides.iter().all(|side| side.streams.is_empty()), "{unique:?}");
        assert_ne!(pair.sides[A].only().initiator_spi, before);
        pair.assert_same(1, 1);
        run_without_a_gap(&mut pair, seconds(400));
        assert_eq!(attempts_to_return(&pair), 1);
    }
}

#[test]
fn without_udp_the_ike_sa_over_tcp_stays() {
    let mut pair = up_over_tcp(872, immobile);
    let before = spis(&pair);
    run_without_a_gap(&mut pair, seconds(70));
    assert_eq!(attempts_to_return(&pair), 1);
    pair.assert_same(1, 1);
    // Less and less often.
    pair.run(seconds(3600));
    assert!((4..=8).contains(&attempts_to_return(&pair)), "{}", attempts_to_return(&pair));
    assert_eq!(spis(&pair), before);
    assert!(over_tcp(&pair));
    // Whatever is asked for meanwhile is had over TCP.
    let mut pair = up_over_tcp(873, immobile);
    while attempts_to_return(&pair) == 0 {
        pair.run(Duration::from_millis(500));
    }
    pair.initiate(A, 2);
    pair.run(seconds(10));
    assert!(pair.sides[A].done(2));
    pair.assert_same(1, 2);
    assert!(over_tcp(&pair));
}

#[test]
fn a_return_that_only_begins_leaves_the_ike_sa_over_tcp() {
    for seed in 874..877 {
        let mut pair = pair_of(seed, |side| Connection { force_encapsulation: true, ..immobile(side) });
        pair.udp_blocked = true;
        let mut pair = established(pair);
        let before = spis(&pair);
        pair.udp_blocked = false;
        // IKE_SA_INIT gets through on port 500, and nothing on 4500.
        pair.run(seconds(58));
        without_port_4500(&mut pair, |_| true);
        assert_eq!(attempts_to_return(&pair), 1);
        assert!(pair.sides[A].logged("no answer over UDP port 4500 still"));
        pair.run(seconds(40));
        assert_eq!(pair.sides[A].only().initiator_spi, before.0);
        assert!(over_tcp(&pair));
        pair.assert_same(1, 1);
    }
}

/// For five seconds nothing is delivered on the port for encapsulation to these sides.
fn without_port_4500(pair: &mut Pair, to_whom: fn(usize) -> bool) {
    for _ in 0..10_000 {
        pair.deliveries.retain(|_, delivery| {
            !matches!(delivery, Delivery::Message { to, path, .. }
                if path.transport == Transport::UdpEncap && to_whom(*to))
        });
        pair.run(Duration::from_micros(500));
    }
}

// The peer has another IKE SA, and its answer is lost: what it sends goes into Child SAs that both know, all the same.
#[test]
fn a_return_whose_answer_is_lost_breaks_nothing() {
    let with = |side| Connection { force_encapsulation: true, dpd_delay: seconds(20), ..immobile(side) };
    let mut pair = up_over_tcp(877, with);
    let before = pair.sides[A].only().initiator_spi;
    pair.udp_blocked = false;
    pair.run(seconds(58));
    without_port_4500(&mut pair, |to| to == A);
    assert!(pair.sides[A].logged("no answer over UDP port 4500 still"));
    assert_eq!(pair.sides[B].up().len(), 2);
    pair.udp_blocked = true;
    pair.run(seconds(1));
    pair.assert_traffic_flows();
    pair.run(seconds(300));
    assert_eq!(pair.sides[A].only().initiator_spi, before);
    assert!(over_tcp(&pair));
    pair.assert_same(1, 1);
}

// The same with a peer that has ended the old one for it.
#[test]
fn a_return_whose_answer_is_lost_with_the_old_ike_sa_begins_anew() {
    let with = |side| {
        let unique = if side == B { Unique::Replace } else { Unique::No };
        Connection { force_encapsulation: true, dpd_delay: seconds(20), unique, ..immobile(side) }
    };
    let mut pair = up_over_tcp(878, with);
    pair.udp_blocked = false;
    pair.run(seconds(58));
    without_port_4500(&mut pair, |to| to == A);
    assert!(pair.sides[A].logged("no answer over UDP port 4500 still"));
    pair.udp_blocked = true;
    pair.run(seconds(300));
    assert!(over_tcp(&pair));
    pair.assert_same(1, 1);
}

// A peer that keeps what it has refuses another one; and nobody tries who was told not to.
#[test]
fn a_return_that_is_refused_or_not_wanted_changes_nothing() {
    let keeps = |side| Connection { unique: Unique::Keep, ..immobile(side) };
    let unwanted = |side| Connection { tcp_reauth_udp: false, ..immobile(side) };
    let unwanted_at_all = |side| Connection { tcp_probe_udp: Duration::ZERO, ..immobile(side) };
    for (of, tries) in [(keeps as fn(usize) -> Connection, 1), (unwanted, 0), (unwanted_at_all, 0)] {
        let mut pair = up_over_tcp(880, of);
        let before = spis(&pair);
        pair.udp_blocked = false;
        run_without_a_gap(&mut pair, seconds(100));
        assert_eq!(attempts_to_return(&pair), tries);
        assert_eq!(spis(&pair), before);
        assert!(over_tcp(&pair));
        pair.assert_same(1, 1);
    }
}

// RFC 9329 §7.1: ignored over a stream, where a NAT does no harm.
#[test]
fn no_nats_allowed_means_nothing_over_a_stream() {
    let mut pair = up_over_tcp(864, of);
    let data = [&[10, 0, 1, 7, 10, 0, 0, 2][..], &4500_u16.to_be_bytes(), &4500_u16.to_be_bytes()].concat();
    let payloads: [Payload; 2] =
        [notify(NotifyType::UPDATE_SA_ADDRESSES, Vec::new()), notify(NotifyType::NO_NATS_ALLOWED, data)];
    let answer = refusals::ask(&mut pair, ExchangeType::INFORMATIONAL, &payloads);
    assert!(!answer.has(NotifyType::UNEXPECTED_NAT_DETECTED) && answer.error().is_none());
}

/// Whatever comes and goes: in the end both sides have the same, over the same, and the SAs of before.
#[test]
fn any_schedule_of_filters_moves_and_rekeys_ends_aligned() {
    for seed in 0..30 {
        let mut pair = established(pair_of(seed, watched));
        pair.loss = pair.rng.below(10);
        let ike = pair.sides[A].only().id;
        for token in 0..10 {
            match pair.rng.below(6) {
                0 => pair.udp_blocked = !pair.udp_blocked && !pair.tcp_blocked,
                1 => pair.tcp_blocked = !pair.tcp_blocked && !pair.udp_blocked,
                2 => {
                    pair.gone = if pair.gone.is_empty() { vec![address(A)] } else { Vec::new() };
                    pair.more[A] = if pair.gone.is_empty() { Vec::new() } else { vec![second(A)] };
                    pair.roam(A);
                }
                3 => pair.break_streams(),
                4 => {
                    let side = pair.rng.below(2) as usize;
                    let now = pair.now;
                    let child =
                        pair.sides[side].engine.ike_sas(now).first().and_then(|sa| Some(sa.children.first()?.id));
                    if let Some(child) = child {
                        let _ = pair.sides[side].engine.rekey(now, Target::Child(child), 100 + token);
                    }
                }
                _ => {
                    let (now, side) = (pair.now, pair.rng.below(2) as usize);
                    let ike = pair.sides[side].engine.ike_sas(now).first().map(|sa| sa.id);
                    if let Some(ike) = ike {
                        let _ = pair.sides[side].engine.rekey(now, Target::Ike(ike), 200 + token);
                    }
                }
            }
            let pause = pair.rng.below(20_000);
            pair.run(Duration::from_millis(pause));
        }
        pair.loss = 0;
        (pair.udp_blocked, pair.tcp_blocked) = (false, false);
        pair.run(seconds(2500));
        let failed = pair.sides[A].events.iter().any(|event| matches!(event, Event::IkeDown(_, CloseReason::Timeout)));
        assert!(!failed, "seed {seed} {ike:?}: {:#?}", pair.sides[A].events);
        pair.assert_same(1, 1);
        assert!(over_udp(&pair), "seed {seed}");
    }
}
