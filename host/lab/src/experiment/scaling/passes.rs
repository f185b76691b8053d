//! The passes over the stream: one that tunes learning rates, and one in which all models learn.

use std::time::Instant;

use hypercast_config::Config;
use hypercast_data::schema::CoreColumns;
use hypercast_fm::{
    cost::{TokenCounts, flops},
    example::Example,
    inference::FmOutput,
    metrics::log_loss,
    spec::{FmConfig, FmSpec, TaskLabel},
    trainer::{FmTrainer, StepOutput},
};
use serde::Serialize;

use super::ladder::{LadderModel, trials};
use crate::{
    error::Result,
    evaluate::stream::{StreamBatch, replay, targets},
    experiment::{ExperimentContext, runner::add_target, transfer::FmHeads},
    tally::ScoreTally,
};

/// The shares of the training data after which all models are measured.
pub const SHARES: [f64; 4] = [0.125, 0.25, 0.5, 1.0];

/// The share of the training data that learning rates are tuned on.
const TUNED_SHARE: f64 = 0.2;

/// A training step costs a forward pass and twice as much for the gradients.
const PASSES_PER_STEP: f64 = 3.0;

/// The most requests that models are measured on, kept in memory: some 10 KB each.
const HELD_OUT: usize = 8192;

/// The models, and what they learn and are measured on.
pub struct ScalingPlan {
    /// The shape of the data.
    pub spec: FmSpec,
    /// Those of the series come first.
    pub models: Vec<LadderModel>,
    /// What they are measured on.
    pub held_out: HeldOut,
}

impl ScalingPlan {
    /// The sizes that grow in width.
    pub fn series(&self) -> impl Iterator<Item = &LadderModel> {
        self.models.iter().filter(|model| model.in_series)
    }
}

/// Requests of the test, the same for every model and share.
pub struct HeldOut {
    examples: Vec<Example>,
    core: CoreColumns,
}

impl HeldOut {
    /// Takes every nth request of the test, with `history_len` events of history.
    pub fn read(context: &ExperimentContext<'_>, history_len: usize) -> Result<Self> {
        let from_ms = context.window.report_from_ms;
        let in_test = |example: &Example| {
            example.time_ms >= from_ms && context.users.contains(example.user.id)
        };
        let requests =
            |until_ms| context.dataset.requests(until_ms, |user| context.users.contains(user));
        let all = requests(None)?.saturating_sub(requests(Some(from_ms))?) as usize;
        let mut examples = Vec::with_capacity(all.min(HELD_OUT));
        let every = all.div_ceil(HELD_OUT).max(1);
        let mut seen = 0usize;
        for example in replay(context.dataset, context.config, history_len)? {
            let example = example?;
            if !in_test(&example) {
                continue;
            }
            if seen.is_multiple_of(every) {
                examples.push(example);
            }
            seen += 1;
        }
        Ok(Self { examples, core: CoreColumns::for_trainer(&context.dataset.schema) })
    }

    /// Tallies what a model predicts now.
    fn measure(
        &self,
        trainer: &mut dyn FmTrainer,
        heads: &FmHeads,
        arm: usize,
        tally: &mut ScoreTally,
    ) -> Result<()> {
        for examples in self.examples.chunks(64) {
            let part = StreamBatch {
                examples,
                core: &self.core,
                history_only: false,
                may_learn: false,
                repeats: false,
                seen: 0,
            };
            let output = part.through(trainer, &|_| true)?;
            heads.tally(&part, arm, &output.predictions, tally);
        }
        Ok(())
    }

    /// Tallies the true probabilities of these requests as an arm.
    pub fn tally_truth(&self, context: &ExperimentContext<'_>, arm: usize, tally: &mut ScoreTally) {
        tally_truth(&self.examples, context, arm, tally);
    }

    /// The number of requests.
    pub fn requests(&self) -> usize {
        self.examples.len()
    }

    /// Whether the true probabilities are known.
    pub fn has_truth(&self) -> bool {
        targets(&self.examples).all(|of| !of.example.targets[of.row].truth.is_empty())
    }
}

/// Tallies the true probabilities of a simulated world as an arm.
pub fn tally_truth(
    examples: &[Example],
    context: &ExperimentContext<'_>,
    arm: usize,
    tally: &mut ScoreTally,
) {
    for target in targets(examples) {
        for task in context.labels.tasks() {
            if let Some(&truth) = target.example.targets[target.row].truth.get(task) {
                add_target(tally, arm, target, task, truth);
            }
        }
    }
}

/// How a learning rate did.
#[derive(Debug, Clone, Serialize)]
pub struct RateTrial {
    /// The model's name on the ladder, such as `d16 l2 h32`.
    pub model: String,
    /// Its width, which says what other models take the rate.
    pub dim: usize,
    /// The peak learning rate of the dense weights (AdamW).
    pub learning_rate: f64,
    /// Log loss over the second half of the pass and all seeds, each row before it was learned.
    pub log_loss: f64,
}

/// Tries learning rates on the first part of the stream, with every seed: rates differ by less than
/// seeds do.
pub fn tune(
    context: &ExperimentContext<'_>,
    spec: &FmSpec,
    models: &[LadderModel],
) -> Result<Vec<RateTrial>> {
    let tried = trials(models);
    let mut sums = vec![RowLosses::default(); tried.len()];
    for &seed in &context.options.seeds.0 {
        try_rates(context, seed, spec, &tried, &mut sums)?;
    }
    let trial = |(model, sums): (&LadderModel, &RowLosses)| RateTrial {
        model: model.name.clone(),
        dim: model.fm.dim,
        learning_rate: model.fm.learning_rate,
        log_loss: sums.mean(),
    };
    Ok(tried.iter().zip(&sums).map(trial).collect())
}

/// Adds the losses of one seed.
fn try_rates(
    context: &ExperimentContext<'_>,
    seed: u64,
    spec: &FmSpec,
    tried: &[LadderModel],
    sums: &mut [RowLosses],
) -> Result<()> {
    let config = context.config;
    let create = |(at, model): (usize, &LadderModel)| {
        let fm = FmConfig { seed, ..model.fm.clone() };
        context.fm(config, &format!("trial-{at}"), &fm, spec)
    };
    let mut trainers = tried.iter().enumerate().map(create).collect::<Result<Vec<_>>>()?;
    let history_len = tried.iter().map(|model| model.fm.max_history).max().unwrap_or(1);
    let requests = (training_requests(context)? as f64 * TUNED_SHARE) as usize;
    let stream = context.stream(config, history_len);
    let first = replay(context.dataset, config, history_len)?.filter(|example| {
        example.as_ref().map_or(true, |example| context.users.contains(example.user.id))
    });
    let core = &CoreColumns::for_trainer(&context.dataset.schema);
    let mut seen = 0;
    stream.in_batches(first.take(requests), |examples| {
        let (history_only, may_learn, repeats) = (false, true, false);
        let part = StreamBatch { examples, core, history_only, may_learn, repeats, seen };
        for (trainer, sums) in trainers.iter_mut().zip(sums.iter_mut()) {
            let output = part.through(trainer.as_mut(), &|_| true)?;
            if seen >= requests / 2 {
                sums.add(&output, spec);
            }
        }
        seen += examples.len();
        Ok(())
    })?;
    Ok(())
}

/// Gives each model the best learning rate of its width.
pub fn set_best_rates(models: &mut [LadderModel], trials: &[RateTrial]) {
    for model in models {
        let of_width = trials.iter().filter(|trial| trial.dim == model.fm.dim);
        if let Some(best) = of_width.min_by(|a, b| a.log_loss.total_cmp(&b.log_loss)) {
            model.fm.learning_rate = best.learning_rate;
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct RowLosses {
    nats: f64,
    rows: u64,
}

impl RowLosses {
    /// Infinite without rows: so is a model whose numbers are.
    fn mean(&self) -> f64 {
        if self.rows == 0 { f64::INFINITY } else { self.nats / self.rows as f64 }
    }

    fn add(&mut self, output: &StepOutput, spec: &FmSpec) {
        let tasks = spec.tasks.iter().cycle();
        let cells = output.predictions.iter().zip(&output.labels).zip(&output.mask).zip(tasks);
        for (((&prediction, &label), &counts), task) in cells {
            let is_binary = matches!(task.label, TaskLabel::Action(_));
            if counts && is_binary && !prediction.is_nan() {
                self.nats += log_loss(prediction, label == 1.0);
                self.rows += 1;
            }
        }
    }
}

/// What a model's training took.
#[derive(Debug, Clone, Default)]
pub struct TrainingCost {
    /// FLOPs until each of [`SHARES`].
    pub flops: Vec<f64>,
    /// Seconds of all steps.
    pub seconds: f64,
    /// Training FLOPs of all steps so far, forward and backward.
    total: f64,
}

/// Trains all models over one stream, tallies their predictions of the held-out requests at each
/// share, and logs the TAEs of those of the series, each as an FM of its own.
pub fn train(
    context: &ExperimentContext<'_>,
    config: &Config,
    plan: &ScalingPlan,
    tally: &mut ScoreTally,
) -> Result<Vec<TrainingCost>> {
    let ScalingPlan { spec, models, held_out } = plan;
    let create = |model: &LadderModel| {
        let fm = FmConfig { seed: config.fm.seed, ..model.fm.clone() };
        context.fm(config, &model.name.replace(' ', "-"), &fm, spec)
    };
    let mut trainers = models.iter().map(create).collect::<Result<Vec<_>>>()?;
    let mut costs = vec![TrainingCost::default(); models.len()];
    let heads = FmHeads::new(&spec.tasks, context);
    let history_len = models.iter().map(|model| model.fm.max_history).max().unwrap_or(1);
    let requests = training_requests(context)? as f64;
    let width = config.fm.tae_width();
    let widths = vec![width; plan.series().count()];
    let stream = context.stream(config, history_len);
    let mut shares = SHARES.iter().enumerate().peekable();
    stream.log("all models", &widths, None, |part, is_logged| {
        // The last share is all that comes before the test.
        let is_due = |&(_, &share): &(usize, &f64)| {
            !part.history_only
                && (!part.may_learn || share < 1.0 && part.seen as f64 >= share * requests)
        };
        while let Some((place, _)) = shares.next_if(is_due) {
            for (at, (trainer, cost)) in trainers.iter_mut().zip(&mut costs).enumerate() {
                let arm = at * SHARES.len() + place;
                held_out.measure(trainer.as_mut(), &heads, arm, tally)?;
                cost.flops.push(cost.total);
            }
        }
        let mut logged = Vec::new();
        for ((trainer, cost), model) in trainers.iter_mut().zip(&mut costs).zip(models) {
            if !part.may_learn && !model.in_series {
                continue;
            }
            let start = Instant::now();
            let output = part.through(trainer.as_mut(), &|_| true)?;
            if part.may_learn {
                cost.seconds += start.elapsed().as_secs_f64();
                cost.total += step_flops(&model.fm, spec, part.examples);
            }
            if is_logged && model.in_series {
                logged.push(FmOutput { tae: output.tae, ..FmOutput::default() });
            }
        }
        Ok(logged)
    })?;
    Ok(costs)
}

/// Floating-point operations of a training step.
fn step_flops(fm: &FmConfig, spec: &FmSpec, examples: &[Example]) -> f64 {
    let forward = |example: &Example| {
        let tokens = TokenCounts { history: example.history.len(), targets: example.targets.len() };
        flops(fm, spec, tokens)
    };
    PASSES_PER_STEP * examples.iter().map(forward).sum::<f64>()
}

/// The requests before the test.
fn training_requests(context: &ExperimentContext<'_>) -> Result<u64> {
    let until_ms = Some(context.window.test_from_ms);
    Ok(context.dataset.requests(until_ms, |user| context.users.contains(user))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::scaling::ladder::ladder;

    #[test]
    fn the_best_rate_is_the_one_with_the_least_loss() {
        let base = FmConfig { dim: 48, ..FmConfig::default() };
        let mut models = ladder(&base);
        let trial = |at: usize, factor, log_loss| {
            let LadderModel { name: model, fm, .. } = models[at].clone();
            let learning_rate = factor * fm.learning_rate;
            RateTrial { model, dim: fm.dim, learning_rate, log_loss }
        };
        let trials = [
            trial(0, 1.0, 0.6),
            trial(0, 2.0, 0.5),
            trial(2, 0.5, 0.4),
            trial(2, 1.0, 0.5),
            trial(4, 1.0, f64::INFINITY),
            trial(4, 2.0, 0.3),
        ];
        set_best_rates(&mut models, &trials);
        let rate = |at: usize| models[at].fm.learning_rate / base.learning_rate;
        assert_eq!([0, 1, 2, 4].map(rate), [2.0, 1.0, 0.5, 2.0], "1 was not tried");
        let others = (0..models.len()).filter(|&at| !models[at].in_series);
        assert_eq!(others.map(rate).collect::<Vec<_>>(), [0.5; 4], "they have the middle's width");
    }
}
