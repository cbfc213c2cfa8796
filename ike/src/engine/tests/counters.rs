//! What `swanctl --counters` shows.

use super::*;
use crate::counters::Counter;

fn count(pair: &Pair, side: usize, connection: Option<&str>, counter: Counter) -> u64 {
    let counts = pair.sides[side].engine.counters().read(connection);
    counts.into_iter().flatten().find(|(known, _)| *known == counter).map_or(0, |(_, count)| count)
}

// Whatever the network loses and repeats: each message once, on the side that made it and on that which took it.
#[test]
fn messages_and_rekeys_are_counted_once() {
    let mut pair = Pair::new(690);
    (pair.loss, pair.duplication) = (20, 30);
    pair.initiate(A, 1);
    pair.run(seconds(60));
    let child = pair.sides[A].only().children[0].id;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.run(seconds(100));
    let (now, ike) = (pair.now, pair.sides[B].only().id);
    pair.sides[B].engine.rekey(now, Target::Ike(ike), 3).unwrap();
    pair.run(seconds(100));
    let (now, ike) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.terminate(now, Target::Ike(ike), false, 4).unwrap();
    pair.run(seconds(100));
    assert!((1..=4).all(|token| pair.sides[A].done(token) || pair.sides[B].done(token)));
    use Counter::{
        ChildRekey, CreateChildInReq, CreateChildInResp, CreateChildOutReq, CreateChildOutResp, IkeAuthInReq,
        IkeAuthInResp, IkeAuthOutReq, IkeAuthOutResp, IkeInitInReq, IkeInitInResp, IkeInitOutReq, IkeInitOutResp,
        IkeRekeyInit, IkeRekeyResp, InfoInReq, InfoInResp, InfoOutReq, InfoOutResp, Invalid, InvalidSpi,
    };
    // INFORMATIONAL: the old Child SA, the old IKE SA (by B), the IKE SA.
    for (side, counter, expected) in [
        (A, IkeInitOutReq, 1),
        (A, IkeInitInResp, 1),
        (A, IkeAuthOutReq, 1),
        (A, IkeAuthInResp, 1),
        (A, CreateChildOutReq, 1),
        (A, CreateChildInResp, 1),
        (A, CreateChildInReq, 1),
        (A, CreateChildOutResp, 1),
        (A, InfoOutReq, 2),
        (A, InfoInResp, 2),
        (A, InfoInReq, 1),
        (A, InfoOutResp, 1),
        (A, ChildRekey, 1),
        (A, IkeRekeyInit, 0),
        (A, IkeRekeyResp, 1),
        (B, IkeInitInReq, 1),
        (B, IkeInitOutResp, 1),
        (B, IkeAuthInReq, 1),
        (B, IkeAuthOutResp, 1),
        (B, CreateChildInReq, 1),
        (B, CreateChildOutReq, 1),
        (B, InfoInReq, 2),
        (B, InfoOutResp, 2),
        (B, InfoOutReq, 1),
        (B, ChildRekey, 1),
        (B, IkeRekeyInit, 1),
        (B, Invalid, 0),
    ] {
        assert_eq!(count(&pair, side, None, counter), expected, "{side} {counter:?}");
    }
    // As in charon, who is not known yet has no name.
    assert_eq!(count(&pair, A, Some("site"), IkeInitOutReq), 1);
    assert_eq!(count(&pair, B, Some("(unnamed)"), IkeInitInReq), 1);
    assert_eq!(count(&pair, B, Some("(unnamed)"), IkeAuthInReq), 1);
    assert_eq!(count(&pair, B, Some("site"), IkeAuthOutResp), 1);
    // Nonsense, and a message to nobody.
    let path = Path {
        local: "10.0.0.2:500".parse().unwrap(),
        remote: "10.0.0.1:500".parse().unwrap(),
        transport: Transport::Udp,
    };
    let mut stray = pair.sides[A].sent.last().unwrap().bytes.clone();
    stray[..16].fill(9);
    let now = pair.now;
    let before = count(&pair, B, None, InvalidSpi);
    pair.sides[B].engine.handle_message(now, path, &stray);
    pair.sides[B].engine.handle_message(now, path, b"nonsense");
    pair.drain(B);
    assert_eq!((count(&pair, B, None, Invalid), count(&pair, B, None, InvalidSpi)), (1, before + 1));
    pair.sides[B].engine.counters().reset(Some("site"));
    assert_eq!(count(&pair, B, Some("site"), IkeAuthOutResp), 0);
    assert_eq!(count(&pair, B, None, IkeAuthOutResp), 1);
}
