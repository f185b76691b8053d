//! What the plugin says of the examples of a chunk: their labels, and which of them are learned from.

use hypercast_fm::example::{Example, Target};
use rand::Rng;
use rand::rngs::SmallRng;

use super::loss::TaskTargets;
use crate::wasm::contract::{ActionBatch, Outcome, TaskLabels};
use crate::{Blueprint, Error};

/// A request within a chunk.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) example: &'a Example,
    pub(super) tae: &'a [f32],
    /// Its first row in the chunk's labels.
    pub(super) row: usize,
    /// Whether it has a row that is learned from.
    pub(super) kept: bool,
}

/// The hooks of a plugin, which are asked about so many rows at a time.
pub(super) struct Hooks<'a> {
    pub(super) blueprint: &'a Blueprint,
    pub(super) rows: usize,
}

impl Hooks<'_> {
    /// The labels of every row, a task each.
    pub(super) fn labels(&self, requests: &[Request]) -> Result<Vec<TaskTargets>, Error> {
        let Blueprint { plugin, description, info, .. } = self.blueprint;
        let mut all = vec![TaskTargets::default(); description.tasks.len()];
        for part in self.parts(requests) {
            let labels = plugin.labels(description, info, &self.actions(part))?;
            for (all, part) in all.iter_mut().zip(labels) {
                all.append(part);
            }
        }
        Ok(all)
    }

    /// The labels to learn from: rows that `sample` drops are out of every task's sample space, and those that it
    /// keeps stand for them by their weight. A request without any row left is not learned from.
    pub(super) fn sample(
        &self,
        requests: &mut [Request],
        labels: &[TaskTargets],
        rng: &mut SmallRng,
    ) -> Result<Vec<TaskTargets>, Error> {
        let mut shares = Vec::new();
        for part in self.parts(requests) {
            let Blueprint { plugin, info, .. } = self.blueprint;
            shares.extend(plugin.sample(info, &self.actions(part))?);
        }
        let kept: Vec<bool> =
            shares.iter().map(|share| *share >= 1.0 || rng.random::<f32>() < *share).collect();
        let mut labels = labels.to_vec();
        for (row, (kept, share)) in kept.iter().zip(&shares).enumerate() {
            for task in &mut labels {
                match kept {
                    true => task.weights[row] /= share,
                    false => task.mask[row] = false,
                }
            }
        }
        for request in requests {
            request.kept = kept[request.row..][..request.example.targets.len()].contains(&true);
        }
        Ok(labels)
    }

    fn parts<'r, 'a>(&self, requests: &'r [Request<'a>]) -> Vec<&'r [Request<'a>]> {
        let mut parts = Vec::new();
        let (mut start, mut rows) = (0, 0);
        for (end, request) in requests.iter().enumerate() {
            let more = request.example.targets.len();
            if rows + more > self.rows && end > start {
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

    fn actions(&self, requests: &[Request]) -> ActionBatch {
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

    /// The rows of some requests of the chunk.
    pub(super) fn gather(&self, requests: &[Request]) -> TaskTargets {
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
