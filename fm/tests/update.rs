//! A model that is updated while it serves equals, after each update, a checkpoint of the same
//! weights, and never a mixture of two.

mod fixtures;

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use fixtures::{batch, config, spec};
use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    inference::{self, FmOutput, FmServingOptions, FoundationModel},
    spec::FmConfig,
    trainer::{self, FmTrainer},
    update::{TensorSlice, WeightUpdate},
};

/// Rows are removed when they have not been trained for four steps.
fn shifting() -> FmConfig {
    FmConfig { expire_after_steps: 4, average_decay: 0.9, ..config() }
}

fn step(trainer: &mut dyn FmTrainer, at: u64) {
    let examples = batch(at * 16);
    // Few, so that most rows rest.
    trainer.step(&examples.iter().take(1).collect::<Vec<&Example>>()).unwrap();
}

/// A complete update with all of a trainer's weights.
fn whole(trainer: &mut dyn FmTrainer) -> WeightUpdate {
    let trained = trainer.trained_weights("1.0.0").unwrap();
    let store = trained.rows.unwrap();
    let row_ids: Vec<u64> = store.ids().collect();
    let mut rows = vec![0.0; row_ids.len() * store.dim()];
    store.gather(&row_ids, &mut rows).unwrap();
    let whole_tensor = |dense: hypercast_fm::update::WeightTensor| TensorSlice {
        name: dense.name,
        shape: dense.shape,
        start: 0,
        values: dense.values,
    };
    let dense = trained.dense.into_iter().map(whole_tensor).collect();
    WeightUpdate {
        complete: true,
        manifest: trained.manifest,
        dense,
        row_ids,
        rows,
        removed_row_ids: vec![],
    }
}

/// An update with what changed since a generation of the store, and dense tensors in odd slices.
fn changed(trainer: &mut dyn FmTrainer, since: u64) -> (WeightUpdate, u64) {
    let all = whole(trainer);
    let trained = trainer.trained_weights("1.0.0").unwrap();
    let store = trained.rows.unwrap();
    let row_ids: Vec<u64> = store.changed_since(since).collect();
    let mut removed = store.removed_since(since).expect("the store was not reopened");
    removed.retain(|&id| !store.contains(id));
    removed.sort_unstable();
    removed.dedup();
    let mut rows = vec![0.0; row_ids.len() * store.dim()];
    store.gather(&row_ids, &mut rows).unwrap();
    let split = |tensor: &TensorSlice| -> Vec<TensorSlice> {
        let parts = tensor.values.chunks(37).enumerate();
        parts
            .map(|(at, values)| TensorSlice {
                start: at * 37,
                values: values.into(),
                ..tensor.clone()
            })
            .collect()
    };
    let dense = all.dense.iter().flat_map(split).collect();
    let removed_row_ids = removed;
    let update = WeightUpdate { complete: false, dense, row_ids, rows, removed_row_ids, ..all };
    (update, store.generation())
}

fn infer(fm: &dyn FoundationModel, examples: &[Example]) -> FmOutput {
    fm.infer(&examples.iter().collect::<Vec<_>>()).unwrap()
}

/// Options for a model whose updates encode so many histories.
fn warming(warmup_histories: usize) -> FmServingOptions {
    FmServingOptions { warmup_histories, ..FmServingOptions::default() }
}

/// Whether two outputs are equal up to rounding, which depends on what is encoded together.
fn same(a: &FmOutput, b: &FmOutput) -> bool {
    let all = |output: &FmOutput| [&output.tae[..], &output.main[..]].concat();
    let (a, b) = (all(a), all(b));
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
}

fn assert_is(fm: &dyn FoundationModel, checkpoint: &Path, what: &str) {
    let fresh = inference::load(checkpoint, FmServingOptions::default()).unwrap();
    for from in [0, 160, 9000] {
        let examples = batch(from);
        let (found, wanted) = (infer(fm, &examples), infer(&*fresh, &examples));
        match fm.cache_counts().warmup_tokens {
            0 => assert_eq!(found, wanted, "{what}, from {from}"),
            _ => assert!(same(&found, &wanted), "{what}, from {from}"),
        }
    }
    assert_eq!(*fm.current_manifest(), *fresh.manifest(), "{what}");
}

#[test]
fn after_every_update_the_model_equals_a_checkpoint_of_the_same_weights() {
    for warmup_histories in [0, 20, 512] {
        updates_are_checkpoints(warmup_histories);
    }
}

fn updates_are_checkpoints(warmup_histories: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut trainer =
        trainer::create(&path("work"), &shifting(), &spec(), DeviceKind::Cpu).unwrap();
    step(&mut *trainer, 0);
    trainer.checkpoint(&path("first"), "1.0.0").unwrap();
    let serving = warming(warmup_histories);
    let fm = inference::load_updatable(&path("first"), &path("live"), serving).unwrap();
    let mut generation = trainer.trained_weights("1.0.0").unwrap().rows.unwrap().generation();
    let (mut removed, mut at) = (0, 1);
    for round in 0..12 {
        for _ in 0..round % 4 {
            step(&mut *trainer, at * 3);
            at += 1;
        }
        let update = if round == 7 {
            generation = trainer.trained_weights("1.0.0").unwrap().rows.unwrap().generation();
            whole(&mut *trainer)
        } else {
            let (update, now) = changed(&mut *trainer, generation);
            generation = now;
            update
        };
        removed += update.removed_row_ids.len();
        fm.update(update).unwrap();
        trainer.checkpoint(&path("now"), "1.0.0").unwrap();
        assert_is(&*fm, &path("now"), &format!("round {round}"));
    }
    assert_eq!(fm.cache_counts().warmup_tokens > 0, warmup_histories > 0);
    assert!(removed > 10, "{removed} rows were removed: too few to test removal");
    whole(&mut *trainer).checkpoint(&path("made")).unwrap();
    assert_is(&*fm, &path("made"), "a checkpoint of what is published");
}

#[test]
fn a_pass_sees_all_of_one_generation() {
    for warmup_histories in [0, 512] {
        passes_see_one_generation(warmup_histories);
    }
}

fn passes_see_one_generation(warmup_histories: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut trainer =
        trainer::create(&path("work"), &shifting(), &spec(), DeviceKind::Cpu).unwrap();
    step(&mut *trainer, 0);
    let first = whole(&mut *trainer);
    (1..6).for_each(|at| step(&mut *trainer, at * 2));
    let second = whole(&mut *trainer);
    first.checkpoint(&path("first")).unwrap();
    second.checkpoint(&path("second")).unwrap();
    let examples = batch(32);
    let answers = ["first", "second"].map(|name| {
        infer(&*inference::load(&path(name), FmServingOptions::default()).unwrap(), &examples)
    });
    assert!(!same(&answers[0], &answers[1]));
    let serving = warming(warmup_histories);
    let fm = inference::load_updatable(&path("first"), &path("live"), serving).unwrap();
    let (stop, seen) = (AtomicBool::new(false), [AtomicUsize::new(0), AtomicUsize::new(0)]);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let answer = infer(&*fm, &examples);
                    let which = answers.iter().position(|one| same(one, &answer));
                    seen[which.expect("an output of neither generation")]
                        .fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..20 {
            let update = if round % 2 == 0 { &second } else { &first };
            // As a part, so that the rows that only the other has stay and nothing depends on them
            // being gone.
            fm.update(update.clone()).unwrap();
            let before = seen.each_ref().map(|seen| seen.load(Ordering::Relaxed));
            while seen.each_ref().map(|seen| seen.load(Ordering::Relaxed)) == before {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(seen.iter().all(|seen| seen.load(Ordering::Relaxed) > 0));
    assert_eq!(fm.cache_counts().warmup_tokens > 0, warmup_histories > 0);
}

/// Two sets of weights and a checkpoint of each; models start with the first.
struct TwoVersions {
    dir: tempfile::TempDir,
    second: WeightUpdate,
}

impl TwoVersions {
    fn train() -> TwoVersions {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        let mut trainer = trainer::create(&work, &config(), &spec(), DeviceKind::Cpu).unwrap();
        step(&mut *trainer, 0);
        whole(&mut *trainer).checkpoint(&dir.path().join("first")).unwrap();
        (1..6).for_each(|at| step(&mut *trainer, at * 2));
        let second = whole(&mut *trainer);
        second.checkpoint(&dir.path().join("second")).unwrap();
        TwoVersions { dir, second }
    }

    fn serve(&self, serving: FmServingOptions) -> Box<dyn FoundationModel> {
        let path = |name: &str| self.dir.path().join(name);
        inference::load_updatable(&path("first"), &path("live"), serving).unwrap()
    }

    fn update(&self, fm: &dyn FoundationModel) {
        fm.update(self.second.clone()).unwrap();
    }
}

/// Requests of distinct users with twelve events each.
fn users(count: u64) -> Vec<Example> {
    (0..count).map(|user| fixtures::example(12 + user * 13, &[1, 2, 3])).collect()
}

fn encoded_tokens(fm: &dyn FoundationModel) -> u64 {
    fm.cache_counts().encoded_tokens
}

#[test]
fn an_update_encodes_the_histories_of_recent_users() {
    let two = TwoVersions::train();
    let fresh =
        inference::load(&two.dir.path().join("second"), FmServingOptions::default()).unwrap();
    let fm = two.serve(FmServingOptions::default());
    let mut recent = users(20);
    infer(&*fm, &recent);
    two.update(&*fm);
    assert_eq!(encoded_tokens(&*fm), 20 * 12);
    assert_eq!(fm.cache_counts().warmup_tokens, 20 * 12);
    let (last, others) = recent.split_last_mut().unwrap();
    assert!(same(&infer(&*fm, others), &infer(&*fresh, others)), "as a freshly loaded checkpoint");
    assert_eq!(encoded_tokens(&*fm), 20 * 12, "all of it was encoded before the request");
    last.history.push(others[0].history[3].clone());
    let last = std::slice::from_ref(last);
    assert!(same(&infer(&*fm, last), &infer(&*fresh, last)), "a history that grew");
    assert_eq!(encoded_tokens(&*fm), 20 * 12 + 1, "only the new event is encoded");
    two.update(&*fm);
    assert_eq!(
        fm.cache_counts().warmup_tokens,
        2 * 20 * 12 + 1,
        "and the next update encodes it too"
    );
}

#[test]
fn without_warmup_an_update_encodes_nothing() {
    let two = TwoVersions::train();
    for serving in [warming(0), FmServingOptions { history_cache_bytes: 0, ..warming(512) }] {
        let fm = two.serve(serving);
        infer(&*fm, &users(20));
        two.update(&*fm);
        let counts = fm.cache_counts();
        assert_eq!((counts.warmup_tokens, counts.bytes), (0, 0));
        infer(&*fm, &users(20));
        assert_eq!(encoded_tokens(&*fm), 2 * 20 * 12);
    }
}

#[test]
fn warmup_is_limited_to_the_most_recent_users() {
    let two = TwoVersions::train();
    let fm = two.serve(warming(5));
    let all = users(20);
    // A user with many requests leaves room for others.
    for user in all.iter().chain(&[&all[19]; 3].map(Clone::clone)) {
        infer(&*fm, std::slice::from_ref(user));
    }
    two.update(&*fm);
    assert_eq!(fm.cache_counts().warmup_tokens, 5 * 12);
    infer(&*fm, &all[15..]);
    assert_eq!(encoded_tokens(&*fm), 20 * 12);
    infer(&*fm, &all[..15]);
    assert_eq!(encoded_tokens(&*fm), (20 + 15) * 12);
}

#[test]
fn warmup_fills_at_most_a_quarter_of_the_cache() {
    let two = TwoVersions::train();
    let one = two.serve(FmServingOptions::default());
    infer(&*one, &users(1));
    // Room for half of the 200 histories below.
    let bytes = 100 * one.cache_counts().bytes as usize;
    let fm =
        two.serve(FmServingOptions { history_cache_bytes: bytes, ..FmServingOptions::default() });
    for round in 0..3 {
        for user in users(200) {
            infer(&*fm, &[user]);
            assert!(fm.cache_counts().bytes <= bytes as u64, "round {round}");
        }
        two.update(&*fm);
        let warm = fm.cache_counts().bytes;
        assert!(0 < warm && warm <= bytes as u64 / 4, "round {round}: {warm} of {bytes} bytes");
    }
}

#[test]
fn an_update_that_does_not_fit_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut trainer = trainer::create(&path("work"), &config(), &spec(), DeviceKind::Cpu).unwrap();
    step(&mut *trainer, 0);
    let first = whole(&mut *trainer);
    first.checkpoint(&path("first")).unwrap();
    step(&mut *trainer, 1);
    let good = whole(&mut *trainer);
    let fixed = inference::load(&path("first"), FmServingOptions::default()).unwrap();
    assert!(fixed.update(good.clone()).is_err(), "it was not loaded for updates");
    let fm = inference::load_updatable(&path("first"), &path("live"), FmServingOptions::default())
        .unwrap();
    let refused = |change: &dyn Fn(&mut WeightUpdate), why: &str| {
        let mut update = good.clone();
        change(&mut update);
        let error = fm.update(update).unwrap_err().to_string();
        assert!(error.contains(why), "{error:?} should say {why:?}");
        assert_is(&*fm, &path("first"), why);
    };
    refused(&|u| u.rows[3] = f32::NAN, "not finite");
    refused(&|u| u.dense[0].values[0] = f32::INFINITY, "not finite");
    refused(&|u| u.rows.truncate(5), "values for");
    refused(&|u| (u.complete, u.dense[1].name) = (false, "nobody".into()), "nobody");
    refused(&|u| u.dense[1].shape.push(1), "in the model");
    refused(&|u| u.dense[1].start = usize::MAX, "has no");
    refused(&|u| _ = u.dense.pop(), "missing");
    // A shape that exceeds memory, without values.
    let boundless =
        TensorSlice { name: "huge".into(), shape: vec![1 << 44], start: 0, values: vec![] };
    refused(&|u| u.dense.push(boundless.clone()), "only a part");
    refused(&|u| u.dense[0].shape.insert(0, 1 << 44), "only a part");
    refused(&|u| u.removed_row_ids.push(u.row_ids[0]), "both changed and removed");
    refused(&|u| u.manifest.version = "2.0.0".into(), "version");
    refused(&|u| u.manifest.config.dim = 32, "configuration");
    refused(&|u| u.manifest.spec.actions = 2, "specification");
    fm.update(good).unwrap();
}

#[test]
fn corrections_are_learned_and_not_in_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let new = |name: &str| {
        trainer::create(&dir.path().join(name), &config(), &spec(), DeviceKind::Cpu).unwrap()
    };
    let (mut with, mut without) = (new("a"), new("b"));
    let (examples, late) = (batch(0), batch(400));
    let (examples, late): (Vec<&Example>, Vec<&Example>) =
        (examples.iter().collect(), late.iter().collect());
    let (a, b) =
        (with.step_with_corrections(&examples, &late).unwrap(), without.step(&examples).unwrap());
    assert_eq!(a.predictions.len(), b.predictions.len());
    for (a, b) in a.predictions.iter().zip(&b.predictions).filter(|(a, _)| !a.is_nan()) {
        assert!(
            (a - b).abs() < 1e-6,
            "predictions of examples do not depend on corrections: {a} and {b}"
        );
    }
    let (a, b) = (with.trained_weights("1").unwrap(), without.trained_weights("1").unwrap());
    assert_ne!(a.dense, b.dense, "corrections change the weights");
    assert_eq!(a.manifest, b.manifest, "requests and statistics do not count them");
}

#[test]
fn a_model_whose_store_was_cut_says_so_until_it_is_loaded_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut trainer = trainer::create(&path("work"), &config(), &spec(), DeviceKind::Cpu).unwrap();
    step(&mut *trainer, 0);
    whole(&mut *trainer).checkpoint(&path("first")).unwrap();
    let load = || {
        inference::load_updatable(&path("first"), &path("live"), FmServingOptions::default())
            .unwrap()
    };
    let fm = load();
    let slab = path("live").join("rows-00000.slab");
    let content = std::fs::read(&slab).unwrap();
    std::fs::write(&slab, []).unwrap();
    assert!(fm.infer(&[&batch(0)[0]]).is_err());
    std::fs::write(&slab, &content).unwrap();
    fm.check_files().unwrap();
    assert_is(&*fm, &path("first"), "the file is as it was");
    step(&mut *trainer, 1);
    let update = whole(&mut *trainer);
    update.checkpoint(&path("second")).unwrap();
    for _ in 0..2 {
        // What its writer read meanwhile may have been zeros.
        fm.update(update.clone()).unwrap_err();
        let why = fm.check_files().unwrap_err().to_string();
        assert!(why.contains("rows-00000.slab") && why.contains("loaded again"), "{why}");
        assert_is(&*fm, &path("first"), "the old weights stay in service");
    }
    drop(fm);
    let fm = load();
    fm.update(update).unwrap();
    fm.check_files().unwrap();
    assert_is(&*fm, &path("second"), "loaded again");
}
