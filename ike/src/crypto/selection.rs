//! Choosing among offered proposals, and checking what a responder chose (RFC 7296 §2.7, §3.3.6).
//!
//! Additional key exchanges (RFC 9370 §2.2.1) are transform types of their own. A proposal that lacks one of
//! these types means `NONE` for it, on either side: what requires an additional key exchange never agrees
//! with what does not know them. One proposal never has the same method twice, `NONE` apart, over the first
//! key exchange and the seven additional ones; among the possible combinations the first key exchange has
//! the first say, then ADDKE1, and so on. Without a first key exchange (a Child SA without PFS) there is no
//! additional one.

use ipsec::crypto::Protection;
use ipsec::plane::EspSuite;
use ipsec::transform::{Encr, Integ, Ke, Prf, Proposal, Protocol, SequenceNumbers, Transform, TransformType};

use super::{AdditionalKe, IkeSuite, kex, prf_len};

/// A selection among a peer's IKE proposals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IkeChoice {
    /// The suite.
    pub suite: IkeSuite,
    /// The answer for the SA payload: the peer's proposal number, one transform of each kind, no SPI yet.
    pub proposal: Proposal,
}

/// A selection among a peer's ESP proposals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EspChoice {
    /// The suite.
    pub suite: EspSuite,
    /// Key exchange, `NONE` without PFS.
    pub ke: Ke,
    /// Additional key exchanges.
    pub additional: AdditionalKe,
    /// The answer for the SA payload, with our SPI still to be filled in; the peer's SPI is in the offer
    /// that has the same number.
    pub proposal: Proposal,
}

/// Chooses from `offered` what `configured` allows; the configured order wins if `ours_first`. When the
/// peer's KE payload is of `preferred_ke` and that method is possible in the first proposal that fits, it
/// is chosen (no extra round trip). Proposals with an unacceptable SPI size are skipped.
pub fn select_ike(
    offered: &[Proposal],
    configured: &[Proposal],
    ours_first: bool,
    preferred_ke: Option<Ke>,
) -> Option<IkeChoice> {
    let rules = Rules { protocol: Protocol::IKE, with_ke: true, ours_first, preferred_ke };
    let (picked, proposal) = select(offered, configured, rules)?;
    Some(IkeChoice { suite: picked.ike_suite()?, proposal })
}

/// The same for ESP. `with_ke` is false in IKE_AUTH, where key exchange transforms are left out (§1.2).
pub fn select_esp(
    offered: &[Proposal],
    configured: &[Proposal],
    ours_first: bool,
    with_ke: bool,
    preferred_ke: Option<Ke>,
) -> Option<EspChoice> {
    let rules = Rules { protocol: Protocol::ESP, with_ke, ours_first, preferred_ke };
    let (picked, proposal) = select(offered, configured, rules)?;
    Some(EspChoice { suite: picked.esp_suite(), ke: picked.ke, additional: picked.additional, proposal })
}

/// Checks that a responder's answer is one of what we offered, and gives the suite (§2.7).
pub fn accept_ike(answer: &[Proposal], offered: &[Proposal]) -> Option<IkeSuite> {
    accept(answer, offered, Protocol::IKE, true)?.ike_suite()
}

/// The same for ESP, with the key exchange (`NONE` without PFS) and the additional ones.
pub fn accept_esp(answer: &[Proposal], offered: &[Proposal], with_ke: bool) -> Option<(EspSuite, Ke, AdditionalKe)> {
    let picked = accept(answer, offered, Protocol::ESP, with_ke)?;
    Some((picked.esp_suite(), picked.ke, picked.additional))
}

#[derive(Clone, Copy)]
struct Rules {
    protocol: Protocol,
    with_ke: bool,
    ours_first: bool,
    preferred_ke: Option<Ke>,
}

/// One algorithm of each kind.
struct Picked {
    encr: Encr,
    key_bits: u16,
    /// `None` for ESP.
    prf: Option<Prf>,
    integ: Integ,
    ke: Ke,
    additional: AdditionalKe,
    sequence_numbers: SequenceNumbers,
}

impl Picked {
    fn ike_suite(&self) -> Option<IkeSuite> {
        let Self { encr, key_bits, prf, integ, ke, additional, .. } = *self;
        Some(IkeSuite { encr, key_bits, integ, prf: prf?, ke, additional })
    }

    fn esp_suite(&self) -> EspSuite {
        EspSuite {
            encr: self.encr,
            key_bits: self.key_bits,
            integ: self.integ,
            esn: self.sequence_numbers == SequenceNumbers::PARTIAL_64,
        }
    }

    /// What was picked, written with the transforms of `offered`: one of each kind that it has (§3.3.6).
    fn answer(&self, offered: &Proposal, with_ke: bool) -> Proposal {
        let chosen = |transform: &&Transform| match transform.kind {
            TransformType::ENCR => transform.id == self.encr.0 && key_bits(transform) == Some(self.key_bits),
            TransformType::PRF => self.prf == Some(Prf(transform.id)),
            TransformType::INTEG => transform.id == self.integ.0,
            TransformType::KE => with_ke && transform.id == self.ke.0,
            TransformType::SN => transform.id == self.sequence_numbers.0,
            kind => with_ke && self.additional.of(kind) == Some(Ke(transform.id)),
        };
        let mut transforms: Vec<Transform> = Vec::new();
        for transform in offered.transforms.iter().filter(usable).filter(chosen) {
            if transforms.iter().all(|other| other.kind != transform.kind) {
                transforms.push(*transform);
            }
        }
        Proposal { number: offered.number, protocol: offered.protocol, spi: Vec::new(), transforms }
    }
}

fn select(offered: &[Proposal], configured: &[Proposal], rules: Rules) -> Option<(Picked, Proposal)> {
    let pick = |theirs: &Proposal, ours: &Proposal| {
        let picked = pick(theirs, ours, rules)?;
        let answer = picked.answer(theirs, rules.with_ke);
        Some((picked, answer))
    };
    if rules.ours_first {
        configured.iter().find_map(|ours| offered.iter().find_map(|theirs| pick(theirs, ours)))
    } else {
        offered.iter().find_map(|theirs| configured.iter().find_map(|ours| pick(theirs, ours)))
    }
}

fn accept(answer: &[Proposal], offered: &[Proposal], protocol: Protocol, with_ke: bool) -> Option<Picked> {
    let [answer] = answer else { return None };
    let offer = offered.iter().find(|offer| offer.number == answer.number)?;
    // Exactly one of each kind (§3.3.6); `pick` then finds each among ours or nothing.
    let repeated = answer.transforms.iter().enumerate().any(|(index, transform)| {
        answer.transforms.iter().skip(index.saturating_add(1)).any(|other| other.kind == transform.kind)
    });
    if repeated {
        return None;
    }
    pick(answer, offer, Rules { protocol, with_ke, ours_first: false, preferred_ke: None })
}

/// Finds one algorithm of each kind that both proposals have.
fn pick(theirs: &Proposal, ours: &Proposal, rules: Rules) -> Option<Picked> {
    if theirs.protocol != rules.protocol || ours.protocol != rules.protocol || !spi_is_possible(theirs) {
        return None;
    }
    let ike = rules.protocol == Protocol::IKE;
    let kinds: &[TransformType] = if ike {
        &[TransformType::ENCR, TransformType::PRF, TransformType::INTEG, TransformType::KE]
    } else {
        &[TransformType::ENCR, TransformType::INTEG, TransformType::KE, TransformType::SN]
    };
    // A kind that we do not know would remain unanswered: the whole proposal is refused (§3.3.6).
    if theirs.transforms.iter().any(|t| !kinds.contains(&t.kind) && !t.kind.is_additional_ke()) {
        return None;
    }
    let (first, second) = if rules.ours_first { (ours, theirs) } else { (theirs, ours) };
    let common = |kind| {
        first
            .transforms
            .iter()
            .filter(move |transform| transform.kind == kind)
            .filter(usable)
            .filter(|transform| second.transforms.contains(transform))
    };
    // Kinds that may be left out, which means their number 0: no key exchange, 32-bit sequence numbers.
    let optional = |kind| {
        let ids = |proposal: &Proposal| {
            let ids: Vec<u16> =
                proposal.transforms.iter().filter(|t| t.kind == kind).filter(usable).map(|t| t.id).collect();
            if proposal.transforms.iter().any(|t| t.kind == kind) { ids } else { vec![0] }
        };
        let second = ids(second);
        ids(first).into_iter().filter(move |id| second.contains(id)).collect::<Vec<u16>>()
    };

    let (encr, key_bits, integ) = common(TransformType::ENCR).find_map(|transform| {
        let (encr, bits) = (Encr(transform.id), key_bits(transform)?);
        if ike && !encrypts(encr) {
            return None;
        }
        if Protection::key_lengths(encr, bits, Integ::NONE).is_some() {
            // Combined mode: no integrity algorithm, or NONE if they list any (§3.3.3, RFC 5282 §8).
            let mut theirs = theirs.transforms.iter().filter(|t| t.kind == TransformType::INTEG).peekable();
            let possible = theirs.peek().is_none() || theirs.filter(usable).any(|t| t.id == Integ::NONE.0);
            return possible.then_some((encr, bits, Integ::NONE));
        }
        common(TransformType::INTEG)
            .map(|transform| Integ(transform.id))
            .find(|integ| Protection::key_lengths(encr, bits, *integ).is_some())
            .map(|integ| (encr, bits, integ))
    })?;
    let prf = if ike {
        Some(common(TransformType::PRF).map(|t| Prf(t.id)).find(|prf| prf_len(*prf).is_some())?)
    } else {
        None
    };
    let (ke, additional) = if rules.with_ke {
        let possible = |kind| -> Vec<Ke> {
            let ids = optional(kind).into_iter().map(Ke);
            ids.filter(|ke| *ke == Ke::NONE || kex::supported(*ke)).collect()
        };
        let mut first = possible(TransformType::KE);
        first.retain(|ke| !ike || *ke != Ke::NONE);
        // The method at hand to the front, the others in order.
        first.sort_by_key(|ke| rules.preferred_ke != Some(*ke));
        distinct_methods(&first, &TransformType::ADDITIONAL_KE.map(possible))?
    } else {
        (Ke::NONE, AdditionalKe::NONE)
    };
    let sequence_numbers = if ike {
        SequenceNumbers::SEQUENTIAL_32
    } else {
        optional(TransformType::SN)
            .into_iter()
            .map(SequenceNumbers)
            .find(|sn| matches!(*sn, SequenceNumbers::SEQUENTIAL_32 | SequenceNumbers::PARTIAL_64))?
    };
    Some(Picked { encr, key_bits, prf, integ, ke, additional, sequence_numbers })
}

/// One method out of each list, none of them twice but `NONE`; the earlier of a list is better, and the
/// earlier list has the first say. No additional one without a first one.
pub(super) fn distinct_methods(first: &[Ke], additional: &[Vec<Ke>; 7]) -> Option<(Ke, AdditionalKe)> {
    first.iter().find_map(|first| {
        if *first == Ke::NONE {
            return additional.iter().all(|list| list.contains(&Ke::NONE)).then_some((Ke::NONE, AdditionalKe::NONE));
        }
        let mut taken = vec![*first];
        let mut chosen = [Ke::NONE; 7];
        let mut rest = additional.as_slice();
        for slot in &mut chosen {
            let (list, after) = rest.split_first()?;
            rest = after;
            *slot = *list.iter().find(|method| {
                let free = **method == Ke::NONE || !taken.contains(method);
                free && can_be_distinct(rest, &[taken.as_slice(), &[**method]].concat())
            })?;
            taken.push(*slot);
        }
        Some((*first, AdditionalKe(chosen)))
    })
}

/// True when each of the lists can have a method of its own that is not `taken`, or `NONE`. A bipartite
/// matching, because a peer that can choose the lists must not make us try all combinations.
fn can_be_distinct(lists: &[Vec<Ke>], taken: &[Ke]) -> bool {
    let lists: Vec<&Vec<Ke>> = lists.iter().filter(|list| !list.contains(&Ke::NONE)).collect();
    let mut owners = Vec::new();
    (0..lists.len()).all(|index| assign(&lists, index, &mut taken.to_vec(), &mut owners))
}

/// Finds a method for the list at `index`, moving those that own one already; none that was `tried`.
fn assign(lists: &[&Vec<Ke>], index: usize, tried: &mut Vec<Ke>, owners: &mut Vec<(Ke, usize)>) -> bool {
    for method in lists.get(index).into_iter().copied().flatten() {
        if tried.contains(method) {
            continue;
        }
        tried.push(*method);
        let owner = owners.iter().find(|(owned, _)| owned == method).map(|(_, owner)| *owner);
        if owner.is_none_or(|owner| assign(lists, owner, tried, owners)) {
            owners.retain(|(owned, _)| owned != method);
            owners.push((*method, index));
            return true;
        }
    }
    false
}

/// False for ciphers that leave the text readable, which IKE messages must not be (RFC 8247 §2.1, RFC 4543 §3).
pub(super) fn encrypts(encr: Encr) -> bool {
    !matches!(encr, Encr::NULL | Encr::NULL_AUTH_AES_GMAC)
}

/// §3.3.1: IKE has none at first and 8 octets in a rekey; ESP 4 octets. 0 is never an SPI (RFC 4303 §2.1).
fn spi_is_possible(proposal: &Proposal) -> bool {
    let length_is_possible = match proposal.protocol {
        Protocol::IKE => matches!(proposal.spi.len(), 0 | 8),
        _ => proposal.spi.len() == 4,
    };
    length_is_possible && (proposal.spi.is_empty() || proposal.spi.iter().any(|octet| *octet != 0))
}

/// False for a transform that must not be chosen: an attribute that we do not know, or a key length where
/// the algorithm has none (§3.3.6).
fn usable(transform: &&Transform) -> bool {
    !transform.unknown_attribute && (transform.kind == TransformType::ENCR || transform.key_bits.is_none())
}

/// The key length of a cipher: its attribute, which ciphers of one length do not have (§3.3.5, RFC 7634 §4).
fn key_bits(transform: &Transform) -> Option<u16> {
    match (Encr(transform.id), transform.key_bits) {
        (Encr::CHACHA20_POLY1305, None) => Some(256),
        (Encr::NULL, None) => Some(0),
        (Encr::CHACHA20_POLY1305 | Encr::NULL, Some(_)) => None,
        (_, bits) => bits,
    }
}
