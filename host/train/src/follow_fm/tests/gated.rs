//! What the gate holds: an FM that learned from shuffled labels, at its first publication and in
//! the place of a better one, and weights that moved too far; and by which requests it judges.

use hypercast_core::hash::mix_parts;
use hypercast_data::schema::growth::SchemaGrowth;
use hypercast_data::schema::{
    ColumnUpgrade, Feature, FeatureKind, OwnedEntries, SurfaceAlignment, Task, TaskKind, TaskRole,
};
use hypercast_fm::checkpoint::FmManifest;
use hypercast_fm::example::Outcome;
use hypercast_stream::publish::TrainingPosition;
use serde_json::Value;

use super::*;
use crate::HeldPublications;

/// Requests that the trainers have learned from; the stream has the ones after them.
const LEARNED: usize = 400;

/// As often as needed to be better than the base rate.
const PASSES: usize = 6;

/// Trainers of the same past, one with honest and one with shuffled labels, and the stream after
/// it.
struct GatedWorld {
    dataset: Dataset,
    config: Config,
    honest: PathBuf,
    shuffled: PathBuf,
    stream: Vec<Record>,
}

impl GatedWorld {
    fn new(dir: &Path) -> GatedWorld {
        let (dataset, mut examples) = examples(dir, 700);
        let stream = examples.split_off(LEARNED);
        let joined = |example: Example| {
            let ingested_ms = example.time_ms;
            let joined = JoinedExample { ingested_ms, example, ranked: Vec::new() };
            let payload = postcard::to_stdvec(&JoinedRecord::Example(joined)).unwrap();
            Record { id: 0, payload }
        };
        let mut config = config(&dir.join("work"));
        config.paths.fm = dir.join("fm");
        config.fm_gate.rows = 600;
        let world = GatedWorld {
            dataset,
            config,
            honest: dir.join("honest"),
            shuffled: dir.join("shuffled"),
            stream: stream.into_iter().map(joined).collect(),
        };
        let mut honest = world.learn(&examples, &world.honest);
        honest.checkpoint(&world.config.paths.fm, "1.0.0").unwrap();
        shuffle(&mut examples);
        world.learn(&examples, &world.shuffled);
        world
    }

    /// A trainer that has learned from examples, and is saved.
    fn learn(&self, examples: &[Example], saved: &Path) -> Box<dyn FmTrainer> {
        let spec = dataset_spec(&self.dataset).unwrap();
        let work = saved.with_extension("work");
        let mut trainer =
            trainer::create(&work, &self.config.fm, &spec, self.config.device).unwrap();
        for _ in 0..PASSES {
            for batch in examples.chunks(16) {
                trainer.step(&batch.iter().collect::<Vec<_>>()).unwrap();
            }
        }
        trainer.save(saved).unwrap();
        trainer
    }

    /// Follows as a version that begins with a saved trainer, where it has not begun.
    fn follow(&self, engine: &Arc<MemoryEngine>, version: &str, from: &Path) -> FollowedLines {
        let context =
            ServiceContext { dataset: &self.dataset, config: &self.config, engine: engine.clone() };
        let from = Some(from.to_path_buf());
        let options = FollowFmOptions { version: version.into(), from, ..options() };
        let mut said = Vec::new();
        let report = follow(context, &options, &Shutdown::default(), &mut said).unwrap();
        let said = String::from_utf8(said).unwrap();
        let lines = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        FollowedLines { report, lines }
    }

    /// An engine whose stream of a version has the weights of the honest trainer.
    fn with_published(&self, version: &str, dir: &Path) -> Arc<MemoryEngine> {
        self.with_trained(version, dir, TrainingPosition::default())
    }

    /// The same, with a publication that says how far it was trained.
    fn with_trained(
        &self,
        version: &str,
        dir: &Path,
        position: TrainingPosition,
    ) -> Arc<MemoryEngine> {
        let engine = streams(&self.stream[..100]);
        let work = dir.join("honest-again");
        let spec = dataset_spec(&self.dataset).unwrap();
        let from = ResumePaths { saved: &self.honest, work: &work, growths: &[] };
        let mut trainer =
            trainer::resume(from, &self.config.fm, &spec, self.config.device).unwrap();
        let (topic, settings) = (Topic::fm(version), self.config.publish.clone());
        let mut publisher =
            Publisher::open(engine.clone(), topic, settings, &dir.join("published")).unwrap();
        let trained = trainer.trained_weights(version).unwrap();
        publisher.publish(&trained, position).unwrap();
        engine
    }

    /// The gate of a version.
    fn gate(
        &self,
        engine: &Arc<MemoryEngine>,
        version: &str,
        has_published: bool,
    ) -> FmPublishGate {
        let spec = dataset_spec(&self.dataset).unwrap();
        let context =
            ServiceContext { dataset: &self.dataset, config: &self.config, engine: engine.clone() };
        let work = work_dir(&self.config, version);
        let runtime = Arc::new(BurnRuntime);
        let trained = TrainedVersion { version, spec: &spec, work: &work, has_published, runtime };
        let window = EvalWindow::of_fm(&spec, self.config.fm_gate.rows);
        FmPublishGate::new(&context, &trained, window, &JobMetrics::default()).unwrap()
    }

    /// Requests of the stream.
    fn requests(&self, range: Range<usize>) -> Vec<Example> {
        let decode = |record: &Record| match JoinedRecord::decode(&record.payload).unwrap() {
            JoinedRecord::Example(joined) => joined.example,
            other => panic!("there are examples alone: {other:?}"),
        };
        self.stream[range].iter().map(decode).collect()
    }

    /// Goes on with what [`GatedWorld::learn`] saved, in a work folder of its own.
    fn trainer(&self, saved: &Path) -> Box<dyn FmTrainer> {
        let (spec, work) = (dataset_spec(&self.dataset).unwrap(), saved.with_extension("again"));
        let from = ResumePaths { saved, work: &work, growths: &[] };
        trainer::resume(from, &self.config.fm, &spec, self.config.device).unwrap()
    }

    fn held(&self, version: &str) -> Option<HeldPublications> {
        HeldPublications::read(&work_dir(&self.config, version)).unwrap()
    }
}

/// What a trainer reported and said.
struct FollowedLines {
    report: FollowFmReport,
    lines: Vec<Value>,
}

impl FollowedLines {
    /// The kind and the reason of a line.
    fn decision(&self, line: usize) -> String {
        let line = &self.lines[line];
        format!("{}: {}", line["kind"].as_str().unwrap(), line["reason"].as_str().unwrap_or(""))
    }
}

/// Gives each target the outcome of another.
fn shuffle(examples: &mut [Example]) {
    let mut targets: Vec<_> = examples.iter_mut().flat_map(|own| &mut own.targets).collect();
    let mut outcomes: Vec<(u64, Outcome)> = targets
        .iter()
        .enumerate()
        .map(|(at, target)| (mix_parts(&[at as u64]), target.outcome))
        .collect();
    outcomes.sort_by_key(|(order, _)| *order);
    for (target, (_, outcome)) in targets.iter_mut().zip(outcomes) {
        target.outcome = outcome;
    }
}

#[test]
fn an_fm_of_shuffled_labels_is_held_at_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = GatedWorld::new(dir.path());
    let engine = streams(&world.stream);
    let held = world.follow(&engine, "2.0.0", &world.shuffled);
    let why = held.decision(0);
    assert!(why.starts_with("held: NE of ") && why.contains("for what serves"), "{why}");
    assert!(why.contains("no better than that of the base rate"), "{why}");
    assert!(held.lines[0]["evaluation"][0]["serving_ne"].is_number(), "{}", held.lines[0]);
    assert_eq!(held.lines[0]["position"], 0);

    let published = world.follow(&engine, "3.0.0", &world.honest);
    assert_eq!(published.decision(0), "published: ", "{:?}", published.lines);
    assert_eq!((published.report.held, published.report.published), (0, 2));
    assert!(published.lines[0]["evaluation"][0]["serving_ne"].is_number());
    assert_eq!(world.held("3.0.0"), None);

    // Where nothing serves, an FM must be better than the base rate.
    std::fs::remove_dir_all(&world.config.paths.fm).unwrap();
    let engine = streams(&world.stream);
    let why = world.follow(&engine, "4.0.0", &world.shuffled).decision(0);
    assert!(why.starts_with("held: the mean error of its tasks is "), "{why}");
    assert_eq!(world.follow(&engine, "5.0.0", &world.honest).decision(0), "published: ");
    world.config.fm_gate.rows = 0;
    assert_eq!(world.follow(&engine, "6.0.0", &world.shuffled).decision(0), "published: ");
}

#[test]
fn what_is_worse_than_what_serves_is_held_until_it_is_better() {
    let dir = tempfile::tempdir().unwrap();
    let world = GatedWorld::new(dir.path());
    let engine = world.with_published("2.0.0", dir.path());
    let published = engine.span(&Topic::fm("2.0.0")).unwrap();
    let held = world.follow(&engine, "2.0.0", &world.shuffled);
    assert_eq!((held.report.held, held.report.published), (1, 0), "{:?}", held.lines);
    assert!(held.decision(0).contains("for what serves"), "{:?}", held.lines);
    assert_eq!(engine.span(&Topic::fm("2.0.0")).unwrap(), published);
    let first = world.held("2.0.0").unwrap();
    assert_eq!(first.in_a_row, 1);

    // A restart holds it still, by what was measured before and since, on the newest rows.
    engine.appender(&Topic::joined()).unwrap().append(&world.stream[100..110]).unwrap();
    let held = world.follow(&engine, "2.0.0", &world.shuffled);
    assert_eq!((held.report.held, held.report.published), (1, 0), "{:?}", held.lines);
    assert_eq!(held.lines[0]["evaluation"][0]["n"], 600);
    let second = world.held("2.0.0").unwrap();
    assert_eq!((second.in_a_row, second.since_ms), (2, first.since_ms));

    // It has learned from as many honest requests as from shuffled ones by the end of the stream.
    engine.appender(&Topic::joined()).unwrap().append(&world.stream[110..]).unwrap();
    let mut lenient = world.config.clone();
    lenient.fm_gate.max_ne_increase = 0.5;
    let world = GatedWorld { config: lenient, ..world };
    let published = world.follow(&engine, "2.0.0", &world.shuffled);
    assert_eq!((published.report.held, published.report.published), (0, 1));
    assert_eq!(world.held("2.0.0"), None);
}

#[test]
fn taes_and_features_that_moved_too_far_are_held() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = GatedWorld::new(dir.path());
    world.config.fm_gate.max_ne_increase = 1e3;
    world.config.fm_gate.max_tae_drift = 0.05;
    let engine = world.with_published("2.0.0", dir.path());
    let held = world.follow(&engine, "2.0.0", &world.shuffled);
    let why = held.decision(0);
    assert!(why.starts_with("held: TAEs moved by "), "{why}");
    let drift = held.lines[0]["tae_drift"].as_f64().unwrap();
    assert!(drift > 0.05 && drift < 3.0, "{drift}");
    // After a restart nothing is there to compare TAEs with, and nothing was learned since.
    let again = world.follow(&engine, "2.0.0", &world.shuffled);
    assert_eq!((again.report.published, again.lines.len()), (0, 0), "{:?}", again.lines);
    assert_eq!(world.held("2.0.0").unwrap().in_a_row, 1);

    world.config.fm_gate.max_tae_drift = 1e3;
    world.config.fm_gate.max_feature_drift = 0.0;
    engine.appender(&Topic::joined()).unwrap().append(&world.stream[100..102]).unwrap();
    let why = world.follow(&engine, "2.0.0", &world.shuffled).decision(0);
    assert!(why.starts_with("held: the mean of numeric column "), "{why}");

    // The honest trainer goes on from what it published, and hardly moves.
    let engine = world.with_published("3.0.0", &dir.path().join("third"));
    world.config.fm_gate = hypercast_config::FmGateSettings { rows: 600, ..Default::default() };
    let published = world.follow(&engine, "3.0.0", &world.honest);
    assert_eq!(published.decision(0), "published: ", "{:?}", published.lines);
    let drift = published.lines[0]["tae_drift"].as_f64().unwrap();
    assert!(drift > 0.0 && drift < 0.5, "{drift}");
}

#[test]
fn each_publication_is_compared_with_the_one_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = GatedWorld::new(dir.path());
    // Whenever the one before is sent, and loaded by the gate.
    world.config.publish.every_s = 0;
    let gate = &mut world.config.fm_gate;
    gate.max_ne_increase = 1e3;
    (gate.max_tae_drift, gate.max_feature_drift) = (1e3, 1e3);
    let engine = streams(&world.stream);
    let followed = world.follow(&engine, "2.0.0", &world.honest);
    assert!(followed.report.published > 1, "{:?}", followed.lines);
    let published = followed.lines.iter().filter(|line| line["kind"] == "published");
    let drifts: Vec<bool> = published.map(|line| line["tae_drift"].is_number()).collect();
    assert!(!drifts[0] && drifts[1..].iter().all(|&is_known| is_known), "{:?}", followed.lines);
}

#[test]
fn a_first_publication_is_judged_behind_records_without_use_and_again_after_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let world = GatedWorld::new(dir.path());
    let useless = vec![Record { id: 0, payload: vec![0xff; 9] }; gate::MOST_REQUESTS];
    let engine = streams(&[useless, world.stream[..60].to_vec()].concat());
    let first = world.follow(&engine, "2.0.0", &world.shuffled);
    assert!(first.decision(0).starts_with("held: "), "{:?}", first.lines);
    assert_eq!(first.report.published, 0, "{:?}", first.lines);
    let rows = |line: &Value| line["evaluation"][0]["n"].as_u64().unwrap();
    let measured = rows(first.lines.last().unwrap());
    assert!(measured > 100);
    // What was measured is kept over restarts that bring nothing.
    for _ in 0..2 {
        let idle = world.follow(&engine, "2.0.0", &world.shuffled);
        assert_eq!((idle.report.published, idle.lines.len()), (0, 0), "{:?}", idle.lines);
    }
    engine.appender(&Topic::joined()).unwrap().append(&world.stream[60..62]).unwrap();
    let again = world.follow(&engine, "2.0.0", &world.shuffled);
    assert_eq!((again.report.held, again.report.published), (2, 0), "{:?}", again.lines);
    // The two requests came twice, to be judged by and to be learned from, and count once.
    assert_eq!(rows(&again.lines[0]), rows(&again.lines[1]));
    assert!(rows(&again.lines[0]) > measured);
}

#[test]
fn a_request_without_predictions_holds_no_first_publication_alone() {
    let dir = tempfile::tempdir().unwrap();
    let world = GatedWorld::new(dir.path());
    let engine = streams(&[]);
    let requests = world.requests(0..100);
    let positions: Vec<u64> = (0..100).collect();
    let mut trainer = world.trainer(&world.honest);
    let said = trainer.predict(&requests.iter().collect::<Vec<_>>()).unwrap();
    let manifest = trainer.trained_weights("2.0.0").unwrap().manifest;
    let targets = requests[0].targets.len();
    for (harmful, is_held) in [(0, false), (1, false), (100, true)] {
        let mut said = said.clone();
        let cells = said.predictions.len() / 100;
        assert!(requests.iter().all(|request| request.targets.len() == targets));
        said.predictions[..harmful * cells].fill(f32::NAN);
        let mut gate = world.gate(&engine, "2.0.0", false);
        gate.look_at(requests.clone(), &positions, said);
        gate.score();
        let measured = gate.window.rows.len();
        let expected = if is_held { 100 } else { 100 - harmful };
        assert_eq!(measured, (expected * targets).min(world.config.fm_gate.rows));
        assert_eq!(gate.judge(&manifest).held.is_some(), is_held, "{harmful} of them");
    }
}

#[test]
fn requests_of_a_stream_that_was_made_anew_count_unless_they_were_learned_from() {
    let dir = tempfile::tempdir().unwrap();
    let world = GatedWorld::new(dir.path());
    let until_ms = |range| world.requests(range).iter().map(|own| own.time_ms).max().unwrap();
    let trained = TrainingPosition {
        trained_position: 100,
        trained_until_ms: until_ms(0..100),
        ..TrainingPosition::default()
    };
    let engine = world.with_trained("2.0.0", dir.path(), trained);
    let trainer = world.trainer(&world.shuffled);
    let mut gate = world.gate(&engine, "2.0.0", true);
    let mut measured = |range: Range<usize>| {
        let requests = world.requests(range.clone());
        let said = trainer.predict(&requests.iter().collect::<Vec<_>>()).unwrap();
        let positions: Vec<u64> = (0..requests.len() as u64).collect();
        gate.reread_until_ms = (range.start >= 110).then(|| until_ms(100..120));
        gate.observe(requests, &positions, &said);
        gate.score();
        gate.window.rows.len()
    };
    assert_eq!(measured(0..100), 0, "what serves has learned from them");
    let new = measured(100..110);
    assert!(new > 0, "positions begin again, and times go on");
    assert_eq!(measured(110..120), new, "what comes again says nothing");
    assert!(measured(120..130) > new);
}

/// A feature, an action and a task of the search page, which its alignment module reads and learns.
fn aligned(schema: &Schema) -> Schema {
    let mut schema = schema.clone();
    schema.actions.push("cart".into());
    let cart = Task::of_label("cart", TaskRole::Auxiliary, TaskKind::Binary);
    schema.tasks.push(Task { surfaces: vec!["search".into()], ..cart });
    schema.context_features.push(Feature::new("words", FeatureKind::Dense));
    let own = |name: &str| [name.to_owned()].into();
    let entries = OwnedEntries {
        actions: own("cart"),
        tasks: own("cart"),
        context_features: own("words"),
        ..OwnedEntries::default()
    };
    schema.owned.insert("search".into(), entries);
    let module = SurfaceAlignment {
        hidden: vec![16, 8],
        features: Some(vec!["item_age".into(), "words".into()]),
        ids: vec!["device".into(), "topic".into()],
        tasks: vec!["cart".into()],
    };
    schema.alignment.insert("search".into(), module);
    schema
}

#[test]
fn an_alignment_module_learns_what_belongs_to_its_surface_and_serving_is_told_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = GatedWorld::new(dir.path());
    let before = FmManifest::read(&world.config.paths.fm).unwrap();
    let data = dir.path().join("data");
    SchemaGrowth::apply(&data, &aligned(&world.dataset.schema)).unwrap();
    world.dataset = Dataset::open(&data).unwrap();
    let (schema, upgrade) = (&world.dataset.schema, ColumnUpgrade::new(&world.dataset.schema));
    let words = schema.feature_columns().iter().position(|name| name == "words").unwrap();
    let mut stream = world.requests(0..300);
    for example in &mut stream {
        upgrade.example(example);
        for (at, target) in example.targets.iter_mut().enumerate() {
            let has_words = mix_parts(&[example.request, at as u64]).is_multiple_of(2);
            target.features[words] = f32::from(u8::from(has_words));
            target.outcome.known |= 0b1000;
            target.outcome.actions |= u64::from(has_words) << 3;
        }
    }
    let record = |example: Example| {
        let joined = JoinedExample { ingested_ms: 1, example, ranked: Vec::new() };
        let payload = postcard::to_stdvec(&JoinedRecord::Example(joined)).unwrap();
        Record { id: 0, payload }
    };
    let engine = streams(&stream.into_iter().map(record).collect::<Vec<_>>());
    let followed = world.follow(&engine, "2.0.0", &world.honest);
    // What serves is asked about the same requests, without what the module reads.
    assert_eq!(followed.decision(0), "published: ", "{:?}", followed.lines);
    assert!(followed.lines[0]["evaluation"][0]["serving_ne"].is_number(), "{:?}", followed.lines);
    assert_eq!((followed.report.requests, followed.report.published), (300, 2));

    let place = work_dir(&world.config, "2.0.0").join("saved/place.json");
    let place: Value = serde_json::from_slice(&std::fs::read(place).unwrap()).unwrap();
    let learned = |slice: &str| place["window"]["slices"][slice]["n"].as_u64().unwrap_or(0);
    assert!(learned("search/cart") > 300 && learned("feed/cart") == 0, "{place}");
    let into = dir.path().join("published-again");
    publish::bootstrap(engine, Topic::fm("2.0.0"), &into).unwrap().unwrap();
    let published = FmManifest::read(&into).unwrap();
    assert_eq!(published.spec, before.spec);
    assert!(published.statistics.labels.keys().eq(before.statistics.labels.keys()));
    assert_eq!(published.statistics.features.width(), before.statistics.features.width());
}
