//! What a joiner does whose state was moved away while its outputs are there: it makes their
//! records again without writing them, and compares. So it learns by which rules they were made:
//! releases before believed every time in an event. Records that neither rules make are told: to
//! skip as many of its own would lose some. If it is to go on, all from the first of them on are
//! new.
//!
//! Missing events end the comparison, and it is told from where on the outputs are not compared: a
//! window is as long as all events before suggest, so no record behind them is known to be made
//! again as it was.

use hypercast_config::OnGap;
use hypercast_core::shutdown::Shutdown;

use super::runner::join_record;
use super::stored_records::{StoredDifference, StoredRecords};
use super::{JoinSink, JoinedRecord, Joiner, OutcomeRecord};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{StreamCursor, StreamEngine, StreamGap, StreamPlace, StreamRead, Topic};

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
             makes of the events: its state is not there, and other settings of [join] or [fm], \
             another features.max_content_mib or another width of content.parquet made the stream, \
             or events were lost. Restore the state, those settings or the events; or set \
             engine.on_gap = \"continue\": all from this record on then counts as new, so that \
             some come twice"
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
            engine: self.engine,
            joined: StoredRecords::open(self.engine, Topic::joined(), 0)?,
            outcomes: StoredRecords::open(self.engine, Topic::outcomes(), 0)?,
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
    engine: &'a dyn StreamEngine,
    joined: StoredRecords,
    outcomes: StoredRecords,
    /// The first difference, or why a record could not be compared.
    found: Result<Option<StoredDifference>>,
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
            self.found = self.joined.compare_joined(self.engine, &joined);
        }
    }

    fn outcome(&mut self, outcome: OutcomeRecord) {
        if matches!(self.found, Ok(None)) {
            self.found = self.outcomes.compare_outcome(self.engine, &outcome);
        }
    }
}
