//! Runs the trials in `tests/trials`: inputs that broke similar products, each with what a user
//! expects. A trial is a Python script that drives the built `hypercast` as its users do.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use hypercast_core::prerequisite::skip;
use hypercast_tests::{Prerequisites, prerequisites};

/// Trials of some minutes, or with Python packages that CI does not have.
const LONG: [&str; 3] = ["D13", "L01", "S02"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("trials")
}

/// The names of all trials, such as `D01`, with their scripts.
fn trials() -> Vec<(String, PathBuf)> {
    let scripts = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let named = scripts.filter_map(|path| {
        let name = path.file_name()?.to_str()?;
        let (id, rest) = name.split_once('_')?;
        rest.ends_with(".py").then(|| (id.to_owned(), path.clone()))
    });
    let mut trials: Vec<(String, PathBuf)> = named.collect();
    trials.sort();
    trials
}

/// Runs the trials that `wanted` accepts. A trial exits with 77 if this machine lacks something.
fn assert_passed(test: &str, wanted: impl Fn(&str) -> bool) {
    let Some(Prerequisites { hypercast, plugins, .. }) = prerequisites(test) else { return };
    if Command::new("python3").arg("--version").output().is_err() {
        return skip(test, "there is no python3");
    }
    let target = hypercast.ancestors().nth(2).expect("the binary is in a folder of cargo's");
    let work = tempfile::tempdir().unwrap();
    let mut failed = Vec::new();
    for (id, script) in trials().into_iter().filter(|(id, _)| wanted(id)) {
        let output = Command::new("python3")
            .arg(&script)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("CHECKOUT", folder().join("../.."))
            .env("HYPERCAST", &hypercast)
            .env("CARGO_HYPERCAST", hypercast.with_file_name("cargo-hypercast"))
            .env("PLUGIN", plugins.join("mlp-fusion.wasm"))
            // Where the SDK is built already.
            .env("CARGO_TARGET_DIR", target)
            .env("WORK", work.path())
            .output()
            .expect("python3 runs");
        let said = String::from_utf8_lossy(&output.stdout);
        match output.status.code() {
            Some(0) => eprintln!("{id} passed"),
            Some(77) => skip(&id, said.trim()),
            status => {
                let errors = String::from_utf8_lossy(&output.stderr);
                failed.push(format!("{id} ({status:?}):\n{said}{errors}"));
            }
        }
    }
    assert!(failed.is_empty(), "{} trials failed\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn inputs_that_broke_others_do_no_harm() {
    assert_passed("trials", |id| !LONG.contains(&id));
}

#[test]
#[ignore = "takes minutes; `cargo xtask full` runs it"]
fn long_trials() {
    assert_passed("long trials", |id| LONG.contains(&id));
}
