//! The feature state that requests read. It follows the stream of known outcomes.
//!
//! Any number of daemons can follow the stream. The state that a daemon saves only shortens its
//! next start; without it, the daemon begins with the data set and the first outcome. If outcomes
//! are missing, rankings go on with the features that are known.

use std::{
    ops::Range,
    sync::{Arc, RwLock, RwLockReadGuard},
    time::Duration,
};

use hypercast_config::{Config, OnGap};
use hypercast_core::{clock::now_ms, shutdown::Shutdown};
use hypercast_data::{
    dataset::Dataset,
    features::{FeatureState, saved::SavedState},
};
use hypercast_stream::{
    Error as StreamError,
    join::{JoinMetrics as _, OutcomeRecord, StateDir, StateUpdate, state_fingerprint},
    streams::{GapHandling, StreamEngine, StreamFollower, StreamPlace, StreamRecord, Topic},
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
pub(crate) struct LiveFeatures {
    state: RwLock<FeatureState>,
    /// Position of the next outcome.
    pub(super) applied: watch::Sender<u64>,
    metrics: Arc<Metrics>,
}

/// Applies new outcomes to the state, and saves it.
pub(crate) struct FeatureFollower {
    /// The state that it updates.
    pub(super) live: Arc<LiveFeatures>,
    outcomes: StreamFollower,
    /// The place after the last outcome that was applied.
    place: StreamPlace,
    folder: StateDir,
    world: String,
    save_every: u64,
    saved_at: u64,
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
    pub(crate) fn state(&self) -> RwLockReadGuard<'_, FeatureState> {
        self.state.read().expect("no writer panics")
    }

    fn apply(&self, stored: &[StreamRecord]) -> Result<()> {
        for part in stored.chunks(AT_ONCE) {
            let outcomes: Vec<OutcomeRecord> = part
                .iter()
                .map(|record| Ok(OutcomeRecord::decode(&record.payload)?))
                .collect::<Result<_>>()?;
            let mut ingested_ms = Vec::with_capacity(outcomes.len());
            {
                let mut state = self.state.write().expect("no writer panics");
                for outcome in outcomes {
                    ingested_ms.push(outcome.ingested_ms);
                    take(&mut state, outcome.update);
                }
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
    /// Opens the state and applies every outcome that the stream has now.
    ///
    /// # Errors
    /// Another process holds the folder, the stream engine cannot be reached, or the stream is
    /// damaged.
    pub(crate) fn open(
        engine: Arc<dyn StreamEngine>,
        config: &Config,
        dataset: &Dataset,
        metrics: Arc<Metrics>,
    ) -> Result<FeatureFollower> {
        let folder = StateDir::lock(&config.paths.state.join("serve"))?;
        let world = state_fingerprint(dataset, &config.joiner()?)?;
        let kept = engine.span(&Topic::outcomes())?;
        let saved = saved(&folder, &world, dataset, config)?;
        // If all outcomes are kept, a state that misses some of them is best made again.
        let remake = saved.is_some() && kept.start == 0;
        let counted = metrics.clone();
        let gaps = GapHandling {
            policy: if remake { OnGap::Stop } else { config.engine.on_gap },
            count: Arc::new(move |topic: &Topic| counted.stream_gap(topic)),
        };
        let first = || all_outcomes(&folder, &kept, dataset, config);
        let FeaturesAt { state, place } = saved.map_or_else(first, Ok)?;
        let live = LiveFeatures {
            state: RwLock::new(state),
            applied: watch::Sender::new(place.position),
            metrics,
        };
        let topic = Topic::outcomes();
        let mut follower = FeatureFollower {
            live: Arc::new(live),
            outcomes: StreamFollower::open(engine.clone(), topic, Some(place), gaps)?,
            place,
            folder,
            world,
            save_every: config.join.save_every_events,
            saved_at: place.position,
        };
        match follower.catch_up(&*engine, kept.end) {
            Err(Error::Below(StreamError::Gap(_))) if remake => {
                tracing::warn!("the features are made again of the data set and all outcomes");
                let all = all_outcomes(&follower.folder, &kept, dataset, config)?;
                *follower.live.state.write().expect("no writer panics") = all.state;
                follower.go_to(all.place)?;
                follower.catch_up(&*engine, kept.end)?;
            }
            caught_up => caught_up?,
        }
        follower.outcomes.set_policy(config.engine.on_gap);
        tracing::info!(from = place.position, to = follower.position(), "outcomes followed");
        Ok(follower)
    }

    /// Applies the outcomes before `end`.
    fn catch_up(&mut self, engine: &dyn StreamEngine, end: u64) -> Result<()> {
        // A stream that ends before the place is told by a read.
        while self.position() < end || self.position() > engine.span(&Topic::outcomes())?.end {
            self.step(IDLE)?;
        }
        Ok(())
    }

    /// Follows until a stop is requested, then saves the state. It retries while the stream engine
    /// is away.
    pub(crate) fn run(mut self, stop: &Shutdown) {
        while !stop.is_requested() {
            match self.step(IDLE) {
                Ok(()) => {}
                Err(error @ Error::Below(StreamError::Gap(_))) => {
                    tracing::error!(%error, "outcomes are no longer followed; rankings use the features known so far");
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "outcomes cannot be followed; trying again");
                    std::thread::sleep(IDLE);
                }
            }
            if self.position().saturating_sub(self.saved_at) >= self.save_every {
                self.save();
            }
        }
        self.save();
    }

    fn step(&mut self, wait: Duration) -> Result<()> {
        let stored = self.outcomes.next(READ, wait)?;
        if let Err(error) = self.live.apply(&stored) {
            self.go_to(StreamPlace::at(self.position()))?;
            return Err(error);
        }
        self.place = self.outcomes.place();
        if self.position() != self.place.position {
            self.live.applied.send_replace(self.place.position);
        }
        Ok(())
    }

    fn go_to(&mut self, place: StreamPlace) -> Result<()> {
        self.place = place;
        self.live.applied.send_replace(place.position);
        Ok(self.outcomes.seek(place)?)
    }

    fn position(&self) -> u64 {
        *self.live.applied.borrow()
    }

    /// Saves the state. A failure is logged only, because it costs nothing but time at the next
    /// start.
    fn save(&mut self) {
        let position = self.position();
        let state = self.live.state().saved();
        let saved = SavedLiveState { position, world: self.world.clone(), state };
        self.saved_at = position;
        if let Err(error) = self.folder.write(&saved, self.place) {
            tracing::warn!(%error, "the live state is not saved; the next start takes longer");
        }
    }
}

/// A feature state, and where in the outcomes it is.
struct FeaturesAt {
    state: FeatureState,
    place: StreamPlace,
}

/// The saved state, if there is one of this data set.
fn saved(
    folder: &StateDir,
    world: &str,
    dataset: &Dataset,
    config: &Config,
) -> Result<Option<FeaturesAt>> {
    let saved = folder.read::<SavedLiveState>().unwrap_or_else(|error| {
        tracing::warn!(%error, "the saved live state cannot be read; starting from the data set");
        None
    });
    let Some((SavedLiveState { position, world: of, state: saved }, place)) = saved else {
        return Ok(None);
    };
    if of != world {
        tracing::warn!(dir = %folder.dir().display(), "the saved live state is of another data set; starting from the data set");
        return Ok(None);
    }
    let mut state = FeatureState::new(dataset, config.features);
    state.restore(saved)?;
    Ok(Some(FeaturesAt { state, place: place.unwrap_or(StreamPlace::at(position)) }))
}

/// The data set's state, before all outcomes.
fn all_outcomes(
    folder: &StateDir,
    kept: &Range<u64>,
    dataset: &Dataset,
    config: &Config,
) -> Result<FeaturesAt> {
    if kept.start > 0 {
        return Err(Error::invalid(format!(
            "outcomes before {} are no longer in the stream, and {} has no saved state that includes them; copy that folder from another daemon",
            kept.start,
            folder.dir().display()
        )));
    }
    let until_ms = config.timeline.until_ms()?;
    let state = FeatureState::rebuild(dataset, config.features, until_ms)?;
    Ok(FeaturesAt { state, place: StreamPlace::at(0) })
}
