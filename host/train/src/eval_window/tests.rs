use std::sync::Arc;

use hypercast_fm::example::{Outcome, Target, User};

use super::*;

fn measured() -> EvalWindow {
    EvalWindow {
        tasks: vec![("click".into(), TaskKind::Binary), ("watch".into(), TaskKind::Regression)],
        surfaces: vec!["feed".into(), "search".into()],
        keep: KEEP,
        rows: VecDeque::new(),
    }
}

fn example(user: u64, surface: u16, targets: usize) -> Example {
    let target = Target {
        item: Arc::default(),
        ids: Vec::new(),
        features: Vec::new(),
        outcome: Outcome::UNKNOWN,
        truth: Vec::new(),
    };
    Example {
        request: 0,
        user: Arc::new(User { id: user, ..User::default() }),
        surface,
        time_ms: 0,
        history: Vec::new(),
        targets: vec![target; targets],
    }
}

fn targets(labels: &[f32], mask: &[bool]) -> TaskTargets {
    TaskTargets { labels: labels.to_vec(), mask: mask.to_vec(), weights: vec![1.0; mask.len()] }
}

#[test]
fn both_are_measured_on_the_same_rows_by_task_and_surface() {
    let mut own = measured();
    let examples = [example(1, 0, 2), example(2, 1, 2)];
    let clicks = targets(&[1.0, 0.0, 1.0, 0.0], &[true; 4]);
    let watched = targets(&[2.0, 9.0, 4.0, 9.0], &[true, false, true, false]);
    let said = WindowPredictions {
        candidate: &[vec![0.5; 4], vec![2.0, 0.0, 3.0, 0.0]],
        serving: &[vec![0.9, 0.1, 0.9, 0.1], vec![0.0; 4]],
        targets: &[clicks, watched],
    };
    own.push(examples.iter(), said, |_| true);
    let evaluation = own.evaluation();
    let slice = |task: &str, surface: Option<&str>| {
        let mut all = evaluation.slices.iter();
        all.find(|own| own.task == task && own.surface.as_deref() == surface).unwrap()
    };
    assert_eq!(evaluation.slices.len(), 6);
    let click = slice("click", None);
    assert_eq!((click.examples, click.candidate.auc), (4, Some(0.5)));
    assert!((click.candidate.ne.unwrap() - 1.0).abs() < 1e-9);
    assert_eq!(click.candidate.calibration, Some(1.0));
    let serving = click.serving.as_ref().unwrap();
    assert!(
        (serving.ne.unwrap() + 0.9f64.ln() / 2f64.ln()).abs() < 1e-6 && serving.auc == Some(1.0)
    );
    assert_eq!(slice("click", Some("search")).examples, 2);
    let watch = slice("watch", None);
    assert_eq!((watch.examples, watch.candidate.mse, watch.candidate.ne), (2, Some(0.5), None));
    assert_eq!(watch.serving.as_ref().unwrap().mse, Some(10.0));
    assert!((watch.candidate.calibration.unwrap() - 5.0 / 6.0).abs() < 1e-9);
    let line = own.line();
    assert_eq!(line.as_array().unwrap().len(), 2, "{line}");
}

#[test]
fn rows_that_do_not_count_are_not_kept_and_old_ones_go() {
    let mut own = measured();
    let ones = vec![vec![0.5; 3], vec![0.5; 3]];
    let known = vec![targets(&[1.0; 3], &[true; 3]), targets(&[1.0; 3], &[true; 3])];
    let said = WindowPredictions { candidate: &ones, serving: &[], targets: &known };
    own.push([example(1, 0, 3)].iter(), said, |_| false);
    assert!(own.rows.is_empty() && own.evaluation().slices.is_empty());
    for user in 0..KEEP as u64 / 3 + 1 {
        own.push([example(user, 0, 3)].iter(), said, |_| true);
    }
    assert_eq!((own.rows.len(), own.rows[0].user), (KEEP, 0));
    let evaluation = own.evaluation();
    assert!(evaluation.slices.iter().all(|slice| slice.serving.is_none()));
}

/// Keeps rows of which every second was clicked, with the same odds said of every row.
fn clicked(own: &mut EvalWindow, rows: usize, candidate: f32, serving: &[f32]) {
    let labels: Vec<f32> = (0..rows).map(|row| (row % 2) as f32).collect();
    let all = |probability: f32| vec![vec![probability; rows], vec![0.0; rows]];
    let serving = serving.first().map_or(Vec::new(), |&probability| all(probability));
    let nothing = targets(&vec![0.0; rows], &vec![false; rows]);
    let clicks = targets(&labels, &vec![true; rows]);
    let said = WindowPredictions {
        candidate: &all(candidate),
        serving: &serving,
        targets: &[clicks, nothing],
    };
    own.push([example(1, 0, rows)].iter(), said, |_| true);
}

#[test]
fn limits_hold_what_is_worse_than_they_allow_and_wait_for_enough_rows() {
    let limits = |max: Option<f64>, max_increase| NeLimits {
        max: max.into_iter().map(|ne| ("click".to_owned(), ne)).collect(),
        max_increase,
    };
    // The NE of 0.5 is 1, that of 0.7 is 1.126.
    let mut own = measured();
    clicked(&mut own, 18, 0.7, &[0.5]);
    assert_eq!(own.beyond(&limits(Some(0.9), Some(0.0))), None, "nine rows of a label");
    clicked(&mut own, 2, 0.7, &[0.5]);
    assert_eq!(own.beyond(&limits(Some(1.13), Some(0.13))), None);
    let why = own.beyond(&limits(Some(1.12), None)).unwrap();
    assert_eq!(why, "NE of click is 1.1258, above its limit of 1.12");
    let why = own.beyond(&limits(None, Some(0.12))).unwrap();
    assert!(why.contains("is 1.1258, 1.0000 for what serves"), "{why}");
    // Rows of before there was something to compare with do not count for the comparison.
    let mut own = measured();
    clicked(&mut own, 100, 0.99, &[]);
    clicked(&mut own, 20, 0.5, &[0.5]);
    assert_eq!(own.beyond(&limits(None, Some(0.0))), None);
    assert!(own.beyond(&limits(Some(1.5), None)).is_some());
    let mut own = measured();
    clicked(&mut own, 20, f32::NAN, &[0.5]);
    assert!(own.beyond(&limits(Some(9.0), None)).is_some());
    assert!(own.beyond(&limits(None, Some(9.0))).is_some());
}

#[test]
fn what_is_worse_than_the_base_rate_is_held_unless_it_is_an_improvement_or_allowed() {
    let limits = |max: Option<f64>| NeLimits {
        max: max.into_iter().map(|ne| ("click".to_owned(), ne)).collect(),
        max_increase: None,
    };
    let held = |rows: usize, candidate, serving: &[f32]| {
        let mut own = measured();
        clicked(&mut own, rows, candidate, serving);
        own.worse_than_no_model(&limits(None))
    };
    let why = held(400, 0.7, &[0.6]).unwrap();
    assert!(why.contains("is 1.1258, no better than") && why.contains("`ne_limits.max`"), "{why}");
    assert_eq!(held(400, 0.7, &[]), None, "nothing says that what serves is better");
    assert_eq!(held(398, 0.7, &[0.6]), None, "the newer half has 99 rows of one label");
    assert_eq!(held(400, 0.7, &[0.8]), None, "what serves is worse");
    assert!(held(400, f32::NAN, &[0.9]).is_some());
    let mut own = measured();
    clicked(&mut own, 400, 0.7, &[0.6]);
    assert_eq!(own.worse_than_no_model(&limits(Some(1.2))), None, "an operator allows it");
}

/// Keeps rows of which every tenth was watched for ten seconds and the others not at all.
fn watched(own: &mut EvalWindow, rows: usize, candidate: f32, serving: f32) {
    let labels: Vec<f32> = (0..rows).map(|row| if row % 10 == 0 { 10.0 } else { 0.0 }).collect();
    let all = |seconds: f32| vec![vec![0.5; rows], vec![seconds; rows]];
    let nothing = targets(&vec![0.0; rows], &vec![false; rows]);
    let said = WindowPredictions {
        candidate: &all(candidate),
        serving: &all(serving),
        targets: &[nothing, targets(&labels, &vec![true; rows])],
    };
    own.push([example(1, 0, rows)].iter(), said, |_| true);
}

#[test]
fn a_regression_that_is_worse_than_the_mean_is_held_likewise() {
    // A mean of 1 has a squared error of 9, predictions of 4 have one of 18.
    let mut own = measured();
    watched(&mut own, 100, 4.0, 1.0);
    let why = own.above_base_rate().unwrap();
    assert!(why.contains("is 1.0000, no better than that of the base rate"), "{why}");
    assert!(why.contains("`fm_gate.rows = 0`"), "{why}");
    assert_eq!(own.worse_than_no_model(&NeLimits::default()), None, "too few say so");
    let held = |rows, candidate, serving, limits: &NeLimits| {
        let mut own = measured();
        watched(&mut own, rows, candidate, serving);
        own.worse_than_no_model(limits)
    };
    let mut limits = NeLimits::default();
    assert!(held(2000, 4.0, 1.0, &limits).is_some());
    assert_eq!(held(1980, 4.0, 1.0, &limits), None, "99 of the newer half were watched");
    assert!(held(2000, 4.0, 5.0, &limits).is_some(), "neither knows anything");
    assert!(held(2000, f32::NAN, 5.0, &limits).is_some());
    limits.max.insert("watch".into(), 2.5);
    assert_eq!(held(2000, 4.0, 1.0, &limits), None, "an operator allows it");
    assert_eq!(own.beyond(&limits), None);
    limits.max.insert("watch".into(), 1.5);
    let why = own.beyond(&limits).unwrap();
    let expected = "the squared error of watch over the mean's is 2.0000, above its limit of 1.5";
    assert_eq!(why, expected);
    // Beside a click that is better than its base rate it holds nothing, however bad it is.
    let mut own = measured();
    watched(&mut own, 100, 400.0, 1.0);
    assert!(own.above_base_rate().is_some());
    clicked(&mut own, 100, 0.55, &[]);
    assert!(own.above_base_rate().is_some(), "the click is worse than its base rate");
    own.rows.iter_mut().for_each(|row| row.cells[0].candidate = 0.49 + 0.02 * row.cells[0].label);
    assert_eq!(own.above_base_rate(), None);
}

#[test]
fn which_of_two_hopeless_regressions_is_worse_decides_nothing() {
    let held = |click: f32, watch: f32| {
        let mut own = measured();
        // Rows with one task each, so that both halves have enough of both.
        for _ in 0..2 {
            watched(&mut own, 1000, watch, 4.0);
            clicked(&mut own, 1000, click, &[0.6]);
        }
        own.worse_than_no_model(&NeLimits::default())
    };
    assert!(held(0.7, 3.0).is_some(), "the click is worse than what serves");
    assert_eq!(held(0.55, 40.0), None, "the click is better than what serves");
}

#[test]
fn a_limit_for_a_task_that_is_not_there_is_refused() {
    let mut limits = NeLimits::default();
    limits.max.insert("click".into(), 0.9);
    measured().check_limits(&limits).unwrap();
    limits.max.insert("clicks".into(), 0.9);
    let error = measured().check_limits(&limits).unwrap_err().to_string();
    assert!(error.contains("ne_limits.max.clicks") && error.contains("\"watch\""), "{error}");
}
