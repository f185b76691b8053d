//! Each experiment end to end on a small simulated world.

use std::{path::Path, sync::Arc};

use hypercast_core::prerequisite::{hostile, plugins};
use hypercast_data::dataset::content;
use hypercast_data::simulate::{SimulateOptions, power_law::simulate_power_law};
use hypercast_fm::example::{Event, Example, Item, Outcome as Happened, User};
use serde_json::Value;

use super::*;
use crate::evaluate::{
    stream::TestMode,
    tests::{agree, setup},
};

fn options(dir: &Path, experiment: Experiment) -> Option<ExperimentOptions> {
    sized(dir, experiment, 700)
}

/// Options of two seeds and a world of so many requests.
fn sized(dir: &Path, experiment: Experiment, requests: usize) -> Option<ExperimentOptions> {
    let plugins = plugins(&format!("{experiment:?}"))?;
    Some(ExperimentOptions {
        experiment,
        setup: setup(dir, plugins, requests),
        seeds: SeedList(vec![1, 2]),
        users: None,
        replicates: 50,
        expert: "mlp-fusion".into(),
        variant: Vec::new(),
        student: None,
        stale_hours: 6.0,
        publish_minutes: 30.0,
        surface: None,
        task: None,
        plot: None,
        ab: AbOptions { ab_users: 1, ab_past_days: 2, ab_days: 1, equal_arms: false },
    })
}

/// Runs an experiment and gives its JSON, whose common shape is checked.
fn found(options: &ExperimentOptions, arms: &[&str]) -> Value {
    checked(&run(options).unwrap(), options, arms)
}

fn checked(report: &ExperimentReport, options: &ExperimentOptions, arms: &[&str]) -> Value {
    assert!(report.to_string().contains("click"), "{report}");
    let json = serde_json::to_value(report).unwrap();
    assert_eq!(json["seeds"], serde_json::json!(options.seeds.0));
    for key in ["data", "mode", "test_from", "fm", "expert_training", "users_share"] {
        assert!(json["config"].get(key).is_some(), "config.{key}");
    }
    let rows = json["rows"].as_array().unwrap();
    for arm in arms {
        let seeds = options.seeds.0.iter().map(|&seed| Value::from(seed));
        for seed in seeds.chain([Value::from("mean")]) {
            let row = rows
                .iter()
                .find(|row| row["arm"] == *arm && row["seed"] == seed && row["task"] == "click");
            let row = row.unwrap_or_else(|| panic!("no row of {arm}, seed {seed}"));
            assert!(row["n"].as_u64().unwrap() > 20 && row["ne"].as_f64().unwrap() > 0.0, "{row}");
            let diff = row["ne_diff_pct"].as_f64().unwrap();
            let ci = row["ci95"].as_array().unwrap();
            let [low, high] = [0, 1].map(|at| ci[at].as_f64().unwrap());
            let width = high - low;
            assert!(low - width <= diff && diff <= high + width && width >= 0.0, "{row}");
        }
    }
    json
}

#[test]
fn table_1_has_every_arm_and_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path(), Experiment::Tae) else { return };
    let json = found(&options, &["baseline", "+UE", "+TAE", "+UE+TAE", "+TAE+logits"]);
    assert_eq!(json["experiment"], "tae");
    assert_eq!(json["config"]["chosen"]["ue_width"], 3 * 16);
    let again = serde_json::to_value(run(&options).unwrap()).unwrap();
    assert!(agree(&json["rows"], &again["rows"]), "one seed, one result");
}

#[test]
fn table_2_has_a_ratio_for_every_surface_task_and_way() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut options) = sized(dir.path(), Experiment::Transfer, 400) else { return };
    let names = ["pointwise", "distilled"];
    let Some([expert, student]) = components(dir.path(), &mut options, &names) else { return };
    options.seeds = SeedList(vec![1]);
    options.expert = expert.to_string();
    options.student = Some(student.to_string());
    let experts = ["expert large", "distilled large", "distilled large+TAE"];
    let others = ["FM small", "FM large", "expert without FM", "distilled small"];
    let report = run(&options).unwrap();
    let said = "experts are pointwise, distilled ones distilled, which should be the same network";
    assert!(report.to_string().contains(said), "{report}");
    let json = checked(&report, &options, &[&others[..], &experts].concat());
    let rows = json["rows"].as_array().unwrap();
    for arm in experts {
        let of = |baseline: &str| -> Vec<&Value> {
            let is_of = |row: &&Value| row["arm"] == arm && row["seed"] == "mean";
            rows.iter().filter(is_of).filter(|row| row["baseline"] == baseline).collect()
        };
        let small = arm.replace("large", "small");
        let tasks = 3 * 2 + 2;
        for baseline in [small.as_str(), "expert without FM"] {
            let own = of(baseline);
            assert_eq!(own.len(), tasks, "click and like on two surfaces and all, finish on one");
            for row in own {
                let is_ratio = baseline == small;
                assert_eq!(row["transfer_ratio"].as_f64().is_some(), is_ratio, "{row}");
                let kind = if row["task"] == "finish" { "aux" } else { "main" };
                assert!(!is_ratio || row["task_type"] == kind);
            }
        }
    }
    // What the larger FM says reaches a student that is shown nothing else of it.
    let ne = |arm: &str| row(&json, arm, "click")["ne"].as_f64().unwrap();
    assert!(ne("distilled large") != ne("distilled small"));
    assert!(ne("distilled large") != ne("distilled large+TAE"));
    assert_eq!(json["config"]["chosen"]["fm_small"]["dim"], 4);
    assert_eq!(json["config"]["chosen"]["fm_small"]["tae_dim"], 16);
    for (key, name) in [("expert", expert), ("student", student)] {
        assert_eq!(json["config"]["chosen"][key], *name);
    }
    options.student = Some(expert.to_string());
    let message = run(&options).unwrap_err().to_string();
    assert!(message.contains("--student pointwise"), "{message}");
}

#[test]
fn table_2_has_an_expert_that_reads_the_fms_predictions() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut options) = sized(dir.path(), Experiment::Transfer, 250) else { return };
    options.seeds = SeedList(vec![1]);
    let json = found(&options, &["expert small+logits", "expert large+logits"]);
    let ne = |arm: &str| row(&json, arm, "click")["ne"].as_f64().unwrap();
    assert!(ne("expert large+logits") != ne("expert large"));
    assert_eq!(json["config"]["chosen"]["student"], Value::Null);
}

/// Copies guests of the tests beside the expert, as components that options name.
fn components<'a, const N: usize>(
    dir: &Path,
    options: &mut ExperimentOptions,
    names: &'a [&'a str; N],
) -> Option<&'a [&'a str; N]> {
    let into = dir.join("components");
    std::fs::create_dir_all(&into).unwrap();
    let expert = format!("{}.wasm", options.expert);
    if !into.join(&expert).exists() {
        std::fs::copy(options.setup.plugins.join(&expert), into.join(&expert)).unwrap();
    }
    for name in names {
        std::fs::copy(hostile("experiments", name)?, into.join(format!("{name}.wasm"))).unwrap();
    }
    options.setup.plugins = into;
    Some(names)
}

/// The row of an arm over all surfaces and seeds.
fn row<'a>(json: &'a Value, arm: &str, task: &str) -> &'a Value {
    let rows = json["rows"].as_array().unwrap().iter();
    let mut own = rows.filter(|row| row["arm"] == arm && row["task"] == task);
    own.find(|row| row["surface"] == "all" && row["seed"] == "mean").unwrap()
}

#[test]
fn an_ablation_has_an_arm_without_each_part() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut options) = sized(dir.path(), Experiment::Ablation, 400) else { return };
    options.seeds = SeedList(vec![1]);
    let names = ["complete", "without_cross"];
    if components(dir.path(), &mut options, &names).is_none() {
        return;
    }
    let world = options.setup.from.clone().unwrap();
    let items: Vec<u64> = (1..=80).collect();
    let vectors = items.iter().flat_map(|&item| {
        let angle = (item % 12) as f32;
        [angle.sin(), angle.cos()]
    });
    let vectors = vectors.collect();
    content::Content { width: 2, items, vectors }.write(&world).unwrap();
    options.expert = names[0].into();
    options.variant = vec![names[1].into()];
    let both = ["candidate columns", "content vectors", "negatives in histories"];
    let experts = ["TAE", "FM logits", "TAE and FM logits", "the short history"];
    let fms = both.iter().chain(&["effects of counters"]).map(|part| format!("FM without {part}"));
    let parts = ["the FM's candidate columns", both[1], both[2], "effects of counters"];
    let experts = parts.iter().chain(&experts).map(|part| format!("without {part}"));
    let arms: Vec<String> = fms.chain(experts).chain([names[1].into()]).collect();
    let arms: Vec<&str> = arms.iter().map(String::as_str).collect();
    let json = found(&options, &arms);
    assert_eq!(json["config"]["chosen"]["left_out"], serde_json::json!({}));
    for arm in arms {
        let of = row(&json, arm, "click");
        let whole = if arm.starts_with("FM") { "FM" } else { "whole" };
        assert_eq!(of["baseline"], whole);
        assert!(of["ne"] != row(&json, whole, "click")["ne"], "{arm} is the whole");
    }
    for (variant, said) in [
        ("whole", "--variant whole: there is an arm of this name"),
        ("without TAE", "--variant without TAE: there is an arm of this name"),
        ("without_corss", "without_corss.wasm"),
    ] {
        options.variant = vec![variant.into()];
        let message = run(&options).unwrap_err().to_string();
        assert!(message.contains(said), "{message}");
    }
    options.variant = vec![names[1].into(); 2];
    assert!(run(&options).unwrap_err().to_string().contains("--variant without_cross"));
}

#[test]
fn an_ablation_names_the_parts_that_are_missing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut options) = sized(dir.path(), Experiment::Ablation, 300) else { return };
    let Some(names) = components(dir.path(), &mut options, &["pointwise"]) else { return };
    options.expert = names[0].into();
    options.seeds = SeedList(vec![1]);
    let report = run(&options).unwrap();
    let arms = ["whole", "without TAE", "FM"];
    let has = |arm: &str| report.rows.iter().any(|row| row.arm == arm);
    assert!(arms.iter().all(|arm| has(arm)) && !has("without the short history"));
    let text = report.to_string();
    let network = "parts of the expert's network, such as a cross network";
    for part in ["content vectors", "FM logits", "the short history", network] {
        assert!(text.contains(&format!("left out: {part}: ")), "{part}: {text}");
    }
}

#[test]
fn table_3_withholds_all_tasks_but_one() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path(), Experiment::Unseen) else { return };
    let options =
        ExperimentOptions { surface: Some("feed".into()), task: Some("like".into()), ..options };
    let json = found(&options, &["baseline", "+TAE"]);
    for row in json["rows"].as_array().unwrap() {
        assert_eq!(row["surface"], "feed");
        assert_eq!(row["withheld"], row["task"] != "like", "{row}");
    }
    let message = run(&ExperimentOptions { surface: Some("nowhere".into()), ..options.clone() })
        .unwrap_err()
        .to_string();
    assert!(message.contains("nowhere") && message.contains("search"), "{message}");
    let message =
        run(&ExperimentOptions { task: Some("watch".into()), ..options }).unwrap_err().to_string();
    assert!(message.contains("click"), "{message}");
}

#[test]
fn compute_tells_what_each_model_costs() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path(), Experiment::Compute) else { return };
    let json = found(&options, &["one-stage", "expert without TAE", "expert with TAE"]);
    let models = json["models"].as_array().unwrap();
    let flops = |arm: &str| {
        let model = models.iter().find(|model| model["arm"] == arm).unwrap();
        for key in ["dense_parameters", "sparse_parameters", "latency_p50_ms"] {
            assert!(model[key].as_f64().unwrap() > 0.0, "{arm}: {key}");
        }
        model["flops_per_candidate"].as_f64().unwrap()
    };
    assert_eq!(flops("FM + expert"), flops("FM") + flops("expert with TAE"));
    assert_eq!(models[0]["share_of_one_stage_pct"], 100.0);
}

#[test]
fn a_user_embedding_sees_no_event_younger_than_the_staleness() {
    let event = |time_ms: i64| Event {
        item: Arc::new(Item::default()),
        surface: 0,
        time_ms,
        outcome: Happened::UNKNOWN,
    };
    let example = Example {
        request: 1,
        user: Arc::new(User::default()),
        surface: 0,
        time_ms: 100_000_000,
        history: [10, 70_000_000, 78_400_000, 78_400_001, 99_999_999].map(event).to_vec(),
        targets: Vec::new(),
    };
    let times = |hours: f64| -> Vec<i64> {
        let old = tae::stale(&example, (hours * 3.6e6) as i64);
        old.history.iter().map(|event| event.time_ms).collect()
    };
    assert_eq!(times(6.0), [10, 70_000_000, 78_400_000]);
    assert_eq!(times(0.0).len(), 5);
    assert_eq!(times(27.0), [10]);
}

#[test]
fn options_that_cannot_work_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path(), Experiment::Tae) else { return };
    let fail = |options: &ExperimentOptions| run(options).unwrap_err().to_string();
    assert!(fail(&ExperimentOptions { users: Some(0.0), ..options.clone() }).contains("--users"));
    assert!(
        fail(&ExperimentOptions { seeds: SeedList(vec![]), ..options.clone() }).contains("seed")
    );
    let message = fail(&ExperimentOptions { expert: "missing".into(), ..options });
    assert!(message.contains("missing.wasm"), "{message}");
}

#[test]
fn what_is_published_in_part_costs_bytes_in_part() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path(), Experiment::Publish) else { return };
    let json = found(&options, &["everything", "30 %", "10 %", "never"]);
    let sent = |arm: usize| json["models"][arm].clone();
    let share = |arm: usize| sent(arm)["share_of_bytes"].as_f64().unwrap();
    assert!(share(0) > 0.3 && share(1) <= 0.3 && share(2) <= 0.1, "{}", json["models"]);
    assert!(sent(0)["publications"].as_u64() > Some(2) && sent(3)["publications"] == 0);
    // The copies differ, so publications reach them.
    let ne = |arm: &str| {
        let rows = json["rows"].as_array().unwrap().iter();
        let mut own = rows.filter(|row| row["arm"] == arm && row["surface"] == "all");
        own.find(|row| row["task"] == "click" && row["seed"] == 1).unwrap()["ne"].clone()
    };
    assert!(ne("everything") != ne("30 %") && ne("everything") != ne("never"));
    let mut fixed = options;
    fixed.setup.mode = TestMode::Fixed;
    let fixed = run(&fixed).unwrap_err().to_string();
    assert!(fixed.contains("--mode fixed"), "{fixed}");
}

#[test]
fn scaling_fits_laws_of_fms_and_experts_to_one_stream() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut options) = options(dir.path(), Experiment::Scaling) else { return };
    // The parts of this experiment do not depend on the number of seeds; fits do, in `law`.
    options.seeds = SeedList(vec![1]);
    let (into, seed) = (dir.path().join("power-law"), 4);
    let (users, items, requests, surfaces) = (40, 300, 250, 2);
    simulate_power_law(&SimulateOptions {
        into: into.clone(),
        users,
        items,
        requests,
        surfaces,
        seed,
    })
    .unwrap();
    options.setup.from = Some(into);
    let largest = ["d16 l2 h16 at 1", "expert of d16 l2 h16"];
    let json = found(&options, &["d2 l2 h16 at 1", largest[0], "expert without TAE", largest[1]]);
    assert_eq!(json["config"]["mode"], "fixed");
    let laws = json["laws"].as_array().unwrap();
    let of: Vec<_> =
        laws.iter().map(|law| format!("{} {}", law["task"], law["of"]).replace('"', "")).collect();
    let subjects = |task| ["fm", "fm-all-data"].map(|of| format!("{task} {of}"));
    let experts = ["click expert", "like expert"].map(String::from).to_vec();
    assert_eq!(of, [subjects("click").to_vec(), subjects("like").to_vec(), experts].concat());
    let models = json["models"].as_array().unwrap();
    for law in laws {
        assert_eq!(law["floor_is_known"], true);
        let floor = law["fit"]["floor"].as_f64().unwrap();
        assert!((0.4..1.0).contains(&floor), "{law}");
        assert!(law["exponent_ci95"][0].as_f64() <= law["exponent_ci95"][1].as_f64(), "{law}");
        let points = law["points"].as_array().unwrap();
        let ne = |point: &Value| point["ne"].as_f64().unwrap();
        assert!(points.iter().all(|point| ne(point) > floor), "no model beats the optimum");
        assert_eq!(points.len(), if law["of"] == "fm" { 4 * models.len() } else { 5 });
    }
    let trials = json["config"]["chosen"]["rate_trials"].as_array().unwrap();
    let of_largest = trials.iter().filter(|trial| trial["model"] == "d16 l2 h16");
    assert_eq!((trials.len(), of_largest.count()), (15, 3));
    let largest = &laws[0]["largest"];
    assert!(largest["predicted_ne"].as_f64().is_some() && largest["measured_ne"].is_number());
    for model in models {
        let flops: Vec<f64> =
            model["training_flops"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
        assert!(flops.len() == 4 && flops.is_sorted() && flops[0] > 0.0, "{model}");
    }
    let ratio = |a: usize, b: usize| {
        let flops = |at: usize| models[at]["training_flops"][3].as_f64().unwrap();
        flops(a) / flops(b)
    };
    assert!(ratio(4, 0) > 8.0, "the largest costs much more than the smallest");
}

#[test]
fn seeds_are_a_count_or_a_list() {
    assert_eq!(SeedList::parse("3").unwrap().0, [1, 2, 3]);
    assert_eq!(SeedList::parse("4,9").unwrap().0, [4, 9]);
    assert_eq!(SeedList::parse("7,").unwrap().0, [7]);
    for text in ["0", "x", ","] {
        assert!(SeedList::parse(text).is_err(), "{text}");
    }
}
