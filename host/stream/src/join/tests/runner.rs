//! The joiner at work: killed at any moment, between any two records of its
//! streams, it goes on so that each record is there once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::world::*;
use crate::engine::{Appended, Appender, Engine, Memory, Reader, Record, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use crate::ingest::Told;
use crate::join::{Joined, NoMetrics, Outcome, Runner};
use hypercast_config::Config;
use hypercast_core::shutdown::Shutdown;

/// Streams of which those of the joiner fail after so many records, as those of a process that is killed do.
struct Mortal {
    streams: Arc<Memory>,
    left: Arc<AtomicI64>,
}

struct MortalAppender {
    to: Arc<dyn Appender>,
    left: Arc<AtomicI64>,
}

impl Engine for Mortal {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        let to = self.streams.appender(topic)?;
        Ok(Arc::new(MortalAppender { to, left: self.left.clone() }))
    }

    fn reader(&self, topic: &Topic, from: u64) -> Result<Box<dyn Reader>> {
        self.streams.reader(topic, from)
    }

    fn span(&self, topic: &Topic) -> Result<std::ops::Range<u64>> {
        self.streams.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.streams.trim(topic, before)
    }
}

impl Appender for MortalAppender {
    fn append(&self, records: &[Record]) -> Result<Appended> {
        self.to.append(records)
    }

    fn append_at(&self, end: u64, records: &[Record]) -> Result<Option<Appended>> {
        let left = self.left.fetch_sub(records.len() as i64, Ordering::Relaxed).max(0) as usize;
        if left >= records.len() {
            return self.to.append_at(end, records);
        }
        // A part of the batch is there, and nobody is told.
        self.to.append_at(end, &records[..left])?;
        Err(Error::invalid("killed"))
    }
}

fn config(dir: &std::path::Path) -> Config {
    let mut config = Config { join: settings(), ..Config::default() };
    config.paths.state = dir.join("state");
    (config.fm.max_history, config.fm.max_targets) = (8, 4);
    config.join.save_every_events = 64;
    config
}

fn told(streams: &Memory, facts: &[crate::ingest::Fact]) {
    let record = |fact: &crate::ingest::Fact| {
        let told = Told { id: None, what: fact.what.clone() };
        Record { id: 0, ..told.record(fact.ingested_ms).unwrap() }
    };
    let records: Vec<Record> = facts.iter().map(record).collect();
    streams.appender(&Topic::events()).unwrap().append(&records).unwrap();
}

/// Everything in the joiner's streams.
fn streams(memory: &Memory) -> (Vec<String>, Vec<String>) {
    let read = |topic: &Topic| {
        let end = memory.span(topic).unwrap().end as usize;
        let mut reader = memory.reader(topic, 0).unwrap();
        let mut payloads = Vec::new();
        while payloads.len() < end {
            let stored = reader.next(1 << 20, Duration::ZERO).unwrap();
            payloads.extend(stored.into_iter().map(|record| record.payload));
        }
        payloads
    };
    let joined = read(&Topic::joined());
    let outcomes = read(&Topic::outcomes());
    (
        joined.iter().map(|payload| format!("{:?}", Joined::decode(payload).unwrap())).collect(),
        outcomes.iter().map(|payload| format!("{:?}", Outcome::decode(payload).unwrap())).collect(),
    )
}

#[test]
fn a_joiner_that_is_killed_at_any_moment_makes_each_record_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    for seed in 0..10 {
        let facts = random(seed, 150);
        let expected = texts(&all(&mut joiner(&data, settings()), &facts));
        let config = config(&dir.path().join(seed.to_string()));
        let memory = Arc::new(Memory::default());
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut from, mut kills) = (0, 0);
        while from < facts.len() || streams(&memory) != expected {
            let until = (from + rng.random_range(0..200)).min(facts.len());
            told(&memory, &facts[from..until]);
            from = until;
            let left = Arc::new(AtomicI64::new(rng.random_range(0..150)));
            let engine = Arc::new(Mortal { streams: memory.clone(), left });
            // It is told to stop, so it does not wait for an engine that is not coming back.
            let stop = Shutdown::default();
            stop.request();
            let mut runner =
                Runner::open(engine, &config.joiner().unwrap(), &data, Arc::new(NoMetrics), stop)
                    .unwrap();
            let end = memory.span(&Topic::events()).unwrap().end;
            while runner.passed().events < end {
                if runner.step(Duration::ZERO).is_err() {
                    kills += 1;
                    break;
                }
            }
            if rng.random_bool(0.2) && runner.passed().events == end {
                runner.run(|_| {}).unwrap();
            }
        }
        assert!(kills > 2, "seed {seed}: {kills} kills");
    }
}

#[test]
fn a_state_without_its_streams_is_refused_and_so_is_another_writer() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let config = config(dir.path());
    let memory = Arc::new(Memory::default());
    let open = |streams: &Arc<Memory>, config: &Config| {
        let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
        Runner::open(streams.clone(), &config.joiner().unwrap(), &data, metrics, stop)
    };
    told(&memory, &random(1, 40));
    let mut runner = open(&memory, &config).unwrap();
    let held = open(&memory, &config).err().unwrap().to_string();
    assert!(held.contains(&format!("process {}", std::process::id())), "{held}");
    while runner.step(Duration::ZERO).unwrap() > 0 {}
    runner.save().unwrap();
    memory
        .appender(&Topic::joined())
        .unwrap()
        .append(&[Record { id: 0, payload: vec![0] }])
        .unwrap();
    told(&memory, &[shown(1000, 1, 0, (1 << 52) + 1), tick(1 << 53)]);
    let error = runner.step(Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("another joiner writes"), "{error}");
    drop(runner);
    let lost = open(&Arc::new(Memory::default()), &config).err().unwrap().to_string();
    assert!(lost.contains("restore"), "{lost}");
    let mut other = config.clone();
    other.timeline.until = "2022-01-01".into();
    let error = open(&memory, &other).err().unwrap().to_string();
    assert!(
        error.contains("another data set") && error.contains("move the folder away"),
        "{error}"
    );
}

#[test]
fn settings_change_only_after_what_was_made_by_the_old_ones_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let facts = random(5, 150);
    let expected = texts(&all(&mut joiner(&data, settings()), &facts));
    let mut config = config(dir.path());
    // Nothing is saved but what it begins with.
    config.join.save_every_events = 1 << 40;
    let memory = Arc::new(Memory::default());
    told(&memory, &facts);
    for windows in [60, 2] {
        config.join.first_window_s = windows;
        let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
        let mut runner =
            Runner::open(memory.clone(), &config.joiner().unwrap(), &data, metrics, stop).unwrap();
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        assert_eq!(streams(&memory), expected, "made once, by the first settings");
    }
}
