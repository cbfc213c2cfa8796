//! Faults that other daemons had in certificates and signatures, by kind; `docs/compliance.md` has the list.

use std::net::{IpAddr, TcpListener};
use std::time::{Duration, Instant};

use rcgen::{
    CidrSubnet, CrlDistributionPoint, CustomExtension, GeneralSubtree, NameConstraints, PublicKeyData, SerialNumber,
    SignatureAlgorithm,
};
use sha2::{Digest, Sha256};

use super::*;

const PKCS1_SHA256: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 13, 1, 1, 11, 5, 0];
const DIGEST_INFO: &[u8] = &[0x30, 0x31, 0x30, 13, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1, 5, 0, 4, 0x20];

/// A public key of any octets.
struct RawKey {
    algorithm: &'static SignatureAlgorithm,
    octets: Vec<u8>,
}

impl PublicKeyData for RawKey {
    fn der_bytes(&self) -> &[u8] {
        &self.octets
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

fn certified(authority: &Authority, key: &RawKey) -> Vec<u8> {
    end_entity_params("moon.example.org").signed_by(key, &authority.issuer).unwrap().der().to_vec()
}

fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let octets = &length[length.iter().position(|octet| *octet != 0).unwrap_or(length.len() - 1)..];
    let mut der = vec![tag];
    if octets.len() > 1 || octets[0] > 127 {
        der.push(0x80 | u8::try_from(octets.len()).unwrap());
    }
    [&der, octets, content].concat()
}

fn rsa_public_key(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    element(0x30, &[element(2, modulus), element(2, exponent)].concat())
}

/// The modulus of [`rsa_key`], 256 octets.
fn good_modulus() -> Vec<u8> {
    let key = rsa_key().der_bytes();
    assert_eq!(key[..9], [0x30, 0x82, 1, 10, 2, 0x82, 1, 1, 0]);
    key[9..265].to_vec()
}

/// What a signature over [`OCTETS`] is before the private key is applied (RFC 8017 §9.2).
fn encoded_message(length: usize) -> Vec<u8> {
    let hash = Sha256::digest(OCTETS);
    let padding = vec![0xff; length.saturating_sub(3 + DIGEST_INFO.len() + hash.len())];
    [&[0, 1], padding.as_slice(), &[0], DIGEST_INFO, &hash].concat()
}

/// AUTH values of both methods for an RSA signature.
fn rsa_auth(signature: &[u8]) -> [(AuthMethod, Vec<u8>); 2] {
    let algorithm = [&[15], PKCS1_SHA256].concat();
    [(AuthMethod::RSA, signature.to_vec()), (AuthMethod::DIGITAL_SIGNATURE, [algorithm.as_slice(), signature].concat())]
}

fn refused(credentials: &Credentials, certificate: &[u8], (method, auth): (AuthMethod, Vec<u8>)) -> bool {
    let signed = SignedAuth { method, auth, certificates: vec![certificate.to_vec()], public_key: None };
    credentials.authenticate(&request("moon.example.org", signed, pubkey("%any")), NOW).is_err()
}

// CVE-2017-9022, CVE-2018-17540, CVE-2017-11185: RSA keys that are none, and signatures that are no number below the
// modulus. With the exponent 1 everybody can sign.
#[test]
fn rsa_keys_and_signatures_that_are_none_are_refused() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let unsigned = |octets: &[u8]| [&[0], octets].concat();
    let good = good_modulus();
    let mut even = good.clone();
    even[255] &= 0xfe;
    let odd = |length: usize| vec![0x6b; length];
    let moduli = [
        Vec::new(),
        vec![0],
        vec![1],
        vec![0x23],
        odd(64),
        odd(128),
        odd(255),
        unsigned(&even),
        // Negative, and with one zero too many.
        good.clone(),
        unsigned(&unsigned(&good)),
        odd(1025),
        odd(4096),
    ];
    let exponents =
        [vec![], vec![0], vec![1], vec![2], vec![0x81], vec![1, 0, 0], vec![3; 5], vec![3; 256], unsigned(&good)];
    let keys = moduli
        .iter()
        .map(|modulus| (modulus.clone(), vec![1, 0, 1]))
        .chain(exponents.iter().map(|exponent| (unsigned(&good), exponent.clone())))
        .chain([(odd(256), vec![1]), (vec![1], vec![1]), (vec![], vec![])]);
    for (modulus, exponent) in keys {
        let key = RawKey { algorithm: &rcgen::PKCS_RSA_SHA256, octets: rsa_public_key(&modulus, &exponent) };
        let certificate = certified(&authority, &key);
        let (mut one, mut above) = (vec![0; modulus.len()], modulus.clone());
        one.iter_mut().last().into_iter().for_each(|octet| *octet = 1);
        above.iter_mut().last().into_iter().for_each(|octet| *octet |= 1);
        let values = [Vec::new(), vec![0; 256], one, modulus.clone(), above, vec![0xff; 256], encoded_message(256)];
        for auth in values.iter().flat_map(|value| rsa_auth(value)) {
            assert!(refused(&credentials, &certificate, auth), "n = {modulus:02x?}, e = {exponent:02x?}");
        }
    }
    // The same signatures under a good key.
    let certificate = authority.issue("moon.example.org", rsa_key(), |_| ());
    let longer = unsigned(&encoded_message(256));
    for value in
        [Vec::new(), vec![0; 256], good.clone(), vec![0xff; 256], encoded_message(256), longer, good[1..].to_vec()]
    {
        for auth in rsa_auth(&value) {
            assert!(refused(&credentials, &certificate, auth));
        }
    }
}

// RFC 8247 §4.1.1: a genuine signature with a key of 1024 bits is none that we take.
#[test]
fn short_rsa_keys_of_peers_are_refused() {
    let mut lines = include_str!("../testdata/rsa1024-signature.txt").lines();
    let mut octets = || data_encoding::HEXLOWER.decode(lines.next().unwrap().as_bytes()).unwrap();
    let (modulus, signature) = (octets(), octets());
    let authority = Authority::new("CA");
    let key = rsa_public_key(&[&[0], modulus.as_slice()].concat(), &[1, 0, 1]);
    let certificate = certified(&authority, &RawKey { algorithm: &rcgen::PKCS_RSA_SHA256, octets: key });
    assert_eq!(Certificate::parse(&certificate).unwrap().key_bits(), 1024);
    for auth in rsa_auth(&signature) {
        assert!(refused(&trusting(&authority), &certificate, auth));
    }
}

// CVE-2018-16151, CVE-2018-16152: whoever reads a PKCS#1 v1.5 signature leniently takes forged ones. All of these were
// made with the private key from octets that are not quite right; the first from the right ones.
#[test]
fn a_signature_with_lenient_padding_is_refused() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let certificate = authority.issue("moon.example.org", rsa_key(), |_| ());
    let cases = include_str!("../testdata/pkcs1-forgeries.txt").lines();
    let cases: Vec<_> = cases.map(|line| line.split_once(": ").unwrap()).collect();
    assert_eq!(cases.len(), 12);
    for (what, signature) in cases {
        let signature = data_encoding::HEXLOWER.decode(signature.as_bytes()).unwrap();
        for auth in rsa_auth(&signature) {
            assert_eq!(refused(&credentials, &certificate, auth), what != "right", "{what}");
        }
    }
}

// CVE-2026-35332 and its kind: points that are none, in a certificate.
#[test]
fn elliptic_curve_points_that_are_none_are_refused() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let key = KeyPair::generate().unwrap();
    let good = key.der_bytes().to_vec();
    let (method, auth) = sign_with(&key, Some(&[2]));
    let mut off_curve = good.clone();
    off_curve[64] ^= 1;
    // RFC 5480 §2.2 allows this form; with the other parity it is another point.
    let compressed = |parity: u8| [&[2 | parity], &good[1..33]].concat();
    // The same point once more; RFC 5480 §2.2: "The hybrid form … MUST NOT be used".
    let hybrid = |parity: u8| [&[6 | parity], &good[1..]].concat();
    let points = [
        vec![],
        vec![0],
        vec![4],
        vec![0; 65],
        [&[4][..], &[0; 64]].concat(),
        [&[4][..], &[0xff; 64]].concat(),
        good[..64].to_vec(),
        [&good[..], &[0]].concat(),
        off_curve,
        compressed(!good[64] & 1),
        hybrid(0),
        hybrid(1),
    ];
    let with = |octets: &[u8]| {
        certified(&authority, &RawKey { algorithm: &rcgen::PKCS_ECDSA_P256_SHA256, octets: octets.to_vec() })
    };
    for point in [&good, &compressed(good[64] & 1)] {
        assert!(!refused(&credentials, &with(point), (method, auth.clone())));
    }
    for point in points {
        assert!(refused(&credentials, &with(&point), (method, auth.clone())), "{point:02x?}");
        assert!(refused(&credentials, &with(&point), (AuthMethod::ECDSA_256, vec![0; 64])), "{point:02x?}");
    }
}

/// `tag` in itself, as often as fits into `size` octets.
fn nested(tag: u8, size: usize) -> Vec<u8> {
    let mut content = Vec::new();
    while content.len() < size {
        content = element(tag, &content);
    }
    content
}

// CVE-2017-9023, CVE-2026-78132: parsers that go round in circles or down without end, on certificates of strangers.
#[test]
fn elements_in_elements_without_end_are_survived() {
    const OTHER: &[u64] = &[1, 2, 3, 4];
    // What an end entity's certificate is judged by, and what is of no meaning in it.
    let extensions: [(&[u64], bool); 12] = [
        (&[2, 5, 29, 15], true),
        (&[2, 5, 29, 17], true),
        (&[2, 5, 29, 19], true),
        (&[2, 5, 29, 37], true),
        (&[2, 5, 29, 14], false),
        (&[2, 5, 29, 30], false),
        (&[2, 5, 29, 31], false),
        (&[2, 5, 29, 32], false),
        (&[2, 5, 29, 35], false),
        (&[1, 3, 6, 1, 5, 5, 7, 1, 1], false),
        (&[1, 3, 6, 1, 5, 5, 7, 1, 7], false),
        (OTHER, false),
    ];
    let authority = Authority::new("CA");
    let deep: Vec<Vec<u8>> = [0x30, 0x31, 0xa0, 0xa1, 0xa4]
        .into_iter()
        .flat_map(|tag| {
            let nested = nested(tag, 50_000);
            [element(0x30, &nested), nested, [tag, 0x80].repeat(25_000)]
        })
        .collect();
    // Half of what the daemon's threads have.
    let judge = move || {
        let credentials = trusting(&authority);
        for content in &deep {
            assert!(Identity::from_wire(9, content).is_err());
            assert!(Certificate::parse(content).is_err());
            for (oid, judged_by) in extensions {
                for critical in [false, true] {
                    let change = |params: &mut CertificateParams| {
                        if oid == [2, 5, 29, 17] {
                            params.subject_alt_names.clear();
                        }
                        params.use_authority_key_identifier_extension = oid != [2, 5, 29, 35];
                        let mut extension = CustomExtension::from_oid_content(oid, content.clone());
                        extension.set_criticality(critical);
                        params.custom_extensions.push(extension);
                    };
                    let request = request_of(&authority, "moon.example.org", change, pubkey("%any"));
                    let accepted = credentials.authenticate(&request, NOW).is_ok();
                    assert!(!accepted || !judged_by, "{oid:?} {critical} {:02x?}", &content[..8]);
                    // RFC 5280 §4.2.
                    if oid == OTHER {
                        assert_eq!(accepted, !critical);
                    }
                }
            }
        }
    };
    std::thread::Builder::new().stack_size(1024 * 1024).spawn(judge).unwrap().join().unwrap();
}

// CVE-2021-41990, CVE-2018-6459: RSASSA-PSS with a salt of more octets than there are, or without its hash, as what a
// certificate says that it is signed with.
#[test]
fn certificates_signed_with_odd_pss_parameters_are_refused() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let good = request_of(&authority, "moon.example.org", |_| (), pubkey("%any"));
    let ecdsa_sha256 = [0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
    let sha256 = element(0x30, &[6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1]);
    let mgf = |hash: &[u8]| {
        element(0xa1, &element(0x30, &[&[6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 13, 1, 1, 8], hash].concat()))
    };
    let salt = |octets: &[u8]| element(0xa2, &element(2, octets));
    let parameters = [
        vec![],
        element(0x30, &[]),
        element(0x30, &[element(0xa0, &sha256), mgf(&sha256), salt(&[0x7f, 0xff, 0xff, 0xff])].concat()),
        element(0x30, &[element(0xa0, &sha256), mgf(&sha256), salt(&[0xff; 8])].concat()),
        element(0x30, &[element(0xa0, &sha256), mgf(&sha256), salt(&[1; 400])].concat()),
        element(0x30, &[element(0xa0, &sha256), mgf(&[]), salt(&[32])].concat()),
        element(0x30, &[element(0xa0, &[]), mgf(&sha256), salt(&[32])].concat()),
        nested(0x30, 500),
    ];
    for parameters in parameters {
        let oid = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 13, 1, 1, 10];
        let algorithm = element(0x30, &[&oid, parameters.as_slice()].concat());
        let certificate = replaced(&good.certificates[0], &ecdsa_sha256, &algorithm);
        assert!(certificate.windows(oid.len()).filter(|window| *window == oid).count() == 2);
        assert!(refused(&credentials, &certificate, (good.method, good.auth.clone())));
    }
}

/// The elements in a DER element.
fn elements_of(der: &[u8]) -> Vec<Vec<u8>> {
    let header = |der: &[u8]| match der[1] {
        short @ 0..=127 => (2, usize::from(short)),
        0x81 => (3, usize::from(der[2])),
        _ => (4, usize::from(der[2]) << 8 | usize::from(der[3])),
    };
    let mut rest = &der[header(der).0..];
    let mut elements = Vec::new();
    while !rest.is_empty() {
        let (start, length) = header(rest);
        let (element, after) = rest.split_at(start + length);
        elements.push(element.to_vec());
        rest = after;
    }
    elements
}

/// A DER element with another one in each place of `from`.
fn replaced(der: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    if der == from {
        return to.to_vec();
    }
    match der[0] {
        // Constructed.
        tag if tag & 0x20 != 0 => {
            let inner: Vec<Vec<u8>> = elements_of(der).iter().map(|inner| replaced(inner, from, to)).collect();
            element(tag, &inner.concat())
        }
        _ => der.to_vec(),
    }
}

// CVE-2026-78129: a file with a private key says how much work its decryption is.
#[test]
fn an_encrypted_key_does_not_choose_our_work() {
    let der = super::store::private_key_der(RSA_ENCRYPTED).unwrap();
    let load =
        |der: &[u8]| Credentials::new().add_private_key(der, Some(b"mountain")).map_err(|error| error.to_string());
    assert!(load(&der).is_ok());
    let iterations = [2, 2, 8, 0];
    let huge: [&[u8]; 5] = [
        &[2, 4, 0x7f, 0xff, 0xff, 0xff],
        &[2, 5, 0, 0xff, 0xff, 0xff, 0xff],
        &[2, 9, 0, 255, 255, 255, 255, 255, 255, 255, 255],
        &[2, 1, 0xff],
        &[2, 0],
    ];
    let pbkdf2 = elements_of(&elements_of(&elements_of(&der)[0])[1])[0].clone();
    let scrypt = |cost: &[u8], block: &[u8], parallel: &[u8]| {
        let parameters = [element(4, &[7; 8]), element(2, cost), element(2, block), element(2, parallel)].concat();
        element(0x30, &[element(6, &[0x2b, 6, 1, 4, 1, 0xda, 0x47, 4, 11]), element(0x30, &parameters)].concat())
    };
    let scrypts = [
        scrypt(&[1, 0, 0, 0, 0, 0], &[8], &[1]),
        scrypt(&[0x40, 0], &[0x40, 0], &[1]),
        scrypt(&[0x40, 0], &[8], &[0x40, 0, 0]),
        scrypt(&[0], &[0], &[0]),
    ];
    let changed = huge.iter().map(|to| replaced(&der, &iterations, to));
    let changed: Vec<_> = changed.chain(scrypts.iter().map(|to| replaced(&der, &pbkdf2, to))).collect();
    let started = Instant::now();
    for key in changed {
        assert!(load(&key).is_err());
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

fn subtree(text: &str) -> GeneralSubtree {
    match text.parse::<IpAddr>() {
        Ok(address) => {
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, if address.is_ipv4() { 24 } else { 64 }))
        }
        Err(_) => match text.split_once('=') {
            Some((_, organization)) => {
                let mut name = rcgen::DistinguishedName::new();
                name.push(DnType::OrganizationName, organization);
                GeneralSubtree::DirectoryName(name)
            }
            None if text.contains('@') => GeneralSubtree::Rfc822Name(text.trim_start_matches('@').to_owned()),
            None => GeneralSubtree::DnsName(text.to_owned()),
        },
    }
}

/// Whether an intermediate authority with these constraints can vouch for `asserted` in a certificate for `name`.
fn vouches(permitted: &[&str], excluded: &[&str], name: &str, asserted: &str) -> bool {
    let root = Authority::new("CA");
    let intermediate = root.below("intermediate", |params| {
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: permitted.iter().map(|text| subtree(text)).collect(),
            excluded_subtrees: excluded.iter().map(|text| subtree(text)).collect(),
        });
    });
    let mut request = request_of(&intermediate, name, |_| (), pubkey("%any"));
    request.certificates.push(intermediate.der());
    request.peer_id = id(asserted);
    trusting(&root).authenticate(&request, NOW).is_ok()
}

// CVE-2026-35331 and RFC 5280 §4.2.1.10: an authority for some names vouches for no others, in none of the places where
// we look for an identity.
#[test]
fn name_constraints_bind_every_kind_of_identity() {
    for name in ["moon.example.org", "example.org"] {
        assert!(vouches(&["example.org"], &[], name, name), "{name}");
        assert!(!vouches(&[], &["example.org"], name, name), "{name}");
    }
    for name in ["moon.example.com", "MOON.EXAMPLE.COM", "notexample.org", "example.org.example.com", "example.com"] {
        assert!(!vouches(&["example.org"], &[], name, name), "{name}");
        assert!(vouches(&[], &["example.org"], name, name), "{name}");
    }
    assert!(!vouches(&[], &["example.org"], "MOON.EXAMPLE.ORG", "moon.example.org"));
    assert!(!vouches(&["example.org"], &["moon.example.org"], "moon.example.org", "moon.example.org"));
    assert!(vouches(&["192.0.2.0"], &[], "192.0.2.1", "192.0.2.1"));
    for name in ["192.0.3.1", "2001:db8::1"] {
        assert!(!vouches(&["192.0.2.0"], &[], name, name), "{name}");
    }
    assert!(!vouches(&["2001:db8:1::"], &[], "2001:db8::1", "2001:db8::1"));
    assert!(!vouches(&["@example.org"], &[], "carol@example.com", "carol@example.com"));
    assert!(!vouches(&[], &["@example.org"], "carol@example.org", "carol@example.org"));
    // The subject is an identity too.
    let subject = "O=Latchkey Test, CN=moon.example.org";
    assert!(!vouches(&["O=Another"], &[], "moon.example.org", subject));
    assert!(!vouches(&[], &["O=Latchkey Test"], "moon.example.org", subject));
}

// CVE-2021-41991 and its kind: the work that a chain of the peer's can make is bounded.
#[test]
fn chains_that_branch_without_end_are_given_up() {
    let (root, key) = (Authority::new("CA"), KeyPair::generate().unwrap());
    let name = |serial: u64| authority_params("loop", |params| params.serial_number = Some(SerialNumber::from(serial)));
    // Each of them could be the issuer of each other one, and of itself.
    let circle = CertifiedIssuer::self_signed(name(1), KeyPair::from_pem(&key.serialize_pem()).unwrap()).unwrap();
    let others: Vec<Vec<u8>> =
        (2..17).map(|serial| name(serial).signed_by(&key, &circle).unwrap().der().to_vec()).collect();
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = end_entity_params("moon.example.org").signed_by(&leaf_key, &circle).unwrap().der().to_vec();
    let (method, auth) = sign_with(&leaf_key, Some(&[2]));
    let certificates: Vec<Vec<u8>> = std::iter::once(leaf).chain(others).collect();
    assert_eq!(certificates.len(), 16);
    let request =
        request("moon.example.org", SignedAuth { method, auth, certificates, public_key: None }, pubkey("%any"));
    let started = Instant::now();
    refused_certificate(trusting(&root).authenticate(&request, NOW));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

// CVE-2022-40617: places that a certificate names are not asked.
#[test]
fn nothing_that_a_certificate_points_to_is_fetched() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let uri = format!("http://{}/", listener.local_addr().unwrap());
    let authority = Authority::new("CA");
    let change = |params: &mut CertificateParams| {
        params.crl_distribution_points = vec![CrlDistributionPoint { uris: vec![uri.clone()] }];
        let access = |method: u8| {
            let method = [6, 8, 0x2b, 6, 1, 5, 5, 7, 48, method];
            element(0x30, &[&method[..], &element(0x86, uri.as_bytes())].concat())
        };
        let access = element(0x30, &[access(1), access(2)].concat());
        params.custom_extensions.push(CustomExtension::from_oid_content(&[1, 3, 6, 1, 5, 5, 7, 1, 1], access));
    };
    let request = request_of(&authority, "moon.example.org", change, pubkey("%any"));
    assert!(trusting(&authority).authenticate(&request, NOW).is_ok());
    let strange = Authority::new("another CA");
    refused_certificate(trusting(&strange).authenticate(&request, NOW));
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}
