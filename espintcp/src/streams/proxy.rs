//! A stream through a web proxy, by HTTP CONNECT (RFC 9329 Appendix A; RFC 9110 §9.3.6).

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest answer of a proxy, octets.
const MOST: usize = 8 * 1024;

/// The proxy's address, of our family if that matters.
pub(super) async fn resolve(proxy: &str, local: SocketAddr) -> io::Result<SocketAddr> {
    let any = local.ip().is_unspecified();
    let mut found = tokio::net::lookup_host(proxy).await?.filter(|address| any || address.is_ipv4() == local.is_ipv4());
    found.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("proxy {proxy} has no usable address")))
}

/// Has the proxy connect to `target`. Afterwards the socket is a stream to there: nothing that follows the answer is read,
/// and as we speak first nothing may follow it.
pub(super) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S, target: SocketAddr) -> io::Result<()> {
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= MOST {
            return Err(refused("its answer is too long"));
        }
        match socket.read_u8().await {
            Ok(octet) => answer.push(octet),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(refused("it closed the connection"));
            }
            Err(error) => return Err(error),
        }
    }
    let line: Vec<u8> = answer.into_iter().take_while(|octet| *octet != b'\r').take(100).collect();
    let line = String::from_utf8_lossy(&line);
    let mut words = line.split(' ');
    let (version, status) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let accepted = status.len() == 3 && status.starts_with('2') && status.bytes().all(|octet| octet.is_ascii_digit());
    if version.starts_with("HTTP/1.") && accepted { Ok(()) } else { Err(refused(&line.escape_debug().to_string())) }
}

fn refused(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, format!("the proxy refuses: {reason}"))
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// What comes of an answer that is followed by the server's octets.
    async fn asked(answer: &[u8]) -> Result<Vec<u8>, String> {
        let (mut ours, mut proxy) = duplex(64 * 1024);
        proxy.write_all(answer).await.unwrap();
        proxy.shutdown().await.unwrap();
        connect(&mut ours, "192.0.2.2:443".parse().unwrap()).await.map_err(|error| error.to_string())?;
        let mut rest = Vec::new();
        ours.read_to_end(&mut rest).await.unwrap();
        ours.shutdown().await.unwrap();
        let mut request = Vec::new();
        proxy.read_to_end(&mut request).await.unwrap();
        assert_eq!(request, b"CONNECT 192.0.2.2:443 HTTP/1.1\r\nHost: 192.0.2.2:443\r\n\r\n");
        Ok(rest)
    }

    // RFC 9110 §9.3.6: any 2xx; what follows the empty line is the other end's.
    #[tokio::test]
    async fn only_a_proxy_that_agrees_is_gone_through() {
        assert_eq!(asked(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap(), b"");
        assert_eq!(asked(b"HTTP/1.0 204 \r\nVia: 1.1 x\r\n\r\n\x00\x02").await.unwrap(), b"\x00\x02");
        for (answer, reason) in [
            (&b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"[..], "407 Proxy Authentication Required"),
            (b"HTTP/1.1 302 Found\r\nLocation: http://portal\r\n\r\n", "302 Found"),
            (b"HTTP/1.1 2000 ?\r\n\r\n", "2000"),
            (b"HTTP/1.1 2x0 ?\r\n\r\n", "2x0"),
            (b"HTTP/2 200\r\n\r\n", "HTTP/2"),
            (b"SSH-2.0-x\r\n\r\n", "SSH"),
            (b"\r\n\r\n", "refuses"),
            (b"HTTP/1.1 200 OK\r\n", "closed"),
            (b"", "closed"),
        ] {
            let refused = asked(answer).await.unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
        let endless = [b"HTTP/1.1 200 OK\r\n", &b"x: y\r\n".repeat(5000)[..]].concat();
        assert!(asked(&endless).await.unwrap_err().contains("too long"));
    }
}
