//! What publishing a share of the weights costs: NE of servers that follow shares of a streaming trainer's weights,
//! beside one that gets everything; bytes; and what updates do to the latency of answers.
//!
//! ```text
//! cargo run --release -p hypercast --example publish_share -- DATASET [REQUESTS [EVERY]]
//! ```
//!
//! The trainer goes once over the data set's last requests and publishes after every EVERY batches; each server
//! predicts a batch before the trainer learns from it, with the weights that were published last.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use hypercast::{
    config::{Config, PublishSettings},
    dataset::{Dataset, timeline::Span},
    engine::{Memory, Topic},
    features::replay::{Replay, ReplayOptions},
    publish::{Facts, Follower, Publisher, bootstrap, fm_update},
    train::fm::dataset_spec,
};
use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    inference::{self, FoundationModel, Serving},
    metrics::cross_entropy,
    trainer,
};

/// A server that follows a share.
struct Arm {
    share: f64,
    publisher: Publisher,
    follower: Follower,
    fm: Box<dyn FoundationModel>,
    /// The sum of cross-entropies and the rows of the first task.
    entropy: (f64, u64),
    raw_bytes: u64,
    bytes: u64,
    all_bytes: u64,
    updates_ms: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().context("the first argument is a data set's directory")?;
    let requests: usize = args.next().map_or(Ok(20_000), |text| text.parse())?;
    let every: usize = args.next().map_or(Ok(8), |text| text.parse())?;
    let dataset = Dataset::open(Path::new(&path))?;
    let config = Config::default();
    let spec = dataset_spec(&dataset)?;
    let dir = tempfile::tempdir()?;
    let mut trainer =
        trainer::create(&dir.path().join("trainer"), &config.fm, &spec, DeviceKind::Cpu)?;
    let options = ReplayOptions {
        span: Span { from_ms: None, until_ms: None },
        history_len: config.fm.max_history,
        max_targets: config.fm.max_targets,
        features: config.features,
    };
    let examples: Vec<Example> =
        Replay::new(&dataset, options)?.take(requests).collect::<Result<_, _>>()?;
    let batches: Vec<&[Example]> = examples.chunks(config.fm.batch_requests).collect();
    let (past, stream) = batches.split_at(batches.len() / 2);
    for batch in past {
        trainer.step(&batch.iter().collect::<Vec<_>>())?;
    }
    println!("{} requests learned from; {} to follow", past.len() * 64, stream.len() * 64);
    let facts = Facts::default();
    let mut arms = Vec::new();
    for share in [1.0, 0.3, 0.2, 0.1] {
        let engine = Arc::new(Memory::default());
        let topic = Topic::fm(&format!("{share}"));
        let settings = PublishSettings { share, ..PublishSettings::default() };
        let at = |name: &str| -> PathBuf { dir.path().join(format!("{name}-{share}")) };
        let mut publisher =
            Publisher::open(engine.clone(), topic.clone(), settings, &at("published"))?;
        publisher.publish(&trainer.trained("1.0.0")?, facts)?;
        let begun = bootstrap(engine, topic, &at("fm"))?.context("a snapshot was published")?;
        let fm = inference::load_live(&at("fm"), &at("live"), Serving::default())?;
        let (entropy, updates_ms) = ((0.0, 0), Vec::new());
        let (raw_bytes, bytes, all_bytes) = (0, 0, 0);
        let follower = begun.1;
        arms.push(Arm {
            share,
            publisher,
            follower,
            fm,
            entropy,
            raw_bytes,
            bytes,
            all_bytes,
            updates_ms,
        });
    }
    let mut positives = 0u64;
    for (number, batch) in stream.iter().enumerate() {
        let batch: Vec<&Example> = batch.iter().collect();
        let labels = trainer.predict(&batch)?;
        let (main, all) = (spec.main_tasks().len(), spec.tasks.len());
        for arm in &mut arms {
            let said = arm.fm.infer(&batch)?;
            for row in 0..labels.mask.len() / all {
                if labels.mask[row * all] {
                    let label = labels.labels[row * all] > 0.5;
                    arm.entropy.0 += cross_entropy(said.main[row * main], label);
                    arm.entropy.1 += 1;
                    positives += u64::from(label && arm.share == 1.0);
                }
            }
        }
        trainer.step(&batch)?;
        if (number + 1) % every == 0 {
            for arm in &mut arms {
                let published = arm.publisher.publish(&trainer.trained("1.0.0")?, facts)?;
                arm.raw_bytes += published.raw_bytes;
                arm.bytes += published.bytes;
                arm.all_bytes += published.all_bytes;
                while let Some(publication) = arm.follower.next(Duration::ZERO)? {
                    let update = fm_update(publication)?;
                    let started = Instant::now();
                    arm.fm.update(update)?;
                    arm.updates_ms.push(started.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
    }
    let rows = arms[0].entropy.1;
    let rate = positives as f64 / rows as f64;
    let base = -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln());
    let ne = |arm: &Arm| arm.entropy.0 / rows as f64 / base;
    let whole = ne(&arms[0]);
    println!("{} of {rows} rows; size {:?}", spec.tasks[0].name, trainer.size());
    for arm in &arms {
        let mut updates = arm.updates_ms.clone();
        updates.sort_by(f64::total_cmp);
        println!(
            "share {:.2}: NE {:.6} ({:+.4} %), {:.1} % of the bytes, {:.1} % after zstd, {} updates of {:.1} ms (p50) and {:.1} ms (max)",
            arm.share,
            ne(arm),
            (ne(arm) / whole - 1.0) * 100.0,
            arm.raw_bytes as f64 / arm.all_bytes as f64 * 100.0,
            arm.bytes as f64 / arm.all_bytes as f64 * 100.0,
            updates.len(),
            updates[updates.len() / 2],
            updates[updates.len() - 1],
        );
    }
    latency(&mut *trainer, &examples, dir.path())
}

/// p99 of answers of 32 candidates, one request every 10 ms, with a publication a second and without.
fn latency(
    trainer: &mut dyn trainer::FmTrainer,
    examples: &[Example],
    dir: &Path,
) -> anyhow::Result<()> {
    let engine = Arc::new(Memory::default());
    let topic = Topic::fm("latency");
    let mut publisher = Publisher::open(
        engine.clone(),
        topic.clone(),
        PublishSettings::default(),
        &dir.join("published"),
    )?;
    publisher.publish(&trainer.trained("1.0.0")?, Facts::default())?;
    let (_, mut follower) = bootstrap(engine, topic, &dir.join("fm"))?.context("a snapshot")?;
    let fm = inference::load_live(&dir.join("fm"), &dir.join("live"), Serving::default())?;
    let asked: Vec<&Example> = examples.iter().rev().take(2000).collect();
    // The publications are made beforehand: training on the same cores is not what is measured.
    let mut updates = Vec::new();
    for batch in examples.chunks(64).take(100) {
        trainer.step(&batch.iter().collect::<Vec<_>>())?;
        publisher.publish(&trainer.trained("1.0.0")?, Facts::default())?;
        updates.push(fm_update(follower.next(Duration::ZERO)?.context("it was published")?)?);
    }
    for (name, updates) in [("no", Vec::new()), ("100", updates), ("no", Vec::new())] {
        let ended = AtomicBool::new(false);
        let mut times: Vec<f64> = Vec::new();
        std::thread::scope(|scope| -> anyhow::Result<()> {
            let (fm, stopped) = (&fm, &ended);
            let updating = scope.spawn(move || {
                for update in updates {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    fm.update(update).expect("it fits");
                    std::thread::sleep(Duration::from_millis(500));
                }
            });
            let started = Instant::now();
            for at in 0..5000u32 {
                std::thread::sleep(
                    (at * Duration::from_millis(10)).saturating_sub(started.elapsed()),
                );
                let asked_at = Instant::now();
                fm.infer(&[asked[at as usize % asked.len()]])?;
                times.push(asked_at.elapsed().as_secs_f64() * 1e3);
            }
            ended.store(true, Ordering::Relaxed);
            updating.join().expect("it does not panic");
            Ok(())
        })?;
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[(times.len() as f64 * share) as usize];
        println!(
            "{name} updates in 50 s: p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms; cache {:?}",
            at(0.5),
            at(0.99),
            at(0.999),
            fm.cache_counts()
        );
    }
    Ok(())
}
