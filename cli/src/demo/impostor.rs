//! Mallory's side of the hijack: she answers TCP segments that are meant for bob as if she were he.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use kernel::netns::Namespace;

use super::world::BOB_INNER;

/// Flags of a TCP header.
const PUSH_AND_ACK: u8 = 0x18;

/// Watches and answers packets to bob's address on a TUN device behind mallory's daemon.
pub(super) struct Impostor {
    seen: Arc<Mutex<BTreeSet<u16>>>,
}

impl Impostor {
    /// Makes the device, leads bob's address to it, and starts answering.
    pub(super) fn start(namespace: &Namespace) -> anyhow::Result<Self> {
        namespace.forward()?;
        let device = kernel::netns::TunDevice::open(namespace, "loot").context("mallory's device")?;
        namespace.add_device_route(BOB_INNER, 32, "loot")?;
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let ports = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut packet = vec![0; 65_536];
            while let Ok(length) = device.receive(&mut packet) {
                let Some(segment) = packet.get(..length).and_then(Segment::parse) else { continue };
                ports.lock().unwrap_or_else(PoisonError::into_inner).insert(segment.source_port);
                if !segment.payload.is_empty() {
                    // What cannot be sent now, alice's TCP will ask for again.
                    let _ = device.send(&segment.answer());
                }
            }
        });
        Ok(Self { seen })
    }

    /// True when a packet from this port of alice's reached mallory.
    pub(super) fn saw(&self, port: u16) -> bool {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).contains(&port)
    }
}

/// A TCP segment over IPv4, as far as an impostor cares.
struct Segment<'a> {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    source_port: u16,
    destination_port: u16,
    sequence: u32,
    acknowledgment: u32,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    fn parse(packet: &'a [u8]) -> Option<Self> {
        let header_length = usize::from(packet.first()? & 0x0f) * 4;
        if packet.first()? >> 4 != 4 || *packet.get(9)? != 6 {
            return None;
        }
        let address = |at: usize| -> Option<Ipv4Addr> {
            Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?))
        };
        let tcp = packet.get(header_length..)?;
        let short =
            |at: usize| -> Option<u16> { Some(u16::from_be_bytes(<[u8; 2]>::try_from(tcp.get(at..at + 2)?).ok()?)) };
        let long =
            |at: usize| -> Option<u32> { Some(u32::from_be_bytes(<[u8; 4]>::try_from(tcp.get(at..at + 4)?).ok()?)) };
        Some(Self {
            source: address(12)?,
            destination: address(16)?,
            source_port: short(0)?,
            destination_port: short(2)?,
            sequence: long(4)?,
            acknowledgment: long(8)?,
            payload: tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?,
        })
    }

    /// The segment that bob would have sent, but for what it says.
    fn answer(&self) -> Vec<u8> {
        let text = [b"mallory: done, ", self.payload].concat();
        let length = u32::try_from(self.payload.len()).unwrap_or_default();
        let mut tcp = Vec::new();
        tcp.extend(self.destination_port.to_be_bytes());
        tcp.extend(self.source_port.to_be_bytes());
        tcp.extend(self.acknowledgment.to_be_bytes());
        tcp.extend(self.sequence.wrapping_add(length).to_be_bytes());
        tcp.extend([5 << 4, PUSH_AND_ACK, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&text);
        let mut pseudo = Vec::new();
        pseudo.extend(self.destination.octets());
        pseudo.extend(self.source.octets());
        pseudo.extend([0, 6]);
        pseudo.extend(u16::try_from(tcp.len()).unwrap_or_default().to_be_bytes());
        pseudo.extend(&tcp);
        let sum = checksum(&pseudo);
        if let Some(field) = tcp.get_mut(16..18) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
        let mut packet = vec![0x45, 0];
        packet.extend(u16::try_from(20 + tcp.len()).unwrap_or_default().to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        packet.extend(self.destination.octets());
        packet.extend(self.source.octets());
        let sum = checksum(&packet);
        if let Some(field) = packet.get_mut(10..12) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
        packet.extend(tcp);
        packet
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(octets: &[u8]) -> u16 {
    let mut sum: u32 = octets
        .chunks(2)
        .map(|pair| u32::from(pair.first().copied().unwrap_or(0)) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}
