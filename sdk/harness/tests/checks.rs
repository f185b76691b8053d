//! Experts that each fail one check, and the failures that the harness reports. They run natively;
//! tests that need the runtime of components are in `components`.

use std::sync::atomic::{AtomicU32, Ordering};

use hypercast_harness::{Event, Failure, Harness, Outcome, World};
use hypercast_sdk::{
    ActionBatch, Description, Expert, Graph, HostInfo, Linear, Ranked, Request, Task, TaskKind,
    TaskLabels, labels,
};

fn describe() -> Description {
    Description::new("test", "1.0.0")
        .task("click", TaskKind::Binary)
        .task("watch", TaskKind::Regression)
        .rank_id("item_id")
}

fn network(g: &Graph) {
    for task in g.tasks() {
        g.output(&task.name, Linear::new(&task.name, 1).apply(g.tae()));
    }
}

fn refused(check: Result<(), Failure>) -> String {
    check.expect_err("the check fails").to_string()
}

/// Defines an expert with the description and network above and the given hooks.
macro_rules! expert {
    ($(#[$doc:meta])* $name:ident { $($hooks:tt)* }) => {
        $(#[$doc])*
        struct $name;
        impl Expert for $name {
            fn describe(_: &HostInfo) -> Description {
                describe()
            }
            fn network(g: &Graph) {
                network(g);
            }
            $($hooks)*
        }
    };
}

expert!(ValidExpert {});

#[test]
fn a_valid_expert_passes_every_check_on_any_schema() {
    Harness::native::<ValidExpert>().check_all().unwrap();
    let wide = World::default().tae_dim(8).seed(9).max_candidates(50).fm_version("2.1.0");
    wide.native::<ValidExpert>().unwrap().check_all().unwrap();
}

#[test]
fn a_network_that_does_not_fit_is_refused_with_its_reason() {
    let error = World::default().tae_dim(0).native::<ValidExpert>().err().unwrap().to_string();
    assert!(error.contains("the host has no FM"), "{error}");
    let error = World::default().max_flops(10).native::<ValidExpert>().err().unwrap().to_string();
    assert!(error.contains("FLOPs a candidate, more than the limit of 10"), "{error}");
}

/// Ranks by a score that says the opposite of its probability.
struct OppositeExpert;

impl Expert for OppositeExpert {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }

    fn network(g: &Graph) {
        for task in g.tasks() {
            let logit = Linear::new(&task.name, 1).apply(g.tae());
            g.output(&task.name, logit);
            if task.name == "click" {
                g.score("click", -logit);
            }
        }
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(request.score("click")?))
    }
}

#[test]
fn rank_orders_by_the_score_that_the_network_sets() {
    let harness = Harness::native::<OppositeExpert>();
    let case = World::default().request(3).candidates(6).build();
    let clicks = harness.predict(&case).unwrap().task("click").unwrap().to_vec();
    let rows = harness.rank(&case, 6).unwrap().rows;
    let ranked: Vec<f32> = rows.iter().map(|row| clicks[*row]).collect();
    assert!(ranked.is_sorted() && ranked[0] < ranked[5], "{ranked:?}");
    harness.check_all().unwrap();
}

struct InfiniteExpert;
impl Expert for InfiniteExpert {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        for task in g.tasks() {
            let logit = Linear::new(&task.name, 1).apply(g.tae());
            g.output(&task.name, (logit * 1000.0).exp());
        }
    }
}

#[test]
fn an_infinite_prediction_is_reported_with_request_row_and_task() {
    let failure = refused(Harness::native::<InfiniteExpert>().check_predictions());
    for word in
        ["predictions at request", "surface feed", "row ", "task `watch`", "prediction inf", "->"]
    {
        assert!(failure.contains(word), "{word}: {failure}");
    }
}

expert! {
    DuplicatesExpert {
        fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
            let entry = |at: usize| Ranked::new(at as u32 / 2, 1.0);
            Ok((0..request.limit).map(entry).collect())
        }
    }
}

expert! {
    ShortExpert {
        fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
            let mut ranked = request.top(request.prediction("click")?);
            ranked.truncate(request.limit.div_ceil(2));
            Ok(ranked)
        }
    }
}

#[test]
fn a_ranking_with_duplicate_or_missing_candidates_is_reported() {
    let failure = refused(Harness::native::<DuplicatesExpert>().check_ranking());
    assert!(failure.contains("with limit 2, row 0: ranked twice"), "{failure}");
    let failure = refused(Harness::native::<ShortExpert>().check_ranking());
    assert!(
        failure.contains("1 candidates ranked") && failure.contains("may_drop_candidates"),
        "{failure}"
    );
    Harness::native::<ShortExpert>().may_drop_candidates().check_ranking().unwrap();
}

expert! {
    SmallRequestExpert {
        fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
            match request.candidates.len() {
                0 => Err("nothing to rank".into()),
                // With one candidate, this divides 0 by 0.
                1 => Ok(vec![Ranked::new(0, 0.0 / (request.limit as f32 - 1.0))]),
                _ => Ok(request.top(request.prediction("click")?)),
            }
        }
    }
}

#[test]
fn the_smallest_requests_are_checked() {
    let failure = refused(Harness::native::<SmallRequestExpert>().check_ranking());
    assert!(
        failure.contains("(surface feed, 1 candidates") && failure.contains("score NaN"),
        "{failure}"
    );
}

expert! {
    StatefulExpert {
        fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
            static CALLS: AtomicU32 = AtomicU32::new(0);
            let calls = CALLS.fetch_add(1, Ordering::Relaxed) as f32;
            let scores: Vec<f32> = request.prediction("click")?.iter().map(|p| p + calls).collect();
            Ok(request.top(&scores))
        }
    }
}

#[test]
fn an_answer_that_depends_on_earlier_calls_is_reported() {
    let failure = refused(Harness::native::<StatefulExpert>().check_determinism());
    assert!(failure.contains("twice in one instance, place 0"), "{failure}");
}

expert! {
    KnownItemsExpert {
        fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
            match request.id("item_id")?.iter().find(|id| **id > 2_000) {
                Some(id) => Err(format!("no such item: {id}")),
                None => Ok(request.top(request.prediction("click")?)),
            }
        }
    }
}

#[test]
fn an_expert_that_fails_on_unknown_items_is_reported() {
    let failure = refused(Harness::native::<KnownItemsExpert>().check_unknown_features());
    assert!(failure.contains("with ids never seen: no such item"), "{failure}");
}

expert! {
    /// Treats an unknown action as one that did not happen.
    UnknownAsNegativeExpert {
        fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
            let mut labels = labels::from_schema(&tasks(), info, batch)?;
            labels[0].mask.fill(1);
            Ok(labels)
        }
    }
}

expert! {
    /// Reads bits of actions that are not known.
    UnknownBitsExpert {
        fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
            let mut labels = labels::from_schema(&tasks(), info, batch)?;
            labels[0].labels = batch.actions.iter().map(|actions| (actions & 0b10) as f32).collect();
            Ok(labels)
        }
    }
}

expert! {
    /// Masks all examples of one task.
    NoExamplesExpert {
        fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
            let mut labels = labels::from_schema(&tasks(), info, batch)?;
            labels[1].mask.fill(0);
            Ok(labels)
        }
        fn sample(_: &HostInfo, batch: &ActionBatch) -> Vec<f32> {
            vec![0.5; batch.surface.len()]
        }
    }
}

fn tasks() -> Vec<Task> {
    [("click", TaskKind::Binary), ("watch", TaskKind::Regression)]
        .map(|(name, kind)| Task { name: name.into(), kind })
        .to_vec()
}

#[test]
fn labels_from_unknown_outcomes_are_reported_with_row_and_task() {
    let failure = refused(Harness::native::<UnknownAsNegativeExpert>().check_labels());
    assert!(failure.contains("task `click`") && failure.contains("not known"), "{failure}");
    let failure = refused(Harness::native::<UnknownBitsExpert>().check_labels());
    assert!(
        failure.contains("row ") && failure.contains("an action that is not known changed"),
        "{failure}"
    );
    let failure = refused(Harness::native::<NoExamplesExpert>().check_labels());
    assert!(failure.contains("task `watch`: none of 360 examples counts"), "{failure}");
    assert_eq!(Harness::native::<NoExamplesExpert>().sample(&[]).unwrap(), Vec::<f32>::new());
}

#[test]
fn all_failed_checks_are_reported_together() {
    let failures = Harness::native::<InfiniteExpert>().check_all().unwrap_err();
    let checks: Vec<&str> = failures.0.iter().map(|failure| failure.check).collect();
    assert_eq!(checks, ["predictions", "unknown features"], "{failures}");
    assert_eq!(format!("{failures}"), format!("{failures:?}"), "a test's return value is readable");
}

#[test]
fn a_test_can_set_the_parts_of_a_request() {
    let harness = Harness::native::<ValidExpert>();
    let request = || harness.world().request(3).surface("search").user(42).items([7, 9, 8]);
    let case = request().feature("length", 0.5).serving().build();
    let example = &case.example;
    assert_eq!((example.surface, example.user.id), (1, 42));
    let schema = harness.world().schema();
    let (id, length) = (
        schema.id_columns().iter().position(|name| name == "item_id").unwrap(),
        schema.feature_columns().iter().position(|name| name == "length").unwrap(),
    );
    for (target, item) in example.targets.iter().zip([7, 9, 8]) {
        assert_eq!((target.item.id, target.ids[id], target.features[length]), (item, item, 0.5));
        assert_eq!((target.outcome.known, target.outcome.actions), (0, 0));
    }
    let event = |item: usize| Event {
        item: example.targets[item].item.clone(),
        surface: 1,
        time_ms: example.time_ms - 1_000,
        outcome: Outcome { actions: 1, known: 1, ..Outcome::UNKNOWN },
    };
    let case = request().events(vec![event(0), event(1)]).build();
    assert_eq!(case.example.history.len(), 2);
    let ranking =
        harness.rank_with(&case, &[("click", vec![0.1, 0.9, 0.5]), ("watch", vec![0.0; 3])], 2);
    let ranking = ranking.unwrap();
    assert_eq!((ranking.items, ranking.rows), (vec![9, 8], vec![1, 2]));
}
