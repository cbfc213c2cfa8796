//! The engine's address pools, as their owner loads and lists them.

use super::Engine;
use crate::pool::{PoolConfig, PoolError, PoolStatus};

impl Engine {
    /// Adds an address pool. One of the same name and range keeps its leases and gets the new attributes.
    ///
    /// # Errors
    /// [`PoolError::Replace`] when the range differs and addresses of the old one are in use.
    pub fn load_pool(&mut self, pool: PoolConfig) -> Result<(), PoolError> {
        self.ctx.shared.pools.lock().load(pool)
    }

    /// Removes an address pool.
    ///
    /// # Errors
    /// [`PoolError::Unload`] when addresses of it are in use, [`PoolError::Unknown`].
    pub fn unload_pool(&mut self, name: &str) -> Result<(), PoolError> {
        self.ctx.shared.pools.lock().unload(name)
    }

    /// All pools by name, with their leases.
    pub fn pools(&self) -> Vec<PoolStatus> {
        self.ctx.shared.pools.lock().status()
    }
}
