//! A responder's demands in IKE_SA_INIT as initiator: a cookie (RFC 7296 §2.6), with or without a puzzle over it (RFC
//! 8019 §7.1.2).

use std::time::Instant;

use ipsec::transform::{Prf, TransformType};

use super::init::{Attempt, proposals};
use super::parts::Parts;
use crate::config::Connection;
use crate::crypto::prf_len;
use crate::crypto::puzzle::Puzzle;
use crate::engine::context::Context;
use crate::engine::{IkeSaId, Job};
use crate::wire::NotifyType;

impl Attempt {
    /// Sends the request again with the cookie that it has taken, now or when the puzzle is solved. A puzzle that we do not solve is
    /// ignored: the cookie alone may be enough.
    pub(super) fn demanded(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        id: IkeSaId,
        connection: &Connection,
        parts: &Parts,
    ) {
        self.solution = None;
        let Some(notify) = parts.notify(NotifyType::PUZZLE) else { return self.send(ctx, now, connection) };
        let tag = Some((id, connection.name.as_str()));
        let cookie = self.first.cookie.clone().unwrap_or_default();
        match puzzle(&notify.data, &cookie, connection, ctx.config.puzzles.limit) {
            Ok(puzzle) => {
                let line = format!("received a puzzle of {} bits, solving it", puzzle.difficulty);
                ctx.log("IKE", 1, tag, line);
                // The peer is there; only the work takes time.
                self.first.stay_on_udp();
                self.solving = Some(ctx.job(id, Job::SolvePuzzle(puzzle)));
            }
            Err(reason) => {
                ctx.log("IKE", 1, tag, format!("received a puzzle, ignored: {reason}"));
                self.send(ctx, now, connection);
            }
        }
    }

    /// Goes on with or without the solution.
    pub(super) fn solved(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        id: IkeSaId,
        connection: &Connection,
        solution: Option<Vec<u8>>,
    ) {
        self.solving = None;
        let line = if solution.is_some() { "the puzzle is solved" } else { "no solution of the puzzle was found" };
        ctx.log("IKE", 1, Some((id, connection.name.as_str())), line.to_owned());
        self.solution = solution;
        // Otherwise it goes with the stream.
        if !self.first.is_opening() {
            self.send(ctx, now, connection);
        }
    }
}

/// What a PUZZLE notification asks of us (RFC 8019 §8.1), or why we do not do it.
fn puzzle(data: &[u8], input: &[u8], connection: &Connection, limit: u8) -> Result<Puzzle, String> {
    let Ok([high, low, difficulty]) = <[u8; 3]>::try_from(data) else {
        return Err(format!("{} octets where 3 belong", data.len()));
    };
    let prf = Prf(u16::from_be_bytes([high, low]));
    // §7.1.1.2: one of those that we offered.
    let offered = proposals(connection)
        .into_iter()
        .flat_map(|proposal| proposal.transforms)
        .any(|transform| transform.kind == TransformType::PRF && transform.id == prf.0 && prf_len(prf).is_some());
    if !offered {
        return Err(format!("PRF {} was not offered", prf.0));
    }
    if limit == 0 || difficulty > limit {
        return Err(format!("{difficulty} bits are more than puzzle_limit"));
    }
    Ok(Puzzle { prf, difficulty, input: input.to_vec() })
}
