//! Counts of messages and rekeys, for each connection and in all, as charon's `counters` plugin has them.
//!
//! A message counts once, when it is made or when it was understood; repetitions do not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::wire::ExchangeType;

/// charon's name for connections that are not known yet.
const UNNAMED: &str = "(unnamed)";

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "charon's names")]
pub enum Counter {
    IkeRekeyInit,
    IkeRekeyResp,
    ChildRekey,
    Invalid,
    InvalidSpi,
    IkeInitInReq,
    IkeInitInResp,
    IkeInitOutReq,
    IkeInitOutResp,
    IkeAuthInReq,
    IkeAuthInResp,
    IkeAuthOutReq,
    IkeAuthOutResp,
    CreateChildInReq,
    CreateChildInResp,
    CreateChildOutReq,
    CreateChildOutResp,
    InfoInReq,
    InfoInResp,
    InfoOutReq,
    InfoOutResp,
}

/// How many counters there are.
const COUNTERS: usize = 21;

impl Counter {
    /// All, in charon's order.
    pub const ALL: [Self; COUNTERS] = [
        Self::IkeRekeyInit,
        Self::IkeRekeyResp,
        Self::ChildRekey,
        Self::Invalid,
        Self::InvalidSpi,
        Self::IkeInitInReq,
        Self::IkeInitInResp,
        Self::IkeInitOutReq,
        Self::IkeInitOutResp,
        Self::IkeAuthInReq,
        Self::IkeAuthInResp,
        Self::IkeAuthOutReq,
        Self::IkeAuthOutResp,
        Self::CreateChildInReq,
        Self::CreateChildInResp,
        Self::CreateChildOutReq,
        Self::CreateChildOutResp,
        Self::InfoInReq,
        Self::InfoInResp,
        Self::InfoOutReq,
        Self::InfoOutResp,
    ];

    /// charon's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::IkeRekeyInit => "ike-rekey-init",
            Self::IkeRekeyResp => "ike-rekey-resp",
            Self::ChildRekey => "child-rekey",
            Self::Invalid => "invalid",
            Self::InvalidSpi => "invalid-spi",
            Self::IkeInitInReq => "ike-init-in-req",
            Self::IkeInitInResp => "ike-init-in-resp",
            Self::IkeInitOutReq => "ike-init-out-req",
            Self::IkeInitOutResp => "ike-init-out-resp",
            Self::IkeAuthInReq => "ike-auth-in-req",
            Self::IkeAuthInResp => "ike-auth-in-resp",
            Self::IkeAuthOutReq => "ike-auth-out-req",
            Self::IkeAuthOutResp => "ike-auth-out-resp",
            Self::CreateChildInReq => "create-child-in-req",
            Self::CreateChildInResp => "create-child-in-resp",
            Self::CreateChildOutReq => "create-child-out-req",
            Self::CreateChildOutResp => "create-child-out-resp",
            Self::InfoInReq => "info-in-req",
            Self::InfoInResp => "info-in-resp",
            Self::InfoOutReq => "info-out-req",
            Self::InfoOutResp => "info-out-resp",
        }
    }

    /// That of a message; exchanges that charon does not count have none.
    fn of_message(exchange: ExchangeType, incoming: bool, response: bool) -> Option<Self> {
        let of = |in_req, in_resp, out_req, out_resp| match (incoming, response) {
            (true, false) => in_req,
            (true, true) => in_resp,
            (false, false) => out_req,
            (false, true) => out_resp,
        };
        match exchange {
            ExchangeType::IKE_SA_INIT => {
                Some(of(Self::IkeInitInReq, Self::IkeInitInResp, Self::IkeInitOutReq, Self::IkeInitOutResp))
            }
            ExchangeType::IKE_AUTH => {
                Some(of(Self::IkeAuthInReq, Self::IkeAuthInResp, Self::IkeAuthOutReq, Self::IkeAuthOutResp))
            }
            ExchangeType::CREATE_CHILD_SA => Some(of(
                Self::CreateChildInReq,
                Self::CreateChildInResp,
                Self::CreateChildOutReq,
                Self::CreateChildOutResp,
            )),
            ExchangeType::INFORMATIONAL => {
                Some(of(Self::InfoInReq, Self::InfoInResp, Self::InfoOutReq, Self::InfoOutResp))
            }
            _ => None,
        }
    }
}

/// One number for each [`Counter`].
#[derive(Debug, Default)]
struct Counts([AtomicU64; COUNTERS]);

impl Counts {
    /// Counts fit into 64 bits for longer than any daemon runs.
    fn add(&self, counter: Counter) {
        if let Some(count) = self.0.get(counter as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> Vec<(Counter, u64)> {
        Counter::ALL.into_iter().zip(self.0.iter().map(|count| count.load(Ordering::Relaxed))).collect()
    }

    fn reset(&self) {
        self.0.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    }
}

/// Counts for one connection and in all; cheap to clone, each IKE SA has one.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    named: Arc<Counts>,
    all: Arc<Counts>,
}

impl Tally {
    pub(crate) fn count(&self, counter: Counter) {
        self.named.add(counter);
        self.all.add(counter);
    }

    pub(crate) fn message(&self, exchange: ExchangeType, incoming: bool, response: bool) {
        if let Some(counter) = Counter::of_message(exchange, incoming, response) {
            self.count(counter);
        }
    }
}

/// The counts of an engine, of all its shards together.
#[derive(Debug, Default)]
pub struct Counters {
    all: Arc<Counts>,
    named: Mutex<BTreeMap<String, Arc<Counts>>>,
}

impl Counters {
    /// The counts of a connection, which begin with this.
    pub(crate) fn of(&self, connection: &str) -> Tally {
        let mut named = self.named();
        let named = match named.get(connection) {
            Some(named) => Arc::clone(named),
            None => Arc::clone(named.entry(connection.to_owned()).or_default()),
        };
        Tally { named, all: Arc::clone(&self.all) }
    }

    fn named(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Counts>>> {
        // Nothing is half done while it is held.
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of IKE SAs whose connection is not known yet.
    pub(crate) fn unnamed(&self) -> Tally {
        self.of(UNNAMED)
    }

    /// Counts what belongs to no connection.
    pub(crate) fn count(&self, counter: Counter) {
        self.all.add(counter);
    }

    /// Forgets the counts of connections that are neither configured nor in use.
    pub(crate) fn retain(&self, is_configured: impl Fn(&str) -> bool) {
        self.named().retain(|name, counts| name == UNNAMED || is_configured(name) || Arc::strong_count(counts) > 1);
    }

    /// The counts of a connection, or of all for `None`; `None` where nothing was counted under this name.
    pub fn read(&self, connection: Option<&str>) -> Option<Vec<(Counter, u64)>> {
        match connection {
            Some(name) => self.named().get(name).map(|counts| counts.read()),
            None => Some(self.all.read()),
        }
    }

    /// Names under which something was counted.
    pub fn names(&self) -> Vec<String> {
        self.named().keys().cloned().collect()
    }

    /// Begins anew for a connection, or in all for `None`.
    pub fn reset(&self, connection: Option<&str>) {
        match connection {
            Some(name) => self.named().get(name).into_iter().for_each(|counts| counts.reset()),
            None => self.all.reset(),
        }
    }

    /// Begins anew for all connections and in all.
    pub fn reset_all(&self) {
        self.all.reset();
        self.named().values().for_each(|counts| counts.reset());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_its_place_and_a_name_of_its_own() {
        let counters = Counters::default();
        let tally = counters.of("site");
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
            (0..=index).for_each(|_| tally.count(counter));
        }
        for name in [None, Some("site")] {
            let read = counters.read(name).unwrap();
            assert!(read.iter().zip(1..).all(|((_, count), n)| *count == n));
            let names: std::collections::BTreeSet<_> = read.iter().map(|(counter, _)| counter.name()).collect();
            assert_eq!(names.len(), COUNTERS);
        }
    }

    #[test]
    fn connections_are_counted_apart_and_begin_anew_apart() {
        let counters = Counters::default();
        let of = |counters: &Counters, name| {
            counters.read(name).map(|read| read.into_iter().map(|(_, count)| count).sum::<u64>())
        };
        let (a, b) = (counters.of("a"), counters.of("b"));
        a.message(ExchangeType::IKE_AUTH, true, false);
        b.message(ExchangeType::IKE_AUTH, false, true);
        b.message(ExchangeType::IKE_INTERMEDIATE, false, true);
        counters.count(Counter::Invalid);
        assert_eq!(of(&counters, None), Some(3));
        assert_eq!((of(&counters, Some("a")), of(&counters, Some("b"))), (Some(1), Some(1)));
        assert_eq!(of(&counters, Some("c")), None);
        counters.reset(Some("c"));
        counters.reset(Some("a"));
        assert_eq!((of(&counters, None), of(&counters, Some("a"))), (Some(3), Some(0)));
        // Removed from the configuration: kept as long as an IKE SA counts.
        drop(a);
        counters.retain(|_| false);
        assert_eq!(counters.names(), ["b"]);
        counters.reset_all();
        assert_eq!((of(&counters, None), of(&counters, Some("b"))), (Some(0), Some(0)));
    }
}
