//! Certificates for tests.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams,
    SanType, SerialNumber, SignatureAlgorithm,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// A CA.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

/// A key with its certificate, PEM.
pub struct Credential {
    /// The certificate.
    pub certificate: Vec<u8>,
    /// The key, PKCS#8.
    pub key: Vec<u8>,
}

impl Authority {
    /// A new self-signed CA.
    pub fn new(name: &str, algorithm: &'static SignatureAlgorithm) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = dn(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(algorithm).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// PEM of the CA's certificate.
    pub fn certificate(&self) -> Vec<u8> {
        self.certificate.pem().into_bytes()
    }

    /// Issues a certificate for a DNS name, with `O=Latchkey tests, CN=name` as subject.
    pub fn issue(&self, name: &str, algorithm: &'static SignatureAlgorithm) -> Credential {
        let mut params = CertificateParams::default();
        params.distinguished_name = dn(name);
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![1, 3, 6, 1, 5, 5, 7, 3, 17])];
        let key = KeyPair::generate_for(algorithm).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Credential { certificate: certificate.pem().into_bytes(), key: key.serialize_pem().into_bytes() }
    }
}

impl Authority {
    /// A certificate revocation list with these certificates, PEM. Later ones have greater numbers.
    pub fn revoke(&self, number: u64, revoked: &[&Credential]) -> Vec<u8> {
        let now = rcgen::date_time_ymd(2020, 1, 1);
        let entry = |credential: &&Credential| {
            let der = CertificateDer::from_pem_slice(&credential.certificate).unwrap();
            let serial = pad::Certificate::parse(&der).unwrap().serial().to_vec();
            RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: now,
                reason_code: Some(RevocationReason::KeyCompromise),
                invalidity_date: None,
            }
        };
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: rcgen::date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap().into_bytes()
    }

    /// Issues a certificate for a TLS server of this name.
    pub fn issue_for_tls(&self, name: &str) -> Credential {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Credential { certificate: certificate.pem().into_bytes(), key: key.serialize_pem().into_bytes() }
    }
}

fn dn(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::OrganizationName, "Latchkey tests");
    dn.push(DnType::CommonName, name);
    dn
}
