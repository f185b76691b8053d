//! A small data set, events in it, and output as text that can be compared.

use std::path::Path;

use hypercast_config::JoinSettings;
use hypercast_data::dataset::{
    ContextFeatures, Dataset, Entities, Impression, content::Content, write_dataset,
};
use hypercast_data::features::{FeatureConfig, FeatureState};
use hypercast_data::schema::{Counter, Feature, FeatureKind, Schema, Task, TaskKind, TaskRole};
use hypercast_fm::example::{self, Item, MAX_VALUES, User};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::events::{ActionEvent, EventKind, EventRecord, ImpressionEvent, RankingEvent};
use crate::join::{Joiner, JoinerOptions, JoinerOutput};

pub(super) const CLICK: u64 = 0b01;
pub(super) const LIKE: u64 = 0b10;

/// Surface 0 has both actions, surface 1 clicks alone.
fn schema() -> Schema {
    let counter = |name: &str, key: &[&str], half_life_days| Counter {
        name: name.into(),
        key: key.iter().map(|name| name.to_string()).collect(),
        action: "click".into(),
        half_life_days,
    };
    let task = |name: &str, surfaces: &[&str]| Task {
        name: name.into(),
        role: TaskRole::Main,
        kind: TaskKind::Binary,
        label: name.into(),
        transform: Default::default(),
        surfaces: surfaces.iter().map(|name| name.to_string()).collect(),
        weight: 1.0,
    };
    Schema {
        surfaces: vec!["feed".into(), "search".into()],
        actions: vec!["click".into(), "like".into()],
        values: vec!["watched".into()],
        tasks: vec![task("click", &[]), task("like", &["feed"])],
        item_features: vec![Feature::new("tag", FeatureKind::Categorical)],
        user_features: vec![],
        context_features: vec![Feature::new("device", FeatureKind::Categorical)],
        counters: vec![
            counter("item", &["item_id"], 0.0),
            counter("user", &["user_id"], 0.0),
            counter("tag", &["tag"], 1.0),
        ],
        ids: Default::default(),
        retired: Vec::new(),
        owned: Default::default(),
        alignment: Default::default(),
        earlier: Vec::new(),
        ranges: Vec::new(),
    }
}

pub(super) fn dataset(dir: &Path) -> Dataset {
    let schema = schema();
    let items: Vec<Item> =
        (1..=8).map(|id| Item { id, ids: vec![id % 3 + 10], ..Item::default() }).collect();
    let users: Vec<User> = (1..=5).map(|id| User { id, ..User::default() }).collect();
    let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &users };
    write_dataset(dir, &entities, &mut []).unwrap();
    Content { width: 3, items: vec![1], vectors: vec![1.0, 0.0, 0.0] }.write(dir).unwrap();
    Dataset::open(dir).unwrap()
}

pub(super) fn settings() -> JoinSettings {
    JoinSettings {
        quantile: 0.9,
        min_window_s: 1,
        max_window_s: 600,
        first_window_s: 60,
        correction_s: 3600,
        max_impressions: 10_000,
        ..JoinSettings::default()
    }
}

pub(super) fn joiner(data: &Dataset, settings: JoinSettings) -> Joiner {
    let options = JoinerOptions { settings, history_len: 8, max_targets: 4 };
    Joiner::new(blank_state(data), options).with_content(data.content)
}

/// The state that a saved joiner is restored over.
pub(super) fn blank_state(data: &Dataset) -> FeatureState {
    FeatureState::new(&Joiner::bare(data), FeatureConfig::default())
}

/// When events arrive: after all times in them.
const ARRIVAL_MS: i64 = 1 << 53;

pub(super) fn event(kind: EventKind) -> EventRecord {
    EventRecord { ingested_ms: ARRIVAL_MS, kind }
}

pub(super) fn shown(request: u64, item: u64, surface: u16, time_ms: i64) -> EventRecord {
    let context = ContextFeatures { ids: vec![request % 2], dense: vec![] };
    event(EventKind::Impression(ImpressionEvent {
        request,
        user: request % 5 + 1,
        item,
        surface,
        time_ms,
        context,
    }))
}

pub(super) fn acted(
    request: u64,
    item: u64,
    time_ms: i64,
    actions: u64,
    known: u64,
) -> EventRecord {
    let outcome = example::Outcome { actions, known, values: [f32::NAN; MAX_VALUES] };
    event(EventKind::Action(ActionEvent { request, item, time_ms, outcome, complete: false }))
}

/// An answer whose places have a probability of a quarter.
pub(super) fn ranked(request: u64, items: &[u64]) -> EventRecord {
    event(EventKind::Ranking(RankingEvent {
        request,
        arm: "feed@1.0.0".into(),
        items: items.to_vec(),
        propensities: vec![Some(0.25); items.len()],
    }))
}

pub(super) fn tick(time_ms: i64) -> EventRecord {
    event(EventKind::Tick { time_ms })
}

pub(super) fn whole(request: u64, item: u64, time_ms: i64) -> Impression {
    let values = [f32::NAN; MAX_VALUES];
    Impression {
        request,
        time_ms,
        outcome_ms: time_ms,
        user: request % 5 + 1,
        item,
        surface: 0,
        outcome: example::Outcome { actions: CLICK, known: CLICK, values },
        context: ContextFeatures::default(),
        truth: vec![],
        history_only: false,
    }
}

/// An update of an item, with a content vector that its first number tells apart, or without one.
pub(super) fn item(id: u64, content: Option<f32>) -> EventRecord {
    let content = content.map(|first| [first, 0.5, 0.5].into()).unwrap_or_default();
    event(EventKind::Item(Item { id, ids: vec![77], content, ..Item::default() }))
}

/// The output of a sequence of events.
pub(super) fn all(joiner: &mut Joiner, events: &[EventRecord]) -> JoinerOutput {
    let mut made = JoinerOutput::default();
    events.iter().for_each(|event| joiner.take(event.clone(), &mut made));
    made
}

/// Each record as text; unknown values are NaN, which does not compare.
pub(super) fn texts(made: &JoinerOutput) -> (Vec<String>, Vec<String>) {
    let joined = made.joined.iter().map(|joined| format!("{joined:?}")).collect();
    (joined, made.outcomes.iter().map(|outcome| format!("{outcome:?}")).collect())
}

/// Random events: requests of up to six items, their rankings, actions that come soon, late or
/// before their impression, some of them twice, complete requests, new items, and times that are
/// not in order.
pub(super) fn random(seed: u64, requests: u64) -> Vec<EventRecord> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut timed: Vec<(i64, EventRecord)> = Vec::new();
    for request in 1..=requests {
        let at = request as i64 * 700 + rng.random_range(0..900);
        let surface = rng.random_range(0..2);
        let mut items: Vec<u64> = (1..=9).collect();
        items.shuffle(&mut rng);
        // Most are ranked before or after they are shown, and some twice.
        for _ in 0..rng.random_range(0..3) {
            timed.push((at + rng.random_range(-200..400), ranked(request, &items)));
            items.swap(0, 1);
        }
        items.truncate(rng.random_range(1..=6));
        if rng.random_bool(0.1) {
            let rows = items.iter().map(|&item| whole(request, item, at)).collect();
            timed.push((at, event(EventKind::CompleteRequest(rows))));
            continue;
        }
        for &item in &items {
            let seen_ms = at + rng.random_range(0..300);
            timed.push((seen_ms, shown(request, item, surface, at)));
            if rng.random_bool(0.15) {
                timed.push((
                    seen_ms + rng.random_range(0..90_000),
                    shown(request, item, surface, at),
                ));
            }
            for _ in 0..rng.random_range(0..3) {
                let delay = [500, 5_000, 50_000, 2_000_000][rng.random_range(0..4)];
                let acted_ms = at + rng.random_range(0..delay);
                let known = rng.random_range(1..4);
                let mut event =
                    acted(request, item, acted_ms, rng.random_range(0..4) & known, known);
                if let EventKind::Action(reaction) = &mut event.kind {
                    reaction.complete = rng.random_bool(0.2);
                    if rng.random_bool(0.3) {
                        reaction.outcome.values[0] = rng.random_range(0.0..9.0);
                    }
                }
                // An action may come before its impression.
                timed.push((acted_ms - rng.random_range(0..400), event));
            }
        }
        if rng.random_bool(0.05) {
            let id = rng.random_range(1..12);
            timed.push((at, item(id, (id % 3 > 0).then_some(request as f32))));
        }
    }
    timed.sort_by_key(|(at, _)| *at);
    let mut events: Vec<EventRecord> = timed.into_iter().map(|(_, event)| event).collect();
    for (at, event) in events.iter_mut().enumerate() {
        event.ingested_ms = ARRIVAL_MS + at as i64;
    }
    events.push(tick(1 << 52));
    events
}
