//! FM and expert against a one-stage model: cost and quality.
//!
//! The one-stage model of a surface has the FM's architecture, is trained end to end on only that
//! surface's requests, and serves with its own heads. The expert's cost is its own: a candidate's
//! TAE is computed once for all experts.

use std::time::Instant;

use hypercast_config::Config;
use hypercast_core::text_table::TextTable;
use hypercast_fm::{
    cost::{ModelSize, TokenCounts, flops},
    example::Example,
    inference::FmOutput,
    spec::FmSpec,
    trainer::{FmTrainer, StepOutput},
};
use hypercast_train::fm::{FIRST_VERSION, dataset_spec};
use serde_json::{Value, json};

use super::{
    ExperimentContext, ExperimentReport,
    latency::{ModelLatency, REQUESTS, measure},
    report::arms_by_task,
    runner::ExperimentArm,
    transfer::FmHeads,
};
use crate::{
    error::Result,
    evaluate::{
        expert::TrainedExpert,
        stream::{StreamBatch, targets},
    },
    tally::ScoreTally,
};

const ARMS: [&str; 3] = ["one-stage", "expert without TAE", "expert with TAE"];

/// Measurements of a pass of two FMs over the stream.
#[derive(Default)]
struct FmPasses {
    fm: TrainingPace,
    one_stage: TrainingPace,
    fm_size: ModelSize,
    one_stage_size: ModelSize,
    /// Requests of the surface in the test, and the sums of their tokens.
    requests: u64,
    history: u64,
    targets: u64,
    /// Requests for measuring latency.
    kept: Vec<Example>,
}

/// Rows that a model learned from, and the time for it.
#[derive(Default)]
struct TrainingPace {
    rows: u64,
    seconds: f64,
}

impl TrainingPace {
    fn rows_s(&self) -> f64 {
        self.rows as f64 / self.seconds
    }
}

/// Runs the experiment for every seed. The models' costs are of the last seed.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    let surface = context.surface()?;
    let spec = dataset_spec(context.dataset)?;
    let mut last = None;
    let tallies = context.tallies(&ARMS, |config, tally| {
        let pass = context.times.time("fm", || embed(context, config, &spec, surface, tally))?;
        let runner = context.runner(config, 0)?;
        let arm = |index| ExperimentArm {
            index,
            embedding: 0..config.fm.tae_width(),
            without_tae: index == 1,
            with_fm_logits: false,
        };
        runner.run(&arm(1), &[surface], tally)?;
        last = Some((pass, runner.run(&arm(2), &[surface], tally)?));
        Ok(())
    })?;
    let (pass, trained) = last.expect("at least one seed");
    let latency = context.times.time("latency", || measure(context, &trained, &pass.kept))?;
    let costs = costs(context, &spec, &pass, &trained, latency);
    let rows = context.rows(&tallies, Some(surface))?;
    let name = &context.dataset.schema.surfaces[usize::from(surface)];
    let table = arms_by_task(&rows, name) + &table(&costs);
    let chosen = json!({ "surface": name });
    Ok(context.report(table, rows, costs, chosen))
}

/// Runs the FM over all surfaces and the one-stage model over its own, in one stream.
fn embed(
    context: &ExperimentContext<'_>,
    config: &Config,
    spec: &FmSpec,
    surface: u16,
    tally: &mut ScoreTally,
) -> Result<FmPasses> {
    let mut fm = context.fm(config, "fm", &config.fm, spec)?;
    let mut one_stage = context.fm(config, "one-stage", &config.fm, spec)?;
    let stream = context.stream(config, config.fm.max_history);
    let heads = FmHeads::new(&spec.tasks, context);
    let mut pass = FmPasses::default();
    stream.log("FM and one-stage model", &[config.fm.tae_width()], Some(surface), |part, _| {
        let tae = pass.fm.through(part, fm.as_mut())?.tae;
        let embeddings = vec![FmOutput { tae, ..FmOutput::default() }];
        if part.history_only {
            return Ok(embeddings);
        }
        let own = part.examples.iter().filter(|example| example.surface == surface);
        let examples: Vec<Example> = own.cloned().collect();
        let part = StreamBatch { examples: &examples, ..*part };
        let output = pass.one_stage.through(&part, one_stage.as_mut())?;
        heads.tally(&part, 0, &output.predictions, tally);
        for example in examples.iter().filter(|e| e.time_ms >= context.window.test_from_ms) {
            pass.requests += 1;
            pass.history += example.history.len() as u64;
            pass.targets += example.targets.len() as u64;
            if pass.kept.len() < REQUESTS {
                pass.kept.push(example.clone());
            }
        }
        Ok(embeddings)
    })?;
    (pass.fm_size, pass.one_stage_size) = (fm.size(), one_stage.size());
    fm.checkpoint(&context.checkpoint_dir("fm"), FIRST_VERSION)?;
    one_stage.checkpoint(&context.checkpoint_dir("one-stage"), FIRST_VERSION)?;
    Ok(pass)
}

impl TrainingPace {
    /// Passes a batch through a trainer, and measures the time.
    fn through(
        &mut self,
        part: &StreamBatch<'_>,
        trainer: &mut dyn FmTrainer,
    ) -> Result<StepOutput> {
        let start = Instant::now();
        let output = part.through(trainer, &|_| true)?;
        if part.may_learn {
            self.seconds += start.elapsed().as_secs_f64();
            self.rows += targets(part.examples).count() as u64;
        }
        Ok(output)
    }
}

/// A JSON object per model.
fn costs(
    context: &ExperimentContext<'_>,
    spec: &FmSpec,
    pass: &FmPasses,
    trained: &TrainedExpert,
    latency: ModelLatency,
) -> Vec<Value> {
    let requests = pass.requests.max(1) as f64;
    let (history, targets) =
        (pass.history as f64 / requests, (pass.targets as f64 / requests).max(1.0));
    let tokens =
        TokenCounts { history: history.round() as usize, targets: targets.round() as usize };
    let of_request = flops(&context.config.fm, spec, tokens);
    let fm_flops = of_request / tokens.targets as f64;
    let graph = &trained.stream.blueprint.graph;
    let short = f64::from(trained.stream.blueprint.description.history_len);
    let expert_flops = graph.cost.per_row as f64 + graph.cost.per_history as f64 * short / targets;
    let tables: usize =
        graph.parameters.iter().filter(|spec| spec.table).map(|spec| spec.len()).sum();
    let model = |arm: &str, size: (usize, usize), flops: f64, rows_s: Option<f64>, p50_ms: f64| {
        json!({
            "arm": arm,
            "dense_parameters": size.0,
            "sparse_parameters": size.1,
            "flops_per_candidate": flops.round(),
            "training_rows_s": rows_s,
            "latency_p50_ms": p50_ms,
            "share_of_one_stage_pct": 100.0 * flops / fm_flops,
        })
    };
    let fm = (pass.fm_size.serving, pass.fm_size.sparse);
    let one_stage = (pass.one_stage_size.serving, pass.one_stage_size.sparse);
    let expert = (graph.parameter_count() - tables, tables);
    let expert_s = trained.trained_rows as f64 / trained.seconds;
    let both = (fm.0 + expert.0, fm.1 + expert.1);
    let [one_stage_s, fm_s] = [&pass.one_stage, &pass.fm].map(|pace| Some(pace.rows_s()));
    vec![
        model("one-stage", one_stage, fm_flops, one_stage_s, latency.one_stage_ms),
        model("FM", fm, fm_flops, fm_s, latency.fm_ms),
        model("expert with TAE", expert, expert_flops, Some(expert_s), latency.expert_ms),
        model("FM + expert", both, fm_flops + expert_flops, None, latency.both_ms),
    ]
}

fn table(models: &[Value]) -> String {
    let columns = [
        ("dense par.", "dense_parameters", 0),
        ("sparse par.", "sparse_parameters", 0),
        ("FLOPs/candidate", "flops_per_candidate", 0),
        ("training rows/s", "training_rows_s", 0),
        ("p50 ms", "latency_p50_ms", 3),
        ("% of one-stage", "share_of_one_stage_pct", 1),
    ];
    let mut table = TextTable::new(1, ["model"].into_iter().chain(columns.map(|column| column.0)));
    for model in models {
        let name = model["arm"].as_str().unwrap_or_default().to_owned();
        let numbers = columns.map(|(_, key, digits)| {
            model[key].as_f64().map_or("-".into(), |value| format!("{value:.digits$}"))
        });
        table.line([name].into_iter().chain(numbers));
    }
    format!("\n{table}")
}
