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

use crate::{
    plan::{ROLES, Role},
    plant::Plant,
    world::Simulation,
};

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
    /// None where one was lost; the last one is there.
    records: Vec<Option<ServerRecord>>,
    ids: HashSet<u64>,
    order: VecDeque<u64>,
}

#[derive(Clone)]
struct ServerRecord {
    id: u64,
    stored_ms: i64,
    payload: Vec<u8>,
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
    /// How often the process was told that events are missing.
    pub gaps: Cell<u64>,
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
            let id = if is_counted { record.id } else { 0 };
            let stored = ServerRecord { id, stored_ms, payload: record.payload.clone() };
            if Plant::hits(plant, Plant::RecordsDoubled, &record.payload) {
                stream.records.push(Some(stored.clone()));
            }
            stream.records.push(Some(stored));
        }
        while stream.order.len() > remembered {
            stream.order.pop_front().map(|id| stream.ids.remove(&id));
        }
        Some(Appended { end: stream.records.len() as u64, repeated })
    }

    fn span(&self, topic: &Topic) -> Range<u64> {
        let end = self.end(topic);
        let stream = self.streams.get(topic);
        let first = stream.and_then(|of| of.records.iter().position(Option::is_some));
        first.map_or(end, |first| first as u64)..end
    }

    /// The position after the last record of a stream.
    pub fn end(&self, topic: &Topic) -> u64 {
        self.streams.get(topic).map_or(0, |stream| stream.records.len() as u64)
    }

    /// Loses the last records of a stream, and their ids with them: the server starts anew, and had
    /// not synced them.
    pub fn lose_tail(&mut self, topic: &Topic, count: u32) -> Vec<StreamRecord> {
        let Some(stream) = self.streams.get_mut(topic) else { return Vec::new() };
        let end = stream.records.len();
        let lost = stream.lose(end.saturating_sub(count as usize)..end);
        while stream.records.pop_if(|last| last.is_none()).is_some() {}
        lost
    }

    /// Loses records inside of a stream. Positions of the others stay.
    pub fn lose_inside(&mut self, topic: &Topic, count: u32, choice: u64) -> Vec<StreamRecord> {
        let inner = self.end(topic).saturating_sub(1);
        self.lose_at(topic, choice % inner.max(1), count)
    }

    /// Loses records from a position on, but not the last one of the stream.
    pub fn lose_at(&mut self, topic: &Topic, first: u64, count: u32) -> Vec<StreamRecord> {
        let Some(stream) = self.streams.get_mut(topic) else { return Vec::new() };
        let (first, inner) = (first as usize, stream.records.len().saturating_sub(1));
        stream.lose(first.min(inner)..inner.min(first + count as usize))
    }

    /// Cuts a stream off at a position; returns how many records it had from there on.
    pub fn cut(&mut self, topic: &Topic, position: u64) -> usize {
        let records = &mut self.streams.entry(topic.clone()).or_default().records;
        records.drain((position as usize).min(records.len())..).flatten().count()
    }

    /// Puts records of no id back at their positions.
    pub fn put_back(&mut self, topic: &Topic, lost: &[StreamRecord]) {
        let records = &mut self.streams.entry(topic.clone()).or_default().records;
        for StreamRecord { position, stored_ms, payload } in lost {
            let at = *position as usize;
            records.resize(records.len().max(at + 1), None);
            let stored_ms = stored_ms.unwrap_or_default();
            records[at] = Some(ServerRecord { id: 0, stored_ms, payload: payload.clone() });
        }
    }

    fn read(&self, topic: &Topic, place: StreamPlace, most: usize) -> Result<Vec<StreamRecord>> {
        let (position, end) = (place.position, self.end(topic));
        let gap = |cause| Err(Error::Gap(StreamGap { topic: topic.clone(), position, cause }));
        if position > end {
            return gap(GapCause::Cut { end });
        }
        let Some(stream) = self.streams.get(topic) else { return Ok(Vec::new()) };
        let stored = |from: u64| (from..end).filter_map(|position| stream.record(position)).next();
        let before = position.checked_sub(1).and_then(|before| stream.record(before));
        let before = before.map(|before| StreamPlace::after(&before));
        if before.is_some_and(|before| place.checksum.is_some() && before != place) {
            return gap(GapCause::Changed { first: stored(0).map_or(end, |first| first.position) });
        }
        let hides = self.plant == Some(Plant::HolesUntold) && *topic == Topic::versions();
        let next = stored(position).filter(|next| next.position > position);
        if let Some(next) = &next
            && hides
        {
            return Ok((next.position..end).map_while(|at| stream.record(at)).collect());
        }
        if let Some(next) = next {
            return gap(GapCause::Deleted { first: next.position });
        }
        let is_skipped =
            |record: &StreamRecord| Plant::hits(self.plant, Plant::RecordsSkipped, &record.payload);
        let records = (position..end).take(most).map_while(|position| stream.record(position));
        Ok(records.filter(|record| !is_skipped(record)).collect())
    }
}

impl ServerStream {
    /// The record at a position, if there is one.
    fn record(&self, position: u64) -> Option<StreamRecord> {
        let stored = self.records.get(position as usize)?.as_ref()?;
        let (stored_ms, payload) = (Some(stored.stored_ms), stored.payload.clone());
        Some(StreamRecord { position, stored_ms, payload })
    }

    fn lose(&mut self, positions: Range<usize>) -> Vec<StreamRecord> {
        let lost = positions.clone().filter_map(|at| self.record(at as u64)).collect();
        for record in self.records[positions].iter_mut().filter_map(Option::take) {
            self.ids.remove(&record.id);
            self.order.retain(|&id| id != record.id);
        }
        lost
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
        let forgets = Simulation::current().plant == Some(Plant::ChecksumsForgotten);
        let place = if forgets { StreamPlace::at(place.position) } else { place };
        Ok(Box::new(ServerReader { process: self.process, topic: topic.clone(), place }))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        self.call(false, |server, _| server.span(topic))
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
        let read = client.call(false, |server, _| server.read(&self.topic, self.place, most))?;
        let is_gap = matches!(read, Err(Error::Gap(_)));
        if is_gap && self.topic == Topic::events() {
            let world = Simulation::current();
            world.processes[self.process].network.gaps.update(|gaps| gaps + 1);
        }
        let mut read = read?;
        if ROLES[self.process] == Role::LoggingTier {
            let plant = Simulation::current().plant;
            read.retain(|record| !Plant::hits(plant, Plant::LogRowsSkipped, &record.payload));
        }
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
