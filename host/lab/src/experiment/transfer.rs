//! Table 2: how much of a larger FM's gain reaches its experts.
//!
//! Two FMs follow one stream. As in section 4.3, two architecturally identical
//! experts start from one that was trained on the smaller FM, but for the layers
//! that face the FM, and then learn the same rows; only the FM differs.

use std::ops::Range;

use hypercast_fm::{
    spec::{FmConfig, FmSpec},
    trainer,
    trainer::FmTrainer,
};
use serde_json::{Value, json};

use super::{
    Ground, Outcome, Row, Seed,
    bootstrap::intervals,
    field::{Arm, Field},
    report::{Cell, Found, Pair, with_interval},
    store_dir,
    tally::{Tally, Totals},
    targets,
};
use crate::demo::Seconds;
use crate::error::Result;
use crate::evaluate::stream::Part;
use hypercast_config::Config;
use hypercast_data::dataset::timeline::Span;
use hypercast_data::logs::LogReader;
use hypercast_data::schema::TaskRole;
use hypercast_train::fm::dataset_spec;

const ARMS: [&str; 4] = ["FM small", "FM large", "expert small", "expert large"];

/// The pairs that are compared: FMs with each other, and their experts with each other.
const FM: Pair = Pair { baseline: 0, arm: 1 };
const EXPERT: Pair = Pair { baseline: 2, arm: 3 };

/// The share of the past that the expert which both start from learns.
const WARM_SHARE: f64 = 0.5;

/// Positives that a row of the printed table needs; the JSON has every row.
const SHOWN: f64 = 100.0;

/// Runs it for every seed.
pub fn run(ground: &Ground<'_>, seconds: &mut Seconds) -> Result<Outcome> {
    let mut tallies = Vec::new();
    for &seed in &ground.options.seeds {
        let config = ground.seeded(seed);
        let mut tally = ground.tally(&ARMS);
        seconds.time("fm", || embed(ground, &config, &mut tally))?;
        let log = LogReader::open(&config.paths.logs)?;
        let field = ground.field(&config, &log);
        seconds.time("experts", || experts(&field, &mut tally))?;
        tallies.push(tally);
    }
    let found = ground.found(&tallies);
    let (mut rows, mut table) = (Vec::new(), head());
    for cell in found.cells()? {
        let every = [0, 2].map(|arm| Pair { baseline: arm, arm });
        let pairs = [every[0], FM, every[1], EXPERT];
        let mut of_cell = seconds.time("bootstrap", || Ok(found.rows(&cell, &pairs)))?;
        add_ratios(&found, &cell, &mut of_cell);
        if cell.totals.positives >= SHOWN {
            table += &line(&of_cell);
        }
        rows.extend(of_cell);
    }
    let chosen = json!({ "fm_small": smaller(&ground.config.fm), "warm_share": WARM_SHARE });
    Ok(Outcome { name: "transfer", rows, models: Vec::new(), table, chosen })
}

/// Both FMs over one stream; logs their TAEs, joined, and tallies what their heads say.
fn embed(ground: &Ground<'_>, config: &Config, tally: &mut Tally) -> Result<()> {
    let spec = dataset_spec(ground.dataset)?;
    let sizes = [("small", smaller(&config.fm)), ("large", config.fm.clone())];
    let mut fms: Vec<Box<dyn FmTrainer>> = Vec::new();
    for (name, fm) in &sizes {
        let dir = store_dir(config, name)?;
        fms.push(trainer::create(&dir, fm, &spec, config.device)?);
    }
    let width = config.fm.tae_width();
    let mut log = ground.log(config, 2 * width)?;
    let stream = ground.stream(config, config.fm.max_history);
    let skip = stream.skip()?;
    let heads = Heads::new(&spec, ground);
    stream.run("two FMs", |part| {
        let small = part.through(fms[0].as_mut(), &|_| true)?;
        let large = part.through(fms[1].as_mut(), &|_| true)?;
        if part.history_only {
            return Ok(());
        }
        heads.tally(&part, 0, &small.predictions, tally);
        heads.tally(&part, 1, &large.predictions, tally);
        if part.seen < skip {
            return Ok(());
        }
        let pairs = small.tae.chunks_exact(width).zip(large.tae.chunks_exact(width));
        let joined: Vec<f32> = pairs.flat_map(|(a, b)| [a, b].concat()).collect();
        log.write_batch(part.examples, &joined, |_| true)?;
        Ok(())
    })?;
    Ok(log.finish()?)
}

/// A quarter of the width, one layer, an eighth of the history: the smaller FM, whose TAE is as wide as the larger's.
/// With half the width and half the layers, the two differed by a thousandth in NE on MovieLens, too little to see a part of it transfer.
fn smaller(config: &FmConfig) -> FmConfig {
    let part = |size: usize, of: usize| (size / of).max(1);
    FmConfig {
        dim: part(config.dim, 4),
        layers: 1,
        qk_dim: part(config.qk_dim, 4),
        v_dim: part(config.v_dim, 4),
        embedding_dim: part(config.embedding_dim, 4),
        max_history: part(config.max_history, 8),
        tae_dim: config.tae_width(),
        ..config.clone()
    }
}

/// An FM's heads as tasks of the schema.
pub(super) struct Heads {
    /// Each task of the schema among the FM's.
    places: Vec<(usize, usize)>,
    tasks: usize,
}

impl Heads {
    /// Of the tasks that have the schema's names.
    pub(super) fn new(spec: &FmSpec, ground: &Ground<'_>) -> Self {
        let schema = &ground.dataset.schema;
        let place = |task: usize| {
            let name = &schema.tasks[task].name;
            spec.tasks.iter().position(|own| own.name == *name).map(|place| (task, place))
        };
        Self { places: ground.labels.tasks().filter_map(place).collect(), tasks: spec.tasks.len() }
    }

    /// Tallies `[rows, tasks]` as an arm.
    pub(super) fn tally(&self, part: &Part<'_>, arm: usize, said: &[f32], tally: &mut Tally) {
        for (target, said) in targets(part).zip(said.chunks_exact(self.tasks)) {
            for &(task, place) in &self.places {
                tally.push(arm, target, task, said[place]);
            }
        }
    }
}

fn experts(field: &Field<'_>, tally: &mut Tally) -> Result<()> {
    let surfaces = field.surfaces();
    let width = field.log.tae_dim / 2;
    let middle_ms = middle(field)?;
    let small = Arm { index: 2, embedding: 0..width, without_tae: false };
    let large = Arm { index: 3, embedding: width..2 * width, without_tae: false };
    let early = field.view(&surfaces, &small, Span { from_ms: None, until_ms: Some(middle_ms) });
    let first = field.train(&early, &small, None)?;
    let late = Span { from_ms: Some(middle_ms), until_ms: Some(field.window.test_from_ms) };
    for arm in [small, large] {
        let view = field.view(&surfaces, &arm, late);
        let mut trained = field.train(&view, &arm, Some(first.stream.parameters()))?;
        field.measure(&mut trained, &arm, &surfaces, tally)?;
    }
    Ok(())
}

/// The time by which `WARM_SHARE` of the logged rows before the test were shown.
fn middle(field: &Field<'_>) -> Result<i64> {
    let mut times = Vec::new();
    for logged in field.log.iter() {
        let example = logged?.example;
        if example.time_ms < field.window.test_from_ms {
            times.extend(std::iter::repeat_n(example.time_ms, example.targets.len()));
        }
    }
    let at = (times.len() as f64 * WARM_SHARE) as usize;
    Ok(times.get(at).copied().unwrap_or(field.window.test_from_ms))
}

/// Eq. 6 over some seeds together; on the same rows the entropy of the base rate cancels.
fn ratio(totals: &Totals, seeds: Range<usize>) -> f64 {
    let gain = |pair: Pair| {
        let of_seed = |arms: &Vec<f64>| arms[pair.baseline] - arms[pair.arm];
        totals.nats[seeds.clone()].iter().map(of_seed).sum::<f64>()
    };
    gain(EXPERT) / gain(FM)
}

/// Tells every row its kind of task, and those of the larger FM's expert what was transferred.
fn add_ratios(found: &Found<'_>, cell: &Cell, rows: &mut [Row]) {
    let seeds = found.seeds.len();
    let bounds = intervals(&cell.dense, found.replicates, |totals| {
        vec![totals.mean_ne_diff_pct(FM.arm, FM.baseline), ratio(totals, 0..seeds)]
    });
    let clear = bounds[0][1] < 0.0 || bounds[0][0] > 0.0;
    let kind = match found.schema.tasks[cell.slice.1].role {
        TaskRole::Main => "main",
        TaskRole::Auxiliary => "aux",
    };
    let finite = |value: f64| value.is_finite().then_some(value);
    for row in rows {
        row.more.insert("task_type", kind.into());
        if row.arm != ARMS[EXPERT.arm] {
            continue;
        }
        let own = match row.seed {
            Seed::One(seed) => found.seeds.iter().position(|known| *known == seed),
            Seed::Mean(_) => None,
        };
        let own_ratio = ratio(&cell.totals, own.map_or(0..seeds, |at| at..at + 1));
        row.more.insert("transfer_ratio", finite(own_ratio).into());
        if own.is_none() {
            row.more.insert("transfer_ratio_ci95", json!(bounds[1].map(finite)));
            row.more.insert("fm_gain_outside_interval", clear.into());
        }
    }
}

fn head() -> String {
    format!(
        "{:<12} {:<5} {:<17} {:>22} {:>22} {:>24}\n",
        "surface", "type", "task", "FM NE diff (%)", "expert NE diff (%)", "transfer ratio"
    )
}

/// A line of table 2; a ratio whose FM gain is not clear of its interval is in brackets.
fn line(rows: &[Row]) -> String {
    let mean =
        |arm: &str| rows.iter().find(|row| row.arm == arm && matches!(row.seed, Seed::Mean(_)));
    let cell =
        |arm: &str| mean(arm).map_or("-".into(), |row| with_interval(row.ne_diff_pct, row.ci95));
    let Some(expert) = mean(ARMS[EXPERT.arm]) else { return String::new() };
    let number = |value: &Value| value.as_f64().map_or("-".into(), |value| format!("{value:.2}"));
    let bounds = &expert.more["transfer_ratio_ci95"];
    let text = format!(
        "{} [{}, {}]",
        number(&expert.more["transfer_ratio"]),
        number(&bounds[0]),
        number(&bounds[1])
    );
    let text = match expert.more["fm_gain_outside_interval"] == true {
        true => text,
        false => format!("({text})"),
    };
    format!(
        "{:<12} {:<5} {:<17} {:>22} {:>22} {text:>24}\n",
        expert.surface,
        expert.more["task_type"].as_str().unwrap_or_default(),
        expert.task,
        cell(ARMS[FM.arm]),
        cell(ARMS[EXPERT.arm])
    )
}
