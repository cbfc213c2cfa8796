//! Proposals in strongSwan's notation: keywords joined by `-` (`aes256gcm16-prfsha384-ecp384`).

use ipsec::crypto::Protection;
use ipsec::transform::{Encr, Integ, Ke, Prf, Proposal, Protocol, SequenceNumbers, Transform, TransformType};

use super::selection::{distinct_methods, encrypts};

/// Why a proposal string is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("proposal {text:?}: {reason}")]
pub struct ProposalError {
    /// The whole string.
    pub text: String,
    /// What is wrong with which keyword.
    pub reason: String,
}

/// Parses strongSwan's notation (`aes256gcm16-prfsha384-ecp384`, `default`). `default` gives two: one with
/// combined-mode ciphers, one with others.
///
/// Numbers count from 1 in what is returned; use [`renumber`] on a list made of several. SPIs are empty.
/// An IKE proposal without a PRF takes the PRFs of its integrity algorithms; integrity algorithms beside
/// combined-mode ciphers, and PRFs in an ESP proposal, have no other effect. ESP without `esn` or `noesn`
/// means `noesn`. `ke1_` to `ke7_` before a key exchange method make it one of an additional key exchange
/// (RFC 9370); `ke1_none` makes that one optional.
pub fn parse_proposals(text: &str, protocol: Protocol) -> Result<Vec<Proposal>, ProposalError> {
    let fail = |reason: String| ProposalError { text: text.to_owned(), reason };
    if protocol != Protocol::IKE && protocol != Protocol::ESP {
        return Err(fail("only IKE and ESP proposals are supported".to_owned()));
    }
    if text.trim().eq_ignore_ascii_case("default") {
        return Ok(default_proposals(protocol));
    }
    let transforms = text
        .split('-')
        .map(|word| keyword(word.trim()).map_err(fail))
        .collect::<Result<Vec<Transform>, ProposalError>>()?;
    Ok(vec![complete(transforms, protocol).map_err(|reason| fail(reason.to_owned()))?])
}

/// Numbers proposals from 1 (RFC 7296 §3.3.1); after the 255th they get no further numbers and are dropped.
pub fn renumber(proposals: &mut Vec<Proposal>) {
    proposals.truncate(usize::from(u8::MAX));
    for (number, proposal) in (1..=u8::MAX).zip(proposals) {
        proposal.number = number;
    }
}

/// The same proposals without key exchange, as IKE_AUTH offers them for its Child SA (RFC 7296 §1.2).
pub fn without_ke(proposals: &[Proposal]) -> Vec<Proposal> {
    let mut proposals = proposals.to_vec();
    for proposal in &mut proposals {
        let is_ke = |kind: TransformType| kind == TransformType::KE || kind.is_additional_ke();
        proposal.transforms.retain(|transform| !is_ke(transform.kind));
    }
    proposals
}

/// The proposals that can do without additional key exchanges, without them: for a peer that has not
/// announced IKE_INTERMEDIATE (RFC 9370 §2.2.1). Numbers stay.
pub fn without_additional_ke(proposals: &[Proposal]) -> Vec<Proposal> {
    let dispensable = |proposal: &&Proposal| {
        TransformType::ADDITIONAL_KE.iter().all(|kind| {
            let mut methods = proposal.transforms.iter().filter(|transform| transform.kind == *kind).peekable();
            methods.peek().is_none() || methods.any(|transform| transform.id == Ke::NONE.0)
        })
    };
    let mut kept: Vec<Proposal> = proposals.iter().filter(dispensable).cloned().collect();
    for proposal in &mut kept {
        proposal.transforms.retain(|transform| !transform.kind.is_additional_ke());
    }
    kept
}

/// Checks that a proposal has what its protocol needs, and adds what goes without saying.
fn complete(transforms: Vec<Transform>, protocol: Protocol) -> Result<Proposal, &'static str> {
    let mut kept: Vec<Transform> = Vec::new();
    for transform in transforms {
        if !kept.contains(&transform) {
            kept.push(transform);
        }
    }
    let has = |kept: &[Transform], kind| kept.iter().any(|transform| transform.kind == kind);

    let ciphers = || kept.iter().filter(|transform| transform.kind == TransformType::ENCR);
    let combined = ciphers().any(combined_mode);
    if !has(&kept, TransformType::ENCR) {
        return Err("an encryption algorithm is missing");
    }
    if protocol == Protocol::IKE && !ciphers().all(|cipher| encrypts(Encr(cipher.id))) {
        return Err("null and gmac leave the text readable: they are for ESP only");
    }
    if combined && !ciphers().all(combined_mode) {
        return Err("combined-mode and other encryption algorithms cannot be in one proposal");
    }
    if !combined && !has(&kept, TransformType::INTEG) {
        return Err("an integrity algorithm is missing");
    }
    if protocol == Protocol::IKE {
        if has(&kept, TransformType::SN) {
            return Err("esn and noesn are for ESP only");
        }
        if !has(&kept, TransformType::PRF) {
            let derived: Vec<Transform> = kept.iter().filter_map(prf_of).collect();
            kept.extend(derived);
        }
        kept.retain(|transform| *transform != Transform::new(TransformType::KE, Ke::NONE.0));
        if !has(&kept, TransformType::PRF) {
            return Err("a PRF is missing");
        }
        if !has(&kept, TransformType::KE) {
            return Err("a key exchange method is missing");
        }
    } else {
        kept.retain(|transform| transform.kind != TransformType::PRF);
        if !has(&kept, TransformType::SN) {
            kept.push(sequence_numbers(SequenceNumbers::SEQUENTIAL_32));
        }
    }
    if combined {
        kept.retain(|transform| transform.kind != TransformType::INTEG);
    }
    check_additional_ke(&mut kept)?;
    kept.sort_by_key(|transform| transform.kind);
    Ok(Proposal { number: 1, protocol, spi: Vec::new(), transforms: kept })
}

/// Drops additional key exchanges that can only be `NONE`, which a peer without RFC 9370 would refuse, and
/// refuses what nobody could choose from: each key exchange needs a method of its own.
fn check_additional_ke(kept: &mut Vec<Transform>) -> Result<(), &'static str> {
    let methods = |kept: &[Transform], kind| -> Vec<Ke> {
        kept.iter().filter(|transform| transform.kind == kind).map(|transform| Ke(transform.id)).collect()
    };
    for kind in TransformType::ADDITIONAL_KE {
        if methods(kept, kind) == [Ke::NONE] {
            kept.retain(|transform| transform.kind != kind);
        }
    }
    if !kept.iter().any(|transform| transform.kind.is_additional_ke()) {
        return Ok(());
    }
    let first = methods(kept, TransformType::KE);
    if first.iter().all(|method| *method == Ke::NONE) {
        return Err("an additional key exchange needs a first one");
    }
    let additional = TransformType::ADDITIONAL_KE.map(|kind| {
        let methods = methods(kept, kind);
        if methods.is_empty() { vec![Ke::NONE] } else { methods }
    });
    match distinct_methods(&first, &additional) {
        Some(_) => Ok(()),
        None => Err("the key exchanges must each have a method of their own"),
    }
}

fn combined_mode(transform: &Transform) -> bool {
    Protection::is_combined_mode_cipher(Encr(transform.id))
}

/// The PRF of the same hash as an integrity algorithm.
fn prf_of(transform: &Transform) -> Option<Transform> {
    if transform.kind != TransformType::INTEG {
        return None;
    }
    match Integ(transform.id) {
        Integ::HMAC_SHA1_96 => Some(prf(Prf::HMAC_SHA1)),
        Integ::HMAC_SHA2_256_128 => Some(prf(Prf::HMAC_SHA2_256)),
        Integ::HMAC_SHA2_384_192 => Some(prf(Prf::HMAC_SHA2_384)),
        Integ::HMAC_SHA2_512_256 => Some(prf(Prf::HMAC_SHA2_512)),
        Integ::AES_CMAC_96 => Some(prf(Prf::AES128_CMAC)),
        _ => None,
    }
}

/// What strongSwan's default has, without what needs a warning (SHA-1), what makes a peer's request costly
/// (MODP above 4096 bits) and what few want (Brainpool); combined modes and short key exchanges first.
fn default_proposals(protocol: Protocol) -> Vec<Proposal> {
    let combined = vec![
        encr(Encr::AES_GCM_16, 128),
        encr(Encr::AES_GCM_16, 192),
        encr(Encr::AES_GCM_16, 256),
        Transform::new(TransformType::ENCR, Encr::CHACHA20_POLY1305.0),
    ];
    let other = vec![
        encr(Encr::AES_CBC, 128),
        encr(Encr::AES_CBC, 192),
        encr(Encr::AES_CBC, 256),
        integ(Integ::HMAC_SHA2_256_128),
        integ(Integ::HMAC_SHA2_384_192),
        integ(Integ::HMAC_SHA2_512_256),
    ];
    let methods = [Ke::X25519, Ke::ECP_256, Ke::ECP_384, Ke::ECP_521, Ke::MODP_3072, Ke::MODP_4096, Ke::MODP_2048];
    let mut proposals: Vec<Proposal> = [combined, other]
        .into_iter()
        .map(|mut transforms| {
            transforms.extend(methods.map(ke));
            if protocol == Protocol::IKE {
                let prfs = [Prf::HMAC_SHA2_256, Prf::HMAC_SHA2_384, Prf::HMAC_SHA2_512];
                transforms.extend(prfs.map(prf));
            } else {
                // Perfect forward secrecy where the peer has it, too.
                transforms.extend([ke(Ke::NONE), sequence_numbers(SequenceNumbers::SEQUENTIAL_32)]);
            }
            transforms.sort_by_key(|transform| transform.kind);
            Proposal { number: 1, protocol, spi: Vec::new(), transforms }
        })
        .collect();
    renumber(&mut proposals);
    proposals
}

fn encr(id: Encr, bits: u16) -> Transform {
    Transform::with_key_bits(TransformType::ENCR, id.0, bits)
}

fn integ(id: Integ) -> Transform {
    Transform::new(TransformType::INTEG, id.0)
}

fn prf(id: Prf) -> Transform {
    Transform::new(TransformType::PRF, id.0)
}

fn ke(id: Ke) -> Transform {
    Transform::new(TransformType::KE, id.0)
}

fn sequence_numbers(id: SequenceNumbers) -> Transform {
    Transform::new(TransformType::SN, id.0)
}

/// The transform type and the method's name of `ke1_mlkem768` and the like.
fn additional(word: &str) -> Option<(TransformType, &str)> {
    let (number, method) = word.strip_prefix("ke")?.split_once('_')?;
    let mut kinds = TransformType::ADDITIONAL_KE.into_iter().zip(1_u8..);
    let (kind, _) = kinds.find(|(_, known)| number == known.to_string())?;
    Some((kind, method))
}

/// AES in all its modes: `aes256`, `aes128ctr`, `aes192ccm12` (octets) or `aes192ccm96` (bits), `aes256gmac`.
fn aes(word: &str) -> Option<Transform> {
    let rest = word.strip_prefix("aes")?;
    let (bits, mode) = match rest.split_at_checked(3) {
        Some(("128", mode)) => (128, mode),
        Some(("192", mode)) => (192, mode),
        Some(("256", mode)) => (256, mode),
        _ if rest.is_empty() => (128, rest),
        _ => return None,
    };
    let id = match mode {
        "" => Encr::AES_CBC,
        "ctr" => Encr::AES_CTR,
        "ccm8" | "ccm64" => Encr::AES_CCM_8,
        "ccm12" | "ccm96" => Encr::AES_CCM_12,
        "ccm" | "ccm16" | "ccm128" => Encr::AES_CCM_16,
        "gcm8" | "gcm64" => Encr::AES_GCM_8,
        "gcm12" | "gcm96" => Encr::AES_GCM_12,
        "gcm" | "gcm16" | "gcm128" => Encr::AES_GCM_16,
        "gmac" => Encr::NULL_AUTH_AES_GMAC,
        _ => return None,
    };
    Some(encr(id, bits))
}

fn keyword(word: &str) -> Result<Transform, String> {
    let lower = word.to_ascii_lowercase();
    if let Some((kind, method)) = additional(&lower) {
        let method = keyword(method).ok().filter(|transform| transform.kind == TransformType::KE);
        let method = method.ok_or_else(|| format!("{word:?} does not name a key exchange method that we have"))?;
        return Ok(Transform::new(kind, method.id));
    }
    if let Some(transform) = aes(&lower) {
        return Ok(transform);
    }
    Ok(match lower.as_str() {
        "null" => Transform::new(TransformType::ENCR, Encr::NULL.0),
        "chacha20poly1305" => Transform::new(TransformType::ENCR, Encr::CHACHA20_POLY1305.0),
        "sha" | "sha1" => integ(Integ::HMAC_SHA1_96),
        "sha256" | "sha2_256" => integ(Integ::HMAC_SHA2_256_128),
        "sha384" | "sha2_384" => integ(Integ::HMAC_SHA2_384_192),
        "sha512" | "sha2_512" => integ(Integ::HMAC_SHA2_512_256),
        "aescmac" => integ(Integ::AES_CMAC_96),
        "prfaescmac" => prf(Prf::AES128_CMAC),
        "prfsha1" => prf(Prf::HMAC_SHA1),
        "prfsha256" => prf(Prf::HMAC_SHA2_256),
        "prfsha384" => prf(Prf::HMAC_SHA2_384),
        "prfsha512" => prf(Prf::HMAC_SHA2_512),
        "none" | "modpnone" => ke(Ke::NONE),
        "modp2048" => ke(Ke::MODP_2048),
        "modp3072" => ke(Ke::MODP_3072),
        "modp4096" => ke(Ke::MODP_4096),
        "modp6144" => ke(Ke::MODP_6144),
        "modp8192" => ke(Ke::MODP_8192),
        "ecp256" => ke(Ke::ECP_256),
        "ecp384" => ke(Ke::ECP_384),
        "ecp521" => ke(Ke::ECP_521),
        "ecp256bp" => ke(Ke::BRAINPOOL_256),
        "ecp384bp" => ke(Ke::BRAINPOOL_384),
        "x25519" | "curve25519" => ke(Ke::X25519),
        "mlkem512" => ke(Ke::ML_KEM_512),
        "mlkem768" => ke(Ke::ML_KEM_768),
        "mlkem1024" => ke(Ke::ML_KEM_1024),
        "esn" => sequence_numbers(SequenceNumbers::PARTIAL_64),
        "noesn" => sequence_numbers(SequenceNumbers::SEQUENTIAL_32),
        "" => return Err("a keyword is empty".to_owned()),
        "default" => return Err("default cannot be joined with other keywords".to_owned()),
        known if is_known_elsewhere(known) => return Err(format!("{word:?} is not supported")),
        _ => return Err(format!("unknown keyword {word:?}")),
    })
}

/// Keywords that strongSwan has and we do not: so that the message says which of the two it is.
fn is_known_elsewhere(word: &str) -> bool {
    const WORDS: [&str; 19] = [
        "des",
        "3des",
        "cast128",
        "md5",
        "md5_128",
        "sha1_160",
        "sha256_96",
        "sha2_256_96",
        "aesxcbc",
        "camelliaxcbc",
        "prfmd5",
        "prfaesxcbc",
        "prfcamelliaxcbc",
        "modpnull",
        "modp768",
        "modp1024",
        "modp1536",
        "x448",
        "curve448",
    ];
    const PREFIXES: [&str; 11] = [
        "camellia",
        "blowfish",
        "serpent",
        "twofish",
        "ntru",
        "newhope",
        "modp1024s",
        "modp2048s",
        "ecp192",
        "ecp224",
        "ecp512bp",
    ];
    word == "chacha20poly1305compat" || WORDS.contains(&word) || PREFIXES.iter().any(|prefix| word.starts_with(prefix))
}
