//! Sockets and their options.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::{Pace, Prepare, StreamLimits};

/// Connections that wait for `accept`.
const BACKLOG: i32 = 1024;
/// Keep-alives only find dead connections early; they never count as the peer's liveness (RFC 9329 §6.7).
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15)).with_retries(4);

/// A listening socket. Accepted ones inherit what `prepare` did.
pub(super) fn listener(address: SocketAddr, prepare: Option<&Prepare>) -> io::Result<TcpListener> {
    let socket = socket(address, prepare)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Connects; `prepare` comes before the first packet, which has the code point like all others.
pub(super) async fn connect(
    local: SocketAddr,
    remote: SocketAddr,
    dscp: u8,
    prepare: Option<&Prepare>,
) -> io::Result<TcpStream> {
    let socket = socket(remote, prepare)?;
    if dscp != 0 {
        mark(&socket, dscp)?;
    }
    if local.port() != 0 || !local.ip().is_unspecified() {
        if local.is_ipv4() != remote.is_ipv4() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "local and remote address differ in family"));
        }
        // A port of the caller's choice may still linger from an earlier stream.
        socket.set_reuse_address(local.port() != 0)?;
        socket.bind(&SockAddr::from(local))?;
    }
    TcpSocket::from_std_stream(socket.into()).connect(remote).await
}

/// Options of a connected stream.
pub(super) fn prepare(socket: &TcpStream, limits: &StreamLimits) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.set_tcp_user_timeout(Some(limits.write))?;
    socket.set_tcp_notsent_lowat(Pace::default().unsent())
}

/// Gives all packets from now on a code point; ECN stays the system's.
pub(super) fn mark(socket: &Socket, dscp: u8) -> io::Result<()> {
    let class = u32::from(dscp) << 2;
    match socket.domain()? {
        Domain::IPV6 => socket.set_tclass_v6(class),
        _ => socket.set_tos_v4(class),
    }
}

fn socket(address: SocketAddr, prepare: Option<&Prepare>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if let Some(prepare) = prepare {
        prepare(socket.as_fd())?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fwmark(mark: u32) -> Prepare {
        std::sync::Arc::new(move |socket| SockRef::from(&socket).set_mark(mark))
    }

    // The mark must be there before the SYN: a policy could otherwise send the stream into the tunnel it carries.
    #[tokio::test]
    async fn marks_are_set_on_listeners_inherited_and_set_before_connecting() {
        let listener = match listener("127.0.0.1:0".parse().unwrap(), Some(&fwmark(7))) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return eprintln!("skipped: no right to set marks");
            }
            listener => listener.unwrap(),
        };
        let address = listener.local_addr().unwrap();
        let opened = connect("0.0.0.0:0".parse().unwrap(), address, 0, Some(&fwmark(9))).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        assert_eq!(SockRef::from(&opened).mark().unwrap(), 9);
        assert_eq!(SockRef::from(&accepted).mark().unwrap(), 7);
    }

    // RFC 9329 §6.8: the SYN included, and in either family.
    #[tokio::test]
    async fn streams_have_the_code_point_that_they_are_to_have() {
        for (address, any) in [("127.0.0.1:0", "0.0.0.0:0"), ("[::1]:0", "[::]:0")] {
            let listener = listener(address.parse().unwrap(), None).unwrap();
            let address = listener.local_addr().unwrap();
            let opened = connect(any.parse().unwrap(), address, 46, None).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            mark(&SockRef::from(&accepted), 63).unwrap();
            let class = |socket: &TcpStream| match address.is_ipv4() {
                true => SockRef::from(socket).tos_v4().unwrap(),
                false => SockRef::from(socket).tclass_v6().unwrap(),
            };
            assert_eq!((class(&opened), class(&accepted)), (46 << 2, 63 << 2));
        }
    }

    #[tokio::test]
    async fn a_given_local_address_is_used() {
        let listener = listener("127.0.0.1:0".parse().unwrap(), None).unwrap();
        let address = listener.local_addr().unwrap();
        let opened = connect("127.0.0.5:0".parse().unwrap(), address, 0, None).await.unwrap();
        let local = opened.local_addr().unwrap();
        assert_eq!(local.ip().to_string(), "127.0.0.5");
        drop((listener.accept().await.unwrap(), opened));

        // RFC 9329 §2: any local port, also a chosen one, and again right after.
        for _ in 0..2 {
            let opened = connect(local, address, 0, None).await.unwrap();
            assert_eq!(opened.local_addr().unwrap(), local);
            let (accepted, _) = listener.accept().await.unwrap();
            accepted.set_zero_linger().unwrap();
        }
    }

    #[tokio::test]
    async fn streams_do_not_wait_for_full_segments_and_notice_dead_paths() {
        let limits = StreamLimits::default();
        let listener = listener("127.0.0.1:0".parse().unwrap(), None).unwrap();
        let address = listener.local_addr().unwrap();
        let opened = connect("0.0.0.0:0".parse().unwrap(), address, 0, None).await.unwrap();
        prepare(&opened, &limits).unwrap();
        let socket = SockRef::from(&opened);
        assert!(socket.tcp_nodelay().unwrap());
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(limits.write));
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), Pace::default().unsent());
    }
}
