//! The UDP sockets of an initiator without a daemon (see [`crate::peer`]).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use ike::engine::{Path, Transmit, Transport};

const MARKER: [u8; 4] = [0; 4];

/// Ports 500 and 4500 of one address.
pub struct Wire {
    sockets: BTreeMap<u16, Arc<UdpSocket>>,
    received: Receiver<(Path, Vec<u8>)>,
}

impl Wire {
    /// Opens both. Reading threads end with the process.
    pub fn open(address: &str) -> Self {
        let address: IpAddr = address.parse().unwrap();
        let sockets: BTreeMap<u16, Arc<UdpSocket>> =
            [500, 4500].map(|port| (port, Arc::new(UdpSocket::bind((address, port)).unwrap()))).into();
        let (sender, received) = mpsc::channel();
        for (port, socket) in &sockets {
            let (sender, socket) = (sender.clone(), Arc::clone(socket));
            let local = SocketAddr::new(address, *port);
            let transport = if *port == 4500 { Transport::UdpEncap } else { Transport::Udp };
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while let Ok((length, remote)) = socket.recv_from(&mut buffer) {
                    let bytes = &buffer[..length];
                    let bytes =
                        if transport == Transport::UdpEncap { bytes.strip_prefix(&MARKER) } else { Some(bytes) };
                    let Some(bytes) = bytes else { continue };
                    if sender.send((Path { local, remote, transport }, bytes.to_vec())).is_err() {
                        return;
                    }
                }
            });
        }
        Self { sockets, received }
    }

    /// Sends what an engine wants sent.
    pub fn send(&self, messages: Vec<Transmit>) {
        for Transmit { path, bytes, .. } in messages {
            let marked =
                if path.transport == Transport::UdpEncap { [&MARKER, bytes.as_slice()].concat() } else { bytes };
            self.sockets[&path.local.port()].send_to(&marked, path.remote).unwrap();
        }
    }

    /// The next message, if one comes in time.
    pub fn receive(&self, limit: Duration) -> Option<(Path, Vec<u8>)> {
        self.received.recv_timeout(limit).ok()
    }
}
