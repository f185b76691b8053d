//! An expert written without the SDK, `examples/c-expert`, is built, checked, trained and served.
//! This needs `wit-bindgen` and a clang for Wasm; the README of the example says how to get both.

use hypercast_core::prerequisite::skip;
use std::path::{Path, PathBuf};
use std::process::Command;

use hypercast_harness::Harness;
use hypercast_tests::{TestDaemon, binary, expert, run_well, world};
use serde_json::{Value, json};

/// Builds the example with its own script. Returns `None`, with a message, if a tool is missing.
fn c_expert(into: &Path) -> Option<PathBuf> {
    let works = |program: &str, args: &[&str]| {
        Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
    };
    let named = |variable: &str, otherwise: &str| {
        std::env::var(variable).unwrap_or_else(|_| otherwise.to_owned())
    };
    let (bindgen, compiler) =
        (named("WIT_BINDGEN", "wit-bindgen"), named("WASM_CC", "python3 -m ziglang cc"));
    let mut words = compiler.split(' ');
    let first = words.next().expect("a split has a first part");
    let version: Vec<&str> = words.chain(["--version"]).collect();
    if !works(&bindgen, &["--version"]) || !works(first, &version) {
        let reason =
            format!("`{bindgen}` or `{compiler}` is missing; see examples/c-expert/README.md");
        skip("c-expert", &reason);
        return None;
    }
    let out = into.join("c_expert.wasm");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/c-expert/build.sh");
    let tool = binary().expect("`cargo test --workspace` builds the binaries");
    let tool = tool.with_file_name("cargo-hypercast");
    let output = Command::new(script)
        .arg(&out)
        .env("HYPERCAST_TOOL", tool)
        .env("WIT_BINDGEN", bindgen)
        .env("WASM_CC", compiler)
        .output()
        .expect("the script starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(out)
}

#[test]
fn an_expert_in_c_is_checked_trained_and_serves() {
    let dir = tempfile::tempdir().unwrap();
    let Some(component) = c_expert(dir.path()) else { return };
    let binary = binary().expect("`cargo test --workspace` builds the binary");
    Harness::of(&component).check_all().expect("the expert passes every check");
    let mut config = world(dir.path(), 1500, 2);
    let schema = dir.path().join("data/schema.toml");
    let said = run_well(
        &binary,
        dir.path(),
        &["plugin", "check", component.to_str().unwrap(), "--schema", schema.to_str().unwrap()],
    );
    assert!(said.contains("c-expert") && said.contains("click"), "{said}");
    config.experts = vec![expert("c", component, &["feed", "search"])];
    config.write(&dir.path().join("hypercast.toml")).unwrap();
    run_well(&binary, dir.path(), &["train", "fm"]);
    run_well(&binary, dir.path(), &["train", "expert"]);
    let daemon = TestDaemon::start(&binary, dir.path());
    for count in [1, 40, 150] {
        let candidates: Vec<Value> = (1..=count).map(|id| json!({ "id": id })).collect();
        let body = json!({ "user": 3, "surface": "feed", "candidates": candidates });
        let (status, answer) = daemon.post("/v1/rank", &body.to_string());
        assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
        assert_eq!(answer["expert"]["plugin"], "c-expert");
        let ranking = answer["ranking"].as_array().unwrap();
        let mut ids: Vec<u64> =
            ranking.iter().map(|ranked| ranked["id"].as_u64().unwrap()).collect();
        ids.sort_unstable();
        assert_eq!(ids, (1..=count).collect::<Vec<u64>>(), "a permutation");
    }
    assert!(daemon.stop());
}
