//! The columns that a guest reads in a call: those of `rank`, and those of the training hooks.
//!
//! They are resolved once, when a plugin is loaded, and hold what the request or the log says, not
//! what the network makes of it. A number that is missing is 0, as rules of earlier releases
//! expect; a column `NAME_missing` tells the two apart. Of several values it is the first. Where an
//! item was ranked is NaN if nobody knows: 0 is the first position.

use std::mem::size_of;
use std::sync::Arc;

use hypercast_data::ranked_place::RankedPlace;
use hypercast_fm::example::{Example, Target};

use super::batch::{ColumnSource, known, vector_of};
use super::fm_rows::{FmRows, FmTask, Tae};
use super::wasm::contract::{Column, Data, NamedColumn, WireColumn};

/// How many rows are read for one column after the other, so that they stay in the processor's
/// nearest cache meanwhile: a row has its features and ids in two places.
const BLOCK_ROWS: usize = 32;

/// The columns of a guest's function.
#[derive(Debug, Clone)]
pub(crate) struct GuestColumns {
    columns: Vec<(WireColumn, ColumnSource)>,
    tae_dim: usize,
    fm_tasks: Arc<[FmTask]>,
}

/// A request of a call.
#[derive(Debug, Clone, Copy)]
pub struct GuestRequest<'a> {
    /// The request with its rows.
    pub example: &'a Example,
    /// What the FM says of the rows.
    pub fm: FmRows<'a>,
    /// Where each row's item was ranked before it was shown; empty if nothing is known of any.
    pub ranked: &'a [Option<RankedPlace>],
}

/// The rows of a request as a guest sees them.
#[derive(Clone, Copy)]
pub(crate) struct GuestRows<'a> {
    pub(crate) targets: &'a [Target],
    pub(crate) time_ms: i64,
    pub(crate) fm: FmRows<'a>,
    pub(crate) ranked: &'a [Option<RankedPlace>],
}

impl<'a> GuestRequest<'a> {
    pub(crate) fn rows(&self) -> GuestRows<'a> {
        let GuestRequest { example, fm, ranked } = *self;
        GuestRows { targets: &example.targets, time_ms: example.time_ms, fm, ranked }
    }
}

impl GuestColumns {
    /// Those of a description, with where their values are.
    pub(crate) fn new<'a>(
        columns: impl Iterator<Item = (&'a Column, ColumnSource)>,
        tae_dim: usize,
        fm_tasks: &Arc<[FmTask]>,
    ) -> GuestColumns {
        let columns = columns.map(|(own, at)| (own.wire(), at)).collect();
        GuestColumns { columns, tae_dim, fm_tasks: fm_tasks.clone() }
    }

    pub(crate) fn sources(&self) -> impl Iterator<Item = &ColumnSource> {
        self.columns.iter().map(|(_, source)| source)
    }

    pub(crate) fn has(&self, source: ColumnSource) -> bool {
        self.sources().any(|own| *own == source)
    }

    /// The bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        let of = |source: &ColumnSource| match source {
            ColumnSource::Tae => self.tae_dim * size_of::<f32>(),
            ColumnSource::Vector(width) => width * size_of::<f32>(),
            _ => size_of::<u64>(),
        };
        self.columns.iter().map(|(_, source)| of(source)).sum()
    }

    /// The values of all rows of some requests.
    pub(crate) fn values(&self, requests: &[GuestRows]) -> Vec<NamedColumn> {
        let named = |(column, source): &(WireColumn, ColumnSource)| NamedColumn {
            column: column.clone(),
            data: self.data(*source, requests),
        };
        let mut columns: Vec<NamedColumn> = self.columns.iter().map(named).collect();
        for targets in requests.iter().flat_map(|request| request.targets.chunks(BLOCK_ROWS)) {
            for ((_, source), column) in self.columns.iter().zip(&mut columns) {
                match (*source, &mut column.data) {
                    (ColumnSource::Feature(index), Data::Numbers(all)) => {
                        all.extend(targets.iter().map(|target| known(target.features[index])));
                    }
                    (ColumnSource::Id(ids), Data::Ids(all)) => {
                        all.extend(targets.iter().map(|target| target.ids[ids.first]));
                    }
                    _ => {}
                }
            }
        }
        columns
    }

    /// The values of a column; of a feature or id, room for them.
    fn data(&self, source: ColumnSource, requests: &[GuestRows]) -> Data {
        match source {
            ColumnSource::Tae => Data::Numbers(self.taes(requests)),
            ColumnSource::Feature(_) => Data::Numbers(Vec::with_capacity(rows(requests))),
            ColumnSource::Id(_) => Data::Ids(Vec::with_capacity(rows(requests))),
            ColumnSource::Vector(width) => {
                let mut vectors = Vec::with_capacity(rows(requests) * width);
                let targets = requests.iter().flat_map(|request| request.targets);
                targets.for_each(|Target { item, .. }| vector_of(item, width, &mut vectors));
                Data::Numbers(vectors)
            }
            ColumnSource::FmLogit(task) => Data::Numbers(self.fm_logits(task, requests)),
            ColumnSource::Time => Data::Integers(of_requests(requests, |_, own| own.time_ms)),
            ColumnSource::Request => Data::Integers(of_requests(requests, |at, _| at as i64)),
            ColumnSource::RankedPosition => {
                Data::Numbers(of_places(requests, |place| Some(place.position as f32)))
            }
            ColumnSource::RankedPropensity => {
                Data::Numbers(of_places(requests, |place| place.propensity))
            }
            ColumnSource::RawFeature(_)
            | ColumnSource::HistoryItem
            | ColumnSource::HistorySurface
            | ColumnSource::HistoryItemFeature(_)
            | ColumnSource::HistoryActions
            | ColumnSource::HistoryAge => {
                unreachable!("networks alone read them: see `Column::check_reader`")
            }
        }
    }

    fn taes(&self, requests: &[GuestRows]) -> Vec<f32> {
        let mut taes = Vec::new();
        for GuestRows { targets, fm, .. } in requests {
            match fm.tae {
                Tae::Rows(rows) => taes.extend_from_slice(rows),
                Tae::Without => {
                    taes.resize(taes.len() + targets.len() * self.tae_dim, 0.0);
                }
            }
        }
        taes
    }

    /// The FM's prediction of a main task, for each row.
    fn fm_logits(&self, task: usize, requests: &[GuestRows]) -> Vec<f32> {
        let mut all = Vec::new();
        for GuestRows { targets, fm, .. } in requests {
            let rows = all.len() + targets.len();
            let own = fm.predictions_of(task, targets.len(), self.fm_tasks.len());
            all.extend(own.map(|prediction| self.fm_tasks[task].for_guest(prediction)));
            all.resize(rows, 0.0);
        }
        all
    }
}

/// A number of where each row was ranked, NaN where that is not known.
fn of_places(requests: &[GuestRows], number: impl Fn(&RankedPlace) -> Option<f32>) -> Vec<f32> {
    let of = |GuestRows { targets, ranked, .. }: &GuestRows| -> Vec<f32> {
        let place = |row: usize| ranked.get(row).and_then(Option::as_ref);
        let rows = 0..targets.len();
        rows.map(|row| place(row).and_then(&number).unwrap_or(f32::NAN)).collect()
    };
    requests.iter().flat_map(of).collect()
}

fn rows(requests: &[GuestRows]) -> usize {
    requests.iter().map(|request| request.targets.len()).sum()
}

/// A value of each request, once for each of its rows.
fn of_requests(requests: &[GuestRows], value: impl Fn(usize, &GuestRows) -> i64) -> Vec<i64> {
    let of = |(at, request): (usize, &GuestRows)| {
        std::iter::repeat_n(value(at, request), request.targets.len())
    };
    requests.iter().enumerate().flat_map(of).collect()
}
