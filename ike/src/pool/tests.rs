use super::*;

fn pools(text: &str) -> Pools {
    let (start, end) = text.split_once('-').unwrap();
    let range = AddressRange { start: start.parse().unwrap(), end: end.parse().unwrap() };
    let mut pools = Pools::default();
    let config = PoolConfig { name: "p".to_owned(), base: range.start, range, attributes: Vec::new() };
    pools.load(config).unwrap();
    pools
}

fn holder(name: &str) -> Holder {
    Holder { identity: Identity::Fqdn(name.to_owned()), connection: "rw".to_owned() }
}

fn ask(pools: &mut Pools, name: &str, user: u64, wanted: &str, shares: Shares) -> Option<String> {
    // Each IKE SA leads to a host of its own.
    ask_from(pools, name, user, wanted, shares, &format!("192.0.2.{}:{}", user >> 16, user & 0xffff))
}

const HOST: &str = "192.0.2.1:4500";

fn ask_from(pools: &mut Pools, name: &str, user: u64, wanted: &str, shares: Shares, host: &str) -> Option<String> {
    let wish = Wish { address: wanted.parse().unwrap(), shares, host: host.parse().unwrap() };
    let address = pools.acquire(&["p".to_owned()], &holder(name), IkeSaId(user), wish);
    address.map(|address| address.to_string())
}

fn any(pools: &mut Pools, name: &str, user: u64) -> Option<String> {
    ask(pools, name, user, "0.0.0.0", Shares::Wanted)
}

fn counts(pools: &Pools) -> (usize, usize) {
    let status = pools.status();
    (status[0].online, status[0].offline)
}

#[test]
fn an_online_lease_is_never_given_twice() {
    let mut pools = pools("10.3.0.1-10.3.0.3");
    let mut given = BTreeSet::new();
    for user in 1..=3 {
        assert!(given.insert(any(&mut pools, "same", user).unwrap()));
    }
    for wanted in ["0.0.0.0", "10.3.0.1", "10.3.0.2"] {
        assert_eq!(ask(&mut pools, "same", 4, wanted, Shares::Wanted), None);
        assert_eq!(ask(&mut pools, "other", 4, wanted, Shares::Any), None, "nor to somebody else");
        assert_eq!(ask(&mut pools, "other", 4, wanted, Shares::Wanted), None);
    }
    // The same identity, admitted by another connection, is somebody else.
    let mut weak = holder("same");
    weak.connection = "weak".to_owned();
    let wish = Wish { address: "10.3.0.1".parse().unwrap(), shares: Shares::Any, host: HOST.parse().unwrap() };
    assert_eq!(pools.acquire(&["p".to_owned()], &weak, IkeSaId(5), wish), None);
    assert_eq!(counts(&pools), (3, 0));
}

#[test]
fn the_other_family_is_not_served() {
    assert_eq!(ask(&mut pools("10.3.0.1-10.3.0.3"), "a", 1, "::", Shares::Wanted), None);
    assert_eq!(ask(&mut pools("fd00::1-fd00::3"), "a", 1, "10.3.0.1", Shares::Wanted), None);
}

#[test]
fn a_peer_gets_its_old_address_back() {
    let mut pools = pools("10.3.0.1-10.3.0.4");
    let first = any(&mut pools, "a", 1);
    let other = any(&mut pools, "b", 2);
    pools.release(IkeSaId(1));
    assert_eq!(counts(&pools), (1, 1));
    assert_ne!(any(&mut pools, "c", 3), first, "an offline lease is kept for its holder");
    assert_eq!(any(&mut pools, "a", 4), first);
    pools.release(IkeSaId(2));
    assert_eq!(any(&mut pools, "b", 5), other);
    assert_eq!(counts(&pools), (3, 0));
}

#[test]
fn an_exhausted_pool_gives_the_oldest_offline_lease_away() {
    let mut pools = pools("10.3.0.1-10.3.0.3");
    let addresses: Vec<_> = (1..=3).map(|n| any(&mut pools, &format!("peer{n}"), n)).collect();
    for user in [2, 1, 3] {
        pools.release(IkeSaId(user));
    }
    assert_eq!(any(&mut pools, "new", 4), addresses[1]);
    assert_eq!(any(&mut pools, "newer", 5), addresses[0]);
    assert_eq!(any(&mut pools, "peer2", 6), addresses[2], "its own is gone");
    assert_eq!(any(&mut pools, "peer1", 7), None);
    assert_eq!(counts(&pools), (3, 0));
}

#[test]
fn a_wanted_address_is_given_where_it_is_free() {
    let mut pools = pools("10.3.0.1-10.3.0.9");
    assert_eq!(ask(&mut pools, "a", 1, "10.3.0.7", Shares::Wanted).as_deref(), Some("10.3.0.7"));
    for taken in ["10.3.0.7", "10.3.1.1", "192.0.2.1"] {
        let given = ask(&mut pools, "b", 2, taken, Shares::Wanted).unwrap();
        assert_ne!(given, taken);
    }
    pools.release(IkeSaId(1));
    // Kept for `a`, though `c` names it.
    assert_ne!(ask(&mut pools, "c", 3, "10.3.0.7", Shares::Wanted).as_deref(), Some("10.3.0.7"));
    assert_eq!(ask(&mut pools, "a", 4, "10.3.0.8", Shares::Wanted).as_deref(), Some("10.3.0.8"));
}

// Reauthentication and `unique = replace`: the successor has the address while the old IKE SA still has it.
#[test]
fn a_successor_shares_the_address_until_the_old_one_goes() {
    let mut pools = pools("10.3.0.1-10.3.0.2");
    let first = ask_from(&mut pools, "a", 1, "0.0.0.0", Shares::Wanted, HOST).unwrap();
    // Another host with the same identity is no successor.
    let elsewhere = "192.0.2.1:4501";
    let other = ask_from(&mut pools, "a", 7, &first, Shares::Wanted, elsewhere);
    assert!(other.is_some() && other.as_ref() != Some(&first), "{other:?}");
    pools.release(IkeSaId(7));
    pools.moved(IkeSaId(1), elsewhere.parse().unwrap());
    assert_eq!(ask_from(&mut pools, "a", 7, &first, Shares::Wanted, elsewhere), Some(first.clone()));
    pools.release(IkeSaId(7));
    pools.moved(IkeSaId(1), HOST.parse().unwrap());
    assert_eq!(ask_from(&mut pools, "a", 2, &first, Shares::Wanted, HOST), Some(first.clone()));
    pools.release(IkeSaId(1));
    assert_eq!(counts(&pools), (1, 1), "the successor still has it; the other host had one too");
    assert_eq!(ask(&mut pools, "a", 3, "0.0.0.0", Shares::Any), Some(first.clone()));
    assert_ne!(ask(&mut pools, "a", 4, "0.0.0.0", Shares::Wanted), Some(first));
    for user in [2, 3, 4, 4, 9] {
        pools.release(IkeSaId(user));
    }
    assert_eq!(counts(&pools), (0, 2));
}

// RFC 9329 §2: each stream has a port of its own, so of a host that is over TCP, or was, the address alone is compared.
#[test]
fn a_successor_over_another_transport_shares_the_address() {
    let mut pools = pools("10.3.0.1-10.3.0.2");
    let first = ask_from(&mut pools, "a", 1, "0.0.0.0", Shares::Wanted, "192.0.2.1:0").unwrap();
    assert_ne!(ask_from(&mut pools, "b", 2, &first, Shares::Wanted, HOST), Some(first.clone()));
    pools.release(IkeSaId(2));
    assert_ne!(ask_from(&mut pools, "a", 3, &first, Shares::Wanted, "192.0.2.9:4500"), Some(first.clone()));
    pools.release(IkeSaId(3));
    assert_eq!(ask_from(&mut pools, "a", 4, &first, Shares::Wanted, HOST), Some(first.clone()));
    pools.release(IkeSaId(1));
    assert_eq!(ask_from(&mut pools, "a", 5, &first, Shares::Wanted, "192.0.2.1:0"), Some(first));
}

#[test]
fn one_ike_sa_gets_different_addresses() {
    let mut pools = pools("10.3.0.1-10.3.0.2");
    let one = ask(&mut pools, "a", 1, "0.0.0.0", Shares::Any);
    let two = ask(&mut pools, "a", 1, "0.0.0.0", Shares::Any);
    assert!(one.is_some() && two.is_some() && one != two);
    assert_eq!(ask(&mut pools, "a", 1, "0.0.0.0", Shares::Any), None);
}

#[test]
fn a_rekeyed_ike_sa_hands_its_lease_on() {
    let mut pools = pools("10.3.0.1-10.3.0.1");
    any(&mut pools, "a", 1).unwrap();
    pools.inherit(IkeSaId(1), IkeSaId(2));
    pools.release(IkeSaId(1));
    assert_eq!((counts(&pools), any(&mut pools, "b", 3)), ((1, 0), None));
    pools.release(IkeSaId(2));
    assert_eq!(counts(&pools), (0, 1));
}

// RFC 7296 §3.15.3
#[test]
fn a_wanted_interface_identifier_is_kept() {
    let mut pools = pools("fd00:1::1-fd00:1::ffff:ffff:ffff:ffff");
    let given = ask(&mut pools, "a", 1, "2001:db8::1:2:3:4", Shares::Wanted);
    assert_eq!(given.as_deref(), Some("fd00:1::1:2:3:4"));
    assert_eq!(ask(&mut pools, "b", 2, "2001:db8::1:2:3:4", Shares::Wanted).as_deref(), Some("fd00:1::1"));
    assert_eq!(ask(&mut pools, "c", 3, "fd00:1::7", Shares::Wanted).as_deref(), Some("fd00:1::7"));
}

#[test]
fn a_large_pool_costs_what_is_used() {
    let mut pools = pools("::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
    assert_eq!(pools.status()[0].size, u64::MAX);
    for user in 0..1000 {
        ask(&mut pools, &format!("peer{user}"), user, "::", Shares::Wanted).unwrap();
    }
    assert_eq!(pools.pools["p"].leases.len(), 1000);
    let last = ask(&mut pools, "z", 2000, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Shares::Wanted);
    assert_eq!(last.as_deref(), Some("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"));
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut pools = pools("fd00::-fd00::ffff:ffff");
    let many = u64::try_from(MAX_OFFLINE).unwrap() + 10;
    for user in 0..many {
        ask(&mut pools, &format!("peer{user}"), user, "::", Shares::Wanted).unwrap();
        pools.release(IkeSaId(user));
    }
    let pool = &pools.pools["p"];
    assert_eq!((pool.leases.len(), pool.of_holder.len(), pool.offline.len()), (MAX_OFFLINE, MAX_OFFLINE, MAX_OFFLINE));
    assert!(pools.holdings.is_empty());
}

#[test]
fn several_pools_are_asked_in_order() {
    let mut pools = pools("10.3.0.1-10.3.0.1");
    let range = AddressRange { start: "fd00::1".parse().unwrap(), end: "fd00::1".parse().unwrap() };
    pools.load(PoolConfig { name: "six".to_owned(), base: range.start, range, attributes: Vec::new() }).unwrap();
    let names = ["missing".to_owned(), "p".to_owned(), "six".to_owned()];
    let mut ask = |address: &str, user| {
        let wish = Wish { address: address.parse().unwrap(), shares: Shares::Wanted, host: HOST.parse().unwrap() };
        pools.acquire(&names, &holder("a"), IkeSaId(user), wish).map(|address| address.to_string())
    };
    assert_eq!((ask("::", 1).as_deref(), ask("0.0.0.0", 1).as_deref()), (Some("fd00::1"), Some("10.3.0.1")));
    assert_eq!(ask("0.0.0.0", 2), None);
}

#[test]
fn a_pool_in_use_is_neither_replaced_nor_unloaded() {
    let mut pools = pools("10.3.0.1-10.3.0.3");
    any(&mut pools, "a", 1).unwrap();
    let range = |end: &str| AddressRange { start: "10.3.0.1".parse().unwrap(), end: end.parse().unwrap() };
    let config = |end| {
        let attributes = vec![Attribute::Ip4Dns(Some("10.3.0.53".parse().unwrap()))];
        PoolConfig { name: "p".to_owned(), base: range(end).start, range: range(end), attributes }
    };
    assert_eq!(pools.load(config("10.3.0.9")), Err(PoolError::Replace("p".to_owned())));
    assert_eq!(pools.unload("p"), Err(PoolError::Unload("p".to_owned())));
    assert_eq!(pools.unload("q"), Err(PoolError::Unknown));
    pools.load(config("10.3.0.3")).unwrap();
    assert_eq!((counts(&pools), pools.config("p").unwrap().attributes.len()), ((1, 0), 1), "the leases are kept");
    pools.release(IkeSaId(1));
    pools.load(config("10.3.0.9")).unwrap();
    assert_eq!(counts(&pools), (0, 0));
    pools.unload("p").unwrap();
    assert!(pools.status().is_empty());
}

// Whatever happens: no address is online for two holders, and the books agree.
#[test]
fn the_books_agree_after_anything() {
    for seed in 0..50_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut pools = pools("10.3.0.1-10.3.0.5");
        for step in 0..300_u64 {
            let user = random(12);
            match random(4) {
                0 => pools.release(IkeSaId(user)),
                1 => pools.inherit(IkeSaId(user), IkeSaId(100 + step)),
                _ => {
                    let shares = if random(3) == 0 { Shares::Any } else { Shares::Wanted };
                    let host = format!("192.0.2.{}:4500", random(2));
                    let wanted = format!("10.3.0.{}", random(7));
                    // An IKE SA has one peer.
                    ask_from(&mut pools, &format!("peer{}", user % 4), user, &wanted, shares, &host);
                }
            }
            if random(5) == 0 {
                pools.release(IkeSaId(100 + random(step + 1)));
            }
            let pool = &pools.pools["p"];
            assert!(pool.leases.len() <= 5);
            let held: BTreeSet<(IkeSaId, u128)> = pools
                .holdings
                .iter()
                .flat_map(|(user, held)| held.iter().map(|(_, offset)| (*user, *offset)))
                .collect();
            let used: BTreeSet<(IkeSaId, u128)> = pool
                .leases
                .iter()
                .flat_map(|(offset, lease)| lease.users.keys().map(|user| (*user, *offset)))
                .collect();
            assert_eq!(held, used);
            let offline = pool.leases.values().filter(|lease| lease.users.is_empty()).count();
            assert_eq!(offline, pool.offline.len());
            for (holder, owned) in &pool.of_holder {
                let all = || owned.online.iter().chain(&owned.offline);
                assert!(all().all(|offset| pool.leases[offset].holder == *holder));
                assert!(owned.online.iter().all(|offset| !pool.leases[offset].users.is_empty()));
                assert!(owned.offline.iter().all(|offset| pool.leases[offset].users.is_empty()));
            }
            let owned: usize = pool.of_holder.values().map(|owned| owned.online.len() + owned.offline.len()).sum();
            assert_eq!(owned, pool.leases.len());
        }
    }
}

// What peers asked for is passed once, and not by each search from then on.
#[test]
fn the_search_for_an_address_goes_on_where_it_ended() {
    let mut pools = pools("10.3.0.1-10.3.0.100");
    assert_eq!(ask(&mut pools, "wants", 1, "10.3.0.3", Shares::Wanted).as_deref(), Some("10.3.0.3"));
    for user in 2..=10 {
        any(&mut pools, &format!("peer{user}"), user).unwrap();
    }
    assert_eq!(pools.pools["p"].next, 10);
}
