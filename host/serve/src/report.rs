//! `GET /v1/live`: what the daemon does now, for the page at `/` (which says
//! what its fields are). It reads what others measured and computes nothing anew but percentiles.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use serde::Serialize;

use super::{
    metrics::{Fresh, Latency, Metrics, Requests},
    service::Service,
    set::{Arm, ServedFm},
    window::Quality,
};
use hypercast_expert::wasm::Call;
use hypercast_stream::registry::VersionState;

/// The answer.
#[derive(Debug, Serialize)]
pub struct Report {
    now_ms: i64,
    started_ms: i64,
    tier: &'static str,
    /// Why the registry's last decision is not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    revision: u64,
    requests: Requests,
    latency: Vec<Latency>,
    freshness: Vec<Fresh>,
    ne: Vec<Line>,
    /// Outcomes that were compared with what was served, and those whose request is not known here.
    outcomes: (u64, u64),
    fms: Vec<Fm>,
    experts: Vec<Expert>,
    plugins: Vec<PluginHealth>,
}

#[derive(Debug, Serialize)]
struct Line {
    surface: String,
    task: String,
    arm: String,
    #[serde(flatten)]
    quality: Quality,
    series: Vec<(i64, Option<f64>)>,
}

#[derive(Debug, Serialize)]
struct Fm {
    version: String,
    state: VersionState,
    publications: u64,
    refused: u64,
    trained_until_ms: i64,
    applied_ms: Option<i64>,
}

#[derive(Debug, Serialize)]
struct Expert {
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
struct PluginHealth {
    name: String,
    version: String,
    requests: u64,
    degraded: u64,
    /// Of the last requests.
    degraded_lately: Option<f64>,
    faults: BTreeMap<&'static str, u64>,
    breaker: &'static str,
    /// Means, in microseconds: the network and `rank` a request, an instance each.
    network_us: Option<f64>,
    rank_us: Option<f64>,
    instance_us: Option<f64>,
    memory_bytes: u64,
    log_lines: u64,
    log_lines_dropped: u64,
}

/// What is now.
pub(super) fn report(service: &Service, metrics: &Metrics) -> Report {
    let set = service.models().set();
    let surface = |at: u16| service.schema().surfaces[usize::from(at)].clone();
    let applied = metrics.applied();
    let fm = |fm: &ServedFm| {
        let of = applied.get(&format!("fm@{}", fm.version())).copied().unwrap_or_default();
        Fm {
            version: fm.version().to_owned(),
            state: fm.state,
            publications: of.applied,
            refused: of.refused,
            trained_until_ms: of.trained_until_ms.max(fm.manifest().trained_until_ms),
            applied_ms: (of.applied > 0).then_some(of.at_ms),
        }
    };
    let expert = |arm: &Arm| {
        let of = applied.get(&arm.label).copied().unwrap_or_default();
        Expert {
            name: arm.name.clone(),
            version: arm.version.clone(),
            state: arm.state(),
            fm: arm.fm.clone(),
            surfaces: arm.surfaces().iter().map(|at| surface(*at)).collect(),
            share: arm.share,
            publications: of.applied,
            refused: of.refused,
            applied_ms: (of.applied > 0).then_some(of.at_ms),
        }
    };
    let plugin = |arm: &Arm| {
        let expert = arm.expert();
        let counts = expert.counters();
        let usage = expert.blueprint().plugin.usage();
        let rank = usage.calls.get(&Call::Rank).copied().unwrap_or_default();
        PluginHealth {
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
    let lines = service.served().windows().into_iter().map(|((at, task, arm), window)| Line {
        surface: surface(at),
        task,
        arm,
        quality: window.quality(),
        series: window.series(),
    });
    Report {
        now_ms: hypercast_core::clock::now_ms(),
        started_ms: metrics.started_ms(),
        tier: "ranking",
        problem: service.models().problem(),
        revision: set.revision,
        requests: metrics.requests_so_far(),
        latency: metrics.latency(),
        freshness: metrics.freshness(),
        ne: lines.collect(),
        outcomes: service.served().counts(),
        fms: set.fms().map(fm).collect(),
        experts: set.arms().iter().map(|arm| expert(arm)).collect(),
        plugins: set.arms().iter().map(|arm| plugin(arm)).collect(),
    }
}

fn mean_us(took: Duration, calls: u64) -> Option<f64> {
    (calls > 0).then(|| took.as_secs_f64() * 1e6 / calls as f64)
}

/// NE and calibration now, and what plugins used, for `/metrics`.
pub(super) fn gauges(service: &Service, metrics: &Metrics) {
    let schema = service.schema();
    let mut seen: HashMap<[String; 3], Quality> = HashMap::new();
    for ((at, task, arm), window) in service.served().windows() {
        let surface = schema.surfaces[usize::from(at)].clone();
        seen.insert([surface, task, arm], window.quality());
    }
    metrics.quality(&seen);
    metrics.plugins(&service.models().set());
}
