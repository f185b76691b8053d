//! Reads recorded requests from a file or a folder, the newest first.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    request_log::{EXTENSION, MAGIC, MAX_RECORD, RecordedRequest},
};

/// The newest requests that `wanted` accepts, at most `most`, in the order in which they were
/// answered.
///
/// An unfinished record at the end is ignored; a damaged one ends its file, with a warning.
///
/// # Errors
/// The path has no recorded requests, or cannot be read.
pub fn newest(
    path: &Path,
    most: usize,
    wanted: impl Fn(&RecordedRequest) -> bool,
) -> Result<Vec<RecordedRequest>> {
    let files: Vec<PathBuf> = if path.is_dir() {
        files(path)?.into_iter().map(|(_, path)| path).collect()
    } else {
        vec![path.to_path_buf()]
    };
    let mut newest: Vec<RecordedRequest> = Vec::new();
    for file in files.iter().rev() {
        if newest.len() >= most {
            break;
        }
        // A daemon may have removed the file in the meantime.
        let bytes = match fs::read(file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.is_dir() => continue,
            bytes => bytes.map_err(Error::io(file))?,
        };
        let mut own: Vec<RecordedRequest> =
            records(file, &bytes)?.into_iter().filter(&wanted).collect();
        own.drain(..own.len().saturating_sub(most - newest.len()));
        own.append(&mut newest);
        newest = own;
    }
    Ok(newest)
}

/// The files of a folder with their numbers, the oldest first.
pub(super) fn files(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let ours = path.extension().is_some_and(|extension| extension == EXTENSION);
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        if let (true, Some(number)) = (ours, number) {
            files.push((number, path));
        }
    }
    files.sort();
    Ok(files)
}

fn records(path: &Path, bytes: &[u8]) -> Result<Vec<RecordedRequest>> {
    let mut rest = bytes
        .strip_prefix(MAGIC)
        .ok_or_else(|| Error::data(path, "it is not a request log that this version can read"))?;
    let mut records = Vec::new();
    while !rest.is_empty() {
        match record(rest) {
            Ok(Some((record, after))) => {
                records.push(record);
                rest = after;
            }
            // The last record was cut short.
            Ok(None) => break,
            Err(why) => {
                tracing::warn!(path = %path.display(), why, after = records.len(), "a recorded request is damaged; the rest of the file is skipped");
                break;
            }
        }
    }
    Ok(records)
}

fn record(bytes: &[u8]) -> std::result::Result<Option<(RecordedRequest, &[u8])>, String> {
    let Some((head, rest)) = bytes.split_first_chunk::<8>() else { return Ok(None) };
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let Some((packed, after)) = rest.split_at_checked(word(0) as usize) else { return Ok(None) };
    if crc32fast::hash(packed) != word(4) {
        return Err("its checksum is wrong".into());
    }
    let plain = zstd::bulk::decompress(packed, MAX_RECORD).map_err(|error| error.to_string())?;
    let wrong = |error: postcard::Error| error.to_string();
    let (mut record, behind) =
        postcard::take_from_bytes::<RecordedRequest>(&plain).map_err(wrong)?;
    if !behind.is_empty() {
        let behind_it;
        (record.propensities, behind_it) = postcard::take_from_bytes(behind).map_err(wrong)?;
        if !behind_it.is_empty() {
            record.predictions = postcard::from_bytes(behind_it).map_err(wrong)?;
        }
    }
    Ok(Some((record, after)))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use hypercast_fm::example::{Example, User};

    use super::{super::writer::FileRing, *};
    use hypercast_config::RecordedSettings;

    pub fn recorded(request: u64) -> RecordedRequest {
        let example = Example {
            request,
            user: Arc::new(User { id: 1, ..User::default() }),
            surface: 0,
            time_ms: 5,
            history: Vec::new(),
            targets: Vec::new(),
        };
        let tae = (0..64).map(|at| (request * 64 + at) as f32).collect();
        RecordedRequest {
            schema: "s".into(),
            at_ms: 1,
            example,
            fm: "1.0.0".into(),
            tae_dim: 64,
            tae,
            arm: "a@1.0.0".into(),
            degraded: false,
            ranking: vec![(7, 0.5)],
            propensities: vec![Some(0.25)],
            predictions: vec![0.75],
        }
    }

    fn ids(records: &[RecordedRequest]) -> Vec<u64> {
        records.iter().map(|record| record.example.request).collect()
    }

    #[test]
    fn records_of_before_there_were_propensities_are_read() {
        let before = postcard::to_allocvec(&recorded(3)).unwrap();
        let packed = zstd::encode_all(&before[..], 1).unwrap();
        let head = [packed.len() as u32, crc32fast::hash(&packed)].map(u32::to_le_bytes);
        let bytes = [head.concat(), packed].concat();
        let (read, rest) = record(&bytes).unwrap().unwrap();
        assert_eq!((read.example.request, read.ranking.len(), rest.len()), (3, 1, 0));
        assert!(read.propensities.is_empty() && read.predictions.is_empty());
    }

    #[test]
    fn the_ring_keeps_the_newest_and_a_cut_file_loses_its_last_record_alone() {
        let dir = tempfile::tempdir().unwrap();
        let settings = RecordedSettings { files: 3, mib: 1, ..RecordedSettings::default() };
        let mut ring = FileRing::open(dir.path(), &settings).unwrap();
        for request in 0..20_000 {
            ring.append(&recorded(request)).unwrap();
        }
        drop(ring);
        let kept = files(dir.path()).unwrap();
        assert_eq!(kept.len(), 3);
        let bytes: u64 = kept.iter().map(|(_, path)| path.metadata().unwrap().len()).sum();
        assert!(bytes <= 1 << 20, "{bytes}");
        let all = newest(dir.path(), usize::MAX, |_| true).unwrap();
        assert!(all.len() < 20_000 && ids(&all).windows(2).all(|pair| pair[0] + 1 == pair[1]));
        assert_eq!(all.last().unwrap().tae[1], 19_999.0 * 64.0 + 1.0);
        assert_eq!(all.last().unwrap().propensities, [Some(0.25)]);
        assert_eq!(all.last().unwrap().predictions, [0.75]);
        let odd = newest(dir.path(), 3, |record| record.example.request % 2 == 1).unwrap();
        assert_eq!(ids(&odd), [19_995, 19_997, 19_999]);
        // Cut within the last record, as a killed process leaves it; the next process writes to a
        // new file.
        let last = &kept.last().unwrap().1;
        let bytes = fs::read(last).unwrap();
        fs::write(last, &bytes[..bytes.len() - 3]).unwrap();
        let mut ring = FileRing::open(dir.path(), &settings).unwrap();
        ring.append(&recorded(30_000)).unwrap();
        assert_eq!(ids(&newest(dir.path(), 2, |_| true).unwrap()), [19_998, 30_000]);
        assert!(newest(&dir.path().join("none"), 1, |_| true).is_err());
    }
}
