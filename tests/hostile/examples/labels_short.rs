//! `labels` returns fewer labels than there are examples.

use hypercast_hostile as good;
use hypercast_sdk::{ActionBatch, Description, Expert, Graph, HostInfo, TaskLabels, labels};

struct LabelsShort;

impl Expert for LabelsShort {
    fn describe(info: &HostInfo) -> Description {
        good::describe("labels_short", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let tasks: Vec<_> = hypercast_sdk::build::<Self>(info)?.0.tasks;
        let mut all = labels::from_schema(&tasks, info, batch)?;
        all.iter_mut().for_each(|task| task.labels.truncate(batch.actions.len() / 2));
        Ok(all)
    }
}

hypercast_sdk::export!(LabelsShort);
