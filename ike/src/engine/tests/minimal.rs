//! Peers that refuse to rekey: NO_ADDITIONAL_SAS (RFC 7296 §4).

use super::*;
use crate::sa::channel::Received;
use crate::sa::fault::notify;
use crate::wire::NotifyType;

/// A CREATE_CHILD_SA request.
pub(super) fn is_refused(bytes: &[u8]) -> bool {
    let header = init::header(bytes);
    header.exchange == ExchangeType::CREATE_CHILD_SA && !header.response
}

/// What a minimal implementation answers.
pub(super) fn refuse(side: &mut Side, bytes: &[u8]) -> Vec<Vec<u8>> {
    let Ok(Incoming::Protected(protected)) = wire::parse(bytes) else { return Vec::new() };
    let header = protected.header;
    let ours = if header.from_initiator { header.responder_spi } else { header.initiator_spi };
    let slots = side.engine.sas.values_mut().map(|slot| &mut slot.sa);
    let sa = slots.filter_map(|sa| match sa {
        IkeSa::Established(sa) => Some(sa),
        _ => None,
    });
    let Some(sa) = sa.into_iter().find(|sa| sa.channel.local_spi() == ours) else { return Vec::new() };
    match sa.channel.receive(protected, bytes) {
        Received::Request(_) => {
            let no = notify(NotifyType::NO_ADDITIONAL_SAS, Vec::new());
            sa.channel.respond(&[no], None, &mut TestRng(9)).unwrap()
        }
        Received::Repeated(datagrams) => datagrams,
        _ => Vec::new(),
    }
}

/// `side` rekeys after these times, and the other one does not.
fn pair(seed: u64, side: usize, ike: u64, child: u64, change: impl Fn(&mut Connection)) -> Pair {
    let of = |which: usize| {
        let mut connection = connection(which);
        if which == side {
            connection.rekey_time = seconds(ike);
            connection.over_time = seconds(ike / 2);
            let mut net = (*connection.children[0]).clone();
            net.rekey_time = seconds(child);
            net.life_time = seconds(child * 3 / 2);
            connection.children = vec![Arc::new(net)];
        } else {
            change(&mut connection);
        }
        connection
    };
    let mut pair = established(Pair::with(seed, EngineConfig::default(), of(A), of(B)));
    pair.minimal[1 - side] = true;
    pair
}

fn is_up(side: &Side) -> bool {
    !side.installed.is_empty()
}

/// Runs; gives how long one of the sides had no Child SA.
fn gap(pair: &mut Pair, time: Duration) -> Duration {
    let (end, step) = (pair.now + time, Duration::from_millis(500));
    let mut gap = Duration::ZERO;
    while pair.now < end {
        pair.run(step);
        if !pair.sides.iter().all(is_up) {
            gap += step;
        }
    }
    gap
}

fn made(pair: &Pair) -> usize {
    pair.sides[A].events.iter().filter(|event| matches!(event, Event::IkeUp(_))).count()
}

// The new IKE SA comes before the old one goes, whoever made that, whichever of the two rekeys is refused.
#[test]
fn a_new_ike_sa_takes_the_place_of_what_the_peer_does_not_rekey() {
    for side in [A, B] {
        for (ike, child) in [(0, 600), (600, 0)] {
            let mut pair = pair(700, side, ike, child, |_| {});
            assert_eq!(gap(&mut pair, seconds(6 * 3600)), Duration::ZERO);
            // One in each rekey time, and not more.
            assert!((36..=37).contains(&made(&pair)), "{} IKE SAs in 36 rekey times", made(&pair));
            pair.run(seconds(30));
            pair.assert_same(1, 1);
        }
    }
}

#[test]
fn on_a_bad_network_too() {
    for seed in 0..40 {
        let mut pair = pair(seed, if seed % 2 == 0 { A } else { B }, 900, 600, |_| {});
        pair.loss = seed % 20;
        pair.duplication = 20;
        pair.delay.0 = Duration::from_millis(700);
        pair.run(seconds(3 * 3600));
        (pair.loss, pair.duplication) = (0, 0);
        pair.run(seconds(500));
        assert!(made(&pair) >= 15, "seed {seed}");
        for _ in 0..400 {
            let rests = |side: &Side| side.engine.sas.len() == 1 && side.installed.len() == 1;
            if pair.sides.iter().all(rests) {
                break;
            }
            pair.run(seconds(1));
        }
        pair.assert_same(1, 1);
    }
}

// The peer takes no second IKE SA beside the first (`unique = keep`): the old one is deleted at its end, and there is a new one
// then. In between it is asked less and less often.
#[test]
fn a_peer_that_takes_one_ike_sa_only_gets_another_one_at_the_end() {
    for (ike, child) in [(0, 1200), (1200, 0)] {
        let mut pair = pair(701, A, ike, child, |b| b.unique = Unique::Keep);
        let gap = gap(&mut pair, seconds(3000));
        assert_eq!(made(&pair), 2, "{gap:?}");
        assert!(gap <= seconds(1), "{gap:?}");
        let tries = pair.sides[A]
            .events
            .iter()
            .filter(|event| matches!(event, Event::Log { message, .. } if message.contains("trying again later")));
        assert!((5..=12).contains(&tries.count()));
        pair.assert_same(1, 1);
    }
}

// The peer is a client behind a NAT: the new one is for it to make. Ours ends with its life.
#[test]
fn who_cannot_ask_leaves_it_to_the_peer() {
    let mut b = connection(B);
    b.over_time = seconds(100);
    b.rekey_time = seconds(300);
    let mut pair = Pair::with(702, EngineConfig::default(), connection(A), b);
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 1000));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    pair.minimal[A] = true;
    pair.run(seconds(380));
    assert_eq!((pair.sides[B].up().len(), made(&pair)), (1, 1));
    pair.run(seconds(30));
    assert!(pair.sides[B].down(CloseReason::Expired));
    pair.assert_same(0, 0);
    pair.initiate(A, 2);
    pair.run(seconds(3));
    pair.assert_same(1, 1);
}

// Asked for by hand: it is done, as far as the peer allows.
#[test]
fn a_rekey_by_hand_makes_a_new_ike_sa() {
    for ike in [false, true] {
        let mut pair = up(703);
        pair.minimal[B] = true;
        let (old, now) = (pair.sides[A].only(), pair.now);
        let target = if ike { Target::Ike(old.id) } else { Target::Child(old.children[0].id) };
        pair.sides[A].engine.rekey(now, target, 2).unwrap();
        assert_eq!(gap(&mut pair, seconds(30)), Duration::ZERO);
        assert!(pair.sides[A].done(2) && pair.sides[A].logged("the peer does not rekey"));
        assert_ne!(pair.sides[A].only().initiator_spi, old.initiator_spi);
        pair.assert_same(1, 1);
    }
}

// A new Child SA beside others is another matter: the peer takes no more, and what there is stays.
#[test]
fn a_refused_new_child_sa_replaces_nothing() {
    let mut pair = up(704);
    pair.minimal[B] = true;
    pair.initiate(A, 2);
    pair.run(seconds(300));
    assert!(pair.sides[A].failed(2).unwrap().contains("NO_ADDITIONAL_SAS"));
    assert_eq!(made(&pair), 1);
    pair.assert_same(1, 1);
}

// As answerer: no more than so many Child SAs, but each of them can be rekeyed.
#[test]
fn a_full_ike_sa_still_rekeys_its_child_sas() {
    let mut pair = up(705);
    for token in 2..1026 {
        pair.initiate(A, token);
    }
    pair.run(seconds(200));
    assert_eq!(pair.sides[B].installed.len(), 1024);
    assert!((2..1026).any(|token| pair.sides[A].failed(token).is_some_and(|why| why.contains("NO_ADDITIONAL_SAS"))));
    pair.rekey_child(A, 0x80);
    pair.run(seconds(20));
    assert!(pair.sides[A].done(2));
    pair.assert_same(1, 1024);
}
