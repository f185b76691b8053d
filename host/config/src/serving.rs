//! Serving: the daemon's HTTP server, and the tiers of the FM (paper section 3.3.3), each
//! with its own threads, batching and limits.

use std::path::PathBuf;
use std::sync::Arc;

use hypercast_data::tae::TaeFormat;
use hypercast_fm::{device::DeviceKind, inference::FmServingOptions};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use crate::check_share;

/// The HTTP server, and the tier of experts behind it: `[server]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSettings {
    /// Address and port. Port 0 takes a free port and prints it.
    pub listen: String,
    /// Address and port of a listener for /healthz, /readyz, /readyz/serving and /metrics alone, so
    /// that these answer while requests take all connections. It speaks plain HTTP without tokens,
    /// and has 64 connections: keep it in a private network. "" opens none; `listen` answers probes
    /// in any case.
    pub probe_listen: String,
    /// Certificates in PEM, the server's own first. With this and `tls_key` the daemon speaks HTTPS
    /// (TLS 1.3).
    pub tls_certificate: PathBuf,
    /// The private key of the certificate, in PEM. Only its owner and group may be able to read the
    /// file.
    pub tls_key: PathBuf,
    /// Whether the daemon offers the routes under /v1/admin. On an address that other machines can
    /// reach, these routes need tokens and TLS: without tokens they are not offered, and with
    /// tokens but without TLS the daemon does not start.
    pub admin: bool,
    /// File of admin tokens. Each line is a name, a space and at least 24 characters (`openssl rand
    /// -hex 32`). Only its owner and group may be able to read the file.
    pub admin_tokens: PathBuf,
    /// Accept admin tokens over plain HTTP, for a proxy in front that speaks TLS.
    pub insecure_admin: bool,
    /// File of tokens for the other routes under /v1, in the same form. The word `replay` at the
    /// end of a line gives its holder the right to set the time (`clock_ms`). Admin tokens are
    /// valid there, too, and have that right. "" accepts every client that can reach the address;
    /// only a server that other machines cannot reach then lets everyone set the time.
    pub tokens: PathBuf,
    /// Log levels by module. The environment variable HYPERCAST_LOG overrides them.
    pub log: String,
    /// Threads that read features and run experts.
    pub threads: usize,
    /// Requests that may wait for a thread. Further requests get status 503 at once.
    pub queue: usize,
    /// Connections that may be open, each of which takes up to 128 KiB. Further connections wait in
    /// the operating system's queue.
    pub max_connections: usize,
    /// Connections that one peer may have open: an IPv4 address, or a /64 network of IPv6. Further
    /// ones of that peer are closed at once. 0 allows a quarter of `max_connections`. Behind a
    /// proxy, whose address is that of all callers, set it to `max_connections`.
    pub max_connections_per_peer: usize,
    /// Time for a connection to send the headers of a request, and to stay idle between two
    /// requests, in milliseconds.
    pub header_timeout_ms: u64,
    /// The most candidates in a request. A request with more gets status 413.
    pub max_candidates: usize,
    /// The most events in a request, over all its lists. A request with more gets status 413.
    pub max_events: usize,
    /// Ids that are strings whose texts are kept, of users and items together, for reports and to
    /// refuse two of one key. Each takes up to 39 bytes of memory and some 24 bytes and its text of
    /// the disk (`ids` under paths.state). Requests with further ids are answered all the same.
    pub max_text_ids: u64,
    /// The largest request body, in bytes.
    pub max_body_bytes: usize,
    /// Memory for the bodies of all requests in flight (rankings, events, examples of other tiers,
    /// pushes), in MiB. A request that finds none left gets status 503 at once, with the time after
    /// which to try again. The largest body that any key allows fits even if this is less.
    pub max_inflight_body_mib: usize,
    /// Time for a request to wait and run, in milliseconds; then it gets status 504. A request that
    /// is expected to take longer gets status 503 at once, with the time after which to try again.
    pub deadline_ms: u64,
    /// Whether a request may ask for `explain`: predictions of the FM and of shadows, and stage
    /// times.
    pub explain: bool,
    /// The share of requests that shadow versions receive after the response is sent.
    pub shadow_share: f64,
    /// Answered requests that may wait for shadows. Further requests are skipped and counted.
    pub shadow_queue: usize,
    /// Predictions that are kept until their outcomes are known, one for each item, task and
    /// version. The oldest are dropped first.
    pub served_predictions: usize,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8570".into(),
            probe_listen: String::new(),
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
            max_connections_per_peer: 0,
            header_timeout_ms: 60_000,
            max_candidates: 1000,
            max_events: 10_000,
            max_text_ids: 20_000_000,
            max_body_bytes: 4 << 20,
            max_inflight_body_mib: 256,
            deadline_ms: 1000,
            explain: true,
            shadow_share: 1.0,
            shadow_queue: 64,
            served_predictions: 8_000_000,
        }
    }
}

impl ServerSettings {
    /// Whether the daemon speaks HTTPS.
    pub fn has_tls(&self) -> bool {
        !self.tls_certificate.as_os_str().is_empty()
    }

    /// Connections that one peer may have open; at least one.
    pub fn connections_per_peer(&self) -> usize {
        match self.max_connections_per_peer {
            0 => self.max_connections.div_ceil(4),
            most => most,
        }
    }

    pub(super) fn files(&mut self) -> [&mut PathBuf; 4] {
        [&mut self.tls_certificate, &mut self.tls_key, &mut self.admin_tokens, &mut self.tokens]
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        if self.has_tls() == self.tls_key.as_os_str().is_empty() {
            return Err(
                "one of server.tls_certificate and server.tls_key is set without the other; set \
                 both or neither"
                    .into(),
            );
        }
        hypercast_core::logging::check_levels(&self.log)
            .map_err(|why| format!("server.log: {why}"))?;
        check_share("server.shadow_share", self.shadow_share)
    }
}

/// A tier that runs the FM: `[fm_serving]` or `[fm_logging]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FmTierConfig {
    /// Another process that runs the FM (`hypercast serve --tier fm-serving`), as
    /// "http://HOST:PORT" or "https://HOST:PORT". "" runs the FM in this process. The other process
    /// uses the certificate and the tokens of its own `[server]`.
    pub url: String,
    /// For an https url: a file of certificates (PEM), one of which is that of the other process or
    /// of its authority. "" uses the certificates that the machine trusts.
    pub ca: PathBuf,
    /// File of the token for that process, if its server.tokens is set. "" sends none.
    pub token: PathBuf,
    /// The device of this tier's FM, "cpu", "cuda" or "wgpu". Without this key it is the `device`
    /// above.
    pub device: Option<DeviceKind>,
    /// Threads of the FM. 0 takes one per core, and binds each to its core.
    pub threads: usize,
    /// Requests that may wait for the FM. Further requests get status 503 at once.
    pub queue: usize,
    /// The most candidates in one pass of the FM, which several requests can share.
    pub batch_candidates: usize,
    /// Time that a request waits for others to share its pass, in microseconds. With 0 it shares
    /// the pass only with requests that are already waiting.
    pub batch_wait_us: u64,
    /// Memory for encoded histories that are kept between requests, in MiB. 0 keeps none.
    pub history_cache_mib: usize,
    /// New weights make all encoded histories stale. Before they serve, the histories of this many
    /// recent users are encoded again, in at most 5 seconds and a quarter of the cache. 0 encodes
    /// none in advance.
    pub warm_histories: usize,
    /// How TAEs travel between processes: "f32", "bf16", or "int8" with a scale per row.
    pub tae: TaeFormat,
    /// The largest body that this tier accepts from another process, in bytes.
    pub max_body_bytes: usize,
}

impl FmTierConfig {
    /// The defaults of `[fm_serving]`: hundreds of candidates in a request, and a strict deadline.
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

    /// The defaults of `[fm_logging]`: few served items in a request, and large batches.
    pub fn logging() -> Self {
        Self {
            queue: 4096,
            batch_candidates: 8192,
            batch_wait_us: 50_000,
            // No caller waits for its results, and each item is logged once.
            warm_histories: 0,
            ..Self::serving()
        }
    }

    pub(super) fn files(&mut self) -> [&mut PathBuf; 2] {
        [&mut self.ca, &mut self.token]
    }

    /// The options for loading its FM, on `device` unless the tier sets its own.
    pub fn loading(&self, device: DeviceKind) -> FmServingOptions {
        FmServingOptions {
            device: self.device.unwrap_or(device),
            history_cache_bytes: self.history_cache_mib << 20,
            warmup_histories: self.warm_histories,
            growths: Arc::default(),
        }
    }
}

impl Default for FmTierConfig {
    fn default() -> Self {
        Self::serving()
    }
}

/// Checks the tiers' addresses.
pub(super) fn validate_tiers(serving: &FmTierConfig, logging: &FmTierConfig) -> Result<(), String> {
    if !logging.url.is_empty() {
        return Err("fm_logging.url is set, but no process uses a remote logging tier: \
                    `hypercast materialise` runs the FM itself; leave it empty"
            .into());
    }
    if serving.url.starts_with("http:") && !serving.ca.as_os_str().is_empty() {
        return Err(format!(
            "fm_serving.ca is set, but fm_serving.url {:?} does not use TLS; start it with https://, \
             or leave ca empty",
            serving.url
        ));
    }
    Ok(())
}

/// Reads `[fm_logging]`. Keys that it leaves out get the defaults of a logging tier, which differ
/// from those of a serving tier.
pub(super) fn logging_keys<'de, D: Deserializer<'de>>(from: D) -> Result<FmTierConfig, D::Error> {
    let given = toml::Table::deserialize(from)?;
    let mut all = toml::Table::try_from(FmTierConfig::logging()).map_err(D::Error::custom)?;
    all.extend(given);
    all.try_into().map_err(|error| D::Error::custom(format!("fm_logging: {error}")))
}

/// The part of the daemon that a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DaemonTier {
    /// HTTP, features, the FM and experts in one process
    #[default]
    All,
    /// HTTP, features and experts; the FM runs at `fm_serving.url`
    Expert,
    /// The FM for candidates under a deadline, for other processes
    FmServing,
    /// The FM as the logging tier runs it, for other processes: served items in large batches
    FmLogging,
    /// The intake of events only; other processes join and serve
    Ingest,
}
