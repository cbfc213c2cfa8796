//! The system's TCP and UDP connections, from procfs.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipsec::selector::Flow;

const TCP: u8 = 6;
const UDP: u8 = 17;
/// `TCP_SYN_SENT` as it stands there.
const SYN_SENT: &str = "02";

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Its first packet has been sent.
    Opening,
    /// Further, TIME_WAIT included.
    Open,
}

/// All TCP and UDP connections of this network namespace.
pub(crate) fn all() -> io::Result<HashMap<Flow, Progress>> {
    let mut connections = HashMap::new();
    for (table, protocol) in [("tcp", TCP), ("tcp6", TCP), ("udp", UDP), ("udp6", UDP)] {
        match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => connections.extend(text.lines().skip(1).filter_map(|line| flow(protocol, line))),
            // A system without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table.ends_with('6') => {}
            Err(error) => return Err(error),
        }
    }
    Ok(connections)
}

/// A line begins with a number, both ends and the state, as in `0: 0100007F:0050 0200007F:C350 01`.
fn flow(protocol: u8, line: &str) -> Option<(Flow, Progress)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, local_port) = end(fields.next()?)?;
    let (remote, remote_port) = end(fields.next()?)?;
    let progress = if fields.next()? == SYN_SENT { Progress::Opening } else { Progress::Open };
    Some((Flow { protocol, local, local_port, remote, remote_port }, progress))
}

/// An address is one or four 32-bit words in the byte order of the processor, read as those are.
fn end(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words: Vec<u32> = (0..address.len() / 8)
        .map(|n| u32::from_str_radix(address.get(n * 8..(n + 1) * 8)?, 16).ok())
        .collect::<Option<_>>()?;
    let octets: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    let address = match (<[u8; 4]>::try_from(octets.as_slice()), <[u8; 16]>::try_from(octets.as_slice())) {
        (Ok(four), _) => IpAddr::V4(Ipv4Addr::from(four)),
        (_, Ok(sixteen)) => IpAddr::V6(Ipv6Addr::from(sixteen)).to_canonical(),
        _ => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_connection_of_ours_is_seen_from_both_ends_until_it_ends() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else { continue };
            let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (local, remote) = (near.local_addr().unwrap(), near.peer_addr().unwrap());
            let flow = Flow {
                protocol: TCP,
                local: local.ip(),
                local_port: local.port(),
                remote: remote.ip(),
                remote_port: remote.port(),
            };
            let mirrored = Flow {
                local: flow.remote,
                local_port: flow.remote_port,
                remote: flow.local,
                remote_port: flow.local_port,
                ..flow
            };
            let connections = all().unwrap();
            assert!(connections.get(&flow) == Some(&Progress::Open) && connections.contains_key(&mirrored), "{flow}");
            socket2::SockRef::from(&near).set_linger(Some(std::time::Duration::ZERO)).unwrap();
            drop((near, listener));
            assert!(!all().unwrap().contains_key(&flow));
        }
    }

    #[test]
    fn lines_that_are_none_are_skipped() {
        for line in
            ["", "0:", "0: 0100007F:0050", "0: 01:50 02:50 01", "0: 0100007F 0200007F 01", "0: zz00007F:0 0:0 01"]
        {
            assert_eq!(flow(TCP, line), None, "{line}");
        }
    }
}
