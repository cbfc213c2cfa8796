//! What all IKE SAs share: settings, randomness, the output queue, numbers and the tables that route.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use ipsec::plane::StreamId;
use pad::{Identity, PeerIdentity, Ppk, Proof};

use super::{
    ChildReady, ChildSaId, ChildSaStatus, CloseReason, EngineConfig, Event, IkeSaId, Initiate, Job, JobId, Judge,
    Judgement, Output, Path, TlsPeer, Transmit,
};
use crate::Rng;
use crate::config::{Connection, Fragmentation};
use crate::crypto::KeyWork;
use crate::engine::Transport;
use crate::engine::connections::Connections;
use crate::engine::farewells::Farewells;
use crate::engine::reauthentication::Reauthentications;
use crate::engine::shards::Numbering;
use crate::engine::shared::Shared;
use crate::engine::tombstones::{Tombstone, Tombstones};
use crate::engine::triggers::Triggers;
use crate::sa::Established;
use crate::sa::crash::TokenMaker;
use crate::sa::init::Again;
use crate::sa::reauthentication::Replacement;
use crate::sa::redirect::Redirected;
use crate::sa::retry::after;

/// A job that is out.
pub(crate) struct JobEntry {
    /// Whose.
    pub(crate) ike_sa: IkeSaId,
    /// For `InstallChild`: what to take down again if nobody wants the answer.
    pub(crate) installs: Option<Box<ChildSaStatus>>,
}

/// Who is at both ends of an established IKE SA, and the entry that admitted the peer: another entry may ask
/// for less proof, and what it admits must not touch this one's IKE SAs.
///
/// Both identities in their canonical form, each after its length, then the entry's name. Of peers that have proved nothing no two
/// are the same, whatever they say (RFC 7619 §2.3): theirs ends with what stands for the IKE SA.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PeerKey(Arc<[u8]>);

impl PeerKey {
    pub(crate) fn of(peer: &PeerIdentity) -> Self {
        let lineage: &[u8] = match &peer.proof {
            Proof::Unauthenticated { lineage } => lineage,
            Proof::PreSharedKey | Proof::Certificate { .. } | Proof::RawKey { .. } | Proof::Eap { .. } => &[],
        };
        Self([&Self::identities(&peer.local_id, &peer.id), peer.entry.as_bytes(), lineage].concat().into())
    }

    /// What the keys of all entries between two identities begin with.
    pub(crate) fn of_identities(local: &Identity, remote: &Identity) -> Self {
        Self(Self::identities(local, remote).into())
    }

    fn identities(local: &Identity, remote: &Identity) -> Vec<u8> {
        let (local, remote) = (local.canonical(), remote.canonical());
        [&local.len().to_be_bytes(), local.as_slice(), &remote.len().to_be_bytes(), &remote].concat()
    }

    pub(crate) fn starts_with(&self, prefix: &Self) -> bool {
        self.0.starts_with(&prefix.0)
    }

    /// True when both are the same one, which is found out faster than whether they are equal.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

pub(crate) struct Context {
    pub(crate) config: EngineConfig,
    pub(crate) rng: Box<dyn Rng>,
    pub(crate) outputs: VecDeque<Output>,
    /// What all shards of the engine have in common.
    pub(crate) shared: Arc<Shared>,
    /// Which shard this is.
    pub(crate) numbering: Numbering,
    pub(crate) connections: Arc<Connections>,
    pub(crate) authorities: Vec<[u8; 20]>,
    /// Post-quantum preshared keys.
    pub(crate) ppks: Vec<Ppk>,
    /// Whether a peer that is in may stay.
    pub(crate) judge: Option<Judge>,
    /// IKE SAs that have come up, or by a rekey, with what was proved before the last change of credentials.
    pub(crate) unreviewed: Vec<IkeSaId>,
    /// Our addresses at which peers may reach us (RFC 4555 §3.4).
    pub(crate) local_addresses: Vec<IpAddr>,
    pub(crate) jobs: BTreeMap<JobId, JobEntry>,
    /// Inbound SPIs in use or reserved.
    pub(crate) child_spis: BTreeMap<u32, IkeSaId>,
    /// Child SAs that are up.
    pub(crate) child_owners: BTreeMap<ChildSaId, IkeSaId>,
    /// What the IKE SA at hand has entered into the directory of peers, before it was up.
    pub(crate) entered: Option<(PeerKey, IkeSaId)>,
    /// Successors made by rekeying, to be taken into the table.
    pub(crate) spawned: Vec<Established>,
    /// IKE SAs that another one of the same peer replaces, of this shard or another.
    pub(crate) superseded: Vec<IkeSaId>,
    /// IKE SAs that a ticket of theirs has brought back as others, of this shard or another.
    pub(crate) outlived: Vec<IkeSaId>,
    /// IKE SAs that are to go when another one is up.
    pub(crate) reauthentications: Reauthentications,
    /// What to initiate again: an IKE SA that ended is to be replaced.
    pub(crate) reinitiate: Vec<Initiate>,
    /// What is to take the place of an IKE SA before that goes.
    pub(crate) replacements: Vec<Replacement>,
    pub(crate) tokens: TokenMaker,
    /// What goes on at another gateway.
    pub(crate) redirected: Vec<Redirected>,
    /// What did not get through IKE_AUTH and is tried again.
    pub(crate) again: Vec<Again>,
    pub(crate) tombstones: Tombstones,
    pub(crate) farewells: Farewells,
    pub(crate) triggers: Triggers,
    last_job: u64,
    last_ike: u64,
    last_child: u64,
    last_stream: u64,
}

/// The code point of what no connection speaks for.
pub(crate) const UNMARKED: u8 = 0;

impl Context {
    pub(crate) fn new(config: EngineConfig, rng: Box<dyn Rng>, shared: Arc<Shared>, numbering: Numbering) -> Self {
        Self {
            config,
            rng,
            outputs: VecDeque::new(),
            shared,
            numbering,
            connections: Arc::default(),
            authorities: Vec::new(),
            ppks: Vec::new(),
            judge: None,
            unreviewed: Vec::new(),
            local_addresses: Vec::new(),
            jobs: BTreeMap::new(),
            child_spis: BTreeMap::new(),
            child_owners: BTreeMap::new(),
            entered: None,
            spawned: Vec::new(),
            superseded: Vec::new(),
            outlived: Vec::new(),
            reinitiate: Vec::new(),
            replacements: Vec::new(),
            redirected: Vec::new(),
            again: Vec::new(),
            reauthentications: Reauthentications::default(),
            tokens: TokenMaker::default(),
            tombstones: Tombstones::default(),
            farewells: Farewells::default(),
            triggers: Triggers::default(),
            last_job: 0,
            last_ike: 0,
            last_child: 0,
            last_stream: 0,
        }
    }

    /// True when we have an IKE SA between these identities, whichever entry admitted the peer.
    pub(crate) fn knows_peer(&self, local: &Identity, remote: &Identity) -> bool {
        self.shared.peers.knows(local, remote)
    }

    /// Enters an IKE SA that is about to be up; what becomes of it decides whether it stays.
    pub(crate) fn enter_alone(&mut self, peer: &PeerKey, id: IkeSaId, but: Option<IkeSaId>) -> bool {
        let alone = self.shared.peers.enter_alone(peer, id, but);
        if alone {
            self.entered = Some((peer.clone(), id));
        }
        alone
    }

    /// Enters an IKE SA that is about to be up, and names those of its peer that have to go.
    pub(crate) fn take_over(&mut self, peer: &PeerKey, id: IkeSaId) {
        // One that another of ours replaces goes when that has everything.
        let later = |id: IkeSaId| self.reauthentications.contains(id);
        let others = self.shared.peers.take_over(peer, id, later);
        self.entered = Some((peer.clone(), id));
        self.superseded.extend(others);
    }

    pub(crate) fn event(&mut self, event: Event) {
        if let Event::Done { token } | Event::Failed { token: Some(token), .. } = &event {
            self.triggers.remove(*token);
        }
        self.outputs.push_back(Output::Event(event));
    }

    pub(crate) fn log(&mut self, group: &'static str, level: i8, ike_sa: Option<(IkeSaId, &str)>, message: String) {
        let ike_sa = ike_sa.map(|(id, name)| (id, name.to_owned()));
        self.event(Event::Log { group, level, ike_sa, message });
    }

    /// Sends messages along a path, with this code point: that of a connection, or [`UNMARKED`].
    pub(crate) fn transmit(&mut self, path: Path, dscp: u8, datagrams: impl IntoIterator<Item = Vec<u8>>) {
        for bytes in datagrams {
            self.outputs.push_back(Output::Transmit(Transmit { path, dscp, bytes }));
        }
    }

    /// Says what a message that came along this path was worth, where that is a stream.
    pub(crate) fn judge(&mut self, path: &Path, judgement: Judgement) {
        if let Transport::Stream(stream) = path.transport {
            self.outputs.push_back(Output::Judgement(stream, judgement));
        }
    }

    pub(crate) fn random(&mut self, length: usize) -> Vec<u8> {
        let mut octets = vec![0; length];
        self.rng.fill(&mut octets);
        octets
    }

    pub(crate) fn next_ike(&mut self) -> IkeSaId {
        self.last_ike += 1;
        IkeSaId(self.numbering.number(self.last_ike))
    }

    pub(crate) fn next_child(&mut self) -> ChildSaId {
        self.last_child += 1;
        ChildSaId(self.numbering.number(self.last_child))
    }

    /// Asks for a stream to the peer, from any port of ours (RFC 9329 §2).
    pub(crate) fn open_stream(&mut self, connection: &Connection, local: IpAddr, remote: SocketAddr) -> StreamId {
        self.last_stream += 1;
        let stream = StreamId(self.numbering.number(self.last_stream));
        let tls = connection.tls.clone().map(|name| TlsPeer { name, cacerts: connection.remote.cacerts.clone() });
        let (local, proxy) = (SocketAddr::new(local, 0), connection.tcp_proxy.clone());
        let dscp = connection.dscp;
        self.outputs.push_back(Output::OpenStream { stream, local, remote, dscp, tls, proxy });
        stream
    }

    /// Hands out a job.
    pub(crate) fn job(&mut self, ike_sa: IkeSaId, job: Job) -> JobId {
        self.push_job(JobEntry { ike_sa, installs: None }, job)
    }

    /// Hands out a step of a key exchange.
    pub(crate) fn key_work(&mut self, ike_sa: IkeSaId, work: KeyWork) -> JobId {
        self.job(ike_sa, Job::KeyExchange(work))
    }

    /// Hands out a Child SA for installation.
    pub(crate) fn install(&mut self, mut ready: ChildReady, status: ChildSaStatus) -> JobId {
        let lifetime = &mut ready.pair.lifetime;
        lifetime.soft_bytes = self.less_random(lifetime.soft_bytes, ready.config.rand_bytes);
        lifetime.soft_packets = self.less_random(lifetime.soft_packets, ready.config.rand_packets);
        let entry = JobEntry { ike_sa: ready.ike_sa, installs: Some(Box::new(status)) };
        self.push_job(entry, Job::InstallChild(Box::new(ready)))
    }

    /// A limit less up to `range`, which leaves at least 1 (`rand_bytes`, `rand_packets`).
    fn less_random(&mut self, limit: Option<u64>, range: u64) -> Option<u64> {
        let limit = limit?;
        let mut octets = [0; 8];
        self.rng.fill(&mut octets);
        let less = u64::from_be_bytes(octets).checked_rem(range.saturating_add(1)).unwrap_or(0);
        Some(limit.saturating_sub(less).max(1))
    }

    /// A job that is answered.
    pub(crate) fn take_job(&mut self, id: JobId) -> Option<JobEntry> {
        let entry = self.jobs.remove(&id)?;
        self.shared.jobs.fetch_sub(1, Ordering::Relaxed);
        Some(entry)
    }

    fn push_job(&mut self, entry: JobEntry, job: Job) -> JobId {
        self.last_job += 1;
        let id = JobId(self.last_job);
        self.jobs.insert(id, entry);
        self.shared.jobs.fetch_add(1, Ordering::Relaxed);
        self.outputs.push_back(Output::Job(id, job));
        id
    }

    /// Reserves a random SPI for an IKE SA; never 0 (RFC 7296 §3.1).
    pub(crate) fn reserve_ike_spi(&mut self, owner: IkeSaId) -> u64 {
        loop {
            let mut octets = [0; 8];
            self.rng.fill(&mut octets);
            let spi = self.numbering.spi(u64::from_be_bytes(octets));
            let is_left = self.tombstones.contains(spi) || self.farewells.contains(spi);
            if spi != 0 && !self.shared.spis.contains(spi) && !is_left {
                self.shared.spis.set(spi, owner);
                return spi;
            }
        }
    }

    /// SPIs of IKE SAs that this shard has.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn own_spis(&self) -> usize {
        self.shared.spis.len_of(self.numbering.shard)
    }

    pub(crate) fn release_ike_spi(&mut self, spi: u64) {
        self.shared.spis.release(spi);
    }

    /// Reserves a random inbound SPI; 0 to 255 are not for us (RFC 4303 §2.1).
    pub(crate) fn reserve_child_spi(&mut self, owner: IkeSaId) -> u32 {
        loop {
            let mut octets = [0; 4];
            self.rng.fill(&mut octets);
            let spi = self.numbering.child_spi(u32::from_be_bytes(octets));
            if spi > 255 && !self.child_spis.contains_key(&spi) {
                self.child_spis.insert(spi, owner);
                return spi;
            }
        }
    }

    pub(crate) fn release_child_spi(&mut self, spi: u32) {
        self.child_spis.remove(&spi);
    }

    /// Reports that an installed Child SA is gone, and frees what it held.
    pub(crate) fn child_down(&mut self, ike_sa: IkeSaId, child: ChildSaStatus, reason: CloseReason) {
        self.release_child_spi(child.spi_in);
        self.child_owners.remove(&child.id);
        self.event(Event::ChildDown { ike_sa, child: Box::new(child), reason });
    }

    /// Keeps the last answer of an IKE SA that ends now (RFC 7296 §2.1: the peer may repeat its request).
    pub(crate) fn bury(
        &mut self,
        now: Instant,
        local_spi: u64,
        dscp: u8,
        last_words: Option<([u8; 32], Vec<Vec<u8>>)>,
    ) {
        match last_words {
            Some((request, answer)) => {
                let until = after(now, self.config.half_open_timeout);
                self.tombstones.insert(now, local_spi, Tombstone { request, answer, dscp, until });
            }
            None => self.tombstones.expire(now),
        }
    }

    /// The longest message for this path; `None` where we must not or cannot fragment.
    pub(crate) fn max_length(&self, path: &Path, negotiated: bool, fragmentation: Fragmentation) -> Option<usize> {
        const UDP_HEADER: usize = 8;
        const NON_ESP_MARKER: usize = 4;
        // RFC 9329 §7.5: no fragments over a stream.
        let over_stream = matches!(path.transport, Transport::Stream(_));
        let wanted = match fragmentation {
            Fragmentation::Yes | Fragmentation::Force => true,
            Fragmentation::Accept | Fragmentation::No => false,
        };
        if over_stream || !negotiated || !wanted {
            return None;
        }
        let ip_header = if path.remote.is_ipv4() { 20 } else { 40 };
        Some(self.config.fragment_size.saturating_sub(ip_header + UDP_HEADER + NON_ESP_MARKER).max(200))
    }
}
