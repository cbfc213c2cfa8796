//! Signatures in AUTH payloads: the methods of RFC 7296 §3.8, RFC 4754 and RFC 7427, over aws-lc.

use std::fmt;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    self, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair, ParsedPublicKey, RsaEncoding, RsaKeyPair,
    UnparsedPublicKey, VerificationAlgorithm,
};
use pkcs8::der::asn1::{AnyRef, ObjectIdentifier};
use pkcs8::der::{Decode, Tag, TagNumber};
use pkcs8::spki::SubjectPublicKeyInfoRef;
use sha1::{Digest, Sha1};

use crate::announcement::AuthAnnouncement;
use crate::constraints::{SignatureConstraints, SignatureSettings};
use crate::credentials::AuthMethod;
use crate::distinguished_name::elements;

/// Public key algorithms that can authenticate a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// RSA, at least 2048 bits.
    Rsa,
    /// ECDSA on P-256.
    EcdsaP256,
    /// ECDSA on P-384.
    EcdsaP384,
    /// ECDSA on P-521.
    EcdsaP521,
    /// Ed25519 (RFC 8420).
    Ed25519,
}

impl KeyType {
    /// Reads the algorithm and the key out of a SubjectPublicKeyInfo; `None` for what we do not know.
    pub(crate) fn of_public_key_info(der: &[u8]) -> Option<(Self, Vec<u8>)> {
        let info = SubjectPublicKeyInfoRef::from_der(der).ok()?;
        let key = info.subject_public_key.as_bytes()?.to_vec();
        let oid = info.algorithm.oid;
        let kind = if oid == RSA_ENCRYPTION {
            Self::Rsa
        } else if oid == EC_PUBLIC_KEY {
            let curve = info.algorithm.parameters?.decode_as::<ObjectIdentifier>().ok()?;
            let curves = [(P_256, Self::EcdsaP256), (P_384, Self::EcdsaP384), (P_521, Self::EcdsaP521)];
            // RFC 5480 §2.2: uncompressed or compressed, never hybrid.
            if !matches!(key.first(), Some(2..=4)) {
                return None;
            }
            curves.into_iter().find(|(known, _)| *known == curve)?.1
        } else if oid == ED25519 && info.algorithm.parameters.is_none() {
            Self::Ed25519
        } else {
            return None;
        };
        Some((kind, key))
    }
}

/// The key id of strongSwan and of RFC 5280 §4.2.1.2 (1): SHA-1 over the subjectPublicKey.
pub(crate) fn key_id(public_key: &[u8]) -> [u8; 20] {
    Sha1::digest(public_key).into()
}

/// Says whether octets are a public key of this kind: numbers in range, a point on the curve.
pub(crate) fn is_valid(key_type: KeyType, public_key: &[u8]) -> bool {
    let algorithm: &'static dyn VerificationAlgorithm = match key_type {
        KeyType::Rsa => &signature::RSA_PKCS1_2048_8192_SHA256,
        KeyType::EcdsaP256 => &signature::ECDSA_P256_SHA256_ASN1,
        KeyType::EcdsaP384 => &signature::ECDSA_P384_SHA384_ASN1,
        KeyType::EcdsaP521 => &signature::ECDSA_P521_SHA512_ASN1,
        KeyType::Ed25519 => &signature::ED25519,
    };
    ParsedPublicKey::new(algorithm, public_key).is_ok()
}

/// Why an AUTH value is not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum VerifyError {
    /// The method or algorithm is unknown, forbidden, or not one of this key's.
    Method(&'static str),
    /// It does not verify.
    Signature,
}

/// Verifies an AUTH value over `octets` with a public key. Gives the scheme that it verified with; `None` is
/// PKCS#1 v1.5 with SHA-1 of method 1, which no constraint can name.
pub(crate) fn verify(
    method: AuthMethod,
    key_type: KeyType,
    public_key: &[u8],
    octets: &[u8],
    auth: &[u8],
) -> Result<Option<Scheme>, VerifyError> {
    type Candidate = (&'static dyn VerificationAlgorithm, Option<Scheme>);
    // RFC 7296 §3.8: SHA-1 is what peers without RFC 7427 sign with, but the hash is the signer's choice.
    const METHOD_1: [Candidate; 2] = [
        (&signature::RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, None),
        (&signature::RSA_PKCS1_2048_8192_SHA256, Some(Scheme::Pkcs1(Hash::Sha256))),
    ];
    let (candidates, value): (Vec<Candidate>, &[u8]) = match (method, key_type) {
        (AuthMethod::RSA, KeyType::Rsa) => (METHOD_1.to_vec(), auth),
        // RFC 4754 §3: each method is one curve with one hash.
        (AuthMethod::ECDSA_256, KeyType::EcdsaP256) => {
            (vec![(&signature::ECDSA_P256_SHA256_FIXED, Some(Scheme::Ecdsa(Hash::Sha256)))], auth)
        }
        (AuthMethod::ECDSA_384, KeyType::EcdsaP384) => {
            (vec![(&signature::ECDSA_P384_SHA384_FIXED, Some(Scheme::Ecdsa(Hash::Sha384)))], auth)
        }
        (AuthMethod::ECDSA_521, KeyType::EcdsaP521) => {
            (vec![(&signature::ECDSA_P521_SHA512_FIXED, Some(Scheme::Ecdsa(Hash::Sha512)))], auth)
        }
        (AuthMethod::DIGITAL_SIGNATURE, _) => {
            let (scheme, value) = digital_signature(auth).map_err(VerifyError::Method)?;
            let algorithm = scheme
                .verification_algorithm(key_type)
                .ok_or(VerifyError::Method("the signature algorithm does not fit the key"))?;
            (vec![(algorithm, Some(scheme))], value)
        }
        _ => return Err(VerifyError::Method("the method does not fit the key")),
    };
    let verifies = |algorithm| UnparsedPublicKey::new(algorithm, public_key).verify(octets, value).is_ok();
    let verified = candidates.into_iter().find(|(algorithm, _)| verifies(*algorithm));
    verified.map(|(_, scheme)| scheme).ok_or(VerifyError::Signature)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    /// IANA's "IKEv2 Hash Algorithms" (RFC 7427 §7).
    const fn id(self) -> u16 {
        match self {
            Self::Sha256 => 2,
            Self::Sha384 => 3,
            Self::Sha512 => 4,
        }
    }

    const fn length(self) -> u8 {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }
}

/// RFC 8420 §2: the "Identity" hash, for Ed25519.
const IDENTITY_HASH: u16 = 5;

/// A signature algorithm that an RFC 7427 AUTH value can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Pkcs1(Hash),
    Pss(Hash),
    Ecdsa(Hash),
    Ed25519,
}

impl Scheme {
    /// The scheme of a certificate's signature: its AlgorithmIdentifier in DER (RFC 5280 §4.1.1.2).
    pub(crate) fn of_certificate(algorithm: &[u8]) -> Option<Self> {
        let fields = elements(AnyRef::from_der(algorithm).ok()?, Tag::Sequence)?;
        let oid = fields.first()?.decode_as::<ObjectIdentifier>().ok()?;
        let known = [
            (SHA256_WITH_RSA_ENCRYPTION, Self::Pkcs1(Hash::Sha256)),
            (SHA384_WITH_RSA_ENCRYPTION, Self::Pkcs1(Hash::Sha384)),
            (SHA512_WITH_RSA_ENCRYPTION, Self::Pkcs1(Hash::Sha512)),
            (ECDSA_SHA256, Self::Ecdsa(Hash::Sha256)),
            (ECDSA_SHA384, Self::Ecdsa(Hash::Sha384)),
            (ECDSA_SHA512, Self::Ecdsa(Hash::Sha512)),
            (ED25519, Self::Ed25519),
        ];
        let fixed = known.into_iter().find(|(known, _)| *known == oid).map(|(_, scheme)| scheme);
        fixed.or_else(|| pss_hash(algorithm).map(Self::Pss))
    }

    /// Types of key that sign with it.
    pub(crate) fn key_types(self) -> &'static [KeyType] {
        match self {
            Self::Pkcs1(_) | Self::Pss(_) => &[KeyType::Rsa],
            Self::Ecdsa(_) => &[KeyType::EcdsaP256, KeyType::EcdsaP384, KeyType::EcdsaP521],
            Self::Ed25519 => &[KeyType::Ed25519],
        }
    }

    /// IANA's number of its hash (RFC 7427 §7, RFC 8420 §2).
    fn hash_id(self) -> u16 {
        match self {
            Self::Pkcs1(hash) | Self::Pss(hash) | Self::Ecdsa(hash) => hash.id(),
            Self::Ed25519 => IDENTITY_HASH,
        }
    }

    fn verification_algorithm(self, key: KeyType) -> Option<&'static dyn VerificationAlgorithm> {
        Some(match (self, key) {
            (Self::Pkcs1(Hash::Sha256), KeyType::Rsa) => &signature::RSA_PKCS1_2048_8192_SHA256,
            (Self::Pkcs1(Hash::Sha384), KeyType::Rsa) => &signature::RSA_PKCS1_2048_8192_SHA384,
            (Self::Pkcs1(Hash::Sha512), KeyType::Rsa) => &signature::RSA_PKCS1_2048_8192_SHA512,
            (Self::Pss(Hash::Sha256), KeyType::Rsa) => &signature::RSA_PSS_2048_8192_SHA256,
            (Self::Pss(Hash::Sha384), KeyType::Rsa) => &signature::RSA_PSS_2048_8192_SHA384,
            (Self::Pss(Hash::Sha512), KeyType::Rsa) => &signature::RSA_PSS_2048_8192_SHA512,
            (Self::Ecdsa(Hash::Sha256), KeyType::EcdsaP256) => &signature::ECDSA_P256_SHA256_ASN1,
            (Self::Ecdsa(Hash::Sha384), KeyType::EcdsaP256) => &signature::ECDSA_P256_SHA384_ASN1,
            (Self::Ecdsa(Hash::Sha512), KeyType::EcdsaP256) => &signature::ECDSA_P256_SHA512_ASN1,
            (Self::Ecdsa(Hash::Sha256), KeyType::EcdsaP384) => &signature::ECDSA_P384_SHA256_ASN1,
            (Self::Ecdsa(Hash::Sha384), KeyType::EcdsaP384) => &signature::ECDSA_P384_SHA384_ASN1,
            (Self::Ecdsa(Hash::Sha512), KeyType::EcdsaP384) => &signature::ECDSA_P384_SHA512_ASN1,
            (Self::Ecdsa(Hash::Sha256), KeyType::EcdsaP521) => &signature::ECDSA_P521_SHA256_ASN1,
            (Self::Ecdsa(Hash::Sha384), KeyType::EcdsaP521) => &signature::ECDSA_P521_SHA384_ASN1,
            (Self::Ecdsa(Hash::Sha512), KeyType::EcdsaP521) => &signature::ECDSA_P521_SHA512_ASN1,
            (Self::Ed25519, KeyType::Ed25519) => &signature::ED25519,
            (Self::Pkcs1(_) | Self::Pss(_) | Self::Ecdsa(_) | Self::Ed25519, _) => return None,
        })
    }

    pub(crate) fn algorithm_identifier(self) -> &'static [u8] {
        match self {
            Self::Pkcs1(Hash::Sha256) => SHA256_WITH_RSA,
            Self::Pkcs1(Hash::Sha384) => SHA384_WITH_RSA,
            Self::Pkcs1(Hash::Sha512) => SHA512_WITH_RSA,
            Self::Pss(Hash::Sha256) => PSS_SHA256,
            Self::Pss(Hash::Sha384) => PSS_SHA384,
            Self::Pss(Hash::Sha512) => PSS_SHA512,
            Self::Ecdsa(Hash::Sha256) => ECDSA_WITH_SHA256,
            Self::Ecdsa(Hash::Sha384) => ECDSA_WITH_SHA384,
            Self::Ecdsa(Hash::Sha512) => ECDSA_WITH_SHA512,
            Self::Ed25519 => ID_ED25519,
        }
    }
}

/// Splits an AUTH value of method 14 into algorithm and signature (RFC 7427 §3).
fn digital_signature(auth: &[u8]) -> Result<(Scheme, &[u8]), &'static str> {
    let (length, rest) = auth.split_first().ok_or("the AUTH value is empty")?;
    let (algorithm, value) = rest.split_at_checked(usize::from(*length)).ok_or("the AUTH value is truncated")?;
    let fixed = [
        Scheme::Pkcs1(Hash::Sha256),
        Scheme::Pkcs1(Hash::Sha384),
        Scheme::Pkcs1(Hash::Sha512),
        Scheme::Ecdsa(Hash::Sha256),
        Scheme::Ecdsa(Hash::Sha384),
        Scheme::Ecdsa(Hash::Sha512),
        Scheme::Ed25519,
    ];
    let scheme = match fixed.into_iter().find(|scheme| scheme.algorithm_identifier() == algorithm) {
        Some(scheme) => scheme,
        None => Scheme::Pss(pss_hash(algorithm).ok_or("the signature algorithm is unknown or forbidden")?),
    };
    Ok((scheme, value))
}

/// Reads an RSASSA-PSS AlgorithmIdentifier (RFC 4055 §3.1). One SHA-2 hash for the message and for MGF1, and a
/// salt as long as the hash: defaults mean SHA-1 and are refused, and the salt length is never a number
/// that is calculated with.
fn pss_hash(der: &[u8]) -> Option<Hash> {
    let [oid, parameters] = exactly(elements(AnyRef::from_der(der).ok()?, Tag::Sequence)?)?;
    if oid.decode_as::<ObjectIdentifier>().ok()? != RSASSA_PSS {
        return None;
    }
    let mut parameters = elements(parameters, Tag::Sequence)?;
    let integer = |element: AnyRef<'_>, expected: u8| {
        element.decode_as::<u8>().ok().is_some_and(|value| value == expected).then_some(())
    };
    if parameters.len() == 4 {
        let [trailer] = exactly(elements(parameters.pop()?, explicit(3))?)?;
        integer(trailer, 1)?;
    }
    let [hash, mask, salt] = exactly(parameters)?;
    let [hash] = exactly(elements(hash, explicit(0))?)?;
    let hash = hash_algorithm(hash)?;
    let [mask] = exactly(elements(mask, explicit(1))?)?;
    let [mask, mask_hash] = exactly(elements(mask, Tag::Sequence)?)?;
    if mask.decode_as::<ObjectIdentifier>().ok()? != MGF1 || hash_algorithm(mask_hash)? != hash {
        return None;
    }
    let [salt] = exactly(elements(salt, explicit(2))?)?;
    integer(salt, hash.length())?;
    Some(hash)
}

fn hash_algorithm(algorithm: AnyRef<'_>) -> Option<Hash> {
    let fields = elements(algorithm, Tag::Sequence)?;
    // RFC 4055 §2.1: both absent parameters and NULL must be accepted.
    let oid = match fields.as_slice() {
        [oid] => oid,
        [oid, null] if null.is_null() => oid,
        _ => return None,
    };
    let oid = oid.decode_as::<ObjectIdentifier>().ok()?;
    [(SHA_256, Hash::Sha256), (SHA_384, Hash::Sha384), (SHA_512, Hash::Sha512)]
        .into_iter()
        .find(|(known, _)| *known == oid)
        .map(|(_, hash)| hash)
}

const fn explicit(number: u32) -> Tag {
    Tag::ContextSpecific { constructed: true, number: TagNumber(number) }
}

fn exactly<const N: usize>(elements: Vec<AnyRef<'_>>) -> Option<[AnyRef<'_>; N]> {
    elements.try_into().ok()
}

/// A private key of ours.
pub(crate) struct PrivateKey {
    key_type: KeyType,
    public_key: Vec<u8>,
    signer: Signer,
}

enum Signer {
    Rsa(RsaKeyPair),
    // aws-lc binds the encoding of the signature to the key.
    Ecdsa { asn1: EcdsaKeyPair, fixed: EcdsaKeyPair },
    Ed25519(Ed25519KeyPair),
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({:?} {})", self.key_type, data_encoding::HEXLOWER.encode(&key_id(&self.public_key)))
    }
}

impl PrivateKey {
    /// Reads an unencrypted key: PKCS#8, PKCS#1 or SEC1 in DER.
    pub(crate) fn from_der(der: &[u8]) -> Option<Self> {
        if let Ok(pair) = RsaKeyPair::from_pkcs8(der).or_else(|_| RsaKeyPair::from_der(der)) {
            let public_key = pair.public_key().as_ref().to_vec();
            return (pair.public_modulus_len() >= 256).then_some(Self {
                key_type: KeyType::Rsa,
                public_key,
                signer: Signer::Rsa(pair),
            });
        }
        if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
            let public_key = pair.public_key().as_ref().to_vec();
            return Some(Self { key_type: KeyType::Ed25519, public_key, signer: Signer::Ed25519(pair) });
        }
        let curves: [(KeyType, &'static EcdsaSigningAlgorithm, &'static EcdsaSigningAlgorithm); 3] = [
            (
                KeyType::EcdsaP256,
                &signature::ECDSA_P256_SHA256_ASN1_SIGNING,
                &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
            ),
            (
                KeyType::EcdsaP384,
                &signature::ECDSA_P384_SHA384_ASN1_SIGNING,
                &signature::ECDSA_P384_SHA384_FIXED_SIGNING,
            ),
            (
                KeyType::EcdsaP521,
                &signature::ECDSA_P521_SHA512_ASN1_SIGNING,
                &signature::ECDSA_P521_SHA512_FIXED_SIGNING,
            ),
        ];
        curves.into_iter().find_map(|(key_type, asn1, fixed)| {
            let asn1 = EcdsaKeyPair::from_private_key_der(asn1, der).ok()?;
            let fixed = EcdsaKeyPair::from_private_key_der(fixed, der).ok()?;
            let public_key = asn1.public_key().as_ref().to_vec();
            Some(Self { key_type, public_key, signer: Signer::Ecdsa { asn1, fixed } })
        })
    }

    pub(crate) fn key_type(&self) -> KeyType {
        self.key_type
    }

    /// The subjectPublicKey that belongs to it.
    pub(crate) fn public_key(&self) -> &[u8] {
        &self.public_key
    }

    /// The ways in which it can sign for a peer, the preferred first: with method 14 and a hash that the peer
    /// announced, else with the key's own method (RFC 7427 §4). Without constraints the hash is as strong as the key,
    /// where the peer knows it.
    pub(crate) fn ways(
        &self,
        peer_hashes: Option<&[u16]>,
        constraints: &SignatureConstraints,
        settings: SignatureSettings,
    ) -> Vec<Way> {
        let announced = |scheme: &Scheme| peer_hashes.is_some_and(|hashes| hashes.contains(&scheme.hash_id()));
        let can = self.schemes(settings);
        let schemes = match constraints.auth_schemes(settings) {
            Some(asked) => asked.into_iter().filter(|scheme| can.contains(scheme)).collect(),
            None => can,
        };
        let classic = match self.key_type {
            KeyType::EcdsaP256 => Some((AuthMethod::ECDSA_256, Scheme::Ecdsa(Hash::Sha256))),
            KeyType::EcdsaP384 => Some((AuthMethod::ECDSA_384, Scheme::Ecdsa(Hash::Sha384))),
            KeyType::EcdsaP521 => Some((AuthMethod::ECDSA_521, Scheme::Ecdsa(Hash::Sha512))),
            // RSA's own method would mean SHA-1.
            KeyType::Rsa | KeyType::Ed25519 => None,
        };
        let classic = classic.filter(|(_, scheme)| schemes.contains(scheme)).map(|(method, _)| Way::Own(method));
        schemes.into_iter().filter(announced).map(Way::Digital).chain(classic).collect()
    }

    /// Schemes that the key has, in the order in which it takes them by itself.
    fn schemes(&self, settings: SignatureSettings) -> Vec<Scheme> {
        match &self.signer {
            Signer::Rsa(pair) => {
                // NIST SP 800-57's strengths: 3072 bits equal 128, 7680 bits equal 192.
                let hashes = match pair.public_modulus_len() {
                    0..=384 => [Hash::Sha256, Hash::Sha384, Hash::Sha512],
                    385..=960 => [Hash::Sha384, Hash::Sha512, Hash::Sha256],
                    _ => [Hash::Sha512, Hash::Sha384, Hash::Sha256],
                };
                let (pss, pkcs1) = (hashes.map(Scheme::Pss), hashes.map(Scheme::Pkcs1));
                if settings.rsa_pss { [pss, pkcs1].concat() } else { [pkcs1, pss].concat() }
            }
            // The library binds each curve to one hash.
            Signer::Ecdsa { .. } => vec![Scheme::Ecdsa(match self.key_type {
                KeyType::EcdsaP384 => Hash::Sha384,
                KeyType::EcdsaP521 => Hash::Sha512,
                KeyType::EcdsaP256 | KeyType::Rsa | KeyType::Ed25519 => Hash::Sha256,
            })],
            Signer::Ed25519(_) => vec![Scheme::Ed25519],
        }
    }

    /// Signs `octets` in one of the key's [`Self::ways`].
    pub(crate) fn sign(&self, octets: &[u8], way: Way) -> Result<(AuthMethod, Vec<u8>), &'static str> {
        const REFUSED: &str = "the key could not sign";
        let ecdsa = |pair: &EcdsaKeyPair| pair.sign(&SystemRandom::new(), octets).map_err(|_| REFUSED);
        match (&self.signer, way) {
            (Signer::Rsa(pair), Way::Digital(scheme)) => {
                let encoding: &'static dyn RsaEncoding = match scheme {
                    Scheme::Pkcs1(Hash::Sha256) => &signature::RSA_PKCS1_SHA256,
                    Scheme::Pkcs1(Hash::Sha384) => &signature::RSA_PKCS1_SHA384,
                    Scheme::Pkcs1(Hash::Sha512) => &signature::RSA_PKCS1_SHA512,
                    Scheme::Pss(Hash::Sha256) => &signature::RSA_PSS_SHA256,
                    Scheme::Pss(Hash::Sha384) => &signature::RSA_PSS_SHA384,
                    Scheme::Pss(Hash::Sha512) => &signature::RSA_PSS_SHA512,
                    Scheme::Ecdsa(_) | Scheme::Ed25519 => return Err(REFUSED),
                };
                let mut value = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &SystemRandom::new(), octets, &mut value).map_err(|_| REFUSED)?;
                digital_signature_auth(scheme, &value)
            }
            (Signer::Ecdsa { asn1, .. }, Way::Digital(scheme)) => digital_signature_auth(scheme, ecdsa(asn1)?.as_ref()),
            (Signer::Ecdsa { fixed, .. }, Way::Own(method)) => Ok((method, ecdsa(fixed)?.as_ref().to_vec())),
            (Signer::Ed25519(pair), Way::Digital(scheme)) => {
                digital_signature_auth(scheme, pair.try_sign(octets).map_err(|_| REFUSED)?.as_ref())
            }
            (Signer::Rsa(_) | Signer::Ed25519(_), Way::Own(_)) => Err(REFUSED),
        }
    }
}

/// How a key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// With method 14.
    Digital(Scheme),
    /// With the key's own method.
    Own(AuthMethod),
}

impl Way {
    /// Says whether an announcement (RFC 9593) is about this way.
    pub(crate) fn is_announced_by(self, announcement: &AuthAnnouncement) -> bool {
        match self {
            Self::Digital(scheme) => {
                announcement.method == AuthMethod::DIGITAL_SIGNATURE
                    && (announcement.algorithm.is_empty()
                        || announcement.algorithm == scheme.algorithm_identifier()
                        || Scheme::of_certificate(&announcement.algorithm) == Some(scheme))
            }
            Self::Own(method) => announcement.method == method,
        }
    }
}

fn digital_signature_auth(scheme: Scheme, value: &[u8]) -> Result<(AuthMethod, Vec<u8>), &'static str> {
    let algorithm = scheme.algorithm_identifier();
    let length = u8::try_from(algorithm.len()).map_err(|_| "the algorithm identifier is too long")?;
    Ok((AuthMethod::DIGITAL_SIGNATURE, [&[length], algorithm, value].concat()))
}

const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const MGF1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.8");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P_384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const P_521: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.35");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
const SHA256_WITH_RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");
const SHA384_WITH_RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12");
const SHA512_WITH_RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13");
const ECDSA_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
const ECDSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const ECDSA_SHA512: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.4");
const SHA_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");
const SHA_384: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.2");
const SHA_512: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.3");

// AlgorithmIdentifiers of RFC 7427 appendix A and RFC 8420 appendix A.
const SHA256_WITH_RSA: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\x00";
const SHA384_WITH_RSA: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0c\x05\x00";
const SHA512_WITH_RSA: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0d\x05\x00";
const ECDSA_WITH_SHA256: &[u8] = b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
const ECDSA_WITH_SHA384: &[u8] = b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03";
const ECDSA_WITH_SHA512: &[u8] = b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x04";
const ID_ED25519: &[u8] = b"\x30\x05\x06\x03\x2b\x65\x70";
// The trailer field is left out: it has its default value, which DER forbids to encode (X.690 §11.5).
const PSS_SHA256: &[u8] =
    b"\x30\x41\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a\x30\x34\xa0\x0f\x30\x0d\x06\x09\x60\x86\
    \x48\x01\x65\x03\x04\x02\x01\x05\x00\xa1\x1c\x30\x1a\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08\x30\x0d\x06\x09\
    \x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\xa2\x03\x02\x01\x20";
const PSS_SHA384: &[u8] =
    b"\x30\x41\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a\x30\x34\xa0\x0f\x30\x0d\x06\x09\x60\x86\
    \x48\x01\x65\x03\x04\x02\x02\x05\x00\xa1\x1c\x30\x1a\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08\x30\x0d\x06\x09\
    \x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\xa2\x03\x02\x01\x30";
const PSS_SHA512: &[u8] =
    b"\x30\x41\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a\x30\x34\xa0\x0f\x30\x0d\x06\x09\x60\x86\
    \x48\x01\x65\x03\x04\x02\x03\x05\x00\xa1\x1c\x30\x1a\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08\x30\x0d\x06\x09\
    \x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\xa2\x03\x02\x01\x40";

#[cfg(test)]
mod tests;
