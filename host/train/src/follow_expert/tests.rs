//! A streaming expert over logs that grow: it resumes as if it had not stopped, publishes what it
//! has, and corrections count in no metric.

use std::path::{Path, PathBuf};

use hypercast_fm::{
    device::DeviceKind,
    example::{Example, Outcome},
    spec::FmConfig,
    trainer,
};

use super::*;
use crate::HeldPublications;
use crate::fm::dataset_spec;
use hypercast_config::OnGap;
use hypercast_core::prerequisite::{hostile, plugins};
use hypercast_data::dataset::timeline::Span;
use hypercast_data::features::replay::{Replay, ReplayOptions};
use hypercast_data::logs::{LogPosition, LogRow, LogVersion, LogWriter};
use hypercast_data::ranked_place::RankedPlace;
use hypercast_data::simulate;
use hypercast_stream::dead_letters::{
    self, DeadLetterQueue, FEATURE_LOGS, LetterReader, LetterScope, UnusableRecord,
};
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::publish::PublicationFollower;
use hypercast_stream::registry::{RegistryClient, VersionState, WeightsLocation};
use hypercast_stream::streams::{MemoryEngine, Record, StreamPlace};

struct World {
    dataset: Dataset,
    config: Config,
    entry: ExpertEntry,
    examples: Vec<Example>,
    /// Where the items of all requests were ranked.
    ranked: Option<RankedPlace>,
}

fn world(dir: &Path, plugins: PathBuf) -> World {
    world_of(dir, &plugins.join("mlp-fusion.wasm"), 240)
}

fn world_of(dir: &Path, plugin: &Path, requests: usize) -> World {
    let into = dir.join("world");
    let options =
        simulate::SimulateOptions { into, users: 20, items: 30, requests, surfaces: 2, seed: 3 };
    simulate::simulate(&options).unwrap();
    let dataset = Dataset::open(&options.into).unwrap();
    let mut config = Config::default();
    config.paths.logs = dir.join("logs");
    config.paths.experts = dir.join("experts");
    config.paths.state = dir.join("state");
    config.expert_training.epochs = 1;
    config.expert_training.online_batch_rows = 48;
    // It is asked at the end alone, however slow the machine.
    config.publish.every_s = 3600;
    let replay = ReplayOptions {
        span: Span::default(),
        history_len: 64,
        max_targets: 16,
        features: config.features,
    };
    let examples: Vec<Example> =
        Replay::new(&dataset, replay).unwrap().map(|read| read.unwrap()).collect();
    assert!(examples.iter().all(|own| own.targets.len() == 6), "eight requests are a step");
    let text = format!("name = \"all\"\nplugin = {plugin:?}");
    World { dataset, config, entry: toml::from_str(&text).unwrap(), examples, ranked: None }
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
            let predictions = vec![0.5; schema.main_tasks().count() * example.targets.len()];
            let ranked = vec![self.ranked.clone(); example.targets.len()];
            let row = LogRow {
                example,
                taes: &taes,
                predictions: &[&predictions],
                ranked: &ranked,
                correction,
                ingested_ms: 7,
                place: None,
            };
            writer.write(row).unwrap();
        }
        writer.finish().unwrap();
    }

    fn follow(&self, engine: &Arc<MemoryEngine>, config: &Config) -> FollowExpertReport {
        self.follow_and_say(engine, config).0
    }

    fn follow_and_say(
        &self,
        engine: &Arc<MemoryEngine>,
        config: &Config,
    ) -> (FollowExpertReport, String) {
        let guests = expert::Engine::new(config.guests()).unwrap();
        let ground =
            ExpertContext { dataset: &self.dataset, config, entry: &self.entry, guests: &guests };
        let options = FollowExpertOptions {
            version: Some("1.0.0".into()),
            until_end: true,
            ..FollowExpertOptions::default()
        };
        let mut said = Vec::new();
        let report =
            follow(ground, engine.clone(), &options, &Shutdown::default(), &mut said).unwrap();
        (report, String::from_utf8(said).unwrap())
    }

    /// A checkpoint of a small FM that has learned from the first requests.
    fn fm(&self, dir: &Path, requests: usize) -> EmbeddingCheckpoint {
        let small = FmConfig {
            dim: 16,
            qk_dim: 8,
            v_dim: 8,
            embedding_dim: 8,
            max_history: 64,
            ..FmConfig::default()
        };
        let spec = dataset_spec(&self.dataset).unwrap();
        let work = dir.join("fm-work");
        let mut trainer = trainer::create(&work, &small, &spec, DeviceKind::Cpu).unwrap();
        for batch in self.examples[..requests].chunks(32) {
            trainer.step(&batch.iter().collect::<Vec<_>>()).unwrap();
        }
        let dir = dir.join("fm");
        trainer.checkpoint(&dir, "1.0.0").unwrap();
        EmbeddingCheckpoint { dir, from_ms: None, allow_look_ahead: false }
    }

    /// Follows a stream of joined examples, with TAEs of a checkpoint.
    fn follow_joined(
        &self,
        examples: &[Example],
        checkpoint: &EmbeddingCheckpoint,
    ) -> Result<FollowExpertReport> {
        let engine = Arc::new(MemoryEngine::new(10));
        for example in examples {
            let joined =
                JoinedExample { example: example.clone(), ingested_ms: 7, ranked: Vec::new() };
            let payload = postcard::to_stdvec(&JoinedRecord::Example(joined)).unwrap();
            let appender = engine.appender(&Topic::joined()).unwrap();
            appender.append(&[Record { id: 0, payload }]).unwrap();
        }
        let guests = expert::Engine::new(self.config.guests()).unwrap();
        let World { dataset, config, entry, .. } = self;
        let context = ExpertContext { dataset, config, entry, guests: &guests };
        let options = FollowExpertOptions {
            version: Some("1.0.0".into()),
            fm_checkpoint: Some(checkpoint.clone()),
            until_end: true,
            ..FollowExpertOptions::default()
        };
        follow(context, engine, &options, &Shutdown::default(), &mut Vec::new())
    }

    fn state(&self, config: &Config) -> FollowerState {
        FollowerState::read(&work_dir(config, &self.entry, "1.0.0")).unwrap().unwrap()
    }
}

#[test]
fn a_stopped_expert_goes_on_as_if_it_had_not_been() {
    let Some(plugins) = plugins("following expert") else { return };
    let dir = tempfile::tempdir().unwrap();
    let world = world(dir.path(), plugins);
    let engine = Arc::new(MemoryEngine::new(10));
    assert_eq!(world.follow(&engine, &world.config).place, None, "nothing is there yet");
    world.log(0..80, false);
    let begun = world.follow(&engine, &world.config);
    assert_eq!((begun.published, begun.place.unwrap().requests), (1, 0));
    let registry = RegistryClient::new(&*engine).read().unwrap();
    let own = registry.expert_version("all", "1.0.0").unwrap();
    assert_eq!(
        (own.state, own.weights.clone()),
        (VersionState::Training, WeightsLocation::Published)
    );
    assert_eq!((own.fm.as_str(), own.surfaces.len(), own.tae_dim), ("1.0.0", 2, 4));
    assert!(own.plugin.ends_with("all/1.0.0/plugin.wasm"), "a component of its own: {own:?}");
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
    let whole = world.follow(&Arc::new(MemoryEngine::new(10)), &once).place.unwrap();
    assert_eq!((stopped, stopped.requests), (whole, 160));
    let (stopped, whole) = (world.state(&world.config), world.state(&once));
    assert!(stopped == whole, "the same parameters, optimiser and average, to the bit");

    // What is published is what it has: a follower's parameters are the averaged ones.
    let mut follower = PublicationFollower::open(engine, Topic::expert("all", "1.0.0")).unwrap();
    let mut last = follower.next(Duration::ZERO).unwrap().unwrap();
    while let Some(next) = follower.next(Duration::ZERO).unwrap() {
        last = next;
    }
    assert_eq!(last.header.trained_position, stopped.place.position.number());
    assert_eq!(last.header.ingested_ms, 7);
    assert!(!last.blocks.is_empty());
}

#[test]
fn an_expert_on_joined_examples_notices_a_stream_that_was_made_anew() {
    let Some(plugins) = plugins("expert on joined examples") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world(dir.path(), plugins);
    world.config.engine.on_gap = OnGap::Continue;
    let checkpoint = world.fm(dir.path(), 0);
    let follow = |range| world.follow_joined(&world.examples[range], &checkpoint).unwrap();
    let place = follow(0..60).place.unwrap();
    assert_eq!((place.position, place.requests), (FeedPosition::Joined(60), 60));
    assert!(world.state(&world.config).addition.joined.place().checksum.is_some());
    // The new stream is longer than what was read of the old one.
    let place = follow(100..170).place.unwrap();
    assert_eq!((place.position, place.requests), (FeedPosition::Joined(70), 60 + 70));

    // What earlier releases wrote ends before what scales have besides, before the scales, before
    // the earlier places, or before the checksum, too.
    let mut state = world.state(&world.config);
    assert!(!state.scales()[0].is_empty() && state.scales()[1].is_empty());
    state.trainer.set_scales(Default::default());
    let without = FollowerState {
        addition: StateAddition { joined: StreamPlace::at(70).into(), ..state.addition.clone() },
        ..state
    };
    let path = work_dir(&world.config, &world.entry, "1.0.0").join("state.bin");
    without.write(path.parent().unwrap()).unwrap();
    for part in [2, 2, 1, 1] {
        let mut bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.split_off(bytes.len() - part), vec![0; part], "none");
        let checksum = crc32fast::hash(&bytes[8..]).to_le_bytes();
        bytes[4..8].copy_from_slice(&checksum);
        std::fs::write(&path, &bytes).unwrap();
        assert!(world.state(&world.config) == without);
    }
}

#[test]
fn an_expert_on_joined_examples_learns_from_none_that_its_fm_has_learned_from() {
    let Some(plugins) = plugins("expert on joined examples") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world(dir.path(), plugins);
    let checkpoint = world.fm(dir.path(), 100);
    let at = |request: usize| world.examples[request].time_ms;
    let (newer_ms, until_ms) = (at(100), at(170));
    world.config.timeline.until = until_ms.to_string();
    // Of the second half of these requests the FM knows nothing.
    let joined = [&world.examples[60..80], &world.examples[170..190]].concat();
    let why = world.follow_joined(&joined, &checkpoint).unwrap_err().to_string();
    assert!(why.contains("has learned from requests up to"), "{why}");
    // Where the data set ends there is nothing newer.
    let at_end = EmbeddingCheckpoint { from_ms: Some(until_ms), ..checkpoint.clone() };
    let why = world.follow_joined(&joined, &at_end).unwrap_err().to_string();
    assert!(why.contains("on (`--from`)") && why.contains("the feature logs"), "{why}");
    let checkpoint = EmbeddingCheckpoint { from_ms: Some(newer_ms), ..checkpoint };
    let place = world.follow_joined(&joined, &checkpoint).unwrap().place.unwrap();
    assert_eq!((place.position, place.requests), (FeedPosition::Joined(40), 20));
}

#[test]
fn corrections_teach_and_are_not_counted() {
    let Some(plugins) = plugins("corrected expert") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world(dir.path(), plugins);
    let engine = Arc::new(MemoryEngine::new(10));
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

#[test]
fn hooks_know_where_items_were_ranked_in_past_and_stream() {
    let Some(hostile) = hostile("weights by position", "search_team") else { return };
    let learned = |at: Option<[u32; 2]>| {
        let dir = tempfile::tempdir().unwrap();
        let mut world = world_of(dir.path(), &hostile, 120);
        world.entry.surfaces = vec!["search".into()];
        let engine = Arc::new(MemoryEngine::new(10));
        let place = |position: u32| {
            let arm = "search_team@1.0.0".to_owned();
            RankedPlace { position, propensity: None, arm }
        };
        world.ranked = at.map(|[past, _]| place(past));
        world.log(0..60, false);
        world.follow(&engine, &world.config);
        world.ranked = at.map(|[_, stream]| place(stream));
        world.log(60..120, false);
        assert!(world.follow(&engine, &world.config).place.unwrap().requests > 0);
        world.state(&world.config).trainer
    };
    // The guest weighs the first place as it weighs one that nobody knows.
    let unknown = learned(None);
    assert!(learned(Some([0, 0])) == unknown);
    for at in [[6, 0], [0, 6]] {
        assert!(learned(Some(at)) != unknown, "{at:?}");
    }
}

fn kinds(said: &str) -> Vec<String> {
    let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
    said.lines().map(|own| line(own)["kind"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_got_worse_is_held_until_it_is_better() {
    let Some(plugins) = plugins("held expert") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world_of(dir.path(), &plugins.join("mlp-fusion.wasm"), 600);
    let engine = Arc::new(MemoryEngine::new(10));
    world.log(0..100, false);
    world.follow(&engine, &world.config);
    // Steps so long that they spoil it.
    world.config.expert_training.average_decay = 0.0;
    world.config.expert_training.online_learning_rate = 1.0;
    let config = world.config.clone();
    std::fs::remove_dir_all(work_dir(&config, &world.entry, "1.0.0")).unwrap();
    world.follow(&engine, &config);
    let published = world.state(&config);
    assert_eq!(published.published, LastPublished::This);
    world.log(100..400, false);
    let (report, said) = world.follow_and_say(&engine, &config);
    assert_eq!((report.published, kinds(&said)), (0, vec!["held".to_owned()]), "{said}");
    assert!(
        said.contains("for the serving version, over") && said.contains("serving_ne"),
        "{said}"
    );
    let held = world.state(&config);
    let LastPublished::Earlier(last) = &held.published else { panic!("it is held") };
    assert!(**last == published.trainer && held.trainer != published.trainer);
    assert_eq!(held.measured.len(), 300 * 6, "what was measured is kept");
    // A restart holds it still, by what was measured before and since.
    world.log(400..410, false);
    let (report, said) = world.follow_and_say(&engine, &config);
    assert_eq!((report.published, kinds(&said)), (0, vec!["held".to_owned()]), "{said}");
    assert_eq!(world.state(&config).measured.len(), 310 * 6);
}

#[test]
fn an_expert_takes_its_trainer_back_to_what_was_published() {
    let Some(plugin) = hostile("expert that goes back", "takes_back") else { return };
    let dir = tempfile::tempdir().unwrap();
    let world = world_of(dir.path(), &plugin, 240);
    let engine = Arc::new(MemoryEngine::new(10));
    world.log(0..80, false);
    assert_eq!(world.follow(&engine, &world.config).published, 1);
    let published = world.state(&world.config);
    world.log(80..160, false);
    let (report, said) = world.follow_and_say(&engine, &world.config);
    assert_eq!((report.published, kinds(&said)), (0, vec!["rolled-back".to_owned()]), "{said}");
    assert!(said.contains("takes_back never wants anything new"), "{said}");
    let back = world.state(&world.config);
    assert_eq!((&back.published, back.measured.len()), (&LastPublished::This, 0));
    assert_eq!(back.place.requests, 80, "it does not learn from them again");
    assert!(back.trainer.learned_like(&published.trainer), "parameters, average and optimiser");
}

#[test]
fn an_expert_that_fails_to_judge_publishes_nothing_and_is_not_registered() {
    let Some(plugin) = hostile("expert that fails to judge", "trap_evaluate") else { return };
    let dir = tempfile::tempdir().unwrap();
    let world = world_of(dir.path(), &plugin, 240);
    let engine = Arc::new(MemoryEngine::new(10));
    world.log(0..80, false);
    let (report, said) = world.follow_and_say(&engine, &world.config);
    assert_eq!((report.published, kinds(&said)), (0, vec!["held".to_owned()]), "{said}");
    assert!(said.contains("`evaluate` trapped"), "{said}");
    assert_eq!(engine.span(&Topic::expert("all", "1.0.0")).unwrap().end, 0);
    assert!(RegistryClient::new(&*engine).read().unwrap().is_empty());
    assert_eq!(world.state(&world.config).published, LastPublished::Nothing);
}

#[test]
fn an_expert_that_never_answers_holds_up_a_stop_for_its_deadline_alone() {
    let Some(plugin) = hostile("expert that never answers", "spin_evaluate") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world_of(dir.path(), &plugin, 240);
    let deadline = Duration::from_secs(2);
    world.config.plugin_limits.setup_deadline_ms = 2000;
    world.config.publish.every_s = 0;
    world.log(0..80, false);
    let guests = expert::Engine::new(world.config.guests()).unwrap();
    let World { dataset, config, entry, .. } = &world;
    let ground = ExpertContext { dataset, config, entry, guests: &guests };
    let options = FollowExpertOptions { version: Some("1.0.0".into()), ..Default::default() };
    let (stop, mut said) = (Shutdown::default(), Vec::new());
    std::thread::scope(|scope| {
        let engine = Arc::new(MemoryEngine::new(10));
        let following = scope.spawn(|| follow(ground, engine, &options, &stop, &mut said));
        let work = work_dir(config, entry, "1.0.0");
        while HeldPublications::read(&work).unwrap().is_none() {
            assert!(!following.is_finished(), "it goes on where it may not publish");
            std::thread::sleep(Duration::from_millis(50));
        }
        // It learns from these, and is within its next `evaluate` then.
        world.log(80..88, false);
        std::thread::sleep(BATCH_WAIT * 2);
        let asked = Instant::now();
        stop.request();
        assert_eq!(following.join().unwrap().unwrap().published, 0);
        assert!(asked.elapsed() < deadline + Duration::from_secs(5), "{:?}", asked.elapsed());
    });
    let said = String::from_utf8(said).unwrap();
    assert_eq!(kinds(&said), ["held", "held"], "{said}");
    assert!(said.contains("2000 ms"), "{said}");
}

#[test]
fn a_harmful_row_is_a_dead_letter_and_is_tried_again_once() {
    let Some(plugins) = plugins("expert and dead letters") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world(dir.path(), plugins);
    // Ranges would clip them.
    Arc::make_mut(&mut world.dataset.schema).ranges.clear();
    let engine = Arc::new(MemoryEngine::new(1000));
    world.log(0..80, false);
    world.follow(&engine, &world.config);
    // The plugin refuses to label the first, and the second has no finite gradient.
    for (at, value) in [(85, f32::INFINITY), (95, 3e38)] {
        let targets = &mut world.examples[at].targets;
        targets.iter_mut().for_each(|target| target.outcome.values[0] = value);
    }
    world.log(80..160, false);
    let place = world.follow(&engine, &world.config).place.unwrap();
    assert_eq!(place.requests, 78);
    let listed = || dead_letters::list(&*engine).unwrap().letters;
    let letters = listed();
    let file = LogPosition::file(1).number();
    let positions: Vec<u64> = letters.iter().map(|own| own.letter.position - file).collect();
    assert_eq!(positions, [5, 15]);
    assert!(letters.iter().all(|own| own.letter.reader == "expert-all-1_0_0"), "{letters:?}");
    assert!(letters[0].letter.reason.contains("`labels`"), "{letters:?}");
    let saved = world.state(&world.config);
    assert!(saved.addition.mean_loss > 0.0);

    let reader = LetterReader::Trainer(Topic::expert("all", "1.0.0"));
    let own: Arc<dyn StreamEngine> = engine.clone();
    let of = LetterScope { reader: &reader, source: FEATURE_LOGS };
    let stop = Shutdown::default();
    let queue = DeadLetterQueue::open(own, of, None, Arc::default(), stop).unwrap();
    let by_hand = |position| {
        let (request, checksum, reason) = (None, None, "by hand".into());
        UnusableRecord { position, retries: 0, request, checksum, reason }
    };
    // An honest row, and one of a file that is not there.
    queue.set_aside(vec![by_hand(file + 7), by_hand(file * 9)]).unwrap();
    for number in [1, 2, 3] {
        dead_letters::retry(&*engine, number).unwrap();
    }
    for _ in 0..2 {
        let after = world.follow(&engine, &world.config).place.unwrap();
        assert_eq!((after.requests, after.position), (79, place.position), "once");
        let again: Vec<[u64; 2]> = listed()[4..]
            .iter()
            .map(|own| [own.letter.position, u64::from(own.letter.retries)])
            .collect();
        assert_eq!(again, [[file * 9, 1], [file + 15, 1]]);
    }
    assert_ne!(world.state(&world.config).trainer, saved.trainer);

    // A state of a release without dead letters.
    let work = work_dir(&world.config, &world.entry, "1.0.0");
    let bytes = std::fs::read(work.join("state.bin")).unwrap();
    let state = world.state(&world.config);
    let joined = (state.addition.joined.place().checksum, state.addition.joined.earlier());
    let addition = postcard::to_stdvec(&state.addition).unwrap().len()
        + postcard::to_stdvec(&joined).unwrap().len()
        + postcard::to_stdvec(&state.scales()).unwrap().len()
        + postcard::to_stdvec(&state.scales().map(super::state::additions)).unwrap().len();
    let body = &bytes[8..bytes.len() - addition];
    let checksum = crc32fast::hash(body).to_le_bytes();
    std::fs::write(work.join("state.bin"), [&bytes[..4], &checksum, body].concat()).unwrap();
    let earlier = world.state(&world.config);
    assert_eq!((earlier.addition.orders, earlier.place), (None, state.place));
}

#[test]
fn an_operators_limit_holds_what_the_plugin_would_publish() {
    let Some(plugins) = plugins("limited expert") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut world = world(dir.path(), plugins);
    let engine = Arc::new(MemoryEngine::new(10));
    world.log(0..80, false);
    let task = world.dataset.schema.tasks[0].name.clone();
    world.entry.ne_limits.max.insert(task.clone(), 0.1);
    let (report, said) = world.follow_and_say(&engine, &world.config);
    assert_eq!((report.published, kinds(&said)), (0, vec!["held".to_owned()]), "{said}");
    assert!(said.contains("above its limit of 0.1"), "{said}");
    let work = work_dir(&world.config, &world.entry, "1.0.0");
    assert_eq!(HeldPublications::read(&work).unwrap().unwrap().in_a_row, 1);
    world.entry.ne_limits.max.insert(task, 9.0);
    assert_eq!(world.follow(&engine, &world.config).published, 1);
    assert_eq!(HeldPublications::read(&work).unwrap(), None);
}
