//! NATs, ports, moves, fragments.

use super::*;

fn behind_nat(seed: u64) -> Pair {
    let mut pair = Pair::new(seed);
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 10_000));
    pair
}

// RFC 7296 §2.23: both float to the port for encapsulation, and ESP goes in UDP.
#[test]
fn a_nat_moves_both_sides_to_the_encapsulation_port() {
    let pair = established(behind_nat(80));
    let (a, b) = (pair.sides[A].only(), pair.sides[B].only());
    assert!(a.nat_local && !a.nat_remote && !b.nat_local && b.nat_remote);
    assert_eq!(a.path.transport, Transport::UdpEncap);
    assert_eq!(a.path.local.port(), 4500);
    assert_eq!(b.path.remote, "192.0.2.1:14500".parse().unwrap());
    let to = pair.sides[B].installed.values().next().unwrap().encapsulation;
    assert_eq!(to, Encapsulation::Udp { local: b.path.local, remote: b.path.remote });
}

// RFC 3948 §2.3.
#[test]
fn the_side_behind_the_nat_sends_keepalives() {
    let mut pair = established(behind_nat(81));
    pair.run(seconds(61));
    let keepalives = |side: usize| pair.sides[side].sent.iter().filter(|sent| sent.bytes == [0xff]).count();
    assert_eq!(keepalives(A), 3);
    assert_eq!(keepalives(B), 0);
}

// RFC 7296 §2.23: an authentic message from another mapping moves the SA; the data plane follows.
#[test]
fn a_new_mapping_is_followed() {
    let mut pair = established(behind_nat(82));
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 20_000));
    let child = pair.sides[A].only().children[0].id;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.run(seconds(10));
    assert!(pair.sides[A].done(2));
    let b = pair.sides[B].only();
    assert_eq!(b.path.remote, "192.0.2.1:24500".parse().unwrap());
    assert!(pair.sides[B].events.iter().any(|event| matches!(event, Event::Migrate { .. })));
    pair.assert_same(1, 1);
}

#[test]
fn esp_from_a_new_mapping_is_followed() {
    let mut pair = established(behind_nat(83));
    let spi = pair.sides[B].only().children[0].spi_in;
    let remote: SocketAddr = "192.0.2.1:33333".parse().unwrap();
    let now = pair.now;
    pair.sides[B].engine.handle_mapping_changed(now, spi, remote);
    pair.drain(B);
    assert_eq!(pair.sides[B].only().path.remote, remote);
    assert!(
        matches!(pair.sides[B].installed[&spi].encapsulation, Encapsulation::Udp { remote: to, .. } if to == remote)
    );
}

// Without a NAT nothing moves (§2.23: only a peer behind a NAT is followed).
#[test]
fn without_a_nat_the_path_stays() {
    let mut pair = up(84);
    let before = pair.sides[B].only().path;
    assert_eq!(before.transport, Transport::Udp);
    pair.nat = Some(("192.0.2.9".parse().unwrap(), 10_000));
    let child = pair.sides[A].only().children[0].id;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.run(seconds(1));
    assert_eq!(pair.sides[B].only().path, before);
}

#[test]
fn a_pretended_nat_encapsulates() {
    let mut a = connection(A);
    a.force_encapsulation = true;
    let pair = established(Pair::with(85, EngineConfig::default(), a, connection(B)));
    assert!(pair.sides[A].only().nat_fake && pair.sides[B].only().nat_remote);
    for side in &pair.sides {
        assert!(side.installed.values().all(|pair| matches!(pair.encapsulation, Encapsulation::Udp { .. })));
    }
}

// RFC 7383: messages longer than the limit go in fragments, also on a bad network.
#[test]
fn long_messages_are_fragmented() {
    let of = |side: usize| {
        let mut connection = connection(side);
        let mut long = (*connection.children[0]).clone();
        let suites = "aes128gcm16,aes256gcm16,chacha20poly1305,aes128-sha256,aes256-sha256,aes256-sha512";
        long.esp_proposals = suites.split(',').flat_map(|one| parse_proposals(one, Protocol::ESP).unwrap()).collect();
        connection.children = vec![Arc::new(long)];
        connection
    };
    for seed in 0..50 {
        let config = EngineConfig { fragment_size: 260, ..EngineConfig::default() };
        let mut pair = Pair::with(seed, config, of(A), of(B));
        pair.loss = seed % 20;
        pair.duplication = 20;
        pair.delay.0 = Duration::from_millis(300);
        pair.initiate(A, 1);
        pair.run(seconds(300));
        assert!(pair.sides[A].done(1), "seed {seed}");
        pair.assert_same(1, 1);
        let protected = pair.sides[A].sent.iter().skip(1).filter(|sent| sent.bytes[18] == 35);
        assert!(protected.clone().count() > 1);
        assert!(protected.clone().all(|sent| sent.bytes.len() + 32 <= 260));
    }
}
