//! The users' traffic: pages are ranked by the daemon, shown, and what came of them is sent back
//! when it is known.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use hypercast_core::{progress::Progress, shutdown::Shutdown};
use hypercast_data::dataset::{Impression, entity_id::EntityId};
use hypercast_fm::{
    example::{Item, Outcome},
    metrics::LogLossSums,
};
use hypercast_serve::api::{
    ActionBody, EntityBody, EventsRequest, FeatureValue, RankAnswer, RankRequest,
};
use serde::Serialize;

use super::{
    check_stop,
    deployment::Deployment,
    outcomes::{ArmTotals, DailyOutcomes},
    world::{ACTIONS, ClosedLoopWorld, DAY_MS, PAGE_ITEMS, PageRequest},
};
use crate::error::{CommonErrors as _, Error, Result};

/// Pages that are ranked together at most.
const TOGETHER: usize = 16;

/// Pages a second at most: what two cores serve beside three trainers and a logging tier, so that
/// what was learned of a page serves within an hour of the world's time.
const PAGES_PER_SECOND: f64 = 40.0;

/// How often a ranking that was refused for lack of time is asked for again, and the time between.
const ATTEMPTS: u32 = 100;
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The time between two looks at how far training has come.
const LOOK_EVERY: Duration = Duration::from_secs(2);

const MINUTE_MS: f64 = 60_000.0;

/// What was asked and answered.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TrafficCounts {
    /// Pages of both surfaces.
    pub pages: u64,
    /// Pages that the daemon ranked.
    pub ranked: u64,
    /// Answers by the FM in place of an expert that failed; they count for its arm.
    pub degraded: u64,
    /// Items that arrived in the test and were sent to the daemon.
    pub released: u64,
    /// By arm: how well it predicted clicks on what it showed.
    pub clicks: BTreeMap<String, ServedClicks>,
    /// By version of an FM: how far the weights that served were behind the traffic at most, in
    /// minutes of the world's time.
    pub fm_lag_minutes: BTreeMap<String, f64>,
}

/// What an arm predicted of the clicks on what it showed. Arms show different items, so they are
/// not compared on the same rows.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct ServedClicks {
    /// Normalised entropy, by the rate of these rows.
    pub ne: Option<f64>,
    /// The mean prediction over the rate.
    pub calibration: Option<f64>,
    #[serde(skip)]
    sums: LogLossSums,
    #[serde(skip)]
    predicted: f64,
}

impl ServedClicks {
    fn push(&mut self, probability: f32, clicked: bool) {
        self.sums.push(probability, clicked);
        self.predicted += f64::from(probability);
        let clicks = self.sums.positives as f64;
        self.ne = self.sums.normalized_entropy();
        self.calibration = (clicks > 0.0).then_some(self.predicted / clicks);
    }
}

/// The traffic of one seed, with what is still to be sent.
pub struct ClosedLoopTraffic<'a> {
    deployment: &'a mut Deployment,
    world: &'a mut ClosedLoopWorld,
    outcomes: DailyOutcomes,
    /// What is sent next: new items, and what was shown.
    body: EventsRequest,
    /// Outcomes by the time at which they are known.
    known: BTreeMap<(i64, u64, u64), ActionBody>,
    /// Items that the daemon knows.
    items: usize,
    counts: TrafficCounts,
    started: Instant,
    looked: Option<Instant>,
    stop: &'a Shutdown,
}

impl<'a> ClosedLoopTraffic<'a> {
    /// Before its first page.
    pub fn new(
        deployment: &'a mut Deployment,
        world: &'a mut ClosedLoopWorld,
        outcomes: DailyOutcomes,
        stop: &'a Shutdown,
    ) -> Self {
        Self {
            deployment,
            items: world.items(0).len(),
            world,
            outcomes,
            body: EventsRequest::default(),
            known: BTreeMap::new(),
            counts: TrafficCounts::default(),
            started: Instant::now(),
            looked: None,
            stop,
        }
    }

    /// Some days of it; the first begins at `from_ms`.
    ///
    /// # Errors
    /// A daemon that refuses a request, or another version than a user's that answers; a stop.
    pub fn run(
        mut self,
        from_ms: i64,
        days: i64,
        totals: &mut [&mut ArmTotals],
    ) -> Result<TrafficCounts> {
        let mut progress = Progress::start("days of traffic", days as u64);
        for day in 1..=days {
            let until_ms = from_ms + day * DAY_MS;
            loop {
                check_stop(self.stop)?;
                let pages = self.world.next_pages(until_ms, TOGETHER);
                let Some(first) = pages.first() else { break };
                self.send_until(first.time_ms)?;
                self.look(first.time_ms)?;
                self.show(&pages, totals)?;
                self.keep_pace();
            }
            self.deployment.check()?;
            self.outcomes.end_day(totals);
            progress.advance(1, || format!("{} pages", self.counts.pages));
        }
        self.send_until(i64::MAX)?;
        progress.finish(&format!("{:?}", self.counts));
        Ok(self.counts)
    }

    /// Ranks pages, those of the tested surface by the daemon, and shows them.
    fn show(&mut self, pages: &[PageRequest], totals: &mut [&mut ArmTotals]) -> Result<()> {
        let (tested, others): (Vec<&PageRequest>, Vec<_>) =
            pages.iter().partition(|page| page.surface == 0);
        let requests: Vec<RankRequest> = tested
            .iter()
            .map(|page| RankRequest {
                limit: Some(PAGE_ITEMS),
                ..self.deployment.client.live_request(&candidates(page))
            })
            .collect();
        let answers = self.rank(&requests)?;
        for (page, answer) in tested.into_iter().zip(answers) {
            let version = answer.expert.as_ref().map(|expert| expert.version.as_str());
            self.deployment.check_arm(page.user, version)?;
            self.counts.ranked += 1;
            self.counts.degraded += u64::from(answer.degraded);
            let ranking: Vec<u64> = answer.ranking.ids.iter().map(EntityId::key).collect();
            let rows = self.world.show(page, &ranking)?;
            self.note_predictions(self.outcomes.arm(page.user), &answer, &rows);
            let is_fresh = |item| self.world.is_fresh(item, page.time_ms);
            self.outcomes.page(&rows, is_fresh, totals);
            self.shown(&rows);
        }
        for page in others {
            let rows = self.world.show_by_popularity(page)?;
            self.shown(&rows);
        }
        Ok(())
    }

    fn note_predictions(&mut self, arm: usize, answer: &RankAnswer, rows: &[Impression]) {
        let name = self.deployment.arms[arm].name.clone();
        let clicks = self.counts.clicks.entry(name).or_default();
        let Some(predictions) = answer.ranking.predictions.get(ACTIONS[0]) else { return };
        for row in rows {
            let place = answer.ranking.ids.iter().position(|id| id.key() == row.item);
            if let Some(place) = place {
                clicks.push(predictions[place], row.outcome.actions & 1 == 1);
            }
        }
    }

    /// The answers to requests; what was refused for lack of time is asked for again.
    fn rank(&self, requests: &[RankRequest]) -> Result<Vec<RankAnswer>> {
        let client = &self.deployment.client;
        let mut answers = Vec::with_capacity(requests.len());
        for (request, first) in requests.iter().zip(client.rank_all(requests)?) {
            let mut answer = first.answer;
            for _ in 0..ATTEMPTS {
                if answer.is_some() {
                    break;
                }
                check_stop(self.stop)?;
                std::thread::sleep(RETRY_AFTER);
                let again = client.rank_all(std::slice::from_ref(request))?;
                answer = again.into_iter().next().and_then(|again| again.answer);
            }
            answers.push(answer.ok_or_else(|| {
                Error::unreachable(format!("the daemon refused a page {ATTEMPTS} times"))
            })?);
        }
        Ok(answers)
    }

    fn shown(&mut self, rows: &[Impression]) {
        self.counts.pages += 1;
        self.body.impressions.extend(self.deployment.client.impressions(rows));
        for row in rows {
            let action = self.deployment.client.action(row);
            self.known.insert((row.outcome_ms, row.request, row.item), action);
        }
    }

    /// Sends what was shown and released, and the outcomes that are known by a time.
    fn send_until(&mut self, time_ms: i64) -> Result<()> {
        let mut body = std::mem::take(&mut self.body);
        let released = self.world.items(self.items);
        self.items += released.len();
        self.counts.released += released.len() as u64;
        body.items = released.iter().map(entity).collect();
        while let Some(first) = self.known.first_entry().filter(|first| first.key().0 <= time_ms) {
            body.actions.push(first.remove());
        }
        body.clock_ms = (time_ms < i64::MAX).then_some(time_ms);
        self.deployment.client.send(body)
    }

    /// Notes how far the weights that serve are behind the traffic, if it is time for that.
    fn look(&mut self, time_ms: i64) -> Result<()> {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        let live = self.deployment.client.live()?;
        for fm in live["fms"].as_array().into_iter().flatten() {
            let trained = (fm["version"].as_str(), fm["trained_until_ms"].as_i64());
            if let (Some(version), Some(until_ms)) = trained {
                let most = self.counts.fm_lag_minutes.entry(version.to_owned()).or_default();
                *most = most.max((time_ms - until_ms) as f64 / MINUTE_MS);
            }
        }
        Ok(())
    }

    fn keep_pace(&self) {
        let due = Duration::from_secs_f64(self.counts.pages as f64 / PAGES_PER_SECOND);
        std::thread::sleep(due.saturating_sub(self.started.elapsed()));
    }
}

/// The candidates of a page as rows whose outcome nobody knows.
fn candidates(page: &PageRequest) -> Vec<Impression> {
    let row = |&item: &u64| Impression {
        request: page.request,
        time_ms: page.time_ms,
        outcome_ms: page.time_ms,
        user: page.user,
        item,
        surface: page.surface,
        outcome: Outcome::UNKNOWN,
        context: page.context.clone(),
        truth: Vec::new(),
        history_only: false,
    };
    page.candidates.iter().map(row).collect()
}

/// An item as its release says it.
fn entity(item: &Item) -> EntityBody {
    let [topic, creator] = [item.ids[0], item.ids[1]].map(FeatureValue::Id);
    let length = FeatureValue::Number(f64::from(item.dense[0]));
    let features = [("topic", topic), ("creator", creator), ("length", length)];
    EntityBody {
        id: item.id.into(),
        // An item is released once, however often that is sent.
        update: Some(1),
        features: features.map(|(name, value)| (name.to_owned(), value)).into(),
        content: None,
    }
}
