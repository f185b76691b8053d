//! What plugins used, by arm, in Prometheus' text format. Plugins count for
//! themselves; this copies their counts when somebody asks.

use std::sync::{Mutex, PoisonError};

use hypercast_expert::{Expert, breaker::BreakerState};
use prometheus::{CounterVec, GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::versions::serving_set::ServingSet;

/// By arm: `NAME@VERSION`.
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
    /// Two that ask at once must not mix their counts.
    writing: Mutex<()>,
}

impl PluginMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let register = |metric: Box<dyn prometheus::core::Collector>| {
            registry.register(metric).expect("registered once");
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid name");
            register(Box::new(metric.clone()));
            metric
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels).expect("a valid name");
            register(Box::new(metric.clone()));
            metric
        };
        let seconds = Opts::new(
            "hypercast_plugin_seconds_total",
            "Time of a plugin: its network in the host, each export in Wasm, making instances",
        );
        let seconds = CounterVec::new(seconds, &["arm", "in"]).expect("a valid name");
        register(Box::new(seconds.clone()));
        let degraded = Opts::new(
            "hypercast_plugin_degraded_share",
            "Share of a plugin's last 256 requests that were answered with the FM's own ranking",
        );
        let degraded = GaugeVec::new(degraded, &["arm"]).expect("a valid name");
        register(Box::new(degraded.clone()));
        Self {
            requests: counter("hypercast_plugin_requests_total", "Requests of a plugin", &["arm"]),
            faults: counter(
                "hypercast_plugin_faults_total",
                "Requests that a plugin did not answer, by cause",
                &["arm", "cause"],
            ),
            calls: counter(
                "hypercast_plugin_calls_total",
                "Calls into a plugin by export, and instances made",
                &["arm", "call"],
            ),
            seconds,
            log_lines: counter(
                "hypercast_plugin_log_lines_total",
                "Log lines of a plugin: written, and dropped since there were too many a second",
                &["arm", "what"],
            ),
            memory: gauge(
                "hypercast_plugin_memory_bytes",
                "The most linear memory that an instance of a plugin had",
                &["arm"],
            ),
            degraded,
            breaker: gauge(
                "hypercast_plugin_breaker",
                "1 for the state that a plugin's breaker is in",
                &["arm", "state"],
            ),
            writing: Mutex::default(),
        }
    }

    /// Copies the counts of what is in service; what is not any more is forgotten.
    pub(crate) fn copy(&self, set: &ServingSet) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let counters = [&self.requests, &self.faults, &self.calls, &self.log_lines];
        counters.into_iter().for_each(IntCounterVec::reset);
        [&self.memory, &self.breaker].into_iter().for_each(IntGaugeVec::reset);
        self.seconds.reset();
        self.degraded.reset();
        for arm in set.arms() {
            self.arm(&arm.label, &arm.expert());
        }
    }

    fn arm(&self, arm: &str, expert: &Expert) {
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
