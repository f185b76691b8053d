//! Ten teams on one daemon, each with a surface and an expert of its own, which in turn change
//! their part of the schema, their hooks and their networks while requests are answered. The FM is
//! frozen and no outcome arrives, so what all others are answered must stay, to the bit.
//!
//! `HYPERCAST_TEAMS_MINUTES` sets how long they go on (1 by default).

use std::{
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_data::schema::{Counter, Feature, FeatureKind, Schema, Task, TaskKind, TaskRole};
use hypercast_tests::{
    Prerequisites, TestDaemon, expert, prerequisites, rank_body, run_well, services::wait_until,
    world,
};
use serde_json::{Value, json};

use crate::{EndOfLoad, Load, PATIENCE};

/// The plugins that a team takes in turn: each has another network, and other hooks and rules.
const PLUGINS: [&str; 3] = ["mlp-fusion.wasm", "short-term.wasm", "value-model.wasm"];

/// Rounds in which a team adds to its part of the schema; in later ones it changes its plugin only,
/// because a schema has at most 64 actions.
const GROWING_ROUNDS: usize = 4;

/// The teams, each with a surface.
const TEAMS: usize = 10;

#[test]
#[ignore = "takes minutes: `cargo xtask full --steps teams`"]
fn teams_change_what_is_theirs_and_nobody_else_notices() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("teams") else {
        return;
    };
    let most = duration();
    let dir = tempfile::tempdir().unwrap();
    let mut teams = Teams::new(&binary, dir.path(), &plugins);
    let daemon = TestDaemon::start(&binary, dir.path());
    let load = Load::new(&daemon);
    let start = Instant::now();
    let mut changes = 0;
    std::thread::scope(|scope| {
        let _ends = EndOfLoad(&load);
        for surface in teams.surfaces.clone() {
            let load = &load;
            scope.spawn(move || load.rank(&surface));
        }
        while start.elapsed() < most {
            let (team, round) = (changes % TEAMS, 1 + changes / TEAMS);
            let before = teams.answers(&daemon);
            teams.change(&daemon, team, round);
            let after = teams.answers(&daemon);
            for (other, surface) in teams.surfaces.iter().enumerate() {
                if other == team {
                    assert_ne!(before[other], after[other], "{surface} has a new network");
                } else {
                    assert_eq!(before[other], after[other], "{surface} after team {team}");
                }
            }
            changes += 1;
        }
    });
    assert_eq!(*load.failed.lock().unwrap(), [""; 0]);
    let answered = load.answered.load(Ordering::Relaxed);
    println!(
        "figure: {TEAMS} teams, {changes} changes in {:.1} minutes, {answered} requests, 0 failed, \
         others' predictions the same to the bit",
        start.elapsed().as_secs_f64() / 60.0
    );
    assert!(daemon.stop());
}

/// How long they go on.
fn duration() -> Duration {
    let minutes = std::env::var("HYPERCAST_TEAMS_MINUTES");
    let minutes = minutes.map_or(1.0, |text| text.parse().expect("it is a number"));
    Duration::from_secs_f64(minutes * 60.0)
}

/// An installation in which each surface has a team.
struct Teams {
    binary: PathBuf,
    dir: PathBuf,
    plugins: PathBuf,
    config: Config,
    surfaces: Vec<String>,
}

impl Teams {
    fn new(binary: &Path, dir: &Path, plugins: &Path) -> Teams {
        let mut config = world(dir, 600, TEAMS);
        // What is trained here beside it takes the machine from the daemon.
        config.server.deadline_ms = 5_000;
        config.plugin_limits.deadline_ms = 500;
        let surfaces = Schema::load(&dir.join("data/schema.toml")).unwrap().surfaces;
        let entry = |surface: &String| expert(surface, plugins.join(PLUGINS[0]), &[surface]);
        config.experts = surfaces.iter().map(entry).collect();
        let teams = Teams {
            binary: binary.into(),
            dir: dir.into(),
            plugins: plugins.into(),
            config,
            surfaces,
        };
        teams.config.write(&dir.join("hypercast.toml")).unwrap();
        teams.run(&["train", "fm"]);
        teams.run(&["train", "expert"]);
        teams.run(&["versions", "register", "fm"]);
        teams.run(&["versions", "promote", "fm", "1.0.0"]);
        for surface in &teams.surfaces {
            teams.promote(surface, "1.0.0");
        }
        teams
    }

    /// What users of each surface are answered: the predictions of FM and expert.
    fn answers(&self, daemon: &TestDaemon) -> Vec<Vec<Value>> {
        let answer = |user, surface: &str| {
            let mut body = rank_body(user, surface, 1..20);
            body["explain"] = json!(true);
            let (status, answer) = daemon.post("/v1/rank", &body.to_string());
            assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
            let explain = &answer["explain"];
            json!([explain["expert"], explain["fm"], answer["ranking"]])
        };
        let of = |surface: &String| (1..6).map(|user| answer(user, surface)).collect();
        self.surfaces.iter().map(of).collect()
    }

    /// A team adds to its part of the schema and takes the next plugin, trained on it.
    fn change(&mut self, daemon: &TestDaemon, team: usize, round: usize) {
        let surface = self.surfaces[team].clone();
        if round <= GROWING_ROUNDS {
            self.grow(&surface, round);
            let (status, outcome) = daemon.post("/v1/admin/reload", "");
            assert_eq!(status, 200, "{outcome}");
            // The logs take the schema over, too.
            self.run(&["materialise", "--follow", "--until-end"]);
        }
        self.config.experts[team].plugin = self.plugins.join(PLUGINS[round % PLUGINS.len()]);
        self.config.write(&self.dir.join("hypercast.toml")).unwrap();
        self.run(&["train", "expert", &surface]);
        let version = format!("1.{round}.0");
        self.promote(&surface, &version);
        wait_until(&format!("{surface} {version} serves"), PATIENCE, || {
            let body = rank_body(1, &surface, 1..9).to_string();
            daemon.post("/v1/rank", &body).1["expert"]["version"] == version.as_str()
        });
    }

    /// Adds a feature, an action, a counter of it, and a task that belong to a surface.
    fn grow(&self, surface: &str, round: usize) {
        let mut schema = Schema::load(&self.dir.join("data/schema.toml")).unwrap();
        let [feature, action, counter, task] = ["feature", "action", "counter", "task"]
            .map(|kind| format!("{surface}_{kind}_{round}"));
        let own = schema.owned.entry(surface.into()).or_default();
        own.context_features.insert(feature.clone());
        own.actions.insert(action.clone());
        own.counters.insert(counter.clone());
        own.tasks.insert(task.clone());
        let dense = Feature::new(&feature, FeatureKind::Dense);
        schema.context_features.push(Feature { optional: true, ..dense });
        let key = vec!["item_id".into()];
        schema.counters.push(Counter {
            name: counter,
            key,
            action: action.clone(),
            half_life_days: 1.0,
        });
        let label = Task::of_label(&action, TaskRole::Auxiliary, TaskKind::Binary);
        schema.tasks.push(Task { name: task, surfaces: vec![surface.into()], ..label });
        schema.actions.push(action);
        schema.save(&self.dir.join("new.toml")).unwrap();
        self.run(&["schema", "apply", "new.toml", "--data", "data"]);
    }

    fn promote(&self, surface: &str, version: &str) {
        self.run(&["versions", "register", "expert", surface, version]);
        self.run(&["versions", "promote", "expert", surface, version]);
    }

    fn run(&self, args: &[&str]) {
        run_well(&self.binary, &self.dir, args);
    }
}
