//! The training loop over one chunk at a time: hooks, sampling, shuffling,
//! batches of whole requests, predict, learn.

use std::sync::Arc;

use hypercast_fm::example::{Example, Target};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::average::Average;
use super::loss::{TaskTargets, sigmoid, task_loss};
use super::optimizer::{Optimizer, OptimizerConfig};
use super::saved::SavedTrainer;
use super::step::{Compute, Seed, compute};
use crate::expert::batch::Tae;
use crate::expert::params::{Parameters, hash_text};
use crate::expert::wasm::contract::{ActionBatch, Outcome, TaskKind, TaskLabels};
use crate::expert::{Blueprint, Device, Error};

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
    /// For each task: labels, sample space and weights.
    pub targets: &'a [TaskTargets],
    /// For each task: the loss, with dropout.
    pub losses: Vec<f64>,
    /// Whether the step was taken; false where a gradient was not finite.
    pub stepped: bool,
}

/// Trains one expert.
pub struct ExpertTrainer {
    blueprint: Arc<Blueprint>,
    compute: Box<dyn Compute>,
    parameters: Parameters,
    average: Option<Average>,
    optimizer: Optimizer,
    config: TrainerConfig,
    /// Chunks learned from. With the seed they decide what is drawn in the next one, so that a resumed training
    /// draws what an uninterrupted one does.
    chunks: u64,
    rng: SmallRng,
}

/// A request within a chunk.
struct Request<'a> {
    example: &'a Example,
    tae: &'a [f32],
    /// Its first row in the chunk's labels.
    row: usize,
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
        if saved.provenance.graph != hash_text(&blueprint.graph) {
            return Err(other("another network"));
        }
        if saved.average.is_some() != (config.average_decay > 0.0) {
            return Err(other(
                "a configuration that averages otherwise (expert_training.average_decay)",
            ));
        }
        let parameters = |values| {
            Parameters::with_values(&blueprint.graph, values, saved.provenance.clone())
                .ok_or_else(|| other("parameters of other shapes"))
        };
        let average = match saved.average {
            Some((values, steps)) => Some((parameters(values)?, steps)),
            None => None,
        };
        if !saved.optimizer.fits(&blueprint.graph) {
            return Err(other("parameters of other shapes"));
        }
        let parameters = parameters(saved.values)?;
        let mut trainer = ExpertTrainer::new(blueprint, parameters, config, device)?;
        trainer.optimizer = saved.optimizer;
        trainer.chunks = saved.chunks;
        trainer.average = trainer
            .average
            .zip(average)
            .map(|(own, (parameters, steps))| own.resumed(parameters, steps));
        Ok(trainer)
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
        let mut labels = self.labels(&requests)?;
        self.rng = SmallRng::seed_from_u64(
            self.config.seed ^ self.chunks.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        self.chunks += 1;
        self.sample(&mut requests, &mut labels)?;
        if self.config.shuffle {
            requests.shuffle(&mut self.rng);
        }
        let mut rest = requests.as_slice();
        while !rest.is_empty() {
            let mut rows = 0;
            let fits = |request: &&Request| {
                rows += request.example.targets.len();
                rows <= self.config.batch_rows
            };
            let (batch, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            self.step(batch, &labels, &mut report);
            rest = after;
        }
        Ok(())
    }

    /// Predictions for a chunk's targets, `[rows]` a task: what serving would answer.
    pub fn predict(&self, chunk: Chunk) -> Result<Vec<Vec<f32>>, Error> {
        let requests = self.requests(chunk)?;
        let mut predictions = vec![Vec::new(); self.blueprint.description.tasks.len()];
        for requests in requests.chunks(64) {
            let examples: Vec<&Example> = requests.iter().map(|request| request.example).collect();
            let batch = self.batch(&examples, requests);
            let outputs = self.compute.forward(self.parameters(), &batch);
            for (all, part) in predictions.iter_mut().zip(self.blueprint.predictions(&outputs)) {
                all.extend(part);
            }
        }
        Ok(predictions)
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

    /// The plugin's labels for every row of the chunk.
    fn labels(&self, requests: &[Request]) -> Result<Vec<TaskTargets>, Error> {
        let blueprint = &self.blueprint;
        let mut all = vec![TaskTargets::default(); blueprint.description.tasks.len()];
        for part in self.hook_parts(requests) {
            let batch = self.action_batch(part);
            let labels =
                blueprint.plugin.labels(&blueprint.description, &blueprint.info, &batch)?;
            for (all, part) in all.iter_mut().zip(labels) {
                all.append(part);
            }
        }
        Ok(all)
    }

    /// Takes the rows that the plugin's `sample` drops out of every task's
    /// sample space; a request without any row left is not trained on.
    fn sample(
        &mut self,
        requests: &mut Vec<Request>,
        labels: &mut [TaskTargets],
    ) -> Result<(), Error> {
        let mut kept = Vec::new();
        for part in self.hook_parts(requests) {
            let keep =
                self.blueprint.plugin.sample(&self.blueprint.info, &self.action_batch(part))?;
            kept.extend(keep.into_iter().map(|p| p >= 1.0 || self.rng.random::<f32>() < p));
        }
        for (row, _) in kept.iter().enumerate().filter(|(_, kept)| !**kept) {
            labels.iter_mut().for_each(|task| task.mask[row] = false);
        }
        requests
            .retain(|request| kept[request.row..][..request.example.targets.len()].contains(&true));
        Ok(())
    }

    fn hook_parts<'r, 'a>(&self, requests: &'r [Request<'a>]) -> Vec<&'r [Request<'a>]> {
        let mut parts = Vec::new();
        let (mut start, mut rows) = (0, 0);
        for (end, request) in requests.iter().enumerate() {
            let more = request.example.targets.len();
            if rows + more > self.config.hook_rows && end > start {
                parts.push(&requests[start..end]);
                (start, rows) = (end, 0);
            }
            rows += more;
        }
        if start < requests.len() {
            parts.push(&requests[start..]);
        }
        parts
    }

    fn action_batch(&self, requests: &[Request]) -> ActionBatch {
        let rows = || {
            requests
                .iter()
                .flat_map(|request| request.example.targets.iter().map(move |t| (request, t)))
        };
        let value =
            |index: usize| move |(_, target): (&Request, &Target)| target.outcome.values[index];
        let outcome = |(index, name): (usize, &String)| Outcome {
            name: name.clone(),
            values: rows().map(value(index)).collect(),
        };
        ActionBatch {
            surface: rows().map(|(request, _)| u32::from(request.example.surface)).collect(),
            actions: rows().map(|(_, target)| target.outcome.actions).collect(),
            known: rows().map(|(_, target)| target.outcome.known).collect(),
            values: self.blueprint.info.values.iter().enumerate().map(outcome).collect(),
        }
    }

    fn batch(
        &self,
        examples: &[&Example],
        requests: &[Request],
    ) -> crate::expert::batch::ExpertBatch {
        let tae: Vec<f32> = requests.iter().flat_map(|request| request.tae).copied().collect();
        let tae = if self.uses_tae() { Tae::Rows(&tae) } else { Tae::Without };
        self.blueprint.columns.batch(examples, tae, &self.parameters.provenance.normaliser)
    }

    fn step(
        &mut self,
        requests: &[Request],
        labels: &[TaskTargets],
        report: &mut impl FnMut(&BatchReport),
    ) {
        let examples: Vec<&Example> = requests.iter().map(|request| request.example).collect();
        let targets: Vec<TaskTargets> =
            labels.iter().map(|labels| labels.gather(requests)).collect();
        let batch = self.batch(&examples, requests);
        let predictions = match self.config.progressive {
            true => self.blueprint.predictions(&self.compute.forward(self.parameters(), &batch)),
            false => Vec::new(),
        };
        let kinds: Vec<TaskKind> =
            self.blueprint.description.tasks.iter().map(|task| task.kind).collect();
        let mut losses = Vec::new();
        let mut loss = |outputs: &[f32], extra: &[f32]| {
            let (values, seed) = seed(&kinds, &targets, outputs, extra);
            losses = values;
            seed
        };
        let gradients = self.compute.gradients(&self.parameters, &batch, &mut self.rng, &mut loss);
        let stepped = self.optimizer.step(&mut self.parameters, &gradients);
        self.parameters.provenance.trained_rows += batch.rows as u64;
        if let Some(average) = self.average.as_mut().filter(|_| stepped) {
            average.follow(&self.parameters, &gradients);
        }
        report(&BatchReport {
            examples: &examples,
            predictions,
            targets: &targets,
            losses,
            stepped,
        });
    }
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

impl TaskTargets {
    fn append(&mut self, labels: TaskLabels) {
        let rows = labels.labels.len();
        self.labels.extend(labels.labels);
        self.mask.extend(labels.mask.iter().map(|mask| *mask != 0));
        match labels.weights.is_empty() {
            true => self.weights.extend(std::iter::repeat_n(1.0, rows)),
            false => self.weights.extend(labels.weights),
        }
    }

    fn gather(&self, requests: &[Request]) -> TaskTargets {
        let rows = || {
            requests
                .iter()
                .flat_map(|request| request.row..request.row + request.example.targets.len())
        };
        TaskTargets {
            labels: rows().map(|row| self.labels[row]).collect(),
            mask: rows().map(|row| self.mask[row]).collect(),
            weights: rows().map(|row| self.weights[row]).collect(),
        }
    }
}

/// Turns an output into a prediction: the probability of a binary task, the
/// value of a regression.
pub(crate) fn prediction(kind: TaskKind, output: f32) -> f32 {
    match kind {
        TaskKind::Binary => sigmoid(f64::from(output)) as f32,
        TaskKind::Regression => output,
    }
}
