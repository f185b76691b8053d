//! Where a streaming expert's rows come from: the feature logs, or the joined examples with TAEs
//! that a checkpoint gives on the spot.

use std::{path::Path, sync::Arc, time::Duration};

use hypercast_fm::{
    example::Example,
    inference::{self, FoundationModel},
};
use serde::{Deserialize, Serialize};

use super::super::joined::JoinedReader;
use crate::{
    config::Config,
    dataset::Dataset,
    engine::Engine,
    error::Result,
    logs::{LogFollower, LogPosition, Logged},
};

/// Records of the joined stream whose TAEs are computed together.
const RECORDS: usize = 128;

/// How far a feed was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FeedPosition {
    /// In the feature logs.
    Logs(LogPosition),
    /// In the stream of joined examples.
    Joined(u64),
}

impl FeedPosition {
    /// One number that grows as the feed is read, for publications.
    pub fn number(self) -> u64 {
        match self {
            FeedPosition::Logs(position) => position.number(),
            FeedPosition::Joined(position) => position,
        }
    }
}

/// Rows as they come.
pub(super) enum Feed {
    Logs(Box<LogFollower>),
    Computed(Box<Computed>),
}

/// Joined examples, with TAEs of a checkpoint that does not change.
pub(super) struct Computed {
    reader: JoinedReader,
    fm: Box<dyn FoundationModel>,
    surfaces: Vec<u16>,
    ready: std::collections::VecDeque<(Logged, u64)>,
    position: u64,
}

impl Computed {
    pub(super) fn open(
        (dataset, config): (&Dataset, &Config),
        engine: Arc<dyn Engine>,
        checkpoint: &Path,
        (from, surfaces): (Option<u64>, Vec<u16>),
    ) -> Result<Computed> {
        let fm = inference::load(checkpoint, config.fm_logging.loading(config.device))?;
        let reader = JoinedReader::open(engine, dataset, from)?;
        let position = reader.position();
        Ok(Computed { reader, fm, surfaces, ready: Default::default(), position })
    }

    fn next(&mut self, wait: Duration) -> Result<Option<Logged>> {
        if self.ready.is_empty() {
            let mut records = self.reader.next(RECORDS, wait)?;
            let end = self.reader.position();
            records.retain(|record| {
                !record.example.targets.is_empty()
                    && self.surfaces.contains(&record.example.surface)
            });
            if records.is_empty() {
                self.position = end;
                return Ok(None);
            }
            let examples: Vec<&Example> = records.iter().map(|record| &record.example).collect();
            let tae = self.fm.infer(&examples)?.tae;
            let dim = self.fm.manifest().config.tae_width();
            let mut row = 0;
            for record in records {
                let rows = row..row + record.example.targets.len();
                row = rows.end;
                let logged = Logged {
                    example: record.example,
                    tae: tae[rows.start * dim..rows.end * dim].to_vec(),
                    correction: record.correction,
                    ingested_ms: record.ingested_ms,
                };
                self.ready.push_back((logged, record.end));
            }
        }
        let next = self.ready.pop_front();
        Ok(next.map(|(logged, end)| {
            self.position = end;
            logged
        }))
    }
}

impl Feed {
    /// The next row; none if there is none yet, after a wait of about `wait`.
    pub(super) fn next(&mut self, wait: Duration) -> Result<Option<Logged>> {
        match self {
            Feed::Logs(logs) => {
                let next = logs.next_request()?;
                if next.is_none() {
                    std::thread::sleep(wait);
                }
                Ok(next)
            }
            Feed::Computed(computed) => computed.next(wait),
        }
    }

    /// After the last row that was given.
    pub(super) fn position(&self) -> FeedPosition {
        match self {
            Feed::Logs(logs) => FeedPosition::Logs(logs.position()),
            Feed::Computed(computed) => FeedPosition::Joined(computed.position),
        }
    }
}
