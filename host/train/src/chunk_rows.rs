//! Whole logged requests that a trainer is given together.

use hypercast_data::logs::LoggedRequest;
use hypercast_data::ranked_place::RankedPlace;
use hypercast_expert::Chunk;
use hypercast_fm::example::Example;

/// Requests with what the log has of their rows, one after the other.
#[derive(Debug, Default)]
pub(super) struct ChunkRows {
    pub(super) examples: Vec<Example>,
    /// `[rows, tae_dim]`
    tae: Vec<f32>,
    /// `[rows, main tasks]`: what the FM predicts itself.
    predictions: Vec<f32>,
    /// `[rows]`
    ranked: Vec<Option<RankedPlace>>,
    /// Targets of all requests.
    pub(super) rows: usize,
}

impl ChunkRows {
    pub(super) fn add(&mut self, logged: LoggedRequest) {
        let LoggedRequest { example, tae, predictions, ranked, .. } = logged;
        self.rows += example.targets.len();
        self.tae.extend_from_slice(&tae);
        self.predictions.extend_from_slice(&predictions);
        self.ranked.extend(ranked);
        // A request of which nothing is known has no list.
        self.ranked.resize(self.rows, None);
        self.examples.push(example);
    }

    pub(super) fn append(&mut self, mut other: ChunkRows) {
        self.rows += other.rows;
        self.tae.append(&mut other.tae);
        self.predictions.append(&mut other.predictions);
        self.ranked.append(&mut other.ranked);
        self.examples.append(&mut other.examples);
    }

    /// Leaves it without requests, and keeps its memory.
    pub(super) fn clear(&mut self) {
        let ChunkRows { examples, tae, predictions, ranked, rows } = self;
        examples.clear();
        tae.clear();
        predictions.clear();
        ranked.clear();
        *rows = 0;
    }

    /// Takes the first requests that are kept. Returns of each row of the first whether it is.
    pub(super) fn retain(&mut self, first: usize, is_kept: impl Fn(usize) -> bool) -> Vec<bool> {
        let rows = self.rows.max(1);
        let (dim, tasks) = (self.tae.len() / rows, self.predictions.len() / rows);
        let all = std::mem::take(self);
        let mut kept_rows = Vec::new();
        let mut tae = all.tae.chunks(dim.max(1));
        let mut predictions = all.predictions.chunks(tasks.max(1));
        let mut ranked = all.ranked.into_iter();
        for (at, example) in all.examples.into_iter().enumerate().take(first) {
            let rows = example.targets.len();
            let own: Vec<f32> = tae.by_ref().take(rows).flatten().copied().collect();
            let said: Vec<f32> = predictions.by_ref().take(rows).flatten().copied().collect();
            let places: Vec<_> = ranked.by_ref().take(rows).collect();
            kept_rows.extend(std::iter::repeat_n(is_kept(at), rows));
            if is_kept(at) {
                self.rows += rows;
                self.tae.extend(own);
                self.predictions.extend(said);
                self.ranked.extend(places);
                self.examples.push(example);
            }
        }
        kept_rows
    }

    pub(super) fn chunk(&self) -> Chunk<'_> {
        Chunk {
            examples: &self.examples,
            tae: &self.tae,
            predictions: &self.predictions,
            ranked: &self.ranked,
        }
    }
}
