//! The connection to NATS: how it logs in, and how it repeats what failed.

use std::fs;
use std::future::Future;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use async_nats::jetstream::{Context, ErrorCode, context};
use async_nats::{ConnectErrorKind, ConnectOptions};
use hypercast_config::{EngineSettings, RedactedUrl, UrlLogin};
use hypercast_core::{secret_file, shutdown::Shutdown};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::{sleep, timeout};

use super::{ANSWER_TIMEOUT, RETRY_FOR, RETRY_PAUSE, text};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{MAX_RECORD_BYTES, Topic};

/// Waits for a future, even on a thread of the daemon's own runtime, where engines are opened and
/// closed.
fn blocking<F: Future>(runtime: &Runtime, future: F) -> F::Output {
    match Handle::try_current() {
        Ok(_) => tokio::task::block_in_place(|| runtime.block_on(future)),
        Err(_) => runtime.block_on(future),
    }
}

/// How to connect: who this is, and whom to trust.
fn options(settings: &EngineSettings) -> Result<ConnectOptions> {
    let given = |path: &Path| !path.as_os_str().is_empty();
    let mut options = ConnectOptions::new()
        .name("hypercast")
        .connection_timeout(ANSWER_TIMEOUT)
        .reconnect_delay_callback(|tries| (RETRY_PAUSE / 10 * tries as u32).min(3 * RETRY_PAUSE));
    match settings.nats_url.login() {
        Some(UrlLogin::Password { user, password }) => {
            options = options.user_and_password(user, password);
        }
        Some(UrlLogin::Token(token)) => options = options.token(token),
        None => {}
    }
    if given(&settings.nats_password) {
        let password = secret(&settings.nats_password)?;
        options = options.user_and_password(settings.nats_user.clone(), password);
    }
    if given(&settings.nats_credentials) {
        let path = &settings.nats_credentials;
        // The client looks for the end of the last line.
        let text = secret(path)? + "\n";
        options = options.credentials(&text).map_err(Error::io(path))?;
    }
    if given(&settings.nats_nkey) {
        options = options.nkey(secret(&settings.nats_nkey)?);
    }
    if given(&settings.nats_ca) {
        readable(&settings.nats_ca)?;
        options = options.add_root_certificates(settings.nats_ca.clone()).require_tls(true);
    }
    if given(&settings.nats_key) {
        readable(&settings.nats_certificate)?;
        secret_file::read(&settings.nats_key)?;
        let (certificate, key) = (settings.nats_certificate.clone(), settings.nats_key.clone());
        options = options.add_client_certificate(certificate, key).require_tls(true);
    }
    Ok(options)
}

/// The text of a secret file, without the line end.
fn secret(path: &Path) -> Result<String> {
    let text = String::from_utf8(secret_file::read(path)?);
    let text = text.map_err(|_| Error::data(path, "it is not text; is it the right file?"))?;
    Ok(text.trim().to_owned())
}

/// The client would report a missing file as a fault of TLS.
fn readable(path: &Path) -> Result<()> {
    fs::File::open(path).map(drop).map_err(Error::io(path))
}

/// A connection and the runtime that drives it. The client reconnects by itself.
#[derive(Debug)]
pub(super) struct NatsConnection {
    /// `Some` until this is dropped.
    runtime: Option<Runtime>,
    pub(super) js: Context,
    url: RedactedUrl,
    prefix: String,
    /// Ends the repetition of what fails.
    pub(super) stop: Shutdown,
}

impl NatsConnection {
    /// Connects, as the user that the settings name. `stop` ends the repetition of what fails.
    pub(super) fn connect(settings: &EngineSettings, stop: &Shutdown) -> Result<NatsConnection> {
        let url = &settings.nats_url;
        let cannot = |reason: String| unreachable(url, &reason);
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("nats")
            .enable_all()
            .build()
            .map_err(|error| cannot(error.to_string()))?;
        let options = options(settings)?;
        let until = Instant::now() + RETRY_FOR / 3;
        let client = blocking(&runtime, async {
            loop {
                let error = match options.clone().connect(url.addresses()).await {
                    Ok(client) => return Ok(client),
                    Err(error) => error,
                };
                match error.kind() {
                    ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                        return Err(refused(url, &error.to_string()));
                    }
                    _ if Instant::now() >= until || stop.is_requested() => {
                        return Err(cannot(error.to_string()));
                    }
                    _ => sleep(RETRY_PAUSE).await,
                }
            }
        })?;
        let most = client.server_info().max_payload;
        if most < MAX_RECORD_BYTES + 1024 {
            return Err(cannot(format!(
                "its longest message is {most} bytes, and {} are needed; set max_payload: 1MB in its \
                 configuration",
                MAX_RECORD_BYTES + 1024
            )));
        }
        let js = {
            let _inside = runtime.enter();
            context::ContextBuilder::new().timeout(ANSWER_TIMEOUT).build(client)
        };
        let (url, prefix) = (url.clone(), settings.nats_prefix.clone());
        let stop = stop.clone();
        let server = NatsConnection { runtime: Some(runtime), js, url, prefix, stop };
        let any = server.stream(&Topic::events());
        server.retry("use JetStream", || server.span(&any))?;
        Ok(server)
    }

    /// The name of a topic's stream and of its subject.
    pub(super) fn stream(&self, topic: &Topic) -> String {
        format!("{}-{topic}", self.prefix)
    }

    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        blocking(self.runtime.as_ref().expect("there until it is dropped"), future)
    }

    /// Repeats a request until it succeeds, [`RETRY_FOR`] has passed or the process is to stop.
    /// `what` completes "cannot ...".
    pub(super) fn retry<T, F>(&self, what: &str, mut request: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, String>>,
    {
        let until = Instant::now() + RETRY_FOR;
        self.block_on(async {
            loop {
                let failed = match timeout(2 * ANSWER_TIMEOUT, request()).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(error)) => error,
                    Err(_) => "no answer".to_owned(),
                };
                if Instant::now() >= until || self.stop.is_requested() {
                    return Err(self.unreachable(what, &failed));
                }
                sleep(RETRY_PAUSE).await;
            }
        })
    }

    /// The stored positions of a stream; `None` if it does not exist.
    pub(super) async fn span(&self, name: &str) -> std::result::Result<Option<Range<u64>>, String> {
        let stream = match self.js.get_stream(name).await {
            Ok(stream) => stream,
            Err(error) => match error.kind() {
                context::GetStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    return Ok(None);
                }
                _ => return Err(text(error)),
            },
        };
        let state = &stream.cached_info().state;
        let first = match state.messages {
            0 => state.last_sequence,
            _ => state.first_sequence - 1,
        };
        Ok(Some(first..state.last_sequence))
    }

    pub(super) fn unreachable(&self, what: &str, reason: &str) -> Error {
        unreachable(&self.url, &format!("cannot {what}: {reason}"))
    }
}

fn unreachable(url: &RedactedUrl, reason: &str) -> Error {
    Error::unreachable(format!(
        "NATS at {url}: {reason}; check that the server runs with JetStream (`nats-server -js`), that its disk has room, and that engine.nats_url, engine.nats_ca and engine.nats_certificate are right"
    ))
}

fn refused(url: &RedactedUrl, reason: &str) -> Error {
    Error::refused(format!(
        "NATS at {url}: {reason}; check engine.nats_user with nats_password, nats_credentials or nats_nkey, and that the server knows this user"
    ))
}

impl Drop for NatsConnection {
    fn drop(&mut self) {
        // Every append has been acknowledged, so there is nothing to wait for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
