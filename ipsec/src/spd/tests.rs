use std::cmp::Reverse;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::guard::ClassId;
use crate::plane::{Encapsulation, EspKeys, EspSuite, Lifetime, Mode, SaPair, TfcPadding};
use crate::sad::Sa;
use crate::secret::Secret;
use crate::transform::{Encr, Integ};

/// The rule as it was before there were tables: all policies in order, the first that fits.
fn first_that_fits<'a>(entries: &'a [Arc<Entry>], flow: &Flow, shows_ports: bool) -> Option<&'a Arc<Entry>> {
    let mut sorted: Vec<_> = entries
        .iter()
        .flat_map(|entry| {
            let local = entry.sa.local_ts.iter().map(TrafficSelector::width).max();
            let ranked =
                move |remote: &TrafficSelector| ((remote.width(), local, Reverse(entry.order)), *remote, entry);
            entry.sa.remote_ts.iter().map(ranked)
        })
        .collect();
    sorted.sort_by_key(|(rank, ..)| *rank);
    let found = sorted.into_iter().find(|(_, remote, entry)| {
        remote.selects(flow.protocol, flow.remote, flow.remote_port, shows_ports)
            && entry.sa.sends()
            && entry.sa.selects(flow, shows_ports)
    });
    found.map(|(.., entry)| entry)
}

fn entry(order: u64, ts: (Vec<TrafficSelector>, Vec<TrafficSelector>), reqid: u32) -> Arc<Entry> {
    let keys = || EspKeys { encr: Secret::new(vec![1; 20]), integ: Secret::new(Vec::new()) };
    let (sa_spi, remote) = (u32::try_from(order).unwrap() + 1000, IpAddr::from([192, 0, 2, 7]));
    let pair = SaPair {
        spi_in: sa_spi,
        spi_out: sa_spi,
        reqid,
        class: ClassId(1),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: false },
        keys_in: keys(),
        keys_out: keys(),
        encapsulation: Encapsulation::None { local: remote, remote },
        local_ts: ts.0,
        remote_ts: ts.1,
        replay_window: 32,
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        tfc: TfcPadding::None,
        options: crate::plane::KernelOptions::default(),
    };
    let (encapsulation, sa) = Sa::new(pair).unwrap();
    Arc::new(Entry { order, encapsulation, sa: Arc::new(sa) })
}

fn pair_of(selected: Option<Selected<'_>>) -> Option<u64> {
    match selected {
        Some(Selected::Pair(entry)) => Some(entry.order),
        Some(Selected::Trap(_)) | None => None,
    }
}

#[derive(Clone, Debug)]
enum Change {
    Install(Vec<TrafficSelector>, Vec<TrafficSelector>),
    Remove(prop::sample::Index),
    Replace(prop::sample::Index),
    Silence(prop::sample::Index, bool),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    // RFC 4301 §4.4.1: tables find what the ordered list finds, whatever came and went before.
    #[test]
    fn tables_find_what_the_ordered_list_finds(changes in changes(), flows in prop::collection::vec(flow(), 12)) {
        let mut tables = Tables::default();
        let mut list: Vec<Arc<Entry>> = Vec::new();
        for (order, change) in (1..).zip(changes) {
            match change {
                Change::Install(local, remote) => {
                    let new = entry(order, (local, remote), 1 + u32::try_from(order % 3).unwrap());
                    tables.insert(&new);
                    list.push(new);
                }
                Change::Remove(at) if !list.is_empty() => tables.remove(&list.remove(at.index(list.len()))),
                Change::Replace(at) if !list.is_empty() => {
                    let at = at.index(list.len());
                    tables.remove(&list[at]);
                    list[at] = Arc::new(Entry::clone(&list[at]));
                    tables.insert(&list[at]);
                }
                Change::Silence(at, silent) if !list.is_empty() => {
                    list[at.index(list.len())].sa.retired.store(silent, Ordering::Relaxed);
                }
                Change::Remove(_) | Change::Replace(_) | Change::Silence(..) => {}
            }
            for (flow, shows_ports) in &flows {
                let expected = first_that_fits(&list, flow, *shows_ports).map(|entry| entry.order);
                prop_assert_eq!(pair_of(tables.select(flow, *shows_ports)), expected, "{} {}", flow, shows_ports);
            }
            for reqid in 1..4 {
                let expected: Vec<u64> = list.iter().filter(|e| e.sa.reqid == reqid).map(|e| e.order).collect();
                let mut found: Vec<u64> = tables.of_reqid(reqid).map(|entry| entry.order).collect();
                found.sort_unstable();
                prop_assert_eq!(found, expected);
            }
            prop_assert_eq!(tables.sends_to(IpAddr::from([192, 0, 2, 7])), !list.is_empty());
        }
        for gone in list {
            tables.remove(&gone);
        }
        prop_assert!(tables.by_spi.is_empty() && tables.policies.is_empty(), "nothing is left behind");
    }
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let index = any::<prop::sample::Index>;
    let install = (selectors(), selectors()).prop_map(|(local, remote)| Change::Install(local, remote));
    let change = prop_oneof![
        4 => install,
        2 => index().prop_map(Change::Remove),
        1 => index().prop_map(Change::Replace),
        1 => (index(), any::<bool>()).prop_map(|(at, silent)| Change::Silence(at, silent)),
    ];
    prop::collection::vec(change, 1..24)
}

fn selectors() -> impl Strategy<Value = Vec<TrafficSelector>> {
    prop::collection::vec(selector(), 1..4)
}

/// Nested networks, odd ranges, ports and protocols in a small space; some are upside down or mix families.
fn selector() -> impl Strategy<Value = TrafficSelector> {
    let ports = prop_oneof![
        4 => Just((0, u16::MAX)),
        2 => (0u16..4, 0u16..4),
        1 => Just((u16::MAX, 0)),
    ];
    (address(), address(), 0u8..=128, 0u8..6, prop::sample::select(vec![0u8, 6, 17]), ports).prop_map(
        |(start, end, prefix, kind, protocol, (start_port, end_port))| {
            let base = match kind {
                0 | 1 => TrafficSelector::host(start),
                2 | 3 => TrafficSelector::network(start, if start.is_ipv4() { prefix % 33 } else { prefix }).unwrap(),
                4 => TrafficSelector { end: start.max(end), start: start.min(end), ..TrafficSelector::host(start) },
                _ => TrafficSelector { end, ..TrafficSelector::host(start) },
            };
            TrafficSelector { protocol, start_port, end_port, ..base }
        },
    )
}

fn flow() -> impl Strategy<Value = (Flow, bool)> {
    (prop::sample::select(vec![6u8, 17]), address(), 0u16..4, address(), 0u16..4, any::<bool>()).prop_map(
        |(protocol, local, local_port, remote, remote_port, shows_ports)| {
            (Flow { protocol, local, local_port, remote, remote_port }, shows_ports)
        },
    )
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        3 => (0u32..16).prop_map(|n| IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n))),
        1 => (0u128..8).prop_map(|n| IpAddr::V6(Ipv6Addr::from_bits((0xfd << 120) + n))),
    ]
}

// ---- traps

fn net(text: &str) -> TrafficSelector {
    let (address, prefix) = text.split_once('/').unwrap();
    TrafficSelector::network(address.parse().unwrap(), prefix.parse().unwrap()).unwrap()
}

fn trap(reqid: u32, remote_ts: Vec<TrafficSelector>) -> Arc<TrapState> {
    Arc::new(TrapState::new(
        Trap { reqid, local_ts: vec![net("10.1.0.0/16")], remote_ts, options: Default::default() },
        u64::from(reqid),
    ))
}

fn what_takes(tables: &Tables, remote: &str) -> String {
    let flow = Flow {
        protocol: 6,
        local: "10.1.0.5".parse().unwrap(),
        local_port: 9,
        remote: remote.parse().unwrap(),
        remote_port: 80,
    };
    match tables.select(&flow, true) {
        Some(Selected::Pair(entry)) => format!("SA {}", entry.order),
        Some(Selected::Trap(state)) => format!("trap {}", state.trap.reqid),
        None => "nothing".to_owned(),
    }
}

// RFC 4301 §4.4.1: the policy that is for a packet is for it with or without an SA.
#[test]
fn a_narrower_trap_goes_before_a_wide_sa_and_behind_its_own() {
    let mut tables = Tables::default();
    assert!(tables.insert_trap(&trap(7, vec![net("10.2.0.0/24")])));
    assert!(!tables.insert_trap(&trap(7, vec![net("10.3.0.0/24")])), "the number is taken");
    let wide = entry(1, (vec![net("10.1.0.0/16")], vec![net("10.0.0.0/8")]), 1);
    tables.insert(&wide);
    assert_eq!(what_takes(&tables, "10.2.0.9"), "trap 7");
    assert_eq!(what_takes(&tables, "10.3.0.9"), "SA 1");
    let own = entry(2, (vec![net("10.1.0.0/16")], vec![net("10.2.0.0/24")]), 2);
    tables.insert(&own);
    assert_eq!(what_takes(&tables, "10.2.0.9"), "SA 2");
    tables.remove(&own);
    // The peer may leave half of it to the wide one; the packets of the other half still want the trap's SA.
    let half = entry(3, (vec![net("10.1.0.0/16")], vec![net("10.2.0.0/25")]), 2);
    tables.insert(&half);
    assert_eq!((what_takes(&tables, "10.2.0.9"), what_takes(&tables, "10.2.0.200")), ("SA 3".into(), "trap 7".into()));
    assert!(tables.remove_trap(7) && !tables.remove_trap(7));
    assert_eq!(what_takes(&tables, "10.2.0.200"), "SA 1");
}

// An SA has no selector within another; its trap must not look narrower for having one.
#[test]
fn a_trap_with_selectors_within_others_is_as_wide_as_its_sa() {
    let mut tables = Tables::default();
    assert!(tables.insert_trap(&trap(7, vec![net("10.2.0.0/24"), net("10.0.0.0/8")])));
    tables.insert(&entry(1, (vec![net("10.1.0.0/16")], vec![net("10.0.0.0/8")]), 1));
    assert_eq!(what_takes(&tables, "10.2.0.9"), "SA 1");
}
