//! Configuration: typed, validated whole, with errors that point at file, line and name.

pub mod certificate;
pub mod connection;
pub mod credentials;
pub mod daemon;
pub mod latches;
pub mod load;
pub mod pool;
pub mod settings;
pub mod shunt;
pub mod trap;
pub mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ike::config::Connection;
use ike::pool::PoolConfig;
use pad::Credentials;

use crate::config::credentials::Authority;
use crate::config::shunt::Shunt;
use crate::tree::Origin;

/// A connection with what the daemon needs around the engine's view of it.
#[derive(Clone, Debug)]
pub struct ConnectionDefinition {
    /// The engine's view. Names in `remote_addrs` that are host names are not in its ranges.
    pub connection: Arc<Connection>,
    /// `local_addrs` as written.
    pub local_addrs: Vec<String>,
    /// `remote_addrs` as written; host names are resolved when the connection is initiated.
    pub remote_addrs: Vec<String>,
    /// Which events install a child's trap policy, by child; it stands apart from the engine's view, since an action
    /// may be `trap|start`.
    pub traps: BTreeMap<String, TrapActions>,
    /// Children that are policies without SAs.
    pub shunts: Vec<Shunt>,
    /// `if_id_in` and `if_id_out` as configured; 0 where there are none or each IKE SA has its own.
    pub if_ids: (u32, u32),
    /// `xfrm_interface`: what the daemon makes, with its number.
    pub xfrm_interface: Option<(String, u32)>,
}

impl ConnectionDefinition {
    /// When this child's trap policy is installed.
    pub fn traps(&self, child: &str) -> TrapActions {
        self.traps.get(child).copied().unwrap_or_default()
    }

    /// True when it has shunts and nothing that is negotiated: nobody authenticates with it.
    pub fn is_for_shunts_alone(&self) -> bool {
        self.connection.children.is_empty() && !self.shunts.is_empty()
    }
}

/// When a child's trap policy is installed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrapActions {
    /// With the configuration (`start_action`).
    pub start: bool,
    /// When the peer closes the Child SA (`close_action`).
    pub close: bool,
}

/// What is configured, from files and by VICI.
#[derive(Debug, Default)]
pub struct Configured {
    /// Connections, in order.
    pub connections: Vec<ConnectionDefinition>,
    /// Certificates, keys, secrets.
    pub credentials: Credentials,
    /// `authorities`.
    pub authorities: Vec<Authority>,
    /// `pools`.
    pub pools: Vec<PoolConfig>,
}

impl Configured {
    /// A connection.
    pub fn connection(&self, name: &str) -> Option<&ConnectionDefinition> {
        self.connections.iter().find(|definition| definition.connection.name == name)
    }

    /// What the PAD authenticates with: the credentials, and the authorities as trust anchors.
    pub fn all_credentials(&self) -> Credentials {
        let mut all = self.credentials.clone();
        for authority in &self.authorities {
            if let Err(error) = all.add_authority(&authority.cacert) {
                tracing::warn!(authority = authority.name, %error, "authority is not trusted");
            }
        }
        all
    }

    /// The first connection that has a child of this name and is called `ike`, if that is given.
    pub fn connection_of_child(&self, ike: Option<&str>, child: &str) -> Option<&ConnectionDefinition> {
        self.connections
            .iter()
            .filter(|definition| ike.is_none_or(|ike| definition.connection.name == ike))
            .find(|definition| definition.connection.children.iter().any(|configured| configured.name == child))
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Of no consequence.
    Debug,
    /// Something is not as written.
    Warning,
    /// Something is refused.
    Error,
}

/// A finding in a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How bad.
    pub severity: Severity,
    /// Where.
    pub origin: Option<Origin>,
    /// The section or option that it is about, as a path from the top.
    pub subject: String,
    /// What.
    pub message: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        write!(f, "{}: {}", self.subject, self.message)
    }
}
