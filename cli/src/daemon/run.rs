//! Starting, stopping and reloading the daemon.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use bytes::BytesMut;
use espintcp::streams::{EspWorth, StreamLimits, Streams};
use espintcp::tls::TlsServer;
use ike::engine::{ChildSaId, Engine};
use ipsec::plane::StreamId;
use kernel::network::{Network, NetworkConfig};
use latch::database::Database;
use latch::survivor::Survivor;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::core::{Core, Parts};
use super::filelog::FileLogs;
use super::reservations::Latched;
use super::resolver::Resolver;
use super::settings::Settings;
use super::shards::{self, Shards};
use super::virtual_addresses::{Placement, VirtualAddresses};
use super::{state, tls};
use crate::config::daemon::{self, DaemonConfig};
use crate::config::{Report, Severity, load};
use crate::control::Control;
use crate::vici::{self, Store};

/// Commands that may wait for the core.
const COMMAND_QUEUE: usize = 64;

/// Events that a slow VICI client may fall behind.
const EVENT_QUEUE: usize = 1024;

/// Why there are no latches where the kernel does ESP and has no policies for them.
const UNENFORCED: &str = "the kernel does ESP here, and takes no policies for latches: set plane = userspace";

/// How to run.
#[derive(Clone, Debug, Default)]
pub struct DaemonOptions {
    /// `swanctl` directory; `None` takes `$SWANCTL_DIR`, then `/etc/swanctl`.
    pub swanctl_dir: Option<PathBuf>,
    /// `strongswan.conf`; `None` takes `$STRONGSWAN_CONF`, then `/etc/strongswan.conf`.
    pub strongswan_conf: Option<PathBuf>,
    /// End when standard input does, so that a parent that dies takes the daemon with it.
    pub until_stdin_closes: bool,
}

/// Randomness of the operating system, by way of the crypto library.
pub(super) struct SystemRng;

impl ike::Rng for SystemRng {
    fn fill(&mut self, buffer: &mut [u8]) {
        if aws_lc_rs::rand::fill(buffer).is_err() {
            // Without randomness there are no keys: nothing that the daemon could do from here on is safe.
            tracing::error!("the system gives no random numbers: stopping");
            std::process::abort();
        }
    }
}

/// Starts what [`survive`] is, as this process was started.
fn survivor() -> std::io::Result<Survivor> {
    // Also when the file has been replaced since.
    let mut command = std::process::Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).arg("--survive");
    Survivor::start(command)
}

/// The process that disconnects what the daemon has latched, once the daemon is gone.
pub fn survive() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Who stops the daemon may signal all of its processes; this one ends with it.
        let _ignored = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        let sockets = latch::survivor::run(std::io::stdin().as_fd().try_clone_to_owned()?).await?;
        if sockets > 0 {
            tracing::info!(sockets, "the daemon is gone, and what it had latched is disconnected");
        }
        Ok(())
    })
}

/// Runs the daemon until a signal, or the end of standard input if so told, stops it.
pub async fn run(options: DaemonOptions) -> anyhow::Result<()> {
    take_all_descriptors();
    let settings = options.strongswan_conf.clone().unwrap_or_else(daemon::default_path);
    let daemon::Loaded { config, reports } = daemon::load(&settings)?;
    log_reports(&reports);
    let folder = options.swanctl_dir.clone().unwrap_or_else(load::default_folder);
    // A daemon with half of its configuration is better than none: what is refused is said and left out.
    let loaded = load::load(&folder);
    log_reports(&loaded.reports);

    let database = Arc::new(Database::new());
    if let Some(on_break) = config.latch_flows {
        database.latch_flows(on_break);
    }
    let (network, from_network) =
        Network::start(network_config(&config), Arc::clone(&database) as _).await.context("opening the network")?;
    let barrier = network.barrier();
    if config.latch_flows.is_some() && network.leaves_esp_to_the_kernel() {
        tracing::warn!("latch_flows is for ESP in user space: flows are not latched where the kernel does ESP");
    }
    let unenforced = network.leaves_esp_to_the_kernel() && barrier.is_none();
    if let Some(barrier) = barrier {
        database.set_barrier(barrier);
    }
    database.set_logical_spd(network.logical_spd());
    let (into_plane, into_streams) = (network.clone(), network.clone());
    let (streams, from_streams) = Streams::new(
        StreamLimits::default(),
        Some(Arc::new(move |socket| into_streams.prepare(&socket))),
        Arc::new(move |stream, local, remote, packets: &mut [BytesMut]| {
            let packets = packets.iter_mut().map(AsMut::as_mut);
            let worth = into_plane.esp_batch_from_stream(StreamId(stream), local, remote, packets);
            EspWorth { authentic: worth.authentic, unknown: worth.unknown, forged: worth.forged }
        }),
    );
    let sealing = network.clone();
    streams.seal_by(Arc::new(move |stream, packet, take| sealing.seal_for_stream(StreamId(stream), packet, take)));
    let of_kernel = streams.clone();
    network.hand_streams_over(Box::new(move |stream| {
        of_kernel.hand_over(stream.0, Arc::new(Network::leave_stream_to_the_kernel))
    }));
    for port in &config.tcp_ports {
        listen(&streams, *port, None).await?;
    }
    if !config.tls_ports.is_empty() {
        let server = tls::server(&config)?;
        for port in &config.tls_ports {
            listen(&streams, *port, Some(&server)).await?;
        }
    }

    let (command_sender, commands) = mpsc::channel(COMMAND_QUEUE);
    let (events, _) = broadcast::channel(EVENT_QUEUE);
    let control = Control::new(command_sender, events.clone());
    let count = config.shards.unwrap_or_else(shards::by_default);
    let rngs = (0..count.max(1)).map(|_| Box::new(SystemRng) as Box<dyn ike::Rng>);
    let mut engines = Engine::shards(&config.engine, rngs, Instant::now());
    if config.quick_crash_detection {
        match state::crash_secret(&config.state_dir, |octets| ike::Rng::fill(&mut SystemRng, octets)) {
            Ok(secret) => {
                for engine in &mut engines {
                    engine.set_crash_secret(Some(secret.duplicate()));
                }
            }
            Err(error) => {
                let folder = config.state_dir.display();
                tracing::error!(%error, "no quick crash detection: {folder}/qcd.secret cannot be used");
            }
        }
    }
    if config.latch_narrowing
        && let Some(engine) = engines.first_mut()
    {
        engine.set_reservations(Arc::new(Latched(Arc::clone(&database))));
    }
    tracing::info!(shards = engines.len(), "the engine's shards");
    let (shards, from_shards) =
        Shards::start(engines, (network.clone(), from_network), (streams.clone(), from_streams));
    let (latch_access, access) = watch::channel(config.latch_access.clone());
    let core = Core::new(Parts {
        shards,
        from_shards,
        network: network.clone(),
        streams,
        database: Arc::clone(&database),
        filelogs: FileLogs::open(config.file_logs.clone()),
        settings: Settings::new(settings, config.clone()),
        latch_access,
        virtual_addresses: VirtualAddresses::new(
            Placement { install: config.install_virtual_ip, device: config.install_virtual_ip_on.clone() },
            config.resolve_file.clone().map(Resolver::new),
        ),
        commands,
        events,
    });
    let mut core = tokio::spawn(core.run());

    let store = Arc::new(Store::new(loaded.configured));
    store.push(&control).await;
    if let Some(directory) = config.latch_socket.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("making {} for the latch socket", directory.display()))?;
    }
    let bypasses = Arc::clone(&database);
    let latches = latch::server::serve(
        latch::server::ServerConfig {
            path: config.latch_socket.clone(),
            // Where the kernel does ESP, packets do not go through the tunnel's device.
            device: (!network.leaves_esp_to_the_kernel()).then(|| network.tun_name().to_owned()),
            initiator: Some(latch::server::Initiator::new({
                let control = control.clone();
                move |flow, narrow| {
                    let control = control.clone();
                    Box::pin(async move { control.initiate_flow(flow, narrow).await })
                }
            })),
            surveyor: Some(latch::server::Surveyor::new({
                let control = control.clone();
                move |flow, children| {
                    let (control, children) = (control.clone(), children.into_iter().map(ChildSaId).collect());
                    Box::pin(async move { control.survey(flow, children).await })
                }
            })),
            forwarder: Some(latch::server::Forwarder::new({
                let network = network.clone();
                move |packet| network.send_inner(packet)
            })),
            survivor: survivor()
                .inspect_err(
                    |error| tracing::warn!(%error, "should this process die, nobody will disconnect what is latched"),
                )
                .ok()
                .map(Arc::new),
            has_received: kernel::tcp::has_received,
            unenforced: unenforced.then(|| UNENFORCED.to_owned()),
            access,
            identifier: latch::server::Identifier::of_system(kernel::users::groups_of_peer),
        },
        database,
    )
    .await
    .with_context(|| format!("serving latches on {}", config.latch_socket.display()))?;
    let vici = vici::serve(&config.vici_socket, control.clone(), Arc::clone(&store))
        .await
        .with_context(|| format!("serving VICI on {}", config.vici_socket))?;
    store.start(&control).await;

    tracing::info!(version = env!("CARGO_PKG_VERSION"), vici = config.vici_socket, "ready");
    println!("latchkeyd {} is ready, VICI on {}", env!("CARGO_PKG_VERSION"), config.vici_socket);
    // Outside systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut stdin = if options.until_stdin_closes { end_of_stdin() } else { oneshot::channel().1 };
    let ended = loop {
        tokio::select! {
            _ = terminate.recv() => break None,
            _ = interrupt.recv() => break None,
            _ = &mut stdin, if options.until_stdin_closes => break None,
            ended = &mut core => break Some(ended),
            _ = hangup.recv() => reload(&store, &control, &folder).await,
        }
    };
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let outcome = match ended {
        Some(ended) => ended,
        None => {
            tracing::info!("stopping");
            // Before what would protect their flows goes.
            bypasses.close_bypasses();
            control.shutdown().await;
            core.await
        }
    };
    vici.stop().await;
    drop(latches);
    outcome.context("the core ended unexpectedly")?
}

/// Reads `strongswan.conf` and `swanctl.conf` anew and puts each in force whole, or keeps what is in force and says why.
async fn reload(store: &Store, control: &Control, folder: &Path) {
    if let Err(reason) = control.reload_settings().await {
        tracing::error!(reason, "the settings have errors; those in force stay");
    }
    let loaded = load::load(folder);
    log_reports(&loaded.reports);
    if loaded.has_errors() {
        tracing::error!(folder = %folder.display(), "the configuration has errors; the one in force stays");
        return;
    }
    store.replace(loaded.configured, control).await;
    tracing::info!(folder = %folder.display(), "configuration loaded");
}

pub(super) fn log_reports(reports: &[Report]) {
    for report in reports {
        match report.severity {
            Severity::Debug => tracing::debug!("{report}"),
            Severity::Warning => tracing::warn!("{report}"),
            Severity::Error => tracing::error!("{report}"),
        }
    }
}

fn network_config(config: &DaemonConfig) -> NetworkConfig {
    let defaults = NetworkConfig::default();
    NetworkConfig {
        port: config.engine.port,
        nat_port: config.engine.nat_port,
        mark: config.fwmark.unwrap_or(defaults.mark),
        route_table: config.routing_table,
        route_priority: config.routing_table_prio,
        install_routes: config.install_routes,
        interfaces: config.interfaces.clone(),
        plane: config.plane,
        drop_cleartext: config.drop_cleartext,
        tunnel_mark: config.tunnel_mark,
        threads: config.esp_threads.unwrap_or_else(shards::by_default),
        ..defaults
    }
}

/// Each stream needs one: as many as the system allows, where a shell's usual limit would be reached by a thousand strangers.
fn take_all_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files stays");
    }
}

/// Listens on both address families; a machine without IPv6 is fine.
async fn listen(streams: &Streams, port: u16, tls: Option<&TlsServer>) -> anyhow::Result<()> {
    for address in ["0.0.0.0", "::"] {
        let address = std::net::SocketAddr::new(address.parse()?, port);
        let listening = match tls {
            None => streams.listen(address).await,
            Some(tls) => streams.listen_tls(address, tls.clone()).await,
        };
        match listening {
            Ok(_) => {}
            Err(error) if address.is_ipv6() => tracing::info!(%address, %error, "no TCP encapsulation over IPv6"),
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("listening on TCP port {port} (`ss -tlnp sport = :{port}` shows who holds it)")
                });
            }
        }
    }
    Ok(())
}

/// Resolves when standard input ends. A thread of its own reads it, since such a read cannot be given up.
fn end_of_stdin() -> oneshot::Receiver<()> {
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || {
        // An error ends it as well.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = ended.send(());
    });
    end
}
