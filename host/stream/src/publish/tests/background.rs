//! A publication that is sent beside learning has the weights of the moment at which it began.

use std::sync::{
    Mutex,
    mpsc::{Receiver, Sender, channel},
};

use super::*;
use crate::Result;
use crate::streams::{Appended, Appender, Reader, StreamPlace};

/// What an append may do.
enum Permit {
    Whole,
    /// Store its first record, and fail.
    Torn,
}

/// Streams in memory of which each append waits for a permit, until nobody gives any more.
struct PermittedEngine {
    streams: Arc<MemoryEngine>,
    permits: Arc<Mutex<Receiver<Permit>>>,
}

struct PermittedAppender {
    stream: Arc<dyn Appender>,
    permits: Arc<Mutex<Receiver<Permit>>>,
}

impl StreamEngine for PermittedEngine {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        let (stream, permits) = (self.streams.appender(topic)?, self.permits.clone());
        Ok(Arc::new(PermittedAppender { stream, permits }))
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        self.streams.resume(topic, place)
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        self.streams.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.streams.trim(topic, before)
    }
}

impl Appender for PermittedAppender {
    fn submit(&self, expected_end: Option<u64>, records: &[Record]) -> Result<Option<Appended>> {
        match self.permits.lock().unwrap().recv().unwrap_or(Permit::Whole) {
            Permit::Whole => self.stream.submit(expected_end, records),
            Permit::Torn => {
                self.stream.submit(expected_end, &records[..1])?;
                Err(hypercast_core::Error::Internal("as the test asks".into()).into())
            }
        }
    }
}

/// A publisher of a world whose appends wait for permits.
fn permitted(world: &World) -> (BackgroundPublisher, Sender<Permit>) {
    let (give, permits) = channel();
    let permits = Arc::new(Mutex::new(permits));
    let engine = Arc::new(PermittedEngine { streams: world.engine.clone(), permits });
    let work = world.dir.path().join("work");
    let settings = PublishSettings { snapshot_every: 2, ..all_of_it() };
    let publisher = Publisher::open(engine, world.topic.clone(), settings, &work).unwrap();
    (BackgroundPublisher::new(publisher), give)
}

#[test]
fn a_publication_has_the_weights_of_its_beginning() {
    let (mut world, mut model) = (World::new(11), Model::new());
    let (mut publisher, permits) = permitted(&world);
    let (mut follower, mut served) = (world.follower(), Served::default());
    for kind in ["snapshot", "delta", "delta", "snapshot", "delta"] {
        let then = Served::of(&model);
        publisher.begin(&model, FACTS).unwrap();
        (0..3).for_each(|_| model.learn(&mut world.random));
        assert!(publisher.ended().is_none() && publisher.is_sending(), "its append waits");
        assert_eq!(next(&mut follower), None);
        permits.send(Permit::Whole).unwrap();
        let sent = publisher.wait().expect("it was begun").unwrap();
        assert!(publisher.wait().is_none() && !publisher.is_sending());
        assert_eq!(format!("{:?}", sent.stats.kind).to_lowercase(), kind);
        served.take(&next(&mut follower).expect("it is durable"));
        assert!(served == then, "the weights of when the {kind} began");
    }
}

#[test]
fn a_publication_that_fails_is_followed_by_a_snapshot_of_everything() {
    let (mut world, mut model) = (World::new(12), Model::new());
    let (mut publisher, permits) = permitted(&world);
    let (mut follower, mut served) = (world.follower(), Served::default());
    for permit in [Permit::Whole, Permit::Torn, Permit::Torn, Permit::Whole] {
        let is_torn = matches!(permit, Permit::Torn);
        permits.send(permit).unwrap();
        publisher.begin(&model, FACTS).unwrap();
        let sent = publisher.wait().expect("it was begun");
        assert_eq!(sent.is_err(), is_torn);
        if let Ok(sent) = sent {
            assert_eq!(sent.stats.kind, PublicationKind::Snapshot);
            served.take(&next(&mut follower).expect("it is durable"));
            assert!(served == Served::of(&model));
        }
        model.learn(&mut world.random);
    }
    assert_eq!(follower.refusals.torn, 2);
}

#[test]
fn whoever_drops_a_publisher_waits_for_what_it_sends() {
    let (world, model) = (World::new(13), Model::new());
    let (mut publisher, permits) = permitted(&world);
    publisher.begin(&model, FACTS).unwrap();
    // Its append waits until then.
    let permit = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(permits);
    });
    drop(publisher);
    assert_eq!(next(&mut world.follower()).expect("it is durable").header.sequence, 0);
    permit.join().unwrap();
}
