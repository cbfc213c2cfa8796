//! Child SAs go around flows that are reserved for others (RFC 5660 §2.3, by narrowing as RFC 7296 §2.9 has it).

use std::sync::Mutex;

use ipsec::selector::Flow;

use super::selectors::{answer_instead, flow, initiate_for};
use super::*;
use crate::sa::fault::notify;
use crate::sa::parts::address_selectors;
use crate::wire::NotifyType;

/// Reserves these for whoever is not this peer.
struct Held {
    flows: Vec<Flow>,
    owner: Identity,
    asked: Mutex<Vec<String>>,
}

impl Reservations for Held {
    fn reserved(&self, prospect: &Prospect<'_>) -> Vec<Flow> {
        let whose = match prospect.party {
            Party::Proved(peer) => format!("{} proved", peer.id),
            Party::Expected { remote, local } => format!("{remote} expected by {local}"),
        };
        let protection = match prospect.protection {
            Protection::Chosen(suite) => format!("{:?}", suite.encr),
            Protection::Offered(proposals) => format!("one of {}", proposals.len()),
        };
        self.asked.lock().unwrap().push(format!("{whose}: {:?}, {protection}", prospect.mode));
        let is_owner = match prospect.party {
            Party::Proved(peer) => peer.id == self.owner,
            Party::Expected { remote, .. } => remote.matches(&self.owner),
        };
        if is_owner { Vec::new() } else { self.flows.clone() }
    }
}

fn hold(pair: &mut Pair, side: usize, owner: &str, flows: Vec<Flow>) -> Arc<Held> {
    let held = Arc::new(Held { flows, owner: id(owner), asked: Mutex::default() });
    pair.sides[side].engine.set_reservations(Arc::clone(&held) as _);
    held
}

/// The same seen from B.
fn of_b(flow: Flow) -> Flow {
    Flow {
        protocol: flow.protocol,
        local: flow.remote,
        local_port: flow.remote_port,
        remote: flow.local,
        remote_port: flow.local_port,
    }
}

fn text(selectors: &[TrafficSelector]) -> String {
    selectors.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// The selectors of A's newest Child SA.
fn of_newest(pair: &Pair) -> (String, String) {
    let child = pair.sides[A].only().children.last().cloned().unwrap();
    (text(&child.local_ts), text(&child.remote_ts))
}

const AROUND: &str = "10.1.0.0..10.1.0.4 10.1.0.5/32[tcp/0-39999] 10.1.0.5/32[tcp/40001-65535] 10.1.0.5/32[udp] \
                      10.1.0.5/32[sctp] 10.1.0.5/32[icmp] 10.1.0.6..10.1.0.255";

#[test]
fn a_responder_gives_a_stranger_all_but_the_reserved_flow() {
    let mut pair = Pair::new(700);
    let held = hold(&mut pair, B, "c", vec![of_b(flow("10.1.0.5", "10.2.0.9"))]);
    // In IKE_AUTH…
    let mut pair = established(pair);
    assert_eq!(of_newest(&pair), (AROUND.to_owned(), "10.2.0.0/24".to_owned()));
    // …and in CREATE_CHILD_SA, where the packet that wants the SA is another one.
    initiate_for(&mut pair, flow("10.1.0.6", "10.2.0.9"), 2);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(2));
    let (local, remote) = of_newest(&pair);
    assert!(local.contains("10.1.0.5/32[tcp/40001-65535]") && !local.contains("10.1.0.0/24"), "{local}");
    assert_eq!(remote, "10.2.0.0/24");
    pair.assert_same(1, 2);
    assert_eq!(*held.asked.lock().unwrap(), ["a proved: Tunnel, Encr(20)", "a proved: Tunnel, Encr(20)"]);
}

#[test]
fn its_owner_gets_the_flow() {
    let mut pair = Pair::new(701);
    hold(&mut pair, B, "a", vec![of_b(flow("10.1.0.5", "10.2.0.9"))]);
    let pair = established(pair);
    assert_eq!(of_newest(&pair), ("10.1.0.0/24".to_owned(), "10.2.0.0/24".to_owned()));
}

// RFC 5660 §2.3: what cannot be narrowed goes to whoever installs, who breaks the latch first.
#[test]
fn what_cannot_be_left_out_is_given() {
    let (mut a, mut b) = (connection(A), connection(B));
    let the_flow = flow("10.1.0.5", "10.2.0.9");
    let (local, remote) = TrafficSelector::of_flow(&the_flow);
    let fixed = |selector| vec![ConfiguredSelector::Fixed(selector)];
    a.children = vec![Arc::new(Child { local_ts: fixed(local), remote_ts: fixed(remote), ..(*a.children[0]).clone() })];
    b.children = vec![Arc::new(Child { local_ts: fixed(remote), remote_ts: fixed(local), ..(*b.children[0]).clone() })];
    let mut pair = Pair::with(702, EngineConfig::default(), a, b);
    hold(&mut pair, B, "c", vec![of_b(the_flow)]);
    let pair = established(pair);
    assert_eq!(of_newest(&pair), (text(&[local]), text(&[remote])));
}

// RFC 7296 §2.9.2: a rekey's offer is the whole policy again; the successor has what its predecessor has, and the gap.
#[test]
fn a_rekey_does_not_get_what_its_predecessor_had_not() {
    let mut pair = Pair::new(703);
    hold(&mut pair, B, "c", vec![of_b(flow("10.1.0.5", "10.2.0.9"))]);
    let mut pair = established(pair);
    for side in [A, B] {
        let child = pair.sides[side].only().children.last().unwrap().id;
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Child(child), 2).unwrap();
        pair.drain(side);
        pair.run(seconds(20));
        assert!(pair.sides[side].done(2));
        assert_eq!(of_newest(&pair), (AROUND.to_owned(), "10.2.0.0/24".to_owned()));
    }
}

// RFC 7296 §2.9.2: nor does a successor lose what is reserved since.
#[test]
fn a_rekey_keeps_what_its_predecessor_had() {
    let mut pair = up(704);
    hold(&mut pair, B, "c", vec![of_b(flow("10.1.0.5", "10.2.0.9"))]);
    let child = pair.sides[A].only().children[0].id;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.drain(A);
    pair.run(seconds(20));
    assert!(pair.sides[A].done(2));
    assert_eq!(of_newest(&pair), ("10.1.0.0/24".to_owned(), "10.2.0.0/24".to_owned()));
}

#[test]
fn an_initiator_does_not_ask_for_the_reserved_flow() {
    let mut pair = Pair::new(705);
    let held = hold(&mut pair, A, "c", vec![flow("10.1.0.5", "10.2.0.9")]);
    let mut pair = established(pair);
    assert_eq!(of_newest(&pair), (AROUND.to_owned(), "10.2.0.0/24".to_owned()));
    pair.cut = true;
    pair.initiate(A, 2);
    let request = answer_instead(&mut pair, &[notify(NotifyType::NO_ADDITIONAL_SAS, Vec::new())]);
    assert_eq!(text(&address_selectors(&request.ts_initiator.unwrap())), AROUND);
    assert_eq!(*held.asked.lock().unwrap(), ["b expected by a: Tunnel, one of 1", "b proved: Tunnel, one of 1"]);
}
