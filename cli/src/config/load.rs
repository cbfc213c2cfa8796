//! Reads a `swanctl` folder at start, as `swanctl --load-all` would load it over VICI: `swanctl.conf`, the
//! folders of certificates and keys, secrets, authorities and connections.

use std::path::{Path, PathBuf};

use ipsec::secret::Secret;
use pad::{CredentialError, Credentials, IdentityPattern, PublicKey};

use crate::config::certificate::{certificate_der, read_certificate, read_limited, read_public_key, read_up_to};
use crate::config::connection::{CertificateKind, CertificateSource, connection};
use crate::config::credentials::{Authority, decode_secret};
use crate::config::pool::pool;
use crate::config::settings::{self, SettingsError};
use crate::config::{Configured, Report, Severity};
use crate::tree::{Node, Origin, Section, Value};

/// Folders of private keys, and of the secrets that hold their passphrases.
const KEY_FOLDERS: [&str; 4] = ["private", "rsa", "ecdsa", "pkcs8"];
/// Folders that we do not read yet, and what is in them.
const OTHER_FOLDERS: [(&str, &str); 5] = [
    ("pkcs12", "PKCS#12 containers"),
    ("x509aa", "attribute authorities"),
    ("x509ac", "attribute certificates"),
    ("x509ocsp", "OCSP signers"),
    ("bliss", "BLISS keys"),
];

/// What was read.
#[derive(Debug)]
pub struct Loaded {
    /// All that is valid.
    pub configured: Configured,
    /// Findings, in order.
    pub reports: Vec<Report>,
}

impl Loaded {
    /// True if something was refused: a reload then keeps what is running, a start goes on with the rest, as
    /// charon does.
    pub fn has_errors(&self) -> bool {
        self.reports.iter().any(|report| report.severity == Severity::Error)
    }
}

/// The folder: `$SWANCTL_DIR`, or `/etc/swanctl`.
pub fn default_folder() -> PathBuf {
    std::env::var_os("SWANCTL_DIR").map_or_else(|| PathBuf::from("/etc/swanctl"), PathBuf::from)
}

/// Reads a folder. Whatever is wrong is among the reports.
pub fn load(folder: &Path) -> Loaded {
    let mut loader = Loader { folder, configured: Configured::default(), reports: Vec::new() };
    match settings::load(&folder.join("swanctl.conf")) {
        Ok(read) => {
            loader.reports.extend(read.reports);
            loader.read(&read.root);
        }
        Err(error) => loader.refused(error),
    }
    Loaded { configured: loader.configured, reports: loader.reports }
}

struct Loader<'a> {
    folder: &'a Path,
    configured: Configured,
    reports: Vec<Report>,
}

impl Loader<'_> {
    fn refused(&mut self, error: SettingsError) {
        let (origin, message) = match error {
            SettingsError::Syntax { origin, message, hint } => (Some(origin), format!("{message}; {hint}")),
            other => (None, other.to_string()),
        };
        let subject = "swanctl.conf".to_owned();
        self.reports.push(Report { severity: Severity::Error, origin, subject, message });
    }

    fn report(&mut self, severity: Severity, origin: Option<&Origin>, subject: impl Into<String>, message: String) {
        self.reports.push(Report { severity, origin: origin.cloned(), subject: subject.into(), message });
    }

    fn read(&mut self, root: &Section) {
        for (name, node) in &root.entries {
            if !matches!(name.as_str(), "connections" | "secrets" | "authorities" | "pools") {
                let message = "unknown section, ignored".to_owned();
                self.report(Severity::Warning, Some(node.origin()), name, message);
            }
        }
        let secrets = root.section("secrets");
        self.certificates();
        self.keys(secrets);
        if let Some(secrets) = secrets {
            self.secrets(secrets);
        }
        if let Some(authorities) = root.section("authorities") {
            self.authorities(authorities);
        }
        for (name, section) in root.section("pools").into_iter().flat_map(Section::sections) {
            match pool(name, section) {
                Ok(pool) => self.configured.pools.push(pool),
                Err(reason) => self.report(Severity::Error, Some(&section.origin), format!("pools.{name}"), reason),
            }
        }
        if let Some(connections) = root.section("connections") {
            self.connections(connections);
        }
    }

    fn certificates(&mut self) {
        type Add = fn(&mut Credentials, &[u8]) -> Result<(), CredentialError>;
        let folders: [(&str, Add); 3] = [
            ("x509", Credentials::add_certificate),
            ("x509ca", Credentials::add_authority),
            ("pubkey", Credentials::add_public_key),
        ];
        for (folder, add) in folders {
            for path in files(&self.folder.join(folder)) {
                let added = read_limited(&path)
                    .map_err(|error| error.to_string())
                    .and_then(|bytes| add(&mut self.configured.credentials, &bytes).map_err(|error| error.to_string()));
                self.file_result(&path, added);
            }
        }
        for path in files(&self.folder.join("x509crl")) {
            let added = read_up_to(&path, pad::revocation::MAX_CRL_SIZE)
                .map_err(|error| error.to_string())
                .and_then(|bytes| self.configured.credentials.add_crl(&bytes).map_err(|error| error.to_string()));
            self.file_result(&path, added);
        }
        for (name, contents) in OTHER_FOLDERS {
            if let Some(path) = files(&self.folder.join(name)).first() {
                let message = format!("{contents} are not served yet, ignored");
                self.report(Severity::Warning, None, path.display().to_string(), message);
            }
        }
    }

    /// A file that is not a credential is a warning only, as in swanctl: folders collect other files too.
    fn file_result(&mut self, path: &Path, result: Result<(), String>) {
        if let Err(reason) = result {
            self.report(Severity::Warning, None, path.display().to_string(), format!("{reason}, ignored"));
        }
    }

    fn keys(&mut self, secrets: Option<&Section>) {
        for folder in KEY_FOLDERS {
            let passphrases = self.passphrases(folder, secrets);
            let mut used = vec![false; passphrases.len()];
            for path in files(&self.folder.join(folder)) {
                let loaded = self.key(&path, &passphrases, &mut used);
                self.file_result(&path, loaded);
            }
            for ((file, _, origin), _) in passphrases.iter().zip(used).filter(|(_, used)| !used) {
                let message = format!("there is no key {file} in {folder} that needs this passphrase");
                self.report(Severity::Warning, Some(origin), "secrets", message);
            }
        }
    }

    fn key(&mut self, path: &Path, passphrases: &[(String, Secret, Origin)], used: &mut [bool]) -> Result<(), String> {
        let bytes = read_limited(path).map_err(|error| error.to_string())?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let credentials = &mut self.configured.credentials;
        let mut result = credentials.add_private_key(&bytes, None);
        for ((file, passphrase, _), used) in passphrases.iter().zip(used) {
            if *file == name {
                *used = true;
                if result.is_err() {
                    result = credentials.add_private_key(&bytes, Some(passphrase.expose()));
                }
            }
        }
        result.map(|_| ()).map_err(|error| error.to_string())
    }

    /// File name, passphrase and place of each section such as `secrets.private1 { file = …, secret = … }`.
    fn passphrases(&mut self, kind: &str, secrets: Option<&Section>) -> Vec<(String, Secret, Origin)> {
        let mut passphrases = Vec::new();
        for (name, section) in secrets.into_iter().flat_map(Section::sections) {
            if !name.starts_with(kind) {
                continue;
            }
            let subject = format!("secrets.{name}");
            self.only(section, &subject, |option| matches!(option, "file" | "secret"));
            let secret = section.value("secret").map(|value| decode_secret(&value.bytes));
            match (section.text("file"), secret) {
                (Some(file), Some(Ok(secret))) => {
                    passphrases.push((file.to_owned(), secret, section.origin.clone()));
                }
                // Without a secret swanctl asks at a terminal; a daemon has none.
                (_, None) => {
                    let message = "no secret, ignored".to_owned();
                    self.report(Severity::Warning, Some(&section.origin), subject, message);
                }
                (None, _) => {
                    let message = "no file is named".to_owned();
                    self.report(Severity::Error, Some(&section.origin), subject, message);
                }
                (_, Some(Err(reason))) => {
                    self.report(Severity::Error, Some(&section.origin), subject, format!("secret: {reason}"));
                }
            }
        }
        passphrases
    }

    fn only(&mut self, section: &Section, subject: &str, is_known: impl Fn(&str) -> bool) {
        for (option, node) in &section.entries {
            if !is_known(option) {
                self.report(Severity::Error, Some(node.origin()), subject, format!("unknown option: {option}"));
            }
        }
    }

    fn secrets(&mut self, secrets: &Section) {
        for (name, node) in &secrets.entries {
            let subject = format!("secrets.{name}");
            let Node::Section(section) = node else {
                self.report(Severity::Error, Some(node.origin()), subject, "it is a section".to_owned());
                continue;
            };
            // PKCS#8 and PKCS#12 passphrases, and `private`, begin with other words than `ike`.
            if ["ike", "ppk", "eap"].iter().any(|kind| name.starts_with(kind)) {
                self.shared_key(name, &subject, section);
            } else if ["xauth", "ntlm", "token", "pkcs12"].iter().any(|kind| name.starts_with(kind)) {
                let message = "secrets of this kind are not served yet, ignored".to_owned();
                self.report(Severity::Warning, Some(&section.origin), subject, message);
            } else if !KEY_FOLDERS.iter().any(|kind| name.starts_with(kind)) {
                let message = "unknown kind of secret".to_owned();
                self.report(Severity::Error, Some(&section.origin), subject, message);
            }
        }
    }

    fn shared_key(&mut self, name: &str, subject: &str, section: &Section) {
        self.only(section, subject, |option| option == "secret" || option.starts_with("id"));
        let mut owners = Vec::new();
        for (option, node) in section.entries.iter().filter(|(option, _)| option.starts_with("id")) {
            let text = match node {
                Node::Value(value) => value.text().unwrap_or_default(),
                Node::List(..) | Node::Section(_) => "",
            };
            match IdentityPattern::parse(text) {
                Ok(owner) => owners.push(owner),
                Err(error) => {
                    // Without this owner the secret could be everybody's.
                    self.report(Severity::Error, Some(node.origin()), subject, format!("{option}: {error}"));
                    return;
                }
            }
        }
        let Some(value) = section.value("secret") else {
            self.report(Severity::Error, Some(&section.origin), subject, "no secret".to_owned());
            return;
        };
        let added = decode_secret(&value.bytes).map_err(str::to_owned).and_then(|secret| {
            let credentials = &mut self.configured.credentials;
            let added = if name.starts_with("ppk") {
                credentials.add_ppk(Some(name.to_owned()), owners, secret)
            } else if name.starts_with("eap") {
                credentials.add_eap_secret(Some(name.to_owned()), owners, secret)
            } else {
                credentials.add_shared_secret(Some(name.to_owned()), owners, secret)
            };
            added.map_err(|error| error.to_string())
        });
        if let Err(reason) = added {
            self.report(Severity::Error, Some(&value.origin), subject, format!("secret: {reason}"));
        }
    }

    fn authorities(&mut self, authorities: &Section) {
        for (name, node) in &authorities.entries {
            let subject = format!("authorities.{name}");
            let Node::Section(section) = node else {
                self.report(Severity::Error, Some(node.origin()), subject, "it is a section".to_owned());
                continue;
            };
            for option in ["crl_uris", "ocsp_uris", "cert_uri_base"] {
                if let Some(node) = section.node(option) {
                    let message = format!("{option} is known but not served yet, ignored");
                    self.report(Severity::Warning, Some(node.origin()), subject.as_str(), message);
                }
            }
            match Authority::read(name, section, &Folder(self.folder)) {
                Ok(authority) => self.configured.authorities.push(authority),
                Err(reason) => self.report(Severity::Error, Some(&section.origin), subject, reason),
            }
        }
    }

    fn connections(&mut self, connections: &Section) {
        for (name, node) in &connections.entries {
            let Node::Section(section) = node else {
                let subject = format!("connections.{name}");
                self.report(Severity::Error, Some(node.origin()), subject, "it is a section".to_owned());
                continue;
            };
            let outcome = connection(name, section, &Folder(self.folder));
            self.reports.extend(outcome.reports);
            self.configured.connections.extend(outcome.definition);
        }
    }
}

/// Certificates by name, relative to the folder of their kind.
struct Folder<'a>(&'a Path);

impl CertificateSource for Folder<'_> {
    fn certificate(&self, kind: CertificateKind, value: &Value) -> Result<Vec<u8>, String> {
        let name = value.text().ok_or("a certificate's name is not text")?;
        // Inline, as `0x…` or `0s…`.
        if matches!(name.as_bytes(), [b'0', b'x' | b'X' | b's' | b'S', ..]) {
            return certificate_der(decode_secret(name.as_bytes())?.expose());
        }
        let folder = match kind {
            CertificateKind::EndEntity => "x509",
            CertificateKind::Authority => "x509ca",
        };
        // `join` leaves an absolute name as it is.
        read_certificate(&self.0.join(folder).join(name))
    }

    fn public_key(&self, value: &Value) -> Result<PublicKey, String> {
        let name = value.text().ok_or("a key's name is not text")?;
        if matches!(name.as_bytes(), [b'0', b'x' | b'X' | b's' | b'S', ..]) {
            return PublicKey::parse(decode_secret(name.as_bytes())?.expose()).map_err(|error| error.to_string());
        }
        read_public_key(&self.0.join("pubkey").join(name))
    }
}

/// The regular files of a folder, hidden ones left out, by name; none if there is no such folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.is_file())
        .filter(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')))
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture(tempfile::TempDir);

    impl Fixture {
        /// A folder with a CA, a certificate and its key.
        fn new(text: &str) -> Self {
            let fixture = Self(tempfile::tempdir().unwrap());
            for folder in ["x509", "x509ca", "private", "pubkey"] {
                std::fs::create_dir(fixture.0.path().join(folder)).unwrap();
            }
            let (ca_key, key) = (rcgen::KeyPair::generate().unwrap(), rcgen::KeyPair::generate().unwrap());
            let mut ca = parameters("ca");
            ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            fixture.write("x509ca/ca.pem", &ca.self_signed(&ca_key).unwrap().pem());
            let issuer = rcgen::Issuer::new(ca, ca_key);
            fixture.write("x509/me.pem", &parameters("me").signed_by(&key, &issuer).unwrap().pem());
            fixture.write("private/me.pem", &key.serialize_pem());
            fixture.write("swanctl.conf", text);
            fixture
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.0.path().join(name), text).unwrap();
        }

        fn load(&self) -> Loaded {
            load(self.0.path())
        }
    }

    fn parameters(name: &str) -> rcgen::CertificateParams {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters
    }

    fn errors(loaded: &Loaded) -> Vec<String> {
        let errors = loaded.reports.iter().filter(|report| report.severity == Severity::Error);
        errors.map(Report::to_string).collect()
    }

    #[test]
    fn a_syntax_error_refuses_everything() {
        let loaded = Fixture::new("connections { a { }\n secrets { ").load();
        assert!(loaded.has_errors() && loaded.configured.connections.is_empty());
        assert!(
            errors(&loaded)[0].contains("swanctl.conf:2:12: swanctl.conf: the section that begins at"),
            "{:?}",
            errors(&loaded)
        );
        assert!(load(Path::new("/nonexistent")).has_errors());
    }

    #[test]
    fn an_error_in_one_connection_refuses_that_one() {
        let loaded = Fixture::new("connections { bad { nosuch = 1 }\n good { remote { auth = psk } } }").load();
        assert!(loaded.has_errors());
        let names: Vec<&str> =
            loaded.configured.connections.iter().map(|definition| definition.connection.name.as_str()).collect();
        assert_eq!(names, ["good"]);
    }

    #[test]
    fn a_secret_whose_owner_is_not_understood_is_not_everybody_s() {
        let loaded = Fixture::new("secrets { ike-1 { id = \"C=,,=\"\n secret = x } }").load();
        assert!(loaded.has_errors());
        assert_eq!(loaded.configured.credentials.shared_secret_names(), [""; 0]);
    }

    #[test]
    fn bad_secrets_are_refused_without_being_shown() {
        let text = "secrets { ike-a { secret = 0xhunter2 }\n ike-b { id = x }\n ike-c { secret = \"\" }
            ike-d { secret = hunter2\n sceret = hunter2 }\n new-e { secret = hunter2 }\n rsa-f { secret = hunter2 } }";
        let loaded = Fixture::new(text).load();
        let errors = errors(&loaded);
        assert_eq!(errors.len(), 6, "{errors:?}");
        assert!(!format!("{loaded:?}").contains("hunter2"));
    }

    #[test]
    fn a_folder_is_loaded_as_swanctl_would_load_it() {
        let fixture = Fixture::new(
            "secrets { ike-1 { id-a = a.example\n id-b = b.example\n secret = 0x0102 }\n xauth-1 { secret = x }\n eap-1 { id = carol\n secret = x } }
             authorities { au { cacert = ca.pem\n crl_uris = http://x/y } }
             pools { p { addrs = 10.0.0.0/24 } }
             connections { gw { local { certs = me.pem }\n remote { cacerts = ca.pem } } }
             include conf.d/*.conf",
        );
        std::fs::create_dir(fixture.0.path().join("pkcs12")).unwrap();
        fixture.write("pkcs12/x.p12", "");
        fixture.write("x509/README", "not a certificate");
        let loaded = fixture.load();
        assert!(!loaded.has_errors(), "{:?}", loaded.reports);
        let warnings: Vec<String> = loaded.reports.iter().map(Report::to_string).collect();
        for part in ["README", "x.p12: PKCS#12", "secrets.xauth-1", "crl_uris is known"] {
            assert!(warnings.iter().any(|warning| warning.contains(part)), "{part}: {warnings:?}");
        }
        assert_eq!(warnings.len(), 4, "{warnings:?}");
        let configured = loaded.configured;
        assert_eq!(configured.credentials.shared_secret_names(), ["ike-1", "eap-1"]);
        assert_eq!(configured.credentials.private_key_ids().len(), 1);
        assert_eq!(configured.all_credentials().authority_hashes().len(), 1);
        assert_eq!(configured.authorities[0].name, "au");
        assert_eq!(configured.pools[0].name, "p");
        let connection = &configured.connections[0].connection;
        assert_eq!(connection.local_id.as_ref().map(ToString::to_string), Some("CN=me".to_owned()));
        assert_eq!((connection.local_auth.certificates.len(), connection.remote.cacerts.len()), (1, 1));
        assert!(configured.credentials.stored_certificates().iter().any(|stored| stored.has_private_key));
    }

    // RFC 7670.
    #[test]
    fn raw_public_keys_are_read_from_their_folder() {
        use rcgen::PublicKeyData;

        let fixture = Fixture::new(
            "connections { good { local { pubkeys = own.pem }\n remote { id = b.example\n pubkeys = peer.der } }
             bad { remote { pubkeys = own.pem, broken.pem } }\n none { remote { pubkeys = none.pem } } }",
        );
        let [own, peer] = [(); 2].map(|()| rcgen::KeyPair::generate().unwrap());
        fixture.write("pubkey/own.pem", &own.public_key_pem());
        std::fs::write(fixture.0.path().join("pubkey/peer.der"), peer.subject_public_key_info()).unwrap();
        fixture.write("pubkey/broken.pem", &own.public_key_pem()[..90]);
        let loaded = fixture.load();
        let errors = errors(&loaded);
        assert_eq!(errors.len(), 2, "{errors:?}");
        assert!(errors[0].contains("pubkey/broken.pem: not a SubjectPublicKeyInfo"), "{errors:?}");
        assert!(errors[1].contains("pubkey/none.pem: No such file"), "{errors:?}");
        let warned = |report: &Report| report.to_string().contains("broken.pem: not a SubjectPublicKeyInfo");
        assert!(loaded.reports.iter().any(|report| report.severity == Severity::Warning && warned(report)));
        assert_eq!(loaded.configured.credentials.public_keys().len(), 2);
        let [good] = &loaded.configured.connections[..] else { panic!("one is good") };
        assert_eq!(good.connection.remote.public_keys[0].der(), peer.subject_public_key_info());
    }

    #[test]
    fn an_end_entity_is_no_authority() {
        let fixture =
            Fixture::new("authorities { au { cacert = me.pem } }\nconnections { c { remote { cacerts = me.pem } } }");
        std::fs::copy(fixture.0.path().join("x509/me.pem"), fixture.0.path().join("x509ca/me.pem")).unwrap();
        let loaded = fixture.load();
        assert_eq!(
            errors(&loaded).iter().filter(|error| error.contains("without CA flag")).count(),
            2,
            "{:?}",
            loaded.reports
        );
        assert!(loaded.configured.connections.is_empty() && loaded.configured.authorities.is_empty());
        assert_eq!(loaded.configured.all_credentials().authority_hashes().len(), 1);
    }
}
