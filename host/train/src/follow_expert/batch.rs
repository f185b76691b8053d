//! Rows that a streaming expert learns from together.

use std::time::Instant;

use hypercast_core::clock;
use hypercast_expert::{Chunk, train::RefusedRequest};
use hypercast_fm::example::Example;
use hypercast_stream::dead_letters::UnusableRecord;

use super::{
    super::{chunk_rows::ChunkRows, joined_reader::RecordKey},
    feed::{FeedPlace, FeedRow},
};

/// Rows and corrections that wait to be learned from.
pub(super) struct PendingRows {
    pub(super) rows: LoggedBatch,
    pub(super) corrections: LoggedBatch,
    pub(super) ingested_ms: Vec<i64>,
    pub(super) since: Instant,
    /// After the last of them.
    pub(super) end: FeedPlace,
    /// After the last order that is carried out with them.
    pub(super) orders: Option<u64>,
}

impl PendingRows {
    /// Nothing yet, behind a place.
    pub(super) fn new(end: FeedPlace) -> PendingRows {
        let (rows, corrections) = (LoggedBatch::default(), LoggedBatch::default());
        let (ingested_ms, since) = (Vec::new(), clock::instant());
        PendingRows { rows, corrections, ingested_ms, since, end, orders: None }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows.rows() + self.corrections.rows()
    }

    pub(super) fn add(&mut self, row: FeedRow) {
        if row.logged.correction {
            return self.corrections.add(row);
        }
        self.ingested_ms.extend(Some(row.logged.ingested_ms).filter(|&ms| ms > 0));
        self.rows.add(row);
    }
}

/// Rows that are learned from together.
#[derive(Default)]
pub(super) struct LoggedBatch {
    pub(super) logged: ChunkRows,
    /// Where the examples were read.
    pub(super) keys: Vec<RecordKey>,
}

impl LoggedBatch {
    fn add(&mut self, FeedRow { logged, key }: FeedRow) {
        self.logged.add(logged);
        self.keys.push(key);
    }

    pub(super) fn append(&mut self, mut other: LoggedBatch) {
        self.logged.append(other.logged);
        self.keys.append(&mut other.keys);
    }

    pub(super) fn rows(&self) -> usize {
        self.logged.rows
    }

    pub(super) fn examples(&self) -> &[Example] {
        &self.logged.examples
    }

    /// The requests that a trainer refused, as records to set aside.
    pub(super) fn unusable(&self, refused: &[RefusedRequest]) -> Vec<UnusableRecord> {
        let record = |own: &RefusedRequest| {
            self.keys[own.index].unusable(&self.examples()[own.index], own.reason.clone())
        };
        refused.iter().map(record).collect()
    }

    /// Takes the first examples of the batch that are kept, and their rows of what was predicted of
    /// the first examples.
    pub(super) fn retain(
        &mut self,
        first: usize,
        is_kept: impl Fn(usize) -> bool,
        said: &mut [Vec<f32>],
    ) {
        let mut keys = std::mem::take(&mut self.keys);
        keys.truncate(first);
        let kept = keys.into_iter().enumerate().filter(|(at, _)| is_kept(*at));
        self.keys = kept.map(|(_, key)| key).collect();
        let kept_rows = self.logged.retain(first, is_kept);
        for task in said {
            let mut kept = kept_rows.iter();
            task.retain(|_| *kept.next().expect("a prediction a row"));
        }
    }

    pub(super) fn chunk(&self) -> Chunk<'_> {
        self.logged.chunk()
    }
}
