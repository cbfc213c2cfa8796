//! Authorities and secrets as configuration and VICI write them.

use std::path::Path;

use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};
use ipsec::secret::Secret;

use crate::config::certificate::{is_authority, read_certificate};
use crate::config::connection::{CertificateKind, CertificateSource};
use crate::tree::{Node, Section};

/// A CA that `authorities.<name>` defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// Name.
    pub name: String,
    /// Its certificate, DER.
    pub cacert: Vec<u8>,
    /// `crl_uris`: shown, not used yet.
    pub crl_uris: Vec<String>,
    /// `ocsp_uris`: shown, not used yet.
    pub ocsp_uris: Vec<String>,
    /// `cert_uri_base`: shown, not used yet.
    pub cert_uri_base: Option<String>,
}

impl Authority {
    /// Reads `authorities.<name>`.
    ///
    /// # Errors
    /// A text for humans, in charon's words.
    pub fn read(name: &str, section: &Section, source: &dyn CertificateSource) -> Result<Self, String> {
        let mut authority = Self {
            name: name.to_owned(),
            cacert: Vec::new(),
            crl_uris: Vec::new(),
            ocsp_uris: Vec::new(),
            cert_uri_base: None,
        };
        let invalid = |option: &str, reason: &str| format!("invalid value for: {option}, config discarded: {reason}");
        for (option, node) in &section.entries {
            let texts = || section.list(option).iter().filter_map(|item| item.text().map(str::to_owned)).collect();
            match (option.as_str(), node) {
                ("cacert", Node::Value(value)) => {
                    let der = source.certificate(CertificateKind::Authority, value);
                    authority.cacert = der.map_err(|reason| invalid(option, &reason))?;
                }
                ("file", Node::Value(value)) => {
                    let path = value.text().ok_or_else(|| invalid(option, "it is not text"))?;
                    authority.cacert = read_certificate(Path::new(path)).map_err(|reason| invalid(option, &reason))?;
                }
                ("crl_uris", _) => authority.crl_uris = texts(),
                ("ocsp_uris", _) => authority.ocsp_uris = texts(),
                ("cert_uri_base", Node::Value(value)) => authority.cert_uri_base = value.text().map(str::to_owned),
                ("handle" | "slot" | "module", _) => {
                    return Err(invalid(option, "certificates on tokens are not served yet; use 'cacert'"));
                }
                ("file" | "cert_uri_base" | "cacert", _) => return Err(invalid(option, "one value is expected")),
                _ => return Err(format!("unknown option: {option}, config discarded")),
            }
        }
        if authority.cacert.is_empty() {
            return Err("CA certificate missing, config discarded".to_owned());
        }
        if !is_authority(&authority.cacert) {
            return Err("certificate without CA flag, rejected".to_owned());
        }
        Ok(authority)
    }
}

/// Decodes a secret of a file: text, `0x` and hexadecimal digits, or `0s` and Base64.
///
/// # Errors
/// A text for humans, without the secret.
pub fn decode_secret(written: &[u8]) -> Result<Secret, &'static str> {
    let after = |prefix: &[u8]| {
        let (head, rest) = written.split_at_checked(2)?;
        head.eq_ignore_ascii_case(prefix).then_some(rest)
    };
    if let Some(digits) = after(b"0x") {
        return HEXLOWER_PERMISSIVE.decode(digits).map(Secret::new).map_err(|_| "it is not hexadecimal after 0x");
    }
    if let Some(text) = after(b"0s") {
        return BASE64.decode(text).map(Secret::new).map_err(|_| "it is not Base64 after 0s");
    }
    Ok(Secret::new(written.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_text_hexadecimal_or_base64() {
        let decoded = |text: &str| decode_secret(text.as_bytes()).map(|secret| secret.expose().to_vec());
        assert_eq!(decoded("0xzz"), Err("it is not hexadecimal after 0x"));
        assert_eq!(decoded("0x1"), Err("it is not hexadecimal after 0x"));
        assert_eq!(decoded("0s!"), Err("it is not Base64 after 0s"));
        assert_eq!(decoded("0x0Aff"), Ok(vec![0x0a, 0xff]));
        assert_eq!(decoded("0SaGVsbG8="), Ok(b"hello".to_vec()));
        assert_eq!(decoded("0"), Ok(b"0".to_vec()));
        assert_eq!(decoded("hello"), Ok(b"hello".to_vec()));
    }
}
