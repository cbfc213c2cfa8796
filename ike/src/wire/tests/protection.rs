use std::collections::BTreeSet;

use data_encoding::HEXLOWER;
use ipsec::transform::Protocol;

use super::*;

fn open(datagram: &[u8], protection: &Protection, reassembly: &mut Reassembly) -> Result<OpenOutcome, OpenError> {
    closed(datagram).open(protection, reassembly)
}

fn whole(outcome: Result<OpenOutcome, OpenError>) -> Opened {
    match outcome {
        Ok(OpenOutcome::Whole(opened)) => opened,
        other => panic!("{other:?}"),
    }
}

fn pending(outcome: &Result<OpenOutcome, OpenError>) -> bool {
    matches!(outcome, Ok(OpenOutcome::Pending))
}

fn refused(outcome: &Result<OpenOutcome, OpenError>) -> bool {
    matches!(outcome, Err(OpenError::Wire(_)))
}

fn gcm() -> Protection {
    keyed(SUITES[2], 7)
}

/// Seals a body that need not be a payload chain, as fragments that need not be a set.
fn fragment(header: &Header, number: u16, total: u16, content: &[u8], protection: &Protection) -> Vec<u8> {
    let fields = [number.to_be_bytes(), total.to_be_bytes()].concat();
    let iv =
        [number.to_be_bytes(), total.to_be_bytes(), [0; 2], header.message_id.to_be_bytes()[2..].try_into().unwrap()]
            .concat();
    let mut text = [content, &[0]].concat();
    let length = HEADER + GENERIC_HEADER + 4 + 8 + text.len() + 16;
    let mut out = encode_header(header, SKF, length).unwrap();
    out.extend_from_slice(&[if number == 1 { 37 } else { 0 }, 0]);
    out.extend_from_slice(&u16::try_from(length - HEADER).unwrap().to_be_bytes());
    out.extend_from_slice(&fields);
    let mut icv = [0; 16];
    protection.seal(&out, &[], &iv, &mut text, &mut icv).unwrap();
    out.extend_from_slice(&iv);
    out.extend_from_slice(&text);
    out.extend_from_slice(&icv);
    out
}

// RFC 7634 Appendix B
#[test]
fn the_published_chacha20_poly1305_message_opens() {
    let datagram = HEXLOWER
        .decode(
            concat!(
                "c0c1c2c3c4c5c6c7d0d1d2d3d4d5d6d72e202500000000090000004529000029",
                "1011121314151617610394701f8d017f7c129248896b71bfe25236efd7cdc670",
                "66906315b2"
            )
            .as_bytes(),
        )
        .unwrap();
    let key: Vec<u8> = (0x80..=0x9f).chain(0xa0..=0xa3).collect();
    let keys = EspKeys { encr: Secret::new(key), integ: Secret::new(Vec::new()) };
    let protection = Protection::new(Encr::CHACHA20_POLY1305, 256, Integ::NONE, &keys).unwrap();

    let opened = whole(open(&datagram, &protection, &mut Reassembly::default()));
    assert_eq!(opened.header.exchange, ExchangeType::INFORMATIONAL);
    assert_eq!((opened.header.message_id, opened.header.response), (9, false));
    let notify = Notify {
        protocol: Protocol::NONE,
        spi: Vec::new(),
        kind: NotifyType::SET_WINDOW_SIZE,
        data: vec![0, 0, 0, 10],
    };
    assert_eq!(parse_payloads(opened.first, &opened.body).unwrap(), [Payload::Notify(notify)]);
}

#[test]
fn a_message_with_any_bit_changed_is_not_opened() {
    for suite in SUITES {
        for max_length in [None, Some(200)] {
            let protection = keyed(suite, 7);
            let sealed = seal(&header(), &certificate(150), &protection, max_length, &mut Counting(1)).remove(0);
            for bit in 0..sealed.len() * 8 {
                let mut forged = sealed.clone();
                forged[bit / 8] ^= 1 << (bit % 8);
                if let Ok(Incoming::Protected(protected)) = parse(&forged) {
                    let mut reassembly = Reassembly::default();
                    assert!(protected.open(&protection, &mut reassembly).is_err(), "{suite:?} bit {bit}");
                    assert!(reassembly.pending.is_none());
                }
            }
        }
    }
}

#[test]
fn a_message_under_other_keys_is_not_opened() {
    for suite in SUITES {
        let sealed = seal(&header(), &certificate(10), &keyed(suite, 7), None, &mut Counting(1));
        let outcome = open(&sealed[0], &keyed(suite, 8), &mut Reassembly::default());
        assert_eq!(outcome.unwrap_err(), OpenError::Integrity);
    }
}

#[test]
fn a_message_too_short_for_its_cipher_is_refused() {
    for suite in SUITES {
        let protection = keyed(suite, 7);
        for content in 0..protection.iv_len() + protection.icv_len() + protection.block_len() {
            let length = HEADER + GENERIC_HEADER + content;
            let mut datagram = encode_header(&header(), SK, length).unwrap();
            datagram.extend_from_slice(&[0, 0]);
            datagram.extend_from_slice(&u16::try_from(GENERIC_HEADER + content).unwrap().to_be_bytes());
            datagram.resize(length, 0);
            assert!(refused(&open(&datagram, &protection, &mut Reassembly::default())), "{suite:?} {content}");
        }
    }
}

// RFC 7296 §3.14: authentic, but the padding is longer than what it pads.
#[test]
fn impossible_padding_is_refused() {
    let protection = gcm();
    for (text, possible) in
        [(&[0_u8][..], true), (&[1], false), (&[9, 9, 2], true), (&[9, 9, 3], false), (&[255], false)]
    {
        let length = HEADER + GENERIC_HEADER + 8 + text.len() + 16;
        let mut datagram = encode_header(&header(), SK, length).unwrap();
        datagram.extend_from_slice(&[0, 0]);
        datagram.extend_from_slice(&u16::try_from(length - HEADER).unwrap().to_be_bytes());
        let (mut text, mut icv) = (text.to_vec(), [0; 16]);
        protection.seal(&datagram, &[], &[1; 8], &mut text, &mut icv).unwrap();
        datagram.extend([&[1; 8][..], &text, &icv].concat());
        let outcome = open(&datagram, &protection, &mut Reassembly::default());
        assert_eq!(matches!(outcome, Ok(OpenOutcome::Whole(_))), possible);
        assert_eq!(refused(&outcome), !possible);
    }
}

#[test]
fn an_empty_message_is_sealed_and_opened() {
    for suite in SUITES {
        let protection = keyed(suite, 7);
        let sealed = seal(&header(), &[], &protection, Some(1), &mut Counting(1));
        assert_eq!(sealed.len(), 1);
        let opened = whole(open(&sealed[0], &protection, &mut Reassembly::default()));
        assert_eq!((opened.first, opened.body), (0, Vec::new()));
    }
}

// RFC 5282 §3.1: no nonce twice under a key.
#[test]
fn no_two_messages_or_fragments_share_an_aead_iv() {
    let protection = gcm();
    let mut ivs = BTreeSet::new();
    let mut messages = 0;
    for message_id in [0, 1, 2, 255, 256, 65_536, u32::MAX] {
        for response in [false, true] {
            for max_length in [None, Some(400), Some(800)] {
                let header = Header { message_id, response, ..header() };
                for sealed in seal(&header, &certificate(3000), &protection, max_length, &mut Counting(1)) {
                    let at = if sealed[16] == SKF { 36 } else { 32 };
                    assert!(ivs.insert(sealed[at..at + 8].to_vec()));
                    messages += 1;
                }
            }
        }
    }
    assert!(messages > 100);
}

#[test]
fn cbc_ivs_come_from_the_source_of_randomness() {
    let protection = keyed(SUITES[6], 7);
    let mut rng = Counting(1);
    let one = seal(&header(), &certificate(1), &protection, None, &mut rng).remove(0);
    let other = seal(&header(), &certificate(1), &protection, None, &mut rng).remove(0);
    assert_ne!(one[32..48], other[32..48]);
    let again = seal(&header(), &certificate(1), &protection, None, &mut Counting(1)).remove(0);
    assert_eq!(one, again);
}

#[test]
fn a_message_that_cannot_be_expressed_is_not_sealed() {
    let protection = gcm();
    assert!(seal(&header(), &certificate(65_531), &protection, None, &mut Counting(1)).is_empty());
    assert!(seal(&header(), &certificate(65_480), &protection, None, &mut Counting(1)).is_empty());
    // Each payload is short enough, and so is each fragment.
    assert!(!seal(&header(), &certificate(65_400), &protection, Some(1200), &mut Counting(1)).is_empty());
}

// RFC 7383 §2.5
#[test]
fn small_messages_are_not_fragmented() {
    let protection = gcm();
    let whole = seal(&header(), &certificate(300), &protection, None, &mut Counting(1)).remove(0);
    for (max_length, fragments) in [(whole.len(), 1), (whole.len() - 1, 2)] {
        let sealed = seal(&header(), &certificate(300), &protection, Some(max_length), &mut Counting(1));
        assert_eq!(sealed.len(), fragments);
        assert_eq!(closed(&sealed[0]).is_fragment(), fragments > 1);
    }
}

#[test]
fn fragments_are_never_more_than_a_receiver_takes() {
    for suite in SUITES {
        let protection = keyed(suite, 7);
        for max_length in [0, 1, 60, 100, 130] {
            let sealed = seal(&header(), &certificate(20_000), &protection, Some(max_length), &mut Counting(1));
            assert!(sealed.len() > 1 && sealed.len() <= usize::from(MAX_FRAGMENTS));
            let mut reassembly = Reassembly::default();
            let (last, others) = sealed.split_last().unwrap();
            for fragment in others {
                assert!(pending(&open(fragment, &protection, &mut reassembly)));
            }
            whole(open(last, &protection, &mut reassembly));
        }
    }
}

// RFC 7383 §2.6
#[test]
fn impossible_fragment_numbers_are_refused() {
    let protection = gcm();
    for (number, total, possible) in
        [(0, 0, false), (0, 2, false), (3, 2, false), (1, 256, false), (u16::MAX, u16::MAX, false), (1, 255, true)]
    {
        let datagram = fragment(&header(), number, total, b"x", &protection);
        assert_eq!(parse(&datagram).is_ok(), possible, "{number} of {total}");
    }
}

// RFC 7383 §2.6: with a missing fragment nothing comes out; a forged one does not take its place.
#[test]
fn a_forged_fragment_takes_no_place() {
    let protection = gcm();
    let sealed = seal(&header(), &certificate(1000), &protection, Some(400), &mut Counting(1));
    let forged = seal(&header(), &certificate(1000), &keyed(SUITES[2], 8), Some(400), &mut Counting(1));
    let mut reassembly = Reassembly::default();
    for (forged, real) in forged.iter().zip(&sealed).skip(1) {
        assert_eq!(open(forged, &protection, &mut reassembly).unwrap_err(), OpenError::Integrity);
        assert!(pending(&open(real, &protection, &mut reassembly)));
        // Once the real one is there, others with its number are not looked at.
        assert!(pending(&open(forged, &protection, &mut reassembly)));
    }
    // Nor does a forged one of another set or message drop what is there.
    let other_set = fragment(&header(), 1, 200, b"x", &keyed(SUITES[2], 8));
    assert_eq!(open(&other_set, &protection, &mut reassembly).unwrap_err(), OpenError::Integrity);
    let other_message = fragment(&Header { message_id: 2, ..header() }, 1, 3, b"x", &keyed(SUITES[2], 8));
    assert_eq!(open(&other_message, &protection, &mut reassembly).unwrap_err(), OpenError::Integrity);
    let opened = whole(open(&sealed[0], &protection, &mut reassembly));
    assert_eq!(parse_payloads(opened.first, &opened.body).unwrap(), certificate(1000));
}

// RFC 7383 §2.5.2, §2.6: a larger total is a newer set, a smaller one an older set.
#[test]
fn sets_of_fragments_do_not_mix() {
    let protection = gcm();
    let first = seal(&header(), &certificate(1000), &protection, Some(600), &mut Counting(1));
    let second = seal(&header(), &certificate(1000), &protection, Some(300), &mut Counting(1));
    assert!(first.len() < second.len());
    let mut reassembly = Reassembly::default();
    assert!(pending(&open(&first[0], &protection, &mut reassembly)));
    assert!(pending(&open(&second[1], &protection, &mut reassembly)));
    // The first set is dropped and stays so.
    for fragment in &first {
        assert!(refused(&open(fragment, &protection, &mut reassembly)));
    }
    for fragment in &second[2..] {
        assert!(pending(&open(fragment, &protection, &mut reassembly)));
    }
    let opened = whole(open(&second[0], &protection, &mut reassembly));
    assert_eq!(parse_payloads(opened.first, &opened.body).unwrap(), certificate(1000));
    assert!(reassembly.pending.is_none());
}

#[test]
fn a_later_message_drops_the_fragments_of_an_earlier_one() {
    let protection = gcm();
    let seal = |message_id, max_length| {
        seal(&Header { message_id, ..header() }, &certificate(500), &protection, max_length, &mut Counting(1))
    };
    let mut reassembly = Reassembly::default();
    assert!(pending(&open(&seal(5, Some(400))[0], &protection, &mut reassembly)));
    // A replayed fragment of an earlier message changes nothing, nor does a whole one.
    assert!(refused(&open(&seal(4, Some(400))[0], &protection, &mut reassembly)));
    whole(open(&seal(4, None)[0], &protection, &mut reassembly));
    assert_eq!(reassembly.pending.as_ref().unwrap().header.message_id, 5);
    assert!(pending(&open(&seal(6, Some(400))[0], &protection, &mut reassembly)));
    assert_eq!(reassembly.pending.as_ref().unwrap().header.message_id, 6);
    whole(open(&seal(6, None)[0], &protection, &mut reassembly));
    assert!(reassembly.pending.is_none());
}

#[test]
fn fragments_of_one_message_have_one_header() {
    let protection = gcm();
    let mut reassembly = Reassembly::default();
    assert!(pending(&open(&fragment(&header(), 1, 2, b"x", &protection), &protection, &mut reassembly)));
    for other in [
        Header { exchange: ExchangeType::INFORMATIONAL, ..header() },
        Header { response: true, ..header() },
        Header { from_initiator: false, ..header() },
        Header { initiator_spi: 1, ..header() },
    ] {
        assert!(refused(&open(&fragment(&other, 2, 2, b"x", &protection), &protection, &mut reassembly)));
    }
    whole(open(&fragment(&header(), 2, 2, b"x", &protection), &protection, &mut reassembly));
}

#[test]
fn fragments_of_more_than_a_message_are_refused_and_dropped() {
    let protection = gcm();
    let mut reassembly = Reassembly::default();
    let content = vec![7; 32_768];
    assert!(pending(&open(&fragment(&header(), 1, 3, &content, &protection), &protection, &mut reassembly)));
    assert!(refused(&open(&fragment(&header(), 2, 3, &content, &protection), &protection, &mut reassembly)));
    assert!(reassembly.pending.is_none());
}

// RFC 7383 §2.5.3: a fragment may be without content.
#[test]
fn empty_fragments_count() {
    let protection = gcm();
    let mut reassembly = Reassembly::default();
    assert!(pending(&open(&fragment(&header(), 1, 2, b"", &protection), &protection, &mut reassembly)));
    let opened = whole(open(&fragment(&header(), 2, 2, b"body", &protection), &protection, &mut reassembly));
    assert_eq!((opened.first, opened.body), (37, b"body".to_vec()));
}

// RFC 7383 §2.6.1
#[test]
fn the_first_fragment_is_told_from_later_ones() {
    let protection = gcm();
    let sealed = seal(&header(), &certificate(1000), &protection, Some(400), &mut Counting(1));
    let later: Vec<bool> = sealed.iter().map(|fragment| closed(fragment).is_later_fragment()).collect();
    assert_eq!(later, [false, true, true, true]);
    let sealed = seal(&header(), &certificate(1000), &protection, None, &mut Counting(1));
    assert!(!closed(&sealed[0]).is_later_fragment());
}

#[test]
fn what_is_sealed_opens_to_the_same_payloads() {
    for suite in SUITES {
        for length in 0..40 {
            let protection = keyed(suite, 7);
            let payloads = certificate(length);
            let sealed = seal(&header(), &payloads, &protection, None, &mut Counting(1));
            assert_eq!(sealed.len(), 1);
            let outcome = closed(&sealed[0]).open(&protection, &mut Reassembly::default()).unwrap();
            let OpenOutcome::Whole(opened) = outcome else { panic!("pending") };
            assert_eq!(opened.header, header());
            assert_eq!(parse_payloads(opened.first, &opened.body).unwrap(), payloads);
        }
    }
}

// RFC 7383 §2.5
#[test]
fn fragments_open_to_the_whole_message_in_any_order() {
    for suite in SUITES {
        let protection = keyed(suite, 7);
        let payloads = certificate(3000);
        let mut sealed = seal(&header(), &payloads, &protection, Some(548), &mut Counting(1));
        assert!(sealed.len() > 5);
        assert!(sealed.iter().all(|fragment| fragment.len() <= 548));
        sealed.reverse();
        let mut reassembly = Reassembly::default();
        let last = sealed.pop().unwrap();
        for fragment in &sealed {
            for _ in 0..2 {
                let outcome = closed(fragment).open(&protection, &mut reassembly).unwrap();
                assert!(matches!(outcome, OpenOutcome::Pending));
            }
        }
        let OpenOutcome::Whole(opened) = closed(&last).open(&protection, &mut reassembly).unwrap() else {
            panic!("pending")
        };
        assert_eq!(parse_payloads(opened.first, &opened.body).unwrap(), payloads);
    }
}

// RFC 7296 §3.14, RFC 5282 §5.1, RFC 7383 §2.5
#[test]
fn messages_of_an_independent_implementation_open() {
    let text = include_str!("../../../tests/vectors/protected.txt");
    let hex = |line: &str, name: &str| {
        let value = line.strip_prefix(name).and_then(|rest| rest.strip_prefix(" =")).unwrap();
        HEXLOWER.decode(value.trim().as_bytes()).unwrap()
    };
    let mut lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let body = hex(lines.next().unwrap(), "body");
    let lines: Vec<&str> = lines.collect();
    assert_eq!(lines.len(), 7 * 6);
    for vector in lines.chunks(6) {
        let [head, encr_key, integ_key, sk, skf_1, skf_2] = vector else { panic!() };
        let head: Vec<&str> = head.trim_matches(['[', ']']).split(", ").collect();
        let encr = match head[0] {
            "AES_CBC" => Encr::AES_CBC,
            "AES_GCM_16" => Encr::AES_GCM_16,
            _ => Encr::CHACHA20_POLY1305,
        };
        let integ = match head[2] {
            "HMAC_SHA1_96" => Integ::HMAC_SHA1_96,
            "HMAC_SHA2_256_128" => Integ::HMAC_SHA2_256_128,
            "HMAC_SHA2_384_192" => Integ::HMAC_SHA2_384_192,
            "HMAC_SHA2_512_256" => Integ::HMAC_SHA2_512_256,
            _ => Integ::NONE,
        };
        let keys =
            EspKeys { encr: Secret::new(hex(encr_key, "encr_key")), integ: Secret::new(hex(integ_key, "integ_key")) };
        let protection = Protection::new(encr, head[1].parse().unwrap(), integ, &keys).unwrap();
        let mut reassembly = Reassembly::default();
        assert!(pending(&open(&hex(skf_1, "skf_1"), &protection, &mut reassembly)));
        for opened in [
            whole(open(&hex(skf_2, "skf_2"), &protection, &mut reassembly)),
            whole(open(&hex(sk, "sk"), &protection, &mut Reassembly::default())),
        ] {
            assert_eq!((opened.first, &opened.body), (37, &body));
            assert_eq!(parse_payloads(opened.first, &opened.body).unwrap().len(), 2);
        }
    }
}

// RFC 9242 §3.3.2: reserved bits outside the encryption are authenticated as they came.
#[test]
fn reserved_bits_are_authenticated_as_received() {
    for suite in SUITES {
        let protection = keyed(suite, 3);
        let payloads = [Payload::Nonce(vec![1; 32])];
        let mut sealed = seal(&header(), &payloads, &protection, None, &mut Counting(1)).remove(0);
        let unchanged = plain_octets(&header(), &payloads).unwrap();
        // Opened by hand, changed, and sealed again.
        let (aad, rest) = sealed.split_at_mut(HEADER + GENERIC_HEADER);
        let (iv, rest) = rest.split_at_mut(protection.iv_len());
        let (text, icv) = rest.split_at_mut(rest.len() - protection.icv_len());
        protection.open(aad, &[], iv, text, icv).unwrap();
        aad[HEADER + 1] = 0x7f;
        aad[19] |= 0xc7;
        protection.seal(aad, &[], iv, text, icv).unwrap();
        let opened = whole(open(&sealed, &protection, &mut Reassembly::default()));
        let octets = opened.plain_octets().unwrap();
        assert_eq!((octets[HEADER + 1], octets[19]), (0x7f, unchanged[19] | 0xc7));
        let mut back = octets;
        (back[HEADER + 1], back[19]) = (0, unchanged[19]);
        assert_eq!(back, unchanged);
    }
}
