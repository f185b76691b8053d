//! An HTTP client for tests of TLS and tokens. It opens a connection for each request and trusts
//! one certificate only.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;
use tokio_rustls::rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring,
    pki_types::CertificateDer,
};

/// A self-signed certificate for `localhost`, with its files in PEM.
pub struct Certificate {
    /// The path of the certificate.
    pub certificate: PathBuf,
    /// The path of its private key.
    pub key: PathBuf,
    trusted: CertificateDer<'static>,
}

impl Certificate {
    /// Creates a certificate in `dir/NAME.crt` and `dir/NAME.key`.
    pub fn make(dir: &Path, name: &str) -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])
            .expect("a certificate can be made");
        let [certificate, key] = ["crt", "key"].map(|end| dir.join(format!("{name}.{end}")));
        std::fs::write(&certificate, made.cert.pem()).expect("it can be written");
        write_secret(&key, &made.signing_key.serialize_pem());
        Self { certificate, key, trusted: made.cert.der().clone() }
    }

    /// Overwrites the files of another certificate with those of this one.
    pub fn replace(&self, other: &Certificate) {
        std::fs::copy(&self.certificate, &other.certificate).expect("it can be copied");
        std::fs::copy(&self.key, &other.key).expect("it can be copied");
    }
}

/// Writes a file that only its owner may read.
pub fn write_secret(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, text).expect("it can be written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .expect("its permissions can be set");
}

/// A request to a server.
#[derive(Default, Clone, Copy)]
pub struct HttpRequest<'a> {
    /// The path of the URL, such as `/v1/rank`.
    pub route: &'a str,
    /// The body of a POST; `None` sends a GET.
    pub body: Option<&'a str>,
    /// A bearer token.
    pub token: Option<&'a str>,
    /// Another header, as `Name: value`.
    pub header: Option<&'a str>,
}

/// The response of a server.
pub struct HttpResponse {
    /// The status code.
    pub status: u16,
    /// The status line and headers, in lower case.
    pub headers: String,
    /// The body as text.
    pub body: String,
}

impl HttpResponse {
    /// Parses the body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }
}

/// Sends a request to the server at `url` (`http` or `https`). A server with `https` must present
/// the `trusted` certificate.
///
/// # Errors
/// The server does not answer or presents another certificate.
pub fn ask(
    url: &str,
    trusted: Option<&Certificate>,
    ask: HttpRequest,
) -> std::io::Result<HttpResponse> {
    let (scheme, address) = url.split_once("://").expect("a URL");
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let method = if ask.body.is_some() { "POST" } else { "GET" };
    let body = ask.body.unwrap_or_default();
    let token = ask.token.map(|token| format!("Authorization: Bearer {token}\r\n"));
    let request = format!(
        "{method} {} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n{}{}\r\n{body}",
        ask.route,
        body.len(),
        token.unwrap_or_default(),
        ask.header.map(|header| format!("{header}\r\n")).unwrap_or_default(),
    );
    let mut text = Vec::new();
    match (scheme, trusted) {
        ("https", Some(trusted)) => {
            let mut stream = StreamOwned::new(connection(trusted), stream);
            stream.write_all(request.as_bytes())?;
            stream.read_to_end(&mut text)?;
        }
        ("http", None) => {
            stream.write_all(request.as_bytes())?;
            stream.read_to_end(&mut text)?;
        }
        _ => panic!("{url}: `trusted` is for https only, and required there"),
    }
    let text = String::from_utf8_lossy(&text);
    let no_http = || std::io::Error::other(format!("not an HTTP response: {text:?}"));
    let (headers, body) = text.split_once("\r\n\r\n").ok_or_else(no_http)?;
    let status =
        headers.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(no_http)?;
    Ok(HttpResponse { status, headers: headers.to_lowercase(), body: body.to_owned() })
}

fn connection(trusted: &Certificate) -> ClientConnection {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.trusted.clone()).expect("a certificate");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider has TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "localhost".try_into().expect("a name");
    ClientConnection::new(Arc::new(config), name).expect("a connection")
}
