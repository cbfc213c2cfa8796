use std::collections::BTreeMap;

use hkdf::Hkdf;
use ipsec::crypto::Protection;
use ipsec::plane::EspSuite;
use sha2::Sha256;

use super::*;

const VECTORS: &str = include_str!("../../../tests/vectors/kdf.txt");

struct Vector {
    prf: Prf,
    values: BTreeMap<&'static str, Vec<u8>>,
}

fn vectors() -> Vec<Vector> {
    let mut vectors: Vec<Vector> = Vec::new();
    for line in VECTORS.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(head) = line.strip_prefix('[') {
            let prf = match head.split(':').next().unwrap() {
                "PRF_HMAC_SHA1" => Prf::HMAC_SHA1,
                "PRF_HMAC_SHA256" => Prf::HMAC_SHA2_256,
                "PRF_HMAC_SHA384" => Prf::HMAC_SHA2_384,
                "PRF_HMAC_SHA512" => Prf::HMAC_SHA2_512,
                other => panic!("{other}"),
            };
            vectors.push(Vector { prf, values: BTreeMap::new() });
        } else {
            let (name, value) = line.split_once(" = ").unwrap();
            vectors.last_mut().unwrap().values.insert(name, hex(value));
        }
    }
    vectors
}

impl Vector {
    fn get(&self, name: &str) -> &[u8] {
        &self.values[name]
    }

    fn seed(&self) -> KeySeed<'_> {
        let spi = |name| u64::from_be_bytes(self.get(name).try_into().unwrap());
        KeySeed { ni: self.get("ni"), nr: self.get("nr"), spi_i: spi("spi_i"), spi_r: spi("spi_r") }
    }

    fn sk_d(&self) -> Secret {
        Secret::new(self.get("dkm")[..prf_len(self.prf).unwrap()].to_vec())
    }
}

fn suite(prf: Prf) -> IkeSuite {
    IkeSuite {
        encr: Encr::AES_GCM_16,
        key_bits: 128,
        integ: Integ::NONE,
        prf,
        ke: Ke::X25519,
        additional: AdditionalKe::NONE,
    }
}

#[test]
fn a_prf_that_we_lack_is_refused() {
    assert_eq!(prf(Prf(4), b"key", &[b"data"]).unwrap_err(), KeyError::Unsupported);
    assert_eq!(prf_plus(Prf(4), b"key", &[b"data"], 1).unwrap_err(), KeyError::Unsupported);
    assert_eq!(prf_len(Prf(4)), None);
}

// RFC 7296 §2.13: the counter is one octet.
#[test]
fn prf_plus_ends_after_255_blocks() {
    assert_eq!(prf_plus(Prf::HMAC_SHA2_256, b"k", &[b"s"], 255 * 32).unwrap().expose().len(), 255 * 32);
    assert_eq!(prf_plus(Prf::HMAC_SHA2_256, b"k", &[b"s"], 255 * 32 + 1).unwrap_err(), KeyError::Unsupported);
}

// RFC 7296 §2.13 and RFC 5869 §2.3 define the same function.
#[test]
fn prf_plus_is_hkdf_expand() {
    for key_len in [32, 64, 65, 300] {
        let key = vec![0x5a; key_len];
        for length in [0, 1, 31, 32, 33, 1000] {
            let mut expected = vec![0; length];
            Hkdf::<Sha256>::from_prk(&key).unwrap().expand(b"seed", &mut expected).unwrap();
            let ours = prf_plus(Prf::HMAC_SHA2_256, &key, &[b"se", b"", b"ed"], length).unwrap();
            assert_eq!(ours.expose(), expected);
        }
    }
}

// RFC 7296 §2.14
#[test]
fn ike_keys_match_the_published_vectors() {
    let vectors = vectors();
    assert_eq!(vectors.len(), 8);
    for vector in &vectors {
        let len = prf_len(vector.prf).unwrap();
        let nonces = [vector.get("ni"), vector.get("nr")].concat();
        let skeyseed = prf(vector.prf, &nonces, &[vector.get("g_ir")]).unwrap();
        assert_eq!(skeyseed.expose(), vector.get("skeyseed"));

        let dkm = vector.get("dkm");
        let spis = [vector.get("spi_i"), vector.get("spi_r")].concat();
        let expanded = prf_plus(vector.prf, skeyseed.expose(), &[&nonces, &spis], dkm.len()).unwrap();
        assert_eq!(expanded.expose(), dkm);

        let secret = Secret::new(vector.get("g_ir").to_vec());
        let keys = ike_keys(&suite(vector.prf), &secret, vector.seed()).unwrap();
        // AES-128-GCM: no integrity keys, 16 + 4 octets for each direction.
        let ours = [&keys.d, &keys.initiator.integ, &keys.responder.integ, &keys.initiator.encr];
        let ours: Vec<u8> = ours
            .into_iter()
            .chain([&keys.responder.encr, &keys.pi, &keys.pr])
            .flat_map(|key| key.expose().to_vec())
            .collect();
        assert_eq!(ours.len(), 3 * len + 40);
        let common = ours.len().min(dkm.len());
        assert_eq!(ours[..common], dkm[..common]);
        assert_eq!(keys.initiator.encr.expose().len(), 20);
        assert!(keys.initiator.integ.expose().is_empty());
    }
}

// RFC 7296 §2.17
#[test]
fn child_keys_match_the_published_vectors() {
    let mut checked = 0;
    for vector in vectors().iter().filter(|vector| vector.values.contains_key("dkm_child")) {
        let (encr, key_bits, integ) = (Encr::AES_CBC, 128, Integ::HMAC_SHA1_96);
        let suite = EspSuite { encr, key_bits, integ, esn: false };
        let secrets = [Secret::new(vector.get("g_ir_new").to_vec())];
        for (secrets, name) in [(&secrets[..0], "dkm_child"), (&secrets, "dkm_child_dh")] {
            let (ni, nr) = (vector.get("ni"), vector.get("nr"));
            let (i, r) = child_keys(vector.prf, &vector.sk_d(), &suite, secrets, ni, nr).unwrap();
            let expected = vector.get(name);
            assert_eq!(i.encr.expose(), &expected[..16]);
            assert_eq!(i.integ.expose(), &expected[16..36]);
            assert_eq!(r.encr.expose(), &expected[36..52]);
            assert_eq!(r.integ.expose(), &expected[52..72]);
            assert!(Protection::new(encr, key_bits, integ, &i).is_ok());
            checked += 1;
        }
    }
    assert_eq!(checked, 4);
}

// RFC 7296 §2.18: the old PRF makes SKEYSEED, the new one expands it.
#[test]
fn rekeyed_ike_keys_match_the_published_vectors() {
    let mut checked = 0;
    for vector in vectors().iter().filter(|vector| vector.values.contains_key("skeyseed_rekey")) {
        let secret = Secret::new(vector.get("g_ir_new").to_vec());
        let new = suite(Prf::HMAC_SHA2_512);
        let keys = rekeyed_ike_keys(vector.prf, &vector.sk_d(), &new, &secret, &[], vector.seed()).unwrap();
        let spis = [vector.get("spi_i"), vector.get("spi_r")].concat();
        let seed = [vector.get("ni"), vector.get("nr"), &spis].concat();
        let expected = prf_plus(new.prf, vector.get("skeyseed_rekey"), &[&seed], 64).unwrap();
        assert_eq!(keys.d.expose(), expected.expose());
        checked += 1;
    }
    assert_eq!(checked, 2);
}

// RFC 4615 §4
#[test]
fn rfc4615_section_4_keys_of_every_length() {
    let message = hex("000102030405060708090a0b0c0d0e0f10111213");
    for (key, expected) in [
        ("000102030405060708090a0b0c0d0e0fedcb", "84a348a4a45d235babfffc0d2b4da09a"),
        ("000102030405060708090a0b0c0d0e0f", "980ae87b5f4c9c5214f5b6a8455e4c2d"),
        ("00010203040506070809", "290d9e112edb09ee141fcf64c0b72f3d"),
    ] {
        let (first, rest) = message.split_at(7);
        assert_eq!(prf(Prf::AES128_CMAC, &hex(key), &[first, rest]).unwrap().expose(), hex(expected));
    }
}

// RFC 7296 §2.14: with a PRF of a fixed key, 64 bits of each nonce are the key of SKEYSEED, and whole nonces the
// seed of prf+. Computed with OpenSSL.
#[test]
fn ike_keys_with_aes_cmac() {
    let (ni, nr): (Vec<u8>, Vec<u8>) = ((0x10..0x30).collect(), (0x50..0x70).collect());
    let secret = Secret::new((0..32).collect());
    let seed = KeySeed { ni: &ni, nr: &nr, spi_i: 0x0102030405060708, spi_r: 0x1112131415161718 };
    let keys = ike_keys(&suite(Prf::AES128_CMAC), &secret, seed).unwrap();
    for (key, expected) in [
        (&keys.d, "668f1963ac54c289bc6d1196ef6ec01c"),
        (&keys.initiator.encr, "dc7dbeb958e096703bec8497130015bfcf3689c9"),
        (&keys.responder.encr, "9a7075406ea65a46b3d180a9996ade47128f43eb"),
        (&keys.pi, "022e1050107ee8ca5a788ad71df53cd2"),
        (&keys.pr, "3bc897448dbfe2983b2bcc6b6aa29443"),
    ] {
        assert_eq!(key.expose(), hex(expected));
    }
}

// RFC 5723 §5.1: SKEYSEED = prf(SK_d_old, "Resumption" | Ni | Nr), ten ASCII characters without an end.
#[test]
fn a_resumed_ike_sa_has_keys_of_its_own() {
    for vector in &vectors() {
        let suite = suite(vector.prf);
        let (seed, old) = (vector.seed(), vector.sk_d());
        let keys = resumed_ike_keys(&suite, &old, seed).unwrap();
        let text = [b"Resumption".as_slice(), vector.get("ni"), vector.get("nr")].concat();
        let skeyseed = prf(vector.prf, old.expose(), &[&text]).unwrap();
        let spis = [vector.get("spi_i"), vector.get("spi_r")].concat();
        let nonces = [vector.get("ni"), vector.get("nr")].concat();
        let len = prf_len(vector.prf).unwrap();
        let expected = prf_plus(vector.prf, skeyseed.expose(), &[&nonces, &spis], 3 * len + 40).unwrap();
        let ours = [&keys.d, &keys.initiator.encr, &keys.responder.encr, &keys.pi, &keys.pr];
        assert_eq!(ours.map(Secret::expose).concat(), expected.expose());
        assert_ne!(keys.d.expose(), old.expose());
        // Other nonces or SPIs, other keys.
        let others = [KeySeed { ni: seed.nr, ..seed }, KeySeed { nr: seed.ni, ..seed }, KeySeed { spi_r: 1, ..seed }];
        for other in others {
            assert_ne!(resumed_ike_keys(&suite, &old, other).unwrap().d.expose(), keys.d.expose());
        }
    }
}

// A vector of our own (docs/latch-protocol.md), made with Python's hmac.
#[test]
fn the_channel_binding_has_the_documented_value() {
    let sk_d = Secret::new(vec![0x0b; 32]);
    let binding = channel_binding(Prf::HMAC_SHA2_256, &sk_d, b"initiator octets", b"responder octets, longer").unwrap();
    let hex: String = binding.iter().map(|octet| format!("{octet:02x}")).collect();
    assert_eq!(hex, "cf530309bb29f2d1481e56f6ad3228e02b497f6b9e26ac8d4bf0160f8519ac45");
    // Who is the initiator matters, and where one ends and the other begins.
    let swapped = channel_binding(Prf::HMAC_SHA2_256, &sk_d, b"responder octets, longer", b"initiator octets").unwrap();
    let shifted = channel_binding(Prf::HMAC_SHA2_256, &sk_d, b"initiator octetsr", b"esponder octets, longer").unwrap();
    assert!(binding != swapped && binding != shifted);
}
