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
    for (place, next) in [(StreamPlace::at(3), 10), (beyond, 30), (changed, 10)] {
        let open = |policy| {
            let (gaps, told) = handling(policy);
            let follower = StreamFollower::open(engine.clone(), topic.clone(), Some(place), gaps);
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
