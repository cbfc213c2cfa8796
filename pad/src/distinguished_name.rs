//! Distinguished names (X.501 `Name`, RFC 5280 §4.1.2.4): DER to text and back, and comparison.
//!
//! Two names are equal if their RDNs are, in order: same attribute types, same values without
//! regard to the string type and to ASCII case. Everything else is compared octet by octet.

use std::fmt;

use pkcs8::der::asn1::{Any, AnyRef, ObjectIdentifier};
use pkcs8::der::{Decode, Encode, Reader, SliceReader, Tag, Tagged};

/// Most RDNs in a name and attributes in an RDN that are read; real names have under twenty.
const MAX_PARTS: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DistinguishedName {
    relative: Vec<Vec<Attribute>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Attribute {
    kind: ObjectIdentifier,
    value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Value {
    /// `*` in a pattern; never read from DER.
    Wildcard,
    Text(String),
    /// The whole DER encoding of a value that is not text.
    Opaque(Vec<u8>),
}

impl DistinguishedName {
    /// Reads a DER `Name`; an empty one names nobody and is refused.
    pub(crate) fn from_der(der: &[u8]) -> Result<Self, &'static str> {
        const MALFORMED: &str = "not a DER distinguished name";
        let name = AnyRef::from_der(der).map_err(|_| MALFORMED)?;
        let mut relative = Vec::new();
        for rdn in elements(name, Tag::Sequence).ok_or(MALFORMED)? {
            let mut attributes = Vec::new();
            for attribute in elements(rdn, Tag::Set).ok_or(MALFORMED)? {
                let fields = elements(attribute, Tag::Sequence).ok_or(MALFORMED)?;
                let [kind, value] = fields.as_slice() else { return Err(MALFORMED) };
                let kind = kind.decode_as::<ObjectIdentifier>().map_err(|_| MALFORMED)?;
                attributes.push(Attribute { kind, value: Value::from_der(*value).ok_or(MALFORMED)? });
            }
            if attributes.is_empty() {
                return Err(MALFORMED);
            }
            relative.push(attributes);
        }
        if relative.is_empty() { Err("an empty distinguished name") } else { Ok(Self { relative }) }
    }

    /// Encodes as DER; `None` for a name with wildcards.
    pub(crate) fn to_der(&self) -> Option<Vec<u8>> {
        let mut name = Vec::new();
        for rdn in &self.relative {
            let mut attributes = rdn.iter().map(Attribute::to_der).collect::<Option<Vec<_>>>()?;
            // DER sorts the members of a SET OF by their encodings (X.690 §11.6).
            attributes.sort();
            name.extend(constructed(Tag::Set, attributes.concat())?);
        }
        constructed(Tag::Sequence, name)
    }

    /// Parses `C=CH, O=Org, CN=name` or `/C=CH/O=Org/CN=name`; a value `*` is a wildcard.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        Parser { rest: text, slashes_only: text.starts_with('/') }.name()
    }

    pub(crate) fn has_wildcards(&self) -> bool {
        self.relative.iter().flatten().any(|attribute| attribute.value == Value::Wildcard)
    }

    /// Says whether this name, which may have wildcards, admits `other`.
    pub(crate) fn admits(&self, other: &Self) -> bool {
        self.relative.len() == other.relative.len()
            && self.relative.iter().zip(&other.relative).all(|(ours, theirs)| {
                let (ours, theirs) = (sorted(ours), sorted(theirs));
                ours.len() == theirs.len()
                    && ours.iter().zip(&theirs).all(|(ours, theirs)| {
                        ours.kind == theirs.kind && (ours.value == Value::Wildcard || ours.value == theirs.value)
                    })
            })
    }

    /// Octets that are equal exactly for equal names.
    pub(crate) fn comparison_key(&self) -> Vec<u8> {
        let mut key = Vec::new();
        let mut put = |tag: u8, octets: &[u8]| {
            key.push(tag);
            key.extend((octets.len() as u64).to_be_bytes());
            key.extend(octets);
        };
        for rdn in &self.relative {
            put(0, &[]);
            for attribute in sorted(rdn) {
                put(1, attribute.kind.as_bytes());
                match &attribute.value {
                    Value::Wildcard => put(2, &[]),
                    Value::Text(text) => put(3, text.as_bytes()),
                    Value::Opaque(der) => put(4, der),
                }
            }
        }
        key
    }
}

impl fmt::Display for DistinguishedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, rdn) in self.relative.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { ", " })?;
            for (index, attribute) in rdn.iter().enumerate() {
                f.write_str(if index == 0 { "" } else { "+" })?;
                attribute.fmt(f)?;
            }
        }
        Ok(())
    }
}

impl Attribute {
    fn to_der(&self) -> Option<Vec<u8>> {
        let mut der = self.kind.to_der().ok()?;
        match &self.value {
            Value::Wildcard => return None,
            Value::Text(text) => der.extend(constructed(string_tag(&self.kind, text), text.clone().into_bytes())?),
            Value::Opaque(value) => der.extend(value),
        }
        constructed(Tag::Sequence, der)
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match ATTRIBUTES.iter().find(|(_, oid)| *oid == self.kind) {
            Some((name, _)) => write!(f, "{name}=")?,
            None => write!(f, "{}=", self.kind)?,
        }
        match &self.value {
            Value::Wildcard => f.write_str("*"),
            Value::Opaque(der) => write!(f, "#{}", data_encoding::HEXLOWER.encode(der)),
            Value::Text(text) if text == "*" => f.write_str("\\*"),
            Value::Text(text) => {
                let end = text.trim_end_matches(' ').len();
                for (position, character) in text.char_indices() {
                    let rest = text.get(position + character.len_utf8()..).unwrap_or_default();
                    let escape = match character {
                        ',' | '\\' | '"' => true,
                        '#' => position == 0,
                        ' ' => position == 0 || position >= end,
                        '/' | '+' => starts_attribute(rest),
                        _ => false,
                    };
                    if character.is_control() || character.is_whitespace() && character != ' ' {
                        let mut octets = [0; 4];
                        for octet in character.encode_utf8(&mut octets).bytes() {
                            write!(f, "\\{octet:02X}")?;
                        }
                    } else if escape {
                        write!(f, "\\{character}")?;
                    } else {
                        write!(f, "{character}")?;
                    }
                }
                Ok(())
            }
        }
    }
}

impl Value {
    fn from_der(value: AnyRef<'_>) -> Option<Self> {
        let octets = value.value();
        let text = match value.tag() {
            Tag::Utf8String => std::str::from_utf8(octets).ok().map(str::to_owned),
            Tag::PrintableString | Tag::Ia5String | Tag::NumericString | Tag::VisibleString | Tag::TeletexString => {
                std::str::from_utf8(octets).ok().filter(|text| text.is_ascii()).map(str::to_owned)
            }
            Tag::BmpString => utf16(octets),
            _ => None,
        };
        Some(match text {
            Some(text) => Self::Text(text),
            None => Self::Opaque(value.to_der().ok()?),
        })
    }
}

/// The attributes in an order that does not depend on the encoding, their text folded for comparison.
fn sorted(rdn: &[Attribute]) -> Vec<Attribute> {
    let mut attributes = rdn.to_vec();
    for attribute in &mut attributes {
        if let Value::Text(text) = &mut attribute.value {
            text.make_ascii_lowercase();
        }
    }
    attributes.sort();
    attributes
}

pub(crate) fn elements(parent: AnyRef<'_>, tag: Tag) -> Option<Vec<AnyRef<'_>>> {
    if parent.tag() != tag {
        return None;
    }
    let mut reader = SliceReader::new(parent.value()).ok()?;
    let mut elements = Vec::new();
    while !reader.is_finished() {
        if elements.len() == MAX_PARTS {
            return None;
        }
        elements.push(AnyRef::decode(&mut reader).ok()?);
    }
    Some(elements)
}

pub(crate) fn constructed(tag: Tag, content: Vec<u8>) -> Option<Vec<u8>> {
    Any::new(tag, content).ok()?.to_der().ok()
}

fn utf16(octets: &[u8]) -> Option<String> {
    let units = octets
        .chunks(2)
        .map(|pair| <[u8; 2]>::try_from(pair).ok().map(u16::from_be_bytes))
        .collect::<Option<Vec<_>>>()?;
    String::from_utf16(&units).ok()
}

/// RFC 5280 §4.1.2.4 and appendix A: IA5String for addresses and domain components, else
/// PrintableString where it can hold the text, else UTF8String.
fn string_tag(kind: &ObjectIdentifier, text: &str) -> Tag {
    let printable = |character: char| character.is_ascii_alphanumeric() || " '()+,-./:=?".contains(character);
    if text.is_ascii() && (*kind == EMAIL_ADDRESS || *kind == DOMAIN_COMPONENT) {
        Tag::Ia5String
    } else if text.chars().all(printable) {
        Tag::PrintableString
    } else {
        Tag::Utf8String
    }
}

/// Says whether `TYPE=` follows, so that the separator before it is one.
fn starts_attribute(rest: &str) -> bool {
    rest.split_once('=').is_some_and(|(kind, _)| attribute_kind(kind.trim()).is_some())
}

fn attribute_kind(name: &str) -> Option<ObjectIdentifier> {
    match ATTRIBUTES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
        Some((_, oid)) => Some(*oid),
        None => ObjectIdentifier::new(name.strip_prefix("OID.").unwrap_or(name)).ok(),
    }
}

struct Parser<'a> {
    rest: &'a str,
    /// The text began with `/`, so a comma is an ordinary character.
    slashes_only: bool,
}

/// What ended a value.
enum Ended {
    Rdn,
    Attribute,
    Name,
}

impl Parser<'_> {
    fn name(mut self) -> Result<DistinguishedName, String> {
        if self.slashes_only {
            self.take();
        }
        let mut relative = Vec::new();
        let mut attributes = Vec::new();
        loop {
            let (kind, rest) = self.rest.split_once('=').ok_or_else(|| format!("{:?} has no '='", self.rest))?;
            let kind = kind.trim();
            let kind = attribute_kind(kind).ok_or_else(|| format!("{kind:?} is not an attribute type"))?;
            self.rest = rest.trim_start_matches(' ');
            let (value, ended) = self.value()?;
            attributes.push(Attribute { kind, value });
            if !matches!(ended, Ended::Attribute) {
                relative.push(std::mem::take(&mut attributes));
            }
            if matches!(ended, Ended::Name) {
                break;
            }
        }
        if relative.len() > MAX_PARTS || relative.iter().any(|rdn| rdn.len() > MAX_PARTS) {
            return Err("too many parts".to_owned());
        }
        Ok(DistinguishedName { relative })
    }

    fn value(&mut self) -> Result<(Value, Ended), String> {
        let quoted = self.rest.starts_with('"');
        if quoted {
            self.take();
        }
        let mut octets = Vec::new();
        // What was quoted or escaped is neither a wildcard, nor hexadecimal, nor blank to be trimmed.
        let mut kept = 0;
        let mut literal = quoted;
        let mut closed = !quoted;
        let ended = loop {
            let separator = closed.then(|| self.separator()).flatten();
            if let Some(ended) = separator {
                self.take();
                break ended;
            }
            let Some(character) = self.take() else { break Ended::Name };
            match character {
                '\\' => {
                    self.escaped(&mut octets)?;
                    literal = true;
                    kept = octets.len();
                }
                '"' if !closed => {
                    closed = true;
                    kept = octets.len();
                }
                ' ' if quoted && closed => {}
                _ if quoted && closed => return Err("text after a quoted value".to_owned()),
                _ => octets.extend(character.encode_utf8(&mut [0; 4]).bytes()),
            }
        };
        if !closed {
            return Err("a quotation mark is missing".to_owned());
        }
        while octets.len() > kept && octets.last() == Some(&b' ') {
            octets.pop();
        }
        let text = String::from_utf8(octets).map_err(|_| "an escape is not UTF-8".to_owned())?;
        if literal {
            return Ok((Value::Text(text), ended));
        }
        if text == "*" {
            return Ok((Value::Wildcard, ended));
        }
        let value = match text.strip_prefix('#') {
            Some(hex) => {
                let der = data_encoding::HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).ok();
                der.and_then(|der| Value::from_der(AnyRef::from_der(&der).ok()?))
                    .ok_or_else(|| format!("{text:?} is not the DER of a value"))?
            }
            None => Value::Text(text),
        };
        Ok((value, ended))
    }

    /// Appends what follows a backslash: the octet of two hexadecimal digits, or a character.
    fn escaped(&mut self, octets: &mut Vec<u8>) -> Result<(), String> {
        let pair = self.rest.get(..2).and_then(|pair| data_encoding::HEXLOWER_PERMISSIVE.decode(pair.as_bytes()).ok());
        if let Some(decoded) = pair {
            octets.extend(decoded);
            self.take();
            self.take();
        } else {
            let character = self.take().ok_or("nothing follows the backslash")?;
            octets.extend(character.encode_utf8(&mut [0; 4]).bytes());
        }
        Ok(())
    }

    fn separator(&self) -> Option<Ended> {
        let mut characters = self.rest.chars();
        let first = characters.next()?;
        let rest = characters.as_str();
        match first {
            ',' if !self.slashes_only => Some(Ended::Rdn),
            '/' if self.slashes_only || starts_attribute(rest) => Some(Ended::Rdn),
            '+' if starts_attribute(rest) => Some(Ended::Attribute),
            _ => None,
        }
    }

    fn take(&mut self) -> Option<char> {
        let mut characters = self.rest.chars();
        let first = characters.next();
        self.rest = characters.as_str();
        first
    }
}

const EMAIL_ADDRESS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.1");
const DOMAIN_COMPONENT: ObjectIdentifier = ObjectIdentifier::new_unwrap("0.9.2342.19200300.100.1.25");

/// Names of attribute types as strongSwan knows them (`SN` is the serial number, `S` the surname); the
/// first name of a type is the one that is printed.
const ATTRIBUTES: &[(&str, ObjectIdentifier)] = &[
    ("C", ObjectIdentifier::new_unwrap("2.5.4.6")),
    ("ST", ObjectIdentifier::new_unwrap("2.5.4.8")),
    ("L", ObjectIdentifier::new_unwrap("2.5.4.7")),
    ("STREET", ObjectIdentifier::new_unwrap("2.5.4.9")),
    ("O", ObjectIdentifier::new_unwrap("2.5.4.10")),
    ("OU", ObjectIdentifier::new_unwrap("2.5.4.11")),
    ("CN", ObjectIdentifier::new_unwrap("2.5.4.3")),
    ("S", ObjectIdentifier::new_unwrap("2.5.4.4")),
    ("SN", ObjectIdentifier::new_unwrap("2.5.4.5")),
    ("serialNumber", ObjectIdentifier::new_unwrap("2.5.4.5")),
    ("T", ObjectIdentifier::new_unwrap("2.5.4.12")),
    ("D", ObjectIdentifier::new_unwrap("2.5.4.13")),
    ("postalAddress", ObjectIdentifier::new_unwrap("2.5.4.16")),
    ("postalCode", ObjectIdentifier::new_unwrap("2.5.4.17")),
    ("telephoneNumber", ObjectIdentifier::new_unwrap("2.5.4.20")),
    ("N", ObjectIdentifier::new_unwrap("2.5.4.41")),
    ("G", ObjectIdentifier::new_unwrap("2.5.4.42")),
    ("I", ObjectIdentifier::new_unwrap("2.5.4.43")),
    ("ID", ObjectIdentifier::new_unwrap("2.5.4.45")),
    ("dnQualifier", ObjectIdentifier::new_unwrap("2.5.4.46")),
    ("pseudonym", ObjectIdentifier::new_unwrap("2.5.4.65")),
    ("E", EMAIL_ADDRESS),
    ("emailAddress", EMAIL_ADDRESS),
    ("email", EMAIL_ADDRESS),
    ("UN", ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.2")),
    ("unstructuredName", ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.2")),
    ("UA", ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.8")),
    ("unstructuredAddress", ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.8")),
    ("EN", ObjectIdentifier::new_unwrap("2.16.840.1.113730.3.1.3")),
    ("employeeNumber", ObjectIdentifier::new_unwrap("2.16.840.1.113730.3.1.3")),
    ("UID", ObjectIdentifier::new_unwrap("0.9.2342.19200300.100.1.1")),
    ("DC", DOMAIN_COMPONENT),
];
