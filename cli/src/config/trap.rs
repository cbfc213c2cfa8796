//! The selectors of trap policies, which are needed before there is an IKE SA.

use std::net::IpAddr;

use ike::config::{Child, ConfiguredSelector};
use ipsec::plane::KernelOptions;
use ipsec::selector::{Flow, TrafficSelector};

/// What a trap selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selectors {
    /// Our side's selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer side's selectors.
    pub remote_ts: Vec<TrafficSelector>,
    /// What only the kernel's plane knows.
    pub options: KernelOptions,
}

impl Selectors {
    /// Those of a child before there is an IKE SA; `dynamic` needs the one address that it will stand for.
    pub fn of(child: &Child, local_addrs: &[String], remote_addrs: &[String]) -> Result<Self, String> {
        if child.numbering.gives_any() {
            return Err("a mark or if_id is %unique: an SA that is up has such a number, a trap has none".to_owned());
        }
        Ok(Self {
            local_ts: fixed(&child.local_ts, local_addrs, "local")?,
            remote_ts: fixed(&child.remote_ts, remote_addrs, "remote")?,
            options: child.options.clone(),
        })
    }
}

/// True when selectors of both sides have a packet inside.
pub fn covers(local_ts: &[TrafficSelector], remote_ts: &[TrafficSelector], packet: &Flow) -> bool {
    let (local, remote) = TrafficSelector::of_flow(packet);
    local_ts.iter().any(|ts| ts.contains(&local)) && remote_ts.iter().any(|ts| ts.contains(&remote))
}

fn fixed(configured: &[ConfiguredSelector], addresses: &[String], side: &str) -> Result<Vec<TrafficSelector>, String> {
    let address = match addresses {
        [only] => only.parse::<IpAddr>().ok().filter(|address| !address.is_unspecified()),
        _ => None,
    };
    configured
        .iter()
        .map(|selector| match (selector, address) {
            (ConfiguredSelector::Fixed(fixed), _) => Ok(*fixed),
            (dynamic, Some(address)) => Ok(dynamic.resolve(address)),
            (ConfiguredSelector::Dynamic { .. }, None) => Err(format!(
                "{side}_ts is dynamic, and {side}_addrs is not one address: write the selectors out, or one address"
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn dynamic_needs_exactly_one_address() {
        let dynamic = [ConfiguredSelector::Dynamic { protocol: 17, start_port: 0, end_port: u16::MAX }];
        for addresses in [&[][..], &["%any"], &["0.0.0.0"], &["b.example"], &["192.0.2.0/24"], &["192.0.2.2", "::1"]] {
            let addresses: Vec<String> = addresses.iter().map(|text| (*text).to_owned()).collect();
            let reason = fixed(&dynamic, &addresses, "remote").unwrap_err();
            assert!(reason.contains("remote_ts is dynamic"), "{addresses:?}: {reason}");
        }
        let resolved = fixed(&dynamic, &["192.0.2.2".to_owned()], "remote").unwrap();
        assert_eq!(resolved, [TrafficSelector { protocol: 17, ..TrafficSelector::host("192.0.2.2".parse().unwrap()) }]);
    }

    #[test]
    fn fixed_selectors_need_no_address() {
        let network = [TrafficSelector::network("10.2.0.0".parse().unwrap(), 24).unwrap()];
        let configured: Vec<_> = network.iter().copied().map(ConfiguredSelector::Fixed).collect();
        assert_eq!(fixed(&configured, &[], "remote").unwrap(), network);
    }
}
