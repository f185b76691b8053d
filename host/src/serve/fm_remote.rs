//! The FM in another process: `hypercast serve --tier fm-serving` answers
//! `POST /v1/embed`, and this is both ends of that.
//!
//! A body is the examples, in postcard; an answer is the main tasks' predictions
//! and the TAEs, in the format that the answering tier is configured for. What
//! remains of the deadline travels in a header.

use std::{sync::Arc, time::Instant};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use hypercast_fm::{checkpoint::Manifest, example::Example, inference::FmOutput};
use serde::{Deserialize, Serialize};

use super::{
    api::{DEADLINE_HEADER, FM_VERSION_HEADER, Refusal, RefusalBody},
    tae::TaeFormat,
};
use crate::error::{Error, Result};

/// The most that an answer may be, in bytes.
const MOST_ANSWER_BYTES: usize = 256 << 20;

/// The most that a manifest may be, in bytes.
const MOST_MANIFEST_BYTES: usize = 16 << 20;

/// What `POST /v1/embed` answers.
#[derive(Debug, Serialize, Deserialize)]
struct Embedded {
    tae_dim: u32,
    format: TaeFormat,
    tae: Vec<u8>,
    main: Vec<f32>,
}

/// The body of a request.
pub fn encode_examples(examples: &[Example]) -> Result<Vec<u8>> {
    postcard::to_stdvec(examples).map_err(|error| Error::Invalid(format!("examples: {error}")))
}

/// Examples from a request's body.
///
/// # Errors
/// Bytes of another kind.
pub fn decode_examples(body: &[u8]) -> std::result::Result<Vec<Example>, Refusal> {
    postcard::from_bytes(body).map_err(|error| {
        Refusal::BadRequest(format!(
            "the body is no examples ({error}); both processes must be of one version"
        ))
    })
}

/// The body of an answer.
pub fn encode_output(output: FmOutput, tae_dim: usize, format: TaeFormat) -> Result<Vec<u8>> {
    let mut tae = Vec::new();
    format.encode(&output.tae, tae_dim, &mut tae);
    let answer = Embedded { tae_dim: tae_dim as u32, format, tae, main: output.main };
    postcard::to_stdvec(&answer).map_err(|error| Error::Invalid(format!("an answer: {error}")))
}

fn decode_output(body: &[u8], tae_dim: usize) -> std::result::Result<FmOutput, String> {
    let answer: Embedded = postcard::from_bytes(body).map_err(|error| {
        format!("its answer cannot be read ({error}); use one version of hypercast")
    })?;
    if answer.tae_dim as usize != tae_dim {
        return Err(format!(
            "its TAEs have {} values, {tae_dim} when this process began; restart this one",
            answer.tae_dim
        ));
    }
    let tae = answer.format.decode(&answer.tae, tae_dim).map_err(|error| error.to_string())?;
    Ok(FmOutput { tae, main: answer.main })
}

/// A tier in another process.
pub struct RemoteFm {
    url: String,
    /// The version that is asked for; none takes what the tier answers with.
    version: Option<String>,
    client: Client<HttpConnector, Full<Bytes>>,
    manifest: Manifest,
}

impl RemoteFm {
    /// Asks the tier at `url` what it is, or what it knows of one version. Blocks; call it outside of the server's threads.
    ///
    /// # Errors
    /// A tier that does not answer, or not as one.
    pub fn connect(url: &str, version: Option<&str>) -> Result<Self> {
        let url = url.trim_end_matches('/').to_owned();
        let cannot = |why: String| {
            Error::Invalid(format!(
                "no FM at {url:?} (fm_serving.url): {why}; start one with `hypercast serve --tier fm-serving`"
            ))
        };
        let mut ask = ureq::get(format!("{url}/v1/fm"));
        if let Some(version) = version {
            ask = ask.header(FM_VERSION_HEADER, version);
        }
        let mut answer = ask
            .config()
            .timeout_global(Some(std::time::Duration::from_secs(10)))
            .build()
            .call()
            .map_err(|error| cannot(error.to_string()))?;
        let text = answer
            .body_mut()
            .with_config()
            .limit(MOST_MANIFEST_BYTES as u64)
            .read_to_vec()
            .map_err(|error| cannot(error.to_string()))?;
        let manifest = serde_json::from_slice(&text).map_err(|error| cannot(error.to_string()))?;
        let client = Client::builder(TokioExecutor::new()).build_http();
        Ok(Self { url, version: version.map(str::to_owned), client, manifest })
    }

    /// What the tier's checkpoint says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What the FM says of the examples' targets, in order.
    ///
    /// # Errors
    /// The tier's own refusal; [`Refusal::Unreachable`] where it gives none.
    pub async fn infer(
        &self,
        examples: Arc<[Example]>,
        deadline: Instant,
    ) -> std::result::Result<FmOutput, Refusal> {
        match tokio::time::timeout_at(deadline.into(), self.ask(&examples, deadline)).await {
            Ok(answer) => answer,
            Err(_) => Err(Refusal::Deadline),
        }
    }

    async fn ask(
        &self,
        examples: &[Example],
        deadline: Instant,
    ) -> std::result::Result<FmOutput, Refusal> {
        let unreachable =
            |why: String| Refusal::Unreachable(format!("the FM at {} failed: {why}", self.url));
        let internal = |error: String| Refusal::Internal(error);
        let body = encode_examples(examples).map_err(|error| internal(error.to_string()))?;
        let left_ms = deadline.saturating_duration_since(Instant::now()).as_millis();
        let mut request = axum::http::Request::post(format!("{}/v1/embed", self.url))
            .header(DEADLINE_HEADER, left_ms.to_string());
        if let Some(version) = &self.version {
            request = request.header(FM_VERSION_HEADER, version);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| internal(error.to_string()))?;
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
        decode_output(&body, self.manifest.config.tae_width()).map_err(unreachable)
    }
}

/// What the other tier's refusal means for the caller of this one.
fn refusal(status: u16, body: &[u8], unreachable: impl Fn(String) -> Refusal) -> Refusal {
    let said = serde_json::from_slice::<RefusalBody>(body)
        .map_or_else(|_| format!("status {status}"), |body| body.error.message);
    match status {
        503 => Refusal::Overloaded { retry_after_ms: 100 },
        504 => Refusal::Deadline,
        _ => unreachable(said),
    }
}
