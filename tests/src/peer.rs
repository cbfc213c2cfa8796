//! One end of IKE without a daemon: an engine, its credentials and what it wants to send. Shared by the benchmarks.

use std::net::IpAddr;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::daemon::Files;
use ike::Rng;
use ike::config::{Child, Connection};
use ike::engine::{Engine, EngineConfig, Event, Initiate, Installed, Job, JobOutcome, Output, Path, Transmit};
use latchkey::config::load;
use pad::Credentials;

/// Not for secrets: fast, and another sequence in every run.
pub struct Noise(u64);

impl Default for Noise {
    fn default() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Self(u64::from(now.subsec_nanos()) ^ now.as_secs().rotate_left(32))
    }
}

impl Noise {
    /// The next value.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Rng for Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            chunk.copy_from_slice(&self.number().to_be_bytes()[..chunk.len()]);
        }
    }
}

/// What a configuration gives.
#[derive(Clone)]
pub struct Setting {
    /// Its first connection.
    pub connection: Arc<Connection>,
    /// Its credentials, with its authorities.
    pub credentials: Arc<Credentials>,
}

impl Setting {
    /// Reads a `swanctl` folder with one connection; `None` where it is refused.
    pub fn load(folder: &FilePath) -> Option<Self> {
        let loaded = load::load(folder);
        if loaded.has_errors() {
            return None;
        }
        let connection = Arc::clone(&loaded.configured.connections.first()?.connection);
        Some(Self { connection, credentials: Arc::new(loaded.configured.all_credentials()) })
    }

    /// Writes such a folder and reads it.
    pub fn written(configuration: &str, files: &Files) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x509", "x509ca", "private"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("swanctl.conf"), configuration).unwrap();
        for (name, contents) in files {
            std::fs::write(folder.path().join(name), contents).unwrap();
        }
        Self::load(folder.path())
    }
}

/// One end. A second handshake needs another initiator: this one would use the IKE SA that it has.
pub struct Peer {
    /// The engine itself.
    pub engine: Engine,
    setting: Setting,
    unix_time: u64,
    noise: Noise,
    tokens: u64,
    /// Attempts that ended well.
    pub done: usize,
    /// Attempts that failed.
    pub failed: usize,
    /// What key exchanges, signatures and authentication took, by the clock: in the daemon they are not the core's.
    pub jobs: Duration,
}

impl Peer {
    /// An engine with this configuration.
    pub fn new(setting: &Setting, config: EngineConfig) -> Self {
        let mut engine = Engine::new(config, Box::new(Noise::default()), Instant::now());
        engine.set_connections(vec![Arc::clone(&setting.connection)]);
        engine.set_authority_hashes(setting.credentials.authority_hashes());
        let unix_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        Self {
            engine,
            setting: setting.clone(),
            unix_time,
            noise: Noise::default(),
            tokens: 0,
            done: 0,
            failed: 0,
            jobs: Duration::ZERO,
        }
    }

    /// Begins a handshake; gives what to send.
    pub fn initiate(&mut self, now: Instant, local: IpAddr, remote: IpAddr, with_child: bool) -> Vec<Transmit> {
        let child = self.setting.connection.children.first().filter(|_| with_child).cloned();
        self.initiate_child(now, local, remote, child)
    }

    /// Begins to make a Child SA, in the IKE SA that there is or in a new one; gives what to send.
    pub fn initiate_child(
        &mut self,
        now: Instant,
        local: IpAddr,
        remote: IpAddr,
        child: Option<Arc<Child>>,
    ) -> Vec<Transmit> {
        self.tokens += 1;
        let connection = Arc::clone(&self.setting.connection);
        self.engine.initiate(now, Initiate { connection, child, local, remote, token: self.tokens });
        self.outputs(now)
    }

    /// Takes a message; gives what to send.
    pub fn receive(&mut self, now: Instant, path: Path, bytes: &[u8]) -> Vec<Transmit> {
        self.engine.handle_message(now, path, bytes);
        self.outputs(now)
    }

    /// Does what the engine wants; gives what to send.
    pub fn outputs(&mut self, now: Instant) -> Vec<Transmit> {
        let mut sent = Vec::new();
        while let Some(output) = self.engine.poll_output() {
            match output {
                Output::Transmit(transmit) => sent.push(transmit),
                Output::Job(id, job) => {
                    let start = Instant::now();
                    let outcome = match job {
                        Job::Sign(request) => JobOutcome::Sign(self.setting.credentials.sign(&request)),
                        Job::Authenticate(request) => {
                            JobOutcome::Authenticate(self.setting.credentials.authenticate(&request, self.unix_time))
                        }
                        Job::KeyExchange(work) => JobOutcome::KeyExchange(work.run(&mut self.noise)),
                        // No data plane: the Child SA is as good as installed.
                        Job::InstallChild(_) => {
                            JobOutcome::InstallChild(Ok(Installed { reqid: 1, tags: Default::default() }))
                        }
                        other => panic!("{other:?} is not of a plain handshake"),
                    };
                    self.jobs += start.elapsed();
                    self.engine.handle_job(now, id, outcome);
                }
                Output::Event(Event::Done { .. }) => self.done += 1,
                Output::Event(Event::Failed { reason, .. }) => {
                    eprintln!("failed: {reason}");
                    self.failed += 1;
                }
                Output::Event(_)
                | Output::OpenStream { .. }
                | Output::CloseStream(_)
                | Output::Judgement(..)
                | Output::Note(_)
                | Output::Initiate(_) => {}
            }
        }
        sent
    }
}
