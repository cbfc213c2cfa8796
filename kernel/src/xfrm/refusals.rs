//! A kernel that is full or refuses, at each step of each operation: what failed leaves what was there before, and what
//! could not be undone goes when the kernel is itself again.
//!
//! The databases are a double, so that each refusal can be had anywhere. That a real kernel takes what we send, and what is left in
//! it when its allocations fail, is tested in a guest (`tests/tests/kernel`).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipsec::guard::ClassId;
use ipsec::plane::{
    Encapsulation, EspKeys, EspSuite, KernelOptions, Lifetime, Mark, Mode, PlaneError, SaPair, Shunt, ShuntAction,
    TfcPadding, Trap,
};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};
use rustix::io::Errno;

use super::codec::{
    Action, Algorithm, Direction, Ends, Policy, PolicyId, PolicyReport, State, StateId, StateReport, flag,
};
use super::descriptions::Links;
use super::socket::Databases;
use super::tables::Tables;

/// Which requests fail.
#[derive(Clone, Copy, Debug)]
enum Refuses {
    Nothing,
    /// The one with this number.
    Once(usize, Errno),
    /// That one and all that come after it, those that remove included.
    From(usize, Errno),
    /// None, but the answer to the one with this number is lost for want of memory.
    Answer(usize),
}

#[derive(Debug)]
struct Double {
    states: BTreeMap<StateId, State>,
    policies: BTreeMap<PolicyId, Policy>,
    refuses: Refuses,
    requests: usize,
    /// The answer to this request is lost.
    unanswered: bool,
}

impl Double {
    fn new() -> Self {
        Self {
            states: BTreeMap::new(),
            policies: BTreeMap::new(),
            refuses: Refuses::Nothing,
            requests: 0,
            unanswered: false,
        }
    }

    fn ask(&mut self) -> io::Result<()> {
        let number = self.requests;
        self.requests += 1;
        self.unanswered = matches!(self.refuses, Refuses::Answer(at) if at == number);
        match self.refuses {
            Refuses::Once(at, errno) if at == number => Err(errno.into()),
            Refuses::From(at, errno) if at <= number => Err(errno.into()),
            Refuses::Nothing | Refuses::Once(..) | Refuses::From(..) | Refuses::Answer(_) => Ok(()),
        }
    }

    fn answer<T>(&self, value: T) -> io::Result<T> {
        if self.unanswered { Err(Errno::NOBUFS.into()) } else { Ok(value) }
    }

    fn contents(&self) -> (BTreeMap<StateId, State>, BTreeMap<PolicyId, Policy>) {
        (self.states.clone(), self.policies.clone())
    }
}

fn report(state: &State) -> StateReport {
    StateReport {
        id: state.id,
        source: state.source,
        protocol: 50,
        ours: true,
        selector: state.selector,
        reqid: state.reqid,
        mode: 1,
        flags: state.flags | if state.esn { flag::ESN } else { 0 },
        replay_window: state.replay_window,
        lifetime: state.lifetime,
        bytes: 0,
        packets: 0,
        last_used: None,
        encapsulation: state.encapsulation,
        mark: state.mark,
        set_mark: state.set_mark,
        if_id: state.if_id,
    }
}

impl Databases for Double {
    fn add_state(&mut self, state: &State, _: &[(Algorithm, &[u8])]) -> io::Result<()> {
        self.ask()?;
        if self.states.contains_key(&state.id) {
            return Err(Errno::EXIST.into());
        }
        self.states.insert(state.id, state.clone());
        self.answer(())
    }

    fn delete_state(&mut self, id: StateId, _: Mark) -> io::Result<bool> {
        self.ask()?;
        let removed = self.states.remove(&id).is_some();
        self.answer(removed)
    }

    fn move_state(&mut self, id: StateId, _: Mark, to: &Ends) -> io::Result<()> {
        self.ask()?;
        let mut state = self.states.remove(&id).ok_or(Errno::SRCH)?;
        state.id.destination = to.destination;
        (state.source, state.encapsulation) = (to.source, to.ports);
        self.states.insert(state.id, state);
        Ok(())
    }

    fn state(&mut self, id: StateId, _: Mark) -> io::Result<Option<StateReport>> {
        self.ask()?;
        self.answer(self.states.get(&id).map(report))
    }

    fn states(&mut self) -> io::Result<Vec<StateReport>> {
        self.ask()?;
        Ok(self.states.values().map(report).collect())
    }

    fn add_policy(&mut self, policy: &Policy) -> io::Result<()> {
        self.ask()?;
        if self.policies.contains_key(&policy.id) {
            return Err(Errno::EXIST.into());
        }
        self.policies.insert(policy.id, *policy);
        self.answer(())
    }

    fn set_policy(&mut self, policy: &Policy) -> io::Result<()> {
        self.ask()?;
        self.policies.insert(policy.id, *policy);
        self.answer(())
    }

    fn delete_policy(&mut self, id: &PolicyId) -> io::Result<bool> {
        self.ask()?;
        let removed = self.policies.remove(id).is_some();
        self.answer(removed)
    }

    fn foreign_policy(&mut self, _: &PolicyId) -> io::Result<Option<PolicyReport>> {
        self.ask()?;
        self.answer(None)
    }

    fn policies(&mut self) -> io::Result<Vec<PolicyReport>> {
        self.ask()?;
        let report = |policy: &Policy| PolicyReport {
            id: policy.id,
            ours: true,
            of_latch: false,
            priority: policy.priority,
            blocks: policy.action == Action::Drop,
            reqids: match policy.action {
                Action::Protect(template) => vec![template.reqid],
                Action::Pass | Action::Drop => Vec::new(),
            },
        };
        Ok(self.policies.values().map(report).collect())
    }
}

const NETS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(10, 1, 0, 0)), IpAddr::V4(Ipv4Addr::new(10, 2, 0, 0))];
const PREDECESSOR: u32 = 0x1000;
const SUCCESSOR: u32 = 0x1001;

fn network(address: &str) -> Vec<TrafficSelector> {
    vec![TrafficSelector::network(address.parse().unwrap(), 24).unwrap()]
}

fn pair(spi_in: u32, await_peer: bool) -> SaPair {
    let keys = || EspKeys { encr: Secret::new(vec![7; 20]), integ: Secret::new(Vec::new()) };
    SaPair {
        spi_in,
        spi_out: spi_in + 0x1000,
        reqid: 1,
        class: ClassId(1),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true },
        keys_in: keys(),
        keys_out: keys(),
        encapsulation: to("192.0.2.2"),
        local_ts: network("10.1.0.0"),
        remote_ts: network("10.2.0.0"),
        replay_window: 64,
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer,
        tfc: TfcPadding::None,
        options: KernelOptions::default(),
    }
}

fn to(remote: &str) -> Encapsulation {
    Encapsulation::None { local: "192.0.2.1".parse().unwrap(), remote: remote.parse().unwrap() }
}

fn trap() -> Trap {
    let (local_ts, remote_ts) = (network("10.1.0.0"), network("10.2.0.0"));
    Trap { reqid: 9, local_ts, remote_ts, options: KernelOptions::default() }
}

fn shunt(number: u32, action: ShuntAction) -> Shunt {
    let (local_ts, remote_ts) = (network("10.1.0.0"), network("10.2.0.0"));
    Shunt { number, action, local_ts, remote_ts, options: KernelOptions::default() }
}

/// A step that must take effect as a whole or change nothing, and what is installed before it.
type Step = fn(&mut Tables<Double>) -> Result<(), PlaneError>;

fn nothing(_: &mut Tables<Double>) -> Result<(), PlaneError> {
    Ok(())
}

fn predecessor(tables: &mut Tables<Double>) -> Result<(), PlaneError> {
    tables.install(pair(PREDECESSOR, false), &Links::default())
}

fn trapped(tables: &mut Tables<Double>) -> Result<(), PlaneError> {
    tables.install_trap(&trap(), &Links::default())
}

const STEPS: [(&str, Step, Step); 8] = [
    ("a pair", nothing, predecessor),
    ("a pair in place of its trap", trapped, predecessor),
    ("a successor", predecessor, |tables| tables.install(pair(SUCCESSOR, false), &Links::default())),
    ("a successor whose peer is not ready", predecessor, |tables| {
        tables.install(pair(SUCCESSOR, true), &Links::default())
    }),
    ("a pair between the same networks, with policies_fwd_out", nothing, |tables| {
        let mut pair = pair(PREDECESSOR, false);
        pair.remote_ts.extend(network("10.1.0.0"));
        pair.options.policies_fwd_out = true;
        tables.install(pair, &Links::default())
    }),
    ("a trap", nothing, trapped),
    ("a shunt that passes what is protected", predecessor, |tables| {
        tables.install_shunt(&shunt(1, ShuntAction::Pass), &Links::default())
    }),
    ("a shunt that drops", nothing, |tables| tables.install_shunt(&shunt(2, ShuntAction::Drop), &Links::default())),
];

const ERRORS: [Errno; 6] = [Errno::PERM, Errno::NOMEM, Errno::NOBUFS, Errno::NOSPC, Errno::NOSYS, Errno::INVAL];

/// Runs a step after its beginning with a kernel that refuses; gives the tables, what was there before, what came of it
/// and how many requests it took.
fn run(before: Step, step: Step, refuses: Refuses) -> (Tables<Double>, Double, Result<(), PlaneError>, usize) {
    let mut tables = Tables::new(Double::new(), 7);
    before(&mut tables).unwrap();
    let (states, policies) = tables.databases().contents();
    let there = Double { states, policies, ..Double::new() };
    tables.databases().requests = 0;
    tables.databases().refuses = refuses;
    let outcome = step(&mut tables);
    let requests = tables.databases().requests;
    tables.databases().refuses = Refuses::Nothing;
    (tables, there, outcome, requests)
}

#[test]
fn what_fails_half_way_leaves_what_was_there_before() {
    for (name, before, step) in STEPS {
        let (.., outcome, requests) = run(before, step, Refuses::Nothing);
        outcome.unwrap();
        for at in 0..requests {
            let refused = ERRORS.map(|errno| (Refuses::Once(at, errno), errno));
            for (refuses, errno) in refused.into_iter().chain([(Refuses::Answer(at), Errno::NOBUFS)]) {
                let (mut tables, there, outcome, _) = run(before, step, refuses);
                let error = outcome.expect_err(name).to_string();
                assert_eq!(tables.databases().contents(), there.contents(), "{name}, request {at}: {error}");
                // Who reads the log learns the system's reason.
                let reason = io::Error::from(errno).to_string();
                assert!(error.contains(&reason), "{name}, request {at}: {error}");
                // And it can be tried again.
                step(&mut tables).unwrap_or_else(|error| panic!("{name}, request {at}, again: {error}"));
            }
        }
    }
}

#[test]
fn what_cannot_be_undone_goes_when_the_kernel_answers_again() {
    for (name, before, step) in STEPS {
        let (.., requests) = run(before, step, Refuses::Nothing);
        for at in 0..requests {
            let (mut tables, there, outcome, _) = run(before, step, Refuses::From(at, Errno::NOMEM));
            assert!(outcome.is_err(), "{name}, from request {at}");
            if tables.databases().contents() != there.contents() {
                assert!(tables.is_suspect(), "{name}, from request {at}");
            }
            tables.put_right().unwrap();
            assert_eq!(tables.databases().contents(), there.contents(), "{name}, from request {at}");
        }
    }
}

#[test]
fn what_is_forwarded_into_a_tunnel_has_policies_of_its_own_where_wanted() {
    let (name, before, step) = STEPS[4];
    let (mut tables, ..) = run(before, step, Refuses::Nothing);
    let (_, policies) = tables.databases().contents();
    let passes = |policy: &&Policy| policy.action == Action::Pass;
    // Between the two networks one more; within the first, where both directions look alike, none.
    assert_eq!((policies.len(), policies.values().filter(passes).count()), (7, 1), "{name}");
    let there = policies.values().find(passes).unwrap();
    assert_eq!((there.id.direction, there.priority), (Direction::Forward, 375_424));
    assert_eq!((there.id.selector.source.0, there.id.selector.destination.0), (NETS[0], NETS[1]));
}

// A full kernel keeps nobody from closing SAs: what it does not remove now, it removes later.
#[test]
fn what_cannot_be_removed_is_removed_later() {
    let everything: Step = |tables| {
        predecessor(tables)?;
        trapped(tables)?;
        tables.install_shunt(&shunt(1, ShuntAction::Pass), &Links::default())
    };
    let removals: [Step; 3] =
        [|tables| tables.remove_shunt(1), |tables| tables.remove_trap(9), |tables| tables.delete(PREDECESSOR)];
    for at in 0..12 {
        let mut tables = Tables::new(Double::new(), 7);
        everything(&mut tables).unwrap();
        tables.databases().requests = 0;
        tables.databases().refuses = Refuses::From(at, Errno::NOMEM);
        for removal in removals {
            removal(&mut tables).unwrap();
        }
        tables.databases().refuses = Refuses::Nothing;
        tables.put_right().unwrap();
        assert_eq!(tables.databases().contents(), Default::default(), "from request {at}");
    }
}

// Half moved: what is there is known under its new or old name, so that nothing is left at the end.
#[test]
fn a_move_that_fails_leaves_nothing_behind() {
    for at in 0..5 {
        let (mut tables, _, outcome, _) =
            run(predecessor, |tables| tables.migrate(PREDECESSOR, &to("192.0.2.3")), Refuses::Once(at, Errno::NOMEM));
        assert!(outcome.is_err(), "request {at}");
        tables.delete(PREDECESSOR).unwrap();
        tables.put_right().unwrap();
        assert_eq!(tables.databases().contents(), Default::default(), "request {at}");
    }
}

// RFC 3948 §5.2: what policies do not tell apart is refused by name, and who was there first keeps what it has.
#[test]
fn a_second_peer_behind_a_nat_is_refused_in_transport_mode() {
    let mut tables = Tables::new(Double::new(), 7);
    let behind = |spi_in: u32, class: u32, port: u16| {
        let (local, remote) = ("192.0.2.1:4500".parse().unwrap(), format!("192.0.2.254:{port}").parse().unwrap());
        let host = |address: &str| vec![TrafficSelector::host(address.parse().unwrap())];
        SaPair {
            reqid: class,
            class: ClassId(class),
            mode: Mode::Transport,
            encapsulation: Encapsulation::Udp { local, remote },
            local_ts: host("192.0.2.1"),
            remote_ts: host("192.0.2.254"),
            ..pair(spi_in, false)
        }
    };
    tables.install(behind(0x1000, 1, 4500), &Links::default()).unwrap();
    let before = tables.databases().contents();
    let refused = tables.install(behind(0x1001, 2, 1025), &Links::default()).unwrap_err().to_string();
    assert!(refused.contains("second peer behind the NAT 192.0.2.254"), "{refused}");
    assert_eq!(tables.databases().contents(), before);
    // Marks tell them apart.
    let mut marked = behind(0x1002, 2, 1025);
    (marked.options.mark_in, marked.options.mark_out) =
        (Mark { value: 9, mask: u32::MAX }, Mark { value: 9, mask: u32::MAX });
    tables.install(marked, &Links::default()).unwrap();
    // The first one comes back from another port.
    tables.install(behind(0x1003, 1, 1026), &Links::default()).unwrap();
    tables.delete(0x1000).unwrap();
    tables.delete(0x1003).unwrap();
    tables.install(behind(0x1004, 2, 1025), &Links::default()).unwrap();
    // In tunnel mode the newest has the packets, as everywhere.
    let tunnel = |spi_in, class, port| SaPair { mode: Mode::Tunnel, ..behind(spi_in, class, port) };
    tables.delete(0x1004).unwrap();
    tables.install(tunnel(0x1005, 1, 4500), &Links::default()).unwrap();
    tables.install(tunnel(0x1006, 2, 1025), &Links::default()).unwrap();
}
