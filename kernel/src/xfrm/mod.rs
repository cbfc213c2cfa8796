//! The kernel's own IPsec (XFRM): states and policies by netlink, and what it says by itself.
//!
//! `codec` knows the octets, `socket` asks and answers, `descriptions`, `suite` and `selectors` put the negotiated into
//! the kernel's words, `tables` holds what is installed and keeps the kernel's databases like it, `plane` is the data plane, `latches`
//! and `ports` keep latched flows apart, also from what comes by an XFRM interface (`arrivals`), `inbound` drops what should have been in user space's tunnel,
//! `tunnel_mark` lets IPv6 out of it pass, `events` is the thread that listens.

mod arrivals;
pub(crate) mod codec;
mod descriptions;
mod events;
mod icmp_errors;
mod inbound;
mod latches;
mod nftables;
mod others;
mod plane;
mod ports;
mod priority;
mod selectors;
mod shape;
mod socket;
mod suite;
mod tables;
mod tunnel_mark;

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use ipsec::plane::{EspKeys, EspSuite, Lifetime, Mark, Mode};
use ipsec::secret::Secret;
use ipsec::transform::{Encr, Integ};
use rustix::event::{EventfdFlags, eventfd};

pub(crate) use self::events::start;
pub(crate) use self::inbound::InboundPolicies;
pub(crate) use self::latches::Latches;
pub(crate) use self::plane::KernelPlane;
use self::socket::{Databases as _, XfrmSocket};
use self::tables::Tables;
pub(crate) use self::tunnel_mark::TunnelMark;
use crate::netlink::context;
use crate::network::lock;

/// Name of this plane in errors, logs and status.
pub(crate) const NAME: &str = "kernel";

/// The barrier that a daemon of this network namespace left, all of it closed. While one runs, that is its own, and puts back
/// what it still needs.
pub(crate) fn left_barrier() -> io::Result<Latches> {
    /// No device has it: nothing leads into a tunnel.
    const NO_DEVICE: u32 = 0x7fff_ffff;
    Latches::open(NO_DEVICE, true)
}

/// The kernel's databases, as far as they are ours.
pub(crate) struct Xfrm {
    tables: Mutex<Tables>,
    /// As whom the kernel's news name us.
    port: u32,
    /// The kernel has ESP in TCP streams: with IPv4, with IPv6.
    espintcp: (bool, bool),
    /// Readable when the tables have something to be looked after that the kernel brings no news of.
    alarm: OwnedFd,
    /// `net.core.xfrm_acq_expires` and what it was.
    acquire_expires: Option<(File, String)>,
}

impl Xfrm {
    /// Connects, makes sure that the kernel has ESP, and removes what a predecessor that died has left. `mark` is put on
    /// the ESP packets that the kernel sends.
    pub(crate) fn open(mark: u32) -> io::Result<Arc<Self>> {
        let mut socket = XfrmSocket::open()?.hearing_others()?;
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        probe(&mut socket, localhost, None)?;
        // Refused alike where the option was not built and where its module cannot be had.
        let in_tcp = Some(codec::Ports { in_tcp: true, source: 1, destination: 1 });
        let mut in_streams = |nowhere| probe(&mut socket, nowhere, in_tcp).is_ok();
        let espintcp = (in_streams(localhost), in_streams(IpAddr::V6(Ipv6Addr::LOCALHOST)));
        let (tables, port) = clean_tables(socket, mark)?;
        let acquire_expires = shorten_acquires();
        Self::of(tables, port, espintcp, acquire_expires)
    }

    /// Connects to the policies alone, of a kernel that may have no ESP.
    pub(crate) fn open_policies() -> io::Result<Arc<Self>> {
        let (tables, port) = clean_tables(XfrmSocket::open()?, 0)?;
        Self::of(tables, port, (false, false), None)
    }

    fn of(
        tables: Mutex<Tables>,
        port: u32,
        espintcp: (bool, bool),
        acquire_expires: Option<(File, String)>,
    ) -> io::Result<Arc<Self>> {
        let alarm = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| context(e.into(), "make an eventfd"))?;
        Ok(Arc::new(Self { tables, port, espintcp, alarm, acquire_expires }))
    }

    /// The tables, for changes: what is left to be looked after wakes the thread that does.
    fn tables(&self) -> Held<'_> {
        let tables = lock(&self.tables);
        Held { needed: tables.needs_care(), tables, alarm: &self.alarm }
    }

    fn hear_alarm(&self) {
        // It counts, and is not readable again until the next one.
        let _ = rustix::io::read(&self.alarm, &mut [0; 8]);
    }

    /// True where the kernel has ESP in TCP streams between addresses of this family.
    pub(crate) fn has_espintcp(&self, ipv6: bool) -> bool {
        if ipv6 { self.espintcp.1 } else { self.espintcp.0 }
    }

    /// True when this inbound SPI is of a pair that the kernel carries.
    pub(crate) fn receives(&self, spi_in: u32) -> bool {
        lock(&self.tables).receives(spi_in)
    }
}

/// The tables while somebody changes them.
struct Held<'a> {
    tables: MutexGuard<'a, Tables>,
    /// They had something to be looked after before.
    needed: bool,
    alarm: &'a OwnedFd,
}

impl Deref for Held<'_> {
    type Target = Tables;

    fn deref(&self) -> &Tables {
        &self.tables
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Tables {
        &mut self.tables
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.tables.needs_care() && !self.needed {
            // It fails only when it has been counted 2^64 times.
            let _ = rustix::io::write(self.alarm, &1_u64.to_ne_bytes());
        }
    }
}

/// Tables without what a predecessor that died has left, and as whom the kernel's news name us.
fn clean_tables(socket: XfrmSocket, mark: u32) -> io::Result<(Mutex<Tables>, u32)> {
    let port = socket.port();
    let mut tables = Tables::new(socket, mark);
    let (states, policies) = tables.remove_leftovers()?;
    if (states, policies) != (0, 0) {
        tracing::info!(states, policies, "removed what an earlier daemon left in the kernel");
    }
    Ok((Mutex::new(tables), port))
}

impl Drop for Xfrm {
    fn drop(&mut self) {
        if let Some((file, before)) = &mut self.acquire_expires
            && let Err(e) = write_anew(file, before)
        {
            tracing::warn!("set net.core.xfrm_acq_expires to {before} again: {e}");
        }
    }
}

/// Says where an operator has the kernel drop what no policy is for (`ip xfrm policy setdefault`).
pub(crate) fn warn_of_default_policies() {
    // Where there are no policies there is no default.
    let Ok(blocked) = XfrmSocket::open().and_then(|mut socket| socket.blocked_by_default()) else { return };
    if !blocked.is_empty() {
        let blocked: Vec<String> = blocked.iter().map(ToString::to_string).collect();
        tracing::warn!(
            "the kernel drops packets that no IPsec policy is for ({}): IKE, ESP and what Child SAs are for passes, all else \
             needs a shunt (mode = pass); 'ip xfrm policy setdefault' changes it",
            blocked.join(", ")
        );
    }
}

/// After an acquire the kernel keeps silent about its policy, whatever the packet, for 30 s: too long for what follows a
/// failure, or for a trap that brings up SAs for many pairs of addresses.
fn shorten_acquires() -> Option<(File, String)> {
    let path = "/proc/sys/net/core/xfrm_acq_expires";
    let shortened = (|| {
        let mut file = File::options().read(true).write(true).open(path)?;
        let mut before = String::new();
        file.read_to_string(&mut before)?;
        write_anew(&mut file, ACQUIRE_EXPIRES)?;
        // A predecessor that was killed has left ours.
        let before = Some(before.trim()).filter(|before| *before != ACQUIRE_EXPIRES).unwrap_or(KERNELS_OWN);
        io::Result::Ok((file, before.to_owned()))
    })();
    shortened.inspect_err(|e| tracing::info!("{path} stays as it is ({e}): traps wait so long after a failure")).ok()
}

/// A setting is written from its beginning.
fn write_anew(file: &mut File, setting: &str) -> io::Result<()> {
    file.rewind()?;
    file.write_all(setting.as_bytes())
}

/// Installs an ESP state that nobody can use, and removes it: what a kernel has cannot be read anywhere. It is marked as
/// ours, so that the next start removes it if we die in between.
fn probe(socket: &mut XfrmSocket, nowhere: IpAddr, encapsulation: Option<codec::Ports>) -> io::Result<()> {
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
        encapsulation,
        flags: codec::flag::ANY_FAMILY,
        extra_flags: 0,
        offload: None,
        tfc_padding: 0,
        set_mark: Mark::default(),
        mark: Mark::default(),
        if_id: 0,
    };
    match socket.add_state(&state, &algorithms) {
        Ok(()) => {}
        // A predecessor died in between.
        Err(e) if socket::errno(&e) == Some(rustix::io::Errno::EXIST) => {}
        Err(e) => return Err(context(e, "try whether this kernel has ESP (modules esp4, esp6)")),
    }
    socket.delete_state(state.id, Mark::default()).map_err(|e| context(e, "remove the state of the try"))?;
    Ok(())
}

/// Seconds; and those of a kernel that nobody has told otherwise.
const ACQUIRE_EXPIRES: &str = "2";
const KERNELS_OWN: &str = "30";
/// Of no SA: a peer's SPIs and ours are random, and this one is for the loopback address.
const PROBE_SPI: u32 = 0x100;

#[cfg(test)]
mod refusals;
#[cfg(test)]
mod tests;
