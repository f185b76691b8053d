//! What a growth costs those tasks that were there, and how soon the new one is learned: the second
//! half of a world is learned once under the schema of before and once under one that has grown.

use std::{collections::BTreeMap, path::Path};

use hypercast_config::Config;
use hypercast_core::hash::mix_parts;
use hypercast_data::{
    dataset::{Dataset, timeline::Span},
    features::replay::{Replay, ReplayOptions},
    schema::{Schema, growth::SchemaGrowth, spec_growths},
};
use hypercast_fm::{
    example::Example,
    metrics::LogLossSums,
    spec::TaskLabel,
    trainer::{self, FmTrainer, ResumePaths},
};
use hypercast_tests::world;
use hypercast_train::fm::dataset_spec;

use crate::grown;

/// Rows over which the new task is to be better than its base rate, from the first on.
const FIRST_ROWS: u64 = 10_000;

/// Requests in a step: what a trainer takes together of a stream of some 30 requests a second, and
/// of one that it has to catch up with.
const BATCHES: [usize; 2] = [16, 64];

/// How far the NE of a task of before may be apart.
const APART: f64 = 5e-4;

#[test]
#[ignore = "it takes half a minute; `cargo xtask full` runs it"]
fn tasks_of_before_keep_their_ne_and_the_new_one_is_learned() {
    BATCHES.into_iter().for_each(a_task_is_added);
}

fn a_task_is_added(batch: usize) {
    let dir = tempfile::tempdir().unwrap();
    let config = world(dir.path(), 6000, 2);
    let (dir, data) = (dir.path(), dir.path().join("data"));
    let first = Learner { config: &config, dir, batch, data: Dataset::open(&data).unwrap() };
    let examples = first.examples();
    let (past, later) = examples.split_at(examples.len() / 2);
    let spec = dataset_spec(&first.data).unwrap();
    let mut trainer =
        trainer::create(&dir.join("first"), &config.fm, &spec, config.device).unwrap();
    first.learn(&mut *trainer, past, u64::MAX);
    let saved = dir.join("saved");
    trainer.save(&saved).unwrap();
    let expected = first.learn(&mut *trainer, later, u64::MAX);

    SchemaGrowth::apply(&data, &grown(&Schema::load(&data.join("schema.toml")).unwrap())).unwrap();
    let second = Learner { data: Dataset::open(&data).unwrap(), ..first };
    let mut examples = second.examples();
    let mut later = examples.split_off(past.len());
    later.iter_mut().for_each(give);
    let mut found = second.learn(&mut *second.resumed(&saved), &later, u64::MAX);
    let first_rows = second.learn(&mut *second.resumed(&saved), &later, FIRST_ROWS)["gift"];

    let all_rows = found.remove("gift").unwrap();
    let step = format!("{batch} requests a step");
    println!("figure: {step}: NE of the new task, first {FIRST_ROWS} rows: {first_rows:.4}");
    println!("figure: {step}: NE of the new task, all rows: {all_rows:.4}");
    for (task, expected) in &expected {
        let found = found[task];
        println!("figure: {step}: NE of {task}: {found:.4} grown, {expected:.4} not grown");
    }
    for (task, expected) in &expected {
        assert!((found[task] - expected).abs() < APART, "{task}: {} and {expected}", found[task]);
    }
    assert!(first_rows < 1.0, "{first_rows}");
}

/// Learns from a data set under one schema.
struct Learner<'a> {
    config: &'a Config,
    dir: &'a Path,
    /// Requests in a step.
    batch: usize,
    data: Dataset,
}

impl Learner<'_> {
    fn examples(&self) -> Vec<Example> {
        let options = ReplayOptions {
            span: Span::default(),
            history_len: self.config.fm.max_history,
            max_targets: self.config.fm.max_targets,
            features: self.config.features,
        };
        Replay::new(&self.data, options).unwrap().map(|example| example.unwrap()).collect()
    }

    /// A trainer that goes on with what was saved under the schema of before.
    fn resumed(&self, saved: &Path) -> Box<dyn FmTrainer> {
        let growths = spec_growths(&self.data.schema).unwrap();
        let spec = dataset_spec(&self.data).unwrap();
        let from = ResumePaths { saved, work: &self.dir.join("second"), growths: &growths };
        trainer::resume(from, &self.config.fm, &spec, self.config.device).unwrap()
    }

    /// Learns from examples up to this row; the NE of each binary task on them, where each example
    /// was predicted before it was learned from.
    fn learn(
        &self,
        trainer: &mut dyn FmTrainer,
        examples: &[Example],
        until_row: u64,
    ) -> BTreeMap<String, f64> {
        let spec = dataset_spec(&self.data).unwrap();
        let mut sums: BTreeMap<String, LogLossSums> = BTreeMap::new();
        let mut rows = 0;
        for batch in examples.chunks(self.batch) {
            if rows >= until_row {
                break;
            }
            let said = trainer.step(&batch.iter().collect::<Vec<_>>()).unwrap();
            for (at, task) in (0..said.labels.len()).zip(spec.tasks.iter().cycle()) {
                if said.mask[at] && matches!(task.label, TaskLabel::Action(_)) {
                    let row = LogLossSums::of(said.predictions[at], said.labels[at] > 0.5);
                    *sums.entry(task.name.clone()).or_default() += row;
                }
            }
            rows += (said.labels.len() / spec.tasks.len()) as u64;
        }
        let ne = |(task, sums): (String, LogLossSums)| Some((task, sums.normalized_entropy()?));
        sums.into_iter().filter_map(ne).collect()
    }
}

/// Gives an example's targets the new action: often where the item's topic has it, seldom else.
fn give(example: &mut Example) {
    for target in &mut example.targets {
        let draw = mix_parts(&[example.request, target.item.id]) % 100;
        let share = if target.item.ids[0].is_multiple_of(3) { 40 } else { 3 };
        let gift = 1 << 3;
        target.outcome.known |= gift;
        if draw < share {
            target.outcome.actions |= gift;
        }
    }
}
