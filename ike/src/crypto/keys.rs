//! Keys of IKE SAs and Child SAs (RFC 7296 §2.14, §2.17, §2.18).

use ipsec::crypto::{KeyLengths, Protection};
use ipsec::plane::{EspKeys, EspSuite};
use ipsec::secret::Secret;
use ipsec::transform::Prf;

use super::prf::nonce_as_key;
use super::{IkeSuite, KeyError, prf, prf_len, prf_plus};

/// Keys of an IKE SA (RFC 7296 §2.14).
#[derive(Debug)]
pub struct IkeKeys {
    /// SK_d.
    pub d: Secret,
    /// SK_ai and SK_ei: protects what the original initiator sends.
    pub initiator: EspKeys,
    /// SK_ar and SK_er.
    pub responder: EspKeys,
    /// SK_pi.
    pub pi: Secret,
    /// SK_pr.
    pub pr: Secret,
}

/// Both nonces and both SPIs of an IKE SA.
#[derive(Clone, Copy, Debug)]
pub struct KeySeed<'a> {
    /// Initiator's nonce.
    pub ni: &'a [u8],
    /// Responder's nonce.
    pub nr: &'a [u8],
    /// Initiator's SPI.
    pub spi_i: u64,
    /// Responder's SPI.
    pub spi_r: u64,
}

/// Keys of a first IKE SA: SKEYSEED = prf(Ni | Nr, g^ir) (RFC 7296 §2.14).
pub fn ike_keys(suite: &IkeSuite, secret: &Secret, seed: KeySeed<'_>) -> Result<IkeKeys, KeyError> {
    // A Secret because the nonces are a key here, though not a secret one.
    let nonces = Secret::new([nonce_as_key(suite.prf, seed.ni), nonce_as_key(suite.prf, seed.nr)].concat());
    let skeyseed = prf(suite.prf, nonces.expose(), &[secret.expose()])?;
    expand(suite, &skeyseed, seed)
}

/// Keys of a rekeyed IKE SA: SKEYSEED = prf(SK_d (old), g^ir (new) | Ni | Nr) with the old PRF (§2.18), or, with
/// additional key exchanges, prf(SK_d, SK(0) | Ni | Nr | SK(1) | … SK(n)) (RFC 9370 §2.2.4).
pub fn rekeyed_ike_keys(
    old_prf: Prf,
    old_sk_d: &Secret,
    suite: &IkeSuite,
    secret: &Secret,
    additional: &[Secret],
    seed: KeySeed<'_>,
) -> Result<IkeKeys, KeyError> {
    let mut parts = vec![secret.expose(), seed.ni, seed.nr];
    parts.extend(additional.iter().map(Secret::expose));
    let skeyseed = prf(old_prf, old_sk_d.expose(), &parts)?;
    expand(suite, &skeyseed, seed)
}

/// Keys of an IKE SA after an additional key exchange in IKE_INTERMEDIATE: SKEYSEED(n) = prf(SK_d(n-1), SK(n) |
/// Ni | Nr), and the rest as before, with the nonces and SPIs of IKE_SA_INIT (RFC 9370 §2.2.2).
pub fn intermediate_ike_keys(
    suite: &IkeSuite,
    sk_d: &Secret,
    secret: &Secret,
    seed: KeySeed<'_>,
) -> Result<IkeKeys, KeyError> {
    rekeyed_ike_keys(suite.prf, sk_d, suite, secret, &[], seed)
}

/// Keys of an IKE SA that a ticket brings back: SKEYSEED = prf(SK_d_old, "Resumption" | Ni | Nr), and the rest as in the
/// beginning, with the new nonces and SPIs (RFC 5723 §5.1).
pub fn resumed_ike_keys(suite: &IkeSuite, old_sk_d: &Secret, seed: KeySeed<'_>) -> Result<IkeKeys, KeyError> {
    let skeyseed = prf(suite.prf, old_sk_d.expose(), &[b"Resumption", seed.ni, seed.nr])?;
    expand(suite, &skeyseed, seed)
}

/// One of SK_d, SK_pi and SK_pr with a post-quantum preshared key: SK = prf+(PPK, SK') (RFC 8784 §3).
pub fn mix_ppk(prf_algorithm: Prf, ppk: &Secret, key: &Secret) -> Result<Secret, KeyError> {
    prf_plus(prf_algorithm, ppk.expose(), &[key.expose()], key.expose().len())
}

/// {SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr} = prf+(SKEYSEED, Ni | Nr | SPIi | SPIr).
fn expand(suite: &IkeSuite, skeyseed: &Secret, seed: KeySeed<'_>) -> Result<IkeKeys, KeyError> {
    let KeyLengths { encr, integ } =
        Protection::key_lengths(suite.encr, suite.key_bits, suite.integ).ok_or(KeyError::Unsupported)?;
    let prf = prf_len(suite.prf).ok_or(KeyError::Unsupported)?;
    let spis = [seed.spi_i.to_be_bytes(), seed.spi_r.to_be_bytes()];
    let keymat = prf_plus(
        suite.prf,
        skeyseed.expose(),
        &[seed.ni, seed.nr, spis.as_flattened()],
        3 * prf + 2 * integ + 2 * encr,
    )?;
    let mut rest = keymat.expose();
    let d = cut(&mut rest, prf)?;
    let (ai, ar) = (cut(&mut rest, integ)?, cut(&mut rest, integ)?);
    let (ei, er) = (cut(&mut rest, encr)?, cut(&mut rest, encr)?);
    let (pi, pr) = (cut(&mut rest, prf)?, cut(&mut rest, prf)?);
    Ok(IkeKeys { d, initiator: EspKeys { encr: ei, integ: ai }, responder: EspKeys { encr: er, integ: ar }, pi, pr })
}

/// Keys of a Child SA: (initiator to responder, responder to initiator) from
/// KEYMAT = prf+(SK_d, [g^ir (new) |] Ni | Nr) (§2.17). "Initiator" is who began the exchange that
/// creates the Child SA, and the nonces are that exchange's. With additional key exchanges KEYMAT = prf+(SK_d,
/// SK(0) | Ni | Nr | SK(1) | … SK(n)) (RFC 9370 §2.2.4); `secrets` are SK(0) and the others, or none.
pub fn child_keys(
    prf_algorithm: Prf,
    sk_d: &Secret,
    suite: &EspSuite,
    secrets: &[Secret],
    ni: &[u8],
    nr: &[u8],
) -> Result<(EspKeys, EspKeys), KeyError> {
    let KeyLengths { encr, integ } =
        Protection::key_lengths(suite.encr, suite.key_bits, suite.integ).ok_or(KeyError::Unsupported)?;
    let mut exposed = secrets.iter().map(Secret::expose);
    let mut parts = vec![exposed.next().unwrap_or_default(), ni, nr];
    parts.extend(exposed);
    let keymat = prf_plus(prf_algorithm, sk_d.expose(), &parts, 2 * (encr + integ))?;
    let mut rest = keymat.expose();
    // All keys of one direction before those of the other, encryption before integrity.
    let mut direction = || Ok(EspKeys { encr: cut(&mut rest, encr)?, integ: cut(&mut rest, integ)? });
    Ok((direction()?, direction()?))
}

/// Channel binding of an IKE SA, ours since there is no standard one (RFC 5056 §2.1, unique):
/// prf+(SK_d, "ikev2 channel binding v1" | length of I | I | length of R | R), 32 octets, where I and R are what the
/// original initiator and the responder signed in IKE_AUTH (§2.15) and lengths have 32 bits. SK_d and the keys in the
/// signed octets bind the key exchange, the messages in them the negotiation, the identities in them the authentication.
pub fn channel_binding(prf: Prf, sk_d: &Secret, initiator: &[u8], responder: &[u8]) -> Result<[u8; 32], KeyError> {
    let length = |octets: &[u8]| u32::try_from(octets.len()).map(u32::to_be_bytes).map_err(|_| KeyError::Unsupported);
    let (of_initiator, of_responder) = (length(initiator)?, length(responder)?);
    let seed = [CHANNEL_BINDING, &of_initiator, initiator, &of_responder, responder];
    prf_plus(prf, sk_d.expose(), &seed, 32)?.expose().try_into().map_err(|_| KeyError::Unsupported)
}

const CHANNEL_BINDING: &[u8] = b"ikev2 channel binding v1";

fn cut(rest: &mut &[u8], length: usize) -> Result<Secret, KeyError> {
    let (key, after) = rest.split_at_checked(length).ok_or(KeyError::Unsupported)?;
    *rest = after;
    Ok(Secret::new(key.to_vec()))
}
