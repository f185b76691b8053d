//! A team's own files, by the commands: a mapping is proposed, the files are imported, bodies of
//! `POST /v1/events` that say the same come to the same, and what is wrong with a data set is
//! refused with the same words by the check and by training. The guide in `examples/own-data` is
//! run to the ranked answer.

use std::{fmt::Write as _, os::unix::fs::symlink, path::Path, process::Command, time::Duration};

use hypercast_config::Config;
use hypercast_core::prerequisite::skip;
use hypercast_data::dataset::{Dataset, Impression, ImpressionWriter, content::Content};
use hypercast_data::logs::LogReader;
use hypercast_data::schema::Feature;
use hypercast_fm::example::Outcome;
use hypercast_stream::{
    join::JoinedRecord,
    streams::{self, Topic},
};
use hypercast_tests::{
    Prerequisites, TestDaemon, binary,
    commands::{checkout, shell_blocks},
    prerequisites, run_well,
    services::free_port,
    small_config,
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

/// A row of a log with 40 actions and 6 values, of which the last ones depend on the item's kind.
fn wide_row(at: u64) -> String {
    let (request, item) = (at / 3, 1 + (at / 3 * 7 + at % 3 * 11) % 40);
    let chance = |salt: u64| hypercast_core::hash::mix_parts(&[at, salt]) % 100;
    let kind = item % 3;
    let mut row = format!("{request},{},{item},{},{kind}", request % 25, 1_764_000_000 + request);
    for action in 0..40 {
        let likely = if action < 39 { 10 } else { [5, 20, 90][kind as usize] };
        let _ = write!(row, ",{}", u8::from(chance(action) < likely));
    }
    for value in 0..6 {
        let mean = if value < 5 { 0 } else { 20 * kind };
        let _ = write!(row, ",{}", mean + chance(100 + value) % 10);
    }
    row
}

const WIDE_ROWS: u64 = 3000;

/// Writes the log, its mapping, and a configuration with a small FM.
fn write_wide_log(dir: &Path) {
    let actions: Vec<String> = (0..40).map(|at| format!("a{at}")).collect();
    let values: Vec<String> = (0..6).map(|at| format!("v{at}")).collect();
    let mut log =
        format!("request,user,item,time,kind,{},{}\n", actions.join(","), values.join(","));
    (0..WIDE_ROWS).for_each(|at| log += &(wide_row(at) + "\n"));
    let names = |names: &[String]| {
        let entries = names.iter().map(|name| format!("{{ name = \"{name}\" }}"));
        entries.collect::<Vec<_>>().join(", ")
    };
    let mapping = format!(
        r#"
surfaces = ["home"]
actions = [{}]
values = [{}]
context_features = [{{ name = "kind", kind = "categorical" }}]
tasks = [
    {{ name = "a39", label = "a39", role = "main", kind = "binary" }},
    {{ name = "v5", label = "v5", role = "main", kind = "regression" }},
]

[impressions]
files = ["log.csv"]
user = "user"
item = "item"
time = "time"
time_unit = "s"
request = "request"
outcome_delay_s = 1
"#,
        names(&actions),
        names(&values)
    );
    let mut config = small_config();
    (config.fm.dim, config.fm.batch_requests, config.fm.learning_rate) = (16, 16, 1e-2);
    (config.fm.warmup_steps, config.fm.max_history, config.logs.skip_share) = (5, 4, 0.0);
    std::fs::write(dir.join("log.csv"), log).expect("it is written");
    std::fs::write(dir.join("mapping.toml"), mapping).expect("it is written");
    config.write(&dir.join("hypercast.toml")).expect("it is written");
}

#[test]
fn the_fortieth_action_and_the_sixth_value_are_learned_from_files_and_joined_from_events() {
    let Some(program) = binary() else {
        return skip("own_data", "`cargo verify` builds the binary that it needs");
    };
    let dir = tempfile::tempdir().expect("a folder can be made");
    let dir = dir.path();
    write_wide_log(dir);
    hypercast(dir, &["data", "import", "--mapping", "mapping.toml", "--into", "data"]).unwrap();
    let expected = rows(&dir.join("data"));
    let happened = |row: &&Impression| row.outcome.actions >> 39 & 1 == 1;
    assert!((900..1300).contains(&expected.iter().filter(happened).count()));
    assert!(expected.iter().all(|row| row.outcome.known == (1 << 40) - 1));
    let said = hypercast(dir, &["train", "fm"]).unwrap();
    let cells = |task: &str, cells: usize| -> Vec<f64> {
        let rows = said.lines().map(|line| line.split_whitespace().collect::<Vec<&str>>());
        let of_task = |row: &Vec<&str>| row.len() == cells && row[..2] == ["all", task];
        let mut rows = rows.filter(of_task);
        let row = rows.next().unwrap_or_else(|| panic!("no row of {task}: {said}"));
        row[2..].iter().map(|cell| cell.parse().expect("a number")).collect()
    };
    let (ne, of_value) = (cells("a39", 6)[1], cells("v5", 7));
    assert!(ne < 0.9, "{said}");
    assert!(of_value[1] < 0.5 * of_value[2], "its squared error against the mean's: {said}");

    let log = LogReader::open(&dir.join("runs/logs")).expect("train fm wrote it");
    let mut logged = Vec::new();
    for request in log.iter() {
        let example = request.expect("a request").example;
        logged.extend(example.targets.into_iter().map(|own| (example.time_ms, own)));
        let known = example.history.iter().all(|event| event.outcome.known == (1 << 40) - 1);
        assert!(known, "events of a history have 40 actions, too");
    }
    logged.sort_by_key(|(time_ms, target)| (*time_ms, target.item.id));
    assert_eq!(logged.len(), expected.len());
    for ((time_ms, target), row) in logged.iter().zip(&expected) {
        assert_eq!((*time_ms, target.item.id), (row.time_ms, row.item));
        let of = |outcome: &Outcome| (outcome.actions, outcome.known, outcome.values[..6].to_vec());
        assert_eq!(of(&target.outcome), of(&row.outcome));
    }

    let daemon = TestDaemon::start(&program, dir);
    let shown = |request: u64, time_ms: u64| json!({ "request": request, "user": 3, "item": 7, "surface": "home", "time_ms": time_ms });
    let now_ms = 1_765_000_000_000_u64;
    let body = json!({
        "impressions": [shown(9001, now_ms)],
        "actions": [{
            "request": 9001, "item": 7, "time_ms": now_ms + 1000, "complete": true,
            "actions": { "a39": true }, "values": { "v5": 41.5 },
        }],
    });
    let (status, answer) = daemon.post("/v1/events", &body.to_string());
    assert_eq!((status, &answer["applied"]), (200, &json!(true)), "{answer}");
    assert!(daemon.stop());
    let config = Config::read(&dir.join("hypercast.toml")).expect("the test wrote it");
    let engine = streams::open(&config.engine).expect("its streams are there");
    let mut reader = engine.reader(&Topic::joined(), 0).expect("the daemon joined");
    let records = reader.next(16, Duration::from_millis(200)).expect("it can be read");
    let [record] = records.as_slice() else { panic!("{} records", records.len()) };
    let JoinedRecord::Example(joined) = JoinedRecord::decode(&record.payload).unwrap() else {
        panic!("an example was joined")
    };
    let outcome = joined.example.targets[0].outcome;
    assert_eq!((outcome.actions, outcome.known), (1 << 39, (1 << 40) - 1));
    assert_eq!((outcome.values[5], outcome.values[4].is_nan()), (41.5, true));
    let follow = ["train", "fm", "--follow", "--version", "2.0.0", "--until-end"];
    let said = run_well(&program, dir, &follow);
    assert!(said.contains("learned from 1 requests"), "{said}");
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

#[test]
fn the_check_of_a_plugin_counts_all_tags_that_its_network_reads() {
    let Some(Prerequisites { plugins, .. }) = prerequisites("own_data") else { return };
    let dir = tempfile::tempdir().expect("a folder can be made");
    let dir = dir.path();
    let mut schema = hypercast_data::simulate::schema(1);
    schema.item_features.push(Feature::tags("labels", 5));
    schema.save(&dir.join("schema.toml")).expect("it is written");
    let plugin = plugins.join("mlp-fusion.wasm");
    let file = plugin.to_str().expect("its path is text");
    let check = ["plugin", "check", file, "--schema", "schema.toml", "--candidates", "128"];
    let said = hypercast(dir, &check).unwrap();
    let size_of = |id: &str| {
        let label = format!("id `{id}`");
        let line = said.lines().find(|line| line.contains(&label)).expect("it reads all ids");
        line.trim_start().trim_start_matches(&label).trim().to_owned()
    };
    assert_eq!((size_of("topic"), size_of("labels")), ("1.0 KiB".into(), "5.0 KiB".into()));
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

/// A Python with what boosting needs, in a new folder.
fn boosting_python(dir: &Path) -> String {
    let made =
        "python3 -m venv boosting && boosting/bin/pip install --quiet lightgbm pandas pyarrow";
    let made = Command::new("bash").args(["-c", made]).current_dir(dir).status();
    assert!(made.expect("bash runs").success(), "python3, its venv module and pip are needed");
    dir.join("boosting/bin/python").display().to_string()
}

/// Boosting sees all that the expert sees but the embeddings, on days that neither has learned.
#[test]
#[ignore = "takes minutes and packages of Python; `cargo xtask full` runs it"]
fn the_expert_is_no_worse_than_boosting_on_the_whole_shop() {
    let Some(Prerequisites { lab, plugins, .. }) = prerequisites("own_data") else { return };
    let dir = tempfile::tempdir().expect("a folder can be made");
    let dir = dir.path();
    let shop = checkout().join("examples/own-data/shop.py");
    let shop = Command::new("python3").arg(shop).args(["--into", "shop"]).current_dir(dir).status();
    assert!(shop.expect("python3 runs").success());
    let files = ["--impressions", "shop/log-*.csv", "--items", "shop/articles.csv"];
    let infer = ["data", "infer", "--users", "shop/customers.jsonl", "--into", "mapping.toml"];
    hypercast(dir, &[&infer[..], &files].concat()).unwrap();
    let output = Command::new(lab)
        .args(["evaluate", "--mode", "fixed", "--mapping", "mapping.toml", "--json", "report.json"])
        .args(["--boosting", &boosting_python(dir), "--plugins"])
        .arg(plugins)
        .current_dir(dir)
        .output()
        .expect("the lab runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = std::fs::read_to_string(dir.join("report.json")).expect("it is written");
    let report: Value = serde_json::from_str(&report).expect("it is JSON");
    let tasks = report["verdict"]["tasks"].as_array().expect("a verdict");
    assert_eq!(tasks.len(), 3, "{tasks:?}");
    for task in tasks {
        let differences = task["differences"].as_array().expect("differences");
        let beside = differences.iter().find(|of| of["baseline"] == "boosting").expect("boosting");
        let number = |value: &Value| value.as_f64().expect("a number");
        let name = task["task"].as_str().expect("a name");
        let arms = task["arms"].as_array().expect("arms");
        let arms = arms.iter().map(|arm| {
            format!("{} {:.4}", arm["arm"].as_str().expect("a name"), number(&arm["ne"]))
        });
        let arms = arms.collect::<Vec<_>>().join(", ");
        let [pct, low, high] = [&beside["pct"], &beside["ci95"][0], &beside["ci95"][1]].map(number);
        println!(
            "figure: NE of {name}: {arms}; expert with TAE to boosting {pct:+.2} % [{low:+.2}, \
             {high:+.2}]"
        );
        assert!(low <= 0.0, "{name}: {beside}");
    }
}
