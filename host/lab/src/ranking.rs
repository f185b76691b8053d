//! The order within requests: NDCG of each arm, and how far each is from the expert's, with
//! intervals from the bootstrap over users. NE says whether probabilities are right; this says
//! whether the best row stands first, which is all that a loss of pairs or lists trains.

use std::{collections::BTreeMap, fmt, sync::Arc};

use hypercast_core::text_table::TextTable;
use hypercast_data::schema::Schema;
use hypercast_fm::metrics::{ScoredValue, ndcg};
use serde::Serialize;

use crate::{bootstrap::resample, demo::replay::PredictionArm, evaluate::scores::ScoredImpression};

/// Draws of the bootstrap.
const REPLICATES: usize = 400;

/// Collects the rows of requests. Those of a request come one after another, for each task and arm.
#[derive(Debug)]
pub struct RankingTally {
    schema: Arc<Schema>,
    open: BTreeMap<TaskArm, OpenRequest>,
    /// The sums of each user's requests.
    users: BTreeMap<TaskArm, BTreeMap<u64, NdcgSums>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct TaskArm {
    task: usize,
    arm: PredictionArm,
}

/// The rows of a user on a surface at a time.
#[derive(Debug)]
struct OpenRequest {
    user: u64,
    surface: u16,
    time_ms: i64,
    rows: Vec<ScoredValue>,
}

/// Requests whose labels differ, and the sum of their NDCG.
#[derive(Debug, Clone, Copy, Default)]
struct NdcgSums {
    requests: f64,
    ndcg: f64,
}

/// The order of requests by each arm, task by task.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RankingReport {
    /// A task whose labels differ within some request.
    pub tasks: Vec<TaskRanking>,
}

/// The order by the predictions of one task.
#[derive(Debug, Clone, Serialize)]
pub struct TaskRanking {
    /// The task.
    pub task: String,
    /// What each arm makes of it.
    pub arms: Vec<ArmRanking>,
}

/// NDCG of an arm.
#[derive(Debug, Clone, Serialize)]
pub struct ArmRanking {
    /// The arm.
    pub arm: &'static str,
    /// Requests whose labels differ.
    pub requests: u64,
    /// The mean over these requests.
    pub ndcg: f64,
    /// Its 95 % interval.
    pub ci95: [f64; 2],
    /// How far it is above that of the expert with TAE, on the same users' requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_expert: Option<NdcgDifference>,
}

/// How far two arms are apart.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct NdcgDifference {
    /// The difference of NDCG.
    pub ndcg: f64,
    /// Its 95 % interval.
    pub ci95: [f64; 2],
}

impl RankingTally {
    /// No rows yet, of tasks of a schema.
    pub fn new(schema: &Arc<Schema>) -> Self {
        Self { schema: schema.clone(), open: BTreeMap::new(), users: BTreeMap::new() }
    }

    /// Adds a prediction for a row, behind the others of its request.
    pub fn push(&mut self, of: &ScoredImpression, prediction: f32) {
        let ScoredImpression { user, surface, time_ms, task, arm, label } = *of;
        let (slice, row) = (TaskArm { task, arm }, ScoredValue { prediction, label });
        let fresh = OpenRequest { user, surface, time_ms, rows: vec![row] };
        let Some(open) = self.open.get_mut(&slice) else {
            self.open.insert(slice, fresh);
            return;
        };
        if (open.user, open.surface, open.time_ms) == (user, surface, time_ms) {
            open.rows.push(row);
        } else {
            let done = std::mem::replace(open, fresh);
            count(&mut self.users, slice, &done);
        }
    }

    /// What the rows give so far.
    pub fn report(&self) -> RankingReport {
        let mut users = self.users.clone();
        self.open.iter().for_each(|(slice, open)| count(&mut users, *slice, open));
        let mut tasks: BTreeMap<usize, BTreeMap<PredictionArm, &BTreeMap<u64, NdcgSums>>> =
            BTreeMap::new();
        for (TaskArm { task, arm }, sums) in &users {
            tasks.entry(*task).or_default().insert(*arm, sums);
        }
        let of_task = |(task, arms): (usize, BTreeMap<_, _>)| TaskRanking {
            task: self.schema.tasks[task].name.clone(),
            arms: rankings(&arms),
        };
        RankingReport { tasks: tasks.into_iter().map(of_task).collect() }
    }
}

fn count(
    users: &mut BTreeMap<TaskArm, BTreeMap<u64, NdcgSums>>,
    slice: TaskArm,
    request: &OpenRequest,
) {
    if let Some(ndcg) = ndcg(&request.rows) {
        let sums = users.entry(slice).or_default().entry(request.user).or_default();
        sums.requests += 1.0;
        sums.ndcg += ndcg;
    }
}

/// The NDCG of every arm. Arms with other requests than the expert's are not compared with it.
fn rankings(arms: &BTreeMap<PredictionArm, &BTreeMap<u64, NdcgSums>>) -> Vec<ArmRanking> {
    let expert = arms.get(&PredictionArm::ExpertTae);
    let ranking = |(arm, own): (&PredictionArm, &&BTreeMap<u64, NdcgSums>)| {
        let same = |sums: &&&BTreeMap<u64, NdcgSums>| {
            let requests = |(user, sums): (&u64, &NdcgSums)| (*user, sums.requests as u64);
            *arm != PredictionArm::ExpertTae
                && sums.iter().map(requests).eq(own.iter().map(requests))
        };
        let beside = expert.filter(same);
        let columns: Vec<Vec<NdcgSums>> = [Some(own), beside]
            .into_iter()
            .flatten()
            .map(|of| of.values().copied().collect())
            .collect();
        let measure = |weights: Option<&[u32]>| -> Vec<f64> {
            let means: Vec<f64> = columns.iter().map(|sums| mean(sums, weights)).collect();
            let difference = means.get(1).map(|expert| means[0] - expert);
            means.iter().take(1).copied().chain(difference).collect()
        };
        let values = measure(None);
        let bounds = resample(own.len(), REPLICATES, |weights| measure(Some(weights)));
        let difference = values.get(1).zip(bounds.get(1));
        ArmRanking {
            arm: arm.name(),
            requests: own.values().map(|sums| sums.requests as u64).sum(),
            ndcg: values[0],
            ci95: bounds[0],
            over_expert: difference.map(|(&ndcg, &ci95)| NdcgDifference { ndcg, ci95 }),
        }
    };
    arms.iter().map(ranking).collect()
}

/// The mean over requests, each user's counted as often as `weights` says; once without.
fn mean(users: &[NdcgSums], weights: Option<&[u32]>) -> f64 {
    let (mut requests, mut ndcg) = (0.0, 0.0);
    for (at, sums) in users.iter().enumerate() {
        let weight = weights.map_or(1.0, |weights| f64::from(weights[at]));
        requests += weight * sums.requests;
        ndcg += weight * sums.ndcg;
    }
    ndcg / requests
}

impl fmt::Display for RankingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["task", "arm", "requests", "NDCG", "95 %", "over expert+tae", "95 %"];
        let mut table = TextTable::new(2, head);
        for TaskRanking { task, arms } in &self.tasks {
            for (at, own) in arms.iter().enumerate() {
                let task = if at == 0 { task.clone() } else { String::new() };
                let [low, high] = own.ci95;
                let mut cells = vec![
                    task,
                    own.arm.to_owned(),
                    own.requests.to_string(),
                    format!("{:.4}", own.ndcg),
                    format!("[{low:.4}, {high:.4}]"),
                ];
                if let Some(NdcgDifference { ndcg, ci95: [low, high] }) = own.over_expert {
                    cells.extend([format!("{ndcg:+.4}"), format!("[{low:+.4}, {high:+.4}]")]);
                }
                table.line(cells);
            }
        }
        if table.is_empty() { Ok(()) } else { write!(f, "\norder within requests:\n{table}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_data::simulate;

    #[test]
    fn an_arm_with_the_better_order_is_above_the_expert_beyond_chance() {
        let mut tally = RankingTally::new(&Arc::new(simulate::schema(1)));
        let mut push = |arm, user: u64, time_ms, label, prediction| {
            tally.push(
                &ScoredImpression { user, surface: 0, time_ms, task: 0, arm, label },
                prediction,
            );
        };
        for user in 0..100 {
            for time_ms in 0..2 {
                for row in 0..3u8 {
                    let label = f32::from(u8::from(row == 1));
                    let at = f32::from(row);
                    push(PredictionArm::Rival, user, time_ms, label, label);
                    // Right in every other request of a user.
                    let expert = if time_ms == 0 { label } else { -at };
                    push(PredictionArm::ExpertTae, user, time_ms, label, expert);
                    push(PredictionArm::Base, user, time_ms, label, 0.5);
                }
            }
            // All labels alike: no order is better.
            push(PredictionArm::Rival, user, 9, 1.0, 0.1);
            push(PredictionArm::Rival, user, 9, 1.0, 0.2);
        }
        let report = tally.report();
        let of = |arm: &str| {
            let arms = &report.tasks[0].arms;
            arms.iter().find(|own| own.arm == arm).cloned().expect("it was pushed")
        };
        let discount = |place: f64| 1.0 / (2.0 + place).log2();
        let (rival, expert, base) = (of("rival"), of("expert+tae"), of("base"));
        assert_eq!((rival.requests, rival.ndcg), (200, 1.0));
        assert!((expert.ndcg - (1.0 + discount(1.0)) / 2.0).abs() < 1e-9, "{}", expert.ndcg);
        let chance = (discount(0.0) + discount(1.0) + discount(2.0)) / 3.0;
        assert!((base.ndcg - chance).abs() < 1e-9, "ties share their places: {}", base.ndcg);
        let over = rival.over_expert.expect("both have the same requests");
        assert!(over.ndcg > 0.1 && over.ci95[0] > 0.1 && expert.over_expert.is_none(), "{over:?}");
        assert!(report.to_string().contains("over expert+tae"), "{report}");
    }
}
