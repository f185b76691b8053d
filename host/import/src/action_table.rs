//! A file with a number for each item in each situation: with which probability a policy takes it,
//! or what reward a model expects of it.
//!
//! Its columns say what a situation is: `request`, by its number in `impressions.parquet`, and any
//! context feature of the schema. A row of the log has the numbers whose columns agree with it.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::Path;

use hypercast_core::progress::Progress;
use hypercast_data::dataset::Impression;
use hypercast_data::dataset::entity_id::TextId;
use hypercast_data::schema::{FeatureKind, IdKind, MISSING, Schema, category_id, columns_of};

use crate::cell::Cell;
use crate::error::{CommonErrors as _, Error, Result};
use crate::input::{InputFile, InputOptions, Reading, Row};
use crate::report::{ImportReport, RowError};

/// The most rows of a table, each of which takes some 20 to 100 bytes.
const MAX_ROWS: usize = 1 << 25;

/// The columns that every table has before those of its situation.
const FIXED: usize = 2;

/// A number of an item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActionNumber {
    /// The item's raw id, or the key of its text.
    pub item: u64,
    /// The content of the table's column.
    pub number: f64,
}

/// The numbers of a file's column by situation and item.
#[derive(Debug)]
pub struct ActionTable {
    key: Vec<KeyColumn>,
    /// Sorted by item.
    situations: HashMap<Box<[u64]>, Vec<ActionNumber>>,
}

/// A column that is part of a situation.
#[derive(Debug)]
struct KeyColumn {
    name: String,
    source: KeySource,
}

/// Where an impression has it.
#[derive(Debug, Clone, Copy)]
enum KeySource {
    Request,
    /// A column of the categorical context features.
    Category(usize),
    /// A column of the dense ones.
    Number(usize),
}

impl ActionTable {
    /// Reads the files that `pattern` names: `item`, the numbers in `column`, and the columns of
    /// the situation.
    ///
    /// # Errors
    /// A file cannot be read, has a column that means nothing, a row that cannot be used or is
    /// there twice, or a number outside of `range`.
    pub fn read(
        pattern: &str,
        column: &str,
        range: RangeInclusive<f64>,
        schema: &Schema,
    ) -> Result<ActionTable> {
        let files =
            InputFile::find(&[pattern.to_owned()], Path::new(""), &InputOptions::default())?;
        let key = key_columns(&files[0], column, schema)?;
        let fixed = ["item".to_owned(), column.to_owned()];
        let columns: Vec<String> =
            fixed.into_iter().chain(key.iter().map(|column| column.name.clone())).collect();
        let mut situations: HashMap<Box<[u64]>, Vec<ActionNumber>> = HashMap::new();
        let mut rows = 0;
        let mut report = ImportReport::default();
        let bytes = files.iter().map(InputFile::size).sum::<Result<u64>>()?;
        let mut progress = Progress::start("read actions, bytes", bytes);
        for file in &files {
            file.read(&mut Reading::new(&columns, &mut report, &mut progress), |row| {
                rows += 1;
                if rows > MAX_ROWS {
                    let reason = format!(
                        "it has more than {MAX_ROWS} rows; name situations by what the numbers \
                         depend on instead of by `request`"
                    );
                    return Err(Error::data(&file.path, reason).into());
                }
                let situation = key.iter().enumerate();
                let situation = situation
                    .map(|(at, column)| column.source.of_cell(row.cell(FIXED + at), &column.name))
                    .collect::<std::result::Result<Box<[u64]>, RowError>>()?;
                let action = action(row, column, &range, schema.ids.items)?;
                situations.entry(situation).or_default().push(action);
                Ok(())
            })?;
        }
        progress.finish(&format!("{rows} actions in {} situations", situations.len()));
        if let Some(bad) = report.first_bad_rows.first() {
            let reason = format!(
                "line {}, column `{}`: {}; {} rows are like this, and none may be",
                bad.line, bad.column, bad.reason, report.bad_rows
            );
            return Err(Error::data(&bad.file, reason));
        }
        let mut table = ActionTable { key, situations };
        table.sort().map_err(|reason| Error::data(pattern, reason))?;
        Ok(table)
    }

    /// The numbers of an impression's situation by item, sorted; none if the file does not have it.
    pub fn of(&self, impression: &Impression) -> Option<&[ActionNumber]> {
        let key: Box<[u64]> =
            self.key.iter().map(|column| column.source.of_impression(impression)).collect();
        self.situations.get(&key).map(Vec::as_slice)
    }

    /// The numbers of each situation, in no order.
    pub fn situations(&self) -> impl Iterator<Item = &[ActionNumber]> {
        self.situations.values().map(Vec::as_slice)
    }

    /// The columns that say what a situation is, in words.
    pub fn key(&self) -> String {
        let names: Vec<&str> = self.key.iter().map(|column| column.name.as_str()).collect();
        if names.is_empty() { "nothing".into() } else { names.join(", ") }
    }

    fn sort(&mut self) -> std::result::Result<(), String> {
        let key = self.key();
        for actions in self.situations.values_mut() {
            actions.sort_unstable_by_key(|action| action.item);
            if let Some(pair) = actions.windows(2).find(|pair| pair[0].item == pair[1].item) {
                return Err(format!(
                    "two rows are of the item {} in one situation; a situation is told by {key}, \
                     and may be told by `request` and any context feature",
                    pair[0].item
                ));
            }
        }
        Ok(())
    }
}

/// The columns of a file besides `item` and `column`.
fn key_columns(file: &InputFile, column: &str, schema: &Schema) -> Result<Vec<KeyColumn>> {
    let categories = columns_of(&schema.context_features, FeatureKind::Categorical);
    let numbers = columns_of(&schema.context_features, FeatureKind::Dense);
    let at = |names: &[String], name: &String| names.iter().position(|other| other == name);
    let names = file.column_names()?.into_iter().filter(|name| name != "item" && name != column);
    names
        .map(|name| {
            let source = if name == "request" {
                KeySource::Request
            } else if let Some(at) = at(&categories, &name) {
                KeySource::Category(at)
            } else if let Some(at) = at(&numbers, &name) {
                KeySource::Number(at)
            } else {
                let known = [&categories[..], &numbers[..]].concat().join(", ");
                let reason = format!(
                    "column `{name}` is neither `item`, `{column}` nor `request`, and no context \
                     feature, of which there are: {known}; leave it out"
                );
                return Err(Error::data(&file.path, reason));
            };
            Ok(KeyColumn { name, source })
        })
        .collect()
}

fn action(
    row: &dyn Row,
    column: &str,
    range: &RangeInclusive<f64>,
    ids: IdKind,
) -> std::result::Result<ActionNumber, RowError> {
    let of_item = |reason: String| RowError { column: "item".into(), reason };
    let of_number = |reason: String| RowError { column: column.into(), reason };
    let item = match ids {
        IdKind::Integer => row.cell(0).integer_id(),
        IdKind::String => row.cell(0).text().and_then(|text| {
            text.map(|text| TextId::new(&text).map(|id| id.key().key)).transpose()
        }),
    };
    let item = item.map_err(of_item)?.ok_or_else(|| of_item("it is missing".into()))?;
    let number = row.cell(1).number().map_err(of_number)?;
    let number = number.ok_or_else(|| of_number("it is missing".into()))?;
    if !range.contains(&number) {
        let reason = format!("`{number}` is not from {} to {}", range.start(), range.end());
        return Err(of_number(reason));
    }
    Ok(ActionNumber { item, number })
}

impl KeySource {
    fn of_cell(self, cell: Cell<'_>, column: &str) -> std::result::Result<u64, RowError> {
        let number = match self {
            KeySource::Request => {
                cell.integer_id().and_then(|id| id.ok_or_else(|| "it is missing".to_owned()))
            }
            KeySource::Category(_) => {
                cell.category().map(|text| text.map_or(0, |text| category_id(&text)))
            }
            KeySource::Number(_) => {
                cell.float().map(|number| number_key(number.unwrap_or(MISSING)))
            }
        };
        number.map_err(|reason| RowError { column: column.to_owned(), reason })
    }

    fn of_impression(self, impression: &Impression) -> u64 {
        match self {
            KeySource::Request => impression.request,
            KeySource::Category(at) => impression.context.ids.get(at).copied().unwrap_or(0),
            KeySource::Number(at) => {
                number_key(impression.context.dense.get(at).copied().unwrap_or(MISSING))
            }
        }
    }
}

/// Equal for equal numbers, and for missing ones.
fn number_key(number: f32) -> u64 {
    // 0 is added because of -0.
    if number.is_nan() { u64::MAX } else { u64::from((number + 0.0).to_bits()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requests::no_row;
    use hypercast_data::dataset::ContextFeatures;
    use hypercast_data::schema::Feature;
    use hypercast_data::simulate;

    /// A schema with the context features `place` and `slot`.
    fn schema() -> Schema {
        let mut schema = simulate::schema(1);
        schema.context_features = vec![
            Feature::new("place", FeatureKind::Categorical),
            Feature::new("slot", FeatureKind::Dense),
        ];
        schema
    }

    fn read(text: &str, schema: &Schema) -> Result<ActionTable> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.csv");
        std::fs::write(&path, text).unwrap();
        ActionTable::read(path.to_str().unwrap(), "probability", 0.0..=1.0, schema)
    }

    fn shown(request: u64, place: &str, slot: f32) -> Impression {
        let context = ContextFeatures { ids: vec![category_id(place)], dense: vec![slot] };
        Impression { request, context, ..no_row() }
    }

    #[test]
    fn a_row_has_the_numbers_whose_columns_agree_with_it() {
        let table = read("item,probability\n7,0.25\n3,0.75\n", &schema()).unwrap();
        let items = |table: &ActionTable, row: &Impression| {
            let actions = table.of(row)?.iter().map(|action| (action.item, action.number));
            Some(actions.collect::<Vec<_>>())
        };
        assert_eq!(items(&table, &shown(1, "top", 2.0)), Some(vec![(3, 0.75), (7, 0.25)]));
        assert_eq!(table.key(), "nothing");

        let text = "slot,item,probability,place,request\n1,3,1,top,5\n-0,4,1,top,5\n,5,1,,5\n";
        let table = read(text, &schema()).unwrap();
        assert_eq!(items(&table, &shown(5, "top", 1.0)), Some(vec![(3, 1.0)]));
        assert_eq!(items(&table, &shown(5, "top", 0.0)), Some(vec![(4, 1.0)]));
        assert_eq!(items(&table, &shown(5, "", f32::NAN)), Some(vec![(5, 1.0)]));
        assert_eq!(items(&table, &shown(6, "top", 1.0)), None);
        assert_eq!(table.situations().count(), 3);
    }

    #[test]
    fn items_may_be_texts() {
        let mut schema = schema();
        schema.ids.items = IdKind::String;
        let table = read("item,probability\nsku-1,1\n", &schema).unwrap();
        let key = TextId::new("sku-1").unwrap().key().key;
        let of = table.of(&shown(1, "", 0.0)).unwrap();
        assert_eq!(of, [ActionNumber { item: key, number: 1.0 }]);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_place() {
        for (text, words) in [
            ("item,probability\n1,0.5\n2,1.5\n", "line 3, column `probability`: `1.5` is not from"),
            ("item,probability\n1,0.5\nx,0.5\n", "line 3, column `item`: `x` is not a whole"),
            ("item,probability\n1,\n2,1\n", "line 2, column `probability`: it is missing"),
            ("item,probability,rank\n1,0.5,1\n", "column `rank` is neither"),
            ("item,probability\n1,0.5\n1,0.5\n", "two rows are of the item 1"),
            ("item,request,probability\n1,,0.5\n2,1,1\n", "column `request`: it is missing"),
            ("item,chance\n1,0.5\n", "column `chance` is neither"),
        ] {
            let error = read(text, &schema()).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("policy.csv"), "{error}");
        }
    }
}
