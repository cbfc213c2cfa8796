//! What is installed, and the kernel's databases kept like it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ipsec::guard::ClassId;
use ipsec::plane::{
    Encapsulation, EspKeys, EspSuite, Lifetime, Mark, Mode, Offload, PlaneError, PlaneEvent, SaPair, Shunt,
    ShuntAction, Trap, Usage,
};
use ipsec::selector::Flow;
use rustix::io::Errno;

use super::codec::{
    Action, Direction, Ends, Event, Policy, PolicyId, Selector, State, StateId, StateReport, Template, flag,
};
use super::descriptions::{Links, ends, hull, inbound, outbound, policies, policy};
use super::priority::Purpose;
use super::shape::Shape;
use super::socket::{Databases, XfrmSocket, errno};
use super::{selectors, suite};

/// The installed pairs, traps and shunts.
pub(super) struct Tables<D = XfrmSocket> {
    databases: D,
    /// On the ESP packets that the kernel sends, so that they pass by the table of our routes.
    mark: u32,
    pairs: BTreeMap<u32, Pair>,
    /// Inbound SPIs of the pairs of a `reqid`, oldest first.
    reqids: HashMap<u32, Vec<u32>>,
    /// Inbound SPIs by the names of both states.
    states: HashMap<StateId, u32>,
    traps: BTreeMap<u32, Vec<PolicyId>>,
    shunts: BTreeMap<u32, Vec<PolicyId>>,
    /// Policies around the tunnel of user space.
    around: BTreeMap<Owner, Vec<PolicyId>>,
    /// Who wants a policy of this name, oldest first. The kernel has what [`best`] gives.
    policies: HashMap<PolicyId, Vec<Wish>>,
    /// Inbound SPIs of pairs whose peer is not ready.
    waiting: Vec<u32>,
    /// Which kinds of states the kernel has been seen to understand.
    understood: HashSet<Shape>,
    /// When the counters of all were read.
    read_at: Option<Instant>,
    /// Something went wrong, or somebody else was at the databases: they may be otherwise than they should.
    suspect: bool,
}

/// An installed pair.
struct Pair {
    reqid: u32,
    inbound: StateId,
    outbound: StateId,
    /// ESP travels in a TCP stream.
    in_stream: bool,
    /// In transport mode in UDP or TCP: whose it is, and the peer's port.
    natted: Option<(ClassId, u16)>,
    /// Marks that are part of the names of both states.
    marks: (Mark, Mark),
    sending: Sending,
    policies: Vec<PolicyId>,
    /// Those policies while they are withdrawn.
    withdrawn: Vec<Policy>,
    counters: [Counter; 2],
    /// The kernel has lost one of its states, and the key manager knows.
    lost: bool,
}

/// What the outbound SA does.
enum Sending {
    /// It is installed.
    Yes,
    /// Not before the peer is ready for it.
    Waits(Box<Outbound>),
    /// Never again.
    Retired,
}

/// An outbound SA that is not installed.
struct Outbound {
    state: State,
    may_do_without: bool,
    suite: EspSuite,
    keys: EspKeys,
}

/// What was last read of a state.
#[derive(Clone, Copy, Default)]
struct Counter {
    bytes: u64,
    packets: u64,
    changed_at: Option<Instant>,
}

impl Counter {
    fn note(&mut self, report: &StateReport) {
        if report.packets != self.packets {
            self.changed_at = Some(last_used(report));
        }
        (self.bytes, self.packets) = (report.bytes, report.packets);
    }
}

/// Somebody's wish for a policy.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Wish {
    owner: Owner,
    policy: Policy,
}

/// Whose wish a policy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    /// A pair that the kernel carries, by its inbound SPI.
    Pair(u32),
    /// A trap, by its `reqid`.
    Trap(u32),
    /// A shunt, by its number.
    Shunt(u32),
    /// A pair that user space carries, by its inbound SPI.
    Around(u32),
    /// What all policies around the tunnel of user space need, for IPv6 or for IPv4.
    Common {
        /// Which.
        ipv6: bool,
    },
}

/// The wish that the kernel carries out: the first by priority, of equal ones the newest.
fn best(wishes: &[Wish]) -> Option<&Policy> {
    wishes.iter().rev().map(|wish| &wish.policy).min_by_key(|policy| policy.priority)
}

impl<D: Databases> Tables<D> {
    pub(super) fn new(databases: D, mark: u32) -> Self {
        Self {
            databases,
            mark,
            pairs: BTreeMap::new(),
            reqids: HashMap::new(),
            states: HashMap::new(),
            traps: BTreeMap::new(),
            shunts: BTreeMap::new(),
            around: BTreeMap::new(),
            policies: HashMap::new(),
            waiting: Vec::new(),
            understood: HashSet::new(),
            read_at: None,
            suspect: false,
        }
    }

    #[cfg(test)]
    pub(super) fn databases(&mut self) -> &mut D {
        &mut self.databases
    }

    /// Removes states and policies that are ours and in no table; says how many.
    pub(super) fn remove_leftovers(&mut self) -> io::Result<(usize, usize)> {
        let policies = self.databases.policies()?;
        let mut removed = (0, 0);
        for policy in policies.iter().filter(|policy| policy.ours && !self.policies.contains_key(&policy.id)) {
            removed.1 += usize::from(self.databases.delete_policy(&policy.id)?);
        }
        let states = self.databases.states()?;
        for state in states.iter().filter(|state| state.ours && !self.states.contains_key(&state.id)) {
            removed.0 += usize::from(self.databases.delete_state(state.id, state.mark)?);
        }
        Ok(removed)
    }

    /// Installs states and policies of a pair, or nothing.
    pub(super) fn install(&mut self, pair: SaPair, links: &Links) -> Result<(), PlaneError> {
        let spi_in = pair.spi_in;
        if self.pairs.contains_key(&spi_in) {
            return Err(PlaneError::SpiInUse(spi_in));
        }
        let selectors = selectors::outbound(&pair.local_ts, &pair.remote_ts, links.interface)?;
        let ends = ends(&pair.encapsulation);
        let hull = hull(pair.mode, &selectors)?;
        let (incoming, outgoing) = (inbound(&pair, &ends, hull, links), outbound(&pair, &ends, hull, links, self.mark));
        let policies = policies(&pair, &ends, &selectors);
        let natted = ends.ports.filter(|_| pair.mode == Mode::Transport).map(|ports| (pair.class, ports.destination));
        if natted.is_some_and(|natted| self.has_other_behind_nat(natted, &policies)) {
            let nat = ends.destination;
            let what = format!(
                "transport mode with a second peer behind the NAT {nat} (the kernel's policies do not tell them apart; \
                 plane = userspace does, and marks do)"
            );
            return Err(PlaneError::Unsupported { plane: super::NAME, what });
        }

        let may_do_without = pair.options.offload == Offload::Auto;
        self.add_offloaded(&incoming, &pair.suite, &pair.keys_in, may_do_without)?;
        let mut installed = Pair {
            reqid: pair.reqid,
            inbound: incoming.id,
            outbound: outgoing.id,
            in_stream: matches!(pair.encapsulation, Encapsulation::Stream { .. }),
            natted,
            marks: (incoming.mark, outgoing.mark),
            sending: Sending::Retired,
            policies: policies.iter().map(|policy| policy.id).collect(),
            withdrawn: Vec::new(),
            counters: Default::default(),
            lost: false,
        };
        let has_predecessor = self.reqids.get(&pair.reqid).is_some_and(|pairs| {
            pairs
                .iter()
                .any(|spi| !matches!(self.pairs.get(spi).map(|pair| &pair.sending), None | Some(Sending::Retired)))
        });
        let outcome = if pair.await_peer && has_predecessor {
            installed.sending = Sending::Waits(Box::new(Outbound {
                state: outgoing,
                may_do_without,
                suite: pair.suite,
                keys: pair.keys_out,
            }));
            Ok(())
        } else {
            // Not before it is: a state of that name may be somebody else's, and is not ours to take away.
            self.add_offloaded(&outgoing, &pair.suite, &pair.keys_out, may_do_without)
                .map(|()| installed.sending = Sending::Yes)
        };
        let wanted = outcome.and_then(|()| self.wish(Owner::Pair(spi_in), &policies));
        if let Err(e) = wanted {
            if matches!(installed.sending, Sending::Yes) {
                self.remove_state(installed.outbound, installed.marks.1);
            }
            self.remove_state(installed.inbound, installed.marks.0);
            return Err(e);
        }
        if matches!(installed.sending, Sending::Waits(_)) {
            self.waiting.push(spi_in);
        }
        self.states.insert(installed.inbound, spi_in);
        self.states.insert(installed.outbound, spi_in);
        self.reqids.entry(pair.reqid).or_default().push(spi_in);
        self.pairs.insert(spi_in, installed);
        Ok(())
    }

    /// True when some of these policies are also those of another peer at another port of the same address (RFC 3948 §5.2).
    /// Who comes back from another port with the same proofs is the same peer, and takes its own place.
    fn has_other_behind_nat(&self, (class, port): (ClassId, u16), policies: &[Policy]) -> bool {
        let wishes = policies.iter().filter_map(|policy| self.policies.get(&policy.id)).flatten();
        let others = wishes.filter_map(|wish| match wish.owner {
            Owner::Pair(spi_in) => self.pairs.get(&spi_in)?.natted,
            Owner::Trap(_) | Owner::Shunt(_) | Owner::Around(_) | Owner::Common { .. } => None,
        });
        others.into_iter().any(|(other, other_port)| other != class && other_port != port)
    }

    /// Installs a state, if need be without the help of a device.
    fn add_offloaded(
        &mut self,
        state: &State,
        suite: &EspSuite,
        keys: &EspKeys,
        may_do_without: bool,
    ) -> Result<(), PlaneError> {
        match self.add_state(state, suite, keys) {
            Err(error) if may_do_without && state.offload.is_some() && !matches!(error, PlaneError::SpiInUse(_)) => {
                tracing::info!(%error, "no hardware offload");
                self.add_state(&State { offload: None, ..state.clone() }, suite, keys)
            }
            outcome => outcome,
        }
    }

    /// Installs a state, and if it is the first of its kind makes sure that the kernel understood it as it was meant.
    fn add_state(&mut self, state: &State, suite: &EspSuite, keys: &EspKeys) -> Result<(), PlaneError> {
        let algorithms = suite::algorithms(suite, keys)?;
        let name = describe(state.id);
        let added = self.databases.add_state(state, &algorithms);
        if added.as_ref().is_err_and(may_be_done) {
            // If there is one of this name, it may be somebody else's.
            match self.databases.state(state.id, state.mark) {
                Ok(Some(report)) if report.ours => self.remove_state(state.id, state.mark),
                Ok(_) => {}
                Err(_) => self.suspect = true,
            }
        }
        added.map_err(|e| match errno(&e) {
            Some(Errno::EXIST) => PlaneError::SpiInUse(state.id.spi),
            Some(Errno::NOSYS | Errno::PROTONOSUPPORT) => PlaneError::Unsupported {
                plane: super::NAME,
                what: format!(
                    "{} ({e})",
                    algorithms.iter().map(|(algorithm, _)| algorithm.name).collect::<Vec<_>>().join(" with ")
                ),
            },
            _ => system(format!("install the state of {name}"), e),
        })?;
        let shape = Shape::of(state);
        if self.understood.contains(&shape) {
            return Ok(());
        }
        let read_back = self.databases.state(state.id, state.mark);
        let complaint = match &read_back {
            Ok(Some(report)) => difference(state, report),
            Ok(None) => Some("it is gone".to_owned()),
            Err(e) => Some(e.to_string()),
        };
        match complaint {
            None => {
                self.understood.insert(shape);
                Ok(())
            }
            Some(complaint) => {
                self.remove_state(state.id, state.mark);
                let e = io::Error::new(io::ErrorKind::InvalidData, complaint);
                Err(system(format!("read the state of {name} back"), e))
            }
        }
    }

    fn remove_state(&mut self, id: StateId, mark: Mark) {
        if let Err(e) = self.databases.delete_state(id, mark) {
            tracing::error!("remove the state of {}: {e}; it is tried again", describe(id));
            self.suspect = true;
        }
    }

    /// Adds the wishes of an owner, all of them or on error none.
    fn wish(&mut self, owner: Owner, policies: &[Policy]) -> Result<(), PlaneError> {
        for (done, policy) in policies.iter().enumerate() {
            if let Err(e) = self.wish_one(Wish { owner, policy: *policy }) {
                for policy in policies.iter().take(done) {
                    self.forget(owner, &policy.id);
                }
                return Err(system(format!("install the policy {}", policy.id), e));
            }
        }
        Ok(())
    }

    fn wish_one(&mut self, wish: Wish) -> io::Result<()> {
        let wishes = self.policies.entry(wish.policy.id).or_default();
        let before = best(wishes).copied();
        wishes.push(wish);
        let after = best(wishes).copied();
        let outcome = match (before, after) {
            (None, Some(policy)) => add_policy(&mut self.databases, &policy),
            (Some(before), Some(after)) if before != after => self.databases.set_policy(&after),
            _ => Ok(()),
        };
        if let Err(e) = &outcome {
            wishes.pop();
            if wishes.is_empty() {
                self.policies.remove(&wish.policy.id);
            }
            if may_be_done(e) {
                let undone = match &before {
                    None => self.databases.delete_policy(&wish.policy.id).map(|_| ()),
                    Some(before) => self.databases.set_policy(before),
                };
                self.suspect |= undone.is_err();
            }
        }
        outcome
    }

    /// Withdraws the wish of an owner: the next best comes into force, or the policy goes.
    fn forget(&mut self, owner: Owner, id: &PolicyId) {
        let Some(wishes) = self.policies.get_mut(id) else { return };
        let before = best(wishes).copied();
        wishes.retain(|wish| wish.owner != owner);
        let outcome = match best(wishes).copied() {
            None => {
                self.policies.remove(id);
                self.databases.delete_policy(id).map(|_| ())
            }
            after if after == before => Ok(()),
            Some(after) => self.databases.set_policy(&after),
        };
        if let Err(e) = outcome {
            tracing::error!("change or remove a policy: {e}; it is tried again");
            self.suspect = true;
        }
    }

    /// True when the kernel has a state of this inbound SPI for us.
    pub(super) fn receives(&self, spi_in: u32) -> bool {
        self.pairs.contains_key(&spi_in)
    }

    /// Moves the states of a pair to other ends, and then its policies. What fails half-way stays half moved: nothing comes
    /// through, and the key manager hears of it.
    pub(super) fn migrate(&mut self, spi_in: u32, to: &Encapsulation) -> Result<(), PlaneError> {
        let in_stream = matches!(to, Encapsulation::Stream { .. });
        let to = ends(to);
        let pair = self.pairs.get_mut(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?;
        let (inbound, outbound, marks) = (pair.inbound, pair.outbound, pair.marks);
        let sends = match &mut pair.sending {
            Sending::Yes => true,
            Sending::Waits(waiting) => {
                waiting.state.id.destination = to.destination;
                (waiting.state.source, waiting.state.encapsulation) = (to.source, to.ports);
                false
            }
            Sending::Retired => false,
        };
        let policies = pair.policies.clone();
        let received = self.databases.move_state(inbound, marks.0, &to.reversed());
        let sent = if sends { self.databases.move_state(outbound, marks.1, &to) } else { Ok(()) };
        // What could not be moved keeps its name: the other may be that of somebody else's state.
        if let Some(pair) = self.pairs.get_mut(&spi_in) {
            if received.is_ok() {
                (pair.inbound.destination, pair.in_stream) = (to.source, in_stream);
            }
            if sent.is_ok() {
                pair.outbound.destination = to.destination;
            }
            self.states.remove(&inbound);
            self.states.remove(&outbound);
            self.states.insert(pair.inbound, spi_in);
            self.states.insert(pair.outbound, spi_in);
        }
        let led = policies.iter().try_for_each(|id| self.lead(Owner::Pair(spi_in), id, &to));
        let moved = received.and(sent).and(led);
        moved.map_err(|e| system(format!("move {} to {}", describe(inbound), to.destination), e))
    }

    /// Points a policy at other ends, if it names any.
    fn lead(&mut self, owner: Owner, id: &PolicyId, to: &Ends) -> io::Result<()> {
        let Some(wishes) = self.policies.get_mut(id) else { return Ok(()) };
        let before = best(wishes).copied();
        for wish in wishes.iter_mut().filter(|wish| wish.owner == owner) {
            if let Action::Protect(template) = &mut wish.policy.action
                && template.mode == Mode::Tunnel
            {
                let ends = if id.direction == Direction::Out { *to } else { to.reversed() };
                (template.source, template.destination) = (ends.source, ends.destination);
            }
        }
        match best(wishes).copied() {
            Some(after) if before != Some(after) => self.databases.set_policy(&after),
            _ => Ok(()),
        }
    }

    /// Withdraws the policies of a `reqid`'s pairs, or brings them back.
    pub(super) fn step_aside(&mut self, reqid: u32, aside: bool) {
        for spi_in in self.reqids.get(&reqid).cloned().unwrap_or_default() {
            let owner = Owner::Pair(spi_in);
            let Some(pair) = self.pairs.get_mut(&spi_in) else { continue };
            if !aside {
                let withdrawn = std::mem::take(&mut pair.withdrawn);
                if let Err(error) = self.wish(owner, &withdrawn) {
                    tracing::error!(%error, "policies could not be brought back");
                }
            } else if pair.withdrawn.is_empty() {
                let policies = pair.policies.clone();
                let wishes = policies.iter().filter_map(|id| self.policies.get(id)).flatten();
                let withdrawn = wishes.filter(|wish| wish.owner == owner).map(|wish| wish.policy).collect();
                for id in &policies {
                    self.forget(owner, id);
                }
                if let Some(pair) = self.pairs.get_mut(&spi_in) {
                    pair.withdrawn = withdrawn;
                }
            }
        }
    }

    /// Stops sending under a pair; receiving goes on.
    pub(super) fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        let pair = self.pairs.get(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?;
        let (reqid, outbound, mark) = (pair.reqid, pair.outbound, pair.marks.1);
        self.release_waiting(reqid, spi_in);
        let _ = self.read(spi_in, Direction::Out);
        let pair = self.pairs.get_mut(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?;
        if matches!(std::mem::replace(&mut pair.sending, Sending::Retired), Sending::Yes) {
            self.remove_state(outbound, mark);
        }
        self.waiting.retain(|waiting| *waiting != spi_in);
        Ok(())
    }

    /// Removes a pair; the policies that nobody else wants go with it.
    pub(super) fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        let reqid = self.pairs.get(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?.reqid;
        self.release_waiting(reqid, spi_in);
        let Some(pair) = self.pairs.remove(&spi_in) else { return Ok(()) };
        self.waiting.retain(|waiting| *waiting != spi_in);
        self.states.remove(&pair.inbound);
        self.states.remove(&pair.outbound);
        if let Some(pairs) = self.reqids.get_mut(&reqid) {
            pairs.retain(|other| *other != spi_in);
            if pairs.is_empty() {
                self.reqids.remove(&reqid);
            }
        }
        if matches!(pair.sending, Sending::Yes) {
            self.remove_state(pair.outbound, pair.marks.1);
        }
        self.remove_state(pair.inbound, pair.marks.0);
        // The policies last: what they select is dropped rather than sent in clear.
        for id in &pair.policies {
            self.forget(Owner::Pair(spi_in), id);
        }
        Ok(())
    }

    /// The pairs of a `reqid` that wait need wait no longer: `leaving` is not there to send in their place.
    fn release_waiting(&mut self, reqid: u32, leaving: u32) {
        let successors: Vec<u32> =
            self.reqids.get(&reqid).into_iter().flatten().copied().filter(|spi| *spi != leaving).collect();
        for spi in successors {
            self.send_under(spi);
        }
    }

    /// Installs the outbound SA of a pair that waits.
    fn send_under(&mut self, spi_in: u32) {
        let Some(pair) = self.pairs.get_mut(&spi_in) else { return };
        if !matches!(pair.sending, Sending::Waits(_)) {
            return;
        }
        let Sending::Waits(outbound) = std::mem::replace(&mut pair.sending, Sending::Yes) else { return };
        self.waiting.retain(|waiting| *waiting != spi_in);
        if let Err(error) =
            self.add_offloaded(&outbound.state, &outbound.suite, &outbound.keys, outbound.may_do_without)
        {
            tracing::error!(%error, "the outbound SA of a successor could not be installed");
            if let Some(pair) = self.pairs.get_mut(&spi_in) {
                pair.sending = Sending::Retired;
            }
        }
    }

    /// Says that the databases may be otherwise than they should.
    pub(super) fn suspect(&mut self) {
        self.suspect = true;
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.suspect
    }

    /// Compares the kernel's databases with the tables, if there is a reason to. Policies are put right. A state that is
    /// gone cannot be: its keys are nowhere else. The pair is reported as expired; until the key manager has removed it,
    /// its policies drop what it was for.
    pub(super) fn put_right(&mut self) -> io::Result<Vec<PlaneEvent>> {
        if !std::mem::take(&mut self.suspect) {
            return Ok(Vec::new());
        }
        let outcome = self.compare();
        self.suspect |= outcome.is_err();
        outcome
    }

    fn compare(&mut self) -> io::Result<Vec<PlaneEvent>> {
        let (states, policies) = self.remove_leftovers()?;
        if (states, policies) != (0, 0) {
            tracing::warn!(states, policies, "removed what should not have been in the kernel any more");
        }
        let there: HashMap<PolicyId, (u32, bool, Vec<u32>)> = (self.databases.policies()?.into_iter())
            .filter(|policy| policy.ours)
            .map(|policy| (policy.id, (policy.priority, policy.blocks, policy.reqids)))
            .collect();
        for wishes in self.policies.values() {
            let Some(policy) = best(wishes) else { continue };
            let reqids = match policy.action {
                Action::Protect(Template { reqid, .. }) => Vec::from([reqid]),
                Action::Pass | Action::Drop => Vec::new(),
            };
            let outcome = match there.get(&policy.id) {
                None => put_policy(&mut self.databases, policy),
                Some(policy_there) if *policy_there == (policy.priority, policy.action == Action::Drop, reqids) => {
                    continue;
                }
                Some(_) => self.databases.set_policy(policy),
            };
            outcome?;
            tracing::warn!(policy = %policy.id, "somebody removed or changed a policy of ours; it is put right");
        }
        let there: HashSet<StateId> =
            (self.databases.states()?.into_iter()).filter(|state| state.ours).map(|state| state.id).collect();
        let mut events = Vec::new();
        for (spi_in, pair) in &mut self.pairs {
            let sends = matches!(pair.sending, Sending::Yes);
            // What a dump does not show while others change the database is asked for by name.
            let mut exists = |id: &StateId, mark| {
                Ok::<_, io::Error>(there.contains(id) || self.databases.state(*id, mark)?.is_some())
            };
            let whole = exists(&pair.inbound, pair.marks.0)? && (!sends || exists(&pair.outbound, pair.marks.1)?);
            if !whole && !pair.lost {
                if events.len() >= LOST_AT_ONCE {
                    // The way up to the daemon has room for so many: the rest comes with the next look.
                    self.suspect = true;
                    break;
                }
                pair.lost = true;
                tracing::warn!("{}: the kernel has lost it; it is rekeyed", describe(pair.inbound));
                // A rekey replaces it, and until then its policies drop what it was for.
                events.push(PlaneEvent::Expire { spi_in: *spi_in, hard: false });
            }
        }
        Ok(events)
    }

    /// True while something is to be looked after that the kernel brings no news of.
    pub(super) fn needs_care(&self) -> bool {
        self.is_waiting() || self.is_suspect()
    }

    /// True while some peer's first packet is waited for.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Looks whether peers that are waited for have sent something.
    pub(super) fn look_after_waiting(&mut self) {
        for spi_in in self.waiting.clone() {
            if self.read(spi_in, Direction::In).is_ok_and(|counter| counter.packets > 0) {
                self.send_under(spi_in);
            }
        }
    }

    pub(super) fn install_trap(&mut self, trap: &Trap, links: &Links) -> Result<(), PlaneError> {
        if self.traps.contains_key(&trap.reqid) {
            return Err(PlaneError::TrapInUse(trap.reqid));
        }
        let policies: Vec<Policy> = selectors::outbound(&trap.local_ts, &trap.remote_ts, links.interface)?
            .into_iter()
            .map(|selector| {
                // Where an SA will end is not known yet.
                let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
                let template =
                    Template { reqid: trap.reqid, mode: Mode::Tunnel, source: nowhere, destination: nowhere };
                policy(Direction::Out, selector, Purpose::Trap, Action::Protect(template), &trap.options)
            })
            .collect();
        self.wish(Owner::Trap(trap.reqid), &policies)?;
        self.traps.insert(trap.reqid, policies.iter().map(|policy| policy.id).collect());
        Ok(())
    }

    pub(super) fn remove_trap(&mut self, reqid: u32) -> Result<(), PlaneError> {
        let policies = self.traps.remove(&reqid).ok_or(PlaneError::NoSuchTrap(reqid))?;
        for id in &policies {
            self.forget(Owner::Trap(reqid), id);
        }
        Ok(())
    }

    pub(super) fn install_shunt(&mut self, shunt: &Shunt, links: &Links) -> Result<(), PlaneError> {
        if self.shunts.contains_key(&shunt.number) {
            return Err(PlaneError::ShuntInUse(shunt.number));
        }
        let purpose = Purpose::Shunt(shunt.action);
        let action = match shunt.action {
            ShuntAction::Pass => Action::Pass,
            ShuntAction::Drop => Action::Drop,
        };
        let selectors = selectors::outbound(&shunt.local_ts, &shunt.remote_ts, links.interface)?;
        let both_ways = |selector: Selector| {
            let of = |direction, selector| policy(direction, selector, purpose, action, &shunt.options);
            let back = selector.reversed();
            [of(Direction::Out, selector), of(Direction::In, back), of(Direction::Forward, back)]
        };
        let policies: Vec<Policy> = selectors.into_iter().flat_map(both_ways).collect();
        self.wish(Owner::Shunt(shunt.number), &policies)?;
        self.shunts.insert(shunt.number, policies.iter().map(|policy| policy.id).collect());
        Ok(())
    }

    pub(super) fn remove_shunt(&mut self, number: u32) -> Result<(), PlaneError> {
        let policies = self.shunts.remove(&number).ok_or(PlaneError::NoSuchShunt(number))?;
        for id in &policies {
            self.forget(Owner::Shunt(number), id);
        }
        Ok(())
    }

    /// Installs the policies of an owner whose packets user space carries, or on error none.
    pub(super) fn install_around(&mut self, owner: Owner, policies: &[Policy]) -> Result<(), PlaneError> {
        self.wish(owner, policies)?;
        self.around.insert(owner, policies.iter().map(|policy| policy.id).collect());
        Ok(())
    }

    /// Removes them; says which they were.
    pub(super) fn remove_around(&mut self, owner: Owner) -> Vec<PolicyId> {
        let policies = self.around.remove(&owner).unwrap_or_default();
        for id in &policies {
            self.forget(owner, id);
        }
        policies
    }

    /// Counters of a pair.
    pub(super) fn usage(&mut self, spi_in: u32) -> Result<Usage, PlaneError> {
        let now = Instant::now();
        let (received, sent) = if self.pairs.len() > FEW {
            self.read_all(now)?;
            let [received, sent] = self.pairs.get(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?.counters;
            (received, sent)
        } else {
            (self.read(spi_in, Direction::In)?, self.read(spi_in, Direction::Out)?)
        };
        let idle = |counter: &Counter| counter.changed_at.map(|at| now.saturating_duration_since(at));
        Ok(Usage {
            bytes_in: received.bytes,
            packets_in: received.packets,
            idle_in: idle(&received),
            bytes_out: sent.bytes,
            packets_out: sent.packets,
            idle_out: idle(&sent),
        })
    }

    /// Reads the counters of all states at once, unless that was a moment ago: one by one, many would take too long.
    fn read_all(&mut self, now: Instant) -> Result<(), PlaneError> {
        if self.read_at.is_some_and(|at| now.saturating_duration_since(at) < READ_EVERY) {
            return Ok(());
        }
        let reports = self.databases.states().map_err(|e| system("read all counters".to_owned(), e))?;
        self.read_at = Some(now);
        for report in reports.iter().filter(|report| report.ours) {
            let Some(pair) = self.states.get(&report.id).and_then(|spi_in| self.pairs.get_mut(spi_in)) else {
                continue;
            };
            let [received, sent] = &mut pair.counters;
            let counter = if report.id == pair.inbound { received } else { sent };
            counter.note(report);
        }
        Ok(())
    }

    /// Reads the counters of one state; those of a state that is gone stay as they were.
    fn read(&mut self, spi_in: u32, direction: Direction) -> Result<Counter, PlaneError> {
        let pair = self.pairs.get_mut(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?;
        let [received, sent] = &mut pair.counters;
        let (id, mark, counter, installed) = match direction {
            Direction::Out => (pair.outbound, pair.marks.1, sent, matches!(pair.sending, Sending::Yes)),
            Direction::In | Direction::Forward => (pair.inbound, pair.marks.0, received, true),
        };
        if installed {
            let report = self.databases.state(id, mark);
            let report = report.map_err(|e| system(format!("read the counters of {}", describe(id)), e))?;
            if let Some(report) = report {
                counter.note(&report);
            }
        }
        Ok(*counter)
    }

    /// What the kernel says, in the daemon's words.
    pub(super) fn translate(&mut self, event: &Event) -> Option<PlaneEvent> {
        match event {
            Event::Acquire { reqid, packet } => {
                // An SA's policy without an SA is the key manager's business already.
                self.traps.contains_key(reqid).then(|| PlaneEvent::Acquire { reqid: *reqid, flow: flow(packet) })
            }
            Event::Expire { id, hard } => {
                self.states.get(id).map(|spi_in| PlaneEvent::Expire { spi_in: *spi_in, hard: *hard })
            }
            Event::Mapping { id, remote } => {
                let spi_in = *self.states.get(id)?;
                // IKE says over which stream a peer wants its ESP; packets on another one are taken all the same.
                let in_stream = self.pairs.get(&spi_in)?.in_stream;
                (!in_stream).then_some(PlaneEvent::MappingChanged { spi_in, remote: *remote })
            }
            Event::StateRemoved(id) => {
                self.suspect |= self.states.contains_key(id);
                None
            }
            Event::StatesFlushed | Event::PoliciesChanged | Event::PoliciesFlushed => {
                self.suspect = true;
                None
            }
            Event::LatchesChanged | Event::PolicyRemoved(_) => None,
            Event::Policy(other) => {
                let ours = self.policies.get(&other.id).and_then(|wishes| best(wishes));
                if ours.is_some_and(|ours| other.priority <= ours.priority) {
                    tracing::error!(
                        policy = %other.id,
                        "another key manager has installed a policy for the same packets as ours"
                    );
                }
                None
            }
        }
    }

    /// Removes all that is installed.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        let mut outcome = Ok(());
        for (_, pair) in std::mem::take(&mut self.pairs) {
            if matches!(pair.sending, Sending::Yes) {
                outcome = outcome.and(self.databases.delete_state(pair.outbound, pair.marks.1).map(|_| ()));
            }
            outcome = outcome.and(self.databases.delete_state(pair.inbound, pair.marks.0).map(|_| ()));
        }
        for (id, _) in std::mem::take(&mut self.policies) {
            outcome = outcome.and(self.databases.delete_policy(&id).map(|_| ()));
        }
        self.reqids.clear();
        self.states.clear();
        self.traps.clear();
        self.shunts.clear();
        self.around.clear();
        self.waiting.clear();
        outcome
    }
}

/// Installs a policy that is not there, unless somebody else's for the same packets would go before it.
fn add_policy(databases: &mut impl Databases, policy: &Policy) -> io::Result<()> {
    if let Some(other) = databases.foreign_policy(&policy.id)?
        && other.priority <= policy.priority
    {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("another key manager has one for the same packets (priority {})", other.priority),
        ));
    }
    put_policy(databases, policy)
}

fn put_policy(databases: &mut impl Databases, policy: &Policy) -> io::Result<()> {
    match databases.add_policy(policy) {
        // One of ours that could not be removed.
        Err(e) if errno(&e) == Some(Errno::EXIST) => databases.set_policy(policy),
        outcome => outcome,
    }
}

/// Whether a change that failed so may have been made all the same: the kernel had no memory for its answer.
fn may_be_done(error: &io::Error) -> bool {
    errno(error) == Some(Errno::NOBUFS)
}

/// What the kernel understood otherwise than it was meant.
fn difference(meant: &State, report: &StateReport) -> Option<String> {
    let window = if meant.esn || meant.replay_window > 32 { meant.replay_window } else { meant.replay_window.min(32) };
    let esn = report.flags & flag::ESN != 0;
    if esn != meant.esn {
        return Some(format!("64-bit sequence numbers are {esn}"));
    }
    if report.replay_window != window {
        return Some(format!("the replay window is {} instead of {window}", report.replay_window));
    }
    if (report.source, report.reqid) != (meant.source, meant.reqid) {
        return Some(format!("it is from {} with reqid {}", report.source, report.reqid));
    }
    if report.encapsulation != meant.encapsulation {
        return Some(format!("its ports are {:?}", report.encapsulation));
    }
    if !report.ours || meant.selector.is_some() && report.selector != meant.selector {
        return Some(format!("its selector is {:?}", report.selector));
    }
    if (report.mark, report.if_id, report.set_mark) != (meant.mark, meant.if_id, meant.set_mark) {
        return Some(format!("its marks are {:?}, {:?}, its if_id is {}", report.mark, report.set_mark, report.if_id));
    }
    let limits = |lifetime: &Lifetime| (lifetime.hard_bytes, lifetime.hard_packets);
    if limits(&report.lifetime) != limits(&meant.lifetime) {
        return Some("its limits are others".to_owned());
    }
    None
}

/// The packet of an acquire, which is outbound.
fn flow(packet: &Selector) -> Flow {
    let (mut local_port, mut remote_port) = (packet.source_port.port, packet.destination_port.port);
    if matches!(packet.protocol, ICMP | ICMPV6) {
        // Type and code (RFC 4301 §4.4.1.1).
        let [_, kind] = local_port.to_be_bytes();
        let [_, code] = remote_port.to_be_bytes();
        local_port = u16::from_be_bytes([kind, code]);
        remote_port = local_port;
    } else if local_port == 0 {
        // A socket that is about to connect and has no port yet: it is for any.
        remote_port = 0;
    }
    Flow { protocol: packet.protocol, local: packet.source.0, local_port, remote: packet.destination.0, remote_port }
}

/// When the last packet was, by the kernel's clock if it says so, else now.
fn last_used(report: &StateReport) -> Instant {
    let now = Instant::now();
    let since = report.last_used.and_then(|seconds| {
        let used = UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
        SystemTime::now().duration_since(used).ok()
    });
    since.and_then(|since| now.checked_sub(since)).unwrap_or(now)
}

fn describe(id: StateId) -> String {
    format!("SA {:08x} to {}", id.spi, id.destination)
}

fn system(action: String, source: io::Error) -> PlaneError {
    PlaneError::System { action, source }
}

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Pairs whose counters are read one by one.
const FEW: usize = 32;
const READ_EVERY: Duration = Duration::from_millis(500);
const LOST_AT_ONCE: usize = 256;
