//! Redirection to another gateway (RFC 5685), in IKE_SA_INIT, in IKE_AUTH and of an IKE SA that is up.
//!
//! Where to go is all that a redirect says: whom to find there is what the connection says, as ever. The address
//! is found outside, by a job: a name has to be looked up, and the source of the route to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::established::{Active, Closed, Task, done, failed};
use super::fault::notify;
use super::parts::Parts;
use super::retry::after;
use super::{Established, Want};
use crate::config::{Connection, RedirectPhase};
use crate::engine::context::Context;
use crate::engine::{CloseReason, IkeSaId, IkeState, Job, JobId};
use crate::wire::{ExchangeType, NotifyType, Payload};

/// MAX_REDIRECTS and REDIRECT_LOOP_DETECT_PERIOD (RFC 5685 §7).
const MAX_REDIRECTS: usize = 5;
const LOOP_DETECT_PERIOD: Duration = Duration::from_secs(300);

/// The longest name of a host (RFC 1035 §2.3.4).
const MAX_NAME: usize = 255;

/// Another gateway (RFC 5685 §9.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gateway {
    /// By its address.
    Address(IpAddr),
    /// By its FQDN.
    Name(String),
}

impl std::fmt::Display for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl Gateway {
    /// Reads an address or a host name; `None` for what is neither.
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(address) = text.parse() {
            return Some(Self::Address(address));
        }
        let of_names = |octet: u8| octet.is_ascii_alphanumeric() || b"-._".contains(&octet);
        let is_name = (1..=MAX_NAME).contains(&text.len())
            && text.bytes().all(of_names)
            && text.bytes().any(|octet| octet.is_ascii_alphabetic());
        is_name.then(|| Self::Name(text.to_owned()))
    }

    /// Notification data of REDIRECT, or without nonce of REDIRECTED_FROM.
    fn encode(&self, nonce: &[u8]) -> Vec<u8> {
        let (kind, identity) = match self {
            Self::Address(IpAddr::V4(address)) => (1, address.octets().to_vec()),
            Self::Address(IpAddr::V6(address)) => (2, address.octets().to_vec()),
            Self::Name(name) => (3, name.as_bytes().to_vec()),
        };
        // Names are no longer than an octet says.
        let length = u8::try_from(identity.len()).unwrap_or(u8::MAX);
        [&[kind, length], identity.as_slice(), nonce].concat()
    }

    /// The gateway and the nonce of REDIRECT's data; `None` where it is malformed.
    fn decode(data: &[u8]) -> Option<(Self, &[u8])> {
        let ([kind, length], rest) = data.split_first_chunk::<2>()?;
        let (identity, nonce) = rest.split_at_checked(usize::from(*length))?;
        let gateway = match kind {
            1 => Self::Address(Ipv4Addr::from(<[u8; 4]>::try_from(identity).ok()?).into()),
            2 => Self::Address(Ipv6Addr::from(<[u8; 16]>::try_from(identity).ok()?).into()),
            3 => match Self::parse(std::str::from_utf8(identity).ok()?)? {
                name @ Self::Name(_) => name,
                Self::Address(_) => return None,
            },
            _ => return None,
        };
        Some((gateway, nonce))
    }
}

/// What an IKE SA knows of redirects.
#[derive(Clone, Debug, Default)]
pub(crate) struct Redirects {
    /// The gateway that sent us here.
    from: Option<IpAddr>,
    /// Where the first initiation went.
    origin: Option<IpAddr>,
    /// When redirects were followed, as far as §7 asks.
    times: Vec<Instant>,
    /// The peer initiated and said that it follows redirects.
    peer_follows: bool,
    /// We initiated and said that we do.
    we_follow: bool,
}

impl Redirects {
    pub(crate) fn of_initiator(ctx: &Context) -> Self {
        Self { we_follow: ctx.config.follow_redirects, ..Self::default() }
    }

    pub(crate) fn of_responder(parts: &Parts) -> Self {
        Self { peer_follows: follows(parts), ..Self::default() }
    }

    /// The address that an initiation named which led here by redirects.
    pub(crate) fn origin(&self) -> Option<IpAddr> {
        self.origin
    }

    /// True when an initiation to this address led here.
    pub(crate) fn came_from(&self, remote: IpAddr) -> bool {
        self.origin == Some(remote)
    }

    /// REDIRECT_SUPPORTED, or after a redirect REDIRECTED_FROM (§3, §9.3).
    pub(crate) fn payload(&self) -> Option<Payload> {
        self.we_follow.then(|| match self.from {
            Some(from) => notify(NotifyType::REDIRECTED_FROM, Gateway::Address(from).encode(&[])),
            None => notify(NotifyType::REDIRECT_SUPPORTED, Vec::new()),
        })
    }

    /// Where to go on by what the gateway at `here` says; an error says why not. `nonce` is ours in IKE_SA_INIT, and
    /// empty where the message is protected (§3, §9.2).
    pub(crate) fn follow(
        &mut self,
        now: Instant,
        parts: &Parts,
        nonce: &[u8],
        here: IpAddr,
    ) -> Result<Gateway, String> {
        let Some(redirect) = parts.notify(NotifyType::REDIRECT) else { return Err("there is no redirect".to_owned()) };
        if !self.we_follow {
            return Err("server sent REDIRECT even though we disabled it".to_owned());
        }
        let (gateway, data) =
            Gateway::decode(&redirect.data).ok_or_else(|| "received invalid REDIRECT notify".to_owned())?;
        if data != nonce {
            return Err("received invalid nonce in REDIRECT notify".to_owned());
        }
        self.times.retain(|at| now.saturating_duration_since(*at) < LOOP_DETECT_PERIOD);
        if self.times.len() >= MAX_REDIRECTS {
            let seconds = LOOP_DETECT_PERIOD.as_secs();
            return Err(format!("only {MAX_REDIRECTS} redirects are allowed within {seconds} seconds"));
        }
        self.times.push(now);
        self.from = Some(here);
        self.origin.get_or_insert(here);
        Ok(gateway)
    }
}

/// An initiation that goes on at another gateway.
pub(crate) struct Redirected {
    /// The attempt, or the IKE SA, that goes on.
    pub(crate) from: IkeSaId,
    pub(crate) connection: Arc<Connection>,
    pub(crate) wants: Vec<Want>,
    pub(crate) local: IpAddr,
    pub(crate) remote: IpAddr,
    pub(crate) redirects: Redirects,
}

/// Where an IKE SA that is up goes, once it is known.
pub(super) enum Moving {
    Resolving { job: JobId, redirects: Box<Redirects> },
    To { local: IpAddr, remote: IpAddr, redirects: Box<Redirects> },
}

/// True when the initiator of this IKE_SA_INIT follows redirects.
fn follows(parts: &Parts) -> bool {
    parts.has(NotifyType::REDIRECT_SUPPORTED) || parts.has(NotifyType::REDIRECTED_FROM)
}

/// The redirect that IKE_SA_INIT gets instead of an answer, where the connection says so (§3).
pub(crate) fn init_redirect(connection: &Connection, parts: &Parts) -> Option<Payload> {
    let (gateway, _) = connection.redirect_to.as_ref().filter(|(_, phase)| *phase == RedirectPhase::Init)?;
    let nonce = parts.nonce.as_ref().filter(|_| follows(parts))?;
    Some(notify(NotifyType::REDIRECT, gateway.encode(nonce)))
}

/// The redirect that an authenticated initiator gets instead of a Child SA (§6).
pub(crate) fn auth_redirect(connection: &Connection, redirects: &Redirects) -> Option<(Gateway, Payload)> {
    let (gateway, _) = connection.redirect_to.as_ref().filter(|(_, phase)| *phase == RedirectPhase::Auth)?;
    redirects.peer_follows.then(|| (gateway.clone(), notify(NotifyType::REDIRECT, gateway.encode(&[]))))
}

impl Established {
    /// Sends the peer elsewhere (§5); refused where it did not initiate or did not say that it follows.
    pub(crate) fn redirect(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        gateway: Gateway,
        token: u64,
    ) -> Result<(), Closed> {
        if !self.core.redirects.peer_follows {
            let reason = if self.core.redirects.we_follow {
                "unable to redirect IKE_SA as initiator"
            } else {
                "client does not support IKE redirection"
            };
            ctx.log("IKE", 1, self.core.tag(), reason.to_owned());
            failed(ctx, Some(token), &self.core.name, None, reason);
            return Ok(());
        }
        self.queue.push_back(Task::Redirect { gateway, token });
        self.pump(ctx, now)
    }

    pub(super) fn start_redirect(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        gateway: &Gateway,
        token: u64,
    ) -> Result<(), Closed> {
        ctx.log("IKE", 0, self.core.tag(), format!("redirecting peer to {gateway}"));
        let payload = notify(NotifyType::REDIRECT, gateway.encode(&[]));
        self.go_on_with(ctx, now, (Active::Redirect { token }, None), ExchangeType::INFORMATIONAL, vec![payload])
    }

    /// The peer sends us elsewhere. Nothing changes before the other gateway's address is known.
    pub(super) fn redirect_request(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) {
        if !parts.has(NotifyType::REDIRECT) {
            return;
        }
        if self.state != IkeState::Established || self.moving.is_some() {
            ctx.log("IKE", 1, self.core.tag(), "received REDIRECT notify while busy, ignored".to_owned());
            return;
        }
        let mut redirects = self.core.redirects.clone();
        match redirects.follow(now, parts, &[], self.core.path.remote.ip()) {
            Ok(gateway) => {
                ctx.log("IKE", 0, self.core.tag(), format!("redirected to {gateway}"));
                // What was followed counts even if it leads nowhere.
                self.core.redirects.times.clone_from(&redirects.times);
                let job = ctx.job(self.core.id, Job::Resolve(gateway));
                self.moving = Some(Moving::Resolving { job, redirects: Box::new(redirects) });
            }
            Err(reason) => ctx.log("IKE", 1, self.core.tag(), reason),
        }
    }

    /// The other gateway's address is known: this IKE SA goes, and what it had is made there.
    pub(super) fn redirect_resolved(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        result: Result<(IpAddr, IpAddr), String>,
    ) -> Result<(), Closed> {
        match (self.moving.take(), result) {
            (Some(Moving::Resolving { job: waiting, redirects }), result) if waiting == job => match result {
                Ok((local, remote)) if self.state == IkeState::Established => {
                    self.moving = Some(Moving::To { local, remote, redirects });
                    self.queue.push_front(Task::DeleteIke { token: None, reason: CloseReason::Replaced });
                }
                Ok(_) => {}
                Err(reason) => ctx.log("IKE", 1, self.core.tag(), format!("redirect failed: {reason}")),
            },
            (moving, _) => self.moving = moving,
        }
        self.pump(ctx, now)
    }

    /// Answers IKE_AUTH with our proof and a redirect, without a Child SA (§6). The peer deletes; if it does not, we
    /// forget it.
    pub(super) fn answer_redirect(&mut self, ctx: &mut Context, now: Instant, gateway: &Gateway, head: &[Payload]) {
        ctx.log("IKE", 0, self.core.tag(), format!("redirecting peer to {gateway}"));
        self.respond(ctx, now, head);
        self.expire_at = Some(after(now, ctx.config.half_open_timeout));
    }

    /// Hands over what a redirected IKE SA had, when it closes.
    pub(super) fn go_elsewhere(&mut self, ctx: &mut Context) {
        let Some(Moving::To { local, remote, redirects }) = self.moving.take() else { return };
        let mut names = std::collections::BTreeSet::new();
        let live = self.children.iter().filter(|child| child.is_live() && names.insert(child.config.name.clone()));
        let mut wants: Vec<Want> =
            live.map(|child| Want { child: Some(Arc::clone(&child.config)), token: None }).collect();
        if wants.is_empty() {
            wants.push(Want { child: None, token: None });
        }
        let (from, connection) = (self.core.id, Arc::clone(&self.connection));
        ctx.redirected.push(Redirected { from, connection, wants, local, remote, redirects: *redirects });
    }

    /// The peer has heard of our redirect; it deletes.
    pub(super) fn redirect_heard(ctx: &mut Context, token: u64) {
        done(ctx, Some(token));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 5685 §9.2: types, lengths and contents of New Responder GW Identity.
    #[test]
    fn malformed_gateways_are_refused_and_others_survive() {
        let broken: [&[u8]; 11] = [
            b"",
            b"\x01",
            b"\x01\x04\x0a\x00\x00",
            b"\x01\x03\x0a\x00\x00",
            b"\x02\x04\x0a\x00\x00\x01",
            b"\x03\x00",
            b"\x03\x02\xff\xfe",
            b"\x03\x08a b.test",
            b"\x03\x0810.0.0.1",
            b"\x00\x04\x0a\x00\x00\x01",
            b"\x04\x04\x0a\x00\x00\x01",
        ];
        for data in broken {
            assert_eq!(Gateway::decode(data), None, "{data:?}");
        }
        for text in ["192.0.2.7", "2001:db8::7", "gw.example.com", &format!("{}.test", "x".repeat(250))] {
            let gateway = Gateway::parse(text).unwrap();
            let data = gateway.encode(b"a nonce");
            assert_eq!(Gateway::decode(&data), Some((gateway, b"a nonce".as_slice())));
        }
        for text in ["", "a gateway", "10.0.0", "gw/24", &"x".repeat(256)] {
            assert_eq!(Gateway::parse(text), None, "{text}");
        }
    }
}
