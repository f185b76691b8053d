//! The test requests in time order through the running daemon: each is ranked,
//! its predictions kept, and its outcome sent back once it is known.
//!
//! Requests of different users that follow each other go out together; a
//! user's own request waits until the daemon has all that the user did before.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use hypercast_fm::metrics::{Keeper, Scored};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::progress::Progress;
use hypercast_data::dataset::{
    Dataset, Impression,
    timeline::{Span, Step, Timeline},
};
use hypercast_data::schema::{Schema, TaskKind};
use hypercast_serve::{
    api::{RankCandidate, EventBody, EventsRequest, Explanation, RankAnswer, RankRequest},
    convert::Converter,
};

/// Requests under way at a time.
const TOGETHER: usize = 24;

/// Client threads.
const CLIENTS: usize = 2;

/// Rows kept a slice: more than any test of the demo has.
const KEEP: usize = 1 << 22;

/// The ways of predicting that are compared over the same rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
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

/// Surface (the number of surfaces for all), task, arm.
pub type Slice = (usize, usize, Arm);

/// What a replay gathered.
#[derive(Debug)]
pub struct Outcome {
    /// Predictions and labels.
    pub kept: Keeper<Slice>,
    /// Microseconds by stage, one a request; `total` is inside the daemon, `request` the caller's round trip.
    pub stages_us: BTreeMap<String, Vec<f64>>,
    /// Requests answered.
    pub requests: u64,
    /// Of those, answered by the FM's ranking.
    pub degraded: u64,
}

/// Replays the requests of `span` through the daemon at `url`.
///
/// # Errors
/// A daemon that refuses or does not answer.
pub fn run(dataset: &Dataset, span: Span, url: &str, base: &BaseRates) -> Result<Outcome> {
    let total = count(dataset, span)?;
    let mut client = Client {
        url: url.to_owned(),
        agent: ureq::Agent::new_with_config(
            ureq::Agent::config_builder().http_status_as_error(false).build(),
        ),
        schema: &dataset.schema,
        converter: Converter::new(dataset.schema.clone()),
        base,
        outcome: Outcome {
            kept: Keeper::new(KEEP),
            stages_us: BTreeMap::new(),
            requests: 0,
            degraded: 0,
        },
    };
    let mut progress = Progress::start("replay", total);
    let (mut requests, mut outcomes) = (Vec::new(), Vec::new());
    let mut users = BTreeSet::new();
    for step in Timeline::new(dataset, span)? {
        match step? {
            Step::Outcome(impression) => {
                users.insert(impression.user);
                outcomes.push(impression);
            }
            Step::Request(rows) => {
                if users.contains(&rows[0].user) || requests.len() == TOGETHER {
                    let count = requests.len() as u64;
                    client.flush(&mut requests, &mut outcomes)?;
                    users.clear();
                    progress.advance(count, || format!("{} degraded", client.outcome.degraded));
                }
                users.insert(rows[0].user);
                requests.push(rows);
            }
        }
    }
    client.flush(&mut requests, &mut outcomes)?;
    let outcome = client.outcome;
    progress.finish(&format!("{} requests, {} degraded", outcome.requests, outcome.degraded));
    Ok(outcome)
}

/// An answer, and how long its caller waited for it.
struct Answered {
    answer: RankAnswer,
    took: Duration,
}

struct Client<'a> {
    url: String,
    agent: ureq::Agent,
    schema: &'a Schema,
    converter: Converter,
    base: &'a BaseRates,
    outcome: Outcome,
}

impl Client<'_> {
    fn flush(
        &mut self,
        requests: &mut Vec<Vec<Impression>>,
        outcomes: &mut Vec<Impression>,
    ) -> Result<()> {
        let this = &*self;
        let share = requests.len().div_ceil(CLIENTS).max(1);
        let answers: Vec<Result<Vec<Answered>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = requests
                .chunks(share)
                .map(|part| scope.spawn(move || part.iter().map(|rows| this.rank(rows)).collect()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a client thread does not panic"))
                .collect()
        });
        let mut all = Vec::with_capacity(requests.len());
        for part in answers {
            all.extend(part?);
        }
        for (rows, answered) in requests.drain(..).zip(all) {
            self.keep(&rows, answered)?;
        }
        if !outcomes.is_empty() {
            self.tell(outcomes)?;
            outcomes.clear();
        }
        Ok(())
    }

    fn rank(&self, rows: &[Impression]) -> Result<Answered> {
        let first = &rows[0];
        let request = RankRequest {
            user: first.user,
            surface: self.schema.surfaces[usize::from(first.surface)].clone(),
            candidates: rows.iter().map(|row| self.candidate(row)).collect(),
            request: None,
            time_ms: Some(first.time_ms),
            limit: None,
            context: BTreeMap::new(),
            explain: true,
        };
        let start = Instant::now();
        let answer = self.post("/v1/rank", &request)?;
        Ok(Answered { answer, took: start.elapsed() })
    }

    fn candidate(&self, row: &Impression) -> RankCandidate {
        RankCandidate { id: row.item, features: self.converter.named(&row.context) }
    }

    fn tell(&self, outcomes: &[Impression]) -> Result<()> {
        for part in outcomes.chunks(500) {
            let events = part.iter().map(|impression| self.event(impression)).collect();
            let _: serde_json::Value =
                self.post("/v1/events", &EventsRequest { events, ..EventsRequest::default() })?;
        }
        Ok(())
    }

    fn event(&self, impression: &Impression) -> EventBody {
        let outcome = &impression.outcome;
        let known = |bit: &usize| outcome.known >> bit & 1 == 1;
        let actions = (0..self.schema.actions.len()).filter(known);
        let values =
            self.schema.values.iter().zip(outcome.values).filter(|(_, value)| value.is_finite());
        EventBody {
            id: None,
            request: impression.request,
            user: impression.user,
            item: impression.item,
            surface: self.schema.surfaces[usize::from(impression.surface)].clone(),
            time_ms: impression.time_ms,
            actions: actions
                .map(|bit| (self.schema.actions[bit].clone(), outcome.actions >> bit & 1 == 1))
                .collect(),
            values: values.map(|(name, value)| (name.clone(), value)).collect(),
            context: self.converter.named(&impression.context),
            outcome_ms: Some(impression.outcome_ms),
        }
    }

    fn post<A: serde::de::DeserializeOwned>(
        &self,
        route: &str,
        body: &impl serde::Serialize,
    ) -> Result<A> {
        let failed = |error: ureq::Error| Error::invalid(format!("{}{route}: {error}", self.url));
        let mut response =
            self.agent.post(format!("{}{route}", self.url)).send_json(body).map_err(failed)?;
        if response.status() != 200 {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            return Err(Error::invalid(format!(
                "{}{route} answered {}: {text}",
                self.url,
                response.status()
            )));
        }
        response.body_mut().read_json().map_err(failed)
    }

    /// Keeps the predictions of a request under every arm, over the same rows.
    fn keep(&mut self, rows: &[Impression], answered: Answered) -> Result<()> {
        let Answered { answer, took } = answered;
        self.outcome.requests += 1;
        self.outcome.degraded += u64::from(answer.degraded);
        let explain = answer.explain.ok_or_else(|| {
            Error::invalid("the daemon does not explain; set server.explain = true")
        })?;
        let round_trip = ("request".to_owned(), took.as_secs_f64() * 1e6);
        for (stage, us) in explain.stages_us.clone().into_iter().chain([round_trip]) {
            self.outcome.stages_us.entry(stage).or_default().push(us);
        }
        for (task, spec) in self.schema.tasks.iter().enumerate() {
            let Some(bit) =
                self.schema.action(&spec.label).filter(|_| spec.kind == TaskKind::Binary)
            else {
                continue;
            };
            for (row, impression) in rows.iter().enumerate() {
                let inside = self.schema.task_valid(task, impression.surface);
                if !inside || impression.outcome.known >> bit & 1 == 0 {
                    continue;
                }
                let label = impression.outcome.actions >> bit & 1 == 1;
                for (arm, probability) in self.arms(&explain, task, row, impression) {
                    let scored = Scored { user: impression.user, probability, label };
                    for surface in [usize::from(impression.surface), self.schema.surfaces.len()] {
                        self.outcome.kept.push((surface, task, arm), scored);
                    }
                }
            }
        }
        Ok(())
    }

    /// The probability of each arm. A degraded answer counts with what was served: the FM's.
    fn arms(
        &self,
        explain: &Explanation,
        task: usize,
        row: usize,
        impression: &Impression,
    ) -> Vec<(Arm, f32)> {
        let name = &self.schema.tasks[task].name;
        let pick = |by_task: &BTreeMap<String, Vec<f32>>| {
            by_task.get(name).and_then(|values| values.get(row)).copied()
        };
        let base = self.base.rate(impression.surface, task);
        let fm = pick(&explain.fm);
        let without = explain.shadows.values().next().and_then(pick);
        let fallback = fm.unwrap_or(base);
        let mut arms = vec![
            (Arm::Base, base),
            (Arm::Expert, without.unwrap_or(fallback)),
            (Arm::ExpertTae, pick(&explain.expert).unwrap_or(fallback)),
        ];
        arms.extend(fm.map(|probability| (Arm::Fm, probability)));
        arms.extend(
            impression
                .truth
                .get(task)
                .filter(|p| p.is_finite())
                .map(|&probability| (Arm::Best, probability)),
        );
        arms
    }
}

/// The share of positives before the test, by surface and task.
#[derive(Debug)]
pub struct BaseRates {
    rates: BTreeMap<(u16, usize), (u64, u64)>,
}

impl BaseRates {
    /// Counts what a data set holds before `until_ms`.
    pub fn of(dataset: &Dataset, until_ms: i64) -> Result<Self> {
        let schema = &dataset.schema;
        let bits: Vec<Option<usize>> =
            schema.tasks.iter().map(|task| schema.action(&task.label)).collect();
        let mut rates: BTreeMap<(u16, usize), (u64, u64)> = BTreeMap::new();
        for impression in dataset.impressions()? {
            let impression = impression?;
            if impression.time_ms >= until_ms {
                break;
            }
            for (task, bit) in bits.iter().enumerate() {
                if let Some(bit) = bit.filter(|bit| impression.outcome.known >> bit & 1 == 1) {
                    let (positives, all) = rates.entry((impression.surface, task)).or_default();
                    *positives += u64::from(impression.outcome.actions >> bit & 1);
                    *all += 1;
                }
            }
        }
        Ok(Self { rates })
    }

    /// The rate, drawn a little to one half so that it is never 0 or 1.
    pub fn rate(&self, surface: u16, task: usize) -> f32 {
        let (positives, all) = self.rates.get(&(surface, task)).copied().unwrap_or((0, 0));
        ((positives as f64 + 0.5) / (all as f64 + 1.0)) as f32
    }
}

fn count(dataset: &Dataset, span: Span) -> Result<u64> {
    let mut last = None;
    let mut count = 0;
    for impression in dataset.impressions()? {
        let impression = impression?;
        let inside = span.from_ms.is_none_or(|from_ms| impression.time_ms >= from_ms)
            && !impression.history_only;
        if inside && last.replace(impression.request) != Some(impression.request) {
            count += 1;
        }
    }
    Ok(count)
}
