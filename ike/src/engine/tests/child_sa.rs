//! Child SAs: CREATE_CHILD_SA, narrowing, modes, deletion.

use super::*;

fn second_child() -> (Connection, Connection) {
    let (mut a, mut b) = (connection(A), connection(B));
    a.children.push(Arc::new(child("more", "10.3.0.0/24", "10.4.0.0/24")));
    b.children.push(Arc::new(child("more", "10.4.0.0/24", "10.3.0.0/24")));
    (a, b)
}

// RFC 7296 §1.3.1.
#[test]
fn either_side_adds_a_child_to_the_same_ike_sa() {
    for side in [A, B] {
        let (a, b) = second_child();
        let mut pair = established(Pair::with(40, EngineConfig::default(), a, b));
        let connection = Arc::clone(&pair.sides[side].engine.ctx.connections[0]);
        let more = connection.children[1].clone();
        pair.initiate_child(side, connection, Some(more), 2);
        pair.run(seconds(2));
        assert!(pair.sides[side].done(2));
        pair.assert_same(1, 2);
    }
}

// RFC 7296 §1.3.1: with a key exchange of its own, and another group where the responder asks for it.
#[test]
fn a_child_with_forward_secrecy_and_another_group() {
    let (mut a, mut b) = second_child();
    let with = |connection: &mut Connection, proposals: &str| {
        let mut more = (*connection.children[1]).clone();
        more.esp_proposals = parse_proposals(proposals, Protocol::ESP).unwrap();
        connection.children[1] = Arc::new(more);
    };
    with(&mut a, "aes128gcm16-ecp256-x25519");
    with(&mut b, "aes128gcm16-x25519");
    let mut pair = established(Pair::with(41, EngineConfig::default(), a, b));
    let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
    let more = connection.children[1].clone();
    pair.initiate_child(A, connection, Some(more), 2);
    pair.run(seconds(2));
    assert!(pair.sides[A].done(2));
    pair.assert_same(1, 2);
    assert_eq!(pair.sides[A].only().children[1].ke, Ke::X25519);
    assert!(pair.sides[A].logged("received INVALID_KE_PAYLOAD notify error"));
}

// RFC 7296 §2.9.
#[test]
fn selectors_are_narrowed_to_what_both_allow() {
    let mut a = connection(A);
    a.children = vec![Arc::new(child("net", "10.0.0.0/8", "10.0.0.0/8"))];
    let pair = established(Pair::with(42, EngineConfig::default(), a, connection(B)));
    let child = &pair.sides[A].only().children[0];
    assert_eq!(child.local_ts[0].to_string(), "10.1.0.0/24");
    assert_eq!(child.remote_ts[0].to_string(), "10.2.0.0/24");
}

#[test]
fn selectors_without_overlap_are_unacceptable() {
    let mut a = connection(A);
    a.children = vec![Arc::new(child("net", "10.1.0.0/24", "192.168.0.0/24"))];
    let mut pair = Pair::with(43, EngineConfig::default(), a, connection(B));
    pair.initiate(A, 1);
    pair.run(seconds(2));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received TS_UNACCEPTABLE notify error"));
    pair.assert_same(1, 0);
}

fn transport(side: usize) -> Connection {
    let mut connection = connection(side);
    let mut host = child("net", "10.1.0.0/24", "10.2.0.0/24");
    let dynamic = ConfiguredSelector::Dynamic { protocol: 0, start_port: 0, end_port: 65535 };
    (host.local_ts, host.remote_ts) = (vec![dynamic], vec![dynamic]);
    host.mode = Mode::Transport;
    connection.children = vec![Arc::new(host)];
    connection
}

// RFC 7296 §1.3.1.
#[test]
fn transport_mode_is_agreed_on() {
    let pair = established(Pair::with(44, EngineConfig::default(), transport(A), transport(B)));
    assert!(pair.sides[A].installed.values().all(|pair| pair.mode == Mode::Transport));
    assert_eq!(pair.sides[A].only().children[0].local_ts[0].to_string(), "10.0.0.1/32");
}

// RFC 7296 §2.23.1: each side has selectors with the addresses that it sees, and the responder answers with them.
#[test]
fn transport_mode_works_through_a_nat() {
    let mut pair = Pair::with(45, EngineConfig::default(), transport(A), transport(B));
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 10_000));
    pair.initiate(A, 1);
    pair.run(seconds(2));
    assert!(pair.sides[A].done(1));
    assert_eq!(pair.sides[A].only().children[0].local_ts[0].to_string(), "10.0.0.1/32");
    assert_eq!(pair.sides[B].only().children[0].remote_ts[0].to_string(), "192.0.2.1/32");
}

#[test]
fn a_tunnel_is_not_given_for_transport_mode() {
    let mut b = transport(B);
    let mut tunnel = (*b.children[0]).clone();
    tunnel.mode = Mode::Tunnel;
    b.children = vec![Arc::new(tunnel)];
    let mut pair = Pair::with(46, EngineConfig::default(), transport(A), b);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("the peer chose another mode"));
    pair.assert_same(1, 0);
}

// RFC 7296 §1.4.1.
#[test]
fn either_side_deletes_a_child() {
    for side in [A, B] {
        for force in [false, true] {
            let mut pair = up(47);
            let child = pair.sides[side].only().children[0].id;
            let now = pair.now;
            pair.sides[side].engine.terminate(now, Target::Child(child), force, 2).unwrap();
            pair.run(seconds(2));
            assert!(pair.sides[side].done(2));
            pair.assert_same(1, 0);
        }
    }
}

// RFC 7296 §1.4.1: both sides delete the same pair at once.
#[test]
fn both_sides_delete_a_child_at_once() {
    let mut pair = up(48);
    for side in [A, B] {
        let child = pair.sides[side].only().children[0].id;
        let now = pair.now;
        pair.sides[side].engine.terminate(now, Target::Child(child), false, 2).unwrap();
    }
    pair.run(seconds(2));
    assert!(pair.sides[A].done(2) && pair.sides[B].done(2));
    pair.assert_same(1, 0);
}

#[test]
fn a_volume_limit_rekeys_or_deletes() {
    let mut pair = up(49);
    let child = pair.sides[B].only().children[0].clone();
    let now = pair.now;
    pair.sides[B].engine.handle_expire(now, child.spi_in, false);
    pair.run(seconds(10));
    pair.assert_same(1, 1);
    let successor = pair.sides[B].only().children[0].clone();
    assert_ne!(successor.spi_in, child.spi_in);
    let now = pair.now;
    pair.sides[B].engine.handle_expire(now, successor.spi_in, true);
    pair.run(seconds(3));
    pair.assert_same(1, 0);
}

#[test]
fn a_child_ends_with_its_life_time() {
    let mut a = connection(A);
    let mut short = (*a.children[0]).clone();
    short.life_time = seconds(60);
    a.children = vec![Arc::new(short)];
    let mut pair = established(Pair::with(50, EngineConfig::default(), a, connection(B)));
    pair.run(seconds(62));
    pair.assert_same(1, 0);
}

// RFC 7296 §2.8: both ends of an SA have the same limits, and shall not reach them at once.
#[test]
fn volume_limits_are_jittered() {
    let of = |side: usize| {
        let mut connection = connection(side);
        let mut child = (*connection.children[0]).clone();
        child.lifetime = ipsec::plane::Lifetime {
            soft_bytes: Some(1000),
            hard_bytes: Some(2000),
            soft_packets: Some(10),
            hard_packets: None,
        };
        (child.rand_bytes, child.rand_packets) = (400, u64::MAX);
        connection.children = vec![Arc::new(child)];
        connection
    };
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let pair = established(Pair::with(seed, EngineConfig::default(), of(A), of(B)));
        for side in &pair.sides {
            let bytes = side.lifetime.soft_bytes.unwrap();
            assert!((600..=1000).contains(&bytes));
            assert!((1..=10).contains(&side.lifetime.soft_packets.unwrap()));
            assert_eq!((side.lifetime.hard_bytes, side.lifetime.hard_packets), (Some(2000), None));
            seen.insert(bytes);
        }
    }
    assert!(seen.len() > 20);
}

// The data plane answers when the IKE SA is being deleted, or is gone: no Child SA stays.
#[test]
fn an_installation_that_comes_late_leaves_nothing() {
    for side in [A, B] {
        for force in [false, true] {
            for step in 0..30 {
                // Who is not told by force is told by silence.
                let of = |side: usize| Connection { dpd_delay: seconds(10), ..connection(side) };
                let mut pair = established(Pair::with(140 + step, EngineConfig::default(), of(A), of(B)));
                pair.job_delay = Duration::from_millis(400);
                pair.initiate(A, 2);
                pair.run(Duration::from_millis(step * 20));
                let (ike, now) = (pair.sides[side].only().id, pair.now);
                pair.sides[side].engine.terminate(now, Target::Ike(ike), force, 3).unwrap();
                pair.drain(side);
                pair.run(seconds(if force { 300 } else { 60 }));
                assert!(pair.sides[side].done(3));
                pair.assert_same(0, 0);
            }
        }
    }
}
