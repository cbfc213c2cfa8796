//! A UDP socket of tokio that is not connected, under a listener latch (RFC 5660 §5.3).

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, SockRef};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::time::sleep_until;

use super::{Changes, Holding, Shared, wait};
use crate::protocol::{
    Accept, Bind, Call, ChannelBinding, Code, Created, Disposition, Inquired, Listening, Named, Release,
    UNIQUE_BINDING, Wanted,
};
use crate::roster::{Question, Roster, Step, UdpPeer};
use crate::session::{self, Change, ClientError};

/// A UDP socket that talks with many, used as an unconnected [`tokio::net::UdpSocket`]: [`Client::bind_udp`](super::Client::bind_udp).
///
/// Who sent a datagram comes with it, and is whom an answer is sent to. When the latch of a peer breaks (or waits for too
/// long, with another disposition than `reset`), or when nothing has come or gone for five minutes, the peer has ended: datagrams
/// of it that still wait are thrown away, sending to it fails with `ConnectionReset`, and who comes from the same address
/// is another [`UdpPeer`]. When the daemon goes away, all fails with `ConnectionReset`.
///
/// Somebody has to receive: what the daemon says about peers is looked at there.
///
/// ```no_run
/// # async fn example(client: latchkey_latch::client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let socket = client.bind_udp("192.0.2.1:5300".parse()?, "*.example.org").await?;
/// let mut datagram = [0; 1500];
/// loop {
///     let (length, peer) = socket.recv_from(&mut datagram).await?;
///     println!("{} is {}", peer.addr(), peer.identity().id.text);
///     socket.send_to(&datagram[..length], &peer).await?;
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct UdpEndpoint {
    socket: tokio::net::UdpSocket,
    domain: Domain,
    local: SocketAddr,
    roster: Mutex<Roster>,
    wake: watch::Receiver<()>,
    latch: Holding,
}

/// Somebody asks for a latch.
struct Asking<'a>(&'a UdpEndpoint);

impl UdpEndpoint {
    pub(super) fn new(
        socket: tokio::net::UdpSocket,
        listening: &Listening,
        on_break: Disposition,
        latch: Holding,
    ) -> Self {
        let roster = Mutex::new(Roster::new(on_break, buffer(&socket)));
        let wake = latch.shared.registry().endpoint(listening.latch);
        let domain = socket.local_addr().map_or(Domain::IPV4, Domain::for_address);
        Self { socket, domain, local: listening.local, roster, wake, latch }
    }

    /// Receives a datagram, cut to the buffer's length, with who sent it. Cancelling it loses nothing.
    pub async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, UdpPeer)> {
        let mut wake = self.wake.clone();
        loop {
            wake.mark_unchanged();
            match self.step(buffer)? {
                Step::Datagram(length, peer) => return Ok((length, peer)),
                Step::Ask(question) => self.ask(question).await?,
                Step::Again => tokio::task::yield_now().await,
                Step::Wait(until) => self.wait(&mut wake, until).await?,
            }
        }
    }

    /// As [`Self::recv_from`], of what is there now; fails with `WouldBlock` if nothing is, or if the daemon has still to be asked
    /// who sent it, which [`Self::recv_from`] does.
    pub fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, UdpPeer)> {
        match self.step(buffer)? {
            Step::Datagram(length, peer) => Ok((length, peer)),
            Step::Ask(_) | Step::Again | Step::Wait(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Sends a datagram to a peer, under its latch or not at all.
    pub async fn send_to(&self, datagram: &[u8], peer: &UdpPeer) -> io::Result<usize> {
        loop {
            match self.try_send_to(datagram, peer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                sent => return sent,
            }
        }
    }

    /// As [`Self::send_to`], if there is room now; fails with `WouldBlock` if there is none.
    pub fn try_send_to(&self, datagram: &[u8], peer: &UdpPeer) -> io::Result<usize> {
        let mut roster = self.roster();
        self.listen_to_the_daemon(&mut roster)?;
        roster.send(peer, |to| {
            self.socket.try_send_to(datagram, session::mapped(to, self.domain)).map_err(session::unsent)
        })
    }

    /// Latches the flow to a remote end that has not sent anything, to talk to it first: the peer must be as wanted, whoever
    /// [`Client::bind_udp`](super::Client::bind_udp) lets in. An SA is made where one is needed. What becomes of it at a break is
    /// the same for all.
    pub async fn latch(&self, remote: SocketAddr, wanted: impl Into<Wanted>) -> Result<UdpPeer, ClientError> {
        let wanted = Wanted { listener: Some(self.latch.latch), remote: Some(remote), on_break: None, ..wanted.into() };
        self.roster().begin();
        let asking = Asking(self);
        let created: Created = self.shared().call(Call::Create(wanted), None).await?;
        let peer = self.peer_of(created);
        let stands = self.roster().latched(peer.clone());
        drop(asking);
        if stands { Ok(peer) } else { Err(session::ended_meanwhile(remote)) }
    }

    /// Ends a peer: nothing more comes from it, and who comes from its address is another one.
    pub async fn end(&self, peer: &UdpPeer) -> Result<(), ClientError> {
        // The daemon says then that it has ended.
        match self.shared().call::<Value>(Call::Release(Release { latch: peer.latch() }), None).await {
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

    /// Waits until a peer has ended. The future does not borrow the socket.
    pub fn ended(&self, peer: &UdpPeer) -> impl Future<Output = Change> + Send + use<> {
        let peer = peer.clone();
        wait(peer.changes(), move |change| peer.is_end(change))
    }

    /// Changes of a peer's latch from now on; of several at once the last.
    pub fn changes(&self, peer: &UdpPeer) -> Changes {
        let mut changes = peer.changes();
        changes.mark_unchanged();
        Changes { changes }
    }

    /// What a protocol above can bind its authentication of a peer to (RFC 5056).
    pub async fn channel_binding(&self, peer: &UdpPeer) -> Result<ChannelBinding, ClientError> {
        self.channel_binding_of(peer, UNIQUE_BINDING).await
    }

    /// A channel binding of a type that `docs/latch-protocol.md` has.
    pub async fn channel_binding_of(&self, peer: &UdpPeer, kind: &str) -> Result<ChannelBinding, ClientError> {
        let bind = Bind { latch: peer.latch(), kind: kind.to_owned() };
        self.shared().call(Call::ChannelBinding(bind), None).await
    }

    /// Asks the daemon for all that it knows of a peer's latch at this moment (INQUIRE_LATCH): outer addresses too.
    pub async fn inquire(&self, peer: &UdpPeer) -> Result<Inquired, ClientError> {
        self.shared().call(Call::Show(Named { latch: peer.latch() }), None).await
    }

    /// Where it is bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Number of the listener latch in the daemon.
    pub fn listener(&self) -> u64 {
        self.latch.latch
    }

    /// Waits until [`Self::try_recv_from`] may have something; it may be nothing for the reader.
    pub async fn readable(&self) -> io::Result<()> {
        let mut wake = self.wake.clone();
        loop {
            wake.mark_unchanged();
            // By itself, so that the lock is not held meanwhile.
            let step = self.roster().look();
            match step {
                Step::Ask(question) => self.ask(question).await?,
                Step::Wait(until) => return self.wait(&mut wake, until).await,
                Step::Again | Step::Datagram(..) => return Ok(()),
            }
        }
    }

    /// Waits until there is room to send.
    pub async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// The time to live of the packets inside the tunnel (IP_TTL).
    pub fn ttl(&self) -> io::Result<u32> {
        self.socket.ttl()
    }

    /// Sets what [`Self::ttl`] gives.
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.socket.set_ttl(ttl)
    }

    /// The error that waits at the socket, if there is one; takes it away.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.socket.take_error()
    }

    /// Until there is something to look at.
    async fn wait(&self, wake: &mut watch::Receiver<()>, until: Option<Instant>) -> io::Result<()> {
        let alarm = async {
            match until {
                Some(until) => sleep_until(until.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // To receive from it would look like waiting for ever.
            ready = self.socket.ready(Interest::READABLE) => match ready?.is_read_closed() {
                true => Err(session::shut_down()),
                false => Ok(()),
            },
            _ = wake.changed() => Ok(()),
            () = alarm => Ok(()),
        }
    }

    fn step(&self, buffer: &mut [u8]) -> io::Result<Step> {
        let mut roster = self.roster();
        self.listen_to_the_daemon(&mut roster)?;
        let step = roster.receive(Instant::now(), buffer, |buffer| self.socket.try_recv_from(buffer))?;
        Ok(match (self.acknowledge(&mut roster), step) {
            // The daemon had no room for all of it.
            (false, Step::Wait(_)) => Step::Wait(Some(Instant::now() + RETRY)),
            (_, step) => step,
        })
    }

    fn listen_to_the_daemon(&self, roster: &mut Roster) -> io::Result<()> {
        let news = self.shared().registry().news(self.latch.latch)?;
        for (latch, change) in &news {
            roster.heard(*latch, change, Instant::now(), buffer(&self.socket));
        }
        Ok(())
    }

    /// True when all is told.
    fn acknowledge(&self, roster: &mut Roster) -> bool {
        let shared = self.shared();
        while let Some(latch) = roster.acknowledged() {
            let release = Call::Release(Release { latch }).encode(shared.next_id());
            if release.is_ok_and(|octets| shared.socket.try_send(&octets).is_err()) {
                roster.postpone(latch);
                return false;
            }
            shared.registry().forget_child(self.latch.latch, latch);
        }
        true
    }

    async fn ask(&self, question: Question) -> io::Result<()> {
        let accept = Accept { listener: self.latch.latch, remote: Some(question.from) };
        let peer = match self.shared().call::<Created>(Call::Accept(accept), None).await {
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
        let changes = self.shared().registry().watch_child(self.latch.latch, created.latch);
        UdpPeer::new(created, self.roster().on_break(), changes)
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.latch.shared
    }

    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
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

/// When the daemon is told again what it had no room for.
const RETRY: Duration = Duration::from_millis(50);

fn buffer(socket: &tokio::net::UdpSocket) -> usize {
    // A size that is not known is a large one.
    SockRef::from(socket).recv_buffer_size().unwrap_or(1 << 30)
}
