//! Table 2: how much of a larger FM's gain reaches its experts.
//!
//! Two FMs follow one stream. As in section 4.3, two experts of one architecture start from an
//! expert that was trained on the smaller FM, without the layers that read the FM's embedding. Then
//! they learn the same rows, with different FMs. Two others do the same and begin at their FM's own
//! predictions: what reaches them is not the embedding's merit alone.
//!
//! With a student, two pairs more learn by distillation (Hinton et al., 2015): the FM's predictions
//! are soft labels beside the true ones, which is all that the first pair has of an FM, as in ExFM
//! (arXiv 2502.17494); the second has the embedding, too. The student must be the expert's network,
//! which nothing checks; so the report names both components.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use hypercast_config::Config;
use hypercast_core::text_table::TextTable;
use hypercast_data::{dataset::timeline::Span, schema::TaskRole};
use hypercast_fm::spec::{FmConfig, TaskSpec};
use hypercast_train::{fm::dataset_spec, report::ALL};
use serde_json::{Value, json};

use super::{
    ExperimentContext, ExperimentOptions, ExperimentReport, ExperimentRow, component,
    mask::{InputMask, TaeMask},
    report::{ArmPair, SliceTotals, arms_by_task, with_interval},
    runner::{ArmRunner, ExperimentArm, add_target},
};
use crate::{
    bootstrap::intervals,
    error::{CommonErrors as _, Error, Result},
    evaluate::stream::{StreamBatch, targets},
    tally::{ScoreTally, ScoreTotals},
};

/// The arms before those of experts with an FM.
const FIRST_ARMS: [&str; 3] = ["FM small", "FM large", "expert without FM"];

/// The FMs, which are compared with each other.
const FM: ArmPair = ArmPair { baseline: 0, arm: 1 };

/// An expert to which nothing reaches from an FM.
const WITHOUT_FM: usize = 2;

/// The share of the past on which the common starting point is trained.
const WARM_SHARE: f64 = 0.5;

/// Positives that a row of the printed table needs. The JSON has every row.
const SHOWN: f64 = 100.0;

/// What reaches an expert from its FM.
struct TransferWay {
    /// Of the names of its arms, around the FM's size.
    names: [&'static str; 2],
    /// Of its columns in the printed table.
    heading: &'static str,
    /// The component of its experts.
    plugin: PathBuf,
    mask: InputMask,
    with_fm_logits: bool,
    /// The experts of the smaller and of the larger FM.
    pair: ArmPair,
}

/// All ways, in the order of their arms.
struct TransferWays(Vec<TransferWay>);

impl TransferWays {
    /// Those that the experts of an experiment have.
    fn new(context: &ExperimentContext<'_>) -> Result<Self> {
        let mut ways = Self(Vec::new());
        let expert = &context.plugin;
        ways.add(["expert", ""], "expert", expert, TaeMask::Nothing, false);
        if context.blueprint(expert)?.columns.reads_fm_logits() {
            ways.add(["expert", "+logits"], "with logits", expert, TaeMask::Nothing, true);
        }
        if let Some(name) = &context.options.student {
            let student = &component(context.options, name);
            if !context.blueprint(student)?.columns.reads_fm_logits() {
                return Err(Error::invalid(format!(
                    "--student {name}: it does not read the FM's predictions, so it learns nothing \
                     of them"
                )));
            }
            ways.add(["distilled", ""], "distilled", student, TaeMask::All, true);
            ways.add(["distilled", "+TAE"], "distilled+TAE", student, TaeMask::Nothing, true);
        }
        Ok(ways)
    }

    fn add(
        &mut self,
        names: [&'static str; 2],
        heading: &'static str,
        plugin: &Path,
        tae: TaeMask,
        with_fm_logits: bool,
    ) {
        let (plugin, mask) = (plugin.to_path_buf(), InputMask { tae, ..InputMask::default() });
        let first = FIRST_ARMS.len() + 2 * self.0.len();
        let pair = ArmPair { baseline: first, arm: first + 1 };
        self.0.push(TransferWay { names, heading, plugin, mask, with_fm_logits, pair });
    }

    fn arms(&self) -> Vec<String> {
        let of_way = |TransferWay { names: [first, last], .. }: &TransferWay| {
            ["small", "large"].map(|size| format!("{first} {size}{last}"))
        };
        let first = FIRST_ARMS.map(String::from).into_iter();
        first.chain(self.0.iter().flat_map(of_way)).collect()
    }

    /// The FMs and each way's experts.
    fn pairs(&self) -> impl Iterator<Item = ArmPair> {
        [FM].into_iter().chain(self.0.iter().map(|way| way.pair))
    }
}

/// Runs it for every seed.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    let ways = TransferWays::new(context)?;
    let names = ways.arms();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let tallies = context.tallies(&names, |config, tally| {
        context.times.time("fm", || embed(context, config, tally))?;
        context.times.time("experts", || experts(context, config, &ways, tally))
    })?;
    let (mut rows, mut table) = (Vec::new(), ways.empty_table());
    let mut over_without = Vec::new();
    for cell in SliceTotals::all(&tallies)? {
        let pairs = ways.pairs().flat_map(|pair| {
            let ArmPair { baseline, .. } = pair;
            [ArmPair { baseline, arm: baseline }, pair]
        });
        let mut of_cell = context.rows_of(&cell, &pairs.collect::<Vec<_>>());
        ways.add_ratios(context, &cell, &mut of_cell);
        if cell.totals.positives >= SHOWN
            && let Some(line) = ways.line(&of_cell)
        {
            table.line(line);
        }
        rows.extend(of_cell);
        let arms = [WITHOUT_FM].into_iter().chain(ways.0.iter().map(|way| way.pair.arm));
        let pairs: Vec<_> = arms.map(|arm| ArmPair { baseline: WITHOUT_FM, arm }).collect();
        over_without.extend(context.rows_of(&cell, &pairs));
    }
    let ExperimentOptions { expert, student, .. } = context.options;
    let components = student.as_ref().map_or_else(
        || format!("experts are {expert}"),
        |student| {
            format!(
                "experts are {expert}, distilled ones {student}, which should be the same network"
            )
        },
    );
    let table = format!("{table}\n{}\n{components}\n", arms_by_task(&over_without, ALL));
    rows.extend(over_without);
    let chosen = json!({
        "fm_small": smaller(&context.config.fm),
        "warm_share": WARM_SHARE,
        "expert": expert,
        "student": student,
    });
    Ok(context.report(table, rows, Vec::new(), chosen))
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

/// Trains and measures the experts of a seed: one without an FM, and two of each way.
fn experts(
    context: &ExperimentContext<'_>,
    config: &Config,
    ways: &TransferWays,
    tally: &mut ScoreTally,
) -> Result<()> {
    let small = context.runner(config, 0)?;
    let middle_ms = middle(&small)?;
    let embedding = 0..small.log.tae_dim;
    let index = WITHOUT_FM;
    let (without_tae, with_fm_logits) = (true, false);
    let arm = ExperimentArm { index, embedding: embedding.clone(), without_tae, with_fm_logits };
    from_common_start(&[ArmOfStart { runner: small, arm }], middle_ms, tally)?;
    for way in &ways.0 {
        let of_fm = |(fm, index)| {
            let (plugin, mask) = (way.plugin.clone(), way.mask.clone());
            let runner = ArmRunner { plugin, mask, ..context.runner(config, fm)? };
            let (embedding, with_fm_logits) = (embedding.clone(), way.with_fm_logits);
            let arm = ExperimentArm { index, embedding, without_tae: false, with_fm_logits };
            Ok(ArmOfStart { runner, arm })
        };
        let places = [way.pair.baseline, way.pair.arm].into_iter().enumerate();
        let arms = places.map(of_fm).collect::<Result<Vec<_>>>()?;
        from_common_start(&arms, middle_ms, tally)?;
    }
    Ok(())
}

/// An expert that goes on from a start that others have, too.
struct ArmOfStart<'a> {
    runner: ArmRunner<'a>,
    arm: ExperimentArm,
}

/// Trains an expert as the first arm says until `middle_ms`. From its parameters each arm's goes on
/// by its own, and is measured.
fn from_common_start(
    arms: &[ArmOfStart<'_>],
    middle_ms: i64,
    tally: &mut ScoreTally,
) -> Result<()> {
    let ArmOfStart { runner, arm } = &arms[0];
    let surfaces = runner.surfaces();
    let early = Span { from_ms: None, until_ms: Some(middle_ms) };
    let first = runner.train(arm, &surfaces, early, None)?;
    let test_from_ms = runner.context.window.test_from_ms;
    let late = Span { from_ms: Some(middle_ms), until_ms: Some(test_from_ms) };
    for ArmOfStart { runner, arm } in arms {
        let warm = Some(first.stream.trainer.parameters());
        let mut trained = runner.train(arm, &surfaces, late, warm)?;
        runner.measure(&mut trained, arm, &surfaces, tally)?;
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

impl TransferWays {
    /// Adds the kind of task to every row, and the transfer ratio to those of the larger FM's
    /// experts.
    fn add_ratios(
        &self,
        context: &ExperimentContext<'_>,
        cell: &SliceTotals,
        rows: &mut [ExperimentRow],
    ) {
        let ExperimentContext { options, dataset, .. } = context;
        let seeds = options.seeds.0.len();
        let bounds = intervals(&cell.dense, options.replicates, |totals| {
            let ratios = self.0.iter().map(|way| ratio(totals, way.pair, 0..seeds));
            [totals.mean_ne_diff_pct(FM.arm, FM.baseline)].into_iter().chain(ratios).collect()
        });
        let clear = bounds[0][1] < 0.0 || bounds[0][0] > 0.0;
        let kind = match dataset.schema.tasks[cell.slice.task].role {
            TaskRole::Main => "main",
            TaskRole::Auxiliary => "aux",
        };
        let finite = |value: f64| value.is_finite().then_some(value);
        for row in rows {
            row.more.insert("task_type", kind.into());
            let is_of = |way: &TransferWay| row.arm == cell.arms[way.pair.arm];
            let Some(place) = self.0.iter().position(is_of) else { continue };
            let own = options.seeds.0.iter().position(|known| row.seed == *known);
            let of_seeds = own.map_or(0..seeds, |at| at..at + 1);
            let own_ratio = ratio(&cell.totals, self.0[place].pair, of_seeds);
            row.more.insert("transfer_ratio", finite(own_ratio).into());
            if own.is_none() {
                row.more.insert("transfer_ratio_ci95", json!(bounds[1 + place].map(finite)));
                row.more.insert("fm_gain_outside_interval", clear.into());
            }
        }
    }

    fn empty_table(&self) -> TextTable {
        let of_way = |way: &TransferWay| {
            let heading = way.heading;
            [format!("{heading} NE diff (%)"), format!("{heading} ratio")]
        };
        let first = ["surface", "type", "task", "FM NE diff (%)"].map(String::from);
        TextTable::new(3, first.into_iter().chain(self.0.iter().flat_map(of_way)))
    }

    /// A line of table 2. A ratio is in brackets if the interval of the FM's gain contains 0.
    fn line(&self, rows: &[ExperimentRow]) -> Option<Vec<String>> {
        let arms = self.arms();
        let mean = |arm: usize| rows.iter().find(|row| row.arm == arms[arm] && row.seed == "mean");
        let cell = |arm: usize| {
            mean(arm).map_or("-".into(), |row| with_interval(row.ne_diff_pct, row.ci95))
        };
        let number =
            |value: &Value| value.as_f64().map_or("-".into(), |value| format!("{value:.2}"));
        let ratio = |expert: &ExperimentRow| {
            let bounds = &expert.more["transfer_ratio_ci95"];
            let own = number(&expert.more["transfer_ratio"]);
            let text = format!("{own} [{}, {}]", number(&bounds[0]), number(&bounds[1]));
            let is_clear = expert.more["fm_gain_outside_interval"] == true;
            if is_clear { text } else { format!("({text})") }
        };
        let first = mean(self.0[0].pair.arm)?;
        let kind = first.more["task_type"].as_str().unwrap_or_default();
        let mut line: Vec<String> = [&first.surface, kind, &first.task].map(String::from).into();
        line.push(cell(FM.arm));
        for way in &self.0 {
            line.extend([cell(way.pair.arm), ratio(mean(way.pair.arm)?)]);
        }
        Some(line)
    }
}
