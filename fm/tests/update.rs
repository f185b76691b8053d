//! A model that takes updates while it serves is, after each, the checkpoint of the same weights, and never
//! anything between two of them.

mod world;

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    inference::{self, FmOutput, FoundationModel, Serving},
    spec::FmConfig,
    trainer::{self, FmTrainer},
    update::{Piece, Update},
};
use world::{batch, config, spec};

/// Rows come late and go again.
fn shifting() -> FmConfig {
    FmConfig { expire_after_steps: 4, average_decay: 0.9, ..config() }
}

fn step(trainer: &mut dyn FmTrainer, at: u64) {
    let examples = batch(at * 16);
    // Few, so that most rows rest.
    trainer.step(&examples.iter().take(1).collect::<Vec<&Example>>()).unwrap();
}

/// Everything that a trainer has.
fn whole(trainer: &mut dyn FmTrainer) -> Update {
    let trained = trainer.trained("1.0.0").unwrap();
    let ids: Vec<u64> = trained.rows.ids().collect();
    let mut rows = vec![0.0; ids.len() * trained.rows.dim()];
    trained.rows.gather(&ids, &mut rows);
    let piece = |dense: hypercast_fm::update::Dense| Piece {
        name: dense.name,
        shape: dense.shape,
        start: 0,
        values: dense.values,
    };
    let pieces = trained.dense.into_iter().map(piece).collect();
    Update { whole: true, manifest: trained.manifest, pieces, ids, rows, removed: vec![] }
}

/// What changed since a generation of the store, with dense tensors in pieces of odd sizes.
fn changed(trainer: &mut dyn FmTrainer, since: u64) -> (Update, u64) {
    let all = whole(trainer);
    let trained = trainer.trained("1.0.0").unwrap();
    let ids: Vec<u64> = trained.rows.changed_since(since).collect();
    let mut removed = trained.rows.removed_since(since).expect("the store was not reopened");
    removed.retain(|&id| !trained.rows.contains(id));
    removed.sort_unstable();
    removed.dedup();
    let mut rows = vec![0.0; ids.len() * trained.rows.dim()];
    trained.rows.gather(&ids, &mut rows);
    let cut = |piece: &Piece| -> Vec<Piece> {
        let parts = piece.values.chunks(37).enumerate();
        parts
            .map(|(at, values)| Piece { start: at * 37, values: values.into(), ..piece.clone() })
            .collect()
    };
    let pieces = all.pieces.iter().flat_map(cut).collect();
    let update = Update { whole: false, pieces, ids, rows, removed, ..all };
    (update, trained.rows.generation())
}

fn said(fm: &dyn FoundationModel, examples: &[Example]) -> FmOutput {
    fm.infer(&examples.iter().collect::<Vec<_>>()).unwrap()
}

/// With so many histories that an update encodes.
fn warming(warm_histories: usize) -> Serving {
    Serving { warm_histories, ..Serving::default() }
}

/// Whether two answers are the same, up to the rounding that depends on what is encoded together.
fn same(a: &FmOutput, b: &FmOutput) -> bool {
    let all = |output: &FmOutput| [&output.tae[..], &output.main[..]].concat();
    let (a, b) = (all(a), all(b));
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
}

fn assert_is(fm: &dyn FoundationModel, checkpoint: &Path, what: &str) {
    let fresh = inference::load(checkpoint, Serving::default()).unwrap();
    for from in [0, 160, 9000] {
        let examples = batch(from);
        let (found, wanted) = (said(fm, &examples), said(&*fresh, &examples));
        match fm.cache_counts().warmed_tokens {
            0 => assert_eq!(found, wanted, "{what}, from {from}"),
            _ => assert!(same(&found, &wanted), "{what}, from {from}"),
        }
    }
    assert_eq!(*fm.now(), *fresh.manifest(), "{what}");
}

#[test]
fn after_every_update_it_is_the_checkpoint_of_the_same_weights() {
    for warm_histories in [0, 20, 512] {
        updates_are_checkpoints(warm_histories);
    }
}

fn updates_are_checkpoints(warm_histories: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut trainer =
        trainer::create(&path("work"), &shifting(), &spec(), DeviceKind::Cpu).unwrap();
    step(&mut *trainer, 0);
    trainer.checkpoint(&path("first"), "1.0.0").unwrap();
    let serving = warming(warm_histories);
    let fm = inference::load_live(&path("first"), &path("live"), serving).unwrap();
    let mut generation = trainer.trained("1.0.0").unwrap().rows.generation();
    let (mut removed, mut at) = (0, 1);
    for round in 0..12 {
        for _ in 0..round % 4 {
            step(&mut *trainer, at * 3);
            at += 1;
        }
        let update = if round == 7 {
            generation = trainer.trained("1.0.0").unwrap().rows.generation();
            whole(&mut *trainer)
        } else {
            let (update, now) = changed(&mut *trainer, generation);
            generation = now;
            update
        };
        removed += update.removed.len();
        fm.update(update).unwrap();
        trainer.checkpoint(&path("now"), "1.0.0").unwrap();
        assert_is(&*fm, &path("now"), &format!("round {round}"));
    }
    assert_eq!(fm.cache_counts().warmed_tokens > 0, warm_histories > 0);
    assert!(removed > 10, "{removed} rows were removed: too few to see that they are gone");
    whole(&mut *trainer).checkpoint(&path("made")).unwrap();
    assert_is(&*fm, &path("made"), "a checkpoint of what is published");
}

#[test]
fn a_pass_sees_all_of_one_generation() {
    for warm_histories in [0, 512] {
        passes_see_one_generation(warm_histories);
    }
}

fn passes_see_one_generation(warm_histories: usize) {
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
    let answers = ["first", "second"]
        .map(|name| said(&*inference::load(&path(name), Serving::default()).unwrap(), &examples));
    assert!(!same(&answers[0], &answers[1]));
    let serving = warming(warm_histories);
    let fm = inference::load_live(&path("first"), &path("live"), serving).unwrap();
    let (stop, seen) = (AtomicBool::new(false), [AtomicUsize::new(0), AtomicUsize::new(0)]);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let answer = said(&*fm, &examples);
                    let which = answers.iter().position(|one| same(one, &answer));
                    seen[which.expect("an answer of neither generation")]
                        .fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..20 {
            let update = if round % 2 == 0 { &second } else { &first };
            // As a part, so that the rows that only the other has stay and nothing depends on them being gone.
            fm.update(update.clone()).unwrap();
            let before = seen.each_ref().map(|seen| seen.load(Ordering::Relaxed));
            while seen.each_ref().map(|seen| seen.load(Ordering::Relaxed)) == before {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(seen.iter().all(|seen| seen.load(Ordering::Relaxed) > 0));
    assert_eq!(fm.cache_counts().warmed_tokens > 0, warm_histories > 0);
}

/// Two sets of weights, and a model that serves the first of them.
struct Two {
    dir: tempfile::TempDir,
    second: Update,
}

impl Two {
    fn learn() -> Two {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        let mut trainer = trainer::create(&work, &config(), &spec(), DeviceKind::Cpu).unwrap();
        step(&mut *trainer, 0);
        whole(&mut *trainer).checkpoint(&dir.path().join("first")).unwrap();
        (1..6).for_each(|at| step(&mut *trainer, at * 2));
        let second = whole(&mut *trainer);
        second.checkpoint(&dir.path().join("second")).unwrap();
        Two { dir, second }
    }

    fn serve(&self, serving: Serving) -> Box<dyn FoundationModel> {
        let path = |name: &str| self.dir.path().join(name);
        inference::load_live(&path("first"), &path("live"), serving).unwrap()
    }

    fn update(&self, fm: &dyn FoundationModel) {
        fm.update(self.second.clone()).unwrap();
    }
}

/// Users of which each has twelve events.
fn users(count: u64) -> Vec<Example> {
    (0..count).map(|user| world::example(12 + user * 13, &[1, 2, 3])).collect()
}

fn new_tokens(fm: &dyn FoundationModel) -> u64 {
    fm.cache_counts().new_tokens
}

#[test]
fn an_update_knows_the_histories_of_recent_users() {
    let two = Two::learn();
    let fresh = inference::load(&two.dir.path().join("second"), Serving::default()).unwrap();
    let fm = two.serve(Serving::default());
    let mut recent = users(20);
    said(&*fm, &recent);
    two.update(&*fm);
    assert_eq!(new_tokens(&*fm), 20 * 12);
    assert_eq!(fm.cache_counts().warmed_tokens, 20 * 12);
    let (last, others) = recent.split_last_mut().unwrap();
    assert!(same(&said(&*fm, others), &said(&*fresh, others)), "as a freshly loaded checkpoint");
    assert_eq!(new_tokens(&*fm), 20 * 12, "all of it was encoded before it was asked for");
    last.history.push(others[0].history[3].clone());
    let last = std::slice::from_ref(last);
    assert!(same(&said(&*fm, last), &said(&*fresh, last)), "a history that grew");
    assert_eq!(new_tokens(&*fm), 20 * 12 + 1, "what is new of it is encoded");
    two.update(&*fm);
    assert_eq!(fm.cache_counts().warmed_tokens, 2 * 20 * 12 + 1, "and is known to the next update");
}

#[test]
fn without_warm_histories_an_update_encodes_none() {
    let two = Two::learn();
    for serving in [warming(0), Serving { history_cache_bytes: 0, ..warming(512) }] {
        let fm = two.serve(serving);
        said(&*fm, &users(20));
        two.update(&*fm);
        let counts = fm.cache_counts();
        assert_eq!((counts.warmed_tokens, counts.bytes), (0, 0));
        said(&*fm, &users(20));
        assert_eq!(new_tokens(&*fm), 2 * 20 * 12);
    }
}

#[test]
fn an_update_knows_no_more_users_than_it_may_and_the_last_ones() {
    let two = Two::learn();
    let fm = two.serve(warming(5));
    let all = users(20);
    // A user who asks often leaves room for others.
    for user in all.iter().chain(&[&all[19]; 3].map(Clone::clone)) {
        said(&*fm, std::slice::from_ref(user));
    }
    two.update(&*fm);
    assert_eq!(fm.cache_counts().warmed_tokens, 5 * 12);
    said(&*fm, &all[15..]);
    assert_eq!(new_tokens(&*fm), 20 * 12);
    said(&*fm, &all[..15]);
    assert_eq!(new_tokens(&*fm), (20 + 15) * 12);
}

#[test]
fn an_update_takes_a_quarter_of_the_cache_at_most() {
    let two = Two::learn();
    let one = two.serve(Serving::default());
    said(&*one, &users(1));
    // Of twelve events, for half of which it has room.
    let bytes = 100 * one.cache_counts().bytes as usize;
    let fm = two.serve(Serving { history_cache_bytes: bytes, ..Serving::default() });
    for round in 0..3 {
        for user in users(200) {
            said(&*fm, &[user]);
            assert!(fm.cache_counts().bytes <= bytes as u64, "round {round}");
        }
        two.update(&*fm);
        let warm = fm.cache_counts().bytes;
        assert!(0 < warm && warm <= bytes as u64 / 4, "round {round}: {warm} of {bytes} bytes");
    }
}

#[test]
fn what_does_not_fit_is_refused_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut trainer = trainer::create(&path("work"), &config(), &spec(), DeviceKind::Cpu).unwrap();
    step(&mut *trainer, 0);
    let first = whole(&mut *trainer);
    first.checkpoint(&path("first")).unwrap();
    step(&mut *trainer, 1);
    let good = whole(&mut *trainer);
    let fixed = inference::load(&path("first"), Serving::default()).unwrap();
    assert!(fixed.update(good.clone()).is_err(), "it was not loaded for updates");
    let fm = inference::load_live(&path("first"), &path("live"), Serving::default()).unwrap();
    let refused = |change: &dyn Fn(&mut Update), why: &str| {
        let mut update = good.clone();
        change(&mut update);
        let error = fm.update(update).unwrap_err().to_string();
        assert!(error.contains(why), "{error:?} should say {why:?}");
        assert_is(&*fm, &path("first"), why);
    };
    refused(&|u| u.rows[3] = f32::NAN, "not finite");
    refused(&|u| u.pieces[0].values[0] = f32::INFINITY, "not finite");
    refused(&|u| u.rows.truncate(5), "values for");
    refused(&|u| (u.whole, u.pieces[1].name) = (false, "nobody".into()), "nobody");
    refused(&|u| u.pieces[1].shape.push(1), "in the model");
    refused(&|u| u.pieces[1].start = usize::MAX, "has no");
    refused(&|u| _ = u.pieces.pop(), "missing");
    // A shape that would not fit into memory, whose values are not there.
    let boundless = Piece { name: "huge".into(), shape: vec![1 << 44], start: 0, values: vec![] };
    refused(&|u| u.pieces.push(boundless.clone()), "only a part");
    refused(&|u| u.pieces[0].shape.insert(0, 1 << 44), "only a part");
    refused(&|u| u.removed.push(u.ids[0]), "both there and gone");
    refused(&|u| u.manifest.version = "2.0.0".into(), "version");
    refused(&|u| u.manifest.config.dim = 32, "configuration");
    refused(&|u| u.manifest.spec.actions = 2, "specification");
    fm.update(good).unwrap();
}

#[test]
fn corrections_teach_and_are_not_told() {
    let dir = tempfile::tempdir().unwrap();
    let new = |name: &str| {
        trainer::create(&dir.path().join(name), &config(), &spec(), DeviceKind::Cpu).unwrap()
    };
    let (mut with, mut without) = (new("a"), new("b"));
    let (examples, late) = (batch(0), batch(400));
    let (examples, late): (Vec<&Example>, Vec<&Example>) =
        (examples.iter().collect(), late.iter().collect());
    let (a, b) = (with.step_with(&examples, &late).unwrap(), without.step(&examples).unwrap());
    assert_eq!(a.predictions.len(), b.predictions.len());
    for (a, b) in a.predictions.iter().zip(&b.predictions).filter(|(a, _)| !a.is_nan()) {
        assert!(
            (a - b).abs() < 1e-6,
            "what is said of examples does not depend on corrections: {a} and {b}"
        );
    }
    let (a, b) = (with.trained("1").unwrap(), without.trained("1").unwrap());
    assert_ne!(a.dense, b.dense, "corrections teach");
    assert_eq!(a.manifest, b.manifest, "neither requests nor statistics count them");
}
