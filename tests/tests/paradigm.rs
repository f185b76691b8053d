//! The foundation-expert paradigm on a simulated world whose true probabilities are known, run by
//! the demo command with its daemon.

use hypercast_tests::{Prerequisites, prerequisites, run_well};

#[test]
fn the_expert_with_tae_closes_at_least_half_of_the_gap_to_the_best_possible() {
    let Some(Prerequisites { lab: binary, plugins, .. }) = prerequisites("paradigm") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let plugins = plugins.display().to_string();
    let args = [
        "demo",
        "--data",
        "simulated",
        "--plugins",
        &plugins,
        "--work",
        "work",
        "--json",
        "demo.json",
    ];
    let text = run_well(&binary, dir.path(), &args);
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("demo.json")).unwrap()).unwrap();
    let ne = |arm: &str| -> f64 {
        let rows = report["rows"].as_array().unwrap();
        let row = rows
            .iter()
            .find(|row| row["surface"] == "all" && row["task"] == "click" && row["arm"] == arm);
        row.unwrap_or_else(|| panic!("no {arm} in {text}"))["ne"].as_f64().unwrap()
    };
    let (base, best, expert) = (ne("base"), ne("best"), ne("expert+tae"));
    assert!(base - best > 0.05, "the world has something to learn: {base} {best}");
    let closed = (base - expert) / (base - best);
    assert!(
        closed >= 0.5,
        "closed {closed:.3} of the gap; base {base:.4}, best {best:.4}, expert+tae {expert:.4}\n{text}"
    );
    assert_eq!(report["degraded"], 0);
    assert!(report["requests"].as_u64().unwrap() > 1000);
    for stage in ["features", "fm", "expert", "wasm"] {
        assert!(report["latency"][stage]["p50_ms"].as_f64().unwrap() > 0.0, "{stage} was timed");
    }
}
