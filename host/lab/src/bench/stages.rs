//! A request alone, stage by stage: an FM and its expert beside a one-stage model as big as the FM, which is what
//! experiment `compute` compares them with.
//!
//! Both are daemons, started from one checkpoint and asked in turns: how long a model takes does not depend on what
//! its weights say. The one-stage model answers with its own ranking. Features are the same for both.

use hypercast_core::quantile::quantile;
use std::collections::BTreeMap;

use super::{
    Report, Rival,
    load::Caller,
    serving::{CANDIDATES, World, rank_url},
};
use crate::demo::daemon::Daemon;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_serve::api::RankAnswer;

/// Turns that count, each over all users, after one that does not.
const TURNS: usize = 3;

/// The stages of a model, features aside.
const MODELS: [&str; 3] = ["fm", "expert", "wasm"];

/// A daemon, and what its requests took.
struct Asked {
    daemon: Daemon,
    caller: Caller,
    /// By stage, in milliseconds; what several take together is another stage.
    stages: BTreeMap<String, Vec<f64>>,
    /// As the caller sees it.
    whole: Vec<f64>,
}

/// Adds the figures.
pub(super) fn measure(world: &World, report: &mut Report) -> Result<()> {
    let explained = world.bodies(true)?;
    let start = |config| -> Result<Asked> {
        let daemon = Daemon::start(config)?;
        let caller = Caller::new(rank_url(&daemon), world.bodies(false)?)?;
        Ok(Asked { daemon, caller, stages: BTreeMap::new(), whole: Vec::new() })
    };
    let mut asked = [start(&world.two_tiers)?, start(&world.one_stage)?];
    for turn in 0..=TURNS {
        for asked in &mut asked {
            asked.turn(&explained)?;
            if turn == 0 {
                asked.stages.clear();
                asked.whole.clear();
            }
        }
    }
    let [mut ours, mut theirs] = asked;
    for stage in ["features", "fm", "expert", "wasm"] {
        report.add(format!("stage {stage}, p50"), (ours.p50(stage), "ms"), None);
    }
    let mut against = |name: &str, stage: &str| {
        let rival =
            Rival { name: "a one-stage model of the FM's size".into(), value: theirs.p50(stage) };
        report.add(format!("{name}, p50"), (ours.p50(stage), "ms"), Some(rival));
    };
    against("FM, expert and its Wasm", "models");
    against("features, FM, expert and its Wasm", "all");
    let (ours_whole, theirs_whole) =
        (quantile(&mut ours.whole, 0.5), quantile(&mut theirs.whole, 0.5));
    let rival = Rival { name: "a one-stage model's".into(), value: theirs_whole };
    let name = format!("request of {CANDIDATES} candidates, HTTP included, p50");
    report.add(name, (ours_whole, "ms"), Some(rival));
    ours.daemon.stop()?;
    theirs.daemon.stop()
}

impl Asked {
    /// Asks for every user, once to be told of stages and once to be answered as callers are.
    fn turn(&mut self, explained: &[String]) -> Result<()> {
        let failed = |error: ureq::Error| Error::invalid(format!("the daemon failed: {error}"));
        let agent = ureq::Agent::new_with_defaults();
        for body in explained {
            let mut answer = agent
                .post(rank_url(&self.daemon))
                .header("content-type", "application/json")
                .send(body)
                .map_err(failed)?;
            let answer: RankAnswer = answer.body_mut().read_json().map_err(failed)?;
            let took = answer.explain.map(|explain| explain.stages_us).unwrap_or_default();
            let took = |stage: &str| took.get(stage).map_or(0.0, |us| us / 1e3);
            let models: f64 = MODELS.iter().map(|stage| took(stage)).sum();
            let mut add = |stage: &str, ms| self.stages.entry(stage.into()).or_default().push(ms);
            MODELS.iter().chain(&["features"]).for_each(|stage| add(stage, took(stage)));
            add("models", models);
            add("all", models + took("features"));
        }
        self.whole.extend(self.caller.one_by_one(explained.len()));
        Ok(())
    }

    fn p50(&mut self, stage: &str) -> f64 {
        self.stages.get_mut(stage).map_or(0.0, |took| quantile(took, 0.5))
    }
}
