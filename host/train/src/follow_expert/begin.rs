//! What an expert's streaming trainer begins with: where its version stands, or what it makes of
//! the past.

use std::{path::Path, sync::Arc};

use super::{
    super::{
        eval_window::{EvalWindow, WindowPredictions},
        joined_reader::{JoinedPosition, JoinedReader, RecordReports},
        materialise,
        stream::{ExpertStream, LogView},
    },
    ExpertCheckpoint, ExpertContext, FollowExpertOptions, LOOK_EVERY,
    feed::{ComputedFeed, FeedPosition, FollowedLogs, LogFeed},
    state::{FollowerState, LastPublished, StateAddition},
};
use crate::ServiceContext;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::TrainOn;
use hypercast_core::{atomic_dir, shutdown::Shutdown};
use hypercast_data::dataset::timeline::Span;
use hypercast_data::logs::{LogFollower, LogReader};
use hypercast_expert::train::SavedTrainer;
use hypercast_stream::dead_letters::{DeadLetterQueue, FEATURE_LOGS, LetterReader, LetterScope};
use hypercast_stream::streams::{StreamEngine, StreamPlace, StreamTrail, Topic};

/// What there is to go on with.
pub(super) struct StartedTrainer {
    pub(super) stream: ExpertStream,
    pub(super) place: ExpertCheckpoint,
    /// The position of the next order to try a record again; none for those that come from now on.
    pub(super) orders: Option<u64>,
    /// Where it stands in the stream of joined examples, if it follows that.
    pub(super) joined: StreamTrail,
    /// What was published last.
    pub(super) last: Option<SavedTrainer>,
    /// What was measured since.
    pub(super) measured: EvalWindow,
}

/// What a follower starts with.
pub(super) struct Beginning {
    pub(super) trainer: StartedTrainer,
    pub(super) feed: LogFeed,
    /// The surfaces whose rows it learns from.
    pub(super) surfaces: Vec<u16>,
}

/// The version that is trained.
pub(super) struct OwnVersion<'a> {
    /// Its work folder.
    pub(super) work: &'a Path,
    /// The stream of its weights, by which it sets records aside.
    pub(super) topic: &'a Topic,
    /// What is told of these records.
    pub(super) reports: RecordReports,
}

/// What [`learn_past`] learns from.
struct Past<'a> {
    options: &'a FollowExpertOptions,
    surfaces: &'a [u16],
    work: &'a Path,
}

/// Where this version stands, or what it makes of the past. None if it was asked to stop before
/// there was one.
pub(super) fn begin(
    context: ExpertContext<'_>,
    engine: &Arc<dyn StreamEngine>,
    options: &FollowExpertOptions,
    own: OwnVersion<'_>,
    shutdown: &Shutdown,
) -> Result<Option<Beginning>> {
    let OwnVersion { work, topic, reports } = own;
    let ExpertContext { dataset, config, entry, .. } = context;
    let mut entry = entry.clone();
    if !options.surfaces.is_empty() {
        (entry.surfaces, entry.train_on) = (options.surfaces.clone(), TrainOn::Own);
    }
    let surfaces = config.training_surfaces(&entry, &dataset.schema)?;
    let found = match FollowerState::read(work)? {
        Some(state) => Some(resume(context, state)?),
        None => learn_past(context, engine, Past { options, surfaces: &surfaces, work }, shutdown)?,
    };
    let Some(begun) = found else { return Ok(None) };
    let fm = begun.stream.trainer.parameters().provenance.fm_version.clone();
    if let Some(asked) = options.fm.as_ref().filter(|asked| **asked != fm) {
        return Err(Error::data(
            work,
            format!("this version learns with FM {fm}, not {asked}; give another --version"),
        ));
    }
    let (reader, orders) = (LetterReader::Trainer(topic.clone()), begun.orders);
    let feed = match (begun.place.position, &options.fm_checkpoint) {
        (FeedPosition::Logs(from), None) => {
            let logs = LogFollower::open(&config.paths.logs, &fm, from)?;
            let of = LetterScope { reader: &reader, source: FEATURE_LOGS };
            let RecordReports { rate, stop, .. } = reports;
            let letters = DeadLetterQueue::open(engine.clone(), of, orders, rate, stop)?;
            LogFeed::Logs(Box::new(FollowedLogs { logs, letters }))
        }
        (FeedPosition::Joined(_), Some(checkpoint)) => {
            let context = ServiceContext { dataset, config, engine: engine.clone() };
            let from = JoinedPosition { joined: Some(begun.joined.clone()), orders };
            let joined = JoinedReader::open(context.clone(), &reader, from, reports)?;
            let computed = ComputedFeed::open(context, checkpoint, joined, surfaces.clone())?;
            LogFeed::Computed(Box::new(computed))
        }
        _ => {
            return Err(Error::data(
                work,
                "it has followed the logs and is to follow a checkpoint, or the reverse; give another --version",
            ));
        }
    };
    Ok(Some(Beginning { trainer: begun, feed, surfaces }))
}

fn resume(context: ExpertContext<'_>, state: FollowerState) -> Result<StartedTrainer> {
    let last = match state.published {
        LastPublished::Nothing => None,
        LastPublished::This => Some(state.trainer.clone()),
        LastPublished::Earlier(saved) => Some(*saved),
    };
    let StateAddition { orders, mean_loss, joined } = state.addition;
    let mut stream = context.setup().resume(&context.dataset.schema, state.trainer)?;
    stream.trainer.set_mean_loss(mean_loss);
    let mut measured = EvalWindow::new(&stream.blueprint);
    measured.rows = state.measured.into();
    Ok(StartedTrainer { stream, place: state.place, orders, joined, last, measured })
}

/// Learns from the logs that are there, for which it waits, or from the data set with TAEs of the
/// checkpoint.
fn learn_past(
    context: ExpertContext<'_>,
    engine: &Arc<dyn StreamEngine>,
    past: Past<'_>,
    shutdown: &Shutdown,
) -> Result<Option<StartedTrainer>> {
    let Past { options, surfaces, work } = past;
    let ExpertContext { dataset, config, entry, .. } = context;
    // The past ends where the stream begins.
    let (logs, joined) = match &options.fm_checkpoint {
        Some(checkpoint) => {
            let begin = engine.span(&Topic::joined())?.start;
            let logs = work.join("past");
            materialise::past(dataset, config, checkpoint, &logs)?;
            (logs, Some(begin))
        }
        None => (config.paths.logs.clone(), None),
    };
    let mut said = false;
    let (log, survey) = loop {
        if let Some(log) = opened(&logs, options)? {
            let view = view(&log, surfaces);
            if let Some(survey) = view.survey()? {
                break (log, survey);
            }
        }
        if shutdown.is_requested() || options.until_end {
            return Ok(None);
        }
        if !said {
            tracing::warn!(
                "{}: no rows of expert {} yet; it waits for them",
                logs.display(),
                entry.name
            );
            said = true;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let view = view(&log, surfaces);
    let mut stream = context.setup().begin(&view, survey, |_| ())?;
    let mut until_ms = i64::MIN;
    let mut measured = EvalWindow::new(&stream.blueprint);
    stream.learn_past(&view, |report| {
        until_ms = report.examples.iter().map(|own| own.time_ms).fold(until_ms, i64::max);
        // The first pass alone predicts: what comes after it has seen all rows.
        if !report.predictions.is_empty() {
            let (candidate, targets) = (&report.predictions, report.targets);
            let said = WindowPredictions { candidate, serving: &[], targets };
            measured.push(report.examples.iter().copied(), said, |_| true);
        }
    })?;
    stream.go_online();
    let position = match joined {
        Some(position) => {
            atomic_dir::remove(&logs)?;
            FeedPosition::Joined(position)
        }
        None => FeedPosition::Logs(log.end),
    };
    let place =
        ExpertCheckpoint { position, requests: 0, corrections: 0, until_ms, ingested_ms: 0 };
    let joined = match position {
        FeedPosition::Joined(position) => StreamPlace::at(position).into(),
        FeedPosition::Logs(_) => StreamTrail::default(),
    };
    let (orders, last) = (None, None);
    Ok(Some(StartedTrainer { stream, place, orders, joined, last, measured }))
}

/// The logs, if there are any yet.
fn opened(logs: &Path, options: &FollowExpertOptions) -> Result<Option<LogReader>> {
    if !logs.join("log-manifest.json").is_file() {
        return Ok(None);
    }
    let asked = options.fm.as_deref().filter(|_| options.fm_checkpoint.is_none());
    match asked {
        Some(asked) if !LogReader::versions(logs)?.iter().any(|own| own.version == asked) => {
            Ok(None)
        }
        _ => Ok(Some(LogReader::open_for(logs, asked)?)),
    }
}

fn view<'a>(log: &'a LogReader, surfaces: &[u16]) -> LogView<'a> {
    LogView { log, surfaces: surfaces.to_vec(), span: Span::default(), embedding: None }
}
