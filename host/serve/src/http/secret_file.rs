//! Files that hold secrets: tokens and private keys. They are read whole, and only where others cannot read them.

use std::{fs::File, io::Read, os::unix::fs::PermissionsExt, path::Path};

use crate::error::{CommonErrors as _, Error, Result};

/// What group and others may not do: the group may read.
const FORBIDDEN: u32 = 0o037;

/// The bytes of a secret file, at most `most`.
///
/// # Errors
/// A file that is missing, too large, or open to others.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let found = file.metadata().map_err(Error::io(path))?;
    let mode = found.permissions().mode() & 0o777;
    if mode & FORBIDDEN != 0 {
        let why = format!(
            "it holds secrets, and its permissions are {mode:03o}: others could read or change it; run `chmod 640 {}`",
            path.display()
        );
        return Err(Error::data(path, why));
    }
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > most {
        return Err(Error::data(path, format!("it is over {most} bytes; is it the right file?")));
    }
    Ok(bytes)
}
