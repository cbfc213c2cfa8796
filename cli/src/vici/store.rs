//! What is configured, from files and by VICI: connections, credentials and authorities. Each change is handed to
//! the core before the command that made it is answered.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use ike::config::StartAction;
use ike::pool::{PoolConfig, PoolError};
use tokio::sync::{Mutex, MutexGuard};

pub use crate::config::Configured;
use crate::config::ConnectionDefinition;
use crate::control::{Control, SaFilter};

/// The shared store of a daemon.
#[derive(Debug)]
pub struct Store {
    configured: Mutex<Configured>,
    started: Instant,
    since: SystemTime,
}

impl Store {
    /// A store with what was read at start.
    pub fn new(configured: Configured) -> Self {
        Self { configured: Mutex::new(configured), started: Instant::now(), since: SystemTime::now() }
    }

    /// When the store was made, which is when the daemon started.
    pub fn started(&self) -> (Instant, SystemTime) {
        (self.started, self.since)
    }

    /// What is configured; nobody else changes it while the guard lives.
    pub async fn lock(&self) -> MutexGuard<'_, Configured> {
        self.configured.lock().await
    }

    /// Hands everything to the core.
    pub async fn push(&self, control: &Control) {
        let configured = self.lock().await;
        push_credentials(&configured, control).await;
        push_pools(&[], &configured.pools, control).await;
        push_connections(&configured, control).await;
    }

    /// Starts the children with `start_action = start` in the background.
    pub async fn start(&self, control: &Control) {
        for definition in &self.lock().await.connections {
            start_children(definition, control);
        }
    }

    /// Replaces everything with what was read anew. SAs of `start` children that are gone or changed are closed,
    /// and new and changed ones started.
    pub async fn replace(&self, new: Configured, control: &Control) {
        let mut configured = self.lock().await;
        let old = std::mem::replace(&mut *configured, new);
        push_credentials(&configured, control).await;
        push_pools(&old.pools, &configured.pools, control).await;
        push_connections(&configured, control).await;
        for gone in &old.connections {
            if configured.connection(&gone.connection.name).is_none() {
                stop_children(gone, control);
            }
        }
        for definition in &configured.connections {
            let before = old.connection(&definition.connection.name);
            apply_change(before, definition, control);
        }
    }

    /// Adds a connection or replaces the one of its name, in its place.
    pub async fn load_connection(&self, definition: ConnectionDefinition, control: &Control) {
        let mut configured = self.lock().await;
        let name = &definition.connection.name;
        let place = configured.connections.iter().position(|old| old.connection.name == *name);
        let before = match place.and_then(|at| configured.connections.get_mut(at)) {
            Some(old) => Some(std::mem::replace(old, definition.clone())),
            None => {
                configured.connections.push(definition.clone());
                None
            }
        };
        push_connections(&configured, control).await;
        apply_change(before.as_ref(), &definition, control);
    }

    /// Removes a connection; false if there is none of this name.
    pub async fn unload_connection(&self, name: &str, control: &Control) -> bool {
        let mut configured = self.lock().await;
        let Some(at) = configured.connections.iter().position(|old| old.connection.name == name) else {
            return false;
        };
        let gone = configured.connections.remove(at);
        push_connections(&configured, control).await;
        stop_children(&gone, control);
        true
    }

    /// Adds an address pool or replaces the one of its name.
    ///
    /// # Errors
    /// Another range of that name is in use.
    pub async fn load_pool(&self, pool: PoolConfig, control: &Control) -> Result<(), PoolError> {
        let mut configured = self.lock().await;
        control.load_pool(pool.clone()).await?;
        configured.pools.retain(|old| old.name != pool.name);
        configured.pools.push(pool);
        Ok(())
    }

    /// Removes an address pool.
    ///
    /// # Errors
    /// There is none of this name, or it is in use.
    pub async fn unload_pool(&self, name: &str, control: &Control) -> Result<(), PoolError> {
        let mut configured = self.lock().await;
        control.unload_pool(name.to_owned()).await?;
        configured.pools.retain(|old| old.name != name);
        Ok(())
    }

    /// Changes credentials or authorities, then hands all credentials to the core.
    pub async fn change_credentials<T>(&self, control: &Control, change: impl FnOnce(&mut Configured) -> T) -> T {
        let mut configured = self.lock().await;
        let result = change(&mut configured);
        push_credentials(&configured, control).await;
        result
    }
}

async fn push_connections(configured: &Configured, control: &Control) {
    control.set_connections(configured.connections.clone()).await;
}

/// A pool that is in use stays as it is; the log says so.
async fn push_pools(old: &[PoolConfig], new: &[PoolConfig], control: &Control) {
    for gone in old.iter().filter(|gone| new.iter().all(|pool| pool.name != gone.name)) {
        if let Err(error) = control.unload_pool(gone.name.clone()).await {
            tracing::error!(pool = gone.name, %error, "an address pool stays");
        }
    }
    for pool in new {
        if let Err(error) = control.load_pool(pool.clone()).await {
            tracing::error!(pool = pool.name, %error, "an address pool stays as it was");
        }
    }
}

async fn push_credentials(configured: &Configured, control: &Control) {
    control.set_credentials(configured.all_credentials()).await;
}

/// Two definitions that print alike are alike: they hold no secrets, whose printing would hide a difference.
fn same(one: &impl std::fmt::Debug, other: &impl std::fmt::Debug) -> bool {
    format!("{one:?}") == format!("{other:?}")
}

/// As charon does: nothing for a connection that is the same, else its `start` children are closed and started.
fn apply_change(before: Option<&ConnectionDefinition>, now: &ConnectionDefinition, control: &Control) {
    match before {
        None => start_children(now, control),
        Some(before) if same(before, now) => {}
        Some(before) => {
            let (before, now, control) = (before.clone(), now.clone(), control.clone());
            tokio::spawn(async move {
                terminate_started(&before, &control).await;
                start_children(&now, &control);
            });
        }
    }
}

fn started_children(definition: &ConnectionDefinition) -> Vec<String> {
    let children = &definition.connection.children;
    children.iter().filter(|child| child.start_action == StartAction::Start).map(|child| child.name.clone()).collect()
}

fn start_children(definition: &ConnectionDefinition, control: &Control) {
    let connection = Arc::clone(&definition.connection);
    for child in started_children(definition) {
        let (connection, control) = (connection.name.clone(), control.clone());
        tokio::spawn(async move {
            if let Err(error) = control.initiate(Some(connection.clone()), Some(child.clone())).await {
                tracing::warn!(connection, child, error, "start_action failed");
            }
        });
    }
}

fn stop_children(definition: &ConnectionDefinition, control: &Control) {
    let (definition, control) = (definition.clone(), control.clone());
    tokio::spawn(async move { terminate_started(&definition, &control).await });
}

async fn terminate_started(definition: &ConnectionDefinition, control: &Control) {
    for child in started_children(definition) {
        let ike = Some(definition.connection.name.clone());
        let filter = SaFilter { ike, child: Some(child), ..SaFilter::default() };
        control.terminate(filter, false).await;
    }
}
