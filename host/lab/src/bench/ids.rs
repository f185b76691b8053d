//! Ids of callers: what it costs to read a ranking's body with ids that are numbers or strings, and
//! how fast and how large a dictionary of strings is.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use hypercast_data::dataset::entity_id::TextId;
use hypercast_data::dataset::id_dictionary::IdDictionary;
use hypercast_serve::api::FeatureValue;
use hypercast_serve::api::RankRequest;
use serde::Deserialize;
use serde_json::json;

use super::timing::{MS, Rival, Scale, US, timed};
use super::{BenchOptions, BenchReport, temporary};
use crate::error::{CommonErrors as _, Error, Result};

/// Candidates of a body.
const CANDIDATES: u64 = 500;

/// Ids in the dictionary that is measured.
const IDS: usize = 1_000_000;

/// Ids that are stored at a time, as by a large body of events.
const BATCH: usize = 1000;

/// A body whose ids are `I`, as they would be if they could be nothing else.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "it is only read from JSON")]
struct PlainRank<I> {
    user: I,
    surface: String,
    candidates: Vec<PlainCandidate<I>>,
    #[serde(default)]
    request: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "it is only read from JSON")]
struct PlainCandidate<I> {
    id: I,
    #[serde(default = "BTreeMap::new")]
    features: BTreeMap<String, FeatureValue>,
}

/// Adds the figures of bodies.
pub(super) fn bodies(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let numbers = body(|at| json!(1_000_003 * at));
    let strings = body(|at| json!(text(at as usize)));
    let ours = |body: &'_ str| read::<RankRequest>(body);
    report.race(
        &format!("reading a ranking's body of {CANDIDATES} ids that are numbers"),
        US,
        options.runs,
        timed(|| ours(&numbers)),
        vec![Rival { name: "numbers alone", run: timed(|| read::<PlainRank<u64>>(&numbers)) }],
    )?;
    report.race(
        &format!("reading a ranking's body of {CANDIDATES} ids that are strings, with their keys"),
        US,
        options.runs,
        timed(|| ours(&strings)),
        vec![Rival {
            name: "strings without keys",
            run: timed(|| read::<PlainRank<String>>(&strings)),
        }],
    )?;
    Ok(())
}

/// Adds the figures of a dictionary.
pub(super) fn dictionary(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let ids: Vec<TextId> = (0..IDS).map(new_id).collect::<Result<_>>()?;
    let dir = temporary()?;
    let per_second = Scale { unit: "/s", of_seconds: |s: f64| IDS as f64 / s };
    let mut folders = 0;
    let mut fresh = || {
        folders += 1;
        dir.path().join(folders.to_string())
    };
    let runs = options.runs.min(5);
    report.race(
        "storing new ids in a dictionary",
        per_second,
        runs,
        timed(|| fill(&fresh(), &ids)),
        vec![Rival {
            name: "a HashMap in memory",
            run: timed(|| {
                let pairs = ids.iter().map(|id| (id.key().key, id.text().to_owned()));
                Ok(pairs.collect::<HashMap<u64, String>>())
            }),
        }],
    )?;
    let folder = fresh();
    let before = resident_bytes()?;
    let dictionary = fill(&folder, &ids)?;
    let after = resident_bytes()?;
    report.figure("memory of an id", after.saturating_sub(before) as f64 / IDS as f64, "bytes");
    let path = folder.join("texts");
    let bytes = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
    report.figure("disk of an id", bytes as f64 / IDS as f64, "bytes");
    let known: HashMap<&str, u64> = ids.iter().map(|id| (id.text(), id.key().key)).collect();
    // Not in the order in which they were stored.
    let asked: Vec<&TextId> = (0..IDS).map(|at| &ids[at * 7919 % IDS]).collect();
    report.race(
        "ids found to be known, of a million",
        Scale { unit: "/s", of_seconds: |s: f64| IDS as f64 / s },
        runs,
        timed(|| {
            for part in asked.chunks(CANDIDATES as usize) {
                dictionary.insert(part.iter().copied())?;
            }
            Ok(())
        }),
        vec![Rival {
            name: "a HashMap in memory",
            run: timed(|| {
                let sum = asked.iter().map(|id| known[id.text()]).fold(0, u64::wrapping_add);
                Ok(sum)
            }),
        }],
    )?;
    drop(dictionary);
    report.race(
        "opening a dictionary of a million",
        MS,
        runs,
        timed(|| Ok(IdDictionary::open(&folder, u64::MAX)?)),
        vec![],
    )?;
    Ok(())
}

fn fill(folder: &Path, ids: &[TextId]) -> Result<IdDictionary> {
    let dictionary = IdDictionary::open(folder, u64::MAX)?;
    for part in ids.chunks(BATCH) {
        dictionary.insert(part.iter())?;
    }
    Ok(dictionary)
}

fn new_id(at: usize) -> Result<TextId> {
    TextId::new(&text(at)).map_err(Error::internal)
}

/// An id as long as a UUID, 36 bytes.
fn text(at: usize) -> String {
    let hash = hypercast_core::hash::splitmix64(at as u64);
    format!("{:08x}-{:04x}-4{:03x}-8000-{:012x}", hash as u32, hash >> 48, at % 4096, at)
}

fn body(id: impl Fn(u64) -> serde_json::Value) -> String {
    let candidates: Vec<_> = (1..=CANDIDATES).map(|at| json!({ "id": id(at) })).collect();
    json!({ "user": id(0), "surface": "feed", "candidates": candidates }).to_string()
}

fn read<'b, B: Deserialize<'b>>(body: &'b str) -> Result<B> {
    let wrong = |error: serde_json::Error| Error::internal(format!("the bench's body: {error}"));
    serde_json::from_slice(body.as_bytes()).map_err(wrong)
}

/// Memory of this process.
fn resident_bytes() -> Result<u64> {
    let path = Path::new("/proc/self/statm");
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.unwrap_or_default() * 4096)
}
