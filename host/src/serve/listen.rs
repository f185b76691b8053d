//! Where requests come in: plain HTTP, or TLS where the configuration names a certificate.
//!
//! Handshakes run beside the requests, bounded in number and time, so that who begins one and says nothing keeps nobody
//! else waiting for long. The certificate can be replaced while connections live; new ones get the new one. What a
//! request may ask is [`super::auth`]'s.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::{Router, serve::Listener};
use prometheus::IntCounterVec;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
    server::TlsStream,
};

use super::{metrics::Metrics, secret};
use crate::{
    config::Server,
    error::{Error, Result},
};

/// Handshakes that may be under way at once; further connections wait in the system's queue.
const HANDSHAKES: usize = 512;

/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long accepting rests when the system refuses, for want of files most often.
const REST: Duration = Duration::from_millis(500);

/// The largest file of certificates or of a key, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// An address that is bound, and how it is spoken to.
pub(super) struct Bound {
    listener: TcpListener,
    /// The address in use.
    address: SocketAddr,
    tls: Option<Arc<Tls>>,
}

impl Bound {
    /// Binds one of the addresses that [`resolve`] gave.
    ///
    /// # Errors
    /// Addresses that cannot be had; files of TLS that are missing or do not fit each other.
    pub(super) async fn new(
        server: &Server,
        addresses: &[SocketAddr],
        metrics: &Metrics,
    ) -> Result<Self> {
        let tls = server.has_tls().then(|| Tls::new(server, metrics)).transpose()?;
        let cannot = |error: io::Error| cannot_listen(server, &error);
        let listener = TcpListener::bind(addresses).await.map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        Ok(Self { listener, address, tls: tls.map(Arc::new) })
    }

    /// Where it is, as `http://ADDRESS` or `https://ADDRESS`.
    pub(super) fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// What new connections are encrypted with, if they are.
    pub(super) fn tls(&self) -> Option<Arc<Tls>> {
        self.tls.clone()
    }

    /// Answers requests until `stop` resolves, then finishes what was accepted.
    ///
    /// # Errors
    /// What the server says.
    pub(super) async fn serve(
        self,
        router: Router,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        match self.tls {
            None => axum::serve(self.listener, router).with_graceful_shutdown(stop).await,
            Some(tls) => {
                let listener = TlsListener::start(self.listener, self.address, tls);
                axum::serve(listener, router).with_graceful_shutdown(stop).await
            }
        }
    }
}

/// The addresses that `server.listen` means; nothing is opened yet.
///
/// # Errors
/// A text that is no address and port, or a name that is not known.
pub(super) async fn resolve(server: &Server) -> Result<Vec<SocketAddr>> {
    let found = tokio::net::lookup_host(&server.listen).await;
    let addresses: Vec<_> = found.map_err(|error| cannot_listen(server, &error))?.collect();
    match addresses.is_empty() {
        true => Err(Error::Invalid(format!("{:?} (server.listen) is no address", server.listen))),
        false => Ok(addresses),
    }
}

fn cannot_listen(server: &Server, error: &io::Error) -> Error {
    Error::Invalid(format!("cannot listen on {:?} (server.listen): {error}", server.listen))
}

/// What connections are encrypted with.
pub(super) struct Tls {
    now: RwLock<Arc<ServerConfig>>,
    handshakes: IntCounterVec,
}

impl Tls {
    fn new(server: &Server, metrics: &Metrics) -> Result<Self> {
        let handshakes = metrics.counter(
            "hypercast_tls_handshakes_total",
            "TLS handshakes by outcome: done, failed, late",
            &["outcome"],
        );
        Ok(Self { now: RwLock::new(read(server)?), handshakes })
    }

    /// Encrypts connections that come from now on with what [`read`] gave.
    pub(super) fn replace(&self, config: Arc<ServerConfig>) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = config;
    }

    async fn handshake(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let config = self.now.read().unwrap_or_else(PoisonError::into_inner).clone();
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

/// What the configuration's files say, checked: certificates, and a key that fits the first of them.
///
/// # Errors
/// Files that are missing, of another kind, or do not fit each other; a key that others may read.
pub(super) fn read(server: &Server) -> Result<Arc<ServerConfig>> {
    let (certificate, key) = (&server.tls_certificate, &server.tls_key);
    let chain = certificates(certificate)?;
    let private =
        PrivateKeyDer::from_pem_slice(&secret::read(key, MOST_BYTES)?).map_err(|error| {
            let why = format!(
                "it holds no private key in PEM that can be read (server.tls_key): {error}"
            );
            Error::data(key, why)
        })?;
    // Given by name: which provider a process has by default depends on what else is linked.
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
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let wrong = |why: String| Error::data(path, format!("{why} (server.tls_certificate)"));
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| wrong(format!("a certificate cannot be read: {error}")))?;
    match chain.is_empty() {
        true => Err(wrong("it holds no certificate in PEM".into())),
        false => Ok(chain),
    }
}

/// Connections whose handshake is done.
struct TlsListener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl TlsListener {
    fn start(listener: TcpListener, address: SocketAddr, tls: Arc<Tls>) -> Self {
        let (sender, ready) = mpsc::channel(HANDSHAKES);
        Self { ready, address, accepting: tokio::spawn(accept(listener, tls, sender)) }
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(connection) => connection,
            // The task that accepts has panicked, and has said so.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}

async fn accept(
    listener: TcpListener,
    tls: Arc<Tls>,
    sender: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let (tls, sender) = (tls.clone(), sender.clone());
        tokio::spawn(async move {
            if let Some(stream) = tls.handshake(stream).await {
                // The receiver is gone only when the server stops.
                let _ = sender.send((stream, from)).await;
            }
            drop(slot);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A server with a certificate and its key in `dir`.
    fn server(dir: &Path, name: &str) -> Server {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let [certificate, key] = ["crt", "key"].map(|end| dir.join(format!("{name}.{end}")));
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        Server { tls_certificate: certificate, tls_key: key, ..Server::default() }
    }

    #[test]
    fn wrong_files_are_refused_with_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (server(dir.path(), "one"), server(dir.path(), "other"));
        assert!(read(&one).is_ok());
        let refused = |server: Server, word: &str| {
            let error = read(&server).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(Server { tls_key: other.tls_key, ..one.clone() }, "cannot be used together");
        refused(Server { tls_certificate: one.tls_key.clone(), ..one.clone() }, "no certificate");
        let swapped = dir.path().join("swapped");
        std::fs::copy(&one.tls_certificate, &swapped).unwrap();
        std::fs::set_permissions(&swapped, std::fs::Permissions::from_mode(0o600)).unwrap();
        refused(Server { tls_key: swapped, ..one.clone() }, "no private key");
        refused(Server { tls_key: dir.path().join("none"), ..one.clone() }, "none");
        std::fs::set_permissions(&one.tls_key, std::fs::Permissions::from_mode(0o644)).unwrap();
        refused(one, "chmod 640");
    }
}
