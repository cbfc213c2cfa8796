//! Two engines on a simulated network with virtual time: the harness, and the scenarios in the files below.

mod address_identities;
mod auth_lifetime;
mod crash;
mod message_id_sync;

mod attack;
mod attempts;
mod authentication;
mod by_hand;
mod child_rekey;
mod child_sa;
mod childless;
mod collisions;
mod configuration;
mod counters;
mod defence;
mod eap;
mod farewells;
mod faults;
mod followup;
mod fragments;
mod hints;
mod ike_rekey;
mod informational;
mod init;
mod intermediate;
mod marking;
mod minimal;
mod mobility;
mod network;
mod null_authentication;
mod ppk;
mod raw_keys;
mod reauthentication;
mod redirect;
mod refusals;
mod rekey;
mod reservations;
mod resumption;
mod rules;
mod seeds;
mod selectors;
mod shards;
mod signatures;
mod stream;
mod stream_rules;
mod transports;
mod uniqueness;
mod windows;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipsec::plane::{Encapsulation, Mode, SaPair, StreamId};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::Protocol;
use pad::{AuthClass, Credentials, Identity, IdentityPattern, LocalAuth, PadEntry, SignatureConstraints};

use super::*;
use crate::config::{
    AddressRange, Child, Childless, ConfiguredSelector, Connection, DpdAction, Fragmentation, SendCert, SplitDns,
    StartAction, TcpPolicy, Unique,
};
use crate::crypto::parse_proposals;

/// A repeatable source of randomness.
pub(super) struct TestRng(u64);

impl TestRng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }
}

impl Rng for TestRng {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let octets = self.next().to_be_bytes();
            chunk.copy_from_slice(&octets[..chunk.len()]);
        }
    }
}

/// 2026-11-21: certificates of these tests are good for that year.
const UNIX_TIME: u64 = 1_795_219_200;

/// Credentials with this pre-shared key for every pair of identities.
pub(super) fn shared_key(secret: &str) -> Credentials {
    let mut credentials = Credentials::new();
    credentials.add_shared_secret(None, Vec::new(), Secret::new(secret.into())).unwrap();
    credentials
}

/// What a data plane would hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Installed {
    pub(super) spi_out: u32,
    pub(super) keys_in: Vec<u8>,
    pub(super) keys_out: Vec<u8>,
    pub(super) mode: Mode,
    pub(super) encapsulation: Encapsulation,
    pub(super) local_ts: Vec<TrafficSelector>,
    pub(super) remote_ts: Vec<TrafficSelector>,
    pub(super) reqid: u32,
    /// Newer ones send before older ones.
    order: u64,
    /// The predecessor still sends.
    waits: bool,
    /// Receives only.
    retired: bool,
    pub(super) tfc: ipsec::plane::TfcPadding,
}

pub(super) struct Side {
    pub(super) engine: Engine,
    pub(super) credentials: Credentials,
    pub(super) installed: BTreeMap<u32, Installed>,
    /// When ESP last came.
    pub(super) last_packet: Option<Instant>,
    pub(super) events: Vec<Event>,
    pub(super) refuse_installs: Option<InstallError>,
    /// Channel bindings of the Child SAs, in order.
    pub(super) bindings: Vec<Option<[u8; 32]>>,
    /// Keys of both ends, likewise.
    pub(super) endpoint_keys: Vec<Option<[[u8; 32]; 2]>>,
    /// How many certificates came with each proof, and which raw key.
    pub(super) shown: Vec<(usize, Option<Vec<u8>>)>,
    pub(super) sent: Vec<Transmit>,
    /// First octet of the engine's next nonces.
    nonce: by_hand::FirstOctet,
    pub(super) address: IpAddr,
    /// Names that can be looked up.
    pub(super) names: BTreeMap<String, IpAddr>,
    reqids: u32,
    key_rng: TestRng,
    order: u64,
    /// What was installed last.
    lifetime: ipsec::plane::Lifetime,
    /// Open streams: ours to the other side's number.
    pub(super) streams: BTreeMap<StreamId, StreamId>,
    stream_paths: BTreeMap<StreamId, (SocketAddr, SocketAddr)>,
    /// Delivery of a stream's octets is in order.
    stream_clock: BTreeMap<StreamId, Instant>,
    /// What the engine said of messages from streams.
    pub(super) judgements: Vec<(StreamId, Judgement)>,
}

#[allow(clippy::large_enum_variant, reason = "few of them wait at a time")]
enum Delivery {
    Message { to: usize, path: Path, bytes: Vec<u8> },
    Job { side: usize, id: JobId, job: Job },
    Opened { side: usize, stream: StreamId, local: SocketAddr },
    Closed { side: usize, stream: StreamId },
}

pub(super) struct Pair {
    pub(super) now: Instant,
    pub(super) rng: TestRng,
    pub(super) sides: [Side; 2],
    deliveries: BTreeMap<(Instant, u64), Delivery>,
    counter: u64,
    pub(super) loss: u64,
    pub(super) duplication: u64,
    pub(super) delay: (Duration, Duration),
    pub(super) job_delay: Duration,
    /// The same for key exchanges.
    pub(super) key_delay: Duration,
    /// Side 0 is behind this address; ports move up by so much.
    pub(super) nat: Option<(IpAddr, u16)>,
    pub(super) udp_blocked: bool,
    pub(super) tcp_blocked: bool,
    /// Everything is lost.
    pub(super) cut: bool,
    /// Sides that answer each CREATE_CHILD_SA with NO_ADDITIONAL_SAS, as a minimal implementation may (RFC 7296 §4).
    pub(super) minimal: [bool; 2],
    /// Packets go both ways all the time, and none may be lost.
    traffic: bool,
    /// Datagrams wait here for the test to deliver them.
    held: Option<Vec<by_hand::Held>>,
    /// Addresses of each side beside [`address`]; without that where it is in `gone`.
    pub(super) more: [Vec<IpAddr>; 2],
    /// Addresses that no side has any more.
    pub(super) gone: Vec<IpAddr>,
    /// Pairs of addresses between which nothing arrives, in neither direction.
    pub(super) broken: Vec<(IpAddr, IpAddr)>,
    ports: u16,
    server_streams: u64,
}

pub(super) const A: usize = 0;
pub(super) const B: usize = 1;

pub(super) fn address(side: usize) -> IpAddr {
    IpAddr::V4(if side == A { Ipv4Addr::new(10, 0, 0, 1) } else { Ipv4Addr::new(10, 0, 0, 2) })
}

pub(super) fn id(name: &str) -> Identity {
    Identity::Fqdn(name.to_owned())
}

pub(super) fn network(text: &str) -> ConfiguredSelector {
    let (ip, prefix) = text.split_once('/').unwrap();
    ConfiguredSelector::Fixed(TrafficSelector::network(ip.parse().unwrap(), prefix.parse().unwrap()).unwrap())
}

/// The Child SA `net` as one side has it.
pub(super) fn child(name: &str, local: &str, remote: &str) -> Child {
    Child {
        name: name.to_owned(),
        local_ts: vec![network(local)],
        remote_ts: vec![network(remote)],
        esp_proposals: parse_proposals("aes128gcm16", Protocol::ESP).unwrap(),
        mode: Mode::Tunnel,
        rekey_time: Duration::ZERO,
        life_time: Duration::ZERO,
        rand_time: Duration::ZERO,
        lifetime: ipsec::plane::Lifetime::default(),
        rand_bytes: 0,
        rand_packets: 0,
        replay_window: 64,
        start_action: StartAction::None,
        close_action: StartAction::None,
        dpd_action: DpdAction::Clear,
        reqid: 0,
        copy_df: true,
        copy_ecn: true,
        tfc_padding: ipsec::plane::TfcPadding::None,
        inactivity: Duration::ZERO,
        options: Default::default(),
        numbering: Default::default(),
        updown: None,
    }
}

/// The connection `site` as one side has it.
pub(super) fn connection(side: usize) -> Connection {
    let (local, remote) = if side == A { ("a", "b") } else { ("b", "a") };
    let (local_net, remote_net) =
        if side == A { ("10.1.0.0/24", "10.2.0.0/24") } else { ("10.2.0.0/24", "10.1.0.0/24") };
    Connection {
        name: "site".to_owned(),
        local_addrs: Vec::new(),
        remote_addrs: Vec::new(),
        local_port: 500,
        remote_port: 500,
        proposals: parse_proposals("aes128gcm16-prfsha256-x25519", Protocol::IKE).unwrap(),
        local_id: Some(id(local)),
        local_auth: LocalAuth {
            class: AuthClass::SharedKey,
            certificates: Vec::new(),
            public_keys: Vec::new(),
            constraints: SignatureConstraints::default(),
            eap_id: None,
        },
        remote: PadEntry {
            name: "site".to_owned(),
            remote_id: IdentityPattern::exact(id(remote)),
            class: AuthClass::SharedKey,
            cacerts: Vec::new(),
            certs: Vec::new(),
            public_keys: Vec::new(),
            constraints: SignatureConstraints::default(),
            revocation: Default::default(),
            eap_id: None,
        },
        children: vec![Arc::new(child("net", local_net, remote_net))],
        fragmentation: Fragmentation::Yes,
        force_encapsulation: false,
        mobike: false,
        send_cert: SendCert::IfAsked,
        send_certreq: true,
        dpd_delay: Duration::ZERO,
        rekey_time: Duration::ZERO,
        reauth_time: Duration::ZERO,
        over_time: Duration::ZERO,
        rand_time: Duration::ZERO,
        keyingtries: 1,
        dscp: 0,
        unique: Unique::No,
        ppk_id: None,
        ppk_required: false,
        ppk_rekey: false,
        childless: Childless::Allow,
        redirect_to: None,
        session_resumption: false,
        tcp: TcpPolicy::No,
        tcp_delay: Duration::from_secs(6),
        tcp_remote_port: 4500,
        tls: None,
        tcp_proxy: None,
        tcp_probe_udp: Duration::from_secs(60),
        tcp_reauth_udp: false,
        vips: Vec::new(),
        pools: Vec::new(),
        split_dns: SplitDns::default(),
    }
}

impl Pair {
    pub(super) fn new(seed: u64) -> Self {
        Self::with(seed, EngineConfig::default(), connection(A), connection(B))
    }

    pub(super) fn with(seed: u64, config: EngineConfig, a: Connection, b: Connection) -> Self {
        let now = Instant::now();
        let mut rng = TestRng(seed);
        let mut side = |connection: Connection| {
            let nonce = by_hand::FirstOctet::default();
            let source = by_hand::NonceRng::new(TestRng(rng.next()), &nonce);
            let mut engine = Engine::new(config.clone(), Box::new(source), now);
            engine.set_connections(vec![Arc::new(connection)]);
            Side {
                engine,
                credentials: shared_key("correct horse"),
                installed: BTreeMap::new(),
                last_packet: None,
                events: Vec::new(),
                refuse_installs: None,
                bindings: Vec::new(),
                endpoint_keys: Vec::new(),
                shown: Vec::new(),
                sent: Vec::new(),
                nonce,
                address: address(A),
                names: BTreeMap::new(),
                reqids: 0,
                key_rng: TestRng(!seed),
                order: 0,
                lifetime: ipsec::plane::Lifetime::default(),
                streams: BTreeMap::new(),
                stream_paths: BTreeMap::new(),
                stream_clock: BTreeMap::new(),
                judgements: Vec::new(),
            }
        };
        let mut sides = [side(a), side(b)];
        sides[B].address = address(B);
        Self {
            now,
            rng,
            sides,
            deliveries: BTreeMap::new(),
            counter: 0,
            loss: 0,
            duplication: 0,
            delay: (Duration::from_millis(10), Duration::from_millis(1)),
            job_delay: Duration::from_millis(20),
            key_delay: Duration::ZERO,
            nat: None,
            udp_blocked: false,
            tcp_blocked: false,
            cut: false,
            minimal: [false; 2],
            traffic: false,
            held: None,
            more: [Vec::new(), Vec::new()],
            gone: Vec::new(),
            broken: Vec::new(),
            ports: 40_000,
            server_streams: 1 << 63,
        }
    }

    /// Brings up `site` with `net` from this side.
    pub(super) fn initiate(&mut self, side: usize, token: u64) {
        let connection = Arc::clone(&self.sides[side].engine.ctx.connections[0]);
        let child = connection.children.first().cloned();
        self.initiate_child(side, connection, child, token);
    }

    pub(super) fn initiate_child(
        &mut self,
        side: usize,
        connection: Arc<Connection>,
        child: Option<Arc<Child>>,
        token: u64,
    ) {
        let remote = self.seen_address(1 - side);
        let request = Initiate { connection, child, local: address(side), remote, token };
        let now = self.now;
        self.sides[side].engine.initiate(now, request);
        self.drain(side);
    }

    fn seen_address(&self, side: usize) -> IpAddr {
        match self.nat {
            Some((outside, _)) if side == A => outside,
            _ => address(side),
        }
    }

    /// Runs for a while of virtual time.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        self.drain(A);
        self.drain(B);
        for _ in 0..200_000 {
            let delivery = self.deliveries.keys().next().map(|(at, _)| *at);
            let timer = |side: usize| self.sides[side].engine.next_timeout();
            let next = [delivery, timer(A), timer(B)].into_iter().flatten().min();
            let Some(next) = next.filter(|at| *at <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            self.step();
        }
        panic!("the simulation does not come to rest");
    }

    /// A packet goes out from either side and arrives under an SA that the other side has.
    pub(super) fn assert_traffic_flows(&mut self) {
        for side in [A, B] {
            let spi = self.sides[side].sending().expect("an SA that sends");
            let other = self.sides[1 - side].installed.get_mut(&spi);
            other.expect("the other side does not know the SA that this one sends under").waits = false;
        }
    }

    fn step(&mut self) {
        while let Some(entry) = self.deliveries.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let delivery = entry.remove();
            self.deliver(delivery);
        }
        if self.traffic {
            self.assert_traffic_flows();
        }
        for side in [A, B] {
            if self.sides[side].engine.next_timeout().is_some_and(|at| at <= self.now) {
                let now = self.now;
                self.sides[side].engine.handle_timeout(now);
                let next = self.sides[side].engine.next_timeout();
                self.drain(side);
                assert!(next.is_none_or(|at| at > now), "a timer that is due stays due");
            }
        }
    }

    fn deliver(&mut self, delivery: Delivery) {
        let now = self.now;
        match delivery {
            Delivery::Message { to, path, bytes } if self.minimal[to] && minimal::is_refused(&bytes) => {
                for bytes in minimal::refuse(&mut self.sides[to], &bytes) {
                    self.transmit(to, Transmit { path, dscp: 0, bytes });
                }
            }
            Delivery::Message { to, path, bytes } => {
                self.sides[to].engine.handle_message(now, path, &bytes);
                self.drain(to);
            }
            Delivery::Job { side, id, job } => {
                let outcome = self.sides[side].execute(job);
                self.sides[side].engine.handle_job(now, id, outcome);
                self.drain(side);
            }
            Delivery::Opened { side, stream, local } => {
                self.sides[side].engine.handle_stream_opened(now, stream, local);
                self.drain(side);
            }
            Delivery::Closed { side, stream } => {
                self.sides[side].streams.remove(&stream);
                self.sides[side].engine.handle_stream_closed(now, stream, "closed");
                self.drain(side);
            }
        }
    }

    pub(super) fn drain(&mut self, side: usize) {
        while let Some(output) = self.sides[side].engine.poll_output() {
            match output {
                Output::Transmit(transmit) => self.transmit(side, transmit),
                // Key exchanges take no time unless a test wants that.
                Output::Job(id, job @ Job::KeyExchange(_)) if self.key_delay.is_zero() => {
                    let (now, outcome) = (self.now, self.sides[side].execute(job));
                    self.sides[side].engine.handle_job(now, id, outcome);
                }
                Output::Job(id, job @ Job::KeyExchange(_)) => {
                    let wait = self.up_to(self.key_delay);
                    self.schedule(wait, Delivery::Job { side, id, job });
                }
                Output::Job(id, Job::FindRoutes(query)) => {
                    let now = self.now;
                    let routes = JobOutcome::FindRoutes(self.routes(side, &query));
                    self.sides[side].engine.handle_job(now, id, routes);
                }
                Output::Job(id, Job::SeenTraffic(spis)) => {
                    let now = self.now;
                    assert!(spis.iter().all(|spi| self.sides[side].installed.contains_key(spi)));
                    let idle = self.sides[side].last_packet.map(|at| now.saturating_duration_since(at));
                    self.sides[side].engine.handle_job(now, id, JobOutcome::SeenTraffic(idle));
                }
                Output::Job(id, job) => {
                    let wait = self.up_to(self.job_delay);
                    self.schedule(wait, Delivery::Job { side, id, job });
                }
                Output::Event(event) => self.sides[side].note(event),
                Output::OpenStream { stream, local, remote, .. } => self.open(side, stream, local, remote),
                Output::CloseStream(stream) => self.close_stream(side, stream),
                Output::Judgement(stream, judgement) => self.sides[side].judgements.push((stream, judgement)),
                Output::Note(_) | Output::Initiate(_) => panic!("an engine alone has nobody to tell"),
            }
        }
    }

    /// The addresses that a side has now.
    pub(super) fn addresses(&self, side: usize) -> Vec<IpAddr> {
        let all = std::iter::once(address(side)).chain(self.more[side].iter().copied());
        all.filter(|address| !self.gone.contains(address)).collect()
    }

    /// The system of a side tells its engine that something has changed.
    pub(super) fn roam(&mut self, side: usize) {
        let addresses = self.addresses(side);
        let now = self.now;
        let changed = self.sides[side].engine.set_local_addresses(addresses);
        self.sides[side].engine.handle_roam(now, changed);
        self.drain(side);
    }

    /// All pairs of this side's addresses with those asked for.
    fn routes(&self, side: usize, query: &RouteQuery) -> Vec<Route> {
        let locals = self.addresses(side);
        let of = |remote: IpAddr| {
            let locals = locals.iter().copied().filter(move |local| local.is_ipv4() == remote.is_ipv4());
            locals.map(move |local| Route { local, remote, direct: true }).collect::<Vec<_>>()
        };
        query.remotes.iter().copied().flat_map(of).collect()
    }

    fn up_to(&mut self, time: Duration) -> Duration {
        let nanos = u64::try_from(time.as_nanos()).unwrap();
        Duration::from_nanos(self.rng.below(nanos + 1))
    }

    fn schedule(&mut self, wait: Duration, delivery: Delivery) {
        self.counter += 1;
        self.deliveries.insert((self.now + wait, self.counter), delivery);
    }

    fn open(&mut self, side: usize, stream: StreamId, local: SocketAddr, remote: SocketAddr) {
        if self.tcp_blocked || self.cut {
            self.schedule(Duration::from_secs(1), Delivery::Closed { side, stream });
            return;
        }
        self.ports += 1;
        self.server_streams += 1;
        let local = SocketAddr::new(local.ip(), self.ports);
        let server = StreamId(self.server_streams);
        self.sides[side].streams.insert(stream, server);
        self.sides[1 - side].streams.insert(server, stream);
        self.sides[side].stream_paths.insert(stream, (local, remote));
        self.sides[1 - side].stream_paths.insert(server, (remote, local));
        self.schedule(Duration::from_millis(30), Delivery::Opened { side, stream, local });
    }

    /// Closes a stream from this side; the other side hears of it.
    pub(super) fn close_stream(&mut self, side: usize, stream: StreamId) {
        if let Some(other) = self.sides[side].streams.remove(&stream) {
            let at = self.sides[1 - side].stream_clock.get(&other).copied().unwrap_or(self.now).max(self.now);
            self.counter += 1;
            self.deliveries.insert((at, self.counter), Delivery::Closed { side: 1 - side, stream: other });
        }
    }

    /// The network breaks a stream: both sides hear of it.
    pub(super) fn break_streams(&mut self) {
        let streams: Vec<(StreamId, StreamId)> = self.sides[A].streams.iter().map(|(a, b)| (*a, *b)).collect();
        for (a, b) in streams {
            self.schedule(Duration::from_millis(5), Delivery::Closed { side: A, stream: a });
            self.schedule(Duration::from_millis(5), Delivery::Closed { side: B, stream: b });
        }
    }

    fn transmit(&mut self, from: usize, transmit: Transmit) {
        self.sides[from].sent.push(transmit.clone());
        if self.cut {
            return;
        }
        let Transmit { path, bytes, .. } = transmit;
        if let Transport::Stream(stream) = path.transport {
            let Some(other) = self.sides[from].streams.get(&stream).copied() else { return };
            let wait = self.up_to(self.delay.0);
            let (local, remote) = self.sides[1 - from].stream_paths[&other];
            let clock = self.sides[1 - from].stream_clock.entry(other).or_insert(self.now);
            *clock = (*clock).max(self.now + wait);
            let at = *clock;
            let path = Path { local, remote, transport: Transport::Stream(other) };
            self.counter += 1;
            self.deliveries.insert((at, self.counter), Delivery::Message { to: 1 - from, path, bytes });
            return;
        }
        if self.udp_blocked || bytes == [0xff] {
            return;
        }
        let Some((to, path)) = self.route(from, path) else { return };
        if let Some(held) = &mut self.held {
            held.push(by_hand::Held { to, path, bytes });
            return;
        }
        let copies = if self.rng.percent(self.duplication) { 2 } else { 1 };
        for _ in 0..copies {
            if !self.rng.percent(self.loss) {
                let wait = self.delay.1 + self.up_to(self.delay.0);
                self.schedule(wait, Delivery::Message { to, path, bytes: bytes.clone() });
            }
        }
    }

    /// Where a datagram goes, and the path as its receiver sees it.
    fn route(&self, from: usize, path: Path) -> Option<(usize, Path)> {
        let mut source = path.local;
        let mut target = path.remote;
        if let Some((outside, shift)) = self.nat {
            if from == A {
                source = SocketAddr::new(outside, source.port() + shift);
            } else if target.ip() == outside {
                // Unknown mappings are dropped, as NATs do, but for the well-known ports.
                target = SocketAddr::new(address(A), target.port().checked_sub(shift)?);
            }
        }
        let ends = (path.local.ip(), target.ip());
        let broken = |(one, other): &(IpAddr, IpAddr)| (*one, *other) == ends || (*other, *one) == ends;
        if !self.addresses(from).contains(&path.local.ip()) || self.broken.iter().any(broken) {
            return None;
        }
        let to = [A, B].into_iter().find(|side| self.addresses(*side).contains(&target.ip()))?;
        (to != from).then_some((to, Path { local: target, remote: source, transport: path.transport }))
    }

    /// Asserts that both sides have the same, and that it works: SPIs and keys fit.
    pub(super) fn assert_same(&self, ikes: usize, children: usize) {
        let up = |side: &Side| {
            let mut spis: Vec<(u64, u64)> = side.up().iter().map(|sa| (sa.initiator_spi, sa.responder_spi)).collect();
            spis.sort_unstable();
            spis
        };
        assert_eq!(up(&self.sides[A]), up(&self.sides[B]), "IKE SAs differ");
        assert_eq!(up(&self.sides[A]).len(), ikes, "number of IKE SAs");
        for side in [A, B] {
            let here = &self.sides[side];
            assert_eq!(here.engine.sas.len(), ikes, "IKE SAs that linger on side {side}");
            assert_eq!(here.installed.len(), children, "installed pairs on side {side}: {:#?}", here.events);
            let known: usize = here.up().iter().map(|sa| sa.children.len()).sum();
            assert_eq!(known, children, "known Child SAs on side {side}");
            assert_eq!(here.engine.ctx.child_spis.len(), children, "leaked SPIs on side {side}");
            assert_eq!(here.engine.ctx.child_owners.len(), children, "leaked owners on side {side}");
            assert_eq!(here.engine.ctx.own_spis(), ikes, "leaked IKE SPIs on side {side}");
            assert!(here.engine.ctx.jobs.is_empty(), "jobs that linger");
            assert!(ikes > 0 || here.engine.places.is_empty(), "places that linger");
            assert!(ikes > 0 || here.engine.upkeep.is_empty(), "addresses or fragments that linger");
            for (spi_in, pair) in &here.installed {
                let other = self.sides[1 - side].installed.get(&pair.spi_out).expect("the peer has the other half");
                assert_eq!(other.spi_out, *spi_in);
                assert_eq!(other.keys_in, pair.keys_out);
                assert_eq!(other.keys_out, pair.keys_in);
                assert_eq!(other.local_ts, pair.remote_ts);
                assert_eq!(other.remote_ts, pair.local_ts);
                assert_eq!(other.mode, pair.mode);
            }
        }
    }

    /// All that is known on a side, without what time alone changes.
    pub(super) fn snapshot(&self, side: usize) -> String {
        let side = &self.sides[side];
        format!("{:#?} {:#?} {:?}", side.engine.ike_sas(self.now), side.installed, side.engine.next_timeout())
    }
}

impl Side {
    fn execute(&mut self, job: Job) -> JobOutcome {
        match job {
            Job::Sign(request) => JobOutcome::Sign(self.credentials.sign(&request)),
            Job::Authenticate(request) => {
                self.shown.push((request.certificates.len(), request.raw_key.clone()));
                JobOutcome::Authenticate(self.credentials.authenticate(&request, UNIX_TIME))
            }
            Job::EapServer(server, packet) => JobOutcome::EapServer(self.credentials.eap_server(*server, &packet)),
            Job::EapPeer(peer, packet) => JobOutcome::EapPeer(self.credentials.eap_peer(*peer, &packet)),
            Job::KeyExchange(work) => JobOutcome::KeyExchange(work.run(&mut self.key_rng)),
            Job::FindRoutes(_) | Job::SeenTraffic(_) => unreachable!("answered at once"),
            Job::Resolve(gateway) => JobOutcome::Resolve(match gateway {
                Gateway::Address(address) => Ok((self.address, address)),
                Gateway::Name(name) => match self.names.get(&name) {
                    Some(address) => Ok((self.address, *address)),
                    None => Err(format!("{name} is unknown")),
                },
            }),
            Job::SolvePuzzle(puzzle) => JobOutcome::SolvePuzzle(puzzle.solve()),
            Job::InstallChild(ready) => JobOutcome::InstallChild(match &self.refuse_installs {
                Some(error) => Err(error.clone()),
                None => {
                    self.bindings.push(ready.channel_binding);
                    self.endpoint_keys.push(ready.endpoint_keys);
                    let tags = ready.pair.options.tags();
                    Ok(crate::engine::Installed { reqid: self.install(ready.pair), tags })
                }
            }),
        }
    }

    fn install(&mut self, pair: SaPair) -> u32 {
        self.order += 1;
        self.lifetime = pair.lifetime;
        let reqid = if pair.reqid == 0 {
            self.reqids += 1;
            self.reqids
        } else {
            pair.reqid
        };
        let keys = |keys: &ipsec::plane::EspKeys| [keys.encr.expose(), keys.integ.expose()].concat();
        let installed = Installed {
            spi_out: pair.spi_out,
            keys_in: keys(&pair.keys_in),
            keys_out: keys(&pair.keys_out),
            mode: pair.mode,
            encapsulation: pair.encapsulation,
            local_ts: pair.local_ts,
            remote_ts: pair.remote_ts,
            reqid,
            order: self.order,
            waits: pair.await_peer,
            retired: false,
            tfc: pair.tfc,
        };
        assert!(self.installed.insert(pair.spi_in, installed).is_none(), "an SPI is installed twice");
        reqid
    }

    /// Who waited for a predecessor sends now, unless another one does.
    fn succeed(&mut self, gone: u32, reqid: u32) {
        let mut others: Vec<&mut Installed> =
            self.installed.iter_mut().filter(|(spi, _)| **spi != gone).map(|(_, pair)| pair).collect();
        others.retain(|pair| pair.reqid == reqid);
        if !others.iter().any(|pair| !pair.waits && !pair.retired) {
            others.into_iter().for_each(|pair| pair.waits = false);
        }
    }

    /// SPI of the pair that a packet goes out under, as in the data plane.
    fn sending(&self) -> Option<u32> {
        let able = self.installed.values().filter(|pair| !pair.waits && !pair.retired);
        able.max_by_key(|pair| pair.order).map(|pair| pair.spi_out)
    }

    fn note(&mut self, event: Event) {
        match &event {
            Event::ChildDown { child, .. } => {
                assert!(self.installed.remove(&child.spi_in).is_some(), "ChildDown of what was not installed");
                self.succeed(child.spi_in, child.reqid);
            }
            Event::ChildRetired { spi_in } => {
                let pair = self.installed.get_mut(spi_in).expect("ChildRetired of what is installed");
                pair.retired = true;
                let (spi_in, reqid) = (*spi_in, pair.reqid);
                self.succeed(spi_in, reqid);
            }
            Event::Migrate { spi_in, to } => {
                self.installed.get_mut(spi_in).expect("Migrate of what is installed").encapsulation = *to;
            }
            Event::ChildUp(_, id) | Event::ChildRekeyed { new: id, .. } => {
                let known = self.engine.ctx.child_owners.contains_key(id);
                assert!(known || !self.engine.ctx.outputs.is_empty(), "a Child SA that is up has an owner");
            }
            _ => {}
        }
        self.events.push(event);
    }

    /// Established IKE SAs.
    pub(super) fn up(&self) -> Vec<IkeSaStatus> {
        let all = self.engine.ike_sas(Instant::now());
        all.into_iter().filter(|sa| sa.state == IkeState::Established).collect()
    }

    pub(super) fn only(&self) -> IkeSaStatus {
        let mut all = self.engine.ike_sas(Instant::now());
        assert_eq!(all.len(), 1, "one IKE SA is expected: {all:#?}");
        all.remove(0)
    }

    pub(super) fn done(&self, token: u64) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Done { token: done } if *done == token))
    }

    pub(super) fn failed(&self, token: u64) -> Option<String> {
        self.events.iter().find_map(|event| match event {
            Event::Failed { token: Some(failed), reason, .. } if *failed == token => Some(reason.clone()),
            _ => None,
        })
    }

    pub(super) fn logged(&self, text: &str) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Log { message, .. } if message.contains(text)))
    }

    pub(super) fn down(&self, reason: CloseReason) -> bool {
        self.events.iter().any(|event| matches!(event, Event::IkeDown(_, why) if *why == reason))
    }
}

pub(super) fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// An established pair.
pub(super) fn up(seed: u64) -> Pair {
    established(Pair::new(seed))
}

pub(super) fn established(mut pair: Pair) -> Pair {
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(1), "not established: {:#?} {:#?}", pair.sides[A].events, pair.sides[B].events);
    pair.assert_same(1, 1);
    // RFC 5056 §2.1: however the peers prove who they are, with whatever keys.
    assert!(pair.sides.iter().all(|side| side.bindings.first().is_none_or(Option::is_some)));
    assert_eq!(pair.sides[A].bindings, pair.sides[B].bindings);
    pair
}
