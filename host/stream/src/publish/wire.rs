//! How a publication travels: records of a stream, each short enough for any engine, with a checksum of its own.
//!
//! A `Begin` says what follows, `Part`s hold weights, an `End` closes with a checksum of all parts; a
//! publication without its end never was. Numbers go as four planes of bytes, since the high bytes of neighbours are
//! alike, through zstd. Every record says which chain and publication it is of, so that nothing
//! foreign gets in between, and where the newest whole snapshot begins, so that whoever begins to follow finds it from
//! the last record. Which weights are sent, and what is done with them, is not its business.

use serde::{Deserialize, Serialize};

use super::{Header, TensorSlice};

/// Bytes of numbers and ids in a part before compression: what zstd cannot shrink still fits a record.
pub(super) const PART_BYTES: usize = 880 << 10;

/// Weights of a snapshot, in bytes, that a follower takes into memory at most.
const MOST_BYTES: u64 = 64 << 30;

const MAGIC: [u8; 4] = *b"HCW1";

/// Magic and checksum.
const PREFIX: usize = 8;

/// Where a record belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Envelope {
    /// Drawn by each publisher.
    pub(super) chain: u64,
    /// Of its publication.
    pub(super) sequence: u64,
    /// The record's number within the publication.
    pub(super) number: u32,
    /// Where its publication begins in the stream.
    pub(super) begin: u64,
    /// Where the newest snapshot begins that was whole before this publication; none before the first.
    pub(super) snapshot: Option<u64>,
}

/// What a record holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Body {
    /// The first record.
    Begin { header: Box<Header>, total: Total, dim: usize },
    /// Weights.
    Part(Packed),
    /// The last record.
    End { snapshot: bool, checksum: u64 },
}

/// What a publication has in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Total {
    pub(super) blocks: u64,
    pub(super) values: u64,
    pub(super) rows: u64,
    pub(super) removed: u64,
}

/// Some weights.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Part {
    pub(super) blocks: Vec<TensorSlice>,
    pub(super) ids: Vec<u64>,
    pub(super) rows: Vec<f32>,
    pub(super) removed: Vec<u64>,
}

/// A part as it is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Packed {
    blocks: Vec<Place>,
    /// `ids`, then `removed`, little-endian.
    ids: Vec<u8>,
    removed: usize,
    /// The values of all blocks and then of the rows, in planes.
    planes: Vec<u8>,
}

/// A block without its values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Place {
    name: String,
    shape: Vec<usize>,
    start: usize,
    values: usize,
}

/// Bytes of a block as it is written, before compression.
pub(super) fn block_bytes(name: &str, values: usize) -> usize {
    name.len() + 24 + 4 * values
}

/// Bytes of a row with its id.
pub(super) fn row_bytes(dim: usize) -> usize {
    8 + 4 * dim
}

/// A record's payload.
pub(super) fn encode(envelope: &Envelope, body: &Body, level: i32) -> Result<Vec<u8>, String> {
    let mut payload = Vec::from(MAGIC);
    payload.extend([0; 4]);
    let mut payload = postcard::to_extend(envelope, payload).map_err(|e| e.to_string())?;
    let body = postcard::to_stdvec(body).map_err(|e| e.to_string())?;
    payload.extend(zstd::bulk::compress(&body, level).map_err(|e| e.to_string())?);
    let crc = crc32fast::hash(&payload[PREFIX..]);
    payload[MAGIC.len()..PREFIX].copy_from_slice(&crc.to_le_bytes());
    Ok(payload)
}

/// Reads a record's payload; the error says what is wrong with it.
pub(super) fn decode(payload: &[u8]) -> Result<(Envelope, Body), String> {
    let (envelope, body) = envelope(payload)?;
    let body = zstd::bulk::decompress(body, 4 * PART_BYTES)
        .map_err(|error| format!("it does not decompress: {error}"))?;
    let body = postcard::from_bytes(&body).map_err(|error| format!("it is damaged: {error}"))?;
    Ok((envelope, body))
}

/// Reads where a record belongs; gives what follows too.
pub(super) fn envelope(payload: &[u8]) -> Result<(Envelope, &[u8]), String> {
    let Some((prefix, rest)) = payload.split_at_checked(PREFIX) else {
        return Err("it is too short".into());
    };
    if prefix[..MAGIC.len()] != MAGIC {
        return Err("it is no record of weights, or of another version".into());
    }
    if crc32fast::hash(rest).to_le_bytes() != prefix[MAGIC.len()..] {
        return Err("its checksum differs".into());
    }
    postcard::take_from_bytes(rest).map_err(|error| format!("it is damaged: {error}"))
}

impl Total {
    /// Adds a part's.
    pub(super) fn add(&mut self, part: &Part) {
        self.blocks += part.blocks.len() as u64;
        self.values += part.blocks.iter().map(|block| block.values.len() as u64).sum::<u64>();
        self.rows += part.ids.len() as u64;
        self.removed += part.removed.len() as u64;
    }

    /// Whether a follower can take so much.
    pub(super) fn check(&self, dim: usize) -> Result<(), String> {
        let rows = self.rows.checked_mul(row_bytes(dim) as u64);
        let bytes = rows.and_then(|rows| rows.checked_add(self.values.checked_mul(4)?));
        match bytes.and_then(|bytes| bytes.checked_add(self.removed.checked_mul(8)?)) {
            Some(bytes) if bytes <= MOST_BYTES => Ok(()),
            _ => Err(format!("it would be more than {} GiB", MOST_BYTES >> 30)),
        }
    }
}

impl Part {
    /// As it is written.
    pub(super) fn pack(&self) -> Packed {
        let place = |block: &TensorSlice| Place {
            name: block.name.clone(),
            shape: block.shape.clone(),
            start: block.start,
            values: block.values.len(),
        };
        let values: Vec<f32> =
            self.blocks.iter().flat_map(|block| &block.values).chain(&self.rows).copied().collect();
        let ids = self.ids.iter().chain(&self.removed);
        Packed {
            blocks: self.blocks.iter().map(place).collect(),
            ids: ids.flat_map(|id| id.to_le_bytes()).collect(),
            removed: self.removed.len(),
            planes: (0..4).flat_map(|at| values.iter().map(move |v| v.to_le_bytes()[at])).collect(),
        }
    }
}

impl Packed {
    /// What is in it, rows of `dim` values; the error says what does not fit.
    pub(super) fn unpack(self, dim: usize) -> Result<Part, String> {
        let fault = || "its lengths do not fit".to_owned();
        let (count, rest) = (self.planes.len() / 4, self.planes.len() % 4);
        let ids: Vec<u64> =
            self.ids.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let kept = ids.len().checked_sub(self.removed).ok_or_else(fault)?;
        let in_blocks =
            self.blocks.iter().try_fold(0usize, |sum, place| sum.checked_add(place.values));
        let in_blocks = in_blocks.ok_or_else(fault)?;
        let fits =
            kept.checked_mul(dim).and_then(|rows| rows.checked_add(in_blocks)) == Some(count);
        if !fits || rest != 0 || self.ids.len() != ids.len() * 8 {
            return Err(fault());
        }
        let plane = |at: usize| &self.planes[at * count..(at + 1) * count];
        let [a, b, c, d] = [plane(0), plane(1), plane(2), plane(3)];
        let mut values = (0..count).map(|i| f32::from_le_bytes([a[i], b[i], c[i], d[i]]));
        let block = |Place { name, shape, start, values: count }| TensorSlice {
            name,
            shape,
            start,
            values: values.by_ref().take(count).collect(),
        };
        let blocks = self.blocks.into_iter().map(block).collect();
        let rows = values.collect();
        Ok(Part { blocks, rows, ids: ids[..kept].to_vec(), removed: ids[kept..].to_vec() })
    }

    /// Goes on with the checksum of a publication.
    pub(super) fn digest(&self, checksum: u64) -> u64 {
        let word = |hash: u64, word: u64| {
            (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        };
        let bytes = |hash: u64, bytes: &[u8]| {
            let (words, rest) = bytes.as_chunks::<8>();
            let hash = words.iter().fold(hash, |hash, b| word(hash, u64::from_le_bytes(*b)));
            rest.iter().fold(word(hash, bytes.len() as u64), |hash, &b| word(hash, u64::from(b)))
        };
        let block = |hash: u64, place: &Place| {
            let hash = bytes(hash, place.name.as_bytes());
            let hash = place.shape.iter().fold(hash, |hash, &size| word(hash, size as u64));
            word(word(hash, place.start as u64), place.values as u64)
        };
        let hash = self.blocks.iter().fold(checksum, block);
        word(bytes(bytes(hash, &self.ids), &self.planes), self.removed as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part() -> Part {
        let block = |name: &str, start, values: usize| TensorSlice {
            name: name.into(),
            shape: vec![3, 5],
            start,
            values: (0..values).map(|i| (i as f32).sin() * 1e-3).collect(),
        };
        Part {
            blocks: vec![block("a.b", 0, 7), block("c", 10, 5)],
            ids: vec![u64::MAX, 3],
            rows: vec![1.0, -2.5, f32::MIN_POSITIVE, 0.0],
            removed: vec![9],
        }
    }

    fn envelope() -> Envelope {
        Envelope { chain: 7, sequence: 2, number: 1, begin: 40, snapshot: Some(3) }
    }

    #[test]
    fn a_part_comes_back_as_it_was_and_any_changed_byte_is_noticed() {
        let packed = part().pack();
        let payload = encode(&envelope(), &Body::Part(packed.clone()), 3).unwrap();
        let (found, body) = decode(&payload).unwrap();
        assert_eq!((found, body), (envelope(), Body::Part(packed.clone())));
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
        assert!(Packed { removed: 9, ..packed.clone() }.unpack(2).is_err());
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
        let packed = Part { blocks: vec![block], ..Part::default() }.pack();
        let payload = encode(&envelope(), &Body::Part(packed), 3).unwrap();
        assert!(payload.len() <= crate::engine::MAX_RECORD_BYTES, "{} bytes", payload.len());
    }
}
