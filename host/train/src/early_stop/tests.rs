//! The pass that is kept is the one that a loop by hand says.

use std::path::Path;

use hypercast_config::{Config, ExpertEntry};
use hypercast_core::prerequisite::hostile;
use hypercast_data::dataset::timeline::Span;
use hypercast_data::logs::{LogReader, LogVersion, LogWriter};
use hypercast_data::simulate;
use hypercast_data::synthetic::{Synthetic, SyntheticSize};
use hypercast_expert::{Engine, SavedParameters};
use hypercast_fm::inference::FmOutput;
use hypercast_fm::metrics::{LogLossSums, ScoredValue, regression_metrics};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;
use crate::expert::{TrainingSource, train};
use crate::stream::{ExpertSetup, LogView};

const REQUESTS: u64 = 300;
const ROWS: usize = 6;
const ITEMS: u64 = 150;

/// Logs whose items are liked or not, each so seldom that chance is most of what is to be seen, of
/// a schema with these tasks, to be learned at a rate.
fn logged(dir: &Path, tasks: &[&str], learning_rate: f64) -> Config {
    let mut config = Config::without_folder();
    config.paths.dataset = dir.join("none");
    config.paths.logs = dir.join("logs");
    config.paths.experts = dir.join("experts");
    let training = &mut config.expert_training;
    (training.batch_rows, training.learning_rate, training.max_epochs) = (128, learning_rate, 30);
    let mut schema = simulate::schema(1);
    schema.tasks.retain(|task| tasks.contains(&task.name.as_str()));
    let world = Synthetic::new(Arc::new(schema.clone()), 2, 1);
    let (options, versions) = (config.logs.options(), vec![LogVersion::new("1.0.0", 2)]);
    let mut writer = LogWriter::create(&config.paths.logs, &schema, options, versions).unwrap();
    let mut random = SmallRng::seed_from_u64(7);
    for number in 0..REQUESTS {
        let size = SyntheticSize { surface: 0, candidates: ROWS, history: 0 };
        let mut example = world.request(number, size).example;
        for target in &mut example.targets {
            let item = random.random_range(0..ITEMS);
            let share = if item % 2 == 0 { 0.35 } else { 0.65 };
            let [clicked, liked] = [(); 2].map(|()| u64::from(random.random_bool(share)));
            target.item = world.item(item);
            target.ids[1] = item;
            (target.outcome.actions, target.outcome.known) = (clicked | liked << 1, 0b11);
            target.outcome.values[0] = share as f32 + random.random_range(-0.5..0.5);
        }
        let tae = vec![0.5; 2 * ROWS];
        let said = FmOutput { tae, main: Vec::new() };
        writer.write_batch(&[example], &[said], |_| true).unwrap();
    }
    writer.finish().unwrap();
    config
}

fn view(log: &LogReader) -> LogView<'_> {
    LogView { log, surfaces: vec![0], span: Span::default(), embedding: None, mask: None }
}

/// What a loop that never ends says of each pass, and its state.
fn by_hand(setup: ExpertSetup<'_>, log: &LogReader) -> Vec<(f64, SavedTrainer)> {
    let view = view(log);
    let survey = view.survey().unwrap().unwrap();
    let mut trainer = setup.begin(&view, survey, |_| ()).unwrap().trainer;
    let (mut learned, mut held) = (ChunkRows::default(), ChunkRows::default());
    for (at, logged) in view.rows().enumerate() {
        let is_new = at as u64 >= REQUESTS - REQUESTS / 10;
        if is_new { &mut held } else { &mut learned }.add(logged.unwrap());
    }
    let mut passes = Vec::new();
    for pass in 0..12 {
        trainer.set_pass(pass > 0, pass == 0);
        trainer.set_repeats(pass > 0);
        trainer.train(learned.chunk(), |_| ()).unwrap();
        let said = trainer.predict(held.chunk()).unwrap();
        let targets = held.examples.iter().flat_map(|example| &example.targets);
        let outcomes: Vec<_> = targets.map(|target| target.outcome).collect();
        let of_task = |task: usize, label: &dyn Fn(usize) -> f32| -> Vec<ScoredValue> {
            let rows = said[task].iter().enumerate();
            rows.map(|(row, &prediction)| ScoredValue { prediction, label: label(row) }).collect()
        };
        let bit = |row: usize, action: u32| (outcomes[row].actions >> action & 1) as f32;
        let score = if log.schema.tasks[1].name == "like" {
            let of_row = |row: ScoredValue| match row.label == 1.0 {
                true => f64::from(row.prediction).ln(),
                false => f64::from(1.0 - row.prediction).ln(),
            };
            let losses: Vec<f64> = of_task(1, &|row| bit(row, 1)).into_iter().map(of_row).collect();
            losses.iter().sum::<f64>() / losses.len() as f64
        } else {
            let mut sums = LogLossSums::default();
            for row in of_task(0, &|row| bit(row, 0)) {
                sums.push(row.prediction, row.label == 1.0);
            }
            let ne = sums.normalized_entropy().unwrap();
            let watched = regression_metrics(&of_task(1, &|row| outcomes[row].values[0]));
            -(ne + (watched.mse.unwrap() / watched.base_mse.unwrap()).min(1.0)) / 2.0
        };
        passes.push((score, trainer.saved()));
    }
    passes
}

fn the_best_pass_is_kept(tasks: &[&str], learning_rate: f64) {
    let Some(plugin) = hostile("early stop", "patient") else { return };
    let dir = tempfile::tempdir().unwrap();
    let config = logged(dir.path(), tasks, learning_rate);
    let log = LogReader::open(&config.paths.logs).unwrap();
    let engine = Engine::new(config.guests()).unwrap();
    let entry: ExpertEntry =
        toml::from_str(&format!("name = \"all\"\nplugin = {plugin:?}")).unwrap();
    let setup = ExpertSetup::of(&config, &entry, &engine);
    let passes = by_hand(setup, &log);
    let scores: Vec<f64> = passes.iter().map(|(score, _)| *score).collect();
    println!("{tasks:?}: {scores:?}");
    // The first of three in a row of which the other two are no better.
    let mut best = 0;
    let mut ends = 0;
    while ends - best < 2 {
        ends += 1;
        best = if scores[ends] > scores[best] { ends } else { best };
    }
    assert!((1..9).contains(&best), "neither the first pass nor a late one: {best}");

    let view = view(&log);
    let survey = view.survey().unwrap().unwrap();
    let mut stream = setup.begin(&view, survey, |_| ()).unwrap();
    let mut predicted = 0;
    let found = stream.learn_past(&view, |report| {
        predicted += report.predictions.first().map_or(0, Vec::len);
    });
    let found = found.unwrap().unwrap();
    assert_eq!((found.held_rows, found.best_pass), (REQUESTS as usize * ROWS / 10, best + 1));
    let same = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-9;
    assert!(found.scores.len() == ends + 1 && found.scores.iter().zip(&scores).all(same));
    assert_eq!(predicted, REQUESTS as usize * ROWS, "each row once, before it is learned");
    let kept = &passes[best].1;
    assert!(stream.trainer.saved().learned_like(kept), "to the bit");

    // What is saved is that, too; who goes on with a stream learns the held rows once.
    let report = train(&config, &entry, &engine, TrainingSource::Logs(None)).unwrap();
    assert_eq!(report.passes, Some(found));
    let saved = SavedParameters::read(&report.parameters).unwrap();
    let saved = stream.blueprint.restore(saved).unwrap();
    let kept = kept.predicting(&stream.blueprint).unwrap();
    for index in 0..stream.blueprint.graph.parameters.len() {
        assert_eq!(saved.values(index), kept.values(index));
    }
    let rows = |stream: &ExpertStream| stream.trainer.parameters().provenance.trained_rows;
    let before = rows(&stream);
    stream.go_online().unwrap();
    assert_eq!(rows(&stream) - before, REQUESTS * ROWS as u64 / 10);
}

#[test]
fn passes_end_at_the_best_mean_error_of_all_tasks() {
    the_best_pass_is_kept(&["click", "watch"], 0.03);
}

#[test]
fn passes_end_at_the_best_of_the_teams_own_metric() {
    the_best_pass_is_kept(&["click", "like"], 0.005);
}

#[test]
fn too_few_requests_are_learned_whole_in_the_usual_passes() {
    let Some(plugin) = hostile("early stop", "patient") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = logged(dir.path(), &["click", "watch"], 0.03);
    config.expert_training.epochs = 3;
    let log = LogReader::open(&config.paths.logs).unwrap();
    let engine = Engine::new(config.guests()).unwrap();
    let text = format!("name = \"all\"\nplugin = {plugin:?}");
    let entry: ExpertEntry = toml::from_str(&text).unwrap();
    // Of nine requests a tenth of the rows is less than the newest one.
    for (requests, is_held) in [(1, false), (9, false), (10, true)] {
        let next = view(&log).rows().nth(requests).unwrap().unwrap().example;
        let span = Span { from_ms: None, until_ms: Some(next.time_ms) };
        let view = LogView { span, ..view(&log) };
        let survey = view.survey().unwrap().unwrap();
        let setup = ExpertSetup::of(&config, &entry, &engine);
        let mut stream = setup.begin(&view, survey, |_| ()).unwrap();
        let (mut learned, planned) = (0, stream.passes.rows());
        let found = stream.learn_past(&view, |report| {
            let rows = report.examples.iter().map(|example| example.targets.len() as u64);
            learned += if report.stepped { rows.sum() } else { 0 };
        });
        let held = found.unwrap().map(|passes| passes.held_rows);
        assert_eq!(held, is_held.then_some(ROWS), "{requests} requests");
        let whole = (3 * requests * ROWS) as u64;
        assert_eq!([learned, planned] == [whole; 2], !is_held, "{learned} of {planned}");
    }
}

#[test]
fn of_passes_that_nothing_tells_apart_the_first_is_kept() {
    let Some(plugin) = hostile("early stop", "patient") else { return };
    let dir = tempfile::tempdir().unwrap();
    // Nobody knows whether anything was finished.
    let config = logged(dir.path(), &["finish"], 0.03);
    let text = format!("name = \"all\"\nplugin = {plugin:?}");
    let entry: ExpertEntry = toml::from_str(&text).unwrap();
    let engine = Engine::new(config.guests()).unwrap();
    let passes = train(&config, &entry, &engine, TrainingSource::Logs(None)).unwrap().passes;
    let passes = passes.unwrap();
    assert_eq!((passes.best_pass, passes.scores.len()), (1, 3), "{passes}");
    assert!(passes.scores.iter().all(|score| score.is_nan()));
}
