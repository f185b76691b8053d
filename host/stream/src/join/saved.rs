//! A joiner's state in serialised form: its features, pending requests, observed delays, and its
//! position in the `events` stream.

use std::sync::Arc;

use hypercast_data::features::{
    FeatureState,
    saved::{ItemTable, ItemTableBuilder, SavedEvent, SavedState, table_item},
};
use hypercast_fm::example::{Example, Item, Outcome, Target, User};
use serde::{Deserialize, Serialize};

use super::{
    Joiner, JoinerCounts, JoinerOptions,
    content::{ContentLimits, PlacedVectors},
    delays::OutcomeDelays,
    or_default,
    pending::{PendingImpression, PendingRequest},
    rankings::SavedRankings,
    waiting::{OrphanActions, SeenImpressions},
};
use crate::error::{CommonErrors as _, Error, Result};

/// A joiner's state at a position in the `events` stream. The file is encoded by position: fields
/// must not be reordered, and what is new is saved behind it, as [`SavedContents`] is: a place
/// follows, so that a state does not know where it ends.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedJoiner {
    /// The position of the next event.
    pub(super) position: u64,
    /// What the state was built for; it does not fit another data set
    /// ([`super::state_fingerprint`]).
    pub(super) fingerprint: String,
    options: JoinerOptions,
    state: SavedState,
    shelf: ItemTable,
    pending: Vec<(u64, SavedRequest)>,
    joined: Vec<u64>,
    requests: Vec<(u64, u64)>,
    next_sequence: u64,
    delays: OutcomeDelays,
    clock_ms: i64,
    swept_ms: i64,
    orphans: OrphanActions,
    seen: SeenImpressions,
    counts: JoinerCounts,
    #[serde(deserialize_with = "or_default")]
    bounded_by_arrival: bool,
    #[serde(deserialize_with = "or_default")]
    knows_outputs: bool,
}

/// What a joiner saves behind its state: content vectors and rankings.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct SavedContents {
    pub(super) vectors: PlacedVectors,
    /// None in states of earlier releases, which had no such vectors.
    pub(super) limits: Option<ContentLimits>,
    #[serde(deserialize_with = "or_default")]
    pub(super) rankings: SavedRankings,
}

#[derive(Serialize, Deserialize)]
struct SavedRequest {
    request: u64,
    part: u32,
    example_request: u64,
    user: User,
    surface: u16,
    time_ms: i64,
    history: Vec<SavedEvent>,
    targets: Vec<SavedTarget>,
    rows: Vec<PendingImpression>,
    ingested_ms: i64,
    joined_ms: Option<i64>,
}

#[derive(Serialize, Deserialize)]
struct SavedTarget {
    item: u32,
    ids: Vec<u64>,
    features: Vec<f32>,
    outcome: Outcome,
}

impl Joiner {
    /// Passes the state to `write`. Orphans, seen impressions, content vectors and rankings are
    /// lent to it instead of copied.
    pub(super) fn save(
        &mut self,
        position: u64,
        fingerprint: &str,
        write: impl FnOnce(&SavedJoiner, &SavedContents) -> Result<()>,
    ) -> Result<()> {
        let mut shelving = ItemTableBuilder::new(&self.state);
        let pending = self.pending.iter();
        let pending = pending.map(|(&at, request)| (at, save(request, &mut shelving))).collect();
        let saved = SavedJoiner {
            position,
            fingerprint: fingerprint.to_owned(),
            options: self.options.clone(),
            shelf: shelving.finish(),
            state: self.state.saved(),
            pending,
            joined: self.joined.iter().copied().collect(),
            requests: self.requests.iter().map(|(&request, &newest)| (request, newest)).collect(),
            next_sequence: self.next_sequence,
            delays: self.delays.clone(),
            clock_ms: self.clock_ms,
            swept_ms: self.swept_ms,
            orphans: std::mem::take(&mut self.orphans),
            seen: std::mem::take(&mut self.seen),
            counts: self.counts,
            bounded_by_arrival: self.bounded_by_arrival,
            knows_outputs: self.knows_outputs,
        };
        let contents = SavedContents {
            vectors: std::mem::take(&mut self.contents),
            limits: Some(self.content_limits),
            rankings: self.saved_rankings(),
        };
        let written = write(&saved, &contents);
        (self.orphans, self.seen) = (saved.orphans, saved.seen);
        self.contents = contents.vectors;
        self.restore_rankings(contents.rankings);
        written
    }

    /// Restores a joiner, over a feature state that has only the data set's items and users. Its
    /// content vectors and rankings are left to the caller.
    ///
    /// # Errors
    /// The state was saved for another schema.
    pub(super) fn restore(mut state: FeatureState, saved: SavedJoiner) -> Result<Joiner> {
        let items = saved.shelf.items(&state);
        state.restore(saved.state)?;
        let mut joiner = Joiner::new(state, saved.options);
        for (at, request) in saved.pending {
            let mut request = load(request, &items)?;
            joiner.state.upgrade().example(&mut request.example);
            joiner.pending.insert(at, request);
        }
        joiner.next_sequence = saved.next_sequence;
        let mut named = saved.joined.iter().chain(saved.requests.iter().map(|(_, newest)| newest));
        let whole = named.all(|at| joiner.pending.contains_key(at));
        let delays = saved.delays.grown(&joiner.delays);
        if !whole || !joiner.fits(&delays) {
            return Err(Error::refused(
                "the saved joiner does not fit the schema; restore the schema, or move the state away to \
                 begin at the first event again",
            ));
        }
        joiner.delays = delays;
        joiner.requests = saved.requests.into_iter().collect();
        (joiner.clock_ms, joiner.swept_ms) = (saved.clock_ms, saved.swept_ms);
        (joiner.orphans, joiner.seen, joiner.counts) = (saved.orphans, saved.seen, saved.counts);
        joiner.bounded_by_arrival = saved.bounded_by_arrival;
        joiner.knows_outputs = saved.knows_outputs;
        joiner.index(saved.joined.into());
        Ok(joiner)
    }

    fn fits(&self, delays: &OutcomeDelays) -> bool {
        let surfaces = self.state.schema().surfaces.len();
        delays.shape() == self.delays.shape()
            && self.pending.values().all(|request| usize::from(request.example.surface) < surfaces)
    }
}

fn save(request: &PendingRequest, shelving: &mut ItemTableBuilder<'_>) -> SavedRequest {
    let PendingRequest { request, part, ref example, ref rows, ingested_ms, joined_ms } = *request;
    SavedRequest {
        request,
        part,
        example_request: example.request,
        user: (*example.user).clone(),
        surface: example.surface,
        time_ms: example.time_ms,
        history: example.history.iter().map(|event| shelving.event(event)).collect(),
        targets: example.targets.iter().map(|target| save_target(target, shelving)).collect(),
        rows: rows.clone(),
        ingested_ms,
        joined_ms,
    }
}

fn save_target(target: &Target, shelving: &mut ItemTableBuilder<'_>) -> SavedTarget {
    SavedTarget {
        item: shelving.put(&target.item),
        ids: target.ids.clone(),
        features: target.features.clone(),
        outcome: target.outcome,
    }
}

fn load(saved: SavedRequest, items: &[Arc<Item>]) -> Result<PendingRequest> {
    let SavedRequest { request, part, rows, ingested_ms, joined_ms, surface, time_ms, .. } = saved;
    let target = |saved: SavedTarget| {
        let SavedTarget { item, ids, features, outcome } = saved;
        Ok(Target { item: table_item(items, item)?, ids, features, outcome, truth: Vec::new() })
    };
    let example = Example {
        request: saved.example_request,
        user: Arc::new(saved.user),
        surface,
        time_ms,
        history: saved.history.into_iter().map(|e| Ok(e.event(items)?)).collect::<Result<_>>()?,
        targets: saved.targets.into_iter().map(target).collect::<Result<_>>()?,
    };
    Ok(PendingRequest { request, part, example, rows, ingested_ms, joined_ms })
}
