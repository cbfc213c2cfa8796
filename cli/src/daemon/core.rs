//! The task that owns what the engine's shards share outside of it: the data plane, latches, traps, scripts and VICI's side.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use espintcp::streams::{Streams, Way};
use ike::config::{Child, ConfiguredSelector, DpdAction, StartAction};
use ike::engine::{
    ChildReady, ChildSaId, ChildState, CloseReason, Event, IkeSaId, Initiate, InstallError, Installed, JobOutcome,
    Judge, Target, Transport,
};
use ipsec::guard::ClassId;
use ipsec::plane::{Carrier, DataPlane, Encapsulation, Mode, PlaneError, PlaneEvent, SaPair, Shunt, Trap, Usage};
use ipsec::selector::{Flow, TrafficSelector};
use kernel::network::{Network, NetworkEvent};
use latch::access::Access;
use latch::database::{Bindings, Class, Database, Outranked, ShuntedTraffic};
use latch::protocol::SaInfo;
use pad::Credentials;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::children::{Children, InstalledChild};
use super::definitions::Definitions;
use super::filelog::FileLogs;
use super::idle::Idle;
use super::numbers::Numbers;
use super::redirect;
use super::reqids::{self, Reqids};
use super::settings::Settings;
use super::shards::{FromShard, Shards, ToCore, Wanted, unix_time};
use super::shunts::Shunts;
use super::survey;
use super::tls::TlsClients;
use super::traps::{Key, Traps};
use super::updown::{Scripts, Updown};
use super::virtual_addresses::VirtualAddresses;
use crate::config::ConnectionDefinition;
use crate::config::latches::{self, Pinned};
use crate::config::shunt::ShuntPolicy;
use crate::config::trap::{Selectors, covers};
use crate::control::{Command, Matched, Packets, PolicyKind, PolicyReport, RedirectFilter, SaFilter, SaPage, SaReport};

/// How long a graceful stop waits for the peers' answers to our deletes.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Changes of addresses and routes come in bursts: they are looked at so long after the first.
const ROAM_DELAY: Duration = Duration::from_millis(100);

/// Messages handled in one turn before timers get theirs.
const BUDGET: usize = 64;

/// Child SAs that one trap may have: a peer that wants one for each pair of addresses is not asked without end.
const CHILDREN_OF_A_TRAP: usize = 256;

/// IKE SAs that one answer to `ListSas` looks at: packets wait that long for a front end.
const PAGE: usize = 128;

/// With the kernel's plane `reqid`s that were not configured are greater than this: strongSwan's begin with 1, and SAs with
/// the same `reqid` between the same addresses would stand for each other.
const KERNEL_REQIDS: u32 = 0x4c00_0000;

/// A Child SA that was made for one latched flow ends after so long without a packet, unless configured otherwise.
const NARROW_INACTIVITY: Duration = Duration::from_secs(300);

/// What the core is made of.
pub(super) struct Parts {
    pub(super) shards: Shards,
    pub(super) from_shards: ToCore,
    pub(super) network: Network,
    pub(super) streams: Streams,
    pub(super) database: Arc<Database>,
    pub(super) filelogs: FileLogs,
    pub(super) settings: Settings,
    /// Who may ask for what on the latch socket.
    pub(super) latch_access: watch::Sender<Access>,
    pub(super) virtual_addresses: VirtualAddresses,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) events: broadcast::Sender<Arc<Event>>,
}

/// What comes back from work that was done off the core's task.
struct Resolved {
    token: u64,
    /// Host names are resolved: initiate, or say why not.
    outcome: Result<Initiate, String>,
}

pub(super) struct Core {
    shards: Shards,
    from_shards: ToCore,
    network: Network,
    streams: Streams,
    tls: TlsClients,
    plane: Box<dyn DataPlane>,
    database: Arc<Database>,
    credentials: Arc<Credentials>,
    connections: Definitions,
    filelogs: FileLogs,
    settings: Settings,
    latch_access: watch::Sender<Access>,
    virtual_addresses: VirtualAddresses,
    scripts: Scripts,
    children: Children,
    reqids: Reqids,
    numbers: Numbers,
    traps: Traps,
    shunts: Shunts,
    next_token: u64,
    /// Callers who wait for `Event::Done` or `Event::Failed`.
    waiting: HashMap<u64, oneshot::Sender<Result<(), String>>>,
    /// Attempts for latches, by connection and child; other latches wait for the same one.
    for_latches: HashMap<(String, String), u64>,
    joined: HashMap<u64, Joined>,
    resolved: mpsc::UnboundedSender<Resolved>,
    from_resolved: mpsc::UnboundedReceiver<Resolved>,
    events: broadcast::Sender<Arc<Event>>,
    commands: mpsc::Receiver<Command>,
    /// When changes of addresses and routes are looked at.
    roam_at: Option<Instant>,
    stopping: Option<(oneshot::Sender<()>, Instant)>,
}

impl Core {
    pub(super) fn new(parts: Parts) -> Self {
        let (resolved, from_resolved) = mpsc::unbounded_channel();
        let reqids =
            if parts.network.leaves_esp_to_the_kernel() { Reqids::after(KERNEL_REQIDS) } else { Reqids::default() };
        Self {
            plane: parts.network.plane(),
            shards: parts.shards,
            from_shards: parts.from_shards,
            network: parts.network,
            streams: parts.streams,
            tls: TlsClients::default(),
            database: parts.database,
            credentials: Arc::new(Credentials::default()),
            connections: Definitions::default(),
            filelogs: parts.filelogs,
            settings: parts.settings,
            latch_access: parts.latch_access,
            virtual_addresses: parts.virtual_addresses,
            scripts: Scripts::new(),
            children: Children::default(),
            reqids,
            numbers: Numbers::default(),
            traps: Traps::default(),
            shunts: Shunts::default(),
            next_token: 1,
            waiting: HashMap::new(),
            for_latches: HashMap::new(),
            joined: HashMap::new(),
            resolved,
            from_resolved,
            events: parts.events,
            commands: parts.commands,
            roam_at: Some(Instant::now()),
            stopping: None,
        }
    }

    /// Runs until a `Shutdown` command is carried out, then takes everything down.
    pub(super) async fn run(mut self) -> anyhow::Result<()> {
        let mut ended = Ok(());
        loop {
            if let Some((_, deadline)) = &self.stopping
                && (self.shards.are_empty() || Instant::now() >= *deadline)
            {
                self.catch_up();
                break;
            }
            let wake = self.next_wake();
            tokio::select! {
                Some(wanted) = self.from_shards.wanted.recv() => {
                    self.carry_out(wanted);
                    // A burst is handled in one turn, but never so long that timers starve.
                    for _ in 0..BUDGET {
                        let Ok(wanted) = self.from_shards.wanted.try_recv() else { break };
                        self.carry_out(wanted);
                    }
                }
                Some(event) = self.from_shards.network.recv() => self.handle_network(event),
                Some(task) = self.from_shards.tasks.join_next() => {
                    // Without its shards there is no daemon: fail closed, and say so.
                    ended = task.context("a task of the engine");
                    break;
                }
                Some(resolved) = self.from_resolved.recv() => self.handle_resolved(resolved),
                command = self.commands.recv() => match command {
                    Some(command) => {
                        // What has happened before it is seen by it.
                        self.catch_up();
                        self.handle_command(command);
                    }
                    None => break,
                },
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            self.handle_time();
        }
        self.virtual_addresses.clear(&self.network);
        let outcome = self.plane.shutdown().context("removing SAs and policies");
        self.streams.shutdown().await;
        let network = self.network.shutdown().await.context("closing the network");
        if let Some((reply, _)) = self.stopping.take() {
            let _ = reply.send(());
        }
        self.from_shards.tasks.shutdown().await;
        ended.and(outcome).and(network)
    }

    fn next_wake(&self) -> Instant {
        let idle = Instant::now() + Duration::from_secs(3600);
        let stopping = self.stopping.as_ref().map_or(idle, |(_, deadline)| *deadline);
        let unused = self.children.idle_at().unwrap_or(idle);
        stopping.min(unused).min(self.roam_at.unwrap_or(idle))
    }

    fn handle_time(&mut self) {
        let now = Instant::now();
        while let Some(id) = self.children.next_idle(now) {
            self.close_if_idle(now, id);
        }
        if self.roam_at.is_some_and(|due| due <= now) {
            self.roam_at = None;
            self.roam();
        }
    }

    /// `inactivity`.
    fn close_if_idle(&mut self, now: Instant, id: ChildSaId) {
        let Some(child) = self.children.get_mut(id) else { return };
        let over = self.plane.usage(child.spi_in).is_ok_and(|usage| child.idle.is_over(now, &usage));
        self.children.watch(id);
        if over {
            tracing::info!(child = id.0, "closing a Child SA for inactivity");
            let token = self.token();
            // It may be on its way out already.
            let _ = self.shards.terminate(Target::Child(id), false, token);
        }
    }

    /// How long ago ESP last arrived on one of these Child SAs.
    fn seen_traffic(&self, spis: &[u32]) -> Option<Duration> {
        spis.iter().filter_map(|spi| self.plane.usage(*spi).ok()?.idle_in).min()
    }

    /// Addresses or routes have changed, or we begin.
    fn roam(&mut self) {
        self.network.restore_routes();
        match self.network.local_addresses() {
            Ok(addresses) => self.shards.roam(&addresses),
            Err(error) => tracing::error!(%error, "local addresses cannot be listed"),
        }
    }

    fn handle_network(&mut self, event: NetworkEvent) {
        let now = Instant::now();
        match event {
            NetworkEvent::Plane(PlaneEvent::Acquire { reqid, flow }) => self.acquire(now, reqid, &flow),
            NetworkEvent::Roamed => {
                self.roam_at.get_or_insert(now + ROAM_DELAY);
            }
            // The shards'.
            NetworkEvent::Ike { .. } | NetworkEvent::Unreachable { .. } | NetworkEvent::Plane(_) => {}
        }
    }

    fn handle_resolved(&mut self, Resolved { token, outcome }: Resolved) {
        match outcome {
            Ok(request) => self.shards.initiate(request, self.traps.packet_of(token)),
            Err(reason) => self.finish(token, Err(reason)),
        }
    }

    /// Carries out what the shards have wanted until now.
    fn catch_up(&mut self) {
        for _ in 0..self.from_shards.wanted.len() {
            let Ok(wanted) = self.from_shards.wanted.try_recv() else { break };
            self.carry_out(wanted);
        }
    }

    fn carry_out(&mut self, FromShard { shard, wanted }: FromShard) {
        let came_first = wanted.comes_first();
        match wanted {
            Wanted::Transmit(transmit) => self.shards.world().transmit(&transmit),
            Wanted::Install(job, ready) => {
                let outcome = self.install(*ready);
                self.shards.answer(shard, job, JobOutcome::InstallChild(outcome));
            }
            Wanted::SeenTraffic(job, spis) => {
                let idle = self.seen_traffic(&spis);
                self.shards.answer(shard, job, JobOutcome::SeenTraffic(idle));
            }
            Wanted::Event(event) => self.handle_event(event),
            Wanted::OpenStream { stream, local, remote, dscp, tls, proxy } => {
                let client = tls.map(|peer| self.tls.client(&peer, &self.credentials)).transpose();
                match client {
                    Ok(tls) => self.streams.open_along(stream.0, Way { local, remote, dscp, tls, proxy }),
                    Err(error) => self.shards.stream_failed(shard, stream, &error.to_string()),
                }
            }
            Wanted::CloseStream(stream) => self.streams.close(stream.0),
            Wanted::Initiate(request) if self.stopping.is_none() => self.shards.initiate_again(*request),
            Wanted::Initiate(_) => {}
        }
        self.shards.done(shard, came_first);
    }

    /// Asks the latches, then installs: a latch that the new SA would betray is broken, and its holder told,
    /// before the data plane knows the SA (RFC 5660 §2.3).
    fn install(&mut self, mut ready: ChildReady) -> Result<Installed, InstallError> {
        let class = self.database.intern(Class {
            peer: Arc::clone(&ready.peer),
            mode: ready.pair.mode,
            suite: ready.pair.suite,
            replay_protection: ready.pair.replay_window > 0,
        });
        let old = ready.replaces.and_then(|old| self.children.get(old));
        ready.pair.options = {
            let config = &ready.config;
            self.numbers.number(ready.ike_sa, &config.options, config.numbering, old.map(|old| old.tags))
        };
        let tags = ready.pair.options.tags();
        let (reqid, key) = self.reqid(class, &ready)?;
        let assigned = self.virtual_addresses.of(ready.ike_sa);
        let updown = Updown::new(&ready, reqid, self.network.tun_name(), assigned);
        let additional_ts = ready.additional_ts
            || ready.replaces.and_then(|old| self.children.get(old)).is_some_and(|old| old.additional_ts);
        let predecessor = ready.replaces.and_then(|old| self.children.get_mut(old));
        let idle = Idle::new(Instant::now(), ready.config.inactivity, predecessor.map(|old| &mut old.idle));
        let ChildReady { child_sa, connection, config, mut pair, channel_binding, endpoint_keys, .. } = ready;
        self.database.bound(child_sa.0, Bindings { unique: channel_binding, keys: endpoint_keys });
        pair.class = class;
        pair.reqid = reqid;
        // First, so that no latch stands up in between that the newcomer would betray.
        self.end_outranked(class, &pair);
        let asked = self.database.before_install(class, &pair.local_ts, &pair.remote_ts);
        for alert in asked.map_err(|outranked| self.refuse_outranked(child_sa, &outranked))? {
            tracing::warn!(latch = alert.latch.0, reason = alert.reason, "latch broken");
        }
        let spi_in = pair.spi_in;
        let installed = InstalledChild {
            spi_in: pair.spi_in,
            class,
            reqid,
            tags,
            name: config.name.as_str().into(),
            connection: connection.into(),
            local_ts: pair.local_ts.clone(),
            remote_ts: pair.remote_ts.clone(),
            additional_ts,
            idle,
            updown,
            told_up: false,
        };
        if let Encapsulation::Stream { stream, .. } = pair.encapsulation {
            self.streams.vouch(stream.0);
        }
        self.plane.install(pair).map_err(|error| {
            // What broke for it may be whole again.
            self.database.removed(child_sa.0);
            tracing::error!(%error, "a Child SA could not be installed");
            InstallError::Failed(error.to_string())
        })?;
        let known = self.database.installed(child_sa.0, class, installed.local_ts.clone(), installed.remote_ts.clone());
        if let Err(outranked) = known {
            if let Err(error) = self.plane.delete(spi_in) {
                tracing::error!(%error, "removing a Child SA");
            }
            return Err(self.refuse_outranked(child_sa, &outranked));
        }
        self.reqids.installed(reqid, class, key);
        self.numbers.installed(&tags);
        self.children.insert(child_sa, installed);
        Ok(Installed { reqid, tags })
    }

    /// Ends what nobody in particular has of the traffic of a peer that has proved who it is, before that one's SA goes in.
    fn end_outranked(&mut self, class: ClassId, pair: &SaPair) {
        for child in self.database.outranked(class, &pair.local_ts, &pair.remote_ts).into_iter().map(ChildSaId) {
            if let Some(installed) = self.children.get(child) {
                let (connection, child) = (&installed.connection, &installed.name);
                tracing::info!(%connection, %child, "ended: somebody who has proved who it is has come for its traffic");
            }
            // At once; its peer hears of it when its IKE SA gets to it.
            self.remove(child);
            let token = self.token();
            if self.shards.terminate(Target::Child(child), true, token).is_err() {
                tracing::debug!(child = child.0, "a Child SA that has to go is gone already");
            }
        }
    }

    /// An SA of nobody in particular does not take what belongs to somebody (RFC 7619 §3.3).
    fn refuse_outranked(&self, child: ChildSaId, outranked: &Outranked) -> InstallError {
        self.database.removed(child.0);
        tracing::warn!(%outranked, "a Child SA is refused");
        InstallError::Refused(outranked.to_string())
    }

    /// The `reqid` for a Child SA: its predecessor's if the class is the same, the configured one, or one that stands for
    /// what comes with it. Each `reqid` belongs to one class.
    fn reqid(&mut self, class: ClassId, ready: &ChildReady) -> Result<(u32, Option<reqids::Key>), InstallError> {
        if let Some(old) = ready.replaces.and_then(|old| self.children.get(old))
            && old.class == class
        {
            return Ok((old.reqid, None));
        }
        let config = &ready.config;
        if config.reqid != 0 {
            if self.reqids.class_of(config.reqid).is_some_and(|other| other != class) {
                return Err(InstallError::Refused(format!(
                    "reqid {} is in use for another peer or protection",
                    config.reqid
                )));
            }
            return Ok((config.reqid, None));
        }
        let (local_ts, remote_ts) = (ready.pair.local_ts.clone(), ready.pair.remote_ts.clone());
        let key =
            reqids::Key { class, child: config.name.clone(), tags: ready.pair.options.tags(), local_ts, remote_ts };
        let reqid = self.reqids.of(&key).unwrap_or_else(|| self.reqids.fresh());
        Ok((reqid, Some(key)))
    }

    /// Makes the XFRM interfaces that the connections want, and removes the others.
    fn update_xfrm_interfaces(&mut self) {
        let mut wanted = BTreeMap::new();
        for definition in self.connections.all() {
            let Some((name, if_id)) = &definition.xfrm_interface else { continue };
            if *wanted.entry(name.clone()).or_insert(*if_id) != *if_id {
                let connection = &definition.connection.name;
                tracing::error!(connection, name, if_id, "another connection has this interface with another if_id");
            }
        }
        for (name, error) in self.network.set_xfrm_interfaces(&wanted) {
            tracing::error!(name, %error, "an XFRM interface could not be made or removed");
        }
    }

    /// Puts in force what the connections want: new shunts first, so that nothing escapes one that drops in between.
    fn update_shunts(&mut self) {
        let wanted = self.shunts.wanted(self.connections.all());
        for (key, policy) in &wanted {
            if !self.shunts.is_installed(key, policy)
                && let Err(error) = self.install_shunt(key.clone(), policy.clone())
            {
                tracing::error!(connection = key.0, child = key.1, %error, "a shunt could not be installed");
            }
        }
        for number in self.shunts.keep(|key| wanted.contains_key(key)) {
            self.remove_shunt(number);
        }
    }

    /// Installs a shunt in place of the earlier one of its name, which on error stays.
    fn install_shunt(&mut self, key: Key, policy: ShuntPolicy) -> Result<(), PlaneError> {
        let number = self.shunts.fresh();
        let ShuntPolicy { action, local_ts, remote_ts, options } = policy.clone();
        // Latches first: their holders hear of it before anything is done otherwise (RFC 5660 §2.3).
        let (name, ours, theirs) = (key.1.clone(), local_ts.clone(), remote_ts.clone());
        self.database.shunted(number, ShuntedTraffic { name, action, local_ts: ours, remote_ts: theirs });
        let installed = self.plane.install_shunt(Shunt { number, action, local_ts, remote_ts, options });
        installed.inspect_err(|_| self.database.unshunted(number))?;
        tracing::info!(connection = key.0, child = key.1, ?action, "shunt installed");
        if let Some(old) = self.shunts.insert(key, number, policy) {
            self.remove_shunt(old);
        }
        Ok(())
    }

    fn remove_shunt(&mut self, number: u32) {
        match self.plane.remove_shunt(number) {
            Ok(()) => tracing::info!(number, "shunt removed"),
            Err(error) => tracing::error!(%error, "a shunt could not be removed"),
        }
        self.database.unshunted(number);
    }

    /// The `install` command for a shunt; `None` when none is called so.
    fn install_shunt_of(&mut self, ike: Option<&str>, name: &str) -> Option<Result<(), String>> {
        let (key, policy) = self.connections.shunt(ike, name)?;
        if self.shunts.is_installed(&key, &policy) {
            return Some(Ok(()));
        }
        Some(self.install_shunt(key, policy).map_err(|error| {
            tracing::warn!(child = name, %error, "the shunt cannot be installed");
            format!("installing policy '{name}' failed")
        }))
    }

    /// Puts in force what the connections want: new traps first, so that nothing goes out in clear in between.
    fn update_traps(&mut self) {
        let wanted = self.traps.wanted(self.connections.all());
        for (key, selectors) in &wanted {
            if self.traps.installed(key).is_some_and(|installed| installed.selectors == *selectors) {
                continue;
            }
            if let Err(error) = self.install_trap(key.clone(), selectors.clone()) {
                tracing::error!(connection = key.0, child = key.1, %error, "a trap could not be installed");
            }
        }
        for reqid in self.traps.keep(|key| wanted.contains_key(key)) {
            self.remove_trap(reqid);
        }
    }

    /// Installs a trap in place of the child's earlier one, which on error stays.
    fn install_trap(&mut self, key: Key, selectors: Selectors) -> Result<(), PlaneError> {
        let reqid = self.reqids.fresh();
        let Selectors { local_ts, remote_ts, options } = selectors.clone();
        self.plane.install_trap(Trap { reqid, local_ts, remote_ts, options })?;
        self.reqids.trap(reqid, true);
        tracing::info!(connection = key.0, child = key.1, reqid, "trap installed");
        if let Some(old) = self.traps.insert(key, reqid, selectors) {
            self.remove_trap(old.reqid);
        }
        Ok(())
    }

    fn remove_trap(&mut self, reqid: u32) {
        self.reqids.trap(reqid, false);
        match self.plane.remove_trap(reqid) {
            Ok(()) => tracing::info!(reqid, "trap removed"),
            Err(error) => tracing::error!(%error, "a trap could not be removed"),
        }
    }

    /// The `install` command, and what `close_action` and `dpd_action` do; errors are charon's.
    fn install_trap_of(&mut self, ike: Option<&str>, child: &str) -> Result<(), String> {
        let Ok((definition, Some(config))) = self.connections.find(ike, Some(child)) else {
            return Err("configuration name not found".to_owned());
        };
        let key = (definition.connection.name.clone(), config.name.clone());
        let installed =
            Selectors::of(&config, &definition.local_addrs, &definition.remote_addrs).and_then(|selectors| match self
                .traps
                .installed(&key)
            {
                Some(there) if there.selectors == selectors => Ok(()),
                _ => self.install_trap(key.clone(), selectors).map_err(|error| error.to_string()),
            });
        installed.map_err(|reason| {
            tracing::warn!(connection = key.0, child, reason, "the trap cannot be installed");
            format!("installing policy '{child}' failed")
        })
    }

    fn uninstall(&mut self, ike: Option<&str>, child: &str) -> Result<(), String> {
        if let Some(number) = self.shunts.uninstall(ike, child) {
            self.remove_shunt(number);
            return Ok(());
        }
        let reqid = self.traps.uninstall(ike, child).ok_or_else(|| format!("policy '{child}' not found"))?;
        self.remove_trap(reqid);
        Ok(())
    }

    fn policies(&self) -> Vec<PolicyReport> {
        let shunts = self.shunts.all_installed().map(|(key, shunt)| PolicyReport {
            ike: key.0.clone(),
            child: key.1.clone(),
            kind: PolicyKind::Shunt(shunt.action),
            local_ts: shunt.local_ts.clone(),
            remote_ts: shunt.remote_ts.clone(),
        });
        let traps = self.traps.all_installed().map(|(key, trap)| PolicyReport {
            ike: key.0.clone(),
            child: key.1.clone(),
            kind: PolicyKind::Trap(self.connections.child(&key.0, &key.1).map_or(Mode::Tunnel, |child| child.mode)),
            local_ts: trap.selectors.local_ts.clone(),
            remote_ts: trap.selectors.remote_ts.clone(),
        });
        shunts.chain(traps).collect()
    }

    /// A packet fell into a trap.
    fn acquire(&mut self, now: Instant, reqid: u32, flow: &Flow) {
        let Some((connection, child)) = self.traps.due(now, reqid) else { return };
        if self.stopping.is_some() || self.is_negotiated(&connection, &child, flow) {
            return;
        }
        tracing::info!(connection, child, %flow, "initiating for a packet");
        self.initiate_for(Some(&connection), Some(&child), Some(*flow), None);
    }

    /// True while the connection's IKE SA is on its way (what is asked for later comes after it), when there is an SA for
    /// the packet, and when there is one for the child that the peer narrowed without a word of others
    /// (ADDITIONAL_TS_POSSIBLE, RFC 7296 §2.9): another one would not cover the packet either.
    fn is_negotiated(&self, connection: &str, child: &str, packet: &Flow) -> bool {
        if self.shards.is_initiating(connection) {
            return true;
        }
        let live = |id: ChildSaId| match self.shards.child_state(id) {
            Some(ChildState::Created | ChildState::Installing | ChildState::Installed | ChildState::Rekeying) => true,
            Some(ChildState::Rekeyed | ChildState::Deleting | ChildState::Deleted) | None => false,
        };
        let mut made = 0;
        for (_, installed) in self.children.of(connection, child).rev().filter(|(id, _)| live(*id)) {
            made += 1;
            let covered = covers(&installed.local_ts, &installed.remote_ts, packet);
            if !installed.additional_ts || covered || made >= CHILDREN_OF_A_TRAP {
                return true;
            }
        }
        false
    }

    fn remove(&mut self, child: ChildSaId) {
        let Some(installed) = self.children.remove(child) else { return };
        if installed.told_up
            && let Some(updown) = installed.updown.clone()
        {
            self.scripts.tell("down", updown);
        }
        if let Err(error) = self.plane.delete(installed.spi_in) {
            tracing::error!(%error, "a Child SA could not be removed");
        }
        self.database.removed(child.0);
        self.reqids.removed(installed.reqid);
        self.numbers.removed(&installed.tags);
    }

    fn handle_event(&mut self, event: Event) {
        match &event {
            Event::IkeUp(id) => {
                if let Some(status) = self.shards.ike_sa(*id)
                    && let Transport::Stream(stream) = status.path.transport
                {
                    self.streams.vouch(stream.0);
                }
            }
            Event::Migrate { spi_in, to } => {
                if let Encapsulation::Stream { stream, .. } = to {
                    self.streams.vouch(stream.0);
                }
                if let Err(error) = self.plane.migrate(*spi_in, *to) {
                    tracing::error!(%error, "a Child SA could not be moved to a new address");
                }
            }
            Event::ChildRetired { spi_in } => {
                if let Err(error) = self.plane.retire(*spi_in) {
                    tracing::error!(%error, "a replaced Child SA could not be retired");
                }
            }
            Event::ChildDown { child, reason, .. } => {
                let connection = self.children.get(child.id).map(|installed| Arc::clone(&installed.connection));
                let name = child.name.clone();
                let reason = *reason;
                // The trap first: nothing goes out in clear in between.
                if let Some(connection) = &connection {
                    self.trap_if_configured(connection, &name, reason);
                }
                let class = self.children.get(child.id).map(|installed| installed.class);
                self.remove(child.id);
                match (class, reason) {
                    (Some(class), CloseReason::Timeout) => self.database.peer_is_dead(class),
                    (Some(class), CloseReason::Restarted) => self.database.peer_restarted(class),
                    _ => {}
                }
                if let Some(connection) = connection {
                    self.restart_if_configured(&connection, &name, reason);
                }
            }
            Event::Done { token } => self.finish(*token, Ok(())),
            Event::Failed { token, reason, connection, child } => {
                tracing::info!(connection, child, reason, "initiation failed");
                if let Some(token) = token {
                    self.finish(*token, Err(reason.clone()));
                }
            }
            Event::Log { group, level, ike_sa, message } => {
                self.filelogs.write(group, *level, ike_sa.as_ref(), message);
                let (id, connection) = match ike_sa {
                    Some((id, connection)) => (Some(id.0), Some(connection.as_str())),
                    None => (None, None),
                };
                match level {
                    // charon's level 0 is its audit trail, not a warning.
                    ..=1 => tracing::info!(group, connection, id, "{message}"),
                    2 => tracing::debug!(group, connection, id, "{message}"),
                    _ => tracing::trace!(group, connection, id, "{message}"),
                }
            }
            Event::ChildUp(_, id) => {
                if let Some(child) = self.children.get_mut(*id) {
                    child.told_up = true;
                    if let Some(updown) = child.updown.clone() {
                        self.scripts.tell("up", updown);
                    }
                }
            }
            // Neither up nor down: from now on the successor is what will have gone down.
            Event::ChildRekeyed { old, new, .. } => {
                for (id, told_up) in [(old, false), (new, true)] {
                    if let Some(child) = self.children.get_mut(*id) {
                        child.told_up = told_up;
                    }
                }
            }
            Event::Assigned(id, assigned) => {
                let peer = self.shards.ike_sa(*id).and_then(|sa| sa.remote_id);
                let peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
                self.virtual_addresses.assigned(&self.network, *id, Arc::clone(assigned), &peer);
            }
            Event::IkeDown(status, _) => {
                self.virtual_addresses.ended(&self.network, status.id);
                self.numbers.ended(status.id);
            }
            Event::IkeRekeyed { old, new } => {
                self.virtual_addresses.rekeyed(*old, *new);
                self.numbers.rekeyed(*old, *new);
            }
        }
        // Nobody listening is fine.
        let _ = self.events.send(Arc::new(event));
    }

    /// `close_action` and `dpd_action`, as far as they are traps.
    fn trap_if_configured(&mut self, connection: &str, child: &str, reason: CloseReason) {
        let Some(config) = self.connections.child(connection, child) else { return };
        let wanted = match reason {
            CloseReason::Peer => self.connections.traps(connection, child).close,
            CloseReason::Timeout => config.dpd_action == DpdAction::Trap,
            CloseReason::Local
            | CloseReason::Rekeyed
            | CloseReason::Failed
            | CloseReason::Expired
            | CloseReason::Replaced
            | CloseReason::Restarted => false,
        };
        if wanted && self.stopping.is_none() {
            // What is wrong has been logged.
            let _ = self.install_trap_of(Some(connection), child);
        }
    }

    /// `close_action` and `dpd_action`, as far as they initiate.
    fn restart_if_configured(&mut self, connection: &str, child: &str, reason: CloseReason) {
        if self.stopping.is_some() {
            return;
        }
        let Some(config) = self.connections.child(connection, child) else { return };
        let again = match reason {
            CloseReason::Peer => config.close_action == StartAction::Start,
            CloseReason::Timeout => config.dpd_action == DpdAction::Restart,
            CloseReason::Local
            | CloseReason::Rekeyed
            | CloseReason::Failed
            | CloseReason::Expired
            | CloseReason::Replaced
            | CloseReason::Restarted => false,
        };
        if again {
            self.initiate(Some(connection), Some(child), None);
        }
    }

    fn finish(&mut self, token: u64, outcome: Result<(), String>) {
        let well = outcome.is_ok()
            && self.traps.trap_of(token).is_none_or(|(connection, child, packet)| {
                let newest = self.children.of(connection, child).rev().take(CHILDREN_OF_A_TRAP);
                newest.into_iter().any(|(_, child)| covers(&child.local_ts, &child.remote_ts, &packet))
            });
        self.traps.ended(Instant::now(), token, well);
        if let Some(reply) = self.waiting.remove(&token) {
            // The caller may have given up waiting.
            let _ = reply.send(outcome.clone());
        }
        if let Some(Joined { of, flows }) = self.joined.remove(&token) {
            self.for_latches.remove(&of);
            for (flow, reply) in flows.into_iter().filter(|(_, reply)| !reply.is_closed()) {
                // What the peer has narrowed may be for others only.
                if outcome.is_ok() && self.database.is_uncovered(&flow) {
                    self.initiate_for_latch(&flow, false, reply);
                } else {
                    let _ = reply.send(outcome.clone());
                }
            }
        }
    }

    fn handle_command(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::ListSas { filter, after, reply } => {
                let _ = reply.send(self.page(&filter, after));
            }
            Command::CountSas(reply) => {
                let (all, half_open) = self.shards.counts();
                let _ = reply.send((all, half_open + self.shards.initiating()));
            }
            Command::CountPackets(reply) => {
                let (dropped, automatic) = (self.network.drops(), self.database.automatic_flows());
                let _ = reply.send(Packets { dropped, automatic });
            }
            Command::Initiate { ike, child, reply } => self.initiate(ike.as_deref(), child.as_deref(), Some(reply)),
            Command::InitiateFlow { flow, narrow, reply } => self.initiate_for_latch(&flow, narrow, reply),
            Command::Survey { flow, children, reply } => {
                let told = children.iter().filter_map(|child| self.survey(&flow, *child));
                let _ = reply.send(told.collect());
            }
            Command::Terminate { filter, force, reply } => self.terminate(&filter, force, reply),
            Command::Rekey { filter, reauth, reply } => {
                let targets = self.targets(&filter);
                let mut done = 0;
                for target in &targets {
                    let token = self.token();
                    done += usize::from(match *target {
                        Target::Ike(id) if reauth => self.shards.reauthenticate(id, token).is_ok(),
                        target => self.shards.rekey(target, token).is_ok(),
                    });
                }
                let _ = reply.send(Matched { matches: targets.len(), done });
            }
            Command::Redirect { filter, gateway, reply } => {
                let meant = self.redirected(&filter);
                let mut done = 0;
                for id in &meant {
                    let token = self.token();
                    done += usize::from(self.shards.redirect(*id, gateway.clone(), token).is_ok());
                }
                let _ = reply.send(Matched { matches: meant.len(), done });
            }
            Command::ListPolicies(reply) => {
                let _ = reply.send(self.policies());
            }
            Command::Install { ike, child, reply } => {
                let shunt = self.install_shunt_of(ike.as_deref(), &child);
                let _ = reply.send(shunt.unwrap_or_else(|| self.install_trap_of(ike.as_deref(), &child)));
            }
            Command::Uninstall { ike, child, reply } => {
                let _ = reply.send(self.uninstall(ike.as_deref(), &child));
            }
            Command::LoadPool(pool, reply) => {
                let loaded = self.shards.ask(|engine| engine.load_pool(*pool));
                let _ = reply.send(loaded.unwrap_or(Ok(())));
            }
            Command::UnloadPool(name, reply) => {
                let unloaded = self.shards.ask(|engine| engine.unload_pool(&name));
                let _ = reply.send(unloaded.unwrap_or(Ok(())));
            }
            Command::Counters(of, reply) => {
                let _ = reply.send(self.shards.ask(|engine| of.read(engine.counters())).unwrap_or_default());
            }
            Command::ResetCounters(of, reply) => {
                self.shards.ask(|engine| of.reset(engine.counters()));
                let _ = reply.send(());
            }
            Command::ListPools(reply) => {
                let _ = reply.send(self.shards.ask(|engine| engine.pools()).unwrap_or_default());
            }
            Command::SetConnections(connections, reply) => {
                // Latches first: their holders hear of it before anything is done otherwise (RFC 5660 §2.3).
                self.database.policy_changed(|flow, class| {
                    let (peer, local, mode) = (&class.peer.id, &class.peer.local_id, class.mode);
                    let suite = (class.suite.encr, class.suite.key_bits, class.suite.integ);
                    latches::conflict(&connections, &Pinned { flow, peer, local, mode, suite })
                });
                let negotiated = connections.iter().filter(|known| !known.is_for_shunts_alone());
                let negotiated: Vec<_> = negotiated.map(|known| Arc::clone(&known.connection)).collect();
                self.shards.change(|engine, first, _| match first {
                    Some(first) => engine.set_connections_of(first),
                    None => engine.set_connections(negotiated.clone()),
                });
                let children = connections.iter().flat_map(|known| &known.connection.children);
                let options = || children.clone().map(|child| child.options.tags());
                self.numbers.configure(
                    options().flat_map(|tags| [tags.mark_in.value, tags.mark_out.value]).collect(),
                    options().flat_map(|tags| [tags.if_id_in, tags.if_id_out]).collect(),
                );
                self.reqids.configure(children.map(|child| child.reqid).filter(|reqid| *reqid != 0).collect());
                self.connections = Definitions::new(connections);
                self.update_xfrm_interfaces();
                self.update_shunts();
                self.update_traps();
                let _ = reply.send(());
            }
            Command::SetCredentials(credentials, reply) => {
                let are_others = !credentials.is_same_as(&self.credentials);
                let has_other_lists = credentials.crls() != self.credentials.crls();
                self.credentials = Arc::new(*credentials);
                let credentials = &self.credentials;
                let of_judge = Arc::clone(credentials);
                let judge: Judge = Arc::new(move |peer, chain| of_judge.revoked(peer, chain, unix_time()));
                self.shards.change(|engine, _, of_shard| {
                    engine.set_authority_hashes(credentials.authority_hashes());
                    engine.set_ppks(credentials.ppks());
                    engine.set_judge(Arc::clone(&judge));
                    if are_others {
                        engine.forget_tickets();
                    }
                    *of_shard = Arc::clone(credentials);
                });
                self.tls.forget();
                if has_other_lists {
                    // One by one: a shard has other things to do in between.
                    let all = self.shards.ike_sas_after(None, IkeSaId(0), usize::MAX);
                    all.into_iter().for_each(|id| self.shards.review(id));
                }
                let _ = reply.send(());
            }
            Command::ReloadSettings(reply) => {
                let outcome = self.settings.reload().map(|config| {
                    self.shards.change(|engine, _, _| engine.set_config(config.engine.clone()));
                    self.filelogs = FileLogs::open(config.file_logs.clone());
                    self.latch_access.send_replace(config.latch_access.clone());
                });
                let _ = reply.send(outcome);
            }
            Command::Shutdown(reply) => {
                let all = self.shards.ike_sas_after(None, IkeSaId(0), usize::MAX);
                for id in all {
                    let token = self.token();
                    // One that ended with another does not matter.
                    let _ = self.shards.terminate(Target::Ike(id), false, token);
                }
                self.stopping = Some((reply, now + SHUTDOWN_GRACE));
            }
        }
    }

    fn token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    /// Snapshots of some of the IKE SAs that a filter means.
    fn page(&self, filter: &SaFilter, after: IkeSaId) -> SaPage {
        let one = filter.ike_id.or_else(|| self.shards.owner(filter.child_id?));
        let mut ids: Vec<IkeSaId> = match one {
            Some(id) => Vec::from([id]),
            None if filter.child_id.is_some() => Vec::new(),
            None => self.shards.ike_sas_after(filter.ike.as_deref(), after, PAGE + 1),
        };
        let more = ids.len() > PAGE;
        ids.truncate(PAGE);
        let next = ids.last().copied().filter(|_| more);
        let statuses = ids.into_iter().filter_map(|id| self.shards.ike_sa(id));
        let reports = statuses.filter(|status| filter.selects(status)).map(|status| {
            let usage = status.children.iter().map(|child| self.usage(child.id)).collect();
            let if_ids = self.numbers.of(status.id).unwrap_or_else(|| self.connections.if_ids(&status.connection));
            SaReport { status, usage, if_ids }
        });
        SaPage { reports: reports.collect(), next }
    }

    /// A Child SA and its IKE SA as applications are told of them (RFC 5660 §2).
    fn survey(&self, flow: &Flow, child: ChildSaId) -> Option<SaInfo> {
        let status = self.shards.ike_sa(self.shards.owner(child)?)?;
        let reserved = |peer: &_| latches::is_reserved(self.connections.all(), peer, flow.remote);
        survey::tell(&status, child, flow.remote, reserved, |stream| self.streams.is_tls(stream))
    }

    fn usage(&self, child: ChildSaId) -> Option<(Usage, Carrier)> {
        let installed = self.children.get(child)?;
        Some((self.plane.usage(installed.spi_in).ok()?, self.plane.carrier(installed.spi_in)))
    }

    /// SAs that a filter means: Child SAs if it names one, IKE SAs otherwise.
    fn targets(&self, filter: &SaFilter) -> Vec<Target> {
        let children: Vec<ChildSaId> = match (filter.child_id, &filter.child) {
            (Some(id), _) => Vec::from([id]),
            (None, Some(name)) => self.children.named(name).collect(),
            (None, None) => {
                let connection = filter.ike.as_deref();
                let Some(id) = filter.ike_id else {
                    let all = self.shards.ike_sas_after(connection, IkeSaId(0), usize::MAX);
                    return all.into_iter().map(Target::Ike).collect();
                };
                let is_meant = connection.is_none_or(|connection| self.shards.is_of(id, connection));
                // If there is none of this number, that is found out when it is to be ended.
                return is_meant.then_some(Target::Ike(id)).into_iter().collect();
            }
        };
        let is_meant = |id: &ChildSaId| {
            let Some(child) = self.children.get(*id) else { return false };
            let live = !matches!(
                self.shards.child_state(*id),
                None | Some(ChildState::Rekeyed | ChildState::Deleting | ChildState::Deleted)
            );
            live && filter.child.as_ref().is_none_or(|name| *name == *child.name)
                && filter.ike.as_ref().is_none_or(|name| *name == *child.connection)
                && filter.ike_id.is_none_or(|ike_id| self.shards.owner(*id) == Some(ike_id))
        };
        children.into_iter().filter(is_meant).map(Target::Child).collect()
    }

    /// IKE SAs that are up and that a filter means.
    fn redirected(&self, filter: &RedirectFilter) -> Vec<IkeSaId> {
        let meant = |id: IkeSaId| self.shards.ike_sa(id).filter(|status| redirect::means(filter, status));
        match filter.ike_id {
            Some(id) => meant(id).map(|status| status.id).into_iter().collect(),
            None => {
                let all = self.shards.ike_sas_after(filter.ike.as_deref(), IkeSaId(0), usize::MAX);
                all.into_iter().filter_map(meant).map(|status| status.id).collect()
            }
        }
    }

    fn terminate(&mut self, filter: &SaFilter, force: bool, reply: oneshot::Sender<Matched>) {
        let targets = self.targets(filter);
        let mut answers = Vec::new();
        for target in &targets {
            let token = self.token();
            let (sender, answer) = oneshot::channel();
            if self.shards.terminate(*target, force, token).is_ok() {
                self.waiting.insert(token, sender);
                answers.push(answer);
            }
        }
        let matches = targets.len();
        tokio::spawn(async move {
            let mut done = 0;
            for answer in answers {
                done += usize::from(matches!(answer.await, Ok(Ok(()))));
            }
            let _ = reply.send(Matched { matches, done });
        });
    }

    fn initiate(&mut self, ike: Option<&str>, child: Option<&str>, reply: Option<oneshot::Sender<Result<(), String>>>) {
        self.initiate_for(ike, child, None, reply);
    }

    /// Initiates the child that is for a flow, with the flow first among its selectors or, if `narrow`, alone. A narrow
    /// Child SA goes when nobody uses it any more. If that child is on its way for another latch, and not narrow, waits for it.
    fn initiate_for_latch(&mut self, flow: &Flow, narrow: bool, reply: oneshot::Sender<Result<(), String>>) {
        let Some((definition, child)) = latches::child_for(self.connections.all(), flow) else {
            let _ = reply.send(Err(format!("no connection has a child for {flow}")));
            return;
        };
        let of = (definition.connection.name.clone(), child.name.clone());
        let under_way = self.for_latches.get(&of).filter(|_| !narrow);
        if let Some(joined) = under_way.and_then(|token| self.joined.get_mut(token)) {
            joined.flows.push((*flow, reply));
            return;
        }
        let (definition, mut child) = (definition.clone(), Arc::clone(child));
        if narrow {
            let (local, remote) = TrafficSelector::of_flow(flow);
            let narrowed = Arc::make_mut(&mut child);
            narrowed.local_ts = vec![ConfiguredSelector::Fixed(local)];
            narrowed.remote_ts = vec![ConfiguredSelector::Fixed(remote)];
            // A configured one stands for other selectors.
            narrowed.reqid = 0;
            if narrowed.inactivity.is_zero() {
                narrowed.inactivity = NARROW_INACTIVITY;
            }
        }
        let token = self.token();
        self.waiting.insert(token, reply);
        if !narrow {
            self.for_latches.insert(of.clone(), token);
            self.joined.insert(token, Joined { of, flows: Vec::new() });
        }
        self.begin(token, definition, Some(child), Some(*flow));
    }

    /// Initiates, perhaps for a packet that fell into a trap.
    fn initiate_for(
        &mut self,
        ike: Option<&str>,
        child: Option<&str>,
        packet: Option<Flow>,
        reply: Option<oneshot::Sender<Result<(), String>>>,
    ) {
        let token = self.token();
        if let Some(reply) = reply {
            self.waiting.insert(token, reply);
        }
        let (definition, child) = match self.connections.find(ike, child) {
            Ok(found) => found,
            Err(reason) => return self.finish(token, Err(reason)),
        };
        self.begin(token, definition, child, packet);
    }

    fn begin(&mut self, token: u64, definition: ConnectionDefinition, child: Option<Arc<Child>>, packet: Option<Flow>) {
        let child_name = child.as_ref().map(|child| child.name.as_str());
        self.traps.begun(Instant::now(), token, &definition.connection.name, child_name, packet);
        let network = self.network.clone();
        let resolved = self.resolved.clone();
        tokio::spawn(async move {
            let outcome = resolve(&definition, &network).await.map(|(local, remote)| Initiate {
                connection: definition.connection,
                child,
                local,
                remote,
                token,
            });
            let _ = resolved.send(Resolved { token, outcome });
        });
    }
}

/// Latches that wait for an attempt which another one began.
struct Joined {
    of: (String, String),
    flows: Vec<(Flow, oneshot::Sender<Result<(), String>>)>,
}

/// Our address and the peer's for a connection: the first usable of `remote_addrs`, names looked up, and the
/// configured or routed source towards it.
async fn resolve(definition: &ConnectionDefinition, network: &Network) -> Result<(IpAddr, IpAddr), String> {
    let name = &definition.connection.name;
    let mut remote = None;
    for text in &definition.remote_addrs {
        if let Ok(address) = text.parse::<IpAddr>() {
            remote = Some(address);
        } else if !text.starts_with('%') && !text.contains(['/', '-']) {
            let found = tokio::net::lookup_host((text.as_str(), 0)).await;
            match found.map(|mut addresses| addresses.next()) {
                Ok(Some(address)) => remote = Some(address.ip()),
                Ok(None) => tracing::warn!(connection = name, host = text, "the name has no address"),
                Err(error) => tracing::warn!(connection = name, host = text, %error, "the name cannot be resolved"),
            }
        }
        if remote.is_some() {
            break;
        }
    }
    let Some(remote) = remote else {
        return Err(format!(
            "connection '{name}' has no remote address to initiate to: set remote_addrs to an address or a host name"
        ));
    };
    if let Some(local) = definition.local_addrs.iter().find_map(|text| {
        text.parse::<IpAddr>().ok().filter(|local| local.is_ipv4() == remote.is_ipv4() && !local.is_unspecified())
    }) {
        return Ok((local, remote));
    }
    let local = network.source_address(remote).map_err(|error| format!("there is no route to {remote}: {error}"))?;
    Ok((local, remote))
}
