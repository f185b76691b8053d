//! FM and expert against a one-stage model: cost and quality.
//!
//! The one-stage model of a surface has the FM's architecture, is trained end to end on only that
//! surface's requests, and serves with its own heads. The expert's cost is its own: a candidate's
//! TAE is computed once for all experts.

use std::time::Instant;

use hypercast_config::Config;
use hypercast_data::logs::LogReader;
use hypercast_fm::{
    cost::{ModelSize, TokenCounts, flops},
    example::Example,
    spec::FmSpec,
    trainer::{self, FmTrainer, StepOutput},
};
use hypercast_train::fm::{FIRST_VERSION, dataset_spec};
use serde_json::{Value, json};

use super::{
    ExperimentContext, ExperimentOutcome, checkpoint_dir,
    latency::{ModelLatency, REQUESTS, TimedModels, measure},
    report::{ArmPair, arms_by_task},
    runner::{ExperimentArm, TrainedArm},
    store_dir,
    tally::ScoreTally,
    transfer::FmHeads,
};
use crate::{demo::StepTimes, error::Result, evaluate::stream::StreamBatch};

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
pub fn run(context: &ExperimentContext<'_>, times: &mut StepTimes) -> Result<ExperimentOutcome> {
    let surface = context.surface()?;
    let spec = dataset_spec(context.dataset)?;
    let (mut tallies, mut last) = (Vec::new(), None);
    for &seed in &context.options.seeds.0 {
        let config = context.seeded(seed);
        let mut tally = context.tally(&ARMS);
        let pass = times.time("fm", || embed(context, &config, &spec, surface, &mut tally))?;
        let log = LogReader::open(&config.paths.logs)?;
        let runner = context.runner(&config, &log);
        let arm = |index| ExperimentArm {
            index,
            embedding: 0..config.fm.tae_width(),
            without_tae: index == 1,
        };
        times.time("experts", || runner.run(&arm(1), &[surface], &mut tally).map(drop))?;
        let trained = times.time("experts", || runner.run(&arm(2), &[surface], &mut tally))?;
        last = Some((pass, trained));
        tallies.push(tally);
    }
    let (pass, trained) = last.expect("at least one seed");
    let models = TimedModels {
        one_stage: &checkpoint_dir(context.options.setup.work(), "one-stage"),
        fm: &checkpoint_dir(context.options.setup.work(), "fm"),
        blueprint: trained.blueprint.clone(),
        parameters: trained.stream.trainer.parameters().clone(),
        device: context.config.device,
    };
    let latency = times.time("latency", || measure(models, &pass.kept))?;
    let costs = costs(context, &spec, &pass, &trained, latency);
    let pairs = [0, 1, 2].map(|arm| ArmPair { baseline: 0, arm });
    let rows = context.rows(&tallies, &pairs, Some(surface), times)?;
    let name = &context.dataset.schema.surfaces[usize::from(surface)];
    let table = arms_by_task(&rows, name) + &table(&costs);
    Ok(ExperimentOutcome {
        name: "compute",
        rows,
        models: costs,
        table,
        chosen: json!({ "surface": name }),
    })
}

/// Runs the FM over all surfaces and the one-stage model over its own, in one stream.
fn embed(
    context: &ExperimentContext<'_>,
    config: &Config,
    spec: &FmSpec,
    surface: u16,
    tally: &mut ScoreTally,
) -> Result<FmPasses> {
    let create = |name: &str| -> Result<Box<dyn FmTrainer>> {
        let dir = store_dir(config, name)?;
        Ok(trainer::create(&dir, &config.fm, spec, config.device)?)
    };
    let (mut fm, mut one_stage) = (create("fm")?, create("one-stage")?);
    let mut log = context.log(config, config.fm.tae_width())?;
    let stream = context.stream(config, config.fm.max_history);
    let skip = stream.skip()?;
    let heads = FmHeads::new(spec, context);
    let mut pass = FmPasses::default();
    stream.run("FM and one-stage model", |part| {
        let output = pass.fm.through(&part, fm.as_mut())?;
        if part.history_only {
            return Ok(());
        }
        if part.seen >= skip {
            let own = |example: &Example| example.surface == surface;
            log.write_batch(part.examples, &output.tae, own)?;
        }
        let own: Vec<Example> =
            part.examples.iter().filter(|example| example.surface == surface).cloned().collect();
        let own = StreamBatch { examples: &own, ..part };
        let output = pass.one_stage.through(&own, one_stage.as_mut())?;
        heads.tally(&own, 0, &output.predictions, tally);
        for example in own.examples.iter().filter(|e| e.time_ms >= context.window.test_from_ms) {
            pass.requests += 1;
            pass.history += example.history.len() as u64;
            pass.targets += example.targets.len() as u64;
            if pass.kept.len() < REQUESTS {
                pass.kept.push(example.clone());
            }
        }
        Ok(())
    })?;
    log.finish()?;
    (pass.fm_size, pass.one_stage_size) = (fm.size(), one_stage.size());
    fm.checkpoint(&checkpoint_dir(context.options.setup.work(), "fm"), FIRST_VERSION)?;
    one_stage
        .checkpoint(&checkpoint_dir(context.options.setup.work(), "one-stage"), FIRST_VERSION)?;
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
            self.rows +=
                part.examples.iter().map(|example| example.targets.len() as u64).sum::<u64>();
        }
        Ok(output)
    }
}

/// A JSON object per model.
fn costs(
    context: &ExperimentContext<'_>,
    spec: &FmSpec,
    pass: &FmPasses,
    trained: &TrainedArm,
    latency: ModelLatency,
) -> Vec<Value> {
    let requests = pass.requests.max(1) as f64;
    let (history, targets) =
        (pass.history as f64 / requests, (pass.targets as f64 / requests).max(1.0));
    let tokens =
        TokenCounts { history: history.round() as usize, targets: targets.round() as usize };
    let of_request = flops(&context.config.fm, spec, tokens);
    let fm_flops = of_request / tokens.targets as f64;
    let graph = &trained.blueprint.graph;
    let short = f64::from(trained.blueprint.description.history_len);
    let expert_flops = graph.cost.per_row as f64 + graph.cost.per_history as f64 * short / targets;
    let tables: usize =
        graph.parameters.iter().filter(|spec| spec.table).map(|spec| spec.len()).sum();
    let passes = context.config.expert_training.epochs as f64;
    let model = |arm: &str, size: (usize, usize), flops: f64, rows_s: f64, p50_ms: f64| {
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
    let expert_s = trained.rows as f64 * passes / trained.seconds;
    vec![
        model("one-stage", one_stage, fm_flops, pass.one_stage.rows_s(), latency.one_stage_ms),
        model("FM", fm, fm_flops, pass.fm.rows_s(), latency.fm_ms),
        model("expert with TAE", expert, expert_flops, expert_s, latency.expert_ms),
        json!({
            "arm": "FM + expert",
            "dense_parameters": fm.0 + expert.0,
            "sparse_parameters": fm.1 + expert.1,
            "flops_per_candidate": (fm_flops + expert_flops).round(),
            "training_rows_s": null,
            "latency_p50_ms": latency.both_ms,
            "share_of_one_stage_pct": 100.0 * (fm_flops + expert_flops) / fm_flops,
        }),
    ]
}

fn table(models: &[Value]) -> String {
    let mut text = format!(
        "\n{:<18} {:>12} {:>12} {:>16} {:>14} {:>12} {:>16}\n",
        "model",
        "dense par.",
        "sparse par.",
        "FLOPs/candidate",
        "training rows/s",
        "p50 ms",
        "% of one-stage"
    );
    for model in models {
        let number = |key: &str, digits: usize| {
            model[key].as_f64().map_or("-".into(), |value| format!("{value:.digits$}"))
        };
        text += &format!(
            "{:<18} {:>12} {:>12} {:>16} {:>14} {:>12} {:>16}\n",
            model["arm"].as_str().unwrap_or_default(),
            number("dense_parameters", 0),
            number("sparse_parameters", 0),
            number("flops_per_candidate", 0),
            number("training_rows_s", 0),
            number("latency_p50_ms", 3),
            number("share_of_one_stage_pct", 1)
        );
    }
    text
}
