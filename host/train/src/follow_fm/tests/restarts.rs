//! A trainer that is killed between two saves: what it had passed, and what it was ordered to do.

use hypercast_config::OnGap;

use super::*;

/// A configuration that saves where it must alone, and publishes all.
fn config(work: &Path) -> Config {
    let mut config = super::config(work);
    config.fm.save_every_requests = 0;
    config.fm_gate.rows = 0;
    config.engine.on_gap = OnGap::Continue;
    config
}

/// Runs a trainer that is killed at a position of a stream that grows at its end.
fn kill(dataset: &Dataset, config: &Config, cut: Cut) {
    let killed = AssertUnwindSafe(|| run(dataset, config, Arc::new(cut), &Shutdown::default()));
    assert!(catch_unwind(killed).is_err());
}

fn place(config: &Config) -> FmCheckpoint {
    FmCheckpoint::read(&work_dir(config, "1.0.0")).unwrap().unwrap()
}

#[test]
fn missing_records_are_passed_once_by_a_killed_trainer() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, records) = world(dir.path());
    let config = config(&dir.path().join("work"));
    run(&dataset, &config, streams(&records[..60]), &Shutdown::default());
    let before = place(&config);
    assert_eq!(before.position(), 60);
    // A stream that is shorter now, and grows past where the trainer had stood.
    let shorter = streams(&records[100..140]);
    let grows = Arc::new(Mutex::new(records[140..200].to_vec()));
    kill(&dataset, &config, Cut { inner: shorter.clone(), at: 80, stop: None, grows });
    let behind = place(&config);
    assert_eq!((behind.position(), behind.requests), (0, before.requests));
    assert_eq!(behind.reread_until_ms, Some(before.until_ms));

    // What it publishes there may have learned from any record before the old position.
    let stop = Shutdown::default();
    let inner = shorter.clone();
    let cut = Cut { inner, at: 50, stop: Some(stop.clone()), grows: Arc::default() };
    let first = run(&dataset, &config, Arc::new(cut), &stop);
    let into = dir.path().join("served");
    let found = publish::bootstrap(shorter.clone(), Topic::fm("1.0.0"), &into).unwrap().unwrap();
    assert_eq!((found.0.header.trained_position, first.position < 60), (60, true));

    let report = run(&dataset, &config, shorter, &Shutdown::default());
    assert_eq!(report.position, 100);
    let learned = [first, report].map(|report| report.requests + report.corrections);
    assert_eq!(learned[0] + learned[1], 100, "each that it has now, once");
}

#[test]
fn what_is_ordered_while_a_trainer_that_never_saved_is_down_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, records) = world(dir.path());
    let config = config(&dir.path().join("work"));
    let engine = streams(&records[..40]);
    let own: Arc<dyn StreamEngine> = engine.clone();
    let reader = LetterReader::Trainer(Topic::fm("1.0.0"));
    let of = LetterScope { reader: &reader, source: "joined" };
    let stop = Shutdown::default();
    let queue = DeadLetterQueue::open(own, of, None, Arc::default(), stop).unwrap();
    let reason = "by hand".to_owned();
    let by_hand =
        UnusableRecord { position: 12, retries: 0, request: None, checksum: None, reason };
    queue.set_aside(vec![by_hand]).unwrap();
    engine.trim(&Topic::joined(), 10).unwrap();
    kill(
        &dataset,
        &config,
        Cut { inner: engine.clone(), at: 0, stop: None, grows: Arc::default() },
    );
    assert_eq!(place(&config).position(), 10, "where it began");

    dead_letters::retry(&*engine, 0).unwrap();
    run(&dataset, &config, engine.clone(), &Shutdown::default());
    let after = place(&config);
    assert_eq!((after.position(), after.requests + after.corrections), (40, 30 + 1));
}
