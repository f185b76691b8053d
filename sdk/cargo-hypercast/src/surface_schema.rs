//! What a new expert reads of a data set's `schema.toml`: the surfaces that there are, the tasks of
//! the expert's own surface, and the scale of each prediction.
//!
//! The host checks a schema as a whole; here everything but these few keys is left alone, so that
//! this tool links no part of the host.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// The part of a schema that the template is filled in from.
#[derive(Debug, Deserialize)]
pub struct SurfaceSchema {
    surfaces: Vec<String>,
    #[serde(default)]
    tasks: Vec<DeclaredTask>,
    #[serde(default)]
    ranges: Vec<LabelRange>,
}

#[derive(Debug, Clone, Deserialize)]
struct DeclaredTask {
    name: String,
    kind: String,
    label: String,
    /// None means all.
    #[serde(default)]
    surfaces: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct LabelRange {
    name: String,
    high: f64,
}

/// The worth that the template's value model gives to a unit of a task's prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskWorth {
    /// The task's name.
    pub task: String,
    /// Per unit of the prediction; 0 where nothing tells its scale.
    pub weight: f32,
    /// Why it is that, for the author to change.
    pub reason: String,
}

impl SurfaceSchema {
    /// Reads a schema.
    ///
    /// # Errors
    /// It is no TOML, or has no list of surfaces.
    pub fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).context("not a schema: see the `schema.toml` of a data set")
    }

    /// What one unit of each prediction of a surface is worth, so that none drowns the others: a
    /// probability counts as it is, and a regression over its whole range as much as one.
    ///
    /// # Errors
    /// The schema lacks the surface, or has no task for it.
    pub fn worth_on(&self, surface: &str) -> Result<Vec<TaskWorth>> {
        ensure!(
            self.surfaces.iter().any(|name| name == surface),
            "the schema has no surface `{surface}`; choose one with --surface: {}",
            self.surfaces.join(", ")
        );
        let is_valid = |task: &&DeclaredTask| {
            task.surfaces.is_empty() || task.surfaces.iter().any(|name| name == surface)
        };
        let tasks: Vec<&DeclaredTask> = self.tasks.iter().filter(is_valid).collect();
        ensure!(
            !tasks.is_empty(),
            "the schema has no task for surface `{surface}`: add one under [[tasks]]"
        );
        let mut worth: Vec<TaskWorth> = tasks.iter().map(|task| self.worth(task)).collect();
        // A ranking needs something to rank by.
        if worth.iter().all(|task| task.weight == 0.0) {
            worth[0].weight = 1.0;
        }
        Ok(worth)
    }

    fn worth(&self, task: &DeclaredTask) -> TaskWorth {
        let range = self.ranges.iter().find(|range| range.name == task.label);
        let high = range.map(|range| range.high).filter(|high| high.is_finite() && *high > 0.0);
        let (weight, reason): (f32, _) = match (task.kind.as_str(), high) {
            ("binary", _) => (1.0, "a probability".to_owned()),
            (_, Some(high)) => ((1.0 / high) as f32, format!("a value of up to {high}")),
            (_, None) => (0.0, "a value whose scale the schema does not tell: weigh it".to_owned()),
        };
        TaskWorth { task: task.name.clone(), weight, reason }
    }
}

/// The arms of the template's `match`, a line each.
pub fn value_arms(worth: &[TaskWorth]) -> String {
    let arm = |TaskWorth { task, weight, reason }: &TaskWorth| {
        format!("        // {reason}\n        {task:?} => {weight:?},\n")
    };
    worth.iter().map(arm).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = r#"
        surfaces = ["home", "basket"]
        actions = ["buy"]
        values = ["seconds", "price"]
        [[tasks]]
        name = "buys"
        role = "main"
        kind = "binary"
        label = "buy"
        surfaces = ["basket"]
        weight = 1.0
        [[tasks]]
        name = "seconds"
        kind = "regression"
        label = "seconds"
        [[tasks]]
        name = "price"
        kind = "regression"
        label = "price"
        [[ranges]]
        name = "seconds"
        low = 0.0
        high = 600.0
        beyond = "clip"
    "#;

    fn weights(surface: &str) -> Vec<(String, f32)> {
        let worth = SurfaceSchema::parse(SHOP).unwrap().worth_on(surface).unwrap();
        worth.into_iter().map(|task| (task.task, task.weight)).collect()
    }

    #[test]
    fn predictions_count_on_their_own_scales() {
        let of = |task: &str, weight| (task.to_owned(), weight);
        assert_eq!(
            weights("basket"),
            [of("buys", 1.0), of("seconds", 1.0 / 600.0), of("price", 0.0)]
        );
        assert_eq!(weights("home"), [of("seconds", 1.0 / 600.0), of("price", 0.0)]);
        let arms = value_arms(&SurfaceSchema::parse(SHOP).unwrap().worth_on("basket").unwrap());
        assert!(arms.contains("\"buys\" => 1.0,\n"), "{arms}");
    }

    #[test]
    fn a_ranking_has_something_to_rank_by() {
        let text = SHOP.replace("name = \"seconds\"\n        low", "name = \"other\"\n        low");
        let worth = SurfaceSchema::parse(&text).unwrap().worth_on("home").unwrap();
        assert_eq!(worth.iter().map(|task| task.weight).collect::<Vec<_>>(), [1.0, 0.0]);
    }

    #[test]
    fn a_surface_that_is_not_there_is_refused_with_those_that_are() {
        let schema = SurfaceSchema::parse(SHOP).unwrap();
        let refused = schema.worth_on("search").unwrap_err().to_string();
        assert!(refused.contains("home, basket"), "{refused}");
        let none = SHOP.replace("surfaces = [\"home\", \"basket\"]", "surfaces = [\"home\"]");
        let none = none.split("[[tasks]]").next().unwrap().to_owned();
        let refused = SurfaceSchema::parse(&none).unwrap().worth_on("home").unwrap_err();
        assert!(refused.to_string().contains("no task"), "{refused}");
    }
}
