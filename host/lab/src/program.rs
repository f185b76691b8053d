//! The installed `hypercast` program, which demo and benches run as an operator does.

use std::path::{Path, PathBuf};

use crate::error::{CommonErrors as _, Error, Result};

/// The program: `$HYPERCAST`, or the `hypercast` beside this executable.
///
/// # Errors
/// Neither is there.
pub fn hypercast() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("HYPERCAST") {
        return Ok(given.into());
    }
    let own = std::env::current_exe()
        .map_err(|error| Error::internal(format!("cannot find this program: {error}")))?;
    let folder = own.parent().unwrap_or(Path::new("."));
    let beside = folder.join("hypercast");
    if beside.is_file() {
        return Ok(beside);
    }
    Err(Error::invalid(format!(
        "there is no `hypercast` in {}: build it (`cargo build -p hypercast`), or name it in $HYPERCAST",
        folder.display()
    )))
}
