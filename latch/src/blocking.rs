//! The library for programs without a runtime: what [`crate::client`] does, with calls that block.
//!
//! ```no_run
//! # fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::io::Write;
//!
//! let client = latchkey_latch::blocking::Client::connect("/run/latchkey/latch.sock")?;
//! let mut stream = client.latch_tcp("192.0.2.7:5432".parse()?, None, "db.example.org")?;
//! println!("talking to {}", stream.peer_identity().id.text);
//! stream.write_all(b"hello")?;
//! # Ok(())
//! # }
//! ```
//!
//! All of it can be shared by threads, and starts none of its own: the daemon's messages are read by the calls that wait.
//! A process that was forked shares its parent's connection to the daemon and must not use it; it connects anew.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::SockRef;
use tokio::sync::{mpsc, watch};

mod endpoint;
mod hold;
mod link;
mod sockets;

pub use endpoint::UdpEndpoint;
pub use hold::{hold, settled};
pub use sockets::{Incoming, TcpListener, TcpStream, UdpSocket};

use crate::protocol::{
    Accept, Bind, Bypassed, Bypassing, Call, ChannelBinding, Created, Disposition, Guard, Inquire, Inquired,
    LatchEvent, List, ListedLatch, Listening, Named, Peer, Protection, State, UNIQUE_BINDING, Wanted, Watch,
};
pub use crate::roster::UdpPeer;
use crate::session::{self, EVENT_QUEUE, system};
pub use crate::session::{Change, ClientError};
use link::Link;

/// A connection to the daemon; clones share it. It stays open until the last clone and the last latch are dropped.
///
/// Its descriptor is for waiting only: it is readable when [`Client::next_change`] may have something, and when the
/// daemon has gone.
#[derive(Clone, Debug)]
pub struct Client {
    link: Arc<Link>,
}

/// A latch of a connection; released when it is dropped, which ends the connection.
#[derive(Debug)]
pub struct Latch {
    changes: watch::Receiver<Option<Change>>,
    created: Created,
    protocol: u8,
    on_break: Disposition,
    holding: Holding,
}

/// A connection that is to be clear; released when it is dropped, which ends the connection.
#[derive(Debug)]
pub struct Bypass {
    changes: watch::Receiver<Option<Change>>,
    bypassed: Bypassed,
    protocol: u8,
    holding: Holding,
}

/// A listener latch; released when it is dropped.
#[derive(Debug)]
pub struct ListenerLatch {
    listening: Listening,
    on_break: Disposition,
    holding: Holding,
}

/// The changes of one latch's state.
#[derive(Debug)]
pub struct Changes {
    changes: watch::Receiver<Option<Change>>,
    link: Arc<Link>,
}

/// Changes of all latches of the daemon.
#[derive(Debug)]
pub struct Events {
    events: mpsc::Receiver<LatchEvent>,
    link: Arc<Link>,
}

impl Client {
    /// Connects to the daemon's socket and agrees on the version.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        Ok(Self { link: Arc::new(Link::open(path.as_ref())?) })
    }

    /// Latches a TCP or UDP socket, before it connects to `remote` or after. A socket that is not bound is bound to the
    /// kernel's choice of address for `remote`. The socket stays the caller's, in whatever mode it is.
    ///
    /// What is read after that came under the latch: a UDP socket is connected by the daemon, and what waited in its queue is
    /// dropped; a TCP connection on which data has come in before is refused, unless [`Wanted::late`] is set.
    pub fn latch_socket(
        &self,
        socket: impl AsFd,
        remote: SocketAddr,
        wanted: impl Into<Wanted>,
    ) -> Result<Latch, ClientError> {
        let reference = SockRef::from(&socket);
        let (protocol, default) = match reference.r#type() {
            Ok(socket2::Type::DGRAM) => (UDP, Disposition::Wait),
            _ => (TCP, Disposition::Reset),
        };
        session::bind_for(&reference, remote)?;
        let mut wanted = wanted.into();
        wanted.remote = Some(remote);
        let on_break = *wanted.on_break.get_or_insert(default);
        let created: Created = self.link.call(Call::Create(wanted), Some(socket.as_fd()))?;
        Ok(Latch::new(&self.link, created, protocol, on_break))
    }

    /// As [`crate::client::Client::bypass_socket`].
    pub fn bypass_socket(&self, socket: impl AsFd, remote: SocketAddr) -> Result<Bypass, ClientError> {
        let reference = SockRef::from(&socket);
        session::bind_for(&reference, remote)?;
        let call = Call::Bypass(Bypassing { remote: Some(remote) });
        let bypassed: Bypassed = self.link.call(call, Some(socket.as_fd()))?;
        let changes = self.link.state().registry.watch(bypassed.latch);
        let holding = Holding { link: Arc::clone(&self.link), latch: bypassed.latch };
        let protocol = if matches!(reference.r#type(), Ok(socket2::Type::DGRAM)) { UDP } else { TCP };
        Ok(Bypass { changes, bypassed, protocol, holding })
    }

    /// Latches a bound TCP socket that will listen: call `listen` on it only afterwards. For UDP there is
    /// [`Client::latch_datagrams`].
    pub fn latch_listener(&self, socket: impl AsFd, wanted: impl Into<Wanted>) -> Result<ListenerLatch, ClientError> {
        if !matches!(SockRef::from(&socket).r#type(), Ok(socket2::Type::STREAM)) {
            return Err(failed("latching a listener", std::io::ErrorKind::InvalidInput.into()));
        }
        let wanted = wanted.into();
        let on_break = wanted.on_break.unwrap_or(Disposition::Reset);
        let listening: Listening = self.link.call(Call::Listen(wanted), Some(socket.as_fd()))?;
        self.link.state().registry.ignore_children(listening.latch);
        let holding = Holding { link: Arc::clone(&self.link), latch: listening.latch };
        Ok(ListenerLatch { listening, on_break, holding })
    }

    /// The next latch of this client that has changed, by its number, and how it stands now: of several changes at once
    /// the last. `None` when time is up; fails when the daemon has gone and everything has been told.
    pub fn next_change(&self, timeout: Option<Duration>) -> Result<Option<(u64, Change)>, ClientError> {
        self.link.next_change(deadline(timeout))
    }

    /// Changes of all latches from now on; one call for each connection to the daemon.
    pub fn watch(&self) -> Result<Events, ClientError> {
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        self.link.state().registry.watcher = Some(sender);
        let _: Value = self.link.call(Call::Watch(Watch {}), None)?;
        Ok(Events { events, link: Arc::clone(&self.link) })
    }

    /// A connection latch by its number.
    pub fn show(&self, latch: u64) -> Result<Inquired, ClientError> {
        self.link.call(Call::Show(Named { latch }), None)
    }

    /// Breaks a latch of anybody for good; for root, and who runs the daemon.
    pub fn break_latch(&self, latch: u64) -> Result<(), ClientError> {
        self.link.call::<Value>(Call::Break(Named { latch }), None).map(drop)
    }

    /// Closes a latch of anybody, as if the peer had reset the connection; for root, and who runs the daemon.
    pub fn close_latch(&self, latch: u64) -> Result<(), ClientError> {
        self.link.call::<Value>(Call::Close(Named { latch }), None).map(drop)
    }

    /// Who is at the other end of a flow of TCP or UDP at this moment, latched or not, and the flow's latch.
    pub fn whois_flow(&self, inquire: Inquire) -> Result<Inquired, ClientError> {
        self.link.call(Call::Inquire(inquire), None)
    }

    /// As [`Client::whois_flow`], for a connected TCP or UDP socket.
    pub fn whois_socket(&self, socket: impl AsFd) -> Result<Inquired, ClientError> {
        let inquire = Inquire { local: None, remote: None, protocol: None };
        self.link.call(Call::Inquire(inquire), Some(socket.as_fd()))
    }

    /// All latches of the daemon, by number.
    pub fn list(&self) -> Result<Vec<ListedLatch>, ClientError> {
        let mut latches: Vec<ListedLatch> = Vec::new();
        loop {
            let after = latches.last().map_or(0, |latch| latch.latch);
            if !session::add_page(&mut latches, self.link.call(Call::List(List { after }), None)?)? {
                return Ok(latches);
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.ready()
    }
}

impl Latch {
    fn new(link: &Arc<Link>, created: Created, protocol: u8, on_break: Disposition) -> Self {
        let changes = link.state().registry.watch(created.latch);
        let holding = Holding { link: Arc::clone(link), latch: created.latch };
        Self { changes, created, protocol, on_break, holding }
    }

    /// Number of the latch in the daemon.
    pub fn number(&self) -> u64 {
        self.created.latch
    }

    /// Upper-layer protocol of the connection: 6 for TCP, 17 for UDP.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// Who is at the other end, and how it proved that.
    pub fn peer_identity(&self) -> &Peer {
        &self.created.peer
    }

    /// How the packets are protected, for as long as the latch stands.
    pub fn protection(&self) -> &Protection {
        &self.created.protection
    }

    /// What enforces the latch, if the daemon tells.
    pub fn guard(&self) -> Option<Guard> {
        self.created.guard
    }

    /// The same for connections to the same peer with the same credential under the same protection (RFC 5660 §6.3), if the
    /// daemon tells.
    pub fn class(&self) -> Option<u32> {
        self.created.class
    }

    /// Asks the daemon for all that it knows of the latch at this moment (INQUIRE_LATCH): outer addresses too.
    pub fn inquire(&self) -> Result<Inquired, ClientError> {
        self.holding.link.call(Call::Show(Named { latch: self.number() }), None)
    }

    /// Our end of the connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.created.local
    }

    /// The other end of the connection.
    pub fn peer_addr(&self) -> SocketAddr {
        self.created.remote
    }

    /// As [`crate::client::TcpStream::channel_binding`].
    pub fn channel_binding(&self) -> Result<ChannelBinding, ClientError> {
        self.channel_binding_of(UNIQUE_BINDING)
    }

    /// A channel binding of a type that `docs/latch-protocol.md` has.
    pub fn channel_binding_of(&self, kind: &str) -> Result<ChannelBinding, ClientError> {
        let bind = Bind { latch: self.number(), kind: kind.to_owned() };
        self.holding.link.call(Call::ChannelBinding(bind), None)
    }

    /// Its state by what the daemon has said until now.
    pub fn state(&self) -> State {
        state(&self.holding.link, &self.changes)
    }

    /// Waits until the latch is not ESTABLISHED; `None` when time is up.
    pub fn broken(&self, timeout: Option<Duration>) -> Option<Change> {
        self.wait(timeout, |change| change.state != State::Established)
    }

    /// Changes of its state from now on; of several at once the last.
    pub fn changes(&self) -> Changes {
        from_now_on(&self.holding.link, &self.changes)
    }

    fn wait(&self, timeout: Option<Duration>, is: impl Fn(&Change) -> bool) -> Option<Change> {
        wait(&self.holding.link, &self.changes, timeout, is)
    }

    /// What ended the connection.
    fn end(&self) -> Option<Change> {
        self.changes.borrow().clone().filter(|change| change.is_end(self.on_break))
    }
}

impl Bypass {
    /// Number of the latch in the daemon.
    pub fn number(&self) -> u64 {
        self.bypassed.latch
    }

    /// Our end of the connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.bypassed.local
    }

    /// The other end of the connection.
    pub fn peer_addr(&self) -> SocketAddr {
        self.bypassed.remote
    }

    /// Upper-layer protocol of the connection: 6 for TCP, 17 for UDP.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// What keeps its packets from being protected.
    pub fn guard(&self) -> Option<Guard> {
        self.bypassed.guard
    }

    /// Asks the daemon for all that it knows of it at this moment (INQUIRE_LATCH).
    pub fn inquire(&self) -> Result<Inquired, ClientError> {
        self.holding.link.call(Call::Show(Named { latch: self.number() }), None)
    }

    /// Its state by what the daemon has said until now.
    pub fn state(&self) -> State {
        state(&self.holding.link, &self.changes)
    }

    /// Waits until it is not ESTABLISHED, and the connection has ended; `None` when time is up.
    pub fn broken(&self, timeout: Option<Duration>) -> Option<Change> {
        wait(&self.holding.link, &self.changes, timeout, |change| change.state != State::Established)
    }

    /// Changes of its state from now on; of several at once the last.
    pub fn changes(&self) -> Changes {
        from_now_on(&self.holding.link, &self.changes)
    }
}

impl ListenerLatch {
    /// Takes the latch of a connection that the listener's socket accepted. A refusal with the code `not-accepted` means
    /// that the connection has none any more: close it and accept the next.
    pub fn accept(&self, accepted: impl AsFd) -> Result<Latch, ClientError> {
        let accept = Call::Accept(Accept { listener: self.number(), remote: None });
        let created: Created = self.holding.link.call(accept, Some(accepted.as_fd()))?;
        Ok(Latch::new(&self.holding.link, created, TCP, self.on_break))
    }

    /// Number of the latch in the daemon.
    pub fn number(&self) -> u64 {
        self.listening.latch
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.listening.local
    }
}

impl Changes {
    /// The next one; `None` when time is up. After the daemon has gone: `Closed` once, then `None`.
    pub fn next(&mut self, timeout: Option<Duration>) -> Option<Change> {
        let Self { changes, link } = self;
        let mut fresh = || match changes.has_changed() {
            Ok(true) => changes.borrow_and_update().clone(),
            Ok(false) | Err(_) => None,
        };
        let found = link.wait(deadline(timeout), |_| fresh());
        found.or_else(fresh)
    }
}

impl Events {
    /// The next one; `Ok(None)` when time is up, `Closed` when the connection to the daemon has ended.
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Option<LatchEvent>, ClientError> {
        let Self { events, link } = self;
        match link.wait(deadline(timeout), |_| events.try_recv().ok()) {
            None if link.state().registry.closed => events.try_recv().map(Some).map_err(|_| ClientError::Closed),
            next => Ok(next),
        }
    }
}

/// Events as they come, until the connection to the daemon ends.
impl Iterator for Events {
    type Item = LatchEvent;

    fn next(&mut self) -> Option<LatchEvent> {
        Self::next(self, None).ok().flatten()
    }
}

fn state(link: &Link, changes: &watch::Receiver<Option<Change>>) -> State {
    link.drain();
    changes.borrow().as_ref().map_or(State::Established, |change| change.state)
}

fn from_now_on(link: &Arc<Link>, changes: &watch::Receiver<Option<Change>>) -> Changes {
    let mut changes = changes.clone();
    changes.mark_unchanged();
    Changes { changes, link: Arc::clone(link) }
}

fn wait(
    link: &Link,
    changes: &watch::Receiver<Option<Change>>,
    timeout: Option<Duration>,
    is: impl Fn(&Change) -> bool,
) -> Option<Change> {
    let seen = || changes.borrow().clone().filter(|change| is(change));
    // The end of the connection to the daemon is a change, too.
    link.wait(deadline(timeout), |_| seen()).or_else(seen)
}

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A latch that is released when this is dropped.
#[derive(Debug)]
struct Holding {
    link: Arc<Link>,
    latch: u64,
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.link.release(self.latch);
    }
}

/// A time too far away to be told is none.
fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

fn failed(action: &str, error: std::io::Error) -> ClientError {
    system(action.to_owned(), error)
}
