//! Child SAs and their negotiation (RFC 7296 §1.2, §1.3.1, §1.3.3, §2.9, §2.17), for both roles and both
//! exchanges.
//!
//! What a peer gets is the intersection of what it asked for with what the connection that admitted it
//! allows; what a responder answers is checked against what we asked for.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipsec::plane::{Encapsulation, EspSuite, Mode, SaPair, Tags, TfcPadding};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Ke, Prf, Proposal, Protocol};
use pad::{PeerIdentity, Proof};

use super::Core;
use super::configuration::any_address;
use super::fault::{Fault, notify};
use super::first_request::NONCE_LENGTH;
use super::init::{methods, numbered, offers};
use super::parts::{Parts, address_selectors};
use super::retry::{after, random_below};
use super::selectors::{Candidate, Selectors, candidates};
use crate::Rng;
use crate::config::{Child, ConfiguredSelector};
use crate::crypto::{self, AdditionalKe, KeyExchange};
use crate::engine::context::Context;
use crate::engine::triggers::Trigger;
use crate::engine::{
    ChildReady, ChildSaId, ChildSaStatus, ChildState, CloseReason, Installed, Party, Prospect, Protection,
};
use crate::wire::{Configuration, Notify, NotifyType, Payload, WireSelector};

/// A negotiated Child SA.
#[derive(Debug)]
pub(crate) struct ChildSa {
    pub(crate) id: ChildSaId,
    pub(crate) config: Arc<Child>,
    pub(crate) reqid: u32,
    pub(crate) tags: Tags,
    pub(crate) state: ChildState,
    pub(crate) mode: Mode,
    pub(crate) spi_in: u32,
    pub(crate) spi_out: u32,
    pub(crate) encapsulation: Encapsulation,
    pub(crate) suite: EspSuite,
    pub(crate) ke: Ke,
    pub(crate) additional: AdditionalKe,
    pub(crate) installed: Instant,
    pub(crate) rekey_at: Option<Instant>,
    pub(crate) expire_at: Option<Instant>,
    pub(crate) local_ts: Vec<TrafficSelector>,
    pub(crate) remote_ts: Vec<TrafficSelector>,
    /// The peer took selectors of one pair of addresses only (SINGLE_PAIR_REQUIRED).
    pub(crate) single_pair: bool,
    /// The peer gives a successor less (RFC 7296 §2.9.2): at its end there is a new one in its place.
    pub(crate) is_last: bool,
    /// The Child SA that it took the place of.
    pub(crate) replaces: Option<ChildSaId>,
    /// The lower nonce of the exchange that made it (RFC 7296 §2.8.1), until it is up.
    pub(crate) lowest_nonce: Vec<u8>,
    /// When it leaves the data plane, and why: it is deleted, its last packets may still arrive.
    pub(crate) down_at: Option<(Instant, CloseReason)>,
}

impl ChildSa {
    pub(crate) fn status(&self, now: Instant) -> ChildSaStatus {
        let in_time = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(now));
        ChildSaStatus {
            id: self.id,
            name: self.config.name.clone(),
            reqid: self.reqid,
            tags: self.tags,
            state: self.state,
            mode: self.mode,
            spi_in: self.spi_in,
            spi_out: self.spi_out,
            encapsulation: Some(self.encapsulation),
            suite: Some(self.suite),
            ke: self.ke,
            additional: self.additional,
            installed: Some(now.saturating_duration_since(self.installed)),
            rekey_in: in_time(self.rekey_at),
            expires_in: in_time(self.expire_at),
            local_ts: self.local_ts.clone(),
            remote_ts: self.remote_ts.clone(),
        }
    }

    /// True when it may be rekeyed: up, and nobody replaces or closes it.
    pub(crate) fn is_live(&self) -> bool {
        match self.state {
            ChildState::Installed => true,
            ChildState::Created
            | ChildState::Installing
            | ChildState::Rekeying
            | ChildState::Rekeyed
            | ChildState::Deleting
            | ChildState::Deleted => false,
        }
    }

    /// It is installed now: its lifetimes begin.
    pub(crate) fn start(&mut self, now: Instant, installed: Installed, rng: &mut dyn Rng) {
        (self.reqid, self.tags) = (installed.reqid, installed.tags);
        self.state = ChildState::Installed;
        self.installed = now;
        self.lowest_nonce = Vec::new();
        self.rekey_at = rekey_at(now, self.config.rekey_time, self.config.rand_time, rng);
        self.expire_at = (!self.config.life_time.is_zero()).then(|| after(now, self.config.life_time));
    }

    /// charon's words for the log.
    pub(crate) fn spis(&self) -> String {
        format!("{:08x}_i {:08x}_o", self.spi_in, self.spi_out)
    }

    pub(crate) fn both_selectors(&self) -> Selectors {
        Selectors { local: self.local_ts.clone(), remote: self.remote_ts.clone() }
    }

    /// charon's words for the log.
    pub(crate) fn selectors(&self) -> String {
        let list =
            |selectors: &[TrafficSelector]| selectors.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        format!("{} === {}", list(&self.local_ts), list(&self.remote_ts))
    }
}

/// `now + rekey_time` less a random part of `rand_time`; `None` where rekeying is off.
pub(crate) fn rekey_at(now: Instant, time: Duration, random: Duration, rng: &mut dyn Rng) -> Option<Instant> {
    (!time.is_zero()).then(|| after(now, time.saturating_sub(random_below(random.min(time), rng))))
}

/// What a negotiation needs of its IKE SA.
pub(crate) struct Parent<'a> {
    pub(crate) core: &'a Core,
    pub(crate) prf: Prf,
    pub(crate) d: &'a Secret,
    pub(crate) peer: &'a Arc<PeerIdentity>,
    pub(crate) channel_binding: Option<[u8; 32]>,
    pub(crate) endpoint_keys: Option<[[u8; 32]; 2]>,
    pub(crate) now: Instant,
}

/// The Child SA that a negotiation replaces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replaced {
    pub(crate) id: ChildSaId,
    pub(crate) reqid: u32,
    /// The SPI that we receive with: what REKEY_SA names (§1.3.3).
    pub(crate) spi_in: u32,
}

/// Our offer of a Child SA.
pub(crate) struct ChildOffer {
    pub(crate) id: ChildSaId,
    pub(crate) config: Arc<Child>,
    pub(crate) spi: u32,
    pub(crate) replaces: Option<Replaced>,
    pub(crate) nonce: Vec<u8>,
    proposals: Vec<Proposal>,
    selectors: Selectors,
    /// The selectors are those of one pair of addresses: the peer takes no others.
    single_pair: bool,
    /// Method of the first key exchange; `None` without one.
    pub(crate) method: Option<Ke>,
    /// In CREATE_CHILD_SA, with a nonce of its own.
    own_exchange: bool,
    /// The selectors of the Child SA that it replaces, which a successor must have too (§2.9.2).
    least: Option<Selectors>,
    /// What is asked for with it (§2.19).
    pub(crate) configuration: Option<Configuration>,
    /// Our selectors once the addresses are there; the offered ones had to be wider.
    assigned_ts: Option<Vec<TrafficSelector>>,
}

/// Why an answer gives no Child SA.
#[derive(Debug)]
pub(crate) struct Unusable {
    pub(crate) reason: String,
    /// The peer believes that the SA is up and has to be told.
    pub(crate) exists_there: bool,
    /// It would carry less than the one that it replaces.
    pub(crate) narrower: bool,
}

impl ChildOffer {
    /// For IKE_AUTH: the nonces are those of IKE_SA_INIT, and there is no key exchange (§1.2).
    pub(crate) fn first(ctx: &mut Context, core: &Core, config: Arc<Child>, nonce: Vec<u8>) -> Self {
        let proposals = crypto::without_ke(&config.esp_proposals);
        let mut distinct: Vec<Proposal> = Vec::new();
        for proposal in proposals {
            if !distinct.iter().any(|other| other.transforms == proposal.transforms) {
                distinct.push(proposal);
            }
        }
        Self::build(ctx, core, config, distinct, None, None, nonce, false)
    }

    /// For CREATE_CHILD_SA. `group` is what the peer asked for with INVALID_KE_PAYLOAD.
    pub(crate) fn create(
        ctx: &mut Context,
        core: &Core,
        config: Arc<Child>,
        replaces: Option<Replaced>,
        group: Option<Ke>,
    ) -> Result<Self, String> {
        let proposals = config.esp_proposals.clone();
        let mut candidates = methods(&proposals);
        if let Some(group) = group {
            candidates.retain(|method| *method == group);
        }
        // The first method is the one that we would rather have; NONE among the first is no PFS.
        let method = match candidates.first() {
            None | Some(&Ke::NONE) => None,
            Some(_) => {
                let method = candidates.into_iter().find(|method| crypto::supported(*method));
                Some(method.ok_or_else(|| "no proposal has a key exchange method that we support".to_owned())?)
            }
        };
        let nonce = ctx.random(NONCE_LENGTH);
        Ok(Self::build(ctx, core, config, proposals, replaces, method, nonce, true))
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of the value that it builds")]
    fn build(
        ctx: &mut Context,
        core: &Core,
        config: Arc<Child>,
        proposals: Vec<Proposal>,
        replaces: Option<Replaced>,
        method: Option<Ke>,
        nonce: Vec<u8>,
        own_exchange: bool,
    ) -> Self {
        let spi = ctx.reserve_child_spi(core.id);
        let id = ctx.next_child();
        let mut selectors = resolve(&config, core);
        if config.mode == Mode::Transport && (core.nat.local || core.nat.remote) {
            selectors = selectors.of_hosts(core.path.local.ip(), core.path.remote.ip());
        }
        let proposals = numbered(&proposals, &spi.to_be_bytes());
        Self {
            id,
            config,
            spi,
            replaces,
            nonce,
            proposals,
            selectors,
            single_pair: false,
            method,
            own_exchange,
            least: None,
            configuration: None,
            assigned_ts: None,
        }
    }

    /// Offers for the packet that wants the Child SA, if there is one (§2.9).
    pub(crate) fn wanted_by(mut self, trigger: Option<Trigger>) -> Self {
        self.selectors = self.selectors.wanted_by(trigger);
        self.single_pair = trigger.is_some_and(|trigger| trigger.single_pair);
        self
    }

    /// Offers what a predecessor has, where its peer would refuse more; elsewhere the configuration's selectors, which are
    /// a superset (§2.9.2).
    pub(crate) fn succeeding(mut self, old: Option<&ChildSa>) -> Self {
        self.least = old.map(ChildSa::both_selectors);
        if let Some(old) = old.filter(|old| old.single_pair) {
            self.selectors = old.both_selectors();
            self.single_pair = true;
        }
        self
    }

    /// Leaves out what is reserved for others (RFC 5660 §2.3).
    pub(crate) fn around_reserved(mut self, ctx: &Context, party: Party<'_>) -> Self {
        let prospect = Prospect {
            party,
            mode: self.config.mode,
            protection: Protection::Offered(&self.proposals),
            replay_protection: self.config.replay_window > 0,
            local_ts: &self.selectors.local,
            remote_ts: &self.selectors.remote,
        };
        if let Some(selectors) = ctx.around_reserved(&prospect, self.least.as_ref()) {
            self.selectors = selectors;
        }
        self
    }

    /// Asks for addresses with it, which `dynamic` will stand for.
    pub(crate) fn asking(mut self, request: Option<Configuration>) -> Self {
        if let Some(request) = &request {
            let addresses = any_address(request);
            let widen = |selector: &ConfiguredSelector| match *selector {
                ConfiguredSelector::Fixed(selector) => vec![selector],
                ConfiguredSelector::Dynamic { protocol, start_port, end_port } => {
                    addresses.iter().map(|any| TrafficSelector { protocol, start_port, end_port, ..*any }).collect()
                }
            };
            self.selectors.local = self.config.local_ts.iter().flat_map(widen).collect();
        }
        self.configuration = request;
        self
    }

    /// The addresses that it asked for are there.
    pub(crate) fn fit_to(&mut self, core: &Core) {
        self.assigned_ts = Some(resolve(&self.config, core).local);
    }

    /// True when INVALID_KE_PAYLOAD with this group is worth another try (§1.3).
    pub(crate) fn accepts_group(&self, group: Ke) -> bool {
        offers(&self.proposals, group) && self.method != Some(group)
    }

    /// The key exchanges that an answer chose; `None` where that is not among what we offered.
    pub(crate) fn chosen(&self, parts: &Parts) -> Option<(Ke, AdditionalKe)> {
        let (_, method, additional) = crypto::accept_esp(parts.sa.as_ref()?, &self.proposals, self.own_exchange)?;
        Some((method, additional))
    }

    /// The payloads of the request.
    pub(crate) fn payloads(&self, ke: Option<&KeyExchange>) -> Vec<Payload> {
        let mut payloads = Vec::new();
        if let Some(replaced) = self.replaces {
            payloads.push(Payload::Notify(Notify {
                protocol: Protocol::ESP,
                spi: replaced.spi_in.to_be_bytes().to_vec(),
                kind: NotifyType::REKEY_SA,
                data: Vec::new(),
            }));
        }
        if self.config.mode == Mode::Transport {
            payloads.push(notify(NotifyType::USE_TRANSPORT_MODE, Vec::new()));
        }
        payloads.extend(no_padding(self.config.mode));
        // §2.19: before the SA payload.
        payloads.extend(self.configuration.clone().map(Payload::Configuration));
        payloads.push(Payload::Sa(self.proposals.clone()));
        if self.own_exchange {
            payloads.push(Payload::Nonce(self.nonce.clone()));
        }
        if let Some(ke) = ke {
            payloads.push(Payload::Ke { group: ke.method(), data: ke.public().to_vec() });
        }
        payloads.push(Payload::TsInitiator(wire_selectors(&self.selectors.local)));
        payloads.push(Payload::TsResponder(wire_selectors(&self.selectors.remote)));
        payloads
    }

    /// Makes the Child SA of the answer. `nr` is the responder's nonce, `secrets` are those of all key exchanges
    /// that the answer chose.
    pub(crate) fn accept(
        self,
        parent: &Parent<'_>,
        parts: &Parts,
        nr: &[u8],
        secrets: &[Secret],
    ) -> Result<(ChildSa, ChildReady), Unusable> {
        let unusable =
            |exists_there, reason: &str| Unusable { reason: reason.to_owned(), exists_there, narrower: false };
        let (Some(answer), Some(ts_i), Some(ts_r)) = (&parts.sa, &parts.ts_initiator, &parts.ts_responder) else {
            return Err(unusable(false, "the answer lacks SA or traffic selectors"));
        };
        let Some((suite, method, additional)) = crypto::accept_esp(answer, &self.proposals, self.own_exchange) else {
            return Err(unusable(true, "the peer chose what we did not offer"));
        };
        let spi_out = answer.first().and_then(|proposal| spi_of(&proposal.spi));
        let Some(spi_out) = spi_out else { return Err(unusable(false, "the peer's SPI is not one")) };
        // §1.3.1: the responder may decline transport mode; then the modes differ and the SA must go.
        let mode = if parts.has(NotifyType::USE_TRANSPORT_MODE) { Mode::Transport } else { Mode::Tunnel };
        if mode != self.config.mode {
            return Err(unusable(true, "the peer chose another mode"));
        }
        let mut chosen = Selectors { local: address_selectors(ts_i), remote: address_selectors(ts_r) };
        if mode == Mode::Transport {
            // §2.23.1: the peer names us, and itself, as it sees both.
            parent.core.substitute(&mut chosen);
        }
        if chosen.local.is_empty() || chosen.remote.is_empty() || !self.selectors.contains(&chosen) {
            return Err(unusable(true, "the peer's traffic selectors are not within ours"));
        }
        let local_ts = match &self.assigned_ts {
            Some(assigned) => ipsec::selector::narrow(&chosen.local, assigned).selectors,
            None => chosen.local,
        };
        if local_ts.is_empty() {
            return Err(unusable(true, "the peer's traffic selectors leave out the virtual IP"));
        }
        if let Some(Selectors { local: old_local, remote: old_remote }) = &self.least {
            // What we no longer offer (an address of the IKE SA that has changed) is not missed.
            let within = |old: &TrafficSelector, list: &[TrafficSelector]| list.iter().any(|one| one.contains(old));
            let keeps = |old: &[TrafficSelector], new: &[TrafficSelector], offered: &[TrafficSelector]| {
                old.iter().filter(|old| within(old, offered)).all(|old| within(old, new))
            };
            if !keeps(old_local, &local_ts, &self.selectors.local)
                || !keeps(old_remote, &chosen.remote, &self.selectors.remote)
            {
                let reason = "the peer gives the successor less than the CHILD_SA has".to_owned();
                return Err(Unusable { reason, exists_there: true, narrower: true });
            }
        }
        let due = if method == Ke::NONE { 0 } else { additional.iter().count().saturating_add(1) };
        if secrets.len() != due {
            return Err(unusable(true, "the key exchange does not fit the chosen proposal"));
        }
        let keys = crypto::child_keys(parent.prf, parent.d, &suite, secrets, &self.nonce, nr);
        let (keys_out, keys_in) = keys.map_err(|error| unusable(true, &error.to_string()))?;
        let made = Made {
            tfc: padding(&self.config, parts),
            id: self.id,
            config: self.config,
            replaces: self.replaces.map(|replaced| (replaced.id, replaced.reqid)),
            mode,
            spi_in: self.spi,
            spi_out,
            suite,
            ke: method,
            additional,
            local_ts,
            remote_ts: chosen.remote,
            single_pair: self.single_pair,
            additional_ts: self.single_pair || parts.has(NotifyType::ADDITIONAL_TS_POSSIBLE),
            lowest_nonce: self.nonce.min(nr.to_vec()),
        };
        Ok(made.split(parent, keys_in, keys_out))
    }
}

/// A responder's side of a negotiation before the key exchanges. Its SPI is reserved.
pub(crate) struct ChildPlan {
    made: Made,
    /// The initiator's KE payload, if the choice has key exchanges.
    pub(crate) ke: Option<(Ke, Vec<u8>)>,
    /// Without the KE payload.
    pub(crate) payloads: Vec<Payload>,
    ni: Vec<u8>,
    nr: Vec<u8>,
}

impl ChildPlan {
    pub(crate) fn id(&self) -> ChildSaId {
        self.made.id
    }

    pub(crate) fn spi_in(&self) -> u32 {
        self.made.spi_in
    }

    pub(crate) fn additional(&self) -> AdditionalKe {
        self.made.additional
    }

    pub(crate) fn lowest_nonce(&self) -> &[u8] {
        &self.made.lowest_nonce
    }

    /// With the secrets of all key exchanges. `payloads` are those of the answer that says yes.
    pub(crate) fn finish(
        self,
        parent: &Parent<'_>,
        secrets: &[Secret],
        payloads: Vec<Payload>,
    ) -> Result<ChildAnswer, Fault> {
        let keys = crypto::child_keys(parent.prf, parent.d, &self.made.suite, secrets, &self.ni, &self.nr);
        let (keys_in, keys_out) = keys.map_err(|_| Fault::NoProposalChosen)?;
        let (child, mut ready) = self.made.split(parent, keys_in, keys_out);
        ready.pair.await_peer = ready.replaces.is_some();
        Ok(ChildAnswer { child, ready, payloads })
    }
}

/// A responder's side of a negotiation.
pub(crate) struct ChildAnswer {
    pub(crate) child: ChildSa,
    pub(crate) ready: ChildReady,
    /// The payloads that say yes.
    pub(crate) payloads: Vec<Payload>,
}

/// Plans the answer to an offer out of `configs`, in order, in place of `old`. `own_nonce` is our nonce of a CREATE_CHILD_SA exchange, and
/// `None` in IKE_AUTH, whose nonces are those of IKE_SA_INIT.
pub(crate) fn answer(
    ctx: &mut Context,
    parent: &Parent<'_>,
    configs: &[Arc<Child>],
    old: Option<&ChildSa>,
    parts: &Parts,
    (ni, nr): (&[u8], &[u8]),
    own_exchange: bool,
) -> Result<ChildPlan, Fault> {
    let (Some(offered), Some(ts_i), Some(ts_r)) = (&parts.sa, &parts.ts_initiator, &parts.ts_responder) else {
        return Err(Fault::InvalidSyntax("SA or traffic selectors are missing".to_owned()));
    };
    let wants_transport = parts.has(NotifyType::USE_TRANSPORT_MODE);
    let proposed = Selectors { local: address_selectors(ts_r), remote: address_selectors(ts_i) };
    let preferred = parts.ke.as_ref().map(|(group, _)| *group);
    let policies =
        |of: &Selectors, transport| candidates(configs, of, transport, |config| resolve(config, parent.core));
    let mut seen = proposed.clone();
    let substituted = wants_transport && parent.core.substitute(&mut seen);
    let mut fitting = policies(&seen, wants_transport);
    if substituted && fitting.first().is_none_or(|candidate| candidate.config.mode == Mode::Tunnel) {
        // §2.23.1: a tunnel is for the addresses that the peer named.
        fitting = policies(&proposed, false);
    }
    let fault = if fitting.is_empty() { Fault::TsUnacceptable } else { Fault::NoProposalChosen };
    let ours_first = ctx.config.prefer_configured_proposals;
    let mut agreed = fitting.into_iter().filter_map(|candidate| {
        let proposals = &candidate.config.esp_proposals;
        Some((crypto::select_esp(offered, proposals, ours_first, own_exchange, preferred)?, candidate))
    });
    let (choice, candidate) = agreed.next().ok_or(fault)?;
    let leaves_out = candidate.leaves_out(agreed.map(|(_, other)| other));
    let Candidate { config, mut narrowed, .. } = candidate;
    if matches!(parent.peer.proof, Proof::Unauthenticated { .. }) && parent.core.assigned.is_none() {
        narrowed.remote = ctx.connections.for_nobody(&narrowed.remote);
        if narrowed.remote.is_empty() {
            return Err(Fault::TsUnacceptable);
        }
    }
    let mode = if wants_transport && config.mode == Mode::Transport { Mode::Transport } else { Mode::Tunnel };
    let prospect = Prospect {
        party: Party::Proved(parent.peer),
        mode,
        protection: Protection::Chosen(choice.suite),
        replay_protection: config.replay_window > 0,
        local_ts: &narrowed.local,
        remote_ts: &narrowed.remote,
    };
    let around = ctx.around_reserved(&prospect, old.map(ChildSa::both_selectors).as_ref());
    let Selectors { local: local_ts, remote: remote_ts } = around.unwrap_or(narrowed);
    let offer = offered.iter().find(|offer| offer.number == choice.proposal.number);
    let spi_out = offer.and_then(|offer| spi_of(&offer.spi)).ok_or(Fault::NoProposalChosen)?;
    let ke = match choice.ke {
        Ke::NONE => None,
        method => {
            let theirs = parts.ke.clone().filter(|(group, _)| *group == method);
            Some(theirs.ok_or(Fault::InvalidKe(method))?)
        }
    };
    let spi_in = ctx.reserve_child_spi(parent.core.id);

    let mut payloads = Vec::new();
    if mode == Mode::Transport {
        payloads.push(notify(NotifyType::USE_TRANSPORT_MODE, Vec::new()));
    }
    payloads.extend(no_padding(mode));
    if leaves_out {
        payloads.push(notify(NotifyType::ADDITIONAL_TS_POSSIBLE, Vec::new()));
    }
    let mut proposal = choice.proposal;
    proposal.spi = spi_in.to_be_bytes().to_vec();
    payloads.push(Payload::Sa(vec![proposal]));
    if own_exchange {
        payloads.push(Payload::Nonce(nr.to_vec()));
    }
    payloads.push(Payload::TsInitiator(wire_selectors(&remote_ts)));
    payloads.push(Payload::TsResponder(wire_selectors(&local_ts)));

    let made = Made {
        id: ctx.next_child(),
        config: Arc::clone(config),
        replaces: old.map(|old| (old.id, old.reqid)),
        mode,
        spi_in,
        spi_out,
        suite: choice.suite,
        ke: choice.ke,
        additional: choice.additional,
        local_ts,
        remote_ts,
        single_pair: false,
        additional_ts: false,
        tfc: padding(config, parts),
        lowest_nonce: ni.min(nr).to_vec(),
    };
    Ok(ChildPlan { made, ke, payloads, ni: ni.to_vec(), nr: nr.to_vec() })
}

/// Our and the peer's selectors of a configuration on this IKE SA.
fn resolve(config: &Child, core: &Core) -> Selectors {
    let (ours, theirs) = (core.local_addresses(), core.remote_addresses());
    let local = config.local_ts.iter().flat_map(|selector| selector.resolve_all(&ours));
    let remote = config.remote_ts.iter().flat_map(|selector| selector.resolve_all(&theirs));
    let remote = remote.flat_map(|selector| match &core.assigned {
        Some(assigned) => assigned.restrict(selector),
        None => vec![selector],
    });
    Selectors { local: local.collect(), remote: remote.collect() }
}

impl Core {
    /// Puts the addresses of the IKE SA in the place of those by which the peer knows us and itself, where a NAT is between:
    /// in transport mode they are the same (§2.23.1). False where nothing changes.
    fn substitute(&self, selectors: &mut Selectors) -> bool {
        let local = self.nat.local && substitute(&mut selectors.local, self.path.local.ip());
        let remote = self.nat.remote && substitute(&mut selectors.remote, self.path.remote.ip());
        local || remote
    }
}

/// Puts `address` in place of the one host that all selectors name; false where they do not.
fn substitute(selectors: &mut [TrafficSelector], address: IpAddr) -> bool {
    let Some(host) = selectors.first().map(|first| first.start) else { return false };
    if selectors.iter().any(|selector| selector.start != host || selector.end != host) {
        return false;
    }
    for selector in selectors {
        (selector.start, selector.end) = (address, address);
    }
    true
}

fn wire_selectors(selectors: &[TrafficSelector]) -> Vec<WireSelector> {
    selectors.iter().map(|selector| WireSelector::Address(*selector)).collect()
}

/// What we say of padding for traffic flow confidentiality (§1.3.1): in transport mode nothing says where the packet ends and
/// the padding begins (RFC 4303 §2.7).
fn no_padding(mode: Mode) -> Option<Payload> {
    (mode == Mode::Transport).then(|| notify(NotifyType::ESP_TFC_PADDING_NOT_SUPPORTED, Vec::new()))
}

/// The padding that we send: none where the peer would not take it (§1.3.1).
fn padding(config: &Child, parts: &Parts) -> TfcPadding {
    if parts.has(NotifyType::ESP_TFC_PADDING_NOT_SUPPORTED) { TfcPadding::None } else { config.tfc_padding }
}

/// An ESP SPI; 0 to 255 are reserved (RFC 4303 §2.1).
fn spi_of(octets: &[u8]) -> Option<u32> {
    let spi = u32::from_be_bytes(octets.try_into().ok()?);
    (spi > 255).then_some(spi)
}

/// The result of a negotiation, before keys go one way and bookkeeping the other.
struct Made {
    id: ChildSaId,
    config: Arc<Child>,
    replaces: Option<(ChildSaId, u32)>,
    mode: Mode,
    spi_in: u32,
    spi_out: u32,
    suite: EspSuite,
    ke: Ke,
    additional: AdditionalKe,
    local_ts: Vec<TrafficSelector>,
    remote_ts: Vec<TrafficSelector>,
    single_pair: bool,
    additional_ts: bool,
    tfc: TfcPadding,
    lowest_nonce: Vec<u8>,
}

impl Made {
    fn split(
        self,
        parent: &Parent<'_>,
        keys_in: ipsec::plane::EspKeys,
        keys_out: ipsec::plane::EspKeys,
    ) -> (ChildSa, ChildReady) {
        let encapsulation = parent.core.encapsulation();
        let reqid = self.replaces.map_or(self.config.reqid, |(_, reqid)| reqid);
        let pair = SaPair {
            spi_in: self.spi_in,
            spi_out: self.spi_out,
            reqid,
            class: ipsec::guard::ClassId(0),
            mode: self.mode,
            suite: self.suite,
            keys_in,
            keys_out,
            encapsulation,
            local_ts: self.local_ts.clone(),
            remote_ts: self.remote_ts.clone(),
            replay_window: self.config.replay_window,
            lifetime: self.config.lifetime,
            copy_df: self.config.copy_df,
            copy_ecn: self.config.copy_ecn,
            await_peer: false,
            tfc: self.tfc,
            options: self.config.options.clone(),
        };
        let ready = ChildReady {
            ike_sa: parent.core.id,
            child_sa: self.id,
            replaces: self.replaces.map(|(id, _)| id),
            connection: parent.core.name.to_string(),
            config: Arc::clone(&self.config),
            peer: Arc::clone(parent.peer),
            channel_binding: parent.channel_binding,
            endpoint_keys: parent.endpoint_keys,
            additional_ts: self.additional_ts,
            pair,
        };
        let (mut local_ts, mut remote_ts) = (self.local_ts, self.remote_ts);
        local_ts.shrink_to_fit();
        remote_ts.shrink_to_fit();
        let child = ChildSa {
            id: self.id,
            config: self.config,
            reqid,
            tags: Tags::default(),
            state: ChildState::Installing,
            mode: self.mode,
            spi_in: self.spi_in,
            spi_out: self.spi_out,
            encapsulation,
            suite: self.suite,
            ke: self.ke,
            additional: self.additional,
            installed: parent.now,
            rekey_at: None,
            expire_at: None,
            local_ts,
            remote_ts,
            single_pair: self.single_pair,
            is_last: false,
            replaces: self.replaces.map(|(id, _)| id),
            lowest_nonce: self.lowest_nonce,
            down_at: None,
        };
        (child, ready)
    }
}
