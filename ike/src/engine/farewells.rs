//! Deletes of IKE SAs that have ended here, for peers that have not heard of it: repeated like all requests until they are
//! answered, or given up (RFC 7296 §1.4.1, §2.1). Nothing else is left of such an IKE SA, and nobody is shown it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use ipsec::transform::Protocol;

use super::context::Context;
use super::{CloseReason, IkeSaId, Path, Transport};
use crate::sa::Core;
use crate::sa::channel::{Channel, Received};
use crate::sa::parts::Parts;
use crate::sa::retry::Retry;
use crate::wire::{ExchangeType, Opened, Payload, Protected};

/// Deletes that are repeated at a time. Beyond, they are said once.
const MOST: usize = 1024;

/// What is left of an IKE SA.
struct Farewell {
    channel: Channel,
    path: Path,
    dscp: u8,
    id: IkeSaId,
    connection: Arc<str>,
    /// When something is due.
    at: Instant,
}

/// All of them, by our SPI.
#[derive(Default)]
pub(crate) struct Farewells {
    by_spi: BTreeMap<u64, Farewell>,
    timers: BTreeSet<(Instant, u64)>,
}

impl Farewells {
    /// True while the SPI is not to be used again.
    pub(crate) fn contains(&self, spi: u64) -> bool {
        self.by_spi.contains_key(&spi)
    }

    /// When the first repetition is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn len(&self) -> usize {
        assert_eq!(self.by_spi.len(), self.timers.len(), "one without a timer, or the other way round");
        self.by_spi.len()
    }

    fn insert(&mut self, spi: u64, farewell: Farewell) {
        if self.by_spi.len() < MOST {
            self.timers.insert((farewell.at, spi));
            self.by_spi.insert(spi, farewell);
        }
    }

    fn take(&mut self, spi: u64) -> Option<Farewell> {
        let farewell = self.by_spi.remove(&spi)?;
        self.timers.remove(&(farewell.at, spi));
        Some(farewell)
    }
}

impl Context {
    /// Says Delete for an IKE SA that ends now. It is repeated, unless the peer has said that it does not know the IKE SA.
    pub(crate) fn say_farewell(&mut self, now: Instant, mut channel: Channel, core: &Core, reason: CloseReason) {
        let Core { id, path, dscp, .. } = *core;
        let over_stream = matches!(path.transport, Transport::Stream(_));
        let retry = Retry::start(now, &self.config.retransmission, over_stream, self.rng.as_mut());
        let payloads = [Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() }];
        let datagrams = channel.request(ExchangeType::INFORMATIONAL, &payloads, None, retry, self.rng.as_mut());
        let Some(datagrams) = datagrams else { return };
        self.transmit(path, dscp, datagrams);
        // A stream does not lose it, and who said INITIAL_CONTACT would be silent (§2.4).
        if !over_stream && reason != CloseReason::Restarted {
            let (connection, at) = (Arc::clone(&core.name), retry.at);
            self.farewells.insert(channel.local_spi(), Farewell { channel, path, dscp, id, connection, at });
        }
    }

    /// Repeats what is due.
    pub(crate) fn repeat_farewells(&mut self, now: Instant) {
        while let Some((_, spi)) = self.farewells.timers.first().copied().filter(|(at, _)| *at <= now) {
            let Some(mut farewell) = self.farewells.take(spi) else { return };
            let policy = self.config.retransmission;
            if let Some(overdue) = farewell.channel.poll_retry(now, &policy, self.rng.as_mut()) {
                self.log("IKE", 1, Some((farewell.id, &farewell.connection)), overdue.to_string());
                let Some(datagrams) = overdue.resend else { continue };
                self.transmit(farewell.path, farewell.dscp, datagrams);
            }
            if let Some(at) = farewell.channel.next_timeout() {
                farewell.at = at;
                self.farewells.insert(spi, farewell);
            }
        }
    }

    /// A message for an IKE SA that is being left; false if there is none with this SPI, or it says nothing new.
    pub(crate) fn hear_farewell(
        &mut self,
        now: Instant,
        path: Path,
        spi: u64,
        protected: Protected,
        datagram: &[u8],
    ) -> bool {
        let Some(farewell) = self.farewells.by_spi.get_mut(&spi) else { return false };
        match farewell.channel.receive(protected, datagram) {
            Received::Response(_) => {
                self.farewells.take(spi);
            }
            // §2.25.2: the peer closes it too. It is answered as usual, and ours is forgotten.
            Received::Request(opened) if closes(&opened) => {
                if let Some(Farewell { mut channel, dscp, .. }) = self.farewells.take(spi) {
                    let answer = channel.respond(&[], None, self.rng.as_mut());
                    self.transmit(path, dscp, answer.unwrap_or_default());
                    self.bury(now, spi, dscp, channel.last_words());
                }
            }
            Received::Repeated(datagrams) => {
                let dscp = farewell.dscp;
                self.transmit(path, dscp, datagrams);
            }
            Received::Request(_) | Received::Awaited | Received::Beyond(_) => {}
            Received::Ignored | Received::Forged => return false,
        }
        true
    }
}

fn closes(opened: &Opened) -> bool {
    let deletes = |parts: Parts| parts.deletes.iter().any(|(protocol, _)| *protocol == Protocol::IKE);
    opened.header.exchange == ExchangeType::INFORMATIONAL && Parts::of(opened).is_ok_and(deletes)
}
