//! A joiner in a form that can be written down: its features, the impressions
//! that wait or can be corrected, the delays it saw, and where it stands.

use std::sync::Arc;

use hypercast_fm::example::{Example, Item, Outcome, Target, User};
use serde::{Deserialize, Serialize};

use super::{
    core::Joiner,
    delays::Delays,
    made::{Counts, Options},
    memory::{Orphans, Seen},
    unit::{Row, Unit},
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::features::{
    FeatureState,
    saved::{SavedEvent, SavedState, Shelf, Shelving, on_shelf},
};

/// A joiner as of a position in the `events` stream.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedJoiner {
    /// The next event.
    pub(super) position: u64,
    /// What it was made for; another data set is another beginning.
    pub(super) world: String,
    options: Options,
    state: SavedState,
    shelf: Shelf,
    units: Vec<(u64, SavedUnit)>,
    kept: Vec<u64>,
    requests: Vec<(u64, u64)>,
    next: u64,
    delays: Delays,
    clock_ms: i64,
    swept_ms: i64,
    orphans: Orphans,
    seen: Seen,
    counts: Counts,
}

#[derive(Serialize, Deserialize)]
struct SavedUnit {
    request: u64,
    part: u32,
    example_request: u64,
    user: User,
    surface: u16,
    time_ms: i64,
    history: Vec<SavedEvent>,
    targets: Vec<SavedTarget>,
    rows: Vec<Row>,
    ingested_ms: i64,
    left_ms: Option<i64>,
}

#[derive(Serialize, Deserialize)]
struct SavedTarget {
    item: u32,
    ids: Vec<u64>,
    features: Vec<f32>,
    outcome: Outcome,
}

impl Joiner {
    /// What is to be written down. Orphans and what was seen are lent, not copied, so it is handed to `write` at once.
    pub(super) fn save(
        &mut self,
        position: u64,
        world: &str,
        write: impl FnOnce(&SavedJoiner) -> Result<()>,
    ) -> Result<()> {
        let mut shelving = Shelving::new(&self.state);
        let units = self.units.iter().map(|(&at, unit)| (at, save(unit, &mut shelving))).collect();
        let saved = SavedJoiner {
            position,
            world: world.to_owned(),
            options: self.options.clone(),
            shelf: shelving.finish(),
            state: self.state.saved(),
            units,
            kept: self.kept().iter().copied().collect(),
            requests: self.requests.iter().map(|(&request, &unit)| (request, unit)).collect(),
            next: self.next,
            delays: self.delays.clone(),
            clock_ms: self.clock_ms,
            swept_ms: self.swept_ms,
            orphans: std::mem::take(&mut self.orphans),
            seen: std::mem::take(&mut self.seen),
            counts: self.counts,
        };
        let written = write(&saved);
        (self.orphans, self.seen) = (saved.orphans, saved.seen);
        written
    }

    /// The joiner that was written down, over a state that knows the data set's items and users alone.
    ///
    /// # Errors
    /// What was written for another schema.
    pub(super) fn restore(mut state: FeatureState, saved: SavedJoiner) -> Result<Joiner> {
        let items = saved.shelf.items(&state);
        state.restore(saved.state)?;
        let mut joiner = Joiner::new(state, saved.options);
        for (at, unit) in saved.units {
            joiner.units.insert(at, load(unit, &items)?);
        }
        joiner.next = saved.next;
        let mut named = saved.kept.iter().chain(saved.requests.iter().map(|(_, unit)| unit));
        let whole = named.all(|at| joiner.units.contains_key(at));
        if !whole || !joiner.fits(&saved.delays) {
            return Err(Error::invalid("a saved joiner is of another schema"));
        }
        joiner.delays = saved.delays;
        joiner.requests = saved.requests.into_iter().collect();
        (joiner.clock_ms, joiner.swept_ms) = (saved.clock_ms, saved.swept_ms);
        (joiner.orphans, joiner.seen, joiner.counts) = (saved.orphans, saved.seen, saved.counts);
        joiner.index(saved.kept.into());
        Ok(joiner)
    }

    fn fits(&self, delays: &Delays) -> bool {
        let surfaces = self.state.schema().surfaces.len();
        delays.shape() == self.delays.shape()
            && self.units.values().all(|unit| usize::from(unit.example.surface) < surfaces)
    }
}

fn save(unit: &Unit, shelving: &mut Shelving<'_>) -> SavedUnit {
    let Unit { request, part, ref example, ref rows, ingested_ms, left_ms } = *unit;
    SavedUnit {
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
        left_ms,
    }
}

fn save_target(target: &Target, shelving: &mut Shelving<'_>) -> SavedTarget {
    SavedTarget {
        item: shelving.put(&target.item),
        ids: target.ids.clone(),
        features: target.features.clone(),
        outcome: target.outcome,
    }
}

fn load(saved: SavedUnit, items: &[Arc<Item>]) -> Result<Unit> {
    let SavedUnit { request, part, rows, ingested_ms, left_ms, surface, time_ms, .. } = saved;
    let target = |saved: SavedTarget| {
        let SavedTarget { item, ids, features, outcome } = saved;
        Ok(Target { item: on_shelf(items, item)?, ids, features, outcome, truth: Vec::new() })
    };
    let example = Example {
        request: saved.example_request,
        user: Arc::new(saved.user),
        surface,
        time_ms,
        history: saved.history.into_iter().map(|e| Ok(e.event(items)?)).collect::<Result<_>>()?,
        targets: saved.targets.into_iter().map(target).collect::<Result<_>>()?,
    };
    Ok(Unit { request, part, example, rows, ingested_ms, left_ms })
}
