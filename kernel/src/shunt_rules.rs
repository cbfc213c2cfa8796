//! Shunts where ESP is done in user space (RFC 4301 §4.4.1: BYPASS and DISCARD): rules of policy routing around the one that
//! leads packets into the tunnel's device. What passes jumps over that rule. What is dropped behind it, the system refuses:
//! with ICMP "administratively prohibited" where it forwards (§5.1), with an error to programs of this host. Single flows may pass
//! as by a shunt of their own ([`FlowRules`]).
//!
//! Such rules are asked about each packet that is routed, sent here or forwarded, in either direction. What comes for this
//! host itself is not routed by them: for that there are policies of the kernel, where it has any ([`crate::xfrm`]).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use ipsec::guard::LogicalSpd;
use ipsec::plane::{PlaneError, Shunt, ShuntAction};
use ipsec::selector::{Flow, TrafficSelector};

use crate::netlink::{FlowSelector, Netlink, Rule, RuleAction, RuleSelector};
use crate::network::lock;

/// Rules of one shunt, at most.
const MOST_RULES: usize = 256;

/// Rules of flows, at most two for each: the system looks at one after the other.
const MOST_FLOWS: usize = 1024;

/// Whose rules they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Shunt(u32),
    Flow(Flow),
}

/// Rules for single flows, of a network's [`ShuntRules`].
pub(crate) struct FlowRules(pub(crate) Arc<Mutex<ShuntRules>>);

impl LogicalSpd for FlowRules {
    fn bypass(&self, flow: &Flow) -> Result<(), String> {
        lock(&self.0).add_flow(flow).map_err(|e| format!("install the rules of {flow}: {e}"))
    }

    fn remove(&self, flow: &Flow) {
        if let Err(error) = lock(&self.0).remove_of(Owner::Flow(*flow)) {
            tracing::error!(%flow, %error, "removing the rules of a flow");
        }
    }
}

/// The shunts' rules.
pub(crate) struct ShuntRules {
    netlink: Netlink,
    /// Of the rule that leads into the tunnel. What passes is looked for before it, what is dropped behind it.
    priority: u32,
    /// The tunnel's device, out of which comes what an SA has protected.
    device: String,
    /// Of our own packets.
    mark: u32,
    by_owner: BTreeMap<Owner, Vec<Rule>>,
    /// What all of them need.
    common: Vec<Rule>,
}

impl ShuntRules {
    /// Removes what a daemon has left that died.
    pub(crate) fn new(mut netlink: Netlink, (priority, mark): (u32, u32), device: String) -> io::Result<Self> {
        netlink.delete_own_rules()?;
        Ok(Self { netlink, priority, device, mark, by_owner: BTreeMap::new(), common: Vec::new() })
    }

    /// True for one that is installed.
    pub(crate) fn contains(&self, number: u32) -> bool {
        self.by_owner.contains_key(&Owner::Shunt(number))
    }

    /// Installs a shunt's rules: all of them, or on error none.
    pub(crate) fn add(&mut self, shunt: &Shunt) -> Result<(), PlaneError> {
        let in_rules =
            |source| PlaneError::System { action: format!("install the rules of shunt {}", shunt.number), source };
        let rules = rules(shunt, self.priority).map_err(in_rules)?;
        self.add_rules(&rules).map_err(in_rules)?;
        self.by_owner.insert(Owner::Shunt(shunt.number), rules);
        Ok(())
    }

    fn add_flow(&mut self, flow: &Flow) -> io::Result<()> {
        self.remove_of(Owner::Flow(*flow))?;
        let flows = self.by_owner.keys().filter(|owner| matches!(owner, Owner::Flow(_))).count();
        if flows >= MOST_FLOWS {
            return Err(io::Error::other(format!("there are rules for {MOST_FLOWS} flows, and no more are taken")));
        }
        let rules = rules_of_flow(flow, self.priority)?;
        self.add_rules(&rules)?;
        self.by_owner.insert(Owner::Flow(*flow), rules);
        Ok(())
    }

    fn add_rules(&mut self, rules: &[Rule]) -> io::Result<()> {
        self.add_common()?;
        for (index, rule) in rules.iter().enumerate() {
            if let Err(e) = self.netlink.add_rule(rule) {
                let done = rules.iter().take(index);
                let undone = done.map(|rule| self.netlink.delete_rule(rule)).fold(Ok(()), io::Result::and);
                return undone.and(Err(e));
            }
        }
        Ok(())
    }

    /// Removes a shunt's rules. Does all that it can, and gives the first error.
    pub(crate) fn remove(&mut self, number: u32) -> io::Result<()> {
        self.remove_of(Owner::Shunt(number))
    }

    fn remove_of(&mut self, owner: Owner) -> io::Result<()> {
        let rules = self.by_owner.remove(&owner).unwrap_or_default();
        let mut outcome = rules.iter().map(|rule| self.netlink.delete_rule(rule)).fold(Ok(()), io::Result::and);
        if self.by_owner.is_empty() {
            let common = std::mem::take(&mut self.common);
            outcome = common.iter().map(|rule| self.netlink.delete_rule(rule)).fold(outcome, io::Result::and);
        }
        outcome
    }

    /// Removes all.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        let owners: Vec<Owner> = self.by_owner.keys().copied().collect();
        owners.into_iter().map(|owner| self.remove_of(owner)).fold(Ok(()), io::Result::and)
    }

    /// As whom the system's news name the changes of rules.
    pub(crate) fn port(&self) -> u32 {
        self.netlink.port()
    }

    /// Sets all again that somebody may have removed.
    pub(crate) fn restore(&mut self) -> io::Result<()> {
        let mut restored = false;
        for rule in &self.common {
            restored |= self.netlink.ensure_rule(rule)?;
        }
        for rule in self.by_owner.values().flatten() {
            // Of equal priority, those that skip have to come first, and the last one set comes last.
            if restored && rule.action == RuleAction::Prohibit {
                self.netlink.delete_rule(rule)?;
            }
            restored |= self.netlink.ensure_rule(rule)?;
        }
        if restored {
            tracing::warn!("somebody removed rules of shunts; they are put right");
        }
        Ok(())
    }

    /// Where what passes goes on, what comes out of the tunnel, and what this daemon sends: behind what is dropped.
    fn add_common(&mut self) -> io::Result<()> {
        if !self.common.is_empty() {
            return Ok(());
        }
        for ipv6 in [false, true] {
            let (end, before_drops) = (after_all(self.priority), self.priority.saturating_add(1));
            let skips = [RuleSelector::From(self.device.clone()), RuleSelector::Mark(self.mark)];
            let skips =
                skips.map(|selector| Rule { ipv6, priority: before_drops, action: RuleAction::GoTo(end), selector });
            let end = Rule { ipv6, priority: end, action: RuleAction::Nothing, selector: RuleSelector::Any };
            for rule in std::iter::once(end).chain(skips) {
                match self.netlink.add_rule(&rule) {
                    Ok(()) => self.common.push(rule),
                    Err(e) if ipv6 => tracing::info!("no shunts for IPv6: {e}"),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }
}

/// The rule behind those of shunts that drop.
fn after_all(priority: u32) -> u32 {
    priority.saturating_add(2)
}

/// The rules that select what a shunt selects, in both directions.
fn rules(shunt: &Shunt, priority: u32) -> io::Result<Vec<Rule>> {
    let refuse = |reason: String| Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    if priority < 2 {
        return refuse(format!("routing_table_prio = {priority} leaves no room for rules before it"));
    }
    let mut rules = Vec::new();
    for local in &shunt.local_ts {
        for remote in &shunt.remote_ts {
            let Some(protocol) = common_protocol(local, remote) else { continue };
            let (local_ports, remote_ports) = (ports(local, protocol)?, ports(remote, protocol)?);
            for ours in local.networks() {
                for theirs in remote.networks().into_iter().filter(|theirs| theirs.0.is_ipv4() == ours.0.is_ipv4()) {
                    let out = FlowSelector {
                        from: ours,
                        to: theirs,
                        protocol,
                        source_ports: local_ports,
                        destination_ports: remote_ports,
                    };
                    let back = FlowSelector {
                        from: theirs,
                        to: ours,
                        protocol,
                        source_ports: remote_ports,
                        destination_ports: local_ports,
                    };
                    let (priority, action) = match shunt.action {
                        ShuntAction::Pass => (priority.saturating_sub(1), RuleAction::GoTo(after_all(priority))),
                        ShuntAction::Drop => (priority.saturating_add(1), RuleAction::Prohibit),
                    };
                    for flow in [out, back] {
                        let rule =
                            Rule { ipv6: !ours.0.is_ipv4(), priority, action, selector: RuleSelector::Flow(flow) };
                        // Where both sides are the same network, one direction is the other.
                        if !rules.contains(&rule) {
                            rules.push(rule);
                        }
                    }
                    if rules.len() > MOST_RULES {
                        return refuse(format!("its selectors take more than {MOST_RULES} rules"));
                    }
                }
            }
        }
    }
    Ok(rules)
}

/// The rules that select one flow, in both directions. What it has of its own goes before all shunts.
fn rules_of_flow(flow: &Flow, priority: u32) -> io::Result<Vec<Rule>> {
    if priority < 3 {
        let reason = format!("routing_table_prio = {priority} leaves no room for rules before it");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let action = RuleAction::GoTo(after_all(priority));
    let (local, remote) = TrafficSelector::of_flow(flow);
    let (ours, theirs) = (ports(&local, flow.protocol)?, ports(&remote, flow.protocol)?);
    let ends = [(flow.local, ours, flow.remote, theirs), (flow.remote, theirs, flow.local, ours)];
    let rule = |(source, source_ports, destination, destination_ports): (IpAddr, _, IpAddr, _)| {
        let prefix = if source.is_ipv4() { 32 } else { 128 };
        let selector = RuleSelector::Flow(FlowSelector {
            from: (source, prefix),
            to: (destination, prefix),
            protocol: flow.protocol,
            source_ports,
            destination_ports,
        });
        Rule { ipv6: source.is_ipv6(), priority: priority.saturating_sub(2), action, selector }
    };
    Ok(ends.map(rule).into())
}

/// The protocol of packets that both select, 0 for any; `None` where there are none.
fn common_protocol(local: &TrafficSelector, remote: &TrafficSelector) -> Option<u8> {
    match (local.protocol, remote.protocol) {
        (0, protocol) | (protocol, 0) => Some(protocol),
        (ours, theirs) => (ours == theirs).then_some(ours),
    }
}

/// A range of ports as a rule has it; `None` for any.
fn ports(selector: &TrafficSelector, protocol: u8) -> io::Result<Option<(u16, u16)>> {
    const WITH_PORTS: [u8; 4] = [6, 17, 33, 132];
    let refuse = |reason: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{selector}: {reason}")));
    match (selector.start_port, selector.end_port) {
        (0, u16::MAX) => Ok(None),
        (start, end) if start > end => refuse("rules know nothing of OPAQUE ports"),
        _ if !WITH_PORTS.contains(&protocol) => refuse("rules know ports of TCP, UDP, DCCP and SCTP only"),
        (0, _) | (_, u16::MAX) => refuse("rules know ports from 1 to 65534 only, unless it is any port"),
        range => Ok(Some(range)),
    }
}

#[cfg(test)]
mod tests {
    use ipsec::plane::KernelOptions;

    use super::*;

    fn selector(network: &str, protocol: u8, (start_port, end_port): (u16, u16)) -> TrafficSelector {
        let (ip, prefix) = network.split_once('/').unwrap();
        let network = TrafficSelector::network(ip.parse().unwrap(), prefix.parse().unwrap()).unwrap();
        TrafficSelector { protocol, start_port, end_port, ..network }
    }

    fn shunt(action: ShuntAction, local: TrafficSelector, remote: TrafficSelector) -> Shunt {
        let (local_ts, remote_ts) = (vec![local], vec![remote]);
        Shunt { number: 1, action, local_ts, remote_ts, options: KernelOptions::default() }
    }

    const ANY: (u16, u16) = (0, u16::MAX);

    // RFC 4301 §4.4.1
    #[test]
    fn what_passes_is_before_the_tunnel_and_what_drops_behind_it() {
        let local = selector("10.1.0.0/24", 0, ANY);
        let rules_of = |action, remote| rules(&shunt(action, local, remote), 220).unwrap();
        let pass = rules_of(ShuntAction::Pass, selector("10.2.0.0/24", 6, (80, 90)));
        let [out, back] = &pass[..] else { panic!("{pass:?}") };
        assert_eq!((out.priority, &out.action, out.ipv6), (219, &RuleAction::GoTo(222), false));
        let (RuleSelector::Flow(out), RuleSelector::Flow(back)) = (&out.selector, &back.selector) else { panic!() };
        assert_eq!((out.protocol, out.source_ports, out.destination_ports), (6, None, Some((80, 90))));
        assert_eq!((back.from, back.to, back.source_ports), (out.to, out.from, Some((80, 90))));
        let drop = rules_of(ShuntAction::Drop, selector("10.2.0.0/24", 0, ANY));
        assert!(drop.iter().all(|rule| rule.priority == 221 && rule.action == RuleAction::Prohibit));
        assert_eq!(rules_of(ShuntAction::Drop, local).len(), 1, "a network to itself");
        assert!(rules_of(ShuntAction::Drop, selector("2001:db8::/32", 0, ANY)).is_empty(), "of two families");
    }

    #[test]
    fn what_rules_cannot_select_is_refused() {
        let any = selector("10.1.0.0/24", 0, ANY);
        let refused = |remote: TrafficSelector| {
            rules(&shunt(ShuntAction::Drop, any, remote), 220).map(|rules| rules.len()).unwrap_err().to_string()
        };
        assert!(refused(selector("10.2.0.0/24", 6, (1024, u16::MAX))).contains("1 to 65534"));
        assert!(refused(selector("10.2.0.0/24", 17, (0, 53))).contains("1 to 65534"));
        assert!(refused(selector("10.2.0.0/24", 1, (2048, 2048))).contains("TCP, UDP"));
        assert!(refused(selector("10.2.0.0/24", 0, (u16::MAX, 0))).contains("OPAQUE"));
        let crooked = TrafficSelector {
            start: "1.0.0.1".parse().unwrap(),
            end: "254.255.255.254".parse().unwrap(),
            ..selector("10.2.0.0/24", 0, ANY)
        };
        let both = shunt(ShuntAction::Drop, crooked, crooked);
        assert!(rules(&both, 220).unwrap_err().to_string().contains("256 rules"));
        assert!(rules(&shunt(ShuntAction::Pass, any, any), 1).unwrap_err().to_string().contains("routing_table_prio"));
        let (tcp, udp) = (selector("10.1.0.0/24", 6, ANY), selector("10.2.0.0/24", 17, ANY));
        assert!(rules(&shunt(ShuntAction::Pass, tcp, udp), 220).unwrap().is_empty());
    }

    fn flow(port: u16) -> Flow {
        let (local, remote) = ("10.1.0.1".parse().unwrap(), "10.2.0.1".parse().unwrap());
        Flow { protocol: 6, local, local_port: port, remote, remote_port: 443 }
    }

    // RFC 5660 §3.1: "protecting or bypassing the exact 5-tuple".
    #[test]
    fn a_flow_of_its_own_goes_before_all_shunts_and_is_exact() {
        let [out, back] = &rules_of_flow(&flow(40_000), 220).unwrap()[..] else { panic!() };
        assert_eq!((out.priority, &out.action, out.ipv6), (218, &RuleAction::GoTo(222), false));
        let (RuleSelector::Flow(to), RuleSelector::Flow(fro)) = (&out.selector, &back.selector) else { panic!() };
        assert_eq!((to.from, to.to, to.protocol), ((flow(0).local, 32), (flow(0).remote, 32), 6));
        assert_eq!((to.source_ports, to.destination_ports), (Some((40_000, 40_000)), Some((443, 443))));
        assert_eq!((fro.from, fro.to, fro.source_ports), (to.to, to.from, to.destination_ports));
        for (port, priority, why) in [(u16::MAX, 220, "65534"), (40_000, 2, "no room")] {
            let error = rules_of_flow(&flow(port), priority).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
