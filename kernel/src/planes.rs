//! The data plane that the daemon sees: each pair in the plane that can carry it.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipsec::plane::{Carrier, DataPlane, Encapsulation, PlaneError, SaPair, Trap, Usage};

use crate::network::Inner;
use crate::plane::UserSpacePlane;
use crate::xfrm::KernelPlane;

/// Both planes, or user space alone.
pub(crate) struct Planes {
    user: UserSpacePlane,
    kernel: Option<Kernel>,
}

struct Kernel {
    plane: KernelPlane,
    /// Inbound SPIs of the pairs that it carries.
    pairs: BTreeSet<u32>,
}

impl Planes {
    pub(crate) fn new(network: &Arc<Inner>) -> Self {
        let reason = if network.xfrm.is_some() { IN_STREAMS } else { network.plane_reason };
        Self {
            user: UserSpacePlane::new(Arc::clone(network), reason),
            kernel: network.xfrm.as_ref().map(|xfrm| Kernel {
                plane: KernelPlane::new(Arc::clone(xfrm), network.plane_reason),
                pairs: BTreeSet::new(),
            }),
        }
    }

    /// The plane that carries a pair; one that nobody knows is user space's, which says so.
    fn of(&self, spi_in: u32) -> &dyn DataPlane {
        match &self.kernel {
            Some(kernel) if kernel.pairs.contains(&spi_in) => &kernel.plane,
            _ => &self.user,
        }
    }

    fn of_mut(&mut self, spi_in: u32) -> &mut dyn DataPlane {
        match &mut self.kernel {
            Some(kernel) if kernel.pairs.contains(&spi_in) => &mut kernel.plane,
            _ => &mut self.user,
        }
    }

    /// The plane for traps and for pairs that come outside of streams.
    fn first(&mut self) -> &mut dyn DataPlane {
        match &mut self.kernel {
            Some(kernel) => &mut kernel.plane,
            None => &mut self.user,
        }
    }
}

impl DataPlane for Planes {
    fn carrier(&self, spi_in: u32) -> Carrier {
        self.of(spi_in).carrier(spi_in)
    }

    fn install(&mut self, pair: SaPair) -> Result<(), PlaneError> {
        let spi_in = pair.spi_in;
        let in_stream = matches!(pair.encapsulation, Encapsulation::Stream { .. });
        match &mut self.kernel {
            Some(kernel) if !in_stream => {
                kernel.plane.install(pair)?;
                kernel.pairs.insert(spi_in);
            }
            _ => self.user.install(pair)?,
        }
        let Carrier { name, reason } = self.carrier(spi_in);
        tracing::debug!(spi_in = format_args!("{spi_in:08x}"), plane = name, reason, "SA pair installed");
        Ok(())
    }

    fn migrate(&mut self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError> {
        self.of_mut(spi_in).migrate(spi_in, to)
    }

    fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        self.of_mut(spi_in).retire(spi_in)
    }

    fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        self.of_mut(spi_in).delete(spi_in)?;
        if let Some(kernel) = &mut self.kernel {
            kernel.pairs.remove(&spi_in);
        }
        Ok(())
    }

    fn install_trap(&mut self, trap: Trap) -> Result<(), PlaneError> {
        self.first().install_trap(trap)
    }

    fn remove_trap(&mut self, reqid: u32) -> Result<(), PlaneError> {
        self.first().remove_trap(reqid)
    }

    fn usage(&self, spi_in: u32) -> Result<Usage, PlaneError> {
        self.of(spi_in).usage(spi_in)
    }

    fn shutdown(&mut self) -> Result<(), PlaneError> {
        let kernel = self.kernel.as_mut().map_or(Ok(()), |kernel| kernel.plane.shutdown());
        kernel.and(self.user.shutdown())
    }
}

const IN_STREAMS: &str = "the kernel takes no ESP from TCP streams";
