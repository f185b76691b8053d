//! The state machine: windows, early joins, corrections, orphans and bounds, and that a saved
//! joiner continues with the same output at any point.

use std::collections::{BTreeMap, BTreeSet};

use hypercast_data::dataset::{ContextFeatures, Impression};
use hypercast_data::ranked_place::RankedPlace;
use hypercast_fm::example::Example;

use super::world::*;
use crate::events::EventKind;
use crate::join::{
    JoinedRecord, Joiner, JoinerOutput, StateUpdate,
    saved::{SavedContents, SavedJoiner},
};

/// The item, actions and known actions of each target.
type TargetOutcomes = Vec<(u64, u64, u64)>;

/// The request and targets of each example.
fn examples(made: &JoinerOutput) -> Vec<(u64, TargetOutcomes)> {
    let of = |joined: &JoinedRecord| match joined {
        JoinedRecord::Example(joined) => {
            let targets = joined.example.targets.iter();
            let targets = targets.map(|t| (t.item.id, t.outcome.actions, t.outcome.known));
            Some((joined.example.request, targets.collect()))
        }
        JoinedRecord::Correction(_) | JoinedRecord::Content(_) => None,
    };
    made.joined.iter().filter_map(of).collect()
}

fn corrections(made: &JoinerOutput) -> Vec<(u64, u64, u64)> {
    let of = |joined: &JoinedRecord| match joined {
        JoinedRecord::Correction(joined) => {
            let [target] = &joined.example.targets[..] else { panic!("one target was changed") };
            Some((target.item.id, target.outcome.actions, target.outcome.known))
        }
        JoinedRecord::Example(_) | JoinedRecord::Content(_) => None,
    };
    made.joined.iter().filter_map(of).collect()
}

#[test]
fn an_event_with_a_time_out_of_range_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let mut joiner = joiner(&dataset(dir.path()), settings());
    all(&mut joiner, &[shown(7, 1, 0, 1000), acted(7, 1, 2000, CLICK, CLICK)]);
    for time_ms in [i64::MIN, i64::MAX, (1 << 53) + 1] {
        let made = all(
            &mut joiner,
            &[shown(8, 1, 0, time_ms), acted(7, 1, time_ms, LIKE, LIKE), tick(time_ms)],
        );
        assert!(made.joined.is_empty());
    }
    assert_eq!(joiner.counts.refused, 9);
    let made = all(&mut joiner, &[tick(100_000)]);
    assert_eq!(examples(&made).len(), 1, "the joiner continues");
}

#[test]
fn an_event_of_a_schema_with_other_context_features_is_joined_without_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut joiner = joiner(&dataset(dir.path()), settings());
    let before = ContextFeatures { ids: vec![], dense: vec![0.5] };
    let mut one = shown(7, 1, 0, 1000);
    if let EventKind::Impression(shown) = &mut one.kind {
        shown.context = before.clone();
    }
    let row = Impression { context: before, ..whole(8, 2, 1000) };
    let other = event(EventKind::CompleteRequest(vec![row]));
    let made = all(&mut joiner, &[one, other, tick(100_000)]);
    assert_eq!(examples(&made).len(), 2);
    let contexts = made.outcomes.iter().map(|outcome| match &outcome.update {
        StateUpdate::Outcome(row) => &row.context,
        other => panic!("{other:?}"),
    });
    assert!(contexts.eq([&ContextFeatures::default(); 2]));
    assert_eq!(joiner.counts.refused, 0);
}

#[test]
fn an_action_that_the_schema_lacks_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let mut joiner = joiner(&dataset(dir.path()), settings());
    all(&mut joiner, &[shown(7, 1, 0, 1000)]);
    // As an event of a schema with three actions, before or after its impression.
    let foreign = 1 << 2;
    for request in [7, 8] {
        let made = all(&mut joiner, &[acted(request, 1, 2000, foreign, foreign | CLICK)]);
        assert!(made.joined.is_empty() && made.outcomes.is_empty());
    }
    all(&mut joiner, &[acted(7, 1, 2000, 0, 1 << 63)]);
    assert_eq!((joiner.counts.refused, joiner.held()), (3, (1, 0)));
    let made = all(&mut joiner, &[shown(8, 1, 0, 1000), tick(100_000)]);
    assert_eq!(examples(&made).len(), 2, "the joiner continues");
}

#[test]
fn a_request_is_joined_with_its_last_window_or_as_soon_as_all_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, settings());
    let both = CLICK | LIKE;
    let made =
        all(&mut joiner, &[shown(7, 1, 0, 1000), shown(7, 2, 0, 1000), shown(8, 3, 1, 1000)]);
    assert!(made.joined.is_empty());
    // Everything that can happen on surface 1 is known: it does not wait for likes.
    let made = all(&mut joiner, &[acted(8, 3, 2000, 0, CLICK)]);
    assert_eq!(examples(&made), [(8, vec![(3, 0, CLICK)])]);
    let made = all(&mut joiner, &[acted(7, 1, 3000, both, both), tick(60_999)]);
    assert!(made.joined.is_empty(), "the other item's window is open");
    let made = all(&mut joiner, &[tick(61_000)]);
    assert_eq!(examples(&made), [(7, vec![(1, both, both), (2, 0, both)])]);
    let known: Vec<(u64, i64, u64)> = made
        .outcomes
        .iter()
        .map(|outcome| match &outcome.update {
            StateUpdate::Outcome(row) => (row.item, row.outcome_ms, row.outcome.actions),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(known, [(1, 61_000, both), (2, 61_000, 0)]);
    let mut complete = acted(9, 1, 70_000, CLICK, CLICK);
    if let EventKind::Action(reaction) = &mut complete.kind {
        reaction.complete = true;
        reaction.outcome.values[0] = 2.5;
    }
    let made = all(&mut joiner, &[shown(9, 1, 0, 69_000), complete]);
    assert_eq!(examples(&made), [(9, vec![(1, CLICK, both)])]);
    assert_eq!(made.joined[0].joined().unwrap().example.targets[0].outcome.values[0], 2.5);
}

#[test]
fn windows_follow_delays() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, settings());
    let mut now = 0;
    for request in 1..=300 {
        now = request as i64 * 10_000;
        let clicked = acted(request, 1, now + 4000, CLICK, CLICK);
        all(&mut joiner, &[shown(request, 1, 0, now), clicked]);
    }
    // Likes are rare: they wait as clicks do, 4 s and what a bucket adds.
    let made = all(&mut joiner, &[shown(1000, 2, 0, now + 10_000), tick(now + 13_900)]);
    assert!(examples(&made).iter().all(|(request, _)| *request != 1000));
    let made = all(&mut joiner, &[tick(now + 15_000)]);
    assert_eq!(examples(&made).last().unwrap().0, 1000);
}

#[test]
fn late_outcomes_correct_and_later_ones_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, settings());
    all(&mut joiner, &[shown(7, 1, 0, 0), tick(60_000)]);
    let before = joiner.state.fetch(&ask(1), 8);
    let made = all(&mut joiner, &[acted(7, 1, 100_000, CLICK, CLICK | LIKE)]);
    assert_eq!(corrections(&made), [(1, CLICK, CLICK)], "a like that did not happen is not new");
    let StateUpdate::Corrected(row) = &made.outcomes[0].update else {
        panic!("{:?}", made.outcomes)
    };
    assert_eq!((row.outcome.actions, row.outcome.known), (CLICK, CLICK | LIKE));
    let after = joiner.state.fetch(&ask(1), 8);
    assert_eq!(after.history[0].outcome.actions, CLICK);
    let rate = |example: &hypercast_fm::example::Example| example.targets[0].features[0];
    assert!(rate(&after) > rate(&before), "its counter moved");
    assert_eq!(
        after.targets[0].features[1], before.targets[0].features[1],
        "and counts no impression twice"
    );
    assert!(all(&mut joiner, &[acted(7, 1, 100_001, CLICK, CLICK)]).joined.is_empty());
    assert_eq!(joiner.counts.unchanged, 1);
    let made = all(&mut joiner, &[tick(3_700_000), acted(7, 1, 3_700_001, LIKE, LIKE)]);
    assert!(made.joined.is_empty() && made.outcomes.is_empty());
    assert_eq!((joiner.counts.late, joiner.held()), (1, (0, 0)));
    assert!(all(&mut joiner, &[shown(7, 1, 0, 0)]).joined.is_empty());
    assert_eq!(joiner.counts.repeated, 1, "although it is forgotten");
}

#[test]
fn what_is_taken_back_after_the_example_is_not_learned_from_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, settings());
    all(&mut joiner, &[shown(7, 1, 0, 0), tick(60_000)]);
    let mut corrected = Vec::new();
    for turn in 0..20 {
        let happened = if turn % 2 == 0 { CLICK } else { 0 };
        let mut taken_back = acted(7, 1, 100_000 + turn, happened, CLICK);
        if let EventKind::Action(action) = &mut taken_back.kind {
            action.outcome.values[0] = turn as f32;
        }
        corrected.extend(corrections(&all(&mut joiner, &[taken_back])));
    }
    assert_eq!(corrected, [(1, CLICK, CLICK)]);
    assert_eq!(joiner.counts.unchanged, 19);
}

fn ask(user: u64) -> hypercast_data::features::RequestInput {
    let mut row = whole(0, 1, 5_000_000);
    row.user = user + 2;
    row.outcome = hypercast_fm::example::Outcome::UNKNOWN;
    hypercast_data::features::replay::request_input(&[row])
}

#[test]
fn an_action_before_its_impression_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, settings());
    let both = CLICK | LIKE;
    all(&mut joiner, &[acted(7, 1, 1500, CLICK, both)]);
    assert_eq!(joiner.held(), (0, 1));
    let made = all(&mut joiner, &[shown(7, 1, 0, 1000)]);
    assert_eq!(examples(&made), [(7, vec![(1, CLICK, both)])]);
    all(&mut joiner, &[acted(9, 1, 2000, CLICK, both), tick(10_000_000)]);
    assert_eq!((joiner.held().1, joiner.counts.orphaned), (0, 1));
}

#[test]
fn large_requests_come_in_parts_and_room_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, settings());
    let events: Vec<_> =
        (1..=6).map(|item| shown(7, item, 0, 1000)).chain([tick(100_000)]).collect();
    let made = all(&mut joiner, &events);
    let sizes: Vec<usize> = examples(&made).iter().map(|(_, items)| items.len()).collect();
    assert_eq!(sizes, [4, 2]);
    assert_ne!(examples(&made)[0].0, examples(&made)[1].0);
    let few = hypercast_config::JoinSettings { max_impressions: 10, ..settings() };
    let mut joiner = super::world::joiner(&data, few);
    let mut made = JoinerOutput::default();
    for request in 1..=100 {
        joiner.take(shown(request, 1, 0, 1000 + request as i64), &mut made);
        assert!(joiner.held().0 <= 10);
    }
    assert_eq!((made.joined.len(), joiner.counts.early), (90, 90));
    let requests: Vec<u64> = examples(&made).iter().map(|(request, _)| *request).collect();
    assert_eq!(requests, (1..=90).collect::<Vec<u64>>(), "oldest first");
}

#[test]
fn features_are_as_of_the_first_impression() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, settings());
    // User 3 clicks item 1 in request 2 while request 7, of the same user, waits.
    let both = CLICK | LIKE;
    let events = [
        shown(7, 1, 0, 1000),
        shown(2, 1, 0, 1100),
        acted(2, 1, 1200, CLICK, both),
        shown(12, 2, 0, 1300),
        tick(200_000),
    ];
    let made = all(&mut joiner, &events);
    let history: BTreeMap<u64, usize> = made
        .joined
        .iter()
        .filter_map(JoinedRecord::joined)
        .map(|joined| (joined.example.request, joined.example.history.len()))
        .collect();
    assert_eq!(history, BTreeMap::from([(2, 0), (7, 0), (12, 1)]));
}

/// The impressions among random events, each of which must be joined.
fn impressions_of(events: &[crate::events::EventRecord]) -> BTreeSet<(u64, u64)> {
    let mut impressions = BTreeSet::new();
    for event in events {
        match &event.kind {
            EventKind::Impression(shown) => drop(impressions.insert((shown.request, shown.item))),
            EventKind::CompleteRequest(rows) => {
                impressions.extend(rows.iter().map(|row| (row.request, row.item)))
            }
            _ => {}
        }
    }
    impressions
}

#[test]
fn every_impression_is_in_exactly_one_example_whatever_the_order() {
    use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    for seed in 0..20 {
        let mut events = random(seed, 60);
        let wanted = impressions_of(&events);
        if seed % 2 == 1 {
            let last = events.len() - 1;
            events[..last].shuffle(&mut StdRng::seed_from_u64(seed));
        }
        for max_impressions in [10_000, 30] {
            let settings = hypercast_config::JoinSettings { max_impressions, ..settings() };
            let mut joiner = joiner(&data, settings);
            let made = all(&mut joiner, &events);
            let mut rows = Vec::new();
            for outcome in &made.outcomes {
                if let StateUpdate::Outcome(row) = &outcome.update {
                    rows.push((row.request, row.item));
                }
            }
            let targets: usize = examples(&made).iter().map(|(_, targets)| targets.len()).sum();
            assert_eq!(targets, rows.len());
            if max_impressions == 10_000 {
                assert_eq!(rows.len(), wanted.len(), "seed {seed}");
            }
            assert_eq!(rows.into_iter().collect::<BTreeSet<_>>(), wanted, "seed {seed}");
            assert!(!corrections(&made).is_empty() || max_impressions == 30, "seed {seed}");
            let counts = joiner.counts;
            let made = (made.joined.len() as u64, made.outcomes.len() as u64);
            assert_eq!((counts.joined, counts.outcomes), made);
        }
    }
}

#[test]
fn an_example_says_where_its_items_were_ranked() {
    let dir = tempfile::tempdir().unwrap();
    let mut joiner = joiner(&dataset(dir.path()), settings());
    let place =
        |position, propensity| Some(RankedPlace { position, propensity, arm: "feed@1.0.0".into() });
    // Before and after its impressions, of more and fewer items than are shown.
    let events = [
        ranked(7, &[3, 1, 2]),
        shown(7, 1, 0, 1000),
        shown(7, 8, 0, 1000),
        shown(8, 1, 0, 1000),
        shown(8, 2, 0, 1000),
        ranked(8, &[2, 4]),
        shown(9, 1, 0, 1000),
        ranked(10, &[5]),
        event(EventKind::CompleteRequest(vec![whole(10, 5, 1000), whole(10, 6, 1000)])),
        tick(100_000),
        // Too late for the example.
        ranked(9, &[1]),
        acted(7, 1, 100_000, CLICK, CLICK),
        acted(9, 1, 100_000, CLICK, CLICK),
    ];
    let made = all(&mut joiner, &events);
    let of = |joined: &JoinedRecord| {
        let joined = JoinedRecord::decode(&postcard::to_stdvec(joined).unwrap()).unwrap();
        let joined = joined.joined().unwrap();
        (joined.example.request, joined.ranked.clone())
    };
    let mut found: Vec<_> = made.joined.iter().map(of).collect();
    found[1..4].sort_by_key(|(request, _)| *request);
    let expected = [
        (10, vec![place(0, Some(0.25)), None]),
        (7, vec![place(1, Some(0.25)), None]),
        (8, vec![None, place(0, Some(0.25))]),
        (9, vec![]),
        // Corrections.
        (7, vec![place(1, Some(0.25))]),
        (9, vec![]),
    ];
    assert_eq!(found, expected);
}

/// A joined example as earlier releases wrote it.
#[derive(serde::Serialize)]
enum EarlierRecord<'a> {
    Example { example: &'a Example, ingested_ms: i64 },
}

#[test]
fn a_joined_example_of_before_is_of_no_ranking() {
    let dir = tempfile::tempdir().unwrap();
    let made =
        all(&mut joiner(&dataset(dir.path()), settings()), &[shown(7, 1, 1, 5), tick(100_000)]);
    let example = &made.joined[0].joined().unwrap().example;
    let earlier = EarlierRecord::Example { example, ingested_ms: 9 };
    let read = JoinedRecord::decode(&postcard::to_stdvec(&earlier).unwrap()).unwrap();
    let read = read.joined().unwrap();
    assert_eq!((read.example.request, read.ingested_ms, read.ranked.len()), (7, 9, 0));
}

/// The joiner after a restart from its encoded state.
fn reborn(mut joiner: Joiner, data: &hypercast_data::dataset::Dataset) -> Joiner {
    let mut bytes = Vec::new();
    joiner
        .save(0, "", |saved, contents| {
            bytes = postcard::to_allocvec(&(saved, contents)).unwrap();
            Ok(())
        })
        .unwrap();
    let (saved, contents): (SavedJoiner, SavedContents) = postcard::from_bytes(&bytes).unwrap();
    let mut joiner = Joiner::restore(blank_state(data), saved).unwrap();
    (joiner.contents, joiner.content_limits) = (contents.vectors, contents.limits.unwrap());
    joiner.restore_rankings(contents.rankings);
    joiner
}

#[test]
fn a_joiner_that_is_saved_and_loaded_anywhere_makes_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    for (seed, step) in [(1, 1), (2, 7), (3, 50), (4, 301)] {
        for max_impressions in [10_000, 25] {
            let settings = hypercast_config::JoinSettings { max_impressions, ..settings() };
            let events = random(seed, 80);
            let whole = texts(&all(&mut joiner(&data, settings.clone()), &events));
            let mut part = joiner(&data, settings);
            let mut made = JoinerOutput::default();
            for events in events.chunks(step) {
                events.iter().for_each(|event| part.take(event.clone(), &mut made));
                part = reborn(part, &data);
            }
            let made = texts(&made);
            assert!(whole.0.len() > 80, "seed {seed}: {} records", whole.0.len());
            let differ = whole.0.iter().zip(&made.0).find(|(whole, part)| whole != part);
            assert_eq!(differ, None, "seed {seed}, {max_impressions} impressions");
            assert!(whole == made, "seed {seed}, {max_impressions} impressions");
        }
    }
}
