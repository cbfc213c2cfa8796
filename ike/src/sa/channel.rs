//! The protected channel of one IKE SA: keys, message ids, both windows (RFC 7296 §2.1 to §2.3).
//!
//! Nothing here changes before a message's integrity check has passed. A sealed message is kept and sent
//! again as it is: no two different messages are ever sealed under one key, message id and direction.

use std::time::Instant;

use ipsec::crypto::{CryptoError, Protection};
use ipsec::plane::EspKeys;
use ipsec::secret::Secret;
use sha2::{Digest, Sha256};

use super::message_id_sync::UsedUp;
use super::retry::{Due, Retry};
use super::window::{Inbound, Standing};
use crate::Rng;
use crate::config::Retransmission;
use crate::counters::{Counter, Tally};
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
    /// The answer to an outstanding request of ours.
    Response(Opened),
    /// A request that was answered already: send these octets again.
    Repeated(Vec<Vec<u8>>),
    /// A request that is being answered, or waits for that, again: nothing to say yet.
    Awaited,
    /// An authentic request ahead of the window, with this message id.
    Beyond(u32),
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
    /// Fragments of the answer.
    answer: Reassembly,
}

/// A request that was not answered in time.
pub(crate) struct Overdue {
    pub(crate) message_id: u32,
    /// Repetitions, with this one.
    pub(crate) count: u32,
    /// What to send again; `None` when there were enough of them.
    pub(crate) resend: Option<Vec<Vec<u8>>>,
}

impl std::fmt::Display for Overdue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.resend {
            Some(_) => write!(f, "retransmit {} of request with message ID {}", self.count, self.message_id),
            None => write!(f, "giving up after {} retransmits", self.count),
        }
    }
}

/// A request that goes on under another message id.
pub(super) struct Renumbered {
    pub(super) old: u32,
    pub(super) new: u32,
    pub(super) datagrams: Vec<Vec<u8>>,
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
    /// Keys of our messages and of the peer's. They are bound to the cipher for each message: what that makes takes ten times
    /// as much memory, and nearly all IKE SAs are idle.
    outbound: EspKeys,
    inbound: EspKeys,
    /// What opened the last request, where the keys are newer than that: it may be repeated.
    earlier: Option<Box<EspKeys>>,
    next_request: u32,
    /// In order of their message ids.
    outstanding: Vec<Outstanding>,
    /// How many may be out.
    window: u8,
    inbound_window: Inbound,
    /// Requests of which fragments are missing.
    requests: Vec<Reassembly>,
    /// Where its messages are counted.
    pub(crate) tally: Option<Tally>,
}

/// The keys of our messages and of the peer's, if they are good for the suite: then binding them does not fail.
fn directions(
    suite: &IkeSuite,
    (of_initiator, of_responder): (EspKeys, EspKeys),
    initiator: bool,
) -> Result<(EspKeys, EspKeys), CryptoError> {
    let lengths = Protection::key_lengths(suite.encr, suite.key_bits, suite.integ).ok_or(CryptoError::Unsupported)?;
    let fit = |keys: &EspKeys| (keys.encr.expose().len(), keys.integ.expose().len()) == (lengths.encr, lengths.integ);
    if !fit(&of_initiator) || !fit(&of_responder) {
        return Err(CryptoError::KeyLength);
    }
    Ok(if initiator { (of_initiator, of_responder) } else { (of_responder, of_initiator) })
}

impl Channel {
    /// Takes the keys. `first_request` is the first message id of each direction's requests: the responder of
    /// a first IKE SA expects 1 because IKE_SA_INIT had 0; a rekeyed one starts at 0 (§2.2).
    pub(crate) fn new(
        suite: IkeSuite,
        keys: IkeKeys,
        spis: Spis,
        initiator: bool,
        rekeyed: bool,
    ) -> Result<Self, CryptoError> {
        let IkeKeys { d, initiator: of_initiator, responder: of_responder, pi, pr } = keys;
        let (outbound, inbound) = directions(&suite, (of_initiator, of_responder), initiator)?;
        let (next_request, expected_request) = match (rekeyed, initiator) {
            (true, _) => (0, 0),
            (false, true) => (1, 0),
            (false, false) => (0, 1),
        };
        Ok(Self {
            suite,
            d,
            pi,
            pr,
            fragmentation: false,
            spis,
            initiator,
            outbound,
            inbound,
            earlier: None,
            next_request,
            outstanding: Vec::new(),
            window: 1,
            inbound_window: Inbound::new(expected_request),
            requests: Vec::new(),
            tally: None,
        })
    }

    /// Gives away what it is made of, for the last request of all: what is outstanding is forgotten, and nothing is sealed or
    /// opened with what is left here.
    pub(crate) fn take(&mut self) -> Self {
        let none = || Secret::new(Vec::new());
        let no_keys = || EspKeys { encr: none(), integ: none() };
        Self {
            suite: self.suite,
            d: none(),
            pi: none(),
            pr: none(),
            fragmentation: self.fragmentation,
            spis: self.spis,
            initiator: self.initiator,
            outbound: std::mem::replace(&mut self.outbound, no_keys()),
            inbound: std::mem::replace(&mut self.inbound, no_keys()),
            earlier: self.earlier.take(),
            next_request: self.next_request,
            outstanding: Vec::new(),
            window: self.window,
            inbound_window: std::mem::replace(&mut self.inbound_window, Inbound::new(0)),
            requests: Vec::new(),
            tally: self.tally.clone(),
        }
    }

    /// Its messages count here from now on.
    pub(crate) fn counted(mut self, tally: Option<Tally>) -> Self {
        self.tally = tally;
        self
    }

    /// Counts something else.
    pub(crate) fn count(&self, counter: Counter) {
        if let Some(tally) = &self.tally {
            tally.count(counter);
        }
    }

    fn count_message(&self, exchange: ExchangeType, incoming: bool, response: bool) {
        if let Some(tally) = &self.tally {
            tally.message(exchange, incoming, response);
        }
    }

    /// Goes over to new keys of the same IKE SA (RFC 9242 §3.3.1); message ids go on. What was sealed already
    /// stays as it is, and a repetition of the last request is still known.
    pub(crate) fn renew(&mut self, keys: IkeKeys) -> Result<(), CryptoError> {
        let IkeKeys { d, initiator, responder, pi, pr } = keys;
        let (outbound, inbound) = directions(&self.suite, (initiator, responder), self.initiator)?;
        self.outbound = outbound;
        self.earlier = Some(Box::new(std::mem::replace(&mut self.inbound, inbound)));
        (self.d, self.pi, self.pr) = (d, pi, pr);
        Ok(())
    }

    /// Gives back the room that messages took.
    pub(crate) fn rest(&mut self) {
        self.outstanding.shrink_to_fit();
        self.requests.shrink_to_fit();
        self.inbound_window.rest();
    }

    /// Forgets SK_pi and SK_pr: once both sides have proved who they are, nothing needs them any more.
    pub(crate) fn forget_proof_keys(&mut self) {
        (self.pi, self.pr) = (Secret::new(Vec::new()), Secret::new(Vec::new()));
    }

    fn bind(&self, keys: &EspKeys) -> Result<Protection, CryptoError> {
        Protection::new(self.suite.encr, self.suite.key_bits, self.suite.integ, keys)
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
        let received =
            if header.response { self.receive_response(protected) } else { self.receive_request(protected, datagram) };
        match &received {
            Received::Request(_) => self.count_message(header.exchange, true, false),
            Received::Response(_) => self.count_message(header.exchange, true, true),
            Received::Forged => self.count(Counter::Invalid),
            Received::Repeated(_) | Received::Awaited | Received::Beyond(_) | Received::Ignored => {}
        }
        received
    }

    fn receive_response(&mut self, protected: Protected) -> Received {
        let header = protected.header;
        let fits =
            |request: &Outstanding| request.message_id == header.message_id && request.exchange == header.exchange;
        let Some(index) = self.outstanding.iter().position(fits) else { return Received::Ignored };
        let Ok(inbound) = self.bind(&self.inbound) else { return Received::Ignored };
        let opened = self.outstanding.get_mut(index).map(|request| protected.open(&inbound, &mut request.answer));
        match opened {
            Some(Ok(OpenOutcome::Whole(opened))) => {
                self.outstanding.remove(index);
                Received::Response(opened)
            }
            Some(Err(OpenError::Integrity)) => Received::Forged,
            Some(Ok(OpenOutcome::Pending) | Err(OpenError::Wire(_))) | None => Received::Ignored,
        }
    }

    fn receive_request(&mut self, protected: Protected, datagram: &[u8]) -> Received {
        let message_id = protected.header.message_id;
        let Ok(inbound) = self.bind(&self.inbound) else { return Received::Ignored };
        match self.inbound_window.standing(message_id) {
            Standing::New => {}
            Standing::Beyond => {
                return match protected.open(&inbound, &mut Reassembly::default()) {
                    Ok(_) => Received::Beyond(message_id),
                    Err(_) => Received::Ignored,
                };
            }
            Standing::Unanswered | Standing::Answered | Standing::Old => return self.repeated(protected),
        }
        let begun = self.requests.iter().position(|fragments| fragments.message_id() == Some(message_id));
        let mut fragments = begun.map(|index| self.requests.swap_remove(index)).unwrap_or_default();
        let opened = protected.open(&inbound, &mut fragments);
        let forged = matches!(opened, Err(OpenError::Integrity));
        if let Ok(OpenOutcome::Whole(opened)) = opened {
            let digest = Sha256::digest(datagram).into();
            self.inbound_window.received(message_id, opened.header.exchange, digest);
            self.earlier = None;
            return Received::Request(opened);
        }
        if fragments.message_id().is_some() {
            self.requests.push(fragments);
        }
        if forged { Received::Forged } else { Received::Ignored }
    }

    /// Answers a repetition of a request in the window, and takes nothing else.
    pub(crate) fn repeated(&self, protected: Protected) -> Received {
        let header = protected.header;
        // RFC 7383 §2.6.1: only the first fragment of a repetition counts.
        if header.response || header.from_initiator == self.initiator || protected.is_later_fragment() {
            return Received::Ignored;
        }
        let standing = self.inbound_window.standing(header.message_id);
        let inbound = match standing {
            Standing::Unanswered => &self.inbound,
            Standing::Answered => self.earlier.as_deref().unwrap_or(&self.inbound),
            Standing::New | Standing::Old | Standing::Beyond => return Received::Ignored,
        };
        // A scratch reassembly keeps the repetition from touching a newer message.
        let opened = self.bind(inbound).map(|inbound| protected.open(&inbound, &mut Reassembly::default()));
        if !matches!(opened, Ok(Ok(_))) {
            return Received::Ignored;
        }
        // RFC 7296 §2.1: a repeated request is answered with the same octets.
        match self.inbound_window.answer_to(header.message_id) {
            Some(datagrams) => Received::Repeated(datagrams.to_vec()),
            None => Received::Awaited,
        }
    }

    /// Octets of fragments that wait for others, in both directions.
    pub(crate) fn fragment_octets(&self) -> usize {
        let answers = self.outstanding.iter().map(|request| &request.answer);
        self.requests.iter().chain(answers).map(Reassembly::octets).fold(0, usize::saturating_add)
    }

    /// Forgets them (RFC 7383 §2.6).
    pub(crate) fn drop_fragments(&mut self) {
        self.requests.clear();
        self.outstanding.iter_mut().for_each(|request| request.answer.clear());
    }

    /// The peer knows that it may have several requests out.
    pub(crate) fn open_window(&mut self) {
        self.inbound_window.widen();
    }

    /// So many requests of ours may be out; no fewer than before.
    pub(crate) fn may_ask(&mut self, window: u8) {
        self.window = self.window.max(window);
    }

    /// How many requests of ours may be out.
    pub(crate) fn window(&self) -> usize {
        self.window.into()
    }

    /// True when another request may go out (§2.3): the answers to all that is further back than the window are here.
    pub(crate) fn has_room(&self) -> bool {
        let oldest = self.outstanding.first().map_or(self.next_request, |request| request.message_id);
        self.next_request.saturating_sub(oldest) < self.window.into()
    }

    /// The message id of the request that is being answered.
    pub(crate) fn answering(&self) -> Option<u32> {
        self.inbound_window.current().map(|(message_id, _)| message_id)
    }

    /// Forgets answers that nobody waits for any more.
    pub(crate) fn forget_old_answers(&mut self) {
        self.inbound_window.forget_old_answers();
        self.requests.shrink_to_fit();
        self.outstanding.shrink_to_fit();
    }

    // For RFC 6311, see `message_id_sync`.

    pub(super) fn inbound(&self) -> Option<Protection> {
        self.bind(&self.inbound).ok()
    }

    #[cfg(test)]
    pub(super) fn outbound(&self) -> Option<Protection> {
        self.bind(&self.outbound).ok()
    }

    /// The message id of the peer's next request.
    pub(super) fn expected_request(&self) -> u32 {
        self.inbound_window.next()
    }

    /// The message id of our next request.
    pub(super) fn next_request(&self) -> u32 {
        self.next_request
    }

    /// Both directions go on with other message ids. What was answered or half received is forgotten; none of the
    /// numbers becomes lower.
    pub(super) fn go_on_with(&mut self, next: u32, expected: u32) {
        self.next_request = self.next_request.max(next);
        self.inbound_window.go_on_with(expected);
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
        let outbound = self.bind(&self.outbound);
        outbound.map(|outbound| wire::seal(&header, payloads, &outbound, None, rng)).unwrap_or_default()
    }

    /// True while a request of ours awaits its answer.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.outstanding.is_empty()
    }

    /// Says what is outstanding again, under the next message ids; gives both of each.
    pub(super) fn ask_again(&mut self, retry: Retry, rng: &mut dyn Rng) -> Result<Vec<Renumbered>, UsedUp> {
        let mut renumbered = Vec::new();
        for old in std::mem::take(&mut self.outstanding) {
            let new = self.next_request;
            let datagrams = self.request(old.exchange, &old.payloads, old.max_length, retry, rng).ok_or(UsedUp)?;
            renumbered.push(Renumbered { old: old.message_id, new, datagrams });
        }
        Ok(renumbered)
    }

    /// Seals a request; `None` when the message ids are used up (§2.2) or no more may be out.
    pub(crate) fn request(
        &mut self,
        exchange: ExchangeType,
        payloads: &[Payload],
        max_length: Option<usize>,
        retry: Retry,
        rng: &mut dyn Rng,
    ) -> Option<Vec<Vec<u8>>> {
        if !self.has_room() {
            return None;
        }
        let outbound = self.bind(&self.outbound).ok()?;
        let message_id = self.next_request;
        self.next_request = message_id.checked_add(1)?;
        let header = self.header(exchange, message_id, false);
        let datagrams = wire::seal(&header, payloads, &outbound, max_length, rng);
        self.count_message(exchange, false, false);
        self.outstanding.push(Outstanding {
            message_id,
            exchange,
            datagrams: datagrams.clone(),
            payloads: payloads.to_vec(),
            max_length,
            retry,
            answer: Reassembly::default(),
        });
        Some(datagrams)
    }

    /// The octets of the next request as IKE_INTERMEDIATE authenticates them (RFC 9242 §3.3.2).
    pub(crate) fn request_octets(&self, exchange: ExchangeType, payloads: &[Payload]) -> Option<Vec<u8>> {
        wire::plain_octets(&self.header(exchange, self.next_request, false), payloads)
    }

    /// The same of the answer to the request that is being processed.
    pub(crate) fn response_octets(&self, payloads: &[Payload]) -> Option<Vec<u8>> {
        let (message_id, exchange) = self.inbound_window.current()?;
        wire::plain_octets(&self.header(exchange, message_id, true), payloads)
    }

    /// Seals the answer to the request that is being processed, and keeps it for repetitions.
    pub(crate) fn respond(
        &mut self,
        payloads: &[Payload],
        max_length: Option<usize>,
        rng: &mut dyn Rng,
    ) -> Option<Vec<Vec<u8>>> {
        let (message_id, exchange) = self.inbound_window.current()?;
        let header = self.header(exchange, message_id, true);
        let outbound = self.bind(&self.outbound).ok()?;
        let datagrams = wire::seal(&header, payloads, &outbound, max_length, rng);
        self.count_message(exchange, false, true);
        self.inbound_window.answer(datagrams.clone());
        Some(datagrams)
    }

    /// The last request's digest and our answer to it, to be repeated after the SA is gone.
    pub(crate) fn last_words(&mut self) -> Option<([u8; 32], Vec<Vec<u8>>)> {
        self.inbound_window.last_words()
    }

    /// The octets of what is outstanding, from the oldest.
    pub(crate) fn outstanding(&self) -> Vec<Vec<u8>> {
        self.outstanding.iter().flat_map(|request| &request.datagrams).cloned().collect()
    }

    /// When a request is due for repetition.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.outstanding.iter().map(|request| request.retry.at).min()
    }

    /// What is due for the first of the outstanding requests for which something is; `None` when nothing is.
    pub(crate) fn poll_retry(&mut self, now: Instant, policy: &Retransmission, rng: &mut dyn Rng) -> Option<Overdue> {
        self.outstanding.iter_mut().find_map(|request| {
            let resend = match request.retry.poll(now, policy, rng) {
                Due::Nothing => return None,
                Due::Resend => Some(request.datagrams.clone()),
                Due::GiveUp => None,
            };
            Some(Overdue { message_id: request.message_id, count: request.retry.done, resend })
        })
    }

    /// Starts the timers anew: what is outstanding was sent again over a new path (RFC 9329 §6.1).
    pub(crate) fn restart_retry(&mut self, retry: Retry) {
        self.outstanding.iter_mut().for_each(|request| request.retry = retry);
    }

    /// How many answers are kept for repetitions.
    #[cfg(test)]
    pub(crate) fn answers_kept(&self) -> usize {
        self.inbound_window.answers_kept()
    }

    /// The peer has a window of one after all.
    #[cfg(test)]
    pub(crate) fn forget_window(&mut self) {
        self.window = 1;
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
        let outstanding = self.outstanding.first().filter(|_| response);
        let (exchange, message_id) = match outstanding {
            Some(request) if ahead == 0 => (request.exchange, request.message_id),
            Some(request) => (exchange, request.message_id.wrapping_add(u32::from(ahead))),
            None => (exchange, self.inbound_window.next().wrapping_add(u32::from(ahead))),
        };
        let header = Header { from_initiator: !self.initiator, ..self.header(exchange, message_id, response) };
        let inbound = self.bind(&self.inbound);
        inbound.map(|inbound| wire::seal(&header, payloads, &inbound, max_length, rng)).unwrap_or_default()
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
