//! `items.parquet` and `users.parquet`: an id, a name for people (items only), and a column for
//! each feature.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use hypercast_fm::example::{Item, User};

use super::Entities;
use super::table::{CellType, Column, Field, TableReader, TableWriter};
use crate::error::Result;
use crate::schema::{ColumnDefaults, Feature, FeatureCounts, FeatureKind, Schema, columns_of};

/// Items and their names, by id.
pub(super) type ItemsAndNames = (HashMap<u64, Arc<Item>>, HashMap<u64, String>);

const ROWS_PER_GROUP: usize = 1 << 16;

/// An item or a user, for writing.
struct EntityRow<'a> {
    id: u64,
    ids: &'a [u64],
    dense: &'a [f32],
}

pub(super) fn write_items(path: &Path, entities: &Entities<'_>) -> Result<()> {
    let items = entities.items.iter();
    let rows: Vec<EntityRow<'_>> =
        items.map(|item| EntityRow { id: item.id, ids: &item.ids, dense: &item.dense }).collect();
    let names = (!entities.item_names.is_empty()).then_some(entities.item_names);
    write(path, &entities.schema.item_features, &rows, names)
}

pub(super) fn write_users(path: &Path, entities: &Entities<'_>) -> Result<()> {
    let users = entities.users.iter();
    let rows: Vec<EntityRow<'_>> =
        users.map(|user| EntityRow { id: user.id, ids: &user.ids, dense: &user.dense }).collect();
    write(path, &entities.schema.user_features, &rows, None)
}

pub(super) fn read_items(path: &Path, schema: &Schema) -> Result<ItemsAndNames> {
    let (mut items, mut item_names) = (HashMap::new(), HashMap::new());
    read(path, &schema.item_features, &ColumnDefaults::new(schema), |id, ids, dense, name| {
        items.insert(id, Arc::new(Item { id, ids, dense, ..Item::default() }));
        item_names.extend(name.map(|name| (id, name)));
    })?;
    Ok((items, item_names))
}

pub(super) fn read_users(path: &Path, schema: &Schema) -> Result<HashMap<u64, Arc<User>>> {
    let mut users = HashMap::new();
    read(path, &schema.user_features, &ColumnDefaults::new(schema), |id, ids, dense, _| {
        users.insert(id, Arc::new(User { id, ids, dense }));
    })?;
    Ok(users)
}

fn fields(features: &[Feature], named: bool) -> Vec<Field> {
    let mut fields = vec![Field::new("id", CellType::U64)];
    fields.extend(named.then(|| Field::new("name", CellType::Text)));
    fields.extend(columns_of(features, FeatureKind::Categorical).into_iter().map(Field::category));
    let dense = columns_of(features, FeatureKind::Dense).into_iter();
    fields.extend(dense.map(|name| Field::new(name, CellType::F32)));
    fields
}

fn write(
    path: &Path,
    features: &[Feature],
    rows: &[EntityRow<'_>],
    row_names: Option<&[String]>,
) -> Result<()> {
    let mut writer = TableWriter::create(path, fields(features, row_names.is_some()))?;
    let FeatureCounts { ids, dense } = FeatureCounts::of(features);
    for (index, chunk) in rows.chunks(ROWS_PER_GROUP).enumerate() {
        let mut columns = vec![Column::scalars(chunk.iter().map(|row| row.id))];
        columns.extend(row_names.map(|names| {
            let start = index * ROWS_PER_GROUP;
            Column::scalars(names[start..start + chunk.len()].iter().cloned())
        }));
        columns.extend((0..ids).map(|i| Column::scalars(chunk.iter().map(|row| row.ids[i]))));
        columns.extend((0..dense).map(|i| Column::scalars(chunk.iter().map(|row| row.dense[i]))));
        writer.write(&columns)?;
    }
    writer.finish()
}

/// Calls `add` with each row's id, categorical features, dense features and name.
fn read(
    path: &Path,
    features: &[Feature],
    defaults: &ColumnDefaults,
    mut add: impl FnMut(u64, Vec<u64>, Vec<f32>, Option<String>),
) -> Result<()> {
    let reader = TableReader::open(path)?;
    let named = reader.has("name");
    let fields = fields(features, named);
    let first = 1 + usize::from(named);
    let split = first + FeatureCounts::of(features).ids;
    for group in 0..reader.groups() {
        let columns = reader.read_grown(group, &fields, defaults)?;
        for (row, &id) in columns[0].u64s().iter().enumerate() {
            let ids = columns[first..split].iter().map(|column| column.u64s()[row]).collect();
            let dense = columns[split..].iter().map(|column| column.f32s()[row]).collect();
            add(id, ids, dense, named.then(|| columns[1].texts()[row].clone()));
        }
    }
    Ok(())
}
