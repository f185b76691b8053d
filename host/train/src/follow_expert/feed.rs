//! Where a streaming expert's rows come from: the feature logs, or the joined examples with TAEs
//! that a checkpoint gives on the spot.

use std::{path::Path, time::Duration};

use hypercast_fm::{
    example::Example,
    inference::{self, FoundationModel},
};
use serde::{Deserialize, Serialize};

use super::super::joined_reader::JoinedReader;
use crate::ServiceContext;
use crate::error::Result;
use hypercast_data::logs::{LogFollower, LogPosition, LoggedRequest};
use hypercast_stream::streams::{GapHandling, StreamPlace};

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

/// What a feed has next.
pub(super) enum FeedItem {
    /// A request, or a correction.
    WindowRow(LoggedRequest),
    /// Nothing now, though there may be more: rows of others, or an engine that fails.
    Later,
    /// Nothing that is there already.
    End,
}

/// Rows as they come.
pub(super) enum LogFeed {
    Logs(Box<LogFollower>),
    Computed(Box<ComputedFeed>),
}

/// Joined examples, with TAEs of a checkpoint that does not change.
pub(super) struct ComputedFeed {
    reader: JoinedReader,
    fm: Box<dyn FoundationModel>,
    surfaces: Vec<u16>,
    ready: std::collections::VecDeque<(LoggedRequest, u64)>,
    position: u64,
}

impl ComputedFeed {
    pub(super) fn open(
        context: ServiceContext<'_>,
        checkpoint: &Path,
        from: u64,
        surfaces: Vec<u16>,
        gaps: GapHandling,
    ) -> Result<ComputedFeed> {
        let ServiceContext { dataset, config, engine } = context;
        let from = Some(StreamPlace::at(from));
        let fm = inference::load(checkpoint, config.fm_logging.loading(config.device))?;
        let reader = JoinedReader::open(engine, dataset, from, gaps)?;
        let position = reader.place().position;
        Ok(ComputedFeed { reader, fm, surfaces, ready: Default::default(), position })
    }

    fn next(&mut self, wait: Duration) -> Result<FeedItem> {
        if self.ready.is_empty() {
            let Some(mut records) = self.reader.next(RECORDS, wait)? else {
                return Ok(FeedItem::Later);
            };
            let at_end = records.is_empty();
            let end = self.reader.place().position;
            records.retain(|record| {
                !record.example.targets.is_empty()
                    && self.surfaces.contains(&record.example.surface)
            });
            if records.is_empty() {
                self.position = end;
                return Ok(if at_end { FeedItem::End } else { FeedItem::Later });
            }
            let examples: Vec<&Example> = records.iter().map(|record| &record.example).collect();
            let tae = self.fm.infer(&examples)?.tae;
            let dim = self.fm.manifest().config.tae_width();
            let mut row = 0;
            for record in records {
                let rows = row..row + record.example.targets.len();
                row = rows.end;
                let logged = LoggedRequest {
                    example: record.example,
                    tae: tae[rows.start * dim..rows.end * dim].to_vec(),
                    correction: record.correction,
                    ingested_ms: record.ingested_ms,
                };
                self.ready.push_back((logged, record.end.position));
            }
        }
        let (logged, end) = self.ready.pop_front().expect("it was filled");
        self.position = end;
        Ok(FeedItem::WindowRow(logged))
    }
}

impl LogFeed {
    /// The next row; at the end of what is there after a wait of about `wait`.
    pub(super) fn next(&mut self, wait: Duration) -> Result<FeedItem> {
        match self {
            LogFeed::Logs(logs) => {
                if let Some(logged) = logs.next_request()? {
                    return Ok(FeedItem::WindowRow(logged));
                }
                std::thread::sleep(wait);
                Ok(FeedItem::End)
            }
            LogFeed::Computed(computed) => computed.next(wait),
        }
    }

    /// After the last row that was given.
    pub(super) fn position(&self) -> FeedPosition {
        match self {
            LogFeed::Logs(logs) => FeedPosition::Logs(logs.position()),
            LogFeed::Computed(computed) => FeedPosition::Joined(computed.position),
        }
    }
}
