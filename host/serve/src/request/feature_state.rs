//! The feature state that requests read. It follows the stream of known outcomes.
//!
//! Any number of daemons can follow the stream. The state that a daemon saves only shortens its
//! next start; without it, the daemon begins with the data set and the first outcome. If outcomes
//! are missing, rankings go on with the features that are known.

use std::{
    ops::Range,
    sync::{
        Arc, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hypercast_config::{Config, OnGap};
use hypercast_core::{
    clock::{self, now_ms},
    logging::RepeatedFailures,
    shutdown::Shutdown,
    supervised_thread,
};
use hypercast_data::{
    dataset::Dataset,
    features::{FeatureState, saved::SavedState},
};
use hypercast_stream::{
    Error as StreamError,
    dead_letters::{DeadLetterQueue, LetterReader, LetterScope, UnusableRecord},
    join::{
        JoinMetrics as _, OutcomeRecord, StateDir, StateUpdate, is_state_of, state_fingerprint,
    },
    streams::{
        GapHandling, StreamEngine, StreamFollower, StreamPlace, StreamRecord, StreamTrail, Topic,
    },
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::Metrics,
};

/// Most outcomes in one read.
const READ: usize = 4096;

/// Most outcomes that are applied under one write lock, for which requests wait.
const AT_ONCE: usize = 64;

/// How long a read waits for an outcome before the stop flag is checked.
const IDLE: Duration = Duration::from_millis(100);

/// The feature state with the position that it includes.
pub struct LiveFeatures {
    state: RwLock<FeatureState>,
    /// Position of the next outcome.
    pub applied: watch::Sender<u64>,
    /// Whether outcomes are no longer followed.
    pub ended: AtomicBool,
    metrics: Arc<Metrics>,
}

/// Applies new outcomes to the state, and saves it.
pub struct FeatureFollower {
    /// The state that it updates.
    pub live: Arc<LiveFeatures>,
    outcomes: StreamFollower,
    /// Up to the last outcome that was applied.
    trail: StreamTrail,
    letters: DeadLetterQueue,
    folder: StateDir,
    world: String,
    save_every: u64,
    saved_at: u64,
    failures: RepeatedFailures,
    stop: Shutdown,
}

#[derive(Serialize, Deserialize)]
struct SavedLiveState {
    /// Position of the next outcome.
    position: u64,
    world: String,
    state: SavedState,
}

impl LiveFeatures {
    /// Locks the state for reading.
    pub fn state(&self) -> RwLockReadGuard<'_, FeatureState> {
        self.state.read().expect("no writer panics")
    }

    fn apply(&self, stored: &[StreamRecord], letters: &DeadLetterQueue) -> Result<()> {
        for part in stored.chunks(AT_ONCE) {
            let (mut outcomes, mut unusable) = (Vec::with_capacity(part.len()), Vec::new());
            for record in part {
                match OutcomeRecord::decode(&record.payload) {
                    Ok(outcome) => outcomes.push(outcome),
                    Err(error) => {
                        let (position, reason) = (record.position, error.to_string());
                        let StreamPlace { checksum, .. } = StreamPlace::after(record);
                        let (retries, request) = (0, None);
                        unusable.push(UnusableRecord {
                            position,
                            retries,
                            request,
                            checksum,
                            reason,
                        });
                    }
                }
            }
            letters.set_aside(unusable)?;
            let mut ingested_ms = Vec::with_capacity(outcomes.len());
            let mut foreign = 0;
            {
                let mut state = self.state.write().expect("no writer panics");
                for mut outcome in outcomes {
                    ingested_ms.push(outcome.ingested_ms);
                    foreign += usize::from(empty_foreign_context(&state, &mut outcome.update));
                    take(&mut state, outcome.update);
                }
            }
            if foreign > 0 {
                tracing::warn!(
                    outcomes = foreign,
                    "left out contexts, which are of another schema"
                );
            }
            if let Some(last) = part.last() {
                self.applied.send_replace(last.position + 1);
            }
            let now = now_ms();
            ingested_ms.iter().for_each(|ms| self.metrics.event_latency("live", now - ms));
        }
        Ok(())
    }
}

/// Empties the context of an outcome that was joined with another schema; returns whether it did.
fn empty_foreign_context(state: &FeatureState, known: &mut StateUpdate) -> bool {
    match known {
        StateUpdate::Outcome(row) | StateUpdate::Corrected(row) => {
            state.empty_foreign_context(&mut row.context)
        }
        StateUpdate::Item(_) | StateUpdate::User(_) => false,
    }
}

/// Applies an update as the joiner's own state does, so that both are equal.
fn take(state: &mut FeatureState, known: StateUpdate) {
    let refused = match known {
        StateUpdate::Outcome(impression) => {
            state.apply(&impression);
            Ok(())
        }
        StateUpdate::Corrected(impression) => {
            state.correct(&impression);
            Ok(())
        }
        StateUpdate::Item(item) => state.upsert_item(item),
        StateUpdate::User(user) => state.upsert_user(user),
    };
    if let Err(error) = refused {
        tracing::warn!(%error, "an update of an item or user does not fit the schema; it is skipped");
    }
}

impl FeatureFollower {
    /// Opens the state and applies every outcome that the stream has now, or that it had when
    /// `stop` was requested, which also ends the repetition of what fails.
    ///
    /// # Errors
    /// Another process holds the folder, the stream engine cannot be reached, or the stream is
    /// damaged.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        config: &Config,
        dataset: &Dataset,
        metrics: Arc<Metrics>,
        stop: Shutdown,
    ) -> Result<FeatureFollower> {
        let folder = StateDir::lock(&config.paths.state.join("serve"))?;
        let world = state_fingerprint(dataset, &config.joiner()?)?;
        let kept = engine.span(&Topic::outcomes())?;
        let saved = saved(&folder, dataset, config)?;
        // If all outcomes are kept, a state that misses some of them is best made again.
        let remake = saved.is_some() && kept.start == 0;
        let counted = metrics.clone();
        let gaps = GapHandling {
            policy: if remake { OnGap::Stop } else { config.engine.on_gap },
            count: Arc::new(move |topic: &Topic| counted.stream_gap(topic)),
        };
        let first = || all_outcomes(&folder, &kept, dataset, config);
        let FeaturesAt { state, trail } = saved.map_or_else(first, Ok)?;
        let from = trail.place().position;
        let (source, rate) = (Topic::outcomes(), metrics.set_aside_rate());
        let of = LetterScope { reader: &LetterReader::Features, source: source.name() };
        let letters = DeadLetterQueue::open(engine.clone(), of, None, rate, stop.clone())?;
        let live = LiveFeatures {
            state: RwLock::new(state),
            applied: watch::Sender::new(from),
            ended: AtomicBool::new(false),
            metrics,
        };
        let topic = Topic::outcomes();
        let mut follower = FeatureFollower {
            live: Arc::new(live),
            outcomes: StreamFollower::open(engine, topic, Some(trail.clone()), gaps)?,
            trail,
            letters,
            folder,
            world,
            save_every: config.join.save_every_events,
            saved_at: from,
            failures: RepeatedFailures::default(),
            stop,
        };
        match follower.catch_up() {
            Err(Error::Below(StreamError::Gap(_))) if remake => {
                tracing::warn!("the features are made again of the data set and all outcomes");
                let all = all_outcomes(&follower.folder, &kept, dataset, config)?;
                *follower.live.state.write().expect("no writer panics") = all.state;
                follower.go_to(all.trail.place())?;
                // Older records may be missing, too.
                follower.outcomes.set_policy(config.engine.on_gap);
                follower.catch_up()?;
            }
            caught_up => caught_up?,
        }
        follower.outcomes.set_policy(config.engine.on_gap);
        tracing::info!(from, to = follower.position(), "outcomes followed");
        Ok(follower)
    }

    /// Applies all outcomes that the stream has.
    fn catch_up(&mut self) -> Result<()> {
        loop {
            let before = self.outcomes.place();
            let stored = self.outcomes.next_stored(READ)?;
            if self.stop.is_requested() {
                return Ok(());
            }
            let is_at_end = stored.is_empty() && self.outcomes.place() == before;
            self.apply(&stored)?;
            if is_at_end {
                return Ok(());
            }
        }
    }

    /// Follows until a stop is requested, then saves the state. It retries while the stream engine
    /// is away.
    pub(crate) fn run(mut self) {
        while !self.stop.is_requested() {
            if let Err(error) = self.step(IDLE) {
                tracing::error!(%error, "outcomes are no longer followed; rankings use the features known so far");
                self.live.ended.store(true, Ordering::Relaxed);
                supervised_thread::report_lost("live");
                break;
            }
        }
        self.save();
    }

    /// Applies the outcomes that have come, after waiting up to `wait` for the first, and saves the
    /// state now and then. While the engine is away, it logs that and pauses. What it has read
    /// while a stop was requested is left to whoever goes on: it may be of a schema that has grown.
    ///
    /// # Errors
    /// Outcomes are missing, and `engine.on_gap` says to stop then.
    pub fn step(&mut self, wait: Duration) -> Result<()> {
        let followed = self.outcomes.next(READ, wait).map_err(Error::from);
        if self.stop.is_requested() {
            return Ok(());
        }
        match followed.and_then(|stored| self.apply(&stored)) {
            Ok(()) => {}
            Err(error @ Error::Below(StreamError::Gap(_))) => return Err(error),
            Err(error) => {
                if self.failures.is_news(&error) {
                    tracing::warn!(%error, "outcomes cannot be followed; trying again");
                }
                clock::sleep(IDLE);
            }
        }
        if self.position().saturating_sub(self.saved_at) >= self.save_every {
            self.save();
        }
        Ok(())
    }

    fn apply(&mut self, stored: &[StreamRecord]) -> Result<()> {
        if let Err(error) = self.live.apply(stored, &self.letters) {
            self.go_to(StreamPlace::at(self.position()))?;
            return Err(error);
        }
        self.trail.clone_from(self.outcomes.trail());
        let StreamPlace { position, .. } = self.trail.place();
        if self.position() != position {
            self.live.applied.send_replace(position);
        }
        Ok(())
    }

    fn go_to(&mut self, place: StreamPlace) -> Result<()> {
        self.outcomes.seek(place)?;
        self.trail.clone_from(self.outcomes.trail());
        self.live.applied.send_replace(place.position);
        Ok(())
    }

    fn position(&self) -> u64 {
        *self.live.applied.borrow()
    }

    /// Saves the state. A failure is logged only, because it costs nothing but time at the next
    /// start.
    pub fn save(&mut self) {
        let position = self.position();
        let state = self.live.state().saved();
        let saved = SavedLiveState { position, world: self.world.clone(), state };
        self.saved_at = position;
        if let Err(error) = self.folder.write(&saved, &self.trail, &())
            && self.failures.is_news(&error)
        {
            tracing::warn!(%error, "the live state is not saved; the next start takes longer");
        }
    }
}

/// A feature state, and where in the outcomes it is.
struct FeaturesAt {
    state: FeatureState,
    trail: StreamTrail,
}

/// The saved state, if there is one of this data set.
fn saved(folder: &StateDir, dataset: &Dataset, config: &Config) -> Result<Option<FeaturesAt>> {
    let saved = folder.read::<SavedLiveState, ()>().unwrap_or_else(|error| {
        tracing::warn!(%error, "the saved live state cannot be read; starting from the data set");
        None
    });
    let Some((SavedLiveState { position, world: of, state: saved }, trail, ())) = saved else {
        return Ok(None);
    };
    if !is_state_of(dataset, &config.joiner()?, &of)? {
        tracing::warn!(dir = %folder.dir().display(), "the saved live state is of another data set; starting from the data set");
        return Ok(None);
    }
    let mut state = FeatureState::new(dataset, config.features);
    state.restore(saved)?;
    let trail = trail.unwrap_or_else(|| StreamPlace::at(position).into());
    Ok(Some(FeaturesAt { state, trail }))
}

/// The data set's state, before all outcomes that are kept.
fn all_outcomes(
    folder: &StateDir,
    kept: &Range<u64>,
    dataset: &Dataset,
    config: &Config,
) -> Result<FeaturesAt> {
    if kept.start > 0 {
        let (first, state) = (kept.start, folder.dir().display());
        let why = format!(
            "outcomes before {first} are no longer in the stream, and {state} has no saved state \
             that includes them"
        );
        if config.engine.on_gap == OnGap::Stop {
            return Err(Error::invalid(format!(
                "{why}; copy that folder from another daemon, or set engine.on_gap = \"continue\" \
                 to rank without them"
            )));
        }
        tracing::error!("{why}; going on without them (engine.on_gap)");
    }
    let until_ms = config.timeline.until_ms()?;
    let state = FeatureState::rebuild(dataset, config.features, until_ms)?;
    Ok(FeaturesAt { state, trail: StreamPlace::at(kept.start).into() })
}

#[cfg(test)]
mod tests {
    use hypercast_data::{
        dataset::{ContextFeatures, Entities, Impression, write_dataset},
        schema::Schema,
    };
    use hypercast_fm::example::{Item, Outcome, User};
    use hypercast_stream::streams::{MemoryEngine, Record};

    use super::*;

    const SCHEMA: &str = r#"
        surfaces = ["feed"]
        actions = ["click"]
        tasks = [{ name = "click", role = "main", kind = "binary", label = "click" }]
        context_features = [
            { name = "device", kind = "categorical" },
            { name = "network", kind = "categorical" },
        ]"#;

    #[test]
    fn outcomes_from_before_a_context_feature_was_added_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let schema: Schema = toml::from_str(SCHEMA).unwrap();
        let items = [Item { id: 1, ..Item::default() }];
        let users = [User { id: 2, ..User::default() }];
        let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &users };
        write_dataset(&dir.path().join("data"), &entities, &mut []).unwrap();
        let dataset = Dataset::open(&dir.path().join("data")).unwrap();
        let outcome_of = |context: ContextFeatures| OutcomeRecord {
            update: StateUpdate::Outcome(Impression {
                request: 1,
                time_ms: 1000,
                outcome_ms: 2000,
                user: 2,
                item: 1,
                surface: 0,
                outcome: Outcome::UNKNOWN,
                context,
                truth: Vec::new(),
                history_only: false,
            }),
            ingested_ms: 2000,
            ranked: None,
        };
        let of_before = ContextFeatures { ids: vec![7], dense: vec![] };
        let of_now = ContextFeatures { ids: vec![7, 8], dense: vec![] };
        let record = |context: &ContextFeatures| {
            let payload = postcard::to_allocvec(&outcome_of(context.clone())).unwrap();
            Record { id: 0, payload }
        };
        let engine = Arc::new(MemoryEngine::new(16));
        let appender = engine.appender(&Topic::outcomes()).unwrap();
        appender.append(&[of_before, of_now].map(|context| record(&context))).unwrap();
        let mut config = Config::without_folder();
        config.paths.state = dir.path().join("state");
        let metrics = Arc::new(Metrics::default());
        let stop = Shutdown::default();
        let follower = FeatureFollower::open(engine, &config, &dataset, metrics, stop).unwrap();
        let state = follower.live.state();
        let request = hypercast_data::features::RequestInput {
            request: 2,
            user: 2,
            user_features: None,
            surface: 0,
            time_ms: 3000,
            candidates: Vec::new(),
        };
        assert_eq!(state.fetch(&request, 8).history.len(), 2, "both are in the history");
    }
}
