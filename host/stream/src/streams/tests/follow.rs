//! A follower tells what is missing, and goes on as it is told to.

use std::sync::Mutex;

use hypercast_config::OnGap;

use super::super::*;
use super::suite::{numbered, topic};

/// What a follower did: the topics of the gaps that it counted.
fn handling(policy: OnGap) -> (GapHandling, Arc<Mutex<Vec<String>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let count = told.clone();
    let count = Arc::new(move |topic: &Topic| count.lock().unwrap().push(topic.to_string()));
    (GapHandling { policy, count }, told)
}

#[test]
fn records_that_are_missing_stop_a_follower_or_are_skipped_and_told() {
    let topic = topic("follow");
    let engine = Arc::new(MemoryEngine::default());
    engine.appender(&topic).unwrap().append(&numbered(0..30)).unwrap();
    engine.trim(&topic, 10).unwrap();
    let beyond = StreamPlace { position: 40, checksum: Some(1) };
    let changed = StreamPlace { position: 20, checksum: Some(1) };
    for (place, next) in [(StreamPlace::at(3), 10), (beyond, 10), (changed, 10)] {
        let open = |policy| {
            let (gaps, told) = handling(policy);
            let follower =
                StreamFollower::open(engine.clone(), topic.clone(), Some(place.into()), gaps);
            (follower.unwrap(), told)
        };
        let (mut follower, told) = open(OnGap::Stop);
        for _ in 0..2 {
            let error = follower.next(1, Duration::ZERO).unwrap_err();
            assert!(matches!(&error, Error::Gap(gap) if gap.position == place.position), "{error}");
        }
        assert_eq!((told.lock().unwrap().len(), follower.place()), (2, place));
        let (mut follower, told) = open(OnGap::Continue);
        assert!(follower.next(1, Duration::ZERO).unwrap().is_empty());
        assert_eq!(follower.place().position, next);
        let read = follower.next(1, Duration::ZERO).unwrap();
        assert!(read.first().is_none_or(|record| record.position == next));
        assert_eq!(told.lock().unwrap()[..], [topic.to_string()]);
    }
    let (gaps, _) = handling(OnGap::Stop);
    let mut fresh = StreamFollower::open(engine, topic, None, gaps).unwrap();
    assert_eq!(fresh.next(1, Duration::ZERO).unwrap()[0].position, 10);
}

#[test]
fn a_follower_goes_back_to_where_the_stream_has_what_it_read() {
    let topic = topic("back");
    let (gaps, told) = handling(OnGap::Continue);
    let engine = Arc::new(MemoryEngine::default());
    engine.appender(&topic).unwrap().append(&numbered(0..1000)).unwrap();
    let mut follower =
        StreamFollower::open(engine.clone(), topic.clone(), None, gaps.clone()).unwrap();
    while !follower.next(10, Duration::ZERO).unwrap().is_empty() {}
    let trail = follower.trail().clone();
    assert!(told.lock().unwrap().is_empty());
    // It lost what is behind `kept`, and has other records up to `end` instead.
    for (kept, end) in [(995, 995), (940, 990), (940, 1200), (300, 2000), (5, 900)] {
        let regrown = Arc::new(MemoryEngine::default());
        let appender = regrown.appender(&topic).unwrap();
        appender.append(&numbered(0..kept)).unwrap();
        appender.append(&numbered(5000..5000 + end - kept)).unwrap();
        let mut follower =
            StreamFollower::open(regrown.clone(), topic.clone(), Some(trail.clone()), gaps.clone())
                .unwrap();
        assert!(follower.next_stored(10).unwrap().is_empty());
        let at = follower.place().position;
        let again = 2 * (1000 - kept) + 10;
        assert!(at <= kept && at + again >= kept, "{at} for {kept}");
        while follower.place().position < end {
            follower.next_stored(100).unwrap();
        }
        assert_eq!(told.lock().unwrap().drain(..).count(), 1, "once, for {kept}");
    }
}

#[test]
fn a_trail_has_few_places_and_is_close_where_it_is_near() {
    let place = |position| StreamPlace { position, checksum: Some(position as u32) };
    let mut trail = StreamTrail::from(StreamPlace::at(0));
    for position in (0..1_000_000).step_by(7) {
        trail.move_to(place(position));
    }
    let earlier = trail.earlier();
    assert!(earlier.len() < 50, "{}", earlier.len());
    let last = trail.place().position;
    let distances: Vec<u64> = earlier.iter().rev().map(|place| last - place.position).collect();
    assert_eq!(distances.first(), Some(&7));
    for pair in distances.windows(2) {
        assert!(pair[1] <= 2 * pair[0] + 7, "{distances:?}");
    }
    trail.move_to(place(500));
    assert!(trail.earlier().iter().all(|place| place.position < 500));
}
