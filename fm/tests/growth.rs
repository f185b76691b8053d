//! A model that is taken over to data that has grown predicts what it predicted, and learns the new
//! from there.

mod alignment;
mod fixtures;

use std::{path::Path, sync::Arc};

use fixtures::{batch, config, spec};
use hypercast_core::hash::mix_parts;
use hypercast_fm::{
    device::DeviceKind,
    example::{Example, Item},
    growth::SpecGrowth,
    inference::{self, FmServingOptions, FoundationModel},
    spec::{FmConfig, FmSpec, IdWidths, TaskLabel, TaskSpec},
    trainer::{self, FmTrainer, ResumePaths, StepOutput},
    training_only::TrainingOnlyColumns,
    update::{TensorSlice, WeightUpdate},
};

/// A surface, an action with a main task, a value with an auxiliary one, and columns of all kinds
/// are added; what stood last no longer does.
fn growth() -> SpecGrowth {
    let from = FmSpec { item_dense: 1, item_optional: vec![0], ..spec() };
    let mut to = FmSpec {
        surfaces: ["home", "shop", "late"].map(String::from).to_vec(),
        actions: 2,
        values: 2,
        item_ids: 5,
        id_widths: IdWidths { item: vec![1, 1, 3], profile: vec![] },
        item_dense: 2,
        item_optional: vec![0, 1],
        features: 3,
        profile_ids: vec![6],
        ..from.clone()
    };
    to.tasks.iter_mut().for_each(|task| task.surfaces.push(true));
    to.tasks[1].surfaces[2] = false;
    let task = |name: &str, main, label| TaskSpec {
        name: name.into(),
        main,
        label,
        surfaces: vec![true; 3],
        ..from.tasks[0].clone()
    };
    to.tasks.insert(1, task("gift", true, TaskLabel::Action(1)));
    to.tasks.push(task("tip", false, TaskLabel::Value(1)));
    SpecGrowth { from, to, features: vec![1], profiles: vec![] }
}

/// Requests of before, whose items have an optional number.
fn requests(first: u64) -> Vec<Example> {
    let mut examples = batch(first);
    for example in &mut examples {
        let events = example.history.iter_mut().map(|event| &mut event.item);
        let items = events.chain(example.targets.iter_mut().map(|target| &mut target.item));
        for item in items {
            let number = if item.id.is_multiple_of(4) { f32::NAN } else { item.id as f32 };
            Arc::make_mut(item).dense = vec![number];
        }
    }
    examples
}

/// An item with what was added: a category, up to three tags and another optional number.
fn grow(item: &mut Arc<Item>) {
    let item = Arc::make_mut(item);
    item.ids.push(item.id % 3);
    item.ids.extend([[4, 9, 0], [9, 0, 0], [0; 3]][item.id as usize % 3]);
    item.dense.push(if item.id.is_multiple_of(3) { f32::NAN } else { item.id as f32 });
}

/// The same requests with everything that was added.
fn grown(examples: &[Example]) -> Vec<Example> {
    let mut examples = examples.to_vec();
    for example in &mut examples {
        for event in &mut example.history {
            grow(&mut event.item);
            event.outcome.known |= 2;
        }
        for target in &mut example.targets {
            grow(&mut target.item);
            let item = &target.item;
            target.ids = vec![3; 7];
            target.features = vec![item.id as f32, target.features[0], 100.0];
            target.outcome.known |= 2;
            target.outcome.actions |= 2 * u64::from(item.id.is_multiple_of(3));
            target.outcome.values[1] = (item.id % 5) as f32;
        }
    }
    examples
}

fn refs(examples: &[Example]) -> Vec<&Example> {
    examples.iter().collect()
}

/// The columns of some tasks.
fn columns(said: &[f32], tasks: usize, wanted: &[usize]) -> Vec<f32> {
    said.chunks(tasks).flat_map(|row| wanted.iter().map(move |&task| row[task])).collect()
}

fn assert_close(a: &[f32], b: &[f32]) {
    assert!(!a.is_empty() && a.len() == b.len(), "{} {}", a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-5 || (a.is_nan() && b.is_nan()), "{a} {b}");
    }
}

/// The normalised entropy of a binary task.
fn ne(said: &[StepOutput], tasks: usize, task: usize) -> f64 {
    let (mut loss, mut positives, mut rows) = (0.0, 0.0, 0.0);
    for output in said {
        let cells = output.predictions.iter().zip(&output.labels).skip(task).step_by(tasks);
        for (&said, &label) in cells {
            let said = f64::from(said).clamp(1e-6, 1.0 - 1e-6);
            loss -= if label > 0.5 { said.ln() } else { (1.0 - said).ln() };
            (positives, rows) = (positives + f64::from(label), rows + 1.0);
        }
    }
    let rate: f64 = positives / rows;
    loss / rows / -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln())
}

fn load(dir: &Path, work: &Path) -> Box<dyn FoundationModel> {
    let serving = FmServingOptions { growths: [growth()].into(), ..FmServingOptions::default() };
    inference::load_updatable(dir, work, serving).unwrap()
}

/// All weights of a trainer, or those of one tensor.
fn update(trainer: &mut dyn FmTrainer, only: Option<&str>) -> WeightUpdate {
    let trained = trainer.trained_weights("1.0.0").unwrap();
    let store = trained.rows.unwrap();
    let row_ids: Vec<u64> = store.ids().collect();
    let mut rows = vec![0.0; row_ids.len() * store.dim()];
    store.gather(&row_ids, &mut rows).unwrap();
    let dense = trained.dense.into_iter().filter(|own| only.is_none_or(|name| own.name == name));
    let slice = |own: hypercast_fm::update::WeightTensor| TensorSlice {
        name: own.name,
        shape: own.shape,
        start: 0,
        values: own.values,
    };
    WeightUpdate {
        complete: only.is_none(),
        manifest: trained.manifest,
        dense: dense.map(slice).collect(),
        row_ids,
        rows,
        removed_row_ids: vec![],
    }
}

#[test]
fn a_grown_model_predicts_what_it_predicted_and_learns_what_was_added() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let config = FmConfig { average_decay: 0.9, ..config() };
    let mut old = trainer::create(&path("old"), &config, &growth().from, DeviceKind::Cpu).unwrap();
    for at in 0..60 {
        old.step(&refs(&requests(at * 16))).unwrap();
    }
    old.save(&path("saved")).unwrap();
    old.checkpoint(&path("fm"), "1.0.0").unwrap();
    let asked = requests(9000);
    let (asked_grown, said) = (grown(&asked), old.predict(&refs(&asked)).unwrap());

    // In service.
    let fm = load(&path("fm"), &path("rows"));
    let served = fm.infer(&refs(&asked_grown)).unwrap();
    assert_close(&served.tae, &said.tae);
    assert_close(&columns(&served.main, 2, &[0]), &columns(&said.predictions, 2, &[0]));
    let gifts = columns(&served.main, 2, &[1]);
    assert!(gifts.iter().all(|gift| *gift == gifts[0]), "not learned yet: {gifts:?}");

    // In training.
    let growths = [growth()];
    let from = ResumePaths { saved: &path("saved"), work: &path("new"), growths: &growths };
    let to = growth().to;
    let mut new = trainer::resume(from, &config, &to, DeviceKind::Cpu).unwrap();
    let now = new.predict(&refs(&asked_grown)).unwrap();
    assert_close(&now.tae, &said.tae);
    assert_close(&columns(&now.predictions, 4, &[0]), &columns(&said.predictions, 2, &[0]));
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for at in 60..200 {
        let examples = requests(at * 16);
        before.push(old.step(&refs(&examples)).unwrap());
        after.push(new.step(&refs(&grown(&examples))).unwrap());
    }
    let newest = before.len() - 40..;
    let clicks = [ne(&before[newest.clone()], 2, 0), ne(&after[newest.clone()], 4, 0)];
    assert!(clicks[1] < clicks[0] + 0.05, "{clicks:?}");
    let gift = ne(&after[newest], 4, 1);
    assert!(gift < 0.7, "{gift}");

    // Published weights of before and of now, whole and in part.
    let said = old.predict(&refs(&asked)).unwrap();
    for only in [None, Some("token_hidden.weight"), Some("head.output.weight")] {
        fm.update(update(&mut *old, only)).unwrap();
        assert_close(&fm.infer(&refs(&asked_grown)).unwrap().tae, &said.tae);
    }
    fm.update(update(&mut *new, None)).unwrap();
    new.checkpoint(&path("fm-new"), "1.0.0").unwrap();
    let said = new.predict(&refs(&asked_grown)).unwrap();
    for fm in [fm, load(&path("fm-new"), &path("rows-new"))] {
        let served = fm.infer(&refs(&asked_grown)).unwrap();
        assert_close(&served.tae, &said.tae);
        let said = columns(&said.predictions, 4, &[0, 1]);
        assert_close(&served.main, &said);
    }
}

/// An action with a main task, and nothing else.
fn added_task() -> SpecGrowth {
    let from = spec();
    let mut to = FmSpec { actions: 2, ..from.clone() };
    let label = TaskLabel::Action(1);
    to.tasks.insert(1, TaskSpec { name: "gift".into(), label, ..from.tasks[0].clone() });
    SpecGrowth { from, to, features: vec![0], profiles: vec![] }
}

/// Gives targets the action: often where the item's category has it, seldom else.
fn with_gifts(examples: &[Example]) -> Vec<Example> {
    let mut examples = examples.to_vec();
    for example in &mut examples {
        for target in &mut example.targets {
            let chance = mix_parts(&[example.request, target.item.id]) % 100;
            let share = if target.item.ids[0] < 2 { 40 } else { 3 };
            target.outcome.known |= 2;
            target.outcome.actions |= 2 * u64::from(chance < share);
        }
    }
    examples
}

#[test]
fn a_task_that_is_added_is_learned_at_once_and_disturbs_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let config = config();
    let growths = [added_task()];
    let FmSpec { tasks, .. } = &growths[0].to;
    let mut old = trainer::create(&path("old"), &config, &spec(), DeviceKind::Cpu).unwrap();
    for at in 0..300 {
        old.step(&refs(&batch(at * 16))).unwrap();
    }
    old.save(&path("saved")).unwrap();
    let resumed = |work: &str, saved: &str| {
        let from = ResumePaths { saved: &path(saved), work: &path(work), growths: &growths };
        trainer::resume(from, &config, &growths[0].to, DeviceKind::Cpu).unwrap()
    };
    let mut new = resumed("new", "saved");
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for at in 300..500 {
        let examples = batch(at * 16);
        before.push(old.step(&refs(&examples)).unwrap());
        after.push(new.step(&refs(&with_gifts(&examples))).unwrap());
        if at == 320 {
            // It is as young in a run that goes on.
            new.save(&path("young")).unwrap();
            new = resumed("again", "young");
        }
    }
    let (was, is) = (ne(&before, 2, 0), ne(&after, tasks.len(), 0));
    let gift = ne(&after, tasks.len(), 1);
    // With the whole gradient of the new task at once it is 0.01.
    assert!((was - is).abs() < 1e-3, "{was} {is}");
    assert!(gift < 0.99, "{gift}");
}

#[test]
fn a_model_goes_on_when_a_column_for_training_only_is_retired() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let training_only = TrainingOnlyColumns { numbers: vec![0], ..Default::default() };
    let was = FmSpec { training_only, ..spec() };
    let mut old = trainer::create(&path("old"), &config(), &was, DeviceKind::Cpu).unwrap();
    (0..5).for_each(|at| drop(old.step(&refs(&batch(at * 16))).unwrap()));
    old.save(&path("saved")).unwrap();
    // What a growth began with does not say what was retired since.
    for from in [was, spec()] {
        let growths = [SpecGrowth { from, to: spec(), features: vec![0], profiles: vec![] }];
        let from = ResumePaths { saved: &path("saved"), work: &path("new"), growths: &growths };
        let new = trainer::resume(from, &config(), &spec(), DeviceKind::Cpu).unwrap();
        let (asked, mut retired) = (batch(9000), batch(9000));
        let targets = retired.iter_mut().flat_map(|example| &mut example.targets);
        targets.for_each(|target| target.features = vec![f32::NAN]);
        let said = old.predict(&refs(&asked)).unwrap().predictions;
        assert_close(&new.predict(&refs(&retired)).unwrap().predictions, &said);
    }
}
