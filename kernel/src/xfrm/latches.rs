//! Policies of the kernel for latched flows (RFC 5660 §2.3): its barrier against every packet of theirs that is not under
//! an SA of the latched class.
//!
//! Each flow has a policy for each direction, for its five-tuple alone, which goes before those of SAs and of other key
//! managers. Where the kernel does ESP the policies demand the `reqid` of the class's SAs, in both directions; where user
//! space does, and whenever a latch is not ESTABLISHED or its class has no SA, they drop all; while a latch is LARVAL so that
//! the sender is not told, and its `connect` goes on (`larval`). What goes through the
//! tunnel's device passes them by; of inbound IPv6 that cannot be said, so there is no policy for it where user space does ESP.
//!
//! Where the kernel does ESP, a port whose connections are latched has policies too (`ports`), for those that have no
//! latch yet.
//!
//! What comes by an SA with an `if_id` meets, where an XFRM interface has that number too, inbound policies of that number and
//! no others. No latch is to such an SA, so a flow that one covers has one more policy for each of those numbers, which
//! drops all, and so has each port for all numbers.
//!
//! # Invariants
//!
//! * No SA with an `if_id` is in the kernel before these are ([`Latches::bar`]), and they stay as long as it is
//!   ([`Latches::unbar`]).
//! * They stay when the process ends, however it ends. A successor finds them, lets nothing pass, and takes each away when
//!   the system has no connection left that it is about ([`FlowBarrier::abandoned`]).
//! * A policy never names a `reqid` that no SA of its class has: a number may come to stand for another class. But for
//!   [`RESERVED_REQID`], which stands for none.
//!
//! # What they do not reach
//!
//! ICMP errors about a flow are no packets of it: where the kernel does ESP, nftables hold them back if they can
//! (`icmp_errors`), else the system's own rules for them hold. A policy that somebody installed with priority 0 before goes
//! first.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, MutexGuard};
use std::{fs, io};

use ipsec::guard::{self, Claim, ClassId, FlowBarrier, Passage};
use ipsec::plane::{Encapsulation, Mark, Mode, RESERVED_REQID, SaPair};
use ipsec::selector::Flow;

use super::arrivals::{self, Arrivals, Networks};
use super::codec::{Action, Direction, Ends, Policy, PolicyId, PolicyReport, Port, Selector, Template};
use super::icmp_errors::ErrorFilter;
use super::ports::{self, Policies};
use super::priority::{self, Purpose};
use super::socket::{Databases as _, XfrmSocket};
use super::{descriptions, selectors};
use crate::network::lock;

/// The barrier.
pub(crate) struct Latches {
    state: Mutex<State>,
    /// As whom the kernel's news name us.
    pub(super) port: u32,
    kernel_does_esp: bool,
    holds_back_errors: bool,
}

struct State {
    socket: XfrmSocket,
    /// Index of the tunnel's device.
    tun: u32,
    kernel_does_esp: bool,
    flows: BTreeMap<Flow, Barrier>,
    abandoned: BTreeSet<Flow>,
    /// Those of both kinds by the remote address.
    by_remote: BTreeSet<(IpAddr, Flow)>,
    /// SAs whose packets meet policies of an `if_id` only.
    arrivals: Arrivals,
    /// Of which `if_id`s a flow has policies.
    barred: BTreeSet<(Flow, u32)>,
    /// Of ICMP errors about all of them, where the kernel does ESP and the system can.
    errors: Option<ErrorFilter>,
    /// How many inbound policies there are between two addresses.
    pairs: HashMap<(IpAddr, IpAddr), usize>,
    limits: Limits,
    ports: BTreeMap<guard::Port, OpenPort>,
    abandoned_ports: BTreeSet<guard::Port>,
    /// The kernel's SAs by inbound SPI.
    paths: BTreeMap<u32, Path>,
    /// The same by the networks of their other ends.
    networks: Networks,
    last_path: u64,
}

/// How many inbound policies flows may have.
#[derive(Clone, Copy)]
struct Limits {
    of_pair: usize,
    of_all: usize,
}

/// A port whose connections are latched.
#[derive(Default)]
struct OpenPort {
    claims: Vec<Claim>,
    /// That the kernel has.
    policies: Policies,
}

#[derive(Clone, Copy)]
struct Barrier {
    passage: Passage,
    /// What the kernel's policies do for outbound and for inbound packets.
    actions: [Action; 2],
}

/// A pair of SAs, as far as it says which packets take it.
pub(super) struct Path {
    pub(super) class: ClassId,
    reqid: u32,
    mode: Mode,
    pub(super) selectors: Vec<Selector>,
    ends: Ends,
    /// The newest has most.
    pub(super) order: u64,
    /// Its packets need marks or interfaces, which a latch's policies do not say.
    pub(super) special: bool,
}

impl Latches {
    /// Connects to the policies of the calling thread's network namespace, and closes what a predecessor left.
    pub(crate) fn open(tun: u32, kernel_does_esp: bool) -> io::Result<Self> {
        let mut socket = XfrmSocket::open_for_latches()?;
        let port = socket.port();
        let (mut left, mut ports_left) = (BTreeSet::new(), BTreeSet::new());
        for report in socket.policies()?.iter().filter(|report| report.of_latch) {
            match (flow(&report.id), ports::closes(report)) {
                (Some(flow), _) => {
                    left.insert(flow);
                }
                (None, Some(port)) => {
                    ports_left.insert(port);
                }
                // What passed of a port that is closed behind it, or of a tunnel's device that is no more; what was for an
                // `if_id`, whose SAs have gone with the predecessor.
                (None, None) => {
                    socket.delete_policy(&report.id)?;
                }
            }
        }
        let mut pairs = HashMap::new();
        for flow in &left {
            *pairs.entry((flow.local, flow.remote)).or_default() += 1;
        }
        let unfiltered = |error: &io::Error| {
            tracing::info!(%error, "ICMP errors about latched flows are not held back");
        };
        let errors = if kernel_does_esp { ErrorFilter::open().inspect_err(unfiltered).ok() } else { None };
        let holds_back_errors = errors.is_some();
        let by_remote = left.iter().map(|flow| (flow.remote, *flow)).collect();
        let mut state = State {
            socket,
            tun,
            kernel_does_esp,
            flows: BTreeMap::new(),
            abandoned: left,
            by_remote,
            arrivals: Arrivals::default(),
            barred: BTreeSet::new(),
            errors,
            pairs,
            limits: LIMITS,
            ports: BTreeMap::new(),
            abandoned_ports: ports_left,
            paths: BTreeMap::new(),
            networks: Networks::default(),
            last_path: 0,
        };
        for flow in state.abandoned.clone() {
            if let Some(errors) = &mut state.errors {
                errors.enter(&flow)?;
            }
            state.put(&flow, CLOSED)?;
        }
        for port in state.abandoned_ports.clone() {
            state.put_policies(&state.closed(&port))?;
        }
        let (flows, ports) = (state.abandoned.len(), state.abandoned_ports.len());
        if flows + ports > 0 {
            tracing::info!(flows, ports, "what an earlier daemon latched stays closed");
        }
        Ok(Self { state: Mutex::new(state), port, kernel_does_esp, holds_back_errors })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The kernel has this pair: flows of its class may take it.
    pub(super) fn installed(&self, pair: &Described) {
        let mut state = self.state();
        state.last_path += 1;
        let path = Path {
            class: pair.class,
            reqid: pair.reqid,
            mode: pair.mode,
            selectors: pair.selectors.clone(),
            ends: pair.ends,
            order: state.last_path,
            special: pair.special,
        };
        state.paths.insert(pair.spi_in, path);
        state.networks.insert(pair.spi_in, &pair.selectors);
        state.follow(pair.spi_in);
        state.follow_ports(pair.class);
    }

    /// The kernel is about to have this pair: what is latched and what is left of it get nothing by its `if_id`, or it must not
    /// have it. False when it has a pair of this name already.
    pub(super) fn bar(&self, pair: &Described) -> Result<bool, String> {
        let mut state = self.state();
        if pair.if_id_in == 0 {
            return Ok(true);
        }
        if !state.arrivals.insert(pair.spi_in, pair.if_id_in, &pair.selectors) {
            return Ok(false);
        }
        state.bar(pair.if_id_in, &pair.selectors).inspect_err(|_| state.unbar(pair.spi_in))?;
        Ok(true)
    }

    /// The kernel has the pair no longer, or has not got it.
    pub(super) fn unbar(&self, spi_in: u32) {
        self.state().unbar(spi_in);
    }

    /// It is about to move to other ends.
    pub(super) fn moved(&self, spi_in: u32, to: &Encapsulation) {
        let mut state = self.state();
        if let Some(path) = state.paths.get_mut(&spi_in) {
            path.ends = descriptions::ends(to);
            let class = path.class;
            state.follow(spi_in);
            state.follow_ports(class);
        }
    }

    /// It goes.
    pub(super) fn removed(&self, spi_in: u32) {
        let mut state = self.state();
        let Some(gone) = state.paths.remove(&spi_in) else { return };
        state.networks.remove(spi_in, &gone.selectors);
        state.follow_class(gone.class, &gone.selectors);
        state.follow_ports(gone.class);
    }

    /// All go.
    pub(super) fn all_removed(&self) {
        let mut state = self.state();
        state.networks = Networks::default();
        for gone in std::mem::take(&mut state.paths).into_values() {
            state.follow_class(gone.class, &gone.selectors);
            state.follow_ports(gone.class);
        }
    }

    /// The kernel has none any more.
    pub(super) fn all_unbarred(&self) {
        let mut state = self.state();
        for spi_in in state.arrivals.spis() {
            state.unbar(spi_in);
        }
    }

    /// Somebody was at the kernel's policies: puts all of ours there again.
    pub(super) fn put_right(&self) {
        let mut state = self.state();
        for (flow, if_id) in state.barred.clone() {
            if let Err(error) = state.socket.set_policy(&barring(&flow, if_id)) {
                tracing::error!(%flow, if_id, %error, "putting back a policy of a latched flow");
            }
        }
        for (flow, barrier) in state.flows.clone() {
            if let Err(error) = state.put(&flow, barrier) {
                tracing::error!(%flow, %error, "putting back the policies of a latched flow");
            }
        }
        for flow in state.abandoned.clone() {
            if let Err(error) = state.put(&flow, CLOSED) {
                tracing::error!(%flow, %error, "putting back the policies of a flow that was latched");
            }
        }
        let open = state.ports.values().map(|open| open.policies.clone());
        let closed = state.abandoned_ports.iter().map(|port| state.closed(port));
        for policies in open.chain(closed).collect::<Vec<_>>() {
            if let Err(error) = state.put_policies(&policies) {
                tracing::error!(%error, "putting back the policies of a port whose connections are latched");
            }
        }
    }
}

/// What is kept of a pair.
pub(super) struct Described {
    spi_in: u32,
    class: ClassId,
    reqid: u32,
    mode: Mode,
    selectors: Vec<Selector>,
    ends: Ends,
    special: bool,
    if_id_in: u32,
}

impl Described {
    /// `None` where the kernel could not carry it anyway.
    pub(super) fn of(pair: &SaPair) -> Option<Self> {
        let (options, none) = (&pair.options, Mark::default());
        let special = options.mark_in != none
            || options.mark_out != none
            || (options.if_id_in, options.if_id_out) != (0, 0)
            || options.interface.is_some();
        Some(Self {
            spi_in: pair.spi_in,
            class: pair.class,
            reqid: pair.reqid,
            mode: pair.mode,
            selectors: selectors::outbound(&pair.local_ts, &pair.remote_ts, 0).ok()?,
            ends: descriptions::ends(&pair.encapsulation),
            special,
            if_id_in: options.if_id_in,
        })
    }
}

impl FlowBarrier for Latches {
    fn set(&self, flow: &Flow, passage: Passage) -> Result<(), String> {
        let mut state = self.state();
        let actions = state.actions(flow, passage)?;
        if !state.by_remote.contains(&(flow.remote, *flow)) {
            state.enter(flow)?;
        }
        state.put(flow, Barrier { passage, actions }).map_err(|e| {
            if !state.flows.contains_key(flow) && !state.abandoned.contains(flow) {
                state.leave(flow);
            }
            format!("install the policies of {flow}: {e}")
        })?;
        state.abandoned.remove(flow);
        state.flows.insert(*flow, Barrier { passage, actions });
        Ok(())
    }

    fn abandon(&self, flow: &Flow) {
        let mut state = self.state();
        if state.flows.remove(flow).is_some() {
            state.abandoned.insert(*flow);
            // Nobody looks after the `reqid` any more.
            if let Err(error) = state.put(flow, CLOSED) {
                tracing::error!(%flow, %error, "closing a flow that is no longer latched");
            }
        }
    }

    fn abandoned(&self) -> Vec<Flow> {
        self.state().abandoned.iter().copied().collect()
    }

    fn lift(&self, flow: &Flow) {
        let mut state = self.state();
        if state.abandoned.remove(flow) {
            state.leave(flow);
        }
    }

    fn verify(&self) -> Vec<Flow> {
        let mut state = self.state();
        let there = state.socket.policies();
        let count = |flow: &Flow, passage| match flow.local {
            IpAddr::V6(_) if state.kernel_does_esp || passage == Passage::Clear => 3,
            IpAddr::V4(_) | IpAddr::V6(_) => 2,
        };
        let of_latches = state.flows.iter().map(|(flow, barrier)| count(flow, barrier.passage));
        let of_flows: usize = of_latches.chain(state.abandoned.iter().map(|flow| count(flow, Passage::None))).sum();
        let expected = of_flows + state.barred.len() + state.policies_of_ports();
        let there = match there {
            Ok(there) => there,
            Err(error) => {
                tracing::error!(%error, "looking through the policies of latched flows");
                return Vec::new();
            }
        };
        let before: Vec<Selector> = there.iter().filter_map(goes_before).collect();
        let unlooked = state.kernel_does_esp.then(|| Unlooked::read(state.tun));
        let passes = |flow: &&Flow| {
            unlooked.as_ref().is_some_and(|unlooked| unlooked.takes(flow))
                || before.iter().any(|selector| includes(selector, flow))
        };
        let passing = state.flows.keys().filter(passes).copied().collect();
        drop(state);
        // Nobody else's have this mark.
        if there.iter().filter(|policy| policy.of_latch).count() < expected {
            tracing::warn!("somebody removed policies of latched flows; they are put right");
            self.put_right();
        }
        passing
    }

    fn set_port(&self, port: &guard::Port, claims: &[Claim]) -> Result<(), String> {
        let mut state = self.state();
        if !state.ports.contains_key(port) && state.policies_of_ports() >= MOST_OF_PORTS {
            return Err(format!("the system has {MOST_OF_PORTS} policies for latched ports, and takes no more"));
        }
        state.ports.entry(*port).or_default().claims = claims.to_vec();
        state.open_port(port)?;
        state.abandoned_ports.remove(port);
        Ok(())
    }

    fn lift_port(&self, port: &guard::Port) {
        let mut state = self.state();
        let open = state.ports.remove(port).map(|open| open.policies);
        let policies = if state.abandoned_ports.remove(port) { Some(state.closed(port)) } else { open };
        for id in policies.iter().flat_map(BTreeMap::keys) {
            if let Err(error) = state.socket.delete_policy(id) {
                tracing::error!(port = port.number, %error, "removing the policies of a port that is no longer latched");
            }
        }
    }

    fn abandoned_ports(&self) -> Vec<guard::Port> {
        self.state().abandoned_ports.iter().copied().collect()
    }

    fn stands_alone(&self) -> bool {
        self.kernel_does_esp
    }

    fn holds_back_errors(&self) -> bool {
        self.holds_back_errors
    }
}

impl State {
    /// Those flows that may take this pair, or have taken it, take the best there is.
    fn follow(&mut self, spi_in: u32) {
        if let Some((class, selectors)) = self.paths.get(&spi_in).map(|path| (path.class, path.selectors.clone())) {
            self.follow_class(class, &selectors);
        }
    }

    fn follow_class(&mut self, class: ClassId, selectors: &[Selector]) {
        let of_class = |flow: &Flow| {
            let barrier = self.flows.get(flow).filter(|barrier| barrier.passage == Passage::Class(class))?;
            selectors.iter().any(|selector| includes(selector, flow)).then_some((*flow, *barrier))
        };
        let concerned: Vec<(Flow, Barrier)> = self.covered(selectors).iter().filter_map(of_class).collect();
        for (flow, barrier) in concerned {
            let actions = self.actions(&flow, barrier.passage).unwrap_or(CLOSED.actions);
            if actions == barrier.actions {
                continue;
            }
            let barrier = Barrier { actions, ..barrier };
            match self.put(&flow, barrier) {
                Ok(()) => {
                    self.flows.insert(flow, barrier);
                }
                // What it had demands an SA of its class, or drops all.
                Err(error) => tracing::error!(%flow, %error, "changing the policies of a latched flow"),
            }
        }
    }

    /// Ports whose connections may take a pair of this class, or have taken it, take what there is.
    fn follow_ports(&mut self, class: ClassId) {
        let admits = |open: &OpenPort| open.claims.iter().any(|claim| claim.passage == Passage::Class(class));
        let concerned: Vec<guard::Port> =
            self.ports.iter().filter(|(_, open)| admits(open)).map(|(port, _)| *port).collect();
        for port in concerned {
            if let Err(error) = self.open_port(&port) {
                tracing::error!(port = port.number, error, "changing the policies of a latched port");
            }
        }
    }

    /// Has the kernel do what is said of a port. What closes comes first, so that nothing passes in between that should not
    /// pass before or after.
    fn open_port(&mut self, port: &guard::Port) -> Result<(), String> {
        let Some(open) = self.ports.get(port) else { return Ok(()) };
        let closed = self.closed(port);
        let (wanted, refused) = match ports::policies(port, closed.clone(), &open.claims, self.paths.values()) {
            Ok(wanted) => (wanted, Ok(())),
            Err(reason) => (closed, Err(reason)),
        };
        let mut there = open.policies.clone();
        let done = self.change(&mut there, &wanted);
        if let Some(open) = self.ports.get_mut(port) {
            open.policies = there;
        }
        done.map_err(|error| format!("install the policies of port {}: {error}", port.number))?;
        refused
    }

    fn change(&mut self, there: &mut Policies, wanted: &Policies) -> io::Result<()> {
        let opens = |what: &(u32, Action)| matches!(what.1, Action::Protect(_));
        for opening in [false, true] {
            for (id, what) in wanted.iter().filter(|(_, what)| opens(what) == opening) {
                if there.get(id) != Some(what) {
                    self.socket.set_policy(&Policy { id: *id, priority: what.0, action: what.1 })?;
                    there.insert(*id, *what);
                }
            }
            let gone: Vec<PolicyId> = (there.iter())
                .filter(|(id, what)| !wanted.contains_key(id) && opens(what) != opening)
                .map(|(id, _)| *id)
                .collect();
            for id in gone {
                self.socket.delete_policy(&id)?;
                there.remove(&id);
            }
        }
        Ok(())
    }

    /// Installs them whether they are there or not.
    fn put_policies(&mut self, policies: &Policies) -> io::Result<()> {
        self.change(&mut Policies::new(), policies)
    }

    fn policies_of_ports(&self) -> usize {
        let open: usize = self.ports.values().map(|open| open.policies.len()).sum();
        open + self.abandoned_ports.iter().map(|port| self.closed(port).len()).sum::<usize>()
    }

    /// What stands of a port that nobody may come to.
    fn closed(&self, port: &guard::Port) -> Policies {
        ports::closed(port, self.tun, self.arrivals.if_ids())
    }

    /// A flow is about to have policies: first those that bar what may reach it by an `if_id`.
    fn enter(&mut self, flow: &Flow) -> Result<(), String> {
        self.count(flow)?;
        self.by_remote.insert((flow.remote, *flow));
        let filtered = self.errors.as_mut().map_or(Ok(()), |errors| errors.enter(flow)).map_err(|e| e.to_string());
        let if_ids = self.arrivals.towards(flow);
        let barred = filtered.and_then(|()| if_ids.into_iter().try_for_each(|if_id| self.bar_flow(flow, if_id)));
        barred.inspect_err(|_| self.leave(flow))
    }

    /// It has had its time: none of its policies stay.
    fn leave(&mut self, flow: &Flow) {
        if let Err(error) = self.take_away(flow) {
            tracing::error!(%flow, %error, "removing the policies of a flow that is no longer latched");
        }
        for if_id in self.barring(flow) {
            self.lift_bar(flow, if_id);
        }
        if let Some(Err(error)) = self.errors.as_mut().map(|errors| errors.leave(flow)) {
            tracing::error!(%flow, %error, "ICMP errors about a flow that is no longer latched are still held back");
        }
        self.by_remote.remove(&(flow.remote, *flow));
        self.count_off(flow);
    }

    /// The `if_id`s by which nothing gets to a flow.
    fn barring(&self, flow: &Flow) -> Vec<u32> {
        self.barred.range((*flow, 0)..=(*flow, u32::MAX)).map(|(_, if_id)| *if_id).collect()
    }

    /// By this `if_id` nothing gets to what such an SA covers and is latched, or was.
    fn bar(&mut self, if_id: u32, selectors: &[Selector]) -> Result<(), String> {
        for flow in self.covered(selectors) {
            if !self.barred.contains(&(flow, if_id)) {
                self.bar_flow(&flow, if_id)?;
            }
        }
        // Those of another SA with this number are there.
        if self.arrivals.if_ids().get(&if_id) != Some(&1) {
            return Ok(());
        }
        let ports: Vec<guard::Port> = self.ports.keys().chain(&self.abandoned_ports).copied().collect();
        if self.policies_of_ports() + ports.len() > MOST_OF_PORTS {
            return Err(format!("the system has {MOST_OF_PORTS} policies for latched ports, and takes no more"));
        }
        for port in ports {
            let (id, what) = (ports::barring(&port, if_id), (ports::LAST, Action::Drop));
            let policy = Policy { id, priority: what.0, action: what.1 };
            let put = self.socket.set_policy(&policy);
            put.map_err(|e| format!("have nothing get to port {} by the interface {if_id:#x}: {e}", port.number))?;
            if let Some(open) = self.ports.get_mut(&port) {
                open.policies.insert(id, what);
            }
        }
        Ok(())
    }

    fn bar_flow(&mut self, flow: &Flow, if_id: u32) -> Result<(), String> {
        self.count(flow)?;
        self.socket.set_policy(&barring(flow, if_id)).map_err(|e| {
            self.count_off(flow);
            format!("have nothing get to {flow} by the interface {if_id:#x}: {e}")
        })?;
        self.barred.insert((*flow, if_id));
        Ok(())
    }

    fn lift_bar(&mut self, flow: &Flow, if_id: u32) {
        if let Err(error) = self.socket.delete_policy(&barring(flow, if_id).id) {
            tracing::error!(%flow, if_id, %error, "removing a policy of a latched flow");
        }
        self.barred.remove(&(*flow, if_id));
        self.count_off(flow);
    }

    /// The SA has gone; what it was barred from is open as far as no other one with its `if_id` is there.
    fn unbar(&mut self, spi_in: u32) {
        let Some((if_id, selectors)) = self.arrivals.remove(spi_in) else { return };
        for flow in self.covered(&selectors) {
            if self.barred.contains(&(flow, if_id)) && !self.arrivals.towards(&flow).contains(&if_id) {
                self.lift_bar(&flow, if_id);
            }
        }
        if self.arrivals.if_ids().contains_key(&if_id) {
            return;
        }
        let ports = self.ports.keys().chain(&self.abandoned_ports).copied();
        for port in ports.collect::<Vec<_>>() {
            let id = ports::barring(&port, if_id);
            if let Err(error) = self.socket.delete_policy(&id) {
                tracing::error!(port = port.number, if_id, %error, "removing a policy of a latched port");
            }
            if let Some(open) = self.ports.get_mut(&port) {
                open.policies.remove(&id);
            }
        }
    }

    /// Flows with policies between addresses that one of the selectors is about.
    fn covered(&self, selectors: &[Selector]) -> BTreeSet<Flow> {
        let of = |selector: &Selector| {
            let (first, last) = arrivals::ends(selector.destination);
            let source = selector.source;
            let from = Flow { protocol: 0, local: FIRST, local_port: 0, remote: FIRST, remote_port: 0 };
            let after = self.by_remote.range((first, from)..);
            after
                .map_while(move |(remote, flow)| (*remote <= last).then_some(flow))
                .filter(move |flow| within(source, flow.local))
        };
        selectors.iter().flat_map(of).copied().collect()
    }

    /// Takes note of one more inbound policy for a flow, or fails where there is no room for it.
    fn count(&mut self, flow: &Flow) -> Result<(), String> {
        let Limits { of_pair, of_all } = self.limits;
        let Flow { local, remote, .. } = flow;
        if self.by_remote.len() + self.barred.len() >= of_all {
            return Err(format!("the system has {of_all} policies for latched flows, and takes no more"));
        }
        let count = self.pairs.entry((*local, *remote)).or_default();
        if *count >= of_pair {
            return Err(format!(
                "the system has {of_pair} policies for flows between {local} and {remote}, and takes no more"
            ));
        }
        *count += 1;
        Ok(())
    }

    fn count_off(&mut self, flow: &Flow) {
        if let Entry::Occupied(mut count) = self.pairs.entry((flow.local, flow.remote)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    /// What the policies of a flow have to do; fails where its SAs are such that they cannot say it.
    fn actions(&self, flow: &Flow, passage: Passage) -> Result<[Action; 2], String> {
        let class = match passage {
            Passage::Class(class) => class,
            Passage::Larval if self.kernel_does_esp => return Ok([Action::Protect(larval(flow)), Action::Drop]),
            Passage::None | Passage::Larval => return Ok(CLOSED.actions),
            Passage::Clear => return Ok([Action::Pass; 2]),
        };
        let fits = |path: &Path| {
            let of_flow = path.selectors.iter().filter(|selector| includes(selector, flow));
            of_flow.map(|selector| priority::of(selector, Purpose::Sa)).min()
        };
        let around = self.networks.around(flow.remote).filter_map(|spi_in| self.paths.get(&spi_in));
        let of_class = around.filter(|path| path.class == class);
        // As the kernel chooses among the policies of SAs.
        let best = of_class
            .filter_map(|path| Some((fits(path)?, std::cmp::Reverse(path.order), path)))
            .min_by_key(|(priority, order, _)| (*priority, *order));
        match best {
            // User space may carry it.
            None => Ok(CLOSED.actions),
            Some((.., path)) if path.special => {
                Err(format!("the SA of {flow} needs marks or an interface, which latches do not know"))
            }
            Some((.., path)) => Ok([path.template(false), path.template(true)].map(Action::Protect)),
        }
    }

    fn put(&mut self, flow: &Flow, barrier: Barrier) -> io::Result<()> {
        if let Some(id) = through(flow, self.tun) {
            self.socket.set_policy(&Policy { id, priority: THROUGH_THE_TUNNEL, action: Action::Pass })?;
        }
        for (direction, action) in DIRECTIONS.into_iter().zip(barrier.actions) {
            if direction == Direction::In && action == Action::Drop && !self.looks_at_inbound(flow) {
                // A predecessor may have had one.
                self.socket.delete_policy(&id(flow, direction))?;
                continue;
            }
            self.socket.set_policy(&Policy { id: id(flow, direction), priority: OF_A_LATCH, action })?;
        }
        let changed = self.errors.as_mut().map(|errors| match barrier.actions {
            // In clear, as it is itself.
            [_, Action::Pass] => errors.leave(flow),
            [_, Action::Protect(template)] => {
                errors.enter(flow).and_then(|()| errors.permit(flow, Some(template.reqid)))
            }
            [_, Action::Drop] => errors.enter(flow).and_then(|()| errors.permit(flow, None)),
        });
        if let Some(Err(error)) = changed {
            tracing::error!(%flow, %error, "which ICMP errors about a latched flow pass could not be changed");
        }
        Ok(())
    }

    /// Whether IPv6 packets from the tunnel's device pass by policies is up to the device that has their destination address,
    /// so inbound ones are left to the socket's binding there.
    fn looks_at_inbound(&self, flow: &Flow) -> bool {
        flow.local.is_ipv4() || self.kernel_does_esp
    }

    fn take_away(&mut self, flow: &Flow) -> io::Result<()> {
        let ids = DIRECTIONS.into_iter().map(|direction| id(flow, direction)).chain(through(flow, self.tun));
        for id in ids {
            self.socket.delete_policy(&id)?;
        }
        Ok(())
    }
}

impl Path {
    pub(super) fn template(&self, inbound: bool) -> Template {
        let ends = if inbound { self.ends.reversed() } else { self.ends };
        let (source, destination) = match self.mode {
            Mode::Tunnel => (ends.source, ends.destination),
            Mode::Transport => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        };
        Template { reqid: self.reqid, mode: self.mode, source, destination }
    }
}

/// Demands an SA from us to us with the number that no SA has. So packets wait, for nothing: the kernel drops them without
/// telling the sender (`net.core.xfrm_larval_drop`), and looks anew for each.
fn larval(flow: &Flow) -> Template {
    Template { reqid: RESERVED_REQID, mode: Mode::Tunnel, source: flow.local, destination: flow.local }
}

fn id(flow: &Flow, direction: Direction) -> PolicyId {
    let prefix = if flow.local.is_ipv4() { 32 } else { 128 };
    let exactly = |port| Port { port, mask: u16::MAX };
    let outbound = Selector {
        source: (flow.local, prefix),
        destination: (flow.remote, prefix),
        protocol: flow.protocol,
        source_port: exactly(flow.local_port),
        destination_port: exactly(flow.remote_port),
        interface: 0,
    };
    let selector = if direction == Direction::Out { outbound } else { outbound.reversed() };
    PolicyId { direction, selector, mark: Mark::default(), if_id: 0 }
}

/// What drops what would come to a flow by an `if_id`.
fn barring(flow: &Flow, if_id: u32) -> Policy {
    Policy { id: PolicyId { if_id, ..id(flow, Direction::In) }, priority: OF_A_LATCH, action: Action::Drop }
}

/// What lets IPv6 packets into the tunnel's device, which has no switch for it.
fn through(flow: &Flow, tun: u32) -> Option<PolicyId> {
    let mut id = id(flow, Direction::Out);
    id.selector.interface = tun;
    flow.local.is_ipv6().then_some(id)
}

/// The flow that a policy of a latch is for; `None` where it is about one interface or `if_id`, or more than one flow.
fn flow(id: &PolicyId) -> Option<Flow> {
    let outbound = if id.direction == Direction::Out { id.selector } else { id.selector.reversed() };
    let exact = [outbound.source_port, outbound.destination_port].iter().all(|port| port.mask == u16::MAX)
        && [outbound.source, outbound.destination]
            .iter()
            .all(|(ip, prefix)| *prefix == if ip.is_ipv4() { 32 } else { 128 });
    (outbound.interface == 0 && id.if_id == 0 && exact).then_some(Flow {
        protocol: outbound.protocol,
        local: outbound.source.0,
        local_port: outbound.source_port.port,
        remote: outbound.destination.0,
        remote_port: outbound.destination_port.port,
    })
}

/// What a policy of somebody else's lets pass before those of latches are looked at, seen on its way out. What comes out of an
/// XFRM interface meets the policies of that interface only.
fn goes_before(report: &PolicyReport) -> Option<Selector> {
    let id = report.id;
    let goes_before = match (id.direction, id.if_id) {
        (Direction::Out, 0) | (Direction::In, 0) => report.priority <= OF_A_LATCH,
        (direction, _) => direction == Direction::In,
    };
    let outbound = if id.direction == Direction::Out { id.selector } else { id.selector.reversed() };
    (goes_before && !report.blocks && !report.ours && !report.of_latch && id.direction != Direction::Forward)
        .then_some(outbound)
}

/// What the kernel delivers without a look at inbound policies (`disable_policy`): of IPv4 what comes by a device, of IPv6 what
/// comes to an address of one. The tunnel's device and the loopback device are so for IPv4, by our will and the kernel's.
struct Unlooked {
    /// By a device.
    ipv4: bool,
    ipv6: BTreeSet<IpAddr>,
}

impl Unlooked {
    fn read(tun: u32) -> Self {
        let is_off = |family: &str, device: &str| {
            let switch = format!("/proc/sys/net/{family}/conf/{device}/disable_policy");
            fs::read_to_string(switch).is_ok_and(|set| set.trim() != "0")
        };
        let devices = fs::read_dir("/proc/sys/net/ipv4/conf").into_iter().flatten();
        let mut names = devices.filter_map(|device| device.ok()?.file_name().into_string().ok());
        // What later devices begin with is no device's own.
        let is_of_others = |name: &String| {
            !matches!(name.as_str(), "default" | "lo")
                && !nix::net::if_::if_nametoindex(name.as_str()).is_ok_and(|index| index == tun)
        };
        let ipv4 = names.any(|name| is_of_others(&name) && is_off("ipv4", &name));
        // A line is an address in 32 digits, four numbers, and the name of a device.
        let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
        let ipv6 = addresses.lines().filter_map(|line| {
            let (address, rest) = line.split_once(' ')?;
            let address = u128::from_str_radix(address, 16).ok()?;
            let device = rest.split_ascii_whitespace().next_back()?;
            (is_off("ipv6", device) || is_off("ipv6", "all")).then(|| IpAddr::V6(address.into()))
        });
        Self { ipv4, ipv6: ipv6.collect() }
    }

    fn takes(&self, flow: &Flow) -> bool {
        if flow.local.is_ipv4() { self.ipv4 } else { self.ipv6.contains(&flow.local) }
    }
}

/// True when an outbound selector is about a flow's packets.
fn includes(selector: &Selector, flow: &Flow) -> bool {
    let port = |wanted: Port, port: u16| port & wanted.mask == wanted.port & wanted.mask;
    (selector.protocol == 0 || selector.protocol == flow.protocol)
        && within(selector.source, flow.local)
        && within(selector.destination, flow.remote)
        && port(selector.source_port, flow.local_port)
        && port(selector.destination_port, flow.remote_port)
}

pub(super) fn within((network, prefix): (IpAddr, u8), address: IpAddr) -> bool {
    let same = |network: u128, address: u128, bits: u32| {
        (network ^ address).checked_shr(bits.saturating_sub(prefix.into())).unwrap_or(0) == 0
    };
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => same(network.to_bits().into(), address.to_bits().into(), 32),
        (IpAddr::V6(network), IpAddr::V6(address)) => same(network.to_bits(), address.to_bits(), 128),
        _ => false,
    }
}

const FIRST: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const DIRECTIONS: [Direction; 2] = [Direction::Out, Direction::In];
const CLOSED: Barrier = Barrier { passage: Passage::None, actions: [Action::Drop; 2] };
/// Before policies of SAs, whatever their selectors (`priority`).
const OF_A_LATCH: u32 = 1;
pub(super) const THROUGH_THE_TUNNEL: u32 = 0;
/// Of all ports: each costs the kernel some hundred octets.
const MOST_OF_PORTS: usize = 65_536;
/// The kernel looks through the policies of two hosts one by one, for each packet between them (`tests/bench/policies`); how
/// many there are of other hosts does not matter to it.
const LIMITS: Limits = Limits { of_pair: 4096, of_all: 65_536 };

#[cfg(test)]
mod tests {
    //! On this machine's own kernel, in namespaces; with ESP in a guest (`tests/tests/kernel/latches.rs`).
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::net::UdpSocket;

    use ipsec::selector::TrafficSelector;

    use super::*;
    use crate::xfrm::tests::{host, ip};

    const TUN: u32 = 77;

    fn udp_flow(local_port: u16) -> Flow {
        let (local, remote) = ("10.1.0.1".parse().unwrap(), "10.2.0.1".parse().unwrap());
        Flow { protocol: 17, local, local_port, remote, remote_port: 7001 }
    }

    fn sends(local_port: u16) -> bool {
        let socket = UdpSocket::bind(("10.1.0.1", local_port)).unwrap();
        socket.send_to(b"x", "10.2.0.1:7001").is_ok()
    }

    fn pair(spi_in: u32, class: u32, reqid: u32, destination: (&str, u8)) -> Described {
        let selector = Selector {
            source: ("10.1.0.0".parse().unwrap(), 24),
            destination: (destination.0.parse().unwrap(), destination.1),
            protocol: 0,
            source_port: Port::default(),
            destination_port: Port::default(),
            interface: 0,
        };
        let (source, destination) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        Described {
            spi_in,
            class: ClassId(class),
            reqid,
            mode: Mode::Tunnel,
            selectors: vec![selector],
            ends: Ends { source, destination, ports: None },
            special: false,
            if_id_in: 0,
        }
    }

    /// `reqid`s that the policies demand of outbound and inbound packets; `None` is that they drop all.
    fn demanded() -> Vec<Option<String>> {
        let text = ip("xfrm policy");
        let each = text.split("src 10.").skip(1);
        each.map(|policy| Some(policy.split_once("reqid ")?.1.split(' ').next()?.to_owned())).collect()
    }

    // RFC 5660 §2 (13): whatever becomes of the daemon, nothing of the flow leaves in clear; other flows are not touched.
    #[test]
    fn what_is_latched_is_kept_in_even_when_the_process_is_gone() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, false).unwrap();
                assert!(sends(7000));
                latches.set(&udp_flow(7000), Passage::Class(ClassId(1))).unwrap();
                assert!(!sends(7000), "it leaves by another way than the tunnel");
                assert!(sends(7002), "another flow");
                // Killed.
                drop(latches);
                assert!(!sends(7000));
                let successor = Latches::open(TUN + 1, false).unwrap();
                assert!(!sends(7000));
                assert_eq!(successor.abandoned(), [udp_flow(7000)]);
                successor.lift(&udp_flow(7000));
                assert!(sends(7000));
                assert_eq!((ip("xfrm policy").as_str(), successor.abandoned().len()), ("", 0));
            })
            .unwrap();
    }

    // RFC 5660 §2.3: while an SA is made the sender is not told, and no SA that comes lets anything pass but the latch's.
    #[test]
    fn a_larval_flow_is_dropped_without_a_word_until_it_has_a_class() {
        host()
            .run(|| {
                let waits = || ip("xfrm policy").matches(&format!("reqid {RESERVED_REQID}")).count();
                let latches = Latches::open(TUN, true).unwrap();
                latches.set(&udp_flow(7000), Passage::Larval).unwrap();
                latches.installed(&pair(1, 1, 40, ("10.2.0.0", 24)));
                assert_eq!(waits(), 1, "outbound; inbound is dropped");
                assert!(sends(7000), "and goes nowhere");
                latches.set(&udp_flow(7000), Passage::Class(ClassId(1))).unwrap();
                assert_eq!(demanded(), [Some("40".to_owned()), Some("40".to_owned())]);
                latches.set(&udp_flow(7000), Passage::Larval).unwrap();
                latches.abandon(&udp_flow(7000));
                assert_eq!(demanded(), [None, None]);
                latches.set(&udp_flow(7000), Passage::Larval).unwrap();
                // Killed.
                drop(latches);
                let _successor = Latches::open(TUN, true).unwrap();
                assert_eq!(demanded(), [None, None]);
                // Where user space does ESP they are about what goes past the tunnel only.
                let latches = Latches::open(TUN, false).unwrap();
                latches.set(&udp_flow(7002), Passage::Larval).unwrap();
                assert_eq!(waits(), 0);
            })
            .unwrap();
    }

    // RFC 5660 §3.1: what is bypassed passes before all others' policies, and MUST NOT survive.
    #[test]
    fn what_is_to_be_clear_passes_until_the_process_is_gone() {
        host()
            .run(|| {
                for kernel_does_esp in [false, true] {
                    let latches = Latches::open(TUN, kernel_does_esp).unwrap();
                    latches.installed(&pair(1, 1, 40, ("10.2.0.0", 24)));
                    // As those of SAs, shunts, and `drop_cleartext`.
                    ip("xfrm policy add dir out src 10.1.0.0/24 dst 10.2.0.0/24 action block priority 1000");
                    assert!(!sends(7000));
                    latches.set(&udp_flow(7000), Passage::Clear).unwrap();
                    assert!(sends(7000) && !sends(7002), "no other flow");
                    assert_eq!(demanded().iter().flatten().count(), 0, "of no SA");
                    latches.removed(1);
                    latches.put_right();
                    assert!(sends(7000) && latches.verify().is_empty());
                    latches.set(&udp_flow(7000), Passage::None).unwrap();
                    assert!(!sends(7000));
                    latches.set(&udp_flow(7000), Passage::Clear).unwrap();
                    // Killed.
                    drop(latches);
                    let successor = Latches::open(TUN, kernel_does_esp).unwrap();
                    ip("xfrm policy delete dir out src 10.1.0.0/24 dst 10.2.0.0/24");
                    assert!(!sends(7000) && sends(7002));
                    assert_eq!(successor.abandoned(), [udp_flow(7000)]);
                    successor.lift(&udp_flow(7000));
                    assert!(sends(7000));
                }
            })
            .unwrap();
    }

    #[test]
    fn what_is_to_be_clear_of_ipv6_is_let_in_as_well() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, false).unwrap();
                let (local, remote) = ("fd01::1".parse().unwrap(), "fd02::1".parse().unwrap());
                let flow = Flow { protocol: 17, local, local_port: 7000, remote, remote_port: 7001 };
                latches.set(&flow, Passage::Clear).unwrap();
                let all = || ip("xfrm policy").matches("dir ").count();
                assert_eq!((all(), counted(), latches.verify().len()), (3, (0, 0), 0));
                latches.set(&flow, Passage::None).unwrap();
                // What came by the tunnel could not be told from what did not.
                assert_eq!((all(), counted()), (2, (1, 0)));
                latches.abandon(&flow);
                latches.lift(&flow);
                assert_eq!(all(), 0);
            })
            .unwrap();
    }

    #[test]
    fn a_released_flow_is_closed_until_it_is_lifted() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                latches.installed(&pair(1, 1, 40, ("10.2.0.0", 24)));
                latches.set(&udp_flow(7000), Passage::Class(ClassId(1))).unwrap();
                latches.lift(&udp_flow(7000));
                assert_eq!(demanded(), [Some("40".to_owned()), Some("40".to_owned())], "it is latched");
                latches.abandon(&udp_flow(7000));
                assert_eq!(demanded(), [None, None]);
                // A new latch takes it over.
                latches.set(&udp_flow(7000), Passage::Class(ClassId(1))).unwrap();
                assert_eq!((demanded()[0].as_deref(), latches.abandoned().len()), (Some("40"), 0));
                latches.abandon(&udp_flow(7000));
                latches.lift(&udp_flow(7000));
                assert_eq!(ip("xfrm policy"), "");
            })
            .unwrap();
    }

    // RFC 5660 §2.3 (23): a change of the SPD that the latch cannot stand against.
    #[test]
    fn policies_of_others_that_go_before_are_told() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                latches.set(&udp_flow(7000), Passage::None).unwrap();
                let ends = "src 10.1.0.0/24 dst 10.2.0.0/24";
                let back = "src 10.2.0.0/24 dst 10.1.0.0/24";
                for harmless in [
                    format!("{ends} dir out priority 2"),
                    format!("{ends} dir out action block"),
                    format!("{back} dir fwd"),
                    format!("{ends} dir out if_id 7"),
                    "src 10.1.0.0/24 dst 10.3.0.0/24 dir out".to_owned(),
                ] {
                    ip(&format!("xfrm policy add {harmless}"));
                    assert_eq!(latches.verify(), [], "{harmless}");
                    ip(&format!(
                        "xfrm policy delete {}",
                        harmless.split(" priority").next().unwrap().replace(" action block", "")
                    ));
                }
                // Without a priority it has 0.
                for policy in
                    [format!("{ends} dir out"), format!("{back} dir in"), format!("{back} dir in if_id 7 priority 9")]
                {
                    ip(&format!("xfrm policy add {policy}"));
                    assert_eq!(latches.verify(), [udp_flow(7000)], "{policy}");
                    ip(&format!("xfrm policy delete {}", policy.split(" priority").next().unwrap()));
                    assert_eq!(latches.verify(), []);
                }
            })
            .unwrap();
    }

    #[test]
    fn flows_have_a_limit_for_two_hosts_and_one_for_all() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                latches.state().limits = Limits { of_pair: 2, of_all: 3 };
                let set = |flow: &Flow| latches.set(flow, Passage::None);
                let to = |remote: &str| Flow { remote: remote.parse().unwrap(), ..udp_flow(7000) };
                set(&udp_flow(7000)).unwrap();
                set(&udp_flow(7001)).unwrap();
                assert!(
                    set(&udp_flow(7002)).unwrap_err().contains("2 policies for flows between 10.1.0.1 and 10.2.0.1")
                );
                set(&udp_flow(7001)).unwrap();
                set(&to("10.2.0.2")).unwrap();
                assert!(set(&to("10.2.0.3")).unwrap_err().contains("3 policies for latched flows"));
                // What is left of a flow counts.
                latches.abandon(&udp_flow(7001));
                assert!(set(&udp_flow(7002)).is_err());
                latches.lift(&udp_flow(7001));
                latches.lift(&udp_flow(7001));
                set(&udp_flow(7002)).unwrap();
                assert!(set(&udp_flow(7003)).is_err());
                drop(latches);
                let successor = Latches::open(TUN, true).unwrap();
                successor.state().limits.of_pair = 2;
                assert!(successor.set(&udp_flow(7003), Passage::None).is_err());
                for flow in successor.abandoned() {
                    successor.lift(&flow);
                }
                assert!(successor.state().pairs.is_empty());
            })
            .unwrap();
    }

    /// How many policies drop what comes by an `if_id`.
    fn barred(if_id: &str) -> usize {
        let text = ip("xfrm policy");
        let policies = text.split("src ").filter(|policy| policy.trim_end().ends_with(&format!("if_id {if_id}")));
        policies.inspect(|policy| assert!(policy.contains("dir in action block"), "{policy}")).count()
    }

    // A device by which packets pass all policies by.
    #[test]
    fn flows_that_no_inbound_policy_is_asked_about_are_told() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                ip("addr add fd01::1/64 dev eth0 nodad");
                let remote = "fd02::1".parse().unwrap();
                let ipv6 = Flow { local: "fd01::1".parse().unwrap(), remote, ..udp_flow(7000) };
                let elsewhere = Flow { local: "fd03::1".parse().unwrap(), ..ipv6 };
                for flow in [udp_flow(7000), ipv6, elsewhere] {
                    latches.set(&flow, Passage::None).unwrap();
                }
                assert_eq!(latches.verify(), []);
                let switch = |family: &str, device: &str, value: &str| {
                    std::fs::write(format!("/proc/sys/net/{family}/conf/{device}/disable_policy"), value).unwrap();
                };
                switch("ipv4", "default", "1");
                assert_eq!(latches.verify(), []);
                for (family, flow) in [("ipv4", udp_flow(7000)), ("ipv6", ipv6)] {
                    for device in ["eth0", "all"] {
                        switch(family, device, "1");
                        assert_eq!(latches.verify(), [flow], "{family} {device}");
                        switch(family, device, "0");
                        assert_eq!(latches.verify(), []);
                    }
                }
            })
            .unwrap();
    }

    // RFC 5660 §2.3: what comes by an SA of the wrong peer is not received, whatever policies the kernel has it meet.
    #[test]
    fn nothing_comes_by_an_interface_to_what_is_latched() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                let (flow, left) = (udp_flow(7000), udp_flow(7001));
                let elsewhere = Flow { remote: "10.3.0.1".parse().unwrap(), ..udp_flow(7002) };
                for flow in [flow, left, elsewhere] {
                    latches.set(&flow, Passage::None).unwrap();
                }
                latches.abandon(&left);
                latches.set_port(&port(), &[]).unwrap();
                let sa = |spi_in, if_id_in, destination| Described { if_id_in, ..pair(spi_in, 2, 40, destination) };
                assert_eq!(latches.bar(&sa(1, 0, ("10.2.0.0", 24))), Ok(true));
                assert_eq!(ip("xfrm policy").matches("if_id").count(), 0);
                // Two flows, and the port.
                let mut first = sa(2, 7, ("10.2.0.0", 24));
                first.selectors[0].protocol = 6;
                assert_eq!(
                    latches.bar(&first),
                    Ok(true),
                    "the kernel may take more than what the policies of an SA say"
                );
                assert_eq!(latches.bar(&first), Ok(false));
                assert_eq!(barred("0x7"), 3);
                assert_eq!(latches.bar(&sa(3, 7, ("10.2.0.1", 32))), Ok(true));
                assert_eq!(latches.bar(&sa(4, 8, ("10.3.0.0", 16))), Ok(true));
                assert_eq!((barred("0x7"), barred("0x8")), (3, 2));
                // What is latched later.
                latches.set(&udp_flow(7005), Passage::None).unwrap();
                let other = guard::Port { number: 7003, ..port() };
                latches.set_port(&other, &[]).unwrap();
                assert_eq!((barred("0x7"), barred("0x8")), (5, 3));
                latches.verify();
                ip("xfrm policy flush");
                latches.verify();
                assert_eq!((barred("0x7"), barred("0x8")), (5, 3));
                // What has had its time.
                latches.lift(&left);
                latches.abandon(&udp_flow(7005));
                latches.lift(&udp_flow(7005));
                latches.lift_port(&other);
                assert_eq!((barred("0x7"), barred("0x8")), (2, 2));
                // The last SA.
                latches.unbar(2);
                assert_eq!(barred("0x7"), 2);
                latches.unbar(3);
                latches.unbar(3);
                assert_eq!((barred("0x7"), barred("0x8")), (0, 2));
                // Killed: the SAs of a predecessor go before the successor looks.
                drop(latches);
                let successor = Latches::open(TUN, true).unwrap();
                assert_eq!(ip("xfrm policy").matches("if_id").count(), 0);
                assert_eq!((successor.abandoned().len(), successor.abandoned_ports().len()), (2, 1));
                assert_eq!(successor.bar(&sa(4, 8, ("10.2.0.0", 15))), Ok(true));
                assert_eq!(barred("0x8"), 3);
                successor.verify();
                successor.all_unbarred();
                successor.lift(&flow);
                successor.lift(&elsewhere);
                successor.lift_port(&port());
                assert_eq!(ip("xfrm policy"), "");
                assert!(successor.state().pairs.is_empty() && successor.state().by_remote.is_empty());
            })
            .unwrap();
    }

    // A latch's policies have no mark and are for packets with any; of those that fit, the kernel takes the first by priority.
    #[test]
    fn a_packet_s_mark_leads_past_no_latch() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                let marked = |local_port| {
                    let socket = UdpSocket::bind(("10.1.0.1", local_port)).unwrap();
                    socket2::SockRef::from(&socket).set_mark(5).unwrap();
                    socket.send_to(b"x", "10.2.0.1:7001").is_ok()
                };
                ip("xfrm policy add src 10.1.0.0/24 dst 10.2.0.0/24 dir out priority 2 mark 5");
                ip("xfrm policy add src 10.1.0.1 dst 10.2.0.1 proto udp dport 7001 dir out priority 2 mark 5");
                latches.set(&udp_flow(7000), Passage::None).unwrap();
                assert!(!marked(7000) && !sends(7000));
                assert!(marked(7005) && sends(7005));
            })
            .unwrap();
    }

    // Fail closed: where its policies have no room, an SA may not be.
    #[test]
    fn an_sa_with_an_interface_is_refused_where_it_could_not_be_barred() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                let sa = |spi_in, if_id_in| Described { if_id_in, ..pair(spi_in, 2, 40, ("10.2.0.0", 24)) };
                latches.state().limits = Limits { of_pair: 3, of_all: 4 };
                latches.set(&udp_flow(7000), Passage::None).unwrap();
                latches.set(&udp_flow(7005), Passage::None).unwrap();
                assert!(latches.bar(&sa(1, 7)).unwrap_err().contains("3 policies for flows between"));
                assert_eq!(ip("xfrm policy").matches("if_id").count(), 0, "nothing is left of it");
                latches.abandon(&udp_flow(7005));
                latches.lift(&udp_flow(7005));
                latches.bar(&sa(1, 7)).unwrap();
                latches.bar(&sa(2, 8)).unwrap();
                assert!(latches.set(&udp_flow(7005), Passage::None).is_err());
                assert!(latches.bar(&sa(3, 9)).is_err());
                latches.unbar(2);
                let other = Flow { remote: "10.3.0.1".parse().unwrap(), ..udp_flow(7000) };
                latches.set(&other, Passage::None).unwrap();
                assert!(latches.set(&udp_flow(7005), Passage::None).is_err(), "it would take two");
                assert_eq!(ip("xfrm policy").matches("sport 7005").count(), 0);
                assert_eq!((barred("0x7"), barred("0x8"), barred("0x9")), (1, 0, 0));
                latches.verify();
            })
            .unwrap();
    }

    // RFC 5660 §2: SAs of the class come and go; no other SA is ever demanded, and without one nothing passes.
    #[test]
    fn the_policies_follow_the_sas_of_the_class() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                let both = |reqid: Option<u32>| {
                    let reqid = reqid.map(|reqid| reqid.to_string());
                    assert_eq!(demanded(), [reqid.clone(), reqid]);
                };
                latches.set(&udp_flow(7000), Passage::Class(ClassId(1))).unwrap();
                both(None);
                latches.installed(&pair(1, 1, 40, ("10.2.0.0", 24)));
                both(Some(40));
                assert!(ip("xfrm policy").contains("tmpl src 192.0.2.1 dst 192.0.2.2"));
                // Another class, for whatever; and its own for other packets.
                latches.installed(&pair(2, 2, 41, ("10.2.0.1", 32)));
                latches.installed(&pair(3, 1, 42, ("10.3.0.0", 24)));
                both(Some(40));
                // As the kernel chooses: the narrower one, of equal ones the newest.
                latches.installed(&pair(4, 1, 43, ("10.2.0.1", 32)));
                both(Some(43));
                latches.installed(&pair(5, 1, 44, ("10.2.0.0", 24)));
                both(Some(43));
                latches.removed(4);
                both(Some(44));
                let (local, remote) = ("192.0.2.1".parse().unwrap(), "198.51.100.2".parse().unwrap());
                latches.moved(5, &Encapsulation::None { local, remote });
                assert!(ip("xfrm policy").contains("tmpl src 192.0.2.1 dst 198.51.100.2"));
                latches.set(&udp_flow(7000), Passage::None).unwrap();
                both(None);
                latches.set(&udp_flow(7000), Passage::Class(ClassId(1))).unwrap();
                latches.removed(5);
                both(Some(40));
                // Somebody empties the kernel's databases.
                ip("xfrm policy flush");
                latches.verify();
                both(Some(40));
                latches.verify();
                latches.removed(1);
                both(None);
                let special = Described { special: true, ..pair(6, 1, 45, ("10.2.0.0", 24)) };
                latches.installed(&special);
                both(None);
                assert!(latches.set(&udp_flow(7005), Passage::Class(ClassId(1))).unwrap_err().contains("marks"));
                latches.all_removed();
                both(None);
            })
            .unwrap();
    }

    #[test]
    fn ipv6_packets_may_go_into_the_tunnel_s_device() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, false).unwrap();
                let (local, remote) = ("fd01::1".parse().unwrap(), "fd02::1".parse().unwrap());
                let flow = Flow { local, remote, ..udp_flow(7000) };
                latches.set(&flow, Passage::Class(ClassId(1))).unwrap();
                let policies = ip("xfrm policy");
                assert_eq!((policies.matches("action block").count(), policies.matches("dir out").count()), (1, 2));
                assert!(policies.contains(&format!("dev if{TUN}")), "{policies}");
                drop(latches);
                // The device of the successor is another one.
                let successor = Latches::open(TUN + 1, false).unwrap();
                let policies = ip("xfrm policy");
                assert!(policies.contains(&format!("dev if{}", TUN + 1)), "{policies}");
                assert!(!policies.contains(&format!("dev if{TUN} ")), "{policies}");
                successor.lift(&flow);
                assert_eq!(ip("xfrm policy"), "");
            })
            .unwrap();
    }

    /// How many policies drop all, and how many demand an SA.
    fn counted() -> (usize, usize) {
        let text = ip("xfrm policy");
        (text.matches("action block").count(), text.matches("reqid ").count())
    }

    fn port() -> guard::Port {
        guard::Port { protocol: 17, local: "10.1.0.1".parse().unwrap(), number: 7000 }
    }

    fn claim(class: Option<u32>, remote: (&str, u8)) -> Claim {
        let network =
            |(address, prefix): (&str, u8)| vec![TrafficSelector::network(address.parse().unwrap(), prefix).unwrap()];
        Claim {
            passage: class.map_or(Passage::None, |class| Passage::Class(ClassId(class))),
            local_ts: network(("10.1.0.0", 24)),
            remote_ts: network(remote),
        }
    }

    // RFC 5660 §2.3: a connection comes by the SA that covers its other end, or not at all, whatever becomes of the daemon.
    #[test]
    fn a_port_is_closed_but_to_what_its_claims_admit_even_when_the_process_is_gone() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                latches.set_port(&port(), &[]).unwrap();
                assert!(!sends(7000) && sends(7002));
                latches.installed(&pair(1, 1, 40, ("10.2.0.0", 24)));
                assert_eq!(counted(), (2, 0), "nobody may come by it");
                latches.set_port(&port(), &[claim(Some(1), ("10.2.0.0", 24))]).unwrap();
                assert_eq!(counted(), (2, 2));
                // A latch goes before.
                latches.set(&udp_flow(7000), Passage::None).unwrap();
                assert!(ip("xfrm policy").contains("priority 1 "));
                latches.verify();
                // Somebody empties the kernel's databases.
                ip("xfrm policy flush");
                latches.verify();
                assert_eq!(counted(), (4, 2));
                // Killed.
                drop(latches);
                let successor = Latches::open(TUN, true).unwrap();
                assert_eq!(counted(), (4, 0));
                assert_eq!((successor.abandoned_ports(), successor.abandoned()), (vec![port()], vec![udp_flow(7000)]));
                successor.lift(&udp_flow(7000));
                assert!(!sends(7000));
                successor.verify();
                // A new listener has it.
                successor.set_port(&port(), &[]).unwrap();
                assert_eq!(successor.abandoned_ports(), []);
                successor.lift_port(&port());
                assert_eq!(ip("xfrm policy"), "");
            })
            .unwrap();
    }

    // RFC 5660 §2.3: "MUST NOT be created if there exist conflicting SAs".
    #[test]
    fn nobody_comes_from_where_sas_of_different_classes_meet() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                latches.installed(&pair(1, 1, 40, ("10.2.0.0", 24)));
                latches.installed(&pair(2, 2, 41, ("10.2.0.128", 25)));
                latches.installed(&pair(3, 1, 42, ("10.2.0.0", 28)));
                let all = [
                    claim(Some(1), ("10.2.0.0", 24)),
                    claim(Some(2), ("10.2.0.128", 25)),
                    claim(None, ("10.2.0.64", 26)),
                    claim(Some(1), ("10.2.0.0", 28)),
                ];
                latches.set_port(&port(), &all).unwrap();
                let text = ip("xfrm policy");
                let outbound = |destination: &str| {
                    let at = text.find(&format!("src 10.1.0.1/32 dst {destination} ")).unwrap();
                    let policy = &text[at..];
                    policy[..policy[4..].find("src 10.").map_or(policy.len(), |end| end + 4)].to_owned()
                };
                for destination in ["10.2.0.128/25", "10.2.0.64/26"] {
                    let policy = outbound(destination);
                    assert!(policy.contains("action block priority 2 "), "{policy}");
                }
                for (destination, reqid) in [("10.2.0.0/24", "reqid 40"), ("10.2.0.0/28", "reqid 42")] {
                    let policy = outbound(destination);
                    assert!(policy.contains(reqid), "{policy}");
                }
                // The other class's SA goes: first from the kernel.
                latches.removed(2);
                assert!(ip("xfrm policy").contains("10.2.0.128/25"), "until nobody claims it any more");
                latches.set_port(&port(), &[all[0].clone(), all[3].clone()]).unwrap();
                let text = ip("xfrm policy");
                assert!(!text.contains("/25") && !text.contains("/26") && text.contains("reqid 40"), "{text}");
                latches.moved(
                    1,
                    &Encapsulation::None {
                        local: "192.0.2.1".parse().unwrap(),
                        remote: "198.51.100.2".parse().unwrap(),
                    },
                );
                assert!(ip("xfrm policy").contains("tmpl src 192.0.2.1 dst 198.51.100.2"));
                latches.all_removed();
                assert_eq!(counted(), (2, 0));
                latches.lift_port(&port());
                assert_eq!(ip("xfrm policy"), "");
            })
            .unwrap();
    }

    #[test]
    fn a_port_of_all_addresses_has_what_the_selectors_leave_of_it() {
        host()
            .run(|| {
                let latches = Latches::open(TUN, true).unwrap();
                let any = guard::Port { protocol: 6, local: "::".parse().unwrap(), number: 80 };
                latches.set_port(&any, &[claim(Some(1), ("10.2.0.0", 24))]).unwrap();
                let text = ip("xfrm policy");
                assert_eq!(text.matches("action block").count(), 2, "{text}");
                assert!(
                    text.contains("src ::/0 dst ::/0 proto tcp sport 80") && text.contains(&format!("dev if{TUN}"))
                );
                drop(latches);
                let successor = Latches::open(TUN + 1, true).unwrap();
                assert_eq!(successor.abandoned_ports(), [any]);
                assert!(!ip("xfrm policy").contains(&format!("dev if{TUN} ")));
                successor.lift_port(&any);
                let any = guard::Port { local: "0.0.0.0".parse().unwrap(), ..any };
                successor.installed(&pair(1, 1, 40, ("10.2.0.0", 24)));
                successor.set_port(&any, &[claim(Some(1), ("10.2.0.0", 24))]).unwrap();
                assert!(ip("xfrm policy").contains("src 10.1.0.0/24 dst 10.2.0.0/24 proto tcp sport 80"));
                let most = vec![claim(Some(1), ("10.2.0.0", 24)); 3];
                successor.set_port(&any, &most).unwrap();
                successor.lift_port(&any);
                assert_eq!(ip("xfrm policy"), "");
            })
            .unwrap();
    }
}
