use ipsec::crypto::Protection;
use ipsec::plane::EspKeys;
use ipsec::secret::Secret;
use ipsec::transform::{Encr, Integ};

use super::*;
use crate::Rng;

mod configuration;
mod parsing;
mod protection;

struct Counting(u8);
impl Rng for Counting {
    fn fill(&mut self, buffer: &mut [u8]) {
        for octet in buffer {
            self.0 = self.0.wrapping_mul(5).wrapping_add(1);
            *octet = self.0;
        }
    }
}

const SUITES: [(Encr, u16, Integ); 8] = [
    (Encr::AES_GCM_16, 128, Integ::NONE),
    (Encr::AES_GCM_16, 192, Integ::NONE),
    (Encr::AES_GCM_16, 256, Integ::NONE),
    (Encr::CHACHA20_POLY1305, 256, Integ::NONE),
    (Encr::AES_CBC, 128, Integ::HMAC_SHA1_96),
    (Encr::AES_CBC, 192, Integ::HMAC_SHA2_384_192),
    (Encr::AES_CBC, 256, Integ::HMAC_SHA2_256_128),
    (Encr::AES_CBC, 256, Integ::HMAC_SHA2_512_256),
];

fn keyed((encr, bits, integ): (Encr, u16, Integ), seed: u8) -> Protection {
    let lengths = Protection::key_lengths(encr, bits, integ).unwrap();
    let keys = EspKeys {
        encr: Secret::new(vec![seed; lengths.encr]),
        integ: Secret::new(vec![seed.wrapping_add(1); lengths.integ]),
    };
    Protection::new(encr, bits, integ, &keys).unwrap()
}

fn header() -> Header {
    Header {
        initiator_spi: 0x0102_0304_0506_0708,
        responder_spi: 0x1112_1314_1516_1718,
        major: 2,
        minor: 0,
        exchange: ExchangeType::IKE_AUTH,
        from_initiator: true,
        response: false,
        message_id: 1,
    }
}

fn closed(datagram: &[u8]) -> Protected {
    match parse(datagram).unwrap() {
        Incoming::Protected(protected) => protected,
        Incoming::Plain(message) => panic!("not protected: {message:?}"),
    }
}

fn certificate(length: usize) -> Vec<Payload> {
    let data = (0..length).map(|index| u8::try_from(index % 251).unwrap()).collect();
    vec![Payload::Cert { encoding: 4, data }, Payload::Auth { method: 2, data: vec![9; 32] }]
}
