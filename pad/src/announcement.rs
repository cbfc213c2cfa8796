//! Announcements of supported authentication methods (RFC 9593): what a peer says it can verify.

use crate::constraints::{SignatureConstraints, SignatureSettings};
use crate::credentials::{AuthClass, AuthMethod, PadEntry};
use crate::signature::{Hash, KeyType, Scheme};

/// More announcements than this are not read.
const MAX_ANNOUNCEMENTS: usize = 64;

/// One announcement (RFC 9593 §3.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthAnnouncement {
    /// The method.
    pub method: AuthMethod,
    /// The authority whose certificates it is for: 1-based in the CERTREQ of the same message; 0 is any.
    pub cert_link: u8,
    /// AlgorithmIdentifier, DER, for [`AuthMethod::DIGITAL_SIGNATURE`]; empty is any.
    pub algorithm: Vec<u8>,
}

impl AuthAnnouncement {
    /// Reads the data of SUPPORTED_AUTH_METHODS. Announcements that are not understood are skipped (§3.2); `None`
    /// where a length leads out of the data, or is too small to lead anywhere.
    pub fn parse_all(mut data: &[u8]) -> Option<Vec<Self>> {
        let mut announcements = Vec::new();
        while let Some((length, _)) = data.split_first() {
            let length = usize::from(*length);
            let (announcement, rest) = data.split_at_checked(length).filter(|_| length >= 2)?;
            data = rest;
            if announcements.len() < MAX_ANNOUNCEMENTS {
                announcements.extend(Self::parse(announcement));
            }
        }
        Some(announcements)
    }

    fn parse(announcement: &[u8]) -> Option<Self> {
        match announcement {
            [2, method] => Some(Self { method: AuthMethod(*method), cert_link: 0, algorithm: Vec::new() }),
            [_, method, cert_link, algorithm @ ..] => {
                Some(Self { method: AuthMethod(*method), cert_link: *cert_link, algorithm: algorithm.to_vec() })
            }
            _ => None,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let body: Vec<u8> = match self.method {
            AuthMethod::SHARED_KEY => vec![self.method.0],
            AuthMethod(method) => [&[method, self.cert_link], self.algorithm.as_slice()].concat(),
        };
        // The longest that we make is an RSASSA-PSS algorithm of 67 octets.
        if let Ok(length) = u8::try_from(body.len() + 1) {
            out.push(length);
            out.extend(body);
        }
    }

    /// The data of SUPPORTED_AUTH_METHODS for what these entries accept, in our order of preference.
    pub fn of_entries(entries: &[&PadEntry], settings: SignatureSettings) -> Vec<u8> {
        let mut announcements: Vec<Self> = Vec::new();
        for entry in entries {
            let accepted = match entry.class {
                AuthClass::PublicKey => signatures(&entry.constraints, settings),
                AuthClass::Null => vec![Self { method: AuthMethod::NULL, cert_link: 0, algorithm: Vec::new() }],
                // RFC 9593 is about AUTH in the first request, where EAP has none.
                AuthClass::Eap(_) => Vec::new(),
                AuthClass::SharedKey => {
                    vec![Self { method: AuthMethod::SHARED_KEY, cert_link: 0, algorithm: Vec::new() }]
                }
            };
            for announcement in accepted {
                if !announcements.contains(&announcement) {
                    announcements.push(announcement);
                }
            }
        }
        let mut data = Vec::new();
        announcements.iter().for_each(|announcement| announcement.encode(&mut data));
        data
    }
}

/// What an entry's constraints let a peer sign with.
fn signatures(constraints: &SignatureConstraints, settings: SignatureSettings) -> Vec<AuthAnnouncement> {
    const BITS: usize = 8192;
    let hashes = [Hash::Sha256, Hash::Sha384, Hash::Sha512];
    let all = std::iter::once(Scheme::Ed25519)
        .chain(hashes.map(Scheme::Ecdsa))
        .chain(hashes.map(Scheme::Pss))
        .chain(hashes.map(Scheme::Pkcs1));
    let order: Vec<Scheme> = constraints.auth_schemes(settings).unwrap_or_else(|| all.collect());
    let key_fits = |scheme: Scheme| scheme.key_types().iter().any(|key| constraints.admits_signer(*key, BITS));
    let signed = order.into_iter().filter(|scheme| key_fits(*scheme)).map(|scheme| AuthAnnouncement {
        method: AuthMethod::DIGITAL_SIGNATURE,
        cert_link: 0,
        algorithm: scheme.algorithm_identifier().to_vec(),
    });
    let classic = [
        (AuthMethod::ECDSA_256, KeyType::EcdsaP256, Some(Scheme::Ecdsa(Hash::Sha256))),
        (AuthMethod::ECDSA_384, KeyType::EcdsaP384, Some(Scheme::Ecdsa(Hash::Sha384))),
        (AuthMethod::ECDSA_521, KeyType::EcdsaP521, Some(Scheme::Ecdsa(Hash::Sha512))),
        (AuthMethod::RSA, KeyType::Rsa, None),
    ];
    let classic = classic
        .into_iter()
        .filter(|(_, key, scheme)| constraints.admits_signer(*key, BITS) && constraints.admits_auth(*scheme, settings))
        .map(|(method, ..)| AuthAnnouncement { method, cert_link: 0, algorithm: Vec::new() });
    signed.chain(classic).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::IdentityPattern;

    fn entry(class: AuthClass, constraints: &str) -> PadEntry {
        PadEntry {
            name: "conn".to_owned(),
            remote_id: IdentityPattern::any(),
            class,
            cacerts: Vec::new(),
            certs: Vec::new(),
            public_keys: Vec::new(),
            constraints: SignatureConstraints::parse(constraints).unwrap(),
            revocation: Default::default(),
            eap_id: None,
        }
    }

    // RFC 9593 §3.2.
    #[test]
    fn lengths_that_lead_nowhere_are_refused_and_unknown_announcements_skipped() {
        for broken in [&[0][..], &[1], &[2], &[1, 2], &[3, 9], &[2, 2, 0], &[255, 14, 0, 1]] {
            assert_eq!(AuthAnnouncement::parse_all(broken), None, "{broken:?}");
        }
        assert_eq!(AuthAnnouncement::parse_all(&[]), Some(Vec::new()));
        let data = [2, 2, 3, 9, 1, 6, 14, 2, 0x30, 1, 0, 3, 200, 0];
        let read = AuthAnnouncement::parse_all(&data).unwrap();
        let of = |method, cert_link, algorithm: &[u8]| AuthAnnouncement {
            method: AuthMethod(method),
            cert_link,
            algorithm: algorithm.to_vec(),
        };
        assert_eq!(read, [of(2, 0, &[]), of(9, 1, &[]), of(14, 2, &[0x30, 1, 0]), of(200, 0, &[])]);
        let many = [2, 2].repeat(1000);
        assert_eq!(AuthAnnouncement::parse_all(&many).unwrap().len(), MAX_ANNOUNCEMENTS);
    }

    // RFC 9593 §3.2.1 to §3.2.3.
    #[test]
    fn what_entries_accept_is_announced_once_in_order() {
        let settings = SignatureSettings::default();
        let psk = entry(AuthClass::SharedKey, "pubkey");
        assert_eq!(AuthAnnouncement::of_entries(&[&psk, &psk], settings), [2, 2]);
        let ecdsa = entry(AuthClass::PublicKey, "ecdsa-384-sha384");
        let data = AuthAnnouncement::of_entries(&[&ecdsa, &psk], settings);
        let algorithm = b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03";
        assert_eq!(data, [&[15, 14, 0][..], algorithm, &[3, 10, 0, 2, 2]].concat());
        let open = entry(AuthClass::PublicKey, "pubkey");
        let data = AuthAnnouncement::of_entries(&[&open], settings);
        let read = AuthAnnouncement::parse_all(&data).unwrap();
        assert_eq!(read.len(), 14);
        assert!(read.iter().any(|announcement| announcement.method == AuthMethod::RSA));
    }
}
