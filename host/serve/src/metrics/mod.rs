//! What the daemon counts: as Prometheus text at `/metrics`, and recent values for `GET /v1/live`.
//!
//! Reading either takes no lock that a request waits for: requests count in atomics, and windows of
//! quality are apart from the predictions that requests add. [`prediction_log`] holds predictions
//! until their outcomes are known, and [`window`] computes their quality over the last minutes.

pub mod arm_outcomes;
mod plugins;
pub mod prediction_log;
mod register;
pub mod sequential;
pub mod window;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hypercast_core::clock::now_ms;
use hypercast_data::schema::Schema;
use hypercast_fm::history::CacheCounts;
use hypercast_stream::{
    dead_letters::SetAsideRate,
    join::{JoinMetrics, JoinerCounts, JoinerProgress},
    publish::PublicationHeader,
    streams::Topic,
};
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector,
};
use serde_json::{Value, json};

use crate::{
    metrics::{
        prediction_log::{PredictionLog, QualityKey},
        register::MetricRegistrar,
        window::RecentValues,
    },
    threads::lock,
    versions::serving_set::{ExpertArm, ServingSet},
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
    /// Accepted impressions by surface.
    pub(crate) events: IntCounterVec,
    /// Numbers beyond the ranges of the schema, by the name of the value or feature and by fate.
    pub(crate) beyond_range: IntCounterVec,
    event_latency: HistogramVec,
    /// State of this process' joiner.
    pub(crate) joiner: IntGaugeVec,
    /// Decisions that the registry misses.
    pub(crate) unapplied: IntGauge,
    /// Passes of the FM, by the requests in them.
    pub(crate) fm_batches: Histogram,
    history_cache: IntGaugeVec,
    versions: IntGaugeVec,
    arms: IntCounterVec,
    arm_seconds: HistogramVec,
    /// Requests that were offered to shadows, by what became of them.
    pub(crate) shadows: IntCounterVec,
    /// Requests that were offered to the request log, by what became of them.
    pub(crate) request_log: IntCounterVec,
    /// Answers whose rankings were offered to the stream of events, by what became of them.
    pub(crate) rankings: IntCounterVec,
    publications: IntCounterVec,
    freshness: HistogramVec,
    quality: GaugeVec,
    /// Records of streams that this process sets aside.
    set_aside: Arc<SetAsideRate>,
    sets_aside_many: IntGauge,
    stream_gaps: IntCounterVec,
    /// When the process began, milliseconds since the epoch.
    pub(crate) started_ms: i64,
    recent: RecentStats,
    /// Publications by `fm@VERSION` or `NAME@VERSION`. No request takes this lock.
    applied: Mutex<HashMap<String, AppliedPublications>>,
}

/// Recent values for the live page. They have no lock, because every request adds some.
#[derive(Debug, Default)]
struct RecentStats {
    /// Seconds of each of [`STAGES`], and of whole requests.
    stages: [RecentValues; STAGES.len()],
    total: RecentValues,
    /// Seconds by what is measured, as in [`FRESHNESS`].
    freshness: [RecentValues; FRESHNESS.len()],
    answered_ms: RecentValues,
    /// Rank requests since the start that were degraded, and refused.
    degraded: AtomicU64,
    refused: AtomicU64,
}

/// The ages of events and weights when they take effect, by their names on the live page.
const FRESHNESS: [&str; 5] = [
    "event to example",
    "event to live state",
    "event to outcome",
    "event to serving weights",
    "publication to serving",
];

impl RecentStats {
    fn fresh(&self, what: &str, age_s: f64) {
        let at = FRESHNESS.iter().position(|known| *known == what);
        self.freshness[at.expect("the callers name one of them")].push(age_s);
    }
}

/// Publications of one version's weights.
#[derive(Debug, Clone, Copy, Default)]
pub struct AppliedPublications {
    /// Publications that were applied.
    pub applied: u64,
    /// Publications that were refused, because they did not follow the weights that serve.
    pub refused: u64,
    /// Time of the newest request in the training data of the newest publication, milliseconds
    /// since the epoch.
    pub trained_until_ms: i64,
    /// When the newest publication was applied, milliseconds since the epoch.
    pub at_ms: i64,
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
        self.recent.fresh(what, took_s);
    }

    fn joiner(&self, progress: JoinerProgress) {
        let JoinerProgress { counts, impressions, orphans, lag_events } = progress;
        let JoinerCounts { joined, outcomes, repeated, unchanged, late, .. } = counts;
        let JoinerCounts { orphaned, early, refused, unplaced, .. } = counts;
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
            ("unplaced", unplaced),
        ];
        set_all(&self.joiner, &values);
    }

    fn set_aside_rate(&self) -> Arc<SetAsideRate> {
        self.set_aside.clone()
    }

    fn stream_gap(&self, topic: &Topic) {
        self.stream_gaps.with_label_values(&[topic.name()]).inc();
    }
}

/// The times of a rank request.
#[derive(Debug, Clone, Copy)]
pub struct RankTimes {
    /// In each of [`STAGES`].
    pub stages: [Duration; STAGES.len()],
    /// From features to the ranking; none if there is no answer.
    pub total: Option<Duration>,
}

impl Default for Metrics {
    /// Registers every metric, at zero.
    fn default() -> Self {
        let registry = Registry::new();
        let register = MetricRegistrar(&registry);
        let buckets = |first, factor, count| {
            prometheus::exponential_buckets(first, factor, count).expect("the range is valid")
        };
        // 50 µs to about 1.6 s.
        let request_times = buckets(50e-6, 2.0, 16);
        // 1 ms to about nine hours, because an outcome may wait for its attribution window.
        let event_times = buckets(1e-3, 2.0, 26);
        // 10 ms to about 12 hours.
        let weight_ages = buckets(0.01, 3.0, 15);
        Self {
            requests: register.counters(
                "hypercast_requests_total",
                "HTTP requests by route and status",
                &["route", "status"],
            ),
            duration: register.histograms(
                "hypercast_request_seconds",
                "Time from a request's headers to its answer, by route",
                &["route"],
                &request_times,
            ),
            degraded: register.counters(
                "hypercast_degraded_total",
                "Answers with the FM's own ranking, or without its embedding (cause no_fm), by expert and cause",
                &["expert", "cause"],
            ),
            stages: register.histograms(
                "hypercast_stage_seconds",
                "Time of each stage of a rank request",
                &["stage"],
                &request_times,
            ),
            arms: register.counters(
                "hypercast_arm_requests_total",
                "Rank requests by surface, expert version, FM version and whether the answer was degraded",
                &["surface", "arm", "fm", "degraded"],
            ),
            arm_seconds: register.histograms(
                "hypercast_arm_seconds",
                "Time of a rank request from its features to its ranking, by expert version",
                &["arm"],
                &request_times,
            ),
            shadows: register.counters(
                "hypercast_shadow_requests_total",
                "Answered requests shown to shadow versions: seen, dropped because the queue was full, failed in a version",
                &["what"],
            ),
            request_log: register.counters(
                "hypercast_recorded_requests_total",
                "Answered requests sampled for the request log: kept, dropped because the writer was busy, failed to be written",
                &["what"],
            ),
            rankings: register.counters(
                "hypercast_noted_rankings_total",
                "Answers whose rankings were offered to the events: kept, dropped because the \
                 writer was busy, failed to be written, elsewhere because another process writes \
                 the events",
                &["what"],
            ),
            publications: register.counters(
                "hypercast_publications_total",
                "Publications of weights by version: applied or refused",
                &["arm", "outcome"],
            ),
            freshness: register.histograms(
                "hypercast_weights_age_seconds",
                "Age of published weights when they begin to serve: since they were published, and since their newest event was received",
                &["tier", "since"],
                &weight_ages,
            ),
            events: register.counters(
                "hypercast_events_total",
                "Accepted impressions by surface",
                &["surface"],
            ),
            beyond_range: register.add(Ok(beyond_range())),
            event_latency: register.histograms(
                "hypercast_event_seconds",
                "Time from receiving an event to its training example (joined), to its outcome (told), and to rankings that use it (live)",
                &["stage"],
                &event_times,
            ),
            unapplied: register.add(IntGauge::new(
                "hypercast_registry_unapplied_decisions",
                "Decisions of the registry that this version of hypercast cannot apply or its stream has lost; it decides nothing meanwhile",
            )),
            joiner: register.gauges(
                "hypercast_joiner",
                "State of this process' joiner, and what it did since its first event",
                &["what"],
            ),
            fm_batches: register.add(Histogram::with_opts(
                HistogramOpts::new(
                    "hypercast_fm_batch_requests",
                    "Requests that shared one forward pass of the FM",
                )
                .buckets(buckets(1.0, 2.0, 12)),
            )),
            history_cache: register.gauges(
                "hypercast_history_cache",
                "Cache of encoded histories: requests found whole; tokens found, encoded and re-encoded by weight updates since the start; bytes now",
                &["what"],
            ),
            versions: register.gauges(
                "hypercast_version_info",
                "1 for each model version in service",
                &["tier", "name", "version"],
            ),
            quality: register.gauges(
                "hypercast_live_quality",
                "NE, of regressions the squared error and that of the mean, and calibration over the last 20 minutes, of served and shadow predictions whose outcomes are known",
                &["surface", "task", "arm", "measure"],
            ),
            set_aside: Arc::default(),
            sets_aside_many: register.add(IntGauge::new(
                "hypercast_sets_aside_many",
                "1 while more than a few records a minute are set aside; `hypercast dead-letters \
                 list` says which and why",
            )),
            stream_gaps: register.counters(
                "hypercast_stream_gaps_total",
                "Times that records of a stream were missing: deleted before they were read, or the stream was cut or made anew",
                &["stream"],
            ),
            started_ms: now_ms(),
            recent: RecentStats::default(),
            applied: Mutex::default(),
            registry,
        }
    }
}

impl Metrics {
    /// A counter of another part of the daemon.
    ///
    /// # Panics
    /// If the name is taken or not valid.
    pub fn counter(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        MetricRegistrar(&self.registry).counters(name, help, labels)
    }

    /// A gauge of another part of the daemon.
    ///
    /// # Panics
    /// If the name is taken or not valid.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        MetricRegistrar(&self.registry).add(IntGauge::new(name, help))
    }

    /// Counts and times an HTTP request.
    pub fn request(&self, route: &str, status: u16, took: Duration) {
        self.requests.with_label_values(&[route, &status.to_string()]).inc();
        self.duration.with_label_values(&[route]).observe(took.as_secs_f64());
        if route == "/v1/rank" {
            self.recent.refused.fetch_add(u64::from(status >= 500), Ordering::Relaxed);
            self.recent.answered_ms.push(now_ms() as f64);
            self.recent.total.push(took.as_secs_f64());
        }
    }

    /// Accounts for a rank request on a surface: its degradation, with the cause, and its times.
    /// `arm` was to rank, and the FM version was asked.
    pub fn ranked(
        &self,
        surface: &str,
        arm: Option<&ExpertArm>,
        fm: &str,
        degraded: Option<&str>,
        times: RankTimes,
    ) {
        let (name, label) = arm.map_or(("", ""), |arm| (arm.name.as_str(), arm.label.as_str()));
        if let Some(cause) = degraded {
            self.degraded.with_label_values(&[name, cause]).inc();
        }
        self.recent.degraded.fetch_add(u64::from(degraded.is_some()), Ordering::Relaxed);
        let Some(took) = times.total else { return };
        for ((stage, recent), took) in STAGES.iter().zip(&self.recent.stages).zip(times.stages) {
            self.stages.with_label_values(&[stage]).observe(took.as_secs_f64());
            recent.push(took.as_secs_f64());
        }
        let degraded = if degraded.is_some() { "true" } else { "false" };
        self.arms.with_label_values(&[surface, label, fm, degraded]).inc();
        self.arm_seconds.with_label_values(&[label]).observe(took.as_secs_f64());
    }

    /// Counts a publication that was applied; `arm` is `fm@VERSION` or `NAME@VERSION`.
    pub fn publication_applied(&self, arm: &str, header: &PublicationHeader) {
        self.publications.with_label_values(&[arm, "applied"]).inc();
        let tier = if arm.starts_with("fm@") { "fm" } else { "expert" };
        let now = now_ms();
        for (what, since, from_ms) in [
            ("publication to serving", "published", header.published_ms),
            ("event to serving weights", "event", header.ingested_ms),
        ] {
            // 0 means unknown.
            if from_ms > 0 {
                let age_s = (now - from_ms).max(0) as f64 / 1e3;
                self.freshness.with_label_values(&[tier, since]).observe(age_s);
                self.recent.fresh(what, age_s);
            }
        }
        let mut all = lock(&self.applied);
        let applied = all.entry(arm.to_owned()).or_default();
        applied.applied += 1;
        applied.trained_until_ms = header.trained_until_ms;
        applied.at_ms = now;
    }

    /// Counts a publication that was refused; the weights before it keep serving.
    pub fn publication_refused(&self, arm: &str) {
        self.publications.with_label_values(&[arm, "refused"]).inc();
        lock(&self.applied).entry(arm.to_owned()).or_default().refused += 1;
    }

    /// Sets the gauges of live quality by surface, task and arm.
    pub fn quality(&self, predictions: &PredictionLog, schema: &Schema) {
        // Arms that no longer serve disappear.
        self.quality.reset();
        for (QualityKey { surface, task, arm }, window) in predictions.windows() {
            // Another service may know more surfaces, because the schema has grown.
            let Some(surface) = schema.surfaces.get(usize::from(surface)) else { continue };
            let quality = window.quality();
            let measures = [
                ("ne", quality.ne),
                ("calibration", quality.calibration),
                ("mse", quality.mse),
                ("base_mse", quality.base_mse),
            ];
            for (measure, value) in measures {
                if let Some(value) = value {
                    self.quality.with_label_values(&[surface, &*task, &*arm, measure]).set(value);
                }
            }
        }
    }

    /// Publications by `fm@VERSION` or `NAME@VERSION`.
    pub fn applied(&self) -> HashMap<String, AppliedPublications> {
        lock(&self.applied).clone()
    }

    /// Rank requests since the start, and the recent rate.
    pub fn requests_so_far(&self) -> Value {
        let RecentStats { answered_ms, degraded, refused, .. } = &self.recent;
        let kept = answered_ms.kept();
        let per_second =
            kept.iter().copied().reduce(f64::min).map(|oldest_ms| {
                kept.len() as f64 / ((now_ms() as f64 - oldest_ms) / 1e3).max(1.0)
            });
        json!({
            "total": answered_ms.count(),
            "degraded": degraded.load(Ordering::Relaxed),
            "refused": refused.load(Ordering::Relaxed),
            "per_second": per_second,
        })
    }

    /// Recent times of each stage.
    pub fn latency(&self) -> Vec<Value> {
        let stages = STAGES.into_iter().zip(&self.recent.stages);
        let all = stages.chain([("total", &self.recent.total)]);
        let seen = all.filter(|(_, recent)| recent.count() > 0);
        seen.map(|(stage, recent)| row("stage", stage, recent, "us", 1e6)).collect()
    }

    /// Recent ages of events and weights when they took effect.
    pub fn freshness(&self) -> Vec<Value> {
        let all = FRESHNESS.into_iter().zip(&self.recent.freshness);
        let seen = all.filter(|(_, recent)| recent.count() > 0);
        seen.map(|(what, recent)| row("what", what, recent, "ms", 1e3)).collect()
    }

    /// Sets the gauges of the history cache.
    pub fn history_cache(&self, counts: CacheCounts) {
        let CacheCounts { full_hits, cached_tokens, encoded_tokens, warmup_tokens, bytes } = counts;
        let values = [
            ("whole_requests", full_hits),
            ("known_tokens", cached_tokens),
            ("new_tokens", encoded_tokens),
            ("warmed_tokens", warmup_tokens),
            ("bytes", bytes),
        ];
        set_all(&self.history_cache, &values);
    }

    /// Sets which versions are in service.
    pub fn set_versions(&self, set: &ServingSet) {
        self.forget(set);
        self.versions.reset();
        for fm in set.fms() {
            self.versions.with_label_values(&["fm", "fm", fm.version()]).set(1);
        }
        for arm in &set.arms {
            self.versions.with_label_values(&["expert", &arm.name, &arm.version]).set(1);
        }
    }

    /// Removes the series of versions that are no longer loaded; otherwise every push would add
    /// some.
    fn forget(&self, set: &ServingSet) {
        let fms = set.fms().map(|fm| format!("fm@{}", fm.version()));
        let loaded: HashSet<String> =
            set.arms.iter().map(|arm| arm.label.clone()).chain(fms).collect();
        let by_arm = [self.arms.collect(), self.arm_seconds.collect(), self.publications.collect()];
        let families = by_arm.concat();
        for metric in families.iter().flat_map(|family| family.get_metric()) {
            let labels = metric.get_label().iter().map(|label| (label.name(), label.value()));
            let labels: HashMap<&str, &str> = labels.collect();
            if !labels["arm"].is_empty() && !loaded.contains(labels["arm"]) {
                // One of them has the series. A request that still runs on the old set may create
                // it again; the next change removes it.
                let _ = self.arms.remove(&labels);
                let _ = self.arm_seconds.remove(&labels);
                let _ = self.publications.remove(&labels);
            }
        }
    }

    /// What is wrong, while more than a few records a minute are set aside.
    pub fn set_aside_warning(&self) -> Option<String> {
        self.set_aside.warning()
    }

    /// The text of `/metrics`, with the plugins of `set`.
    pub fn render(&self, set: Option<&ServingSet>) -> String {
        self.sets_aside_many.set(i64::from(self.set_aside.warning().is_some()));
        let mut families = self.registry.gather();
        families.extend(set.into_iter().flat_map(plugins::families));
        TextEncoder::new()
            .encode_to_string(&families)
            .unwrap_or_else(|error| format!("# metrics could not be written: {error}\n"))
    }
}

/// A counter of numbers beyond the ranges of a schema, by name and outcome.
pub(crate) fn beyond_range() -> IntCounterVec {
    let options = Opts::new(
        "hypercast_beyond_range_total",
        "Numbers of requests and events beyond the range that the schema gives, by the name of the value or feature: clipped or refused; and features with more values than they can have: cut",
    );
    IntCounterVec::new(options, &["name", "outcome"]).expect("the name is valid")
}

fn set_all(gauges: &IntGaugeVec, values: &[(&str, u64)]) {
    for (what, value) in values {
        gauges.with_label_values(&[what]).set(*value as i64);
    }
}

/// The quantiles of recent seconds in a unit of which `per_s` make a second.
fn row(key: &str, of: &str, recent: &RecentValues, unit: &str, per_s: f64) -> Value {
    let quantiles = recent.quantiles([0.5, 0.99]);
    let at = |index: usize| quantiles.map(|values| values[index] * per_s);
    json!({
        (key): of,
        (format!("p50_{unit}")): at(0),
        (format!("p99_{unit}")): at(1),
        "count": recent.count(),
    })
}
