//! The FM's predictions as columns, and the hooks that a component need not have.

use std::sync::Arc;

use hypercast_data::synthetic::{Synthetic, SyntheticSize};
use hypercast_fm::example::Example;

use super::build::{TAE_DIM, schema};
use super::components::{engine, options};
use super::contracts::{guest, guest_file};
use crate::train::{OptimizerConfig, ScoredRows, evaluation_sample};
use crate::wasm::contract::{Data, Decision, Evaluation, Verdict};
use crate::*;

/// Requests with what an FM says of them.
struct World {
    examples: Vec<Example>,
    tae: Vec<f32>,
    predictions: Vec<f32>,
}

impl World {
    fn new(requests: std::ops::Range<u64>) -> World {
        let world = Synthetic::new(Arc::new(schema()), TAE_DIM, 5);
        let mut all = World { examples: vec![], tae: vec![], predictions: vec![] };
        for number in requests {
            let size = SyntheticSize { surface: 0, candidates: 6, history: number as usize % 9 };
            let request = world.request(number, size);
            all.examples.push(request.example);
            all.tae.extend(request.tae);
            all.predictions.extend(request.predictions);
        }
        all
    }

    fn chunk(&self) -> Chunk<'_> {
        let (examples, tae) = (&self.examples, &self.tae);
        Chunk { examples, tae, predictions: &self.predictions, ranked: &[] }
    }

    /// The FM's predictions of a main task.
    fn of_fm(&self, task: usize) -> Vec<f32> {
        self.predictions.iter().skip(task).step_by(2).copied().collect()
    }

    /// Whether each row was clicked, if that is known.
    fn clicks(&self) -> Vec<Option<bool>> {
        let targets = self.examples.iter().flat_map(|example| &example.targets);
        let of = |known: u64, actions: u64| (known & 1 == 1).then_some(actions & 1 == 1);
        targets.map(|target| of(target.outcome.known, target.outcome.actions)).collect()
    }

    fn log_loss(&self, clicks: &[f32]) -> f32 {
        let known = self.clicks().into_iter().zip(clicks).filter_map(|(label, said)| {
            label.map(|label| if label { -said.ln() } else { -(1.0 - said).ln() })
        });
        let losses: Vec<f32> = known.collect();
        losses.iter().sum::<f32>() / losses.len() as f32
    }
}

fn trainer(blueprint: &Arc<Blueprint>, rate: f32) -> ExpertTrainer {
    let normaliser = Normaliser::identity(blueprint.columns.feature_names());
    let parameters = blueprint.init_parameters(normaliser, 7);
    let optimizer = OptimizerConfig {
        learning_rate: rate,
        table_learning_rate: 10.0 * rate,
        warmup_steps: 5,
        ..OptimizerConfig::default()
    };
    let config = TrainerConfig { optimizer, batch_rows: 60, ..TrainerConfig::default() };
    ExpertTrainer::new(blueprint.clone(), parameters, config, Device::Cpu).unwrap()
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6)
}

#[test]
fn an_expert_begins_at_the_fms_predictions_and_becomes_better() {
    let Some(blueprint) = guest("fm_residual") else { return };
    let (past, next) = (World::new(0..200), World::new(200..300));
    // So slow that it learns nothing but base rates, which take nothing from what the FM says.
    let mut slow = trainer(&blueprint, 1e-12);
    for rates_are_known in [false, true] {
        let said = slow.predict(next.chunk()).unwrap();
        for (task, own) in said.iter().enumerate() {
            assert!(close(own, &next.of_fm(task)), "task {task}, {rates_are_known}");
        }
        slow.train(past.chunk(), |_| ()).unwrap();
    }

    let mut trainer = trainer(&blueprint, 3e-2);
    for _ in 0..5 {
        trainer.train(past.chunk(), |_| ()).unwrap();
    }
    let said = trainer.predict(next.chunk()).unwrap();
    let (own, fm) = (next.log_loss(&said[0]), next.log_loss(&next.of_fm(0)));
    println!("log loss of clicks {own:.4}, {fm:.4} of the FM");
    assert!(own < fm, "{own} of the expert, {fm} of the FM");
    let share = trainer.parameters().by_name("heads/click/from_fm/share").unwrap()[0];
    assert!(share != 0.0, "the share of its own prediction is learned");

    let served =
        ServedExpert::new(blueprint, trainer.into_parameters(), Device::Cpu, Default::default());
    let served = served.unwrap();
    let fm = FmRows { tae: Tae::Rows(&next.tae), predictions: &next.predictions };
    let answer = served.predict(&next.examples, fm).unwrap();
    assert!(close(answer.task("click").unwrap(), &said[0]), "training and serving agree");
    // It orders by what the FM says of clicks.
    let (example, of_first) = (&next.examples[0], &next.of_fm(0)[..6]);
    let fm = FmRows { tae: Tae::Without, predictions: &next.predictions[..12] };
    let (RankOutcome::Ranked { ranked, .. }, _) = served.serve(example, fm, 6) else { panic!() };
    let order: Vec<f32> = ranked.iter().map(|row| of_first[row.candidate as usize]).collect();
    assert!(order.is_sorted_by(|a, b| a >= b), "{order:?}");
    // Without an embedding it says what it has learned itself.
    let alone = served.predict(&next.examples, FmRows::WITHOUT).unwrap();
    let fm = FmRows { tae: Tae::Without, predictions: &next.predictions };
    let beside = served.predict(&next.examples, fm).unwrap();
    let (alone, beside) = (alone.task("click").unwrap(), beside.task("click").unwrap());
    assert!(close(alone, beside) && !close(alone, &said[0]));
    let even_odds = next.log_loss(&vec![0.5; alone.len()]);
    assert!(next.log_loss(alone) < even_odds, "{} of {even_odds}", next.log_loss(alone));
}

#[test]
fn logs_without_the_fms_predictions_are_refused_for_those_who_read_them() {
    let (Some(reads), Some(other)) = (guest("fm_residual"), guest("plods")) else { return };
    let world = World::new(0..3);
    let none = vec![f32::NAN; world.predictions.len()];
    for predictions in [&none[..], &[]] {
        let chunk = Chunk { predictions, ..world.chunk() };
        let why = trainer(&reads, 1e-3).train(chunk, |_| ()).unwrap_err().to_string();
        assert!(why.contains("none of request 1:") && why.contains("materialise"), "{why}");
        trainer(&other, 1e-3).train(chunk, |_| ()).unwrap();
    }
    // A task that was added since is missing where the others are known: the base rate.
    let grown: Vec<f32> = world.predictions.chunks(2).flat_map(|row| [row[0], f32::NAN]).collect();
    let said = trainer(&reads, 1e-3).predict(Chunk { predictions: &grown, ..world.chunk() });
    let said = said.unwrap();
    assert!(close(&said[0], &world.of_fm(0)) && said[1].iter().all(|own| *own == 0.5));
    // Without an FM there are none to read.
    let options = LoadOptions { tae_dim: 0, fm_version: None, ..options() };
    let file = guest_file("fm_residual").unwrap();
    let refused = Blueprint::load(engine(), &file, &schema(), &options).err().unwrap().to_string();
    assert!(refused.contains("no predictions of it") || refused.contains("no foundation model"));
}

#[test]
fn rows_are_weighed_by_place_and_activity() {
    let (Some(weighs), Some(other)) = (guest("fm_residual"), guest("plods")) else { return };
    assert!(weighs.plugin.weighs() && weighs.plugin.evaluates_rows());
    let Some(earlier) = guest("earlier_contract") else { return };
    assert!(!earlier.plugin.weighs() && !earlier.plugin.evaluates_rows());
    let world = World::new(0..9);
    let targets = trainer(&weighs, 1e-3).targets(world.chunk()).unwrap();
    let names = weighs.columns.feature_names();
    let activity = names.iter().position(|name| name == "user_history_len").unwrap();
    let mut row = 0;
    for example in &world.examples {
        for (place, target) in example.targets.iter().enumerate() {
            let expected = 1.0 / (2.0 + place as f32).log2() / (1.0 + target.features[activity]);
            for task in &targets {
                assert!((task.weights[row] - expected).abs() < 1e-6, "row {row}");
            }
            row += 1;
        }
    }
    let plain = trainer(&other, 1e-3).targets(world.chunk()).unwrap();
    assert!(plain.iter().all(|task| task.weights.iter().all(|weight| *weight == 1.0)));
}

#[test]
fn a_sample_has_whole_requests_within_its_bytes_and_the_newest_rows() {
    let Some(blueprint) = guest("fm_residual") else { return };
    let mut trainer = trainer(&blueprint, 1e-3);
    let world = World::new(0..60);
    let targets = trainer.targets(world.chunk()).unwrap();
    let candidate: Vec<Vec<f32>> = (0..2).map(|task| world.of_fm(task)).collect();
    let serving = [vec![f32::NAN; 360], vec![f32::NAN; 360]];
    let scored = ScoredRows { candidate: &candidate, serving: &serving, targets: &targets };
    // 72,000 rows of about a hundred bytes.
    for _ in 0..200 {
        trainer.sample(world.chunk(), scored).unwrap();
    }
    let rows = trainer.sample.rows().unwrap();
    let bytes = evaluation_sample::bytes(&rows);
    // In one they take less than one by one, as they are kept.
    assert!((1 << 19..=3 << 20).contains(&bytes), "{bytes}");
    assert!(
        rows.request.len() < 1 << 16
            && rows.request.chunk_by(|a, b| a == b).all(|own| own.len() == 6)
    );
    let requests = rows.request.len() / 6;
    assert_eq!(rows.request.last(), Some(&(requests as u32 - 1)));
    let Data::Integers(column) = &rows.batch.columns[1].data else { panic!("requests") };
    assert!(column.iter().zip(&rows.request).all(|(a, b)| *a == i64::from(*b)));
    assert!(
        rows.tasks
            .iter()
            .all(|task| task.serving.is_empty() && task.candidate.len() == column.len())
    );
}

#[test]
fn a_team_judges_by_rows_what_no_mean_shows() {
    let Some(blueprint) = guest("fm_residual") else { return };
    let world = World::new(0..60);
    let evaluation = Evaluation { decision: Decision::Publication, slices: vec![] };
    let targets = trainer(&blueprint, 1e-3).targets(world.chunk()).unwrap();
    let good: Vec<Vec<f32>> = (0..2).map(|task| world.of_fm(task)).collect();
    let bad: Vec<Vec<f32>> =
        good.iter().map(|own| own.iter().map(|said| 1.0 - said).collect()).collect();
    let judged = |candidate: &[Vec<f32>], serving: &[Vec<f32>]| {
        let mut trainer = trainer(&blueprint, 1e-3);
        // Each call is a chunk of a stream.
        trainer
            .sample(world.chunk(), ScoredRows { candidate, serving, targets: &targets })
            .unwrap();
        let verdict = trainer.judge(&evaluation).unwrap();
        trainer.forget_sample();
        assert!(matches!(trainer.judge(&evaluation).unwrap(), Verdict::Publish));
        verdict
    };
    for serving in [&good[..], &[]] {
        let Verdict::Hold(why) = judged(&bad, serving) else { panic!("it orders worse") };
        assert!(why.contains("NDCG of active users") && why.contains("over 60 requests"), "{why}");
        assert!(matches!(judged(&good, serving), Verdict::Publish));
    }
}
