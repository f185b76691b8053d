//! The optimisers, over the host's parameters: AdamW for dense ones, row-wise
//! Adagrad for the touched rows of tables, so that a step costs what the batch
//! touches and not what the tables hold.

use crate::graph::Graph;
use crate::params::Parameters;

use serde::{Deserialize, Serialize};

use super::step::Gradients;

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPSILON: f32 = 1e-8;

/// Learning rates and their schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Adam's learning rate at its peak.
    pub learning_rate: f32,
    /// Adagrad's, for tables.
    pub table_learning_rate: f32,
    /// Decoupled weight decay of dense matrices (vectors are spared).
    pub weight_decay: f32,
    /// The global gradient norm is clipped here.
    pub clip_norm: f32,
    /// Steps over which the rate rises from 0.
    pub warmup_steps: u64,
    /// Steps over which it then falls, as a cosine, to a tenth of its peak; 0 keeps it.
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

/// Optimiser state of one expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    config: OptimizerConfig,
    steps: u64,
    state: Vec<State>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum State {
    Adam {
        mean: Vec<f32>,
        square: Vec<f32>,
        decays: bool,
    },
    /// The mean squared gradient of each row, summed over steps.
    RowAdagrad {
        sums: Vec<f32>,
        width: usize,
    },
}

impl Optimizer {
    /// Fresh state for the parameters of `graph`.
    pub fn new(graph: &Graph, config: OptimizerConfig) -> Optimizer {
        let state = graph.parameters.iter().map(|spec| match spec.table {
            true => State::RowAdagrad { sums: vec![0.0; spec.shape[0]], width: spec.shape[1] },
            false => State::Adam {
                mean: vec![0.0; spec.len()],
                square: vec![0.0; spec.len()],
                decays: spec.shape.len() > 1,
            },
        });
        Optimizer { config, steps: 0, state: state.collect() }
    }

    /// Whether it is that of the parameters of `graph`.
    pub(super) fn fits(&self, graph: &Graph) -> bool {
        let fits = |(state, spec): (&State, &crate::graph::ParameterSpec)| match state {
            State::Adam { mean, square, .. } => {
                !spec.table && mean.len() == spec.len() && square.len() == spec.len()
            }
            State::RowAdagrad { sums, width } => {
                spec.table && sums.len() == spec.shape[0] && *width == spec.shape[1]
            }
        };
        self.state.len() == graph.parameters.len()
            && self.state.iter().zip(&graph.parameters).all(fits)
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// From the next step on the rates stay as given here, without warm-up or decay; what was
    /// gathered about gradients stays.
    pub fn hold(&mut self, learning_rate: f32, table_learning_rate: f32) {
        self.config = OptimizerConfig {
            learning_rate,
            table_learning_rate,
            warmup_steps: 0,
            decay_steps: 0,
            ..self.config.clone()
        };
    }

    /// Steps over which the rates fall; 0 where they have no end.
    pub fn planned(&self) -> u64 {
        self.config.decay_steps
    }

    /// Adam's learning rate of the next step.
    pub fn learning_rate(&self) -> f32 {
        self.schedule(self.steps + 1) * self.config.learning_rate
    }

    /// Applies one batch's gradients at `factor` times the rates of this step. Gradients that are not finite change
    /// nothing: the answer says whether the step was taken.
    pub fn step(
        &mut self,
        parameters: &mut Parameters,
        gradients: &Gradients,
        factor: f32,
    ) -> bool {
        let norm = gradients.norm();
        if !norm.is_finite() {
            return false;
        }
        let clip = if norm > self.config.clip_norm { self.config.clip_norm / norm } else { 1.0 };
        self.steps += 1;
        let factor = factor * self.schedule(self.steps);
        let (config, steps) = (&self.config, self.steps);
        for (index, state) in self.state.iter_mut().enumerate() {
            let Some(gradient) = &gradients.values[index] else {
                continue;
            };
            let values = parameters.values_mut(index);
            match state {
                State::Adam { mean, square, decays } => {
                    let rate = factor * config.learning_rate;
                    let decay = if *decays { 1.0 - rate * config.weight_decay } else { 1.0 };
                    let adam = Adam { rate, decay, clip, steps };
                    adam.step(values, gradient, mean, square);
                }
                State::RowAdagrad { sums, width } => {
                    let rows = gradients.rows[index]
                        .as_ref()
                        .expect("a table's gradient comes with its rows");
                    let rate = factor * config.table_learning_rate;
                    row_adagrad(
                        values,
                        gradient,
                        RowStep { rows, sums, width: *width, rate, clip },
                    );
                }
            }
        }
        true
    }

    /// The share of its peak that the rate of a step has; steps count from 1.
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

struct Adam {
    rate: f32,
    decay: f32,
    clip: f32,
    steps: u64,
}

impl Adam {
    fn step(&self, values: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32]) {
        // After so many steps the corrections are 1 to the last bit.
        let steps = self.steps.min(100_000) as i32;
        let (correct1, correct2) = (1.0 - BETA1.powi(steps), 1.0 - BETA2.powi(steps));
        let rate = self.rate / correct1;
        for (((value, gradient), mean), square) in
            values.iter_mut().zip(gradient).zip(mean).zip(square)
        {
            let gradient = gradient * self.clip;
            *mean += (1.0 - BETA1) * (gradient - *mean);
            *square += (1.0 - BETA2) * (gradient * gradient - *square);
            *value = *value * self.decay - rate * *mean / ((*square / correct2).sqrt() + EPSILON);
        }
    }
}

struct RowStep<'a> {
    rows: &'a [u32],
    sums: &'a mut [f32],
    width: usize,
    rate: f32,
    clip: f32,
}

fn row_adagrad(values: &mut [f32], gradient: &[f32], step: RowStep) {
    for (row, gradient) in step.rows.iter().zip(gradient.chunks_exact(step.width)) {
        let row = *row as usize;
        let square: f32 =
            gradient.iter().map(|g| (g * step.clip).powi(2)).sum::<f32>() / step.width as f32;
        step.sums[row] += square;
        if square == 0.0 {
            continue;
        }
        let rate = step.rate * step.clip / (step.sums[row].sqrt() + EPSILON);
        for (value, gradient) in values[row * step.width..].iter_mut().zip(gradient) {
            *value -= rate * gradient;
        }
    }
}
