//! A mark on IPv6 packets that come out of the tunnel's device or are this host's to itself, so that policies of the kernel
//! can tell them from others: the switches that IPv4 has for devices are for addresses with IPv6.
//!
//! The mark is set by nftables, in a table of ours behind what others have there, and by a bit: other bits stay. The table
//! belongs to this socket: nobody else can remove it, not with `flush ruleset` either, and it goes with the process.

use std::io;

use ipsec::plane::Mark;

use super::nftables::{self, INPUT_DEVICE, Nftables, REGISTER};

/// The table; it goes when this is dropped.
pub(crate) struct TunnelMark {
    _table: Nftables,
    bit: u32,
}

impl TunnelMark {
    /// Has the system set these bits of the mark. `tun` is the tunnel's device.
    pub(crate) fn set(bit: u32, (tun, name): (u32, &str)) -> io::Result<Self> {
        let purpose = "mark what comes out of the tunnel (nftables)";
        let table = Nftables::open(nftables::IPV6, format!("latchkey-{name}"), purpose)?;
        let mut transaction = table.transaction();
        transaction.table();
        transaction.chain(CHAIN, Some((nftables::PREROUTING, BEHIND_OTHERS)));
        for device in [tun, LOOPBACK] {
            transaction.rule(
                CHAIN,
                &[
                    nftables::load_meta(INPUT_DEVICE, REGISTER),
                    nftables::is(REGISTER, &device.to_ne_bytes()),
                    nftables::load_meta(nftables::MARK, REGISTER),
                    nftables::bitwise(REGISTER, (!bit).to_ne_bytes(), bit.to_ne_bytes()),
                    nftables::set_meta(nftables::MARK, REGISTER),
                ],
            );
        }
        transaction.commit()?;
        Ok(Self { _table: table, bit })
    }

    /// The mark, as a policy selects it.
    pub(crate) fn mark(&self) -> Mark {
        Mark { value: self.bit, mask: self.bit }
    }
}

const CHAIN: &str = "out-of-the-tunnel";
/// Behind address translation and all that usually has a say.
const BEHIND_OTHERS: i32 = 1000;
const LOOPBACK: u32 = 1;
