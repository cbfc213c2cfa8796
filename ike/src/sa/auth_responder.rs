//! IKE_AUTH as responder (RFC 7296 §1.2, §2.15, §2.21.2).

mod eap;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use pad::{
    Admission, AuthClass, AuthError, AuthMethod, Identity, IdentityPattern, PeerIdentity, SignError, SignedAuth,
};

use super::auth::{InitMaterial, identification, is_where_it_says};
use super::basis::{Basis, readmits, rivals};
use super::channel::{Channel, Received};
use super::childless;
use super::fault::{Fault, notify};
use super::mobility::{announcement, is_translated};
use super::parts::Parts;
use super::ppk;
use super::redirect::auth_redirect;
use super::resumption;
use super::{Core, Established, IkeSa, local_identity, window};
use crate::config::{Connection, Unique};
use crate::engine::context::{Context, PeerKey};
use crate::engine::tickets::{Presented, method};
use crate::engine::{CloseReason, Event, IkeSaId, IkeSaStatus, IkeState, Job, JobId, JobOutcome, Judgement, Path};
use crate::wire::{ExchangeType, Identification, NotifyType, Opened, Payload, Protected};

/// An IKE SA that a peer initiated, with keys, and a peer that has not proved anything.
pub(crate) struct ResponderAuth {
    pub(crate) core: Core,
    pub(crate) channel: Channel,
    /// Connections that fit the addresses and the proposal, in configuration order.
    candidates: Vec<Arc<Connection>>,
    material: InitMaterial,
    init_remote: SocketAddr,
    deadline: Instant,
    /// The peer's PPK is mixed into the keys.
    uses_ppk: bool,
    phase: Phase,
}

/// Candidates that assert one identity of ours.
struct Group {
    local_id: Identity,
    connections: Vec<Arc<Connection>>,
}

/// What the peer said of itself in IKE_AUTH.
struct Claim {
    id: Identification,
    asserted: Identity,
    /// The PAD and the credentials that the proof is checked by.
    basis: Basis,
    parts: Box<Parts>,
}

enum Phase {
    /// IKE_AUTH has not come.
    Waiting,
    /// It has not come after IKE_SESSION_RESUME: there is one thing that it may prove.
    Resuming(Box<Presented>),
    /// The peer's proof is being checked against the first group.
    Verifying { job: JobId, claim: Claim, groups: VecDeque<Group> },
    /// The peer has proved who it is; our proof is being made.
    Signing { job: JobId, parts: Box<Parts>, peer: Arc<PeerIdentity>, basis: Arc<Basis>, connection: Arc<Connection> },
    /// The peer proves itself by EAP (§2.16).
    Eap(eap::State),
}

impl ResponderAuth {
    /// `deadline` is when the half-open IKE SA's time is up.
    pub(crate) fn new(
        core: Core,
        channel: Channel,
        candidates: Vec<Arc<Connection>>,
        material: InitMaterial,
        init_remote: SocketAddr,
        deadline: Instant,
    ) -> Self {
        let (uses_ppk, phase) = (false, Phase::Waiting);
        Self { core, channel, candidates, material, init_remote, deadline, uses_ppk, phase }
    }

    /// After IKE_SESSION_RESUME: the ticket is good, and the peer has to show that it is the one that it was given to.
    pub(crate) fn resumed(
        core: Core,
        channel: Channel,
        presented: Presented,
        material: InitMaterial,
        deadline: Instant,
    ) -> Self {
        let (init_remote, phase) = (core.path.remote, Phase::Resuming(Box::new(presented)));
        // No candidates: nobody gets in here by credentials.
        let candidates = Vec::new();
        Self { core, channel, candidates, material, init_remote, deadline, uses_ppk: false, phase }
    }

    /// Where its IKE_SA_INIT came from.
    pub(crate) fn init_remote(&self) -> SocketAddr {
        self.init_remote
    }

    /// The IKE_SA_INIT request and our answer, for repetitions.
    pub(crate) fn init_exchange(&self) -> (&[u8], &[u8]) {
        (&self.material.theirs, &self.material.ours)
    }

    pub(crate) fn next_timeout(&self) -> Instant {
        self.deadline
    }

    pub(crate) fn status(&self) -> IkeSaStatus {
        IkeSaStatus {
            id: self.core.id,
            connection: self.core.name.to_string(),
            state: IkeState::Connecting,
            path: self.core.path,
            local_id: None,
            remote_id: None,
            peer: None,
            initiator: false,
            initiator_spi: self.channel.spis.initiator,
            responder_spi: self.channel.spis.responder,
            nat_local: self.core.nat.local,
            nat_remote: self.core.nat.remote,
            nat_fake: self.core.nat.fake,
            suite: Some(self.channel.suite),
            established: None,
            rekey_in: None,
            reauth_in: None,
            assigned: None,
            resumed: false,
            tasks_active: vec!["IKE_CERT_PRE", "IKE_AUTH", "IKE_CERT_POST", "CHILD_CREATE"],
            children: Vec::new(),
        }
    }

    pub(crate) fn handle_protected(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        path: Path,
        protected: Protected,
        datagram: &[u8],
    ) -> Option<IkeSa> {
        // RFC 9242 §3.2: IKE_INTERMEDIATE is over; the last one may be repeated.
        if protected.header.exchange == ExchangeType::IKE_INTERMEDIATE {
            if let Received::Repeated(datagrams) = self.channel.repeated(protected) {
                self.core.send_along(ctx, path, datagrams);
            }
            return Some(IkeSa::ResponderAuth(self));
        }
        // Until the peer is authenticated there is one request that we read: IKE_AUTH.
        if protected.header.response || protected.header.exchange != ExchangeType::IKE_AUTH {
            return Some(IkeSa::ResponderAuth(self));
        }
        match self.channel.receive(protected, datagram) {
            Received::Request(opened) => {
                // RFC 7296 §2.23: the initiator may have moved to the other port.
                self.core.path = path;
                self.request(ctx, now, &opened)
            }
            Received::Awaited => {
                self.core.path = self.core.path.follow_stream(path);
                Some(IkeSa::ResponderAuth(self))
            }
            Received::Forged => {
                ctx.judge(&path, Judgement::Forged);
                Some(IkeSa::ResponderAuth(self))
            }
            Received::Repeated(datagrams) => {
                // Of the exchanges before EAP is through (§2.1).
                self.core.send_along(ctx, path, datagrams);
                Some(IkeSa::ResponderAuth(self))
            }
            Received::Response(_) | Received::Beyond(_) | Received::Ignored => Some(IkeSa::ResponderAuth(self)),
        }
    }

    pub(crate) fn handle_job(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        outcome: JobOutcome,
    ) -> Option<IkeSa> {
        match (std::mem::replace(&mut self.phase, Phase::Waiting), outcome) {
            (Phase::Verifying { job: waiting, claim, groups }, JobOutcome::Authenticate(result)) if waiting == job => {
                self.verified(ctx, now, claim, groups, result)
            }
            (Phase::Signing { job: waiting, parts, peer, basis, connection }, JobOutcome::Sign(result))
                if waiting == job =>
            {
                self.signed(ctx, now, *parts, (peer, basis), connection, result)
            }
            (Phase::Eap(state), outcome) => self.handle_eap_job(ctx, now, state, job, outcome),
            (phase, _) => {
                self.phase = phase;
                Some(IkeSa::ResponderAuth(self))
            }
        }
    }

    pub(crate) fn handle_timeout(self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        if now < self.deadline {
            return Some(IkeSa::ResponderAuth(self));
        }
        ctx.log("JOB", 1, self.core.tag(), "deleting half open IKE_SA after timeout".to_owned());
        self.abandon(ctx, CloseReason::Timeout);
        None
    }

    /// Ends before anything came up.
    pub(crate) fn abandon(self, ctx: &mut Context, close: CloseReason) {
        let status = self.status();
        ctx.event(Event::IkeDown(Box::new(status), close));
    }

    fn request(mut self: Box<Self>, ctx: &mut Context, now: Instant, opened: &Opened) -> Option<IkeSa> {
        let phase = std::mem::replace(&mut self.phase, Phase::Waiting);
        let parts = match Parts::of(opened) {
            Ok(parts) => parts,
            Err(fault) => return self.refuse(ctx, now, &fault, &fault.to_string()),
        };
        match phase {
            Phase::Resuming(presented) => return self.resume(ctx, now, *presented, parts),
            Phase::Eap(state) => return self.handle_eap_request(ctx, now, state, parts),
            Phase::Waiting | Phase::Verifying { .. } | Phase::Signing { .. } => {}
        }
        let Some(id) = parts.id_initiator.clone() else {
            return self.refuse(ctx, now, &Fault::InvalidSyntax(String::new()), "IKE_AUTH without IDi");
        };
        let asserted = match Identity::from_wire(id.kind, &id.data) {
            Ok(asserted) => asserted,
            Err(error) => return self.refuse(ctx, now, &Fault::AuthenticationFailed, &error.to_string()),
        };
        // Without a proof it wants EAP, which ends with a shared key.
        let method = parts.auth.as_ref().map_or(AuthMethod::SHARED_KEY, |(method, _)| AuthMethod(*method));
        if !is_where_it_says(ctx, &self.core.path, &asserted, method) {
            let reason = format!("'{asserted}' is not where its messages come from");
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, &reason);
        }
        self.material.note_wishes(&parts);
        if parts.auth.is_none() {
            return self.begin_eap(ctx, now, id, asserted, parts);
        }
        let mut parts = parts;
        let groups = match self.choose_ppk(ctx, &asserted, &mut parts) {
            Ok(groups) => groups,
            Err(reason) => return self.refuse(ctx, now, &Fault::AuthenticationFailed, reason),
        };
        let rivals = rivals(ctx, &self.core.path, &asserted);
        let basis = Basis::new(ctx, now, rivals, self.uses_ppk);
        let claim = Claim { id, asserted, basis, parts: Box::new(parts) };
        self.verify(ctx, now, claim, groups)
    }

    /// RFC 8784 §3, table 1: mixes the PPK that the peer names into the keys, or goes on with its proof without one.
    /// Gives the connections that can be meant.
    fn choose_ppk(
        &mut self,
        ctx: &Context,
        asserted: &Identity,
        parts: &mut Parts,
    ) -> Result<VecDeque<Group>, &'static str> {
        let without = |connection: &Connection| !connection.ppk_required;
        if !self.material.use_ppk {
            return Ok(self.groups(ctx, asserted, parts, without));
        }
        let named = ppk::named(ctx, parts).ok_or("the peer names no PPK after USE_PPK")?;
        if let Some((id, ppk)) = named {
            // RFC 8784 §4: with NULL authentication a PPK would have to be mandatory, and the identity not ID_NULL.
            let with = |connection: &Connection| {
                connection.remote.class != AuthClass::Null
                    && connection.ppk_id.as_ref().is_none_or(|known| known.matches(&id))
            };
            let groups = self.groups(ctx, asserted, parts, with);
            if !groups.is_empty() {
                self.channel.mix(&ppk).map_err(|_| "the PRF is not supported")?;
                self.uses_ppk = true;
                return Ok(groups);
            }
        }
        let proof = parts.notify(NotifyType::NO_PPK_AUTH).map(|notify| notify.data.clone());
        let (Some(proof), Some((_, auth))) = (proof, &mut parts.auth) else {
            return Err("the peer's PPK is not known, and it does not do without");
        };
        *auth = proof;
        Ok(self.groups(ctx, asserted, parts, without))
    }

    /// Candidates that can be the identity that the initiator asks for (§3.5), by the identity they assert.
    ///
    /// Of all connections, candidates or not, those that name the peer most narrowly say how it is proved (RFC 4301
    /// §4.4.3). Otherwise a peer would get around them with a proposal, an address or an IDr of its choice.
    fn groups(
        &self,
        ctx: &Context,
        asserted: &Identity,
        parts: &Parts,
        takes: impl Fn(&Connection) -> bool,
    ) -> VecDeque<Group> {
        let narrowest = ctx.connections.narrowest(asserted);
        let names = |connection: &Connection| {
            let specificity = connection.remote.remote_id.match_specificity(asserted);
            // Where EAP proves another identity than this one, this one only has to fit.
            specificity.is_some() && (specificity >= narrowest || !connection.remote.proves_ike_id())
        };
        let asked = parts.id_responder.as_ref().map(|id| Identity::from_wire(id.kind, &id.data));
        let mut groups: VecDeque<Group> = VecDeque::new();
        for candidate in self.candidates.iter().filter(|candidate| names(candidate)) {
            // What was removed or changed since IKE_SA_INIT admits nobody; nor does the peer leave its addresses.
            let Some(connection) = ctx.connections.named(&candidate.name).find(|connection| {
                connection.authenticates_as(candidate) && connection.admits_addresses(&self.core.path)
            }) else {
                continue;
            };
            let local_id = local_identity(connection, &self.core.path);
            let fits = match &asked {
                Some(Ok(asked)) => IdentityPattern::exact(local_id.clone()).matches(asked),
                Some(Err(_)) => false,
                None => true,
            };
            if !fits || !takes(connection) {
                continue;
            }
            match groups.iter_mut().find(|group| group.local_id == local_id) {
                Some(group) => group.connections.push(Arc::clone(connection)),
                None => groups.push_back(Group { local_id, connections: vec![Arc::clone(connection)] }),
            }
        }
        groups
    }

    fn verify(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        claim: Claim,
        groups: VecDeque<Group>,
    ) -> Option<IkeSa> {
        let (Some(group), Some(auth)) = (groups.front(), claim.parts.auth.clone()) else {
            let reason = format!("no connection fits '{}'", claim.asserted);
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, &reason);
        };
        let request = self.material.authenticate_request(
            &self.channel,
            &claim.id,
            claim.asserted.clone(),
            group.local_id.clone(),
            auth,
            (claim.parts.certificates.clone(), claim.parts.raw_key.clone()),
            group.connections.iter().map(|connection| connection.remote.clone()).collect(),
        );
        let Ok(request) = request else {
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, "the PRF is not supported");
        };
        let job = ctx.job(self.core.id, Job::Authenticate(request));
        self.phase = Phase::Verifying { job, claim, groups };
        Some(IkeSa::ResponderAuth(self))
    }

    fn verified(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        claim: Claim,
        mut groups: VecDeque<Group>,
        result: Result<Admission, AuthError>,
    ) -> Option<IkeSa> {
        let Some(group) = groups.pop_front() else {
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, "no connection fits");
        };
        let Admission { peer, good_for, intermediates, warnings } = match result {
            Ok(admission) => admission,
            Err(error) if groups.is_empty() => {
                return self.refuse(ctx, now, &Fault::AuthenticationFailed, &error.to_string());
            }
            Err(_) => return self.verify(ctx, now, claim, groups),
        };
        // The entry that admitted the peer decides what it may ask for; no other connection can.
        let admitted = group.connections.into_iter().find(|connection| {
            connection.name == peer.entry
                && peer.id == claim.asserted
                && peer.local_id == group.local_id
                && connection.remote.remote_id.matches(&peer.id)
        });
        let Some(connection) = admitted else {
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, "no connection admits this identity");
        };
        if let Err((fault, reason)) = self.may_come_up(ctx, &connection, &peer, &claim.parts, None) {
            return self.refuse(ctx, now, &fault, reason);
        }
        (self.core.name, self.core.dscp) = (ctx.connections.name(&connection.name), connection.dscp);
        self.channel.tally = Some(ctx.shared.counters.of(&connection.name));
        ctx.log("IKE", 1, self.core.tag(), format!("authentication of '{}' successful", peer.id));
        if connection.ppk_id.is_some() && !self.uses_ppk {
            ctx.log("IKE", 1, self.core.tag(), ppk::UNUSED.to_owned());
        }
        let auth = connection.local_auth.clone();
        let request = self.material.sign_request(&self.channel, peer.local_id.clone(), Some(peer.id.clone()), auth);
        let Ok(request) = request else {
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, "the PRF is not supported");
        };
        let job = ctx.job(self.core.id, Job::Sign(request));
        warnings.into_iter().for_each(|line| ctx.log("CFG", 1, self.core.tag(), line));
        let basis = claim.basis.proved(now, good_for, intermediates);
        self.phase = Phase::Signing { job, parts: claim.parts, peer: Arc::new(peer), basis, connection };
        Some(IkeSa::ResponderAuth(self))
    }

    /// What has to hold of an IKE SA beside the peer's proof. `outlives` is one that it takes the place of.
    fn may_come_up(
        &self,
        ctx: &Context,
        connection: &Connection,
        peer: &PeerIdentity,
        parts: &Parts,
        outlives: Option<IkeSaId>,
    ) -> Result<(), (Fault, &'static str)> {
        if let Some(reason) = childless::refusal(connection.childless, parts.sa.is_some()) {
            return Err((Fault::InvalidSyntax(reason.to_owned()), reason));
        }
        if is_kept_out(ctx, connection, peer, parts, outlives) {
            return Err((Fault::AuthenticationFailed, KEPT_OUT));
        }
        if is_translated(connection, &self.core.path, parts) {
            // RFC 4555 §3.9.
            return Err((Fault::UnexpectedNat, "there is a NAT that the peer does not allow"));
        }
        Ok(())
    }

    /// IKE_AUTH after IKE_SESSION_RESUME (RFC 5723 §4.3.3). The proof comes first: nobody else uses a ticket up.
    fn resume(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        presented: Presented,
        parts: Parts,
    ) -> Option<IkeSa> {
        let Presented { serial, grant, .. } = presented;
        let failed = Fault::AuthenticationFailed;
        if let Err(reason) = resumption::check(&self.channel, &self.material, &grant.peer.id, &parts) {
            return self.refuse(ctx, now, &failed, reason);
        }
        let ours = identification(&grant.peer.local_id);
        if parts.id_responder.as_ref().is_some_and(|asked| *asked != ours) {
            return self.refuse(ctx, now, &failed, "it asks for another identity than its ticket has");
        }
        if !is_where_it_says(ctx, &self.core.path, &grant.peer.id, method(&grant.peer)) {
            return self.refuse(ctx, now, &failed, "its identity is not where its messages come from");
        }
        if !ctx.shared.tickets.lock().redeem(now, serial) {
            return self.refuse(ctx, now, &failed, "the ticket was used or withdrawn meanwhile");
        }
        let admitted = readmits(ctx, now, &self.core.path, &grant.connection, &grant.peer, &grant.basis);
        let connection = match admitted {
            Ok(connection) => connection,
            Err(reason) => return self.refuse(ctx, now, &failed, reason),
        };
        if let Err((fault, reason)) = self.may_come_up(ctx, &connection, &grant.peer, &parts, Some(grant.ike_sa)) {
            return self.refuse(ctx, now, &fault, reason);
        }
        if !may_enter(ctx, &connection, &grant.peer, &parts, self.core.id, Some(grant.ike_sa)) {
            return self.refuse(ctx, now, &failed, KEPT_OUT);
        }
        (self.core.name, self.core.dscp) = (ctx.connections.name(&connection.name), connection.dscp);
        ctx.log("IKE", 1, self.core.tag(), resumption::line(now, &grant.peer, &grant.basis));
        // §4.3.4: the old one goes without a Delete.
        ctx.outlived.push(grant.ike_sa);
        let proof = resumption::proof(&self.channel, &self.material, &ours);
        let head = vec![Payload::IdResponder(ours), proof];
        self.establish(ctx, now, parts, (grant.peer, grant.basis.resumed()), connection, head)
    }

    fn signed(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        parts: Parts,
        (peer, basis): (Arc<PeerIdentity>, Arc<Basis>),
        connection: Arc<Connection>,
        result: Result<SignedAuth, SignError>,
    ) -> Option<IkeSa> {
        let signed = match result {
            Ok(signed) => signed,
            Err(error) => return self.refuse(ctx, now, &Fault::AuthenticationFailed, &error.to_string()),
        };
        // Another one may have come up while this one's proof was made.
        if !may_enter(ctx, &connection, &peer, &parts, self.core.id, None) {
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, KEPT_OUT);
        }
        ctx.log("IKE", 1, self.core.tag(), format!("authentication of '{}' (myself)", peer.local_id));
        self.material.note_own_key(&signed);
        let mut head = vec![Payload::IdResponder(identification(&peer.local_id))];
        head.extend(self.material.proof_payloads(signed, connection.send_cert));
        if self.uses_ppk {
            head.push(notify(NotifyType::PPK_IDENTITY, Vec::new()));
        }
        self.establish(ctx, now, parts, (peer, basis), connection, head)
    }

    /// Both sides have proved who they are: `head` has our identity and proof.
    fn establish(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        parts: Parts,
        (peer, basis): (Arc<PeerIdentity>, Arc<Basis>),
        connection: Arc<Connection>,
        mut head: Vec<Payload>,
    ) -> Option<IkeSa> {
        let Self { core, channel, material, .. } = *self;
        let role = super::established::Role::Responder { initial_contact: parts.has(NotifyType::INITIAL_CONTACT) };
        let redirect = auth_redirect(&connection, &core.redirects);
        head.extend(announcement(ctx, &connection, &core, Some(&parts)));
        let binding = material.channel_binding(&channel, &peer, &basis);
        let keys = material.endpoint_keys(&peer, &basis);
        let mut established = Box::new(Established::new(ctx, now, core, channel, connection, peer, basis, role));
        (established.channel_binding, established.endpoint_keys) = (binding, keys.map(Box::new));
        if let Some((gateway, payload)) = redirect {
            head.push(payload);
            established.answer_redirect(ctx, now, &gateway, &head);
            return Some(IkeSa::Established(established));
        }
        established.negotiate_mobility(ctx, false, &parts);
        established.take_tokens(&parts);
        head.extend(established.negotiate_message_id_sync(&parts));
        established.note_window(&parts);
        head.push(window::announcement());
        head.extend(ctx.tokens.payload(established.channel.spis));
        head.extend(established.auth_lifetime(now));
        head.extend(established.answer_ticket_request(ctx, now, &parts));
        let result = established.answer_first_child(ctx, now, head, &parts, &material.ni, &material.nr);
        result.is_ok().then_some(IkeSa::Established(established))
    }

    /// Says no, protected, and ends. A repetition of the request gets the same answer.
    fn refuse(self: Box<Self>, ctx: &mut Context, now: Instant, fault: &Fault, reason: &str) -> Option<IkeSa> {
        self.refuse_with(ctx, now, &[fault.payload()], reason)
    }

    fn refuse_with(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        payloads: &[Payload],
        reason: &str,
    ) -> Option<IkeSa> {
        ctx.log("IKE", 1, self.core.tag(), format!("authentication of the peer failed: {reason}"));
        let answer = self.channel.respond(payloads, None, ctx.rng.as_mut());
        self.core.send(ctx, answer.unwrap_or_default());
        ctx.bury(now, self.channel.local_spi(), self.core.dscp, self.channel.last_words());
        self.abandon(ctx, CloseReason::Failed);
        None
    }
}

const KEPT_OUT: &str = "an IKE_SA with this peer exists and is kept";

/// `unique = keep`: an IKE SA with this peer is up that this one does not take the place of, and the peer does not say
/// that it has none.
fn is_kept_out(
    ctx: &Context,
    connection: &Connection,
    peer: &PeerIdentity,
    parts: &Parts,
    outlives: Option<IkeSaId>,
) -> bool {
    keeps(connection, parts) && ctx.shared.peers.has_other(&PeerKey::of(peer), outlives)
}

/// The same where the IKE SA comes up now: looking and entering are one step, or two that come at once would not see each other.
fn may_enter(
    ctx: &mut Context,
    connection: &Connection,
    peer: &PeerIdentity,
    parts: &Parts,
    id: IkeSaId,
    outlives: Option<IkeSaId>,
) -> bool {
    !keeps(connection, parts) || ctx.enter_alone(&PeerKey::of(peer), id, outlives)
}

fn keeps(connection: &Connection, parts: &Parts) -> bool {
    connection.unique == Unique::Keep && !parts.has(NotifyType::INITIAL_CONTACT)
}
