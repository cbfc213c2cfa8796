use proptest::prelude::*;

use super::*;
use crate::secret::Secret;

/// Every suite that we have, with plausible names for failures.
pub(crate) const SUITES: [(Encr, u16, Integ); 11] = [
    (Encr::AES_GCM_16, 128, Integ::NONE),
    (Encr::AES_GCM_16, 192, Integ::NONE),
    (Encr::AES_GCM_16, 256, Integ::NONE),
    (Encr::CHACHA20_POLY1305, 256, Integ::NONE),
    (Encr::AES_CBC, 128, Integ::HMAC_SHA1_96),
    (Encr::AES_CBC, 128, Integ::HMAC_SHA2_256_128),
    (Encr::AES_CBC, 192, Integ::HMAC_SHA2_384_192),
    (Encr::AES_CBC, 256, Integ::HMAC_SHA2_256_128),
    (Encr::AES_CBC, 256, Integ::HMAC_SHA2_512_256),
    (Encr::NULL, 0, Integ::HMAC_SHA2_256_128),
    (Encr::NULL, 0, Integ::HMAC_SHA1_96),
];

#[test]
fn nonsense_combinations_are_refused() {
    for (encr, bits, integ) in [
        (Encr::AES_GCM_16, 128, Integ::HMAC_SHA2_256_128),
        (Encr::CHACHA20_POLY1305, 256, Integ::HMAC_SHA1_96),
        (Encr::CHACHA20_POLY1305, 128, Integ::NONE),
        (Encr::AES_CBC, 256, Integ::NONE),
        (Encr::AES_CBC, 512, Integ::HMAC_SHA2_256_128),
        (Encr::AES_CBC, 0, Integ::HMAC_SHA2_256_128),
        (Encr::NULL, 0, Integ::NONE),
        (Encr::NULL, 128, Integ::HMAC_SHA2_256_128),
        (Encr(3), 192, Integ::HMAC_SHA2_256_128),
        (Encr::AES_CBC, 128, Integ(1)),
    ] {
        assert_eq!(Protection::key_lengths(encr, bits, integ), None, "{encr:?} {bits} {integ:?}");
        let keys = keys(&[0; 20], &[]);
        assert_eq!(Protection::new(encr, bits, integ, &keys).err(), Some(CryptoError::Unsupported));
    }
}

#[test]
fn keys_of_other_lengths_are_refused() {
    for (encr, bits, integ) in SUITES {
        let lengths = Protection::key_lengths(encr, bits, integ).unwrap();
        for (encr_len, integ_len) in [
            (lengths.encr + 1, lengths.integ),
            (lengths.encr, lengths.integ + 1),
            (lengths.encr.wrapping_sub(1).min(99), lengths.integ),
            (lengths.encr, lengths.integ.wrapping_sub(1).min(99)),
        ] {
            let keys = keys(&vec![1; encr_len], &vec![2; integ_len]);
            assert_eq!(Protection::new(encr, bits, integ, &keys).err(), Some(CryptoError::KeyLength));
        }
    }
}

#[test]
fn buffers_of_impossible_lengths_are_refused() {
    for suite in SUITES {
        let protection = any_protection(suite);
        let (iv, icv) = (vec![0; protection.iv_len()], vec![0; protection.icv_len()]);
        let mut text = vec![0; protection.block_len() * 2];
        let long_iv = vec![0; protection.iv_len() + 1];
        assert_eq!(protection.open(&[], &[], &long_iv, &mut text, &icv), Err(CryptoError::Length));
        let (_, short_icv) = icv.split_first().unwrap();
        assert_eq!(protection.open(&[], &[], &iv, &mut text, short_icv), Err(CryptoError::Length));
        if protection.block_len() > 1 {
            let mut odd = vec![0; protection.block_len() + 1];
            assert_eq!(protection.open(&[], &[], &iv, &mut odd, &icv), Err(CryptoError::Length));
            assert_eq!(protection.seal(&[], &[], &iv, &mut odd, &mut icv.clone()), Err(CryptoError::Length));
        }
    }
}

// RFC 7634 Appendix A (ESP) and Appendix B (IKE's Encrypted payload)
#[test]
fn rfc7634_appendix_a_and_b_chacha20_poly1305() {
    let key: Vec<u8> = (0x80..=0xa3).collect();
    let protection = Protection::new(Encr::CHACHA20_POLY1305, 256, Integ::NONE, &keys(&key, &[])).unwrap();
    let iv = hex("1011121314151617");
    check(
        &protection,
        &hex("0102030400000005"),
        &iv,
        &hex("45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec100007362708090a0b0c0d0e0f\
              101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363701020204"),
        &hex("24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb61aa95df\
              ab4c02f72aa71e7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da9165b82829f641e0"),
        &hex("76aaa8266b7fb0f7b11b369907e1ad43"),
    );
    check(
        &protection,
        &hex("c0c1c2c3c4c5c6c7d0d1d2d3d4d5d6d72e202500000000090000004529000029"),
        &iv,
        &hex("0000000c000040010000000a00"),
        &hex("610394701f8d017f7c12924889"),
        &hex("6b71bfe25236efd7cdc67066906315b2"),
    );
}

// The GCM specification, Appendix B, test case 4 (96-bit nonce = salt | explicit IV, RFC 4106 §4)
#[test]
fn gcm_specification_test_case_4() {
    let protection = Protection::new(
        Encr::AES_GCM_16,
        128,
        Integ::NONE,
        &keys(&hex("feffe9928665731c6d6a8f9467308308cafebabe"), &[]),
    )
    .unwrap();
    check(
        &protection,
        &hex("feedfacedeadbeeffeedfacedeadbeefabaddad2"),
        &hex("facedbaddecaf888"),
        &hex("d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525\
              b16aedf5aa0de657ba637b39"),
        &hex("42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa05\
              1ba30b396a0aac973d58e091"),
        &hex("5bc94fbc3221a5db94fae95ae7121a47"),
    );
}

// RFC 3602 §4, cases 1, 2 and 4
#[test]
fn rfc3602_section_4_aes_cbc() {
    for (key, iv, plain, cipher) in [
        (
            "06a9214036b8a15b512e03d534120006",
            "3dafba429d9eb430b422da802c9fac41",
            "53696e676c6520626c6f636b206d7367",
            "e353779c1079aeb82708942dbe77181a",
        ),
        (
            "c286696d887c9aa0611bbb3e2025a45a",
            "562e17996d093d28ddb3ba695a2e6f58",
            "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
            "d296cd94c2cccf8a3a863028b5e1dc0a7586602d253cfff91b8266bea6d61ab1",
        ),
        (
            "56e47a38c5598974bc46903dba290349",
            "8ce82eefbea0da3c44699ed7db51b7d9",
            "a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecf\
             d0d1d2d3d4d5d6d7d8d9dadbdcdddedf",
            "c30e32ffedc0774e6aff6af0869f71aa0f3af07a9a31a9c684db207eb0ef8e4e35907aa632c3ffdf868bb7b29d3d46ad\
             83ce9f9a102ee99d49a53e87f4c3da55",
        ),
    ] {
        let keys = keys(&hex(key), &[7; 32]);
        let protection = Protection::new(Encr::AES_CBC, 128, Integ::HMAC_SHA2_256_128, &keys).unwrap();
        let (mut text, iv, mut icv) = (hex(plain), hex(iv), [0; 16]);
        protection.seal(b"aad", b"esn", &iv, &mut text, &mut icv).unwrap();
        assert_eq!(text, hex(cipher));
        protection.open(b"aad", b"esn", &iv, &mut text, &icv).unwrap();
        assert_eq!(text, hex(plain));
    }
}

// RFC 4868 §2.7.2.1, AUTH256-1: the ICV is the first half of the HMAC
#[test]
fn rfc4868_section_2_7_hmac_sha_256_128() {
    let protection = Protection::new(Encr::NULL, 0, Integ::HMAC_SHA2_256_128, &keys(&[], &[0x0b; 32])).unwrap();
    let mut icv = [0; 16];
    protection.seal(b"Hi", b"re", b"", &mut b" The".to_owned(), &mut icv).unwrap();
    assert_eq!(icv.as_slice(), hex("198a607eb44bfbc69903a0f1cf2bbdc5"));
}

proptest! {
    #[test]
    fn what_is_sealed_opens_and_any_changed_bit_is_noticed(
        suite in proptest::sample::select(SUITES.to_vec()),
        aad in proptest::collection::vec(any::<u8>(), 0..40),
        blocks in 0usize..8,
        fill: u8,
        part in 0usize..4,
        bit: usize,
    ) {
        let protection = any_protection(suite);
        let iv = vec![fill; protection.iv_len()];
        let plain = vec![fill; blocks * protection.block_len()];
        let (mut text, mut icv) = (plain.clone(), vec![0; protection.icv_len()]);
        protection.seal(&aad, b"", &iv, &mut text, &mut icv).unwrap();

        let mut parts = [aad.clone(), iv.clone(), text.clone(), icv.clone()];
        let changed = &mut parts[part];
        if !changed.is_empty() {
            let bit = bit % (changed.len() * 8);
            changed[bit / 8] ^= 1 << (bit % 8);
            let [aad, iv, mut text, icv] = parts;
            prop_assert_eq!(protection.open(&aad, b"", &iv, &mut text, &icv), Err(CryptoError::Integrity));
            if protection.iv_len() > 0 && text.len() >= 8 {
                prop_assert_ne!(&text, &plain);
            }
        }
        protection.open(&aad, b"", &iv, &mut text, &icv).unwrap();
        prop_assert_eq!(text, plain);
    }
}

fn check(protection: &Protection, aad: &[u8], iv: &[u8], plain: &[u8], cipher: &[u8], expected: &[u8]) {
    let mut text = plain.to_vec();
    let mut icv = vec![0; protection.icv_len()];
    protection.seal(aad, &[], iv, &mut text, &mut icv).unwrap();
    assert_eq!((text.as_slice(), icv.as_slice()), (cipher, expected));
    protection.open(aad, &[], iv, &mut text, &icv).unwrap();
    assert_eq!(text, plain);
}

pub(crate) fn any_protection((encr, bits, integ): (Encr, u16, Integ)) -> Protection {
    let lengths = Protection::key_lengths(encr, bits, integ).unwrap();
    let keys = keys(&vec![0x5a; lengths.encr], &vec![0xa5; lengths.integ]);
    Protection::new(encr, bits, integ, &keys).unwrap()
}

pub(crate) fn keys(encr: &[u8], integ: &[u8]) -> EspKeys {
    EspKeys { encr: Secret::new(encr.to_vec()), integ: Secret::new(integ.to_vec()) }
}

pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}
