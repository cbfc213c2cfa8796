use proptest::prelude::*;

use super::*;
use crate::crypto::tests::{SUITES, any_protection, hex, keys};
use crate::transform::{Encr, Integ};

// RFC 7634 Appendix A: the whole ESP packet
#[test]
fn rfc7634_appendix_a_packet() {
    let key: Vec<u8> = (0x80..=0xa3).collect();
    let protection = Protection::new(Encr::CHACHA20_POLY1305, 256, Integ::NONE, &keys(&key, &[])).unwrap();
    let inner = hex("45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec100007362708090a0b0c0d0e0f\
                     101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637");
    let mut out = Vec::new();
    seal_with_iv(&protection, 0x0102_0304, 5, false, &hex("1011121314151617"), whole(4, &inner), &mut out).unwrap();
    assert_eq!(
        out,
        hex("0102030400000005101112131415161724039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c6\
             14ee8099d52844eb61aa95dfab4c02f72aa71e7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da\
             9165b82829f641e076aaa8266b7fb0f7b11b369907e1ad43")
    );
    assert_eq!(Header::read(&out), Some(Header { spi: 0x0102_0304, sequence_low: 5 }));
    assert_eq!(open(&protection, 5, false, &mut out).unwrap(), (4, inner.clone().as_mut_slice()));
}

// RFC 3602 §4, case 5: transport mode, AES-CBC, padding 1…14
#[test]
fn rfc3602_section_4_case_5_packet() {
    let keys = keys(&hex("90d382b410eeba7ad938c46cec1a82bf"), &[3; 32]);
    let protection = Protection::new(Encr::AES_CBC, 128, Integ::HMAC_SHA2_256_128, &keys).unwrap();
    let payload = hex("08000ebda70a00008e9c083db95b070008090a0b0c0d0e0f1011121314151617\
                       18191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637");
    let mut out = Vec::new();
    let iv = hex("e96e8c08ab465763fd098d45dd3ff893");
    seal_with_iv(&protection, 0x4321, 1, false, &iv, whole(1, &payload), &mut out).unwrap();
    out.truncate(out.len() - 16);
    assert_eq!(
        out,
        hex("0000432100000001e96e8c08ab465763fd098d45dd3ff893\
             f663c25d325c18c6a9453e194e120849a4870b66cc6b9965330013b4898dc856\
             a4699e523a55db080b59ec3a8e4b7e52775b07d1db34ed9c538ab50c551b874aa269add047ad2d5913ac19b7cfbad4a6")
    );
}

#[test]
fn packets_too_short_for_their_parts_are_malformed() {
    for suite in SUITES {
        let protection = any_protection(suite);
        for length in 0..sealed_len(&protection, 0) {
            assert_eq!(open(&protection, 1, false, &mut vec![0; length]), Err(OpenError::Malformed));
        }
    }
}

// RFC 4303 §2.4: the receiver inspects the padding
#[test]
fn padding_that_does_not_count_up_is_refused_although_authentic() {
    let protection = any_protection(SUITES[0]);
    for (trailer, expected) in [
        (&[1, 2, 3, 3, 4], Ok(())),
        (&[9, 9, 9, 0, 4], Ok(())),
        (&[1, 2, 9, 3, 4], Err(OpenError::Padding)),
        (&[0, 1, 2, 3, 4], Err(OpenError::Padding)),
        (&[1, 2, 3, 255, 4], Err(OpenError::Padding)),
        (&[1, 2, 3, 8, 4], Err(OpenError::Padding)),
    ] {
        let mut text = [b"abc".as_slice(), trailer].concat();
        let authenticated = Authenticated::new(&protection, 0x1234, 7, false);
        let mut icv = [0; 16];
        protection.seal(authenticated.aad(), &[], &[0; 8], &mut text, &mut icv).unwrap();
        let mut packet = [&hex("00001234 00000007"), [0; 8].as_slice(), &text, &icv].concat();
        assert_eq!(open(&protection, 7, false, &mut packet).map(|_| ()), expected, "{trailer:?}");
    }
}

proptest! {
    #[test]
    fn what_is_sealed_opens_with_the_same_number_only(
        suite in proptest::sample::select(SUITES.to_vec()),
        payload in proptest::collection::vec(any::<u8>(), 0..200),
        sequence: u64,
        extended: bool,
        next_header: u8,
    ) {
        let protection = any_protection(suite);
        let sequence = if extended { sequence } else { sequence & 0xffff_ffff };
        let mut out = Vec::new();
        seal(&protection, 0xdead_beef, sequence, extended, whole(next_header, &payload), &mut out).unwrap();
        prop_assert_eq!(out.len(), sealed_len(&protection, payload.len()));
        prop_assert!((out.len() - HEADER_LEN - protection.iv_len() - protection.icv_len()).is_multiple_of(4));
        if extended {
            // RFC 4303 §2.2.1: the high half is not sent, but authenticated.
            let other = sequence ^ (1 << 40);
            let mut copy = out.clone();
            prop_assert_eq!(open(&protection, other, true, &mut copy), Err(OpenError::Integrity));
        }
        let (found, opened) = open(&protection, sequence, extended, &mut out).unwrap();
        prop_assert_eq!((found, &*opened), (next_header, payload.as_slice()));
    }

    #[test]
    fn any_changed_bit_is_noticed(
        suite in proptest::sample::select(SUITES.to_vec()),
        payload in proptest::collection::vec(any::<u8>(), 0..100),
        extended: bool,
        bit: prop::sample::Index,
    ) {
        let protection = any_protection(suite);
        let mut out = Vec::new();
        seal(&protection, 0xdead_beef, 77, extended, whole(4, &payload), &mut out).unwrap();
        let bit = bit.index(out.len() * 8);
        out[bit / 8] ^= 1 << (bit % 8);
        // With combined modes and others alike the full number comes from the window, so the low half in the
        // packet is not what is checked: a changed one shows in the number.
        let low = u64::from(Header::read(&out).unwrap().sequence_low);
        prop_assert_eq!(open(&protection, low, extended, &mut out), Err(OpenError::Integrity));
    }

    #[test]
    fn the_longest_payload_fits_and_one_octet_more_does_not(
        suite in proptest::sample::select(SUITES.to_vec()),
        length in 0usize..3000,
    ) {
        let protection = any_protection(suite);
        match longest_payload(&protection, length) {
            Some(payload) => {
                prop_assert!(sealed_len(&protection, payload) <= length);
                prop_assert!(sealed_len(&protection, payload + 1) > length);
            }
            None => prop_assert!(sealed_len(&protection, 0) > length),
        }
    }

    #[test]
    fn opening_noise_never_panics(
        suite in proptest::sample::select(SUITES.to_vec()),
        mut noise in proptest::collection::vec(any::<u8>(), 0..120),
    ) {
        prop_assert!(open(&any_protection(suite), 9, true, &mut noise).is_err());
    }
}

/// Without padding for traffic flow confidentiality.
fn whole(next_header: u8, octets: &[u8]) -> Payload<'_> {
    Payload { next_header, octets, tfc: 0 }
}
