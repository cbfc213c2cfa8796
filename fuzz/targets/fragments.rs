#![no_main]

libfuzzer_sys::fuzz_target!(|octets: &[u8]| latchkey_ike::fuzzing::fragments(octets));
