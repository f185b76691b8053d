//! The training loop over one chunk at a time: hooks, shuffling, batches of whole requests, a
//! prediction and a step for each.

use std::collections::BTreeMap;
use std::sync::Arc;

use hypercast_fm::example::Example;
use hypercast_fm::harm::{self, HARMFUL};
use hypercast_fm::label_scale::{LabelScale, LabelScales, LearnedRow};
use hypercast_fm::training_only::ReadFor;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use super::chunk::{Chunk, FmNeeds};
use super::evaluation_sample::{EvaluationSample, ScoredRows};
use super::hooks::{Hooks, RefusedRequest, Schedule, TrainingRequest};
use super::loss::{StepOutputs, TaskTargets, all_losses};
use super::measure::PredictedRows;
use super::optimizer::{ExpertOptimizer, MovingAverage, OptimizerConfig};
use super::step::{Compute, Gradients, compute};
use crate::batch::{ExpertBatch, TaskOutcomes};
use crate::fm_rows::{FmRows, Tae};
use crate::params::{Parameters, Provenance};
use crate::wasm::contract::{TaskKind, TrainingStep};
use crate::{Blueprint, Device, Error, ExpertPredictions};

/// How an expert is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerConfig {
    /// Learning rates and their schedule.
    pub optimizer: OptimizerConfig,
    /// The number of rows a step. A request is never split.
    pub batch_rows: usize,
    /// The number of rows a call of the plugin's `labels` and `sample`.
    pub hook_rows: usize,
    /// Whether the requests of a chunk are shuffled. Progressive metrics need the order of time.
    pub shuffle: bool,
    /// Whether each batch is predicted, without dropout, before the trainer learns from it.
    pub progressive: bool,
    /// Whether an earlier pass has learned from the same rows. Predictions for them say nothing of
    /// how far those for new ones differ too much.
    pub repeats: bool,
    /// Replaces the TAE and the FM's predictions by zeros, for the ablation "expert without TAE".
    pub without_tae: bool,
    /// The decay of the moving average of dense parameters, which is used for predictions and saved
    /// in their place; 0 for no average.
    pub average_decay: f32,
    /// The seed of sampling, shuffling and dropout.
    pub seed: u64,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        TrainerConfig {
            optimizer: OptimizerConfig::default(),
            batch_rows: 512,
            hook_rows: 4096,
            shuffle: true,
            progressive: false,
            repeats: false,
            without_tae: false,
            average_decay: 0.0,
            seed: 1,
        }
    }
}

/// The results of one batch.
#[derive(Debug)]
pub struct BatchReport<'a> {
    /// The batch's requests. Its rows are their targets, in order.
    pub examples: &'a [&'a Example],
    /// For each task `[rows]`, the probabilities or values before the step. Empty unless
    /// `progressive`.
    pub predictions: Vec<Vec<f32>>,
    /// The predictions by the parameters of [`ExpertTrainer::compare_with`]. Empty if these have
    /// learned from all rows.
    pub serving: Vec<Vec<f32>>,
    /// For each task, labels, sample space and weights of all rows, those that `sample` drops
    /// included. Rows of requests that were set aside are in no sample space.
    pub targets: &'a [TaskTargets],
    /// For each task, the loss, with dropout, of the rows that the step learned from.
    pub losses: Vec<f64>,
    /// Whether the step was taken: all requests may be set aside, or `sample` may keep no row.
    pub stepped: bool,
}

/// Parameters that serve at present, to be compared with those in training.
#[derive(Debug, Clone)]
pub struct ServingParameters {
    /// Parameters of the same network.
    pub parameters: Parameters,
    /// In milliseconds since 1970. They have learned from requests up to this time, so these are
    /// not predicted.
    pub learned_until_ms: i64,
}

/// Trains the parameters of one expert.
pub struct ExpertTrainer {
    pub(super) blueprint: Arc<Blueprint>,
    compute: Box<dyn Compute>,
    pub(super) parameters: Parameters,
    pub(super) average: Option<MovingAverage>,
    pub(super) optimizer: ExpertOptimizer,
    /// For the plugin's `evaluate-rows`.
    pub(crate) sample: EvaluationSample,
    schedule: Schedule,
    pub(super) serving: Option<ServingParameters>,
    config: TrainerConfig,
    /// A moving average of the steps' losses, which says what is usual; 0 before the first step.
    mean_loss: f64,
    /// The number of chunks learned from. With the seed it gives the random state of the next
    /// chunk, so that a resumed training equals an uninterrupted one.
    pub(super) chunks: u64,
    rng: SmallRng,
}

impl ExpertTrainer {
    /// Trains `parameters` of the blueprint's network.
    pub fn new(
        blueprint: Arc<Blueprint>,
        parameters: Parameters,
        config: TrainerConfig,
        device: Device,
    ) -> Result<ExpertTrainer, Error> {
        Ok(ExpertTrainer {
            compute: compute(blueprint.graph.clone(), device)?,
            optimizer: ExpertOptimizer::new(&blueprint.graph, config.optimizer.clone()),
            schedule: Schedule::default(),
            sample: EvaluationSample::default(),
            serving: None,
            mean_loss: 0.0,
            chunks: 0,
            rng: SmallRng::seed_from_u64(config.seed),
            average: (config.average_decay > 0.0)
                .then(|| MovingAverage::new(&blueprint.graph, &parameters, config.average_decay)),
            blueprint,
            parameters,
            config,
        })
    }

    /// Makes progressive predictions with serving parameters, too.
    pub fn compare_with(&mut self, serving: ServingParameters) {
        self.serving = Some(serving);
    }

    /// The number of failed calls of the plugin's `schedule`.
    pub fn schedule_faults(&self) -> u64 {
        self.schedule.faults
    }

    /// The last fault of the plugin's `schedule`.
    pub fn last_schedule_fault(&self) -> Option<&str> {
        self.schedule.last.as_deref()
    }

    /// The parameters so far, averaged if the configuration says so.
    pub fn parameters(&self) -> &Parameters {
        self.average.as_ref().map_or(&self.parameters, |average| &average.parameters)
    }

    /// Returns the parameters without a copy.
    pub fn into_parameters(self) -> Parameters {
        self.average.map_or(self.parameters, |average| average.parameters)
    }

    /// The usual loss of a step, by which harmful requests are told; 0 before the first step. It is
    /// no part of [`ExpertTrainer::saved`].
    pub fn mean_loss(&self) -> f64 {
        self.mean_loss
    }

    /// Continues with the usual loss of an earlier trainer.
    pub fn set_mean_loss(&mut self, mean_loss: f64) {
        self.mean_loss = mean_loss;
    }

    /// Turns shuffling and progressive predictions on or off for the next pass.
    pub fn set_pass(&mut self, shuffle: bool, progressive: bool) {
        self.config.shuffle = shuffle;
        self.config.progressive = progressive;
    }

    /// Says whether an earlier pass has learned from the rows of the next one.
    pub fn set_repeats(&mut self, repeats: bool) {
        self.config.repeats = repeats;
    }

    /// Changes the number of rows a step.
    pub fn set_batch_rows(&mut self, rows: usize) {
        self.config.batch_rows = rows;
    }

    /// Continues at constant learning rates, for training on a stream. The optimiser's state is
    /// kept.
    pub fn hold_rates(&mut self, learning_rate: f32, table_learning_rate: f32) {
        self.optimizer.hold(learning_rate, table_learning_rate);
    }

    /// Learns from a chunk, within which requests are shuffled. `report` is called for every batch.
    /// Returns the requests that were set aside, in the chunk's order: those for which the plugin
    /// faults, and those that would harm the parameters ([`hypercast_fm::harm`]). Others are
    /// learned from as if these had not come.
    ///
    /// # Errors
    /// TAEs that do not fit, or a plugin that faults for all requests.
    pub fn train(
        &mut self,
        chunk: Chunk,
        mut report: impl FnMut(&BatchReport),
    ) -> Result<Vec<RefusedRequest>, Error> {
        let mut requests = self.requests(chunk)?;
        let mut refused = Vec::new();
        let hooks = Hooks::new(&self.blueprint, self.config.hook_rows);
        let all = hooks.labels(&requests, &mut refused)?;
        requests.retain(|request| refused.iter().all(|own| own.index != request.index));
        self.rng = SmallRng::seed_from_u64(
            self.config.seed ^ self.chunks.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        self.chunks += 1;
        let kept = hooks.sample(&mut requests, &all, &mut self.rng, &mut refused)?;
        if !self.config.progressive {
            requests.retain(|request| request.kept);
        }
        if self.config.shuffle {
            requests.shuffle(&mut self.rng);
        }
        let mut rest = requests.as_slice();
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(self.batch_len(rest));
            let harmful = self.step(batch, &all, &kept, &mut report);
            refused.extend(
                harmful.into_iter().map(|at| RefusedRequest {
                    index: batch[at].index,
                    reason: HARMFUL.to_owned(),
                }),
            );
            rest = after;
        }
        refused.sort_by_key(|own| own.index);
        Ok(refused)
    }

    /// The number of requests in the next step: those with `batch_rows` rows to learn from, and
    /// among them requests that are only predicted, up to four times as many rows in all.
    pub(super) fn batch_len(&self, requests: &[TrainingRequest]) -> usize {
        let (mut kept, mut all) = (0, 0);
        let fits = |request: &&TrainingRequest| {
            let rows = request.example.targets.len();
            all += rows;
            kept += if request.kept { rows } else { 0 };
            kept <= self.config.batch_rows && all <= 4 * self.config.batch_rows
        };
        requests.iter().take_while(fits).count().max(1)
    }

    /// The predictions `[rows]` of each task for a chunk's targets, as serving would make them.
    pub fn predict(&self, chunk: Chunk) -> Result<Vec<Vec<f32>>, Error> {
        self.predict_with(self.parameters(), chunk)
    }

    /// Like `predict`, with the ranking scores.
    pub fn predict_scored(&self, chunk: Chunk) -> Result<ExpertPredictions, Error> {
        self.predictions(self.parameters(), chunk)
    }

    /// Like `predict`, with other parameters of the network.
    pub fn predict_with(
        &self,
        parameters: &Parameters,
        chunk: Chunk,
    ) -> Result<Vec<Vec<f32>>, Error> {
        Ok(by_task(self.predictions(parameters, chunk)?))
    }

    fn predictions(
        &self,
        parameters: &Parameters,
        chunk: Chunk,
    ) -> Result<ExpertPredictions, Error> {
        let requests = self.requests(chunk)?;
        let mut predictions = self.predicted_of(parameters, &[]);
        let mut rest = requests.as_slice();
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(self.batch_len(rest));
            let ExpertPredictions { tasks, scores } = self.forward(parameters, batch);
            let all = predictions.tasks.iter_mut().chain(&mut predictions.scores);
            for (all, part) in all.zip(tasks.into_iter().chain(scores)) {
                all.values.extend(part.values);
            }
            rest = after;
        }
        Ok(predictions)
    }

    /// The plugin's labels of all targets of a chunk, for each task. Rows for which it faults are
    /// in no sample space.
    pub fn targets(&self, chunk: Chunk) -> Result<Vec<TaskTargets>, Error> {
        let hooks = Hooks::new(&self.blueprint, self.config.hook_rows);
        hooks.labels(&self.requests(chunk)?, &mut Vec::new())
    }

    pub(super) fn forward(
        &self,
        parameters: &Parameters,
        requests: &[TrainingRequest],
    ) -> ExpertPredictions {
        let batch = self.batch(requests, &parameters.provenance, ReadFor::Prediction);
        self.predicted_of(parameters, &self.compute.forward(parameters, &batch))
    }

    /// The predictions of what the network computed of some rows.
    fn predicted_of(&self, parameters: &Parameters, outputs: &[f32]) -> ExpertPredictions {
        let Blueprint { graph, description, .. } = &*self.blueprint;
        ExpertPredictions::new(graph, &description.tasks, &parameters.provenance.labels, outputs)
    }

    pub(super) fn requests<'a>(&self, chunk: Chunk<'a>) -> Result<Vec<TrainingRequest<'a>>, Error> {
        let Blueprint { description, columns, .. } = &*self.blueprint;
        let reads_logits = columns.reads_fm_logits() && !self.config.without_tae;
        chunk.requests(FmNeeds {
            name: &description.name,
            tae_dim: if self.uses_tae() { columns.tae_dim() } else { 0 },
            tasks: if reads_logits { columns.fm_tasks() } else { 0 },
        })
    }

    fn uses_tae(&self) -> bool {
        self.blueprint.columns.reads_tae() && !self.config.without_tae
    }

    fn batch(
        &self,
        requests: &[TrainingRequest],
        scales: &Provenance,
        reader: ReadFor,
    ) -> ExpertBatch {
        let examples = examples(requests);
        let tae: Vec<f32> = requests.iter().flat_map(|request| request.tae).copied().collect();
        let tae = if self.uses_tae() { Tae::Rows(&tae) } else { Tae::Without };
        let predictions: Vec<f32> =
            requests.iter().flat_map(|request| request.predictions).copied().collect();
        let fm = FmRows { tae, predictions: &predictions };
        match reader {
            ReadFor::Learning => self.blueprint.columns.training_batch(&examples, fm, scales),
            _ => self.blueprint.columns.batch(&examples, fm, scales),
        }
    }

    /// Predicts the requests if training is progressive, and learns from those that are kept. The
    /// chunk's labels are `all` for metrics; in `kept`, rows not to learn from are masked. Returns
    /// the requests that would harm the parameters, by their place in the batch.
    fn step(
        &mut self,
        requests: &[TrainingRequest],
        all: &[TaskTargets],
        kept: &[TaskTargets],
        report: &mut impl FnMut(&BatchReport),
    ) -> Vec<usize> {
        let examples = examples(requests);
        let mut targets = gathered(all, requests);
        let PredictedRows { predictions, serving } = match self.config.progressive {
            true => self.predicted(requests),
            false => PredictedRows::default(),
        };
        let learned: Vec<TrainingRequest> =
            requests.iter().filter(|request| request.kept).copied().collect();
        let Learned { losses, stepped, harmful } = self.learn(&learned, kept);
        let harmful: Vec<usize> =
            (0..requests.len()).filter(|&at| harmful.contains(&requests[at].index)).collect();
        let mut row = 0;
        for (at, example) in examples.iter().enumerate() {
            let rows = row..row + example.targets.len();
            row = rows.end;
            if harmful.contains(&at) {
                targets.iter_mut().for_each(|task| task.mask[rows.clone()].fill(false));
            }
        }
        let scored = ScoredRows { candidate: &predictions, serving: &serving, targets: &targets };
        self.sample_requests(requests, scored);
        report(&BatchReport {
            examples: &examples,
            predictions,
            serving,
            targets: &targets,
            losses,
            stepped,
        });
        harmful
    }

    /// Takes a step with the requests that do no harm.
    fn learn(&mut self, requests: &[TrainingRequest], labels: &[TaskTargets]) -> Learned {
        let nothing = Learned { losses: vec![0.0; labels.len()], ..Learned::default() };
        if requests.is_empty() {
            return nothing;
        }
        let (rng, scales) = (self.rng.clone(), self.parameters.provenance.labels.clone());
        let mut harmful = Vec::new();
        let mut learned = requests.to_vec();
        let mut attempt = self.attempt(requests, labels);
        if self.is_harmful(&attempt) {
            for request in requests {
                self.rng = rng.clone();
                self.parameters.provenance.labels.clone_from(&scales);
                let alone = self.attempt(std::slice::from_ref(request), labels);
                if self.is_harmful(&alone) {
                    harmful.push(request.index);
                }
            }
            learned.retain(|request| !harmful.contains(&request.index));
            self.rng = rng;
            self.parameters.provenance.labels.clone_from(&scales);
            if learned.is_empty() {
                return Learned { harmful, ..nothing };
            }
            attempt = self.attempt(&learned, labels);
            if !attempt.is_finite() {
                // No request alone makes it so.
                self.parameters.provenance.labels = scales;
                let harmful = requests.iter().map(|request| request.index).collect();
                return Learned { harmful, ..nothing };
            }
        }
        self.mean_loss = harm::moved_mean(self.mean_loss, self.usual_loss(&attempt));
        self.correct(&attempt.outputs, &gathered(labels, &learned));
        let stepped = self.apply(&learned, &attempt.gradients, scales);
        Learned { losses: attempt.losses, stepped, harmful }
    }

    /// The losses and gradients of some requests, with dropout, after their labels joined the
    /// scales.
    fn attempt(&mut self, requests: &[TrainingRequest], labels: &[TaskTargets]) -> StepAttempt {
        let mut targets = gathered(labels, requests);
        for (scale, _, targets) in self.scaled(&mut targets) {
            let rows = || (0..targets.labels.len()).filter(|&row| targets.mask[row]);
            rows().for_each(|row| scale.observe(targets.labels[row], targets.weights[row]));
            targets.labels.iter_mut().for_each(|label| *label = scale.learned(*label));
        }
        let mut batch = self.batch(requests, &self.parameters.provenance, ReadFor::Learning);
        let Blueprint { description, graph, .. } = &*self.blueprint;
        let kinds: Vec<TaskKind> = description.tasks.iter().map(|task| task.kind).collect();
        let has_loss: Vec<bool> = graph.losses.iter().map(Option::is_some).collect();
        let log_odds = self.log_odds();
        let outcomes = targets.iter().cloned().zip(&log_odds);
        let outcome =
            |(targets, base_logit): (_, &f32)| TaskOutcomes { targets, base_logit: *base_logit };
        batch.outcomes = outcomes.map(outcome).collect();
        let (mut losses, mut all) = (Vec::new(), Vec::new());
        let mut loss = |outputs: &[f32], of_rows: &[f32]| {
            let shifted = outputs.iter().zip(log_odds.iter().cycle());
            let shifted: Vec<f32> = shifted.map(|(output, log_odds)| output + log_odds).collect();
            let (values, gradients) = all_losses(&StepOutputs {
                kinds: &kinds,
                has_loss: &has_loss,
                targets: &targets,
                outputs: &shifted,
                losses: of_rows,
            });
            (losses, all) = (values, outputs.to_vec());
            gradients
        };
        let gradients = self.compute.gradients(&self.parameters, &batch, &mut self.rng, &mut loss);
        StepAttempt { losses, outputs: all, gradients }
    }

    /// Compares a step's outputs `[rows, tasks]` with the labels, for the means of predictions.
    /// What a loss of the network's own predicts (a quantile, say) need not have the labels' mean.
    fn correct(&mut self, outputs: &[f32], labels: &[TaskTargets]) {
        let (tasks, is_new) = (labels.len(), !self.config.repeats);
        let graph = self.blueprint.graph.clone();
        let by_host =
            |(_, task, _): &(&mut LabelScale, usize, &TaskTargets)| graph.losses[*task].is_none();
        for (scale, task, targets) in self.scaled(labels).filter(by_host) {
            let rows = (0..targets.labels.len()).filter(|&row| targets.mask[row]);
            let said = rows.map(|row| LearnedRow {
                prediction: scale.prediction(outputs[row * tasks + task]),
                label: targets.labels[row],
                weight: targets.weights[row],
                is_new,
            });
            let said: Vec<LearnedRow> = said.collect();
            scale.correct(said);
        }
    }

    /// `[tasks]`: what outputs of binary tasks are log odds apart from.
    fn log_odds(&self) -> Vec<f32> {
        let Provenance { tasks, labels, .. } = &self.parameters.provenance;
        tasks.iter().map(|task| labels.get(task).map_or(0.0, LabelScale::log_odds)).collect()
    }

    /// The tasks that have scales, each with its scale, index and targets.
    fn scaled<T>(
        &mut self,
        targets: impl IntoIterator<Item = T>,
    ) -> impl Iterator<Item = (&mut LabelScale, usize, T)> {
        let Provenance { tasks, labels, .. } = &mut self.parameters.provenance;
        let scales = labels
            .iter_mut()
            .filter_map(|(name, scale)| Some((tasks.iter().position(|task| task == name)?, scale)));
        let mut scales: BTreeMap<usize, &mut LabelScale> = scales.collect();
        targets.into_iter().enumerate().filter_map(move |(task, targets)| {
            scales.remove(&task).map(|scale| (scale, task, targets))
        })
    }

    fn is_harmful(&self, attempt: &StepAttempt) -> bool {
        !attempt.is_finite()
            || harm::is_unusual(self.usual_loss(attempt), self.mean_loss, self.optimizer.steps())
    }

    /// The loss of the tasks whose loss is the host's. A loss of the network's own can be negative,
    /// so its mean says nothing of what is usual.
    fn usual_loss(&self, attempt: &StepAttempt) -> f64 {
        let losses = attempt.losses.iter().zip(&self.blueprint.graph.losses);
        losses.filter(|(_, own)| own.is_none()).map(|(loss, _)| loss).sum()
    }

    /// Applies the gradients of some requests; whether the step was taken. Where parameters stay as
    /// they are, the scales are those of `before`.
    fn apply(
        &mut self,
        requests: &[TrainingRequest],
        gradients: &Gradients,
        before: LabelScales,
    ) -> bool {
        let rows: usize = requests.iter().map(|request| request.example.targets.len()).sum();
        let step = TrainingStep {
            taken: self.optimizer.steps(),
            planned: self.optimizer.planned(),
            trained_rows: self.parameters.provenance.trained_rows,
            rows: rows as u32,
            learning_rate: self.optimizer.learning_rate(),
        };
        let factor = self.schedule.factor(&self.blueprint, step);
        let moves = self.optimizer.moves(factor);
        let graph = &self.blueprint.graph;
        let stepped = self.optimizer.step(&mut self.parameters, gradients, graph, factor);
        let provenance = &mut self.parameters.provenance;
        if !stepped || !moves {
            provenance.labels = before;
        }
        provenance.trained_rows += rows as u64;
        let times = requests.iter().map(|request| request.example.time_ms);
        provenance.trained_until_ms = times.fold(provenance.trained_until_ms, i64::max);
        if let Some(average) = self.average.as_mut().filter(|_| stepped) {
            average.update(&self.parameters, gradients);
        }
        stepped
    }
}

/// What a step did.
#[derive(Default)]
struct Learned {
    /// By task: the mean loss of the rows, before they are learned from.
    losses: Vec<f64>,
    stepped: bool,
    /// Requests that were not learned from, by their index in the chunk.
    harmful: Vec<usize>,
}

/// Losses and gradients that may be learned from.
struct StepAttempt {
    losses: Vec<f64>,
    /// `[rows, tasks]`, with dropout.
    outputs: Vec<f32>,
    gradients: Gradients,
}

impl StepAttempt {
    fn loss(&self) -> f64 {
        self.losses.iter().sum()
    }

    fn is_finite(&self) -> bool {
        self.loss().is_finite() && self.gradients.norm().is_finite()
    }
}

/// The values of each task.
pub(super) fn by_task(predictions: ExpertPredictions) -> Vec<Vec<f32>> {
    predictions.tasks.into_iter().map(|prediction| prediction.values).collect()
}

pub(super) fn gathered(labels: &[TaskTargets], requests: &[TrainingRequest]) -> Vec<TaskTargets> {
    labels.iter().map(|labels| labels.gather(requests)).collect()
}

pub(super) fn examples<'a>(requests: &[TrainingRequest<'a>]) -> Vec<&'a Example> {
    requests.iter().map(|request| request.example).collect()
}
