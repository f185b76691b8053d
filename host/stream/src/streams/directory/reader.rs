//! Reads a stream's segments in order up to the commit mark, from any process. A reader at the end
//! is woken by appends of its own process, and finds those of others by polling.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::commit_mark::{CommitFile, CommitMark};
use super::segment::{self, SegmentItem, SegmentReader};
use super::signal::AppendSignal;
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{READ_BYTES, Reader, StreamRecord, Topic, gone};

/// The first pause between two polls; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(2);

/// The longest pause between two polls.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct DirectoryReader {
    topic: Topic,
    folder: PathBuf,
    position: u64,
    end: Option<CommitFile>,
    open: Option<OpenSegment>,
    signal: Arc<AppendSignal>,
}

/// The segment that is being read.
#[derive(Debug)]
struct OpenSegment {
    base: u64,
    /// The position of the segment's next record.
    next: u64,
    records: SegmentReader,
}

impl DirectoryReader {
    pub(super) fn new(
        topic: &Topic,
        folder: &Path,
        from: u64,
        signal: Arc<AppendSignal>,
    ) -> DirectoryReader {
        let (topic, folder) = (topic.clone(), folder.to_path_buf());
        DirectoryReader { topic, folder, position: from, end: None, open: None, signal }
    }

    fn end(&mut self) -> Result<Option<CommitMark>> {
        if self.end.is_none() {
            self.end = CommitFile::open(&self.folder)?;
        }
        self.end.as_ref().map_or(Ok(None), CommitFile::read)
    }

    /// Appends the records up to the end to `read`; on an error `read` has the records before it.
    fn read(&mut self, end: &CommitMark, most: usize, read: &mut Vec<StreamRecord>) -> Result<()> {
        let mut bytes = 0;
        while read.len() < most && bytes < READ_BYTES && self.position < end.position {
            let open = match &mut self.open {
                Some(open) => open,
                none => none.insert(seek(&self.topic, &self.folder, self.position)?),
            };
            match open.records.next(end.limit(open.base))? {
                SegmentItem::Record { payload, .. } => {
                    if open.next == self.position {
                        bytes += payload.len();
                        read.push(StreamRecord {
                            position: self.position,
                            stored_ms: None,
                            payload: payload.to_vec(),
                        });
                        self.position += 1;
                    }
                    open.next += 1;
                }
                SegmentItem::End if open.base < end.base => {
                    let next = seek(&self.topic, &self.folder, self.position)?;
                    if next.base == open.base {
                        return Err(open.records.damaged());
                    }
                    *open = next;
                }
                SegmentItem::End | SegmentItem::Bad => return Err(open.records.damaged()),
            }
        }
        Ok(())
    }
}

impl Reader for DirectoryReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let until = Instant::now() + wait;
        let mut pause = FIRST_PAUSE;
        loop {
            // Read before the look at the end, so that an append between the two is not missed.
            let appends = self.signal.count();
            if let Some(end) = self.end()?.filter(|end| self.position < end.position) {
                let mut read = Vec::new();
                match self.read(&end, most, &mut read) {
                    // The next call begins where this one stopped, and returns the error then.
                    Err(_) if !read.is_empty() => {}
                    result => result?,
                }
                return Ok(read);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Vec::new());
            }
            self.signal.wait(appends, pause.min(left));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn position(&self) -> u64 {
        self.position
    }
}

/// Opens the segment that contains a position.
fn seek(topic: &Topic, folder: &Path, position: u64) -> Result<OpenSegment> {
    loop {
        let bases = segment::bases(folder)?;
        let Some(&first) = bases.first() else {
            let reason = "the stream's segments are missing; restore them from a copy";
            return Err(Error::data(folder, reason));
        };
        let Some(&base) = bases.iter().rev().find(|&&base| base <= position) else {
            return Err(gone(topic, position, first));
        };
        let path = segment::path(folder, base);
        // Else it was deleted since the directory was listed.
        if let Some(records) = Error::found(&path, SegmentReader::open(path.clone()))? {
            return Ok(OpenSegment { base, next: base, records });
        }
    }
}
