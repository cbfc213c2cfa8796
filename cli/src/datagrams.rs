//! `latchkey nc -u`: lines as datagrams, over a latched UDP socket that is connected, or one that talks with many.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;

use latch::client::{Client, UdpEndpoint, UdpPeer, UdpSocket};
use latch::protocol::Wanted;
use tokio::sync::mpsc;

use crate::latches::{described, protected};

/// Sends what is typed to the other end, and shows what it sends, until the latch ends.
pub(crate) async fn talk(socket: UdpSocket) -> anyhow::Result<()> {
    eprintln!(
        "latch {}: {} to {}, {}; {}",
        socket.latch(),
        socket.local_addr(),
        socket.peer_addr(),
        described(socket.peer_identity()),
        protected(socket.protection())
    );
    let (mut typed, mut changes, mut datagram) = (typed(), socket.changes(), vec![0; LONGEST]);
    loop {
        tokio::select! {
            Some(octets) = typed.recv() => {
                socket.send(&octets).await?;
            }
            received = socket.recv(&mut datagram) => show(datagram.get(..received?))?,
            change = changes.next() => eprintln!("the latch is {}: {}", change.state, change.reason),
        }
    }
}

/// Shows what comes, and says from whom; sends what is typed to who has spoken last.
pub(crate) async fn listen(client: &Client, local: SocketAddr, wanted: Wanted) -> anyhow::Result<()> {
    let peer = wanted.peer.clone();
    let endpoint = client.bind_udp(local, wanted).await?;
    eprintln!("listening on {} for {peer}", endpoint.local_addr());
    let (mut typed, mut datagram) = (typed(), vec![0; LONGEST]);
    let mut last: Option<UdpPeer> = None;
    loop {
        tokio::select! {
            Some(octets) = typed.recv() => match &last {
                Some(peer) => {
                    if let Err(error) = endpoint.send_to(&octets, peer).await {
                        eprintln!("{} gets nothing: {error}", peer.addr());
                    }
                }
                None => eprintln!("nobody has come yet"),
            },
            received = endpoint.recv_from(&mut datagram) => {
                let (length, peer) = received?;
                if last.as_ref() != Some(&peer) {
                    meet(&endpoint, &peer);
                    last = Some(peer);
                }
                show(datagram.get(..length))?;
            }
        }
    }
}

fn meet(endpoint: &UdpEndpoint, peer: &UdpPeer) {
    eprintln!(
        "latch {}: {} to {}, {}; {}",
        peer.latch(),
        endpoint.local_addr(),
        peer.addr(),
        described(peer.identity()),
        protected(peer.protection())
    );
    let (latch, ended) = (peer.latch(), endpoint.ended(peer));
    tokio::spawn(async move {
        let change = ended.await;
        eprintln!("latch {latch} is {}: {}", change.state, change.reason);
    });
}

/// What is typed. A read of standard input cannot be given up, so a thread of its own does it.
pub(crate) fn typed() -> mpsc::Receiver<Vec<u8>> {
    let (sender, typed) = mpsc::channel::<Vec<u8>>(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = std::io::stdin().read(&mut buffer) {
            if sender.blocking_send(buffer.get(..length).unwrap_or_default().to_vec()).is_err() {
                break;
            }
        }
    });
    typed
}

fn show(octets: Option<&[u8]>) -> std::io::Result<()> {
    let mut output = std::io::stdout();
    output.write_all(octets.unwrap_or_default())?;
    output.flush()
}

const LONGEST: usize = 65_535;
