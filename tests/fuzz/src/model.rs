//! A small foundation model of the fuzzed schema: its serving form, weights and publications.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use hypercast_config::PublishSettings;
use hypercast_fm::device::DeviceKind;
use hypercast_fm::example::Example;
use hypercast_fm::inference::{self, FmServingOptions, FoundationModel};
use hypercast_fm::spec::FmConfig;
use hypercast_fm::trainer::{self, FmTrainer};
use hypercast_fm::update::{TensorSlice, WeightTensor, WeightUpdate};
use hypercast_stream::publish::{Publisher, TrainingPosition};
use hypercast_stream::streams::{MemoryEngine, StreamEngine, Topic};
use hypercast_train::fm::fm_spec;

use crate::world;

/// The model and what was derived from it.
pub struct FuzzModel {
    /// The serving model, with the weights of `whole`.
    pub served: Box<dyn FoundationModel>,
    /// All weights after further training.
    pub whole: WeightUpdate,
    /// The published records: a snapshot and two deltas.
    pub records: Vec<Vec<u8>>,
    /// A folder for temporary files of this process.
    pub dir: PathBuf,
}

/// A temporary folder, in memory if the system supports that.
pub fn folder() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a temporary folder")
}

/// The model of this process.
pub fn model() -> &'static FuzzModel {
    static MODEL: OnceLock<FuzzModel> = OnceLock::new();
    MODEL.get_or_init(make)
}

fn make() -> FuzzModel {
    // Keep the folder until the process ends, because the serving model maps its files.
    let dir = folder().keep();
    let config = FmConfig {
        dim: 8,
        heads: 2,
        qk_dim: 4,
        v_dim: 4,
        embedding_dim: 4,
        max_history: 8,
        warmup_steps: 1,
        ..FmConfig::default()
    };
    let spec = fm_spec(&world::schema()).expect("a schema that fits");
    let mut trainer = trainer::create(&dir.join("work"), &config, &spec, DeviceKind::Cpu)
        .expect("a configuration that fits");
    let learn = |trainer: &mut dyn FmTrainer, from: u64| {
        let examples: Vec<Example> = (from..from + 4).map(|at| world::example(at, 3, 2)).collect();
        trainer.step(&examples.iter().collect::<Vec<_>>()).expect("a step");
    };
    learn(&mut *trainer, 1);
    let engine: Arc<dyn StreamEngine> = Arc::new(MemoryEngine::default());
    let topic = Topic::fm("1.0.0");
    let (settings, work) = (PublishSettings::default(), dir.join("published"));
    let mut publisher =
        Publisher::open(engine.clone(), topic.clone(), settings, &work).expect("a publisher");
    for round in 0..3 {
        let trained = trainer.trained_weights("1.0.0").expect("weights");
        publisher.publish(&trained, TrainingPosition::default()).expect("a publication");
        learn(&mut *trainer, 10 * round);
    }
    let mut reader = engine.reader(&topic, 0).expect("a reader");
    let records = reader.next(1000, std::time::Duration::ZERO).expect("the records");
    let whole = whole(&mut *trainer);
    whole.checkpoint(&dir.join("checkpoint")).expect("a checkpoint");
    let live = dir.join("live");
    let served =
        inference::load_updatable(&dir.join("checkpoint"), &live, FmServingOptions::default());
    FuzzModel {
        served: served.expect("a model"),
        whole,
        records: records.into_iter().map(|record| record.payload).collect(),
        dir,
    }
}

fn whole(trainer: &mut dyn FmTrainer) -> WeightUpdate {
    let trained = trainer.trained_weights("1.0.0").expect("weights");
    let store = trained.rows.expect("an FM has rows");
    let ids: Vec<u64> = store.ids().collect();
    let mut rows = vec![0.0; ids.len() * store.dim()];
    store.gather(&ids, &mut rows).unwrap();
    let piece =
        |WeightTensor { name, shape, values }| TensorSlice { name, shape, start: 0, values };
    let pieces = trained.dense.into_iter().map(piece).collect();
    WeightUpdate {
        complete: true,
        manifest: trained.manifest,
        dense: pieces,
        row_ids: ids,
        rows,
        removed_row_ids: vec![],
    }
}
