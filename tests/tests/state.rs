//! State that earlier releases wrote (`tests/state`): this build must load all of it and go on
//! with it.
//!
//! The tests use the binary and its HTTP interface alone, so that names inside the code may change.
//! Each works on a copy. The registry keeps absolute paths: tests that need it put their copy where
//! `make.sh` had made the state, one test at a time. `HYPERCAST_BINARY` names another binary to
//! test than this build's.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use hypercast_core::prerequisite::skip;
use hypercast_data::dataset::content;
use hypercast_tests::{
    TestDaemon, binary, run, run_well,
    services::{ServiceProcess, free_port, wait_until},
};
use serde_json::{Value, json};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How far a prediction may be from that of the release, on whatever processor.
const TOLERANCE: f64 = 1e-4;

/// The same after training, where differences add up.
const TRAINED_TOLERANCE: f64 = 1e-3;

/// The same after an expert was trained from its beginning, of which no more is held than that all
/// it predicts is a share. Its rows are few, and lead hardly away from where it begins: at the mean
/// of the labels now, and at one half and 0 in the release.
const RETRAINED_TOLERANCE: f64 = 1.0;

/// A copy of the state of a release.
struct State {
    binary: PathBuf,
    dir: PathBuf,
    expected: Value,
    _guard: Guard,
}

/// Removes a copy when it is dropped.
enum Guard {
    Temporary {
        _folder: tempfile::TempDir,
    },
    /// The copy is where the registry's paths lead. The lock keeps other tests out of that folder.
    Registered {
        dir: PathBuf,
        _lock: File,
    },
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Guard::Registered { dir, .. } = self {
            // The next test removes what could not be removed here.
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// The folder of each release.
fn releases() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("state");
    let entries = fs::read_dir(&all).unwrap().map(|entry| entry.unwrap().path());
    let mut releases: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    releases.sort();
    assert!(!releases.is_empty(), "{} holds no release", all.display());
    releases
}

/// Runs a check on a copy of each release's state, in a folder of the copy's own.
fn on_copies(check: impl Fn(&State)) {
    on_states(check, |_| {
        let folder = tempfile::tempdir().unwrap();
        (folder.path().join("state"), Guard::Temporary { _folder: folder })
    });
}

/// Runs a check on a copy of each release's state where the paths of its registry lead.
fn on_registered(check: impl Fn(&State)) {
    on_states(check, |release| {
        let dir = PathBuf::from(format!("/tmp/hypercast-state-{release}"));
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.with_extension("lock"))
            .expect("the lock of the folder that the registry names can be opened");
        lock.lock().expect("it can be taken");
        if dir.exists() {
            fs::remove_dir_all(&dir).expect("what an earlier test left there can be removed");
        }
        (dir.clone(), Guard::Registered { dir, _lock: lock })
    });
}

fn on_states(check: impl Fn(&State), place: impl Fn(&str) -> (PathBuf, Guard)) {
    let other = std::env::var_os("HYPERCAST_BINARY").map(PathBuf::from);
    let Some(binary) = other.or_else(binary) else {
        return skip("state", "`cargo test --workspace` builds the hypercast binary");
    };
    for release in releases() {
        let name = release.file_name().unwrap().to_str().unwrap();
        eprintln!("state of {name}");
        let (dir, guard) = place(name);
        unpack(&release.join("state.tar.gz"), &dir);
        let text = fs::read_to_string(release.join("expected.json")).unwrap();
        let expected = serde_json::from_str(&text).unwrap();
        check(&State { binary: binary.clone(), dir, expected, _guard: guard });
    }
}

fn unpack(archive: &Path, into: &Path) {
    fs::create_dir_all(into).unwrap();
    let tar = Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(into).status();
    assert!(tar.expect("tar runs").success(), "{} can be unpacked", archive.display());
}

impl State {
    fn run(&self, args: &[&str]) -> String {
        run_well(&self.binary, &self.dir, args)
    }

    fn daemon(&self) -> TestDaemon {
        TestDaemon::start(&self.binary, &self.dir)
    }

    /// Takes a folder away, which must be there.
    fn without(&self, folder: &str) -> &Self {
        fs::remove_dir_all(self.dir.join(folder)).unwrap();
        self
    }

    fn lines(&self, file: &str) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join(file)).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// The answers to the stored questions.
    fn answers(&self, daemon: &TestDaemon) -> Vec<Value> {
        let answer = |question: String| {
            let (status, answer) = daemon.post("/v1/rank", &question);
            assert_eq!((status, &answer["degraded"]), (200, &Value::from(false)), "{answer}");
            answer
        };
        self.lines("questions.jsonl").into_iter().map(answer).collect()
    }

    /// Checks that the stored questions are answered as the release answered them.
    fn assert_ranks(&self, daemon: &TestDaemon, expected: &str, tolerance: f64) {
        let expected = self.expected[expected].as_array().unwrap();
        let found = self.answers(daemon);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found["expert"]["arm"], expected["arm"], "{found}");
            assert_eq!(found["fm_version"], expected["fm_version"], "{found}");
            // The FM is the release's, whatever its expert learned.
            let of_fm = tolerance.min(TRAINED_TOLERANCE);
            assert_close(&found["explain"]["fm"], &expected["fm"], of_fm);
            let (found, expected) = (by_id(&found["ranking"]), by_id(&expected["ranking"]));
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found["id"], expected["id"]);
                assert_close(&found["predictions"], &expected["predictions"], tolerance);
            }
        }
    }

    /// Sends the events that came after the state was saved.
    fn send_later_events(&self, daemon: &TestDaemon) {
        for body in self.lines("events-later.jsonl") {
            let (status, answer) = daemon.post("/v1/events", &body);
            assert_eq!((status, &answer["repeated"]), (200, &Value::from(0)), "{answer}");
        }
    }

    /// Joins until nothing is left and checks the joiner's counts since the first event. Returns
    /// the line in which the joiner says where it begins.
    fn join(&self) -> String {
        let address = format!("127.0.0.1:{}", free_port());
        let args = ["join", "--metrics", &address];
        let mut joiner = ServiceProcess::start("join", &self.binary, &args, &self.dir);
        let mut counts = Vec::new();
        wait_until("everything is joined", PATIENCE, || {
            assert!(joiner.is_running(), "{}", joiner.output());
            let said = ureq::get(format!("http://{address}/metrics"))
                .call()
                .map_or_else(|e| e.to_string(), |mut a| a.body_mut().read_to_string().unwrap());
            // Earlier releases did not count rankings that were dropped.
            let counted = |line: &&str| {
                line.starts_with("hypercast_joiner{") && !line.contains("\"unplaced\"")
            };
            counts = said.lines().filter(counted).map(str::to_owned).collect();
            counts.contains(&"hypercast_joiner{what=\"lag_events\"} 0".to_owned())
        });
        joiner.stop(PATIENCE);
        let expected = self.expected["joiner"].as_array().unwrap();
        let expected: Vec<&str> = expected.iter().flat_map(Value::as_str).collect();
        assert_eq!(counts, expected);
        let said = joiner.output();
        let begins = said.lines().rfind(|line| line.starts_with("joining from"));
        begins.unwrap_or_else(|| panic!("{said}")).to_owned()
    }

    /// The parameters that were pushed as 1.1.0: the only ones among the pushed files.
    fn pushed_parameters(&self) -> String {
        let objects = fs::read_dir(self.dir.join("experts/pushed/objects")).unwrap();
        let paths = objects.map(|entry| entry.unwrap().path());
        let mut all = paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
        let path = all.next().expect("parameters were pushed");
        assert!(all.next().is_none(), "they are the only ones");
        path.to_str().unwrap().to_owned()
    }

    /// What a trainer that begins at the stream's first example learns from, as it says. It
    /// publishes whatever it learned: a version of so few requests is no better than what serves.
    fn learned(&self, version: &str) -> String {
        let config = self.dir.join("without-gate.toml");
        let text = fs::read_to_string(self.dir.join("hypercast.toml")).unwrap();
        let gate = if text.contains("[fm_gate]") { "" } else { "\n[fm_gate]\nrows = 0\n" };
        fs::write(&config, text + gate).unwrap();
        let options = ["--version", version, "--until-end", "--config", "without-gate.toml"];
        let said = self.run(&[&["train", "fm", "--follow"], &options[..]].concat());
        let line = said.lines().find(|line| line.starts_with("learned from"));
        line.unwrap_or_else(|| panic!("{said}")).to_owned()
    }
}

/// The greatest difference of predictions between two rankings of the same items.
fn apart(found: &Value, expected: &Value) -> f64 {
    let of = |ranking: &Value| -> Vec<f64> {
        let all = by_id(ranking);
        let predictions = all.iter().flat_map(|one| one["predictions"].as_object().unwrap());
        predictions.map(|(_, value)| value.as_f64().unwrap()).collect()
    };
    let (found, expected) = (of(found), of(expected));
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// A ranking in the order of ids: items of like scores may change places on another processor.
fn by_id(ranking: &Value) -> Vec<Value> {
    let mut all = ranking.as_array().unwrap().clone();
    let score = |one: &Value| one["score"].as_f64();
    assert!(all.windows(2).all(|pair| score(&pair[0]) >= score(&pair[1])), "{ranking}");
    all.sort_by_key(|one| one["id"].as_u64());
    all
}

/// Checks that two values have the same shape, and numbers that are close.
fn assert_close(found: &Value, expected: &Value, tolerance: f64) {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            assert!(found.keys().eq(expected.keys()), "{found:?}; expected {expected:?}");
            for (found, expected) in found.values().zip(expected.values()) {
                assert_close(found, expected, tolerance);
            }
        }
        (Value::Array(found), Value::Array(expected)) => {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert_close(found, expected, tolerance);
            }
        }
        (Value::Number(found), Value::Number(expected)) => {
            let apart = (found.as_f64().unwrap() - expected.as_f64().unwrap()).abs();
            assert!(apart <= tolerance, "{found}; expected {expected}");
        }
        _ => assert_eq!(found, expected),
    }
}

#[test]
fn a_data_set_with_content_a_checkpoint_and_parameters_answer_as_they_did() {
    on_copies(|state| {
        let daemon = state.without("streams").without("state").daemon();
        state.assert_ranks(&daemon, "configured", TOLERANCE);
        assert!(daemon.stop());
    });
}

#[test]
fn every_checksum_of_the_embedding_stores_matches() {
    on_copies(|state| {
        for store in state.expected["stores"].as_array().unwrap() {
            let said = state.run(&["store", "check", store["dir"].as_str().unwrap()]);
            assert!(said.contains("every checksum matches"), "{said}");
            assert!(said.contains(store["said"].as_str().unwrap()), "{said}; expected {store}");
        }
    });
}

#[test]
fn a_saved_training_run_goes_on_to_the_checkpoint_and_logs_that_it_led_to() {
    on_copies(|state| {
        state.without("fm").without("streams").without("state");
        let said = state.run(&["train", "fm", "--resume"]);
        let logged = state.expected["logged"].as_str().unwrap();
        assert!(said.contains(logged), "{said}; expected {logged}");
        let daemon = state.daemon();
        state.assert_ranks(&daemon, "configured", TRAINED_TOLERANCE);
        assert!(daemon.stop());
    });
}

#[test]
fn feature_logs_train_an_expert_like_the_one_that_they_trained() {
    on_copies(|state| {
        state.without("experts").without("streams").without("state");
        state.run(&["train", "expert", "home"]);
        let daemon = state.daemon();
        state.assert_ranks(&daemon, "configured", RETRAINED_TOLERANCE);
        assert!(daemon.stop());
        // Those of the logging tier, with the embeddings of two versions.
        for (fm, rows) in state.expected["stream_rows"].as_object().unwrap() {
            let said =
                state.run(&["train", "expert", "home", "--config", "stream.toml", "--fm", fm]);
            assert!(said.contains(rows.as_str().unwrap()), "{said}; expected {rows} of FM {fm}");
        }
    });
}

#[test]
fn the_registry_lists_its_versions_with_states_pins_and_shares() {
    on_copies(|state| {
        let said = state.run(&["versions", "list"]);
        let found: Vec<&str> = said.lines().collect();
        let expected: Vec<&str> =
            state.expected["versions"].as_array().unwrap().iter().flat_map(Value::as_str).collect();
        assert_eq!(found, expected);
    });
}

#[test]
fn registered_versions_answer_as_they_did_from_saved_feature_state() {
    on_registered(|state| {
        // A daemon that cannot use its saved state warns and starts from the streams instead.
        let address = format!("127.0.0.1:{}", free_port());
        let args = ["serve", "--listen", &address];
        let mut service = ServiceProcess::start("serve", &state.binary, &args, &state.dir);
        let ready = || ureq::get(format!("http://{address}/readyz")).call().is_ok();
        wait_until("the daemon is ready", PATIENCE, ready);
        let said = service.output();
        // These FMs are so small that every expert needs more beside them than a new one may.
        let is_of_cost = |line: &&str| line.contains("plugin_limits.max_flops_share: it serves");
        let others: Vec<&str> = said.lines().filter(|line| !is_of_cost(line)).collect();
        let is_clean = |line: &str| !line.contains("WARN") && !line.contains("ERROR");
        assert!(others.into_iter().all(is_clean), "{said}");
        service.stop(PATIENCE);

        let daemon = state.daemon();
        state.assert_ranks(&daemon, "registered", TOLERANCE);
        assert_eq!(daemon.get("/readyz"), (200, "ready\n".into()));
        assert!(daemon.stop());
        // What the daemon had saved is no more than what the streams hold.
        let daemon = state.without("state/serve").daemon();
        state.assert_ranks(&daemon, "registered", TOLERANCE);
        assert!(daemon.stop());
    });
}

#[test]
fn a_saved_joiner_goes_on_and_loses_and_doubles_nothing() {
    on_copies(|state| {
        // Events that are there are known by their ids.
        let ingest = TestDaemon::start_with(&state.binary, &state.dir, &["--tier", "ingest"]);
        let last = state.lines("events.jsonl").pop().unwrap();
        let (status, answer) = ingest.post("/v1/events", &last);
        assert_eq!((status, &answer["accepted"]), (200, &Value::from(0)), "{answer}");

        state.send_later_events(&ingest);
        assert!(ingest.stop());
        assert_eq!(state.join(), state.expected["joins_from"].as_str().unwrap());
        let learned = state.expected["learned"].as_str().unwrap();
        assert_eq!(state.learned("3.0.0"), learned);
        // A joiner without its saved state joins the same anew, from the first event.
        for folder in ["state/join", "streams/joined", "streams/outcomes"] {
            state.without(folder);
        }
        assert_eq!(state.join(), "joining from event 0");
        assert_eq!(state.learned("4.0.0"), learned);
    });
}

#[test]
fn publications_are_followed_and_their_trainers_go_on() {
    on_registered(|state| {
        state.run(&["versions", "promote", "expert", "home", "2.0.0"]);
        let daemon = state.daemon();
        state.assert_ranks(&daemon, "published", TOLERANCE);

        state.send_later_events(&daemon);
        state.join();
        let said = state.run(&["train", "fm", "--follow", "--version", "2.0.0", "--until-end"]);
        let went_on = state.expected["went_on"].as_str().unwrap();
        assert!(said.contains(went_on), "{said}; expected {went_on}");
        state.run(&["materialise", "--follow", "--until-end", "--config", "stream.toml"]);
        let expert = ["train", "expert", "home", "--follow", "--version", "2.0.0"];
        let rest = ["--fm", "2.0.0", "--until-end", "--config", "stream.toml"];
        let said = state.run(&[&expert[..], &rest].concat());
        let published = said.lines().find(|line| line.contains("\"kind\":\"published\""));
        let published: Value = serde_json::from_str(published.expect(&said)).unwrap();
        let expected = &state.expected["expert_went_on"];
        for key in ["sequence", "position"] {
            assert_eq!(published[key], expected[key], "{key}: {said}");
        }
        // The daemon takes up what both trainers published. Trainers that had begun anew would have
        // other weights.
        wait_until("the new weights answer", PATIENCE, || {
            let expected = state.expected["followed"].as_array().unwrap();
            let found = state.answers(&daemon);
            let mut pairs = found.iter().zip(expected);
            pairs.all(|(a, b)| apart(&a["ranking"], &b["ranking"]) <= TRAINED_TOLERANCE)
        });
        assert!(daemon.stop());
    });
}

#[test]
fn a_pushed_expert_is_known_by_its_signature_rolls_back_and_can_be_followed_by_another() {
    on_registered(|state| {
        state.run(&["plugin", "keygen", "new.key"]);
        let key = state.lines("new.key.pub").remove(0);
        let path = state.dir.join("hypercast.toml");
        let text = fs::read_to_string(&path).unwrap();
        let trusts = text.replace("trusted_keys = [", &format!("trusted_keys = [\"{key}\", "));
        fs::write(&path, trusts).unwrap();
        let daemon = state.daemon();
        let push = ["plugin", "push", "home.wasm", daemon.url()];

        let parameters = state.pushed_parameters();
        let stored = ["--signature", "push.sig", "--parameters", &parameters];
        let said = state.run(&[&push[..], &stored].concat());
        assert!(said.contains("was pushed before") && said.contains("answers everybody"), "{said}");
        let said = state.run(&["plugin", "logs", "home", daemon.url()]);
        assert!(said.contains("home@1.1.0 (promoted)"), "{said}");
        // Its number is taken, whoever signs.
        let new = ["--name", "home", "--key", "new.key", "--no-wait", "--version"];
        let args = [&push[..], &new, &["1.1.0"]].concat();
        let (well, said) = run(&state.binary, &state.dir, &args);
        assert!(!well && said.contains("other content"), "{said}");

        let said = state.run(&["plugin", "rollback", "home", daemon.url()]);
        assert!(said.contains("1.0.0 (100 %)"), "{said}");
        wait_until("the version before answers", PATIENCE, || {
            state.answers(&daemon).iter().all(|answer| answer["expert"]["arm"] == "home@1.0.0")
        });
        state.assert_ranks(&daemon, "rolled_back", TOLERANCE);
        let said = state.run(&[&push[..], &new, &["1.2.0"]].concat());
        assert!(said.contains("the parameters of 1.0.0"), "{said}");
        assert!(daemon.stop());
    });
}

/// The FM's predictions of clicks on fresh items of the same features, in their order.
fn of_fresh(state: &State, daemon: &TestDaemon) -> Vec<f64> {
    let mut question: Value = serde_json::from_str(&state.lines("questions.jsonl")[0]).unwrap();
    question["candidates"] = [9001, 9002, 9003].iter().map(|id| json!({ "id": id })).collect();
    let (status, answer) = daemon.post("/v1/rank", &question.to_string());
    assert_eq!(status, 200, "{answer}");
    let clicks = answer["explain"]["fm"]["click"].as_array().unwrap();
    clicks.iter().map(|click| click.as_f64().unwrap()).collect()
}

#[test]
fn content_vectors_of_events_join_saved_state_and_are_saved_with_it() {
    on_registered(|state| {
        let path = state.dir.join("hypercast.toml");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("in_daemon = false", "in_daemon = true")).unwrap();
        let width = content::width_in(&state.dir.join("data")).unwrap();
        let along = |axis: usize| (0..width).map(|at| f64::from(at % 2 == axis)).collect();
        let vectors: [Vec<f64>; 2] = [along(0), along(1)];
        let mut daemon = state.daemon();
        let send = |daemon: &TestDaemon, id: u64, content: Option<&[f64]>| {
            let features = json!({ "topic": 1, "creator": 1, "length": 20.0 });
            let item = json!({ "id": id, "features": features, "content": content });
            daemon.post("/v1/events", &json!({ "items": [item] }).to_string())
        };
        let told = [Some(&*vectors[0]), Some(&*vectors[0]), None];
        for (id, content) in [9001, 9002, 9003].into_iter().zip(told) {
            let (status, answer) = send(&daemon, id, content);
            assert_eq!((status, &answer["applied"]), (200, &Value::from(true)), "{answer}");
        }
        let first = of_fresh(state, &daemon);
        assert!((first[0] - first[1]).abs() < 1e-6, "they differ in nothing: {first:?}");
        assert!((first[0] - first[2]).abs() > 1e-4, "one has no vector: {first:?}");
        send(&daemon, 9001, Some(&vectors[1]));
        let changed = of_fresh(state, &daemon);
        assert_eq!(changed[1..], first[1..]);
        assert!((changed[0] - first[0]).abs() > 1e-4, "it has another one: {first:?}, {changed:?}");

        let (status, answer) = send(&daemon, 9001, Some(&vectors[0][1..]));
        let said = answer["error"]["message"].as_str().unwrap();
        let expected = format!("it has {} numbers; the vectors of this data set have", width - 1);
        assert!(status == 400 && said.contains("items[0]: content: "), "{said}");
        assert!(said.contains(&expected), "{said}");

        // Once from what it saved, and once from the streams.
        for folder in [None, Some("state/serve")] {
            assert!(daemon.stop());
            if let Some(folder) = folder {
                state.without(folder);
            }
            daemon = state.daemon();
            for (found, expected) in of_fresh(state, &daemon).iter().zip(&changed) {
                assert!((found - expected).abs() < 1e-6, "{found}; expected {expected}");
            }
        }
        assert!(daemon.stop());
        // Trainers pass the records with vectors.
        assert!(state.learned("3.0.0").starts_with("learned from"));
        assert_eq!(state.run(&["dead-letters", "list"]), "no record was set aside\n");
    });
}

#[test]
fn recorded_requests_replay_to_the_same_rankings() {
    on_copies(|state| {
        let pushed = state.pushed_parameters();
        for (version, parameters) in
            [("1.0.0", "experts/home/1.0.0/parameters.safetensors"), ("pushed", &pushed)]
        {
            let args = ["plugin", "replay", "home.wasm", "--requests", "state/recorded", "--json"];
            let said = state.run(&[&args[..], &["--parameters", parameters]].concat());
            let found: Value =
                serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
            let expected = &state.expected["replays"][version];
            for key in ["requests", "compared", "left_out", "faults"] {
                assert_eq!(found[key], expected[key], "{key}: {said}");
            }
            for key in ["top_1", "top_k", "rank_correlation"] {
                assert_close(&found[key], &expected[key], 0.02);
            }
        }
    });
}

#[test]
fn a_schema_that_has_grown_reads_all_of_it_and_its_trainers_go_on() {
    on_registered(|state| {
        let old = fs::read_to_string(state.dir.join("data/schema.toml")).unwrap();
        // More actions than masks of 32 bits have room for, in files and plugins of before.
        let spare: String = (0..32).map(|at| format!(", \"spare{at}\"")).collect();
        let new = old
            .replace(
                "surfaces = [\"feed\", \"search\"]",
                "surfaces = [\"feed\", \"search\", \"late\"]",
            )
            .replace("\"finish\"]\n", &format!("\"finish\", \"gift\"{spare}]\n"));
        let added = "[[tasks]]\nname = \"gift\"\nrole = \"main\"\nkind = \"binary\"\nlabel = \"gift\"\n\
                     [[item_features]]\nname = \"brand\"\nkind = \"categorical\"\n\
                     [[context_features]]\nname = \"slot\"\nkind = \"dense\"\n\
                     [[counters]]\nname = \"user_gift\"\nkey = [\"user_id\"]\naction = \"gift\"\n";
        fs::write(state.dir.join("new.toml"), new + "\n" + added).unwrap();
        let said = state.run(&["schema", "apply", "new.toml", "--data", "data"]);
        assert!(said.contains("new surface `late`: number 2"), "{said}");

        let daemon = state.daemon();
        assert_eq!(daemon.get("/readyz"), (200, "ready\n".into()));
        let expected = state.expected["registered"].as_array().unwrap();
        for (found, expected) in state.answers(&daemon).iter().zip(expected) {
            assert_eq!(found["expert"]["arm"], expected["arm"], "{found}");
            let apart = apart(&found["ranking"], &expected["ranking"]);
            assert!(apart <= TOLERANCE, "{apart}: {found}");
        }
        let question = state.lines("questions.jsonl").remove(0).replace("feed", "late");
        let (status, answer) = daemon.post("/v1/rank", &question);
        assert_eq!(status, 200, "{answer}");
        let event = state.lines("events.jsonl").remove(0);
        let event = event
            .replace("1000", "990001")
            .replace("\"feed\"", "\"late\"")
            .replace("\"device\": 0", "\"device\": 0, \"slot\": 0.5");
        let (status, answer) = daemon.post("/v1/events", &event);
        assert_eq!(status, 200, "{answer}");
        let (status, answer) = daemon.post("/v1/events", &event.replace("slot", "unheard"));
        assert_eq!(status, 400, "{answer}");

        state.run(&["materialise", "--follow", "--until-end", "--config", "stream.toml"]);
        let said = state.run(&["train", "fm", "--follow", "--version", "2.0.0", "--until-end"]);
        assert!(said.contains("learned from"), "{said}");
        assert!(daemon.stop());
        assert_eq!(state.run(&["dead-letters", "list"]), "no record was set aside\n");
    });
}
