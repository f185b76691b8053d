//! Writes the request log: a thread, a short queue, and a ring of files. A full queue drops
//! requests and counts them.
//!
//! A record is a length, a checksum and a zstd frame of its own. So it can be read at once, and a
//! file that was cut short only loses its last record.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::mpsc::Receiver,
};

use hypercast_config::RecordedSettings;
use hypercast_core::{atomic_dir, logging::RepeatedFailures, supervised_thread::OnPanic};
use hypercast_stream::registry::user_bucket;

use crate::{
    error::{CommonErrors as _, Error, Result},
    request_log::{EXTENSION, MAGIC, RecordedRequest, reader::files},
    threads::QueueThread,
};

/// zstd's fastest regular level.
const LEVEL: i32 = 1;

/// Makes the record of a request that is offered to the log; the log's thread calls it.
type MakeRecord = Box<dyn FnOnce() -> RecordedRequest + Send>;

/// Writes the log in a thread. Dropping it writes what is queued first.
pub struct RequestLog {
    /// None where the share is 0.
    thread: Option<QueueThread<MakeRecord>>,
    share: f64,
}

impl RequestLog {
    /// Starts the log in `dir`. Calls `count` with `kept` or `failed` for each request.
    ///
    /// # Errors
    /// The folder cannot be created, or a thread cannot be started.
    pub fn start(
        dir: &Path,
        settings: &RecordedSettings,
        count: impl Fn(&'static str) + Send + 'static,
    ) -> Result<Self> {
        if settings.share == 0.0 {
            return Ok(Self { thread: None, share: 0.0 });
        }
        let mut ring = FileRing::open(dir, settings)?;
        let run = move |requests: Receiver<MakeRecord>| {
            let mut failures = RepeatedFailures::default();
            while let Ok(make) = requests.recv() {
                match ring.append(&make()) {
                    Ok(()) => count("kept"),
                    Err(error) => {
                        count("failed");
                        if failures.is_news(&error) {
                            tracing::warn!(%error, "requests cannot be recorded; serving is not affected");
                        }
                    }
                }
            }
        };
        let thread = QueueThread::start("recorded", settings.queue, OnPanic::NotReady, run)?;
        Ok(Self { thread: Some(thread), share: settings.share })
    }

    /// Whether a request is in the sample.
    pub fn wants(&self, request: u64) -> bool {
        self.share > 0.0 && user_bucket(request, "recorded") < self.share
    }

    /// Queues a request. Returns false if the queue is full.
    pub fn offer(&self, make: impl FnOnce() -> RecordedRequest + Send + 'static) -> bool {
        self.thread.as_ref().is_some_and(|thread| thread.try_send(Box::new(make)).is_ok())
    }
}

/// A bounded number of files of bounded size; the oldest is removed first.
pub(super) struct FileRing {
    dir: PathBuf,
    most_files: usize,
    bytes_per_file: u64,
    next: u64,
    file: Option<(File, u64)>,
}

impl FileRing {
    /// Opens the ring after the newest file in `dir`.
    pub(super) fn open(dir: &Path, settings: &RecordedSettings) -> Result<Self> {
        atomic_dir::create(dir)?;
        let next = files(dir)?.last().map_or(0, |(number, _)| number + 1);
        let bytes_per_file = (settings.mib << 20) / settings.files as u64;
        let (dir, most_files) = (dir.to_path_buf(), settings.files);
        Ok(Self { dir, most_files, bytes_per_file, next, file: None })
    }

    pub(super) fn append(&mut self, record: &RecordedRequest) -> Result<()> {
        let wrong = |error: postcard::Error| Error::data(&self.dir, error.to_string());
        let plain = postcard::to_allocvec(&(record, &record.propensities, &record.predictions))
            .map_err(wrong)?;
        let packed = zstd::encode_all(&plain[..], LEVEL).map_err(Error::io(&self.dir))?;
        let (length, checksum) = (packed.len() as u32, crc32fast::hash(&packed));
        let bytes = [&length.to_le_bytes(), &checksum.to_le_bytes(), &*packed].concat();
        let fits = |size: &u64| size + bytes.len() as u64 <= self.bytes_per_file;
        if !self.file.as_ref().is_some_and(|(_, size)| fits(size)) {
            self.roll()?;
        }
        let (file, size) = self.file.as_mut().expect("one was opened");
        let written = file.write_all(&bytes);
        *size += bytes.len() as u64;
        if let Err(error) = written {
            // The file may end in half a record, so the next one goes to a new file.
            self.file = None;
            return Err(Error::io(&self.dir)(error));
        }
        Ok(())
    }

    fn roll(&mut self) -> Result<()> {
        let path = self.dir.join(format!("{:010}.{EXTENSION}", self.next));
        let mut file = File::create_new(&path).map_err(Error::io(&path))?;
        self.next += 1;
        file.write_all(MAGIC).map_err(Error::io(&path))?;
        self.file = Some((file, MAGIC.len() as u64));
        let held = files(&self.dir)?;
        for (_, path) in &held[..held.len().saturating_sub(self.most_files)] {
            fs::remove_file(path).map_err(Error::io(path))?;
        }
        Ok(())
    }
}
