//! One IKE SA and its exchanges (RFC 7296).
//!
//! An IKE SA is one of seven types, and only a transition that consumes one makes the next:
//! [`Initiating`] (IKE_SA_INIT is out), [`Resuming`] (IKE_SESSION_RESUME is out, RFC 5723), [`InitiatorIntermediate`] or [`ResponderIntermediate`] (keys are being
//! made, by one key exchange or several), [`InitiatorAuth`] or [`ResponderAuth`] (keys, but the peer may be
//! anyone), [`Established`] (made from a [`pad::PeerIdentity`] only). Child SAs, CREATE_CHILD_SA and
//! INFORMATIONAL are methods of [`Established`] alone.

pub(crate) mod auth;
pub(crate) mod auth_initiator;
pub(crate) mod auth_lifetime;
pub(crate) mod auth_responder;
pub(crate) mod basis;
pub(crate) mod channel;
pub(crate) mod child;
pub(crate) mod childless;
mod children;
pub(crate) mod configuration;
pub(crate) mod crash;
pub(crate) mod created;
pub(crate) mod established;
pub(crate) mod exchanges;
pub(crate) mod fault;
pub(crate) mod first_request;
pub(crate) mod followup;
pub(crate) mod informational;
pub(crate) mod init;
pub(crate) mod intermediate_initiator;
pub(crate) mod intermediate_responder;
pub(crate) mod message_id_sync;
pub(crate) mod mobility;
pub(crate) mod nat;
pub(crate) mod parts;
pub(crate) mod ppk;
mod puzzle;
pub(crate) mod reauthentication;
pub(crate) mod redirect;
pub(crate) mod rekey;
pub(crate) mod resuming;
pub(crate) mod resumption;
pub(crate) mod retry;
pub(crate) mod selectors;
pub(crate) mod succession;
pub(crate) mod tickets;
mod transports;
pub(crate) mod window;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ipsec::plane::{Encapsulation, StreamId};
use pad::Identity;

pub(crate) use auth_initiator::InitiatorAuth;
pub(crate) use auth_responder::ResponderAuth;
pub(crate) use established::Established;
pub(crate) use init::Initiating;
pub(crate) use intermediate_initiator::InitiatorIntermediate;
pub(crate) use intermediate_responder::ResponderIntermediate;
pub(crate) use resuming::Resuming;

use crate::config::{Child, Connection, Retransmission, Unique};
use crate::engine::assigned::Assigned;
use crate::engine::context::{Context, PeerKey};
use crate::engine::members::Member;
use crate::engine::places::Place;
use crate::engine::upkeep::Held;
use crate::engine::{CloseReason, Event, IkeSaId, IkeSaStatus, JobId, JobOutcome, Path, Transport};
use crate::wire::Protected;
use channel::Channel;
use nat::Nat;
use redirect::Redirects;

/// An IKE SA in one of its states.
pub(crate) enum IkeSa {
    Initiating(Box<Initiating>),
    Resuming(Box<Resuming>),
    InitiatorIntermediate(Box<InitiatorIntermediate>),
    ResponderIntermediate(Box<ResponderIntermediate>),
    InitiatorAuth(Box<InitiatorAuth>),
    ResponderAuth(Box<ResponderAuth>),
    Established(Box<Established>),
}

/// What was asked of an IKE SA that is not up yet.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub(crate) child: Option<Arc<Child>>,
    pub(crate) token: Option<u64>,
}

/// What every IKE SA has once its SPIs are known.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    pub(crate) id: IkeSaId,
    /// Connection's name.
    pub(crate) name: Arc<str>,
    pub(crate) path: Path,
    pub(crate) nat: Nat,
    /// We began the first IKE SA: if there is a stream, we open it, and only we do (RFC 9329 §1.2).
    pub(crate) stream_originator: bool,
    pub(crate) redirects: Redirects,
    /// Sequences of tries that we began, from 1 (`keyingtries`); 0 as responder.
    pub(crate) sequence: u32,
    /// What Configuration payloads gave.
    pub(crate) assigned: Option<Arc<Assigned>>,
    /// Nothing has come over the port for encapsulation yet, which a network may drop by itself; TCP is untried.
    pub(crate) falls_back: bool,
    /// `dscp` of its connection: of the messages that are sent.
    pub(crate) dscp: u8,
}

impl Core {
    /// Sends messages to where the peer is.
    pub(crate) fn send(&self, ctx: &mut Context, datagrams: impl IntoIterator<Item = Vec<u8>>) {
        self.send_along(ctx, self.path, datagrams);
    }

    /// Sends messages along another path.
    pub(crate) fn send_along(&self, ctx: &mut Context, path: Path, datagrams: impl IntoIterator<Item = Vec<u8>>) {
        ctx.transmit(path, self.dscp, datagrams);
    }

    /// How requests are repeated before the peer is authenticated: as in IKE_SA_INIT once within `tcp_delay`, where TCP
    /// would be next.
    pub(crate) fn retransmission(&self, ctx: &Context, connection: &Connection) -> Retransmission {
        let configured = ctx.config.retransmission;
        let timeout = configured.timeout.min(connection.tcp_delay / 2);
        if self.falls_back { Retransmission { timeout, base: 1.0, ..configured } } else { configured }
    }

    /// True when the `count`th repetition is due on a port that seems to be blocked: one was sent in vain (RFC 9329 §5.1).
    pub(crate) fn is_blocked(&self, count: u32) -> bool {
        self.falls_back && count >= 2
    }

    /// The SA's number and name for log lines.
    pub(crate) fn tag(&self) -> Option<(IkeSaId, &str)> {
        Some((self.id, &self.name))
    }

    /// How ESP travels on this path.
    pub(crate) fn encapsulation(&self) -> Encapsulation {
        let Path { local, remote, transport } = self.path;
        match transport {
            Transport::Stream(stream) => Encapsulation::Stream { stream, local, remote },
            Transport::Udp | Transport::UdpEncap if self.nat.any() => Encapsulation::Udp { local, remote },
            Transport::Udp | Transport::UdpEncap => Encapsulation::None { local: local.ip(), remote: remote.ip() },
        }
    }
}

/// The identity that stands for an address.
pub(crate) fn address_identity(address: IpAddr) -> Identity {
    match address {
        IpAddr::V4(ip) => Identity::Ipv4(ip),
        IpAddr::V6(ip) => Identity::Ipv6(ip),
    }
}

/// The identity that we assert on a connection.
pub(crate) fn local_identity(connection: &Connection, path: &Path) -> Identity {
    connection.local_id.clone().unwrap_or_else(|| address_identity(path.local.ip()))
}

/// Reports that what was asked for cannot be.
pub(crate) fn fail_wants(ctx: &mut Context, connection: &str, wants: &[Want], reason: &str) {
    for want in wants {
        ctx.event(Event::Failed {
            token: want.token,
            connection: connection.to_owned(),
            child: None,
            reason: reason.to_owned(),
        });
    }
}

/// True when INITIAL_CONTACT may be said (RFC 7296 §2.4): we know no other IKE SA with that peer.
pub(crate) fn is_first_contact(ctx: &Context, connection: &Connection, local: &Identity) -> bool {
    match (connection.unique, connection.remote.remote_id.as_exact()) {
        (Unique::Never, _) | (_, None | Some(Identity::Null)) => false,
        // RFC 7619 §2.3: nobody in particular has no other IKE SAs.
        _ if *local == Identity::Null => false,
        (Unique::No | Unique::Keep | Unique::Replace, Some(remote)) => !ctx.knows_peer(local, remote),
    }
}

impl IkeSa {
    /// Our SPI.
    pub(crate) fn local_spi(&self) -> u64 {
        match self {
            Self::Initiating(sa) => sa.spi(),
            Self::Resuming(sa) => sa.spi(),
            Self::InitiatorIntermediate(sa) => sa.local_spi(),
            Self::ResponderIntermediate(sa) => sa.local_spi(),
            Self::InitiatorAuth(sa) => sa.channel.local_spi(),
            Self::ResponderAuth(sa) => sa.channel.local_spi(),
            Self::Established(sa) => sa.channel.local_spi(),
        }
    }

    /// The stream that it uses or waits for, and whether we opened it.
    pub(crate) fn stream(&self) -> Option<(StreamId, bool)> {
        let of = |core: &Core| match core.path.transport {
            Transport::Stream(stream) => Some((stream, core.stream_originator)),
            Transport::Udp | Transport::UdpEncap => None,
        };
        match self {
            Self::Initiating(sa) => sa.stream().map(|stream| (stream, true)),
            Self::Resuming(sa) => sa.stream().map(|stream| (stream, true)),
            Self::InitiatorIntermediate(sa) => of(&sa.core),
            Self::ResponderIntermediate(sa) => of(&sa.core),
            Self::InitiatorAuth(sa) => of(&sa.core),
            Self::ResponderAuth(sa) => of(&sa.core),
            Self::Established(sa) => sa.live_stream(),
        }
    }

    /// True while the peer is unauthenticated and we are the responder: what cookies are counted by.
    pub(crate) fn half_open_from(&self) -> Option<SocketAddr> {
        match self {
            Self::ResponderIntermediate(sa) => Some(sa.init_remote()),
            Self::ResponderAuth(sa) => Some(sa.init_remote()),
            Self::Initiating(_)
            | Self::Resuming(_)
            | Self::InitiatorIntermediate(_)
            | Self::InitiatorAuth(_)
            | Self::Established(_) => None,
        }
    }

    /// Ends an attempt; an IKE SA that is up stays.
    pub(crate) fn abandon(self, ctx: &mut Context, reason: &str) -> Option<Self> {
        match self {
            Self::Initiating(sa) => sa.abandon(ctx, reason, CloseReason::Local),
            Self::Resuming(sa) => sa.abandon(ctx, reason, CloseReason::Local),
            Self::InitiatorIntermediate(sa) => sa.abandon(ctx, reason, CloseReason::Local),
            Self::ResponderIntermediate(sa) => sa.abandon(ctx, CloseReason::Local),
            Self::InitiatorAuth(sa) => sa.abandon(ctx, reason, CloseReason::Local),
            Self::ResponderAuth(sa) => sa.abandon(ctx, CloseReason::Local),
            Self::Established(_) => return Some(self),
        }
        None
    }

    /// The connection that it belongs to, and whether it may become an IKE SA that we initiated.
    pub(crate) fn member(&self) -> Member {
        let of = |core: &Core, initiating| Member { connection: Arc::clone(&core.name), initiating };
        match self {
            Self::Initiating(sa) => Member { connection: sa.name(), initiating: true },
            Self::Resuming(sa) => Member { connection: sa.name(), initiating: true },
            Self::InitiatorIntermediate(sa) => of(&sa.core, true),
            Self::InitiatorAuth(sa) => of(&sa.core, true),
            Self::ResponderIntermediate(sa) => of(&sa.core, false),
            Self::ResponderAuth(sa) => of(&sa.core, false),
            Self::Established(sa) => of(&sa.core, false),
        }
    }

    /// The peer that an established IKE SA has.
    pub(crate) fn peer_key(&self) -> Option<PeerKey> {
        match self {
            Self::Established(sa) => sa.peer_key(),
            Self::Initiating(_)
            | Self::Resuming(_)
            | Self::InitiatorIntermediate(_)
            | Self::ResponderIntermediate(_)
            | Self::InitiatorAuth(_)
            | Self::ResponderAuth(_) => None,
        }
    }

    /// Where the network knows it.
    /// What the tables keep of it but for its place.
    pub(crate) fn held(&self) -> Held {
        let at = |core: &Core| [Some(core.path.remote.ip()), core.redirects.origin()];
        let fragments = self.channel().map_or(0, Channel::fragment_octets);
        match self {
            Self::Initiating(sa) => Held::new(sa.reached_at(), fragments, true),
            Self::Resuming(sa) => Held::new(sa.reached_at(), fragments, true),
            Self::InitiatorIntermediate(sa) => Held::new(at(&sa.core), fragments, true),
            Self::InitiatorAuth(sa) => Held::new(at(&sa.core), fragments, true),
            Self::ResponderIntermediate(_) | Self::ResponderAuth(_) => Held::new([None, None], fragments, true),
            Self::Established(sa) => Held::new(at(&sa.core), fragments, false),
        }
    }

    /// Forgets the fragments that wait for others.
    pub(crate) fn drop_fragments(&mut self) {
        let channel = match self {
            Self::Initiating(_) | Self::Resuming(_) => None,
            Self::InitiatorIntermediate(sa) => sa.channel.as_mut(),
            Self::ResponderIntermediate(sa) => sa.channel.as_mut(),
            Self::InitiatorAuth(sa) => Some(&mut sa.channel),
            Self::ResponderAuth(sa) => Some(&mut sa.channel),
            Self::Established(sa) => Some(&mut sa.channel),
        };
        if let Some(channel) = channel {
            channel.drop_fragments();
        }
    }

    pub(crate) fn channel(&self) -> Option<&Channel> {
        match self {
            Self::Initiating(_) | Self::Resuming(_) => None,
            Self::InitiatorIntermediate(sa) => sa.channel.as_ref(),
            Self::ResponderIntermediate(sa) => sa.channel.as_ref(),
            Self::InitiatorAuth(sa) => Some(&sa.channel),
            Self::ResponderAuth(sa) => Some(&sa.channel),
            Self::Established(sa) => Some(&sa.channel),
        }
    }

    pub(crate) fn place(&self) -> Place {
        match self {
            Self::Initiating(sa) => Place { remote: Some(sa.remote()), ..Place::default() },
            Self::Resuming(sa) => Place { remote: Some(sa.remote()), ..Place::default() },
            Self::InitiatorAuth(_)
            | Self::ResponderAuth(_)
            | Self::InitiatorIntermediate(_)
            | Self::ResponderIntermediate(_) => Place::default(),
            Self::Established(sa) => sa.place(),
        }
    }

    pub(crate) fn next_timeout(&self, ctx: &Context) -> Option<Instant> {
        match self {
            Self::Initiating(sa) => Some(sa.next_timeout()),
            Self::Resuming(sa) => Some(sa.next_timeout()),
            Self::InitiatorIntermediate(sa) => Some(sa.next_timeout()),
            Self::ResponderIntermediate(sa) => Some(sa.next_timeout()),
            Self::InitiatorAuth(sa) => Some(sa.next_timeout()),
            Self::ResponderAuth(sa) => Some(sa.next_timeout()),
            Self::Established(sa) => sa.next_timeout(ctx),
        }
    }

    pub(crate) fn status(&self, now: Instant) -> IkeSaStatus {
        match self {
            Self::Initiating(sa) => sa.status(),
            Self::Resuming(sa) => sa.status(),
            Self::InitiatorIntermediate(sa) => sa.status(),
            Self::ResponderIntermediate(sa) => sa.status(),
            Self::InitiatorAuth(sa) => sa.status(),
            Self::ResponderAuth(sa) => sa.status(),
            Self::Established(sa) => sa.status(now),
        }
    }

    pub(crate) fn handle_protected(
        self,
        ctx: &mut Context,
        now: Instant,
        path: Path,
        protected: Protected,
        datagram: &[u8],
    ) -> Option<Self> {
        match self {
            // There are no keys yet that could open it.
            Self::Initiating(_) | Self::Resuming(_) => Some(self),
            Self::InitiatorIntermediate(sa) => sa.handle_protected(ctx, protected, datagram),
            Self::ResponderIntermediate(sa) => sa.handle_protected(ctx, now, path, protected, datagram),
            Self::InitiatorAuth(sa) => sa.handle_protected(ctx, now, path, protected, datagram),
            Self::ResponderAuth(sa) => sa.handle_protected(ctx, now, path, protected, datagram),
            Self::Established(mut sa) => {
                let result = sa.handle_protected(ctx, now, path, protected, datagram);
                result.is_ok().then_some(Self::Established(sa))
            }
        }
    }

    /// `None` with the outcome handed back where the SA does not wait for this job.
    pub(crate) fn handle_job(
        self,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        outcome: JobOutcome,
    ) -> (Option<Self>, Option<JobOutcome>) {
        match self {
            Self::Initiating(sa) => (sa.handle_job(ctx, now, job, outcome).map(Self::Initiating), None),
            // It has no jobs; the answer is to one of before.
            Self::Resuming(_) => (Some(self), Some(outcome)),
            Self::InitiatorIntermediate(sa) => (sa.handle_job(ctx, now, job, outcome), None),
            Self::ResponderIntermediate(sa) => (sa.handle_job(ctx, now, job, outcome), None),
            Self::InitiatorAuth(sa) => (sa.handle_job(ctx, now, job, outcome), None),
            Self::ResponderAuth(sa) => (sa.handle_job(ctx, now, job, outcome), None),
            Self::Established(mut sa) => match sa.handle_job(ctx, now, job, outcome) {
                Ok(unclaimed) => (Some(Self::Established(sa)), unclaimed),
                Err(_) => (None, None),
            },
        }
    }

    pub(crate) fn handle_timeout(self, ctx: &mut Context, now: Instant) -> Option<Self> {
        match self {
            Self::Initiating(sa) => sa.handle_timeout(ctx, now).map(Self::Initiating),
            Self::Resuming(sa) => sa.handle_timeout(ctx, now),
            Self::InitiatorIntermediate(sa) => sa.handle_timeout(ctx, now),
            Self::ResponderIntermediate(sa) => sa.handle_timeout(ctx, now),
            Self::InitiatorAuth(sa) => sa.handle_timeout(ctx, now),
            Self::ResponderAuth(sa) => sa.handle_timeout(ctx, now),
            Self::Established(mut sa) => sa.handle_timeout(ctx, now).is_ok().then_some(Self::Established(sa)),
        }
    }

    pub(crate) fn handle_stream_opened(
        self,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        local: SocketAddr,
    ) -> Option<Self> {
        match self {
            Self::Initiating(sa) => sa.handle_stream_opened(ctx, now, stream, local).map(Self::Initiating),
            Self::Resuming(sa) => sa.handle_stream_opened(ctx, now, stream, local),
            Self::InitiatorAuth(mut sa) => {
                sa.handle_stream_opened(ctx, now, stream, local);
                Some(Self::InitiatorAuth(sa))
            }
            Self::InitiatorIntermediate(_) | Self::ResponderIntermediate(_) | Self::ResponderAuth(_) => Some(self),
            Self::Established(mut sa) => {
                sa.handle_stream_opened(ctx, now, stream, local).is_ok().then_some(Self::Established(sa))
            }
        }
    }

    pub(crate) fn handle_stream_closed(
        self,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        reason: &str,
    ) -> Option<Self> {
        match self {
            Self::Initiating(sa) => sa.handle_stream_closed(ctx, now, stream, reason).map(Self::Initiating),
            Self::Resuming(sa) => sa.handle_stream_closed(ctx, now, stream, reason),
            Self::InitiatorIntermediate(sa) => sa.handle_stream_closed(ctx, stream, reason),
            Self::InitiatorAuth(sa) => sa.handle_stream_closed(ctx, now, stream, reason),
            // The peer may come back over another stream before the half-open time is up.
            Self::ResponderIntermediate(_) | Self::ResponderAuth(_) => Some(self),
            Self::Established(mut sa) => {
                sa.handle_stream_closed(ctx, now, stream, reason).is_ok().then_some(Self::Established(sa))
            }
        }
    }
}
