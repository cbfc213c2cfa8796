//! Exchanges message by message: the test delivers, delays, repeats, loses and reorders single datagrams, and chooses
//! the first octet of each nonce, so it knows who wins a collision.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::*;

/// A datagram on its way.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) to: usize,
    pub(super) path: Path,
    pub(super) bytes: Vec<u8>,
}

/// First octet of the nonces that an engine makes from now on.
#[derive(Clone, Debug)]
pub(super) struct FirstOctet(Arc<AtomicU16>);

const ANY: u16 = 256;

impl Default for FirstOctet {
    fn default() -> Self {
        Self(Arc::new(AtomicU16::new(ANY)))
    }
}

impl FirstOctet {
    pub(super) fn set(&self, octet: u8) {
        self.0.store(octet.into(), Ordering::Relaxed);
    }
}

/// Sets the first octet of all that is as long as a nonce.
pub(super) struct NonceRng {
    inner: TestRng,
    first: FirstOctet,
}

impl NonceRng {
    pub(super) fn new(inner: TestRng, first: &FirstOctet) -> Self {
        Self { inner, first: first.clone() }
    }
}

impl Rng for NonceRng {
    fn fill(&mut self, buffer: &mut [u8]) {
        self.inner.fill(buffer);
        if buffer.len() == crate::sa::first_request::NONCE_LENGTH
            && let Ok(octet) = u8::try_from(self.first.0.load(Ordering::Relaxed))
        {
            buffer[0] = octet;
        }
    }
}

/// Who has the lowest of the four nonces of two exchanges, ours and the peer's in both roles.
pub(super) const NONCES: [[u8; 4]; 4] =
    [[0x00, 0xff, 0xff, 0xff], [0xff, 0x00, 0xff, 0xff], [0xff, 0xff, 0x00, 0xff], [0xff, 0xff, 0xff, 0x00]];

/// Of the nonces of A's request, B's request, B's answer and A's answer: which side's SA is redundant.
pub(super) fn loser(nonces: &[u8; 4]) -> usize {
    let [a_request, b_request, b_answer, a_answer] = *nonces;
    if a_request.min(b_answer) < b_request.min(a_answer) { A } else { B }
}

impl Pair {
    /// An established pair whose messages go by hand, and whose Child SAs are installed at once.
    pub(super) fn by_hand(seed: u64) -> Self {
        up(seed).taken_by_hand()
    }

    pub(super) fn taken_by_hand(mut self) -> Self {
        self.run(seconds(1));
        self.job_delay = Duration::ZERO;
        self.held = Some(Vec::new());
        self
    }

    /// The network works by itself again; what waits is lost unless it is delivered later.
    pub(super) fn let_go(&mut self) {
        self.held = None;
    }

    /// From now on no packet may be lost.
    pub(super) fn with_traffic(mut self) -> Self {
        self.traffic = true;
        self.assert_traffic_flows();
        self
    }

    pub(super) fn without_traffic(&mut self) {
        self.traffic = false;
    }

    pub(super) fn rekey_child(&mut self, side: usize, nonce: u8) {
        self.sides[side].nonce.set(nonce);
        let (child, now) = (self.live(side).id, self.now);
        self.sides[side].engine.rekey(now, Target::Child(child), 2).unwrap();
        self.drain(side);
    }

    /// Deletes the Child SA that was up last.
    pub(super) fn delete_child(&mut self, side: usize) {
        let (child, now) = (self.live(side).id, self.now);
        self.sides[side].engine.terminate(now, Target::Child(child), false, 3).unwrap();
        self.drain(side);
    }

    pub(super) fn delete_ike(&mut self, side: usize) {
        let (ike, now) = (self.oldest(side).id, self.now);
        self.sides[side].engine.terminate(now, Target::Ike(ike), false, 3).unwrap();
        self.drain(side);
    }

    pub(super) fn live(&self, side: usize) -> ChildSaStatus {
        let children = self.sides[side].engine.ike_sas(self.now).into_iter().flat_map(|sa| sa.children);
        children.filter(|child| child.state == ChildState::Installed).max_by_key(|child| child.id).unwrap()
    }

    /// States of a side's Child SAs, from the oldest.
    pub(super) fn children(&self, side: usize) -> Vec<ChildState> {
        let sas = self.sides[side].engine.ike_sas(self.now);
        let mut children: Vec<ChildSaStatus> = sas.into_iter().flat_map(|sa| sa.children).collect();
        children.sort_by_key(|child| child.id);
        children.into_iter().map(|child| child.state).collect()
    }

    pub(super) fn rekey_ike(&mut self, side: usize, nonce: u8) {
        self.sides[side].nonce.set(nonce);
        let (ike, now) = (self.oldest(side).id, self.now);
        self.sides[side].engine.rekey(now, Target::Ike(ike), 2).unwrap();
        self.drain(side);
    }

    fn oldest(&self, side: usize) -> IkeSaStatus {
        self.sides[side].engine.ike_sas(self.now).remove(0)
    }

    /// Takes the oldest datagram from `from` off the network.
    pub(super) fn take(&mut self, from: usize) -> Held {
        let held = self.held.as_mut().expect("messages go by hand");
        let at = held.iter().position(|datagram| datagram.to != from);
        held.remove(at.unwrap_or_else(|| panic!("nothing is on its way from side {from}")))
    }

    /// True when something of `from` is on its way.
    pub(super) fn has_sent(&self, from: usize) -> bool {
        self.held.as_ref().is_some_and(|held| held.iter().any(|datagram| datagram.to != from))
    }

    /// Delivers a datagram; `nonce` is the first octet of the nonce that its receiver may answer with.
    pub(super) fn give(&mut self, datagram: &Held, nonce: u8) {
        self.sides[datagram.to].nonce.set(nonce);
        let now = self.now;
        self.sides[datagram.to].engine.handle_message(now, datagram.path, &datagram.bytes);
        self.drain(datagram.to);
        self.run(Duration::ZERO);
        if self.traffic {
            self.assert_traffic_flows();
        }
    }

    /// Delivers the oldest datagram from `from`; it is no request that needs a nonce.
    pub(super) fn pass(&mut self, from: usize) {
        self.pass_with(from, 0x80);
    }

    pub(super) fn pass_with(&mut self, from: usize, nonce: u8) {
        let datagram = self.take(from);
        self.give(&datagram, nonce);
    }

    /// A initiates, and gets B's answer to IKE_SA_INIT without this notify, as somebody on the path can make it; then
    /// the genuine one.
    pub(super) fn give_stripped_answer(&mut self, kind: crate::wire::NotifyType) {
        self.job_delay = Duration::ZERO;
        self.held = Some(Vec::new());
        self.initiate(A, 1);
        self.run(Duration::ZERO);
        self.pass(A);
        let genuine = self.take(B);
        let Ok(Incoming::Plain(mut message)) = wire::parse(&genuine.bytes) else { panic!("a plain message") };
        let payloads = message.payloads.len();
        message.payloads.retain(|payload| !matches!(payload, crate::wire::Payload::Notify(n) if n.kind == kind));
        assert_eq!(message.payloads.len(), payloads - 1);
        self.give(&Held { bytes: wire::encode(&message), ..genuine.clone() }, 0x80);
        self.give(&genuine, 0x80);
        self.pass_all();
    }

    /// Delivers whatever is on its way, in order, until nothing is.
    pub(super) fn pass_all(&mut self) {
        for _ in 0..100 {
            let Some(from) = [A, B].into_iter().find(|side| self.has_sent(*side)) else { return };
            self.pass(from);
        }
        panic!("messages without end");
    }

    /// IKE SAs of a side by state.
    pub(super) fn states(&self, side: usize) -> Vec<IkeState> {
        self.sides[side].engine.ike_sas(self.now).into_iter().map(|sa| sa.state).collect()
    }

    /// The one IKE SA that has the Child SAs, and its SPIs.
    pub(super) fn holder(&self, side: usize) -> IkeSaStatus {
        let all = self.sides[side].engine.ike_sas(self.now);
        let mut with: Vec<IkeSaStatus> = all.into_iter().filter(|sa| !sa.children.is_empty()).collect();
        assert_eq!(with.len(), 1, "Child SAs belong to one IKE SA");
        with.remove(0)
    }

    /// Lets the network work, waits until all timers of an old exchange are over, and compares.
    pub(super) fn assert_comes_to_rest(&mut self, ikes: usize, children: usize) {
        self.pass_all();
        self.let_go();
        self.run(seconds(400));
        self.assert_same(ikes, children);
    }

    /// No rekey looked like a delete to those who watch.
    pub(super) fn assert_no_loss(&self) {
        for (number, side) in self.sides.iter().enumerate() {
            let lost = |event: &Event| match event {
                Event::ChildDown { reason, .. } => *reason != CloseReason::Rekeyed,
                Event::IkeDown(_, reason) => *reason != CloseReason::Rekeyed,
                _ => false,
            };
            let lost: Vec<&Event> = side.events.iter().filter(|event| lost(event)).collect();
            if !lost.is_empty() {
                for event in &side.events {
                    if let Event::Log { message, ike_sa, .. } = event {
                        eprintln!("{:?} {message}", ike_sa.as_ref().map(|(id, _)| id.0));
                    }
                }
                panic!("side {number} lost {}", lost.len());
            }
        }
    }
}

/// What befalls one datagram.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    Lost,
    /// Delivered, and again after everything else.
    Repeated,
    /// Delivered after so many others.
    Late(usize),
}

pub(super) const FATES: [Fate; 6] =
    [Fate::Lost, Fate::Repeated, Fate::Late(1), Fate::Late(2), Fate::Late(3), Fate::Late(100)];

impl Pair {
    /// Delivers everything in turn, answers with these nonces, except that one datagram meets this fate. Gives how
    /// many there were.
    fn pass_all_but(&mut self, unlucky: usize, fate: Fate, nonces: &[u8; 4]) -> usize {
        let mut late: Vec<(usize, Held)> = Vec::new();
        let mut count = 0;
        loop {
            let due = late.iter().position(|(at, _)| *at <= count);
            let datagram = match due {
                Some(due) => late.remove(due).1,
                None => match self.held.as_mut().filter(|held| !held.is_empty()) {
                    Some(held) => {
                        let datagram = held.remove(0);
                        count += 1;
                        assert!(count < 200, "messages without end");
                        match fate {
                            _ if count - 1 != unlucky => datagram,
                            Fate::Lost => continue,
                            Fate::Repeated => {
                                late.push((100, datagram.clone()));
                                datagram
                            }
                            Fate::Late(by) => {
                                late.push((count + by, datagram));
                                continue;
                            }
                        }
                    }
                    None if late.is_empty() => return count,
                    None => late.remove(0).1,
                },
            };
            let nonce = if datagram.to == A { nonces[3] } else { nonces[2] };
            self.give(&datagram, nonce);
        }
    }
}

/// Runs a scenario once for each of its datagrams, fate and order of nonces, and checks the end.
pub(super) fn with_every_fault(start: impl Fn(u64, &[u8; 4]) -> Pair, check: impl Fn(Pair, &[u8; 4])) {
    for nonces in &NONCES {
        let mut unlucky = 0;
        loop {
            let mut count = 0;
            for (seed, fate) in FATES.into_iter().enumerate() {
                let mut pair = start(seed as u64, nonces);
                count = pair.pass_all_but(unlucky, fate, nonces);
                pair.let_go();
                pair.run(seconds(400));
                let context = Context { nonces, unlucky, fate };
                check(pair, nonces);
                context.passed();
            }
            unlucky += 1;
            if unlucky >= count {
                break;
            }
        }
    }
}

/// Says on a panic which case it was.
struct Context<'a> {
    nonces: &'a [u8; 4],
    unlucky: usize,
    fate: Fate,
}

impl Context<'_> {
    fn passed(self) {
        std::mem::forget(self);
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        eprintln!("nonces {:02x?}, datagram {} {:?}", self.nonces, self.unlucky, self.fate);
    }
}
