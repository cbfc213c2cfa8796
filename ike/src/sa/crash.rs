//! Quick crash detection (RFC 6290): each side may give the other a token with which it can say later that it has
//! lost the IKE SA.
//!
//! A token is a MAC over the IKE SA's SPIs under a secret that survives a restart, so that it can be made again
//! without the IKE SA. Whoever learns a token can end the IKE SA: it is never shown in the clear while either of
//! the SPIs is one of ours (§9.2).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use ipsec::secret::Secret;
use ipsec::transform::Protocol;
use sha2::Sha256;

use super::Established;
use super::channel::Spis;
use super::established::Closed;
use super::parts::Parts;
use crate::engine::context::Context;
use crate::engine::shared::Short;
use crate::engine::{CloseReason, IkeState};
use crate::wire::{Header, Message, Notify, NotifyType, Payload};

/// RFC 6290 §5: a token's length in octets.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 16..=128;
/// Tokens in one message that are looked at, and tokens of one IKE SA that are kept (§4.5, §5).
const MAX_TOKENS: usize = 4;
/// Wrong tokens for one IKE SA, or tokens that we show, in one period (§8.1, §9.3).
const MAX_PER_PERIOD: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

/// So many in each period, and no more.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    since: Option<Instant>,
    count: u32,
}

impl Throttle {
    fn admits(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            (self.since, self.count) = (Some(now), 0);
        }
        self.count = self.count.saturating_add(1);
        self.count <= MAX_PER_PERIOD
    }
}

/// The side that makes tokens; without a secret it makes none.
#[derive(Debug, Default)]
pub(crate) struct TokenMaker {
    secret: Option<Secret>,
}

impl TokenMaker {
    pub(crate) fn new(secret: Option<Secret>) -> Self {
        Self { secret }
    }

    /// The token for an IKE SA, for a message that it protects (§4.2).
    pub(crate) fn payload(&self, spis: Spis) -> Option<Payload> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.secret.as_ref()?.expose()).ok()?;
        mac.update(b"QCD_TOKEN");
        mac.update(&spis.initiator.to_be_bytes());
        mac.update(&spis.responder.to_be_bytes());
        let data = mac.finalize().into_bytes().to_vec();
        let (protocol, spi, kind) = (Protocol::IKE, Vec::new(), NotifyType::QUICK_CRASH_DETECTION);
        Some(Payload::Notify(Notify { protocol, spi, kind, data }))
    }

    /// The unprotected answer to a protected request of an IKE SA that we do not have (§4.5). The caller knows that
    /// neither SPI is one of ours. `shown` limits how often.
    pub(crate) fn lost(&self, now: Instant, request: &Header, shown: &Short<Throttle>) -> Option<Message> {
        if request.response || request.initiator_spi == 0 || request.responder_spi == 0 {
            return None;
        }
        let spis = Spis { initiator: request.initiator_spi, responder: request.responder_spi };
        let token = self.payload(spis)?;
        if !shown.lock().admits(now) {
            return None;
        }
        let header = Header { response: true, from_initiator: !request.from_initiator, ..*request };
        Some(Message { header, payloads: vec![super::fault::notify(NotifyType::INVALID_IKE_SPI, Vec::new()), token] })
    }
}

/// The peer's tokens for an IKE SA; the last is the newest.
#[derive(Debug, Default)]
pub(crate) struct TokenTaker {
    tokens: VecDeque<Secret>,
    wrong: Throttle,
}

impl TokenTaker {
    /// Keeps what the peer said under the IKE SA's protection.
    fn take(&mut self, parts: &Parts) {
        for notify in parts.notifies.iter().filter(|notify| is_token(notify)).take(MAX_TOKENS) {
            if self.tokens.len() == MAX_TOKENS {
                self.tokens.pop_front();
            }
            self.tokens.push_back(Secret::new(notify.data.clone()));
        }
    }

    /// Says whether one of the tokens in an unprotected message is one of the peer's, in a time that tells nothing.
    fn proves(&mut self, now: Instant, message: &Message) -> bool {
        let shown = message.payloads.iter().filter_map(|payload| match payload {
            Payload::Notify(notify) if is_token(notify) => Some(notify),
            _ => None,
        });
        let shown: Vec<&Notify> = shown.take(MAX_TOKENS).collect();
        if self.tokens.is_empty() || shown.is_empty() || !self.wrong.admits(now) {
            return false;
        }
        shown.iter().any(|notify| self.tokens.iter().any(|token| token.matches(&notify.data)))
    }
}

fn is_token(notify: &Notify) -> bool {
    notify.kind == NotifyType::QUICK_CRASH_DETECTION && TOKEN_LENGTH.contains(&notify.data.len())
}

impl Established {
    /// The peer's tokens in a protected message (§4.2 to §4.4).
    pub(super) fn take_tokens(&mut self, parts: &Parts) {
        self.crash_tokens.take(parts);
    }

    /// A successor has other SPIs, and so another token (§4.3).
    pub(super) fn renew_token(&mut self, ctx: &Context) {
        if self.state == IkeState::Established
            && let Some(token) = ctx.tokens.payload(self.channel.spis)
        {
            self.inform(token);
        }
    }

    /// An unprotected message says that the peer has lost this IKE SA. With its token that is true, and we go on with
    /// a new one if it was us who initiated; without it, nothing happens.
    pub(crate) fn handle_crash(&mut self, ctx: &mut Context, now: Instant, message: &Message) -> Result<(), Closed> {
        let spis = Spis { initiator: message.header.initiator_spi, responder: message.header.responder_spi };
        if spis != self.channel.spis || !self.crash_tokens.proves(now, message) {
            return Ok(());
        }
        ctx.log("IKE", 0, self.core.tag(), "the peer has lost the IKE_SA: it shows its token".to_owned());
        if !self.original_initiator {
            // What was configured for a dead peer.
            return Err(self.close(ctx, now, CloseReason::Timeout));
        }
        self.reauthenticating = true;
        self.keep_ticket(ctx, now);
        Err(self.close(ctx, now, CloseReason::Restarted))
    }
}
