#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fs;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;
use std::ptr::{null, null_mut};

use super::*;
use latch::protocol::{Disposition, Initiate};

use crate::arguments::SuiteArgument;
use crate::items::Item;

fn header() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/latchkey.h")).unwrap()
}

/// The header without its comments.
fn declarations() -> String {
    let mut text = String::new();
    for part in header().split("/*") {
        text.push_str(part.split_once("*/").map_or(part, |(_, rest)| rest));
    }
    text
}

/// `NAME = NUMBER` of all enumerations.
fn enumerators() -> BTreeMap<String, i32> {
    let text = declarations();
    let lines = text.lines().filter_map(|line| line.trim().trim_end_matches(',').split_once(" = "));
    lines.filter_map(|(name, number)| Some((name.to_owned(), number.parse().ok()?))).collect()
}

#[test]
fn the_header_declares_what_the_library_exports() {
    let source = include_str!("lib.rs");
    let exported: BTreeSet<&str> = source
        .lines()
        .filter_map(|line| line.split_once("extern \"C\" fn ").and_then(|(_, rest)| rest.split_once('(')))
        .map(|(name, _)| name)
        .collect();
    let text = declarations();
    let declared: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| {
            let name = line.strip_prefix("int ").or_else(|| line.strip_prefix("const char *"))?;
            name.split_once('(').map(|(name, _)| name)
        })
        .collect();
    assert_eq!(declared, exported);
    assert!(exported.len() > 15);
}

#[test]
fn statuses_have_the_names_of_their_constants() {
    let enumerators = enumerators();
    for (status, name) in Status::ALL {
        assert!(enumerators.contains_key(&format!("LATCHKEY_{}", name.to_uppercase().replace('-', "_"))), "{name}");
        // SAFETY: the function gives static strings that end with a zero.
        assert_eq!(unsafe { CStr::from_ptr(latchkey_status_name(*status as i32)) }.to_str().unwrap(), *name);
    }
}

/// What the compiler makes of each constant, and the library's number for it: all of them, both ways.
#[test]
fn the_compiler_numbers_what_the_library_does() {
    let wanted = |on_break, initiate| {
        let peer = c"%any";
        let given = WantedArgument {
            size: size_of::<WantedArgument>(),
            peer: peer.as_ptr(),
            local_id: null(),
            mode: null(),
            suites: null(),
            suite_count: 0,
            replay_protection: 0,
            on_break,
            initiate,
            late: 0,
        };
        // SAFETY: pointers are null or point to strings that live here.
        unsafe { arguments::wanted(&raw const given) }.ok()
    };
    let mut ours: BTreeMap<String, c_int> = BTreeMap::new();
    ours.extend(Status::ALL.iter().map(|(status, name)| (name.to_uppercase().replace('-', "_"), *status as c_int)));
    ours.extend(Item::ALL.iter().map(|(item, name)| ((*name).to_owned(), *item as c_int)));
    let states = [State::Listener, State::Established, State::Broken, State::Closed];
    ours.extend(states.map(|state| (state.to_string().to_uppercase(), number(state))));
    for (name, on_break) in [
        ("DEFAULT", None),
        ("RESET", Some(Disposition::Reset)),
        ("WAIT", Some(Disposition::Wait)),
        ("UNREACHABLE", Some(Disposition::Unreachable)),
    ] {
        let all = -9..99;
        let numbers: Vec<c_int> =
            all.filter(|number| wanted(*number, 0).is_some_and(|wanted| wanted.on_break == on_break)).collect();
        assert_eq!(numbers.len(), 1, "{name}");
        ours.insert(name.to_owned(), numbers[0]);
    }
    for (name, initiate) in [("NEEDED", Initiate::Needed), ("NARROW", Initiate::Narrow), ("NEVER", Initiate::No)] {
        let all = -9..99;
        let numbers: Vec<c_int> =
            all.filter(|number| wanted(0, *number).is_some_and(|wanted| wanted.initiate == initiate)).collect();
        assert_eq!(numbers.len(), 1, "{name}");
        ours.insert(name.to_owned(), numbers[0]);
    }

    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("numbers.c"), folder.path().join("numbers"));
    let mut text = "#include <latchkey.h>\n#include <stdio.h>\nint main(void) {\n".to_owned();
    for name in enumerators().keys() {
        text += &format!("printf(\"{name} %d\\n\", (int) {name});\n");
    }
    fs::write(&source, text + "return 0;\n}\n").unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let compiled = Command::new("cc").arg("-I").arg(&include).arg(&source).arg("-o").arg(&program).status();
    assert!(compiled.expect("apt-get install gcc").success());
    let output = String::from_utf8(Command::new(&program).output().unwrap().stdout).unwrap();
    let theirs: BTreeMap<String, c_int> = output
        .lines()
        .filter_map(|line| line.strip_prefix("LATCHKEY_")?.split_once(' '))
        .map(|(name, number)| (name.to_owned(), number.parse().unwrap()))
        .collect();
    assert_eq!(theirs, ours);
    assert!(theirs.len() > 60);
}

/// Each function is called by a C program of the tests, rightly and wrongly.
#[test]
fn c_programs_call_every_function() {
    let (right, wrong) = (include_str!("../examples/talk.c"), include_str!("../tests/wrong_input.c"));
    let source = include_str!("lib.rs");
    let exported = source.lines().filter_map(|line| Some(line.split_once("extern \"C\" fn ")?.1.split_once('(')?.0));
    for name in exported {
        let call = format!("{name}(");
        assert!(wrong.contains(&call) && (right.contains(&call) || wrong.matches(&call).count() > 1), "{name}");
    }
}

/// Compiles the header as C and as C++ with all warnings, and asks the compiler for the shape of each struct.
#[test]
fn the_compiler_lays_structs_out_as_the_library_does() {
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("shapes.c"), folder.path().join("shapes"));
    let fields =
        ["peer", "local_id", "mode", "suites", "suite_count", "replay_protection", "on_break", "initiate", "late"];
    let mut text = "#include <latchkey.h>\n#include <stdio.h>\nint main(void) {\n".to_owned();
    let mut print = |what: &str| text += &format!("printf(\"%zu\\n\", (size_t) {what});\n");
    for name in ["suite", "wanted", "change"] {
        print(&format!("sizeof(struct latchkey_{name})"));
    }
    for field in fields {
        print(&format!("offsetof(struct latchkey_wanted, {field})"));
    }
    for (name, field) in [("change", "state"), ("change", "reason"), ("suite", "key_bits"), ("suite", "integ")] {
        print(&format!("offsetof(struct latchkey_{name}, {field})"));
    }
    text += "struct latchkey_wanted wanted = LATCHKEY_WANTED(\"%any\");\nreturn wanted.size != sizeof(wanted);\n}\n";
    fs::write(&source, text).unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    for (compiler, standard) in [("cc", "-std=c99"), ("c++", "-xc++")] {
        let mut command = Command::new(compiler);
        command.args([standard, "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"]).arg(&include);
        let status = command.arg(&source).arg("-o").arg(&program).status();
        assert!(status.expect("apt-get install gcc g++").success(), "{compiler}");
    }
    let output = Command::new(&program).output().unwrap();
    assert!(output.status.success());
    let found: Vec<usize> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    let expected = [
        size_of::<SuiteArgument>(),
        size_of::<WantedArgument>(),
        size_of::<ChangeResult>(),
        offset_of!(WantedArgument, peer),
        offset_of!(WantedArgument, local_id),
        offset_of!(WantedArgument, mode),
        offset_of!(WantedArgument, suites),
        offset_of!(WantedArgument, suite_count),
        offset_of!(WantedArgument, replay_protection),
        offset_of!(WantedArgument, on_break),
        offset_of!(WantedArgument, initiate),
        offset_of!(WantedArgument, late),
        offset_of!(ChangeResult, state),
        offset_of!(ChangeResult, reason),
        offset_of!(SuiteArgument, key_bits),
        offset_of!(SuiteArgument, integ),
    ];
    assert_eq!(found, expected);
}

fn message() -> String {
    // SAFETY: it ends with a zero and stays until the next call.
    unsafe { CStr::from_ptr(latchkey_error()) }.to_str().unwrap().to_owned()
}

#[test]
fn null_and_nonsense_are_refused_by_every_function() {
    let (mut handle, mut small) = (7u64, 7);
    let nowhere = CString::new("/nonexistent/latch.sock").unwrap();
    let not_text = CString::new([0xff, 0xfe]).unwrap();
    let refused = |status: c_int, expected: Status| {
        assert_eq!(status, expected as c_int, "{}", message());
        assert!(!message().is_empty());
    };
    // SAFETY: each pointer is null or points to what the function expects: that is what the test is about.
    unsafe {
        refused(latchkey_open(nowhere.as_ptr(), null_mut()), Status::Argument);
        refused(latchkey_open(not_text.as_ptr(), &raw mut handle), Status::Argument);
        refused(latchkey_open(nowhere.as_ptr(), &raw mut handle), Status::System);
        assert!(message().contains("connecting to /nonexistent/latch.sock"), "{}", message());
        for wrong in [0, 12345, u64::MAX] {
            refused(latchkey_close(wrong), Status::Handle);
            refused(latchkey_release(wrong), Status::Handle);
            refused(latchkey_descriptor(wrong, &raw mut small), Status::Handle);
            refused(latchkey_descriptor(wrong, null_mut()), Status::Argument);
            refused(latchkey_accept(wrong, 0, &raw mut handle), Status::Handle);
            refused(latchkey_accept(wrong, 0, null_mut()), Status::Argument);
            refused(latchkey_whois(wrong, -1, &raw mut handle), Status::Handle);
            refused(latchkey_whois(wrong, -1, null_mut()), Status::Argument);
            refused(latchkey_state(wrong, &raw mut small), Status::Handle);
            refused(latchkey_state(wrong, null_mut()), Status::Argument);
            refused(latchkey_next(wrong, 0, null_mut()), Status::Argument);
            refused(latchkey_wait(wrong, 0, null_mut()), Status::Argument);
            refused(latchkey_get(wrong, 1, null_mut(), 0, null_mut()), Status::Handle);
            refused(latchkey_get_number(wrong, 64, &raw mut handle), Status::Handle);
            refused(latchkey_get_number(wrong, 64, null_mut()), Status::Argument);
            refused(latchkey_channel_binding(wrong, null(), null_mut(), 0, null_mut()), Status::Handle);
            refused(latchkey_channel_binding(wrong, not_text.as_ptr(), null_mut(), 0, null_mut()), Status::Argument);
            refused(latchkey_latch_listener(wrong, 0, null(), &raw mut handle), Status::Argument);
            refused(latchkey_latch_datagrams(wrong, 0, null(), &raw mut handle), Status::Argument);
            refused(latchkey_latch_datagrams(wrong, 0, null(), null_mut()), Status::Argument);
            let (mut length, mut octet) = (7usize, 7u8);
            let buffer = (&raw mut octet).cast();
            refused(latchkey_receive(wrong, 0, buffer, 1, &raw mut length, &raw mut handle), Status::Handle);
            refused(latchkey_receive(wrong, 0, buffer, 1, null_mut(), &raw mut handle), Status::Argument);
            refused(latchkey_receive(wrong, 0, buffer, 1, &raw mut length, null_mut()), Status::Argument);
            assert_eq!((length, octet), (7, 7));
            refused(latchkey_send(wrong, 1, buffer, 1), Status::Handle);
            refused(latchkey_send(wrong, 1, null(), 1), Status::Argument);
            refused(latchkey_send(wrong, 1, buffer, usize::MAX), Status::Argument);
            refused(latchkey_latch_peer(wrong, null(), 0, null(), &raw mut handle), Status::Argument);
            refused(latchkey_latch_peer(wrong, null(), 0, null(), null_mut()), Status::Argument);
            refused(latchkey_peer(wrong, 1, &raw mut handle), Status::Handle);
            refused(latchkey_peer(wrong, 1, null_mut()), Status::Argument);
            refused(latchkey_end_peer(wrong, 1), Status::Handle);
            refused(latchkey_latch_socket(wrong, 0, null(), 0, null(), &raw mut handle), Status::Argument);
            refused(latchkey_latch_socket(wrong, 0, null(), 0, null(), null_mut()), Status::Argument);
            refused(latchkey_bypass_socket(wrong, 0, null(), 0, &raw mut handle), Status::Argument);
            refused(latchkey_bypass_socket(wrong, 0, null(), 0, null_mut()), Status::Argument);
        }
        let mut change = ChangeResult { number: 7, state: 7, reason: [0; 256] };
        refused(latchkey_next(12345, 0, &raw mut change), Status::Handle);
        refused(latchkey_wait(12345, 0, &raw mut change), Status::Handle);
        assert_eq!((change.number, change.state), (7, 7));
    }
    assert_eq!((handle, small), (7, 7), "what fails changes nothing");
    // SAFETY: static strings that end with a zero.
    assert_eq!(unsafe { CStr::from_ptr(latchkey_status_name(-1)) }, c"unknown");
}

#[test]
fn what_is_wanted_is_checked_field_by_field() {
    let peer = CString::new("db.example").unwrap();
    let bad = CString::new("both").unwrap();
    let good = WantedArgument {
        size: size_of::<WantedArgument>(),
        peer: peer.as_ptr(),
        local_id: null(),
        mode: null(),
        suites: null(),
        suite_count: 0,
        replay_protection: 1,
        on_break: 2,
        initiate: 1,
        late: 1,
    };
    // SAFETY: pointers are null or point to strings and structs that live here.
    let read = |wanted: WantedArgument| unsafe { arguments::wanted(&raw const wanted) };
    let wanted = read(good).ok().unwrap();
    assert_eq!((wanted.peer.as_str(), wanted.replay_protection, wanted.late), ("db.example", true, true));
    let suites = [SuiteArgument { encr: 20, key_bits: 256, integ: 0 }];
    let wanted = read(WantedArgument { suites: suites.as_ptr(), suite_count: 1, ..good }).ok().unwrap();
    assert_eq!(wanted.suites[0].key_bits, 256);
    for wrong in [
        WantedArgument { size: 0, ..good },
        WantedArgument { size: usize::MAX, ..good },
        WantedArgument { peer: null(), ..good },
        WantedArgument { mode: bad.as_ptr(), ..good },
        WantedArgument { suite_count: 1, ..good },
        WantedArgument { suites: suites.as_ptr(), suite_count: usize::MAX, ..good },
        WantedArgument { on_break: 4, ..good },
        WantedArgument { initiate: -1, ..good },
    ] {
        assert!(read(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn addresses_are_checked_before_they_are_read() {
    // SAFETY: the octets are as many as is said.
    let read = |octets: &[u8], length: u32| unsafe { arguments::address(octets.as_ptr().cast(), length) };
    let mut four = [0u8; 16];
    four[..2].copy_from_slice(&2u16.to_ne_bytes());
    four[2..8].copy_from_slice(&[0x15, 0x38, 192, 0, 2, 1]);
    assert_eq!(read(&four, 16).ok().unwrap().to_string(), "192.0.2.1:5432");
    for (octets, length) in [(&four[..], 15), (&four, 2), (&four, 0), (&four, u32::MAX), (&[1u8; 28], 28)] {
        assert!(read(octets, length).is_err(), "{length}");
    }
    // SAFETY: null is what is tested.
    assert!(unsafe { arguments::address(null(), 16) }.is_err());
    assert!(arguments::socket(-1).is_err() && arguments::socket(i32::MIN).is_err());
    assert!(arguments::socket(999_999).is_err());
}
