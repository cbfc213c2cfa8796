//! The data plane that the daemon sees: each pair in the plane that can carry it.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipsec::plane::{Carrier, DataPlane, Encapsulation, PlaneError, PlaneEvent, SaPair, Shunt, StreamId, Trap, Usage};

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
    /// Inbound SPIs of the pairs that it carries, and which are in streams.
    pairs: BTreeMap<u32, bool>,
    /// Those that user space carries.
    others: BTreeMap<u32, Other>,
}

struct Other {
    reqid: u32,
    /// Why the kernel does not.
    reason: &'static str,
}

impl Planes {
    pub(crate) fn new(network: &Arc<Inner>) -> Self {
        Self {
            network: Arc::clone(network),
            user: UserSpacePlane::new(Arc::clone(network), network.plane_reason),
            kernel: network.xfrm.as_ref().map(|xfrm| Kernel {
                plane: KernelPlane::new(network, xfrm),
                pairs: BTreeMap::new(),
                others: BTreeMap::new(),
            }),
        }
    }

    /// The plane that carries a pair; one that nobody knows is user space's, which says so.
    fn of(&self, spi_in: u32) -> &dyn DataPlane {
        match &self.kernel {
            Some(kernel) if kernel.pairs.contains_key(&spi_in) => &kernel.plane,
            _ => &self.user,
        }
    }

    fn of_mut(&mut self, spi_in: u32) -> &mut dyn DataPlane {
        match &mut self.kernel {
            Some(kernel) if kernel.pairs.contains_key(&spi_in) => &mut kernel.plane,
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
        let carrier = self.of(spi_in).carrier(spi_in);
        let reason = self.kernel.as_ref().and_then(|kernel| match kernel.pairs.get(&spi_in) {
            Some(in_stream) => in_stream.then_some(IN_STREAMS),
            None => kernel.others.get(&spi_in).map(|other| other.reason),
        });
        Carrier { reason: reason.unwrap_or(carrier.reason), ..carrier }
    }

    fn install(&mut self, pair: SaPair) -> Result<(), PlaneError> {
        let spi_in = pair.spi_in;
        let stream = stream_of(&pair.encapsulation);
        let carrier = stream.map_or(Ok(()), |stream| self.network.carrier_of(stream, pair.encapsulation.local()));
        match &mut self.kernel {
            Some(kernel) => match carrier {
                Ok(()) => {
                    kernel.plane.install(pair)?;
                    kernel.pairs.insert(spi_in, stream.is_some());
                }
                Err(reason) => {
                    let reqid = pair.reqid;
                    self.user.install(pair)?;
                    // The routes into the device are there: what a predecessor's policies would take goes in now.
                    kernel.plane.step_aside(reqid, true);
                    kernel.others.insert(spi_in, Other { reqid, reason });
                }
            },
            None => self.user.install(pair)?,
        }
        let Carrier { name, reason } = self.carrier(spi_in);
        tracing::debug!(spi_in = format_args!("{spi_in:08x}"), plane = name, reason, "SA pair installed");
        Ok(())
    }

    fn migrate(&mut self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError> {
        let stream = stream_of(&to);
        let carrier = stream.map_or(Ok(()), |stream| self.network.carrier_of(stream, to.local()));
        match &mut self.kernel {
            // Keys must not be used by two that count sequence numbers each for himself: a successor with keys of its own
            // comes into the other plane, and until then nothing goes out.
            Some(Kernel { pairs, others, .. })
                if carrier.is_err() && pairs.contains_key(&spi_in)
                    || carrier.is_ok() && others.contains_key(&spi_in) =>
            {
                tracing::info!(
                    spi_in = format_args!("{spi_in:08x}"),
                    "rekeying, since the other plane carries ESP there"
                );
                self.network.shared.events.plane(PlaneEvent::Expire { spi_in, hard: false });
                Ok(())
            }
            Some(Kernel { pairs, plane, .. }) if pairs.contains_key(&spi_in) => {
                plane.migrate(spi_in, to)?;
                pairs.insert(spi_in, stream.is_some());
                Ok(())
            }
            _ => self.user.migrate(spi_in, to),
        }
    }

    fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        self.of_mut(spi_in).retire(spi_in)
    }

    fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        if let Some(kernel) = &mut self.kernel
            && let Some(Other { reqid, .. }) = kernel.others.remove(&spi_in)
            && !kernel.others.values().any(|other| other.reqid == reqid)
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

fn stream_of(encapsulation: &Encapsulation) -> Option<StreamId> {
    match encapsulation {
        Encapsulation::Stream { stream, .. } => Some(*stream),
        Encapsulation::None { .. } | Encapsulation::Udp { .. } => None,
    }
}

const IN_STREAMS: &str = "the kernel takes ESP from TCP streams";
