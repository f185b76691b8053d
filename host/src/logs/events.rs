//! The events log: what happened after the data set ends, appended before it is
//! acknowledged and replayed when the daemon starts.
//!
//! One line an entry, `CRC32 JSON`, so that people can read it and a torn tail
//! shows. It knows nothing of features; the daemon applies what it replays.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use hypercast_fm::example::{Item, MAX_VALUES, Outcome, User};
use serde::{Deserialize, Serialize};

use crate::dataset::{Context, Impression};
use crate::error::{Error, Result};

/// A longer line is no entry.
const MAX_LINE: u64 = 1 << 20;

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// An impression whose outcome is known now.
    Impression(Impression),
    /// An item's features are new or changed.
    Item(Item),
    /// A user's features are new or changed.
    User(User),
}

/// When an append is on the disk and not only with the operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fsync {
    /// Before `append` returns: nothing acknowledged is ever lost.
    Always,
    /// Every so many entries: a power cut loses fewer than that; a crash of the process none.
    Every(u32),
    /// When the system pleases; a crash of the process loses nothing.
    Never,
}

/// An append-only log with one writer.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: File,
    fsync: Fsync,
    /// Bytes of whole entries: where the next one goes.
    length: u64,
    unsynced: u32,
}

impl EventLog {
    /// Opens or makes the log and holds its lock. A torn last entry, from a crash amid an append, is
    /// cut with a warning; damage before sound entries is an error.
    pub fn open(path: &Path, fsync: Fsync) -> Result<EventLog> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io(path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::data(
                    path,
                    "another process has this events log open; stop it or use another file",
                ));
            }
            Err(TryLockError::Error(error)) => {
                return Err(Error::Io { path: path.to_path_buf(), source: error });
            }
        }
        let mut log = EventLog { path: path.to_path_buf(), file, fsync, length: 0, unsynced: 0 };
        let sound = log.scan(&mut |_| Ok(()))?;
        let length = log.file.metadata().map_err(Error::io(path))?.len();
        if sound < length {
            tracing::warn!(path = %path.display(), bytes = length - sound, "cut the torn last entry of the events log");
            log.file.set_len(sound).map_err(Error::io(path))?;
            log.file.sync_all().map_err(Error::io(path))?;
        }
        log.length = sound;
        Ok(log)
    }

    /// Appends entries, all or none of them, and syncs as the policy says.
    pub fn append(&mut self, entries: &[Entry]) -> Result<()> {
        let mut text = Vec::new();
        for entry in entries {
            let json = serde_json::to_string(&Record::from(entry))
                .map_err(|error| Error::data(&self.path, error.to_string()))?;
            if json.len() as u64 + 10 > MAX_LINE {
                return Err(Error::data(
                    &self.path,
                    format!("an entry of {} bytes; at most {MAX_LINE} are possible", json.len()),
                ));
            }
            text.extend(format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes());
        }
        if let Err(error) = self.write(&text, entries.len() as u32) {
            // A half-written entry must not come to lie before a whole one.
            self.file.set_len(self.length).map_err(Error::io(&self.path))?;
            return Err(error);
        }
        self.length += text.len() as u64;
        Ok(())
    }

    /// Calls `take` with every entry from the first on and returns their number.
    pub fn replay(&mut self, mut take: impl FnMut(Entry) -> Result<()>) -> Result<u64> {
        let mut entries = 0;
        self.scan(&mut |entry| {
            entries += 1;
            take(entry)
        })?;
        Ok(entries)
    }

    /// Puts everything appended so far on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.unsynced = 0;
        self.file.sync_data().map_err(Error::io(&self.path))
    }

    fn write(&mut self, text: &[u8], entries: u32) -> Result<()> {
        self.file.seek(SeekFrom::Start(self.length)).map_err(Error::io(&self.path))?;
        self.file.write_all(text).map_err(Error::io(&self.path))?;
        self.unsynced = self.unsynced.saturating_add(entries);
        match self.fsync {
            Fsync::Always => self.sync(),
            Fsync::Every(most) if self.unsynced >= most => self.sync(),
            Fsync::Every(_) | Fsync::Never => Ok(()),
        }
    }

    /// Calls `take` with every entry up to the torn tail, if there is one, and returns where that begins.
    fn scan(&mut self, take: &mut dyn FnMut(Entry) -> Result<()>) -> Result<u64> {
        self.file.seek(SeekFrom::Start(0)).map_err(Error::io(&self.path))?;
        let mut reader = BufReader::new(&self.file);
        let (mut at, mut torn_at) = (0, None);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader
                .by_ref()
                .take(MAX_LINE)
                .read_until(b'\n', &mut line)
                .map_err(Error::io(&self.path))? as u64;
            if read == 0 {
                return Ok(torn_at.unwrap_or(at));
            }
            match (parse(&line), torn_at) {
                (Some(entry), None) => take(entry)?,
                (Some(_), Some(torn_at)) => {
                    let reason = format!(
                        "the entry at byte {torn_at} is damaged although sound ones follow; restore the file, or remove that line to go on without it"
                    );
                    return Err(Error::data(&self.path, reason));
                }
                (None, None) => torn_at = Some(at),
                (None, Some(_)) => {}
            }
            at += read;
        }
    }
}

/// An entry as JSON has it: NaN becomes null.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Record {
    Impression {
        request: u64,
        time_ms: i64,
        outcome_ms: i64,
        user: u64,
        item: u64,
        surface: u16,
        actions: u32,
        known: u32,
        values: [Option<f32>; MAX_VALUES],
        context_ids: Vec<u64>,
        context_dense: Vec<f32>,
        truth: Vec<Option<f32>>,
        history_only: bool,
    },
    Item {
        id: u64,
        ids: Vec<u64>,
        dense: Vec<f32>,
    },
    User {
        id: u64,
        ids: Vec<u64>,
        dense: Vec<f32>,
    },
}

fn parse(line: &[u8]) -> Option<Entry> {
    let line = line.strip_suffix(b"\n")?;
    let (crc, json) = (line.get(..8)?, line.get(9..)?);
    let crc = u32::from_str_radix(std::str::from_utf8(crc).ok()?, 16).ok()?;
    if crc != crc32fast::hash(json) {
        return None;
    }
    serde_json::from_slice::<Record>(json).ok().map(Entry::from)
}

fn number(value: f32) -> Option<f32> {
    Some(value).filter(|value| !value.is_nan())
}

impl From<&Entry> for Record {
    fn from(entry: &Entry) -> Record {
        match entry {
            Entry::Item(Item { id, ids, dense, .. }) => {
                Record::Item { id: *id, ids: ids.clone(), dense: dense.clone() }
            }
            Entry::User(User { id, ids, dense }) => {
                Record::User { id: *id, ids: ids.clone(), dense: dense.clone() }
            }
            Entry::Impression(row) => Record::Impression {
                request: row.request,
                time_ms: row.time_ms,
                outcome_ms: row.outcome_ms,
                user: row.user,
                item: row.item,
                surface: row.surface,
                actions: row.outcome.actions,
                known: row.outcome.known,
                values: row.outcome.values.map(number),
                context_ids: row.context.ids.clone(),
                context_dense: row.context.dense.clone(),
                truth: row.truth.iter().copied().map(number).collect(),
                history_only: row.history_only,
            },
        }
    }
}

impl From<Record> for Entry {
    fn from(record: Record) -> Entry {
        match record {
            Record::Item { id, ids, dense } => {
                Entry::Item(Item { id, ids, dense, ..Item::default() })
            }
            Record::User { id, ids, dense } => Entry::User(User { id, ids, dense }),
            Record::Impression {
                request,
                time_ms,
                outcome_ms,
                user,
                item,
                surface,
                actions,
                known,
                values,
                context_ids,
                context_dense,
                truth,
                history_only,
            } => Entry::Impression(Impression {
                request,
                time_ms,
                outcome_ms,
                user,
                item,
                surface,
                outcome: Outcome {
                    actions,
                    known,
                    values: values.map(|value| value.unwrap_or(f32::NAN)),
                },
                context: Context { ids: context_ids, dense: context_dense },
                truth: truth.into_iter().map(|value| value.unwrap_or(f32::NAN)).collect(),
                history_only,
            }),
        }
    }
}
