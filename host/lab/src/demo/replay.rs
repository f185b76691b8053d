//! The test requests in time order through the running daemon: each is ranked, its predictions are
//! kept, and its outcome is sent once it is known.
//!
//! Consecutive requests of different users go out together. A user's next request waits until the
//! daemon's features have everything that the user did before: the answer to `/v1/events` comes
//! when they have. That wait decides how long a replay takes, so it must be short in the daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use hypercast_core::progress::Progress;
use hypercast_data::{
    dataset::{
        Dataset, Impression,
        timeline::{Span, Timeline, TimelineStep},
    },
    schema::{Schema, Task, TaskKind},
};
use hypercast_serve::api::{EventsRequest, Explanation, RankRequest};

use super::{
    client::{DemoClient, TimedAnswer},
    report::DemoReport,
    streaming::count,
};
use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::{LatencyQuantiles, ScoredPrediction, ScoredValue, SlicedPredictions},
    verdict::VerdictTally,
};

/// Requests that go out together at most.
const BATCH: usize = 32;

/// Rows kept per slice: more than any test of the demo has.
const KEEP: usize = 1 << 22;

/// The predictors that are compared over the same rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PredictionArm {
    /// The training rate of the surface and task.
    Base,
    /// The expert's network without TAE.
    Expert,
    /// The FM's own head.
    Fm,
    /// The expert with TAE.
    ExpertTae,
    /// Gradient boosting on counters.
    Boosting,
    /// Another expert, with TAE.
    Rival,
    /// The true probability, in a simulated world.
    Best,
}

impl PredictionArm {
    /// The arm's name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            PredictionArm::Base => "base",
            PredictionArm::Expert => "expert",
            PredictionArm::Fm => "fm",
            PredictionArm::ExpertTae => "expert+tae",
            PredictionArm::Boosting => "boosting",
            PredictionArm::Rival => "rival",
            PredictionArm::Best => "best",
        }
    }
}

/// What goes out together: requests first, then the outcomes of earlier ones.
#[derive(Default)]
pub struct PendingBatch {
    /// The rows of each request.
    pub requests: Vec<Vec<Impression>>,
    /// Impressions whose outcomes are known.
    pub outcomes: Vec<Impression>,
    /// The users of both; a user's next request waits for what the user did before.
    users: BTreeSet<u64>,
    /// When the first was added.
    pub since: Option<Instant>,
}

impl PendingBatch {
    /// Whether the batch goes out before this step is added.
    pub fn goes_before(&self, step: &TimelineStep) -> bool {
        let TimelineStep::Request(rows) = step else { return false };
        self.requests.len() == BATCH || self.users.contains(&rows[0].user)
    }

    /// Sends what the step of the timeline says.
    pub fn push(&mut self, step: TimelineStep) {
        match step {
            TimelineStep::Outcome(row) => {
                self.users.insert(row.user);
                self.outcomes.push(row);
            }
            TimelineStep::Request(rows) => {
                self.users.insert(rows[0].user);
                self.requests.push(rows);
            }
        }
        self.since.get_or_insert_with(Instant::now);
    }
}

/// Replays the requests from a time on through the daemon at `url`. The report has no times of
/// steps yet.
///
/// # Errors
/// A daemon that refuses a request or does not answer.
pub fn run(dataset: &Dataset, from_ms: i64, url: &str, base: &BaseRates) -> Result<DemoReport> {
    let mut replay = Replayer {
        client: DemoClient::new(url.to_owned(), dataset)?,
        schema: dataset.schema.clone(),
        base,
        pending: PendingBatch::default(),
        kept: SlicedPredictions::new(&dataset.schema, KEEP),
        verdict: VerdictTally::new(&dataset.schema, false),
        stages_ms: BTreeMap::new(),
        report: DemoReport::default(),
    };
    let mut progress = Progress::start("replay", count(dataset, from_ms)?.0);
    for step in Timeline::new(dataset, Span { from_ms: Some(from_ms), until_ms: None })? {
        let step = step?;
        if replay.pending.goes_before(&step) {
            let count = replay.pending.requests.len() as u64;
            replay.flush()?;
            let degraded = replay.report.degraded;
            progress.advance(count, || format!("{degraded} degraded"));
        }
        replay.pending.push(step);
    }
    replay.flush()?;
    let Replayer { kept, verdict, stages_ms, report, .. } = replay;
    progress.finish(&format!("{} requests, {} degraded", report.requests, report.degraded));
    let stages = stages_ms.into_iter();
    Ok(DemoReport {
        rows: kept.rows(|arm| arm.name().to_owned()),
        verdict: verdict.verdict()?,
        latency: stages.map(|(stage, ms)| (stage, LatencyQuantiles::of(ms))).collect(),
        ..report
    })
}

struct Replayer<'a> {
    client: DemoClient,
    schema: Arc<Schema>,
    base: &'a BaseRates,
    /// What goes out with the next flush.
    pending: PendingBatch,
    /// Predictions with the labels that came later, by slice.
    kept: SlicedPredictions<PredictionArm>,
    verdict: VerdictTally,
    /// Milliseconds by stage, one per request; `total` is measured in the daemon, `request` is the
    /// client's round trip.
    stages_ms: BTreeMap<String, Vec<f64>>,
    /// Requests, degraded ones and items, counted so far.
    report: DemoReport,
}

impl Replayer<'_> {
    /// Ranks the gathered requests, then sends the gathered outcomes.
    fn flush(&mut self) -> Result<()> {
        let PendingBatch { requests, outcomes, .. } = std::mem::take(&mut self.pending);
        let bodies: Vec<RankRequest> =
            requests.iter().map(|rows| self.client.explained_request(rows)).collect();
        for (rows, answer) in requests.iter().zip(self.client.rank_all(&bodies)?) {
            self.keep(rows, answer)?;
        }
        let events = outcomes.iter().map(|impression| self.client.event(impression)).collect();
        self.client.send(EventsRequest { events, ..EventsRequest::default() })
    }

    /// Keeps the predictions of a request under every arm, over the same rows.
    fn keep(&mut self, rows: &[Impression], timed: TimedAnswer) -> Result<()> {
        let answer = timed.answer.ok_or_else(|| {
            Error::unreachable("the daemon refused a request for lack of time; free the machine")
        })?;
        self.report.requests += 1;
        self.report.degraded += u64::from(answer.degraded);
        let explanation = answer.explain.ok_or_else(|| {
            Error::invalid("the daemon does not explain; set server.explain = true")
        })?;
        let stages = explanation.stages_us.iter().map(|(stage, us)| (stage.clone(), us / 1e3));
        let round_trip = ("request".to_owned(), timed.took.as_secs_f64() * 1e3);
        for (stage, ms) in stages.chain([round_trip]) {
            self.stages_ms.entry(stage).or_default().push(ms);
        }
        for (task, Task { kind, .. }) in self.schema.tasks.iter().enumerate() {
            for (row, impression) in rows.iter().enumerate() {
                let Impression { surface, user, outcome, .. } = impression;
                let Some(label) = self.schema.label(task, *surface, outcome) else { continue };
                let arms = self.arms(&explanation, task, row, impression);
                let has_fm = arms.iter().any(|(arm, _)| *arm == PredictionArm::Fm);
                for (arm, prediction) in arms {
                    match kind {
                        TaskKind::Binary => {
                            let (user, label) = (*user, label == 1.0);
                            let scored = ScoredPrediction { user, probability: prediction, label };
                            self.kept.push(*surface, task, &arm, scored);
                            if has_fm {
                                self.verdict.push(*surface, task, arm, scored);
                            }
                        }
                        TaskKind::Regression => {
                            let scored = ScoredValue { prediction, label };
                            self.kept.push_value(*surface, task, &arm, scored);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The prediction of each arm. A degraded answer counts with what was served: the FM's.
    fn arms(
        &self,
        explanation: &Explanation,
        task: usize,
        row: usize,
        impression: &Impression,
    ) -> Vec<(PredictionArm, f32)> {
        let name = &self.schema.tasks[task].name;
        let pick = |by_task: &BTreeMap<String, Vec<f32>>| {
            by_task.get(name).and_then(|values| values.get(row)).copied()
        };
        let base = self.base.rate(impression.surface, task);
        let fm = pick(&explanation.fm);
        let without = explanation.shadows.values().next().and_then(pick);
        let fallback = fm.unwrap_or(base);
        let best = impression.truth.get(task).copied().filter(|p| p.is_finite());
        let mut arms = vec![
            (PredictionArm::Base, base),
            (PredictionArm::Expert, without.unwrap_or(fallback)),
            (PredictionArm::ExpertTae, pick(&explanation.expert).unwrap_or(fallback)),
        ];
        arms.extend(fm.map(|prediction| (PredictionArm::Fm, prediction)));
        arms.extend(best.map(|probability| (PredictionArm::Best, probability)));
        arms
    }
}

/// The share of positives before the test, or the mean of a regression's labels, by surface and
/// task.
#[derive(Debug)]
pub struct BaseRates {
    schema: Arc<Schema>,
    sums: BTreeMap<(u16, usize), LabelSum>,
}

/// The sum of some labels.
#[derive(Debug, Clone, Copy, Default)]
struct LabelSum {
    sum: f64,
    count: f64,
}

impl BaseRates {
    /// Counts the impressions of a data set before `until_ms`.
    ///
    /// # Errors
    /// A data set that cannot be read.
    pub fn of(dataset: &Dataset, until_ms: i64) -> Result<Self> {
        let schema = dataset.schema.clone();
        let mut sums: BTreeMap<(u16, usize), LabelSum> = BTreeMap::new();
        for impression in dataset.impressions()? {
            let Impression { time_ms, surface, outcome, .. } = impression?;
            if time_ms >= until_ms {
                break;
            }
            for task in 0..schema.tasks.len() {
                if let Some(label) = schema.label(task, surface, &outcome) {
                    let LabelSum { sum, count } = sums.entry((surface, task)).or_default();
                    *sum += f64::from(label);
                    *count += 1.0;
                }
            }
        }
        Ok(Self { schema, sums })
    }

    /// The rate, drawn a little to one half so that it is never 0 or 1; the mean of a regression's
    /// labels.
    pub fn rate(&self, surface: u16, task: usize) -> f32 {
        let LabelSum { sum, count } = self.sums.get(&(surface, task)).copied().unwrap_or_default();
        let rate = match self.schema.tasks[task].kind {
            TaskKind::Binary => (sum + 0.5) / (count + 1.0),
            TaskKind::Regression => sum / count.max(1.0),
        };
        rate as f32
    }
}
