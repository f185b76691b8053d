//! Random changes of bytes, like those that a broken disk, a network or an attacker causes.

use arbitrary::{Result, Unstructured};

/// Numbers at the limits of lengths and offsets.
const EDGES: [u64; 8] =
    [0, 1, u32::MAX as u64, u64::MAX, i32::MAX as u64, i64::MAX as u64, 1 << 32, 1 << 20];

/// The most bytes that one change adds.
const MOST_ADDED: usize = 64;

/// Makes one change.
pub fn edit(u: &mut Unstructured, bytes: &mut Vec<u8>) -> Result<()> {
    if bytes.is_empty() {
        bytes.extend(u.bytes(u.len().min(MOST_ADDED))?);
        return Ok(());
    }
    let at = u.choose_index(bytes.len())?;
    match u.int_in_range(0..=9)? {
        0..=2 => bytes[at] ^= 1 << u.int_in_range(0..=7)?,
        3 => bytes[at] = u.arbitrary()?,
        4 => {
            let wide = u.choose(&EDGES)?.to_le_bytes();
            let width = [1, 2, 4, 8][u.choose_index(4)?].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&wide[..width]);
        }
        5 => {
            let added = u.bytes(u.len().min(MOST_ADDED).min(1 + at % 8))?.to_vec();
            bytes.splice(at..at, added);
        }
        6 => {
            let end = (at + u.int_in_range(1..=32)?).min(bytes.len());
            bytes.drain(at..end);
        }
        7 => bytes.truncate(at),
        8 => {
            let end = (at + u.int_in_range(1..=64)?).min(bytes.len());
            let to = u.choose_index(bytes.len())?;
            let copied = bytes[at..end].to_vec();
            let end = (to + copied.len()).min(bytes.len());
            bytes[to..end].copy_from_slice(&copied[..end - to]);
        }
        _ => bytes.extend(u.bytes(u.len().min(MOST_ADDED).min(1 + at % 32))?),
    }
    Ok(())
}

/// Makes at least one and up to `most` changes.
pub fn edits(u: &mut Unstructured, bytes: &mut Vec<u8>, most: usize) -> Result<()> {
    (0..u.int_in_range(1..=most)?).try_for_each(|_| edit(u, bytes))
}
