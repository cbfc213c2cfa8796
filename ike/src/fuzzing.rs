//! Entry points for fuzzers and property tests: octets from the network go in, nothing may panic, and what
//! was understood must survive being written and read again.

use ipsec::crypto::Protection;
use ipsec::plane::EspKeys;
use ipsec::secret::Secret;
use ipsec::transform::{Encr, Integ, Protocol, Transform};

use crate::crypto;
use crate::wire::{self, Incoming, Message, Payload};

/// Reads octets as a datagram.
///
/// # Panics
/// When a message that was read is written as another one.
pub fn message(datagram: &[u8]) {
    if let Ok(Incoming::Plain(message)) = wire::parse(datagram) {
        wire::unknown_critical(&message.payloads);
        let message = Message { payloads: without_unknown_attributes(message.payloads), ..message };
        match wire::parse(&wire::encode(&message)) {
            Ok(Incoming::Plain(again)) => assert_eq!(again, message),
            other => panic!("{message:?} became {other:?}"),
        }
        select(&message.payloads);
    }
}

/// Reads octets as the inside of an Encrypted payload: the first payload's type, then the chain.
pub fn payloads(octets: &[u8]) {
    if let Some((first, body)) = octets.split_first()
        && let Ok(payloads) = wire::parse_payloads(*first, body)
    {
        select(&payloads);
    }
}

/// Plays octets as a sequence of messages, timers, commands and answers to jobs between two engines.
///
/// # Panics
/// See `engine::storm`.
#[cfg(feature = "fuzzing")]
pub fn state_machine(octets: &[u8]) {
    crate::engine::storm::play(octets);
}

/// A message in fragments that come in any order, repeated, changed and mixed with those of another message. The first
/// two octets are sizes, each that follows picks a fragment and says what becomes of it.
///
/// # Panics
/// When what is put together is not what was taken apart, or takes more memory than a message may.
pub fn fragments(octets: &[u8]) {
    let [size, limit, steps @ ..] = octets else { return };
    let keys = EspKeys { encr: Secret::new(vec![7; 20]), integ: Secret::new(Vec::new()) };
    let Ok(protection) = Protection::new(Encr::AES_GCM_16, 128, Integ::NONE, &keys) else { return };
    let header = |message_id| wire::Header {
        initiator_spi: 1,
        responder_spi: 2,
        major: 2,
        minor: 0,
        exchange: wire::ExchangeType::IKE_AUTH,
        from_initiator: true,
        response: false,
        message_id,
    };
    let payloads = |octet: u8| vec![Payload::Vendor(vec![octet; usize::from(*size) * 16])];
    let seal = |message_id: u32, octet: u8, limit: usize| {
        wire::seal(&header(message_id), &payloads(octet), &protection, Some(limit), &mut Zero)
    };
    let limit = 80 + usize::from(*limit) * 4;
    // The same message in two divisions, and the next one.
    let mut sets = [seal(1, 1, limit), seal(1, 1, limit / 2 + 40), seal(2, 2, limit)];
    // RFC 7383 §2.5.2: who divides anew makes more fragments than before.
    if sets[0].len() == sets[1].len() {
        sets[1] = sets[0].clone();
    }
    let mut reassembly = wire::Reassembly::default();
    for step in steps {
        let Some(set) = sets.get(usize::from(step & 3).min(2)) else { continue };
        let Some(fragment) = set.get(usize::from(step >> 3) % set.len().max(1)) else { continue };
        let mut fragment = fragment.clone();
        if step & 4 != 0 {
            let at = usize::from(*step).wrapping_mul(31).checked_rem(fragment.len()).unwrap_or(0);
            if let Some(octet) = fragment.get_mut(at) {
                *octet ^= 1 << (step & 7);
            }
        }
        let Ok(Incoming::Protected(protected)) = wire::parse(&fragment) else { continue };
        let opened = protected.open(&protection, &mut reassembly);
        if let Ok(wire::OpenOutcome::Whole(opened)) = opened {
            let octet = u8::try_from(opened.header.message_id).unwrap_or(0);
            let read = wire::parse_payloads(opened.first, &opened.body);
            assert_eq!(read.ok(), Some(payloads(octet)), "another message than was sent");
        }
        assert!(reassembly.octets() <= 2 * wire::MAX_MESSAGE);
    }
}

struct Zero;

impl crate::Rng for Zero {
    fn fill(&mut self, buffer: &mut [u8]) {
        buffer.fill(0);
    }
}

/// Reads octets as a proposal string.
pub fn proposal_notation(octets: &[u8]) {
    let text = String::from_utf8_lossy(octets);
    for protocol in [Protocol::IKE, Protocol::ESP] {
        if let Ok(proposals) = crypto::parse_proposals(&text, protocol) {
            crypto::select_ike(&proposals, &proposals, true, None);
            crypto::select_esp(&proposals, &proposals, true, true, None);
        }
    }
}

fn select(payloads: &[Payload]) {
    for payload in payloads {
        let Payload::Sa(offered) = payload else { continue };
        let configured = |protocol| crypto::parse_proposals("default", protocol).unwrap_or_default();
        for ours_first in [true, false] {
            if let Some(choice) = crypto::select_ike(offered, &configured(Protocol::IKE), ours_first, None) {
                let accepted = crypto::accept_ike(&[choice.proposal], offered);
                assert_eq!(accepted, Some(choice.suite), "an answer that is not among the offers");
            }
            crypto::select_esp(offered, &configured(Protocol::ESP), ours_first, true, None);
        }
        crypto::accept_ike(offered, &configured(Protocol::IKE));
        crypto::accept_esp(offered, &configured(Protocol::ESP), true);
    }
}

/// Attributes that we do not know are read but never written.
fn without_unknown_attributes(mut payloads: Vec<Payload>) -> Vec<Payload> {
    for payload in &mut payloads {
        if let Payload::Sa(proposals) = payload {
            for transform in proposals.iter_mut().flat_map(|proposal| &mut proposal.transforms) {
                *transform = Transform { unknown_attribute: false, ..*transform };
            }
        }
    }
    payloads
}
