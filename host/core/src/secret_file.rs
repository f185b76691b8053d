//! Files with secrets: tokens and private keys. They are read only if others cannot read them.

use std::{fs::File, io::Read, os::unix::fs::PermissionsExt, path::Path};

use crate::error::{CommonErrors as _, Error, Result};

/// Permission bits that must be off: the group may read, and others may do nothing.
const FORBIDDEN: u32 = 0o037;

/// Limit of a secret file, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// The content of a secret file.
///
/// # Errors
/// The file is missing, too large, or accessible to others.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let found = file.metadata().map_err(Error::io(path))?;
    let mode = found.permissions().mode() & 0o777;
    if mode & FORBIDDEN != 0 {
        let why = format!(
            "it contains secrets, but with permissions {mode:03o} others could read or change it; run `chmod 640 {}`",
            path.display()
        );
        return Err(Error::data(path, why));
    }
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(Error::data(
            path,
            format!("it is over {MOST_BYTES} bytes; is it the right file?"),
        ));
    }
    Ok(bytes)
}
