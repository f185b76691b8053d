//! The labels of binary tasks, as metrics and trainers read them from outcomes.

use std::sync::Arc;

use hypercast_fm::example::Example;

use crate::schema::{Schema, TaskKind};

/// The labels of binary tasks.
#[derive(Debug, Clone)]
pub struct Labels {
    /// The schema.
    pub schema: Arc<Schema>,
    /// The action of each binary task.
    bits: Vec<Option<usize>>,
}

impl Labels {
    /// Of a schema's tasks.
    pub fn new(schema: &Arc<Schema>) -> Self {
        let bit = |task: &crate::schema::Task| match task.kind {
            TaskKind::Binary => schema.action(&task.label),
            TaskKind::Regression => None,
        };
        Self { bits: schema.tasks.iter().map(bit).collect(), schema: schema.clone() }
    }

    /// The binary tasks, as indices of the schema's.
    pub fn tasks(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.bits.len()).filter(|&task| self.bits[task].is_some())
    }

    /// The label of a target, or none outside the task's sample space.
    pub fn label(&self, example: &Example, row: usize, task: usize) -> Option<bool> {
        let outcome = &example.targets[row].outcome;
        let bit = self.bits[task].filter(|bit| outcome.known >> bit & 1 == 1)?;
        self.schema.task_valid(task, example.surface).then_some(outcome.actions >> bit & 1 == 1)
    }
}
