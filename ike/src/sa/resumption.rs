//! The proof in IKE_AUTH after IKE_SESSION_RESUME (RFC 5723 §4.3.3): AUTH = prf(SK_px, the octets that are signed
//! otherwise), with the new keys, which only who has the SK_d of the ticket can make.

use std::time::Instant;

use ipsec::secret::Secret;
use pad::{AuthMethod, Identity, PeerIdentity, Proof};

use super::auth::{InitMaterial, identification};
use super::basis::Basis;
use super::channel::Channel;
use super::parts::Parts;
use crate::crypto;
use crate::wire::{Identification, Payload};

/// Our AUTH payload.
pub(crate) fn proof(channel: &Channel, material: &InitMaterial, id: &Identification) -> Payload {
    let key = if channel.initiator { &channel.pi } else { &channel.pr };
    let octets = material.our_octets(channel, id);
    // The PRF has just made these keys, so this cannot fail; an empty MAC proves nothing.
    let mac = octets.and_then(|octets| crypto::prf(channel.suite.prf, key.expose(), &[&octets]));
    let data = mac.map(|mac| mac.expose().to_vec()).unwrap_or_default();
    Payload::Auth { method: AuthMethod::SHARED_KEY.0, data }
}

/// Checks the peer's: it has the keys, and says to be who it was, in the same octets.
pub(crate) fn check(
    channel: &Channel,
    material: &InitMaterial,
    peer: &Identity,
    parts: &Parts,
) -> Result<(), &'static str> {
    let (asserted, key) = match channel.initiator {
        true => (&parts.id_responder, &channel.pr),
        false => (&parts.id_initiator, &channel.pi),
    };
    let known = identification(peer);
    if asserted.as_ref() != Some(&known) {
        return Err("it says to be somebody else");
    }
    if !parts.certificates.is_empty() {
        return Err("there is a certificate where there must not be one");
    }
    let Some((method, auth)) = &parts.auth else { return Err("there is no proof") };
    if *method != AuthMethod::SHARED_KEY.0 {
        return Err("its proof is of another kind");
    }
    let expected = material.their_octets(channel, &known);
    let expected = expected.and_then(|octets| crypto::prf(channel.suite.prf, key.expose(), &[&octets]));
    let expected: Secret = expected.map_err(|_| "the PRF is not supported")?;
    if expected.expose().is_empty() || !expected.matches(auth) {
        return Err("its proof is wrong");
    }
    Ok(())
}

/// For the log: who was resumed, and what that goes back to.
pub(crate) fn line(now: Instant, peer: &PeerIdentity, basis: &Basis) -> String {
    let by = match peer.proof {
        Proof::Unauthenticated { .. } => "nothing",
        Proof::PreSharedKey => "a pre-shared key",
        Proof::Certificate { .. } => "a certificate",
        Proof::RawKey { .. } => "a raw public key",
        Proof::Eap { .. } => "EAP",
    };
    let ago = now.saturating_duration_since(basis.proved_at).as_secs();
    format!("authentication of '{}' by ticket successful, originally with {by} {ago}s ago", peer.id)
}

#[cfg(test)]
mod tests {
    use ipsec::transform::{Encr, Integ, Ke, Prf};
    use pad::SignatureSettings;

    use super::*;
    use crate::crypto::{AdditionalKe, IkeSuite, KeySeed};
    use crate::sa::auth::IntAuth;
    use crate::sa::channel::Spis;

    /// One end of an IKE SA made out of this SK_d.
    fn end(initiator: bool, d: u8, messages: [&[u8]; 2]) -> (Channel, InitMaterial) {
        let (encr, prf, additional) = (Encr::AES_GCM_16, Prf::HMAC_SHA2_256, AdditionalKe::NONE);
        let suite = IkeSuite { encr, key_bits: 128, integ: Integ::NONE, prf, ke: Ke::X25519, additional };
        let (ni, nr) = (vec![1; 32], vec![2; 32]);
        let seed = KeySeed { ni: &ni, nr: &nr, spi_i: 3, spi_r: 4 };
        let keys = crypto::resumed_ike_keys(&suite, &Secret::new(vec![d; 32]), seed).unwrap();
        let channel = Channel::new(suite, keys, Spis { initiator: 3, responder: 4 }, initiator, false).unwrap();
        let [ours, theirs] = messages.map(<[u8]>::to_vec);
        let material = InitMaterial {
            ours,
            theirs,
            ni,
            nr,
            peer_hashes: None,
            cert_requests: Vec::new(),
            cert_requested: false,
            raw_key_requested: false,
            announced: None,
            settings: SignatureSettings::default(),
            intermediate: IntAuth::default(),
            use_ppk: false,
            own_key: None,
        };
        (channel, material)
    }

    fn id(name: &str) -> Identity {
        Identity::Fqdn(name.to_owned())
    }

    /// IKE_AUTH of the end that is (not) the initiator, and what is added.
    fn message(initiator: bool, proof: Payload, name: &str, more: Vec<Payload>) -> Parts {
        let id = identification(&id(name));
        let id = if initiator { Payload::IdInitiator(id) } else { Payload::IdResponder(id) };
        Parts::collect([vec![id, proof], more].concat()).unwrap()
    }

    // RFC 5723 §4.3.3: AUTH = prf(SK_px, octets), one key for each side, over both messages, the nonce and the identity.
    #[test]
    fn each_side_proves_that_it_has_the_keys() {
        let request: &[u8] = b"IKE_SESSION_RESUME request";
        let answer: &[u8] = b"IKE_SESSION_RESUME response";
        for initiator in [true, false] {
            let messages = if initiator { [request, answer] } else { [answer, request] };
            let ours = end(initiator, 7, messages);
            let theirs = end(!initiator, 7, [messages[1], messages[0]]);
            let check = |parts: &Parts| super::check(&theirs.0, &theirs.1, &id("client"), parts);
            let made = |(channel, material): &(Channel, InitMaterial), name: &str| {
                proof(channel, material, &identification(&id(name)))
            };
            let good = made(&ours, "client");
            assert_eq!(check(&message(initiator, good.clone(), "client", Vec::new())), Ok(()));
            let Payload::Auth { method, data } = &good else { panic!("AUTH") };
            assert_eq!((*method, data.len()), (2, 32));
            let key = if initiator { &ours.0.pi } else { &ours.0.pr };
            let nonce = if initiator { &ours.1.nr } else { &ours.1.ni };
            let body = identification(&id("client")).body();
            let maced = crypto::prf(Prf::HMAC_SHA2_256, key.expose(), &[&body]).unwrap();
            let expected = crypto::prf(Prf::HMAC_SHA2_256, key.expose(), &[messages[0], nonce, maced.expose()]);
            assert_eq!(data, expected.unwrap().expose());

            let auth = |method, data: &[u8]| Payload::Auth { method, data: data.to_vec() };
            let mut wrong = vec![
                // Another SK_d, another message, the other side's proof sent back, somebody else's, none.
                made(&end(initiator, 8, messages), "client"),
                made(&end(initiator, 7, [b"another request", answer]), "client"),
                made(&theirs, "client"),
                made(&ours, "mallory"),
                auth(2, &[]),
                auth(2, &data[..31]),
                auth(2, &[data.as_slice(), &[0]].concat()),
            ];
            wrong.extend((0..32).map(|at| {
                let mut changed = data.clone();
                changed[at] ^= 1;
                auth(2, &changed)
            }));
            for (number, proof) in wrong.into_iter().enumerate() {
                let parts = message(initiator, proof, "client", Vec::new());
                assert_eq!(check(&parts), Err("its proof is wrong"), "{number}");
            }
            for method in [0, 1, 9, 10, 11, 13, 14] {
                let parts = message(initiator, auth(method, data), "client", Vec::new());
                assert_eq!(check(&parts), Err("its proof is of another kind"));
            }
            let somebody = message(initiator, good.clone(), "mallory", Vec::new());
            assert_eq!(check(&somebody), Err("it says to be somebody else"));
            // The same name in other octets is not identical (RFC 5723 §4.3.3).
            let somebody = message(initiator, good.clone(), "CLIENT", Vec::new());
            assert_eq!(check(&somebody), Err("it says to be somebody else"));
            let nobody = message(!initiator, good.clone(), "client", Vec::new());
            assert_eq!(check(&nobody), Err("it says to be somebody else"));
            let certificate = vec![Payload::Cert { encoding: 4, data: vec![0x30] }];
            let with_certificate = message(initiator, good.clone(), "client", certificate);
            assert!(check(&with_certificate).is_err());
            let unproved = Parts::collect(vec![match initiator {
                true => Payload::IdInitiator(identification(&id("client"))),
                false => Payload::IdResponder(identification(&id("client"))),
            }]);
            assert_eq!(check(&unproved.unwrap()), Err("there is no proof"));
        }
    }
}
