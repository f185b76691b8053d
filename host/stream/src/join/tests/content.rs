//! Content vectors that come by events: which ones examples refer to, and where readers find them.

use std::{path::Path, sync::Arc, time::Duration};

use hypercast_config::OnGap;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_fm::example::{Example, Item};

use super::runner::{NoMetrics, append_events, config};
use super::world::*;
use crate::events::{EventKind, EventRecord};
use crate::join::{ContentPlace, JoinedRecord, JoinerOutput, Runner, StateUpdate};
use crate::streams::{MemoryEngine, Record, StreamEngine, Topic};

/// The item and the first number of each vector, by its position; and the examples.
fn split(made: &JoinerOutput) -> (Vec<(usize, u64, f32)>, Vec<&Example>) {
    let vectors = made.joined.iter().enumerate().filter_map(|(at, joined)| match joined {
        JoinedRecord::Content(content) => Some((at, content.item, content.vector[0])),
        _ => None,
    });
    let examples = made.joined.iter().filter_map(JoinedRecord::joined);
    (vectors.collect(), examples.map(|joined| &joined.example).collect())
}

fn place(item: &Item) -> Option<u64> {
    ContentPlace::of(item).map(|place| place.0)
}

#[test]
fn requests_refer_to_the_vectors_that_their_items_had_then() {
    let dir = tempfile::tempdir().unwrap();
    let mut joiner = joiner(&dataset(dir.path()), settings());
    let events = [
        item(9, Some(1.0)),
        shown(7, 9, 0, 1000),
        item(9, Some(2.0)),
        // Its features alone; the vector stays.
        item(9, None),
        shown(8, 9, 0, 2000),
        shown(8, 1, 0, 2000),
        tick(100_000),
        // The same user as request 7.
        shown(12, 2, 0, 101_000),
        tick(300_000),
    ];
    let made = all(&mut joiner, &events);
    let (vectors, examples) = split(&made);
    assert_eq!(vectors, [(0, 9, 1.0), (1, 9, 2.0)]);
    let [first, second, third] = &examples[..] else { panic!("{examples:?}") };
    assert_eq!(place(&first.targets[0].item), Some(0), "as it was at the request, joined later");
    let places: Vec<_> = second.targets.iter().map(|target| place(&target.item)).collect();
    assert_eq!(places, [Some(1), None], "that of the data set needs no place");
    assert_eq!(place(&third.history[0].item), Some(1), "a history has the newest");
    let updates = made.outcomes.iter().filter_map(|outcome| match &outcome.update {
        StateUpdate::Item(item) => Some(item.content.first().copied()),
        _ => None,
    });
    assert_eq!(updates.collect::<Vec<_>>(), [Some(1.0), Some(2.0), None], "daemons get them");
}

#[test]
fn a_vector_that_is_far_back_is_repeated_when_it_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let mut joiner = joiner(&dataset(dir.path()), settings());
    all(&mut joiner, &[item(8, Some(1.0)), item(9, Some(2.0)), shown(7, 9, 0, 1000), tick(90_000)]);
    joiner.counts.joined = 1 << 17;
    // Item 9 is in the user's history, and 8 is not needed.
    let events = [shown(12, 2, 0, 100_000), shown(13, 9, 0, 100_000), tick(200_000)];
    let made = all(&mut joiner, &events);
    let (vectors, examples) = split(&made);
    assert_eq!(vectors, [(0, 9, 2.0)]);
    let [first, second] = &examples[..] else { panic!("{examples:?}") };
    assert_eq!(place(&first.history[0].item), Some(1 << 17));
    assert_eq!(place(&second.targets[0].item), Some(1 << 17), "once");
}

#[test]
fn vectors_of_another_width_and_beyond_the_bound_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let wide = |id: u64, width: usize| -> EventRecord {
        let content = vec![0.5; width].into();
        event(EventKind::Item(Item { id, ids: vec![77], content, ..Item::default() }))
    };
    let mut joiner = joiner(&data, settings());
    let made = all(&mut joiner, &[wide(9, 4), wide(9, 3)]);
    assert_eq!((joiner.counts.refused, made.outcomes.len()), (1, 1));
    // One MiB has 63 vectors of 4096 numbers, with what else each takes.
    let mut joiner = super::world::joiner(&data, settings()).with_content(4096);
    joiner.content_limits.max_mib = 1;
    let many: Vec<EventRecord> = (1..=70).map(|id| wide(id, 4096)).collect();
    let made = all(&mut joiner, &many);
    assert_eq!((made.joined.len(), joiner.counts.refused), (63, 7));
    let made = all(&mut joiner, &[wide(63, 4096), wide(65, 4096), item(65, None)]);
    let refused = joiner.counts.refused;
    assert_eq!((made.joined.len(), made.outcomes.len(), refused), (1, 2, 8), "it may change");
}

/// Joins all events that streams have, however many records are missing.
fn join_all(dir: &Path, data: &Dataset, streams: &Arc<MemoryEngine>) {
    let mut config = config(dir);
    config.engine.on_gap = OnGap::Continue;
    let (settings, metrics) = (config.joiner().unwrap(), Arc::new(NoMetrics));
    let stop = Shutdown::default();
    let mut runner = Runner::open(streams.clone(), &settings, data, metrics, stop).unwrap();
    while runner.step(Duration::ZERO).unwrap() > 0 {}
    runner.save().unwrap();
}

fn append_joined(streams: &MemoryEngine, joined: &[JoinedRecord]) {
    let payloads = joined.iter().map(|own| postcard::to_allocvec(own).unwrap());
    let records: Vec<Record> = payloads.map(|payload| Record { id: 0, payload }).collect();
    streams.appender(&Topic::joined()).unwrap().append(&records).unwrap();
}

/// The number of items in examples, each of which refers to a vector of its own.
fn items_with_vectors(streams: &MemoryEngine) -> usize {
    let mut reader = streams.reader(&Topic::joined(), 0).unwrap();
    let stored = reader.next(1 << 20, Duration::ZERO).unwrap();
    let joined: Vec<JoinedRecord> =
        stored.iter().map(|record| JoinedRecord::decode(&record.payload).unwrap()).collect();
    let mut items = 0;
    for example in joined.iter().filter_map(JoinedRecord::joined).map(|joined| &joined.example) {
        let history = example.history.iter().map(|event| &event.item);
        for item in history.chain(example.targets.iter().map(|target| &target.item)) {
            let at = place(item).expect("its vector came by an event") as usize;
            let JoinedRecord::Content(content) = &joined[at] else { panic!("{:?}", joined[at]) };
            assert_eq!(content.item, item.id, "at {at}");
            items += 1;
        }
    }
    items
}

#[test]
fn vectors_whose_records_are_lost_or_have_other_positions_are_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let told = [item(8, Some(1.0)), item(9, Some(2.0))];
    let events = [shown(7, 8, 0, 1000), tick(90_000), shown(12, 9, 0, 100_000), tick(300_000)];
    // The stream loses its last record, and the next example gets its position.
    let whole = Arc::new(MemoryEngine::default());
    append_events(&whole, &told);
    let state = dir.path().join("lost");
    join_all(&state, &data, &whole);
    let lost = Arc::new(MemoryEngine::default());
    append_joined(&lost, &all(&mut joiner(&data, settings()), &told).joined[..1]);
    for events in [&told[..], &events] {
        append_events(&lost, events);
    }
    join_all(&state, &data, &lost);
    assert_eq!(items_with_vectors(&lost), 3);
    // The stream has other records than are made again, which then get positions behind them.
    let other = Arc::new(MemoryEngine::default());
    let others = [item(9, Some(3.0)), item(8, Some(4.0))];
    append_joined(&other, &all(&mut joiner(&data, settings()), &others).joined);
    for events in [&told[..], &events] {
        append_events(&other, events);
    }
    join_all(&dir.path().join("other"), &data, &other);
    assert_eq!(items_with_vectors(&other), 3);
}

#[test]
fn the_bound_changes_only_after_the_records_of_the_old_one_are_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let mut config = config(dir.path());
    // Only the first state is saved.
    config.join.save_every_events = 1 << 40;
    let memory = Arc::new(MemoryEngine::default());
    append_events(&memory, &[item(8, Some(1.0)), item(9, Some(2.0))]);
    let end = || memory.span(&Topic::joined()).unwrap().end;
    for max_content_mib in [1, 0] {
        config.features.max_content_mib = max_content_mib;
        let (settings, metrics) = (config.joiner().unwrap(), Arc::new(NoMetrics));
        let stop = Shutdown::default();
        let mut runner = Runner::open(memory.clone(), &settings, &data, metrics, stop).unwrap();
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        assert_eq!(end(), 2, "each written once, with the first bound");
        if max_content_mib == 0 {
            append_events(&memory, &[item(7, Some(3.0))]);
            while runner.step(Duration::ZERO).unwrap() > 0 {}
            assert_eq!(end(), 2, "there is no room for another");
        }
    }
}
