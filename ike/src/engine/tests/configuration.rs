//! Configuration payloads: virtual addresses, what comes with them, and what is refused.

use super::refusals::ask;
use super::*;
use crate::pool::PoolConfig;
use crate::sa::parts::Parts;
use crate::wire::{Attribute, CfgType, Configuration, NotifyType, Payload, TrustAnchor};

const DYNAMIC: ConfiguredSelector = ConfiguredSelector::Dynamic { protocol: 0, start_port: 0, end_port: u16::MAX };

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn pool(name: &str, start: &str, end: &str, attributes: Vec<Attribute>) -> PoolConfig {
    let range = AddressRange { start: ip(start), end: ip(end) };
    PoolConfig { name: name.to_owned(), base: range.start, range, attributes }
}

/// A road warrior that wants these addresses.
pub(super) fn client(vips: &[&str]) -> Connection {
    let mut connection = connection(A);
    let mut net = child("net", "0.0.0.0/0", "10.2.0.0/24");
    net.local_ts = vec![DYNAMIC];
    if vips.iter().any(|vip| vip.contains(':')) {
        net.remote_ts.push(network("fd02::/64"));
    }
    connection.children = vec![Arc::new(net)];
    connection.vips = vips.iter().map(|vip| ip(vip)).collect();
    connection
}

/// Its gateway.
pub(super) fn gateway(pools: &[&str]) -> Connection {
    let mut connection = connection(B);
    let mut net = child("net", "10.2.0.0/24", "0.0.0.0/0");
    net.local_ts.push(network("fd02::/64"));
    net.remote_ts = vec![DYNAMIC];
    connection.children = vec![Arc::new(net)];
    connection.pools = pools.iter().map(|name| (*name).to_owned()).collect();
    connection
}

fn dns() -> Attribute {
    Attribute::Ip4Dns(Some("10.2.0.53".parse().unwrap()))
}

fn pair(seed: u64, a: Connection, b: Connection) -> Pair {
    let mut pair = Pair::with(seed, EngineConfig::default(), a, b);
    let engine = &mut pair.sides[B].engine;
    engine.load_pool(pool("four", "10.3.0.1", "10.3.0.3", vec![dns()])).unwrap();
    engine.load_pool(pool("six", "fd03::1", "fd03::ffff", Vec::new())).unwrap();
    pair
}

pub(super) fn vips(pair: &Pair, side: usize) -> (Vec<String>, Vec<String>) {
    let assigned = pair.sides[side].only().assigned.unwrap_or_default();
    let shown = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect();
    (shown(&assigned.local), shown(&assigned.remote))
}

fn online(pair: &Pair) -> usize {
    pair.sides[B].engine.pools().iter().map(|pool| pool.online).sum()
}

fn connect(pair: &mut Pair) {
    pair.initiate(A, 1);
    pair.run(seconds(3));
}

// ---- refusals first

// RFC 7296 §3.15.4: the IKE SA is there, no Child SA is, and nothing is taken.
#[test]
fn an_exhausted_pool_gives_internal_address_failure_and_keeps_the_ike_sa() {
    let mut pair = pair(900, client(&["0.0.0.0"]), gateway(&["full", "missing"]));
    pair.sides[B].engine.load_pool(pool("full", "10.4.0.1", "10.4.0.1", Vec::new())).unwrap();
    // Somebody else has its one address.
    let holder = crate::pool::Holder { identity: id("c"), connection: "site".to_owned() };
    let wish = crate::pool::Wish {
        address: ip("0.0.0.0"),
        shares: crate::pool::Shares::Wanted,
        host: SocketAddr::new(ip("10.0.0.3"), 500),
    };
    pair.sides[B].engine.ctx.shared.pools.lock().acquire(&["full".to_owned()], &holder, IkeSaId(99), wish).unwrap();
    connect(&mut pair);
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received INTERNAL_ADDRESS_FAILURE notify error"));
    pair.assert_same(1, 0);
    assert_eq!((vips(&pair, A), vips(&pair, B)), Default::default());

    // §2.19: another try in CREATE_CHILD_SA, now that there is one.
    pair.sides[B].engine.ctx.shared.pools.lock().release(IkeSaId(99));
    pair.initiate(A, 2);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(2), "{:?}", pair.sides[A].failed(2));
    pair.assert_same(1, 1);
    assert_eq!(vips(&pair, A).0, ["10.4.0.1"]);
    assert_eq!(pair.sides[A].only().children[0].local_ts[0].to_string(), "10.4.0.1/32");
}

// RFC 7296 §2.19: who must ask and does not gets no Child SA.
#[test]
fn a_peer_that_must_ask_for_an_address_and_does_not_gets_failed_cp_required() {
    for local in [DYNAMIC, network("10.3.0.2/32"), network("0.0.0.0/0")] {
        let mut a = client(&[]);
        let mut net = (*a.children[0]).clone();
        net.local_ts = vec![local];
        a.children = vec![Arc::new(net)];
        let mut pair = pair(901, a, gateway(&["four"]));
        connect(&mut pair);
        assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received FAILED_CP_REQUIRED notify error"));
        pair.assert_same(1, 0);
        assert_eq!(online(&pair), 0);
        pair.initiate(A, 2);
        pair.run(seconds(3));
        assert_eq!(pair.sides[A].failed(2).as_deref(), Some("received FAILED_CP_REQUIRED notify error"));
        pair.assert_same(1, 0);
    }
}

// A gateway without pools, or without one of the family.
#[test]
fn a_family_that_no_pool_has_gives_internal_address_failure() {
    for (wanted, pools) in [("0.0.0.0", &[][..]), ("0.0.0.0", &["six"]), ("::", &["four"])] {
        let mut pair = pair(902, client(&[wanted]), gateway(pools));
        connect(&mut pair);
        assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received INTERNAL_ADDRESS_FAILURE notify error"));
        pair.assert_same(1, 0);
        assert_eq!(online(&pair), 0);
    }
}

// Nobody gets an address before it has proved who it is.
#[test]
fn a_wrong_proof_takes_no_lease() {
    let mut pair = pair(903, client(&["0.0.0.0"]), gateway(&["four"]));
    pair.sides[A].credentials = shared_key("wrong");
    connect(&mut pair);
    assert!(pair.sides[A].failed(1).is_some());
    pair.assert_same(0, 0);
    let status = pair.sides[B].engine.pools();
    assert!(status.iter().all(|pool| pool.online + pool.offline == 0));
    assert!(!pair.sides[B].events.iter().any(|event| matches!(event, Event::Assigned(..))));
}

// A client that wants an address takes no Child SA without one, whatever the answer says (RFC 7296 §3.15.4).
#[test]
fn what_a_reply_may_not_assign_is_ignored() {
    let mut pair = pair(904, client(&["0.0.0.0", "::"]), gateway(&["four", "six"]));
    connect(&mut pair);
    pair.assert_same(1, 1);
    let attributes = [
        Attribute::Ip4Address(None),
        Attribute::Ip4Address(Some([0, 0, 0, 0].into())),
        Attribute::Ip4Address(Some([127, 0, 0, 1].into())),
        Attribute::Ip4Address(Some([224, 0, 0, 9].into())),
        Attribute::Ip4Address(Some([255, 255, 255, 255].into())),
        Attribute::Ip6Address(Some((std::net::Ipv6Addr::LOCALHOST, 128))),
        Attribute::Ip6Address(Some(("ff02::1".parse().unwrap(), 128))),
        Attribute::Ip4Address(Some([10, 3, 0, 9].into())),
        // Only one was asked for.
        Attribute::Ip4Address(Some([10, 3, 0, 10].into())),
        Attribute::Ip4Dns(Some([0, 0, 0, 0].into())),
        Attribute::Ip4Subnet(Some(([10, 0, 0, 0].into(), [255, 0, 255, 0].into()))),
        Attribute::Ip4Subnet(Some(([10, 0, 0, 0].into(), [255, 0, 0, 0].into()))),
        Attribute::Unknown { kind: 99, value: vec![1] },
    ];
    let assigned = read(&mut pair, &attributes, &[network("10.2.0.0/24")]);
    assert_eq!((assigned.local, assigned.dns), (vec![ip("10.3.0.9")], Vec::new()));
    assert_eq!(assigned.subnets, [(ip("10.0.0.0"), 8)]);
    let many: Vec<_> = (0..200).map(|n| Attribute::Ip4Dns(Some([10, 0, 1, n].into()))).collect();
    assert_eq!(read(&mut pair, &many, &[]).dns.len(), 64);
}

/// What A reads out of a CFG_REPLY with these selectors for B's side.
fn read(pair: &mut Pair, attributes: &[Attribute], remote_ts: &[ConfiguredSelector]) -> Assigned {
    let reply = Configuration { kind: CfgType::REPLY, attributes: attributes.to_vec() };
    let selectors = remote_ts.iter().map(|selector| wire::WireSelector::Address(selector.resolve(ip("10.0.0.2"))));
    let parts = Parts { ts_responder: Some(selectors.collect()), ..Parts::default() };
    let Engine { sas, ctx, .. } = &mut pair.sides[A].engine;
    let IkeSa::Established(sa) = &sas.values().next().unwrap().sa else { panic!("an established IKE SA") };
    sa.read_reply(ctx, &reply, &parts)
}

// RFC 7296 §2.9, RFC 4301 §4.4.3.4: the peer speaks for its own address only, however wide its selectors are.
#[test]
fn an_sa_for_another_source_address_is_refused() {
    let mut wide = gateway(&["four"]);
    let mut net = (*wide.children[0]).clone();
    net.remote_ts = vec![network("0.0.0.0/0")];
    wide.children = vec![Arc::new(net)];
    for b in [gateway(&["four"]), wide] {
        let mut a = client(&["0.0.0.0"]);
        for (name, local) in [("other", "10.3.0.2/32"), ("all", "0.0.0.0/0"), ("pool", "10.3.0.0/24")] {
            a.children.push(Arc::new(child(name, local, "10.2.0.0/24")));
        }
        let mut pair = pair(905, a, b);
        connect(&mut pair);
        assert_eq!(vips(&pair, A).0, ["10.3.0.1"]);
        let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
        for (token, at) in [(2, 1), (3, 2), (4, 3)] {
            let wanted = Some(Arc::clone(&connection.children[at]));
            pair.initiate_child(A, Arc::clone(&connection), wanted, token);
            pair.run(seconds(3));
        }
        assert_eq!(pair.sides[A].failed(2).as_deref(), Some("received TS_UNACCEPTABLE notify error"));
        assert!(pair.sides[A].done(3) && pair.sides[A].done(4));
        for child in &pair.sides[B].only().children {
            assert_eq!(child.remote_ts, [TrafficSelector::host(ip("10.3.0.1"))]);
        }
    }
}

// ---- RFC 7296 §2.19

#[test]
fn a_client_gets_an_address_and_its_selectors() {
    let mut pair = established_with(910, &["0.0.0.0"], &["four"]);
    assert_eq!(vips(&pair, A), (vec!["10.3.0.1".to_owned()], Vec::new()));
    assert_eq!(vips(&pair, B), (Vec::new(), vec!["10.3.0.1".to_owned()]));
    for (side, local, remote) in [(A, "10.3.0.1/32", "10.2.0.0/24"), (B, "10.2.0.0/24", "10.3.0.1/32")] {
        let child = &pair.sides[side].only().children[0];
        assert_eq!((child.local_ts[0].to_string(), child.remote_ts[0].to_string()), (local.into(), remote.into()));
        // Whoever installs the Child SA knows the address already.
        let events = &pair.sides[side].events;
        let assigned = events.iter().position(|event| matches!(event, Event::Assigned(..))).unwrap();
        assert!(assigned < events.iter().position(|event| matches!(event, Event::ChildUp(..))).unwrap());
    }
    assert_eq!(pair.sides[A].only().assigned.unwrap().dns, [ip("10.2.0.53")]);
    let now = pair.now;
    let ike = pair.sides[A].only().id;
    pair.sides[A].engine.terminate(now, Target::Ike(ike), false, 2).unwrap();
    pair.run(seconds(2));
    pair.assert_same(0, 0);
    assert_eq!(online(&pair), 0);
    assert_eq!(pair.sides[B].engine.pools()[0].offline, 1);
    // The same peer, the same address.
    pair.initiate(A, 3);
    pair.run(seconds(3));
    assert_eq!(vips(&pair, A).0, ["10.3.0.1"]);
}

fn established_with(seed: u64, wanted: &[&str], pools: &[&str]) -> Pair {
    let mut pair = pair(seed, client(wanted), gateway(pools));
    connect(&mut pair);
    assert!(pair.sides[A].done(1), "{:?} {:#?}", pair.sides[A].failed(1), pair.sides[B].events);
    pair.assert_same(1, 1);
    pair
}

#[test]
fn both_families_come_from_two_pools() {
    let pair = established_with(911, &["0.0.0.0", "::"], &["four", "six"]);
    assert_eq!(vips(&pair, A).0, ["10.3.0.1", "fd03::1"]);
    let child = &pair.sides[B].only().children[0];
    assert_eq!(child.remote_ts.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.3.0.1/32", "fd03::1/128"]);
}

// §3.15.4: the family that there is no address for is left out.
#[test]
fn one_family_of_two_is_enough() {
    let pair = established_with(912, &["0.0.0.0", "::"], &["four"]);
    assert_eq!(vips(&pair, A).0, ["10.3.0.1"]);
    assert_eq!(pair.sides[A].only().children[0].local_ts.len(), 1);
}

#[test]
fn a_wanted_address_is_assigned() {
    let pair = established_with(913, &["10.3.0.3", "fd03::77"], &["four", "six"]);
    assert_eq!(vips(&pair, A).0, ["10.3.0.3", "fd03::77"]);
}

#[test]
fn the_address_survives_rekeys_of_the_ike_sa_and_the_child() {
    for side in [A, B] {
        let mut pair = established_with(914, &["0.0.0.0"], &["four"]);
        let now = pair.now;
        let ike = pair.sides[side].only().id;
        pair.sides[side].engine.rekey(now, Target::Ike(ike), 2).unwrap();
        pair.run(seconds(20));
        pair.assert_same(1, 1);
        assert_ne!(pair.sides[side].only().id, ike);
        assert_eq!((vips(&pair, A).0, vips(&pair, B).1), (vec!["10.3.0.1".to_owned()], vec!["10.3.0.1".to_owned()]));
        assert_eq!(online(&pair), 1);
        let child = pair.sides[side].only().children[0].id;
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Child(child), 3).unwrap();
        pair.run(seconds(20));
        pair.assert_same(1, 1);
        assert_eq!(pair.sides[B].only().children[0].remote_ts, [TrafficSelector::host(ip("10.3.0.1"))]);
        let ike = pair.sides[B].only().id;
        let now = pair.now;
        pair.sides[B].engine.terminate(now, Target::Ike(ike), false, 4).unwrap();
        pair.run(seconds(2));
        assert_eq!(online(&pair), 0);
    }
}

// §2.8.3: the same address again, even if it is not the first free one.
#[test]
fn reauthentication_asks_for_the_address_again() {
    let mut a = client(&["0.0.0.0"]);
    a.reauth_time = seconds(100);
    let mut pair = pair(915, a, gateway(&["four"]));
    connect(&mut pair);
    let before = vips(&pair, A).0;
    let ike = pair.sides[A].only().id;
    pair.run(seconds(130));
    pair.assert_same(1, 1);
    assert_ne!(pair.sides[A].only().id, ike);
    assert_eq!(vips(&pair, A).0, before);
    assert_eq!(online(&pair), 1);
}

// A client that restarts: what its old IKE SA has becomes the new one's.
#[test]
fn a_new_ike_sa_that_replaces_the_old_gets_its_address() {
    for unique in [Unique::No, Unique::Replace] {
        let mut b = gateway(&["four"]);
        b.unique = unique;
        let mut pair = pair(916, client(&["0.0.0.0"]), b);
        connect(&mut pair);
        // Without a farewell.
        let id = pair.sides[A].only().id;
        pair.cut = true;
        let now = pair.now;
        pair.sides[A].engine.terminate(now, Target::Ike(id), true, 2).unwrap();
        pair.sides[A].engine.ctx.shared.former_addresses.lock().clear();
        pair.run(seconds(1));
        pair.cut = false;
        pair.sides[A].installed.clear();
        pair.initiate(A, 3);
        pair.run(seconds(5));
        pair.assert_same(1, 1);
        assert_eq!((vips(&pair, A).0, online(&pair)), (vec!["10.3.0.1".to_owned()], 1));
        assert_eq!(pair.sides[B].engine.pools()[0].offline, 0);
    }
}

#[test]
fn addresses_are_assigned_over_a_bad_network() {
    for seed in 920..940 {
        let mut pair = pair(seed, client(&["0.0.0.0", "::"]), gateway(&["four", "six"]));
        (pair.loss, pair.duplication) = (30, 30);
        pair.initiate(A, 1);
        pair.run(seconds(200));
        (pair.loss, pair.duplication) = (0, 0);
        if pair.sides[A].done(1) {
            assert_eq!(online(&pair), 2, "seed {seed}");
            assert_eq!(vips(&pair, A).0, vips(&pair, B).1);
        } else {
            pair.run(seconds(200));
            assert_eq!(online(&pair), 2 * pair.sides[B].up().len(), "seed {seed}");
        }
    }
}

// ---- RFC 7296 §2.20, §3.15: INFORMATIONAL

fn configuration(kind: CfgType, attributes: Vec<Attribute>) -> Vec<Payload> {
    vec![Payload::Configuration(Configuration { kind, attributes })]
}

#[test]
fn an_unsolicited_cfg_set_is_acknowledged_with_nothing() {
    let mut pair = established_with(930, &["0.0.0.0"], &["four"]);
    let before = pair.sides[B].only().assigned;
    let set = vec![dns(), Attribute::Ip4Address(Some([10, 3, 0, 2].into())), Attribute::ApplicationVersion(vec![b'x'])];
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &configuration(CfgType::SET, set));
    assert_eq!(answer.configuration, Some(Configuration { kind: CfgType::ACK, attributes: Vec::new() }));
    assert_eq!(pair.sides[B].only().assigned, before);
    for kind in [CfgType::REPLY, CfgType::ACK, CfgType(9)] {
        let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &configuration(kind, vec![dns()]));
        assert!(answer.configuration.is_none() && answer.notifies.is_empty());
    }
    assert_eq!(pair.sides[B].only().assigned, before);
}

#[test]
fn the_version_is_told_only_where_configured() {
    let request = || configuration(CfgType::REQUEST, vec![Attribute::ApplicationVersion(Vec::new())]);
    let mut pair = up(931);
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &request());
    let version = |text: &str| Configuration {
        kind: CfgType::REPLY,
        attributes: vec![Attribute::ApplicationVersion(text.into())],
    };
    assert_eq!(answer.configuration, Some(version("")));
    pair.sides[B].engine.ctx.config.application_version = Some("foobar v1.3beta".to_owned());
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &request());
    assert_eq!(answer.configuration, Some(version("foobar v1.3beta")));
}

#[test]
fn supported_attributes_are_listed_once() {
    let mut pair = up(932);
    let request = vec![Attribute::SupportedAttributes(Vec::new()); 3];
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &configuration(CfgType::REQUEST, request));
    let attributes = answer.configuration.unwrap().attributes;
    assert_eq!(attributes, [Attribute::SupportedAttributes(wire::SUPPORTED.to_vec())]);
}

// §3.15.4: in an exchange of its own; asking again and again takes no more than the first time.
#[test]
fn an_address_can_be_asked_for_in_informational_and_no_peer_drains_a_pool() {
    let mut pair = pair(933, connection(A), {
        let mut b = connection(B);
        b.pools = vec!["four".to_owned(), "six".to_owned()];
        b
    });
    pair.initiate(A, 1);
    pair.run(seconds(3));
    pair.assert_same(1, 0);
    for _ in 0..3 {
        let request = vec![Attribute::Ip4Address(None)];
        let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &configuration(CfgType::REQUEST, request));
        let expected = vec![Attribute::Ip4Address(Some([10, 3, 0, 1].into())), dns()];
        assert_eq!(answer.configuration.unwrap().attributes, expected);
        assert_eq!(online(&pair), 1);
    }
    let request = vec![Attribute::Ip6Address(None); 100];
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &configuration(CfgType::REQUEST, request));
    let given = answer.configuration.unwrap().attributes;
    assert_eq!(given.iter().filter(|one| matches!(one, Attribute::Ip6Address(_))).count(), 4);
    assert_eq!(online(&pair), 5);
}

#[test]
fn a_request_to_a_client_gets_no_address() {
    let mut pair = up(934);
    let request = vec![Attribute::Ip4Address(None)];
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &configuration(CfgType::REQUEST, request));
    assert!(answer.has(NotifyType::INTERNAL_ADDRESS_FAILURE) && answer.configuration.is_none());
    pair.assert_same(1, 1);
}

#[test]
fn two_configuration_payloads_are_a_syntax_error() {
    let mut pair = up(935);
    let mut payloads = configuration(CfgType::REQUEST, Vec::new());
    payloads.extend(configuration(CfgType::SET, Vec::new()));
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &payloads);
    assert!(answer.has(NotifyType::INVALID_SYNTAX));
}

// ---- RFC 8598

fn anchor(tag: u16) -> Attribute {
    Attribute::DnssecTa(Some(TrustAnchor { key_tag: tag, algorithm: 8, digest_type: 2, digest: vec![7; 32] }))
}

fn domain(name: &str) -> Attribute {
    Attribute::DnsDomain(name.as_bytes().to_vec())
}

fn split(any: bool, domains: &[&str], anchors: &[&str]) -> SplitDns {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    SplitDns { any, domains: names(domains), anchors: names(anchors) }
}

fn shown(assigned: &Assigned) -> Vec<(String, Vec<u16>)> {
    let tags = |domain: &Domain| domain.anchors.iter().map(|anchor| anchor.key_tag).collect();
    assigned.domains.iter().map(|domain| (domain.name.clone(), tags(domain))).collect()
}

// RFC 8598 §3.1, §3.2, §4.2, §5, §6.
#[test]
fn domains_and_anchors_come_through_where_policy_accepts_them() {
    let mut a = client(&["0.0.0.0"]);
    a.split_dns = split(false, &["example.com", "test"], &["example.com", "test"]);
    let mut pair = pair(940, a, gateway(&["dns"]));
    let attributes = vec![
        dns(),
        domain("example.com"),
        anchor(1),
        anchor(2),
        domain("Eng.Example.COM."),
        anchor(3),
        domain("badexample.com"),
        anchor(4),
        domain("city.other.test"),
        // A top-level domain on the list trusts nothing (§6).
        anchor(5),
    ];
    pair.sides[B].engine.load_pool(pool("dns", "10.5.0.1", "10.5.0.9", attributes)).unwrap();
    connect(&mut pair);
    pair.assert_same(1, 1);
    let assigned = pair.sides[A].only().assigned.unwrap();
    let expected = [("example.com", vec![1, 2]), ("eng.example.com", vec![3]), ("city.other.test", vec![])];
    assert_eq!(shown(&assigned), expected.map(|(name, tags)| (name.to_owned(), tags)));
    assert_eq!(assigned.dns, [ip("10.2.0.53")]);
}

// §3.1: who does not ask for domains gets none; §3.2: none without a name server; §6: no anchors without a list.
#[test]
fn domains_are_not_sent_unasked_nor_without_a_name_server() {
    let with_dns = vec![dns(), domain("example.com"), anchor(1)];
    let without = vec![domain("example.com"), anchor(1)];
    for (policy, attributes, expected) in [
        (split(false, &[], &["example.com"]), with_dns.clone(), vec![]),
        (split(true, &[], &[]), without, vec![]),
        (split(true, &[], &[]), with_dns.clone(), vec![("example.com".to_owned(), vec![])]),
        (split(true, &[], &["other.test"]), with_dns, vec![("example.com".to_owned(), vec![])]),
    ] {
        let mut a = client(&["0.0.0.0"]);
        a.split_dns = policy;
        let mut pair = pair(941, a, gateway(&["dns"]));
        pair.sides[B].engine.load_pool(pool("dns", "10.5.0.1", "10.5.0.9", attributes)).unwrap();
        connect(&mut pair);
        pair.assert_same(1, 1);
        assert_eq!(shown(&pair.sides[A].only().assigned.unwrap()), expected);
    }
}

// §2, §8: not where all traffic goes to the peer. §4.2: an anchor of no domain is nobody's.
#[test]
fn domains_need_a_split_tunnel_and_anchors_a_domain_before_them() {
    let mut a = client(&["0.0.0.0"]);
    a.split_dns = split(true, &[], &["example.com"]);
    let mut pair = pair(942, a, gateway(&["four"]));
    connect(&mut pair);
    let all = [dns(), domain("example.com"), anchor(1)];
    assert!(read(&mut pair, &all, &[network("0.0.0.0/0")]).domains.is_empty());
    assert!(read(&mut pair, &all, &[network("10.0.0.0/8"), network("::/0")]).domains.is_empty());
    assert_eq!(read(&mut pair, &all, &[network("10.0.0.0/8")]).domains.len(), 1);
    let strays = [anchor(1), domain("example.com"), dns(), anchor(2), domain("no.such..name"), anchor(3)];
    assert_eq!(shown(&read(&mut pair, &strays, &[network("10.0.0.0/8")])), [("example.com".to_owned(), vec![])]);
    let many: Vec<_> = (0..200).map(|n| domain(&format!("d{n}.test"))).chain([dns()]).collect();
    assert_eq!(read(&mut pair, &many, &[network("10.0.0.0/8")]).domains.len(), 64);
}

// §8: what comes from the network may end in a script or a resolver's configuration.
#[test]
fn names_that_are_no_domain_names_are_refused() {
    let long = "a".repeat(64);
    let longer = ["a".repeat(60).as_str(); 5].join(".");
    for name in [
        "",
        ".",
        "..",
        "a..b",
        ".a",
        "a b",
        "a;b",
        "$(reboot)",
        "a\nb",
        "a\0",
        "-a",
        "a-",
        "*.a",
        "ä.test",
        "a/b",
        &long,
        &longer,
    ] {
        assert_eq!(crate::config::domain_name(name.as_bytes()), None, "{name}");
    }
    assert_eq!(crate::config::domain_name(&[0xff, 0xfe]), None);
    assert_eq!(crate::config::domain_name(b"_tcp.Xn--A.TEST.").as_deref(), Some("_tcp.xn--a.test"));
}
