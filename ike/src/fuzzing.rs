//! Entry points for fuzzers and property tests: octets from the network go in, nothing may panic, and what
//! was understood must survive being written and read again.

use ipsec::transform::{Protocol, Transform};

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
