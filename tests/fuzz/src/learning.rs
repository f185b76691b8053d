//! The path that learns, in one process: bodies of `POST /v1/events` are joined, the FM learns from
//! what was joined, its weights are published, and a serving model takes them and predicts.
//!
//! The fuzzer's users send whatever the API takes, beside honest users of whom it changes nothing.
//! What must stay: each honest example is joined once with its outcome and learned from, all
//! predictions are finite, what serves predicts as what was trained, and the NE of what is served
//! to honest users is within [`MOST_HARM`] of that without the fuzzer's users.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use hypercast_config::{JoinSettings, PublishSettings};
use hypercast_data::dataset::Dataset;
use hypercast_data::features::{FeatureConfig, FeatureState};
use hypercast_fm::device::DeviceKind;
use hypercast_fm::example::{Example, Target};
use hypercast_fm::inference::{self, FmServingOptions, FoundationModel};
use hypercast_fm::metrics::LogLossSums;
use hypercast_fm::spec::{FmConfig, FmSpec};
use hypercast_fm::trainer::{self, FmTrainer, ResumePaths};
use hypercast_serve::api::EventsRequest;
use hypercast_serve::convert::Converter;
use hypercast_stream::events::EventRecord;
use hypercast_stream::join::{JoinedRecord, Joiner, JoinerOptions, JoinerOutput};
use hypercast_stream::publish::{PublicationFollower, Publisher, TrainingPosition, fm_update};
use hypercast_stream::streams::{MemoryEngine, StreamEngine, Topic};
use hypercast_train::fm::fm_spec;
use serde_json::{Value, json};

use crate::honest::{self, FIRST_ID, HonestRequest, TARGETS};
use crate::{bodies, model};

/// How much higher NE may be, relative to that without the fuzzer's users. They moved it by less
/// than 0.002 in hundreds of inputs, and by up to 0.008 where numbers had no range and the trainer
/// set no example aside.
const MOST_HARM: f64 = 0.005;

/// Honest requests in a round.
const ROUND: u64 = 16;

/// Rounds before the fuzzer's users come.
const PAST: u64 = 24;

/// Rounds in which the fuzzer's users take part: so many that it shows if the model stops learning.
const ROUNDS: u64 = 16;

/// Requests that are served and judged at the end.
const JUDGED: u64 = 200;

/// The most bodies of the fuzzer's users.
const MOST_BODIES: usize = 16;

const VERSION: &str = "1.0.0";

/// Between two rounds: the windows of the join close before the next.
const ROUND_MS: i64 = 1_000_000;

/// How long honest users take to act: a window of the join is longer, but would close before if
/// the latest time that a daemon accepts were believed.
const DELAY_MS: i64 = 400_000;

/// The fuzzer's times are mostly before it.
const START_MS: i64 = 200_000_000;

/// How far the prediction that serves may be from the trainer's own.
const ROUNDING: f32 = 1e-3;

/// Lets the fuzzer's users take part in a few rounds.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let mut hostile: HashMap<u64, Vec<Value>> = HashMap::new();
    for _ in 0..u.int_in_range(1..=MOST_BODIES)? {
        let round = u.int_in_range(0..=ROUNDS - 1)?;
        // If the bytes end early, go on with the bodies so far.
        let Ok(body) = bodies::events(u) else { break };
        hostile.entry(round).or_default().push(body);
    }
    let (setting, without) = (setting(), without());
    let with = setting.ne(&hostile);
    let harm = with / without - 1.0;
    assert!(harm < MOST_HARM, "NE of honest users is {with}, {harm} above {without}: {hostile:?}");
    Ok(())
}

/// NE without the fuzzer's users.
fn without() -> f64 {
    static WITHOUT: OnceLock<f64> = OnceLock::new();
    *WITHOUT.get_or_init(|| {
        let ne = setting().ne(&HashMap::new());
        // Else there would be nothing to harm.
        assert!(ne < 0.97, "an NE of {ne} is that of a model that learned nothing");
        ne
    })
}

/// What all runs begin with.
struct Setting {
    served: Box<dyn FoundationModel>,
    /// What the joiner and the daemon know after the past.
    state: Vec<u8>,
    dir: PathBuf,
}

fn setting() -> &'static Setting {
    static SETTING: OnceLock<Setting> = OnceLock::new();
    SETTING.get_or_init(Setting::new)
}

impl Setting {
    /// Trains on the past.
    fn new() -> Setting {
        // The folder stays until the process ends, because the serving model maps its files.
        let dir = model::folder().keep();
        let trainer = trainer::create(&dir.join("past"), &config(), &spec(), DeviceKind::Cpu);
        let states = [(); 2].map(|()| FeatureState::new(&dataset(), FeatureConfig::default()));
        let mut path = LearningPath::new(trainer.expect("a configuration that fits"), states);
        path.take(&honest::entities());
        (0..PAST).for_each(|round| path.round(round, &[]));
        path.trainer.save(&dir.join("saved")).expect("a saved trainer");
        path.trainer.checkpoint(&dir.join("checkpoint"), VERSION).expect("a checkpoint");
        let options = FmServingOptions::default();
        let served = inference::load_updatable(&dir.join("checkpoint"), &dir.join("live"), options);
        let state = postcard::to_stdvec(&path.state.saved()).expect("a state is plain values");
        Setting { served: served.expect("a model"), state, dir }
    }

    fn state(&self) -> FeatureState {
        let mut state = FeatureState::new(&dataset(), FeatureConfig::default());
        let saved = postcard::from_bytes(&self.state).expect("it was saved");
        state.restore(saved).expect("it was saved");
        state
    }

    /// NE of what is served to honest users after some rounds, with the fuzzer's bodies in each.
    fn ne(&self, hostile: &HashMap<u64, Vec<Value>>) -> f64 {
        let (saved, work) = (self.dir.join("saved"), self.dir.join("work"));
        let from = ResumePaths { saved: &saved, work: &work, growths: &[] };
        let trainer = trainer::resume(from, &config(), &spec(), DeviceKind::Cpu);
        let mut path =
            LearningPath::new(trainer.expect("a saved trainer"), [self.state(), self.state()]);
        let engine: Arc<dyn StreamEngine> = Arc::new(MemoryEngine::default());
        let settings = PublishSettings { share: 1.0, ..PublishSettings::default() };
        let work = self.dir.join("published");
        let publisher = Publisher::open(engine.clone(), Topic::fm(VERSION), settings, &work);
        let mut publisher = publisher.expect("a publisher");
        for round in 0..ROUNDS {
            path.round(PAST + round, hostile.get(&round).map_or(&[], Vec::as_slice));
            // A snapshot, and what moved since.
            if round + 1 == ROUNDS / 2 || round + 1 == ROUNDS {
                let trained = path.trainer.trained_weights(VERSION).expect("weights");
                let position = TrainingPosition::default();
                publisher.publish(&trained, position).expect("a publication");
            }
        }
        assert_eq!(path.learned, ROUNDS * ROUND, "honest requests that were learned from");
        self.follow(engine);
        self.judge(&path)
    }

    /// Puts what was published in service.
    fn follow(&self, engine: Arc<dyn StreamEngine>) {
        let mut follower =
            PublicationFollower::open(engine, Topic::fm(VERSION)).expect("a stream of weights");
        let mut taken = 0;
        while let Some(publication) = follower.next(Duration::ZERO).expect("a stream in memory") {
            let update = fm_update(publication).expect("weights of an FM");
            self.served.update(update).expect("weights that fit the model");
            taken += 1;
        }
        assert_eq!(taken, 2, "publications that were taken");
    }

    /// Serves honest users, compares with what the trainer predicts, and gives NE of the clicks.
    fn judge(&self, path: &LearningPath) -> f64 {
        let first = (PAST + ROUNDS) * ROUND;
        let requests: Vec<HonestRequest> = (first..first + JUDGED).map(HonestRequest).collect();
        let examples: Vec<Example> =
            requests.iter().map(|request| path.example(*request)).collect();
        let examples: Vec<&Example> = examples.iter().collect();
        let served = self.served.infer(&examples).expect("examples that fit the model");
        let trained = path.trainer.predict(&examples).expect("examples that fit the model");
        for (at, (served, trained)) in served.main.iter().zip(&trained.predictions).enumerate() {
            let apart = (served - trained).abs();
            assert!(
                apart <= ROUNDING * trained.abs().max(1.0),
                "{served} is served and {trained} was trained, at {at}"
            );
        }
        let mut sums = LogLossSums::default();
        let rows =
            requests.iter().flat_map(|request| request.items().map(|item| request.clicks(item)));
        let clicks = served.main.iter().step_by(spec().main_tasks().len());
        for (probability, label) in clicks.zip(rows) {
            sums.push(*probability, label);
        }
        assert_eq!(sums.count, JUDGED * TARGETS, "rows that were served");
        sums.normalized_entropy().expect("both labels are there")
    }
}

/// From events to a trained FM.
struct LearningPath {
    converter: Converter,
    joiner: Joiner,
    /// What the daemon knows, from the outcomes.
    state: FeatureState,
    trainer: Box<dyn FmTrainer>,
    /// Not learned from yet.
    joined: Vec<JoinedRecord>,
    /// Honest requests that were learned from.
    learned: u64,
    now_ms: i64,
}

impl LearningPath {
    fn new(trainer: Box<dyn FmTrainer>, states: [FeatureState; 2]) -> LearningPath {
        let [state, joining] = states;
        let options =
            JoinerOptions { settings: JoinSettings::default(), history_len: 8, max_targets: 8 };
        LearningPath {
            converter: Converter::new(Arc::new(honest::schema())),
            joiner: Joiner::new(joining, options),
            state,
            trainer,
            joined: Vec::new(),
            learned: 0,
            now_ms: START_MS,
        }
    }

    /// Honest users see items, the fuzzer's send what they like, honest users act, and the FM
    /// learns from what was joined.
    fn round(&mut self, round: u64, hostile: &[Value]) {
        self.now_ms = START_MS + round as i64 * ROUND_MS;
        let requests: Vec<HonestRequest> =
            (round * ROUND..(round + 1) * ROUND).map(HonestRequest).collect();
        let shown = requests.iter().flat_map(|request| request.impressions(self.now_ms));
        self.take(&honest::body(json!({ "impressions": shown.collect::<Vec<_>>() })));
        self.now_ms += DELAY_MS;
        for body in hostile {
            self.take_accepted(body);
        }
        let done = requests.iter().flat_map(|request| request.actions(self.now_ms));
        self.take(&honest::body(json!({ "actions": done.collect::<Vec<_>>() })));
        self.learn();
    }

    /// Takes the events of a body that a daemon accepts, each as a body of its own.
    fn take_accepted(&mut self, body: &Value) {
        let lists = body.as_object().into_iter().flatten();
        let events = lists.filter_map(|(list, events)| Some((list, events.as_array()?)));
        for (list, event) in events.flat_map(|(list, events)| events.iter().map(move |e| (list, e)))
        {
            let mut event = event.clone();
            // It was shown what honest users are shown.
            if let Some(item) = event["item"].as_u64().filter(|item| *item < honest::ITEMS) {
                event["item"] = (FIRST_ID + item).into();
            }
            for name in ["time_ms", "outcome_ms"] {
                if event[name].as_i64().is_some_and(|time_ms| time_ms > self.latest_ms()) {
                    event[name] = self.latest_ms().into();
                }
            }
            let Ok(body) = serde_json::from_value(json!({ list: [event] })) else { continue };
            if self.converter.new_events(&body, self.latest_ms()).is_ok() {
                self.take(&body);
            }
        }
    }

    /// The latest time that a daemon accepts.
    fn latest_ms(&self) -> i64 {
        self.now_ms + 1000 * JoinSettings::default().max_future_s as i64
    }

    /// Takes a body's events from the API to what was joined.
    fn take(&mut self, body: &EventsRequest) {
        let events = self.converter.new_events(body, self.latest_ms()).expect("events to accept");
        for event in events {
            let record = event.record(self.now_ms).expect("an accepted event can be written");
            let record = EventRecord::decode(&record.payload).expect("a written record");
            let mut made = JoinerOutput::default();
            self.joiner.take(record, &mut made);
            for joined in made.joined {
                let record = postcard::to_stdvec(&joined).expect("an example is plain values");
                self.joined.push(JoinedRecord::decode(&record).expect("a written record"));
            }
            for outcome in made.outcomes {
                bodies::apply(&mut self.state, outcome.update);
            }
        }
    }

    fn learn(&mut self) {
        let joined = std::mem::take(&mut self.joined);
        let (mut examples, mut corrections) = (Vec::new(), Vec::new());
        for record in &joined {
            match record {
                JoinedRecord::Example(joined) => examples.push(&joined.example),
                JoinedRecord::Correction(joined) => corrections.push(&joined.example),
                JoinedRecord::Content(_) => {}
            }
        }
        let output = self.trainer.step_with_corrections(&examples, &corrections).expect("a step");
        for (at, example) in examples.iter().enumerate() {
            let Some(honest) = HonestRequest::of(example.request) else { continue };
            assert!(!output.set_aside.contains(&at), "honest request {} is set aside", honest.0);
            assert_eq!(example.targets.len() as u64, TARGETS, "targets of {}", honest.0);
            for Target { item, outcome, .. } in &example.targets {
                let label = (outcome.known & 1, outcome.actions & 1);
                assert_eq!(label, (1, u64::from(honest.clicks(item.id))), "of {}", honest.0);
            }
            self.learned += 1;
        }
        let known = output.predictions.iter().zip(&output.mask).filter(|(_, known)| **known);
        assert!(known.map(|(value, _)| value).all(|value| value.is_finite()));
    }

    /// An honest request as the daemon serves it.
    fn example(&self, request: HonestRequest) -> Example {
        let body = request.ranking(self.now_ms + ROUND_MS);
        let known = |id| self.state.item(id).cloned();
        let input = self.converter.request(&body, request.id(), self.now_ms + ROUND_MS, known);
        self.state.fetch(&input.expect("an honest request"), 8)
    }
}

fn config() -> FmConfig {
    FmConfig {
        dim: 8,
        heads: 2,
        layers: 1,
        qk_dim: 4,
        v_dim: 4,
        embedding_dim: 4,
        max_history: 8,
        learning_rate: 5e-3,
        warmup_steps: 1,
        // The weights themselves serve: an average would hide what one step does to them.
        average_decay: 0.0,
        ..FmConfig::default()
    }
}

fn spec() -> FmSpec {
    fm_spec(&honest::schema()).expect("a schema that fits")
}

fn dataset() -> Dataset {
    bodies::dataset(honest::schema())
}
