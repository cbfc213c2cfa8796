//! IKEv2 Message ID synchronisation (RFC 6311), as the peer of a cluster: after a failover the member that takes over
//! says with which message ids it goes on.
//!
//! The request has Message ID 0, outside the window. That is the one exception from the rules of RFC 7296 §2.3, and
//! so it is made for nothing but this notify, and for nobody who has not agreed on it in IKE_AUTH.

use std::time::Instant;

use super::Established;
use super::channel::{Channel, Renumbered};
use super::established::Closed;
use super::fault::notify;
use super::parts::Parts;
use super::retry::Retry;
use crate::Rng;
use crate::engine::context::Context;
use crate::engine::{IkeState, Path, Transport};
use crate::wire::{self, ExchangeType, NotifyType, OpenOutcome, Opened, Payload, Protected, Reassembly};

/// What an IKE SA knows of its peer's cluster.
#[derive(Debug, Default)]
pub(crate) struct MessageIdSync {
    /// Both sides said in IKE_AUTH that they support it.
    agreed: bool,
    last: Option<Last>,
}

/// The last synchronisation, for its repetitions.
#[derive(Debug)]
struct Last {
    request: Sync,
    /// What the member's next request has.
    expected: u32,
    answer: Vec<Vec<u8>>,
}

/// IKEV2_MESSAGE_ID_SYNC (RFC 6311 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sync {
    nonce: [u8; 4],
    send: u32,
    receive: u32,
}

impl Sync {
    fn decode(data: &[u8]) -> Option<Self> {
        let (nonce, rest) = data.split_first_chunk::<4>()?;
        let (send, rest) = rest.split_first_chunk::<4>()?;
        let receive = <[u8; 4]>::try_from(rest).ok()?;
        Some(Self { nonce: *nonce, send: u32::from_be_bytes(*send), receive: u32::from_be_bytes(receive) })
    }

    fn encode(self) -> Payload {
        let data = [self.nonce, self.send.to_be_bytes(), self.receive.to_be_bytes()].concat();
        notify(NotifyType::IKEV2_MESSAGE_ID_SYNC, data)
    }

    /// What a request says that has this notify and nothing else but one about replay counters (§5.1).
    fn of(opened: &Opened) -> Option<Self> {
        let payloads = wire::parse_payloads(opened.first, &opened.body).ok()?;
        let mut sync = None;
        for payload in payloads {
            let Payload::Notify(notify) = payload else { return None };
            match notify.kind {
                NotifyType::IKEV2_MESSAGE_ID_SYNC if sync.is_none() => sync = Some(Self::decode(&notify.data)?),
                // Not agreed on, and so without effect.
                NotifyType::IPSEC_REPLAY_COUNTER_SYNC => {}
                _ => return None,
            }
        }
        sync
    }
}

/// What an initiator says in IKE_AUTH, and a responder to one that did (§5).
pub(crate) fn supported() -> Payload {
    notify(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED, Vec::new())
}

impl MessageIdSync {
    /// The peer is a cluster.
    pub(crate) fn is_agreed(&self) -> bool {
        self.agreed
    }

    /// For the successor of a rekeyed IKE SA.
    pub(crate) fn inherit(&self) -> Self {
        Self { agreed: self.agreed, last: None }
    }
}

impl Established {
    /// IKE_AUTH has said what both sides can; gives what a responder answers.
    pub(crate) fn negotiate_message_id_sync(&mut self, parts: &Parts) -> Option<Payload> {
        self.message_id_sync.agreed = parts.has(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED);
        self.message_id_sync.agreed.then(supported)
    }

    /// Takes a message that may be a synchronisation, and gives back what is none.
    pub(super) fn synchronize(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        path: Path,
        protected: Protected,
    ) -> Result<Option<Protected>, Closed> {
        let header = protected.header;
        let candidate = header.message_id == 0 && !header.response && header.exchange == ExchangeType::INFORMATIONAL;
        if !candidate || !self.message_id_sync.agreed || self.state == IkeState::Rekeyed {
            return Ok(Some(protected));
        }
        let Some(request) = self.channel.peek(&protected).and_then(|opened| Sync::of(&opened)) else {
            return Ok(Some(protected));
        };
        let expected = self.channel.expected_request();
        if let Some(last) = &self.message_id_sync.last
            && last.request == request
            && last.expected == expected
        {
            // Our answer was lost, and nothing has come since: the same answer, and nothing changes.
            self.core.send_along(ctx, path, last.answer.clone());
            return Ok(None);
        }
        // §5.1: silently, whatever the cluster has said or used before.
        let seen = self.message_id_sync.last.as_ref().is_some_and(|last| request.send <= last.request.send);
        if request.send < expected || seen {
            let line =
                format!("ignore message ID sync with lower ({}) than expected ({expected}) sender MID", request.send);
            ctx.log("IKE", 1, self.core.tag(), line);
            return Ok(None);
        }
        let send = request.receive.max(self.channel.next_request());
        let answer = Sync { nonce: request.nonce, send, receive: request.send };
        let line = format!("message ID sync: we go on with {send}, the peer with {}", request.send);
        ctx.log("IKE", 1, self.core.tag(), line);
        let datagrams = self.channel.synchronize(send, request.send, &answer.encode(), ctx.rng.as_mut());
        self.message_id_sync.last = Some(Last { request, expected: request.send, answer: datagrams.clone() });
        self.core.send_along(ctx, path, datagrams);
        // §9: no answer will come to what was asked before.
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        let retry = Retry::start(now, &ctx.config.retransmission, over_stream, ctx.rng.as_mut());
        match self.channel.ask_again(retry, ctx.rng.as_mut()) {
            Ok(renumbered) => {
                for Renumbered { old, new, datagrams } in renumbered {
                    for exchange in self.exchanges.iter_mut().filter(|exchange| exchange.message_id == Some(old)) {
                        exchange.message_id = Some(new);
                    }
                    self.core.send(ctx, datagrams);
                }
            }
            Err(_) => return Err(self.close(ctx, now, crate::engine::CloseReason::Expired)),
        }
        Ok(None)
    }
}

/// The message ids are used up (RFC 7296 §2.2).
pub(crate) struct UsedUp;

impl Channel {
    /// Opens a whole request without a change here; `None` where it is forged, or a fragment.
    fn peek(&self, protected: &Protected) -> Option<Opened> {
        let header = protected.header;
        let ours = header.initiator_spi == self.spis.initiator && header.responder_spi == self.spis.responder;
        if !ours || header.from_initiator == self.initiator {
            return None;
        }
        match protected.clone().open(&self.inbound()?, &mut Reassembly::default()) {
            Ok(OpenOutcome::Whole(opened)) => Some(opened),
            Ok(OpenOutcome::Pending) | Err(_) => None,
        }
    }

    /// Goes on with these message ids, and seals the answer that says so: with Message ID 0, as the request.
    fn synchronize(&mut self, next: u32, expected: u32, answer: &Payload, rng: &mut dyn Rng) -> Vec<Vec<u8>> {
        self.go_on_with(next, expected);
        self.seal_apart((ExchangeType::INFORMATIONAL, 0, true), std::slice::from_ref(answer), rng)
    }
}

/// A cluster's member, for tests.
#[cfg(test)]
impl Channel {
    /// Seals a request outside the window.
    pub(crate) fn ask_apart(&self, message_id: u32, payloads: &[Payload], rng: &mut dyn Rng) -> Vec<u8> {
        self.seal_apart((ExchangeType::INFORMATIONAL, message_id, false), payloads, rng).remove(0)
    }

    /// Opens an answer outside the window.
    pub(crate) fn open_apart(&self, datagram: &[u8]) -> Option<(u32, Vec<Payload>)> {
        let Ok(wire::Incoming::Protected(protected)) = wire::parse(datagram) else { return None };
        let opened = self.peek(&protected)?;
        Some((opened.header.message_id, wire::parse_payloads(opened.first, &opened.body).ok()?))
    }

    /// Opens what we have sent.
    pub(crate) fn open_own(&self, datagram: &[u8]) -> Vec<Payload> {
        let Ok(wire::Incoming::Protected(protected)) = wire::parse(datagram) else { panic!("a protected message") };
        match protected.open(&self.outbound().unwrap(), &mut Reassembly::default()) {
            Ok(OpenOutcome::Whole(opened)) => wire::parse_payloads(opened.first, &opened.body).unwrap(),
            _ => panic!("our own message"),
        }
    }

    /// What the next requests of both sides have.
    pub(crate) fn message_ids(&self) -> (u32, u32) {
        (self.next_request(), self.expected_request())
    }

    /// The member takes over with these.
    pub(crate) fn take_over(&mut self, next: u32, expected: u32) {
        self.go_on_with(next, expected);
    }
}
