//! FM and expert against a one-stage model: what each costs, and how good it is.
//!
//! The one-stage model of a surface is the FM's own architecture, trained end to
//! end on that surface's requests alone, its heads serving. The expert pays only
//! for itself: the FM's TAE is computed once for all experts of a candidate.

use std::time::Instant;

use hypercast_fm::{
    cost::{Size, Tokens, flops},
    example::Example,
    spec::FmSpec,
    trainer::{self, FmTrainer, StepOutput},
};
use serde_json::{Value, json};

use super::{
    Ground, Outcome, checkpoint_dir,
    field::{Arm, Trained},
    latency::{Latency, Models, REQUESTS, measure},
    report::{Pair, arms_by_task},
    store_dir,
    tally::Tally,
    transfer::Heads,
};
use crate::demo::Seconds;
use crate::error::Result;
use crate::evaluate::stream::Part;
use hypercast_config::Config;
use hypercast_data::logs::LogReader;
use hypercast_train::fm::{FIRST_VERSION, dataset_spec};

const ARMS: [&str; 3] = ["one-stage", "expert without TAE", "expert with TAE"];

/// What a pass of two FMs measured.
#[derive(Default)]
struct Pass {
    fm: Pace,
    one_stage: Pace,
    fm_size: Size,
    one_stage_size: Size,
    /// Requests of the surface's test, and their tokens in sum.
    requests: u64,
    history: u64,
    targets: u64,
    /// Requests to time.
    kept: Vec<Example>,
}

/// Rows learned, and how long that took.
#[derive(Default)]
struct Pace {
    rows: u64,
    seconds: f64,
}

impl Pace {
    fn rows_s(&self) -> f64 {
        self.rows as f64 / self.seconds
    }
}

/// Runs it for every seed; what the models cost is that of the last.
pub fn run(ground: &Ground<'_>, seconds: &mut Seconds) -> Result<Outcome> {
    let surface = ground.surface()?;
    let spec = dataset_spec(ground.dataset)?;
    let (mut tallies, mut last) = (Vec::new(), None);
    for &seed in &ground.options.seeds {
        let config = ground.seeded(seed);
        let mut tally = ground.tally(&ARMS);
        let pass = seconds.time("fm", || embed(ground, &config, &spec, surface, &mut tally))?;
        let log = LogReader::open(&config.paths.logs)?;
        let field = ground.field(&config, &log);
        let arm =
            |index| Arm { index, embedding: 0..config.fm.tae_width(), without_tae: index == 1 };
        seconds.time("experts", || field.run(&arm(1), &[surface], &mut tally).map(drop))?;
        let trained = seconds.time("experts", || field.run(&arm(2), &[surface], &mut tally))?;
        last = Some((pass, trained));
        tallies.push(tally);
    }
    let (pass, trained) = last.expect("at least one seed");
    let models = Models {
        one_stage: &checkpoint_dir(&ground.options.setup.work, "one-stage"),
        fm: &checkpoint_dir(&ground.options.setup.work, "fm"),
        blueprint: trained.blueprint.clone(),
        parameters: trained.stream.parameters().clone(),
        device: ground.config.device,
    };
    let latency = seconds.time("latency", || measure(models, &pass.kept))?;
    let costs = costs(ground, &spec, &pass, &trained, latency);
    let found = ground.found(&tallies);
    let pairs = [0, 1, 2].map(|arm| Pair { baseline: 0, arm });
    let mut rows = Vec::new();
    for cell in found.cells()?.into_iter().filter(|cell| cell.slice.0 == usize::from(surface)) {
        rows.extend(seconds.time("bootstrap", || Ok(found.rows(&cell, &pairs)))?);
    }
    let name = &ground.dataset.schema.surfaces[usize::from(surface)];
    let table = arms_by_task(&rows, name) + &table(&costs);
    Ok(Outcome { name: "compute", rows, models: costs, table, chosen: json!({ "surface": name }) })
}

/// The FM over every surface, and the one-stage model over its own, in one stream.
fn embed(
    ground: &Ground<'_>,
    config: &Config,
    spec: &FmSpec,
    surface: u16,
    tally: &mut Tally,
) -> Result<Pass> {
    let create = |name: &str| -> Result<Box<dyn FmTrainer>> {
        let dir = store_dir(config, name)?;
        Ok(trainer::create(&dir, &config.fm, spec, config.device)?)
    };
    let (mut fm, mut one_stage) = (create("fm")?, create("one-stage")?);
    let mut log = ground.log(config, config.fm.tae_width())?;
    let stream = ground.stream(config, config.fm.max_history);
    let skip = stream.skip()?;
    let heads = Heads::new(spec, ground);
    let mut pass = Pass::default();
    stream.run("FM and one-stage model", |part| {
        let said = pass.fm.through(&part, fm.as_mut())?;
        if part.history_only {
            return Ok(());
        }
        if part.seen >= skip {
            let own = |example: &Example| example.surface == surface;
            log.write_batch(part.examples, &said.tae, own)?;
        }
        let own: Vec<Example> =
            part.examples.iter().filter(|example| example.surface == surface).cloned().collect();
        let own = Part { examples: &own, ..part };
        let said = pass.one_stage.through(&own, one_stage.as_mut())?;
        heads.tally(&own, 0, &said.predictions, tally);
        for example in own.examples.iter().filter(|e| e.time_ms >= ground.window.test_from_ms) {
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
    fm.checkpoint(&checkpoint_dir(&ground.options.setup.work, "fm"), FIRST_VERSION)?;
    one_stage
        .checkpoint(&checkpoint_dir(&ground.options.setup.work, "one-stage"), FIRST_VERSION)?;
    Ok(pass)
}

impl Pace {
    /// Takes a part through a trainer and the time.
    fn through(&mut self, part: &Part<'_>, trainer: &mut dyn FmTrainer) -> Result<StepOutput> {
        let start = Instant::now();
        let said = part.through(trainer, &|_| true)?;
        if part.teaches {
            self.seconds += start.elapsed().as_secs_f64();
            self.rows +=
                part.examples.iter().map(|example| example.targets.len() as u64).sum::<u64>();
        }
        Ok(said)
    }
}

/// One object a model.
fn costs(
    ground: &Ground<'_>,
    spec: &FmSpec,
    pass: &Pass,
    trained: &Trained,
    latency: Latency,
) -> Vec<Value> {
    let requests = pass.requests.max(1) as f64;
    let (history, targets) =
        (pass.history as f64 / requests, (pass.targets as f64 / requests).max(1.0));
    let tokens = Tokens { history: history.round() as usize, targets: targets.round() as usize };
    let of_request = flops(&ground.config.fm, spec, tokens);
    let fm_flops = of_request / tokens.targets as f64;
    let graph = &trained.blueprint.graph;
    let short = f64::from(trained.blueprint.description.history_len);
    let expert_flops = graph.cost.per_row as f64 + graph.cost.per_history as f64 * short / targets;
    let tables: usize =
        graph.parameters.iter().filter(|spec| spec.table).map(|spec| spec.len()).sum();
    let passes = ground.config.expert_training.epochs as f64;
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
