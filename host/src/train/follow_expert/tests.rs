//! A streaming expert over logs that grow: it resumes as if it had not stopped, publishes what it has, and
//! corrections count in no metric.

use std::path::{Path, PathBuf};

use hypercast_fm::example::{Example, Outcome};

use super::*;
use crate::{
    engine::Memory,
    evaluate::tests::plugins,
    features::replay::{Replay, ReplayOptions},
    import::simulate,
    logs::{LogRow, LogVersion, LogWriter},
    publish::Follower,
};

struct World {
    dataset: Dataset,
    config: Config,
    entry: ExpertEntry,
    examples: Vec<Example>,
}

fn world(dir: &Path, plugins: PathBuf) -> World {
    let into = dir.join("world");
    let options =
        simulate::Options { into, users: 20, items: 30, requests: 240, surfaces: 2, seed: 3 };
    simulate::simulate(&options).unwrap();
    let dataset = Dataset::open(&options.into).unwrap();
    let mut config = Config::default();
    config.paths.logs = dir.join("logs");
    config.paths.experts = dir.join("experts");
    config.expert_training.epochs = 1;
    config.expert_training.online_batch_rows = 48;
    let replay = ReplayOptions {
        span: Span::default(),
        history_len: 64,
        max_targets: 16,
        features: config.features,
    };
    let examples: Vec<Example> =
        Replay::new(&dataset, replay).unwrap().map(Result::unwrap).collect();
    assert!(examples.iter().all(|own| own.targets.len() == 6), "eight requests are a step");
    let text = format!("name = \"all\"\nplugin = {:?}", plugins.join("mlp-fusion.wasm"));
    World { dataset, config, entry: toml::from_str(&text).unwrap(), examples }
}

impl World {
    fn log(&self, range: std::ops::Range<usize>, correction: bool) {
        let options = self.config.logs.options();
        let versions = vec![LogVersion::new("1.0.0", 4)];
        let schema = &self.dataset.schema;
        let mut writer =
            LogWriter::create(&self.config.paths.logs, schema, options, versions).unwrap();
        for example in &self.examples[range] {
            let tae: Vec<f32> = example
                .targets
                .iter()
                .flat_map(|own| {
                    [own.item.id as f32 * 0.1, 1.0, example.request as f32 * 1e-3, -1.0]
                })
                .collect();
            let taes = [tae.as_slice()];
            let row = LogRow { example, taes: &taes, correction, ingested_ms: 7, position: None };
            writer.write(row).unwrap();
        }
        writer.finish().unwrap();
    }

    fn follow(&self, engine: &Arc<Memory>, config: &Config) -> FollowReport {
        let guests = expert::Engine::new(config.guests()).unwrap();
        let ground = Ground { dataset: &self.dataset, config, entry: &self.entry, guests: &guests };
        let options = FollowOptions {
            version: Some("1.0.0".into()),
            until_end: true,
            ..FollowOptions::default()
        };
        let quiet = (&Stop::default(), &mut Vec::new() as &mut dyn Write);
        follow(ground, engine.clone(), &options, quiet).unwrap()
    }

    fn state(&self, config: &Config) -> State {
        State::read(&work_dir(config, &self.entry, "1.0.0")).unwrap().unwrap()
    }
}

#[test]
fn a_stopped_expert_goes_on_as_if_it_had_not_been() {
    let Some(plugins) = plugins("following expert") else { return };
    let dir = tempfile::tempdir().unwrap();
    let world = world(dir.path(), plugins);
    let engine = Arc::new(Memory::new(10));
    assert_eq!(world.follow(&engine, &world.config).place, None, "nothing is there yet");
    world.log(0..80, false);
    let begun = world.follow(&engine, &world.config);
    assert_eq!((begun.published, begun.place.unwrap().requests), (1, 0));
    // Another folder that stands at the same place.
    let mut once = world.config.clone();
    once.paths.experts = dir.path().join("once");
    let work = work_dir(&once, &world.entry, "1.0.0");
    std::fs::create_dir_all(&work).unwrap();
    world.state(&world.config).write(&work).unwrap();
    assert_eq!(world.state(&once), world.state(&world.config), "what is saved reads back");

    world.log(80..160, false);
    world.follow(&engine, &world.config);
    world.log(160..240, false);
    let stopped = world.follow(&engine, &world.config).place.unwrap();
    let whole = world.follow(&Arc::new(Memory::new(10)), &once).place.unwrap();
    assert_eq!((stopped, stopped.requests), (whole, 160));
    let (stopped, whole) = (world.state(&world.config), world.state(&once));
    assert!(stopped == whole, "the same parameters, optimiser and average, to the bit");

    // What is published is what it has: a follower's parameters are the averaged ones.
    let mut follower = Follower::open(engine, Topic::expert("all", "1.0.0")).unwrap();
    let mut last = follower.next(Duration::ZERO).unwrap().unwrap();
    while let Some(next) = follower.next(Duration::ZERO).unwrap() {
        last = next;
    }
    assert_eq!(last.header.trained_position, stopped.place.position.number());
    assert_eq!(last.header.ingested_ms, 7);
    assert!(!last.blocks.is_empty());
}

#[test]
fn corrections_teach_and_are_not_counted() {
    let Some(plugins) = plugins("corrected expert") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world(dir.path(), plugins);
    let engine = Arc::new(Memory::new(10));
    world.log(0..80, false);
    world.follow(&engine, &world.config);
    let before = world.state(&world.config);
    for example in &mut world.examples[..8] {
        for target in &mut example.targets {
            target.outcome = Outcome { actions: 1, known: 1, ..Outcome::UNKNOWN };
        }
    }
    world.log(0..8, true);
    let place = world.follow(&engine, &world.config).place.unwrap();
    assert_eq!((place.requests, place.corrections), (0, 8));
    assert_ne!(before.trainer, world.state(&world.config).trainer);
}
