//! A daemon that is asked by commands: its address, the token, and its refusals as errors.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

use hypercast_serve::api::RefusalBody;
use hypercast_serve::client;

/// The environment variable of the token.
const TOKEN: &str = "HYPERCAST_TOKEN";

/// How long an answer may take: a push is compiled before it is answered.
const PATIENCE: Duration = Duration::from_secs(120);

/// A daemon, and the credentials for it.
#[derive(Debug, Clone, clap::Args)]
pub struct Host {
    /// The daemon, as http://127.0.0.1:8570 or https://HOST
    pub host: String,
    /// Credentials.
    #[command(flatten)]
    pub access: HostAccess,
}

/// The token that a daemon asks for, and the authority that signed its certificate.
#[derive(Debug, Clone, clap::Args)]
pub struct HostAccess {
    /// A file with the bearer token [default: the environment variable HYPERCAST_TOKEN]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The certificate of the operator's own authority (PEM), for https [default: those of the
    /// system]
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
}

impl Host {
    /// GETs a route.
    ///
    /// # Errors
    /// A daemon that cannot be reached, or refuses.
    pub fn get<T: DeserializeOwned>(&self, route: &str) -> anyhow::Result<T> {
        let request = self.agent()?.get(self.url(route));
        self.answer(self.authorised(request)?.call())
    }

    /// POSTs a body.
    ///
    /// # Errors
    /// A daemon that cannot be reached, or refuses.
    pub fn post<T: DeserializeOwned>(&self, route: &str, body: &[u8]) -> anyhow::Result<T> {
        let request =
            self.agent()?.post(self.url(route)).header("content-type", "application/octet-stream");
        self.answer(self.authorised(request)?.send(body))
    }

    fn answer<T: DeserializeOwned>(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> anyhow::Result<T> {
        let mut answer = answer.with_context(|| format!("cannot reach {}", self.host))?;
        let status = answer.status();
        let text = answer.body_mut().with_config().limit(64 << 20).read_to_string()?;
        if status.is_success() {
            return serde_json::from_str(&text).with_context(|| {
                format!("{} gave another answer than this version knows", self.host)
            });
        }
        match serde_json::from_str::<RefusalBody>(&text) {
            Ok(body) => bail!("{} ({status}): {}", self.host, body.error.message),
            Err(_) => bail!("{} ({status}): {}", self.host, text.trim()),
        }
    }

    fn agent(&self) -> anyhow::Result<ureq::Agent> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build();
        Ok(client::agent(config, self.access.ca.as_deref())?)
    }

    fn url(&self, route: &str) -> String {
        let host = self.host.trim_end_matches('/');
        match host.contains("://") {
            true => format!("{host}{route}"),
            false => format!("http://{host}{route}"),
        }
    }

    /// Adds the token, if there is one.
    fn authorised<B>(
        &self,
        request: ureq::RequestBuilder<B>,
    ) -> anyhow::Result<ureq::RequestBuilder<B>> {
        let token = match &self.access.token_file {
            Some(path) => {
                Some(std::fs::read_to_string(path).with_context(|| path.display().to_string())?)
            }
            None => std::env::var(TOKEN).ok(),
        };
        Ok(match token {
            Some(token) => request.header("authorization", format!("Bearer {}", token.trim())),
            None => request,
        })
    }
}
