//! What a foundation model is told of a schema, and how that has grown with it.

use hypercast_fm::growth::SpecGrowth;
use hypercast_fm::spec::{FmSpec, IdWidths, TaskLabel, TaskSpec};

use super::upgrade::places;
use super::{
    BUILT_IN_IDS, FeatureWidths, IdField, MissingColumns, Schema, Task, TaskKind, TaskRole,
};
use crate::error::{Error, Result};

/// What the FM is told of a schema: its core. Main tasks come first.
pub fn fm_spec(schema: &Schema) -> Result<FmSpec> {
    example_spec(&schema.core())
}

/// The same of the whole schema, which says what examples hold before the FM is shown their core.
pub fn example_spec(schema: &Schema) -> Result<FmSpec> {
    let mut tasks = schema.tasks.iter().collect::<Vec<_>>();
    tasks.sort_by_key(|task| task.role != TaskRole::Main);
    let FeatureWidths { item, user, context } = FeatureWidths::new(schema);
    // The user's and the request's categories stand after the built-in ones and the item's.
    let first = BUILT_IN_IDS.len() + item.ids;
    let profile = user.ids + context.ids;
    let optional = MissingColumns::new(schema);
    let spec = FmSpec {
        surfaces: schema.surfaces.clone(),
        actions: schema.actions.len(),
        values: schema.values.len(),
        item_ids: item.ids,
        item_dense: item.dense,
        // Dense features of items come first among all.
        item_optional: optional.optional().iter().copied().filter(|&at| at < item.dense).collect(),
        features: schema.feature_columns().len(),
        profile_ids: (first..first + profile).collect(),
        id_widths: IdWidths {
            item: widths(&IdField::of(&schema.item_features, 0)),
            profile: widths(&profile_fields(schema)),
        },
        content: 0,
        training_only: schema.training_only_columns(),
        alignments: Default::default(),
        tasks: tasks.into_iter().map(|task| task_spec(schema, task)).collect::<Result<_>>()?,
    };
    spec.validate()?;
    Ok(spec)
}

/// What the FM is told of a task.
pub(super) fn task_spec(schema: &Schema, task: &Task) -> Result<TaskSpec> {
    let (name, label) = (&task.name, &task.label);
    let found = match task.kind {
        TaskKind::Binary => schema.action(label).map(TaskLabel::Action),
        TaskKind::Regression => schema.value(label).map(TaskLabel::Value),
    };
    let missing = || format!("task {name:?}: no label {label:?}");
    Ok(TaskSpec {
        name: name.clone(),
        main: task.role == TaskRole::Main,
        label: found.ok_or_else(|| Error::Schema(missing()))?,
        transform: task.transform,
        surfaces: schema.surfaces.iter().map(|surface| task.is_valid_on(surface)).collect(),
        weight: task.weight,
    })
}

/// From what models of each layout of a schema were made for to what it is now. A model of the
/// present layout may differ, too, because a feature was retired since or is used again.
///
/// # Errors
/// As [`fm_spec`].
pub fn spec_growths(schema: &Schema) -> Result<Vec<SpecGrowth>> {
    let schema = &schema.core();
    let (to, features, profiles) = (example_spec(schema)?, schema.feature_columns(), names(schema));
    let growth = |layout: Schema| {
        Ok(SpecGrowth {
            from: example_spec(&layout)?,
            profiles: places(&names(&layout), &profiles),
            features: places(&layout.feature_columns(), &features),
            to: to.clone(),
        })
    };
    schema.layouts().map(growth).collect()
}

/// The categories of the user and the request.
fn profile_fields(schema: &Schema) -> Vec<IdField> {
    IdField::of(schema.user_features.iter().chain(&schema.context_features), 0)
}

fn names(schema: &Schema) -> Vec<String> {
    profile_fields(schema).into_iter().map(|field| field.name).collect()
}

/// As the FM has them: none if all are 1, as in models of before there were others.
fn widths(fields: &[IdField]) -> Vec<usize> {
    let widths: Vec<usize> = fields.iter().map(|field| field.columns.len()).collect();
    if widths.iter().all(|&width| width == 1) { Vec::new() } else { widths }
}
