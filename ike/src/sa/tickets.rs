//! Tickets of an IKE SA that is up: asking for one, giving one, and what becomes of it at the end (RFC 5723 §4.1, §4.2,
//! §6.2).
//!
//! A ticket belongs to one IKE SA: rekeying ends it on both sides, and the client asks for another one under the
//! successor. It outlives its IKE SA only where that ended in silence.

use std::time::{Duration, Instant};

use super::Established;
use super::basis::readmits;
use super::established::{Active, Closed, Task};
use super::fault::notify;
use super::parts::Parts;
use super::retry::after;
use crate::engine::context::Context;
use crate::engine::tickets::{Grant, Held, Keys, LONGEST, is_possible};
use crate::engine::{CloseReason, IkeState};
use crate::wire::{ExchangeType, NotifyType, Payload};

/// How often a gateway is asked again that said TICKET_ACK.
const MAX_REQUESTS: u8 = 3;
const REQUEST_AGAIN: Duration = Duration::from_secs(10);
/// TICKET_LT_OPAQUE begins with the lifetime.
const LIFETIME: usize = 4;

/// The ticket of an IKE SA.
#[derive(Debug, Default)]
pub(crate) struct SessionTicket {
    /// As gateway: the number of the one that the peer has.
    given: Option<u64>,
    /// As client: the one that we have, and its end.
    kept: Option<(Vec<u8>, Instant)>,
    /// As client: the gateway gives tickets.
    available: bool,
    /// As client: requests after TICKET_ACK.
    requests: u8,
}

impl SessionTicket {
    /// What the successor of a rekeyed IKE SA knows: no ticket, but whether to ask for one.
    pub(super) fn inherit(&self) -> Self {
        Self { available: self.available, ..Self::default() }
    }
}

/// The request for a ticket, which a client sends (§4.1).
pub(crate) fn request() -> Payload {
    notify(NotifyType::TICKET_REQUEST, Vec::new())
}

impl Established {
    // As gateway.

    /// The answer to a request for a ticket, if there is one in the message: a ticket, or TICKET_NACK.
    pub(super) fn answer_ticket_request(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) -> Option<Payload> {
        if !parts.has(NotifyType::TICKET_REQUEST) {
            return None;
        }
        Some(match self.give_ticket(ctx, now) {
            Ok(payload) => payload,
            Err(reason) => {
                ctx.log("IKE", 1, self.core.tag(), format!("no ticket for the peer: {reason}"));
                notify(NotifyType::TICKET_NACK, Vec::new())
            }
        })
    }

    fn give_ticket(&mut self, ctx: &mut Context, now: Instant) -> Result<Payload, &'static str> {
        // It replaces the one before, whatever comes.
        self.withdraw_ticket(ctx);
        if self.original_initiator {
            return Err("it did not initiate");
        }
        if !matches!(self.state, IkeState::Established | IkeState::Rekeying) {
            return Err("the IKE_SA is closing");
        }
        let connection = readmits(ctx, now, &self.core.path, &self.connection, &self.peer, &self.basis)?;
        // §6.2: the IKE SA's own time, the time until reauthentication, and that of the certificates.
        let ends = [self.expire_at, self.reauth_at, self.basis.good_until];
        let left = ends.into_iter().flatten().map(|at| at.saturating_duration_since(now)).fold(LONGEST, Duration::min);
        let seconds = u32::try_from(left.as_secs()).unwrap_or(u32::MAX);
        if seconds == 0 {
            return Err("its time is over");
        }
        let (peer, basis) = (self.peer.clone(), self.basis.clone());
        let grant = Grant { ike_sa: self.core.id, connection, peer, basis };
        let keys = Keys { suite: self.channel.suite, spis: self.channel.spis, d: &self.channel.d };
        let lifetime = Duration::from_secs(seconds.into());
        let Context { shared, rng, .. } = ctx;
        let issued = shared.tickets.lock().issue(now, rng.as_mut(), grant, &keys, lifetime);
        let (serial, ticket) = issued.ok_or("its identity is too long")?;
        self.ticket.given = Some(serial);
        ctx.log("IKE", 1, self.core.tag(), format!("ticket for the peer, good for {seconds}s"));
        let data = [seconds.to_be_bytes().as_slice(), &ticket].concat();
        Ok(notify(NotifyType::TICKET_LT_OPAQUE, data))
    }

    /// The same for one in a request to rekey this IKE SA: which successor there will be is not decided yet, so the client
    /// has to ask under that one (§4.1).
    pub(super) fn defer_ticket(&self, parts: &Parts) -> Option<Payload> {
        let gives = self.connection.session_resumption && !self.original_initiator;
        let answer = if gives { NotifyType::TICKET_ACK } else { NotifyType::TICKET_NACK };
        parts.has(NotifyType::TICKET_REQUEST).then(|| notify(answer, Vec::new()))
    }

    /// The peer's ticket is no longer good.
    pub(super) fn withdraw_ticket(&mut self, ctx: &mut Context) {
        if let Some(serial) = self.ticket.given.take() {
            ctx.shared.tickets.lock().revoke(serial);
        }
    }

    // As client.

    /// What the gateway says to our request.
    pub(crate) fn take_ticket(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) {
        if !self.wants_tickets() {
            return;
        }
        if let Some(given) = parts.notify(NotifyType::TICKET_LT_OPAQUE) {
            self.ticket.available = true;
            self.ticket.requests = 0;
            let Some((lifetime, ticket)) = given.data.split_first_chunk::<LIFETIME>() else { return };
            let lifetime = Duration::from_secs(u32::from_be_bytes(*lifetime).into()).min(LONGEST);
            if lifetime.is_zero() || !is_possible(ticket) {
                ctx.log("IKE", 1, self.core.tag(), "received a ticket that is of no use, ignored".to_owned());
                return;
            }
            ctx.log("IKE", 1, self.core.tag(), format!("received a ticket, good for {}s", lifetime.as_secs()));
            self.ticket.kept = Some((ticket.to_vec(), after(now, lifetime)));
        } else if parts.has(NotifyType::TICKET_ACK) {
            self.ticket.available = true;
            if self.ticket.requests < MAX_REQUESTS {
                self.ticket.requests = self.ticket.requests.saturating_add(1);
                self.delayed.push((after(now, REQUEST_AGAIN), Task::RequestTicket));
            }
        } else if parts.has(NotifyType::TICKET_NACK) {
            ctx.log("IKE", 1, self.core.tag(), "the peer gives no ticket".to_owned());
            self.ticket.available = false;
        }
    }

    /// The IKE SA was rekeyed: its ticket is that of another one (§6.2).
    pub(super) fn renew_ticket(&mut self) {
        if self.ticket.available && self.wants_tickets() {
            self.queue.push_back(Task::RequestTicket);
        }
    }

    pub(super) fn request_ticket(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        let payloads = vec![request()];
        self.go_on_with(ctx, now, (Active::RequestTicket, None), ExchangeType::INFORMATIONAL, payloads)
    }

    fn wants_tickets(&self) -> bool {
        self.original_initiator && self.connection.session_resumption && self.state == IkeState::Established
    }

    /// The IKE SA was lost, and nobody has deleted it: its ticket is for the next one. False without a ticket.
    pub(super) fn keep_ticket(&mut self, ctx: &mut Context, now: Instant) -> bool {
        let open = matches!(self.state, IkeState::Established | IkeState::Rekeying);
        let Some((ticket, ends)) = self.ticket.kept.take().filter(|(_, ends)| open && *ends > now) else {
            return false;
        };
        let ends = [self.reauth_at, self.basis.good_until].into_iter().flatten().fold(ends, Instant::min);
        let (peer, basis, connection) = (self.peer.clone(), self.basis.clone(), self.connection.clone());
        let grant = Grant { ike_sa: self.core.id, connection, peer, basis };
        let (suite, d) = (self.channel.suite, self.channel.d.duplicate());
        ctx.shared.tickets.lock().hold(now, self.core.path.remote.ip(), Held { ticket, ends, suite, d, grant });
        true
    }

    // Both.

    /// The IKE SA ends.
    pub(super) fn leave_ticket(&mut self, ctx: &mut Context, now: Instant, reason: CloseReason) {
        if reason == CloseReason::Timeout {
            // §6.2: nobody has deleted the IKE SA, so the ticket stays good.
            self.keep_ticket(ctx, now);
        } else {
            self.withdraw_ticket(ctx);
        }
    }
}
