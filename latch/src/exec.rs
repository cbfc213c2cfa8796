//! Which connections of an unmodified program are latched to whom: the rules of `latchkey exec`, which go to the library
//! that it preloads by the environment.
//!
//! A rule is a line, the first that matches counts, and what matches none passes as it is:
//!
//! ```text
//! tcp:5432=db.example             connections to port 5432 of anybody must be to db.example
//! tcp:10.2.0.0/24:*=*.example     connections to that network, any port
//! udp:[2001:db8::1]:53=%any       connected UDP sockets
//! listen:4000-4009=a.example      connections that the program accepts on these ports
//! tcp:22 pass                     as they are
//! * refuse                        everything else fails
//! ```

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipsec::selector::TrafficSelector;
use pad::IdentityPattern;

/// The environment's name for the rules.
pub const ENVIRONMENT_RULES: &str = "LATCHKEY_EXEC_RULES";

/// The environment's name for the path of the daemon's latch socket.
pub const ENVIRONMENT_SOCKET: &str = "LATCHKEY_EXEC_SOCKET";

/// The environment's name for the seconds after which TCP connections without a sign of life fail; none if it is not there.
pub const ENVIRONMENT_DEAD_AFTER: &str = "LATCHKEY_EXEC_DEAD_AFTER";

/// The environment's name for leaving io_uring open.
pub const ENVIRONMENT_UNCONFINED: &str = "LATCHKEY_EXEC_UNCONFINED";

/// Rules in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules(Vec<Rule>);

/// One rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    selector: Selector,
    action: Action,
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The connection is latched to a peer with this identity, or fails.
    Latch(String),
    /// The connection is as without us.
    Pass,
    /// The connection fails.
    Refuse,
}

/// What a program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It connects by TCP.
    Tcp,
    /// It connects a UDP socket, or sends a datagram.
    Udp,
    /// It listens for TCP connections.
    Listen,
    /// It connects by another protocol of IP.
    Other,
}

#[derive(Clone, Debug, PartialEq)]
enum Selector {
    Everything,
    Some { kind: Kind, network: Option<(IpAddr, IpAddr)>, ports: RangeInclusive<u16> },
}

/// A line that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule:?}: {reason}")]
pub struct RuleError {
    rule: String,
    reason: String,
}

impl Rules {
    /// Reads rules, one a line; empty lines and those that begin with `#` are none.
    pub fn parse(text: &str) -> Result<Self, RuleError> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(Rule::from_str).collect::<Result<_, _>>().map(Self)
    }

    /// What is to be done about a connection: `address` is the other end, or our own of a listener.
    pub fn action(&self, kind: Kind, address: SocketAddr) -> &Action {
        let found = self.0.iter().find(|rule| rule.selector.matches(kind, address));
        found.map_or(&Action::Pass, |rule| &rule.action)
    }
}

impl Selector {
    fn matches(&self, kind: Kind, address: SocketAddr) -> bool {
        let Self::Some { kind: wanted, network, ports } = self else { return true };
        let ip = address.ip().to_canonical();
        let within = match network {
            None => true,
            // Who listens everywhere listens there, too.
            Some(_) if kind == Kind::Listen && ip.is_unspecified() => true,
            Some((start, end)) => ip.is_ipv4() == start.is_ipv4() && (*start..=*end).contains(&ip),
        };
        *wanted == kind && within && ports.contains(&address.port())
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let parsed = match text.split_once('=') {
            Some((_, peer)) if peer.trim().is_empty() => Err("no peer stands after the =".to_owned()),
            Some((selector, peer)) => selector.trim().parse().and_then(|selector| {
                IdentityPattern::parse(peer.trim()).map_err(|error| error.to_string())?;
                Ok(Self { selector, action: Action::Latch(peer.trim().to_owned()) })
            }),
            None => match text.rsplit_once(' ').map(|(selector, verb)| (selector.trim().parse(), verb)) {
                Some((selector, "pass")) => selector.map(|selector| Self { selector, action: Action::Pass }),
                Some((selector, "refuse")) => selector.map(|selector| Self { selector, action: Action::Refuse }),
                _ => Err("neither SELECTOR=PEER nor SELECTOR pass nor SELECTOR refuse".to_owned()),
            },
        };
        parsed.map_err(|reason| RuleError { rule: text.to_owned(), reason })
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Everything);
        }
        let (kind, rest) = text.split_once(':').ok_or("a selector is tcp:PORT, udp:PORT, listen:PORT or *")?;
        let kind = match kind {
            "tcp" => Kind::Tcp,
            "udp" => Kind::Udp,
            "listen" => Kind::Listen,
            other => return Err(format!("{other:?} is none of tcp, udp and listen")),
        };
        let (address, ports) = match rest.rsplit_once(':') {
            Some((address, ports)) => (Some(address), ports),
            None => (None, rest),
        };
        Ok(Self::Some { kind, network: address.map(network).transpose()?, ports: self::ports(ports)? })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Listen => "listen",
            Self::Other => "other",
        })
    }
}

/// `192.0.2.1`, `192.0.2.0/24`, `[2001:db8::1]`, `[2001:db8::/32]`.
fn network(text: &str) -> Result<(IpAddr, IpAddr), String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let wrong = || format!("{text:?} is not an address or a network");
    let (address, length) = match bare.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u8>().map_err(|_| wrong())?)),
        None => (bare, None),
    };
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    if address.is_ipv6() && bare.len() == text.len() {
        return Err(format!("{text:?}: addresses of IPv6 stand in brackets"));
    }
    let length = length.unwrap_or(if address.is_ipv4() { 32 } else { 128 });
    let selector = TrafficSelector::network(address, length).ok_or_else(wrong)?;
    Ok((selector.start, selector.end))
}

/// `*`, `80`, `8000-8099`.
fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    if text == "*" {
        return Ok(0..=u16::MAX);
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err(format!("{text:?} is not a port, a range of ports or *")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_is_no_rule_is_refused_with_what_is_wrong() {
        for (text, reason) in [
            ("tcp:5432", "neither SELECTOR=PEER"),
            ("tcp:5432 allow", "neither SELECTOR=PEER"),
            ("=db.example", "a selector is"),
            ("tcp=db.example", "a selector is"),
            ("sctp:80=db.example", "none of tcp, udp and listen"),
            ("tcp:=db.example", "is not a port"),
            ("tcp:65536=db.example", "is not a port"),
            ("tcp:9-8=db.example", "is not a port"),
            ("tcp:-=db.example", "is not a port"),
            ("tcp:host:80=db.example", "is not an address"),
            ("tcp:10.0.0.0/33:80=db.example", "is not an address"),
            ("tcp:10.0.0.0/:80=db.example", "is not an address"),
            ("tcp:2001:db8::1:80=db.example", "in brackets"),
            ("tcp:80=", "no peer"),
        ] {
            let error = Rules::parse(text).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{text:?}: ")) && error.reason.contains(reason), "{error}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_counts() {
        let rules = Rules::parse(
            "# the database\n\ntcp:10.2.0.0/24:5432=db.example\n tcp:5432 refuse\nudp:[2001:db8::/32]:*=C=CH, CN=*\n\
             listen:10.1.0.1:4000-4009 = a.example\nlisten:4000 pass\ntcp:22 pass\n* refuse\n",
        )
        .unwrap();
        let latch = |peer: &str| Action::Latch(peer.to_owned());
        for (kind, address, action) in [
            (Kind::Tcp, "10.2.0.7:5432", latch("db.example")),
            (Kind::Tcp, "[::ffff:10.2.0.7]:5432", latch("db.example")),
            (Kind::Tcp, "10.3.0.7:5432", Action::Refuse),
            (Kind::Udp, "10.2.0.7:5432", Action::Refuse),
            (Kind::Udp, "[2001:db8:1::]:53", latch("C=CH, CN=*")),
            (Kind::Listen, "10.1.0.1:4009", latch("a.example")),
            (Kind::Listen, "10.1.0.2:4009", Action::Refuse),
            (Kind::Listen, "0.0.0.0:4000", latch("a.example")),
            (Kind::Listen, "10.1.0.2:4000", Action::Pass),
            (Kind::Tcp, "192.0.2.1:22", Action::Pass),
            (Kind::Other, "192.0.2.1:22", Action::Refuse),
        ] {
            assert_eq!(rules.action(kind, address.parse().unwrap()), &action, "{kind} {address}");
        }
        assert_eq!(Rules::default().action(Kind::Tcp, "192.0.2.1:22".parse().unwrap()), &Action::Pass);
    }
}
