//! All connections, so that neither a stranger's request nor a peer's makes us look at each of them: by name, by the
//! addresses that they admit, and by the identities that they name.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipsec::exclusion::without_addresses;
use ipsec::selector::TrafficSelector;
use ipsec::transform::Proposal;
use pad::{AuthClass, Identity, IdentityPattern, Specificity};

use super::Path;
use crate::config::{AddressRange, Child, ConfiguredSelector, Connection};

/// The connections with their tables, which are made once for each load.
#[derive(Default)]
pub(crate) struct Connections {
    /// In order of configuration; the tables have places in it.
    all: Vec<Arc<Connection>>,
    /// For each connection a number that stands for its proposals.
    proposals: Vec<usize>,
    by_name: BTreeMap<Arc<str>, Vec<usize>>,
    /// Those that name the peer's addresses.
    by_remote: Ranges,
    /// Those that name ours only.
    by_local: Ranges,
    /// Those that name none.
    anywhere: Vec<usize>,
    /// Identities that some connection has a peer prove, and names exactly.
    exact: HashSet<Identity>,
    /// All other patterns of what peers prove to be, each once.
    patterns: Vec<IdentityPattern>,
    /// Addresses that are for peers who prove who they are: ranges in order, none of which meets another.
    claimed: Vec<(IpAddr, IpAddr)>,
}

/// A connection that admits a path's addresses.
#[derive(Clone)]
pub(crate) struct Admitting {
    pub(crate) connection: Arc<Connection>,
    /// Connections with the same number have the same proposals.
    pub(crate) proposals: usize,
}

impl Connections {
    /// All connections, in order of configuration.
    pub(crate) fn new(all: Vec<Arc<Connection>>) -> Self {
        let mut by_name: BTreeMap<Arc<str>, Vec<usize>> = BTreeMap::new();
        let (mut by_remote, mut by_local, mut anywhere) = (Vec::new(), Vec::new(), Vec::new());
        let (mut exact, mut known, mut patterns) = (HashSet::new(), HashSet::new(), Vec::new());
        let mut numbers: HashMap<&[Proposal], usize> = HashMap::new();
        let mut proposals = Vec::new();
        for (place, connection) in all.iter().enumerate() {
            by_name.entry(connection.name.as_str().into()).or_default().push(place);
            let ranges = |ranges: &[AddressRange]| ranges.iter().map(|range| (*range, place)).collect::<Vec<_>>();
            match (connection.remote_addrs.as_slice(), connection.local_addrs.as_slice()) {
                ([], []) => anywhere.push(place),
                ([], local) => by_local.extend(ranges(local)),
                (remote, _) => by_remote.extend(ranges(remote)),
            }
            let pattern = connection.remote.proved_id();
            match pattern.as_exact() {
                Some(identity) => {
                    exact.insert(identity.clone());
                }
                None if known.insert(pattern) => patterns.push(pattern.clone()),
                None => {}
            }
            let next = numbers.len();
            proposals.push(*numbers.entry(connection.proposals.as_slice()).or_insert(next));
        }
        drop((numbers, known));
        let (by_remote, by_local) = (Ranges::new(by_remote), Ranges::new(by_local));
        let claimed = claimed(&all);
        Self { all, proposals, by_name, by_remote, by_local, anywhere, exact, patterns, claimed }
    }

    /// What of these selectors of a peer's may be for one that proves nothing (RFC 7619 §2.5, §3; RFC 5386 §2).
    pub(crate) fn for_nobody(&self, remote_ts: &[TrafficSelector]) -> Vec<TrafficSelector> {
        without_addresses(remote_ts, &self.claimed)
    }

    /// Those of this name, in order of configuration.
    pub(crate) fn named(&self, name: &str) -> impl Iterator<Item = &Arc<Connection>> {
        self.by_name.get(name).into_iter().flatten().filter_map(|place| self.all.get(*place))
    }

    /// A name, shared with all who ask for it while there is a connection of this name.
    pub(crate) fn name(&self, name: &str) -> Arc<str> {
        self.by_name.get_key_value(name).map_or_else(|| name.into(), |(name, _)| Arc::clone(name))
    }

    /// Those that admit the addresses at both ends of a path, in order of configuration.
    pub(crate) fn admitting(&self, path: &Path) -> Vec<Admitting> {
        let mut places = self.anywhere.clone();
        self.by_remote.find(path.remote.ip(), &mut places);
        self.by_local.find(path.local.ip(), &mut places);
        places.sort_unstable();
        places.dedup();
        let admitting = |place: usize| {
            let (connection, proposals) = (self.all.get(place)?, *self.proposals.get(place)?);
            // Of those that name the peer's addresses ours are still to be compared.
            let admits = connection.admits_addresses(path);
            admits.then(|| Admitting { connection: Arc::clone(connection), proposals })
        };
        places.into_iter().filter_map(admitting).collect()
    }

    /// How narrowly an identity is named by the connection that names it most narrowly, as one that its peer proves.
    pub(crate) fn narrowest(&self, identity: &Identity) -> Option<Specificity> {
        // Asked of the pattern, as there are identities that no pattern admits.
        let exact = self.exact.get(identity).map(|exact| IdentityPattern::exact(exact.clone()));
        let exact = exact.and_then(|exact| exact.match_specificity(identity));
        exact.or_else(|| self.patterns.iter().filter_map(|pattern| pattern.match_specificity(identity)).max())
    }
}

/// What the children of connections with authentication are for on the peer's side. `dynamic` stands for the peer's addresses, where
/// the connection names them.
fn claimed(all: &[Arc<Connection>]) -> Vec<(IpAddr, IpAddr)> {
    let authenticated = all.iter().filter(|connection| connection.remote.class != AuthClass::Null);
    let selectors = authenticated.flat_map(|connection| {
        let of_child = |child: &Arc<Child>| child.remote_ts.clone();
        connection.children.iter().flat_map(of_child).map(move |selector| (connection, selector))
    });
    let mut ranges: Vec<(IpAddr, IpAddr)> = selectors
        .flat_map(|(connection, selector)| match selector {
            ConfiguredSelector::Fixed(fixed) => vec![(fixed.start, fixed.end)],
            ConfiguredSelector::Dynamic { .. } => {
                connection.remote_addrs.iter().map(|range| (range.start, range.end)).collect()
            }
        })
        .filter(|(start, end)| start <= end && start.is_ipv4() == end.is_ipv4())
        .collect();
    ranges.sort_unstable();
    let mut merged: Vec<(IpAddr, IpAddr)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(any(test, feature = "fuzzing"))]
impl std::ops::Index<usize> for Connections {
    type Output = Arc<Connection>;

    #[allow(clippy::indexing_slicing, reason = "for tests")]
    fn index(&self, place: usize) -> &Self::Output {
        &self.all[place]
    }
}

/// Ranges of addresses, and for each the place of the connection that has it: a balanced tree laid out in a list, whose
/// nodes know the last address of all below them.
#[derive(Default)]
struct Ranges(Vec<Node>);

struct Node {
    range: AddressRange,
    place: usize,
    /// The last address of this range and of those below it.
    last: IpAddr,
}

impl Ranges {
    fn new(mut ranges: Vec<(AddressRange, usize)>) -> Self {
        ranges.sort_unstable_by_key(|(range, place)| (range.start, range.end, *place));
        let node = |(range, place): (AddressRange, usize)| Node { range, place, last: range.end };
        let mut nodes: Vec<Node> = ranges.into_iter().map(node).collect();
        fn note_last(nodes: &mut [Node]) -> Option<IpAddr> {
            let (before, rest) = nodes.split_at_mut(nodes.len() / 2);
            let (node, after) = rest.split_first_mut()?;
            let last = [note_last(before), note_last(after)].into_iter().flatten().fold(node.range.end, IpAddr::max);
            node.last = last;
            Some(last)
        }
        note_last(&mut nodes);
        Self(nodes)
    }

    /// Adds the places of the ranges that an address is in.
    fn find(&self, address: IpAddr, found: &mut Vec<usize>) {
        fn visit(nodes: &[Node], address: IpAddr, found: &mut Vec<usize>) {
            let (before, rest) = nodes.split_at(nodes.len() / 2);
            let Some((node, after)) = rest.split_first().filter(|(node, _)| node.last >= address) else { return };
            visit(before, address, found);
            if node.range.start <= address {
                found.extend(node.range.contains(address).then_some(node.place));
                visit(after, address, found);
            }
        }
        visit(&self.0, address, found);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

    use proptest::prelude::*;

    use super::*;
    use crate::crypto::parse_proposals;
    use crate::engine::Transport;
    use crate::engine::tests::connection;

    /// Few addresses, so that ranges meet, at both ends of either family and where one ends and the other begins.
    fn address() -> impl Strategy<Value = IpAddr> {
        let v4 = prop_oneof![0_u32..6, 0xffff_fffd..=u32::MAX];
        let v6 = prop_oneof![0_u128..6, (u128::MAX - 2)..=u128::MAX];
        prop_oneof![
            v4.prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
            v6.prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
        ]
    }

    fn range() -> impl Strategy<Value = AddressRange> {
        prop_oneof![
            address().prop_map(AddressRange::host),
            (address(), address()).prop_map(|(one, other)| AddressRange { start: one.min(other), end: one.max(other) }),
            // The wrong way round admits nobody.
            (address(), address()).prop_map(|(start, end)| AddressRange { start, end }),
        ]
    }

    prop_compose! {
        fn configured()(
            name in "[a-c]",
            local_addrs in prop::collection::vec(range(), 0..3),
            remote_addrs in prop::collection::vec(range(), 0..4),
            id in prop::sample::select(vec!["%any", "a.example", "b.example", "*.example", "*.org", "192.0.2.0/24"]),
            proposals in prop::sample::select(vec!["aes128gcm16-prfsha256-x25519", "aes256gcm16-prfsha256-x25519"]),
        ) -> Arc<Connection> {
            let mut made = Connection { name, local_addrs, remote_addrs, ..connection(0) };
            made.remote.remote_id = IdentityPattern::parse(id).unwrap();
            made.proposals = parse_proposals(proposals, ipsec::transform::Protocol::IKE).unwrap();
            Arc::new(made)
        }
    }

    fn same(one: &[Arc<Connection>], other: &[Arc<Connection>]) -> bool {
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| Arc::ptr_eq(one, other))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        // RFC 4301 §4.4.3: the PAD is ordered, so what is found must be what a look at all of them in order finds.
        #[test]
        fn the_tables_find_what_a_look_at_all_of_them_finds(
            all in prop::collection::vec(configured(), 0..24),
            local in address(),
            remote in address(),
            asserted in prop::sample::select(vec!["a.example", "B.Example", "c.org", "192.0.2.7", "192.0.3.7", "a@b"]),
        ) {
            let connections = Connections::new(all.clone());
            let socket = |address| SocketAddr::new(address, 500);
            let path = Path { local: socket(local), remote: socket(remote), transport: Transport::Udp };
            let simple: Vec<_> = all.iter().filter(|one| one.admits_addresses(&path)).map(Arc::clone).collect();
            let found = connections.admitting(&path);
            let places: Vec<_> = found.iter().map(|one| Arc::clone(&one.connection)).collect();
            prop_assert!(same(&places, &simple), "{} found, {} admit", places.len(), simple.len());
            for (one, other) in found.iter().zip(found.iter().skip(1)) {
                let equal = one.connection.proposals == other.connection.proposals;
                prop_assert_eq!(one.proposals == other.proposals, equal);
            }
            let asserted = Identity::parse(asserted).unwrap();
            let simple = all.iter().filter_map(|one| one.remote.remote_id.match_specificity(&asserted)).max();
            prop_assert_eq!(connections.narrowest(&asserted), simple);
            for name in ["a", "b", "c", "d"] {
                let simple: Vec<_> = all.iter().filter(|one| one.name == name).map(Arc::clone).collect();
                let named: Vec<_> = connections.named(name).map(Arc::clone).collect();
                prop_assert!(same(&named, &simple));
            }
        }
    }

    #[test]
    fn an_identity_of_an_unknown_type_is_named_by_nobody() {
        let mut named = connection(0);
        let unknown = Identity::Other { kind: 77, data: b"a".to_vec() };
        named.remote.remote_id = IdentityPattern::exact(unknown.clone());
        let mut any = connection(0);
        any.remote.remote_id = IdentityPattern::any();
        assert_eq!(Connections::new(vec![Arc::new(named), Arc::new(any)]).narrowest(&unknown), None);
    }
}
