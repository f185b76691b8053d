//! The joiner at work: events from their stream, what it makes to its streams,
//! each record once.
//!
//! How many records its streams hold says how far it got. A joiner that starts
//! again goes on from its saved state, makes what it made before anew and passes
//! over as many records as are there, so no two streams need to change together.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Folder, JoinMetrics, Joiner, JoinerProgress, Options, outputs::Outputs, saved::SavedJoiner,
};
use crate::engine::{Engine, Reader, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use crate::ingest::Fact;
use hypercast_config::JoinerSettings;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_data::features::FeatureState;

/// Events that are read together.
const READ: usize = 1024;

/// How long to wait for an event before looking whether to stop.
const IDLE: Duration = Duration::from_millis(100);

/// How far a joiner is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// The next event.
    pub events: u64,
    /// Where `outcomes` ends, with all that these events led to.
    pub outcomes: u64,
}

/// A joiner with its streams and the folder of its state.
pub struct Runner {
    engine: Arc<dyn Engine>,
    joiner: Joiner,
    reader: Box<dyn Reader>,
    position: u64,
    outputs: Outputs,
    folder: Folder,
    world: String,
    /// What is to be gone by once all that was made before is made again.
    wanted: Option<Options>,
    save_every: u64,
    saved_at: u64,
    looked: Instant,
}

impl Runner {
    /// Takes the state's folder and goes on from what is in it; without, from the first event. `stop` ends [`Runner::run`],
    /// and retries of an engine that fails.
    ///
    /// # Errors
    /// A folder or stream that another process holds; a state that does not fit the data set or the streams; events that
    /// are needed and no longer kept.
    pub fn open(
        engine: Arc<dyn Engine>,
        settings: &JoinerSettings,
        dataset: &Dataset,
        metrics: Arc<dyn JoinMetrics>,
        stop: Shutdown,
    ) -> Result<Runner> {
        let folder = Folder::hold(&settings.state_dir)?;
        let (world, wanted) = (world(dataset, settings)?, options(settings));
        let outputs = Outputs::open(&engine, metrics, stop)?;
        let kept = engine.span(&Topic::events())?;
        let bare = dataset.without_content();
        let saved = folder.read::<SavedJoiner>()?;
        let fresh = saved.is_none();
        let (joiner, position) = match saved {
            Some(saved) => {
                refuse_other(&world, &saved, folder.dir())?;
                let position = saved.position;
                let state = FeatureState::new(&bare, settings.features);
                (Joiner::restore(state, saved)?, position)
            }
            None => {
                let state = FeatureState::rebuild(&bare, settings.features, settings.until_ms)?;
                let begun = outputs.joined.end + outputs.outcomes.end > 0;
                (Joiner::new(state, wanted.clone()), if begun { 0 } else { kept.start })
            }
        };
        if position < kept.start || position > kept.end {
            return Err(Error::invalid(format!(
                "the joiner is at event {position}, but the events stream holds {kept:?}; both must be kept together: restore {} or the stream, or begin anew without either",
                folder.dir().display()
            )));
        }
        let mut runner = Runner {
            reader: engine.reader(&Topic::events(), position)?,
            wanted: Some(wanted).filter(|wanted| wanted != joiner.options()),
            engine,
            position,
            outputs,
            folder,
            world,
            save_every: settings.join.save_every_events,
            saved_at: position,
            looked: Instant::now(),
            joiner,
        };
        runner.outputs.begin(&runner.joiner)?;
        runner.adopt()?;
        if fresh {
            // What it goes by is written before anything is made by it.
            runner.save()?;
        }
        Ok(runner)
    }

    /// Joins until it is told to stop, then saves the state. `passed` is told how far it is.
    ///
    /// # Errors
    /// An event that cannot be read, another writer of its streams, a state that cannot be saved.
    pub fn run(mut self, mut passed: impl FnMut(Passed)) -> Result<()> {
        let stop = self.outputs.stop.clone();
        passed(self.passed());
        while !stop.is_requested() {
            if self.step(IDLE)? > 0 {
                passed(self.passed());
            }
        }
        self.save()
    }

    /// Takes the next events, as many as are there; waits for the first. How many they were.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn step(&mut self, wait: Duration) -> Result<usize> {
        let stored = match self.reader.next(READ, wait) {
            Ok(stored) => stored,
            Err(error) => {
                self.reopen(error)?;
                return Ok(0);
            }
        };
        for record in &stored {
            let fact = Fact::decode(&record.payload)
                .map_err(|error| Error::invalid(format!("event {}: {error}", record.position)))?;
            self.joiner.take(fact, &mut self.outputs);
        }
        self.outputs.flush()?;
        if let Some(last) = stored.last() {
            self.position = last.position + 1;
        }
        self.adopt()?;
        if self.position - self.saved_at >= self.save_every {
            self.save()?;
        }
        self.look(stored.is_empty());
        Ok(stored.len())
    }

    /// How far it is.
    pub fn passed(&self) -> Passed {
        Passed { events: self.position, outcomes: self.outputs.outcomes.end }
    }

    /// Writes the state down.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&mut self) -> Result<()> {
        let folder = &self.folder;
        self.joiner.save(self.position, &self.world, |saved| folder.write(saved))?;
        self.saved_at = self.position;
        Ok(())
    }

    /// Goes by the options that are wanted as soon as nothing that was made by others is to be made again.
    fn adopt(&mut self) -> Result<()> {
        if !self.outputs.caught_up() {
            return Ok(());
        }
        if let Some(wanted) = self.wanted.take() {
            self.joiner.set_options(wanted);
            self.save()?;
        }
        Ok(())
    }

    /// An engine that was gone for a while is no reason to give up.
    fn reopen(&mut self, error: Error) -> Result<()> {
        tracing::warn!(%error, "events cannot be read; trying again");
        std::thread::sleep(IDLE);
        let kept = self.engine.span(&Topic::events());
        if kept.is_ok_and(|kept| self.position < kept.start) {
            return Err(error);
        }
        if let Ok(reader) = self.engine.reader(&Topic::events(), self.position) {
            self.reader = reader;
        }
        Ok(())
    }

    /// Says how far it is, about once a second.
    fn look(&mut self, idle: bool) {
        if !idle && self.looked.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.looked = Instant::now();
        if let Ok(kept) = self.engine.span(&Topic::events()) {
            let lag = kept.end.saturating_sub(self.position);
            let (impressions, orphans) = self.joiner.held();
            self.outputs.metrics.joiner(JoinerProgress {
                counts: self.joiner.counts(),
                impressions,
                orphans,
                lag_events: lag,
            });
        }
    }
}

/// What the joiner goes by, as it is configured.
pub fn options(settings: &JoinerSettings) -> Options {
    Options {
        settings: settings.join.clone(),
        history_len: settings.history_len,
        max_targets: settings.max_targets,
    }
}

/// What a saved state was made for.
pub fn world(dataset: &Dataset, settings: &JoinerSettings) -> Result<String> {
    let schema = toml::to_string(&*dataset.schema)
        .map_err(|error| Error::data(&dataset.dir, error.to_string()))?;
    let until = settings.until_ms;
    let (rows, hash) = (dataset.rows, crc32fast::hash(schema.as_bytes()));
    Ok(format!("schema {hash:08x}, {rows} impressions, until {until:?}, {:?}", settings.features))
}

fn refuse_other(world: &str, saved: &SavedJoiner, dir: &Path) -> Result<()> {
    if saved.world == world {
        return Ok(());
    }
    let why = format!(
        "this state was made over another data set or other [timeline] or [features]: {}; now there is {world}. Go back to those, or move the folder away: joining then begins at the first event again",
        saved.world
    );
    Err(Error::data(dir, why))
}
