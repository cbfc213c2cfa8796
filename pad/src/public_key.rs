//! Raw public keys (RFC 7670): a SubjectPublicKeyInfo without a certificate around it. Nobody vouches for one but the
//! configuration that names it.

use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::{PemObject, SectionKind};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use x509_parser::prelude::{FromDer, SubjectPublicKeyInfo};

use crate::identity::Identity;
use crate::signature::{self, KeyType};

/// Largest key that is read, in octets: RSA of 8192 bits has little more than 1 KiB.
const MAX_SIZE: usize = 4096;

/// Why octets are not a public key that we can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublicKeyError {
    /// Another kind of file.
    #[error("not a public key: it is {0}")]
    Other(&'static str),
    /// Truncated, or with something after it, or no such structure at all.
    #[error("not a SubjectPublicKeyInfo in DER or PEM (PUBLIC KEY)")]
    Malformed,
    /// An algorithm, curve or form that signatures here do not know.
    #[error("a public key of a kind that is not served: {0}")]
    Kind(String),
    /// The octets of the key are no key of its algorithm.
    #[error("not a valid public key of its algorithm: {0}")]
    Invalid(&'static str),
}

/// A public key, valid and in its one DER form; nothing is said about whether to trust it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey {
    der: Vec<u8>,
    key_type: KeyType,
    subject_public_key: Vec<u8>,
    bits: usize,
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PublicKey({:?} {})", self.key_type, self.key_id())
    }
}

impl PublicKey {
    /// Reads a SubjectPublicKeyInfo, DER or PEM. Of the forms that a key may have there only the one that its RFC prescribes
    /// is taken: two ends that hash it must have the same octets.
    ///
    /// # Errors
    /// What the octets are instead, or what is wrong with them.
    pub fn parse(data: &[u8]) -> Result<Self, PublicKeyError> {
        // A SubjectPublicKeyInfo is a SEQUENCE; PEM begins with a dash or with text.
        if data.first() == Some(&0x30) {
            return Self::from_der(data);
        }
        let mut sections = <(SectionKind, Vec<u8>)>::pem_slice_iter(data);
        let (kind, _) = sections.next().and_then(Result::ok).ok_or(PublicKeyError::Malformed)?;
        match kind {
            SectionKind::PublicKey => {}
            SectionKind::Certificate => return Err(PublicKeyError::Other("a certificate; name it in 'certs'")),
            SectionKind::RsaPrivateKey | SectionKind::PrivateKey | SectionKind::EcPrivateKey => {
                return Err(PublicKeyError::Other("a private key, which belongs into 'private' alone"));
            }
            _ => return Err(PublicKeyError::Malformed),
        }
        let der = SubjectPublicKeyInfoDer::from_pem_slice(data).map_err(|_| PublicKeyError::Malformed)?;
        Self::from_der(&der)
    }

    /// Reads one in DER, with nothing after it.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn from_der(der: &[u8]) -> Result<Self, PublicKeyError> {
        if der.len() > MAX_SIZE {
            return Err(PublicKeyError::Malformed);
        }
        let (rest, info) = SubjectPublicKeyInfo::from_der(der).map_err(|_| PublicKeyError::Malformed)?;
        if !rest.is_empty() || info.subject_public_key.unused_bits != 0 {
            return Err(PublicKeyError::Malformed);
        }
        let unknown = || PublicKeyError::Kind(format!("algorithm {}", info.algorithm.algorithm));
        let (key_type, subject_public_key) = KeyType::of_public_key_info(der).ok_or_else(unknown)?;
        match key_type {
            // RFC 4055 §1.2.
            KeyType::Rsa if !info.algorithm.parameters.as_ref().is_some_and(is_null) => {
                return Err(PublicKeyError::Invalid("the parameters of rsaEncryption are not NULL"));
            }
            // RFC 5480 §2.2.
            KeyType::EcdsaP256 | KeyType::EcdsaP384 | KeyType::EcdsaP521 if subject_public_key.first() != Some(&4) => {
                return Err(PublicKeyError::Kind("a compressed point; write it uncompressed".to_owned()));
            }
            _ => {}
        }
        let bits = info.parsed().map(|key| key.key_size()).unwrap_or_default();
        if key_type == KeyType::Rsa && !(2048..=8192).contains(&bits) {
            return Err(PublicKeyError::Kind(format!("RSA of {bits} bits, where 2048 to 8192 are taken")));
        }
        if !signature::is_valid(key_type, &subject_public_key) {
            return Err(PublicKeyError::Invalid("its numbers are out of range, or no point of the curve"));
        }
        Ok(Self { der: der.to_vec(), key_type, subject_public_key, bits })
    }

    /// The SubjectPublicKeyInfo in DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Its kind.
    pub fn key_type(&self) -> KeyType {
        self.key_type
    }

    /// Its size in bits.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// SHA-1 of the subjectPublicKey in hexadecimal, as [`Certificate::key_id`](crate::Certificate::key_id).
    pub fn key_id(&self) -> String {
        data_encoding::HEXLOWER.encode(&signature::key_id(&self.subject_public_key))
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.der).into()
    }

    /// The identity of its holder where no other is configured, as strongSwan has it: ID_KEY_ID with the SHA-1 of the
    /// SubjectPublicKeyInfo.
    pub fn identity(&self) -> Identity {
        Identity::KeyId(Sha1::digest(&self.der).to_vec())
    }

    /// Says whether an identity is a name for this very key: ID_KEY_ID with the SHA-1 of the subjectPublicKey or of the
    /// whole SubjectPublicKeyInfo.
    pub fn is_named_by(&self, identity: &Identity) -> bool {
        let of_info: [u8; 20] = Sha1::digest(&self.der).into();
        let of_key = signature::key_id(&self.subject_public_key);
        matches!(identity, Identity::KeyId(id) if *id == of_key || *id == of_info)
    }

    pub(crate) fn subject_public_key(&self) -> &[u8] {
        &self.subject_public_key
    }
}

fn is_null(parameters: &x509_parser::asn1_rs::Any<'_>) -> bool {
    parameters.tag() == x509_parser::asn1_rs::Tag::Null && parameters.data.is_empty()
}

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER_PERMISSIVE;
    use proptest::prelude::*;
    use rcgen::{KeyPair, PublicKeyData};

    use super::*;

    /// RFC 7670 appendix A.1.
    const ECDSA_EXAMPLE: &str = "3059301306072a8648ce3d020106082a8648ce3d03010703420004cb28e0999b9c7715fd0a80d8e47a7707\
                                 9716cbbf917dd72e97566ea1c066957c2b57c0235fb7489768d058ff4911c20fdbe71e3699d91339afbb903e\
                                 e17255dc";

    fn example() -> Vec<u8> {
        HEXLOWER_PERMISSIVE.decode(ECDSA_EXAMPLE.as_bytes()).unwrap()
    }

    fn keys() -> Vec<(KeyPair, KeyType)> {
        let key = |algorithm, kind| (KeyPair::generate_for(algorithm).unwrap(), kind);
        vec![
            key(&rcgen::PKCS_ECDSA_P256_SHA256, KeyType::EcdsaP256),
            key(&rcgen::PKCS_ECDSA_P384_SHA384, KeyType::EcdsaP384),
            key(&rcgen::PKCS_ECDSA_P521_SHA512, KeyType::EcdsaP521),
            key(&rcgen::PKCS_ED25519, KeyType::Ed25519),
            key(&rcgen::PKCS_RSA_SHA256, KeyType::Rsa),
        ]
    }

    // RFC 7670 §3.
    #[test]
    fn what_is_not_one_whole_key_is_refused_with_the_reason() {
        let whole = example();
        for length in 0..whole.len() {
            assert_eq!(PublicKey::parse(&whole[..length]), Err(PublicKeyError::Malformed), "{length}");
        }
        assert_eq!(PublicKey::parse(&[&whole[..], &[0]].concat()), Err(PublicKeyError::Malformed));
        assert_eq!(PublicKey::parse(&[0x30; MAX_SIZE + 1]), Err(PublicKeyError::Malformed));
        let last = whole.len() - 1;
        for (at, value, message) in [
            // Not on the curve, hybrid, with unused bits, on an unknown curve.
            (last, 0xdd, "no point of the curve"),
            (26, 6, "algorithm 1.2.840.10045.2.1"),
            (25, 1, "not a SubjectPublicKeyInfo"),
            (22, 9, "algorithm 1.2.840.10045.2.1"),
        ] {
            let mut der = whole.clone();
            der[at] = value;
            let error = PublicKey::parse(&der).unwrap_err().to_string();
            assert!(error.contains(message), "{message}: {error}");
        }
        let mut compressed = whole[..59].to_vec();
        (compressed[1], compressed[24], compressed[26]) = (57, 34, 2);
        assert!(PublicKey::parse(&compressed).unwrap_err().to_string().contains("compressed"));
        let x25519 = [&[0x30, 42, 0x30, 5, 6, 3, 0x2b, 0x65, 0x6e, 3, 33, 0][..], &[9; 32]].concat();
        assert!(PublicKey::parse(&x25519).unwrap_err().to_string().contains("algorithm 1.3.101.110"));
        let short = [&[0x30, 41, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 32, 0][..], &[9; 31]].concat();
        assert!(matches!(PublicKey::parse(&short), Err(PublicKeyError::Invalid(_))));
    }

    #[test]
    fn other_files_are_called_what_they_are() {
        let (key, _) = &keys()[0];
        let certificate = rcgen::CertificateParams::default().self_signed(key).unwrap();
        for (text, message) in [
            (certificate.pem(), "it is a certificate"),
            (key.serialize_pem(), "it is a private key"),
            ("-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n".to_owned(), "not a SubjectPublicKeyInfo"),
            ("ssh-ed25519 AAAA".to_owned(), "not a SubjectPublicKeyInfo"),
            (String::new(), "not a SubjectPublicKeyInfo"),
        ] {
            let error = PublicKey::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(message), "{message}: {error}");
        }
        // DER does not say what it is.
        assert_eq!(PublicKey::parse(certificate.der()), Err(PublicKeyError::Malformed));
    }

    // RFC 4055 §1.2: weak RSA keys, and those that are not written as they have to be. RSASSA-PSS keys are not served.
    #[test]
    fn rsa_keys_have_null_parameters_and_2048_bits_at_least() {
        let (key, _) = keys().pop().unwrap();
        let der = key.subject_public_key_info();
        let whole = PublicKey::parse(&der).unwrap();
        assert_eq!((whole.key_type(), whole.bits()), (KeyType::Rsa, 2048));
        let null = der.windows(2).position(|two| two == [5, 0]).unwrap();
        let mut absent = der.clone();
        absent.drain(null..null + 2);
        absent[5] -= 2;
        absent[3] = absent[3].wrapping_sub(2);
        assert!(PublicKey::parse(&absent).unwrap_err().to_string().contains("NULL"));
        let mut pss = der.clone();
        pss[null - 1] = 10;
        assert!(PublicKey::parse(&pss).unwrap_err().to_string().contains("algorithm 1.2.840.113549.1.1.10"));
        // RFC 7670 appendix A.2 has a key of 1024 bits.
        let weak = [
            &[0x30, 0x81, 0x9f, 0x30, 13, 6, 9][..],
            b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00",
            &[3, 0x81, 0x8d, 0, 0x30, 0x81, 0x89, 2, 0x81, 0x81, 0, 0xbc],
            &[0x7b; 127],
            &[2, 3, 1, 0, 1],
        ]
        .concat();
        assert!(PublicKey::parse(&weak).unwrap_err().to_string().contains("RSA of 1024 bits"));
    }

    #[test]
    fn keys_of_all_kinds_are_read_from_pem_and_der() {
        for (key, kind) in keys() {
            let (der, pem) = (key.subject_public_key_info(), key.public_key_pem());
            let read = PublicKey::parse(pem.as_bytes()).unwrap();
            assert_eq!(PublicKey::parse(&der).as_ref(), Ok(&read));
            assert_eq!((read.der(), read.key_type()), (&der[..], kind));
            assert!(read.is_named_by(&read.identity()));
            let of_key = data_encoding::HEXLOWER.decode(read.key_id().as_bytes()).unwrap();
            assert!(read.is_named_by(&Identity::KeyId(of_key)));
            assert!(!read.is_named_by(&Identity::KeyId(Vec::new())));
            assert!(!read.is_named_by(&Identity::parse("a.example").unwrap()));
        }
        let (read, other) = (PublicKey::parse(&example()).unwrap(), keys().swap_remove(0).0);
        assert_eq!(read.bits(), 256);
        assert!(!read.is_named_by(&PublicKey::parse(&other.subject_public_key_info()).unwrap().identity()));
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_is_read_is_what_was_given(at in 0usize..91, value: u8, cut in 0usize..91) {
            let mut der = example();
            der[at] = value;
            der.truncate(der.len() - cut.min(1));
            if let Ok(key) = PublicKey::parse(&der) {
                prop_assert_eq!(key.der(), &der[..]);
            }
        }
    }
}
