//! A model in place of the FM, so small that a run can train and load hundreds. Its weights say
//! what they were learned from: so do its saves, and its embeddings name the weights.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use hypercast_core::{
    atomic_dir, atomic_file, disk,
    error::CommonErrors as _,
    hash::{mix_parts, mix64},
};
use hypercast_fm::{
    Result,
    batch::ColumnStatistics,
    checkpoint::{FORMAT, FmManifest},
    cost::ModelSize,
    device::DeviceKind,
    example::{Example, Outcome},
    history::CacheCounts,
    inference::{FmOutput, FmServingOptions, FoundationModel},
    runtime::FmRuntime,
    spec::{FmConfig, FmSpec, TaskLabel, TaskSpec},
    trainer::{FmTrainer, ResumePaths, StepOutput},
    update::{TensorSlice, TrainedWeights, WeightTensor, WeightUpdate},
};
use hypercast_stream::publish::WeightSource as _;

use crate::{plant::Plant, publications::NamedWeights, world::Simulation};

/// The number of weights: several blocks of a delta.
pub const WEIGHTS: usize = 2000;

/// The first weights, which name all of them; an embedding is a copy.
pub const MARK_WIDTH: usize = 4;

/// One record in so many would harm the model.
const HARMFUL_RECORDS: u64 = 50;

/// The file of a save.
const LEARNED_FILE: &str = "learned";

/// Makes trainers that note what they learn, and models of their weights.
#[derive(Debug, Clone, Copy)]
pub struct NotingRuntime {
    /// A fault of the models, which the oracles must find.
    pub plant: Option<Plant>,
}

/// What is the same of a request in `joined` and in the logs, in one number.
#[derive(Debug, Clone, Copy)]
pub struct RecordKey(u64);

impl RecordKey {
    /// Of a request, before its targets are added.
    pub fn new(request: u64, time_ms: i64, is_correction: bool) -> RecordKey {
        RecordKey(mix_parts(&[request, time_ms as u64, u64::from(is_correction)]))
    }

    /// Adds the outcome of a target.
    pub fn add(&mut self, item: u64, actions: u64, known: u64) {
        self.0 = mix_parts(&[self.0, item, actions, known]);
    }

    /// What was made of all that was added.
    pub fn number(self) -> u64 {
        self.0
    }

    /// Of an example or a correction.
    pub fn of(example: &Example, is_correction: bool) -> u64 {
        let mut key = RecordKey::new(example.request, example.time_ms, is_correction);
        for target in &example.targets {
            key.add(target.item.id, target.outcome.actions, target.outcome.known);
        }
        key.0
    }

    /// Whether the model cannot learn from a record.
    pub fn is_harmful(key: u64) -> bool {
        mix64(key).is_multiple_of(HARMFUL_RECORDS)
    }
}

/// The number that names weights, from their first ones; `None` if these are no name.
pub fn mark_of(values: &[f32]) -> Option<u64> {
    let part = |value: &f32| (0.0..65_536.0).contains(value).then_some(*value as u64);
    let parts = values.get(..MARK_WIDTH)?.iter().map(part).collect::<Option<Vec<u64>>>()?;
    Some(parts.iter().fold(0, |mark, part| mark << 16 | part))
}

/// Weights, with what they were learned from.
#[derive(Clone)]
pub(crate) struct NotedWeights {
    /// By their keys, in the order in which they were learned from.
    pub(crate) records: Vec<u64>,
    mark: u64,
    pub(crate) values: Vec<f32>,
}

impl NotedWeights {
    pub(crate) fn of(records: &[u64]) -> NotedWeights {
        let mut weights = NotedWeights { records: Vec::new(), mark: 0, values: vec![0.0; WEIGHTS] };
        records.iter().for_each(|&key| weights.learn(key));
        weights
    }

    pub(crate) fn learn(&mut self, key: u64) {
        self.records.push(key);
        self.mark = mix_parts(&[self.mark, key]);
        for (at, value) in self.values[..MARK_WIDTH].iter_mut().enumerate() {
            *value = (self.mark >> (16 * (MARK_WIDTH - 1 - at)) & 0xffff) as f32;
        }
        let at = MARK_WIDTH + key as usize % (WEIGHTS - MARK_WIDTH);
        self.values[at] = (key >> 40) as f32;
    }
}

/// What weights say of examples: their mark, and the labels, more or less.
struct Said<'a> {
    spec: &'a FmSpec,
    mark: &'a [f32],
}

impl Said<'_> {
    fn step(&self, examples: &[&Example]) -> StepOutput {
        let mut said = StepOutput::default();
        for example in examples {
            let is_harmful = RecordKey::is_harmful(RecordKey::of(example, false));
            for target in &example.targets {
                said.tae.extend(self.mark);
                for task in &self.spec.tasks {
                    let label = label(task, example.surface, target.outcome);
                    let measured = label.filter(|_| !is_harmful);
                    said.mask.push(measured.is_some());
                    said.labels.push(measured.unwrap_or(f32::NAN));
                    said.predictions.push(measured.map_or(f32::NAN, probability));
                }
            }
        }
        said
    }

    fn infer(&self, examples: &[&Example]) -> FmOutput {
        let mut output = FmOutput::default();
        for example in examples {
            for target in &example.targets {
                output.tae.extend(self.mark);
                for task in self.spec.main_tasks() {
                    let label = label(task, example.surface, target.outcome);
                    output.main.push(probability(label.unwrap_or(0.0)));
                }
            }
        }
        output
    }
}

/// The label of a target, if the task has it.
fn label(task: &TaskSpec, surface: u16, outcome: Outcome) -> Option<f32> {
    let TaskLabel::Action(action) = task.label else { return None };
    let is_known = task.surfaces[usize::from(surface)] && outcome.known >> action & 1 == 1;
    is_known.then_some((outcome.actions >> action & 1) as f32)
}

/// So sure of what it says that no gate holds it.
pub(crate) fn probability(label: f32) -> f32 {
    0.01 + 0.98 * label
}

/// Learns from records by noting them.
struct NotingTrainer {
    config: FmConfig,
    spec: FmSpec,
    weights: NotedWeights,
    trained_until_ms: i64,
}

impl NotingTrainer {
    fn manifest(&self, version: &str) -> FmManifest {
        FmManifest {
            format: FORMAT,
            version: version.to_owned(),
            config: self.config.clone(),
            spec: self.spec.clone(),
            statistics: ColumnStatistics::new(&self.spec),
            requests: self.weights.records.len() as u64,
            trained_until_ms: self.trained_until_ms,
            field_numbers: Vec::new(),
        }
    }
}

impl FmTrainer for NotingTrainer {
    fn step_with_corrections(
        &mut self,
        examples: &[&Example],
        corrections: &[&Example],
    ) -> Result<StepOutput> {
        let mut said = self.predict(examples)?;
        let records = examples.iter().map(|example| RecordKey::of(example, false));
        let records = records.chain(corrections.iter().map(|late| RecordKey::of(late, true)));
        for (at, key) in records.enumerate() {
            if RecordKey::is_harmful(key) {
                said.set_aside.push(at);
            } else {
                self.weights.learn(key);
            }
        }
        let times = examples.iter().map(|example| example.time_ms);
        self.trained_until_ms = times.fold(self.trained_until_ms, i64::max);
        Ok(said)
    }

    fn set_repeats(&mut self, _: bool) {}

    fn trained_weights(&mut self, version: &str) -> Result<TrainedWeights<'_>> {
        let values = self.weights.values.clone();
        let tensor = WeightTensor { name: "weights".into(), shape: vec![WEIGHTS], values };
        let trained =
            TrainedWeights { manifest: self.manifest(version), dense: vec![tensor], rows: None };
        let (world, NotedWeights { mark, records, values }) =
            (Simulation::current(), self.weights.clone());
        // Whoever follows may see them before this process knows that they are stored.
        let mut ledger = world.ledger.borrow_mut();
        ledger.published.push(NamedWeights { name: trained.manifest(), values });
        ledger.learned.insert(mark, records);
        Ok(trained)
    }

    fn predict(&self, examples: &[&Example]) -> Result<StepOutput> {
        let mark = &self.weights.values[..MARK_WIDTH];
        Ok(Said { spec: &self.spec, mark }.step(examples))
    }

    fn user_states(&self, examples: &[&Example]) -> Result<Vec<f32>> {
        Ok(vec![0.0; examples.len() * self.config.user_state_width()])
    }

    fn size(&self) -> ModelSize {
        ModelSize { serving: WEIGHTS, dense: WEIGHTS, sparse: 0 }
    }

    fn checkpoint(&mut self, dir: &Path, _: &str) -> Result<()> {
        self.save(dir)
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        atomic_dir::create(dir)?;
        let path = dir.join(LEARNED_FILE);
        let bytes: Vec<u8> =
            self.weights.records.iter().flat_map(|key| key.to_le_bytes()).collect();
        Ok(atomic_file::write(&path, &bytes).map_err(hypercast_core::Error::io(&path))?)
    }
}

/// The records of a save, in the order in which they were learned from.
///
/// # Errors
/// There is none.
pub fn saved_records(dir: &Path) -> std::result::Result<Vec<u64>, hypercast_core::Error> {
    let path = dir.join(LEARNED_FILE);
    let bytes = disk::read(&path).map_err(hypercast_core::Error::io(&path))?;
    let (keys, _) = bytes.as_chunks();
    Ok(keys.iter().map(|&key| u64::from_le_bytes(key)).collect())
}

/// Weights that are in service, and may be updated.
struct NotedModel {
    manifest: FmManifest,
    serving: Mutex<ServingWeights>,
    plant: Option<Plant>,
}

#[derive(Clone)]
struct ServingWeights {
    manifest: Arc<FmManifest>,
    values: Vec<f32>,
}

impl NotedModel {
    fn serving(&self) -> ServingWeights {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl FoundationModel for NotedModel {
    fn manifest(&self) -> &FmManifest {
        &self.manifest
    }

    fn current_manifest(&self) -> Arc<FmManifest> {
        self.serving().manifest
    }

    fn update(&self, update: WeightUpdate) -> Result<()> {
        update.check()?;
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        for TensorSlice { start, values, .. } in &update.dense {
            serving.values[*start..start + values.len()].copy_from_slice(values);
        }
        serving.manifest = Arc::new(update.manifest);
        if self.plant == Some(Plant::NewestWeights) {
            let world = Simulation::current();
            let ledger = world.ledger.borrow();
            serving.values = ledger.published.last().map_or_else(Vec::new, |of| of.values.clone());
        }
        Ok(())
    }

    fn infer(&self, examples: &[&Example]) -> Result<FmOutput> {
        let serving = self.serving();
        let said = Said { spec: &serving.manifest.spec, mark: &serving.values[..MARK_WIDTH] };
        Ok(said.infer(examples))
    }

    fn infer_uncached(&self, examples: &[&Example]) -> Result<FmOutput> {
        self.infer(examples)
    }

    fn cache_counts(&self) -> CacheCounts {
        CacheCounts::default()
    }

    fn check_files(&self) -> Result<()> {
        Ok(())
    }
}

impl FmRuntime for NotingRuntime {
    fn create(
        &self,
        _: &Path,
        config: &FmConfig,
        spec: &FmSpec,
        _: DeviceKind,
    ) -> Result<Box<dyn FmTrainer>> {
        let (config, spec, weights) = (config.clone(), spec.clone(), NotedWeights::of(&[]));
        Ok(Box::new(NotingTrainer { config, spec, weights, trained_until_ms: 0 }))
    }

    fn resume(
        &self,
        from: ResumePaths<'_>,
        config: &FmConfig,
        spec: &FmSpec,
        _: DeviceKind,
    ) -> Result<Box<dyn FmTrainer>> {
        let mut records = saved_records(from.saved)?;
        if self.plant == Some(Plant::LastForgotten) {
            records.pop();
        }
        let (config, spec, weights) = (config.clone(), spec.clone(), NotedWeights::of(&records));
        Ok(Box::new(NotingTrainer { config, spec, weights, trained_until_ms: 0 }))
    }

    fn load_published(
        &self,
        weights: WeightUpdate,
        _: &Path,
        _: FmServingOptions,
    ) -> Result<Box<dyn FoundationModel>> {
        if !weights.complete {
            return Err(hypercast_fm::Error::Update("it has only a part of the weights".into()));
        }
        let manifest = weights.manifest.clone();
        let serving =
            ServingWeights { manifest: Arc::new(manifest.clone()), values: vec![0.0; WEIGHTS] };
        let model = NotedModel { manifest, serving: Mutex::new(serving), plant: self.plant };
        model.update(weights)?;
        Ok(Box::new(model))
    }
}
