use proptest::prelude::*;

use super::*;
use crate::secret::Secret;

/// Every suite that we have, with plausible names for failures.
pub(crate) const SUITES: [(Encr, u16, Integ); 24] = [
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
    (Encr::NULL, 0, Integ::AES_CMAC_96),
    (Encr::AES_CBC, 128, Integ::AES_CMAC_96),
    (Encr::AES_CTR, 128, Integ::HMAC_SHA2_256_128),
    (Encr::AES_CTR, 192, Integ::HMAC_SHA2_384_192),
    (Encr::AES_CTR, 256, Integ::AES_CMAC_96),
    (Encr::AES_CCM_8, 128, Integ::NONE),
    (Encr::AES_CCM_12, 192, Integ::NONE),
    (Encr::AES_CCM_16, 256, Integ::NONE),
    (Encr::AES_GCM_8, 128, Integ::NONE),
    (Encr::AES_GCM_12, 192, Integ::NONE),
    (Encr::AES_GCM_12, 256, Integ::NONE),
    (Encr::NULL_AUTH_AES_GMAC, 128, Integ::NONE),
    (Encr::NULL_AUTH_AES_GMAC, 256, Integ::NONE),
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
        (Encr::AES_CTR, 128, Integ::NONE),
        (Encr::AES_CTR, 160, Integ::HMAC_SHA2_256_128),
        (Encr::AES_CCM_8, 128, Integ::AES_CMAC_96),
        (Encr::AES_CCM_16, 0, Integ::NONE),
        (Encr::AES_GCM_12, 64, Integ::NONE),
        (Encr::NULL_AUTH_AES_GMAC, 128, Integ::HMAC_SHA2_256_128),
        (Encr::NULL_AUTH_AES_GMAC, 0, Integ::NONE),
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

// The same case with the tag cut (RFC 4106 §6)
#[test]
fn short_gcm_icvs_are_the_beginning_of_the_tag() {
    for (encr, icv) in [(Encr::AES_GCM_8, "5bc94fbc3221a5db"), (Encr::AES_GCM_12, "5bc94fbc3221a5db94fae95a")] {
        let keys = keys(&hex("feffe9928665731c6d6a8f9467308308cafebabe"), &[]);
        check(
            &Protection::new(encr, 128, Integ::NONE, &keys).unwrap(),
            &hex("feedfacedeadbeeffeedfacedeadbeefabaddad2"),
            &hex("facedbaddecaf888"),
            &hex("d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525\
                  b16aedf5aa0de657ba637b39"),
            &hex("42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa05\
                  1ba30b396a0aac973d58e091"),
            &hex(icv),
        );
    }
}

// draft-mcgrew-gcm-test-01: associated data are SPI, sequence number, IV and the whole payload (RFC 4543 §3,
// figure 4)
#[test]
fn gmac_of_an_esp_packet() {
    let keys = keys(&hex("4c80cdefbb5d10da906ac73c3613a63422433c64"), &[]);
    let packet = hex("45000030da3a00008001df3bc0a80005c0a800010800c6cd020007006162636465666768696a6b6c6d6e6f70\
                      7172737401020201");
    check(
        &Protection::new(Encr::NULL_AUTH_AES_GMAC, 128, Integ::NONE, &keys).unwrap(),
        &hex("0000432100000007"),
        &[0; 8],
        &packet,
        &packet,
        &hex("f2a9a836e155106aa8dcd618e4099aaa"),
    );
}

// RFC 4309 §8 refers to vectors for nonces of other lengths; these were computed with OpenSSL 3.0.
#[test]
fn ccm_with_a_nonce_of_eleven_octets() {
    for (encr, key_len, cipher, icv) in [
        (
            Encr::AES_CCM_8,
            16,
            "c6fcee5c4ae5999c7e37ba8e08ea1084c523b416ddc751baca2cb1c494376034cb42cd32a20a2db1accd0a2f",
            "5f4b0af82b0127b1",
        ),
        (
            Encr::AES_CCM_12,
            24,
            "d9fb8d7786b9e7951f2ccd8b1c57efe493745f3901ca2518bb587d0cc28fcea654b8e568012ad5eba3991a59",
            "bcaebdb592febbcd4e7d8002",
        ),
        (
            Encr::AES_CCM_16,
            32,
            "3257d3070b39b49cac32ae6ee76f1fc6b732805cec9f511a424cd4c75fe7bcbd5c995a0132f36e5bac4b8ae0",
            "75c5c42f1ae95f9eab3ea98f19631440",
        ),
    ] {
        let key: Vec<u8> = (0x40..).take(key_len).chain([0xa0, 0xa1, 0xa2]).collect();
        let bits = u16::try_from(8 * key_len).unwrap();
        check(
            &Protection::new(encr, bits, Integ::NONE, &keys(&key, &[])).unwrap(),
            &hex("0102030400000005"),
            &hex("1011121314151617"),
            &(0..44).collect::<Vec<u8>>(),
            &hex(cipher),
            &hex(icv),
        );
    }
}

// RFC 3686 §6, vectors 1, 3, 6 and 9
#[test]
fn rfc3686_section_6_aes_ctr() {
    let counting: Vec<u8> = (0..36).collect();
    for (bits, key, nonce, iv, plain, cipher) in [
        (
            128,
            "ae6852f8121067cc4bf7a5765577f39e",
            "00000030",
            "0000000000000000",
            b"Single block msg".to_vec(),
            "e4095d4fb7a7b3792d6175a3261311b8",
        ),
        (
            128,
            "7691be035e5020a8ac6e618529f9a0dc",
            "00e0017b",
            "27777f3f4a1786f0",
            counting.clone(),
            "c1cf48a89f2ffdd9cf4652e9efdb72d74540a42bde6d7836d59a5ceaaef3105325b2072f",
        ),
        (
            192,
            "02bf391ee8ecb159b959617b0965279bf59b60a786d3e0fe",
            "0007bdfd",
            "5cbd60278dcc0912",
            counting.clone(),
            "96893fc55e5c722f540b7dd1ddf7e758d288bc95c69165884536c811662f2188abee0935",
        ),
        (
            256,
            "ff7a617ce69148e4f1726e2f43581de2aa62d9f805532edff1eed687fb54153d",
            "001cc5b7",
            "51a51d70a1c11148",
            counting.clone(),
            "eb6c52821d0bbbf7ce7594462aca4faab407df866569fd07f48cc0b583d6071f1ec0e6b8",
        ),
    ] {
        let keys = keys(&hex(&format!("{key}{nonce}")), &[7; 32]);
        let protection = Protection::new(Encr::AES_CTR, bits, Integ::HMAC_SHA2_256_128, &keys).unwrap();
        let (mut text, mut icv) = (plain.clone(), [0; 16]);
        protection.seal(b"aad", b"esn", &hex(iv), &mut text, &mut icv).unwrap();
        assert_eq!(text, hex(cipher));
        protection.open(b"aad", b"esn", &hex(iv), &mut text, &icv).unwrap();
        assert_eq!(text, plain);
    }
}

// RFC 4494 §5: the ICV is the first 96 bits of the CMAC
#[test]
fn rfc4494_section_5_aes_cmac_96() {
    let keys = keys(&[], &hex("2b7e151628aed2a6abf7158809cf4f3c"));
    let protection = Protection::new(Encr::NULL, 0, Integ::AES_CMAC_96, &keys).unwrap();
    let message =
        hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52ef\
                       f69f2445df4f9b17ad2b417be66c3710");
    for (length, expected) in [
        (0, "bb1d6929e95937287fa37d12"),
        (16, "070a16b46b4d4144f79bdd9d"),
        (40, "dfa66747de9ae63030ca3261"),
        (64, "51f0bebf7e3b9d92fc497417"),
    ] {
        // Wherever the parts meet, the tag is one of the whole.
        for split in [0, length / 3, length] {
            let (aad, text) = message[..length].split_at(split);
            let mut icv = [0; 12];
            protection.seal(aad, b"", b"", &mut text.to_vec(), &mut icv).unwrap();
            assert_eq!(icv.as_slice(), hex(expected), "{length} {split}");
        }
    }
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
            if !matches!(suite.0, Encr::NULL | Encr::NULL_AUTH_AES_GMAC) && text.len() >= 8 {
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
