//! A training run that was interrupted and resumed equals one that never was.

mod fixtures;

use fixtures::{batch, config, spec};
use hypercast_fm::{
    checkpoint::FmManifest,
    device::DeviceKind,
    example::Example,
    inference::{self, FmServingOptions},
    spec::FmConfig,
    trainer::{self, FmTrainer, ResumePaths, StepOutput},
};

/// All random choices are switched on.
fn noisy() -> FmConfig {
    FmConfig {
        dropout: 0.2,
        average_decay: 0.99,
        max_history: 9,
        stochastic_length_alpha: 1.3,
        sample_negatives: [("shop".to_string(), 0.5)].into(),
        warmup_steps: 30,
        ..config()
    }
}

/// Later steps have items that earlier steps did not have.
fn step(trainer: &mut dyn FmTrainer, step: u64) -> StepOutput {
    let examples = batch(step * 16);
    trainer.step(&examples.iter().collect::<Vec<&Example>>()).unwrap()
}

fn bits(output: &StepOutput) -> Vec<u32> {
    let floats = output.tae.iter().chain(&output.predictions).chain([&output.loss]);
    floats.map(|v| v.to_bits()).collect()
}

#[test]
fn a_resumed_run_gives_the_numbers_of_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (config, spec) = (noisy(), spec());
    let mut whole = trainer::create(&path("a"), &config, &spec, DeviceKind::Cpu).unwrap();
    let mut other = trainer::create(&path("b"), &config, &spec, DeviceKind::Cpu).unwrap();
    for at in 0..25 {
        let (a, b) = (bits(&step(&mut *whole, at)), bits(&step(&mut *other, at)));
        assert_eq!(a, b, "two runs of one seed, step {at}");
    }
    other.save(&path("saved")).unwrap();
    // Steps after the save are not part of it.
    step(&mut *other, 77);
    drop(other);
    let from = ResumePaths { saved: &path("saved"), work: &path("b"), growths: &[] };
    let mut resumed = trainer::resume(from, &config, &spec, DeviceKind::Cpu).unwrap();
    for at in 25..60 {
        let (a, b) = (bits(&step(&mut *whole, at)), bits(&step(&mut *resumed, at)));
        assert_eq!(a, b, "after the resume, step {at}");
    }
    // The first save was during the learning rate's warm-up; a second one replaces it.
    resumed.save(&path("saved")).unwrap();
    whole.checkpoint(&path("fm-a"), "1.0.0").unwrap();
    resumed.checkpoint(&path("fm-b"), "1.0.0").unwrap();
    for file in ["fm.json", "model.safetensors", "alignment.safetensors"] {
        let read = |fm: &str| std::fs::read(path(fm).join(file)).unwrap();
        assert!(read("fm-a") == read("fm-b"), "{file} differs");
    }
    let infer = |fm: &str| {
        let fm = inference::load(&path(fm), FmServingOptions::default()).unwrap();
        fm.infer(&batch(9000).iter().collect::<Vec<_>>()).unwrap()
    };
    assert_eq!(infer("fm-a"), infer("fm-b"));
}

/// Examples whose items have ids of 64 bits, as keys of texts are.
fn batch_of_hashed_ids(at: u64) -> Vec<Example> {
    let mut examples = batch(at);
    for example in &mut examples {
        let past = example.history.iter_mut().map(|event| &mut event.item);
        for item in past.chain(example.targets.iter_mut().map(|target| &mut target.item)) {
            let item = std::sync::Arc::make_mut(item);
            item.id = hypercast_core::hash::splitmix64(item.id);
        }
    }
    examples
}

#[test]
fn a_run_of_format_1_goes_on_with_the_keys_that_its_store_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let set_format = |file: std::path::PathBuf, format: u32| {
        let text = std::fs::read_to_string(&file).unwrap();
        let (old, new) = (format!("\"format\": {}", 3 - format), format!("\"format\": {format}"));
        assert!(text.contains(&old), "{text}");
        std::fs::write(file, text.replacen(&old, &new, 1)).unwrap();
    };
    // A run that has learned nothing has no keys yet, and so may be one of either format.
    let mut fresh = trainer::create(&path("work"), &config(), &spec(), DeviceKind::Cpu).unwrap();
    fresh.save(&path("saved")).unwrap();
    drop(fresh);
    set_format(path("saved").join("training.json"), 1);
    let from = ResumePaths { saved: &path("saved"), work: &path("work"), growths: &[] };
    let mut trainer = trainer::resume(from, &config(), &spec(), DeviceKind::Cpu).unwrap();
    for at in 0..20 {
        let examples = batch_of_hashed_ids(at * 16);
        trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
    }
    trainer.save(&path("saved")).unwrap();
    trainer.checkpoint(&path("fm"), "1.0.0").unwrap();
    drop(trainer);
    let saved = std::fs::read_to_string(path("saved").join("training.json")).unwrap();
    assert!(saved.contains("\"format\": 1"), "a run keeps its format");
    let predictions = || {
        let fm = inference::load(&path("fm"), FmServingOptions::default()).unwrap();
        fm.infer(&batch_of_hashed_ids(64).iter().collect::<Vec<_>>()).unwrap().main
    };
    let own = predictions();
    set_format(path("fm").join("fm.json"), 2);
    assert_ne!(own, predictions(), "with the keys of format 2 its rows are not found");
    set_format(path("fm").join("fm.json"), 1);
    assert_eq!(own, predictions());
    let later = std::fs::read_to_string(path("fm").join("fm.json")).unwrap();
    let later = later.replacen("\"format\": 1", "\"format\": 4", 1);
    std::fs::write(path("fm").join("fm.json"), later).unwrap();
    let error = inference::load(&path("fm"), FmServingOptions::default()).err().unwrap();
    assert!(error.to_string().contains("reads formats 1 to 3"), "{error}");
}

#[test]
fn resuming_with_another_configuration_names_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let (work, saved) = (dir.path().join("work"), dir.path().join("saved"));
    let mut trainer = trainer::create(&work, &noisy(), &spec(), DeviceKind::Cpu).unwrap();
    trainer.save(&saved).unwrap();
    let from = ResumePaths { saved: &saved, work: &work, growths: &[] };
    let refused = |config, spec| {
        trainer::resume(from, &config, &spec, DeviceKind::Cpu).err().unwrap().to_string()
    };
    let error = refused(FmConfig { learning_rate: 0.02, ..noisy() }, spec());
    assert!(error.contains("fm.learning_rate was 0.005 and is 0.02 now"), "{error}");
    let mut other = spec();
    other.actions = 2;
    let error = refused(noisy(), other);
    assert!(error.contains("actions"), "{error}");
    let missing = ResumePaths { saved: &dir.path().join("nowhere"), work: &work, growths: &[] };
    let error = trainer::resume(missing, &noisy(), &spec(), DeviceKind::Cpu).err().unwrap();
    assert!(error.to_string().contains("no saved run"), "{error}");
    drop(trainer);
    let rarer = FmConfig { save_every_requests: 9, ..noisy() };
    trainer::resume(from, &rarer, &spec(), DeviceKind::Cpu).expect("saving less often is fine");
    std::fs::write(saved.join("moments.safetensors"), b"{}").unwrap();
    let error = refused(noisy(), spec());
    assert!(error.contains("moments.safetensors"), "{error}");
}

#[test]
fn a_run_keeps_the_history_window_that_it_began_with() {
    for (began, kept) in [(Some(0), 0), (None, 2), (Some(5), 5)] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let config = FmConfig { history_anchors: began, ..config() };
        let mut trainer =
            trainer::create(&path("work"), &config, &spec(), DeviceKind::Cpu).unwrap();
        trainer.save(&path("saved")).unwrap();
        drop(trainer);
        let from = ResumePaths { saved: &path("saved"), work: &path("work"), growths: &[] };
        let unset = FmConfig { history_anchors: None, ..config.clone() };
        let mut resumed = trainer::resume(from, &unset, &spec(), DeviceKind::Cpu).unwrap();
        resumed.checkpoint(&path("fm"), "1.0.0").unwrap();
        let manifest = FmManifest::read(&path("fm")).unwrap();
        assert_eq!(manifest.config.history_anchors, Some(kept), "begun with {began:?}");
        let file = path("fm").join("fm.json");
        let mut stored: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        stored["config"].as_object_mut().unwrap().remove("history_anchors").unwrap();
        std::fs::write(&file, stored.to_string()).unwrap();
        let of_before = FmManifest::read(&path("fm")).unwrap().config.history_anchors;
        assert_eq!(of_before, Some(0), "a checkpoint from before the key had no anchors");
        drop(resumed);
        let other = FmConfig { history_anchors: Some(7), ..config };
        let error = trainer::resume(from, &other, &spec(), DeviceKind::Cpu).err().unwrap();
        assert!(error.to_string().contains("fm.history_anchors was"), "{error}");
    }
}

#[test]
fn sampling_an_unknown_surface_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config =
        FmConfig { sample_negatives: [("hme".to_string(), 0.5)].into(), ..FmConfig::default() };
    let error = trainer::create(dir.path(), &config, &spec(), DeviceKind::Cpu).err().unwrap();
    let error = error.to_string();
    assert!(error.contains("\"hme\"") && error.contains("home, shop"), "{error}");
}

/// Of the requests of step 3, one has a value or a feature that ruins the model if it learns it.
#[test]
fn an_example_that_would_harm_the_model_is_set_aside_alone() {
    let dir = tempfile::tempdir().unwrap();
    for (name, value, feature) in
        [("loss", 3e38, 0.0), ("unusual", 1e15, 0.0), ("both", 3e38, 3e38), ("fine", 0.5, 3e38)]
    {
        let path = |part: &str| dir.path().join(name).join(part);
        let mut with = trainer::create(&path("a"), &config(), &spec(), DeviceKind::Cpu).unwrap();
        let mut without = trainer::create(&path("b"), &config(), &spec(), DeviceKind::Cpu).unwrap();
        for at in 0..30 {
            step(&mut *with, at);
            step(&mut *without, at);
        }
        let mut examples = batch(30 * 16);
        let honest: Vec<Example> = [&examples[..3], &examples[4..]].concat();
        examples[3].surface = 0;
        for target in &mut examples[3].targets {
            target.outcome.values[0] = value;
            target.features[0] = feature;
        }
        let said = with.step(&examples.iter().collect::<Vec<_>>()).unwrap();
        assert!(said.loss.is_finite(), "{name}");
        if name == "fine" {
            assert!(said.set_aside.is_empty(), "features are standardised and clipped");
            continue;
        }
        assert_eq!(said.set_aside, [3], "{name}");
        let alone = without.step(&honest.iter().collect::<Vec<_>>()).unwrap();
        let tasks = spec().tasks.len();
        let rows = |examples: &[Example]| -> usize {
            examples.iter().map(|example| example.targets.len()).sum()
        };
        let (from, gap) = (rows(&examples[..3]) * tasks, rows(&examples[3..4]) * tasks);
        assert!(said.predictions[from..from + gap].iter().all(|value| value.is_nan()));
        assert!(!said.mask[from..from + gap].contains(&true));
        let rest = [&said.predictions[..from], &said.predictions[from + gap..]].concat();
        let same = |a: &[f32], b: &[f32]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
        };
        assert!(same(&rest, &alone.predictions), "{name}: the others are predicted as before");
        for at in 31..34 {
            let (a, b) = (bits(&step(&mut *with, at)), bits(&step(&mut *without, at)));
            assert_eq!(a, b, "{name}: the model never saw it, step {at}");
        }
    }
}
