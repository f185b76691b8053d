//! The test requests in time order through the running daemon: each is ranked, its predictions are
//! kept, and its outcome is sent once it is known.
//!
//! Consecutive requests of different users go out together. A user's next request waits until the
//! daemon's features have everything that the user did before: the answer to `/v1/events` comes
//! when they have. That wait decides how long a replay takes, so it must be short in the daemon.

use std::collections::{BTreeMap, BTreeSet};

use hypercast_core::progress::Progress;
use hypercast_data::{
    dataset::{
        Dataset, Impression,
        timeline::{Span, Timeline, TimelineStep},
    },
    schema::BinaryLabels,
};
use hypercast_serve::api::{EventsRequest, Explanation, RankRequest};

use super::{
    client::{DemoClient, TimedAnswer},
    streaming::count,
};
use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::{ScoredPrediction, SlicedPredictions},
};

/// Requests that go out together at most.
const BATCH: usize = 24;

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
            PredictionArm::Best => "best",
        }
    }
}

/// What a replay gathered.
#[derive(Debug)]
pub struct ReplayOutcome {
    /// Predictions and labels.
    pub kept: SlicedPredictions<PredictionArm>,
    /// Milliseconds by stage, one per request; `total` is measured in the daemon, `request` is the
    /// client's round trip.
    pub stages_ms: BTreeMap<String, Vec<f64>>,
    /// Requests answered.
    pub requests: u64,
    /// Requests answered by the FM's ranking.
    pub degraded: u64,
}

/// Replays the requests from a time on through the daemon at `url`.
///
/// # Errors
/// A daemon that refuses a request or does not answer.
pub fn run(dataset: &Dataset, from_ms: i64, url: &str, base: &BaseRates) -> Result<ReplayOutcome> {
    let mut replay = Replayer {
        client: DemoClient::new(url.to_owned(), dataset.schema.clone()),
        labels: BinaryLabels::new(&dataset.schema),
        base,
        requests: Vec::new(),
        outcomes: Vec::new(),
        users: BTreeSet::new(),
        gathered: ReplayOutcome {
            kept: SlicedPredictions::new(&dataset.schema, KEEP),
            stages_ms: BTreeMap::new(),
            requests: 0,
            degraded: 0,
        },
    };
    let mut progress = Progress::start("replay", count(dataset, from_ms)?.0);
    for step in Timeline::new(dataset, Span { from_ms: Some(from_ms), until_ms: None })? {
        match step? {
            TimelineStep::Outcome(impression) => {
                replay.users.insert(impression.user);
                replay.outcomes.push(impression);
            }
            TimelineStep::Request(rows) => {
                let user = rows[0].user;
                if replay.users.contains(&user) || replay.requests.len() == BATCH {
                    let count = replay.requests.len() as u64;
                    replay.flush()?;
                    let degraded = replay.gathered.degraded;
                    progress.advance(count, || format!("{degraded} degraded"));
                }
                replay.users.insert(user);
                replay.requests.push(rows);
            }
        }
    }
    replay.flush()?;
    let gathered = replay.gathered;
    progress.finish(&format!("{} requests, {} degraded", gathered.requests, gathered.degraded));
    Ok(gathered)
}

struct Replayer<'a> {
    client: DemoClient,
    labels: BinaryLabels,
    base: &'a BaseRates,
    /// Requests and outcomes that go out with the next flush.
    requests: Vec<Vec<Impression>>,
    outcomes: Vec<Impression>,
    /// The users of both.
    users: BTreeSet<u64>,
    gathered: ReplayOutcome,
}

impl Replayer<'_> {
    /// Ranks the gathered requests, then sends the gathered outcomes.
    fn flush(&mut self) -> Result<()> {
        let requests = std::mem::take(&mut self.requests);
        let bodies: Vec<RankRequest> =
            requests.iter().map(|rows| self.client.explained_request(rows)).collect();
        for (rows, answer) in requests.iter().zip(self.client.rank_all(&bodies)?) {
            self.keep(rows, answer)?;
        }
        let events = self.outcomes.iter().map(|impression| self.client.event(impression)).collect();
        self.client.send(EventsRequest { events, ..EventsRequest::default() })?;
        self.outcomes.clear();
        self.users.clear();
        Ok(())
    }

    /// Keeps the predictions of a request under every arm, over the same rows.
    fn keep(&mut self, rows: &[Impression], timed: TimedAnswer) -> Result<()> {
        let answer = timed.answer.ok_or_else(|| {
            Error::unreachable("the daemon refused a request for lack of time; free the machine")
        })?;
        self.gathered.requests += 1;
        self.gathered.degraded += u64::from(answer.degraded);
        let explanation = answer.explain.ok_or_else(|| {
            Error::invalid("the daemon does not explain; set server.explain = true")
        })?;
        let stages = explanation.stages_us.iter().map(|(stage, us)| (stage.clone(), us / 1e3));
        let round_trip = ("request".to_owned(), timed.took.as_secs_f64() * 1e3);
        for (stage, ms) in stages.chain([round_trip]) {
            self.gathered.stages_ms.entry(stage).or_default().push(ms);
        }
        for task in self.labels.tasks() {
            for (row, impression) in rows.iter().enumerate() {
                let Impression { surface, user, outcome, .. } = impression;
                let Some(label) = self.labels.of_outcome(outcome, *surface, task) else { continue };
                let of = RowPredictions { explanation: &explanation, task, row, impression };
                for (arm, probability) in self.arms(&of) {
                    let scored = ScoredPrediction { user: *user, probability, label };
                    self.gathered.kept.push(*surface, task, &arm, scored);
                }
            }
        }
        Ok(())
    }

    /// The probability of each arm. A degraded answer counts with what was served: the FM's.
    fn arms(&self, of: &RowPredictions<'_>) -> Vec<(PredictionArm, f32)> {
        let name = &self.labels.schema.tasks[of.task].name;
        let pick = |by_task: &BTreeMap<String, Vec<f32>>| {
            by_task.get(name).and_then(|values| values.get(of.row)).copied()
        };
        let base = self.base.rate(of.impression.surface, of.task);
        let fm = pick(&of.explanation.fm);
        let without = of.explanation.shadows.values().next().and_then(pick);
        let fallback = fm.unwrap_or(base);
        let best = of.impression.truth.get(of.task).copied().filter(|p| p.is_finite());
        let mut arms = vec![
            (PredictionArm::Base, base),
            (PredictionArm::Expert, without.unwrap_or(fallback)),
            (PredictionArm::ExpertTae, pick(&of.explanation.expert).unwrap_or(fallback)),
        ];
        arms.extend(fm.map(|probability| (PredictionArm::Fm, probability)));
        arms.extend(best.map(|probability| (PredictionArm::Best, probability)));
        arms
    }
}

/// One row of an answer, for one task.
struct RowPredictions<'a> {
    explanation: &'a Explanation,
    task: usize,
    row: usize,
    impression: &'a Impression,
}

/// The share of positives before the test, by surface and task.
#[derive(Debug)]
pub struct BaseRates {
    counts: BTreeMap<(u16, usize), LabelCounts>,
}

#[derive(Debug, Clone, Copy, Default)]
struct LabelCounts {
    positives: u64,
    all: u64,
}

impl BaseRates {
    /// Counts the impressions of a data set before `until_ms`.
    ///
    /// # Errors
    /// A data set that cannot be read.
    pub fn of(dataset: &Dataset, until_ms: i64) -> Result<Self> {
        let labels = BinaryLabels::new(&dataset.schema);
        let mut counts: BTreeMap<(u16, usize), LabelCounts> = BTreeMap::new();
        for impression in dataset.impressions()? {
            let Impression { time_ms, surface, outcome, .. } = impression?;
            if time_ms >= until_ms {
                break;
            }
            for task in labels.tasks() {
                if let Some(label) = labels.of_outcome(&outcome, surface, task) {
                    let counts = counts.entry((surface, task)).or_default();
                    counts.positives += u64::from(label);
                    counts.all += 1;
                }
            }
        }
        Ok(Self { counts })
    }

    /// The rate, drawn a little to one half so that it is never 0 or 1.
    pub fn rate(&self, surface: u16, task: usize) -> f32 {
        let LabelCounts { positives, all } =
            self.counts.get(&(surface, task)).copied().unwrap_or_default();
        ((positives as f64 + 0.5) / (all as f64 + 1.0)) as f32
    }
}
