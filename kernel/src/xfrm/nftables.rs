//! Requests to nftables (NETLINK_NETFILTER): a transaction of tables, chains, sets and rules, which all come to be or none.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::codec;
use crate::netlink::context;

/// A socket to nftables of the network namespace in which it was opened. Tables that it makes are its own ([`OWNED`]):
/// nobody else can change or remove them, not with `flush ruleset` either, and they go with it.
pub(super) struct Nftables {
    socket: Socket,
    port: u32,
    family: u8,
    table: String,
    /// For errors: what all of it is for.
    purpose: &'static str,
}

impl Nftables {
    /// For one table, of IPv6 or both families ([`IPV6`], [`BOTH`]).
    pub(super) fn open(family: u8, table: String, purpose: &'static str) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|e| context(e, purpose))?;
        let port = socket.bind_auto().map_err(|e| context(e, purpose))?.port_number();
        socket.set_cap_ack(true)?;
        Ok(Self { socket, port, family, table, purpose })
    }

    /// Begins a transaction.
    pub(super) fn transaction(&self) -> Transaction<'_> {
        let mut transaction = Transaction { of: self, octets: Vec::new(), requests: 0, sequence: 0 };
        transaction.message(BATCH_BEGIN, 0, 0, NFTABLES, &[]);
        transaction
    }
}

/// Requests that are carried out together.
pub(super) struct Transaction<'a> {
    of: &'a Nftables,
    octets: Vec<u8>,
    requests: u32,
    sequence: u32,
}

impl Transaction<'_> {
    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) {
        let length = u32::try_from(16 + 4 + body.len()).unwrap_or(u32::MAX);
        self.octets.extend(length.to_ne_bytes());
        self.octets.extend(kind.to_ne_bytes());
        self.octets.extend((REQUEST | flags).to_ne_bytes());
        self.octets.extend(self.sequence.to_ne_bytes());
        self.octets.extend(self.of.port.to_ne_bytes());
        self.octets.extend([family, 0]);
        self.octets.extend(resource.to_be_bytes());
        self.octets.extend(body);
        self.sequence += 1;
    }

    fn request(&mut self, kind: u16, flags: u16, attributes: &[Vec<u8>]) {
        self.requests += 1;
        self.message(NFTABLES << 8 | kind, ACK | flags, self.of.family, 0, &attributes.concat());
    }

    /// The table itself.
    pub(super) fn table(&mut self) {
        self.request(NEW_TABLE, CREATE, &[text(1, &self.of.table), number(2, OWNED)]);
    }

    /// A chain; with a hook and a priority, packets begin there.
    pub(super) fn chain(&mut self, chain: &str, hook: Option<(u32, i32)>) {
        let mut attributes = vec![text(1, &self.of.table), text(3, chain)];
        if let Some((hook, priority)) = hook {
            let place = [number(1, hook), attribute(2, &priority.to_be_bytes())];
            attributes.extend([nested(4, &place), text(7, "filter")]);
        }
        self.request(NEW_CHAIN, CREATE, &attributes);
    }

    /// A set of keys of so many octets. The number tells those of one transaction apart.
    pub(super) fn set(&mut self, set: &str, key_length: u32, id: u32) {
        let attributes = [text(1, &self.of.table), text(2, set), number(5, key_length), number(10, id)];
        self.request(NEW_SET, CREATE, &attributes);
    }

    /// A rule behind those of the chain.
    pub(super) fn rule(&mut self, chain: &str, expressions: &[Vec<u8>]) {
        let attributes = [text(1, &self.of.table), text(2, chain), nested(4, expressions)];
        self.request(NEW_RULE, CREATE | APPEND, &attributes);
    }

    /// Adds an element, which may be there.
    pub(super) fn add(&mut self, set: &str, key: &[u8]) {
        let attributes = self.element(set, key);
        self.request(NEW_ELEMENT, CREATE, &attributes);
    }

    /// Removes an element, which must be there.
    pub(super) fn remove(&mut self, set: &str, key: &[u8]) {
        let attributes = self.element(set, key);
        self.request(DELETE_ELEMENT, 0, &attributes);
    }

    fn element(&self, set: &str, key: &[u8]) -> [Vec<u8>; 3] {
        let element = nested(LIST_ELEMENT, &[nested(1, &[attribute(DATA_VALUE, key)])]);
        [text(1, &self.of.table), text(2, set), nested(3, &[element])]
    }

    /// Has the system carry it out.
    pub(super) fn commit(mut self) -> io::Result<()> {
        self.message(BATCH_END, 0, 0, NFTABLES, &[]);
        let Nftables { socket, purpose, .. } = self.of;
        let failed = |e| context(e, purpose);
        socket.send_to(&self.octets, &SocketAddr::new(0, 0), 0).map_err(failed)?;
        let (mut acknowledged, mut outcome) = (0, Ok(()));
        while acknowledged < self.requests {
            let (answer, _) = socket.recv_from_full().map_err(failed)?;
            for received in codec::messages(&answer).filter(|received| received.kind == codec::kind::ERROR) {
                acknowledged += 1;
                match codec::error(received.payload) {
                    Some((0, _)) => {}
                    // The first says why; the others were carried out for nothing.
                    Some((code, _)) => {
                        outcome = outcome.and(Err(failed(io::Error::from_raw_os_error(code.saturating_neg()))));
                    }
                    None => return Err(failed(io::ErrorKind::InvalidData.into())),
                }
            }
        }
        outcome
    }
}

/// A part of a rule.
fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
    nested(LIST_ELEMENT, &[text(1, name), nested(2, data)])
}

/// Loads what the system knows of a packet (`NFT_META_…`).
pub(super) fn load_meta(key: u32, register: u32) -> Vec<u8> {
    expression("meta", &[number(1, register), number(2, key)])
}

/// Sets the same.
pub(super) fn set_meta(key: u32, register: u32) -> Vec<u8> {
    expression("meta", &[number(2, key), number(3, register)])
}

/// Loads octets that follow the beginning of the transport header. What is not there ends the rule.
pub(super) fn load_transport(offset: u32, length: u32, register: u32) -> Vec<u8> {
    const TRANSPORT: u32 = 2;
    expression("payload", &[number(1, register), number(2, TRANSPORT), number(3, offset), number(4, length)])
}

/// Loads the `reqid` of the first SA that an inbound packet came by. Without one the rule ends.
pub(super) fn load_reqid(register: u32) -> Vec<u8> {
    const REQID: u32 = 5;
    expression("xfrm", &[number(1, register), number(2, REQID), attribute(3, &[0])])
}

/// Loads 1 if an IPv6 packet has this extension header, else 0.
pub(super) fn load_has_header(header: u8, register: u32) -> Vec<u8> {
    const PRESENT: u32 = 1;
    expression(
        "exthdr",
        &[number(1, register), attribute(2, &[header]), number(3, 0), number(4, 1), number(5, PRESENT)],
    )
}

/// `register = (register & mask) ^ xor`, of four octets.
pub(super) fn bitwise(register: u32, mask: [u8; 4], xor: [u8; 4]) -> Vec<u8> {
    let data = [number(1, register), number(2, register), number(3, 4), value(4, &mask), value(5, &xor)];
    expression("bitwise", &data)
}

/// Goes on if the register's first octets are these.
pub(super) fn is(register: u32, octets: &[u8]) -> Vec<u8> {
    expression("cmp", &[number(1, register), number(2, 0), value(3, octets)])
}

/// Goes on if they are less.
pub(super) fn is_less(register: u32, octets: &[u8]) -> Vec<u8> {
    expression("cmp", &[number(1, register), number(2, 2), value(3, octets)])
}

/// Goes on if the key that begins with the register is in the set.
pub(super) fn is_in(set: &str, id: u32, register: u32) -> Vec<u8> {
    expression("lookup", &[text(1, set), number(2, register), number(4, id)])
}

/// What becomes of the packet.
pub(super) fn verdict(verdict: Verdict<'_>) -> Vec<u8> {
    const JUMP: i32 = -3;
    let parts = match verdict {
        Verdict::Drop => vec![number(1, 0)],
        Verdict::Accept => vec![number(1, 1)],
        Verdict::Jump(chain) => vec![attribute(1, &JUMP.to_be_bytes()), text(2, chain)],
    };
    expression("immediate", &[number(1, 0), nested(2, &[nested(2, &parts)])])
}

/// A rule's end.
#[derive(Clone, Copy)]
pub(super) enum Verdict<'a> {
    Drop,
    Accept,
    Jump(&'a str),
}

fn value(kind: u16, octets: &[u8]) -> Vec<u8> {
    nested(kind, &[attribute(DATA_VALUE, octets)])
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut octets = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    octets.extend(value);
    octets.resize(octets.len().next_multiple_of(4), 0);
    octets
}

fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}

/// nftables has numbers in network order.
fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

// linux/netlink.h, linux/netfilter/nfnetlink.h
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// Family of a table.
pub(super) const BOTH: u8 = 1;
/// The same of one for IPv6 alone.
pub(super) const IPV6: u8 = 10;
/// A hook: what has come in.
pub(super) const PREROUTING: u32 = 0;
/// What is for this host.
pub(super) const INPUT: u32 = 1;
// linux/netfilter/nf_tables.h
const NEW_TABLE: u16 = 0;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;
/// NFT_TABLE_F_OWNER, of Linux 5.12.
const OWNED: u32 = 2;
const LIST_ELEMENT: u16 = 1;
const DATA_VALUE: u16 = 1;
/// NFT_META_…: the packet's mark.
pub(super) const MARK: u32 = 3;
/// The index of the device that it came by.
pub(super) const INPUT_DEVICE: u32 = 4;
/// Its family.
pub(super) const FAMILY: u32 = 15;
/// Its transport protocol.
pub(super) const PROTOCOL: u32 = 16;
/// The first register, of four octets (NFT_REG32_00); the others follow, and longer values take several.
pub(super) const REGISTER: u32 = 8;
