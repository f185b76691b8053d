//! What an expert's streaming trainer begins with: where its version stands, or what it makes of
//! the past.

use std::path::Path;

use super::{
    super::{
        eval_window::{EvalWindow, WindowPredictions},
        joined_reader::{JoinedPosition, JoinedReader, RecordReports},
        materialise,
        stream::{LogView, Survey},
    },
    ExpertCheckpoint, FollowExpertOptions, FollowedVersion,
    feed::{ComputedFeed, FeedPosition, FollowedLogs, LogFeed},
    online::OnlineExpert,
    state::{FollowerState, LastPublished, StateAddition},
};
use crate::ServiceContext;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::{atomic_dir, clock::format_time, disk};
use hypercast_data::dataset::timeline::Span;
use hypercast_data::logs::{LogFollower, LogPosition, LogReader, schema_path};
use hypercast_data::schema::Schema;
use hypercast_expert::train::SavedTrainer;
use hypercast_stream::dead_letters::{DeadLetterQueue, FEATURE_LOGS, LetterReader, LetterScope};
use hypercast_stream::streams::{StreamPlace, StreamTrail, Topic};

/// What there is to go on with.
pub(super) struct StartedTrainer {
    pub(super) expert: Box<dyn OnlineExpert>,
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

/// Where this version stands, or what it makes of the past; none if there is nothing to learn from
/// yet.
///
/// # Errors
/// As [`super::follow`].
pub(super) fn begin(
    own: &FollowedVersion<'_>,
    looked_to: &mut Option<LogPosition>,
) -> Result<Option<StartedTrainer>> {
    if is_before_growth(own)? {
        return Ok(None);
    }
    let begun = match FollowerState::read(&own.work)? {
        Some(state) => Some(resume(own, state)?),
        None => learn_past(own, looked_to)?,
    };
    let Some(begun) = begun else { return Ok(None) };
    let fm = &begun.expert.provenance().fm_version;
    if let Some(asked) = own.options.fm.as_ref().filter(|asked| *asked != fm) {
        return Err(Error::data(
            &own.work,
            format!("this version learns with FM {fm}, not {asked}; give another --version"),
        ));
    }
    Ok(Some(begun))
}

/// The rows behind what it begins with.
///
/// # Errors
/// As [`super::follow`].
pub(super) fn feed(own: &FollowedVersion<'_>, begun: &StartedTrainer) -> Result<LogFeed> {
    let FollowedVersion { dataset, config, engine, .. } = own;
    let reports = RecordReports::of(&own.telemetry, config, &own.stop);
    let (reader, orders) = (LetterReader::Trainer(own.topic.clone()), begun.orders);
    match (begun.place.position, &own.options.fm_checkpoint) {
        (FeedPosition::Logs(from), None) => {
            let fm = &begun.expert.provenance().fm_version;
            let logs = LogFollower::open(&config.paths.logs, fm, from)?;
            let of = LetterScope { reader: &reader, source: FEATURE_LOGS };
            let RecordReports { rate, stop, .. } = reports;
            let letters = DeadLetterQueue::open(engine.clone(), of, orders, rate, stop.clone())?;
            Ok(LogFeed::Logs(Box::new(FollowedLogs { logs, letters, stop })))
        }
        (FeedPosition::Joined(_), Some(checkpoint)) => {
            let context = ServiceContext { dataset, config, engine: engine.clone() };
            let from = JoinedPosition { joined: Some(begun.joined.clone()), orders };
            let joined = JoinedReader::open(context.clone(), &reader, from, reports)?;
            let surfaces = own.surfaces.clone();
            Ok(LogFeed::Computed(Box::new(ComputedFeed::open(
                context, checkpoint, joined, surfaces,
            )?)))
        }
        _ => Err(Error::data(
            &own.work,
            "it has followed the logs and is to follow a checkpoint, or the reverse; give another \
             --version",
        )),
    }
}

fn resume(own: &FollowedVersion<'_>, state: FollowerState) -> Result<StartedTrainer> {
    let last = match state.published {
        LastPublished::Nothing => None,
        LastPublished::This => Some(state.trainer.clone()),
        LastPublished::Earlier(saved) => Some(*saved),
    };
    let StateAddition { orders, mean_loss, joined } = state.addition;
    let schema = &own.dataset.schema;
    let mut expert = own.runtime.resume(schema, state.trainer)?;
    expert.set_mean_loss(mean_loss);
    if let Some(last) = &last {
        expert.set_published(last)?;
    }
    let mut measured = EvalWindow::new(expert.tasks(), schema);
    measured.rows = state.measured.into();
    Ok(StartedTrainer { expert, place: state.place, orders, joined, last, measured })
}

/// Feature logs that have rows of an expert.
struct LogsWithRows {
    log: LogReader,
    survey: Survey,
}

/// Learns from the logs that are there, or from the data set with TAEs of the checkpoint. None if
/// these have no rows of its surfaces, as those up to `looked_to` do not: the logs are looked
/// through again once a later file has a request on one.
fn learn_past(
    own: &FollowedVersion<'_>,
    looked_to: &mut Option<LogPosition>,
) -> Result<Option<StartedTrainer>> {
    let FollowedVersion { dataset, config, engine, options, surfaces, .. } = own;
    // The past ends where the stream begins.
    let (logs, joined) = match &options.fm_checkpoint {
        Some(checkpoint) => {
            let begin = engine.span(&Topic::joined())?.start;
            let logs = own.work.join("past");
            materialise::past(dataset, config, checkpoint, &logs)?;
            (logs, Some(begin))
        }
        None => (config.paths.logs.clone(), None),
    };
    if !disk::is_file(&logs.join("log-manifest.json")) {
        return Ok(None);
    }
    let end = LogReader::end_of(&logs)?;
    if *looked_to == Some(end) {
        return Ok(None);
    }
    let found = match *looked_to {
        Some(before) if !LogReader::has_requests_behind(&logs, before, surfaces)? => None,
        _ => look_through(&logs, options, surfaces)?,
    };
    let Some(LogsWithRows { log, survey }) = found else {
        *looked_to = Some(end);
        if joined.is_none() {
            return Ok(None);
        }
        // The data set does not grow, so waiting for rows of it would never end.
        let since = match options.fm_checkpoint.as_ref().and_then(|own| own.from_ms) {
            Some(from_ms) => {
                let from = format_time(from_ms, config.timeline.utc_offset_h);
                format!(" from {from} on (`--from`)")
            }
            None => String::new(),
        };
        let what = format!(
            "it has no rows on the surfaces of expert {}{since}, and an FM checkpoint computes the \
             past from it. Leave the checkpoint out, and training begins with the first rows in \
             the feature logs",
            own.entry.name
        );
        return Err(Error::data(&config.paths.dataset, what));
    };
    let view = view(&log, surfaces);
    let mut expert = own.runtime.begin(&view, survey)?;
    let mut until_ms = i64::MIN;
    let mut measured = EvalWindow::new(expert.tasks(), &dataset.schema);
    expert.learn_past(&view, &mut |report| {
        until_ms = report.examples.iter().map(|own| own.time_ms).fold(until_ms, i64::max);
        // Of passes the first alone predicts: those after it have seen its rows.
        if !report.predictions.is_empty() {
            let (candidate, targets) = (&report.predictions, report.targets);
            let said = WindowPredictions { candidate, serving: &[], targets };
            measured.push(report.examples.iter().copied(), said, |_| true);
        }
    })?;
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
    Ok(Some(StartedTrainer { expert, place, orders, joined, last, measured }))
}

/// Whether the logs are of an earlier layout of a schema that has grown, so that the logging tier
/// has not taken that over yet. Their columns stand in other places than the network expects.
///
/// # Errors
/// The logs cannot be read, or they are of before and the trainer is not to wait.
fn is_before_growth(own: &FollowedVersion<'_>) -> Result<bool> {
    let logs = &own.config.paths.logs;
    let schema = schema_path(logs);
    if own.options.fm_checkpoint.is_some() || !disk::is_file(&schema) {
        return Ok(false);
    }
    let logged = Schema::load(&schema)?.layout();
    let is_before = own.dataset.schema.layouts().skip(1).any(|earlier| earlier == logged);
    if is_before && own.options.until_end {
        let reason = "the data set's schema has grown since, and nothing has written here under the \
                      new one; start the logging tier (`hypercast materialise --follow`) first";
        return Err(Error::data(logs, reason));
    }
    Ok(is_before)
}

/// The logs, if there are any yet.
fn opened(logs: &Path, options: &FollowExpertOptions) -> Result<Option<LogReader>> {
    let asked = options.fm.as_deref().filter(|_| options.fm_checkpoint.is_none());
    match asked {
        Some(asked) if !LogReader::versions(logs)?.iter().any(|own| own.version == asked) => {
            Ok(None)
        }
        _ => Ok(Some(LogReader::open_for(logs, asked)?)),
    }
}

fn look_through(
    logs: &Path,
    options: &FollowExpertOptions,
    surfaces: &[u16],
) -> Result<Option<LogsWithRows>> {
    let Some(log) = opened(logs, options)? else { return Ok(None) };
    let survey = view(&log, surfaces).survey()?;
    Ok(survey.map(|survey| LogsWithRows { log, survey }))
}

fn view<'a>(log: &'a LogReader, surfaces: &[u16]) -> LogView<'a> {
    LogView { log, surfaces: surfaces.to_vec(), span: Span::default(), embedding: None, mask: None }
}
