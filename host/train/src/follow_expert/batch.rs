//! Rows that a streaming expert learns from together.

use std::time::Instant;

use hypercast_core::clock;
use hypercast_data::logs::LoggedRequest;
use hypercast_expert::{Chunk, train::RefusedRequest};
use hypercast_fm::example::Example;
use hypercast_stream::dead_letters::UnusableRecord;

use super::{
    super::joined_reader::RecordKey,
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
        self.rows.rows + self.corrections.rows
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
    pub(super) examples: Vec<Example>,
    pub(super) tae: Vec<f32>,
    /// `[rows, main tasks]`: what the FM predicts itself.
    pub(super) predictions: Vec<f32>,
    pub(super) rows: usize,
    /// Where the examples were read.
    pub(super) keys: Vec<RecordKey>,
}

impl LoggedBatch {
    fn add(&mut self, row: FeedRow) {
        let FeedRow { logged: LoggedRequest { example, tae, predictions, .. }, key } = row;
        self.rows += example.targets.len();
        self.tae.extend_from_slice(&tae);
        self.predictions.extend_from_slice(&predictions);
        self.examples.push(example);
        self.keys.push(key);
    }

    pub(super) fn append(&mut self, mut other: LoggedBatch) {
        self.rows += other.rows;
        self.tae.append(&mut other.tae);
        self.predictions.append(&mut other.predictions);
        self.examples.append(&mut other.examples);
        self.keys.append(&mut other.keys);
    }

    /// The requests that a trainer refused, as records to set aside.
    pub(super) fn unusable(&self, refused: &[RefusedRequest]) -> Vec<UnusableRecord> {
        let record = |own: &RefusedRequest| {
            self.keys[own.index].unusable(&self.examples[own.index], own.reason.clone())
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
        let rows = self.rows.max(1);
        let (dim, tasks) = (self.tae.len() / rows, self.predictions.len() / rows);
        let all = std::mem::take(self);
        let mut kept_rows = Vec::new();
        let mut tae = all.tae.chunks(dim.max(1));
        let mut predictions = all.predictions.chunks(tasks.max(1));
        let examples = all.examples.into_iter().zip(all.keys).take(first);
        for (at, (example, key)) in examples.enumerate() {
            let rows = example.targets.len();
            let own: Vec<f32> = tae.by_ref().take(rows).flatten().copied().collect();
            let said: Vec<f32> = predictions.by_ref().take(rows).flatten().copied().collect();
            kept_rows.extend(std::iter::repeat_n(is_kept(at), rows));
            if is_kept(at) {
                self.rows += rows;
                self.tae.extend(own);
                self.predictions.extend(said);
                self.examples.push(example);
                self.keys.push(key);
            }
        }
        for task in said {
            let mut kept = kept_rows.iter();
            task.retain(|_| *kept.next().expect("a prediction a row"));
        }
    }

    pub(super) fn chunk(&self) -> Chunk<'_> {
        Chunk { examples: &self.examples, tae: &self.tae, predictions: &self.predictions }
    }
}
