//! The logging tier as a service: it follows the joined examples, and each gets the
//! embeddings of every FM version that is in use, into the feature logs (paper section 3.3.3).
//!
//! Files say up to where in the stream they go, so a tier that was killed goes on after the last
//! complete file: no request is lost or logged twice. Where records of the stream are missing, a
//! file without requests says where it goes on. It neither joins nor trains, and answers
//! nobody.

mod versions;

use std::{
    io::Write,
    net::SocketAddr,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_fm::{
    example::Example,
    inference::FmServingOptions,
    runtime::{BurnRuntime, FmRuntime},
};
use prometheus::{Gauge, Histogram, IntCounter};
use serde_json::json;

pub(crate) use self::versions::FmLoading;
use self::versions::LoadedVersions;
pub(crate) use self::versions::{LoadedFmVersion, RequestPoint};
pub use self::versions::{Registered, ToLog};
use super::{
    joined_reader::{
        JoinedPosition, JoinedRead, JoinedReader, PassedGap, PositionedExample, RecordReports,
    },
    progress_log::{serve_metrics, tell},
};
use crate::ServiceContext;
use crate::error::{CommonErrors as _, Error, Result};
use crate::job_metrics::JobMetrics;
use hypercast_config::FmTierConfig;
use hypercast_core::clock::{self, now_ms};
use hypercast_core::dir_lock::DirLock;
use hypercast_core::error::ErrorKind;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::logs::{LogRow, LogWriter, LoggedPlace};
use hypercast_data::schema::{CoreColumns, MainTasks, spec_growths};
use hypercast_stream::dead_letters::LetterReader;
use hypercast_stream::streams::{StreamPlace, StreamTrail};

/// Records that are read together.
const RECORDS: usize = 256;

/// How often it looks whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often it asks which versions are in use.
const VERSIONS_EVERY: Duration = Duration::from_secs(1);

/// How often it says how far it is.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// Gives the versions that are to be logged at the moment, each once.
pub type ActiveVersions<'a> = dyn FnMut() -> Result<Vec<ToLog>> + 'a;

/// When the tier stops, and where it serves metrics.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoggingOptions {
    /// Where to answer `/metrics`.
    pub metrics: Option<SocketAddr>,
    /// Stop at the end of the stream.
    pub until_end: bool,
}

/// What the tier did since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoggingReport {
    /// Requests logged, corrections among them.
    pub requests: u64,
    /// Targets of these requests.
    pub rows: u64,
    /// Where it stands in the stream.
    pub position: u64,
}

/// Follows until it is asked to stop; then the file under way is complete. `active` gives the
/// versions that are to be logged. Lines of JSON go to `out`.
///
/// # Errors
/// Logs that another process writes, or of another schema; an FM that cannot be loaded; a full
/// disk; an engine that is away for long.
pub fn follow(
    context: ServiceContext<'_>,
    active: &mut ActiveVersions<'_>,
    options: LoggingOptions,
    shutdown: &Shutdown,
    out: &mut dyn Write,
) -> Result<LoggingReport> {
    let tier = LoggingTier::open(context, Arc::new(BurnRuntime), options, shutdown)?;
    let _metrics = serve_metrics(&tier.telemetry, options.metrics, out)?;
    tier.run(active, shutdown, out)
}

/// Follows `joined`, and logs its examples with their embeddings.
pub struct LoggingTier {
    settings: FmTierConfig,
    until_end: bool,
    log: LogWriter,
    reader: JoinedReader,
    core: CoreColumns,
    main_tasks: MainTasks,
    versions: LoadedVersions,
    batch: LoggingBatch,
    /// After the last record that was logged.
    position: u64,
    telemetry: Arc<JobMetrics>,
    meters: LoggingMeters,
    report: LoggingReport,
    /// When it asked which versions are in use.
    asked: Option<Instant>,
    said: Instant,
    /// Whether it was said that weights must come first.
    waits: bool,
    _owner: DirLock,
}

/// Where the logs end in the stream, and earlier ends of their files.
fn trail(log: &LogWriter) -> Result<Option<StreamTrail>> {
    let in_stream = |LoggedPlace { position, checksum }| StreamPlace { position, checksum };
    let earlier = log.earlier_places()?.into_iter().map(in_stream).collect();
    Ok(log.place().map(|place| StreamTrail::new(in_stream(place), earlier)))
}

/// Records that go through the FMs together.
#[derive(Default)]
struct LoggingBatch {
    records: Vec<PositionedExample>,
    targets: usize,
    since: Option<Instant>,
}

impl LoggingBatch {
    fn add(&mut self, records: Vec<PositionedExample>) {
        self.targets += records.iter().map(|record| record.example.targets.len()).sum::<usize>();
        self.records.extend(records);
        self.since.get_or_insert_with(clock::instant);
    }

    /// When the first of its requests was; after all others if there is none.
    fn earliest_ms(&self) -> i64 {
        self.records.iter().map(|record| record.example.time_ms).min().unwrap_or(i64::MAX)
    }

    /// The next records of at most so many targets, or one record.
    fn take(&mut self, most: usize) -> Vec<PositionedExample> {
        let mut targets = 0;
        let fits = |record: &&PositionedExample| {
            targets += record.example.targets.len();
            targets <= most
        };
        let count = self.records.iter().take_while(fits).count().max(1);
        let rest = self.records.split_off(count);
        let pass = std::mem::replace(&mut self.records, rest);
        self.targets -= pass.iter().map(|record| record.example.targets.len()).sum::<usize>();
        if self.records.is_empty() {
            self.since = None;
        }
        pass
    }
}

impl LoggingTier {
    /// Locks the logs, and goes on after the last complete file. `runtime` loads the weights.
    ///
    /// # Errors
    /// As [`follow`].
    pub fn open(
        context: ServiceContext<'_>,
        runtime: Arc<dyn FmRuntime>,
        options: LoggingOptions,
        shutdown: &Shutdown,
    ) -> Result<LoggingTier> {
        let ServiceContext { dataset, config, engine } = context.clone();
        let owner = DirLock::acquire(&config.paths.logs)?;
        let log = super::fm::log_writer(dataset, config, Vec::new())?;
        let growths = spec_growths(&dataset.schema)?.into();
        let telemetry = Arc::new(JobMetrics::default());
        let position = JoinedPosition { joined: trail(&log)?, orders: None };
        let reports = RecordReports::of(&telemetry, config, shutdown);
        let reader = JoinedReader::open(context, &LetterReader::Logging, position, reports)?;
        let serving = FmServingOptions { growths, ..config.fm_logging.loading(config.device) };
        let work = config.paths.fm_work.join("logging");
        let loading = FmLoading { engine, runtime, serving, work };
        Ok(LoggingTier {
            settings: config.fm_logging.clone(),
            until_end: options.until_end,
            position: reader.place().position,
            log,
            reader,
            core: CoreColumns::new(&dataset.schema),
            main_tasks: MainTasks::new(&dataset.schema),
            versions: LoadedVersions { loading, versions: Vec::new() },
            batch: LoggingBatch::default(),
            meters: LoggingMeters::new(&telemetry),
            telemetry,
            report: LoggingReport::default(),
            asked: None,
            said: clock::instant(),
            waits: false,
            _owner: owner,
        })
    }

    fn run(
        mut self,
        active: &mut ActiveVersions<'_>,
        shutdown: &Shutdown,
        out: &mut dyn Write,
    ) -> Result<LoggingReport> {
        while !shutdown.is_requested() {
            match self.step(active, LOOK_EVERY, out) {
                Ok(true) => {}
                Ok(false) => break,
                // What was waited for is read at the next start.
                Err(error) if shutdown.is_requested() && error.kind() == ErrorKind::Unavailable => {
                    tracing::warn!(%error, "asked to stop while the streams were waited for");
                }
                Err(error) => return Err(error),
            }
        }
        self.finish(out)
    }

    /// Reads what has come, after waiting up to `wait` for the first record, and logs what is due;
    /// false at the end of the stream, if it is to stop there.
    ///
    /// # Errors
    /// As [`follow`].
    pub fn step(
        &mut self,
        active: &mut ActiveVersions<'_>,
        wait: Duration,
        out: &mut dyn Write,
    ) -> Result<bool> {
        let most = self.settings.batch_candidates;
        let batch_wait = Duration::from_micros(self.settings.batch_wait_us);
        if self.asked.is_none_or(|at| clock::since(at) >= VERSIONS_EVERY) {
            self.versions.set(active()?)?;
            self.asked = Some(clock::instant());
        }
        let look = if self.batch.records.is_empty() { wait } else { batch_wait.min(wait) };
        let came = self.read(look)?;
        let over = self.until_end && !came;
        let waited = self.batch.since.is_some_and(|since| clock::since(since) >= batch_wait);
        let has_records = !self.batch.records.is_empty();
        if self.batch.targets >= most || (has_records && (waited || over)) {
            let next = RequestPoint { position: self.position, time_ms: self.batch.earliest_ms() };
            if self.versions.advance(next)? {
                let pass = self.batch.take(most);
                self.log_batch(pass)?;
                self.waits = false;
            } else {
                if !std::mem::replace(&mut self.waits, true) {
                    tracing::warn!(
                        "no FM version has weights yet; examples wait for the first publication"
                    );
                }
                clock::sleep(wait);
            }
        } else if over {
            return Ok(false);
        }
        self.log.tick(now_ms())?;
        if clock::since(self.said) >= SAY_EVERY {
            self.say(out)?;
        }
        Ok(true)
    }

    /// Completes the file under way.
    ///
    /// # Errors
    /// A full disk of the feature logs.
    pub fn finish(mut self, out: &mut dyn Write) -> Result<LoggingReport> {
        self.log.cut()?;
        self.say(out)?;
        self.report.position = self.position;
        Ok(self.report)
    }

    /// The position in `joined` after the last record that was logged.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whether records came, or may be there.
    fn read(&mut self, wait: Duration) -> Result<bool> {
        if self.batch.targets >= self.settings.batch_candidates {
            return Ok(false);
        }
        match self.reader.next(RECORDS, wait)? {
            JoinedRead::Records(records) => self.batch.add(records),
            JoinedRead::Later | JoinedRead::Stopped => {}
            JoinedRead::Gap(gap) if self.batch.records.is_empty() => self.pass_gap(gap)?,
            // What was read before is logged first.
            JoinedRead::Gap(_) => clock::sleep(wait),
            JoinedRead::End => return Ok(false),
        }
        Ok(true)
    }

    /// Goes on behind missing records, which the logs say before anything else is read.
    fn pass_gap(&mut self, gap: PassedGap) -> Result<()> {
        let StreamPlace { position, checksum } = gap.to;
        self.log.go_on_at(LoggedPlace { position, checksum })?;
        self.position = position;
        if gap.is_back {
            // The weights in service may have learned from what comes again.
            self.versions.reload()?;
        }
        self.reader.go_on();
        Ok(())
    }

    fn log_batch(&mut self, records: Vec<PositionedExample>) -> Result<()> {
        let versions = self.versions.usable();
        let core = self.core.examples(records.iter().map(|record| &record.example));
        let examples: Vec<&Example> = core.iter().map(|example| &**example).collect();
        let outputs = self.versions.infer(&examples, &self.main_tasks).map_err(|error| {
            Error::invalid(format!(
                "the examples of joined from position {} on: {error}",
                self.position
            ))
        })?;
        self.log.set_versions(versions)?;
        let all: usize = examples.iter().map(|example| example.targets.len()).sum();
        // The values of some rows of a matrix with a row a target.
        let part = |values: &[f32], rows: &Range<usize>| {
            let width = values.len() / all.max(1);
            rows.start * width..rows.end * width
        };
        let mut row = 0;
        for record in &records {
            let rows = row..row + record.example.targets.len();
            row = rows.end;
            let StreamPlace { position, checksum } = record.end;
            self.position = position;
            if rows.is_empty() {
                continue;
            }
            let taes: Vec<&[f32]> =
                outputs.iter().map(|own| &own.tae[part(&own.tae, &rows)]).collect();
            let predictions: Vec<&[f32]> =
                outputs.iter().map(|own| &own.main[part(&own.main, &rows)]).collect();
            self.log.write(LogRow {
                example: &record.example,
                taes: &taes,
                predictions: &predictions,
                ranked: &record.ranked,
                correction: record.correction,
                ingested_ms: record.ingested_ms,
                place: Some(LoggedPlace { position, checksum }),
            })?;
            self.report.requests += 1;
            self.report.rows += rows.len() as u64;
        }
        self.meters.logged(&records, row, self.position);
        Ok(())
    }

    fn say(&mut self, out: &mut dyn Write) -> Result<()> {
        self.said = clock::instant();
        let versions: Vec<&str> =
            self.log.versions().iter().map(|version| version.version.as_str()).collect();
        tell(
            out,
            &json!({
                "kind": "logged", "position": self.position, "requests": self.report.requests,
                "rows": self.report.rows, "fm": versions,
            }),
        )
    }
}

/// The metrics that the logging tier serves.
struct LoggingMeters {
    latency: Histogram,
    requests: IntCounter,
    rows: IntCounter,
    position: Gauge,
}

impl LoggingMeters {
    fn new(telemetry: &Arc<JobMetrics>) -> Self {
        Self {
            latency: telemetry.seconds(
                "hypercast_event_to_log_seconds",
                "From when the newest event of a request was taken in to when its TAE was computed",
            ),
            requests: telemetry.counter("hypercast_logged_requests_total", "Requests logged"),
            rows: telemetry.counter("hypercast_logged_rows_total", "Targets logged"),
            position: telemetry
                .gauge("hypercast_logged_position", "The position in the joined stream"),
        }
    }

    fn logged(&self, records: &[PositionedExample], rows: usize, position: u64) {
        let now_ms = now_ms();
        for record in records {
            self.latency.observe((now_ms - record.ingested_ms).max(0) as f64 / 1e3);
        }
        self.requests.inc_by(records.len() as u64);
        self.rows.inc_by(rows as u64);
        self.position.set(position as f64);
    }
}

#[cfg(test)]
mod tests;
