//! Several engines that are one (`docs/architecture.md`, *Shards*): a gateway of two or four behind the dispatcher, and clients
//! that are one engine each. What one shard has for another takes its time, as everything does.

use std::collections::BTreeSet;

use super::*;
use crate::wire::NotifyType;

enum Due {
    Message { host: usize, path: Path, bytes: Vec<u8> },
    Job { host: usize, shard: usize, id: JobId, job: Box<Job> },
    Note { host: usize, shard: usize, note: Note },
    Initiate { host: usize, request: Initiate },
}

struct Host {
    address: IpAddr,
    shards: Vec<Engine>,
    dispatch: Dispatch,
    /// By inbound SPI.
    installed: BTreeSet<u32>,
    events: Vec<Event>,
    key_rng: TestRng,
    turn: usize,
}

struct Net {
    now: Instant,
    rng: TestRng,
    /// The first is the gateway.
    hosts: Vec<Host>,
    due: BTreeMap<(Instant, u64), Due>,
    count: u64,
    credentials: Credentials,
    loss: u64,
    cut: bool,
    /// A NAT gives each datagram of a client another port.
    restless_nat: bool,
    /// Requests to make an IKE SA that the gateway got.
    requests: Vec<(Path, Vec<u8>)>,
    /// What the gateway sent.
    sent: Vec<Transmit>,
    /// Shards that were asked for an IKE SA.
    asked: BTreeSet<usize>,
}

const GATEWAY: usize = 0;

fn host_address(host: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, u8::try_from(host >> 8).unwrap(), u8::try_from(host & 0xff).unwrap() + 1))
}

/// As the gateway has it.
fn at_gateway(unique: Unique) -> Connection {
    Connection { unique, ..connection(B) }
}

/// As a client has it, who says nothing of INITIAL_CONTACT.
fn at_client() -> Connection {
    Connection { unique: Unique::Never, ..connection(A) }
}

impl Net {
    fn new(seed: u64, shards: usize, config: &EngineConfig, gateway: Vec<Connection>) -> Self {
        let mut net = Self {
            now: Instant::now(),
            rng: TestRng(seed),
            hosts: Vec::new(),
            due: BTreeMap::new(),
            count: 0,
            credentials: shared_key("correct horse"),
            loss: 0,
            cut: false,
            restless_nat: false,
            requests: Vec::new(),
            sent: Vec::new(),
            asked: BTreeSet::new(),
        };
        net.add(shards, config, gateway);
        net
    }

    fn add(&mut self, shards: usize, config: &EngineConfig, connections: Vec<Connection>) -> usize {
        let seeds: Vec<u64> = (0..shards).map(|_| self.rng.next()).collect();
        let rngs = seeds.into_iter().map(|seed| Box::new(TestRng(seed)) as Box<dyn Rng>);
        let mut engines = Engine::shards(config, rngs, self.now);
        let connections: Vec<Arc<Connection>> = connections.into_iter().map(Arc::new).collect();
        let (first, others) = engines.split_first_mut().unwrap();
        first.set_connections(connections);
        others.iter_mut().for_each(|engine| engine.set_connections_of(first));
        let host = self.hosts.len();
        self.hosts.push(Host {
            address: host_address(host),
            shards: engines,
            dispatch: Dispatch::new(shards, &mut self.rng),
            installed: BTreeSet::new(),
            events: Vec::new(),
            key_rng: TestRng(self.rng.next()),
            turn: 0,
        });
        host
    }

    fn client(&mut self, connection: Connection) -> usize {
        self.add(1, &EngineConfig::default(), vec![connection])
    }

    fn later(&mut self, most: u64, due: Due) {
        let wait = Duration::from_micros(self.rng.below(most) + 1);
        self.count += 1;
        self.due.insert((self.now + wait, self.count), due);
    }

    /// Brings up `site` with `net`, at the shard that has an IKE SA for it or at any.
    fn initiate(&mut self, from: usize, to: usize, token: u64) {
        let connection = Arc::clone(&self.hosts[from].shards[0].ctx.connections[0]);
        let child = connection.children.first().cloned();
        let (local, remote) = (self.hosts[from].address, self.hosts[to].address);
        let request = Initiate { connection, child, local, remote, token };
        let shard = self.shard_for(from, &request);
        let now = self.now;
        self.hosts[from].shards[shard].initiate(now, request);
        self.drain(from, shard);
    }

    fn shard_for(&mut self, host: usize, request: &Initiate) -> usize {
        let host = &mut self.hosts[host];
        host.turn += 1;
        let any = host.turn % host.shards.len();
        host.shards.iter().position(|shard| shard.serves(request)).unwrap_or(any)
    }

    fn drain(&mut self, host: usize, shard: usize) {
        while let Some(output) = self.hosts[host].shards[shard].poll_output() {
            match output {
                Output::Transmit(transmit) => self.transmit(host, transmit),
                Output::Job(id, Job::FindRoutes(query)) => {
                    let local = self.hosts[host].address;
                    let routes = query.remotes.iter().map(|remote| Route { local, remote: *remote, direct: true });
                    let (now, outcome) = (self.now, JobOutcome::FindRoutes(routes.collect()));
                    self.hosts[host].shards[shard].handle_job(now, id, outcome);
                }
                Output::Job(id, job) => self.later(30_000, Due::Job { host, shard, id, job: Box::new(job) }),
                Output::Event(event) => {
                    if let Event::ChildDown { child, .. } = &event {
                        assert!(
                            self.hosts[host].installed.remove(&child.spi_in),
                            "ChildDown of what was not installed"
                        );
                    }
                    self.hosts[host].events.push(event);
                }
                Output::Note(note) => {
                    let all = self.hosts[host].shards.len();
                    assert!(all > 1, "an engine alone has nobody to tell");
                    let one = note.ike_sa().map(|id| self.hosts[host].dispatch.of_ike_sa(id));
                    assert_ne!(one, Some(shard), "a note to oneself");
                    for to in (0..all).filter(|to| one.map_or(*to != shard, |one| *to == one)) {
                        self.later(20_000, Due::Note { host, shard: to, note });
                    }
                }
                Output::Initiate(request) => self.later(20_000, Due::Initiate { host, request: *request }),
                Output::OpenStream { .. } | Output::CloseStream(_) | Output::Judgement(..) => {}
            }
        }
    }

    fn transmit(&mut self, from: usize, transmit: Transmit) {
        if from == GATEWAY {
            self.sent.push(transmit.clone());
        }
        let Transmit { path, bytes, .. } = transmit;
        let to = self.hosts.iter().position(|host| host.address == path.remote.ip());
        let Some(host) = to.filter(|_| !self.cut && bytes != [0xff]) else { return };
        let mut remote = path.local;
        if self.restless_nat && host == GATEWAY {
            remote.set_port(20_000 + u16::try_from(self.rng.below(1000)).unwrap());
        }
        let mut local = path.remote;
        if local.port() >= 20_000 {
            local.set_port(500);
        }
        let path = Path { local, remote, transport: path.transport };
        if !self.rng.percent(self.loss) {
            self.later(10_000, Due::Message { host, path, bytes });
        }
    }

    fn hand(&mut self, host: usize, path: Path, bytes: &[u8]) {
        let shard = self.hosts[host].dispatch.of_message(&path, bytes);
        if host == GATEWAY && matches!(bytes[18], 34 | 38) && bytes[8..16] == [0; 8] {
            self.requests.push((path, bytes.to_vec()));
            self.asked.insert(shard);
        }
        let now = self.now;
        self.hosts[host].shards[shard].handle_message(now, path, bytes);
        self.drain(host, shard);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..400_000 {
            let timers = self.hosts.iter().flat_map(|host| &host.shards).filter_map(Engine::next_timeout);
            let next = timers.chain(self.due.keys().next().map(|(at, _)| *at)).min();
            let Some(next) = next.filter(|at| *at <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            self.step();
        }
        panic!("the simulation does not come to rest");
    }

    fn step(&mut self) {
        while let Some(entry) = self.due.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let now = self.now;
            match entry.remove() {
                Due::Message { host, path, bytes } => self.hand(host, path, &bytes),
                Due::Job { host, shard, id, job } => {
                    let outcome = self.execute(host, *job);
                    self.hosts[host].shards[shard].handle_job(now, id, outcome);
                    self.drain(host, shard);
                }
                Due::Note { host, shard, note } => {
                    self.hosts[host].shards[shard].handle_note(now, note);
                    self.drain(host, shard);
                }
                Due::Initiate { host, request } => {
                    let shard = self.shard_for(host, &request);
                    self.hosts[host].shards[shard].handle_initiate(now, request);
                    self.drain(host, shard);
                }
            }
        }
        for host in 0..self.hosts.len() {
            for shard in 0..self.hosts[host].shards.len() {
                let now = self.now;
                if self.hosts[host].shards[shard].next_timeout().is_some_and(|at| at <= now) {
                    self.hosts[host].shards[shard].handle_timeout(now);
                    self.drain(host, shard);
                }
            }
        }
    }

    fn execute(&mut self, host: usize, job: Job) -> JobOutcome {
        match job {
            Job::Sign(request) => JobOutcome::Sign(self.credentials.sign(&request)),
            Job::Authenticate(request) => JobOutcome::Authenticate(self.credentials.authenticate(&request, UNIX_TIME)),
            Job::EapServer(server, packet) => JobOutcome::EapServer(self.credentials.eap_server(*server, &packet)),
            Job::EapPeer(peer, packet) => JobOutcome::EapPeer(self.credentials.eap_peer(*peer, &packet)),
            Job::KeyExchange(work) => JobOutcome::KeyExchange(work.run(&mut self.hosts[host].key_rng)),
            Job::SolvePuzzle(puzzle) => JobOutcome::SolvePuzzle(puzzle.solve()),
            Job::SeenTraffic(_) => JobOutcome::SeenTraffic(None),
            Job::InstallChild(ready) => {
                assert!(self.hosts[host].installed.insert(ready.pair.spi_in), "an SPI is installed twice");
                JobOutcome::InstallChild(Ok(crate::engine::Installed { reqid: 1, tags: Default::default() }))
            }
            Job::FindRoutes(_) | Job::Resolve(_) => unreachable!("answered at once, or not asked"),
        }
    }

    fn all(&self, host: usize) -> Vec<IkeSaStatus> {
        self.hosts[host].shards.iter().flat_map(|shard| shard.ike_sas(self.now)).collect()
    }

    fn up(&self, host: usize) -> Vec<IkeSaStatus> {
        self.all(host).into_iter().filter(|sa| sa.state == IkeState::Established).collect()
    }

    fn done(&self, host: usize, token: u64) -> bool {
        self.hosts[host].events.iter().any(|event| matches!(event, Event::Done { token: done } if *done == token))
    }

    /// What has to hold of a gateway at any time, and of what its shards have in common.
    fn check(&self, host: usize) {
        let shards = &self.hosts[host].shards;
        let shared = &shards[0].ctx.shared;
        let sas: usize = shards.iter().map(|shard| shard.sas.len()).sum();
        assert_eq!(shared.load().0, sas, "IKE SAs are miscounted");
        assert_eq!(shared.load().1, shards.iter().map(|shard| shard.ctx.jobs.len()).sum::<usize>(), "jobs");
        let half_open = shards.iter().flat_map(|shard| shard.sas.values()).filter(|slot| slot.half_open.is_some());
        assert_eq!(shared.defence.lock().half_open.total(), half_open.count(), "half-open IKE SAs are miscounted");
        for (number, shard) in shards.iter().enumerate() {
            for (id, slot) in &shard.sas {
                assert_eq!(self.hosts[host].dispatch.of_ike_sa(*id), number, "an IKE SA with another shard's number");
                assert_eq!(shared.spis.get(slot.spi), Some(*id), "an IKE SA that is not found by its SPI");
            }
            for spi in shard.ctx.child_spis.keys() {
                assert_eq!(self.hosts[host].dispatch.of_child_spi(*spi), number, "a Child SA with another shard's SPI");
            }
        }
        // Whoever is in the directory exists.
        for (_, id) in shared.peers.all() {
            let shard = &shards[self.hosts[host].dispatch.of_ike_sa(id)];
            assert!(shard.sas.contains_key(&id), "the directory of peers has {id:?}, which is gone");
        }
    }

    /// Ends everything at a gateway; then nothing is left.
    fn end_all(&mut self, host: usize) {
        for _ in 0..3 {
            for sa in self.all(host) {
                let (now, shard) = (self.now, self.hosts[host].dispatch.of_ike_sa(sa.id));
                let _ = self.hosts[host].shards[shard].terminate(now, Target::Ike(sa.id), true, 0);
                self.drain(host, shard);
            }
            self.run(seconds(120));
        }
        self.check(host);
        let shards = &self.hosts[host].shards;
        let shared = &shards[0].ctx.shared;
        assert!(self.all(host).is_empty(), "{:#?}", self.all(host));
        assert!(shared.peers.all().is_empty() && shared.streams.is_empty() && shared.fragments.total() == 0);
        assert!(self.hosts[host].installed.is_empty(), "Child SAs are left installed");
        for shard in shards {
            assert_eq!((shard.ctx.own_spis(), shard.ctx.child_spis.len(), shard.ctx.jobs.len()), (0, 0, 0));
            assert!(shard.timers.is_empty() && shard.inits.is_empty() && shard.ctx.child_owners.is_empty());
        }
    }
}

// RFC 7296 §2.4: a peer that comes again and again to any shard has one IKE SA, or all where that is the policy.
#[test]
fn a_peer_is_replaced_whichever_shard_it_comes_to() {
    for shards in [2, 4] {
        let mut net = Net::new(1, shards, &EngineConfig::default(), vec![at_gateway(Unique::Replace)]);
        for n in 1..=12 {
            let client = net.client(at_client());
            net.initiate(client, GATEWAY, n);
            net.run(seconds(5));
            assert!(net.done(client, n));
            assert_eq!(net.up(GATEWAY).len(), 1, "after {n}");
            assert_eq!(net.hosts[GATEWAY].installed.len(), 1);
            net.check(GATEWAY);
        }
        assert_eq!(net.asked.len(), shards, "all shards were asked: {:?}", net.asked);
        let replaced = |event: &&Event| matches!(event, Event::IkeDown(_, CloseReason::Replaced));
        assert_eq!(net.hosts[GATEWAY].events.iter().filter(replaced).count(), 11);
        net.end_all(GATEWAY);
    }
}

// The same where they come at once, in any order of what the shards do: `keep` lets one in, `replace` leaves one, and with
// INITIAL_CONTACT either does.
#[test]
fn of_those_that_come_at_once_one_is_kept_or_stays() {
    for (unique, says, left) in [
        (Unique::Keep, Unique::Never, 1),
        (Unique::Replace, Unique::Never, 1),
        (Unique::No, Unique::No, 1),
        (Unique::Keep, Unique::No, 1),
        (Unique::No, Unique::Never, 6),
        (Unique::Never, Unique::No, 6),
    ] {
        for seed in 0..20 {
            let shards = if seed % 2 == 0 { 2 } else { 4 };
            let mut net = Net::new(seed, shards, &EngineConfig::default(), vec![at_gateway(unique)]);
            let clients: Vec<usize> = (0..6).map(|_| net.client(Connection { unique: says, ..at_client() })).collect();
            for client in &clients {
                net.initiate(*client, GATEWAY, 1);
                let wait = Duration::from_micros(net.rng.below(8000));
                net.run(wait);
            }
            net.run(seconds(20));
            assert_eq!(net.up(GATEWAY).len(), left, "{unique:?}, {says:?}, seed {seed}");
            assert_eq!(net.all(GATEWAY).len(), left, "{unique:?}, {says:?}, seed {seed}");
            assert_eq!(net.hosts[GATEWAY].installed.len(), left);
            let peers = net.hosts[GATEWAY].shards[0].ctx.shared.peers.all();
            assert_eq!(peers.len(), left, "the directory of peers");
            net.check(GATEWAY);
            if unique == Unique::Keep && says == Unique::Never {
                let done = clients.iter().filter(|client| net.done(**client, 1)).count();
                assert_eq!(done, 1, "seed {seed}");
            }
            net.end_all(GATEWAY);
        }
    }
}

// While its IKE SA is rekeyed a peer has one all the time: `keep` refuses others, and who takes the peer over takes the successor.
#[test]
fn a_rekey_hides_no_ike_sa_from_other_shards() {
    for (unique, says) in [(Unique::Keep, Unique::Never), (Unique::Replace, Unique::Never), (Unique::No, Unique::No)] {
        for seed in 0..40 {
            let mut net = Net::new(seed, 4, &EngineConfig::default(), vec![at_gateway(unique)]);
            let first = net.client(at_client());
            net.initiate(first, GATEWAY, 1);
            net.run(seconds(3));
            let others: Vec<usize> = (0..3).map(|_| net.client(Connection { unique: says, ..at_client() })).collect();
            let sa = net.up(GATEWAY).remove(0);
            for other in &others {
                net.initiate(*other, GATEWAY, 1);
            }
            let wait = Duration::from_micros(net.rng.below(120_000));
            net.run(wait);
            let (now, shard) = (net.now, net.hosts[GATEWAY].dispatch.of_ike_sa(sa.id));
            let _ = net.hosts[GATEWAY].shards[shard].rekey(now, Target::Ike(sa.id), 7);
            net.drain(GATEWAY, shard);
            net.run(seconds(60));
            assert_eq!(net.up(GATEWAY).len(), 1, "{unique:?}, seed {seed}");
            assert_eq!(net.hosts[GATEWAY].installed.len(), 1, "{unique:?}, seed {seed}");
            let survivor = others.iter().filter(|other| net.done(**other, 1)).count();
            assert_eq!(survivor == 0, unique == Unique::Keep, "{unique:?}, seed {seed}");
            net.check(GATEWAY);
            net.end_all(GATEWAY);
        }
    }
}

// RFC 7296 §2.1: a repetition meets the shard that knows the request, gets the same answer and makes nothing.
#[test]
fn a_repeated_first_request_meets_its_shard() {
    let mut net = Net::new(5, 4, &EngineConfig::default(), vec![at_gateway(Unique::Never)]);
    for n in 0..8 {
        let client = net.client(at_client());
        net.initiate(client, GATEWAY, 1);
        // The request has arrived, and its answer was made.
        while net.requests.len() <= n {
            net.run(Duration::from_millis(1));
        }
        let (path, bytes) = net.requests[n].clone();
        for _ in 0..200 {
            if net.sent.iter().any(|sent| sent.bytes[..8] == bytes[..8]) {
                break;
            }
            net.run(Duration::from_micros(200));
        }
        net.cut = true;
        let (before, count) = (net.sent.len(), net.all(GATEWAY).len());
        let now = net.now;
        let shard = net.hosts[GATEWAY].dispatch.of_message(&path, &bytes);
        net.hosts[GATEWAY].shards[shard].handle_message(now, path, &bytes);
        net.drain(GATEWAY, shard);
        net.cut = false;
        let answers: Vec<&Transmit> = net.sent.iter().filter(|sent| sent.bytes[..8] == bytes[..8]).collect();
        assert_eq!((net.sent.len(), net.all(GATEWAY).len()), (before + 1, count));
        assert!(answers.len() == 2 && answers[0] == answers[1]);
        net.run(seconds(20));
        assert!(net.done(client, 1));
    }
    assert!(net.asked.len() > 1);
    net.end_all(GATEWAY);
}

// RFC 7296 §2.6, RFC 8019 §7: a cookie and a puzzle's solution come back to the shard that made them, also from another port.
#[test]
fn cookies_and_puzzles_come_back_to_their_shard() {
    let puzzles = crate::config::PuzzlePolicy { threshold: 1, difficulty: 9, limit: 12 };
    let (block_threshold, cookie_threshold_ip) = (0, usize::MAX);
    let calm = EngineConfig { block_threshold, cookie_threshold_ip, ..EngineConfig::default() };
    for config in [EngineConfig { cookie_threshold: 0, ..calm.clone() }, EngineConfig { puzzles, ..calm }] {
        let demanded = if config.cookie_threshold == 0 { NotifyType::COOKIE } else { NotifyType::PUZZLE };
        let mut net = Net::new(6, 4, &config, vec![at_gateway(Unique::Never)]);
        net.restless_nat = true;
        let clients: Vec<usize> = (0..12).map(|_| net.client(at_client())).collect();
        for client in &clients {
            net.initiate(*client, GATEWAY, 1);
        }
        net.run(seconds(60));
        assert!(clients.iter().all(|client| net.done(*client, 1)), "{demanded:?}");
        assert_eq!(net.asked.len(), 4);
        let demands = net.sent.iter().filter(|sent| match crate::wire::parse(&sent.bytes) {
            Ok(crate::wire::Incoming::Plain(message)) => message.payloads.iter().any(|payload| match payload {
                crate::wire::Payload::Notify(notify) => notify.kind == demanded,
                _ => false,
            }),
            _ => false,
        });
        assert!(demands.count() >= 6, "{demanded:?}");
        net.end_all(GATEWAY);
    }
}

// RFC 7296 §2.6: limits are of all shards together, and nobody gets the last place twice.
#[test]
fn limits_hold_for_all_shards_together() {
    let open = EngineConfig {
        cookie_threshold: usize::MAX,
        cookie_threshold_ip: usize::MAX,
        block_threshold: 0,
        address_budget: 0,
        ..EngineConfig::default()
    };
    for (config, half_open) in [
        (EngineConfig { init_limit_half_open: 7, ..open.clone() }, 7),
        (EngineConfig { ikesa_limit: 9, ..open.clone() }, 9),
        (EngineConfig { init_limit_job_load: 5, ..open.clone() }, 5),
        (EngineConfig { block_threshold: 3, ..open.clone() }, 3),
        // The rest is for those who return a cookie.
        (EngineConfig { address_budget: 4, ..open }, 3),
    ] {
        let mut net = Net::new(7, 4, &config, vec![at_gateway(Unique::Never)]);
        let client = net.client(at_client());
        net.initiate(client, GATEWAY, 1);
        while net.requests.is_empty() {
            net.run(Duration::from_millis(1));
        }
        net.cut = true;
        let (path, bytes) = net.requests[0].clone();
        let alone = config.block_threshold > 0 || config.address_budget > 0;
        for n in 1..200_u8 {
            let mut bytes = bytes.clone();
            bytes[..8].copy_from_slice(&net.rng.next().to_be_bytes());
            let host = if alone { 2 } else { n };
            let remote = SocketAddr::new(Ipv4Addr::new(192, 0, 2, host).into(), 500);
            net.hand(GATEWAY, Path { remote, ..path }, &bytes);
        }
        // The one that the client made is another network's.
        let others = usize::from(alone);
        assert_eq!(net.all(GATEWAY).len(), half_open + others, "{config:?}");
        assert_eq!(net.asked.len(), 4);
        net.check(GATEWAY);
        net.end_all(GATEWAY);
    }
}

// RFC 6290 §9.2: no token while either SPI is one of ours, in whichever shard. RFC 7296 §2.1: nor is our own request, sent back to
// us, a stranger's.
#[test]
fn what_is_ours_is_ours_for_all_shards() {
    let mut net = Net::new(8, 4, &EngineConfig::default(), vec![at_gateway(Unique::Never)]);
    for engine in &mut net.hosts[GATEWAY].shards {
        engine.set_crash_secret(Some(Secret::new(vec![7; 32])));
    }
    let client = net.client(at_client());
    let (mut elsewhere, mut said) = (0, 0);
    for token in 1..=12 {
        net.initiate(client, GATEWAY, token);
        net.run(seconds(3));
        let sa = net.up(GATEWAY).pop().unwrap();
        // A protected request of the client's, as if the gateway had been the initiator.
        let mut bytes = vec![0; 60];
        bytes[..8].copy_from_slice(&sa.initiator_spi.to_be_bytes());
        bytes[8..16].copy_from_slice(&sa.responder_spi.to_be_bytes());
        bytes[16..20].copy_from_slice(&[46, 0x20, 37, 0]);
        bytes[27] = 60;
        bytes[31] = 32;
        let path = Path { local: sa.path.local, remote: sa.path.remote, transport: sa.path.transport };
        elsewhere += usize::from(
            net.hosts[GATEWAY].dispatch.of_message(&path, &bytes) != net.hosts[GATEWAY].dispatch.of_ike_sa(sa.id),
        );
        let before = net.sent.len();
        net.hand(GATEWAY, path, &bytes);
        assert_eq!(net.sent.len(), before, "something is said about an IKE SA that lives");
        net.end_all(GATEWAY);
        net.run(seconds(300));
        let before = net.sent.len();
        net.hand(GATEWAY, path, &bytes);
        said += net.sent.len() - before;
    }
    // Of one that is gone it shows the token.
    assert!(elsewhere > 3 && said > 3, "{elsewhere}, {said}");

    // The gateway's own requests come back to it.
    for token in 20..30 {
        net.cut = true;
        let before = net.sent.len();
        net.initiate(GATEWAY, client, token);
        net.run(Duration::from_millis(200));
        let request = net.sent[before].clone();
        let path = Path { local: request.path.local, remote: request.path.remote, transport: Transport::Udp };
        let (sas, sent) = (net.all(GATEWAY).len(), net.sent.len());
        net.hand(GATEWAY, path, &request.bytes);
        assert_eq!((net.all(GATEWAY).len(), net.sent.len()), (sas, sent));
        net.end_all(GATEWAY);
        net.cut = false;
    }
}

// RFC 5723 §4.3: a ticket is good at whichever shard it is presented, once; the IKE SA that it came from goes where it is.
#[test]
fn a_ticket_is_good_at_any_shard() {
    let resuming = |connection: Connection| Connection { session_resumption: true, ..connection };
    for seed in 0..16 {
        let gateway = resuming(at_gateway(Unique::Never));
        let mut net = Net::new(seed, 4, &EngineConfig::default(), vec![gateway]);
        let client = net.client(Connection { dpd_delay: seconds(5), ..resuming(at_client()) });
        net.initiate(client, GATEWAY, 1);
        net.run(seconds(3));
        let first = net.up(GATEWAY).remove(0);
        // The client finds out that nothing gets through.
        net.cut = true;
        net.run(seconds(400));
        assert!(net.all(client).is_empty());
        net.cut = false;
        net.initiate(client, GATEWAY, 2);
        net.run(seconds(5));
        assert!(net.done(client, 2), "seed {seed}");
        let up = net.up(GATEWAY);
        assert!(up.len() == 1 && up[0].resumed && up[0].id != first.id, "seed {seed}: {up:#?}");
        assert_eq!(net.hosts[GATEWAY].installed.len(), 1);
        // The request once more, whole: its ticket was used.
        let (path, bytes) = net.requests.last().cloned().unwrap();
        let path = Path { remote: SocketAddr::new(path.remote.ip(), 9), ..path };
        net.hand(GATEWAY, path, &bytes);
        net.run(seconds(60));
        assert_eq!(net.all(GATEWAY).len(), 1, "seed {seed}");
        net.check(GATEWAY);
        net.end_all(GATEWAY);
    }
}

// An IKE SA that the gateway wants back is not made again where the peer has made one with another shard.
#[test]
fn what_ends_is_begun_again_at_the_shard_that_has_another() {
    let mut used = 0;
    for seed in 0..12 {
        let mut net = Net::new(seed, 4, &EngineConfig::default(), vec![at_gateway(Unique::Never)]);
        let peer = net.client(at_client());
        net.initiate(GATEWAY, peer, 1);
        net.run(seconds(3));
        let ours = net.up(GATEWAY).remove(0);
        // As after a restart of the peer: it makes one of its own.
        let connection = Arc::clone(&net.hosts[peer].shards[0].ctx.connections[0]);
        let seed_of_peer = net.rng.next();
        let mut again = Engine::new(EngineConfig::default(), Box::new(TestRng(seed_of_peer)), net.now);
        again.set_connections(vec![connection]);
        net.hosts[peer].shards = vec![again];
        net.hosts[peer].installed.clear();
        net.initiate(peer, GATEWAY, 2);
        net.run(seconds(3));
        let theirs = net.up(GATEWAY).into_iter().find(|sa| sa.id != ours.id).unwrap();
        let of = |id| net.hosts[GATEWAY].dispatch.of_ike_sa(id);
        let (shard, other) = (of(ours.id), of(theirs.id));
        used += usize::from(shard != other);
        let now = net.now;
        net.hosts[GATEWAY].shards[shard].reauthenticate(now, ours.id, 3).unwrap();
        net.drain(GATEWAY, shard);
        net.run(seconds(400));
        let up = net.up(GATEWAY);
        assert!(up.len() == 1 && up[0].id == theirs.id, "seed {seed}: {up:#?}");
        net.check(GATEWAY);
    }
    assert!(used > 3, "{used}");
}

// Anything in any order: what the shards have in common fits what they have, and nothing is left at the end.
#[test]
fn any_schedule_leaves_nothing_behind() {
    for seed in 0..40 {
        let unique = [Unique::Replace, Unique::Keep, Unique::No, Unique::Never][usize::try_from(seed % 4).unwrap()];
        let shards = if seed % 3 == 0 { 2 } else { 4 };
        let gateway = Connection { dpd_delay: seconds(20), session_resumption: seed % 5 == 0, ..at_gateway(unique) };
        let mut net = Net::new(1000 + seed, shards, &EngineConfig::default(), vec![gateway]);
        net.loss = 3 * (seed % 4);
        let says = if seed % 7 < 3 { Unique::No } else { Unique::Never };
        let dpd_delay = seconds(20);
        let session_resumption = seed % 5 == 0;
        let clients: Vec<usize> = (0..5)
            .map(|_| net.client(Connection { unique: says, dpd_delay, session_resumption, ..at_client() }))
            .collect();
        for step in 0..60 {
            let client = clients[usize::try_from(net.rng.below(5)).unwrap()];
            match net.rng.below(10) {
                0..5 => net.initiate(client, GATEWAY, step),
                5 => net.initiate(GATEWAY, client, step),
                what => {
                    let host = if net.rng.percent(70) { GATEWAY } else { client };
                    let all = net.all(host);
                    if all.is_empty() {
                        continue;
                    }
                    let sa = &all[usize::try_from(net.rng.next() % all.len() as u64).unwrap()];
                    let (now, shard) = (net.now, net.hosts[host].dispatch.of_ike_sa(sa.id));
                    let engine = &mut net.hosts[host].shards[shard];
                    let _ = match what {
                        6 => engine.rekey(now, Target::Ike(sa.id), step),
                        7 => engine.reauthenticate(now, sa.id, step),
                        8 => engine.terminate(now, Target::Ike(sa.id), true, step),
                        _ => engine.terminate(now, Target::Ike(sa.id), false, step),
                    };
                    net.drain(host, shard);
                }
            }
            let wait = Duration::from_micros(net.rng.below(400_000));
            net.run(wait);
            net.check(GATEWAY);
        }
        net.loss = 0;
        for client in &clients {
            net.end_all(*client);
        }
        net.end_all(GATEWAY);
    }
}
