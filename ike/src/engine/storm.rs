//! The state machine under any sequence of messages, timers, commands and answers to jobs: two engines, and octets that
//! say what happens next. What is under way is lost, repeated, changed or late; either side gets authentic nonsense,
//! sealed under its own peer's keys. Built for tests and fuzzers only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a test")]

use std::collections::{BTreeSet, VecDeque};
use std::net::Ipv4Addr;

use ipsec::plane::Lifetime;
use ipsec::secret::Secret;
use ipsec::transform::Protocol;
use pad::{AuthClass, Credentials, IdentityPattern, LocalAuth, PadEntry, SignatureConstraints};

use super::*;
use crate::config::{
    Childless, ConfiguredSelector, DpdAction, Fragmentation, SendCert, StartAction, TcpPolicy, Unique,
};
use crate::crypto::parse_proposals;
use crate::wire::Payload;

/// Steps of one run; what follows is ignored.
const MAX_STEPS: usize = 80;
/// Messages under way.
const MAX_MESSAGES: usize = 64;

struct Octets<'a>(&'a [u8]);

impl Octets<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn or_zero(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    /// A length and so many octets, as far as there are some.
    fn some(&mut self) -> Vec<u8> {
        let length = usize::from(self.or_zero()).min(self.0.len());
        let (some, rest) = self.0.split_at(length);
        self.0 = rest;
        some.to_vec()
    }
}

struct Counter(u64);

impl Rng for Counter {
    fn fill(&mut self, buffer: &mut [u8]) {
        for octet in buffer {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *octet = (self.0 >> 56) as u8;
        }
    }
}

struct Side {
    engine: Engine,
    jobs: VecDeque<(JobId, Job)>,
    /// IKE SAs whose peer has proved who it is, and their successors.
    proved: BTreeSet<IkeSaId>,
    /// Who has proved it.
    peers: Vec<PeerIdentity>,
    installed: BTreeSet<u32>,
    rng: Counter,
    reqids: u32,
}

struct Storm {
    now: Instant,
    sides: [Side; 2],
    under_way: VecDeque<(usize, Path, Vec<u8>)>,
    /// What was sent lately.
    history: VecDeque<(usize, Path, Vec<u8>)>,
    credentials: Credentials,
    tokens: u64,
}

/// Plays what the octets say, then lets both sides come to rest, and ends all that is there.
///
/// # Panics
/// When an IKE SA is up or a Child SA installed whose peer proved nothing, when tables disagree, or when something is
/// left behind.
pub(crate) fn play(octets: &[u8]) {
    let mut octets = Octets(octets);
    let mut storm = Storm::new(octets.or_zero());
    for _ in 0..MAX_STEPS {
        let Some(what) = octets.next() else { break };
        storm.step(what, &mut octets);
        storm.check();
    }
    storm.come_to_rest();
    storm.end_all();
}

fn address(side: usize) -> IpAddr {
    IpAddr::V4(if side == 0 { Ipv4Addr::new(10, 0, 0, 1) } else { Ipv4Addr::new(10, 0, 0, 2) })
}

fn connection(side: usize, options: u8) -> Connection {
    let name = |side: usize| Identity::Fqdn(if side == 0 { "a" } else { "b" }.to_owned());
    let network = |side: usize| {
        let ip = IpAddr::V4(Ipv4Addr::new(10, 1, u8::try_from(side).unwrap(), 0));
        vec![ConfiguredSelector::Fixed(TrafficSelector::network(ip, 24).unwrap())]
    };
    let lifetime = Duration::from_secs(if options & 1 == 0 { 0 } else { 300 });
    let proposals =
        if options & 2 == 0 { "aes128gcm16-prfsha256-x25519" } else { "aes128gcm16-prfsha256-x25519-ke1_mlkem512" };
    let esp = if options & 4 == 0 { "aes128gcm16" } else { "aes128gcm16-x25519" };
    let child = Child {
        name: "net".to_owned(),
        local_ts: network(side),
        remote_ts: network(1 - side),
        esp_proposals: parse_proposals(esp, Protocol::ESP).unwrap(),
        mode: Mode::Tunnel,
        rekey_time: lifetime / 2,
        life_time: lifetime,
        rand_time: Duration::ZERO,
        lifetime: Lifetime::default(),
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
    };
    Connection {
        name: "site".to_owned(),
        local_addrs: Vec::new(),
        remote_addrs: Vec::new(),
        local_port: 500,
        remote_port: 500,
        proposals: parse_proposals(proposals, Protocol::IKE).unwrap(),
        local_id: Some(name(side)),
        local_auth: LocalAuth {
            class: AuthClass::SharedKey,
            certificates: Vec::new(),
            public_keys: Vec::new(),
            constraints: SignatureConstraints::default(),
            eap_id: None,
        },
        remote: PadEntry {
            name: "site".to_owned(),
            remote_id: IdentityPattern::exact(name(1 - side)),
            class: AuthClass::SharedKey,
            cacerts: Vec::new(),
            certs: Vec::new(),
            public_keys: Vec::new(),
            constraints: SignatureConstraints::default(),
            revocation: Default::default(),
            eap_id: None,
        },
        children: vec![Arc::new(child)],
        fragmentation: Fragmentation::Yes,
        force_encapsulation: options & 8 != 0,
        mobike: options & 16 != 0,
        send_cert: SendCert::IfAsked,
        send_certreq: true,
        dpd_delay: Duration::from_secs(if options & 32 == 0 { 0 } else { 30 }),
        rekey_time: lifetime,
        reauth_time: Duration::ZERO,
        over_time: lifetime / 10,
        rand_time: Duration::ZERO,
        keyingtries: 1,
        dscp: 0,
        unique: if options & 64 == 0 { Unique::No } else { Unique::Replace },
        ppk_id: None,
        ppk_required: false,
        ppk_rekey: false,
        childless: Childless::Allow,
        redirect_to: None,
        session_resumption: options & 2 == 0,
        tcp: TcpPolicy::No,
        tcp_delay: Duration::from_secs(6),
        tls: None,
        tcp_proxy: None,
        tcp_probe_udp: Duration::from_secs(60),
        tcp_reauth_udp: false,
        tcp_remote_port: 4500,
        vips: Vec::new(),
        pools: Vec::new(),
        split_dns: crate::config::SplitDns::default(),
    }
}

impl Storm {
    fn new(options: u8) -> Self {
        let now = Instant::now();
        let mut credentials = Credentials::new();
        credentials.add_shared_secret(None, Vec::new(), Secret::new(b"correct horse".to_vec())).unwrap();
        let fragment_size = if options & 128 == 0 { 1280 } else { 200 };
        let config = EngineConfig { fragment_size, ..EngineConfig::default() };
        let sides = [0, 1].map(|side| {
            let mut engine = Engine::new(config.clone(), Box::new(Counter(side)), now);
            engine.set_connections(vec![Arc::new(connection(usize::try_from(side).unwrap(), options))]);
            Side {
                engine,
                jobs: VecDeque::new(),
                proved: BTreeSet::new(),
                peers: Vec::new(),
                installed: BTreeSet::new(),
                rng: Counter(side + 7),
                reqids: 0,
            }
        });
        let (under_way, history) = (VecDeque::new(), VecDeque::new());
        Self { now, sides, under_way, history, credentials, tokens: 0 }
    }

    fn step(&mut self, what: u8, octets: &mut Octets<'_>) {
        let side = usize::from(what & 1);
        match what >> 1 & 0x0f {
            0 => self.initiate(side),
            1 => self.deliver(),
            2 => drop(self.under_way.pop_front()),
            3 => {
                let at = usize::from(octets.or_zero());
                if let Some((to, path, bytes)) = self.history.get(at % self.history.len().max(1)).cloned() {
                    self.hand(to, path, &bytes);
                }
            }
            4 => {
                if let Some((to, path, mut bytes)) = self.under_way.pop_front() {
                    let at = usize::from(octets.or_zero()) * 256 + usize::from(octets.or_zero());
                    let length = bytes.len();
                    if let Some(octet) = bytes.get_mut(at % length.max(1)) {
                        *octet ^= octets.or_zero();
                    }
                    self.hand(to, path, &bytes);
                }
            }
            5 => self.wait(Duration::from_secs(octets.or_zero().into())),
            6 => self.work(side, true),
            7 => self.work(side, false),
            8 => self.rekey(side, octets.or_zero()),
            9 => self.terminate(side, octets.or_zero(), what & 0x80 != 0),
            10 | 11 => self.forge(side, octets),
            12 => {
                let bytes = octets.some();
                let path = self.path(side, octets.or_zero());
                self.hand(side, path, &bytes);
            }
            13 => {
                // The last becomes the first.
                if let Some(last) = self.under_way.pop_back() {
                    self.under_way.push_front(last);
                }
            }
            14 => {
                let spi = self.sides[side].installed.iter().next().copied().unwrap_or(7);
                let now = self.now;
                match octets.or_zero() % 4 {
                    0 => self.sides[side].engine.handle_expire(now, spi, false),
                    1 => self.sides[side].engine.handle_expire(now, spi, true),
                    2 => self.sides[side].engine.handle_unknown_spi(now, SocketAddr::new(address(1 - side), 0), 77),
                    _ => {
                        let remote = SocketAddr::new(address(1 - side), 4500 + u16::from(octets.or_zero()));
                        self.sides[side].engine.handle_mapping_changed(now, spi, remote);
                    }
                }
                self.drain(side);
            }
            _ => self.settle(8),
        }
    }

    fn path(&self, to: usize, port: u8) -> Path {
        let transport = if port & 1 == 0 { Transport::Udp } else { Transport::UdpEncap };
        let local = if port & 1 == 0 { 500 } else { 4500 };
        let remote = SocketAddr::new(address(1 - to), local + u16::from(port >> 1));
        Path { local: SocketAddr::new(address(to), local), remote, transport }
    }

    fn initiate(&mut self, side: usize) {
        let connection = Arc::clone(&self.sides[side].engine.ctx.connections[0]);
        let child = connection.children.first().cloned();
        self.tokens += 1;
        let (local, remote, token) = (address(side), address(1 - side), self.tokens);
        let now = self.now;
        self.sides[side].engine.initiate(now, Initiate { connection, child, local, remote, token });
        self.drain(side);
    }

    fn deliver(&mut self) {
        if let Some((to, path, bytes)) = self.under_way.pop_front() {
            self.hand(to, path, &bytes);
        }
    }

    fn hand(&mut self, to: usize, path: Path, bytes: &[u8]) {
        let now = self.now;
        self.sides[to].engine.handle_message(now, path, bytes);
        self.drain(to);
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let next = self.sides.iter().filter_map(|side| side.engine.next_timeout()).min();
            let Some(next) = next.filter(|at| *at <= end) else { break };
            self.now = self.now.max(next);
            for side in [0, 1] {
                let now = self.now;
                self.sides[side].engine.handle_timeout(now);
                assert!(
                    self.sides[side].engine.next_timeout().is_none_or(|at| at > now),
                    "a timer that is due stays due"
                );
                self.drain(side);
            }
        }
        self.now = end;
    }

    /// Does the oldest job, or says that it failed.
    fn work(&mut self, side: usize, well: bool) {
        let Some((id, job)) = self.sides[side].jobs.pop_front() else { return };
        let here = &mut self.sides[side];
        let owner = here.engine.ctx.jobs.get(&id).map(|entry| entry.ike_sa);
        let outcome = match job {
            Job::Sign(request) if well => JobOutcome::Sign(self.credentials.sign(&request)),
            Job::Sign(_) => JobOutcome::Sign(Err(SignError::NoKey(String::new()))),
            Job::Authenticate(request) if well => {
                let result = self.credentials.authenticate(&request, 1_795_219_200);
                if let Ok(admission) = &result {
                    here.proved.extend(owner);
                    here.peers.push(admission.peer.clone());
                }
                JobOutcome::Authenticate(result)
            }
            Job::Authenticate(_) => JobOutcome::Authenticate(Err(AuthError::BadAuth(String::new()))),
            Job::EapServer(server, packet) => JobOutcome::EapServer(self.credentials.eap_server(*server, &packet)),
            Job::EapPeer(peer, packet) => JobOutcome::EapPeer(self.credentials.eap_peer(*peer, &packet)),
            Job::KeyExchange(work) if well => JobOutcome::KeyExchange(work.run(&mut here.rng)),
            Job::KeyExchange(_) => JobOutcome::KeyExchange(Err(KeyError::PublicValue)),
            Job::SolvePuzzle(puzzle) => JobOutcome::SolvePuzzle(puzzle.solve().filter(|_| well)),
            Job::InstallChild(ready) if well => {
                assert!(here.proved.contains(&ready.ike_sa), "a Child SA for a peer that proved nothing");
                assert!(here.installed.insert(ready.pair.spi_in), "an SPI is installed twice");
                here.reqids += 1;
                JobOutcome::InstallChild(Ok(Installed { reqid: here.reqids, tags: Default::default() }))
            }
            Job::InstallChild(_) => JobOutcome::InstallChild(Err(InstallError::Failed("no".to_owned()))),
            Job::FindRoutes(_) => JobOutcome::FindRoutes(Vec::new()),
            Job::Resolve(_) => JobOutcome::Resolve(Err("no".to_owned())),
            Job::SeenTraffic(_) => JobOutcome::SeenTraffic(well.then_some(Duration::from_secs(1))),
        };
        let now = self.now;
        here.engine.handle_job(now, id, outcome);
        self.drain(side);
    }

    fn rekey(&mut self, side: usize, which: u8) {
        let sas = self.sides[side].engine.ike_sas(self.now);
        let children: Vec<ChildSaId> = sas.iter().flat_map(|sa| &sa.children).map(|child| child.id).collect();
        let pick = usize::from(which >> 1);
        let target = if which & 1 == 0 {
            children.get(pick % children.len().max(1)).map(|id| Target::Child(*id))
        } else {
            sas.get(pick % sas.len().max(1)).map(|sa| Target::Ike(sa.id))
        };
        let Some(target) = target else { return };
        self.tokens += 1;
        let (now, token) = (self.now, self.tokens);
        let _gone = self.sides[side].engine.rekey(now, target, token);
        self.drain(side);
    }

    fn terminate(&mut self, side: usize, which: u8, force: bool) {
        let sas = self.sides[side].engine.ike_sas(self.now);
        let children: Vec<ChildSaId> = sas.iter().flat_map(|sa| &sa.children).map(|child| child.id).collect();
        let pick = usize::from(which >> 1);
        let target = if which & 1 == 0 {
            children.get(pick % children.len().max(1)).map(|id| Target::Child(*id))
        } else {
            sas.get(pick % sas.len().max(1)).map(|sa| Target::Ike(sa.id))
        };
        let Some(target) = target else { return };
        self.tokens += 1;
        let (now, token) = (self.now, self.tokens);
        let _gone = self.sides[side].engine.terminate(now, target, force, token);
        self.drain(side);
    }

    /// Gives a side a message of its own peer, authentic and otherwise any.
    fn forge(&mut self, side: usize, octets: &mut Octets<'_>) {
        let shape = octets.or_zero();
        let exchange = ExchangeType(34 + octets.or_zero() % 11);
        let mut payloads = Vec::new();
        for _ in 0..shape & 7 {
            let kind = octets.or_zero();
            let critical = octets.or_zero() & 1 != 0;
            let data = octets.some();
            // Encrypted payloads inside one another cannot be written.
            if kind != 0 && kind != 46 && kind != 53 {
                payloads.push(Payload::Unknown { kind, critical, data });
            }
        }
        let pick = usize::from(octets.or_zero());
        let count = self.sides[side].engine.sas.len().max(1);
        let Some((id, slot)) = self.sides[side].engine.sas.iter().nth(pick % count) else { return };
        let Some(channel) = slot.sa.channel() else { return };
        // A peer that has the keys and proved nothing can do this too.
        let max_length = (shape & 8 != 0).then_some(150);
        let response = shape & 16 != 0;
        let bytes = channel.forge(exchange, response, shape >> 5, &payloads, max_length, &mut Counter(3));
        let _ = id;
        let port = u8::from(shape & 32 != 0);
        for datagram in bytes {
            let path = self.path(side, port);
            self.hand(side, path, &datagram);
        }
    }

    /// Delivers and works until nothing is to be done, for so many rounds.
    fn settle(&mut self, rounds: usize) {
        for _ in 0..rounds {
            for _ in 0..self.under_way.len() {
                self.deliver();
            }
            for side in [0, 1] {
                for _ in 0..self.sides[side].jobs.len() {
                    self.work(side, true);
                }
            }
        }
    }

    fn drain(&mut self, side: usize) {
        while let Some(output) = self.sides[side].engine.poll_output() {
            match output {
                Output::Transmit(Transmit { path, bytes, .. }) => {
                    let to = usize::from(path.remote.ip() == address(1));
                    let path = Path { local: path.remote, remote: path.local, transport: path.transport };
                    if to == side || bytes == [0xff] || self.under_way.len() >= MAX_MESSAGES {
                        continue;
                    }
                    self.history.push_back((to, path, bytes.clone()));
                    if self.history.len() > MAX_MESSAGES {
                        self.history.pop_front();
                    }
                    self.under_way.push_back((to, path, bytes));
                }
                Output::Job(id, job) => self.sides[side].jobs.push_back((id, job)),
                Output::Event(Event::ChildDown { child, .. }) => {
                    assert!(self.sides[side].installed.remove(&child.spi_in), "ChildDown of what was not installed");
                }
                Output::Event(Event::IkeRekeyed { old, new }) => {
                    assert!(self.sides[side].proved.contains(&old), "a successor of an IKE SA that proved nothing");
                    self.sides[side].proved.insert(new);
                }
                Output::Event(Event::IkeUp(id)) => {
                    // A ticket stands for a proof of before, by the same peer.
                    let here = &mut self.sides[side];
                    let sa = here.engine.ike_sa(id, self.now).filter(|sa| sa.resumed);
                    if let Some(peer) = sa.and_then(|sa| sa.peer) {
                        assert!(here.peers.contains(&peer), "resumed, and never proved");
                        here.proved.insert(id);
                    }
                    assert!(self.sides[side].proved.contains(&id), "up, and nothing proved");
                }
                Output::Event(_)
                | Output::OpenStream { .. }
                | Output::CloseStream(_)
                | Output::Judgement(..)
                | Output::Note(_)
                | Output::Initiate(_) => {}
            }
        }
    }

    /// What holds after each step.
    fn check(&self) {
        for side in &self.sides {
            let engine = &side.engine;
            let mut half_open = 0;
            for (id, slot) in &engine.sas {
                assert_eq!(engine.ctx.shared.spis.get(slot.spi), Some(*id), "an IKE SA that is not found by its SPI");
                assert_eq!(slot.timer.is_some(), slot.timer.is_some_and(|at| engine.timers.contains(&(at, *id))));
                half_open += usize::from(slot.half_open.is_some());
                if let IkeSa::Established(sa) = &slot.sa {
                    let status = sa.status(self.now);
                    assert!(status.peer.is_some(), "established without a peer");
                    assert!(
                        side.proved.contains(id) || status.state != IkeState::Established,
                        "nobody proved anything"
                    );
                    for child in status.children {
                        assert_eq!(engine.ctx.child_spis.get(&child.spi_in), Some(id), "a Child SA without its SPI");
                    }
                }
            }
            assert_eq!(
                engine.ctx.shared.defence.lock().half_open.total(),
                half_open,
                "half-open IKE SAs are miscounted"
            );
            assert!(engine.ctx.child_owners.len() <= engine.ctx.child_spis.len());
            assert!(engine.inits.len() <= engine.sas.len());
            engine.ctx.shared.tickets.lock().counts();
            assert!(engine.timers.len() <= engine.sas.len());
            assert_eq!(engine.ike_sas_after(None, IkeSaId(0)).count(), engine.sas.len());
            assert!(engine.ctx.reauthentications.is_consistent());
            assert_eq!(engine.ike_sas_after(Some("site"), IkeSaId(0)).count(), engine.sas.len());
            assert!(engine.ctx.outputs.is_empty());
        }
    }

    fn come_to_rest(&mut self) {
        for _ in 0..30 {
            self.settle(4);
            self.wait(Duration::from_secs(2));
            self.check();
        }
    }

    /// Ends all IKE SAs; then nothing may be left.
    fn end_all(&mut self) {
        for side in [0, 1] {
            for sa in self.sides[side].engine.ike_sas(self.now) {
                let now = self.now;
                let _gone = self.sides[side].engine.terminate(now, Target::Ike(sa.id), true, 0);
                self.drain(side);
            }
        }
        // What was under way may make a half-open IKE SA once more; that has its time.
        for _ in 0..20 {
            self.settle(4);
            self.wait(Duration::from_secs(60));
        }
        for side in [0, 1] {
            for sa in self.sides[side].engine.ike_sas(self.now) {
                let now = self.now;
                let _gone = self.sides[side].engine.terminate(now, Target::Ike(sa.id), true, 0);
                self.drain(side);
            }
            self.settle(4);
        }
        for side in &self.sides {
            let engine = &side.engine;
            let ctx = &engine.ctx;
            assert!(engine.sas.is_empty(), "{} IKE SAs are left", engine.sas.len());
            assert!(ctx.own_spis() == 0, "{} SPIs of IKE SAs are left", ctx.own_spis());
            assert!(ctx.child_spis.is_empty(), "{} SPIs of Child SAs are left", ctx.child_spis.len());
            assert!(ctx.child_owners.is_empty() && ctx.shared.peers.all().is_empty(), "owners or peers are left");
            assert!(side.installed.is_empty(), "{} Child SAs are left installed", side.installed.len());
            assert!(ctx.jobs.is_empty() && side.jobs.is_empty(), "jobs are left");
            assert!(engine.timers.is_empty() && engine.inits.is_empty(), "timers or requests are left");
            assert!(
                engine.places.is_empty() && engine.upkeep.is_empty() && engine.ctx.shared.fragments.total() == 0,
                "places or fragments are left"
            );
            assert!(engine.members.is_empty(), "connections are left");
            assert_eq!(
                engine.ctx.shared.defence.lock().half_open.total(),
                0,
                "half-open IKE SAs are left in the count"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 7296 §1.2 to §1.4, §2.1 to §2.4, §2.25, under any schedule; `cargo fuzz run state_machine` goes further.
    #[test]
    fn any_octets_leave_the_tables_as_they_were() {
        for seed in 0..400_u64 {
            let mut octets = vec![0; 300];
            Counter(seed).fill(&mut octets);
            // More of what brings SAs up than chance would give.
            for (at, octet) in octets.iter_mut().enumerate() {
                if at % 3 == 1 && at < 120 {
                    *octet = [0x1e, 0x00, 0x02, 0x0c, 0x0d, 0x1e][usize::from(*octet) % 6];
                }
            }
            play(&octets);
        }
    }

    #[test]
    fn an_ike_sa_comes_up_in_a_calm() {
        // Initiate, then let all come to rest: the forgeries of the others would else meet no IKE SA that is up.
        let mut storm = Storm::new(0);
        storm.initiate(0);
        storm.settle(12);
        assert_eq!(storm.sides[0].installed.len(), 1);
        assert_eq!(storm.sides[1].installed.len(), 1);
        storm.check();
        storm.end_all();
    }
}
