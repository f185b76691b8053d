//! Caching, micro-batches and batching do not change the results of one joint, uncached pass.

mod fixtures;

use std::sync::Arc;

use fixtures::{batch, config, spec};
use hypercast_fm::{
    device::DeviceKind,
    example::{Event, Example, Item},
    inference::{self, FmOutput, FmServingOptions, FoundationModel},
    spec::{FmConfig, FmSpec},
    trainer,
};

/// A briefly trained model with all biases and a window.
fn served(history_cache_bytes: usize) -> Box<dyn FoundationModel> {
    served_as(history_cache_bytes, Some(0))
}

fn served_as(
    history_cache_bytes: usize,
    history_anchors: Option<usize>,
) -> Box<dyn FoundationModel> {
    let config = FmConfig {
        history_anchors,
        layers: 3,
        window: 6,
        global: 2,
        position_buckets: 8,
        time_buckets: 12,
        ..config()
    };
    trained(&config, &spec(), history_cache_bytes, |_| {})
}

/// A briefly trained model of the fixtures' examples, which `complete` changes.
fn trained(
    config: &FmConfig,
    spec: &FmSpec,
    history_cache_bytes: usize,
    complete: impl Fn(&mut Example),
) -> Box<dyn FoundationModel> {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer =
        trainer::create(&dir.path().join("work"), config, spec, DeviceKind::Cpu).unwrap();
    for step in 0..10 {
        let mut examples = batch(step * 16);
        examples.iter_mut().for_each(&complete);
        trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
    }
    let checkpoint = dir.path().join("fm");
    trainer.checkpoint(&checkpoint, "1.0.0").unwrap();
    let serving = FmServingOptions { history_cache_bytes, ..FmServingOptions::default() };
    inference::load(&checkpoint, serving).unwrap()
}

fn assert_same(found: &FmOutput, plain: &FmOutput, what: &str) {
    assert_eq!((found.tae.len(), found.main.len()), (plain.tae.len(), plain.main.len()), "{what}");
    let all =
        |output: &FmOutput| output.tae.iter().chain(&output.main).copied().collect::<Vec<f32>>();
    for (at, (found, plain)) in all(found).iter().zip(all(plain)).enumerate() {
        assert!((found - plain).abs() < 1e-5, "{what}: at {at}, {found} should be {plain}");
    }
}

fn check(fm: &dyn FoundationModel, examples: &[Example], what: &str) {
    let references: Vec<&Example> = examples.iter().collect();
    let plain = fm.infer_uncached(&references).unwrap();
    assert!(plain.tae.iter().any(|value| value.abs() > 0.01), "{what}: nothing to compare");
    assert_same(&fm.infer(&references).unwrap(), &plain, what);
}

/// Request `request` with the given numbers of events and candidates.
fn sized(request: u64, events: usize, candidates: u64) -> Example {
    let mut example = fixtures::example(request, &(0..candidates).collect::<Vec<_>>());
    let mut models = (request + 2..).map(|request| fixtures::example(request, &[1]).history);
    let model = models.find(|history| history.len() > 2).expect("most users have a history");
    example.history = (0..events)
        .map(|at| Event { time_ms: at as i64 * 90_000, ..model[at % model.len()].clone() })
        .collect();
    example.time_ms = events as i64 * 90_000 + 1;
    example
}

#[test]
fn growing_histories_are_extended_and_not_encoded_again() {
    let fm = served(64 << 20);
    for events in [3, 3, 4, 9, 15, 16] {
        check(&*fm, &[sized(40, events, 5)], &format!("{events} events"));
    }
    let counts = fm.cache_counts();
    assert_eq!((counts.encoded_tokens, counts.full_hits), (16, 1), "{counts:?}");
    assert_eq!(counts.cached_tokens, 3 + 3 + 4 + 9 + 15);
    assert!(counts.bytes > 0);
}

#[test]
fn a_history_that_changed_is_encoded_from_the_change_on() {
    let fm = served(64 << 20);
    let mut request = sized(41, 10, 4);
    check(&*fm, std::slice::from_ref(&request), "at first");
    // An outcome that became known later.
    request.history[6].outcome.actions ^= 1;
    check(&*fm, std::slice::from_ref(&request), "a late outcome");
    assert_eq!(fm.cache_counts().encoded_tokens, 10 + 4);
    // An item whose features changed.
    request.history[8].item = Arc::new(Item { ids: vec![5], ..(*request.history[8].item).clone() });
    check(&*fm, std::slice::from_ref(&request), "another item");
    assert_eq!(fm.cache_counts().encoded_tokens, 14 + 2);
    // An equal item in another allocation.
    request.history[1].item = Arc::new((*request.history[1].item).clone());
    check(&*fm, std::slice::from_ref(&request), "an equal item");
    assert_eq!(fm.cache_counts().encoded_tokens, 16);
    // An older request of the same user.
    request.history.truncate(5);
    check(&*fm, std::slice::from_ref(&request), "an older request");
    assert_eq!(fm.cache_counts().encoded_tokens, 16);
}

#[test]
fn a_history_beyond_the_maximum_slides() {
    let fm = served(64 << 20);
    for events in 14..22 {
        check(&*fm, &[sized(42, events, 3)], &format!("{events} events of 16"));
    }
}

#[test]
fn a_history_that_begins_at_an_anchor_is_extended() {
    let [sliding, usual, anchored] =
        [Some(0), None, Some(8)].map(|anchors| served_as(64 << 20, anchors));
    for events in 16..80 {
        for fm in [&sliding, &usual, &anchored] {
            // A server keeps no more events than the model reads.
            let mut request = sized(43, events, 3);
            request.history.drain(..events - 16);
            check(&**fm, &[request], &format!("{events} events"));
        }
    }
    let encoded_tokens = |fm: &dyn FoundationModel| fm.cache_counts().encoded_tokens;
    assert_eq!(encoded_tokens(&*sliding), 64 * 16, "each event encodes the whole history again");
    // An eighth of 16 events are two candidates for the first one.
    for (fm, most) in [(usual, 64 * 16 * 3 / 4), (anchored, 64 * 16 / 2)] {
        let encoded_tokens = encoded_tokens(&*fm);
        assert!(encoded_tokens < most, "{encoded_tokens} tokens were encoded");
    }
}

#[test]
fn micro_batches_and_batches_of_requests_change_nothing() {
    let fm = served(64 << 20);
    let requests: Vec<Example> = [(0, 7), (5, 300), (16, 1), (9, 0), (30, 129), (16, 40)]
        .into_iter()
        .enumerate()
        .map(|(at, (events, candidates))| sized(50 + at as u64, events, candidates))
        .collect();
    check(&*fm, &requests, "cold");
    check(&*fm, &requests, "warm");
    let references: Vec<&Example> = requests.iter().collect();
    let together = fm.infer(&references).unwrap();
    let alone: Vec<FmOutput> =
        references.iter().map(|request| fm.infer(&[*request]).unwrap()).collect();
    let alone = FmOutput {
        tae: alone.iter().flat_map(|output| output.tae.clone()).collect(),
        main: alone.iter().flat_map(|output| output.main.clone()).collect(),
    };
    assert_same(&together, &alone, "together and alone");
}

#[test]
fn what_candidates_have_in_common_is_computed_once_and_changes_nothing() {
    for (features, profile_ids) in [(3, vec![0, 2]), (0, vec![0, 2]), (3, vec![])] {
        let what = format!("{features} features, profiles {profile_ids:?}");
        let spec = FmSpec { features, profile_ids, ..spec() };
        // Two of three columns of ids are of the user and a context, which changes on the way.
        let complete = |example: &mut Example| {
            let user = example.user.id;
            for (at, target) in example.targets.iter_mut().enumerate() {
                target.ids = vec![1 + user % 5, target.item.id, 1 + at as u64 / 4 % 2];
                target.features =
                    (0..features).map(|column| (at * 7 % 5 + column) as f32).collect();
            }
        };
        let fm = trained(&config(), &spec, 64 << 20, complete);
        let requests = [(3, 30), (0, 5), (16, 150)].into_iter().zip(60..);
        let requests: Vec<Example> = requests
            .map(|((events, candidates), request)| {
                let mut request = sized(request, events, candidates);
                complete(&mut request);
                request
            })
            .collect();
        check(&*fm, &requests, &what);
    }
}

#[test]
fn a_full_cache_evicts_and_does_not_change_results() {
    let fm = served(40 << 10);
    for round in 0..3 {
        for user in 0..60 {
            check(&*fm, &[sized(user, 16, 2)], &format!("round {round}, user {user}"));
            assert!(fm.cache_counts().bytes <= 40 << 10);
        }
    }
    let without = served(0);
    check(&*without, &[sized(1, 16, 2)], "no cache");
    assert_eq!(without.cache_counts().bytes, 0);
}

#[test]
fn threads_that_share_users_get_the_same_results() {
    let fm = served(64 << 20);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let fm = &fm;
            scope.spawn(move || {
                for step in 0..40 {
                    let (user, events) = (step % 3, 1 + (step as usize * 7 + thread) % 16);
                    check(&**fm, &[sized(user, events, 3)], &format!("thread {thread}, {step}"));
                }
            });
        }
    });
}
