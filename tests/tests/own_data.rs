//! A team's own files, by the commands: a mapping is proposed, the files are imported, bodies of
//! `POST /v1/events` that say the same come to the same, and what is wrong with a data set is
//! refused with the same words by the check and by training. The guide in `examples/own-data` is
//! run to the ranked answer.

use std::{fmt::Write as _, os::unix::fs::symlink, path::Path, process::Command};

use hypercast_config::Config;
use hypercast_core::prerequisite::skip;
use hypercast_data::dataset::{Dataset, Impression, ImpressionWriter, content::Content};
use hypercast_tests::{
    Prerequisites, binary,
    commands::{checkout, shell_blocks},
    prerequisites,
    services::free_port,
};
use serde_json::{Value, json};

const GUIDE: &str = include_str!("../../examples/own-data/README.md");

const PLACEMENTS: [&str; 3] = ["home", "search", "product"];

/// A row of the log: number `at` of 600.
struct Shown {
    request: u64,
    user: u64,
    item: u64,
    placement: &'static str,
    time_ms: i64,
    clicked: bool,
    price: u64,
    /// None to five labels.
    labels: Vec<&'static str>,
}

fn shown(at: u64) -> Shown {
    let request = at / 3;
    let chance = hypercast_core::hash::mix64(at + 1);
    Shown {
        request: 1000 + request,
        user: 1 + hypercast_core::hash::mix64(request) % 25,
        // Steps of 7 and 11 meet no item of the request twice.
        item: 1 + (request * 7 + at % 3 * 11) % 40,
        placement: PLACEMENTS[request as usize % 3],
        time_ms: 1_764_000_000_000 + request as i64 * 60_000,
        clicked: chance.is_multiple_of(4),
        price: at % 3,
        labels: ["new", "red", "blue", "sale", "old"]
            .into_iter()
            .enumerate()
            .filter(|(bit, _)| chance >> (8 + bit) & 1 == 1)
            .map(|(_, label)| label)
            .collect(),
    }
}

/// Runs the program in `dir`, and returns what it prints; an error is its own words.
fn hypercast(dir: &Path, args: &[&str]) -> Result<String, String> {
    let program = binary().expect("the test checked it");
    let output = Command::new(program).args(args).current_dir(dir).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn rows(dir: &Path) -> Vec<Impression> {
    let data = Dataset::open(dir).expect("a data set");
    let rows = data.impressions().expect("it has impressions").map(|row| row.expect("a row"));
    let mut rows: Vec<Impression> = rows.collect();
    rows.sort_by_key(|row| (row.time_ms, row.item));
    rows
}

#[test]
fn files_and_events_become_the_same_data_set() {
    if binary().is_none() {
        return skip("own_data", "`cargo verify` builds the binary that it needs");
    }
    let dir = tempfile::tempdir().expect("a folder can be made");
    let dir = dir.path();
    let mut log = "request_id,user_id,item_id,placement,shown_at,clicked,price,labels\n".to_owned();
    let mut bodies = String::new();
    for at in 0..600 {
        // Not in the order of time.
        let Shown { request, user, item, placement, time_ms, clicked, price, labels } =
            shown((at * 7) % 600);
        let row = format!("{request},{user},{item},{placement},{time_ms},{clicked},{price}");
        let _ = writeln!(log, "{row},{}", labels.join("|"));
        let body = json!({"events": [{
            "request": request, "user": user, "item": item, "surface": placement,
            "time_ms": time_ms, "outcome_ms": time_ms + 3_600_000, "actions": {"clicked": clicked},
            "context": {"price": price, "labels": labels},
        }]});
        let _ = writeln!(bodies, "{body}");
    }
    let write =
        |name: &str, text: &str| std::fs::write(dir.join(name), text).expect("it is written");
    let vectors: Vec<Vec<f32>> = (1..=40).map(|item| vec![item as f32, 1.0, -0.5]).collect();
    for (item, vector) in (1..=40).zip(&vectors) {
        // Items come without their vectors, too, which then stay.
        for content in [Some(vector), None] {
            let item = json!({"id": item, "features": {}, "content": content});
            let _ = writeln!(bodies, "{}", json!({ "items": [item] }));
        }
    }
    let vectors = Content { width: 3, items: (1..=40).collect(), vectors: vectors.concat() };
    vectors.write(dir).expect("it is written");
    write("log.csv", &log);
    write("events.jsonl", &bodies);
    let infer = ["data", "infer", "--impressions", "log.csv", "--into", "mapping.toml"];
    hypercast(dir, &infer).unwrap();
    let mapping = ["data", "import", "--mapping", "mapping.toml", "--into", "data"];
    let content = ["--content", "content.parquet"];
    let said = hypercast(dir, &[&mapping[..], &content].concat()).unwrap();
    assert!(said.contains("600 impressions") && said.contains("in 200 requests"), "{said}");
    assert!(said.contains(": 0 refused"), "{said}");
    let events =
        ["data", "import", "--events", "events.jsonl", "--schema", "data/schema.toml", "--into"];
    let said = hypercast(dir, &[&events[..], &["other"]].concat()).unwrap();
    assert!(said.contains("600 impressions") && said.contains("in 200 requests"), "{said}");
    let (own, other) = (rows(&dir.join("data")), rows(&dir.join("other")));
    assert_eq!(own.len(), 600);
    assert!(own.iter().all(|row| row.context.ids.len() == 8), "five labels, in fours");
    assert!(own.iter().any(|row| row.context.ids[4] > 0), "as many as there are");
    for (own, other) in own.iter().zip(&other) {
        let of = |row: &Impression| {
            let Impression { time_ms, outcome_ms, user, item, surface, .. } = *row;
            let outcome = (row.outcome.actions, row.outcome.known);
            (time_ms, outcome_ms, user, item, surface, outcome, row.context.clone())
        };
        assert_eq!(of(own), of(other));
    }
    let vectors = |data: &str| Content::read(&dir.join(data).join("content.parquet")).unwrap();
    let (own, other) = (vectors("data"), vectors("other"));
    assert_eq!((own.width, &own.items), (other.width, &other.items));
    assert_eq!(own.items.len(), 40);
    let mut numbers = own.vectors.iter().zip(&other.vectors);
    assert!(numbers.all(|(own, other)| (own - other).abs() < 1e-6), "{own:?}, {other:?}");
    let error = hypercast(dir, &infer).unwrap_err();
    assert!(error.contains("mapping.toml: it exists"), "{error}");
    write("wrong.jsonl", "{\"events\": [{\"user\": 1}]}\n");
    let wrong = ["data", "import", "--events", "wrong.jsonl", "--schema", "data/schema.toml"];
    let error = hypercast(dir, &[&wrong[..], &["--into", "third"]].concat()).unwrap_err();
    assert!(error.contains("wrong.jsonl") && error.contains("missing field `item`"), "{error}");
    let error = hypercast(dir, &["data", "import", "--into", "third"]).unwrap_err();
    assert!(error.contains("--mapping"), "{error}");
}

#[test]
fn a_data_set_that_is_wrong_is_refused_by_the_check_and_by_training() {
    if binary().is_none() {
        return skip("own_data", "`cargo verify` builds the binary that it needs");
    }
    let dir = tempfile::tempdir().expect("a folder can be made");
    let dir = dir.path();
    let world = "simulate --users 30 --items 40 --requests 100 --surfaces 2 --seed 1 --into data";
    hypercast(dir, &world.split(' ').collect::<Vec<_>>()).unwrap();
    let said = hypercast(dir, &["data", "check", "data", "--json"]).unwrap();
    let report: serde_json::Value = serde_json::from_str(&said).expect("it is JSON");
    assert_eq!((&report["rows"], &report["requests"]), (&json!(600), &json!(100)));

    let mut wrong = rows(&dir.join("data"));
    wrong.sort_by_key(|row| (row.time_ms, row.request));
    wrong[4].outcome_ms = wrong[4].time_ms - 1;
    let schema = Dataset::open(&dir.join("data")).expect("a data set").schema;
    let mut writer = ImpressionWriter::create(&dir.join("data"), &schema);
    wrong.iter().for_each(|row| writer.write(row).expect("it is written"));
    writer.finish().expect("it is written");
    let fault = "row 5, column `outcome_ms`: 1 rows have an outcome before their impression";
    hypercast(dir, &["data", "check", "data"]).expect_err("it exits with an error");
    Config::default().write(&dir.join("hypercast.toml")).expect("it is written");
    let error = hypercast(dir, &["train", "fm"]).unwrap_err();
    assert!(error.contains(fault) && error.contains("--force"), "{error}");
    assert!(!dir.join("runs").exists(), "nothing was trained");
}

/// Runs the guide's commands in a new folder, on a shop of `requests` requests, or of as many as
/// the guide has. Returns what they print.
fn follow_the_guide(test: &str, requests: Option<u32>) -> Option<String> {
    let Prerequisites { hypercast, plugins, .. } = prerequisites(test)?;
    let dir = tempfile::tempdir().expect("a folder can be made");
    let (checkout, dir) = (checkout(), dir.path());
    let built = dir.join("target/hypercast");
    std::fs::create_dir_all(&built).expect("a folder can be made");
    symlink(plugins, built.join("plugins")).expect("a link can be made");
    for name in ["examples", "hypercast.toml"] {
        symlink(checkout.join(name), dir.join(name)).expect("a link can be made");
    }
    // The tests' own build takes the place of the guide's.
    let commands = shell_blocks(GUIDE).concat();
    let commands = commands.lines().filter(|line| !line.starts_with("cargo "));
    let commands = commands.collect::<Vec<_>>().join("\n");
    assert!(commands.lines().count() <= 10, "ten commands at most");
    let port = free_port();
    let commands = commands.replace("localhost:8570", &format!("127.0.0.1:{port}"));
    let commands =
        commands.replace("hypercast serve", &format!("hypercast serve --listen 127.0.0.1:{port}"));
    let commands = match requests {
        Some(requests) => {
            commands.replace("--into shop", &format!("--into shop --requests {requests}"))
        }
        None => commands,
    };
    let path = std::env::var("PATH").unwrap_or_default();
    let programs = hypercast.parent().expect("the binary is in a folder").display();
    let script = format!("set -eu\ntrap 'kill $(jobs -p)' EXIT\n{commands}\n");
    let output = Command::new("timeout")
        .args(["1200", "bash", "-c", &format!("{{ {script} }} 2>&1")])
        .current_dir(dir)
        .env("PATH", format!("{programs}:{path}"))
        .output()
        .expect("bash runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "a command of the guide failed:\n{said}");
    Some(said)
}

/// The daemon's answer to the guide's request.
fn ranking(said: &str) -> Value {
    let answer = said.lines().find(|line| line.contains("\"ranking\"")).expect("an answer");
    let start = answer.find('{').expect("it is JSON");
    let answers = serde_json::Deserializer::from_str(&answer[start..]).into_iter::<Value>();
    answers.map(|answer| answer.expect("it is JSON")).next().expect("an answer")
}

#[test]
fn the_guide_leads_from_files_to_a_ranked_answer() {
    let Some(said) = follow_the_guide("own_data", Some(600)) else { return };
    let answer = ranking(&said);
    assert_eq!(answer["degraded"], false, "{answer}");
    let mut ids: Vec<&str> =
        answer["ranking"].as_array().unwrap().iter().map(|of| of["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["SKU-00001", "SKU-00002", "SKU-00003"]);
    assert!(said.contains("\"accepted\":1"), "{said}");
}

#[test]
#[ignore = "takes a minute; `cargo xtask full` runs it"]
fn models_of_the_whole_shop_are_better_than_the_base_rate() {
    let Some(said) = follow_the_guide("own_data", None) else { return };
    let rows = || said.lines().map(|line| line.split_whitespace().collect::<Vec<&str>>());
    let number = |cell: &str| cell.parse::<f64>().expect("a number");
    for task in ["clicked", "added_to_cart", "purchased"] {
        // One of the FM, and one of the expert.
        let of_all = rows().filter(|row| row.len() == 6 && row[..2] == ["all", task]);
        let ne: Vec<f64> = of_all.map(|row| number(row[3])).collect();
        assert!(ne.len() == 2 && ne.iter().all(|&ne| ne < 0.95), "{task}: {ne:?}");
    }
    let revenue: Vec<Vec<&str>> =
        rows().filter(|row| row.len() == 7 && row[..2] == ["all", "revenue"]).collect();
    assert_eq!(revenue.len(), 2, "{said}");
    for row in &revenue {
        let [mse, of_mean, rank] = [3, 4, 6].map(|cell| number(row[cell]));
        println!("figure: MSE of revenue: {mse}, of the mean: {of_mean}, rank correlation: {rank}");
        assert!(mse < of_mean && rank > 0.05, "{revenue:?}");
    }
}
