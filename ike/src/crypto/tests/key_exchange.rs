use super::*;

const VECTORS: &str = include_str!("../../../tests/vectors/kex.txt");

const METHODS: [Ke; 11] = [
    Ke::X25519,
    Ke::ECP_256,
    Ke::ECP_384,
    Ke::ECP_521,
    Ke::MODP_2048,
    Ke::MODP_3072,
    Ke::MODP_4096,
    Ke::MODP_6144,
    Ke::MODP_8192,
    Ke::BRAINPOOL_256,
    Ke::BRAINPOOL_384,
];

fn method(name: &str) -> Ke {
    match name {
        "X25519" => Ke::X25519,
        "ECP_256" => Ke::ECP_256,
        "ECP_384" => Ke::ECP_384,
        "ECP_521" => Ke::ECP_521,
        "BRAINPOOL_256" => Ke::BRAINPOOL_256,
        "BRAINPOOL_384" => Ke::BRAINPOOL_384,
        "MODP_2048" => Ke::MODP_2048,
        "MODP_3072" => Ke::MODP_3072,
        "MODP_4096" => Ke::MODP_4096,
        other => panic!("{other}"),
    }
}

/// Gives one value, as often as it is asked.
struct Fixed(Vec<u8>);
impl Rng for Fixed {
    fn fill(&mut self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

fn with_private(method: Ke, private: &[u8]) -> KeyExchange {
    KeyExchange::generate(method, &mut Fixed(private.to_vec())).unwrap()
}

fn pair(method: Ke) -> (KeyExchange, KeyExchange) {
    let mut rng = Seeded::new(9);
    (KeyExchange::generate(method, &mut rng).unwrap(), KeyExchange::generate(method, &mut rng).unwrap())
}

#[test]
fn a_method_that_we_lack_is_refused() {
    for method in [Ke::NONE, Ke(2), Ke(32), Ke(38)] {
        assert_eq!(KeyExchange::generate(method, &mut Seeded::new(1)).err(), Some(KeyError::Unsupported));
        assert_eq!(respond(method, &[2; 32], &mut Seeded::new(1)).err(), Some(KeyError::Unsupported));
    }
}

// RFC 7296 §3.4: the length of the public value is the method's.
#[test]
fn a_public_value_of_another_length_is_refused() {
    for method in METHODS {
        let right = pair(method).1.public().len();
        for length in [0, 1, 31, right - 1, right + 1, right + 32] {
            let refused = pair(method).0.agree(&vec![2; length]);
            assert_eq!(refused.err(), Some(KeyError::PublicValue), "{method:?} {length}");
        }
    }
}

// RFC 6989 §2.3: not a point of the curve.
#[test]
fn a_point_off_the_curve_is_refused() {
    for method in [Ke::ECP_256, Ke::ECP_384, Ke::ECP_521, Ke::BRAINPOOL_256, Ke::BRAINPOOL_384] {
        let (ours, theirs) = pair(method);
        let mut point = theirs.public().to_vec();
        *point.last_mut().unwrap() ^= 1;
        assert_eq!(ours.agree(&point).err(), Some(KeyError::PublicValue));
        let zeros = vec![0; point.len()];
        assert_eq!(pair(method).0.agree(&zeros).err(), Some(KeyError::PublicValue));
        let above_the_field = vec![0xff; point.len()];
        assert_eq!(pair(method).0.agree(&above_the_field).err(), Some(KeyError::PublicValue));
    }
}

// RFC 7748 §6.1: points of small order give an all-zero secret.
#[test]
fn x25519_points_of_small_order_are_refused() {
    for point in [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    ] {
        assert_eq!(pair(Ke::X25519).0.agree(&hex(point)).err(), Some(KeyError::PublicValue), "{point}");
    }
}

/// MODP groups and the bits of their primes.
const GROUPS: [(Ke, usize); 5] =
    [(Ke::MODP_2048, 2048), (Ke::MODP_3072, 3072), (Ke::MODP_4096, 4096), (Ke::MODP_6144, 6144), (Ke::MODP_8192, 8192)];

// RFC 3526 §3 to §7: p and (p - 1) / 2 are primes, and 64 bits at each end of p are ones. A digit that is copied
// wrongly makes them composite; Fermat's test notices.
#[test]
fn the_modulus_of_each_group_is_a_safe_prime() {
    use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
    use crypto_bigint::{BoxedUint, Odd};

    fn is_probably_prime(n: &BoxedUint) -> bool {
        let params = BoxedMontyParams::new_vartime(Odd::new(n.clone()).unwrap());
        let one = BoxedUint::one_with_precision(n.bits_precision());
        let three = BoxedUint::from_be_slice_truncated(&[3], n.bits_precision());
        BoxedMontyForm::new(three, &params).pow(&n.wrapping_sub(&one)).retrieve() == one
    }
    for (method, bits) in GROUPS {
        let prime = modp::group(method).unwrap().prime_octets();
        assert_eq!(prime.len(), bits / 8);
        assert!(prime[..8].iter().chain(&prime[bits / 8 - 8..]).all(|octet| *octet == 0xff));
        let prime = BoxedUint::from_be_slice(&prime, u32::try_from(bits).unwrap()).unwrap();
        assert!(is_probably_prime(&prime), "{method:?}");
        assert!(is_probably_prime(&(prime >> 1_u32)), "{method:?}");
    }
}

// RFC 6989 §2.1: 1 < y < p - 1.
#[test]
fn modp_values_that_make_the_secret_guessable_are_refused() {
    for (method, bits) in GROUPS {
        let length = bits / 8;
        let small = |value: u8| {
            let mut octets = vec![0; length];
            octets[length - 1] = value;
            octets
        };
        let prime = modp::group(method).unwrap().prime_octets();
        let mut below = prime.clone();
        below[length - 1] -= 1;
        for refused in [small(0), small(1), below, prime.clone(), vec![0xff; length]] {
            assert_eq!(pair(method).0.agree(&refused).err(), Some(KeyError::PublicValue));
        }
        let mut largest = prime;
        largest[length - 1] -= 2;
        for accepted in [small(2), largest] {
            assert!(pair(method).0.agree(&accepted).is_ok());
        }
    }
}

#[test]
fn scalars_outside_the_order_of_the_curve_are_drawn_again() {
    struct Late(u8);
    impl Rng for Late {
        fn fill(&mut self, buffer: &mut [u8]) {
            // 0, then more than the order, then 1.
            let value = [0, 0xff].get(usize::from(self.0)).copied();
            buffer.fill(value.unwrap_or(0));
            if let (None, Some(last)) = (value, buffer.last_mut()) {
                *last = 1;
            }
            self.0 += 1;
        }
    }
    for method in [Ke::ECP_256, Ke::ECP_384, Ke::ECP_521, Ke::BRAINPOOL_256, Ke::BRAINPOOL_384] {
        let mut rng = Late(0);
        KeyExchange::generate(method, &mut rng).unwrap();
        assert_eq!(rng.0, 3);
        // A source that never gives a scalar ends the search.
        let broken = KeyExchange::generate(method, &mut Fixed(vec![0; curve_len(method)]));
        assert_eq!(broken.err(), Some(KeyError::Unsupported));
    }
}

fn curve_len(method: Ke) -> usize {
    match method {
        Ke::ECP_256 | Ke::BRAINPOOL_256 => 32,
        Ke::ECP_384 | Ke::BRAINPOOL_384 => 48,
        _ => 66,
    }
}

#[test]
fn a_key_exchange_moves_between_threads_and_never_prints_its_private_value() {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let exchange = is_send(with_private(Ke::ECP_256, &[7; 32]));
    assert_eq!(format!("{exchange:?}"), "KeyExchange { method: Ke(19), .. }");
}

#[test]
fn both_sides_agree() {
    for method in METHODS {
        let (i, r) = pair(method);
        assert_eq!(i.method(), method);
        assert_ne!(i.public(), r.public());
        let (public_i, public_r) = (i.public().to_vec(), r.public().to_vec());
        let secret = i.agree(&public_r).unwrap();
        assert!(secret.matches(r.agree(&public_i).unwrap().expose()));
    }
}

// RFC 5903 §8, RFC 7748 §5.2 and §6.1; RFC 7296 §2.14 for zeros at the front of g^ir.
#[test]
fn secrets_match_the_published_vectors() {
    let mut checked = 0;
    let mut vectors: Vec<Vec<&str>> = Vec::new();
    for line in VECTORS.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line.starts_with('[') {
            vectors.push(Vec::new());
        }
        vectors.last_mut().unwrap().push(line);
    }
    for vector in vectors {
        let method = method(vector[0].trim_start_matches('[').split(':').next().unwrap());
        let value = |name| {
            let line = vector.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "));
            line.map(hex)
        };
        let (private_i, secret) = (value("private_i").unwrap(), value("secret").unwrap());
        let public_r = value("public_r").unwrap();
        let i = with_private(method, &private_i);
        if let (Some(public_i), Some(private_r)) = (value("public_i"), value("private_r")) {
            assert_eq!(i.public(), public_i);
            let r = with_private(method, &private_r);
            assert_eq!(r.public(), public_r);
            assert_eq!(r.agree(&public_i).unwrap().expose(), secret);
        }
        assert_eq!(i.agree(&public_r).unwrap().expose(), secret);
        checked += 1;
    }
    assert_eq!(checked, 11);
}
