//! The columns that a mapping reads, and what it makes of their cells.

use std::borrow::Cow;
use std::cell::Cell as Counter;
use std::collections::BTreeMap;

use hypercast_data::dataset::{ContextFeatures, entity_id::check_text_id};
use hypercast_data::schema::{FeatureKind, MISSING, category_id, fill_tags};

use super::{ActionMapping, FeatureDefault, FeatureMapping, ListChoice, ValueMapping};
use crate::cell::{Cell, CellResult, TimeUnit};
use crate::id_collector::IdCollector;
use crate::input::Row;
use crate::report::{ImportReport, RowError, RowFailure};

type RowResult<T> = std::result::Result<T, RowError>;

/// The columns to read of a file, each once.
#[derive(Debug, Clone, Default)]
pub(super) struct ColumnList {
    pub(super) names: Vec<String>,
}

impl ColumnList {
    /// The place of a column, which is added if it is new.
    pub(super) fn place(&mut self, column: &str) -> usize {
        self.names.iter().position(|name| name == column).unwrap_or_else(|| {
            self.names.push(column.to_owned());
            self.names.len() - 1
        })
    }

    pub(super) fn source(&mut self, column: &str) -> Source {
        Source { at: self.place(column), column: column.to_owned() }
    }
}

/// A column to read, by name and index.
#[derive(Debug, Clone)]
pub(super) struct Source {
    at: usize,
    column: String,
}

impl Source {
    pub(super) fn cell<'r>(&self, row: &'r dyn Row) -> Cell<'r> {
        row.cell(self.at)
    }

    /// What was read, or an error that names the column.
    pub(super) fn checked<T>(&self, read: CellResult<T>) -> RowResult<Option<T>> {
        read.map_err(|reason| self.bad(reason))
    }

    /// What was read of a cell that may not be missing.
    pub(super) fn required<T>(&self, read: CellResult<T>) -> RowResult<T> {
        self.checked(read)?.ok_or_else(|| self.bad("it is missing".to_owned()))
    }

    /// The id in a row, or the key of the text that it is.
    pub(super) fn id(
        &self,
        row: &dyn Row,
        ids: &mut IdCollector,
    ) -> std::result::Result<u64, RowFailure> {
        let cell = self.cell(row);
        if !ids.takes_texts() {
            return Ok(self.required(cell.integer_id())?);
        }
        let text = self.required(cell.text())?;
        check_text_id(&text).map_err(|reason| self.bad(reason))?;
        Ok(ids.add(&text)?)
    }

    pub(super) fn bad(&self, reason: String) -> RowError {
        RowError { column: self.column.clone(), reason }
    }
}

/// Takes the first element of a list.
#[derive(Debug, Clone, Copy)]
struct FirstOfList {
    /// What is between two elements of a list that is a text.
    separator: Option<char>,
}

impl FirstOfList {
    fn of(mapping: &FeatureMapping) -> Option<FirstOfList> {
        let ListChoice::First = mapping.list?;
        Some(FirstOfList { separator: mapping.separator })
    }

    /// The cell of a column, or the first element of it.
    fn cell<'r>(list: Option<FirstOfList>, source: &Source, row: &'r dyn Row) -> Cell<'r> {
        let cell = source.cell(row);
        match list {
            Some(list) => cell.first(list.separator),
            None => cell,
        }
    }
}

/// The column of a time.
#[derive(Debug, Clone)]
pub(super) struct TimeSource {
    pub(super) source: Source,
    pub(super) unit: TimeUnit,
    /// Times so far that were texts without a zone.
    pub(super) without_zone: Counter<u64>,
}

impl TimeSource {
    pub(super) fn read(&self, row: &dyn Row) -> RowResult<Option<i64>> {
        self.source.checked(self.source.cell(row).time_ms(self.unit))
    }

    pub(super) fn required(&self, row: &dyn Row) -> RowResult<i64> {
        let cell = self.source.cell(row);
        let time_ms = self.source.required(cell.time_ms(self.unit))?;
        self.without_zone.update(|count| count + u64::from(cell.lacks_zone()));
        Ok(time_ms)
    }
}

/// The column of an action, and when it says that the action happened.
#[derive(Debug, Clone)]
pub(super) struct ActionSource {
    source: Source,
    /// The least and the greatest number with which it happened, if numbers say so.
    range: Option<[f64; 2]>,
    one_of: Vec<String>,
    default: Option<bool>,
}

impl ActionSource {
    pub(super) fn new(mapping: &ActionMapping, columns: &mut ColumnList) -> ActionSource {
        ActionSource {
            source: columns.source(mapping.column.as_ref().unwrap_or(&mapping.name)),
            range: mapping.range(),
            one_of: mapping.one_of.clone(),
            default: mapping.default,
        }
    }

    /// Whether the action happened; none if that is not known.
    pub(super) fn read(&self, row: &dyn Row) -> RowResult<Option<bool>> {
        let cell = self.source.cell(row);
        let happened = match self.range {
            Some([least, most]) => {
                let number = self.source.checked(cell.number())?;
                number.map(|number| (least..=most).contains(&number))
            }
            None if self.one_of.is_empty() => self.source.checked(cell.flag())?,
            None => {
                let text = self.source.checked(cell.category())?;
                text.map(|text| self.one_of.iter().any(|one| *one == text))
            }
        };
        Ok(happened.or(self.default))
    }
}

/// The column of a number, with what bounds it and what stands for a missing one.
#[derive(Debug, Clone)]
pub(super) struct NumberSource {
    source: Source,
    default: f32,
    clip: Option<[f32; 2]>,
    log: bool,
    list: Option<FirstOfList>,
}

impl NumberSource {
    /// The column of a value, which is NaN where it is not known.
    pub(super) fn of_value(mapping: &ValueMapping, columns: &mut ColumnList) -> NumberSource {
        NumberSource {
            source: columns.source(mapping.column.as_ref().unwrap_or(&mapping.name)),
            default: mapping.default.map_or(f32::NAN, |default| default as f32),
            clip: mapping.clip,
            log: false,
            list: None,
        }
    }

    fn of_feature(mapping: &FeatureMapping, columns: &mut ColumnList) -> NumberSource {
        let default = match mapping.default {
            Some(FeatureDefault::Number(number)) => number as f32,
            _ => MISSING,
        };
        NumberSource {
            source: columns.source(mapping.column.as_ref().unwrap_or(&mapping.name)),
            default,
            clip: mapping.clip,
            log: mapping.log,
            list: FirstOfList::of(mapping),
        }
    }

    pub(super) fn read(&self, row: &dyn Row) -> RowResult<f32> {
        let cell = FirstOfList::cell(self.list, &self.source, row);
        let Some(number) = self.source.checked(cell.float())? else { return Ok(self.default) };
        let number = self.clip.map_or(number, |[low, high]| number.clamp(low, high));
        Ok(if self.log { logarithm(number) } else { number })
    }
}

/// What `log = true` makes of a number: 0 of one below 0.
pub(super) fn logarithm(number: f32) -> f32 {
    number.max(0.0).ln_1p()
}

/// The column of a category, or of several.
#[derive(Debug, Clone)]
struct CategorySource {
    source: Source,
    map: BTreeMap<String, u64>,
    default: u64,
    list: Option<FirstOfList>,
    tags: Option<TagSource>,
}

/// How a feature of several values is read.
#[derive(Debug, Clone)]
struct TagSource {
    feature: String,
    max_values: usize,
    separator: Option<char>,
    /// In how many rows there were more values.
    cut: Counter<u64>,
}

impl CategorySource {
    fn new(mapping: &FeatureMapping, columns: &mut ColumnList) -> CategorySource {
        let default = match &mapping.default {
            None => 0,
            Some(FeatureDefault::Text(text)) => category_id(text),
            Some(FeatureDefault::Number(number)) => category_id(&number.to_string()),
        };
        CategorySource {
            source: columns.source(mapping.column.as_ref().unwrap_or(&mapping.name)),
            map: mapping.map.iter().map(|(from, to)| (from.clone(), category_id(to))).collect(),
            default,
            list: FirstOfList::of(mapping),
            tags: mapping.max_values.map(|max_values| TagSource {
                feature: mapping.name.clone(),
                max_values,
                separator: mapping.separator,
                cut: Counter::new(0),
            }),
        }
    }

    /// Appends the ids of a row, as many as the feature has columns.
    fn read(&self, row: &dyn Row, ids: &mut Vec<u64>) -> RowResult<()> {
        let Some(TagSource { max_values, separator, cut, .. }) = &self.tags else {
            let cell = FirstOfList::cell(self.list, &self.source, row);
            ids.push(self.id(&cell)?.unwrap_or(self.default));
            return Ok(());
        };
        let first = ids.len();
        let mut all = Vec::new();
        for cell in self.source.cell(row).elements(*separator) {
            all.extend(self.id(&cell)?);
        }
        if all.is_empty() {
            all.push(self.default);
        }
        ids.resize(first + max_values, 0);
        if fill_tags(&mut ids[first..], all) {
            cut.set(cut.get() + 1);
        }
        Ok(())
    }

    /// The category of a cell; none if it is missing.
    fn id(&self, cell: &Cell<'_>) -> RowResult<Option<u64>> {
        let text: Option<Cow<'_, str>> = self.source.checked(cell.category())?;
        Ok(text
            .map(|text| self.map.get(text.as_ref()).copied().unwrap_or_else(|| category_id(&text))))
    }
}

/// The columns of some features.
#[derive(Debug, Clone)]
pub(super) struct FeatureSources {
    categorical: Vec<CategorySource>,
    dense: Vec<NumberSource>,
}

impl FeatureSources {
    pub(super) fn new(features: &[FeatureMapping], columns: &mut ColumnList) -> FeatureSources {
        let (mut categorical, mut dense) = (Vec::new(), Vec::new());
        for feature in features {
            match feature.kind {
                FeatureKind::Categorical => categorical.push(CategorySource::new(feature, columns)),
                FeatureKind::Dense => dense.push(NumberSource::of_feature(feature, columns)),
            }
        }
        FeatureSources { categorical, dense }
    }

    /// Replaces `features` by those of a row.
    pub(super) fn read(&self, row: &dyn Row, features: &mut ContextFeatures) -> RowResult<()> {
        let ContextFeatures { ids, dense } = features;
        ids.clear();
        for source in &self.categorical {
            source.read(row, ids)?;
        }
        dense.clear();
        for source in &self.dense {
            dense.push(source.read(row)?);
        }
        Ok(())
    }

    /// Reports in how many rows a feature had more values than it can have.
    pub(super) fn report_cut(&self, report: &mut ImportReport) {
        for TagSource { feature, cut, .. } in
            self.categorical.iter().filter_map(|of| of.tags.as_ref())
        {
            if cut.get() > 0 {
                *report.cut_values.entry(feature.clone()).or_default() += cut.take();
            }
        }
    }
}
