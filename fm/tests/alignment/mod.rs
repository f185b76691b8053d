//! A surface's own alignment module comes, changes and goes while a model learns, and the model
//! predicts what it predicted.

use hypercast_core::hash::mix_parts;
use hypercast_fm::{
    alignment_spec::{AlignmentId, AlignmentSpec},
    device::DeviceKind,
    example::Example,
    growth::SpecGrowth,
    inference::{self, FmServingOptions},
    spec::{FmConfig, FmSpec, TaskLabel, TaskSpec},
    trainer::{self, FmTrainer, ResumePaths, StepOutput},
};

use crate::fixtures::{batch, config, spec};
use crate::{assert_close, columns, refs};

/// The module of the first surface: a number, a category, up to two tags, and a task of its own.
fn own() -> AlignmentSpec {
    let id = |name: &str, columns| AlignmentId { name: name.into(), columns };
    AlignmentSpec {
        hidden: vec![16, 8],
        features: Some(vec!["words".into()]),
        ids: vec![id("intent", 1), id("tags", 2)],
        tasks: vec!["cart".into()],
        training_only: Default::default(),
    }
}

fn aligned(own: AlignmentSpec) -> FmSpec {
    let mut aligned = spec();
    let (label, surfaces) = (TaskLabel::Action(1), vec![true, false]);
    let cart =
        TaskSpec { name: "cart".into(), main: false, label, surfaces, ..spec().tasks[0].clone() };
    aligned.tasks.push(cart);
    aligned.alignments.insert("home".into(), own);
    aligned
}

/// What the module reads and learns of the requests of the first surface.
fn with_own(examples: &[Example]) -> Vec<Example> {
    let mut examples = examples.to_vec();
    for example in examples.iter_mut().filter(|example| example.surface == 0) {
        for target in &mut example.targets {
            let chance = |what| mix_parts(&[example.request, target.item.id, what]) % 100;
            let (words, intent) = (chance(1) as f32, chance(2) % 5);
            let share = if words > 50.0 { 45 } else { 5 } + if intent == 3 { 45 } else { 0 };
            target.features.push(words);
            target.ids.extend([intent, 1 + chance(3) % 4, 0]);
            target.outcome.known |= 2;
            target.outcome.actions |= 2 * u64::from(chance(4) < share);
        }
    }
    examples
}

fn shown(spec: &FmSpec, from: u64) -> Vec<Example> {
    let examples = batch(from);
    if spec.alignments.is_empty() { examples } else { with_own(&examples) }
}

/// The normalised entropy of a binary task where it is valid.
fn ne(said: &[StepOutput], tasks: usize, task: usize) -> f64 {
    let (mut loss, mut positives, mut rows) = (0.0, 0.0, 0.0);
    for output in said {
        for cell in (task..output.mask.len()).step_by(tasks).filter(|&cell| output.mask[cell]) {
            let said = f64::from(output.predictions[cell]).clamp(1e-6, 1.0 - 1e-6);
            let label = f64::from(output.labels[cell]);
            loss -= if label > 0.5 { said.ln() } else { (1.0 - said).ln() };
            (positives, rows) = (positives + label, rows + 1.0);
        }
    }
    let rate: f64 = positives / rows;
    loss / rows / -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln())
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// What the model says that does not depend on alignment modules: TAEs and main tasks.
fn served(trainer: &dyn FmTrainer, spec: &FmSpec) -> [Vec<u32>; 2] {
    let said = trainer.predict(&refs(&shown(spec, 9000))).unwrap();
    [bits(&said.tae), bits(&columns(&said.predictions, spec.tasks.len(), &[0]))]
}

#[test]
fn a_surfaces_alignment_module_comes_changes_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let config = FmConfig { average_decay: 0.9, ..config() };
    let mut trainer = trainer::create(&path("0"), &config, &spec(), DeviceKind::Cpu).unwrap();
    (0..30).for_each(|at| drop(trainer.step(&refs(&batch(at * 16))).unwrap()));
    let (manifest, size) = (trainer.trained_weights("1.0.0").unwrap().manifest, trainer.size());
    let mut now = spec();
    let smaller = AlignmentSpec { hidden: vec![8], ids: vec![], ..own() };
    let modules = [aligned(own()), aligned(smaller), spec(), aligned(own())];
    for (at, next) in modules.into_iter().enumerate() {
        let before = served(&*trainer, &now);
        trainer.save(&path("saved")).unwrap();
        let growths =
            [SpecGrowth { from: spec(), to: next.clone(), features: vec![0], profiles: vec![] }];
        let (saved, work) = (path("saved"), path(&(at + 1).to_string()));
        let from = ResumePaths { saved: &saved, work: &work, growths: &growths };
        trainer = trainer::resume(from, &config, &next, DeviceKind::Cpu).unwrap();
        now = next;
        assert_eq!(served(&*trainer, &now), before, "module {at}");
        trainer.save(&path("young")).unwrap();
        let young = std::fs::read(path("young").join("training.json")).unwrap();
        let young: serde_json::Value = serde_json::from_slice(&young).unwrap();
        let names = |key: &str| young[key].as_object().unwrap().keys().cloned().collect();
        let moments: Vec<String> = names("moment_steps");
        let tasks = now.tasks[1..].iter().map(|task| (task.name.clone(), 0.into()));
        let tasks: serde_json::Value = tasks.collect::<serde_json::Map<_, _>>().into();
        let realigned = serde_json::json!({ "home": tasks });
        assert_eq!(young["realigned_tasks"], realigned, "all that the module predicts is new");
        assert!(young["added_tasks"].get("watch").is_none(), "other modules know it");
        let of_module = |name: &&String| name.starts_with("alignments.");
        assert!(!moments.is_empty() && !moments.iter().any(|name| of_module(&name)), "{moments:?}");
        let steps: u64 = if at == 0 { 160 } else { 10 };
        let step = |step: u64| trainer.step(&refs(&shown(&now, 480 + step * 16))).unwrap();
        let said: Vec<StepOutput> = (0..steps).map(step).collect();
        if at == 0 {
            let newest = &said[100..];
            let (click, cart) = (ne(newest, 3, 0), ne(newest, 3, 2));
            assert!(click < 0.5 && cart < 0.95, "{click} {cart}");
        }
        // It goes on with the module that it has, without growth.
        trainer.save(&path("saved")).unwrap();
        let work = path(&format!("again-{at}"));
        let from = ResumePaths { saved: &saved, work: &work, growths: &[] };
        let mut again = trainer::resume(from, &config, &now, DeviceKind::Cpu).unwrap();
        let examples = shown(&now, 7000);
        let steps = [&mut trainer, &mut again].map(|own| own.step(&refs(&examples)).unwrap());
        let [one, other] = steps.map(|step| bits(&step.predictions));
        assert_eq!(one, other, "module {at}");
    }

    // What serves knows of none of it.
    let published = trainer.trained_weights("1.0.0").unwrap();
    assert_eq!(published.manifest.spec, manifest.spec);
    assert!(published.manifest.statistics.alignments.is_empty());
    assert!(published.manifest.statistics.labels.keys().eq(manifest.statistics.labels.keys()));
    assert!(published.dense.iter().all(|tensor| !tensor.name.contains("alignment")));
    assert_eq!(trainer.size().serving, size.serving);
    assert!(trainer.size().dense > size.dense + 4096 * config.embedding_dim);
    trainer.checkpoint(&path("fm"), "1.0.0").unwrap();
    let fm = inference::load(&path("fm"), FmServingOptions::default()).unwrap();
    assert_eq!(fm.manifest().spec, spec());
    let said = trainer.predict(&refs(&shown(&now, 9000))).unwrap();
    assert_close(&fm.infer(&refs(&batch(9000))).unwrap().tae, &said.tae);
    let asked = shown(&now, 9000);
    let asked: Vec<_> = asked.iter().map(|example| now.served_example(example)).collect();
    let asked: Vec<&Example> = asked.iter().map(|example| &**example).collect();
    assert_close(&fm.infer(&asked).unwrap().tae, &said.tae);
    let refused = fm.infer(&refs(&shown(&now, 9000))).unwrap_err().to_string();
    assert!(refused.contains("2 numeric columns; the model was made for 1"), "{refused}");
    let other = trainer::resume(
        ResumePaths { saved: &path("saved"), work: &path("other"), growths: &[] },
        &config,
        &spec(),
        DeviceKind::Cpu,
    );
    let refused = other.err().unwrap().to_string();
    assert!(refused.contains("the data's alignments were"), "{refused}");
}

#[test]
fn a_module_that_begins_anew_moves_the_tae_slowly_and_other_surfaces_learn_as_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // Without an average, a step shows at once.
    let config = FmConfig { average_decay: 0.0, ..config() };
    // Both surfaces have the core's auxiliary task.
    let shared = |mut spec: FmSpec| {
        spec.tasks[1].surfaces = vec![true; 2];
        spec
    };
    let before = shared(aligned(own()));
    let after = shared(aligned(AlignmentSpec { hidden: vec![8], ..own() }));
    let mut trainer = trainer::create(&path("0"), &config, &before, DeviceKind::Cpu).unwrap();
    (0..5).for_each(|at| drop(trainer.step(&refs(&shown(&before, at * 16))).unwrap()));
    trainer.save(&path("saved")).unwrap();
    // The TAEs after a step on one surface whose only labels are of that task.
    let taught = |to: &FmSpec, surface: u16, watched: f32| {
        let (from, to) = (shared(spec()), to.clone());
        let growths = [SpecGrowth { from, to: to.clone(), features: vec![0], profiles: vec![] }];
        let from = ResumePaths { saved: &path("saved"), work: &path("work"), growths: &growths };
        let mut trainer = trainer::resume(from, &config, &to, DeviceKind::Cpu).unwrap();
        let mut examples = shown(&to, 80);
        examples.retain(|example| example.surface == surface);
        for target in examples.iter_mut().flat_map(|example| &mut example.targets) {
            target.outcome.known = 0;
            target.outcome.values[0] = watched;
        }
        trainer.step(&refs(&examples)).unwrap();
        served(&*trainer, &to)[0].clone()
    };
    assert_ne!(taught(&before, 0, 0.0), taught(&before, 0, 1.0), "a trained module");
    assert_eq!(taught(&after, 0, 0.0), taught(&after, 0, 1.0), "one that knows nothing yet");
    let other = taught(&before, 1, 1.0);
    let numbers = |bits: &[u32]| bits.iter().copied().map(f32::from_bits).collect::<Vec<f32>>();
    assert_close(&numbers(&taught(&after, 1, 1.0)), &numbers(&other));
    assert_ne!(taught(&after, 1, 0.0), other);
}

#[test]
fn a_target_without_the_columns_of_its_module_is_refused_before_anything_learns_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let spec = aligned(own());
    let create =
        |name| trainer::create(&dir.path().join(name), &config(), &spec, DeviceKind::Cpu).unwrap();
    let [mut shown_it, mut other] = ["a", "b"].map(create);
    let mut narrow = shown(&spec, 0);
    for (columns, left) in [(1, "1 numeric"), (0, "0 numeric")] {
        narrow[9].targets[2].features.truncate(columns);
        let refused = shown_it.step(&refs(&narrow)).unwrap_err().to_string();
        assert!(refused.contains(left) && refused.contains("made for 2"), "{refused}");
    }
    let said = [&mut shown_it, &mut other]
        .map(|trainer| bits(&trainer.step(&refs(&shown(&spec, 0))).unwrap().predictions));
    assert_eq!(said[0], said[1]);
}

#[test]
fn specifications_without_modules_are_stored_as_before() {
    let text = serde_json::to_string(&spec()).unwrap();
    assert!(!text.contains("alignment"), "{text}");
    assert_eq!(serde_json::from_str::<FmSpec>(&text).unwrap(), spec());
    let text = serde_json::to_string(&aligned(own())).unwrap();
    assert_eq!(serde_json::from_str::<FmSpec>(&text).unwrap(), aligned(own()));
    let refused = |change: &dyn Fn(&mut FmSpec)| {
        let mut spec = aligned(own());
        change(&mut spec);
        spec.validate().unwrap_err().to_string()
    };
    let other = refused(&|spec| _ = spec.alignments.insert("late".into(), own()));
    assert!(other.contains("\"late\" is of no surface"), "{other}");
    let all = refused(&|spec| spec.tasks[2].surfaces = vec![true, true]);
    assert!(all.contains("not an auxiliary one of this surface alone"), "{all}");
}
