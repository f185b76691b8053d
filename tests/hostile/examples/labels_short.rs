//! `labels` returns fewer labels than there are examples.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{ActionBatch, HostInfo, TaskLabels, labels};

hostile_expert! {
    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let tasks: Vec<_> = hypercast_sdk::build::<Self>(info)?.0.tasks;
        let mut all = labels::from_schema(&tasks, info, batch)?;
        all.iter_mut().for_each(|task| task.labels.truncate(batch.actions.len() / 2));
        Ok(all)
    }
}
