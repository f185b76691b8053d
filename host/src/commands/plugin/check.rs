//! `hypercast plugin check FILE`: what a component says of itself, what its
//! network costs of its surface's budget, and which columns it is sent; or why it is refused.
//!
//! It loads a plugin exactly as training and serving do, and goes no further.

use std::collections::BTreeMap;

use clap::Parser;

use super::subject::{LoadedPlugin, PluginUnderTest};
use hypercast_config::FlopsShare;
use hypercast_core::text_table::TextTable;
use hypercast_expert::batch::ExpertColumns;
use hypercast_expert::graph::{ExpertGraph, Lead, Op};
use hypercast_expert::wasm::contract::{Column, TaskKind};

/// Arguments of `hypercast plugin check`.
#[derive(Debug, Parser)]
pub struct Args {
    /// What is checked.
    #[command(flatten)]
    pub subject: PluginUnderTest,
    /// Candidates of the request whose bytes are told
    #[arg(long, default_value_t = 200)]
    pub candidates: usize,
}

/// Checks the plugin and prints what it is.
///
/// # Errors
/// It is refused, also for what it costs beside the configuration's FM: that is found where a
/// version is registered, so the report is printed before.
pub fn run(args: Args) -> anyhow::Result<()> {
    let loaded = args.subject.load()?;
    print!("{}", report(&loaded, args.candidates));
    let name = &loaded.blueprint.description.name;
    match loaded.over_flops_share() {
        Some(over) => Err(hypercast_expert::Error::misfit(name, over.refusal()).into()),
        None => Ok(()),
    }
}

/// The plugin in words.
pub fn report(loaded: &LoadedPlugin, candidates: usize) -> String {
    let (d, graph) = (&loaded.blueprint.description, &*loaded.blueprint.graph);
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
    let cost = graph.cost;
    let (flops, most) = (cost.per_candidate(d.history_len), loaded.limits.max_flops);
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let (count, parameters) = (graph.parameter_count(), loaded.limits.max_parameters);
    let mut text = format!(
        "expert          {} {}\n\
         contract        {}\n\
         surfaces        {}\n\
         tasks           {}\n\
         short history   {} events\n\
         FM versions     {}\n\
         parameters      {count}, {} of {parameters}\n\
         memory          {} MiB to serve, {} MiB to train, of {} MiB\n\
         FLOPs           {flops} a candidate with its share of a full short history, {} of {most}\n\
         \u{20}               ({} a candidate, {} an event of the short history)\n\n",
        d.name,
        d.version,
        loaded.blueprint.plugin.contract().version(),
        list(d.surfaces.clone(), "any"),
        list(tasks.collect(), "none"),
        d.history_len,
        d.fm_version,
        share(count as u64, parameters as u64),
        mib(graph.serving_memory.total()),
        mib(graph.training_memory.total()),
        loaded.limits.network_memory_mib,
        share(flops, most),
        cost.per_row,
        cost.per_history,
    );
    if let Some(cost @ FlopsShare { one_stage, .. }) = loaded.flops_share {
        let (used, most) = (cost.share(), loaded.max_flops_share());
        text.push_str(&format!(
            "share           {:.1} % of the {one_stage} FLOPs of a one-stage model of the FM's \
             size, of {:.1} %\n\n",
            used * 100.0,
            most * 100.0,
        ));
    }
    text.push_str(&columns(loaded, candidates));
    text.push_str(&layers(graph));
    let may_train = mib(graph.training_memory.total()) <= loaded.limits.network_memory_mib;
    text.push_str(match (loaded.over_flops_share(), may_train) {
        (Some(_), _) => "refused as a new version, for what its network costs\n",
        (None, true) => "accepted\n",
        (None, false) => {
            "accepted to serve; refused where it is trained, for the memory that it needs\n"
        }
    });
    text
}

/// A part of a limit, in per cent.
pub fn share(part: u64, whole: u64) -> String {
    let percent = part as f64 / whole.max(1) as f64 * 100.0;
    if percent >= 10.0 { format!("{percent:.0} %") } else { format!("{percent:.1} %") }
}

/// What goes to the network and to `rank` for a request of so many candidates.
fn columns(loaded: &LoadedPlugin, candidates: usize) -> String {
    let d = &loaded.blueprint.description;
    let (rows, events) = (candidates as u64, u64::from(d.history_len));
    let widths = &loaded.blueprint.columns;
    let mut text = format!("columns of a request of {candidates} candidates\n");
    let mut part = |name: &str, columns: Vec<(&Column, usize)>, more: u64| {
        let bytes = |(column, of_each): &(&Column, usize)| {
            let values = if column.is_history() { events } else { rows };
            values * *of_each as u64
        };
        let kib = |bytes: u64| bytes as f64 / 1024.0;
        let (count, size) = (columns.len(), kib(columns.iter().map(bytes).sum::<u64>() + more));
        text.push_str(&format!("  {name:<22} {count:>4} columns {size:>10.1} KiB\n"));
        for column in &columns {
            let (label, size) = (column.0.label(), kib(bytes(column)));
            text.push_str(&format!("    {label:<32} {size:>10.1} KiB\n"));
        }
    };
    let of_network = d.columns.iter().enumerate();
    let of_network =
        of_network.map(|(index, column)| (column, widths.network_value_bytes(index, column)));
    part("network (in the host)", of_network.collect(), 0);
    // Besides its columns `rank` is sent the candidates' ids and a prediction a task.
    let more = ((8 + 4 * d.tasks.len()) * candidates) as u64;
    part("rank (into Wasm)", of_guest(widths, &d.rank_columns), more);
    part("training hooks", of_guest(widths, &d.training_columns), 0);
    text.push('\n');
    text
}

/// Columns that go into a guest, and the bytes of their values.
fn of_guest<'a>(widths: &ExpertColumns, columns: &'a [Column]) -> Vec<(&'a Column, usize)> {
    columns.iter().map(|column| (column, widths.value_bytes(column))).collect()
}

/// What one layer holds.
#[derive(Default)]
struct LayerReport {
    ops: BTreeMap<String, usize>,
    parameters: usize,
    last: String,
}

fn layers(graph: &ExpertGraph) -> String {
    let mut order: Vec<&str> = Vec::new();
    let mut layers: BTreeMap<&str, LayerReport> = BTreeMap::new();
    for node in &graph.nodes {
        let layer = layers.entry(&node.layer).or_insert_with(|| {
            order.push(&node.layer);
            LayerReport::default()
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
    let mut table = TextTable::new(4, ["layer", "result", "parameters", "ops"]);
    for name in order {
        let layer = &layers[name];
        let ops = layer
            .ops
            .iter()
            .map(|(op, count)| if *count > 1 { format!("{op} x{count}") } else { op.clone() });
        let ops: Vec<String> = ops.collect();
        let parameters = layer.parameters.to_string();
        table.line([name.to_string(), layer.last.clone(), parameters, ops.join(", ")]);
    }
    format!("{table}\n")
}
