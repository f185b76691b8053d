//! Where a streaming expert's rows come from: the feature logs, or the joined examples with TAEs
//! that a checkpoint gives on the spot.

use std::time::Duration;

use hypercast_fm::inference::FmOutput;
use serde::{Deserialize, Serialize};

use super::super::{
    checkpoint_embedder::{CheckpointEmbedder, EmbeddingCheckpoint},
    joined_reader::{JoinedRead, JoinedReader, PositionedExample, RecordKey},
};
use crate::ServiceContext;
use crate::error::Result;
use hypercast_core::{clock, shutdown::Shutdown};
use hypercast_data::logs::{LogFollower, LogPosition, LoggedRequest};
use hypercast_stream::dead_letters::{DeadLetter, DeadLetterQueue, UnusableRecord};
use hypercast_stream::streams::StreamPlace;

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

/// Where a feed goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FeedPlace {
    Logs(LogPosition),
    Joined(StreamPlace),
}

impl FeedPlace {
    pub(super) fn position(self) -> FeedPosition {
        match self {
            FeedPlace::Logs(position) => FeedPosition::Logs(position),
            FeedPlace::Joined(place) => FeedPosition::Joined(place.position),
        }
    }
}

/// What a feed has next.
pub(super) enum FeedItem {
    /// A request, or a correction.
    WindowRow(FeedRow),
    /// Nothing now, though there may be more: rows of others, or an engine that fails.
    Later,
    /// Nothing that is there already.
    End,
    /// Missing records, until [`LogFeed::go_on`].
    Gap,
    /// The trainer is to stop. What was read meanwhile is left to whoever goes on: it may be of a
    /// schema that has grown.
    Stopped,
}

/// A request, or a correction, and where it was read.
pub(super) struct FeedRow {
    pub(super) logged: LoggedRequest,
    pub(super) key: RecordKey,
}

/// Rows as they come.
pub(super) enum LogFeed {
    Logs(Box<FollowedLogs>),
    Computed(Box<ComputedFeed>),
}

/// Feature logs, and the letters about their rows.
pub(super) struct FollowedLogs {
    pub(super) logs: LogFollower,
    pub(super) letters: DeadLetterQueue,
    pub(super) stop: Shutdown,
}

/// Joined examples, with TAEs of a checkpoint that does not change. Those that it may have learned
/// from are left out, which a service survives: they are of before it was made, or came late.
pub(super) struct ComputedFeed {
    reader: JoinedReader,
    fm: CheckpointEmbedder,
    surfaces: Vec<u16>,
    /// Whether it was said that some are left out.
    has_warned: bool,
    ready: std::collections::VecDeque<ReadyRow>,
    /// After the last row that was given.
    place: StreamPlace,
}

/// A row that was read, and the place after it.
struct ReadyRow {
    row: FeedRow,
    end: StreamPlace,
}

impl FollowedLogs {
    fn next(&mut self, wait: Duration) -> Result<FeedItem> {
        let read = self.logs.next_request();
        if self.stop.is_requested() {
            return Ok(FeedItem::Stopped);
        }
        let Some(logged) = read? else {
            clock::sleep(wait);
            return Ok(FeedItem::End);
        };
        // The follower stands behind the row, in the row's own file.
        let position = self.logs.position().number() - 1;
        let key = RecordKey { position, retries: 0, checksum: None };
        Ok(FeedItem::WindowRow(FeedRow { logged, key }))
    }

    /// Rows that an operator had tried again.
    fn retries(&mut self) -> Result<Vec<FeedRow>> {
        let (mut rows, mut unusable) = (Vec::new(), Vec::new());
        for DeadLetter { position, retries, .. } in self.letters.orders() {
            let key = RecordKey { position, retries, checksum: None };
            match self.logs.request_at(LogPosition::from_number(position)) {
                Ok(logged) => rows.push(FeedRow { logged, key }),
                Err(why) => unusable.push(key.unreadable(&why.into())),
            }
        }
        self.letters.set_aside(unusable)?;
        Ok(rows)
    }
}

impl ComputedFeed {
    pub(super) fn open(
        context: ServiceContext<'_>,
        checkpoint: &EmbeddingCheckpoint,
        reader: JoinedReader,
        surfaces: Vec<u16>,
    ) -> Result<ComputedFeed> {
        let ServiceContext { config, dataset, .. } = context;
        let fm = CheckpointEmbedder::load(dataset, config, checkpoint)?;
        let (place, ready) = (reader.place(), Default::default());
        Ok(ComputedFeed { reader, fm, surfaces, has_warned: false, ready, place })
    }

    fn next(&mut self, wait: Duration) -> Result<FeedItem> {
        let mut at_end = false;
        if self.ready.is_empty() {
            match self.reader.next(RECORDS, wait)? {
                JoinedRead::Records(records) => self.ready = self.with_tae(records)?.into(),
                JoinedRead::Later => {}
                JoinedRead::End => at_end = true,
                JoinedRead::Gap(_) => return Ok(FeedItem::Gap),
                JoinedRead::Stopped => return Ok(FeedItem::Stopped),
            }
        }
        let Some(ReadyRow { row, end }) = self.ready.pop_front() else {
            self.place = self.reader.place();
            return Ok(if at_end { FeedItem::End } else { FeedItem::Later });
        };
        self.place = end;
        Ok(FeedItem::WindowRow(row))
    }

    /// Those of its surfaces, with their TAEs.
    fn with_tae(&mut self, mut records: Vec<PositionedExample>) -> Result<Vec<ReadyRow>> {
        records.retain(|record| {
            !record.example.targets.is_empty() && self.surfaces.contains(&record.example.surface)
        });
        let fm = &self.fm;
        let mut ahead = records.extract_if(.., |record| fm.looks_ahead(&record.example));
        if let Some(first) = ahead.next()
            && !std::mem::replace(&mut self.has_warned, true)
        {
            let reason = fm.look_ahead(&first.example);
            tracing::warn!(%reason, "this joined example and its like are not learned from");
        }
        ahead.for_each(drop);
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let FmOutput { tae, main } = fm.embed(records.iter().map(|record| &record.example))?;
        let (dim, tasks) = (fm.manifest().config.tae_width(), fm.main_tasks());
        let mut row = 0;
        let rows = records.into_iter().map(|record| {
            let PositionedExample { example, ranked, correction, ingested_ms, key, end } = record;
            let rows = row..row + example.targets.len();
            row = rows.end;
            let tae = tae[rows.start * dim..rows.end * dim].to_vec();
            let predictions = main[rows.start * tasks..rows.end * tasks].to_vec();
            let logged =
                LoggedRequest { example, tae, predictions, ranked, correction, ingested_ms };
            ReadyRow { row: FeedRow { logged, key }, end }
        });
        Ok(rows.collect())
    }
}

impl LogFeed {
    /// The next row; at the end of what is there after a wait of about `wait`.
    pub(super) fn next(&mut self, wait: Duration) -> Result<FeedItem> {
        match self {
            LogFeed::Logs(followed) => followed.next(wait),
            LogFeed::Computed(computed) => computed.next(wait),
        }
    }

    /// After the last row that was given.
    pub(super) fn place(&self) -> FeedPlace {
        match self {
            LogFeed::Logs(followed) => FeedPlace::Logs(followed.logs.position()),
            LogFeed::Computed(computed) => FeedPlace::Joined(computed.place),
        }
    }

    /// Goes on behind missing records.
    pub(super) fn go_on(&mut self) {
        if let LogFeed::Computed(computed) = self {
            computed.reader.go_on();
            computed.place = computed.reader.place();
        }
    }

    /// Rows that an operator had tried again since the last call.
    pub(super) fn retries(&mut self) -> Result<Vec<FeedRow>> {
        match self {
            LogFeed::Logs(followed) => followed.retries(),
            LogFeed::Computed(computed) => {
                let records = computed.reader.retries()?;
                Ok(computed.with_tae(records)?.into_iter().map(|ready| ready.row).collect())
            }
        }
    }

    /// How far orders to try rows again were read.
    pub(super) fn orders_position(&self) -> u64 {
        match self {
            LogFeed::Logs(followed) => followed.letters.position(),
            LogFeed::Computed(computed) => computed.reader.orders_position(),
        }
    }

    /// Sets rows aside; the letters are durable when it returns.
    pub(super) fn set_aside(&self, rows: Vec<UnusableRecord>) -> Result<()> {
        match self {
            LogFeed::Logs(followed) => Ok(followed.letters.set_aside(rows)?),
            LogFeed::Computed(computed) => computed.reader.set_aside(rows),
        }
    }
}
