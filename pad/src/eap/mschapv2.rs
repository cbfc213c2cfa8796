//! EAP-MSCHAPv2: MS-CHAP-V2 (RFC 2759) in EAP packets, and the key by RFC 3079 §3.
//!
//! It rests on MD4, single DES and the password; whoever sees its messages can try passwords. In IKE only the responder sees
//! them, which has proved who it is by its certificate before.

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};
use ipsec::secret::Secret;
use md4::Md4;
use sha1::Sha1;
use sha1::digest::Digest;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{CHALLENGE_LENGTH, MAX_NAME};

const CHALLENGE: u8 = 1;
const RESPONSE: u8 = 2;
const SUCCESS: u8 = 3;
const FAILURE: u8 = 4;

/// Peer's challenge, reserved octets, NT-Response, flags (RFC 2759 §4).
const RESPONSE_LENGTH: usize = 49;
const NT_RESPONSE_LENGTH: usize = 24;
/// Octets of the MSK that are not zero.
const START_KEY_LENGTH: usize = 16;
const MSK_LENGTH: usize = 64;

type Hash = Zeroizing<[u8; 16]>;

/// The authenticator's states.
#[derive(Debug)]
pub(super) enum Server {
    /// The challenge is out.
    Challenged { id: u8, challenge: [u8; CHALLENGE_LENGTH] },
    /// The peer has shown that it knows the password, and has been shown that we do.
    Proved(Secret),
    /// It has been told that it has failed.
    Refused(String),
}

pub(super) enum ServerStep {
    Ask(Server, Vec<u8>),
    Succeeded(Secret),
    Failed(String),
}

impl Server {
    pub(super) fn begin(id: u8, challenge: [u8; CHALLENGE_LENGTH], us: &[u8]) -> (Self, Vec<u8>) {
        let us = us.get(..MAX_NAME).unwrap_or(us);
        let value = [&[CHALLENGE_LENGTH as u8], challenge.as_slice(), us].concat();
        (Self::Challenged { id, challenge }, message(CHALLENGE, id, &value))
    }

    /// `user` is the name that the peer has to say, `password` that user's, if there is such a user.
    pub(super) fn answered(self, data: &[u8], user: &[u8], password: Option<&Secret>) -> ServerStep {
        match self {
            Self::Challenged { id, challenge } => match Response::parse(data, id) {
                Some(response) => check(id, &challenge, &response, user, password),
                None => ServerStep::Failed("malformed EAP-MSCHAPv2 response".to_owned()),
            },
            Self::Proved(msk) if data == [SUCCESS] => ServerStep::Succeeded(msk),
            Self::Proved(_) => ServerStep::Failed("the peer does not believe that we know its password".to_owned()),
            Self::Refused(reason) => ServerStep::Failed(reason),
        }
    }
}

fn check(
    id: u8,
    challenge: &[u8; CHALLENGE_LENGTH],
    response: &Response<'_>,
    user: &[u8],
    password: Option<&Secret>,
) -> ServerStep {
    let hash = password.and_then(|password| nt_hash(password.expose()));
    // Nobody learns from the time whether there is such a user.
    let (known, hash) = (hash.is_some(), hash.unwrap_or_default());
    let short = challenge_hash(&response.peer_challenge, challenge, response.name);
    let expected = nt_response(&short, &hash);
    let right: bool = expected.ct_eq(&response.nt_response).into();
    // RFC 2759 §4: the name may have a domain before it.
    let named = without_domain(response.name) == without_domain(user);
    if !(right && known && named) {
        let reason = match () {
            () if !named => "it says another name than its identity",
            () if !known => "there is no EAP secret for it",
            () => "its password is wrong",
        };
        // RFC 2759 §6: ERROR_AUTHENTICATION_FAILURE, no retry.
        let challenge = data_encoding::HEXUPPER.encode(challenge);
        let text = format!("E=691 R=0 C={challenge} V=3 M=Authentication failed");
        return ServerStep::Ask(Server::Refused(reason.to_owned()), message(FAILURE, id, text.as_bytes()));
    }
    let proof = authenticator_response(&hash, &expected, &short);
    let text = format!("S={} M=Welcome", data_encoding::HEXUPPER.encode(&proof));
    ServerStep::Ask(Server::Proved(msk(&hash, &expected)), message(SUCCESS, id, text.as_bytes()))
}

/// The peer's states.
#[derive(Debug)]
pub(super) enum Peer {
    /// No challenge has come.
    Fresh,
    /// The response is out: what the authenticator has to show, and the key.
    Responded { id: u8, expected: [u8; 20], msk: Secret },
    /// The authenticator has shown that it knows the password.
    Succeeded(Secret),
    /// The authenticator says that the password is wrong.
    Refused(String),
}

impl Peer {
    pub(super) fn asked(
        self,
        data: &[u8],
        user: &[u8],
        password: &Secret,
        ours: [u8; CHALLENGE_LENGTH],
    ) -> Result<(Self, Vec<u8>), String> {
        let (code, id, value) = parse(data).ok_or("malformed EAP-MSCHAPv2 request")?;
        match (self, code) {
            (Self::Fresh, CHALLENGE) => {
                let challenge = value.split_first().filter(|(size, _)| usize::from(**size) == CHALLENGE_LENGTH);
                let challenge = challenge.and_then(|(_, rest)| rest.first_chunk()).ok_or("malformed challenge")?;
                let hash = nt_hash(password.expose()).ok_or("the EAP secret is not UTF-8")?;
                let short = challenge_hash(&ours, challenge, user);
                let response = nt_response(&short, &hash);
                let expected = authenticator_response(&hash, &response, &short);
                let value = [&[RESPONSE_LENGTH as u8], ours.as_slice(), &[0; 8], &response, &[0], user].concat();
                let state = Self::Responded { id, expected, msk: msk(&hash, &response) };
                Ok((state, message(RESPONSE, id, &value)))
            }
            (Self::Responded { id: asked, expected, msk }, SUCCESS) => {
                let shown = value.strip_prefix(b"S=").and_then(|text| text.get(..40));
                let shown = shown.and_then(|text| data_encoding::HEXUPPER_PERMISSIVE.decode(text).ok());
                let right: bool = shown.is_some_and(|shown| expected.ct_eq(&shown).into());
                if !right || id != asked {
                    return Err("the gateway does not know the password".to_owned());
                }
                Ok((Self::Succeeded(msk), vec![SUCCESS]))
            }
            (Self::Responded { .. }, FAILURE) => {
                let error = value.strip_prefix(b"E=").unwrap_or_default();
                let digits = error.iter().take_while(|octet| octet.is_ascii_digit()).take(10);
                let number: String = digits.map(|octet| char::from(*octet)).collect();
                let reason = match number.as_str() {
                    "691" => "user name or password is wrong",
                    "646" => "the gateway takes nobody at this hour",
                    "647" => "the account is disabled",
                    "648" => "the password has expired",
                    "649" => "the user has no permission to dial in",
                    _ => "the gateway says that it failed",
                };
                Ok((Self::Refused(format!("{reason} (EAP-MSCHAPv2 error {number})")), vec![FAILURE]))
            }
            _ => Err("an EAP-MSCHAPv2 request out of turn".to_owned()),
        }
    }
}

/// What a peer answers to a challenge.
struct Response<'a> {
    peer_challenge: [u8; CHALLENGE_LENGTH],
    nt_response: [u8; NT_RESPONSE_LENGTH],
    name: &'a [u8],
}

impl<'a> Response<'a> {
    fn parse(data: &'a [u8], asked: u8) -> Option<Self> {
        let (code, id, value) = parse(data)?;
        let (size, value) = value.split_first()?;
        let (peer_challenge, value) = value.split_first_chunk()?;
        let (_reserved, value) = value.split_first_chunk::<8>()?;
        let (nt_response, value) = value.split_first_chunk()?;
        let (_flags, name) = value.split_first()?;
        let fits = code == RESPONSE && id == asked && usize::from(*size) == RESPONSE_LENGTH && name.len() <= MAX_NAME;
        fits.then_some(Self { peer_challenge: *peer_challenge, nt_response: *nt_response, name })
    }
}

/// OpCode, MS-CHAPv2-ID, MS-Length, and what they are before.
fn message(code: u8, id: u8, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX).to_be_bytes();
    [&[code, id], length.as_slice(), value].concat()
}

fn parse(data: &[u8]) -> Option<(u8, u8, &[u8])> {
    let ([code, id, high, low], value) = data.split_first_chunk()?;
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    (length == data.len()).then_some((*code, *id, value))
}

fn without_domain(name: &[u8]) -> &[u8] {
    name.rsplit(|octet| *octet == b'\\').next().unwrap_or(name)
}

/// RFC 2759 §8.3: MD4 of the password in UTF-16, little end first. `None` if it is not text.
fn nt_hash(password: &[u8]) -> Option<Hash> {
    let text = std::str::from_utf8(password).ok()?;
    let wide = Zeroizing::new(text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>());
    Some(Zeroizing::new(Md4::digest(wide.as_slice()).into()))
}

/// RFC 2759 §8.2.
fn challenge_hash(peer: &[u8; 16], authenticator: &[u8; 16], name: &[u8]) -> [u8; 8] {
    let digest = sha1(&[peer, authenticator, without_domain(name)]);
    let mut short = [0; 8];
    short.iter_mut().zip(digest.iter()).for_each(|(to, from)| *to = *from);
    short
}

/// RFC 2759 §8.5: the challenge under three DES keys out of the hash.
fn nt_response(challenge: &[u8; 8], hash: &Hash) -> [u8; NT_RESPONSE_LENGTH] {
    let mut padded = Zeroizing::new([0; 21]);
    padded.iter_mut().zip(hash.iter()).for_each(|(to, from)| *to = *from);
    let mut response = [0; NT_RESPONSE_LENGTH];
    for (key, part) in padded.chunks_exact(7).zip(response.chunks_exact_mut(8)) {
        let mut block = (*challenge).into();
        Des::new(&(*des_key(key)).into()).encrypt_block(&mut block);
        part.copy_from_slice(&block);
    }
    response
}

/// §8.6: 56 bits with room for parity bits, which DES does not look at.
fn des_key(key: &[u8]) -> Zeroizing<[u8; 8]> {
    let bits = key.iter().fold(0_u64, |bits, octet| (bits << 8) | u64::from(*octet));
    let mut spread = Zeroizing::new([0; 8]);
    for (octet, shift) in spread.iter_mut().zip([49, 42, 35, 28, 21, 14, 7, 0]) {
        let seven = u8::try_from((bits >> shift) & 0x7f).unwrap_or(0);
        *octet = seven << 1;
    }
    spread
}

/// RFC 2759 §8.7.
fn authenticator_response(hash: &Hash, response: &[u8; NT_RESPONSE_LENGTH], challenge: &[u8; 8]) -> [u8; 20] {
    let first = sha1(&[hash_of(hash).as_slice(), response, b"Magic server to client signing constant"]);
    *sha1(&[first.as_slice(), challenge, b"Pad to make it do more than one iteration"])
}

/// RFC 2759 §8.4: of the password's hash.
fn hash_of(hash: &Hash) -> Hash {
    Zeroizing::new(Md4::digest(hash.as_slice()).into())
}

/// RFC 3079 §3.3, §3.4: the keys of both directions, and zeros up to the 64 octets that RFC 3748 §7.10 wants.
fn msk(hash: &Hash, response: &[u8; NT_RESPONSE_LENGTH]) -> Secret {
    let master = sha1(&[hash_of(hash).as_slice(), response, b"This is the MPPE Master Key"]);
    let master = master.first_chunk::<START_KEY_LENGTH>().map_or(&[] as &[u8], |master| master);
    let start = |magic: &[u8]| sha1(&[master, &[0; 40], magic, &[0xf2; 40]]);
    let of_peer = b"On the client side, this is the send key; on the server side, it is the receive key.";
    let of_server = b"On the client side, this is the receive key; on the server side, it is the send key.";
    let mut key = Vec::with_capacity(MSK_LENGTH);
    for start in [start(of_peer), start(of_server)] {
        key.extend(start.iter().take(START_KEY_LENGTH));
    }
    key.resize(MSK_LENGTH, 0);
    Secret::new(key)
}

fn sha1(parts: &[&[u8]]) -> Zeroizing<[u8; 20]> {
    let mut hash = Sha1::new();
    parts.iter().for_each(|part| hash.update(part));
    Zeroizing::new(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        data_encoding::HEXUPPER_PERMISSIVE.decode(text.replace(' ', "").as_bytes()).unwrap()
    }

    // RFC 2759 §9.2.
    #[test]
    fn the_vectors_of_rfc_2759() {
        let authenticator: [u8; 16] = hex("5B5D7C7D7B3F2F3E3C2C602132262628").try_into().unwrap();
        let peer: [u8; 16] = hex("21402324255E262A28295F2B3A337C7E").try_into().unwrap();
        let short = challenge_hash(&peer, &authenticator, b"User");
        assert_eq!(short.to_vec(), hex("D02E4386BCE91226"));
        assert_eq!(challenge_hash(&peer, &authenticator, b"DOMAIN\\User"), short);
        let hash = nt_hash(b"clientPass").unwrap();
        assert_eq!(hash.to_vec(), hex("44EBBA8D5312B8D611474411F56989AE"));
        assert_eq!(hash_of(&hash).to_vec(), hex("41C00C584BD2D91C4017A2A12FA59F3F"));
        let response = nt_response(&short, &hash);
        assert_eq!(response.to_vec(), hex("82309ECD8D708B5EA08FAA3981CD83544233114A3D85D6DF"));
        let shown = authenticator_response(&hash, &response, &short);
        assert_eq!(shown.to_vec(), hex("407A5589115FD0D6209F510FE9C04566932CDA56"));
    }

    // RFC 3079 §3.5.3: SendStartKey128 of the same. The test of a real strongSwan shows the other half.
    #[test]
    fn the_vector_of_rfc_3079() {
        let hash = nt_hash(b"clientPass").unwrap();
        let response = hex("82309ECD8D708B5EA08FAA3981CD83544233114A3D85D6DF").try_into().unwrap();
        let msk = msk(&hash, &response);
        assert_eq!(msk.expose().len(), 64);
        assert_eq!(msk.expose()[16..32], hex("8B7CDC149B993A1BA118CB153F56DCCB"));
        assert_eq!(msk.expose()[32..], [0; 32]);
    }

    #[test]
    fn passwords_are_utf_16() {
        assert_eq!(nt_hash(&[0xff, 0xfe]), None);
        assert_eq!(*nt_hash("ä€😀".as_bytes()).unwrap(), <[u8; 16]>::from(Md4::digest(hex("E400AC203DD800DE"))));
    }
}
