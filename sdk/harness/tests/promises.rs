//! Experts that break one promise each, and what the harness says of them. They run
//! natively; what needs the runtime of components is in `components`.

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
    check.expect_err("a broken promise is told").to_string()
}

struct Good;
impl Expert for Good {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
}

#[test]
fn a_good_expert_keeps_every_promise_on_any_schema() {
    Harness::native::<Good>().check_all().unwrap();
    let wide = World::default().tae_dim(8).seed(9).max_candidates(50).fm_version("2.1.0");
    wide.native::<Good>().unwrap().check_all().unwrap();
}

#[test]
fn a_network_that_does_not_fit_is_refused_with_its_reason() {
    let error = World::default().tae_dim(0).native::<Good>().err().unwrap().to_string();
    assert!(error.contains("the host has no FM"), "{error}");
    let error = World::default().max_flops(10).native::<Good>().err().unwrap().to_string();
    assert!(error.contains("FLOPs a candidate, more than the limit of 10"), "{error}");
}

struct NotFinite;
impl Expert for NotFinite {
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
fn a_prediction_that_is_no_number_is_told_with_request_row_and_task() {
    let told = refused(Harness::native::<NotFinite>().check_predictions());
    for word in
        ["predictions at request", "surface feed", "row ", "task `watch`", "prediction inf", "->"]
    {
        assert!(told.contains(word), "{word}: {told}");
    }
}

struct Twice;
impl Expert for Twice {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let entry = |at: usize| Ranked { candidate: at as u32 / 2, score: 1.0 };
        Ok((0..request.limit).map(entry).collect())
    }
}

struct Short;
impl Expert for Short {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let mut ranked = request.top(request.prediction("click")?);
        ranked.truncate(request.limit.div_ceil(2));
        Ok(ranked)
    }
}

#[test]
fn a_ranking_with_a_candidate_twice_or_without_some_is_told() {
    let told = refused(Harness::native::<Twice>().check_ranking());
    assert!(told.contains("with limit 2, row 0: ranked twice"), "{told}");
    let told = refused(Harness::native::<Short>().check_ranking());
    assert!(told.contains("1 candidates ranked") && told.contains("may_drop_candidates"), "{told}");
    Harness::native::<Short>().may_drop_candidates().check_ranking().unwrap();
}

struct Empty;
impl Expert for Empty {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        match request.candidates.len() {
            0 => Err("nothing to rank".into()),
            // The score of one candidate alone divides 0 by 0.
            1 => Ok(vec![Ranked { candidate: 0, score: 0.0 / (request.limit as f32 - 1.0) }]),
            _ => Ok(request.top(request.prediction("click")?)),
        }
    }
}

#[test]
fn the_smallest_requests_are_tried() {
    let told = refused(Harness::native::<Empty>().check_ranking());
    assert!(told.contains("(surface feed, 1 candidates") && told.contains("score NaN"), "{told}");
}

struct Stateful;
impl Expert for Stateful {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        static CALLS: AtomicU32 = AtomicU32::new(0);
        let calls = CALLS.fetch_add(1, Ordering::Relaxed) as f32;
        let scores: Vec<f32> = request.prediction("click")?.iter().map(|p| p + calls).collect();
        Ok(request.top(&scores))
    }
}

#[test]
fn an_answer_that_depends_on_earlier_calls_is_told() {
    let told = refused(Harness::native::<Stateful>().check_determinism());
    assert!(told.contains("twice in one instance, place 0"), "{told}");
}

struct Lookup;
impl Expert for Lookup {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        match request.id("item_id")?.iter().find(|id| **id > 2_000) {
            Some(id) => Err(format!("no such item: {id}")),
            None => Ok(request.top(request.prediction("click")?)),
        }
    }
}

#[test]
fn an_expert_that_knows_only_known_items_is_told() {
    let told = refused(Harness::native::<Lookup>().check_unknown_features());
    assert!(told.contains("with ids never seen: no such item"), "{told}");
}

/// Takes an unknown action for one that did not happen.
struct Guesses;
impl Expert for Guesses {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let mut labels = labels::from_schema(&tasks(), info, batch)?;
        labels[0].mask.fill(1);
        Ok(labels)
    }
}

/// Reads bits of actions that are not known.
struct Peeks;
impl Expert for Peeks {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let mut labels = labels::from_schema(&tasks(), info, batch)?;
        labels[0].labels = batch.actions.iter().map(|actions| (actions & 0b10) as f32).collect();
        Ok(labels)
    }
}

/// Never has an example.
struct Blind;
impl Expert for Blind {
    fn describe(_: &HostInfo) -> Description {
        describe()
    }
    fn network(g: &Graph) {
        network(g);
    }
    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let mut labels = labels::from_schema(&tasks(), info, batch)?;
        labels[1].mask.fill(0);
        Ok(labels)
    }
    fn sample(_: &HostInfo, batch: &ActionBatch) -> Vec<f32> {
        vec![0.5; batch.surface.len()]
    }
}

fn tasks() -> Vec<Task> {
    [("click", TaskKind::Binary), ("watch", TaskKind::Regression)]
        .map(|(name, kind)| Task { name: name.into(), kind })
        .to_vec()
}

#[test]
fn labels_of_what_is_not_known_are_told_with_row_and_task() {
    let told = refused(Harness::native::<Guesses>().check_labels());
    assert!(told.contains("task `click`") && told.contains("not known"), "{told}");
    let told = refused(Harness::native::<Peeks>().check_labels());
    assert!(
        told.contains("row ") && told.contains("an action that is not known changed"),
        "{told}"
    );
    let told = refused(Harness::native::<Blind>().check_labels());
    assert!(told.contains("task `watch`: none of 360 examples counts"), "{told}");
    assert_eq!(Harness::native::<Blind>().sample(&[]).unwrap(), Vec::<f32>::new());
}

#[test]
fn all_broken_promises_are_told_at_once() {
    let failures = Harness::native::<NotFinite>().check_all().unwrap_err();
    let checks: Vec<&str> = failures.0.iter().map(|failure| failure.check).collect();
    assert_eq!(checks, ["predictions", "unknown features"], "{failures}");
    assert_eq!(format!("{failures}"), format!("{failures:?}"), "a test's return value is readable");
}

#[test]
fn a_test_can_say_what_a_request_holds() {
    let harness = Harness::native::<Good>();
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
    let told = request().events(vec![event(0), event(1)]).build();
    assert_eq!(told.example.history.len(), 2);
    let ranking =
        harness.rank_with(&case, &[("click", vec![0.1, 0.9, 0.5]), ("watch", vec![0.0; 3])], 2);
    let ranking = ranking.unwrap();
    assert_eq!((ranking.items, ranking.rows), (vec![9, 8], vec![1, 2]));
}
