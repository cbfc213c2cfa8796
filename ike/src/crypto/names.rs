//! strongSwan's names of algorithms for status output and the log: `AES_GCM_16`, `HMAC_SHA2_256_128`,
//! `PRF_HMAC_SHA2_256`, `CURVE_25519`, `ECP_384`, `MODP_3072`; unknown ones as `(1234)`.

use ipsec::transform::{Encr, Integ, Ke, Prf, Proposal, Protocol, SequenceNumbers, Transform, TransformType};

/// Name of a cipher.
pub fn encr(id: Encr) -> String {
    named(
        id.0,
        match id.0 {
            2 => "DES_CBC",
            3 => "3DES_CBC",
            11 => "NULL",
            12 => "AES_CBC",
            13 => "AES_CTR",
            14 => "AES_CCM_8",
            15 => "AES_CCM_12",
            16 => "AES_CCM_16",
            18 => "AES_GCM_8",
            19 => "AES_GCM_12",
            20 => "AES_GCM_16",
            21 => "NULL_AES_GMAC",
            23 => "CAMELLIA_CBC",
            24 => "CAMELLIA_CTR",
            28 => "CHACHA20_POLY1305",
            _ => "",
        },
    )
}

/// Name of an integrity algorithm.
pub fn integ(id: Integ) -> String {
    named(
        id.0,
        match id.0 {
            0 => "NONE",
            1 => "HMAC_MD5_96",
            2 => "HMAC_SHA1_96",
            5 => "AES_XCBC_96",
            8 => "AES_CMAC_96",
            12 => "HMAC_SHA2_256_128",
            13 => "HMAC_SHA2_384_192",
            14 => "HMAC_SHA2_512_256",
            _ => "",
        },
    )
}

/// Name of a PRF.
pub fn prf(id: Prf) -> String {
    named(
        id.0,
        match id.0 {
            1 => "PRF_HMAC_MD5",
            2 => "PRF_HMAC_SHA1",
            4 => "PRF_AES128_XCBC",
            5 => "PRF_HMAC_SHA2_256",
            6 => "PRF_HMAC_SHA2_384",
            7 => "PRF_HMAC_SHA2_512",
            8 => "PRF_AES128_CMAC",
            _ => "",
        },
    )
}

/// Name of a key exchange method.
pub fn ke(id: Ke) -> String {
    named(
        id.0,
        match id.0 {
            0 => "NONE",
            1 => "MODP_768",
            2 => "MODP_1024",
            5 => "MODP_1536",
            14 => "MODP_2048",
            15 => "MODP_3072",
            16 => "MODP_4096",
            17 => "MODP_6144",
            18 => "MODP_8192",
            19 => "ECP_256",
            20 => "ECP_384",
            21 => "ECP_521",
            25 => "ECP_192",
            26 => "ECP_224",
            27 => "ECP_224_BP",
            28 => "ECP_256_BP",
            29 => "ECP_384_BP",
            30 => "ECP_512_BP",
            31 => "CURVE_25519",
            32 => "CURVE_448",
            35 => "ML_KEM_512",
            36 => "ML_KEM_768",
            37 => "ML_KEM_1024",
            _ => "",
        },
    )
}

/// Name of an additional key exchange, numbered from 1 to 7: `KE1_ML_KEM_768`.
pub fn additional_ke(number: u8, id: Ke) -> String {
    format!("KE{number}_{}", ke(id))
}

/// Proposals as charon's log has them, `IKE:AES_GCM_16_256/PRF_HMAC_SHA2_256/CURVE_25519/KE1_ML_KEM_768`, separated
/// by commas; cut at 1,000 octets, because a stranger's offer can be much longer than anybody reads.
pub fn proposals(proposals: &[Proposal]) -> String {
    const LONGEST: usize = 1_000;
    let mut text = String::new();
    for one in proposals {
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push_str(match one.protocol {
            Protocol::IKE => "IKE:",
            Protocol::ESP => "ESP:",
            Protocol::AH => "AH:",
            _ => "(?):",
        });
        // charon's order.
        let rank = |kind| match kind {
            TransformType::INTEG => (TransformType::ENCR, 1),
            TransformType::SN => (TransformType(u8::MAX), 0),
            kind => (kind, 0),
        };
        let mut transforms: Vec<&Transform> = one.transforms.iter().collect();
        transforms.sort_by_key(|transform| rank(transform.kind));
        let names: Vec<String> = transforms.into_iter().map(transform).collect();
        text.push_str(&names.join("/"));
        if text.len() > LONGEST {
            text.truncate(LONGEST);
            text.push_str("...");
            break;
        }
    }
    text
}

fn transform(transform: &Transform) -> String {
    let id = transform.id;
    match transform.kind {
        TransformType::ENCR => match transform.key_bits {
            Some(bits) => format!("{}_{bits}", encr(Encr(id))),
            None => encr(Encr(id)),
        },
        TransformType::PRF => prf(Prf(id)),
        TransformType::INTEG => integ(Integ(id)),
        TransformType::KE => ke(Ke(id)),
        TransformType::SN => match SequenceNumbers(id) {
            SequenceNumbers::SEQUENTIAL_32 => "NO_EXT_SEQ".to_owned(),
            SequenceNumbers::PARTIAL_64 => "EXT_SEQ".to_owned(),
            SequenceNumbers(other) => format!("SN({other})"),
        },
        kind => match TransformType::ADDITIONAL_KE.into_iter().zip(1..).find(|(known, _)| *known == kind) {
            Some((_, number)) => additional_ke(number, Ke(id)),
            None => format!("({}:{id})", kind.0),
        },
    }
}

fn named(id: u16, name: &str) -> String {
    if name.is_empty() { format!("({id})") } else { name.to_owned() }
}
