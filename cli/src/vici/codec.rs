//! The VICI wire format: packets and messages (libvici's README). Lengths are bounded and checked; what is
//! malformed is refused whole.

use std::collections::HashSet;
use std::sync::Arc;

use crate::tree::{Node, Origin, Section, Value};

/// Largest packet that is accepted, in octets, without its length prefix.
pub const MAX_PACKET: usize = 512 * 1024;

const MAX_DEPTH: usize = 32;

const SECTION_START: u8 = 1;
const SECTION_END: u8 = 2;
const KEY_VALUE: u8 = 3;
const LIST_START: u8 = 4;
const LIST_ITEM: u8 = 5;
const LIST_END: u8 = 6;

/// Why octets are not a VICI packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The octets end too early.
    #[error("truncated VICI packet")]
    Truncated,
    /// A packet type that we do not know.
    #[error("unknown VICI packet type {0}")]
    PacketType(u8),
    /// An element where it must not be.
    #[error("misplaced VICI element {0}")]
    Element(u8),
    /// A name that is not UTF-8 or has control characters.
    #[error("malformed name in a VICI message")]
    Name,
    /// A name twice in one section.
    #[error("a name appears twice in a VICI section")]
    Duplicate,
    /// Sections in sections without end.
    #[error("VICI sections nest too deep")]
    Depth,
    /// A section or list that is not closed.
    #[error("unbalanced VICI message")]
    Unbalanced,
    /// Octets after the end.
    #[error("octets after the end of a VICI packet")]
    Trailing,
}

/// One packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// CMD_REQUEST.
    Request {
        /// The command.
        name: String,
        /// Its arguments.
        message: Section,
    },
    /// CMD_RESPONSE.
    Response(Section),
    /// CMD_UNKNOWN.
    CommandUnknown,
    /// EVENT_REGISTER.
    Register(String),
    /// EVENT_UNREGISTER.
    Unregister(String),
    /// EVENT_CONFIRM.
    EventConfirm,
    /// EVENT_UNKNOWN.
    EventUnknown,
    /// EVENT.
    Event {
        /// The event.
        name: String,
        /// What happened.
        message: Section,
    },
}

impl Packet {
    /// The packet's octets, without a length prefix.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Request { name, message } => named(0, name, Some(message)),
            Self::Response(message) => {
                let mut bytes = vec![1];
                encode_entries(message, &mut bytes);
                bytes
            }
            Self::CommandUnknown => vec![2],
            Self::Register(name) => named(3, name, None),
            Self::Unregister(name) => named(4, name, None),
            Self::EventConfirm => vec![5],
            Self::EventUnknown => vec![6],
            Self::Event { name, message } => named(7, name, Some(message)),
        }
    }

    /// True for a CMD_REQUEST whose command can be read, whatever its arguments are.
    pub fn is_named_request(bytes: &[u8]) -> bool {
        let mut reader = Reader(bytes);
        reader.octet() == Ok(0) && reader.name().is_ok()
    }

    /// Reads a packet without length prefix.
    ///
    /// # Errors
    /// For anything but exactly one well-formed packet.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut reader = Reader(bytes);
        let kind = reader.octet()?;
        let packet = match kind {
            0 => {
                let name = reader.name()?;
                let message = decode_message(reader.rest(), &name)?;
                Self::Request { name, message }
            }
            1 => Self::Response(decode_message(reader.rest(), "response")?),
            2 => Self::CommandUnknown,
            3 => Self::Register(reader.name()?),
            4 => Self::Unregister(reader.name()?),
            5 => Self::EventConfirm,
            6 => Self::EventUnknown,
            7 => {
                let name = reader.name()?;
                let message = decode_message(reader.rest(), &name)?;
                Self::Event { name, message }
            }
            other => return Err(CodecError::PacketType(other)),
        };
        if reader.0.is_empty() { Ok(packet) } else { Err(CodecError::Trailing) }
    }
}

fn named(kind: u8, name: &str, message: Option<&Section>) -> Vec<u8> {
    let mut bytes = vec![kind];
    push_name(&mut bytes, name);
    if let Some(message) = message {
        encode_entries(message, &mut bytes);
    }
    bytes
}

/// Encodes a message. A name or value that does not fit its length field is left out, as libvici does.
pub fn encode_message(message: &Section) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_entries(message, &mut bytes);
    bytes
}

fn encode_entries(section: &Section, bytes: &mut Vec<u8>) {
    for (name, node) in section.entries.iter().filter(|(name, _)| name.len() <= 255) {
        match node {
            Node::Value(value) => {
                if let Ok(length) = u16::try_from(value.bytes.len()) {
                    bytes.push(KEY_VALUE);
                    push_name(bytes, name);
                    bytes.extend_from_slice(&length.to_be_bytes());
                    bytes.extend_from_slice(&value.bytes);
                }
            }
            Node::List(items, _) => {
                bytes.push(LIST_START);
                push_name(bytes, name);
                for item in items {
                    if let Ok(length) = u16::try_from(item.bytes.len()) {
                        bytes.push(LIST_ITEM);
                        bytes.extend_from_slice(&length.to_be_bytes());
                        bytes.extend_from_slice(&item.bytes);
                    }
                }
                bytes.push(LIST_END);
            }
            Node::Section(inner) => {
                bytes.push(SECTION_START);
                push_name(bytes, name);
                encode_entries(inner, bytes);
                bytes.push(SECTION_END);
            }
        }
    }
}

/// Names longer than 255 octets are cut at a character; callers leave them out before.
fn push_name(bytes: &mut Vec<u8>, name: &str) {
    let mut end = name.len().min(255);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let name = name.get(..end).unwrap_or_default();
    bytes.push(u8::try_from(name.len()).unwrap_or_default());
    bytes.extend_from_slice(name.as_bytes());
}

/// Reads a message; `command` becomes the origin of its values.
///
/// # Errors
/// For anything but exactly one well-formed message whose names are unique in each section.
pub fn decode_message(bytes: &[u8], command: &str) -> Result<Section, CodecError> {
    let origin = Origin::Vici(Arc::from(command));
    let mut reader = Reader(bytes);
    let mut open = vec![Open::new(String::new(), &origin)];
    while !reader.0.is_empty() {
        let element = reader.octet()?;
        let depth = open.len();
        let current = open.last_mut().ok_or(CodecError::Unbalanced)?;
        match element {
            SECTION_START => {
                let name = reader.name()?;
                current.claim(&name)?;
                if depth > MAX_DEPTH {
                    return Err(CodecError::Depth);
                }
                open.push(Open::new(name, &origin));
            }
            SECTION_END => {
                let closed = open.pop().ok_or(CodecError::Unbalanced)?;
                let parent = open.last_mut().ok_or(CodecError::Unbalanced)?;
                parent.section.push_section(closed.name, closed.section);
            }
            KEY_VALUE => {
                let name = reader.name()?;
                current.claim(&name)?;
                let value = reader.value()?;
                current.section.push_value(name, value);
            }
            LIST_START => {
                let name = reader.name()?;
                current.claim(&name)?;
                let items = reader.items(&origin)?;
                current.section.entries.push((name, Node::List(items, origin.clone())));
            }
            other => return Err(CodecError::Element(other)),
        }
    }
    match (open.pop(), open.is_empty()) {
        (Some(root), true) => Ok(root.section),
        _ => Err(CodecError::Unbalanced),
    }
}

/// A section that is being read.
struct Open {
    name: String,
    section: Section,
    names: HashSet<String>,
}

impl Open {
    fn new(name: String, origin: &Origin) -> Self {
        Self { name, section: Section::new(origin.clone()), names: HashSet::new() }
    }

    fn claim(&mut self, name: &str) -> Result<(), CodecError> {
        if self.names.insert(name.to_owned()) { Ok(()) } else { Err(CodecError::Duplicate) }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn octet(&mut self) -> Result<u8, CodecError> {
        let (octet, rest) = self.0.split_first().ok_or(CodecError::Truncated)?;
        self.0 = rest;
        Ok(*octet)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], CodecError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(CodecError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn name(&mut self) -> Result<String, CodecError> {
        let length = self.octet()?;
        let name = std::str::from_utf8(self.take(length.into())?).map_err(|_| CodecError::Name)?;
        if name.chars().any(char::is_control) {
            return Err(CodecError::Name);
        }
        Ok(name.to_owned())
    }

    fn value(&mut self) -> Result<&'a [u8], CodecError> {
        let length = u16::from_be_bytes([self.octet()?, self.octet()?]);
        self.take(length.into())
    }

    fn items(&mut self, origin: &Origin) -> Result<Vec<Value>, CodecError> {
        let mut items = Vec::new();
        loop {
            match self.octet()? {
                LIST_ITEM => items.push(Value { bytes: self.value()?.to_vec(), origin: origin.clone() }),
                LIST_END => return Ok(items),
                other => return Err(CodecError::Element(other)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn origin() -> Origin {
        Origin::Vici(Arc::from("test"))
    }

    fn decode(bytes: &[u8]) -> Result<Section, CodecError> {
        decode_message(bytes, "test")
    }

    #[test]
    fn malformed_messages_are_refused() {
        assert_eq!(decode(&[SECTION_START, 1, b'a']), Err(CodecError::Unbalanced));
        assert_eq!(decode(&[SECTION_END]), Err(CodecError::Unbalanced));
        assert_eq!(decode(&[KEY_VALUE, 1, b'a', 0, 2, b'x']), Err(CodecError::Truncated));
        assert_eq!(decode(&[KEY_VALUE, 9, b'a']), Err(CodecError::Truncated));
        assert_eq!(decode(&[LIST_ITEM, 0, 0]), Err(CodecError::Element(LIST_ITEM)));
        assert_eq!(decode(&[LIST_START, 1, b'a', LIST_START, 1, b'b']), Err(CodecError::Element(LIST_START)));
        assert_eq!(decode(&[LIST_START, 1, b'a', SECTION_END]), Err(CodecError::Element(SECTION_END)));
        assert_eq!(decode(&[LIST_START, 1, b'a']), Err(CodecError::Truncated));
        assert_eq!(decode(&[KEY_VALUE, 1, 0xff, 0, 0]), Err(CodecError::Name));
        assert_eq!(decode(&[KEY_VALUE, 1, b'\n', 0, 0]), Err(CodecError::Name));
        assert_eq!(decode(&[KEY_VALUE, 1, b'a', 0, 0, KEY_VALUE, 1, b'a', 0, 0]), Err(CodecError::Duplicate));
        assert_eq!(decode(&[7]), Err(CodecError::Element(7)));
        assert_eq!(decode(&[SECTION_START, 0].repeat(5000)), Err(CodecError::Depth));
        assert_eq!(Packet::decode(&[]), Err(CodecError::Truncated));
        assert_eq!(Packet::decode(&[9]), Err(CodecError::PacketType(9)));
        assert_eq!(Packet::decode(&[3, 1, b'a', 0]), Err(CodecError::Trailing));
    }

    #[test]
    fn the_example_of_libvici_s_documentation_is_read() {
        // key1 = value1; section1 = { sub-section = { key2 = value2 }; list1 = [ item1, item2 ] }
        let bytes = [
            &[3, 4][..],
            b"key1",
            &[0, 6],
            b"value1",
            &[1, 8],
            b"section1",
            &[1, 11],
            b"sub-section",
            &[3, 4],
            b"key2",
            &[0, 6],
            b"value2",
            &[2],
            &[4, 5],
            b"list1",
            &[5, 0, 5],
            b"item1",
            &[5, 0, 5],
            b"item2",
            &[6],
            &[2],
        ]
        .concat();
        let section = decode(&bytes).unwrap();
        assert_eq!(section.text("key1"), Some("value1"));
        let inner = section.section("section1").unwrap();
        assert_eq!(inner.section("sub-section").unwrap().text("key2"), Some("value2"));
        assert_eq!(inner.list("list1").len(), 2);
        assert_eq!(encode_message(&section), bytes);
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let mut section = Section::new(origin());
        section.push_value("n".repeat(256), "x");
        section.push_value("big", vec![0; 65_536]);
        section.push_value("fits", vec![0; 65_535]);
        let read = decode(&encode_message(&section)).unwrap();
        assert_eq!(read.entries.len(), 1);
    }

    fn sections() -> impl Strategy<Value = Section> {
        let bytes = proptest::collection::vec(any::<u8>(), 0..8);
        let leaf = prop_oneof![
            bytes.clone().prop_map(|bytes| Node::Value(Value { bytes, origin: origin() })),
            proptest::collection::vec(bytes, 0..4).prop_map(|items| {
                let items = items.into_iter().map(|bytes| Value { bytes, origin: origin() }).collect();
                Node::List(items, origin())
            }),
        ];
        let node = leaf.prop_recursive(4, 32, 4, |inner| {
            proptest::collection::btree_map("[a-z]{0,3}", inner, 0..4)
                .prop_map(|entries| Node::Section(Section { origin: origin(), entries: entries.into_iter().collect() }))
        });
        proptest::collection::btree_map("[a-z]{0,3}", node, 0..4)
            .prop_map(|entries| Section { origin: origin(), entries: entries.into_iter().collect() })
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire(section in sections()) {
            prop_assert_eq!(decode(&encode_message(&section)), Ok(section.clone()));
            let packet = Packet::Request { name: "test".to_owned(), message: section };
            prop_assert_eq!(Packet::decode(&packet.encode()), Ok(packet));
        }

        #[test]
        fn arbitrary_octets_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Packet::decode(&bytes);
        }

        #[test]
        fn almost_messages_never_panic(bytes in proptest::collection::vec(0u8..8, 0..200)) {
            let _ = Packet::decode(&bytes);
        }
    }
}
