//! Metrics of plugins by arm. Plugins count for themselves; these are copies, made whenever
//! `/metrics` is read.

use std::sync::Mutex;

use hypercast_expert::{ServedExpert, breaker::BreakerState};
use prometheus::{CounterVec, GaugeVec, IntCounterVec, IntGaugeVec};

use crate::{metrics::register::MetricRegistrar, threads::lock, versions::serving_set::ServingSet};

/// Labelled by arm: `NAME@VERSION`.
#[derive(Debug)]
pub(crate) struct PluginMetrics {
    requests: IntCounterVec,
    faults: IntCounterVec,
    calls: IntCounterVec,
    seconds: CounterVec,
    log_lines: IntCounterVec,
    memory: IntGaugeVec,
    degraded: GaugeVec,
    breaker: IntGaugeVec,
    /// Held while copying, because two scrapes at once must not mix their counts.
    writing: Mutex<()>,
}

impl PluginMetrics {
    pub(super) fn new(register: &MetricRegistrar<'_>) -> Self {
        Self {
            requests: register.counters(
                "hypercast_plugin_requests_total",
                "Requests that a plugin was to rank",
                &["arm"],
            ),
            faults: register.counters(
                "hypercast_plugin_faults_total",
                "Requests that a plugin failed to answer, by cause",
                &["arm", "cause"],
            ),
            calls: register.counters(
                "hypercast_plugin_calls_total",
                "Calls into a plugin by export, and instances created",
                &["arm", "call"],
            ),
            seconds: register.float_counters(
                "hypercast_plugin_seconds_total",
                "Seconds spent on a plugin: its network in the host, each export in Wasm, and creating instances",
                &["arm", "in"],
            ),
            log_lines: register.counters(
                "hypercast_plugin_log_lines_total",
                "Log lines of a plugin: written, or dropped because it wrote too many in a second",
                &["arm", "what"],
            ),
            memory: register.gauges(
                "hypercast_plugin_memory_bytes",
                "Peak linear memory of an instance of a plugin",
                &["arm"],
            ),
            degraded: register.float_gauges(
                "hypercast_plugin_degraded_share",
                "Share of a plugin's last 256 requests that were answered with the FM's own ranking",
                &["arm"],
            ),
            breaker: register.gauges(
                "hypercast_plugin_breaker",
                "1 for the state of a plugin's circuit breaker, 0 for the others",
                &["arm", "state"],
            ),
            writing: Mutex::default(),
        }
    }

    /// Copies the counts of the plugins in service, and drops the others.
    pub(crate) fn copy(&self, set: &ServingSet) {
        let _writing = lock(&self.writing);
        let counters = [&self.requests, &self.faults, &self.calls, &self.log_lines];
        counters.into_iter().for_each(IntCounterVec::reset);
        [&self.memory, &self.breaker].into_iter().for_each(IntGaugeVec::reset);
        self.seconds.reset();
        self.degraded.reset();
        for arm in set.arms() {
            self.arm(&arm.label, &arm.expert());
        }
    }

    fn arm(&self, arm: &str, expert: &ServedExpert) {
        let (counts, usage) = (expert.counters(), expert.blueprint().plugin.usage());
        self.requests.with_label_values(&[arm]).inc_by(counts.requests);
        for (cause, count) in &counts.faults {
            self.faults.with_label_values(&[arm, cause]).inc_by(*count);
        }
        let seconds = |part: &str, took: std::time::Duration| {
            self.seconds.with_label_values(&[arm, part]).inc_by(took.as_secs_f64());
        };
        seconds("network", counts.network);
        for (call, spent) in &usage.calls {
            let call = call.to_string();
            self.calls.with_label_values(&[arm, &call]).inc_by(spent.calls);
            seconds(&call, spent.took);
        }
        self.calls.with_label_values(&[arm, "instance"]).inc_by(usage.instances.calls);
        seconds("instance", usage.instances.took);
        for (what, lines) in [("written", usage.log_lines), ("dropped", usage.log_lines_dropped)] {
            self.log_lines.with_label_values(&[arm, what]).inc_by(lines);
        }
        self.memory.with_label_values(&[arm]).set(usage.memory_bytes as i64);
        self.degraded.with_label_values(&[arm]).set(counts.degraded_lately.unwrap_or(0.0));
        let state = expert.breaker_state();
        for known in [BreakerState::Closed, BreakerState::HalfOpen, BreakerState::Open] {
            let is = i64::from(known == state);
            self.breaker.with_label_values(&[arm, known.label()]).set(is);
        }
    }
}
