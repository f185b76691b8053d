//! Tests of the state and the replays on handwritten data sets.

use std::path::Path;

use hypercast_fm::example::MAX_VALUES;

use super::replay::{Pretraining, PretrainingOptions, Replay, ReplayOptions, request_input};
use super::*;
use crate::dataset::{Entities, content::Content, write_dataset};
use crate::schema::{Counter, Feature, FeatureKind, Task, TaskKind, TaskRole, ValueRange};

fn schema() -> Schema {
    let feature = |name: &str, kind| Feature::new(name, kind);
    let counter = |name: &str, key: &[&str], half_life_days| Counter {
        name: name.into(),
        key: key.iter().map(|name| name.to_string()).collect(),
        action: "click".into(),
        half_life_days,
    };
    Schema {
        surfaces: vec!["unknown".into(), "feed".into()],
        actions: vec!["click".into(), "like".into()],
        values: vec![],
        tasks: vec![Task {
            name: "click".into(),
            role: TaskRole::Main,
            kind: TaskKind::Binary,
            label: "click".into(),
            transform: Default::default(),
            surfaces: vec![],
            weight: 1.0,
        }],
        item_features: vec![
            feature("tag", FeatureKind::Categorical),
            feature("length", FeatureKind::Dense),
        ],
        user_features: vec![feature("age", FeatureKind::Categorical)],
        context_features: vec![feature("device", FeatureKind::Categorical)],
        counters: vec![
            counter("item", &["item_id"], 0.0),
            counter("user_surface", &["user_id", "surface"], 0.0),
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

/// An impression with the times of its request and of its outcome.
fn impression(request: u64, times_ms: [i64; 2], user: u64, item: u64, clicked: bool) -> Impression {
    Impression {
        request,
        time_ms: times_ms[0],
        outcome_ms: times_ms[1],
        user,
        item,
        surface: 1,
        outcome: Outcome {
            actions: u64::from(clicked),
            known: 0b11,
            values: [f32::NAN; MAX_VALUES],
        },
        context: ContextFeatures { ids: vec![5], dense: vec![] },
        truth: vec![],
        history_only: false,
    }
}

fn dataset(dir: &Path, mut rows: Vec<Impression>) -> Dataset {
    let schema = schema();
    let item =
        |id: u64| Item { id, ids: vec![id % 2 + 10], dense: vec![id as f32], ..Item::default() };
    let items: Vec<Item> = (1..=4).map(item).collect();
    let users: Vec<User> =
        (1..=3).map(|id| User { id, ids: vec![id * 10], dense: vec![] }).collect();
    let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &users };
    write_dataset(dir, &entities, &mut rows).unwrap();
    Dataset::open(dir).unwrap()
}

fn options(span: Span) -> ReplayOptions {
    ReplayOptions { span, history_len: 8, max_targets: 16, features: FeatureConfig::default() }
}

fn seen(example: &Example) -> Vec<u64> {
    example.history.iter().map(|event| event.item.id).collect()
}

/// Whichever way it comes that a number is not known, an example says that it is missing, and a
/// saved state, too.
#[test]
fn what_is_missing_is_missing_in_examples() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), vec![impression(1, [1, 2], 1, 1, true)]);
    let mut schema = schema();
    let optional = |name| Feature { optional: true, ..Feature::new(name, FeatureKind::Dense) };
    schema.item_features[1].optional = true;
    schema.user_features.push(optional("income"));
    schema.context_features.push(Feature::new("battery", FeatureKind::Dense));
    schema.ranges = vec![ValueRange::new("length", 1.0, 2.0)];
    schema.validate().unwrap();
    let data = Dataset { schema: Arc::new(schema), users: Default::default(), ..data };
    let mut state = FeatureState::new(&data, FeatureConfig::default());
    let unknown = Item { id: 2, ids: vec![0], dense: vec![MISSING], ..Item::default() };
    state.upsert_item(unknown).unwrap();
    state.upsert_user(User { id: 1, ids: vec![1], dense: vec![7.0] }).unwrap();
    // The item 9 is in no data set, and 1 has length 1.
    let row = |item| Impression {
        context: ContextFeatures::default(),
        ..impression(2, [3, 4], 1, item, true)
    };
    state.apply(&row(9));
    let saved = postcard::to_allocvec(&state.saved()).unwrap();
    let mut restored = FeatureState::new(&data, FeatureConfig::default());
    restored.restore(postcard::from_bytes(&saved).unwrap()).unwrap();
    for state in [&state, &restored] {
        let example = state.fetch(&request_input(&[row(1), row(2), row(9)]), 8);
        assert!(example.history[0].item.dense[0].is_nan());
        let [known, missing, unknown] = &example.targets[..] else { panic!("{example:?}") };
        assert_eq!((known.features[0], known.features[1]), (1.0, 7.0));
        assert_eq!(known.features[2], 0.0, "nobody sent the battery, which is not optional");
        assert!(missing.features[0].is_nan() && unknown.features[0].is_nan());
        let told = |target: &Target| target.features[target.features.len() - 2..].to_vec();
        assert_eq!([told(known), told(missing), told(unknown)].concat(), [0., 0., 1., 0., 1., 0.]);
        assert_eq!(unknown.ids[4], 0);
        let example = state.fetch(&RequestInput { user: 5, ..request_input(&[row(1)]) }, 8);
        assert!(example.targets[0].features[1].is_nan(), "an unknown user");
        assert_eq!(told(&example.targets[0]), [0.0, 1.0]);
    }
}

/// Whichever way a number came in, no example has it: with the data set, an update, a request, or
/// an outcome.
#[test]
fn examples_hold_no_number_beyond_its_range() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), vec![impression(1, [1, 2], 1, 1, true)]);
    let range =
        |name: &str| ValueRange { name: name.into(), low: -1.0, high: 3.0, ..Default::default() };
    let mut schema = schema();
    schema.values = vec!["watch".into()];
    schema.user_features.push(Feature::new("income", FeatureKind::Dense));
    schema.context_features.push(Feature::new("battery", FeatureKind::Dense));
    schema.ranges = ["watch", "length", "income", "battery"].map(range).to_vec();
    schema.validate().unwrap();
    let mut state =
        FeatureState::new(&Dataset { schema: Arc::new(schema), ..data }, FeatureConfig::default());
    state.upsert_item(Item { id: 2, ids: vec![1], dense: vec![-1e15], ..Item::default() }).unwrap();
    state.upsert_user(User { id: 1, ids: vec![1], dense: vec![3e38] }).unwrap();
    let mut outcome = Outcome::UNKNOWN;
    outcome.values[..2].fill(1e15);
    let context = ContextFeatures { ids: vec![5], dense: vec![-2.0] };
    let row = |item| {
        let context = context.clone();
        Impression { outcome, context, ..impression(2, [3, 4], 1, item, true) }
    };
    state.apply(&row(2));
    let sent = Item { id: 3, ids: vec![1], dense: vec![9.0], ..Item::default() };
    let mut request = request_input(&[row(4), row(2), row(3)]);
    request.candidates[2].features = Some(Arc::new(sent));
    let example = state.fetch(&request, 8);
    assert_eq!(example.user.dense, [3.0]);
    // Item 4 has length 4 in the data set.
    let lengths: Vec<f32> = example.targets.iter().map(|target| target.item.dense[0]).collect();
    assert_eq!(lengths, [3.0, -1.0, 3.0]);
    assert_eq!(example.history[0].item.dense, [-1.0]);
    for target in &example.targets {
        assert_eq!(target.features[..3], [target.item.dense[0], 3.0, -1.0]);
    }
    for Target { outcome, .. } in &example.targets {
        assert_eq!(outcome.values[..2], [3.0, 1e15], "the schema has one value");
        assert!(outcome.values[2].is_nan(), "unknown stays unknown");
    }
    let [kept, others @ ..] = example.history[0].outcome.values;
    assert_eq!((kept, others.map(f32::is_nan)), (3.0, [true; MAX_VALUES - 1]));
}

#[test]
fn history_holds_only_what_was_known() {
    let dir = tempfile::tempdir().unwrap();
    // Item 1's outcome takes long. Item 2's comes at the time of request 3, which thus lacks it.
    let rows = [
        impression(1, [100, 900], 1, 1, true),
        impression(2, [200, 300], 1, 2, false),
        impression(3, [300, 310], 1, 3, true),
        impression(4, [1000, 1001], 1, 4, true),
    ];
    let data = dataset(dir.path(), rows.to_vec());
    let examples: Vec<Example> =
        Replay::new(&data, options(Span::default())).unwrap().map(Result::unwrap).collect();
    assert_eq!(examples.len(), 4);
    let histories: Vec<Vec<u64>> = examples.iter().map(seen).collect();
    assert_eq!(
        histories,
        [vec![], vec![], vec![], vec![1, 2, 3]],
        "in the order shown, not in the order known"
    );
    assert_eq!(examples[3].targets[0].ids, [1, 4, 1, 0, 10, 10, 5]);
}

#[test]
fn a_replay_that_resumes_yields_what_an_unbroken_one_yields() {
    let dir = tempfile::tempdir().unwrap();
    let rows = (0..40).map(|i| {
        impression(
            i,
            [i as i64 * 100, i as i64 * 100 + 1 + (i as i64 * 37) % 900],
            i % 3 + 1,
            i % 4 + 1,
            i % 3 == 0,
        )
    });
    let data = dataset(dir.path(), rows.collect());
    let all: Vec<Example> =
        Replay::new(&data, options(Span::default())).unwrap().map(Result::unwrap).collect();
    let first = Replay::new(&data, options(Span { from_ms: None, until_ms: Some(2000) })).unwrap();
    let mut parts: Vec<Example> = first.map(Result::unwrap).collect();
    assert_eq!(parts.len(), 20);
    let rest = options(Span { from_ms: Some(2000), until_ms: None });
    parts.extend(Replay::new(&data, rest).unwrap().map(Result::unwrap));
    assert_eq!(format!("{all:?}"), format!("{parts:?}"));
}

#[test]
fn counters_give_smoothed_rates_relative_to_the_prior() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), vec![]);
    let mut state = FeatureState::new(&data, FeatureConfig::default());
    for i in 0..40 {
        state.apply(&impression(i, [0, 1], 1, 1 + i % 2, i % 2 == 0));
    }
    let ask = |item, time_ms| RequestInput {
        request: 9,
        user: 1,
        user_features: None,
        surface: 1,
        time_ms,
        candidates: vec![CandidateInput {
            item,
            features: None,
            context: Arc::default(),
            outcome: Outcome::UNKNOWN,
            truth: vec![],
        }],
    };
    let columns = state.schema().feature_columns();
    let at = |item, time_ms, name: &str| {
        let column = columns.iter().position(|column| column == name).unwrap();
        state.fetch(&ask(item, time_ms), 0).targets[0].features[column]
    };
    // 20 of 20 clicks, 20 more at the prior of one half: 30 of 40, ln 3 above it.
    assert!((at(1, 1, "item_rate") - 3_f32.ln()).abs() < 1e-6);
    assert!((at(2, 1, "item_rate") + 3_f32.ln()).abs() < 1e-6);
    assert!(at(1, 1, "item_effect") > 0.3 && at(2, 1, "item_effect") < -0.3);
    assert!(at(1, 1, "user_surface_effect").abs() < 0.1, "half of what the user saw was clicked");
    assert_eq!(at(3, 1, "item_effect"), 0.0);
    assert!(at(1, 1, "click_log_odds") > 0.8 && at(2, 1, "click_log_odds") < -0.8);
    assert!(at(1, 1, "click_doubt") < at(3, 1, "click_doubt"), "item 3 was never shown");
    assert_eq!(at(1, 1, "item_count"), 20_f32.ln_1p());
    assert_eq!(at(1, 1, "user_surface_rate"), 0.0);
    assert_eq!(at(3, 1, "item_count"), 0.0);
    assert_eq!(at(999, 1, "length"), 0.0, "an unknown item has no length");
    // After one half-life the tag's 20 impressions count as 10.
    assert!((at(1, 86_400_001, "tag_count") - 10_f32.ln_1p()).abs() < 1e-3);
    assert_eq!(at(1, 3_600_000, "item_age"), 1_f32.ln_1p());
    assert_eq!(at(1, 5_000, "seconds_since_last_event"), 5_f32.ln_1p());
    assert_eq!(at(1, 5_000, "user_history_len"), 40_f32.ln_1p());
}

#[test]
fn actions_that_are_not_known_count_for_no_rate() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), vec![]);
    let mut state = FeatureState::new(&data, FeatureConfig::default());
    let mut row = impression(1, [0, 1], 1, 1, true);
    row.outcome.known = 0b10;
    state.apply(&row);
    let example = state.fetch(&replay::request_input(&[row]), 4);
    assert_eq!(example.targets[0].features[1..7], [0.0; 6]);
    assert_eq!(example.history.len(), 1);
}

#[test]
fn large_requests_come_in_parts_with_ids_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(
        dir.path(),
        (0..5).map(|i| impression(7, [50, 60 + i], 1, 1 + i as u64 % 4, false)).collect(),
    );
    let replay =
        Replay::new(&data, ReplayOptions { max_targets: 2, ..options(Span::default()) }).unwrap();
    let examples: Vec<Example> = replay.map(Result::unwrap).collect();
    assert_eq!(examples.iter().map(|e| e.targets.len()).collect::<Vec<_>>(), [2, 2, 1]);
    assert_eq!(examples[0].request, 7);
    assert!(examples[1].request != 7 && examples[1].request != examples[2].request);
}

#[test]
fn pretraining_goes_round_by_round_and_never_looks_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows: Vec<Impression> = (0..30)
        .map(|i| {
            impression(100 + i, [i as i64 * 1000, i as i64 * 1000], 1 + i % 3, 1 + i % 4, true)
        })
        .map(|row| Impression { history_only: true, surface: 0, ..row })
        .collect();
    rows.push(impression(1, [40_000, 40_001], 1, 1, true));
    let data = dataset(dir.path(), rows);
    let options = PretrainingOptions {
        passes: 1,
        until_ms: None,
        history_len: 50,
        chunk: 4,
        seed: 3,
        features: FeatureConfig::default(),
    };
    let pretraining = Pretraining::new(&data, options).unwrap();
    assert_eq!(pretraining.examples(), 9);
    let examples: Vec<Example> = pretraining.collect();
    assert_eq!(
        examples.iter().map(|e| e.targets.len()).collect::<Vec<_>>(),
        [4, 4, 4, 4, 4, 4, 2, 2, 2]
    );
    assert_eq!(
        examples.iter().map(|e| e.history.len()).collect::<Vec<_>>(),
        [0, 0, 0, 4, 4, 4, 8, 8, 8]
    );
    for example in &examples {
        assert!(example.history.iter().all(|event| event.time_ms < example.time_ms));
    }
    // Another pass yields the same again, from empty counters.
    let twice: Vec<Example> =
        Pretraining::new(&data, PretrainingOptions { passes: 2, ..options }).unwrap().collect();
    assert_eq!(twice.len(), 18);
    for (first, second) in twice[..9].iter().zip(&twice[9..]) {
        assert_eq!(first.history.len(), second.history.len());
        for (a, b) in first.targets.iter().zip(&second.targets) {
            assert_eq!((&a.ids, &a.features), (&b.ids, &b.features));
        }
    }
    // The same events are history for the one real request, and are no requests themselves.
    let replayed: Vec<Example> = Replay::new(&data, super::tests::options(Span::default()))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(replayed.len(), 1);
    assert_eq!(replayed[0].history.len(), 8, "the last of ten");
}

#[test]
fn a_correction_moves_counters_and_the_event_as_if_it_had_been_known() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), vec![]);
    let (mut told, mut corrected) = (
        FeatureState::new(&data, FeatureConfig::default()),
        FeatureState::new(&data, FeatureConfig::default()),
    );
    for i in 0..20 {
        let right = impression(i, [i as i64, i as i64], 1, 1 + i % 2, i % 3 == 0);
        told.apply(&right);
        let mut wrong = right.clone();
        // Half of the labels were the opposite, and half were not known.
        if i % 2 == 0 {
            wrong.outcome.actions ^= 1;
        } else {
            wrong.outcome.known = 0b10;
        }
        corrected.apply(&wrong);
        assert!(corrected.correct(&right));
        assert!(corrected.correct(&right), "a correct outcome does not change");
    }
    let ask = |state: &FeatureState| {
        let mut row = impression(99, [30, 30], 1, 1, true);
        row.outcome = Outcome::UNKNOWN;
        state.fetch(&replay::request_input(&[row]), 50)
    };
    let (told, corrected) = (ask(&told), ask(&corrected));
    assert_eq!(format!("{:?}", told.history), format!("{:?}", corrected.history));
    let columns = data.schema.feature_columns();
    for (name, (a, b)) in
        columns.iter().zip(told.targets[0].features.iter().zip(&corrected.targets[0].features))
    {
        // Effects learn the correction as one more outcome; tallies are what they would have been.
        if !["effect", "log_odds", "doubt"].iter().any(|end| name.ends_with(end)) {
            assert!((a - b).abs() < 1e-5, "{name}: {a} {b}");
        }
    }
    let mut state = FeatureState::new(&data, FeatureConfig::default());
    assert!(!state.correct(&impression(1, [1, 1], 1, 1, true)), "there is nothing to correct");
}

/// An item's newest vector is in candidates and histories, and one of another width in neither.
#[test]
fn a_vector_that_was_told_replaces_that_of_the_data_set_everywhere_and_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    dataset(dir.path(), vec![]);
    let file = Content { width: 2, items: vec![1, 2], vectors: vec![1.0, 0.0, 0.0, 1.0] };
    file.write(dir.path()).unwrap();
    let data = Dataset::open(dir.path()).unwrap();
    let mut state = FeatureState::new(&data, FeatureConfig::default());
    let told = |id: u64, content: &[f32]| {
        let (ids, dense) = (vec![id % 2 + 10], vec![id as f32]);
        Item { id, ids, dense, content: content.into() }
    };
    for (request, item) in [(1, 1), (2, 2), (3, 9)] {
        state.apply(&impression(request, [request as i64, request as i64], 1, item, true));
    }
    let error = state.upsert_item(told(1, &[1.0])).unwrap_err().to_string();
    assert!(error.contains("1 numbers") && error.contains("have 2"), "{error}");
    state.upsert_item(told(1, &[0.6, 0.8])).unwrap();
    state.upsert_item(told(9, &[-1.0, 0.0])).unwrap();
    state.apply(&impression(4, [4, 4], 1, 1, true));
    state.upsert_item(told(1, &[0.8, 0.6])).unwrap();
    // Other features, and the vector that it has.
    state.upsert_item(Item { dense: vec![7.0], ..told(1, &[]) }).unwrap();
    let saved = postcard::to_allocvec(&state.saved()).unwrap();
    let mut restored = FeatureState::new(&data, FeatureConfig::default());
    restored.restore(postcard::from_bytes(&saved).unwrap()).unwrap();
    let rows = [1, 2, 9].map(|item| impression(5, [5, 5], 1, item, true));
    for state in [&state, &restored] {
        let example = state.fetch(&request_input(&rows), 8);
        let targets = example.targets.iter().map(|target| target.item.content.to_vec());
        assert_eq!(targets.collect::<Vec<_>>(), [[0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]);
        let history = example.history.iter().map(|event| event.item.content.to_vec());
        let expected = [[0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.8, 0.6]];
        assert_eq!(history.collect::<Vec<_>>(), expected);
        assert_eq!(example.history[3].item.dense, [1.0], "features are those of then");
        assert_eq!(example.targets[0].features[0], 7.0);
    }
    // There is no room for them any more.
    let config = FeatureConfig { max_content_mib: 0, ..FeatureConfig::default() };
    let mut restored = FeatureState::new(&data, config);
    restored.restore(postcard::from_bytes(&saved).unwrap()).unwrap();
    let example = restored.fetch(&request_input(&rows), 8);
    let targets = example.targets.iter().map(|target| target.item.content.to_vec());
    assert_eq!(targets.collect::<Vec<_>>(), [vec![1.0, 0.0], vec![0.0, 1.0], vec![]]);
    assert_eq!(example.history[3].item.content[..], [1.0, 0.0]);
    assert_eq!(example.targets[0].features[0], 7.0, "features need no room for vectors");
    // The data set has other vectors now.
    let other = Content { width: 1, items: vec![1], vectors: vec![1.0] };
    other.write(dir.path()).unwrap();
    let data = Dataset::open(dir.path()).unwrap();
    let mut restored = FeatureState::new(&data, FeatureConfig::default());
    restored.restore(postcard::from_bytes(&saved).unwrap()).unwrap();
    let example = restored.fetch(&request_input(&rows), 8);
    let targets = example.targets.iter().map(|target| target.item.content.to_vec());
    assert_eq!(targets.collect::<Vec<_>>(), [vec![1.0], vec![], vec![]]);
}

#[test]
fn a_state_that_is_saved_and_restored_goes_on_as_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), vec![]);
    let mut state = FeatureState::new(&data, FeatureConfig::default());
    for i in 0..60 {
        if i == 30 {
            state
                .upsert_item(Item { id: 2, ids: vec![9], dense: vec![4.5], ..Item::default() })
                .unwrap();
            state.upsert_user(User { id: 77, ids: vec![1], dense: vec![] }).unwrap();
        }
        state.apply(&impression(
            i,
            [i as i64 * 1000, i as i64 * 1000],
            i % 3 + 1,
            i % 6 + 1,
            i % 4 == 0,
        ));
    }
    let bytes = postcard::to_allocvec(&state.saved()).unwrap();
    let mut again = FeatureState::new(&data, FeatureConfig::default());
    again.restore(postcard::from_bytes(&bytes).unwrap()).unwrap();
    assert_eq!((again.items(), again.histories.iter().count()), (state.items(), 3));
    for step in 0..20 {
        let row = impression(
            100 + step,
            [70_000 + step as i64, 70_001],
            step % 3 + 1,
            step % 6 + 1,
            step % 2 == 0,
        );
        let ask = replay::request_input(std::slice::from_ref(&row));
        let (one, other) = (state.fetch(&ask, 50), again.fetch(&ask, 50));
        assert_eq!(format!("{one:?}"), format!("{other:?}"));
        state.apply(&row);
        again.apply(&row);
    }
}
