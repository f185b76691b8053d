//! The FM through its public interface: properties that hold for any weights.

mod fixtures;

use fixtures::{batch, config, example, spec};
use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    inference::{self, FmServingOptions},
    metrics::{ScoredPrediction, binary_metrics},
    spec::{FmConfig, FmSpec},
    trainer,
    training_only::TrainingOnlyColumns,
};

#[test]
fn it_learns_what_depends_on_the_history_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer::create(dir.path(), &config(), &spec(), DeviceKind::Cpu).unwrap();
    let mut late = Vec::new();
    for step in 0..250 {
        let examples = batch(step * 16);
        let references: Vec<&Example> = examples.iter().collect();
        let output = trainer.step(&references).unwrap();
        let rows = examples.iter().flat_map(|e| std::iter::repeat_n(e, 3));
        for (row, example) in rows.enumerate() {
            let on_shop = example.surface == 1;
            assert_eq!(
                output.predictions[row * 2 + 1].is_nan(),
                on_shop,
                "watch is valid on home alone"
            );
            assert_eq!(output.mask[row * 2 + 1], !on_shop);
            if step >= 200 && example.history.len() > 3 {
                let (probability, label) =
                    (output.predictions[row * 2], output.labels[row * 2] == 1.0);
                late.push(ScoredPrediction { user: example.user.id, probability, label });
            }
        }
    }
    let summary = binary_metrics(&late);
    assert!(summary.ne.unwrap() < 0.5, "progressive NE {:?}", summary.ne);
}

#[test]
fn a_checkpoint_predicts_as_its_trainer_and_targets_are_independent() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer::create(dir.path(), &config(), &spec(), DeviceKind::Cpu).unwrap();
    for step in 0..20 {
        let examples = batch(step * 16);
        trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
    }
    let checkpoint = dir.path().join("fm-1");
    trainer.checkpoint(&checkpoint, "1.2.0").unwrap();
    trainer.checkpoint(&checkpoint, "1.2.0").unwrap();
    let served = inference::load(&checkpoint, FmServingOptions::default()).unwrap();
    assert_eq!(served.manifest().version, "1.2.0");
    assert_eq!(served.manifest().requests, 320);

    let examples = batch(4);
    let references: Vec<&Example> = examples.iter().collect();
    let answer = served.infer(&references).unwrap();
    let trained = trainer.step(&references).unwrap();
    for (row, probability) in answer.main.iter().enumerate() {
        assert!((probability - trained.predictions[row * 2]).abs() < 1e-5);
    }
    assert!(answer.tae.iter().zip(&trained.tae).all(|(a, b)| (a - b).abs() < 1e-5));

    // Another target in the request changes nothing, bit for bit.
    let one = served.infer(&[&example(11, &[3, 8, 21])]).unwrap();
    let other = served.infer(&[&example(11, &[3, 30, 21])]).unwrap();
    let width = 16;
    assert_eq!(one.tae[..width], other.tae[..width]);
    assert_ne!(one.tae[width..2 * width], other.tae[width..2 * width]);
    assert_eq!(one.tae[2 * width..], other.tae[2 * width..]);
}

#[test]
fn a_request_without_targets_and_a_new_user_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer::create(dir.path(), &config(), &spec(), DeviceKind::Cpu).unwrap();
    let checkpoint = dir.path().join("fm-1");
    trainer.checkpoint(&checkpoint, "1.0.0").unwrap();
    let served = inference::load(&checkpoint, FmServingOptions::default()).unwrap();
    assert_eq!(served.infer(&[&example(5, &[])]).unwrap().tae.len(), 0);
    let newcomer = example(0, &[1, 2]);
    assert!(newcomer.history.is_empty());
    let answer = served.infer(&[&newcomer, &example(5, &[])]).unwrap();
    assert_eq!(answer.main.len(), 2);
    assert!(answer.tae.iter().all(|v| v.is_finite()));
    // A batch without any history.
    assert_eq!(served.infer(&[&newcomer]).unwrap().tae.len(), answer.tae.len());
    assert_eq!(trainer.step(&[&newcomer]).unwrap().tae.len(), answer.tae.len());
}

#[test]
fn a_checkpoint_is_found_where_a_replacement_was_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    let mut trainer = trainer::create(&work, &config(), &spec(), DeviceKind::Cpu).unwrap();
    let path = |name: &str| dir.path().join(name);
    trainer.checkpoint(&path("fm-1.0.0"), "1.0.0").unwrap();
    let load = |name: &str| inference::load(&path(name), FmServingOptions::default());
    // As version 0.1.0 set it aside, under a name that fm-1.0.1 had too; and as it is now.
    for aside in ["fm-1.0.old", "fm-1.0.0.old"] {
        std::fs::rename(path("fm-1.0.0"), path(aside)).unwrap();
        assert_eq!(load("fm-1.0.0").unwrap().manifest().version, "1.0.0", "{aside}");
        assert!(load("fm-1.0.1").is_err(), "{aside} is not of version 1.0.1");
        trainer.checkpoint(&path("fm-1.0.1"), "1.0.1").unwrap();
        assert_eq!(load("fm-1.0.0").unwrap().manifest().version, "1.0.0", "{aside}");
        trainer.checkpoint(&path("fm-1.0.0"), "1.0.0").unwrap();
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["fm-1.0.0", "fm-1.0.1", "work"], "nothing is left of {aside}");
        std::fs::remove_dir_all(path("fm-1.0.1")).unwrap();
    }
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer::create(dir.path(), &config(), &spec(), DeviceKind::Cpu).unwrap();
    let checkpoint = dir.path().join("fm-1");
    trainer.checkpoint(&checkpoint, "1.0.0").unwrap();
    let weights = checkpoint.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let error =
        inference::load(&checkpoint, FmServingOptions::default()).err().unwrap().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    std::fs::remove_file(checkpoint.join("fm.json")).unwrap();
    let error =
        inference::load(&checkpoint, FmServingOptions::default()).err().unwrap().to_string();
    assert!(error.contains("hypercast train fm"), "{error}");
}

#[test]
fn predictions_stay_calibrated_with_downsampled_negatives() {
    let dir = tempfile::tempdir().unwrap();
    let config = FmConfig {
        sample_negatives: [("home".to_string(), 0.3), ("shop".to_string(), 0.3)].into(),
        ..config()
    };
    let mut trainer = trainer::create(dir.path(), &config, &spec(), DeviceKind::Cpu).unwrap();
    let (mut predicted, mut happened, mut rows) = (0.0, 0.0, 0);
    for step in 0..150 {
        let examples = batch(step * 16);
        let output = trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(output.labels.len(), 16 * 3 * 2, "every row is predicted");
        for row in (0..48).filter(|_| step >= 100) {
            predicted += f64::from(output.predictions[row * 2]);
            happened += f64::from(output.labels[row * 2]);
            rows += 1;
        }
    }
    let (predicted, happened) = (predicted / f64::from(rows), happened / f64::from(rows));
    // Without weights, keeping three in ten negatives would raise a rate of 0.5 to 0.77.
    assert!((predicted - happened).abs() < 0.05, "{predicted} {happened}");
}

#[test]
fn predict_only_changes_nothing_and_equals_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let create = |name: &str| {
        let dir = dir.path().join(name);
        trainer::create(&dir, &config(), &spec(), DeviceKind::Cpu).unwrap()
    };
    let (mut watched, mut alone) = (create("watched"), create("alone"));
    for step in 0..12 {
        let examples = batch(step * 16);
        let references: Vec<&Example> = examples.iter().collect();
        let unseen = batch(5000 + step * 16);
        watched.predict(&unseen.iter().collect::<Vec<_>>()).unwrap();
        watched.user_states(&references).unwrap();
        let (a, b) = (watched.step(&references).unwrap(), alone.step(&references).unwrap());
        assert_eq!((a.tae, a.loss), (b.tae, b.loss), "step {step}");
    }
    let checkpoint = dir.path().join("fm-1");
    watched.checkpoint(&checkpoint, "1.0.0").unwrap();
    let served = inference::load(&checkpoint, FmServingOptions::default()).unwrap();
    let examples = batch(4);
    let references: Vec<&Example> = examples.iter().collect();
    let output = watched.predict(&references).unwrap();
    let answer = served.infer(&references).unwrap();
    assert!(output.tae.iter().zip(&answer.tae).all(|(a, b)| (a - b).abs() < 1e-6));
    let main: Vec<f32> = output.predictions.iter().step_by(2).copied().collect();
    assert!(main.iter().zip(&answer.main).all(|(a, b)| (a - b).abs() < 1e-6));
    // A step predicts the same before it learns.
    let stepped = watched.step(&references).unwrap();
    assert_eq!((&output.labels, &output.mask), (&stepped.labels, &stepped.mask));
    for (a, b) in output.predictions.iter().zip(&stepped.predictions) {
        assert!((a - b).abs() < 1e-5 || (a.is_nan() && b.is_nan()), "{a} {b}");
    }
}

#[test]
fn a_user_state_depends_on_the_history_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer::create(dir.path(), &config(), &spec(), DeviceKind::Cpu).unwrap();
    for step in 0..5 {
        let examples = batch(step * 16);
        trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
    }
    let states = |examples: &[&Example]| trainer.user_states(examples).unwrap();
    let width = config().user_state_width();
    assert_eq!(width, 3 * 16, "the token and two layers");
    // Request 13 has no history.
    let (new, old, other) = (example(13, &[1]), example(11, &[3, 8]), example(11, &[30]));
    let all = states(&[&new, &old, &other]);
    assert_eq!(all.len(), 3 * width);
    assert!(all[..width].iter().all(|&value| value == 0.0));
    assert_eq!(all[width..2 * width], all[2 * width..], "targets are not read");
    let mut shorter = old.clone();
    shorter.history.pop();
    assert_ne!(states(&[&shorter]), all[width..2 * width].to_vec());
    assert_eq!(states(&[&new]), vec![0.0; width]);
}

#[test]
fn weights_that_are_not_finite_become_no_checkpoint() {
    for (learning_rate, sparse_learning_rate, what) in
        [(1e39, 0.1, "tensor"), (5e-3, f32::INFINITY, "row")]
    {
        let dir = tempfile::tempdir().unwrap();
        let config = FmConfig { learning_rate, sparse_learning_rate, ..config() };
        let mut trainer =
            trainer::create(&dir.path().join("work"), &config, &spec(), DeviceKind::Cpu).unwrap();
        let checkpoint = dir.path().join("fm");
        trainer.checkpoint(&checkpoint, "1.0.0").unwrap();
        let before = std::fs::read(checkpoint.join("model.safetensors")).unwrap();
        trainer.step(&batch(0).iter().collect::<Vec<_>>()).unwrap();
        let why = trainer.checkpoint(&checkpoint, "1.0.0").unwrap_err().to_string();
        assert!(why.contains(what) && why.contains("is not finite"), "{why}");
        let after = std::fs::read(checkpoint.join("model.safetensors")).unwrap();
        assert!(before == after, "what is there stays as it is");
    }
}

#[test]
fn a_column_for_training_only_changes_what_is_learned_and_no_prediction() {
    let training_only = TrainingOnlyColumns { ids: vec![], numbers: vec![0], missing: vec![1] };
    let spec = FmSpec { features: 2, training_only, ..spec() };
    // Where the clicks are, if it tells anything.
    let shown = |is_telling: bool, step: u64| -> Vec<Example> {
        let mut examples = batch(step * 16);
        for target in examples.iter_mut().flat_map(|example| &mut example.targets) {
            let clicked = target.outcome.actions == 1;
            target.features = vec![if is_telling && clicked { 1.0 } else { 9.0 }, 0.0];
        }
        examples
    };
    let dir = tempfile::tempdir().unwrap();
    let trained = |is_telling: bool| {
        let work = dir.path().join(is_telling.to_string());
        let mut trainer = trainer::create(&work, &config(), &spec, DeviceKind::Cpu).unwrap();
        let step = |trainer: &mut dyn trainer::FmTrainer, step| {
            let examples = shown(is_telling, step);
            trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap().predictions
        };
        let first = step(&mut *trainer, 0);
        (1..20).for_each(|at| drop(step(&mut *trainer, at)));
        let after = step(&mut *trainer, 20);
        trainer.checkpoint(&work.join("fm"), "1.0.0").unwrap();
        let fm = inference::load(&work.join("fm"), FmServingOptions::default()).unwrap();
        let served = |is_telling| {
            let examples = shown(is_telling, 30);
            fm.infer(&examples.iter().collect::<Vec<_>>()).unwrap()
        };
        assert_eq!(served(false), served(true), "serving does not see it");
        assert_eq!(fm.manifest().spec, spec, "a checkpoint says which they are");
        (first, after)
    };
    let ((first, after), (first_telling, after_telling)) = (trained(false), trained(true));
    let bits = |numbers: &[f32]| numbers.iter().map(|one| one.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&first), bits(&first_telling), "nor does a prediction before learning");
    assert_ne!(bits(&after), bits(&after_telling), "learning does");
}
