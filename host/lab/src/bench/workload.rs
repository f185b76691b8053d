//! Requests for benches: a catalogue, and histories and candidates of any number. Ids are random,
//! the rest is regular; there is nothing to learn from them.

use std::sync::Arc;

use hypercast_fm::{
    example::{Event, Example, Item, Outcome, Target, User},
    spec::{FmSpec, TaskLabel, TaskSpec},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Items of the catalogue.
pub const ITEMS: u64 = 20_000;

/// Numeric columns of a candidate, such as counters.
pub const COLUMNS: usize = 32;

const ACTIONS: usize = 3;

/// The size of a request that is made up.
#[derive(Debug, Clone, Copy)]
pub struct RequestSize {
    /// The user, who also seeds the request's random choices.
    pub user: u64,
    /// Events of history.
    pub events: usize,
    /// Candidates.
    pub candidates: usize,
}

/// The specification of the requests.
pub fn spec() -> FmSpec {
    let task = |at: usize| TaskSpec {
        name: format!("task{at}"),
        main: true,
        label: TaskLabel::Action(at),
        transform: Default::default(),
        surfaces: vec![true; 2],
        weight: 1.0,
    };
    FmSpec {
        surfaces: vec!["feed".into(), "shop".into()],
        actions: ACTIONS,
        values: 0,
        item_ids: 2,
        item_dense: 0,
        item_optional: Vec::new(),
        features: COLUMNS,
        profile_ids: vec![],
        id_widths: Default::default(),
        tasks: (0..ACTIONS).map(task).collect(),
        content: 0,
        training_only: Default::default(),
        alignments: Default::default(),
    }
}

/// The items that requests choose from.
pub fn items() -> Vec<Arc<Item>> {
    let item = |id: u64| Item { id, ids: vec![id % 500, id % 31], ..Item::default() };
    (0..ITEMS).map(|id| Arc::new(item(id))).collect()
}

/// A request; the same one for the same size and items.
pub fn example(items: &[Arc<Item>], size: RequestSize) -> Example {
    let mut random = SmallRng::seed_from_u64(size.user);
    let mut item = || items[random.random_range(0..items.len())].clone();
    let outcome =
        |at: usize| Outcome { actions: (at % 5) as u64 & 0b111, known: 0b111, ..Outcome::UNKNOWN };
    let history = (0..size.events)
        .map(|at| Event {
            item: item(),
            surface: (at % 2) as u16,
            time_ms: at as i64 * 1_000_000,
            outcome: outcome(at),
        })
        .collect();
    let column = |at: usize| move |column: usize| ((at * 37 + column * 11) % 101) as f32 / 50.0;
    let targets = (0..size.candidates)
        .map(|at| Target {
            item: item(),
            ids: vec![],
            features: (0..COLUMNS).map(column(at)).collect(),
            outcome: outcome(at),
            truth: vec![],
        })
        .collect();
    Example {
        request: size.user,
        user: Arc::new(User { id: size.user, ..User::default() }),
        surface: 0,
        time_ms: size.events as i64 * 1_000_000,
        history,
        targets,
    }
}
