//! What to say about algorithms that are served because somebody names them, and not because they are good.

use ipsec::transform::{Encr, Integ, Ke, Prf, Proposal, Protocol, Transform, TransformType};

/// Why the algorithms of these proposals are not what we would choose, each once, in the order of the
/// proposals: for the log when a configuration is loaded. The default gives none.
pub fn warnings(proposals: &[Proposal]) -> Vec<&'static str> {
    let mut warnings = Vec::new();
    for proposal in proposals {
        for text in proposal.transforms.iter().filter_map(|transform| warning(proposal.protocol, transform)) {
            if !warnings.contains(&text) {
                warnings.push(text);
            }
        }
    }
    warnings
}

/// True where a proposal has less than 128 bits of security against a quantum computer, which a post-quantum preshared
/// key does not mend: keys below 256 bits (RFC 8784 §6).
pub fn has_short_keys(proposals: &[Proposal]) -> bool {
    proposals.iter().flat_map(|proposal| &proposal.transforms).any(|transform| match transform.kind {
        TransformType::ENCR => match Encr(transform.id) {
            Encr::CHACHA20_POLY1305 => false,
            Encr::NULL => true,
            _ => transform.key_bits.is_none_or(|bits| bits < 256),
        },
        TransformType::PRF => matches!(Prf(transform.id), Prf::HMAC_SHA1 | Prf::AES128_CMAC),
        TransformType::INTEG => matches!(Integ(transform.id), Integ::HMAC_SHA1_96 | Integ::AES_CMAC_96),
        _ => false,
    })
}

fn warning(protocol: Protocol, transform: &Transform) -> Option<&'static str> {
    match transform.kind {
        TransformType::ENCR => match Encr(transform.id) {
            Encr::NULL => Some("null: everybody on the way reads what is sent (RFC 8221 §5)"),
            Encr::NULL_AUTH_AES_GMAC => Some("gmac: everybody on the way reads what is sent (RFC 4543 §1)"),
            Encr::AES_CCM_8 => Some("an integrity check of 8 octets is for constrained devices (RFC 8221 §5)"),
            Encr::AES_GCM_8 | Encr::AES_GCM_12 => {
                Some("AES-GCM with a short integrity check is easier to forge; gcm16 is the one to use (RFC 8221 §5)")
            }
            _ => None,
        },
        TransformType::PRF if Prf(transform.id) == Prf::HMAC_SHA1 => {
            Some("prfsha1: SHA-1 is on its way out (RFC 8247 §2.2)")
        }
        TransformType::INTEG if Integ(transform.id) == Integ::HMAC_SHA1_96 => {
            Some("sha1: SHA-1 is on its way out (RFC 8247 §2.3)")
        }
        TransformType::KE if protocol == Protocol::IKE => match Ke(transform.id) {
            Ke::ML_KEM_768 | Ke::ML_KEM_1024 => Some(
                "ML-KEM as the first key exchange makes an IKE_SA_INIT that cannot be fragmented and may be lost \
                 (RFC 9370 §2); name it ke1_mlkem768 or ke1_mlkem1024 beside another method",
            ),
            _ => None,
        },
        _ => None,
    }
}
