//! What an expert's streaming trainer begins with: where its version stands, or what it makes of
//! the past.

use std::{path::Path, sync::Arc};

use super::{
    super::{
        fm, materialise,
        measured::{Measured, Said},
        stream::{ExpertStream, Load, LogView, Start},
    },
    FollowOptions, Ground, LOOK_EVERY, Place,
    feed::{Computed, Feed, FeedPosition},
    state::{LastPublished, State},
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::ExpertEntry;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::timeline::Span;
use hypercast_data::logs::{LogFollower, LogReader};
use hypercast_expert as expert;
use hypercast_expert::train::SavedTrainer;
use hypercast_stream::streams::{StreamEngine, Topic};

/// What there is to go on with.
pub(super) struct Begun {
    pub(super) blueprint: Arc<expert::Blueprint>,
    pub(super) stream: ExpertStream,
    pub(super) place: Place,
    /// What was published last.
    pub(super) last: Option<SavedTrainer>,
    /// What was measured since.
    pub(super) measured: Measured,
}

/// Where this version stands, or what it makes of the past. None if it was asked to stop before
/// there was one.
pub(super) fn begin(
    ground: Ground<'_>,
    engine: &Arc<dyn StreamEngine>,
    (options, work): (&FollowOptions, &Path),
    stop: &Shutdown,
) -> Result<Option<(Begun, Feed, Vec<u16>)>> {
    let Ground { dataset, config, entry, .. } = ground;
    let surfaces = match options.surfaces.is_empty() {
        true => config.training_surfaces(entry, &dataset.schema)?,
        false => {
            let own = ExpertEntry { surfaces: options.surfaces.clone(), ..entry.clone() };
            let own = ExpertEntry { train_on: hypercast_config::TrainOn::Own, ..own };
            config.training_surfaces(&own, &dataset.schema)?
        }
    };
    let found = match State::read(work)? {
        Some(state) => Some(resume(ground, state)?),
        None => learn_past(ground, engine, (options, &surfaces, work), stop)?,
    };
    let Some(begun) = found else { return Ok(None) };
    let fm = begun.stream.parameters().provenance.fm_version.clone();
    if let Some(asked) = options.fm.as_ref().filter(|asked| **asked != fm) {
        return Err(Error::data(
            work,
            format!("this version learns with FM {fm}, not {asked}; give another --version"),
        ));
    }
    let feed = match (begun.place.position, &options.fm_checkpoint) {
        (FeedPosition::Logs(from), None) => {
            Feed::Logs(Box::new(LogFollower::open(&config.paths.logs, &fm, from)?))
        }
        (FeedPosition::Joined(from), Some(checkpoint)) => {
            let from = (Some(from), surfaces.clone());
            let ground = (dataset, config);
            Feed::Computed(Box::new(Computed::open(ground, engine.clone(), checkpoint, from)?))
        }
        _ => {
            return Err(Error::data(
                work,
                "it has followed the logs and is to follow a checkpoint, or the reverse; give another --version",
            ));
        }
    };
    Ok(Some((begun, feed, surfaces)))
}

fn resume(ground: Ground<'_>, state: State) -> Result<Begun> {
    let Ground { dataset, config, entry, guests } = ground;
    let provenance = state.trainer.provenance();
    let options = expert::LoadOptions {
        tae_dim: provenance.tae_dim,
        fm_version: Some(provenance.fm_version.clone()),
        ..config.load_options(&entry.name)
    };
    let blueprint = expert::Blueprint::load(guests, &entry.plugin, &dataset.schema, &options)?;
    let blueprint = Arc::new(blueprint);
    let last = match state.published {
        LastPublished::Nothing => None,
        LastPublished::This => Some(state.trainer.clone()),
        LastPublished::Earlier(saved) => Some(*saved),
    };
    let start = start(ground, 0);
    let stream = ExpertStream::resume(blueprint.clone(), state.trainer, &start)?;
    let measured = Measured::new(&blueprint).with(state.measured);
    Ok(Begun { blueprint, stream, place: state.place, last, measured })
}

fn start<'a>(ground: Ground<'a>, rows: u64) -> Start<'a> {
    Start {
        settings: &ground.config.expert_training,
        rows,
        without_tae: ground.entry.without_tae,
        device: ground.config.device,
    }
}

/// Learns from the logs that are there, for which it waits, or from the data set with TAEs of the
/// checkpoint.
fn learn_past(
    ground: Ground<'_>,
    engine: &Arc<dyn StreamEngine>,
    (options, surfaces, work): (&FollowOptions, &[u16], &Path),
    stop: &Shutdown,
) -> Result<Option<Begun>> {
    let Ground { dataset, config, entry, guests } = ground;
    // The past ends where the stream begins.
    let (logs, joined) = match &options.fm_checkpoint {
        Some(checkpoint) => {
            let begin = engine.span(&Topic::joined())?.start;
            let logs = work.join("past");
            materialise::past(dataset, config, (checkpoint, &logs))?;
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
        if stop.is_requested() || options.until_end {
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
    let load = Load { engine: guests, plugin: &entry.plugin, name: &entry.name };
    let blueprint = load.blueprint(&view, &survey.fm_version, config.load_options(&entry.name))?;
    let seed = config.expert_training.seed;
    let parameters = blueprint.init_parameters(survey.statistics.finish(), seed);
    let mut stream = ExpertStream::new(blueprint.clone(), parameters, &start(ground, survey.rows))?;
    let mut until_ms = i64::MIN;
    let mut measured = Measured::new(&blueprint);
    stream.learn_past(&view, |report| {
        until_ms = report.examples.iter().map(|own| own.time_ms).fold(until_ms, i64::max);
        // The first pass alone predicts: what comes after it has seen all rows.
        if !report.predictions.is_empty() {
            let (candidate, targets) = (&report.predictions, report.targets);
            let said = Said { candidate, serving: &[], targets };
            measured.push(report.examples.iter().copied(), said, |_| true);
        }
    })?;
    stream.go_online();
    let position = match joined {
        Some(position) => FeedPosition::Joined(position),
        None => FeedPosition::Logs(log.end()),
    };
    if joined.is_some() {
        fm::remove_dir(&logs)?;
    }
    let place = Place { position, requests: 0, corrections: 0, until_ms, ingested_ms: 0 };
    Ok(Some(Begun { blueprint, stream, place, last: None, measured }))
}

/// The logs, if there are any yet.
fn opened(logs: &Path, options: &FollowOptions) -> Result<Option<LogReader>> {
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
