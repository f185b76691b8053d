//! The optimisers of the host's parameters: AdamW for dense ones, row-wise Adagrad for the touched
//! rows of tables, so that a step costs what the batch touches and not what the tables have; or
//! what a parameter's options say. Also the moving average of the parameters.

use serde::{Deserialize, Serialize};

use super::step::Gradients;
use crate::graph::{ExpertGraph, ParameterOptimiser, ParameterSpec};
use crate::params::Parameters;

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPSILON: f32 = 1e-8;

/// Learning rates and their schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// The peak learning rate of Adam.
    pub learning_rate: f32,
    /// The peak learning rate of Adagrad, for tables.
    pub table_learning_rate: f32,
    /// Decoupled weight decay of dense matrices; vectors have none.
    pub weight_decay: f32,
    /// The upper bound of the global gradient norm.
    pub clip_norm: f32,
    /// Steps over which the rates rise from 0.
    pub warmup_steps: u64,
    /// Steps over which the rates then fall to a tenth, as a cosine; 0 keeps them constant.
    pub decay_steps: u64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            learning_rate: 1e-3,
            table_learning_rate: 0.02,
            weight_decay: 1e-5,
            clip_norm: 1.0,
            warmup_steps: 100,
            decay_steps: 0,
        }
    }
}

/// The optimiser state of one expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertOptimizer {
    config: OptimizerConfig,
    steps: u64,
    state: Vec<ParameterState>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum ParameterState {
    Adam {
        mean: Vec<f32>,
        square: Vec<f32>,
        /// Whether the parameter is a matrix; states of before parameters had options say so.
        decays: bool,
    },
    /// The mean squared gradient of each row, summed over steps. Each value of a dense parameter is
    /// a row.
    RowAdagrad { sums: Vec<f32>, width: usize },
    /// No state, of rows of this width.
    Sgd { width: usize },
}

impl ExpertOptimizer {
    /// Fresh state for the parameters of `graph`.
    pub fn new(graph: &ExpertGraph, config: OptimizerConfig) -> ExpertOptimizer {
        let state = graph.parameters.iter().map(ParameterState::new).collect();
        ExpertOptimizer { config, steps: 0, state }
    }

    /// Whether the state fits the parameters of `graph`.
    pub(super) fn fits(&self, graph: &ExpertGraph) -> bool {
        let fits = |(state, spec): (&ParameterState, &ParameterSpec)| match (state, spec.optimiser)
        {
            (ParameterState::Adam { mean, square, .. }, ParameterOptimiser::Adam) => {
                mean.len() == spec.len() && square.len() == spec.len()
            }
            (ParameterState::RowAdagrad { sums, width }, ParameterOptimiser::Adagrad) => {
                *width == row_width(spec) && sums.len() * width == spec.len()
            }
            (ParameterState::Sgd { width }, ParameterOptimiser::Sgd) => *width == row_width(spec),
            _ => false,
        };
        self.state.len() == graph.parameters.len()
            && self.state.iter().zip(&graph.parameters).all(fits)
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Makes the rates constant from the next step on, without warm-up or decay. The statistics of
    /// gradients are kept.
    pub fn hold(&mut self, learning_rate: f32, table_learning_rate: f32) {
        self.config = OptimizerConfig {
            learning_rate,
            table_learning_rate,
            warmup_steps: 0,
            decay_steps: 0,
            ..self.config.clone()
        };
    }

    /// The number of steps over which the rates fall; 0 without an end.
    pub fn planned(&self) -> u64 {
        self.config.decay_steps
    }

    /// Adam's learning rate of the next step.
    pub fn learning_rate(&self) -> f32 {
        self.schedule(self.steps + 1) * self.config.learning_rate
    }

    /// Whether a step at `factor` times the rates changes parameters.
    pub fn moves(&self, factor: f32) -> bool {
        factor * (self.config.learning_rate + self.config.table_learning_rate) > 0.0
    }

    /// Applies one batch's gradients at `factor` times the rates of this step, and each parameter's
    /// own factor. Returns whether the step was taken: gradients that are not finite change
    /// nothing.
    pub fn step(
        &mut self,
        parameters: &mut Parameters,
        gradients: &Gradients,
        graph: &ExpertGraph,
        factor: f32,
    ) -> bool {
        let norm = gradients.norm();
        if !norm.is_finite() {
            return false;
        }
        let clip_norm = graph.gradient_clip.unwrap_or(self.config.clip_norm);
        let clip = if norm > clip_norm { clip_norm / norm } else { 1.0 };
        self.steps += 1;
        let factor = factor * self.schedule(self.steps);
        for (index, state) in self.state.iter_mut().enumerate() {
            if let Some(gradient) = &gradients.values[index] {
                let (rows, spec) = (gradients.rows[index].as_deref(), &graph.parameters[index]);
                let OptimizerConfig { learning_rate, table_learning_rate, .. } = self.config;
                let peak = if spec.table { table_learning_rate } else { learning_rate };
                let rate = factor * spec.rate_factor * peak;
                let decays = !spec.table && spec.shape.len() > 1;
                let usual = if decays { self.config.weight_decay } else { 0.0 };
                let decay = (1.0 - rate * spec.weight_decay.unwrap_or(usual)).max(0.0);
                let scale = StepScale { rate, decay, clip, steps: self.steps };
                state.step(parameters.values_mut(index), gradient, rows, &scale);
            }
        }
        true
    }

    /// The learning rate of a step as a share of its peak. Steps count from 1.
    fn schedule(&self, step: u64) -> f32 {
        let OptimizerConfig { warmup_steps, decay_steps, .. } = self.config;
        if step < warmup_steps {
            return step as f32 / warmup_steps as f32;
        }
        if decay_steps == 0 {
            return 1.0;
        }
        let done = ((step - warmup_steps) as f32 / decay_steps as f32).min(1.0);
        0.1 + 0.9 * 0.5 * (1.0 + (std::f32::consts::PI * done).cos())
    }
}

/// How a step changes a parameter.
struct StepScale {
    /// The learning rate.
    rate: f32,
    /// What the values are multiplied with: decoupled weight decay.
    decay: f32,
    /// The factor of all gradients.
    clip: f32,
    steps: u64,
}

/// The width of a table's rows; the values of a dense parameter are rows of their own.
fn row_width(spec: &ParameterSpec) -> usize {
    if spec.table { spec.shape[1] } else { 1 }
}

impl ParameterState {
    fn new(spec: &ParameterSpec) -> ParameterState {
        let width = row_width(spec);
        let zeros = |count| vec![0.0; count];
        match spec.optimiser {
            ParameterOptimiser::Adam => ParameterState::Adam {
                mean: zeros(spec.len()),
                square: zeros(spec.len()),
                decays: spec.shape.len() > 1,
            },
            ParameterOptimiser::Adagrad => {
                ParameterState::RowAdagrad { sums: zeros(spec.len() / width), width }
            }
            ParameterOptimiser::Sgd => ParameterState::Sgd { width },
        }
    }

    /// Learns from the gradient of the whole parameter, or of some rows.
    fn step(
        &mut self,
        values: &mut [f32],
        gradient: &[f32],
        rows: Option<&[u32]>,
        scale: &StepScale,
    ) {
        match self {
            ParameterState::Adam { mean, square, .. } => {
                adam(values, gradient, [mean, square], scale);
            }
            ParameterState::RowAdagrad { sums, width } => {
                let width = *width;
                each_row(values, gradient, rows, width, |row, values, gradient| {
                    let squares = gradient.iter().map(|g| (g * scale.clip).powi(2));
                    let square = squares.sum::<f32>() / width as f32;
                    sums[row] += square;
                    if square > 0.0 {
                        let rate = scale.rate * scale.clip / (sums[row].sqrt() + EPSILON);
                        scale.descend(values, gradient, rate);
                    }
                });
            }
            ParameterState::Sgd { width } => {
                each_row(values, gradient, rows, *width, |_, values, gradient| {
                    scale.descend(values, gradient, scale.rate * scale.clip);
                });
            }
        }
    }
}

impl StepScale {
    fn descend(&self, values: &mut [f32], gradient: &[f32], rate: f32) {
        for (value, gradient) in values.iter_mut().zip(gradient) {
            *value = *value * self.decay - rate * gradient;
        }
    }
}

fn adam(values: &mut [f32], gradient: &[f32], moments: [&mut [f32]; 2], scale: &StepScale) {
    let StepScale { rate, decay, clip, steps } = *scale;
    let [mean, square] = moments;
    // After 100,000 steps the corrections are exactly 1 in f32.
    let steps = steps.min(100_000) as i32;
    let (correct1, correct2) = (1.0 - BETA1.powi(steps), 1.0 - BETA2.powi(steps));
    let rate = rate / correct1;
    for (((value, gradient), mean), square) in values.iter_mut().zip(gradient).zip(mean).zip(square)
    {
        let gradient = gradient * clip;
        *mean += (1.0 - BETA1) * (gradient - *mean);
        *square += (1.0 - BETA2) * (gradient * gradient - *square);
        *value = *value * decay - rate * *mean / ((*square / correct2).sqrt() + EPSILON);
    }
}

/// Visits the rows that a gradient is of, each with its index, values and gradient.
fn each_row(
    values: &mut [f32],
    gradient: &[f32],
    rows: Option<&[u32]>,
    width: usize,
    mut visit: impl FnMut(usize, &mut [f32], &[f32]),
) {
    for (at, gradient) in gradient.chunks_exact(width).enumerate() {
        let row = rows.map_or(at, |rows| rows[at] as usize);
        visit(row, &mut values[row * width..][..width], gradient);
    }
}

/// A moving average of an expert's parameters, which predicts in their place.
///
/// With small batches and constant rates the parameters of a streaming trainer jump from step to
/// step; their average does not. Table rows change too rarely for an average: they are copied.
#[derive(Debug, Clone)]
pub struct MovingAverage {
    /// The averaged parameters so far.
    pub(super) parameters: Parameters,
    /// For each parameter, the width of a table's rows; none for a dense one.
    row_widths: Vec<Option<usize>>,
    decay: f32,
    /// The number of steps averaged.
    pub(super) steps: u64,
}

impl MovingAverage {
    /// Starts as a copy of `parameters`. `decay` is the weight of the previous average in each
    /// step. It is smaller in the first steps, so that the initial values are soon forgotten.
    pub fn new(graph: &ExpertGraph, parameters: &Parameters, decay: f32) -> MovingAverage {
        let width = |spec: &ParameterSpec| spec.table.then(|| spec.shape[1]);
        MovingAverage {
            parameters: parameters.clone(),
            row_widths: graph.parameters.iter().map(width).collect(),
            decay,
            steps: 0,
        }
    }

    /// Adds the parameters `now` after a step with `gradients`.
    pub fn update(&mut self, now: &Parameters, gradients: &Gradients) {
        let warmup = (1 + self.steps) as f32 / (10 + self.steps) as f32;
        let share = 1.0 - self.decay.min(warmup);
        self.steps += 1;
        for (index, width) in self.row_widths.iter().enumerate() {
            let (own, now) = (self.parameters.values_mut(index), now.values(index));
            match (width, &gradients.rows[index]) {
                (None, _) => {
                    own.iter_mut().zip(now).for_each(|(own, now)| *own += share * (now - *own));
                }
                (Some(width), Some(rows)) => {
                    for row in rows {
                        let at = *row as usize * width;
                        own[at..at + width].copy_from_slice(&now[at..at + width]);
                    }
                }
                (Some(_), None) => {}
            }
        }
        self.parameters.provenance.trained_rows = now.provenance.trained_rows;
        self.parameters.provenance.trained_until_ms = now.provenance.trained_until_ms;
        self.parameters.provenance.labels.clone_from(&now.provenance.labels);
    }
}
