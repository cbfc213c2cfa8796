//! The data plane over the kernel's databases.

use std::sync::Arc;

use ipsec::plane::{Carrier, DataPlane, Encapsulation, PlaneError, SaPair, Trap, Usage};

use super::Xfrm;
use crate::network::lock;

/// The kernel's data plane.
pub(crate) struct KernelPlane {
    xfrm: Arc<Xfrm>,
    /// Why it is this one.
    reason: &'static str,
}

impl KernelPlane {
    pub(crate) fn new(xfrm: Arc<Xfrm>, reason: &'static str) -> Self {
        Self { xfrm, reason }
    }
}

impl DataPlane for KernelPlane {
    fn carrier(&self, _: u32) -> Carrier {
        Carrier { name: super::NAME, reason: self.reason }
    }

    fn install(&mut self, pair: SaPair) -> Result<(), PlaneError> {
        lock(&self.xfrm.tables).install(pair)
    }

    fn migrate(&mut self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError> {
        lock(&self.xfrm.tables).migrate(spi_in, &to)
    }

    fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        lock(&self.xfrm.tables).retire(spi_in)
    }

    fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        lock(&self.xfrm.tables).delete(spi_in)
    }

    fn install_trap(&mut self, trap: Trap) -> Result<(), PlaneError> {
        lock(&self.xfrm.tables).install_trap(&trap)
    }

    fn remove_trap(&mut self, reqid: u32) -> Result<(), PlaneError> {
        lock(&self.xfrm.tables).remove_trap(reqid)
    }

    fn usage(&self, spi_in: u32) -> Result<Usage, PlaneError> {
        lock(&self.xfrm.tables).usage(spi_in)
    }

    fn shutdown(&mut self) -> Result<(), PlaneError> {
        lock(&self.xfrm.tables).clear().map_err(|source| PlaneError::System {
            action: "remove the kernel's states and policies".to_owned(),
            source,
        })
    }
}
