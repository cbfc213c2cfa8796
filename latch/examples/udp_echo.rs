//! UDP with many over one socket: a server that says whom it talks to, and sends back what they say; and somebody who
//! talks to it, with a socket that is not connected.
//!
//! ```text
//! udp_echo serve LATCH_SOCKET ADDRESS:PORT PEER
//! udp_echo ask   LATCH_SOCKET ADDRESS:PORT PEER REMOTE:PORT TEXT
//! ```
//!
//! PEER is an identity, or a pattern of some, in the notation of `swanctl.conf`.

use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use latchkey_latch::blocking::{Client, UdpEndpoint};
use latchkey_latch::protocol::State;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["serve", socket, local, peer] => {
            let client = Client::connect(socket)?;
            let endpoint = client.bind_udp(local.parse()?, *peer)?;
            println!("listening on {}", endpoint.local_addr());
            std::thread::spawn(move || tell_changes(&client));
            serve(&endpoint)
        }
        ["ask", socket, local, peer, remote, text] => {
            // Nobody may come by himself but whom we ask.
            let endpoint = Client::connect(socket)?.bind_udp(local.parse()?, *peer)?;
            ask(&endpoint, peer, remote.parse()?, text)
        }
        _ => Err("udp_echo serve|ask LATCH_SOCKET ADDRESS:PORT PEER [REMOTE:PORT TEXT]".into()),
    }
}

fn serve(endpoint: &UdpEndpoint) -> Result<(), Box<dyn Error>> {
    let mut datagram = vec![0; 65_535];
    loop {
        let (length, peer) = endpoint.recv_from(&mut datagram)?;
        let octets = datagram.get(..length).unwrap_or_default();
        let said: String = String::from_utf8_lossy(octets).trim_end().chars().take(40).collect();
        println!("{} {} {}: {said:?}, {length} octets", peer.latch(), peer.addr(), peer.identity().id.text);
        // It may have ended meanwhile: then nobody gets it.
        if let Err(error) = endpoint.send_to(octets, &peer) {
            println!("{} gets no answer: {error}", peer.latch());
        }
    }
}

fn ask(endpoint: &UdpEndpoint, wanted: &str, remote: SocketAddr, text: &str) -> Result<(), Box<dyn Error>> {
    let peer = endpoint.latch(remote, wanted)?;
    println!("{} {} is {}", peer.latch(), peer.addr(), peer.identity().id.text);
    endpoint.send_to(text.as_bytes(), &peer)?;
    endpoint.set_read_timeout(Some(Duration::from_secs(5)));
    let mut datagram = vec![0; 65_535];
    let (length, from) = endpoint.recv_from(&mut datagram)?;
    let octets = datagram.get(..length).unwrap_or_default();
    println!("{} answers {:?}", from.identity().id.text, String::from_utf8_lossy(octets));
    Ok(())
}

/// What becomes of the latches.
fn tell_changes(client: &Client) {
    while let Ok(Some((latch, change))) = client.next_change(None) {
        if change.state != State::Established {
            println!("{latch} is {}: {}", change.state, change.reason);
        }
    }
}
