//! Tests of the default labels and of the rules that order candidates.

use hypercast_sdk::{
    ActionBatch, Column, Data, Description, Diversity, Expert, Graph, HostInfo, Linear,
    NamedColumn, Outcome, Prediction, RankRequest, Ranked, Request, SchemaTask, TaskKind,
};

/// An expert that overrides no default.
struct DefaultExpert;

impl Expert for DefaultExpert {
    fn describe(info: &HostInfo) -> Description {
        Description::new("plain", "1.0.0").all_tasks(info)
    }

    fn network(g: &Graph) {
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(g.tae()));
        }
    }
}

fn schema_task(name: &str, kind: TaskKind, label: &str, surfaces: &[&str]) -> SchemaTask {
    let surfaces = surfaces.iter().map(|s| s.to_string()).collect();
    SchemaTask { name: name.into(), kind, label: label.into(), surfaces }
}

fn info() -> HostInfo {
    HostInfo {
        tae_dim: 8,
        surfaces: vec!["feed".into(), "reels".into()],
        actions: vec!["click".into(), "like".into()],
        values: vec!["seconds".into()],
        tasks: vec![
            schema_task("liked", TaskKind::Binary, "like", &[]),
            schema_task("watch", TaskKind::Regression, "seconds", &["reels"]),
        ],
        features: Vec::new(),
        ids: Vec::new(),
        history_ids: Vec::new(),
        ..HostInfo::default()
    }
}

fn batch() -> ActionBatch {
    ActionBatch {
        surface: vec![0, 1, 1],
        actions: vec![0b10, 0b01, 0b11],
        known: vec![0b11, 0b11, 0b01],
        values: vec![Outcome { name: "seconds".into(), values: vec![3.0, 4.0, f32::NAN] }],
        columns: vec![
            NamedColumn { column: Column::time(), data: Data::Integers(vec![5, 5, 9]) },
            NamedColumn {
                column: Column::vector("content"),
                data: Data::Numbers(vec![0.6, 0.8, 0.0, 0.0, 1.0, 0.0]),
            },
        ],
    }
}

#[test]
fn default_labels_follow_the_schema() {
    let labels = DefaultExpert::labels(&info(), &batch()).expect("labels");
    assert_eq!((labels[0].task.as_str(), labels[1].task.as_str()), ("liked", "watch"));
    assert_eq!(labels[0].labels, [1.0, 0.0, 1.0]);
    assert_eq!(labels[0].mask, [1, 1, 0], "unknown actions are outside the sample space");
    assert_eq!(labels[1].labels, [3.0, 4.0, 0.0]);
    assert_eq!(labels[1].mask, [0, 1, 0], "other surfaces and NaN are outside the sample space");
}

#[test]
fn labels_of_an_unknown_action_say_what_to_do() {
    let mut info = info();
    info.tasks[0].label = "share".into();
    let error = DefaultExpert::labels(&info, &batch()).expect_err("the schema has no such action");
    assert!(
        error.contains("`liked`") && error.contains("`share`") && error.contains("click, like"),
        "{error}"
    );
}

fn request(values: &[f32], limit: u32) -> Request {
    let request = RankRequest {
        surface: "feed".into(),
        user: 1,
        candidates: (0..values.len() as u64).collect(),
        limit,
        ..RankRequest::default()
    };
    let predictions = vec![
        Prediction { task: "a".into(), values: values.to_vec() },
        Prediction { task: "b".into(), values: vec![0.5; values.len()] },
    ];
    let columns =
        vec![NamedColumn { column: Column::id("author"), data: Data::Ids(vec![7; values.len()]) }];
    Request::new(request, predictions, columns)
}

fn order(ranked: &[Ranked]) -> Vec<u32> {
    ranked.iter().map(|r| r.candidate).collect()
}

#[test]
fn default_rank_sorts_by_the_first_task_with_ties_by_index() {
    let ranked = DefaultExpert::rank(&request(&[0.1, 0.9, 0.5, 0.9], 3)).expect("ranked");
    assert_eq!(order(&ranked), [1, 3, 2]);
    assert_eq!(ranked[0].score, 0.9);
}

#[test]
fn value_models_combine_all_tasks() {
    let request = request(&[0.1, 0.2], 2);
    let weight = |task: &str| if task == "a" { 2.0 } else { 1.0 };
    assert_eq!(request.weighted_sum(weight), [0.7, 0.9]);
    let product = request.weighted_product(weight);
    assert!((product[0] - 0.005).abs() < 1e-6 && (product[1] - 0.02).abs() < 1e-6, "{product:?}");
}

#[test]
fn diversity_delays_a_key_but_fills_every_place() {
    let request = request(&[0.0; 5], 5);
    let scores = [5.0, 4.0, 3.0, 2.0, 1.0];
    let rule = Diversity { at_most: 1, window: 2 };
    assert_eq!(order(&request.top_diverse(&scores, &[1, 1, 1, 2, 3], rule)), [0, 3, 1, 4, 2]);
    assert_eq!(order(&request.top_diverse(&scores, &[1; 5], rule)), [0, 1, 2, 3, 4]);
}

#[test]
fn columns_are_found_by_name_and_type() {
    let request = request(&[0.1, 0.2], 2);
    assert_eq!(request.id("author").expect("declared"), [7, 7]);
    assert!(request.id("tag").expect_err("not declared").contains("rank_id"));
    assert!(request.prediction("c").expect_err("no such task").contains("`c`"));
    let batch = batch();
    assert_eq!(batch.time_ms().expect("declared"), [5, 5, 9]);
    assert_eq!(batch.vector("content").expect("declared").len(), 6);
    assert!(batch.feature("length").expect_err("not declared").contains("training_feature"));
}
