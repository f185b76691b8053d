//! The rules that a schema must satisfy.

use std::collections::HashSet;

use hypercast_fm::example::{MAX_ACTIONS, MAX_VALUES};

use super::{
    BUILT_IN_FEATURES, BUILT_IN_IDS, Counter, Feature, FeatureKind, MAX_TAGS, Schema, TaskKind,
    ValueRange,
};
use crate::error::{Error, Result};

/// Columns of logs and imported tables that are not features.
const RESERVED: [&str; 17] = [
    "request",
    "user",
    "item",
    "name",
    "time_ms",
    "outcome_ms",
    "actions",
    "known",
    "truth",
    "tae",
    "history_only",
    "fm_version",
    "history_item",
    "history_surface",
    "history_actions",
    "history_known",
    "history_time_ms",
];

impl Schema {
    /// Whether no feature may have a name, because another column has it in every data set.
    pub fn is_reserved(name: &str) -> bool {
        let all = [&RESERVED[..], &BUILT_IN_IDS, &BUILT_IN_FEATURES];
        all.iter().any(|names| names.contains(&name)) || has_reserved_start(name)
    }

    /// Checks that the schema does not contradict itself.
    ///
    /// # Errors
    /// It does; the error names the entry.
    pub fn validate(&self) -> Result<()> {
        let limit = |what: &str, count: usize, most: usize| {
            if count > most {
                return fail(format!("{count} {what}, at most {most} are possible"));
            }
            Ok(())
        };
        limit("actions", self.actions.len(), MAX_ACTIONS)?;
        limit("values", self.values.len(), MAX_VALUES)?;
        limit("surfaces", self.surfaces.len(), usize::from(u16::MAX))?;
        if self.surfaces.is_empty() || self.tasks.is_empty() {
            return fail("at least one surface and one task are needed".into());
        }
        unique("surface", self.surfaces.iter().map(String::as_str))?;
        unique("action", self.actions.iter().map(String::as_str))?;
        unique("value", self.values.iter().map(String::as_str))?;
        unique("task", self.tasks.iter().map(|task| task.name.as_str()))?;
        unique("counter", self.counters.iter().map(|counter| counter.name.as_str()))?;
        self.validate_max_values()?;
        self.validate_columns()?;
        self.validate_training_only()?;
        self.validate_tasks()?;
        self.validate_counters()?;
        self.validate_ranges()?;
        self.validate_retired()?;
        self.validate_owned()?;
        self.validate_alignment()?;
        self.validate_earlier()
    }

    fn validate_max_values(&self) -> Result<()> {
        for Feature { name, kind, max_values, .. } in self.features() {
            let Some(most) = max_values else { continue };
            let whose = format!("feature `{name}`");
            if *kind == FeatureKind::Dense {
                return fail(format!("{whose}: only a categorical feature has `max_values`"));
            }
            if !(2..=MAX_TAGS).contains(most) {
                return fail(format!("{whose}: max_values is {most}; it must be 2 to {MAX_TAGS}"));
            }
        }
        Ok(())
    }

    fn validate_columns(&self) -> Result<()> {
        // Features of several values have columns of other names.
        let names = self.features().map(|feature| feature.name.as_str());
        unique("feature", BUILT_IN_IDS.into_iter().chain(names))?;
        let (ids, features) = (self.id_columns(), self.feature_columns());
        let columns = ids.iter().chain(&features);
        unique("column", columns.clone().map(String::as_str))?;
        let reserved = columns
            .clone()
            .find(|name| RESERVED.contains(&name.as_str()) || has_reserved_start(name));
        if let Some(name) = reserved {
            return fail(format!("column `{name}` has a name that is reserved; rename it"));
        }
        Ok(())
    }

    fn validate_tasks(&self) -> Result<()> {
        for task in &self.tasks {
            let whose = format!("task `{}`", task.name);
            match task.kind {
                TaskKind::Binary => known(&whose, "label", &task.label, &self.actions)?,
                TaskKind::Regression => known(&whose, "label", &task.label, &self.values)?,
            }
            for surface in &task.surfaces {
                known(&whose, "surface", surface, &self.surfaces)?;
            }
            if task.kind == TaskKind::Binary && !task.transform.is_identity() {
                return fail(format!("{whose}: only a regression's label can have a transform"));
            }
            at_least_zero(&whose, "weight", task.weight)?;
        }
        Ok(())
    }

    fn validate_counters(&self) -> Result<()> {
        // Of several values, none is the one to count by.
        let single = self.id_fields().into_iter().filter(|field| field.columns.len() == 1);
        let ids: Vec<String> = single.map(|field| field.name).collect();
        for counter in &self.counters {
            let whose = format!("counter `{}`", counter.name);
            known(&whose, "action", &counter.action, &self.actions)?;
            if counter.key.is_empty() {
                return fail(format!("{whose}: its key is empty"));
            }
            for column in &counter.key {
                known(&whose, "id column of one value", column, &ids)?;
            }
            at_least_zero(&whose, "half_life_days", counter.half_life_days)?;
        }
        Ok(())
    }

    fn validate_training_only(&self) -> Result<()> {
        let own = |features: &[Feature]| {
            features.iter().find(|feature| feature.training_only).map(|own| own.name.clone())
        };
        if let Some(name) = own(&self.item_features).or_else(|| own(&self.user_features)) {
            return fail(format!(
                "feature `{name}`: only a context feature can be `training_only`; those of items and \
                 users are known when a request is served"
            ));
        }
        let is_own = |column: &String| {
            let features = &self.context_features;
            features.iter().any(|feature| feature.training_only && feature.name == *column)
        };
        let keys = |counter: &Counter| counter.key.iter().find(|key| is_own(key)).cloned();
        let counter = self.counters.iter().find_map(|counter| Some((counter, keys(counter)?)));
        if let Some((Counter { name, .. }, column)) = counter {
            return fail(format!(
                "counter `{name}`: `{column}` of its key is `training_only`, so serving could not \
                 read it; take it out of the key"
            ));
        }
        Ok(())
    }

    fn validate_retired(&self) -> Result<()> {
        unique("retired feature", self.retired.iter().map(String::as_str))?;
        let features = [&self.item_features, &self.user_features, &self.context_features];
        let names: Vec<String> =
            features.into_iter().flatten().map(|feature| feature.name.clone()).collect();
        self.retired.iter().try_for_each(|name| known("retired", "feature", name, &names))
    }

    fn validate_ranges(&self) -> Result<()> {
        unique("range", self.ranges.iter().map(|range| range.name.as_str()))?;
        let dense: Vec<String> = self.features_of(FeatureKind::Dense).collect();
        let bounded = [&self.values[..], &dense].concat();
        for ValueRange { name, low, high, .. } in &self.ranges {
            let whose = format!("range `{name}`");
            known(&whose, "value or dense feature", name, &bounded)?;
            if !(low.is_finite() && high.is_finite() && low < high) {
                return fail(format!("{whose}: {low} to {high} are not two numbers, lower first"));
            }
        }
        Ok(())
    }
}

fn has_reserved_start(name: &str) -> bool {
    name.starts_with("value_") || name.starts_with("truth_")
}

fn known(whose: &str, what: &str, name: &String, all: &[String]) -> Result<()> {
    if all.contains(name) {
        return Ok(());
    }
    fail(format!("{whose}: no {what} is called `{name}`; there are: {}", all.join(", ")))
}

fn at_least_zero(whose: &str, what: &str, number: f32) -> Result<()> {
    if number.is_finite() && number >= 0.0 {
        return Ok(());
    }
    fail(format!("{whose}: its {what} {number} is not a number of at least 0"))
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = HashSet::new();
    for name in names {
        if name.is_empty() {
            return fail(format!("a {what} has an empty name"));
        }
        if !seen.insert(name) {
            return fail(format!("{what} `{name}` appears twice"));
        }
    }
    Ok(())
}

fn fail<T>(reason: String) -> Result<T> {
    Err(Error::Schema(reason))
}

#[cfg(test)]
mod tests {
    use hypercast_fm::training_only::TrainingOnlyColumns;

    use super::*;
    use crate::schema::{BeyondRange, Counter, Task, TaskRole, category_id};

    fn schema() -> Schema {
        Schema {
            surfaces: vec!["feed".into(), "search".into()],
            actions: vec!["click".into()],
            values: vec!["watch".into()],
            tasks: vec![Task {
                name: "click".into(),
                role: TaskRole::Main,
                kind: TaskKind::Binary,
                label: "click".into(),
                transform: Default::default(),
                surfaces: vec!["search".into()],
                weight: 1.0,
            }],
            item_features: vec![Feature::new("tag", FeatureKind::Categorical)],
            user_features: vec![Feature::new("age", FeatureKind::Dense)],
            context_features: vec![],
            counters: vec![Counter {
                name: "user_click".into(),
                key: vec!["user_id".into(), "surface".into()],
                action: "click".into(),
                half_life_days: 7.0,
            }],
            ids: Default::default(),
            retired: Vec::new(),
            owned: Default::default(),
            alignment: Default::default(),
            earlier: Vec::new(),
            ranges: vec![
                ValueRange { name: "watch".into(), low: 0.1, high: 1e6, ..ValueRange::default() },
                ValueRange {
                    name: "age".into(),
                    low: 0.0,
                    high: 120.0,
                    beyond: BeyondRange::Refuse,
                },
            ],
        }
    }

    fn refused(change: impl FnOnce(&mut Schema)) -> String {
        let mut schema = schema();
        change(&mut schema);
        schema.validate().unwrap_err().to_string()
    }

    #[test]
    fn saved_schema_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("schema.toml");
        schema().save(&path).unwrap();
        assert_eq!(Schema::load(&path).unwrap(), schema());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("low = 0.1\n"), "ranges are written for people: {text}");
    }

    #[test]
    fn columns_come_in_the_documented_order() {
        assert_eq!(schema().id_columns(), ["user_id", "item_id", "surface", "hour", "tag"]);
        assert_eq!(
            schema().feature_columns(),
            [
                "age",
                "user_click_rate",
                "user_click_count",
                "user_history_len",
                "seconds_since_last_event",
                "item_age"
            ]
        );
        let mut lasting = schema();
        lasting.counters[0].half_life_days = 0.0;
        assert_eq!(
            lasting.feature_columns()[1..6],
            [
                "user_click_rate",
                "user_click_count",
                "user_click_effect",
                "click_log_odds",
                "click_doubt"
            ]
        );
        assert!(schema().task_valid(0, 1) && !schema().task_valid(0, 0));
        assert!(!schema().task_valid(0, 99) && !schema().task_valid(99, 0), "there are none");
    }

    #[test]
    fn an_optional_feature_adds_a_column_and_any_other_none() {
        let mut schema = schema();
        let before = schema.feature_columns();
        assert!(!toml::to_string(&schema).unwrap().contains("optional"));
        schema.context_features.push(Feature::new("battery", FeatureKind::Dense));
        schema.item_features[0].optional = true;
        schema.user_features[0].optional = true;
        let mut after = before;
        after.insert(1, "battery".into());
        after.push("age_missing".into());
        assert_eq!(schema.feature_columns(), after, "a category says by 0 that it is missing");
        schema.context_features[0].name = "age_missing".into();
        let refused = schema.validate().unwrap_err().to_string();
        assert!(refused.contains("column `age_missing` appears twice"), "{refused}");
    }

    #[test]
    fn a_feature_of_several_values_has_columns_of_its_own_and_no_counter() {
        let mut schema = schema();
        schema.user_features.push(Feature::tags("likes", 3));
        schema.validate().unwrap();
        assert_eq!(schema.id_columns()[4..], ["tag", "likes_1", "likes_2", "likes_3"]);
        let text = toml::to_string(&schema).unwrap();
        assert_eq!(toml::from_str::<Schema>(&text).unwrap(), schema);
        assert_eq!(text.matches("max_values").count(), 1, "of no other feature: {text}");
        schema.counters[0].key = vec!["likes".into()];
        let refused = schema.validate().unwrap_err().to_string();
        assert!(refused.contains("no id column of one value is called `likes`"), "{refused}");
    }

    #[test]
    fn what_only_training_knows_is_of_the_context_and_in_no_counter() {
        let position = |kind| Feature { training_only: true, ..Feature::new("position", kind) };
        let mut schema = schema();
        assert!(schema.training_only_columns().is_empty());
        schema.context_features.push(position(FeatureKind::Dense));
        schema.user_features[0].optional = true;
        schema.validate().unwrap();
        let columns = schema.feature_columns();
        assert_eq!(columns[columns.len() - 2..], ["age_missing", "position_missing"]);
        let TrainingOnlyColumns { ids, numbers, missing } = schema.training_only_columns();
        assert_eq!((ids, numbers, missing), (vec![], vec![1], vec![columns.len() - 1]));
        schema.context_features[0].kind = FeatureKind::Categorical;
        schema.validate().unwrap();
        let TrainingOnlyColumns { ids, numbers, missing } = schema.training_only_columns();
        assert_eq!((ids, numbers, missing), (vec![5], vec![], vec![]));
        let retired = Schema { retired: vec!["position".into()], ..schema.clone() };
        assert!(retired.training_only_columns().is_empty(), "it is missing in training, too");
        schema.counters[0].key.push("position".into());
        let refused = schema.validate().unwrap_err().to_string();
        assert!(refused.contains("counter `user_click`: `position` of its key"), "{refused}");
        schema.counters.clear();
        schema.item_features.push(position(FeatureKind::Dense));
        schema.context_features.clear();
        let refused = schema.validate().unwrap_err().to_string();
        assert!(refused.contains("only a context feature can be `training_only`"), "{refused}");
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        assert!(
            refused(|s| s.actions.push("click".into())).contains("action `click` appears twice")
        );
        assert!(
            refused(|s| s.tasks[0].label = "buy".into())
                .contains("task `click`: no label is called `buy`; there are: click")
        );
        assert!(
            refused(|s| s.tasks[0].surfaces.push("home".into()))
                .contains("no surface is called `home`")
        );
        assert!(
            refused(|s| s.counters[0].key.push("author".into()))
                .contains("no id column of one value is called `author`")
        );
        assert!(
            refused(|s| s.counters[0].action = "buy".into()).contains("no action is called `buy`")
        );
        assert!(refused(|s| s.item_features[0].name = "tae".into()).contains("column `tae`"));
        assert!(
            refused(|s| s.actions.extend((0..64).map(|i| format!("a{i}"))))
                .contains("65 actions, at most 64")
        );
        assert!(
            refused(|s| s.values.extend((0..9).map(|i| format!("v{i}"))))
                .contains("10 values, at most 8")
        );
        assert!(
            refused(|s| s.ranges[0].name = "tag".into())
                .contains("range `tag`: no value or dense feature is called `tag`")
        );
        assert!(refused(|s| s.ranges[0].high = f32::NAN).contains("range `watch`: 0.1 to NaN"));
        assert!(refused(|s| s.ranges[1].name = "watch".into()).contains("appears twice"));
        assert!(
            refused(|s| s.user_features[0].max_values = Some(4))
                .contains("feature `age`: only a categorical feature has `max_values`")
        );
        assert!(
            refused(|s| s.item_features[0].max_values = Some(33))
                .contains("feature `tag`: max_values is 33; it must be 2 to 32")
        );
        assert!(
            refused(|s| {
                s.user_features.push(Feature::tags("likes", 3));
                s.item_features.push(Feature::new("likes_2", FeatureKind::Categorical));
            })
            .contains("column `likes_2` appears twice")
        );
        assert!(refused(|s| s.tasks.clear()).contains("at least one surface and one task"));
    }

    #[test]
    fn unknown_keys_are_refused_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("schema.toml");
        std::fs::write(&path, "surfaces = ['a']\nactions = ['c']\ntasks = []\ncolour = 1\n")
            .unwrap();
        let message = Schema::load(&path).unwrap_err().to_string();
        assert!(message.contains("schema.toml") && message.contains("colour"), "{message}");
    }

    #[test]
    fn categories_have_stable_ids() {
        assert_eq!(category_id(""), 0);
        assert_eq!(category_id("39"), 39);
        assert_eq!(category_id(" 39 "), 39);
        assert_ne!(category_id("0"), 0);
        assert_eq!(category_id("a"), 0xaf63_dc4c_8601_ec8c & i64::MAX as u64);
    }
}
