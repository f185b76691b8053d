//! What is shown first is clicked more, whatever it is. A model that is told the position in
//! training alone does not take that for a merit of the items that an earlier ranking put first.

use std::path::Path;

use hypercast_config::Config;
use hypercast_data::{
    dataset::{ContextFeatures, Dataset, Entities, Impression, write_dataset},
    logs::LogReader,
    schema::{Feature, FeatureKind, MISSING, Schema, Task, TaskKind, TaskRole},
};
use hypercast_fm::{
    example::{Item, Outcome},
    inference::{self, FmServingOptions},
    metrics::{LogLossSums, ScoredPrediction, auc},
    spec::FmConfig,
};
use hypercast_train::materialise::{self, EmbeddingCheckpoint};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::small_fm;

/// Requests to learn from, which the earlier ranking answered.
const LEARNED: u64 = 3000;

/// Requests whose items were shown in an order by chance.
const TESTED: u64 = 1000;

const START_MS: i64 = 1_764_000_000_000;

/// The chance that a position is looked at.
const EXAMINED: [f64; 5] = [1.0, 0.55, 0.3, 0.16, 0.09];

/// What the schema says of the position.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Position {
    LeftOut,
    Ordinary,
    TrainingOnly,
}

fn schema(position: Position) -> Schema {
    let feature = Feature {
        optional: true,
        training_only: position == Position::TrainingOnly,
        ..Feature::new("position", FeatureKind::Dense)
    };
    Schema {
        surfaces: vec!["feed".into()],
        actions: vec!["click".into()],
        values: vec![],
        tasks: vec![Task::of_label("click", TaskRole::Main, TaskKind::Binary)],
        item_features: Feature::list(&["merit", "bid"], FeatureKind::Dense),
        user_features: vec![],
        context_features: if position == Position::LeftOut { vec![] } else { vec![feature] },
        counters: vec![],
        ids: Default::default(),
        ranges: vec![],
        retired: vec![],
        owned: Default::default(),
        alignment: Default::default(),
        earlier: vec![],
    }
}

/// Five items a request, each shown once, so that its id tells nothing. Whoever looks at an item
/// clicks by its merit. The earlier ranking sorts by what was bid, which says nothing of merit. One
/// request of ten is of an old app, which does not log the position.
fn world(dir: &Path, position: Position) -> Dataset {
    let schema = schema(position);
    let mut random = StdRng::seed_from_u64(11);
    let (mut items, mut rows) = (Vec::new(), Vec::new());
    for request in 1..=LEARNED + TESTED {
        let is_learned = request <= LEARNED;
        let first = items.len();
        for _ in EXAMINED {
            let [merit, bid]: [f32; 2] = [random.random(), random.random()];
            items.push(Item { id: items.len() as u64, dense: vec![merit, bid], ..Item::default() });
        }
        let mut shown: Vec<usize> = (first..items.len()).collect();
        if is_learned {
            shown.sort_by(|&a, &b| items[b].dense[1].total_cmp(&items[a].dense[1]));
        }
        let time_ms = START_MS + request as i64 * 60_000;
        for (place, at) in shown.into_iter().enumerate() {
            let likes = 0.15 + 0.6 * f64::from(items[at].dense[0]);
            let clicked = random.random_bool(likes * EXAMINED[place]);
            // A request that is served does not have it.
            let is_logged = is_learned && request % 10 != 0;
            let dense = vec![if is_logged { 1.0 + place as f32 } else { MISSING }];
            let dense = if position == Position::LeftOut { vec![] } else { dense };
            rows.push(Impression {
                request,
                time_ms,
                outcome_ms: time_ms + 1,
                user: request % 50,
                item: items[at].id,
                surface: 0,
                outcome: Outcome { actions: clicked.into(), known: 1, ..Outcome::UNKNOWN },
                context: ContextFeatures { ids: vec![], dense },
                truth: vec![],
                history_only: false,
            });
        }
    }
    let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &[] };
    write_dataset(dir, &entities, &mut rows).unwrap();
    Dataset::open(dir).unwrap()
}

fn fm_config() -> FmConfig {
    FmConfig { learning_rate: 5e-3, ..small_fm::config() }
}

/// How well requests are served that do not know the position.
#[derive(Debug)]
struct Served {
    /// Of clicks on items that were shown in an order by chance.
    ne: f64,
    /// The share of pairs of items, one of high merit and one of low, that are in the right order.
    order: f64,
}

fn served(position: Position) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let dataset = world(&dir.path().join("data"), position);
    let mut trainer = small_fm::trainer(&dataset, &fm_config(), &dir.path().join("work"));
    let examples = small_fm::examples(&dataset);
    let (learned, tested) = examples.split_at(LEARNED as usize);
    for batch in learned.chunks(32) {
        trainer.step(&batch.iter().collect::<Vec<_>>()).unwrap();
    }
    let output = trainer.predict(&tested.iter().collect::<Vec<_>>()).unwrap();
    let mut sums = LogLossSums::default();
    let rows = output.predictions.iter().zip(&output.labels);
    rows.for_each(|(&prediction, &label)| sums.push(prediction, label == 1.0));
    let targets = tested.iter().flat_map(|example| &example.targets);
    let by_merit = targets.zip(&output.predictions).map(|(target, &probability)| {
        ScoredPrediction { user: 0, probability, label: target.item.dense[0] > 0.5 }
    });
    let order = auc(&mut by_merit.collect::<Vec<_>>()).unwrap();
    Served { ne: sums.normalized_entropy().unwrap(), order }
}

#[test]
fn a_position_for_training_only_ranks_by_merit() {
    let all = [Position::LeftOut, Position::Ordinary, Position::TrainingOnly].map(|position| {
        let served = served(position);
        println!("{position:?}: {served:.3?}");
        served
    });
    let [left_out, ordinary, training_only] = all;
    for other in [left_out, ordinary] {
        assert!(training_only.ne < other.ne - 0.01, "{training_only:?} {other:?}");
        assert!(training_only.order > other.order + 0.02, "{training_only:?} {other:?}");
    }
}

#[test]
fn logs_have_the_position_and_embeddings_that_were_made_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = world(&dir.path().join("data"), Position::TrainingOnly);
    let examples = small_fm::examples(&dataset);
    let checkpoint = dir.path().join("fm");
    let mut trainer = small_fm::trainer(&dataset, &fm_config(), &dir.path().join("work"));
    let learned = 10;
    trainer.step(&examples[..learned].iter().collect::<Vec<_>>()).unwrap();
    trainer.checkpoint(&checkpoint, "1.0.0").unwrap();
    let from_ms = Some(examples[learned].time_ms);
    let embedding =
        EmbeddingCheckpoint { dir: checkpoint.clone(), from_ms, allow_look_ahead: false };
    let logs = dir.path().join("logs");
    let config = Config { fm: fm_config(), ..Config::default() };
    materialise::past(&dataset, &config, &embedding, &logs).unwrap();
    let columns = dataset.schema.feature_columns();
    let column = columns.iter().position(|name| name == "position").unwrap();
    let fm = inference::load(&checkpoint, FmServingOptions::default()).unwrap();
    // A user's first request has no history, whose items logs do not keep whole.
    for logged in LogReader::open(&logs).unwrap().iter().take(40) {
        let mut logged = logged.unwrap();
        let targets = &mut logged.example.targets;
        let places: Vec<f32> = targets.iter().map(|target| target.features[column]).collect();
        if logged.example.request.is_multiple_of(10) {
            assert!(places.iter().all(|place| place.is_nan()), "{places:?}");
        } else {
            assert_eq!(places, [1.0, 2.0, 3.0, 4.0, 5.0]);
        }
        targets.iter_mut().for_each(|target| target.features[column] = 9.0);
        let served = fm.infer(&[&logged.example]).unwrap().tae;
        let is_near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-2;
        assert!(served.iter().zip(&logged.tae).all(is_near), "{served:?} {:?}", logged.tae);
    }
}
