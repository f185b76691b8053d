//! The first rows of some files, column by column, as what a mapping could make of them.

use std::collections::{BTreeMap, HashSet};

use hypercast_core::progress::Progress;
use hypercast_data::schema::{IdKind, category_id, is_position_name};

use super::roles::{RATING, TIME, named};
use super::tags::{ListSample, TagProposal};
use crate::cell::{Cell, TimeUnit};
use crate::error::Result;
use crate::input::{InputFile, Reading};
use crate::report::ImportReport;

/// The most rows that are looked at.
const MAX_ROWS: usize = 200_000;

/// The most cells that are looked at, each of which takes some 16 bytes.
const MAX_CELLS: usize = 1 << 23;

/// The most different texts of a column that are counted one by one.
const MAX_COUNTED: usize = 200;

/// The most different marks of a rating: 0 to 10 in halves.
const MAX_MARKS: usize = 21;

/// The first rows of all files of one kind.
pub(super) struct Sample {
    pub(super) rows: usize,
    pub(super) columns: Vec<SampledColumn>,
}

/// A column of the sample.
#[derive(Debug, Clone, Default)]
pub(super) struct SampledColumn {
    pub(super) name: String,
    /// A number for each different cell; 0 for a missing one.
    pub(super) ids: Vec<u64>,
    /// The cells as numbers, times in milliseconds since 1970; NaN for all others.
    pub(super) numbers: Vec<f64>,
    pub(super) present: usize,
    flags: usize,
    integer_ids: usize,
    lists: usize,
    iso_times: usize,
    /// Numbers that look like times, by unit.
    units: BTreeMap<&'static str, usize>,
    /// Those of them that do so only in a column of times.
    of_the_nineties: usize,
    /// How often each text occurs; empty if there are too many.
    pub(super) counts: BTreeMap<String, usize>,
    is_counted: bool,
    /// What it would be as lists.
    as_lists: Vec<ListSample>,
}

impl Sample {
    /// Reads as many rows of each file, together at most [`MAX_ROWS`].
    ///
    /// # Errors
    /// A file cannot be read, or has other columns than the first.
    pub(super) fn read(files: &[InputFile]) -> Result<Sample> {
        let names = files[0].column_names()?;
        let rows = MAX_ROWS.min(MAX_CELLS / names.len().max(1)).div_ceil(files.len());
        let named = |name: &String| SampledColumn {
            name: name.clone(),
            is_counted: true,
            as_lists: super::tags::samples(),
            ..SampledColumn::default()
        };
        let mut columns: Vec<SampledColumn> = names.iter().map(named).collect();
        let (mut report, mut count) = (ImportReport::default(), 0);
        let bytes = files.iter().map(InputFile::size).sum::<Result<u64>>()?;
        let mut progress = Progress::start("look at bytes", bytes);
        for file in files {
            let mut reading = Reading::new(&names, &mut report, &mut progress);
            reading.most_rows = rows as u64;
            file.read(&mut reading, |row| {
                for (at, column) in columns.iter_mut().enumerate() {
                    column.add(row.cell(at));
                }
                count += 1;
                Ok(())
            })?;
        }
        progress.finish(&format!("the first {count} rows of {} files", files.len()));
        Ok(Sample { rows: count, columns })
    }

    /// A column by its name.
    pub(super) fn column(&self, name: &str) -> Option<&SampledColumn> {
        self.columns.iter().find(|column| column.name == name)
    }
}

impl SampledColumn {
    fn add(&mut self, cell: Cell<'_>) {
        let (mut id, mut number) = (0, f64::NAN);
        if cell != Cell::Missing {
            self.present += 1;
            self.lists += usize::from(matches!(cell, Cell::List(_)));
            self.as_lists.iter_mut().for_each(|sample| sample.add(&cell));
            let cell = cell.first(None);
            self.flags += usize::from(matches!(cell.flag(), Ok(Some(_))));
            self.integer_ids += usize::from(matches!(cell.integer_id(), Ok(Some(_))));
            if let Ok(Some(told)) = cell.number() {
                number = told;
                let early = || TimeUnit::of_the_nineties(told);
                let likely = TimeUnit::likely(told);
                if let Some(unit) = likely.or_else(early) {
                    *self.units.entry(unit.name()).or_default() += 1;
                    self.of_the_nineties += usize::from(likely.is_none());
                }
            } else if let Ok(Some(time_ms)) = cell.time_ms(TimeUnit::Iso) {
                self.iso_times += 1;
                number = time_ms as f64;
            }
            if let Ok(Some(text)) = cell.category() {
                id = category_id(&text).max(1);
                self.count(&text);
            }
        }
        self.ids.push(id);
        self.numbers.push(number);
    }

    fn count(&mut self, text: &str) {
        if !self.is_counted {
            return;
        }
        if let Some(count) = self.counts.get_mut(text) {
            *count += 1;
        } else if self.counts.len() < MAX_COUNTED {
            self.counts.insert(text.to_owned(), 1);
        } else {
            self.is_counted = false;
            self.counts.clear();
        }
    }

    /// Whether all cells that are not missing, of which there is one, are so.
    fn all(&self, count: usize) -> bool {
        self.present > 0 && count == self.present
    }

    pub(super) fn is_flag(&self) -> bool {
        self.all(self.flags) && !self.is_list()
    }

    pub(super) fn is_list(&self) -> bool {
        self.lists > 0
    }

    /// How to read it as several categories a cell, if it looks so.
    pub(super) fn tags(&self) -> Option<TagProposal> {
        super::tags::propose(&self.as_lists, self.different().len())
    }

    pub(super) fn is_number(&self) -> bool {
        self.all(self.numbers.iter().filter(|number| !number.is_nan()).count())
            && self.iso_times == 0
            && !self.is_list()
    }

    /// The unit of a column of times.
    pub(super) fn time_unit(&self) -> Option<TimeUnit> {
        if self.all(self.iso_times) {
            return Some(TimeUnit::Iso);
        }
        if self.of_the_nineties > 0 && named(&self.name, &TIME).is_none() {
            return None;
        }
        let units = [TimeUnit::S, TimeUnit::Ms, TimeUnit::Us, TimeUnit::Ns];
        let of = |unit: &TimeUnit| self.units.get(unit.name()).copied().unwrap_or_default();
        units.into_iter().find(|unit| self.is_number() && self.all(of(unit)))
    }

    /// Whether all ids are whole numbers.
    pub(super) fn id_kind(&self) -> IdKind {
        if self.all(self.integer_ids) { IdKind::Integer } else { IdKind::String }
    }

    /// Whether it is a number, and named as the place that an item had among those shown with it.
    pub(super) fn is_position(&self) -> bool {
        self.is_number() && self.is_whole() && is_position_name(&self.name)
    }

    /// Whether it is named as a judgement of the item, and has few numbers.
    pub(super) fn is_rating(&self) -> bool {
        let is_mark = |number: &f64| number.is_nan() || (0.0..=10.0).contains(number);
        let few = 3..=MAX_MARKS;
        named(&self.name, &RATING).is_some()
            && self.is_number()
            && few.contains(&self.different().len())
            && self.numbers.iter().all(is_mark)
    }

    pub(super) fn is_whole(&self) -> bool {
        self.numbers.iter().all(|number| number.is_nan() || number.fract() == 0.0)
    }

    pub(super) fn different(&self) -> HashSet<u64> {
        self.ids.iter().copied().filter(|&id| id != 0).collect()
    }

    /// The rows in which a flag is set, or a number is neither missing nor 0.
    pub(super) fn is_set(&self, row: usize) -> bool {
        !self.numbers[row].is_nan() && self.numbers[row] != 0.0
    }

    /// What of the column is worth a comment: type, range, missing share and different cells.
    pub(super) fn describe(&self) -> String {
        let rows = self.ids.len();
        let known = || self.numbers.iter().copied().filter(|number| !number.is_nan());
        let (least, most) = (known().fold(f64::MAX, f64::min), known().fold(f64::MIN, f64::max));
        let what = if self.is_list() {
            "lists".to_owned()
        } else if let Some(unit) = self.time_unit() {
            format!("times ({})", unit.name())
        } else if self.is_flag() {
            let set = (0..rows).filter(|&row| self.is_set(row)).count();
            format!("yes or no, {} yes", percent(set, self.present))
        } else if self.is_number() {
            format!("numbers, {least} to {most}")
        } else {
            "texts".to_owned()
        };
        let missing = percent(rows - self.present, rows);
        format!("{what}; {missing} missing; {} different", self.different().len())
    }
}

/// A share with two digits, or more where it is small.
pub(super) fn percent(part: usize, whole: usize) -> String {
    let share = 100.0 * part as f64 / whole.max(1) as f64;
    if share == 0.0 || share >= 1.0 { format!("{share:.0} %") } else { format!("{share:.2} %") }
}
