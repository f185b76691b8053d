//! `hypercast plugin check FILE`: what a component says of itself and what its
//! network costs, or why it is refused.
//!
//! It loads a plugin exactly as training and serving do, and goes no further.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Parser;

use crate::expert::graph::{Graph, GraphLimits, Lead, Op};
use crate::expert::wasm::contract::{Description, TaskKind};
use crate::expert::{Blueprint, Engine, EngineConfig, Limits, LoadOptions};
use crate::schema::Schema;

/// Arguments of `hypercast plugin check`.
#[derive(Debug, Parser)]
pub struct Args {
    /// The component, as `cargo hypercast build` writes it.
    pub file: PathBuf,
    /// The schema that it is to fit (`schema.toml` of a data set).
    #[arg(long)]
    pub schema: PathBuf,
    /// The width of the foundation model's embedding; 0 without one.
    #[arg(long, default_value_t = 64)]
    pub tae_dim: usize,
    /// The most FLOPs a candidate that its surface allows.
    #[arg(long)]
    pub max_flops: Option<u64>,
}

/// Checks the plugin and prints what it is.
pub fn run(args: Args) -> anyhow::Result<()> {
    let schema = Schema::load(&args.schema)?;
    let mut graph_limits = GraphLimits::default();
    if let Some(flops) = args.max_flops {
        graph_limits.flops_per_candidate = flops;
    }
    let engine = Engine::new(EngineConfig { instances: 1, ..EngineConfig::default() })?;
    let options = LoadOptions {
        limits: Limits::default(),
        graph_limits,
        tae_dim: args.tae_dim,
        fm_version: None,
    };
    let blueprint = Blueprint::load(&engine, &args.file, &schema, &options)?;
    print!("{}", report(&blueprint.description, &blueprint.graph));
    Ok(())
}

/// The plugin in words.
pub fn report(description: &Description, graph: &Graph) -> String {
    let d = description;
    let list = |items: Vec<String>, none: &str| {
        if items.is_empty() { none.to_owned() } else { items.join(", ") }
    };
    let tasks = d.tasks.iter().map(|task| {
        let kind = match task.kind {
            TaskKind::Binary => "binary",
            TaskKind::Regression => "regression",
        };
        format!("{} ({kind})", task.name)
    });
    let columns = d.columns.iter().map(|column| column.label()).collect();
    let rank_columns = d.rank_columns.iter().map(|column| column.label()).collect();
    let history = u64::from(d.history_len);
    let cost = graph.cost;
    let mut text = format!(
        "expert          {} {}\n\
         surfaces        {}\n\
         tasks           {}\n\
         columns         {}\n\
         rank columns    {}\n\
         short history   {} events\n\
         FM versions     {}\n\
         parameters      {}\n\
         FLOPs           {} a candidate, {} an event of the short history ({} a full one)\n\n",
        d.name,
        d.version,
        list(d.surfaces.clone(), "any"),
        list(tasks.collect(), "none"),
        list(columns, "none"),
        list(rank_columns, "none"),
        d.history_len,
        d.fm_version,
        graph.parameter_count(),
        cost.per_row,
        cost.per_history,
        cost.per_history.saturating_mul(history),
    );
    text.push_str(&layers(graph));
    text.push_str("accepted\n");
    text
}

/// What one layer holds.
#[derive(Default)]
struct Layer {
    ops: BTreeMap<&'static str, usize>,
    parameters: usize,
    last: String,
}

fn layers(graph: &Graph) -> String {
    let mut order: Vec<&str> = Vec::new();
    let mut layers: BTreeMap<&str, Layer> = BTreeMap::new();
    for node in &graph.nodes {
        let layer = layers.entry(&node.layer).or_insert_with(|| {
            order.push(&node.layer);
            Layer::default()
        });
        match node.op {
            Op::Parameter { parameter } => layer.parameters += graph.parameters[parameter].len(),
            _ => *layer.ops.entry(node.op.name()).or_default() += 1,
        }
        // What a layer gives is the last thing in it that depends on rows or history.
        if matches!(node.shape.lead, Some(Lead::Rows | Lead::History)) {
            layer.last = node.shape.to_string();
        }
    }
    let mut text = format!("{:<28} {:<18} {:>12}  ops\n", "layer", "result", "parameters");
    for name in order {
        let layer = &layers[name];
        let ops = layer.ops.iter().map(|(op, count)| {
            if *count > 1 { format!("{op} x{count}") } else { (*op).to_owned() }
        });
        let ops: Vec<String> = ops.collect();
        text.push_str(&format!(
            "{name:<28} {:<18} {:>12}  {}\n",
            layer.last,
            layer.parameters,
            ops.join(", ")
        ));
    }
    text.push('\n');
    text
}
