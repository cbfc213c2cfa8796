//! The data plane over the kernel's databases.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, MutexGuard};

use ipsec::plane::{
    Carrier, DataPlane, Encapsulation, KernelOptions, Mode, Offload, PlaneError, RESERVED_REQID, SaPair, Shunt,
    ShuntAction, Trap, Usage,
};
use ipsec::selector::TrafficSelector;

use super::descriptions::Links;
use super::latches::Described;
use super::{Held, Xfrm};
use crate::network::{Inner, lock};
use crate::routes::{Owner, Routes, Via};

/// The kernel's data plane.
pub(crate) struct KernelPlane {
    network: Arc<Inner>,
    xfrm: Arc<Xfrm>,
}

impl KernelPlane {
    pub(crate) fn new(network: &Arc<Inner>, xfrm: &Arc<Xfrm>) -> Self {
        Self { network: Arc::clone(network), xfrm: Arc::clone(xfrm) }
    }

    fn tables(&self) -> Held<'_> {
        self.xfrm.tables()
    }

    /// Looks the links up that options name: by a name, or by having the outer address.
    fn links(&self, options: &KernelOptions, local: Option<IpAddr>) -> Result<Links, PlaneError> {
        let interface = match &options.interface {
            None => 0,
            Some(name) => (self.network.link_index(name))
                .map_err(|e| system(format!("find the interface {name} that a policy is for"), e))?,
        };
        let device = match (options.offload, local) {
            (Offload::No, _) | (_, None) => None,
            (_, Some(local)) => (self.network.link_of(local))
                .map_err(|e| system(format!("find the device that has {local}, for hw_offload"), e))?,
        };
        Ok(Links { interface, device })
    }

    /// Where routes for packets with such an SA lead: with an XFRM interface into that, if it is named, and else nobody knows
    /// where, so that there are none.
    fn via(&self, options: &KernelOptions, otherwise: Via) -> Result<Option<Via>, PlaneError> {
        match (&options.xfrm_interface, options.if_id_out) {
            (_, 0) => Ok(Some(otherwise)),
            (None, _) => Ok(None),
            (Some(name), _) => match self.network.link_index(name) {
                Ok(link) => Ok(Some(Via::Link(link))),
                Err(e) => Err(system(format!("find the XFRM interface {name}"), e)),
            },
        }
    }

    /// Withdraws the policies of a `reqid`'s pairs, or brings them back: another plane has a successor of theirs.
    pub(crate) fn step_aside(&self, reqid: u32, aside: bool) {
        self.tables().step_aside(reqid, aside);
    }

    /// The kernel has nothing of the pair any more.
    fn unbar(&self, spi_in: u32) {
        if let Some(latches) = &self.network.latches {
            latches.unbar(spi_in);
        }
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        lock(&self.network.routes)
    }
}

impl DataPlane for KernelPlane {
    fn carrier(&self, _: u32) -> Carrier {
        Carrier { name: super::NAME, reason: self.network.plane_reason }
    }

    fn install(&mut self, pair: SaPair) -> Result<(), PlaneError> {
        if pair.reqid == RESERVED_REQID {
            return Err(PlaneError::Unsupported { plane: "kernel", what: format!("reqid {RESERVED_REQID}") });
        }
        let owner = Owner::Pair(pair.spi_in);
        let links = self.links(&pair.options, Some(pair.encapsulation.local()))?;
        // In transport mode packets have the outer addresses already.
        let via = self.via(&pair.options, Via::Towards(pair.encapsulation.remote()))?;
        let via = via.filter(|_| pair.mode == Mode::Tunnel);
        let selectors = via.map(|via| (via, pair.local_ts.clone(), pair.remote_ts.clone()));
        let (spi_in, encapsulation) = (pair.spi_in, pair.encapsulation);
        let described = Described::of(&pair);
        let barred = match (&self.network.latches, &described) {
            (Some(latches), Some(pair)) => latches.bar(pair).map_err(|reason| {
                system(
                    format!("install SA {spi_in:08x}, which must not reach what is latched"),
                    io::Error::other(reason),
                )
            })?,
            _ => false,
        };
        // Before the routes: one of them may take the place of a route into the tunnel's device.
        let installed = self.tables().install(pair, &links);
        installed.inspect_err(|_| {
            if barred {
                self.unbar(spi_in);
            }
        })?;
        if let (Some(latches), Some(pair)) = (&self.network.latches, described) {
            latches.installed(&pair);
        }
        let Some((via, local_ts, remote_ts)) = selectors else { return Ok(()) };
        let added = self.routes().add(owner, via, encapsulation.local(), &local_ts, &remote_ts);
        added.map_err(|e| {
            // It was there a moment ago.
            let _ = self.delete(spi_in);
            system(format!("install the routes of SA {spi_in:08x}"), e)
        })
    }

    fn migrate(&mut self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError> {
        self.tables().migrate(spi_in, &to)?;
        if let Some(latches) = &self.network.latches {
            latches.moved(spi_in, &to);
        }
        self.routes().redirect(Owner::Pair(spi_in), Via::Towards(to.remote()));
        Ok(())
    }

    fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        self.tables().retire(spi_in)
    }

    fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        // First, while its `reqid` cannot be anybody else's.
        if let Some(latches) = &self.network.latches {
            latches.removed(spi_in);
        }
        self.tables().delete(spi_in)?;
        self.unbar(spi_in);
        self.routes().remove(Owner::Pair(spi_in));
        Ok(())
    }

    fn install_trap(&mut self, trap: Trap) -> Result<(), PlaneError> {
        let links = self.links(&trap.options, None)?;
        let via = self.via(&trap.options, Via::Itself)?;
        self.tables().install_trap(&trap, &links)?;
        let Some(via) = via else { return Ok(()) };
        // Packets get the source address that falls into the trap; where a peer is that they will go to is not known.
        let outer = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let owner = Owner::Trap(trap.reqid);
        self.routes().add(owner, via, outer, &trap.local_ts, &trap.remote_ts).map_err(|e| {
            // It was there a moment ago.
            let _ = self.tables().remove_trap(trap.reqid);
            system(format!("install the routes of trap {}", trap.reqid), e)
        })
    }

    fn remove_trap(&mut self, reqid: u32) -> Result<(), PlaneError> {
        self.routes().remove(Owner::Trap(reqid));
        self.tables().remove_trap(reqid)
    }

    fn install_shunt(&mut self, shunt: Shunt) -> Result<(), PlaneError> {
        let links = self.links(&shunt.options, None)?;
        self.tables().install_shunt(&shunt, &links)?;
        if shunt.action == ShuntAction::Drop {
            return Ok(());
        }
        let (owner, outer) = (Owner::Shunt(shunt.number), IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        // What goes to some ports only shares its route with what is protected.
        let whole = |selector: &&TrafficSelector| selector.protocol == 0 && selector.is_any_port();
        let networks: Vec<TrafficSelector> = shunt.remote_ts.iter().filter(whole).copied().collect();
        self.routes().add(owner, Via::OtherTables, outer, &shunt.local_ts, &networks).map_err(|e| {
            // It was there a moment ago.
            let _ = self.tables().remove_shunt(shunt.number);
            system(format!("install the routes of shunt {}", shunt.number), e)
        })
    }

    fn remove_shunt(&mut self, number: u32) -> Result<(), PlaneError> {
        self.routes().remove(Owner::Shunt(number));
        self.tables().remove_shunt(number)
    }

    fn usage(&self, spi_in: u32) -> Result<Usage, PlaneError> {
        self.tables().usage(spi_in)
    }

    fn shutdown(&mut self) -> Result<(), PlaneError> {
        if let Some(latches) = &self.network.latches {
            latches.all_removed();
        }
        // The network removes its routes by itself.
        self.tables().clear().map_err(|e| system("remove the kernel's states and policies".to_owned(), e))?;
        if let Some(latches) = &self.network.latches {
            latches.all_unbarred();
        }
        Ok(())
    }
}

fn system(action: String, source: io::Error) -> PlaneError {
    PlaneError::System { action, source }
}
