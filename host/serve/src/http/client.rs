//! How commands call a daemon: over HTTP, or over HTTPS with certificates that this machine trusts
//! or the caller names.
//!
//! TLS is rustls under `ureq`, with the crypto provider of the rest of the program. It sends no
//! token by itself.

use std::{
    fmt,
    io::{Read, Write},
    path::Path,
    sync::Arc,
};

use tokio_rustls::rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring, pki_types::ServerName,
};
use ureq::{
    Agent,
    config::Config,
    unversioned::{
        resolver::DefaultResolver,
        transport::{
            Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, TcpConnector,
            Transport, TransportAdapter,
        },
    },
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::tls,
};

/// An agent for HTTP and HTTPS. `ca` is a PEM file with the daemon's certificate or one that signed
/// it; without it, the machine's trusted certificates apply.
///
/// # Errors
/// The file is missing or has no certificate. A machine that trusts none fails with the first HTTPS
/// request.
pub fn agent(config: Config, ca: Option<&Path>) -> Result<Agent> {
    let connector =
        TcpConnector::default().chain(RustlsConnector { config: Arc::new(trusting(ca)?) });
    Ok(Agent::with_parts(config, connector, DefaultResolver::default()))
}

/// The TLS configuration of a client, as described at [`agent`].
///
/// # Errors
/// As [`agent`].
pub fn trusting(ca: Option<&Path>) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match ca {
        None => {
            // Some of a machine's certificates may not be readable; only the daemon's signer
            // matters.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        Some(path) => {
            for certificate in tls::certificates(path)? {
                roots.add(certificate).map_err(tls::unreadable(path))?;
            }
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::internal(format!("TLS cannot be set up: {error}")))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

/// Adds TLS to connections to `https` addresses.
#[derive(Debug)]
struct RustlsConnector {
    config: Arc<ClientConfig>,
}

impl<In: Transport> Connector<In> for RustlsConnector {
    type Out = Either<In, RustlsTransport>;

    fn connect(
        &self,
        details: &ConnectionDetails,
        chained: Option<In>,
    ) -> std::result::Result<Option<Self::Out>, ureq::Error> {
        let Some(transport) = chained else { return Ok(None) };
        if !details.needs_tls() || transport.is_tls() {
            return Ok(Some(Either::A(transport)));
        }
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| ureq::Error::BadUri(format!("{host:?} is not a host name")))?;
        let mut connection =
            ClientConnection::new(self.config.clone(), name).map_err(std::io::Error::other)?;
        let mut adapter = TransportAdapter::new(transport.boxed(), details.current_time.clone());
        adapter.set_timeout(details.timeout);
        while connection.is_handshaking() {
            connection.complete_io(&mut adapter)?;
        }
        let (input, output) =
            (details.config.input_buffer_size(), details.config.output_buffer_size());
        let stream = StreamOwned::new(connection, adapter);
        Ok(Some(Either::B(RustlsTransport { buffers: LazyBuffers::new(input, output), stream })))
    }
}

/// A connection after its handshake.
struct RustlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl fmt::Debug for RustlsTransport {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("Encrypted")
    }
}

impl Transport for RustlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(
        &mut self,
        amount: usize,
        timeout: NextTimeout,
    ) -> std::result::Result<(), ureq::Error> {
        self.stream.sock.set_timeout(timeout);
        Ok(self.stream.write_all(&self.buffers.output()[..amount])?)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> std::result::Result<bool, ureq::Error> {
        self.stream.sock.set_timeout(timeout);
        let read = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(read);
        Ok(read > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.sock.get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_to_trust_are_read_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let refused = || agent(Config::default(), Some(&path)).err().unwrap().to_string();
        assert!(refused().contains("ca.pem"));
        std::fs::write(&path, "nothing").unwrap();
        assert!(refused().contains("no certificate"));
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&path, made.cert.pem()).unwrap();
        assert!(agent(Config::default(), Some(&path)).is_ok());
    }
}
