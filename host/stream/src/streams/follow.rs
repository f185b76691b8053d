//! Follows a stream from a saved place on, and never passes missing records in silence.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hypercast_config::OnGap;

use super::cursor::{StreamCursor, StreamRead};
use super::{StreamEngine, StreamGap, StreamPlace, StreamRecord, Topic};
use crate::error::{Error, Result};

/// What a follower does when records are missing.
#[derive(Clone)]
pub struct GapHandling {
    /// Whether it stops or goes on.
    pub policy: OnGap,
    /// Counts the gap, for the metrics of the process.
    pub count: Arc<dyn Fn(&Topic) + Send + Sync>,
}

impl GapHandling {
    /// Logs and counts missing records.
    ///
    /// # Errors
    /// [`Error::Gap`] with [`OnGap::Stop`].
    pub fn settle(&self, gap: StreamGap) -> Result<()> {
        (self.count)(&gap.topic);
        match self.policy {
            OnGap::Stop => {
                tracing::error!("records are missing: {gap}; stopping (engine.on_gap)");
                Err(Error::Gap(gap))
            }
            OnGap::Continue => {
                tracing::error!("records are missing: {gap}; going on (engine.on_gap)");
                Ok(())
            }
        }
    }
}

impl fmt::Debug for GapHandling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GapHandling").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Follows one stream. A failed read is repeated from the same place by the next call.
pub struct StreamFollower {
    engine: Arc<dyn StreamEngine>,
    cursor: StreamCursor,
    gaps: GapHandling,
}

impl StreamFollower {
    /// Follows from a place on, or from the first stored record.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        topic: Topic,
        place: Option<StreamPlace>,
        gaps: GapHandling,
    ) -> Result<StreamFollower> {
        let place = match place {
            Some(place) => place,
            None => StreamPlace::at(engine.span(&topic)?.start),
        };
        let cursor = StreamCursor::open(&*engine, &topic, place)?;
        Ok(StreamFollower { engine, cursor, gaps })
    }

    /// The place after the last record that was read.
    pub fn place(&self) -> StreamPlace {
        self.cursor.place()
    }

    /// Changes what is done about missing records from now on.
    pub fn set_policy(&mut self, policy: OnGap) {
        self.gaps.policy = policy;
    }

    /// Reads from another place on.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn seek(&mut self, place: StreamPlace) -> Result<()> {
        self.cursor.seek(&*self.engine, place)
    }

    /// The next records, as [`Reader::next`](super::Reader::next) returns them. If records are
    /// missing, this is logged and counted; with [`OnGap::Continue`] the call returns no records
    /// and the next one goes on behind the gap.
    ///
    /// # Errors
    /// As there; [`Error::Gap`] with [`OnGap::Stop`].
    pub fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let before = self.place();
        let read = self.cursor.next(&*self.engine, most, wait)?;
        self.settled(read, before)
    }

    /// As [`StreamFollower::next`], of the records that the stream has now: if there are none, and
    /// the place is the same, it has no more.
    ///
    /// # Errors
    /// As there.
    pub fn next_stored(&mut self, most: usize) -> Result<Vec<StreamRecord>> {
        let before = self.place();
        let read = self.cursor.next_stored(&*self.engine, most)?;
        self.settled(read, before)
    }

    /// The records of a read from `before` on, or none if missing ones are passed.
    fn settled(&mut self, read: StreamRead, before: StreamPlace) -> Result<Vec<StreamRecord>> {
        match read {
            StreamRead::Records(records) => Ok(records),
            StreamRead::Gap(gap) => {
                if let Err(stopped) = self.gaps.settle(gap) {
                    self.seek(before)?;
                    return Err(stopped);
                }
                Ok(Vec::new())
            }
        }
    }
}
