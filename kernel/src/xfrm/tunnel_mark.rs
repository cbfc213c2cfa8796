//! A mark on IPv6 packets that come out of the tunnel's device or are this host's to itself, so that policies of the kernel
//! can tell them from others: the switches that IPv4 has for devices are for addresses with IPv6.
//!
//! The mark is set by nftables, in a table of ours behind what others have there, and by a bit: other bits stay. The table
//! belongs to this socket: nobody else can remove it, not with `flush ruleset` either, and it goes with the process.

use std::io;

use ipsec::plane::Mark;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::codec;
use crate::netlink::context;

/// The table; it goes when this is dropped.
pub(crate) struct TunnelMark {
    _socket: Socket,
    bit: u32,
}

impl TunnelMark {
    /// Has the system set these bits of the mark. `tun` is the tunnel's device.
    pub(crate) fn set(bit: u32, (tun, name): (u32, &str)) -> io::Result<Self> {
        let what = "mark what comes out of the tunnel (nftables)";
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|e| context(e, what))?;
        let port = socket.bind_auto().map_err(|e| context(e, what))?.port_number();
        socket.set_cap_ack(true)?;
        socket.send_to(&transaction(&format!("latchkey-{name}"), bit, tun, port), &SocketAddr::new(0, 0), 0)?;
        let mut acknowledged = 0;
        while acknowledged < REQUESTS {
            let (answer, _) = socket.recv_from_full().map_err(|e| context(e, what))?;
            for received in codec::messages(&answer).filter(|received| received.kind == codec::kind::ERROR) {
                match codec::error(received.payload) {
                    Some((0, _)) => acknowledged += 1,
                    Some((code, _)) => {
                        return Err(context(io::Error::from_raw_os_error(code.saturating_neg()), what));
                    }
                    None => return Err(context(io::ErrorKind::InvalidData.into(), what)),
                }
            }
        }
        Ok(Self { _socket: socket, bit })
    }

    /// The mark, as a policy selects it.
    pub(crate) fn mark(&self) -> Mark {
        Mark { value: self.bit, mask: self.bit }
    }
}

/// A table with one chain and a rule for each device, all at once.
fn transaction(table: &str, bit: u32, tun: u32, port: u32) -> Vec<u8> {
    let mut all = Vec::new();
    let mut sequence = 0;
    let mut message = |kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]| {
        let length = u32::try_from(16 + 4 + body.len()).unwrap_or(u32::MAX);
        all.extend(length.to_ne_bytes());
        all.extend(kind.to_ne_bytes());
        all.extend((REQUEST | flags).to_ne_bytes());
        all.extend(u32::to_ne_bytes(sequence));
        all.extend(port.to_ne_bytes());
        all.extend([family, 0]);
        all.extend(resource.to_be_bytes());
        all.extend(body);
        sequence += 1;
    };
    let of_nftables = |kind: u16| NFTABLES << 8 | kind;
    let name = |kind| text(kind, table);
    message(BATCH_BEGIN, 0, 0, NFTABLES, &[]);
    let owned = [name(TABLE_NAME), number(TABLE_FLAGS, OWNED)].concat();
    message(of_nftables(NEW_TABLE), CREATE | ACK, IPV6, 0, &owned);
    let hook = nested(CHAIN_HOOK, &[number(HOOK_NUMBER, PREROUTING), number(HOOK_PRIORITY, BEHIND_OTHERS)]);
    let chain = [name(CHAIN_TABLE), text(CHAIN_NAME, CHAIN), hook, text(CHAIN_TYPE, "filter")].concat();
    message(of_nftables(NEW_CHAIN), CREATE | ACK, IPV6, 0, &chain);
    for device in [tun, LOOPBACK] {
        let load = |key| expression("meta", &[number(META_REGISTER, REGISTER), number(META_KEY, key)]);
        let value = |kind, value: u32| nested(kind, &[attribute(1, &value.to_ne_bytes())]);
        let expressions = [
            load(INPUT_DEVICE),
            expression("cmp", &[number(1, REGISTER), number(2, EQUAL), value(3, device)]),
            load(MARK),
            expression(
                "bitwise",
                &[number(1, REGISTER), number(2, REGISTER), number(3, 4), value(4, !bit), value(5, bit)],
            ),
            expression("meta", &[number(META_KEY, MARK), number(META_SOURCE, REGISTER)]),
        ];
        let rule = [name(RULE_TABLE), text(RULE_CHAIN, CHAIN), nested(RULE_EXPRESSIONS, &expressions)].concat();
        message(of_nftables(NEW_RULE), CREATE | APPEND | ACK, IPV6, 0, &rule);
    }
    message(BATCH_END, 0, 0, NFTABLES, &[]);
    all
}

fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
    nested(LIST_ELEMENT, &[text(EXPRESSION_NAME, name), nested(EXPRESSION_DATA, data)])
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

/// Requests of a transaction that are acknowledged.
const REQUESTS: usize = 4;
const CHAIN: &str = "out-of-the-tunnel";
/// Behind address translation and all that usually has a say.
const BEHIND_OTHERS: u32 = 1000;
const LOOPBACK: u32 = 1;

// linux/netlink.h, linux/netfilter/nfnetlink.h
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const IPV6: u8 = 10;
const PREROUTING: u32 = 0;
// linux/netfilter/nf_tables.h
const NEW_TABLE: u16 = 0;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
/// NFT_TABLE_F_OWNER, of Linux 5.12.
const OWNED: u32 = 2;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const META_REGISTER: u16 = 1;
const META_KEY: u16 = 2;
const META_SOURCE: u16 = 3;
const MARK: u32 = 3;
const INPUT_DEVICE: u32 = 4;
const EQUAL: u32 = 0;
/// NFT_REG_1.
const REGISTER: u32 = 1;
