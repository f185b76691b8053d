//! Learning goes on while a publication is sent, whatever becomes of that.

use std::sync::mpsc::{Receiver, Sender, channel};

use hypercast_stream::publish::{PublicationFollower, PublicationKind};
use hypercast_stream::streams::Appended;

use super::*;

/// What an append of weights may do.
enum Permit {
    Whole,
    /// Store its first record, and fail.
    Torn,
}

/// Streams in memory of which each append of weights waits for a permit, until nobody gives any
/// more. A reader of joined examples crashes its trainer at a position, if there is one.
struct PermittedEngine {
    streams: Cut,
    permits: Arc<Mutex<Receiver<Permit>>>,
}

struct PermittedAppender {
    stream: Arc<dyn Appender>,
    permits: Arc<Mutex<Receiver<Permit>>>,
}

impl StreamEngine for PermittedEngine {
    fn appender(&self, topic: &Topic) -> hypercast_stream::Result<Arc<dyn Appender>> {
        let stream = self.streams.appender(topic)?;
        if *topic != Topic::fm("1.0.0") {
            return Ok(stream);
        }
        Ok(Arc::new(PermittedAppender { stream, permits: self.permits.clone() }))
    }

    fn resume(
        &self,
        topic: &Topic,
        place: StreamPlace,
    ) -> hypercast_stream::Result<Box<dyn Reader>> {
        self.streams.resume(topic, place)
    }

    fn span(&self, topic: &Topic) -> hypercast_stream::Result<Range<u64>> {
        self.streams.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> hypercast_stream::Result<()> {
        self.streams.trim(topic, before)
    }
}

impl Appender for PermittedAppender {
    fn submit(
        &self,
        expected_end: Option<u64>,
        records: &[Record],
    ) -> hypercast_stream::Result<Option<Appended>> {
        match self.permits.lock().unwrap().recv().unwrap_or(Permit::Whole) {
            Permit::Whole => self.stream.submit(expected_end, records),
            Permit::Torn => {
                self.stream.submit(expected_end, &records[..1])?;
                Err(hypercast_core::Error::Internal("as the test asks".into()).into())
            }
        }
    }
}

/// A world whose trainer publishes whenever it may.
struct PublishingWorld {
    dataset: Dataset,
    config: Config,
    records: Vec<Record>,
    streams: Arc<MemoryEngine>,
}

impl PublishingWorld {
    fn new(dir: &Path) -> PublishingWorld {
        let (dataset, records) = world(dir);
        let mut config = config(&dir.join("work"));
        config.fm_gate.rows = 0;
        config.publish.every_s = 0;
        // Of what is learned, all is learned again after a crash.
        config.fm.save_every_requests = 0;
        let streams = streams(&records);
        PublishingWorld { dataset, config, records, streams }
    }

    /// A trainer, and what permits its appends. It crashes at a position.
    fn open(&self, at: u64) -> (FmFollower, Sender<Permit>) {
        let (give, permits) = channel();
        let streams = Cut { inner: self.streams.clone(), at, stop: None, grows: Arc::default() };
        let engine = PermittedEngine { streams, permits: Arc::new(Mutex::new(permits)) };
        let (dataset, config) = (&self.dataset, &self.config);
        let context = ServiceContext { dataset, config, engine: Arc::new(engine) };
        let runtime = Arc::new(BurnRuntime);
        let opened = FmFollower::open(context, &options(), runtime, &Shutdown::default());
        (opened.unwrap(), give)
    }

    /// One that has published for the first time.
    fn begun(&self, at: u64) -> (FmFollower, Sender<Permit>) {
        let (mut follower, permits) = self.open(at);
        permits.send(Permit::Whole).unwrap();
        assert!(follower.step(Duration::ZERO, &mut std::io::sink()).unwrap());
        assert_eq!(follower.report().published, 1);
        (follower, permits)
    }

    /// What was published from the newest snapshot on, with how far it was trained.
    fn published(&self) -> Vec<(PublicationKind, u64)> {
        let topic = Topic::fm("1.0.0");
        let mut follower = PublicationFollower::open(self.streams.clone(), topic).unwrap();
        let next = || follower.next(Duration::ZERO).unwrap();
        let all = std::iter::from_fn(next).map(|publication| publication.header);
        all.map(|header| (header.kind, header.trained_position)).collect()
    }
}

/// Learns all that is there.
fn learn_all(follower: &mut FmFollower) {
    while follower.step(Duration::ZERO, &mut std::io::sink()).unwrap() {}
}

#[test]
fn learning_goes_on_while_an_append_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let world = PublishingWorld::new(dir.path());
    let all = world.records.len() as u64;
    let (mut follower, permits) = world.begun(u64::MAX);
    learn_all(&mut follower);
    let report = follower.report();
    assert_eq!((report.position, report.published), (all, 1), "one publication waits all along");
    drop(permits);
    let report = follower.finish(&mut std::io::sink()).unwrap();
    assert_eq!(report.published, 3, "it waits for that one and sends the last");
    let published = world.published();
    let [(_, 0), (PublicationKind::Delta, then), (PublicationKind::Delta, end)] = published[..]
    else {
        panic!("{published:?}");
    };
    assert!(0 < then && then < all && end == all, "each says how far it was trained");
}

#[test]
fn a_publication_that_fails_beside_learning_is_followed_by_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let world = PublishingWorld::new(dir.path());
    let (mut follower, permits) = world.begun(u64::MAX);
    let telemetry = follower.telemetry.clone();
    permits.send(Permit::Torn).unwrap();
    learn_all(&mut follower);
    drop(permits);
    let report = follower.finish(&mut std::io::sink()).unwrap();
    let published = world.published();
    let all = world.records.len() as u64;
    assert_eq!(report.published, 1 + published.len() as u64, "{published:?}");
    assert!(telemetry.render().contains("hypercast_publish_failures_total 1"));
    assert!(matches!(published[0], (PublicationKind::Snapshot, 1..)), "{published:?}");
    assert_eq!(published.last().unwrap().1, all);
}

#[test]
fn a_trainer_that_is_killed_while_it_publishes_goes_on_where_it_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let world = PublishingWorld::new(dir.path());
    let all = world.records.len() as u64;
    let (mut follower, permits) = world.begun(120);
    permits.send(Permit::Torn).unwrap();
    drop(permits);
    assert!(catch_unwind(AssertUnwindSafe(|| learn_all(&mut follower))).is_err());
    drop(follower);
    let (mut follower, _) = world.open(u64::MAX);
    learn_all(&mut follower);
    let report = follower.finish(&mut std::io::sink()).unwrap();
    assert_eq!((report.position, report.requests + report.corrections), (all, all));
    assert_eq!(world.published().last().unwrap().1, all);
}
