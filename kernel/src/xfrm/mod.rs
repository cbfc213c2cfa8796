//! The kernel's own IPsec (XFRM): states and policies by netlink, and what it says by itself.
//!
//! `codec` knows the octets, `socket` asks and answers, `suite` and `selectors` put the negotiated into the kernel's
//! words, `tables` holds what is installed and keeps the kernel's databases like it, `plane` is the data plane, `events`
//! the thread that listens.

pub(crate) mod codec;
mod events;
mod plane;
mod priority;
mod selectors;
mod socket;
mod suite;
mod tables;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use ipsec::plane::{EspKeys, EspSuite, Lifetime, Mode};
use ipsec::secret::Secret;
use ipsec::transform::{Encr, Integ};

pub(crate) use self::events::start;
pub(crate) use self::plane::KernelPlane;
use self::socket::XfrmSocket;
use self::tables::Tables;
use crate::netlink::context;

/// Name of this plane in errors, logs and status.
pub(crate) const NAME: &str = "kernel";

/// The kernel's databases, as far as they are ours.
pub(crate) struct Xfrm {
    tables: Mutex<Tables>,
    /// As whom the kernel's news name us.
    port: u32,
}

impl Xfrm {
    /// Connects, makes sure that the kernel has ESP, and removes what a predecessor that died has left. `mark` is put on
    /// the ESP packets that the kernel sends.
    pub(crate) fn open(mark: u32) -> io::Result<Arc<Self>> {
        let mut socket = XfrmSocket::open()?;
        probe(&mut socket)?;
        let port = socket.port();
        let mut tables = Tables::new(socket, mark);
        let (states, policies) = tables.remove_leftovers()?;
        if (states, policies) != (0, 0) {
            tracing::info!(states, policies, "removed what an earlier daemon left in the kernel");
        }
        Ok(Arc::new(Self { tables: Mutex::new(tables), port }))
    }
}

/// Installs an ESP state that nobody can use, and removes it: what a kernel has cannot be read anywhere. It is marked as
/// ours, so that the next start removes it if we die in between.
fn probe(socket: &mut XfrmSocket) -> io::Result<()> {
    let nowhere = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let keys = EspKeys { encr: Secret::new(vec![0; 20]), integ: Secret::new(Vec::new()) };
    let suite = EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: false };
    let algorithms = suite::algorithms(&suite, &keys).map_err(io::Error::other)?;
    let state = codec::State {
        id: codec::StateId { destination: nowhere, spi: PROBE_SPI },
        source: nowhere,
        reqid: 0,
        mode: Mode::Tunnel,
        selector: None,
        lifetime: Lifetime { hard_packets: Some(1), ..Lifetime::default() },
        replay_window: 0,
        esn: false,
        encapsulation: None,
        flags: codec::flag::ANY_FAMILY,
        tfc_padding: 0,
        set_mark: codec::Mark::default(),
        mark: codec::Mark::default(),
        if_id: 0,
    };
    match socket.add_state(&state, &algorithms) {
        Ok(()) => {}
        // A predecessor died in between.
        Err(e) if socket::errno(&e) == Some(rustix::io::Errno::EXIST) => {}
        Err(e) => return Err(context(e, "try whether this kernel has ESP (modules esp4, esp6)")),
    }
    socket.delete_state(state.id, codec::Mark::default()).map_err(|e| context(e, "remove the state of the try"))?;
    Ok(())
}

/// Of no SA: a peer's SPIs and ours are random, and this one is for the loopback address.
const PROBE_SPI: u32 = 0x100;
