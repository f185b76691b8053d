//! The 64-byte header that each binary file begins with: a magic word, the
//! format version, six numbers and a checksum. What the numbers mean is the
//! files' own business. Also the few primitives that all files share.

use std::fs::{File, OpenOptions};
use std::path::Path;

use hypercast_core::atomic_file;

use crate::error::{Result, corrupt, io};
use crate::{Error, meta};

/// Bytes of a header.
pub(crate) const SIZE: usize = 64;

/// A binary file's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileHeader {
    pub magic: [u8; 8],
    pub fields: [u64; 6],
}

impl FileHeader {
    /// The bytes to write: magic, version, six fields, CRC-32 of all before it.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&self.magic);
        bytes[8..12].copy_from_slice(&(meta::FORMAT_VERSION as u32).to_le_bytes());
        for (slot, field) in bytes[12..60].as_chunks_mut::<8>().0.iter_mut().zip(self.fields) {
            *slot = field.to_le_bytes();
        }
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header back; `path` is for messages, `magic` is what must be there.
    pub fn decode(bytes: &[u8], magic: [u8; 8], path: &Path) -> Result<FileHeader> {
        let Some(bytes) = bytes.first_chunk::<SIZE>() else {
            return Err(corrupt(path, "it is too short for its header"));
        };
        if bytes[..8] != magic {
            return Err(corrupt(path, "its first bytes are not those of such a file"));
        }
        if u32_at(bytes, 60) != crc32fast::hash(&bytes[..60]) {
            return Err(corrupt(path, "the checksum of its header does not match"));
        }
        let found = u64::from(u32_at(bytes, 8));
        if found != meta::FORMAT_VERSION {
            let supported = meta::FORMAT_VERSION;
            return Err(Error::Version { path: path.to_owned(), found, supported });
        }
        let mut fields = [0; 6];
        for (field, bytes) in fields.iter_mut().zip(bytes[12..60].as_chunks::<8>().0) {
            *field = u64::from_le_bytes(*bytes);
        }
        Ok(FileHeader { magic, fields })
    }
}

/// The little-endian number at byte `at`.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("within the file's checked length"))
}

/// The little-endian number at byte `at`.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("within the file's checked length"))
}

/// Creates `path` with `header` and zeros up to `len` bytes. The zeros are written and not left as
/// a hole, so that a full disk is an error here and not a signal when the mapping is first touched;
/// and in large aligned parts, since then systems that can keep the file in large pages, which
/// saves random reads their address translation.
pub(crate) fn create_zeroed(path: &Path, header: &FileHeader, len: u64) -> Result<File> {
    use std::io::Write;
    const PART: usize = 2 << 20;
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(io("create", path))?;
    let mut part = vec![0; len.min(PART as u64) as usize];
    part[..SIZE].copy_from_slice(&header.encode());
    let mut left = len;
    while left > 0 {
        let bytes = left.min(PART as u64) as usize;
        file.write_all(&part[..bytes]).map_err(io("write", path))?;
        part[..SIZE.min(bytes)].fill(0);
        left -= bytes as u64;
    }
    file.sync_all().map_err(io("sync", path))?;
    Ok(file)
}

/// Makes creations and renames within `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    atomic_file::sync_dir(dir).map_err(io("sync", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: FileHeader =
        FileHeader { magic: *b"HCTEST\0\0", fields: [1, 2, 3, u64::MAX, 5, 6] };

    #[test]
    fn a_header_reads_back_and_any_flipped_bit_is_seen() {
        let path = Path::new("x");
        let bytes = HEADER.encode();
        assert_eq!(FileHeader::decode(&bytes, HEADER.magic, path).unwrap(), HEADER);
        for bit in 0..SIZE * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            FileHeader::decode(&bad, HEADER.magic, path).unwrap_err();
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut bytes = HEADER.encode();
        bytes[8] = 9;
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        let error = FileHeader::decode(&bytes, HEADER.magic, Path::new("x")).unwrap_err();
        assert!(matches!(error, Error::Version { found: 9, supported: 2, .. }), "{error}");
    }
}
