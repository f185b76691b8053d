//! A running average of an expert's parameters, which predicts in their place.
//!
//! Small batches and constant rates make the parameters of a streaming trainer
//! jump; their average does not. Rows of tables are touched too seldom to be
//! averaged: they are taken as they are.

use crate::graph::Graph;
use crate::params::Parameters;

use super::step::Gradients;

/// Parameters that follow others slowly.
#[derive(Debug, Clone)]
pub struct Average {
    parameters: Parameters,
    /// Of each parameter: the width of a table's rows, none for dense ones.
    row_widths: Vec<Option<usize>>,
    decay: f32,
    steps: u64,
}

impl Average {
    /// Starts as a copy. `decay` is the share of the old in each step; it is less in the first steps, so
    /// that the average does not remember how the parameters began.
    pub fn new(graph: &Graph, parameters: &Parameters, decay: f32) -> Average {
        let width = |spec: &crate::graph::ParameterSpec| spec.table.then(|| spec.shape[1]);
        Average {
            parameters: parameters.clone(),
            row_widths: graph.parameters.iter().map(width).collect(),
            decay,
            steps: 0,
        }
    }

    /// Goes on as one that averaged `parameters` over so many steps.
    pub(super) fn resumed(self, parameters: Parameters, steps: u64) -> Average {
        Average { parameters, steps, ..self }
    }

    /// Steps that were followed.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// The averaged parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Goes a step after `now`, which `gradients` have just changed.
    pub fn follow(&mut self, now: &Parameters, gradients: &Gradients) {
        let warm = (1 + self.steps) as f32 / (10 + self.steps) as f32;
        let share = 1.0 - self.decay.min(warm);
        self.steps += 1;
        for (index, width) in self.row_widths.iter().enumerate() {
            let (own, now) = (self.parameters.values_mut(index), now.values(index));
            match (width, &gradients.rows[index]) {
                (None, _) => {
                    own.iter_mut().zip(now).for_each(|(own, now)| *own += share * (now - *own))
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
    }

    /// Ends averaging.
    pub fn into_parameters(self) -> Parameters {
        self.parameters
    }
}
