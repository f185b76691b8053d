//! What a growth costs those tasks that were there, and how soon the new one is learned: the second
//! half of a world is learned once under the schema of before and once under one that has grown.

use std::{collections::BTreeMap, ops::Range, path::Path};

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

/// Rows within which the new task is to be better than its base rate: in the second half of them,
/// because in the first step nothing is known of it.
const FIRST_ROWS: u64 = 10_000;

/// Requests in a step: what a trainer takes together of a stream of some 30 requests a second.
const BATCH: usize = 16;

/// How far the NE of a task of before may be apart.
const APART: f64 = 1e-3;

#[test]
#[ignore = "it takes minutes; `cargo xtask full` runs it"]
fn tasks_of_before_keep_their_ne_and_the_new_one_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let config = world(dir.path(), 6000, 2);
    let data = dir.path().join("data");
    let first = Learner { config: &config, dir: dir.path(), data: Dataset::open(&data).unwrap() };
    let examples = first.examples();
    let (past, later) = examples.split_at(examples.len() / 2);
    let spec = dataset_spec(&first.data).unwrap();
    let mut trainer =
        trainer::create(&dir.path().join("first"), &config.fm, &spec, config.device).unwrap();
    first.learn(&mut *trainer, past, 0..u64::MAX);
    let saved = dir.path().join("saved");
    trainer.save(&saved).unwrap();
    let expected = first.learn(&mut *trainer, later, 0..u64::MAX);

    SchemaGrowth::apply(&data, &grown(&Schema::load(&data.join("schema.toml")).unwrap())).unwrap();
    let second = Learner { data: Dataset::open(&data).unwrap(), ..first };
    let mut examples = second.examples();
    let mut later = examples.split_off(past.len());
    later.iter_mut().for_each(give);
    let mut found = second.learn(&mut *second.resumed(&saved), &later, 0..u64::MAX);
    let of_gift = |rows| second.learn(&mut *second.resumed(&saved), &later, rows)["gift"];
    let half = FIRST_ROWS / 2;
    let [whole, by_then] = [0..FIRST_ROWS, half..FIRST_ROWS].map(of_gift);

    println!("figure: NE of the new task, first {FIRST_ROWS} rows: {whole:.4}");
    println!("figure: NE of the new task, rows {half} to {FIRST_ROWS}: {by_then:.4}");
    println!("figure: NE of the new task, all rows: {:.4}", found.remove("gift").unwrap());
    for (task, expected) in &expected {
        println!("figure: NE of {task}: {:.4} grown, {expected:.4} not grown", found[task]);
    }
    for (task, expected) in &expected {
        assert!((found[task] - expected).abs() < APART, "{task}: {} and {expected}", found[task]);
    }
    assert!(by_then < 1.0, "{by_then}");
}

/// Learns from a data set under one schema.
struct Learner<'a> {
    config: &'a Config,
    dir: &'a Path,
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

    /// Learns from examples up to the last of these rows; the NE of each binary task on them, where
    /// each example was predicted before it was learned from.
    fn learn(
        &self,
        trainer: &mut dyn FmTrainer,
        examples: &[Example],
        counted: Range<u64>,
    ) -> BTreeMap<String, f64> {
        let spec = dataset_spec(&self.data).unwrap();
        let mut sums: BTreeMap<String, LogLossSums> = BTreeMap::new();
        let mut rows = 0;
        for batch in examples.chunks(BATCH) {
            if rows >= counted.end {
                break;
            }
            let said = trainer.step(&batch.iter().collect::<Vec<_>>()).unwrap();
            for (at, task) in (0..said.labels.len()).zip(spec.tasks.iter().cycle()) {
                if rows >= counted.start
                    && said.mask[at]
                    && matches!(task.label, TaskLabel::Action(_))
                {
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
