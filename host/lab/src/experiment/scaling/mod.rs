//! The paper's title: how NE falls with training FLOPs, and whether the fall reaches experts.
//!
//! Models of several widths, depths and histories learn from one reading of the stream, with a
//! learning rate tuned for each width. At some shares of the data all are measured on the same
//! requests of the test, with fixed weights; from there they only predict. The law is fitted to the
//! envelope, what is best for its cost. In a simulated world E∞ is the NE of the true
//! probabilities on the same rows, so that their luck cancels; elsewhere it is fitted.

mod ladder;
mod law;
mod law_check;
mod passes;
mod plot;

use hypercast_config::Config;
use hypercast_core::text_table::TextTable;
use hypercast_data::schema::TaskRole;
use hypercast_train::{fm::dataset_spec, report::ALL};
use serde::Serialize;
use serde_json::{Value, json};

use self::{
    ladder::{LadderModel, ladder},
    law::{LargestModel, LawArms, LawFit},
    law_check::shortfalls,
    passes::{HeldOut, RateTrial, SHARES, ScalingPlan, TrainingCost, set_best_rates, train, tune},
};
use super::{
    ExperimentContext, ExperimentReport, ExperimentRow,
    report::{ArmPair, SliceTotals, with_interval},
    runner::ExperimentArm,
};
use crate::{error::Result, tally::ScoreTally};

const OPTIMUM: &str = "optimum";

/// What a law is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LawSubject {
    /// The FM's heads: the envelope of all models at all shares of the data.
    Fm,
    /// The FM's heads after all data: the sizes that grow in width.
    FmAllData,
    /// Experts that read the TAEs of these sizes, by the FLOPs of the FM.
    Expert,
}

/// A model, and NE at some point of its training.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScalingPoint {
    /// The model.
    pub model: String,
    /// The share of the training data.
    pub share: f64,
    /// Training FLOPs until then.
    pub flops: f64,
    /// Normalised entropy, the mean over seeds.
    pub ne: f64,
    /// Whether it is one of those that the law is fitted to.
    pub fitted: bool,
}

/// A law of one task.
#[derive(Debug, Clone, Serialize)]
pub struct ScalingLaw {
    /// The task.
    pub task: String,
    /// What it is of.
    pub of: LawSubject,
    /// Whether E∞ is the known optimum; else it is fitted.
    pub floor_is_known: bool,
    /// The law.
    #[serde(flatten)]
    pub law: LawFit,
    /// The number of models with a point on the lower envelope of all points.
    pub models_on_envelope: usize,
    /// The largest model, from the law of the others.
    pub largest: Option<LargestModel>,
    /// Whether it is a law: nothing is in `shortfalls`.
    pub is_seen: bool,
    /// What it lacks to be one, in words.
    pub shortfalls: Vec<String>,
    /// The points.
    pub points: Vec<ScalingPoint>,
}

/// Runs it for every seed. Learning rates are tuned with all of them, costs counted with the first.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    let spec = dataset_spec(context.dataset)?;
    let mut models = ladder(&context.config.fm);
    let history_len = models.iter().map(|model| model.fm.max_history).max().unwrap_or(1);
    let held_out = HeldOut::read(context, history_len)?;
    let trials = context.times.time("learning rates", || tune(context, &spec, &models))?;
    set_best_rates(&mut models, &trials);
    let plan = ScalingPlan { spec, models, held_out };

    let arms = arm_names(&plan);
    let expert_arms = expert_names(&plan);
    let (mut experts, mut costs) = (Vec::new(), None);
    let arms: Vec<&str> = arms.iter().map(String::as_str).collect();
    let tallies = context.tallies(&arms, |config, tally| {
        let of_seed = context.times.time("fm", || train(context, config, &plan, tally))?;
        costs.get_or_insert(of_seed);
        if plan.held_out.has_truth() {
            plan.held_out.tally_truth(context, arms.len() - 1, tally);
        }
        experts.push(measure_experts(context, config, &plan, &expert_arms)?);
        Ok(())
    })?;
    let costs = costs.expect("at least one seed");
    let result = ScalingResult { context, plan: &plan, tallies, experts, costs };
    result.report(&trials)
}

/// An arm for each model and share, and one for the truth.
fn arm_names(plan: &ScalingPlan) -> Vec<String> {
    let of_model = |model: &LadderModel| SHARES.map(|share| arm_of(model, share));
    let truth = plan.held_out.has_truth().then(|| OPTIMUM.to_owned());
    plan.models.iter().flat_map(of_model).chain(truth).collect()
}

fn arm_of(model: &LadderModel, share: f64) -> String {
    format!("{} at {share}", model.name)
}

fn expert_names(plan: &ScalingPlan) -> Vec<String> {
    let sizes = plan.series().map(|model| format!("expert of {}", model.name));
    let truth = plan.held_out.has_truth().then(|| OPTIMUM.to_owned());
    ["expert without TAE".into()].into_iter().chain(sizes).chain(truth).collect()
}

/// Trains and measures the experts of a seed: one without TAE, and one for each size.
fn measure_experts(
    context: &ExperimentContext<'_>,
    config: &Config,
    plan: &ScalingPlan,
    names: &[String],
) -> Result<ScoreTally> {
    let sizes = plan.series().count();
    let runners = (0..sizes).map(|fm| context.runner(config, fm)).collect::<Result<Vec<_>>>()?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut tally = ScoreTally::new(&context.labels, context.window.report_from_ms, &names);
    for index in 0..=sizes {
        let runner = &runners[index.max(1) - 1];
        let embedding = 0..config.fm.tae_width();
        let without_tae = index == 0;
        let arm = ExperimentArm { index, embedding, without_tae, with_fm_logits: false };
        runner.run(&arm, &runner.surfaces(), &mut tally)?;
    }
    if plan.held_out.has_truth() {
        for logged in runners[0].log.iter() {
            passes::tally_truth(&[logged?.example], context, sizes + 1, &mut tally);
        }
    }
    Ok(tally)
}

/// What all seeds gave.
struct ScalingResult<'a> {
    context: &'a ExperimentContext<'a>,
    plan: &'a ScalingPlan,
    tallies: Vec<ScoreTally>,
    experts: Vec<ScoreTally>,
    costs: Vec<TrainingCost>,
}

impl ScalingResult<'_> {
    fn report(&self, trials: &[RateTrial]) -> Result<ExperimentReport> {
        let last = SHARES.len() - 1;
        let after_all_data = |model: usize| model * SHARES.len() + last;
        let baseline = after_all_data(0);
        let arms = (0..self.plan.models.len()).map(after_all_data);
        let pairs: Vec<ArmPair> = arms.map(|arm| ArmPair { baseline, arm }).collect();
        let (mut rows, mut laws) = (Vec::new(), Vec::new());
        for cell in SliceTotals::all(&self.tallies)? {
            rows.extend(self.context.rows_of(&cell, &pairs));
            laws.extend(self.fm_laws(&cell));
        }
        let sizes = self.plan.series().count();
        let pairs: Vec<ArmPair> = (0..=sizes).map(|arm| ArmPair { baseline: 0, arm }).collect();
        for cell in SliceTotals::all(&self.experts)? {
            rows.extend(self.context.rows_of(&cell, &pairs));
            laws.extend(self.expert_law(&cell));
        }
        let held_out = self.plan.held_out.requests();
        let chosen =
            json!({ "shares": SHARES, "rate_trials": trials, "held_out_requests": held_out });
        let table = self.table(&rows, &laws);
        let plot = plot::svg(&laws);
        let report = self.context.report(table, rows, self.models(), chosen);
        Ok(ExperimentReport { laws, plot: Some(plot), ..report })
    }

    /// The task of a slice over all surfaces, if it is one that all surfaces share.
    fn main_task(&self, cell: &SliceTotals) -> Option<String> {
        let schema = &self.context.dataset.schema;
        let task = &schema.tasks[cell.slice.task];
        let is_all = cell.slice.surface == schema.surfaces.len();
        (is_all && task.role == TaskRole::Main).then(|| task.name.clone())
    }

    fn fm_laws(&self, cell: &SliceTotals) -> Vec<ScalingLaw> {
        let Some(task) = self.main_task(cell) else { return Vec::new() };
        let shares = SHARES.len();
        let optimum = (cell.arms.last().is_some_and(|arm| arm == OPTIMUM))
            .then(|| self.plan.models.len() * shares);
        let of = |arms: Vec<usize>, envelope_only| LawArms {
            dense: &cell.dense,
            flops: arms.iter().map(|arm| self.costs[arm / shares].flops[arm % shares]).collect(),
            arms,
            optimum,
            envelope_only,
        };
        let all = of((0..self.plan.models.len() * shares).collect(), true);
        let series = of((1..=self.sizes()).map(|size| size * shares - 1).collect(), false);
        vec![self.law(&task, LawSubject::Fm, &all), self.law(&task, LawSubject::FmAllData, &series)]
    }

    fn expert_law(&self, cell: &SliceTotals) -> Option<ScalingLaw> {
        let task = self.main_task(cell)?;
        let sizes = self.sizes();
        let flops = self.costs[..sizes].iter().map(|cost| cost.flops[SHARES.len() - 1]);
        let arms = LawArms {
            dense: &cell.dense,
            flops: flops.collect(),
            arms: (1..=sizes).collect(),
            optimum: self.plan.held_out.has_truth().then_some(sizes + 1),
            envelope_only: false,
        };
        Some(self.law(&task, LawSubject::Expert, &arms))
    }

    fn law(&self, task: &str, of: LawSubject, arms: &LawArms<'_>) -> ScalingLaw {
        let replicates = self.context.options.replicates;
        let law = self.context.times.time("bootstrap", || arms.fit(replicates));
        let shares = SHARES.len();
        let model_of = |arm: usize| if of == LawSubject::Expert { arm - 1 } else { arm / shares };
        let point = |place: usize| {
            let arm = arms.arms[place];
            let share = if of == LawSubject::Expert { shares - 1 } else { arm % shares };
            ScalingPoint {
                model: self.plan.models[model_of(arm)].name.clone(),
                share: SHARES[share],
                flops: arms.flops[place],
                ne: law.ne[place],
                fitted: law.fitted.contains(&place),
            }
        };
        let points: Vec<ScalingPoint> = (0..arms.arms.len()).map(point).collect();
        let on_it = law.on_envelope.iter().map(|&place| points[place].model.as_str());
        let models = distinct(on_it);
        let largest = arms.predict_largest(model_of, replicates);
        let shortfalls = shortfalls(&law, models, largest.as_ref());
        ScalingLaw {
            task: task.to_owned(),
            of,
            floor_is_known: arms.optimum.is_some(),
            law,
            models_on_envelope: models,
            largest,
            is_seen: shortfalls.is_empty(),
            shortfalls,
            points,
        }
    }

    /// The number of sizes in the series, which come first.
    fn sizes(&self) -> usize {
        self.plan.series().count()
    }

    fn models(&self) -> Vec<Value> {
        let of = |(model, cost): (&LadderModel, &TrainingCost)| {
            let mut size = model.size();
            size["training_flops"] = json!(cost.flops);
            size["training_seconds"] = json!(cost.seconds);
            size
        };
        self.plan.models.iter().zip(&self.costs).map(of).collect()
    }

    fn table(&self, rows: &[ExperimentRow], laws: &[ScalingLaw]) -> String {
        let of_fm = laws.iter().filter(|law| law.of == LawSubject::Fm);
        let tasks: Vec<&str> = of_fm.map(|law| law.task.as_str()).collect();
        let heads = tasks.iter().flat_map(|task| [format!("NE {task}"), "diff (%)".into()]);
        let first = ["all surfaces", "training FLOPs"].map(String::from);
        let mut table = TextTable::new(1, first.into_iter().chain(heads));
        let mut line = |name: &str, flops: Option<f64>, arm: &str| {
            let is_own =
                |row: &&ExperimentRow| row.surface == ALL && row.arm == arm && row.seed == "mean";
            let of_task = |task: &&str| {
                let row = rows.iter().filter(is_own).find(|row| row.task == **task);
                let ne = row.and_then(|row| row.ne).map_or("-".into(), |ne| format!("{ne:.4}"));
                let diff = row.and_then(|row| row.ne_diff_pct);
                [ne, with_interval(diff, row.and_then(|row| row.ci95))]
            };
            let cost = flops.map_or("-".into(), |flops| format!("{flops:.2e}"));
            table.line([name.to_owned(), cost].into_iter().chain(tasks.iter().flat_map(of_task)));
        };
        for (model, cost) in self.plan.models.iter().zip(&self.costs) {
            let arm = &arm_of(model, SHARES[SHARES.len() - 1]);
            line(&model.name, cost.flops.last().copied(), arm);
        }
        for name in expert_names(self.plan).iter().filter(|name| *name != OPTIMUM) {
            line(name, None, name);
        }
        laws.iter().fold(format!("{table}\n"), |text, law| text + &format!("{law}\n"))
    }
}

impl std::fmt::Display for ScalingLaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = match self.of {
            LawSubject::Fm => "FM",
            LawSubject::FmAllData => "FM, all data",
            LawSubject::Expert => "expert, by the FM's FLOPs",
        };
        write!(f, "{}, {of}: ", self.task)?;
        let Some(fit) = self.law.fit else {
            return write!(f, "no law can be seen, as {}", self.shortfalls.join("; "));
        };
        let [low, high] = self.law.exponent_ci95.unwrap_or([f64::NAN; 2]);
        if !self.is_seen {
            writeln!(f, "no law can be seen, as {}:", self.shortfalls.join("; "))?;
        }
        let known = if self.floor_is_known { "the optimum" } else { "fitted" };
        write!(
            f,
            "NE = {:.4} ({known}) + {:.4} (C / {:.2e})^-b, b = {:.3} [{low:.3}, {high:.3}]; \
             {} of {} models on the envelope",
            fit.floor,
            fit.scale,
            fit.reference_flops,
            fit.exponent,
            self.models_on_envelope,
            distinct(self.points.iter().map(|point| point.model.as_str())),
        )?;
        if let Some(largest) = &self.largest {
            let LargestModel { predicted_ne, measured_ne, difference_pct, .. } = *largest;
            let difference = with_interval(Some(difference_pct), largest.difference_ci95);
            write!(
                f,
                "; the largest from the others: {predicted_ne:.4}, measured {measured_ne:.4}, \
                 {difference} %"
            )?;
        }
        Ok(())
    }
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    names.collect::<std::collections::BTreeSet<_>>().len()
}
