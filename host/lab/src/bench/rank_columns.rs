//! A call of `rank` that is sent every column of the contract and says a propensity of each place,
//! beside the same rule in native Rust; also with the columns of contract 2 alone.
//!
//! A call is made as a daemon makes it: an instance was prepared before the request came. What is
//! timed is all that Wasm adds to the rule: columns are built of the request, copied into the
//! guest, read there, and the answer is copied back and checked.

use std::{hint::black_box, sync::Arc, time::Instant};

use hypercast_config::Config;
use hypercast_data::{
    schema::{Counter, Feature, FeatureKind, OwnedEntries, Schema, TaskKind},
    simulate,
    synthetic::{Synthetic, SyntheticRequest, SyntheticSize},
};
use hypercast_expert::{
    Blueprint, Engine, FmRows, LoadOptions, Plugin, Tae,
    batch::ExpertColumns,
    wasm::contract::{Column, Prediction, Ranked, Task, VectorWidths, rank_request},
};
use hypercast_fm::{example::Target, label_scale::log_odds_of};

use super::{
    BenchOptions, BenchReport,
    timing::{Contender, Rival, US, timed},
};
use crate::error::{CommonErrors as _, Error, Result};

const ROWS: usize = 500;

/// Values of the TAE and of a content vector.
const VECTORS: VectorWidths = VectorWidths { tae: 64, content: 64 };

/// A content vector as models of sentences give one.
const WIDE: VectorWidths = VectorWidths { content: 384, ..VECTORS };

/// The surface that the guest serves.
const SURFACE: &str = "search";

/// The share of requests that the rule ranks at random.
const EPSILON: f32 = 0.05;

/// Adds the figures of all columns, of wider vectors, and of the columns that contract 2 had.
///
/// # Errors
/// A guest that is not built or is rejected, or that ranks otherwise than the native rule.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let all = |_: &Column| true;
    RankFixture::new(options, VECTORS, all)?.race(options, report, "every column")?;
    let what = format!("every column, content vectors of {}", WIDE.content);
    RankFixture::new(options, WIDE, all)?.race(options, report, &what)?;
    let earlier =
        |column: &Column| matches!(column, Column::Tae | Column::Feature(_) | Column::Id(_));
    let what = "the columns of contract 2";
    RankFixture::new(options, VECTORS, earlier)?.race(options, report, what)
}

/// A guest, and a request for it.
struct RankFixture {
    blueprint: Blueprint,
    /// Those that are sent.
    columns: ExpertColumns,
    sent: Vec<NativeColumn>,
    request: SyntheticRequest,
    predictions: Vec<Prediction>,
}

/// Where the native rule finds a column.
enum NativeColumn {
    Feature(usize),
    Id(usize),
    Content,
    Tae,
    /// A main task's log odds, or its value.
    FmLogit {
        task: usize,
        is_binary: bool,
    },
}

impl RankFixture {
    fn new(
        options: &BenchOptions,
        vectors: VectorWidths,
        is_sent: impl Fn(&Column) -> bool,
    ) -> Result<Self> {
        let schema = schema();
        let limits = Config::default().plugin_limits;
        let load = LoadOptions {
            tae_dim: vectors.tae,
            content_dim: vectors.content,
            ..limits.load_options()
        };
        let engine = Engine::new(limits.engine())?;
        let plugin = Plugin::load(&engine, &options.hostile("every_column")?, &load.limits)?;
        let blueprint = Blueprint::new(plugin, &schema, &load)?;
        let mut description = blueprint.description.clone();
        description.rank_columns.retain(is_sent);
        let columns = ExpertColumns::new(&description, &schema, vectors)?;
        let sent = description.rank_columns.iter().map(|column| NativeColumn::of(column, &schema));
        let sent = sent.collect::<Option<Vec<_>>>();
        let sent = sent.ok_or_else(|| Error::internal("the guest reads a column of no schema"))?;
        let surface = schema.surfaces.iter().position(|surface| surface == SURFACE);
        let surface = surface.unwrap_or_default() as u16;
        let size = SyntheticSize { surface, candidates: ROWS, history: 100 };
        let world = Synthetic::new(Arc::new(schema), vectors.tae, 1);
        let request = world.with_content(vectors.content).request(1, size);
        let prediction = |(at, task): (usize, &Task)| Prediction {
            task: task.name.clone(),
            values: (0..ROWS).map(|row| ((row * 37 + at * 11) % 101) as f32 / 101.0).collect(),
        };
        let predictions = description.tasks.iter().enumerate().map(prediction).collect();
        Ok(Self { blueprint, columns, sent, request, predictions })
    }

    fn race(&self, options: &BenchOptions, report: &mut BenchReport, what: &str) -> Result<()> {
        let places = |ranked: Vec<Ranked>| -> Vec<(u32, f32, Option<f32>)> {
            ranked.iter().map(|own| (own.candidate, own.score, own.propensity)).collect()
        };
        if places(self.rank()?) != places(self.rank_natively()) {
            return Err(Error::internal(format!("the guest and the native rule differ: {what}")));
        }
        let ours: Contender<'_> = Box::new(|times_s| {
            // A daemon does this between requests.
            self.blueprint.plugin.prepare();
            let start = Instant::now();
            black_box(self.rank()?);
            times_s.push(start.elapsed().as_secs_f64());
            Ok(())
        });
        let rivals = vec![Rival { name: "native Rust", run: timed(|| Ok(self.rank_natively())) }];
        let name = format!("rank in Wasm, {ROWS} candidates, {what}");
        let times_s = report.race(&name, US, options.runs.max(500), ours, rivals)?;
        let added_us = times_s[0] * 1e6 - times_s[1] * 1e6;
        report.figure(format!("what Wasm adds to it, {ROWS} candidates, {what}"), added_us, "us");
        Ok(())
    }

    /// As [`hypercast_expert::ServedExpert::rank`] does it.
    fn rank(&self) -> Result<Vec<Ranked>> {
        let SyntheticRequest { example, tae, predictions } = &self.request;
        let fm = FmRows { tae: Tae::Rows(tae), predictions };
        let columns = self.columns.rank_columns(example, fm);
        let request = rank_request(example, &self.blueprint.info, ROWS);
        let ranked = self.blueprint.plugin.rank(&request, &self.predictions, &columns);
        ranked.map_err(|fault| Error::internal(format!("the guest failed: {fault}")))
    }

    /// The guest's rule, which reads what it needs where the request has it.
    fn rank_natively(&self) -> Vec<Ranked> {
        let SyntheticRequest { example, tae, predictions } = &self.request;
        let (tae_dim, tasks) = (tae.len() / ROWS, predictions.len() / ROWS);
        let number = |row: usize, column: &NativeColumn| {
            let Target { features, ids, item, .. } = &example.targets[row];
            match *column {
                NativeColumn::Feature(at) if features[at].is_nan() => 0.0,
                NativeColumn::Feature(at) => features[at],
                NativeColumn::Id(at) => (ids[at] % 16) as f32,
                NativeColumn::Content => item.content[0],
                NativeColumn::Tae => tae[row * tae_dim],
                NativeColumn::FmLogit { task, is_binary } => {
                    let said = predictions[row * tasks + task];
                    if is_binary { log_odds_of(said) } else { said }
                }
            }
        };
        let score = |row: usize| {
            let predicted = self.predictions.iter().fold(0.0, |all, own| all + own.values[row]);
            self.sent.iter().fold(predicted, |all, column| all + number(row, column))
        };
        // This request's seed is none of those that rank at random.
        let propensity = Some((1.0 - EPSILON + EPSILON / ROWS as f32).min(1.0));
        let place = |row| Ranked { candidate: row as u32, score: score(row), propensity };
        let mut ranked: Vec<Ranked> = (0..ROWS).map(place).collect();
        ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
        ranked
    }
}

impl NativeColumn {
    fn of(column: &Column, schema: &Schema) -> Option<Self> {
        let place = |names: Vec<String>, name: &String| names.iter().position(|own| own == name);
        Some(match column {
            Column::Feature(name) => Self::Feature(place(schema.feature_columns(), name)?),
            Column::Id(name) => Self::Id(place(schema.id_columns(), name)?),
            Column::Vector(_) => Self::Content,
            Column::Tae => Self::Tae,
            Column::FmLogit(name) => {
                let mut tasks = schema.main_tasks().enumerate();
                let (task, own) = tasks.find(|(_, task)| task.name == *name)?;
                Self::FmLogit { task, is_binary: own.kind == TaskKind::Binary }
            }
            _ => return None,
        })
    }
}

/// That of the simulated world, in which a feature and a counter belong to the search page.
fn schema() -> Schema {
    let mut schema = simulate::schema(3);
    schema.context_features.push(Feature::new("words", FeatureKind::Dense));
    schema.actions.push("cart".into());
    schema.counters.push(Counter {
        name: "user_cart".into(),
        key: vec!["user_id".into()],
        action: "cart".into(),
        half_life_days: 7.0,
    });
    let own = |name: &str| [name.to_owned()].into();
    let entries = OwnedEntries {
        actions: own("cart"),
        context_features: own("words"),
        counters: own("user_cart"),
        ..OwnedEntries::default()
    };
    schema.owned.insert(SURFACE.into(), entries);
    schema
}
