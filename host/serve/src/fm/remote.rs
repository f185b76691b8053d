//! Both ends of the connection to an FM in another process: `hypercast serve --tier fm-serving`
//! answers `POST /v1/embed`.
//!
//! A request's body is its examples in postcard. The answer has the main tasks' predictions and the
//! TAEs, in the format that the answering tier is configured for. The time left until the deadline
//! travels in a header.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use axum::{
    body::Bytes,
    http::{HeaderValue, header},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use hypercast_config::FmTierConfig;
use hypercast_core::secret_file;
use hypercast_data::tae::{self, TaeFormat};
use hypercast_fm::{checkpoint::FmManifest, example::Example, inference::FmOutput};
use serde::{Deserialize, Serialize};

use crate::{
    error::{CommonErrors as _, Error, Result},
    fm::FmRequest,
    http::{client, respond::in_time},
    request::api::{DEADLINE_HEADER, FM_VERSION_HEADER, Refusal, RefusalBody, RequestResult},
};

/// Limit of an answer, in bytes.
const MOST_ANSWER_BYTES: usize = 256 << 20;

/// Limit of a manifest, in bytes.
const MOST_MANIFEST_BYTES: usize = 16 << 20;

/// How long an idle connection is kept. It is far shorter than the tier keeps it
/// (`server.header_timeout_ms`), so that no request uses a connection that the tier is closing.
const MOST_IDLE: Duration = Duration::from_secs(10);

/// Time limit for reading the tier's manifest.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The answer to `POST /v1/embed`.
#[derive(Debug, Serialize, Deserialize)]
struct EmbedAnswer {
    tae_dim: u32,
    format: TaeFormat,
    tae: Vec<u8>,
    main: Vec<f32>,
}

/// Decodes the body of a request.
///
/// # Errors
/// The bytes are not examples of this version of hypercast.
pub fn decode_examples(body: &[u8]) -> RequestResult<Vec<Example>> {
    postcard::from_bytes(body).map_err(|error| {
        Refusal::BadRequest(format!(
            "the body does not contain examples ({error}); both processes must be of the same version"
        ))
    })
}

/// Encodes the body of an answer.
///
/// # Errors
///
/// Internal: the output cannot be serialised.
pub fn encode_output(
    output: FmOutput,
    tae_dim: usize,
    format: TaeFormat,
) -> RequestResult<Vec<u8>> {
    let mut tae = Vec::new();
    tae::encode(format, &output.tae, tae_dim, &mut tae);
    let answer = EmbedAnswer { tae_dim: tae_dim as u32, format, tae, main: output.main };
    postcard::to_stdvec(&answer)
        .map_err(|error| Refusal::Internal(format!("an answer cannot be encoded: {error}")))
}

fn decode_output(body: &[u8], tae_dim: usize) -> std::result::Result<FmOutput, String> {
    let answer: EmbedAnswer = postcard::from_bytes(body).map_err(|error| {
        format!("its answer cannot be read ({error}); both processes must be of the same version")
    })?;
    if answer.tae_dim as usize != tae_dim {
        return Err(format!(
            "its TAEs have {} values, but had {tae_dim} when this process started; restart this process",
            answer.tae_dim
        ));
    }
    let tae =
        tae::decode(answer.format, &answer.tae, tae_dim).map_err(|error| error.to_string())?;
    Ok(FmOutput { tae, main: answer.main })
}

/// A tier in another process.
pub struct RemoteFm {
    url: String,
    /// The version to ask for; none for the tier's default version.
    version: Option<String>,
    /// The header with the token; none if the tier needs none.
    bearer: Option<HeaderValue>,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    /// The manifest of the tier's checkpoint, when this process connected.
    pub(crate) manifest: FmManifest,
    /// Whether the tier has answered with other tasks than the manifest's.
    pub(crate) is_outgrown: AtomicBool,
}

impl RemoteFm {
    /// Connects to the configured tier and reads the manifest of its default version, or of
    /// `version`. Blocks, so it must not run on the server's async threads.
    ///
    /// # Errors
    /// The tier does not answer, or its answer is not a manifest; a certificate file or the token
    /// cannot be read.
    pub fn connect(config: &FmTierConfig, version: Option<&str>) -> Result<Self> {
        let url = config.url.trim_end_matches('/').to_owned();
        let given = |path: &Path| !path.as_os_str().is_empty();
        let ca = given(&config.ca).then_some(config.ca.as_path());
        let bearer = given(&config.token).then(|| bearer(&config.token)).transpose()?;
        let manifest = Self::ask_manifest(&url, version, ca, bearer.as_ref()).map_err(|why| {
            Error::unreachable(format!(
                "no FM at {url:?} (fm_serving.url): {why}; start one with `hypercast serve --tier fm-serving`"
            ))
        })?;
        let mut plain = HttpConnector::new();
        // The connection carries one request at a time, so its last bytes must not wait for more.
        plain.set_nodelay(true);
        plain.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(client::trusting(ca)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(plain);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(MOST_IDLE)
            .build(connector);
        let (version, is_outgrown) = (version.map(str::to_owned), AtomicBool::new(false));
        Ok(Self { url, version, bearer, client, manifest, is_outgrown })
    }

    fn ask_manifest(
        url: &str,
        version: Option<&str>,
        ca: Option<&Path>,
        bearer: Option<&HeaderValue>,
    ) -> std::result::Result<FmManifest, String> {
        let text_of = |error: &dyn std::fmt::Display| error.to_string();
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(MANIFEST_TIMEOUT))
            .http_status_as_error(false)
            // The calls of `infer` use no proxy either.
            .proxy(None)
            .build();
        let agent = client::agent(config, ca).map_err(|error| text_of(&error))?;
        let mut ask = agent.get(format!("{url}/v1/fm"));
        if let Some(version) = version {
            ask = ask.header(FM_VERSION_HEADER, version);
        }
        if let Some(bearer) = bearer {
            ask = ask.header(header::AUTHORIZATION, bearer);
        }
        let mut answer = ask.call().map_err(|error| text_of(&error))?;
        let status = answer.status();
        let body = answer.body_mut().with_config().limit(MOST_MANIFEST_BYTES as u64);
        let text = body.read_to_vec().map_err(|error| text_of(&error))?;
        match status.as_u16() {
            200 => serde_json::from_slice(&text).map_err(|error| text_of(&error)),
            401 | 403 => Err(format!(
                "it does not accept the token in fm_serving.token ({status}: {})",
                refusal_message(status.as_u16(), &text)
            )),
            other => Err(refusal_message(other, &text)),
        }
    }

    /// The FM's predictions and TAEs for the examples' targets, in order.
    ///
    /// # Errors
    /// The tier's own refusal, or [`Refusal::Unreachable`] if it gives none.
    pub async fn infer(&self, request: FmRequest) -> RequestResult<FmOutput> {
        in_time(request.deadline, self.ask(&request.examples, request.deadline)).await
    }

    async fn ask(&self, examples: &[Example], deadline: Instant) -> RequestResult<FmOutput> {
        let unreachable =
            |why: String| Refusal::Unreachable(format!("the FM at {} failed: {why}", self.url));
        let body = postcard::to_stdvec(examples)
            .map_err(|error| Refusal::Internal(format!("examples cannot be encoded: {error}")))?;
        let left_ms = deadline.saturating_duration_since(Instant::now()).as_millis();
        let mut request = axum::http::Request::post(format!("{}/v1/embed", self.url))
            .header(DEADLINE_HEADER, left_ms.to_string());
        if let Some(version) = &self.version {
            request = request.header(FM_VERSION_HEADER, version);
        }
        if let Some(bearer) = &self.bearer {
            request = request.header(header::AUTHORIZATION, bearer);
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(Refusal::internal)?;
        let response =
            self.client.request(request).await.map_err(|error| unreachable(error.to_string()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MOST_ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| unreachable(error.to_string()))?
            .to_bytes();
        if !status.is_success() {
            return Err(refusal(status.as_u16(), &body, unreachable));
        }
        let output = decode_output(&body, self.manifest.config.tae_width()).map_err(unreachable)?;
        let targets = examples.iter().map(|example| example.targets.len()).sum::<usize>();
        if output.main.len() != targets * self.manifest.spec.main_tasks().len() {
            self.is_outgrown.store(true, Ordering::Relaxed);
            let why = "its tasks have changed; this process connects to it anew in a moment";
            return Err(unreachable(why.into()));
        }
        Ok(output)
    }
}

/// Translates the other tier's refusal for the caller of this one.
fn refusal(status: u16, body: &[u8], unreachable: impl Fn(String) -> Refusal) -> Refusal {
    match status {
        503 if refusal_code(body) == Refusal::FILE_LOST => {
            Refusal::FileLost(refusal_message(status, body))
        }
        503 => Refusal::Overloaded { retry_after_ms: 100 },
        504 => Refusal::Deadline,
        _ => unreachable(refusal_message(status, body)),
    }
}

/// The code of a refusal's body; empty if it has none.
fn refusal_code(body: &[u8]) -> String {
    serde_json::from_slice::<RefusalBody>(body)
        .map_or_else(|_| String::new(), |body| body.error.code)
}

/// The message of a refusal's body.
fn refusal_message(status: u16, body: &[u8]) -> String {
    serde_json::from_slice::<RefusalBody>(body)
        .map_or_else(|_| format!("status {status}"), |body| body.error.message)
}

/// The `Authorization` header with the token in a file.
fn bearer(path: &Path) -> Result<HeaderValue> {
    let text = secret_file::read(path)?;
    let token = text.trim_ascii();
    let whole = !token.is_empty() && token.iter().all(u8::is_ascii_graphic);
    let header = [b"Bearer ", token].concat();
    match HeaderValue::from_bytes(&header) {
        Ok(mut value) if whole => {
            value.set_sensitive(true);
            Ok(value)
        }
        // The message leaves the content out, because it may be a secret.
        _ => Err(Error::data(path, "it must contain one token and nothing else")),
    }
}
