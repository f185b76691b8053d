//! How fast one expert is: `rank` in Wasm, its network for 20 and 500 rows, and
//! its training step, on random data.
//!
//! ```text
//! cargo run -p hypercast --example expert_speed -- EXPERT.wasm [SCHEMA.toml]
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hypercast::expert::graph::Graph;
use hypercast::expert::wasm::Call;
use hypercast::expert::wasm::contract::{Prediction, RankRequest};
use hypercast::expert::{
    Blueprint, BreakerConfig, Chunk, Device, Engine, EngineConfig, Expert, ExpertTrainer,
    LoadOptions, Normaliser, Tae, TrainerConfig,
};
use hypercast::schema::Schema;
use hypercast_fm::example::{Event, Example, Item, MAX_VALUES, Outcome, Target, User};

const TAE_DIM: usize = 64;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let plugin = args
        .next()
        .ok_or_else(|| anyhow::anyhow!("usage: expert_speed EXPERT.wasm [SCHEMA.toml]"))?;
    let schema = match args.next() {
        Some(path) => Schema::load(Path::new(&path))?,
        None => toml::from_str(SCHEMA)?,
    };
    let engine = Engine::new(EngineConfig::default())?;
    let options = LoadOptions { tae_dim: TAE_DIM, ..LoadOptions::default() };
    let blueprint = Arc::new(Blueprint::load(&engine, Path::new(&plugin), &schema, &options)?);
    describe(&blueprint.graph);
    let normaliser = Normaliser::identity(blueprint.columns.feature_names());
    let parameters = blueprint.init_parameters(normaliser, 1);
    rank_speed(&blueprint, &schema)?;
    train_speed(&blueprint, &schema, parameters.clone())?;
    let expert = Expert::new(blueprint, parameters, Device::Cpu, BreakerConfig::default())?;
    for rows in [20, 500] {
        let example = example(&schema, 1, rows);
        let tae = noise(rows * TAE_DIM);
        let micros = median(200, || drop(expert.predict(&[&example], Tae::Rows(&tae))));
        println!("network, {rows} rows: {micros:.0} us");
    }
    Ok(())
}

fn describe(graph: &Graph) {
    let (cost, parameters) = (graph.cost, graph.parameter_count());
    println!(
        "{}: {parameters} parameters, {} FLOPs a candidate, {} an event",
        graph.plugin, cost.per_row, cost.per_history
    );
}

fn rank_speed(blueprint: &Blueprint, schema: &Schema) -> anyhow::Result<()> {
    let example = example(schema, 1, 500);
    let tae = noise(500 * TAE_DIM);
    let columns = blueprint.columns.rank_columns(&example, Tae::Rows(&tae));
    let tasks = &blueprint.description.tasks;
    let predictions: Vec<Prediction> = tasks
        .iter()
        .map(|task| Prediction { task: task.name.clone(), values: noise(500) })
        .collect();
    let request = RankRequest {
        surface: schema.surfaces[0].clone(),
        user: 1,
        time_ms: 0,
        candidates: (0..500).collect(),
        limit: 20,
    };
    let fresh = median(500, || drop(blueprint.plugin.rank(&request, &predictions, &columns)));
    let mut instance = blueprint.plugin.instance(Call::Rank)?;
    instance.rank(&request, &predictions, &columns)?;
    let warm = median(500, || drop(instance.rank(&request, &predictions, &columns)));
    println!(
        "rank, 500 candidates x {} tasks: {warm:.0} us warm, {fresh:.0} us fresh",
        tasks.len()
    );
    Ok(())
}

fn train_speed(
    blueprint: &Arc<Blueprint>,
    schema: &Schema,
    parameters: hypercast::expert::Parameters,
) -> anyhow::Result<()> {
    let mut trainer =
        ExpertTrainer::new(blueprint.clone(), parameters, TrainerConfig::default(), Device::Cpu)?;
    let examples: Vec<Example> = (0..4000).map(|request| example(schema, request, 8)).collect();
    let tae = noise(32_000 * TAE_DIM);
    let start = Instant::now();
    let mut rows = 0;
    while start.elapsed().as_secs() < 5 {
        trainer.train(Chunk { examples: &examples, tae: &tae }, |_| {})?;
        rows += 32_000;
    }
    println!("training: {:.0} rows/s", f64::from(rows) / start.elapsed().as_secs_f64());
    Ok(())
}

fn median(times: usize, mut f: impl FnMut()) -> f64 {
    let mut micros: Vec<f64> = (0..times)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    micros.sort_by(f64::total_cmp);
    micros[times / 2]
}

fn noise(count: usize) -> Vec<f32> {
    (0..count as u32)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32)
        .collect()
}

fn example(schema: &Schema, request: u64, targets: usize) -> Example {
    let categorical = schema.id_columns().len();
    let item = |id: u64| Arc::new(Item { id, ids: vec![id % 18; categorical], ..Item::default() });
    let seen = outcome(request as u32 % 4);
    let event = |index: u64| Event {
        item: item(request * 7 + index),
        surface: 0,
        time_ms: index as i64 * 1000,
        outcome: seen,
    };
    let target = |index: u64| Target {
        item: item(request * 13 + index),
        ids: vec![(request * 13 + index) % 10_000; categorical],
        features: vec![index as f32 / 10.0; schema.feature_columns().len()],
        outcome: outcome((request + index) as u32 % 4),
        truth: Vec::new(),
    };
    Example {
        request,
        user: Arc::new(User { id: request % 100, ..User::default() }),
        surface: 0,
        time_ms: 100_000,
        history: (0..50).map(event).collect(),
        targets: (0..targets as u64).map(target).collect(),
    }
}

fn outcome(actions: u32) -> Outcome {
    Outcome { actions, known: u32::MAX, values: [f32::NAN; MAX_VALUES] }
}

const SCHEMA: &str = r#"
surfaces = ["feed", "reels"]
actions = ["click", "like", "share", "hide"]
tasks = [
    { name = "click", role = "main", kind = "binary", label = "click" },
    { name = "like", role = "main", kind = "binary", label = "like" },
    { name = "share", role = "main", kind = "binary", label = "share" },
    { name = "hide", role = "main", kind = "binary", label = "hide" },
]
item_features = [{ name = "tag", kind = "categorical" }, { name = "length", kind = "dense" }]
counters = [
    { name = "item_click", key = ["item_id"], action = "click" },
    { name = "user_click", key = ["user_id"], action = "click" },
    { name = "user_tag_click", key = ["user_id", "tag"], action = "click" },
]
"#;
