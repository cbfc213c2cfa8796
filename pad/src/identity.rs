//! Identities as IKE carries them (RFC 7296 §3.5) and patterns that configuration matches them with.
//!
//! What the peer sends is refused unless it is well formed for its type: no empty identity, no control
//! characters (so no NUL that another parser would stop at), no wildcard.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::distinguished_name::DistinguishedName;

const ID_IPV4_ADDR: u8 = 1;
const ID_FQDN: u8 = 2;
const ID_RFC822_ADDR: u8 = 3;
const ID_IPV6_ADDR: u8 = 5;
const ID_DER_ASN1_DN: u8 = 9;
const ID_KEY_ID: u8 = 11;
const ID_NULL: u8 = 13;

/// The notation of [`Identity::Null`], ours.
const NULL: &str = "%null";

/// Longest identification data that is accepted, in octets.
pub const MAX_IDENTITY_LENGTH: usize = 4096;

/// An IKE identity.
///
/// Equal identities are those that RFC 4945 §3.1 and strongSwan hold to be the same: FQDNs and the domain of
/// a mail address compare without regard to ASCII case, distinguished names RDN by RDN without regard to
/// string types and ASCII case, everything else octet by octet. Hash and order agree with that.
#[derive(Clone, Debug)]
pub enum Identity {
    /// ID_IPV4_ADDR.
    Ipv4(Ipv4Addr),
    /// ID_FQDN, compared without regard to ASCII case.
    Fqdn(String),
    /// ID_RFC822_ADDR.
    Rfc822(String),
    /// ID_IPV6_ADDR.
    Ipv6(Ipv6Addr),
    /// ID_DER_ASN1_DN: the DER encoding of a distinguished name.
    Dn(Vec<u8>),
    /// ID_KEY_ID: opaque octets.
    KeyId(Vec<u8>),
    /// ID_NULL (RFC 7619): nobody in particular. Goes with NULL authentication alone, and two of them need not be the same peer.
    Null,
    /// A type that we carry but never match.
    Other {
        /// The ID type octet.
        kind: u8,
        /// The identification data.
        data: Vec<u8>,
    },
}

/// Why a text is not an identity or a pattern.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not an identity: {reason}")]
pub struct IdentityError {
    /// The text.
    pub text: String,
    /// Why.
    pub reason: String,
}

/// Why identification data from the wire is malformed.
#[derive(Debug, thiserror::Error)]
#[error("identification of type {kind} is malformed: {reason}")]
pub struct IdentityWireError {
    /// The ID type octet.
    pub kind: u8,
    /// Why.
    pub reason: &'static str,
}

impl Identity {
    /// Parses strongSwan's notation: an address, `name@host`, `@fqdn`, `fqdn`, `C=.., CN=..`, `keyid:..`,
    /// `@#hex`, `fqdn:`, `email:`, `ipv4:`, `ipv6:`, `asn1dn:` prefixes, and `prefix:#hex`.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let identity = match Notation::parse(text) {
            Ok(Notation::Exact(identity)) => Ok(identity),
            Ok(_) => Err("it is a pattern that admits several identities".to_owned()),
            Err(reason) => Err(reason),
        };
        identity.map_err(|reason| IdentityError { text: text.to_owned(), reason })
    }

    /// Reads an Identification payload's type and data (RFC 7296 §3.5).
    pub fn from_wire(kind: u8, data: &[u8]) -> Result<Self, IdentityWireError> {
        Self::from_data(kind, data).map_err(|reason| IdentityWireError { kind, reason })
    }

    /// The ID type octet.
    pub fn kind(&self) -> u8 {
        match self {
            Self::Ipv4(_) => ID_IPV4_ADDR,
            Self::Fqdn(_) => ID_FQDN,
            Self::Rfc822(_) => ID_RFC822_ADDR,
            Self::Ipv6(_) => ID_IPV6_ADDR,
            Self::Dn(_) => ID_DER_ASN1_DN,
            Self::KeyId(_) => ID_KEY_ID,
            Self::Null => ID_NULL,
            Self::Other { kind, .. } => *kind,
        }
    }

    /// The identification data.
    pub fn wire_data(&self) -> Vec<u8> {
        match self {
            Self::Ipv4(address) => address.octets().to_vec(),
            Self::Ipv6(address) => address.octets().to_vec(),
            Self::Fqdn(text) | Self::Rfc822(text) => text.clone().into_bytes(),
            Self::Dn(data) | Self::KeyId(data) | Self::Other { data, .. } => data.clone(),
            Self::Null => Vec::new(),
        }
    }

    /// The text that strongSwan prints: as `Display`, but without the type prefix that tells a key id, or a
    /// name that looks like something else, from other identities. Never parse it or decide by it.
    pub fn strongswan_text(&self) -> String {
        match self {
            Self::Fqdn(text) | Self::Rfc822(text) => text.clone(),
            Self::KeyId(data) | Self::Other { data, .. } => match printable(data) {
                Some(text) => text.to_owned(),
                None => data.iter().map(|octet| format!("{octet:02x}")).collect::<Vec<_>>().join(":"),
            },
            Self::Ipv4(_) | Self::Ipv6(_) | Self::Dn(_) | Self::Null => self.to_string(),
        }
    }

    /// The identity of an IP address.
    pub fn from_address(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::Ipv4(address),
            IpAddr::V6(address) => Self::Ipv6(address),
        }
    }

    fn from_data(kind: u8, data: &[u8]) -> Result<Self, &'static str> {
        if data.len() > MAX_IDENTITY_LENGTH {
            return Err("too long");
        }
        // RFC 7619 §2.2: ID_NULL is the one type whose data is empty, and it must be.
        if kind == ID_NULL {
            return if data.is_empty() { Ok(Self::Null) } else { Err("ID_NULL has data") };
        }
        if data.is_empty() {
            return Err("empty");
        }
        match kind {
            ID_IPV4_ADDR => <[u8; 4]>::try_from(data)
                .map(|octets| Self::Ipv4(octets.into()))
                .map_err(|_| "an IPv4 address has four octets"),
            ID_IPV6_ADDR => <[u8; 16]>::try_from(data)
                .map(|octets| Self::Ipv6(octets.into()))
                .map_err(|_| "an IPv6 address has sixteen octets"),
            ID_FQDN => check_name(data).map(|text| Self::Fqdn(text.to_owned())),
            ID_RFC822_ADDR => {
                let text = check_name(data)?;
                mailbox(text).ok_or("not a mail address")?;
                Ok(Self::Rfc822(text.to_owned()))
            }
            ID_DER_ASN1_DN => DistinguishedName::from_der(data).map(|_| Self::Dn(data.to_vec())),
            ID_KEY_ID => Ok(Self::KeyId(data.to_vec())),
            _ => Ok(Self::Other { kind, data: data.to_vec() }),
        }
    }

    /// Octets that equal identities have in common, and no others: for tables, where comparing names again and again is
    /// too slow. They say nothing to a human or a peer.
    pub fn canonical(&self) -> Vec<u8> {
        let kind = [self.kind(), u8::from(matches!(self, Self::Other { .. }))];
        [kind.as_slice(), &self.comparison_key()].concat()
    }

    /// What equality, hash and order look at, besides the type.
    fn comparison_key(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Ipv4(address) => Cow::Owned(address.octets().to_vec()),
            Self::Ipv6(address) => Cow::Owned(address.octets().to_vec()),
            // RFC 4945 §3.1.2, §3.1.3: without case, the local part of a mail address too, whatever RFC 5321 says of it.
            Self::Fqdn(text) | Self::Rfc822(text) => Cow::Owned(text.to_ascii_lowercase().into_bytes()),
            // What is not a name (only code can make such a value) equals only itself: no key starts with 255.
            Self::Dn(der) => Cow::Owned(match DistinguishedName::from_der(der) {
                Ok(name) => name.comparison_key(),
                Err(_) => [&[255], der.as_slice()].concat(),
            }),
            Self::KeyId(data) | Self::Other { data, .. } => Cow::Borrowed(data),
            Self::Null => Cow::Borrowed(&[]),
        }
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
            && self.kind() == other.kind()
            && self.comparison_key() == other.comparison_key()
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.kind().hash(state);
        self.comparison_key().hash(state);
    }
}

impl PartialOrd for Identity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Identity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let rank = |identity: &Self| (identity.kind(), matches!(identity, Self::Other { .. }));
        rank(self).cmp(&rank(other)).then_with(|| self.comparison_key().cmp(&other.comparison_key()))
    }
}

/// Prints the identity as strongSwan does, except where that text would be read as another identity:
/// then with a type prefix (`keyid:moon`, `fqdn:192.0.2.1`). What [`Identity::parse`] made of a text,
/// it makes of this one too.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, plain) = match self {
            Self::Ipv4(address) => ("ipv4", address.to_string()),
            Self::Ipv6(address) => ("ipv6", address.to_string()),
            Self::Fqdn(name) => ("fqdn", name.clone()),
            Self::Rfc822(address) => ("email", address.clone()),
            Self::Dn(der) => match DistinguishedName::from_der(der) {
                Ok(name) => ("asn1dn", name.to_string()),
                Err(_) => ("asn1dn", String::new()),
            },
            Self::KeyId(data) => ("keyid", printable(data).unwrap_or_default().to_owned()),
            Self::Null => return f.write_str(NULL),
            Self::Other { kind, data } => {
                return write!(f, "({kind}):#{}", data_encoding::HEXLOWER.encode(data));
            }
        };
        let is_me = |text: &str| Self::parse(text).is_ok_and(|parsed| parsed == *self);
        if is_me(&plain) {
            return f.write_str(&plain);
        }
        let prefixed = format!("{prefix}:{plain}");
        if is_me(&prefixed) {
            return f.write_str(&prefixed);
        }
        write!(f, "{prefix}:#{}", data_encoding::HEXLOWER.encode(&self.wire_data()))
    }
}

/// What configuration says of a peer's identity: `%any`, an exact one, or one with wildcards.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdentityPattern {
    notation: Notation,
}

/// How narrowly a pattern names the identity that it admits; the greater the narrower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Specificity {
    /// `%any`.
    Any,
    /// A pattern with wildcards, or a range of addresses.
    Wildcard,
    /// One identity.
    Exact,
}

impl IdentityPattern {
    /// Matches every identity of a type that we know, [`Identity::Null`] excepted; one of another type ([`Identity::Other`]) is
    /// nobody.
    pub fn any() -> Self {
        Self { notation: Notation::Any }
    }

    /// Matches this identity only.
    pub fn exact(identity: Identity) -> Self {
        Self { notation: Notation::Exact(identity) }
    }

    /// Parses strongSwan's notation: as [`Identity::parse`], or `%any`, `*.example.org`, `*@example.org`,
    /// a distinguished name with `*` as values, `192.0.2.0/24`.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        match Notation::parse(text) {
            Ok(notation) => Ok(Self { notation }),
            Err(reason) => Err(IdentityError { text: text.to_owned(), reason }),
        }
    }

    /// Says whether the pattern admits an identity.
    pub fn matches(&self, identity: &Identity) -> bool {
        self.match_specificity(identity).is_some()
    }

    /// How narrowly the pattern names an identity that it admits; `None` if it does not admit it.
    pub fn match_specificity(&self, identity: &Identity) -> Option<Specificity> {
        // An identity of an unknown type has no notion of equality that could be trusted.
        if matches!(identity, Identity::Other { .. }) {
            return None;
        }
        let admits = match (&self.notation, identity) {
            // RFC 7619 §2.4: "only those rules that explicitly have that flag turned on".
            (Notation::Any, Identity::Null) => false,
            (Notation::Any, _) => true,
            (Notation::Exact(exact), identity) => exact == identity,
            (Notation::Subdomains(parent), Identity::Fqdn(name)) => {
                let name = name.to_ascii_lowercase();
                name.strip_suffix(parent.as_str()).is_some_and(|label| !label.is_empty() && !label.contains('*'))
            }
            (Notation::MailDomain(domain), Identity::Rfc822(address)) => mailbox(address)
                .is_some_and(|(local, theirs)| !local.contains('*') && theirs.eq_ignore_ascii_case(domain)),
            (Notation::Dn(pattern), Identity::Dn(der)) => {
                DistinguishedName::from_der(der).is_ok_and(|name| pattern.admits(&name))
            }
            (Notation::Network { address: IpAddr::V4(network), length }, Identity::Ipv4(address)) => {
                same_prefix(u128::from(network.to_bits()), u128::from(address.to_bits()), 32, *length)
            }
            (Notation::Network { address: IpAddr::V6(network), length }, Identity::Ipv6(address)) => {
                same_prefix(network.to_bits(), address.to_bits(), 128, *length)
            }
            (
                Notation::Subdomains(_) | Notation::MailDomain(_) | Notation::Dn(_) | Notation::Network { .. },
                Identity::Ipv4(_)
                | Identity::Ipv6(_)
                | Identity::Fqdn(_)
                | Identity::Rfc822(_)
                | Identity::Dn(_)
                | Identity::KeyId(_)
                | Identity::Null
                | Identity::Other { .. },
            ) => false,
        };
        admits.then_some(match self.notation {
            Notation::Any => Specificity::Any,
            Notation::Exact(_) => Specificity::Exact,
            Notation::Subdomains(_) | Notation::MailDomain(_) | Notation::Dn(_) | Notation::Network { .. } => {
                Specificity::Wildcard
            }
        })
    }

    /// The identity, if the pattern admits exactly one.
    pub fn as_exact(&self) -> Option<&Identity> {
        match &self.notation {
            Notation::Exact(identity) => Some(identity),
            Notation::Any
            | Notation::Subdomains(_)
            | Notation::MailDomain(_)
            | Notation::Dn(_)
            | Notation::Network { .. } => None,
        }
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, plain) = match &self.notation {
            Notation::Any => return f.write_str("%any"),
            Notation::Exact(identity) => return identity.fmt(f),
            Notation::Network { address, length } => return write!(f, "{address}/{length}"),
            Notation::Subdomains(parent) => ("fqdn", format!("*{parent}")),
            Notation::MailDomain(domain) => ("email", format!("*@{domain}")),
            Notation::Dn(name) => ("asn1dn", name.to_string()),
        };
        // A name with characters of another notation is read as that one unless it says what it is.
        if Self::parse(&plain).is_ok_and(|parsed| parsed == *self) {
            return f.write_str(&plain);
        }
        write!(f, "{prefix}:{plain}")
    }
}

/// What a text in strongSwan's notation means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Notation {
    Any,
    Exact(Identity),
    /// `.example.org`, in lower case, for `*.example.org`.
    Subdomains(String),
    /// `example.org`, in lower case, for `*@example.org`.
    MailDomain(String),
    Dn(DistinguishedName),
    Network {
        address: IpAddr,
        length: u8,
    },
}

impl Notation {
    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.len() > MAX_IDENTITY_LENGTH {
            return Err("too long".to_owned());
        }
        if let Some((prefix, rest)) = text.split_once(':')
            && let Some(kind) = prefix_kind(prefix)
        {
            return Self::typed(kind, rest);
        }
        if matches!(text, "%any" | "%any6" | "*" | "0.0.0.0" | "0::0" | "::" | "0.0.0.0/0" | "::/0") {
            return Ok(Self::Any);
        }
        if text == NULL {
            return Ok(Self::Exact(Identity::Null));
        }
        if text.starts_with('^') {
            return Err("regular expressions are not supported".to_owned());
        }
        if text.starts_with('%') {
            return Err("no such keyword".to_owned());
        }
        if let Some(hex) = text.strip_prefix("@#") {
            return Self::binary(ID_KEY_ID, hex);
        }
        if let Some(address) = text.strip_prefix("@@") {
            return Self::typed(ID_RFC822_ADDR, address);
        }
        if let Some(name) = text.strip_prefix('@') {
            return Self::typed(ID_FQDN, name);
        }
        if text.contains('=') {
            return Self::typed(ID_DER_ASN1_DN, text);
        }
        if text.contains('@') {
            return Self::typed(ID_RFC822_ADDR, text);
        }
        if let Some((address, length)) = text.split_once('/') {
            return Self::network(address, length);
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Exact(Identity::from_address(address)));
        }
        if text.contains(':') {
            return Err("neither an IPv6 address nor a known type prefix".to_owned());
        }
        // A mistyped address must not turn into a name that no peer will ever have.
        if text.bytes().all(|octet| octet.is_ascii_digit() || octet == b'.') {
            return Err("not an IPv4 address".to_owned());
        }
        Self::typed(ID_FQDN, text)
    }

    fn typed(kind: u8, text: &str) -> Result<Self, String> {
        if let Some(hex) = text.strip_prefix('#') {
            return Self::binary(kind, hex);
        }
        match kind {
            ID_IPV4_ADDR => match text.parse::<Ipv4Addr>() {
                Ok(address) => Ok(Self::Exact(Identity::Ipv4(address))),
                Err(_) => Err("not an IPv4 address".to_owned()),
            },
            ID_IPV6_ADDR => match text.parse::<Ipv6Addr>() {
                Ok(address) => Ok(Self::Exact(Identity::Ipv6(address))),
                Err(_) => Err("not an IPv6 address".to_owned()),
            },
            ID_FQDN => match text.strip_prefix("*.") {
                Some(parent) => {
                    check_name(parent.as_bytes())?;
                    Ok(Self::Subdomains(format!(".{}", parent.to_ascii_lowercase())))
                }
                None => Self::data(kind, text.as_bytes()),
            },
            ID_RFC822_ADDR => match text.strip_prefix("*@") {
                Some(domain) if !domain.contains('@') => {
                    check_name(domain.as_bytes())?;
                    Ok(Self::MailDomain(domain.to_ascii_lowercase()))
                }
                _ => Self::data(kind, text.as_bytes()),
            },
            ID_DER_ASN1_DN => {
                let name = DistinguishedName::parse(text)?;
                if name.has_wildcards() {
                    return Ok(Self::Dn(name));
                }
                Self::data(kind, &name.to_der().ok_or("it cannot be encoded")?)
            }
            _ => match text.strip_prefix("0x") {
                Some(hex) => Self::binary(kind, hex),
                None => Self::data(kind, text.as_bytes()),
            },
        }
    }

    fn binary(kind: u8, hex: &str) -> Result<Self, String> {
        let data = data_encoding::HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).map_err(|_| "not hexadecimal")?;
        Self::data(kind, &data)
    }

    fn data(kind: u8, data: &[u8]) -> Result<Self, String> {
        Ok(Self::Exact(Identity::from_data(kind, data)?))
    }

    fn network(address: &str, length: &str) -> Result<Self, String> {
        let address = address.parse::<IpAddr>().map_err(|_| "not a network")?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        match length.parse::<u8>() {
            Ok(length) if length <= longest => Ok(Self::Network { address, length }),
            _ => Err("not a prefix length".to_owned()),
        }
    }
}

fn prefix_kind(prefix: &str) -> Option<u8> {
    Some(match prefix.to_ascii_lowercase().as_str() {
        "ipv4" => ID_IPV4_ADDR,
        "ipv6" => ID_IPV6_ADDR,
        "fqdn" | "dns" => ID_FQDN,
        "email" | "rfc822" | "userfqdn" => ID_RFC822_ADDR,
        "asn1dn" => ID_DER_ASN1_DN,
        "keyid" => ID_KEY_ID,
        _ => return None,
    })
}

/// RFC 7296 §3.5: names must not contain terminators. A wildcard names nobody.
fn check_name(data: &[u8]) -> Result<&str, &'static str> {
    let text = std::str::from_utf8(data).map_err(|_| "not UTF-8")?;
    if text.is_empty() {
        return Err("empty");
    }
    if text.chars().any(char::is_control) {
        return Err("it has control characters");
    }
    if text.contains('*') {
        return Err("it has a wildcard");
    }
    if text.starts_with(char::is_whitespace) || text.ends_with(char::is_whitespace) {
        return Err("it starts or ends with a blank");
    }
    Ok(text)
}

/// Local part and domain.
fn mailbox(address: &str) -> Option<(&str, &str)> {
    let (local, domain) = address.split_once('@')?;
    (!local.is_empty() && !domain.is_empty() && !domain.contains('@')).then_some((local, domain))
}

fn printable(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok().filter(|text| text.bytes().all(|octet| octet.is_ascii_graphic() || octet == b' '))
}

fn same_prefix(one: u128, other: u128, width: u32, length: u8) -> bool {
    let shift = width.saturating_sub(u32::from(length));
    (one ^ other).checked_shr(shift).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests;
