//! What a foundation model is told of a schema, and how that has grown with it.

use hypercast_fm::growth::SpecGrowth;
use hypercast_fm::spec::{FmSpec, TaskLabel, TaskSpec};

use super::upgrade::places;
use super::{BUILT_IN_IDS, FeatureKind, MissingColumns, Schema, Task, TaskKind, TaskRole, names};
use crate::error::{Error, Result};

/// What the FM is told of a schema; main tasks come first.
pub fn fm_spec(schema: &Schema) -> Result<FmSpec> {
    let mut tasks = schema.tasks.iter().collect::<Vec<_>>();
    tasks.sort_by_key(|task| task.role != TaskRole::Main);
    let task_spec = |task: &Task| {
        let (name, label) = (&task.name, &task.label);
        let found = match task.kind {
            TaskKind::Binary => schema.action(label).map(TaskLabel::Action),
            TaskKind::Regression => schema.value(label).map(TaskLabel::Value),
        };
        let missing = || format!("task {name:?}: no label {label:?}");
        let serves = |surface: &String| task.surfaces.is_empty() || task.surfaces.contains(surface);
        Ok(TaskSpec {
            name: name.clone(),
            main: task.role == TaskRole::Main,
            label: found.ok_or_else(|| Error::Schema(missing()))?,
            transform: task.transform,
            surfaces: schema.surfaces.iter().map(serves).collect(),
            weight: task.weight,
        })
    };
    let categories = |features| names(features, FeatureKind::Categorical).len();
    let item_ids = categories(&schema.item_features);
    // The user's and the request's categories stand after the built-in ones and the item's.
    let first = BUILT_IN_IDS.len() + item_ids;
    let profile = categories(&schema.user_features) + categories(&schema.context_features);
    let item_dense = names(&schema.item_features, FeatureKind::Dense).len();
    let optional = MissingColumns::new(schema);
    let spec = FmSpec {
        surfaces: schema.surfaces.clone(),
        actions: schema.actions.len(),
        values: schema.values.len(),
        item_ids,
        item_dense,
        // Dense features of items come first among all.
        item_optional: optional.optional().iter().copied().filter(|&at| at < item_dense).collect(),
        features: schema.feature_columns().len(),
        profile_ids: (first..first + profile).collect(),
        content: 0,
        training_only: schema.training_only_columns(),
        tasks: tasks.into_iter().map(task_spec).collect::<Result<_>>()?,
    };
    spec.validate()?;
    Ok(spec)
}

/// From what models of each earlier layout of a schema were made for to what it is now.
///
/// # Errors
/// As [`fm_spec`].
pub fn spec_growths(schema: &Schema) -> Result<Vec<SpecGrowth>> {
    let (to, ids, features) = (fm_spec(schema)?, schema.id_columns(), schema.feature_columns());
    let growth = |layout: Schema| {
        let from = fm_spec(&layout)?;
        // A profile's columns are the last of the id columns, here as there.
        let (was, is) = (from.profile_ids.first(), to.profile_ids.first());
        let profiles =
            places(&layout.id_columns(), &ids).split_off(was.copied().unwrap_or_default());
        let first = is.copied().unwrap_or_default();
        Ok(SpecGrowth {
            profiles: match was {
                Some(_) => profiles.iter().map(|place| place - first).collect(),
                None => Vec::new(),
            },
            features: places(&layout.feature_columns(), &features),
            to: to.clone(),
            from,
        })
    };
    schema.layouts().skip(1).map(growth).collect()
}
