//! Changed streams of published weights: records lost, repeated, reordered, damaged, or forged with
//! a valid checksum.
//!
//! As long as no record is forged, the follower must return only publications as they were
//! published.

use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use hypercast_stream::publish::{Publication, PublicationFollower, fm_update};
use hypercast_stream::streams::{MAX_RECORD_BYTES, MemoryEngine, Record, StreamEngine, Topic};

use crate::edit;
use crate::model::model;

/// The length of a record's magic number and checksum.
const PREFIX: usize = 8;

/// The most bytes of a record's decompressed body.
const MOST_BODY: usize = 4 << 20;

/// Changes the stream and follows it.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let mut records = model().records.clone();
    let mut forged = false;
    for _ in 0..u.int_in_range(1..=4)? {
        if records.is_empty() {
            break;
        }
        let at = u.choose_index(records.len())?;
        match u.int_in_range(0..=6)? {
            0 => drop(records.remove(at)),
            1 => {
                let to = u.choose_index(records.len())?;
                records.insert(to, records[at].clone());
            }
            2 => {
                let other = u.choose_index(records.len())?;
                records.swap(at, other);
            }
            3 => edit::edits(u, &mut records[at], 3)?,
            4 => records.truncate(at + 1),
            what => {
                forged = true;
                if let Some(record) = forge(u, &records[at], what == 5)? {
                    records[at] = record;
                }
            }
        }
    }
    let given = follow(records);
    for publication in &given {
        let known = originals().iter().any(|original| original == publication);
        assert!(forged || known, "this publication was never published: {:?}", publication.header);
    }
    absorb(given);
    Ok(())
}

/// Changes the body or envelope of a record and sets a valid checksum.
fn forge(u: &mut Unstructured, record: &[u8], body: bool) -> Result<Option<Vec<u8>>> {
    // The body begins with zstd's magic number.
    let magic = [0x28, 0xb5, 0x2f, 0xfd];
    let found = record.windows(4).position(|bytes| bytes == magic);
    let Some(at) = found.filter(|&at| at >= PREFIX) else { return Ok(None) };
    let mut rest = record[PREFIX..at].to_vec();
    let compressed = &record[at..];
    if body {
        let Ok(mut bytes) = zstd::bulk::decompress(compressed, MOST_BODY) else { return Ok(None) };
        // Names, shapes and lengths are at both ends; the rest is numbers.
        if u.ratio(1, 2)? && bytes.len() > 256 {
            let tail = bytes.split_off(256);
            edit::edits(u, &mut bytes, 4)?;
            bytes.extend(tail);
        } else {
            edit::edits(u, &mut bytes, 4)?;
        }
        rest.extend(zstd::bulk::compress(&bytes, 1).expect("there is enough memory"));
    } else {
        edit::edits(u, &mut rest, 2)?;
        rest.extend(compressed);
    }
    let crc = crc32fast::hash(&rest).to_le_bytes();
    Ok(Some([&record[..4], &crc, &rest].concat()))
}

fn follow(records: Vec<Vec<u8>>) -> Vec<Publication> {
    let engine: Arc<dyn StreamEngine> = Arc::new(MemoryEngine::new(16));
    let topic = Topic::fm("1.0.0");
    let records: Vec<Record> = records
        .into_iter()
        .filter(|payload| payload.len() <= MAX_RECORD_BYTES)
        .map(|payload| Record { id: 0, payload })
        .collect();
    engine
        .appender(&topic)
        .and_then(|to| to.append(&records))
        .expect("the stream in memory accepts records");
    // Opening fails if the end of the stream is damaged.
    let Ok(mut follower) = PublicationFollower::open(engine, topic) else { return Vec::new() };
    let mut given = Vec::new();
    while let Ok(Some(publication)) = follower.next(Duration::ZERO) {
        given.push(publication);
    }
    given
}

/// Merges publications and makes a checkpoint of them, as a server does.
fn absorb(publications: Vec<Publication>) {
    let mut publications = publications.into_iter();
    let Some(mut all) = publications.next() else { return };
    for later in publications {
        if let Ok(update) = fm_update(later.clone()) {
            let _ = update.check();
        }
        if all.absorb(later).is_err() {
            return;
        }
    }
    if let Ok(update) = fm_update(all) {
        let _ = update.checkpoint(&model().dir.join("absorbed"));
    }
}

fn originals() -> &'static [Publication] {
    static ORIGINALS: std::sync::OnceLock<Vec<Publication>> = std::sync::OnceLock::new();
    ORIGINALS.get_or_init(|| {
        let given = follow(model().records.clone());
        assert_eq!(given.len(), 3, "a snapshot and two deltas");
        given
    })
}
