//! Requests for benches: a catalogue, histories of any length, candidates. The
//! ids are drawn, the rest is regular; nothing is to be learned from it.

use std::sync::Arc;

use hypercast_fm::{
    example::{Event, Example, Item, Outcome, Target, User},
    spec::{FmSpec, Label, TaskSpec},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Items of the catalogue.
pub const ITEMS: u64 = 20_000;

/// Actions of an event.
const ACTIONS: usize = 3;

/// A request's size.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Who asks.
    pub user: u64,
    /// Events of history.
    pub events: usize,
    /// Candidates.
    pub candidates: usize,
}

/// The data that requests are of.
pub fn spec() -> FmSpec {
    let task = |at: usize| TaskSpec {
        name: format!("task{at}"),
        main: true,
        label: Label::Action(at),
        surfaces: vec![true; 2],
        weight: 1.0,
    };
    FmSpec {
        surfaces: vec!["feed".into(), "shop".into()],
        actions: ACTIONS,
        values: 0,
        item_ids: 2,
        item_dense: 0,
        features: 0,
        profile_ids: vec![],
        tasks: (0..ACTIONS).map(task).collect(),
        content: 0,
    }
}

/// The catalogue.
pub fn items() -> Vec<Arc<Item>> {
    let item = |id: u64| Item { id, ids: vec![id % 500, id % 31], ..Item::default() };
    (0..ITEMS).map(|id| Arc::new(item(id))).collect()
}

/// A request; the same one for the same `request` and items.
pub fn example(items: &[Arc<Item>], request: Request) -> Example {
    let mut random = SmallRng::seed_from_u64(request.user);
    let mut item = || items[random.random_range(0..items.len())].clone();
    let outcome =
        |at: usize| Outcome { actions: (at % 5) as u32 & 0b111, known: 0b111, ..Outcome::UNKNOWN };
    let history = (0..request.events)
        .map(|at| Event {
            item: item(),
            surface: (at % 2) as u16,
            time_ms: at as i64 * 1_000_000,
            outcome: outcome(at),
        })
        .collect();
    let targets = (0..request.candidates)
        .map(|at| Target {
            item: item(),
            ids: vec![],
            features: vec![],
            outcome: outcome(at),
            truth: vec![],
        })
        .collect();
    Example {
        request: request.user,
        user: Arc::new(User { id: request.user, ..User::default() }),
        surface: 0,
        time_ms: request.events as i64 * 1_000_000,
        history,
        targets,
    }
}
