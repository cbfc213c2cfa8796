//! The protected channel of one IKE SA: keys, message ids, the window of one (RFC 7296 §2.1 to §2.3).
//!
//! Nothing here changes before a message's integrity check has passed. A sealed message is kept and sent
//! again as it is: no two different messages are ever sealed under one key, message id and direction.

use std::time::Instant;

use ipsec::crypto::{CryptoError, Protection};
use ipsec::secret::Secret;
use sha2::{Digest, Sha256};

use super::message_id_sync::UsedUp;
use super::retry::{Due, Retry};
use crate::Rng;
use crate::config::Retransmission;
use crate::crypto::{IkeKeys, IkeSuite};
use crate::wire::{self, ExchangeType, Header, OpenError, OpenOutcome, Opened, Payload, Protected, Reassembly};

/// Both SPIs of an IKE SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spis {
    pub(crate) initiator: u64,
    pub(crate) responder: u64,
}

/// What a closed message turned out to be.
#[derive(Debug)]
pub(crate) enum Received {
    /// A new request, inside the window.
    Request(Opened),
    /// The answer to our outstanding request.
    Response(Opened),
    /// A request that was answered already: send these octets again.
    Repeated(Vec<Vec<u8>>),
    /// The request that is being answered, again: nothing to say yet.
    Awaited,
    /// Old, out of the window or incomplete: nothing changed.
    Ignored,
    /// Its SPIs and number are right and its integrity check fails: nothing changed.
    Forged,
}

/// A request of ours that awaits its answer.
#[derive(Debug)]
struct Outstanding {
    message_id: u32,
    exchange: ExchangeType,
    datagrams: Vec<Vec<u8>>,
    /// What it says, to say it again under another message id (RFC 6311).
    payloads: Vec<Payload>,
    max_length: Option<usize>,
    retry: Retry,
}

/// The answer to the peer's last request.
#[derive(Debug)]
struct Answered {
    message_id: u32,
    datagrams: Vec<Vec<u8>>,
}

pub(crate) struct Channel {
    pub(crate) suite: IkeSuite,
    pub(crate) d: Secret,
    pub(crate) pi: Secret,
    pub(crate) pr: Secret,
    /// The peer announced IKEV2_FRAGMENTATION_SUPPORTED and so did we (RFC 7383 §2.3).
    pub(crate) fragmentation: bool,
    pub(crate) spis: Spis,
    /// We are the original initiator of this IKE SA.
    pub(crate) initiator: bool,
    outbound: Protection,
    inbound: Protection,
    /// What opened the last request, where the keys are newer than that: it may be repeated.
    earlier: Option<Protection>,
    next_request: u32,
    expected_request: u32,
    outstanding: Option<Outstanding>,
    /// The request that is being answered.
    processing: Option<(u32, ExchangeType)>,
    answered: Option<Answered>,
    /// Digest of the datagram that completed the last request.
    last_request: [u8; 32],
    requests: Reassembly,
    responses: Reassembly,
}

/// What protects our messages and the peer's.
fn bind(suite: &IkeSuite, keys: &IkeKeys, initiator: bool) -> Result<(Protection, Protection), CryptoError> {
    let bind = |keys| Protection::new(suite.encr, suite.key_bits, suite.integ, keys);
    let (ours, theirs) =
        if initiator { (&keys.initiator, &keys.responder) } else { (&keys.responder, &keys.initiator) };
    Ok((bind(ours)?, bind(theirs)?))
}

impl Channel {
    /// Binds the keys. `first_request` is the first message id of each direction's requests: the responder of
    /// a first IKE SA expects 1 because IKE_SA_INIT had 0; a rekeyed one starts at 0 (§2.2).
    pub(crate) fn new(
        suite: IkeSuite,
        keys: IkeKeys,
        spis: Spis,
        initiator: bool,
        rekeyed: bool,
    ) -> Result<Self, CryptoError> {
        let (outbound, inbound) = bind(&suite, &keys, initiator)?;
        let (next_request, expected_request) = match (rekeyed, initiator) {
            (true, _) => (0, 0),
            (false, true) => (1, 0),
            (false, false) => (0, 1),
        };
        Ok(Self {
            suite,
            d: keys.d,
            pi: keys.pi,
            pr: keys.pr,
            fragmentation: false,
            spis,
            initiator,
            outbound,
            inbound,
            earlier: None,
            next_request,
            expected_request,
            outstanding: None,
            processing: None,
            answered: None,
            last_request: [0; 32],
            requests: Reassembly::default(),
            responses: Reassembly::default(),
        })
    }

    /// Goes over to new keys of the same IKE SA (RFC 9242 §3.3.1); message ids go on. What was sealed already
    /// stays as it is, and a repetition of the last request is still known.
    pub(crate) fn renew(&mut self, keys: IkeKeys) -> Result<(), CryptoError> {
        let (outbound, inbound) = bind(&self.suite, &keys, self.initiator)?;
        self.outbound = outbound;
        self.earlier = Some(std::mem::replace(&mut self.inbound, inbound));
        (self.d, self.pi, self.pr) = (keys.d, keys.pi, keys.pr);
        Ok(())
    }

    /// The SPI that the peer addresses us with.
    pub(crate) fn local_spi(&self) -> u64 {
        if self.initiator { self.spis.initiator } else { self.spis.responder }
    }

    /// Opens a message if it is inside the window.
    pub(crate) fn receive(&mut self, protected: Protected, datagram: &[u8]) -> Received {
        let header = protected.header;
        let ours = header.initiator_spi == self.spis.initiator && header.responder_spi == self.spis.responder;
        if !ours || header.from_initiator == self.initiator {
            return Received::Ignored;
        }
        if header.response { self.receive_response(protected) } else { self.receive_request(protected, datagram) }
    }

    fn receive_response(&mut self, protected: Protected) -> Received {
        let header = protected.header;
        let fits = self
            .outstanding
            .as_ref()
            .is_some_and(|request| request.message_id == header.message_id && request.exchange == header.exchange);
        if !fits {
            return Received::Ignored;
        }
        match protected.open(&self.inbound, &mut self.responses) {
            Ok(OpenOutcome::Whole(opened)) => {
                self.outstanding = None;
                Received::Response(opened)
            }
            Err(OpenError::Integrity) => Received::Forged,
            Ok(OpenOutcome::Pending) | Err(OpenError::Wire(_)) => Received::Ignored,
        }
    }

    fn receive_request(&mut self, protected: Protected, datagram: &[u8]) -> Received {
        let header = protected.header;
        if header.message_id == self.expected_request && self.processing.is_none() {
            let Some(next) = self.expected_request.checked_add(1) else { return Received::Ignored };
            return match protected.open(&self.inbound, &mut self.requests) {
                Ok(OpenOutcome::Whole(opened)) => {
                    self.expected_request = next;
                    self.processing = Some((opened.header.message_id, opened.header.exchange));
                    self.answered = None;
                    self.earlier = None;
                    self.last_request = Sha256::digest(datagram).into();
                    Received::Request(opened)
                }
                Err(OpenError::Integrity) => Received::Forged,
                Ok(OpenOutcome::Pending) | Err(OpenError::Wire(_)) => Received::Ignored,
            };
        }
        self.repeated(protected)
    }

    /// Answers a repetition of the last request, and takes nothing else.
    pub(crate) fn repeated(&self, protected: Protected) -> Received {
        let header = protected.header;
        if header.response || header.from_initiator == self.initiator {
            return Received::Ignored;
        }
        // RFC 7296 §2.1: a repeated request is answered with the same octets. RFC 7383 §2.6.1: only its
        // first fragment counts. A scratch reassembly keeps the repetition from touching a newer message.
        let is_processed = self.processing.is_some_and(|(message_id, _)| message_id == header.message_id);
        if is_processed && !protected.is_later_fragment() {
            return match protected.open(&self.inbound, &mut Reassembly::default()) {
                Ok(_) => Received::Awaited,
                Err(_) => Received::Ignored,
            };
        }
        match &self.answered {
            Some(answered) if answered.message_id == header.message_id && !protected.is_later_fragment() => {
                let inbound = self.earlier.as_ref().unwrap_or(&self.inbound);
                match protected.open(inbound, &mut Reassembly::default()) {
                    Ok(_) => Received::Repeated(answered.datagrams.clone()),
                    Err(_) => Received::Ignored,
                }
            }
            _ => Received::Ignored,
        }
    }

    /// Octets of fragments that wait for others, in both directions.
    pub(crate) fn fragment_octets(&self) -> usize {
        self.requests.octets().saturating_add(self.responses.octets())
    }

    /// Forgets them (RFC 7383 §2.6).
    pub(crate) fn drop_fragments(&mut self) {
        self.requests.clear();
        self.responses.clear();
    }

    // For RFC 6311, see `message_id_sync`.

    pub(super) fn inbound(&self) -> &Protection {
        &self.inbound
    }

    /// The message id of the peer's next request.
    pub(super) fn expected_request(&self) -> u32 {
        self.expected_request
    }

    /// The message id of our next request.
    pub(super) fn next_request(&self) -> u32 {
        self.next_request
    }

    /// Both directions go on with other message ids. What was answered or half received is forgotten; none of the
    /// numbers becomes lower.
    pub(super) fn go_on_with(&mut self, next: u32, expected: u32) {
        self.next_request = self.next_request.max(next);
        self.expected_request = self.expected_request.max(expected);
        self.answered = None;
        self.drop_fragments();
    }

    /// Seals a message outside the window; the last of the three says whether it is a response.
    pub(super) fn seal_apart(
        &self,
        (exchange, message_id, response): (ExchangeType, u32, bool),
        payloads: &[Payload],
        rng: &mut dyn Rng,
    ) -> Vec<Vec<u8>> {
        let header = self.header(exchange, message_id, response);
        wire::seal(&header, payloads, &self.outbound, None, rng)
    }

    /// Says the outstanding request again, under the next message id.
    pub(super) fn ask_again(&mut self, retry: Retry, rng: &mut dyn Rng) -> Result<Vec<Vec<u8>>, UsedUp> {
        let Some(old) = self.outstanding.take() else { return Ok(Vec::new()) };
        self.request(old.exchange, &old.payloads, old.max_length, retry, rng).ok_or(UsedUp)
    }

    /// True while a request of ours awaits its answer.
    pub(crate) fn is_waiting(&self) -> bool {
        self.outstanding.is_some()
    }

    /// Seals a request; `None` when the message ids are used up (§2.2) or one is outstanding.
    pub(crate) fn request(
        &mut self,
        exchange: ExchangeType,
        payloads: &[Payload],
        max_length: Option<usize>,
        retry: Retry,
        rng: &mut dyn Rng,
    ) -> Option<Vec<Vec<u8>>> {
        if self.outstanding.is_some() {
            return None;
        }
        let message_id = self.next_request;
        self.next_request = message_id.checked_add(1)?;
        let header = self.header(exchange, message_id, false);
        let datagrams = wire::seal(&header, payloads, &self.outbound, max_length, rng);
        self.outstanding = Some(Outstanding {
            message_id,
            exchange,
            datagrams: datagrams.clone(),
            payloads: payloads.to_vec(),
            max_length,
            retry,
        });
        Some(datagrams)
    }

    /// The octets of the next request as IKE_INTERMEDIATE authenticates them (RFC 9242 §3.3.2).
    pub(crate) fn request_octets(&self, exchange: ExchangeType, payloads: &[Payload]) -> Option<Vec<u8>> {
        wire::plain_octets(&self.header(exchange, self.next_request, false), payloads)
    }

    /// The same of the answer to the request that is being processed.
    pub(crate) fn response_octets(&self, payloads: &[Payload]) -> Option<Vec<u8>> {
        let (message_id, exchange) = self.processing?;
        wire::plain_octets(&self.header(exchange, message_id, true), payloads)
    }

    /// Seals the answer to the request that is being processed, and keeps it for repetitions.
    pub(crate) fn respond(
        &mut self,
        payloads: &[Payload],
        max_length: Option<usize>,
        rng: &mut dyn Rng,
    ) -> Option<Vec<Vec<u8>>> {
        let (message_id, exchange) = self.processing.take()?;
        let header = self.header(exchange, message_id, true);
        let datagrams = wire::seal(&header, payloads, &self.outbound, max_length, rng);
        self.answered = Some(Answered { message_id, datagrams: datagrams.clone() });
        Some(datagrams)
    }

    /// The last request's digest and our answer to it, to be repeated after the SA is gone.
    pub(crate) fn last_words(&mut self) -> Option<([u8; 32], Vec<Vec<u8>>)> {
        Some((self.last_request, self.answered.take()?.datagrams))
    }

    /// The octets of the outstanding request.
    pub(crate) fn outstanding(&self) -> Option<&[Vec<u8>]> {
        self.outstanding.as_ref().map(|request| request.datagrams.as_slice())
    }

    /// When the outstanding request is due for repetition.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.outstanding.as_ref().map(|request| request.retry.at)
    }

    /// What is due for the outstanding request; for a repetition its message id and number.
    pub(crate) fn poll_retry(&mut self, now: Instant, policy: &Retransmission, rng: &mut dyn Rng) -> (Due, u32, u32) {
        match &mut self.outstanding {
            Some(request) => {
                let due = request.retry.poll(now, policy, rng);
                (due, request.message_id, request.retry.done)
            }
            None => (Due::Nothing, 0, 0),
        }
    }

    /// Starts the outstanding request's timer anew: it was sent again over a new stream (RFC 9329 §6.1).
    pub(crate) fn restart_retry(&mut self, retry: Retry) {
        if let Some(request) = &mut self.outstanding {
            request.retry = retry;
        }
    }

    /// A message as the peer would seal it: a request with the id that we expect plus `ahead`, or an answer to what is
    /// outstanding. For tests of what an authentic and mad peer can do.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn forge(
        &self,
        exchange: ExchangeType,
        response: bool,
        ahead: u8,
        payloads: &[Payload],
        max_length: Option<usize>,
        rng: &mut dyn Rng,
    ) -> Vec<Vec<u8>> {
        let outstanding = self.outstanding.as_ref().filter(|_| response);
        let (exchange, message_id) = match outstanding {
            Some(request) if ahead == 0 => (request.exchange, request.message_id),
            Some(request) => (exchange, request.message_id.wrapping_add(u32::from(ahead))),
            None => (exchange, self.expected_request.wrapping_add(u32::from(ahead))),
        };
        let header = Header { from_initiator: !self.initiator, ..self.header(exchange, message_id, response) };
        wire::seal(&header, payloads, &self.inbound, max_length, rng)
    }

    fn header(&self, exchange: ExchangeType, message_id: u32, response: bool) -> Header {
        Header {
            initiator_spi: self.spis.initiator,
            responder_spi: self.spis.responder,
            major: 2,
            minor: 0,
            exchange,
            from_initiator: self.initiator,
            response,
            message_id,
        }
    }
}
