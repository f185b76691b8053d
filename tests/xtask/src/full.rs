//! `cargo xtask full`: the tests that take hours, one after the other, with a summary to commit.
//!
//! A step that fails does not stop those after it. Its whole output is in `target/full/STEP.log`.

use std::{
    fs::File,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    options::Options,
    process::{commit, now, repository_root, target},
};

/// The summary, which is committed.
const SUMMARY: &str = "tests/full-summary.json";

/// Where the fuzz targets are: their folder before and after its move.
const FUZZ_FOLDERS: [&str; 2] = ["tests/fuzz", "fuzz"];

/// The line in which a fuzzer says how many inputs it has run.
const FUZZ_RUNS: &str = "stat::number_of_executed_units:";

/// How a line of output begins that the summary keeps.
const FIGURE: &str = "figure: ";

/// How long each fuzz target runs by default, in minutes.
const FUZZ_MINUTES: u64 = 15;

/// The steps but for the fuzz targets: name, environment and command, where `{target}` is cargo's
/// folder. `--workspace` gives dependencies the features that they have in `verify`, so that
/// nothing heavy is built twice.
const STEPS: &[(&str, &str, &str)] = &[
    ("c-tools", "", "examples/c-expert/tools.sh {target}/c-tools"),
    // Builds the binary, the plugins and the hostile guests that the other steps use.
    ("verify", "", "cargo verify -- --no-fail-fast"),
    ("deny", "", "cargo xtask deny"),
    // What `.ci/run` does not look at: the benches' rivals.
    (
        "clippy",
        "",
        "cargo clippy --workspace --all-targets --features \
         hypercast/cuda,hypercast/wgpu,hypercast-lab/rivals -- -D warnings",
    ),
    // The networks of experts on wgpu. `.ci/run` has the FM's.
    (
        "expert-wgpu",
        "CARGO_TARGET_DIR=target/gpu",
        "cargo test --profile unoptimised --package hypercast-expert --features hypercast-fm/wgpu \
         --lib executor",
    ),
    (
        "fuzz-seeded",
        "HYPERCAST_FUZZ_CASES=20000 HYPERCAST_FUZZ_SEED=2",
        "cargo test --workspace --test seeded -- graph differential bodies publication push",
    ),
    (
        "store-crash",
        "HYPERCAST_STORE_CRASH_ROUNDS=500",
        "cargo test --workspace --test store crash",
    ),
    (
        "stream-crash",
        "HYPERCAST_ENGINE_CRASH_ROUNDS=200",
        "cargo test --workspace --lib a_writer_that_is_killed",
    ),
    ("simulation", "", "cargo run --package hypercast-simulation -- many --seeds 10000"),
    ("chaos", "HYPERCAST_CHAOS_ROUNDS=60", "cargo test --workspace --test chaos"),
    (
        "chaos-nats",
        "HYPERCAST_CHAOS_ROUNDS=30 HYPERCAST_CHAOS_ENGINE=nats",
        "cargo test --workspace --test chaos",
    ),
    (
        "nats-cluster",
        "HYPERCAST_NATS_ROUNDS=50",
        "cargo test --workspace --lib a_cluster_that_fails_in_parts -- --nocapture",
    ),
    (
        "hostile-users",
        "HYPERCAST_HOSTILE_MINUTES=10",
        "cargo test --workspace --test hostile_traffic ten_hostile_users -- --nocapture",
    ),
    (
        "rollout",
        "HYPERCAST_ROLLOUT_PUSHES=1000",
        "cargo test --workspace --test rollout many_pushes -- --nocapture",
    ),
    (
        "turncoats",
        "HYPERCAST_TURNCOATS=15",
        "cargo test --workspace --test rollout turns_hostile -- --nocapture",
    ),
    ("connections", "HYPERCAST_SLOW_CONNECTIONS=4096", "cargo test --workspace --test connections"),
    ("growth", "", "cargo test --workspace --test growth -- --include-ignored --nocapture"),
    (
        "teams",
        "HYPERCAST_TEAMS_MINUTES=10",
        "cargo test --workspace --test growth teams_change -- --include-ignored --nocapture",
    ),
    ("guide", "", "cargo test --workspace --test guide"),
    // From packages in a local registry to a promoted version, without the checkout. What is
    // installed is not what is measured, so it is compiled without the optimisation of a release.
    (
        "outside",
        "CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
         CARGO_PROFILE_RELEASE_OPT_LEVEL=1",
        "cargo test --workspace --test guide an_expert_outside -- --include-ignored --nocapture",
    ),
    ("own-data", "", "cargo test --workspace --test own_data -- --include-ignored --nocapture"),
    // Off-policy estimates beside those of obp; fails without the package.
    ("open-bandit", "", "examples/open-bandit/run.sh {target}/open-bandit"),
    ("trials", "", "cargo test --workspace --test trials -- --include-ignored"),
    ("streaming", "", "cargo demo -- --streaming --minutes 30"),
    // An hour of events: what they cost at the end beside what they cost after a tenth of it.
    (
        "soak",
        "",
        "cargo run --release -p hypercast-lab -- bench lifecycle --only ingest --seconds 3600 \
         --plugins {target}/hypercast/plugins --hostile {target}/hypercast/hostile",
    ),
];

/// A command with a name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    name: String,
    environment: Vec<(String, String)>,
    command: Vec<String>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct StepResult {
    step: String,
    /// With its environment before it, as one would type it.
    command: String,
    /// Of the commit that was tested.
    commit: String,
    /// When the step ended.
    date: String,
    seconds: u64,
    /// `passed`, `failed`, or `no test ran`.
    status: String,
    /// The line of the output that says most: the last one, or the last result of tests.
    last_line: String,
    /// What it measured: the lines of the output that begin with [`FIGURE`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    figures: Vec<String>,
}

/// Of the last run of each step.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Summary {
    date: String,
    commit: String,
    steps: Vec<StepResult>,
}

/// Runs the steps that `--steps` names, or all. `false` if one of them failed.
pub fn run(options: Options) -> Result<bool> {
    let root = repository_root()?;
    let minutes = options.value("minutes-per-fuzz-target").map_or(Ok(FUZZ_MINUTES), |minutes| {
        minutes.parse().with_context(|| format!("--minutes-per-fuzz-target {minutes}"))
    })?;
    let steps = steps(&root, minutes)?;
    if options.has("list") {
        steps.iter().for_each(|step| println!("{:<18} {}", step.name, step.line()));
        return Ok(true);
    }
    let names: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
    let chosen = options.choice("steps", &names)?;
    let path = root.join(SUMMARY);
    let mut summary = read(&path)?;
    summary.commit = commit(&root)?;
    let mut passed = true;
    for step in steps.iter().filter(|step| chosen.contains(&step.name.as_str())) {
        let log = target(&root).join("full").join(format!("{}.log", step.name));
        println!("{}: {} > {}", step.name, step.line(), log.display());
        let result = step.run(&root, &log, &summary.commit)?;
        println!(
            "{}: {} after {} s: {}",
            step.name, result.status, result.seconds, result.last_line
        );
        passed &= result.status == "passed";
        summary.date.clone_from(&result.date);
        summary.insert(result);
        // After each step, so that an interrupted run leaves what it found.
        let text = serde_json::to_string_pretty(&summary)? + "\n";
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(passed)
}

fn read(path: &Path) -> Result<Summary> {
    if !path.is_file() {
        return Ok(Summary::default());
    }
    let text = std::fs::read_to_string(path)?;
    serde_json::from_str(&text).with_context(|| format!("{}: not a summary", path.display()))
}

/// All steps, with one for each fuzz target behind `verify`, the second step.
fn steps(root: &Path, fuzz_minutes: u64) -> Result<Vec<Step>> {
    let mut steps: Vec<Step> = STEPS
        .iter()
        .map(|(name, environment, command)| {
            // The summary is committed, so it names no folder of this machine if it can.
            let target = target(root);
            let target = target.strip_prefix(root).unwrap_or(&target).display().to_string();
            Step::new(name, environment, &command.replace("{target}", &target))
        })
        .collect();
    let fuzz = FUZZ_FOLDERS.into_iter().find(|folder| root.join(folder).join("run").is_file());
    let fuzz = fuzz.with_context(|| format!("no `run` in {}", FUZZ_FOLDERS.join(" or ")))?;
    let mut targets = Vec::new();
    for entry in std::fs::read_dir(root.join(fuzz).join("fuzz_targets"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        targets.extend(name.strip_suffix(".rs").map(str::to_owned));
    }
    ensure!(!targets.is_empty(), "{fuzz}/fuzz_targets has no targets");
    targets.sort();
    let seconds = fuzz_minutes * 60;
    let fuzzing = targets.iter().map(|target| {
        Step::new(&format!("fuzz-{target}"), "", &format!("{fuzz}/run {target} {seconds}"))
    });
    steps.splice(2..2, fuzzing);
    Ok(steps)
}

impl Step {
    fn new(name: &str, environment: &str, command: &str) -> Self {
        let pairs = environment.split_whitespace().filter_map(|pair| pair.split_once('='));
        Self {
            name: name.to_owned(),
            environment: pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            command: command.split_whitespace().map(str::to_owned).collect(),
        }
    }

    /// The command as one would type it.
    fn line(&self) -> String {
        let environment = self.environment.iter().map(|(key, value)| format!("{key}={value} "));
        environment.collect::<String>() + &self.command.join(" ")
    }

    /// Runs the command with its output in `log`.
    fn run(&self, root: &Path, log: &Path, commit: &str) -> Result<StepResult> {
        let folder = log.parent().context("a log needs a folder")?;
        std::fs::create_dir_all(folder)?;
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let components = target(root).join("hypercast");
        let c_tools = target(root).join("c-tools/bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(c_tools).chain(std::env::split_paths(&path));
        let start = Instant::now();
        let status = Command::new(&self.command[0])
            .args(&self.command[1..])
            // A prerequisite that is missing fails, instead of passing as skipped.
            .env("CI", "true")
            .env("PATH", std::env::join_paths(path)?)
            .env("HYPERCAST_PLUGINS", components.join("plugins"))
            .env("HYPERCAST_HOSTILE", components.join("hostile"))
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir(root)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .status();
        let seconds = start.elapsed().as_secs();
        // Fuzzers write bytes that are not UTF-8.
        let output = String::from_utf8_lossy(&std::fs::read(log)?).into_owned();
        let figures = output.lines().filter_map(|line| line.strip_prefix(FIGURE));
        let (status, last_line) = match status {
            Ok(status) if status.success() => self.judge(&output),
            Ok(_) => ("failed", last_line(&output)),
            Err(error) => ("failed", format!("{}: {error}", self.command[0])),
        };
        Ok(StepResult {
            step: self.name.clone(),
            command: self.line(),
            commit: commit.to_owned(),
            date: now()?,
            seconds,
            status: status.to_owned(),
            last_line,
            figures: figures.map(str::to_owned).collect(),
        })
    }

    /// The status of a command that succeeded. A filter of tests that fits none succeeds too.
    fn judge(&self, output: &str) -> (&'static str, String) {
        if self.command.first().is_none_or(|program| program != "cargo")
            || self.command.get(1).is_none_or(|command| command != "test")
        {
            let units = output.lines().rfind(|line| line.starts_with(FUZZ_RUNS));
            return ("passed", units.map_or_else(|| last_line(output), str::to_owned));
        }
        let mut results = output.lines().filter(|line| line.starts_with("test result: ok"));
        let ran = results.rfind(|line| !line.contains(" 0 passed"));
        ran.map_or(("no test ran", last_line(output)), |line| ("passed", line.to_owned()))
    }
}

fn last_line(output: &str) -> String {
    output.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned()
}

impl Summary {
    /// Replaces the earlier result of a step, or adds it.
    fn insert(&mut self, result: StepResult) {
        match self.steps.iter_mut().find(|earlier| earlier.step == result.step) {
            Some(earlier) => *earlier = result,
            None => self.steps.push(result),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::git;

    fn run(command: &[&str]) -> StepResult {
        let dir = tempfile::tempdir().unwrap();
        let command = command.iter().map(|word| word.to_string()).collect();
        let environment = vec![("HYPERCAST_A".to_owned(), "1".to_owned())];
        let step = Step { name: "a".to_owned(), environment, command };
        step.run(dir.path(), &dir.path().join("full/a.log"), "abc").unwrap()
    }

    #[test]
    fn a_step_gives_its_status_and_its_last_line() {
        let passed = run(&["sh", "-c", "echo figure: 7 s; echo two $HYPERCAST_A $CI >&2; echo"]);
        assert_eq!(passed.figures, ["7 s"]);
        assert_eq!((passed.status.as_str(), passed.last_line.as_str()), ("passed", "two 1 true"));
        assert_eq!((passed.step.as_str(), passed.commit.as_str()), ("a", "abc"));
        assert!(passed.command.starts_with("HYPERCAST_A=1 sh -c "), "{}", passed.command);
        let failed = run(&["sh", "-c", "echo why; exit 3"]);
        assert_eq!((failed.status.as_str(), failed.last_line.as_str()), ("failed", "why"));
        assert_eq!(run(&["/no/such/program"]).status, "failed");
    }

    #[test]
    fn tests_that_did_not_run_have_not_passed() {
        let step = Step::new("a", "B=1 C=2", "cargo test --workspace some_test");
        assert_eq!(step.line(), "B=1 C=2 cargo test --workspace some_test");
        let none = "test result: ok. 0 passed; 0 failed; 9 filtered out\n";
        assert_eq!(step.judge(none).0, "no test ran");
        let some = format!("test result: ok. 3 passed; 0 failed\n{none}");
        assert_eq!(step.judge(&some), ("passed", "test result: ok. 3 passed; 0 failed".to_owned()));
    }

    #[test]
    fn every_fuzz_target_is_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let fuzz = dir.path().join("tests/fuzz");
        std::fs::create_dir_all(fuzz.join("fuzz_targets")).unwrap();
        std::fs::write(fuzz.join("run"), "").unwrap();
        std::fs::write(fuzz.join("fuzz_targets/graph.rs"), "").unwrap();
        std::fs::write(fuzz.join("fuzz_targets/bodies.rs"), "").unwrap();
        let steps = steps(dir.path(), 2).unwrap();
        assert_eq!(steps.len(), STEPS.len() + 2);
        assert_eq!(steps[1].line(), "cargo verify -- --no-fail-fast");
        assert_eq!(steps[2].line(), "tests/fuzz/run bodies 120");
        assert_eq!(steps[3].name, "fuzz-graph");
    }

    /// Otherwise one learns after hours that a test was renamed.
    #[test]
    fn every_step_names_a_test_that_exists() {
        let root = repository_root().unwrap();
        // A test's path has the names of its file and function.
        let functions = ["grep", "-e", "^ *fn [a-z0-9_]*()", "--", "*.rs"];
        let functions = String::from_utf8(git(&root, &functions, "").unwrap()).unwrap();
        for (name, _, command) in STEPS {
            let Some(options) = command.strip_prefix("cargo test --workspace ") else { continue };
            let words: Vec<&str> = options.split(' ').collect();
            let filters = words.iter().enumerate().filter(|(place, word)| {
                let is_value = *place > 0 && words[place - 1] == "--test";
                !is_value && !word.starts_with("--")
            });
            for (_, filter) in filters {
                let is_there = functions.lines().any(|function| function.contains(filter));
                assert!(is_there, "{name}: no test contains {filter}");
            }
        }
    }

    #[test]
    fn a_second_run_of_a_step_replaces_the_first() {
        let mut summary = Summary::default();
        let first = run(&["sh", "-c", "exit 1"]);
        summary.insert(first.clone());
        summary.insert(StepResult { step: "b".to_owned(), ..first.clone() });
        let second = StepResult { status: "passed".to_owned(), ..first };
        summary.insert(second.clone());
        assert_eq!((summary.steps.len(), &summary.steps[0]), (2, &second));
    }
}
