//! What strangers may cost: cookies, budgets, puzzles.

use super::*;
use crate::config::PuzzlePolicy;
use crate::sa::fault::notify;
use crate::wire::{Header, NotifyType, Payload};

/// A puzzle for everybody, soon solved.
fn puzzling() -> EngineConfig {
    let puzzles = PuzzlePolicy { threshold: 1, difficulty: 9, limit: 12 };
    EngineConfig { puzzles, cookie_threshold_ip: usize::MAX, block_threshold: 0, ..EngineConfig::default() }
}

fn payloads(bytes: &[u8]) -> Vec<Payload> {
    match crate::wire::parse(bytes) {
        Ok(crate::wire::Incoming::Plain(message)) => message.payloads,
        other => panic!("{other:?}"),
    }
}

fn from(request: &Transmit, remote: &str) -> Path {
    Path { local: request.path.remote, remote: remote.parse().unwrap(), transport: Transport::Udp }
}

/// The first IKE_SA_INIT request of A.
fn request(pair: &mut Pair) -> Transmit {
    pair.initiate(A, 1);
    for _ in 0..1000 {
        if let Some(request) = pair.sides[A].sent.first() {
            return request.clone();
        }
        pair.run(Duration::from_millis(1));
    }
    panic!("no request");
}

/// Gives B a message, and what it sends for it.
fn give(pair: &mut Pair, path: Path, bytes: &[u8]) -> Vec<Transmit> {
    let (now, before) = (pair.now, pair.sides[B].sent.len());
    pair.sides[B].engine.handle_message(now, path, bytes);
    pair.drain(B);
    pair.sides[B].sent[before..].to_vec()
}

/// Half-open IKE SAs of other addresses at B, so that load is what the test wants.
fn crowd(pair: &mut Pair, request: &Transmit, count: u32) {
    crowd_from(pair, request, 0, count);
}

/// The same, with addresses from that number on.
fn crowd_from(pair: &mut Pair, request: &Transmit, first: u32, count: u32) {
    let enough = pair.sides[B].engine.counts().1 + count as usize;
    let before = pair.sides[B].engine.ctx.config.puzzles.threshold;
    pair.sides[B].engine.ctx.config.puzzles.threshold = 0;
    for n in first..first + count {
        let remote = SocketAddr::new(Ipv4Addr::from_bits(0x0b00_0000 + n).into(), 500);
        let path = Path { local: request.path.remote, remote, transport: Transport::Udp };
        give(pair, path, &request.bytes);
    }
    pair.sides[B].engine.ctx.config.puzzles.threshold = before;
    assert_eq!(pair.sides[B].engine.counts().1, enough);
}

// RFC 8019 §7.1: cookie and puzzle go out without state, the solution comes back between cookie and SA, and it works.
#[test]
fn a_puzzle_is_set_and_solved() {
    let mut pair = Pair::with(400, puzzling(), connection(A), connection(B));
    let first = request(&mut pair);
    crowd(&mut pair, &first, 1);
    pair.run(seconds(20));
    assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
    assert!(pair.sides[A].logged("received a puzzle of 9 bits, solving it"));
    let answer = pair.sides[B].sent.iter().find(|sent| sent.path.remote.ip() == address(A)).unwrap();
    let answer = payloads(&answer.bytes);
    assert!(matches!(&answer[0], Payload::Notify(n) if n.kind == NotifyType::COOKIE && n.data.len() <= 64));
    assert!(matches!(&answer[1], Payload::Notify(n) if n.kind == NotifyType::PUZZLE && n.data == [0, 5, 9]));
    let second = payloads(&pair.sides[A].sent[1].bytes);
    assert!(matches!(&second[0], Payload::Notify(n) if n.kind == NotifyType::COOKIE));
    assert!(matches!(&second[1], Payload::PuzzleSolution(solution) if solution.len() == 16));
    assert_eq!(payloads(&first.bytes)[..], second[2..]);
}

// RFC 8019 §7.1.2: who solves no puzzles returns the cookie alone; §7.1: it has a chance, which depends on the load.
#[test]
fn an_initiator_that_solves_nothing_has_a_chance() {
    for limit in [0, 8] {
        let mut served = 0;
        for seed in 0..40 {
            let mut config = puzzling();
            config.puzzles.limit = limit;
            let mut pair = Pair::with(4100 + seed, config, connection(A), connection(B));
            let first = request(&mut pair);
            crowd(&mut pair, &first, 1);
            pair.run(seconds(3));
            assert!(pair.sides[A].logged("received a puzzle, ignored"));
            assert!(!pair.sides[A].sent.iter().any(|sent| sent.bytes.get(16) == Some(&54)));
            served += usize::from(pair.sides[A].done(1));
        }
        // Each has four restarts, and each of them a chance of nearly one half.
        assert!(served > 20, "{served} of 40");
    }
    // At half of the room the chance is gone; who solves still comes in.
    for (limit, comes_in) in [(0, false), (20, true)] {
        let mut config = puzzling();
        config.cookie_threshold = usize::MAX;
        config.puzzles = PuzzlePolicy { threshold: 2047, difficulty: 9, limit };
        let mut pair = Pair::with(402, config, connection(A), connection(B));
        let first = request(&mut pair);
        crowd(&mut pair, &first, 2048);
        pair.run(seconds(10));
        assert_eq!(pair.sides[A].done(1), comes_in, "{:#?}", pair.sides[A].events.last());
    }
}

// RFC 8019 §7.1.2: a PUZZLE without COOKIE is ignored, as are those that we do not understand.
#[test]
fn a_puzzle_that_is_none_is_ignored() {
    let mut pair = Pair::with(403, puzzling(), connection(A), connection(B));
    pair.cut = true;
    let first = request(&mut pair);
    let crate::wire::Incoming::Plain(message) = crate::wire::parse(&first.bytes).unwrap() else { panic!() };
    let header = Header { from_initiator: false, response: true, ..message.header };
    let back = Path { local: first.path.local, remote: first.path.remote, transport: Transport::Udp };
    let puzzle = |data: &[u8]| notify(NotifyType::PUZZLE, data.to_vec());
    let cookie = || notify(NotifyType::COOKIE, vec![7; 20]);
    let sent = pair.sides[A].sent.len();
    let now = pair.now;
    let bytes = wire::encode(&Message { header, payloads: vec![puzzle(&[0, 5, 9])] });
    pair.sides[A].engine.handle_message(now, back, &bytes);
    pair.drain(A);
    assert_eq!(pair.sides[A].sent.len(), sent, "there is nothing to solve");
    assert!(pair.sides[A].engine.ctx.jobs.is_empty());
    // A PRF that we did not offer, more than we do, another length: the cookie alone goes back.
    for (n, data) in [&[0, 7, 9][..], &[0, 5, 13], &[0, 5], &[0, 5, 9, 0]].into_iter().enumerate() {
        let bytes = wire::encode(&Message { header, payloads: vec![cookie(), puzzle(data)] });
        pair.sides[A].engine.handle_message(now, back, &bytes);
        pair.drain(A);
        assert_eq!(pair.sides[A].sent.len(), sent + n + 1);
        assert!(pair.sides[A].engine.ctx.jobs.is_empty());
    }
    // Then there have been enough restarts: a forger cannot keep us busy.
    let bytes = wire::encode(&Message { header, payloads: vec![cookie(), puzzle(&[0, 5, 9])] });
    pair.sides[A].engine.handle_message(now, back, &bytes);
    pair.drain(A);
    assert_eq!(pair.sides[A].sent.len(), sent + 4);
    assert!(pair.sides[A].engine.ctx.jobs.is_empty());
}

// RFC 8019 §10: a solution counts once; §7.1.4: it must be one, for the cookie that it comes with.
#[test]
fn a_solution_counts_once_and_for_its_cookie() {
    let mut config = puzzling();
    // No luck for those without a solution.
    config.puzzles.threshold = 2047;
    config.cookie_threshold = usize::MAX;
    let mut pair = Pair::with(404, config, connection(A), connection(B));
    pair.cut = true;
    let first = request(&mut pair);
    crowd(&mut pair, &first, 2048);
    let path = from(&first, "10.0.0.1:500");
    let answer = give(&mut pair, path, &first.bytes);
    let asked = payloads(&answer[0].bytes);
    let Payload::Notify(cookie) = &asked[0] else { panic!() };
    let crate::wire::Incoming::Plain(message) = crate::wire::parse(&first.bytes).unwrap() else { panic!() };
    let with = |cookie: &[u8], solution: &[u8]| {
        let mut payloads = vec![notify(NotifyType::COOKIE, cookie.to_vec())];
        payloads.push(Payload::PuzzleSolution(solution.to_vec()));
        payloads.extend(message.payloads.clone());
        wire::encode(&Message { header: message.header, payloads })
    };
    let prf = ipsec::transform::Prf::HMAC_SHA2_256;
    let puzzle = crate::crypto::puzzle::Puzzle { prf, difficulty: 9, input: cookie.data.clone() };
    let solution = puzzle.solve().unwrap();
    let half_open = pair.sides[B].engine.counts().1;
    let mut changed = solution.clone();
    changed[0] ^= 0x80;
    let mut twice = solution[..12].to_vec();
    twice.extend_from_slice(&solution[..4]);
    for wrong in [&changed, &twice, &solution[..15].to_vec()] {
        let again = give(&mut pair, path, &with(&cookie.data, wrong));
        assert_eq!(payloads(&again[0].bytes).len(), 2, "cookie and puzzle anew");
        assert_eq!(pair.sides[B].engine.counts().1, half_open);
    }
    // Another address cannot use it.
    give(&mut pair, from(&first, "10.0.0.7:500"), &with(&cookie.data, &solution));
    assert_eq!(pair.sides[B].engine.counts().1, half_open);
    give(&mut pair, path, &with(&cookie.data, &solution));
    assert_eq!(pair.sides[B].engine.counts().1, half_open + 1);
    // The same from another port, and after the half-open IKE SA is gone.
    give(&mut pair, from(&first, "10.0.0.1:501"), &with(&cookie.data, &solution));
    assert_eq!(pair.sides[B].engine.counts().1, half_open + 1);
}

/// Cookie and puzzle that B asks for.
fn asked(sent: &[Transmit]) -> (Vec<u8>, Option<u8>) {
    let payloads = payloads(&sent[0].bytes);
    let of = |kind| {
        payloads.iter().find_map(|payload| match payload {
            Payload::Notify(notify) if notify.kind == kind => Some(notify.data.clone()),
            _ => None,
        })
    };
    (of(NotifyType::COOKIE).unwrap(), of(NotifyType::PUZZLE).map(|puzzle| puzzle[2]))
}

/// A's request once more, with these payloads in front.
fn with(first: &Transmit, cookie: &[u8], solution: Option<&[u8]>) -> Vec<u8> {
    let crate::wire::Incoming::Plain(message) = crate::wire::parse(&first.bytes).unwrap() else { panic!() };
    let mut all = vec![notify(NotifyType::COOKIE, cookie.to_vec())];
    all.extend(solution.map(|solution| Payload::PuzzleSolution(solution.to_vec())));
    all.extend(message.payloads);
    wire::encode(&Message { header: message.header, payloads: all })
}

fn solve(cookie: &[u8], difficulty: u8) -> (Vec<u8>, u32) {
    let prf = ipsec::transform::Prf::HMAC_SHA2_256;
    let puzzle = crate::crypto::puzzle::Puzzle { prf, difficulty, input: cookie.to_vec() };
    let solution = puzzle.solve().unwrap();
    let bits = puzzle.verify(&solution).unwrap();
    (solution, bits)
}

// RFC 8019 §7.1.1.1: the difficulty follows the volume of the attack.
#[test]
fn the_difficulty_follows_the_load() {
    let mut config = puzzling();
    config.cookie_threshold = usize::MAX;
    config.puzzles.threshold = 4;
    let mut pair = Pair::with(411, config, connection(A), connection(B));
    pair.cut = true;
    let first = request(&mut pair);
    let path = from(&first, "10.0.0.1:500");
    for (half_open, difficulty) in [(4, 9), (7, 9), (8, 11), (15, 11), (16, 13), (64, 13)] {
        let there = u32::try_from(pair.sides[B].engine.counts().1).unwrap();
        crowd_from(&mut pair, &first, there, half_open - there);
        assert_eq!(asked(&give(&mut pair, path, &first.bytes)).1, Some(difficulty), "{half_open}");
    }
}

// RFC 8019 §7.1.1.2: "If … no PRF … in common", NO_PROPOSAL_CHOSEN; there would be no IKE SA anyway.
#[test]
fn without_a_common_prf_there_is_no_puzzle() {
    let mut pair = Pair::with(412, puzzling(), connection(A), connection(B));
    pair.cut = true;
    let first = request(&mut pair);
    crowd(&mut pair, &first, 1);
    let crate::wire::Incoming::Plain(mut message) = crate::wire::parse(&first.bytes).unwrap() else { panic!() };
    for payload in &mut message.payloads {
        if let Payload::Sa(proposals) = payload {
            let prfs = proposals.iter_mut().flat_map(|proposal| &mut proposal.transforms);
            prfs.filter(|transform| transform.kind == ipsec::transform::TransformType::PRF)
                .for_each(|transform| transform.id = 1);
        }
    }
    let sent = give(&mut pair, from(&first, "10.0.0.1:500"), &wire::encode(&message));
    let answer = payloads(&sent[0].bytes);
    assert!(matches!(&answer[..], [Payload::Notify(n)] if n.kind == NotifyType::NO_PROPOSAL_CHOSEN));
    assert_eq!(pair.sides[B].engine.counts().1, 1);
}

// RFC 8019 §7.1.4: a solution where no puzzle was set counts for nothing.
#[test]
fn a_solution_of_no_puzzle_counts_for_nothing() {
    let mut config = puzzling();
    // A cookie is demanded; when it comes back, puzzles are, and nobody is lucky.
    config.cookie_threshold = 0;
    config.puzzles.threshold = 2047;
    let mut pair = Pair::with(413, config, connection(A), connection(B));
    pair.cut = true;
    let first = request(&mut pair);
    let path = from(&first, "10.0.0.1:500");
    let (cookie, puzzle) = asked(&give(&mut pair, path, &first.bytes));
    assert_eq!(puzzle, None);
    // With the cookie alone in force it is no harm, and no help.
    let (solution, _) = solve(&cookie, 12);
    let elsewhere = from(&first, "10.0.0.2:500");
    assert_eq!(asked(&give(&mut pair, elsewhere, &with(&first, &cookie, Some(&solution)))).1, None);
    pair.sides[B].engine.ctx.config.cookie_threshold = usize::MAX;
    // Until cookies are out of force.
    pair.run(seconds(30));
    crowd(&mut pair, &first, 2048);
    let half_open = pair.sides[B].engine.counts().1;
    let sent = give(&mut pair, path, &with(&first, &cookie, Some(&solution)));
    assert_eq!(asked(&sent).1, Some(9));
    assert_eq!(pair.sides[B].engine.counts().1, half_open);
}

// RFC 8019 §7.1.5: solved, but too little by now: another puzzle; who has solved two is served.
#[test]
fn a_solution_that_is_too_little_gets_another_puzzle() {
    let mut config = puzzling();
    config.cookie_threshold = usize::MAX;
    config.puzzles.threshold = 2047;
    let mut pair = Pair::with(414, config, connection(A), connection(B));
    pair.cut = true;
    let first = request(&mut pair);
    crowd(&mut pair, &first, 2048);
    let path = from(&first, "10.0.0.1:500");
    let half_open = pair.sides[B].engine.counts().1;
    let (cookie, difficulty) = asked(&give(&mut pair, path, &first.bytes));
    assert_eq!(difficulty, Some(9));
    let (solution, bits) = solve(&cookie, 9);
    pair.sides[B].engine.ctx.config.puzzles.difficulty = u8::try_from(bits + 1).unwrap();
    let sent = give(&mut pair, path, &with(&first, &cookie, Some(&solution)));
    assert_eq!(pair.sides[B].engine.counts().1, half_open);
    let (cookie, difficulty) = asked(&sent);
    assert_eq!(difficulty, Some(u8::try_from(bits + 1).unwrap()));
    // Harder still meanwhile.
    let (solution, bits) = solve(&cookie, difficulty.unwrap());
    pair.sides[B].engine.ctx.config.puzzles.difficulty = u8::try_from(bits + 1).unwrap();
    give(&mut pair, path, &with(&first, &cookie, Some(&solution)));
    assert_eq!(pair.sides[B].engine.counts().1, half_open + 1);
}

// RFC 8019 §4.2, RFC 7296 §2.6: an attacker with a whole IPv6 network is one attacker.
#[test]
fn ipv6_addresses_of_one_network_are_one() {
    let config = EngineConfig { cookie_threshold_ip: usize::MAX, block_threshold: 5, ..EngineConfig::default() };
    let mut pair = Pair::with(405, config, connection(A), connection(B));
    let first = request(&mut pair);
    for n in 0..100 {
        give(&mut pair, from(&first, &format!("[2001:db8:0:7::{n:x}]:500")), &first.bytes);
    }
    assert_eq!(pair.sides[B].engine.counts().1, 5);
    assert!(pair.sides[B].logged("peer too aggressive"));
    give(&mut pair, from(&first, "[2001:db8:0:8::1]:500"), &first.bytes);
    assert_eq!(pair.sides[B].engine.counts().1, 6);
}

// RFC 8019 §6: IKE_SA_INITs that lead to nothing are counted; who authenticates pays nothing.
#[test]
fn work_for_nothing_has_a_budget_for_each_address() {
    let config = EngineConfig { address_budget: 8, ..EngineConfig::default() };
    let mut pair = Pair::with(406, config, connection(A), connection(B));
    // Sixteen times up and down again.
    for token in 0..16 {
        pair.initiate(A, 100 + token);
        pair.run(seconds(2));
        assert!(pair.sides[A].done(100 + token), "round {token}");
        let id = pair.sides[A].only().id;
        let now = pair.now;
        pair.sides[A].engine.terminate(now, Target::Ike(id), false, 200 + token).unwrap();
        pair.run(seconds(1));
    }
    // With a wrong key each attempt is refused at once, and leaves no half-open IKE SA behind to be counted.
    pair.sides[A].credentials = shared_key("wrong");
    for token in 0..30 {
        pair.initiate(A, 300 + token);
        pair.run(seconds(1));
    }
    let tried = pair.sides[B].events.iter().filter(
        |event| matches!(event, Event::Log { message, .. } if message.starts_with("authentication of the peer failed")),
    );
    let tried = tried.count();
    assert!((4..=13).contains(&tried), "{tried} attempts were served");
    assert!(pair.sides[B].logged("peer too aggressive"));
    // Another address is served.
    let first = pair.sides[A].sent[0].clone();
    give(&mut pair, from(&first, "10.0.0.9:500"), &first.bytes);
    assert_eq!(pair.sides[B].engine.counts().1, 1);
    // And so is this one, after a while.
    pair.sides[A].credentials = shared_key("correct horse");
    pair.cut = true;
    pair.run(seconds(300));
    pair.cut = false;
    pair.initiate(A, 400);
    pair.run(seconds(5));
    assert!(pair.sides[A].done(400));
}

#[test]
fn ike_sas_have_limits() {
    let config = EngineConfig { ikesa_limit: 1, ..EngineConfig::default() };
    let mut pair = established(Pair::with(407, config, connection(A), connection(B)));
    let first = pair.sides[A].sent[0].clone();
    let mut other = first.bytes.clone();
    other[0] ^= 1;
    assert!(give(&mut pair, from(&first, "10.0.0.9:500"), &other).is_empty());
    assert!(pair.sides[B].logged("hitting IKE_SA limit"));
    let config = EngineConfig { init_limit_half_open: 2, ..EngineConfig::default() };
    let mut pair = Pair::with(408, config, connection(A), connection(B));
    let first = request(&mut pair);
    for n in 10..20 {
        give(&mut pair, from(&first, &format!("10.0.0.{n}:500")), &first.bytes);
    }
    assert_eq!(pair.sides[B].engine.counts().1, 2);
}

// RFC 7296 §2.6: cookies do not go off and on from one repetition to the next.
#[test]
fn cookies_calm_down_slowly() {
    let config = EngineConfig { cookie_threshold: 2, half_open_timeout: seconds(5), ..EngineConfig::default() };
    let mut pair = Pair::with(409, config, connection(A), connection(B));
    let first = request(&mut pair);
    pair.cut = true;
    for n in 10..12 {
        give(&mut pair, from(&first, &format!("10.0.0.{n}:500")), &first.bytes);
    }
    let is_cookie =
        |sent: &[Transmit]| matches!(&payloads(&sent[0].bytes)[0], Payload::Notify(n) if n.kind == NotifyType::COOKIE);
    let sent = give(&mut pair, from(&first, "10.0.0.20:500"), &first.bytes);
    assert!(is_cookie(&sent));
    pair.run(seconds(8));
    assert_eq!(pair.sides[B].engine.counts().1, 0);
    let sent = give(&mut pair, from(&first, "10.0.0.20:500"), &first.bytes);
    assert!(is_cookie(&sent));
    pair.run(seconds(8));
    give(&mut pair, from(&first, "10.0.0.20:500"), &first.bytes);
    assert_eq!(pair.sides[B].engine.counts().1, 1);
}

// RFC 7296 §2.1, §2.5: what strangers get is not more often than it was asked for, and never without end.
#[test]
fn answers_to_strangers_have_a_rate() {
    let mut pair = Pair::with(410, EngineConfig::default(), connection(A), connection(B));
    let first = request(&mut pair);
    let path = from(&first, "10.0.0.1:500");
    let mut version = first.bytes.clone();
    version[17] = 0x30;
    let answered: usize = (0..500).map(|_| give(&mut pair, path, &version).len()).sum();
    assert!((1..=20).contains(&answered), "{answered} answers to a later version");
    let path = from(&first, "10.0.0.3:500");
    let mut answered = 0;
    for _ in 0..500 {
        answered += give(&mut pair, path, &first.bytes).len();
        pair.run(Duration::ZERO);
    }
    assert!(answered <= 21, "{answered} answers to one request");
}
