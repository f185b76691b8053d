//! `GET /v1/live`: what the daemon does now, for the page at `/`, whose source documents the
//! fields. Everything but percentiles is counted elsewhere.

use std::{collections::BTreeMap, time::Duration};

use hypercast_config::FlopsShare;
use hypercast_expert::wasm::Call;
use serde_json::{Value, json};

use crate::{
    metrics::{
        Metrics, arm_outcomes::ComparedArm, sequential::SequentialDifference, window::LiveQuality,
    },
    request::service::RankingService,
    versions::serving_set::{ExpertArm, ServedFm},
};

pub(crate) fn report(service: &RankingService, metrics: &Metrics) -> Value {
    let set = service.models.set();
    // Windows of quality may have more surfaces than this service knows, if the schema has grown.
    let surface = |at: u16| service.converter.schema.surfaces.get(usize::from(at)).cloned();
    let applied = metrics.applied();
    let fm = |fm: &ServedFm| {
        let of = applied.get(&format!("fm@{}", fm.version())).copied().unwrap_or_default();
        json!({
            "version": fm.version(),
            "state": fm.desired.state,
            "publications": of.applied,
            "refused": of.refused,
            "trained_until_ms": of.trained_until_ms.max(fm.manifest().trained_until_ms),
            "applied_ms": (of.applied > 0).then_some(of.at_ms),
        })
    };
    let limits = &service.settings.now().plugin_limits;
    let over = |arm: &ExpertArm| {
        let over = set.over_flops_share(arm, &service.converter.schema, limits);
        over.map(|over| over.to_string())
    };
    let expert = |arm: &ExpertArm| {
        let of = applied.get(&arm.label).copied().unwrap_or_default();
        let surfaces: Vec<String> =
            arm.desired.surfaces.iter().filter_map(|at| surface(*at)).collect();
        json!({
            "name": arm.name,
            "version": arm.version,
            "state": arm.desired.state,
            "fm": arm.fm,
            "surfaces": surfaces,
            "share": arm.share,
            // Of the FLOPs of a one-stage model of its FM's size, and how that is too much.
            "flops_share": set.flops_share(arm).map(FlopsShare::share),
            "over_flops_share": over(arm),
            "publications": of.applied,
            "refused": of.refused,
            "applied_ms": (of.applied > 0).then_some(of.at_ms),
        })
    };
    let quality = service.predictions.windows().into_iter().filter_map(|(key, window)| {
        let LiveQuality { n, ne, calibration, mse, base_mse, .. } = window.quality();
        let surface = surface(key.surface)?;
        Some(json!({
            "surface": surface,
            "task": key.task,
            "arm": key.arm,
            "n": n,
            "ne": ne,
            "calibration": calibration,
            // Of a regression, in the square of its label's unit.
            "mse": mse,
            "base_mse": base_mse,
            // For each bucket, when it began and the NE of the minute before its end.
            "series": window.series(),
        }))
    });
    let arms = service.arm_outcomes.comparisons().into_iter().filter_map(|compared| {
        let ComparedArm { task, arm, share, rows, users, mean, against, .. } = compared;
        let of = |of: fn(SequentialDifference) -> f64| compared.difference.map(of);
        Some(json!({
            "surface": surface(compared.surface)?,
            "task": task,
            "arm": arm,
            "share": share,
            "rows": rows,
            "users": users,
            "mean": mean,
            "against": against,
            // With a 95 % confidence sequence, which may be looked at whenever one likes.
            "difference": of(|of| of.difference),
            "low": of(|of| of.low),
            "high": of(|of| of.high),
            "p": of(|of| of.p),
        }))
    });
    let mut report = json!({
        "now_ms": hypercast_core::clock::now_ms(),
        "started_ms": metrics.started_ms,
        "tier": "ranking",
        "revision": set.revision,
        "requests": metrics.requests_so_far(),
        "latency": metrics.latency(),
        "freshness": metrics.freshness(),
        "ne": quality.collect::<Vec<_>>(),
        // The versions that share an expert's users, since this daemon started or the shares
        // changed.
        "arms": arms.collect::<Vec<_>>(),
        // Outcomes that were compared with a prediction, and those whose request is unknown here.
        "outcomes": service.predictions.counts(),
        "fms": set.fms().map(fm).collect::<Vec<_>>(),
        "experts": set.arms.iter().map(|arm| expert(arm)).collect::<Vec<_>>(),
        "plugins": set.arms.iter().map(|arm| plugin(arm)).collect::<Vec<_>>(),
    });
    // Why the registry's newest decision is not served.
    if let Some(problem) = service.models.problem() {
        report["problem"] = problem.into();
    }
    report
}

fn plugin(arm: &ExpertArm) -> Value {
    let expert = arm.expert();
    let (counts, usage) = (expert.counters(), expert.blueprint().plugin.usage());
    let rank = usage.calls.get(&Call::Rank).copied().unwrap_or_default();
    let faults = counts.faults.iter().copied().filter(|(_, count)| *count > 0);
    let mean_us =
        |took: Duration, calls: u64| (calls > 0).then(|| took.as_secs_f64() * 1e6 / calls as f64);
    json!({
        "name": arm.label,
        "version": expert.version(),
        "requests": counts.requests,
        "degraded": counts.degraded(),
        // The share of the last 256 requests.
        "degraded_lately": counts.degraded_lately,
        // Means: network and `rank` per request, and creating one instance.
        "network_us": mean_us(counts.network, rank.calls),
        "rank_us": mean_us(rank.took, rank.calls),
        "instance_us": mean_us(usage.instances.took, usage.instances.calls),
        "memory_bytes": usage.memory_bytes,
        "log_lines": usage.log_lines,
        "log_lines_dropped": usage.log_lines_dropped,
        "faults": faults.collect::<BTreeMap<_, _>>(),
        "breaker": expert.breaker_state().label(),
    })
}
