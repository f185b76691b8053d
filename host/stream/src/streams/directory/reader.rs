//! Reads a stream's segments in order up to the commit mark, from any process. A reader at the end
//! is woken by appends of its own process, and finds those of others by polling.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hypercast_core::clock;

use super::commit_mark::{CommitFile, CommitMark};
use super::segment::{self, SegmentItem, SegmentReader};
use super::signal::AppendSignal;
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{GapCause, READ_BYTES, Reader, StreamPlace, StreamRecord, Topic};

/// The first pause between two polls; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(2);

/// The longest pause between two polls.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct DirectoryReader {
    topic: Topic,
    folder: PathBuf,
    place: StreamPlace,
    end: Option<CommitFile>,
    open: Option<OpenSegment>,
    signal: Arc<AppendSignal>,
}

/// The segment that is being read.
#[derive(Debug)]
struct OpenSegment {
    /// The first position of the stream when this was opened.
    first: u64,
    base: u64,
    /// The position of the segment's next record.
    next: u64,
    records: SegmentReader,
}

impl DirectoryReader {
    pub(super) fn new(
        topic: &Topic,
        folder: &Path,
        place: StreamPlace,
        signal: Arc<AppendSignal>,
    ) -> DirectoryReader {
        let (topic, folder) = (topic.clone(), folder.to_path_buf());
        DirectoryReader { topic, folder, place, end: None, open: None, signal }
    }

    fn end(&mut self) -> Result<Option<CommitMark>> {
        if self.end.is_none() {
            self.end = CommitFile::open(&self.folder)?;
        }
        self.end.as_ref().map_or(Ok(None), CommitFile::read)
    }

    /// Returns an error if the stream lost records that were read before.
    fn check_end(&self, end: u64) -> Result<()> {
        if self.place.position <= end {
            return Ok(());
        }
        // After a power cut the file `end` may lag behind the records until a writer corrects it.
        let stored = segment::stored_end(&self.folder)?.max(end);
        self.place.check_span(&self.topic, &(0..stored))
    }

    /// Appends the records up to the end to `read`; on an error `read` has the records before it.
    fn read(&mut self, end: &CommitMark, most: usize, read: &mut Vec<StreamRecord>) -> Result<()> {
        let mut bytes = 0;
        while read.len() < most && bytes < READ_BYTES && self.place.position < end.position {
            let position = self.place.position;
            let open = match &mut self.open {
                Some(open) => open,
                none => none.insert(seek(&self.topic, &self.folder, self.place)?),
            };
            match open.records.next(end.limit(open.base))? {
                SegmentItem::Record { payload, .. } => {
                    if open.next == position {
                        bytes += payload.len();
                        let record =
                            StreamRecord { position, stored_ms: None, payload: payload.to_vec() };
                        self.place = StreamPlace::after(&record);
                        read.push(record);
                    } else if open.next + 1 == position {
                        self.place.check_before(&self.topic, payload, open.first)?;
                    }
                    open.next += 1;
                }
                SegmentItem::End if open.base < end.base => {
                    let next = seek(&self.topic, &self.folder, StreamPlace::at(position))?;
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
        let until = clock::instant() + wait;
        let mut pause = FIRST_PAUSE;
        let end = self.end()?.map_or(0, |end| end.position);
        self.check_end(end)?;
        loop {
            // Read before the look at the end, so that an append between the two is not missed.
            let appends = self.signal.count();
            if let Some(end) = self.end()?.filter(|end| self.place.position < end.position) {
                let mut read = Vec::new();
                let Err(error) = self.read(&end, most, &mut read) else { return Ok(read) };
                self.open = None;
                // The next call begins where this one stopped, and returns the error then.
                return if read.is_empty() { Err(error) } else { Ok(read) };
            }
            let left = until.saturating_duration_since(clock::instant());
            if left.is_zero() {
                // The next call opens the file again, because the folder may be replaced meanwhile.
                self.end = None;
                return Ok(Vec::new());
            }
            self.signal.wait(appends, pause.min(left));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn position(&self) -> u64 {
        self.place.position
    }
}

/// Opens the segment that contains the record at a place, or the one before if that is to be
/// compared.
fn seek(topic: &Topic, folder: &Path, place: StreamPlace) -> Result<OpenSegment> {
    loop {
        let bases = segment::bases(folder)?;
        let Some(&first) = bases.first() else {
            let reason = "the stream's segments are missing; restore them from a copy";
            return Err(Error::data(folder, reason));
        };
        let from = place.read_from(first);
        let Some(&base) = bases.iter().rev().find(|&&base| base <= from) else {
            return Err(place.gap(topic, GapCause::Deleted { first }));
        };
        let path = segment::path(folder, base);
        // Else it was deleted since the directory was listed.
        if let Some(records) = Error::found(&path, SegmentReader::open(path.clone()))? {
            return Ok(OpenSegment { first, base, next: base, records });
        }
    }
}
