//! Entries of the Security Association Database (RFC 4301 §4.4.2), a pair of SAs each.
//!
//! What packets change is atomic or behind a lock that is held for a few instructions; everything else is fixed at
//! installation, except where packets go, which a migration replaces together with the entry.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::crypto::{CryptoError, Protection};
use crate::guard::ClassId;
use crate::plane::{Encapsulation, Lifetime, Mode, PlaneError, SaPair, TfcPadding};
use crate::replay::ReplayWindow;
use crate::selector::{Flow, TrafficSelector};

/// One installed pair, as tables hold it.
#[derive(Clone)]
pub(crate) struct Entry {
    /// Grows with each installation: the higher one is the newer policy.
    pub(crate) order: u64,
    pub(crate) encapsulation: Encapsulation,
    pub(crate) sa: Arc<Sa>,
}

impl Entry {
    /// True when its peer may be behind a NAT with others that have the same address to us, and inside the same policy:
    /// transport mode in UDP (RFC 3948 §5.2).
    pub(crate) fn may_share_its_address(&self) -> bool {
        self.sa.mode == Mode::Transport && matches!(self.encapsulation, Encapsulation::Udp { .. })
    }
}

/// A pair of SAs.
pub(crate) struct Sa {
    pub(crate) spi_in: u32,
    pub(crate) spi_out: u32,
    pub(crate) class: ClassId,
    pub(crate) mode: Mode,
    pub(crate) esn: bool,
    pub(crate) copy_df: bool,
    pub(crate) copy_ecn: bool,
    pub(crate) tfc: TfcPadding,
    pub(crate) reqid: u32,
    /// The predecessor still sends (`SaPair::await_peer`).
    pub(crate) waits: AtomicBool,
    /// Receives only (`DataPlane::retire`).
    pub(crate) retired: AtomicBool,
    pub(crate) inbound: Protection,
    pub(crate) outbound: Protection,
    pub(crate) received: Counter,
    pub(crate) sent: Counter,
    pub(crate) local_ts: Vec<TrafficSelector>,
    pub(crate) remote_ts: Vec<TrafficSelector>,
    lifetime: Lifetime,
    last_sequence: AtomicU64,
    /// Of a thread that gives numbers to packets and seals them, and of one that sends them ([`Turn`]).
    sealing: Mutex<()>,
    sending: Mutex<()>,
    receiver: Mutex<Receiver>,
    soft_reported: AtomicBool,
    dead: AtomicBool,
}

/// What authenticated packets change.
pub(crate) struct Receiver {
    pub(crate) window: ReplayWindow,
    /// The UDP source of the newest packet, when it is not the one that we send to.
    pub(crate) seen_from: Option<SocketAddr>,
    /// Mapping changes reported since this tick.
    reported: (u64, u32),
}

impl Receiver {
    /// Counts a mapping change that is to be reported; false when there were `most` within a second.
    pub(crate) fn may_report(&mut self, tick: u64, most: u32) -> bool {
        let (since, count) = self.reported;
        let (since, count) = if tick.saturating_sub(since) < 1000 { (since, count) } else { (tick, 0) };
        self.reported = (since, count.saturating_add(1).min(most));
        count < most
    }
}

/// Octets and packets of one direction.
#[derive(Default)]
pub(crate) struct Counter {
    pub(crate) bytes: AtomicU64,
    pub(crate) packets: AtomicU64,
    /// Tick of the last packet; 0 before the first.
    pub(crate) last: AtomicU64,
}

/// A thread's turn to send under an SA. Who comes next may seal as soon as this one begins to send, and send when this one
/// has sent: packets leave in the order of their numbers.
pub(crate) struct Turn<'a> {
    sa: &'a Sa,
    sealing: MutexGuard<'a, ()>,
}

impl<'a> Turn<'a> {
    /// Waits until no other thread seals under this SA.
    pub(crate) fn of(sa: &'a Sa) -> Self {
        Self { sa, sealing: sa.sealing.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    pub(crate) fn is_of(&self, sa: &Sa) -> bool {
        std::ptr::eq(self.sa, sa)
    }

    /// Sends what was sealed, once all before it has been sent.
    pub(crate) fn send(self, send: impl FnOnce()) {
        let Self { sa, sealing } = self;
        // One lock is taken before the other is given up, so nobody gets between.
        let _sending = sa.sending.lock().unwrap_or_else(PoisonError::into_inner);
        drop(sealing);
        send();
    }
}

/// A limit that a packet ran into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expiry {
    /// Time for a rekey; reported once.
    Soft,
    /// The SA is unusable from now on; reported once.
    Hard,
    /// It was unusable before.
    Dead,
}

/// Without ESN a rekey is due when this many numbers are used: an eighth of the space is left for it.
const SOFT_SEQUENCE: u64 = 0xe000_0000;

impl Sa {
    pub(crate) fn new(pair: SaPair) -> Result<(Encapsulation, Self), PlaneError> {
        let suite = pair.suite;
        let bind = |keys, direction| {
            Protection::new(suite.encr, suite.key_bits, suite.integ, keys).map_err(|error| match error {
                CryptoError::KeyLength | CryptoError::Length | CryptoError::Integrity => {
                    PlaneError::KeyLength(direction)
                }
                CryptoError::Unsupported => PlaneError::Unsupported {
                    plane: "user-space",
                    what: format!(
                        "encryption algorithm {} with {} bits and integrity algorithm {}",
                        suite.encr.0, suite.key_bits, suite.integ.0
                    ),
                },
            })
        };
        let sa = Self {
            spi_in: pair.spi_in,
            spi_out: pair.spi_out,
            class: pair.class,
            mode: pair.mode,
            esn: suite.esn,
            copy_df: pair.copy_df,
            copy_ecn: pair.copy_ecn,
            tfc: pair.tfc,
            reqid: pair.reqid,
            waits: AtomicBool::new(pair.await_peer),
            retired: AtomicBool::new(false),
            inbound: bind(&pair.keys_in, "the inbound SA")?,
            outbound: bind(&pair.keys_out, "the outbound SA")?,
            received: Counter::default(),
            sent: Counter::default(),
            local_ts: pair.local_ts,
            remote_ts: pair.remote_ts,
            lifetime: pair.lifetime,
            last_sequence: AtomicU64::new(0),
            sealing: Mutex::default(),
            sending: Mutex::default(),
            receiver: Mutex::new(Receiver {
                window: ReplayWindow::new(pair.replay_window, suite.esn),
                seen_from: None,
                reported: (0, 0),
            }),
            soft_reported: AtomicBool::new(false),
            dead: AtomicBool::new(false),
        };
        Ok((pair.encapsulation, sa))
    }

    /// True when the selectors of both sides allow a packet (RFC 4301 §5.1, §5.2).
    pub(crate) fn selects(&self, flow: &Flow, shows_ports: bool) -> bool {
        let any = |selectors: &[TrafficSelector], address, port| {
            selectors.iter().any(|selector| selector.selects(flow.protocol, address, port, shows_ports))
        };
        any(&self.remote_ts, flow.remote, flow.remote_port) && any(&self.local_ts, flow.local, flow.local_port)
    }

    /// True when packets may go out under it now.
    pub(crate) fn sends(&self) -> bool {
        !self.waits.load(Ordering::Relaxed) && !self.retired.load(Ordering::Relaxed)
    }

    pub(crate) fn receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True once a hard limit was reached.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// The next sequence number to send with (RFC 4303 §3.3.3). It never repeats, whatever the peer's window does:
    /// counter-based ciphers take their IV from it.
    pub(crate) fn next_sequence(&self) -> Result<u64, Expiry> {
        let limit = if self.esn { u64::MAX } else { u64::from(u32::MAX) };
        self.last_sequence
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| (last < limit).then(|| last + 1))
            .map(|last| last + 1)
            .map_err(|_| self.die())
    }

    /// Counts one packet of `bytes` octets in `counter`; it must not pass when the answer is [`Expiry::Hard`] or
    /// [`Expiry::Dead`].
    pub(crate) fn charge(&self, counter: &Counter, bytes: usize, tick: u64) -> Result<(), Expiry> {
        let added = u64::try_from(bytes).unwrap_or(u64::MAX);
        let bytes = counter.bytes.fetch_add(added, Ordering::Relaxed).saturating_add(added);
        let packets = counter.packets.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let limits = &self.lifetime;
        if limits.hard_bytes.is_some_and(|hard| bytes > hard) || limits.hard_packets.is_some_and(|hard| packets > hard)
        {
            counter.bytes.fetch_sub(added, Ordering::Relaxed);
            counter.packets.fetch_sub(1, Ordering::Relaxed);
            return Err(self.die());
        }
        counter.last.store(tick, Ordering::Relaxed);
        let numbers_run_out = !self.esn && self.last_sequence.load(Ordering::Relaxed) >= SOFT_SEQUENCE;
        let soft = numbers_run_out
            || limits.soft_bytes.is_some_and(|soft| bytes >= soft)
            || limits.soft_packets.is_some_and(|soft| packets >= soft);
        if soft && !self.soft_reported.load(Ordering::Relaxed) && !self.soft_reported.swap(true, Ordering::Relaxed) {
            return Err(Expiry::Soft);
        }
        Ok(())
    }

    fn die(&self) -> Expiry {
        if self.dead.swap(true, Ordering::Relaxed) { Expiry::Dead } else { Expiry::Hard }
    }

    #[cfg(test)]
    pub(crate) fn set_last_sequence(&self, last: u64) {
        self.last_sequence.store(last, Ordering::Relaxed);
    }
}
