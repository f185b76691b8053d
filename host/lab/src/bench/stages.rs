//! One request at a time, stage by stage: an FM and its expert beside a one-stage model of the FM's
//! size, which is what experiment `compute` compares them with.
//!
//! Both are daemons that start from one checkpoint and take turns, since the time of a model does
//! not depend on its weights. The one-stage model answers with its own ranking. Both have the same
//! features, and the users' histories in their caches.

use std::{collections::BTreeMap, path::Path};

use hypercast_config::Config;
use hypercast_core::quantile::quantile;
use hypercast_data::dataset::Dataset;
use hypercast_fm::cost;
use hypercast_serve::api::RankAnswer;
use hypercast_train::fm::{FIRST_VERSION, dataset_spec};

use super::{
    BenchReport, body_forms,
    load::OpenLoopClient,
    serving::{CANDIDATES, ServingFixture, bodies, rank_client, rank_url},
};
use crate::{
    demo::preset,
    error::{CommonErrors as _, Error, Result},
    processes::DaemonProcess,
};

/// Turns that count, each over all users, after one that warms up.
const TURNS: usize = 3;

/// The stages of a model, without features.
const MODEL_STAGES: [&str; 3] = ["fm", "expert", "wasm"];

/// A daemon, and how long its requests took.
struct StagedDaemon {
    daemon: DaemonProcess,
    client: OpenLoopClient,
    /// Milliseconds by stage; `models` and `all` are sums of several, and `round trip` is the
    /// client's.
    stages_ms: BTreeMap<String, Vec<f64>>,
}

/// Adds the group's figures to the report.
pub(super) fn measure(fixture: &ServingFixture, report: &mut BenchReport) -> Result<()> {
    let explained = bodies(&fixture.of.dataset, fixture.of.surface, true)?;
    let mut ours = StagedDaemon::start(fixture, &fixture.two_tiers)?;
    let mut theirs = StagedDaemon::start(fixture, &fixture.one_stage)?;
    for turn in 0..=TURNS {
        for daemon in [&mut ours, &mut theirs] {
            daemon.turn(&explained)?;
            if turn == 0 {
                daemon.stages_ms.clear();
            }
        }
    }
    let suffix = fixture.of.suffix;
    let [fm, expert] = candidate_flops(&fixture.two_tiers)?.map(|flops| flops as f64 / 1e3);
    let name = format!("operations a candidate over a kept history, FM and expert{suffix}");
    report.versus(name, fm + expert, "thousands", "the FM alone", fm);
    for stage in ["features", "fm", "expert", "wasm"] {
        let name = format!("stage {stage}, p50{suffix}");
        report.figure(name, ours.p50_ms(stage), "ms");
    }
    let name = format!("between the stages, and making the answer, p50{suffix}");
    report.figure(name, ours.p50_ms("between"), "ms");
    let one_stage = "a one-stage model of the FM's size";
    let sums = [
        ("FM, expert and its Wasm, p50".to_owned(), "models", one_stage),
        ("features, FM, expert and its Wasm, p50".to_owned(), "all", one_stage),
        (
            format!("request of {CANDIDATES} candidates, HTTP included, p50"),
            "round trip",
            "a one-stage model's",
        ),
    ];
    for (name, stage, rival) in sums {
        report.versus(name + suffix, ours.p50_ms(stage), "ms", rival, theirs.p50_ms(stage));
    }
    body_forms::measure(fixture, &ours.daemon, report)?;
    ours.daemon.stop()?;
    theirs.daemon.stop()
}

/// Floating-point operations of a configuration's FM and expert.
fn candidate_flops(path: &Path) -> Result<[u64; 2]> {
    let config = Config::read(path)?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let expert = preset::blueprint(&config, &dataset, FIRST_VERSION)?;
    Ok([cost::candidate_flops(&config.fm, &dataset_spec(&dataset)?), expert.flops()])
}

impl StagedDaemon {
    fn start(fixture: &ServingFixture, config: &Path) -> Result<Self> {
        let daemon = DaemonProcess::start(config)?;
        let client = rank_client(&daemon, &fixture.of.dataset, fixture.of.surface)?;
        Ok(Self { daemon, client, stages_ms: BTreeMap::new() })
    }

    /// Ranks for every user twice: with the stages explained, and as callers do.
    fn turn(&mut self, explained: &[String]) -> Result<()> {
        let failed = |error: ureq::Error| Error::internal(format!("the daemon failed: {error}"));
        let agent = ureq::Agent::new_with_defaults();
        for body in explained {
            let asked = agent.post(rank_url(&self.daemon)).content_type("application/json");
            let mut answer = match asked.send(body) {
                // Too late for the daemon's deadline, as the first ones after a start can be.
                Err(ureq::Error::StatusCode(504)) => continue,
                answer => answer.map_err(failed)?,
            };
            let answer: RankAnswer = answer.body_mut().read_json().map_err(failed)?;
            let stages_us = answer.explain.map(|explain| explain.stages_us).unwrap_or_default();
            let ms = |stage: &str| stages_us.get(stage).map_or(0.0, |us| us / 1e3);
            let models: f64 = MODEL_STAGES.iter().map(|stage| ms(stage)).sum();
            let mut add =
                |stage: &str, ms| self.stages_ms.entry(stage.into()).or_default().push(ms);
            MODEL_STAGES.iter().chain(&["features"]).for_each(|stage| add(stage, ms(stage)));
            add("models", models);
            add("all", models + ms("features"));
            add("between", ms("total") - models - ms("features"));
        }
        let round_trips_ms = self.client.one_by_one(explained.len());
        self.stages_ms.entry("round trip".into()).or_default().extend(round_trips_ms);
        Ok(())
    }

    fn p50_ms(&mut self, stage: &str) -> f64 {
        self.stages_ms.get_mut(stage).map_or(0.0, |times_ms| quantile(times_ms, 0.5))
    }
}
