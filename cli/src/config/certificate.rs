//! Certificates in configuration: PEM or DER to DER, and the little that configuration needs to know of them.

use std::io::Read;
use std::path::Path;

use pad::{Certificate, Identity, PublicKey};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

const MAX_FILE: usize = 1 << 20;

/// The DER of a certificate that is PEM or DER.
///
/// # Errors
/// A text for humans.
pub fn certificate_der(bytes: &[u8]) -> Result<Vec<u8>, String> {
    // An X.509 certificate is a SEQUENCE; PEM begins with a dash or with text.
    let der = if bytes.first() == Some(&0x30) {
        bytes.to_vec()
    } else {
        CertificateDer::from_pem_slice(bytes)
            .map_err(|_| "not an X.509 certificate in DER or PEM".to_owned())?
            .as_ref()
            .to_vec()
    };
    Certificate::parse(&der).map_err(|error| error.to_string())?;
    Ok(der)
}

/// The DER of the certificate in a file.
///
/// # Errors
/// A text for humans, with the file's name.
pub fn read_certificate(path: &Path) -> Result<Vec<u8>, String> {
    let explain = |reason: String| format!("{}: {reason}", path.display());
    let bytes = read_limited(path).map_err(|error| explain(error.to_string()))?;
    certificate_der(&bytes).map_err(explain)
}

/// The public key in a file, DER or PEM.
///
/// # Errors
/// A text for humans, with the file's name.
pub fn read_public_key(path: &Path) -> Result<PublicKey, String> {
    let explain = |reason: &dyn std::fmt::Display| format!("{}: {reason}", path.display());
    let bytes = read_limited(path).map_err(|error| explain(&error))?;
    PublicKey::parse(&bytes).map_err(|error| explain(&error))
}

/// A regular file's octets, if they are not too many to be a credential.
///
/// # Errors
/// Those of reading; `InvalidInput` for what is not a regular file or is larger than 1 MiB.
pub fn read_limited(path: &Path) -> std::io::Result<zeroize::Zeroizing<Vec<u8>>> {
    read_up_to(path, MAX_FILE)
}

/// Reads a regular file of at most so many octets.
///
/// # Errors
/// Those of the file system, and `InvalidInput` for another kind of file or one that is larger.
pub fn read_up_to(path: &Path, limit: usize) -> std::io::Result<zeroize::Zeroizing<Vec<u8>>> {
    let refuse = |reason: String| std::io::Error::new(std::io::ErrorKind::InvalidInput, reason);
    if !std::fs::metadata(path)?.is_file() {
        return Err(refuse("not a regular file".to_owned()));
    }
    let mut bytes = zeroize::Zeroizing::new(Vec::new());
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    std::fs::File::open(path)?.take(most).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(refuse(format!("larger than {} MiB", limit >> 20)));
    }
    Ok(bytes)
}

/// The subject of a certificate (DER) as an identity; `None` if it is not a certificate or has no subject.
pub fn subject(der: &[u8]) -> Option<Identity> {
    Certificate::parse(der).ok()?.subject().cloned()
}

/// True for a certificate (DER) with the CA flag.
pub fn is_authority(der: &[u8]) -> bool {
    Certificate::parse(der).is_ok_and(|certificate| certificate.is_authority())
}
