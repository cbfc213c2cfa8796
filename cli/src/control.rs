//! The daemon's core as its front ends (VICI, start-up) see it.

use std::sync::Arc;

use ike::config::AddressRange;
use ike::counters::{Counter, Counters};
use ike::engine::{ChildSaId, Event, Gateway, IkeSaId, IkeSaStatus};
use ike::pool::{PoolConfig, PoolError, PoolStatus};
use ipsec::datapath::DropReason;
use ipsec::plane::{Carrier, Mode, ShuntAction, Usage};
use ipsec::selector::{Flow, TrafficSelector};
use latch::database::AutomaticFlows;
use latch::protocol::SaInfo;
use pad::{Credentials, IdentityPattern};
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::config::ConnectionDefinition;

/// Packets of user space's ESP.
#[derive(Clone, Debug, Default)]
pub struct Packets {
    /// How many it dropped, by reason.
    pub dropped: Vec<(DropReason, u64)>,
    /// What became of those of flows that are latched of themselves, with `latch_flows`.
    pub automatic: Option<AutomaticFlows>,
}

/// A snapshot of one IKE SA with the traffic counters of its Child SAs, in the order of
/// `status.children`.
#[derive(Clone, Debug)]
pub struct SaReport {
    /// The engine's view.
    pub status: IkeSaStatus,
    /// Counters and the data plane, for each child that is installed.
    pub usage: Vec<Option<(Usage, Carrier)>>,
    /// XFRM interfaces of its connection, or that the IKE SA has of its own: inbound, outbound; 0 is none.
    pub if_ids: (u32, u32),
}

/// What an installed policy without an SA is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// It waits for an SA of this mode.
    Trap(Mode),
    /// It needs none.
    Shunt(ShuntAction),
}

/// An installed trap or shunt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyReport {
    /// Connection.
    pub ike: String,
    /// Child.
    pub child: String,
    /// What it is for.
    pub kind: PolicyKind,
    /// Our side's selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer side's selectors.
    pub remote_ts: Vec<TrafficSelector>,
}

/// Some of the IKE SAs, by number.
#[derive(Clone, Debug, Default)]
pub struct SaPage {
    /// Those that the filter means.
    pub reports: Vec<SaReport>,
    /// There may be more after this one.
    pub next: Option<IkeSaId>,
}

/// Counts of messages and rekeys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CounterReport {
    /// Of this connection; `None` is all together.
    pub connection: Option<String>,
    /// In charon's order.
    pub counts: Vec<(Counter, u64)>,
}

/// Whose counts a command means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Counted {
    /// All together.
    Total,
    /// Those of one connection.
    Connection(String),
    /// All together, and each connection's.
    Each,
}

impl Counted {
    /// Nothing where nothing was counted for the connection.
    pub fn read(&self, counters: &Counters) -> Vec<CounterReport> {
        let report = |connection: Option<&str>| {
            let counts = counters.read(connection)?;
            Some(CounterReport { connection: connection.map(str::to_owned), counts })
        };
        match self {
            Self::Total => report(None).into_iter().collect(),
            Self::Connection(name) => report(Some(name)).into_iter().collect(),
            Self::Each => {
                let names = counters.names();
                std::iter::once(None).chain(names.iter().map(|name| Some(name.as_str()))).filter_map(report).collect()
            }
        }
    }

    /// Begins to count anew.
    pub fn reset(&self, counters: &Counters) {
        match self {
            Self::Total => counters.reset(None),
            Self::Connection(name) => counters.reset(Some(name)),
            Self::Each => counters.reset_all(),
        }
    }
}

/// Which SAs a command means; all given fields must match.
#[derive(Clone, Debug, Default)]
pub struct SaFilter {
    /// Connection's name.
    pub ike: Option<String>,
    /// Child's name: the command means Child SAs.
    pub child: Option<String>,
    /// Number of the IKE SA.
    pub ike_id: Option<IkeSaId>,
    /// Number of the Child SA: the command means Child SAs.
    pub child_id: Option<ChildSaId>,
}

impl SaFilter {
    /// True when it means an IKE SA, or Child SAs of it.
    pub fn selects(&self, status: &IkeSaStatus) -> bool {
        self.ike.as_ref().is_none_or(|ike| *ike == status.connection)
            && self.ike_id.is_none_or(|id| id == status.id)
            && self.child.as_ref().is_none_or(|name| status.children.iter().any(|child| child.name == *name))
            && self.child_id.is_none_or(|id| status.children.iter().any(|child| child.id == id))
    }
}

/// Which IKE SAs `redirect` means; all given fields must match.
#[derive(Clone, Debug, Default)]
pub struct RedirectFilter {
    /// Connection's name.
    pub ike: Option<String>,
    /// Number of the IKE SA.
    pub ike_id: Option<IkeSaId>,
    /// The peer's address is in this range.
    pub peer_ip: Option<AddressRange>,
    /// The peer's identity.
    pub peer_id: Option<IdentityPattern>,
}

/// What `terminate` and `rekey` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matched {
    /// SAs that matched.
    pub matches: usize,
    /// SAs for which it was done.
    pub done: usize,
}

/// A command to the core.
#[derive(Debug)]
pub enum Command {
    /// Snapshots of some of the IKE SAs that a filter means. A few for each command, since nothing else happens meanwhile.
    ListSas {
        /// Which.
        filter: SaFilter,
        /// Those with numbers above this one.
        after: IkeSaId,
        /// Answer.
        reply: oneshot::Sender<SaPage>,
    },
    /// How many IKE SAs there are, and how many of them are not up yet.
    CountSas(oneshot::Sender<(usize, usize)>),
    /// Packets of user space's ESP.
    CountPackets(oneshot::Sender<Packets>),
    /// Initiate a child (or an IKE SA only); answered when it is up or has failed, with charon's message.
    Initiate {
        /// Connection; may be missing when the child's name is unique.
        ike: Option<String>,
        /// Child; `None` brings up the IKE SA only.
        child: Option<String>,
        /// Answer.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Initiate the child whose selectors cover a flow, for a latch; answered when it is up or has failed.
    InitiateFlow {
        /// The flow.
        flow: Flow,
        /// With these selectors and no others (RFC 5660 §2.1).
        narrow: bool,
        /// Answer.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// What protects a flow: of these Child SAs, those that there are.
    Survey {
        /// The flow.
        flow: Flow,
        /// Numbers of Child SAs.
        children: Vec<ChildSaId>,
        /// Answer.
        reply: oneshot::Sender<Vec<SaInfo>>,
    },
    /// Terminate; answered when done.
    Terminate {
        /// Which.
        filter: SaFilter,
        /// Do not wait for the peer.
        force: bool,
        /// Answer.
        reply: oneshot::Sender<Matched>,
    },
    /// Rekey or reauthenticate; answered at once with what was started.
    Rekey {
        /// Which.
        filter: SaFilter,
        /// Reauthenticate IKE SAs instead.
        reauth: bool,
        /// Answer.
        reply: oneshot::Sender<Matched>,
    },
    /// Send initiators to another gateway (RFC 5685); answered at once with what was started.
    Redirect {
        /// Which.
        filter: RedirectFilter,
        /// Where to.
        gateway: Gateway,
        /// Answer.
        reply: oneshot::Sender<Matched>,
    },
    /// The installed trap policies.
    ListPolicies(oneshot::Sender<Vec<PolicyReport>>),
    /// Install the trap policy of a child; refused with charon's message.
    Install {
        /// Connection; may be missing when the child's name is unique.
        ike: Option<String>,
        /// Child.
        child: String,
        /// Answer.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Remove the trap policy of a child; refused with charon's message.
    Uninstall {
        /// Connection; may be missing when the child's name is unique.
        ike: Option<String>,
        /// Child.
        child: String,
        /// Answer.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Load an address pool; refused with charon's message.
    LoadPool(Box<PoolConfig>, oneshot::Sender<Result<(), PoolError>>),
    /// Unload an address pool; refused with charon's message.
    UnloadPool(String, oneshot::Sender<Result<(), PoolError>>),
    /// All address pools with their leases.
    ListPools(oneshot::Sender<Vec<PoolStatus>>),
    /// Counts of messages and rekeys; none where nothing was counted for the connection.
    Counters(Counted, oneshot::Sender<Vec<CounterReport>>),
    /// Begin to count anew.
    ResetCounters(Counted, oneshot::Sender<()>),
    /// Replace all connections (whole or not at all; they are validated already).
    SetConnections(Vec<ConnectionDefinition>, oneshot::Sender<()>),
    /// Replace the credentials.
    SetCredentials(Box<Credentials>, oneshot::Sender<()>),
    /// Read `strongswan.conf` again; refused with the first error.
    ReloadSettings(oneshot::Sender<Result<(), String>>),
    /// Stop the daemon: delete all SAs, leave nothing behind.
    Shutdown(oneshot::Sender<()>),
}

/// Handle of the core. Cloning it is cheap. When the core is gone, calls give empty answers.
#[derive(Clone)]
pub struct Control {
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<Arc<Event>>,
}

impl Control {
    /// Joins the two channels of a core.
    pub fn new(commands: mpsc::Sender<Command>, events: broadcast::Sender<Arc<Event>>) -> Self {
        Self { commands, events }
    }

    /// Events from now on. A slow reader misses the oldest.
    pub fn events(&self) -> broadcast::Receiver<Arc<Event>> {
        self.events.subscribe()
    }

    /// See [`Command::ListSas`].
    pub async fn list_sas(&self, filter: SaFilter, after: IkeSaId) -> SaPage {
        self.ask(|reply| Command::ListSas { filter, after, reply }).await.unwrap_or_default()
    }

    /// One IKE SA.
    pub async fn ike_sa(&self, id: IkeSaId) -> Option<SaReport> {
        let filter = SaFilter { ike_id: Some(id), ..SaFilter::default() };
        self.list_sas(filter, IkeSaId(0)).await.reports.into_iter().find(|report| report.status.id == id)
    }

    /// See [`Command::CountSas`].
    pub async fn count_sas(&self) -> (usize, usize) {
        self.ask(Command::CountSas).await.unwrap_or_default()
    }

    /// See [`Command::CountPackets`].
    pub async fn count_packets(&self) -> Packets {
        self.ask(Command::CountPackets).await.unwrap_or_default()
    }

    /// See [`Command::Initiate`].
    pub async fn initiate(&self, ike: Option<String>, child: Option<String>) -> Result<(), String> {
        self.ask(|reply| Command::Initiate { ike, child, reply })
            .await
            .unwrap_or_else(|| Err("the daemon is stopping".to_owned()))
    }

    /// See [`Command::InitiateFlow`].
    pub async fn initiate_flow(&self, flow: Flow, narrow: bool) -> Result<(), String> {
        self.ask(|reply| Command::InitiateFlow { flow, narrow, reply })
            .await
            .unwrap_or_else(|| Err("the daemon is stopping".to_owned()))
    }

    /// See [`Command::Survey`].
    pub async fn survey(&self, flow: Flow, children: Vec<ChildSaId>) -> Vec<SaInfo> {
        self.ask(|reply| Command::Survey { flow, children, reply }).await.unwrap_or_default()
    }

    /// See [`Command::Terminate`].
    pub async fn terminate(&self, filter: SaFilter, force: bool) -> Matched {
        self.ask(|reply| Command::Terminate { filter, force, reply }).await.unwrap_or(Matched { matches: 0, done: 0 })
    }

    /// See [`Command::Rekey`].
    pub async fn rekey(&self, filter: SaFilter, reauth: bool) -> Matched {
        self.ask(|reply| Command::Rekey { filter, reauth, reply }).await.unwrap_or(Matched { matches: 0, done: 0 })
    }

    /// See [`Command::Redirect`].
    pub async fn redirect(&self, filter: RedirectFilter, gateway: Gateway) -> Matched {
        let asked = self.ask(|reply| Command::Redirect { filter, gateway, reply });
        asked.await.unwrap_or(Matched { matches: 0, done: 0 })
    }

    /// See [`Command::ListPolicies`].
    pub async fn list_policies(&self) -> Vec<PolicyReport> {
        self.ask(Command::ListPolicies).await.unwrap_or_default()
    }

    /// See [`Command::Install`].
    pub async fn install(&self, ike: Option<String>, child: String) -> Result<(), String> {
        self.ask(|reply| Command::Install { ike, child, reply })
            .await
            .unwrap_or_else(|| Err("the daemon is stopping".to_owned()))
    }

    /// See [`Command::Uninstall`].
    pub async fn uninstall(&self, ike: Option<String>, child: String) -> Result<(), String> {
        self.ask(|reply| Command::Uninstall { ike, child, reply })
            .await
            .unwrap_or_else(|| Err("the daemon is stopping".to_owned()))
    }

    /// See [`Command::SetConnections`].
    pub async fn set_connections(&self, connections: Vec<ConnectionDefinition>) {
        self.ask(|reply| Command::SetConnections(connections, reply)).await;
    }

    /// See [`Command::SetCredentials`].
    pub async fn set_credentials(&self, credentials: Credentials) {
        self.ask(|reply| Command::SetCredentials(Box::new(credentials), reply)).await;
    }

    /// See [`Command::ReloadSettings`].
    pub async fn reload_settings(&self) -> Result<(), String> {
        self.ask(Command::ReloadSettings).await.unwrap_or_else(|| Err("the daemon is stopping".to_owned()))
    }

    /// See [`Command::Shutdown`].
    pub async fn shutdown(&self) {
        self.ask(Command::Shutdown).await;
    }

    /// See [`Command::LoadPool`].
    ///
    /// # Errors
    /// The pool's old range is in use.
    pub async fn load_pool(&self, pool: PoolConfig) -> Result<(), PoolError> {
        self.ask(|reply| Command::LoadPool(Box::new(pool), reply)).await.unwrap_or(Ok(()))
    }

    /// See [`Command::UnloadPool`].
    ///
    /// # Errors
    /// There is none of this name, or it is in use.
    pub async fn unload_pool(&self, name: String) -> Result<(), PoolError> {
        self.ask(|reply| Command::UnloadPool(name, reply)).await.unwrap_or(Err(PoolError::Unknown))
    }

    /// See [`Command::ListPools`].
    pub async fn list_pools(&self) -> Vec<PoolStatus> {
        self.ask(Command::ListPools).await.unwrap_or_default()
    }

    /// See [`Command::Counters`].
    pub async fn counters(&self, of: Counted) -> Vec<CounterReport> {
        self.ask(|reply| Command::Counters(of, reply)).await.unwrap_or_default()
    }

    /// See [`Command::ResetCounters`].
    pub async fn reset_counters(&self, of: Counted) {
        self.ask(|reply| Command::ResetCounters(of, reply)).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}
