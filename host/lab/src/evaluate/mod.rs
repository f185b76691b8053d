//! Evaluating the paradigm on a data set, in one process: an FM over the stream,
//! then experts from the logs that it left.
//!
//! The two phases meet in the feature logs alone, as in production. Every number
//! is a prediction made before anything was learned from its row.

pub mod expert;
pub mod fm;
pub mod plot;
pub mod scores;
pub mod setup;
pub mod stream;
#[cfg(test)]
pub(crate) mod tests;
pub mod window;

use std::collections::BTreeMap;

use serde::Serialize;

use self::{
    expert::Phase,
    scores::{Point, Scores},
    setup::Setup,
    stream::{Mode, Stream, Users},
    window::{Asked, Window},
};
use crate::demo::{Data, Seconds, report::Row};
use crate::error::{CommonErrors as _, Result};
use hypercast_data::logs::LogReader;
use hypercast_expert::Engine;

/// What to evaluate.
#[derive(Debug, Clone)]
pub struct Options {
    /// The data set, the work folder, the plugins.
    pub setup: Setup,
    /// Whether the test teaches.
    pub mode: Mode,
    /// Where the test and the report begin.
    pub asked: Asked,
    /// Replaces the seeds of FM and experts.
    pub seed: Option<u64>,
    /// Take over what an earlier run's FM phase left in the work folder.
    pub skip_fm: bool,
    /// Hours between the points of the progressive curve.
    pub window_h: u32,
}

/// What came of it, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// `fixed` or `streaming`.
    pub mode: Mode,
    /// Seed of FM and experts.
    pub seed: u64,
    /// Where the test begins, by the data set's clock.
    pub test_from: String,
    /// Where the report begins.
    pub report_from: String,
    /// Metrics over the reported impressions, by surface, task and arm.
    pub rows: Vec<Row>,
    /// Normalised entropy of all surfaces by time, over the whole stream.
    pub progressive: Vec<Point>,
    /// Seconds by step.
    pub seconds: BTreeMap<String, f64>,
    #[serde(skip)]
    window: Window,
}

/// Runs both phases.
///
/// # Errors
/// Whatever a phase says; what the FM's phase wrote stays in the work folder.
pub fn run(options: &Options) -> Result<Report> {
    let mut seconds = Seconds::default();
    let setup = Setup { reuse_data: options.skip_fm, ..options.setup.clone() };
    let dataset = seconds.time("import", || setup.dataset())?;
    let mut config = setup.config(&dataset)?;
    if let Some(seed) = options.seed {
        config.fm.seed = seed;
        config.expert_training.seed = seed;
    }
    let window = Window::new(setup.data, &options.asked, &config, &dataset)?;
    let stream = Stream {
        dataset: &dataset,
        config: &config,
        window,
        mode: options.mode,
        history_len: config.fm.max_history,
        users: Users::ALL,
    };
    std::fs::create_dir_all(&setup.work).map_err(crate::error::Error::io(&setup.work))?;
    if options.skip_fm {
        fm::Key::new(&stream).check(&setup.work)?;
    } else {
        seconds.time("fm", || fm::run(&stream, &setup.work))?;
    }
    let every_ms = i64::from(options.window_h.max(1)) * 3_600_000;
    let mut scores = Scores::new(&dataset.schema, &window, every_ms);
    seconds.time("score_fm", || fm::score(&stream, &setup.work, &mut scores))?;
    let log = LogReader::open(&config.paths.logs)?;
    let engine = Engine::new(config.guests())?;
    let phase = Phase { config: &config, log: &log, engine: &engine, window, mode: options.mode };
    for entry in &config.experts {
        seconds.time("experts", || phase.run(entry, &mut scores))?;
    }
    Ok(Report {
        mode: options.mode,
        seed: config.fm.seed,
        test_from: window.say(window.test_from_ms),
        report_from: window.say(window.report_from_ms),
        rows: scores.rows(),
        progressive: scores.points(),
        seconds: seconds.0,
        window,
    })
}

impl Report {
    /// The progressive curve as an SVG.
    pub fn plot(&self) -> String {
        plot::svg(&self.progressive, &self.window)
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&crate::demo::report::table(&self.rows))?;
        let mode = match self.mode {
            Mode::Fixed => "weights fixed",
            Mode::Streaming => "streaming",
        };
        writeln!(
            f,
            "\n{mode} from {}, reported from {}, seed {}",
            self.test_from, self.report_from, self.seed
        )?;
        let steps: Vec<String> =
            self.seconds.iter().map(|(step, took)| format!("{step} {took:.1} s")).collect();
        writeln!(f, "{}", steps.join(", "))
    }
}

/// The name of a data set's default work folder.
pub fn work_name(command: &str, data: Data) -> std::path::PathBuf {
    let name = format!("{command}-{data:?}").to_lowercase();
    std::path::Path::new("target/hypercast").join(name)
}
