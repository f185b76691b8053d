//! Reloads the configuration on SIGHUP or `POST /v1/admin/reload`. Keys that can change without a
//! restart take effect together, or none of them if anything is wrong. The other keys are named and
//! keep their values until the next start.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use hypercast_config::{Config, DaemonTier, Reloaded};
use hypercast_core::{
    clock::now_ms,
    logging,
    supervised_thread::{OnPanic, PanicWatch},
};
use prometheus::{IntCounterVec, IntGauge};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::{
        auth::{AccessControl, Caller},
        respond::refuse_with,
        server::AppState,
        tls::{self, Tls},
    },
    metrics::Metrics,
    threads::{Current, lock},
};

/// How long a signal that comes before the models are loaded waits for the next try.
const STARTING: Duration = Duration::from_millis(100);

/// The current configuration. A request reads it once and keeps what it got.
pub(crate) type Settings = Current<Config>;

/// Where the configuration comes from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The configuration file.
    pub path: PathBuf,
    /// Overrides its `server.listen`.
    pub listen: Option<String>,
    /// Overrides its `server.probe_listen`.
    pub probe_listen: Option<String>,
    /// The tier that the process runs.
    pub tier: DaemonTier,
}

impl Origin {
    /// Reads the configuration and adapts it to the process' tier.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn read(&self) -> Result<Config> {
        let mut config = Config::read(&self.path)?;
        if let Some(listen) = &self.listen {
            config.server.listen.clone_from(listen);
        }
        if let Some(listen) = &self.probe_listen {
            config.server.probe_listen.clone_from(listen);
        }
        if matches!(self.tier, DaemonTier::FmServing | DaemonTier::FmLogging) {
            // The FM's tiers have no admin routes, but may share a file with a tier that has.
            (config.server.admin, config.server.insecure_admin) = (false, false);
            config.server.admin_tokens.clear();
        }
        Ok(config)
    }
}

/// The result of a reload.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ReloadOutcome {
    /// Keys whose new values apply now. Token and certificate files are read again even if their
    /// keys did not change.
    pub(crate) changed: Vec<String>,
    /// Keys whose new values apply at the next start.
    pub(crate) restart: Vec<String>,
    /// Whether other experts serve now, because the configuration or their files changed.
    pub(crate) experts: bool,
    /// Whether a schema that has grown is used now.
    pub(crate) schema: bool,
}

/// What a reload changed besides the configuration.
pub(crate) struct ReloadedModels {
    /// Whether other experts serve now.
    pub(crate) experts: bool,
    /// Whether a schema that has grown is used now.
    pub(crate) schema: bool,
}

/// Everything that a reload replaces.
pub(crate) struct Reloader {
    pub(crate) origin: Origin,
    pub(crate) settings: Arc<Settings>,
    pub(crate) access: Arc<AccessControl>,
    pub(crate) tls: Option<Arc<Tls>>,
    /// The memory for the bodies of requests, which is set at the start.
    body_budget_bytes: usize,
    outcomes: IntCounterVec,
    well: IntGauge,
    at_s: IntGauge,
    /// Held during a reload, and while anything else is loaded by the configuration: only one runs
    /// at a time.
    turn: Mutex<()>,
}

impl Reloader {
    pub(crate) fn new(
        origin: Origin,
        settings: Arc<Settings>,
        access: Arc<AccessControl>,
        tls: Option<Arc<Tls>>,
        metrics: &Metrics,
    ) -> Self {
        let outcomes = metrics.counter(
            "hypercast_reloads_total",
            "Reloads of the configuration by outcome: applied, refused",
            &["outcome"],
        );
        let well = metrics.gauge(
            "hypercast_config_reload_ok",
            "1 if the last reload was applied or there was none, 0 if it was refused",
        );
        let at_s = metrics.gauge(
            "hypercast_config_loaded_seconds",
            "When the current configuration was read, seconds since the epoch",
        );
        well.set(1);
        at_s.set(now_ms() / 1000);
        let (turn, body_budget_bytes) = (Mutex::default(), settings.now().inflight_body_bytes());
        Self { origin, settings, access, tls, body_budget_bytes, outcomes, well, at_s, turn }
    }

    /// Reads everything again. `models` loads the experts of the new configuration, and what a
    /// schema needs that has grown. Blocks.
    ///
    /// # Errors
    /// Whatever is wrong with the file or what it names; nothing has changed then.
    pub(crate) fn reload(
        &self,
        models: impl FnOnce(&Config) -> Result<ReloadedModels>,
    ) -> Result<ReloadOutcome> {
        let _turn = lock(&self.turn);
        let outcome = self.try_reload(models);
        let label = if outcome.is_ok() { "applied" } else { "refused" };
        self.outcomes.with_label_values(&[label]).inc();
        self.well.set(i64::from(outcome.is_ok()));
        match &outcome {
            Ok(ReloadOutcome { changed, restart, experts, schema }) => {
                self.at_s.set(now_ms() / 1000);
                tracing::info!(?changed, experts, schema, "the configuration was reloaded");
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

    /// Runs what loads by the current configuration while no reload runs, which could replace the
    /// configuration meanwhile. Blocks. `run` must not reload.
    pub(crate) fn between_reloads<T>(&self, run: impl FnOnce(&Config) -> T) -> T {
        let _turn = lock(&self.turn);
        run(&self.settings.now())
    }

    fn try_reload(
        &self,
        models: impl FnOnce(&Config) -> Result<ReloadedModels>,
    ) -> Result<ReloadOutcome> {
        let file = self.origin.read()?;
        let Reloaded { config, changed, waiting } = self.settings.now().reloaded(&file)?;
        // Everything that can fail comes first, the slowest part last.
        check_body_sizes(&config, self.body_budget_bytes)?;
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
        let ReloadedModels { experts, schema } = models(&config)?;
        logging::set_levels(&config.server.log)?;
        self.access.rules.replace(rules);
        if let Some((tls, config)) = tls {
            tls.config.replace(config);
        }
        self.settings.replace(config);
        Ok(ReloadOutcome { changed, restart: waiting, experts, schema })
    }
}

/// Checks that every body that the configuration allows fits into the memory for bodies.
fn check_body_sizes(config: &Config, most: usize) -> Result<()> {
    match config.body_limits().into_iter().find(|(_, bytes)| *bytes > most) {
        None => Ok(()),
        Some((key, bytes)) => Err(Error::invalid(format!(
            "{key} allows {bytes} bytes, and all bodies together have {most}, as was set at the \
             start; lower it, or restart"
        ))),
    }
}

/// Reloads at each SIGHUP, for as long as the process lives. `reload` blocks, and returns none
/// while it is too early.
///
/// # Errors
/// The system gives no signals.
pub(crate) fn at_signals(
    reload: impl Fn() -> Option<Result<ReloadOutcome>> + Send + Sync + 'static,
) -> Result<()> {
    let mut hangups = signal(SignalKind::hangup())
        .map_err(|error| Error::internal(format!("cannot watch for SIGHUP: {error}")))?;
    let reload = Arc::new(reload);
    tokio::spawn(async move {
        let _watched = PanicWatch::new("reloads", OnPanic::NotReady);
        while hangups.recv().await.is_some() {
            loop {
                let reload = reload.clone();
                match tokio::task::spawn_blocking(move || reload()).await {
                    Ok(None) => tokio::time::sleep(STARTING).await,
                    // The reload itself has logged its result.
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

pub(crate) async fn route(
    State(app): State<Arc<AppState>>,
    Extension(Caller { name, .. }): Extension<Caller>,
) -> Response {
    tracing::info!(caller = name, "a reload was requested");
    match tokio::task::spawn_blocking(move || app.reload()).await {
        Ok(Some(Ok(outcome))) => Json(outcome).into_response(),
        Ok(Some(Err(error))) => {
            refuse_with(422, "not_reloaded", &format!("nothing has changed: {error}"))
        }
        Ok(None) => refuse_with(503, "starting", "models are being loaded; try again later"),
        Err(_) => refuse_with(500, "internal", "the reload failed inside the host; see its log"),
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_that_do_not_fit_into_their_memory_are_refused_with_both_figures() {
        let mut config = Config::without_folder();
        let most = config.inflight_body_bytes();
        check_body_sizes(&config, most).unwrap();
        config.server.max_body_bytes = most + 1;
        let why = check_body_sizes(&config, most).unwrap_err().to_string();
        for part in ["server.max_body_bytes", &(most + 1).to_string(), &most.to_string()] {
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn a_file_is_read_as_far_as_it_is_for_a_tier() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hypercast.toml");
        let text = "[server]\nlisten = 'a:1'\nadmin_tokens = 'admin'\ntokens = 'callers'\ntls_certificate = 'c'\ntls_key = 'k'\n";
        std::fs::write(&path, text).unwrap();
        let read = |tier| {
            let (listen, probe_listen) = (Some("b:2".into()), Some("b:3".into()));
            let origin = Origin { path: path.clone(), listen, probe_listen, tier };
            origin.read().unwrap().server
        };
        let whole = read(DaemonTier::All);
        assert!(whole.has_tls() && whole.admin && whole.tokens == dir.path().join("callers"));
        let tier = read(DaemonTier::FmServing);
        assert!(tier.has_tls() && !tier.admin, "it has no admin routes");
        assert_eq!((tier.admin_tokens, tier.tokens), (PathBuf::new(), whole.tokens));
        assert_eq!((whole.listen, tier.listen), ("b:2".into(), "b:2".into()));
        assert_eq!(tier.probe_listen, "b:3");
    }
}
