//! What the engine hears of latches before it negotiates a Child SA.

use std::sync::Arc;

use ike::engine::{Party, Prospect, Protection, Reservations};
use ipsec::plane::EspSuite;
use ipsec::selector::Flow;
use latch::database::{Class, Database, Newcomer};

use crate::config::latches::offers;

/// The latched flows.
pub(super) struct Latched(pub(super) Arc<Database>);

impl Reservations for Latched {
    fn reserved(&self, prospect: &Prospect<'_>) -> Vec<Flow> {
        self.0.reserved(prospect.local_ts, prospect.remote_ts, |latched| newcomer(latched, prospect))
    }
}

fn newcomer(latched: &Class, prospect: &Prospect<'_>) -> Newcomer {
    let EspSuite { encr, key_bits, integ, esn: _ } = latched.suite;
    let suite = match prospect.protection {
        Protection::Chosen(suite) => suite,
        // What the peer may choose: perhaps the latched one.
        Protection::Offered(proposals) if offers(proposals, (encr, key_bits, integ)) => latched.suite,
        Protection::Offered(_) => return stranger_unless(is_expected(latched, prospect.party)),
    };
    let peer = match prospect.party {
        Party::Proved(peer) => peer,
        Party::Expected { .. } if is_expected(latched, prospect.party) => &latched.peer,
        Party::Expected { .. } => return Newcomer::Stranger,
    };
    let newcomer =
        Class { peer: Arc::clone(peer), mode: prospect.mode, suite, replay_protection: prospect.replay_protection };
    if newcomer == *latched { Newcomer::Congruent } else { stranger_unless(newcomer.is_between_the_ends_of(latched)) }
}

fn stranger_unless(same_peer: bool) -> Newcomer {
    if same_peer { Newcomer::SamePeer } else { Newcomer::Stranger }
}

/// The party is, or may turn out to be, of the latch's two identities.
fn is_expected(latched: &Class, party: Party<'_>) -> bool {
    let (peer, ours) = (&latched.peer.id, &latched.peer.local_id);
    match party {
        Party::Proved(proved) => (&proved.id, &proved.local_id) == (peer, ours),
        Party::Expected { remote, local } => remote.matches(peer) && local == ours,
    }
}
