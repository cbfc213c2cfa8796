//! What both clients share: requests that wait for their answers, latches and their changes, sockets to be latched.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{mpsc, oneshot, watch};

use crate::protocol::{
    Call, Disposition, LatchEvent, ListedLatch, Listing, PROGRESS_REVISION, Refusal, Release, ServerMessage, State,
    VERSION, Wanted, Welcome,
};
use crate::seqpacket;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon refused; nothing is latched.
    #[error("the daemon refused: {0}")]
    Refused(#[from] Refusal),
    /// The system refused.
    #[error("{action}: {source}")]
    System {
        /// What we tried to do.
        action: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The daemon says what it should not.
    #[error("the daemon does not keep to the protocol: {0}")]
    Protocol(String),
    /// The connection to the daemon has ended.
    #[error("the connection to the daemon has ended")]
    Closed,
    /// The daemon is there and does not answer. Should it do so later, what it gives is given back.
    #[error("the daemon has not answered for {} s", .0.as_secs())]
    Silent(Duration),
}

/// A change of a latch's state (ALERT, RFC 5660 §2.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// State of the latch; `Closed` also when the daemon went away.
    pub state: State,
    /// Why, for a human.
    pub reason: String,
}

impl Change {
    /// The change that nobody could tell: the daemon is not there any more.
    pub(crate) fn gone() -> Self {
        Self { state: State::Closed, reason: "the connection to the daemon has ended".to_owned() }
    }

    /// It ends a connection with this disposition.
    pub(crate) fn is_end(&self, on_break: Disposition) -> bool {
        match self.state {
            State::Closed => true,
            State::Broken => on_break == Disposition::Reset,
            State::Established | State::Listener => false,
        }
    }

    /// What reading and writing fail with after it.
    pub(crate) fn failure(&self) -> io::Error {
        io::Error::new(io::ErrorKind::ConnectionReset, format!("the latch is {}: {}", self.state, self.reason))
    }
}

pub(crate) type Outcome = Result<Value, ClientError>;

/// What waits for the daemon's messages on one connection to it.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pub(crate) closed: bool,
    /// What the daemon knows; 0 before it has said so.
    pub(crate) revision: u32,
    /// When it said something last.
    heard: Option<Instant>,
    pub(crate) pending: HashMap<u64, oneshot::Sender<Outcome>>,
    pub(crate) latches: HashMap<u64, watch::Sender<Option<Change>>>,
    /// Requests whose answer is a listener latch.
    listens: HashSet<u64>,
    /// What the daemon says of the children of UDP listeners, until their endpoints look.
    endpoints: HashMap<u64, Endpoint>,
    pub(crate) watcher: Option<mpsc::Sender<LatchEvent>>,
}

/// The children of a UDP listener that have changed.
#[derive(Debug, Default)]
struct Endpoint {
    /// The answer to the request that made it has come.
    is_answered: bool,
    children: HashSet<u64>,
    news: Vec<(u64, Change)>,
    wake: watch::Sender<()>,
}

/// What there is to do after a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Nothing more.
    Handed,
    /// A latch has changed.
    Changed(u64),
    /// Who asked for this latch gave up: nobody will use or release it.
    Unwanted(u64),
}

impl Registry {
    /// Notes that an answer is due.
    pub(crate) fn expect(&mut self, id: u64, call: &Call) -> Result<oneshot::Receiver<Outcome>, ClientError> {
        if self.closed {
            return Err(ClientError::Closed);
        }
        let (sender, receiver) = oneshot::channel();
        self.pending.insert(id, sender);
        if matches!(call, Call::Listen(_)) {
            self.listens.insert(id);
        }
        Ok(receiver)
    }

    /// When a daemon counts as silent that is to answer a question asked then, unless it says something before: one that
    /// is stopped, or does not get on, must not hold up its clients for ever.
    pub(crate) fn silent_at(&self, asked: Instant) -> Instant {
        let last = self.heard.map_or(asked, |heard| heard.max(asked));
        last + if self.revision == 0 { SILENCE } else { silence(self.revision) }
    }

    /// What wakes those who wait for news of a listener's children.
    pub(crate) fn endpoint(&mut self, listener: u64) -> watch::Receiver<()> {
        self.endpoints.entry(listener).or_default().wake.subscribe()
    }

    /// News of a listener's children; fails when the daemon has gone.
    pub(crate) fn news(&mut self, listener: u64) -> io::Result<Vec<(u64, Change)>> {
        if self.closed {
            return Err(Change::gone().failure());
        }
        Ok(self.endpoints.get_mut(&listener).map(|endpoint| std::mem::take(&mut endpoint.news)).unwrap_or_default())
    }

    /// Nobody looks at news of a listener's children: they are those of connections, which are accepted.
    pub(crate) fn ignore_children(&mut self, listener: u64) {
        for child in self.endpoints.remove(&listener).unwrap_or_default().children {
            self.latches.remove(&child);
        }
    }

    /// A child that an endpoint has asked about.
    pub(crate) fn watch_child(&mut self, listener: u64, latch: u64) -> watch::Receiver<Option<Change>> {
        self.endpoints.entry(listener).or_default().children.insert(latch);
        self.watch(latch)
    }

    /// A child's end is acknowledged.
    pub(crate) fn forget_child(&mut self, listener: u64, latch: u64) {
        self.latches.remove(&latch);
        if let Some(endpoint) = self.endpoints.get_mut(&listener) {
            endpoint.children.remove(&latch);
        }
    }

    /// A latch is ours no more.
    pub(crate) fn forget(&mut self, latch: u64) {
        self.latches.remove(&latch);
        self.ignore_children(latch);
    }

    /// Of listeners that were none of those whose answer was waited for.
    fn forget_others(&mut self) {
        if self.listens.is_empty() {
            let others: Vec<u64> =
                self.endpoints.iter().filter(|(_, endpoint)| !endpoint.is_answered).map(|(id, _)| *id).collect();
            others.into_iter().for_each(|other| self.ignore_children(other));
        }
    }

    pub(crate) fn watch(&mut self, latch: u64) -> watch::Receiver<Option<Change>> {
        self.latch(latch).subscribe()
    }

    fn latch(&mut self, latch: u64) -> &watch::Sender<Option<Change>> {
        let state = self.closed.then(Change::gone);
        self.latches.entry(latch).or_insert_with(|| watch::Sender::new(state))
    }

    /// Hands a message to whoever waits for it; `None` if it is no message.
    pub(crate) fn hear(&mut self, octets: &[u8]) -> Option<Heard> {
        let Ok(message) = serde_json::from_slice::<ServerMessage>(octets) else {
            tracing::debug!("the daemon sent a message that is not one");
            return None;
        };
        self.heard = Some(Instant::now());
        match message {
            ServerMessage::Working { .. } => {}
            ServerMessage::Reply { id, result } => {
                if self.listens.remove(&id)
                    && let Some(listener) = result.get("latch").and_then(Value::as_u64)
                {
                    self.endpoints.entry(listener).or_default().is_answered = true;
                }
                self.forget_others();
                let unheard = match self.pending.remove(&id) {
                    Some(caller) => caller.send(Ok(result)).err().and_then(Result::ok),
                    None => Some(result),
                };
                if let Some(latch) = unheard.as_ref().and_then(|result| result.get("latch")?.as_u64()) {
                    self.forget(latch);
                    return Some(Heard::Unwanted(latch));
                }
            }
            ServerMessage::Refusal { id: Some(id), refusal } => {
                self.listens.remove(&id);
                self.forget_others();
                if let Some(caller) = self.pending.remove(&id) {
                    let _ = caller.send(Err(refusal.into()));
                }
            }
            // Not an answer to one request: the daemon understood none of it, or has no room.
            ServerMessage::Refusal { id: None, refusal } => {
                for (_, caller) in self.pending.drain() {
                    let _ = caller.send(Err(refusal.clone().into()));
                }
            }
            // Of a latch that a listener made and nobody has taken: `accept` will say whether it still stands. A UDP listener's
            // are never taken.
            ServerMessage::Alert { latch, state, reason, listener: Some(listener), code: _ } => {
                let change = Change { state, reason };
                // Its number may not have been answered yet.
                if !self.listens.is_empty() {
                    self.endpoints.entry(listener).or_default();
                }
                if self.endpoints.contains_key(&listener) {
                    self.latch(latch).send_replace(Some(change.clone()));
                }
                if let Some(endpoint) = self.endpoints.get_mut(&listener) {
                    endpoint.children.insert(latch);
                    endpoint.news.push((latch, change));
                    endpoint.wake.send_replace(());
                    return Some(Heard::Changed(latch));
                }
            }
            ServerMessage::Alert { latch, state, reason, listener: None, code: _ } => {
                self.latch(latch).send_replace(Some(Change { state, reason }));
                return Some(Heard::Changed(latch));
            }
            ServerMessage::Event(event) => {
                // A watcher that does not read misses events, and the daemon's other messages none.
                if let Some(watcher) = &self.watcher {
                    let _ = watcher.try_send(event);
                }
            }
        }
        Some(Heard::Handed)
    }

    /// The connection has ended: everything that waits hears so.
    pub(crate) fn end(&mut self) {
        self.closed = true;
        self.watcher = None;
        for (_, caller) in self.pending.drain() {
            let _ = caller.send(Err(ClientError::Closed));
        }
        for latch in self.latches.values() {
            latch.send_replace(Some(Change::gone()));
        }
        for endpoint in self.endpoints.values() {
            endpoint.wake.send_replace(());
        }
    }
}

/// The datagram that releases a latch; its answer is for nobody.
pub(crate) fn release(id: u64, latch: u64) -> Option<Vec<u8>> {
    Call::Release(Release { latch }).encode(id).ok()
}

/// A connection to the daemon's socket.
pub(crate) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket::socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// How long a daemon may say nothing while it has a question to answer.
pub(crate) const SILENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// As long as a daemon may take that says nothing while it makes an SA.
const LONGEST: Duration = Duration::from_secs(65);

/// How long a daemon of this revision may say nothing.
pub(crate) fn silence(revision: u32) -> Duration {
    if revision >= PROGRESS_REVISION { SILENCE } else { LONGEST }
}

/// A question as a daemon of this revision can be asked it.
pub(crate) fn asking_for_progress(call: Call, revision: u32) -> Call {
    match call {
        Call::Create(wanted) if revision >= PROGRESS_REVISION => Call::Create(Wanted { progress: true, ..wanted }),
        call => call,
    }
}

/// Checks the daemon's answer to `hello`.
pub(crate) fn welcomed(welcome: &Welcome) -> Result<(), ClientError> {
    if welcome.version == VERSION {
        return Ok(());
    }
    Err(ClientError::Protocol(format!("it answers in version {}", welcome.version)))
}

/// The result that an answer carries.
pub(crate) fn result<T: DeserializeOwned>(call: &str, value: Value) -> Result<T, ClientError> {
    serde_json::from_value(value).map_err(|error| ClientError::Protocol(format!("{call}: {error}")))
}

/// Adds a page to a list; true when there are more.
pub(crate) fn add_page(latches: &mut Vec<ListedLatch>, page: Listing) -> Result<bool, ClientError> {
    let after = latches.last().map_or(0, |latch| latch.latch);
    // A page must move on, or this would never end.
    if page.more && page.latches.last().is_none_or(|latch| latch.latch <= after) {
        return Err(ClientError::Protocol("its list does not advance".to_owned()));
    }
    latches.extend(page.latches);
    Ok(page.more)
}

/// Binds a socket that is not bound yet to the kernel's choice of address for `remote`, and a free port.
pub(crate) fn bind_for(socket: &Socket, remote: SocketAddr) -> Result<(), ClientError> {
    let bind = || {
        let local = socket.local_addr()?.as_socket();
        if local.is_some_and(|local| local.ip().is_unspecified() && local.port() == 0) {
            socket.bind(&source_for(remote)?.into())?;
        }
        Ok(())
    };
    bind().map_err(|error| system(format!("binding a socket to an address that reaches {remote}"), error))
}

/// The address from which the kernel would reach `remote`, with port 0. Sends nothing.
pub(crate) fn source_for(remote: SocketAddr) -> io::Result<SocketAddr> {
    // Past the C library: `latchkey exec` puts functions of ours before its own, and they call this.
    let family = if remote.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let probe = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&probe, &remote)?;
    Ok(SocketAddr::new(SocketAddr::try_from(rustix::net::getsockname(&probe)?)?.ip(), 0))
}

pub(crate) fn bound_socket(
    remote: SocketAddr,
    local: Option<SocketAddr>,
    kind: Type,
    protocol: Protocol,
) -> Result<Socket, ClientError> {
    let local = match local {
        Some(local) => local,
        None => source_for(remote).map_err(|error| system(format!("finding an address to reach {remote}"), error))?,
    };
    let bind = || {
        let socket = Socket::new(Domain::for_address(local), kind.nonblocking(), Some(protocol))?;
        socket.bind(&local.into())?;
        Ok(socket)
    };
    bind().map_err(|error| system(format!("binding to {local}"), error))
}

/// A UDP socket is latched to one other end.
pub(crate) fn is_latched_to(to: SocketAddr, remote: SocketAddr) -> io::Result<()> {
    if to == remote {
        return Ok(());
    }
    let message = format!("the socket is latched to {remote}, not {to}");
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// A latch was made, and has ended before its holder knew of it.
pub(crate) fn ended_meanwhile(remote: SocketAddr) -> ClientError {
    system(format!("latching a flow to {remote}"), io::ErrorKind::ConnectionReset.into())
}

/// A UDP socket that is bound.
pub(crate) fn datagram_socket(local: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    socket.bind(&local.into())?;
    Ok(socket)
}

/// A UDP socket of many peers was shut down, which can be seen before the daemon's word or its death.
pub(crate) fn shut_down() -> io::Error {
    Change { state: State::Closed, reason: "the socket was shut down".to_owned() }.failure()
}

/// What sending by such a socket fails with.
pub(crate) fn unsent(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::BrokenPipe { shut_down() } else { error }
}

/// Where a socket has to send to: one of IPv6 that speaks IPv4 takes mapped addresses.
pub(crate) fn mapped(to: SocketAddr, domain: Domain) -> SocketAddr {
    match to {
        SocketAddr::V4(four) if domain == Domain::IPV6 => {
            SocketAddr::new(four.ip().to_ipv6_mapped().into(), four.port())
        }
        other => other,
    }
}

/// A TCP socket that is bound and does not listen yet.
pub(crate) fn listening_socket(local: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&local.into())?;
    Ok(socket)
}

/// Connections that may wait to be accepted.
pub(crate) const BACKLOG: i32 = 1024;

/// Events that a watcher may fall behind.
pub(crate) const EVENT_QUEUE: usize = 1024;

pub(crate) fn system(action: String, source: io::Error) -> ClientError {
    ClientError::System { action, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;
    use crate::protocol::Wanted;

    fn alert(listener: u64, latch: u64, state: &str) -> Vec<u8> {
        json!({"type": "alert", "latch": latch, "state": state, "reason": "", "listener": listener}).to_string().into()
    }

    // The daemon tells of a listener's children while it makes the listener.
    #[test]
    fn what_is_told_before_the_answer_is_kept_for_the_endpoint() {
        let mut registry = Registry::default();
        registry.hear(&alert(1, 2, "established"));
        assert!(registry.endpoints.is_empty() && registry.latches.is_empty());
        let _answer = registry.expect(7, &Call::Listen(Wanted::from("%any"))).unwrap();
        registry.hear(&alert(3, 4, "closed"));
        registry.hear(&alert(5, 6, "established"));
        registry.hear(
            json!({"type": "reply", "id": 7, "result": {"latch": 3, "local": "127.0.0.1:1"}}).to_string().as_bytes(),
        );
        let news = registry.news(3).unwrap();
        assert!(news.len() == 1 && news.iter().all(|(latch, change)| (*latch, change.state) == (4, State::Closed)));
        assert!(registry.endpoints.len() == 1 && registry.latches.len() == 1, "of the other one nobody wants to know");
        // All that is known of its children goes with it.
        let _watched = registry.watch_child(3, 8);
        registry.forget_child(3, 4);
        assert_eq!(registry.latches.len(), 1);
        registry.forget(3);
        assert!(registry.endpoints.is_empty() && registry.latches.is_empty());
        registry.hear(&alert(3, 9, "closed"));
        assert!(registry.endpoints.is_empty() && registry.latches.is_empty());
    }
}
