//! Admin routes: pushes, the state of their rollouts, plugins' logs, and rollbacks.
//!
//! Bodies are bounded, only one push is accepted at a time, and blocking work runs on threads of
//! its own. `auth` decides who may use these routes.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use hypercast_expert::wasm::LogLine;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    error::{CommonErrors as _, Error},
    http::{bodies::BODY_TIMEOUT, respond::refuse_with, server::AppState},
    request::api::{Refusal, RequestResult},
    rollout::{Rollout, RolloutService},
};

/// The answer about one rollout.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RolloutAnswer {
    /// Its state and its log.
    pub rollout: Rollout,
    /// Whether this request started it.
    #[serde(default)]
    pub begun: bool,
}

/// The rollouts of an expert, and recent output of its versions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogsAnswer {
    /// Known rollouts, the newest last.
    pub rollouts: Vec<Rollout>,
    /// Log lines of the guests, oldest first.
    pub lines: Vec<LogLine>,
    /// Recent faults of loaded versions, oldest first.
    pub faults: Vec<FaultLine>,
}

/// A fault of an expert version.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FaultLine {
    /// When, milliseconds since the epoch.
    pub at_ms: i64,
    /// The version, as `NAME@VERSION`.
    pub arm: String,
    /// The fault's message.
    pub text: String,
}

/// The answer to a rollback.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DoneAnswer {
    /// What was done, in words.
    pub done: String,
}

/// The routes below `/v1/admin`.
pub(crate) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/experts/{name}/versions/{version}", post(push).get(rollout))
        .route("/experts/{name}/logs", get(logs))
        .route("/experts/{name}/rollback", post(roll_back))
}

type ExpertPath = Path<(String, String)>;

async fn push(
    State(app): State<Arc<AppState>>,
    Path((name, version)): ExpertPath,
    body: Body,
) -> axum::response::Result<Response> {
    let rollouts = rollouts(&app)?;
    // Checked before the body is read, so that a waiting push is not held in memory.
    let Ok(turn) = app.pushes.clone().try_acquire_owned() else {
        let why = "another push is being processed; try again in a moment";
        return Ok(refuse_with(503, "busy", why));
    };
    let most = app.reloader.settings.now().rollout.max_push_mib << 20;
    let read = app.bodies.read(body, most).await;
    if let Err(full @ Refusal::BodiesFull { .. }) = read {
        return Ok(full.into_response());
    }
    let Ok(body) = read else {
        let waited_s = BODY_TIMEOUT.as_secs();
        let why = format!(
            "the push is over {most} bytes (rollout.max_push_mib), took longer than {waited_s} s to arrive, or broke off"
        );
        return Ok(refuse_with(413, "too_large", &why));
    };
    let (rollout, begun) = in_turn(turn, move || rollouts.push(&name, &version, &body)).await?;
    let status = if begun { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, Json(RolloutAnswer { rollout, begun })).into_response())
}

async fn rollout(
    State(app): State<Arc<AppState>>,
    Path((name, version)): ExpertPath,
) -> RequestResult<Response> {
    Ok(match rollouts(&app)?.rollout(&name, &version) {
        Some(rollout) => Json(RolloutAnswer { rollout, begun: false }).into_response(),
        None => {
            let why = format!("{name} {version} was not pushed to this daemon");
            refuse_with(404, "no_rollout", &why)
        }
    })
}

async fn logs(
    State(app): State<Arc<AppState>>,
    Path(name): Path<String>,
) -> RequestResult<Response> {
    let (rollouts, set) = (rollouts(&app)?.of(&name), app.loaded()?.models.set());
    let arms = || set.arms.iter().filter(|arm| arm.name == name);
    if rollouts.is_empty() && arms().next().is_none() {
        let why = format!("expert {name:?} neither serves nor was pushed here");
        return Ok(refuse_with(404, "no_expert", &why));
    }
    let mut faults: Vec<FaultLine> = Vec::new();
    for arm in arms() {
        let of = |(at_ms, text)| FaultLine { at_ms, arm: arm.label.clone(), text };
        faults.extend(arm.live.stats.recent_faults().into_iter().map(of));
    }
    faults.sort_by_key(|fault| fault.at_ms);
    // One engine runs all guests.
    let log = set.arms.first().map(|arm| arm.expert().blueprint().plugin.log());
    let lines = log.map_or_else(Vec::new, |log| log.lines(&name));
    Ok(Json(LogsAnswer { rollouts, lines, faults }).into_response())
}

async fn roll_back(
    State(app): State<Arc<AppState>>,
    Path(name): Path<String>,
) -> axum::response::Result<Response> {
    let rollouts = rollouts(&app)?;
    let done = blocking(move || rollouts.roll_back(&name)).await?;
    Ok(Json(DoneAnswer { done }).into_response())
}

fn rollouts(app: &AppState) -> RequestResult<Arc<RolloutService>> {
    app.loaded()?.rollouts.clone().ok_or(Refusal::Starting)
}

/// As [`blocking`], and keeps `turn` until the work ends: it goes on if the caller goes away.
async fn in_turn<T: Send + 'static>(
    turn: OwnedSemaphorePermit,
    run: impl FnOnce() -> crate::error::Result<T> + Send + 'static,
) -> crate::error::Result<T> {
    blocking(move || {
        let _turn = turn;
        run()
    })
    .await
}

async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> crate::error::Result<T> + Send + 'static,
) -> crate::error::Result<T> {
    let ended = |error: tokio::task::JoinError| {
        Error::internal(format!("it failed inside the host: {error}"))
    };
    tokio::task::spawn_blocking(run).await.map_err(ended)?
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::mpsc::channel, time::Duration};

    use hypercast_config::Config;
    use hypercast_expert::Engine;
    use hypercast_stream::streams::MemoryEngine;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::http::reload::Settings;
    use crate::request::api::RefusalBody;
    use crate::rollout::{Acceptor, PolicyOverrides, Push, SignedManifest};

    async fn answered(error: Error) -> (u16, RefusalBody) {
        let response = error.into_response();
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn the_turn_of_a_push_ends_with_its_work_and_not_with_its_caller() {
        let pushes = Arc::new(Semaphore::new(1));
        let (begun, begins) = channel();
        let (go_on, waits) = channel::<()>();
        let turn = pushes.clone().try_acquire_owned().unwrap();
        let handler = tokio::spawn(in_turn(turn, move || {
            begun.send(()).unwrap();
            Ok(waits.recv().is_ok())
        }));
        tokio::task::spawn_blocking(move || begins.recv().unwrap()).await.unwrap();
        // The caller goes away, so its handler is dropped.
        handler.abort();
        assert!(handler.await.unwrap_err().is_cancelled());
        assert_eq!(pushes.available_permits(), 0, "its work has the turn");
        go_on.send(()).unwrap();
        let next = tokio::time::timeout(Duration::from_secs(30), pushes.acquire()).await;
        assert!(next.is_ok(), "the next push gets the turn");
    }

    #[tokio::test]
    async fn a_failure_inside_the_host_is_not_the_callers_bad_request() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::without_folder();
        config.paths.experts = dir.path().to_path_buf();
        // The daemon's own configuration has an invalid key.
        config.rollout.trusted_keys = vec!["x".into()];
        let schema =
            Arc::new(toml::from_str("surfaces = ['feed']\nactions = []\ntasks = []").unwrap());
        let wasm = Engine::new(config.guests()).unwrap();
        let streams = Arc::new(MemoryEngine::new(16));
        let settings = Arc::new(Settings::new(config));
        let acceptor = Acceptor::new(settings, schema, wasm, streams).unwrap();
        let accept =
            |body: &[u8]| acceptor.accept("feed", "1.0.0", body, HashSet::new()).err().unwrap();
        let signed =
            SignedManifest { manifest: "{}".into(), key: "k".into(), signature: "00".into() };
        let push = Push {
            signed,
            wishes: PolicyOverrides::default(),
            component: b"wasm",
            parameters: None,
        };
        let (status, body) = answered(accept(&push.encode())).await;
        assert_eq!((status, body.error.code.as_str()), (500, "internal"));
        assert!(body.error.message.contains("\"x\" is not a"), "{}", body.error.message);
        let ended = blocking(|| -> crate::Result<()> { panic!("as a bug would") }).await;
        let (status, body) = answered(ended.unwrap_err()).await;
        assert_eq!((status, body.error.code.as_str()), (500, "internal"));
        // The caller's mistake stays the caller's.
        let (status, body) = answered(accept(b"nothing")).await;
        assert_eq!((status, body.error.code.as_str()), (400, "bad_request"));
    }
}
