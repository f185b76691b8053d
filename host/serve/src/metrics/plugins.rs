//! Metrics of plugins by arm. Plugins count for themselves; these are copies, made whenever
//! `/metrics` is read.

use std::time::Duration;

use hypercast_expert::breaker::BreakerState;
use prometheus::{CounterVec, GaugeVec, IntCounterVec, IntGaugeVec, Registry, proto::MetricFamily};

use crate::{metrics::register::MetricRegistrar, versions::serving_set::ServingSet};

/// The counts of the plugins in service, labelled by arm: `NAME@VERSION`.
pub(super) fn families(set: &ServingSet) -> Vec<MetricFamily> {
    let registry = Registry::new();
    let register = MetricRegistrar(&registry);
    let requests: IntCounterVec = register.counters(
        "hypercast_plugin_requests_total",
        "Requests that a plugin was to rank",
        &["arm"],
    );
    let faults: IntCounterVec = register.counters(
        "hypercast_plugin_faults_total",
        "Requests that a plugin failed to answer, by cause",
        &["arm", "cause"],
    );
    let calls: IntCounterVec = register.counters(
        "hypercast_plugin_calls_total",
        "Calls into a plugin by export, and instances created",
        &["arm", "call"],
    );
    let seconds: CounterVec = register.counters(
        "hypercast_plugin_seconds_total",
        "Seconds spent on a plugin: its network in the host, each export in Wasm, and creating instances",
        &["arm", "in"],
    );
    let log_lines: IntCounterVec = register.counters(
        "hypercast_plugin_log_lines_total",
        "Log lines of a plugin: written, or dropped because it wrote too many in a second",
        &["arm", "what"],
    );
    let memory: IntGaugeVec = register.gauges(
        "hypercast_plugin_memory_bytes",
        "Peak linear memory of an instance of a plugin",
        &["arm"],
    );
    let degraded: GaugeVec = register.gauges(
        "hypercast_plugin_degraded_share",
        "Share of a plugin's last 256 requests that were answered with the FM's own ranking",
        &["arm"],
    );
    let breaker: IntGaugeVec = register.gauges(
        "hypercast_plugin_breaker",
        "1 for the state of a plugin's circuit breaker, 0 for the others",
        &["arm", "state"],
    );
    for served in &set.arms {
        let (arm, expert) = (served.label.as_str(), served.expert());
        let (counts, usage) = (expert.counters(), expert.blueprint().plugin.usage());
        requests.with_label_values(&[arm]).inc_by(counts.requests);
        for (cause, count) in &counts.faults {
            faults.with_label_values(&[arm, cause]).inc_by(*count);
        }
        let spend = |part: &str, took: Duration| {
            seconds.with_label_values(&[arm, part]).inc_by(took.as_secs_f64());
        };
        spend("network", counts.network);
        for (call, spent) in &usage.calls {
            let call = call.to_string();
            calls.with_label_values(&[arm, &call]).inc_by(spent.calls);
            spend(&call, spent.took);
        }
        calls.with_label_values(&[arm, "instance"]).inc_by(usage.instances.calls);
        spend("instance", usage.instances.took);
        for (what, lines) in [("written", usage.log_lines), ("dropped", usage.log_lines_dropped)] {
            log_lines.with_label_values(&[arm, what]).inc_by(lines);
        }
        memory.with_label_values(&[arm]).set(usage.memory_bytes as i64);
        degraded.with_label_values(&[arm]).set(counts.degraded_lately.unwrap_or(0.0));
        let state = expert.breaker_state();
        for known in [BreakerState::Closed, BreakerState::HalfOpen, BreakerState::Open] {
            let is = i64::from(known == state);
            breaker.with_label_values(&[arm, known.label()]).set(is);
        }
    }
    registry.gather()
}
