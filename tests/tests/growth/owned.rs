//! A surface's team adds a feature, a counter, an action and a task of its own while the daemon
//! answers. Its expert learns from them; the FM and the expert of the other surface predict to the
//! bit what they predicted.

use std::{
    path::Path,
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

use hypercast_data::schema::{
    Counter, Feature, FeatureKind, OwnedEntries, Schema, Task, TaskKind, TaskRole,
};
use hypercast_tests::{
    Prerequisites, TestDaemon, expert, prerequisites, rank_body, run, run_well,
    services::wait_until,
};
use serde_json::{Value, json};

use crate::{EndOfLoad, Installation, Load, PATIENCE, QUIET};

#[test]
fn a_team_adds_to_its_surface_and_nobody_else_notices() {
    let Some(Prerequisites { hypercast: binary, plugins, hostile, .. }) =
        prerequisites("growth of a surface")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let installation = Installation::new(&binary, dir.path(), &plugins, |config| {
        let team = hostile.join("search_team.wasm");
        let training = &mut config.expert_training;
        (training.epochs, training.batch_rows, training.learning_rate) = (3, 32, 0.1);
        config.experts = vec![
            expert("home", plugins.join("mlp-fusion.wasm"), &["feed"]),
            expert("search", team, &["search"]),
        ];
    });
    let versions = |args: &[&str]| run_well(&binary, dir.path(), &[&["versions"], args].concat());
    versions(&["register", "fm"]);
    versions(&["promote", "fm", "1.0.0"]);
    for name in ["home", "search"] {
        versions(&["register", "expert", name, "1.0.0"]);
        versions(&["promote", "expert", name, "1.0.0"]);
    }
    let fm_before = fm_files(dir.path());
    let daemon = TestDaemon::start(&binary, dir.path());
    let load = Load::new(&daemon);
    load.has_outcomes.store(false, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let _ends = EndOfLoad(&load);
        for surface in ["feed", "search"] {
            let load = &load;
            scope.spawn(move || load.rank(surface));
        }
        let before = [explained(&daemon, "feed", None), explained(&daemon, "search", None)];

        apply(&installation, &with_own);
        assert_eq!(daemon.post("/v1/admin/reload", "").0, 200);
        let after = [explained(&daemon, "feed", None), explained(&daemon, "search", Some(3.0))];
        assert_eq!(after, before);

        // Its callers send what is new, and its expert learns that it tells the outcome.
        (0..40).for_each(|number| send(&daemon, number));
        let before = explained(&daemon, "feed", None);
        run_well(&binary, dir.path(), &["materialise", "--follow", "--until-end"]);
        run_well(&binary, dir.path(), &["train", "expert", "search"]);
        versions(&["register", "expert", "search", "1.1.0"]);
        versions(&["promote", "expert", "search", "1.1.0"]);
        let cart = |words| {
            let [_, by_expert] = explained(&daemon, "search", Some(words));
            let said: f64 = by_expert["cart"].as_array()?.iter().filter_map(Value::as_f64).sum();
            Some(said / 20.0)
        };
        wait_until("the new version answers", PATIENCE, || cart(0.0).is_some());
        let [few, many] = [-2.0, 2.0].map(|words| cart(words).unwrap());
        assert!(many > few + 0.2, "{few} for few words, {many} for many");
        assert_eq!(explained(&daemon, "feed", None), before);
    });
    assert_eq!(*load.failed.lock().unwrap(), [""; 0]);
    let answered = load.answered.load(Ordering::Relaxed);
    assert!(answered > 50, "{answered} requests");
    assert!(daemon.stop());
    assert!(fm_files(dir.path()) == fm_before, "the FM's files are the same");
    an_expert_of_another_surface_is_told_whose_the_column_is(&binary, dir.path(), &hostile);
}

/// What belongs to the search page from now on.
fn with_own(schema: &Schema) -> Schema {
    let mut schema = schema.clone();
    schema.actions.push("cart".into());
    let cart = Task::of_label("cart", TaskRole::Auxiliary, TaskKind::Binary);
    schema.tasks.push(Task { surfaces: vec!["search".into()], ..cart });
    schema.context_features.push(Feature::new("words", FeatureKind::Dense));
    schema.counters.push(Counter {
        name: "user_cart".into(),
        key: vec!["user_id".into()],
        action: "cart".into(),
        half_life_days: 7.0,
    });
    let own = |name: &str| [name.to_owned()].into();
    let entries = OwnedEntries {
        actions: own("cart"),
        tasks: own("cart"),
        context_features: own("words"),
        counters: own("user_cart"),
        ..OwnedEntries::default()
    };
    schema.owned.insert("search".into(), entries);
    schema
}

fn apply(installation: &Installation, change: &dyn Fn(&Schema) -> Schema) {
    let schema = Schema::load(&installation.dir.join("data/schema.toml")).unwrap();
    change(&schema).save(&installation.dir.join("new.toml")).unwrap();
    let args = ["schema", "apply", "new.toml", "--data", "data"];
    let said = run_well(&installation.binary, &installation.dir, &args);
    assert!(said.contains("new action `cart`: number 3, of surface `search` alone"), "{said}");
}

/// Impressions on both surfaces. On the search page, many words put an item into the cart.
fn send(daemon: &TestDaemon, number: u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let shown = |at: u64| {
        let request = 1_000_000 + number * 20 + at;
        let (user, item) = (1 + request % 100, 1 + request * 7 % (QUIET - 1));
        let mut event = json!({
            "request": request, "user": user, "item": item, "surface": "feed", "time_ms": now,
            "actions": { "click": request.is_multiple_of(3), "like": false, "finish": false },
            "values": { "watch": 0.5 },
        });
        if !at.is_multiple_of(4) {
            let words = (request / 2 % 5) as f32 - 2.0;
            event["surface"] = json!("search");
            event["actions"]["cart"] = json!(words > 0.0);
            event["context"] = json!({ "words": words });
        }
        event
    };
    let events: Vec<Value> = (0..20).map(shown).collect();
    let (status, answer) = daemon.post("/v1/events", &json!({ "events": events }).to_string());
    assert_eq!((status, &answer["applied"]), (200, &json!(true)), "{answer}");
}

/// What the FM and the expert of a surface say of some items, as texts that no rounding changes.
fn explained(daemon: &TestDaemon, surface: &str, words: Option<f64>) -> [Value; 2] {
    let mut body = rank_body(QUIET, surface, QUIET..QUIET + 20);
    body["explain"] = json!(true);
    if let Some(words) = words {
        body["context"] = json!({ "words": words });
    }
    let (status, answer) = daemon.post("/v1/rank", &body.to_string());
    assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
    ["fm", "expert"].map(|whose| answer["explain"][whose].clone())
}

/// The content of the FM's checkpoint.
fn fm_files(dir: &Path) -> Vec<Vec<u8>> {
    let names = ["fm.json", "model.safetensors"];
    names.map(|name| std::fs::read(dir.join("runs/fm").join(name)).unwrap()).into()
}

/// A plugin that reads a column of the search page, under a schema where that belongs to the feed.
fn an_expert_of_another_surface_is_told_whose_the_column_is(
    binary: &Path,
    dir: &Path,
    hostile: &Path,
) {
    let mut schema = with_own(&Schema::load(&dir.join("data/schema.previous.toml")).unwrap());
    schema.context_features.push(Feature::new("no_such_feature", FeatureKind::Dense));
    let own = ["no_such_feature".to_owned()].into();
    let entries = OwnedEntries { context_features: own, ..OwnedEntries::default() };
    schema.owned.insert("feed".into(), entries);
    schema.save(&dir.join("other.toml")).unwrap();
    let plugin = hostile.join("foreign_column.wasm").display().to_string();
    let args = ["plugin", "check", &plugin, "--schema", "other.toml"];
    let (well, said) = run(binary, dir, &args);
    let whose = "reads feature `no_such_feature`, which belongs to surface `feed`";
    assert!(!well && said.contains(whose) && said.contains("name `feed` alone"), "{said}");
}
