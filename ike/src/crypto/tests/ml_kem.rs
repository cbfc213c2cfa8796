//! ML-KEM as a key exchange method: FIPS 203, and draft-ietf-ipsecme-ikev2-mlkem for its place in IKEv2.

use ::ml_kem::kem::{EncapsulationKey, Seed};
use ::ml_kem::{Decapsulate, Encapsulate, FromSeed, Kem, KeyExport, MlKem512, MlKem768, MlKem1024, TryKeyInit};

use super::*;

/// Method, octets of an encapsulation key and of a ciphertext (FIPS 203 table 3).
const METHODS: [(Ke, usize, usize); 3] =
    [(Ke::ML_KEM_512, 800, 768), (Ke::ML_KEM_768, 1184, 1088), (Ke::ML_KEM_1024, 1568, 1568)];

fn initiator(method: Ke) -> KeyExchange {
    KeyExchange::generate(method, &mut Seeded::new(1)).unwrap()
}

fn answer(method: Ke, peer: &[u8]) -> Result<(Vec<u8>, Secret), KeyError> {
    respond(method, peer, &mut Seeded::new(2))
}

// FIPS 203 §7.2: the length check.
#[test]
fn an_encapsulation_key_of_another_length_is_refused() {
    for (method, length, _) in METHODS {
        let ours = initiator(method);
        for wrong in [0, 1, 32, length - 1, length + 1, 2 * length] {
            let mut key = ours.public().to_vec();
            key.resize(wrong, 0);
            assert_eq!(answer(method, &key).err(), Some(KeyError::PublicValue), "{method:?} {wrong}");
        }
        for (other, _, _) in METHODS.iter().filter(|(other, ..)| *other != method) {
            assert_eq!(answer(*other, ours.public()).err(), Some(KeyError::PublicValue));
        }
    }
}

// FIPS 203 §7.2: the modulus check. Coefficients are 12 bits each and must be below 3329.
#[test]
fn an_encapsulation_key_with_a_coefficient_above_the_modulus_is_refused() {
    for (method, length, _) in METHODS {
        let right = initiator(method).public().to_vec();
        assert!(answer(method, &right).is_ok());
        // The last 32 octets are the seed, of which all values are possible.
        let last = length - 32 - 3;
        for at in [0, 3, 384, last] {
            // Both coefficients of three octets: 3329 and above, the least and the greatest.
            for octets in [[0x01, 0x0d, 0x00], [0x00, 0x10, 0xd0], [0xff, 0x0f, 0x00], [0x00, 0xf0, 0xff]] {
                let mut key = right.clone();
                key[at..at + 3].copy_from_slice(&octets);
                assert_eq!(answer(method, &key).err(), Some(KeyError::PublicValue), "{method:?} {at} {octets:x?}");
            }
            let mut greatest_possible = right.clone();
            greatest_possible[at..at + 3].copy_from_slice(&[0x00, 0x0d, 0xd0]);
            assert!(answer(method, &greatest_possible).is_ok());
        }
        assert_eq!(answer(method, &vec![0xff; length]).err(), Some(KeyError::PublicValue));
    }
}

// FIPS 203 §7.3: the initiator checks the length of the ciphertext.
#[test]
fn a_ciphertext_of_another_length_is_refused() {
    for (method, _, length) in METHODS {
        for wrong in [0, 1, 32, length - 1, length + 1, 2 * length] {
            let refused = initiator(method).agree(&vec![7; wrong]);
            assert_eq!(refused.err(), Some(KeyError::PublicValue), "{method:?} {wrong}");
        }
    }
}

// FIPS 203 §6.3: implicit rejection. What was not made for our key gives a secret that the peer cannot have,
// so that the next protected message fails its integrity check.
#[test]
fn a_changed_ciphertext_gives_another_secret() {
    for (method, _, _) in METHODS {
        let ours = initiator(method);
        let (mut ciphertext, theirs) = answer(method, ours.public()).unwrap();
        ciphertext[0] ^= 1;
        assert_ne!(ours.agree(&ciphertext).unwrap().expose(), theirs.expose());
    }
}

// draft-ietf-ipsecme-ikev2-mlkem §2.1: KEi is the encapsulation key, KEr the ciphertext, the secret 32 octets.
#[test]
fn both_sides_have_the_same_secret() {
    for (method, public_len, ciphertext_len) in METHODS {
        let ours = initiator(method);
        assert_eq!((ours.method(), ours.public().len()), (method, public_len));
        let (ciphertext, theirs) = answer(method, ours.public()).unwrap();
        assert_eq!((ciphertext.len(), theirs.expose().len()), (ciphertext_len, 32));
        assert_eq!(ours.agree(&ciphertext).unwrap().expose(), theirs.expose());
    }
}

// FIPS 203 §3.3: randomness of a key pair and of an encapsulation is never used again.
#[test]
fn no_value_is_used_twice() {
    for (method, _, _) in METHODS {
        let ours = initiator(method);
        assert_ne!(ours.public(), initiator(method).public());
        let ((one, first), (two, second)) =
            (answer(method, ours.public()).unwrap(), answer(method, ours.public()).unwrap());
        assert_ne!(one, two);
        assert_ne!(first.expose(), second.expose());
    }
}

// Another implementation of FIPS 203 understands ours, in both roles.
#[test]
fn an_independent_implementation_agrees() {
    agrees_with::<MlKem512>(Ke::ML_KEM_512);
    agrees_with::<MlKem768>(Ke::ML_KEM_768);
    agrees_with::<MlKem1024>(Ke::ML_KEM_1024);
}

fn agrees_with<K: Kem + FromSeed>(method: Ke)
where
    K::DecapsulationKey: Decapsulate<Kem = K>,
    EncapsulationKey<K>: KeyExport + Encapsulate<Kem = K> + TryKeyInit,
{
    let mut seed = Seed::<K>::default();
    Seeded::new(3).fill(&mut seed);
    let (private, public) = K::from_seed(&seed);
    let (ciphertext, secret) = answer(method, &public.to_bytes()).unwrap();
    assert_eq!(private.decapsulate_slice(&ciphertext).unwrap().as_slice(), secret.expose());

    let ours = initiator(method);
    let theirs = EncapsulationKey::<K>::new_from_slice(ours.public()).unwrap();
    let (ciphertext, secret) = theirs.encapsulate();
    assert_eq!(ours.agree(&ciphertext).unwrap().expose(), secret.as_slice());
}
