//! Which of several policies that fit a packet goes first. The numbers are strongSwan's, so that the policies of both
//! daemons side by side go in the order of their selectors.

use ipsec::plane::ShuntAction;

use super::codec::Selector;

/// The first that no policy of a latch or of a latched port has.
pub(super) const BEHIND_LATCHES: u32 = super::ports::LAST + 1;

/// What a policy is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// It has an SA.
    Sa,
    /// It waits for one.
    Trap,
    /// It needs none.
    Shunt(ShuntAction),
}

/// The kernel's priority of a policy: less goes first, and the narrower selector has less.
pub(super) fn of(selector: &Selector, purpose: Purpose) -> u32 {
    let Selector { source, destination, protocol, source_port, destination_port, interface } = selector;
    let addresses = u32::from(source.1) + u32::from(destination.1);
    let ports = source_port.mask.count_ones() + destination_port.mask.count_ones();
    let base = match purpose {
        Purpose::Shunt(ShuntAction::Pass) => PASSES,
        Purpose::Sa | Purpose::Trap => PROTECTS,
        Purpose::Shunt(ShuntAction::Drop) => DROPS,
    };
    let mut priority = base - addresses * 512 - ports * 4;
    if *protocol != 0 {
        priority -= 256;
    }
    if *interface != 0 {
        priority -= 2;
    }
    match purpose {
        Purpose::Sa | Purpose::Shunt(_) => priority - 1,
        Purpose::Trap => priority,
    }
}

/// Of the widest policies: each kind goes as a whole before the next.
const PASSES: u32 = 200_000;
const PROTECTS: u32 = 400_000;
const DROPS: u32 = 600_000;

#[cfg(test)]
mod tests {
    use super::super::codec::Port;
    use super::*;

    fn selector(source: u8, destination: u8) -> Selector {
        let address = "10.0.0.0".parse().unwrap();
        let none = Port::default();
        Selector {
            source: (address, source),
            destination: (address, destination),
            protocol: 0,
            source_port: none,
            destination_port: none,
            interface: 0,
        }
    }

    /// As `ip xfrm policy` shows them on hosts with strongSwan.
    #[test]
    fn priorities_are_strongswan_s() {
        assert_eq!(of(&selector(24, 24), Purpose::Sa), 375_423);
        assert_eq!(of(&selector(32, 32), Purpose::Sa), 367_231);
        assert_eq!(of(&selector(24, 24), Purpose::Trap), 375_424);
        assert_eq!(of(&selector(24, 24), Purpose::Shunt(ShuntAction::Pass)), 175_423);
        assert_eq!(of(&selector(24, 24), Purpose::Shunt(ShuntAction::Drop)), 575_423);
    }

    #[test]
    fn what_passes_goes_first_and_what_drops_last_whatever_the_selectors() {
        let widest = selector(0, 0);
        let mut narrowest = selector(128, 128);
        let exact = Port { port: 1, mask: u16::MAX };
        (narrowest.protocol, narrowest.source_port, narrowest.destination_port) = (17, exact, exact);
        narrowest.interface = 1;
        assert!(of(&widest, Purpose::Shunt(ShuntAction::Pass)) < of(&narrowest, Purpose::Sa));
        assert!(of(&widest, Purpose::Trap) < of(&narrowest, Purpose::Shunt(ShuntAction::Drop)));
    }
}
