//! A stream server that all machines share, and the network between: requests and answers are lost,
//! machines are cut off, and each call takes a while, in which other processes go on.
//!
//! It stands for the server of NATS JetStream, not for the host's client of it: that speaks a
//! protocol, and is tested against the real server.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet, VecDeque},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use hypercast_core::clock;
use hypercast_stream::{
    Error, Result,
    streams::{
        Appended, Appender, GapCause, Reader, Record, StreamEngine, StreamGap, StreamPlace,
        StreamRecord, Topic,
    },
};

use crate::{plant::Plant, world::Simulation};

/// How long a caller waits for an answer that does not come.
const PATIENCE: Duration = Duration::from_secs(2);

/// The way to the server takes at most so long, in milliseconds.
const LONGEST_WAY_MS: u64 = 8;

/// The server: its streams and its clock.
pub struct Server {
    streams: BTreeMap<Topic, ServerStream>,
    /// The number of record ids that a stream remembers.
    remembered_ids: usize,
    plant: Option<Plant>,
}

#[derive(Default)]
struct ServerStream {
    records: VecDeque<(i64, Vec<u8>)>,
    ids: HashSet<u64>,
    order: VecDeque<u64>,
}

/// What is wrong between one process and the server.
#[derive(Default)]
pub struct Network {
    /// Until when it is cut off, since the beginning.
    pub cut_until: Cell<Duration>,
    /// Requests that are still to be lost.
    pub lost_requests: Cell<u32>,
    /// Answers to appends that are still to be lost.
    pub lost_answers: Cell<u32>,
    /// How often either was so.
    pub struck: Cell<u64>,
}

impl Server {
    /// A server without streams, each of which will remember this many ids.
    pub fn new(remembered_ids: usize, plant: Option<Plant>) -> Server {
        Server { streams: BTreeMap::new(), remembered_ids, plant }
    }

    fn append(
        &mut self,
        topic: &Topic,
        expected_end: Option<u64>,
        records: &[Record],
        stored_ms: i64,
    ) -> Option<Appended> {
        let (remembered, plant) = (self.remembered_ids, self.plant);
        let stream = self.streams.entry(topic.clone()).or_default();
        let is_at =
            |end: u64| end == stream.records.len() as u64 || plant == Some(Plant::EndsIgnored);
        if !expected_end.is_none_or(is_at) {
            return None;
        }
        let mut records: Vec<&Record> = records.iter().collect();
        if plant == Some(Plant::PublicationsReversed) && topic.name().starts_with("fm-") {
            records.reverse();
        }
        let mut repeated = 0;
        for record in records {
            let is_counted =
                expected_end.is_none() && record.id != 0 && plant != Some(Plant::IdsForgotten);
            if is_counted && !stream.ids.insert(record.id) {
                repeated += 1;
                continue;
            }
            if is_counted {
                stream.order.push_back(record.id);
            }
            stream.records.push_back((stored_ms, record.payload.clone()));
            if Plant::hits(plant, Plant::RecordsDoubled, &record.payload) {
                stream.records.push_back((stored_ms, record.payload.clone()));
            }
        }
        while stream.order.len() > remembered {
            stream.order.pop_front().map(|id| stream.ids.remove(&id));
        }
        Some(Appended { end: stream.records.len() as u64, repeated })
    }

    fn end(&self, topic: &Topic) -> u64 {
        self.streams.get(topic).map_or(0, |stream| stream.records.len() as u64)
    }

    fn read(&self, topic: &Topic, place: StreamPlace, most: usize) -> Result<Vec<StreamRecord>> {
        let (position, end) = (place.position, self.end(topic));
        let gap = |cause| Err(Error::Gap(StreamGap { topic: topic.clone(), position, cause }));
        if position > end {
            return gap(GapCause::Cut { end });
        }
        let Some(stream) = self.streams.get(topic) else { return Ok(Vec::new()) };
        let record = |position: usize| {
            let (stored_ms, payload) = stream.records[position].clone();
            StreamRecord { position: position as u64, stored_ms: Some(stored_ms), payload }
        };
        let before =
            position.checked_sub(1).map(|before| StreamPlace::after(&record(before as usize)));
        if before.is_some_and(|before| place.checksum.is_some() && before != place) {
            return gap(GapCause::Changed { first: 0 });
        }
        let is_skipped =
            |record: &StreamRecord| Plant::hits(self.plant, Plant::RecordsSkipped, &record.payload);
        let records = (position as usize..end as usize).take(most).map(record);
        Ok(records.filter(|record| !is_skipped(record)).collect())
    }
}

/// A process's way to the server.
#[derive(Debug)]
pub struct ServerClient {
    /// The number of the process.
    pub process: usize,
}

impl ServerClient {
    /// Calls the server. `is_append` says whether its answer may be lost after the fact.
    fn call<T>(&self, is_append: bool, answer: impl FnOnce(&mut Server, i64) -> T) -> Result<T> {
        let world = Simulation::current();
        let network = &world.processes[self.process].network;
        let ways = world.draw(self.process, LONGEST_WAY_MS);
        clock::sleep(Duration::from_millis(ways));
        let is_cut = || world.timeline.now.get() < network.cut_until.get();
        let is_lost = |count: &Cell<u32>| {
            let left = count.get();
            count.set(left.saturating_sub(1));
            left > 0
        };
        if is_cut() || is_lost(&network.lost_requests) {
            network.struck.update(|count| count + 1);
            return Err(no_answer());
        }
        let answered = answer(&mut world.server.borrow_mut(), world.server_ms());
        clock::sleep(Duration::from_millis(LONGEST_WAY_MS - ways));
        if is_cut() || (is_append && is_lost(&network.lost_answers)) {
            network.struck.update(|count| count + 1);
            return Err(no_answer());
        }
        Ok(answered)
    }
}

fn no_answer() -> Error {
    clock::sleep(PATIENCE);
    Error::Core(hypercast_core::Error::Unreachable("the server does not answer".into()))
}

impl StreamEngine for ServerClient {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        self.call(false, |_, _| ())?;
        Ok(Arc::new(ServerAppender { process: self.process, topic: topic.clone() }))
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        Ok(Box::new(ServerReader { process: self.process, topic: topic.clone(), place }))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        self.call(false, |server, _| 0..server.end(topic))
    }

    fn trim(&self, _: &Topic, _: u64) -> Result<()> {
        // Engines may keep what could go.
        Ok(())
    }
}

struct ServerAppender {
    process: usize,
    topic: Topic,
}

impl Appender for ServerAppender {
    fn submit(&self, expected_end: Option<u64>, records: &[Record]) -> Result<Option<Appended>> {
        let client = ServerClient { process: self.process };
        client
            .call(true, |server, now_ms| server.append(&self.topic, expected_end, records, now_ms))
    }
}

struct ServerReader {
    process: usize,
    topic: Topic,
    place: StreamPlace,
}

impl Reader for ServerReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let client = ServerClient { process: self.process };
        let read = client.call(false, |server, _| server.read(&self.topic, self.place, most))??;
        match read.last() {
            Some(last) => self.place = StreamPlace::after(last),
            None => clock::sleep(wait),
        }
        Ok(read)
    }

    fn position(&self) -> u64 {
        self.place.position
    }
}
