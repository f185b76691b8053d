//! How the daemon serves: its HTTP side, and the tiers of an FM (paper section
//! 3.3.3), each with threads, batching and limits of its own.

use std::{path::PathBuf, time::Duration};

use hypercast_fm::{device::DeviceKind, inference::FmServingOptions};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use hypercast_data::tae::TaeFormat;

/// The HTTP server, and the tier of experts behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address and port. Port 0 takes a free port and prints it.
    pub listen: String,
    /// Certificates in PEM, the server's own first. With this and `tls_key` the daemon speaks HTTPS
    /// (TLS 1.3).
    pub tls_certificate: PathBuf,
    /// The private key of the certificate, in PEM. Only its owner and group may be able to read the
    /// file.
    pub tls_key: PathBuf,
    /// Whether the daemon offers routes under /v1/admin. On an address that others reach they need
    /// tokens and TLS: without tokens they are not offered, with tokens but without TLS the daemon
    /// does not start.
    pub admin: bool,
    /// File of admin tokens. Each line is a name, a space and at least 24 characters (`openssl rand
    /// -hex 32`). Only its owner and group may be able to read the file.
    pub admin_tokens: PathBuf,
    /// Accept admin tokens over plain HTTP, for a proxy in front that speaks TLS.
    pub insecure_admin: bool,
    /// File of tokens for the other routes under /v1; admin tokens open those, too. "" lets
    /// everyone in who can reach the address.
    pub tokens: PathBuf,
    /// Log levels by module. The environment variable HYPERCAST_LOG overrides it.
    pub log: String,
    /// Threads that read features and run experts.
    pub threads: usize,
    /// Requests that may wait for a thread. Further ones get 503 at once.
    pub queue: usize,
    /// Connections that may be open. Further ones wait in the operating system's queue.
    pub max_connections: usize,
    /// Time for a connection to send the headers of a request, and to stay idle between two
    /// requests, in milliseconds.
    pub header_timeout_ms: u64,
    /// The most candidates of a request. More get 413.
    pub max_candidates: usize,
    /// The most events of a request, over all its lists. More get 413.
    pub max_events: usize,
    /// The largest request body, in bytes.
    pub max_body_bytes: usize,
    /// Time for a request to wait and run, in milliseconds; then it gets 504. A request that is
    /// expected to take longer gets 503 at once, with the time after which to try again.
    pub deadline_ms: u64,
    /// Whether a request may ask for `explain`: predictions of the FM and of shadows, and stage
    /// times.
    pub explain: bool,
    /// The share of requests that shadow versions receive, after the response.
    pub shadow_share: f64,
    /// Answered requests that may wait for shadows. Further ones are skipped and counted.
    pub shadow_queue: usize,
    /// Predictions that are kept until their outcomes are known, one for each item, task and
    /// version. The oldest are dropped first.
    pub served_predictions: usize,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8570".into(),
            tls_certificate: PathBuf::new(),
            tls_key: PathBuf::new(),
            admin: true,
            admin_tokens: PathBuf::new(),
            insecure_admin: false,
            tokens: PathBuf::new(),
            log: "warn,hypercast_serve=info".into(),
            threads: 2,
            queue: 256,
            max_connections: 4096,
            header_timeout_ms: 60_000,
            max_candidates: 1000,
            max_events: 10_000,
            max_body_bytes: 4 << 20,
            deadline_ms: 1000,
            explain: true,
            shadow_share: 1.0,
            shadow_queue: 64,
            served_predictions: 8_000_000,
        }
    }
}

impl Server {
    /// Whether it speaks HTTPS.
    pub fn has_tls(&self) -> bool {
        !self.tls_certificate.as_os_str().is_empty()
    }

    pub(super) fn files(&mut self) -> [&mut PathBuf; 4] {
        [&mut self.tls_certificate, &mut self.tls_key, &mut self.admin_tokens, &mut self.tokens]
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        if self.has_tls() == self.tls_key.as_os_str().is_empty() {
            return Err(
                "one of server.tls_certificate and server.tls_key is set without the other; set both, or neither"
                    .into(),
            );
        }
        hypercast_core::logging::check_levels(&self.log)
            .map_err(|why| format!("server.log: {why}"))?;
        if !(0.0..=1.0).contains(&self.shadow_share) {
            return Err(format!(
                "server.shadow_share is {}; it must be from 0 to 1",
                self.shadow_share
            ));
        }
        Ok(())
    }
}

/// A tier that runs an FM: serving, or logging.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FmTierConfig {
    /// Another process that runs it (`hypercast serve --tier fm-serving`), as "http://HOST:PORT" or
    /// "https://HOST:PORT". "" runs it in this process. The other process has the certificate and
    /// tokens of its own [server].
    pub url: String,
    /// For an https url: a file of certificates (PEM), one of which is the other process's or has
    /// signed it. "" uses the certificates that the machine trusts.
    pub ca: PathBuf,
    /// File of the token for that process, if its server.tokens is set. "" sends none.
    pub token: PathBuf,
    /// Where its FM runs, if not where other models do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceKind>,
    /// Where its FM runs, if not on `device`: "cpu" or "cuda". device = "cuda" Threads of the FM. 0
    /// takes one a core.
    pub threads: usize,
    /// Requests that may wait for the FM. Further ones get 503 at once.
    pub queue: usize,
    /// The most candidates, of several requests together, in one pass of the FM.
    pub batch_candidates: usize,
    /// Time that a request waits for others to share its pass, in microseconds. 0 shares only with
    /// those that wait already.
    pub batch_wait_us: u64,
    /// Memory for encoded histories that are kept between requests, in MiB. 0 keeps none.
    pub history_cache_mib: usize,
    /// Published weights make all encoded histories stale. The histories of so many recent users
    /// are encoded anew before the weights serve, in at most 5 seconds and a quarter of the cache.
    /// 0 encodes none in advance.
    pub warm_histories: usize,
    /// How TAEs travel between processes: "f32", "bf16", or "int8" with a scale a row.
    pub tae: TaeFormat,
    /// The largest body that this tier accepts from another process, in bytes.
    pub max_body_bytes: usize,
}

impl FmTierConfig {
    /// Hundreds of candidates a request, under a strict deadline.
    pub fn serving() -> Self {
        Self {
            url: String::new(),
            ca: PathBuf::new(),
            token: PathBuf::new(),
            device: None,
            threads: 0,
            queue: 256,
            batch_candidates: 2048,
            batch_wait_us: 0,
            history_cache_mib: 256,
            warm_histories: 512,
            tae: TaeFormat::F32,
            max_body_bytes: 64 << 20,
        }
    }

    /// A few served items a request, in big batches, when there is time.
    pub fn logging() -> Self {
        Self {
            queue: 4096,
            batch_candidates: 8192,
            batch_wait_us: 50_000,
            // Nobody waits for its answers, and an item is logged once.
            warm_histories: 0,
            ..Self::serving()
        }
    }

    pub(super) fn files(&mut self) -> [&mut PathBuf; 2] {
        [&mut self.ca, &mut self.token]
    }

    /// How its FM is loaded, on `device` unless it has its own.
    pub fn loading(&self, device: DeviceKind) -> FmServingOptions {
        FmServingOptions {
            device: self.device.unwrap_or(device),
            history_cache_bytes: self.history_cache_mib << 20,
            warmup_histories: self.warm_histories,
        }
    }

    /// How long a batch waits.
    pub fn batch_wait(&self) -> Duration {
        Duration::from_micros(self.batch_wait_us)
    }
}

impl Default for FmTierConfig {
    fn default() -> Self {
        Self::serving()
    }
}

/// Keys that a file leaves out of `[fm_logging]` are those of a logging tier, not of a serving one.
pub(super) fn logging_keys<'de, D: Deserializer<'de>>(from: D) -> Result<FmTierConfig, D::Error> {
    let given = toml::Table::deserialize(from)?;
    let mut all = toml::Table::try_from(FmTierConfig::logging()).map_err(D::Error::custom)?;
    all.extend(given);
    all.try_into().map_err(|error| D::Error::custom(format!("fm_logging: {error}")))
}

/// A tier of the daemon, or all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Tier {
    /// HTTP, features, the FM and experts in one process
    #[default]
    All,
    /// HTTP, features and experts; the FM is at `fm_serving.url`
    Expert,
    /// The FM for candidates under a deadline, for other processes
    FmServing,
    /// The FM for served items, in big batches, for other processes
    FmLogging,
    /// Events alone, for processes that join and serve elsewhere
    Ingest,
}
