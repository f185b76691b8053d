//! An in-tree expert on 500 candidates: its network beside the same network in
//! PyTorch, and its ranking in Wasm beside the same rule in native Rust.

use std::sync::Arc;

use hypercast_config::Config;
use hypercast_data::{
    dataset::Dataset,
    simulate::{SimulateOptions, simulate},
};
use hypercast_expert::{
    Blueprint, BreakerConfig, Engine, ExpertPredictions, LoadOptions, Normaliser, Plugin,
    ServedExpert, Tae,
};
use hypercast_fm::example::Example;
use serde_json::json;

use super::{
    BenchOptions, BenchReport,
    timing::{MS, Rival, US, timed},
    torch::Torch,
};
use crate::{
    error::{CommonErrors as _, Error, Result},
    evaluate::stream::replay,
};

const ROWS: usize = 500;

const TAE: usize = 64;

/// A small simulated world, and a request in it.
pub(super) struct ExpertFixture {
    pub(super) dataset: Dataset,
    pub(super) example: Example,
}

impl ExpertFixture {
    pub(super) fn new() -> Result<Self> {
        let dir = super::temporary()?;
        let world = SimulateOptions { users: 100, items: 1000, ..super::world(dir.path()) };
        simulate(&world)?;
        let dataset = Dataset::open(&world.into)?;
        let example = request(&dataset)?;
        Ok(Self { dataset, example })
    }

    fn expert(&self, options: &BenchOptions) -> Result<ServedExpert> {
        let limits = Config::default().plugin_limits;
        let plugin =
            std::fs::read(options.plugin("mlp-fusion")?).map_err(Error::io(&options.plugins))?;
        let engine = Engine::new(limits.engine())?;
        self.load(&engine, "mlp-fusion", &plugin, BreakerConfig::default())
    }

    /// An untrained expert from a component's bytes.
    pub(super) fn load(
        &self,
        engine: &Engine,
        name: &str,
        component: &[u8],
        breaker: BreakerConfig,
    ) -> Result<ServedExpert> {
        let limits = Config::default().plugin_limits.load_options();
        let options = LoadOptions { tae_dim: TAE, fm_version: Some("1.0.0".into()), ..limits };
        let plugin = Plugin::from_bytes(engine, name, component, &options.limits)?;
        let blueprint = Arc::new(Blueprint::new(plugin, &self.dataset.schema, &options)?);
        let normaliser = Normaliser::identity(blueprint.columns.feature_names());
        let parameters = blueprint.init_parameters(normaliser, 1);
        Ok(ServedExpert::new(blueprint, parameters, Config::default().device, breaker)?)
    }
}

fn tae() -> Vec<f32> {
    (0..ROWS * TAE).map(|at| ((at * 37 % 101) as f32 - 50.0) / 40.0).collect()
}

/// A request of the world with the candidates of many.
fn request(dataset: &Dataset) -> Result<Example> {
    let examples = replay(dataset, &Config::default(), 64)?;
    let mut examples: Vec<Example> = examples.collect::<hypercast_data::Result<_>>()?;
    let targets = examples.iter().flat_map(|example| example.targets.clone());
    let targets = targets.take(ROWS).collect();
    let last = examples.pop().ok_or_else(|| Error::internal("the world has no request"))?;
    Ok(Example { targets, ..last })
}

/// The network, from the request's columns to predictions.
///
/// # Errors
/// A plugin that is not built or is rejected.
pub fn network(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let fixture = ExpertFixture::new()?;
    let expert = fixture.expert(options)?;
    let info = &expert.blueprint().info;
    let ids = info.ids.iter().filter(|id| *id != "user_id");
    let tables: Vec<[usize; 2]> =
        ids.map(|id| [if id.ends_with("_id") { 10_000 } else { 1_000 }, 8]).collect();
    let case = json!({
        "kind": "expert", "rows": ROWS, "tae": TAE, "features": info.features.len(),
        "tables": tables, "tasks": expert.blueprint().description.tasks.len(),
        "surfaces": info.surfaces.len(),
    });
    let tae = tae();
    let torch = Torch::start(options, report, &[case]);
    let ours = timed(|| Ok(expert.predict(&[&fixture.example], Tae::Rows(&tae))));
    let rivals = torch.iter().flat_map(|torch| torch.rivals(0)).collect();
    let name = format!("expert's network, {ROWS} candidates");
    report.race(&name, MS, options.runs.max(50), ours, rivals)?;
    Ok(())
}

/// The ranking by itself: by the first task, as the plugin does it.
///
/// # Errors
/// A plugin that is not built or is rejected.
pub fn ranking(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let fixture = ExpertFixture::new()?;
    let (expert, example) = (fixture.expert(options)?, &fixture.example);
    let tae = tae();
    let predictions = expert
        .predict(&[example], Tae::Rows(&tae))
        .map_err(|fault| Error::internal(format!("the expert failed: {fault}")))?;
    let ours = timed(|| Ok(expert.rank(example, Tae::Rows(&tae), &predictions, ROWS)));
    let run = timed(|| Ok(rank_natively(&predictions)));
    let rivals = vec![Rival { name: "native Rust", run }];
    let name = format!("rank in Wasm, {ROWS} candidates");
    let times_s = report.race(&name, US, options.runs.max(200), ours, rivals)?;
    let added_us = times_s[0] * 1e6 - times_s[1] * 1e6;
    report.figure(format!("what Wasm adds to it, {ROWS} candidates"), added_us, "us");
    Ok(())
}

/// The rule of the plugin: the best first by the first task, earlier candidates first among equals.
fn rank_natively(predictions: &ExpertPredictions) -> Vec<(u32, f32)> {
    let scores = &predictions.tasks[0].values;
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.into_iter().map(|row| (row, scores[row as usize])).collect()
}
