//! A stream with records missing inside, and what a cursor makes of it.

use std::sync::Arc;

use super::super::*;
use super::suite::{numbered, topic};

/// Streams in memory that have lost records, as a NATS stream loses them: the positions stay, and a
/// reader that comes to a hole is given nothing at first, and then the news.
pub(crate) struct HoledEngine {
    pub(crate) streams: Arc<MemoryEngine>,
    pub(crate) topic: Topic,
    pub(crate) holes: Vec<Range<u64>>,
}

struct HoledReader {
    stream: Box<dyn Reader>,
    topic: Topic,
    holes: Vec<Range<u64>>,
    streams: Arc<MemoryEngine>,
    /// Whether the last read came to a hole.
    stuck: bool,
}

impl StreamEngine for HoledEngine {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        self.streams.appender(topic)
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        let stream = self.streams.resume(topic, place)?;
        if *topic != self.topic {
            return Ok(stream);
        }
        let HoledEngine { streams, topic, holes } = self;
        let (streams, topic, holes) = (streams.clone(), topic.clone(), holes.clone());
        Ok(Box::new(HoledReader { stream, topic, holes, streams, stuck: false }))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        self.streams.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.streams.trim(topic, before)
    }
}

impl Reader for HoledReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let position = self.position();
        let Some(hole) = self.holes.iter().find(|hole| position < hole.end) else {
            return self.stream.next(most, wait);
        };
        if position < hole.start {
            let room = (hole.start - position) as usize;
            return self.stream.next(most.min(room), wait);
        }
        // Nothing comes that could tell of a hole at the end.
        let is_last = hole.end >= self.streams.span(&self.topic)?.end;
        if is_last || !std::mem::replace(&mut self.stuck, true) {
            return Ok(Vec::new());
        }
        self.stuck = false;
        let (topic, cause) = (self.topic.clone(), GapCause::Deleted { first: hole.end });
        Err(Error::Gap(StreamGap { topic, position, cause }))
    }

    fn position(&self) -> u64 {
        self.stream.position()
    }
}

/// A stream of records in memory, without those in the holes.
pub(crate) fn holed(
    streams: &Arc<MemoryEngine>,
    topic: &Topic,
    holes: &[Range<u64>],
) -> HoledEngine {
    HoledEngine { streams: streams.clone(), topic: topic.clone(), holes: holes.to_vec() }
}

/// The positions of the records and of the gaps that a cursor finds up to the stream's end.
fn found(engine: &dyn StreamEngine, topic: &Topic) -> Vec<std::result::Result<u64, u64>> {
    let mut cursor = StreamCursor::open(engine, topic, StreamPlace::at(0)).unwrap();
    let mut found = Vec::new();
    loop {
        match cursor.next_stored(engine, 4).unwrap() {
            StreamRead::Records(records) if records.is_empty() => return found,
            StreamRead::Records(records) => {
                found.extend(records.iter().map(|record| Ok(record.position)));
            }
            StreamRead::Gap(gap) => found.push(Err(gap.missing())),
        }
    }
}

/// A stream that says it has one more record than it has, as one that lost its last record.
struct ShortEngine {
    streams: MemoryEngine,
    stop: Shutdown,
}

impl StreamEngine for ShortEngine {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        self.streams.appender(topic)
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        self.streams.resume(topic, place)
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        let kept = self.streams.span(topic)?;
        Ok(kept.start..kept.end + 1)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.streams.trim(topic, before)
    }

    fn is_stopping(&self) -> bool {
        self.stop.is_requested()
    }
}

#[test]
fn a_process_that_is_to_stop_does_not_wait_for_records_that_do_not_come() {
    let (topic, stop) = (topic("short"), Shutdown::default());
    let engine = ShortEngine { streams: MemoryEngine::default(), stop: stop.clone() };
    engine.appender(&topic).unwrap().append(&numbered(0..3)).unwrap();
    let mut cursor = StreamCursor::open(&engine, &topic, StreamPlace::at(0)).unwrap();
    let read = cursor.next_stored(&engine, 9).unwrap();
    assert!(matches!(read, StreamRead::Records(records) if records.len() == 3));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| cursor.next_stored(&engine, 9));
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!waits.is_finished(), "what the stream says it has may come");
        let asked = std::time::Instant::now();
        stop.request();
        let why = waits.join().unwrap().unwrap_err().to_string();
        assert!(why.contains("from position 3 on") && why.contains("to stop"), "{why}");
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    });
}

#[test]
fn everything_around_a_hole_is_read_and_each_hole_is_told() {
    let (streams, topic) = (Arc::new(MemoryEngine::default()), topic("holed"));
    streams.appender(&topic).unwrap().append(&numbered(0..12)).unwrap();
    let cases: [(&[[u64; 2]], Vec<u64>); 5] = [
        (&[], vec![]),
        (&[[0, 2]], vec![2]),
        (&[[3, 4], [6, 9]], vec![1, 3]),
        (&[[10, 12]], vec![2]),
        (&[[0, 12]], vec![12]),
    ];
    for (ends, missing) in cases {
        let holes: Vec<Range<u64>> = ends.iter().map(|[start, end]| *start..*end).collect();
        let found = found(&holed(&streams, &topic, &holes), &topic);
        let told: Vec<u64> = found.iter().filter_map(|part| part.err()).collect();
        assert_eq!(told, missing, "{holes:?}");
        let kept: Vec<u64> = found.iter().filter_map(|part| part.ok()).collect();
        let stored = |at: &u64| !holes.iter().any(|hole| hole.contains(at));
        assert_eq!(kept, (0..12).filter(stored).collect::<Vec<_>>(), "{holes:?}");
    }
}
