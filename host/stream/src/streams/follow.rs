//! Follows a stream from a saved place on, and never passes missing records in silence.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hypercast_config::OnGap;

use super::{Reader, StreamEngine, StreamGap, StreamPlace, StreamRecord, Topic};
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
    reader: Box<dyn Reader>,
    place: StreamPlace,
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
        let reader = engine.resume(&topic, place)?;
        Ok(StreamFollower { engine, topic, reader, place, gaps })
    }

    /// The place after the last record that was read.
    pub fn place(&self) -> StreamPlace {
        self.place
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
        self.reader = self.engine.resume(&self.topic, place)?;
        self.place = place;
        Ok(())
    }

    /// The next records, as [`Reader::next`] returns them. If records are missing, this is logged
    /// and counted; with [`OnGap::Continue`] the call returns no records and the next one goes on
    /// behind the gap.
    ///
    /// # Errors
    /// As [`Reader::next`]; [`Error::Gap`] with [`OnGap::Stop`].
    pub fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let error = match self.reader.next(most, wait) {
            Ok(records) => {
                if let Some(last) = records.last() {
                    self.place = StreamPlace::after(last);
                }
                return Ok(records);
            }
            Err(error) => error,
        };
        match error {
            Error::Gap(gap) => {
                let next = StreamPlace::at(gap.next_position());
                self.gaps.settle(gap)?;
                self.seek(next)?;
                Ok(Vec::new())
            }
            // The reader may have lost its connection or its file; the caller tries again.
            error => {
                if let Ok(reader) = self.engine.resume(&self.topic, self.place) {
                    self.reader = reader;
                }
                Err(error)
            }
        }
    }
}
