//! A UDP socket that is not connected, under a listener latch (RFC 5660 §5.3).

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, SendFlags};
use serde_json::Value;
use socket2::{Domain, SockRef};

use super::link::{Link, poll};
use super::{Changes, Client, Holding, deadline, failed};
use crate::protocol::{
    Accept, Bind, Call, ChannelBinding, Code, Created, Disposition, Inquired, Listening, Named, Release,
    UNIQUE_BINDING, Wanted,
};
use crate::roster::{Question, Roster, Step, UdpPeer};
use crate::session::{self, Change, ClientError, system};

/// A UDP socket that talks with many: as [`crate::client::UdpEndpoint`], with calls that block. Threads can share it.
///
/// ```no_run
/// # fn example(client: latchkey_latch::blocking::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let socket = client.bind_udp("192.0.2.1:5300".parse()?, "*.example.org")?;
/// let mut datagram = [0; 1500];
/// loop {
///     let (length, peer) = socket.recv_from(&mut datagram)?;
///     println!("{} is {}", peer.addr(), peer.identity().id.text);
///     socket.send_to(&datagram[..length], &peer)?;
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct UdpEndpoint {
    socket: OwnedFd,
    domain: Domain,
    local: SocketAddr,
    roster: Mutex<Roster>,
    timeout: Mutex<Option<Duration>>,
    latch: Holding,
}

/// Somebody asks for a latch.
struct Asking<'a>(&'a UdpEndpoint);

impl Client {
    /// A UDP socket at `local`, an address and a port, that talks with many without being connected: IPsec peers as wanted can
    /// send to it, others do not get through, and each datagram comes with who sent it.
    pub fn bind_udp(&self, local: SocketAddr, wanted: impl Into<Wanted>) -> Result<UdpEndpoint, ClientError> {
        let socket = session::datagram_socket(local);
        let socket = socket.map_err(|error| system(format!("binding to {local}"), error))?;
        self.latch_datagrams(&socket, wanted)
    }

    /// As [`Client::bind_udp`], with a socket that is bound to an address and not connected; it stays the caller's, in
    /// whatever mode it is, and is read through what this gives only. What waits in its queue is dropped.
    pub fn latch_datagrams(&self, socket: impl AsFd, wanted: impl Into<Wanted>) -> Result<UdpEndpoint, ClientError> {
        let reference = SockRef::from(&socket);
        if !matches!(reference.r#type(), Ok(socket2::Type::DGRAM)) {
            return Err(failed("latching datagrams", io::ErrorKind::InvalidInput.into()));
        }
        let own = socket.as_fd().try_clone_to_owned().map_err(|error| failed("copying a descriptor", error))?;
        let domain = reference.domain().map_err(|error| failed("looking at a socket", error))?;
        let wanted = Wanted { quiet: false, ..wanted.into() };
        let on_break = wanted.on_break.unwrap_or(Disposition::Reset);
        let listening: Listening = self.link.call(Call::Listen(wanted), Some(socket.as_fd()))?;
        let latch = Holding { link: Arc::clone(&self.link), latch: listening.latch };
        let roster = Mutex::new(Roster::new(on_break, buffer(&own)));
        Ok(UdpEndpoint { socket: own, domain, local: listening.local, roster, timeout: Mutex::default(), latch })
    }
}

impl UdpEndpoint {
    /// Receives a datagram, cut to the buffer's length, with who sent it.
    pub fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, UdpPeer)> {
        self.recv_from_within(self.read_timeout(), buffer)
    }

    /// As [`Self::recv_from`] with a timeout for this call alone.
    pub fn recv_from_within(&self, timeout: Option<Duration>, buffer: &mut [u8]) -> io::Result<(usize, UdpPeer)> {
        let end = deadline(timeout);
        loop {
            match self.step(buffer)? {
                Step::Datagram(length, peer) => return Ok((length, peer)),
                Step::Ask(question) => self.ask(question)?,
                Step::Again => {}
                Step::Wait(alarm) => self.wait(alarm, end)?,
            }
        }
    }

    /// Sends a datagram to a peer, under its latch or not at all.
    pub fn send_to(&self, datagram: &[u8], peer: &UdpPeer) -> io::Result<usize> {
        loop {
            let sent = {
                let mut roster = self.roster();
                self.listen_to_the_daemon(&mut roster)?;
                roster.send(peer, |to| {
                    let to = session::mapped(to, self.domain);
                    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                    let sent = rustix::net::sendto(&self.socket, datagram, flags, &to);
                    sent.map_err(|error| session::unsent(error.into()))
                })
            };
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(LOOK))?;
                }
                sent => return sent,
            }
        }
    }

    /// Latches the flow to a remote end that has not sent anything, to talk to it first: the peer must be as wanted, whoever
    /// [`Client::bind_udp`] lets in. An SA is made where one is needed. What becomes of it at a break is the same for all.
    pub fn latch(&self, remote: SocketAddr, wanted: impl Into<Wanted>) -> Result<UdpPeer, ClientError> {
        let wanted = Wanted { listener: Some(self.latch.latch), remote: Some(remote), on_break: None, ..wanted.into() };
        self.roster().begin();
        let asking = Asking(self);
        let created: Created = self.link().call(Call::Create(wanted), None)?;
        let peer = self.peer_of(created);
        let stands = self.roster().latched(peer.clone());
        drop(asking);
        if stands { Ok(peer) } else { Err(session::ended_meanwhile(remote)) }
    }

    /// Ends a peer: nothing more comes from it, and who comes from its address is another one.
    pub fn end(&self, peer: &UdpPeer) -> Result<(), ClientError> {
        // The daemon says then that it has ended.
        match self.link().call::<Value>(Call::Release(Release { latch: peer.latch() }), None) {
            Err(ClientError::Refused(refusal)) if refusal.code != Code::NoSuchLatch => Err(refusal.into()),
            Ok(_) | Err(ClientError::Refused(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Who is at an address, of those who are known: who have been received from, or were latched.
    pub fn peer(&self, addr: SocketAddr) -> Option<UdpPeer> {
        self.roster().peer(addr)
    }

    /// Who has this latch, likewise.
    pub fn peer_of_latch(&self, latch: u64) -> Option<UdpPeer> {
        self.roster().peer_of_latch(latch)
    }

    /// All who are known.
    pub fn peers(&self) -> Vec<UdpPeer> {
        self.roster().peers()
    }

    /// Changes of a peer's latch from now on; of several at once the last.
    pub fn changes(&self, peer: &UdpPeer) -> Changes {
        let mut changes = peer.changes();
        changes.mark_unchanged();
        Changes { changes, link: Arc::clone(self.link()) }
    }

    /// What a protocol above can bind its authentication of a peer to (RFC 5056).
    pub fn channel_binding(&self, peer: &UdpPeer) -> Result<ChannelBinding, ClientError> {
        self.channel_binding_of(peer, UNIQUE_BINDING)
    }

    /// A channel binding of a type that `docs/latch-protocol.md` has.
    pub fn channel_binding_of(&self, peer: &UdpPeer, kind: &str) -> Result<ChannelBinding, ClientError> {
        self.link().call(Call::ChannelBinding(Bind { latch: peer.latch(), kind: kind.to_owned() }), None)
    }

    /// Asks the daemon for all that it knows of a peer's latch at this moment (INQUIRE_LATCH): outer addresses too.
    pub fn inquire(&self, peer: &UdpPeer) -> Result<Inquired, ClientError> {
        self.link().call(Call::Show(Named { latch: peer.latch() }), None)
    }

    /// Where it is bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Number of the listener latch in the daemon.
    pub fn listener(&self) -> u64 {
        self.latch.latch
    }

    /// How long [`Self::recv_from`] may wait; then it fails with `WouldBlock`. None at first: for ever. With zero it does not wait,
    /// but for the daemon's word who sent what is there.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) {
        *lock(&self.timeout) = timeout;
    }

    /// What [`Self::set_read_timeout`] has set.
    pub fn read_timeout(&self) -> Option<Duration> {
        *lock(&self.timeout)
    }

    /// The time to live of the packets inside the tunnel (IP_TTL).
    pub fn ttl(&self) -> io::Result<u32> {
        SockRef::from(&self.socket).ttl_v4()
    }

    /// Sets what [`Self::ttl`] gives.
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        SockRef::from(&self.socket).set_ttl_v4(ttl)
    }

    fn step(&self, buffer: &mut [u8]) -> io::Result<Step> {
        let mut roster = self.roster();
        self.listen_to_the_daemon(&mut roster)?;
        let step = roster.receive(Instant::now(), buffer, |buffer| {
            let (length, _, from) = rustix::net::recvfrom(&self.socket, buffer, RecvFlags::DONTWAIT)?;
            let from = from.and_then(|from| SocketAddr::try_from(from).ok());
            from.map(|from| (length, from)).ok_or_else(session::shut_down)
        })?;
        let link = self.link();
        while let Some(latch) = roster.acknowledged() {
            if !link.acknowledge(self.latch.latch, latch) {
                roster.postpone(latch);
                break;
            }
        }
        Ok(step)
    }

    fn listen_to_the_daemon(&self, roster: &mut Roster) -> io::Result<()> {
        self.link().drain();
        let news = self.link().state().registry.news(self.latch.latch)?;
        for (latch, change) in &news {
            roster.heard(*latch, change, Instant::now(), buffer(&self.socket));
        }
        Ok(())
    }

    /// Until there is something to look at; `WouldBlock` when time is up.
    fn wait(&self, alarm: Option<Instant>, end: Option<Instant>) -> io::Result<()> {
        let now = Instant::now();
        if end.is_some_and(|end| end <= now) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let times = [alarm, end].into_iter().flatten().map(|time| time.saturating_duration_since(now));
        let left = times.fold(LOOK, Duration::min);
        let flags = PollFlags::IN | PollFlags::RDHUP;
        let mut descriptors =
            [PollFd::new(&self.socket, flags), PollFd::from_borrowed_fd(self.link().socket(), PollFlags::IN)];
        poll(&mut descriptors, Some(left))?;
        // To receive from it would look like waiting for ever.
        let [socket, _] = &descriptors;
        if socket.revents().contains(PollFlags::RDHUP) { Err(session::shut_down()) } else { Ok(()) }
    }

    fn ask(&self, question: Question) -> io::Result<()> {
        let accept = Accept { listener: self.latch.latch, remote: Some(question.from) };
        let peer = match self.link().call::<Created>(Call::Accept(accept), None) {
            Ok(created) => Some(self.peer_of(created)),
            Err(ClientError::Refused(refusal)) if refusal.code == Code::NotAccepted => {
                tracing::debug!(from = %question.from, reason = refusal.message, "a datagram is nobody's");
                None
            }
            Err(ClientError::Closed) => return Err(Change::gone().failure()),
            Err(error) => return Err(io::Error::other(error)),
        };
        self.roster().answered(question, peer);
        Ok(())
    }

    fn peer_of(&self, created: Created) -> UdpPeer {
        let changes = self.link().state().registry.watch_child(self.latch.latch, created.latch);
        UdpPeer::new(created, self.roster().on_break(), changes)
    }

    fn link(&self) -> &Arc<Link> {
        &self.latch.link
    }

    fn roster(&self) -> MutexGuard<'_, Roster> {
        lock(&self.roster)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.roster().given_up();
    }
}

/// The descriptor is for waiting and options: what is read by it goes past the peers.
impl AsFd for UdpEndpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for UdpEndpoint {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// How long a wait takes at most before the daemon's word is looked at: another thread may have read it.
const LOOK: Duration = Duration::from_secs(2);

fn buffer(socket: &OwnedFd) -> usize {
    // A size that is not known is a large one.
    SockRef::from(socket).recv_buffer_size().unwrap_or(1 << 30)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
