//! The FM through its public doors: what it must be whatever its weights.

use std::sync::Arc;

use hypercast_fm::{
    device::DeviceKind,
    example::{Event, Example, Item, Outcome, Target, User},
    inference,
    metrics::{Scored, summarise},
    spec::{FmConfig, FmSpec, Label, TaskSpec},
    trainer,
};

fn spec() -> FmSpec {
    let task = |name: &str, main, label, surfaces: [bool; 2]| TaskSpec {
        name: name.into(),
        main,
        label,
        surfaces: surfaces.into(),
        weight: 1.0,
    };
    FmSpec {
        surfaces: vec!["home".into(), "shop".into()],
        actions: 1,
        values: 1,
        item_ids: 1,
        item_dense: 0,
        profile_ids: vec![],
        features: 1,
        tasks: vec![
            task("click", true, Label::Action(0), [true, true]),
            task("watch", false, Label::Value(0), [true, false]),
        ],
    }
}

fn config() -> FmConfig {
    FmConfig {
        dim: 16,
        heads: 2,
        qk_dim: 8,
        v_dim: 8,
        embedding_dim: 8,
        max_history: 16,
        warmup_steps: 1,
        learning_rate: 5e-3,
        sparse_learning_rate: 0.1,
        ..FmConfig::default()
    }
}

/// A user clicks items of the parity that the user's past clicks have.
fn example(request: u64, targets: &[u64]) -> Example {
    let likes = request % 2;
    let outcome = |id: u64| Outcome {
        actions: u32::from(id % 2 == likes),
        known: 1,
        values: [(id % 2) as f32, f32::NAN, f32::NAN, f32::NAN],
    };
    let item = |id: u64| Arc::new(Item { id, ids: vec![id % 7], dense: vec![] });
    let event = |i: u64| {
        let id = (request * 31 + i * 17) % 40;
        Event {
            item: item(id),
            surface: (i % 2) as u16,
            time_ms: i as i64 * 60_000,
            outcome: outcome(id),
        }
    };
    let target = |&id: &u64| Target {
        item: item(id),
        ids: vec![],
        features: vec![1.0],
        outcome: outcome(id),
        truth: vec![],
    };
    Example {
        request,
        user: Arc::new(User { id: request, ..User::default() }),
        surface: (request / 2 % 2) as u16,
        time_ms: 3_600_000,
        history: (0..request % 13).map(event).collect(),
        targets: targets.iter().map(target).collect(),
    }
}

fn batch(from: u64) -> Vec<Example> {
    (from..from + 16)
        .map(|r| example(r, &[(r * 7) % 40, (r * 13 + 1) % 40, (r * 3 + 2) % 40]))
        .collect()
}

#[test]
fn it_learns_what_only_the_history_tells() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer::create(dir.path(), &config(), &spec(), DeviceKind::Cpu).unwrap();
    let mut late = Vec::new();
    for step in 0..250 {
        let examples = batch(step * 16);
        let references: Vec<&Example> = examples.iter().collect();
        let said = trainer.step(&references).unwrap();
        let rows = examples.iter().flat_map(|e| std::iter::repeat_n(e, 3));
        for (row, example) in rows.enumerate() {
            let on_shop = example.surface == 1;
            assert_eq!(
                said.predictions[row * 2 + 1].is_nan(),
                on_shop,
                "watch is valid on home alone"
            );
            assert_eq!(said.mask[row * 2 + 1], !on_shop);
            if step >= 200 && example.history.len() > 3 {
                let (probability, label) = (said.predictions[row * 2], said.labels[row * 2] == 1.0);
                late.push(Scored { user: example.user.id, probability, label });
            }
        }
    }
    let summary = summarise(&late);
    assert!(summary.ne.unwrap() < 0.5, "progressive NE {:?}", summary.ne);
}

#[test]
fn a_checkpoint_serves_what_the_trainer_predicts_and_targets_do_not_meet() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = trainer::create(dir.path(), &config(), &spec(), DeviceKind::Cpu).unwrap();
    for step in 0..20 {
        let examples = batch(step * 16);
        trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
    }
    let checkpoint = dir.path().join("fm-1");
    trainer.checkpoint(&checkpoint, "1.2.0").unwrap();
    trainer.checkpoint(&checkpoint, "1.2.0").unwrap();
    let served = inference::load(&checkpoint, DeviceKind::Cpu).unwrap();
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

    // Another target beside it changes nothing, bit for bit.
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
    let served = inference::load(&checkpoint, DeviceKind::Cpu).unwrap();
    assert_eq!(served.infer(&[&example(5, &[])]).unwrap().tae.len(), 0);
    let newcomer = example(0, &[1, 2]);
    assert!(newcomer.history.is_empty());
    let answer = served.infer(&[&newcomer, &example(5, &[])]).unwrap();
    assert_eq!(answer.main.len(), 2);
    assert!(answer.tae.iter().all(|v| v.is_finite()));
    // Nobody in the batch has a history.
    assert_eq!(served.infer(&[&newcomer]).unwrap().tae.len(), answer.tae.len());
    assert_eq!(trainer.step(&[&newcomer]).unwrap().tae.len(), answer.tae.len());
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
    let error = inference::load(&checkpoint, DeviceKind::Cpu).err().unwrap().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    std::fs::remove_file(checkpoint.join("fm.json")).unwrap();
    let error = inference::load(&checkpoint, DeviceKind::Cpu).err().unwrap().to_string();
    assert!(error.contains("hypercast train fm"), "{error}");
}

#[test]
fn looking_at_a_model_teaches_it_nothing_and_sees_what_it_serves() {
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
    let served = inference::load(&checkpoint, DeviceKind::Cpu).unwrap();
    let examples = batch(4);
    let references: Vec<&Example> = examples.iter().collect();
    let said = watched.predict(&references).unwrap();
    let answer = served.infer(&references).unwrap();
    assert!(said.tae.iter().zip(&answer.tae).all(|(a, b)| (a - b).abs() < 1e-6));
    let main: Vec<f32> = said.predictions.iter().step_by(2).copied().collect();
    assert!(main.iter().zip(&answer.main).all(|(a, b)| (a - b).abs() < 1e-6));
    // What step says of the same examples before it learns from them.
    let stepped = watched.step(&references).unwrap();
    assert_eq!((&said.labels, &said.mask), (&stepped.labels, &stepped.mask));
    for (a, b) in said.predictions.iter().zip(&stepped.predictions) {
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
