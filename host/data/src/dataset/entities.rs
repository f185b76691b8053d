//! `items.parquet` and `users.parquet`: an id, a name for people (items only),
//! and one column a feature.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use hypercast_fm::example::{Item, User};

use super::Entities;
use super::table::{Column, Field, Kind, TableReader, TableWriter, Values};
use crate::error::Result;
use crate::schema::{Feature, FeatureKind, Schema, names};

/// Items and their names, by id.
pub(super) type Items = (HashMap<u64, Arc<Item>>, HashMap<u64, String>);

const ROWS_A_GROUP: usize = 1 << 16;

pub(super) fn write_items(path: &Path, entities: &Entities<'_>) -> Result<()> {
    let rows: Vec<Row<'_>> =
        entities.items.iter().map(|i| Row { id: i.id, ids: &i.ids, dense: &i.dense }).collect();
    let names = (!entities.item_names.is_empty()).then_some(entities.item_names);
    write(path, &entities.schema.item_features, &rows, names)
}

pub(super) fn write_users(path: &Path, entities: &Entities<'_>) -> Result<()> {
    let rows: Vec<Row<'_>> =
        entities.users.iter().map(|u| Row { id: u.id, ids: &u.ids, dense: &u.dense }).collect();
    write(path, &entities.schema.user_features, &rows, None)
}

pub(super) fn read_items(path: &Path, schema: &Schema) -> Result<Items> {
    let (mut items, mut item_names) = (HashMap::new(), HashMap::new());
    read(path, &schema.item_features, |id, ids, dense, name| {
        items.insert(id, Arc::new(Item { id, ids, dense, ..Item::default() }));
        if let Some(name) = name {
            item_names.insert(id, name);
        }
    })?;
    Ok((items, item_names))
}

pub(super) fn read_users(path: &Path, schema: &Schema) -> Result<HashMap<u64, Arc<User>>> {
    let mut users = HashMap::new();
    read(path, &schema.user_features, |id, ids, dense, _| {
        users.insert(id, Arc::new(User { id, ids, dense }));
    })?;
    Ok(users)
}

struct Row<'a> {
    id: u64,
    ids: &'a [u64],
    dense: &'a [f32],
}

fn fields(features: &[Feature], named: bool) -> Vec<Field> {
    let mut fields = vec![Field::new("id", Kind::U64)];
    fields.extend(named.then(|| Field::new("name", Kind::Text)));
    fields.extend(
        names(features, FeatureKind::Categorical)
            .into_iter()
            .map(|name| Field::new(name, Kind::U64)),
    );
    fields.extend(
        names(features, FeatureKind::Dense).into_iter().map(|name| Field::new(name, Kind::F32)),
    );
    fields
}

fn write(
    path: &Path,
    features: &[Feature],
    rows: &[Row<'_>],
    row_names: Option<&[String]>,
) -> Result<()> {
    let mut writer = TableWriter::create(path, fields(features, row_names.is_some()))?;
    let (cats, dense) = (
        names(features, FeatureKind::Categorical).len(),
        names(features, FeatureKind::Dense).len(),
    );
    for (index, chunk) in rows.chunks(ROWS_A_GROUP).enumerate() {
        let mut columns =
            vec![Column::scalars(Values::U64(chunk.iter().map(|row| row.id).collect()))];
        if let Some(row_names) = row_names {
            let start = index * ROWS_A_GROUP;
            columns.push(Column::scalars(Values::Text(
                row_names[start..start + chunk.len()].to_vec(),
            )));
        }
        columns.extend(
            (0..cats).map(|i| {
                Column::scalars(Values::U64(chunk.iter().map(|row| row.ids[i]).collect()))
            }),
        );
        columns.extend(
            (0..dense).map(|i| {
                Column::scalars(Values::F32(chunk.iter().map(|row| row.dense[i]).collect()))
            }),
        );
        writer.write(&columns)?;
    }
    writer.finish()
}

fn read(
    path: &Path,
    features: &[Feature],
    mut take: impl FnMut(u64, Vec<u64>, Vec<f32>, Option<String>),
) -> Result<()> {
    let reader = TableReader::open(path)?;
    let named = reader.has("name");
    let fields = fields(features, named);
    let first = 1 + usize::from(named);
    let split = first + names(features, FeatureKind::Categorical).len();
    for group in 0..reader.groups() {
        let columns = reader.read(group, &fields)?;
        for (row, &id) in columns[0].u64s().iter().enumerate() {
            let ids = columns[first..split].iter().map(|column| column.u64s()[row]).collect();
            let dense = columns[split..].iter().map(|column| column.f32s()[row]).collect();
            take(id, ids, dense, named.then(|| columns[1].texts()[row].clone()));
        }
    }
    Ok(())
}
