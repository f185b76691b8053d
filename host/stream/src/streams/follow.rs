//! Follows a stream from a saved place on, and never passes missing records in silence. Where the
//! stream has other records than were read, it goes back to the last place before those.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hypercast_config::OnGap;

use super::cursor::{StreamCursor, StreamRead};
use super::{GapCause, StreamEngine, StreamGap, StreamPlace, StreamRecord, StreamTrail, Topic};
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
    topic: Topic,
    cursor: StreamCursor,
    trail: StreamTrail,
    gaps: GapHandling,
}

impl StreamFollower {
    /// Follows from where a reader stands on, or from the first stored record.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        topic: Topic,
        from: Option<StreamTrail>,
        gaps: GapHandling,
    ) -> Result<StreamFollower> {
        let trail = match from {
            Some(trail) => trail,
            None => StreamPlace::at(engine.span(&topic)?.start).into(),
        };
        let cursor = StreamCursor::open(&*engine, &topic, trail.place())?;
        Ok(StreamFollower { engine, topic, cursor, trail, gaps })
    }

    /// The place after the last record that was read.
    pub fn place(&self) -> StreamPlace {
        self.cursor.place()
    }

    /// That place and earlier ones, to be saved by whoever goes on there after a restart.
    pub fn trail(&self) -> &StreamTrail {
        &self.trail
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
        self.cursor.seek(&*self.engine, place)?;
        self.trail.move_to(place);
        Ok(())
    }

    /// The next records, as [`Reader::next`](super::Reader::next) returns them. If records are
    /// missing, this is logged and counted; with [`OnGap::Continue`] the call returns no records,
    /// and the next one goes on with the first stored record that was not read. Some that were read
    /// may come again before it.
    ///
    /// # Errors
    /// As there; [`Error::Gap`] with [`OnGap::Stop`].
    pub fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let read = self.cursor.next(&*self.engine, most, wait)?;
        self.settled(read)
    }

    /// As [`StreamFollower::next`], of the records that the stream has now: if there are none, and
    /// the place is the same, it has no more.
    ///
    /// # Errors
    /// As there.
    pub fn next_stored(&mut self, most: usize) -> Result<Vec<StreamRecord>> {
        let read = self.cursor.next_stored(&*self.engine, most)?;
        self.settled(read)
    }

    /// The records of a read, or none if missing ones are passed.
    fn settled(&mut self, read: StreamRead) -> Result<Vec<StreamRecord>> {
        match read {
            StreamRead::Records(records) => {
                if !records.is_empty() {
                    self.trail.move_to(self.cursor.place());
                }
                Ok(records)
            }
            StreamRead::Gap(gap) => {
                let before = self.trail.place();
                if let Err(stopped) = self.pass(gap) {
                    self.cursor.seek(&*self.engine, before)?;
                    return Err(stopped);
                }
                Ok(Vec::new())
            }
        }
    }

    fn pass(&mut self, gap: StreamGap) -> Result<()> {
        let behind = match (self.gaps.policy, gap.cause) {
            (OnGap::Stop, _) | (_, GapCause::Deleted { .. } | GapCause::Unrepeated) => {
                self.cursor.place()
            }
            (OnGap::Continue, GapCause::Cut { end }) => self.last_unchanged(end)?,
            (OnGap::Continue, GapCause::Changed { .. }) => self.last_unchanged(gap.position)?,
        };
        self.gaps.settle(gap)?;
        tracing::warn!("stream {}: going on at position {}", self.topic, behind.position);
        self.seek(behind)
    }

    /// The newest place, up to a position, at which it stood and before which the stream still has
    /// the record that was read; else that of the first stored record.
    fn last_unchanged(&self, most: u64) -> Result<StreamPlace> {
        let first = self.engine.span(&self.topic)?.start;
        let earlier = self.trail.earlier().iter().rev();
        for place in earlier.filter(|place| (first + 1..=most).contains(&place.position)) {
            let before = StreamPlace::at(place.position - 1);
            let mut cursor = StreamCursor::open(&*self.engine, &self.topic, before)?;
            if let StreamRead::Records(records) = cursor.next_stored(&*self.engine, 1)?
                && records.first().map(StreamPlace::after) == Some(*place)
            {
                return Ok(*place);
            }
        }
        Ok(StreamPlace::at(first))
    }
}
