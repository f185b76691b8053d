//! Policies of files on a small log, by the command's own options.

use std::path::Path;

use clap::Parser;
use hypercast_data::{
    dataset::{ContextFeatures, Dataset, Entities, Impression, timeline::Span, write_dataset},
    features::{
        FeatureConfig,
        replay::{Replay, ReplayOptions},
    },
    logs::{LogOptions, LogRow, LogVersion, LogWriter, TaeStorage},
    ranked_place::RankedPlace,
    schema::{Feature, FeatureKind, Schema, category_id},
    simulate,
};
use hypercast_fm::example::{Outcome, Target};

use super::report::PolicyReport;
use crate::commands::{EvaluateCommand, EvaluateSubject, LabCommand};

/// The program's command line.
#[derive(Debug, Parser)]
struct LabArguments {
    #[command(subcommand)]
    command: LabCommand,
}

/// Clicks on two surfaces, with a position and a propensity.
fn schema() -> Schema {
    let mut schema = simulate::schema(2);
    for (name, kind) in [("position", FeatureKind::Categorical), ("propensity", FeatureKind::Dense)]
    {
        let feature = Feature { training_only: true, ..Feature::new(name, kind) };
        schema.context_features.push(feature);
    }
    schema
}

/// An item at a position; whether it was clicked, if anybody knows.
fn shown(request: u64, item: u64, position: &str, clicked: Option<bool>) -> Impression {
    let (known, actions) = (clicked.is_some().into(), (clicked == Some(true)).into());
    Impression {
        request,
        time_ms: 1_764_000_000_000 + request as i64,
        outcome_ms: 1_764_000_000_000 + request as i64 + 10,
        user: 1,
        item,
        surface: 0,
        outcome: Outcome { actions, known, ..Outcome::UNKNOWN },
        context: ContextFeatures { ids: vec![0, category_id(position)], dense: vec![0.5, 0.5] },
        truth: Vec::new(),
        history_only: false,
    }
}

/// Four rows that count on the surface `feed`, among others.
fn log() -> Vec<Impression> {
    let mut elsewhere = shown(4, 1, "1", Some(true));
    (elsewhere.surface, elsewhere.context.dense[1]) = (1, f32::NAN);
    vec![
        Impression { history_only: true, ..shown(0, 9, "1", Some(true)) },
        shown(1, 1, "1", Some(true)),
        shown(1, 2, "2", Some(false)),
        shown(2, 2, "1", Some(true)),
        shown(3, 3, "1", Some(true)),
        shown(3, 9, "2", None),
        elsewhere,
    ]
}

const POLICY: &str = "item,position,probability\n1,1,0.25\n2,1,0.75\n1,2,0.5\n2,2,0.5\n";

const ESTIMATES: &str = "request,item,estimate\n1,1,0.5\n1,2,0.25\n2,1,1\n2,2,0.5\n3,1,0\n3,2,0.5\n\
                         3,3,1\n";

/// Evaluates with the files of `dir` and further arguments.
fn evaluate(
    dir: &Path,
    mut log: Vec<Impression>,
    more: &[&str],
) -> std::result::Result<PolicyReport, String> {
    let data = dir.join("data");
    let entities = Entities { schema: &schema(), items: &[], item_names: &[], users: &[] };
    write_dataset(&data, &entities, &mut log).unwrap();
    evaluate_from(dir, "data", more)
}

/// Evaluates the data set or feature logs in a folder of `dir`.
fn evaluate_from(
    dir: &Path,
    from: &str,
    more: &[&str],
) -> std::result::Result<PolicyReport, String> {
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let given = ["lab", "evaluate", "policy", "--reward", "click", "--from", &file(from)];
    let more =
        more.iter().map(|word| if word.ends_with(".csv") { file(word) } else { word.to_string() });
    let arguments = given.iter().map(|word| word.to_string()).chain(more);
    let command = LabArguments::try_parse_from(arguments).unwrap().command;
    let LabCommand::Evaluate(EvaluateCommand {
        subject: Some(EvaluateSubject::Policy(of)), ..
    }) = command
    else {
        panic!("another command")
    };
    super::run(&of).map_err(|error| error.to_string())
}

fn values(report: &PolicyReport) -> Vec<f64> {
    report.estimates.estimates.iter().map(|of| of.value).collect()
}

fn assert_near(values: &[f64], expected: &[f64]) {
    assert_eq!(values.len(), expected.len());
    for (value, expected) in values.iter().zip(expected) {
        assert!((value - expected).abs() < 1e-9, "{value} is not {expected}");
    }
}

fn write(dir: &Path, files: &[(&str, &str)]) {
    files.iter().for_each(|(name, text)| std::fs::write(dir.join(name), text).unwrap());
}

#[test]
fn the_rows_that_count_are_weighted_by_what_the_files_say() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[("policy.csv", POLICY), ("estimates.csv", ESTIMATES)]);
    let files = ["--policy", "policy.csv", "--surface", "feed"];
    let report = evaluate(dir.path(), log(), &files).unwrap();
    // Weights are 0.5, 1, 1.5 and 0.
    assert_near(&values(&report), &[0.75, 0.5, 2.0 / 3.0]);
    assert_eq!((report.estimates.rows, report.estimates.requests), (4, 3));
    assert_eq!(report.without_reward, 1);
    let text = report.to_string();
    assert!(text.contains("too few to tell") && text.contains("4 rows of 3 requests"), "{text}");

    let all = [&files[..], &["--estimates", "estimates.csv"]].concat();
    let report = evaluate(dir.path(), log(), &all).unwrap();
    // d is 0.3125, 0.375, 0.625 and 0.375; the corrections are 0.25, -0.25, 0.75 and 0.
    assert_near(&values(&report), &[0.75, 0.421875, 0.5, 2.0 / 3.0, 0.609375]);

    let late = [&files[..], &["--test-from", "1764000000002"]].concat();
    let report = evaluate(dir.path(), log(), &late).unwrap();
    assert_near(&values(&report), &[1.0, 0.75, 1.0]);

    let uniform = ["--policy", "uniform", "--surface", "feed", "--clip", "0.5"];
    let report = evaluate(dir.path(), log(), &uniform).unwrap();
    // Three items are shown, so each weight is 2/3, and 0.5 once it is clipped.
    assert_near(&values(&report), &[0.75, 0.375, 0.75]);
    assert_near(&[report.estimates.weights.clipped_pct], &[100.0]);
}

/// Feature logs of the data set's rows, as of answers that gave each item of the surface `feed` a
/// propensity of a half, at the place of its number.
fn write_logs(dir: &Path) {
    let dataset = Dataset::open(&dir.join("data")).unwrap();
    let options = ReplayOptions {
        span: Span::default(),
        history_len: 4,
        max_targets: 8,
        features: FeatureConfig::default(),
    };
    let tae = TaeStorage::F32;
    let files = LogOptions { history_len: 4, rows_per_file: 100, file_seconds: 0, tae };
    let versions = vec![LogVersion::new("1.0.0", 1)];
    let mut writer =
        LogWriter::create(&dir.join("logs"), &dataset.schema, files, versions).unwrap();
    for example in Replay::new(&dataset, options).unwrap() {
        let example = &example.unwrap();
        let place = |target: &Target| RankedPlace {
            position: target.item.id as u32,
            propensity: Some(0.5),
            arm: "feed@1.0.0".into(),
        };
        let places = example.targets.iter().map(|target| Some(place(target)));
        let ranked: Vec<_> = if example.surface == 0 { places.collect() } else { Vec::new() };
        let (taes, correction) = (vec![0.0; example.targets.len()], false);
        let row = LogRow {
            example,
            taes: &[&taes],
            predictions: &[],
            ranked: &ranked,
            correction,
            ingested_ms: 0,
            place: None,
        };
        writer.write(row).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn feature_logs_have_the_propensities_that_daemons_noted() {
    let dir = tempfile::tempdir().unwrap();
    let by_place = "item,ranked:position,ranked:arm,probability\n1,1,feed@1.0.0,0.25\n\
                    2,2,feed@1.0.0,0.5\n3,3,feed@1.0.0,0.5\n";
    write(dir.path(), &[("policy.csv", POLICY), ("by-place.csv", by_place)]);
    let files = ["--policy", "policy.csv"];
    let expected =
        evaluate(dir.path(), log(), &[&files[..], &["--surface", "feed"]].concat()).unwrap();
    write_logs(dir.path());
    let report = evaluate_from(dir.path(), "logs", &files).unwrap();
    assert_near(&values(&report), &values(&expected));
    assert_eq!((report.estimates.rows, report.estimates.requests), (4, 3));
    // What nobody ranked, on the other surface, is left out by itself.
    assert_eq!((report.without_reward, report.without_propensity), (1, 1));
    let text = report.to_string();
    assert!(text.contains("1 rows without a propensity were left out"), "{text}");
    let report = evaluate_from(dir.path(), "logs", &["--policy", "by-place.csv"]).unwrap();
    // Weights are 0.5, 1, 1 and 1, and the second has no reward.
    assert_near(&values(&report), &[0.75, 0.625, 2.5 / 3.5]);
    let second = ["--policy", "by-place.csv", "--position", "2"];
    let report = evaluate_from(dir.path(), "logs", &second).unwrap();
    assert_near(&values(&report), &[0.5, 0.5, 0.5]);
    let error = evaluate_from(dir.path(), "data", &second).unwrap_err();
    assert!(error.contains("a data set does not have it"), "{error}");
    let elsewhere = ["--policy", "uniform", "--surface", "search"];
    let error = evaluate_from(dir.path(), "logs", &elsewhere).unwrap_err();
    assert!(error.contains("none of 1 rows with a known `click` has a propensity"), "{error}");
}

#[test]
fn rows_without_a_propensity_are_refused_with_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let error = evaluate(dir.path(), log(), &["--policy", "uniform"]).unwrap_err();
    let words = ["impressions.parquet: row 7", "`propensity` is missing", "--surface"];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
    for propensity in [0.0, -0.5, 1.01, f32::INFINITY] {
        let mut rows = log();
        rows[2].context.dense[1] = propensity;
        let error = evaluate(dir.path(), rows, &["--policy", "uniform"]).unwrap_err();
        assert!(error.contains("row 3") && error.contains("no probability"), "{error}");
    }
    let other = ["--policy", "uniform", "--propensity", "position"];
    let error = evaluate(dir.path(), log(), &other).unwrap_err();
    assert!(error.contains("only battery, propensity"), "{error}");
}

#[test]
fn what_a_file_lacks_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let twice = POLICY.replace("2,1,0.75", "2,1,0.95");
    let part = POLICY.replace("2,1,0.75", "2,1,0.5");
    let first = POLICY.split_inclusive('\n').take(3).collect::<String>();
    let few = ESTIMATES.replace("2,1,1\n", "");
    write(
        dir.path(),
        &[
            ("policy.csv", POLICY),
            ("estimates.csv", ESTIMATES),
            ("twice.csv", &twice),
            ("part.csv", &part),
            ("first.csv", &first),
            ("few.csv", &few),
        ],
    );
    let fails = |policy: &str, estimates: &[&str], words: &str| {
        let files = [&["--surface", "feed", "--policy", policy][..], estimates].concat();
        let error = evaluate(dir.path(), log(), &files).unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    fails("twice.csv", &[], "twice.csv: the probabilities of a situation are more than 1");
    fails("first.csv", &[], "situation of row 3 of the log (request 1), by position");
    let given = ["--estimates", "estimates.csv"];
    fails("part.csv", &given, "part.csv: the probabilities of a situation are less than 1");
    let part = ["--surface", "feed", "--policy", "part.csv"];
    evaluate(dir.path(), log(), &part).expect("IPS and SNIPS need no more");
    let words = "few.csv: it has no estimate of the item 1 in the situation of row 4";
    fails("policy.csv", &["--estimates", "few.csv"], words);
    fails("missing.csv", &[], "no file has this name");
    let error = evaluate(dir.path(), log(), &["--policy", "uniform", "--surface", "top"]);
    assert!(error.unwrap_err().contains("there are feed, search"));
}

#[test]
fn the_report_says_whether_the_policy_is_better() {
    let dir = tempfile::tempdir().unwrap();
    // Of two items that are shown alike, the first is clicked twice as often.
    let log: Vec<Impression> = (0..1200)
        .map(|at| shown(at, 1 + at % 2, "1", Some(at % 6 == 1 || at % 6 < 4 && at % 2 == 0)))
        .collect();
    let report = |first: &str, second: &str| {
        let policy = format!("item,probability\n1,{first}\n2,{second}\n");
        write(dir.path(), &[("policy.csv", &policy)]);
        evaluate(dir.path(), log.clone(), &["--policy", "policy.csv"]).unwrap()
    };
    let better = report("0.9", "0.1");
    assert!(better.words.contains("better than the log's own (+26.7 %"), "{}", better.words);
    assert_eq!(better.advice.len(), 1, "only that estimates would help: {:?}", better.advice);
    assert!(report("0.1", "0.9").words.contains("WORSE than"));
    assert!(report("0.5", "0.5").words.contains("level with"));
    // Half of what it shows is in no log.
    let unseen = report("0.25", "0.25");
    assert!(unseen.advice[0].contains("mean weight is 0.500"), "{:?}", unseen.advice);
}

#[test]
fn evaluating_models_has_the_options_that_it_had() {
    let parse = |words: &[&str]| {
        LabArguments::try_parse_from([&["lab", "evaluate"], words].concat()).map(|_| ())
    };
    parse(&["--from", "data", "--mode", "fixed"]).unwrap();
    parse(&[]).unwrap();
    parse(&["policy", "--reward", "click", "--policy", "uniform"]).unwrap();
    parse(&["policy", "--policy", "uniform"]).unwrap_err();
    parse(&["--mode", "fixed", "policy", "--reward", "click", "--policy", "uniform"]).unwrap_err();
}
