//! Texts that are compressed as a whole. The first bytes say how, not the file's name.

use std::io::{BufRead as _, BufReader, Read, Result};

/// The endings that compressed files have behind their own.
pub(super) const ENDINGS: [&str; 7] = [".gz", ".gzip", ".zst", ".zstd", ".lz4", ".snappy", ".sz"];

const BUFFER_BYTES: usize = 1 << 16;

/// What the content says, whether it is compressed (gzip, Zstandard, frames of LZ4 or Snappy) or
/// not.
pub(super) fn decompress(content: impl Read + 'static) -> Result<Box<dyn Read>> {
    let mut content = BufReader::with_capacity(BUFFER_BYTES, content);
    Ok(match content.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(content)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(content)?),
        [0x04, 0x22, 0x4d, 0x18, ..] => Box::new(lz4_flex::frame::FrameDecoder::new(content)),
        [0xff, 0x06, 0x00, 0x00, b's', b'N', ..] => {
            Box::new(snap::read::FrameDecoder::new(content))
        }
        _ => Box::new(content),
    })
}
