//! Tests with real components in the host's runtime: the in-tree experts pass every check on
//! several worlds, failures of hostile guests are reported, and trained parameters can be used.

use hypercast_core::prerequisite::skip;
use hypercast_data::schema::{Feature, FeatureKind};
use hypercast_data::simulate;
use hypercast_fm::example::Outcome;
use std::path::{Path, PathBuf};

use hypercast_harness::{Failure, Harness, World, session};
use serde_json::{Value, json};

fn components(variable: &str, test: &str) -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os(variable) else {
        skip(test, &format!("{variable} names no folder; `cargo verify` builds it"));
        return Vec::new();
    };
    let entries = std::fs::read_dir(&folder).expect("the folder can be read");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "wasm"));
    assert!(!files.is_empty(), "{variable} names a folder without components");
    files.sort();
    files
}

fn name(file: &Path) -> String {
    file.file_stem().unwrap().to_string_lossy().into_owned()
}

#[test]
fn in_tree_components_pass_every_check_with_another_fm_and_seed() {
    for file in components("HYPERCAST_PLUGINS", "in-tree components") {
        let harness = World::default().tae_dim(16).seed(3).component(&file).unwrap();
        harness.check_all().unwrap_or_else(|failures| panic!("{}: {failures}", name(&file)));
    }
}

#[test]
fn a_component_trained_on_a_log_predicts_it_better_and_its_parameters_can_be_loaded() {
    for file in components("HYPERCAST_PLUGINS", "training") {
        let fresh = Harness::of(&file);
        let log = fresh.world().log(300, &[0, 1, 2]);
        let before = entropy(&fresh, &log);
        let trained = fresh.trained(&log).unwrap();
        let after = entropy(&trained, &log);
        assert!(after < before, "{}: {before} before and {after} after", name(&file));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("parameters.safetensors");
        trained.parameter_values().save(&path).unwrap();
        let opened = Harness::of(&file).parameters(&path).unwrap();
        let one = trained.predict(&log[0]).unwrap().tasks;
        let two = opened.predict(&log[0]).unwrap().tasks;
        assert!(one.iter().zip(&two).all(|(a, b)| a.values == b.values), "{}", name(&file));
    }
}

/// What an installed host tells a test is what the harness tells it in this process.
#[test]
fn questions_of_a_test_kit_are_answered_as_by_the_harness() {
    let files = components("HYPERCAST_PLUGINS", "questions");
    let Some(file) = files.iter().find(|file| name(file) == "hello-expert") else { return };
    let questions = [
        json!("check_all"),
        json!({ "open": { "component": file, "tae_dim": 16, "seed": 3 } }),
        json!({ "predict": { "request": { "request": 5, "candidates": 3, "surface": "search" } } }),
        json!({ "rank": {
            "request": { "candidates": [{ "id": 7 }, { "id": 8 }, { "id": 9 }], "limit": 2 },
            "predictions": { "click": [0.1, 0.9, 0.5], "like": [0, 0, 0] },
        } }),
        json!({ "rank": { "request": { "candidates": 2, "context": { "tempo": 1 } } } }),
        json!({ "rank_call": { "request": { "candidates": 4 } } }),
        json!("host_info"),
        json!("sing"),
    ];
    let input = questions.iter().map(|question| format!("{question}\n")).collect::<String>();
    let mut output = Vec::new();
    session::serve(input.as_bytes(), &mut output).unwrap();
    let answers: Vec<Value> =
        output.split(|byte| *byte == b'\n').flat_map(serde_json::from_slice).collect();
    let [first, open, predicted, ranked, unknown, call, info, other] = &answers[..] else {
        panic!("{answers:?}")
    };
    let refused = |answer: &Value, why: &str| {
        assert!(answer["error"].as_str().is_some_and(|error| error.contains(why)), "{answer}");
    };
    refused(first, "open an expert first");
    assert_eq!(open["ok"]["name"], "hello");
    let harness = World::default().tae_dim(16).seed(3).component(file).unwrap();
    let case = harness.world().request(5).surface("search").candidates(3).serving().build();
    let clicks = harness.predict(&case).unwrap();
    assert_eq!(predicted["ok"]["click"], json!(clicks.task("click").unwrap()));
    let places = ranked["ok"]["ranking"].as_array().unwrap();
    let items: Vec<&Value> = places.iter().map(|place| &place["id"]).collect();
    assert_eq!(items, [8, 9]);
    refused(unknown, "the schema has no feature `tempo`");
    assert_eq!(call["ok"]["candidates"].as_array().map(Vec::len), Some(4));
    assert_eq!(info["ok"]["tae_dim"], 16);
    refused(other, "cannot answer that");
}

/// The mean cross-entropy of predicted clicks.
fn entropy(harness: &Harness, log: &[hypercast_harness::Case]) -> f64 {
    let rows = log.iter().flat_map(|case| {
        let predictions = harness.predict(case).unwrap();
        let clicks = predictions.task("click").unwrap().to_vec();
        let labels = case.example.targets.iter().map(|target| target.outcome.actions & 1 == 1);
        clicks.into_iter().zip(labels).collect::<Vec<_>>()
    });
    let (mut sum, mut count) = (0.0, 0.0);
    for (click, label) in rows {
        sum -= f64::from(if label { click } else { 1.0 - click }).max(1e-7).ln();
        count += 1.0;
    }
    sum / count
}

#[test]
fn a_team_labels_by_its_items_thresholds_and_weighs_by_where_they_were_ranked() {
    let files = components("HYPERCAST_HOSTILE", "labels and weights of a team");
    let Some(file) = files.iter().find(|file| name(file) == "search_team") else { return };
    let mut schema = simulate::schema(3);
    schema.item_features.push(Feature::new("threshold", FeatureKind::Dense));
    // A task of the feed alone never counts on the search page.
    schema.tasks.retain(|task| task.name != "finish");
    let world = World::new(schema);
    let team = world.component(file).unwrap();
    let watched = |watch: f32| {
        let mut outcome = Outcome::UNKNOWN;
        outcome.values[0] = watch;
        let request = world.request(1).surface("search").items([7, 8, 9]).outcome(outcome);
        let request = request.feature_rows("threshold", &[0.4, 0.6, 0.5]);
        request.ranked_at(&[0.0, 2.0, f32::NAN], &[0.5, f32::NAN, f32::NAN]).build()
    };
    let labels = |watch| {
        let labels = team.labels(&[watched(watch)]).unwrap();
        let engaged = labels.into_iter().find(|own| own.task == "engaged").unwrap();
        (engaged.labels, engaged.mask)
    };
    assert_eq!(labels(0.5), (vec![1.0, 0.0, 1.0], vec![1; 3]));
    assert_eq!(labels(f32::NAN).1, [0; 3]);
    // Chance put the first one there in half of the requests; few see the third place.
    assert_eq!(team.weights(&[watched(0.5)]).unwrap(), vec![vec![2.0, 2.0, 1.0]; 4]);
    team.check_labels().unwrap();
    team.trained(&world.log(60, &[1])).unwrap();
}

/// A method of the harness that runs one check.
type HarnessCheck = fn(&Harness) -> Result<(), Failure>;

/// Hostile guests that load, the check that each fails, and part of the failure's text.
const FAILURES: [(&str, HarnessCheck, &str); 12] = [
    ("spin", Harness::check_ranking, "deadline"),
    ("bomb", Harness::check_ranking, "MiB of memory"),
    ("trap", Harness::check_ranking, "trap.rs:10:9: intended panic with"),
    ("rank_error", Harness::check_determinism, "returned an error"),
    ("nan", Harness::check_ranking, "score NaN"),
    ("nan_network", Harness::check_predictions, "prediction NaN"),
    ("duplicates", Harness::check_unknown_features, "bad output"),
    ("labels_short", Harness::check_labels, "`labels` gave a bad output"),
    ("sample_invalid", Harness::check_calibration, "`sample` gave a bad output"),
    ("nan_schedule", Harness::check_gates, "step 0 of 1000"),
    ("spin_schedule", Harness::check_gates, "deadline"),
    ("trap_evaluate", Harness::check_gates, "trapped"),
];

#[test]
fn failures_of_hostile_guests_are_reported_by_name_and_cause() {
    // The deadline is short, because two of the guests never return.
    let world = World::default().max_candidates(50).deadline_ms(500);
    let files = components("HYPERCAST_HOSTILE", "hostile guests");
    for (guest, check, word) in FAILURES.iter().filter(|_| !files.is_empty()) {
        let file = files.iter().find(|file| name(file) == *guest).expect("a guest of that name");
        let failure = check(&world.component(file).unwrap()).unwrap_err().to_string();
        assert!(failure.contains(word) && failure.contains(guest), "{guest}: {failure}");
    }
}
