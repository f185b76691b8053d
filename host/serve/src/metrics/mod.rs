//! What the daemon counts: in Prometheus' text format at `/metrics`, and its
//! last values for `GET /v1/live`.

mod plugins;
pub mod prediction_log;
pub mod window;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hypercast_core::clock::now_ms;
use hypercast_fm::history::CacheCounts;
use hypercast_stream::{
    join::{Counts, JoinMetrics, JoinerProgress},
    publish::Header,
};
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
    core::Collector,
    proto::{LabelPair, MetricFamily},
};
use serde::Serialize;

use crate::{
    metrics::{
        plugins::PluginMetrics,
        window::{LiveQuality, RecentValues},
    },
    versions::serving_set::ServingSet,
};

/// The stages of a request, in order.
pub const STAGES: [&str; 4] = ["features", "fm", "expert", "wasm"];

/// An answered request.
#[derive(Debug, Clone, Copy)]
pub struct AnsweredRequest<'a> {
    /// Its surface.
    pub surface: &'a str,
    /// The expert's version; empty where there is none.
    pub arm: &'a str,
    /// The FM version that was asked.
    pub fm: &'a str,
    /// Whether the FM's own ranking, or one without its embedding, stood in.
    pub degraded: bool,
    /// How long it took.
    pub took: Duration,
}

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
    arms: IntCounterVec,
    arm_seconds: HistogramVec,
    shadows: IntCounterVec,
    recorded: IntCounterVec,
    publications: IntCounterVec,
    freshness: HistogramVec,
    quality: GaugeVec,
    plugins: PluginMetrics,
    started_ms: i64,
    totals: [AtomicU64; 3],
    recent: Mutex<RecentStats>,
}

/// The last values of what the live page shows.
#[derive(Debug, Default)]
struct RecentStats {
    latency: BTreeMap<&'static str, RecentValues>,
    freshness: BTreeMap<&'static str, RecentValues>,
    answered_ms: RecentValues,
    applied: HashMap<String, AppliedPublications>,
}

/// Publications of a version.
#[derive(Debug, Clone, Copy, Default)]
pub struct AppliedPublications {
    /// That serve, or served.
    pub applied: u64,
    /// That were not what should follow.
    pub refused: u64,
    /// Time of the newest request that the newest one had learned from, milliseconds since the epoch.
    pub trained_until_ms: i64,
    /// When the newest one began to serve, milliseconds since the epoch.
    pub at_ms: i64,
}

/// Requests for rankings since the start.
#[derive(Debug, Clone, Serialize)]
pub struct RequestTotals {
    total: u64,
    degraded: u64,
    refused: u64,
    per_second: Option<f64>,
}

/// How long a stage lately took.
#[derive(Debug, Clone, Serialize)]
pub struct StageLatency {
    stage: &'static str,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    count: u64,
}

/// How old something lately was.
#[derive(Debug, Clone, Serialize)]
pub struct Freshness {
    what: &'static str,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    count: u64,
}

impl JoinMetrics for Metrics {
    fn event_latency(&self, stage: &str, took_ms: i64) {
        let took_s = took_ms.max(0) as f64 / 1e3;
        self.event_latency.with_label_values(&[stage]).observe(took_s);
        let what = match stage {
            "joined" => "event to example",
            "told" => "event to outcome",
            _ => "event to live state",
        };
        self.recent().freshness.entry(what).or_default().push(took_s);
    }

    fn joiner(&self, progress: JoinerProgress) {
        let JoinerProgress { counts, impressions, orphans, lag_events } = progress;
        let Counts { joined, outcomes, repeated, unchanged, late, orphaned, early, refused } =
            counts;
        let values = [
            ("impressions", impressions as u64),
            ("orphans", orphans as u64),
            ("lag_events", lag_events),
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
                "Encoded histories: requests whose whole history was kept, tokens known, new and encoded by updates since the start, bytes now",
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
        let quality = GaugeVec::new(
            Opts::new(
                "hypercast_live_quality",
                "Of served and shadow predictions whose outcomes are known: NE and calibration over the last 20 minutes",
            ),
            &["surface", "task", "arm", "measure"],
        )
        .expect("a valid name");
        registry.register(Box::new(quality.clone())).expect("registered once");
        // 10 ms to about 12 hours, tripling.
        let ages = prometheus::exponential_buckets(0.01, 3.0, 15).expect("a valid range");
        let options = HistogramOpts::new(
            "hypercast_weights_age_seconds",
            "Age of published weights when they begin to serve: since they were published, and since their newest event was taken in",
        );
        let freshness =
            HistogramVec::new(options.buckets(ages), &["tier", "since"]).expect("a valid name");
        registry.register(Box::new(freshness.clone())).expect("registered once");
        Self {
            arms: counter(
                "hypercast_arm_requests_total",
                "Requests by surface, expert's version, FM version and whether the answer was degraded",
                &["surface", "arm", "fm", "degraded"],
            ),
            arm_seconds: histogram(
                "hypercast_arm_seconds",
                "Time of a rank request from features to ranking, by expert's version",
                &["arm"],
            ),
            shadows: counter(
                "hypercast_shadow_requests_total",
                "Answered requests that shadows have seen, that were dropped since they were busy, and those at which one failed",
                &["what"],
            ),
            recorded: counter(
                "hypercast_recorded_requests_total",
                "Answered requests of the share that is recorded: kept, dropped since the writer was busy, failed to be written",
                &["what"],
            ),
            publications: counter(
                "hypercast_publications_total",
                "Publications of weights by version and what became of them",
                &["arm", "outcome"],
            ),
            event_latency,
            joiner,
            freshness,
            quality,
            plugins: PluginMetrics::new(&registry),
            started_ms: now_ms(),
            totals: Default::default(),
            recent: Mutex::default(),
            requests: counter(
                "hypercast_requests_total",
                "Requests by route and status",
                &["route", "status"],
            ),
            degraded: counter(
                "hypercast_degraded_total",
                "Requests answered with the FM's own ranking, or without its embedding (no_fm), by expert and cause",
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

    /// A counter of another part of the daemon, by labels.
    ///
    /// # Panics
    /// If the name is taken or not valid.
    pub fn counter(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        let counter = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid name");
        self.registry.register(Box::new(counter.clone())).expect("registered once");
        counter
    }

    /// A value of another part of the daemon.
    ///
    /// # Panics
    /// If the name is taken or not valid.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        let gauge = IntGauge::new(name, help).expect("a valid name");
        self.registry.register(Box::new(gauge.clone())).expect("registered once");
        gauge
    }

    /// Counts an answered request.
    pub fn request(&self, route: &str, status: u16, took: Duration) {
        self.requests.with_label_values(&[route, &status.to_string()]).inc();
        self.duration.with_label_values(&[route]).observe(took.as_secs_f64());
        if route == "/v1/rank" {
            self.totals[0].fetch_add(1, Ordering::Relaxed);
            if status >= 500 {
                self.totals[2].fetch_add(1, Ordering::Relaxed);
            }
            let mut recent = self.recent();
            recent.answered_ms.push(now_ms() as f64);
            recent.latency.entry("total").or_default().push(took.as_secs_f64());
        }
    }

    /// Counts a degraded answer.
    pub fn degraded(&self, expert: &str, cause: &str) {
        self.degraded.with_label_values(&[expert, cause]).inc();
        self.totals[1].fetch_add(1, Ordering::Relaxed);
    }

    /// Times the stages of a request.
    pub fn stages(&self, times: [Duration; STAGES.len()]) {
        let mut recent = self.recent();
        for (stage, took) in STAGES.into_iter().zip(times) {
            self.stages.with_label_values(&[stage]).observe(took.as_secs_f64());
            recent.latency.entry(stage).or_default().push(took.as_secs_f64());
        }
    }

    /// Counts and times a request by what answered it.
    pub fn arm(&self, answered: AnsweredRequest<'_>) {
        let AnsweredRequest { surface, arm, fm, degraded, took } = answered;
        let degraded = if degraded { "true" } else { "false" };
        self.arms.with_label_values(&[surface, arm, fm, degraded]).inc();
        self.arm_seconds.with_label_values(&[arm]).observe(took.as_secs_f64());
    }

    /// Counts what became of a request that shadows were to see.
    pub fn shadow(&self, what: &str) {
        self.shadows.with_label_values(&[what]).inc();
    }

    /// Counts what became of a request that was to be recorded.
    pub fn recorded(&self, what: &str) {
        self.recorded.with_label_values(&[what]).inc();
    }

    /// Counts a publication that serves now; `arm` is `fm@VERSION` or `NAME@VERSION`.
    pub fn publication_applied(&self, arm: &str, header: &Header) {
        self.publications.with_label_values(&[arm, "applied"]).inc();
        let tier = if arm.starts_with("fm@") { "fm" } else { "expert" };
        let now = now_ms();
        let mut recent = self.recent();
        for (what, since, from_ms) in [
            ("publication to serving", "published", header.published_ms),
            ("event to serving weights", "event", header.ingested_ms),
        ] {
            // 0 is said where it is not known.
            if from_ms > 0 {
                let age_s = (now - from_ms).max(0) as f64 / 1e3;
                self.freshness.with_label_values(&[tier, since]).observe(age_s);
                recent.freshness.entry(what).or_default().push(age_s);
            }
        }
        let applied = recent.applied.entry(arm.to_owned()).or_default();
        applied.applied += 1;
        applied.trained_until_ms = header.trained_until_ms;
        applied.at_ms = now;
    }

    /// Counts a publication that was not what should follow; the weights before it go on serving.
    pub fn publication_refused(&self, arm: &str) {
        self.publications.with_label_values(&[arm, "refused"]).inc();
        self.recent().applied.entry(arm.to_owned()).or_default().refused += 1;
    }

    /// Says how good predictions were, by surface, task and arm.
    pub fn quality(&self, all: &HashMap<[String; 3], LiveQuality>) {
        // Arms that are gone are not said any more.
        self.quality.reset();
        for ([surface, task, arm], quality) in all {
            for (measure, value) in [("ne", quality.ne), ("calibration", quality.calibration)] {
                if let Some(value) = value {
                    self.quality.with_label_values(&[surface, task, arm, measure]).set(value);
                }
            }
        }
    }

    /// Says what plugins in service used.
    pub fn plugins(&self, set: &ServingSet) {
        self.plugins.copy(set);
    }

    /// When the process began, milliseconds since the epoch.
    pub fn started_ms(&self) -> i64 {
        self.started_ms
    }

    /// Publications by `fm@VERSION` or `NAME@VERSION`.
    pub fn applied(&self) -> HashMap<String, AppliedPublications> {
        self.recent().applied.clone()
    }

    /// Requests for rankings since the start, and how many a second lately.
    pub fn requests_so_far(&self) -> RequestTotals {
        let [total, degraded, refused] =
            [0, 1, 2].map(|at: usize| self.totals[at].load(Ordering::Relaxed));
        let answered = self.recent().answered_ms.clone();
        let per_second = answered.quantiles([0.0]).map(|[oldest_ms]| {
            let kept = answered.kept() as f64;
            kept / ((now_ms() as f64 - oldest_ms) / 1e3).max(1.0)
        });
        RequestTotals { total, degraded, refused, per_second }
    }

    /// How long stages lately took.
    pub fn latency(&self) -> Vec<StageLatency> {
        let recent = self.recent();
        let line = |stage: &'static str| {
            let recent = recent.latency.get(stage)?;
            let quantiles = recent.quantiles([0.5, 0.99]);
            let at = |index: usize| quantiles.map(|values| values[index] * 1e6);
            Some(StageLatency { stage, p50_us: at(0), p99_us: at(1), count: recent.count })
        };
        STAGES.into_iter().chain(["total"]).filter_map(line).collect()
    }

    /// How old weights lately were when they began to serve.
    pub fn freshness(&self) -> Vec<Freshness> {
        let recent = self.recent();
        let line = |(what, recent): (&&'static str, &RecentValues)| {
            let quantiles = recent.quantiles([0.5, 0.99]);
            let at = |index: usize| quantiles.map(|values| values[index] * 1e3);
            Freshness { what, p50_ms: at(0), p99_ms: at(1), count: recent.count }
        };
        recent.freshness.iter().map(line).collect()
    }

    /// Counts accepted events.
    pub fn events(&self, surface: &str, count: u64) {
        self.events.with_label_values(&[surface]).inc_by(count);
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
        let CacheCounts { whole, known_tokens, new_tokens, warmed_tokens, bytes } = counts;
        let values = [
            ("whole_requests", whole),
            ("known_tokens", known_tokens),
            ("new_tokens", new_tokens),
            ("warmed_tokens", warmed_tokens),
            ("bytes", bytes),
        ];
        for (what, value) in values {
            self.history_cache.with_label_values(&[what]).set(value as i64);
        }
    }

    /// Says which versions are in service, and that no others are.
    pub fn set_versions(&self, set: &ServingSet) {
        self.forget(set);
        self.versions.reset();
        for fm in set.fms() {
            self.versions.with_label_values(&["fm", "fm", fm.version()]).set(1);
        }
        for arm in set.arms() {
            self.versions.with_label_values(&["expert", &arm.name, &arm.version]).set(1);
        }
    }

    /// Ends the series of versions that are not loaded any more: there would be more of them with every push.
    fn forget(&self, set: &ServingSet) {
        let loaded: HashSet<&str> = set.arms().iter().map(|arm| arm.label.as_str()).collect();
        let gone = |labels: &[LabelPair]| {
            let arm = labels.iter().find(|label| label.name() == "arm").map(|label| label.value());
            arm.is_some_and(|arm| !arm.is_empty() && !loaded.contains(arm))
        };
        let value = |labels: &[LabelPair], name: &str| {
            let found = labels.iter().find(|label| label.name() == name);
            found.map_or_else(String::new, |label| label.value().to_owned())
        };
        let series = |families: Vec<MetricFamily>| -> Vec<Vec<LabelPair>> {
            let all = families.iter().flat_map(|family| family.get_metric());
            all.map(|metric| metric.get_label().to_vec()).filter(|labels| gone(labels)).collect()
        };
        // One that a request of the set before counts again meanwhile goes with the next change.
        for labels in series(self.arms.collect()) {
            let values = ["surface", "arm", "fm", "degraded"].map(|name| value(&labels, name));
            let _ = self.arms.remove_label_values(&values);
        }
        for labels in series(self.arm_seconds.collect()) {
            let _ = self.arm_seconds.remove_label_values(&[value(&labels, "arm")]);
        }
    }

    fn recent(&self) -> MutexGuard<'_, RecentStats> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
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
