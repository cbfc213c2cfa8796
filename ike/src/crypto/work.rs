//! The steps of a key exchange that take long, as values: they leave the engine as a job and are done on
//! another thread.

use ipsec::secret::Secret;
use ipsec::transform::Ke;

use super::{KeyError, KeyExchange, Pending, kex};
use crate::Rng;

/// One step of a key exchange. Deriving keys from its secret is a handful of hashes and no work of this kind.
#[derive(Debug)]
pub enum KeyWork {
    /// Initiator: make a key pair.
    Generate(Ke),
    /// Initiator: the secret of our key pair and the peer's answer.
    Agree {
        /// Our key pair.
        ours: KeyExchange,
        /// The peer's answer, from its KE payload.
        peer: Vec<u8>,
    },
    /// Responder: the answer to an initiator that may be anyone; the secret waits.
    Answer {
        /// Method.
        method: Ke,
        /// The initiator's public value.
        peer: Vec<u8>,
    },
    /// Responder: the secret of an answer that was given.
    Finish(Pending),
    /// Responder: answer and secret at once.
    Respond {
        /// Method.
        method: Ke,
        /// The initiator's public value.
        peer: Vec<u8>,
    },
}

/// What became of [`KeyWork`].
#[derive(Debug)]
pub enum KeyDone {
    /// Of `Generate`.
    Generated(KeyExchange),
    /// Of `Agree` and `Finish`.
    Agreed(Secret),
    /// Of `Answer`: what goes into our KE payload, and what is left to do.
    Answered(Vec<u8>, Pending),
    /// Of `Respond`: what goes into our KE payload, and the secret.
    Responded(Vec<u8>, Secret),
}

impl KeyWork {
    /// Does it; up to some milliseconds. `rng` is the source of private values, except for ML-KEM's.
    pub fn run(self, rng: &mut dyn Rng) -> Result<KeyDone, KeyError> {
        Ok(match self {
            Self::Generate(method) => KeyDone::Generated(KeyExchange::generate(method, rng)?),
            Self::Agree { ours, peer } => KeyDone::Agreed(ours.agree(&peer)?),
            Self::Answer { method, peer } => {
                let (public, pending) = kex::answer(method, &peer, rng)?;
                KeyDone::Answered(public, pending)
            }
            Self::Finish(pending) => KeyDone::Agreed(pending.finish()?),
            Self::Respond { method, peer } => {
                let (public, secret) = kex::respond(method, &peer, rng)?;
                KeyDone::Responded(public, secret)
            }
        })
    }
}
