//! An in-tree expert on 500 candidates: its network beside the same network in
//! PyTorch, and its ranking in Wasm beside the same rule in native Rust.

use std::{hint::black_box, sync::Arc};

use hypercast_fm::example::{Example, Outcome};
use serde_json::json;

use super::{
    Options, Report, Rival,
    timing::{Contender, medians_s},
    torch,
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::Config;
use hypercast_data::dataset::{Context, Dataset};
use hypercast_data::features::{CandidateInput, FeatureState, RequestInput};
use hypercast_data::import::simulate::{self, simulate};
use hypercast_data::schema::FeatureKind;
use hypercast_expert::{
    Blueprint, BreakerConfig, Engine, Expert, LoadOptions, Normaliser, Predictions, Tae,
};

const ROWS: usize = 500;

/// Width of the TAE.
const TAE: usize = 64;

/// Adds the figures of the part.
///
/// # Errors
/// A plugin that is not built, or is refused.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let ground = Ground::new()?;
    let expert = expert(options, &ground.dataset)?;
    network(options, report, &expert, &ground.example, &tae());
    ranking(options, report, &expert, &ground.example, &tae())
}

/// The ranking's figures alone.
pub(super) fn rank_alone(options: &Options, report: &mut Report) -> Result<()> {
    let ground = Ground::new()?;
    let expert = expert(options, &ground.dataset)?;
    ranking(options, report, &expert, &ground.example, &tae())
}

/// A small world, and a request in it.
pub(super) struct Ground {
    pub(super) dataset: Dataset,
    pub(super) example: Example,
}

impl Ground {
    pub(super) fn new() -> Result<Self> {
        let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
        let world = simulate::Options {
            into: dir.path().join("data"),
            users: 100,
            items: 1000,
            requests: 500,
            surfaces: 2,
            seed: 1,
        };
        simulate(&world)?;
        let dataset = Dataset::open(&world.into)?;
        let example = request(&dataset)?;
        Ok(Self { dataset, example })
    }
}

fn tae() -> Vec<f32> {
    (0..ROWS * TAE).map(|at| ((at * 37 % 101) as f32 - 50.0) / 40.0).collect()
}

fn expert(options: &Options, dataset: &Dataset) -> Result<Expert> {
    let plugin = options.plugin("mlp-fusion")?;
    let limits = Config::default().plugin_limits;
    let engine = Engine::new(limits.engine())?;
    let load =
        LoadOptions { tae_dim: TAE, fm_version: Some("1.0.0".into()), ..limits.load_options() };
    let blueprint = Arc::new(Blueprint::load(&engine, &plugin, &dataset.schema, &load)?);
    let normaliser = Normaliser::identity(blueprint.columns.feature_names());
    let parameters = blueprint.init_parameters(normaliser, 1);
    let device = Config::default().device;
    Ok(Expert::new(blueprint, parameters, device, BreakerConfig::default())?)
}

fn request(dataset: &Dataset) -> Result<Example> {
    let state = FeatureState::rebuild(dataset, Config::default().features, None)?;
    let context = |kind| {
        dataset.schema.context_features.iter().filter(move |feature| feature.kind == kind).count()
    };
    let context = Arc::new(Context {
        ids: vec![0; context(FeatureKind::Categorical)],
        dense: vec![0.0; context(FeatureKind::Dense)],
    });
    let mut items: Vec<u64> = dataset.items.keys().copied().collect();
    items.sort_unstable();
    let candidates = items.iter().cycle().take(ROWS).map(|&item| CandidateInput {
        item,
        features: None,
        context: context.clone(),
        outcome: Outcome::UNKNOWN,
        truth: Vec::new(),
    });
    let user = dataset.users.keys().min().copied().unwrap_or(0);
    let input = RequestInput {
        request: 1,
        user,
        user_features: None,
        surface: 0,
        time_ms: i64::MAX / 2,
        candidates: candidates.collect(),
    };
    Ok(state.fetch(&input, 64))
}

/// The network, from the request's columns to predictions.
fn network(
    options: &Options,
    report: &mut Report,
    expert: &Expert,
    example: &Example,
    tae: &[f32],
) {
    let info = &expert.blueprint().info;
    let ids = info.ids.iter().filter(|id| *id != "user_id");
    let tables: Vec<[usize; 2]> =
        ids.map(|id| [if id.ends_with("_id") { 10_000 } else { 1_000 }, 8]).collect();
    let case = json!({
        "kind": "expert", "rows": ROWS, "tae": TAE, "features": info.features.len(),
        "tables": tables, "tasks": expert.blueprint().description.tasks.len(),
        "surfaces": info.surfaces.len(),
    });
    let ours = medians_s(
        options.runs.max(50),
        &mut [Box::new(|| drop(black_box(expert.predict(&[example], Tae::Rows(tae)))))],
    )[0];
    let rival = match torch::run(&options.python, &[case], options.runs.max(50)) {
        Ok(torch) => {
            report.version("torch", &torch.version);
            let name = "the same network in PyTorch eager".into();
            Some(Rival { name, value: torch.seconds[0] * 1e3 })
        }
        Err(why) => {
            report.note(why);
            None
        }
    };
    report.add(format!("expert's network, {ROWS} candidates"), (ours * 1e3, "ms"), rival);
}

/// The ranking alone: best first by the first task, as the plugin has it.
fn ranking(
    options: &Options,
    report: &mut Report,
    expert: &Expert,
    example: &Example,
    tae: &[f32],
) -> Result<()> {
    let failed = |why: String| Error::invalid(format!("the expert failed: {why}"));
    let predictions =
        expert.predict(&[example], Tae::Rows(tae)).map_err(|fault| failed(fault.to_string()))?;
    let took = {
        let mut contenders: [Contender<'_>; 2] = [
            Box::new(|| {
                drop(black_box(expert.rank(example, Tae::Rows(tae), &predictions, ROWS)));
            }),
            Box::new(|| drop(black_box(natively(&predictions)))),
        ];
        medians_s(options.runs.max(200), &mut contenders)
    };
    let rival = Rival { name: "native Rust".into(), value: took[1] * 1e6 };
    report.add(format!("rank in Wasm, {ROWS} candidates"), (took[0] * 1e6, "us"), Some(rival));
    let more = (took[0] - took[1]) * 1e6;
    report.add(format!("what Wasm adds to it, {ROWS} candidates"), (more, "us"), None);
    Ok(())
}

/// The rule of the plugin: by the first task, best first, earlier candidates first among equals.
fn natively(predictions: &Predictions) -> Vec<(u32, f32)> {
    let scores = &predictions.tasks[0].values;
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.into_iter().map(|row| (row, scores[row as usize])).collect()
}
