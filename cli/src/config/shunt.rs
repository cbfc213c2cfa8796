//! Shunts: children with `mode = pass` or `mode = drop`, which are policies without SAs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ike::config::{Child, ConfiguredSelector};
use ipsec::plane::{KernelOptions, ShuntAction};
use ipsec::selector::TrafficSelector;

/// A shunt as configured. It is no child of its connection for the engine: nobody negotiates it.
#[derive(Clone, Debug)]
pub struct Shunt {
    /// Name, selectors and options; what is said of SAs has no meaning.
    pub child: Arc<Child>,
    /// `mode`.
    pub action: ShuntAction,
    /// It is installed with the configuration (`start_action`).
    pub start: bool,
}

/// What a shunt selects, and what it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShuntPolicy {
    /// What it does.
    pub action: ShuntAction,
    /// Our side's selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The other side's selectors.
    pub remote_ts: Vec<TrafficSelector>,
    /// What only the kernel's plane knows.
    pub options: KernelOptions,
}

impl Shunt {
    /// What is to be installed; `dynamic` is any address, since there is no IKE SA that would have one.
    pub fn policy(&self) -> ShuntPolicy {
        ShuntPolicy {
            action: self.action,
            local_ts: any_for_dynamic(&self.child.local_ts),
            remote_ts: any_for_dynamic(&self.child.remote_ts),
            options: self.child.options.clone(),
        }
    }
}

fn any_for_dynamic(configured: &[ConfiguredSelector]) -> Vec<TrafficSelector> {
    let any = [(IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::BROADCAST)), (ANY6.0.into(), ANY6.1.into())];
    let resolve = |selector: &ConfiguredSelector| match *selector {
        ConfiguredSelector::Fixed(fixed) => vec![fixed],
        ConfiguredSelector::Dynamic { protocol, start_port, end_port } => {
            any.map(|(start, end)| TrafficSelector { protocol, start_port, end_port, start, end }).into()
        }
    };
    configured.iter().flat_map(resolve).collect()
}

const ANY6: (Ipv6Addr, Ipv6Addr) = (Ipv6Addr::UNSPECIFIED, Ipv6Addr::from_bits(u128::MAX));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_is_any_address_of_either_family() {
        let dynamic = ConfiguredSelector::Dynamic { protocol: 17, start_port: 53, end_port: 53 };
        let [ipv4, ipv6] = any_for_dynamic(&[dynamic])[..] else { panic!("one for each family") };
        assert_eq!((ipv4.prefix(), ipv6.prefix()), (Some(0), Some(0)));
        assert!(ipv4.start.is_ipv4() && ipv6.start.is_ipv6());
        assert_eq!((ipv4.protocol, ipv6.start_port, ipv6.end_port), (17, 53, 53));
    }
}
