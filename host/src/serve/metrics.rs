//! What the daemon counts, in Prometheus' text format at `/metrics`.

use std::time::Duration;

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// The stages of a request, in order.
pub const STAGES: [&str; 4] = ["features", "fm", "expert", "wasm"];

/// All metrics of a daemon.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    degraded: IntCounterVec,
    stages: HistogramVec,
    duration: HistogramVec,
    events: IntCounterVec,
    versions: IntGaugeVec,
}

impl Metrics {
    /// Registers every metric, at zero.
    pub fn new() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid name");
            registry.register(Box::new(counter.clone())).expect("registered once");
            counter
        };
        // 50 µs to about 1.6 s, doubling.
        let buckets = prometheus::exponential_buckets(50e-6, 2.0, 16).expect("a valid range");
        let histogram = |name: &str, help: &str, labels: &[&str]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.clone());
            let histogram = HistogramVec::new(options, labels).expect("a valid name");
            registry.register(Box::new(histogram.clone())).expect("registered once");
            histogram
        };
        let versions = IntGaugeVec::new(
            Opts::new("hypercast_version_info", "1 for each model version in service"),
            &["tier", "name", "version"],
        )
        .expect("a valid name");
        registry.register(Box::new(versions.clone())).expect("registered once");
        Self {
            requests: counter(
                "hypercast_requests_total",
                "Requests by route and status",
                &["route", "status"],
            ),
            degraded: counter(
                "hypercast_degraded_total",
                "Requests answered with the FM's own ranking, by expert and cause",
                &["expert", "cause"],
            ),
            stages: histogram(
                "hypercast_stage_seconds",
                "Time of a stage of a rank request",
                &["stage"],
            ),
            duration: histogram("hypercast_request_seconds", "Time of a request", &["route"]),
            events: counter("hypercast_events_total", "Events accepted by surface", &["surface"]),
            versions,
            registry,
        }
    }

    /// Counts an answered request.
    pub fn request(&self, route: &str, status: u16, took: Duration) {
        self.requests.with_label_values(&[route, &status.to_string()]).inc();
        self.duration.with_label_values(&[route]).observe(took.as_secs_f64());
    }

    /// Counts a degraded answer.
    pub fn degraded(&self, expert: &str, cause: &str) {
        self.degraded.with_label_values(&[expert, cause]).inc();
    }

    /// Times a stage of [`STAGES`].
    pub fn stage(&self, stage: &str, took: Duration) {
        self.stages.with_label_values(&[stage]).observe(took.as_secs_f64());
    }

    /// Counts accepted events.
    pub fn events(&self, surface: &str, count: u64) {
        self.events.with_label_values(&[surface]).inc_by(count);
    }

    /// Says that a version is in service.
    pub fn version(&self, tier: &str, name: &str, version: &str) {
        self.versions.with_label_values(&[tier, name, version]).set(1);
    }

    /// The text for `/metrics`.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("# metrics could not be written: {error}\n"),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
