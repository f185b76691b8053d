//! An expert in place of a plugin's: its weights say which rows of the logs it learned from, and so
//! do its saves. Its `evaluate` now and then holds what it learned.

use hypercast_core::{clock, hash::mix64};
use hypercast_data::schema::Schema;
use hypercast_expert::{
    Chunk, Normaliser, Provenance,
    train::{BatchReport, OptimizerConfig, RefusedRequest, SavedTrainer, TaskTargets},
    wasm::{
        ExpertFault,
        contract::{self, Evaluation, Task, TaskKind, Verdict},
    },
};
use hypercast_fm::example::Example;
use hypercast_stream::{
    publish::{DenseTensor, WeightSource},
    registry::{ExpertVersion, Registry, VersionState, WeightsLocation, schema_hash},
};
use hypercast_train::{
    Result,
    follow_expert::{ExpertRuntime, OnlineExpert},
    stream::{LogView, Survey},
};

use crate::{
    expert_trainer::{NAME, SURFACE, VERSION},
    installation::dataset,
    model::{MARK_WIDTH, NotedWeights, RecordKey, WEIGHTS, probability},
    plant::Plant,
    publications::NamedWeights,
    world::Simulation,
};

/// Of so many states of the weights one is held.
const HELD_STATES: u64 = 6;

/// The action that it predicts, as a bit.
const CLICK: u64 = 1;

/// Makes experts that note what they learn.
pub struct NotingExperts {
    /// A fault of the experts, which the oracles must find.
    pub plant: Option<Plant>,
}

/// What an expert has learned from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExpertNotes {
    /// Rows by their keys, in order; of the past, by [`past_key`].
    pub rows: Vec<u64>,
    /// How many of them are of the past.
    pub past: usize,
    /// The file of the logs behind the past.
    pub past_end: u32,
}

/// By what a row of the past is known: its outcomes are those that are known by then.
pub fn past_key(example: &Example) -> u64 {
    RecordKey::new(example.request, example.time_ms, false).number()
}

impl ExpertNotes {
    /// As the values of a trainer: of each key four, of 16 bits.
    fn save(&self, provenance: &Provenance) -> SavedTrainer {
        let parts = |key: &u64| [48, 32, 16, 0].map(|shift| (key >> shift & 0xffff) as f32);
        let rows = self.rows.iter().flat_map(parts).collect();
        let values: Vec<Vec<f32>> = vec![rows, vec![self.past as f32, self.past_end as f32]];
        let optimizer = (OptimizerConfig::default(), 0_u64, Vec::<u64>::new());
        let average = None::<(Vec<Vec<f32>>, u64)>;
        let saved = (values, provenance, average, optimizer, 0_u64);
        let bytes = postcard::to_allocvec(&saved).expect("plain data");
        postcard::from_bytes(&bytes).expect("a trainer of the same fields")
    }

    /// Read from the values of `save`.
    pub fn of(saved: &SavedTrainer) -> ExpertNotes {
        let bytes = postcard::to_allocvec(saved).expect("plain data");
        let read = postcard::take_from_bytes::<Vec<Vec<f32>>>(&bytes);
        let (values, _) = read.expect("values come first");
        let key = |parts: &[f32]| parts.iter().fold(0, |key, part| key << 16 | *part as u64);
        ExpertNotes {
            rows: values[0].chunks(4).map(key).collect(),
            past: values[1][0] as usize,
            past_end: values[1][1] as u32,
        }
    }
}

struct NotingExpert {
    tasks: Vec<Task>,
    provenance: Provenance,
    weights: NotedWeights,
    past: usize,
    past_end: u32,
}

impl NotingExpert {
    fn of(notes: &ExpertNotes, fm_version: String) -> NotingExpert {
        let provenance = Provenance {
            plugin: NAME.into(),
            plugin_version: VERSION.into(),
            contract: contract::VERSION.into(),
            graph: String::new(),
            fm_version,
            tae_dim: MARK_WIDTH,
            tasks: vec!["click".into()],
            trained_rows: notes.rows.len() as u64,
            trained_until_ms: 0,
            normaliser: Normaliser::default(),
            labels: Default::default(),
        };
        NotingExpert {
            tasks: vec![Task { name: "click".into(), kind: TaskKind::Binary }],
            provenance,
            weights: NotedWeights::of(&notes.rows),
            past: notes.past,
            past_end: notes.past_end,
        }
    }

    fn learn(&mut self, key: u64) {
        self.weights.learn(key);
        self.provenance.trained_rows = self.weights.records.len() as u64;
    }
}

impl WeightSource for NotingExpert {
    fn manifest(&self) -> String {
        serde_json::to_string(&self.provenance).expect("plain data")
    }

    fn dense(&self) -> Vec<DenseTensor<'_>> {
        vec![DenseTensor { name: "weights", shape: &[WEIGHTS], values: &self.weights.values }]
    }

    fn rows(&self) -> Option<&hypercast_store::Store> {
        None
    }
}

fn labels(examples: &[Example]) -> TaskTargets {
    let outcomes = examples.iter().flat_map(|example| &example.targets).map(|of| of.outcome);
    let (labels, mask): (Vec<f32>, Vec<bool>) =
        outcomes.map(|of| ((of.actions & CLICK) as f32, of.known & CLICK != 0)).unzip();
    TaskTargets { weights: vec![1.0; labels.len()], labels, mask }
}

impl OnlineExpert for NotingExpert {
    fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    fn weights(&self) -> &dyn WeightSource {
        let (name, NotedWeights { values, records, .. }) = (self.manifest(), self.weights.clone());
        // Whoever follows may see them before this process knows that they are stored.
        let world = Simulation::current();
        world.ledger.borrow_mut().expert.begin(NamedWeights { name, values }, records);
        self
    }

    fn learn_past(
        &mut self,
        view: &LogView<'_>,
        report: &mut dyn FnMut(&BatchReport<'_>),
    ) -> Result<()> {
        for logged in view.rows() {
            let examples = [logged?.example];
            let (targets, said) = ([labels(&examples)], self.predict(chunk(&examples))?);
            report(&BatchReport {
                examples: &[&examples[0]],
                predictions: said,
                serving: Vec::new(),
                targets: &targets,
                losses: Vec::new(),
                stepped: true,
            });
            self.learn(past_key(&examples[0]));
        }
        (self.past, self.past_end) = (self.weights.records.len(), view.log.end.file);
        Ok(())
    }

    fn predict(&self, chunk: Chunk<'_>) -> Result<Vec<Vec<f32>>> {
        Ok(vec![labels(chunk.examples).labels.into_iter().map(probability).collect()])
    }

    fn predict_as_published(&self, _: Chunk<'_>) -> Result<Vec<Vec<f32>>> {
        Ok(Vec::new())
    }

    fn targets(&self, chunk: Chunk<'_>) -> Result<Vec<TaskTargets>> {
        Ok(vec![labels(chunk.examples)])
    }

    fn train(&mut self, chunk: Chunk<'_>) -> Result<Vec<RefusedRequest>> {
        let mut refused = Vec::new();
        for (index, key) in keys(chunk.examples).enumerate() {
            if RecordKey::is_harmful(key) {
                refused.push(RefusedRequest { index, reason: "it would harm".into() });
            } else {
                self.learn(key);
            }
        }
        Ok(refused)
    }

    fn saved(&self) -> SavedTrainer {
        let (rows, past, past_end) = (self.weights.records.clone(), self.past, self.past_end);
        ExpertNotes { rows, past, past_end }.save(&self.provenance)
    }

    fn set_published(&mut self, _: &SavedTrainer) -> Result<()> {
        Ok(())
    }

    fn go_back(&mut self, _: &SavedTrainer) -> Result<()> {
        unreachable!("its `evaluate` never asks for it")
    }

    fn evaluate(&self, _: &Evaluation) -> std::result::Result<Verdict, ExpertFault> {
        let state = mix64(self.weights.records.last().copied().unwrap_or(0));
        match state.is_multiple_of(HELD_STATES) {
            true => Ok(Verdict::Hold("it is one of those that are held".into())),
            false => Ok(Verdict::Publish),
        }
    }

    fn mean_loss(&self) -> f64 {
        1.0
    }

    fn set_mean_loss(&mut self, _: f64) {}

    fn schedule_faults(&self) -> u64 {
        0
    }
}

fn chunk(examples: &[Example]) -> Chunk<'_> {
    Chunk { examples, ..Chunk::default() }
}

/// The keys of rows behind the past. A chunk has corrections behind the rows, which it does not
/// tell; a key has all that they say.
fn keys(examples: &[Example]) -> impl Iterator<Item = u64> {
    examples.iter().map(|example| RecordKey::of(example, false))
}

impl ExpertRuntime for NotingExperts {
    fn begin(&self, _: &LogView<'_>, survey: Survey) -> Result<Box<dyn OnlineExpert>> {
        Ok(Box::new(NotingExpert::of(&ExpertNotes::default(), survey.fm_version)))
    }

    fn resume(&self, _: &Schema, saved: SavedTrainer) -> Result<Box<dyn OnlineExpert>> {
        let mut notes = ExpertNotes::of(&saved);
        Simulation::current().ledger.borrow_mut().expert.resumed = Some(notes.clone());
        if self.plant == Some(Plant::ExpertForgets) {
            notes.rows.pop();
        }
        Ok(Box::new(NotingExpert::of(&notes, saved.provenance().fm_version.clone())))
    }

    fn describe(
        &self,
        _: &Registry,
        version: &str,
        provenance: &Provenance,
    ) -> hypercast_stream::Result<ExpertVersion> {
        Ok(ExpertVersion {
            name: NAME.into(),
            version: version.into(),
            state: VersionState::Training,
            parent: None,
            plugin: "/plugin.wasm".into(),
            plugin_hash: String::new(),
            sha256: None,
            plugin_version: VERSION.into(),
            accepts_fm: "*".into(),
            fm: provenance.fm_version.clone(),
            schema: schema_hash(&dataset().schema),
            earlier_schemas: Vec::new(),
            columns: None,
            tae_dim: provenance.tae_dim,
            flops: None,
            without_tae: false,
            surfaces: vec![SURFACE.into()],
            created_ms: clock::now_ms(),
            trained_ms: 0,
            weights: WeightsLocation::Published,
        })
    }
}
