//! The user-space data plane: the packet engine with routes into it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use ipsec::plane::{Carrier, DataPlane, Encapsulation, KernelOptions, PlaneError, SaPair, Shunt, Trap, Usage};

use crate::network::{Inner, lock};
use crate::routes::{Owner, Via};

/// The data plane over a running network.
pub(crate) struct UserSpacePlane {
    network: Arc<Inner>,
    /// Inbound SPIs of the installed pairs.
    installed: BTreeSet<u32>,
    /// `reqid`s of the installed traps.
    traps: BTreeSet<u32>,
    /// Why it is this one.
    reason: &'static str,
}

impl UserSpacePlane {
    pub(crate) fn new(network: Arc<Inner>, reason: &'static str) -> Self {
        Self { network, installed: BTreeSet::new(), traps: BTreeSet::new(), reason }
    }

    /// Takes away what leads into a pair, and what keeps others out of its place.
    fn leave(&self, spi_in: u32) {
        lock(&self.network.routes).remove(Owner::Pair(spi_in));
        if let Some(inbound) = &self.network.inbound {
            inbound.remove_pair(spi_in);
        }
    }
}

impl DataPlane for UserSpacePlane {
    fn carrier(&self, _: u32) -> Carrier {
        Carrier { name: NAME, reason: self.reason }
    }

    fn install(&mut self, pair: SaPair) -> Result<(), PlaneError> {
        let spi_in = pair.spi_in;
        refuse_kernel_options(&pair.options)?;
        if self.installed.contains(&spi_in) {
            return Err(PlaneError::SpiInUse(spi_in));
        }
        // The peer may send from here on, and what it sends comes out of the tunnel.
        if let Some(inbound) = &self.network.inbound {
            inbound.add_pair(&pair)?;
        }
        // Then routes, since they can be undone exactly. Until the SAs are there, the engine drops what
        // the routes bring: nothing goes out in clear.
        let routed = lock(&self.network.routes)
            .add(Owner::Pair(spi_in), Via::Tunnel, pair.encapsulation.local(), &pair.local_ts, &pair.remote_ts)
            .map_err(|e| system(format!("install the routes of SA {spi_in:08x}"), e));
        if let Err(e) = routed.and_then(|()| self.network.shared.datapath.install(pair)) {
            self.leave(spi_in);
            return Err(e);
        }
        self.installed.insert(spi_in);
        Ok(())
    }

    fn migrate(&mut self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError> {
        self.network.shared.datapath.migrate(spi_in, to)
    }

    fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        self.network.shared.datapath.retire(spi_in)
    }

    fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError> {
        self.network.shared.datapath.delete(spi_in)?;
        self.installed.remove(&spi_in);
        self.leave(spi_in);
        Ok(())
    }

    fn install_trap(&mut self, trap: Trap) -> Result<(), PlaneError> {
        let reqid = trap.reqid;
        refuse_kernel_options(&trap.options)?;
        if self.traps.contains(&reqid) {
            return Err(PlaneError::TrapInUse(reqid));
        }
        // Which outer address an SA will have is not known yet.
        let outer = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        lock(&self.network.routes)
            .add(Owner::Trap(reqid), Via::Tunnel, outer, &trap.local_ts, &trap.remote_ts)
            .map_err(|e| system(format!("install the routes of trap {reqid}"), e))?;
        if let Err(e) = self.network.shared.datapath.install_trap(trap) {
            lock(&self.network.routes).remove(Owner::Trap(reqid));
            return Err(e);
        }
        self.traps.insert(reqid);
        Ok(())
    }

    fn remove_trap(&mut self, reqid: u32) -> Result<(), PlaneError> {
        self.network.shared.datapath.remove_trap(reqid)?;
        self.traps.remove(&reqid);
        lock(&self.network.routes).remove(Owner::Trap(reqid));
        Ok(())
    }

    fn install_shunt(&mut self, shunt: Shunt) -> Result<(), PlaneError> {
        refuse_kernel_options(&shunt.options)?;
        let mut shunts = lock(&self.network.shunts);
        if shunts.contains(shunt.number) {
            return Err(PlaneError::ShuntInUse(shunt.number));
        }
        if let Some(inbound) = &self.network.inbound {
            inbound.add_shunt(&shunt)?;
        }
        shunts.add(&shunt).inspect_err(|_| {
            if let Some(inbound) = &self.network.inbound {
                inbound.remove_shunt(shunt.number);
            }
        })
    }

    fn remove_shunt(&mut self, number: u32) -> Result<(), PlaneError> {
        let mut shunts = lock(&self.network.shunts);
        if !shunts.contains(number) {
            return Err(PlaneError::NoSuchShunt(number));
        }
        let removed = shunts.remove(number);
        if let Some(inbound) = &self.network.inbound {
            inbound.remove_shunt(number);
        }
        removed.map_err(|e| system(format!("remove the rules of shunt {number}"), e))
    }

    fn usage(&self, spi_in: u32) -> Result<Usage, PlaneError> {
        self.network.shared.datapath.usage(Instant::now(), spi_in)
    }

    fn shutdown(&mut self) -> Result<(), PlaneError> {
        for spi_in in std::mem::take(&mut self.installed) {
            self.network.shared.datapath.delete(spi_in)?;
            self.leave(spi_in);
        }
        for reqid in std::mem::take(&mut self.traps) {
            lock(&self.network.routes).remove(Owner::Trap(reqid));
            self.network.shared.datapath.remove_trap(reqid)?;
        }
        let cleared = lock(&self.network.shunts).clear();
        if let Some(inbound) = &self.network.inbound {
            inbound.clear().map_err(|e| system("remove the kernel's policies".to_owned(), e))?;
        }
        cleared.map_err(|e| system("remove the rules of shunts".to_owned(), e))
    }
}

/// Without them other packets would be protected than was meant. Priorities and DSCP are left out.
fn refuse_kernel_options(options: &KernelOptions) -> Result<(), PlaneError> {
    match options.demanded() {
        None => Ok(()),
        Some(option) => {
            let what = format!("{option}: it needs plane = kernel");
            Err(PlaneError::Unsupported { plane: NAME, what })
        }
    }
}

/// Of this plane.
const NAME: &str = "user-space";

fn system(action: String, source: io::Error) -> PlaneError {
    PlaneError::System { action, source }
}
