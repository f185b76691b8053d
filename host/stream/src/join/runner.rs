//! Runs the joiner: reads events from their stream and writes each resulting record to its stream
//! once.
//!
//! The ends of the output streams tell how far the joiner got. After a restart it continues from
//! its saved state, produces the earlier records again and skips as many as the streams already
//! have. So the two streams need not change together.
//!
//! Events that are missing are told, and `engine.on_gap` decides whether the joiner goes on.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_config::JoinerSettings;
use hypercast_core::clock;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_data::features::{FeatureConfig, FeatureState};
use hypercast_data::schema::Schema;

use super::{
    JoinMetrics, JoinSink, Joiner, JoinerOptions, JoinerProgress, StateDir,
    content::ContentLimits,
    output_streams::OutputStreams,
    rehearsal::Rehearsal,
    saved::{SavedContents, SavedJoiner},
};
use crate::dead_letters::{DeadLetterQueue, LetterReader, LetterScope, UnusableRecord};
use crate::error::{CommonErrors as _, Error, Result};
use crate::events::EventRecord;
use crate::streams::{
    GapCause, GapHandling, StreamEngine, StreamFollower, StreamGap, StreamPlace, StreamRecord,
    StreamTrail, Topic,
};

/// The number of events per read.
const READ: usize = 1024;

/// How long to wait for an event before checking for shutdown.
const IDLE: Duration = Duration::from_millis(100);

/// How far a joiner is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct JoinerPosition {
    /// The position of the next event.
    pub events: u64,
    /// The end of the `outcomes` stream, with the results of all events before.
    pub outcomes: u64,
}

/// A joiner with its streams and its state directory.
pub struct Runner {
    engine: Arc<dyn StreamEngine>,
    joiner: Joiner,
    events: StreamFollower,
    /// Up to the last event whose records are stored.
    trail: StreamTrail,
    /// The end of the events when this was opened. All records in the outputs are of events before.
    first_end: u64,
    gaps: GapHandling,
    outputs: OutputStreams,
    letters: DeadLetterQueue,
    metrics: Arc<dyn JoinMetrics>,
    stop: Shutdown,
    state_dir: StateDir,
    fingerprint: String,
    /// Options to apply once replay has caught up.
    wanted: Option<(JoinerOptions, ContentLimits)>,
    save_every: u64,
    saved_at: u64,
    reported: Instant,
}

impl Runner {
    /// Locks the state directory and continues from its state, or from the first event if there is
    /// none; then what its output streams have must be what it makes again. `stop` ends
    /// [`Runner::run`] and the repetition of failed appends.
    ///
    /// # Errors
    /// Another process uses the directory or a stream; the state does not fit the data set or the
    /// streams; or records of the joiner are missing or other ones and `engine.on_gap` is "stop".
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        settings: &JoinerSettings,
        dataset: &Dataset,
        metrics: Arc<dyn JoinMetrics>,
        stop: Shutdown,
    ) -> Result<Runner> {
        let state_dir = StateDir::lock(&settings.state_dir)?;
        let (fingerprint, wanted) =
            (state_fingerprint(dataset, settings)?, settings.options.clone());
        let max_mib = settings.features.max_content_mib;
        let limits = ContentLimits { width: dataset.content, max_mib };
        let counted = metrics.clone();
        let count = Arc::new(move |topic: &Topic| counted.stream_gap(topic));
        let gaps = GapHandling { policy: settings.on_gap, count };
        let outputs = OutputStreams::open(&engine, &metrics, &stop, gaps.clone())?;
        let kept = engine.span(&Topic::events())?;
        let bare = Joiner::bare(dataset);
        let saved = state_dir.read::<SavedJoiner, SavedContents>()?;
        let fresh = saved.is_none();
        let (joiner, trail) = match saved {
            Some((saved, trail, contents)) => {
                if !is_state_of(dataset, settings, &saved.fingerprint)? {
                    return Err(foreign_state(&fingerprint, &saved, state_dir.dir()));
                }
                let trail = trail.unwrap_or_else(|| StreamPlace::at(saved.position).into());
                // It has places in place of vectors; those are bounded by `ContentLimits`.
                let features = FeatureConfig { max_content_mib: usize::MAX, ..settings.features };
                let state = FeatureState::new(&bare, features);
                let mut joiner = Joiner::restore(state, saved)?;
                joiner.contents = contents.vectors;
                joiner.restore_rankings(contents.rankings);
                joiner.content_limits = contents.limits.unwrap_or(limits);
                (joiner, trail)
            }
            None => {
                let begun = outputs.joined.end + outputs.outcomes.end > 0;
                let position = if begun { 0 } else { kept.start };
                let fresh = || -> Result<Joiner> {
                    let (features, until_ms) = (settings.features, settings.until_ms);
                    let state = FeatureState::rebuild(&bare, features, until_ms)?;
                    Ok(Joiner::new(state, wanted.clone()).with_content(dataset.content))
                };
                let joiner = if begun {
                    let (engine, policy) = (&*engine, settings.on_gap);
                    let rehearsed = Rehearsal { engine, policy, stop: &stop }.joiner(fresh)?;
                    rehearsed.not_compared.inspect(|what| tracing::warn!("{what}"));
                    rehearsed.joiner
                } else {
                    fresh()?
                };
                (joiner, StreamTrail::from(StreamPlace::at(position)))
            }
        };
        let topic = Topic::events();
        let of = LetterScope { reader: &LetterReader::Joiner, source: topic.name() };
        let rate = metrics.set_aside_rate();
        let letters = DeadLetterQueue::open(engine.clone(), of, None, rate, stop.clone())?;
        let mut runner = Runner {
            letters,
            events: StreamFollower::open(engine.clone(), topic, Some(trail.clone()), gaps.clone())?,
            first_end: kept.end,
            gaps,
            wanted: Some((wanted, limits)).filter(|(wanted, limits)| {
                let same = (wanted, limits) == (&joiner.options, &joiner.content_limits);
                !same || !joiner.bounded_by_arrival
            }),
            engine,
            outputs,
            metrics,
            stop,
            state_dir,
            fingerprint,
            save_every: settings.options.settings.save_every_events,
            saved_at: trail.place().position,
            trail,
            reported: clock::instant(),
            joiner,
        };
        let short = runner.outputs.begin(&mut runner.joiner)?;
        if runner.joiner.knows_outputs {
            runner.outputs.compare()?;
        }
        runner.apply_options()?;
        if fresh || short {
            // The options are saved before any record is written with them.
            runner.save()?;
        }
        Ok(runner)
    }

    /// Joins until shutdown, then saves the state. Calls `passed` after each step.
    ///
    /// # Errors
    /// Another process writes to the output streams, the engine cannot be reached for long, or the
    /// state cannot be saved.
    pub fn run(mut self, mut passed: impl FnMut(JoinerPosition)) -> Result<()> {
        passed(self.passed());
        while !self.stop.is_requested() {
            if self.step(IDLE)? > 0 {
                passed(self.passed());
            }
        }
        self.save()
    }

    /// Processes the available events, after waiting up to `wait` for the first; returns their
    /// number. What it has read while a stop was requested is left to whoever goes on: it may be of
    /// a schema that has grown.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn step(&mut self, wait: Duration) -> Result<usize> {
        let read = self.events.next(READ, wait);
        if self.stop.is_requested() {
            return Ok(0);
        }
        let stored = match read {
            Ok(stored) => stored,
            Err(error @ Error::Gap(_)) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "events cannot be read; trying again");
                clock::sleep(IDLE);
                return Ok(0);
            }
        };
        let (mut unusable, mut departed) = (Vec::new(), false);
        let skipped = stored.is_empty() && self.events.place() != self.trail.place();
        for record in &stored {
            self.outputs.event = record.position;
            if let Err(reason) = join_record(&mut self.joiner, record, &mut self.outputs) {
                let StreamPlace { checksum, .. } = StreamPlace::after(record);
                let (position, reason) = (record.position, reason.to_string());
                let (retries, request) = (0, None);
                unusable.push(UnusableRecord { position, retries, request, checksum, reason });
            }
            departed |= self.outputs.departed(&mut self.joiner);
        }
        self.outputs.flush()?;
        self.letters.set_aside(unusable)?;
        self.trail.clone_from(self.events.trail());
        let skipped = self.check_replay(skipped)? || skipped || departed;
        self.apply_options()?;
        // What follows missing or other events cannot be produced again from a state of before.
        if skipped || self.position().saturating_sub(self.saved_at) >= self.save_every {
            self.save()?;
        }
        self.report_progress(stored.is_empty());
        Ok(stored.len())
    }

    /// How far the joiner is.
    pub fn passed(&self) -> JoinerPosition {
        JoinerPosition { events: self.position(), outcomes: self.outputs.outcomes.end }
    }

    /// Saves the state.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&mut self) -> Result<()> {
        let (state_dir, trail, position) = (&self.state_dir, &self.trail, self.position());
        let write = |saved: &_, contents: &_| {
            state_dir.write::<SavedJoiner, SavedContents>(saved, trail, contents)
        };
        self.joiner.save(position, &self.fingerprint, write)?;
        self.saved_at = position;
        Ok(())
    }

    /// Applies changed options as soon as no record needs to be produced again.
    fn apply_options(&mut self) -> Result<()> {
        if !self.outputs.caught_up() {
            return Ok(());
        }
        self.joiner.knows_outputs = true;
        if let Some((wanted, limits)) = self.wanted.take() {
            self.joiner.set_options(wanted);
            self.joiner.content_limits = limits;
            if let Err(error) = self.joiner.contents.check_room(limits) {
                tracing::warn!(%error, "the joiner keeps those that it has, and takes no others");
            }
            self.save()?;
        }
        Ok(())
    }

    /// Whether records were missing that the joiner must produce again to know which ones its
    /// streams have: events were skipped on the way there, or those that made the last records are
    /// gone.
    fn check_replay(&mut self, skipped: bool) -> Result<bool> {
        let position = self.position();
        if self.outputs.caught_up() || (position < self.first_end && !skipped) {
            return Ok(false);
        }
        let cause = GapCause::Cut { end: self.first_end };
        self.gaps.settle(StreamGap { topic: Topic::events(), position, cause })?;
        self.outputs.accept(&mut self.joiner);
        Ok(true)
    }

    fn position(&self) -> u64 {
        self.trail.place().position
    }

    /// Reports the progress about once a second.
    fn report_progress(&mut self, idle: bool) {
        if !idle && clock::since(self.reported) < Duration::from_secs(1) {
            return;
        }
        self.reported = clock::instant();
        if let Ok(kept) = self.engine.span(&Topic::events()) {
            let (impressions, orphans) = self.joiner.held();
            self.metrics.joiner(JoinerProgress {
                counts: self.joiner.counts,
                impressions,
                orphans,
                lag_events: kept.end.saturating_sub(self.position()),
            });
        }
    }
}

/// Joins a record of the stream of events, as a [`Runner`] does.
///
/// # Errors
/// The event cannot be used; the error says why.
pub fn join_record(
    joiner: &mut Joiner,
    record: &StreamRecord,
    outputs: &mut dyn JoinSink,
) -> Result<()> {
    let decoded = EventRecord::decode(&record.payload);
    let checked = decoded.and_then(|mut event| joiner.check(&mut event.kind).map(|()| event));
    match checked {
        Ok(event) if joiner.doubts_times() => joiner.take(event.bounded(record.stored_ms), outputs),
        Ok(event) => joiner.take(event, outputs),
        Err(error) => {
            joiner.counts.refused += 1;
            return Err(error);
        }
    }
    Ok(())
}

/// Describes the data set, schema and settings that a saved state is valid for.
pub fn state_fingerprint(dataset: &Dataset, settings: &JoinerSettings) -> Result<String> {
    fingerprint_of(&dataset.schema.layout(), dataset, settings)
}

/// Whether a state with this fingerprint is of the data set and the settings, under whatever layout
/// its schema has had.
///
/// # Errors
/// A layout cannot be written as TOML.
pub fn is_state_of(dataset: &Dataset, settings: &JoinerSettings, of: &str) -> Result<bool> {
    for layout in dataset.schema.layouts() {
        if fingerprint_of(&layout, dataset, settings)? == of {
            return Ok(true);
        }
    }
    Ok(false)
}

fn fingerprint_of(layout: &Schema, dataset: &Dataset, settings: &JoinerSettings) -> Result<String> {
    let schema =
        toml::to_string(layout).map_err(|error| Error::data(&dataset.dir, error.to_string()))?;
    let until = settings.until_ms;
    let (rows, hash) = (dataset.rows, crc32fast::hash(schema.as_bytes()));
    let features = features_in_fingerprint(&settings.features);
    Ok(format!("schema {hash:08x}, {rows} impressions, until {until:?}, {features}"))
}

/// The settings of `[features]` that a state depends on, written as in the first release.
fn features_in_fingerprint(features: &FeatureConfig) -> String {
    // The bound of content vectors only decides which are taken, and is saved by itself.
    let &FeatureConfig {
        history_events,
        max_users,
        max_items,
        max_counter_keys,
        prior_strength,
        max_content_mib: _,
    } = features;
    format!(
        "FeatureConfig {{ history_events: {history_events}, max_users: {max_users}, max_items: \
         {max_items}, max_counter_keys: {max_counter_keys}, prior_strength: {prior_strength:?} }}"
    )
}

fn foreign_state(fingerprint: &str, saved: &SavedJoiner, dir: &Path) -> Error {
    let why = format!(
        "the state belongs to another data set or to other [timeline] or [features] settings: {}; \
         now they are {fingerprint}. Restore those, or move the folder away to begin at the first \
         event again",
        saved.fingerprint
    );
    Error::data(dir, why)
}
