//! What the rules say about what a program does, and the latches that follow.

use std::ffi::{c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use latch::blocking::{ClientError, hold};
use latch::exec::{Action, ENVIRONMENT_DEAD_AFTER, ENVIRONMENT_RULES, ENVIRONMENT_SOCKET, Kind, Rules};
use latch::protocol::{Accept, Call, Code, Created, Creating, Disposition, Listening, Wanted};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::net::sockopt;
use rustix::net::{SocketType, ipproto};

use crate::table;

/// Why a call fails.
pub(crate) struct Refusal {
    pub(crate) errno: c_int,
    pub(crate) message: String,
}

/// The shortest that TCP's keepalive can be told.
const A_SECOND: Duration = Duration::from_secs(1);

const MPTCP: u32 = 262;

struct Policy {
    rules: Rules,
    daemon: PathBuf,
    dead_after: Option<Duration>,
}

fn policy() -> Result<&'static Policy, Refusal> {
    static POLICY: OnceLock<Result<Policy, String>> = OnceLock::new();
    let read = || {
        let text = std::env::var(ENVIRONMENT_RULES).map_err(|error| format!("{ENVIRONMENT_RULES}: {error}"))?;
        let rules = Rules::parse(&text).map_err(|error| format!("{ENVIRONMENT_RULES}: {error}"))?;
        let daemon = std::env::var_os(ENVIRONMENT_SOCKET).ok_or(format!("{ENVIRONMENT_SOCKET} is not set"))?;
        let dead_after = std::env::var(ENVIRONMENT_DEAD_AFTER).ok().and_then(|text| text.parse().ok());
        Ok(Policy { rules, daemon: daemon.into(), dead_after: dead_after.map(Duration::from_secs) })
    };
    POLICY.get_or_init(read).as_ref().map_err(|message| Refusal { errno: libc::EACCES, message: message.clone() })
}

/// A destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Destination {
    /// AF_UNSPEC: none any more.
    Nowhere,
    /// An address of IPv4 or IPv6.
    Somewhere(SocketAddr),
}

/// Reads a destination; `None` if it is null or of another family, which the system will see to.
///
/// # Safety
///
/// `address` is null or points to `length` octets.
pub(crate) unsafe fn address(address: *const libc::sockaddr, length: libc::socklen_t) -> Option<Destination> {
    let mut octets = [0u8; 28];
    let length = usize::try_from(length).ok()?.min(octets.len());
    if address.is_null() {
        return None;
    }
    // SAFETY: the source has at least so many octets by the caller's promise; the destination too, by the line above.
    unsafe { std::ptr::copy_nonoverlapping(address.cast::<c_void>().cast::<u8>(), octets.as_mut_ptr(), length) };
    let [f0, f1, p0, p1, a0, a1, a2, a3, rest @ ..] = octets;
    let port = u16::from_be_bytes([p0, p1]);
    match c_int::from(u16::from_ne_bytes([f0, f1])) {
        libc::AF_UNSPEC if length >= 2 => Some(Destination::Nowhere),
        libc::AF_INET if length >= 16 => {
            Some(Destination::Somewhere(SocketAddr::new(Ipv4Addr::new(a0, a1, a2, a3).into(), port)))
        }
        // The first four octets are the flow label.
        libc::AF_INET6 if length >= 24 => {
            let address: [u8; 16] = rest.first_chunk().copied()?;
            Some(Destination::Somewhere(SocketAddr::new(Ipv6Addr::from(address).into(), port)))
        }
        _ => None,
    }
}

/// Before a socket connects.
pub(crate) fn connecting(socket: c_int, to: Destination) -> Result<(), Refusal> {
    let remote = match to {
        Destination::Somewhere(remote) => remote,
        Destination::Nowhere => {
            if table::detail(socket).is_some() {
                table::closed(socket);
            }
            return Ok(());
        }
    };
    let Some((kind, multipath)) = kind(socket) else { return Ok(()) };
    let policy = policy()?;
    let what = format!("connect to {remote} ({kind})");
    let peer = match policy.rules.action(kind, remote) {
        Action::Pass => return not_latched_elsewhere(socket, remote, &what),
        Action::Refuse => return Err(refused(&what)),
        Action::Latch(peer) => peer,
    };
    if multipath {
        return Err(Refusal { errno: libc::EPROTONOSUPPORT, message: format!("{what}: MPTCP cannot be latched") });
    }
    // Programs that do not block may call again to see what has become of it.
    if table::detail(socket) == Some(mark(remote)) {
        return settled(socket);
    }
    not_latched_elsewhere(socket, remote, &what)?;
    let fits = table::fits(socket);
    let on_break = (kind == Kind::Tcp).then_some(Disposition::Reset);
    // Event loops must go on while an SA is made.
    let larval = rustix::fs::fcntl_getfl(borrowed(socket)).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
    let wanted = Wanted { on_break, larval, remote: Some(remote), ..Wanted::from(peer.as_str()) };
    give_a_port(socket);
    let (holder, creating): (OwnedFd, Creating) = fits
        .then(|| hold(&policy.daemon, &Call::Create(wanted), borrowed(socket)))
        .ok_or_else(|| Refusal { errno: libc::EMFILE, message: format!("{what}: too many descriptors") })?
        .map_err(|error| failed(&what, &error))?;
    table::note(socket, holder, mark(remote));
    table::set_larval(socket, matches!(creating, Creating::Larval(_)));
    notice_death(socket);
    Ok(())
}

/// What has become of a connection that a program made without blocking, if its latch was LARVAL.
pub(crate) fn settled(socket: c_int) -> Result<(), Refusal> {
    let Some(holder) = table::larval(socket) else { return Ok(()) };
    let Some(outcome) = latch::blocking::settled(holder) else { return Ok(()) };
    table::set_larval(socket, false);
    outcome.map_err(|error| {
        // The daemon has reset it: the program may connect it anew.
        table::closed(socket);
        failed("connect", &error)
    })
}

/// When the daemon dies nobody resets its connections. TCP's own timers must then tell the program, in finite time also
/// where it only reads. What the program has set, or sets afterwards, counts.
fn notice_death(socket: c_int) {
    let Ok(Policy { dead_after: Some(after), .. }) = policy() else { return };
    let socket = borrowed(socket);
    if sockopt::socket_protocol(socket) != Ok(Some(ipproto::TCP)) || sockopt::socket_keepalive(socket) != Ok(false) {
        return;
    }
    // What cannot be set leaves the connection with the system's own times.
    let _ = sockopt::set_tcp_keepidle(socket, (*after / 2).max(A_SECOND));
    let _ = sockopt::set_tcp_keepintvl(socket, (*after / 6).max(A_SECOND));
    let _ = sockopt::set_tcp_user_timeout(socket, u32::try_from(after.as_millis()).unwrap_or(u32::MAX));
    let _ = sockopt::set_socket_keepalive(socket, true);
}

/// A socket that is latched cannot become another connection.
fn not_latched_elsewhere(socket: c_int, remote: SocketAddr, what: &str) -> Result<(), Refusal> {
    match table::detail(socket) {
        Some(mark) if mark != self::mark(remote) => {
            let message = format!("{what}: the socket is latched to another end");
            Err(Refusal { errno: libc::EISCONN, message })
        }
        _ => Ok(()),
    }
}

/// Before a datagram goes to an address of its own, or TCP connects with its first octets.
pub(crate) fn sending(socket: c_int, to: Destination, flags: c_int) -> Result<(), Refusal> {
    let Destination::Somewhere(remote) = to else { return Ok(()) };
    let Some((kind, _)) = kind(socket) else { return Ok(()) };
    if kind == Kind::Tcp && flags & libc::MSG_FASTOPEN == 0 {
        return Ok(());
    }
    let what = format!("send to {remote} ({kind})");
    match policy()?.rules.action(kind, remote) {
        Action::Pass => Ok(()),
        Action::Refuse => Err(refused(&what)),
        Action::Latch(_) if table::detail(socket) == Some(mark(remote)) => Ok(()),
        Action::Latch(_) => {
            let message = format!("{what}: a socket is latched by connect alone, and this one is not");
            Err(Refusal { errno: libc::EOPNOTSUPP, message })
        }
    }
}

/// A latched UDP socket has been shut down, which the daemon does, or what lives on after it, when the latch has ended.
pub(crate) fn is_shut(socket: c_int) -> bool {
    if table::detail(socket).is_none() || !matches!(kind(socket), Some((Kind::Udp, _))) {
        return false;
    }
    let socket = borrowed(socket);
    let mut descriptors = [PollFd::new(&socket, PollFlags::RDHUP)];
    let [descriptor] = match rustix::event::poll(&mut descriptors, Some(&Timespec::default())) {
        Ok(_) => &descriptors,
        Err(_) => return false,
    };
    descriptor.revents().contains(PollFlags::RDHUP)
}

/// Before a socket listens.
pub(crate) fn listening(socket: c_int) -> Result<(), Refusal> {
    let Some((Kind::Tcp, multipath)) = kind(socket) else { return Ok(()) };
    let Some(local) = name(socket) else { return Ok(()) };
    let policy = policy()?;
    let what = format!("listen on {local}");
    let peer = match policy.rules.action(Kind::Listen, local) {
        Action::Pass => return Ok(()),
        Action::Refuse => return Err(refused(&what)),
        Action::Latch(peer) => peer,
    };
    if multipath {
        return Err(Refusal { errno: libc::EPROTONOSUPPORT, message: format!("{what}: MPTCP cannot be latched") });
    }
    if table::detail(socket).is_some() {
        return Ok(());
    }
    let wanted = Wanted { quiet: true, ..Wanted::from(peer.as_str()) };
    if !table::fits(socket) {
        return Err(Refusal { errno: libc::EMFILE, message: format!("{what}: too many descriptors") });
    }
    let held = hold(&policy.daemon, &Call::Listen(wanted), borrowed(socket));
    let (holder, listening): (OwnedFd, Listening) = held.map_err(|error| failed(&what, &error))?;
    table::note(socket, holder, listening.latch);
    Ok(())
}

/// After a listener has given a connection; false if that has no latch any more.
pub(crate) fn accepted(listener: c_int, socket: c_int) -> Result<bool, Refusal> {
    let Some(number) = table::detail(listener) else { return Ok(true) };
    let what = "accept";
    let policy = policy()?;
    if !table::fits(socket) {
        return Err(Refusal { errno: libc::EMFILE, message: format!("{what}: too many descriptors") });
    }
    let call = Call::Accept(Accept { listener: number, remote: None });
    let held: Result<(OwnedFd, Created), _> = hold(&policy.daemon, &call, borrowed(socket));
    match held {
        Ok((holder, created)) => {
            table::note(socket, holder, mark(created.remote));
            notice_death(socket);
            Ok(true)
        }
        Err(ClientError::Refused(refusal)) if refusal.code == Code::NotAccepted => Ok(false),
        // The peer may have reset it already.
        Err(ClientError::Refused(refusal)) if refusal.code == Code::Socket => Ok(false),
        Err(error) => Err(Refusal { errno: libc::ECONNABORTED, ..failed(what, &error) }),
    }
}

/// What a socket does, and whether by several paths; `None` if it is not one of IP.
fn kind(socket: c_int) -> Option<(Kind, bool)> {
    if socket < 0 {
        return None;
    }
    let socket = borrowed(socket);
    let family = sockopt::socket_domain(socket).ok()?;
    if family != rustix::net::AddressFamily::INET && family != rustix::net::AddressFamily::INET6 {
        return None;
    }
    let protocol = sockopt::socket_protocol(socket).ok()?;
    let number = protocol.map_or(0, |protocol| protocol.as_raw().get());
    Some(match sockopt::socket_type(socket).ok()? {
        SocketType::STREAM if protocol == Some(ipproto::TCP) => (Kind::Tcp, false),
        SocketType::STREAM if number == MPTCP => (Kind::Tcp, true),
        SocketType::DGRAM if protocol == Some(ipproto::UDP) => (Kind::Udp, false),
        _ => (Kind::Other, false),
    })
}

fn borrowed<'a>(socket: c_int) -> BorrowedFd<'a> {
    // SAFETY: the program lends its descriptor for the call, and it is not -1: who calls has asked the system about it.
    unsafe { BorrowedFd::borrow_raw(socket) }
}

fn name(socket: c_int) -> Option<SocketAddr> {
    SocketAddr::try_from(rustix::net::getsockname(borrowed(socket)).ok()?).ok()
}

/// Programs may bind to an address and leave the port to `connect` (IP_BIND_ADDRESS_NO_PORT), but a latch is for a port.
fn give_a_port(socket: c_int) {
    let Some(local) = name(socket) else { return };
    if local.port() != 0 || local.ip().is_unspecified() {
        return;
    }
    let off: c_int = 0;
    // SAFETY: four octets, as the option takes. It is of IP also for sockets of IPv6.
    unsafe {
        libc::setsockopt(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, (&raw const off).cast(), 4);
    }
    // What fails here the daemon will refuse.
    let _ = rustix::net::bind(borrowed(socket), &local);
}

/// A number that stands for an address.
fn mark(remote: SocketAddr) -> u64 {
    let ip: IpAddr = remote.ip().to_canonical();
    let mut hasher = DefaultHasher::new();
    (ip, remote.port()).hash(&mut hasher);
    hasher.finish()
}

fn refused(what: &str) -> Refusal {
    Refusal { errno: libc::EACCES, message: format!("{what}: a rule refuses it") }
}

fn failed(what: &str, error: &ClientError) -> Refusal {
    let errno = match error {
        ClientError::Refused(refusal) => match refusal.code {
            Code::NoSa => libc::ENETUNREACH,
            Code::WrongPeer | Code::WrongProtection | Code::Permission => libc::EACCES,
            Code::Conflict | Code::Exists => libc::EADDRINUSE,
            Code::Limit => libc::ENOBUFS,
            Code::Socket => libc::EADDRNOTAVAIL,
            _ => libc::ENETDOWN,
        },
        ClientError::Silent(_) => libc::ETIMEDOUT,
        ClientError::System { source, .. } if source.kind() == std::io::ErrorKind::TimedOut => libc::ETIMEDOUT,
        ClientError::System { .. } | ClientError::Protocol(_) | ClientError::Closed => libc::ENETDOWN,
    };
    Refusal { errno, message: format!("{what}: {error}") }
}

/// Says something on standard error, in one piece.
pub(crate) fn say(message: &str) {
    let line = format!("latchkey: {message}\n");
    // SAFETY: the octets are ours; a standard error that is closed takes nothing.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}
