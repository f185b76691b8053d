//! Table 2: how much of a larger FM's gain reaches its experts.
//!
//! Two FMs follow one stream. As in section 4.3, two experts of one architecture start from an
//! expert that was trained on the smaller FM, without the layers that read the FM's embedding. Then
//! they learn the same rows, with different FMs. Two others do the same and begin at their FM's own
//! predictions: what reaches them is not the embedding's merit alone.

use std::ops::Range;

use hypercast_config::Config;
use hypercast_core::text_table::TextTable;
use hypercast_data::{dataset::timeline::Span, schema::TaskRole};
use hypercast_fm::spec::{FmConfig, TaskSpec};
use hypercast_train::fm::dataset_spec;
use serde_json::{Value, json};

use super::{
    ExperimentContext, ExperimentReport, ExperimentRow,
    report::{ArmPair, SliceTotals, with_interval},
    runner::{ArmRunner, ExperimentArm, add_target},
};
use crate::{
    bootstrap::intervals,
    error::Result,
    evaluate::stream::{StreamBatch, targets},
    tally::{ScoreTally, ScoreTotals},
};

pub(super) const ARMS: [&str; 6] = [
    "FM small",
    "FM large",
    "expert small",
    "expert large",
    "expert small+logits",
    "expert large+logits",
];

/// The pairs that are compared: FMs with each other, and their experts with each other.
const FM: ArmPair = ArmPair { baseline: 0, arm: 1 };
const EXPERT: ArmPair = ArmPair { baseline: 2, arm: 3 };
const EXPERT_WITH_LOGITS: ArmPair = ArmPair { baseline: 4, arm: 5 };
const EXPERTS: [ArmPair; 2] = [EXPERT, EXPERT_WITH_LOGITS];

/// The share of the past on which the common starting point is trained.
const WARM_SHARE: f64 = 0.5;

/// Positives that a row of the printed table needs. The JSON has every row.
const SHOWN: f64 = 100.0;

/// Runs it for every seed.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    let tallies = context.tallies(&ARMS, |config, tally| {
        context.times.time("fm", || embed(context, config, tally))?;
        let runners = [context.runner(config, 0)?, context.runner(config, 1)?];
        context.times.time("experts", || {
            experts(&runners, EXPERT, tally)?;
            experts(&runners, EXPERT_WITH_LOGITS, tally)
        })
    })?;
    let (mut rows, mut table) = (Vec::new(), empty_table());
    for cell in SliceTotals::all(&tallies)? {
        let pairs = [FM, EXPERT, EXPERT_WITH_LOGITS].map(|pair| {
            let ArmPair { baseline, .. } = pair;
            [ArmPair { baseline, arm: baseline }, pair]
        });
        let pairs = pairs.concat();
        let mut of_cell = context.rows_of(&cell, &pairs);
        add_ratios(context, &cell, &mut of_cell);
        if cell.totals.positives >= SHOWN
            && let Some(line) = line(&of_cell)
        {
            table.line(line);
        }
        rows.extend(of_cell);
    }
    let chosen = json!({ "fm_small": smaller(&context.config.fm), "warm_share": WARM_SHARE });
    Ok(context.report(table.to_string(), rows, Vec::new(), chosen))
}

/// Runs both FMs over one stream, logs what they answer, and tallies their heads' predictions.
fn embed(context: &ExperimentContext<'_>, config: &Config, tally: &mut ScoreTally) -> Result<()> {
    let spec = dataset_spec(context.dataset)?;
    let mut small = context.fm(config, "small", &smaller(&config.fm), &spec)?;
    let mut large = context.fm(config, "large", &config.fm, &spec)?;
    let width = config.fm.tae_width();
    let heads = FmHeads::new(&spec.tasks, context);
    let stream = context.stream(config, config.fm.max_history);
    stream.log("two FMs", &[width, width], None, |part, _| {
        let small = part.through(small.as_mut(), &|_| true)?;
        let large = part.through(large.as_mut(), &|_| true)?;
        if !part.history_only {
            heads.tally(part, 0, &small.predictions, tally);
            heads.tally(part, 1, &large.predictions, tally);
        }
        Ok([small, large].map(|output| output.served(&spec)).into())
    })
}

/// The smaller FM: a quarter of the width, one layer, an eighth of the history, and a TAE as wide
/// as the larger's. With half the width and half the layers the two differed by 0.001 in NE on
/// MovieLens, too little to measure a transfer.
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
pub(super) struct FmHeads {
    /// Pairs of a task's index in the schema and among the heads.
    places: Vec<(usize, usize)>,
    heads: usize,
}

impl FmHeads {
    /// The heads of some tasks of the FM that have the schema's names.
    pub(super) fn new(heads: &[TaskSpec], context: &ExperimentContext<'_>) -> Self {
        let schema = &context.dataset.schema;
        let place = |task: usize| {
            let name = &schema.tasks[task].name;
            heads.iter().position(|own| own.name == *name).map(|place| (task, place))
        };
        Self { places: context.labels.tasks().filter_map(place).collect(), heads: heads.len() }
    }

    /// Tallies predictions, `[rows, heads]`, as an arm's.
    pub(super) fn tally(
        &self,
        part: &StreamBatch<'_>,
        arm: usize,
        predictions: &[f32],
        tally: &mut ScoreTally,
    ) {
        for (target, row) in targets(part.examples).zip(predictions.chunks_exact(self.heads)) {
            for &(task, place) in &self.places {
                add_target(tally, arm, target, task, row[place]);
            }
        }
    }
}

/// Trains and measures the experts of a pair, with the logs of the smaller and the larger FM.
fn experts(runners: &[ArmRunner<'_>; 2], pair: ArmPair, tally: &mut ScoreTally) -> Result<()> {
    let [small, large] = runners;
    let surfaces = small.surfaces();
    let test_from_ms = small.context.window.test_from_ms;
    let middle_ms = middle(small)?;
    let arm = |index| ExperimentArm {
        index,
        embedding: 0..small.log.tae_dim,
        without_tae: false,
        with_fm_logits: pair.arm == EXPERT_WITH_LOGITS.arm,
    };
    let early = Span { from_ms: None, until_ms: Some(middle_ms) };
    let first = small.train(&arm(pair.baseline), &surfaces, early, None)?;
    let late = Span { from_ms: Some(middle_ms), until_ms: Some(test_from_ms) };
    for (runner, arm) in [(small, arm(pair.baseline)), (large, arm(pair.arm))] {
        let warm = Some(first.stream.trainer.parameters());
        let mut trained = runner.train(&arm, &surfaces, late, warm)?;
        runner.measure(&mut trained, &arm, &surfaces, tally)?;
    }
    Ok(())
}

/// The time by which `WARM_SHARE` of the logged rows before the test were shown.
fn middle(runner: &ArmRunner<'_>) -> Result<i64> {
    let mut times = Vec::new();
    for logged in runner.log.iter() {
        let example = logged?.example;
        if example.time_ms < runner.context.window.test_from_ms {
            times.extend(std::iter::repeat_n(example.time_ms, example.targets.len()));
        }
    }
    let at = (times.len() as f64 * WARM_SHARE) as usize;
    Ok(times.get(at).copied().unwrap_or(runner.context.window.test_from_ms))
}

/// Eq. 6 over some seeds together; on the same rows the entropy of the base rate cancels.
fn ratio(totals: &ScoreTotals, expert: ArmPair, seeds: Range<usize>) -> f64 {
    let gain = |pair: ArmPair| {
        let of_seed = |arms: &Vec<f64>| arms[pair.baseline] - arms[pair.arm];
        totals.nats[seeds.clone()].iter().map(of_seed).sum::<f64>()
    };
    gain(expert) / gain(FM)
}

/// Adds the kind of task to every row, and the transfer ratio to those of the larger FM's experts.
fn add_ratios(context: &ExperimentContext<'_>, cell: &SliceTotals, rows: &mut [ExperimentRow]) {
    let ExperimentContext { options, dataset, .. } = context;
    let seeds = options.seeds.0.len();
    let bounds = intervals(&cell.dense, options.replicates, |totals| {
        let ratios = EXPERTS.map(|expert| ratio(totals, expert, 0..seeds));
        [&[totals.mean_ne_diff_pct(FM.arm, FM.baseline)][..], &ratios].concat()
    });
    let clear = bounds[0][1] < 0.0 || bounds[0][0] > 0.0;
    let kind = match dataset.schema.tasks[cell.slice.task].role {
        TaskRole::Main => "main",
        TaskRole::Auxiliary => "aux",
    };
    let finite = |value: f64| value.is_finite().then_some(value);
    for row in rows {
        row.more.insert("task_type", kind.into());
        let Some(place) = EXPERTS.iter().position(|expert| row.arm == ARMS[expert.arm]) else {
            continue;
        };
        let own = options.seeds.0.iter().position(|known| row.seed == *known);
        let of_seeds = own.map_or(0..seeds, |at| at..at + 1);
        let own_ratio = ratio(&cell.totals, EXPERTS[place], of_seeds);
        row.more.insert("transfer_ratio", finite(own_ratio).into());
        if own.is_none() {
            row.more.insert("transfer_ratio_ci95", json!(bounds[1 + place].map(finite)));
            row.more.insert("fm_gain_outside_interval", clear.into());
        }
    }
}

fn empty_table() -> TextTable {
    let metrics = [
        "FM NE diff (%)",
        "expert NE diff (%)",
        "transfer ratio",
        "with logits NE diff (%)",
        "with logits ratio",
    ];
    TextTable::new(3, ["surface", "type", "task"].into_iter().chain(metrics))
}

/// A line of table 2. A ratio is in brackets if the interval of the FM's gain contains 0.
fn line(rows: &[ExperimentRow]) -> Option<Vec<String>> {
    let mean = |arm: &str| rows.iter().find(|row| row.arm == arm && row.seed == "mean");
    let cell =
        |arm: &str| mean(arm).map_or("-".into(), |row| with_interval(row.ne_diff_pct, row.ci95));
    let number = |value: &Value| value.as_f64().map_or("-".into(), |value| format!("{value:.2}"));
    let ratio = |expert: &ExperimentRow| {
        let bounds = &expert.more["transfer_ratio_ci95"];
        let own = number(&expert.more["transfer_ratio"]);
        let text = format!("{own} [{}, {}]", number(&bounds[0]), number(&bounds[1]));
        let is_clear = expert.more["fm_gain_outside_interval"] == true;
        if is_clear { text } else { format!("({text})") }
    };
    let first = mean(ARMS[EXPERT.arm])?;
    let kind = first.more["task_type"].as_str().unwrap_or_default();
    let mut line: Vec<String> = [&first.surface, kind, &first.task].map(String::from).into();
    line.push(cell(ARMS[FM.arm]));
    for expert in EXPERTS.map(|expert| ARMS[expert.arm]) {
        line.extend([cell(expert), ratio(mean(expert)?)]);
    }
    Some(line)
}
