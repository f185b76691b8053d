//! The cost of component-wise publishing (paper section 3.3.4): serving copies of one FM receive
//! all of each publication, a share of it, or nothing, while the trainer learns during the test.
//!
//! Copies predict every request before the trainer learns from it, with the weights that were
//! published by then. Weights go through publisher, stream and follower into a model that is loaded
//! for serving.

use std::{path::Path, sync::Arc, time::Duration};

use hypercast_config::{Config, PublishSettings};
use hypercast_core::{atomic_dir, text_table::TextTable};
use hypercast_fm::{
    inference::{self, FmServingOptions, FoundationModel},
    trainer::FmTrainer,
};
use hypercast_stream::{
    publish::{self, PublicationFollower, Publisher, TrainingPosition},
    streams::{MemoryEngine, StreamEngine, Topic},
};
use hypercast_train::{
    fm::{FIRST_VERSION, dataset_spec},
    report::ALL,
};
use serde_json::{Value, json};

use super::{ExperimentContext, ExperimentReport, report::arms_by_task, transfer::FmHeads};
use crate::{
    error::{CommonErrors as _, Error, Result},
    evaluate::stream::TestMode,
    tally::ScoreTally,
};

/// The arms, and the share of the weights that each receives in a publication.
const ARMS: [(&str, Option<f64>); 4] =
    [("everything", Some(1.0)), ("30 %", Some(0.3)), ("10 %", Some(0.1)), ("never", None)];

/// Runs it for every seed.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    if context.options.setup.mode == TestMode::Fixed {
        return Err(Error::invalid(
            "publish: fixed weights have nothing to publish; run without --mode fixed",
        ));
    }
    let mut sent = [PublishedBytes::default(); ARMS.len()];
    let tallies = context.tallies(&ARMS.map(|(name, _)| name), |config, tally| {
        context.times.time("fm", || follow(context, config, tally, &mut sent))
    })?;
    let rows = context.rows(&tallies, None)?;
    let mut table = arms_by_task(&rows, ALL);
    let mut bytes = TextTable::new(1, ["arm", "publications", "% of all bytes", "MiB sent"]);
    for ((name, _), sent) in ARMS.iter().zip(&sent) {
        let (share, mib) = (sent.share() * 100.0, sent.bytes as f64 / f64::from(1 << 20));
        let publications = sent.publications.to_string();
        bytes.line([name.to_string(), publications, format!("{share:.2}"), format!("{mib:.1}")]);
    }
    table += &format!("\n\n{bytes}");
    let models = ARMS.iter().zip(&sent).map(|((name, _), sent)| sent.json(name)).collect();
    let chosen = json!({ "publish_minutes": context.options.publish_minutes });
    Ok(context.report(table, rows, models, chosen))
}

/// What was published to an arm, over all seeds.
#[derive(Debug, Clone, Copy, Default)]
struct PublishedBytes {
    publications: u64,
    /// Bytes of published weights and ids, and of all weights and ids.
    raw_bytes: u64,
    all_bytes: u64,
    /// Bytes of the records, compressed.
    bytes: u64,
}

impl PublishedBytes {
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

/// Runs the FM over the stream, with its copies from the test's beginning on.
fn follow(
    context: &ExperimentContext<'_>,
    config: &Config,
    tally: &mut ScoreTally,
    sent: &mut [PublishedBytes; ARMS.len()],
) -> Result<()> {
    let spec = dataset_spec(context.dataset)?;
    let heads = FmHeads::new(spec.main_tasks(), context);
    let dir = config.paths.fm_work.join("fm");
    atomic_dir::remove(&dir)?;
    let mut trainer = context.fm(config, "fm/trainer", &config.fm, &spec)?;
    let every_ms = (context.options.publish_minutes * 6e4) as i64;
    let mut copies: Vec<ServingCopy> = Vec::new();
    let mut next_ms = context.window.test_from_ms;
    context.stream(config, config.fm.max_history).run("FM", |part| {
        let time_ms = part.examples.first().map_or(i64::MIN, |first| first.time_ms);
        if !part.history_only && time_ms >= next_ms {
            if copies.is_empty() {
                copies = open(config, &mut *trainer, &dir)?;
            } else {
                for (copy, sent) in copies.iter_mut().zip(&mut *sent) {
                    copy.publish(&mut *trainer, sent)?;
                }
            }
            next_ms = time_ms - time_ms.rem_euclid(every_ms) + every_ms;
        }
        let core = part.core.examples(part.examples);
        for (arm, copy) in copies.iter().enumerate() {
            let served: Vec<_> = core.iter().map(|example| spec.served_example(example)).collect();
            let examples: Vec<_> = served.iter().map(|example| &**example).collect();
            heads.tally(&part, arm, &copy.fm.infer(&examples)?.main, tally);
        }
        part.through(&mut *trainer, &|_| true).map(drop)
    })
}

/// A copy of the FM for serving, and the way from the trainer to it.
struct ServingCopy {
    fm: Arc<dyn FoundationModel>,
    /// Whether it receives anything after the snapshot.
    receives: bool,
    streams: Arc<MemoryEngine>,
    publisher: Publisher,
    follower: PublicationFollower,
}

/// The copies, all with the trainer's present weights.
fn open(config: &Config, trainer: &mut dyn FmTrainer, dir: &Path) -> Result<Vec<ServingCopy>> {
    let topic = Topic::fm(FIRST_VERSION);
    let serving = FmServingOptions {
        device: config.device,
        warmup_histories: 0,
        ..FmServingOptions::default()
    };
    let copy = |&(name, share): &(&str, Option<f64>)| {
        let dir = dir.join(name);
        let streams = Arc::new(MemoryEngine::default());
        let settings = PublishSettings {
            share: share.unwrap_or(1.0),
            // Only deltas, so that their bytes are compared.
            snapshot_every: u32::MAX,
            ..config.publish.clone()
        };
        let mut publisher =
            Publisher::open(streams.clone(), topic.clone(), settings, &dir.join("published"))?;
        publisher.publish(&trainer.trained_weights(FIRST_VERSION)?, TrainingPosition::default())?;
        let checkpoint = dir.join("checkpoint");
        let (_, follower) = publish::bootstrap(streams.clone(), topic.clone(), &checkpoint)?
            .expect("a snapshot was published just now");
        let fm = inference::load_updatable(&checkpoint, &dir.join("rows"), serving.clone())?;
        let (fm, receives) = (Arc::from(fm), share.is_some());
        Ok(ServingCopy { fm, receives, streams, publisher, follower })
    };
    ARMS.iter().map(copy).collect()
}

impl ServingCopy {
    /// Publishes the trainer's changed weights to the copy.
    fn publish(&mut self, trainer: &mut dyn FmTrainer, sent: &mut PublishedBytes) -> Result<()> {
        if !self.receives {
            return Ok(());
        }
        let published = self
            .publisher
            .publish(&trainer.trained_weights(FIRST_VERSION)?, TrainingPosition::default())?;
        sent.publications += 1;
        sent.raw_bytes += published.raw_bytes;
        sent.all_bytes += published.all_bytes;
        sent.bytes += published.bytes;
        while let Some(publication) = self.follower.next(Duration::ZERO)? {
            self.fm.update(publish::fm_update(publication)?)?;
        }
        let topic = Topic::fm(FIRST_VERSION);
        let end = self.streams.span(&topic)?.end;
        // The snapshot's records are no longer needed: no new follower begins.
        Ok(self.streams.trim(&topic, end)?)
    }
}
