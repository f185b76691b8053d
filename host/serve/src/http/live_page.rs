//! `GET /v1/live`: what the daemon does now, for the page at `/`, whose source documents the
//! fields. Everything but percentiles is counted elsewhere.

use std::{collections::BTreeMap, time::Duration};

use hypercast_expert::wasm::Call;
use hypercast_stream::registry::VersionState;
use serde::Serialize;

use crate::{
    metrics::{Freshness, Metrics, RequestTotals, StageLatency, window::LiveQuality},
    request::service::RankingService,
    versions::serving_set::{ExpertArm, ServedFm},
};

/// The answer to `GET /v1/live`.
#[derive(Debug, Serialize)]
pub struct LiveReport {
    now_ms: i64,
    started_ms: i64,
    tier: &'static str,
    /// Why the registry's newest decision is not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    revision: u64,
    requests: RequestTotals,
    latency: Vec<StageLatency>,
    freshness: Vec<Freshness>,
    ne: Vec<QualityRow>,
    /// Outcomes that were compared with a prediction, and those whose request is unknown here.
    outcomes: (u64, u64),
    fms: Vec<FmRow>,
    experts: Vec<ExpertRow>,
    plugins: Vec<PluginRow>,
}

#[derive(Debug, Serialize)]
struct QualityRow {
    surface: String,
    task: String,
    arm: String,
    #[serde(flatten)]
    quality: LiveQuality,
    series: Vec<(i64, Option<f64>)>,
}

#[derive(Debug, Serialize)]
struct FmRow {
    version: String,
    state: VersionState,
    publications: u64,
    refused: u64,
    trained_until_ms: i64,
    applied_ms: Option<i64>,
}

#[derive(Debug, Serialize)]
struct ExpertRow {
    name: String,
    version: String,
    state: VersionState,
    fm: String,
    surfaces: Vec<String>,
    share: f64,
    publications: u64,
    refused: u64,
    applied_ms: Option<i64>,
}

#[derive(Debug, Serialize)]
struct PluginRow {
    name: String,
    version: String,
    requests: u64,
    degraded: u64,
    /// Degraded share of the last 256 requests.
    degraded_lately: Option<f64>,
    faults: BTreeMap<&'static str, u64>,
    breaker: &'static str,
    /// Means in microseconds: network and `rank` per request, and creating one instance.
    network_us: Option<f64>,
    rank_us: Option<f64>,
    instance_us: Option<f64>,
    memory_bytes: u64,
    log_lines: u64,
    log_lines_dropped: u64,
}

/// Collects the report.
pub(crate) fn report(service: &RankingService, metrics: &Metrics) -> LiveReport {
    let set = service.models.set();
    let surface = |at: u16| service.converter.schema.surfaces[usize::from(at)].clone();
    let applied = metrics.applied();
    let fm = |fm: &ServedFm| {
        let of = applied.get(&format!("fm@{}", fm.version())).copied().unwrap_or_default();
        FmRow {
            version: fm.version().to_owned(),
            state: fm.desired.state,
            publications: of.applied,
            refused: of.refused,
            trained_until_ms: of.trained_until_ms.max(fm.manifest().trained_until_ms),
            applied_ms: (of.applied > 0).then_some(of.at_ms),
        }
    };
    let expert = |arm: &ExpertArm| {
        let of = applied.get(&arm.label).copied().unwrap_or_default();
        ExpertRow {
            name: arm.name.clone(),
            version: arm.version.clone(),
            state: arm.desired.state,
            fm: arm.fm.clone(),
            surfaces: arm.desired.surfaces.iter().map(|at| surface(*at)).collect(),
            share: arm.share,
            publications: of.applied,
            refused: of.refused,
            applied_ms: (of.applied > 0).then_some(of.at_ms),
        }
    };
    let plugin = |arm: &ExpertArm| {
        let expert = arm.expert();
        let counts = expert.counters();
        let usage = expert.blueprint().plugin.usage();
        let rank = usage.calls.get(&Call::Rank).copied().unwrap_or_default();
        PluginRow {
            name: arm.label.clone(),
            version: expert.version().to_owned(),
            requests: counts.requests,
            degraded: counts.degraded(),
            degraded_lately: counts.degraded_lately,
            network_us: mean_us(counts.network, rank.calls),
            rank_us: mean_us(rank.took, rank.calls),
            instance_us: mean_us(usage.instances.took, usage.instances.calls),
            memory_bytes: usage.memory_bytes,
            log_lines: usage.log_lines,
            log_lines_dropped: usage.log_lines_dropped,
            faults: counts.faults.into_iter().filter(|(_, count)| *count > 0).collect(),
            breaker: expert.breaker_state().label(),
        }
    };
    let lines = service.predictions.windows().into_iter().map(|(key, window)| QualityRow {
        surface: surface(key.surface),
        task: key.task,
        arm: key.arm,
        quality: window.quality(),
        series: window.series(),
    });
    LiveReport {
        now_ms: hypercast_core::clock::now_ms(),
        started_ms: metrics.started_ms,
        tier: "ranking",
        problem: service.models.problem(),
        revision: set.revision,
        requests: metrics.requests_so_far(),
        latency: metrics.latency(),
        freshness: metrics.freshness(),
        ne: lines.collect(),
        outcomes: service.predictions.counts(),
        fms: set.fms().map(fm).collect(),
        experts: set.arms().iter().map(|arm| expert(arm)).collect(),
        plugins: set.arms().iter().map(|arm| plugin(arm)).collect(),
    }
}

fn mean_us(took: Duration, calls: u64) -> Option<f64> {
    (calls > 0).then(|| took.as_secs_f64() * 1e6 / calls as f64)
}
