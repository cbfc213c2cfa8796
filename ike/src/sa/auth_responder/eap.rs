//! EAP as responder (RFC 7296 §2.16): we prove ourselves by a certificate, then the peer by an EAP method, then both by its key.
//!
//! Each request moves on to the next state, none is asked twice, and only the last one, AUTH by the key that the method gave,
//! makes a [`PeerIdentity`] and with it an IKE SA. What the peer said of Child SAs waits since the first request.

use std::sync::Arc;
use std::time::Instant;

use pad::eap::{AskedIdentity, failure};
use pad::{AuthClass, EapMethod, EapServer, EapServerStep, Identity, PeerIdentity, Proof, SignError, SignedAuth};

use ipsec::secret::Secret;

use super::{Claim, Group, ResponderAuth, may_enter};
use crate::config::Connection;
use crate::engine::context::Context;
use crate::engine::{Job, JobId, JobOutcome};
use crate::sa::IkeSa;
use crate::sa::auth::identification;
use crate::sa::auth_responder::{KEPT_OUT, Phase};
use crate::sa::basis::{Basis, rivals};
use crate::sa::fault::Fault;
use crate::sa::parts::Parts;
use crate::wire::{Identification, Payload};

/// A peer that has said an identity, and whom it may turn out to be.
pub(super) struct Stranger {
    claim: Claim,
    local_id: Identity,
    /// They have us prove ourselves alike, and agree on whether the peer is asked who it is in EAP. The first says how.
    connections: Vec<Arc<Connection>>,
}

/// A peer that has not proved anything yet, with the one identity that it can prove now.
pub(super) struct Claimant {
    claim: Claim,
    local_id: Identity,
    connection: Arc<Connection>,
    identity: Identity,
    method: EapMethod,
}

/// How far it has come.
pub(super) enum State {
    /// Our proof is being made.
    Proving { job: JobId, stranger: Box<Stranger> },
    /// It was asked for its EAP identity.
    Asked { asked: AskedIdentity, stranger: Box<Stranger> },
    /// A request of the method is out.
    Asking { server: Box<EapServer>, claimant: Box<Claimant> },
    /// Its answer is being looked at.
    Checking { job: JobId, claimant: Box<Claimant> },
    /// EAP-Success is out; the proof that it has the key is to come.
    Succeeded { msk: Secret, claimant: Box<Claimant> },
}

impl ResponderAuth {
    /// A request without AUTH: the peer wants EAP.
    pub(super) fn begin_eap(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        id: Identification,
        asserted: Identity,
        parts: Parts,
    ) -> Option<IkeSa> {
        let failed = Fault::AuthenticationFailed;
        if self.material.use_ppk {
            return self.refuse(ctx, now, &failed, "the peer wants EAP together with a PPK, which is not served");
        }
        // §2.16: only together with a public key of ours.
        let takes = |connection: &Connection| {
            matches!(connection.remote.class, AuthClass::Eap(_))
                && connection.local_auth.class == AuthClass::PublicKey
                && !connection.ppk_required
        };
        let mut groups = self.groups(ctx, &asserted, &parts, takes);
        let named = |connection: &Connection| connection.remote.remote_id.match_specificity(&asserted);
        let narrowest = groups.iter().flat_map(|group| &group.connections).filter_map(|one| named(one)).max();
        groups.iter_mut().for_each(|group| group.connections.retain(|connection| named(connection) == narrowest));
        let group = groups.into_iter().find(|group| !group.connections.is_empty());
        let Some((Group { local_id, mut connections }, first)) =
            group.and_then(|group| group.connections.first().cloned().map(|first| (group, first)))
        else {
            let reason = format!("no connection takes EAP of '{asserted}'");
            return self.refuse(ctx, now, &failed, &reason);
        };
        connections.retain(|connection| {
            connection.local_auth == first.local_auth
                && connection.remote.class == first.remote.class
                && connection.remote.eap_id.is_some() == first.remote.eap_id.is_some()
        });
        let auth = first.local_auth.clone();
        let request = self.material.sign_request(&self.channel, local_id.clone(), Some(asserted.clone()), auth);
        let Ok(request) = request else { return self.refuse(ctx, now, &failed, "the PRF is not supported") };
        let job = ctx.job(self.core.id, Job::Sign(request));
        let basis = Basis::new(ctx, now, rivals(ctx, &self.core.path, &asserted), false);
        let claim = Claim { id, asserted, basis, parts: Box::new(parts) };
        let stranger = Box::new(Stranger { claim, local_id, connections });
        self.phase = Phase::Eap(State::Proving { job, stranger });
        Some(IkeSa::ResponderAuth(self))
    }

    pub(super) fn handle_eap_job(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        state: State,
        job: JobId,
        outcome: JobOutcome,
    ) -> Option<IkeSa> {
        match (state, outcome) {
            (State::Proving { job: waiting, stranger }, JobOutcome::Sign(result)) if waiting == job => {
                self.proved_ourselves(ctx, now, stranger, result)
            }
            (State::Checking { job: waiting, claimant }, JobOutcome::EapServer(step)) if waiting == job => match step {
                EapServerStep::Ask(server, packet) => {
                    let state = State::Asking { server: Box::new(server), claimant };
                    Some(self.say(ctx, state, &[Payload::Eap(packet)]))
                }
                EapServerStep::Succeeded { packet, msk } => {
                    let Claimant { identity, method, .. } = &*claimant;
                    let line = format!("EAP method {method} succeeded for '{identity}', MSK established");
                    ctx.log("IKE", 1, self.core.tag(), line);
                    Some(self.say(ctx, State::Succeeded { msk, claimant }, &[Payload::Eap(packet)]))
                }
                EapServerStep::Failed { packet, reason } => {
                    let reason = format!("EAP method {} failed for '{}': {reason}", claimant.method, claimant.identity);
                    self.refuse_with(ctx, now, &[Payload::Eap(packet)], &reason)
                }
            },
            (state, _) => {
                self.phase = Phase::Eap(state);
                Some(IkeSa::ResponderAuth(self))
            }
        }
    }

    pub(super) fn handle_eap_request(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        state: State,
        parts: Parts,
    ) -> Option<IkeSa> {
        if let State::Succeeded { msk, claimant } = state {
            return self.check_key(ctx, now, &msk, *claimant, parts);
        }
        let packet = match (parts.eap, parts.auth) {
            (Some(packet), None) => packet,
            (Some(packet), Some(_)) => return self.fail(ctx, now, &packet, "AUTH before EAP was through"),
            (None, _) => return self.fail(ctx, now, &[], "no EAP where it was its turn"),
        };
        match state {
            State::Asked { asked, stranger } => {
                let identifier = asked.next_identifier();
                match asked.answered(&packet) {
                    Ok(identity) => {
                        let line = format!("received EAP identity '{identity}'");
                        ctx.log("IKE", 1, self.core.tag(), line);
                        self.choose(ctx, now, *stranger, identity, identifier, (Some(&packet), Vec::new()))
                    }
                    Err(error) => self.fail(ctx, now, &packet, &error.to_string()),
                }
            }
            State::Asking { server, claimant } => {
                let job = ctx.job(self.core.id, Job::EapServer(server, packet));
                self.phase = Phase::Eap(State::Checking { job, claimant });
                Some(IkeSa::ResponderAuth(self))
            }
            // There is a request of the peer's that has no answer yet, and it may have one (§2.3).
            State::Proving { .. } | State::Checking { .. } | State::Succeeded { .. } => {
                self.fail(ctx, now, &packet, "a request out of turn")
            }
        }
    }

    /// Our proof goes out with the first EAP request.
    fn proved_ourselves(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stranger: Box<Stranger>,
        result: Result<SignedAuth, SignError>,
    ) -> Option<IkeSa> {
        let signed = match result {
            Ok(signed) if signed.method.class() == Some(AuthClass::PublicKey) => signed,
            Ok(_) => return self.refuse(ctx, now, &Fault::AuthenticationFailed, "our proof is not by a public key"),
            Err(error) => return self.refuse(ctx, now, &Fault::AuthenticationFailed, &error.to_string()),
        };
        let Some(first) = stranger.connections.first().cloned() else {
            return self.refuse(ctx, now, &Fault::AuthenticationFailed, "no connection takes EAP");
        };
        let line = format!("authentication of '{}' (myself)", stranger.local_id);
        ctx.log("IKE", 1, self.core.tag(), line);
        self.material.note_own_key(&signed);
        let mut head = vec![Payload::IdResponder(identification(&stranger.local_id))];
        head.extend(self.material.proof_payloads(signed, first.send_cert));
        let mut identifier = [0];
        ctx.rng.fill(&mut identifier);
        let [identifier] = identifier;
        if first.remote.eap_id.is_some() {
            let (asked, packet) = AskedIdentity::begin(identifier);
            head.push(Payload::Eap(packet));
            return Some(self.say(ctx, State::Asked { asked, stranger }, &head));
        }
        let identity = stranger.claim.asserted.clone();
        self.choose(ctx, now, *stranger, identity, identifier, (None, head))
    }

    /// The connection that has a peer prove this identity; its method begins.
    fn choose(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stranger: Stranger,
        identity: Identity,
        identifier: u8,
        (answers, mut head): (Option<&[u8]>, Vec<Payload>),
    ) -> Option<IkeSa> {
        let Stranger { claim, local_id, connections } = stranger;
        let chosen = connections.iter().find_map(|connection| match connection.remote.class {
            AuthClass::Eap(method) if admits(ctx, connection, &identity, &claim.asserted) => Some((connection, method)),
            _ => None,
        });
        let Some((connection, method)) = chosen else {
            let reason = format!("no connection admits '{identity}' by EAP");
            return match answers {
                Some(packet) => self.fail(ctx, now, packet, &reason),
                None => self.refuse(ctx, now, &Fault::AuthenticationFailed, &reason),
            };
        };
        let mut challenge = [0; pad::eap::CHALLENGE_LENGTH];
        ctx.rng.fill(&mut challenge);
        let (server, packet) = EapServer::begin(method, identity.clone(), local_id.clone(), identifier, challenge);
        ctx.log("IKE", 1, self.core.tag(), format!("initiating {method} method (id 0x{identifier:02X})"));
        head.push(Payload::Eap(packet));
        let connection = Arc::clone(connection);
        let claimant = Box::new(Claimant { claim, local_id, connection, identity, method });
        Some(self.say(ctx, State::Asking { server: Box::new(server), claimant }, &head))
    }

    /// AUTH by the key of the method (§2.16): whoever was in the middle of it does not have the keys of this IKE SA too.
    fn check_key(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        msk: &Secret,
        claimant: Claimant,
        mut last: Parts,
    ) -> Option<IkeSa> {
        let failed = Fault::AuthenticationFailed;
        let Claimant { claim, local_id, connection, identity, method } = claimant;
        let proved =
            last.auth.take().is_some_and(|auth| self.material.is_proved_by_key(&self.channel, &claim.id, &auth, msk));
        if !proved {
            return self.refuse(ctx, now, &failed, "it does not prove that it has the key of its EAP method");
        }
        // What was removed or changed meanwhile admits nobody; nor does the peer leave its addresses.
        let current = ctx.connections.named(&connection.name).find(|current| {
            current.authenticates_as(&connection)
                && current.admits_addresses(&self.core.path)
                && admits(ctx, current, &identity, &claim.asserted)
        });
        let Some(connection) = current.cloned() else {
            return self.refuse(ctx, now, &failed, "the connection has changed");
        };
        let Claim { asserted, basis, mut parts, .. } = claim;
        parts.notifies.append(&mut last.notifies);
        let entry = connection.name.clone();
        let proof = Proof::Eap { method, ike_id: asserted };
        let peer = Arc::new(PeerIdentity { id: identity, local_id, proof, entry });
        if let Err((fault, reason)) = self.may_come_up(ctx, &connection, &peer, &parts, None) {
            return self.refuse(ctx, now, &fault, reason);
        }
        if !may_enter(ctx, &connection, &peer, &parts, self.core.id, None) {
            return self.refuse(ctx, now, &failed, KEPT_OUT);
        }
        let Ok(proof) = self.material.proof_by_key(&self.channel, &peer.local_id, msk) else {
            return self.refuse(ctx, now, &failed, "the PRF is not supported");
        };
        (self.core.name, self.core.dscp) = (ctx.connections.name(&connection.name), connection.dscp);
        self.channel.tally = Some(ctx.shared.counters.of(&connection.name));
        ctx.log("IKE", 1, self.core.tag(), format!("authentication of '{}' with EAP successful", peer.id));
        let basis = basis.proved(now, None, Vec::new());
        self.establish(ctx, now, *parts, (peer, basis), connection, vec![proof])
    }

    /// Answers, and waits for the next request.
    fn say(mut self: Box<Self>, ctx: &mut Context, state: State, payloads: &[Payload]) -> IkeSa {
        let fragmentation = match &state {
            State::Proving { stranger, .. } | State::Asked { stranger, .. } => stranger.connections.first(),
            State::Asking { claimant, .. } | State::Checking { claimant, .. } | State::Succeeded { claimant, .. } => {
                Some(&claimant.connection)
            }
        };
        let max_length = fragmentation.and_then(|connection| {
            ctx.max_length(&self.core.path, self.channel.fragmentation, connection.fragmentation)
        });
        let answer = self.channel.respond(payloads, max_length, ctx.rng.as_mut());
        self.core.send(ctx, answer.unwrap_or_default());
        self.phase = Phase::Eap(state);
        IkeSa::ResponderAuth(self)
    }

    /// EAP-Failure in answer to this packet, and the end (§2.16).
    fn fail(self: Box<Self>, ctx: &mut Context, now: Instant, packet: &[u8], reason: &str) -> Option<IkeSa> {
        self.refuse_with(ctx, now, &[Payload::Eap(failure(packet))], reason)
    }
}

/// Says whether a connection has its peer prove this identity, and no other names it more narrowly: as whatever else it says it
/// is, the proof of a narrower one is asked for (RFC 4301 §4.4.3). What it says in IKE beside it must not be another's either.
fn admits(ctx: &Context, connection: &Connection, identity: &Identity, asserted: &Identity) -> bool {
    let proved = connection.remote.proved_id().match_specificity(identity);
    let said = connection.remote.remote_id.match_specificity(asserted);
    proved.is_some()
        && proved >= ctx.connections.narrowest(identity)
        && said.is_some()
        && (asserted == identity || said >= ctx.connections.narrowest(asserted))
}
