//! The writer of a stream, for many threads.

use std::fs;
use std::path::Path;

use super::Limits;
use super::owner;
use super::segment;
use super::tail::{Job, Tail};
use crate::engine::line::{Line, Outcome};
use crate::engine::{Appended, Appender, Record, Topic, checked};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::dir_lock::DirLock;

#[derive(Debug)]
pub(super) struct DirectoryAppender {
    topic: Topic,
    line: Line<Tail>,
    /// Let go of last.
    _owner: DirLock,
}

impl DirectoryAppender {
    pub(super) fn open(topic: &Topic, folder: &Path, limits: Limits) -> Result<DirectoryAppender> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let owner = owner::claim(topic, folder)?;
        let line = Line::new(topic, Tail::open(folder, limits)?);
        Ok(DirectoryAppender { topic: topic.clone(), line, _owner: owner })
    }

    fn submit(&self, at: Option<u64>, records: &[Record]) -> Result<Outcome> {
        checked(&self.topic, records)?;
        let bytes = records.iter().map(|record| segment::HEADER + record.payload.len()).sum();
        let mut encoded = Vec::with_capacity(bytes);
        for record in records {
            // Ids count in `append` alone, also for the next process, which finds them in the segments.
            let id = if at.is_none() { record.id } else { 0 };
            segment::encode(id, &record.payload, &mut encoded);
        }
        self.line.submit(Job { at, records: encoded })
    }
}

impl Appender for DirectoryAppender {
    fn append(&self, records: &[Record]) -> Result<Appended> {
        let appended = self.submit(None, records)?;
        Ok(appended.expect("only a job with an end of its own can be refused"))
    }

    fn append_at(&self, end: u64, records: &[Record]) -> Result<Option<Appended>> {
        self.submit(Some(end), records)
    }
}
