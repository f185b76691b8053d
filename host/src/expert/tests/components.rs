//! Real components: the in-tree plugins train and serve, hostile guests are
//! contained. `HYPERCAST_PLUGINS` and `HYPERCAST_HOSTILE` name the folders.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use hypercast_fm::example::Example;

use super::build::{TAE_DIM, example, noise, schema};
use crate::expert::wasm::Fault;
use crate::expert::{
    Blueprint, BreakerConfig, Chunk, Device, Engine, EngineConfig, Expert, ExpertTrainer, FeatureStatistics,
    LoadOptions, RankOutcome, Tae, TrainerConfig,
};

/// The components in the folder that `variable` names; none, loudly, without it.
fn components(variable: &str) -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os(variable) else {
        eprintln!("SKIPPED: {variable} names no folder of components (`cargo verify` builds them)");
        return Vec::new();
    };
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{variable}={folder:?}: {error}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "wasm"));
    files.sort();
    assert!(!files.is_empty(), "{variable}={folder:?} holds no .wasm file");
    files
}

fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| Engine::new(EngineConfig { instances: 16, ..EngineConfig::default() }).unwrap())
}

fn options() -> LoadOptions {
    LoadOptions { tae_dim: TAE_DIM, fm_version: Some("1.0.0".into()), ..LoadOptions::default() }
}

struct Log {
    examples: Vec<Example>,
    tae: Vec<f32>,
}

fn log(requests: u64) -> Log {
    let examples: Vec<Example> = (0..requests).map(|r| example(r, (r % 6) as usize, 1 + (r % 5) as usize)).collect();
    let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
    Log { tae: noise(4, rows * TAE_DIM), examples }
}

impl Log {
    fn chunk(&self) -> Chunk<'_> {
        Chunk { examples: &self.examples, tae: &self.tae }
    }
}

fn trainer(blueprint: &Arc<Blueprint>, log: &Log, config: TrainerConfig) -> ExpertTrainer {
    let mut statistics = FeatureStatistics::new(blueprint.columns.feature_names());
    log.examples.iter().for_each(|example| statistics.observe(example));
    let parameters = blueprint.init_parameters(statistics.finish(), 1);
    ExpertTrainer::new(blueprint.clone(), parameters, config, Device::Cpu).unwrap()
}

fn loss(trainer: &mut ExpertTrainer, log: &Log) -> f64 {
    let mut total = 0.0;
    trainer.train(log.chunk(), |report| {
        assert!(report.stepped);
        total += report.losses.iter().sum::<f64>();
    })
    .unwrap();
    total
}

fn trained(path: &std::path::Path, log: &Log) -> (Arc<Blueprint>, ExpertTrainer) {
    let blueprint = Arc::new(Blueprint::load(engine(), path, &schema(), &options()).unwrap());
    let trainer = trainer(&blueprint, log, TrainerConfig { batch_rows: 64, ..TrainerConfig::default() });
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
        assert!(last < 0.97 * first, "{name}: the loss went from {first} to {last}");
        let trained = trainer.predict(log.chunk()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("expert.safetensors");
        trainer.parameters().save(&file).unwrap();
        let expert = Expert::open(blueprint, &file, Device::Cpu, BreakerConfig::default()).unwrap();
        let mut row = 0;
        for example in &log.examples {
            let rows = example.targets.len();
            let tae = Tae::Rows(&log.tae[row * TAE_DIM..(row + rows) * TAE_DIM]);
            let (outcome, _) = expert.serve(example, tae, 3);
            let RankOutcome::Ranked { ranked, predictions } = outcome else { panic!("{name}: {outcome:?}") };
            assert!(!ranked.is_empty() && ranked.len() <= 3.min(rows), "{name}: {ranked:?}");
            for (served, trained) in predictions.tasks.iter().zip(&trained) {
                for (served, trained) in served.values.iter().zip(&trained[row..]) {
                    assert!((served - trained).abs() <= 1e-5, "{name}: served {served}, trained {trained}");
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
        let without = trainer.predict(Chunk { examples: &log.examples, tae: &other }).unwrap();
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

#[test]
fn hostile_guests_are_refused_or_contained_while_others_answer() {
    let log = log(20);
    let plugins = components("HYPERCAST_PLUGINS");
    let hostile = components("HYPERCAST_HOSTILE");
    let Some(good) = plugins.first() else { return };
    let (blueprint, trainer) = trained(good, &log);
    let good = Expert::new(blueprint, trainer.into_parameters(), Device::Cpu, BreakerConfig::default()).unwrap();
    for path in hostile {
        let file = path.file_stem().unwrap().to_string_lossy().into_owned();
        let told = match Blueprint::load(engine(), &path, &schema(), &options()) {
            Err(error) => error.to_string(),
            Ok(blueprint) => contained(blueprint, &log),
        };
        eprintln!("{file}: {told}");
        assert!(told.contains(file.trim_start_matches("hostile-")) || told.contains(&file), "{told} does not name {file}");
        for example in &log.examples {
            let tae = noise(3, example.targets.len() * TAE_DIM);
            let (outcome, _) = good.serve(example, Tae::Rows(&tae), 5);
            assert!(matches!(outcome, RankOutcome::Ranked { .. }), "after {file}: {outcome:?}");
        }
    }
}

/// Trains nothing and serves until the breaker opens; every answer is degraded.
fn contained(blueprint: Blueprint, log: &Log) -> String {
    let blueprint = Arc::new(blueprint);
    let trainer = trainer(&blueprint, log, TrainerConfig::default());
    let breaker = BreakerConfig { faults: 3, open_ms: 60_000 };
    let expert = Expert::new(blueprint.clone(), trainer.into_parameters(), Device::Cpu, breaker).unwrap();
    let example = &log.examples[4];
    let tae = noise(3, example.targets.len() * TAE_DIM);
    let faults: Vec<_> = (0..4)
        .map(|_| match expert.serve(example, Tae::Rows(&tae), 3).0 {
            RankOutcome::Degraded(fault) => fault,
            RankOutcome::Ranked { .. } => hook_fault(&blueprint, log),
        })
        .collect();
    assert_eq!(faults[0].plugin, expert.name());
    if expert.counters().degraded() > 0 {
        assert_eq!(faults[3].cause, Fault::Open, "the breaker opens after three faults");
    }
    faults[0].to_string()
}

/// A guest that ranks well must be hostile in training.
fn hook_fault(blueprint: &Arc<Blueprint>, log: &Log) -> crate::expert::ExpertFault {
    let mut trainer = trainer(blueprint, log, TrainerConfig::default());
    match trainer.train(log.chunk(), |_| {}) {
        Err(crate::expert::Error::Fault(fault)) => fault,
        other => panic!("{}: neither `rank` nor a training hook failed: {other:?}", blueprint.description.name),
    }
}
