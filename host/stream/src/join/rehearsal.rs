//! What a joiner does whose state was moved away while its outputs are there: it makes their
//! records again without writing them, and compares. So it learns by which rules they were made:
//! releases before believed every time in an event. Records that neither rules make are told,
//! because to skip as many of its own would lose some and write others twice.
//!
//! Missing events end the comparison, and it is told from where on the outputs are not compared: a
//! window is as long as all events before suggest, so no record behind them is known to be made
//! again as it was.

use std::collections::VecDeque;

use hypercast_config::OnGap;
use hypercast_core::shutdown::Shutdown;
use serde::Serialize;

use super::output_streams::{encode, shortened};
use super::runner::join_record;
use super::{JoinSink, JoinedRecord, Joiner, OutcomeRecord, StateUpdate};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{
    StreamCursor, StreamEngine, StreamGap, StreamPlace, StreamRead, StreamRecord, Topic,
};

/// Records per read.
const READ: usize = 1024;

/// A joiner that has to make its outputs again from the first event.
pub(super) struct Rehearsal<'a> {
    pub(super) engine: &'a dyn StreamEngine,
    /// What is done if the outputs have other records.
    pub(super) policy: OnGap,
    pub(super) stop: &'a Shutdown,
}

/// A joiner that goes on with its outputs.
pub(super) struct RehearsedJoiner {
    pub(super) joiner: Joiner,
    /// What was not compared with what it makes, and why, if that is something.
    pub(super) not_compared: Option<String>,
}

/// A stored record that is not the one of its number that the joiner makes.
struct StoredDifference {
    topic: Topic,
    position: u64,
}

/// How the outputs compare with what some rules make of the events.
struct OutputComparison {
    first_difference: Option<StoredDifference>,
    not_compared: Option<String>,
}

impl Rehearsal<'_> {
    /// The joiner by the rules that its outputs were made with. `fresh` makes it as of before the
    /// first event.
    ///
    /// # Errors
    /// The outputs have records that no rules make of the events, and the policy is to stop; the
    /// engine cannot be read; or the process is to stop.
    pub(super) fn joiner(&self, fresh: impl Fn() -> Result<Joiner>) -> Result<RehearsedJoiner> {
        let mut found = None;
        for bounded_by_arrival in [true, false] {
            let by_rules = || -> Result<Joiner> {
                let mut joiner = fresh()?;
                joiner.bounded_by_arrival = bounded_by_arrival;
                Ok(joiner)
            };
            let compared = self.compare(by_rules()?)?;
            let OutputComparison { first_difference, not_compared } = compared;
            match first_difference {
                None => return Ok(RehearsedJoiner { joiner: by_rules()?, not_compared }),
                Some(difference) => found = found.or(Some(difference)),
            }
        }
        let StoredDifference { topic, position } = found.expect("all rules make a difference");
        let why = format!(
            "stream {topic}: the record at position {position} is not the one that this joiner \
             makes of the events: its state is not there, and other settings of [join] or [fm] \
             made the stream. Restore the state or those settings; or set engine.on_gap = \
             \"continue\": it then skips as many records as are stored, so some may be lost or \
             come twice"
        );
        match self.policy {
            OnGap::Stop => Err(Error::refused(why)),
            OnGap::Continue => {
                tracing::error!("{why}; going on (engine.on_gap)");
                Ok(RehearsedJoiner { joiner: fresh()?, not_compared: None })
            }
        }
    }

    fn compare(&self, mut joiner: Joiner) -> Result<OutputComparison> {
        let mut outputs = StoredOutputs {
            joined: StoredRecords::open(self.engine, Topic::joined())?,
            outcomes: StoredRecords::open(self.engine, Topic::outcomes())?,
            found: Ok(None),
        };
        let mut not_compared = None;
        let mut events = StreamCursor::open(self.engine, &Topic::events(), StreamPlace::at(0))?;
        while !(outputs.joined.is_repeated() && outputs.outcomes.is_repeated()) {
            if self.stop.is_requested() {
                return Err(Error::refused("stopped before the outputs were compared"));
            }
            let records = match events.next_stored(self.engine, READ)? {
                StreamRead::Records(records) if records.is_empty() => break,
                StreamRead::Records(records) => records,
                StreamRead::Gap(gap) => {
                    not_compared = Some(outputs.not_compared(&gap));
                    break;
                }
            };
            for record in &records {
                // One that cannot be used makes no record, and is set aside later.
                let _ = join_record(&mut joiner, record, &mut outputs);
                if !matches!(outputs.found, Ok(None)) {
                    let first_difference = outputs.found?;
                    return Ok(OutputComparison { first_difference, not_compared });
                }
            }
        }
        Ok(OutputComparison { first_difference: None, not_compared })
    }
}

/// The stored records of both outputs, with which those that are made are compared.
struct StoredOutputs<'a> {
    joined: StoredRecords<'a>,
    outcomes: StoredRecords<'a>,
    /// The first difference, or why a record could not be compared.
    found: Result<Option<StoredDifference>>,
}

/// The records of one output from the first one on.
struct StoredRecords<'a> {
    engine: &'a dyn StreamEngine,
    topic: Topic,
    cursor: StreamCursor,
    read: VecDeque<StreamRecord>,
    /// Records that were made.
    made: u64,
    end: u64,
}

impl StoredOutputs<'_> {
    /// What missing events leave without comparison.
    fn not_compared(&self, gap: &StreamGap) -> String {
        let [joined, outcomes] = [&self.joined, &self.outcomes].map(StoredRecords::rest);
        format!(
            "the joiner has no state, and cannot make again what followed the missing events: {gap}; \
             not compared with what it makes are {joined}, and {outcomes}"
        )
    }
}

impl JoinSink for StoredOutputs<'_> {
    fn joined(&mut self, joined: JoinedRecord) {
        if matches!(self.found, Ok(None)) {
            self.found = self.joined.compare(|stored| {
                // As it is stored, it may have lost targets.
                let made = JoinedRecord::decode(&shortened(joined)?)?;
                let Ok(stored) = JoinedRecord::decode(stored) else { return Ok(true) };
                Ok(identity_of_joined(&made)? == identity_of_joined(&stored)?)
            });
        }
    }

    fn outcome(&mut self, outcome: OutcomeRecord) {
        if matches!(self.found, Ok(None)) {
            self.found = self.outcomes.compare(|stored| {
                let Ok(stored) = OutcomeRecord::decode(stored) else { return Ok(true) };
                Ok(identity_of_update(&outcome.update)? == identity_of_update(&stored.update)?)
            });
        }
    }
}

impl<'a> StoredRecords<'a> {
    fn open(engine: &'a dyn StreamEngine, topic: Topic) -> Result<StoredRecords<'a>> {
        let span = engine.span(&topic)?;
        let cursor = StreamCursor::open(engine, &topic, StreamPlace::at(span.start))?;
        let (read, made, end) = (VecDeque::new(), 0, span.end);
        Ok(StoredRecords { engine, topic, cursor, read, made, end })
    }

    fn is_repeated(&self) -> bool {
        self.made >= self.end
    }

    /// The stored records that were not compared.
    fn rest(&self) -> String {
        let StoredRecords { topic, made, end, .. } = self;
        format!("stream {topic} from position {} on (of {end})", (*made).min(*end))
    }

    /// Compares the record that is made now with the stored one of its number, if that is there.
    fn compare(
        &mut self,
        is_same: impl FnOnce(&[u8]) -> Result<bool>,
    ) -> Result<Option<StoredDifference>> {
        let (topic, position) = (self.topic.clone(), self.made);
        let same = match self.next()? {
            Some(stored) => is_same(&stored.payload)?,
            None => true,
        };
        Ok((!same).then_some(StoredDifference { topic, position }))
    }

    /// The stored record of the same number as the one that is made now; none if there is none.
    fn next(&mut self) -> Result<Option<StreamRecord>> {
        let position = self.made;
        self.made += 1;
        while position < self.end {
            if let Some(next) = self.read.front() {
                let is_stored = next.position == position;
                return Ok(if is_stored { self.read.pop_front() } else { None });
            }
            match self.cursor.next_stored(self.engine, READ)? {
                StreamRead::Records(records) if records.is_empty() => break,
                StreamRead::Records(records) => self.read.extend(records),
                StreamRead::Gap(_) => {}
            }
        }
        Ok(None)
    }
}

/// What makes a joined record another one: features are left out, which a release may compute
/// otherwise, and so are the times of arrival.
fn identity_of_joined(record: &JoinedRecord) -> Result<Vec<u8>> {
    let is_correction = matches!(record, JoinedRecord::Correction(_));
    let example = &record.joined().example;
    let targets: Vec<_> =
        example.targets.iter().map(|target| (target.item.id, &target.outcome)).collect();
    encode(&(is_correction, example.request, example.surface, example.time_ms, targets))
}

/// What makes an update another one.
fn identity_of_update(update: &StateUpdate) -> Result<Vec<u8>> {
    /// The part of an update that is compared.
    #[derive(Serialize)]
    enum UpdateIdentity<T> {
        Outcome { corrected: bool, row: T },
        Item(u64),
        User(u64),
    }
    let corrected = matches!(update, StateUpdate::Corrected(_));
    encode(&match update {
        StateUpdate::Outcome(row) | StateUpdate::Corrected(row) => {
            let times = [row.time_ms, row.outcome_ms];
            let row = (row.request, row.item, row.surface, times, &row.outcome);
            UpdateIdentity::Outcome { corrected, row }
        }
        StateUpdate::Item(item) => UpdateIdentity::Item(item.id),
        StateUpdate::User(user) => UpdateIdentity::User(user.id),
    })
}
