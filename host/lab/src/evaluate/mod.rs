//! Evaluates the paradigm on a data set, in one process: an FM over the stream, then experts from
//! the logs that it wrote.
//!
//! [`policy`] evaluates another ranking policy on a log instead, without a model.
//!
//! As in production, the two phases share only the feature logs. Every prediction is made before
//! anything is learned from its row.

mod boosting;
pub mod expert;
pub mod fm;
pub mod plot;
pub mod policy;
pub mod ranking_scores;
mod reliability_plot;
pub mod scores;
pub mod setup;
pub mod stream;
#[cfg(test)]
pub(crate) mod tests;
pub mod window;

use std::{collections::BTreeMap, path::PathBuf};

use hypercast_config::Config;
use hypercast_data::logs::LogReader;
use hypercast_expert::Engine;
use serde::Serialize;

use self::{
    expert::ExpertPhase,
    ranking_scores::RankingScores,
    scores::{CurvePoint, EvaluationScores},
    setup::EvaluationSetup,
    stream::{DatasetStream, TestMode, UserSample},
    window::TestWindow,
};
use crate::{
    demo::{StepTimes, preset, replay::PredictionArm, step_times},
    error::Result,
    metrics::{MetricRow, table},
    ranking::RankingReport,
    reliability::Reliability,
    verdict::Verdict,
};

/// Train FM and experts up to a date, and measure them on the data after it
#[derive(Debug, Clone, clap::Args)]
pub struct EvaluateOptions {
    /// The data set and the folders.
    #[command(flatten)]
    pub setup: EvaluationSetup,
    /// Seed of FM and experts, instead of the preset's
    #[arg(long)]
    pub seed: Option<u64>,
    /// Reuse the FM's phase of an earlier run with the same FM settings in the work folder
    #[arg(long)]
    pub skip_fm: bool,
    /// Hours between the points of the progressive curve
    #[arg(long, value_name = "HOURS", default_value_t = 6)]
    pub window_h: u32,
    /// Also train gradient boosting on the schema's counters, by this Python with lightgbm, pandas
    /// and pyarrow: once, or with --mode streaming before each day
    #[arg(long, value_name = "PYTHON")]
    pub boosting: Option<PathBuf>,
    /// Evaluate this plugin on all surfaces, instead of the preset's experts
    #[arg(long, value_name = "FILE")]
    pub expert: Option<PathBuf>,
    /// Also train this plugin on all surfaces, and compare its order of requests with the expert's
    #[arg(long, value_name = "FILE")]
    pub rival: Option<PathBuf>,
    /// Also draw progressive NE over the stream and reliability to this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

/// The result, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct EvaluationReport {
    /// `fixed` or `streaming`.
    pub mode: TestMode,
    /// Seed of FM and experts.
    pub seed: u64,
    /// Where the test begins, by the data set's clock.
    pub test_from: String,
    /// Where the report begins.
    pub report_from: String,
    /// Metrics over the reported impressions, by surface, task and arm.
    pub rows: Vec<MetricRow>,
    /// The order within requests.
    pub ranking: RankingReport,
    /// Orders by ranking scores beside those by probabilities, of experts that have scores.
    pub ranking_scores: RankingScores,
    /// What was predicted against what happened, by surface, task and arm.
    pub reliability: Reliability,
    /// What FM and experts bring, in words.
    pub verdict: Verdict,
    /// Normalised entropy of all surfaces by time, over the whole stream.
    pub progressive: Vec<CurvePoint>,
    /// Seconds by step.
    pub seconds: BTreeMap<String, f64>,
    #[serde(skip)]
    window: TestWindow,
}

/// Runs both phases.
///
/// # Errors
/// The failure of a phase; the files of the FM's phase stay in the work folder.
pub fn run(options: &EvaluateOptions) -> Result<EvaluationReport> {
    let times = StepTimes::default();
    let setup = EvaluationSetup { reuse_data: options.skip_fm, ..options.setup.clone() };
    let dataset = times.time("import", || setup.dataset())?;
    let mut config = setup.config(&dataset)?;
    if let Some(seed) = options.seed {
        config.fm.seed = seed;
        config.expert_training.seed = seed;
    }
    if let Some(plugin) = &options.expert {
        config.experts = preset::with_baseline(preset::expert("expert", plugin.clone())).to_vec();
    }
    let window = TestWindow::new(&setup, &config, &dataset)?;
    let stream = DatasetStream {
        dataset: &dataset,
        config: &config,
        window,
        mode: setup.mode,
        history_len: config.fm.max_history,
        users: UserSample::ALL,
    };
    if options.skip_fm {
        fm::FmPhaseKey::new(&stream).check(setup.work())?;
    } else {
        times.time("fm", || fm::run(&stream, setup.work()))?;
    }
    let every_ms = i64::from(options.window_h.max(1)) * 3_600_000;
    let mut scores =
        EvaluationScores::new(&dataset.schema, &window, every_ms, options.boosting.is_some());
    times.time("score_fm", || fm::score(&stream, setup.work(), &mut scores))?;
    if let Some(python) = &options.boosting {
        times.time("boosting", || boosting::score(python, &stream, setup.work(), &mut scores))?;
    }
    let log = LogReader::open(&config.paths.logs)?;
    let engine = Engine::new(config.guests())?;
    let phase =
        ExpertPhase { config: &config, log: &log, engine: &engine, window, mode: setup.mode };
    for entry in &config.experts {
        let arm = if entry.without_tae { PredictionArm::Expert } else { PredictionArm::ExpertTae };
        times.time("experts", || phase.run(entry, arm, &mut scores))?;
    }
    if let Some(plugin) = &options.rival {
        let entry = preset::expert("rival", plugin.clone());
        // Beside no other, so that it serves all surfaces.
        let config = &Config { experts: vec![entry.clone()], ..config.clone() };
        let phase = ExpertPhase { config, ..phase };
        times.time("rival", || phase.run(&entry, PredictionArm::Rival, &mut scores))?;
    }
    Ok(EvaluationReport {
        mode: setup.mode,
        seed: config.fm.seed,
        test_from: window.format(window.test_from_ms),
        report_from: window.format(window.report_from_ms),
        rows: scores.rows(),
        ranking: times.time("ranking", || scores.ranking()),
        ranking_scores: times.time("ranking", || scores.ranking_scores()),
        reliability: scores.reliability(),
        verdict: times.time("verdict", || scores.verdict())?,
        progressive: scores.points(),
        seconds: times.seconds(),
        window,
    })
}

impl EvaluationReport {
    /// The progressive curve and the reliability as an SVG.
    pub fn plot(&self) -> String {
        plot::svg(&self.progressive, &self.reliability, &self.window)
    }
}

impl std::fmt::Display for EvaluationReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&table(&self.rows))?;
        self.ranking.fmt(f)?;
        self.ranking_scores.fmt(f)?;
        self.reliability.fmt(f)?;
        let mode = match self.mode {
            TestMode::Fixed => "weights fixed",
            TestMode::Streaming => "streaming",
        };
        writeln!(
            f,
            "\n{mode} from {}, reported from {}, seed {}",
            self.test_from, self.report_from, self.seed
        )?;
        write!(f, "{}\n\n{}", step_times(&self.seconds), self.verdict)
    }
}
