//! TLS 1.3 around a stream (RFC 9329 Appendix A). No security of IKE or ESP rests on it: it gets through where plain TCP
//! does not, and a probe finds a web server.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What both ends say that they speak: ALPN goes in clear, and everybody speaks this. The stream prefix inside tells what
/// it is.
const ALPN: &[u8] = b"http/1.1";

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The server's name is neither a host name nor an address.
    #[error("'{0}' is no name of a TLS server")]
    Name(String),
    /// There is nothing to check the server's certificate with.
    #[error("there is no CA certificate to check the TLS server's certificate with")]
    NoAuthority,
    /// PEM that cannot be read.
    #[error("{what}: {reason}")]
    Pem {
        /// Which file.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// rustls refuses it.
    #[error(transparent)]
    Refused(#[from] rustls::Error),
}

/// For streams that we open. Clones share the sessions that a later stream resumes.
#[derive(Clone)]
pub struct TlsClient {
    pub(crate) connector: TlsConnector,
    pub(crate) name: ServerName<'static>,
}

impl TlsClient {
    /// The server must have a certificate for this name (host name or address) of one of these authorities (DER).
    ///
    /// # Errors
    /// When name or authorities cannot be used, or there is no authority.
    pub fn new<'a>(authorities: impl IntoIterator<Item = &'a [u8]>, name: &str) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(CertificateDer::from(authority.to_vec()))?;
        }
        if roots.is_empty() {
            return Err(TlsError::NoAuthority);
        }
        let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { connector: Arc::new(config).into(), name })
    }
}

/// For a port that accepts streams in TLS.
#[derive(Clone)]
pub struct TlsServer {
    pub(crate) acceptor: TlsAcceptor,
    pub(crate) web: Option<SocketAddr>,
}

impl TlsServer {
    /// With this certificate, chain after it, and its key, PEM. What comes in TLS and is no stream of ours goes on to
    /// `web`, in clear; without one it is closed.
    ///
    /// # Errors
    /// When certificate and key cannot be read or do not fit.
    pub fn new(chain: &[u8], key: &[u8], web: Option<SocketAddr>) -> Result<Self, TlsError> {
        let pem = |what| move |error: rustls::pki_types::pem::Error| TlsError::Pem { what, reason: error.to_string() };
        let chain: Vec<_> =
            CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>().map_err(pem("certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(pem("private key"))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        // Sessions are kept by the clients, so that however many come back can resume theirs.
        config.ticketer = aws_lc_rs::Ticketer::new()?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { acceptor: Arc::new(config).into(), web })
    }
}
