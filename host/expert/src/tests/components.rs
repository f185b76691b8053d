//! Real components: the plugins of this repository train and serve, and hostile guests are
//! contained. `HYPERCAST_PLUGINS` and `HYPERCAST_HOSTILE` name the folders of both.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use hypercast_core::prerequisite::skip;
use hypercast_data::schema::{Feature, FeatureKind, Task, TaskKind};
use hypercast_fm::example::Example;

use super::build::{TAE_DIM, example, noise, schema, vectors};
use crate::normalise::Normaliser;
use crate::train::{OptimizerConfig, ServingParameters};
use crate::wasm::Fault;
use crate::wasm::contract::{Decision, Evaluation, Quality, Slice, Verdict};
use crate::{
    Blueprint, BreakerConfig, Chunk, Device, Engine, EngineConfig, ExpertTrainer,
    FeatureStatistics, FmRows, Limits, LoadOptions, Parameters, RankOutcome, SavedParameters,
    ServedExpert, Tae, TrainerConfig,
};

/// The components in the folder that `variable` names; none if it is not set.
pub(super) fn components(variable: &str) -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os(variable) else {
        skip("components", &format!("{variable} names no folder; `cargo verify` builds it"));
        return Vec::new();
    };
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{variable}={folder:?}: {error}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "wasm"));
    files.sort();
    assert!(!files.is_empty(), "{variable}={folder:?} holds no .wasm file");
    files
}

pub(super) fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        Engine::new(EngineConfig { instances: 16, ..EngineConfig::default() }).unwrap()
    })
}

pub(super) fn options() -> LoadOptions {
    // A deadline that a slow machine does not reach before a guest's own cause shows.
    let limits = Limits {
        deadline_ms: 1_000,
        deadline_max_ms: 1_000,
        hook_deadline_ms: 1_000,
        memory_max_mib: 64,
        ..Limits::default()
    };
    LoadOptions {
        limits,
        tae_dim: TAE_DIM,
        fm_version: Some("1.0.0".into()),
        ..LoadOptions::default()
    }
}

/// The main tasks of the schema.
pub(super) const TASKS: usize = 2;

pub(super) struct Log {
    pub(super) examples: Vec<Example>,
    tae: Vec<f32>,
    predictions: Vec<f32>,
}

pub(super) fn log(requests: u64) -> Log {
    let examples: Vec<Example> =
        (0..requests).map(|r| example(r, (r % 6) as usize, 1 + (r % 5) as usize)).collect();
    let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
    let predictions = noise(6, rows * TASKS).iter().map(|value| 0.5 + 0.4 * value).collect();
    Log { tae: noise(4, rows * TAE_DIM), predictions, examples }
}

impl Log {
    pub(super) fn chunk(&self) -> Chunk<'_> {
        let Log { examples, tae, predictions } = self;
        Chunk { examples, tae, predictions, ..Chunk::default() }
    }
}

fn trainer(blueprint: &Arc<Blueprint>, log: &Log, config: TrainerConfig) -> ExpertTrainer {
    let mut statistics = FeatureStatistics::new(blueprint.columns.feature_names());
    log.examples.iter().for_each(|example| statistics.observe(example));
    let parameters = blueprint.init_parameters(statistics.finish(), 1);
    ExpertTrainer::new(blueprint.clone(), parameters, config, Device::Cpu).unwrap()
}

pub(super) fn loss(trainer: &mut ExpertTrainer, log: &Log) -> f64 {
    let mut total = 0.0;
    trainer
        .train(log.chunk(), |report| {
            assert!(report.stepped);
            total += report.losses.iter().sum::<f64>();
        })
        .unwrap();
    total
}

pub(super) fn trained(path: &std::path::Path, log: &Log) -> (Arc<Blueprint>, ExpertTrainer) {
    let blueprint = Arc::new(Blueprint::load(engine(), path, &schema(), &options()).unwrap());
    // Few rows: short warm-up, high rate.
    let optimizer =
        OptimizerConfig { learning_rate: 1e-2, warmup_steps: 5, ..OptimizerConfig::default() };
    let config = TrainerConfig { optimizer, batch_rows: 64, ..TrainerConfig::default() };
    let trainer = trainer(&blueprint, log, config);
    (blueprint, trainer)
}

#[test]
fn plugins_learn_and_serve_what_the_trainer_predicts() {
    let log = log(200);
    for path in components("HYPERCAST_PLUGINS") {
        let name = path.display();
        let (blueprint, mut trainer) = trained(&path, &log);
        let first = loss(&mut trainer, &log);
        let last = (0..12).map(|_| loss(&mut trainer, &log)).last().unwrap();
        assert!(last < 0.99 * first, "{name}: the loss went from {first} to {last}");
        let trained = trainer.predict_scored(log.chunk()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("expert.safetensors");
        trainer.parameters().save(&file).unwrap();
        let saved = SavedParameters::read(&file).unwrap();
        let expert =
            ServedExpert::open(blueprint, saved, Device::Cpu, BreakerConfig::default()).unwrap();
        let mut row = 0;
        for example in &log.examples {
            let rows = example.targets.len();
            let tae = Tae::Rows(&log.tae[row * TAE_DIM..(row + rows) * TAE_DIM]);
            let predictions = &log.predictions[row * TASKS..(row + rows) * TASKS];
            let (outcome, _) = expert.serve(example, FmRows { tae, predictions }, 3);
            let RankOutcome::Ranked { ranked, predictions } = outcome else {
                panic!("{name}: {outcome:?}")
            };
            assert!(!ranked.is_empty() && ranked.len() <= 3.min(rows), "{name}: {ranked:?}");
            for (served, trained) in predictions.for_rank().iter().zip(trained.for_rank().iter()) {
                for (served, trained) in served.values.iter().zip(&trained.values[row..]) {
                    assert!(
                        (served - trained).abs() <= 1e-5,
                        "{name}: served {served}, trained {trained}"
                    );
                }
            }
            row += rows;
        }
        assert_eq!(expert.counters().degraded(), 0);
    }
}

#[test]
fn without_tae_the_tae_is_not_read() {
    let log = log(60);
    for path in components("HYPERCAST_PLUGINS") {
        let blueprint = Arc::new(Blueprint::load(engine(), &path, &schema(), &options()).unwrap());
        let config = TrainerConfig { without_tae: true, ..TrainerConfig::default() };
        let mut trainer = trainer(&blueprint, &log, config);
        loss(&mut trainer, &log);
        let with = trainer.predict(log.chunk()).unwrap();
        let other = noise(77, log.tae.len());
        let without = trainer
            .predict(Chunk { examples: &log.examples, tae: &other, ..Chunk::default() })
            .unwrap();
        assert_eq!(with, without);
    }
}

#[test]
fn training_is_deterministic() {
    let log = log(60);
    for path in components("HYPERCAST_PLUGINS") {
        let run = || {
            let (_, mut trainer) = trained(&path, &log);
            (0..2).map(|_| loss(&mut trainer, &log)).collect::<Vec<_>>()
        };
        assert_eq!(run(), run(), "{}", path.display());
    }
}

/// A feature of items stands before the counters and built-in columns, so those move.
#[test]
fn a_trainer_goes_on_in_a_grown_schema_with_the_scales_of_its_columns() {
    let log = log(20);
    let mut grown = schema();
    grown.item_features.push(Feature::new("weight", FeatureKind::Dense));
    let paths = components("HYPERCAST_PLUGINS");
    let mut resumed = 0;
    for path in &paths {
        let (_, trainer) = trained(path, &log);
        let later = Arc::new(Blueprint::load(engine(), path, &grown, &options()).unwrap());
        let saved = trainer.saved();
        let was = &saved.provenance().normaliser.clone();
        let Ok(trainer) =
            ExpertTrainer::resume(later.clone(), saved, TrainerConfig::default(), Device::Cpu)
        else {
            continue; // It reads all columns, so it has another network now.
        };
        resumed += 1;
        let is = &trainer.parameters().provenance.normaliser;
        assert_eq!(is.names, later.columns.feature_names());
        for (at, name) in was.names.iter().enumerate() {
            let place = is.names.iter().position(|other| other == name).unwrap();
            let scale = |of: &Normaliser, at: usize| (of.mean[at], of.deviation[at]);
            assert_eq!(scale(was, at), scale(is, place), "{name}");
        }
    }
    assert!(paths.is_empty() || resumed > 0);
}

/// What the message about each hostile guest must contain; `None` if its misuse is limited without
/// a fault.
const EXPECTED: [(&str, Option<&str>); 68] = [
    ("bad_shape", Some("inner dimensions 4 and 3 differ")),
    ("bomb", Some("MiB of memory")),
    ("bomb_describe", Some("`describe` asked for more than its 64 MiB")),
    ("complete", None),
    ("content_vector", Some("vector `content`, which the schema lacks (it has none)")),
    ("crowd", None),
    ("cycle", Some("no cycle")),
    ("deep", Some("more than the limit")),
    ("distilled", None),
    // Of another schema, as `ensembles`.
    ("dlrm", Some("has no feature `battery`")),
    ("duplicates", Some("twice")),
    ("earlier_contract", Some("earlier_contract: ")),
    ("empty", Some("no ranked candidate")),
    ("ensembles", Some("has no feature `battery`")),
    ("every_column", Some("serves surface `search`, which the schema lacks")),
    ("explorer", None),
    ("flops", Some("FLOPs a candidate")),
    ("fm_residual", None),
    ("foreign_column", Some("`no_such_feature`, which the schema lacks")),
    ("foreign_rank_column", Some("rank-columns hold")),
    ("foreign_version", Some("contract 1.0.0, and this host speaks 3.0.0 and 2.0.0")),
    ("frozen", None),
    ("greedy", Some("past its deadline of 1000 ms")),
    ("hoards", Some("MiB of memory where it serves")),
    ("huge", Some("1000000000 values")),
    ("huge_list", Some("bytes of output")),
    ("huge_output", Some("bytes of output")),
    ("labels_short", Some("`labels` gave a bad output")),
    ("listwise", None),
    ("log_flood", None),
    ("long_history", Some("its history-len of 4294967295")),
    ("long_name", Some("name or version is empty or longer")),
    ("long_verdict", Some("long_verdict\\n\\u{1b}[31m")),
    ("nan", Some("score NaN")),
    ("nan_network", Some("prediction NaN")),
    ("nan_schedule", Some("`schedule` gave a bad output: learning-rate factor NaN")),
    ("other_import", Some("may import nothing but `log`")),
    ("out_of_range", Some("candidate index")),
    ("overflow", Some("call stack")),
    ("overflow_array", Some("call stack")),
    ("patient", None),
    ("plods", None),
    ("pointwise", None),
    ("propensity", Some("propensity 1.5")),
    ("rank_error", Some("returned an error")),
    ("sample_invalid", Some("`sample` gave a bad output")),
    ("search_team", Some("serves surface `search`, which the schema lacks")),
    ("shape_overflow", Some("overflows")),
    ("spin", Some("`rank` ran past its deadline")),
    ("spin_describe", Some("`describe` ran past its deadline")),
    ("spin_evaluate", Some("`evaluate` ran past its deadline")),
    ("spin_labels", Some("`labels` ran past its deadline")),
    ("spin_network", Some("`network` ran past its deadline")),
    ("spin_sample", Some("`sample` ran past its deadline")),
    ("spin_schedule", Some("`schedule` ran past its deadline")),
    ("stateful", None),
    ("takes_back", Some("never wants anything new")),
    ("tasks_twice", Some("declared twice")),
    ("trap", Some("trapped")),
    ("trap_evaluate", Some("`evaluate` trapped")),
    ("turncoat", None),
    ("unknown_kind", Some("a column of kind `hologram`")),
    ("unknown_op", Some("the op is unknown")),
    ("unknown_option", Some("has the option `momentum`")),
    ("unsorted", None),
    ("wide", Some("values a candidate")),
    ("without_cross", None),
    ("wrong_length", Some("bad output")),
];

#[test]
fn hostile_guests_are_refused_or_contained_while_others_answer() {
    let log = log(20);
    let plugins = components("HYPERCAST_PLUGINS");
    let hostile = components("HYPERCAST_HOSTILE");
    let Some(good) = plugins.first() else { return };
    let (blueprint, trainer) = trained(good, &log);
    let parameters = trainer.into_parameters();
    let good = ServedExpert::new(blueprint, parameters, Device::Cpu, Default::default()).unwrap();
    for path in hostile {
        let file = path.file_stem().unwrap().to_string_lossy().into_owned();
        let mut options = options();
        // It spins until each deadline, so a short one saves time and changes no cause.
        if file.starts_with("spin") {
            options.limits.hook_deadline_ms = 200;
        }
        let message = match Blueprint::load(engine(), &path, &schema(), &options) {
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("author") && said.contains("operators"), "{file}: {said}");
                Some(said)
            }
            Ok(blueprint) => fault(Arc::new(blueprint), &log),
        };
        let known = EXPECTED.iter().find(|(name, _)| *name == file);
        let (_, expected) = known.expect("a new guest needs its expectation");
        match (&message, expected) {
            (None, None) => {}
            (Some(said), Some(why)) => {
                let is_told = said.contains(why) && said.contains(&file);
                assert!(is_told, "{file}: `{said}` lacks `{why}`");
            }
            _ => panic!("{file}: expected {expected:?}, got {message:?}"),
        }
        for example in &log.examples {
            let tae = noise(3, example.targets.len() * TAE_DIM);
            let (outcome, _) = good.serve(example, Tae::Rows(&tae), 5);
            assert!(matches!(outcome, RankOutcome::Ranked { .. }), "after {file}: {outcome:?}");
        }
    }
}

/// Serves until the user is set aside, then trains and calls `evaluate`. Gives the first fault, or
/// the reason against publishing.
fn fault(blueprint: Arc<Blueprint>, log: &Log) -> Option<String> {
    let own = blueprint.clone();
    let config = TrainerConfig { batch_rows: 8, ..TrainerConfig::default() };
    let mut trainer = trainer(&blueprint, log, config);
    let parameters = trainer.parameters().clone();
    let breaker =
        BreakerConfig { faults: 3, lost_share: 1.0, open_ms: 60_000, open_max_ms: 60_000 };
    let expert = ServedExpert::new(blueprint, parameters, Device::Cpu, breaker).unwrap();
    let example = &log.examples[4];
    let tae = noise(3, example.targets.len() * TAE_DIM);
    let outcomes: Vec<RankOutcome> =
        (0..4).map(|_| expert.serve(example, Tae::Rows(&tae), 3).0).collect();
    match (&outcomes[0], &outcomes[3]) {
        (RankOutcome::Degraded(first), RankOutcome::Degraded(last)) => {
            assert_eq!(last.cause, Fault::UserSetAside, "after three faults of one user");
            assert_eq!((expert.counters().requests, expert.counters().degraded()), (4, 4));
            Some(first.to_string())
        }
        _ => hooks(&own, &mut trainer, log),
    }
}

fn hooks(blueprint: &Blueprint, trainer: &mut ExpertTrainer, log: &Log) -> Option<String> {
    let mut steps = 0;
    if let Err(error) = trainer.train(log.chunk(), |report| steps += u32::from(report.stepped)) {
        return Some(error.to_string());
    }
    assert!(steps > 5, "steps are taken although the schedule fails");
    if let Some(fault) = trainer.last_schedule_fault() {
        assert_eq!(trainer.schedule_faults(), 3, "it is not called any more: {fault}");
        return Some(fault.to_owned());
    }
    let quality = Quality { ne: Some(1.0), auc: None, gauc: None, calibration: None, mse: None };
    let slice = Slice {
        task: "click".into(),
        surface: None,
        examples: 1,
        candidate: quality,
        serving: Some(quality),
    };
    let evaluation = Evaluation { decision: Decision::Canary, slices: vec![slice] };
    match blueprint.plugin.evaluate(&blueprint.info, &evaluation) {
        Err(fault) => Some(fault.to_string()),
        Ok(Verdict::Publish) => None,
        Ok(Verdict::Hold(why) | Verdict::RollBack(why)) => {
            assert!(why.len() < 1024 && !why.contains('\n'), "a reason suits a line: {why}");
            Some(why)
        }
    }
}

#[test]
fn log_lines_are_kept_under_the_registered_name_and_not_under_the_plugins_own() {
    let Some(path) =
        components("HYPERCAST_HOSTILE").into_iter().find(|p| p.ends_with("log_flood.wasm"))
    else {
        return;
    };
    let engine = Engine::new(EngineConfig { instances: 4, ..EngineConfig::default() }).unwrap();
    let options = LoadOptions { registered: Some("home".into()), ..options() };
    let blueprint = Arc::new(Blueprint::load(&engine, &path, &schema(), &options).unwrap());
    let log = log(8);
    let parameters = trainer(&blueprint, &log, TrainerConfig::default()).parameters().clone();
    let breaker = BreakerConfig::default();
    let expert = ServedExpert::new(blueprint.clone(), parameters, Device::Cpu, breaker).unwrap();
    let example = &log.examples[4];
    let tae = noise(3, example.targets.len() * TAE_DIM);
    expert.serve(example, Tae::Rows(&tae), 3);
    let log = blueprint.plugin.log();
    let lines = log.lines("home");
    assert!(lines.first().is_some_and(|line| line.plugin == "log_flood"), "{lines:?}");
    assert!(log.lines("log_flood").is_empty());
}

#[test]
fn a_schedule_decides_how_far_steps_go() {
    let Some(path) =
        components("HYPERCAST_HOSTILE").into_iter().find(|p| p.ends_with("frozen.wasm"))
    else {
        return;
    };
    let log = log(40);
    let (_, mut trainer) = trained(&path, &log);
    let before = trainer.predict(log.chunk()).unwrap();
    loss(&mut trainer, &log);
    assert_eq!(trainer.predict(log.chunk()).unwrap(), before, "a factor of 0 leaves all as it is");
    assert_eq!(trainer.schedule_faults(), 0);
}

#[test]
fn what_sampling_drops_is_measured_and_not_learned_from() {
    let Some(path) =
        components("HYPERCAST_PLUGINS").into_iter().find(|p| p.ends_with("value-model.wasm"))
    else {
        return;
    };
    let log = log(200);
    let all: usize = log.examples.iter().map(|example| example.targets.len()).sum();
    let (blueprint, mut trainer) = trained(&path, &log);
    let tasks: Vec<&str> =
        blueprint.description.tasks.iter().map(|task| task.name.as_str()).collect();
    assert_eq!(tasks, ["click", "like", "engaged"]);
    let until_ms = log.examples[0].time_ms;
    let rows = |trainer: &mut ExpertTrainer, progressive: bool| {
        trainer.set_pass(false, progressive);
        let (mut rows, mut valid) = (0, 0);
        trainer
            .train(log.chunk(), |report| {
                let own: usize = report.examples.iter().map(|example| example.targets.len()).sum();
                rows += own;
                valid += report.targets[2].mask.iter().filter(|valid| **valid).count();
                let predicted = if progressive { own } else { 0 };
                assert!(report.predictions.iter().all(|task| task.len() == predicted));
                assert_eq!(report.predictions.is_empty(), !progressive);
                assert_eq!(report.serving, report.predictions, "one network, before and after");
            })
            .unwrap();
        (rows, valid)
    };
    // Those that learn nothing are a comparison that cannot differ.
    trainer.hold_rates(0.0, 0.0);
    let parameters = trainer.parameters().clone();
    trainer.compare_with(ServingParameters {
        parameters: parameters.clone(),
        learned_until_ms: until_ms - 1,
    });
    assert_eq!(
        rows(&mut trainer, true),
        (all, all),
        "each outcome is known, and each row measured"
    );
    let (learned, _) = rows(&mut trainer, false);
    assert!(learned < all, "{learned} of {all}: requests without a row that is kept are left out");
    assert_eq!(trainer.parameters().provenance.trained_until_ms, until_ms);
    // What serves has learned from all of it: nothing compares the two.
    trainer.compare_with(ServingParameters { parameters, learned_until_ms: until_ms });
    trainer.set_pass(false, true);
    trainer.train(log.chunk(), |report| assert!(report.serving.is_empty())).unwrap();
}

#[test]
fn a_missing_column_and_a_foreign_fm_are_refused_by_name() {
    for path in components("HYPERCAST_PLUGINS") {
        let other = LoadOptions { fm_version: Some("not a version".into()), ..options() };
        let refused =
            Blueprint::load(engine(), &path, &schema(), &other).err().unwrap().to_string();
        assert!(refused.contains("`not a version`"), "{refused}");
    }
    let description = super::build::description(
        vec![crate::wasm::contract::Column::Feature("no-such".into())],
        &[("click", crate::wasm::contract::TaskKind::Binary)],
    );
    let refused = crate::batch::ExpertColumns::new(&description, &schema(), vectors())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("feature `no-such`") && refused.contains("`length`"), "{refused}");
}

#[test]
fn what_is_no_component_is_refused() {
    let load = |bytes: &[u8]| {
        let plugin = crate::Plugin::from_bytes(engine(), "thing", bytes, &Limits::default());
        plugin.err().unwrap().to_string()
    };
    assert!(load(b"hello").contains("`thing` is refused: it is not a WebAssembly file"));
    assert!(load(b"\0asm\x01\0\0\0").contains("core Wasm module"));
    assert!(load(b"\0asm\x0d\0\x01\0").contains("no HyperCast expert"));
    assert!(load(b"\0asm\x0d\0\x01\0rest").contains("not a valid component"));
}

/// An expert that also predicts seconds.
fn with_regression() -> Option<Arc<Blueprint>> {
    let mlp =
        components("HYPERCAST_PLUGINS").into_iter().find(|at| at.ends_with("mlp-fusion.wasm"));
    let mut schema = schema();
    schema.tasks.push(Task {
        name: "seconds".into(),
        kind: TaskKind::Regression,
        label: "seconds".into(),
        ..schema.tasks[0].clone()
    });
    let options = LoadOptions { without_fm_logits: true, ..options() };
    Some(Arc::new(Blueprint::load(engine(), &mlp?, &schema, &options).unwrap()))
}

#[test]
fn a_regression_is_learned_on_a_scale_and_predicted_in_its_unit() {
    let Some(blueprint) = with_regression() else { return };
    let mut log = log(600);
    let targets = log.examples.iter_mut().flat_map(|example| &mut example.targets);
    targets.for_each(|own| own.outcome.values[0] = 50_000.0 + 20_000.0 * (own.item.id % 2) as f32);
    let optimizer =
        OptimizerConfig { learning_rate: 1e-2, warmup_steps: 5, ..OptimizerConfig::default() };
    let config =
        TrainerConfig { optimizer, batch_rows: 64, average_decay: 0.9, ..Default::default() };
    let mut trainer = trainer(&blueprint, &log, config);
    for _ in 0..4 {
        trainer.train(log.chunk(), |report| assert!(report.stepped)).unwrap();
    }
    let seconds = |parameters: &Parameters| {
        let predictions = trainer.predict_with(parameters, log.chunk()).unwrap().remove(2);
        predictions.iter().sum::<f32>() / predictions.len() as f32
    };
    let mean = seconds(trainer.parameters());
    assert!((45_000.0..75_000.0).contains(&mean), "{mean}");
    // The scale is in the file. Parameters of before there were scales say what they learned.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("parameters.safetensors");
    trainer.parameters().save(&path).unwrap();
    let mut saved = blueprint.restore(SavedParameters::read(&path).unwrap()).unwrap();
    assert_eq!(seconds(&saved), mean);
    saved.provenance.labels.clear();
    assert!(seconds(&saved).abs() < 10.0);
    // What starts from them learns on the same scale, or on none.
    let fresh = || blueprint.init_parameters(saved.provenance.normaliser.clone(), 1);
    let mut warm = fresh();
    warm.warm_start_from(trainer.parameters(), |_| true);
    assert_eq!(seconds(&warm), mean);
    assert!(!fresh().provenance.labels.is_empty());
    warm.warm_start_from(&saved, |_| true);
    assert!(warm.provenance.labels.is_empty());
}

#[test]
fn requests_that_would_harm_an_expert_are_set_aside_alone() {
    let Some(blueprint) = with_regression() else { return };
    let config =
        TrainerConfig { batch_rows: 64, shuffle: false, progressive: true, ..Default::default() };
    let past = log(600);
    for (name, value, tae) in [
        ("a label that the plugin cannot give", f32::INFINITY, 0.5),
        ("an infinite gradient", 3e38, 0.5),
        ("an unusual loss", 1e15, 0.5),
        ("an embedding of NaN", 1.0, f32::NAN),
    ] {
        let mut with = trainer(&blueprint, &past, config.clone());
        let mut without = trainer(&blueprint, &past, config.clone());
        for own in [&mut with, &mut without] {
            assert_eq!(own.train(past.chunk(), |report| assert!(report.stepped)).unwrap(), []);
        }
        let (mut odd, mut honest) = (log(12), log(12));
        let rows =
            |examples: &[Example]| examples.iter().map(|own| own.targets.len()).sum::<usize>();
        let (first, count) = (rows(&odd.examples[..5]), rows(&odd.examples[5..6]));
        honest.examples.remove(5);
        honest.tae.drain(first * TAE_DIM..(first + count) * TAE_DIM);
        odd.examples[5].targets.iter_mut().for_each(|own| own.outcome.values.fill(value));
        odd.tae[first * TAE_DIM] = tae;
        let mut counted = 0;
        let refused = with.train(odd.chunk(), |report| {
            assert!(report.stepped && report.losses.iter().all(|loss| loss.is_finite()), "{name}");
            counted += report.targets[0].mask.iter().filter(|valid| **valid).count();
        });
        let refused = refused.unwrap();
        assert_eq!(refused.iter().map(|own| own.index).collect::<Vec<_>>(), [5], "{name}");
        assert_eq!(counted, rows(&honest.examples), "{name}: its rows count in no metric");
        assert_eq!(without.train(honest.chunk(), |_| ()).unwrap(), []);
        assert!(with.saved() == without.saved(), "{name}: the expert never saw it");
        assert_eq!(with.mean_loss(), without.mean_loss(), "{name}");
        let targets = with.targets(odd.chunk()).unwrap();
        let is_refused = value.is_infinite();
        assert_eq!(!targets[2].mask[first], is_refused, "{name}: {}", refused[0].reason);
        assert_eq!(refused[0].reason.contains("`labels` gave a bad output"), is_refused);
    }
    // A plugin that fails for every request fails itself.
    let mut all = log(12);
    let targets = all.examples.iter_mut().flat_map(|example| &mut example.targets);
    targets.for_each(|own| own.outcome.values.fill(f32::INFINITY));
    let error = trainer(&blueprint, &past, config).train(all.chunk(), |_| ()).unwrap_err();
    assert!(error.to_string().contains("`labels` gave a bad output"), "{error}");
}
