//! What the system tells of a TCP connection.

#![allow(unsafe_code, reason = "TCP_INFO is read past what the C library knows of it")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::libc;

/// `tcpi_data_segs_in` of `struct tcp_info` in octets from its start. Part of Linux since 4.6; the C library's struct ends
/// before it.
const DATA_SEGMENTS_IN: usize = 152;

/// Whether a segment with data has ever come in on a TCP socket, in its turn or out of it, whether it was read or not.
/// Fails where the socket is not one of TCP, and where the system is too old to say.
pub fn has_received(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut info = [0u8; 256];
    let mut length = libc::socklen_t::try_from(info.len()).unwrap_or(0);
    // SAFETY: the descriptor is open for as long as it is borrowed, and the system writes at most `length` octets.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    let told = info.get(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
    let segments = told.get(DATA_SEGMENTS_IN..).and_then(|rest| rest.first_chunk());
    let segments = segments.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
    Ok(u32::from_ne_bytes(*segments) != 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn data_that_came_is_seen_also_after_it_was_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        assert!(!has_received(near.as_fd()).unwrap() && !has_received(far.as_fd()).unwrap());
        near.write_all(b"x").unwrap();
        far.read_exact(&mut [0]).unwrap();
        assert!(has_received(far.as_fd()).unwrap(), "it was read");
        assert!(!has_received(near.as_fd()).unwrap(), "an acknowledgement is no data");
        far.write_all(b"y").unwrap();
        near.peek(&mut [0]).unwrap();
        assert!(has_received(near.as_fd()).unwrap(), "it waits");
    }

    #[test]
    fn what_is_not_tcp_is_an_error() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(has_received(udp.as_fd()).is_err());
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(has_received(unix.as_fd()).is_err());
    }
}
