//! The encoding of a publication as records of a stream, each short enough for any engine and with
//! its own checksum.
//!
//! A `Begin` announces the content, `Part`s have the weights, and an `End` has a checksum of all
//! parts; without its end a publication does not exist. Numbers are stored as four planes of bytes,
//! because the high bytes of neighbours are similar, and compressed with zstd. Every record names
//! its chain and publication, so that foreign records are detected, and the beginning of the newest
//! complete snapshot, so that a new follower finds it from the last record.

use serde::{Deserialize, Serialize};

use super::{PublicationHeader, TensorSlice};

/// The most bytes of numbers and ids in a part before compression: a part that zstd cannot shrink
/// still fits a record.
pub(super) const PART_BYTES: usize = 880 << 10;

/// The most bytes of weights that a follower accepts in a publication.
const MAX_PUBLICATION_BYTES: u64 = 64 << 30;

const MAGIC: [u8; 4] = *b"HCW1";

/// Bytes of the magic number and the checksum.
const PREFIX: usize = 8;

/// Where a record belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordEnvelope {
    /// Random, one for each snapshot and the deltas that continue it.
    pub(super) chain: u64,
    /// The number of its publication.
    pub(super) sequence: u64,
    /// The record's number within the publication.
    pub(super) number: u32,
    /// The position of its publication's first record.
    pub(super) begin: u64,
    /// The position of the newest snapshot that was complete before this publication; `None` before
    /// the first.
    pub(super) snapshot: Option<u64>,
}

/// The content of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum RecordBody {
    /// The first record.
    Begin { header: Box<PublicationHeader>, total: WeightsTotal, dim: usize },
    /// Weights.
    Part(PackedPart),
    /// The last record.
    End { snapshot: bool, checksum: u64 },
}

/// The amount of weights in a publication.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WeightsTotal {
    pub(super) blocks: u64,
    pub(super) values: u64,
    pub(super) rows: u64,
    pub(super) removed: u64,
}

/// Some of the weights of a publication.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct WeightsPart {
    pub(super) blocks: Vec<TensorSlice>,
    pub(super) ids: Vec<u64>,
    pub(super) rows: Vec<f32>,
    pub(super) removed: Vec<u64>,
}

/// The encoded form of a part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct PackedPart {
    blocks: Vec<BlockHeader>,
    /// `ids`, then `removed`, little-endian.
    ids: Vec<u8>,
    removed: usize,
    /// The values of all blocks, then of the rows, in planes.
    planes: Vec<u8>,
}

/// A block without its values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct BlockHeader {
    name: String,
    shape: Vec<usize>,
    start: usize,
    values: usize,
}

/// The encoded size of a block before compression.
pub(super) fn block_bytes(name: &str, values: usize) -> usize {
    name.len() + 24 + 4 * values
}

/// The encoded size of a row with its id.
pub(super) fn row_bytes(dim: usize) -> usize {
    8 + 4 * dim
}

pub(super) fn encode(
    envelope: &RecordEnvelope,
    body: &RecordBody,
    level: i32,
) -> Result<Vec<u8>, String> {
    let mut payload = Vec::from(MAGIC);
    payload.extend([0; 4]);
    let mut payload = postcard::to_extend(envelope, payload).map_err(|e| e.to_string())?;
    let body = postcard::to_stdvec(body).map_err(|e| e.to_string())?;
    payload.extend(zstd::bulk::compress(&body, level).map_err(|e| e.to_string())?);
    let crc = crc32fast::hash(&payload[PREFIX..]);
    payload[MAGIC.len()..PREFIX].copy_from_slice(&crc.to_le_bytes());
    Ok(payload)
}

/// Decodes a record; the error says what is wrong with it.
pub(super) fn decode(payload: &[u8]) -> Result<(RecordEnvelope, RecordBody), String> {
    let (envelope, body) = envelope(payload)?;
    let body = zstd::bulk::decompress(body, 4 * PART_BYTES)
        .map_err(|error| format!("it does not decompress: {error}"))?;
    let body = postcard::from_bytes(&body).map_err(|error| format!("it is damaged: {error}"))?;
    Ok((envelope, body))
}

/// Decodes a record's envelope; also returns the bytes after it.
pub(super) fn envelope(payload: &[u8]) -> Result<(RecordEnvelope, &[u8]), String> {
    let Some((prefix, rest)) = payload.split_at_checked(PREFIX) else {
        return Err("it is too short".into());
    };
    if prefix[..MAGIC.len()] != MAGIC {
        return Err("it is not a record of weights, or another version wrote it".into());
    }
    if crc32fast::hash(rest).to_le_bytes() != prefix[MAGIC.len()..] {
        return Err("its checksum is wrong".into());
    }
    postcard::take_from_bytes(rest).map_err(|error| format!("it is damaged: {error}"))
}

impl WeightsTotal {
    pub(super) fn add(&mut self, part: &WeightsPart) {
        self.blocks += part.blocks.len() as u64;
        self.values += part.blocks.iter().map(|block| block.values.len() as u64).sum::<u64>();
        self.rows += part.ids.len() as u64;
        self.removed += part.removed.len() as u64;
    }

    /// Returns an error if this is more than a follower accepts.
    pub(super) fn check(&self, dim: usize) -> Result<(), String> {
        let rows = self.rows.checked_mul(row_bytes(dim) as u64);
        let bytes = rows.and_then(|rows| rows.checked_add(self.values.checked_mul(4)?));
        match bytes.and_then(|bytes| bytes.checked_add(self.removed.checked_mul(8)?)) {
            Some(bytes) if bytes <= MAX_PUBLICATION_BYTES => Ok(()),
            _ => Err(format!("its weights are more than {} GiB", MAX_PUBLICATION_BYTES >> 30)),
        }
    }
}

impl WeightsPart {
    /// The encoded size of the part before compression.
    pub(super) fn bytes(&self) -> usize {
        let blocks = self.blocks.iter();
        blocks.map(|block| block_bytes(&block.name, block.values.len())).sum::<usize>()
            + 8 * (self.ids.len() + self.removed.len())
            + 4 * self.rows.len()
    }

    pub(super) fn pack(&self) -> PackedPart {
        let header = |block: &TensorSlice| BlockHeader {
            name: block.name.clone(),
            shape: block.shape.clone(),
            start: block.start,
            values: block.values.len(),
        };
        let values: Vec<f32> =
            self.blocks.iter().flat_map(|block| &block.values).chain(&self.rows).copied().collect();
        let ids = self.ids.iter().chain(&self.removed);
        PackedPart {
            blocks: self.blocks.iter().map(header).collect(),
            ids: ids.flat_map(|id| id.to_le_bytes()).collect(),
            removed: self.removed.len(),
            planes: (0..4).flat_map(|at| values.iter().map(move |v| v.to_le_bytes()[at])).collect(),
        }
    }
}

impl PackedPart {
    /// Decodes the part, whose rows have `dim` values; the error says which lengths do not fit.
    pub(super) fn unpack(self, dim: usize) -> Result<WeightsPart, String> {
        let fault = || "its lengths are inconsistent".to_owned();
        let (count, rest) = (self.planes.len() / 4, self.planes.len() % 4);
        let ids: Vec<u64> =
            self.ids.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let kept = ids.len().checked_sub(self.removed).ok_or_else(fault)?;
        let in_blocks =
            self.blocks.iter().try_fold(0usize, |sum, header| sum.checked_add(header.values));
        let in_blocks = in_blocks.ok_or_else(fault)?;
        let fits =
            kept.checked_mul(dim).and_then(|rows| rows.checked_add(in_blocks)) == Some(count);
        if !fits || rest != 0 || self.ids.len() != ids.len() * 8 {
            return Err(fault());
        }
        let plane = |at: usize| &self.planes[at * count..(at + 1) * count];
        let [a, b, c, d] = [plane(0), plane(1), plane(2), plane(3)];
        let mut values = (0..count).map(|i| f32::from_le_bytes([a[i], b[i], c[i], d[i]]));
        let block = |BlockHeader { name, shape, start, values: count }| TensorSlice {
            name,
            shape,
            start,
            values: values.by_ref().take(count).collect(),
        };
        let blocks = self.blocks.into_iter().map(block).collect();
        let rows = values.collect();
        Ok(WeightsPart { blocks, rows, ids: ids[..kept].to_vec(), removed: ids[kept..].to_vec() })
    }

    /// Updates the checksum of a publication.
    pub(super) fn digest(&self, checksum: u64) -> u64 {
        let word = |hash: u64, word: u64| {
            (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        };
        let bytes = |hash: u64, bytes: &[u8]| {
            let (words, rest) = bytes.as_chunks::<8>();
            let hash = words.iter().fold(hash, |hash, b| word(hash, u64::from_le_bytes(*b)));
            rest.iter().fold(word(hash, bytes.len() as u64), |hash, &b| word(hash, u64::from(b)))
        };
        let block = |hash: u64, header: &BlockHeader| {
            let hash = bytes(hash, header.name.as_bytes());
            let hash = header.shape.iter().fold(hash, |hash, &size| word(hash, size as u64));
            word(word(hash, header.start as u64), header.values as u64)
        };
        let hash = self.blocks.iter().fold(checksum, block);
        word(bytes(bytes(hash, &self.ids), &self.planes), self.removed as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part() -> WeightsPart {
        let block = |name: &str, start, values: usize| TensorSlice {
            name: name.into(),
            shape: vec![3, 5],
            start,
            values: (0..values).map(|i| (i as f32).sin() * 1e-3).collect(),
        };
        WeightsPart {
            blocks: vec![block("a.b", 0, 7), block("c", 10, 5)],
            ids: vec![u64::MAX, 3],
            rows: vec![1.0, -2.5, f32::MIN_POSITIVE, 0.0],
            removed: vec![9],
        }
    }

    fn envelope() -> RecordEnvelope {
        RecordEnvelope { chain: 7, sequence: 2, number: 1, begin: 40, snapshot: Some(3) }
    }

    #[test]
    fn a_part_comes_back_as_it_was_and_any_changed_byte_is_noticed() {
        let packed = part().pack();
        let payload = encode(&envelope(), &RecordBody::Part(packed.clone()), 3).unwrap();
        let (found, body) = decode(&payload).unwrap();
        assert_eq!((found, body), (envelope(), RecordBody::Part(packed.clone())));
        assert_eq!(packed.unpack(2).unwrap(), part());
        for at in 0..payload.len() {
            let mut damaged = payload.clone();
            damaged[at] ^= 4;
            assert!(decode(&damaged).is_err(), "byte {at}");
            assert!(decode(&payload[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let packed = part().pack();
        assert!(packed.clone().unpack(3).is_err(), "rows of another width");
        assert!(PackedPart { removed: 9, ..packed.clone() }.unpack(2).is_err());
        let mut cut = packed.clone();
        cut.planes.pop();
        assert!(cut.unpack(2).is_err());
        let mut huge = packed;
        huge.blocks[0].values = usize::MAX;
        assert!(huge.unpack(2).is_err());
    }

    #[test]
    fn what_cannot_be_compressed_fits_a_record() {
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            f32::from_bits((state >> 32) as u32)
        };
        let values: Vec<f32> = (0..PART_BYTES / 4).map(|_| noise()).collect();
        let block =
            TensorSlice { name: "x".repeat(200), shape: vec![values.len()], start: 0, values };
        let packed = WeightsPart { blocks: vec![block], ..WeightsPart::default() }.pack();
        let payload = encode(&envelope(), &RecordBody::Part(packed), 3).unwrap();
        assert!(payload.len() <= crate::streams::MAX_RECORD_BYTES, "{} bytes", payload.len());
    }
}
