//! What the daemon counts, in Prometheus' text format at `/metrics`.

use std::time::Duration;

use hypercast_fm::history::CacheCounts;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::join::Counts;

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
    event_latency: HistogramVec,
    joiner: IntGaugeVec,
    fm_batches: Histogram,
    history_cache: IntGaugeVec,
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
        let sizes = prometheus::exponential_buckets(1.0, 2.0, 12).expect("a valid range");
        let options = HistogramOpts::new(
            "hypercast_fm_batch_requests",
            "Requests that shared a pass of the FM",
        );
        let fm_batches = Histogram::with_opts(options.buckets(sizes)).expect("a valid name");
        registry.register(Box::new(fm_batches.clone())).expect("registered once");
        let history_cache = IntGaugeVec::new(
            Opts::new(
                "hypercast_history_cache",
                "Encoded histories: requests whose whole history was kept, tokens known and new since the start, bytes now",
            ),
            &["what"],
        )
        .expect("a valid name");
        registry.register(Box::new(history_cache.clone())).expect("registered once");
        let versions = IntGaugeVec::new(
            Opts::new("hypercast_version_info", "1 for each model version in service"),
            &["tier", "name", "version"],
        )
        .expect("a valid name");
        registry.register(Box::new(versions.clone())).expect("registered once");
        // 1 ms to about nine hours, doubling: an outcome may wait for its window.
        let ages = prometheus::exponential_buckets(1e-3, 2.0, 26).expect("a valid range");
        let options = HistogramOpts::new(
            "hypercast_event_seconds",
            "From taking an event in to its example (joined), to its outcome (told), to rankings that see it (live)",
        );
        let event_latency =
            HistogramVec::new(options.buckets(ages), &["stage"]).expect("a valid name");
        registry.register(Box::new(event_latency.clone())).expect("registered once");
        let joiner = IntGaugeVec::new(
            Opts::new(
                "hypercast_joiner",
                "Where the joiner of this process stands, and what it did since its first event",
            ),
            &["what"],
        )
        .expect("a valid name");
        registry.register(Box::new(joiner.clone())).expect("registered once");
        Self {
            event_latency,
            joiner,
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
            fm_batches,
            history_cache,
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

    /// Times the way of an event to a stage: `joined`, `told` or `live`.
    pub fn event_latency(&self, stage: &str, took_ms: i64) {
        self.event_latency.with_label_values(&[stage]).observe(took_ms.max(0) as f64 / 1e3);
    }

    /// Says where the joiner stands: impressions that it holds and actions that wait for theirs, and events it has yet to read.
    pub fn joiner(&self, counts: Counts, (impressions, orphans): (usize, usize), lag: u64) {
        let Counts { joined, outcomes, repeated, unchanged, late, orphaned, early, refused } =
            counts;
        let values = [
            ("impressions", impressions as u64),
            ("orphans", orphans as u64),
            ("lag_events", lag),
            ("joined", joined),
            ("outcomes", outcomes),
            ("repeated", repeated),
            ("unchanged", unchanged),
            ("late", late),
            ("orphaned", orphaned),
            ("early", early),
            ("refused", refused),
        ];
        for (what, value) in values {
            self.joiner.with_label_values(&[what]).set(value as i64);
        }
    }

    /// Says whether the joiner of this process has failed.
    pub fn joiner_failed(&self, failed: bool) {
        self.joiner.with_label_values(&["failed"]).set(i64::from(failed));
    }

    /// Counts a pass of the FM and the requests that shared it.
    pub fn fm_batch(&self, requests: usize) {
        self.fm_batches.observe(requests as f64);
    }

    /// Says what the history cache was worth.
    pub fn history_cache(&self, counts: CacheCounts) {
        let CacheCounts { whole, known_tokens, new_tokens, bytes } = counts;
        let values = [
            ("whole_requests", whole),
            ("known_tokens", known_tokens),
            ("new_tokens", new_tokens),
            ("bytes", bytes),
        ];
        for (what, value) in values {
            self.history_cache.with_label_values(&[what]).set(value as i64);
        }
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
