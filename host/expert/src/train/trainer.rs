//! The training loop over one chunk at a time: the plugin's hooks, shuffling,
//! batches of whole requests, predict, learn.

use std::sync::Arc;

use hypercast_fm::example::Example;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use super::average::Average;
use super::hooks::{Hooks, Request};
use super::loss::{TaskTargets, sigmoid, task_loss};
use super::optimizer::{Optimizer, OptimizerConfig};
use super::rate::Rate;
use super::saved::SavedTrainer;
use super::step::{Compute, Seed, compute};
use crate::batch::{ExpertBatch, Tae};
use crate::normalise::Normaliser;
use crate::params::Parameters;
use crate::wasm::contract::{TaskKind, TrainingStep};
use crate::{Blueprint, Device, Error};

/// How an expert is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerConfig {
    /// Rates and schedule.
    pub optimizer: OptimizerConfig,
    /// Rows a step, made of whole requests.
    pub batch_rows: usize,
    /// Rows a call of the plugin's `labels` and `sample`.
    pub hook_rows: usize,
    /// Whether the requests of a chunk are shuffled (for passes after the
    /// first; one pass in time order gives progressive metrics).
    pub shuffle: bool,
    /// Whether predictions are made, without dropout, before each step.
    pub progressive: bool,
    /// Replaces the TAE by zeros: the ablation "expert without TAE".
    pub without_tae: bool,
    /// Share of the old in each step of the running average of the dense parameters, which predicts
    /// and is kept in their place; 0 for none.
    pub average_decay: f32,
    /// Seeds sampling, shuffling and dropout.
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
            without_tae: false,
            average_decay: 0.0,
            seed: 1,
        }
    }
}

/// Examples with their TAEs, as a log holds them.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Requests with at least one target each.
    pub examples: &'a [Example],
    /// `[targets, tae_dim]` over all examples, in order; empty without an FM.
    pub tae: &'a [f32],
}

/// One batch, reported before it is learnt from.
#[derive(Debug)]
pub struct BatchReport<'a> {
    /// Its requests; rows are their targets in order.
    pub examples: &'a [&'a Example],
    /// For each task `[rows]`: probabilities or values. Empty unless `progressive`.
    pub predictions: Vec<Vec<f32>>,
    /// The same of [`ExpertTrainer::compare_with`]; empty where none of the rows is new to it.
    pub serving: Vec<Vec<f32>>,
    /// For each task: labels, sample space and weights, of all rows: also of those that `sample` drops.
    pub targets: &'a [TaskTargets],
    /// For each task: the loss of the rows that are learned from, with dropout.
    pub losses: Vec<f64>,
    /// Whether the step was taken; false where a gradient was not finite, or `sample` keeps no row.
    pub stepped: bool,
}

/// Parameters that serve, for predictions beside those that learn.
#[derive(Debug, Clone)]
pub struct Serving {
    /// Of the same network.
    pub parameters: Parameters,
    /// Requests up to this time are not predicted: they were learned from. Milliseconds since the epoch.
    pub learned_until_ms: i64,
}

/// Trains one expert.
pub struct ExpertTrainer {
    blueprint: Arc<Blueprint>,
    compute: Box<dyn Compute>,
    parameters: Parameters,
    average: Option<Average>,
    optimizer: Optimizer,
    rate: Rate,
    serving: Option<Serving>,
    config: TrainerConfig,
    /// Chunks learned from. With the seed they decide what is drawn in the next one, so that a resumed training
    /// draws what an uninterrupted one does.
    chunks: u64,
    rng: SmallRng,
}

/// The chunk's labels.
struct Labels {
    /// Of all rows.
    all: Vec<TaskTargets>,
    /// Of those that are learned from, the others masked.
    kept: Vec<TaskTargets>,
}

impl ExpertTrainer {
    /// Trains `parameters`, which are the blueprint's: fresh or warm-started.
    pub fn new(
        blueprint: Arc<Blueprint>,
        parameters: Parameters,
        config: TrainerConfig,
        device: Device,
    ) -> Result<ExpertTrainer, Error> {
        Ok(ExpertTrainer {
            compute: compute(blueprint.graph.clone(), device)?,
            optimizer: Optimizer::new(&blueprint.graph, config.optimizer.clone()),
            rate: Rate::default(),
            serving: None,
            chunks: 0,
            rng: SmallRng::seed_from_u64(config.seed),
            average: (config.average_decay > 0.0)
                .then(|| Average::new(&blueprint.graph, &parameters, config.average_decay)),
            blueprint,
            parameters,
            config,
        })
    }

    /// All that it goes on from.
    pub fn saved(&self) -> SavedTrainer {
        SavedTrainer {
            values: self.parameters.all_values().to_vec(),
            provenance: self.parameters.provenance.clone(),
            average: self
                .average
                .as_ref()
                .map(|average| (average.parameters().all_values().to_vec(), average.steps())),
            optimizer: self.optimizer.clone(),
            chunks: self.chunks,
        }
    }

    /// Goes on from what another trainer saved; with the same configuration and chunks it computes what that one would have.
    ///
    /// # Errors
    /// What was saved is of another network or plugin, or `config` averages and the other one did not.
    pub fn resume(
        blueprint: Arc<Blueprint>,
        saved: SavedTrainer,
        config: TrainerConfig,
        device: Device,
    ) -> Result<ExpertTrainer, Error> {
        let other = |why: &str| {
            let why = format!("the saved trainer is of {why}; train the expert anew");
            Error::refused(&blueprint.description.name, why)
        };
        let parameters = saved.learning(&blueprint.graph).map_err(other)?;
        if saved.average.is_some() != (config.average_decay > 0.0) {
            return Err(other(
                "a configuration that averages otherwise (expert_training.average_decay)",
            ));
        }
        let mut trainer = ExpertTrainer::new(blueprint, parameters, config, device)?;
        trainer.chunks = saved.chunks;
        trainer.go_back(&saved)?;
        Ok(trainer)
    }

    /// Takes parameters, average and optimiser back to what was saved. What is drawn goes on, so that what was learned
    /// since is not drawn again.
    ///
    /// # Errors
    /// What was saved is of another network.
    pub fn go_back(&mut self, saved: &SavedTrainer) -> Result<(), Error> {
        let graph = &self.blueprint.graph;
        let other = |why: &str| {
            let why = format!("the saved trainer is of {why}; train the expert anew");
            Error::refused(&self.blueprint.description.name, why)
        };
        let (parameters, average) = saved
            .learning(graph)
            .and_then(|parameters| Ok((parameters, saved.averaged(graph)?)))
            .map_err(other)?;
        self.parameters = parameters;
        self.optimizer = saved.optimizer.clone();
        self.average = self
            .average
            .take()
            .zip(average)
            .map(|(own, (parameters, steps))| own.resumed(parameters, steps));
        Ok(())
    }

    /// Has progressive predictions made by parameters that serve, too.
    pub fn compare_with(&mut self, serving: Serving) {
        self.serving = Some(serving);
    }

    /// Calls of the plugin's `schedule` that failed.
    pub fn schedule_faults(&self) -> u64 {
        self.rate.faults()
    }

    /// How the last of them failed.
    pub fn last_schedule_fault(&self) -> Option<&str> {
        self.rate.last_fault()
    }

    /// The parameters so far, averaged if the configuration says so.
    pub fn parameters(&self) -> &Parameters {
        self.average.as_ref().map_or(&self.parameters, Average::parameters)
    }

    /// Ends training.
    pub fn into_parameters(self) -> Parameters {
        self.average.map_or(self.parameters, Average::into_parameters)
    }

    /// Turns shuffling and progressive predictions on or off, between passes.
    pub fn set_pass(&mut self, shuffle: bool, progressive: bool) {
        self.config.shuffle = shuffle;
        self.config.progressive = progressive;
    }

    /// Changes the size of a step, in rows.
    pub fn set_batch_rows(&mut self, rows: usize) {
        self.config.batch_rows = rows;
    }

    /// Goes on at constant learning rates, as a stream wants; optimiser state is carried on.
    pub fn hold_rates(&mut self, learning_rate: f32, table_learning_rate: f32) {
        self.optimizer.hold(learning_rate, table_learning_rate);
    }

    /// Learns from a chunk, which is also the shuffle buffer. `report` sees
    /// every batch.
    pub fn train(
        &mut self,
        chunk: Chunk,
        mut report: impl FnMut(&BatchReport),
    ) -> Result<(), Error> {
        let mut requests = self.requests(chunk)?;
        let hooks = Hooks { blueprint: &self.blueprint, rows: self.config.hook_rows };
        let all = hooks.labels(&requests)?;
        self.rng = SmallRng::seed_from_u64(
            self.config.seed ^ self.chunks.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        self.chunks += 1;
        let kept = hooks.sample(&mut requests, &all, &mut self.rng)?;
        let labels = Labels { all, kept };
        if !self.config.progressive {
            requests.retain(|request| request.kept);
        }
        if self.config.shuffle {
            requests.shuffle(&mut self.rng);
        }
        let mut rest = requests.as_slice();
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(self.batch_len(rest));
            self.step(batch, &labels, &mut report);
            rest = after;
        }
        Ok(())
    }

    /// The requests of the next step: as many as have so many rows to learn from, and a bounded number of others that
    /// are only predicted.
    fn batch_len(&self, requests: &[Request]) -> usize {
        let (mut kept, mut all) = (0, 0);
        let fits = |request: &&Request| {
            let rows = request.example.targets.len();
            all += rows;
            kept += if request.kept { rows } else { 0 };
            kept <= self.config.batch_rows && all <= 4 * self.config.batch_rows
        };
        requests.iter().take_while(fits).count().max(1)
    }

    /// Predictions for a chunk's targets, `[rows]` a task: what serving would answer.
    pub fn predict(&self, chunk: Chunk) -> Result<Vec<Vec<f32>>, Error> {
        self.predict_with(self.parameters(), chunk)
    }

    /// The same by other parameters of the network.
    pub fn predict_with(
        &self,
        parameters: &Parameters,
        chunk: Chunk,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let requests = self.requests(chunk)?;
        let mut predictions = vec![Vec::new(); self.blueprint.description.tasks.len()];
        for requests in requests.chunks(64) {
            for (all, part) in predictions.iter_mut().zip(self.forward(parameters, requests)) {
                all.extend(part);
            }
        }
        Ok(predictions)
    }

    /// The plugin's labels of every target of a chunk, a task each.
    pub fn targets(&self, chunk: Chunk) -> Result<Vec<TaskTargets>, Error> {
        let hooks = Hooks { blueprint: &self.blueprint, rows: self.config.hook_rows };
        hooks.labels(&self.requests(chunk)?)
    }

    fn forward(&self, parameters: &Parameters, requests: &[Request]) -> Vec<Vec<f32>> {
        let batch = self.batch(requests, &parameters.provenance.normaliser);
        self.blueprint.predictions(&self.compute.forward(parameters, &batch))
    }

    fn requests<'a>(&self, chunk: Chunk<'a>) -> Result<Vec<Request<'a>>, Error> {
        let dim = if self.uses_tae() { self.blueprint.columns.tae_dim() } else { 0 };
        let rows: usize = chunk.examples.iter().map(|example| example.targets.len()).sum();
        if dim > 0 && chunk.tae.len() != rows * dim {
            let (have, name) = (chunk.tae.len(), &self.blueprint.description.name);
            let why = format!(
                "the log holds {have} TAE values for {rows} targets, but the TAE has {dim} each"
            );
            return Err(Error::refused(name, why));
        }
        let mut row = 0;
        let request = |example: &'a Example| {
            let start = row;
            row += example.targets.len();
            Request {
                example,
                tae: if dim > 0 { &chunk.tae[start * dim..row * dim] } else { &[] },
                row: start,
                kept: true,
            }
        };
        Ok(chunk
            .examples
            .iter()
            .map(request)
            .filter(|request| !request.example.targets.is_empty())
            .collect())
    }

    fn uses_tae(&self) -> bool {
        self.blueprint.columns.reads_tae() && !self.config.without_tae
    }

    fn batch(&self, requests: &[Request], normaliser: &Normaliser) -> ExpertBatch {
        let examples = examples(requests);
        let tae: Vec<f32> = requests.iter().flat_map(|request| request.tae).copied().collect();
        let tae = if self.uses_tae() { Tae::Rows(&tae) } else { Tae::Without };
        self.blueprint.columns.batch(&examples, tae, normaliser)
    }

    /// Predicts the requests where predictions are asked for, and learns from those that are kept.
    fn step(
        &mut self,
        requests: &[Request],
        labels: &Labels,
        report: &mut impl FnMut(&BatchReport),
    ) {
        let examples = examples(requests);
        let targets: Vec<TaskTargets> =
            labels.all.iter().map(|labels| labels.gather(requests)).collect();
        let (mut predictions, mut serving) = (Vec::new(), Vec::new());
        if self.config.progressive {
            predictions = self.forward(self.parameters(), requests);
            let new_to = |serving: &&Serving| {
                examples.iter().any(|example| example.time_ms > serving.learned_until_ms)
            };
            if let Some(own) = self.serving.as_ref().filter(new_to) {
                serving = self.forward(&own.parameters, requests);
            }
        }
        let kept: Vec<Request> = requests.iter().filter(|request| request.kept).copied().collect();
        let (losses, stepped) = match kept.is_empty() {
            true => (vec![0.0; targets.len()], false),
            false => self.learn(&kept, &labels.kept),
        };
        report(&BatchReport {
            examples: &examples,
            predictions,
            serving,
            targets: &targets,
            losses,
            stepped,
        });
    }

    /// Each task's loss, and whether the step was taken.
    fn learn(&mut self, requests: &[Request], labels: &[TaskTargets]) -> (Vec<f64>, bool) {
        let targets: Vec<TaskTargets> =
            labels.iter().map(|labels| labels.gather(requests)).collect();
        let batch = self.batch(requests, &self.parameters.provenance.normaliser);
        let kinds: Vec<TaskKind> =
            self.blueprint.description.tasks.iter().map(|task| task.kind).collect();
        let mut losses = Vec::new();
        let mut loss = |outputs: &[f32], extra: &[f32]| {
            let (values, seed) = seed(&kinds, &targets, outputs, extra);
            losses = values;
            seed
        };
        let gradients = self.compute.gradients(&self.parameters, &batch, &mut self.rng, &mut loss);
        let step = TrainingStep {
            taken: self.optimizer.steps(),
            planned: self.optimizer.planned(),
            trained_rows: self.parameters.provenance.trained_rows,
            rows: batch.rows as u32,
            learning_rate: self.optimizer.learning_rate(),
        };
        let factor = self.rate.factor(&self.blueprint, step);
        let stepped = self.optimizer.step(&mut self.parameters, &gradients, factor);
        let provenance = &mut self.parameters.provenance;
        provenance.trained_rows += batch.rows as u64;
        let times = requests.iter().map(|request| request.example.time_ms);
        provenance.trained_until_ms = times.fold(provenance.trained_until_ms, i64::max);
        if let Some(average) = self.average.as_mut().filter(|_| stepped) {
            average.follow(&self.parameters, &gradients);
        }
        (losses, stepped)
    }
}

fn examples<'a>(requests: &[Request<'a>]) -> Vec<&'a Example> {
    requests.iter().map(|request| request.example).collect()
}

/// Each task's loss, and the gradient of all outputs.
fn seed(
    kinds: &[TaskKind],
    targets: &[TaskTargets],
    outputs: &[f32],
    extra: &[f32],
) -> (Vec<f64>, Seed) {
    let tasks = kinds.len();
    let rows = outputs.len() / tasks;
    let mut losses = Vec::with_capacity(tasks);
    let mut gradient = vec![0.0; outputs.len()];
    for (task, (kind, targets)) in kinds.iter().zip(targets).enumerate() {
        let column: Vec<f32> = outputs.iter().skip(task).step_by(tasks).copied().collect();
        let (loss, slopes) = task_loss(*kind, &column, targets);
        losses.push(loss);
        for (row, slope) in slopes.into_iter().enumerate() {
            gradient[row * tasks + task] = slope;
        }
    }
    let extra_loss = if extra.is_empty() { Vec::new() } else { extra_weights(targets, rows) };
    (losses, Seed { tasks: gradient, extra_loss })
}

/// The extra loss is a mean over rows, weighted by the most that any task
/// weighs the row; rows outside every sample space do not count.
fn extra_weights(targets: &[TaskTargets], rows: usize) -> Vec<f32> {
    let weight = |row: usize| {
        let weights = targets.iter().filter(|task| task.mask[row]).map(|task| task.weights[row]);
        weights.fold(0.0f32, f32::max)
    };
    let weights: Vec<f32> = (0..rows).map(weight).collect();
    let total: f32 = weights.iter().sum();
    if total > 0.0 { weights.iter().map(|weight| weight / total).collect() } else { weights }
}

/// Turns an output into a prediction: the probability of a binary task, the
/// value of a regression.
pub(crate) fn prediction(kind: TaskKind, output: f32) -> f32 {
    match kind {
        TaskKind::Binary => sigmoid(f64::from(output)) as f32,
        TaskKind::Regression => output,
    }
}
