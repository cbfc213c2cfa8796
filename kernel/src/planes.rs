//! The data plane that the daemon sees: each pair in the plane that can carry it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipsec::plane::{Carrier, DataPlane, Encapsulation, PlaneError, PlaneEvent, SaPair, Shunt, Trap, Usage};

use crate::network::Inner;
use crate::plane::UserSpacePlane;
use crate::xfrm::KernelPlane;

/// Both planes, or user space alone.
pub(crate) struct Planes {
    network: Arc<Inner>,
    user: UserSpacePlane,
    kernel: Option<Kernel>,
}

struct Kernel {
    plane: KernelPlane,
    /// Inbound SPIs of the pairs that it carries.
    pairs: BTreeSet<u32>,
    /// Inbound SPIs and `reqid`s of those that user space carries.
    others: BTreeMap<u32, u32>,
}

impl Planes {
    pub(crate) fn new(network: &Arc<Inner>) -> Self {
        let reason = if network.xfrm.is_some() { IN_STREAMS } else { network.plane_reason };
        Self {
            network: Arc::clone(network),
            user: UserSpacePlane::new(Arc::clone(network), reason),
            kernel: network.xfrm.as_ref().map(|xfrm| Kernel {
                plane: KernelPlane::new(network, xfrm),
                pairs: BTreeSet::new(),
                others: BTreeMap::new(),
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

    /// The plane for traps, shunts and for pairs that come outside of streams.
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
            Some(kernel) => {
                let reqid = pair.reqid;
                self.user.install(pair)?;
                // The routes into the device are there: what a predecessor's policies would take goes in now.
                kernel.plane.step_aside(reqid, true);
                kernel.others.insert(spi_in, reqid);
            }
            None => self.user.install(pair)?,
        }
        let Carrier { name, reason } = self.carrier(spi_in);
        tracing::debug!(spi_in = format_args!("{spi_in:08x}"), plane = name, reason, "SA pair installed");
        Ok(())
    }

    fn migrate(&mut self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError> {
        let in_stream = matches!(to, Encapsulation::Stream { .. });
        match &self.kernel {
            // Keys must not be used by two that count sequence numbers each for himself: a successor with keys of its own
            // comes into the other plane, and until then nothing goes out.
            Some(Kernel { pairs, others, .. })
                if in_stream && pairs.contains(&spi_in) || !in_stream && others.contains_key(&spi_in) =>
            {
                tracing::info!(
                    spi_in = format_args!("{spi_in:08x}"),
                    "rekeying, since the other plane carries ESP there"
                );
                self.network.shared.events.plane(PlaneEvent::Expire { spi_in, hard: false });
                Ok(())
            }
            _ => self.of_mut(spi_in).migrate(spi_in, to),
        }
    }

    fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        self.of_mut(spi_in).retire(spi_in)
    }

    fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        if let Some(kernel) = &mut self.kernel
            && let Some(reqid) = kernel.others.remove(&spi_in)
            && !kernel.others.values().any(|other| *other == reqid)
        {
            // Before the routes go: what is left of the `reqid` is the kernel's again.
            kernel.plane.step_aside(reqid, false);
        }
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

    fn install_shunt(&mut self, shunt: Shunt) -> Result<(), PlaneError> {
        self.first().install_shunt(shunt)
    }

    fn remove_shunt(&mut self, number: u32) -> Result<(), PlaneError> {
        self.first().remove_shunt(number)
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
