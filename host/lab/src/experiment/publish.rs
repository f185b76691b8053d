//! What component-wise publishing costs (paper section 3.3.4): serving copies of one FM that get every publication
//! whole, a share of it, or none, while its trainer goes on through the test.
//!
//! Copies predict every request before the trainer learns from it, with the weights that were published by then. They
//! are real ones: weights go through publisher, stream and follower into a model that is loaded for serving.

use std::{path::Path, sync::Arc, time::Duration};

use hypercast_fm::{
    inference::{self, FoundationModel, Serving},
    trainer::{self, FmTrainer},
};
use serde_json::{Value, json};

use super::{
    Ground, Outcome,
    report::{Pair, arms_by_task},
    store_dir,
    tally::Tally,
};
use crate::demo::Seconds;
use crate::error::{CommonErrors as _, Error, Result};
use crate::evaluate::stream::{Mode, Part};
use hypercast_config::{Config, PublishSettings};
use hypercast_stream::publish::{self, PublicationFollower, Publisher, TrainingPosition};
use hypercast_stream::streams::{MemoryEngine, StreamEngine, Topic};
use hypercast_train::{
    fm::{FIRST_VERSION, dataset_spec},
    report::ALL,
};

/// The arms, and the share of the weights that each gets in a publication.
const ARMS: [(&str, Option<f64>); 4] =
    [("everything", Some(1.0)), ("30 %", Some(0.3)), ("10 %", Some(0.1)), ("never", None)];

/// Runs it for every seed.
pub fn run(ground: &Ground<'_>, seconds: &mut Seconds) -> Result<Outcome> {
    if ground.options.mode == Mode::Fixed {
        return Err(Error::invalid(
            "publish: weights that stay as they are have nothing to publish; leave --mode fixed away",
        ));
    }
    let mut tallies = Vec::new();
    let mut sent = [Sent::default(); ARMS.len()];
    for &seed in &ground.options.seeds {
        let config = ground.seeded(seed);
        let mut tally = ground.tally(&ARMS.map(|(name, _)| name));
        seconds.time("fm", || follow(ground, &config, (&mut tally, &mut sent)))?;
        tallies.push(tally);
    }
    let found = ground.found(&tallies);
    let pairs: Vec<Pair> = (0..ARMS.len()).map(|arm| Pair { baseline: 0, arm }).collect();
    let mut rows = Vec::new();
    for cell in found.cells()? {
        rows.extend(seconds.time("bootstrap", || Ok(found.rows(&cell, &pairs)))?);
    }
    let mut table = arms_by_task(&rows, ALL);
    table += &format!(
        "\n\n{:<14}{:>14}{:>18}{:>16}\n",
        "arm", "publications", "% of all bytes", "MiB sent"
    );
    for ((name, _), sent) in ARMS.iter().zip(&sent) {
        table += &format!(
            "{name:<14}{:>14}{:>18.2}{:>16.1}\n",
            sent.publications,
            sent.share() * 100.0,
            sent.bytes as f64 / f64::from(1 << 20)
        );
    }
    let models = ARMS.iter().zip(&sent).map(|((name, _), sent)| sent.json(name)).collect();
    let chosen = json!({ "publish_minutes": ground.options.publish_minutes });
    Ok(Outcome { name: "publish", table, rows, models, chosen })
}

/// What an arm was sent, over all seeds.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    publications: u64,
    /// Bytes of weights and ids, and of all that there were.
    raw_bytes: u64,
    all_bytes: u64,
    /// Bytes of the records.
    bytes: u64,
}

impl Sent {
    fn share(&self) -> f64 {
        self.raw_bytes as f64 / (self.all_bytes as f64).max(1.0)
    }

    fn json(&self, arm: &str) -> Value {
        json!({
            "arm": arm, "publications": self.publications, "share_of_bytes": self.share(),
            "bytes": self.bytes,
        })
    }
}

/// The FM through past and test, with its copies from the test's beginning on.
fn follow(
    ground: &Ground<'_>,
    config: &Config,
    (tally, sent): (&mut Tally, &mut [Sent; ARMS.len()]),
) -> Result<()> {
    let spec = dataset_spec(ground.dataset)?;
    let names = &ground.dataset.schema.tasks;
    let place = |name: &str| names.iter().position(|task| task.name == name);
    let tasks: Vec<Option<usize>> = spec.main_tasks().iter().map(|own| place(&own.name)).collect();
    let dir = store_dir(config, "fm")?;
    let mut trainer = trainer::create(&dir.join("trainer"), &config.fm, &spec, config.device)?;
    let every_ms = (ground.options.publish_minutes * 6e4) as i64;
    let mut copies: Vec<Copy> = Vec::new();
    let mut next_ms = ground.window.test_from_ms;
    ground.stream(config, config.fm.max_history).run("FM", |part| {
        let time_ms = part.examples.first().map_or(i64::MIN, |first| first.time_ms);
        if !part.history_only && time_ms >= next_ms {
            match copies.is_empty() {
                true => copies = open(config, &mut *trainer, &dir)?,
                false => copies
                    .iter_mut()
                    .zip(&mut *sent)
                    .try_for_each(|(copy, sent)| copy.publish(&mut *trainer, sent))?,
            }
            next_ms = time_ms - time_ms.rem_euclid(every_ms) + every_ms;
        }
        for (arm, copy) in copies.iter().enumerate() {
            copy.predict(&part, &tasks, |target, task, said| tally.push(arm, target, task, said))?;
        }
        part.through(&mut *trainer, &|_| true).map(drop)
    })
}

/// A copy that serves.
struct Copy {
    fm: Arc<dyn FoundationModel>,
    /// None for one that gets nothing more.
    line: Option<Line>,
}

/// From the trainer to a copy.
struct Line {
    streams: Arc<MemoryEngine>,
    publisher: Publisher,
    follower: PublicationFollower,
}

/// The copies, all with what the trainer has now.
fn open(config: &Config, trainer: &mut dyn FmTrainer, dir: &Path) -> Result<Vec<Copy>> {
    let topic = Topic::fm(FIRST_VERSION);
    let serving = Serving { device: config.device, warm_histories: 0, ..Serving::default() };
    let copy = |&(name, share): &(&str, Option<f64>)| {
        let dir = dir.join(name);
        let streams = Arc::new(MemoryEngine::default());
        let settings = PublishSettings {
            share: share.unwrap_or(1.0),
            // Deltas alone, so that their bytes are what is compared.
            snapshot_every: u32::MAX,
            ..config.publish.clone()
        };
        let mut publisher =
            Publisher::open(streams.clone(), topic.clone(), settings, &dir.join("published"))?;
        publisher.publish(&trainer.trained(FIRST_VERSION)?, TrainingPosition::default())?;
        let checkpoint = dir.join("checkpoint");
        let (_, follower) = publish::bootstrap(streams.clone(), topic.clone(), &checkpoint)?
            .expect("a snapshot was published just now");
        let fm = inference::load_live(&checkpoint, &dir.join("rows"), serving)?;
        let line = share.is_some().then_some(Line { streams, publisher, follower });
        Ok(Copy { fm: Arc::from(fm), line })
    };
    ARMS.iter().map(copy).collect()
}

impl Copy {
    /// Brings what is new of the trainer's weights.
    fn publish(&mut self, trainer: &mut dyn FmTrainer, sent: &mut Sent) -> Result<()> {
        let Some(line) = &mut self.line else { return Ok(()) };
        let published = line
            .publisher
            .publish(&trainer.trained(FIRST_VERSION)?, TrainingPosition::default())?;
        sent.publications += 1;
        sent.raw_bytes += published.raw_bytes;
        sent.all_bytes += published.all_bytes;
        sent.bytes += published.bytes;
        while let Some(publication) = line.follower.next(Duration::ZERO)? {
            self.fm.update(publish::fm_update(publication)?)?;
        }
        let topic = Topic::fm(FIRST_VERSION);
        let end = line.streams.span(&topic)?.end;
        // The snapshot's records may go: nobody begins to follow any more.
        Ok(line.streams.trim(&topic, end)?)
    }

    /// What it says of a part's targets, before anybody learns from them.
    fn predict<'a>(
        &self,
        part: &Part<'a>,
        tasks: &[Option<usize>],
        mut push: impl FnMut((&'a hypercast_fm::example::Example, usize), usize, f32),
    ) -> Result<()> {
        let examples: Vec<_> = part.examples.iter().collect();
        let said = self.fm.infer(&examples)?.main;
        for (target, said) in super::targets(part).zip(said.chunks_exact(tasks.len())) {
            for (task, said) in tasks.iter().zip(said) {
                if let Some(task) = task {
                    push(target, *task, *said);
                }
            }
        }
        Ok(())
    }
}
