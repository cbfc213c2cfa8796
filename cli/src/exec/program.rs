//! Whether the loader will preload a library into a program: what can be seen before it runs.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::io::Errno;

/// The program that a shell would start under this name.
pub(super) fn find(name: &OsStr) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return Some(name.into());
    }
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
}

/// Scripts that start scripts: the system stops at five.
const MAX_SCRIPTS: usize = 5;

/// Fails with the reason if connections of a program cannot be hooked.
pub(super) fn check(path: &Path) -> anyhow::Result<()> {
    let mut path = path.to_owned();
    for _ in 0..=MAX_SCRIPTS {
        let mut start = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(256).read_to_end(&mut start))
            .with_context(|| format!("reading {}", path.display()))?;
        match interpreter(&start) {
            Some(interpreter) => path = interpreter?,
            None => {
                unprivileged(&path)?;
                let own = Elf::read(Path::new("/proc/self/exe")).context("reading this program")?;
                return hookable(&Elf::read(&path)?, &own);
            }
        }
    }
    bail!("it is a script of a script of a script")
}

/// What a script is run by; through `env`, what that finds.
fn interpreter(start: &[u8]) -> Option<anyhow::Result<PathBuf>> {
    let line = start.strip_prefix(b"#!")?.split(|octet| *octet == b'\n').next()?;
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).map(OsStr::from_bytes);
    let Some(first) = words.next() else { return Some(Err(anyhow::anyhow!("it is a script of nobody"))) };
    if Path::new(first).file_name() != Some(OsStr::new("env")) {
        return Some(Ok(first.into()));
    }
    let named = words.find(|word| !word.as_bytes().starts_with(b"-") && !word.as_bytes().contains(&b'='));
    let found = named.and_then(find);
    Some(found.with_context(|| format!("what `{}` runs cannot be found", String::from_utf8_lossy(line))))
}

/// The loader does not preload for programs that get privileges from the system.
fn unprivileged(path: &Path) -> anyhow::Result<()> {
    let mode = fs::metadata(path).with_context(|| format!("reading {}", path.display()))?.permissions().mode();
    if mode & 0o6000 != 0 {
        bail!("it is setuid or setgid, and the loader preloads nothing for such programs");
    }
    match rustix::fs::getxattr(path, "security.capability", &mut [0u8; 64]) {
        Ok(_) | Err(Errno::RANGE) => {
            bail!("it has file capabilities, and the loader preloads nothing for such programs")
        }
        Err(_) => Ok(()),
    }
}

fn hookable(program: &Elf, own: &Elf) -> anyhow::Result<()> {
    let Some(loader) = &program.loader else {
        bail!("it is linked statically: there is no loader that could preload anything");
    };
    if program.kind != own.kind {
        bail!("it is for another kind of processor than this program");
    }
    if own.loader.as_ref() != Some(loader) {
        bail!(
            "its loader is {}, and not that of the C library which this program uses",
            String::from_utf8_lossy(loader)
        );
    }
    if program.is_go {
        bail!("it is a Go program: those make system calls of their own");
    }
    Ok(())
}

/// What matters of an ELF file.
#[derive(Debug, PartialEq, Eq)]
struct Elf {
    /// Class, byte order and machine.
    kind: [u8; 4],
    /// Path of the loader, with its zero.
    loader: Option<Vec<u8>>,
    /// The Go linker has left its note.
    is_go: bool,
}

const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// Longest piece that is read; more is not needed of one.
const MAX_PIECE: u64 = 64 * 1024;

impl Elf {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
        let piece = |offset: u64, length: u64| -> io::Result<Vec<u8>> {
            let mut octets = vec![0; usize::try_from(length.min(MAX_PIECE)).unwrap_or(0)];
            file.read_exact_at(&mut octets, offset)?;
            Ok(octets)
        };
        Self::parse(piece).with_context(|| format!("{} is not a program that can be looked at", path.display()))
    }

    /// Reads the parts of a file of 64-bit ELF in our byte order that are needed.
    fn parse(piece: impl Fn(u64, u64) -> io::Result<Vec<u8>>) -> anyhow::Result<Self> {
        let header = piece(0, 64)?;
        let [0x7f, b'E', b'L', b'F', class, order, ..] = *header.as_slice() else { bail!("it is not ELF") };
        let native = if cfg!(target_endian = "little") { 1 } else { 2 };
        if (class, order) != (2, native) {
            bail!("it is not ELF of 64 bits in the byte order of this machine");
        }
        let short = || anyhow::anyhow!("its headers are cut");
        let (m0, m1) = (header.get(18).ok_or_else(short)?, header.get(19).ok_or_else(short)?);
        let mut elf = Self { kind: [class, order, *m0, *m1], loader: None, is_go: false };
        let (table, size) = (u64_at(&header, 32).ok_or_else(short)?, u16_at(&header, 54).ok_or_else(short)?);
        for index in 0..u16_at(&header, 56).ok_or_else(short)? {
            let offset = table.checked_add(u64::from(index) * u64::from(size)).ok_or_else(short)?;
            let entry = piece(offset, u64::from(size))?;
            let (kind, offset) = (u32_at(&entry, 0).ok_or_else(short)?, u64_at(&entry, 8).ok_or_else(short)?);
            let length = u64_at(&entry, 32).ok_or_else(short)?;
            match kind {
                PT_INTERP => elf.loader = Some(piece(offset, length)?),
                PT_NOTE => elf.is_go |= has_go_note(&piece(offset, length)?),
                _ => {}
            }
        }
        Ok(elf)
    }
}

/// A note: three 32-bit words, its name and its description, each padded to four octets.
fn has_go_note(mut notes: &[u8]) -> bool {
    while let (Some(name), Some(description)) = (u32_at(notes, 0), u32_at(notes, 4)) {
        if name == 4 && notes.get(12..16) == Some(b"Go\0\0") {
            return true;
        }
        let padded = |length: u32| usize::try_from(length).ok().and_then(|length| length.checked_next_multiple_of(4));
        let next =
            padded(name).zip(padded(description)).and_then(|(name, rest)| name.checked_add(rest)?.checked_add(12));
        let Some(rest) = next.and_then(|next| notes.get(next..)) else { return false };
        notes = rest;
    }
    false
}

fn u16_at(octets: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*octets.get(at..)?.first_chunk()?))
}

fn u32_at(octets: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*octets.get(at..)?.first_chunk()?))
}

fn u64_at(octets: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*octets.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::*;

    /// A file of ELF with program headers that point to pieces.
    fn elf(pieces: &[(u32, &[u8])]) -> Vec<u8> {
        let own = fs::read("/proc/self/exe").unwrap();
        let mut file = own[..64].to_vec();
        file[32..40].copy_from_slice(&64u64.to_ne_bytes());
        file[54..56].copy_from_slice(&56u16.to_ne_bytes());
        file[56..58].copy_from_slice(&u16::try_from(pieces.len()).unwrap().to_ne_bytes());
        let mut at = 64 + 56 * pieces.len();
        for (kind, piece) in pieces {
            let mut entry = [0u8; 56];
            entry[..4].copy_from_slice(&kind.to_ne_bytes());
            entry[8..16].copy_from_slice(&u64::try_from(at).unwrap().to_ne_bytes());
            entry[32..40].copy_from_slice(&u64::try_from(piece.len()).unwrap().to_ne_bytes());
            file.extend_from_slice(&entry);
            at += piece.len();
        }
        pieces.iter().for_each(|(_, piece)| file.extend_from_slice(piece));
        file
    }

    fn parse(file: &[u8]) -> anyhow::Result<Elf> {
        Elf::parse(|offset, length| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let end = start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
            file.get(start..end).map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })
    }

    #[test]
    fn what_cannot_be_hooked_is_seen() {
        let own = Elf::read(Path::new("/proc/self/exe")).unwrap();
        let loader = own.loader.clone().unwrap();
        assert!(hookable(&own, &own).is_ok());
        let note: &[u8] =
            &[&4u32.to_ne_bytes()[..], &8u32.to_ne_bytes(), &4u32.to_ne_bytes(), b"Go\0\0", &[7; 8]].concat();
        let other: &[u8] =
            &[&3u32.to_ne_bytes()[..], &1u32.to_ne_bytes(), &4u32.to_ne_bytes(), b"GNU\0", &[7; 4]].concat();
        let both = [other, note].concat();
        for (pieces, reason) in [
            (vec![], "linked statically"),
            (vec![(PT_NOTE, other)], "linked statically"),
            (vec![(PT_INTERP, &b"/lib/ld-musl-x86_64.so.1\0"[..])], "its loader is /lib/ld-musl"),
            (vec![(PT_INTERP, &loader[..]), (PT_NOTE, note)], "a Go program"),
            (vec![(PT_INTERP, &loader[..]), (PT_NOTE, &both[..])], "a Go program"),
        ] {
            let error = hookable(&parse(&elf(&pieces)).unwrap(), &own).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
        let mut foreign = elf(&[(PT_INTERP, &loader)]);
        foreign[18] ^= 0xff;
        assert!(hookable(&parse(&foreign).unwrap(), &own).unwrap_err().to_string().contains("processor"));
        assert!(hookable(&parse(&elf(&[(PT_INTERP, &loader), (PT_NOTE, other)])).unwrap(), &own).is_ok());
    }

    #[test]
    fn broken_files_are_errors() {
        let good = elf(&[(PT_INTERP, b"/lib64/ld.so\0"), (PT_NOTE, &[1, 2, 3])]);
        for length in 0..good.len() {
            assert!(parse(&good[..length]).is_err(), "{length}");
        }
        for at in 0..120 {
            let mut broken = good.clone();
            broken[at] = 0xff;
            let _ = parse(&broken);
        }
        assert!(!has_go_note(&[0xff; 64]) && !has_go_note(&[0; 64]));
    }

    #[test]
    fn scripts_are_followed_to_what_runs_them() {
        let of = |text: &str| interpreter(text.as_bytes()).map(|found| found.ok());
        assert_eq!(of("\u{7f}ELF"), None);
        assert_eq!(of("#! /bin/sh -e\n"), Some(Some("/bin/sh".into())));
        assert_eq!(of("#!/usr/bin/env -S A=1 sh -e\n"), Some(find(OsStr::new("sh"))));
        assert_eq!(of("#!/usr/bin/env no-such-program-at-all"), Some(None));
        assert_eq!(of("#!\n"), Some(None));
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        fs::write(&script, format!("#!{}\n", script.display())).unwrap();
        assert!(check(&script).unwrap_err().to_string().contains("script of a script"));
    }
}
