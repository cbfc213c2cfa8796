//! What `auth = rsa-3072-sha256`, `ecdsa-384`, `ike:rsa/pss-sha512` … of swanctl.conf asks of keys and signatures.
//!
//! A constraint is a key type (`pubkey` for any, `rsa`, `rsa/pss`, `ecdsa`, `ed25519`), then for RSA and ECDSA
//! perhaps the least strength in bits, then perhaps hashes; several follow each other with dashes. Hashes behind
//! a type that begins with `ike:` are about the signature in AUTH alone, all others are about the certificates'
//! and, unless there are such, about AUTH too.

use crate::signature::{Hash, KeyType, Scheme};

/// What the daemon's settings say about signatures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignatureSettings {
    /// `charon.rsa_pss`: RSA signs with RSASSA-PSS by default, and constraints that say `rsa` or `pubkey` admit it.
    pub rsa_pss: bool,
    /// `charon.signature_authentication_constraints`: constraints without `ike:` hold for AUTH too.
    pub constraints_for_auth: bool,
}

impl Default for SignatureSettings {
    /// charon's defaults.
    fn default() -> Self {
        Self { rsa_pss: false, constraints_for_auth: true }
    }
}

/// Constraints on public keys, certificates' signatures and AUTH; the default admits all that we can verify.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SignatureConstraints {
    keys: Vec<KeyRule>,
    /// `pubkey` is among the types.
    any_family: bool,
    chain: Vec<SchemeRule>,
    auth: Vec<SchemeRule>,
}

/// Why a text is not a constraint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// It does not begin with a type of key.
    #[error("'{0}' is not a type of key; write pubkey, rsa, rsa/pss, ecdsa or ed25519")]
    KeyType(String),
    /// Neither a hash nor a strength in bits nor a type of key.
    #[error("'{0}' is neither a hash (sha256, sha384, sha512, identity) nor a strength in bits nor a type of key")]
    Token(String),
    /// It is never accepted, whatever the configuration says.
    #[error("signatures with {0} are never accepted")]
    WeakHash(String),
    /// The type of key has no such hash.
    #[error("{key} keys do not sign with {hash}")]
    HashOfKey {
        /// Type of key.
        key: String,
        /// Hash.
        hash: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Rsa,
    Ecdsa,
    Ed25519,
}

impl Family {
    fn of(key: KeyType) -> Self {
        match key {
            KeyType::Rsa => Self::Rsa,
            KeyType::EcdsaP256 | KeyType::EcdsaP384 | KeyType::EcdsaP521 => Self::Ecdsa,
            KeyType::Ed25519 => Self::Ed25519,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KeyRule {
    family: Family,
    bits: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SchemeRule {
    /// PKCS#1 v1.5, and PSS where the settings say so.
    Rsa(Hash),
    Pss(Hash),
    Ecdsa(Hash),
    Ed25519,
}

impl SchemeRule {
    /// The schemes that it admits, the preferred first.
    fn schemes(self, settings: SignatureSettings) -> Vec<Scheme> {
        match self {
            Self::Rsa(hash) if settings.rsa_pss => vec![Scheme::Pss(hash), Scheme::Pkcs1(hash)],
            Self::Rsa(hash) => vec![Scheme::Pkcs1(hash)],
            Self::Pss(hash) => vec![Scheme::Pss(hash)],
            Self::Ecdsa(hash) => vec![Scheme::Ecdsa(hash)],
            Self::Ed25519 => vec![Scheme::Ed25519],
        }
    }
}

/// The type of key that the tokens after it are about.
#[derive(Clone, Copy)]
struct Subject<'a> {
    /// As written, without `ike:`.
    name: &'a str,
    for_auth: bool,
    family: Option<Family>,
    pss: bool,
}

impl<'a> Subject<'a> {
    fn parse(token: &'a str) -> Option<Self> {
        let (for_auth, name) = token.strip_prefix("ike:").map_or((false, token), |rest| (true, rest));
        let (family, pss) = match name {
            "pubkey" => (None, false),
            "rsa" => (Some(Family::Rsa), false),
            "rsa/pss" => (Some(Family::Rsa), true),
            "ecdsa" => (Some(Family::Ecdsa), false),
            "ed25519" => (Some(Family::Ed25519), false),
            _ => return None,
        };
        Some(Self { name, for_auth, family, pss })
    }

    fn rules(&self, hash: &str) -> Result<Vec<SchemeRule>, ConstraintError> {
        let known = match hash {
            "sha256" => Some(Hash::Sha256),
            "sha384" => Some(Hash::Sha384),
            "sha512" => Some(Hash::Sha512),
            "identity" => None,
            "md5" | "sha1" | "sha224" => return Err(ConstraintError::WeakHash(hash.to_owned())),
            _ => return Err(ConstraintError::Token(hash.to_owned())),
        };
        match (known, self.family) {
            (Some(hash), Some(Family::Rsa)) if self.pss => Ok(vec![SchemeRule::Pss(hash)]),
            (Some(hash), Some(Family::Rsa)) => Ok(vec![SchemeRule::Rsa(hash)]),
            (Some(hash), Some(Family::Ecdsa)) => Ok(vec![SchemeRule::Ecdsa(hash)]),
            (Some(hash), None) => Ok(vec![SchemeRule::Rsa(hash), SchemeRule::Ecdsa(hash)]),
            (None, Some(Family::Ed25519) | None) => Ok(vec![SchemeRule::Ed25519]),
            (Some(_), Some(Family::Ed25519)) | (None, Some(Family::Rsa | Family::Ecdsa)) => {
                Err(ConstraintError::HashOfKey { key: self.name.to_owned(), hash: hash.to_owned() })
            }
        }
    }
}

impl SignatureConstraints {
    /// Reads a constraint such as `rsa-3072-sha256-ecdsa-256-sha256-sha384` or `ike:pubkey-sha384`; `pubkey` alone
    /// asks for nothing.
    ///
    /// A strength is asked of all keys of the chain, and with it their types are; types alone are about the key that
    /// makes the signature in AUTH.
    ///
    /// # Errors
    /// What charon ignores with a line in its log is an error: a constraint that is not in force is worse than none.
    pub fn parse(text: &str) -> Result<Self, ConstraintError> {
        let mut constraints = Self::default();
        let mut subject: Option<Subject<'_>> = None;
        let mut may_be_strength = false;
        for token in text.split('-') {
            if let Some(next) = Subject::parse(token) {
                match next.family {
                    Some(family) => constraints.keys.push(KeyRule { family, bits: 0 }),
                    None => constraints.any_family = true,
                }
                may_be_strength = matches!(next.family, Some(Family::Rsa | Family::Ecdsa));
                subject = Some(next);
                continue;
            }
            let Some(subject) = subject else { return Err(ConstraintError::KeyType(token.to_owned())) };
            let strength = token.parse::<usize>().ok().filter(|_| may_be_strength);
            may_be_strength = false;
            if let Some((bits, rule)) = strength.zip(constraints.keys.last_mut()) {
                rule.bits = bits;
                continue;
            }
            let rules = subject.rules(token)?;
            if subject.for_auth { &mut constraints.auth } else { &mut constraints.chain }.extend(rules);
        }
        Ok(constraints)
    }

    /// True when nothing is asked of the keys of the chain.
    pub(crate) fn admits_every_key(&self) -> bool {
        self.keys.iter().all(|rule| rule.bits == 0)
    }

    /// Says whether a public key may sign in AUTH.
    pub(crate) fn admits_signer(&self, key: KeyType, bits: usize) -> bool {
        let family = Family::of(key);
        let named = self.any_family || self.keys.is_empty() || self.keys.iter().any(|rule| rule.family == family);
        named && self.admits_key(key, bits)
    }

    /// Says whether a public key of the chain is of a type and strength that is asked for.
    pub(crate) fn admits_key(&self, key: KeyType, bits: usize) -> bool {
        let family = Family::of(key);
        let bits = match key {
            KeyType::Rsa => bits,
            KeyType::EcdsaP256 | KeyType::Ed25519 => 256,
            KeyType::EcdsaP384 => 384,
            KeyType::EcdsaP521 => 521,
        };
        self.admits_every_key() || self.keys.iter().any(|rule| rule.family == family && rule.bits <= bits)
    }

    /// Says whether a certificate in the chain may be signed like this; `None` is an algorithm that we cannot name.
    pub(crate) fn admits_certificate(&self, scheme: Option<Scheme>, settings: SignatureSettings) -> bool {
        admits(&self.chain, scheme, settings)
    }

    /// Says whether AUTH may be signed like this; `None` is an algorithm without name, RSA with SHA-1 of method 1.
    pub(crate) fn admits_auth(&self, scheme: Option<Scheme>, settings: SignatureSettings) -> bool {
        admits(self.auth_rules(settings), scheme, settings)
    }

    /// Schemes for AUTH in order of preference; `None` if nothing is asked for.
    pub(crate) fn auth_schemes(&self, settings: SignatureSettings) -> Option<Vec<Scheme>> {
        let rules = self.auth_rules(settings);
        (!rules.is_empty()).then(|| rules.iter().flat_map(|rule| rule.schemes(settings)).collect())
    }

    fn auth_rules(&self, settings: SignatureSettings) -> &[SchemeRule] {
        if self.auth.is_empty() && settings.constraints_for_auth { &self.chain } else { &self.auth }
    }
}

fn admits(rules: &[SchemeRule], scheme: Option<Scheme>, settings: SignatureSettings) -> bool {
    let named = |scheme: Scheme| rules.iter().any(|rule| rule.schemes(settings).contains(&scheme));
    rules.is_empty() || scheme.is_some_and(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: SignatureSettings = SignatureSettings { rsa_pss: false, constraints_for_auth: true };
    const WITH_PSS: SignatureSettings = SignatureSettings { rsa_pss: true, constraints_for_auth: true };
    const CHAIN_ONLY: SignatureSettings = SignatureSettings { rsa_pss: false, constraints_for_auth: false };

    fn parse(text: &str) -> SignatureConstraints {
        SignatureConstraints::parse(text).unwrap()
    }

    #[test]
    fn what_cannot_be_enforced_is_an_error() {
        for (text, message) in [
            ("", "'' is not a type of key"),
            ("sha256", "'sha256' is not a type of key"),
            ("rsa-2048-", "'' is neither a hash"),
            ("rsa-sha257", "'sha257' is neither a hash"),
            ("rsa-2048-3072", "'3072' is neither a hash"),
            ("pubkey-2048", "'2048' is neither a hash"),
            ("ed25519-256", "'256' is neither a hash"),
            ("rsa-sha1", "signatures with sha1 are never accepted"),
            ("rsa-identity", "rsa keys do not sign with identity"),
            ("ed25519-sha256", "ed25519 keys do not sign with sha256"),
            ("ike:ike:rsa", "'ike:ike:rsa' is not a type of key"),
            ("dsa-1024", "'dsa' is not a type of key"),
        ] {
            let error = SignatureConstraints::parse(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
        for text in ["pubkey", "ike:pubkey"] {
            assert!(parse(text).admits_signer(KeyType::Ed25519, 0) && parse(text).admits_auth(None, PLAIN));
        }
    }

    #[test]
    fn strengths_count_for_their_type_and_exclude_other_types() {
        let constraints = parse("rsa-3072-ecdsa-384");
        assert!(constraints.admits_key(KeyType::Rsa, 3072) && !constraints.admits_key(KeyType::Rsa, 2048));
        assert!(constraints.admits_key(KeyType::EcdsaP384, 0) && constraints.admits_key(KeyType::EcdsaP521, 0));
        assert!(!constraints.admits_key(KeyType::EcdsaP256, 4096) && !constraints.admits_key(KeyType::Ed25519, 4096));
        assert!(!constraints.admits_signer(KeyType::EcdsaP256, 0) && constraints.admits_signer(KeyType::Rsa, 4096));
        // A type alone says nothing about the authorities.
        let constraints = parse("ike:ecdsa-sha384");
        assert!(constraints.admits_signer(KeyType::EcdsaP256, 0) && !constraints.admits_signer(KeyType::Rsa, 8192));
        assert!(constraints.admits_key(KeyType::Rsa, 2048));
        assert!(parse("pubkey-sha256-ecdsa-sha384").admits_signer(KeyType::Rsa, 2048));
        assert!(parse("pubkey-sha512").admits_key(KeyType::Rsa, 2048));
        assert!(SignatureConstraints::default().admits_key(KeyType::Ed25519, 0));
    }

    #[test]
    fn hashes_count_for_the_chain_and_for_auth_unless_that_has_its_own() {
        let constraints = parse("rsa-2048-sha256-ecdsa-256-sha256-sha384");
        for (scheme, admitted) in [
            (Scheme::Pkcs1(Hash::Sha256), true),
            (Scheme::Pkcs1(Hash::Sha384), false),
            (Scheme::Pss(Hash::Sha256), false),
            (Scheme::Ecdsa(Hash::Sha256), true),
            (Scheme::Ecdsa(Hash::Sha384), true),
            (Scheme::Ecdsa(Hash::Sha512), false),
            (Scheme::Ed25519, false),
        ] {
            assert_eq!(constraints.admits_certificate(Some(scheme), PLAIN), admitted, "{scheme:?}");
            assert_eq!(constraints.admits_auth(Some(scheme), PLAIN), admitted, "{scheme:?}");
            assert!(constraints.admits_auth(Some(scheme), CHAIN_ONLY), "{scheme:?}");
        }
        assert!(!constraints.admits_auth(None, PLAIN) && !constraints.admits_certificate(None, PLAIN));
        let constraints = parse("pubkey-sha256-ike:rsa/pss-sha512");
        assert!(constraints.admits_auth(Some(Scheme::Pss(Hash::Sha512)), CHAIN_ONLY));
        assert!(!constraints.admits_auth(Some(Scheme::Pkcs1(Hash::Sha256)), PLAIN));
        assert!(!constraints.admits_certificate(Some(Scheme::Pss(Hash::Sha512)), PLAIN));
        assert!(constraints.admits_certificate(Some(Scheme::Pkcs1(Hash::Sha256)), PLAIN));
        assert!(SignatureConstraints::default().admits_auth(None, PLAIN));
    }

    #[test]
    fn the_setting_says_whether_rsa_includes_pss() {
        let constraints = parse("rsa-sha512-sha256");
        let order = [
            Scheme::Pss(Hash::Sha512),
            Scheme::Pkcs1(Hash::Sha512),
            Scheme::Pss(Hash::Sha256),
            Scheme::Pkcs1(Hash::Sha256),
        ];
        assert_eq!(constraints.auth_schemes(WITH_PSS).unwrap(), order);
        assert_eq!(constraints.auth_schemes(PLAIN).unwrap(), [order[1], order[3]]);
        assert_eq!(constraints.auth_schemes(CHAIN_ONLY), None);
        assert!(constraints.admits_certificate(Some(Scheme::Pss(Hash::Sha256)), WITH_PSS));
        let only = parse("rsa/pss-sha384");
        assert_eq!(only.auth_schemes(PLAIN).unwrap(), [Scheme::Pss(Hash::Sha384)]);
        assert_eq!(only.auth_schemes(WITH_PSS).unwrap(), [Scheme::Pss(Hash::Sha384)]);
    }
}
