//! Rows of a log as impressions.

use std::borrow::Cow;
use std::collections::BTreeMap;

use hypercast_data::dataset::Impression;
use hypercast_data::dataset::ids::id_key;
use hypercast_data::schema::Schema;
use hypercast_fm::example::{MAX_VALUES, Outcome};

use super::source::{ActionSource, ColumnList, FeatureSources, NumberSource, Source, TimeSource};
use super::{ImpressionMapping, Mapping};
use crate::cell::{Cell, TimeUnit};
use crate::error::Result;
use crate::id_collector::IdCollector;
use crate::input::{InputFile, Row};
use crate::report::{RowError, RowFailure};

/// The columns of a log.
pub(super) struct ImpressionSources {
    pub(super) columns: ColumnList,
    user: Source,
    item: Source,
    surface: Option<Source>,
    /// Surfaces by what the column says.
    surfaces: BTreeMap<String, u16>,
    surface_default: Option<u16>,
    time: TimeSource,
    request: Option<Source>,
    /// Whether rows without a request's id are requests by their time.
    has_window: bool,
    outcome_time: Option<TimeSource>,
    outcome_delay_ms: Option<i64>,
    actions: Vec<ActionSource>,
    values: Vec<NumberSource>,
    pub(super) context: FeatureSources,
}

/// Collects the ids of both kinds.
pub(super) struct IdCollectors {
    pub(super) users: IdCollector,
    pub(super) items: IdCollector,
}

/// A number of seconds in milliseconds.
pub(super) fn to_ms(seconds: f64) -> i64 {
    (seconds * 1e3) as i64
}

/// The key of a request's id: a whole number is its own, so that it is the same in any file.
fn request_key(id: &str) -> u64 {
    let is_number = !id.starts_with('0') && id.bytes().all(|byte| byte.is_ascii_digit());
    let number = id.parse().ok().filter(|_| is_number);
    number.unwrap_or_else(|| id_key(id).key)
}

impl ImpressionMapping {
    pub(crate) fn find_files(&self, mapping: &Mapping) -> Result<Vec<InputFile>> {
        InputFile::find(&self.files, &mapping.folder, &self.options)
    }
}

impl ImpressionSources {
    pub(super) fn new(mapping: &Mapping, schema: &Schema) -> ImpressionSources {
        let of = &mapping.impressions;
        let mut columns = ColumnList::default();
        let mut surfaces: BTreeMap<String, u16> =
            mapping.surfaces.iter().cloned().zip(0..).collect();
        let index = |name: &String| schema.surface(name).expect("the mapping was checked");
        surfaces.extend(of.surface_map.iter().map(|(from, to)| (from.clone(), index(to))));
        let time = |column: &String, unit: TimeUnit, columns: &mut ColumnList| TimeSource {
            source: columns.source(column),
            unit,
            without_zone: Default::default(),
        };
        let outcome_unit = of.outcome_unit.unwrap_or(of.time_unit);
        let outcome_time = of.outcome_time.as_ref();
        ImpressionSources {
            user: columns.source(&of.user),
            item: columns.source(&of.item),
            surface: of.surface.as_ref().map(|column| columns.source(column)),
            surfaces,
            surface_default: of.surface_default.as_ref().map(index),
            time: time(&of.time, of.time_unit, &mut columns),
            request: of.request.as_ref().map(|column| columns.source(column)),
            has_window: of.request_within_s.is_some(),
            outcome_time: outcome_time.map(|column| time(column, outcome_unit, &mut columns)),
            outcome_delay_ms: of.outcome_delay_s.map(to_ms),
            actions: mapping.actions.iter().map(|of| ActionSource::new(of, &mut columns)).collect(),
            values: mapping
                .values
                .iter()
                .map(|of| NumberSource::of_value(of, &mut columns))
                .collect(),
            context: FeatureSources::new(&mapping.context_features, &mut columns),
            columns,
        }
    }

    /// How many impressions had a time without a zone so far.
    pub(super) fn times_without_zone(&self) -> u64 {
        self.time.without_zone.get()
    }

    /// Fills in the impression of a row. Its `request` is the key of the request's id in the file,
    /// or 0 if it has none.
    pub(super) fn read(
        &self,
        row: &dyn Row,
        ids: &mut IdCollectors,
        into: &mut Impression,
    ) -> std::result::Result<(), RowFailure> {
        into.user = self.user.id(row, &mut ids.users)?;
        into.item = self.item.id(row, &mut ids.items)?;
        into.time_ms = self.time.required(row)?;
        let mut outcome = Outcome { actions: 0, known: 0, values: [f32::NAN; MAX_VALUES] };
        for (bit, action) in self.actions.iter().enumerate() {
            if let Some(happened) = action.read(row)? {
                outcome.known |= 1 << bit;
                outcome.actions |= u64::from(happened) << bit;
            }
        }
        for (value, source) in outcome.values.iter_mut().zip(&self.values) {
            *value = source.read(row)?;
        }
        into.outcome = outcome;
        into.request = self.request(row)?;
        into.outcome_ms = self.outcome_ms(row, into.time_ms)?;
        into.surface = self.surface(row)?;
        Ok(self.context.read(row, &mut into.context)?)
    }

    fn surface(&self, row: &dyn Row) -> std::result::Result<u16, RowError> {
        let Some(source) = &self.surface else { return Ok(0) };
        let cell = source.cell(row);
        let text: Option<Cow<'_, str>> = source.checked(cell.category())?;
        let found = text.as_ref().and_then(|text| self.surfaces.get(text.as_ref()).copied());
        found.or(self.surface_default).ok_or_else(|| match text {
            None => {
                source.bad("it is missing; `surface_default` says where such rows belong".into())
            }
            Some(text) => source.bad(format!(
                "`{text}` is no surface; add it to `surfaces` or `surface_map`, or set \
                 `surface_default`"
            )),
        })
    }

    fn request(&self, row: &dyn Row) -> std::result::Result<u64, RowError> {
        let Some(source) = &self.request else { return Ok(0) };
        let cell = source.cell(row);
        if let Cell::Integer(number) = cell
            && let Ok(key @ 1..) = u64::try_from(number)
        {
            return Ok(key);
        }
        match source.checked(cell.text())? {
            Some(text) => Ok(request_key(&text)),
            None if self.has_window => Ok(0),
            None => Err(source.bad(
                "it is missing; with `request_within_s`, such rows are requests by their time"
                    .to_owned(),
            )),
        }
    }

    fn outcome_ms(&self, row: &dyn Row, time_ms: i64) -> std::result::Result<i64, RowError> {
        let later = self.outcome_delay_ms.map(|delay_ms| time_ms.saturating_add(delay_ms));
        let Some(column) = &self.outcome_time else {
            return Ok(later.expect("the mapping was checked"));
        };
        let bad = |reason: String| Err(column.source.bad(reason));
        match (column.read(row)?, later) {
            (Some(outcome_ms), _) if outcome_ms < time_ms => {
                bad(format!("`{outcome_ms}` ms is before the impression, at {time_ms} ms"))
            }
            (Some(outcome_ms), _) | (None, Some(outcome_ms)) => Ok(outcome_ms),
            (None, None) => {
                bad("it is missing; `outcome_delay_s` says when such rows are known".to_owned())
            }
        }
    }
}
