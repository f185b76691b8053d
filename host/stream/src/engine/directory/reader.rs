//! Reads a stream's segments in order, as far as its end says, from any
//! process. What is not there yet is looked for again after a pause.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::end::{End, EndFile};
use super::segment::{self, Next, Records};
use crate::engine::{READ_BYTES, Reader, Stored, Topic};
use crate::error::{CommonErrors as _, Error, Result};

/// Between two looks for more: from, to.
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(20));

#[derive(Debug)]
pub(super) struct DirectoryReader {
    topic: Topic,
    folder: PathBuf,
    position: u64,
    end: Option<EndFile>,
    open: Option<Open>,
}

/// The segment that is being read.
#[derive(Debug)]
struct Open {
    base: u64,
    /// The position of its next record.
    next: u64,
    records: Records,
}

impl DirectoryReader {
    pub(super) fn new(topic: &Topic, folder: &Path, from: u64) -> DirectoryReader {
        let (topic, folder) = (topic.clone(), folder.to_path_buf());
        DirectoryReader { topic, folder, position: from, end: None, open: None }
    }

    fn end(&mut self) -> Result<Option<End>> {
        if self.end.is_none() {
            self.end = EndFile::open(&self.folder)?;
        }
        self.end.as_ref().map_or(Ok(None), EndFile::read)
    }

    /// Reads up to the end, into `read` as far as it comes.
    fn read(&mut self, end: &End, most: usize, read: &mut Vec<Stored>) -> Result<()> {
        let mut bytes = 0;
        while read.len() < most && bytes < READ_BYTES && self.position < end.position {
            let open = match &mut self.open {
                Some(open) => open,
                none => none.insert(seek(&self.topic, &self.folder, self.position)?),
            };
            match open.records.next(end.limit(open.base))? {
                Next::Record { payload, .. } => {
                    if open.next == self.position {
                        bytes += payload.len();
                        read.push(Stored { position: self.position, payload: payload.to_vec() });
                        self.position += 1;
                    }
                    open.next += 1;
                }
                Next::End if open.base < end.base => {
                    let next = seek(&self.topic, &self.folder, self.position)?;
                    if next.base == open.base {
                        return Err(open.records.damaged());
                    }
                    *open = next;
                }
                Next::End | Next::Bad => return Err(open.records.damaged()),
            }
        }
        Ok(())
    }
}

impl Reader for DirectoryReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<Stored>> {
        let until = Instant::now() + wait;
        let mut pause = PAUSE.0;
        loop {
            if let Some(end) = self.end()?.filter(|end| self.position < end.position) {
                let mut read = Vec::new();
                match self.read(&end, most, &mut read) {
                    // It comes again with the next call, which begins where this one stopped.
                    Err(_) if !read.is_empty() => {}
                    result => result?,
                }
                return Ok(read);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Vec::new());
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    fn position(&self) -> u64 {
        self.position
    }
}

/// Opens the segment that has a position.
fn seek(topic: &Topic, folder: &Path, position: u64) -> Result<Open> {
    loop {
        let bases = segment::bases(folder)?;
        let Some(&first) = bases.first() else { return Err(missing(folder)) };
        let Some(&base) = bases.iter().rev().find(|&&base| base <= position) else {
            return Err(Error::Gone { topic: topic.to_string(), position, first });
        };
        match Records::open(segment::path(folder, base)) {
            Ok(records) => return Ok(Open { base, next: base, records }),
            // Let go of since the folder was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(segment::path(folder, base))(error)),
        }
    }
}

fn missing(folder: &Path) -> Error {
    Error::data(folder, "the stream's segments are missing; restore them from a copy")
}
