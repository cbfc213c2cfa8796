//! Whether an IKE_SA_INIT request deserves state and a key exchange: nothing, a cookie (RFC 7296 §2.6) or a puzzle
//! (RFC 8019 §7.1) is demanded first, by how many others ask.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Instant;

use ipsec::transform::{Prf, TransformType};

use super::context::UNMARKED;
use super::cookie::{Binding, Demanded};
use super::defence::{Budget, Limits, MAX_HALF_OPEN};
use super::responder::answer_header;
use super::{Engine, Path, Transport};
use crate::crypto::prf_len;
use crate::crypto::puzzle::{MAX_DIFFICULTY, Puzzle};
use crate::sa::fault::{Fault, notify};
use crate::sa::parts::Parts;
use crate::wire::{self, ExchangeType, Header, Message, NotifyType};

/// Jobs that are out beyond which no stranger gets another one.
const MAX_JOBS: usize = 1024;
/// Half of the free room is for those who solved a puzzle.
const LEGACY_ROOM: usize = MAX_HALF_OPEN / 2;
/// Solved puzzles that are remembered, so that each counts once (RFC 8019 §10).
const MAX_SPENT: usize = 4 * MAX_HALF_OPEN;

/// Cookies of solved puzzles that were accepted. Only those that made state come here, so what takes its place here
/// is as limited as that is; a cookie's life is over before its place is taken.
#[derive(Debug, Default)]
pub(super) struct Spent {
    order: VecDeque<[u8; 16]>,
    known: BTreeSet<[u8; 16]>,
}

impl Spent {
    /// False when it was there already.
    fn take(&mut self, cookie: &[u8]) -> bool {
        // The MAC's end; all of it was checked.
        let Some(mark) = cookie.last_chunk::<16>() else { return false };
        if !self.known.insert(*mark) {
            return false;
        }
        self.order.push_back(*mark);
        if self.order.len() > MAX_SPENT
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

/// What an initiator must do before it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Demand {
    Nothing,
    Cookie,
    Puzzle(u8),
}

impl Engine {
    /// Why nobody, or nobody from there, is served now.
    pub(super) fn refusal(&mut self, now: Instant, from: IpAddr) -> Option<&'static str> {
        let (limits, shared) = (self.limits(), &self.ctx.shared);
        shared.defence.lock().refusal(now, from, limits, shared.load())
    }

    /// The same where the request is served unless there is a reason; true then, and `end_serving` follows.
    pub(super) fn begin_serving(&mut self, now: Instant, from: IpAddr) -> bool {
        let (limits, shared) = (self.limits(), &self.ctx.shared);
        let begun = shared.defence.lock().begin_serving(now, from, limits, shared.load());
        let Err(reason) = begun else { return true };
        self.log_stranger(now, "NET", format!("ignoring IKE_SA setup from {from}, {reason}"));
        false
    }

    pub(super) fn end_serving(&self, from: IpAddr, served: bool) {
        self.ctx.shared.defence.lock().end_serving(from, served);
    }

    fn limits(&self) -> Limits {
        let config = &self.ctx.config;
        let or_most = |limit: usize, most: usize| if limit == 0 { most } else { limit.min(most) };
        Limits {
            half_open: or_most(config.init_limit_half_open, MAX_HALF_OPEN),
            block: config.block_threshold,
            ike_sas: config.ikesa_limit,
            jobs: or_most(config.init_limit_job_load, MAX_JOBS),
        }
    }

    /// True when the request may cost us state and a key exchange; otherwise its sender was told what is missing.
    pub(super) fn deserves_state(&mut self, now: Instant, path: Path, header: &Header, parts: &Parts) -> bool {
        let demand = match self.demand(now, path) {
            // RFC 8019 §4.5: who has a ticket has authenticated before, and makes us compute next to nothing.
            Demand::Puzzle(_) if header.exchange == ExchangeType::IKE_SESSION_RESUME => Demand::Cookie,
            demand => demand,
        };
        if demand == Demand::Nothing {
            return true;
        }
        let Some(ni) = &parts.nonce else { return false };
        let binding = Binding { ni, from: path.remote, spi_i: header.initiator_spi };
        let cookie = parts.notify(NotifyType::COOKIE);
        let given = cookie.and_then(|cookie| {
            let demanded = self.cookies.check(now, self.ctx.rng.as_mut(), &cookie.data, binding)?;
            Some((cookie.data.as_slice(), demanded))
        });
        let difficulty = match (demand, given) {
            (Demand::Nothing, _) | (Demand::Cookie, Some(_)) => return true,
            (Demand::Cookie, None) => return self.demand_cookie(now, path, header, binding, Demanded::COOKIE, None),
            (Demand::Puzzle(difficulty), _) => difficulty,
        };
        // §7.1.1.2: a PRF that both have. Without one there would be no IKE SA anyway.
        let Some(prf) = common_prf(parts) else {
            self.refuse_init(now, path, header, &Fault::NoProposalChosen);
            return false;
        };
        let mut solved = 0;
        if let Some((cookie, demanded)) = given {
            let puzzle = Puzzle { prf, difficulty: demanded.difficulty, input: cookie.to_vec() };
            // §7.1.4: where no puzzle was set, a solution counts for nothing.
            let solution = parts.puzzle_solution.as_ref().filter(|_| demanded.difficulty > 0);
            match solution.and_then(|solution| puzzle.verify(solution)) {
                // Enough, or not for the first time: §7.1.5. It counts once (§10).
                Some(bits) if bits >= u32::from(difficulty) || demanded.solved > 0 => {
                    let first = self.spent.take(cookie);
                    if first {
                        return true;
                    }
                }
                Some(_) => solved = demanded.solved.saturating_add(1),
                // Who knows no puzzles, or solves none, has a chance (§7.1); a cookie it did return.
                None if self.legacy_is_lucky() => return true,
                None => {}
            }
        }
        let demanded = Demanded { difficulty, solved };
        self.demand_cookie(now, path, header, binding, demanded, Some(prf))
    }

    /// What load and the sender's network call for (RFC 8019 §6).
    fn demand(&mut self, now: Instant, path: Path) -> Demand {
        let from = path.remote.ip();
        let config = &self.ctx.config;
        let mut defence = self.ctx.shared.defence.lock();
        let (total, here) = (defence.half_open.total(), defence.half_open.of(from));
        let crowded = total >= config.cookie_threshold;
        let puzzles = config.puzzles;
        if puzzles.threshold > 0 && total >= puzzles.threshold {
            // Two bits more, four times the work, for each doubling of what there is already.
            let doublings = (total / puzzles.threshold).checked_ilog2().unwrap_or(0).min(2);
            let more = u8::try_from(doublings * 2).unwrap_or(0);
            return Demand::Puzzle(puzzles.difficulty.saturating_add(more).min(MAX_DIFFICULTY));
        }
        // RFC 9329 §6.3: a stream has shown already that its originator is where it says.
        if matches!(path.transport, Transport::Stream(_)) {
            return Demand::Nothing;
        }
        let suspicious = here >= config.cookie_threshold_ip || defence.budget(now, from) != Budget::Enough;
        if defence.cookies_in_force(now, crowded) || suspicious { Demand::Cookie } else { Demand::Nothing }
    }

    /// Answers with a cookie, and with a puzzle over it; makes no state.
    fn demand_cookie(
        &mut self,
        now: Instant,
        path: Path,
        header: &Header,
        binding: Binding<'_>,
        demanded: Demanded,
        prf: Option<Prf>,
    ) -> bool {
        let cookie = self.cookies.make(now, self.ctx.rng.as_mut(), binding, demanded);
        let mut payloads = vec![notify(NotifyType::COOKIE, cookie)];
        if let Some(prf) = prf {
            // RFC 8019 §8.1: PRF and difficulty.
            let [high, low] = prf.0.to_be_bytes();
            payloads.push(notify(NotifyType::PUZZLE, vec![high, low, demanded.difficulty]));
        }
        let header = answer_header(header, 0);
        self.ctx.transmit(path, UNMARKED, [wire::encode(&Message { header, payloads })]);
        false
    }

    /// A lottery for requests with a cookie and no solution: from one in two, where puzzles begin, down to none at half
    /// of the room (RFC 8019 §7.1: the chance depends on the load).
    fn legacy_is_lucky(&mut self) -> bool {
        let threshold = self.ctx.config.puzzles.threshold.min(LEGACY_ROOM);
        let room = LEGACY_ROOM.saturating_sub(threshold);
        let free = LEGACY_ROOM.saturating_sub(self.ctx.shared.defence.lock().half_open.total()).min(room);
        let mut octets = [0; 4];
        self.ctx.rng.fill(&mut octets);
        let drawn = usize::try_from(u32::from_be_bytes(octets)).unwrap_or(usize::MAX);
        drawn.checked_rem(room.saturating_mul(2)).is_some_and(|drawn| drawn < free)
    }

    /// A line about somebody who is nobody yet: as many as the log can bear.
    pub(super) fn log_stranger(&mut self, now: Instant, group: &'static str, line: String) {
        let line = self.ctx.shared.defence.lock().line(now, line);
        if let Some(line) = line {
            self.ctx.log(group, 1, None, line);
        }
    }
}

/// The first PRF of an offer that we have.
fn common_prf(parts: &Parts) -> Option<Prf> {
    let transforms = parts.sa.iter().flatten().flat_map(|proposal| &proposal.transforms);
    let prfs = transforms.filter(|transform| transform.kind == TransformType::PRF).map(|transform| Prf(transform.id));
    prfs.into_iter().find(|prf| prf_len(*prf).is_some())
}
