//! Tests of the default labels and of the rules that order candidates.

use hypercast_sdk::{
    ActionBatch, Cap, Chance, Column, Data, Description, Diversity, Expert, Graph, HostInfo,
    Linear, NamedColumn, Outcome, Prediction, RankRequest, Ranked, Request, SchemaTask, TaskKind,
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
fn a_ranking_score_is_read_beside_the_prediction_and_is_no_task() {
    let own = vec![
        Prediction { task: "a".into(), values: vec![0.1, 0.9] },
        Prediction { task: "b".into(), values: vec![0.5, 0.5] },
        Prediction { task: "a:score".into(), values: vec![3.0, -2.0] },
    ];
    let candidates = RankRequest { candidates: vec![5, 6], limit: 2, ..RankRequest::default() };
    let request = Request::new(candidates, own, Vec::new());
    assert_eq!(request.score("a"), Ok(&[3.0, -2.0][..]));
    assert_eq!(request.score("b"), Ok(&[0.5, 0.5][..]), "one that has none");
    assert_eq!(request.predictions().len(), 2);
    assert_eq!(request.weighted_sum(|_| 1.0), [0.6, 1.4]);
    assert!(request.score("c").is_err());
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
fn filters_and_caps_shape_a_slate_and_say_what_they_took_out() {
    let request = request(&[0.0; 6], 5);
    let scores = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0];
    let (authors, topics) = ([1, 1, 1, 2, 2, 3], [7, 8, 9, 7, 7, 8]);
    let all = request.slate(&scores);
    assert_eq!(order(&all.top()), order(&request.top(&scores)));
    let slate = all.clone().cap(&authors, Cap { at_most: 1, first: 3 });
    assert_eq!(order(&slate.top()), [0, 3, 5, 1, 2]);
    // 5 is the only one that either cap allows, and then there is none: the best goes on.
    let slate = slate.cap(&topics, Cap { at_most: 1, first: 6 });
    assert_eq!(order(&slate.top()), [0, 5, 1, 2, 3]);
    let slate = slate.filter("first", |candidate| candidate > 0).filter("odd", |at| at % 2 == 0);
    assert_eq!(order(&slate.top()), [2, 4]);
    let counts: Vec<_> = slate.filtered().iter().map(|own| (&*own.name, own.count)).collect();
    assert_eq!(counts, [("first", 1), ("odd", 3)]);
    assert!(all.filter("all", |_| false).top().is_empty());
}

/// Vectors and scores that a seed gives, with two that are nearly alike.
fn vectors(seed: u64, rows: usize, width: usize) -> (Vec<f32>, Vec<f32>) {
    let mut chance = Chance::new(seed);
    let mut vectors: Vec<f32> = (0..rows * width).map(|_| chance.normal() as f32).collect();
    let first = vectors[..width].to_vec();
    vectors[width..2 * width].copy_from_slice(&first);
    vectors[width] += 0.05;
    (vectors, (0..rows).map(|_| chance.uniform() as f32).collect())
}

/// The cosines between some rows, as a matrix.
fn cosines(vectors: &[f32], width: usize, rows: &[u32]) -> Vec<Vec<f64>> {
    let row = |at: u32| &vectors[at as usize * width..][..width];
    let dot = |a: u32, b: u32| -> f64 {
        row(a).iter().zip(row(b)).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    let cosine = |a: u32, b: u32| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    rows.iter().map(|&a| rows.iter().map(|&b| cosine(a, b)).collect()).collect()
}

/// By the first row's cofactors.
fn determinant(matrix: &[Vec<f64>]) -> f64 {
    let Some((first, rest)) = matrix.split_first() else { return 1.0 };
    let minor = |without: usize| -> Vec<Vec<f64>> {
        let kept = |row: &Vec<f64>| {
            row.iter().enumerate().filter(|(at, _)| *at != without).map(|(_, cell)| *cell).collect()
        };
        rest.iter().map(kept).collect()
    };
    let sign = |at: usize| if at.is_multiple_of(2) { 1.0 } else { -1.0 };
    first.iter().enumerate().map(|(at, cell)| sign(at) * cell * determinant(&minor(at))).sum()
}

/// All sets of `size` of the first `count` numbers.
fn sets(count: u32, size: usize) -> Vec<Vec<u32>> {
    let masks = (0..1u32 << count).filter(|mask| mask.count_ones() as usize == size);
    masks.map(|mask| (0..count).filter(|at| mask >> at & 1 == 1).collect()).collect()
}

#[test]
fn dpp_finds_the_sets_that_brute_force_finds() {
    const WIDTH: usize = 4;
    const RELEVANCE: f32 = 1.5;
    let mut best_found = 0;
    for seed in 0..60 {
        let (vectors, scores) = vectors(seed, 7, WIDTH);
        let request = request(&[0.0; 7], 4);
        let value = |set: &[u32]| {
            let relevant: f32 = set.iter().map(|&at| RELEVANCE * scores[at as usize]).sum();
            f64::from(relevant) + determinant(&cosines(&vectors, WIDTH, set)).max(1e-12).ln()
        };
        let ranked = request.slate(&scores).dpp(&vectors, RELEVANCE);
        let order = order(&ranked);
        assert_eq!(ranked[0].score, scores[order[0] as usize]);
        // Each place is the best one after those before it.
        for place in 0..4 {
            let with = |next: u32| value(&[&order[..place], &[next]].concat());
            let left = (0..7).filter(|at| !order[..place].contains(at));
            let best = left.map(with).fold(f64::NEG_INFINITY, f64::max);
            let chosen = with(order[place]);
            assert!((chosen - best).abs() < 1e-3, "seed {seed}, place {place}: {chosen}, {best}");
        }
        // Which leads to the best set of all, or near it.
        let best = sets(7, 4).iter().map(|set| value(set)).fold(f64::NEG_INFINITY, f64::max);
        let found = value(&order);
        assert!(found > best - 2.0, "seed {seed}: {found}, {best}");
        best_found += u32::from(found > best - 1e-3);
    }
    assert!(best_found >= 30, "{best_found} of 60");
}

#[test]
fn mmr_takes_what_is_relevant_and_unlike_what_is_there() {
    const WIDTH: usize = 3;
    for seed in 0..60 {
        let (vectors, scores) = vectors(seed, 8, WIDTH);
        let (request, relevance) = (request(&[0.0; 8], 5), 0.6);
        let order = order(&request.slate(&scores).mmr(&vectors, relevance));
        let cosines = cosines(&vectors, WIDTH, &(0..8).collect::<Vec<u32>>());
        for place in 0..5 {
            let gain = |next: u32| {
                let near = order[..place].iter().map(|&at| cosines[next as usize][at as usize]);
                let near = near.reduce(f64::max).unwrap_or(0.0);
                0.6 * f64::from(scores[next as usize]) - 0.4 * near
            };
            let left = (0..8).filter(|at| !order[..place].contains(at));
            let best = left.map(gain).fold(f64::NEG_INFINITY, f64::max);
            assert!((gain(order[place]) - best).abs() < 1e-5, "seed {seed}, place {place}");
        }
    }
}

#[test]
fn diversity_by_vectors_fills_every_place() {
    let request = request(&[0.0; 5], 5);
    let scores = [0.5, 0.9, 0.8, 0.1, 0.7];
    // All in one line, some of zeros, and none at all.
    let line = [1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0, 1.0, 0.0];
    for vectors in [&line[..], &[0.0; 10], &[]] {
        let slate = request.slate(&scores);
        assert_eq!(order(&slate.mmr(vectors, 1.0)), [1, 2, 4, 0, 3]);
        for ranked in [slate.mmr(vectors, 0.3), slate.dpp(vectors, 1.0)] {
            let mut candidates = order(&ranked);
            assert_eq!(candidates[0], 1);
            candidates.sort_unstable();
            assert_eq!(candidates, [0, 1, 2, 3, 4]);
        }
    }
    // What is in no line comes before what is spanned, which follows by score.
    assert_eq!(order(&request.slate(&scores).dpp(&line, 1.0)), [1, 3, 2, 4, 0]);
    let keys = [1, 1, 1, 2, 2];
    let capped = request.slate(&scores).cap(&keys, Cap { at_most: 1, first: 2 });
    assert_eq!(order(&capped.mmr(&line, 0.9))[..2], [1, 4]);
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
    assert!(batch.position().expect_err("not declared").contains("training_position"));
    let ranked = vec![0.0, 4.0, f32::NAN];
    let column = NamedColumn { column: Column::position(), data: Data::Numbers(ranked) };
    let batch = ActionBatch { columns: vec![column], ..batch };
    assert_eq!(batch.position().expect("declared")[..2], [0.0, 4.0]);
}

#[test]
fn a_threshold_of_each_row_says_who_is_engaged() {
    let thresholds = [f32::NAN, 4.0, 1.0];
    let engaged = batch().at_least("engaged", "seconds", |row| thresholds[row]).expect("known");
    // Neither a row without a threshold counts, nor one whose value is not known.
    assert_eq!((engaged.mask, engaged.labels[1]), (vec![0, 1, 0], 1.0));
    let lower = batch().at_least("engaged", "seconds", |_| 4.5).expect("known");
    assert_eq!((lower.mask, &lower.labels[..2]), (vec![1, 1, 0], &[0.0, 0.0][..]));
    assert!(
        batch().at_least("engaged", "minutes", |_| 1.0).expect_err("none").contains("`minutes`")
    );
}
