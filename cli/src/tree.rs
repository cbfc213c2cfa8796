//! A tree of settings as `swanctl.conf`, `strongswan.conf` and VICI messages share it; each value knows where
//! it came from.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use zeroize::Zeroize;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file.
    File {
        /// Which.
        path: Arc<PathBuf>,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// A VICI message: the command's name.
    Vici(Arc<str>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Vici(command) => write!(f, "VICI {command}"),
        }
    }
}

/// A value: octets, since VICI carries certificates in it. It may be a secret: its `Debug` shows the length
/// only, and it is wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct Value {
    /// The octets.
    pub bytes: Vec<u8>,
    /// Where from.
    pub origin: Origin,
}

impl Value {
    /// The value as text; `None` if it is not UTF-8 or holds control characters.
    pub fn text(&self) -> Option<&str> {
        let text = std::str::from_utf8(&self.bytes).ok()?;
        let printable =
            text.chars().all(|character| !character.is_control() || matches!(character, '\n' | '\t' | '\r'));
        printable.then_some(text)
    }

    /// The value's comma-separated parts, trimmed, without empty ones.
    pub fn parts(&self) -> Vec<Value> {
        self.bytes
            .split(|byte| *byte == b',')
            .map(<[u8]>::trim_ascii)
            .filter(|part| !part.is_empty())
            .map(|part| Value { bytes: part.to_vec(), origin: self.origin.clone() })
            .collect()
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Value({} octets, {})", self.bytes.len(), self.origin)
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A value.
    Value(Value),
    /// A list (VICI only; in files lists are values with commas).
    List(Vec<Value>, Origin),
    /// A subsection.
    Section(Section),
}

impl Node {
    /// Where it came from.
    pub fn origin(&self) -> &Origin {
        match self {
            Self::Value(value) => &value.origin,
            Self::List(_, origin) => origin,
            Self::Section(section) => &section.origin,
        }
    }
}

/// Names and what they stand for, in order; names are unique.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Where it begins.
    pub origin: Origin,
    /// Contents.
    pub entries: Vec<(String, Node)>,
}

impl Section {
    /// An empty section.
    pub fn new(origin: Origin) -> Self {
        Self { origin, entries: Vec::new() }
    }

    /// What a name stands for.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.entries.iter().find(|(entry, _)| entry == name).map(|(_, node)| node)
    }

    /// The value of a name, if it is one.
    pub fn value(&self, name: &str) -> Option<&Value> {
        match self.node(name) {
            Some(Node::Value(value)) => Some(value),
            _ => None,
        }
    }

    /// The value of a name as text, if it is one.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.value(name).and_then(Value::text)
    }

    /// The items of a list, or the comma-separated parts of a value; empty if there is neither.
    pub fn list(&self, name: &str) -> Vec<Value> {
        match self.node(name) {
            Some(Node::List(items, _)) => items.clone(),
            Some(Node::Value(value)) => value.parts(),
            _ => Vec::new(),
        }
    }

    /// A subsection.
    pub fn section(&self, name: &str) -> Option<&Section> {
        match self.node(name) {
            Some(Node::Section(section)) => Some(section),
            _ => None,
        }
    }

    /// Subsections, in order.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Section)> {
        self.entries.iter().filter_map(|(name, node)| match node {
            Node::Section(section) => Some((name.as_str(), section)),
            _ => None,
        })
    }

    /// Adds a value at the end. For sections that we make ourselves: names must stay unique.
    pub fn push_value(&mut self, name: impl Into<String>, value: impl Into<Vec<u8>>) {
        let value = Value { bytes: value.into(), origin: self.origin.clone() };
        self.entries.push((name.into(), Node::Value(value)));
    }

    /// Adds a list at the end.
    pub fn push_list<T: Into<Vec<u8>>>(&mut self, name: impl Into<String>, items: impl IntoIterator<Item = T>) {
        let items = items.into_iter().map(|item| Value { bytes: item.into(), origin: self.origin.clone() }).collect();
        self.entries.push((name.into(), Node::List(items, self.origin.clone())));
    }

    /// Adds a subsection at the end.
    pub fn push_section(&mut self, name: impl Into<String>, section: Section) {
        self.entries.push((name.into(), Node::Section(section)));
    }
}
