//! What the FM and the expert bring, in words: by task, against the base rate and each other, with
//! intervals from the bootstrap over users, and what to try where that is little.
//!
//! The tables have every number. This says which of them are more than chance.

use std::{fmt, sync::Arc};

use hypercast_data::schema::{BinaryLabels, Schema};
use hypercast_train::report::ALL;
use serde::Serialize;

use crate::{
    bootstrap::intervals,
    demo::replay::PredictionArm,
    error::Result,
    metrics::ScoredPrediction,
    tally::{ScoreTally, ScoreTotals, SurfaceTask, TalliedLabel, UserTotals},
};

/// The predictors that are compared, in the order of a tally's arms. The last may be missing.
const ARMS: [PredictionArm; 5] = [
    PredictionArm::Base,
    PredictionArm::Fm,
    PredictionArm::Expert,
    PredictionArm::ExpertTae,
    PredictionArm::Boosting,
];

/// What is compared with what: indices of arms. The last is left out without boosting.
const PAIRS: [ArmComparison; 5] = [
    ArmComparison { arm: 1, baseline: 0 },
    ArmComparison { arm: 3, baseline: 0 },
    ArmComparison { arm: 3, baseline: 1 },
    ArmComparison { arm: 3, baseline: 2 },
    ArmComparison { arm: 3, baseline: 4 },
];

/// Draws of the bootstrap.
const REPLICATES: usize = 400;

/// Positives, and negatives, below which a difference is not spoken of.
const FEWEST_LABELS: f64 = 50.0;

/// An arm and what it is compared with.
#[derive(Debug, Clone, Copy)]
struct ArmComparison {
    arm: usize,
    baseline: usize,
}

/// Collects predictions for a verdict.
#[derive(Debug)]
pub struct VerdictTally {
    schema: Arc<Schema>,
    /// The number of arms of [`ARMS`] that there are.
    arms: usize,
    tally: ScoreTally,
}

/// What FM and expert bring, task by task.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verdict {
    /// A verdict a task.
    pub tasks: Vec<TaskVerdict>,
}

/// What FM and expert bring for one task.
#[derive(Debug, Clone, Serialize)]
pub struct TaskVerdict {
    /// The task.
    pub task: String,
    /// Rows of the test with a label.
    pub rows: u64,
    /// Labels that are yes.
    pub positives: u64,
    /// The arms, the base rate first.
    pub arms: Vec<ArmVerdict>,
    /// Differences of NE, in per cent of the baseline's; below 0 is better.
    pub differences: Vec<NeDifference>,
    /// Surfaces and arms that are worse than the base rate, as `arm on surface`.
    pub worse_than_base: Vec<String>,
    /// What that means.
    pub words: String,
    /// What to try.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub advice: Vec<String>,
}

/// The NE of an arm over all surfaces.
#[derive(Debug, Clone, Serialize)]
pub struct ArmVerdict {
    /// The arm.
    pub arm: &'static str,
    /// Its normalised entropy.
    pub ne: Option<f64>,
}

/// How far two arms are apart.
#[derive(Debug, Clone, Serialize)]
pub struct NeDifference {
    /// The arm.
    pub arm: &'static str,
    /// What it is compared with.
    pub baseline: &'static str,
    /// The difference of NE, in per cent.
    pub pct: f64,
    /// Its 95 % interval.
    pub ci95: [f64; 2],
}

impl NeDifference {
    /// Below 0 beyond chance.
    fn is_better(&self) -> bool {
        self.ci95[1] < 0.0
    }

    /// Above 0 beyond chance.
    fn is_worse(&self) -> bool {
        self.ci95[0] > 0.0
    }

    fn words(&self) -> String {
        let NeDifference { pct, ci95: [low, high], .. } = self;
        format!("{pct:+.2} % [{low:+.2}, {high:+.2}]")
    }
}

impl VerdictTally {
    /// An empty tally of binary tasks of a schema, with or without boosting.
    pub fn new(schema: &Arc<Schema>, has_boosting: bool) -> Self {
        let arms = if has_boosting { ARMS.len() } else { ARMS.len() - 1 };
        let names: Vec<&str> = ARMS[..arms].iter().map(|arm| arm.name()).collect();
        let tally = ScoreTally::new(&BinaryLabels::new(schema), i64::MIN, &names);
        Self { schema: schema.clone(), arms, tally }
    }

    /// Adds a prediction on a surface. Those of arms that are not compared are left out.
    pub fn push(&mut self, surface: u16, task: usize, arm: PredictionArm, of: ScoredPrediction) {
        if let Some(arm) = ARMS[..self.arms].iter().position(|own| *own == arm) {
            let ScoredPrediction { user, label, probability } = of;
            self.tally.add(TalliedLabel { arm, user, surface, task, label }, probability);
        }
    }

    /// The verdict. Tasks that an arm did not predict are left out.
    ///
    /// # Errors
    /// Arms that predicted different rows.
    pub fn verdict(&self) -> Result<Verdict> {
        let slices = self.tally.slices()?;
        let all = self.schema.surfaces.len();
        let of_all = slices.iter().filter(|slice| slice.surface == all);
        let tasks = of_all.map(|slice| self.task(*slice, &slices)).collect();
        Ok(Verdict { tasks })
    }

    fn task(&self, slice: SurfaceTask, slices: &[SurfaceTask]) -> TaskVerdict {
        let totals_of = |slice| UserTotals::new(std::slice::from_ref(&self.tally), slice);
        let users = totals_of(slice);
        let totals = users.totals(None);
        let pairs = || PAIRS.iter().filter(|pair| pair.baseline < self.arms);
        let measure = |totals: &ScoreTotals| {
            pairs().map(|pair| totals.ne_diff_pct(0, pair.arm, pair.baseline)).collect()
        };
        let (values, bounds): (Vec<f64>, _) =
            (measure(&totals), intervals(&users, REPLICATES, measure));
        let differences = pairs().zip(values).zip(bounds).map(|((pair, pct), ci95)| {
            let [arm, baseline] = [pair.arm, pair.baseline].map(|arm| ARMS[arm].name());
            NeDifference { arm, baseline, pct, ci95 }
        });
        let mut worse_than_base = Vec::new();
        for own in slices.iter().filter(|own| own.task == slice.task) {
            let totals = totals_of(*own).totals(None);
            // Of a few labels, chance decides who is better.
            if totals.positives.min(totals.rows - totals.positives) < FEWEST_LABELS {
                continue;
            }
            let surfaces = &self.schema.surfaces;
            let surface = surfaces.get(own.surface).map_or(ALL, String::as_str);
            for arm in [1, 3] {
                if totals.nats[0][arm] >= totals.nats[0][0] {
                    worse_than_base.push(format!("{} on {surface}", ARMS[arm].name()));
                }
            }
        }
        let arms = ARMS[..self.arms].iter().enumerate();
        let mut verdict = TaskVerdict {
            task: self.schema.tasks[slice.task].name.clone(),
            rows: totals.rows as u64,
            positives: totals.positives as u64,
            arms: arms
                .map(|(at, arm)| ArmVerdict { arm: arm.name(), ne: totals.ne(0, at) })
                .collect(),
            differences: differences.collect(),
            worse_than_base,
            words: String::new(),
            advice: Vec::new(),
        };
        verdict.speak();
        verdict
    }
}

impl TaskVerdict {
    /// Says what the numbers mean, and what to try.
    fn speak(&mut self) {
        let (rows, positives) = (self.rows as f64, self.positives as f64);
        if positives.min(rows - positives) < FEWEST_LABELS {
            self.words = format!(
                "too few labels to tell: {positives} of {rows} rows of the test are positive"
            );
            self.advice.push("begin the test earlier (--test-from), or collect more".into());
            return;
        }
        let [fm, expert, over_fm, over_plain, over_boosting @ ..] = &self.differences[..] else {
            return;
        };
        let against = |difference: &NeDifference, whom: &str| {
            let word = if difference.is_better() {
                "better than"
            } else if difference.is_worse() {
                "WORSE than"
            } else {
                "level with"
            };
            format!("{word} {whom} ({})", difference.words())
        };
        let ne = |arm: usize| self.arms[arm].ne.map_or("-".into(), |ne| format!("{ne:.4}"));
        self.words = format!(
            "the FM (NE {}) is {}; the expert (NE {}) is {}, {} and {}",
            ne(1),
            against(fm, "the base rate"),
            ne(3),
            against(expert, "the base rate"),
            against(over_fm, "the FM's own head"),
            against(over_plain, "the same expert without TAE")
        );
        for over_boosting in over_boosting {
            let words = against(over_boosting, "boosting on counters");
            self.words += &format!("; the expert is {words}, whose NE is {}", ne(4));
        }
        let base = self.arms[0].ne.unwrap_or(1.0);
        let mut advice = Vec::new();
        if base > 1.02 {
            advice.push(
                "the rate of the test is not that of the past: run with --mode streaming, and see \
                 what `hypercast data check` says of drift",
            );
        }
        if !fm.is_better() {
            advice.push(
                "give the FM more steps (smaller fm.batch_requests), more past, or features and \
                 counters that say something of this task",
            );
        }
        if over_fm.is_worse() {
            advice.push(
                "the expert learns less than the FM knows: more of the log (smaller \
                 logs.skip_share), other expert_training.epochs and learning_rate, or serve the \
                 FM's ranking",
            );
        }
        if fm.is_better() && !over_plain.is_better() {
            advice.push(
                "the TAE brings the expert nothing here: try fm.tae_dim and fm.max_history, or a \
                 task in the FM that is closer to this one",
            );
        }
        self.advice = advice.into_iter().map(String::from).collect();
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for task in &self.tasks {
            let TaskVerdict { task, words, worse_than_base, advice, .. } = task;
            writeln!(f, "{task}: {words}")?;
            if !worse_than_base.is_empty() {
                writeln!(f, "  worse than the base rate: {}", worse_than_base.join(", "))?;
            }
            for advice in advice {
                writeln!(f, "  try: {advice}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_core::hash::mix64;
    use hypercast_data::simulate;

    /// A verdict on clicks of 500 users, where each arm predicts what `said` makes of the true
    /// chance and the arm's name.
    fn verdict(said: impl Fn(&str, f32) -> f32) -> TaskVerdict {
        let mut tally = VerdictTally::new(&Arc::new(simulate::schema(1)), true);
        for row in 0..5000_u64 {
            let chance = if mix64(row).is_multiple_of(2) { 0.1 } else { 0.5 };
            let label = (mix64(row ^ 0xABCD) % 1000) < (chance * 1000.0) as u64;
            for arm in ARMS {
                let probability = said(arm.name(), chance);
                tally.push(0, 0, arm, ScoredPrediction { user: row / 10, probability, label });
            }
        }
        tally.verdict().unwrap().tasks.remove(0)
    }

    #[test]
    fn what_is_better_or_worse_beyond_chance_is_said() {
        let good = verdict(|arm, chance| if arm == "base" { 0.3 } else { chance });
        assert!(good.words.contains("is better than the base rate"), "{}", good.words);
        assert!(good.words.contains("level with the FM's own head"), "{}", good.words);
        assert!(good.words.contains("level with boosting"), "{}", good.words);
        assert!(good.worse_than_base.is_empty() && good.differences[0].pct < -10.0);
        assert!(good.advice.iter().any(|advice| advice.contains("TAE brings")));
        let spoilt = verdict(|arm, chance| match arm {
            "expert+tae" => 1.0 - chance,
            "base" => 0.3,
            _ => chance,
        });
        assert!(spoilt.words.contains("is WORSE than the base rate"));
        assert_eq!(spoilt.worse_than_base, ["expert+tae on feed", "expert+tae on all"]);
        assert!(spoilt.advice.iter().any(|advice| advice.contains("serve the FM's")));
        let moved = verdict(|_, _| 0.02);
        assert!(moved.words.contains("is level with the base rate"), "{}", moved.words);
        assert!(moved.advice[0].contains("drift"), "{:?}", moved.advice);
    }
}
