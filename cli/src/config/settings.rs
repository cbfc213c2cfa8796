//! The grammar of `swanctl.conf` and `strongswan.conf` (strongswan.conf(5)): sections, `key = value`, quotes,
//! comments, `include` and references to other sections.
//!
//! What is read is either a whole tree or one error that points at a file, line and column. Nothing is read
//! without a limit: octets, files, depth of includes and of sections, and the size that references unfold to.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::config::{Report, Severity};
use crate::tree::{Node, Origin, Section, Value};

const MAX_NAME: usize = 256;
const MAX_SECTION_DEPTH: usize = 32;
const MAX_INCLUDE_DEPTH: usize = 10;
const MAX_FILES: usize = 4096;
const MAX_OCTETS: usize = 16 << 20;
const MAX_NODES: usize = 1 << 20;

/// Settings as read.
#[derive(Debug)]
pub struct Settings {
    /// All top-level entries, references resolved.
    pub root: Section,
    /// What is worth a warning.
    pub reports: Vec<Report>,
    /// The files that were read, in order of reading.
    pub files: Vec<PathBuf>,
}

/// Why settings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A file cannot be read.
    #[error("{path}: {source}{}", included(from))]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// The `include` that names it.
        from: Option<Origin>,
        /// Why.
        source: std::io::Error,
    },
    /// The text does not follow the grammar, or is more than we take.
    #[error("{origin}: {message}; {hint}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What is wrong.
        message: String,
        /// What to do about it.
        hint: String,
    },
}

fn included(from: &Option<Origin>) -> String {
    from.as_ref().map(|origin| format!(" (included at {origin})")).unwrap_or_default()
}

/// Reads a file with everything that it includes.
pub fn load(path: &Path) -> Result<Settings, SettingsError> {
    let mut loader = Loader::new(true);
    let mut root = RawSection::new(file_origin(&Arc::new(path.to_owned()), 1, 1));
    loader.read_file(path, None, &mut root, 0)?;
    loader.finish(&root)
}

/// Reads a text as if it stood in `path`; `include` is an error.
pub fn parse(path: &Path, text: &[u8]) -> Result<Settings, SettingsError> {
    let mut loader = Loader::new(false);
    let path = Arc::new(path.to_owned());
    let mut root = RawSection::new(file_origin(&path, 1, 1));
    loader.read_text(path, text, &mut root, 0)?;
    loader.finish(&root)
}

fn file_origin(path: &Arc<PathBuf>, line: usize, column: usize) -> Origin {
    Origin::File { path: Arc::clone(path), line, column }
}

/// A section before its references are resolved.
struct RawSection {
    origin: Origin,
    entries: Vec<(String, RawNode)>,
    /// Position of each name in `entries`; looked up only.
    index: HashMap<String, usize>,
    references: Vec<(String, Origin)>,
}

enum RawNode {
    /// A value; `None` clears an inherited one.
    Value(Option<Value>, Origin),
    Section(RawSection),
}

impl RawSection {
    fn new(origin: Origin) -> Self {
        Self { origin, entries: Vec::new(), index: HashMap::new(), references: Vec::new() }
    }

    fn set_value(&mut self, name: String, value: Option<Value>, origin: Origin) -> Result<(), SettingsError> {
        match self.index.get(&name).and_then(|at| self.entries.get_mut(*at)) {
            Some((_, RawNode::Section(section))) => Err(twice(&name, origin, &section.origin)),
            Some((_, node)) => {
                *node = RawNode::Value(value, origin);
                Ok(())
            }
            None => {
                self.push(name, RawNode::Value(value, origin));
                Ok(())
            }
        }
    }

    fn subsection(&mut self, name: String, origin: Origin) -> Result<&mut RawSection, SettingsError> {
        let at = match self.index.get(&name) {
            Some(at) => *at,
            None => self.push(name.clone(), RawNode::Section(RawSection::new(origin.clone()))),
        };
        match self.entries.get_mut(at) {
            Some((_, RawNode::Section(section))) => Ok(section),
            Some((_, RawNode::Value(_, first))) => Err(twice(&name, origin, first)),
            None => Err(syntax(origin, "section is lost".to_owned(), "report this as an error of Latchkey")),
        }
    }

    fn push(&mut self, name: String, node: RawNode) -> usize {
        let at = self.entries.len();
        self.index.insert(name.clone(), at);
        self.entries.push((name, node));
        at
    }

    fn find(&self, path: &str) -> Option<&RawSection> {
        path.split('.').try_fold(self, |section, name| {
            match section.index.get(name).and_then(|at| section.entries.get(*at)) {
                Some((_, RawNode::Section(found))) => Some(found),
                _ => None,
            }
        })
    }
}

fn twice(name: &str, origin: Origin, first: &Origin) -> SettingsError {
    syntax(origin, format!("'{name}' is a section and a value (first at {first})"), "rename one of them")
}

fn syntax(origin: Origin, message: String, hint: &str) -> SettingsError {
    SettingsError::Syntax { origin, message, hint: hint.to_owned() }
}

struct Loader {
    includes: bool,
    octets: usize,
    nodes: usize,
    /// The files being read, outermost first: one that includes itself is an error.
    stack: Vec<PathBuf>,
    files: Vec<PathBuf>,
    reports: Vec<Report>,
}

impl Loader {
    fn new(includes: bool) -> Self {
        Self { includes, octets: 0, nodes: 0, stack: Vec::new(), files: Vec::new(), reports: Vec::new() }
    }

    fn finish(self, root: &RawSection) -> Result<Settings, SettingsError> {
        let mut budget = MAX_NODES;
        let section = resolve(root, root, &mut Vec::new(), 0, &mut budget)?;
        Ok(Settings { root: section, reports: self.reports, files: self.files })
    }

    fn read_file(
        &mut self,
        path: &Path,
        from: Option<&Origin>,
        into: &mut RawSection,
        depth: usize,
    ) -> Result<(), SettingsError> {
        let unreadable = |source| SettingsError::Unreadable { path: path.to_owned(), from: from.cloned(), source };
        let whole = path.canonicalize().map_err(unreadable)?;
        let here = from.cloned().unwrap_or_else(|| into.origin.clone());
        if self.stack.contains(&whole) {
            return Err(syntax(here, format!("{} includes itself", path.display()), "remove this include"));
        }
        if self.stack.len() >= MAX_INCLUDE_DEPTH || self.files.len() >= MAX_FILES {
            let message = format!("more than {MAX_INCLUDE_DEPTH} nested includes or {MAX_FILES} files");
            return Err(syntax(here, message, "include fewer files"));
        }
        let text = self.octets_of(&whole, &here).map_err(unreadable)??;
        self.stack.push(whole);
        self.files.push(path.to_owned());
        self.read_text(Arc::new(path.to_owned()), &text, into, depth)?;
        self.stack.pop();
        Ok(())
    }

    fn octets_of(&self, path: &Path, here: &Origin) -> std::io::Result<Result<Zeroizing<Vec<u8>>, SettingsError>> {
        // A FIFO or a device would block or never end.
        if !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let left = MAX_OCTETS.saturating_sub(self.octets);
        let limit = u64::try_from(left).unwrap_or(u64::MAX).saturating_add(1);
        let mut text = Zeroizing::new(Vec::new());
        File::open(path)?.take(limit).read_to_end(&mut text)?;
        if text.len() > left {
            let message = format!("the configuration is longer than {MAX_OCTETS} octets");
            return Ok(Err(syntax(here.clone(), message, "make it shorter")));
        }
        Ok(Ok(text))
    }

    fn read_text(
        &mut self,
        path: Arc<PathBuf>,
        text: &[u8],
        into: &mut RawSection,
        depth: usize,
    ) -> Result<(), SettingsError> {
        self.octets = self.octets.saturating_add(text.len());
        let mut scanner = Scanner { path, rest: text, line: 1, column: 1 };
        self.statements(&mut scanner, into, depth, None)
    }

    /// Reads statements up to the end of the text, or of the section that began at `opened`.
    fn statements(
        &mut self,
        scanner: &mut Scanner<'_>,
        into: &mut RawSection,
        depth: usize,
        opened: Option<&Origin>,
    ) -> Result<(), SettingsError> {
        loop {
            scanner.skip_blank_lines();
            let origin = scanner.origin();
            match scanner.peek() {
                None => {
                    return match opened {
                        None => Ok(()),
                        Some(opened) => {
                            let message = format!("the section that begins at {opened} has no end");
                            Err(syntax(origin, message, "add the missing '}' (each file closes what it opens)"))
                        }
                    };
                }
                Some(b'}') if opened.is_some() => {
                    scanner.bump();
                    return Ok(());
                }
                Some(b'}') => {
                    return Err(syntax(origin, "unexpected '}'".to_owned(), "no section is open here: remove it"));
                }
                Some(b'"') => {
                    let hint = "only values are quoted: write 'name = \"value\"'";
                    return Err(syntax(origin, "unexpected string detected".to_owned(), hint));
                }
                Some(byte) if is_name(byte) => self.statement(scanner, origin, into, depth)?,
                Some(byte) => {
                    let message = format!("unexpected {}", shown(byte));
                    return Err(syntax(origin, message, "expected 'name = value', 'name {', 'include' or '}'"));
                }
            }
        }
    }

    fn statement(
        &mut self,
        scanner: &mut Scanner<'_>,
        origin: Origin,
        into: &mut RawSection,
        depth: usize,
    ) -> Result<(), SettingsError> {
        self.nodes = self.nodes.saturating_add(1);
        if self.nodes > MAX_NODES {
            let message = format!("more than {MAX_NODES} settings");
            return Err(syntax(origin, message, "make the configuration shorter"));
        }
        let name = scanner.name()?;
        let blanks = scanner.skip_blanks();
        if name == "include" && blanks && scanner.peek() != Some(b'=') {
            return self.include(scanner, &origin, into, depth);
        }
        if scanner.peek() == Some(b'=') {
            scanner.bump();
            let value = scanner.value()?;
            let value = value.map(|bytes| Value { bytes, origin: origin.clone() });
            return into.set_value(name, value, origin);
        }
        let mut references = Vec::new();
        if scanner.peek() == Some(b':') {
            scanner.bump();
            references = scanner.references()?;
        }
        scanner.skip_blank_lines();
        if scanner.peek() != Some(b'{') {
            let message = match scanner.peek() {
                Some(byte) => format!("unexpected {} after '{name}'", shown(byte)),
                None => format!("unexpected end of file after '{name}'"),
            };
            let hint = format!("write '{name} = value' or '{name} {{ … }}'; names have no spaces, dots or colons");
            return Err(syntax(scanner.origin(), message, &hint));
        }
        scanner.bump();
        if depth >= MAX_SECTION_DEPTH {
            let message = format!("more than {MAX_SECTION_DEPTH} nested sections");
            return Err(syntax(origin, message, "nest fewer sections"));
        }
        let section = into.subsection(name, origin.clone())?;
        section.references.extend(references);
        self.statements(scanner, section, depth + 1, Some(&origin))
    }

    fn include(
        &mut self,
        scanner: &mut Scanner<'_>,
        origin: &Origin,
        into: &mut RawSection,
        depth: usize,
    ) -> Result<(), SettingsError> {
        let pattern = scanner.include_pattern()?;
        if pattern.glob.is_empty() {
            return Err(syntax(origin.clone(), "include without a file".to_owned(), "name a file or a pattern"));
        }
        if !self.includes {
            return Err(syntax(origin.clone(), "include is not possible here".to_owned(), "put it all in one text"));
        }
        let base = scanner.path.parent().unwrap_or(Path::new("."));
        // `join` leaves an absolute pattern as it is.
        let base = PathBuf::from(glob::Pattern::escape(&base.to_string_lossy()));
        let whole = base.join(&pattern.glob);
        let bad = |reason: String| syntax(origin.clone(), format!("include: {reason}"), "correct the pattern");
        let mut found = false;
        for path in glob::glob(&whole.to_string_lossy()).map_err(|error| bad(error.to_string()))? {
            let path = path.map_err(|error| bad(error.to_string()))?;
            found = true;
            self.read_file(&path, Some(origin), into, depth)?;
        }
        if !found && !pattern.wildcards {
            self.reports.push(Report {
                severity: Severity::Warning,
                origin: Some(origin.clone()),
                subject: "include".to_owned(),
                message: format!("there is no file {}", whole.display()),
            });
        }
        Ok(())
    }
}

/// Unfolds a section: its own entries first, then those of the sections that it refers to, which the own
/// ones hide or, being sections themselves, extend.
fn resolve(
    root: &RawSection,
    section: &RawSection,
    following: &mut Vec<String>,
    depth: usize,
    budget: &mut usize,
) -> Result<Section, SettingsError> {
    let resolved = resolve_with_cleared(root, section, following, depth, budget)?;
    Ok(resolved.into_section())
}

/// A section whose cleared values are still there, so that they hide inherited ones.
struct Resolved {
    origin: Origin,
    entries: Vec<(String, ResolvedNode)>,
}

enum ResolvedNode {
    Cleared,
    Value(Value),
    Section(Resolved),
}

impl Resolved {
    fn into_section(self) -> Section {
        let entries = self
            .entries
            .into_iter()
            .filter_map(|(name, node)| match node {
                ResolvedNode::Cleared => None,
                ResolvedNode::Value(value) => Some((name, Node::Value(value))),
                ResolvedNode::Section(section) => Some((name, Node::Section(section.into_section()))),
            })
            .collect();
        Section { origin: self.origin, entries }
    }

    fn inherit(&mut self, from: Resolved) {
        let index: HashMap<String, usize> =
            self.entries.iter().enumerate().map(|(at, (name, _))| (name.clone(), at)).collect();
        for (name, node) in from.entries {
            match index.get(&name).and_then(|at| self.entries.get_mut(*at)) {
                None => self.entries.push((name, node)),
                Some((_, ResolvedNode::Section(own))) => {
                    if let ResolvedNode::Section(inherited) = node {
                        own.inherit(inherited);
                    }
                }
                Some(_) => {}
            }
        }
    }
}

fn resolve_with_cleared(
    root: &RawSection,
    section: &RawSection,
    following: &mut Vec<String>,
    depth: usize,
    budget: &mut usize,
) -> Result<Resolved, SettingsError> {
    if depth > MAX_SECTION_DEPTH * 2 {
        let message = "references nest too deep".to_owned();
        return Err(syntax(section.origin.clone(), message, "use fewer references"));
    }
    let mut resolved = Resolved { origin: section.origin.clone(), entries: Vec::with_capacity(section.entries.len()) };
    for (name, node) in &section.entries {
        *budget = budget.checked_sub(1).ok_or_else(|| {
            let message = format!("references unfold to more than {MAX_NODES} settings");
            syntax(section.origin.clone(), message, "use fewer references")
        })?;
        let node = match node {
            RawNode::Value(None, _) => ResolvedNode::Cleared,
            RawNode::Value(Some(value), _) => ResolvedNode::Value(value.clone()),
            RawNode::Section(inner) => {
                ResolvedNode::Section(resolve_with_cleared(root, inner, following, depth + 1, budget)?)
            }
        };
        resolved.entries.push((name.clone(), node));
    }
    for (reference, origin) in &section.references {
        if following.contains(reference) {
            let message = format!("'{reference}' refers to itself");
            return Err(syntax(origin.clone(), message, "remove this reference"));
        }
        let Some(target) = root.find(reference) else {
            let message = format!("there is no section '{reference}'");
            let hint = "define it, or write its whole path from the top, as in 'connections.base'";
            return Err(syntax(origin.clone(), message, hint));
        };
        following.push(reference.clone());
        let inherited = resolve_with_cleared(root, target, following, depth + 1, budget)?;
        following.pop();
        resolved.inherit(inherited);
    }
    Ok(resolved)
}

struct IncludePattern {
    glob: String,
    wildcards: bool,
}

struct Scanner<'a> {
    path: Arc<PathBuf>,
    rest: &'a [u8],
    line: usize,
    column: usize,
}

impl Scanner<'_> {
    fn origin(&self) -> Origin {
        file_origin(&self.path, self.line, self.column)
    }

    fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    fn bump(&mut self) -> Option<u8> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        if *byte == b'\n' {
            self.line += 1;
            self.column = 1;
        } else if byte & 0xc0 != 0x80 {
            // Columns count characters, not the continuation octets of UTF-8.
            self.column += 1;
        }
        Some(*byte)
    }

    /// Skips spaces and tabs; says whether there were any.
    fn skip_blanks(&mut self) -> bool {
        let before = self.rest.len();
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r')) {
            self.bump();
        }
        self.rest.len() != before
    }

    fn skip_blank_lines(&mut self) {
        loop {
            self.skip_blanks();
            match self.peek() {
                Some(b'\n') => {
                    self.bump();
                }
                Some(b'#') => {
                    while !matches!(self.peek(), None | Some(b'\n')) {
                        self.bump();
                    }
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Result<String, SettingsError> {
        let origin = self.origin();
        let mut name = Vec::new();
        while let Some(byte) = self.peek().filter(|byte| is_name(*byte)) {
            name.push(byte);
            self.bump();
        }
        if name.len() > MAX_NAME {
            let message = format!("a name of {} octets", name.len());
            return Err(syntax(origin, message, "names have at most 256"));
        }
        String::from_utf8(name).map_err(|_| syntax(origin, "a name that is not UTF-8".to_owned(), "rename it"))
    }

    fn references(&mut self) -> Result<Vec<(String, Origin)>, SettingsError> {
        let mut references = Vec::new();
        loop {
            self.skip_blank_lines();
            let origin = self.origin();
            let mut path = self.name()?;
            while self.peek() == Some(b'.') {
                self.bump();
                path.push('.');
                path.push_str(&self.name()?);
            }
            if path.split('.').any(str::is_empty) {
                let message = "a section reference is missing".to_owned();
                return Err(syntax(origin, message, "write 'name : section.subsection, other {'"));
            }
            if path.len() > MAX_NAME * 4 || references.len() >= MAX_NAME {
                return Err(syntax(origin, "too many references".to_owned(), "use fewer references"));
            }
            references.push((path, origin));
            self.skip_blank_lines();
            if self.peek() != Some(b',') {
                return Ok(references);
            }
            self.bump();
        }
    }

    /// The value up to the end of the line, a comment or `}`: words and strings joined by one space; `None`
    /// if there is nothing.
    fn value(&mut self) -> Result<Option<Vec<u8>>, SettingsError> {
        let mut value: Option<Vec<u8>> = None;
        loop {
            self.skip_blanks();
            let part = match self.peek() {
                None | Some(b'\n' | b'#' | b'}') => return Ok(value),
                Some(b'"') => self.string()?,
                Some(_) => {
                    let mut word = Vec::new();
                    while let Some(byte) =
                        self.peek().filter(|byte| !matches!(byte, b'\n' | b'#' | b'}' | b'"' | b' ' | b'\t' | b'\r'))
                    {
                        if byte < 0x20 || byte == 0x7f {
                            let message = format!("unexpected {} in a value", shown(byte));
                            return Err(syntax(self.origin(), message, "remove it"));
                        }
                        word.push(byte);
                        self.bump();
                    }
                    word
                }
            };
            match &mut value {
                None => value = Some(part),
                Some(value) => {
                    value.push(b' ');
                    value.extend_from_slice(&part);
                }
            }
        }
    }

    fn string(&mut self) -> Result<Vec<u8>, SettingsError> {
        let origin = self.origin();
        let unterminated = || {
            let message = "unterminated string detected".to_owned();
            syntax(origin.clone(), message, "add the closing quote")
        };
        self.bump();
        let mut text = Vec::new();
        loop {
            match self.bump().ok_or_else(unterminated)? {
                b'"' => return Ok(text),
                b'\\' => match self.bump().ok_or_else(unterminated)? {
                    b'n' => text.push(b'\n'),
                    b'r' => text.push(b'\r'),
                    b't' => text.push(b'\t'),
                    b'\n' => {}
                    b'\r' if self.peek() == Some(b'\n') => {
                        self.bump();
                    }
                    other => text.push(other),
                },
                0 => return Err(syntax(origin, "a zero octet in a string".to_owned(), "remove it")),
                other => text.push(other),
            }
        }
    }

    /// The pattern up to a blank, the end of the line, a comment or `}`.
    fn include_pattern(&mut self) -> Result<IncludePattern, SettingsError> {
        let origin = self.origin();
        let mut literal = Vec::new();
        let mut pattern = IncludePattern { glob: String::new(), wildcards: false };
        let not_utf8 = |_| syntax(origin.clone(), "a file name that is not UTF-8".to_owned(), "rename the file");
        let flush = |literal: &mut Vec<u8>, glob: &mut String, escape: bool| {
            let text = String::from_utf8(std::mem::take(literal)).map_err(not_utf8)?;
            glob.push_str(&if escape { glob::Pattern::escape(&text) } else { text });
            Ok::<(), SettingsError>(())
        };
        loop {
            match self.peek() {
                None | Some(b' ' | b'\t' | b'\r' | b'\n' | b'#' | b'}') => break,
                Some(b'"') => {
                    // Wildcards work in quotes too, as in strongSwan.
                    let quoted = self.string()?;
                    pattern.wildcards |= quoted.iter().any(|byte| b"*?[".contains(byte));
                    literal.extend_from_slice(&quoted);
                }
                Some(b'\\') => {
                    flush(&mut literal, &mut pattern.glob, false)?;
                    self.bump();
                    literal.extend(self.bump());
                    flush(&mut literal, &mut pattern.glob, true)?;
                }
                Some(byte) => {
                    pattern.wildcards |= b"*?[".contains(&byte);
                    literal.push(byte);
                    self.bump();
                }
            }
        }
        flush(&mut literal, &mut pattern.glob, false)?;
        Ok(pattern)
    }
}

fn is_name(byte: u8) -> bool {
    byte > 0x20 && byte != 0x7f && !b"#{}:.,=\"".contains(&byte)
}

fn shown(byte: u8) -> String {
    if byte.is_ascii_graphic() { format!("'{}'", char::from(byte)) } else { format!("octet 0x{byte:02x}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Section {
        parse(Path::new("test.conf"), text.as_bytes()).unwrap().root
    }

    fn refusal(text: &str) -> String {
        parse(Path::new("test.conf"), text.as_bytes()).unwrap_err().to_string()
    }

    fn names(section: &Section) -> Vec<&str> {
        section.entries.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn errors_point_at_file_line_and_column() {
        assert!(refusal("a {\n  b = c\n").starts_with("test.conf:3:1: the section that begins at test.conf:1:1"));
        assert!(refusal("\n  }").starts_with("test.conf:2:3: unexpected '}'"));
        assert!(refusal("a = \"x\n").starts_with("test.conf:1:5: unterminated string detected"));
        assert!(refusal("\"a\" = b").starts_with("test.conf:1:1: unexpected string detected"));
        assert!(refusal("a.b = c").starts_with("test.conf:1:2: unexpected '.' after 'a'"));
        assert!(refusal("ä b = c").starts_with("test.conf:1:3: unexpected 'b' after 'ä'"));
        assert!(refusal("a { b = c }\na = d").starts_with("test.conf:2:1: 'a' is a section and a value"));
        assert!(refusal("a : {\n}").starts_with("test.conf:1:5: a section reference is missing"));
        assert!(refusal("a : b\n{ }").starts_with("test.conf:1:5: there is no section 'b'"));
        assert!(refusal("include x").starts_with("test.conf:1:1: include is not possible here"));
        assert!(refusal("a = \u{1}").contains("octet 0x01"));
    }

    #[test]
    fn references_to_oneself_are_refused() {
        assert!(refusal("a : b { }\nb : a { }").contains("refers to itself"));
        assert!(refusal("a { x : a { } }").contains("refers to itself"));
    }

    #[test]
    fn references_do_not_unfold_without_limit() {
        let mut text = "s0 { a { k = v } }\n".to_owned();
        for level in 1..40 {
            let below = level - 1;
            text.push_str(&format!("s{level} {{ a : s{below} {{ }}\n b : s{below} {{ }} }}\n"));
        }
        assert!(refusal(&text).contains("unfold to more than") || refusal(&text).contains("nest too deep"));
    }

    #[test]
    fn deep_nesting_is_refused() {
        assert!(refusal(&"a {".repeat(100_000)).contains("nested sections"));
    }

    #[test]
    fn values_end_at_newline_comment_or_brace() {
        let root = read("a = b   c \t d # no\nb = x:y,z.w={q\nc { d = e } f = \"#}\" \"\\\"q\\n\" w\ng =\n h = \"\"");
        assert_eq!(root.text("a"), Some("b c d"));
        assert_eq!(root.text("b"), Some("x:y,z.w={q"));
        assert_eq!(root.section("c").unwrap().text("d"), Some("e"));
        assert_eq!(root.text("f"), Some("#} \"q\n w"));
        assert_eq!(root.node("g"), None);
        assert_eq!(root.text("h"), Some(""));
    }

    #[test]
    fn strings_span_lines_and_join_them_with_a_backslash() {
        let root = read("a = \"one\ntwo\"\nb = \"one \\\ntwo\"\r\nc = d\r\n");
        assert_eq!(root.text("a"), Some("one\ntwo"));
        assert_eq!(root.text("b"), Some("one two"));
        assert_eq!(root.text("c"), Some("d"));
    }

    #[test]
    fn braces_may_stand_on_the_next_line() {
        let root = read("a # comment\n{\n b = c\n}\nd : a\n{\n}");
        assert_eq!(root.section("d").unwrap().text("b"), Some("c"));
    }

    #[test]
    fn later_definitions_extend_sections_and_replace_values() {
        let root = read("a { x = 1\n y = 2 }\na { x = 3\n z = 4 }");
        let section = root.section("a").unwrap();
        assert_eq!(names(section), ["x", "y", "z"]);
        assert_eq!(section.text("x"), Some("3"));
    }

    #[test]
    fn inherited_entries_come_after_own_ones_and_are_cleared_by_empty_values() {
        let root = read(
            "c { one : base { local-1 { auth = psk }\n dpd_delay =\n children { net { mode = transport } } } }\n\
             base : root { local-0 { auth = pubkey }\n dpd_delay = 3\n children { net { mode = tunnel\n reqid = 4 } } }\n\
             root { version = 2 }",
        );
        let one = root.section("c").unwrap().section("one").unwrap();
        assert_eq!(names(one), ["local-1", "children", "local-0", "version"]);
        let net = one.section("children").unwrap().section("net").unwrap();
        assert_eq!(net.text("mode"), Some("transport"));
        assert_eq!(net.text("reqid"), Some("4"));
    }

    #[test]
    fn values_know_where_they_stand() {
        let root = read("a {\n  b = c\n}");
        let origin = root.section("a").unwrap().value("b").unwrap().origin.to_string();
        assert_eq!(origin, "test.conf:2:3");
    }

    #[test]
    fn values_are_not_printed() {
        assert!(!format!("{:?}", read("secret = hunter2")).contains("hunter2"));
    }

    #[test]
    fn includes_are_relative_to_the_file_and_apply_inside_sections() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        std::fs::create_dir(folder.path().join("conf.d")).unwrap();
        write(
            "top.conf",
            "a {\n include conf.d/*.conf\n include \"with blank.conf\"\n include with\\ blank.conf }\ninclude none/*.conf\ninclude missing.conf # x",
        );
        write("conf.d/2.conf", "k = two");
        write("conf.d/1.conf", "k = one\nl = x\ninclude ../more.conf");
        write("more.conf", "m = y");
        write("with blank.conf", "b = 1");
        let settings = load(&folder.path().join("top.conf")).unwrap();
        let section = settings.root.section("a").unwrap();
        assert_eq!(section.text("k"), Some("two"));
        assert_eq!(section.text("m"), Some("y"));
        assert_eq!(section.text("b"), Some("1"));
        assert!(section.value("m").unwrap().origin.to_string().ends_with("more.conf:1:1"));
        assert_eq!(settings.reports.len(), 1);
        assert!(settings.reports[0].to_string().contains("missing.conf"));
    }

    #[test]
    fn a_file_that_includes_itself_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loop.conf");
        std::fs::write(&path, "include loop.conf").unwrap();
        assert!(load(&path).unwrap_err().to_string().contains("includes itself"));
    }

    #[test]
    fn a_device_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.conf");
        std::fs::write(&path, "include /dev/zero").unwrap();
        assert!(load(&path).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn the_shipped_strongswan_conf_is_read() {
        let root = load(Path::new("/etc/strongswan.conf")).expect("apt install strongswan-swanctl charon-systemd");
        assert!(root.root.section("charon").is_some());
    }

    proptest! {
        #[test]
        fn arbitrary_octets_never_panic(text in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(Path::new("p"), &text);
        }

        #[test]
        fn arbitrary_tokens_never_panic(
            tokens in proptest::collection::vec(
                prop_oneof!["[a-c]", Just("{".into()), Just("}".into()), Just(" = ".into()), Just("\n".into()),
                    Just(" : ".into()), Just(",".into()), Just("\"".into()), Just("\\".into()), Just("include ".into()),
                    Just("#".into()), Just(".".into())],
                0..80,
            )
        ) {
            let _ = parse(Path::new("p"), tokens.concat().as_bytes());
        }
    }
}
