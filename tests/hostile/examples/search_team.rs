//! The expert of one surface, as its team wants it. It reads the features and learns the tasks that
//! belong to the surface. Where items have a `threshold`, whoever watches at least that share of
//! one is `engaged`. Rows count by where they were ranked. It is not hostile.

use hypercast_sdk::{
    ActionBatch, Description, Expert, Graph, HostInfo, Linear, TaskKind, TaskLabels, TaskWeights,
    labels,
};

struct SearchTeam;

const ENGAGED: &str = "engaged";

fn has_thresholds(info: &HostInfo) -> bool {
    info.features.iter().any(|name| name == "threshold")
}

impl Expert for SearchTeam {
    fn describe(info: &HostInfo) -> Description {
        let all = Description::new("search_team", "1.0.0").surfaces(["search"]).all_tasks(info);
        let all = all.training_position().training_propensity();
        if has_thresholds(info) {
            all.task(ENGAGED, TaskKind::Binary).training_feature("threshold")
        } else {
            all
        }
    }

    fn network(g: &Graph) {
        let own: Vec<&str> = g.info().own_features().collect();
        let mut parts = vec![g.tae()];
        parts.extend((!own.is_empty()).then(|| g.features(&own)));
        let all = g.concat(&parts);
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(all));
        }
    }

    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let mut of_schema = Self::describe(info).tasks().to_vec();
        of_schema.retain(|task| task.name != ENGAGED);
        let mut all = labels::from_schema(&of_schema, info, batch)?;
        if has_thresholds(info) {
            let threshold = batch.feature("threshold")?;
            all.push(batch.at_least(ENGAGED, "watch", |row| threshold[row])?);
        }
        Ok(all)
    }

    // What stood far down was seen by few, and what chance put at its place stands for all that it
    // did not put there.
    fn weights(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskWeights>, String> {
        let (position, propensity) = (batch.position()?, batch.propensity()?);
        Ok(batch.weighted(Self::describe(info).tasks(), |row| {
            let seen = if position[row].is_nan() { 1.0 } else { (2.0 + position[row]).log2() };
            let chosen = if propensity[row].is_nan() { 1.0 } else { propensity[row].max(0.05) };
            seen / chosen
        }))
    }
}

hypercast_sdk::export!(SearchTeam);
