//! SIGHUP, or `POST /v1/admin/reload`: the configuration is read again, and what can change without a restart does: all of it, or
//! nothing where any of it is wrong. What cannot is named, and keeps its old value until the next start.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{Extension, extract::State, http::StatusCode, response::Response};
use hypercast_config::{Config, Reloaded, Server, Tier};
use hypercast_core::logging;
use prometheus::{IntCounterVec, IntGauge};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::{
        auth::{AccessControl, CallerName},
        respond::{json, refuse_with},
        server::AppState,
        tls::{self, Tls},
    },
    metrics::Metrics,
    threads::{Current, lock},
};

/// How long a signal that comes before the models are loaded waits to be looked at again.
const STARTING: Duration = Duration::from_millis(100);

/// The configuration now.
#[derive(Debug)]
pub struct Settings {
    now: Current<Config>,
}

impl Settings {
    /// Begins with what was read at the start.
    pub fn new(config: Config) -> Arc<Self> {
        Arc::new(Self { now: Current::new(config) })
    }

    /// The configuration now.
    pub fn now(&self) -> Arc<Config> {
        self.now.get()
    }

    fn replace(&self, config: Config) {
        self.now.replace(config);
    }
}

/// Where the configuration came from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The file.
    pub path: PathBuf,
    /// What stands in the place of its `server.listen`.
    pub listen: Option<String>,
    /// The tier that the process runs.
    pub tier: Tier,
}

impl Origin {
    /// Reads the configuration, as far as it is for this process.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn read(&self) -> Result<Config> {
        let mut config = Config::read(&self.path)?;
        if let Some(listen) = &self.listen {
            config.server.listen.clone_from(listen);
        }
        if matches!(self.tier, Tier::FmServing | Tier::FmLogging) {
            only_for_tiers(&mut config.server);
        }
        Ok(config)
    }
}

/// Tiers of the FM alone have no admin routes; a file may be shared with one that has.
fn only_for_tiers(server: &mut Server) {
    (server.admin, server.insecure_admin) = (false, false);
    server.admin_tokens = Server::default().admin_tokens;
}

/// What a reload did.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ReloadOutcome {
    /// Keys whose new values hold. Files of tokens and certificates are read anew whether or not their keys changed.
    pub(crate) changed: Vec<String>,
    /// Keys that differ from the file until the next start.
    pub(crate) restart: Vec<String>,
    /// Whether other experts serve, since the configuration or their files changed.
    pub(crate) experts: bool,
}

/// What a reload replaces.
pub(crate) struct Reloader {
    pub(crate) origin: Origin,
    pub(crate) settings: Arc<Settings>,
    pub(crate) access: Arc<AccessControl>,
    pub(crate) tls: Option<Arc<Tls>>,
    metrics: ReloadMetrics,
    /// One at a time.
    turn: Mutex<()>,
}

/// How reloads went, for `/metrics`.
struct ReloadMetrics {
    outcomes: IntCounterVec,
    well: IntGauge,
    at_s: IntGauge,
}

impl Reloader {
    pub(crate) fn new(
        origin: Origin,
        settings: Arc<Settings>,
        access: Arc<AccessControl>,
        tls: Option<Arc<Tls>>,
        metrics: &Metrics,
    ) -> Self {
        let own = ReloadMetrics {
            outcomes: metrics.counter(
                "hypercast_reloads_total",
                "Times the configuration was read again, by outcome: applied, refused",
                &["outcome"],
            ),
            well: metrics.gauge(
                "hypercast_config_reload_ok",
                "1 if the last reload was applied, or there was none; 0 if it was refused",
            ),
            at_s: metrics.gauge(
                "hypercast_config_loaded_seconds",
                "When the configuration that holds was read, seconds since the epoch",
            ),
        };
        own.well.set(1);
        own.at_s.set(now_s());
        Self { origin, settings, access, tls, metrics: own, turn: Mutex::default() }
    }

    /// Reads everything again; `experts` loads those of the new configuration and says whether others serve. Blocks.
    ///
    /// # Errors
    /// Whatever is wrong with the file or what it names; then nothing has changed.
    pub(crate) fn reload(
        &self,
        experts: impl FnOnce(&Config) -> Result<bool>,
    ) -> Result<ReloadOutcome> {
        let _turn = lock(&self.turn);
        let outcome = self.try_reload(experts);
        let label = if outcome.is_ok() { "applied" } else { "refused" };
        self.metrics.outcomes.with_label_values(&[label]).inc();
        self.metrics.well.set(i64::from(outcome.is_ok()));
        match &outcome {
            Ok(ReloadOutcome { changed, restart, experts }) => {
                self.metrics.at_s.set(now_s());
                tracing::info!(?changed, experts, "the configuration was reloaded");
                if !restart.is_empty() {
                    tracing::warn!(keys = ?restart, "these keys keep their old values until the next start");
                }
            }
            Err(error) => {
                tracing::error!(%error, "the configuration was not reloaded; nothing changed");
            }
        }
        outcome
    }

    fn try_reload(&self, experts: impl FnOnce(&Config) -> Result<bool>) -> Result<ReloadOutcome> {
        let file = self.origin.read()?;
        let Reloaded { config, changed, waiting } = self.settings.now().reloaded(&file)?;
        // All that can fail comes first, the slowest of it last.
        let rules = self.access.read(&config.server).map_err(|error| {
            if waiting.is_empty() {
                return error;
            }
            Error::invalid(format!(
                "{error} (these keys keep their old values until the next start: {})",
                waiting.join(", ")
            ))
        })?;
        let tls = match &self.tls {
            Some(tls) => Some((tls, tls::read(&config.server)?)),
            None => None,
        };
        let experts = experts(&config)?;
        logging::set_levels(&config.server.log)?;
        self.access.replace(rules);
        if let Some((tls, config)) = tls {
            tls.replace(config);
        }
        self.settings.replace(config);
        Ok(ReloadOutcome { changed, restart: waiting, experts })
    }
}

/// Reloads at each SIGHUP, for as long as the process lives. `reload` blocks; none means that it is too early.
///
/// # Errors
/// A system that gives no signals.
pub(crate) fn at_signals(
    reload: impl Fn() -> Option<Result<ReloadOutcome>> + Send + Sync + 'static,
) -> Result<()> {
    let mut hangups = signal(SignalKind::hangup())
        .map_err(|error| Error::internal(format!("cannot watch for SIGHUP: {error}")))?;
    let reload = Arc::new(reload);
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            loop {
                let reload = reload.clone();
                match tokio::task::spawn_blocking(move || reload()).await {
                    Ok(None) => tokio::time::sleep(STARTING).await,
                    // What came of it was told.
                    Ok(Some(_)) => break,
                    Err(error) => {
                        tracing::error!(%error, "a reload failed inside the host");
                        break;
                    }
                }
            }
        }
    });
    Ok(())
}

/// `POST /v1/admin/reload`.
pub(crate) async fn route(
    State(app): State<Arc<AppState>>,
    Extension(CallerName(name)): Extension<CallerName>,
) -> Response {
    tracing::info!(caller = name, "a reload is asked for");
    match tokio::task::spawn_blocking(move || app.reload()).await {
        Ok(Some(Ok(outcome))) => json(StatusCode::OK, &outcome),
        Ok(Some(Err(error))) => {
            refuse_with(422, "not_reloaded", &format!("nothing has changed: {error}"))
        }
        Ok(None) => refuse_with(503, "starting", "models are being loaded; try again later"),
        Err(_) => refuse_with(500, "internal", "the reload failed inside the host; see its log"),
    }
}

fn now_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_far_as_it_is_for_a_tier() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hypercast.toml");
        let text = "[server]\nlisten = 'a:1'\nadmin_tokens = 'admin'\ntokens = 'callers'\ntls_certificate = 'c'\ntls_key = 'k'\n";
        std::fs::write(&path, text).unwrap();
        let read = |tier| {
            let origin = Origin { path: path.clone(), listen: Some("b:2".into()), tier };
            origin.read().unwrap().server
        };
        let whole = read(Tier::All);
        assert!(whole.has_tls() && whole.admin && whole.tokens == dir.path().join("callers"));
        let tier = read(Tier::FmServing);
        assert!(tier.has_tls() && !tier.admin, "it has no admin routes");
        assert_eq!((tier.admin_tokens, tier.tokens), (PathBuf::new(), whole.tokens));
        assert_eq!((whole.listen, tier.listen), ("b:2".into(), "b:2".into()));
    }
}
