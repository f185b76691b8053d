//! TLS: certificates from the configuration, which a reload replaces while connections stay open,
//! and a handshake with a time limit.

use std::{path::Path, sync::Arc, time::Duration};

use hypercast_config::ServerSettings;
use hypercast_core::secret_file;
use prometheus::IntCounterVec;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
    server::TlsStream,
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::Metrics,
    threads::Current,
};

/// Time limit of a handshake.
const PATIENCE: Duration = Duration::from_secs(5);

/// The TLS settings of new connections.
pub(crate) struct Tls {
    /// What [`read`] returned, for new connections.
    pub(crate) config: Current<ServerConfig>,
    handshakes: IntCounterVec,
}

impl Tls {
    /// Reads the certificate and the key that the configuration names.
    ///
    /// # Errors
    /// As [`read`].
    pub(crate) fn new(server: &ServerSettings, metrics: &Metrics) -> Result<Self> {
        let handshakes = metrics.counter(
            "hypercast_tls_handshakes_total",
            "TLS handshakes by outcome: done, failed, late",
            &["outcome"],
        );
        Ok(Self { config: Current::new(read(server)?), handshakes })
    }

    /// An encrypted connection; none if the handshake fails or takes too long.
    pub(crate) async fn handshake(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let config = self.config.now();
        let accepting = TlsAcceptor::from(config).accept(stream);
        let (outcome, stream) = match tokio::time::timeout(PATIENCE, accepting).await {
            Ok(Ok(stream)) => ("done", Some(stream)),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a TLS handshake failed");
                ("failed", None)
            }
            Err(_) => ("late", None),
        };
        self.handshakes.with_label_values(&[outcome]).inc();
        stream
    }
}

/// Reads the certificates and the key, and checks that the key fits the first certificate.
///
/// # Errors
/// Files that are missing, of another kind, or do not fit each other; a key that others can read.
pub(crate) fn read(server: &ServerSettings) -> Result<ServerConfig> {
    let (certificate, key) = (&server.tls_certificate, &server.tls_key);
    let chain =
        certificates(certificate).map_err(|error| error.within("server.tls_certificate"))?;
    let private = PrivateKeyDer::from_pem_slice(&secret_file::read(key)?).map_err(|error| {
        let why =
            format!("it has no private key in PEM that can be read (server.tls_key): {error}");
        Error::data(key, why)
    })?;
    // Named here, because a process' default provider depends on what else is linked.
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|error| {
            let why = format!(
                "this certificate and the key {} cannot be used together: {error}",
                key.display()
            );
            Error::data(certificate, why)
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// The certificates in a PEM file, of which there must be one.
///
/// # Errors
/// The file is missing, or is not such a file.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<std::result::Result<_, _>>()
        .map_err(unreadable(path))?;
    if chain.is_empty() {
        Err(Error::data(path, "it has no certificate in PEM"))
    } else {
        Ok(chain)
    }
}

/// The error of a certificate that cannot be read.
pub(crate) fn unreadable<E: std::fmt::Display>(path: &Path) -> impl Fn(E) -> Error {
    move |error| Error::data(path, format!("a certificate cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A server with a certificate and its key in `dir`.
    fn server(dir: &Path, name: &str) -> ServerSettings {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let [certificate, key] = ["crt", "key"].map(|end| dir.join(format!("{name}.{end}")));
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        ServerSettings { tls_certificate: certificate, tls_key: key, ..ServerSettings::default() }
    }

    #[test]
    fn wrong_files_are_refused_with_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (server(dir.path(), "one"), server(dir.path(), "other"));
        assert!(read(&one).is_ok());
        let refused = |server: ServerSettings, word: &str| {
            let error = read(&server).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(
            ServerSettings { tls_key: other.tls_key, ..one.clone() },
            "cannot be used together",
        );
        refused(
            ServerSettings { tls_certificate: one.tls_key.clone(), ..one.clone() },
            "no certificate",
        );
        let swapped = dir.path().join("swapped");
        std::fs::copy(&one.tls_certificate, &swapped).unwrap();
        std::fs::set_permissions(&swapped, std::fs::Permissions::from_mode(0o600)).unwrap();
        refused(ServerSettings { tls_key: swapped, ..one.clone() }, "no private key");
        refused(ServerSettings { tls_key: dir.path().join("none"), ..one.clone() }, "none");
        std::fs::set_permissions(&one.tls_key, std::fs::Permissions::from_mode(0o644)).unwrap();
        refused(one, "chmod 640");
    }
}
