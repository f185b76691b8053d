//! `hypercast plugin bench FILE`: how long a component's calls and its network take,
//! how much memory a call needs, and the headroom to each limit.
//!
//! Requests are made up, of one size, and parameters are untrained: neither changes
//! what a call costs. It measures one expert on a quiet thread; what a daemon under
//! load does is measured by `hypercast-lab bench serving`.

use std::time::Instant;

use clap::Parser;
use serde::Serialize;

use super::check::share;
use super::subject::PluginUnderTest;
use hypercast_core::quantile::quantile;
use hypercast_data::synthetic::{Synthetic, SyntheticSize};
use hypercast_expert::batch::GuestRequest;
use hypercast_expert::wasm::Call;
use hypercast_expert::wasm::contract::{
    Decision, Evaluation, Quality, Slice, TrainingStep, rank_request,
};
use hypercast_expert::{
    Blueprint, BreakerConfig, Device, ExpertFault, FmRows, Normaliser, ServedExpert, Tae,
};

/// Bytes of one ranked candidate, as they leave the guest: an index, a score, a propensity.
const RANKED_BYTES: u64 = 16;

/// A training step in the middle of a training.
const STEP: TrainingStep = TrainingStep {
    taken: 500,
    planned: 1000,
    trained_rows: 500 * 512,
    rows: 512,
    learning_rate: 1e-3,
};

/// Arguments of `hypercast plugin bench`.
#[derive(Debug, Parser)]
pub struct Args {
    /// What is measured.
    #[command(flatten)]
    pub subject: PluginUnderTest,
    /// Candidates of a request, and examples of a training hook's batch
    #[arg(long, default_value_t = 500)]
    pub candidates: usize,
    /// Events of a request's history
    #[arg(long, default_value_t = 100)]
    pub history: usize,
    /// Calls of each kind that are timed
    #[arg(long, default_value_t = 200)]
    pub runs: usize,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Times and memory of each call, and the headroom to each limit.
#[derive(Debug, Serialize)]
pub struct PluginBenchReport {
    /// The plugin and its version.
    pub expert: String,
    /// Candidates of a request.
    pub candidates: usize,
    /// The guest's exports.
    pub calls: Vec<Timed>,
    /// The network over all candidates, on this machine's CPU.
    pub network: Timed,
    /// The same a candidate, at its median, in microseconds.
    pub network_us_a_candidate: f64,
    /// What is used of each limit.
    pub headroom: Vec<Used>,
}

/// Times of one thing.
#[derive(Debug, Clone, Serialize)]
pub struct Timed {
    /// What.
    pub name: &'static str,
    /// The median, in microseconds.
    pub p50_us: f64,
    /// The 99th percentile, in microseconds.
    pub p99_us: f64,
}

/// A limit, and how much of it is used.
#[derive(Debug, Serialize)]
pub struct Used {
    /// The limit, as the configuration calls it.
    pub limit: &'static str,
    /// What is used.
    pub used: f64,
    /// What may be.
    pub most: f64,
    /// Of both.
    pub unit: &'static str,
}

/// Measures the component and prints the report, as a table or as JSON.
pub fn run(args: Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.candidates > 0 && args.runs > 0, "candidates and runs must be above 0");
    let report = measure(&args)?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{}", table(&report)),
    }
    Ok(())
}

fn measure(args: &Args) -> anyhow::Result<PluginBenchReport> {
    let loaded = args.subject.load()?;
    let blueprint = &loaded.blueprint;
    let surface = loaded.surfaces().next();
    let surface = surface.ok_or_else(|| anyhow::anyhow!("it serves no surface of the schema"))?;
    let world = Synthetic::new(loaded.schema.clone(), blueprint.columns.tae_dim(), 1)
        .with_content(loaded.content_dim);
    let size = SyntheticSize { surface, candidates: args.candidates, history: args.history };
    let sample = world.request(1, size);
    let normaliser = Normaliser::identity(blueprint.columns.feature_names());
    let parameters = blueprint.init_parameters(normaliser, 1);
    let breaker = BreakerConfig { faults: u32::MAX, ..BreakerConfig::default() };
    let expert = ServedExpert::new(blueprint.clone(), parameters, Device::Cpu, breaker)?;

    let fm = FmRows { tae: Tae::Rows(&sample.tae), predictions: &sample.predictions };
    let predict = || expert.predict(&[&sample.example], fm);
    let predictions = predict()?;
    let network = timed("network", args.runs, || predict().map(drop))?;
    let request = GuestRequest { example: &sample.example, fm, ranked: &[] };
    let (rank, memory_bytes) = rank(&expert, request, &predictions.for_rank(), args.runs)?;
    let batch = blueprint.columns.hook_batch(&[request], &blueprint.info);
    let evaluation = evaluation(blueprint);
    let (plugin, info) = (&blueprint.plugin, &blueprint.info);
    let few = args.runs.min(50);
    let hooks = vec![
        timed("labels", few, || plugin.labels(&blueprint.description, info, &batch).map(drop))?,
        timed("weights", few, || plugin.weights(&blueprint.description, info, &batch).map(drop))?,
        timed("sample", few, || plugin.sample(info, &batch).map(drop))?,
        timed("schedule", few, || plugin.schedule(STEP).map(drop))?,
        timed("evaluate", few, || plugin.evaluate(info, &evaluation).map(drop))?,
        timed("network (building it)", few, || plugin.network(info).map(drop))?.each_of(2.0),
    ];
    let slowest_hook_us = hooks.iter().map(|hook| hook.p99_us).fold(0.0, f64::max);
    let (limits, own) = (&loaded.limits, &blueprint.description.limits);
    let deadline_ms = f64::from(bounded(own.deadline_ms, limits.deadline_ms));
    let memory_mib = f64::from(bounded(own.memory_mib, limits.memory_mib));
    let used = |limit, used: f64, most: f64, unit| Used { limit, used, most, unit };
    let flops = blueprint.flops();
    let output = limits.load_options().limits.output_bytes;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let setup_ms = f64::from(limits.setup_deadline_ms);
    let ranked = (RANKED_BYTES * args.candidates as u64) as f64;
    let (parameters, most) = (blueprint.graph.parameter_count(), limits.max_parameters);
    let mut headroom = vec![
        used("deadline_ms", rank.p99_us / 1e3, deadline_ms, "ms"),
        used("setup_deadline_ms", slowest_hook_us / 1e3, setup_ms, "ms, the slowest hook"),
        used("memory_mib", mib(memory_bytes as f64), memory_mib, "MiB"),
        used("output", mib(ranked), mib(output as f64), "MiB"),
        used("max_flops", flops as f64, limits.max_flops as f64, "FLOPs a candidate"),
        used("max_parameters", parameters as f64, most as f64, "values"),
    ];
    headroom.extend(loaded.flops_share.map(|cost| {
        let most = loaded.max_flops_share();
        let unit = "%, of the FLOPs of a one-stage model";
        used("max_flops_share", cost.share() * 100.0, most * 100.0, unit)
    }));
    Ok(PluginBenchReport {
        expert: format!("{} {}", blueprint.description.name, blueprint.description.version),
        candidates: args.candidates,
        calls: std::iter::once(rank).chain(hooks).collect(),
        network_us_a_candidate: network.p50_us / args.candidates as f64,
        network,
        headroom,
    })
}

/// `rank` in a fresh instance a call, as it is served, and the memory that one needed.
fn rank(
    expert: &ServedExpert,
    GuestRequest { example, fm, .. }: GuestRequest<'_>,
    predictions: &[hypercast_expert::wasm::contract::Prediction],
    runs: usize,
) -> Result<(Timed, usize), ExpertFault> {
    let blueprint = expert.blueprint();
    let plugin = &blueprint.plugin;
    let columns = blueprint.columns.rank_columns(example, fm);
    let request = rank_request(example, &blueprint.info, example.targets.len());
    let mut instance = plugin.instance(Call::Rank)?;
    instance.rank(&request, predictions, &columns)?;
    let memory_bytes = instance.memory_bytes();
    drop(instance);
    let mut took_us = Vec::with_capacity(runs);
    for run in 0..runs + runs.div_ceil(10) {
        // A daemon does this between requests.
        plugin.prepare();
        let start = Instant::now();
        plugin.rank(&request, predictions, &columns)?;
        if run >= runs.div_ceil(10) {
            took_us.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok((Timed::new("rank", took_us), memory_bytes))
}

/// Every task, over all surfaces and on each of them, as good as what serves.
fn evaluation(blueprint: &Blueprint) -> Evaluation {
    let quality = Quality {
        ne: Some(0.8),
        auc: Some(0.7),
        gauc: Some(0.6),
        calibration: Some(1.0),
        mse: Some(0.1),
    };
    let surfaces = || blueprint.info.surfaces.iter().cloned().map(Some);
    let slice = |task: &str, surface| Slice {
        task: task.to_owned(),
        surface,
        examples: 10_000,
        candidate: quality,
        serving: Some(quality),
    };
    let tasks = blueprint.description.tasks.iter();
    let slices = tasks.flat_map(|task| {
        std::iter::once(None).chain(surfaces()).map(move |surface| slice(&task.name, surface))
    });
    Evaluation { decision: Decision::Publication, slices: slices.collect() }
}

/// What holds for this component: its own limit, or the configuration's if that is less.
fn bounded(asked: u32, most: u32) -> u32 {
    if asked == 0 { most } else { asked.min(most) }
}

fn timed<E>(
    name: &'static str,
    runs: usize,
    mut call: impl FnMut() -> Result<(), E>,
) -> Result<Timed, E> {
    // What the first calls meet is the machine's, not the component's.
    (0..runs.div_ceil(10)).try_for_each(|_| call())?;
    let mut took_us = Vec::with_capacity(runs);
    for _ in 0..runs {
        let start = Instant::now();
        call()?;
        took_us.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Timed::new(name, took_us))
}

impl Timed {
    fn new(name: &'static str, mut took_us: Vec<f64>) -> Timed {
        let p50_us = quantile(&mut took_us, 0.5);
        Timed { name, p50_us, p99_us: quantile(&mut took_us, 0.99) }
    }

    /// One of the `calls` that each time was for: a network is asked of two instances, which have a
    /// deadline each.
    fn each_of(self, calls: f64) -> Timed {
        Timed { p50_us: self.p50_us / calls, p99_us: self.p99_us / calls, ..self }
    }
}

fn table(report: &PluginBenchReport) -> String {
    let PluginBenchReport { expert, candidates, calls, network, network_us_a_candidate, headroom } =
        report;
    let mut text = format!("{expert}, requests of {candidates} candidates\n\n");
    text.push_str(&format!("{:<24} {:>12} {:>12}\n", "guest", "p50 us", "p99 us"));
    for Timed { name, p50_us, p99_us } in calls {
        text.push_str(&format!("{name:<24} {p50_us:>12.1} {p99_us:>12.1}\n"));
    }
    text.push_str(&format!(
        "\n{:<24} {:>12.1} {:>12.1}   {network_us_a_candidate:.2} us a candidate\n\n",
        "network (native)", network.p50_us, network.p99_us
    ));
    text.push_str(&format!("{:<24} {:>14} {:>14} {:>8}\n", "limit", "used", "of", ""));
    for Used { limit, used, most, unit } in headroom {
        let part = share((used * 1e6) as u64, (most * 1e6) as u64);
        text.push_str(&format!("{limit:<24} {used:>14.2} {most:>14.2} {part:>8}  {unit}\n"));
    }
    text
}
